"""The chain against an independent hand-frozen model, and its certificate."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from elm_lanczos.architectures import PROMPT as ARCHITECTURE_PROMPT
from elm_lanczos.architectures import tiny_config, tiny_model
from elm_lanczos.certificate import Certificate
from elm_lanczos.errors import UsageError
from elm_lanczos.linearization import Linearization
from elm_lanczos.model import DetachedModel
from elm_lanczos.rules import RULES
from tests.families import (
    CONFIGS,
    PROMPT,
    detached_model,
    hand_frozen_jacobian,
    hf_model,
    with_mlp,
)

FAMILIES = list(CONFIGS)


@pytest.mark.parametrize("family", FAMILIES)
def test_certificate_is_exact_in_float64(family: str) -> None:
    certificate = detached_model(family).linearize(PROMPT).certificate()
    assert certificate.reconstruction <= 1e-13
    assert certificate.leak <= 1e-13
    assert certificate.adjoint <= 1e-12
    assert certificate.affinity <= 1e-12
    assert certificate.raised <= 1e-13
    assert certificate.fidelity <= 1e-6  # the models' own norms and softmax compute in float32
    assert certificate.exact


@pytest.mark.parametrize("family", FAMILIES)
def test_certificate_is_exact_in_float32(family: str) -> None:
    certificate = detached_model(family, torch.float32).linearize(PROMPT).certificate()
    assert certificate.dtype == "float32"
    assert certificate.exact, certificate


@pytest.mark.parametrize("position", [-1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_jacobian_equals_a_hand_frozen_model(family: str, position: int) -> None:
    model = detached_model(family)
    lin = model.linearize(PROMPT, position=position)
    expected = hand_frozen_jacobian(model.hf_model, lin.inputs, position)
    scale = expected.abs().max()
    rows = lin.vjp(torch.eye(32, dtype=torch.float64))  # (m, T, d)
    assert (rows.movedim(1, 0) - expected).abs().max() <= 1e-9 * scale
    tangents = torch.randn(5, *lin.inputs.shape, dtype=torch.float64)
    columns = torch.einsum("tmd,btd->bm", expected, tangents)
    assert (lin.jvp(tangents) - columns).abs().max() <= 1e-9 * columns.abs().max()


@pytest.mark.parametrize("family", ["phi3", "llama", "gemma2"])
def test_other_gate_equals_a_hand_frozen_model(family: str) -> None:
    """The paper's convention for Phi: linear through the gate, with act(g)/g and up fixed."""
    model = detached_model(family, gate="up")
    lin = model.linearize(PROMPT)
    expected = hand_frozen_jacobian(model.hf_model, lin.inputs, gate="up")
    rows = lin.vjp(torch.eye(32, dtype=torch.float64))
    assert (rows.movedim(1, 0) - expected).abs().max() <= 1e-9 * expected.abs().max()
    other = hand_frozen_jacobian(model.hf_model, lin.inputs)
    assert (expected - other).abs().max() > 1e-3 * expected.abs().max()
    assert lin.certificate().exact


def test_tokens_after_the_position_have_no_influence() -> None:
    lin = detached_model("llama").linearize(PROMPT, position=3)
    assert lin.vjp(torch.ones(32, dtype=torch.float64))[4:].abs().max() == 0


def vjp_flops(lin: Linearization) -> int:
    u = torch.ones(1, 32, dtype=torch.float64)
    lin.vjp(u)  # linearises
    with FlopCounterMode(display=False) as counter:
        lin.vjp(u)
    return counter.get_total_flops()


@pytest.mark.parametrize("position", [-1, 2])
def test_last_layer_is_passed_at_one_position_behind_its_attention(position: int) -> None:
    model = detached_model("llama")
    lin, one = model.linearize(PROMPT, position=position), model.linearize(PROMPT[:1])
    assert lin.narrowed and not one.narrowed
    T, layers = len(PROMPT), len(model.layers)
    per_token = vjp_flops(one) / layers  # v, o, up, down and P for one token and one key
    everywhere = (layers - 1) * T * per_token
    assert vjp_flops(lin) < everywhere + 0.5 * T * per_token


@pytest.mark.parametrize(
    "mlp",
    [
        lambda m, h: m.down_proj(m.up_proj(torch.cat([h[:, -1:], h[:, :-1]], 1))),
        lambda m, h: m.down_proj(m.up_proj(h)) * torch.arange(1.0, 1 + h.shape[1])[:, None],
        lambda m, h: m.down_proj(m.up_proj(h)) * h.shape[1],
        lambda m, h: m.down_proj(m.up_proj(h - h.cumsum(1))),
    ],
)
def test_layer_that_knows_other_positions_behind_its_attention_is_not_narrowed(mlp) -> None:  # type: ignore[no-untyped-def]
    lin = with_mlp(mlp, layer=-1).linearize(PROMPT)
    assert not lin.narrowed
    assert lin.certificate().exact
    J, z = lin.vjp(torch.eye(32, dtype=torch.float64)), torch.randn_like(lin.inputs)
    straight = torch.einsum("mtd,td->m", J, z) + lin.constant
    assert (lin(z) - straight).norm() <= 1e-13 * straight.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_map_is_affine(family: str) -> None:
    lin = detached_model(family).linearize(PROMPT)
    z1, z2 = torch.randn(2, *lin.inputs.shape, dtype=torch.float64)
    mixed = lin(0.3 * z1 + 0.7 * z2)
    straight = 0.3 * lin(z1) + 0.7 * lin(z2)
    assert (mixed - straight).norm() <= 1e-13 * straight.norm()
    assert (lin(z1) - lin.constant - lin.jvp(z1)).norm() <= 1e-13 * lin(z1).norm()
    assert (lin(lin.inputs) - lin.output).norm() <= 1e-15 * lin.output.norm()


def test_constant_is_zero_without_biases_and_not_with_them() -> None:
    assert detached_model("qwen3").linearize(PROMPT).constant.abs().max() == 0
    lin = detached_model("llama-biased").linearize(PROMPT)
    assert lin.constant.norm() > 0.01 * lin.output.norm()


def test_recording_an_unknown_operation_as_a_coefficient_is_caught_by_the_leak() -> None:
    hf = hf_model("llama")
    hf.model.layers[1].mlp.down_proj = torch.nn.Sequential(hf.model.layers[1].mlp.down_proj, Sinc())
    model = DetachedModel(hf)
    rules = RULES | {"sinc": lambda mode, func, args, kwargs: mode.freeze(func(*args, **kwargs))}
    certificate = model.linearize(model.embed(PROMPT), rules=rules).certificate()
    assert certificate.reconstruction <= 1e-13  # the broken rule looks perfect …
    assert certificate.fidelity <= 1e-6
    assert certificate.leak > 1e-3  # … but for the leak
    assert certificate.failures == ["leak"]


class Sinc(torch.nn.Module):
    """A nonlinearity that no rule covers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sinc(x)


def test_blocks_and_unkept_maps_change_nothing_but_rounding() -> None:
    model = detached_model("gemma3")
    whole = model.linearize(PROMPT, block=64)
    small = model.linearize(PROMPT, block=3, memory=1)  # too little memory to keep any map
    assert not small.keep and whole.keep
    u = torch.randn(2, 4, 32, dtype=torch.float64)
    assert whole.vjp(u).shape == (2, 4, len(PROMPT), 32)
    assert (whole.vjp(u) - small.vjp(u)).abs().max() <= 1e-13 * whole.vjp(u).abs().max()
    v = torch.randn(7, *whole.inputs.shape, dtype=torch.float64)
    assert (whole.jvp(v) - small.jvp(v)).abs().max() <= 1e-13 * whole.jvp(v).abs().max()


def test_embeddings_and_ids_give_the_same_system() -> None:
    model = detached_model("gemma3")  # scales its embeddings
    by_ids, by_embeddings = model.linearize(PROMPT), model.linearize(model.embed(PROMPT))
    assert torch.equal(by_ids.output, by_embeddings.output)
    assert by_embeddings.certificate().exact


@pytest.mark.parametrize("family", FAMILIES)
def test_low_precision_storage_does_not_loosen_the_bounds(family: str) -> None:
    hf = hf_model(family, torch.bfloat16)
    before = {name: p.clone() for name, p in hf.named_parameters()}
    for compute_dtype in ("float32", "float64"):
        model = DetachedModel(hf, compute_dtype=compute_dtype)
        lin = model.linearize(PROMPT)
        assert str(lin.output.dtype) == f"torch.{compute_dtype}"
        assert lin.certificate().exact, lin.certificate()
        upcast = DetachedModel(copy.deepcopy(hf).to(lin.output.dtype)).linearize(PROMPT)
        # the same system as that of the same weights held in the working precision
        assert (upcast.output - lin.output).norm() <= 2e-6 * lin.output.norm()
    assert all(torch.equal(p, before[name]) for name, p in hf.named_parameters())


def test_out_of_memory_is_not_called_an_unsupported_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    lin = detached_model("llama").linearize(PROMPT)
    monkeypatch.setattr(torch.func, "vjp", fail)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        lin.vjp(torch.zeros(32, dtype=torch.float64))


def test_certificate_reports_nan_as_failure() -> None:
    certificate = Certificate(float("nan"), 0.0, 0.0, 0.0, 0.0, 0.0)
    assert certificate.failures == ["fidelity"] and not certificate.exact


def test_joint_and_token_operators_agree_with_the_chain() -> None:
    lin = detached_model("qwen3").linearize(PROMPT)
    J = lin.vjp(torch.eye(32, dtype=torch.float64)).movedim(1, 0)
    x = torch.randn(32, 3, dtype=torch.float64)
    assert torch.allclose(lin.token(2) @ x, J[2] @ x, atol=1e-12)
    assert torch.allclose(lin.token(2).T @ x, J[2].T @ x, atol=1e-12)
    flat = torch.randn(9 * 32, dtype=torch.float64)
    expected = torch.einsum("tmd,td->m", J, flat.view(9, 32))
    assert torch.allclose(lin.joint() @ flat, expected, atol=1e-12)
    assert lin.joint().dot_test() <= 1e-12


TOGETHER = ["llama", "qwen3", "gemma3_text", "gpt2", "bloom", "mixtral", "mamba", "qwen3_next"]


@pytest.mark.parametrize(
    ("family", "count"),
    [*((family, 3) for family in TOGETHER), ("llama", len(ARCHITECTURE_PROMPT))],
)
def test_prompts_that_go_together_have_the_systems_of_each(family: str, count: int) -> None:
    torch.manual_seed(0)
    model = DetachedModel(tiny_model(tiny_config(family)).double())
    vocabulary = model.embedding.weight.shape[0]
    prompts = [torch.tensor(ARCHITECTURE_PROMPT)]
    prompts += [torch.randint(3, vocabulary, prompts[0].shape) for _ in range(count - 1)]
    together = model.linearize_together(prompts)
    assert len({id(lin.decoder) for lin in together}) == 1
    cotangents = torch.randn(2, together[0].shape[1], dtype=torch.float64)
    every = together[0].decoder.vjp(cotangents[:, None].expand(-1, count, -1))
    for number, (ids, lin) in enumerate(zip(prompts, together, strict=True)):
        alone = model.linearize(ids)
        assert alone.narrowed == lin.narrowed
        rows, expected = lin.vjp(cotangents), alone.vjp(cotangents)
        assert (rows - expected).abs().max() <= 1e-12 * expected.abs().max()
        assert (every[:, number] - expected).abs().max() <= 1e-12 * expected.abs().max()
        v = torch.randn(*lin.inputs.shape, dtype=torch.float64)
        assert (lin.jvp(v) - alone.jvp(v)).norm() <= 1e-12 * alone.jvp(v).norm()
        for one, other in (
            (lin.output, alone.output),
            (lin.constant, alone.constant),
            (lin(v), alone(v)),
            (lin.prediction.logits, alone.prediction.logits),
        ):
            assert (one - other).norm() <= 1e-12 * max(1.0, float(other.norm()))
        certificate, other = lin.certificate(), alone.certificate()
        assert certificate.failures == other.failures
        assert certificate.reconstruction <= 1e-13 and certificate.leak <= 1e-13
        assert abs(certificate.fidelity - other.fidelity) <= 1e-7  # of the model's own rounding


def test_prompts_that_go_together_are_of_one_length() -> None:
    model = detached_model("llama")
    with pytest.raises(UsageError, match="one length"):
        model.linearize_together([PROMPT, PROMPT[1:]])
