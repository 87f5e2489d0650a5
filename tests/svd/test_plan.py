"""The plan: choice of method, predicted cost, round trip through JSON, refusals."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elm_lanczos.errors import UsageError
from elm_lanczos.memory import size
from elm_lanczos.operators import StackedOperators
from elm_lanczos.svd.plan import Plan, make_plan, stream_count
from elm_lanczos.svd.solve import solve, svd
from tests.spectra import check_triplets, powers, solve_with, with_spectrum


def test_some_tokens_go_to_lanczos_and_many_to_streams() -> None:
    few = make_plan(2, 256, 256, torch.float32, 16)
    many = make_plan(400, 256, 256, torch.float32, 16)
    assert (few.method, many.method) == ("lanczos", "stream")
    assert few.reason.startswith("lanczos: about ") and "stream" in few.reason
    assert "\n" not in few.reason
    for plan in (few, many):
        assert plan.passes[plan.method] == min(plan.passes["lanczos"], plan.passes["stream"])


def test_dense_is_never_chosen_and_is_there_for_the_asking() -> None:
    for n in (1, 10, 1000):
        assert make_plan(n, 64, 64, torch.float32, 4).method != "dense"
    assert make_plan(1, 64, 64, torch.float32, 4, "dense").method == "dense"


def test_little_memory_means_panels_and_more_passes() -> None:
    ample = make_plan(400, 256, 256, torch.float32, 16, "stream", memory=2**33)
    scarce = make_plan(400, 256, 256, torch.float32, 16, "stream", memory=2**27)
    assert ample.panel == 400 > scarce.panel
    assert scarce.passes["stream"] > ample.passes["stream"]
    assert scarce.bytes["stream"] <= 2**27


def test_narrow_blocks_keep_many_operators_in_one_panel() -> None:
    given = (8192, 256, 256, torch.float32, 4, "stream")
    ample, scarce = (make_plan(*given, memory=m * 2**30) for m in (8, 3))
    assert ample.panel == scarce.panel == 8192
    assert 4 < scarce.width < ample.width
    assert scarce.passes["stream"] < 2 * ample.passes["stream"]  # what two panels would take
    assert scarce.bytes["stream"] <= 3 * 2**30


def test_a_basis_takes_what_memory_there_is_beyond_the_expected_streams() -> None:
    n, m, d, k = given = (16, 300, 500, 8)
    ample = make_plan(*given[:3], torch.float32, k, "stream", memory=2**30)
    expected = stream_count(ample.width, k, d, 1e-5) * ample.width
    assert ample.basis == min(d, expected + 2 * ample.width)
    some = n * (ample.width + 5) * (m + 2 * d) * 4
    less = make_plan(*given[:3], torch.float32, k, "stream", memory=ample.bytes["stream"] + some)
    assert less.width == ample.width
    assert less.basis == expected + ample.width + 5
    none = make_plan(*given[:3], torch.float32, k, "stream", memory=ample.bytes["stream"])
    assert none.basis == expected


def test_round_trip_through_json() -> None:
    plan = make_plan(7, 64, 32, torch.float64, 4, seed=3)
    assert Plan(**json.loads(json.dumps(asdict(plan)))) == plan


def test_arrays_are_those_of_the_operators_held_at_a_time(tmp_path: Path) -> None:
    n, m, d, k = 5, 64, 32, 4
    made = {
        method: make_plan(n, m, d, torch.float64, k, method, memory=2**30, vectors=8)
        for method in ("lanczos", "stream", "dense")
    }
    width, rows = made["stream"].width, 2 * 64 * n * d * 8
    basis = min(d, stream_count(width, k, d, 1e-10) * width)
    assert made["stream"].arrays["stream"] == {
        "Krylov basis V": n * basis * d * 8,
        "J V": n * basis * m * 8,
        "JᵀJ V": n * basis * d * 8,
        "block and sums": n * (width * (m + 2 * d) + k * d) * 8,
        "triplets, now and best": n * k * (2 * m + 3 * d) * 8,
        "rows flowing by": rows,
    }
    kept = n * (made["lanczos"].basis + 1) * (m + d) * 8  # a vector more than the basis
    lanczos = made["lanczos"].arrays["lanczos"]
    assert lanczos["Krylov bases"] == lanczos["products kept"] == kept
    dense = {"Jacobians": n * m * d * 8, "matrices being solved": 4 * n * m * d * 8}
    assert made["dense"].arrays["dense"] == dense | {"rows flowing by": rows}
    options = {"memory": 2**30, "vectors": 8, "scratch": str(tmp_path)}
    filed = make_plan(n, m, d, torch.float64, k, "dense", **options)  # type: ignore[arg-type]
    assert filed.arrays["dense"] == dense | {"rows flowing by": rows, "Jacobians": 0}
    for plan in made.values():
        assert plan.bytes == {name: sum(held.values()) for name, held in plan.arrays.items()}


@pytest.mark.parametrize("method", ["lanczos", "stream", "dense"])
def test_memory_that_one_operator_does_not_fit_is_refused(method: str) -> None:
    matrix = with_spectrum(powers(-1, 40), 40, 40)
    least = make_plan(1, 40, 40, torch.float64, 4, method, memory=1)
    assert least.panel == 1
    exact = least.bytes[method]
    for memory, fits in ((exact, True), (exact - 1, False)):
        # The same arrays, whatever is a little more or less.
        plan = replace(least, memory=memory)
        assert (plan.refusal is None) == fits
    assert least.refusal is not None and "\n" not in least.refusal
    assert size(exact) in least.refusal and "--memory" in least.refusal
    with pytest.raises(UsageError, match="give more with --memory"):
        svd(matrix, 4, method=method, memory=1)
    # A plan made by hand is followed.
    assert svd(matrix, 4, plan=least).converged.all()


def test_auto_takes_the_method_that_fits() -> None:
    ample = make_plan(1, 256, 256, torch.float32, 100, memory=2**30, vectors=1)
    assert ample.method == "lanczos"
    assert ample.bytes["stream"] < ample.bytes["lanczos"]  # bases as wide as the matrix: no gain
    memory = ample.bytes["lanczos"] - 1
    plan = make_plan(1, 256, 256, torch.float32, 100, memory=memory, vectors=1)
    assert plan.method == "stream" and plan.refusal is None
    assert plan.reason.endswith("by lanczos, which needs more than the memory")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", ["lanczos", "stream"])
def test_predicted_passes_are_close_on_a_slowly_decaying_spectrum(
    method: str, dtype: torch.dtype
) -> None:
    matrix = with_spectrum(powers(-0.5, 200), 200, 200, dtype)
    result = solve_with(matrix, 16, method)
    assert result.converged.all()
    assert 0.6 < result.passes / result.plan.passes[method] < 1.6


def test_default_tolerance_follows_the_dtype() -> None:
    assert make_plan(1, 9, 9, torch.float32, 1).tol == 1e-5
    assert make_plan(1, 9, 9, torch.float64, 1).tol == 1e-10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k must be a whole number from 1 to 8"),
        ({"k": 9}, "k must be a whole number from 1 to 8"),
        ({"k": 2.0}, "k must be"),
        ({"method": "lanzcos"}, "did you mean 'lanczos'"),
        ({"tol": -1.0}, "tol"),
        ({"tol": float("nan")}, "tol"),
        ({"seed": -1}, "seed"),
        ({"memory": 0}, "memory"),
        ({"dtype": torch.bfloat16}, "float32 or float64"),
    ],
)
def test_refusals(changes: dict[str, object], message: str) -> None:
    arguments = {"n": 1, "m": 10, "d": 8, "dtype": torch.float64, "k": 2} | changes
    with pytest.raises(UsageError, match=message):
        make_plan(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("lanczos", {"basis": 4}, "basis must be at least 5"),
        ("lanczos", {"basis": 41}, "basis must be at most 40"),
        ("lanczos", {"verify": 0}, "verification"),
        ("lanczos", {"probes": 1}, "probes"),
        ("stream", {"width": 3}, "width"),
        ("stream", {"k": 41}, "k = 41"),
        ("dense", {"dtype": "float32"}, "float32"),
    ],
)
def test_plans_changed_into_unusable_ones(
    method: str, changes: dict[str, object], message: str
) -> None:
    matrix = with_spectrum(powers(-1, 40), 40, 40)
    plan = make_plan(1, 40, 40, torch.float64, 4, method)
    with pytest.raises(UsageError, match=message):
        svd(matrix, 4, plan=replace(plan, **changes))  # type: ignore[arg-type]


@settings(deadline=None, max_examples=150)
@given(
    n=st.integers(1, 600),
    m=st.integers(1, 1200),
    d=st.integers(1, 1200),
    share=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    vectors=st.integers(1, 300),
    log_memory=st.floats(8, 36),
)
def test_every_method_stays_within_the_memory_if_one_operator_fits(
    n: int, m: int, d: int, share: float, dtype: torch.dtype, vectors: int, log_memory: float
) -> None:
    k, memory = 1 + round(share * (min(m, d) - 1)), int(2**log_memory)
    for method in ("auto", "lanczos", "stream", "dense"):
        plan = make_plan(n, m, d, dtype, k, method, memory=memory, vectors=vectors)
        assert Plan(**json.loads(json.dumps(asdict(plan)))) == plan
        assert 1 <= plan.panel <= n and plan.together >= 1
        assert 1 <= plan.cotangent_block <= m
        assert plan.k <= plan.width <= min(m, d)
        assert set(plan.passes) == set(plan.bytes) == {"lanczos", "stream", "dense"}
        assert all(isinstance(p, int) and p > 0 for p in plan.passes.values())
        # In multiples of what the operators take at a time, unless all rows flow by at once.
        block = plan.cotangent_block
        assert block < vectors or block == m or block % vectors == 0
        # Lockstep, stream and dense alike: whoever asks is answered within the memory.
        ample = make_plan(1, m, d, dtype, k, method, memory=2**60, vectors=1)
        rows = 2 * d * dtype.itemsize * (n - ample.cotangent_block)
        for name, needed in plan.bytes.items():
            # Half of the memory for one operator: the rest is for the rows that flow by.
            if 2 * (ample.bytes[name] + rows) <= memory:
                assert needed <= memory, name


def test_dense_in_a_scratch_file_makes_one_stream_whatever_the_memory(tmp_path: Path) -> None:
    options = {"memory": 2**24, "scratch": str(tmp_path)}
    plan = make_plan(300, 256, 256, torch.float32, 4, "dense", **options)  # type: ignore[arg-type]
    kept = make_plan(300, 256, 256, torch.float32, 4, "dense", memory=2**24)
    assert (plan.panel, plan.passes["dense"]) == (300, 256)
    assert kept.panel < 300 and kept.passes["dense"] > 256


def test_lanczos_splits_a_group_that_memory_has_no_room_for() -> None:
    J = torch.stack([with_spectrum(powers(-1, 60), 60, 60, seed=seed) for seed in range(5)])
    ample = make_plan(5, 60, 60, torch.float64, 3, "lanczos", memory=2**30)
    one = make_plan(1, 60, 60, torch.float64, 3, "lanczos", memory=2**30)
    scarce = make_plan(5, 60, 60, torch.float64, 3, "lanczos", memory=3 * one.bytes["lanczos"])
    assert ample.panel == 5 > scarce.panel >= 2
    ((_, split),) = solve(StackedOperators(J), scarce, [range(5)])
    assert split.tokens == (0, 1, 2, 3, 4)
    check_triplets(split, J)


@pytest.mark.parametrize(
    ("dtype", "precision", "tol"),
    [
        (torch.float32, "ieee", 1e-5),
        (torch.float64, "ieee", 1e-10),
        (torch.float32, "tf32", 1e-3),
    ],
)
def test_tolerance_by_default_is_what_products_can_reach(
    dtype: torch.dtype, precision: str, tol: float
) -> None:
    plan = make_plan(3, 64, 64, dtype, 4, precision=precision)
    assert plan.tol == tol
    assert make_plan(3, 64, 64, dtype, 4, tol=1e-2, precision=precision).tol == 1e-2
    finer = make_plan(3, 64, 64, dtype, 4, tol=tol / 100, precision=precision)
    assert all(finer.passes[m] >= plan.passes[m] for m in ("lanczos", "stream"))
