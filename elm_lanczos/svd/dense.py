"""Explicit Jacobians: the oracle, and the fastest way where memory is plentiful.

The m cotangents flow by once for a panel of operators, their rows are the matrices; kept in memory,
or in a scratch file, of which no more than a few matrices are in memory at a time. They are solved
by LAPACK's SVD where the k wanted triplets are no small part of them, and by block Krylov iteration
on the matrices (see `block_krylov`), verified by its residuals, where they are. Never from Gram
matrices JᵀJ, in which values below √eps σ₁ are lost. Asked for by name only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from elm_lanczos.errors import UsageError
from elm_lanczos.memory import size
from elm_lanczos.operators import OperatorBatch, StackedOperators
from elm_lanczos.svd.block_krylov import BlockKrylov
from elm_lanczos.svd.orthogonal import batched_svd, power_of_two_scale
from elm_lanczos.svd.plan import Plan
from elm_lanczos.svd.result import Solution, SVDResult, assemble
from elm_lanczos.svd.stream import row_blocks, sketch


def dense(
    batch: OperatorBatch, plan: Plan, groups: Sequence[Tensor], count: Callable[[int], None]
) -> Iterator[tuple[int, SVDResult]]:
    """The k leading triplets of every operator of some groups, from one stream.

    Args:
        batch: The operators.
        plan: The plan; its cotangent_block, scratch, solver, together, k, tol and seed are used.
        groups: Positions of each group's operators in the batch, on the CPU.
        count: Called with the number of VJPs as they are made.

    Yields:
        Position in groups, and that group's result. Residuals come from the stream's rows.

    Raises:
        UsageError: Where the scratch folder has no room for the rows.
    """
    _, m, d = batch.shape
    needed = sum(len(index) for index in groups) * m * d * batch.dtype.itemsize
    # A mapped file that outgrows its disk ends the process with a bus error.
    if plan.scratch is not None and (free := shutil.disk_usage(plan.scratch)[2]) < needed:
        raise UsageError(
            f"scratch {plan.scratch} has {size(free)} free, and {size(needed)} are needed"
        )
    with contextlib.ExitStack() as scratch:
        matrices = [_storage(batch, plan, len(index), scratch) for index in groups]
        for start, rows in row_blocks(batch, plan, count):
            for matrix, index in zip(matrices, groups, strict=True):
                part = rows.transpose(0, 1).index_select(0, index.to(rows.device))
                matrix[:, start : start + len(rows)] = part
        for position, index in enumerate(groups):
            J = matrices[position]
            matrices[position] = J[:0]
            parts = zip(index.split(plan.together), J.split(plan.together), strict=True)
            found = [_solve(batch, plan, some, part.to(batch.device)) for some, part in parts]
            yield position, SVDResult.concatenate(found, found[0].passes)


def _storage(batch: OperatorBatch, plan: Plan, g: int, scratch: contextlib.ExitStack) -> Tensor:
    """Room for the matrices of a group, (g, m, d): in memory, or in a file that goes with it."""
    _, m, d = batch.shape
    if plan.scratch is None:
        return torch.empty(g, m, d, dtype=batch.dtype, device=batch.device)
    folder = scratch.enter_context(tempfile.TemporaryDirectory(dir=plan.scratch))
    file = os.path.join(folder, "rows")
    _reserve(file, plan.scratch, g * m * d * batch.dtype.itemsize)
    return torch.from_file(file, shared=True, size=g * m * d, dtype=batch.dtype).view(g, m, d)


def _reserve(file: str, scratch: str, needed: int) -> None:
    """Creates a file whose bytes are on the disk, so that no other can take their room later.

    Raises:
        UsageError: Where there is no room for them.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        with open(file, "wb") as opened:
            os.posix_fallocate(opened.fileno(), 0, needed)
    except OSError as error:
        reason = f"no room for {size(needed)}: {error.strerror}"
        raise UsageError(f"scratch {scratch} has {reason}") from error


def _solve(batch: OperatorBatch, plan: Plan, index: Tensor, J: Tensor) -> SVDResult:
    """The triplets of explicit matrices (b, m, d), of operators (b,) of the batch."""
    if plan.solver == "krylov":
        labels = [batch.labels[i] for i in index.tolist()]
        inputs = None if batch.inputs is None else batch.inputs[index]
        stacked = StackedOperators(J, labels, inputs)
        stacked.precision = batch.precision
        result = _by_krylov(stacked, plan, J)
        if result is not None:
            return result
    return _by_svd(batch, plan, index, J)


def _by_krylov(batch: OperatorBatch, plan: Plan, J: Tensor) -> SVDResult | None:
    """Block Krylov iteration, or nothing where the basis grows so large that an SVD is better."""
    _, m, d = batch.shape
    state = BlockKrylov(batch, plan, torch.arange(len(J)), sketch(m, plan, J) @ J)
    J = J / state.scale[:, None, None]
    for _ in range(max(1, d // (2 * plan.width))):
        state.absorb_matrices(0, J[state.active])
        state.advance()
        if len(state.active) == 0:
            return state.result(m)
        state.next_block()
    return None


def _by_svd(batch: OperatorBatch, plan: Plan, index: Tensor, J: Tensor) -> SVDResult:
    """SVD of explicit matrices (b, m, d)."""
    k, b = plan.k, len(index)
    scale = power_of_two_scale(J)
    J = J / scale[:, None, None]
    finite = J.isfinite().flatten(1).all(1)
    U, S, Vt = batched_svd(J.masked_fill(~finite[:, None, None], 0.0))
    lost = torch.where(finite, 0.0, torch.nan)[:, None, None].to(J)
    U, sigma, V = U[..., :k] + lost, S[:, None, :k] + lost, Vt[:, :k].mT + lost
    contribution = None
    if batch.inputs is not None:
        x = batch.inputs[index].to(J)
        contribution = (J @ x[..., None])[..., 0] * scale[:, None].to(J)
    residual = torch.maximum(
        (J @ V - sigma * U).double().norm(dim=1), (J.mT @ U - sigma * V).double().norm(dim=1)
    )
    following = S[:, k].double() if S.shape[1] > k else torch.zeros(b, dtype=torch.float64)
    none = torch.zeros(b, dtype=torch.int64)
    found = Solution(
        U=U.mT.contiguous(),
        S=sigma[:, 0].double(),
        V=V.mT.contiguous(),
        residual=residual,
        following=following.to(J.device),
        unseen=torch.zeros(b, dtype=torch.float64, device=J.device),
        settled=finite,
        frobenius_squared=torch.linalg.vector_norm(J, dim=(1, 2), dtype=torch.float64) ** 2,
        frobenius_error=torch.zeros(b, dtype=torch.float64, device=J.device),
        n_iter=none + 1,
        n_restarts=none,
        n_reseeds=none.clone(),
        contribution=contribution,
        passes=batch.shape[1],
    )
    return assemble(batch, plan, index, scale, found)
