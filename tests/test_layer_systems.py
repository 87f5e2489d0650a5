"""Systems whose output is the residual stream behind a layer, against hand-frozen models."""

from __future__ import annotations

import pytest
import torch

from elm_lanczos.chain import Trace
from elm_lanczos.errors import UnsupportedModelError, UsageError
from elm_lanczos.model import DetachedModel
from elm_lanczos.svd import svd
from tests.families import (
    CONFIGS,
    PROMPT,
    detached_model,
    hand_frozen_jacobian,
    hand_frozen_output,
)


@pytest.mark.parametrize(("layer", "position"), [(1, -1), (2, 4), (3, 8)])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_jacobian_to_a_layer_equals_a_hand_frozen_model(
    family: str, layer: int, position: int
) -> None:
    model = detached_model(family)
    lin = model.linearize(PROMPT, position, layer=layer)
    output = hand_frozen_output(model.hf_model, lin.inputs, position, layer=layer)
    expected = hand_frozen_jacobian(model.hf_model, lin.inputs, position, layer=layer)
    assert (lin.output - output).norm() <= 1e-9 * output.norm()
    rows = lin.vjp(torch.eye(32, dtype=torch.float64)).movedim(1, 0)
    assert (rows - expected).abs().max() <= 1e-9 * expected.abs().max()
    tangents = torch.randn(3, *lin.inputs.shape, dtype=torch.float64)
    columns = torch.einsum("tmd,btd->bm", expected, tangents)
    assert (lin.jvp(tangents) - columns).abs().max() <= 1e-9 * columns.abs().max()
    certificate = lin.certificate()
    assert certificate.exact and certificate.reconstruction <= 1e-13
    hidden = model.hf_model(PROMPT[None], output_hidden_states=True).hidden_states
    if layer < 3:  # the last of these is behind the final norm
        assert (lin.output - hidden[layer][0, position]).norm() <= 1e-6 * lin.output.norm()


def test_final_norm_of_the_last_layer_is_the_whole_system() -> None:
    model = detached_model("llama-biased")
    whole, last = model.linearize(PROMPT), model.linearize(PROMPT, layer=3)
    assert whole.narrowed and not last.narrowed
    norm = model.decoder.norm
    scale = (last.output.pow(2).mean() + norm.variance_epsilon).rsqrt() * norm.weight.detach()
    assert torch.allclose(scale * last.output, whole.output, rtol=1e-6)
    assert torch.allclose(scale * last.constant, whole.constant, rtol=1e-6, atol=1e-12)
    U = torch.randn(4, 32, dtype=torch.float64)
    assert torch.allclose(last.vjp(scale * U), whole.vjp(U), rtol=1e-5, atol=1e-9)


def test_triplets_of_a_layer_are_those_of_the_explicit_matrix() -> None:
    lin = detached_model("qwen3").linearize(PROMPT, layer=2)
    J = lin.vjp(torch.eye(32, dtype=torch.float64)).movedim(1, 0)
    found = svd(lin, k=4)
    assert torch.allclose(found.S, torch.linalg.svdvals(J)[:, :4], rtol=1e-9)
    joint = svd(lin.joint(), k=4)
    explicit = torch.linalg.svdvals(J.movedim(0, 1).flatten(1))[:4]
    assert torch.allclose(joint.S[0], explicit, rtol=1e-9)


def test_several_prompts_go_to_a_layer_together() -> None:
    model = detached_model("gemma3")
    prompts = [PROMPT, PROMPT.flip(0)]
    for lin, prompt in zip(model.linearize_together(prompts, layer=2), prompts, strict=True):
        alone = model.linearize(prompt, layer=2)
        assert torch.allclose(lin.output, alone.output)
        assert lin.certificate().exact


def test_a_layer_of_embeddings_and_of_one_token() -> None:
    model = detached_model("llama")
    for prompt in (model.embed(PROMPT), PROMPT[:1]):
        lin = model.linearize(prompt, layer=1)
        assert lin.layer == 1 and lin.certificate().exact


@pytest.mark.parametrize("layer", [0, -1, 4])
def test_a_layer_that_there_is_not_is_refused(layer: int) -> None:
    with pytest.raises(UsageError, match="layers are 1 … 3"):
        detached_model("llama").linearize(PROMPT, layer=layer)


def test_logits_are_not_read_from_a_layer() -> None:
    with pytest.raises(UsageError, match="layer 2"):
        detached_model("llama").linearize(PROMPT, layer=2).readout(5)


def test_a_decoder_that_is_no_chain_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from elm_lanczos import frozen_decoder

    real = frozen_decoder.trace

    def no_chain(model: DetachedModel, *args: object) -> Trace:
        found = real(model, *args)  # type: ignore[arg-type]
        return Trace(found.segments[:1], found.output, not_a_chain="layers share keys")

    monkeypatch.setattr(frozen_decoder, "trace", no_chain)
    with pytest.raises(UnsupportedModelError, match="layers share keys"):
        detached_model("llama").linearize(PROMPT, layer=1)
