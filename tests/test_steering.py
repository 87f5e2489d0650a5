"""Steering: the operator against explicit matrices, the hook with and without a cache."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from elm_lanczos import cli
from elm_lanczos.analysis import Steering, steer, steering_operator, sweep_steering
from elm_lanczos.analysis.steering import concept_tokens, default_layer
from elm_lanczos.architectures import tiny_config, tiny_model
from elm_lanczos.chain import Trace
from elm_lanczos.errors import UnsupportedModelError, UsageError
from elm_lanczos.model import DetachedModel
from tests.families import CONFIGS, PROMPT, detached_model, hand_frozen_jacobian, hf_model

STEERED = ["war", "战争", "السلام", "🕊 $x$ \x1b[31m", "nuclear  weapons"]


def with_tokenizer(family: str, bundled: DetachedModel) -> DetachedModel:
    """A tiny model whose embeddings have a row for every token of the bundled tokenizer."""
    hf = hf_model(family)
    torch.manual_seed(1)
    hf.resize_token_embeddings(4096)
    return DetachedModel(hf.double(), bundled.tokenizer)


@pytest.mark.parametrize("family", list(CONFIGS))
def test_operator_is_the_truncated_explicit_jacobian(family: str) -> None:
    model = detached_model(family)
    operator = steering_operator(model, PROMPT, 2, k=5)
    assert operator.tokens == tuple(range(8))  # no tokenizer: none is known to be special
    x = model.embed(PROMPT)
    J = hand_frozen_jacobian(model.hf_model, x, layer=2)[:8]  # (8, m, d)
    joint = J.movedim(0, 1).flatten(1)
    U, S, Vh = torch.linalg.svd(joint, full_matrices=False)
    expected = (U[:, :5] * S[:5]) @ (Vh[:5] @ x[:8].flatten())
    assert torch.allclose(operator.S, S[:5], rtol=1e-8)
    assert (operator.image - expected).norm() <= 1e-7 * expected.norm()
    assert operator.energy == pytest.approx(float(S[:5].square().sum() / S.square().sum()), rel=0.2)
    whole = joint @ x[:8].flatten()
    cosine = float(torch.cosine_similarity(whole, expected, dim=0))
    assert operator.alignment == pytest.approx(cosine, abs=1e-8)
    assert operator.direction.norm() == pytest.approx(1)
    assert operator.converged and operator.certificate.exact


def test_special_tokens_and_the_last_are_left_out(bundled: DetachedModel) -> None:
    operator = steering_operator(bundled, "war", k=2)
    ids = bundled.encode(operator.prompt)
    assert operator.prompt.strip() == "war, war, war," and operator.layer == 6
    assert ids[0] == 0 and operator.tokens == tuple(range(1, len(ids) - 1))


def test_no_explicit_jacobian_is_made(
    bundled: DetachedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from elm_lanczos.linearization import Linearization

    pushed = []
    for name in ("vjp", "jvp"):
        real = getattr(Linearization, name)

        def counted(self: Linearization, X: torch.Tensor, real: Callable = real) -> torch.Tensor:
            pushed.append(len(X) if X.ndim > 1 else 1)
            return real(self, X)

        monkeypatch.setattr(Linearization, name, counted)
    steering_operator(bundled, "war", k=4)
    assert 0 < sum(pushed) < bundled.hidden_size


def steered_by_hand(model: DetachedModel, ids: torch.Tensor, layer: int, add: torch.Tensor) -> list:
    """Greedy tokens without a cache, everything run for each; `add` from the prompt's end."""
    start, new = len(ids) - 1, []
    for _ in range(5):

        def change(_m: object, _a: object, out: torch.Tensor | tuple) -> torch.Tensor | tuple:
            h = out if isinstance(out, torch.Tensor) else out[0]
            h = torch.stack([v if i < start else v + v.norm() * add for i, v in enumerate(h[0])])
            return h[None] if isinstance(out, torch.Tensor) else (h[None], *out[1:])

        hook = model.layers[layer - 1].register_forward_hook(change)
        with torch.no_grad():
            logits = model.hf_model(input_ids=ids[None], use_cache=False).logits[0, -1]
        hook.remove()
        new.append(int(logits.argmax()))
        ids = torch.cat([ids, torch.tensor(new[-1:])])
    return new


@pytest.mark.parametrize("family", ["llama-biased", "gemma3"])
def test_generation_with_a_cache_is_that_without(family: str, bundled: DetachedModel) -> None:
    model = with_tokenizer(family, bundled)
    prompt = model.encode("my fellow citizens")
    for strength in (0.8, -0.8):
        operator = steering_operator(model, "war", 2)
        result = steer(model, "war", prompt, layer=2, strength=strength, new_tokens=5)
        expected = steered_by_hand(model, prompt, 2, strength * operator.direction)
        assert result.steered.ids.tolist() == expected
        for use_cache in (True, False):
            with operator.applied(model, strength, start=len(prompt) - 1):
                written = model.hf_model.generate(
                    prompt[None], max_new_tokens=5, do_sample=False, use_cache=use_cache
                )
            assert written[0, len(prompt) :].tolist() == expected
    assert result.unsteered.ids.tolist() == model.generate(prompt, 5)[len(prompt) :].tolist()


def test_figures_are_those_of_the_model_itself(bundled: DetachedModel) -> None:
    result = steer(bundled, "war", "We must", new_tokens=6)
    ids = bundled.encode("We must")
    words = concept_tokens(bundled, "war")
    assert set(bundled.token_strings(words)) == set(result.words) >= {" war"}
    for written in (result.unsteered, result.steered):
        whole = torch.cat([ids, written.ids])
        for step in range(len(written.ids)):
            logits = bundled.predict(whole[: len(ids) + step]).logits.double()
            logp = logits.log_softmax(-1)
            assert float(written.plain_log_probability[step]) == pytest.approx(
                float(logp[written.ids[step]]), abs=1e-4
            )
            if written is result.unsteered:
                concept = float(logp.exp()[words].sum().log())
                found = float(written.concept_log_probability[step])
                assert found == pytest.approx(concept, abs=1e-4)
    unsteered = result.unsteered
    assert torch.allclose(unsteered.log_probability, unsteered.plain_log_probability, atol=1e-4)
    assert result.rise(result.steered) > 1 and not result.doubts
    facts = " ".join(result.facts)
    assert result.steered.text in facts and f"{result.operator.energy:.1%}" in facts


def test_strength_zero_changes_nothing_and_opposite_signs_differ(bundled: DetachedModel) -> None:
    sweep = sweep_steering(
        bundled, "peace", "Our schools", layers=[6], strengths=(0.0, 0.6, -0.6), new_tokens=8
    )
    zero, up, down = (trial.steered for trial in sweep.trials)
    assert zero.text == sweep.unsteered.text and sweep.rise(zero) == pytest.approx(0, abs=1e-6)
    assert up.concept > sweep.unsteered.concept > down.concept


def test_every_position_is_another_steering(bundled: DetachedModel) -> None:
    both = [
        steer(bundled, "war", "Our schools and", new_tokens=1, every_position=every)
        for every in (False, True)
    ]
    few, all_of_them = (one.steered.concept_log_probability for one in both)
    assert abs(few - all_of_them) > 1e-3


def test_sampling_is_seeded_and_leaves_the_generator_alone(bundled: DetachedModel) -> None:
    def text(seed: int) -> str:
        result = steer(bundled, "war", "We", new_tokens=12, temperature=1.0, seed=seed)
        return result.steered.text

    state = torch.get_rng_state()
    first = text(3)
    assert torch.equal(state, torch.get_rng_state())
    assert first == text(3) != text(4)


def test_model_is_left_as_it_was_also_after_an_exception(bundled: DetachedModel) -> None:
    hf = bundled.hf_model
    before = copy.deepcopy(hf.state_dict())
    config = copy.deepcopy(hf.generation_config.to_dict())
    prompt = bundled.encode("We must")
    plain = bundled.predict(prompt).logits
    operator = steering_operator(bundled, "war", k=2)
    with pytest.raises(ZeroDivisionError), operator.applied(bundled, 0.5):
        assert not torch.equal(bundled.predict(prompt).logits, plain)
        raise ZeroDivisionError
    steer(bundled, "war", prompt, new_tokens=2)
    assert torch.equal(bundled.predict(prompt).logits, plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in hf.modules())
    assert hf.generation_config.to_dict() == config
    assert all(torch.equal(before[name], value) for name, value in hf.state_dict().items())


def test_steering_works_on_batches_and_in_the_stored_dtype(bundled: DetachedModel) -> None:
    operator = steering_operator(bundled, "war", k=2)
    ids = bundled.encode("We must").expand(3, -1)
    with operator.applied(bundled, start=1), torch.no_grad():
        hidden = bundled.hf_model(ids, output_hidden_states=True).hidden_states[6]
    assert hidden.dtype == torch.bfloat16 and torch.equal(hidden[0], hidden[2])


@pytest.mark.parametrize("name", ["mixtral", "gpt_neox", "cohere2", "gpt2"])
def test_mixtures_biases_and_parallel_blocks(name: str) -> None:
    model = DetachedModel(tiny_model(tiny_config(name)).double())
    operator = steering_operator(model, torch.tensor([3, 1, 4, 1, 5]), k=3)
    ids = torch.tensor([[2, 7, 1]])
    with torch.no_grad():
        plain = model.hf_model(ids).logits
        with operator.applied(model, 1.0, start=1):
            steered = model.hf_model(ids).logits
    assert torch.equal(plain[:, 0], steered[:, 0]) and not torch.allclose(plain, steered)
    assert operator.certificate.exact


@pytest.mark.parametrize("concept", STEERED)
def test_any_script_can_be_a_concept_and_a_prompt(concept: str, bundled: DetachedModel) -> None:
    result = steer(bundled, concept, concept[::-1], k=1, new_tokens=2)
    assert isinstance(result, Steering) and result.words
    assert result.plot() is not None and "\x1b" not in result._repr_html_()


def test_words_of_a_concept(bundled: DetachedModel) -> None:
    def words(concept: str) -> set[str]:
        return set(bundled.token_strings(concept_tokens(bundled, concept)))

    assert words("war") == {" war", "war", " War"} & set(bundled.token_strings(range(4096)))
    assert words("War") == words("war")
    assert words("health care") == words("health") | words("care") >= {" health", " care"}
    assert words("slavery") == {" sl"}  # no single token: what begins it
    with pytest.raises(UsageError, match="no words"):
        words("  ")


def test_text_that_ends_early(bundled: DetachedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    first = int(bundled.predict(bundled.encode("We must")).logits.argmax())
    monkeypatch.setattr(bundled.hf_model.generation_config, "eos_token_id", first)
    result = steer(bundled, "war", "We must", strength=3.0, new_tokens=4)
    assert len(result.unsteered.ids) == 1 < len(result.steered.ids)
    table = result.to_dataframe()
    assert len(table) == 4 and table["plain"].tolist()[1:] == [""] * 3
    json.dumps(result.to_dict(), allow_nan=False)


def test_what_cannot_be_used_is_refused(
    bundled: DetachedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for options, said in (
        ({"concept": " "}, "empty|no words"),
        ({"prompt": torch.zeros(2, 256)}, "text or ids"),
        ({"prompt": torch.tensor([5000])}, "4095"),
        ({"layer": 9}, "layers are 1 … 8"),
        ({"strength": float("nan")}, "finite"),
        ({"new_tokens": 0}, "at least one"),
        ({"new_tokens": 2000}, "more than the 1024"),
        ({"temperature": -1.0}, "temperature"),
        ({"k": 0}, "k"),
    ):
        given = {"concept": "war", "prompt": "We"} | options
        with pytest.raises(UsageError, match=said):
            steer(bundled, **given)  # type: ignore[arg-type]
    without = detached_model("llama")
    with pytest.raises(UsageError, match="no tokenizer"):
        steer(without, "war", PROMPT)
    with pytest.raises(UsageError, match="before the last"):
        steering_operator(without, PROMPT[:1])

    from elm_lanczos import frozen_decoder

    real = frozen_decoder.trace

    def no_chain(*args: object) -> Trace:
        found = real(*args)  # type: ignore[arg-type]
        return Trace(found.segments[:1], found.output, not_a_chain="layers share keys")

    monkeypatch.setattr(frozen_decoder, "trace", no_chain)
    with pytest.raises(UnsupportedModelError, match="layers share keys"):
        steer(bundled, "war", "We")


def test_default_layer_of_any_depth() -> None:
    model = detached_model("llama")
    assert default_layer(model) == 2 and default_layer(model, 0.01) == 1


def test_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["elm-lanczos", "steer", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *capfd.readouterr()

    files = [tmp_path / f"x{suffix}" for suffix in (".png", ".csv", ".json", ".html", ".zarr")]
    out = [word for file in files for word in ("--out", str(file))]
    code, said, _ = run("war", "--onto", "We must", "--tokens", "3", "--json", *out)
    found = json.loads(said)
    assert code == 0 and len(found["rows"]) == 3 and found["layer"] == 6 and found["k"] == 16
    assert all(file.exists() for file in files)
    options = ["--tokens", "3", "--sweep", "--layer", "6", "--out", str(tmp_path / "sweep.png")]
    code, said, _ = run("war", "--onto", "We must", *options)
    assert code == 0 and "excess" in said and (tmp_path / "sweep.png").exists()
    for wrong in (
        ["--layer", "99"],
        ["--strength", "nan"],
        ["--strength", "1e39", "--temperature", "1"],
        ["--seed", "99999999999999999999"],
        ["--position", "1"],
        ["--model", "/nowhere"],
    ):
        code, _, errors = run("war", "--onto", "We must", *wrong)
        assert code in (1, 2) and "Traceback" not in errors
        assert len([line for line in errors.splitlines() if "rror" in line]) == 1
    code, _, errors = run("war")
    assert code == 2 and "--onto" in errors
