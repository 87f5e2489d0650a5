"""The command line as a stranger meets it: every mistake gets one clear line."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from elm_lanczos import cli
from elm_lanczos.store import open_results

TEXT = "the Soviet Union and the"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Runs the command line in this process; returns exit code, output and errors."""

    monkeypatch.setattr(signal, "signal", lambda *_: None)  # nothing must outlive a test

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["elm-lanczos", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A folder of everything that can be wrong with what a user gives."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "binary").write_bytes(b"\x00\x01\x02" * 300)
    (folder / "latin1").write_bytes("café\n".encode("latin1"))
    (folder / "empty").write_text("")
    (folder / "blank").write_text("\n  \n\n")
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "number.jsonl").write_text('{"text": 3}\n')
    (folder / "twice.jsonl").write_text('{"text":"a","id":"x"}\n{"text":"b","id":"x"}\n')
    (folder / "key.yaml").write_text("sed: 3\n")
    (folder / "code.yaml").write_text("seed: !!python/object/apply:os.system ['true']\n")
    (folder / "list.yaml").write_text("- 1\n- 2\n")
    (folder / "value.yaml").write_text("k: many\n")
    (folder / "file").write_text("not a store")
    (folder / "folder").mkdir()
    (folder / "folder" / "something").touch()
    (folder / "no-weights").mkdir()
    shutil.copy(tiny_folder / "config.json", folder / "no-weights")
    for name, change in (
        ("nan", lambda w: w["model.layers.1.mlp.up_proj.weight"].view(-1)[5:6].fill_(torch.nan)),
        ("missing", lambda w: w.pop("model.layers.0.self_attn.v_proj.weight")),
    ):
        shutil.copytree(tiny_folder, folder / name)
        weights = safetensors.torch.load_file(folder / name / "model.safetensors")
        change(weights)
        file = folder / name / "model.safetensors"
        safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    shutil.copytree(tiny_folder, folder / "pickled")
    (folder / "pickled" / "model.safetensors").unlink()
    torch.save({}, folder / "pickled" / "pytorch_model.bin")
    (folder / "bert").mkdir()
    config = {"model_type": "vit", "architectures": ["ViTModel"]}
    (folder / "bert" / "config.json").write_text(json.dumps(config))
    return folder


MISTAKES = [
    (["--seq-file", "{files}/nowhere.txt"], 2, "does not exist"),
    (["--seq-file", "{files}/binary"], 2, "binary"),
    (["--seq-file", "{files}/latin1"], 2, "not UTF-8"),
    (["--seq-file", "{files}/empty"], 2, "holds no prompts"),
    (["--seq-file", "{files}/blank"], 2, "holds no prompts"),
    (["--seq-file", "{files}"], 2, "folder"),
    (["--seq-file", "{files}/broken.jsonl"], 2, "line 2 is not JSON"),
    (["--seq-file", "{files}/number.jsonl"], 2, "line 1"),
    (["--seq-file", "{files}/twice.jsonl"], 2, "used twice"),
    ([], 2, "--seq-file FILE or --text TEXT"),
    (["--text", "a", "--seq-file", "{files}/file"], 2, "either"),
    (["--text", "  "], 2, "empty"),
    (["--text", "a", "--k", "0"], 2, "--k 0"),
    (["--text", "a", "--k", "-3"], 2, "--k -3"),
    (["--text", "a", "--k", "many"], 2, "--k"),
    (["--text", "a", "--k", "33"], 2, "32 dimensions"),
    (["--text", "a", "--dtype", "float99"], 2, "bfloat16"),
    (["--text", "a", "--compute-dtype", "float16"], 2, "float32"),
    (["--text", "a", "--method", "lancsoz"], 2, "lanczos"),
    (["--text", "a", "--tol", "0"], 2, "--tol"),
    (["--text", "a", "--tol", "nan"], 2, "--tol"),
    (["--text", "a", "--tol", "2"], 2, "tol"),
    (["--text", "a", "--generate", "-1"], 2, "--generate"),
    (["--text", "a", "--batch", "0"], 2, "--batch"),
    (["--text", "a", "--seed", "-1"], 2, "--seed"),
    (["--text", "a", "--tokens", "first"], 2, "--tokens first"),
    (["--text", "a", "--tokens", "99"], 2, "only"),
    (["--text", "a", "--tokens", "last:0"], 2, "none"),
    (["--text", "a", "--device", "cuda:77"], 2, "device 'cuda:77'"),
    (["--text", "a", "--device", "abacus"], 2, "device 'abacus'"),
    (["--text", "a", "--resume"], 2, "--out"),
    (["--text", "a", "--resume", "--overwrite", "--out", "x"], 2, "choose one"),
    (["--text", "a", "--unknown-option"], 2, "--unknown-option"),
    (["--config", "{files}/nowhere.yaml"], 2, "does not exist"),
    (["--config", "{files}/key.yaml"], 2, "'seed'"),
    (["--config", "{files}/code.yaml"], 2, "not plain YAML"),
    (["--config", "{files}/list.yaml"], 2, "key: value"),
    (["--config", "{files}/value.yaml", "--text", "a"], 2, "--k 'many'"),
    (["--text", "a", "--model", "{files}/no-weights"], 1, "no-weights"),
    (["--text", "a", "--model", "{files}/nowhere"], 1, "not found"),
    (["--text", "a", "--model", "{files}/nan"], 1, "model.layers.1.mlp.up_proj.weight"),
    (["--text", "a", "--model", "{files}/missing"], 1, "model.layers.0.self_attn.v_proj.weight"),
    (["--text", "a", "--model", "{files}/pickled"], 1, "safetensors"),
    (["--text", "a", "--model", "{files}/bert"], 1, "cannot be loaded"),
    (["--text", "a", "--out", "{files}/file"], 1, "is a file"),
    (["--text", "a", "--out", "{files}/folder"], 1, "not a result store"),
    (["--text", "a", "--out", "{files}/folder", "--overwrite"], 1, "not a result store"),
    (["--text", "a", "--out", "/proc/nowhere/x"], 1, "/proc/nowhere/x"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "says"), MISTAKES, ids=[" ".join(a) for a, _, _ in MISTAKES]
)
def test_mistakes_get_one_clear_line(
    command, files: Path, tiny_folder: Path, arguments: list[str], code: int, says: str
) -> None:
    arguments = [argument.format(files=files) for argument in arguments]
    if "--model" not in arguments:
        arguments += ["--model", str(tiny_folder)]
    before = sorted(files.rglob("*"))
    got, out, err = command("run", *arguments)
    assert (got, out) == (code, "")
    assert len(err.splitlines()) == 1 and err.startswith("error: ")
    assert says in err and "Traceback" not in err
    assert sorted(files.rglob("*")) == before  # nothing written, nothing lost


@pytest.mark.parametrize("path", ["{files}/nowhere", "{files}/file", "{files}/folder"])
def test_show_refuses_what_is_no_store(command, files: Path, path: str) -> None:
    code, out, err = command("show", path.format(files=files))
    assert (code, out, len(err.splitlines())) == (1, "", 1)


def test_run_and_show_print_the_same_tables(
    command, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    store = tmp_path / "r.zarr"
    given = ["--model", tiny_folder, "--text", TEXT, "--k", 3, "--out", store]
    code, out, err = command("run", *given)
    assert (code, err) == (0, "")
    for expected in ("␣Soviet", "reads", "writes", "exact (float32)", "reconstruction", str(store)):
        assert expected in out
    assert max(len(line) for line in out.splitlines() if str(store) not in line) <= 100
    code, shown, _ = command("show", store)
    assert code == 0 and shown.splitlines()[:-1] == out.splitlines()[: len(shown.splitlines()) - 1]
    code, _, err = command("show", store, "--prompt", 2)
    assert code == 2 and "prompts 1 to 1" in err


def test_json_lines_hold_what_the_store_holds(command, tiny_folder: Path, tmp_path: Path) -> None:
    store, prompts = tmp_path / "r.zarr", tmp_path / "p.jsonl"
    prompts.write_text('{"id": "a/b", "text": "peace \\u001b[31m"}\n\n{"text": "and freedom"}\n')
    given = ["--model", tiny_folder, "--seq-file", prompts, "--k", 3, "--out", store, "--json"]
    code, out, err = command("run", *given)
    assert (code, err) == (0, "")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["id"] for line in lines] == ["a/b", "1"]
    assert command("show", store, "--json")[1] == out
    for line, result in zip(lines, open_results(store), strict=True):
        assert len(line["tokens"]) == len(result.tokens)
        values = [token["singular_values"] for token in line["tokens"]]
        assert values == result.S.tolist()
        assert all(len(token["reads"]) == 3 for token in line["tokens"])
    assert "\x1b" not in command("show", store)[1]  # prompts cannot steer the terminal


def test_quiet_prints_nothing_and_standard_input_is_read(
    command, tiny_folder: Path, tmp_path: Path
) -> None:
    program = [sys.executable, "-m", "elm_lanczos", "run", "--quiet", "--seq-file", "-"]
    program += ["--model", str(tiny_folder), "--k", "2", "--out", str(tmp_path / "r.zarr")]
    done = subprocess.run(program, input=b"one prompt\nand another\n", capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert [p.text for p in open_results(tmp_path / "r.zarr")] == ["one prompt", "and another"]


def test_what_did_not_converge_is_said_and_has_its_own_exit_code(
    command, tiny_folder: Path, tmp_path: Path
) -> None:
    given = ["--model", tiny_folder, "--text", TEXT, "--method", "lanczos", "--tol", "1e-15"]
    code, _, _ = command("run", *given, "--out", tmp_path / "r.zarr")
    statuses = {int(s) for s in open_results(tmp_path / "r.zarr").prompts[0].status}
    assert (code == 3) == (3 in statuses) and (code == 0) == (statuses == {2})


def test_config_file_gives_options_and_the_command_line_wins(
    command, tiny_folder: Path, tmp_path: Path
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"model: {tiny_folder}\nk: 5\ntop: 2\ntext: from the file\n")
    code, _, _ = command("run", "--config", config, "--k", 2, "--out", tmp_path / "r.zarr")
    result = open_results(tmp_path / "r.zarr").prompts[0]
    assert (code, result.text, result.S.shape[1], result.u_token.shape[2]) == (
        0, "from the file", 2, 2,
    )  # fmt: skip


def test_default_store_is_new_each_time(
    command, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert command("run", "--model", tiny_folder, "--text", "a", "--k", 1)[0] == 0
    assert len(list((tmp_path / "runs").glob("*.zarr"))) == 2


def test_help_answers_without_loading_torch() -> None:
    check = "import sys, elm_lanczos.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
    for arguments in (["--help"], ["run", "--help"], ["show", "--help"], ["--version"], []):
        program = [sys.executable, "-X", "importtime", "-m", "elm_lanczos", *arguments]
        done = subprocess.run(program, capture_output=True, text=True)
        assert done.returncode == 0
        assert " torch" not in done.stderr


def test_resume_of_a_store_that_is_not_there_starts_it(
    command, tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "r.zarr"
    given = ["run", "--model", tiny_folder, "--text", "a", "--k", 1, "--out", out, "--resume"]
    assert command(*given)[0] == 0
    begun = time.monotonic()
    assert command(*given)[0] == 0
    assert time.monotonic() - begun < 60 and len(open_results(out)) == 1


# ----------------------------------------------------------------------------------- check


def test_check_of_the_bundled_model(command) -> None:
    code, out, err = command("check")
    assert code == 0 and err == ""
    assert out.startswith("speeches-llama  exact")
    for figure in ("fidelity", "reconstruction", "leak", "adjoint", "affinity", "bypass"):
        assert figure in out
    assert "bit for bit as it was" in out and "chain of 9 segments" in out


def test_check_prints_json(command, tiny_folder: Path) -> None:
    code, out, _ = command("check", tiny_folder, "--json", "--text", TEXT, "--gate", "up")
    report = json.loads(out)
    assert code == 0 and report["verdict"] == "exact" and report["reconstruction"] <= 1e-5


def test_check_of_an_architecture_without_weights(command, files: Path) -> None:
    for source in ("qwen3", files / "no-weights", files / "no-weights" / "config.json"):
        code, out, _ = command("check", source, "--random", "--json")
        report = json.loads(out)
        assert code == 0 and report["verdict"] == "exact", report
        assert report["dtype"] == "float64" and report["reconstruction"] <= 1e-12


def test_check_that_refuses_ends_with_one_and_names_the_module(command) -> None:
    code, out, _ = command("check", "cpmant", "--random")
    assert code == 1 and "refused" in out and "CpmAntForCausalLM" in out
    code, out, _ = command("check", "t5", "--random")
    assert code == 1 and "not built" in out


def test_check_that_finds_a_wrong_figure_ends_with_three(
    command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from elm_lanczos import check

    bounds = {torch.float64: check.BOUNDS[torch.float64] | {"mixture": 0.0}}
    monkeypatch.setattr(check, "BOUNDS", bounds)
    code, out, _ = command("check", "llama", "--random")
    assert code == 3 and "WRONG" in out and "mixture beyond the bound; first at" in out


def test_check_of_all(command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from elm_lanczos import architectures

    names = ["cpmant", "llama", "musicgen"]
    monkeypatch.setattr(architectures, "causal_architectures", lambda: names)
    out_file = tmp_path / "families.md"
    code, out, err = command("check", "--all", "--jobs", "2", "--out", out_file)
    assert code == 0 and str(out_file) in out
    assert "cpmant  refused" in err and "musicgen  not built" in err and "llama" not in err
    table = out_file.read_text()
    assert table.startswith("1 exact (50.0 % of the 2 built), 1 refused, 1 not built, 0 WRONG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("check", "lama", "--random"), "did you mean 'llama'?"),
        (("check", "--random"), "--random needs a model type"),
        (("check", "--all", "llama"), "--all checks every architecture"),
        (("check", "--out", "x.md"), "--out goes with --all"),
        (("check", "llama", "--random", "--text", "a"), "--text goes with a model's weights"),
        (("check", "--gate", "down"), "--gate"),
        (("check", "no/such/model"), "was not found"),
        (("check", "llama", "--random", "--dtype", "bfloat16"), "--dtype goes with a model's"),
        (("check", "llama", "--random", "--jobs", "2"), "--jobs goes with --all"),
        (("check", "--all", "--out", "no/such/folder/x.md"), "No such file or directory"),
        (("check", "--all", "--revision", "x"), "--revision goes with a model's weights"),
        (("check", "llama", "--random", "--seed", str(2**64)), "--seed"),
        (("check", "llama", "--random", "--device", "cuda:77"), "cannot be used"),
        (("check", "--compute-dtype", "int8"), "--compute-dtype"),
    ],
)
def test_mistaken_check_gets_one_line(command, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = command(*arguments)
    assert code in (1, 2) and message in err and err.count("\n") == 1 and out == ""


def test_number_of_a_process_alone_silences_nothing(
    command, monkeypatch: pytest.MonkeyPatch, files: Path
) -> None:
    monkeypatch.setenv("RANK", "1")
    code, out, err = command("run", "--config", files / "key.yaml")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command("run", "--config", files / "key.yaml") == (2, "", "")  # the first one says it


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "-1", "RANK": "1"}, "WORLD_SIZE is '-1'"),
        ({"WORLD_SIZE": "2", "RANK": "one"}, "RANK is 'one'"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_PORT is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1"}, "MASTER_ADDR is not set"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_PORT": "1", "MASTER_ADDR": "localhost"},
            "RANK is 2 of WORLD_SIZE 2",
        ),
    ],
)
def test_launcher_that_says_too_little_gets_one_line(
    command, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], says: str
) -> None:
    for name in ("WORLD_SIZE", "RANK", "MASTER_PORT", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    code, out, err = command("run", "--text", TEXT)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert says in err and "torchrun" in err
