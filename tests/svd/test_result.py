"""Signs, bounds, clusters, and putting results together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from elm_lanczos.operators import StackedOperators, TokenOperators
from elm_lanczos.status import Status
from elm_lanczos.svd import SVDResult
from elm_lanczos.svd.plan import make_plan
from elm_lanczos.svd.result import error_bounds
from elm_lanczos.svd.solve import solve
from tests.spectra import METHODS, ExplicitChain, powers, solve_with, with_spectrum


@pytest.mark.parametrize("method", METHODS)
def test_signs_follow_the_inputs(method: str) -> None:
    J = torch.stack([with_spectrum(powers(-1, 20), 24, 20, seed=seed) for seed in range(4)])
    inputs = torch.randn(4, 20, generator=torch.Generator().manual_seed(0)).double()
    inputs[2] = 0
    inputs[3] *= 1e200
    result = solve_with(TokenOperators(ExplicitChain(J, inputs), range(4)), 3, method)
    product = torch.einsum("nkd,nd->nk", result.V, inputs.clamp(-1e150, 1e150))
    assert (product[[0, 1, 3]] > 0).all()
    largest = result.V[2].gather(1, result.V[2].abs().argmax(1, keepdim=True))
    assert (largest > 0).all()
    # u follows v: the triplets are still those of J.
    torch.testing.assert_close(J @ result.V.mT, (result.U * result.S[..., None]).mT)


def test_sign_where_the_input_is_orthogonal_to_v() -> None:
    matrix = torch.diag(torch.tensor([3.0, 2, 1])).double()
    inputs = torch.tensor([[0.0, 0, 1]]).double()
    result = solve_with(StackedOperators(matrix[None], inputs=inputs), 2, "dense")
    torch.testing.assert_close(result.V[0], torch.eye(3)[:2].double())


def test_error_bounds_know_the_gap() -> None:
    S = torch.tensor([[3.0, 1.0, 1.0 - 1e-9]]).double()
    residual = torch.full((1, 3), 1e-6).double()
    bound = error_bounds(S, residual, torch.zeros(1).double())
    # Isolated: r²/gap with gap = 2 − 2r; closer than the residuals: r itself.
    torch.testing.assert_close(bound[0, 0], torch.tensor(1e-12 / 2).double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(bound[0, 1:], residual[0, 1:])


def test_error_bounds_hold_for_perturbed_triplets() -> None:
    """Rayleigh quotients of perturbed vectors against NumPy's values, 200 draws."""
    rng = np.random.default_rng(0)
    for draw in range(200):
        matrix = with_spectrum(np.sort(rng.uniform(0, 1, 12))[::-1].copy(), 15, 12, seed=draw)
        U, S, Vt = np.linalg.svd(matrix.numpy(), full_matrices=False)
        size = 10.0 ** rng.uniform(-8, -2)
        u = U[:, :3] + size * rng.standard_normal((15, 3))
        v = Vt[:3].T + size * rng.standard_normal((12, 3))
        u, v = u / np.linalg.norm(u, axis=0), v / np.linalg.norm(v, axis=0)
        sigma = np.einsum("ik,ij,jk->k", u, matrix.numpy(), v)
        residual = np.maximum(
            np.linalg.norm(matrix.numpy() @ v - u * sigma, axis=0),
            np.linalg.norm(matrix.numpy().T @ u - v * sigma, axis=0),
        )
        order = np.argsort(-sigma)
        bound = error_bounds(
            torch.tensor(sigma[order])[None],
            torch.tensor(residual[order])[None],
            torch.tensor([S[3]]),
        )[0].numpy()
        assert (np.abs(sigma[order] - S[:3]) <= bound + 1e-15).all()


@pytest.mark.parametrize("method", METHODS)
def test_clusters_are_reported_as_one_subspace(method: str) -> None:
    values = [10, 10, 10, 9, 8, 8, 7, *powers(-1, 10)]
    result = solve_with(with_spectrum(values, 40, 30), 7, method)
    assert result.clusters == (((0, 1, 2), (4, 5)),)
    separate = solve_with(with_spectrum(powers(-1, 30), 40, 30), 7, method)
    assert separate.clusters == ((),)


def test_concatenate_keeps_every_array_and_the_passes_it_is_given() -> None:
    matrices = [with_spectrum(powers(-1, 20), 20, 20, seed=seed) for seed in range(3)]
    for method in METHODS:
        parts = [
            solve_with(StackedOperators(matrix[None], labels=[7 + i]), 3, method)
            for i, matrix in enumerate(matrices)
        ]
        whole = SVDResult.concatenate(parts, 123)
        assert whole.tokens == (7, 8, 9)
        assert whole.passes == 123
        assert len(whole.clusters) == 3
        for name, value in vars(whole).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, torch.cat([getattr(part, name) for part in parts]))


@pytest.mark.parametrize("method", METHODS)
def test_a_group_of_several_panels_counts_the_passes_of_each(method: str) -> None:
    J = torch.stack([with_spectrum(powers(-1, 20), 20, 20, seed=seed) for seed in range(5)])
    plan = replace(make_plan(5, 20, 20, torch.float64, 3, method), panel=2)
    made: list[int] = []
    ((_, group),) = solve(StackedOperators(J), plan, [range(5)], made.append)
    assert group.passes == made[-1]
    panels = 3 * 20  # all m rows for each of three panels
    assert method != "dense" or group.passes == panels


def test_results_have_the_dtype_of_the_operator() -> None:
    for dtype in (torch.float32, torch.float64):
        result = solve_with(with_spectrum([2, 1], 5, 4, dtype), 2, "lanczos")
        for name in ("U", "S", "V", "residual", "error_bound", "stable_rank", "stable_rank_error"):
            assert getattr(result, name).dtype == dtype
        assert result.status.dtype == torch.uint8
        assert result.converged.dtype == torch.bool
        assert result.status.item() == Status.CONVERGED
