"""Freezing: the algebra of kinds, what is refused, and that models are left as they were."""

from __future__ import annotations

import threading

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from elm_lanczos.attention import attention, frozen_product
from elm_lanczos.errors import ModelError, UnsupportedModelError
from elm_lanczos.freezing import (
    UNTYPED,
    Freezing,
    Kind,
    Tape,
    function_name,
    linear,
    mark_of,
)
from elm_lanczos.model import DetachedModel
from elm_lanczos.rules import RULES
from tests.families import CONFIGS, PROMPT, hf_model
from tests.test_linearization import Sinc

F64 = torch.float64


def run(function, x: torch.Tensor, **options):
    with torch.no_grad(), Freezing(F64, RULES, **options):
        return function(linear(x))


# --------------------------------------------------------------------------- the algebra


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda x: x.view(2, -1).T.reshape(-1), Kind.LINEAR),
        (lambda x: x + 1, Kind.LINEAR),
        (lambda x: 3 * x[1:] - x[:-1], Kind.LINEAR),
        (lambda x: x * torch.rsqrt(x.pow(2).mean() + 1), Kind.LINEAR),
        (lambda x: x / x.norm(), Kind.LINEAR),
        (lambda x: nn.functional.silu(x) * (2 * x), Kind.LINEAR),
        (lambda x: torch.softmax(x, -1) @ x, Kind.LINEAR),
        (lambda x: nn.functional.gelu(x), Kind.LINEAR),
        (lambda x: torch.sigmoid(x) * x, Kind.LINEAR),
        (lambda x: x * x, Kind.NONLINEAR),
        # which of the two is the gate cannot be told, as in a state-space scan
        (lambda x: nn.functional.silu(x) * x[:, None], Kind.NONLINEAR),
        (lambda x: nn.functional.silu(x) * nn.functional.silu(2 * x), Kind.NONLINEAR),
        (lambda x: x + torch.exp(x), Kind.NONLINEAR),
        (lambda x: x.detach(), Kind.NONLINEAR),
        (lambda x: torch.cat([x, x.abs()]), Kind.NONLINEAR),
        (lambda x: nn.functional.silu(x) * torch.exp(x.flip(0)), Kind.NONLINEAR),  # no path left
        (lambda x: 1 / x, Kind.NONLINEAR),
        (lambda x: torch.zeros_like(x) + 1, None),
    ],
)
def test_kind_of_result(function, kind: Kind | None) -> None:
    mark = mark_of(run(function, torch.randn(6, dtype=F64)))
    assert (mark.kind if mark else None) == kind


def test_gate_is_the_factor_that_is_frozen() -> None:
    g, W = torch.randn(4, dtype=F64), torch.randn(4, 4, dtype=F64)

    def gated(x: torch.Tensor) -> torch.Tensor:
        with Freezing(F64, RULES):
            x = linear(x)
            return nn.functional.silu(x) * (x @ W)

    J = torch.func.jacrev(gated)(g)
    assert torch.allclose(J, torch.diag(nn.functional.silu(g)) @ W.T, atol=1e-14)


@pytest.mark.parametrize("name", ["silu", "gelu", "relu", "tanh", "elu", "mish", "leaky_relu"])
def test_activation_is_its_ratio_times_the_input(name: str) -> None:
    act = getattr(nn.functional, name)
    z = torch.tensor([-30.0, -2.0, -1e-9, 0.0, 1e-300, 0.5, 40.0], dtype=F64)

    def frozen(x: torch.Tensor) -> torch.Tensor:
        with Freezing(F64, RULES):
            return act(linear(x))

    assert torch.allclose(frozen(z), act(z), rtol=1e-15, atol=0)
    ratio = torch.func.jacrev(frozen)(z).diagonal()
    assert torch.allclose((ratio * z), act(z), rtol=1e-15, atol=0)
    assert ratio.isfinite().all()


def test_nothing_on_the_linear_path_is_cast_down() -> None:
    x = torch.randn(6, dtype=F64)
    weight = torch.randn(6, dtype=torch.bfloat16)

    def norm(h: torch.Tensor) -> torch.Tensor:
        h = h.to(torch.float32)
        h = h * torch.rsqrt(h.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return (weight * h.to(torch.bfloat16)).type(torch.float16)

    out = run(norm, x)
    assert out.dtype == F64
    exact = x * torch.rsqrt(x.pow(2).mean() + 1e-6) * weight.double()
    assert torch.allclose(out, exact, rtol=1e-14, atol=0)


def test_what_does_not_depend_on_the_input_is_computed_as_written() -> None:
    with Freezing(F64, RULES):
        assert torch.arange(3).float().dtype == torch.float32
        assert torch.ones(3).cos().dtype == torch.float32


def test_replay_uses_the_recorded_coefficients() -> None:
    x, z = torch.randn(2, 5, dtype=F64)

    def function(h: torch.Tensor) -> torch.Tensor:
        return h * torch.sigmoid(h.sum()) + 2

    tape = Tape()
    run(function, x, record=tape)
    assert torch.equal(run(function, z, replay=tape), z * torch.sigmoid(x.sum()) + 2)
    bare = run(function, z, replay=tape, without_constants=True)
    assert torch.equal(bare, z * torch.sigmoid(x.sum()))


def test_decisions_are_replayed_like_coefficients() -> None:
    def function(h: torch.Tensor) -> torch.Tensor:
        return h[h.argmax()] * (2.0 if (h.sum() > 0).item() else 5.0)

    x = torch.tensor([1.0, 7.0, 2.0], dtype=F64)
    tape = Tape()
    assert float(run(function, x, record=tape)) == 14.0
    z = torch.tensor([9.0, -3.0, -8.0], dtype=F64)
    assert float(run(function, z, replay=tape)) == -6.0


@pytest.mark.parametrize(
    "call", [torch.add, torch.Tensor.add_, torch.Tensor.__iadd__, torch.Tensor.__radd__]
)
def test_spellings_of_one_operation_share_a_name(call) -> None:
    assert function_name(call) == "add"


def test_norm_rules_equal_torch() -> None:
    x = torch.randn(3, 8, dtype=F64)
    weight, bias = torch.randn(2, 8, dtype=F64)
    cases = [
        lambda h: nn.functional.layer_norm(h, (8,), weight, bias, 1e-6),
        lambda h: nn.functional.layer_norm(h, (8,)),
        lambda h: nn.functional.rms_norm(h, (8,), weight, 1e-6),
        lambda h: nn.functional.rms_norm(h, (8,)),
    ]
    for case in cases:
        assert torch.allclose(run(case, x), case(x), rtol=1e-13)


def test_scales_are_merged_unless_a_factor_changed_in_between() -> None:
    w, x = torch.rand(8, dtype=F64), torch.randn(1, 5, 8, dtype=F64)

    def norm(h: Tensor) -> Tensor:
        return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True)))

    def input_changed(h: Tensor) -> Tensor:
        h = 1.0 * h
        scaled = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True))
        h += 1.0
        return w * scaled

    def scale_changed(h: Tensor) -> Tensor:
        scale = 1.0 * w
        scaled = h * scale
        scale += 1.0
        return scaled * w

    for case in (norm, input_changed, scale_changed):
        assert torch.allclose(run(case, x), case(x), rtol=1e-14)

    def frozen(h: Tensor) -> Tensor:
        with Freezing(F64, RULES):
            return norm(linear(h))

    _, pull = torch.func.vjp(frozen, x)
    with Counter(torch.ops.aten.mul.Tensor) as count:
        pull(torch.ones_like(x))
    assert count.calls == 1


@pytest.mark.parametrize(
    "between",
    [
        nn.functional.silu,
        torch.relu,
        lambda y: torch.relu_(y),
        lambda y: nn.functional.relu(y, inplace=True),
        lambda y: y.clamp(-0.5, 0.5),
        lambda y: y.clamp_(-0.5, 0.5),
        lambda y: y + 1.0,
        lambda y: y.add_(1.0),
        lambda y: y.roll(1, 1),
        lambda y: y.transpose(0, 1),
        lambda y: y.neg(),
        lambda y: y.masked_fill(torch.arange(8) > 3, 0.0),
    ],
)
def test_what_is_between_two_scales_is_not_merged_away(between) -> None:  # type: ignore[no-untyped-def]
    a, b = torch.rand(2, 8, dtype=F64) + 0.5
    x = torch.randn(1, 5, 8, dtype=F64)

    def case(h: Tensor) -> Tensor:
        return between(h * a) * b

    expected = case(x)
    assert torch.allclose(run(case, x), expected, rtol=1e-14)
    plain = (x * a) * b
    assert expected.shape != plain.shape or not torch.allclose(expected, plain, rtol=1e-3)


class Counter(TorchDispatchMode):
    """Counts the calls of one operation."""

    def __init__(self, operation: object) -> None:
        super().__init__()
        self.operation, self.calls = operation, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls += func is self.operation
        return func(*args, **(kwargs or {}))


# ------------------------------------------------------------------------------ attention


def test_frozen_product_folds_vmap_and_transposes_twice() -> None:
    P, V = torch.randn(3, 5, 4, dtype=F64), torch.randn(3, 4, 2, dtype=F64)
    block = torch.randn(6, 3, 5, 2, dtype=F64)
    out, pull = torch.func.vjp(lambda v: frozen_product(P, v), V)
    assert torch.allclose(out, P @ V)
    assert torch.allclose(torch.func.vmap(pull)(block)[0], P.mT @ block)
    _, push = torch.func.vjp(lambda u: pull(u)[0], torch.zeros_like(out))
    tangents = torch.randn(6, 3, 4, 2, dtype=F64)
    assert torch.allclose(torch.func.vmap(push)(tangents)[0], P @ tangents)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_equals_torch(kv_heads: int) -> None:
    q = torch.randn(1, 4, 7, 8, dtype=F64)
    k, v = torch.randn(2, 1, kv_heads, 7, 8, dtype=F64)
    mask = torch.ones(7, 7, dtype=torch.bool).tril()[None, None]
    expected = nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)
    assert torch.allclose(attention(q, k, v, [mask], 0.3), expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_models_of_either_implementation_are_exact(implementation: str) -> None:
    hf = hf_model("gemma3")
    hf.set_attn_implementation(implementation)
    lin = DetachedModel(hf).linearize(PROMPT)
    assert lin.certificate().exact
    assert hf.config._attn_implementation == implementation


def test_soft_capped_attention_is_exact() -> None:
    config = CONFIGS["gemma3"]()
    config.attn_logit_softcapping = 5.0
    torch.manual_seed(0)
    hf = transformers.Gemma3ForCausalLM._from_config(config, attn_implementation="eager")
    assert DetachedModel(hf.double().eval()).linearize(PROMPT).certificate().exact


# ------------------------------------------------------------------- refusals, and no traces


def test_unknown_operation_is_refused_by_module_name() -> None:
    hf = hf_model("llama")
    hf.model.layers[1].mlp.act_fn = Sinc()
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.act_fn \(Sinc\).*sinc"):
        DetachedModel(hf).linearize(PROMPT)
    _assert_untouched(hf)


def test_nonlinear_path_is_refused_by_module_name() -> None:
    class Square(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x

    hf = hf_model("llama")
    hf.model.layers[2].self_attn.o_proj = Square()
    with pytest.raises(UnsupportedModelError, match=r"layers\.2\.self_attn\.o_proj \(Square\)"):
        DetachedModel(hf).linearize(PROMPT)
    _assert_untouched(hf)


def _assert_untouched(hf: nn.Module) -> None:
    own = "eager" if hf.config.model_type == "gemma2" else "sdpa"  # what transformers chooses
    assert hf.config._attn_implementation == own
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in hf.modules())


@pytest.mark.parametrize("family", list(CONFIGS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_is_left_bit_for_bit_as_it_was(family: str, dtype: torch.dtype) -> None:
    hf = hf_model(family, dtype)
    hf.train()
    hf.model.layers[0].eval()
    kind, training = type(hf), [m.training for m in hf.modules()]
    state = {name: tensor.clone() for name, tensor in hf.state_dict().items()}
    before = hf(PROMPT[None]).logits
    lin = DetachedModel(hf).linearize(PROMPT)
    lin.certificate()
    assert type(hf) is kind and [m.training for m in hf.modules()] == training
    assert torch.equal(hf(PROMPT[None]).logits, before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in hf.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in hf.parameters())
    _assert_untouched(hf)


def test_exception_midway_leaves_no_trace() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("midway")

    hf = hf_model("qwen3", torch.bfloat16)
    weights = {name: p.data_ptr() for name, p in hf.named_parameters()}
    before = hf(PROMPT[None]).logits
    norm, hf.model.layers[1].mlp.act_fn = hf.model.layers[1].mlp.act_fn, Broken()
    model = DetachedModel(hf)
    with pytest.raises(ModelError, match=r"itself does not run on this input.*midway"):
        model.linearize(PROMPT)
    with pytest.raises(RuntimeError, match="midway"):
        model.predict(PROMPT)
    hf.model.layers[1].mlp.act_fn = norm
    assert {name: p.data_ptr() for name, p in hf.named_parameters()} == weights
    assert torch.equal(hf(PROMPT[None]).logits, before)
    _assert_untouched(hf)


def test_frozen_and_plain_models_do_not_disturb_each_other() -> None:
    frozen, plain = hf_model("llama"), hf_model("llama", seed=1)
    expected = plain(PROMPT[None]).logits
    seen: list[bool] = []
    stop = threading.Event()

    def use_the_other_model() -> None:
        while not stop.is_set():
            seen.append(torch.equal(plain(PROMPT[None]).logits, expected))

    thread = threading.Thread(target=use_the_other_model)
    thread.start()
    try:
        certificates = [DetachedModel(frozen).linearize(PROMPT).certificate() for _ in range(5)]
    finally:
        stop.set()
        thread.join()
    assert seen and all(seen)
    assert all(c.exact for c in certificates)


def test_rules_are_one_table_without_names_that_are_also_untyped() -> None:
    assert not UNTYPED & RULES.keys()


def test_kernels_folder_is_not_mistaken_for_a_package() -> None:
    import importlib.metadata

    installed = "kernels" in importlib.metadata.packages_distributions()
    assert transformers.utils.is_kernels_available() == installed
