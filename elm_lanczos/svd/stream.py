"""Block Krylov iteration by streams: every operator of a batch from the same VJPs.

One VJP with cotangent e_r yields row r of *every* operator. While the m rows flow by in blocks R,

    Y[R] = J[R, :] V,      W += J[R, :]ᵀ Y[R],

so one stream gives JV and JᵀJV for a block V of each operator, ‖J‖_F² and Jx for its input x beside
them, and Jᵀu for the left vectors found so far; no Jacobian is kept. The next block is what is new
in W, orthonormalised against all before: block Krylov iteration (Musco & Musco, 2015), started from
JᵀΩ with a normal Ω as in the randomised range finder (Halko, Martinsson & Tropp, 2011), with
Rayleigh–Ritz on JV over the whole basis. The columns of each block are ordered by size, so that the
rounding errors of W are relative to each column and small singular values keep their digits. When
the basis is full, the leading Ritz vectors take its place (thick restart: Y and W are linear in V);
when it spans all of R^d the answer is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elm_lanczos.operators import OperatorBatch
from elm_lanczos.svd.orthogonal import (
    BREAKDOWN,
    normal_rows,
    orthonormal_block,
    power_of_two_scale,
    small_svd,
)
from elm_lanczos.svd.plan import Plan
from elm_lanczos.svd.result import (
    Solution,
    SVDResult,
    assemble,
    rounding_level,
    unseen_level,
)

_START, _SPARE = range(8, 10)
# Iteration towards a tolerance that the arithmetic cannot give ends when the residuals, of which
# each stream gives two sets, have not halved this many times.
_PATIENCE = 4


def row_blocks(
    batch: OperatorBatch, plan: Plan, count: Callable[[int], None]
) -> Iterator[tuple[int, Tensor]]:
    """One stream: all m rows of every operator, in blocks.

    Args:
        batch: The operators.
        plan: The plan; its cotangent_block is used.
        count: Called with the number of VJPs as they are made.

    Yields:
        The first row's number, and the rows (b, n, d).
    """
    m = batch.shape[1]
    for start in range(0, m, plan.cotangent_block):
        size = min(plan.cotangent_block, m - start)
        Y = torch.zeros(size, m, dtype=batch.dtype, device=batch.device)
        Y.diagonal(start).fill_(1.0)
        count(size)
        yield start, batch.rows(Y)


def stream(
    batch: OperatorBatch, plan: Plan, groups: Sequence[Tensor], count: Callable[[int], None]
) -> Iterator[tuple[int, SVDResult]]:
    """The k leading triplets of every operator of some groups, served by the same streams.

    Args:
        batch: The operators.
        plan: The plan; its width, basis, max_streams, cotangent_block, k, tol and seed are used.
        groups: Positions of each group's operators in the batch, on the CPU.
        count: Called with the number of VJPs as they are made.

    Yields:
        Position in groups and that group's result, as soon as all its operators have converged.
    """
    Omega = normal_rows(plan.seed, [0], _START, (plan.width, batch.shape[1]), _like(batch))[0]
    samples: list[list[Tensor]] = [[] for _ in groups]
    for Y in torch.split(Omega, plan.cotangent_block):
        count(len(Y))
        rows = batch.rows(Y)
        for sample, index in zip(samples, groups, strict=True):
            sample.append(rows.index_select(1, index.to(rows.device)).transpose(0, 1))
    active = {
        position: _begin(batch, plan, index, torch.cat(samples[position], 1))
        for position, index in enumerate(groups)
    }
    del samples
    while active:
        for start, rows in row_blocks(batch, plan, count):
            for state in active.values():
                _absorb(state, start, rows)
        for position in list(active):
            if _advance(active[position], batch, plan):
                yield position, _finish(active.pop(position), batch, plan)


@dataclass(frozen=True)
class _Triplets:
    """Ritz triplets of g operators.

    Attributes:
        U: (g, k, m).
        S: (g, k) float64.
        V: (g, k, d).
        right_residual: ‖Jv − σu‖ (g, k) float64.
        left_residual: ‖Jᵀu − σv‖ (g, k) float64; infinite where W cannot tell.
        following: Largest value that σ_{k+1} may have (g,) float64.
        streams: Streams they took (g,).
        restarts: Thick restarts they took (g,).
    """

    U: Tensor
    S: Tensor
    V: Tensor
    right_residual: Tensor
    left_residual: Tensor
    following: Tensor
    streams: Tensor
    restarts: Tensor

    @property
    def residual(self) -> Tensor:
        """The larger of the two residuals (g, k)."""
        return torch.maximum(self.right_residual, self.left_residual)

    def where(self, mask: Tensor, other: _Triplets) -> _Triplets:
        """These triplets for the operators where mask (g,) is true, the other ones elsewhere."""
        parts = {
            name: torch.where(mask.reshape(-1, *[1] * (x.ndim - 1)), x, getattr(other, name))
            for name, x in vars(self).items()
        }
        return _Triplets(**parts)


@dataclass
class _Krylov:
    """The basis of one group's operators, divided by their scale; vectors are rows.

    Attributes:
        index: Positions of the operators in the batch (g,), on the CPU.
        scale: (g,).
        V: Orthonormal basis whose images are known (g, L, d).
        Y: Images J V (g, L, m).
        W: JᵀJ V (g, L, d).
        block: Vectors that go through the next stream (g, ℓ, d).
        image: Their images, being filled row by row (g, ℓ, m).
        left: Left vectors that go through the next stream beside the images (g, k, m).
        sums: JᵀJ of the block and, behind it, Jᵀ of left, being summed (g, ℓ + k, d).
        squared: ‖J‖_F² (g,) float64.
        inputs: x (g, d) in the working precision, or None.
        contribution: Jx (g, m), being filled row by row by the first stream.
        ritz: Triplets of the latest Rayleigh–Ritz.
        best: For each operator the triplets with the smallest residuals so far.
        done: Operators whose best triplets are final (g,) bool.
        patience: Sets of residuals in which a stagnating operator may still improve (g,).
        lost: Operators that gave a number that is not finite (g,) bool.
        streams: Streams made.
        restarts: Thick restarts made.
        reseeds: Random vectors that took the place of missing directions (g,).
    """

    index: Tensor
    scale: Tensor
    V: Tensor
    Y: Tensor
    W: Tensor
    block: Tensor
    image: Tensor
    left: Tensor
    sums: Tensor
    squared: Tensor
    inputs: Tensor | None
    contribution: Tensor
    ritz: _Triplets | None
    best: _Triplets | None
    done: Tensor
    patience: Tensor
    lost: Tensor
    streams: int
    restarts: int
    reseeds: Tensor


def _like(batch: OperatorBatch) -> Tensor:
    return torch.empty(0, dtype=batch.dtype, device=batch.device)


def _begin(batch: OperatorBatch, plan: Plan, index: Tensor, sample: Tensor) -> _Krylov:
    """The first block of a group: the leading directions of JᵀΩ, whose rows are (g, ℓ, d)."""
    _, m, d = batch.shape
    g = len(index)
    scale = power_of_two_scale(sample)
    lost = ~sample.isfinite().flatten(1).all(1)
    sample = torch.where(lost[:, None, None], 0.0, sample / scale[:, None, None])
    largest = sample.norm(dim=2).amax(1)
    none = sample.new_zeros(g, 0, d)
    state = _Krylov(
        index=index,
        scale=scale,
        V=none,
        Y=sample.new_zeros(g, 0, m),
        W=none,
        block=none,
        image=none,
        left=sample.new_zeros(g, 0, m),
        sums=none,
        squared=torch.zeros(g, dtype=torch.float64, device=scale.device),
        inputs=None if batch.inputs is None else batch.inputs[index].to(sample),
        contribution=sample.new_zeros(g, m),
        ritz=None,
        best=None,
        done=torch.zeros_like(lost),
        patience=torch.full((g,), _PATIENCE, device=scale.device),
        lost=lost,
        streams=0,
        restarts=0,
        reseeds=torch.zeros(g, dtype=torch.int64, device=scale.device),
    )
    _next_block(state, batch, plan, sample, largest)
    return state


def _next_block(
    state: _Krylov, batch: OperatorBatch, plan: Plan, directions: Tensor, largest: Tensor
) -> None:
    """Make the block of the next stream from directions (g, b, d) of at most the size largest."""
    _, m, d = batch.shape
    g, L, k = len(state.index), state.V.shape[1], state.left.shape[1]
    width = min(plan.width, d - L)
    labels = [batch.labels[i] for i in state.index.tolist()]
    spare = normal_rows(plan.seed, labels, _SPARE + state.streams, (width, d), directions)
    threshold = BREAKDOWN * torch.finfo(directions.dtype).eps * largest
    state.block, missing = orthonormal_block(state.V, directions, spare, threshold, width)
    state.image = directions.new_empty(g, width, m)
    state.sums = directions.new_zeros(g, width + k, d)
    state.reseeds += missing


def _absorb(state: _Krylov, start: int, rows: Tensor) -> None:
    """Let a block of rows (b, n, d) flow by: Y[R] = J[R] V, W += J[R]ᵀ Y[R]."""
    stop = start + len(rows)
    J = rows.index_select(1, state.index.to(rows.device)).transpose(0, 1).contiguous()
    J = torch.where(state.lost[:, None, None], 0.0, J / state.scale[:, None, None])
    image = state.block @ J.mT
    state.image[:, :, start:stop] = image
    state.sums += torch.cat([image, state.left[:, :, start:stop]], 1) @ J
    if state.streams == 0:
        state.squared += torch.linalg.vector_norm(J, dim=(1, 2), dtype=torch.float64) ** 2
        if state.inputs is not None:
            state.contribution[:, start:stop] = (J @ state.inputs[..., None])[..., 0]


def _advance(state: _Krylov, batch: OperatorBatch, plan: Plan) -> bool:
    """Rayleigh–Ritz at the end of a stream; true where the group has nothing left to do."""
    d, width = batch.shape[2], state.block.shape[1]
    state.lost |= ~(state.image.isfinite().flatten(1).all(1) & state.squared.isfinite())
    state.image, state.sums = (
        torch.where(state.lost[:, None, None], 0.0, X) for X in (state.image, state.sums)
    )
    state.streams += 1
    block_W, direct = state.sums[:, :width], state.sums[:, width:]
    if state.ritz is not None:
        # Jᵀu of the previous triplets has come by: their residual is known without W.
        error = direct - state.ritz.S[..., None].to(direct) * state.ritz.V
        _consider(state, batch, plan, replace(state.ritz, left_residual=error.double().norm(dim=2)))
    state.V = torch.cat([state.V, state.block], 1)
    state.Y = torch.cat([state.Y, state.image], 1)
    state.W = torch.cat([state.W, block_W], 1)
    L = state.V.shape[1]
    ritz, rotation = _rayleigh_ritz(state, plan)
    _consider(state, batch, plan, ritz)
    if state.streams == plan.max_streams or d == L or bool((state.done | state.lost).all()):
        return True

    size = state.image.norm(dim=2, keepdim=True)
    largest = ritz.S[:, :1].to(size)
    negligible = BREAKDOWN * torch.finfo(size.dtype).eps * largest[..., None]
    directions = torch.where(size <= negligible, 0.0, block_W / size)
    state.ritz, state.left = ritz, ritz.U
    _next_block(state, batch, plan, directions, largest[:, 0])
    if L + state.block.shape[1] > plan.basis:
        kept = max(plan.k, min(plan.basis // 2, plan.basis - plan.width))
        turn = rotation[:, :kept].to(state.V)
        state.V, state.Y, state.W = turn @ state.V, turn @ state.Y, turn @ state.W
        state.restarts += 1
    return False


def _rayleigh_ritz(state: _Krylov, plan: Plan) -> tuple[_Triplets, Tensor]:
    """Triplets of J restricted to the basis, and the rotation (g, L, L) to its Ritz vectors."""
    k, m, (_, L, d) = plan.k, state.Y.shape[2], state.V.shape
    known = min(k + 1, L, m)
    Q, R = torch.linalg.qr(state.Y.mT)
    left, values, rotation = small_svd(R)
    U = (Q @ left[..., :known].to(Q)).mT
    top = rotation[:, :known].to(state.V)
    S = values[:, :known]
    sigma = S[..., None].to(U)
    V = top @ state.V
    right = (top @ state.Y - sigma * U).double().norm(dim=2)
    if d == L:
        adjoint = (U @ state.Y.mT) @ state.V
        blind = torch.zeros_like(S, dtype=torch.bool)
    else:
        adjoint = top @ state.W / sigma
        blind = S / S[:, :1] <= BREAKDOWN * torch.finfo(U.dtype).eps
    error = torch.where(blind, torch.inf, (adjoint - sigma * V).double().norm(dim=2))
    error = torch.where((state.squared == 0)[:, None], 0.0, error)
    residual = torch.maximum(right, error)
    following = torch.full_like(S[:, 0], 0.0 if k == min(m, d) else torch.inf)
    ritz = _Triplets(
        U=U[:, :k],
        S=S[:, :k],
        V=V[:, :k],
        right_residual=right[:, :k],
        left_residual=error[:, :k],
        following=(S + residual)[:, k] if known > k else following,
        streams=torch.full_like(state.reseeds, state.streams),
        restarts=torch.full_like(state.reseeds, state.restarts),
    )
    return ritz, rotation


def _consider(state: _Krylov, batch: OperatorBatch, plan: Plan, new: _Triplets) -> None:
    """Take new triplets for the operators whose residuals they improve, and judge those."""
    worst = new.residual.amax(1)
    if state.best is None:
        state.best = new
    else:
        before = state.best.residual.amax(1)
        state.patience = torch.where(worst <= before / 2, _PATIENCE, state.patience - 1)
        state.best = new.where((worst < before) & ~state.done, state.best)
    worst, largest = state.best.residual.amax(1), state.best.S[:, 0]
    stagnant = (worst <= rounding_level(batch) * largest) & (state.patience <= 0)
    state.done |= (worst <= plan.tol * largest) | stagnant


def _finish(state: _Krylov, batch: OperatorBatch, plan: Plan) -> SVDResult:
    """The result of a group."""
    best = state.best
    assert best is not None
    lost = torch.where(state.lost, torch.nan, 0.0).double()
    blank = lost[:, None, None].to(best.U)
    contribution = state.contribution * state.scale[:, None].to(best.U) + blank[:, 0]
    found = Solution(
        U=best.U + blank,
        S=best.S + lost[:, None],
        V=best.V + blank,
        residual=best.residual + lost[:, None],
        following=best.following,
        unseen=unseen_level(batch, plan) * best.S[:, 0],
        settled=~state.lost,
        frobenius_squared=state.squared + lost,
        frobenius_error=lost,
        n_iter=best.streams,
        n_restarts=best.restarts,
        n_reseeds=state.reseeds,
        contribution=None if state.inputs is None else contribution,
        passes=plan.width + state.streams * batch.shape[1],
    )
    return assemble(batch, plan, state.index, state.scale, found)
