"""`elm-lanczos compare`."""

from __future__ import annotations

from typing import Annotated

import typer

from elm_lanczos.cli.analysis import Request, analysis
from elm_lanczos.cli.app import app


@app.command(
    epilog="Examples:  elm-lanczos compare  ·  "
    "elm-lanczos compare Qwen/Qwen3-0.6B google/gemma-3-270m --out ranks.pdf --out tokens.csv  ·  "
    "elm-lanczos compare Qwen/Qwen3-0.6B --seq-file phrases.txt --k 16 --tol 1e-5 --from-start"
)
@analysis
def compare(
    request: Request,
    model: Annotated[
        list[str] | None,
        typer.Argument(
            help="Hugging Face ids or folders (default: bundled model).", show_default=False
        ),
    ] = None,
    seq_file: Annotated[
        str | None,
        typer.Option(
            help="Prompts, one a line, or JSON lines; - for standard input "
            "(default: a hundred phrases that come with the package)."
        ),
    ] = None,
    k: Annotated[int, typer.Option(help="Singular triplets per token.")] = 4,
    method: Annotated[
        str, typer.Option(help="How they are computed: auto, lanczos, stream or dense.")
    ] = "auto",
    tol: Annotated[
        float,
        typer.Option(
            help="Residual to reach, relative to σ₁; errors of σ are of its second order."
        ),
    ] = 1e-2,
    from_start: Annotated[
        bool, typer.Option("--from-start", help="Count positions from the start, not the end.")
    ] = False,
) -> None:
    """Compare stable ranks, spectra and leading directions of models over many phrases."""
    from elm_lanczos.analysis import compare
    from elm_lanczos.errors import UsageError
    from elm_lanczos.prompts import PHRASES, read_prompts

    if request.config.position != -1:
        raise UsageError("compare takes the last position of every prompt: leave --position out")
    prompts = [prompt.text for prompt in read_prompts(seq_file or PHRASES)]
    with request.progress("prompts") as progress:
        result = compare(
            model or [None],
            prompts,
            k=k,
            method=method,
            tol=tol,
            origin="start" if from_start else "end",
            memory=request.config.memory,
            load=request.model,
            progress=progress,
        )
    request.finish(result)
