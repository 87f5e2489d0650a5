"""The front door and the groups: what is accepted, and that bits repeat."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse
import torch

from elm_lanczos.errors import UsageError
from elm_lanczos.operators import StackedOperators, TokenOperators, aslinearoperator
from elm_lanczos.svd import SVDResult, svd
from elm_lanczos.svd.plan import make_plan
from elm_lanczos.svd.solve import solve
from tests.spectra import (
    DTYPES,
    METHODS,
    DiagonalPlusLowRank,
    ExplicitChain,
    Forbid,
    check_triplets,
    powers,
    solve_with,
    with_spectrum,
)


def jacobians(count: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.stack(
        [with_spectrum(powers(-0.5 - seed / 9, 32), 40, 32, dtype, seed) for seed in range(count)]
    )


def assert_same_bits(one: SVDResult, other: SVDResult) -> None:
    for name, value in vars(one).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(other, name)), name
        else:
            assert value == getattr(other, name), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_bits_other_seed_other_bits(method: str, dtype: torch.dtype) -> None:
    batch = StackedOperators(jacobians(3, dtype))
    one, again, other = (
        svd(batch, 4, method=method, seed=seed, memory=2**30) for seed in (1, 1, 2)
    )
    assert_same_bits(one, again)
    assert torch.equal(one.U, other.U) == (method == "dense")
    check_triplets(other, jacobians(3, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_bits_of_a_group_do_not_depend_on_the_other_groups(method: str, dtype: torch.dtype) -> None:
    batch = TokenOperators(
        ExplicitChain(jacobians(8, dtype), torch.ones(8, 32, dtype=dtype)), range(8)
    )
    plan = make_plan(*batch.shape, dtype, 4, method)
    groups = [[0, 1, 2], [3, 4, 5], [6, 7]]
    together = dict(solve(batch, plan, groups))
    assert sorted(together) == [0, 1, 2]
    for position, group in enumerate(groups):
        ((first, alone),) = solve(batch, plan, [group])
        assert first == 0
        assert alone.tokens == tuple(group)
        assert_same_bits(together[position], alone)
    resumed = dict(solve(batch, plan, [groups[2], groups[0]]))
    assert_same_bits(resumed[0], together[2])
    assert_same_bits(resumed[1], together[0])


@pytest.mark.parametrize("method", METHODS)
def test_bits_do_not_depend_on_panels(method: str) -> None:
    batch = StackedOperators(jacobians(5))
    whole = solve_with(batch, 3, method)
    from dataclasses import replace

    plan = replace(whole.plan, panel=2)
    groups = [[0, 1], [2, 3], [4]]
    parts = dict(solve(batch, plan, groups))
    direct = dict(solve(batch, replace(plan, panel=5), groups))
    for position in range(3):
        for name in ("U", "S", "V", "residual"):
            assert torch.equal(getattr(parts[position], name), getattr(direct[position], name))
    assert svd(batch, 3, plan=plan).tokens == whole.tokens


@pytest.mark.parametrize("method", METHODS)
def test_an_operator_does_not_see_its_neighbours(method: str) -> None:
    J = jacobians(6)
    together = svd(StackedOperators(J), 4, method=method)
    alone = svd(StackedOperators(J[4:5], labels=[4]), 4, method=method)
    torch.testing.assert_close(together.S[4], alone.S[0], rtol=0, atol=1e-13)
    torch.testing.assert_close(together.V[4], alone.V[0], rtol=0, atol=1e-8)
    torch.testing.assert_close(together.stable_rank[4], alone.stable_rank[0])


def test_groups_leave_the_stream_as_they_converge() -> None:
    easy, hard = with_spectrum([3, 2, 1], 60, 60), with_spectrum(powers(-0.2, 60), 60, 60)
    batch = StackedOperators(torch.stack([hard, easy]))
    from dataclasses import replace

    plan = replace(make_plan(*batch.shape, batch.dtype, 3, "stream"), width=8, basis=40)
    order = [(position, result.passes) for position, result in solve(batch, plan, [[0], [1]])]
    assert [position for position, _ in order] == [1, 0]
    assert order[0][1] < order[1][1]


@pytest.mark.parametrize("method", METHODS)
def test_progress_counts_every_pass(method: str) -> None:
    lin = ExplicitChain(jacobians(4), torch.ones(4, 32).double())
    seen: list[int] = []
    result = svd(lin, 3, method=method, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == result.passes == lin.vectors


@pytest.mark.parametrize("method", ["lanczos", "stream"])
def test_no_jacobian_is_ever_formed(method: str) -> None:
    n = 2000
    generator = torch.Generator().manual_seed(0)
    P, Q = (torch.randn(n, 12, generator=generator) for _ in range(2))
    weights = 2.0 ** -torch.arange(12.0)
    a = 0.05 * torch.rand(n, generator=generator)
    operator = DiagonalPlusLowRank(a, P * weights / n**0.5, Q / n**0.5)
    with Forbid(n * n) as mode:
        result = svd(operator, 6, method=method)
    # The largest thing is a basis: of 8 blocks of 62 vectors for streams.
    assert mode.largest <= 8 * 62 * n
    assert result.converged.all()
    with pytest.raises(AssertionError, match="made"), Forbid(n * n):
        svd(operator, 6, method="dense")


def test_auto_forms_no_jacobian_either() -> None:
    n = 1500
    operator = DiagonalPlusLowRank(0.1 * torch.rand(n), torch.rand(n, 2), torch.rand(n, 2))
    with Forbid(n * n):
        result = svd(operator, 2)
    assert result.method in ("lanczos", "stream")
    assert result.converged.all()


def test_everything_that_is_an_operator() -> None:
    matrix = with_spectrum(powers(-1, 20), 24, 20)
    forms = (
        matrix,
        matrix.numpy(),
        scipy.sparse.csr_array(matrix.numpy()),
        aslinearoperator(matrix),
        aslinearoperator(matrix).T.T,
        aslinearoperator(matrix).to_scipy(),
        StackedOperators(matrix[None]),
    )
    for form in forms:
        check_triplets(svd(form, 3), matrix[None])
    transposed = svd(aslinearoperator(matrix).T, 3)
    check_triplets(transposed, matrix.T[None])
    expected = np.linalg.svd(matrix.numpy(), compute_uv=False)[:3]
    np.testing.assert_allclose(transposed.S[0].numpy(), expected, rtol=1e-12)


def test_tokens_of_a_linearisation() -> None:
    lin = ExplicitChain(jacobians(6), torch.ones(6, 32).double())
    result = svd(lin, 3, tokens=[4, 1])
    assert result.tokens == (4, 1)
    check_triplets(result, lin.J[[4, 1]])
    assert svd(lin, 3).tokens == tuple(range(6))


def test_refusals() -> None:
    lin = ExplicitChain(jacobians(3), torch.ones(3, 32).double())
    with pytest.raises(UsageError, match="tokens from 0 to 2"):
        svd(lin, 3, tokens=[3])
    with pytest.raises(UsageError, match="at least one token"):
        svd(lin, 3, tokens=[])
    with pytest.raises(UsageError, match="only be chosen from a linearisation"):
        svd(lin.J[0], 3, tokens=[0])
    with pytest.raises(UsageError, match="k must be"):
        svd(lin, 33)
    with pytest.raises(ValueError, match="cannot use a str"):
        svd("matrix", 3)


def test_gradients_are_not_recorded() -> None:
    matrix = jacobians(1)[0].requires_grad_()
    for method in METHODS:
        assert not svd(matrix, 2, method=method).U.requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("method", METHODS)
def test_groups_larger_than_a_panel_are_solved_in_parts(method: str) -> None:
    """The store's owners may be larger than what fits the memory."""
    J = jacobians(7)
    batch = StackedOperators(J)
    plan = replace(make_plan(*batch.shape, batch.dtype, 4, method), panel=3)
    made: list[int] = []
    found = dict(solve(batch, plan, [[0, 1, 2, 3, 4], [5, 6]], made.append))
    alone = dict(solve(batch, plan, [[5, 6]]))
    assert [found[0].tokens, found[1].tokens] == [(0, 1, 2, 3, 4), (5, 6)]
    assert_same_bits(found[1], alone[0])
    check_triplets(found[0], J[:5])
    if method == "dense":
        assert made[-1] == 3 * 40  # panels of 3, 2 and 2 operators


@pytest.mark.parametrize("scale", [1e-200, 1e200])
@pytest.mark.parametrize("method", METHODS)
def test_operators_near_the_ends_of_float64(method: str, scale: float) -> None:
    """‖A‖_F² is no number there."""
    matrix = with_spectrum(0.995 ** torch.arange(200.0), 200, 200)
    result = svd(matrix * scale, 4, method=method)
    assert result.converged.all() and 20 < result.stable_rank.item() < 200
    expected = torch.linalg.svdvals(matrix)[:4]
    torch.testing.assert_close(result.S[0] / scale, expected, rtol=1e-10, atol=0)


def test_error_bounds_of_tf32_products_are_no_smaller_than_they_can_be() -> None:
    batch = StackedOperators(jacobians(1, torch.float32))
    batch.precision = "tf32"
    for method in METHODS:
        result = svd(batch, 4, method=method)
        assert result.plan.tol == 1e-3
        assert (result.error_bound >= 1e-3 * result.S[:, :1]).all()
