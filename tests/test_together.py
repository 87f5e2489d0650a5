"""Short prompts of one length that are solved together have the results they have alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elm_lanczos import solving
from elm_lanczos.batches import batches
from elm_lanczos.config import RunConfig
from elm_lanczos.errors import UnsupportedModelError
from elm_lanczos.linearization import Linearization, Together
from elm_lanczos.model import DetachedModel
from elm_lanczos.run import run
from elm_lanczos.store import open_results
from elm_lanczos.svd.plan import Plan
from elm_lanczos.verify import verify
from tests.test_distributed import started
from tests.test_run import Listener, assert_same_bits, options

WORDS = "people world nation peace war law time great country men".split()


@pytest.fixture(scope="module")
def texts(tiny: DetachedModel) -> list[str]:
    """Six prompts: three of one length, two of another, one of a third; in no order."""
    kinds: dict[int, list[str]] = {}
    for words in ("the {}", "the {} of the {}", "we have seen the {} of the {} and the"):
        for word in WORDS:
            text = words.format(word, word)
            kinds.setdefault(len(tiny.encode(text)), []).append(text)
    most = sorted(kinds.values(), key=len, reverse=True)
    three, two, one = most[0][:3], most[1][:2], most[2][:1]
    assert (len(three), len(two), len(one)) == (3, 2, 1)
    return [three[0], two[0], three[1], one[0], two[1], three[2]]


@pytest.fixture(scope="module")
def prompt_file(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("together") / "prompts.txt"
    file.write_text("\n".join(texts))
    return file


def grouped(lengths: list[int], **given: Any) -> list[list[int]]:
    return batches(RunConfig(text="a", **given), lengths)


def test_who_is_solved_with_whom() -> None:
    assert grouped([5, 7, 5, 129, 7, 5, 129]) == [[0, 2, 5], [1, 4], [3], [6]]
    assert grouped([128, 100, 128, 128]) == [[0, 2], [1], [3]]  # 256 tokens at most
    assert grouped([1] * 300)[0] == list(range(256))
    assert grouped([5, 5], generate=2) == [[0], [1]]
    assert grouped([5, 5], positions="0,-1") == [[0], [1]]
    assert grouped([5, 5], positions="-1") == [[0, 1]]
    assert grouped([5, 5], method="lanczos") == [[0], [1]]


def test_the_sum_of_systems_has_the_jacobians_of_each(
    tiny: DetachedModel, texts: list[str]
) -> None:
    ids = [tiny.encode(texts[number]) for number in (0, 2, 5)]
    lins = tiny.linearize_together(ids)
    sum_ = Together(lins[0].decoder)
    T, m, _ = lins[0].shape
    rows = sum_.vjp(torch.eye(m))
    for number, one in enumerate(ids):
        expected = tiny.linearize(one).vjp(torch.eye(m))
        found = rows[:, number * T : (number + 1) * T]
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    V = torch.randn(4, *sum_.inputs.shape)
    straight = torch.einsum("mnd,bnd->bm", rows, V)
    assert (sum_.jvp(V) - straight).norm() <= 1e-5 * straight.norm()


@pytest.mark.parametrize("given", [{"method": "stream"}, {"method": "dense", "tokens": "last:2"}])
def test_prompts_have_the_results_that_they_have_alone(
    tiny_folder: Path, prompt_file: Path, texts: list[str], tmp_path: Path, given: dict[str, str]
) -> None:
    out, listener = tmp_path / "r.zarr", Listener()
    outcome = run(options(tiny_folder, out, seq_file=str(prompt_file), **given), listener)
    assert (outcome.not_converged, outcome.not_exact) == (0, 0)
    assert listener.finished_texts == texts  # in the order of the prompts
    results = open_results(out)
    together = [result.plan.get("prompts") for result in results]
    assert together == [[0, 2, 5], [1, 4], [0, 2, 5], None, [1, 4], [0, 2, 5]]
    for number, (text, result) in enumerate(zip(texts, results, strict=True)):
        alone_at = tmp_path / f"{number}.zarr"
        run(options(tiny_folder, alone_at, text=text, **given), Listener())
        (alone,) = open_results(alone_at)
        assert (result.text, result.tokens) == (alone.text, alone.tokens)
        assert (result.status == alone.status).all() and result.done.all()
        there = ~np.isnan(alone.S[:, 0])
        assert there.sum() == (2 if "tokens" in given else len(alone.tokens))
        largest = alone.S[there].max()
        assert np.abs(result.S - alone.S)[there].max() <= 1e-5 * largest
        best = "tk,tkm,tkd->tmd"
        rebuilt = [np.einsum(best, r.S[there], r.U[there], r.V[there]) for r in (result, alone)]
        assert np.abs(rebuilt[0] - rebuilt[1]).max() <= 1e-4 * largest
        for name in ("output", "constant", "attribution", "contribution_norm"):
            one, other = getattr(result, name), getattr(alone, name)
            assert np.allclose(one, other, rtol=1e-4, atol=1e-5, equal_nan=True), name
        assert result.attrs["predicted"][0]["id"] == alone.attrs["predicted"][0]["id"]
        assert result.certificate["exact"]
    found = verify(out)
    assert not found.faults and found.complete and found.recomputed > 0


class StopError(Exception):
    """A run has been stopped."""


class Stopping(Listener):
    """Stops a run after some calls."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def passes(self, made: int) -> None:
        self.calls -= 1
        if self.calls < 0:
            raise StopError
        super().passes(made)


def test_a_run_that_is_stopped_ends_with_the_same_bits(
    tiny_folder: Path, prompt_file: Path, tmp_path: Path
) -> None:
    undisturbed, out = tmp_path / "u.zarr", tmp_path / "r.zarr"
    given: dict[str, Any] = {"seq_file": str(prompt_file), "method": "stream", "batch": 4}
    whole = Listener()
    run(options(tiny_folder, undisturbed, **given), whole)
    stops = 0
    for calls in (0, len(whole.made) // 5, len(whole.made) // 3, 10**9):
        try:
            run(options(tiny_folder, out, **given), Stopping(calls), resume=True)
        except StopError:
            stops += 1
    assert stops == 3
    assert_same_bits(undisturbed, out)


def test_finished_prompts_of_a_batch_are_left_as_they_are(
    tiny_folder: Path, prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "r.zarr"
    given: dict[str, Any] = {"seq_file": str(prompt_file), "method": "stream", "batch": 4}
    finish, ends = solving.finish, Stopping(1)

    def finish_one(*given: Any) -> None:
        ends.passes(0)
        finish(*given)

    with monkeypatch.context() as patch, pytest.raises(StopError):
        patch.setattr(solving, "finish", finish_one)
        run(options(tiny_folder, out, **given), Listener())
    first = (out / "prompts/000000/zarr.json").read_bytes()
    done = [prompt.attrs.get("finished") for prompt in open_results(out)]
    assert done == [True, None, None]  # the first of a batch of three, all of whose rows are done
    with monkeypatch.context() as patch, pytest.raises(StopError):
        patch.setattr(solving, "finish", lambda *_: Stopping(0).passes(0))
        run(options(tiny_folder, out, **given), Listener(), resume=True)
    assert not verify(out, load=None).faults
    run(options(tiny_folder, out, **given), Listener(), resume=True)
    assert (out / "prompts/000000/zarr.json").read_bytes() == first
    assert not verify(out, load=None).faults


def test_prompts_that_do_not_fit_together_are_solved_alone(
    tiny_folder: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = tmp_path / "two.txt", tmp_path / "r.zarr"
    file.write_text("\n".join([texts[0], texts[2]]))
    given: dict[str, Any] = {"seq_file": str(file), "method": "stream"}
    run(options(tiny_folder, out, **given), Listener())
    (first, _) = open_results(out)
    assert first.plan["prompts"] == [0, 1] and first.plan["svd"]["panel"] == 2 * len(first.tokens)
    make_plan = solving._plan

    def scarce(batch: Any, *given: Any) -> Plan:
        plan = make_plan(batch, *given)
        return replace(plan, panel=min(plan.panel, len(first.tokens)))

    monkeypatch.setattr(solving, "_plan", scarce)
    run(options(tiny_folder, out, **given), Listener(), overwrite=True)
    assert [prompt.plan.get("prompts") for prompt in open_results(out)] == [None, None]
    before = [prompt.S.tobytes() for prompt in open_results(out)]
    (out / "prompts/000001/S/c.0.0").unlink()
    monkeypatch.setattr(solving, "_plan", make_plan)  # the run that is continued is what counts
    run(options(tiny_folder, out, **given), Listener(), resume=True)
    assert [prompt.S.tobytes() for prompt in open_results(out)] == before


def test_a_prompt_that_is_lost_is_computed_again_with_the_others(
    tiny_folder: Path, prompt_file: Path, tmp_path: Path
) -> None:
    undisturbed, out = tmp_path / "u.zarr", tmp_path / "r.zarr"
    given = {"seq_file": str(prompt_file), "method": "stream"}
    for path in (undisturbed, out):
        run(options(tiny_folder, path, **given), Listener())
    (out / "prompts/000002/S/c.0.0").unlink()
    listener = Listener()
    run(options(tiny_folder, out, **given), listener, resume=True)
    assert any("prompts/000002" in note and "computed again" in note for note in listener.notes)
    assert_same_bits(undisturbed, out)


def test_prompts_that_cannot_go_together_are_solved_alone(
    tiny_folder: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = DetachedModel.linearize_together

    def refuse(
        self: DetachedModel, prompts: Any, *given: Any, **others: Any
    ) -> list[Linearization]:
        if len(prompts) > 1:
            raise UnsupportedModelError("a layer takes one prompt")
        return original(self, prompts, *given, **others)

    monkeypatch.setattr(DetachedModel, "linearize_together", refuse)
    file = tmp_path / "two.txt"
    file.write_text("\n".join([texts[0], texts[2]]))
    run(options(tiny_folder, tmp_path / "r.zarr", seq_file=str(file)), Listener())
    run(options(tiny_folder, tmp_path / "a.zarr", text=texts[0]), Listener())
    first, second = open_results(tmp_path / "r.zarr")
    (alone,) = open_results(tmp_path / "a.zarr")
    assert "prompts" not in first.plan and "prompts" not in second.plan
    assert first.S.tobytes() == alone.S.tobytes()


def test_several_processes_make_the_store_that_one_makes(
    tiny_folder: Path, prompt_file: Path, texts: list[str], tmp_path: Path
) -> None:
    """Batches are dealt; and where there is only one, its blocks of vectors are."""
    one_batch = tmp_path / "one.txt"
    one_batch.write_text("\n".join([texts[0], texts[2], texts[5]]))
    runs: dict[str, dict[str, Any]] = {
        "dealt": {"seq_file": str(prompt_file), "k": 2},
        "split": {"seq_file": str(one_batch), "method": "stream", "batch": 8},
    }
    configs = [options(tiny_folder, tmp_path / f"{n}.2", **given) for n, given in runs.items()]
    file = tmp_path / "work.json"
    file.write_text(json.dumps([c.model_dump(mode="json", exclude_none=True) for c in configs]))
    launcher = started(2, "tests.distributed_runs", "count", str(file))
    shown, complaints = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, complaints
    counts = [json.loads((tmp_path / f"work.json.{rank}").read_text()) for rank in range(2)]
    for index, (name, given) in enumerate(runs.items()):
        run(options(tiny_folder, tmp_path / f"{name}.1", **given), Listener())
        assert_same_bits(tmp_path / f"{name}.1", tmp_path / f"{name}.2")
        assert all(count[index]["rows"] > 0 for count in counts), name  # both have had their part
    said = [json.loads(line)["text"] for line in shown.splitlines()]
    assert said == [*texts, texts[0], texts[2], texts[5]]
