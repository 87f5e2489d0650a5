"""How a decomposition will be computed, resolved once: method, block sizes, predicted cost.

One pass is one vector through the operators once, forward (JVP) or back (VJP). With n operators of
shape m×d, Lanczos costs two passes a step and operator; a stream costs m VJPs whatever n.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from elm_lanczos.errors import UsageError
from elm_lanczos.memory import ceiling, size

METHODS = ("auto", "lanczos", "stream", "dense")
DEFAULT_TOL = {torch.float32: 1e-5, torch.float64: 1e-10}
# The residual that products in TF32, which keeps 10 bits of a factor, can reach.
TF32_TOL = 1e-3
GROUP = 64
BLOCK = 1
VERIFY = 8
PROBES = 8
# Vectors more than k in a block, at least.
_NARROWEST = 8
# Entries of the matrices that `dense` solves at a time, 256 MiB in float32.
_SOLVED_ELEMENTS = 2**26
# An SVD of a whole matrix takes as long as block Krylov iteration where the block's width is this
# part of the matrix.
_KRYLOV_WIDTHS = 8


@dataclass(frozen=True)
class Plan:
    """Everything that decides the bits of a result, as plain data.

    Attributes:
        method: 'lanczos', 'stream' or 'dense'.
        k: Triplets for each operator.
        tol: Largest residual accepted, relative to σ₁ of the operator.
        seed: Seeds every random vector.
        dtype: 'float32' or 'float64'.
        basis: Largest Krylov basis; reaching it leads to a thick restart.
        block: lanczos: vectors of each operator that a step adds.
        max_restarts: lanczos: restarts after which an operator is given up.
        check_every: lanczos: most steps between convergence tests.
        verify: lanczos: most steps of the search for missed values after convergence.
        probes: lanczos: random vectors of the stable rank's estimate, at least 2.
        width: stream: vectors in a block, ℓ.
        max_streams: stream: streams after which operators are given up.
        cotangent_block: stream, dense: cotangents that flow by at a time.
        panel: Operators whose state is held at a time.
        solver: dense: 'svd' or 'krylov', how the matrices are solved.
        together: dense: matrices that are solved at a time.
        scratch: dense: folder of the file that keeps the rows; None keeps them in memory.
        memory: Bytes to work within.
        passes: Predicted passes by method.
        arrays: Predicted bytes by method, of each kind of array of one panel.
        reason: Why this method, in one line.
    """

    method: str
    k: int
    tol: float
    seed: int
    dtype: str
    basis: int
    block: int
    max_restarts: int
    check_every: int
    verify: int
    probes: int
    width: int
    max_streams: int
    cotangent_block: int
    panel: int
    solver: str
    together: int
    scratch: str | None
    memory: int
    passes: dict[str, int] = field(hash=False)
    arrays: dict[str, dict[str, int]] = field(hash=False)
    reason: str

    @property
    def bytes(self) -> dict[str, int]:
        """Predicted bytes by method, of one panel."""
        return {method: sum(sizes.values()) for method, sizes in self.arrays.items()}

    @property
    def refusal(self) -> str | None:
        """One line saying that not even one operator's state fits the memory, if it does not."""
        needed = self.bytes[self.method]
        if needed <= self.memory:
            return None
        largest = max(self.arrays[self.method].items(), key=lambda array: array[1])
        return (
            f"{self.method} needs {size(needed)} ({size(largest[1])} of it {largest[0]}), "
            f"and the layers leave {size(self.memory)}: give more with --memory, or fewer --tokens"
        )


def make_plan(
    n: int,
    m: int,
    d: int,
    dtype: torch.dtype,
    k: int,
    method: str = "auto",
    tol: float | None = None,
    seed: int = 0,
    memory: int | None = None,
    *,
    vectors: int = 64,
    scratch: str | None = None,
    precision: str = "ieee",
) -> Plan:
    """Resolve the options of `svd` for n operators of shape m×d.

    Args:
        n: Operators.
        m: Rows.
        d: Columns.
        dtype: torch.float32 or torch.float64.
        k: Triplets for each operator, from 1 to min(m, d).
        method: 'lanczos', 'stream', 'dense', or 'auto', which chooses between the first two.
        tol: Largest residual relative to σ₁; by default 1e-5 in float32 and 1e-10 in float64.
        seed: Seeds every random vector.
        memory: Bytes to work within; by default at most 70 % of what is available, a power of two
            so that runs on one machine agree.
        vectors: Vectors that the operators take at a time; cotangents flow by in multiples of it.
        scratch: dense: a folder for a file that keeps the rows.
        precision: Of the operators' float32 products; for 'tf32' tol is 1e-3 by default.

    Returns:
        The plan.

    Raises:
        UsageError: Where k, method, tol, seed, memory, scratch or dtype cannot be used.
    """
    memory = _memory(memory)
    if tol is None:
        tol = TF32_TOL if precision == "tf32" else DEFAULT_TOL.get(dtype, 0.0)
    _refuse_unusable(m, d, dtype, k, method, tol, seed, scratch)
    small, item = min(m, d), dtype.itemsize
    cotangents = _cotangent_block(vectors, m, memory // (8 * n * d * item))
    work = _Work(n, m, d, k, tol, item, memory, rows=2 * cotangents * n * d * item)
    ways = {"lanczos": _lanczos(work), "stream": _stream(work), "dense": _dense(work, scratch)}
    if method == "auto":
        chosen, reason = _chosen(work, ways, vectors)
    else:
        chosen, reason = method, f"{method}: asked for"
    width = ways[chosen].width
    return Plan(
        method=chosen,
        k=k,
        tol=float(tol),
        seed=seed,
        dtype=str(dtype).removeprefix("torch."),
        basis=ways[chosen].basis,
        block=BLOCK,
        max_restarts=100,
        check_every=4,
        verify=VERIFY,
        probes=PROBES,
        width=width,
        max_streams=24,
        cotangent_block=cotangents,
        panel=ways[chosen].panel,
        solver="krylov" if _KRYLOV_WIDTHS * width <= small else "svd",
        together=_together(work),
        scratch=scratch,
        memory=memory,
        passes={name: way.passes for name, way in ways.items()},
        arrays={name: way.arrays for name, way in ways.items()},
        reason=reason,
    )


def _memory(memory: int | None) -> int:
    """The bytes to work within."""
    if memory is None:
        return int(2 ** (ceiling(torch.device("cpu")).bit_length() - 1))
    if memory <= 0:
        raise UsageError(f"memory must be a positive number of bytes, not {memory!r}")
    return int(memory)


def _refuse_unusable(
    m: int,
    d: int,
    dtype: torch.dtype,
    k: int,
    method: str,
    tol: float,
    seed: int,
    scratch: str | None,
) -> None:
    if dtype not in DEFAULT_TOL:
        raise UsageError(f"singular triplets are computed in float32 or float64, not {dtype}")
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= min(m, d):
        raise UsageError(f"k must be a whole number from 1 to {min(m, d)}, not {k!r}")
    if method not in METHODS:
        near = difflib.get_close_matches(str(method), METHODS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"unknown method {method!r}, expected one of {', '.join(METHODS)}{hint}")
    if not 0 <= tol < 1:
        raise UsageError(f"tol must be at least 0 and below 1, not {tol!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UsageError(f"seed must be a whole number from 0, not {seed!r}")
    if scratch is not None and method != "dense":
        raise UsageError("a scratch file keeps the rows of method 'dense'")
    if scratch is not None and not os.path.isdir(scratch):
        raise UsageError(f"scratch must be a folder, and {scratch} is none")


# ------------------------------------------------------------------- what each method would take


@dataclass(frozen=True)
class _Work:
    """What is to be done.

    Attributes:
        n: Operators.
        m: Rows.
        d: Columns.
        k: Triplets for each.
        tol: Largest residual relative to σ₁.
        item: Bytes of a number.
        memory: Bytes to work within.
        rows: Bytes of the rows that flow by at a time.
    """

    n: int
    m: int
    d: int
    k: int
    tol: float
    item: int
    memory: int
    rows: int

    @property
    def small(self) -> int:
        """The shorter side of an operator."""
        return min(self.m, self.d)

    @property
    def width(self) -> int:
        """Vectors in a block of Krylov iteration, where memory is no question."""
        return min(self.small, max(2 * self.k + 32, self.small // 32))

    def panel(self, state: int, shared: int = 0) -> int:
        """How many operators fit, of which each takes some bytes beside some shared ones."""
        return max(1, min(self.n, (max(1, self.memory - self.rows) - shared) // state))


@dataclass(frozen=True)
class _Way:
    """What one method would take; the attributes are those of `Plan`."""

    passes: int
    panel: int
    arrays: dict[str, int]
    width: int
    basis: int


def _lanczos(work: _Work) -> _Way:
    n, k, steps = work.n, work.k, lanczos_steps(work.k, work.small, work.tol)
    basis = min(work.small, 3 * k + 24)
    # Bases and the vectors that are being made; the products are kept too, and both twice while
    # operators that have finished are taken out.
    vectors = (basis + BLOCK) * (work.m + work.d) * work.item
    state = {
        "Krylov bases": vectors,
        "products kept": vectors,
        "copies as operators leave": 2 * vectors,
        "triplets and new vectors": (8 * k + 8) * (work.m + work.d) * work.item,
    }
    panel = work.panel(sum(state.values()))
    lockstep = min(GROUP, panel)
    arrays = {name: lockstep * one for name, one in state.items()}
    passes = n * 2 * steps + PROBES * math.ceil(n / lockstep)
    return _Way(passes, panel, arrays | {"rows of a block": work.rows}, work.width, basis)


def _stream(work: _Work) -> _Way:
    """Where all operators do not fit at once, narrower blocks may: more streams, fewer panels."""
    n, m, d, k, tol = work.n, work.m, work.d, work.k, work.tol
    options = []
    for width in (work.width, *range(work.width - 8, k + _NARROWEST, -8)):
        state = _stream_state(width, k, m, d, tol, work.item)
        panel = work.panel(sum(state.values()))
        passes = math.ceil(n / panel) * _stream_passes(panel, m, d, width, k, tol)
        arrays = {name: panel * one for name, one in state.items()}
        arrays["rows flowing by"] = work.rows
        options.append(_Way(passes, panel, arrays, width, _roomy_basis(work, panel, width, state)))
        if panel == n:
            break
    return min(options, key=lambda way: way.passes)


def _roomy_basis(work: _Work, panel: int, width: int, state: Mapping[str, int]) -> int:
    """The largest basis of a stream: room for two blocks more than expected, as memory allows."""
    expected = _stream_basis(width, work.k, work.d, work.tol)
    spare = (work.memory - work.rows) // panel - sum(state.values())
    more = max(0, spare) // ((work.m + 2 * work.d) * work.item)
    return min(work.d, expected + min(more, 2 * width))


def _dense(work: _Work, scratch: str | None) -> _Way:
    one = work.m * work.d * work.item
    solved = 4 * min(work.n, _together(work)) * one
    panel = work.n if scratch is not None else work.panel(one, solved)
    arrays = {
        "Jacobians": 0 if scratch is not None else panel * one,
        "matrices being solved": solved,
        "rows flowing by": work.rows,
    }
    basis = min(work.d, _stream_basis(work.width, work.k, work.d, work.tol) + 2 * work.width)
    return _Way(math.ceil(work.n / panel) * work.m, panel, arrays, work.width, basis)


def _together(work: _Work) -> int:
    """Matrices that `dense` solves at a time."""
    entries = work.m * work.d
    return max(1, min(GROUP, _SOLVED_ELEMENTS // entries, work.memory // (8 * entries * work.item)))


def _chosen(work: _Work, ways: Mapping[str, _Way], vectors: int) -> tuple[str, str]:
    """The better of the matrix-free methods, and why."""
    passes = {name: way.passes for name, way in ways.items()}
    # Where each operator has vectors of its own, few operators leave the blocks almost empty.
    at_a_time = min(work.n, GROUP, vectors)
    slower = 1 + vectors / (16 * at_a_time)
    chosen = "lanczos" if passes["lanczos"] * slower <= passes["stream"] else "stream"
    other = "stream" if chosen == "lanczos" else "lanczos"
    fits = {name: sum(ways[name].arrays.values()) <= work.memory for name in (chosen, other)}
    crowded_out = fits[other] and not fits[chosen]
    if crowded_out:
        chosen, other = other, chosen
    reason = (
        f"{chosen}: about {passes[chosen]} passes for {work.n} operators of {work.m}×{work.d}, "
        f"against {passes[other]} by {other}"
    )
    if crowded_out:
        reason += ", which needs more than the memory"
    elif passes[other] < passes[chosen]:
        reason += f", which makes only {at_a_time} at a time"
    return chosen, reason


# Fitted to transformer Jacobians (d = 256).
def lanczos_steps(k: int, small: int, tol: float) -> int:
    """Steps that Lanczos is expected to need for k triplets, the check for missed ones among them.

    Measured for k = 1, 4, 16 and 48: 12, 21, 43, 88 at tol = 1e-5 and 16, 26, 49, 94 at 1e-10; of
    σ_i = i^-1/2, d = 4096, at 1e-5: 12, 20, 50, 115.

    Args:
        k: Triplets.
        small: The shorter side of the operators.
        tol: Largest residual relative to σ₁.

    Returns:
        The number of steps.
    """
    root = math.sqrt(k)
    return min(small, round(1.8 + 0.82 * k + 5.66 * root + (0.72 + 0.09 * root) * _digits(tol)))


def stream_count(width: int, k: int, d: int, tol: float) -> int:
    """Streams that the last of many operators is expected to need.

    Measured with the default width: 2, 3 and 4 for k = 16 at tol = 1e-3, 1e-5 and 1e-10, and 2, 3
    and 5 for k = 4. At 1e-5 and k = 4 with 20, 12 and 4 vectors more than k in a block: 4, 4 and 5.

    Args:
        width: Vectors in a block.
        k: Triplets.
        d: Columns of the operators.
        tol: Largest residual relative to σ₁.

    Returns:
        The number of streams.
    """
    return min(math.ceil(d / width), round(1 + _streams_of_digit(width, k) * _digits(tol)))


def _streams_of_digit(width: int, k: int) -> float:
    """Streams that gain a digit: more where a block has few vectors more than k."""
    return 0.4 * (1 + min(1.0, max(0.0, (36 - (width - k)) / 32)))


def _stream_basis(width: int, k: int, d: int, tol: float) -> int:
    """The basis after the expected streams."""
    return min(d, stream_count(width, k, d, tol) * width)


def _stream_state(width: int, k: int, m: int, d: int, tol: float, item: int) -> dict[str, int]:
    """Bytes of an operator's state by array, once the expected streams have flowed by."""
    basis = _stream_basis(width, k, d, tol)
    return {
        "Krylov basis V": basis * d * item,
        "J V": basis * m * item,
        "JᵀJ V": basis * d * item,
        "block and sums": (width * (m + 2 * d) + k * d) * item,
        "triplets, now and best": k * (2 * m + 3 * d) * item,
    }


def _stream_passes(n: int, m: int, d: int, width: int, k: int, tol: float) -> int:
    """Passes of one panel: all streams, or fewer and what finishes the operators by products."""
    most = stream_count(width, k, d, tol)
    least = width + most * m
    for streams in range(1, most):
        missing = _digits(tol) - (streams - 0.5) / _streams_of_digit(width, k)
        own = 2 * n * k * math.ceil(missing * math.log(10) / math.log(6))
        if own <= m:
            least = min(least, width + streams * m + own)
    return least


def _cotangent_block(vectors: int, m: int, room: int) -> int:
    """Cotangents at a time: about 64, in multiples of those the operators take at a time."""
    vectors = min(vectors, m)
    some = max(1, min(m, room, vectors * max(1, 64 // vectors)))
    return some if some in range(vectors) or some == m else some - some % vectors


def _digits(tol: float) -> float:
    return -math.log10(max(tol, 1e-16))
