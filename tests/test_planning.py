"""`elm-lanczos plan`: what a run would cost, and every mistake in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from elm_lanczos import planning
from elm_lanczos.config import PlanConfig, RunConfig
from elm_lanczos.errors import UnsupportedModelError, UsageError
from elm_lanczos.memory import size
from elm_lanczos.model import DetachedModel
from elm_lanczos.planning import Forecast, SystemCost, plan_run
from elm_lanczos.run import load_model, run
from elm_lanczos.svd.cost import Cost, Rates
from tests.test_cli import command, files  # noqa: F401  # fixtures
from tests.test_run import Listener

METHODS = {"lanczos", "stream", "dense"}


def checked(report: dict[str, Any]) -> dict[str, Any]:
    """A forecast whose totals add up."""
    systems, total = report["systems"], report["total"]
    chosen = [system["costs"][system["method"]] for system in systems]
    assert total["passes"] == sum(cost["passes"] for cost in chosen)
    assert total["bytes"] == max(
        cost["bytes"] + sum(system["chain"].values())
        for cost, system in zip(chosen, systems, strict=True)
    )
    if total["seconds"] is not None:
        assert total["seconds"] == pytest.approx(sum(cost["seconds"] for cost in chosen))
        dense = sum(system["costs"]["dense"]["seconds"] for system in systems)
        all_dense = {system["method"] for system in systems} == {"dense"}
        assert (report["hint"] is not None) == (not all_dense and total["seconds"] >= 2 * dense)
    else:
        assert report["hint"] is None
    for system in systems:
        assert set(system["costs"]) == set(system["arrays"]) == METHODS
        assert all(held > 0 for held in system["chain"].values()) and system["chain"]
        assert 1 <= system["tokens"] <= system["length"] * len(system["prompts"])
        for name, cost in system["costs"].items():
            assert cost["method"] == name and cost["passes"] > 0 and cost["bytes"] > 0
            assert cost["seconds"] is None or cost["seconds"] > 0
            assert sum(system["arrays"][name].values()) == cost["bytes"]
    return report


@pytest.fixture
def planned(command: Any) -> Any:  # noqa: F811
    """Runs `plan … --json` and checks what every answer must have."""

    def plan(*arguments: object) -> dict[str, Any]:
        code, out, err = command("plan", *arguments, "--json")
        assert (code, err) == (0, "")
        assert len(out.splitlines()) == 1
        return checked(json.loads(out))

    return plan


def test_text_lengths_and_files(planned: Any, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(
        '{"id": "a", "text": "peace"}\n{"text": "the Soviet Union"}\n'
    )
    given = [tiny_folder, "--k", 3, "--memory", "8GiB"]
    by_text = planned(*given, "--text", "the Soviet Union")
    assert [s["prompt"] for s in by_text["systems"]] == ["0"]
    by_file = planned(*given, "--seq-file", tmp_path / "p.jsonl")
    assert [s["prompt"] for s in by_file["systems"]] == ["a", "1"]
    length = by_text["systems"][0]["length"]
    assert by_file["systems"][1]["length"] == length
    by_length = planned(*given, "--length", f"{length},7")
    assert [s["length"] for s in by_length["systems"]] == [length, 7]
    passes = [r["systems"][i]["costs"] for r, i in ((by_text, 0), (by_file, 1), (by_length, 0))]
    for costs in passes:
        assert {n: (c["passes"], c["bytes"]) for n, c in costs.items()} == {
            n: (c["passes"], c["bytes"]) for n, c in passes[0].items()
        }
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert by_text["weight_bytes"] == 4 * sum(p.numel() for p in model.parameters())


def test_generated_tokens_and_chosen_tokens(planned: Any, tiny_folder: Path) -> None:
    report = planned(tiny_folder, "--length", 5, "--generate", 3, "--tokens", "last:2", "--k", 2)
    assert [s["length"] for s in report["systems"]] == [5, 6, 7]
    assert [s["tokens"] for s in report["systems"]] == [2, 2, 2]
    # Two tokens cost the same passes in each.
    assert len({s["costs"][s["method"]]["passes"] for s in report["systems"]}) == 1


@pytest.mark.parametrize("method", [*sorted(METHODS), "auto"])
def test_methods(planned: Any, tiny_folder: Path, tmp_path: Path, method: str) -> None:
    report = planned(tiny_folder, "--length", 5, "--method", method, "--k", 2)
    (system,) = report["systems"]
    assert system["method"] == method or method == "auto"
    assert system["reason"].startswith(system["method"])
    if method == "dense":
        assert report["hint"] is None
        filed = planned(
            tiny_folder, "--length", 5, "--method", method, "--k", 2, "--scratch", tmp_path
        )
        in_memory, in_file = (r["systems"][0]["arrays"]["dense"] for r in (report, filed))
        assert in_file == {**in_memory, "Jacobians": 0} != in_memory


def test_plan_and_run_follow_the_same_plan(planned: Any, tiny_folder: Path, tmp_path: Path) -> None:
    text, given = "the Soviet Union and the", {"k": 3, "generate": 2, "memory": "1GiB"}
    options = [x for name, value in given.items() for x in (f"--{name}", value)]
    report = planned(tiny_folder, "--text", text, *options)
    listener, predicted = Listener(), []
    listener.planned = lambda plan, passes: predicted.append((plan.method, passes))  # type: ignore[method-assign]
    out = str(tmp_path / "r.zarr")
    run(RunConfig(model=str(tiny_folder), text=text, out=out, **given), listener)  # type: ignore[arg-type]
    said = [(s["method"], s["costs"][s["method"]]["passes"]) for s in report["systems"]]
    assert said == predicted


class Systems(Listener):
    """Keeps what a run tells of each linear system: its name, its method and its passes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.plans: list[tuple[str, int]] = []
        self.passes_made: list[int] = []

    def started(self, number: int, total: int, text: str) -> None:
        self.names.append(text)

    def planned(self, plan: Any, passes: int) -> None:
        self.plans.append((plan.method, passes))
        self.passes_made.append(0)

    def passes(self, made: int) -> None:
        self.passes_made[-1] = made


@pytest.mark.parametrize("method", ["auto", "stream", "dense"])
def test_prompts_that_a_run_solves_together_are_one_system(
    planned: Any, tiny_folder: Path, tmp_path: Path, method: str
) -> None:
    texts = [f"we seek {word} and freedom" for word in ("peace", "war", "law")]
    prompts = tmp_path / "p.txt"
    prompts.write_text("\n".join([texts[0], "the Soviet Union", *texts[1:]]))
    given: dict[str, Any] = {"k": 3, "method": method, "memory": "1GiB"}
    options = [x for name, value in given.items() for x in (f"--{name}", value)]
    report, made = planned(tiny_folder, "--seq-file", prompts, *options), Systems()
    given |= {"seq_file": str(prompts), "out": str(tmp_path / "r.zarr")}
    run(RunConfig(model=str(tiny_folder), **given), made)
    systems = report["systems"]
    assert [s["prompts"] for s in systems] == [["0", "2", "3"], ["1"]]
    assert systems[0]["prompt"] == made.names[0] and made.names[0].startswith("3 prompts of ")
    assert [(s["method"], s["costs"][s["method"]]["passes"]) for s in systems] == made.plans
    predicted, passes = report["total"]["passes"], sum(made.passes_made)
    # only of dense it is known beforehand; of a stream it depends on the spectra
    tolerance = 0.0 if method == "dense" else 0.4
    assert passes == pytest.approx(predicted, rel=tolerance)


def test_prompts_that_do_not_fit_together_are_priced_alone(planned: Any, tiny_folder: Path) -> None:
    given = [tiny_folder, "--k", 2, "--length", "5,7,5"]
    together = planned(*given)["systems"]
    assert [(s["length"], s["tokens"]) for s in together] == [(5, 10), (7, 7)]
    alone = planned(*given, "--memory", "1KiB")["systems"]
    assert [(s["length"], s["tokens"]) for s in alone] == [(5, 5), (5, 5), (7, 7)]


def test_prompts_that_cannot_go_together_are_priced_alone(
    planned: Any, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = DetachedModel.linearize_together

    def refuse(self: DetachedModel, prompts: Any, *given: Any, **others: Any) -> list[Any]:
        if len(prompts) > 1:
            raise UnsupportedModelError("a layer takes one prompt")
        return original(self, prompts, *given, **others)

    monkeypatch.setattr(DetachedModel, "linearize_together", refuse)
    alone = planned(tiny_folder, "--k", 2, "--length", "5,7,5")["systems"]
    assert [(s["length"], s["tokens"]) for s in alone] == [(5, 5), (5, 5), (7, 7)]


def test_rates_of_other_sizes_lie_between_those_that_were_timed(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = iter([Rates(1.0, 2.0), Rates(10.0, 20.0)])
    monkeypatch.setattr(planning, "time_block", lambda _: next(rates))
    config = PlanConfig(model=str(tiny_folder), length="4", k=2)
    source = planning._Weights(config, load_model(config), [(2, 5), (1, 20)])
    for prompts, length, row in ((1, 5, 1.0), (3, 5, 5.5), (1, 20, 10.0), (1, 50, 10.0)):
        found = source.at(prompts, length).rates
        assert found == Rates(row, 2 * row)


def test_a_table_for_people(command: Any, tiny_folder: Path, monkeypatch: Any) -> None:  # noqa: F811
    monkeypatch.setenv("COLUMNS", "100")
    lengths = ",".join(map(str, range(2, 18)))
    for given in ("6", lengths):
        code, out, err = command("plan", tiny_folder, "--length", given, "--k", 2)
        assert (code, err) == (0, "")
        assert max(map(len, out.splitlines())) <= 100
        assert all(name in out for name in METHODS) and "▸" in out
        assert all(f"\n {name} " in out for name in ("gates and scales", "block of vectors", "all"))
    assert "… 4 more" in out and "all" in out  # 16 prompts, of which 12 are shown


def test_a_configuration_alone(planned: Any, tmp_path: Path) -> None:
    small = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    config = transformers.LlamaConfig(num_hidden_layers=5, **small)
    config.save_pretrained(tmp_path)
    reports = []
    for source, dtype in ((tmp_path, "auto"), (tmp_path / "config.json", "float32")):
        given = ["--random", "--length", "8,100", "--k", 2, "--dtype", dtype]
        reports.append(planned(source, *given))
        assert [s["length"] for s in reports[-1]["systems"]] == [8, 100]
        assert reports[-1]["total"]["seconds"] > 0 and "of 5 layers" in reports[-1]["basis"]
    with torch.device("meta"):
        count = sum(p.numel() for p in transformers.LlamaForCausalLM(config).parameters())
    # As checkpoints are: bfloat16, which is raised to be computed in.
    assert [report["weight_bytes"] for report in reports] == [2 * count, 4 * count]
    raised = ["weights raised" in report["systems"][0]["chain"] for report in reports]
    assert raised == [True, False]


@pytest.mark.parametrize("kind", ["gpt2", "mamba"])
def test_layers_are_timed_wherever_the_decoder_keeps_them(
    planned: Any, tmp_path: Path, kind: str
) -> None:
    sizes: dict[str, int] = {"hidden_size": 32, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 2} if kind == "gpt2" else {}
    transformers.AutoConfig.for_model(kind, **sizes).save_pretrained(tmp_path)
    report = planned(tmp_path, "--random", "--length", "8", "--k", 2, "--generate", 2)
    assert [s["length"] for s in report["systems"]] == [8, 9]
    assert report["total"]["seconds"] > 0
    assert report["basis"].startswith("3 of 4 layers with random weights, timed at T = 8 and T = 9")
    assert ("attention probabilities" in report["systems"][0]["chain"]) == (kind == "gpt2")


def test_few_layers_are_timed_once_for_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    from elm_lanczos import planning

    timed: list[int] = []

    def one(_source: Any, T: int, *_: Any) -> Any:
        timed.append(T)
        return planning._Timed(Rates(1.0, 1.0), 2, 2 * T, T, False)

    monkeypatch.setattr(planning, "_timed_layers", one)
    monkeypatch.setattr(planning, "price", lambda plans, _shape, _device, rates: rates)
    config = PlanConfig(model="mamba", length="100000,8,50000,32", k=2, batch=1)
    rates = [system.costs for system in plan_run(config, None).systems]
    assert timed == [8, 32]  # on a CPU, never more
    # Without attention time is proportional to tokens and to the 32 layers of mamba's defaults.
    assert [r.row for r in rates] == pytest.approx([16 * 1e5 / 32, 16, 16 * 5e4 / 32, 16])  # type: ignore[attr-defined]


def test_nothing_grows_with_the_square_of_a_long_length(monkeypatch: pytest.MonkeyPatch) -> None:
    from elm_lanczos import planning

    monkeypatch.setattr(planning, "free_bytes", lambda _: 2**28)  # too little to time a layer
    lengths = (16, 2**16, 2**17)
    given = ",".join(map(str, lengths))
    config = PlanConfig(model="llama", length=given, k=2, tokens="last:1", memory=2**28, batch=1)
    short, long, longer = (system.chain for system in plan_run(config, None).systems)
    assert "attention probabilities" in short and "queries and keys" not in short
    assert "attention probabilities" not in long and "queries and keys" in long
    # 32 layers' inputs and the output of the last, d = 4096, float32
    assert long["residual streams"] == 33 * 4096 * 2**16 * 4
    assert {name: 2 * held for name, held in long.items() if name != "weights raised"} == {
        name: held for name, held in longer.items() if name != "weights raised"
    }


def test_memory_too_small_for_one_operator_is_said_and_refused(
    planned: Any,
    command: Any,  # noqa: F811
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    given = [tiny_folder, "--length", 5, "--k", 2, "--memory", "1KiB"]
    report = planned(*given)
    assert report["refusal"] == report["systems"][0]["refusal"]
    assert "give more with --memory" in report["refusal"]
    _, out, _ = command("plan", *given)
    assert "a run is refused" in out and "more than the 1.0 KiB" in " ".join(out.split())
    options = ["--k", 2, "--memory", "1KiB", "--out", tmp_path / "r.zarr"]
    code, out, err = command("run", "--model", tiny_folder, "--text", "peace", *options)
    assert code == 2 and len(err.splitlines()) == 1
    assert err.startswith("error: ") and "the layers leave 256 bytes" in err


def test_layers_larger_than_the_memory_are_not_built(
    planned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from elm_lanczos import planning

    monkeypatch.setattr(planning, "free_bytes", lambda _: 2**30)
    monkeypatch.setattr(planning, "shared_layer_model", None)
    # A layer of Mixtral 8x7B has 1.4 billion parameters.
    report = planned("mixtral", "--random", "--length", "8", "--k", 2)
    assert report["total"]["seconds"] is None
    assert "one takes about 5.4 GiB, and 1.0 GiB are free" in report["basis"]


def test_mistakes_get_one_clear_line(command: Any, tiny_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "config.json").write_text('{"model_type": "llama", ')
    (tmp_path / "odd").mkdir()
    odd = '{"model_type": "llama", "hidden_size": 30, "num_attention_heads": 7}'
    (tmp_path / "odd" / "config.json").write_text(odd)
    positions = transformers.GPT2Config(
        n_embd=32, n_layer=1, n_head=2, n_positions=16, vocab_size=64
    )
    transformers.GPT2LMHeadModel(positions).save_pretrained(tmp_path / "gpt2")
    tiny = [tiny_folder, "--length", "8"]
    mistakes: list[tuple[list[object], int, str]] = [
        ([tiny_folder], 2, "--seq-file FILE, --text TEXT and --length"),
        ([*tiny, "--text", "a"], 2, "give one of"),
        ([tiny_folder, "--length", "0"], 2, "--length '0'"),
        ([tiny_folder, "--length", "-3"], 2, "--length '-3'"),
        ([tiny_folder, "--length", "8,,9"], 2, "--length '8,,9'"),
        ([tiny_folder, "--length", "many"], 2, "--length 'many'"),
        ([tiny_folder, "--length", ""], 2, "--length ''"),
        ([tiny_folder, "--length", "9" * 30], 2, "--length"),
        ([*tiny, "--k", "33"], 2, "k must be a whole number from 1 to 32"),
        ([*tiny, "--k", "0"], 2, "--k 0"),
        ([*tiny, "--method", "lancsoz"], 2, "lanczos"),
        ([*tiny, "--memory", "much"], 2, "--memory"),
        ([*tiny, "--tokens", "99"], 2, "only 8 tokens"),
        ([*tiny, "--precision", "tf32"], 2, "'tf32' is for float32 on a CUDA device"),
        ([*tiny, "--precision", "bf16"], 2, "--precision"),
        ([*tiny, "--method", "dense", "--scratch", tmp_path / "no"], 2, "scratch must be a folder"),
        ([*tiny, "--scratch", tmp_path], 2, "a scratch file keeps the rows of method 'dense'"),
        ([*tiny, "--method", "stream", "--scratch", tmp_path], 2, "rows of method 'dense'"),
        ([*tiny, "--device", "cuda:77"], 2, "device 'cuda:77'"),
        ([tmp_path / "gpt2", "--length", "17"], 1, "does not run on this input"),
        ([tmp_path / "nowhere", "--length", "8"], 1, "was not found"),
        (["--random", "--length", "8"], 2, "--random needs a model type"),
        (["vit", "--random", "--length", "8"], 1, "no model can be built from vit"),
        ([tmp_path / "odd", "--random", "--text", "a"], 2, "no tokenizer"),
        ([tmp_path / "config.json", "--random", "--length", "8"], 1, "cannot be used"),
        ([tmp_path / "odd", "--random", "--length", "8"], 1, "cannot be used"),
        (["llama", "--random", "--length", "8", "--precision", "tf32"], 2, "'tf32' is for"),
    ]
    for arguments, code, says in mistakes:
        got, out, err = command("plan", *arguments)
        assert (got, out) == (code, ""), (arguments, err)
        assert len(err.splitlines()) == 1 and err.startswith("error: "), (arguments, err)
        assert says in err and "Traceback" not in err, (arguments, err)


# ----------------------------------------------------------------------------------- the hint


def forecast(chosen: str, seconds: tuple[float | None, float | None]) -> Forecast:
    costs = {
        "stream": Cost("stream", 10, seconds[0], 5),
        "dense": Cost("dense", 4, seconds[1], 70),
    }
    systems = tuple(
        SystemCost(name, 9, 9, chosen, "because", None, costs, {}, {"gates": extra}, 2**30, (name,))
        for name, extra in (("a", 1), ("b", 2))
    )
    return Forecast("m", "cpu", "float32", 2, 8, systems, "nothing")


def test_the_forecast_of_several_prompts_adds_up() -> None:
    whole = forecast("stream", (3.0, 1.0))
    assert whole.total() == Cost("as chosen", 20, 6.0, 7)
    assert whole.total("dense") == Cost("dense", 8, 2.0, 72)
    assert whole.hint is not None and size(72) in whole.hint
    assert forecast("stream", (1.9, 1.0)).hint is None
    assert forecast("dense", (3.0, 1.0)).hint is None
    for unknown in ((None, 1.0), (3.0, None)):
        assert forecast("stream", unknown).hint is None
    json.dumps(whole.to_dict(), allow_nan=False)


@pytest.mark.parametrize("method", ["stream", "dense"])
def test_run_says_once_that_dense_would_be_faster(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    from elm_lanczos import solving as module

    asked: list[str] = []

    def hint(chosen: Cost, dense: Cost) -> str:
        asked.append(chosen.method)
        return "dense is faster"

    monkeypatch.setattr(module, "faster_dense", hint)
    monkeypatch.setattr(module, "_WORTH_SECONDS", 0.0)  # of a tiny model no prompt takes long
    (tmp_path / "p.txt").write_text("peace and security\n\nthe Soviet Union\n")
    out, listener = tmp_path / "r.zarr", Listener()
    options = {"seq_file": str(tmp_path / "p.txt"), "k": 2, "method": method, "tokens": "last:2"}
    config = RunConfig(model=str(tiny_folder), out=str(out), **options)  # type: ignore[arg-type]
    run(config, listener)
    said = [] if method == "dense" else ["dense is faster"]
    assert listener.notes == said and asked == [method] * len(said)
    if method == "dense":
        return  # nothing to be said again
    again = Listener()
    run(config, again, resume=True)
    assert again.notes == []


def test_options_reach_the_forecast(tiny_folder: Path) -> None:
    config = PlanConfig(model=str(tiny_folder), length="4", k=2, batch=3, compute_dtype="float64")
    report = plan_run(config, load_model(config))
    assert (report.k, report.dtype, report.device) == (2, "float64", "cpu")
    with pytest.raises(UsageError, match="no tokenizer"):
        plan_run(PlanConfig(model="llama", text="a"), None)
