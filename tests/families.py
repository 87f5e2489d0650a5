"""Tiny random instances of real architectures, and a hand-written frozen model to compare with.

`hand_frozen_output` writes the forward pass of Llama-like decoders out by hand with the paper's
detach pattern (`.detach()` on norm scales, attention probabilities and activated gates). It uses
nothing of `elm_lanczos`, so that its autograd Jacobian is an independent oracle.
"""

from __future__ import annotations

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
_GEMMA3 = {
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**_SMALL),
    "llama-biased": lambda: transformers.LlamaConfig(**_SMALL, attention_bias=True, mlp_bias=True),
    "qwen3": lambda: transformers.Qwen3Config(**_SMALL),
    "gemma3": lambda: transformers.Gemma3TextConfig(**(_SMALL | _GEMMA3)),
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


def hand_frozen_output(hf: Any, x: Tensor, position: int = -1) -> Tensor:
    """Returns y (m,) for embeddings x (T, d), every coefficient detached by hand."""
    config, decoder = hf.config, hf.model
    gemma = config.model_type.startswith("gemma")
    T = x.shape[0]
    positions = torch.arange(T)[None]

    def norm(module: nn.Module, z: Tensor) -> Tensor:
        eps = config.rms_norm_eps
        weight = 1 + module.weight if gemma else module.weight
        scale = (z.pow(2).mean(-1, keepdim=True) + eps).rsqrt().detach()
        return z * scale * weight

    def rotate(z: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = z.shape[-1] // 2
        return z * cos + torch.cat([-z[..., half:], z[..., :half]], -1) * sin

    for index, layer in enumerate(decoder.layers[: config.num_hidden_layers]):
        attn, mlp = layer.self_attn, layer.mlp
        kinds = [config.layer_types[index]] if gemma else []
        cos, sin = decoder.rotary_emb(x, positions, *kinds)
        cos, sin = cos[0].to(x.dtype), sin[0].to(x.dtype)
        h = norm(layer.input_layernorm, x)
        heads = (config.num_attention_heads, config.num_key_value_heads)
        q = attn.q_proj(h).view(T, heads[0], -1).transpose(0, 1)
        k = attn.k_proj(h).view(T, heads[1], -1).transpose(0, 1)
        v = attn.v_proj(h).view(T, heads[1], -1).transpose(0, 1)
        if hasattr(attn, "q_norm"):
            q, k = norm(attn.q_norm, q), norm(attn.k_norm, k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (t.repeat_interleave(heads[0] // heads[1], dim=0) for t in (k, v))
        scores = q @ k.mT * attn.scaling
        distance = torch.arange(T)[:, None] - torch.arange(T)[None]
        allowed = distance >= 0
        if gemma and kinds == ["sliding_attention"]:
            allowed &= distance < config.sliding_window
        P = scores.masked_fill(~allowed, -torch.inf).softmax(-1).detach()
        out = attn.o_proj((P @ v).transpose(0, 1).reshape(T, -1))
        if gemma:
            x = x + norm(layer.post_attention_layernorm, out)
            h = norm(layer.pre_feedforward_layernorm, x)
        else:
            x = x + out
            h = norm(layer.post_attention_layernorm, x)
        out = mlp.down_proj(mlp.act_fn(mlp.gate_proj(h)).detach() * mlp.up_proj(h))
        x = x + (norm(layer.post_feedforward_layernorm, out) if gemma else out)
    return norm(decoder.norm, x)[position]


def hand_frozen_jacobian(hf: Any, x: Tensor, position: int = -1) -> Tensor:
    """Returns J (T, m, d) of the hand-frozen model by `torch.autograd`."""
    J = torch.autograd.functional.jacobian(lambda z: hand_frozen_output(hf, z, position), x)
    return J.movedim(1, 0).detach()
