"""Real Jacobians in float64 (in float32, with the whole path: tests/test_bundled.py)."""

from __future__ import annotations

import pytest
import torch

from elm_lanczos.model import DetachedModel
from elm_lanczos.operators import StackedOperators
from elm_lanczos.svd import svd
from tests.spectra import METHODS, check_triplets


@pytest.fixture(scope="module")
def jacobians() -> torch.Tensor:
    """The Jacobians (T, m, d) of a short prompt, row by row from VJPs."""
    model = DetachedModel.from_pretrained(compute_dtype="float64")
    lin = model.linearize("The bridge out of")
    eye = torch.eye(len(lin.output), dtype=torch.float64)
    return lin.vjp(eye).transpose(0, 1).contiguous()


@pytest.mark.parametrize("method", METHODS)
def test_triplets_of_a_transformer(jacobians: torch.Tensor, method: str) -> None:
    result = svd(StackedOperators(jacobians), 16, method=method)
    assert result.converged.all()
    check_triplets(result, jacobians)
    assert result.passes < 1.5 * result.plan.passes[method]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_contributions_come_with_the_triplets(
    jacobians: torch.Tensor, method: str, scale: float
) -> None:
    """A x for each operator's own input: from the rows that flow by, or one more product."""
    matrices = jacobians[:, :48, :32].float() * scale
    x = torch.randn(len(matrices), 32)
    expected = torch.einsum("nmd,nd->nm", matrices.double(), x.double())
    result = svd(StackedOperators(matrices, inputs=x), 4, method=method)
    assert result.contribution is not None
    error = (result.contribution.double() - expected).norm(dim=1)
    assert (error <= 1e-6 * expected.norm(dim=1)).all()
    assert svd(StackedOperators(matrices), 4, method=method).contribution is None
