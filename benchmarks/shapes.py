"""The shapes of published models in `configs/shapes`, and the flops of their linear path."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml

from elm_lanczos import DetachedModel
from elm_lanczos.model import auto_class

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SHAPES = Path(__file__).parents[1] / "configs/shapes"


def load_shape(path: Path) -> PreTrainedConfig:
    """Returns the configuration that a file of `configs/shapes` describes.

    Args:
        path: YAML with the fields of a Hugging Face configuration.

    Returns:
        The configuration, named after the file.
    """
    from transformers import AutoConfig

    config: PreTrainedConfig = AutoConfig.for_model(**yaml.safe_load(path.read_text()))
    config._name_or_path = path.stem
    return config


def parameters(config: PreTrainedConfig) -> int:
    """Returns how many parameters the model of a configuration has, tied ones once."""
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def layer_flops(model: DetachedModel, tokens: int) -> tuple[int, int]:
    """Returns the flops that one vector's VJP cannot do without, in a layer and in a narrowed one.

    The matrix products of a layer's linear path are those with the weights of v, o, up and down for
    each of T tokens, and with the T×T probabilities Pᵀ of each head. Narrowed to the output
    position, as the last layer is, it has v for all tokens, o, up and down for one, and one row of
    probabilities for each head.

    Args:
        model: Llama-like; its layers all have the first one's shapes.
        tokens: sequence length T.

    Returns:
        Of a layer run for all tokens, and of one run for the output position alone.
    """
    config = model.decoder.config
    v, *others = (weight.numel() for weight in linear_weights(model))
    heads = config.num_attention_heads * config.head_dim
    full = tokens * (v + sum(others)) + tokens**2 * heads
    narrowed = tokens * v + sum(others) + tokens * heads
    return 2 * full, 2 * narrowed


def linear_weights(model: DetachedModel) -> list[torch.Tensor]:
    """Returns the weights of the first layer's linear path: v, o, up and down."""
    attn, mlp = model.layers[0].self_attn, model.layers[0].mlp
    modules = (attn.v_proj, attn.o_proj, mlp.up_proj, mlp.down_proj)
    return [module.weight.detach() for module in modules]


def weight_bytes(model: DetachedModel) -> int:
    """Returns the bytes that a model's parameters really take, shared ones once."""
    return sum(parameter.nbytes for parameter in model.hf_model.parameters())
