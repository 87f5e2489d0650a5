"""Decoders of real shapes, without weights, that need the memory of one layer.

Flops and activations are those of the real model; every layer is a module of its own, but all hold
the parameters of the first one, which are random. Embedding and unembedding are not on the linear
path, so the vocabulary is shrunk.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from elm_lanczos.model import DetachedModel, auto_class, find_decoder, find_layers
from elm_lanczos.storage import slots

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

VOCABULARY = 256


def shared_layer_model(
    config: PreTrainedConfig,
    layers: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> DetachedModel:
    """Builds a model whose layers all share the random weights of the first one.

    Args:
        config: its shape, left as it is.
        layers: how many of its layers to build; all by default.
        device: where to build it.
        dtype: of the weights.
        seed: of the weights. Matrices are normal with variance 1 / columns and all norm weights
            are one, so that each layer adds to the residual stream what is of order one.

    Returns:
        The model, with a vocabulary of `VOCABULARY` tokens.
    """
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers or config.num_hidden_layers
    types = getattr(config, "layer_types", None) or ()
    if len(types) > config.num_hidden_layers:  # of some models they follow from the number
        config.layer_types = types[: config.num_hidden_layers]
    config.vocab_size = VOCABULARY
    config.pad_token_id = None  # a row of the embedding that there may not be
    with torch.device("meta"):
        model = auto_class(config).from_config(config, dtype=dtype).eval()
    first, *others = find_layers(find_decoder(model))
    for layer in others:
        for slot, shared in zip(slots(layer), slots(first), strict=True):
            slot.table[slot.name] = shared.tensor
    generator = torch.Generator(device).manual_seed(seed)
    made: dict[Tensor, Tensor] = {}
    with torch.no_grad():
        for slot in slots(model):
            if (kept := slot.tensor) not in made:
                plain = torch.empty_like(kept, device=device)
                if isinstance(kept, nn.Parameter):
                    plain = nn.Parameter(_random(plain, generator), requires_grad=False)
                made[kept] = plain
            slot.table[slot.name] = made[kept]
        for module in model.modules():
            if list(module.buffers(recurse=False)):
                _fill_buffers(model, module)
    return DetachedModel(model)


def _random(empty: Tensor, generator: torch.Generator) -> Tensor:
    """Fills a matrix with normal values, the weights of a norm with ones."""
    if empty.ndim < 2:
        return empty.fill_(1)
    return empty.normal_(0, empty.shape[-1] ** -0.5, generator=generator)


def _fill_buffers(model: nn.Module, module: nn.Module) -> None:
    """Gives rotary frequencies and embedding scales the values transformers starts them with."""
    weights = [parameter.clone() for parameter in module.parameters(recurse=False)]
    initialise: Any = model._init_weights
    initialise(module)
    for parameter, weight in zip(module.parameters(recurse=False), weights, strict=True):
        parameter.copy_(weight)
