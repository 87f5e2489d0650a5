"""Attribution is exact: the shares sum to the model's own logit."""

from __future__ import annotations

import math

import pytest
import torch
import transformers

from elm_lanczos.analysis import attribute
from elm_lanczos.errors import UnsupportedModelError
from elm_lanczos.model import DetachedModel
from tests.families import CONFIGS, PROMPT, detached_model


@pytest.mark.parametrize("family", list(CONFIGS))
def test_shares_sum_to_the_logit(family: str) -> None:
    lin = detached_model(family).linearize(PROMPT)
    for target in (None, 5):
        result = attribute(lin, target)
        assert result.error <= 1e-12
        assert abs(result.logit - result.model_logit) <= 1e-6  # the model's own float32 norms
        weight = lin.model.unembedding.weight[result.target].detach()
        logit = weight @ lin.output
        cap = getattr(lin.model.hf_model.config, "final_logit_softcapping", None)
        capped = cap * torch.tanh(logit / cap) if cap else logit
        assert abs(result.total - float(capped)) <= 1e-12 * abs(result.total)
        weight = weight * capped / logit
    J = lin.vjp(torch.eye(32, dtype=torch.float64))
    shares = torch.einsum("m,mtd,td->t", weight, J, lin.inputs)
    assert torch.allclose(result.shares, shares, atol=1e-12)


def test_final_soft_cap_enters_as_a_frozen_factor() -> None:
    config = CONFIGS["gemma3"]()
    config.final_logit_softcapping = 0.05  # strong enough to bend every logit
    torch.manual_seed(0)
    model = DetachedModel(transformers.Gemma3ForCausalLM(config).double().eval())
    lin = model.linearize(PROMPT)
    result = attribute(lin)
    row = model.unembedding.weight[result.target].detach()
    raw = float(row @ lin.output)
    assert abs(result.logit) < 0.9 * abs(raw)
    factor = 0.05 * math.tanh(raw / 0.05) / raw  # written out by hand
    assert torch.allclose(lin.readout(result.target).cotangent, factor * row, rtol=1e-9)
    assert result.error <= 1e-6


def test_head_that_is_not_affine_is_refused() -> None:
    class Bent(torch.nn.Linear):
        def forward(self, y: torch.Tensor) -> torch.Tensor:
            return super().forward(y) + 3 * torch.exp(y).sum(-1, keepdim=True)

    model = detached_model("llama")
    model.hf_model.lm_head.__class__ = Bent
    with pytest.raises(UnsupportedModelError, match="logits"):
        attribute(model.linearize(PROMPT))
