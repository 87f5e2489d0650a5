"""`elm-lanczos report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from elm_lanczos.cli.app import app, silence_libraries
from elm_lanczos.errors import UsageError


@app.command(
    epilog="Examples:  elm-lanczos report runs/demo.zarr  ·  "
    "elm-lanczos report runs/demo.zarr --out demo.html --prompt 2 --figures figures"
)
def report(
    store: Annotated[str, typer.Argument(help="A result store: its folder or URL.")],
    out: Annotated[
        Path | None, typer.Option(help="The page (default: the store's name with .html, here).")
    ] = None,
    prompt: Annotated[
        list[int] | None, typer.Option(help="Number of a prompt, from 1; may be repeated.")
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(help="Folder for the figures of every prediction, as PNG and SVG."),
    ] = None,
) -> None:
    """Write a run as one HTML page that opens from disk, and its figures."""
    silence_libraries()
    from elm_lanczos.cli.show import chosen_prompts, words_of
    from elm_lanczos.memory import size
    from elm_lanczos.report.figures.run import write_figures
    from elm_lanczos.report.page import write_page
    from elm_lanczos.report.progress import progress_bar
    from elm_lanczos.store import open_results

    results = open_results(store)
    path = out or Path(Path(store.rstrip("/")).with_suffix(".html").name)
    if not path.parent.is_dir():
        raise UsageError(f"--out {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise UsageError(f"--out {path} is a folder: name a file, as in page.html")
    numbers = chosen_prompts(results, prompt)
    if not numbers:
        raise UsageError(f"{store} has no prompts yet")
    words = words_of(results.attrs)
    with progress_bar("reading the store") as tell:
        write_page(results, words, path, numbers, tell)
    typer.echo(f"written: {path}  ({size(path.stat().st_size)})")
    if figures is not None:
        with progress_bar("drawing") as tell:
            written = write_figures(results, words, figures, numbers, tell)
        typer.echo(f"written: {written} figures in {figures}, each as PNG and SVG")
    if not results.complete:
        typer.echo("note: the run has not ended; what is finished so far is shown", err=True)
