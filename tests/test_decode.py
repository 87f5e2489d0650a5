"""Words of directions: exact search over the whole vocabulary."""

from __future__ import annotations

import pytest
import torch

from elm_lanczos import decode, svd
from elm_lanczos.model import DetachedModel


@pytest.mark.parametrize("rows", [7, 1000, 16_384])
def test_words_are_the_best_of_the_whole_vocabulary(
    tiny: DetachedModel, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(decode, "_ROWS", rows)
    X = torch.randn(2, 3, 32)
    output = decode.decode_output(X, tiny, top=5)
    logits = X @ tiny.unembedding.weight.T
    assert torch.equal(output.ids, logits.topk(5).indices)
    assert torch.allclose(output.scores, logits.topk(5).values)
    given = decode.decode_input(100 * X, tiny, top=5)
    cosines = torch.nn.functional.cosine_similarity(X[..., None, :], tiny.embedding.weight, dim=-1)
    assert torch.equal(given.ids, cosines.topk(5).indices)
    assert torch.allclose(given.scores, cosines.topk(5).values, atol=1e-6)


def test_direction_of_an_embedding_reads_as_its_token(tiny: DetachedModel) -> None:
    words = decode.decode_input(tiny.embedding.weight[[17, 99]].detach(), tiny, top=1)
    assert words.ids.tolist() == [[17], [99]]


def test_vocabulary_smaller_than_the_words_asked_for() -> None:
    from tests.families import detached_model

    model = detached_model("llama", torch.float32)
    assert decode.decode_output(torch.randn(1, 32), model, top=500).ids.shape == (1, 96)


def test_triplets_decode_with_the_conventions_of_sign(bundled: DetachedModel) -> None:
    lin = bundled.linearize("the Soviet Union and the")
    result = svd(lin, k=3)
    words = result.decode(bundled, top=4)
    assert words.u.ids.shape == words.v.ids.shape == (6, 3, 4)
    pushes = torch.einsum("nkd,nd->nk", result.V, lin.inputs)
    assert (pushes >= 0).all()
    best = bundled.token_strings(words.u.ids[-1, 0])
    assert " United" in best  # what the last token's first direction writes
