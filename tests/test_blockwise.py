"""Attention without its probabilities, against the explicit matrix and autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import elm_lanczos.attention
import elm_lanczos.blockwise
from elm_lanczos.attention import attention
from elm_lanczos.blockwise import Scores, blockwise_attention
from elm_lanczos.freezing import Freezing, Kind, linear, mark_of
from elm_lanczos.masks import ALL, NONE, SOME, Mask, causal, registered_mask
from elm_lanczos.rules import RULES
from tests.families import CONFIGS, PROMPT, detached_model

KINDS = ["llama", "gemma2", "gemma3", "mistral", "phi3", "llama-biased"]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every attention goes by pieces of four queries and keys; counts the pieces made."""
    made: list[int] = []
    of = Scores.of

    def counted(self: Scores, q: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        made.append(q.shape[-2])
        return of(self, q, *rest, **kwargs)

    monkeypatch.setattr(elm_lanczos.attention, "EXPLICIT", 0)
    monkeypatch.setattr(elm_lanczos.blockwise, "_SMALLEST", 4)
    monkeypatch.setattr(elm_lanczos.blockwise, "_PIECE", 64)
    monkeypatch.setattr(Scores, "of", counted)
    return made


def explicit_weights(q: Tensor, k: Tensor, mask: Tensor, how: dict[str, Any]) -> Tensor:
    """P (batch, heads, T, S) by the definition; mask additive."""
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * how["scaling"]
    if how["softcap"]:
        scores = how["softcap"] * torch.tanh(scores / how["softcap"])
    scores = scores + mask
    sinks = how["sinks"]
    if sinks is None:
        return scores.softmax(-1)
    sinks = sinks.reshape(1, -1, 1, 1) if sinks.ndim == 1 else sinks
    joined = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], -1)
    return joined.softmax(-1)[..., :-1]


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    heads_of_one, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    T = draw(st.integers(1, 19))
    return {
        "batch": draw(st.integers(1, 2)),
        "heads": heads_of_one * kv_heads,
        "kv_heads": kv_heads,
        "T": T,
        "S": T + draw(st.integers(0, 7)),
        "window": draw(st.sampled_from([None, 1, 3, 6])),
        "softcap": draw(st.sampled_from([None, 2.0])),
        "sinks": draw(st.sampled_from([None, "head", "query"])),
        "bias": draw(st.sampled_from([None, "alibi", "full"])),
        "boolean": draw(st.booleans()),
        "block": draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 99)),
    }


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(case=cases())
def test_value_vjp_and_jvp_are_those_of_the_explicit_matrix(
    case: dict[str, Any], small_pieces: list[int]
) -> None:
    generator = torch.Generator().manual_seed(case["seed"])

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    batch, heads, T, S = (case[name] for name in ("batch", "heads", "T", "S"))
    q, k = normal(batch, heads, T, 5), normal(batch, case["kv_heads"], S, 5)
    v = normal(batch, case["kv_heads"], S, 3)
    rows, columns = torch.arange(T)[:, None] + S - T, torch.arange(S)
    seen = columns <= rows
    if case["window"]:
        seen &= rows - columns < case["window"]
    additive = torch.zeros(1, 1, T, S, dtype=torch.float64).masked_fill(~seen, float("-inf"))
    described = Mask.of(
        (1, 1, T, S),
        lambda first, queries, key, keys: seen[None, None, first:, key:][..., :queries, :keys],
        lambda: additive,
    )
    masks: list[Tensor] = [seen[None, None] if case["boolean"] else described]
    bias = {"alibi": (1, heads, 1, S), "full": (1, heads, T, S)}.get(case["bias"])
    if bias is not None:
        masks.append(normal(*bias))
        additive = additive + masks[-1]
    sinks = {"head": (heads,), "query": (batch, heads, T, 1)}.get(case["sinks"])
    how = {"scaling": 0.7, "softcap": case["softcap"], "sinks": sinks and normal(*sinks)}
    P = explicit_weights(q, k, additive, how)

    def ours(v: Tensor) -> Tensor:
        return attention(q, k, v, masks, **how)

    def expected(v: Tensor) -> Tensor:
        return P @ v.repeat_interleave(heads // v.shape[1], 1)

    out, pull = torch.func.vjp(ours, v)
    _, pull_expected = torch.func.vjp(expected, v)
    push = torch.func.vjp(lambda u: pull(u)[0], torch.zeros_like(out))[1]
    G, tangents = normal(case["block"], *out.shape), normal(case["block"], *v.shape)
    assert torch.allclose(out, expected(v), rtol=0, atol=1e-14)
    vjps = torch.func.vmap(lambda g: pull(g)[0])(G)
    assert torch.allclose(vjps, torch.func.vmap(lambda g: pull_expected(g)[0])(G), atol=1e-13)
    jvps = torch.func.vmap(lambda t: push(t)[0])(tangents)
    assert torch.allclose(jvps, torch.func.vmap(expected)(tangents), rtol=0, atol=1e-13)
    assert small_pieces  # the explicit matrix was not used
    assert max(small_pieces) <= 8


def test_a_block_is_one_product_and_each_piece_is_made_once(small_pieces: list[int]) -> None:
    q, k, v = (torch.randn(1, 1, 1, 16, 4), torch.randn(1, 1, 16, 4), torch.randn(1, 1, 16, 4))
    scores = Scores(1.0, None, causal(16, 16, q.device))
    out, pull = torch.func.vjp(lambda v: blockwise_attention(q, k, v, scores), v)
    small_pieces.clear()
    torch.func.vmap(lambda g: pull(g)[0])(torch.randn(50, *out.shape))
    rows = -(-16 // elm_lanczos.blockwise.piece_size(q))
    assert rows > 1
    assert len(small_pieces) == rows * (rows + 1) // 2  # causal: half of the square


def test_queries_that_see_nothing_attend_to_everything(small_pieces: list[int]) -> None:
    seen = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    seen[..., 4, :] = False
    q, k, v = torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4)
    out = attention(q, k, v, [seen], 1.0)
    assert small_pieces
    assert torch.allclose(out[:, :, 4], v.mean(2), atol=1e-6)
    assert out.isfinite().all()


def _entries(x: Tensor) -> int:
    return x.untyped_storage().nbytes() // x.element_size()


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, _entries(leaf))
        return out


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_no_array_of_queries_by_keys_is_made(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, T = detached_model(family, torch.float32), 1200
    ids = torch.arange(T) % 96
    with _Largest() as largest:
        lin = model.linearize(ids, block=2)
        lin.vjp(torch.randn(2, 32))
        certificate = lin.certificate()
    assert certificate.exact and not lin.not_a_chain
    assert largest.elements < T * T
    monkeypatch.setattr(elm_lanczos.attention, "EXPLICIT", 2**40)
    with _Largest() as largest:
        model.linearize(ids, block=2)
    assert largest.elements >= T * T  # the watch does see such an array


@pytest.mark.parametrize("family", KINDS)
def test_families_have_the_same_jacobian_by_pieces(
    family: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    assert family in CONFIGS
    whole = detached_model(family).linearize(PROMPT)
    u = torch.randn(3, 32, dtype=torch.float64)
    expected = whole.vjp(u)
    made = request.getfixturevalue("small_pieces")
    lin = detached_model(family).linearize(PROMPT)
    assert lin.certificate().exact
    assert made
    assert torch.allclose(
        lin.vjp(u), expected, rtol=1e-11, atol=1e-12 * float(expected.abs().max())
    )


# ------------------------------------------------------------------------------- masks


def test_transformers_masks_are_described_and_made_alike() -> None:
    from transformers.masking_utils import (
        causal_mask_function,
        eager_mask,
        sdpa_mask,
        sliding_window_causal_mask_function,
    )

    padding = torch.ones(1, 11, dtype=torch.bool)
    padding[:, :2] = False
    for function in (causal_mask_function, sliding_window_causal_mask_function(3)):
        for given_padding in (None, padding):
            given = {
                "batch_size": 1,
                "q_length": 7,
                "kv_length": 11,
                "q_offset": 4,
                "mask_function": function,
                "attention_mask": given_padding,
            }
            mask = registered_mask(**given, dtype=torch.float32)
            assert isinstance(mask, Mask)
            whole = sdpa_mask(**given, allow_is_causal_skip=False)
            assert whole is not None
            assert torch.equal(mask.whole(), whole)
            assert torch.equal(mask.piece(2, 3, 5, 4), whole[..., 2:5, 5:9])
            assert torch.equal(mask.row(3), mask.explicit[..., 3:4, :])
            assert torch.equal(mask.explicit, eager_mask(**given, dtype=torch.float32))


def test_a_mask_is_a_tensor_to_whoever_takes_it_for_one() -> None:
    mask = causal(4, 4, torch.device("cpu"))
    additive = mask.explicit
    scores = torch.randn(1, 2, 4, 4)
    assert torch.equal(scores + mask, scores + additive)
    assert torch.equal(mask + scores, scores + additive)
    assert torch.equal(torch.where(mask < 0, 0.0, scores), torch.where(additive < 0, 0.0, scores))
    assert torch.equal(mask[:, :, 1:], additive[:, :, 1:])
    assert torch.equal(torch.cat([mask, mask]), torch.cat([additive, additive]))
    assert mask.shape == additive.shape
    assert mask.to("cpu") is mask
    assert torch.equal(mask.to(torch.float64), additive.double())
    assert mask.to(dtype=torch.float64).dtype == torch.float64


def test_grid_tells_what_pieces_hold() -> None:
    mask = causal(10, 10, torch.device("cpu"))
    assert mask.visible(4) == [[SOME, NONE, NONE], [ALL, SOME, NONE], [ALL, ALL, SOME]]


def test_masks_of_any_rank(small_pieces: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(3, 1, 2, 9, 4)
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    additive = torch.randn(2, 9, 9)
    pieces = [attention(q, k, v, [mask], 1.0) for mask in (seen, additive)]
    assert small_pieces
    monkeypatch.setattr(elm_lanczos.attention, "EXPLICIT", 2**40)
    for mask, made in zip((seen, additive), pieces, strict=True):
        assert torch.allclose(made, attention(q, k, v, [mask], 1.0), atol=1e-6)


def test_masks_that_exclude_each_other(
    small_pieces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    past = causal(9, 9, torch.device("cpu"))
    future = torch.ones(1, 1, 9, 9, dtype=torch.bool).triu(1)
    q, k, v = torch.randn(3, 1, 2, 9, 4)
    made = attention(q, k, v, [past, future], 1.0)
    assert small_pieces and made.isfinite().all()
    monkeypatch.setattr(elm_lanczos.attention, "EXPLICIT", 2**40)
    assert torch.allclose(made, attention(q, k, v, [past, future], 1.0), atol=1e-6)


def test_writing_into_a_mask_is_not_lost() -> None:
    mask = causal(4, 4, torch.device("cpu"))
    mask[:, :, 0, 3] = 0.0
    q, k, v = torch.randn(3, 1, 2, 4, 4)
    assert torch.equal(attention(q, k, v, [mask], 1.0), attention(q, k, v, [mask.explicit], 1.0))
    assert mask.explicit[0, 0, 0, 3] == 0.0


def test_bilinear_values_stay_so(small_pieces: list[int]) -> None:
    with torch.no_grad(), Freezing(torch.float64, RULES):
        x = linear(torch.randn(1, 2, 6, 4, dtype=torch.float64))
        product = (x @ torch.randn(4, 4).double()) * (x @ torch.randn(4, 4).double())
        out = attention(x, x, product, [], 1.0)
        mark = mark_of(out)
        assert small_pieces
        assert mark is not None and mark.kind == Kind.NONLINEAR and mark.bilinear
