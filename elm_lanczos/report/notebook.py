"""Objects in a notebook: a title, a table and lines of text, escaped because tokens are data."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from elm_lanczos.certificate import Certificate
from elm_lanczos.linearization import Linearization
from elm_lanczos.report.text import printable, token_text
from elm_lanczos.report.verdicts import MEANING
from elm_lanczos.status import Status
from elm_lanczos.store import PromptResult, Results
from elm_lanczos.store.results import LayerResult
from elm_lanczos.svd.result import SVDResult

ROWS = 60
"""Rows of a table that are shown, from both ends."""

_VALUES = 3
"""Singular values shown of an operator."""

_MEANING = MEANING | {
    "orthogonality": "UᵀU and VᵀV against I",
    "residual": "largest triplet residual, relative to σ₁",
}


def shown(rows: Sequence[Any]) -> tuple[Sequence[Any], int]:
    """Returns the rows of a table that are shown, and how many in between are left out."""
    left_out = max(0, len(rows) - ROWS)
    return ([*rows[: ROWS // 2], *rows[-ROWS // 2 :]] if left_out else rows), left_out


def html_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], left_out: int = 0) -> str:
    """Returns a table as HTML, with everything in it escaped.

    Args:
        columns: its heads.
        rows: its cells; numbers are rounded to four digits.
        left_out: rows that are not among them.

    Returns:
        The table, and a line that says what is left out.
    """
    head = "".join(f"<th>{_safe(name)}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{_safe(_text(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    said = f"<p>… and {left_out} more rows in between</p>" if left_out else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{said}"


def card(title: str, tables: Sequence[str], lines: Sequence[str] = (), picture: str = "") -> str:
    """Returns an object as a piece of HTML.

    Args:
        title: what it is.
        tables: what `html_table` has made.
        lines: what is to be said beside them.
        picture: a PNG in base64, shown before them.

    Returns:
        One `div`.
    """
    image = (
        f'<img alt="{_safe(title)}" src="data:image/png;base64,{picture}" style="max-width:100%">'
    )
    said = "".join(f"<p>{_safe(line)}</p>" for line in lines)
    return f"<div><h3>{_safe(title)}</h3>{image if picture else ''}{''.join(tables)}{said}</div>"


def certificate(found: Certificate) -> str:
    """Returns a certificate: each figure beside its bound."""
    bounds: dict[str, float | None] = dict(found.bounds)
    if found.residual is not None:
        bounds["residual"] = None
    rows = [
        (
            name,
            f"{getattr(found, name):.1e}",
            "" if bound is None else f"{bound:.0e}",
            "missed" if name in found.failures else "",
            _MEANING[name],
        )
        for name, bound in bounds.items()
    ]
    lines = [f"computed in {found.dtype}"]
    if found.not_a_chain:
        lines.append(f"linearised as a whole: {found.not_a_chain}")
    title = "exact" if found.exact else f"NOT EXACT: {', '.join(found.failures)}"
    columns = ("figure", "value", "bound", "", "what is compared")
    return card(title, [html_table(columns, rows)], lines)


def linearization(lin: Linearization) -> str:
    """Returns a linear system: its input, shapes and structure; nothing is computed for it."""
    T, m, d = lin.shape
    ids = [""] * T if lin.ids is None else lin.ids.tolist()
    tokens = [
        (i, number, token_text(token), "← output" if i == lin.position else "")
        for i, (number, token) in enumerate(zip(ids, lin.tokens, strict=True))
    ]
    rows, left_out = shown(tokens)
    structure = lin.not_a_chain or f"a chain of {len(lin.segments)} segments"
    return card(
        f"{lin.model.name}: y = Σ J_i x_i + c",
        [html_table(("index", "id", "token", ""), rows, left_out)],
        (
            f"{T} detached Jacobians J_i, {m} × {d}, {str(lin.output.dtype)[6:]} on "
            f"{lin.inputs.device}",
            *([] if lin.layer is None else [f"y is the residual stream behind layer {lin.layer}"]),
            structure,
        ),
    )


def triplets(found: SVDResult) -> str:
    """Returns singular triplets: the leading values of each operator and the evidence."""
    count = min(_VALUES, found.S.shape[1])
    scale = found.S[:, 0].where(found.S[:, 0] > 0, 1.0)
    worst = (found.residual.amax(1) / scale).tolist()
    all_rows = [
        (
            found.tokens[i],
            *found.S[i, :count].tolist(),
            f"{found.stable_rank[i]:.2f}",
            f"{worst[i]:.0e}",
            "  ".join("–".join(str(j) for j in (c[0], c[-1])) for c in found.clusters[i]),
            _status(int(found.status[i])),
        )
        for i in range(len(found.tokens))
    ]
    rows, left_out = shown(all_rows)
    n, k, m = found.U.shape
    values = [f"σ{'₁₂₃'[j]}" for j in range(count)]
    columns = ("operator", *values, "stable rank", "residual / σ₁", "clusters", "status")
    return card(
        f"{k} leading singular triplets of {n} operators, {m} × {found.V.shape[2]}",
        [html_table(columns, rows, left_out)],
        (f"{found.method}, {found.passes} passes, tolerance {found.plan.tol:g}",),
    )


def prompt_result(result: PromptResult) -> str:
    """Returns one prediction of a store: its tokens, and what was found for each."""
    lines = [f"predicted: {_predicted(result)}", f"certificate: {_verdict(result)}"]
    shares = [float(share) for share in result.attribution]
    return _stored(result, result.text, {"share of logit": shares}, lines)


def layer_result(result: LayerResult) -> str:
    """Returns one layer and module of a prompt in a store."""
    title = f"{result.kind} {result.module} of layer {result.layer}: {result.text}"
    return _stored(result, title, {}, [])


def _stored(
    result: PromptResult, title: str, more: dict[str, list[float]], lines: list[str]
) -> str:
    """A group of a store as a card; `more` are columns of T numbers each."""
    count = min(2, result.S.shape[1])
    columns = {
        "index": range(len(result.tokens)),
        "token": [token_text(token) for token in result.tokens],
        **more,
        **{f"σ{'₁₂'[j]}": result.S[:, j].tolist() for j in range(count)},
        "stable rank": result.stable_rank.tolist(),
        "status": [_status(int(code)) for code in result.status],
    }
    rows, left_out = shown(list(zip(*columns.values(), strict=True)))
    table = html_table(list(columns), rows, left_out)
    return card(title, [table], [*lines, str(result.path)])


def results(run: Results) -> str:
    """Returns a run: its prompts and what became of them."""
    prompts, left_out = shown(range(len(run)))
    rows = [
        (i, run[i].text, len(run[i].tokens), _predicted(run[i]), _verdict(run[i])) for i in prompts
    ]
    config: Any = run.attrs.get("config") or {}
    return card(
        str(run.path),
        [html_table(("index", "prompt", "tokens", "predicted", "certificate"), rows, left_out)],
        (
            f"model {config.get('model') or 'bundled'}, k = {config.get('k')}",
            "complete" if run.complete else "not complete: elm-lanczos run --resume goes on",
        ),
    )


def _predicted(result: PromptResult) -> str:
    candidates: Any = result.attrs.get("predicted") or ()
    return "  ".join(
        f"{token_text(one['token'])} {100 * one['probability']:.1f} %" for one in candidates[:3]
    )


def _verdict(result: PromptResult) -> str:
    figures = result.certificate
    if not figures:
        return "not finished"
    return "exact" if figures["exact"] else f"NOT EXACT: {', '.join(figures['failures'])}"


def _status(code: int) -> str:
    return Status(code).name.lower().replace("_", " ")


def _text(cell: Any) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _safe(text: str) -> str:
    return escape(printable(text))
