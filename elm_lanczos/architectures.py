"""Tiny random instances of every causal language model that transformers can build.

A freezing rule is exact for an architecture, not for a checkpoint: the same modules with random
weights and a width of 32 exercise it just as well. So any configuration, from a model type's
defaults to that of a 70B checkpoint, is shrunk *by structure*:

- the words of a field's name say which role it plays (heads, width, rank, window, …), and one table
  says what is left of each role (`ROLES`); ratios to the model's width, equal numbers of heads and
  sums and products of head dimensions are kept;
- the layers are built on the meta device and compared, and the fewest are kept with which every
  kind of layer of the full model still occurs;
- whatever is not a size (biases, caps, activations, gates, norms) stays as it is.

The few model types whose defaults are incomplete are in `COMPLETIONS`, and what cannot be read from
a configuration at all is in `FIXED`.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from elm_lanczos.errors import ModelError, UsageError, first_line
from elm_lanczos.model import auto_class

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Plain = dict[str, Any]
"""A configuration as plain data, sub-configurations as nested dicts."""

WIDTH = 32
HEADS = 4
HEAD_DIM = 8
VOCABULARY = 128
POSITIONS = 64

PROMPT = (10, 17, 42, 42, 9, 88, 33, 61, 25, 70, 12)
"""Token ids that are special in no tiny model: longer than every window, with a repetition."""

ROLES: tuple[tuple[str, str, int | None], ...] = (
    # role, pattern of the field names that play it (the first that matches), the largest value left
    # (None: `_smaller` says)
    ("special token", r"(token|bos|eos|pad)_(id|index)$", None),
    ("depth", r"^(num_(hidden_)?layers|n_layers?|(num_)?(en|de)coder_layers|num_blocks)$", None),
    ("depth", r"_layers_per_stack$", None),
    (
        "kept",
        r"label|_(ids|idxs|idx|index)$|_layers$|layer_types|seed|kernel|conv1d|inference",
        None,
    ),
    ("vocabulary", r"vocab|codebook_size|n_langs", VOCABULARY),
    ("positions", r"max_.*(position|length)|max_seq|n_positions|n_ctx|context_length", POSITIONS),
    ("window", r"window|chunk|block_size|local_attention|compress_r|budget|index_topk|n_floor", 4),
    ("rotary dim", r"rotary_dim", HEAD_DIM // 2),
    ("head dim", r"head_?(dim|size)$|d_kv|d_head|dim_head|kv_channels", None),
    ("key heads", r"(kv|key_value|key)_heads|kv_n_heads|query_groups|n_?groups$", None),
    ("heads", r"heads?(_per_layer)?$", None),
    ("rank", r"rank", 8),
    ("state", r"d_state|state_size", 8),
    ("experts chosen", r"experts?_per_tok|topk$|moe_k$|top_k$", 2),
    ("groups chosen", r"topk_group", 1),
    ("expert groups", r"n_group$|num_expert_group|o_groups", 2),
    ("shared experts", r"shared_experts$", 1),
    ("experts", r"experts$|expert_num", None),
    ("width", r"size|dim|d_model|n_embd|n_inner|width|d_ff|ffn|dff|d_inner|d_ssm|d_rel", None),
    ("number", r"", 16),
)

_WIDTH_NAMES = ("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "dim")
_OTHER_SENSES = r"vision|audio|video|speech|image"  # their widths do not set the scale
_LEADING = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
_TRAILING = ("num_kv_shared_layers",)
_LEAST_LAYERS = 3  # a first, a middle and a last one, where all are alike
_MOST_LAYERS = 8  # beyond it, every trait of a layer is enough, without all their combinations

_QSA = {"n_heads": 16, "kv_heads": 1, "head_dim": 256, "budget": 2048, "compress_ratio": 32}
_QWEN4: Plain = {f"indexer_{name}": value for name, value in _QSA.items()}
_COMPASS_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [24, 20, 20]}
_MIXED = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
COMPLETIONS: dict[str, Plain] = {
    # model type → what its defaults lack for a model to be built from them and run
    "bamba": {"attn_layer_indices": [2, 20]},  # the mask needs one attention layer
    "cohere_compass_text": {"rope_parameters": {"full_attention": _COMPASS_ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2},
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "granitemoehybrid": {"layer_types": _MIXED * 8},  # as for bamba
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {"axial_pos_embds_dim": (128, 128), "hash_seed": 0},  # reproducible
    "xmod": {"default_language": "en_XX"},
}
FIXED: dict[str, Plain] = {
    # model type → tiny sizes that its configuration says nothing about
    "dots3_note_text": {"head_dim": 2 * HEAD_DIM},  # the sum of two dimensions of *some* layers
    "xlstm": {
        "hidden_size": 128,  # its states are multiples of 64 wide
        "embedding_dim": 128,
        "autocast_kernel_dtype": "float32",  # its bfloat16 would be the error of the reference
    },
}


def causal_architectures() -> list[str]:
    """Returns the model types that transformers' `AutoModelForCausalLM` knows, sorted."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def full_config(source: str, **options: Any) -> PreTrainedConfig | str:
    """Returns the configuration that a name stands for, without any weights.

    Args:
        source: a model type (which stands for its defaults and is returned as it is), a hub id, a
            folder, or a `config.json`.
        **options: passed on to `AutoConfig.from_pretrained` (`revision`, `trust_remote_code`, …).

    Returns:
        The configuration, or the model type.

    Raises:
        ModelError: if there is no such configuration.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    if source in CONFIG_MAPPING and not Path(source).exists():
        return source
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(source, **options)
    except Exception as error:  # the libraries below raise anything from OSError to TypeError
        close = difflib.get_close_matches(source, list(CONFIG_MAPPING), n=1, cutoff=0.7)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if Path(source).exists():
            raise ModelError(f"configuration {source} cannot be used: {reason}") from error
        raise ModelError(
            f"{source!r} is no model type of transformers, and no configuration was found there "
            f"({reason}){hint}"
        ) from error
    return config


def tiny_config(config_or_model_type: PreTrainedConfig | str) -> PreTrainedConfig:
    """Returns a configuration of the same architecture with thousands of weights, not billions.

    Args:
        config_or_model_type: a configuration, which is left as it is, or a model type, for the
            defaults of that type.

    Returns:
        A new configuration of the same class.

    Raises:
        UsageError: if transformers has no such model type.
        ModelError: if the configuration cannot be constructed, or no model built from it.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    config = config_or_model_type
    if isinstance(config, str):
        if config not in CONFIG_MAPPING:
            raise UsageError(f"transformers has no model type {config!r}")
        given = COMPLETIONS.get(config, {})
        config = _attempt("its default configuration", AutoConfig.for_model, config, **given)
    plain = config.to_dict()
    small = _narrow(plain, _widest(plain), _special_tokens(plain))
    return _shallow(type(config), small)


def tiny_model(
    config: PreTrainedConfig, dtype: torch.dtype = torch.float64, seed: int = 0
) -> PreTrainedModel:
    """Builds a random model that exercises every part of its architecture.

    Weights are drawn so that attention, routers and gates are far from uniform, and so that nothing
    is trivially zero or one: a gate or layer scale that starts at zero would hide a wrong rule.

    Args:
        config: a small configuration; it is left as it is.
        dtype: of the weights. Experts of a float64 model are computed by the `eager`
            implementation, torch having no grouped matrix product in that precision on the CPU.
        seed: of the weights.

    Returns:
        The model in evaluation mode, on the CPU, with finite logits for `PROMPT`.

    Raises:
        ModelError: if it cannot be built, is an encoder-decoder, does not run on plain input ids in
            that dtype, or gives logits that are not finite.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _attempt("the model", _build, copy.deepcopy(config), "cpu", dtype).eval()
    _randomise(model, torch.Generator().manual_seed(seed))
    if model.config.is_encoder_decoder:
        raise ModelError(f"{type(model).__name__} is an encoder-decoder")
    logits = _attempt("its forward pass on plain input ids", logits_of, model, torch.tensor(PROMPT))
    if not logits.isfinite().all():
        raise ModelError(f"{type(model).__name__} gives logits that are not finite")
    return model


def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Returns a model's own logits (T, vocabulary) for ids (T,)."""
    options: Plain = {}
    if "use_cache" in inspect.signature(model.forward).parameters:
        options["use_cache"] = False
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids[None].to(model.device), **options).logits[0]
    return logits


# ------------------------------------------------------------------------------- width


def _special_tokens(plain: Plain) -> dict[int, int]:
    """Maps the special tokens outside the small vocabulary to its last ids."""
    found: set[int] = set()

    def collect(name: str, value: int) -> int:
        if _role(name)[0] == "special token" and value >= VOCABULARY:
            found.add(value)
        return value

    _each_integer(plain, collect)
    return {token: VOCABULARY - 1 - i for i, token in enumerate(sorted(found))}


def _each_integer(value: Any, change: Callable[[str, int], int], name: str = "") -> Any:
    """Returns plain data with every integer changed, given the path of the field it is in."""
    if isinstance(value, dict):
        return {k: _each_integer(v, change, f"{name}.{k}".strip(".")) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_each_integer(v, change, name) for v in value)
    return change(name, value) if type(value) is int else value


def _role(name: str) -> tuple[str, int | None]:
    return next((role, left) for role, pattern, left in ROLES if re.search(pattern, name))


def _is_config(name: str, value: Any) -> bool:
    return isinstance(value, dict) and ("model_type" in value or name.endswith("_config"))


def _widest(plain: Plain) -> int:
    """Returns the width of a model: the largest hidden size of its text configurations."""
    own = [plain[name] for name in _WIDTH_NAMES if type(plain.get(name)) is int]
    parts = [v for k, v in plain.items() if _is_config(k, v) and not re.search(_OTHER_SENSES, k)]
    return max(own[:1] + [_widest(part) for part in parts], default=0)


def _narrow(plain: Plain, width: int, special: Mapping[int, int]) -> Plain:
    """Shrinks every size of a configuration's plain data, sub-configurations included.

    Args:
        plain: the configuration.
        width: the width of the model, which all its widths keep their ratio to.
        special: the special tokens to rename.

    Returns:
        The configuration of the same model with a width of `WIDTH`.
    """
    sizes = {name: value for name, value in plain.items() if type(value) is int}

    def change(name: str, value: int) -> int:
        return (
            special.get(value, value)
            if _role(name)[0] == "special token"
            else (_smaller(name, value, sizes, width))
        )

    small: Plain = {}
    for name, value in plain.items():
        if name in {"quantization_config", "auto_map", "id2label", "label2id", "dtype"}:
            continue  # how a checkpoint is stored and loaded; labels of other heads
        if name == "per_layer_config":
            shared = {k: v for k, v in plain.items() if k != name}
            small[name] = {
                layer: {k: v for k, v in _narrow(shared | own, width, special).items() if k in own}
                for layer, own in value.items()
            }
        elif _is_config(name, value):
            small[name] = _narrow(value, width, special)
        else:
            small[name] = _each_integer(value, change, name)
    if small.get("head_dim", 0) is None and small.get("num_attention_heads"):
        small["head_dim"] = small.get("hidden_size", WIDTH) // small["num_attention_heads"]
    if small.get("num_key_value_heads", 0) is None:
        small["num_key_value_heads"] = small.get("num_attention_heads")
    if "is_decoder" in small:
        small["is_decoder"] = True  # what makes an encoder's architecture a causal language model
    _narrow_rope(small)
    return small | FIXED.get(plain.get("model_type", ""), {})


def _smaller(name: str, value: int, sizes: dict[str, int], width: int) -> int:
    """Returns what is left of one size, keeping its relations to the others."""

    def scaled(size: int) -> int:
        return min(max(16, 8 * round(WIDTH * size / width / 8)), 4 * WIDTH) if width else WIDTH

    role, left = _role(name)
    if role == "width":
        left = scaled(value)
    elif role == "head dim":
        parts = [sizes.get(f"qk_{part}_head_dim", 0) for part in ("nope", "rope")]
        heads, own = (sizes.get(n, 0) for n in ("num_attention_heads", "hidden_size"))
        left = scaled(own) // HEADS if own and value * heads == own else HEAD_DIM
        left = 2 * HEAD_DIM if all(parts) and value == sum(parts) else left
    elif role == "heads":
        inner = [sizes.get("mamba_d_ssm", 0)]
        inner += [
            sizes[n] * sizes.get("hidden_size", 0) for n in ("expand", "mamba_expand") if n in sizes
        ]
        products = [value * v for n, v in sizes.items() if _role(n)[0] == "head dim"]
        matches = [scaled(size) // HEAD_DIM for size in inner if size in products]
        left = matches[0] if matches else HEADS  # heads · head_dim = expand · width
    elif role == "key heads":
        prefix = name.split("num_")[0]
        queries = [v for n, v in sizes.items() if _role(n)[0] == "heads" and n.startswith(prefix)]
        left = HEADS if value in queries else HEADS // 2
    elif role == "experts":
        groups = [v for n, v in sizes.items() if _role(n)[0] == "expert groups"]
        left = 8 if max(groups, default=1) > 1 else 4
    return value if left is None else min(value, left)


def _narrow_rope(small: Plain) -> None:
    """Fits rotary parameters, one set or one for each type of layer, to the small head."""
    rotary = small.get("qk_rope_head_dim") or small.get("head_dim") or HEAD_DIM
    for name, value in small.items():
        if not (name.startswith("rope") and isinstance(value, dict)):
            continue
        for rope in (value, *(v for v in value.values() if isinstance(v, dict))):
            half = int(rotary * rope.get("partial_rotary_factor", 1)) // 2
            if rope.get("original_max_position_embeddings"):
                rope["original_max_position_embeddings"] = POSITIONS // 2
            for factors in ("short_factor", "long_factor"):
                if rope.get(factors):
                    rope[factors] = rope[factors][:half]
            if sections := rope.get("mrope_section"):
                rest = [half // len(sections)] * (len(sections) - 1)
                rope["mrope_section"] = [half - sum(rest), *rest]


# ------------------------------------------------------------------------------- depth


def _shallow(kind: type[PreTrainedConfig], plain: Plain) -> PreTrainedConfig:
    """Keeps the fewest layers with which every kind of layer of the full model still occurs."""
    full = _attempt("its configuration", kind.from_dict, copy.deepcopy(plain))
    model = _attempt("the model", _build, copy.deepcopy(full), "meta", torch.float32)
    text = full.get_text_config(decoder=True)
    key = next((k for k, v in vars(full).items() if v is text), None)
    values = plain if key is None else plain[key]
    depths = {v for k, v in values.items() if type(v) is int and _role(k)[0] == "depth"}
    depths.add(getattr(text, "num_hidden_layers", 0))
    stacks = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    depth = max((len(m) for m in stacks.values() if len(m) in depths), default=0)
    stacks = {n: m for n, m in stacks.items() if len(m) == depth}
    if depth <= _LEAST_LAYERS:
        return full
    layers = _describe(stacks)
    telling = _telling(layers)
    second_best = full
    for chosen in _choices(values, depth):
        cut = _cut(values, depth, chosen)
        small = {k: _cut(v, 0, [0, 1]) if _is_config(k, v) else v for k, v in plain.items()}
        small = cut if key is None else small | {key: cut}
        try:
            config = kind.from_dict(copy.deepcopy(small))
            model = _build(copy.deepcopy(config), "meta", torch.float32)
        except Exception:  # this model needs other or more layers
            continue
        kept = _describe({n: m for n, m in model.named_modules() if n in stacks})
        if _kinds(kept, telling) >= _kinds(layers, telling):
            return config
        if second_best is full and _traits(kept, telling) >= _traits(layers, telling):
            second_best = config
        if second_best is not full and len(chosen) >= _MOST_LAYERS:
            break
    return second_best


def _choices(values: Plain, depth: int) -> Iterator[list[int]]:
    """Yields layers to keep: one or two of each kind the configuration tells apart; prefixes."""
    kinds: dict[str, list[int]] = {}
    for i in range(depth):
        kind = [
            value[i] if _is_per_layer(value, depth) else i in _members(name, value, depth)
            for name, value in values.items()
        ]
        kinds.setdefault(repr(kind), []).append(i)
    for number in (1, 2):
        chosen = {i for layers in kinds.values() for i in layers[:number]}
        more = [i for i in range(depth) if i not in chosen]
        yield sorted([*chosen, *more[: max(0, _LEAST_LAYERS - len(chosen))]])
    for n in range(_LEAST_LAYERS, depth):
        yield list(range(n))


def _is_per_layer(value: Any, depth: int) -> bool:
    return isinstance(value, (list, tuple)) and 0 < len(value) == depth and not _is_range(value)


def _is_range(value: Any) -> bool:
    return list(value) == list(range(len(value)))


def _members(name: str, value: Any, depth: int) -> list[int]:
    """Returns the layers that a field singles out, if it does so."""
    if type(value) is int and name in _LEADING:
        return list(range(value))
    if type(value) is int and name in _TRAILING:
        return list(range(depth - value, depth))
    if name == "per_layer_config":
        return [int(i) for i in value]
    if isinstance(value, (list, tuple)) and re.search(r"layers$|_ids$|idxs|ind(ex|ic)es", name):
        return [i for i in value if type(i) is int]
    return []


def _cut(values: Plain, depth: int, chosen: list[int]) -> Plain:
    """Returns plain data with the chosen layers only."""
    cut = dict(values)
    for name, value in values.items():
        kept = [chosen.index(i) for i in _members(name, value, depth) if i in chosen]
        if type(value) is int and _role(name)[0] == "depth":
            cut[name] = len(chosen)
        elif _is_per_layer(value, depth):
            cut[name] = [value[i] for i in chosen]
        elif name in (*_LEADING, *_TRAILING):
            cut[name] = len(kept)
        elif name == "per_layer_config":
            cut[name] = {chosen.index(int(i)): v for i, v in value.items() if int(i) in chosen}
        elif _members(name, value, depth):
            cut[name] = kept
    return cut


_Layer = dict[tuple[str, str, str, str], Any]
"""What there is to see of a layer: (stack, module, its class, attribute) → value or shape."""


def _describe(stacks: Mapping[str, nn.Module]) -> list[_Layer]:
    return [
        {
            (stack, re.sub(r"\b\d+\b", "*", name), type(module).__name__, attribute): value
            for name, module in layer.named_modules()
            for attribute, value in _attributes(module)
        }
        for stack, layers in stacks.items()
        for layer in layers.children()
    ]


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield "", True  # the module is there
    for name, parameter in module.named_parameters(recurse=False):
        yield name, tuple(parameter.shape)
    for name, value in vars(module).items():
        if isinstance(value, (bool, int, float, str)) and not name.startswith("_"):
            yield name, value


def _telling(layers: list[_Layer]) -> set[Any]:
    """Returns where layers differ in kind, and not just by their number in the stack."""
    values: dict[Any, list[Any]] = {}
    for layer in layers:
        for place, value in layer.items():
            values.setdefault(place, []).append(value)

    def tells(place: tuple[str, ...], found: list[Any]) -> bool:
        if not place[3]:  # whether there is such a module
            return len(found) < len(layers)
        different = len(set(found))
        numbers = len(found) > 2 and different > len(found) / 2
        return (
            different > 1
            and not numbers
            and not re.search(r"idx|index|layer_(number|id)", place[3])
        )

    return {place for place, found in values.items() if tells(place, found)}


def _kinds(layers: list[_Layer], telling: set[Any]) -> set[Any]:
    return {frozenset((p, v) for p, v in layer.items() if p in telling) for layer in layers}


def _traits(layers: list[_Layer], telling: set[Any]) -> set[Any]:
    return set().union(*_kinds(layers, telling))


# ------------------------------------------------------------------------------ weights


def _attempt(what: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    try:
        return function(*args, **options)
    except Exception as error:  # configurations and models raise anything at all
        line = first_line(error.__cause__ or error)
        reason = f"{type(error).__name__}: {line[:200]}" if line else type(error).__name__
        raise ModelError(f"{what} fails: {reason}") from error


def _build(config: PreTrainedConfig, device: str, dtype: torch.dtype) -> PreTrainedModel:
    options = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    with torch.device(device):
        model: PreTrainedModel = auto_class(config).from_config(config, dtype=dtype, **options)
    return model


def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Draws the weights anew where they are random or zero, and moves them where they are set."""

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)

    for parameter in model.parameters():
        weight = parameter.data
        centre = float(weight.double().mean())
        spread = float(weight.double().std()) if weight.numel() > 1 else 0.0
        if weight.ndim >= 2 and (2 * abs(centre) < spread or not weight.any()):
            parameter.data = noise(weight) * (1.5 / weight.shape[-1] ** 0.5)
        elif weight.is_floating_point():
            shut = centre - math.copysign(1, centre) if abs(centre) > 3 else 0.0
            parameter.data = weight - shut + 0.3 * noise(weight)  # no gate is shut or open for good
    stored = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in stored and buffer.is_floating_point() and buffer.unique().tolist() in ([0], [1]):
            buffer += 0.3 * noise(buffer)  # such as the routers' correction biases
