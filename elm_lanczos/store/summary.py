"""The flat table over all tokens of all prompts, written once a run is complete."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from elm_lanczos.store.layout import STATUS_ATTRS, Array
from elm_lanczos.store.place import Place
from elm_lanczos.store.prompt_group import PromptGroup
from elm_lanczos.store.reading import below, read_array, read_attributes

SUMMARY = "summary"
_CHUNK_ROWS = 65536
_COPIED = ("token_id", "token_str", "status", "stable_rank", "attribution", "S", "residual")


def write_summary(place: Place, prompts: Sequence[PromptGroup]) -> None:
    """Write the table, replacing an earlier one.

    Args:
        place: Where the store lies.
        prompts: The prompts in order.

    Raises:
        StoreError: A prompt's arrays are damaged, the disk is full or the store cannot be written.
    """
    names = [[prompt.name, *(g.name for g in prompt.positions.values())] for prompt in prompts]
    columns = summary_columns(place, names)
    with place.writing():
        place.remove(SUMMARY)
        for name, values in columns.items():
            _write_column(place, name, values)
        table = zarr.open_group(place.zarr, path=SUMMARY, mode="a", zarr_format=3)
        table.update_attributes(
            {"title": "all tokens of all prompts", "coordinates": "prompt position token token_str"}
        )


def summary_columns(place: Place, names: Sequence[Sequence[str]]) -> dict[str, Array]:
    """Collect the columns of the table.

    It has one row per token of every prompt, and of every further output position after its
    prompt. `S` and `residual` have as many columns as the widest prompt has triplets, NaN beyond.

    Args:
        place: Where the store lies.
        names: For each prompt the paths of its group and of those of its further positions.

    Returns:
        The columns by name, as many rows in each.

    Raises:
        StoreError: A prompt's arrays are damaged.
    """
    columns: dict[str, list[Array]] = {name: [] for name in ("prompt", "position", "token")}
    columns |= {name: [] for name in _COPIED}
    for index, group in ((i, name) for i, groups in enumerate(names) for name in groups):
        copied = {name: read_array(place, below(group, name)) for name in _COPIED}
        tokens = len(copied["token_id"])
        position = read_attributes(place, group)["position"]
        columns["prompt"].append(np.full(tokens, index, dtype=np.int32))
        columns["position"].append(np.full(tokens, position, dtype=np.int32))
        columns["token"].append(np.arange(tokens, dtype=np.int32))
        for name, values in copied.items():
            columns[name].append(values)
    return {name: _stack(parts) for name, parts in columns.items()}


def _stack(parts: Sequence[Array]) -> Array:
    """Join columns along the rows, padding narrower ones with NaN."""
    width = max((part.shape[1] for part in parts if part.ndim == 2), default=0)
    padded = [
        np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=np.nan)
        if part.ndim == 2
        else part
        for part in parts
    ]
    return np.concatenate(padded)


def _write_column(place: Place, name: str, values: Array) -> None:
    array = zarr.create_array(
        place.zarr,
        name=below(SUMMARY, name),
        shape=values.shape,
        dtype=str if name == "token_str" else values.dtype,
        chunks=(min(len(values), _CHUNK_ROWS), *values.shape[1:]),
        compressors=[BloscCodec(cname="lz4", shuffle="bitshuffle"), Crc32cCodec()],
        fill_value={"f": np.nan, "i": -1, "u": 0}.get(values.dtype.kind, ""),
        dimension_names=("row", "component")[: values.ndim],
        chunk_key_encoding={"name": "default", "separator": "."},
        attributes=dict(STATUS_ATTRS) if name == "status" else None,
    )
    array[:] = values
