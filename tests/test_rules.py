"""Rules one by one, and what an adversary would write: exact, or refused by name, never wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elm_lanczos.certificate import Certificate
from elm_lanczos.errors import UnsupportedModelError
from elm_lanczos.freezing import Freezing, Kind, linear, mark_of
from elm_lanczos.rules import RULES
from tests.families import PROMPT, detached_model, with_mlp

F = nn.functional
F64 = torch.float64


def certificate_with(mlp: Callable[[nn.Module, Tensor], Tensor]) -> Certificate:
    """The certificate of a Llama whose first layer has another MLP."""
    return with_mlp(mlp).linearize(PROMPT).certificate()


def _squared_relu(m: Any, x: Tensor) -> Tensor:
    return m.down_proj(torch.square(F.relu(m.gate_proj(x))))


def _xielu(m: Any, x: Tensor) -> Tensor:
    z = m.gate_proj(x)
    negative = (torch.expm1(torch.min(z, torch.tensor(-1e-6))) - z) * 0.3 + 0.5 * z
    return m.down_proj(torch.where(z > 0, 0.8 * z * z + 0.5 * z, negative))


def _gelu_by_hand(m: Any, x: Tensor) -> Tensor:
    z = m.gate_proj(x)
    gate = 0.5 * z * (1.0 + torch.tanh(0.7978845608 * (z + 0.044715 * torch.pow(z, 3.0))))
    return m.down_proj(gate * m.up_proj(x))


def _quick_gelu(m: Any, x: Tensor) -> Tensor:
    z = m.gate_proj(x)
    return m.down_proj(z * torch.sigmoid(1.702 * z))


def _clamped_gates(m: Any, x: Tensor) -> Tensor:  # as in gpt-oss
    gate = m.gate_proj(x).clamp(max=0.4)
    up = m.up_proj(x).clamp(min=-0.4, max=0.4)
    return m.down_proj((up + 1) * (gate * torch.sigmoid(gate * 1.702)))


def _in_place(m: Any, x: Tensor) -> Tensor:
    gate = m.gate_proj(x)
    gate.relu_()
    out = torch.zeros_like(x)
    out[..., :] = m.down_proj(gate * m.up_proj(x))
    out[0].mul_(2.0)
    return out


def _silu_in_place(m: Any, x: Tensor) -> Tensor:
    gate = m.gate_proj(x)
    F.silu(gate, inplace=True)
    return m.down_proj(gate * m.up_proj(x))


def _keywords(m: Any, x: Tensor) -> Tensor:
    gate = F.silu(input=m.gate_proj(x))
    product = torch.mul(input=gate, other=m.up_proj(x))
    scaled = torch.div(product, other=torch.add(input=x.square().mean(), other=1.0))
    return torch.matmul(input=scaled, other=m.down_proj.weight.mT)


def _fused(m: Any, x: Tensor) -> Tensor:
    z = F.silu(torch.addmm(m.gate_proj.weight[:, 0], x[0], m.gate_proj.weight.mT, alpha=2.0))
    return torch.einsum("ti,di->td", z * m.up_proj(x)[0], m.down_proj.weight)[None]


def _experts(m: Any, x: Tensor) -> Tensor:
    scores = torch.softmax(m.gate_proj(x)[..., :4], -1)
    weights, chosen = torch.topk(scores, 2, dim=-1)
    out = torch.zeros_like(x)
    for expert in range(4):
        _, token, slot = torch.where(chosen == expert)
        if token.numel() == 0:  # a course that depends on the input
            continue
        hidden = m.down_proj(F.silu(m.gate_proj(x[0, token])) * m.up_proj(x[0, token]))
        out[0].index_add_(0, token, hidden * weights[0, token, slot, None] * (expert + 1))
    return out


EXACT = [
    _squared_relu, _xielu, _gelu_by_hand, _quick_gelu, _clamped_gates, _in_place, _silu_in_place,
    _keywords, _fused, _experts,
]  # fmt: skip


@pytest.mark.parametrize("mlp", EXACT, ids=lambda f: f.__name__)
def test_exact(mlp: Callable[[Any, Tensor], Tensor]) -> None:
    certificate = certificate_with(mlp)
    assert certificate.exact, certificate


def _written_through_a_view(m: Any, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[0].copy_(m.down_proj(m.gate_proj(x))[0].abs())
    return out


def _added_through_a_view(m: Any, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, 1:].add_(x[:, 1:].abs())
    return out


def _item(m: Any, x: Tensor) -> Tensor:
    return m.down_proj(m.gate_proj(x)) + x.pow(2).mean().item()


def _linear_item(m: Any, x: Tensor) -> Tensor:
    return m.down_proj(m.gate_proj(x)) + x[0, 0, 0].item()


def _float(m: Any, x: Tensor) -> Tensor:
    return x + float(x[0, 0, 0])


def _list(m: Any, x: Tensor) -> Tensor:
    return x + torch.tensor(torch.exp(x).tolist(), dtype=x.dtype)


def _detached(m: Any, x: Tensor) -> Tensor:
    return x + x.detach()


def _two_gates(m: Any, x: Tensor) -> Tensor:
    return m.down_proj(F.silu(m.gate_proj(x)) * F.silu(m.up_proj(x)))


def _product_of_equals(m: Any, x: Tensor) -> Tensor:
    return m.down_proj(m.gate_proj(x) * m.up_proj(x))


def _custom_function(m: Any, x: Tensor) -> Tensor:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            ctx.save_for_backward(z)
            return z**3

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 3 * ctx.saved_tensors[0] ** 2 * grad

    return Cube.apply(x)


REFUSED = [
    _written_through_a_view, _added_through_a_view, _item, _linear_item, _float, _list, _detached,
    _two_gates, _product_of_equals, _custom_function,
]  # fmt: skip


@pytest.mark.parametrize("mlp", REFUSED, ids=lambda f: f.__name__)
def test_refused_by_name(mlp: Callable[[Any, Tensor], Tensor]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"layers\.0"):
        certificate_with(mlp)


def test_value_of_an_activation_at_zero_is_a_constant() -> None:
    def exponential(m: Any, x: Tensor) -> Tensor:
        z = m.gate_proj(x)
        z = z * (z.detach() > 0)  # many exact zeros
        return m.down_proj(torch.exp(-z) * 1.0)

    certificate = certificate_with(exponential)
    assert certificate.exact, certificate


def test_clamp_that_moves_zero_is_exact() -> None:
    def clamped(m: Any, x: Tensor) -> Tensor:
        return m.down_proj(F.relu(m.gate_proj(x)).clamp(min=0.5))

    certificate = certificate_with(clamped)
    assert certificate.exact, certificate


def test_arguments_may_all_be_given_by_name() -> None:
    def named(m: Any, x: Tensor) -> Tensor:
        gate = F.silu(input=torch.unsqueeze(input=m.gate_proj(x), dim=0))
        table = torch.reshape(input=m.up_proj.weight, shape=m.up_proj.weight.shape)
        return m.down_proj(torch.squeeze(input=gate, dim=0) * F.linear(x, weight=table))

    assert certificate_with(named).exact


@pytest.mark.parametrize("name", ["AssertionError", "ZeroDivisionError", "KeyError"])
def test_whatever_code_raises_when_frozen_is_a_refusal(name: str) -> None:
    error = {"AssertionError": AssertionError, "ZeroDivisionError": ZeroDivisionError}

    def fails_when_frozen(m: Any, x: Tensor) -> Tensor:
        if mark_of(x) is not None:
            raise error.get(name, KeyError)("frozen")
        return x

    with pytest.raises(UnsupportedModelError, match=name):
        certificate_with(fails_when_frozen)


def test_normalize_equals_its_written_out_form() -> None:
    x, W = torch.randn(5, 4, dtype=F64), torch.randn(4, 4, dtype=F64)

    def jacobian(normalized: Callable[[Tensor], Tensor]) -> Tensor:
        def run(z: Tensor) -> Tensor:
            with Freezing(F64, RULES):
                return normalized(linear(z)) @ W

        return torch.func.jacrev(run)(x)

    fused = jacobian(lambda z: F.normalize(z, dim=-1))
    written = jacobian(lambda z: z / z.norm(dim=-1, keepdim=True).clamp_min(1e-12))
    assert torch.allclose(fused, written, rtol=1e-12, atol=1e-12)


def test_fused_products_equal_torch_s_own() -> None:
    a, b = torch.randn(2, 3, 4, dtype=F64), torch.randn(2, 4, 5, dtype=F64)
    flat, stacked = torch.randn(3, 5, dtype=F64), torch.randn(2, 3, 5, dtype=F64)
    cases: list[Callable[[Tensor], Tensor]] = [
        lambda x: torch.addbmm(flat, x, b, beta=0.5, alpha=2.0),
        lambda x: torch.baddbmm(stacked, x, batch2=b, beta=0),
        lambda x: torch.addmm(flat, x[0], b[0], alpha=3.0),
        lambda x: torch.addcmul(a, x, tensor2=a.cos(), value=2.0),
    ]
    for case in cases:
        with torch.no_grad(), Freezing(F64, RULES):
            found = case(linear(a))
        assert torch.allclose(found, case(a), rtol=1e-12, atol=1e-12)
        mark = mark_of(found)
        assert mark is not None and mark.kind == Kind.LINEAR


def test_refusal_names_the_module_whose_code_it_is() -> None:
    def after_a_submodule(m: Any, x: Tensor) -> Tensor:
        return torch.sinc(m.down_proj(F.silu(m.gate_proj(x)) * m.up_proj(x)))

    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp \(Written\).*sinc"):
        certificate_with(after_a_submodule)


def test_gate_convention_chooses_the_factor() -> None:
    g, W = torch.randn(4, dtype=F64), torch.randn(4, 4, dtype=F64)

    def jacobian(gate: str) -> Tensor:
        def gated(x: Tensor) -> Tensor:
            with Freezing(F64, RULES, gate=gate):
                x = linear(x)
                return F.silu(x) * (x @ W)

        return torch.func.jacrev(gated)(g)

    assert torch.allclose(jacobian("frozen"), torch.diag(F.silu(g)) @ W.T)
    assert torch.allclose(jacobian("up"), torch.diag((g @ W) * torch.sigmoid(g)))


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
def test_both_gate_conventions_are_exact_and_differ(family: str) -> None:
    frozen = detached_model(family).linearize(PROMPT)
    up = detached_model(family, gate="up").linearize(PROMPT)
    assert frozen.certificate().exact and up.certificate().exact
    u = torch.randn(32, dtype=F64)
    assert torch.equal(frozen.output, up.output)
    assert (frozen.vjp(u) - up.vjp(u)).norm() > 1e-3 * up.vjp(u).norm()


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda x: torch.einsum("i,j->ij", x, torch.ones(3, dtype=F64)), Kind.LINEAR),
        (lambda x: torch.einsum("i,i->", x, x), Kind.NONLINEAR),
        (lambda x: torch.einsum("i,i->", torch.exp(x), x), Kind.LINEAR),
        (lambda x: torch.baddbmm(x.view(1, 2, 3), torch.ones(1, 2, 2, dtype=F64),
                                 x.view(1, 2, 3)), Kind.LINEAR),
        (lambda x: torch.addcmul(x, x, torch.sigmoid(x)), Kind.LINEAR),
        (lambda x: x.clamp(max=0.0), Kind.LINEAR),
        (lambda x: F.normalize(x, dim=-1), Kind.LINEAR),
        (lambda x: torch.linalg.solve_triangular(torch.eye(3, dtype=F64), x.view(3, 2),
                                                 upper=False), Kind.LINEAR),
        (lambda x: torch.linalg.solve_triangular(
            x[:4].view(2, 2), torch.ones(2, 1, dtype=F64), upper=False), Kind.NONLINEAR),
        (lambda x: torch.sigmoid(x) / (1 + x.abs()), Kind.NONLINEAR),
        (lambda x: x / x.sum(), Kind.NONLINEAR),
        (lambda x: torch.view_as_real(torch.view_as_complex(x.view(3, 2))), Kind.LINEAR),
        (lambda x: torch.div(x, 2.0, rounding_mode="floor"), Kind.NONLINEAR),
        (lambda x: x.topk(2).values, Kind.NONLINEAR),
        (lambda x: x.topk(2).indices, Kind.FROZEN),
        (lambda x: x > 0, Kind.FROZEN),
        (lambda x: x.long(), Kind.FROZEN),
        (lambda x: torch.stack(list(x.view(2, 3))), Kind.LINEAR),
    ],
)  # fmt: skip
def test_kind_of_result(function: Callable[[Tensor], Tensor], kind: Kind) -> None:
    with torch.no_grad(), Freezing(F64, RULES):
        mark = mark_of(function(linear(torch.randn(6, dtype=F64))))
    assert mark is not None and mark.kind == kind
