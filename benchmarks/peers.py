"""All tokens' leading singular triplets: this package against other ways to get the same thing.

Every method gets the same prompt, text that the bundled model continued by itself, and the same
frozen linear maps in float32, and is timed without loading the model and tracing the linear system:

| method | what it does |
|---|---|
| `auto`, `lanczos`, `stream`, `dense` | `elm_lanczos.svd` with default tolerance |
| `paper` | 128 Lanczos steps on JᵀJ per token, fully reorthogonalised, 64 tokens in lockstep; of \
long prompts one such group is run, and the time is extrapolated to all of them |
| `jacobian` | `torch.autograd.functional.jacobian` of the frozen model, all rows in one call, and \
`torch.linalg.svd` per token |
| `jacobian-blocks` | the same, 64 rows a call |
| `arpack`, `propack`, `lobpcg` | SciPy's `svds` on each token's operator, for a sample of tokens; \
the time is extrapolated to all of them |
| `lowrank` | rows by VJPs, then `torch.svd_lowrank` as is usual: 10 vectors more than k and two \
iterations |
| `lowrank-accurate` | the same with 3 k vectors (48 at least) and six iterations, which residuals \
of 1e-5 need |

The peers are given what favours them. JVPs and VJPs of `paper` are ours: `torch.func.vjp`, vmapped,
nothing recomputed per vector. The jacobian's model has frozen coefficients and parameters without
gradients. ARPACK is told our tolerance, with the square that SciPy makes of it undone; LOBPCG,
whose tolerance is absolute and whose default of 20 iterations may not suffice, also the true σ₁ and
σ_k. PROPACK keeps its default tolerance, the smallest: what it tests is σ, not the residual.

Each method runs in a process of its own. Its memory is the process's highest `ru_maxrss` while it
runs, above what it was with the model loaded and every segment linearised. That figure is inherited
from the parent across fork and exec, so the parent loads no model. σ and residuals are compared
with Jacobians and SVDs in float64, relative to σ₁, and are the worst of all tokens (of the sample).

Last, memory alone, on a synthetic system y = Σ_i B diag(g_i) C x_i (B, C reflections) of 256 tokens
and d = 2048, wider than the bundled model: `stream`, beside `torch.autograd.functional.jacobian`
and the SVDs of its first tokens.

    python benchmarks/peers.py
"""

from __future__ import annotations

import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from machine import RESULTS, machine
from rich.console import Console
from rich.table import Table
from scipy.sparse.linalg import svds
from torch import Tensor

from elm_lanczos import DetachedModel, svd
from elm_lanczos.freezing import Freezing, linear
from elm_lanczos.linearization import Linearization
from elm_lanczos.operators import OperatorBatch, TokenOperators
from elm_lanczos.rules import RULES
from elm_lanczos.svd.cost import predict
from elm_lanczos.svd.plan import DEFAULT_TOL, make_plan

OURS = ("auto", "lanczos", "stream", "dense")
JACOBIAN = ("jacobian", "jacobian-blocks")
SCIPY = ("arpack", "propack", "lobpcg")
LOWRANK = ("lowrank", "lowrank-accurate")
METHODS = (*OURS, "paper", *JACOBIAN, *SCIPY, *LOWRANK)

PROMPT = "My fellow citizens,"
TOL = DEFAULT_TOL[torch.float32]
STEPS = 128  # of the paper's Lanczos
LOCKSTEP = 64  # tokens at a time, in `paper` and `lowrank`
ROWS = 64  # of the Jacobian in one call, in `jacobian-blocks`
SYNTHETIC = ("synthetic-stream", "synthetic-jacobian")
WIDE, WIDE_TOKENS, WIDE_SVDS = 2048, 256, 2  # of the synthetic system; tokens whose SVD is taken
WIDE_MEMORY = 3 * 2**29  # bytes that `stream` is told to work within there
GROUPED_FROM = 129  # tokens of a prompt of which `paper` runs one group
# Measured passes for each of k triplets, to predict the time.
SVDS_PASSES = {"arpack": 10, "propack": 8, "lobpcg": 25}
# A method that is done sooner is run up to three times, and the median counts.
SHORT_SECONDS, REPEATS = 10.0, 3


@dataclass(frozen=True)
class Job:
    """What a process of its own is to do.

    Attributes:
        task: a method, or 'prompt', 'truth' or 'rates'.
        length: tokens T.
        k: triplets.
        sample: tokens that SciPy's solvers are given.
        limit: seconds after which no further token of the sample is begun.
        folder: where the prompt and the truth are, and where its figures go.
    """

    task: str
    length: int
    k: int
    sample: int
    limit: float
    folder: str


@dataclass(frozen=True)
class Triplets:
    """What a method returns.

    Attributes:
        U: (n, k, m).
        S: (n, k), descending.
        V: (n, k, d).
        tokens: the n tokens, ascending.
        note: what else is to be said.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    tokens: tuple[int, ...]
    note: str = ""


@dataclass(frozen=True)
class Row:
    """What came of one method at one length.

    Attributes:
        method: one of METHODS.
        status: 'measured', 'extrapolated' from a sample, 'skipped', 'stopped' or 'failed'.
        seconds: for all tokens; None where none were measured.
        ratio: seconds over those of auto.
        predicted_seconds: what was expected beforehand.
        peak_mib: peak memory above the baseline, MiB.
        sigma: worst error of a singular value, relative to σ₁.
        residual: worst of ‖Jv − σu‖ and ‖Jᵀu − σv‖, relative to σ₁.
        runs: how many times it was run; the seconds are their median.
        tokens: how many tokens were computed.
        note: what else is to be said.
    """

    method: str
    status: str
    seconds: float | None = None
    ratio: float | None = None
    predicted_seconds: float | None = None
    peak_mib: float | None = None
    sigma: float | None = None
    residual: float | None = None
    runs: int = 0
    tokens: int = 0
    note: str = ""


# ------------------------------------------------------------------------------- methods


def ours(lin: Linearization, k: int, method: str) -> Triplets:
    """Asks this package.

    Args:
        lin: the linear system.
        k: triplets.
        method: one of OURS.

    Returns:
        All tokens' triplets.
    """
    result = svd(lin, k, method=method, seed=0)
    notes = [result.method] if method == "auto" else []
    if lost := int((~result.converged).sum()):
        notes.append(f"{lost} tokens not converged")
    return Triplets(result.U, result.S, result.V, result.tokens, ", ".join(notes))


@torch.no_grad()
def paper(lin: Linearization, k: int) -> Triplets:
    """Lanczos on JᵀJ for every token, with full reorthogonalisation, as in the paper.

    With σ = ‖Jv‖ and u = Jv / σ, which loses less to rounding than σ = √λ.

    Args:
        lin: the linear system.
        k: triplets.

    Returns:
        All tokens' triplets.
    """
    T, _, d = lin.shape
    batch = TokenOperators(lin, range(T))
    steps = min(STEPS, d)
    start = torch.randn(T, d, generator=torch.Generator().manual_seed(0))
    found = []
    every = torch.arange(T)
    run = every[-LOCKSTEP:] if T >= GROUPED_FROM else every
    for tokens in run.split(LOCKSTEP):
        basis = start.new_empty(len(tokens), steps, d)
        alpha, beta = start.new_empty(2, len(tokens), steps)
        v = start[tokens] / start[tokens].norm(dim=1, keepdim=True)
        for j in range(steps):
            basis[:, j] = v
            w = batch.rmatvec(batch.matvec(v, tokens), tokens)
            alpha[:, j] = (w * v).sum(1)
            earlier = basis[:, : j + 1]
            for _ in range(2):
                projections = torch.bmm(earlier, w[:, :, None])
                w = torch.baddbmm(w[:, :, None], earlier.mT, projections, alpha=-1)[:, :, 0]
            beta[:, j] = w.norm(dim=1)
            v = w / beta[:, j, None]
        tridiagonal = alpha.diag_embed() + sum(beta[:, :-1].diag_embed(o) for o in (-1, 1))
        vectors = torch.linalg.eigh(tridiagonal.double())[1][..., -k:].flip(-1)
        V = vectors.mT.float() @ basis
        JV = batch.matvec(V.flatten(0, 1), tokens.repeat_interleave(k)).view(len(tokens), k, -1)
        S, order = JV.norm(dim=2).sort(1, descending=True)
        JV, V = (X.take_along_dim(order[..., None], 1) for X in (JV, V))
        found.append((JV / S[..., None], S, V))
    U, S, V = (torch.cat(parts) for parts in zip(*found, strict=True))
    note = "" if len(run) == T else f"{len(run)} of {T} tokens"
    return Triplets(U, S, V, tuple(run.tolist()), note)


def frozen_model(lin: Linearization) -> Callable[[Tensor], Tensor]:
    """Returns the frozen model as a function of the embeddings that autograd can follow.

    Args:
        lin: its linear system, of which the segments are used and not the linear maps.

    Returns:
        Maps (T, d) to (m,).
    """
    model = lin.model
    model.hf_model.requires_grad_(False)

    def frozen(z: Tensor) -> Tensor:
        h = z[None]
        with model.frozen():
            for segment in lin.segments:
                with Freezing(model.compute_dtype, RULES, gate=model.gate, module=segment.name):
                    h = segment.function(linear(h))
        return h[0, 0]

    return frozen


def jacobian(lin: Linearization, k: int, rows: int) -> Triplets:
    """Forms every token's Jacobian by autograd and takes its SVD.

    Args:
        lin: the linear system.
        k: triplets.
        rows: rows of the Jacobian in one call; each call runs the model once more.

    Returns:
        All tokens' triplets.
    """
    T, m, d = lin.shape
    frozen = frozen_model(lin)

    def part(some: slice) -> Tensor:
        found: Tensor = torch.autograd.functional.jacobian(
            lambda z: frozen(z)[some], lin.inputs, vectorize=True
        )
        return found.transpose(0, 1)

    if rows >= m:
        J = part(slice(None))
    else:
        J = lin.inputs.new_empty(T, m, d)
        for i in range(0, m, rows):
            J[:, i : i + rows] = part(slice(i, i + rows))
    U, S, V = J.new_empty(T, k, m), J.new_empty(T, k), J.new_empty(T, k, d)
    for token, matrix in enumerate(J):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        U[token], S[token], V[token] = left[:, :k].mT, values[:k], right[:k]
    return Triplets(U, S, V, tuple(range(T)))


def lowrank(lin: Linearization, k: int, width: int, iterations: int) -> Triplets:
    """Forms every token's Jacobian by VJPs and takes its randomized SVD.

    Args:
        lin: the linear system.
        k: triplets.
        width: vectors of the random subspace.
        iterations: of the subspace.

    Returns:
        All tokens' triplets.
    """
    T, m, d = lin.shape
    torch.manual_seed(0)
    J, eye = lin.inputs.new_empty(T, m, d), torch.eye(m)
    for i in range(0, m, lin.block):
        J[:, i : i + lin.block] = lin.vjp(eye[i : i + lin.block]).transpose(0, 1)
    found = []
    for matrices in J.split(LOCKSTEP):
        left, values, right = torch.svd_lowrank(matrices, q=min(width, m, d), niter=iterations)
        found.append((left[..., :k].mT, values[:, :k], right[..., :k].mT))
    U, S, V = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Triplets(U, S, V, tuple(range(T)))


def sampled_svds(lin: Linearization, k: int, solver: str, job: Job) -> Triplets:
    """Asks SciPy for a sample of tokens, the first and the last among them.

    Args:
        lin: the linear system.
        k: triplets.
        solver: one of SCIPY.
        job: names the folder of the truth, the size of the sample and the limit.

    Returns:
        The sample's triplets, or of as many of its tokens as the limit allows.
    """
    T = lin.shape[0]
    sample = torch.linspace(0, T - 1, min(job.sample, T)).round().long().tolist()[::-1]
    truth = torch.load(Path(job.folder, f"sigma-{T}.pt"))
    found, begun = [], time.perf_counter()
    for token in sample:
        options: dict[str, Any] = {}
        if solver == "arpack":
            options["tol"] = math.sqrt(TOL)  # svds squares it
        if solver == "lobpcg":
            options |= {"tol": math.sqrt(TOL * truth[token, 0] * truth[token, k - 1])}
            options |= {"maxiter": 100}
        rng = np.random.default_rng(0)
        u, s, vt = svds(lin.token(token).to_scipy(), k, solver=solver, rng=rng, **options)
        order = np.argsort(-s)
        found.append([torch.from_numpy(x.copy()) for x in (u.T[order], s[order], vt[order])])
        spent = time.perf_counter() - begun
        if spent * (len(found) + 1) / len(found) > job.limit:
            break
    tokens = tuple(sample[: len(found)])[::-1]
    U, S, V = (torch.stack(parts[::-1]) for parts in zip(*found, strict=True))
    return Triplets(U, S, V, tokens)


def method_of(job: Job, lin: Linearization) -> Callable[[], Triplets]:
    """Returns the method to be timed, ready to run.

    Args:
        job: names the method.
        lin: the linear system.

    Returns:
        A function without arguments.
    """
    k, m = job.k, lin.shape[1]
    if job.task in OURS:
        return lambda: ours(lin, k, job.task)
    if job.task in JACOBIAN:
        return lambda: jacobian(lin, k, m if job.task == "jacobian" else ROWS)
    if job.task in SCIPY:
        return lambda: sampled_svds(lin, k, job.task, job)
    if job.task in LOWRANK:
        width, iterations = (k + 10, 2) if job.task == "lowrank" else (max(3 * k, 48), 6)
        return lambda: lowrank(lin, k, width, iterations)
    return lambda: paper(lin, k)


# --------------------------------------------------------------- in a process of its own


def work(job: Job) -> None:
    """Does a job and leaves what came of it in its folder.

    Args:
        job: what to do.
    """
    torch.set_grad_enabled(job.task in (*JACOBIAN, "synthetic-jacobian"))
    folder = Path(job.folder)
    if job.task in SYNTHETIC:
        figures = synthetic(job)
        (folder / f"{job.task}-{job.length}.json").write_text(json.dumps(figures))
        return
    model = DetachedModel.from_pretrained(
        compute_dtype="float64" if job.task == "truth" else "float32"
    )
    if job.task == "prompt":
        torch.save(write_text(model, job.length), folder / "ids.pt")
        return
    lin = model.linearize(torch.load(folder / "ids.pt")[: job.length])
    if job.task == "truth":
        T, m, d = lin.shape
        eye, J = torch.eye(m, dtype=torch.float64), lin.inputs.new_empty(T, m, d)
        for i in range(0, m, lin.block):
            J[:, i : i + lin.block] = lin.vjp(eye[i : i + lin.block]).transpose(0, 1)
        torch.save(J, folder / f"jacobians-{T}.pt")
        torch.save(torch.linalg.svdvals(J), folder / f"sigma-{T}.pt")
        return
    if job.task in JACOBIAN:  # the graph it will hold is its counterpart of the linearised segments
        frozen_model(lin)(lin.inputs.clone().requires_grad_()).detach()
    else:
        lin.vjp(torch.ones(1, lin.shape[1]))
        lin.jvp(lin.inputs[None])
    figures = rates(lin, job.k) if job.task == "rates" else measure(job, lin)
    (folder / f"{job.task}-{job.length}.json").write_text(json.dumps(figures))


class Gated(OperatorBatch):
    """The Jacobians B diag(g_i) C of y = Σ_i B (g_i ∘ C x_i), with reflections B and C."""

    def __init__(self, length: int, width: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.shape, self.dtype = (length, width, width), torch.float32
        self.device, self.labels, self.inputs = torch.device("cpu"), tuple(range(length)), None
        b, c = torch.randn(2, width, generator=generator)
        self.b, self.c = b / b.norm(), c / c.norm()
        falling = torch.arange(1, width + 1) ** -0.5
        self.g = falling * torch.rand(length, width, generator=generator)

    def matvec(self, V: Tensor, index: Tensor) -> Tensor:
        """J_i v for each row of V."""
        return reflected(reflected(V, self.c) * self.g[index], self.b)

    def rmatvec(self, U: Tensor, index: Tensor) -> Tensor:
        """J_iᵀ u for each row of U."""
        return reflected(reflected(U, self.b) * self.g[index], self.c)

    def rows(self, Y: Tensor) -> Tensor:
        """yᵀ J_i for each row of Y and every token."""
        return reflected(reflected(Y, self.b)[:, None] * self.g, self.c)

    def __call__(self, z: Tensor) -> Tensor:
        """The system itself: (T, d) -> (m,)."""
        return reflected(reflected(z, self.c) * self.g, self.b).sum(0)


def reflected(X: Tensor, v: Tensor) -> Tensor:
    """Returns rows X reflected at the hyperplane orthogonal to the unit vector v."""
    return X - 2 * (X @ v)[..., None] * v


def synthetic(job: Job) -> dict[str, Any]:
    """Measures the memory of one method on a wide system.

    Args:
        job: names the method and k.

    Returns:
        Figures, named as in Row; the worst residual is of the first tokens.
    """
    system = Gated(job.length, WIDE)
    system.rows(torch.ones(1, WIDE))
    baseline, begun = peak_mib(), time.perf_counter()
    if job.task == "synthetic-stream":
        found = svd(system, job.k, method="stream", memory=WIDE_MEMORY)
        ceiling = f"told to work within {WIDE_MEMORY / 2**30:g} GiB"
        note, tokens = f"{int(found.n_iter.max())} streams, {ceiling}", job.length
        U, S, V = (x[:WIDE_SVDS] for x in (found.U, found.S, found.V))
    else:
        z = torch.zeros(job.length, WIDE)
        J = torch.autograd.functional.jacobian(system, z, vectorize=True)
        left, S, right = torch.linalg.svd(J[:, :WIDE_SVDS].transpose(0, 1), full_matrices=False)
        U, S, V = left[..., : job.k].mT, S[:, : job.k], right[:, : job.k]
        note, tokens = f"SVDs of {WIDE_SVDS} tokens only", WIDE_SVDS
    seconds, peak = time.perf_counter() - begun, peak_mib() - baseline
    first = torch.zeros(job.k, dtype=torch.int64)
    gap = system.rmatvec(U[0], first) - S[0, :, None] * V[0]
    residual = float(gap.norm(dim=1).max() / S[0, 0])
    figures = {"status": "measured", "seconds": seconds, "peak_mib": peak, "residual": residual}
    return {**figures, "runs": 1, "tokens": tokens, "note": note}


def write_text(model: DetachedModel, length: int) -> Tensor:
    """Lets the model continue PROMPT.

    Args:
        model: the model.
        length: tokens wanted.

    Returns:
        (length,) ids.
    """
    torch.manual_seed(0)
    ids = model.encode(PROMPT)
    options = {"do_sample": True, "min_new_tokens": length, "max_new_tokens": length}
    written: Tensor = model.hf_model.generate(ids[None], **options)
    return written[0, :length].clone()


def rates(lin: Linearization, k: int) -> dict[str, float]:
    """Predicts how long each method will take, from one block of passes and one SVD.

    Args:
        lin: the linear system, linearised.
        k: triplets.

    Returns:
        Seconds by method.
    """
    T, m, d = lin.shape
    cotangents, tangents = torch.randn(lin.block, m), torch.randn(lin.block, T, d)
    matrix = torch.randn(m, d)
    vjp = _seconds(lambda: lin.vjp(cotangents)) / lin.block
    some = min(lin.block, T)  # vectors that Lanczos has at a time
    two = _seconds(lambda: lin.jvp(tangents[:some])) + _seconds(lambda: lin.vjp(cotangents[:some]))
    two /= some
    one = _seconds(lambda: lin.vjp(cotangents[:1])) + _seconds(lambda: lin.jvp(tangents[:1]))
    full = T * _seconds(lambda: torch.linalg.svd(matrix))
    plan = make_plan(T, m, d, torch.float32, k, vectors=lin.block)
    costs = predict(TokenOperators(lin, range(T)), k)
    seconds = {method: float(cost.seconds or 0) for method, cost in costs.items()}
    seconds["auto"] = seconds[plan.method]
    seconds["paper"] = T * (min(STEPS, d) + k / 2) * two
    seconds |= dict.fromkeys((*JACOBIAN, *LOWRANK), m * vjp + full)
    seconds |= {solver: T * passes * k * one / 2 for solver, passes in SVDS_PASSES.items()}
    return seconds


def _seconds(call: Callable[[], object]) -> float:
    """Seconds of a call after a warm-up, the median of three."""
    call()
    taken = []
    for _ in range(3):
        begun = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def peak_mib() -> float:
    """Returns the most memory this process has held so far, in MiB."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measure(job: Job, lin: Linearization) -> dict[str, Any]:
    """Times a method, and compares what it finds with the truth.

    Args:
        job: names the method.
        lin: the linear system.

    Returns:
        Figures, named as in Row.
    """
    method, baseline = method_of(job, lin), peak_mib()
    taken: list[float] = []
    while not taken or (len(taken) < REPEATS and sum(taken) < SHORT_SECONDS):
        begun = time.perf_counter()
        found = method()
        taken.append(time.perf_counter() - begun)
        if len(taken) == 1:
            peak = peak_mib() - baseline
    every = statistics.median(taken) * job.length / len(found.tokens)
    sampled = len(found.tokens) < job.length
    return {
        "status": "extrapolated" if sampled else "measured",
        "seconds": every,
        "peak_mib": peak,
        **errors(found, Path(job.folder), job.length),
        "runs": len(taken),
        "tokens": len(found.tokens),
        "note": found.note or (f"{len(found.tokens)} of {job.length} tokens" if sampled else ""),
    }


def errors(found: Triplets, folder: Path, length: int) -> dict[str, float]:
    """Compares triplets with Jacobians in float64.

    Args:
        found: the triplets.
        folder: where the Jacobians and their singular values are.
        length: tokens T.

    Returns:
        The worst figures relative to σ₁, named as in Row; 1e300 for what is not finite.
    """
    J = torch.load(folder / f"jacobians-{length}.pt", mmap=True)
    truth = torch.load(folder / f"sigma-{length}.pt")
    worst = {"sigma": 0.0, "residual": 0.0}
    for U, S, V, token in zip(found.U, found.S, found.V, found.tokens, strict=True):
        U, S, V, A, expected = U.double(), S.double(), V.double(), J[token], truth[token]
        right = (V @ A.T - S[:, None] * U).norm(dim=1)
        left = (U @ A - S[:, None] * V).norm(dim=1)
        figures = {"sigma": S - expected[: len(S)], "residual": torch.cat([right, left])}
        for name, x in figures.items():
            largest = (x.abs().max() / expected[0]).nan_to_num(1e300, 1e300)
            worst[name] = max(worst[name], float(largest))
    return worst


# --------------------------------------------------------------------------- the parent


def run(job: Job, timeout: float | None = None) -> str:
    """Does a job in a process of its own.

    Args:
        job: what to do.
        timeout: seconds after which it is stopped.

    Returns:
        The last line of what it said if it failed, else nothing.
    """
    command = [sys.executable, __file__, "--job", json.dumps(asdict(job))]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    if ended.returncode == 0:
        return ""
    lines = [line for line in ended.stderr.splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit status {ended.returncode}"


def prepare(job: Job) -> None:
    """Does a job that all others build on.

    Args:
        job: what to do.

    Raises:
        RuntimeError: where it fails.
    """
    if said := run(job):
        raise RuntimeError(f"{job.task}, T = {job.length}: {said}")


def attempt(job: Job, predicted: float, auto: float | None) -> Row:
    """Runs a method, unless it would take too long.

    Args:
        job: names the method.
        predicted: seconds that it will run, as far as can be told.
        auto: seconds that auto took for all tokens, if it is known.

    Returns:
        What came of it.
    """
    row: dict[str, Any] = {"method": job.task, "predicted_seconds": predicted}
    share = job.sample / job.length if job.task in SCIPY else 1.0
    if job.task == "paper" and job.length >= GROUPED_FROM:
        share = LOCKSTEP / job.length
    running = predicted * min(share, 1)
    if running > job.limit:
        expected = f"predicted {predicted:.3g} s"
        if auto:
            expected += f", {predicted / auto:.3g} × auto"
        return Row(**row, status="skipped", note=expected)
    timeout = 3 * job.limit + 120  # for a prediction that was wrong, and all that is not timed
    try:
        said = run(job, timeout)
    except subprocess.TimeoutExpired:
        return Row(**row, status="stopped", note=f"after {timeout:.0f} s")
    if said:
        return Row(**row, status="failed", note=said)
    figures = json.loads(Path(job.folder, f"{job.task}-{job.length}.json").read_text())
    auto = figures["seconds"] if job.task == "auto" else auto
    return Row(**row, **figures, ratio=figures["seconds"] / auto if auto else None)


def _table(length: int, k: int, rows: list[Row], system: str = "bundled model") -> Table:
    """Returns the rows of one length as a table."""
    table = Table(title=f"{system}, all {length} tokens, k = {k}, float32")
    table.add_column("", no_wrap=True)
    for column in ("seconds", "× auto", "MiB", "σ error", "residual"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for row in rows:
        cells = [
            "" if value is None else f"{value:{form}}"
            for value, form in (
                (row.seconds, ".3g"),
                (row.ratio, ".3g"),
                (row.peak_mib, ".0f"),
                (row.sigma, ".0e"),
                (row.residual, ".0e"),
            )
        ]
        status = "" if row.status == "measured" else row.status
        table.add_row(row.method, *cells, ": ".join(filter(None, (status, row.note))))
    return table


def main(
    lengths: Annotated[
        str, typer.Option(help="Sequence lengths T, separated by commas.")
    ] = "8,32,64,192,512",
    k: Annotated[int, typer.Option(help="Triplets for each token.")] = 16,
    limit: Annotated[
        float, typer.Option(help="Seconds; a method predicted to run longer is skipped.")
    ] = 300.0,
    sample: Annotated[int, typer.Option(help="Tokens that SciPy's solvers are given.")] = 4,
    methods: Annotated[
        str, typer.Option(help="Methods to run, separated by commas; all ratios need auto.")
    ] = ",".join(METHODS),
    memory: Annotated[
        bool, typer.Option(help="Also compare the memory on a wide synthetic system.")
    ] = True,
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write; default: benchmarks/results/peers.json."),
    ] = None,
    job: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Print a table for each length and write them all as JSON.

    Lengths that an earlier run on the same machine with the same settings wrote are kept.

    Raises:
        BadParameter: where a method is not known.
    """
    if job is not None:
        work(Job(**json.loads(job)))
        return
    if unknown := set(methods.split(",")) - set(METHODS):
        raise typer.BadParameter(f"unknown methods {', '.join(sorted(unknown))}")
    chosen = [method for method in METHODS if method in methods.split(",")]
    sizes = [int(length) for length in lengths.split(",")]
    console, results = Console(), []
    with tempfile.TemporaryDirectory() as folder:
        prepare(Job("prompt", max(sizes), k, sample, limit, folder))
        for length in sizes:
            for task in ("truth", "rates"):
                prepare(Job(task, length, k, sample, limit, folder))
            predicted = json.loads(Path(folder, f"rates-{length}.json").read_text())
            rows: list[Row] = []
            auto = None
            for method in chosen:
                one = Job(method, length, k, sample, limit, folder)
                rows.append(attempt(one, predicted[method], auto))
                if method == "auto":
                    auto = rows[-1].seconds
            Path(folder, f"jacobians-{length}.pt").unlink()
            console.print(_table(length, k, rows))
            results.append({"tokens": length, "methods": [asdict(row) for row in rows]})
        wide: list[Row] = []
        for task in SYNTHETIC if memory else ():
            one = Job(task, WIDE_TOKENS, k, sample, limit, folder)
            wide.append(attempt(one, 0.0, None))
        if memory:
            console.print(_table(WIDE_TOKENS, k, wide, f"synthetic, d = {WIDE}"))
    settings = {"k": k, "dtype": "float32", "limit_seconds": limit, "sample": sample}
    path = out or RESULTS / "peers.json"
    path.parent.mkdir(exist_ok=True)
    figures = {"machine": machine(), **settings}
    earlier = json.loads(path.read_text()) if path.exists() else {}
    if any(earlier.get(name) != value for name, value in figures.items()):
        earlier = {}
    others = [row for row in earlier.get("lengths", []) if row["tokens"] not in sizes]
    figures["lengths"] = sorted([*others, *results], key=lambda row: row["tokens"])
    figures["synthetic"] = earlier.get("synthetic")
    if memory:
        synthetic = {"tokens": WIDE_TOKENS, "d": WIDE, "methods": [asdict(row) for row in wide]}
        figures["synthetic"] = synthetic
    path.write_text(json.dumps(figures, indent=2) + "\n")
    console.print(f"written to {path.name}")


if __name__ == "__main__":
    typer.run(main)
