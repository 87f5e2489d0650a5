"""The store's layout, its crash protocol, its refusals, and reading it back."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import xarray
import zarr

from elm_lanczos.errors import StoreError
from elm_lanczos.status import Status
from elm_lanczos.store import PromptGroup, ResultStore, open_results
from elm_lanczos.store.attributes import first_difference, to_json
from elm_lanczos.store.layout import ROW_ARRAYS, owner_ranges
from tests.store_cases import (
    ATTRS,
    FINGERPRINT,
    HEADERS,
    REQUESTED,
    make_header,
    make_rows,
    run,
    start_or_resume,
    write_outputs,
)

ROOT = Path(__file__).parents[1]
KILLS = 14  # with those of whole runs, more than twenty

# The layout of design/store.md, written down a second time: name: (dimensions, dtype, sharded).
LAYOUT = {
    "U": (("token", "component", "out_feature"), "real", True),
    "V": (("token", "component", "in_feature"), "real", True),
    "S": (("token", "component"), "real", False),
    "residual": (("token", "component"), "real", False),
    "error_bound": (("token", "component"), "real", False),
    "stable_rank": (("token",), "real", False),
    "stable_rank_error": (("token",), "real", False),
    "contribution_norm": (("token",), "real", False),
    "n_iter": (("token",), "int32", False),
    "status": (("token",), "uint8", False),
    "u_token": (("token", "component", "rank_order"), "int32", False),
    "v_token": (("token", "component", "rank_order"), "int32", False),
    "u_score": (("token", "component", "rank_order"), "real", False),
    "v_score": (("token", "component", "rank_order"), "real", False),
    "token_id": (("token",), "int32", False),
    "token_str": (("token",), "string", False),
    "output": (("out_feature",), "real", False),
    "constant": (("out_feature",), "real", False),
    "attribution": (("token",), "real", False),
    "done": (("token",), "bool", False),
}
FILLS = {
    "float32": "NaN",
    "float64": "NaN",
    "int32": -1,
    "uint8": 0,
    "bool": False,
    "string": "",
}


def create(path: Path, **options: object) -> ResultStore:
    return ResultStore.create(path, attrs=ATTRS, fingerprint=FINGERPRINT, **options)  # type: ignore[arg-type]


def files_of(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()
    }


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.store_cases", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def check_done_rows(path: str | Path) -> int:
    """Compare every row marked done with what was to be written; returns their number."""
    count = 0
    for result, header in zip(open_results(path), HEADERS, strict=False):
        group = PromptGroup(result._place, result.name)
        for owner, tokens in enumerate(owner_ranges(len(header.token_ids))):
            rows, selected = make_rows(group, owner), slice(tokens.start, tokens.stop)
            done = result.done[selected] & (rows["status"] != Status.NOT_REQUESTED)
            for spec in ROW_ARRAYS:
                stored = getattr(result, spec.name)[selected][done]
                wanted = rows[spec.name].astype(stored.dtype)[done]
                assert stored.tobytes() == wanted.tobytes(), (result.name, spec.name, owner)
            count += int(done.sum())
    return count


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "run.zarr"
    run(path)
    return path


# ---------------------------------------------------------------- layout


@pytest.mark.parametrize("index", range(len(HEADERS)))
def test_layout_is_the_documented_one(finished: Path, index: int) -> None:
    header, group = HEADERS[index], finished / f"prompts/{index:06d}"
    sizes = {"token": len(header.token_ids), "component": 3, "rank_order": 2}
    sizes |= {"out_feature": 7, "in_feature": 5}
    owner_tokens = sizes["token"] if sizes["token"] <= 128 else 64
    assert {folder.name for folder in group.iterdir() if folder.is_dir()} == set(LAYOUT)
    for name, (dims, kind, sharded) in LAYOUT.items():
        metadata = json.loads((group / name / "zarr.json").read_text())
        dtype = header.dtype if kind == "real" else kind
        shape = [sizes[dim] for dim in dims]
        owned = name not in ("token_id", "token_str", "output", "constant", "attribution")
        chunk = [owner_tokens, *shape[1:]] if owned else shape
        assert metadata["zarr_format"] == 3
        assert tuple(metadata["dimension_names"]) == dims
        assert metadata["shape"] == shape
        assert metadata["data_type"] == dtype
        assert metadata["fill_value"] == FILLS[dtype]
        assert metadata["chunk_grid"]["configuration"]["chunk_shape"] == chunk
        codecs = metadata["codecs"]
        if sharded:
            assert [codec["name"] for codec in codecs] == ["sharding_indexed"]
            assert codecs[0]["configuration"]["chunk_shape"] == [1, *shape[1:]]
            index_codecs = codecs[0]["configuration"]["index_codecs"]
            assert [codec["name"] for codec in index_codecs] == ["bytes", "crc32c"]
            codecs = codecs[0]["configuration"]["codecs"]
        assert [codec["name"] for codec in codecs[1:]] == ["blosc", "crc32c"]
        assert codecs[1]["configuration"]["cname"] == "lz4"
        assert codecs[1]["configuration"]["shuffle"] == "bitshuffle"


def test_no_dimension_is_called_rank() -> None:
    assert all("rank" not in dims for dims, _, _ in LAYOUT.values())


def test_status_flags_follow_the_cf_convention(finished: Path) -> None:
    attrs = open_results(finished)[0].to_xarray()["status"].attrs
    meanings = "pending converged converged_to_rounding not_converged not_requested"
    assert attrs["flag_values"] == [0, 1, 2, 3, 4]
    assert attrs["flag_meanings"] == meanings


def test_root_is_not_consolidated(finished: Path) -> None:
    metadata = json.loads((finished / "zarr.json").read_text())
    assert metadata.get("consolidated_metadata") is None


def test_root_attributes(finished: Path) -> None:
    attrs = open_results(finished).attrs
    assert attrs["title"] == "a toy run"
    assert attrs["schema_version"] == 1
    assert attrs["fingerprint"] == FINGERPRINT
    versions = attrs["package_versions"]
    assert isinstance(versions, dict)
    assert versions["zarr"] == zarr.__version__


def test_long_prompt_is_cut_into_owners_of_64_tokens() -> None:
    assert owner_ranges(128) == [range(128)]
    assert owner_ranges(129) == [range(64), range(64, 128), range(128, 129)]
    assert len(owner_ranges(100_000)) == 1563  # the figure of design/store.md


def test_owners_share_no_file(tmp_path: Path) -> None:
    with create(tmp_path / "run.zarr") as store:
        group = store.create_prompt(make_header(200), 0)
        before = files_of(group.path)
        group.write_rows(1, make_rows(group, 1))
        group.commit(1)
        written = files_of(group.path).keys() - before.keys()
    assert {Path(name).name for name in written} == {"c.1.0.0", "c.1.0", "c.1"}
    assert {Path(name).parent.name for name in written} == {
        *(spec.name for spec in ROW_ARRAYS),
        "done",
    }


# ---------------------------------------------------------------- reading


def test_open_results_gives_everything_back(finished: Path) -> None:
    results = open_results(finished)
    assert len(results) == len(results.prompts) == len(HEADERS)
    assert check_done_rows(finished) == REQUESTED
    for result, header in zip(results, HEADERS, strict=True):
        assert (result.id, result.text) == (header.id, header.text)
        assert result.tokens == list(header.token_strings)
        assert result.token_ids.tolist() == list(header.token_ids)
        assert result.U.dtype == result.S.dtype == result.output.dtype == header.dtype
        assert result.position == len(header.token_ids) - 1
        assert result.plan == {"method": "lanczos", "seed": 0}
        assert result.certificate == {"reconstruction": 1e-7}
        rng = np.random.default_rng(len(result.tokens))
        for values in (result.output, result.constant, result.attribution):
            np.testing.assert_array_equal(
                values, rng.standard_normal(values.shape).astype(header.dtype)
            )


def test_unrequested_rows_are_fills_and_done(finished: Path) -> None:
    result = open_results(finished)[2]
    skipped = result.status == Status.NOT_REQUESTED
    assert skipped.sum() == 140 - (22 + 10)
    assert result.done.all()
    assert np.isnan(result.U[skipped]).all()
    assert (result.u_token[skipped] == -1).all()


def test_repr_names_path_prompts_and_states(finished: Path) -> None:
    text = repr(open_results(finished))
    assert "run.zarr: 3 prompts, complete" in text
    assert "'a prompt of 140 tokens': 140 tokens" in text
    assert "108 not requested" in text


def test_xarray_opens_a_group_with_labels_and_without_warnings(finished: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = xarray.open_zarr(finished, group="prompts/000001", consolidated=False)
        tree = xarray.open_datatree(finished, engine="zarr", consolidated=False)
        result = open_results(finished)[1]
        dataset = result.to_xarray()
        values = dataset["U"].isel(token=70).values
    assert opened.identical(dataset)
    assert opened["U"].dims == ("token", "component", "out_feature")
    assert dict(opened.sizes) == {
        "token": 150,
        "component": 3,
        "out_feature": 7,
        "in_feature": 5,
        "rank_order": 2,
    }
    assert {"token_str", "token_id"} <= set(opened.coords)
    assert "prompts/000002" in [group.strip("/") for group in tree.groups]
    np.testing.assert_array_equal(values, result.U[70])


def test_summary_is_flat_over_all_tokens(finished: Path) -> None:
    results = open_results(finished)
    summary = results.summary
    assert summary.sizes["row"] == 6 + 150 + 140
    assert set(summary.variables) == {
        *("prompt", "position", "token", "token_id", "token_str"),
        *("S", "residual", "status", "stable_rank", "attribution"),
    }
    for index, result in enumerate(results):
        rows = summary.isel(row=summary["prompt"].values == index)
        np.testing.assert_array_equal(rows["token"], np.arange(len(result.tokens)))
        np.testing.assert_array_equal(rows["S"], result.S)
        np.testing.assert_array_equal(rows["attribution"], result.attribution)
        assert rows["token_str"].values.tolist() == result.tokens


def test_summary_rewritten_has_the_same_bits(tmp_path: Path, finished: Path) -> None:
    path = tmp_path / "run.zarr"
    shutil.copytree(finished, path)
    with ResultStore.open(path, "r+") as store:
        store.resume(FINGERPRINT)
        store.write_summary()
    assert files_of(path) == files_of(finished)


def test_summary_is_refused_before_the_run_has_ended(tmp_path: Path) -> None:
    with create(tmp_path / "run.zarr") as store:
        store.create_prompt(make_header(6), 0)
    results = open_results(tmp_path / "run.zarr")
    assert not results.complete
    with pytest.raises(StoreError, match="no summary yet"):
        _ = results.summary


def test_output_positions_are_sibling_groups_of_the_same_form(tmp_path: Path) -> None:
    with create(tmp_path / "run.zarr") as store:
        group = store.create_prompt(make_header(6), 0)
        further = group.create_position(make_header(7))
        further.write_rows(0, make_rows(further, 0))
        further.commit(0)
        store.write_summary()
        assert list(group.positions) == [6]
    results = open_results(tmp_path / "run.zarr")
    assert results[0].positions[6].path.name == "position_0006"
    assert len(results[0].positions[6].tokens) == 7
    assert results.summary["position"].values.tolist() == [5] * 6 + [6] * 7
    form = {file.parent.name for file in further.path.glob("*/zarr.json")}
    assert form == set(LAYOUT)


# ---------------------------------------------------------------- crash and resume


def test_killed_at_random_moments_the_run_ends_with_the_same_bits(
    tmp_path: Path, finished: Path
) -> None:
    path, rng = tmp_path / "run.zarr", random.Random(0)
    kills, seen = 0, [0]
    while kills < KILLS:
        process = start("run", str(path))
        assert process.stdout is not None
        # A step takes some 0.1 s: the signal falls before, inside or after one of the first three.
        for _ in range(rng.randrange(1, 4)):
            process.stdout.readline()
        time.sleep(rng.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        if (path / "zarr.json").exists():
            seen.append(check_done_rows(path))
            assert seen[-1] >= seen[-2]  # no committed row is lost
        if process.returncode == 0:  # it ended before the signal: begin a new one
            assert files_of(path) == files_of(finished)
            shutil.rmtree(path)
            seen.append(0)
    assert any(0 < count < REQUESTED for count in seen)
    run(path)
    assert check_done_rows(path) == REQUESTED
    assert files_of(path) == files_of(finished)


def test_two_workers_and_a_coordinator_lose_nothing(tmp_path: Path, finished: Path) -> None:
    path = tmp_path / "run.zarr"
    with start_or_resume(path) as store:
        for number, header in reversed(list(enumerate(HEADERS))):  # in any order
            store.create_prompt(header, number)
        workers = [start("work", str(path), str(index), "2") for index in range(2)]
        for worker in workers:
            _, complaints = worker.communicate(timeout=60)
            assert worker.returncode == 0, complaints
        assert all(group.pending() == [] for group in store.prompts)
        for group in store.prompts:
            write_outputs(group)
        store.write_summary()
    assert files_of(path) == files_of(finished)


def test_rows_do_not_count_before_the_commit(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    with create(path) as store:
        group = store.create_prompt(make_header(150), 0)
        group.write_rows(0, make_rows(group, 0))
        group.write_rows(2, make_rows(group, 2))
        group.commit(2)
    with ResultStore.open(path, "r+") as store:
        store.resume(FINGERPRINT)
        (group,) = store.prompts
        assert group.pending() == [0, 1]
        assert not group.complete


def test_group_whose_creation_was_interrupted_is_created_again(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    with create(path) as store:
        store.create_prompt(make_header(6), 0)
        group = store.create_prompt(make_header(9), 1)
        metadata = json.loads((group.path / "zarr.json").read_text())
        (group.path / "zarr.json").write_text(json.dumps({**metadata, "attributes": {}}))
        assert len(store) == len(open_results(path)) == 1
        assert store.create_prompt(make_header(8), 1).path == group.path
        assert open_results(path)[1].U.shape == (8, 3, 7)


def test_prompts_are_created_in_any_order_and_some_may_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    with create(path) as store:
        for number in (3, 0):
            store.create_prompt(make_header(6 + number), number)
        for number in (1, 2):  # one whose creation was interrupted, one never begun
            assert store.prompt(number) is None
            (path / f"prompts/00000{number}").mkdir()
        assert [group.tokens for group in store.prompts] == [6, 9]
        later = store.prompt(3)
        assert later is not None and (later.name, later.position) == ("prompts/000003", 8)
        with pytest.raises(StoreError, match="exists already"):
            store.create_prompt(make_header(6), 3)
    assert [result.position for result in open_results(path)] == [5, 8]


def test_data_is_synced_before_the_rename_and_before_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def record_sync(descriptor: int) -> None:
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        events.append(("sync folder" if folder else "sync file", ""))
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        events.append(("rename", str(Path(target).relative_to(tmp_path))))
        replace(source, target)

    with create(tmp_path / "run.zarr") as store:
        group = store.create_prompt(make_header(6), 0)
        monkeypatch.setattr(os, "fsync", record_sync)
        monkeypatch.setattr(Path, "replace", record_replace)
        group.write_rows(0, make_rows(group, 0))
        group.commit(0)
    kinds = [kind for kind, _ in events]
    assert kinds == ["sync file", "rename", "sync folder"] * (len(ROW_ARRAYS) + 1)
    assert events[-2] == ("rename", "run.zarr/prompts/000000/done/c.0")


def test_full_disk_is_one_line_that_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.zarr"

    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with create(path) as store:
        group = store.create_prompt(make_header(150), 0)
        group.write_rows(0, make_rows(group, 0))
        group.commit(0)
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", refuse)
            with pytest.raises(StoreError, match=r"no space left .* --resume$") as caught:
                group.write_rows(1, make_rows(group, 1))
            assert "\n" not in str(caught.value)
        assert group.pending() == [1, 2]
        assert not list(path.rglob("*.partial"))
        group.write_rows(1, make_rows(group, 1))
        group.commit(1)
    assert open_results(path)[0].done.sum() == 128


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("name", ["U", "V", "S", "status", "u_token", "token_str", "done"])
def test_flipped_bit_is_detected_and_its_file_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run.zarr"
    with create(path) as store:
        group = store.create_prompt(make_header(150), 0)
        for owner in group.pending():
            group.write_rows(owner, make_rows(group, owner))
            group.commit(owner)
    file = sorted((group.path / name).glob("c.*"))[-1]
    content = file.read_bytes()
    rng = random.Random(name)
    for _ in range(8):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(StoreError, match="is damaged") as caught:
            open_results(path)[0]._read(name)
        assert str(file) in str(caught.value)


def test_damaged_metadata_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    create(path).close()
    (path / "zarr.json").write_text('{"attributes": ')
    with pytest.raises(StoreError, match=r"zarr\.json is damaged"):
        open_results(path)


# ---------------------------------------------------------------- refusals


def test_existing_store_is_refused_naming_both_options(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    create(path).close()
    with pytest.raises(StoreError, match=r"--resume.*--overwrite"):
        create(path)


def test_overwrite_replaces_a_store(tmp_path: Path, finished: Path) -> None:
    path = tmp_path / "run.zarr"
    shutil.copytree(finished, path)
    with create(path, overwrite=True) as store:
        assert len(store) == 0
    assert sorted(files_of(path)) == ["prompts/zarr.json", "zarr.json"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_folder_is_never_touched(tmp_path: Path, overwrite: bool) -> None:
    path = tmp_path / "notes"
    path.mkdir()
    (path / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(StoreError, match="not a result store"):
        create(path, overwrite=overwrite)
    zarr.create_group(tmp_path / "other.zarr", attributes={"schema_version": 1})
    with pytest.raises(StoreError, match="not a result store"):
        create(tmp_path / "other.zarr", overwrite=overwrite)
    assert (path / "thesis.txt").read_text() == "irreplaceable"
    assert (tmp_path / "other.zarr" / "zarr.json").exists()
    assert not list(tmp_path.glob("*.lock"))


def test_store_is_created_in_an_empty_folder_and_below_missing_ones(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    create(tmp_path / "empty").close()
    create(tmp_path / "a/b/run.zarr").close()
    assert len(open_results(tmp_path / "a/b/run.zarr")) == 0


def test_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file/run.zarr"):
        with pytest.raises(StoreError) as caught:
            create(path, overwrite=True)
        assert "\n" not in str(caught.value)
    with pytest.raises(StoreError, match="is a file"):
        open_results(tmp_path / "file")


def test_unwritable_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:  # by hand: root may write everywhere
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StoreError, match=r"cannot write .*run\.zarr: Permission denied"):
        create(tmp_path / "run.zarr")


def test_what_is_not_a_store_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        open_results(tmp_path / "nothing")
    with pytest.raises(StoreError, match="is not a result store"):
        open_results(tmp_path)


def test_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    with create(path) as store:
        store.set_attrs({"schema_version": 2})
    for opened in (open_results, lambda path: ResultStore.open(path, "r+")):
        with pytest.raises(StoreError, match="schema version 2, newer than the 1"):
            opened(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float64"}, r"dtype was 'float32' and is 'float64' now"),
        ({"model": {"id": "toy", "revision": "abc"}}, r"model\.revision was None and is 'abc'"),
        ({"k": 4}, r"k was 3 and is 4"),
        ({"new": 1}, r"new was None and is 1"),
    ],
)
def test_resume_with_another_fingerprint_names_the_field(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "run.zarr"
    create(path).close()
    store = ResultStore.open(path, "r+")
    with pytest.raises(StoreError, match=message):
        store.resume({**FINGERPRINT, **change})
    store.resume(FINGERPRINT)  # the refusal has given the lock back
    store.close()


def test_two_runs_on_one_store_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    with create(path):
        with pytest.raises(StoreError, match="in use by another run"):
            ResultStore.open(path, "r+").resume(FINGERPRINT)
        with pytest.raises(StoreError, match="in use by another run"):
            create(path, overwrite=True)
    with ResultStore.open(path, "r+") as store:
        store.resume(FINGERPRINT)
    assert not list(tmp_path.glob("*.lock"))


def test_link_to_a_store_has_the_same_lock(tmp_path: Path) -> None:
    (tmp_path / "link.zarr").symlink_to("run.zarr")
    with create(tmp_path / "run.zarr"), pytest.raises(StoreError, match="in use"):
        ResultStore.open(tmp_path / "link.zarr", "r+").resume(FINGERPRINT)


@pytest.mark.parametrize(
    "change",
    [
        {"k": 6},
        {"k": 0},
        {"top": 0},
        {"dtype": "bfloat16"},
        {"requested": [6]},
        {"position": 6},
        {"token_strings": ["one"]},
    ],
)
def test_header_that_does_not_fit_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        make_header(6, **change)


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with create(tmp_path / "run.zarr") as store:
        group = store.create_prompt(make_header(6, requested=[1, 2]), 0)
        rows = make_rows(group, 0)
        with pytest.raises(ValueError, match="n_iter"):
            group.write_rows(0, {name: a for name, a in rows.items() if name != "n_iter"})
        with pytest.raises(ValueError, match="S has shape"):
            group.write_rows(0, {**rows, "S": rows["S"][:, :2]})
        with pytest.raises(ValueError, match="disagrees"):
            group.write_rows(0, {**rows, "status": np.full(6, Status.CONVERGED, np.uint8)})
        with pytest.raises(ValueError, match="pending"):
            group.write_rows(0, group.empty_rows(0))
        assert group.pending() == [0]


# ---------------------------------------------------------------- attributes


def test_attributes_are_strict_json(tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Certificate:
        leak: float
        bounds: tuple[float, ...]

    values = {
        "certificate": Certificate(math.nan, (1.0, math.inf, -math.inf)),
        "array": np.array([1.5, np.nan]),
        "scalar": np.float32(0.5),
        "status": Status.CONVERGED,
        "path": Path("a/b"),
        "set": {2, 1},
    }
    with create(tmp_path / "run.zarr") as store:
        store.set_attrs(values)
        group = store.create_prompt(make_header(6, attrs=values, plan={"tol": math.nan}), 0)
        expected = {
            "certificate": {"leak": None, "bounds": [1.0, "Infinity", "-Infinity"]},
            "array": [1.5, None],
            "scalar": 0.5,
            "status": 1,
            "path": "a/b",
            "set": [1, 2],
        }
        assert store.attrs.items() >= expected.items()
        assert group.attrs.items() >= expected.items()
        assert group.plan == {"tol": None}

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for file in tmp_path.rglob("zarr.json"):
        json.loads(file.read_text(), parse_constant=refuse)


def test_attribute_of_an_unknown_type_is_refused() -> None:
    with pytest.raises(TypeError, match="object"):
        to_json({"x": object()})


def test_first_difference_is_found_at_any_depth() -> None:
    assert first_difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}) == ("a[1].b", 2, 3)
    assert first_difference({"a": 1}, {"a": True}) == ("a", 1, True)
    assert first_difference({"a": [1]}, {"a": [1, 2]}) == ("a", [1], [1, 2])
    assert first_difference({"a": None}, {"a": None}) is None
