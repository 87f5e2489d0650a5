"""Matrix-free linear operators on torch tensors, one at a time and in batches of one shape.

An operator is known only by its two products, ``A x`` and ``Aᵀ y``; nothing here forms a matrix.
For a chain of frozen layers ``y = Σ_i J_i x_i + c`` the first is a Jacobian-vector product (JVP)
and the second a vector-Jacobian product (VJP). One VJP with cotangent ``u`` yields ``uᵀ J_i`` for
*every* token ``i`` at once, which is why `OperatorBatch` has `rows` beside `matvec` and `rmatvec`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor

__all__ = [
    "JointOperator",
    "LinearMap",
    "LinearOperator",
    "MatrixOperator",
    "OperatorBatch",
    "ScipyOperator",
    "StackedOperators",
    "TokenOperator",
    "TokenOperators",
    "aslinearoperator",
]

# Elements that exist at a time, 128 MiB in float32, of the zero-padded tangents (vectors, T, d)
# and of the explicit matrices gathered for a product.
_TANGENT_ELEMENTS = 2**25
_GATHERED_ELEMENTS = 2**25


class LinearMap(Protocol):
    """What the token operators need of a linearisation: two products and the two vectors."""

    @property
    def inputs(self) -> Tensor:
        """The input embeddings, (T, d)."""

    @property
    def output(self) -> Tensor:
        """The output, (m,)."""

    def jvp(self, tangents: Tensor) -> Tensor:
        """Σ_i J_i t_i for every row of tangents: (b, T, d) -> (b, m)."""

    def vjp(self, cotangents: Tensor) -> Tensor:
        """J_iᵀ u for every token i and cotangent u: (b, m) -> (b, T, d)."""


class LinearOperator(ABC):
    """A real m×n linear operator; subclasses implement `_matmat` and `_rmatmat`.

    Attributes:
        shape: (m, n).
        dtype: torch.float32 or torch.float64, of the operands and of the products.
        device: where operands are expected.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        """Record shape, dtype and device.

        Args:
            shape: (m, n).
            dtype: torch.float32 or torch.float64.
            device: Device of operands and products.

        Raises:
            ValueError: Where the dtype is neither float32 nor float64, or a dimension is 0.
        """
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"operators work in float32 or float64, not {dtype}")
        if min(shape) < 1:
            raise ValueError(f"an operator needs at least one row and one column, got {shape}")
        self.shape = shape
        self.dtype = dtype
        self.device = device

    @abstractmethod
    def _matmat(self, X: Tensor) -> Tensor:
        """A X: (n, b) -> (m, b)."""

    @abstractmethod
    def _rmatmat(self, Y: Tensor) -> Tensor:
        """Aᵀ Y: (m, b) -> (n, b)."""

    def __matmul__(self, X: Tensor) -> Tensor:
        """A times a vector or a matrix.

        Args:
            X: (n,) or (n, b), in the operator's dtype and on its device; arrays of other libraries
                are taken as they are, through DLPack.

        Returns:
            (m,) or (m, b).

        Raises:
            ValueError: Where shape, dtype or device do not fit.
        """
        if not isinstance(X, Tensor):
            if not hasattr(X, "__dlpack__"):
                raise ValueError(f"an operator multiplies arrays, not {type(X).__name__}")
            X = torch.from_dlpack(X)
        if X.ndim not in (1, 2) or X.shape[0] != self.shape[1]:
            n = self.shape[1]
            raise ValueError(f"expected a tensor of shape ({n},) or ({n}, b), got {tuple(X.shape)}")
        if X.dtype != self.dtype:
            raise ValueError(f"expected a tensor of {self.dtype}, got {X.dtype}")
        if X.device != self.device:
            raise ValueError(f"expected a tensor on {self.device}, got one on {X.device}")
        return self._matmat(X[:, None])[:, 0] if X.ndim == 1 else self._matmat(X)

    @property
    def T(self) -> LinearOperator:
        """The transpose, lazily; ``A.T.T is A``."""
        return _Transpose(self)

    def dot_test(self, seed: int = 0) -> float:
        """The adjoint figure |⟨u, Av⟩ − ⟨Aᵀu, v⟩| / (‖u‖‖Av‖) for random normal u and v.

        Args:
            seed: Seeds u and v.

        Returns:
            The figure; inner products are summed in float64. 0 where both sides are 0.
        """
        generator = torch.Generator().manual_seed(seed)
        u = torch.randn(self.shape[0], generator=generator, dtype=torch.float64)
        v = torch.randn(self.shape[1], generator=generator, dtype=torch.float64)
        u, v = u.to(self.device, self.dtype), v.to(self.device, self.dtype)
        Av, Atu = (self @ v).double(), (self.T @ u).double()
        gap = float((u.double() @ Av - Atu @ v.double()).abs())
        size = float(u.double().norm() * Av.norm())
        return gap / size if size else gap

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """The same operator for SciPy, with matvec, rmatvec, matmat and rmatmat on NumPy arrays."""
        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype

        def product(operator: LinearOperator, X: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            Y = operator @ torch.as_tensor(np.array(X, dtype)).to(operator.device)
            return np.asarray(Y.cpu().numpy())

        return scipy.sparse.linalg.LinearOperator(
            shape=self.shape,
            dtype=dtype,
            matvec=lambda x: product(self, x),
            rmatvec=lambda y: product(self.T, y),
            matmat=lambda X: product(self, X),
            rmatmat=lambda Y: product(self.T, Y),
        )


class _Transpose(LinearOperator):
    """Aᵀ of an operator A."""

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__((operator.shape[1], operator.shape[0]), operator.dtype, operator.device)
        self._operator = operator

    def _matmat(self, X: Tensor) -> Tensor:
        return self._operator._rmatmat(X)

    def _rmatmat(self, Y: Tensor) -> Tensor:
        return self._operator._matmat(Y)

    @property
    def T(self) -> LinearOperator:
        return self._operator


class MatrixOperator(LinearOperator):
    """An explicit matrix."""

    def __init__(self, matrix: Tensor) -> None:
        """Wrap a matrix without copying it.

        Args:
            matrix: (m, n), float32 or float64.
        """
        super().__init__((matrix.shape[0], matrix.shape[1]), matrix.dtype, matrix.device)
        self.matrix = matrix

    def _matmat(self, X: Tensor) -> Tensor:
        return self.matrix @ X

    def _rmatmat(self, Y: Tensor) -> Tensor:
        return self.matrix.T @ Y


class ScipyOperator(LinearOperator):
    """A SciPy sparse matrix, sparse array or LinearOperator; products run on the CPU in SciPy."""

    def __init__(self, operator: Any) -> None:
        """Wrap a SciPy operator without copying it.

        Args:
            operator: SciPy sparse matrix or array, or LinearOperator, (m, n).
        """
        dtype = torch.float32 if operator.dtype == np.float32 else torch.float64
        super().__init__(
            (int(operator.shape[0]), int(operator.shape[1])), dtype, torch.device("cpu")
        )
        self._operator = scipy.sparse.linalg.aslinearoperator(operator)

    def _matmat(self, X: Tensor) -> Tensor:
        return torch.as_tensor(self._operator.matmat(X.numpy())).to(self.dtype)

    def _rmatmat(self, Y: Tensor) -> Tensor:
        return torch.as_tensor(self._operator.rmatmat(Y.numpy())).to(self.dtype)


def aslinearoperator(A: Any) -> LinearOperator:
    """A as a LinearOperator.

    Args:
        A: A LinearOperator (returned as it is), a 2-D real torch tensor or NumPy array, a SciPy
            sparse matrix or array, or a SciPy LinearOperator. Numbers other than float32 and
            float64 are converted to float64.

    Returns:
        The operator, (m, n).

    Raises:
        ValueError: For anything else, complex numbers, and arrays that are not 2-D.
    """
    if isinstance(A, LinearOperator):
        return A
    if scipy.sparse.issparse(A) or isinstance(A, scipy.sparse.linalg.LinearOperator):
        if np.issubdtype(A.dtype, np.complexfloating):
            raise ValueError("complex operators are not supported; pass a real one")
        return ScipyOperator(A)
    if isinstance(A, np.ndarray | Tensor):
        matrix = torch.as_tensor(A)
        if matrix.ndim != 2:
            raise ValueError(f"expected a 2-D matrix, got one of shape {tuple(matrix.shape)}")
        if matrix.is_complex():
            raise ValueError("complex matrices are not supported; pass a real one")
        exact = matrix.dtype in (torch.float32, torch.float64)
        return MatrixOperator(matrix if exact else matrix.double())
    raise ValueError(
        f"cannot use a {type(A).__name__} as a linear operator; pass a LinearOperator, a torch "
        "tensor, a NumPy array, or a SciPy sparse matrix or LinearOperator"
    )


class OperatorBatch(ABC):
    """n operators of one shape m×d, applied together.

    Attributes:
        shape: (n, m, d).
        dtype: torch.float32 or torch.float64.
        device: Device of operands and products.
        labels: n integers. Together with the seed they determine the random vectors that an
            operator meets, so that its result does not depend on its neighbours in the batch.
        inputs: (n, d) inputs x_i that fix the signs of singular vectors, or None.
        precision: Of the operators' float32 products, 'ieee' or 'tf32'.
        vectors: How many vectors they take at a time.
        row_cost: What `rows` of one vector costs, in products of one operator.
    """

    precision = "ieee"
    vectors = 64
    row_cost = 1.0
    shape: tuple[int, int, int]
    dtype: torch.dtype
    device: torch.device
    labels: tuple[int, ...]
    inputs: Tensor | None

    @abstractmethod
    def matvec(self, V: Tensor, index: Tensor) -> Tensor:
        """Apply operator index[j] to V[j].

        Args:
            V: (a, d).
            index: (a,) integers below n, in any order and with repetitions.

        Returns:
            (a, m).
        """

    @abstractmethod
    def rmatvec(self, U: Tensor, index: Tensor) -> Tensor:
        """Apply the transpose of operator index[j] to U[j].

        Args:
            U: (a, m).
            index: (a,) integers below n.

        Returns:
            (a, d).
        """

    @abstractmethod
    def rows(self, Y: Tensor) -> Tensor:
        """yᵀ J_i for every operator i and every row y of Y: one VJP a row, whatever n.

        Args:
            Y: (b, m).

        Returns:
            (b, n, d).
        """

    def rows_of(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """`rows` of one block after another; a batch may read ahead to work on several at a time.

        Args:
            blocks: Y (b, m), any number of them.

        Returns:
            (b, n, d) of each, in order.
        """
        return map(self.rows, blocks)


class StackedOperators(OperatorBatch):
    """A batch made of explicit matrices or of separate operators."""

    def __init__(
        self,
        operators: Tensor | Sequence[LinearOperator],
        labels: Sequence[int] | None = None,
        inputs: Tensor | None = None,
    ) -> None:
        """Stack operators.

        Args:
            operators: (n, m, d) tensor, kept as it is, or n operators of shape (m, d).
            labels: n integers; 0 … n−1 by default.
            inputs: (n, d) or None.

        Raises:
            ValueError: Where there is no operator, or shapes, dtypes or devices differ.
        """
        if isinstance(operators, Tensor):
            if operators.ndim != 3 or operators.numel() == 0:
                raise ValueError(f"expected a (n, m, d) tensor, got shape {tuple(operators.shape)}")
            kinds = {(tuple(operators.shape[1:]), operators.dtype, operators.device)}
        else:
            kinds = {(A.shape, A.dtype, A.device) for A in operators}
        if len(kinds) != 1:
            raise ValueError(
                f"expected operators of one shape, dtype and device, got {len(kinds)} kinds"
            )
        (shape, self.dtype, self.device) = kinds.pop()
        if self.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"operators work in float32 or float64, not {self.dtype}")
        n = len(operators)
        self.shape = (n, shape[0], shape[1])
        self.labels = tuple(range(n)) if labels is None else tuple(int(label) for label in labels)
        if len(self.labels) != n:
            raise ValueError(f"expected {n} labels, got {len(self.labels)}")
        if inputs is not None and inputs.shape != (n, shape[1]):
            raise ValueError(
                f"expected inputs of shape ({n}, {shape[1]}), got {tuple(inputs.shape)}"
            )
        self.inputs = inputs
        self._operators = operators

    def matvec(self, V: Tensor, index: Tensor) -> Tensor:
        """See `OperatorBatch.matvec`."""
        return self._apply(V, index, transpose=False)

    def rmatvec(self, U: Tensor, index: Tensor) -> Tensor:
        """See `OperatorBatch.rmatvec`."""
        return self._apply(U, index, transpose=True)

    def rows(self, Y: Tensor) -> Tensor:
        """See `OperatorBatch.rows`."""
        if isinstance(self._operators, Tensor):
            return (Y @ self._operators).transpose(0, 1)
        return torch.stack([A._rmatmat(Y.T).T for A in self._operators], dim=1)

    def _apply(self, X: Tensor, index: Tensor, transpose: bool) -> Tensor:
        """The operator index[j], or its transpose, on every row X[j]."""
        index = index.cpu()
        if isinstance(self._operators, Tensor):
            operators = self._operators if transpose else self._operators.mT
            if len(operators) == 1:
                return X @ operators[0]
            if index.tolist() == list(range(len(operators))):
                return torch.bmm(X[:, None], operators)[:, 0]
            size = max(1, _GATHERED_ELEMENTS // operators[0].numel())
            blocks = zip(torch.split(X, size), torch.split(index.to(X.device), size), strict=True)
            return torch.cat([torch.bmm(x[:, None], operators[i])[:, 0] for x, i in blocks])
        product = X.new_empty(len(X), self.shape[2 if transpose else 1])
        for i in sorted(set(index.tolist())):
            where = (index == i).nonzero()[:, 0].to(X.device)
            operator = self._operators[i].T if transpose else self._operators[i]
            product[where] = operator._matmat(X[where].T).T
        return product


class TokenOperators(OperatorBatch):
    """The detached Jacobians J_i (m, d) of some tokens of one linearised prompt.

    Attributes:
        together: Vectors that one call of `matvec` or `rmatvec` pushes through at a time: a block,
            or what fits of its zero-padded form.
    """

    def __init__(self, lin: LinearMap, tokens: Sequence[int]) -> None:
        """Select tokens of a linearisation.

        Args:
            lin: The linearisation.
            tokens: Token positions, from 0 to T−1; they are the labels.

        Raises:
            ValueError: Where no token is given, or one lies outside the prompt.
        """
        T, d = lin.inputs.shape
        self.labels = tuple(int(token) for token in tokens)
        if not self.labels:
            raise ValueError("expected at least one token")
        if min(self.labels) < 0 or max(self.labels) >= T:
            raise ValueError(f"expected tokens from 0 to {T - 1}, got {list(self.labels)}")
        self.lin = lin
        self.shape = (len(self.labels), lin.output.shape[-1], d)
        self.dtype, self.device = lin.inputs.dtype, lin.inputs.device
        self.precision = getattr(lin, "precision", self.precision)
        self.vectors = getattr(lin, "block", self.vectors)
        self.together = _together(lin)
        self._tokens = torch.tensor(self.labels, device=self.device)
        self._every_token = self.labels == tuple(range(T))
        self.inputs = lin.inputs.detach().index_select(0, self._tokens)

    def matvec(self, V: Tensor, index: Tensor) -> Tensor:
        """See `OperatorBatch.matvec`: JVPs of tangents that are zero but at one token."""
        return _scattered_jvp(self.lin, V, self._tokens[index.to(self.device)])

    def rmatvec(self, U: Tensor, index: Tensor) -> Tensor:
        """See `OperatorBatch.rmatvec`: VJPs of which one token's part is kept."""
        return _gathered_vjp(self.lin, U, self._tokens[index.to(self.device)])

    def rows(self, Y: Tensor) -> Tensor:
        """See `OperatorBatch.rows`."""
        rows = self.lin.vjp(Y)
        return rows if self._every_token else rows.index_select(1, self._tokens)


class TokenOperator(LinearOperator):
    """The detached Jacobian J_i (m, d) of one token."""

    def __init__(self, lin: LinearMap, token: int) -> None:
        """Select a token of a linearisation.

        Args:
            lin: The linearisation.
            token: Position from 0 to T−1.

        Raises:
            ValueError: Where the token lies outside the prompt.
        """
        T, d = lin.inputs.shape
        if not 0 <= token < T:
            raise ValueError(f"expected a token from 0 to {T - 1}, got {token}")
        super().__init__((lin.output.shape[-1], d), lin.inputs.dtype, lin.inputs.device)
        self.lin, self.token = lin, token

    def _matmat(self, X: Tensor) -> Tensor:
        return _scattered_jvp(self.lin, X.T, self._position(X)).T

    def _rmatmat(self, Y: Tensor) -> Tensor:
        return _gathered_vjp(self.lin, Y.T, self._position(Y)).T

    def _position(self, X: Tensor) -> Tensor:
        return torch.full((X.shape[1],), self.token, device=self.device)


class JointOperator(LinearOperator):
    """The Jacobian of several tokens side by side, [J_i for i in tokens], of shape (m, n·d)."""

    def __init__(self, lin: LinearMap, tokens: Sequence[int] | None = None) -> None:
        """Wrap a linearisation.

        Args:
            lin: The linearisation.
            tokens: n positions from 0 to T−1, each once; all of them by default.

        Raises:
            ValueError: Where a token lies outside the prompt or comes twice.
        """
        T, d = lin.inputs.shape
        chosen = list(range(T)) if tokens is None else list(tokens)
        if not set(chosen) <= set(range(T)) or len(set(chosen)) < len(chosen):
            raise ValueError(f"expected different tokens from 0 to {T - 1}, got {chosen}")
        super().__init__(
            (lin.output.shape[-1], len(chosen) * d), lin.inputs.dtype, lin.inputs.device
        )
        self.lin, self._tokens = lin, torch.tensor(chosen, device=self.device)

    def _matmat(self, X: Tensor) -> Tensor:
        _, d = self.lin.inputs.shape
        tangents = X.new_zeros(X.shape[1], *self.lin.inputs.shape)
        tangents[:, self._tokens] = X.T.reshape(X.shape[1], len(self._tokens), d)
        return self.lin.jvp(tangents).T

    def _rmatmat(self, Y: Tensor) -> Tensor:
        rows = self.lin.vjp(Y.T.contiguous()).index_select(1, self._tokens)
        return rows.reshape(-1, self.shape[1]).T


def _scattered_jvp(lin: LinearMap, V: Tensor, tokens: Tensor) -> Tensor:
    """J_{tokens[j]} V[j] for every j: (a, d) -> (a, m), in blocks of bounded memory."""
    T, d = lin.inputs.shape
    products = []
    for v, token in _blocks(lin, V, tokens):
        tangents = v.new_zeros(len(v), T, d)
        tangents[torch.arange(len(v), device=v.device), token] = v
        products.append(lin.jvp(tangents))
    return torch.cat(products)


def _gathered_vjp(lin: LinearMap, U: Tensor, tokens: Tensor) -> Tensor:
    """J_{tokens[j]}ᵀ U[j] for every j: (a, m) -> (a, d), in blocks of bounded memory."""
    products = []
    for u, token in _blocks(lin, U, tokens):
        products.append(lin.vjp(u)[torch.arange(len(u), device=u.device), token])
    return torch.cat(products)


def _blocks(lin: LinearMap, X: Tensor, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Rows of X with their tokens, in blocks that the linearisation takes at a time."""
    size = _together(lin)
    return list(zip(torch.split(X.contiguous(), size), torch.split(tokens, size), strict=True))


def _together(lin: LinearMap) -> int:
    """Vectors that the linearisation takes at a time and whose zero-padded form stays small."""
    block: int = getattr(lin, "block", OperatorBatch.vectors)
    return max(1, min(block, _TANGENT_ELEMENTS // math.prod(lin.inputs.shape)))
