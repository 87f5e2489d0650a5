"""Runs end to end: what is stored is right, and nothing is lost when a run is killed."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray

from elm_lanczos.config import RunConfig
from elm_lanczos.errors import StoreError, UsageError
from elm_lanczos.model import DetachedModel
from elm_lanczos.run import run
from elm_lanczos.store import PromptResult, Status, open_results
from tests.processes import begun, ended

PROMPTS = ["the Soviet Union and the", "peace and security of the", "my fellow citizens, we have"]


class Listener:
    """Keeps what a run tells."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.finished_texts: list[str] = []
        self.made: list[int] = []
        self.predicted = 0

    def note(self, message: str) -> None:
        self.notes.append(message)

    def opened(self, path: Path, words: object) -> None:
        pass

    def started(self, number: int, total: int, text: str) -> None:
        pass

    def planned(self, plan: object, passes: int) -> None:
        self.predicted = passes

    def passes(self, made: int) -> None:
        self.made.append(made)

    def finished(self, result: PromptResult) -> None:
        self.finished_texts.append(result.text)


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n\n".join(PROMPTS) + "\n")
    return file


def options(tiny_folder: Path, out: Path, **given: object) -> RunConfig:
    return RunConfig(**({"model": str(tiny_folder), "k": 4, "out": str(out), "top": 3} | given))


def arrays(path: Path) -> dict[str, np.ndarray]:
    """Every array of a store by its path, as raw bytes would be compared."""
    import zarr

    root = zarr.open_group(path, mode="r")
    return {
        name: np.asarray(node[...])
        for name, node in root.members(max_depth=None)
        if isinstance(node, zarr.Array)
    }


def assert_same_bits(left: Path, right: Path) -> None:
    one, other = arrays(left), arrays(right)
    assert one.keys() == other.keys()
    for name, values in one.items():
        assert values.dtype == other[name].dtype, name
        if values.dtype.kind == "f":
            assert values.tobytes() == other[name].tobytes(), name
        else:
            assert (values == other[name]).all(), name


@pytest.mark.parametrize("method", ["auto", "lanczos", "stream", "dense"])
def test_stored_triplets_are_those_of_the_dense_jacobian(
    tiny_folder: Path, tmp_path: Path, method: str
) -> None:
    out = tmp_path / "r.zarr"
    listener = Listener()
    outcome = run(options(tiny_folder, out, text=PROMPTS[0], method=method), listener)
    assert (outcome.not_converged, outcome.not_exact) == (0, 0)
    result = open_results(out).prompts[0]
    model = DetachedModel.from_pretrained(tiny_folder, compute_dtype="float64")
    lin = model.linearize(PROMPTS[0])
    J = lin.vjp(torch.eye(32, dtype=torch.float64)).movedim(1, 0)
    expected = torch.linalg.svdvals(J)[:, :4].numpy()
    assert np.abs(result.S - expected).max() <= 1e-5 * expected.max()
    rebuilt = np.einsum("tk,tkm,tkd->tmd", result.S, result.U, result.V)
    U, S, Vh = torch.linalg.svd(J)
    best = torch.einsum("tmk,tk,tkd->tmd", U[..., :4], S[:, :4], Vh[:, :4]).numpy()
    assert np.abs(rebuilt - best).max() <= 1e-4 * expected.max()
    exact_rank = (J.square().sum((1, 2)) / S[:, 0] ** 2).numpy()
    spread = 5 * result.stable_rank_error + 1e-4 * exact_rank
    assert (np.abs(result.stable_rank - exact_rank) <= spread).all()
    contributions = torch.einsum("tmd,td->tm", J, lin.inputs).norm(dim=1).numpy()
    assert np.allclose(result.contribution_norm, contributions, rtol=1e-4)
    assert (np.einsum("tkd,td->tk", result.V, lin.inputs.numpy()) >= -1e-5).all()  # sign
    total = result.attribution.sum() + result.attrs["attribution"]["constant"]
    assert abs(total - result.attrs["predicted"][0]["logit"]) <= 1e-5 * abs(total)
    assert result.certificate["exact"] and result.certificate["orthogonality"] <= 1e-5
    assert (result.status == Status.CONVERGED).all()
    assert listener.made == sorted(listener.made) and listener.made[-1] > 0


def test_predicted_passes_are_near_those_made(tiny_folder: Path, tmp_path: Path) -> None:
    listener = Listener()
    run(options(tiny_folder, tmp_path / "r.zarr", text=PROMPTS[2], k=2), listener)
    assert 0.3 <= listener.made[-1] / listener.predicted <= 3


def test_generated_tokens_have_their_own_systems(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.zarr"
    run(options(tiny_folder, out, text=PROMPTS[0], generate=3), Listener())
    first = open_results(out).prompts[0]
    later = first.positions
    length = len(first.tokens)
    assert list(later) == [length, length + 1]
    chain = [first, *later.values()]
    for before, after in itertools.pairwise(chain):
        assert after.token_ids[-1] == before.attrs["predicted"][0]["id"]
        assert len(after.tokens) == len(before.tokens) + 1
        assert after.text.startswith(before.text)
    labelled = xarray.open_zarr(
        out, group=f"prompts/000000/position_{length:04d}", consolidated=False
    )
    assert labelled.sizes["token"] == length + 1


def test_other_positions_have_the_systems_of_the_tokens_so_far(
    tiny_folder: Path, tmp_path: Path
) -> None:
    given = {"text": PROMPTS[0], "positions": "1:4", "tokens": "first:2", "generate": 2}
    run(options(tiny_folder, tmp_path / "r.zarr", **given), Listener())
    model = DetachedModel.from_pretrained(tiny_folder)
    ids = model.encode(PROMPTS[0])
    length = len(ids)
    first = open_results(tmp_path / "r.zarr").prompts[0]
    assert first.position == length - 1 and first.text == PROMPTS[0]  # --generate asks for the end
    assert list(first.positions) == [1, 2, 3, length]
    for position, result in first.positions.items():
        assert len(result.tokens) == position + 1
        assert result.token_ids[:length].tolist() == ids[: position + 1].tolist()
        assert (result.status[:2] == Status.CONVERGED).all()
    assert first.positions[3].text == model.text(ids[:4]) and PROMPTS[0].startswith(
        first.positions[3].text
    )
    # decoders are causal: it is what the whole prompt's output at that position is made of
    whole = model.linearize(PROMPTS[0], position=3)
    assert np.allclose(first.positions[3].output, whole.output, atol=1e-5)
    rows = whole.vjp(torch.eye(32)).movedim(1, 0)
    assert np.allclose(first.positions[3].S[:2], torch.linalg.svdvals(rows)[:2, :4], rtol=1e-4)
    lone = options(tiny_folder, tmp_path / "s.zarr", text=PROMPTS[0], positions="first:2")
    run(lone, Listener())
    first = open_results(tmp_path / "s.zarr").prompts[0]
    assert first.position == 1 and list(first.positions) == [0]  # the largest has the main group
    with pytest.raises(StoreError, match="positions"):
        run(lone.model_copy(update={"positions": "first:3"}), Listener(), resume=True)
    with pytest.raises(UsageError, match="--tokens 2: the prompt has only 1 tokens"):
        run(lone.model_copy(update={"tokens": "2", "out": str(tmp_path / "t")}), Listener())
    assert not (tmp_path / "t").exists()


def test_positions_and_prompts_that_are_missing_are_made_in_any_order(
    tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]))
    given = {"seq_file": str(tmp_path / "prompts.txt"), "positions": "last:3", "generate": 2}
    whole, holes = tmp_path / "whole.zarr", tmp_path / "holes.zarr"
    run(options(tiny_folder, whole, k=2, **given), Listener())
    shutil.copytree(whole, holes)
    names = [group.name for group in open_results(holes)[1].positions.values()]
    assert len(names) == 3
    shutil.rmtree(holes / names[1])  # one that was never begun,
    for group in (holes / names[2], holes / "prompts/000000"):  # and two that were interrupted
        metadata = json.loads((group / "zarr.json").read_text())
        (group / "zarr.json").write_text(json.dumps({**metadata, "attributes": {}}))
    listener = Listener()
    run(options(tiny_folder, holes, k=2, **given), listener, resume=True)
    assert_same_bits(whole, holes)
    assert len(listener.finished_texts) == 2 * 4 and listener.made != []


def test_tokens_that_were_not_asked_for_stay_empty(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.zarr"
    run(options(tiny_folder, out, text=PROMPTS[0], tokens="last:2"), Listener())
    result = open_results(out).prompts[0]
    skipped = result.status == Status.NOT_REQUESTED
    assert skipped.sum() == len(result.tokens) - 2 and not skipped[-2:].any()
    assert np.isnan(result.S[skipped]).all() and np.isfinite(result.S[~skipped]).all()
    whole = tmp_path / "whole.zarr"
    run(options(tiny_folder, whole, text=PROMPTS[0]), Listener())
    everything = open_results(whole).prompts[0]
    assert np.allclose(everything.S[-2:], result.S[-2:], rtol=1e-5)  # however tokens are batched


def test_long_prompts_are_warned_about_and_cut_into_owners(
    tiny_folder: Path, tmp_path: Path
) -> None:
    out, listener = tmp_path / "r.zarr", Listener()
    text = " ".join(["peace and freedom for all the world"] * 22)
    run(options(tiny_folder, out, text=text, k=2, method="stream"), listener)
    result = open_results(out).prompts[0]
    assert len(result.tokens) > 128  # several owners
    assert "more than the 64" in listener.notes[0]
    assert (result.status == Status.CONVERGED).all()


def test_store_is_neither_overwritten_nor_continued_by_another_run(
    tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "r.zarr"
    given = options(tiny_folder, out, text=PROMPTS[0])
    run(given, Listener())
    with pytest.raises(StoreError, match="--resume"):
        run(given, Listener())
    for change in ({"k": 3}, {"seed": 1}, {"text": "another"}, {"compute_dtype": "float64"}):
        with pytest.raises(StoreError, match="cannot be continued"):
            run(given.model_copy(update=change), Listener(), resume=True)
    again = Listener()
    run(given, again, resume=True)
    assert again.finished_texts == [PROMPTS[0]] and again.made == []  # nothing was left to do
    run(given.model_copy(update={"k": 3}), Listener(), overwrite=True)
    assert open_results(out).prompts[0].S.shape[1] == 3


def test_same_seed_gives_the_same_bits(tiny_folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(options(tiny_folder, tmp_path / name, text=PROMPTS[0], generate=2), Listener())
    assert_same_bits(tmp_path / "a", tmp_path / "b")
    run(options(tiny_folder, tmp_path / "c", text=PROMPTS[0], generate=2, seed=1), Listener())
    assert arrays(tmp_path / "a")["prompts/000000/U"].tobytes() != (
        arrays(tmp_path / "c")["prompts/000000/U"].tobytes()
    )


@pytest.mark.parametrize("method", ["lanczos", "stream"])
def test_killed_runs_end_with_the_same_bits(tiny_folder: Path, tmp_path: Path, method: str) -> None:
    long = " ".join(["we seek peace and freedom for all the world"] * 15)  # several owners
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join([PROMPTS[0], long]))
    given = ["--k", "2", "--method", method, "--generate", "1", "--quiet", "--seed", "5"]
    command = ["run", "--model", tiny_folder, "--seq-file", file, *given]
    undisturbed, killed = tmp_path / "undisturbed.zarr", tmp_path / "killed.zarr"
    process = begun(*command, "--out", undisturbed)
    while not (undisturbed / "zarr.json").exists() and process.is_alive():
        time.sleep(0.01)
    opened = time.monotonic()
    assert ended(process) == 0
    duration = time.monotonic() - opened
    rng = random.Random(method)
    kills = 0
    for _ in range(5):
        process = begun(*command, "--out", killed, "--resume")
        # somewhere between the opening of the store and the end
        while not (killed / "zarr.json").exists() and process.is_alive():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5) * duration)
        process.kill()
        kills += ended(process) == -signal.SIGKILL
    assert ended(begun(*command, "--out", killed, "--resume")) == 0
    assert kills >= 2
    assert_same_bits(undisturbed, killed)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_runs_say_so_and_can_be_continued(
    tiny_folder: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    out = tmp_path / "r.zarr"
    command = [sys.executable, "-m", "elm_lanczos", "run", "--model", str(tiny_folder), "--quiet"]
    command += ["--text", PROMPTS[0], "--generate", "40", "--k", "8", "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (out / "prompts" / "000000").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == code
    assert "--resume" in errors and len(errors.splitlines()) == 1


def test_k_beyond_the_dimension_is_refused_before_anything_is_written(
    tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="32 dimensions"):
        run(options(tiny_folder, tmp_path / "r.zarr", text="a", k=33), Listener())
    assert not (tmp_path / "r.zarr").exists()
    run(options(tiny_folder, tmp_path / "r.zarr", text="a", k=32), Listener())
