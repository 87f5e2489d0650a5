"""`elm-lanczos layers`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from elm_lanczos.cli.analysis import Request, analysis
from elm_lanczos.cli.app import EXIT_NOT_CERTAIN, app
from elm_lanczos.cli.options import TokensOption
from elm_lanczos.errors import UsageError


@app.command(
    epilog="Examples:  elm-lanczos layers 'the Soviet Union and the'  ·  "
    "elm-lanczos layers 'my fellow' --layers 1,4,8 --kind layerwise --out layers.png  ·  "
    "elm-lanczos layers --store runs/demo.zarr --prompt 1"
)
@analysis
def layers(
    request: Request,
    prompt: Annotated[
        str | None, typer.Argument(help="The input; - reads it from standard input.")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(help="A store of `run`: its prompts, model and options; keeps the layers."),
    ] = None,
    number: Annotated[
        list[int] | None,
        typer.Option("--prompt", help="With --store: number of a prompt, from 1; may be repeated."),
    ] = None,
    chosen: Annotated[
        str,
        typer.Option(
            "--layers",
            help="Layers, counted from 1: all, last:4, 1,5,9 or start:stop:step (stop excluded)",
        ),
    ] = "all",
    modules: Annotated[
        list[str] | None,
        typer.Option(help="residual, attention, mlp; a list or repeated (default: all)"),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="cumulative, layerwise, to-end; a list or repeated (default: the first)"),
    ] = None,
    readout: Annotated[
        str, typer.Option(help="norm: through the final norm frozen at h_l; raw: as it is.")
    ] = "norm",
    tokens: TokensOption = None,
    k: Annotated[int | None, typer.Option("-k", "--k", help="Triplets each (default: 6)")] = None,
    tol: Annotated[
        float | None, typer.Option(help="Residual relative to σ₁ (default: 1e-3)")
    ] = None,
    top: Annotated[
        int | None, typer.Option(min=1, max=64, help="Words of each vector (default: 5)")
    ] = None,
) -> None:
    """Decompose every layer, its attention and its MLP into triplets, in words."""
    from elm_lanczos.layer_operators import CUMULATIVE, MODULES
    from elm_lanczos.stored_layers import LayerOptions, add_layers

    given: dict[str, Any] = {
        name: value for name, value in (("k", k), ("tol", tol), ("top", top)) if value is not None
    }
    options = LayerOptions(
        layers=chosen,
        modules=_listed(modules) or MODULES,
        kinds=_listed(kind) or (CUMULATIVE,),
        readout=readout,
        tokens=tokens or "all",
        **given,
    )
    if (prompt is None) == (store is None):
        raise UsageError("give either a PROMPT or --store STORE")
    if store is None:
        if number:
            raise UsageError("--prompt chooses among the prompts of a store: add --store STORE")
        assert prompt is not None
        lin = request.linearize(prompt)
        with request.progress("layers") as tell:
            found = options.solve(lin, progress=tell)
        request.finish(found)
        return
    if request.config.model_fields_set - {"memory"}:
        raise UsageError("--store has its own model and options: leave out those of the model")
    if request.out and len(number or ()) != 1:
        raise UsageError("--out is for one prompt: choose it by --prompt N")
    certain = True
    with request.progress("layers") as tell:
        results = add_layers(store, options, number, request.config.memory, progress=tell)
        for result in results:
            request.show(result)
            certain = certain and not result.doubts
    if not certain:
        raise typer.Exit(EXIT_NOT_CERTAIN)


def _listed(values: list[str] | None) -> tuple[str, ...]:
    """Names given in lists or one by one, each once."""
    names = (name.strip() for value in values or () for name in value.split(","))
    return tuple(dict.fromkeys(name for name in names if name))
