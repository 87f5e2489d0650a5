"""Golub–Kahan–Lanczos: that the hard paths run, and what is said when they do not suffice."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from elm_lanczos.operators import StackedOperators
from elm_lanczos.status import Status
from elm_lanczos.svd import lanczos as lanczos_module
from elm_lanczos.svd.plan import make_plan
from tests.spectra import (
    DTYPES,
    Forbid,
    ReflectedDiagonal,
    check_triplets,
    powers,
    solve_with,
    with_spectrum,
)


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
    matrix = with_spectrum([10, 10, 10, 9, 9, 8, 7, 6, *powers(-0.5, 92)], 120, 100)
    expected = torch.linalg.svdvals(matrix)[:6]
    # Further on, rounding would bring the copies in.
    early = {"tol": 1e-4, "check_every": 1}
    found = solve_with(matrix, 6, "lanczos", **early)
    torch.testing.assert_close(found.S[0], expected)

    def pass_unchecked(group: object, fact: Any, begins: Tensor) -> None:
        fact.check.passed |= begins
        fact.check.limit[begins] = torch.inf

    monkeypatch.setattr(lanczos_module, "_begin_check", pass_unchecked)
    unchecked = solve_with(matrix, 6, "lanczos", **early)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_converged_triplets_are_locked_and_stay(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    matrix = with_spectrum(20 * 0.97 ** torch.arange(64.0), 96, 64, dtype)
    ordinary = lanczos_module._restart
    locked: list[Tensor] = []

    def watched(group: Any, fact: Any, ritz: Any) -> None:
        # Before a restart the locked vectors are where the last one put them.
        before, held = fact.V[0, :20].clone(), fact.free[0, :20] == 0
        ordinary(group, fact, ritz)
        eps = torch.finfo(dtype).eps
        assert float((fact.V[0, :20] - before)[held].abs().amax() if held.any() else 0) < 16 * eps
        assert (fact.free[0, :20][held] == 0).all()
        locked.append(held)

    monkeypatch.setattr(lanczos_module, "_restart", watched)
    result = solve_with(matrix, 20, "lanczos", basis=30)
    check_triplets(result, matrix[None])
    assert result.n_restarts.item() == len(locked) > 2
    counts = [int(held.sum()) for held in locked]
    assert counts == sorted(counts) and counts[0] == 0 < counts[-1] <= result.n_locked.item()


def test_a_lost_residual_becomes_the_next_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """A next block that has nothing to do with the operator is noticed and replaced."""
    matrix = with_spectrum(20 * 0.97 ** torch.arange(64.0), 96, 64)
    ordinary, led = lanczos_module._restart, []

    def spoilt(group: Any, fact: Any, ritz: Any) -> None:
        ordinary(group, fact, ritz)
        where = torch.ones(len(fact.member), dtype=torch.bool)
        random = torch.randn(len(where), 1, 64, dtype=torch.float64)
        lanczos_module._lead(group, fact, random, where)

    lead = lanczos_module._lead

    def watched(group: Any, fact: Any, W: Tensor, where: Tensor) -> None:
        led.append(int(where.sum()))
        lead(group, fact, W, where)

    monkeypatch.setattr(lanczos_module, "_restart", spoilt)
    monkeypatch.setattr(lanczos_module, "_lead", watched)
    result = solve_with(matrix, 10, "lanczos", basis=30, max_restarts=300)
    assert len(led) > 2 * result.n_restarts.item() > 0
    check_triplets(result, matrix[None])


def test_a_block_finds_as_many_copies_at_once() -> None:
    """Three copies: found with the rest by blocks of three, and by the check by single vectors."""
    matrix = with_spectrum([10, 10, 10, *(5 * powers(-1, 57))], 60, 60)
    steps = {}
    for block in (1, 3):
        result = solve_with(matrix, 3, "lanczos", block=block)
        check_triplets(result, matrix[None])
        steps[block] = result.n_iter.item() / block
    assert steps[3] < steps[1] / 2


def test_the_host_waits_at_tests_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No operation of a step reads a number or a mask back, and most steps have no test."""
    steps, tests = 0, 0
    expand, ritz = lanczos_module._expand, lanczos_module._ritz

    class NoRead(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            name = str(func)
            for read in ("_local_scalar_dense", "nonzero", "is_nonzero", "unique", "equal.default"):
                assert read not in name, name
            return func(*args, **(kwargs or {}))

    def watched(group: Any, fact: Any, stop: int) -> None:
        nonlocal steps
        steps += stop - fact.j
        with NoRead():
            expand(group, fact, stop)

    def counted(group: Any, fact: Any) -> Any:
        nonlocal tests
        tests += 1
        return ritz(group, fact)

    monkeypatch.setattr(lanczos_module, "_expand", watched)
    monkeypatch.setattr(lanczos_module, "_ritz", counted)
    matrices = torch.stack([with_spectrum(powers(-0.5, 120), 120, 120, seed=s) for s in range(3)])
    result = solve_with(StackedOperators(matrices), 8, "lanczos")
    assert result.converged.all()
    assert steps >= result.n_iter.max() and tests <= steps / 2
    with pytest.raises(AssertionError, match="local_scalar"), NoRead():
        matrices[0, 0, 0].item()


@pytest.mark.parametrize("block", [1, 3])
def test_memory_is_that_of_the_bases(block: int) -> None:
    """Nothing is larger than one basis, and the plan's bytes cover all there is at one time."""
    d, g = 700, 3
    batch = StackedOperators([ReflectedDiagonal(powers(-0.5, d), seed) for seed in range(g)])
    plan = make_plan(g, d, d, torch.float64, 6, "lanczos")
    with Forbid(g * (plan.basis + block) * d + 1):
        result = solve_with(batch, 6, "lanczos", block=block)
    assert result.converged.all()
    group = lanczos_module._Group(batch, plan, torch.arange(g), lambda passes: None)
    state = vars(lanczos_module._begin(group)).values()
    held = sum(x.numel() * x.element_size() for x in state if isinstance(x, Tensor))
    # Twice, while operators that have finished are taken out.
    assert 2 * held <= plan.bytes["lanczos"] <= 5 * held


def test_passes_on_a_slowly_decaying_spectrum_of_4096_columns() -> None:
    """At most 1/25 of the m passes of a stream, those of the probes and the check included."""
    spectrum = powers(-0.5, 4096)
    result = solve_with(ReflectedDiagonal(spectrum.float()), 16, "lanczos")
    assert result.converged.all()
    assert result.passes <= 4096 / 25
    assert float((result.S[0].double() - spectrum[:16]).abs().max()) <= 1e-5


@pytest.mark.parametrize("block", [1, 2, 3])
def test_bound_on_unseen_components_holds(block: int) -> None:
    """|c|² ≤ 1/λ for the leading singular vector, whatever the steps; and it becomes sharp."""
    N = 60
    for seed in range(5):
        matrix = with_spectrum([3.0, *powers(-0.5, N - 1)], N, N, seed=seed)
        batch = StackedOperators(matrix[None])
        plan = replace(make_plan(1, N, N, torch.float64, 1, "lanczos", seed=seed), block=block)
        group = lanczos_module._Group(batch, plan, torch.arange(1), lambda passes: None)
        fact = lanczos_module._begin(group)
        sigma = 3.0 / group.scale.double()
        c = fact.V[0, :block] @ torch.linalg.svd(matrix)[2][0]
        for blocks in range(1, 8):
            lanczos_module._expand(group, fact, blocks * block)
            B = fact.B[:, : fact.j, : fact.j]
            least = torch.full((1, 1), 1e-14).double()
            bound = lanczos_module._miss_probability(
                B, fact.beta, sigma[:, None, None], least, N, block
            )
            # (N / 2λ)^(b/2) / Γ(b/2 + 1) at λ = 1/|c|²: the chance of a component so small.
            actual = (N / 2 * c.square().sum()) ** (block / 2) / math.gamma(block / 2 + 1)
            assert float(bound) >= min(1.0, float(actual)) * (1 - 1e-6)


def test_a_check_that_restarts_forbid_is_not_endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triplets that converge but are never let into a check are given up and flagged."""

    def large(group: Any, fact: Any, ritz: Any, where: Tensor) -> Tensor:
        return torch.full((len(where),), torch.inf, dtype=torch.float64)

    monkeypatch.setattr(lanczos_module, "_outside", large)
    matrix = with_spectrum(powers(-1, 80), 80, 80)
    result = solve_with(matrix, 4, "lanczos", basis=12, max_restarts=5)
    assert result.status.item() == Status.NOT_CONVERGED
    assert result.n_restarts.item() == 5
