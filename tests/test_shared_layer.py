"""The published shapes of `configs/shapes`, and models of them that hold one layer's weights."""

from __future__ import annotations

import pytest
import torch

from benchmarks.shapes import SHAPES, layer_flops, load_shape, parameters, weight_bytes
from elm_lanczos.architectures import tiny_config
from elm_lanczos.shared_layer import VOCABULARY, shared_layer_model

# Billions of parameters, as the Hugging Face hub counts Llama's and the model cards of Qwen 3 give
# them; Gemma 3 4B without its vision tower (Gemma 3 technical report, table 1: 675 million of
# embeddings and 3209 million others).
PUBLISHED = {
    "gemma-3-4b": 3.88,
    "llama-3.1-8b": 8.03,
    "llama-3.3-70b": 70.6,
    "qwen-3-14b": 14.8,
    "qwen-3-32b": 32.8,
}


def test_every_shape_is_named_here() -> None:
    assert {path.stem for path in SHAPES.glob("*.yaml")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_have_the_published_number_of_parameters(name: str) -> None:
    config = load_shape(SHAPES / f"{name}.yaml")
    assert parameters(config) == pytest.approx(PUBLISHED[name] * 1e9, rel=5e-3)
    assert float(name.split("-")[-1].rstrip("b")) == pytest.approx(PUBLISHED[name], rel=0.06)


@pytest.mark.parametrize("name", ["gemma-3-4b", "llama-3.1-8b", "qwen-3-14b"])
def test_layers_share_one_layers_weights_and_stay_layers_of_a_chain(name: str) -> None:
    config = tiny_config(load_shape(SHAPES / f"{name}.yaml"))
    config.vocab_size = VOCABULARY
    model = shared_layer_model(config, 2, dtype=torch.float64)
    one = shared_layer_model(config, 1, dtype=torch.float64)
    first, second = model.layers
    assert first is not second
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(left is right for left, right in pairs)
    assert weight_bytes(model) == weight_bytes(one)
    assert not any(tensor.is_meta for tensor in model.hf_model.state_dict().values())
    lin = model.linearize(torch.arange(11))
    assert lin.not_a_chain == ""
    assert len([segment for segment in lin.segments if "layers" in segment.name]) == 2
    assert lin.certificate().exact


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen-3-14b"])
def test_the_flops_of_a_pass_are_those_of_its_layers(name: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = tiny_config(load_shape(SHAPES / f"{name}.yaml"))
    model, tokens = shared_layer_model(config, 3), 11
    lin = model.linearize(torch.arange(tokens), keep=True)
    cotangent = torch.ones(1, lin.shape[1])
    lin.vjp(cotangent)  # linearises
    with FlopCounterMode(display=False) as counter:
        lin.vjp(cotangent)
    full, narrowed = layer_flops(model, tokens)
    assert lin.narrowed
    assert narrowed < full / 2
    assert counter.get_total_flops() == pytest.approx(2 * full + narrowed, rel=0.05)


def test_buffers_are_those_of_a_model_built_in_the_usual_way() -> None:
    from transformers import AutoModelForCausalLM

    config = tiny_config(load_shape(SHAPES / "gemma-3-4b.yaml"))
    usual = dict(AutoModelForCausalLM.from_config(config).named_buffers())
    ours = dict(shared_layer_model(config).hf_model.named_buffers())
    assert usual.keys() == ours.keys()
    assert all(torch.equal(usual[name], ours[name]) for name in usual)
