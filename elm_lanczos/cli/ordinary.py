"""`elm-lanczos ordinary`."""

from __future__ import annotations

from elm_lanczos.cli.analysis import PromptArgument, Request, analysis
from elm_lanczos.cli.app import app


@app.command(
    epilog="Examples:  elm-lanczos ordinary 'the Soviet Union and the'  ·  "
    "elm-lanczos ordinary 'my fellow' --compute-dtype float64 --out scatter.png"
)
@analysis
def ordinary(request: Request, prompt: PromptArgument) -> None:
    """Compare the output with what the ordinary and the detached Jacobian make of the input."""
    from elm_lanczos.analysis import ordinary

    request.finish(ordinary(request.linearize(prompt)))
