"""`elm-lanczos plan`."""

from __future__ import annotations

from json import dumps
from typing import Annotated

import typer

from elm_lanczos.cli.app import app, silence_libraries
from elm_lanczos.cli.options import (
    BatchOption,
    ComputeDtypeOption,
    ConfigOption,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    GateOption,
    GenerateOption,
    KOption,
    MemoryOption,
    MethodOption,
    PickleOption,
    PositionsOption,
    PrecisionOption,
    RevisionOption,
    ScratchOption,
    SeqFileOption,
    TextOption,
    TokensOption,
    TolOption,
    TrustOption,
    given,
)
from elm_lanczos.errors import UsageError


@app.command(
    epilog="Examples:  elm-lanczos plan --seq-file prompts.txt --k 16  ·  "
    "elm-lanczos plan meta-llama/Llama-3.1-8B --length 128,2048 --device cuda  ·  "
    "elm-lanczos plan path/to/70B/config.json --random --length 128"
)
def plan(
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
        typer.Option("--random", help="Time a few random layers of its shape; needs no weights."),
    ] = False,
    revision: RevisionOption = None,
    k: KOption = None,
    seq_file: SeqFileOption = None,
    text: TextOption = None,
    length: Annotated[
        str | None, typer.Option(help="Numbers of tokens instead of prompts, as in 128,2048.")
    ] = None,
    generate: GenerateOption = None,
    dtype: DtypeOption = None,
    compute_dtype: ComputeDtypeOption = None,
    gate: GateOption = None,
    precision: PrecisionOption = None,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    method: MethodOption = None,
    tol: TolOption = None,
    tokens: TokensOption = None,
    positions: PositionsOption = None,
    batch: BatchOption = None,
    memory: MemoryOption = None,
    scratch: ScratchOption = None,
    config: ConfigOption = None,
    trust_remote_code: TrustOption = None,
    allow_pickle: PickleOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Predict passes, time and memory of each method, before anything runs."""
    from elm_lanczos.config import PlanConfig, run_config

    options = run_config(config, given(context, PlanConfig), PlanConfig)
    if random and options.model is None:
        raise UsageError("--random needs a model type, a config.json or a model to be like")
    silence_libraries()
    from rich.console import Console

    from elm_lanczos.planning import plan_run
    from elm_lanczos.report.forecast import render_forecast
    from elm_lanczos.run import load_model

    status = Console(stderr=True)
    with status.status("timing a block of passes …"):
        forecast = plan_run(options, None if random else load_model(options))
    if json:
        typer.echo(dumps(forecast.to_dict()))
    else:
        Console().print(render_forecast(forecast))
