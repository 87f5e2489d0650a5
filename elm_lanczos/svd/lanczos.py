"""Golub–Kahan–Lanczos bidiagonalisation of many operators in lockstep, thickly restarted.

Golub & Kahan (1965) build orthonormal V and U with

    A V = U B,      Aᵀ U = V Bᵀ + β v₊ eᵀ,

e the last unit vector, so that the SVD of the small B gives Ritz triplets whose only residual is
β|eᵀq|, q the left singular vector of B. A thick restart keeps the leading Ritz vectors and v₊
and goes on from there (Baglama & Reichel, 2005; Hernández, Román & Tomás, 2008). Both sides are
reorthogonalised in full, in two passes, and the entries of B are the *measured* projections UᵀAV:
restarts and random vectors at breakdowns then need no case of their own. V lives on the shorter
side of the operator; once it spans that side, B holds the whole operator.

A single Krylov sequence sees one copy of a repeated singular value. A converged set is therefore
checked: some more steps from a random vector orthogonal to its right vectors, and where a larger
value shows up the iteration goes on with it. s steps from a random vector in a space of dimension
N miss, with probability at most 1.648 √N exp(−(2s − 1)√ε), a value whose square exceeds the
k-th found one's by a fraction ε or more (Kuczyński & Woźniakowski, 1992): this excludes well
separated misses with high probability, not with certainty.

‖A‖_F², for the stable rank, is Hutchinson's estimate (1990): what random ω see of the part of A
outside the found triplets; the found part is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from elm_lanczos.operators import OperatorBatch
from elm_lanczos.svd.gram_schmidt import project_out
from elm_lanczos.svd.orthogonal import (
    BREAKDOWN,
    next_vector,
    normal_rows,
    normalise,
    polish,
    power_of_two_scale,
    small_svd,
)
from elm_lanczos.svd.plan import Plan
from elm_lanczos.svd.result import (
    Solution,
    SVDResult,
    assemble,
    error_bounds,
    unseen_level,
)

_PROBE, _START, _SPARE_SHORT, _SPARE_LONG, _CHECK = range(5)
# The iteration stops somewhat below the tolerance, so that residuals computed anew meet it; after
# a failed check, which costs the residual of the set it checked, further below.
_MARGIN, _MARGIN_AFTER_CHECK = 0.5, 0.25
# Units of rounding, relative to σ₁: the smallest target, and what a check puts down to rounding.
_SMALLEST_TARGET, _CHECK_ROUNDING = 4.0, 16.0


@dataclass
class _Bidiagonalization:
    """A V = U B, Aᵀ U = V Bᵀ + β v₊ eᵀ for a operators, j steps each; v₊ is V[:, j].

    Attributes:
        member: Which operators of the group these are (a,), on the CPU.
        V: Right basis, rows (a, capacity + 1, short side).
        U: Left basis, rows (a, capacity, long side).
        B: Projections (a, capacity, capacity).
        beta: Norm of the residual (a,).
        norm: Largest ‖Av‖ or ‖Aᵀu‖ met: a lower bound of ‖A‖ (a,).
        steps: Steps made so far, restarts included (a,).
        restarts: Restarts (a,).
        reseeds: Random vectors taken at breakdowns (a,).
        j: Steps in the current basis.
    """

    member: Tensor
    V: Tensor
    U: Tensor
    B: Tensor
    beta: Tensor
    norm: Tensor
    steps: Tensor
    restarts: Tensor
    reseeds: Tensor
    j: int

    def select(self, rows: Tensor) -> _Bidiagonalization:
        """The operators where rows, a (a,) bool mask on the CPU, is true."""
        if rows.all():
            return self
        where = rows.nonzero()[:, 0]
        parts = {k: x[where.to(x.device)] for k, x in vars(self).items() if isinstance(x, Tensor)}
        return _Bidiagonalization(**parts, j=self.j)


@dataclass(frozen=True)
class _Ritz:
    """Ritz values and vectors in the coordinates of the bases, float64.

    Attributes:
        left: (a, j, j), a column for each value.
        values: (a, j).
        right: (a, j, j), a row for each value.
        residual: Estimated residuals (a, j).
        finite: (a,) bool.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    residual: Tensor
    finite: Tensor


class _Group:
    """The scaled operators of one group, turned so that V lives on their shorter side."""

    def __init__(
        self, batch: OperatorBatch, plan: Plan, index: Tensor, count: Callable[[int], None]
    ) -> None:
        _, m, d = batch.shape
        self.batch, self.plan, self.index, self.count = batch, plan, index, count
        self.turned = m < d
        self.short, self.long = min(m, d), max(m, d)
        labels = [batch.labels[i] for i in index.tolist()]
        like = torch.empty(0, dtype=batch.dtype, device=batch.device)
        self.probes = normal_rows(plan.seed, [0], _PROBE, (plan.probes, m), like)[0]
        count(plan.probes)
        seen = batch.rows(self.probes).index_select(1, index.to(batch.device)).transpose(0, 1)
        self.scale = power_of_two_scale(seen)
        self.seen = seen / self.scale[:, None, None]
        start, spare_short, check = (
            normal_rows(plan.seed, labels, purpose, (self.short,), like)
            for purpose in (_START, _SPARE_SHORT, _CHECK)
        )
        self.start, self.check, self.spare_short = start, check, spare_short
        self.spare_long = normal_rows(plan.seed, labels, _SPARE_LONG, (self.long,), like)

    def forward(self, X: Tensor, member: Tensor) -> Tensor:
        """A X[j] from the short to the long side, by operator member[j] of the group."""
        return self._apply(X, member, self.turned)

    def adjoint(self, Y: Tensor, member: Tensor) -> Tensor:
        """Aᵀ Y[j] from the long to the short side, by operator member[j] of the group."""
        return self._apply(Y, member, not self.turned)

    def _apply(self, X: Tensor, member: Tensor, transpose: bool) -> Tensor:
        self.count(len(X))
        product = self.batch.rmatvec if transpose else self.batch.matvec
        return product(X, self.index[member]) / self.scale[member.to(X.device), None]


def lanczos(
    batch: OperatorBatch, plan: Plan, index: Tensor, count: Callable[[int], None]
) -> SVDResult:
    """The k leading triplets of one group of operators.

    Args:
        batch: The operators.
        plan: The plan; its basis, restarts, check_every, verify, probes, k, tol and seed are used.
        index: Positions of the group's operators in the batch (g,), on the CPU.
        count: Called with the number of JVPs and VJPs as they are made.

    Returns:
        The result of the group. Operators that did not converge within the plan's restarts carry
        what was reached and the status not_converged.
    """
    made = 0

    def count_here(passes: int) -> None:
        nonlocal made
        made += passes
        count(passes)

    group = _Group(batch, plan, index, count_here)
    found = _Found(group)
    pending = [_begin(group, torch.arange(len(index)))]
    while pending:
        for leaving, ritz in _iterate(group, pending.pop(), found):
            found.keep(leaving, ritz)
        pending = _verify(group, found)
    return assemble(batch, plan, index, group.scale, found.solution(made))


def _begin(group: _Group, member: Tensor) -> _Bidiagonalization:
    """Operators of the group with their random start vectors and no step made."""
    a, start = len(member), group.start[member.to(group.start.device)]
    capacity = max(group.plan.basis, min(group.plan.k + group.plan.verify, group.short))
    V = start.new_zeros(a, capacity + 1, group.short)
    V[:, 0] = normalise(start)
    none = torch.zeros(a, dtype=torch.int64, device=start.device)
    return _Bidiagonalization(
        member=member,
        V=V,
        U=start.new_zeros(a, capacity, group.long),
        B=start.new_zeros(a, capacity, capacity),
        beta=start.new_zeros(a),
        norm=start.new_zeros(a),
        steps=none,
        restarts=none.clone(),
        reseeds=none.clone(),
        j=0,
    )


def _expand(group: _Group, fact: _Bidiagonalization, stop: int) -> None:
    """Golub–Kahan steps up to a basis of stop vectors, in place."""
    eps = torch.finfo(fact.V.dtype).eps
    member = fact.member.to(fact.V.device)
    for j in range(fact.j, stop):
        w = group.forward(fact.V[:, j], fact.member)
        fact.norm = torch.maximum(fact.norm, w.norm(dim=1))
        threshold = BREAKDOWN * eps * fact.norm
        spare = _shifted(group.spare_long[member], fact.steps)
        u, alpha, above, replaced = next_vector(fact.U[:, :j], w, spare, threshold)
        fact.U[:, j], fact.B[:, :j, j], fact.B[:, j, j] = u, above, alpha
        fact.reseeds += replaced

        w = group.adjoint(u, fact.member)
        fact.norm = torch.maximum(fact.norm, w.norm(dim=1))
        threshold = BREAKDOWN * eps * fact.norm
        if j + 1 < group.short:
            spare = _shifted(group.spare_short[member], fact.steps)
            v, beta, _, replaced = next_vector(fact.V[:, : j + 1], w, spare, threshold)
            fact.V[:, j + 1], fact.beta = v, beta
            fact.reseeds += replaced
        else:
            fact.beta = torch.zeros_like(fact.beta)
        fact.steps += 1
    fact.j = max(fact.j, stop)


def _shifted(vectors: Tensor, shift: Tensor) -> Tensor:
    """Cyclic shifts (a,) of random vectors (a, d): a supply of linearly independent ones."""
    d = vectors.shape[1]
    return vectors.gather(1, (torch.arange(d, device=shift.device) + shift[:, None]) % d)


def _ritz(fact: _Bidiagonalization) -> _Ritz:
    """SVD of B on the CPU: the one place where the host waits for the device."""
    B, beta = fact.B[:, : fact.j, : fact.j].cpu(), fact.beta.double().cpu()
    finite = B.isfinite().flatten(1).all(1) & beta.isfinite()
    left, values, right = small_svd(torch.where(finite[:, None, None], B, 0.0))
    return _Ritz(left, values, right, beta[:, None] * left[:, -1].abs(), finite)


def _restart(fact: _Bidiagonalization, ritz: _Ritz, kept: int) -> None:
    """Thick restart: the leading Ritz vectors take the place of the basis; v₊ follows them."""
    j = fact.j
    right = ritz.right[:, :kept].to(fact.V)
    left = ritz.left[:, :, :kept].mT.to(fact.U)
    fact.V[:, : kept + 1] = torch.cat([right @ fact.V[:, :j], fact.V[:, j : j + 1]], 1)
    fact.U[:, :kept] = left @ fact.U[:, :j]
    fact.B.zero_()
    fact.B[:, :kept, :kept] = torch.diag_embed(ritz.values[:, :kept].to(fact.B))
    fact.restarts += 1
    fact.j = kept


def _iterate(
    group: _Group, fact: _Bidiagonalization, found: _Found
) -> Iterator[tuple[_Bidiagonalization, _Ritz]]:
    """Golub–Kahan–Lanczos with restarts; yields operators as they converge or have to stop."""
    plan, k = group.plan, group.plan.k
    basis = max(plan.basis, fact.j)
    kept = min(k + max(1, (basis - k) // 3), basis - 1)
    while len(fact.member):
        stop = min(max(fact.j + plan.check_every, k), basis)
        _expand(group, fact, stop)
        ritz = _ritz(fact)
        target = found.target(fact.member) * ritz.values[:, 0]
        converged = (ritz.residual[:, :k] <= target[:, None]).all(1) & ritz.finite
        exhausted = (fact.restarts.cpu() >= plan.max_restarts) & (fact.j == basis)
        leaves = converged | exhausted | ~ritz.finite
        if leaves.any():
            found.converged[fact.member] = converged
            part = _Ritz(*(x[leaves] for x in vars(ritz).values()))
            yield fact.select(leaves), part
            fact = fact.select(~leaves)
            ritz = _Ritz(*(x[~leaves] for x in vars(ritz).values()))
        if fact.j == basis and len(fact.member):
            _restart(fact, ritz, kept)


class _Found:
    """The triplets of a group's operators as they leave the iteration."""

    def __init__(self, group: _Group) -> None:
        g, k, like = len(group.index), group.plan.k, group.start
        self.group = group
        self.V = like.new_zeros(g, k, group.short)
        self.U = like.new_zeros(g, k, group.long)
        self.values = torch.zeros(g, k, dtype=torch.float64)
        self.estimate = torch.zeros(g, k, dtype=torch.float64)
        self.following = torch.zeros(g, dtype=torch.float64)
        self.converged = torch.zeros(g, dtype=torch.bool)
        self.verified = torch.zeros(g, dtype=torch.bool)
        self.checks = torch.zeros(g, dtype=torch.int64)
        self.norm = like.new_zeros(g)
        self.steps, self.restarts, self.reseeds = torch.zeros(3, g, dtype=torch.int64)

    def target(self, member: Tensor) -> Tensor:
        """Residual estimates, relative to σ₁, at which the operators count as converged."""
        plan, eps = self.group.plan, torch.finfo(self.V.dtype).eps
        margin = torch.where(self.checks[member] == 0, _MARGIN, _MARGIN_AFTER_CHECK)
        return (margin * plan.tol).double().clamp_min(_SMALLEST_TARGET * eps)

    def keep(self, fact: _Bidiagonalization, ritz: _Ritz) -> None:
        """Store the leading Ritz triplets of operators that leave the iteration."""
        k, j, member = self.group.plan.k, fact.j, fact.member
        place = member.to(self.V.device)
        self.V[place] = ritz.right[:, :k].to(self.V) @ fact.V[:, :j]
        self.U[place] = ritz.left[:, :, :k].mT.to(self.U) @ fact.U[:, :j]
        lost = place[~ritz.finite.to(place.device)]
        self.V[lost] = self.U[lost] = torch.nan
        self.values[member] = ritz.values[:, :k].where(ritz.finite[:, None], torch.nan)
        self.estimate[member] = ritz.residual[:, :k]
        upper = ritz.values + ritz.residual
        unknown = torch.full_like(upper[:, 0], 0.0 if k == self.group.short else torch.inf)
        self.following[member] = upper[:, k] if j > k else unknown
        self.verified[member] = j == self.group.short
        self.norm[place] = fact.norm
        self.steps[member] = fact.steps.cpu()
        self.restarts[member] = fact.restarts.cpu()
        self.reseeds[member] = fact.reseeds.cpu()

    def solution(self, made: int) -> Solution:
        """Recompute values and residuals of both sides and estimate ‖A‖_F².

        Args:
            made: Passes made so far, those of this function not included.

        Returns:
            The triplets with their evidence.
        """
        group, (g, k, _) = self.group, self.V.shape
        member = torch.arange(g).repeat_interleave(k)
        V, U = polish(self.V), polish(self.U)
        AV = group.forward(V.flatten(0, 1), member).view(g, k, -1)
        AtU = group.adjoint(U.flatten(0, 1), member).view(g, k, -1)
        S, order = (U.double() * AV).sum(2).clamp_min(0).sort(1, descending=True)
        U, V, AV, AtU = (X.take_along_dim(order[..., None], 1) for X in (U, V, AV, AtU))
        sigma = S[..., None].to(V)
        residual = torch.maximum(
            (AV - sigma * U).double().norm(dim=2), (AtU - sigma * V).double().norm(dim=2)
        )
        batch, contribution = group.batch, None
        if batch.inputs is not None:
            group.count(g)
            contribution = batch.matvec(batch.inputs[group.index], group.index)
        left, right, image = (V, U, AV) if group.turned else (U, V, AtU)
        outside = group.seen - (group.probes @ left.mT) @ image
        sample = outside.double().square().sum(2)
        return Solution(
            U=left,
            S=S,
            V=right,
            residual=residual,
            following=self.following.to(S.device),
            unseen=unseen_level(group.batch, group.plan) * S[:, 0],
            settled=self.converged & self.verified,
            frobenius_squared=image.double().square().sum((1, 2)) + sample.mean(1),
            frobenius_error=sample.std(1) / sample.shape[1] ** 0.5,
            n_iter=self.steps,
            n_restarts=self.restarts,
            n_reseeds=self.reseeds,
            contribution=contribution,
            passes=made + 2 * g * k + (0 if contribution is None else g),
        )


def _verify(group: _Group, found: _Found) -> list[_Bidiagonalization]:
    """Look for missed values; returns the operators, if any, whose iteration has to go on."""
    plan, k = group.plan, group.plan.k
    member = (found.converged & ~found.verified).nonzero()[:, 0]
    if len(member) == 0:
        return []
    place = member.to(found.V.device)
    fact = _begin(group, member)
    fact.V[:, :k], fact.U[:, :k] = found.V[place], found.U[place]
    fact.B[:, :k, :k] = torch.diag_embed(found.values[member].to(fact.B))
    fact.norm = found.norm[place]
    fact.steps, fact.restarts, fact.reseeds = (
        x[member].to(place.device) for x in (found.steps, found.restarts, found.reseeds)
    )
    random = _shifted(group.check[place], found.checks[member].to(place.device))
    for _ in range(2):
        random = normalise(project_out(fact.V[:, :k], random[:, None])[0][:, 0])
    fact.V[:, k], fact.j = random, k
    _expand(group, fact, min(k + plan.verify, group.short))
    ritz = _ritz(fact)

    values, following = found.values[member], found.following[member]
    rounding = _CHECK_ROUNDING * torch.finfo(found.V.dtype).eps * values[:, :1]
    error = error_bounds(values, found.estimate[member], following) + rounding
    larger = (ritz.values[:, :k] > values + 2 * error).any(1)
    found.checks[member] += 1
    found.verified[member] = ~larger
    found.following[member] = following.maximum(ritz.values[:, k : k + 1].sum(1))
    found.steps[member] = fact.steps.cpu()
    found.reseeds[member] = fact.reseeds.cpu()
    # Each failed check brings a larger value into the set of k: more cannot be needed.
    goes_on = larger & (found.checks[member] <= k + 1)
    return [fact.select(goes_on)] if goes_on.any() else []
