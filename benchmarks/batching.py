"""Short prompts of one length solved together and one by one: seconds of whole runs.

Both runs make the same store of the same phrases, which differ in one word, and take turns. A
frozen layer takes a hundred small operations whatever the number of tokens; for a few of them these
take longer to be told apart than to be computed, which is done once for all prompts of a batch.

    python benchmarks/batching.py
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import typer
from machine import write_results
from rich.console import Console
from rich.table import Table

from elm_lanczos import batches
from elm_lanczos import run as runs
from elm_lanczos.config import RunConfig
from elm_lanczos.model import DetachedModel
from elm_lanczos.solving import solve_all

TAIL = "of the people of this great nation and of the world in peace and in war "
WORDS = "people world nation peace war law time great country men day God state power".split()


class _Silent:
    """Observes a run and says nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def phrases(model: DetachedModel, tokens: int, count: int) -> list[str]:
    """Returns texts of one length that begin with different words.

    Args:
        model: whose tokens are counted.
        tokens: about how many.
        count: how many texts, at most.

    Returns:
        The texts.
    """
    tail = model.text(model.encode(TAIL * 10)[: tokens - 1])
    texts = [f"{word} {tail}" for word in WORDS]
    lengths = [len(model.encode(text)) for text in texts]
    most = statistics.mode(lengths)
    return [text for text, n in zip(texts, lengths, strict=True) if n == most][:count]


def seconds(texts: list[str], k: int, together: int, folder: Path) -> float:
    """Returns the time of one run, without the loading of the model.

    Args:
        texts: the prompts.
        k: triplets for each token.
        together: tokens that are solved together, at most.
        folder: where the store goes.

    Returns:
        Seconds.
    """
    file = folder / "prompts.txt"
    file.write_text("\n".join(texts))
    config = RunConfig(seq_file=str(file), k=k, out=str(folder / "r.zarr"), memory=2**31)
    job = runs.prepare(config, runs.prompts_of(config), _Silent())
    begun = time.perf_counter()
    with (
        patch.object(batches, "TOKENS", together),
        runs.open_store(job, _Silent(), resume=False, overwrite=True) as store,
    ):
        solve_all(store, job, _Silent())
    return time.perf_counter() - begun


def main(
    lengths: Annotated[str, typer.Option(help="About how many tokens a prompt has.")] = "4,8,16",
    count: Annotated[int, typer.Option(help="Prompts, at most.")] = 8,
    k: Annotated[int, typer.Option(help="Triplets for each token.")] = 16,
    repeats: Annotated[int, typer.Option(help="Runs of each kind.")] = 1,
) -> None:
    """Print the table and write benchmarks/results/batching.json."""
    model, rows = DetachedModel.from_pretrained(), []
    table = Table(title=f"bundled model, k = {k}, seconds a prompt")
    for column in ("T", "prompts", "alone", "together", "times as fast"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        for tokens in map(int, lengths.split(",")):
            texts = phrases(model, tokens, count)
            taken: dict[int, list[float]] = {1: [], batches.TOKENS: []}
            for _ in range(repeats):
                for together, times in taken.items():
                    times.append(seconds(texts, k, together, Path(folder)) / len(texts))
            alone, both = (min(times) for times in taken.values())
            length = len(model.encode(texts[0]))
            row = {"tokens": length, "prompts": len(texts), "alone": alone, "together": both}
            rows.append(row)
            cells = (f"{length}", f"{len(texts)}", f"{alone:.2f}", f"{both:.2f}")
            table.add_row(*cells, f"{alone / both:.2f}")
    Console().print(table)
    print(f"written to {write_results('batching', {'k': k, 'rows': rows}).name}")


if __name__ == "__main__":
    typer.run(main)
