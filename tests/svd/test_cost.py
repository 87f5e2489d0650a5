"""What a decomposition is said to cost: rates, prices, and the stand-ins that are timed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from elm_lanczos.operators import StackedOperators, TokenOperators
from elm_lanczos.svd import cost as module
from elm_lanczos.svd.cost import (
    Cost,
    Rates,
    _ReflectedDiagonal,
    faster_dense,
    predict,
    price,
    time_block,
)
from elm_lanczos.svd.plan import make_plan
from tests.spectra import DTYPES, ExplicitChain, powers, with_spectrum

CPU = torch.device("cpu")


def chain(n: int = 4, m: int = 40, d: int = 32) -> ExplicitChain:
    J = torch.stack([with_spectrum(powers(-1, min(m, d)), m, d, seed=i) for i in range(n)])
    return ExplicitChain(J, torch.ones(n, d).double())


def in_blocks_of(vectors: int, lin: ExplicitChain) -> TokenOperators:
    batch = TokenOperators(lin, range(4))
    batch.vectors = vectors
    return batch


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "d"), [(24, 24), (30, 17), (17, 30), (1, 5), (5, 1), (1, 1)])
def test_stand_ins_are_the_matrices_they_say(m: int, d: int, dtype: torch.dtype) -> None:
    batch = _ReflectedDiagonal(3, m, d, dtype, CPU)
    a, b = batch._a.double(), batch._b.double()
    diagonal = torch.zeros(m, d).double()
    diagonal.diagonal().copy_(powers(-0.5, min(m, d)))
    H, K = torch.eye(m) - 2 * a.outer(a), torch.eye(d) - 2 * b.outer(b)
    matrix = (H @ diagonal @ K).to(dtype)
    tol = 64 * torch.finfo(dtype).eps
    index = torch.tensor([2, 0, 1, 2])
    V, U = torch.randn(4, d, dtype=dtype), torch.randn(4, m, dtype=dtype)
    torch.testing.assert_close(batch.matvec(V, index), V @ matrix.T, rtol=tol, atol=tol)
    torch.testing.assert_close(batch.rmatvec(U, index), U @ matrix, rtol=tol, atol=tol)
    rows = batch.rows(U)
    assert rows.shape == (4, 3, d) and rows.dtype == dtype
    rows[:, 0] = 0.0  # what one operator gets is not what another has
    torch.testing.assert_close(rows[:, 2], U @ matrix, rtol=tol, atol=tol)
    values = torch.linalg.svdvals(matrix.double())
    torch.testing.assert_close(values, powers(-0.5, min(m, d)), rtol=1e-4, atol=0)


def test_rates_count_one_block_and_one_product_of_each_kind() -> None:
    lin = chain()
    rates = time_block(in_blocks_of(8, lin))
    # Two timings of 8 rows, 4 JVPs and 4 VJPs.
    assert lin.vectors == 2 * (8 + 4 + 4)
    assert rates.row > 0 and rates.step > 0
    assert rates.times(3.0) == Rates(3 * rates.row, 3 * rates.step)
    lin.vectors = 0
    rates = time_block(in_blocks_of(8, lin), steps=False)
    assert lin.vectors == 2 * 8 and rates.row > 0 and math.isnan(rates.step)
    lin.vectors = 0
    time_block(in_blocks_of(1000, lin))
    assert lin.vectors == 2 * (40 + 4 + 4)  # no more rows than there are


@pytest.mark.parametrize("method", ["lanczos", "stream", "dense"])
def test_prices_are_passes_at_their_rate_and_the_algebra(method: str) -> None:
    shape = (3, 50, 40)
    plan = make_plan(*shape, torch.float64, 4, method, memory=2**30)
    none = price({method: plan}, shape, CPU, Rates(0.0, 0.0))[method]
    some = price({method: plan}, shape, CPU, Rates(1.0, 100.0))[method]
    assert none.method == some.method == method
    assert none.passes == some.passes == plan.passes[method] > 0
    assert none.bytes == some.bytes == plan.bytes[method] > 0
    assert none.seconds is not None and some.seconds is not None and none.seconds > 0
    rate = 100.0 if method == "lanczos" else 1.0
    unknown = price({method: plan}, shape, CPU, None)[method]
    assert unknown == replace(some, seconds=None)
    # The algebra of the same plan is timed once.
    assert some.seconds - none.seconds == pytest.approx(rate * plan.passes[method])


def test_algebra_is_timed_without_the_plans_own_files(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "from_file", None)
    plan = make_plan(3, 50, 40, torch.float64, 4, "dense", memory=2**30, scratch=str(tmp_path))
    assert module.algebra_seconds(plan, 3, 50, 40, CPU) > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_shape_can_be_priced(dtype: torch.dtype) -> None:
    for shape, k in (((1, 1, 1), 1), ((2, 3, 50), 3), ((2, 50, 3), 1), ((90, 12, 12), 12)):
        batch = StackedOperators(torch.randn(*shape, dtype=dtype))
        for method, cost in predict(batch, k, memory=2**30).items():
            assert cost.method == method and cost.passes > 0 and cost.bytes > 0
            assert cost.seconds is not None and 0 < cost.seconds < 100


def test_only_the_methods_asked_for_are_timed() -> None:
    lin = chain()
    costs = predict(in_blocks_of(8, lin), 2, methods=("stream", "dense"))
    assert set(costs) == {"stream", "dense"}
    assert lin.vectors == 2 * 8  # no JVP, no vectors of single operators


@pytest.mark.parametrize(
    ("chosen", "dense", "said"),
    [
        (10.0, 5.0, True),
        (10.0, 5.01, False),
        (10.0, 0.0, True),
        (None, 1.0, False),
        (10.0, None, False),
        (0.0, 1.0, False),
    ],
)
def test_dense_is_hinted_at_from_twice_as_fast(
    chosen: float | None, dense: float | None, said: bool
) -> None:
    line = faster_dense(Cost("stream", 9, chosen, 9), Cost("dense", 9, dense, 2**30))
    assert (line is not None) == said
    if line is not None:
        assert "\n" not in line and "--method dense" in line and "1.0 GiB" in line


def test_prices_of_plans_by_hand_follow_the_plan() -> None:
    plan = make_plan(3, 50, 40, torch.float64, 4, "stream", memory=2**30)
    dear = replace(plan, passes={**plan.passes, "stream": 10**6})
    cost = price({"stream": dear}, (3, 50, 40), CPU, Rates(1.0, 0.0))["stream"]
    assert cost.seconds is not None and cost.seconds >= 10**6
