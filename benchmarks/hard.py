"""Operators that break SVD codes: what our methods and SciPy's `svds` make of each.

Every operator is small enough for a dense SVD in float64 to be the truth. Its leading triplets are
asked of `lanczos`, `stream` and `dense`, and of ARPACK, PROPACK and LOBPCG through SciPy, all with
default tolerances and seed 0. What is judged is trust: an answer must be right or say that it is
not.

| verdict | what happened |
|---|---|
| right | σ, orthogonality of U and of V, and both residuals are within the case's tolerance |
| wrong, says so | a status, a warning of any kind, or an error that speaks of convergence |
| WRONG, silent | the answer was returned without complaint |
| refused | any other error |

Cases and tolerances follow the test suites of RAFT, SciPy, CuPy, PRIMME, SLEPc and irlba, absolute
numbers divided by σ₁; the ends of the sizes and of float32, and Jacobians of the bundled model, are
added. One iteration at a tolerance of zero, equal seeds and mixed batches are not here: they have
no prescribed answer, or no other solver takes them.

    OMP_NUM_THREADS=1 python benchmarks/hard.py
"""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import scipy
import torch
import typer
from machine import RESULTS, machine
from rich.console import Console
from rich.table import Table
from scipy.sparse.linalg import aslinearoperator, svds
from torch import Tensor

from elm_lanczos import DetachedModel, svd
from elm_lanczos.svd.plan import make_plan

OURS = ("lanczos", "stream", "dense")
SCIPY = ("arpack", "propack", "lobpcg")
VERDICTS = ("right", "wrong, says so", "WRONG, silent", "refused")


@dataclass(frozen=True)
class Tolerance:
    """The largest errors of a right answer.

    Attributes:
        sigma: of any singular value, relative to σ₁.
        orthogonality: of any entry of UᵀU − I and VᵀV − I.
        residual: ‖Av − σu‖ and ‖Aᵀu − σv‖ of any triplet, relative to σ₁.
    """

    sigma: float
    orthogonality: float
    residual: float


# For what a suite leaves open: in float32 what RAFT asks where σ₁ = 10, in float64 about √ε for σ
# and orthogonality, so that no verdict hangs on a figure which nobody asked for.
USUAL = {
    torch.float32: Tolerance(2e-3 / 10, 2e-3, 2e-2 / 10),
    torch.float64: Tolerance(1e-8, 1e-8, 1e-5),
}


@dataclass(frozen=True)
class Case:
    """An operator and what is asked of it.

    Attributes:
        name: the case.
        matrix: (m, d), float64; rounded to dtype before anyone sees it.
        k: triplets asked for.
        dtype: float32 or float64.
        tolerance: the largest errors of a right answer.
        basis: largest Krylov basis of lanczos, so small that it must restart; the others, and
            lanczos where it is None, keep their own.
    """

    name: str
    matrix: Tensor
    k: int
    dtype: torch.dtype
    tolerance: Tolerance
    basis: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What a solver made of a case.

    Attributes:
        verdict: one of VERDICTS.
        said: its status, warnings or error, in one line; empty where it did not complain.
        sigma: worst error of a singular value, relative to σ₁; None after an error.
        orthogonality: worst entry of UᵀU − I and VᵀV − I.
        residual: worst of both residuals, relative to σ₁.
        restarts: thick restarts, of lanczos.
    """

    verdict: str
    said: str
    sigma: float | None = None
    orthogonality: float | None = None
    residual: float | None = None
    restarts: int | None = None


def with_spectrum(values: Any, m: int, d: int) -> Tensor:
    """Makes a matrix with random singular vectors.

    Args:
        values: its leading singular values; the others are zero.
        m: rows.
        d: columns.

    Returns:
        (m, d), float64.
    """
    generator = torch.Generator().manual_seed(0)
    given = torch.as_tensor(values, dtype=torch.float64)
    spectrum = torch.zeros(min(m, d), dtype=torch.float64)
    spectrum[: len(given)] = given
    U, V = (
        torch.linalg.qr(torch.randn(n, min(m, d), generator=generator, dtype=torch.float64))[0]
        for n in (m, d)
    )
    return (U * spectrum) @ V.T


def lauchli(n: int, mu: float) -> Tensor:
    """Makes Läuchli's matrix, a row of ones over μI: σ = √(n + μ²) once and μ n − 1 times.

    Args:
        n: columns.
        mu: the small value.

    Returns:
        (n + 1, n), float64.
    """
    ones = torch.ones(1, n, dtype=torch.float64)
    return torch.cat([ones, mu * torch.eye(n, dtype=torch.float64)])


@cache
def jacobians() -> Tensor:
    """Returns the Jacobians of the bundled model's four last tokens, (4, m, d), float64."""
    lin = DetachedModel.from_pretrained(compute_dtype="float64").linearize("The bridge out of")
    return lin.vjp(torch.eye(len(lin.output), dtype=torch.float64)).transpose(0, 1)[-4:]


def cases(dtype: torch.dtype) -> list[Case]:
    """Makes the operators that break SVD codes.

    Args:
        dtype: float32 or float64.

    Returns:
        Every case that makes sense in it.
    """
    found: list[Case] = []

    def add(
        name: str,
        matrix: Tensor,
        k: int,
        tolerances: dict[str, tuple[float, float]] | None = None,  # (float32, float64), not USUAL
        basis: int | None = None,
    ) -> None:
        own = {figure: pair[dtype == torch.float64] for figure, pair in (tolerances or {}).items()}
        tolerance = replace(USUAL[dtype], **own)
        found.append(Case(name, matrix.double(), k, dtype, tolerance, basis))

    eps = torch.finfo(dtype).eps
    tail = 1 / torch.arange(1.0, 41)
    decay = 0.97 ** torch.arange(150.0)

    # RAFT
    orthonormal = {"orthogonality": (2e-3, 1e-10)}
    raft = {"sigma": (2e-3 / 10, 1e-8 / 10), "residual": (2e-2 / 10, 1e-5 / 10), **orthonormal}
    add("repeated", with_spectrum([10, 10, 10, 9, 9, 8, 7, 6, 1, 0.5], 64, 40), 6)
    clustered = [10, 9.999, 9.998, 9.5, 9.499, 9, 8.999, 8.5, *tail[:24]]
    closer = {"sigma": (1e-3 / 10, 1e-8 / 10), "orthogonality": (2e-4, 1e-10)}
    add("clustered", with_spectrum(clustered, 48, 32), 8, closer)
    rotated = [10, 9.9995, 9.999, 7, 6.9995, 6.999, 5, 4.9995, *tail]
    add("rotated clusters", with_spectrum(rotated, 64, 48), 8, raft)
    for shape, m, d in (("tall", 96, 28), ("wide", 24, 96)):
        matrix = with_spectrum([5, 4, 3, 2, 1], m, d)
        for asked, k in (("", 4), (", k > rank", 8)):
            name = f"rank 5, {shape}{asked}"
            add(name, matrix, k, {"sigma": (2e-3 / 5, 1e-8 / 5), **orthonormal})
    matrix = with_spectrum(20 * decay[:64], 96, 64)
    strict = {"sigma": (1e-3 / 20, 1e-10 / 20), "residual": (1e-4, 1e-8)}
    add("20·0.97^i", matrix, 20, strict, basis=30)
    flat = {"sigma": (1e-3, 1e-8)}
    add("plateau, then a gap", with_spectrum([1.0] * 30 + [0.1] * 170, 200, 200), 10, flat)
    plateau = with_spectrum([1.0] * 30 + [*(0.5 * decay)], 200, 200)
    add("plateau, then a decay", plateau, 10, flat, basis=14)
    sloped = with_spectrum([*(1 - 1e-3 * torch.arange(20.0)), *(0.2 * tail)], 120, 120)
    add("sloped plateau, then a gap", sloped, 8, flat, basis=16)

    # SciPy and CuPy
    add("ones, k > rank", torch.ones(30, 30), 3, orthonormal)
    add("zero", torch.zeros(30, 20), 3, {"sigma": (0.0, 0.0), **orthonormal})
    add("identity", torch.eye(40), 6, orthonormal)
    ratio = 0.1 if dtype == torch.float32 else 0.01
    graded = with_spectrum(ratio ** torch.arange(20.0).double(), 20, 21)
    add("graded", graded, 4, {"orthogonality": (1e-3, 1e-3), "residual": (1e-3, 1e-3)})
    add("diag(0, 1, 2)", torch.diag(torch.arange(3.0)), 2)
    hilbert = 1 / (torch.arange(200.0).double()[:, None] + torch.arange(1, 5))
    add("thin Hilbert", hilbert, 3, {"sigma": (1e-4, 1e-8)})
    add("fat", with_spectrum([3, 2, 1], 3, 100), 2, {"sigma": (1e-4, 1e-8)})

    # PRIMME
    for n in (2, 50, 100):
        k = min(15, n - 1)
        bound = (0.1 * math.sqrt(eps) + eps) * math.sqrt(k)
        for shape, matrix in (("tall", lauchli(n, 0.1)), ("wide", lauchli(n, 0.1).T)):
            name = f"Läuchli, {shape}, n = {n}"
            add(name, matrix, k, {"sigma": (bound, bound), "residual": (bound, bound)})

    # SLEPc, whose σ are exact to 1e-8 in float64
    roots = {"√ε": math.sqrt(eps)}
    if dtype == torch.float32:
        roots["1.5e-8"] = 1.5e-8  # SLEPc's own matrix, of rank one to float32
    for name, mu in roots.items():
        add(f"Läuchli 101×100, μ = {name}", lauchli(100, mu), 4, {"sigma": (2e-4, 1e-9)})
    grcar = torch.ones(30, 30).triu().tril(3) - torch.diag(torch.ones(29), -1)
    add("Grcar", grcar, 6)
    add("bidiagonal", torch.eye(20, 22) + torch.eye(21, 22)[1:], 4)

    # irlba, whose residuals are below 1e-5 σ₁
    known = {"sigma": (1e-5, 1e-9), "residual": (1e-5, 1e-5)}
    add("diagonal with zeros", torch.diag(torch.tensor([1.0, 2, 3, 4, 5, 0, 0, 0, 0])), 4, known)
    add("rank 10, k = 20", with_spectrum(range(10, 0, -1), 1000, 1000), 20, known)
    add("1e-5 and nine of 1e-9", with_spectrum([1e-5] + [1e-9] * 9, 40, 30), 4, known)

    # The ends of k and of the sizes
    exact = {"sigma": (1e-5, 1e-12)}
    for name, m, k in (("k = n", 12, 12), ("k = n − 1", 15, 11), ("k = n − 2", 15, 10)):
        add(name, with_spectrum(1 / torch.arange(1.0, 13).sqrt(), m, 12), k, exact)
    add("1 × n", with_spectrum([2.0], 1, 30), 1, exact)
    add("n × 1", with_spectrum([2.0], 30, 1), 1, exact)
    add("1 × 1", torch.full((1, 1), -3.0), 1, exact)

    if dtype == torch.float32:
        for scale in (1e30, 1e-30):
            matrix = with_spectrum(torch.linspace(2, 0.1, 40), 48, 40)
            add(f"scaled by {scale:.0e}", scale * matrix, 6, exact)
    for token, matrix in enumerate(jacobians(), start=1):
        add(f"transformer, token {token} of 4", matrix, 16, exact)
    return found


def attempt(case: Case, solver: str) -> Outcome:
    """Runs a solver and judges what it returns.

    Args:
        case: the operator and what is asked of it.
        solver: one of OURS or SCIPY.

    Returns:
        The verdict and its figures.
    """
    solve = solve_ours if solver in OURS else solve_scipy
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            U, S, V, said, restarts = solve(case, solver)
        except Exception as error:  # whatever a peer may raise is what is measured
            says = "converge" in str(error).lower()
            return Outcome(VERDICTS[1 if says else 3], _line(error))
    said = "; ".join([said] * bool(said) + sorted({_line(w.message) for w in caught}))
    reached = errors(case, U, S, V)
    allowed = asdict(case.tolerance)
    right = all(reached[name] <= allowed[name] for name in allowed)
    verdict = VERDICTS[0 if right else 1 if said else 2]
    return Outcome(verdict, said, **reached, restarts=restarts)


def solve_ours(case: Case, method: str) -> tuple[Tensor, Tensor, Tensor, str, int | None]:
    """Asks this package.

    Args:
        case: the operator and what is asked of it.
        method: 'lanczos' or 'stream'.

    Returns:
        U (k, m), S (k,), V (k, d), what the status says if it did not converge, and restarts.
    """
    matrix = case.matrix.to(case.dtype)
    plan = None
    if case.basis and method == "lanczos":
        m, d = matrix.shape
        plan = make_plan(1, m, d, case.dtype, case.k, method)
        plan = replace(plan, basis=case.basis)
    result = svd(matrix, case.k, method=method, seed=0, plan=plan)
    said = "" if result.converged.item() else "status NOT_CONVERGED"
    restarts = int(result.n_restarts) if method == "lanczos" else None
    return result.U[0], result.S[0], result.V[0], said, restarts


def solve_scipy(case: Case, solver: str) -> tuple[Tensor, Tensor, Tensor, str, None]:
    """Asks SciPy.

    Args:
        case: the operator and what is asked of it.
        solver: 'arpack', 'propack' or 'lobpcg'.

    Returns:
        U (k, m), S (k,), V (k, d), descending; SciPy has no status and tells no restarts.
    """
    A = aslinearoperator(case.matrix.to(case.dtype).numpy())
    u, s, vt = svds(A, case.k, solver=solver, rng=np.random.default_rng(0))
    order = np.argsort(-s)
    U, S, V = (torch.from_numpy(x.copy()) for x in (u.T[order], s[order], vt[order]))
    return U, S, V, "", None


def errors(case: Case, U: Tensor, S: Tensor, V: Tensor) -> dict[str, float]:
    """Compares triplets with the dense SVD, in float64.

    Args:
        case: the operator they are of.
        U: (k, m).
        S: (k,), descending.
        V: (k, d).

    Returns:
        The worst figures, named as in Tolerance; 1e300 for what is not finite.
    """
    A = case.matrix.to(case.dtype).double()
    U, S, V = U.double(), S.double(), V.double()
    expected = torch.linalg.svdvals(A)[: case.k]
    largest = float(expected[0]) or 1.0
    eye = torch.eye(case.k, dtype=torch.float64)
    right = (V @ A.T - S[:, None] * U).norm(dim=1)
    left = (U @ A - S[:, None] * V).norm(dim=1)
    worst = {
        "sigma": (S - expected).abs().max() / largest,
        "orthogonality": torch.stack([X @ X.T - eye for X in (U, V)]).abs().max(),
        "residual": torch.cat([right, left]).max() / largest,
    }
    return {name: float(x.nan_to_num(1e300, 1e300)) for name, x in worst.items()}


def _line(message: object) -> str:
    """Returns a message's first line."""
    return " ".join(str(message).strip().partition("\n")[0].split())


def _cell(case: Case, outcome: Outcome) -> str:
    """Returns the verdict, with the figure that went furthest beyond its tolerance."""
    colour = dict(zip(VERDICTS, ("green", "yellow", "bold red", "blue"), strict=True))
    text = outcome.verdict
    if outcome.verdict == "right" and outcome.said:
        text = "right, but warns"
    elif outcome.verdict != "right" and outcome.sigma is not None:
        allowed = asdict(case.tolerance)
        beyond = {name: getattr(outcome, name) / (allowed[name] or 1e-300) for name in allowed}
        name = max(beyond, key=beyond.__getitem__)
        text += f": {name} {getattr(outcome, name):.0e}"
    return f"[{colour[outcome.verdict]}]{text}[/]"


def main(
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write; default: benchmarks/results/hard.json."),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(help="Run the cases whose names contain this; written only with --out."),
    ] = None,
) -> None:
    """Print the verdicts and write them as JSON.

    Raises:
        BadParameter: where no case has the name.
    """
    solvers = (*OURS, *SCIPY)
    rows, counts = [], {solver: Counter[str]() for solver in solvers}
    console = Console()
    for dtype in (torch.float32, torch.float64):
        precision = str(dtype).removeprefix("torch.")
        table = Table(title=precision)
        for column in ("", *solvers):
            table.add_column(column)
        for case in cases(dtype):
            if only and only not in case.name:
                continue
            outcomes = {solver: attempt(case, solver) for solver in solvers}
            table.add_row(case.name, *(_cell(case, outcome) for outcome in outcomes.values()))
            for solver, outcome in outcomes.items():
                counts[solver][outcome.verdict] += 1
            rows.append(
                {
                    "case": case.name,
                    "dtype": precision,
                    "shape": list(case.matrix.shape),
                    "k": case.k,
                    "basis": case.basis,
                    "tolerance": asdict(case.tolerance),
                    "outcomes": {solver: asdict(outcome) for solver, outcome in outcomes.items()},
                }
            )
        if table.row_count:
            console.print(table)
    if not rows:
        raise typer.BadParameter(f"no case has {only!r} in its name")
    total = Table(title=f"{len(rows)} cases; SciPy {scipy.__version__}")
    for column in ("", *solvers):
        total.add_column(column, justify="right" if column else "left")
    for verdict in VERDICTS:
        total.add_row(verdict, *(str(counts[solver][verdict]) for solver in solvers))
    console.print(total)
    path = out or (None if only else RESULTS / "hard.json")
    if path is not None:
        counted = {solver: {v: counts[solver][v] for v in VERDICTS} for solver in solvers}
        figures = {"scipy": scipy.__version__, "counts": counted, "cases": rows}
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"machine": machine(), **figures}, indent=2) + "\n")
        console.print(f"written to {path.name}")


if __name__ == "__main__":
    typer.run(main)
