"""Attributes as strict JSON.

Zarr writes attributes with Python's `json`, which spells NaN and infinity in a way that no other
reader accepts. Here NaN becomes null and the infinities become the strings that the Zarr
specification uses for fill values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence, Set
from enum import Enum
from pathlib import Path
from typing import TypeAlias

import numpy as np

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


def to_json(value: object) -> Json:
    """Convert plain data to what strict JSON can hold.

    Args:
        value: None, a boolean, a number, a string, a path, an enumeration, a dataclass, a NumPy
            scalar or array, or mappings, sequences and sets of these.

    Returns:
        The same data in dicts, lists and scalars, with NaN as None and infinities as
        "Infinity" and "-Infinity".

    Raises:
        TypeError: The value is of any other type.
    """
    match value:
        case None | bool() | str():
            return value
        case Enum():
            return to_json(value.value)
        case int():
            return int(value)
        case float() if math.isnan(value):
            return None
        case float() if math.isinf(value):
            return "Infinity" if value > 0 else "-Infinity"
        case float():
            return float(value)
        case Path():
            return str(value)
        case np.ndarray() | np.generic():
            return to_json(value.tolist())
        case Mapping():
            return {str(key): to_json(item) for key, item in value.items()}
        case Set():
            return [to_json(item) for item in sorted(value)]
        case Sequence():
            return [to_json(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    raise TypeError(f"an attribute cannot hold a {type(value).__name__}")


def to_attributes(values: Mapping[str, object]) -> dict[str, Json]:
    """Convert a mapping to the attributes of a Zarr node."""
    return {str(key): to_json(item) for key, item in values.items()}


def first_difference(stored: Json, given: Json, field: str = "") -> tuple[str, Json, Json] | None:
    """Find the first field in which two nested JSON values differ.

    Args:
        stored: The one value.
        given: The other.
        field: The name of the place where both stand.

    Returns:
        The dotted name of the field and both values, None for one that is missing; or None if the
        values are equal.
    """
    if isinstance(stored, dict) and isinstance(given, dict):
        for key in [*stored, *(key for key in given if key not in stored)]:
            name = f"{field}.{key}" if field else key
            found = first_difference(stored.get(key), given.get(key), name)
            if found is not None:
                return found
        return None
    if isinstance(stored, list) and isinstance(given, list) and len(stored) == len(given):
        for index, (left, right) in enumerate(zip(stored, given, strict=True)):
            found = first_difference(left, right, f"{field}[{index}]")
            if found is not None:
                return found
        return None
    if type(stored) is type(given) and stored == given:
        return None
    return field, stored, given
