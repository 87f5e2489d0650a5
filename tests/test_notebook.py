"""Objects as a notebook shows them: what matters is there, and nothing in them is markup."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from elm_lanczos import DetachedModel, open_results, svd
from elm_lanczos.certificate import Certificate
from elm_lanczos.config import RunConfig
from elm_lanczos.linearization import Linearization
from elm_lanczos.report.json_lines import JsonLines
from elm_lanczos.report.notebook import ROWS, card, html_table
from elm_lanczos.run import run
from elm_lanczos.store import Results
from elm_lanczos.stored_layers import LayerOptions, add_layers

HOSTILE = '<script>alert("1")</script> & <img src=x onerror=1>\x1b[2J\u202e'


class Page(HTMLParser):
    """The elements and the text of a piece of HTML; fails where they do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def _shown(thing: object) -> Page:
    page = Page(thing._repr_html_())  # type: ignore[attr-defined]
    assert set(page.tags) <= {"div", "h3", "table", "thead", "tbody", "tr", "th", "td", "p"}
    return page


@pytest.fixture(scope="module")
def lin(tiny: DetachedModel) -> Linearization:
    return tiny.linearize(HOSTILE)


@pytest.fixture(scope="module")
def stored(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    out = tmp_path_factory.mktemp("notebook") / "run.zarr"
    prompts = out.with_name("prompts.jsonl")
    prompts.write_text('{"text": "the people of"}\n{"text": "<b>bold</b> & <i>"}\n')
    run(RunConfig(model=str(tiny_folder), seq_file=str(prompts), k=2, out=str(out)), JsonLines())
    return open_results(out)


def test_everything_in_a_card_is_escaped() -> None:
    page = Page(card(HOSTILE, [html_table([HOSTILE], [[HOSTILE]])], [HOSTILE]))
    assert page.tags == ["div", "h3", "table", "thead", "tr", "th", "tbody", "tr", "td", "p"]
    assert page.text.count('<script>alert("1")</script> & <img src=x onerror=1>') == 4
    assert "\x1b" not in page.text and "\u202e" not in page.text  # they steer terminals and lines
    assert page.text.count(r"\x1b[2J\u202e") == 4


def test_table_rounds_numbers_and_says_what_is_left_out() -> None:
    page = Page(html_table(["a"], [[0.123456], [7], [float("nan")]], left_out=5))
    assert {"0.1235", "7", "nan", "… and 5 more rows in between"} <= set(page.text.split("\n"))


def test_linear_system(lin: Linearization) -> None:
    page = _shown(lin)
    assert page.tags.count("tr") == 1 + len(lin.tokens)
    assert page.text.count("← output") == 1
    assert f"{len(lin.tokens)} detached Jacobians J_i, 32 × 32, float32 on cpu" in page.text
    assert "constants" not in vars(lin.decoder)  # nothing was computed to show it


def test_linear_system_of_embeddings(tiny: DetachedModel) -> None:
    page = _shown(tiny.linearize(torch.randn(ROWS + 20, 32)))
    assert page.tags.count("tr") == 1 + ROWS
    assert "… and 20 more rows in between" in page.text and "x79" in page.text


def test_certificate(lin: Linearization) -> None:
    measured = lin.certificate()
    page = _shown(measured)
    assert page.text.startswith("exact\n")
    for name in measured.bounds:
        assert f"\n{name}\n" in page.text
    wrong = Certificate(1e-7, 1e-7, 0.5, float("nan"), 1e-9, 1e-9, residual=1e-6, orthogonality=1.0)
    page = _shown(wrong)
    assert page.text.startswith("NOT EXACT: reconstruction, leak, orthogonality\n")
    assert page.text.count("missed") == 3 and "1.0e-06" in page.text


def test_triplets(lin: Linearization) -> None:
    found = svd(lin, k=2, tokens=[0, 2])
    page = _shown(found)
    assert "2 leading singular triplets of 2 operators, 32 × 32" in page.text
    assert f"{float(found.S[1, 1]):.4g}\n" in page.text
    assert page.text.count("\nconverged\n") == 2
    assert "σ₃" not in page.text


def test_triplets_of_zero_and_identity() -> None:
    assert "\nnan\n" not in _shown(svd(torch.zeros(4, 3), k=2)).text
    page = _shown(svd(torch.eye(6, dtype=torch.float64), k=4))
    assert "0–3" in page.text  # one cluster: only its subspace is determined


def test_stored_results(stored: Results) -> None:
    page = _shown(stored)
    assert "<b>bold</b> & <i>" in page.text and page.text.count("\nexact\n") == 2
    assert "complete" in page.text
    for prompt in stored:
        page = _shown(prompt)
        assert page.tags.count("tr") == 1 + len(prompt.tokens)
        assert "certificate: exact" in page.text and "predicted: " in page.text


def test_stored_layer(stored: Results) -> None:
    options = LayerOptions("1,2", modules=("residual",), k=1)
    list(add_layers(str(stored.path), options, [2]))
    group = open_results(stored.path)[1].layers[2, "residual", "cumulative"]
    page = _shown(group)
    assert page.text.startswith("cumulative residual of layer 2: <b>bold</b> & <i>\n")
    assert page.tags.count("tr") == 1 + len(group.tokens)
    assert "certificate" not in page.text and "\nnan\n" not in page.text


def test_stored_results_that_are_not_finished(stored: Results, tmp_path: Path) -> None:
    for file in stored.path.rglob("*"):  # a copy without the summary and one prompt's certificate
        copy = tmp_path / "run.zarr" / file.relative_to(stored.path)
        if file.is_file() and "summary" not in copy.parts:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    assert "not complete" in _shown(open_results(tmp_path / "run.zarr")).text
