"""What a decomposition will cost, by each method, before it runs: passes, seconds and bytes.

Passes and bytes are arithmetic (`plan`). Seconds are these passes at the rate of one timed block of
the operators' own VJPs and JVPs, and the solvers' algebra, timed on a few stand-in operators of the
same shape: reflected diagonal matrices, whose rows cost next to nothing and whose singular values
fall off like those of a transformer's Jacobian.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elm_lanczos.memory import duration, size
from elm_lanczos.operators import OperatorBatch
from elm_lanczos.svd.plan import GROUP, METHODS, Plan, lanczos_steps, stream_count
from elm_lanczos.svd.solve import plan_for, solve

# Stand-ins: enough for batched products to be as fast as in a whole group, few where they are wide.
_STAND_IN_ENTRIES, _MOST_STAND_INS = 2**23, 8
# A block that is done sooner is timed again, as its first run also linearises.
_SHORT_SECONDS = 5.0


@dataclass(frozen=True)
class Cost:
    """What one method is predicted to take for all operators of a batch.

    Attributes:
        method: 'lanczos', 'stream' or 'dense'.
        passes: JVPs and VJPs.
        seconds: Time, with the solver's algebra; None where it is not known.
        bytes: Memory of the solver's state.
    """

    method: str
    passes: int
    seconds: float | None
    bytes: int


@dataclass(frozen=True)
class Rates:
    """How fast a batch's operators are.

    Attributes:
        row: Seconds of one VJP in a block of cotangents that serve all operators.
        step: Seconds of one VJP or JVP where each operator has a vector of its own.
    """

    row: float
    step: float

    def times(self, factor: float) -> Rates:
        """The rates of operators that take so many times longer."""
        return Rates(self.row * factor, self.step * factor)


def predict(
    batch: OperatorBatch,
    k: int,
    *,
    tol: float | None = None,
    memory: int | None = None,
    scratch: str | None = None,
    methods: Sequence[str] = METHODS[1:],
) -> dict[str, Cost]:
    """Predict what each method takes on a batch of operators, by timing a block of each product.

    Args:
        batch: The operators.
        k: Triplets for each operator.
        tol: Largest residual relative to σ₁; by default as for `svd`.
        memory: Bytes to work within; by default as for `svd`.
        scratch: dense: a folder for a file that keeps the rows.
        methods: Some of 'lanczos', 'stream' and 'dense'; all by default.

    Returns:
        The cost of each of the methods.
    """
    plans = {
        method: plan_for(
            batch, k, method, tol, memory=memory, scratch=scratch if method == "dense" else None
        )
        for method in methods
    }
    rates = time_block(batch, steps="lanczos" in methods)
    return price(plans, batch.shape, batch.device, rates)


def faster_dense(chosen: Cost, dense: Cost) -> str | None:
    """One line saying that `dense` would be at least twice as fast, if it would.

    Args:
        chosen: The cost of the method chosen.
        dense: That of 'dense'.

    Returns:
        The line, or None.
    """
    if chosen.seconds is None or dense.seconds is None or chosen.seconds < 2 * dense.seconds:
        return None
    return (
        f"--method dense would take about {duration(dense.seconds)} instead of "
        f"{duration(chosen.seconds)}, with {size(dense.bytes)} for explicit Jacobians"
    )


def price(
    plans: Mapping[str, Plan],
    shape: tuple[int, int, int],
    device: torch.device,
    rates: Rates | None,
) -> dict[str, Cost]:
    """The cost of plans for n operators of shape m×d, given how fast the operators are.

    Args:
        plans: A plan for each method.
        shape: (n, m, d).
        device: Where the algebra runs.
        rates: Seconds of a pass; None where they are not known.

    Returns:
        A cost for each method, without seconds where there are no rates.
    """
    n, m, d = shape
    found = {}
    for method, plan in plans.items():
        passes, seconds = plan.passes[method], None
        if rates is not None:
            seconds = passes * (rates.step if method == "lanczos" else rates.row)
            seconds += n * algebra_seconds(plan, min(n, _MOST_STAND_INS), m, d, device)
        found[method] = Cost(method, passes, seconds, plan.bytes[method])
    return found


@torch.no_grad()
def time_block(batch: OperatorBatch, *, steps: bool = True) -> Rates:
    """Time one block of VJPs that serve all operators, and one of a product for each of them.

    Args:
        batch: The operators.
        steps: Whether the latter are to be timed, which also makes the JVPs; else NaN.

    Returns:
        The rates.
    """
    n, m, d = batch.shape
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(batch.device, batch.dtype)

    some = torch.arange(min(n, GROUP, batch.vectors))
    Y, V, U = random(min(m, batch.vectors), m), random(len(some), d), random(len(some), m)
    row = _seconds(lambda: batch.rows(Y), batch.device) / len(Y)
    if not steps:
        return Rates(row, math.nan)
    forward = _seconds(lambda: batch.matvec(V, some), batch.device)
    back = _seconds(lambda: batch.rmatvec(U, some), batch.device)
    return Rates(row, (forward + back) / (2 * len(some)))


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, of the faster of two if the first was short."""
    taken: list[float] = []
    while not taken or (len(taken) < 2 and taken[0] < _SHORT_SECONDS):
        begun = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - begun)
    return min(taken)


def algebra_seconds(plan: Plan, n: int, m: int, d: int, device: torch.device) -> float:
    """Seconds that the solver's own algebra takes for one operator.

    Args:
        plan: The plan.
        n: Operators to be solved at a time, at most.
        m: Rows.
        d: Columns.
        device: Where.

    Returns:
        Seconds.
    """
    n = max(1, min(n, _STAND_IN_ENTRIES // (m * d)))
    small = min(m, d)
    streams = stream_count(plan.width, plan.k, d, plan.tol)
    steps = lanczos_steps(plan.k, small, plan.tol)
    basis = min(small, max(plan.k + 1, min(plan.basis, steps)))
    # Fixed numbers of streams and steps, as predicted, whatever the stand-ins would need.
    fixed = replace(
        plan,
        # A few streams of rows do what block Krylov iteration on as many matrices does.
        method="stream" if plan.method == "dense" and plan.solver == "krylov" else plan.method,
        memory=0,
        passes={},
        arrays={},
        reason="",
        tol=0.0,
        panel=2**62,
        max_streams=streams,
        max_restarts=0,
        basis=basis if plan.method == "lanczos" else plan.basis,
        scratch=None,
        seed=0,
    )
    return _timed_algebra(fixed, n, m, d, device)


@functools.lru_cache(maxsize=64)
def _timed_algebra(plan: Plan, n: int, m: int, d: int, device: torch.device) -> float:
    batch = _ReflectedDiagonal(n, m, d, getattr(torch, plan.dtype), device)
    groups = [list(range(n))]

    def run() -> None:
        for _ in solve(batch, plan, groups):
            pass

    return _seconds(run, device) / n


class _ReflectedDiagonal(OperatorBatch):
    """n copies of H diag(i^-1/2) K with reflections H and K: dense, but as cheap as a vector."""

    def __init__(self, n: int, m: int, d: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.shape, self.dtype, self.device = (n, m, d), dtype, device
        self.labels, self.inputs = tuple(range(n)), torch.ones(n, d, dtype=dtype, device=device)
        a, b = (torch.randn(size, generator=generator, dtype=torch.float64) for size in (m, d))
        self._a, self._b = ((x / x.norm()).to(device, dtype) for x in (a, b))
        values = torch.arange(1, min(m, d) + 1, dtype=torch.float64) ** -0.5
        self._values = values.to(device, dtype)

    def matvec(self, V: Tensor, index: Tensor) -> Tensor:
        return self._product(V, self._b, self._a)

    def rmatvec(self, U: Tensor, index: Tensor) -> Tensor:
        return self._product(U, self._a, self._b)

    def rows(self, Y: Tensor) -> Tensor:
        product = self._product(Y, self._a, self._b)
        return product[:, None].expand(-1, self.shape[0], -1).contiguous()

    def _product(self, X: Tensor, before: Tensor, after: Tensor) -> Tensor:
        r = len(self._values)
        out = X.new_zeros(len(X), len(after))
        out[:, :r] = (X - 2 * (X @ before)[:, None] * before)[:, :r] * self._values
        return out - 2 * (out @ after)[:, None] * after
