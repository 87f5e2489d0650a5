"""The shared numerics: orthogonality at breakdowns, exact scaling, seeded vectors."""

from __future__ import annotations

import pytest
import torch

from elm_lanczos.svd.gram_schmidt import project_out
from elm_lanczos.svd.orthogonal import (
    next_block,
    normal_rows,
    orthonormal_block,
    power_of_two_scale,
    small_svd,
)
from tests.spectra import DTYPES

LIKE = torch.empty(0, dtype=torch.float64)


def basis_of(a: int, j: int, d: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    X = normal_rows(0, range(a), 0, (d, j), LIKE)
    return torch.linalg.qr(X)[0].mT.contiguous().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("part", [1.0, 1e-3, 1e-6, 1e-12, 0.0])
def test_next_block_is_orthogonal_however_small_its_new_part(
    b: int, part: float, dtype: torch.dtype
) -> None:
    basis = basis_of(3, 10, 40, dtype)
    new, spare = (
        x.view(3, b, 40) for x in normal_rows(1, range(6 * b), 1, (40,), basis).split(3 * b)
    )
    W = basis.sum(1, keepdim=True) + part * new
    eps = torch.finfo(dtype).eps
    threshold = torch.full((3,), 64 * eps, dtype=dtype)
    rows, lower, components, replaced = next_block(basis, W, spare, threshold)
    together = torch.cat([basis, rows], 1)
    assert float((together @ together.mT - torch.eye(10 + b)).abs().max()) < 8 * eps
    assert replaced.all() == (part * 6 < 64 * eps) and replaced.any() == replaced.all()
    assert (lower.diagonal(dim1=1, dim2=2)[replaced] == 0).all()
    # W in terms of the basis and the new rows, but for what was replaced.
    rebuilt = components @ basis + lower @ rows
    torch.testing.assert_close(rebuilt, W, rtol=0, atol=64 * b * eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_depend_on_those_before_them_are_replaced(dtype: torch.dtype) -> None:
    basis = basis_of(2, 10, 40, dtype)
    new, spare = (x.view(2, 4, 40) for x in normal_rows(1, range(16), 1, (40,), basis).split(8))
    W = torch.stack([new[:, 0], 3 * new[:, 0], new[:, 1], new[:, 0] - new[:, 1]], 1)
    eps = torch.finfo(dtype).eps
    threshold = torch.full((2,), 1000 * eps, dtype=dtype)
    rows, lower, components, replaced = next_block(basis, W, spare, threshold)
    assert replaced.tolist() == [[False, True, False, True]] * 2
    together = torch.cat([basis, rows], 1)
    assert float((together @ together.mT - torch.eye(14)).abs().max()) < 8 * eps
    torch.testing.assert_close(components @ basis + lower @ rows, W, rtol=0, atol=float(1000 * eps))


def test_threshold_is_inclusive() -> None:
    basis = torch.eye(4)[None, :1].double()
    w, spare = torch.tensor([[[0.0, 2.0, 0, 0]]]).double(), torch.ones(1, 1, 4).double()
    assert next_block(basis, w, spare, torch.tensor([2.0]).double())[3].all()
    assert not next_block(basis, w, spare, torch.tensor([1.999]).double())[3].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_block_has_full_width_and_leads_with_the_largest_directions(dtype: torch.dtype) -> None:
    basis = basis_of(2, 6, 30, dtype)
    rows, spare = normal_rows(2, range(4), 2, (5, 30), basis).split(2)
    rows = project_out(basis, rows)[0]
    W = torch.stack([rows[:, 0], 100 * rows[:, 1], rows[:, 0] - rows[:, 1], 0 * rows[:, 2]], 1)
    block, missing = orthonormal_block(
        basis, W, lambda: spare[:, :4], torch.full((2,), 1e-4, dtype=dtype), 4
    )
    assert missing.tolist() == [2, 2]
    together = torch.cat([basis, block], 1)
    eps = torch.finfo(dtype).eps
    assert float((together @ together.mT - torch.eye(10, dtype=dtype)).abs().max()) < 16 * eps
    leading = rows[:, 1] / rows[:, 1].norm(dim=1, keepdim=True)
    assert (1 - (block[:, 0] * leading).sum(1).abs() < 1e-3).all()


def test_scale_is_a_power_of_two_next_to_the_largest_entry() -> None:
    samples = torch.tensor([[1.0, -3.0], [0.0, 0.0], [1e30, 1.0], [1e-30, 0.0]])
    scale = power_of_two_scale(samples)
    assert torch.equal(torch.frexp(scale).mantissa, torch.full((4,), 0.5))
    assert scale[1] == 1
    ratio = samples.abs().amax(1)[[0, 2, 3]] / scale[[0, 2, 3]]
    assert ((ratio >= 0.5) & (ratio < 1)).all()


def test_random_vectors_depend_on_seed_label_and_purpose_alone() -> None:
    together = normal_rows(5, [2, 7, 9], 1, (20,), LIKE)
    assert torch.equal(together[1], normal_rows(5, [7], 1, (20,), LIKE)[0])
    for other in (normal_rows(6, [7], 1, (20,), LIKE), normal_rows(5, [7], 2, (20,), LIKE)):
        assert not torch.equal(together[1], other[0])
    assert not torch.equal(together[0], together[1])
    assert abs(float(normal_rows(0, range(50), 0, (100,), LIKE).std()) - 1) < 0.05


def test_small_svd_is_in_float64() -> None:
    B = normal_rows(0, range(2), 0, (5, 3), LIKE).float()
    U, S, Vt = small_svd(B)
    assert S.dtype == torch.float64
    torch.testing.assert_close(U @ torch.diag_embed(S) @ Vt, B.double())
