"""Attention and MLP of a layer, against hooks on models whose structure is written out by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from elm_lanczos.architectures import tiny_config, tiny_model
from elm_lanczos.errors import UnsupportedModelError
from elm_lanczos.frozen_decoder import FrozenDecoder
from elm_lanczos.layer_parts import LayerModules, LayerParts, layer_parts, outputs_zeroed
from elm_lanczos.model import DetachedModel
from tests.families import CONFIGS, PROMPT, detached_model

pytestmark = pytest.mark.usefixtures("without_gradients")
HAND_WRITTEN = ["llama", "llama-biased", "gemma2", "olmo2", "phi3", "qwen3"]
OTHERS = [
    "opt", "phi", "gpt_neox", "qwen3_moe", "granite", "granitemoehybrid", "glm4", "lfm2",
    "deepseek_v3", "nemotron_h", "recurrent_gemma",
]  # fmt: skip


@pytest.fixture
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def _model(family: str) -> DetachedModel:
    if family in CONFIGS:
        return detached_model(family)
    return DetachedModel(tiny_model(tiny_config(family)))


def _decoder(family: str, **options: Any) -> FrozenDecoder:
    model = _model(family)
    ids = PROMPT % model.embedding.weight.shape[0]
    return model.linearize(ids, **options).decoder


def _added(layer: Any, family: str) -> tuple[dict[str, Tensor], list[Any]]:
    """What attention and MLP add, read off the untouched model with hooks on the last modules."""
    seen: dict[str, Tensor] = {}
    own, after = {"attention": layer.self_attn, "mlp": layer.mlp}, {}
    if family in ("gemma2", "olmo2"):  # behind a norm
        after = {
            "attention": layer.post_attention_layernorm,
            "mlp": layer.post_feedforward_layernorm,
        }
    hooks = [
        module.register_forward_hook(
            lambda _m, _a, out, name=name: seen.__setitem__(
                name, out if isinstance(out, Tensor) else out[0]
            )
        )
        for name, module in (own | after).items()
    ]
    return seen, hooks


@pytest.mark.parametrize("narrow", [False, None])
@pytest.mark.parametrize("family", HAND_WRITTEN)
def test_values_are_those_of_the_model_itself(family: str, narrow: bool | None) -> None:
    decoder = _decoder(family, narrow=narrow)
    assert decoder.narrowed is (narrow is None)
    model, p = decoder.model, decoder.position
    caught = [_added(layer, family) for layer in model.layers]
    model.predict(PROMPT)
    for _, hooks in caught:
        for hook in hooks:
            hook.remove()
    for (seen, _), parts in zip(caught, layer_parts(decoder), strict=True):
        values = parts.values()
        for name in ("attention", "mlp"):
            expected = seen[name]
            if parts.narrowed:
                expected = expected[:, p : p + 1]
            ours = getattr(values, name)
            # the model's own norms compute in float32
            assert torch.allclose(ours, expected, atol=1e-6 * float(expected.abs().max())), name
            assert float(ours.norm()) > 0


@pytest.mark.parametrize("family", [*HAND_WRITTEN, *OTHERS])
def test_parts_sum_to_the_layer(family: str) -> None:
    decoder = _decoder(family)
    every = layer_parts(decoder)
    assert len(every) == len(decoder.model.layers)
    generator = torch.Generator().manual_seed(1)
    for parts in every:
        assert parts.modules.attention or parts.modules.mlp
        values, layer = parts.values(), decoder.linearized(parts.segment)
        h, out = parts.segment.input, values.before + values.attention + values.mlp
        index = decoder.segments.index(parts.segment)
        if not parts.narrowed and index + 1 < len(decoder.segments):
            following = decoder.segments[index + 1].input
            if following.shape == out.shape:
                assert torch.allclose(out, following, rtol=1e-9, atol=1e-11)
        attention, mlp = parts.maps()
        v = torch.randn(2, *h.shape, generator=generator, dtype=h.dtype)
        u = torch.randn(2, *out.shape, generator=generator, dtype=h.dtype)
        Av, Mv = attention.jvp(v), mlp.jvp(v)
        assert torch.allclose(parts.passing(v) + Av + Mv, layer.jvp(v), atol=1e-10)
        for map_, product in ((attention, Av), (mlp, Mv)):
            back = map_.vjp(u)
            assert back.shape == v.shape
            assert torch.allclose((back * v).sum(), (u * product).sum(), rtol=1e-9, atol=1e-9)
        if not parts.modules.mlp:
            assert not mlp.jvp(v).any() and not values.mlp.any()
        if not parts.modules.attention:
            assert not attention.jvp(v).any() and not values.attention.any()


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "phi", "opt", "qwen3_moe"])
def test_maps_are_the_differences_of_the_affine_layer(family: str) -> None:
    """J_a v and J_m v as differences of the replayed layer, whole and with its MLP at zero."""
    decoder = _decoder(family, narrow=False)
    generator = torch.Generator().manual_seed(2)
    for parts in layer_parts(decoder):
        h = parts.segment.input
        v = torch.randn(1, *h.shape, generator=generator, dtype=h.dtype)
        mlp = parts.modules.mlp
        with_v, without = parts._replayed((h + v[0], mlp), (h, mlp))  # affine: the step may be 1
        attention_map, mlp_map = parts.maps()
        assert torch.allclose(attention_map.jvp(v)[0], with_v - without - v[0], atol=1e-9)
        assert float(attention_map.jvp(v).norm()) > 1e-3 * float(v.norm())
        whole = parts._replayed((h + v[0], ()), (h, ()))
        assert torch.allclose(mlp_map.jvp(v)[0], whole[0] - whole[1] - with_v + without, atol=1e-9)
        assert float(mlp_map.jvp(v).norm()) > 1e-3 * float(v.norm())


def test_sublayers_by_name() -> None:
    for family, attention, mlp in (
        ("opt", ["OPTAttention"], ["Linear", "Linear"]),
        ("qwen3_moe", ["Qwen3MoeAttention"], ["Qwen3MoeSparseMoeBlock"]),
        ("gemma2", ["Gemma2Attention"], ["Gemma2MLP"]),
        ("lfm2", ["Lfm2ShortConv"], ["Lfm2MLP"]),
        ("bamba", ["BambaMixer"], ["BambaMLP"]),
        ("granitemoe", ["GraniteMoeAttention"], ["GraniteMoeMoE"]),
        ("mamba", ["MambaMixer"], []),
    ):
        found = LayerModules.of(_model(family).layers[0])
        assert [type(m).__name__ for m in found.attention] == attention
        assert [type(m).__name__ for m in found.mlp] == mlp


@pytest.mark.parametrize(("family", "layer"), [("bloom", "BloomBlock"), ("mpt", "MptBlock")])
def test_layers_that_add_by_themselves_are_refused(family: str, layer: str) -> None:
    """Their MLPs return the residual stream with what they add to it."""
    with pytest.raises(UnsupportedModelError, match=rf"\.0 \({layer}\)"):
        layer_parts(_decoder(family))


def test_mixing_without_attention_is_refused() -> None:
    model = detached_model("llama")
    mlp = model.layers[1].mlp

    class Shifted(type(mlp)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x.roll(1, dims=1)

    mlp.__class__ = Shifted
    with pytest.raises(UnsupportedModelError, match=r"layers\.1 .*reach one another"):
        layer_parts(model.linearize(PROMPT).decoder)


def test_not_a_chain_is_refused() -> None:
    decoder = _decoder("llama")
    decoder.not_a_chain = "it has no list of layers"
    with pytest.raises(UnsupportedModelError, match="not a chain of layers"):
        layer_parts(decoder)


def test_hooks_are_gone_also_after_an_error() -> None:
    model = detached_model("llama")
    before = [len(m._forward_hooks) for m in model.hf_model.modules()]
    with pytest.raises(ZeroDivisionError), outputs_zeroed([m.mlp for m in model.layers]):
        raise ZeroDivisionError
    for parts in layer_parts(model.linearize(PROMPT).decoder):
        assert isinstance(parts, LayerParts)
        parts.values(), parts.maps()[1].jvp(parts.segment.input[None])
    assert [len(m._forward_hooks) for m in model.hf_model.modules()] == before
