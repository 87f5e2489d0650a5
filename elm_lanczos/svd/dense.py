"""Explicit Jacobians and their full SVD: the oracle, and the fastest way where memory is plentiful.

The m cotangents flow by once; their rows are the matrices. Asked for by name only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from elm_lanczos.operators import OperatorBatch
from elm_lanczos.svd.orthogonal import power_of_two_scale
from elm_lanczos.svd.plan import Plan
from elm_lanczos.svd.result import Solution, SVDResult, assemble
from elm_lanczos.svd.stream import row_blocks


def dense(
    batch: OperatorBatch, plan: Plan, groups: Sequence[Tensor], count: Callable[[int], None]
) -> Iterator[tuple[int, SVDResult]]:
    """The k leading triplets of every operator of some groups, from one stream.

    Args:
        batch: The operators.
        plan: The plan; its cotangent_block and k are used.
        groups: Positions of each group's operators in the batch, on the CPU.
        count: Called with the number of VJPs as they are made.

    Yields:
        Position in groups, and that group's result. Residuals come from the stream's rows.
    """
    _, m, d = batch.shape
    matrices = [torch.empty(len(g), m, d, dtype=batch.dtype, device=batch.device) for g in groups]
    for start, rows in row_blocks(batch, plan, count):
        for matrix, index in zip(matrices, groups, strict=True):
            part = rows.index_select(1, index.to(rows.device)).transpose(0, 1)
            matrix[:, start : start + len(rows)] = part
    for position, index in enumerate(groups):
        matrix = matrices[position]
        matrices[position] = matrix[:0]
        yield position, _decompose(batch, plan, index, matrix)


def _decompose(batch: OperatorBatch, plan: Plan, index: Tensor, J: Tensor) -> SVDResult:
    """SVD of explicit matrices (g, m, d)."""
    k, g = plan.k, len(index)
    scale = power_of_two_scale(J)
    J = J / scale[:, None, None]
    finite = J.isfinite().flatten(1).all(1)
    U, S, Vt = torch.linalg.svd(torch.where(finite[:, None, None], J, 0.0), full_matrices=False)
    lost = torch.where(finite, 0.0, torch.nan)[:, None, None].to(J)
    U, sigma, V = U[..., :k] + lost, S[:, None, :k] + lost, Vt[:, :k].mT + lost
    contribution = None
    if batch.inputs is not None:
        x = batch.inputs[index].to(J)
        contribution = (J @ x[..., None])[..., 0] * scale[:, None].to(J)
    residual = torch.maximum(
        (J @ V - sigma * U).double().norm(dim=1), (J.mT @ U - sigma * V).double().norm(dim=1)
    )
    following = S[:, k].double() if S.shape[1] > k else torch.zeros(g, dtype=torch.float64)
    none = torch.zeros(g, dtype=torch.int64)
    found = Solution(
        U=U.mT.contiguous(),
        S=sigma[:, 0].double(),
        V=V.mT.contiguous(),
        residual=residual,
        following=following.to(J.device),
        unseen=torch.zeros(g, dtype=torch.float64, device=J.device),
        settled=finite,
        frobenius_squared=J.double().square().sum((1, 2)),
        frobenius_error=torch.zeros(g, dtype=torch.float64, device=J.device),
        n_iter=none + 1,
        n_restarts=none,
        n_reseeds=none.clone(),
        contribution=contribution,
        passes=batch.shape[1],
    )
    return assemble(batch, plan, index, scale, found)
