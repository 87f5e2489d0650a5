"""Matrices with prescribed spectra, the operators that break SVD codes, and the two comparisons."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from elm_lanczos.operators import LinearOperator
from elm_lanczos.svd import SVDResult, svd
from elm_lanczos.svd.plan import make_plan
from elm_lanczos.svd.solve import as_batch

METHODS = ("lanczos", "stream", "dense")
DTYPES = (torch.float32, torch.float64)


def with_spectrum(
    values: object, m: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Tensor:
    """A random m×d matrix with the given singular values, followed by zeros."""
    generator = torch.Generator().manual_seed(seed)
    small = min(m, d)
    spectrum = torch.zeros(small, dtype=torch.float64)
    given = torch.as_tensor(values, dtype=torch.float64)[:small]
    spectrum[: len(given)] = given
    U, V = (
        torch.linalg.qr(torch.randn(size, small, generator=generator, dtype=torch.float64))[0]
        for size in (m, d)
    )
    return ((U * spectrum) @ V.T).to(dtype)


def powers(exponent: float, count: int) -> Tensor:
    """i^exponent for i = 1 … count."""
    return torch.arange(1, count + 1, dtype=torch.float64) ** exponent


def lauchli(n: int, mu: float, wide: bool = False) -> Tensor:
    """Läuchli's (n+1)×n matrix: a row of ones over μI; σ = √(n + μ²) once and μ n−1 times."""
    matrix = torch.cat([torch.ones(1, n), mu * torch.eye(n)]).double()
    return matrix.T.contiguous() if wide else matrix


@dataclass(frozen=True)
class Case:
    """An operator that breaks SVD codes, with (float32, float64) tolerances relative to σ₁.

    Origin and tolerances are those of the design's table of hard cases; where that gives absolute
    numbers they are divided by σ₁ or tightened.
    """

    name: str
    build: Callable[[], Tensor]
    k: int
    sigma: tuple[float, float] = (1e-5, 1e-12)
    residual: tuple[float, float] = (1e-5, 1e-10)
    plan: dict[str, int] | None = None

    def __str__(self) -> str:
        return self.name


CASES = [
    Case(
        "repeated",  # RAFT
        lambda: with_spectrum([10, 10, 10, 9, 9, 8, 7, 6, 1, 0.5], 64, 40),
        6,
    ),
    Case(
        "clustered",  # RAFT
        lambda: with_spectrum(
            [10, 9.999, 9.998, 9.5, 9.499, 9, 8.999, 8.5, *powers(-1, 24)], 48, 32
        ),
        8,
    ),
    Case(
        "rotated clusters",  # RAFT
        lambda: with_spectrum(
            [10, 9.9995, 9.999, 7, 6.9995, 6.999, 5, 4.9995, *powers(-1, 40)], 64, 48, seed=3
        ),
        8,
    ),
    Case("rank 5, tall", lambda: with_spectrum([5, 4, 3, 2, 1], 96, 28), 4),
    Case("rank 5, tall, k > rank", lambda: with_spectrum([5, 4, 3, 2, 1], 96, 28), 8),
    Case("rank 5, wide", lambda: with_spectrum([5, 4, 3, 2, 1], 24, 96), 4),
    Case("rank 5, wide, k > rank", lambda: with_spectrum([5, 4, 3, 2, 1], 24, 96), 8),
    Case(
        "must restart",  # RAFT
        lambda: with_spectrum(20 * 0.97 ** torch.arange(64.0), 96, 64),
        20,
        plan={"basis": 30},
    ),
    Case(
        "plateau of 30, then a gap", lambda: with_spectrum([1.0] * 30 + [0.1] * 170, 200, 200), 10
    ),
    Case(
        "plateau of 30, then a decay",  # RAFT: σ to 1e-3 in float32, and a restart
        lambda: with_spectrum([1.0] * 30 + [*(0.5 * 0.97 ** torch.arange(150.0))], 200, 200),
        10,
        plan={"basis": 14},
    ),
    Case(
        "sloped plateau, then a gap",
        lambda: with_spectrum(
            [*(1 - 1e-3 * torch.arange(20.0)), *(0.2 * powers(-1, 100))], 120, 120
        ),
        8,
        plan={"basis": 16},
    ),
    Case("ones, k > rank", lambda: torch.ones(30, 30).double(), 3),  # SciPy
    Case("zero", lambda: torch.zeros(30, 20).double(), 3, sigma=(0.0, 0.0)),  # CuPy #10098
    Case("identity", lambda: torch.eye(40).double(), 6),  # SciPy
    Case(
        "graded",  # SciPy; the ratio 10 in both dtypes here, 100 in float64 below
        lambda: torch.eye(20, 21).double() * 10.0 ** -torch.arange(21.0).double(),
        4,
    ),
    Case("diagonal with zeros", lambda: torch.diag(torch.tensor([1.0, 2, 3, 4, 5, 0, 0, 0, 0])), 4),
    Case("rank 10, k = 20", lambda: with_spectrum(powers(1, 10).flip(0), 300, 300), 20),  # irlba
    Case("tiny and tinier", lambda: with_spectrum([1e-5] + [1e-9] * 9, 40, 30), 4),  # irlba
    Case("thin Hilbert", lambda: 1 / (torch.arange(200)[:, None] + torch.arange(1, 5.0)), 3),
    Case("fat", lambda: with_spectrum([3, 2, 1], 3, 100), 2),  # SciPy PROPACK
    Case("Läuchli 101×100", lambda: lauchli(100, 1.5e-8), 4),  # SLEPc
    Case("Läuchli, tall, μ = 0.1", lambda: lauchli(50, 0.1), 15),  # PRIMME
    Case("Läuchli, wide, μ = 0.1", lambda: lauchli(50, 0.1, wide=True), 15),  # PRIMME
    Case(
        "Grcar",  # SLEPc
        lambda: torch.tril(torch.triu(torch.ones(30, 30), 0), 3) - torch.diag(torch.ones(29), -1),
        6,
    ),
    Case("bidiagonal", lambda: torch.eye(20, 22) + torch.diag(torch.ones(21), 1)[:20, :22], 4),
    Case("k = n", lambda: with_spectrum(powers(-0.5, 12), 12, 12), 12),
    Case("k = n − 1", lambda: with_spectrum(powers(-0.5, 12), 15, 12), 11),
    Case("1 × n", lambda: with_spectrum([2.0], 1, 30), 1),
    Case("n × 1", lambda: with_spectrum([2.0], 30, 1), 1),
    Case("1 × 1", lambda: torch.full((1, 1), -3.0), 1),
    Case("slow decay", lambda: with_spectrum(powers(-0.5, 128), 128, 128), 8),
]


def solve_with(A: object, k: int, method: str, **changes: object) -> SVDResult:
    """`svd` under a plan of which some fields are changed."""
    batch = as_batch(A)
    plan = make_plan(*batch.shape, batch.dtype, k, method)
    if "basis" in changes and method != "lanczos":
        changes = {name: value for name, value in changes.items() if name != "basis"}
    return svd(batch, k, plan=replace(plan, **changes))


def compare_matmat(operator: LinearOperator, dense: Tensor) -> None:
    """Compare an operator with its matrix from both sides, in every form of operand."""
    m, n = dense.shape
    assert operator.shape == (m, n)
    assert operator.dtype == dense.dtype
    # Sums of max(m, n) products in either order differ by rounding of their largest terms.
    tol = 8 * math.sqrt(max(m, n)) * torch.finfo(dense.dtype).eps * max(float(dense.norm()), 1e-30)
    generator = torch.Generator().manual_seed(1)
    exported = operator.to_scipy()
    assert isinstance(exported, scipy.sparse.linalg.LinearOperator)
    assert operator.T.T is operator
    for A, M, S in ((operator, dense, exported), (operator.T, dense.T, exported.T)):
        X = torch.randn(M.shape[1], 3, generator=generator, dtype=torch.float64).to(dense.dtype)
        for operand in (X, X[:, 0], X[:, :1], X[:, 1:1].reshape(M.shape[1], 0)):
            product = A @ operand
            assert product.dtype == dense.dtype
            assert product.shape == (M @ operand).shape
            torch.testing.assert_close(product, M @ operand, rtol=0, atol=tol * 4)
        np.testing.assert_allclose(S.matmat(X.numpy()), (M @ X).numpy(), rtol=0, atol=tol * 4)
        np.testing.assert_allclose(S.matvec(X[:, 0].numpy()), (M @ X[:, 0]), rtol=0, atol=tol * 4)
        assert S.matvec(X[:, 0].numpy()).shape == (M.shape[0],)
    # Beside rounding, the figure grows where A v is small by cancellation: with few rows.
    few = max(1.0, 100 / m**2)
    assert operator.dot_test() <= few * (1e-12 if dense.dtype == torch.float64 else 1e-5)


def check_triplets(
    result: SVDResult,
    dense: Tensor,
    sigma: tuple[float, float] = (1e-5, 1e-12),
    residual: tuple[float, float] = (1e-5, 1e-10),
) -> None:
    """Check triplets (n, k, ·) of explicit matrices (n, m, d) against NumPy's SVD in float64.

    Tolerances are (float32, float64), relative to σ₁; orthogonality is checked to 1e-5 / 1e-12.
    """
    which = 0 if result.S.dtype == torch.float32 else 1
    k = result.S.shape[1]
    for i, matrix in enumerate(dense.double().numpy()):
        expected = np.linalg.svd(matrix, compute_uv=False)[:k]
        U, S, V = (x[i].double().numpy() for x in (result.U, result.S, result.V))
        error = np.abs(S - expected)
        assert (error <= sigma[which] * expected[0]).all(), (i, error.max() / expected[0])
        assert (error <= result.error_bound[i].double().numpy()).all(), i
        assert (np.diff(S) <= 0).all() and (S >= 0).all()
        for rows in (U, V):
            assert np.abs(rows @ rows.T - np.eye(k)).max() <= (1e-5, 1e-12)[which]
        right = np.linalg.norm(matrix @ V.T - U.T * S, axis=0)
        left = np.linalg.norm(matrix.T @ U.T - V.T * S, axis=0)
        worst = np.maximum(right, left)
        assert (worst <= residual[which] * expected[0]).all(), (i, worst.max() / expected[0])
        # The residuals reported are those of the vectors reported, up to rounding.
        rounding = 64 * torch.finfo(result.S.dtype).eps * expected[0]
        assert (worst <= result.residual[i].double().numpy() + rounding).all(), i


class Forbid(TorchDispatchMode):
    """Fails on any tensor operation whose result has at least `limit` elements."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else (result,):
            if isinstance(part, Tensor):
                self.largest = max(self.largest, part.numel())
                assert part.numel() < self.limit, f"{func} made {tuple(part.shape)}"
        return result


class DiagonalPlusLowRank(LinearOperator):
    """diag(a) + P Qᵀ, of which no matrix ever exists."""

    def __init__(self, a: Tensor, P: Tensor, Q: Tensor) -> None:
        super().__init__((len(a), len(a)), a.dtype, a.device)
        self.a, self.P, self.Q = a, P, Q

    def _matmat(self, X: Tensor) -> Tensor:
        return self.a[:, None] * X + self.P @ (self.Q.T @ X)

    def _rmatmat(self, Y: Tensor) -> Tensor:
        return self.a[:, None] * Y + self.Q @ (self.P.T @ Y)


class ReflectedDiagonal(LinearOperator):
    """(I − 2wwᵀ) diag(a): prescribed singular values in any dimension, no matrix."""

    def __init__(self, a: Tensor, seed: int = 0) -> None:
        super().__init__((len(a), len(a)), a.dtype, a.device)
        generator = torch.Generator().manual_seed(seed)
        w = torch.randn(len(a), 1, generator=generator, dtype=torch.float64)
        self.a, self.w = a[:, None], (w / w.norm()).to(a.dtype)

    def _matmat(self, X: Tensor) -> Tensor:
        return self._reflect(self.a * X)

    def _rmatmat(self, Y: Tensor) -> Tensor:
        return self.a * self._reflect(Y)

    def _reflect(self, X: Tensor) -> Tensor:
        return X - 2 * self.w @ (self.w.T @ X)


class ExplicitChain:
    """A linearisation given by its matrices (T, m, d): what TokenOperators need of one."""

    def __init__(self, J: Tensor, inputs: Tensor) -> None:
        self.J, self.inputs = J, inputs
        self.output = torch.einsum("tmd,td->m", J, inputs)
        self.vectors = 0

    def jvp(self, tangents: Tensor) -> Tensor:
        self.vectors += len(tangents)
        return torch.einsum("tmd,btd->bm", self.J, tangents)

    def vjp(self, cotangents: Tensor) -> Tensor:
        self.vectors += len(cotangents)
        return torch.einsum("tmd,bm->btd", self.J, cotangents)
