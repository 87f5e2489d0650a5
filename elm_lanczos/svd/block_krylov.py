"""Block Krylov iteration for a group of operators in lockstep.

From a sketch JᵀΩ with a normal Ω, the randomised range finder (Halko, Martinsson & Tropp, 2011), a
basis V is built block by block: each block B is pushed through every operator, and back,

    Y = J B,      W = Jᵀ Y,

and the next one is what is new in W, orthonormalised against all before (Musco & Musco, 2015). The
triplets come from Rayleigh–Ritz on JV over the whole basis, with residuals of both sides that cost
no product: Y and W are linear in V. What pushes the blocks through is the caller's: rows of J that
flow by (`stream`), explicit matrices (`dense`), or JVPs and VJPs of the operators, which finish the
few that a whole stream would be too much for.

The columns of each block are ordered by size, so that the rounding errors of W are relative to each
column and small singular values keep their digits. When the basis is full, the leading Ritz vectors
take its place (thick restart); when it spans all of R^d the answer is exact. Operators leave the
bookkeeping as they converge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

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

_SPARE = 9
# Iteration towards a tolerance that the arithmetic cannot give ends when the residuals have not
# halved this many times; a stream gives two sets of them.
_PATIENCE = 4
# Operators whose Rayleigh–Ritz problem is solved at a time: its temporaries are larger than they.
_TOGETHER = 16
# What a block of residuals by products gains, at least: measured 4 to 20 on transformer Jacobians.
_GAIN = 4.0


@dataclass(frozen=True)
class Triplets:
    """Ritz triplets of a operators.

    Attributes:
        U: (a, k, m).
        S: (a, k) float64.
        V: (a, k, d).
        right_residual: ‖Jv − σu‖ (a, k) float64.
        left_residual: ‖Jᵀu − σv‖ (a, k) float64; infinite where W cannot tell.
        following: Largest value that σ_{k+1} may have (a,) float64.
        streams: Streams they took (a,).
        restarts: Thick restarts they took (a,).
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
        """The larger of the two residuals (a, k)."""
        return torch.maximum(self.right_residual, self.left_residual)

    def select(self, rows: Tensor) -> Triplets:
        """The triplets of the operators in rows, (b,) positions or an (a,) mask."""
        return Triplets(*(getattr(self, f.name)[rows] for f in fields(self)))

    def put(self, rows: Tensor, new: Triplets) -> None:
        """Overwrites the triplets of the operators in rows."""
        for f in fields(self):
            getattr(self, f.name)[rows] = getattr(new, f.name)


class BlockKrylov:
    """The iteration for one group of g operators, divided by their scale; vectors are rows.

    Of the g operators, a are active: not done yet.

    Attributes:
        index: Positions of the operators in the batch (g,), on the CPU.
        active: Positions in the group of those that are not done (a,).
        streams: Times that the rows of J have flowed by.
    """

    def __init__(self, batch: OperatorBatch, plan: Plan, index: Tensor, sample: Tensor) -> None:
        """Make the first block: the leading directions of a sketch.

        Args:
            batch: The operators.
            plan: The plan; its width, basis, k, tol and seed are used.
            index: Positions of the group's operators in the batch (g,), on the CPU.
            sample: JᵀΩ, (g, at least width, d).
        """
        g, _, d = sample.shape
        m, device = batch.shape[1], sample.device
        self.batch, self.plan, self.index = batch, plan, index
        self.scale = power_of_two_scale(sample)
        self.lost = ~sample.isfinite().flatten(1).all(1)
        sample = torch.where(self.lost[:, None, None], 0.0, sample / self.scale[:, None, None])
        self.active = torch.arange(g, device=device)
        self.streams, self.restarts, self.passes = 0, 0, 0
        self.squared = torch.zeros(g, dtype=torch.float64, device=device)
        self.inputs = None if batch.inputs is None else batch.inputs[index].to(sample)
        self.contribution = sample.new_zeros(g, m)
        self.reseeds = torch.zeros(g, dtype=torch.int64, device=device)
        self._patience = torch.full((g,), _PATIENCE, device=device)
        self._best: Triplets | None = None
        self._ritz: Triplets | None = None
        # Room for V, JV and JᵀJV, of which the first `_size` vectors are there.
        room = min(d, max(plan.basis, plan.k + plan.width))
        self._bases = tuple(sample.new_empty(g, room, length) for length in (d, m, d))
        self._size = 0
        self._left = sample.new_zeros(g, 0, m)
        self._draws = 0
        self._put_block(sample, sample.norm(dim=2).amax(1), min(plan.width, d))

    @property
    def _V(self) -> Tensor:
        return self._bases[0][:, : self._size]

    @property
    def _Y(self) -> Tensor:
        return self._bases[1][:, : self._size]

    @property
    def _W(self) -> Tensor:
        return self._bases[2][:, : self._size]

    # ---------------------------------------------------------------- products with the block

    def absorb(self, start: int, rows: Tensor) -> None:
        """Let a block of rows flow by: Y[R] = J[R] B, W += J[R]ᵀ Y[R].

        Args:
            start: Number of the first row.
            rows: (b, n, d), of all operators of the batch.
        """
        which = self.index[self.active.cpu()].to(rows.device)
        J = rows.transpose(0, 1).index_select(0, which)
        self.absorb_matrices(start, J.div_(self.scale[self.active, None, None]))

    def absorb_matrices(self, start: int, J: Tensor) -> None:
        """Let rows of the active operators flow by that are divided by their scale already.

        Args:
            start: Number of the first row.
            J: (a, b, d).
        """
        J = J.masked_fill(self.lost[self.active, None, None], 0.0) if self.lost.any() else J
        stop = start + J.shape[1]
        image = self._block @ J.mT
        self._image[:, :, start:stop] = image
        self._sums.baddbmm_(torch.cat([image, self._left[:, :, start:stop]], 1), J)
        if self.streams == 0:
            self.squared += torch.linalg.vector_norm(J, dim=(1, 2), dtype=torch.float64) ** 2
            if self.inputs is not None:
                self.contribution[:, start:stop] = (J @ self.inputs[..., None])[..., 0]
        self.streams += stop == self._Y.shape[2]

    def multiply(self, count: Callable[[int], None]) -> None:
        """Push the block through by a JVP and a VJP for each of its vectors.

        Args:
            count: Called with the number of passes.
        """
        a, p, _ = self._block.shape
        member = self.index[self.active.cpu()].repeat_interleave(p)
        scale = self.scale[self.active, None, None]
        for product, X, target in (
            (self.batch.matvec, self._block, self._image),
            (self.batch.rmatvec, self._image, self._sums),
        ):
            count(a * p)
            self.passes += a * p
            target.copy_(product(X.flatten(0, 1), member).view(a, p, -1) / scale)

    # ------------------------------------------------------------------------ the iteration

    def advance(self) -> None:
        """Rayleigh–Ritz once the block has been through; what has converged leaves."""
        lost = ~(self._image.isfinite().flatten(1).all(1) & self.squared[self.active].isfinite())
        if lost.any():
            self.lost[self.active] |= lost
            for X in (self._image, self._sums):
                X.masked_fill_(lost[:, None, None], 0.0)
        width, k = self._block.shape[1], self.plan.k
        self._block_W, direct = self._sums[:, :width], self._sums[:, width:]
        if self._ritz is not None and direct.shape[1] == k:
            # Jᵀu of the previous triplets has come by: their residual is known without W.
            error = direct - self._ritz.S[..., None].to(direct) * self._ritz.V
            error = error.double().norm(dim=2)
            self._consider(replace(self._ritz, left_residual=error))
        start, self._size = self._size, self._size + width
        for basis, new in zip(self._bases, (self._block, self._image, self._block_W), strict=True):
            basis[:, start : self._size] = new
        self._rayleigh_ritz()
        assert self._ritz is not None
        self._judge(self._consider(self._ritz))

    def next_block(self) -> None:
        """Go on with what is new in W: the block of the next stream."""
        width = min(self.plan.width, self._V.shape[2] - self._V.shape[1])
        # After narrow blocks of residuals, what is new in the wide ones before them is used too.
        narrow = self._image.shape[1] < width
        image, W = (self._Y, self._W) if narrow else (self._image, self._block_W)
        size = image.norm(dim=2, keepdim=True)
        assert self._ritz is not None
        largest = self._ritz.S[:, 0].to(size)
        negligible = BREAKDOWN * torch.finfo(size.dtype).eps * largest
        directions = torch.where(size <= negligible[:, None, None], 0.0, W / size)
        lacking = max(0, width - directions.shape[1])
        directions = torch.nn.functional.pad(directions, (0, 0, 0, lacking))
        self._left = self._ritz.U
        self._put_block(directions, largest, width)
        self._restart_if_full(width)

    def next_residuals(self) -> None:
        """Go on with the residuals of the triplets that have not converged: a narrow block."""
        width = self.unconverged
        self._left = self._Y.new_zeros(len(self.active), 0, self._Y.shape[2])
        assert self._ritz is not None
        open_ = (self._ritz.residual > self._limit(self._ritz))[..., None]
        directions = torch.where(open_, self._error, 0.0)
        size = directions.norm(dim=2).amax(1)
        self._put_block(directions, size, width)
        self._restart_if_full(width)

    @property
    def unconverged(self) -> int:
        """Triplets that have not converged, of the operator that has most of them."""
        assert self._ritz is not None
        open_ = (self._ritz.residual > self._limit(self._ritz)).sum(1)
        room = self._V.shape[2] - self._V.shape[1]
        return min(max(1, int(open_.max())), room)

    @property
    def products_to_go(self) -> float:
        """Estimate of the JVPs and VJPs that would finish the active operators one by one."""
        assert self._ritz is not None
        worst = self._ritz.residual.amax(1)
        missing = (worst / self._limit(self._ritz)[:, 0]).clamp_min(1.0).log()
        rounds = (missing / torch.log(torch.tensor(_GAIN))).ceil().clamp_min(1.0)
        return float(rounds.max()) * 2 * len(self.active) * self.unconverged

    def _limit(self, ritz: Triplets) -> Tensor:
        """Residuals (a, 1) up to which triplets count as converged."""
        level = max(self.plan.tol, rounding_level(self.batch))
        return level * ritz.S[:, :1].clamp_min(torch.finfo(torch.float64).tiny)

    def _put_block(self, directions: Tensor, largest: Tensor, width: int) -> None:
        """Make the next block from directions (a, b, d) of at most the size largest (a,)."""
        a, d, k = len(self.active), self._V.shape[2], self._left.shape[1]
        draw = _SPARE + self._draws
        self._draws += 1

        def spare() -> Tensor:
            labels = [self.batch.labels[i] for i in self.index[self.active.cpu()].tolist()]
            return normal_rows(self.plan.seed, labels, draw, (width, d), directions)

        threshold = BREAKDOWN * torch.finfo(directions.dtype).eps * largest
        self._block, missing = orthonormal_block(self._V, directions, spare, threshold, width)
        self._image = directions.new_empty(a, width, self._Y.shape[2])
        self._sums = directions.new_zeros(a, width + k, d)
        self.reseeds[self.active] += missing

    def _restart_if_full(self, width: int) -> None:
        """Thick restart: the leading Ritz vectors take the place of a basis without room."""
        L, basis = self._V.shape[1], self.plan.basis
        if L + width <= basis:
            return
        kept = max(self.plan.k, min(basis // 2, basis - width))
        turn = self._rotation[:, :kept].to(self._V)  # of m rows at most
        for held in self._bases:
            held[:, : turn.shape[1]] = turn @ held[:, :L]
        self._size = turn.shape[1]
        self.restarts += 1

    def _rayleigh_ritz(self) -> None:
        """Triplets of J restricted to the basis, and the rotation to its leading Ritz vectors."""
        parts = [
            self._ritz_of(rows)
            for rows in torch.arange(len(self.active), device=self._V.device).split(_TOGETHER)
        ]
        triplets, errors, rotations = zip(*parts, strict=True)
        self._ritz = Triplets(
            *(torch.cat([getattr(t, f.name) for t in triplets]) for f in fields(Triplets))
        )
        self._error, self._rotation = torch.cat(errors), torch.cat(rotations)

    def _ritz_of(self, rows: Tensor) -> tuple[Triplets, Tensor, Tensor]:
        """The same for some of the active operators, with Jᵀu − σv (b, k, d)."""
        V, Y, W = self._V[rows], self._Y[rows], self._W[rows]
        k, m, (b, L, d) = self.plan.k, Y.shape[2], V.shape
        known = min(k + 1, L, m)
        Q, R = torch.linalg.qr(Y.mT)
        left, values, rotation = small_svd(R)
        U = (Q @ left[..., :known].to(Q)).mT
        top = rotation[:, :known].to(V)
        S = values[:, :known]
        sigma = S[..., None].to(U)
        vectors = top @ V
        right = (top @ Y - sigma * U).double().norm(dim=2)
        if d == L:
            adjoint = (U @ Y.mT) @ V
            blind = torch.zeros_like(S, dtype=torch.bool)
        else:
            adjoint = top @ W / sigma
            blind = S / S[:, :1] <= BREAKDOWN * torch.finfo(U.dtype).eps
        gap = adjoint - sigma * vectors
        error = torch.where(blind, torch.inf, gap.double().norm(dim=2))
        error = torch.where((self.squared[self.active[rows]] == 0)[:, None], 0.0, error)
        residual = torch.maximum(right, error)
        following = torch.full_like(S[:, 0], 0.0 if k == min(m, d) else torch.inf)
        none = torch.zeros(b, dtype=torch.int64, device=V.device)
        triplets = Triplets(
            U=U[:, :k],
            S=S[:, :k],
            V=vectors[:, :k],
            right_residual=right[:, :k],
            left_residual=error[:, :k],
            following=(S + residual)[:, k] if known > k else following,
            streams=none + self.streams,
            restarts=none + self.restarts,
        )
        kept = max(k, self.plan.basis // 2)
        return triplets, gap[:, :k].nan_to_num(0.0, 0.0, 0.0), rotation[:, :kept].to(V)

    # ------------------------------------------------------------------------ convergence

    def _consider(self, new: Triplets) -> Triplets:
        """Take new triplets for the active operators whose residuals they improve.

        Returns:
            The best ones so far of the active operators.
        """
        if self._best is None:
            self._best = Triplets(*(getattr(new, f.name).clone() for f in fields(new)))
            return self._best
        best = self._best.select(self.active)
        worst, before = new.residual.amax(1), best.residual.amax(1)
        patience = self._patience[self.active]
        self._patience[self.active] = torch.where(worst <= before / 2, _PATIENCE, patience - 1)
        better = worst < before
        self._best.put(self.active[better], new.select(better))
        return self._best.select(self.active)

    def _judge(self, best: Triplets) -> None:
        """Let operators whose triplets are final leave."""
        worst, largest = best.residual.amax(1), best.S[:, 0]
        stagnant = self._patience[self.active] <= 0
        stagnant &= worst <= rounding_level(self.batch) * largest
        done = (worst <= self.plan.tol * largest) | stagnant | self.lost[self.active]
        if self._V.shape[1] == self._V.shape[2]:
            done = torch.ones_like(done)
        if not done.any():
            return
        stay = ~done
        self.active = self.active[stay]
        count = len(self.active)
        for held in self._bases:
            held[:count, : self._size] = held[stay, : self._size]
        self._bases = tuple(held[:count] for held in self._bases)
        for name in ("_image", "_block_W", "_error", "_rotation"):
            setattr(self, name, getattr(self, name)[stay])
        assert self._ritz is not None
        self._ritz = self._ritz.select(stay)

    def result(self, passes: int) -> SVDResult:
        """What was found.

        Args:
            passes: Passes that were shared with other groups; this one's own are added.

        Returns:
            The result of the group.
        """
        best = self._best
        assert best is not None
        lost = torch.where(self.lost, torch.nan, 0.0).double()
        blank = lost[:, None, None].to(best.U)
        contribution = self.contribution * self.scale[:, None].to(best.U) + blank[:, 0]
        found = Solution(
            U=best.U + blank,
            S=best.S + lost[:, None],
            V=best.V + blank,
            residual=best.residual + lost[:, None],
            following=best.following,
            unseen=unseen_level(self.batch, self.plan) * best.S[:, 0],
            settled=~self.lost,
            frobenius_squared=self.squared + lost,
            frobenius_error=lost,
            n_iter=best.streams,
            n_restarts=best.restarts,
            n_reseeds=self.reseeds,
            contribution=None if self.inputs is None else contribution,
            passes=passes + self.passes,
        )
        return assemble(self.batch, self.plan, self.index, self.scale, found)
