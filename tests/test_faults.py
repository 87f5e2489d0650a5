"""A resumed run reads what is marked done, and computes again what it cannot read."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from elm_lanczos.config import RunConfig
from elm_lanczos.errors import StoreError
from elm_lanczos.run import run
from elm_lanczos.status import Status
from elm_lanczos.store import PromptGroup, ResultStore, open_results
from elm_lanczos.store.layout import LAYOUT, OUTPUT_ARRAYS, ROW_ARRAYS, TOKEN_ARRAYS
from tests.store_cases import ATTRS, FINGERPRINT, make_header, make_rows
from tests.store_cases import run as write_toy
from tests.test_run import Listener, assert_same_bits, options


def flip(file: Path, seed: int = 0) -> None:
    """Flip one bit of a file."""
    rng, content = random.Random(seed), bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def data_files(path: Path) -> dict[str, bytes]:
    """Every file but the metadata of groups, which hold seconds."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and not (file.name == "zarr.json" and file.parent.name[-1].isdigit())
    }


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("toy") / "run.zarr"
    write_toy(path)
    return path


@pytest.fixture(scope="module")
def config(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished run of two prompts, one of three owners of which the second has nothing to do."""
    folder = tmp_path_factory.mktemp("undisturbed")
    text = " ".join(["peace and freedom for all the world"] * 22)
    (folder / "prompts.txt").write_text(f"the Soviet Union and the\n{text}\n")
    given = {"seq_file": str(folder / "prompts.txt"), "k": 2, "method": "stream"}
    given |= {"tokens": "::140", "generate": 2}
    config = options(tiny_folder, folder / "run.zarr", **given)
    run(config, Listener())
    return config


@pytest.mark.parametrize("spec", LAYOUT, ids=lambda spec: spec.name)
def test_files_that_cannot_be_trusted_are_forgotten(tmp_path: Path, toy: Path, spec) -> None:
    for number, hurt in enumerate((flip, Path.unlink)):
        path = tmp_path / f"{number}.zarr"
        shutil.copytree(toy, path)
        folder = path / "prompts/000001" / spec.name
        file = sorted(folder.glob("c.*"))[-1]
        hurt(file)
        with ResultStore.open(path, "r+") as store:
            store.resume(FINGERPRINT)
            group = store.prompts[1]
            faults = group.forget_damaged()
            lost_mark = spec.name == "done" and hurt is not flip  # the row is only not done
            assert [fault.file for fault in faults] == ([] if lost_mark else [file])
            assert not file.exists()
            assert group.pending() == ([2] if spec in ROW_ARRAYS or spec.name == "done" else [])
            if not lost_mark:
                assert str(file) in str(faults[0]) and "prompts/000001" in str(faults[0])
                assert group.attrs["finished"] is False and not group.complete


def test_undamaged_groups_are_left_alone(tmp_path: Path, toy: Path) -> None:
    path = tmp_path / "run.zarr"
    shutil.copytree(toy, path)
    before = {f: f.stat().st_mtime_ns for f in path.rglob("*")}
    with ResultStore.open(path, "r+") as store:
        store.resume(FINGERPRINT)
        assert [group.forget_damaged() for group in store.prompts] == [[], [], []]
    assert {f: f.stat().st_mtime_ns for f in path.rglob("*")} == before


def test_damaged_metadata_stop_a_resumed_run(tmp_path: Path, toy: Path) -> None:
    path = tmp_path / "run.zarr"
    shutil.copytree(toy, path)
    file = path / "prompts/000001/V/zarr.json"
    file.write_text(file.read_text().replace('"float32"', '"float64"'))
    with ResultStore.open(path, "r+") as store:
        store.resume(FINGERPRINT)
        with pytest.raises(StoreError, match="data_type is 'float64', not 'float32'") as caught:
            store.prompts[1].forget_damaged()
    assert str(file) in str(caught.value)


DAMAGE = {
    "rows": ["U/c.2.0.0", "status/c.0", "u_token/c.1.0.0"],
    "marks": ["done/c.0", "done/c.1"],
    "prompt": [f"{spec.name}/c.0" for spec in (*TOKEN_ARRAYS, *OUTPUT_ARRAYS)],
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("hurt", [flip, Path.unlink], ids=["flipped", "lost"])
def test_resumed_run_mends_a_damaged_store(
    config: RunConfig, tmp_path: Path, kind: str, hurt
) -> None:
    whole, path = Path(str(config.out)), tmp_path / "run.zarr"
    shutil.copytree(whole, path)
    folder = path / "prompts/000001"
    files = [folder / name for name in DAMAGE[kind] if (folder / name).exists()]
    assert len(files) >= 2
    files += [next((folder).glob("position_*")) / "S/c.0.0", path / "summary/S/c.0.0"]
    for file in files:
        hurt(file)
    listener = Listener()
    run(config.model_copy(update={"out": str(path)}), listener, resume=True)
    named = [file for file in files if any(str(file) in note for note in listener.notes)]
    assert named == files[:-1]  # the summary is rewritten at the end of every run
    assert_same_bits(whole, path)
    assert data_files(path) == data_files(whole)
    assert all(p.attrs["finished"] for p in open_results(path))


def test_run_killed_while_it_forgets_is_mended_by_the_next(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, path = Path(str(config.out)), tmp_path / "run.zarr"
    shutil.copytree(whole, path)
    for name in ("status/c.0", "token_str/c.0", "V/c.2.0.0", "output/c.0"):
        flip(path / "prompts/000001" / name)
    given = config.model_copy(update={"out": str(path)})
    with monkeypatch.context() as patched:
        patched.setattr(PromptGroup, "restore", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(given, Listener(), resume=True)
    run(given, Listener(), resume=True)
    assert data_files(path) == data_files(whole)


def test_rows_given_up_with_nan_are_no_damage(tmp_path: Path) -> None:
    with ResultStore.create(tmp_path / "r.zarr", attrs=ATTRS, fingerprint={}) as store:
        group = store.create_prompt(make_header(6), 0)
        rows = make_rows(group, 0)
        for name in ("U", "S", "V", "residual", "error_bound"):
            rows[name][:] = np.nan
        rows["status"][:] = Status.NOT_CONVERGED
        group.write_rows(0, rows)
        group.commit(0)
        assert group.forget_damaged() == [] and group.pending() == []
