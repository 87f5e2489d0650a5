"""`elm-lanczos verify`: whatever is wrong with a store is named; a right one is left as it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import zarr

from elm_lanczos.config import RunConfig
from elm_lanczos.errors import ModelError, StoreError
from elm_lanczos.model import DetachedModel
from elm_lanczos.store import PromptGroup, Status, open_results
from elm_lanczos.store.layout import LAYOUT
from elm_lanczos.stored_layers import LayerOptions, add_layers
from elm_lanczos.verify import Verification, verify
from tests.test_cli import command  # noqa: F401
from tests.test_faults import flip
from tests.test_run import Listener, options, run

PROMPT = "prompts/000001"


@pytest.fixture(scope="module")
def model_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def whole(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two prompts and three predictions."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "prompts.txt").write_text("the Soviet Union and the\npeace and security of the\n")
    given = {"seq_file": str(folder / "prompts.txt"), "k": 3, "generate": 2, "tokens": "::2"}
    run(options(model_folder, folder / "run.zarr", **given), Listener())
    return folder / "run.zarr"


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run.zarr"))


def snapshot(path: Path) -> dict[str, tuple[int, bytes]]:
    files = [file for file in path.rglob("*") if file.is_file()]
    return {str(file): (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def read(path: Path) -> Verification:
    """Verify without the model; nothing may be written."""
    before = snapshot(path)
    found = verify(path, load=None)
    assert snapshot(path) == before
    assert all("\n" not in str(fault) for fault in found.faults)
    return found


def change(path: Path, array: str, edit: Callable[[np.ndarray], None]) -> None:
    """Rewrite an array with values of which the checksums know nothing."""
    opened = zarr.open_array(path / PROMPT / array, mode="r+")
    values = np.asarray(opened[...])
    edit(values)
    opened[...] = values


def put(place: object, value: object) -> Callable[[np.ndarray], None]:
    def edit(values: np.ndarray) -> None:
        values[place] = value  # type: ignore[index]

    return edit


def test_right_store_is_all_well_with_and_without_the_model(store: Path) -> None:
    before = snapshot(store)
    found = verify(store, sample=2)
    assert found.faults == () and found.complete
    assert (found.predictions, found.pending, found.not_converged) == (4, 0, 0)
    assert found.done > found.recomputed > 0
    assert verify(store, sample=1).recomputed == 4
    assert verify(store, sample=1000).recomputed == found.done
    assert read(store).recomputed == 0
    assert snapshot(store) == before


@pytest.mark.parametrize("method", ["lanczos", "dense"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_other_methods_and_dtypes_are_all_well(
    tiny_folder: Path, tmp_path: Path, method: str, dtype: str
) -> None:
    given = {"method": method, "compute_dtype": dtype, "text": "peace and freedom"}
    run(options(tiny_folder, tmp_path / "r.zarr", **given), Listener())
    found = verify(tmp_path / "r.zarr")
    assert found.faults == () and found.recomputed > 0


@pytest.mark.parametrize("spec", LAYOUT, ids=lambda spec: spec.name)
def test_every_damaged_or_lost_file_is_named(whole: Path, tmp_path: Path, spec) -> None:
    for number, hurt in enumerate((flip, Path.unlink)):
        path = Path(shutil.copytree(whole, tmp_path / str(number)))
        (file,) = (path / PROMPT / spec.name).glob("c.*")
        hurt(file)
        found = read(path)
        places = [(f.group, f.array, f.file) for f in found.faults]
        assert places == [(PROMPT, spec.name, file)], found.faults
        assert str(file) in str(found.faults[0])


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def garbage(file: Path) -> None:
    file.write_bytes(bytes(range(256)) * 4)


def nested(file: Path) -> None:
    file.write_text("[" * 100_000)


def folder_instead(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("hurt", [truncate, garbage, nested, folder_instead, Path.unlink])
@pytest.mark.parametrize("place", ["U/zarr.json", "zarr.json", "U/c.0.0.0", "token_str/zarr.json"])
def test_broken_files_are_problems_and_no_tracebacks(store: Path, hurt, place: str) -> None:
    hurt(store / "prompts/000000" / place)
    found = read(store)
    assert found.faults and any("prompts/000000" in str(fault) for fault in found.faults)


def test_file_where_a_folder_should_be(store: Path) -> None:
    shutil.rmtree(store / PROMPT / "V")
    (store / PROMPT / "V").write_text("no folder")
    assert [f.array for f in read(store).faults] == ["V"]
    shutil.rmtree(store / PROMPT)
    (store / PROMPT).write_text("no folder")
    (fault,) = read(store).faults
    assert fault.group == PROMPT and "cannot read" in fault.reason


@pytest.mark.parametrize("name", ["prompts/000000", PROMPT])
def test_run_on_damaged_metadata_stops_with_one_line(store: Path, name: str) -> None:
    garbage(store / name / "zarr.json")
    config = RunConfig.model_validate(open_results(store).attrs["config"])
    with pytest.raises(StoreError, match=f"{name}/zarr.json is damaged") as stopped:
        run(config.model_copy(update={"out": str(store)}), Listener(), resume=True)
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize("name", ["prompts/000000", PROMPT])
def test_lost_prompt_is_noticed(store: Path, name: str) -> None:
    shutil.rmtree(store / name)
    found = read(store)
    assert any("is missing" in f.reason or "not what the prompts" in f.reason for f in found.faults)


@pytest.mark.parametrize(
    ("array", "key", "value", "says"),
    [
        ("S", "data_type", "float64", "data_type"),
        ("S", "shape", [6, 4], "shape"),
        ("U", "shape", [10**15, 3, 32], "shape"),
        ("V", "shape", [6, 3, 10**9], "shape"),
        ("done", "data_type", "uint8", "data_type"),
        ("S", "dimension_names", ["token", "rank"], "dimension_names"),
        ("S", "fill_value", 0.0, "fill_value"),
    ],
)
def test_metadata_of_another_form_are_named(
    store: Path, array: str, key: str, value: object, says: str
) -> None:
    file = store / PROMPT / array / "zarr.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    (fault,) = read(store).faults
    assert fault.array == array and fault.file == file


@pytest.mark.parametrize(
    ("array", "edit", "says"),
    [
        ("done", put(0, False), "not done though"),
        ("status", put(0, Status.PENDING), "pending"),
        ("status", put(0, 17), "known states"),
        ("status", put(1, Status.CONVERGED), "holds NaN"),
        ("U", put((2, 0), np.nan), "NaN"),
        ("U", put((2, 0), 1.0), "not orthonormal"),
        ("V", put((2, 1), 0.0), "not orthonormal"),
        ("U", put((1, 0), 1.0), "not requested"),
        ("S", put((0, 0), 0.0), "descending"),
        ("S", put((0, 2), -1.0), "negative"),
        ("error_bound", put((0, 2), np.inf), "not finite"),
        ("residual", put((0, 2), 1e3), "above the tolerance"),
        ("u_token", put((0, 0, 0), 4096), "no token"),
        ("v_token", put((0, 0, 0), -7), "no token"),
        ("token_id", put(0, -5), "no token"),
        ("output", put(0, np.nan), "NaN"),
        ("n_iter", put(0, -1), "nothing"),
        ("residual", put(slice(None, None, 2), 0.0), "certificate's residual"),
        ("attribution", put(0, 7.0), "not what the prompts hold"),
    ],
)
def test_numbers_that_disagree_are_named(store: Path, array: str, edit, says: str) -> None:
    change(store, array, edit)
    found = read(store)
    assert any(says in fault.reason for fault in found.faults), found.faults
    first = found.faults[0]
    assert first.group in (PROMPT, "summary")


@pytest.mark.parametrize(
    ("change_", "says"),
    [
        ({"id": 3}, "attribute id"),
        ({"position": -1}, "attribute position"),
        ({"position": 99}, "beyond the prompt"),
        ({"plan": None}, "attribute plan"),
        ({"plan": {"svd": {"k": 3}}}, "attribute plan.svd"),
        ({"certificate": [1]}, "attribute certificate"),
        ({"certificate": None}, "no certificate"),
        ({"finished": "yes"}, "attribute finished"),
    ],
)
def test_attributes_that_cannot_be_are_named(
    store: Path, change_: dict[str, object], says: str
) -> None:
    zarr.open_group(store, path=PROMPT, mode="r+").update_attributes(change_)
    assert any(says in fault.reason for fault in read(store).faults)


def test_forged_verdict_of_a_certificate_is_noticed(store: Path) -> None:
    group = zarr.open_group(store, path=PROMPT, mode="r+")
    group.update_attributes({"certificate": {**group.attrs["certificate"], "leak": 1.0}})
    assert any("verdict" in fault.reason for fault in read(store).faults)


def test_run_that_has_not_ended_is_right_but_not_complete(store: Path) -> None:
    shutil.rmtree(store / "summary")
    found = verify(store)
    assert found.faults == () and not found.complete
    group = zarr.open_group(store, path=PROMPT, mode="r+")
    group.update_attributes({"finished": False})
    change(store, "done", put(slice(None, None, 2), False))
    (store / PROMPT / "U/c.0.0.0").unlink()
    found = verify(store)
    assert found.faults == () and not found.complete and found.pending > 0


def test_prompts_of_an_interrupted_run_are_there_in_any_order(store: Path) -> None:
    shutil.copytree(store / PROMPT, store / "prompts/99999999999")
    faults = read(store).faults  # in a moment, and without a list of all that is not there
    assert [f.group for f in faults] == ["prompts/000002"]
    assert faults[0].reason == "is missing, like all up to 99999999998"
    shutil.rmtree(store / "prompts/99999999999")
    shutil.rmtree(store / "prompts/000000")
    assert [str(f) for f in read(store).faults] == ["prompts/000000: is missing"]
    shutil.rmtree(store / "summary")
    found = verify(store, sample=1)
    assert found.faults == () and not found.complete and found.recomputed > 0


@pytest.mark.parametrize("some", [True, False])
def test_rows_given_up_with_nan_are_no_fault(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, some: bool
) -> None:
    def give_up(group: PromptGroup, owner: int, rows: dict[str, np.ndarray]) -> None:
        place = slice(None, None, 2 if some else 1)
        for name in ("U", "S", "V", "residual", "error_bound"):
            rows[name][place] = np.nan
        rows["status"][place] = Status.NOT_CONVERGED
        write(group, owner, rows)

    write = PromptGroup.write_rows
    monkeypatch.setattr(PromptGroup, "write_rows", give_up)
    path = tmp_path / "run.zarr"
    run(options(model_folder, path, text="peace and freedom", k=2), Listener())
    found = verify(path)
    assert found.faults == () and found.complete and found.not_converged > 0
    assert (found.recomputed > 0) == some
    group = zarr.open_group(path, path="prompts/000000", mode="r+")
    group.update_attributes({"certificate": {**group.attrs["certificate"], "failures": []}})
    assert any("verdict" in fault.reason for fault in verify(path, load=None).faults)


@pytest.mark.parametrize("positions", ["0,2", "first:1"])
def test_prompts_whose_end_was_not_asked_for_are_compared_too(
    model_folder: Path, tmp_path: Path, positions: str
) -> None:
    path = tmp_path / "run.zarr"
    given = {"text": "the Soviet Union and the", "positions": positions, "k": 1}
    run(options(model_folder, path, **given), Listener())
    (result,) = open_results(path)
    assert result.prompt == given["text"] != result.text
    assert verify(path).faults == ()
    group = zarr.open_group(path, path=result.name, mode="r+")
    group.update_attributes({"prompt": "the Soviet Union and its"})
    assert ["fingerprint: prompts" in f.reason for f in verify(path).faults] == [True]


def test_rows_that_another_computation_gave_do_not_fit_the_model(store: Path) -> None:
    def rotate(values: np.ndarray) -> None:
        values[2, [0, 1]] = values[2, [1, 0]]

    change(store, "V", rotate)
    assert read(store).faults == ()  # orthonormal still
    (fault,) = verify(store, sample=100).faults
    assert (fault.group, fault.array, fault.tokens) == (PROMPT, "residual", range(2, 3))
    assert "by the model" in fault.reason


def test_changed_model_is_named(store: Path, model_folder: Path) -> None:
    file = model_folder / "model.safetensors"
    content = file.read_bytes()
    weights = safetensors.torch.load_file(file)
    weights["model.norm.weight"][0] += 1
    try:
        safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
        found = verify(store)
        config = RunConfig.model_validate(open_results(store).attrs["config"])
        with pytest.raises(StoreError, match="cannot be continued: weights was"):
            run(config.model_copy(update={"out": str(store)}), Listener(), resume=True)
        file.unlink()
        gone = verify(store)
    finally:
        file.write_bytes(content)
    assert [f.reason.split()[:2] for f in found.faults] == [["fingerprint:", "weights"]]
    assert found.recomputed == gone.recomputed == 0
    assert ["the model of this run cannot be used" in f.reason for f in gone.faults] == [True]


def test_store_never_makes_code_of_a_model_run(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = zarr.open_group(store, mode="r+")
    trusting = {"trust_remote_code": True, "allow_pickle": True}
    root.update_attributes({"config": {**root.attrs["config"], **trusting}})
    asked: list[RunConfig] = []

    def load(config: RunConfig) -> DetachedModel:
        asked.append(config)
        raise ModelError("no model")

    monkeypatch.setattr("elm_lanczos.stored_layers.load_model", load)
    assert len(verify(store, load=load).faults) == 1
    with pytest.raises(ModelError, match="no model"):
        next(add_layers(str(store), LayerOptions()))
    assert [(c.trust_remote_code, c.allow_pickle) for c in asked] == [(False, False)] * 2


@pytest.mark.parametrize("fingerprint", [None, "abc", {"model": "tiny"}])
def test_layers_of_a_store_without_a_fingerprint_are_refused(
    store: Path, fingerprint: object
) -> None:
    zarr.open_group(store, mode="r+").update_attributes({"fingerprint": fingerprint})
    with pytest.raises(StoreError, match="no fingerprint to go by"):
        next(add_layers(str(store), LayerOptions()))


def test_changed_prompt_text_is_named(store: Path) -> None:
    zarr.open_group(store, path=PROMPT, mode="r+").update_attributes({"text": "another"})
    assert ["fingerprint: prompts" in f.reason for f in verify(store).faults] == [True]


def test_command_says_so_in_words_json_and_exit_codes(command, store: Path) -> None:  # noqa: F811
    code, out, err = command("verify", store)
    assert (code, err) == (0, "") and "all is well: 4 predictions" in out
    flip(store / PROMPT / "U/c.0.0.0")
    flip(store / PROMPT / "S/c.0.0")
    code, out, err = command("verify", store, "--no-model")
    assert (code, err) == (1, "")
    assert len(out.splitlines()) == 3 and "2 problems" in out.splitlines()[-1]
    assert f"{PROMPT}, U, tokens 0 to" in out
    code, out, _ = command("verify", store, "--json", "--sample", 1)
    record = json.loads(out)
    assert code == 1 and record["complete"] and len(record["problems"]) == 2
    assert record["problems"][0]["file"].endswith("c.0.0.0")
    assert record["recomputed"] == 3  # the damaged prediction is not


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["{store}/nowhere"], 1),
        (["{store}/prompts"], 1),
        (["{store}/zarr.json"], 1),
        (["{store}", "--sample", "0"], 2),
        (["{store}", "--sample", "2", "--no-model"], 2),
        ([], 2),
    ],
)
def test_mistakes_get_one_line(command, whole: Path, arguments: list[str], code: int) -> None:  # noqa: F811
    got, out, err = command("verify", *(a.format(store=whole) for a in arguments))
    assert (got, out, len(err.splitlines())) == (code, "", 1)
