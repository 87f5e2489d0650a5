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
