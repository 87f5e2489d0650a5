"""Singular triplets of a batch of operators, with the evidence for them.

For a computed triplet with residual r = max(‖Av − σu‖, ‖Aᵀu − σv‖) there is a singular value
within r of σ, and within r²/g where g is the distance from σ to the rest of the spectrum of
[0 A; Aᵀ 0] (Parlett, *The Symmetric Eigenvalue Problem*, §11.7). Distances to the neighbours are
taken conservatively, between the ends of their own intervals. An iterative method that accepts
residuals up to tol·σ₁ cannot tell a value of that size from zero, nor order values closer than that
where the set of k ends among them: there the bound is at least tol·σ₁.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from elm_lanczos.operators import OperatorBatch
from elm_lanczos.status import Status
from elm_lanczos.svd.orthogonal import BREAKDOWN
from elm_lanczos.svd.plan import TF32_TOL, Plan

# Singular values cannot be expected closer than this many units of rounding, relative to σ₁ (or √d
# units, if that is more); those of an operator that met a breakdown not closer than its threshold.
_VALUE_ROUNDING = 16.0


@dataclass(frozen=True)
class SVDResult:
    """The k leading singular triplets of n operators, A_i ≈ Σ_j S[i,j] U[i,j] V[i,j]ᵀ.

    Attributes:
        U: Left singular vectors (n, k, m), signs following V.
        S: Singular values (n, k), descending.
        V: Right singular vectors (n, k, d), ⟨v, x⟩ ≥ 0 for the operator's input x; where there is
            none, or the product is zero to rounding, the largest entry is positive.
        residual: max(‖Av − σu‖, ‖Aᵀu − σv‖) (n, k).
        error_bound: Bound on the error of S (n, k).
        status: `Status` codes (n,), uint8.
        clusters: For each operator the groups of two or more indices whose singular values are
            closer than their error bounds: only the subspace of a group is determined.
        stable_rank: ‖A‖_F² / σ₁² (n,), 0 for a zero operator.
        stable_rank_error: Its standard error (n,); 0 where it is exact.
        frobenius_squared: ‖A‖_F² (n,), float64, as exact as stable_rank.
        n_iter: Lanczos steps, or streams (n,).
        n_restarts: Thick restarts (n,).
        n_reseeds: Random vectors that took the place of a Krylov vector at a breakdown (n,).
        n_locked: Triplets that were locked at the last thick restart (n,); 0 for other methods.
        contribution: A_i x_i for the operators' inputs x_i (n, m); None where they have none.
        passes: JVPs and VJPs made.
        tokens: The labels of the operators, n integers.
        method: 'lanczos', 'stream' or 'dense'.
        plan: The plan followed.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    residual: Tensor
    error_bound: Tensor
    status: Tensor
    clusters: tuple[tuple[tuple[int, ...], ...], ...]
    stable_rank: Tensor
    stable_rank_error: Tensor
    frobenius_squared: Tensor
    n_iter: Tensor
    n_restarts: Tensor
    n_reseeds: Tensor
    n_locked: Tensor
    contribution: Tensor | None
    passes: int
    tokens: tuple[int, ...]
    method: str
    plan: Plan

    def _repr_html_(self) -> str:
        """Shows it in a notebook."""
        from elm_lanczos.report import notebook

        return notebook.triplets(self)

    @property
    def converged(self) -> Tensor:
        """Whether all k triplets meet the tolerance or the arithmetic's limit, (n,) bool."""
        met = (self.status == Status.CONVERGED) | (self.status == Status.CONVERGED_TO_ROUNDING)
        return met

    @staticmethod
    def concatenate(results: Sequence[SVDResult], passes: int) -> SVDResult:
        """One result of several for different operators, in the order given.

        Args:
            results: At least one; all of one method, k and shape.
            passes: JVPs and VJPs made for them; one may have served several.

        Returns:
            The whole.
        """
        first = results[0]
        per_operator: dict[str, Any] = {
            name: torch.cat([getattr(result, name) for result in results])
            for name, value in vars(first).items()
            if isinstance(value, Tensor)
        }
        return replace(
            first,
            **per_operator,
            clusters=sum((result.clusters for result in results), ()),
            tokens=sum((result.tokens for result in results), ()),
            passes=passes,
        )

    def rows(self, start: int, stop: int) -> SVDResult:
        """The results of the operators from one to before another one."""
        per_operator: dict[str, Any] = {
            name: value[start:stop]
            for name, value in vars(self).items()
            if isinstance(value, (Tensor, tuple))
        }
        return replace(self, **per_operator)

    def decode(self, model: Any, top: int = 8) -> Any:
        """The tokens that each u writes and each v reads.

        Args:
            model: The DetachedModel the operators came from.
            top: Tokens for each vector.

        Returns:
            What `elm_lanczos.decode.decode_triplets` returns.
        """
        from elm_lanczos.decode import decode_triplets

        return decode_triplets(self, model, top)


@dataclass(frozen=True)
class Solution:
    """What a method found for g operators divided by their scale; assembled by `assemble`.

    Attributes:
        U: (g, k, m).
        S: (g, k) float64.
        V: (g, k, d).
        residual: (g, k) float64.
        following: (g,) float64, the largest value that σ_{k+1} may have.
        unseen: (g,) float64, the size up to which the method may have missed a value or, among
            values that close, taken one for another; 0 where it sees all.
        settled: (g,) bool: the method's own tests were passed.
        frobenius_squared: (g,) float64.
        frobenius_error: (g,) float64, its standard error.
        n_iter: (g,).
        n_restarts: (g,).
        n_reseeds: (g,).
        contribution: (g, m), of the operators as they are; None where they have no inputs.
        passes: JVPs and VJPs made.
        n_locked: (g,); None for methods that do not lock.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    residual: Tensor
    following: Tensor
    unseen: Tensor
    settled: Tensor
    frobenius_squared: Tensor
    frobenius_error: Tensor
    n_iter: Tensor
    n_restarts: Tensor
    n_reseeds: Tensor
    contribution: Tensor | None
    passes: int
    n_locked: Tensor | None = None


def assemble(
    batch: OperatorBatch, plan: Plan, index: Tensor, scale: Tensor, found: Solution
) -> SVDResult:
    """Undo the scaling, fix the signs, and judge what was found.

    Args:
        batch: The operators.
        plan: The plan followed.
        index: Positions in the batch of the g operators, (g,), on the CPU.
        scale: (g,) powers of two by which they were divided.
        found: What was found.

    Returns:
        The result for these g operators.
    """
    dtype, k = batch.dtype, plan.k
    signs = _signs(found.V, None if batch.inputs is None else batch.inputs[index])
    least = max(_VALUE_ROUNDING, math.sqrt(max(batch.shape[1:])))
    units = torch.where(found.n_reseeds > 0, max(BREAKDOWN, least), least).double()
    rounding = units.to(found.S.device) * torch.finfo(dtype).eps * found.S[:, 0]
    bound = error_bounds(found.S, found.residual, found.following).maximum(rounding[:, None])
    if batch.precision == "tf32":  # residuals are made of such products too
        bound = bound.maximum(TF32_TOL * found.S[:, :1])
    unseen = found.unseen[:, None]
    above_next = found.S - found.following[:, None]
    vague = (unseen > 0) & (torch.minimum(above_next, found.S / 2) <= unseen)
    bound = torch.where(vague, bound.maximum(unseen), bound)
    largest = found.S[:, :1]
    worst = found.residual.amax(1, keepdim=True)
    status = torch.full((len(index),), int(Status.NOT_CONVERGED), dtype=torch.uint8)
    limit = rounding_level(batch) * largest
    orthonormal = _departure(found.U).maximum(_departure(found.V)) <= rounding_level(batch)
    settled = found.settled.to(largest.device) & orthonormal
    for met, code in (
        (worst <= limit, Status.CONVERGED_TO_ROUNDING),
        (worst <= plan.tol * largest, Status.CONVERGED),
    ):
        status[(settled & met[:, 0]).cpu()] = int(code)
    factor = scale.double()[:, None]
    safe = torch.where(largest == 0, 1.0, largest)[:, 0] ** 2
    return SVDResult(
        U=found.U * signs,
        S=(found.S * factor).to(dtype),
        V=found.V * signs,
        residual=(found.residual * factor).to(dtype),
        error_bound=(bound * factor).to(dtype),
        status=status.to(batch.device),
        clusters=tuple(
            _clusters(values, radii)
            for values, radii in zip(found.S.tolist(), bound.tolist(), strict=True)
        ),
        stable_rank=(found.frobenius_squared / safe).to(dtype),
        stable_rank_error=(found.frobenius_error / safe).to(dtype),
        frobenius_squared=found.frobenius_squared * factor[:, 0] ** 2,
        n_iter=found.n_iter,
        n_restarts=found.n_restarts,
        n_reseeds=found.n_reseeds,
        n_locked=torch.zeros_like(found.n_iter) if found.n_locked is None else found.n_locked,
        contribution=found.contribution,
        passes=found.passes,
        tokens=tuple(batch.labels[i] for i in index.tolist()),
        method=plan.method,
        plan=replace(plan, k=k),
    )


def rounding_level(batch: OperatorBatch) -> float:
    """The residual, relative to σ₁, below which a dtype and a size give only rounding error."""
    if batch.precision == "tf32":
        return TF32_TOL
    _, m, d = batch.shape
    return max(64.0, 4 * math.sqrt(max(m, d))) * torch.finfo(batch.dtype).eps


def unseen_level(batch: OperatorBatch, plan: Plan) -> float:
    """The size, relative to σ₁, up to which an iterative method may have missed a value."""
    _, m, d = batch.shape
    # A random vector shows a value σ as σ/√d, which must stand out from a breakdown's threshold.
    return max(plan.tol, BREAKDOWN * math.sqrt(min(m, d)) * torch.finfo(batch.dtype).eps)


def error_bounds(S: Tensor, residual: Tensor, following: Tensor) -> Tensor:
    """Bounds on the errors of singular values from residuals and gaps, but for rounding.

    Args:
        S: (g, k) float64, descending.
        residual: (g, k) float64.
        following: (g,) float64, the largest value that σ_{k+1} may have.

    Returns:
        (g, k) float64: min(r, r²/gap).
    """
    infinite = torch.full_like(S[:, :1], torch.inf)
    above = torch.cat([infinite, (S - residual)[:, :-1]], 1) - S
    below = S - torch.cat([(S + residual)[:, 1:], following[:, None].to(S)], 1)
    # 0 belongs to the spectrum of [0 A; Aᵀ 0] where m ≠ d, and −σ lies beyond it.
    gap = torch.minimum(torch.minimum(above, below) - residual, S)
    sharp = torch.where(gap > residual, residual**2 / gap, residual)
    return torch.minimum(residual, sharp)


def _departure(rows: Tensor) -> Tensor:
    """‖X Xᵀ − I‖_max for (g, k, d) rows, (g,)."""
    eye = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    return (rows @ rows.mT - eye).abs().amax((1, 2))


def _signs(V: Tensor, inputs: Tensor | None) -> Tensor:
    """±1 for every triplet, (g, k, 1)."""
    largest = V.gather(2, V.abs().argmax(2, keepdim=True))
    overlap = largest
    if inputs is not None:
        x = inputs / inputs.abs().amax(1, keepdim=True).clamp_min(torch.finfo(V.dtype).tiny)
        x = x / x.norm(dim=1, keepdim=True).clamp_min(1.0)
        product = V @ x[:, :, None].to(V)
        noise = 4 * math.sqrt(V.shape[2]) * torch.finfo(V.dtype).eps
        overlap = torch.where(product.abs() <= noise, largest, product)
    return torch.where(overlap < 0, -1.0, 1.0).to(V)


def _clusters(values: list[float], radii: list[float]) -> tuple[tuple[int, ...], ...]:
    """Runs of neighbouring values whose error intervals touch."""
    runs: list[list[int]] = [[0]]
    for i in range(1, len(values)):
        if values[i - 1] - values[i] <= radii[i - 1] + radii[i]:
            runs[-1].append(i)
        else:
            runs.append([i])
    return tuple(tuple(run) for run in runs if len(run) > 1)
