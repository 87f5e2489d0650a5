"""Block Krylov by streams: cost independent of n, restarts, exactness on a full basis."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from elm_lanczos.operators import StackedOperators, TokenOperators
from elm_lanczos.status import Status
from elm_lanczos.svd import svd
from elm_lanczos.svd.block_krylov import BlockKrylov
from elm_lanczos.svd.plan import make_plan
from tests.spectra import DTYPES, ExplicitChain, check_triplets, powers, solve_with, with_spectrum


def test_cost_does_not_depend_on_the_number_of_tokens() -> None:
    J = torch.stack([with_spectrum(powers(-1, 40), 48, 40, seed=seed) for seed in range(12)])
    vectors = []
    for tokens in ([3], range(12)):
        lin = ExplicitChain(J, torch.ones(12, 40, dtype=J.dtype))
        result = solve_with(TokenOperators(lin, tokens), 4, "stream", width=12)
        check_triplets(result, J[list(tokens)])
        vectors.append(lin.vectors)
        assert lin.vectors == result.passes == 12 + 48 * int(result.n_iter.max())
    assert vectors[0] <= vectors[1] <= vectors[0] + 48


def test_scarce_memory_gives_narrower_blocks_and_the_same_triplets() -> None:
    shape, k = (24, 200, 200), 4
    J = torch.stack([with_spectrum(powers(-1, 200), *shape[1:], seed=seed) for seed in range(24)])
    batch = StackedOperators(J)
    ample = make_plan(*shape, J.dtype, k, "stream", memory=2**30)
    memory = ample.bytes["stream"] * 4 // 5
    result = svd(batch, k, method="stream", memory=memory)
    assert result.plan.width < ample.width
    assert result.plan.panel == 24 and result.plan.bytes["stream"] <= memory
    assert result.converged.all()
    check_triplets(result, J)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_full_basis_restarts_thickly(dtype: torch.dtype) -> None:
    matrix = with_spectrum(powers(-0.5, 150), 160, 150, dtype)
    batch = StackedOperators(matrix[None])
    plan = make_plan(*batch.shape, dtype, 6, "stream")
    result = svd(batch, 6, plan=replace(plan, width=12, basis=30))
    assert result.n_restarts.item() > 0
    assert result.converged.all()
    check_triplets(result, matrix[None])


class Noisy(StackedOperators):
    """Products that are never twice the same, so that nothing converges."""

    def _noisy(self, product: torch.Tensor) -> torch.Tensor:
        return product + 1e-3 * torch.randn_like(product)

    def matvec(self, V: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return self._noisy(super().matvec(V, index))

    def rmatvec(self, U: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return self._noisy(super().rmatvec(U, index))

    def rows(self, Y: torch.Tensor) -> torch.Tensor:
        return self._noisy(super().rows(Y))


def test_wide_operators_restart_with_as_many_vectors_as_they_have_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    restarts, result = [], BlockKrylov.result
    monkeypatch.setattr(
        BlockKrylov, "result", lambda self, n: restarts.append(self.restarts) or result(self, n)
    )
    batch = Noisy(with_spectrum(powers(-0.1, 8), 8, 300, torch.float32)[None])
    plan = make_plan(*batch.shape, torch.float32, 4, "stream")
    found = svd(batch, 4, plan=replace(plan, basis=20))
    assert restarts[0] > 0 and not found.converged.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_basis_that_spans_everything_is_exact(dtype: torch.dtype) -> None:
    matrix = with_spectrum(torch.linspace(1, 0.9, 30), 36, 30, dtype)
    result = solve_with(matrix, 10, "stream", width=12, tol=0.0)
    # Blocks of 12, 12 and 6 columns.
    assert result.n_iter.item() == 3
    assert result.status.item() == Status.CONVERGED_TO_ROUNDING
    check_triplets(result, matrix[None], residual=(1e-5, 1e-13))


def test_missing_directions_are_replaced_by_random_ones() -> None:
    result = solve_with(with_spectrum([5, 4, 3, 2, 1], 96, 28), 8, "stream")
    assert result.n_reseeds.item() >= 15


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_streams_exhausted_is_flagged(dtype: torch.dtype) -> None:
    matrix = with_spectrum(torch.linspace(1, 0.5, 80), 80, 80, dtype)
    result = solve_with(matrix, 8, "stream", width=10, max_streams=1)
    assert result.status.item() == Status.NOT_CONVERGED
    assert result.n_iter.item() == 1
    assert float(result.residual.max()) > 1e-3
    true = (matrix.T @ result.U[0].T - result.V[0].T * result.S[0]).norm(dim=0)
    torch.testing.assert_close(true, result.residual[0], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tolerance_below_rounding_ends_as_converged_to_rounding(dtype: torch.dtype) -> None:
    matrix = with_spectrum(powers(-1, 200), 200, 200, dtype)
    result = solve_with(matrix, 4, "stream", tol=0.0)
    assert result.status.item() == Status.CONVERGED_TO_ROUNDING
    assert result.n_iter.item() < 8
    check_triplets(result, matrix[None])


def test_stable_rank_is_exact() -> None:
    matrix = with_spectrum(powers(-0.5, 60), 60, 60)
    result = solve_with(matrix, 2, "stream")
    exact = matrix.square().sum() / torch.linalg.matrix_norm(matrix, 2) ** 2
    torch.testing.assert_close(result.stable_rank[0], exact)
    assert result.stable_rank_error.item() == 0


def test_small_values_keep_their_digits_in_float32() -> None:
    """σ_k = 1e-4 σ₁: W = JᵀJV alone would lose it (its square is below rounding)."""
    matrix = with_spectrum(10.0 ** -(torch.arange(60.0) / 2), 70, 60, torch.float32)
    result = solve_with(matrix, 9, "stream", width=20, tol=2e-6)
    assert result.converged.all()
    expected = torch.linalg.svdvals(matrix.double())[:9]
    torch.testing.assert_close(result.S[0].double(), expected, rtol=0, atol=5e-7)
