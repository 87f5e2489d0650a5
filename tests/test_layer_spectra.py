"""Layers and their modules against Jacobians of models frozen by hand, and what is said of them."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import zarr
from torch import Tensor

from elm_lanczos.analysis import layers
from elm_lanczos.analysis.layer_spectra import _work
from elm_lanczos.architectures import tiny_config, tiny_model
from elm_lanczos.cli import main
from elm_lanczos.errors import DamagedError, UnsupportedModelError, UsageError
from elm_lanczos.layer_operators import KINDS, MODULES, LayerOperators
from elm_lanczos.linearization import Linearization
from elm_lanczos.model import DetachedModel
from elm_lanczos.status import Status
from elm_lanczos.store import open_results
from elm_lanczos.sublayers import Sublayers
from elm_lanczos.svd import svd
from elm_lanczos.verify import verify
from tests.families import PROMPT, detached_model, hf_model
from tests.test_matrix_free import WIDTH, NoJacobian

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
_OTHERS: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "num_key_value_heads": None},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "intermediate_size": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "granite": {"residual_multiplier": 0.3, "embedding_multiplier": 3.0},
    "bloom": {"n_layer": 2, "n_head": 4},
}


def small(family: str) -> DetachedModel:
    """Returns a random model of a family, far from its initial values."""
    sizes = {k: v for k, v in (_SIZES | _OTHERS.get(family, {})).items() if v is not None}
    config = transformers.AutoConfig.for_model(family, **sizes)
    torch.manual_seed(0)
    hf = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    for parameter in hf.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
        else:
            parameter.data *= 4
    return DetachedModel(hf)


FAMILIES = ("llama", "llama-biased", "gemma2", "gemma3", "olmo2", "phi3", "mistral")


def hand_frozen_layers(hf: Any, x: Tensor, position: int) -> dict[tuple[int, str], Tensor]:
    """Returns what each layer and module leaves at the position, every coefficient detached.

    Nothing of this package is used but the models' own weights: Llama-like families by hand.
    """
    config, decoder = hf.config, hf.model
    family = config.model_type
    gemma = family.startswith("gemma")
    T, heads, kv_heads = x.shape[0], config.num_attention_heads, config.num_key_value_heads
    width = config.head_dim if hasattr(config, "head_dim") else config.hidden_size // heads
    distance = torch.arange(T)[:, None] - torch.arange(T)[None]

    def norm(module: Any, z: Tensor) -> Tensor:
        weight = 1 + module.weight if gemma else module.weight
        return z * (z.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt().detach() * weight

    def rotate(z: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = z.shape[-1] // 2
        return z * cos + torch.cat([-z[..., half:], z[..., :half]], -1) * sin

    def heads_of(z: Tensor) -> Tensor:
        return z.view(T, -1, width).transpose(0, 1)

    def attend(attn: Any, h: Tensor, index: int) -> Tensor:
        if family == "phi3":
            sizes = [heads * width, kv_heads * width, kv_heads * width]
            q, k, v = attn.qkv_proj(h).split(sizes, -1)
        else:
            q, k, v = attn.q_proj(h), attn.k_proj(h), attn.v_proj(h)
        if family == "olmo2":
            q, k = norm(attn.q_norm, q), norm(attn.k_norm, k)
        q, k, v = heads_of(q), heads_of(k), heads_of(v)
        if family == "gemma3_text":
            q, k = norm(attn.q_norm, q), norm(attn.k_norm, k)
        kind = [config.layer_types[index]] if family == "gemma3_text" else []
        cos, sin = (t[0].to(x.dtype) for t in decoder.rotary_emb(x, torch.arange(T)[None], *kind))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (t.repeat_interleave(heads // kv_heads, dim=0) for t in (k, v))
        scores = q @ k.mT / (config.query_pre_attn_scalar if gemma else width) ** 0.5
        if family == "gemma2":
            cap = config.attn_logit_softcapping
            scores = cap * torch.tanh(scores / cap)
        slides = config.layer_types[index] == "sliding_attention" if gemma else True
        window = getattr(config, "sliding_window", None) if slides else None
        allowed = (distance >= 0) & (distance < (window or T))
        P = scores.masked_fill(~allowed, -torch.inf).softmax(-1).detach()
        return attn.o_proj((P @ v).transpose(0, 1).reshape(T, -1))

    def feed_forward(mlp: Any, h: Tensor) -> Tensor:
        if family == "phi3":
            g, up = mlp.gate_up_proj(h).chunk(2, -1)
            return mlp.down_proj(mlp.activation_fn(g).detach() * up)
        return mlp.down_proj(mlp.act_fn(mlp.gate_proj(h)).detach() * mlp.up_proj(h))

    found: dict[tuple[int, str], Tensor] = {(-1, "residual"): x}
    for index, layer in enumerate(decoder.layers):
        if family == "olmo2":
            attention = norm(layer.post_attention_layernorm, attend(layer.self_attn, x, index))
            x = x + attention
            mlp = norm(layer.post_feedforward_layernorm, feed_forward(layer.mlp, x))
        elif gemma:
            out = attend(layer.self_attn, norm(layer.input_layernorm, x), index)
            attention = norm(layer.post_attention_layernorm, out)
            x = x + attention
            out = feed_forward(layer.mlp, norm(layer.pre_feedforward_layernorm, x))
            mlp = norm(layer.post_feedforward_layernorm, out)
        else:
            attention = attend(layer.self_attn, norm(layer.input_layernorm, x), index)
            x = x + attention
            mlp = feed_forward(layer.mlp, norm(layer.post_attention_layernorm, x))
        x = x + mlp
        found |= {(index, "residual"): x, (index, "attention"): attention, (index, "mlp"): mlp}
    found[len(decoder.layers), "output"] = norm(decoder.norm, x)
    frozen = norm  # N frozen at h_l[p], as a matrix
    for index in range(len(decoder.layers)):
        h = found[index, "residual"][position].detach()
        scale = frozen(decoder.norm, h) / h
        found[index, "norm"] = scale.detach()
    return {key: value if key[1] == "norm" else value[position] for key, value in found.items()}


def hand_frozen_jacobians(hf: Any, x: Tensor, position: int) -> dict[tuple[str, int, str], Tensor]:
    """Returns the Jacobian (T, m, d) of every kind, layer and module by autograd."""
    depth = len(hf.model.layers)
    found = {}
    J = torch.func.jacrev(lambda z: hand_frozen_layers(hf, z, position))(x)
    value = hand_frozen_layers(hf, x, position)
    for layer in range(depth):
        N = value[layer, "norm"]
        for module in MODULES:
            found["cumulative", layer, module] = N[:, None] * J[layer, module].movedim(1, 0)
    return {key: J.detach() for key, J in found.items()}


def operators(
    lin: Linearization, kind: str, readout: str = "norm", modules: Any = MODULES
) -> tuple[LayerOperators, dict[tuple[int, str], Tensor]]:
    """Returns the operators of a kind and the matrices (T, m, d) that their rows make."""
    sub = Sublayers(lin.decoder)
    tokens = range(lin.decoder.position + 1)
    layers_ = range(len(sub))
    ((batch, _),) = _work(sub, kind, layers_, modules, tokens, readout, (2, 1e-10, 0))
    m = batch.shape[1]
    rows = batch.rows(torch.eye(m, dtype=batch.dtype)).transpose(0, 1)
    found = {}
    for start in range(0, len(batch.places), len(tokens)):
        layer, module, _ = batch.places[start]
        found[layer, module] = rows[start : start + len(tokens)]
    return batch, found


def assert_products(batch: LayerOperators, J: Tensor) -> None:
    """Checks both products of every operator, in mixed order, against its matrix (n, m, d)."""
    generator = torch.Generator().manual_seed(1)
    index = torch.randperm(len(batch.places), generator=generator)
    V = torch.randn(len(index), batch.shape[2], generator=generator, dtype=torch.float64)
    U = torch.randn(len(index), batch.shape[1], generator=generator, dtype=torch.float64)
    scale = J.norm(dim=(1, 2)).max()
    expected = (J[index] @ V[..., None])[..., 0]
    assert (batch.matvec(V, index) - expected).norm(dim=1).max() <= 1e-11 * scale
    expected = (U[:, None] @ J[index])[:, 0]
    assert (batch.rmatvec(U, index) - expected).norm(dim=1).max() <= 1e-11 * scale


@pytest.mark.parametrize("family", FAMILIES)
def test_cumulative_jacobians_are_those_of_a_model_frozen_by_hand(family: str) -> None:
    model = detached_model(family)
    lin = model.linearize(PROMPT)
    batch, found = operators(lin, "cumulative")
    expected = hand_frozen_jacobians(model.hf_model, lin.inputs, lin.position)
    assert len(found) == 9
    for (layer, module), J in found.items():
        right = expected["cumulative", layer, module]
        # rotary tables, and norms of the models themselves, are float32
        assert (J - right).norm() <= 1e-6 * right.norm(), (layer, module)
    assert_products(batch, torch.cat(list(found.values())))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("readout", ["norm", "raw"])
@pytest.mark.parametrize("narrow", [True, False])
def test_kinds_chain_up_to_the_whole_jacobian(kind: str, readout: str, narrow: bool) -> None:
    """`∂y/∂x_i`, the layers' product, and the sum of the modules, from both ends of each kind."""
    from elm_lanczos.frozen_decoder import FrozenDecoder

    model = detached_model("llama-biased")
    decoder = FrozenDecoder(model, model.embed(PROMPT)[None], ids=PROMPT[None], narrow=narrow)
    lin = Linearization(decoder)
    whole = lin.vjp(torch.eye(32, dtype=torch.float64)).transpose(0, 1)
    batch, J = operators(lin, kind, readout)
    assert_products(batch, torch.cat(list(J.values())))
    if kind == "to-end":
        assert {module for _, module in J} == {"residual"}
        # one step further from the end, by the whole layer at every position
        sub = Sublayers(decoder)
        last = sub.vjp(1, J[1, "residual"].transpose(0, 1))
        assert torch.allclose(last.transpose(0, 1), J[0, "residual"], atol=1e-12)
        assert torch.allclose(sub.vjp(0, last).transpose(0, 1), whole, atol=1e-12)
        return
    one = torch.eye(32, dtype=torch.float64)
    for layer in range(3):
        rest = J[layer, "residual"] - J[layer, "attention"] - J[layer, "mlp"]
        if kind == "cumulative" and layer:
            before = J[layer - 1, "residual"]
            if readout == "norm":  # frozen elsewhere: the same up to a factor
                factor = float((rest * before).sum() / before.square().sum())
                before = factor * before
            assert torch.allclose(rest, before, atol=1e-11)
        elif readout == "raw":
            assert torch.allclose(rest[-1], one, atol=1e-12)
            assert rest[:-1].abs().max() <= 1e-12
    if kind == "cumulative" and readout == "norm":
        assert torch.allclose(J[2, "residual"], whole, atol=1e-11)


@pytest.mark.parametrize("family", ["phi", "gpt2", "opt", "mixtral", "qwen3_moe", "granite"])
def test_modules_of_other_families(family: str) -> None:
    """Against autograd with the modules' own outputs detached: parallel, biased, experts."""
    model = small(family)
    lin = model.linearize(torch.tensor([3, 5, 9, 2]))
    sub = Sublayers(lin.decoder)
    assert all(layer.modules for layer in sub.layers), [layer.whole for layer in sub.layers]
    batch, J = operators(lin, "layerwise", "raw")
    assert_products(batch, torch.cat(list(J.values())))
    for layer in sub.layers:
        rest = J[layer.number, "residual"] - sum(J[layer.number, m] for m in layer.modules)
        scale = 1e-10 * J[layer.number, "residual"].norm()
        identity = torch.eye(batch.shape[1], dtype=torch.float64)
        assert (rest[-1] - identity).norm() <= scale and rest[:-1].norm() <= scale
        for module in layer.modules:
            assert J[layer.number, module].norm() > scale
    module = model.layers[0]
    if family == "phi":  # parallel: the MLP reads the stream at p alone
        assert J[0, "mlp"][:-1].norm() <= 1e-12
        h = sub.layers[0].input[-1:].detach()
        ln, mlp = module.input_layernorm, module.mlp
        normed = ln(h)
        scale_ = (h.var(-1, unbiased=False, keepdim=True) + ln.eps).rsqrt()
        z = mlp.fc1(normed)
        ratio = (mlp.activation_fn(z) / z).detach()

        def frozen(x: Tensor) -> Tensor:
            n = (x - x.mean(-1, keepdim=True)) * scale_ * ln.weight + ln.bias
            return mlp.fc2(ratio * mlp.fc1(n))[0]

        right = torch.func.jacrev(frozen)(h)[:, 0].detach()
        assert (J[0, "mlp"][-1] - right).norm() <= 1e-9 * right.norm()


def test_layers_that_cannot_be_told_apart_are_left_out_and_said() -> None:
    model = small("bloom")  # adds the stream inside its modules
    lin = model.linearize(torch.tensor([3, 5, 9, 2]))
    result = layers(lin, k=2)
    assert result.modules == ["residual"] and len(result.left_out) == result.depth
    assert any("residual stream" in fact for fact in result.facts)
    with pytest.raises(UnsupportedModelError, match="none of these layers can be taken apart"):
        layers(lin, modules=["mlp"])


def test_what_is_no_chain_of_layers_is_refused() -> None:
    class Twice(type(hf_model("llama").model)):  # type: ignore[misc]  # not known before
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.last_hidden_state = 2 * output.last_hidden_state
            return output

    model = detached_model("llama")
    model.hf_model.model.__class__ = Twice
    lin = model.linearize(PROMPT)
    assert lin.not_a_chain
    with pytest.raises(UnsupportedModelError, match="not a chain of layers"):
        layers(lin)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [None, [4]])
def test_triplets_are_those_of_the_explicit_matrices(kind: str, tokens: list[int] | None) -> None:
    lin = detached_model("qwen3").linearize(PROMPT)
    result = layers(lin, kinds=[kind], k=3, tol=1e-10, tokens=tokens)
    _, J = operators(lin, kind)
    assert result.doubts == [] and set(result.results) == {
        (kind, layer + 1, module) for layer, module in J
    }
    for (layer, module), matrices in J.items():
        one = result.results[kind, layer + 1, module]
        assert one.index == tuple(tokens or range(9))
        right = matrices[list(one.index)]
        values = torch.linalg.svdvals(right)
        found = one.triplets
        assert torch.allclose(found.S, values[:, :3], atol=1e-9 * float(values.max()))
        residual = right @ found.V.mT - found.U.mT * found.S[:, None]
        assert float(residual.norm(dim=1).max()) <= 1e-9 * float(values.max())
        largest = values[:, 0].clamp_min(1e-300)
        rank = (right.square().sum((1, 2)) / largest**2).where(values[:, 0] > 1e-9, 0.0)
        near = found.stable_rank.where(values[:, 0] > 1e-9, 0.0)
        tolerance = 1e-6 + 6 * found.stable_rank_error  # an estimate where Lanczos is used
        assert ((near - rank).abs() <= tolerance).all()


def test_last_layer_is_the_system_itself() -> None:
    lin = detached_model("gemma2").linearize(PROMPT)
    result = layers(lin, [3], ["residual"], k=3, tol=1e-10)
    whole = svd(lin, 3)
    found = result.results["cumulative", 3, "residual"].triplets
    assert torch.allclose(found.S, whole.S, rtol=1e-8)
    assert torch.allclose((found.U * whole.U).sum(-1).abs(), torch.ones(9, 3).double(), atol=1e-6)


def test_one_token_and_an_inner_position() -> None:
    model = detached_model("llama")
    alone = layers(model.linearize(PROMPT[:1]), kinds=KINDS, k=2)
    assert alone.doubts == [] and len(alone.results) == 9 + 9 + 3
    inner = model.linearize(PROMPT, 4)
    cut = model.linearize(PROMPT[:5])
    one, other = (layers(lin, kinds=KINDS, k=2, tol=1e-10) for lin in (inner, cut))
    for key, found in one.results.items():
        assert found.index == tuple(range(5))
        assert torch.allclose(found.triplets.S, other.results[key].triplets.S, rtol=1e-7)


def test_embeddings_and_a_model_without_tokenizer() -> None:
    model = detached_model("llama")
    x = model.embed(PROMPT) + 0.1
    result = layers(model.linearize(x), [1], k=2)
    assert result.token_ids is None and result.tokens[0] == "x0"
    assert all(word.startswith("<") for word in result.to_dataframe()["writes"][0])


def test_norms_that_are_not_one_map_have_pulls_of_their_own() -> None:
    """A final norm whose frozen form turns with its input: each layer is solved by itself."""

    class Turning(type(hf_model("llama").model.norm)):  # type: ignore[misc]  # not known before
        def forward(self, h: Tensor) -> Tensor:
            return h * torch.sigmoid(h) * self.weight

    model = detached_model("llama")
    model.hf_model.model.norm.__class__ = Turning
    lin = model.linearize(PROMPT)
    sub = Sublayers(lin.decoder)
    work = list(_work(sub, "cumulative", range(3), MODULES, range(9), "norm", (2, 1e-10, 0)))
    assert len(work) == 3  # a batch for each layer
    result = layers(lin, k=2, tol=1e-10)
    raw = layers(lin, k=2, readout="raw", tol=1e-10)
    _, J = operators(lin, "cumulative", "raw")
    weight = model.hf_model.model.norm.weight.detach()
    for layer in range(3):
        h = sub.at_position(sub.stream(layer)[None])[0]
        N = (torch.sigmoid(h) * weight)[:, None]
        for module in MODULES:
            found = result.results["cumulative", layer + 1, module].triplets.S
            right = torch.linalg.svdvals(N * J[layer, module])[:, :2]
            assert torch.allclose(found, right, atol=1e-8 * float(right.max()))
    assert raw.readout == "raw"


def test_a_row_of_all_layers_is_two_pulls_a_layer() -> None:
    lin = detached_model("llama").linearize(PROMPT)
    sub = Sublayers(lin.decoder)
    expected = {"cumulative": 1 + 2 * 3 + 2 * (1 + 2), "layerwise": 1 + 2 * 3, "to-end": 1 + 2}
    for kind in KINDS:
        ((batch, _),) = _work(sub, kind, range(3), MODULES, range(9), "norm", (2, 1e-3, 0))
        before = lin.decoder.pushed
        batch.rows(torch.ones(5, 32, dtype=torch.float64))
        assert lin.decoder.pushed - before == 5 * expected[kind]  # one of them is the norm


def test_memory_that_has_no_room_for_all_layers_makes_groups() -> None:
    model = detached_model("llama")
    ids = PROMPT
    whole = layers(model.linearize(ids), k=2, tol=1e-10)
    lin = model.linearize(ids, memory=3_000_000)
    sub = Sublayers(lin.decoder)
    work = list(_work(sub, "cumulative", range(3), MODULES, range(9), "norm", (2, 1e-10, 0)))
    small = layers(lin, k=2, tol=1e-10)
    assert len(work) > 1
    for key, found in whole.results.items():
        assert torch.allclose(
            found.triplets.S, small.results[key].triplets.S, rtol=1e-7, atol=1e-12
        )


def test_no_jacobian_is_allocated() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
    )
    model = DetachedModel(transformers.LlamaForCausalLM(config).eval())
    with NoJacobian() as watch:
        lin = model.linearize(torch.tensor([3, 9]), block=8)
        result = layers(lin, [1], ["attention", "mlp"], k=1, tol=1e-2)
    assert result.doubts == [] and watch.largest > 2 * WIDTH


def test_what_has_not_converged_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    module, stream = (
        sys.modules[f"elm_lanczos.{name}"] for name in ("analysis.layer_spectra", "svd.stream")
    )
    plan = module._plan

    def hasty(*args: Any) -> Any:
        return replace(plan(*args), method="stream", max_streams=1, width=4, basis=8)

    monkeypatch.setattr(module, "_plan", hasty)
    monkeypatch.setattr(stream, "_finish", lambda *_: None)
    result = layers(detached_model("llama").linearize(PROMPT), k=4, tol=1e-12)
    assert any("not converged" in doubt for doubt in result.doubts)
    assert "not_converged" in set(result.to_dataframe()["status"])


def test_bad_options_are_refused_in_one_line() -> None:
    lin = detached_model("llama").linearize(PROMPT)
    for options, said in (
        ({"layers": [4]}, "layers"),
        ({"layers": [0]}, "layers"),
        ({"tokens": [9]}, "token"),
        ({"modules": ["ffn"]}, "ffn"),
        ({"kinds": []}, "kind"),
        ({"readout": "lens"}, "lens"),
        ({"k": 33}, "k must"),
        ({"kinds": ["to-end"], "modules": ["mlp"]}, "residual"),
    ):
        with pytest.raises(UsageError, match=said) as caught:
            layers(lin, **options)
        assert "\n" not in str(caught.value)


def test_a_readout_and_words_in_every_form(tmp_path: Path, tiny: DetachedModel) -> None:
    """Hostile tokens: control characters, other scripts, markup."""
    text = "a\x1b[31m \u202e中文 مرحبا 🙂 <b>$x$</b>"
    lin = tiny.linearize(text)
    result = layers(lin, kinds=KINDS, k=2, tokens=[0, lin.position])
    for name in ("a.json", "a.csv", "a.png", "a.svg", "a.html", "a.zarr"):
        result.save(tmp_path / name)
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert len(rows) == (2 * 3 + 2 * 3 + 2) * 2 * 2
    assert "\x1b" not in (tmp_path / "a.html").read_text()
    assert "<b>" not in (tmp_path / "a.html").read_text()
    assert len(result.tables()[0]) == 2 * 3 + 2 * 3 + 2
    for kind in KINDS:
        result.plot(kind, 0)
    with pytest.raises(UsageError, match="was not asked for"):
        result.plot(token=1)


def run_cli(arguments: list[str]) -> int:
    """Returns the exit code of a command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal, "signal", lambda *_: None)  # nothing must outlive a test
        patch.setattr(sys, "argv", ["elm-lanczos", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0)


def test_command_line(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(tiny_folder), "-k", "2"]
    out = str(tmp_path / "layers.csv")
    verb = ["layers", "my fellow citizens", *options, "--layers", "1"]
    assert run_cli([*verb, "--kind", "cumulative,to-end", "--json", "--out", out]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["layer"] for row in found["rows"]} == {1} and Path(out).is_file()
    for wrong, said in (
        (["layers"], "PROMPT or --store"),
        ([*verb, "--modules", "ffn"], "unknown module 'ffn'"),
        (["layers", "my", *options, "--layers", "5"], "--layers 5: the model has layers 1 to 2"),
        ([*verb, "--prompt", "1"], "add --store"),
        (["layers", "--store", "x.zarr", *options], "leave out"),
        ([*verb, "--tol", "2"], "tol must be"),
    ):
        assert run_cli(wrong) == 2, wrong
        error = capsys.readouterr().err
        assert said in error and "Traceback" not in error and error.count("\n") <= 2


def test_layers_of_a_stored_run(
    tmp_path: Path,
    tiny_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = str(tmp_path / "run.zarr")
    run = ["run", "--text", "my fellow citizens", "--model", str(tiny_folder), "--k", "2"]
    assert run_cli([*run, "--out", store]) == 0
    assert open_results(store).prompts[0].layers == {}
    verb = [
        "layers",
        "--store",
        store,
        "-k",
        "2",
        "--tol",
        "1e-5",
        "--kind",
        "cumulative,layerwise",
    ]
    assert run_cli(verb) == 0
    prompt = open_results(store).prompts[0]
    found = prompt.layers
    assert len(found) == 2 * 3 * 2 and (2, "mlp", "cumulative") in found
    assert found[2, "mlp", "layerwise"].name == "prompts/000000/layer_02/mlp_layerwise"
    last = found[2, "residual", "cumulative"]
    assert last.readout == "norm" and last.tokens == prompt.tokens
    assert np.allclose(last.S, prompt.S, rtol=1e-5)  # the last layer's is the whole system
    assert (last.status == Status.CONVERGED).all() and last.u_token.shape == (*last.S.shape, 5)
    assert last.to_xarray()["S"].dims == ("token", "component")
    capsys.readouterr()
    assert run_cli(["verify", store]) == 0 and run_cli(["show", store]) == 0
    assert run_cli([*verb[:-2], "--tokens", "last:1"]) == 0  # replaces earlier ones
    again = open_results(store).prompts[0].layers
    assert (again[2, "mlp", "cumulative"].status[:-1] == Status.NOT_REQUESTED).all()
    # killed while a group is written: it is not there, the others are, the next call makes it
    module = sys.modules["elm_lanczos.stored_layers"]
    written = module.PromptGroup.write_rows
    monkeypatch.setattr(module.PromptGroup, "write_rows", interrupted)
    assert run_cli(verb[:-2]) == 130
    monkeypatch.setattr(module.PromptGroup, "write_rows", written)
    assert len(open_results(store).prompts[0].layers) == len(again) - 1
    capsys.readouterr()
    assert run_cli(["verify", store, "--no-model"]) == 0
    assert "is not finished, and is made again by `layers --store`" in capsys.readouterr().out
    assert run_cli(verb[:-2]) == 0
    assert len(open_results(store).prompts[0].layers) == len(again)
    chunk = tmp_path / "run.zarr/prompts/000000/layer_02/mlp/S/c.0.0"
    chunk.write_bytes(b"\0" + chunk.read_bytes()[1:])
    capsys.readouterr()
    assert run_cli(["verify", store, "--no-model"]) == 1
    assert "layer_02/mlp" in capsys.readouterr().out


LAYER = "prompts/000000/layer_02/mlp"


@pytest.fixture(scope="module")
def stored(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one prompt with the Jacobians of one MLP."""
    path = tmp_path_factory.mktemp("stored") / "run.zarr"
    run = ["run", "--text", "my fellow citizens", "--model", str(tiny_folder), "--k", "2"]
    assert run_cli([*run, "--out", str(path)]) == 0
    assert run_cli(["layers", "--store", str(path), "-k", "2", "--layers", "2"]) == 0
    assert verify(path, load=None).faults == ()
    return path


def changed(path: Path, array: str, edit: Callable[[np.ndarray], np.ndarray]) -> None:
    """Rewrites an array of a layer's group; its checksums are right again."""
    opened = zarr.open_array(path / LAYER / array, mode="r+")
    opened[...] = edit(np.asarray(opened[...]))


@pytest.mark.parametrize(
    ("array", "edit", "says"),
    [
        ("S", lambda S: S[:, ::-1] * 100, "descending"),
        ("V", lambda V: V * 2, "not orthonormal"),
        ("residual", lambda r: r + 1e3, "above the tolerance"),
    ],
)
def test_layers_whose_numbers_disagree_are_named(
    stored: Path, tmp_path: Path, array: str, edit: Callable[[np.ndarray], np.ndarray], says: str
) -> None:
    path = Path(shutil.copytree(stored, tmp_path / "run.zarr"))
    changed(path, array, edit)
    (fault,) = verify(path, load=None).faults
    assert (fault.group, fault.array) == (LAYER, array) and says in fault.reason


@pytest.mark.parametrize("lost", ["layer", "module", "kind", "plan"])
def test_layers_without_an_attribute_are_named(stored: Path, tmp_path: Path, lost: str) -> None:
    path = Path(shutil.copytree(stored, tmp_path / "run.zarr"))
    file = path / LAYER / "zarr.json"
    metadata = json.loads(file.read_text())
    del metadata["attributes"][lost]
    file.write_text(json.dumps(metadata))
    (fault,) = verify(path, load=None).faults
    assert fault.group == LAYER and fault.reason.startswith(f"attribute {lost}")
    if lost != "plan":
        with pytest.raises(DamagedError, match=f"{LAYER}/zarr.json is damaged"):
            _ = open_results(path).prompts[0].layers


def test_layers_of_damaged_metadata_are_named(stored: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(stored, tmp_path / "run.zarr"))
    (path / LAYER / "zarr.json").write_text("{no JSON")
    (fault,) = verify(path, load=None).faults
    assert f"{LAYER}/zarr.json is damaged" in str(fault)
    with pytest.raises(DamagedError, match=f"{LAYER}/zarr.json is damaged"):
        _ = open_results(path).prompts[0].layers


def interrupted(*_: Any) -> None:
    """Stands for Ctrl-C."""
    raise KeyboardInterrupt


def test_layers_of_a_system_that_ends_at_a_layer_are_refused() -> None:
    model = detached_model("llama")
    for lin in (
        model.linearize(PROMPT, layer=1),
        model.linearize_together([PROMPT] * 2, layer=1)[1],
    ):
        with pytest.raises(UsageError, match="without layer="):
            layers(lin, k=1)


def test_a_family_whose_name_sounds_like_a_mixer_of_tokens_has_mlps() -> None:
    model = DetachedModel(tiny_model(tiny_config("recurrent_gemma")))
    sub = Sublayers(model.linearize(PROMPT % model.embedding.weight.shape[0]).decoder)
    assert all(layer.modules == ("attention", "mlp") or layer.whole for layer in sub.layers)
    assert any(layer.modules for layer in sub.layers)


def test_an_estimated_stable_rank_has_its_standard_error() -> None:
    result = layers(detached_model("llama").linearize(PROMPT), k=2, tokens=[8], kinds=["layerwise"])
    table = result.to_dataframe()
    if (table["stable_rank_error"] > 0).any():
        assert "stable_rank_error" in result.tables()[0].columns
    assert (table["stable_rank_error"] >= 0).all()
