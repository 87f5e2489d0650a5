"""Properties of the store over random shapes and random sets of committed owners."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from elm_lanczos.status import Status
from elm_lanczos.store import PromptHeader, ResultStore, open_results
from elm_lanczos.store.attributes import first_difference, to_json
from elm_lanczos.store.layout import ROW_ARRAYS, owner_ranges
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


# An example writes some forty synced files and takes about a second.
@settings(max_examples=8, deadline=None)
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
