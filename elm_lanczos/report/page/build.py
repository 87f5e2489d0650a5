"""One HTML file of a run: data, program, style and charting library in it, and nothing outside.

A Content-Security-Policy in the page forbids every connection and lets run only the two scripts
whose digests it names: plotly.js and the page's own. Data stand in elements that are not programs.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from elm_lanczos.report.page.data import (
    COSINE_UNITS,
    Vocabulary,
    as_script,
    prediction_data,
    run_data,
)
from elm_lanczos.report.record import Words
from elm_lanczos.status import Status
from elm_lanczos.store import Results
from elm_lanczos.store.layout import Array

_PROGRAM = ("data.js", "elements.js", "virtual.js", "charts.js", "panels.js", "page.js")
"""The files of the page's own program, in the order in which they are joined."""


def write_page(
    results: Results,
    words: Words,
    path: Path,
    prompts: Sequence[int] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes a store as one HTML file.

    Args:
        results: the store.
        words: texts of token ids.
        path: the file; an older one is replaced.
        prompts: numbers of the prompts to show, from 1; all if not given.
        progress: told how many of how many predictions are read.

    Raises:
        StoreError: if the store is damaged.
    """
    path.write_text(page(results, words, prompts, progress), encoding="utf-8")


def page(
    results: Results,
    words: Words,
    prompts: Sequence[int] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Returns a store as one HTML page; see `write_page`.

    Args:
        results: the store.
        words: texts of token ids.
        prompts: numbers of the prompts to show, from 1; all if not given.
        progress: told how many of how many predictions are read.

    Returns:
        The page.

    Raises:
        StoreError: if the store is damaged.
    """
    numbers = list(prompts or range(1, len(results) + 1))
    run = run_data(results, numbers)
    names = [
        group.name
        for number in numbers
        for group in (results[number - 1], *results[number - 1].positions.values())
    ]
    vocabulary = Vocabulary(words)
    predictions = []
    for done, name in enumerate(names):
        progress(done, len(names))
        predictions.append(
            as_script(
                prediction_data(
                    results.group(name),  # not kept, so that its arrays are freed
                    vocabulary,
                    partial(_vectors, results, name),
                )
            )
        )
    progress(len(names), len(names))
    constants = {
        "statuses": [status.name.lower().replace("_", " ") for status in Status],
        "cosine_units": COSINE_UNITS,
        "vocabulary": vocabulary.texts,
    }
    scripts = [get_plotlyjs(), "\n".join(_source(name) for name in _PROGRAM)]
    scripts = [script.replace("\r\n", "\n") for script in scripts]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(_source("template.html.j2")).render(
        title=run["title"],
        policy=_policy(scripts),
        style=Markup(_source("page.css")),
        run=Markup(as_script(run | constants)),
        predictions=[Markup(text) for text in predictions],
        scripts=[Markup(script) for script in scripts],
    )


def _vectors(results: Results, name: str, side: str) -> Array:
    """U or V of a prediction, read anew and not kept."""
    vectors: Array = getattr(results.group(name), side)
    return vectors


def _source(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _policy(scripts: Sequence[str]) -> str:
    """A Content-Security-Policy that runs these scripts and loads nothing."""
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    allowed = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
