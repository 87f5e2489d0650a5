"""`elm-lanczos steer`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from elm_lanczos.cli.analysis import Request, analysis
from elm_lanczos.cli.app import app
from elm_lanczos.errors import UsageError


@app.command(
    epilog="Examples:  elm-lanczos steer education --onto 'Tonight I ask the Congress'  ·  "
    "elm-lanczos steer war --onto 'We must' --layer 5 --strength 0.5 --tokens 60  ·  "
    "elm-lanczos steer 'health care' --onto 'Every year' --sweep --out sweep.png"
)
@analysis
def steer(
    request: Request,
    concept: Annotated[str, typer.Argument(help="One or a few words to steer towards.")],
    onto: Annotated[
        str, typer.Option(help="The prompt to continue; - reads it from standard input.")
    ],
    layer: Annotated[
        int | None,
        typer.Option(help="Where, counted from 1 (default: three quarters of the depth)"),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="Norm of what is added, of that of the state (default: 0.75)"),
    ] = None,
    k: Annotated[
        int, typer.Option(min=1, help="Triplets of the concept's Jacobian that steer.")
    ] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens to write.")] = 40,
    sweep: Annotated[
        bool,
        typer.Option("--sweep", help="Several layers and strengths, where none is given."),
    ] = False,
    temperature: Annotated[
        float, typer.Option(min=0, help="Of sampling; 0 takes the most probable token.")
    ] = 0.0,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Of sampling and of the solver.")
    ] = 0,
    every_position: Annotated[
        bool,
        typer.Option("--every-position", help="Steer the prompt's positions too."),
    ] = False,
) -> None:
    """Steer a concept onto a prompt by its detached Jacobian to a layer."""
    from elm_lanczos.analysis import steer, sweep_steering
    from elm_lanczos.analysis.steering import STRENGTH, SWEPT_STRENGTHS

    if request.config.position != -1:
        raise UsageError("steer goes on from the end of the prompt: leave --position out")
    prompt, model = request.text(onto), request.model()
    options: dict[str, Any] = {
        "k": k,
        "new_tokens": tokens,
        "temperature": temperature,
        "seed": seed,
        "every_position": every_position,
        "memory": request.config.memory,
    }
    if not sweep:
        strength = STRENGTH if strength is None else strength
        request.finish(steer(model, concept, prompt, layer=layer, strength=strength, **options))
        return
    layers = None if layer is None else [layer]
    strengths = SWEPT_STRENGTHS if strength is None else (strength,)
    with request.progress("steering") as tell:
        result = sweep_steering(
            model, concept, prompt, layers=layers, strengths=strengths, progress=tell, **options
        )
    request.finish(result)
