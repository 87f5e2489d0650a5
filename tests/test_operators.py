"""Operators against their matrices: both sides, every form of operand, every source."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from elm_lanczos import operators
from elm_lanczos.operators import (
    JointOperator,
    LinearOperator,
    OperatorBatch,
    StackedOperators,
    TokenOperator,
    TokenOperators,
    aslinearoperator,
)
from tests.spectra import DTYPES, DiagonalPlusLowRank, ExplicitChain, compare_matmat

SIZES = st.integers(1, 12)


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def chain(T: int = 5, m: int = 6, d: int = 4, dtype: torch.dtype = torch.float64) -> ExplicitChain:
    return ExplicitChain(random(T, m, d, dtype=dtype), random(T, d, dtype=dtype, seed=1))


@settings(max_examples=40, deadline=None)
@given(m=SIZES, n=SIZES, seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES))
def test_every_source_of_an_operator(m: int, n: int, seed: int, dtype: torch.dtype) -> None:
    matrix = random(m, n, dtype=dtype, seed=seed)
    sparse = torch.where(matrix.abs() < 0.7, 0.0, matrix)
    compare_matmat(aslinearoperator(matrix), matrix)
    compare_matmat(aslinearoperator(matrix.numpy()), matrix)
    for form in (scipy.sparse.csr_matrix, scipy.sparse.coo_array, scipy.sparse.csc_array):
        compare_matmat(aslinearoperator(form(sparse.numpy())), sparse)
    compare_matmat(aslinearoperator(scipy.sparse.linalg.aslinearoperator(matrix.numpy())), matrix)
    compare_matmat(aslinearoperator(aslinearoperator(matrix).to_scipy()), matrix)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 15), rank=st.integers(1, 3), seed=st.integers(0, 99))
def test_an_operator_without_a_matrix(n: int, rank: int, seed: int) -> None:
    a, P, Q = random(n, seed=seed), random(n, rank, seed=seed + 1), random(n, rank, seed=seed + 2)
    compare_matmat(DiagonalPlusLowRank(a, P, Q), torch.diag(a) + P @ Q.T)


@settings(max_examples=25, deadline=None)
@given(T=st.integers(1, 6), m=SIZES, d=SIZES, dtype=st.sampled_from(DTYPES))
def test_operators_of_a_linearisation(T: int, m: int, d: int, dtype: torch.dtype) -> None:
    lin = chain(T, m, d, dtype)
    for token in range(T):
        compare_matmat(TokenOperator(lin, token), lin.J[token])
    compare_matmat(JointOperator(lin), torch.cat(list(lin.J), dim=1))


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 5), m=SIZES, d=SIZES, seed=st.integers(0, 99), data=st.data())
def test_batches_against_their_matrices(
    n: int, m: int, d: int, seed: int, data: st.DataObject
) -> None:
    lin = ExplicitChain(random(n, m, d, seed=seed), random(n, d, seed=seed + 1))
    index = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=8)))
    V, U = random(len(index), d, seed=seed + 2), random(len(index), m, seed=seed + 3)
    Y = random(3, m, seed=seed + 4)
    batches: list[OperatorBatch] = [
        StackedOperators(lin.J),
        StackedOperators([aslinearoperator(J) for J in lin.J]),
        TokenOperators(lin, range(n)),
    ]
    for batch in batches:
        assert batch.shape == (n, m, d)
        close = torch.testing.assert_close
        close(batch.matvec(V, index), torch.einsum("amd,ad->am", lin.J[index], V))
        close(batch.rmatvec(U, index), torch.einsum("amd,am->ad", lin.J[index], U))
        close(batch.rows(Y), torch.einsum("bm,nmd->bnd", Y, lin.J))


def test_chosen_tokens_in_any_order_keep_their_labels_and_inputs() -> None:
    lin = chain(T=6)
    batch = TokenOperators(lin, [4, 1])
    assert batch.labels == (4, 1)
    assert torch.equal(batch.inputs, lin.inputs[[4, 1]])
    V, U, Y = random(2, 4), random(2, 6), random(3, 6)
    index = torch.tensor([1, 0])
    torch.testing.assert_close(batch.matvec(V, index)[0], lin.J[1] @ V[0])
    torch.testing.assert_close(batch.rmatvec(U, index)[1], lin.J[4].T @ U[1])
    torch.testing.assert_close(batch.rows(Y)[:, 0], Y @ lin.J[4])


def test_one_vjp_serves_all_tokens() -> None:
    lin = chain(T=5)
    TokenOperators(lin, range(5)).rows(random(3, 6))
    assert lin.vectors == 3


def test_vectors_are_scattered_in_blocks_of_bounded_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lin = chain(T=5)
    sizes: list[int] = []
    whole = lin.jvp

    def jvp(tangents: Tensor) -> Tensor:
        sizes.append(len(tangents))
        return whole(tangents)

    monkeypatch.setattr(lin, "jvp", jvp)
    monkeypatch.setattr(operators, "_TANGENT_ELEMENTS", 3 * 5 * 4)
    V = random(8, 4)
    product = TokenOperators(lin, range(5)).matvec(V, torch.arange(8) % 5)
    assert sizes == [3, 3, 2]
    torch.testing.assert_close(product, torch.einsum("amd,ad->am", lin.J[torch.arange(8) % 5], V))


def test_gathered_matrices_are_used_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    J, V = random(4, 6, 5), random(7, 5)
    index = torch.tensor([3, 0, 2, 2, 1, 0, 3])
    monkeypatch.setattr(operators, "_GATHERED_ELEMENTS", 2 * 30)
    product = StackedOperators(J).matvec(V, index)
    torch.testing.assert_close(product, torch.einsum("amd,ad->am", J[index], V))


def test_dot_test_sees_a_wrong_adjoint() -> None:
    class Wrong(DiagonalPlusLowRank):
        def _rmatmat(self, Y: Tensor) -> Tensor:
            return 1.01 * super()._rmatmat(Y)

    parts = random(20), random(20, 2), random(20, 2)
    assert DiagonalPlusLowRank(*parts).dot_test() <= 1e-14
    assert Wrong(*parts).dot_test() > 1e-4
    assert aslinearoperator(torch.zeros(3, 4)).dot_test() == 0


def test_an_operator_is_its_own_operator() -> None:
    A = aslinearoperator(random(3, 4))
    assert aslinearoperator(A) is A
    assert A.T.shape == (4, 3)


def test_other_numbers_become_float64() -> None:
    for matrix in (np.arange(6).reshape(2, 3), torch.ones(2, 3).half(), torch.ones(2, 3).int()):
        assert aslinearoperator(matrix).dtype == torch.float64
    assert aslinearoperator(scipy.sparse.eye(3, dtype=np.int64)).dtype == torch.float64


@pytest.mark.parametrize(
    ("operand", "message"),
    [
        (torch.ones(3).double(), "shape"),
        (torch.ones(3, 4).double(), "shape"),
        (torch.ones(4, 1, 1).double(), "shape"),
        (torch.ones(4), "float64"),
        ([1.0] * 4, "multiplies arrays, not list"),
        (np.ones(4, np.float32), "float64"),
    ],
)
def test_operands_that_do_not_fit(operand: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        aslinearoperator(random(3, 4)) @ operand  # type: ignore[operator]


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.ones(3), "2-D"),
        (np.ones((2, 2, 2)), "2-D"),
        (np.ones((2, 2)) * 1j, "complex"),
        (scipy.sparse.eye(2, dtype=complex), "complex"),
        ([[1.0, 2.0]], "list"),
        (torch.ones(0, 3), "at least one"),
    ],
)
def test_what_is_no_operator(matrix: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        aslinearoperator(matrix)


def test_batches_that_do_not_fit() -> None:
    a, b = aslinearoperator(random(3, 4)), aslinearoperator(random(4, 3))
    with pytest.raises(ValueError, match="one shape"):
        StackedOperators([a, b])
    with pytest.raises(ValueError, match="one shape"):
        StackedOperators([])
    with pytest.raises(ValueError, match="labels"):
        StackedOperators([a], labels=[1, 2])
    with pytest.raises(ValueError, match="inputs"):
        StackedOperators([a], inputs=torch.ones(1, 3))
    with pytest.raises(ValueError, match="float32 or float64"):
        StackedOperators(torch.ones(1, 2, 2).half())
    for tokens in ([], [5], [-1]):
        with pytest.raises(ValueError, match="token"):
            TokenOperators(chain(T=5), tokens)
    with pytest.raises(ValueError, match="token"):
        TokenOperator(chain(T=5), 5)


def test_the_base_class_asks_for_both_products() -> None:
    with pytest.raises(TypeError, match="_rmatmat"):

        class Half(LinearOperator):
            def _matmat(self, X: Tensor) -> Tensor:
                return X

        Half((2, 2), torch.float64, torch.device("cpu"))  # type: ignore[abstract]
