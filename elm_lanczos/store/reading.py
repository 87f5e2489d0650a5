"""Opening nodes and reading arrays, with damage named by file."""

from __future__ import annotations

import json
from typing import Any, Literal

import zarr

from elm_lanczos.errors import DamagedError, StoreError, first_line
from elm_lanczos.store.attributes import Json
from elm_lanczos.store.layout import FORMAT, SCHEMA_VERSION, Array
from elm_lanczos.store.place import Address, Place


def below(*names: str) -> str:
    """Join names to the one of what lies below."""
    return "/".join(filter(None, names))


def read_attributes(place: Place, name: str = "") -> dict[str, Json]:
    """Read the attributes of one node.

    Args:
        place: Where the store lies.
        name: Path of the node; the root by default.

    Returns:
        The attributes; none if the node does not exist.

    Raises:
        DamagedError: The node's metadata cannot be read.
    """
    file = below(name, "zarr.json")
    content = place.read(file)
    if content is None:
        return {}
    try:
        return dict(json.loads(content).get("attributes", {}))
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise DamagedError(f"{place.path / file} is damaged: {error}") from error


def is_result_store(place: Place) -> bool:
    """Tell whether a place holds a store written by this package, whatever its version."""
    return read_attributes(place).get("format") == FORMAT


def check_result_store(place: Place) -> None:
    """Check that a place holds a store that this version can read.

    Args:
        place: Where the store should lie.

    Raises:
        StoreError: It does not; the message says what is there instead.
    """
    if place.is_file(""):
        raise StoreError(f"{place.path} is a file, not a result store")
    if not place.is_folder(""):
        raise StoreError(f"{place.path} does not exist")
    if not is_result_store(place):
        raise StoreError(f"{place.path} is not a result store of elm-lanczos")
    version = read_attributes(place).get("schema_version")
    if type(version) is not int or version < 1:
        file = place.path / "zarr.json"
        raise StoreError(f"{file} is damaged: its schema version is {version!r}")
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"{place.path} has schema version {version}, newer than the {SCHEMA_VERSION} this "
            "version of elm-lanczos reads: upgrade elm-lanczos"
        )


def prompt_names(place: Place) -> list[str]:
    """List the prompts of a store in order.

    A group's attributes are written last: one without them was being created when its run ended.
    Prompts are created in any order, so that some may not exist yet while later ones do.

    Args:
        place: Where the store lies.

    Returns:
        The paths of the groups below `prompts` whose creation was completed; a group whose metadata
        are damaged is among them, so that whoever reads it meets the damage.

    Raises:
        StoreError: The store cannot be read.
    """
    names = _numbered(place, "prompts")
    return [name for name in names if _is_created(place, name)]


def position_names(place: Place, prompt: str) -> list[str]:
    """List the further output positions of a prompt in order.

    Args:
        place: Where the store lies.
        prompt: Path of the prompt's group.

    Returns:
        The paths of the groups whose creation was completed, damaged ones among them.

    Raises:
        StoreError: The store cannot be read.
    """
    names = _numbered(place, prompt, "position_")
    return [name for name in names if _is_created(place, name)]


def layer_names(place: Place, prompt: str) -> list[str]:
    """List the groups of layers that were added to a prompt, `layer_07/mlp` and the like, in order.

    Args:
        place: Where the store lies.
        prompt: Path of the prompt's group.

    Returns:
        The paths of the groups whose creation was completed, damaged ones among them.

    Raises:
        StoreError: The store cannot be read.
    """
    layers = _numbered(place, prompt, "layer_")
    names = [below(layer, name) for layer in layers for name in sorted(place.names(layer))]
    return [name for name in names if place.is_folder(name) and _is_created(place, name)]


def _numbered(place: Place, group: str, prefix: str = "") -> list[str]:
    """The paths of the nodes in a group that are a prefix and a number, in their order."""
    numbers = [n.removeprefix(prefix) for n in place.names(group) if n.startswith(prefix)]
    numbers = sorted(filter(str.isdecimal, numbers), key=int)
    return [below(group, prefix + number) for number in numbers]


def _is_created(place: Place, group: str) -> bool:
    """Tell whether a group's attributes were written, readable or not."""
    try:
        return bool(read_attributes(place, group))
    except DamagedError:
        return True


def read_array(place: Place, name: str, tokens: slice | None = None) -> Array:
    """Read one array, whole or in part.

    Args:
        place: Where the store lies.
        name: Path of the array.
        tokens: The part along its first dimension; all of it by default.

    Returns:
        Its values.

    Raises:
        DamagedError: It is missing or damaged; the message names the file.
    """
    array = open_array(place, name)
    try:
        return read_values(array, ... if tokens is None else tokens)
    except UnreadableError as error:
        raise DamagedError(f"{_damaged_file(place, array)} is damaged: {error}") from error


def open_array(place: Place, name: str) -> zarr.Array[Any]:
    """Open one array.

    Args:
        place: Where the store lies.
        name: Path of the array.

    Returns:
        The array.

    Raises:
        DamagedError: It is missing or its metadata is damaged.
        StoreError: The store gives no answer at all.
    """
    try:
        mode: Literal["r", "r+"] = "r" if place.zarr.read_only else "r+"
        return zarr.open_array(place.zarr, path=name, mode=mode, zarr_format=3)
    except StoreError:
        raise
    except Exception as error:  # Zarr's parser raises whatever the metadata makes it meet
        reason = first_line(error) or type(error).__name__
        raise DamagedError(f"{place.path / name} is missing or damaged: {reason}") from error


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
        StoreError: The store gives no answer at all.
    """
    try:
        values = array[selection]
    except StoreError:  # nothing is known of the file
        raise
    except Exception as error:  # a codec raises whatever damaged bytes make it meet
        raise UnreadableError(first_line(error) or type(error).__name__) from error
    assert not isinstance(values, (int, float, complex, str, bytes))
    return values  # type: ignore[return-value]


def chunk_name(array: zarr.Array[Any], index: int) -> str:
    """Name the file of an array that holds one owner's rows, or all of them for index 0.

    Args:
        array: The array.
        index: Index of the owner.

    Returns:
        Its path in the store, whether or not a file is there.
    """
    suffix = ["0"] * (array.ndim - 1)
    return below(array.path, ".".join(["c", str(index), *suffix]))


def _damaged_file(place: Place, array: zarr.Array[Any]) -> Address:
    """Find the first file of an array that cannot be read."""
    step = (array.shards or array.chunks)[0]
    for index, start in enumerate(range(0, array.shape[0], step)):
        try:
            read_values(array, slice(start, start + step))
        except UnreadableError:
            return place.path / chunk_name(array, index)
    return place.path / array.path
