"""Attribution is exact: the shares sum to the model's own logit."""

from __future__ import annotations

import pytest
import torch
import transformers

from elm_lanczos.analysis import attribute
from elm_lanczos.model import DetachedModel
from tests.families import CONFIGS, PROMPT, detached_model


@pytest.mark.parametrize("family", list(CONFIGS))
def test_shares_sum_to_the_logit(family: str) -> None:
    lin = detached_model(family).linearize(PROMPT)
    for target in (None, 5):
        result = attribute(lin, target)
        assert result.error <= 1e-6  # the model's own float32 norms; the sum itself is exact:
        weight = lin.model.unembedding.weight[result.target].detach()
        assert abs(result.total - float(weight @ lin.output)) <= 1e-12 * abs(result.total)
    J = lin.vjp(torch.eye(32, dtype=torch.float64))
    shares = torch.einsum("m,mtd,td->t", weight, J, lin.inputs)
    assert torch.allclose(result.tokens, shares, atol=1e-12)


def test_final_soft_cap_enters_as_a_frozen_factor() -> None:
    config = CONFIGS["gemma3"]()
    config.final_logit_softcapping = 0.05  # strong enough to bend every logit
    torch.manual_seed(0)
    model = DetachedModel(transformers.Gemma3ForCausalLM(config).double().eval())
    lin = model.linearize(PROMPT)
    result = attribute(lin)
    raw = float(model.unembedding.weight[result.target] @ lin.output)
    assert abs(result.logit) < 0.9 * abs(raw) and result.error <= 1e-6
