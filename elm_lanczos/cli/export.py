"""`elm-lanczos export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from elm_lanczos.cli.app import app, silence_libraries
from elm_lanczos.cli.show import chosen_prompts, words_of
from elm_lanczos.errors import UsageError


@app.command(
    epilog="Examples:  elm-lanczos export runs/demo.zarr directions.safetensors  ·  "
    "elm-lanczos export runs/demo.zarr triplets.csv --prompt 2"
)
def export(
    store: Annotated[str, typer.Argument(help="A result store: its folder or URL.")],
    file: Annotated[
        Path,
        typer.Argument(help="What to write: .safetensors (vectors and values) or .csv (a table)."),
    ],
    prompt: Annotated[
        list[int] | None, typer.Option(help="Number of a prompt, from 1; may be repeated.")
    ] = None,
) -> None:
    """Write stored directions for other tools."""
    if file.suffix not in (".safetensors", ".csv"):
        raise UsageError(f"{file}: use a name that ends in .safetensors or .csv")
    if not file.parent.is_dir():
        raise UsageError(f"{file}: there is no folder {file.parent}")
    silence_libraries()
    from elm_lanczos.export import to_dataframe, to_safetensors
    from elm_lanczos.store import open_results

    results = open_results(store)
    prompts = [number - 1 for number in chosen_prompts(results, prompt)]
    if file.suffix == ".csv":
        to_dataframe(results, words_of(results.attrs), prompts).to_csv(file, index=False)
    else:
        to_safetensors(results, file, prompts)
    typer.echo(f"written: {file}")
