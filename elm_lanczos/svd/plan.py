"""How a decomposition will be computed, resolved once: method, block sizes, predicted cost.

One pass is one vector through the operators once, forward (JVP) or back (VJP). With n operators of
shape m×d, Lanczos costs two passes a step and operator; a stream costs m VJPs whatever n.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass

import psutil
import torch

from elm_lanczos.errors import UsageError

METHODS = ("auto", "lanczos", "stream", "dense")
DEFAULT_TOL = {torch.float32: 1e-5, torch.float64: 1e-10}
GROUP = 64
BLOCK = 1
VERIFY = 8
PROBES = 8


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
        memory: Bytes to work within.
        passes: Predicted passes by method.
        bytes: Predicted bytes by method, of one panel.
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
    memory: int
    passes: dict[str, int]
    bytes: dict[str, int]
    reason: str


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
        memory: Bytes to work within; by default at most half of what is available, a power of two
            so that runs on one machine agree.

    Returns:
        The plan.

    Raises:
        UsageError: Where k, method, tol, seed, memory or dtype cannot be used.
    """
    if dtype not in DEFAULT_TOL:
        raise UsageError(f"singular triplets are computed in float32 or float64, not {dtype}")
    small = min(m, d)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= small:
        raise UsageError(f"k must be a whole number from 1 to {small}, not {k!r}")
    if method not in METHODS:
        near = difflib.get_close_matches(str(method), METHODS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"unknown method {method!r}, expected one of {', '.join(METHODS)}{hint}")
    tol = DEFAULT_TOL[dtype] if tol is None else tol
    if not 0 <= tol < 1:
        raise UsageError(f"tol must be at least 0 and below 1, not {tol!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UsageError(f"seed must be a whole number from 0, not {seed!r}")
    if memory is None:
        memory = 2 ** (int(psutil.virtual_memory().available // 2).bit_length() - 1)
    if memory <= 0:
        raise UsageError(f"memory must be a positive number of bytes, not {memory!r}")

    item = dtype.itemsize
    width = min(small, max(3 * k, 32, small // 32))
    steps, streams = _lanczos_steps(k, small, tol), _streams(width, d, tol)
    lanczos_basis = min(small, 3 * k + 24)
    stream_basis = min(d, 8 * width)

    # Bytes an operator's state takes: bases and the vectors that are being made. Lanczos keeps the
    # products too, and both twice while operators that have finished are taken out.
    lanczos_bytes = (4 * (lanczos_basis + BLOCK) + 8 * k + 8) * (m + d) * item
    stream_bytes = min(d, streams * width) * (2 * m + 2 * d) * item
    dense_bytes = 3 * m * d * item
    block = max(1, min(32, m, memory // (8 * n * d * item)))
    rows_bytes = 2 * block * n * d * item
    room = max(1, memory - rows_bytes)

    def panel(state: int) -> int:
        return max(1, min(n, room // state))

    passes = {
        "lanczos": n * 2 * steps + PROBES * math.ceil(n / GROUP),
        "stream": math.ceil(n / panel(stream_bytes)) * (width + streams * m),
        "dense": math.ceil(n / panel(dense_bytes)) * m,
    }
    needed = {
        "lanczos": min(n, GROUP) * lanczos_bytes + rows_bytes,
        "stream": panel(stream_bytes) * stream_bytes + rows_bytes,
        "dense": panel(dense_bytes) * dense_bytes + rows_bytes,
    }
    if method == "auto":
        chosen = "lanczos" if passes["lanczos"] <= passes["stream"] else "stream"
        other = "stream" if chosen == "lanczos" else "lanczos"
        reason = (
            f"{chosen}: about {passes[chosen]} passes for {n} operators of {m}×{d}, "
            f"against {passes[other]} by {other}"
        )
    else:
        chosen, reason = method, f"{method}: asked for"
    state = {"lanczos": lanczos_bytes, "stream": stream_bytes, "dense": dense_bytes}[chosen]
    return Plan(
        method=chosen,
        k=k,
        tol=float(tol),
        seed=seed,
        dtype=str(dtype).removeprefix("torch."),
        basis=stream_basis if chosen == "stream" else lanczos_basis,
        block=BLOCK,
        max_restarts=100,
        check_every=4,
        verify=VERIFY,
        probes=PROBES,
        width=width,
        max_streams=24,
        cotangent_block=block,
        panel=panel(state),
        memory=int(memory),
        passes=passes,
        bytes=needed,
        reason=reason,
    )


# Fitted to transformer Jacobians (d = 256). Lanczos steps measured for k = 1, 4, 16 and 48, the
# check for missed values among them: 12, 21, 43, 88 at tol = 1e-5 and 16, 26, 49, 94 at 1e-10; of
# σ_i = i^-1/2, d = 4096, at 1e-5: 12, 20, 50, 115. Streams until the last of dozens of operators
# had converged, for k = 1 and 16: 3, 4 at tol = 1e-5 and 5, 6 at 1e-10.
def _lanczos_steps(k: int, small: int, tol: float) -> int:
    root = math.sqrt(k)
    return min(small, round(1.8 + 0.82 * k + 5.66 * root + (0.72 + 0.09 * root) * _digits(tol)))


def _streams(width: int, d: int, tol: float) -> int:
    return min(math.ceil(d / width), math.ceil(1.5 + 0.45 * _digits(tol)))


def _digits(tol: float) -> float:
    return -math.log10(max(tol, 1e-16))
