"""The last layer at one position: the same Jacobian as that of all positions, or not narrowed."""

from __future__ import annotations

import pytest
import torch

from elm_lanczos.architectures import PROMPT, tiny_config, tiny_model
from elm_lanczos.frozen_decoder import FrozenDecoder
from elm_lanczos.model import DetachedModel

FAMILIES = (
    "llama qwen3 gemma2 gemma3_text phi3 mixtral deepseek_v3 gpt2 falcon bloom opt gpt_neox mamba "
    "qwen3_next"
).split()
# Mamba has no attention; Falcon and BLOOM add the residual stream inside it.
NARROWED = set(FAMILIES) - {"mamba", "falcon", "bloom"}


@pytest.mark.parametrize("family", FAMILIES)
def test_narrowed_jacobian_is_the_whole_one(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = DetachedModel(tiny_model(tiny_config(family)).double())
    ids = torch.tensor(PROMPT)
    T = len(ids)
    seen = set()
    for position in (T - 1, T // 2):
        lin = model.linearize(ids, position=position)
        with monkeypatch.context() as patch:
            patch.setattr(FrozenDecoder, "_same_map", lambda *_: False)
            whole = model.linearize(ids, position=position)
        assert not whole.narrowed
        seen.add(lin.narrowed)
        if not lin.narrowed:
            assert len(lin.segments) == len(whole.segments)
            continue
        cotangents = torch.eye(lin.shape[1], dtype=torch.float64)
        J, expected = lin.vjp(cotangents), whole.vjp(cotangents)
        # A sum in another order, and nothing else: rounding, relative to the largest entry.
        assert (J - expected).abs().max() <= 1e-13 * expected.abs().max()
        assert J[:, position + 1 :].abs().max() == 0 if position + 1 < T else True
        tangents = torch.randn(3, *lin.inputs.shape, dtype=torch.float64)
        Jv, wanted = lin.jvp(tangents), whole.jvp(tangents)
        assert (Jv - wanted).abs().max() <= 1e-13 * wanted.abs().max()
        torch.testing.assert_close(lin.constant, whole.constant, rtol=0, atol=1e-13)
        assert torch.equal(lin.output, whole.output)
    assert len(seen) == 1
    assert family not in NARROWED or seen == {True}
