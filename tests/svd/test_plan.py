"""The plan: choice of method, predicted cost, round trip through JSON, refusals."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

from elm_lanczos.errors import UsageError
from elm_lanczos.svd.plan import Plan, make_plan
from tests.spectra import powers, solve_with, with_spectrum


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


def test_round_trip_through_json() -> None:
    plan = make_plan(7, 64, 32, torch.float64, 4, seed=3)
    assert Plan(**json.loads(json.dumps(asdict(plan)))) == plan


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
    from elm_lanczos.svd import svd

    matrix = with_spectrum(powers(-1, 40), 40, 40)
    plan = make_plan(1, 40, 40, torch.float64, 4, method)
    with pytest.raises(UsageError, match=message):
        svd(matrix, 4, plan=replace(plan, **changes))  # type: ignore[arg-type]
