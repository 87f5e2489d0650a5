"""Disks that are full or cannot be written, two runs at once, clocks that go backwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from elm_lanczos.store import ResultStore, open_results
from tests.store_cases import ATTRS, FINGERPRINT
from tests.test_run import Listener, assert_same_bits, options, run

PROMPTS = ["the Soviet Union and the", "peace and security of the", "my fellow citizens"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 384 KiB, full before the run has ended."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=384k", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def command(model: Path, prompts: Path, out: Path, k: int = 4) -> list[str]:
    program = [sys.executable, "-m", "elm_lanczos", "run", "--quiet", "--model", str(model)]
    return [*program, "--k", str(k), "--top", "3", "--seq-file", str(prompts), "--out", str(out)]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    return file


def test_full_disk_ends_with_one_line_and_the_run_goes_on_later(
    tiny_folder: Path, tmp_path: Path, prompts: Path, small_disk: Path
) -> None:
    out = small_disk / "r.zarr"
    line = command(tiny_folder, prompts, out)
    done = subprocess.run(line, capture_output=True, text=True)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1), done.stderr
    assert "no space left" in done.stderr and "--resume" in done.stderr
    assert len(open_results(out)) < len(PROMPTS) or not open_results(out).complete
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    subprocess.run([*line, "--resume"], check=True)
    given = options(tiny_folder, tmp_path / "whole.zarr", seq_file=str(prompts))
    run(given, Listener())
    assert_same_bits(tmp_path / "whole.zarr", out)


def test_write_that_the_system_refuses_ends_with_one_line(
    tiny_folder: Path, tmp_path: Path, prompts: Path
) -> None:
    out = tmp_path / "r.zarr"
    line = command(tiny_folder, prompts, out, k=16)
    # files of at most 8 KiB: all metadata fit, the 12 KiB of U do not
    limited = ["bash", "-c", 'ulimit -f 8; trap "" XFSZ; exec "$@"', "bash", *line]
    done = subprocess.run(limited, capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert "cannot write" in done.stderr and str(out) in done.stderr
    assert (out / "prompts/000000/U/zarr.json").exists()
    assert not list(out.rglob("*.partial"))
    subprocess.run([*line, "--resume"], check=True)
    assert open_results(out).complete


def test_read_only_target_is_one_line(tiny_folder: Path, prompts: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    line = command(tiny_folder, prompts, small_disk / "r.zarr")
    done = subprocess.run(line, capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert "Read-only file system" in done.stderr and "r.zarr" in done.stderr


HOLD = """
import sys, time
from elm_lanczos.store import ResultStore
from tests.store_cases import ATTRS, FINGERPRINT
store = ResultStore.create(sys.argv[1], attrs=ATTRS, fingerprint=FINGERPRINT)
print("held", flush=True)
time.sleep(600)
"""


def test_second_process_is_refused_and_a_dead_ones_lock_is_no_obstacle(
    tiny_folder: Path, tmp_path: Path, prompts: Path
) -> None:
    out = tmp_path / "r.zarr"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        line = [*command(tiny_folder, prompts, out), "--overwrite"]
        done = subprocess.run(line, capture_output=True, text=True)
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
        assert "in use by another run" in done.stderr
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert out.with_name("r.zarr.lock").exists()
    with ResultStore.open(out, "r+") as store:
        store.resume(FINGERPRINT)
    assert not out.with_name("r.zarr.lock").exists()
    with ResultStore.create(out, attrs=ATTRS, fingerprint={}, overwrite=True):
        pass


def test_clock_that_goes_backwards_changes_nothing(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(options(tiny_folder, tmp_path / "a.zarr", text=PROMPTS[0]), Listener())
    asked, now = [], [1e9]

    def backwards() -> float:
        asked.append(1)
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", backwards)
    time.time()
    assert asked  # the clock is really set back
    given = options(tiny_folder, tmp_path / "b.zarr", text=PROMPTS[0])
    run(given, Listener())
    run(given, Listener(), resume=True)
    result = open_results(tmp_path / "b.zarr")[0]
    assert result.attrs["seconds"] >= 0
    assert_same_bits(tmp_path / "a.zarr", tmp_path / "b.zarr")
