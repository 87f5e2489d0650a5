"""A small run whose every number is known: written whole, in pieces, by workers or until killed.

As a program, `-m tests.store_cases run PATH` starts or resumes the run and prints its steps;
`work PATH I N` writes every N-th owner from the I-th on, as a worker process does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from elm_lanczos.status import Status
from elm_lanczos.store import PromptGroup, PromptHeader, ResultStore
from elm_lanczos.store.layout import ROW_ARRAYS, Array
from elm_lanczos.store.place import place_at

FINGERPRINT = {"model": {"id": "toy", "revision": None}, "k": 3, "dtype": "float32", "tol": None}
ATTRS = {"title": "a toy run", "model": "toy"}


def make_header(tokens: int, **changes: object) -> PromptHeader:
    """Describe a prompt of `tokens` tokens with m = 7, d = 5, k = 3, top = 2."""
    values: dict[str, object] = {
        "id": f"p{tokens}",
        "text": f"a prompt of {tokens} tokens",
        "token_ids": [7 * i for i in range(tokens)],
        "token_strings": [f" w{i}é" for i in range(tokens)],
        "m": 7,
        "d": 5,
        "k": 3,
        "top": 2,
        "plan": {"method": "lanczos", "seed": 0},
    }
    return PromptHeader(**{**values, **changes})  # type: ignore[arg-type]


# Below and above the 128 tokens at which a prompt begins to be cut: 1, 3 and 3 owners. Neither 150
# nor 140 is a multiple of 64; the second owner of the last prompt has nothing to do.
HEADERS = (
    make_header(6),
    make_header(150),
    make_header(140, dtype="float64", requested=[*range(0, 64, 3), *range(130, 140)]),
)
REQUESTED = 6 + 150 + (22 + 10)  # tokens of all prompts


def make_rows(group: PromptGroup, owner: int) -> dict[str, Array]:
    """Make the rows that a computation would give for one owner, always the same."""
    rows = group.empty_rows(owner)
    live = rows["status"] == Status.PENDING
    for index, spec in enumerate(ROW_ARRAYS):
        values = rows[spec.name]
        rng = np.random.default_rng([index, owner, group.tokens])
        if spec.dtype == "real":
            values[live] = rng.standard_normal(values[live].shape)
        elif spec.name == "status":
            values[live] = rng.choice([Status.CONVERGED, Status.NOT_CONVERGED], values[live].shape)
        else:
            values[live] = rng.integers(0, 4096, values[live].shape)
    return rows


def write_outputs(group: PromptGroup) -> None:
    """Write the outputs of a prompt, always the same."""
    rng = np.random.default_rng(group.tokens)
    group.write_outputs(
        output=rng.standard_normal(7),
        constant=rng.standard_normal(7),
        attribution=rng.standard_normal(group.tokens),
        attrs={"certificate": {"reconstruction": 1e-7}},
    )


def start_or_resume(path: str | Path) -> ResultStore:
    """Create the run's store, or lock it to continue."""
    if place_at(path).exists("zarr.json"):
        store = ResultStore.open(path, "r+")
        store.resume(FINGERPRINT)
        return store
    return ResultStore.create(path, attrs=ATTRS, fingerprint=FINGERPRINT)


def run(
    path: str | Path,
    report: Callable[[str], None] = lambda step: None,
    headers: Sequence[PromptHeader] = HEADERS,
) -> None:
    """Write what is missing of the whole run, reporting the steps."""
    with start_or_resume(path) as store:
        for number, header in enumerate(headers):
            if store.prompt(number) is None:
                report("creating")
                store.create_prompt(header, number)
        for group in store.prompts:
            for owner in group.pending():
                report("writing")
                group.write_rows(owner, make_rows(group, owner))
                report("committing")
                group.commit(owner)
            if not group.complete:
                report("finishing")
                write_outputs(group)
        report("summarising")
        store.write_summary()


def work(path: Path, first: int, count: int) -> None:
    """Write every `count`-th owner of the created prompts."""
    for group in ResultStore.open(path, "r+").prompts:
        for owner in range(len(group.owners()))[first::count]:
            group.write_rows(owner, make_rows(group, owner))
            group.commit(owner)


if __name__ == "__main__":
    if sys.argv[1] == "run":
        run(Path(sys.argv[2]), lambda step: print(step, flush=True))
    else:
        work(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
