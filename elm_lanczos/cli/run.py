"""`elm-lanczos run`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from elm_lanczos.cli.app import EXIT_NOT_CERTAIN, app, silence_libraries
from elm_lanczos.cli.launcher import is_first, processes
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

if TYPE_CHECKING:
    from elm_lanczos.run import Outcome


@app.command(
    epilog="Examples:  elm-lanczos run --k 16 --seq-file prompts.txt  ·  "
    "elm-lanczos run --text 'the Soviet Union and the' --generate 3  ·  "
    "elm-lanczos run --config configs/demo.yaml --out demo.zarr --resume  ·  "
    "torchrun --nproc-per-node 4 -m elm_lanczos run --seq-file prompts.txt"
)
def run(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="Hugging Face id or folder (default: bundled model)")
    ] = None,
    revision: RevisionOption = None,
    k: KOption = None,
    seq_file: SeqFileOption = None,
    text: TextOption = None,
    generate: GenerateOption = None,
    out: Annotated[
        str | None,
        typer.Option(help="Folder or URL of the results (default: runs/<date>_<time>.zarr)"),
    ] = None,
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
    top: Annotated[int | None, typer.Option(help="Words per direction (default: 8)")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random vector.")] = None,
    memory: MemoryOption = None,
    scratch: ScratchOption = None,
    config: ConfigOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the store at --out.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the store at --out.")
    ] = False,
    trust_remote_code: TrustOption = None,
    allow_pickle: PickleOption = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per prediction.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Compute, decode and store the singular triplets of every prompt."""
    from elm_lanczos.config import RunConfig, run_config

    options = run_config(config, given(context, RunConfig), RunConfig)
    silence_libraries()
    from elm_lanczos.report.json_lines import JsonLines
    from elm_lanczos.report.terminal import Terminal

    if processes() > 1:
        from elm_lanczos.distributed import run as run_prompts
    else:
        from elm_lanczos.run import run as run_prompts

    first = is_first()
    with JsonLines() if json and first else Terminal(quiet=quiet or not first) as observer:
        outcome = run_prompts(options, observer, resume=resume, overwrite=overwrite)
    if first:
        _warn(outcome, quiet=quiet or json)


def _warn(outcome: Outcome, *, quiet: bool) -> None:
    """Says what is not certain, and ends with the exit code that stands for it."""
    if not quiet:
        typer.echo(f"results in {outcome.path}  (again: elm-lanczos show {outcome.path})")
    problems = []
    if outcome.not_converged:
        problems.append(f"{outcome.not_converged} rows did not converge (try a larger --tol)")
    if outcome.not_exact:
        problems.append(f"{outcome.not_exact} predictions are not exact within their bounds")
    if problems:
        typer.echo(f"warning: {'; '.join(problems)}", err=True)
        raise typer.Exit(EXIT_NOT_CERTAIN)
