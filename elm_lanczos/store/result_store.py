"""The store of one run: created, resumed or opened, one group per prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Literal, Self

import zarr

from elm_lanczos.errors import StoreError
from elm_lanczos.store.attributes import Json, first_difference, to_attributes, to_json
from elm_lanczos.store.layout import FORMAT, SCHEMA_VERSION, PromptHeader
from elm_lanczos.store.place import Address, Lock, Place, place_at
from elm_lanczos.store.prompt_group import PromptGroup, create_group
from elm_lanczos.store.provenance import git_commit, package_versions
from elm_lanczos.store.reading import (
    check_result_store,
    is_result_store,
    prompt_names,
    read_attributes,
)
from elm_lanczos.store.results import PromptResult
from elm_lanczos.store.summary import SUMMARY, write_summary


def _ignore(_note: str) -> None:
    """Tell nobody."""


class ResultStore:
    """A result store open for one run.

    `create` and `resume` take an exclusive lock, held until `close` or the end of a `with` block: a
    run has one coordinator. A further process of the run opens the store and takes a lock of its
    own by `join`; it creates, writes and commits what it alone was given.

    Attributes:
        path: The folder of the store, or its URL.
    """

    def __init__(self, place: Place, lock: Lock | None = None) -> None:
        self.path = place.path
        self._place = place
        self._lock = lock

    @classmethod
    def create(
        cls,
        path: str | Address,
        *,
        attrs: Mapping[str, object],
        fingerprint: Mapping[str, object],
        overwrite: bool = False,
        note: Callable[[str], None] = _ignore,
    ) -> Self:
        """Create a store and lock it.

        Args:
            path: Its folder, absent or empty; or a URL such as `s3://bucket/run.zarr`.
            attrs: Attributes of the root: title, model, dtype, seed, method, configuration, …
            fingerprint: All that must be equal for a later run to continue this one.
            overwrite: Replace an existing result store.
            note: Told what the user should know while the lock is taken.

        Returns:
            The store, without prompts.

        Raises:
            StoreError: There is something at the path that must not be replaced, another run uses
                it, or it cannot be written.
        """
        place = place_at(path, read_only=False)
        _check_vacant(place, overwrite)
        lock = place.lock(0, note)
        try:
            _check_vacant(place, overwrite)
            with place.writing():
                for name in ("prompts", SUMMARY, "zarr.json"):  # what marks it as a store last
                    place.remove(name)
                place.prepare()
                store = cls(place, lock)
                identity = {
                    "format": FORMAT,
                    "schema_version": SCHEMA_VERSION,
                    "package_versions": package_versions(),
                    "git_commit": git_commit(),
                    "fingerprint": to_json(fingerprint),
                }
                zarr.create_group(place.zarr, attributes={**to_attributes(attrs), **identity})
                zarr.create_group(place.zarr, path="prompts")
        except BaseException:
            lock.release()
            raise
        return store

    @classmethod
    def open(cls, path: str | Address, mode: Literal["r", "r+"] = "r") -> Self:
        """Open an existing store without locking it.

        Args:
            path: Its folder, or its URL.
            mode: "r" to read, "r+" to write.

        Returns:
            The store.

        Raises:
            StoreError: The path holds no store that this version can read.
        """
        place = place_at(path, read_only=mode == "r")
        check_result_store(place)
        return cls(place)

    def join(self, rank: int, note: Callable[[str], None] = _ignore) -> None:
        """Hold the lock of a further process of the run that has this store, until `close`.

        Args:
            rank: The number of the process, from 1.
            note: Told what the user should know while the lock is taken.

        Raises:
            StoreError: A process of that number uses the store already.
        """
        self._lock = self._place.lock(rank, note)

    def resume(
        self, fingerprint: Mapping[str, object], note: Callable[[str], None] = _ignore
    ) -> None:
        """Lock the store to continue its run.

        Args:
            fingerprint: The fingerprint of the run that wants to continue.
            note: Told what the user should know while the lock is taken.

        Raises:
            StoreError: Another run uses the store, or its fingerprint differs; the message names
                the first field that does, with both values.
        """
        self._lock = self._lock or self._place.lock(0, note)
        try:
            found = first_difference(self.attrs["fingerprint"], to_json(fingerprint))
            if found is not None:
                field, stored, given = found
                raise StoreError(
                    f"{self.path} cannot be continued: {field} was {stored!r} and is {given!r} "
                    "now; use the same options, or start again with --overwrite"
                )
            with self._place.writing():
                self._place.prepare()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        """Give the store itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the store."""
        self.close()

    def close(self) -> None:
        """Give the lock back; everything written is on the disk already."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __repr__(self) -> str:
        """Show where the store lies and how many prompts it has."""
        return f"<ResultStore {self.path}: {len(self)} prompts>"

    @property
    def attrs(self) -> dict[str, Json]:
        """The attributes of the root as they are stored now."""
        return read_attributes(self._place)

    def set_attrs(self, attrs: Mapping[str, object]) -> None:
        """Add attributes to the root, replacing those of the same name.

        Args:
            attrs: Plain data; NaN becomes null, infinities become strings.

        Raises:
            StoreError: The disk is full or the store cannot be written.
        """
        with self._place.writing():
            root = zarr.open_group(self._place.zarr, mode="r+", zarr_format=3)
            root.update_attributes(to_attributes(attrs))

    def __len__(self) -> int:
        """The number of prompts created."""
        return len(prompt_names(self._place))

    @property
    def prompts(self) -> list[PromptGroup]:
        """The groups of all prompts created, in order."""
        return [PromptGroup(self._place, name) for name in prompt_names(self._place)]

    def prompt(self, number: int) -> PromptGroup | None:
        """The group of one prompt by its number from 0, or None if it is not created yet."""
        group = PromptGroup(self._place, f"prompts/{number:06d}")
        return group if group.attrs else None

    def group(self, name: str) -> PromptGroup:
        """The group of a prediction by its name, which it has in another process."""
        return PromptGroup(self._place, name)

    def result(self, group: PromptGroup) -> PromptResult:
        """What is stored of one group, for reading."""
        return PromptResult(self._place, group.name)

    def create_prompt(self, header: PromptHeader, number: int) -> PromptGroup:
        """Create the group of a prompt with all its arrays.

        Args:
            header: What is known of the prompt.
            number: Its number among the run's prompts, from 0; they are created in any order.

        Returns:
            The group, every requested row pending.

        Raises:
            StoreError: It exists, the disk is full or the store cannot be written.
        """
        return create_group(self._place, f"prompts/{number:06d}", header)

    def write_summary(self) -> None:
        """Write the flat table over all prompts, replacing an earlier one.

        Raises:
            StoreError: A prompt's arrays are damaged, or the store cannot be written.
        """
        write_summary(self._place, self.prompts)


def _check_vacant(place: Place, overwrite: bool) -> None:
    """Check that a store may be created at a place without destroying anything."""
    if place.is_file(""):
        raise StoreError(f"{place.path} is a file: choose another --out")
    if is_result_store(place):
        if not overwrite:
            raise StoreError(
                f"{place.path} exists: continue it with --resume or replace it with --overwrite"
            )
    elif place.names(""):
        raise StoreError(
            f"{place.path} is a folder that is not a result store: choose another --out"
        )
