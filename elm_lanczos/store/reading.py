"""Opening nodes and reading arrays, with damage named by file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zarr
from zarr.storage import LocalStore

from elm_lanczos.errors import StoreError
from elm_lanczos.store.attributes import Json
from elm_lanczos.store.layout import FORMAT, SCHEMA_VERSION, Array


def read_attributes(path: Path) -> dict[str, Json]:
    """Read the attributes of one node.

    Args:
        path: Its folder.

    Returns:
        The attributes; none if the node does not exist.

    Raises:
        StoreError: The node's metadata cannot be read.
    """
    try:
        metadata = json.loads((path / "zarr.json").read_bytes())
        return dict(metadata.get("attributes", {}))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, AttributeError, TypeError) as error:
        raise StoreError(f"{path / 'zarr.json'} is damaged: {error}") from error


def is_result_store(path: Path) -> bool:
    """Tell whether a folder holds a store written by this package, whatever its version."""
    return read_attributes(path).get("format") == FORMAT


def check_result_store(path: Path) -> None:
    """Check that a path holds a store that this version can read.

    Args:
        path: The folder of the store.

    Raises:
        StoreError: It does not; the message says what is there instead.
    """
    if not path.exists():
        raise StoreError(f"{path} does not exist")
    if not path.is_dir():
        raise StoreError(f"{path} is a file, not a result store")
    if not is_result_store(path):
        raise StoreError(f"{path} is not a result store of elm-lanczos")
    version = read_attributes(path).get("schema_version")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise StoreError(
            f"{path} has schema version {version}, newer than the {SCHEMA_VERSION} this version "
            "of elm-lanczos reads: upgrade elm-lanczos"
        )


def prompt_names(path: Path) -> list[str]:
    """List the prompts of a store in order.

    A group's attributes are written last: one without them was being created when its run ended.
    Prompts are created in any order, so that some may not exist yet while later ones do.

    Args:
        path: The folder of the store.

    Returns:
        The names of the groups below `prompts` whose creation was completed.
    """
    folder = path / "prompts"
    if not folder.is_dir():
        return []
    names = sorted((entry.name for entry in folder.iterdir() if entry.name.isdecimal()), key=int)
    return [name for name in names if read_attributes(folder / name)]


def position_names(path: Path) -> list[str]:
    """List the further output positions of a prompt in order.

    Args:
        path: The folder of the prompt's group.

    Returns:
        The names of the groups whose creation was completed.
    """
    names = (entry.name for entry in path.glob("position_*") if read_attributes(entry))
    return sorted(names, key=lambda name: int(name.removeprefix("position_")))


def read_array(store: LocalStore, name: str) -> Array:
    """Read one array whole.

    Args:
        store: The Zarr store.
        name: Path of the array.

    Returns:
        Its values.

    Raises:
        StoreError: It is missing or damaged; the message names the file.
    """
    array = open_array(store, name)
    try:
        return _values(array, ...)
    except (ValueError, RuntimeError) as error:
        raise StoreError(f"{_damaged_file(store, array)} is damaged: {error}") from error


def open_array(store: LocalStore, name: str) -> zarr.Array[Any]:
    """Open one array.

    Args:
        store: The Zarr store.
        name: Path of the array.

    Returns:
        The array.

    Raises:
        StoreError: It is missing or its metadata is damaged.
    """
    try:
        return zarr.open_array(store, path=name, mode="r" if store.read_only else "r+")
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise StoreError(f"{store.root / name} is missing or damaged: {error}") from error


def _values(array: zarr.Array[Any], selection: Any) -> Array:
    values = array[selection]
    assert not isinstance(values, (int, float, complex, str, bytes))
    return values  # type: ignore[return-value]


def _damaged_file(store: LocalStore, array: zarr.Array[Any]) -> Path:
    """Find the first file of an array that cannot be read."""
    step = (array.shards or array.chunks)[0]
    suffix: Sequence[str] = ["0"] * (array.ndim - 1)
    for index, start in enumerate(range(0, array.shape[0], step)):
        try:
            _values(array, slice(start, start + step))
        except (ValueError, RuntimeError):
            return store.root / array.path / ".".join(["c", str(index), *suffix])
    return store.root / array.path
