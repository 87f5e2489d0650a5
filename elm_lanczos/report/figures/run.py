"""The figures of a run as files: for every prediction its spectra and its tokens in sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from elm_lanczos.report.figures import sequence, spectra
from elm_lanczos.report.figures.style import save_figure
from elm_lanczos.report.record import Words
from elm_lanczos.store import Results

_FIGURES = {"spectra": spectra.draw, "sequence": sequence.draw}


def write_figures(
    results: Results,
    words: Words,
    folder: Path,
    prompts: Sequence[int],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Writes the figures of a run.

    Args:
        results: the store.
        words: texts of token ids.
        folder: where to; made if it is not there. Files of the same names are replaced.
        prompts: numbers of the prompts, from 1.
        progress: told how many of how many predictions are drawn.

    Returns:
        How many figures were drawn; each is written as PNG and as SVG.
    """
    folder.mkdir(parents=True, exist_ok=True)
    predictions = {}
    for number in prompts:
        prompt = results[number - 1]
        predictions[f"prompt-{number:04d}"] = prompt.name
        for position, further in prompt.positions.items():
            predictions[f"prompt-{number:04d}-position-{position:04d}"] = further.name
    for done, (name, group) in enumerate(predictions.items()):
        progress(done, len(predictions))
        result = results.group(group)
        for kind, draw in _FIGURES.items():
            drawing = draw(result, words)
            for suffix in ("png", "svg"):
                save_figure(drawing, folder / f"{name}-{kind}.{suffix}")
    progress(len(predictions), len(predictions))
    return len(predictions) * len(_FIGURES)
