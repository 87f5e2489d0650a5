"""Tiny models: what is kept of a configuration, and that nothing in a model is trivial."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from elm_lanczos.architectures import (
    HEAD_DIM,
    PROMPT,
    VOCABULARY,
    WIDTH,
    causal_architectures,
    logits_of,
    tiny_config,
    tiny_model,
)
from elm_lanczos.errors import ModelError, UsageError

SEVENTY_BILLION = transformers.LlamaConfig(
    vocab_size=128256,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    bos_token_id=128000,
    eos_token_id=[128001, 128008, 128009],
    dtype="bfloat16",
    rope_parameters={
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
)


def deepseek(**changes: Any) -> PreTrainedConfig:
    """The sizes of DeepSeek-V3, with the quantization its checkpoint comes with."""
    sizes: dict[str, Any] = {"num_hidden_layers": 61, "first_k_dense_replace": 3}
    stored = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    return transformers.DeepseekV3Config(**sizes, quantization_config=stored, **changes)


def modules_of(config: PreTrainedConfig) -> set[str]:
    return {type(module).__name__ for module in tiny_model(config).modules()}


# --------------------------------------------------------------------------- configurations


def test_architectures_are_those_of_the_auto_class() -> None:
    names = causal_architectures()
    assert names == sorted(names) and len(names) > 100
    assert {"llama", "gpt2", "mamba", "deepseek_v3"} <= set(names)


def test_large_configuration_is_shrunk_and_left_as_it_is() -> None:
    before = SEVENTY_BILLION.to_dict()
    small = tiny_config(SEVENTY_BILLION)
    assert SEVENTY_BILLION.to_dict() == before
    assert (small.hidden_size, small.head_dim, small.num_hidden_layers) == (WIDTH, HEAD_DIM, 3)
    assert (small.num_attention_heads, small.num_key_value_heads) == (4, 2)
    assert small.intermediate_size == WIDTH * 28672 // 8192  # its ratio to the width is kept
    assert small.rope_parameters["rope_type"] == "llama3"
    assert small.rope_parameters["factor"] == 8.0
    assert small.rms_norm_eps == 1e-5 and small.tie_word_embeddings is False
    assert max([small.bos_token_id, *small.eos_token_id]) == VOCABULARY - 1
    assert len({small.bos_token_id, *small.eos_token_id}) == 4  # still four different tokens
    assert sum(p.numel() for p in tiny_model(small).parameters()) < 100_000


@pytest.mark.parametrize(
    ("model_type", "field", "value"),
    [
        ("gemma2", "attn_logit_softcapping", 50.0),
        ("gemma2", "final_logit_softcapping", 30.0),
        ("qwen2", "hidden_act", "silu"),
        ("granite", "logits_scaling", 1.0),
        ("phi", "partial_rotary_factor", None),
        ("gpt_oss", "attention_bias", True),
    ],
)
def test_what_is_no_size_stays(model_type: str, field: str, value: Any) -> None:
    default, small = AutoConfig.for_model(model_type), tiny_config(model_type)
    assert getattr(small, field, None) == getattr(default, field, None)
    if value is not None:
        assert getattr(small, field) == value


def test_equal_numbers_of_heads_stay_equal() -> None:
    assert tiny_config("qwen2").num_key_value_heads == 4  # 32 of 32
    assert tiny_config(SEVENTY_BILLION).num_key_value_heads == 2  # 8 of 64
    assert tiny_config(transformers.GemmaConfig(num_key_value_heads=1)).num_key_value_heads == 1


@pytest.mark.parametrize(
    ("model_type", "expand"), [("mamba2", "expand"), ("zamba2", "mamba_expand")]
)
def test_heads_times_their_dimension_stay_the_expanded_width(model_type: str, expand: str) -> None:
    small = tiny_config(model_type).to_dict()
    heads = small.get("num_heads") or small["n_mamba_heads"]
    head_dim = small.get("head_dim") if model_type == "mamba2" else small["mamba_headdim"]
    assert heads * head_dim == small[expand] * small["hidden_size"]


@pytest.mark.parametrize("partial", [0.25, 1.0])
def test_rotary_sections_fill_half_of_the_rotated_dimensions(partial: float) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e7, "mrope_section": [11, 11, 10]}
    config = AutoConfig.for_model(
        "qwen3_5_text", rope_parameters=rope | {"partial_rotary_factor": partial}
    )
    small = tiny_config(config)
    assert sum(small.rope_parameters["mrope_section"]) == int(HEAD_DIM * partial) // 2
    assert small.rope_parameters["rope_theta"] == 1e7
    tiny_model(small)


def test_long_rotary_factors_have_the_length_of_the_small_head() -> None:
    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    config = transformers.Phi3Config(
        original_max_position_embeddings=4096,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, **factors},
    )
    small = tiny_config(config)
    assert len(small.rope_parameters["long_factor"]) == HEAD_DIM // 2
    assert tiny_model(small).config.rope_parameters["rope_type"] == "longrope"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (deepseek(), {"DeepseekV3MLP", "DeepseekV3MoE"}),
        ("jamba", {"JambaAttention", "JambaMambaMixer", "JambaMLP", "JambaSparseMoeBlock"}),
        ("qwen3_next", {"Qwen3NextAttention", "Qwen3NextGatedDeltaNet"}),
        ("nemotron_h", {"NemotronHAttention", "NemotronHMamba2Mixer", "NemotronHMoE"}),
        ("zamba2", {"Zamba2HybridLayer", "Zamba2MambaDecoderLayer"}),
        ("lfm2_moe", {"Lfm2MoeShortConv", "Lfm2MoeAttention", "Lfm2MoeSparseMoeBlock"}),
    ],
)
def test_every_kind_of_layer_still_occurs(config: Any, expected: set[str]) -> None:
    assert expected <= modules_of(tiny_config(config))


@pytest.mark.parametrize("model_type", ["gemma3_text", "gpt_oss", "olmo3", "cohere2"])
def test_both_kinds_of_attention_still_occur(model_type: str) -> None:
    small = tiny_config(model_type)
    assert set(small.layer_types) == set(AutoConfig.for_model(model_type).layer_types)
    assert len(small.layer_types) == small.num_hidden_layers <= 4
    assert small.sliding_window < len(PROMPT)  # so that the window makes a difference


def test_layers_that_share_keys_keep_their_producers() -> None:
    small = tiny_config("gemma3n_text")
    assert 0 < small.num_kv_shared_layers < small.num_hidden_layers
    assert {bool(s) for s in small.activation_sparsity_pattern} == {False, True}


def test_stored_precision_and_quantization_are_dropped() -> None:
    small = tiny_config(deepseek(dtype="bfloat16"))
    assert getattr(small, "quantization_config", None) is None
    assert tiny_model(small).dtype == torch.float64


# ---------------------------------------------------------------------------------- models


@pytest.mark.parametrize(
    "model_type", ["llama", "gemma3_text", "mixtral", "mamba", "bloom", "bert"]
)
def test_nothing_is_zero_and_no_norm_is_one(model_type: str) -> None:
    model = tiny_model(tiny_config(model_type))
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        assert (parameter != 0).any(), name
        assert parameter.numel() == 1 or parameter.std() > 0, name
    assert not model.training


def test_weights_depend_on_the_seed_alone() -> None:
    config, ids = tiny_config("mamba"), torch.tensor(PROMPT)
    before, state = config.to_dict(), torch.random.get_rng_state()
    first, again, other = (logits_of(tiny_model(config, seed=s), ids) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.allclose(first, other)
    assert config.to_dict() == before
    assert torch.equal(torch.random.get_rng_state(), state)


def test_attention_is_far_from_uniform() -> None:
    model = tiny_model(tiny_config("llama"))
    model.set_attn_implementation("eager")
    ids = torch.tensor([PROMPT])
    weights = model(input_ids=ids, output_attentions=True).attentions
    last = torch.stack(weights)[:, 0, :, -1]  # layers × heads × positions seen by the last one
    assert last.max(-1).values.median() > 2 / len(PROMPT)


def test_router_sends_tokens_to_different_experts() -> None:
    model = tiny_model(tiny_config("mixtral"))
    routers = model(input_ids=torch.tensor([PROMPT]), output_router_logits=True).router_logits
    for logits in routers:
        assert len(set(logits.argmax(-1).tolist())) > 1
        assert logits.softmax(-1).max(-1).values.median() > 1.2 / logits.shape[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_that_of_the_weights(dtype: torch.dtype) -> None:
    assert tiny_model(tiny_config("qwen3_moe"), dtype).dtype == dtype


# ---------------------------------------------------------------------------------- errors


def test_unknown_model_type() -> None:
    with pytest.raises(UsageError, match="no model type 'lama'"):
        tiny_config("lama")


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("gemma4_assistant", "layer types"), ("t5", "Unrecognized configuration class")],
)
def test_what_cannot_be_built_says_why(model_type: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        tiny_config(model_type)


def test_model_that_does_not_run_on_plain_ids_says_why() -> None:
    with pytest.raises(ModelError, match=r"forward pass on plain input ids fails: RuntimeError"):
        tiny_model(tiny_config("xglm"), torch.float64)  # it fills a float32 with a float64's lowest


def test_outputs_that_are_not_finite_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(model: nn.Module, _generator: Any) -> None:
        for parameter in model.parameters():
            parameter.data.fill_(1e300)

    monkeypatch.setattr("elm_lanczos.architectures._randomise", explode)
    with pytest.raises(ModelError, match="not finite"):
        tiny_model(tiny_config("llama"))
