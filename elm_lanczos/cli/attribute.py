"""`elm-lanczos attribute`."""

from __future__ import annotations

from typing import Annotated

import typer

from elm_lanczos.cli.analysis import PromptArgument, Request, analysis
from elm_lanczos.cli.app import app


@app.command(
    epilog="Examples:  elm-lanczos attribute 'the Soviet Union and the'  ·  "
    "elm-lanczos attribute 'the Soviet Union and the' --target ' people' --contrast ' United'  ·  "
    "elm-lanczos attribute 'my fellow' --out bars.png --out shares.csv"
)
@analysis
def attribute(
    request: Request,
    prompt: PromptArgument,
    target: Annotated[
        str | None,
        typer.Option(help="Token whose logit is attributed, or id:N (default: the prediction)"),
    ] = None,
    contrast: Annotated[
        str | None,
        typer.Option(help="Token whose logit is subtracted from it, or id:N."),
    ] = None,
) -> None:
    """Attribute a logit exactly to the input tokens and the constant."""
    from elm_lanczos.analysis import attribute

    lin = request.linearize(prompt)
    ids = (None if token is None else lin.model.token_id(token) for token in (target, contrast))
    request.finish(attribute(lin, *ids))
