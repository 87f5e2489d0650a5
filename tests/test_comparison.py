"""Comparison of models over phrases against full SVDs of explicit Jacobians."""

from __future__ import annotations

import gc
import io
import signal
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elm_lanczos import cli
from elm_lanczos.analysis import Comparison, compare
from elm_lanczos.analysis.comparison import _together, _worst
from elm_lanczos.certificate import Certificate
from elm_lanczos.errors import ModelError, UsageError
from elm_lanczos.model import DetachedModel
from elm_lanczos.prompts import PHRASES, read_prompts
from elm_lanczos.report.analysis import render, to_html
from elm_lanczos.status import Status

PROMPTS = ["my fellow", "the state of the", "a", "freedom is", "自由 \x1b[31m\U0001f600"]


@pytest.fixture(scope="module")
def result(tiny: DetachedModel) -> Comparison:
    return compare([tiny, tiny], PROMPTS, k=3, tol=1e-5, top=2)


def test_values_are_those_of_explicit_jacobians(tiny: DetachedModel, result: Comparison) -> None:
    table = result.to_dataframe()
    first = table[table.model == result.models[0].model]
    row = 0
    for number, prompt in enumerate(PROMPTS):
        lin = tiny.linearize(prompt)
        every = lin.vjp(torch.eye(32)).transpose(0, 1).double()
        for index, J in enumerate(every):
            found, values = first.iloc[row], torch.linalg.svdvals(J).numpy()
            place = (number, index, index - len(every), lin.tokens[index], prompt)
            assert tuple(found[["prompt", "index", "from_end", "token", "text"]]) == place
            sigma = found[["sigma_1", "sigma_2", "sigma_3"]].to_numpy(float)
            assert np.abs(sigma - values[:3]).max() <= 1e-4 * values[0]
            rank = (values**2).sum() / values[0] ** 2
            error = max(5 * found.stable_rank_error, 1e-3 * rank)  # five standard errors
            assert abs(found.stable_rank - rank) <= error
            U, _, Vh = torch.linalg.svd(J)
            sign = torch.sign(Vh[0] @ lin.inputs[index].double())
            best = int((tiny.unembedding.weight.double() @ (sign * U[:, 0])).argmax())
            assert found.writes[0] == tiny.token_strings([best])[0]
            assert len(found.writes) == len(found.reads) == 2
            row += 1
    assert row == len(first) and set(first.status) <= {"converged", "converged_to_rounding"}
    assert not result.doubts


def test_distributions_and_words_side_by_side(result: Comparison) -> None:
    one, other = (each.model for each in result.models)
    assert other == f"{one} #2"  # no two of a name
    table, by_place = result.to_dataframe(), result.distribution()
    for row in by_place.itertuples():
        chosen = (table.model == row.model) & (table.from_end == row.position)
        ranks = table[chosen].stable_rank
        assert row.tokens == len(ranks)
        assert np.allclose([row.q1, row.median, row.q3], np.percentile(ranks, (25, 50, 75)))
    assert by_place[by_place.model == one].position.tolist()[0] == -1
    assert by_place[by_place.model == one].tokens.tolist()[0] == len(PROMPTS)
    start = replace(result, origin="start").distribution()
    assert start.position.tolist()[0] == 0 and start.tokens.tolist()[0] == len(PROMPTS)
    words = result.directions()
    assert words.text.tolist() == PROMPTS
    assert (words[f"{one}: writes"] == words[f"{other}: writes"]).all()
    last = table[(table.model == one) & (table.from_end == -1)]
    assert words[f"{one}: writes"].tolist() == last.writes.tolist()


def test_what_is_shown_cannot_steer_a_terminal(result: Comparison, tmp_path: Path) -> None:
    from rich.console import Console

    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render(result))
    assert "\x1b[31m" not in console.export_text() and "\x1b[31m" not in to_html(result)
    for models in (result.models, result.models[:1]):
        for origin in ("end", "start"):
            drawing = replace(result, models=models, origin=origin).plot()
            drawing.savefig(tmp_path / "x.png")


def test_groups_are_of_one_length_and_hold_each_prompt_once() -> None:
    lengths = [3, 300, 3, 1, *[7] * 80, 300]
    groups = _together(lengths)
    assert sorted(number for group in groups for number in group) == list(range(len(lengths)))
    for group in groups:
        assert len({lengths[number] for number in group}) == 1
        assert len(group) == 1 or len(group) * lengths[group[0]] <= 256


def test_worst_certificate_and_what_did_not_converge_are_doubts(result: Comparison) -> None:
    good = result.models[0].certificate
    bad = replace(good, leak=float("nan"), fidelity=0.5)
    worst = _worst([good, bad, good])
    assert worst.fidelity == 0.5 and worst.leak != worst.leak and isinstance(worst, Certificate)
    status = result.models[0].status.copy()
    status[2] = Status.NOT_CONVERGED
    spoilt = replace(result.models[0], certificate=worst, status=status)
    doubts = replace(result, models=[spoilt, result.models[1]]).doubts
    assert len(doubts) == 2
    assert "fidelity 5e-01, leak nan" in doubts[0] and "1 of" in doubts[1]


def test_one_model_at_a_time_and_errors_before_the_work(tiny_folder: Path) -> None:
    alive: list[weakref.ref[DetachedModel]] = []
    loaded: list[Any] = []
    solved: list[tuple[int, int]] = []

    def load(name: Any) -> DetachedModel:
        gc.collect()
        assert sum(model() is not None for model in alive) == 0, "another one is still held"
        loaded.append(name)
        if name == "missing":
            raise ModelError("model 'missing' was not found")
        model = DetachedModel.from_pretrained(tiny_folder)
        alive.append(weakref.ref(model))
        return model

    told = lambda *at: solved.append(at)  # noqa: E731
    with pytest.raises(ModelError, match="missing"):
        compare(["a", "missing", "b"], PROMPTS, load=load, progress=told)
    assert loaded == ["b", "missing"] and not solved
    loaded.clear()
    compare(["a", "b"], PROMPTS[:1], k=1, load=load, progress=told)
    assert loaded == ["b", "a", "b"]
    assert solved == [(0, 2), (1, 2), (1, 2), (2, 2)]


def test_bad_input_is_refused(tiny: DetachedModel) -> None:
    for models, prompts, options, says in (
        ([], ["a"], {}, "at least one"),
        ([tiny], [], {}, "at least one"),
        ([tiny], ["a"], {"origin": "middle"}, "middle"),
        ([tiny], ["a"], {"k": 33}, "32"),
    ):
        with pytest.raises(UsageError, match=says):
            compare(models, prompts, **options)  # type: ignore[arg-type]


def test_phrases_come_with_the_package() -> None:
    phrases = read_prompts(PHRASES)
    assert len(phrases) == 100 and phrases[0].text == "The bridge out of Marin is the"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["elm-lanczos", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def test_command_line(command: Any, tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "phrases.txt"
    file.write_text("my fellow\nthe state of\n")
    files = [tmp_path / f"r.{kind}" for kind in ("json", "csv", "html", "png", "zarr")]
    given = ["compare", tiny_folder, "--seq-file", file, "--k", 2]
    code, out, err = command(*given, *(part for name in files for part in ("--out", name)))
    assert (code, err) == (0, "")
    assert "median" in out and "my fellow" in out and all(name.exists() for name in files)
    for wrong, expected, says in (
        ([tmp_path / "nowhere"], 1, "not found"),
        (["--k", 99], 2, "32"),
        (["--method", "lancsoz"], 2, "lanczos"),
        (["--position", 1], 2, "--position"),
    ):
        code, out, err = command(*given, *wrong)
        assert (code, out, len(err.splitlines())) == (expected, "", 1)
        assert says in err and "Traceback" not in err
