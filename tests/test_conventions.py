"""Which factor is the value: each row of the tables names real code, and is the one that is linear.

The oracle is independent of the rules: a part of a fused projection is moved while recorded
coefficients are replayed. What is a coefficient must not be noticed, what is the value must be.
"""

from __future__ import annotations

import ast
import copy
import re
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from elm_lanczos.architectures import PROMPT, tiny_config, tiny_model
from elm_lanczos.conventions import COEFFICIENT_MODULES, VALUE_ARGUMENT, VALUE_PART
from elm_lanczos.errors import UnsupportedModelError
from elm_lanczos.freezing import active_mode
from elm_lanczos.model import DetachedModel
from tests.families import PROMPT as LLAMA_PROMPT
from tests.families import with_mlp

F = nn.functional
IDS = torch.tensor(PROMPT)
MODELS = Path(transformers.__file__).parent / "models"


@pytest.fixture(scope="module")
def definitions() -> dict[str, list[set[str]]]:
    """Arguments of every function and method of transformers' modelling files, by its name."""
    found: dict[str, list[set[str]]] = {}

    def collect(body: list[ast.stmt], owner: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef):
                arguments = {a.arg for a in (*node.args.args, *node.args.kwonlyargs)}
                found.setdefault(owner + node.name, []).append(arguments)
            elif isinstance(node, ast.ClassDef):
                collect(node.body, f"{node.name}.")
            else:
                collect(getattr(node, "body", []), owner)
                collect(getattr(node, "orelse", []), owner)

    wanted = re.compile(
        "|".join(re.escape(n.split(".")[0]) for n in (*VALUE_ARGUMENT, *VALUE_PART))
    )
    for file in MODELS.glob("*/modeling_*.py"):
        source = file.read_text(encoding="utf-8")
        if wanted.search(source):
            collect(ast.parse(source).body, "")
    return found


@pytest.mark.parametrize(("name", "value"), VALUE_ARGUMENT.items())
def test_value_argument_exists(
    name: str, value: str, definitions: dict[str, list[set[str]]]
) -> None:
    assert definitions.get(name), f"no modelling file defines {name}"
    assert all(value in arguments for arguments in definitions[name])


@pytest.mark.parametrize("name", VALUE_PART)
def test_splitting_method_exists(name: str, definitions: dict[str, list[set[str]]]) -> None:
    assert definitions.get(name)


@pytest.mark.parametrize(("owner", "names"), COEFFICIENT_MODULES.items())
def test_coefficient_modules_exist(owner: str, names: tuple[str, ...]) -> None:
    files = [f.read_text(encoding="utf-8") for f in MODELS.glob("*/modeling_*.py")]
    text = "".join(file for file in files if f"class {owner}(" in file)
    assert all(f"self.{name} = " in text for name in names)


def change_of_output(model: DetachedModel, module: str, part: slice | Tensor) -> float:
    """Relative change of F when a part of every such module's output is moved under replay."""
    lin = model.linearize(IDS)
    ran = []

    def move(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        mode = active_mode()
        if mode is None or mode.replay is None:
            return output
        ran.append(module)
        change = torch.zeros(output.shape[-1], dtype=output.dtype)
        change[part] = torch.linspace(1, 2, int(change[part].numel()), dtype=output.dtype)
        return output + change

    found = [m for name, m in model.decoder.named_modules() if re.search(module, name)]
    assert found, module
    handles = [m.register_forward_hook(move) for m in found]
    try:
        moved = lin(lin.inputs)
    finally:
        for handle in handles:
            handle.remove()
    assert ran
    return float((moved - lin.output).norm() / lin.output.norm())


def detached(model_type: str, dtype: torch.dtype = torch.float64) -> DetachedModel:
    return DetachedModel(tiny_model(tiny_config(model_type), dtype))


def _third(i: int) -> Any:
    return lambda width: slice(i * width // 3, (i + 1) * width // 3)


def _by_head(i: int, heads: int) -> Any:
    """The i-th of three parts within each head."""

    def choose(width: int) -> Tensor:
        part = width // heads // 3
        return torch.arange(width).view(heads, 3, part)[:, i].flatten()

    return choose


CASES = [
    ("lfm2", r"conv\.in_proj$", [_third(0), _third(1)], _third(2)),
    ("lfm2_moe", r"conv\.in_proj$", [_third(0), _third(1)], _third(2)),
    ("lfm3", r"conv\.in_proj$", [_third(0), _third(1)], _third(2)),
    ("minimax", r"qkv_proj$", [_by_head(0, 4), _by_head(1, 4)], _by_head(2, 4)),
]


@pytest.mark.parametrize(("model_type", "module", "fixed", "value"), CASES)
def test_only_the_value_of_a_fused_projection_is_linear(
    model_type: str, module: str, fixed: list[Any], value: Any
) -> None:
    model = detached(model_type)
    projections = dict(model.decoder.named_modules())
    width = next(p.weight.shape[0] for n, p in projections.items() if re.search(module, n))
    for part in fixed:
        assert change_of_output(model, module, part(width)) <= 1e-12
    assert change_of_output(model, module, value(width)) > 1e-3


@pytest.mark.parametrize(
    ("model_type", "fixed", "value"),
    [
        ("xlstm", r"_layer\.(q|k|igate_preact|fgate_preact|ogate_preact)$", r"_layer\.v$"),
        ("rwkv", r"attention\.(key|receptance)$", r"attention\.value$"),
        ("rwkv", r"feed_forward\.receptance$", r"feed_forward\.key$"),
        ("recurrent_gemma", r"(q_proj|k_proj|block\.linear_y)$", r"block\.linear_x$"),
        ("mamba", r"mixer\.x_proj$", r"mixer\.out_proj$"),
        ("gemma3n_text", r"(modality_router|prediction_coefs|q_proj)$", r"\.up_proj$"),
        ("inkling2_text", r"(weight_proj|q_proj|sink_proj)$", r"v_proj$"),
    ],
)  # fmt: skip
def test_only_the_value_module_is_linear(model_type: str, fixed: str, value: str) -> None:
    dtype = torch.float32 if model_type == "inkling2_text" else torch.float64  # all it runs in
    model = detached(model_type, dtype)
    assert change_of_output(model, fixed, slice(None)) <= 1e-12
    assert change_of_output(model, value, slice(None)) > 1e-3


# ------------------------------------------------------------------- three linear factors


def _linear_attention(m: Any, x: Tensor) -> Tensor:
    q, k = m.gate_proj(x), m.up_proj(x)
    return (q @ k.mT).tril() @ x


def _state_of_keys_and_values(m: Any, x: Tensor) -> Tensor:
    q, k = m.gate_proj(x), m.up_proj(x)
    return q @ (k.mT @ x / 8.0)


def _divided_by_a_coefficient(m: Any, x: Tensor) -> Tensor:
    q, k = m.gate_proj(x), m.up_proj(x)
    return q @ (k.mT @ x / (1.0 + k.norm()))


def _clamped_state(m: Any, x: Tensor) -> Tensor:
    q, k = m.gate_proj(x), m.up_proj(x)
    return q @ (k.mT @ x).clamp(-1e3, 1e3)


def _three_in_one_einsum(m: Any, x: Tensor) -> Tensor:
    q, k = m.gate_proj(x), m.up_proj(x)
    return torch.einsum("bti,bsi,bsj->btj", q, k, x) + x * 0


def _limited_state(m: Any, x: Tensor) -> Tensor:
    q, k = m.gate_proj(x), m.up_proj(x)
    return q @ torch.maximum(k.mT @ x, torch.tensor(-1e3, dtype=x.dtype))


def _normed_state(m: Any, x: Tensor) -> Tensor:
    q, k = m.gate_proj(x), m.up_proj(x)
    return q @ nn.functional.rms_norm(k.mT @ x, (x.shape[-1],))


def _state_in_a_buffer(m: Any, x: Tensor) -> Tensor:
    q, k = m.gate_proj(x), m.up_proj(x)
    state = torch.exp(0 * k.mean() + torch.zeros(1, k.shape[-1], x.shape[-1], dtype=x.dtype))
    state[0].copy_(k[0].mT @ x[0])
    return q @ state


def _short_convolution(m: Any, x: Tensor) -> Tensor:
    inner = m.gate_proj(x) * m.up_proj(x)
    inner = nn.functional.pad(inner, (0, 0, 1, 0))[:, :-1] * 0.5 + inner
    return m.down_proj(m.up_proj(x) * inner)


def _in_one_einsum(m: Any, x: Tensor) -> Tensor:
    state = torch.einsum("bti,btj->bij", m.gate_proj(x), x)
    return torch.einsum("bti,bij->btj", m.up_proj(x), state)


@pytest.mark.parametrize(
    "mlp",
    [
        _linear_attention,
        _state_of_keys_and_values,
        _divided_by_a_coefficient,
        _clamped_state,
        _short_convolution,
        _limited_state,
        _normed_state,
        _state_in_a_buffer,
        _in_one_einsum,
    ],
    ids=lambda f: f.__name__,
)
def test_product_of_three_is_refused_with_the_reason(mlp: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"three linear factors.*layers\.0\.mlp"):
        with_mlp(mlp).linearize(LLAMA_PROMPT)


def test_three_in_one_einsum_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"einsum\(\) in layers\.0\.mlp"):
        with_mlp(_three_in_one_einsum).linearize(LLAMA_PROMPT)


def _weights(m: Any, x: Tensor) -> Tensor:
    return torch.softmax(m.gate_proj(x) @ m.up_proj(x).mT, -1)


@pytest.mark.parametrize(
    "mlp",
    [
        lambda m, x: m.down_proj(F.silu(_weights(m, x) @ m.up_proj(x)) * m.gate_proj(x)),
        lambda m, x: m.down_proj(F.silu(_weights(m, x) @ m.up_proj(x) / 2.0) * m.gate_proj(x)),
        lambda m, x: F.silu(m.down_proj(_weights(m, x) @ m.up_proj(x))) * x,
        lambda m, x: F.silu(_weights(m, x) @ x) * x,
        lambda m, x: F.silu(F.normalize(_weights(m, x) @ x, dim=-1)) * x,
        lambda m, x: F.silu(torch.einsum("bts,bsd->btd", _weights(m, x), x)) * x,
    ],
)
def test_gate_made_of_what_tokens_were_mixed_into_is_refused(mlp: Any) -> None:
    """`silu(mixed) · projection` would go through the projection and fix the value path."""
    with pytest.raises(UnsupportedModelError, match=r"layers\.0"):
        with_mlp(mlp).linearize(LLAMA_PROMPT)


@pytest.mark.parametrize("gate", ["frozen", "up"])
def test_gate_of_a_mixer_and_gates_written_in_other_ways(gate: str) -> None:
    def output_gate(m: Any, x: Tensor) -> Tensor:
        return m.down_proj(F.silu(m.gate_proj(x)) * (_weights(m, x) @ m.up_proj(x)))

    def scaled(m: Any, x: Tensor) -> Tensor:
        g = m.gate_proj(x)
        return m.down_proj(F.silu(g / (1 + g.norm())) * (m.up_proj(x) / 2.0))

    def by_einsum(m: Any, x: Tensor) -> Tensor:
        up = torch.einsum("btd,fd->btf", x, m.up_proj.weight)
        return m.down_proj(F.silu(m.gate_proj(x)) * up)

    for mlp in (output_gate, scaled, by_einsum):
        assert with_mlp(mlp, gate=gate).linearize(LLAMA_PROMPT).certificate().exact


def test_gate_that_may_or_may_not_be_of_an_mlp_is_refused_under_up_only() -> None:
    def two_inputs(m: Any, x: Tensor) -> Tensor:
        return m.down_proj(F.silu(m.gate_proj(x + 0.0 * x)) * m.up_proj(x.clone() + x))

    def unknown(m: Any, x: Tensor) -> Tensor:
        joined = torch.cat([m.up_proj(x[:, :4]), m.up_proj(x[:, 4:])], dim=1)
        return m.down_proj(F.silu(m.gate_proj(x)) * joined)

    assert with_mlp(two_inputs, gate="up").linearize(LLAMA_PROMPT).certificate().exact
    assert with_mlp(unknown).linearize(LLAMA_PROMPT).certificate().exact
    with pytest.raises(UnsupportedModelError, match="gate='up' cannot be used; gate='frozen' can"):
        with_mlp(unknown, gate="up").linearize(LLAMA_PROMPT)


def test_scores_under_a_softmax_are_no_product_of_three() -> None:
    def attention(m: Any, x: Tensor) -> Tensor:
        q, k = m.gate_proj(x), m.up_proj(x)
        return torch.softmax(q @ k.mT, -1) @ x

    assert with_mlp(attention).linearize(LLAMA_PROMPT).certificate().exact


def test_divisor_may_be_any_function_of_the_input() -> None:
    def normalised(m: Any, x: Tensor) -> Tensor:
        return x / (1.0 + (m.gate_proj(x) * m.up_proj(x)).square().sum(-1, keepdim=True))

    assert with_mlp(normalised).linearize(LLAMA_PROMPT).certificate().exact


# ------------------------------------------------------------------------- what models do


def test_no_grad_inside_a_model_does_not_cut_the_linear_path() -> None:
    def plain(m: Any, x: Tensor) -> Tensor:
        return m.down_proj(nn.functional.silu(m.gate_proj(x)) * m.up_proj(x))

    def cut(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            return plain(m, x)

    expected = with_mlp(plain).linearize(LLAMA_PROMPT)
    found = with_mlp(cut).linearize(LLAMA_PROMPT)
    assert found.certificate().exact
    u = torch.randn(32, dtype=torch.float64)
    assert torch.equal(found.vjp(u), expected.vjp(u))
    assert torch.is_grad_enabled()


def test_everything_is_put_back() -> None:
    for model_type in ("bloom", "minimax", "xlstm", "mamba2", "recurrent_gemma", "gemma3n_text"):
        hf = tiny_model(tiny_config(model_type))
        space = vars(sys.modules[type(hf).__module__])
        classes = [v for v in space.values() if isinstance(v, type)]
        before = dict(space), [dict(vars(c)) for c in classes]
        model = DetachedModel(hf)
        with pytest.raises(RuntimeError, match="midway"), model.frozen():
            changed = dict(space) != before[0] or [dict(vars(c)) for c in classes] != before[1]
            assert changed or any(m._forward_hooks for m in hf.modules())
            raise RuntimeError("midway")
        assert dict(space) == before[0]
        assert [dict(vars(c)) for c in classes] == before[1]
        assert not any(m._forward_hooks for m in hf.modules())


def test_two_threads_do_not_undo_each_other() -> None:
    models = [detached("lfm2") for _ in range(2)]
    method = type(models[0].layers[0].conv).forward
    results: list[bool] = []

    def work(model: DetachedModel) -> None:
        results.extend(model.linearize(IDS).certificate().exact for _ in range(3))

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 6
    assert type(models[0].layers[0].conv).forward is method
    assert all(m.hf_model.config._attn_implementation == "sdpa" for m in models)


def test_what_modules_keep_on_themselves_is_put_back() -> None:
    model = detached("recurrent_gemma")
    model.predict(IDS)
    states = [vars(m).get("recurrent_states") for m in model.hf_model.modules()]
    lin = model.linearize(IDS)
    lin.vjp(torch.randn(lin.shape[1], dtype=torch.float64))
    after = [vars(m).get("recurrent_states") for m in model.hf_model.modules()]
    assert any(state is not None for state in states)
    assert all(a is b for a, b in zip(states, after, strict=True))
    copy.deepcopy(model.hf_model)


def test_split_that_does_not_happen_is_refused() -> None:
    hf = tiny_model(tiny_config("lfm2"))

    class Other(nn.Module):
        def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
            return hidden_states * 2

    kind = next(type(layer.conv) for layer in hf.model.layers if hasattr(layer, "conv"))
    before = kind.forward
    kind.forward = Other.forward
    try:
        with pytest.raises(UnsupportedModelError, match="splits no projection into 3 parts"):
            DetachedModel(hf).linearize(IDS)
    finally:
        kind.forward = before


def test_another_thread_computes_the_model_itself() -> None:
    model = detached("bloom")
    expected = model.predict(IDS).logits
    found = []

    def compute() -> None:
        with torch.no_grad():
            found.append(model.hf_model(IDS[None]).logits[0, -1])

    with model.frozen():
        thread = threading.Thread(target=compute)
        thread.start()
        thread.join()
    assert torch.allclose(found[0], expected, rtol=1e-12, atol=1e-12)


# -------------------------------------------------------------------- whatever the gate is


@pytest.mark.parametrize("gate", ["frozen", "up"])
@pytest.mark.parametrize("model_type", ["mamba2", "zamba2", "nemotron_h", "recurrent_gemma"])
def test_output_gate_of_a_mixer_is_fixed_whatever_the_gate_of_mlps(
    model_type: str, gate: str
) -> None:
    """`y · silu(z)` after a scan is no gated MLP: `gate="up"` must not fix y and go through z."""
    lin = DetachedModel(tiny_model(tiny_config(model_type)), gate=gate).linearize(IDS)
    assert set(lin.certificate().failures) <= {"fidelity"}  # Zamba 2's own rounding
    u = torch.randn(4, lin.shape[1], dtype=torch.float64)
    of_tokens = lin.vjp(u).norm(dim=(0, 2))
    assert of_tokens.min() > 1e-3 * of_tokens.max()  # earlier tokens come through the scan alone


def test_up_goes_through_the_gates_of_mlps_only() -> None:
    model_types = {"llama": True, "phi3": True, "mixtral": True, "mamba2": False}
    for model_type, has_gated_mlps in model_types.items():
        hf = tiny_model(tiny_config(model_type))
        frozen, up = (DetachedModel(hf, gate=gate).linearize(IDS) for gate in ("frozen", "up"))
        u = torch.randn(frozen.shape[1], dtype=torch.float64)
        differ = (frozen.vjp(u) - up.vjp(u)).norm() > 1e-3 * up.vjp(u).norm()
        assert bool(differ) == has_gated_mlps, model_type
