"""What is wrong with the files of a group, found by reading every one of them.

Every chunk carries a crc32c, so reading is checking. A file that is missing is no error to Zarr: it
stands for fill values. A row that is marked done holds none, which is how a lost file shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from zarr.storage import MemoryStore

from elm_lanczos.errors import DamagedError
from elm_lanczos.status import Status
from elm_lanczos.store.attributes import first_difference, to_json
from elm_lanczos.store.layout import (
    DONE,
    LAYOUT,
    OUTPUT_ARRAYS,
    ROW_ARRAYS,
    TOKEN_ARRAYS,
    Array,
    create_array,
    owner_ranges,
)
from elm_lanczos.store.place import Address, Place
from elm_lanczos.store.reading import (
    UnreadableError,
    below,
    chunk_name,
    open_array,
    read_attributes,
    read_values,
)

OUTPUTS_WRITTEN = "outputs_written"
"""The attribute of a group whose output, constant and attribution are written."""

FINISHED = "finished"
"""The attribute of a group whose work is complete."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a store.

    Attributes:
        reason: What is wrong.
        group: Path of the group inside the store; empty for the store itself.
        array: Name of the array; empty where it is none.
        tokens: The rows concerned; None for the whole array.
        file: The file or folder, if one is to blame.
    """

    reason: str
    group: str = ""
    array: str = ""
    tokens: range | None = None
    file: Address | None = None

    def __str__(self) -> str:
        """Name the place, the file and what is wrong, in one line."""
        place = [part for part in (self.group, self.array) if part]
        if self.tokens is not None:
            first, last = self.tokens.start, self.tokens.stop - 1
            place.append(f"token {first}" if first == last else f"tokens {first} to {last}")
        where = [part for part in (", ".join(place), str(self.file or "")) if part]
        return ": ".join([*where, " ".join(self.reason.split())])


def layout_faults(place: Place, name: str) -> list[Fault]:
    """Compare the metadata of a group's arrays with what the layout prescribes.

    Args:
        place: Where the store lies.
        name: Path of the group.

    Returns:
        One fault for each array that is missing, unreadable or not of the layout.
    """
    arrays, faults = {}, []
    for spec in LAYOUT:
        try:
            arrays[spec.name] = open_array(place, below(name, spec.name))
        except DamagedError as error:
            file = below(name, spec.name, "zarr.json")
            reason = str(error.__cause__) if place.exists(file) else "is missing"
            faults.append(Fault(reason, name, spec.name, file=place.path / file))
    sizes, real = _sizes(arrays), _real(arrays)
    for spec in LAYOUT:
        if spec.name in arrays and all(dim in sizes for dim in spec.dims):
            expected = create_array(MemoryStore(), name, spec, sizes, real).metadata
            found = first_difference(
                to_json(arrays[spec.name].metadata.to_dict()), to_json(expected.to_dict())
            )
            if found is not None:
                reason = f"{found[0]} is {found[1]!r}, not {found[2]!r}"
                file = below(name, spec.name, "zarr.json")
                faults.append(Fault(reason, name, spec.name, file=place.path / file))
    return faults


def _sizes(arrays: Mapping[str, zarr.Array[Any]]) -> dict[str, int]:
    """The length of every dimension on which most arrays agree."""
    votes: dict[str, Counter[int]] = {}
    for spec in LAYOUT:
        if spec.name in arrays:
            for dim, size in zip(spec.dims, arrays[spec.name].shape, strict=False):
                votes.setdefault(dim, Counter())[int(size)] += 1
    return {dim: counter.most_common(1)[0][0] for dim, counter in votes.items()}


def _real(arrays: Mapping[str, zarr.Array[Any]]) -> str:
    """The type of most real arrays; float32 if there is none."""
    names = [arrays[s.name].dtype.name for s in LAYOUT if s.dtype == "real" and s.name in arrays]
    kept = Counter(name for name in names if name in ("float32", "float64"))
    return kept.most_common(1)[0][0] if kept else "float32"


def read_owners(place: Place, name: str) -> Iterator[tuple[range, dict[str, Array], list[Fault]]]:
    """Read all rows of a group, one owner at a time.

    Args:
        place: Where the store lies.
        name: Path of a group whose layout is right.

    Yields:
        The tokens of an owner; its rows by array, `done` among them, of the arrays that can be
        read; and one fault for each file that cannot, or that gives nothing though its rows are
        done.
    """
    finished = read_attributes(place, name).get(FINISHED) is True
    arrays = {spec.name: open_array(place, below(name, spec.name)) for spec in (DONE, *ROW_ARRAYS)}
    for owner, tokens in enumerate(owner_ranges(arrays["done"].shape[0])):
        rows: dict[str, Array] = {}
        faults: list[Fault] = []
        for array, opened in arrays.items():  # `done` first: a run may be writing
            try:
                rows[array] = read_values(opened, slice(tokens.start, tokens.stop))
            except UnreadableError as error:
                file = place.path / chunk_name(opened, owner)
                faults.append(Fault(f"is damaged: {error}", name, array, tokens, file))
        marks = rows.get("done")
        if marks is not None and finished and not marks.all():
            file = place.path / chunk_name(arrays["done"], owner)
            reason = "marks rows as not done though the group is finished"
            faults.append(Fault(reason, name, "done", tokens, file))
        live = computed(rows)
        for spec in ROW_ARRAYS if live.any() else ():
            if spec.name in rows and _is_empty(rows[spec.name][live], spec.fill):
                chunk = chunk_name(arrays[spec.name], owner)
                missing = not place.is_file(chunk)
                reason = "is missing" if missing else "holds nothing though its rows are done"
                faults.append(Fault(reason, name, spec.name, tokens, place.path / chunk))
        yield tokens, rows, faults


def computed(rows: Mapping[str, Array]) -> Array:
    """Tell which rows of an owner hold triplets.

    Args:
        rows: What could be read of the owner.

    Returns:
        Bool (n,): requested and done, and not given up with nothing but NaN because the operator's
        products were not finite.
    """
    if not {"done", "status"} <= rows.keys():
        return np.zeros(0, dtype=bool)
    status = rows["status"]
    live: Array = rows["done"] & (status != Status.NOT_REQUESTED)
    known = [rows[array] for array in ("U", "S", "V", "residual") if array in rows]
    blank = [np.isnan(values).reshape(len(values), -1).all(1) for values in known]
    lost = (status == Status.NOT_CONVERGED) & np.logical_and.reduce([live, *blank])
    return live & ~lost


def _is_empty(values: Array, fill: object) -> bool:
    """Whether an array holds nothing but fill values."""
    return bool((np.isnan(values) if values.dtype.kind == "f" else values == fill).all())


def whole_faults(place: Place, name: str) -> Iterator[Fault]:
    """Read the arrays that belong to a prompt as a whole.

    Args:
        place: Where the store lies.
        name: Path of a group whose layout is right.

    Yields:
        A fault for each that is damaged, or that should be written and is not.
    """
    written = read_attributes(place, name).get(OUTPUTS_WRITTEN) is True
    for spec in (*TOKEN_ARRAYS, *(OUTPUT_ARRAYS if written else ())):
        array = open_array(place, below(name, spec.name))
        chunk = chunk_name(array, 0)
        file = place.path / chunk
        try:
            values = read_values(array)
        except UnreadableError as error:
            yield Fault(f"is damaged: {error}", name, spec.name, file=file)
            continue
        if _is_empty(values, spec.fill) and not place.is_file(chunk):
            yield Fault("is missing", name, spec.name, file=file)


def damage(place: Place, name: str) -> Iterator[Fault]:
    """Read every file of a group whose layout is right.

    Args:
        place: Where the store lies.
        name: Path of the group.

    Yields:
        A fault for each file that is damaged or lost.
    """
    for _, _, faults in read_owners(place, name):
        yield from faults
    yield from whole_faults(place, name)
