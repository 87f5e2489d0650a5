"""Properties of the store over random shapes, interruptions and numbers of processes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elm_lanczos.status import Status
from elm_lanczos.store import PromptGroup, PromptHeader, ResultStore, open_results
from elm_lanczos.store.attributes import first_difference, to_json
from elm_lanczos.store.faults import FINISHED
from elm_lanczos.store.layout import ROW_ARRAYS, Array, owner_ranges
from tests.store_cases import make_rows


@st.composite
def headers(draw: st.DrawFn) -> PromptHeader:
    # Both sides of 128 tokens, where the cutting into owners of 64 begins.
    tokens = draw(st.one_of(st.integers(1, 12), st.integers(120, 200)))
    m, d = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    indices = st.lists(st.integers(0, tokens - 1), max_size=20)
    return PromptHeader(
        id="p",
        text=draw(st.text()),
        token_ids=list(range(tokens)),
        token_strings=draw(st.lists(st.text(max_size=6), min_size=tokens, max_size=tokens)),
        m=m,
        d=d,
        k=draw(st.integers(1, min(m, d))),
        top=draw(st.integers(1, 3)),
        dtype=draw(st.sampled_from(["float32", "float64"])),
        requested=draw(st.one_of(st.none(), indices)),
    )


@given(st.integers(1, 2000))
def test_owners_cover_the_tokens_once(tokens: int) -> None:
    ranges = owner_ranges(tokens)
    assert [token for owner in ranges for token in owner] == list(range(tokens))
    assert len(ranges) == 1 or all(owner.start % 64 == 0 and len(owner) <= 64 for owner in ranges)


@pytest.fixture(autouse=True, scope="module")
def unsynced() -> Iterator[None]:
    """No power is cut here, and syncing some forty files takes most of an example's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@settings(max_examples=20, deadline=None)
@given(headers(), st.data())
def test_interrupted_anywhere_the_rest_is_pending_and_the_end_is_the_same(
    header: PromptHeader, data: st.DataObject
) -> None:
    requested = range(len(header.token_ids)) if header.requested is None else header.requested
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.zarr"
        with ResultStore.create(path, attrs={}, fingerprint={}) as store:
            group = store.create_prompt(header, 0)
            work = group.pending()
            assert work == [
                index
                for index, owner in enumerate(group.owners())
                if any(token in owner for token in requested)
            ]
            subsets = st.lists(st.sampled_from(work), unique=True) if work else st.just([])
            written, committed = data.draw(subsets), data.draw(subsets)
            for owner in {*written, *committed}:
                group.write_rows(owner, make_rows(group, owner))
            for owner in committed:
                group.commit(owner)
        with ResultStore.open(path, "r+") as store:
            store.resume({})
            (group,) = store.prompts
            assert group.pending() == [owner for owner in work if owner not in committed]
            for owner in group.pending():
                group.write_rows(owner, make_rows(group, owner))
                group.commit(owner)
            assert group.pending() == []
            store.write_summary()
        result = open_results(path)[0]
        assert result.text == header.text
        assert result.tokens == list(header.token_strings)
        assert result.done.all()
        assert set(np.flatnonzero(result.status != Status.NOT_REQUESTED)) == set(requested)
        parts = [make_rows(group, owner) for owner in range(len(group.owners()))]
        for spec in ROW_ARRAYS:
            wanted = np.concatenate([part[spec.name] for part in parts])
            assert getattr(result, spec.name).tobytes() == wanted.tobytes(), spec.name


class Cut(Exception):
    """A process has been killed."""


class Steps:
    """The steps that a process takes until it is killed."""

    def __init__(self, left: int) -> None:
        self.left = left

    def take(self) -> None:
        if not self.left:
            raise Cut
        self.left -= 1


class Rows(dict[str, Array]):
    """Rows each array of which takes a step to write."""

    def __init__(self, rows: dict[str, Array], steps: Steps) -> None:
        super().__init__(rows)
        self.steps = steps

    def items(self) -> Iterator[tuple[str, Array]]:  # type: ignore[override]
        for item in super().items():
            self.steps.take()
            yield item


def finish(group: PromptGroup, steps: Steps) -> None:
    """Writes what is pending of a group, a step at a time."""
    for owner in group.pending():
        steps.take()
        group.write_rows(owner, Rows(make_rows(group, owner), steps))
        steps.take()
        group.commit(owner)
    steps.take()
    group.set_attrs({FINISHED: True})


def run_as(
    rank: int, path: Path, headers: list[PromptHeader], deal: Iterator[int], cut: int
) -> None:
    """Is one process of a run: takes prompts until there are none or it is killed."""
    steps = Steps(cut)
    with ResultStore.open(path, "r+") as store:
        if rank:
            store.join(rank)
        try:
            while (number := next(deal, len(headers))) < len(headers):
                group = store.prompt(number)
                if group is None:
                    steps.take()
                    group = store.create_prompt(headers[number], number)
                if not group.attrs.get(FINISHED):
                    finish(group, steps)
        except Cut:
            pass


# A number of processes, and the steps after which each of them is killed.
attempts = st.lists(st.integers(0, 60), min_size=1, max_size=4)


@settings(max_examples=12, deadline=None)
@given(st.lists(headers(), min_size=1, max_size=3), st.lists(attempts, max_size=3))
def test_whatever_is_killed_what_is_done_is_right_and_the_rest_can_be_ended(
    headers: list[PromptHeader], kills: list[list[int]]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.zarr"
        ResultStore.create(path, attrs={}, fingerprint={}).close()
        for cuts in [*kills, [10**9]]:
            numbers = count()  # each is dealt once, whoever asks
            with ResultStore.open(path, "r+") as coordinator:
                coordinator.resume({})
                with ThreadPoolExecutor(len(cuts)) as pool:
                    ranks = range(len(cuts))
                    parts = [
                        pool.submit(run_as, rank, path, headers, numbers, cuts[rank])
                        for rank in ranks
                    ]
                    for part in parts:
                        part.result()
                for group in coordinator.prompts:
                    for owner in set(range(len(group.owners()))) - set(group.pending()):
                        for name, values in make_rows(group, owner).items():
                            assert group.read_rows(owner, name).tobytes() == values.tobytes()
                if cuts == [10**9]:
                    coordinator.write_summary()
        results = open_results(path)
        assert results.complete and len(results) == len(headers)
        assert all(prompt.done.all() and prompt.attrs[FINISHED] for prompt in results)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
    max_leaves=20,
)


@given(json_values)
def test_json_is_a_fixed_point_and_equals_itself(value: object) -> None:
    once = to_json(value)
    assert to_json(once) == once
    assert first_difference(once, once) is None
