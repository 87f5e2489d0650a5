"""From operators and a plan to results: the choice of method, groups, and the front door `svd`.

Operators are solved in *groups* of fixed composition. Every batched product and factorisation runs
within one group, so the bits of a group's result do not depend on which other groups are present:
a resumed run repeats them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from elm_lanczos.errors import UsageError
from elm_lanczos.operators import (
    LinearOperator,
    OperatorBatch,
    StackedOperators,
    TokenOperators,
    aslinearoperator,
)
from elm_lanczos.svd.dense import dense
from elm_lanczos.svd.lanczos import lanczos
from elm_lanczos.svd.plan import DEFAULT_TOL, GROUP, Plan, make_plan
from elm_lanczos.svd.result import SVDResult
from elm_lanczos.svd.stream import stream


def svd(
    A: Any,
    k: int,
    *,
    tokens: Sequence[int] | None = None,
    method: str = "auto",
    tol: float | None = None,
    seed: int = 0,
    memory: int | None = None,
    scratch: str | None = None,
    progress: Callable[[int], None] | None = None,
    plan: Plan | None = None,
) -> SVDResult:
    """The k leading singular triplets of an operator, or of every operator of a batch.

    Args:
        A: A linearisation (the Jacobian of each token), an OperatorBatch, or one operator: a
            LinearOperator or whatever `aslinearoperator` takes (then n = 1).
        k: Triplets for each operator, from 1 to min(m, d).
        tokens: Tokens of a linearisation; all of them by default.
        method: 'lanczos', 'stream', 'dense', or 'auto', which chooses between the first two.
        tol: Largest residual relative to σ₁; by default 1e-5 in float32 and 1e-10 in float64.
        seed: Seeds every random vector; the same seed gives the same bits.
        memory: Bytes to work within; by default at most 70 % of what is available.
        scratch: dense: a folder for a file that keeps the rows of the matrices.
        progress: Called with the passes made so far.
        plan: A plan to follow in place of k, method, tol, seed and memory, for control of every
            detail: ``replace(make_plan(...), basis=30)``.

    Returns:
        U (n, k, m), S (n, k), V (n, k, d) and their evidence. What did not converge is returned
        as far as it came and says so in its status.

    Raises:
        UsageError: Where k, method, tol, seed, memory or tokens cannot be used, or the memory has
            no room for even one operator.
        ValueError: Where A is no operator.
    """
    batch = as_batch(A, tokens)
    if plan is None:
        plan = plan_for(batch, k, method, tol, seed, memory, scratch=scratch)
        if plan.refusal:
            raise UsageError(plan.refusal)
    n, size = batch.shape[0], min(GROUP, plan.panel)
    groups = [range(start, min(start + size, n)) for start in range(0, n, size)]
    made = 0

    def count(passes: int) -> None:
        nonlocal made
        made = passes
        if progress is not None:
            progress(passes)

    results = dict(solve(batch, plan, groups, count))
    return SVDResult.concatenate([results[position] for position in range(len(groups))], made)


def plan_for(
    batch: OperatorBatch,
    k: int,
    method: str = "auto",
    tol: float | None = None,
    seed: int = 0,
    memory: int | None = None,
    *,
    scratch: str | None = None,
) -> Plan:
    """Resolve the options of `svd` for a batch; everything else is the batch's own.

    Args:
        batch: The operators.
        k: See `make_plan`, as for the rest.
        method: See there.
        tol: See there.
        seed: See there.
        memory: See there.
        scratch: See there.

    Returns:
        The plan.
    """
    return make_plan(
        *batch.shape,
        batch.dtype,
        k,
        method,
        tol,
        seed,
        memory,
        vectors=batch.vectors,
        scratch=scratch,
        precision=batch.precision,
    )


@torch.no_grad()
def solve(
    batch: OperatorBatch,
    plan: Plan,
    groups: Sequence[Sequence[int]],
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, SVDResult]]:
    """Solve groups of operators, each group's bits independent of the other groups.

    Args:
        batch: The operators.
        plan: The plan to follow.
        groups: For each group the positions of its operators in the batch.
        progress: Called with the passes made so far.

    Yields:
        Position in groups, and the result of that group, as they become ready.

    Raises:
        UsageError: Where the plan does not suit the operators.
    """
    _check(plan, batch)
    made = 0

    def count(passes: int) -> None:
        nonlocal made
        made += passes
        if progress is not None:
            progress(made)

    index = [torch.tensor(list(group), dtype=torch.int64) for group in groups]
    if plan.method == "lanczos":
        for position, group in enumerate(index):
            solved = [lanczos(batch, plan, part, count) for part in group.split(plan.panel)]
            yield position, _whole(solved)
        return
    by_rows = {"stream": stream, "dense": dense}[plan.method]
    # A group that is more than a panel is solved in parts, whatever the other groups.
    parts = [(i, part) for i, group in enumerate(index) for part in group.split(plan.panel)]
    found: list[dict[int, SVDResult]] = [{} for _ in index]
    for panel in _panels([part for _, part in parts], plan.panel):
        for place, result in by_rows(batch, plan, [parts[i][1] for i in panel], count):
            position = parts[panel[place]][0]
            done = found[position]
            done[panel[place]] = result
            if sum(len(part.tokens) for part in done.values()) == len(index[position]):
                yield position, _whole([done[i] for i in sorted(done)])
                done.clear()


def _whole(parts: Sequence[SVDResult]) -> SVDResult:
    """A group solved in parts; no two are of one panel, so none shares passes with another."""
    return SVDResult.concatenate(parts, sum(part.passes for part in parts))


def as_batch(A: Any, tokens: Sequence[int] | None = None) -> OperatorBatch:
    """A as a batch of operators.

    Args:
        A: A linearisation, an OperatorBatch, or one operator.
        tokens: Tokens of a linearisation; all of them by default.

    Returns:
        The batch.

    Raises:
        UsageError: Where tokens are given for anything but a linearisation, or do not exist.
    """
    if hasattr(A, "jvp") and hasattr(A, "vjp") and hasattr(A, "inputs"):
        chosen = range(len(A.inputs)) if tokens is None else tokens
        try:
            return TokenOperators(A, chosen)
        except ValueError as error:
            raise UsageError(str(error)) from None
    if tokens is not None:
        raise UsageError("tokens can only be chosen from a linearisation")
    if isinstance(A, OperatorBatch):
        return A
    operator: LinearOperator = aslinearoperator(A)
    return StackedOperators([operator])


def _check(plan: Plan, batch: OperatorBatch) -> None:
    """Refuse a plan that was changed by hand, or made for other operators, into an unusable one."""
    _, m, d = batch.shape
    least = {"lanczos": min(plan.k + 1, m, d), "stream": min(plan.k + plan.width, d), "dense": 0}
    if batch.dtype not in DEFAULT_TOL or str(batch.dtype) != f"torch.{plan.dtype}":
        raise UsageError(f"the plan is for {plan.dtype}, the operators are {batch.dtype}")
    if not plan.k <= min(m, d):
        raise UsageError(f"the plan asks for k = {plan.k} triplets of operators of {m}×{d}")
    if plan.basis < least[plan.method]:
        raise UsageError(f"basis must be at least {least[plan.method]} here, not {plan.basis}")
    if plan.method == "lanczos" and not (plan.probes >= 2 and plan.verify >= 1):
        raise UsageError("lanczos needs at least 2 probes and 1 step of verification")
    if plan.method == "lanczos" and plan.basis > min(m, d):
        raise UsageError(f"basis must be at most {min(m, d)} here, not {plan.basis}")
    if plan.method == "stream" and not plan.k <= plan.width <= min(m, d):
        raise UsageError(f"width must be from {plan.k} to {min(m, d)}, not {plan.width}")


def _panels(groups: Sequence[torch.Tensor], size: int) -> Iterator[list[int]]:
    """Positions of consecutive groups that together hold at most size operators, or one group."""
    panel: list[int] = []
    held = 0
    for position, group in enumerate(groups):
        if panel and held + len(group) > size:
            yield panel
            panel, held = [], 0
        panel.append(position)
        held += len(group)
    if panel:
        yield panel
