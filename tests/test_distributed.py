"""Several processes make the same store as one, and none of them can spoil it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist

import elm_lanczos.distributed
from elm_lanczos.distributed import Processes
from elm_lanczos.errors import PeerError, StoreError, UsageError
from elm_lanczos.run import run
from elm_lanczos.store import ResultStore, open_results
from tests.processes import begun, ended
from tests.test_run import PROMPTS, Listener, assert_same_bits, options

LONG = " ".join(["we seek peace and freedom for all the world"] * 4)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def started(count: int, *arguments: str) -> subprocess.Popen[str]:
    """The command line in several processes."""
    command = [*TORCHRUN, str(count), "-m", *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)


def lines_of(complaints: str) -> list[str]:
    """What the command itself says, among what torchrun says (with a traceback of its own)."""
    assert f"{Path(elm_lanczos.__file__).parent}/" not in complaints, complaints  # none of ours
    assert "pending" not in complaints, complaints  # nor of what was interrupted
    return [line for line in complaints.splitlines() if line.startswith("error:")]


def rank_process(launcher: subprocess.Popen[str], rank: int) -> psutil.Process:
    """The process of one rank."""
    (found,) = (
        child
        for child in psutil.Process(launcher.pid).children()
        if child.environ().get("RANK") == str(rank)
    )
    return found


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join([*PROMPTS, LONG]))
    return file


def test_several_processes_make_the_store_that_one_makes(
    tiny_folder: Path, prompt_file: Path, tmp_path: Path
) -> None:
    # blocks of 8 vectors of 32 cotangents, so that there are some to deal
    one: dict[str, Any] = {"text": LONG, "batch": 8, "seed": 3}
    longer = " ".join([LONG] * 4)
    several = {"seq_file": str(prompt_file), "positions": "0,-1", "generate": 2, "k": 2}
    runs = {
        "dealt": several,
        "lanczos": {**one, "method": "lanczos"},
        "stream": {**one, "method": "stream"},
        "dense": {**one, "method": "dense", "tokens": "last:5"},
        "owners": {"text": longer, "k": 2, "batch": 16, "method": "stream"},
    }
    configs = [options(tiny_folder, tmp_path / f"{n}.2", **given) for n, given in runs.items()]
    work = [config.model_dump(mode="json", exclude_none=True) for config in configs]
    work.append({**work[0], "resume": True})  # a finished store
    file = tmp_path / "work.json"
    file.write_text(json.dumps(work))
    launcher = started(2, "tests.distributed_runs", "count", str(file))
    shown, complaints = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, complaints
    counts = [json.loads((tmp_path / f"work.json.{rank}").read_text()) for rank in range(2)]
    for index, (name, given) in enumerate(runs.items()):
        alone, listener = tmp_path / f"{name}.1", Listener()
        run(options(tiny_folder, alone, **given), listener)
        assert_same_bits(alone, tmp_path / f"{name}.2")
        first, second = counts[0][index], counts[1][index]
        if name == "dealt":
            assert first["rows"] > 0 and second["rows"] > 0
            dealt = listener.finished_texts
            continue
        # the blocks of a round are one for each process; that of the second may be missing
        for kind in ("matvec", "rmatvec") if name == "lanczos" else ("rows",):
            assert 0.5 * first[kind] <= second[kind] <= first[kind] > 0
    assert counts[0][-1] == counts[1][-1] == {}  # nothing was left to do
    texts = [json.loads(line)["text"] for line in shown.splitlines()]
    # each prediction once and in the order of prompts, whoever computed it; and again at the end
    assert len(dealt) == 4 * 3
    assert texts == [*dealt, LONG, LONG, LONG, longer, *dealt]
    with pytest.raises(AssertionError):
        assert_same_bits(tmp_path / "lanczos.1", tmp_path / "stream.2")  # it can fail


@pytest.mark.parametrize(("prompts", "rank"), [(4, 1), (1, 0)])
def test_killed_processes_are_replaced_by_any_number_of_others(
    tiny_folder: Path, prompt_file: Path, tmp_path: Path, prompts: int, rank: int
) -> None:
    given = {"generate": "4", "k": "2", "batch": "8", "method": "stream"}
    source = {"seq_file": str(prompt_file)} if prompts > 1 else {"text": LONG}
    command = ["--model", str(tiny_folder), "--quiet", "--top", "3"]
    for name, value in {**given, **source}.items():
        command += [f"--{name.replace('_', '-')}", value]
    killed = tmp_path / "killed.zarr"
    launcher = started(2, "elm_lanczos", "run", *command, "--out", str(killed))
    main = killed / "prompts/000000" if prompts == 1 else killed / "prompts/000003"
    while not list(main.glob("position_*")) and launcher.poll() is None:
        time.sleep(0.02)
    rank_process(launcher, rank).kill()
    begun = time.monotonic()
    _, complaints = launcher.communicate(timeout=100)
    assert time.monotonic() - begun < 30  # the others did not wait for the one that is gone
    assert launcher.returncode != 0
    said = lines_of(complaints)
    assert len(said) == (rank == 1) and all("--resume" in line for line in said), complaints
    assert not open_results(killed).complete
    config = options(
        tiny_folder, killed, **source, generate=4, k=2, batch=8, method="stream", top=3
    )
    undisturbed = tmp_path / "undisturbed.zarr"
    run(config.model_copy(update={"out": str(undisturbed)}), Listener())
    if rank == 1:
        run(config, Listener(), resume=True)
    else:
        again = started(3, "elm_lanczos", "run", *command, "--out", str(killed), "--resume")
        _, complaints = again.communicate(timeout=100)
        assert again.returncode == 0, complaints
    assert_same_bits(undisturbed, killed)


def test_terminated_launcher_ends_all_processes_with_one_line(
    tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "r.zarr"
    command = ["--model", str(tiny_folder), "--text", LONG, "--generate", "60", "--k", "8"]
    launcher = started(2, "elm_lanczos", "run", *command, "--quiet", "--out", str(out))
    while not (out / "prompts/000000/zarr.json").exists() and launcher.poll() is None:
        time.sleep(0.02)
    ranks = [rank_process(launcher, rank) for rank in range(2)]
    launcher.send_signal(signal.SIGTERM)
    _, complaints = launcher.communicate(timeout=60)
    assert launcher.returncode != 0 and not any(rank.is_running() for rank in ranks)
    (line,) = lines_of(complaints)
    assert line.startswith("error: terminated") and "--resume" in line
    assert [path.name for path in tmp_path.iterdir()] == ["r.zarr"]  # no locks are left


def test_failure_of_one_process_is_one_line(
    tiny_folder: Path, prompt_file: Path, tmp_path: Path
) -> None:
    command = ["--model", str(tiny_folder), "--seq-file", str(prompt_file), "--generate", "30"]
    out = str(tmp_path / "r.zarr")
    failing = ["tests.distributed_runs", "fail", "1", "run"]
    launcher = started(2, *failing, *command, "--out", out, "--json")
    _, complaints = launcher.communicate(timeout=100)
    assert launcher.returncode != 0
    assert lines_of(complaints) == ["error: process 1: no space left"], complaints


def test_mistake_is_told_by_the_first_process_alone(tiny_folder: Path, tmp_path: Path) -> None:
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun
    command = ["run", "--model", tiny_folder, "--text", LONG, "--k", 33, "--out", tmp_path / "r"]
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(agent.port)}
    address["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    ranks = [
        begun(*command, errors=tmp_path / str(rank), environment={**address, "RANK": str(rank)})
        for rank in range(2)
    ]
    assert sorted(ended(rank, 100) or 0 for rank in ranks) == [1, 2]
    (line,) = lines_of("".join((tmp_path / str(rank)).read_text() for rank in range(2)))
    assert "32 dimensions" in line and not (tmp_path / "r").exists()


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_one_process_says_what_has_gone_wrong(failing: int) -> None:
    store, ends = dist.HashStore(), dict[int, BaseException]()

    def work(rank: int) -> None:
        if rank == failing:
            raise UsageError("no such option")
        time.sleep(0.1 * (rank == 0))

    def part(rank: int) -> None:
        processes = Processes(store, rank, 3)
        try:
            processes.together("prepared", lambda: work(rank))
        except Exception as error:
            time.sleep(0.2 * (rank == failing))  # the others are first
            ends[rank] = processes._end(error)

    threads = [threading.Thread(target=part, args=[rank]) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert "no such option" in str(ends.pop(failing))
    assert len(ends) == 2 and all(isinstance(end, PeerError) for end in ends.values())


def test_failure_of_a_process_that_is_gone_is_told_by_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(elm_lanczos.distributed, "_GRACE", 0.1)
    store = dist.HashStore()
    ends = [Processes(store, rank, 3)._end(PeerError()) for rank in range(2)]
    assert "another process of this run has ended" in str(ends[0])
    assert isinstance(ends[1], PeerError)


def test_a_store_waits_for_every_process_of_its_run(tmp_path: Path) -> None:
    path = tmp_path / "r.zarr"
    ResultStore.create(path, attrs={}, fingerprint={}).close()
    with ResultStore.open(path, "r+") as straggler:
        straggler.join(1)
        with (
            ResultStore.open(path, "r+") as store,
            pytest.raises(StoreError, match="in use by another run"),
        ):
            store.resume({})
    (tmp_path / "r.zarr.lock.2").touch()  # of a process that is gone
    with ResultStore.open(path, "r+") as store:
        store.resume({})
        assert [file.name for file in tmp_path.glob("*.lock*")] == ["r.zarr.lock"]


def test_locks_of_processes_are_not_those_of_other_stores(tmp_path: Path) -> None:
    stores = []
    for name in ("r.zarr.1", "r.zarr.2024.zarr", "r.zarr.lock.2.old", "r.zarr"):
        stores.append(ResultStore.create(tmp_path / name, attrs={}, fingerprint={}))
    with ResultStore.open(tmp_path / "r.zarr", "r+") as second:
        second.join(1)
    for store in stores:
        assert Path(f"{store.path}.lock").exists()
        with pytest.raises(StoreError, match="in use"):
            ResultStore.open(store.path, "r+").resume({})
    for store in stores:
        store.close()
    assert not list(tmp_path.glob("*.lock"))
