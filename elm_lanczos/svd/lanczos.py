"""Block Golub–Kahan–Lanczos bidiagonalisation of many operators in lockstep, thickly restarted.

Golub & Kahan (1965) build orthonormal V and U with

    A V = U B,      Aᵀ U = V Bᵀ + (what leads to the next vectors),

so that the SVD of the small B gives Ritz triplets; Golub, Luk & Overton (1981) do so with blocks of
b vectors, of which b = 1 is the usual case. A thick restart keeps the leading Ritz vectors and the
next block and goes on from there (Baglama & Reichel, 2005; Hernández, Román & Tomás, 2008). Both
sides are reorthogonalised in full, in two passes, and the entries of B are the *measured*
projections UᵀAV: restarts and random vectors at breakdowns then need no case of their own. V lives
on the shorter side of the operator; once it spans that side, B holds the whole operator.

The products A v and Aᵀ u themselves are kept beside V and U, and go through the same rotations.
Residuals of both sides are therefore those of products made with the operator, not the recurrence's
estimates, and take no further passes. Where the residual of a wanted triplet lies mostly outside
the next block, the recurrence has lost it, and the next block is made of residuals instead. At a
restart a wanted triplet whose residual is far below the tolerance is locked: its couplings to
what follows are set to zero, so that later rotations leave it as it is.

A Krylov sequence sees as many copies of a repeated singular value as its blocks have vectors. A
converged set is therefore checked: the next block is replaced by a random one, orthogonal to the
whole basis, and where a larger value shows up the iteration goes on. Two parts of A are left beside
the k triplets. One is what the other left vectors see, ‖AᵀU‖: it is known, and a check neither
begins nor ends while it exceeds the k-th value. The other lies outside both bases; a singular
vector z of it is orthogonal to all of V. Its component in the j-th block of the random
sequence is Y_j c, where c is that in the random block, and the matrices Y_j follow for any singular
value σ from the entries of B. Since Σ |Y_j c|² ≤ 1, |c|² is at most 1/λ, λ the smallest eigenvalue
of Σ Y_jᵀ Y_j; in N dimensions a random block comes that close to being orthogonal to z with
probability at most

    (N / 2λ)^(b/2) / Γ(b/2 + 1)

(van Dorsselaer, Hochstenbach & van der Vorst, 2001, and Hochstenbach, 2013, for b = 1). The check
ends when this is at most 10⁻³ for a value that would have its place among the k found, and
otherwise after `Plan.verify` steps, when what remains is Kuczyński & Woźniakowski's bound (1992): s
steps miss, with probability at most 1.648 √N exp(−(2s − 1)√ε), a value whose square exceeds the
largest one shown by a fraction ε. Misses are excluded with high probability, not with certainty.

‖A‖_F², for the stable rank, is Hutchinson's estimate (1990): what random ω see of the part of A
outside the found triplets; the found part is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from elm_lanczos.operators import OperatorBatch
from elm_lanczos.svd.orthogonal import (
    BREAKDOWN,
    next_block,
    normal_rows,
    normalise,
    polishing,
    power_of_two_scale,
    small_svd,
)
from elm_lanczos.svd.plan import Plan
from elm_lanczos.svd.result import (
    Solution,
    SVDResult,
    assemble,
    error_bounds,
    rounding_level,
    unseen_level,
)

_PROBE, _START, _SPARE_SHORT, _SPARE_LONG, _CHECK = range(5)
# Of the tolerance: the residuals at which the iteration stops, and those at which it locks.
_MARGIN, _LOCK = 0.9, 0.1
# No residual is asked to be smaller than this part of what counts as rounding.
_SMALLEST_TARGET = 0.5
# Units of rounding, relative to σ₁, that a check puts down to rounding.
_CHECK_ROUNDING = 16.0
# The probability of a missed value at which a check ends early.
_MISS = 1e-3
# Relative rounding of the components in a check's blocks, grown through as many small solves.
_GROWTH_ROUNDING = 1e-9
# Digits by which a step brings residuals, or that probability, down at most, or nearly so: decides
# when the next test is worth its wait for the device.
_DIGITS_A_STEP = 1.0


@dataclass
class _Bidiagonalization:
    """Bases and products of a operators, j vectors each; the next block is V[:, j:].

    Attributes:
        member: Which operators of the group these are (a,), on the CPU.
        place: The same on the device.
        V: Right basis, rows (a, capacity + b, short side).
        U: Left basis, rows (a, capacity, long side).
        AV: A v for the rows of V (a, capacity, long side).
        AtU: Aᵀ u for the rows of U (a, capacity, short side).
        B: Projections UᵀAV (a, capacity, capacity).
        beta: Aᵀ u of the last block in terms of the next one (a, b, b).
        free: 0 for the vectors of locked triplets, else 1 (a, capacity).
        norm: Largest ‖Av‖ or ‖Aᵀu‖ met: a lower bound of ‖A‖ (a,).
        steps: Vectors added so far, restarts included (a,).
        restarts: Restarts (a,).
        reseeds: Random vectors taken at breakdowns (a,).
        check: The state of the check for missed values.
        j: Vectors in the current basis.
        wait: Steps before the next test.
    """

    member: Tensor
    place: Tensor
    V: Tensor
    U: Tensor
    AV: Tensor
    AtU: Tensor
    B: Tensor
    beta: Tensor
    free: Tensor
    norm: Tensor
    steps: Tensor
    restarts: Tensor
    reseeds: Tensor
    check: _Check
    j: int
    wait: int

    def select(self, rows: Tensor) -> _Bidiagonalization:
        """The operators where rows, a (a,) bool mask on the CPU, is true."""
        where = rows.nonzero()[:, 0]
        parts: dict[str, Any] = {
            name: x[where.to(x.device)] for name, x in vars(self).items() if isinstance(x, Tensor)
        }
        return replace(self, **parts, check=self.check.select(rows))


@dataclass
class _Check:
    """The check for missed values of a operators, on the CPU.

    Attributes:
        number: Checks begun (a,).
        active: Whether one is under way (a,).
        passed: Whether the last one showed nothing (a,).
        made: Vectors added since it began (a,).
        begin: Where in the basis its random block lies, −1 once a restart has rotated it (a,).
        limit: Values up to which the k found ones may grow without anything having been missed
            (a, k), float64.
    """

    number: Tensor
    active: Tensor
    passed: Tensor
    made: Tensor
    begin: Tensor
    limit: Tensor

    def select(self, rows: Tensor) -> _Check:
        """The operators where rows, a (a,) bool mask, is true."""
        return _Check(**{name: x[rows] for name, x in vars(self).items()})


@dataclass(frozen=True)
class _Ritz:
    """Ritz values and vectors in the coordinates of the bases, float64 on the CPU.

    Attributes:
        left: (a, j, j), a column for each value.
        values: (a, j).
        right: (a, j, j), a row for each value.
        residual: max(‖Av − σu‖, ‖Aᵀu − σv‖) of the leading k + 1, or all, (a, ≤ j).
        finite: (a,) bool.
        rest: Aᵀu − σv of the leading k, rows (a, k, short side), on the device.
        lost: Whether most of the largest residual lies outside the next block (a,) bool.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    residual: Tensor
    finite: Tensor
    rest: Tensor
    lost: Tensor

    def select(self, rows: Tensor) -> _Ritz:
        """The operators where rows, a (a,) bool mask on the CPU, is true."""
        return _Ritz(**{name: x[rows.to(x.device)] for name, x in vars(self).items()})


class _Group:
    """The scaled operators of one group, turned so that V lives on their shorter side."""

    def __init__(
        self, batch: OperatorBatch, plan: Plan, index: Tensor, count: Callable[[int], None]
    ) -> None:
        _, m, d = batch.shape
        self.batch, self.plan, self.index, self.count = batch, plan, index, count
        self.turned = m < d
        self.short, self.long = min(m, d), max(m, d)
        self.block = min(plan.block, self.short)
        # A basis that leaves less than a block of its side out may as well take all of it.
        self.basis = max(plan.basis, min(plan.k + self.block, self.short))
        if self.basis + self.block > self.short:
            self.basis = self.short
        labels = [batch.labels[i] for i in index.tolist()]
        like = torch.empty(0, dtype=batch.dtype, device=batch.device)
        self.probes = normal_rows(plan.seed, [0], _PROBE, (plan.probes, m), like)[0]
        count(plan.probes)
        seen = batch.rows(self.probes).index_select(1, index.to(batch.device)).transpose(0, 1)
        self.scale = power_of_two_scale(seen)
        self.seen = seen / self.scale[:, None, None]
        self.spare_short, self.check = (
            normal_rows(plan.seed, labels, purpose, (self.short,), like)
            for purpose in (_SPARE_SHORT, _CHECK)
        )
        self.spare_long = normal_rows(plan.seed, labels, _SPARE_LONG, (self.long,), like)
        # What the probes saw of an operator is where its sequence starts: half a step for nothing.
        self.random = normal_rows(plan.seed, labels, _START, (self.block, self.short), like)
        self.start = torch.cat([self.random[:, :0] if self.turned else self.seen, self.random], 1)

    def forward(self, X: Tensor, member: Tensor, place: Tensor) -> Tensor:
        """A X[j] from the short to the long side, by operator member[j]: (a, b, ·)."""
        return self._apply(X, member, place, self.turned)

    def adjoint(self, Y: Tensor, member: Tensor, place: Tensor) -> Tensor:
        """Aᵀ Y[j] from the long to the short side, by operator member[j]: (a, b, ·)."""
        return self._apply(Y, member, place, not self.turned)

    def _apply(self, X: Tensor, member: Tensor, place: Tensor, transpose: bool) -> Tensor:
        a, b, _ = X.shape
        self.count(a * b)
        product = self.batch.rmatvec if transpose else self.batch.matvec
        images = product(X.flatten(0, 1), self.index[member].repeat_interleave(b))
        return images.view(a, b, -1) / self.scale[place, None, None]


def lanczos(
    batch: OperatorBatch, plan: Plan, index: Tensor, count: Callable[[int], None]
) -> SVDResult:
    """The k leading triplets of one group of operators.

    Args:
        batch: The operators.
        plan: The plan; its basis, block, restarts, check_every, verify, probes, k, tol and seed
            are used.
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
    fact = _begin(group)
    while len(fact.member):
        fact = _advance(group, fact, found)
    return assemble(batch, plan, index, group.scale, found.solution(lambda: made))


def _begin(group: _Group) -> _Bidiagonalization:
    """The operators of the group with their start vectors and no step made."""
    g, b, capacity, like = len(group.index), group.block, group.basis, group.start
    member = torch.arange(g)
    V = like.new_zeros(g, capacity + b, group.short)
    start = group.start[:, :b]
    threshold = BREAKDOWN * torch.finfo(like.dtype).eps * start.norm(dim=2).amax(1)
    V[:, :b] = next_block(V[:, :0], start, group.random, threshold)[0]
    none = torch.zeros(g, dtype=torch.int64, device=like.device)
    return _Bidiagonalization(
        member=member,
        place=member.to(like.device),
        V=V,
        U=like.new_zeros(g, capacity, group.long),
        AV=like.new_zeros(g, capacity, group.long),
        AtU=like.new_zeros(g, capacity, group.short),
        B=like.new_zeros(g, capacity, capacity),
        beta=like.new_zeros(g, b, b),
        free=like.new_ones(g, capacity),
        norm=like.new_zeros(g),
        steps=none,
        restarts=none.clone(),
        reseeds=none.clone(),
        check=_Check(
            number=torch.zeros(g, dtype=torch.int64),
            active=torch.zeros(g, dtype=torch.bool),
            passed=torch.zeros(g, dtype=torch.bool),
            made=torch.zeros(g, dtype=torch.int64),
            begin=torch.full((g,), -1),
            limit=torch.zeros(g, group.plan.k, dtype=torch.float64),
        ),
        j=0,
        wait=group.plan.check_every,
    )


def _expand(group: _Group, fact: _Bidiagonalization, stop: int) -> None:
    """Golub–Kahan steps up to a basis of at least stop vectors, in place; the host never waits."""
    eps = torch.finfo(fact.V.dtype).eps
    spare_short, spare_long = group.spare_short[fact.place], group.spare_long[fact.place]
    while fact.j < stop:
        j, b = fact.j, min(group.block, group.short - fact.j)
        end = j + b
        W = group.forward(fact.V[:, j:end], fact.member, fact.place)
        fact.norm = torch.maximum(fact.norm, W.norm(dim=2).amax(1))
        spare = _shifted(spare_long, fact.steps, b)
        block, lower, above, replaced = next_block(
            fact.U[:, :j], W, spare, BREAKDOWN * eps * fact.norm
        )
        fact.AV[:, j:end], fact.U[:, j:end] = W, block
        fact.B[:, :j, j:end] = (above * fact.free[:, None, :j]).mT
        fact.B[:, j:end, j:end] = lower.mT
        fact.reseeds += replaced.sum(1)

        W = group.adjoint(block, fact.member, fact.place)
        fact.norm = torch.maximum(fact.norm, W.norm(dim=2).amax(1))
        fact.AtU[:, j:end] = W
        following = min(b, group.short - end)
        if following:
            spare = _shifted(spare_short, fact.steps, following)
            block, lower, _, replaced = next_block(
                fact.V[:, :end], W[:, :following], spare, BREAKDOWN * eps * fact.norm
            )
            fact.V[:, end : end + following] = block
            fact.beta[:, :following, :following] = lower
            fact.reseeds += replaced.sum(1)
        fact.steps += b
        fact.j = end


def _shifted(vectors: Tensor, shift: Tensor, count: int) -> Tensor:
    """Cyclic shifts by shift, shift + 1, … of random vectors (a, d): (a, count, d)."""
    d, device = vectors.shape[1], shift.device
    by = shift[:, None, None] + torch.arange(count, device=device)[:, None]
    return (
        vectors[:, None].expand(-1, count, -1).gather(2, (torch.arange(d, device=device) + by) % d)
    )


def _ritz(group: _Group, fact: _Bidiagonalization) -> _Ritz:
    """SVD of B on the CPU, and residuals from the products kept: here the host waits."""
    j, k = fact.j, group.plan.k
    B = fact.B[:, :j, :j].cpu()
    finite = B.isfinite().flatten(1).all(1) & fact.norm.isfinite().cpu()
    left, values, right = small_svd(torch.where(finite[:, None, None], B, 0.0))
    count = min(k + 1, j)
    V, U, AV, AtU = _rotated(fact, left, right, count)
    sigma = values[:, :count, None].to(V)
    rest = AtU - sigma * V
    size = rest.double().norm(dim=2)
    residual = torch.maximum((AV - sigma * U).double().norm(dim=2), size)
    rest, size = rest[:, :k], size[:, :k]
    worst = rest.take_along_dim(size.argmax(1)[:, None, None], 1)
    inside = (fact.V[:, j : j + group.block] @ worst.mT).double().norm(dim=(1, 2))
    target = _target(group) * values[:, 0].to(size)
    lost = size.amax(1).square() - inside.square() > torch.maximum(inside, target).square()
    return _Ritz(left, values, right, residual.cpu(), finite, rest, lost.cpu())


def _rotated(
    fact: _Bidiagonalization, left: Tensor, right: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The leading Ritz vectors V and U and the products A V and Aᵀ U, rows (a, count, ·)."""
    j = fact.j
    P, Q = right[:, :count].to(fact.V), left[:, :, :count].mT.to(fact.V)
    return P @ fact.V[:, :j], Q @ fact.U[:, :j], P @ fact.AV[:, :j], Q @ fact.AtU[:, :j]


def _restart(group: _Group, fact: _Bidiagonalization, ritz: _Ritz) -> None:
    """Thick restart: the leading Ritz vectors take the place of the basis, what is next follows."""
    k, j, b = group.plan.k, fact.j, group.block
    kept = min(k + max(1, (group.basis - k) // 3), group.basis - b)
    following = fact.V[:, j : j + b].clone()
    V, U, AV, AtU = _rotated(fact, ritz.left, ritz.right, kept)
    fact.V[:, :kept], fact.V[:, kept : kept + b] = V, following
    fact.U[:, :kept], fact.AV[:, :kept], fact.AtU[:, :kept] = U, AV, AtU
    fact.B.zero_()
    fact.B[:, :kept, :kept] = torch.diag_embed(ritz.values[:, :kept].to(fact.B))
    locked = ritz.residual[:, :k] <= _LOCK * _target(group) * ritz.values[:, :1]
    fact.free.fill_(1.0)
    fact.free[:, :k] = (~locked).to(fact.free)
    fact.restarts += 1
    fact.check.begin[:] = -1
    fact.j = kept


def _target(group: _Group) -> float:
    """Residuals, relative to σ₁, at which a triplet counts as converged."""
    return max(_MARGIN * group.plan.tol, _SMALLEST_TARGET * rounding_level(group.batch))


def _advance(group: _Group, fact: _Bidiagonalization, found: _Found) -> _Bidiagonalization:
    """Some steps and one test of all operators; those that have finished leave the lockstep."""
    plan, k, b = group.plan, group.plan.k, group.block
    full = group.basis - (0 if group.basis == group.short else b) + 1
    begun = fact.j
    stop = min(max(fact.j + b * fact.wait, k), group.basis)
    _expand(group, fact, min(stop, full))
    ritz = _ritz(group, fact)
    check, values = fact.check, ritz.values[:, :k]

    small = (ritz.residual[:, :k] <= _target(group) * values[:, :1]).all(1) & ritz.finite
    check.made += torch.where(check.active, fact.j - begun, 0)
    exceeded = (check.active | check.passed) & (values > check.limit).any(1)
    missed = _missed(group, fact, ritz)
    ended = check.active & ritz.finite & ((check.made >= plan.verify * b) | (missed <= _MISS))
    exceeded |= ended & (_outside(group, fact, ritz, ended) > check.limit[:, -1])
    check.passed = (check.passed | ended) & ~exceeded
    check.active &= ~(ended | exceeded)

    begins = small & ~check.active & ~check.passed
    if begins.any():
        limit = _limit(group, fact, ritz)
        # What the left vectors have in sight need not be searched for: the next steps find it.
        begins &= _outside(group, fact, ritz, begins) <= limit[:, -1]
        check.limit[begins] = limit[begins]
    largest = ritz.residual[:, :k].amax(1) / (_target(group) * values[:, 0])
    ahead = torch.where(check.active, missed / _MISS, torch.where(begins, 1 / _MISS, largest))

    whole = fact.j == group.short
    filled = fact.j >= full
    settled = ritz.finite & (check.passed & small | whole)
    # Each failed check brings a larger value into the set of k: more than k cannot be needed.
    spent = begins & (check.number > k + 1)
    exhausted = (fact.restarts.cpu() >= plan.max_restarts) & filled
    given_up = exhausted & ~begins & ~check.active
    leaves = settled | given_up | spent | ~ritz.finite
    if leaves.any():
        found.keep(fact.select(leaves), ritz.select(leaves), settled[leaves])
        stay = ~leaves
        fact, ritz = fact.select(stay), ritz.select(stay)
        small, begins, ahead = small[stay], begins[stay], ahead[stay]
    if filled and len(fact.member):
        _restart(group, fact, ritz)
    if begins.any():
        _begin_check(group, fact, begins)
    astray = ritz.lost & ~small & ~fact.check.active
    if astray.any():
        worst = ritz.rest.norm(dim=2).topk(min(b, k), dim=1).indices
        _lead(group, fact, ritz.rest.take_along_dim(worst[..., None], 1), astray)
    if len(ahead):
        steps = ahead.nan_to_num(1.0).clamp(1.0, 1e300).log10().min() / _DIGITS_A_STEP
        fact.wait = min(max(1, int(steps)), plan.check_every)
    return fact


def _limit(group: _Group, fact: _Bidiagonalization, ritz: _Ritz) -> Tensor:
    """Values that the k leading ones cannot exceed unless one has been missed (a, k), float64."""
    k, values, residual = group.plan.k, ritz.values, ritz.residual
    following = values[:, k] + residual[:, k] if fact.j > k else torch.zeros_like(values[:, 0])
    rounding = _CHECK_ROUNDING * torch.finfo(fact.V.dtype).eps * values[:, :1]
    error = error_bounds(values[:, :k], residual[:, :k], following)
    return values[:, :k] + 2 * (error + rounding)


def _begin_check(group: _Group, fact: _Bidiagonalization, begins: Tensor) -> None:
    """Let the operators where begins, (a,) bool, go on from random vectors."""
    check, b = fact.check, group.block
    shift = b * check.number.to(fact.place.device)
    _lead(group, fact, _shifted(group.check[fact.place], shift, b), begins)
    check.number += begins.long()
    check.active |= begins
    check.made[begins] = 0
    check.begin[begins] = fact.j


def _outside(group: _Group, fact: _Bidiagonalization, ritz: _Ritz, where: Tensor) -> Tensor:
    """‖Aᵀ U‖ of the left Ritz vectors beyond the k leading.

    Unless a value is missing among the k, this is at most the smallest of them.

    Args:
        group: The group.
        fact: The bases and products.
        ritz: Its Ritz vectors.
        where: For which operators (a,) bool.

    Returns:
        (a,) float64; 0 for the others.
    """
    k, size = group.plan.k, torch.zeros(len(where), dtype=torch.float64)
    if where.any() and len(ritz.values[0]) > k:
        rows = where.to(fact.AtU.device)
        images = ritz.left[where, :, k:].mT.to(fact.AtU) @ fact.AtU[rows, : ritz.left.shape[1]]
        gram = images.double() @ images.double().mT
        size[where] = torch.linalg.eigvalsh(gram)[:, -1].clamp_min(0).sqrt().cpu()
    return size


def _lead(group: _Group, fact: _Bidiagonalization, W: Tensor, where: Tensor) -> None:
    """Make the next block of the operators where (a,) is true of W (a, ≤ b, short side)."""
    j, b = fact.j, min(group.block, group.short - fact.j)
    # Reversed: not the vectors that the next step may need.
    spare = _shifted(group.spare_short[fact.place].flip(1), fact.steps, b)
    W = torch.cat([normalise(W), spare], 1)[:, :b]
    threshold = torch.full_like(fact.norm, BREAKDOWN * torch.finfo(W.dtype).eps)
    block = next_block(fact.V[:, :j], W, spare, threshold)[0]
    chosen = where.to(block.device)[:, None, None]
    fact.V[:, j : j + b] = torch.where(chosen, block, fact.V[:, j : j + b])


def _missed(group: _Group, fact: _Bidiagonalization, ritz: _Ritz) -> Tensor:
    """Bounds on the probability that a check under way has missed a value so far (a,), float64."""
    b, eps, check = group.block, torch.finfo(fact.V.dtype).eps, fact.check
    bound = torch.ones(len(fact.member), dtype=torch.float64)
    known = check.active & (check.begin >= 0) & ritz.finite
    if not known.any() or fact.j == group.short:
        return bound
    B, beta = fact.B.double().cpu(), fact.beta.double().cpu()
    unseen = unseen_level(group.batch, group.plan) * ritz.values[:, 0]
    sigma = torch.maximum(check.limit[:, -1], unseen)[:, None, None]
    least = (BREAKDOWN * eps * fact.norm.double().cpu()).clamp_min(1e-300)[:, None]
    for begin in check.begin[known].unique().tolist():
        rows = known & (check.begin == begin)
        bound[rows] = _miss_probability(
            B[rows, begin : fact.j, begin : fact.j],
            beta[rows],
            sigma[rows],
            least[rows],
            group.short,
            b,
        )
    return bound


def _miss_probability(
    B: Tensor, beta: Tensor, sigma: Tensor, least: Tensor, N: int, b: int
) -> Tensor:
    """The bound of the module's docstring for s blocks of a random sequence.

    With W_j for the left vectors what Y_j is for the right ones, D_j the diagonal blocks of B and
    F_j those above them, A z = σ w and Aᵀ w = σ z say: σ Y_j = F_{j−1}ᵀ W_{j−1} + D_jᵀ W_j and
    σ W_j = D_j Y_j + F_j Y_{j+1}.

    Args:
        B: Projections (a, s·b, s·b) of the sequence, float64.
        beta: F_s (a, b, b).
        sigma: The value that might be missed (a, 1, 1).
        least: Size below which the diagonals of D and F are rounding (a, 1).
        N: Dimension of the space.
        b: Vectors in a block.

    Returns:
        (a,), at most 1.
    """
    Y = torch.eye(b, dtype=B.dtype).expand(len(B), b, b)
    F, W = torch.zeros_like(Y), torch.zeros_like(Y)
    right, left = [Y], [W]
    for begin in range(0, B.shape[1], b):
        block = slice(begin, begin + b)
        D = _at_least(B[:, block, block], least)
        W = torch.linalg.solve(D.mT, sigma * Y - F.mT @ W)
        last = begin + b == B.shape[1]
        F = _at_least(beta if last else B[:, block, begin + b : begin + 2 * b], least)
        Y = torch.linalg.solve(F, sigma * W - D @ Y)
        right.append(Y)
        left.append(W)
    # The bases are orthonormal: neither column of components, for the true c, is longer than 1.
    growth = torch.maximum(_least_growth(right), _least_growth(left))
    return ((N / (2 * growth**2)) ** (b / 2) / math.gamma(b / 2 + 1)).clamp_max(1.0)


def _least_growth(blocks: list[Tensor]) -> Tensor:
    """The smallest singular value of stacked blocks (a, b, b), or 1 where rounding hides it."""
    stacked = torch.cat(blocks, 1)
    known = stacked.isfinite().flatten(1).all(1)
    size = torch.linalg.svdvals(torch.where(known[:, None, None], stacked, 0.0))
    return (size[:, -1] - _GROWTH_ROUNDING * size[:, 0]).clamp_min(1.0)


def _at_least(triangular: Tensor, least: Tensor) -> Tensor:
    """Triangular matrices (a, b, b) with diagonals raised to least (a, 1)."""
    diagonal = triangular.diagonal(dim1=1, dim2=2)
    return triangular + torch.diag_embed((least - diagonal).clamp_min(0))


class _Found:
    """The triplets of a group's operators as they leave the lockstep."""

    def __init__(self, group: _Group) -> None:
        g, k, like = len(group.index), group.plan.k, group.start
        self.group = group
        self.V, self.AtU = like.new_zeros(2, g, k, group.short)
        self.U, self.AV = like.new_zeros(2, g, k, group.long)
        self.following = torch.zeros(g, dtype=torch.float64)
        self.settled = torch.zeros(g, dtype=torch.bool)
        self.steps, self.restarts, self.reseeds, self.locked = torch.zeros(4, g, dtype=torch.int64)

    def keep(self, fact: _Bidiagonalization, ritz: _Ritz, settled: Tensor) -> None:
        """Store the leading Ritz triplets of operators that leave."""
        k, member, place = self.group.plan.k, fact.member, fact.place
        kept = _rotated(fact, ritz.left, ritz.right, k)
        lost = ~ritz.finite.to(place.device)[:, None, None]
        for mine, new in zip((self.V, self.U, self.AV, self.AtU), kept, strict=True):
            mine[place] = torch.where(lost, torch.nan, new)
        if fact.j > k:
            self.following[member] = ritz.values[:, k] + ritz.residual[:, k]
        elif k < self.group.short:
            self.following[member] = torch.inf
        self.settled[member] = settled
        self.locked[member] = (fact.free[:, :k] == 0).sum(1).cpu()
        self.steps[member] = fact.steps.cpu()
        self.restarts[member] = fact.restarts.cpu()
        self.reseeds[member] = fact.reseeds.cpu()

    def solution(self, made: Callable[[], int]) -> Solution:
        """Values and residuals of both sides from the products kept, and ‖A‖_F².

        Args:
            made: Says how many passes have been made.

        Returns:
            The triplets with their evidence.
        """
        group = self.group
        P, Q = polishing(self.V), polishing(self.U)
        V, AV, U, AtU = P @ self.V, P @ self.AV, Q @ self.U, Q @ self.AtU
        S, order = (U.double() * AV).sum(2).clamp_min(0).sort(1, descending=True)
        U, V, AV, AtU = (X.take_along_dim(order[..., None], 1) for X in (U, V, AV, AtU))
        sigma = S[..., None].to(V)
        residual = torch.maximum(
            (AV - sigma * U).double().norm(dim=2), (AtU - sigma * V).double().norm(dim=2)
        )
        batch, contribution = group.batch, None
        if batch.inputs is not None:
            group.count(len(group.index))
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
            settled=self.settled,
            frobenius_squared=image.double().square().sum((1, 2)) + sample.mean(1),
            frobenius_error=sample.std(1) / sample.shape[1] ** 0.5,
            n_iter=self.steps,
            n_restarts=self.restarts,
            n_reseeds=self.reseeds,
            n_locked=self.locked,
            contribution=contribution,
            passes=made(),
        )
