"""Golub–Kahan–Lanczos: that the hard paths run, and what is said when they do not suffice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from elm_lanczos.operators import StackedOperators
from elm_lanczos.status import Status
from elm_lanczos.svd import lanczos as lanczos_module
from tests.spectra import DTYPES, check_triplets, powers, solve_with, with_spectrum


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("flat", [20, 40])
@pytest.mark.parametrize("k", [8, 18])
def test_plateau_then_gap_with_restarts(flat: int, k: int, dtype: torch.dtype) -> None:
    """RAFT's comment: none of 45 such configurations both restarted and answered correctly."""
    tail = 0.5 * 0.97 ** torch.arange(80.0)
    matrices = torch.stack(
        [with_spectrum([1.0] * flat + [*tail], 120, 120, dtype, seed) for seed in range(2)]
    )
    for basis in (k + 2, k + 6):
        # The smallest basis makes one step a restart.
        result = solve_with(StackedOperators(matrices), k, "lanczos", basis=basis, max_restarts=300)
        assert (result.n_restarts > 0).all()
        assert result.converged.all()
        check_triplets(result, matrices)


def test_breakdown_takes_random_vectors() -> None:
    identity = solve_with(torch.eye(40).double(), 6, "lanczos")
    # The sequence breaks down at every step on one side.
    assert identity.n_reseeds.item() >= 6
    ordinary = solve_with(with_spectrum(powers(-0.5, 60), 60, 60), 4, "lanczos")
    assert ordinary.n_reseeds.item() == 0


def test_without_the_check_repeated_values_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check after convergence is what finds them: the hard path is really taken."""
    matrix = with_spectrum([10, 10, 10, 9, 9, 8, 7, 6, 1, 0.5], 64, 40)
    expected = torch.linalg.svdvals(matrix)[:6]
    found = solve_with(matrix, 6, "lanczos")
    torch.testing.assert_close(found.S[0], expected)

    def pass_unchecked(group: object, fact: Any, begins: Tensor) -> None:
        fact.check.passed |= begins
        fact.check.limit[begins] = torch.inf

    monkeypatch.setattr(lanczos_module, "_begin_check", pass_unchecked)
    unchecked = solve_with(matrix, 6, "lanczos")
    assert float((unchecked.S[0] - expected).abs().max()) > 0.5


def test_start_vector_in_the_null_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """diag(0, 1, 2), started from e₀ (CuPy)."""
    ordinary = lanczos_module.normal_rows

    def with_e0(seed: int, labels: list[int], purpose: int, shape: Any, like: Tensor) -> Tensor:
        rows = ordinary(seed, labels, purpose, shape, like)
        if purpose in (lanczos_module._PROBE, lanczos_module._START):
            rows = torch.zeros_like(rows)
            rows[..., 0] = 1.0
        return rows

    monkeypatch.setattr(lanczos_module, "normal_rows", with_e0)
    for scale in (1.0, 1e-30):
        matrix = torch.diag(torch.tensor([0.0, 1.0, 2.0])).double() * scale
        result = solve_with(matrix, 2, "lanczos")
        torch.testing.assert_close(result.S[0], torch.tensor([2.0, 1.0]).double() * scale)
        assert result.n_reseeds.item() > 0
        assert result.converged.all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_restarts_exhausted_is_flagged_and_partial(dtype: torch.dtype) -> None:
    matrix = with_spectrum(torch.linspace(1, 0.5, 80), 90, 80, dtype)
    result = solve_with(matrix, 8, "lanczos", basis=12, max_restarts=0)
    assert result.status.item() == Status.NOT_CONVERGED
    assert not result.converged.any()
    assert result.n_iter.item() == 12
    assert result.n_restarts.item() == 0
    # What was reached is returned: orthonormal vectors with their true residuals.
    S = torch.linalg.svdvals(matrix.double())
    assert 0.9 < float(result.S[0, 0]) <= float(S[0]) * (1 + 1e-6)
    U, V = result.U[0].double(), result.V[0].double()
    assert float((V @ V.T - torch.eye(8)).abs().max()) < 1e-5
    true = (matrix.double().T @ U.T - V.T * result.S[0].double()).norm(dim=0)
    torch.testing.assert_close(true, result.residual[0].double(), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tolerance_below_rounding_ends_as_converged_to_rounding(dtype: torch.dtype) -> None:
    matrix = with_spectrum(powers(-0.5, 60), 60, 60, dtype)
    result = solve_with(matrix, 4, "lanczos", tol=0.0)
    assert result.status.item() == Status.CONVERGED_TO_ROUNDING
    assert result.converged.all()
    one_step = solve_with(matrix, 4, "lanczos", tol=0.0, basis=5, max_restarts=0)
    assert one_step.status.item() == Status.NOT_CONVERGED


def test_finished_operators_leave_the_lockstep() -> None:
    easy = with_spectrum([4, 2, 1], 80, 80)
    hard = with_spectrum(torch.linspace(1, 0.5, 80), 80, 80)
    products: list[int] = []

    class Counting(StackedOperators):
        def matvec(self, V: Tensor, index: Tensor) -> Tensor:
            products.append(len(V))
            return super().matvec(V, index)

    result = solve_with(Counting(torch.stack([easy, hard, easy])), 3, "lanczos", basis=20)
    assert result.converged.all()
    assert products[0] == 3 and 1 in products
    assert result.n_iter[0] < result.n_iter[1]
    # Eight probes and two passes a step: residuals take none.
    assert result.passes == 8 + 2 * int(result.n_iter.sum())


def test_stable_rank_estimate_has_an_honest_standard_error() -> None:
    """Over 40 seeds the error in units of the standard error is of order one."""
    matrix = with_spectrum(powers(-0.5, 60), 60, 60)
    exact = float(matrix.square().sum() / torch.linalg.matrix_norm(matrix, 2) ** 2)
    scores = []
    for seed in range(40):
        result = solve_with(matrix, 2, "lanczos", seed=seed, probes=16)
        scores.append((float(result.stable_rank) - exact) / float(result.stable_rank_error))
    score = torch.tensor(scores)
    # Student's t with 15 degrees of freedom: mean 0 ± 0.17, standard deviation 1.07 ± 0.13.
    assert abs(float(score.mean())) < 0.6
    assert 0.7 < float(score.std()) < 1.6
