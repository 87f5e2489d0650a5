"""Tiny random instances of every causal language model that transformers can build.

A freezing rule has to be exact for an architecture, not for a checkpoint: the same modules with
random weights and a width of 32 exercise it just as well. So any configuration, from a model type's
defaults to that of a 70B checkpoint, is shrunk *by structure*: a field's role (heads, width, rank,
window, …) is read from the words of its name, layers are built on the meta device and compared so
that just enough of them are kept for every kind of layer to occur, and everything that is not a
size (biases, caps, activations, gates, norms) stays as the configuration says.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from elm_lanczos.errors import UnsupportedModelError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 128
WIDTH = 32
HEADS = 4
HEAD_DIM = 8

_SIZES: tuple[tuple[str, int], ...] = (
    # the first pattern found in a field's name gives the largest value that is kept
    (r"(token_id|token_index|_index|_idx|seed|_token)$", -1),
    (r"vocab", VOCABULARY),
    (r"max_position|n_positions|n_ctx|max_seq_len|max_.*_positions|context_length|max_length", 64),
    (r"window|chunk_size|chunk_length|local_attention", 4),
    (r"kv_heads|key_value_heads|query_groups", 2),
    (r"mamba_n(um)?_heads", 8),
    (r"heads?$", HEADS),
    (r"head_?(dim|size)|d_kv|d_head|dim_head|kv_channels|headdim|rotary_dim|v_head_dim", HEAD_DIM),
    (r"rank", 8),
    (r"d_state|state_size|ssm_state", 8),
    (r"experts?_per_tok|moe_topk|moe_k$|num_experts_per", 2),
    (r"topk_group", 1),
    (r"n_group$|num_expert_group", 2),
    (r"num_shared|n_shared|moe_num_shared", 1),
    (r"n?um_.*experts?|n_routed_experts|zero_expert_num", 4),
    (r"topk|top_k", 4),
    (r"intermediate|ffn|feed_forward|d_ff|dff|dim_ff|d_inner|mid_dim", 48),
    (
        r"hidden_size|d_model|n_embd|emb_dim|embed_dim|embedding_size|embedding_dim|width|proj_dim",
        WIDTH,
    ),
    (r"block_size|block_multiple", 4),
)
_LAYERS = r"num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers|num_(en|de)coder_layers|num_blocks|num_layers_per_stack"


def causal_architectures() -> list[str]:
    """Returns the model types that transformers' `AutoModelForCausalLM` knows, sorted."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def fields(config):
    return [k for k in vars(config) if not k.startswith("_")]


def _shrink_widths(config):
    from transformers import PreTrainedConfig

    specials = VOCABULARY - 1
    for name in fields(config):
        value = getattr(config, name)
        if isinstance(value, PreTrainedConfig):
            _shrink_widths(value)
        elif isinstance(value, bool):
            continue
        elif isinstance(value, int):
            if re.search(r"token_id$|token_index$", name):
                if value >= VOCABULARY:
                    put(config, name, specials)
                    specials -= 1
                continue
            if re.fullmatch(_LAYERS, name):
                continue
            cap = next((c for p, c in _SIZES if re.search(p, name)), None)
            if cap is None:
                cap = value if value <= 64 else 16
            if 0 <= cap < value:
                put(config, name, cap)
        elif isinstance(value, list) and value and all(type(v) is int for v in value):
            cap = next((c for p, c in _SIZES if re.search(p, name)), None)
            if re.search(r"token_id$|token_index$", name):
                put(config, name, [min(v, VOCABULARY - 1 - i) for i, v in enumerate(value)])
            elif cap and cap > 0 and not name.endswith("layers"):
                put(config, name, [min(v, cap) for v in value])
    if getattr(config, "num_attention_heads", None) and isinstance(
        getattr(config, "qk_head_dim", None), int
    ):
        put(config, "qk_head_dim", config.qk_nope_head_dim + config.qk_rope_head_dim)


def put(config, name, value):
    try:
        setattr(config, name, value)
    except Exception as e:
        object.__setattr__(config, name, value)


def tiny_config(config_or_model_type):
    from transformers import CONFIG_MAPPING

    c = config_or_model_type
    c = CONFIG_MAPPING[c]() if isinstance(c, str) else copy.deepcopy(c)
    _shrink_widths(c)
    _shrink_depth(c)
    return c


def _build(config, device):
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def signature(layer):
    out = []
    for name, m in layer.named_modules():
        attrs = tuple(
            sorted(
                (k, repr(v))
                for k, v in vars(m).items()
                if isinstance(v, (int, str, bool, float))
                and not k.startswith("_")
                and k != "training"
            )
        )
        params = tuple((k, tuple(p.shape)) for k, p in m.named_parameters(recurse=False))
        out.append((name, type(m).__name__, attrs, params))
    return out


def prefix_length(layers):
    sigs = [signature(l) for l in layers]
    n = len(layers)
    # index-like attributes
    values = {}
    for s in sigs:
        for name, _, attrs, _ in s:
            for k, v in attrs:
                values.setdefault((name, k), set()).add(v)
    final = [
        tuple(
            (
                name,
                cls,
                tuple((k, v) for k, v in attrs if len(values[name, k]) <= max(1, n // 2)),
                params,
            )
            for name, cls, attrs, params in s
        )
        for s in sigs
    ]
    kinds = set(final)
    return next(i for i in range(1, n + 1) if set(final[:i]) == kinds), len(kinds)


def text_of(config):
    return config.get_text_config(decoder=True)


def _shrink_depth(config):
    text = text_of(config)
    depth = None
    for name in fields(text):
        if re.fullmatch(_LAYERS, name) and "encoder" not in name:
            depth = getattr(text, name)
            depth_name = name
    model = _build(config, "meta")
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    n = 2
    if lists:
        n, kinds = prefix_length(lists[0])
    n = min(max(n, 3), depth)
    config._probe = (depth, n)
    from transformers import PreTrainedConfig

    def trim(c):
        here = [getattr(c, f) for f in fields(c) if re.fullmatch(_LAYERS, f)]
        for name in fields(c):
            v = getattr(c, name)
            if isinstance(v, PreTrainedConfig):
                trim(v)
            elif re.fullmatch(_LAYERS, name):
                put(c, name, n if c is text else min(v, 2))
            elif isinstance(v, (list, tuple)) and len(v) == depth and c is text:
                put(c, name, v[:n])
            elif (
                isinstance(v, list)
                and re.search("layers|ids|idxs", name)
                and all(type(i) is int for i in v)
            ):
                put(c, name, [i for i in v if i < n])

    trim(config)


def tiny_model(config, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    model = _build(config, "cpu").eval()
    for p in model.parameters():
        if p.ndim == 1:
            p.data += 0.3 * torch.randn_like(p)
        else:
            p.data *= 4
    return model.to(dtype)
