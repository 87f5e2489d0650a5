"""`elm-lanczos check`."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elm_lanczos.cli.app import EXIT_ERROR, EXIT_NOT_CERTAIN, app, silence_libraries
from elm_lanczos.cli.options import (
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    GateOption,
    PickleOption,
    PrecisionOption,
    RevisionOption,
    TrustOption,
    given,
)
from elm_lanczos.errors import UsageError

if TYPE_CHECKING:
    from elm_lanczos.check import FamilyReport
    from elm_lanczos.config import ModelConfig

_SENTENCE = "We hold these truths to be self-evident, that all men are created equal"
"""What a model with a tokenizer is checked on if nothing else is given."""


@app.command(
    epilog="Examples:  elm-lanczos check meta-llama/Llama-3.2-1B  ·  "
    "elm-lanczos check path/to/70B/config.json --random  ·  elm-lanczos check deepseek_v3 --random"
    "  ·  elm-lanczos check --all --jobs 4 --out families.md"
)
def check(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            help="Hugging Face id or folder (default: bundled model); with --random also a "
            "config.json or a model type such as qwen3."
        ),
    ] = None,
    random: Annotated[
        bool,
        typer.Option("--random", help="Check a tiny random instance; no weights are needed."),
    ] = False,
    all_: Annotated[
        bool, typer.Option("--all", help="Check every causal architecture of transformers so.")
    ] = False,
    text: Annotated[str | None, typer.Option(help="Prompt to check the model on.")] = None,
    revision: RevisionOption = None,
    dtype: DtypeOption = None,
    compute_dtype: Annotated[
        str | None,
        typer.Option(help="float32 or float64 (default: float64 for random instances)."),
    ] = None,
    gate: GateOption = None,
    precision: PrecisionOption = None,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Seed of every random vector.")
    ] = 0,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="With --all: how many at once (default: 1)")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="With --all: write the table here, as Markdown.")
    ] = None,
    trust_remote_code: TrustOption = None,
    allow_pickle: PickleOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object per model.")] = False,
) -> None:
    """Check that a model's linear system is exact, or name the module where it is not.

    Ends with exit code 0 if it is, 3 if a figure is beyond its bound, 1 if the model is refused.
    """
    from elm_lanczos.config import ModelConfig, validated

    options = given(context, ModelConfig)
    others = {"text": text, "out": out, "jobs": jobs}
    _refuse_contradictions(options, others, random=random, all_=all_)
    config = validated(ModelConfig, options)
    silence_libraries()
    if all_:
        reports = _check_all(config, seed=seed, jobs=jobs or 1, out=out, json=json)
    else:
        reports = [_check_one(config, random=random, text=text, seed=seed, json=json)]
    _judge(reports, one=not all_)


def _refuse_contradictions(
    given: dict[str, Any], others: dict[str, Any], *, random: bool, all_: bool
) -> None:
    if all_ and ("model" in given or random):
        raise UsageError("--all checks every architecture: give no model and no --random")
    if random and "model" not in given:
        raise UsageError("--random needs a model type, a config.json or a model to be like")
    if others["out"] is not None:
        if not all_:
            raise UsageError("--out goes with --all")
        others["out"].open("a").close()  # now, not after the sweep
    if others["jobs"] is not None and not all_:
        raise UsageError("--jobs goes with --all")
    if (all_ or random) and others["text"] is not None:
        raise UsageError("random instances have no tokenizer: --text goes with a model's weights")
    of_weights = {"dtype", "device_map", "allow_pickle"} & given.keys()
    of_weights |= {"revision", "trust_remote_code"} & given.keys() if all_ else set()
    if of_weights and (all_ or random):
        name = min(of_weights).replace("_", "-")
        raise UsageError(f"--{name} goes with a model's weights; random instances have none")


def _check_one(
    config: ModelConfig, *, random: bool, text: str | None, seed: int, json: bool
) -> FamilyReport:
    import torch
    from rich.console import Console

    from elm_lanczos.architectures import PROMPT, full_config
    from elm_lanczos.check import check_architecture, check_model
    from elm_lanczos.report.verdicts import render_report
    from elm_lanczos.run import load_model

    if random and config.model is not None:
        options = {"revision": config.revision} if config.revision is not None else {}
        source = full_config(config.model, trust_remote_code=config.trust_remote_code, **options)
        report = check_architecture(
            source,
            dtype=getattr(torch, config.compute_dtype or "float64"),
            gate=config.gate,
            device=config.device or "cpu",
            seed=seed,
        )
    else:
        model = load_model(config)
        try:
            ids = model.encode(_SENTENCE if text is None else text)
        except UsageError:  # no tokenizer, or one that knows no words
            if text is not None:
                raise
            ids = torch.tensor(PROMPT) % model.embedding.weight.shape[0]
        model.embed(ids)  # raises what is wrong with ids
        report = check_model(model, ids, architecture=model.name, seed=seed)
    if json:
        typer.echo(dumps(report.to_dict()))
    else:
        Console().print(render_report(report))
    return report


def _check_all(
    config: ModelConfig, *, seed: int, jobs: int, out: Path | None, json: bool
) -> list[FamilyReport]:
    import torch

    from elm_lanczos.architectures import causal_architectures
    from elm_lanczos.check import check_all, families_table
    from elm_lanczos.report.verdicts import Sweep

    names = causal_architectures()
    with Sweep(len(names), quiet=json) as sweep:
        reports = check_all(
            sweep.finished,
            architectures=names,
            dtype=getattr(torch, config.compute_dtype or "float64"),
            gate=config.gate,
            device=config.device or "cpu",
            jobs=jobs,
            seed=seed,
        )
    if out is not None:
        out.write_text(families_table(reports), encoding="utf-8")
    if json:
        for report in reports:
            typer.echo(dumps(report.to_dict()))
    else:
        typer.echo(families_table(reports) if out is None else f"table in {out}")
    return reports


def _judge(reports: list[FamilyReport], *, one: bool) -> None:
    """Ends with the exit code that stands for the worst report."""
    from elm_lanczos.check import Verdict

    verdicts = {report.verdict for report in reports}
    if verdicts & {Verdict.WRONG, Verdict.CRASH}:
        raise typer.Exit(EXIT_NOT_CERTAIN)
    if one and verdicts != {Verdict.EXACT}:
        raise typer.Exit(EXIT_ERROR)
