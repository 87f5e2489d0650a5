"""Tiny random instances of every causal language model that transformers can build.

A freezing rule is exact for an architecture, not for a checkpoint: the same modules with random
weights and a width of 32 exercise it just as well. So any configuration, from a model type's
defaults to that of a 70B checkpoint, is shrunk *by structure*:

- the role of a field (heads, width, rank, window, …) is read from the words of its name, and one
  table says what is left of each role (`ROLES`); ratios to the model's width, equal numbers of
  heads and sums of head dimensions are kept;
- the layers are built on the meta device and compared, and the fewest layers are kept with which
  every kind of layer of the full model still occurs;
- everything that is not a size (biases, caps, activations, gates, norms) stays as it is.

The few models whose configuration does not say enough are in `OVERRIDES`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from elm_lanczos.errors import ModelError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY, POSITIONS, WIDTH, HEADS, HEAD_DIM = 128, 64, 32, 4, 8
LEAST_LAYERS = 3
"""Layers kept of a model whose layers are all alike: a first, a middle and a last one."""

PROMPT = (10, 17, 42, 42, 9, 88, 33, 61, 25, 70, 12)
"""Token ids that are no special tokens of any tiny model; longer than every tiny window."""

ROLES: tuple[tuple[str, str], ...] = (
    # the first pattern found in a field's name gives its role; see `_smaller` for what each keeps
    ("special token", r"(token|bos|eos|pad)_(id|index)$"),
    ("kept", r"label|_(ids|idxs|idx|index)$|_layers$|layer_types|seed|kernel|d_conv|conv1d_width"),
    ("vocabulary", r"vocab|codebook_size|n_langs"),
    ("positions", r"max_.*position|max_.*length|max_seq_len|n_positions|n_ctx|context_length"),
    ("window", r"window|chunk|block_size|local_attention|compress_r|topk_blocks|_budget|index_topk"),
    ("key heads", r"(kv|key_value|key)_heads|query_groups|n_?groups$"),
    ("heads", r"heads?(_per_layer)?$|n_heads"),
    ("rotary dim", r"rotary_dim"),
    ("head dim", r"head_?(dim|size)|d_kv|d_head|dim_head|kv_channels"),
    ("rank", r"rank"),
    ("state", r"d_state|state_size"),
    ("chosen", r"experts?_per_tok|topk$|moe_k$|top_k$"),
    ("chosen groups", r"topk_group"),
    ("groups", r"n_group$|num_expert_group|o_groups"),
    ("shared experts", r"shared_experts$"),
    ("experts", r"experts$|expert_num"),
    ("width", r"size|dim|d_model|n_embd|n_inner|width|ff|d_inner|d_ssm"),
)
_DEPTH = r"num_hidden_layers|n_layers?|num_layers|((num_)?(en|de)coder|mask)_layers|num_blocks|.*_per_stack"
_WIDTH = ("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "dim")
_UNNAMED = 16
"""Largest value left of an integer whose name says nothing."""

OVERRIDES: dict[str, dict[str, Any]] = {}


def causal_architectures() -> list[str]:
    """Returns the model types that `transformers.AutoModelForCausalLM` knows, sorted."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(config_or_model_type: PreTrainedConfig | str) -> PreTrainedConfig:
    """Returns a configuration of the same architecture a few thousand times smaller.

    Args:
        config_or_model_type: any configuration, or a model type for that type's defaults. It is
            left as it is.

    Returns:
        A new configuration of the same class.

    Raises:
        UsageError: if transformers has no such model type.
        ModelError: if its default configuration cannot be constructed, or no model can be built
            from it even on the meta device.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    if isinstance(config_or_model_type, str):
        if config_or_model_type not in CONFIG_MAPPING:
            raise UsageError(f"transformers has no model type {config_or_model_type!r}")
        given = OVERRIDES.get(config_or_model_type, {})
        config = _attempt("its default configuration", AutoConfig.for_model, config_or_model_type)
    else:
        config, given = config_or_model_type, {}
    kind = type(config)
    plain = _narrow(config.to_dict() | given)
    return _shallow(kind, plain)


# ------------------------------------------------------------------------------ widths


def _role(name: str) -> str:
    return next((role for role, pattern in ROLES if re.search(pattern, name)), "")


def _narrow(plain: dict[str, Any]) -> dict[str, Any]:
    """Shrinks every size in a configuration's plain data, sub-configurations included."""
    ints = {k: v for k, v in plain.items() if type(v) is int}
    width = next((ints[k] for k in _WIDTH if k in ints), None)
    small: dict[str, Any] = {}
    special = iter(range(VOCABULARY - 1, 0, -1))
    for name, value in plain.items():
        if name in ("quantization_config", "auto_map", "id2label", "label2id"):
            continue  # how a checkpoint is stored and loaded, and what another head predicts
        if isinstance(value, dict) and ("model_type" in value or name.endswith("_config")):
            small[name] = _narrow(value)
        elif isinstance(value, dict) and name == "per_layer_config":
            small[name] = {k: _narrow(plain | v) | {} for k, v in value.items()}
            small[name] = {k: {n: small[name][k][n] for n in v} for k, v in value.items()}
        else:
            small[name] = rebuild_ints(value, lambda v, n=name: _smaller(n, v, ints, width, special))
    if "num_key_value_heads" in small and small["num_key_value_heads"] is None:
        small["num_key_value_heads"] = small.get("num_attention_heads")
    if "head_dim" in small and small["head_dim"] is None:
        small["head_dim"] = HEAD_DIM
    parts = ("qk_nope_head_dim", "qk_rope_head_dim")
    if "qk_head_dim" in small and all(p in small for p in parts):
        small["qk_head_dim"] = sum(small[p] for p in parts)
    _narrow_rope(small)
    return small


def rebuild_ints(value: Any, change: Callable[[int], int]) -> Any:
    if isinstance(value, dict):
        return {k: rebuild_ints(v, change) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(rebuild_ints(v, change) for v in value)
    return change(value) if type(value) is int else value


def _smaller(
    name: str, value: int, ints: dict[str, int], width: int | None, special: Iterator[int]
) -> int:
    """Returns what is left of one integer."""
    role = _role(name)
    if role == "special token":
        return value if value < VOCABULARY else next(special)
    if role == "kept" or re.fullmatch(_DEPTH, name):
        return value
    if role == "width":
        if not width:
            return min(value, WIDTH)
        return min(value, max(8, 8 * round(WIDTH * value / width / 8)), 4 * WIDTH)
    if role == "heads":
        expand = next((ints[k] for k in ("expand", "mamba_expand") if k in ints), None)
        if expand and width and any(
            value * d == expand * width for k, d in ints.items() if _role(k) == "head dim"
        ):
            return expand * WIDTH // HEAD_DIM
        return min(value, HEADS)
    if role == "key heads":
        prefix = name.split("num_")[0]
        partners = [v for k, v in ints.items() if _role(k) == "heads" and k.startswith(prefix)]
        return min(value, HEADS if value in partners else HEADS // 2)
    grouped = any(_role(k) == "groups" and v > 1 for k, v in ints.items())
    largest = {
        "vocabulary": VOCABULARY,
        "positions": POSITIONS,
        "window": 4,
        "rotary dim": HEAD_DIM // 2,
        "head dim": HEAD_DIM,
        "rank": 8,
        "state": 8,
        "chosen": 2,
        "chosen groups": 1,
        "groups": 2,
        "shared experts": 1,
        "experts": 8 if grouped else 4,
    }
    return min(value, largest.get(role, _UNNAMED if value > 32 else value))


def _narrow_rope(plain: dict[str, Any]) -> None:
    """Fits rotary parameters to the small head dimension."""
    rotary = plain.get("qk_rope_head_dim") or plain.get("head_dim") or HEAD_DIM
    for name, value in plain.items():
        if not name.startswith("rope") or not isinstance(value, dict):
            continue
        for rope in (value, *(v for v in value.values() if isinstance(v, dict))):
            half = int(rotary * rope.get("partial_rotary_factor", 1)) // 2
            if "original_max_position_embeddings" in rope:
                rope["original_max_position_embeddings"] = POSITIONS // 2
            for factor in ("short_factor", "long_factor"):
                if rope.get(factor):
                    rope[factor] = rope[factor][:half]
            if rope.get("mrope_section"):
                section = rope["mrope_section"]
                rest = [half // len(section)] * (len(section) - 1)
                rope["mrope_section"] = [half - sum(rest), *rest]


# ------------------------------------------------------------------------------- depth


def _shallow(kind: type[PreTrainedConfig], plain: dict[str, Any]) -> PreTrainedConfig:
    """Keeps the fewest layers with which every kind of layer of the full model still occurs."""
    full = _attempt("its configuration", kind.from_dict, _copy(plain))
    model = _attempt("the model", _build, full, "meta")
    text = full.get_text_config(decoder=True)
    key = next((k for k, v in vars(full).items() if v is text), None)
    values = plain if key is None else plain[key]
    depths = {v for k, v in values.items() if re.fullmatch(_DEPTH, k) and type(v) is int}
    depths |= {text.num_hidden_layers} if hasattr(text, "num_hidden_layers") else set()
    stacks = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) in depths}
    depth = max((len(m) for m in stacks.values()), default=0)
    if depth <= LEAST_LAYERS:
        return full
    stacks = {n: m for n, m in stacks.items() if len(m) == depth}
    wanted = _kinds(stacks)
    for chosen in _choices(values, depth):
        cut = _cut(values, depth, chosen)
        small = cut if key is None else plain | {key: cut}
        small = {k: _cut(v, 0, [0, 1]) if k != key and isinstance(v, dict) and "model_type" in v else v for k, v in small.items()}
        try:
            config = kind.from_dict(_copy(small))
            model = _build(config, "meta")
        except Exception:  # too few layers for this model
            if len(chosen) == depth:
                raise
            continue
        if _kinds({n: m for n, m in model.named_modules() if n in stacks}) >= wanted:
            return config
    return full


def _choices(values: dict[str, Any], depth: int) -> Iterator[list[int]]:
    """Yields candidate sets of layers: one of each kind the lists tell apart, then prefixes."""
    lists = [v for v in values.values() if isinstance(v, (list, tuple)) and len(v) == depth]
    members = [v for k, v in values.items() if _names_layers(k, v, depth)]
    kinds: dict[Any, int] = {}
    for i in range(depth):
        kinds.setdefault(repr([v[i] for v in lists] + [i in v for v in members]), i)
    first = sorted(kinds.values())
    first += [i for i in range(depth) if i not in first][: max(0, LEAST_LAYERS - len(first))]
    if len(first) < 8:
        yield sorted(first)
    for n in range(LEAST_LAYERS, depth + 1):
        yield list(range(n))


def _names_layers(name: str, value: Any, depth: int) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) != depth
        and re.search(r"layers|_ids|idxs|indexes", name) is not None
        and "token" not in name
        and all(type(i) is int for i in value)
    )


def _cut(values: dict[str, Any], depth: int, chosen: list[int]) -> dict[str, Any]:
    cut = dict(values)
    for name, value in values.items():
        if type(value) is int and re.fullmatch(_DEPTH, name):
            cut[name] = min(value, len(chosen))
        elif isinstance(value, (list, tuple)) and len(value) == depth:
            cut[name] = type(value)(value[i] for i in chosen)
        elif _names_layers(name, value, depth):
            cut[name] = type(value)(chosen.index(i) for i in value if i in chosen)
        elif name == "per_layer_config" and isinstance(value, dict):
            cut[name] = {chosen.index(int(k)): v for k, v in value.items() if int(k) in chosen}
        elif name == "num_kv_shared_layers" and depth:
            cut[name] = value * len(chosen) // depth
    return cut


def _kinds(stacks: dict[str, nn.Module]) -> set[Any]:
    """Returns the different kinds of layers: their modules, shapes and plain attributes."""
    described = [
        {
            (stack, name, type(module).__name__, attribute): value
            for name, module in layer.named_modules()
            for attribute, value in _attributes(module)
        }
        for stack, layers in stacks.items()
        for layer in layers
    ]
    values: dict[Any, list[Any]] = {}
    for layer in described:
        for place, value in layer.items():
            values.setdefault(place, []).append(value)
    counts = {p for p, v in values.items() if len(v) > 2 and len(set(v)) > len(v) / 2}
    return {frozenset((p, v) for p, v in layer.items() if p not in counts) for layer in described}


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield "", ""
    for name, parameter in module.named_parameters(recurse=False):
        yield name, tuple(parameter.shape)
    for name, value in vars(module).items():
        if isinstance(value, (bool, int, float, str)) and not re.search(r"^_|idx|index|layer_(number|id)|^training", name):
            yield name, value


# ------------------------------------------------------------------------------ models


def _copy(plain: dict[str, Any]) -> dict[str, Any]:
    import copy

    return copy.deepcopy(plain)


def _attempt(what: str, function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except Exception as error:  # configurations and models raise anything at all
        raise ModelError(f"{what} cannot be built: {type(error).__name__}: {str(error).strip()[:300]}") from error


def _build(config: PreTrainedConfig, device: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    options = {}
    if dtype == torch.float64:
        options["experts_implementation"] = "eager"
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **options)


def tiny_model(config: PreTrainedConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    model = _attempt("the model", _build, config, "cpu", dtype).eval()
    g = torch.Generator().manual_seed(seed)
    randomise(model, g)
    if model.config.is_encoder_decoder:
        raise ModelError("it is an encoder-decoder")
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        logits = _attempt("its output for plain input ids", lambda: model(input_ids=ids).logits)
    if not logits.isfinite().all():
        raise ModelError("not finite")
    return model


def randomise(model, g):
    for p in model.parameters():
        x = p.data
        if not x.is_floating_point(): continue
        noise = torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype)
        spread = float(x.double().std()) if x.numel() > 1 else 0.0
        centre = float(x.double().mean())
        if x.ndim >= 2 and spread > 0 and abs(centre) < spread / 2:
            p.data = noise * (1.5 / x.shape[-1] ** 0.5)
        else:
            p.data = x + 0.3 * noise
    for name, b in model.named_buffers():
        if name in model.state_dict() and b.is_floating_point() and b.numel() and (b == b.flatten()[0]).all() and abs(float(b.flatten()[0])) <= 1:
            b += 0.3 * torch.randn(b.shape, generator=g).to(b.dtype)
