"""What pages take from the program itself: a verb's options, and figures that were measured.

`<!-- options run -->` becomes the table of the options of `elm-lanczos run`, and
`<!-- results peers -->` the table of `benchmarks/results/peers.json`: neither is written twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts tables in their places.

    Args:
        markdown: a page.

    Returns:
        The page with its tables.
    """
    kinds = {"options": _options, "results": lambda name: _TABLES[name](_read(name))}
    return re.sub(r"<!-- (options|results) ([\w-]+) -->", lambda m: kinds[m[1]](m[2]), markdown)


def _options(verb: str) -> str:
    import typer

    import elm_lanczos.cli  # noqa: F401 (registers the verbs)
    from elm_lanczos.cli.app import app

    command: Any = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    rows = []
    for parameter in command.params:
        name = "`, `".join(parameter.opts)
        if parameter.param_type_name == "argument":
            name = parameter.name.upper()
        rows.append((f"`{name}`", escape(parameter.help or "", quote=False)))
    return _table(("option", "what it does"), rows)


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], numbers: int = 0) -> str:
    """A Markdown table; the last `numbers` columns are aligned to the right."""
    marks = ["---"] * (len(head) - numbers) + ["--:"] * numbers
    lines = [head, marks, *([str(cell).replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _machine(results: dict[str, Any]) -> str:
    machine = results["machine"]
    versions = machine["versions"]
    where = machine["accelerator"] or machine["processor"]
    return (
        f"\n\n{where}, {machine['cores']} cores, {machine['threads']} "
        f"thread{'s' * (machine['threads'] != 1)}, {machine['memory_gib']} GiB; torch "
        f"{versions['torch']}, transformers {versions['transformers']}."
    )


def _peers(results: dict[str, Any]) -> str:
    lengths = results["lengths"]
    found = {
        (one["method"], length["tokens"]): one
        for length in lengths
        for one in length["methods"]
        if one["status"] in ("measured", "extrapolated")
    }
    tokens = [length["tokens"] for length in lengths]
    rows = []
    for method in dict.fromkeys(method for method, _ in found):
        ones = [found.get((method, T)) for T in tokens]
        there = [one for one in ones if one is not None]
        rows.append(
            (
                f"`{method}`",
                *(_seconds(one) for one in ones),
                f"{there[-1]['peak_mib']:.0f}",
                f"{max(one['sigma'] for one in there):.0e}",
                f"{max(one['residual'] for one in there):.0e}",
            )
        )
    head = ("method", *(f"T = {T}" for T in tokens), "peak MiB", "error of σ", "residual")
    return _table(head, rows, len(head) - 1) + _machine(results)


def _seconds(one: dict[str, Any] | None) -> str:
    if one is None:
        return "–"
    return ("≈ " if one["status"] == "extrapolated" else "") + f"{one['seconds']:.3g}"


def _hard(results: dict[str, Any]) -> str:
    verdicts = list(next(iter(results["counts"].values())))
    rows = [(f"`{name}`", *counts.values()) for name, counts in results["counts"].items()]
    return _table(("method", *verdicts), rows, len(verdicts)) + _machine(results)


def _plan(results: dict[str, Any]) -> str:
    rows = [
        (
            row["tokens"],
            row["method"],
            row["predicted_passes"],
            row["passes"],
            f"{row['predicted_seconds']:.2f}",
            f"{row['seconds']:.2f}",
        )
        for row in results["rows"]
    ]
    head = ("tokens", "method", "passes predicted", "made", "seconds predicted", "taken")
    return _table(head, rows, 4) + _machine(results)


def _passes(results: dict[str, Any]) -> str:
    rows = [
        (name, f"{row['passes_per_second']:.0f}", f"{row['ratio']:.2f}")
        for name, row in results["figures"].items()
    ]
    head = ("what", "passes per second", "time over the matrix products' alone")
    return _table(head, rows, 2) + _machine(results)


def _batching(results: dict[str, Any]) -> str:
    rows = [
        (row["prompts"], row["tokens"], f"{row['alone']:.2f}", f"{row['together']:.2f}")
        for row in results["rows"]
    ]
    head = ("prompts", "tokens", "seconds one by one", "together")
    return _table(head, rows, 2) + _machine(results)


def _memory(results: dict[str, Any]) -> str:
    rows = [
        (
            row["tokens"],
            row["method"] + (f" ({row['followed']})" if row["method"] == "auto" else ""),
            row["passes"],
            f"{row['seconds']:.0f}",
            f"{row['peak_mib']:.0f}",
            f"{row['predicted_mib']:.0f}",
        )
        for row in results["rows"]
    ]
    head = ("tokens", "method", "passes", "seconds", "peak MiB", "predicted MiB")
    return _table(head, rows, 4) + _machine(results)


def _processes(results: dict[str, Any]) -> str:
    rows = [
        (
            row["processes"],
            row["tokens"],
            row["method"],
            f"{row['seconds']:.1f}",
            f"{row['critical_path']:.1f}",
            f"{row['speed_up']:.2f}",
        )
        for row in results["rows"]
    ]
    head = (
        "processes",
        "tokens",
        "method",
        "seconds",
        "critical path",
        "speed-up",
    )
    return _table(head, rows, 3) + _machine(results)


def _offload(results: dict[str, Any]) -> str:
    rows = [
        (row["block"], f"{row['resident']:.2f}", f"{row['offloaded']:.2f}", f"{row['ratio']:.2f}")
        for row in results["rows"]
    ]
    head = ("vectors in a block", "seconds in memory", "on disk", "ratio")
    return _table(head, rows, 3) + _machine(results)


def _scaling(results: dict[str, Any]) -> str:
    rows = [
        (
            row["shape"],
            row["tokens"],
            f"{row['passes_per_second']:.3g}",
            f"{100 * row['share']:.0f} %",
            *(f"{row['total_seconds'][name] / 3600:.2g}" for name in ("lanczos", "dense")),
        )
        for row in results["rows"]
    ]
    head = (
        "shape",
        "tokens",
        "passes per second",
        "matrix products' share",
        "hours, `lanczos`, k = 16",
        "hours, `dense`",
    )
    return _table(head, rows, 4) + _machine(results)


def _layers(results: dict[str, Any]) -> str:
    rows = [
        (name, f"{row['passes']:.0f}", f"{row['processor_seconds']:.0f}", f"{row['seconds']:.0f}")
        for name, row in results["figures"].items()
    ]
    head = ("what", "passes", "processor seconds", "seconds")
    return _table(head, rows, 3) + _machine(results)


def _steering(results: dict[str, Any]) -> str:
    rows = [
        (
            row["concept"],
            row["prompt"],
            f"{row['rise']:.2f}",
            f"{row['excess_loss']:.2f}",
            f"{100 * row['energy']:.0f} %",
        )
        for row in results["pairs"]
    ]
    means = results["means"]
    rows.append(("**mean**", "", f"{means['rise']:.2f}", f"{means['excess_loss']:.2f}", ""))
    head = ("concept", "prompt", "rise", "excess loss", "share of the triplets in ‖J‖²")
    return _table(head, rows, 3) + _machine(results)


_TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "batching": _batching,
    "hard": _hard,
    "layers": _layers,
    "memory": _memory,
    "memory-8192": _memory,
    "offload": _offload,
    "passes": _passes,
    "peers": _peers,
    "plan": _plan,
    "processes": _processes,
    "scaling": _scaling,
    "steering": _steering,
}
