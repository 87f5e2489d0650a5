"""Every operator that breaks SVD codes, by every method, in both dtypes, alone and in lockstep."""

from __future__ import annotations

import pytest
import torch

from elm_lanczos.operators import StackedOperators
from elm_lanczos.status import Status
from tests.spectra import CASES, DTYPES, METHODS, Case, check_triplets, solve_with, with_spectrum


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_hard_case(case: Case, method: str, dtype: torch.dtype) -> None:
    matrix = case.build().to(dtype)
    result = solve_with(matrix, case.k, method, **(case.plan or {}))
    check_triplets(result, matrix[None], case.sigma, case.residual)
    assert result.converged.all(), result.residual / result.S[:, :1]
    if method == "lanczos" and case.plan:
        assert result.n_restarts.item() > 0
    exact = float(matrix.double().square().sum())
    error = abs(float(result.frobenius_squared) - exact)
    if method == "lanczos":
        # Five standard errors of eight normal probes.
        largest = float(result.S[0, 0]) ** 2
        assert error <= 5 * float(result.stable_rank_error) * largest + 1e-5 * exact
    else:
        assert error <= 1e-5 * exact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [2, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_hard_case_by_blocks(case: Case, block: int, dtype: torch.dtype) -> None:
    matrix = case.build().to(dtype)
    # A basis that restarts keeps room for as many steps, whatever the block.
    plan = {"basis": case.plan["basis"] + 6 * (block - 1)} if case.plan else {}
    result = solve_with(matrix, case.k, "lanczos", block=block, **plan)
    check_triplets(result, matrix[None], case.sigma, case.residual)
    assert result.converged.all(), result.residual / result.S[:, :1]
    assert not plan or result.n_restarts.item() > 0


@pytest.mark.parametrize("method", METHODS)
def test_graded_by_hundreds(method: str) -> None:
    matrix = torch.eye(20, 21).double() * 100.0 ** -torch.arange(21.0).double()
    check_triplets(solve_with(matrix, 4, method), matrix[None])


@pytest.mark.parametrize("scale", [1e30, 1e-30])
@pytest.mark.parametrize("method", METHODS)
def test_entries_scaled_to_the_ends_of_float32(method: str, scale: float) -> None:
    values = torch.linspace(2, 0.1, 40)
    matrix = with_spectrum(values, 48, 40).mul(scale).float()
    result = solve_with(matrix, 6, method)
    assert result.status.item() == Status.CONVERGED
    expected = torch.linalg.svdvals(matrix.double())[:6]
    torch.testing.assert_close(result.S[0].double(), expected, rtol=1e-5, atol=0)
    rank = float(matrix.double().square().sum() / expected[0] ** 2)
    error = abs(float(result.stable_rank) - rank)
    assert error <= 5 * float(result.stable_rank_error) + 1e-4 * rank


@pytest.mark.parametrize("method", METHODS)
def test_scaling_by_a_power_of_two_changes_no_bit(method: str) -> None:
    matrix = with_spectrum(torch.linspace(2, 0.1, 24), 30, 24, torch.float32)
    one, other = (solve_with(matrix * scale, 4, method) for scale in (1.0, 2.0**60))
    assert torch.equal(one.U, other.U) and torch.equal(one.V, other.V)
    assert torch.equal(one.S * 2.0**60, other.S)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("method", "block"), [("lanczos", 1), ("lanczos", 2), ("stream", 1), ("dense", 1)]
)
def test_a_mixed_batch_in_lockstep_is_as_if_alone(
    method: str, block: int, dtype: torch.dtype
) -> None:
    plan = {"basis": 16, "block": block}
    m = d = 40
    matrices = torch.stack(
        [
            torch.zeros(m, d).double(),
            torch.eye(m).double(),
            torch.ones(m, d).double(),
            with_spectrum([10, 10, 10, 9, 9, 8, 7, 6, 1, 0.5], m, d),
            with_spectrum(20 * 0.97 ** torch.arange(40.0), m, d),
            with_spectrum([5, 4, 3, 2, 1], m, d),
            torch.eye(m).double() * 10.0 ** -torch.arange(40.0).double(),
            1e20 * with_spectrum(torch.linspace(3, 1, 40), m, d),
            1e-20 * with_spectrum(torch.linspace(3, 1, 40), m, d),
        ]
    ).to(dtype)
    together = solve_with(StackedOperators(matrices), 6, method, **plan)
    check_triplets(together, matrices)
    assert together.converged.all()
    assert together.n_iter.unique().numel() > 1 or method != "lanczos"
    for i, matrix in enumerate(matrices):
        alone = solve_with(StackedOperators(matrix[None], labels=[i]), 6, method, **plan)
        # Rounding of the lockstep's batched products decides the rest, and whether an operator
        # leaves one test sooner or later; σ is second order in either.
        tol = 64 * torch.finfo(dtype).eps * float(alone.S[0, 0])
        torch.testing.assert_close(together.S[i], alone.S[0], rtol=0, atol=tol)


@pytest.mark.parametrize("method", METHODS)
def test_numbers_that_are_not_finite_are_reported_and_stay_where_they_are(method: str) -> None:
    matrices = torch.stack([with_spectrum(torch.linspace(2, 1, 12), 12, 12) for _ in range(3)])
    matrices[1, 3, 4] = torch.nan
    result = solve_with(StackedOperators(matrices), 2, method)
    assert result.status.tolist() == [
        Status.CONVERGED,
        Status.NOT_CONVERGED,
        Status.CONVERGED,
    ]
    assert result.S[1].isnan().all()
    check_triplets(solve_with(matrices[0], 2, method), matrices[:1])
    torch.testing.assert_close(result.S[0], torch.linalg.svdvals(matrices[0])[:2])
