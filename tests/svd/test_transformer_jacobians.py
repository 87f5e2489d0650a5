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
    assert result.passes < 1.2 * result.plan.passes[method]


PROMPTS = (
    "we observe today not a victory of party, but a celebration of freedom -- symbolizing an end, "
    "as well as a beginning -- signifying renewal, as well as change.",
    "to preserve, protect, and defend the Constitution of the United",
    "Members of the Congress, my fellow",
)


@pytest.fixture(scope="module", params=PROMPTS, ids=["long", "middling", "short"])
def tokens(request: pytest.FixtureRequest, bundled: DetachedModel) -> StackedOperators:
    """The float32 Jacobians of every token of a prompt, with their inputs."""
    lin = bundled.linearize(request.param)
    J = lin.vjp(torch.eye(len(lin.output))).transpose(0, 1).contiguous()
    return StackedOperators(J, inputs=lin.inputs)


def test_lanczos_takes_at_most_ninety_passes_a_token(tokens: StackedOperators) -> None:
    result = svd(tokens, 16, method="lanczos")
    assert result.converged.all()
    assert result.passes <= 90 * tokens.shape[0]


@pytest.mark.parametrize("k", [1, 4, 16, 48])
def test_passes_of_lanczos_are_predicted(tokens: StackedOperators, k: int) -> None:
    n = tokens.shape[0]
    result = svd(tokens, k, method="lanczos")
    # The contributions, one product a token, are asked for by the operators, not by the plan.
    predicted = result.plan.passes["lanczos"] + n
    # A few triplets of a few tokens vary more from prompt to prompt than by 10 %.
    assert abs(result.passes / predicted - 1) <= (0.1 if k >= 16 else 0.2)


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
