"""Opening nodes and reading arrays, with damage named by file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import zarr
from zarr.storage import LocalStore

from elm_lanczos.errors import StoreError, first_line
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
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
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
    if type(version) is not int or version < 1:
        raise StoreError(f"{path / 'zarr.json'} is damaged: its schema version is {version!r}")
    if version > SCHEMA_VERSION:
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
        The names of the groups below `prompts` whose creation was completed; a group whose metadata
        are damaged is among them, so that whoever reads it meets the damage.

    Raises:
        StoreError: The folder cannot be read.
    """
    folder = path / "prompts"
    if not folder.is_dir():
        return []
    try:
        entries = [entry.name for entry in folder.iterdir() if entry.name.isdecimal()]
    except OSError as error:
        raise StoreError(f"cannot read {folder}: {error.strerror or error}") from error
    return [name for name in sorted(entries, key=int) if _is_created(folder / name)]


def position_names(path: Path) -> list[str]:
    """List the further output positions of a prompt in order.

    Args:
        path: The folder of the prompt's group.

    Returns:
        The names of the groups whose creation was completed, damaged ones among them.
    """
    names = (
        entry.name
        for entry in path.glob("position_*")
        if entry.name.removeprefix("position_").isdecimal() and _is_created(entry)
    )
    return sorted(names, key=lambda name: int(name.removeprefix("position_")))


def _is_created(group: Path) -> bool:
    """Tell whether a group's attributes were written, readable or not."""
    try:
        return bool(read_attributes(group))
    except StoreError:
        return True


def read_array(store: LocalStore, name: str, tokens: slice | None = None) -> Array:
    """Read one array, whole or in part.

    Args:
        store: The Zarr store.
        name: Path of the array.
        tokens: The part along its first dimension; all of it by default.

    Returns:
        Its values.

    Raises:
        StoreError: It is missing or damaged; the message names the file.
    """
    array = open_array(store, name)
    try:
        return read_values(array, ... if tokens is None else tokens)
    except UnreadableError as error:
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
    except Exception as error:  # Zarr's parser raises whatever the metadata makes it meet
        reason = first_line(error) or type(error).__name__
        raise StoreError(f"{store.root / name} is missing or damaged: {reason}") from error


class UnreadableError(Exception):
    """Values that a file does not give back; the message says why."""


def read_values(array: zarr.Array[Any], selection: Any = ...) -> Array:
    """Read a part of an array.

    Args:
        array: The array.
        selection: Which part; all of it by default.

    Returns:
        Its values.

    Raises:
        UnreadableError: A checksum does not fit, or a file cannot be read or decoded.
    """
    try:
        values = array[selection]
    except Exception as error:  # a codec raises whatever damaged bytes make it meet
        raise UnreadableError(first_line(error) or type(error).__name__) from error
    assert not isinstance(values, (int, float, complex, str, bytes))
    return values  # type: ignore[return-value]


def chunk_file(store: LocalStore, array: zarr.Array[Any], index: int) -> Path:
    """Name the file of an array that holds one owner's rows, or all of them for index 0.

    Args:
        store: The Zarr store.
        array: The array.
        index: Index of the owner.

    Returns:
        The path, whether or not a file is there.
    """
    suffix = ["0"] * (array.ndim - 1)
    return store.root / array.path / ".".join(["c", str(index), *suffix])


def _damaged_file(store: LocalStore, array: zarr.Array[Any]) -> Path:
    """Find the first file of an array that cannot be read."""
    step = (array.shards or array.chunks)[0]
    for index, start in enumerate(range(0, array.shape[0], step)):
        try:
            read_values(array, slice(start, start + step))
        except UnreadableError:
            return chunk_file(store, array, index)
    return store.root / array.path
