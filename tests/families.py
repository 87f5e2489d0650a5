"""Tiny random instances of real architectures, and a hand-written frozen model to compare with.

`hand_frozen_output` writes the forward pass of Llama-like decoders out by hand with the paper's
detach pattern (`.detach()` on norm scales, attention probabilities and activated gates). It uses
nothing of `elm_lanczos`, so that its autograd Jacobian is an independent oracle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from elm_lanczos.model import DetachedModel

_SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_GEMMA = {
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 16,
}
_GEMMA2 = _GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}  # they bite
_WITHOUT_HEAD_DIM = {name: value for name, value in _SMALL.items() if name != "head_dim"}
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**_SMALL),
    "llama-biased": lambda: transformers.LlamaConfig(**_SMALL, attention_bias=True, mlp_bias=True),
    "qwen3": lambda: transformers.Qwen3Config(**_SMALL),
    "gemma2": lambda: transformers.Gemma2Config(**(_SMALL | _GEMMA2)),
    "gemma3": lambda: transformers.Gemma3TextConfig(**(_SMALL | _GEMMA)),
    "mistral": lambda: transformers.MistralConfig(**_SMALL, sliding_window=4),
    "phi3": lambda: transformers.Phi3Config(**_WITHOUT_HEAD_DIM, sliding_window=4),
    "olmo2": lambda: transformers.Olmo2Config(**_WITHOUT_HEAD_DIM),
}
PROMPT = torch.tensor([0, 17, 42, 42, 9, 88, 3, 61, 5])


def hf_model(family: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """Returns a random model with norm weights and biases far from their initial values."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
        else:
            parameter.data *= 4  # so that attention and gates are far from uniform
    return model.to(dtype)


def detached_model(
    family: str, dtype: torch.dtype = torch.float64, **options: Any
) -> DetachedModel:
    """Returns the random model wrapped."""
    return DetachedModel(hf_model(family, dtype), **options)


def with_mlp(mlp: Callable[[Any, Tensor], Tensor], layer: int = 0, **options: Any) -> DetachedModel:
    """Returns a wrapped Llama of which one layer has another MLP, `mlp(module, x)`."""
    hf = hf_model("llama")

    class Written(type(hf.model.layers[layer].mlp)):  # type: ignore[misc]  # a class not known before
        def forward(self, x: Tensor) -> Tensor:
            return mlp(self, x)

    hf.model.layers[layer].mlp.__class__ = Written
    return DetachedModel(hf, **options)


def hand_frozen_output(
    hf: Any, x: Tensor, position: int = -1, gate: str = "frozen", layer: int | None = None
) -> Tensor:
    """Returns y (m,) for embeddings x (T, d), every coefficient detached by hand.

    With a layer, counted from 1, it is the residual stream behind that layer.
    """
    config, decoder = hf.config, hf.model
    family = config.model_type
    gemma = family.startswith("gemma")
    T, heads, kv_heads = x.shape[0], config.num_attention_heads, config.num_key_value_heads
    width = config.head_dim if hasattr(config, "head_dim") else config.hidden_size // heads
    distance = torch.arange(T)[:, None] - torch.arange(T)[None]

    def norm(module: nn.Module, z: Tensor) -> Tensor:
        weight = 1 + module.weight if gemma else module.weight
        return z * (z.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt().detach() * weight

    def rotate(z: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = z.shape[-1] // 2
        return z * cos + torch.cat([-z[..., half:], z[..., :half]], -1) * sin

    def split_heads(z: Tensor) -> Tensor:
        return z.view(T, -1, width).transpose(0, 1)

    def attend(attn: Any, h: Tensor, index: int) -> Tensor:
        if family == "phi3":
            sizes = [heads * width, kv_heads * width, kv_heads * width]
            q, k, v = attn.qkv_proj(h).split(sizes, -1)
        else:
            q, k, v = attn.q_proj(h), attn.k_proj(h), attn.v_proj(h)
        if family == "olmo2":  # over all heads together
            q, k = norm(attn.q_norm, q), norm(attn.k_norm, k)
        q, k, v = split_heads(q), split_heads(k), split_heads(v)
        if family in ("qwen3", "gemma3_text"):
            q, k = norm(attn.q_norm, q), norm(attn.k_norm, k)
        kind = [config.layer_types[index]] if family == "gemma3_text" else []
        cos, sin = (t[0].to(x.dtype) for t in decoder.rotary_emb(x, torch.arange(T)[None], *kind))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (t.repeat_interleave(heads // kv_heads, dim=0) for t in (k, v))
        scale = config.query_pre_attn_scalar if gemma else width
        scores = q @ k.mT / scale**0.5
        if family == "gemma2":
            cap = config.attn_logit_softcapping
            scores = cap * torch.tanh(scores / cap)
        slides = config.layer_types[index] == "sliding_attention" if gemma else True
        window = getattr(config, "sliding_window", None) if slides else None
        allowed = (distance >= 0) & (distance < (window or T))
        P = scores.masked_fill(~allowed, -torch.inf).softmax(-1).detach()
        return attn.o_proj((P @ v).transpose(0, 1).reshape(T, -1))

    def feed_forward(mlp: Any, h: Tensor) -> Tensor:
        if family == "phi3":
            g, up = mlp.gate_up_proj(h).chunk(2, -1)
            activated = mlp.activation_fn(g)
        else:
            g, up = mlp.gate_proj(h), mlp.up_proj(h)
            activated = mlp.act_fn(g)
        if gate == "up":  # as the paper does for Phi
            return mlp.down_proj(g * (activated / g).detach() * up.detach())
        return mlp.down_proj(activated.detach() * up)

    for index, block in enumerate(decoder.layers[: layer or config.num_hidden_layers]):
        if family == "olmo2":  # norms after the sublayers only
            x = x + norm(block.post_attention_layernorm, attend(block.self_attn, x, index))
            x = x + norm(block.post_feedforward_layernorm, feed_forward(block.mlp, x))
        elif gemma:  # before and after
            out = attend(block.self_attn, norm(block.input_layernorm, x), index)
            x = x + norm(block.post_attention_layernorm, out)
            out = feed_forward(block.mlp, norm(block.pre_feedforward_layernorm, x))
            x = x + norm(block.post_feedforward_layernorm, out)
        else:
            x = x + attend(block.self_attn, norm(block.input_layernorm, x), index)
            x = x + feed_forward(block.mlp, norm(block.post_attention_layernorm, x))
    return (x if layer else norm(decoder.norm, x))[position]


def hand_frozen_jacobian(
    hf: Any, x: Tensor, position: int = -1, gate: str = "frozen", layer: int | None = None
) -> Tensor:
    """Returns J (T, m, d) of the hand-frozen model by `torch.autograd`."""

    def output(z: Tensor) -> Tensor:
        return hand_frozen_output(hf, z, position, gate, layer)

    return torch.autograd.functional.jacobian(output, x).movedim(1, 0).detach()
