"""`elm-lanczos verify`."""

from __future__ import annotations

from json import dumps
from typing import Annotated

import typer

from elm_lanczos.cli.app import EXIT_ERROR, app, silence_libraries
from elm_lanczos.errors import UsageError


@app.command(
    epilog="Examples:  elm-lanczos verify runs/demo.zarr  ·  "
    "elm-lanczos verify runs/demo.zarr --no-model --json"
)
def verify(
    store: Annotated[str, typer.Argument(help="A result store: its folder or URL.")],
    sample: Annotated[
        int | None,
        typer.Option(min=1, help="Rows of each prediction to compute again (default: 4)"),
    ] = None,
    no_model: Annotated[
        bool, typer.Option("--no-model", help="Read the store alone; compute nothing again.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Read every file of a store and compute some rows again; changes nothing.

    Ends with exit code 0 if all that is done is right, also while the run has not ended, which it
    then says; with 1 if something is wrong.
    """
    _verify(store, sample, no_model=no_model, json=json)


def _verify(store: str, sample: int | None, *, no_model: bool, json: bool) -> None:
    """Prints what is wrong with a store, and ends with the exit code that stands for it."""
    if no_model and sample is not None:
        raise UsageError("--sample rows are computed by the model: leave out --no-model")
    silence_libraries()
    from elm_lanczos.report.verification import verification_lines
    from elm_lanczos.run import load_model
    from elm_lanczos.verify import SAMPLE
    from elm_lanczos.verify import verify as verify_store

    found = verify_store(store, sample=sample or SAMPLE, load=None if no_model else load_model)
    typer.echo(dumps(found.to_dict()) if json else "\n".join(verification_lines(found)))
    if found.faults:
        raise typer.Exit(EXIT_ERROR)
