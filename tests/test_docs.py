"""The documentation: it builds, needs no network, and says what the program does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import typer

import elm_lanczos
import elm_lanczos.analysis
import elm_lanczos.cli  # noqa: F401 (registers the verbs)
from elm_lanczos.cli.app import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
RUNNABLE = re.compile(r"<!-- run -->\n```python\n(.*?)```", re.DOTALL)
_LOADED = {"src", "srcset", "data", "poster"}
"""Attributes whose value a browser fetches by itself."""


class Page(HTMLParser):
    """What a page loads, links to, can be linked at, and says."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        self.loads += [value for name, value in given.items() if name in _LOADED]
        self.loads += re.findall(r"url\(([^)]*)\)", given.get("style", ""))
        if tag == "link" and given.get("rel") not in ("canonical", "next", "prev", "alternate"):
            self.loads.append(given["href"])
        elif "href" in given:
            self.links.append(given["href"])

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a warning is an error."""
    out = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", out]
    calm = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=calm, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return out


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    """Every page of the site."""
    found = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    assert len(found) > 20
    return found


def _is_elsewhere(address: str) -> bool:
    parts = urlsplit(address.strip("'\" "))
    return bool(parts.netloc) or parts.scheme not in ("", "data")


def test_no_page_loads_anything_from_another_host(site: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        assert page.loads, path
        assert not [address for address in page.loads if _is_elsewhere(address)], path
    for path in (*site.rglob("*.css"), *site.rglob("*.svg"), *pages):
        text = path.read_text(encoding="utf-8")
        styles = (
            text if path.suffix == ".css" else "".join(re.findall(r"(?s)<style.*?</style>", text))
        )
        used = re.findall(r"url\(([^)]*)\)|@import\s+([^;]*)", styles)
        assert not [one for pair in used for one in pair if one and _is_elsewhere(one)], path


def test_every_internal_link_resolves(pages: dict[Path, Page]) -> None:
    internal = 0
    for path, page in pages.items():
        for link in page.links + page.loads:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            internal += 1
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path}: {link}"
            if parts.fragment and target.suffix == ".html" and parts.fragment != "__skip":
                assert unquote(parts.fragment) in pages[target].anchors, f"{path}: {link}"
    assert internal > 500


def test_documents_that_are_read_in_the_repository_link_to_what_is_there() -> None:
    for path in (*ROOT.glob("*.md"), *(ROOT / "benchmarks").glob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
            assert _is_elsewhere(link) or (path.parent / link).exists(), f"{path}: {link}"


@pytest.mark.parametrize("verb", list(COMMANDS))
def test_every_verb_has_a_page_that_names_all_its_options(
    verb: str, site: Path, pages: dict[Path, Page]
) -> None:
    page = pages[site / "how-to" / f"{verb}.html"]
    words = set(re.findall(r"[\w-]+", "\n".join(page.text)))
    for parameter in COMMANDS[verb].params:
        if parameter.param_type_name == "argument":
            assert parameter.name.upper() in words
        else:
            assert set(parameter.opts) <= words, parameter.name
    source = (DOCS / "how-to" / f"{verb}.md").read_text(encoding="utf-8")
    assert f"elm-lanczos {verb}" in source and "```python" in source and "## Limits" in source


def test_every_option_that_a_page_names_exists() -> None:
    known = {opt for command in COMMANDS.values() for one in command.params for opt in one.opts}
    known |= {"--version", "--help"}
    others = {"--nproc-per-node", "--device", "--whole", "--quick"}  # torchrun, benchmarks
    for path in DOCS.rglob("*.md"):
        for line in re.findall(r"elm-lanczos .*", path.read_text(encoding="utf-8")):
            named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", line))
            assert named <= known | others, f"{path}: {line}"


def test_every_public_name_is_in_the_reference(pages: dict[Path, Page]) -> None:
    anchors = {
        anchor
        for path, page in pages.items()
        if "reference" in path.parts
        for anchor in page.anchors
    }
    for module in (elm_lanczos, elm_lanczos.analysis):
        for name in module.__all__:
            thing = getattr(module, name)
            assert f"{thing.__module__}.{thing.__qualname__}" in anchors, name


def test_search_index_covers_every_page(site: Path, pages: dict[Path, Page]) -> None:
    index = (site / "search" / "search_index.js").read_text(encoding="utf-8")  # read from disk too
    for path in pages:
        if path.name != "404.html":
            assert path.relative_to(site).as_posix() in index
    assert (site / "assets" / "iframe-worker.js").is_file()


def _blocks() -> list[Any]:
    found = []
    for path in sorted(DOCS.rglob("*.md")):
        code = "\n".join(RUNNABLE.findall(path.read_text(encoding="utf-8")))
        if code:
            found.append(pytest.param(code, id=path.relative_to(DOCS).as_posix()))
    return found


@pytest.mark.parametrize("code", _blocks())
def test_python_of_a_page_runs(
    code: str, bundled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    load = elm_lanczos.DetachedModel.from_pretrained
    monkeypatch.setattr(  # the bundled model is loaded once for all pages
        elm_lanczos.DetachedModel,
        "from_pretrained",
        lambda name=None, **options: load(name, **options) if name or options else bundled,
    )
    exec(compile(code, "<page>", "exec"), {})


def test_python_that_does_not_run_in_tests_is_at_least_python() -> None:
    for path in DOCS.rglob("*.md"):
        for block in re.findall(
            r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL
        ):
            compile(block, str(path), "exec")
