"""Writing one prompt: rows by owner, each committed after its data.

The crash protocol: an owner's shards are written and synced, then its chunk of `done`. Whatever
happens in between, a row marked done is right; rows not marked are computed again, whole owners at
a time under the stored plan, so that the result has the same bits as an undisturbed run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import zarr

from elm_lanczos.errors import StoreError
from elm_lanczos.status import Status
from elm_lanczos.store.attributes import Json, to_attributes, to_json
from elm_lanczos.store.faults import FINISHED, OUTPUTS_WRITTEN, Fault, damage, layout_faults
from elm_lanczos.store.layout import (
    LAYOUT,
    OUTPUT_ARRAYS,
    ROW_ARRAYS,
    Array,
    PromptHeader,
    create_array,
    owner_ranges,
)
from elm_lanczos.store.place import Address, Place
from elm_lanczos.store.reading import (
    below,
    chunk_name,
    open_array,
    position_names,
    read_array,
    read_attributes,
)


class PromptGroup:
    """The group of one prompt, or of one of its further output positions, open for writing.

    Processes may write different owners at the same time; everything else is for one coordinator.

    Args:
        place: Where the store lies, open for writing.
        name: Path of the group.
    """

    def __init__(self, place: Place, name: str) -> None:
        self._place = place
        self.name = name
        self._arrays: dict[str, zarr.Array[Any]] = {}

    def __repr__(self) -> str:
        """Show where the group lies and how much of it is done."""
        done = len(self.owners()) - len(self.pending())
        return f"<PromptGroup {self.path}: {done} of {len(self.owners())} owners done>"

    @property
    def path(self) -> Address:
        """The folder of the group."""
        return self._place.path / self.name

    @property
    def attrs(self) -> dict[str, Json]:
        """The attributes as they are stored now."""
        return read_attributes(self._place, self.name)

    @property
    def plan(self) -> Json:
        """The plan fixed at creation."""
        return self.attrs["plan"]

    @property
    def position(self) -> int:
        """The output position whose prediction is explained."""
        position = self.attrs["position"]
        assert isinstance(position, int)
        return position

    @cached_property
    def requested(self) -> Array:
        """Whether each token's triplets were asked for, bool (T,)."""
        requested: Array = (
            read_array(self._place, below(self.name, "status")) != Status.NOT_REQUESTED
        )
        return requested

    @property
    def tokens(self) -> int:
        """Length T of the prompt."""
        return int(self._array("done").shape[0])

    def owners(self) -> list[range]:
        """The token ranges that are computed, written and committed as a whole."""
        return owner_ranges(self.tokens)

    def pending(self) -> list[int]:
        """The indices of the owners that are not committed; one without requested tokens is."""
        done = read_array(self._place, below(self.name, "done"))
        return [
            index for index, owner in enumerate(self.owners()) if not done[_tokens(owner)].all()
        ]

    def forget_damaged(self) -> list[Fault]:
        """Take back what a resumed run must not trust: files that are damaged or lost.

        Their owners are marked as not done and the group as not finished before the files are
        removed, so that a run that is killed in between loses nothing but the same work.

        Returns:
            What was damaged, one fault a file.

        Raises:
            StoreError: An array's metadata are damaged, which no computation brings back; or the
                store cannot be written.
        """
        for fault in layout_faults(self._place, self.name):
            raise StoreError(f"{fault}; start again with --overwrite")
        faults = list(damage(self._place, self.name))
        with self._place.writing():
            owners = [0 if f.tokens is None else self.owners().index(f.tokens) for f in faults]
            for fault, owner in zip(faults, owners, strict=True):
                if fault.tokens is not None and fault.array != "done":
                    self._remove("done", owner)
            if faults:
                self.set_attrs({OUTPUTS_WRITTEN: False, FINISHED: False})
            for fault, owner in zip(faults, owners, strict=True):
                self._remove(fault.array, owner)
        return faults

    def restore(
        self, token_ids: Sequence[int], token_strings: Sequence[str], requested: Sequence[int]
    ) -> None:
        """Write again what was written at creation, where it is no longer there.

        Args:
            token_ids: The T token ids.
            token_strings: The T tokens as text.
            requested: Indices of the tokens to compute.

        Raises:
            StoreError: The disk is full or the store cannot be written.
        """
        created = {
            "token_id": np.array(token_ids, dtype=np.int32),
            "token_str": np.array(token_strings, dtype=object),
        }
        skipped = np.ones(self.tokens, dtype=bool)
        skipped[list(requested)] = False
        done = read_array(self._place, below(self.name, "done"))
        status = read_array(self._place, below(self.name, "status"))
        with self._place.writing():
            for name, values in created.items():
                if not np.array_equal(read_array(self._place, below(self.name, name)), values):
                    self._array(name)[:] = values
            for tokens in map(_tokens, (self.owners()[owner] for owner in self.pending())):
                if ((status[tokens] == Status.NOT_REQUESTED) != skipped[tokens]).any():
                    self._array("status")[tokens] = np.where(
                        skipped[tokens], Status.NOT_REQUESTED, Status.PENDING
                    )
                if (done[tokens] != skipped[tokens]).any():
                    self._array("done")[tokens] = skipped[tokens]

    @property
    def complete(self) -> bool:
        """Whether every owner is committed and the outputs are written."""
        return not self.pending() and self.attrs.get(OUTPUTS_WRITTEN) is True

    def empty_rows(self, owner: int) -> dict[str, Array]:
        """Make the rows of one owner before anything is computed.

        Args:
            owner: Index of the owner.

        Returns:
            Every row array filled with its fill value, `status` pending or not requested.
        """
        tokens = self.owners()[owner]
        rows = {}
        for spec in ROW_ARRAYS:
            array = self._array(spec.name)
            shape = (len(tokens), *array.shape[1:])
            rows[spec.name] = np.full(shape, spec.fill, dtype=array.dtype)
        rows["status"][~self.requested[_tokens(tokens)]] = Status.NOT_REQUESTED
        return rows

    def write_rows(self, owner: int, rows: Mapping[str, Array]) -> None:
        """Write all row arrays of one owner; they count only after `commit`.

        Args:
            owner: Index of the owner.
            rows: Every array of `ROW_ARRAYS` by name, its first axis the owner's tokens, with
                fills and the status not requested for tokens that were not asked for.

        Raises:
            ValueError: An array is missing, unknown or of another shape, or a status disagrees
                with what was requested.
            StoreError: The disk is full or the store cannot be written.
        """
        tokens = _tokens(self.owners()[owner])
        expected = {spec.name for spec in ROW_ARRAYS}
        if rows.keys() != expected:
            raise ValueError(f"rows differ in {sorted(rows.keys() ^ expected)}")
        status = np.asarray(rows["status"])
        for name, values in rows.items():
            shape = (tokens.stop - tokens.start, *self._array(name).shape[1:])
            if np.shape(values) != shape:
                raise ValueError(f"{name} has shape {np.shape(values)}, not {shape}")
        if ((status != Status.NOT_REQUESTED) != self.requested[tokens]).any():
            raise ValueError("status disagrees with the tokens requested")
        if (status == Status.PENDING).any():
            raise ValueError("rows with status pending cannot be written")
        with self._place.writing():
            for name, values in rows.items():
                array = self._array(name)
                array[tokens] = np.ascontiguousarray(values, dtype=array.dtype)

    def read_rows(self, owner: int, name: str) -> Array:
        """Read one array's rows of one owner.

        Args:
            owner: Index of the owner.
            name: Name of the array, one of `ROW_ARRAYS`.

        Returns:
            The rows, (owner's tokens, ...).

        Raises:
            StoreError: The array is missing or damaged.
        """
        return read_array(self._place, below(self.name, name), _tokens(self.owners()[owner]))

    def commit(self, owner: int) -> None:
        """Mark one owner's rows as done, after `write_rows` has returned.

        Args:
            owner: Index of the owner.

        Raises:
            StoreError: The disk is full or the store cannot be written.
        """
        with self._place.writing():
            self._array("done")[_tokens(self.owners()[owner])] = True

    def write_outputs(
        self,
        *,
        output: Array,
        constant: Array,
        attribution: Array,
        attrs: Mapping[str, object] | None = None,
    ) -> None:
        """Write what belongs to the prompt as a whole.

        Args:
            output: The hidden state after the final norm, (m,).
            constant: What reaches it by no input, (m,).
            attribution: Part of the predicted token's logit by input token, (T,).
            attrs: Attributes to add (certificate, predicted token, timings, …).

        Raises:
            ValueError: An array has another shape.
            StoreError: The disk is full or the store cannot be written.
        """
        given = {"output": output, "constant": constant, "attribution": attribution}
        with self._place.writing():
            for spec in OUTPUT_ARRAYS:
                array, values = self._array(spec.name), given[spec.name]
                if np.shape(values) != array.shape:
                    raise ValueError(f"{spec.name} has shape {np.shape(values)}, not {array.shape}")
                array[:] = np.ascontiguousarray(values, dtype=array.dtype)
        self.set_attrs({**(attrs or {}), OUTPUTS_WRITTEN: True})

    def set_attrs(self, attrs: Mapping[str, object]) -> None:
        """Add attributes, replacing those of the same name.

        Args:
            attrs: Plain data; NaN becomes null, infinities become strings.

        Raises:
            StoreError: The disk is full or the store cannot be written.
        """
        with self._place.writing():
            node = zarr.open_group(self._place.zarr, path=self.name, mode="r+", zarr_format=3)
            node.update_attributes(to_attributes(attrs))

    @property
    def positions(self) -> dict[int, PromptGroup]:
        """The groups of further output positions, by position."""
        names = position_names(self._place, self.name)
        groups = [PromptGroup(self._place, name) for name in names]
        return {group.position: group for group in groups}

    def create_position(self, header: PromptHeader) -> PromptGroup:
        """Create the group of a further output position inside this one.

        Args:
            header: Its description; `header.position` names the group.

        Returns:
            The new group.

        Raises:
            StoreError: The disk is full or the store cannot be written.
        """
        return create_group(
            self._place, f"{self.name}/position_{header.output_position:04d}", header
        )

    def create_layer(self, name: str, header: PromptHeader) -> PromptGroup:
        """Create the group of a layer's results inside this one, replacing an earlier one.

        Args:
            name: What it is, such as `layer_07/mlp`.
            header: Its description.

        Returns:
            The new group.

        Raises:
            StoreError: The disk is full or the store cannot be written.
        """
        with self._place.writing():
            self._place.remove(below(self.name, name, "zarr.json"))  # what makes it valid first
            self._place.remove(below(self.name, name))
        return create_group(self._place, below(self.name, name), header)

    def _array(self, name: str) -> zarr.Array[Any]:
        if name not in self._arrays:
            self._arrays[name] = open_array(self._place, below(self.name, name))
        return self._arrays[name]

    def _remove(self, array: str, owner: int) -> None:
        """Remove the file of one owner's rows, or the folder that lies where it should be."""
        self._place.remove(chunk_name(self._array(array), owner))


def create_group(place: Place, name: str, header: PromptHeader) -> PromptGroup:
    """Create a prompt's group with all its arrays; its attributes, written last, make it valid.

    Args:
        place: Where the store lies, open for writing.
        name: Path of the group; what an interrupted creation left there is replaced.
        header: What is known of the prompt.

    Returns:
        The group.

    Raises:
        StoreError: The group exists, the disk is full or the store cannot be written.
    """
    group = PromptGroup(place, name)
    if group.attrs:
        raise StoreError(f"{group.path} exists already")
    with place.writing():
        place.remove(name)
        for spec in LAYOUT:
            create_array(place.zarr, name, spec, header.sizes, header.dtype)
        group._array("token_id")[:] = np.array(header.token_ids, dtype=np.int32)
        group._array("token_str")[:] = np.array(header.token_strings, dtype=object)
        if header.requested is not None:
            skipped = np.ones(len(header.token_ids), dtype=bool)
            skipped[list(header.requested)] = False
            group._array("status")[:] = np.where(skipped, Status.NOT_REQUESTED, Status.PENDING)
            group._array("done")[:] = skipped
    group.set_attrs(
        {
            **header.attrs,
            "id": header.id,
            "text": header.text,
            "position": header.output_position,
            "plan": to_json(header.plan),
            "coordinates": "token_id token_str",
        }
    )
    return group


def _tokens(owner: range) -> slice:
    return slice(owner.start, owner.stop)
