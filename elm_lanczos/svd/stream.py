"""Block Krylov by streams: every operator of a batch from the same VJPs.

One VJP with cotangent e_r yields row r of *every* operator. While the m rows flow by in blocks R,

    Y[R] = J[R, :] V,      W += J[R, :]ᵀ Y[R],

so one stream gives JV and JᵀJV for a block V of each operator, ‖J‖_F² and Jx for its input x beside
them, and Jᵀu for the left vectors found so far; no Jacobian is kept. What a stream is worth depends
on nothing but the basis, whatever the number of operators (see `block_krylov`).

A stream serves all operators and costs m VJPs. Where those that have not converged would take fewer
passes one by one, they are finished so: each round costs a JVP and a VJP for each triplet that has
not converged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from elm_lanczos.operators import OperatorBatch
from elm_lanczos.svd.block_krylov import BlockKrylov
from elm_lanczos.svd.orthogonal import normal_rows
from elm_lanczos.svd.plan import Plan
from elm_lanczos.svd.result import SVDResult

_START = 8


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
    starts = range(0, m, plan.cotangent_block)

    def cotangents() -> Iterator[Tensor]:
        for start in starts:
            size = min(plan.cotangent_block, m - start)
            Y = torch.zeros(size, m, dtype=batch.dtype, device=batch.device)
            Y.diagonal(start).fill_(1.0)
            yield Y

    for start, rows in zip(starts, batch.rows_of(cotangents()), strict=True):
        count(len(rows))
        yield start, rows


def sketch(m: int, plan: Plan, like: Tensor) -> Tensor:
    """Ω, the normal cotangents (width, m) of the sketch JᵀΩ that a block Krylov iteration needs."""
    return normal_rows(plan.seed, [0], _START, (plan.width, m), like)[0]


def stream(
    batch: OperatorBatch, plan: Plan, groups: Sequence[Tensor], count: Callable[[int], None]
) -> Iterator[tuple[int, SVDResult]]:
    """The k leading triplets of every operator of some groups, served by the same streams.

    Args:
        batch: The operators.
        plan: The plan; its width, basis, max_streams, cotangent_block, k, tol and seed are used.
        groups: Positions of each group's operators in the batch, on the CPU.
        count: Called with the number of JVPs and VJPs as they are made.

    Yields:
        Position in groups and that group's result, as soon as all its operators have converged.
    """
    _, m, d = batch.shape
    Omega = sketch(m, plan, torch.empty(0, dtype=batch.dtype, device=batch.device))
    samples = [Omega.new_empty(len(index), plan.width, d) for index in groups]
    starts = range(0, plan.width, plan.cotangent_block)
    for start, rows in zip(starts, batch.rows_of(Omega.split(plan.cotangent_block)), strict=True):
        count(len(rows))
        for sample, index in zip(samples, groups, strict=True):
            part = rows.transpose(0, 1).index_select(0, index.to(rows.device))
            sample[:, start : start + len(rows)] = part
    active: dict[int, BlockKrylov] = {}
    for position, index in enumerate(groups):
        active[position] = BlockKrylov(batch, plan, index, samples[position])
        samples[position] = samples[position][:0]
    for streams in range(1, plan.max_streams + 1):
        for start, rows in row_blocks(batch, plan, count):
            for state in active.values():
                state.absorb(start, rows)
        for position in list(active):
            state = active[position]
            state.advance()
            _finish(state, plan, m, count)
            if len(state.active) == 0 or streams == plan.max_streams:
                yield position, active.pop(position).result(plan.width + streams * m)
            else:
                state.next_block()
        if not active:
            return


def _finish(state: BlockKrylov, plan: Plan, m: int, count: Callable[[int], None]) -> None:
    """Finish the active operators of a group by products, while that is less work than a stream.

    The group answers for its part of a stream, so that this does not depend on other groups.
    """
    part = state.batch.row_cost * m * len(state.index) / plan.panel
    while len(state.active) and state.passes + state.products_to_go <= part:
        state.next_residuals()
        state.multiply(count)
        state.advance()
