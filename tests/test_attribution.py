"""Attribution is exact: the shares sum to the model's own logit."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
import transformers

from elm_lanczos.analysis import attribute
from elm_lanczos.errors import UnsupportedModelError, UsageError
from elm_lanczos.model import DetachedModel
from tests.families import CONFIGS, PROMPT, detached_model, hf_model


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


def _cp_lrp(hf: Any, family: str, patch: pytest.MonkeyPatch) -> None:
    """The rules of `lxt.efficient.models.{llama,qwen3,gemma3}.cp_LRP`, as of LXT 2.1."""
    module = sys.modules[type(hf).__module__]
    name = {"llama": "Llama", "qwen3": "Qwen3", "gemma3": "Gemma3"}[family]

    def norm(self: Any, x: torch.Tensor) -> torch.Tensor:  # rms_norm_forward
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).detach()

    def gemma_norm(self: Any, x: torch.Tensor) -> torch.Tensor:  # gemma3_norm
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps).detach()

    def mlp(self: Any, x: torch.Tensor) -> torch.Tensor:  # cp_gated_mlp_forward
        return self.down_proj(self.act_fn(self.gate_proj(x)).detach() * self.up_proj(x))

    def attention(self: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **_: Any) -> Any:
        q, k = q.detach(), k.detach()  # patch_cp_attention
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        probabilities = (q @ k.mT * scaling + mask).softmax(-1)
        return (probabilities @ v).transpose(1, 2), probabilities

    patch.setattr(getattr(module, f"{name}MLP"), "forward", mlp)
    if family == "gemma3":
        patch.setattr(module.Gemma3RMSNorm, "_norm", gemma_norm)
        scaled = lambda self, x: self._norm(x) * (1 + self.weight)  # noqa: E731 (without casts)
        patch.setattr(module.Gemma3RMSNorm, "forward", scaled)
    else:
        kind = getattr(module, f"{name}RMSNorm")
        patch.setattr(kind, "forward", lambda self, x: self.weight * norm(self, x))
    patch.setattr(module, "eager_attention_forward", attention)
    hf.set_attn_implementation("eager")


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_shares_are_the_relevances_of_cp_lrp(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relevance is gradient times input under the rules of LXT 2.1's `cp_LRP`.

    They are written out here: LXT 2.1 cannot be imported with transformers 5, whose
    `pytorch_utils` has no `find_pruneable_heads_and_indices`. They stop the gradient at the same
    places as the freezing does, found by others for another reason; nothing of this package is used
    to compute them.
    """
    result = attribute(detached_model(family).linearize(PROMPT))
    hf = hf_model(family)
    x = hf.get_input_embeddings()(PROMPT).detach()[None].requires_grad_()
    plain = hf(inputs_embeds=x).logits[0, -1, result.target]
    (gradient,) = torch.autograd.grad(plain, x)
    ordinary = (gradient * x)[0].sum(-1).detach()
    with monkeypatch.context() as patch:
        _cp_lrp(hf, family, patch)
        logit = hf(inputs_embeds=x).logits[0, -1, result.target]
        (gradient,) = torch.autograd.grad(logit, x)
    relevance = (gradient * x)[0].sum(-1).detach()
    assert abs(float(logit.detach()) - result.logit) <= 1e-12 * abs(result.logit)
    assert torch.allclose(result.shares, relevance, rtol=1e-10, atol=1e-12)
    assert float((ordinary - relevance).norm()) > 1e-2 * float(relevance.norm())  # the rules bite


@pytest.mark.parametrize("target", [-1, 10**9])
def test_token_that_there_is_not_is_refused(target: int) -> None:
    with pytest.raises(UsageError, match="ids are 0"):
        attribute(detached_model("llama").linearize(PROMPT), target)
