"""The ordinary Jacobian's product against an explicit Jacobian of the untouched decoder."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers

from elm_lanczos import cli
from elm_lanczos.analysis import ordinary
from elm_lanczos.architectures import tiny_config, tiny_model
from elm_lanczos.errors import UnsupportedModelError
from elm_lanczos.model import DetachedModel
from tests.families import CONFIGS, PROMPT, detached_model, hf_model


def explicit(hf: transformers.PreTrainedModel, x: torch.Tensor, position: int) -> torch.Tensor:
    """J° (m, T, d) by reverse mode through a copy whose attention is written out."""
    hf = copy.deepcopy(hf)
    hf.set_attn_implementation("eager")

    def output(z: torch.Tensor) -> torch.Tensor:
        state = hf.get_decoder()(inputs_embeds=z[None], use_cache=False).last_hidden_state
        return state[0, position]

    return torch.func.jacrev(output)(x)


@pytest.mark.parametrize("position", [-1, 4])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_product_equals_that_of_an_explicit_jacobian(family: str, position: int) -> None:
    model = detached_model(family)
    lin = model.linearize(PROMPT, position)
    result = ordinary(lin)
    J = explicit(model.hf_model, lin.inputs, position)
    expected = torch.einsum("mtd,td->m", J, lin.inputs)
    # norms and softmax compute in float32, in which the two modes round differently
    assert (result.ordinary - expected).norm() <= 1e-5 * expected.norm()
    assert result.fidelity <= 1e-6
    assert result.error("detached") <= 1e-13
    assert result.error("ordinary") >= 0.05  # they are not the same thing
    assert not result.doubts


def test_product_is_exact_where_nothing_computes_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = transformers.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0
    )
    torch.manual_seed(0)
    hf = transformers.GPT2LMHeadModel(config).double().eval()
    lin = DetachedModel(hf).linearize(PROMPT)
    result = ordinary(lin)
    expected = torch.einsum("mtd,td->m", explicit(hf, lin.inputs, -1), lin.inputs)
    assert (result.ordinary - expected).norm() <= 1e-12 * expected.norm()
    assert result.constant.norm() > 0.1 * result.output.norm()  # learned positions and biases
    assert torch.allclose(result.detached + result.constant, result.output, atol=1e-12)
    y, made = result.output, result.ordinary
    assert result.deviation("ordinary") == pytest.approx(float((y - made).std() / y.std()))
    table = result.to_dataframe()
    assert table["detached"].tolist() == pytest.approx(table["output"].tolist(), abs=1e-12)


def test_untouched_model_is_left_as_it_was() -> None:
    model = detached_model("llama")
    before = copy.deepcopy(model.hf_model.state_dict())
    model.hf_model.train()
    configs = [m.config for m in model.hf_model.modules() if hasattr(m, "config")]
    names = [config._attn_implementation for config in configs]
    assert "sdpa" in names  # whose fused kernels have no forward derivative
    ordinary(model.linearize(PROMPT))
    assert names == [config._attn_implementation for config in configs]
    assert model.hf_model.training
    after = model.hf_model.state_dict()
    assert all(torch.equal(before[name], value) for name, value in after.items())
    assert not any(m._forward_hooks for m in model.hf_model.modules())


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "cohere2"])
def test_mixtures_latent_attention_sinks_and_parallel_blocks(name: str) -> None:
    model = DetachedModel(tiny_model(tiny_config(name)).double())
    lin = model.linearize(torch.tensor([3, 1, 4, 1, 5]))
    result = ordinary(lin)
    step = 1e-4  # along x: a central difference of the untouched model
    up, down = (model.predict(lin.inputs * (1 + sign * step)).hidden for sign in (1, -1))
    slope = (up - down) / (2 * step)
    # norms in float32 leave 1e-7 / step of the difference
    assert (result.ordinary - slope).norm() <= 1e-2 * (result.output.norm() + slope.norm())
    assert result.fidelity <= 1e-6 and not result.doubts


@pytest.mark.parametrize("prompt", [PROMPT[:1], torch.randn(3, 32, dtype=torch.float64)])
def test_one_token_and_embeddings(prompt: torch.Tensor) -> None:
    result = ordinary(detached_model("gemma3").linearize(prompt))
    assert result.error("detached") <= 1e-13 and result.ordinary.isfinite().all()


def test_system_to_a_layer() -> None:
    lin = detached_model("qwen3").linearize(PROMPT, layer=2)
    result = ordinary(lin)
    assert result.error("detached") <= 1e-13 and 0 < result.error("ordinary") < 10


def test_stored_in_bfloat16_computed_in_float32() -> None:
    hf = hf_model("llama", torch.bfloat16)
    result = ordinary(DetachedModel(hf).linearize(PROMPT))
    raised = ordinary(DetachedModel(hf.float()).linearize(PROMPT))
    assert torch.allclose(result.ordinary, raised.ordinary, atol=1e-5)
    assert not result.doubts


def test_operation_without_a_forward_derivative_is_refused() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    model = detached_model("llama")
    lin = model.linearize(PROMPT)
    mlp = model.hf_model.model.layers[1].mlp
    mlp.register_forward_hook(lambda _m, _a, out: Twice.apply(out))
    with pytest.raises(UnsupportedModelError, match="forward derivative"):
        ordinary(lin)


def test_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / f"x{suffix}" for suffix in (".png", ".csv", ".json", ".html", ".zarr")]
    out = [word for file in files for word in ("--out", str(file))]
    arguments = ["elm-lanczos", "ordinary", "战争 $\x1b[31m السلام 🕊", "--json", *out]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    found = json.loads(capfd.readouterr().out)
    assert len(found["rows"]) == 256 and found["detached_error"] < 2e-6 < found["ordinary_error"]
    assert all(file.exists() for file in files)
    assert "\x1b" not in files[3].read_text()
