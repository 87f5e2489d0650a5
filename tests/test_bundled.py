"""Real Jacobians: every method on the bundled model against dense float64 decompositions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from elm_lanczos import svd
from elm_lanczos.linearization import Linearization
from elm_lanczos.model import DetachedModel

KENNEDY = (
    "Vice President Johnson, Mr. Speaker, Mr. Chief Justice, President Eisenhower, Vice President "
    "Nixon, President Truman, reverend clergy, fellow citizens, we observe today not a victory of "
    "party, but a celebration of freedom -- symbolizing an end, as well as a beginning -- "
    "signifying renewal, as well as change."
)
"""The opening of the inaugural address of 1961 (public domain)."""


@pytest.fixture(scope="module")
def ids(bundled: DetachedModel) -> Tensor:
    return bundled.encode(KENNEDY)[:64]


@pytest.fixture(scope="module")
def lin(bundled: DetachedModel, ids: Tensor) -> Linearization:
    return bundled.linearize(ids)


@pytest.fixture(scope="module")
def jacobians(ids: Tensor) -> Tensor:
    """(T, m, d), float64."""
    model = DetachedModel.from_pretrained(compute_dtype="float64")
    return model.linearize(ids).vjp(torch.eye(256, dtype=torch.float64)).movedim(1, 0)


@pytest.mark.parametrize("method", ["lanczos", "stream", "dense"])
def test_all_triplets_of_all_tokens(lin: Linearization, jacobians: Tensor, method: str) -> None:
    result = svd(lin, k=16, method=method)
    _, S, Vh = torch.linalg.svd(jacobians)
    largest = S[:, :1]
    assert result.converged.all()
    assert ((result.S - S[:, :16]).abs() / largest).max() <= 1e-5
    assert (result.residual / result.S[:, :1]).max() <= 1e-5
    identity = torch.eye(16)
    for vectors in (result.U, result.V):
        assert (vectors @ vectors.mT - identity).abs().max() <= 1e-5
    # the residuals are real: computed again with the float64 Jacobians
    left = jacobians @ result.V.double().mT - (result.U * result.S[..., None]).double().mT
    right = jacobians.mT @ result.U.double().mT - (result.V * result.S[..., None]).double().mT
    assert (torch.maximum(left.norm(dim=1), right.norm(dim=1)) / largest).max() <= 2e-5
    # single vectors agree where a gap separates them from their neighbours
    gap = torch.minimum((S[:, :15] - S[:, 1:16]), torch.cat([largest, S[:, :14] - S[:, 1:15]], 1))
    clear = gap / largest > 0.02
    cosines = (Vh[:, :15] * result.V[:, :15].double()).sum(-1).abs()
    assert clear.sum() > 100 and cosines[clear].min() > 1 - 1e-5
    exact = jacobians.square().sum((1, 2)) / S[:, 0] ** 2
    spread = 5 * result.stable_rank_error + 1e-4 * exact
    assert ((result.stable_rank - exact).abs() <= spread).all()


def test_figures_of_the_model_card(jacobians: Tensor) -> None:
    S = torch.linalg.svdvals(jacobians)
    stable_rank = S.square().sum(1) / S[:, 0] ** 2
    figures = [stable_rank[0], stable_rank.median(), stable_rank[-1], S[-1, 0]]
    for figure, stated in zip(figures, [7.34, 4.17, 3.22, 57.77], strict=True):
        assert abs(float(figure) - stated) <= 0.006


def test_exact_in_both_precisions(lin: Linearization, ids: Tensor) -> None:
    assert lin.certificate().exact
    model = DetachedModel.from_pretrained(compute_dtype="float64")
    certificate = model.linearize(ids).certificate()
    assert certificate.reconstruction <= 1e-13 and certificate.exact


def test_what_the_model_card_says_it_reads(bundled: DetachedModel) -> None:
    lin = bundled.linearize("the Soviet Union and the")
    assert bundled.token_strings([lin.prediction.logits.argmax()]) == [" United"]
    lin = bundled.linearize("peace and security of the")
    security = bundled.token_strings(lin.ids).index(" security")
    words = svd(lin, k=2, tokens=[security]).decode(bundled, top=4)
    assert " liberty" in bundled.token_strings(words.u.ids[0, 1])
