"""The shapes of published models in `configs/shapes`, and the flops of their linear path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import nn

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
    v, *others = (weight.numel() for weight in linear_weights(model.layers[0]))
    heads = config.num_attention_heads * config.head_dim
    full = tokens * (v + sum(others)) + tokens**2 * heads
    narrowed = tokens * v + sum(others) + tokens * heads
    return 2 * full, 2 * narrowed


def linear_weights(layer: nn.Module) -> list[torch.Tensor]:
    """Returns the weights of a layer's linear path: v, o, up and down."""
    modules: Any = (
        layer.self_attn.v_proj,
        layer.self_attn.o_proj,
        layer.mlp.up_proj,
        layer.mlp.down_proj,
    )
    return [module.weight.detach() for module in modules]


def matrix_products(
    model: DetachedModel, tokens: int, block: int, narrowed: bool
) -> Callable[[], None]:
    """Returns the matrix products that one block of VJPs cannot do without, and nothing else.

    Args:
        model: Llama-like; its layers all have the first one's shapes.
        tokens: sequence length T.
        block: vectors.
        narrowed: whether the last layer is run for the output position alone behind its attention:
            then its o, up and down are for `block` rows, and its Pᵀ is that of one query.

    Returns:
        A function that multiplies them all, in the precision that the passes have.
    """
    config, dtype = model.decoder.config, model.compute_dtype
    layers = [[w.to(dtype) for w in linear_weights(layer)] for layer in model.layers]
    options: dict[str, Any] = {"device": layers[0][0].device, "dtype": dtype}
    widths = {weight.shape[0] for weight in layers[0]}
    inputs = {width: torch.randn(block * tokens, width, **options) for width in widths}
    kv_heads, groups = config.num_key_value_heads, config.num_attention_heads
    groups //= kv_heads
    P = torch.rand(kv_heads, groups * tokens, tokens, **options).mT
    G = torch.randn(kv_heads, groups * tokens, block * config.head_dim, **options)

    P_row = torch.rand(kv_heads, groups, tokens, **options).mT
    G_row = torch.randn(kv_heads, groups, block * config.head_dim, **options)

    def multiply() -> None:
        with model.arithmetic():
            for layer in layers[: len(layers) - narrowed]:
                for weight in layer:
                    torch.mm(inputs[weight.shape[0]], weight)
                torch.bmm(P, G)
            if narrowed:
                v, *others = layers[-1]
                torch.mm(inputs[v.shape[0]], v)
                for weight in others:
                    torch.mm(inputs[weight.shape[0]][:block], weight)
                torch.bmm(P_row, G_row)

    return multiply


def weight_bytes(model: DetachedModel) -> int:
    """Returns the bytes that a model's parameters really take, shared ones once."""
    return sum(parameter.nbytes for parameter in model.hf_model.parameters())
