"""Contributions of layers, ablations and norms of Jacobians against explicit matrices and hooks."""

from __future__ import annotations

import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from elm_lanczos import cli
from elm_lanczos.analysis import components
from elm_lanczos.analysis.contributions import BINS, jacobian_norms
from elm_lanczos.architectures import tiny_config, tiny_model
from elm_lanczos.decode import decode_input, decode_output
from elm_lanczos.errors import UnsupportedModelError, UsageError
from elm_lanczos.model import DetachedModel
from tests.families import PROMPT, detached_model, hand_frozen_output, hf_model
from tests.test_matrix_free import WIDTH, NoJacobian
from tests.test_matrix_free import model as wide_model  # noqa: F401

OTHERS = ["opt", "phi", "qwen3_moe", "granite"]


@pytest.mark.parametrize("family", ["llama-biased", "gemma2", "olmo2", *OTHERS])
def test_direct_contributions_sum_to_the_logit(family: str) -> None:
    if family in OTHERS:
        model = DetachedModel(tiny_model(tiny_config(family)))
    else:
        model = detached_model(family)
    ids = PROMPT % model.embedding.weight.shape[0]
    lin = model.linearize(ids, 3 if family == "gemma2" else -1)
    result = components(lin, k=2, target=5)
    assert result.error <= 1e-13
    assert abs(result.logit - result.model_logit) <= 1e-5 * max(abs(result.logit), 1)
    names = [part.module for part in result.parts]
    assert names[0] == "embedding" and names[-1] == "constant"
    assert sum(abs(part.direct) > 1e-9 for part in result.parts) >= len(model.layers)
    assert not result.doubts


def _with_zeroed(hf: Any, module: Any, target: int) -> float:
    """The logit of a plain model with a module's output at zero."""
    x = hf.get_input_embeddings()(PROMPT).detach()

    def zero(_module: Any, _args: Any, output: Any) -> Any:
        return output * 0 if isinstance(output, torch.Tensor) else (output[0] * 0, *output[1:])

    hook = module.register_forward_hook(zero)
    try:
        with torch.no_grad():
            return float(hf(inputs_embeds=x[None]).logits[0, -1, target])
    finally:
        hook.remove()


@pytest.mark.parametrize("family", ["gemma2", "qwen3"])
def test_ablation_in_the_model_itself_is_that_of_a_hook(family: str) -> None:
    model = detached_model(family)
    result = components(model.linearize(PROMPT), k=2)
    hf, target = hf_model(family), result.target
    with torch.no_grad():
        logit = float(hf(PROMPT[None]).logits[0, -1, target])
    for part in result.parts[1:-1]:
        layer = hf.model.layers[part.layer - 1]
        module = layer.self_attn if part.module == "attention" else layer.mlp
        expected = _with_zeroed(hf, module, target) - logit
        assert abs(part.ablated_model - expected) <= 1e-6 * max(1, abs(expected))


@pytest.mark.parametrize("narrow", [False, None])
@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2"])
def test_ablation_in_the_linear_system_is_that_of_its_gradient(
    family: str, narrow: bool | None
) -> None:
    """−⟨∂logit/∂out, out⟩ with the gradient of a model frozen by hand, out recorded by a hook."""
    model = detached_model(family)
    lin = model.linearize(PROMPT, narrow=narrow)
    assert lin.narrowed is (narrow is None)
    result = components(lin, k=2)
    hf = hf_model(family)
    x = hf.get_input_embeddings()(PROMPT).detach().requires_grad_()
    if family == "gemma2":
        x = lin.inputs.clone().requires_grad_()
    outs: list[torch.Tensor] = []
    for layer in hf.model.layers:
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            module.register_forward_hook(lambda _m, _a, out: outs.append(out))
    weight = lin.readout(result.target).cotangent
    logit = weight @ hand_frozen_output(hf, x)
    gradients = torch.autograd.grad(logit, outs)
    effects = [-float((g * out).sum()) for g, out in zip(gradients, outs, strict=True)]
    found = [part.ablated for part in result.parts[1:-1]]
    assert torch.allclose(torch.tensor(found), torch.tensor(effects), rtol=1e-10, atol=1e-12)
    assert max(map(abs, effects)) > 1e-3


@pytest.mark.parametrize("token", [0, 4, -1])
def test_norms_and_largest_rows_and_columns(token: int) -> None:
    lin = detached_model("gemma3").linearize(PROMPT, block=5)
    result = components(lin, token, k=4, largest=6, top=3)
    every = lin.vjp(torch.eye(32, dtype=torch.float64)).transpose(0, 1)  # (T, m, d)
    J = every[token]
    assert torch.allclose(result.norms.rows, every.norm(dim=2), rtol=1e-12)
    assert torch.allclose(result.norms.columns, every.norm(dim=1), rtol=1e-12)
    assert torch.allclose(result.norms.map, J.abs(), rtol=1e-12)  # 32 rows fit as they are
    assert result.rows == J.norm(dim=1).argsort(descending=True)[:6].tolist()
    assert result.columns == J.norm(dim=0).argsort(descending=True)[:6].tolist()
    model = lin.model
    reads = decode_input(J[result.rows], model, 3).ids
    writes = decode_output(J[:, result.columns].T, model, 3).ids
    assert result.reads == [model.token_strings(row) for row in reads]
    assert result.writes == [model.token_strings(row) for row in writes]
    values = torch.linalg.svdvals(J)
    assert torch.allclose(result.S, values[:4], rtol=1e-10)
    assert abs(result.stable_rank - float((values**2).sum() / values[0] ** 2)) <= 1e-9


def test_map_is_the_mean_over_blocks(wide_model: DetachedModel) -> None:  # noqa: F811
    lin = wide_model.linearize(torch.tensor([3, 9]), block=100)
    found = jacobian_norms(lin, 0)
    J = lin.vjp(torch.eye(WIDTH))[:, 0]
    blocks = J.abs().double().reshape(BINS, WIDTH // BINS, BINS, -1).mean((1, 3))
    assert found.map.shape == (BINS, BINS)
    assert torch.allclose(found.map, blocks, rtol=1e-6)


def test_no_jacobian_is_held(wide_model: DetachedModel) -> None:  # noqa: F811
    lin = wide_model.linearize(torch.tensor([3, 9]), block=16)
    with NoJacobian() as watch:
        result = components(lin, k=2)
    assert not result.doubts and watch.largest > 16 * WIDTH


def test_one_token_embeddings_and_batches() -> None:
    model = detached_model("llama")
    one = components(model.linearize(PROMPT[:1]), k=1, largest=1, top=1)
    assert one.error <= 1e-13 and one.token == 0
    ids = model.linearize(PROMPT)
    by_ids, by_embeddings = (
        components(lin, k=2, target=7) for lin in (ids, model.linearize(ids.inputs))
    )
    assert by_ids.to_dataframe().equals(by_embeddings.to_dataframe())
    assert by_embeddings.prompt == "" and by_embeddings.tokens[0] == "x0"
    together = model.linearize_together([PROMPT.flip(0), PROMPT])[1]
    found = components(together, k=2, target=7).to_dataframe()
    for name in ("direct", "ablated", "ablated_model"):
        assert torch.allclose(
            torch.tensor(found[name]), torch.tensor(by_ids.to_dataframe()[name]), equal_nan=True
        )


def test_what_cannot_be_done_is_refused() -> None:
    lin = detached_model("llama").linearize(PROMPT)
    with pytest.raises(UsageError, match="outside the 9 tokens"):
        components(lin, 9)
    with pytest.raises(UsageError, match="at least one"):
        components(lin, largest=0)
    with pytest.raises(UnsupportedModelError, match="told apart"):
        components(DetachedModel(tiny_model(tiny_config("bloom"))).linearize(PROMPT % 64))


def test_doubts_are_said() -> None:
    result = components(detached_model("llama").linearize(PROMPT), k=2)
    assert not result.doubts
    assert "sum to the logit" in replace(result, logit=result.logit + 1e-6).doubts[0]
    assert "converge" in replace(result, converged=False).doubts[0]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["elm-lanczos", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def test_command_line(command: Any, tiny_folder: Path, tmp_path: Path) -> None:
    given = ["components", "my \x1b[31m fellow 自由 \U0001f600", "--model", tiny_folder, "--k", 3]
    files = [tmp_path / f"r.{kind}" for kind in ("json", "csv", "html", "png", "zarr")]
    code, out, err = command(*given, *(part for file in files for part in ("--out", file)))
    assert (code, err) == (0, "")
    assert "stable rank" in out and "attention" in out and "\x1b" not in out
    assert all(file.exists() for file in files)
    for wrong, says in (
        (["--token", 99], "outside"),
        (["--k", 0], "--k"),
        (["--target", "id:99999"], "ids are"),
        (["--out", "x.txt"], "ends in"),
    ):
        code, out, err = command(*given, *wrong)
        assert (code, out) == (2, "") and says in err and "Traceback" not in err


def test_the_token_is_that_at_the_output_position_and_none_behind_it() -> None:
    lin = detached_model("llama").linearize(PROMPT, 3)
    assert components(lin, k=1).token == 3
    for token in (4, -1):
        with pytest.raises(UsageError, match="behind the output position"):
            components(lin, token, k=1)
