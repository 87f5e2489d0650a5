"""Draws the README's picture from a real run: docs/demo.svg.

python benchmarks/picture.py
"""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import MONOKAI

from elm_lanczos import DetachedModel, open_results
from elm_lanczos.config import RunConfig
from elm_lanczos.report.json_lines import JsonLines
from elm_lanczos.report.terminal import render
from elm_lanczos.run import run

PICTURE = Path(__file__).parents[1] / "docs" / "demo.svg"

_FORMAT = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
"""Without the fonts that rich would have loaded from another host."""


class Silent(JsonLines):
    """Prints nothing."""

    def finished(self, result: object) -> None:
        """Says nothing."""


def main(
    text: Annotated[str, typer.Option(help="The prompt.")] = "the Soviet Union and the",
    width: Annotated[int, typer.Option(help="Columns.")] = 100,
) -> None:
    """Run the bundled model on one prompt and draw what `elm-lanczos run` prints."""
    model = DetachedModel.from_pretrained()
    console = Console(record=True, width=width, file=io.StringIO(), highlight=False)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        run(RunConfig(text=text, out="runs/demo.zarr"), Silent())
        result = open_results("runs/demo.zarr").prompts[0]
        console.print(render(result, model.token_strings, "1/1", width))
    PICTURE.parent.mkdir(exist_ok=True)
    command = f"elm-lanczos run --k 16 --text '{text}'"
    drawing = console.export_svg(title=command, theme=MONOKAI, code_format=_FORMAT)
    PICTURE.write_text(drawing)
    typer.echo(f"written to {PICTURE}")


if __name__ == "__main__":
    typer.run(main)
