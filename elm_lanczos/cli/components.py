"""`elm-lanczos components`."""

from __future__ import annotations

from typing import Annotated

import typer

from elm_lanczos.cli.analysis import PromptArgument, Request, analysis
from elm_lanczos.cli.app import app


@app.command(
    epilog="Examples:  elm-lanczos components 'the Soviet Union and the'  ·  "
    "elm-lanczos components 'the Soviet Union and the' --target ' people' --token 1  ·  "
    "elm-lanczos components 'my fellow' --out jacobian.png --out layers.csv"
)
@analysis
def components(
    request: Request,
    prompt: PromptArgument,
    target: Annotated[
        str | None,
        typer.Option(help="Token whose logit it is about, or id:N (default: the prediction)"),
    ] = None,
    token: Annotated[
        int | None,
        typer.Option(help="Input token whose Jacobian is shown (default: at the output position)"),
    ] = None,
    k: Annotated[int, typer.Option(min=1, help="Singular values of its Jacobian.")] = 16,
    largest: Annotated[
        int, typer.Option(min=1, help="Rows and columns of its Jacobian that are decoded.")
    ] = 8,
) -> None:
    """Say what each attention and MLP contributes to a logit, and show a token's Jacobian."""
    from elm_lanczos.analysis import components

    lin = request.linearize(prompt)
    wanted = None if target is None else lin.model.token_id(target)
    with request.progress("layers and rows") as progress:
        result = components(lin, token, target=wanted, k=k, largest=largest, progress=progress)
    request.finish(result)
