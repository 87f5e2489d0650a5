"""Decoders that use ids, embeddings or layouts in ways of their own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from elm_lanczos.architectures import PROMPT, tiny_config, tiny_model
from elm_lanczos.errors import ModelError, UnsupportedModelError
from elm_lanczos.model import DetachedModel
from tests.families import PROMPT as LLAMA_PROMPT
from tests.families import hf_model

IDS = torch.tensor(PROMPT)


def detached(model_type: str, dtype: torch.dtype = torch.float64) -> DetachedModel:
    return DetachedModel(tiny_model(tiny_config(model_type), dtype))


def test_embeddings_changed_in_place_are_not_taken_for_the_input() -> None:
    model = detached("git")  # adds positions to the embeddings it is given
    lin = model.linearize(IDS)
    assert torch.equal(lin.inputs, model.embed(IDS))
    assert lin.certificate().exact
    J = lin.vjp(torch.eye(lin.shape[1], dtype=lin.inputs.dtype))
    rebuilt = torch.einsum("mtd,td->m", J, lin.inputs) + lin.constant
    assert (rebuilt - lin.output).norm() <= 1e-12 * lin.output.norm()


def test_routing_by_token_needs_the_ids() -> None:
    model = detached("deepseek_v4")
    assert model.linearize(IDS).certificate().exact
    with pytest.raises(ModelError, match="itself does not run on this input"):
        model.linearize(model.embed(IDS))


@pytest.mark.parametrize("model_type", ["gemma4_text", "gemma3n_text"])
def test_per_layer_embeddings_are_part_of_the_constant(model_type: str) -> None:
    lin = detached(model_type).linearize(IDS)
    certificate = lin.certificate()
    assert certificate.reconstruction <= 1e-12 and certificate.leak <= 1e-12
    assert certificate.fidelity <= 1e-5
    assert lin.constant.norm() > 1e-3 * lin.output.norm()


def test_stream_of_another_layout_is_taken_as_a_whole() -> None:
    lin = detached("xlnet", torch.float32).linearize(IDS)  # (T, batch, d) inside
    assert lin.not_a_chain and len(lin.segments) == 1
    certificate = lin.certificate()
    assert max(certificate.reconstruction, certificate.fidelity) <= 1e-5
    assert lin.jvp(lin.inputs).shape == lin.output.shape


def test_embeddings_used_twice_are_refused_by_name() -> None:
    hf = hf_model("llama")
    table = hf.model.embed_tokens

    class Again(type(hf.model.norm)):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            return super().forward(x) + table(LLAMA_PROMPT[None])

    hf.model.norm.__class__ = Again
    with pytest.raises(UnsupportedModelError, match="embeddings are used more than once"):
        DetachedModel(hf).linearize(LLAMA_PROMPT)


def test_ids_and_embeddings_give_the_same_system() -> None:
    model = DetachedModel(hf_model("llama"))
    by_ids, by_embeddings = (
        model.linearize(given) for given in (LLAMA_PROMPT, model.embed(LLAMA_PROMPT))
    )
    u = torch.randn(32, dtype=torch.float64)
    assert torch.equal(by_ids.output, by_embeddings.output)
    assert torch.equal(by_ids.vjp(u), by_embeddings.vjp(u))


def test_decoder_is_not_mistaken_for_a_part_of_it() -> None:
    model = detached("blt")
    assert type(model.decoder).__name__ == "BltModel"  # not its encoder of bytes
    with pytest.raises(UnsupportedModelError, match="scatter_reduce"):
        model.linearize(IDS)


def test_decoder_that_takes_no_embeddings_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="CpmAnt"):
        detached("cpmant")


def test_raised_output_shows_the_model_s_own_rounding() -> None:
    hf = hf_model("gemma2")  # norms and softmax in float32, whatever the dtype
    lin = DetachedModel(hf).linearize(LLAMA_PROMPT)
    certificate = lin.certificate()
    assert 1e-12 < certificate.fidelity <= 1e-5
    assert certificate.raised <= 1e-13
    torch.testing.assert_close(hf(LLAMA_PROMPT[None]).logits[0, -1], lin.prediction.logits)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_every_implementation_of_experts(model_type: str, implementation: str) -> None:
    model = detached(model_type, torch.float32)
    config = model.hf_model.config
    config._experts_implementation = implementation
    certificate = model.linearize(IDS).certificate()
    assert certificate.exact, certificate
    assert config._experts_implementation == implementation


@pytest.mark.parametrize("change", ["mul_", "add_"])
def test_stream_changed_in_place_between_layers_is_no_chain(change: str) -> None:
    hf = hf_model("llama")
    kind = type(hf.model.layers[0])

    class Changing(kind):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Any, **options: Any) -> Any:
            out = super().forward(hidden_states, **options)
            getattr(hidden_states, change)(1.5)  # too late for this layer, not for a later reader
            return out

    hf.model.layers[1].__class__ = Changing
    lin = DetachedModel(hf).linearize(LLAMA_PROMPT)
    assert "in place" in lin.not_a_chain and len(lin.segments) == 1
    assert lin.certificate().exact


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_tables_that_depend_on_the_length_are_left_as_they_were(kind: str) -> None:
    """Rotary frequencies kept from a long prompt must not be used for a short one."""
    rope: dict[str, Any] = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4}
    if kind == "longrope":
        factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
        rope |= factors | {"original_max_position_embeddings": 8}

    def fresh() -> Any:
        config = transformers.LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=56, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8,
            rope_parameters=rope,
        )  # fmt: skip
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).double().eval()

    long, short = torch.arange(12), torch.arange(6)
    used = fresh()
    model = DetachedModel(used)
    of_long = model.linearize(long)
    assert of_long.certificate().exact
    assert model.linearize(short).certificate().exact
    u = torch.randn(32, dtype=torch.float64)
    expected = DetachedModel(fresh()).linearize(short).vjp(u)
    assert torch.equal(model.linearize(short).vjp(u), expected)
    with torch.no_grad():
        assert torch.equal(used(short[None]).logits, fresh()(short[None]).logits)


def test_options_of_the_hub_reach_the_configuration(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "inner")
    model = DetachedModel.from_pretrained(tmp_path, subfolder="inner")
    assert model.hidden_size == 32 and model.tokenizer is not None


def test_image_text_model_is_loaded_and_read_as_text(tmp_path: Path) -> None:
    config = tiny_config("llava")
    tiny_model(config, torch.float32).save_pretrained(tmp_path)
    model = DetachedModel.from_pretrained(tmp_path)
    assert "ForConditionalGeneration" in type(model.hf_model).__name__
    assert model.linearize(IDS).certificate().exact


def test_hook_on_the_embedding_does_not_outlive_a_refusal() -> None:
    hf = hf_model("llama")

    class Sine(nn.Module):
        def forward(self, x: Any) -> Any:
            return torch.sinc(x)

    hf.model.layers[1].mlp = Sine()
    with pytest.raises(UnsupportedModelError):
        DetachedModel(hf).linearize(LLAMA_PROMPT)
    assert not hf.model.embed_tokens._forward_hooks
