"""The page of a run: what stands in it, what it never does, and how it answers in a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from elm_lanczos import cli
from elm_lanczos.certificate import Certificate
from elm_lanczos.config import RunConfig
from elm_lanczos.report.page import page, sharing, write_page
from elm_lanczos.report.page.data import (
    Vocabulary,
    as_script,
    certificate_figures,
    legible,
    pack,
    token_text,
)
from elm_lanczos.report.page.sharing import compared_components, nearest
from elm_lanczos.report.terminal import Terminal
from elm_lanczos.run import run
from elm_lanczos.status import Status
from elm_lanczos.store import PromptResult, open_results
from tests.page_cases import FIGURES, MadeUpRun, long_prompt

HOSTILE = [
    '<script>window.hacked=1</script><img src=x onerror="window.hacked=2"> & \'q\' "dq"',
    "</script><script>window.hacked=3</script><!-- --><style>body{display:none}</style> {{7*7}}",
    "控制 Рос العربية Việt 🎉\u2028\u202e\x1b[31m\u200f $x^2$",
    "%{y} <b>bold</b> <a href='javascript:window.hacked=4'>link</a>\nsecond line",
]
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()


def spell(ids: Any) -> list[str]:
    """Words of token ids where no tokenizer is asked."""
    return [f" w{i}" if i % 2 else f"w{i}<i>" for i in ids]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def store(folder: Path, tiny_folder: Path) -> Path:
    """A run over hostile prompts, with two predictions of each."""
    texts = ["the Soviet Union and the", *HOSTILE]
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"id": f"<b>{n}</b>", "text": t}) + "\n" for n, t in enumerate(texts))
    )
    path = folder / "run.zarr"
    config = RunConfig(
        model=str(tiny_folder),
        seq_file=str(folder / "prompts.jsonl"),
        out=str(path),
        k=3,
        generate=2,
        top=4,
        tokens="last:6",
    )
    run(config, Terminal(quiet=True))
    return path


@pytest.fixture(scope="module")
def html(store: Path) -> Path:
    """Its page, as the command writes it."""
    from elm_lanczos.cli.show import words_of

    results = open_results(store)
    write_page(results, words_of(results.attrs), store.with_suffix(".html"))
    return store.with_suffix(".html")


# ----------------------------------------------------------------------------------- the data


def test_nearest_are_those_of_a_dense_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((23, 5, 12))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    vectors[4] = np.nan
    monkeypatch.setattr(sharing, "_BLOCK", 23 * 5 * 7)  # blocks end inside tokens
    found = nearest(vectors, near=6)
    flat = vectors.reshape(-1, 12)
    cosine = flat @ flat.T
    owner = np.arange(len(flat)) // 5
    cosine[owner[:, None] == owner] = np.nan
    for row, (index, near) in enumerate(
        zip(found.index.reshape(-1, 6), found.cosine.reshape(-1, 6), strict=True)
    ):
        if owner[row] == 4:
            assert (index == -1).all()
            continue
        sizes = np.nan_to_num(np.abs(cosine[row]), nan=-1.0)
        best = np.argsort(-sizes, kind="stable")[:6]
        np.testing.assert_allclose(np.abs(near), sizes[best], atol=1e-6)
        np.testing.assert_allclose(near, cosine[row][index], atol=1e-6)


def test_one_token_has_no_relatives_and_small_prompts_have_few() -> None:
    alone = nearest(np.eye(3)[None])
    assert (alone.index == -1).all() and not alone.cosine.any()
    two = nearest(np.stack([np.eye(3), -np.eye(3)]))
    assert two.index[0, 0, 0] == 3 and two.cosine[0, 0, 0] == -1
    assert (two.index[..., 3:] == -1).all()  # the other token has three directions


def test_only_so_much_is_compared_as_ends_in_time() -> None:
    assert compared_components(8000, 4, 512) == 4
    assert compared_components(8000, 4, 8192) == 2
    assert compared_components(100_000, 16, 8192) == 0
    c = compared_components(20_000, 16, 512)
    assert 0 < c < 16 and (20_000 * c) ** 2 * 512 <= sharing.PRODUCTS


def test_nothing_of_a_text_is_markup_or_steers() -> None:
    value = ["</script><!--", "\u2028\u2029\u202e\ud800&", float("nan"), float("inf")]
    script = as_script(value)
    assert script.isascii() and not set("<>&") & set(script)
    assert json.loads(script) == [*value[:2], None, "Infinity"]
    assert legible("\u202ea\u200fb\x1b\x00\n\r\n") == "\\u202ea\\u200fb\\x1b\\x00⏎⏎"
    assert (
        legible("👩\u200d👧 می\u200cخواهم العربية Việt 和平")
        == "👩\u200d👧 می\u200cخواهم العربية Việt 和平"
    )
    assert [token_text(t) for t in (" a", "", "  ")] == ["␣a", "∅", "␣ "]


def test_vocabulary_has_each_text_once_and_nothing_for_no_word() -> None:
    vocabulary = Vocabulary(spell)
    first = vocabulary.numbers_of_ids(np.array([[3, -1], [4, 3]], dtype=np.int32))
    assert first.tolist() == [[1, 0], [2, 1]]
    assert vocabulary.numbers([" w3", "new"]).tolist() == [1, 3]
    assert vocabulary.texts == ["", "␣w3", "w4<i>", "new"]


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.array([1.5, np.nan, 1e30]), "float32"),
        (np.array([-3, 70_000], dtype=np.int32), "int32"),
        (np.array([-9999, 10_000], dtype=np.int16), "int16"),
        (np.array([0, 65_535], dtype=np.uint32), "uint16"),
        (np.array([0, 65_536], dtype=np.uint32), "uint32"),
        (np.array([4], dtype=np.uint8), "uint8"),
    ],
)
def test_packed_arrays_come_back(array: np.ndarray, dtype: str) -> None:
    packed = pack(array)
    back = np.frombuffer(base64.b64decode(packed["data"]), np.dtype(dtype).newbyteorder("<"))
    assert packed["dtype"] == dtype and packed["shape"] == list(array.shape)
    np.testing.assert_array_equal(back, array.astype(dtype))


def test_certificate_says_which_figure_misses_and_never_calls_a_lost_one_exact() -> None:
    assert certificate_figures({}) is None
    good = certificate_figures(Certificate(**FIGURES).to_dict())
    assert good is not None and good["exact"] and all(row["meets"] for row in good["rows"])
    wrong = Certificate(**(FIGURES | {"leak": float("nan"), "adjoint": 1.0})).to_dict()
    stored = json.loads(as_script(wrong))
    assert stored["leak"] is None
    figures = certificate_figures(stored)
    assert figures is not None and not figures["exact"]
    assert [row["name"] for row in figures["rows"] if not row["meets"]] == ["leak", "adjoint"]
    part = certificate_figures({"reconstruction": 1e-7})
    assert part is not None and not part["exact"]


class _Elements(HTMLParser):
    """Elements of a page, and the content of its scripts, as a browser divides them."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

        self.inside = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.scripts[-1] += data


def test_page_is_one_file_that_runs_its_own_two_scripts_and_asks_for_nothing(html: Path) -> None:
    text = html.read_text(encoding="utf-8")
    elements = _Elements()
    elements.feed(text)
    tags = [tag for tag, _ in elements.found]
    assert "img" not in tags and "link" not in tags and "iframe" not in tags
    assert tags.count("script") == 1 + 5 * 2 + 2  # the run, its predictions, the programs
    assert tags.count("style") == 1
    for tag, attributes in elements.found:
        assert not {"src", "href"} & set(attributes), tag
        assert not [name for name in attributes if name.startswith("on")]
    policy = next(a["content"] for t, a in elements.found if a.get("http-equiv")) or ""
    assert policy.startswith("default-src 'none'") and "connect" not in policy
    for script in elements.scripts[-2:]:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert str(html.parent) not in "".join(elements.scripts[:-2])  # where the run lay is private


def test_page_holds_the_numbers_of_the_store(store: Path, html: Path) -> None:
    elements = _Elements()
    elements.feed(html.read_text(encoding="utf-8"))
    whole, data = (json.loads(text) for text in elements.scripts[:2])
    result = open_results(store)[0]
    assert whole["prompts"][0]["positions"] == [result.position, *result.positions]
    values = base64.b64decode(data["arrays"]["S"]["data"])
    np.testing.assert_array_equal(np.frombuffer(values, "<f4").reshape(-1, 3), result.S)
    index = np.frombuffer(base64.b64decode(data["arrays"]["u_near"]["data"]), "<i4")
    np.testing.assert_array_equal(index.reshape(len(result.tokens), 3, -1), nearest(result.U).index)
    words = np.frombuffer(base64.b64decode(data["arrays"]["v_word"]["data"]), "<u2")
    assert (
        data["text"] == result.text and (words > 0).all() and max(words) < len(whole["vocabulary"])
    )
    predicted: Any = result.attrs["predicted"]
    assert data["predicted"][0]["word"] == token_text(predicted[0]["token"])


def test_page_of_a_run_that_has_not_ended_shows_what_there_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "unfinished.zarr"
    from elm_lanczos.store import ResultStore
    from tests.store_cases import make_header, make_rows

    plan = {"svd": {"method": "stream", "reason": "", "tol": 1e-5}}
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # nothing here must survive a crash
    with ResultStore.create(path, attrs={"title": "t"}, fingerprint={}) as unfinished:
        for number, tokens in enumerate((6, 150)):
            group = unfinished.create_prompt(make_header(tokens, plan=plan), number)
        group.write_rows(0, make_rows(group, 0))
        group.commit(0)
    results = open_results(path)
    text = page(results, spell)
    data = [json.loads(t) for t in re.findall(r"json[^>]*>(.*?)</script>", text)]
    assert data[0]["complete"] is False and [d["certificate"] for d in data[1:]] == [None, None]
    assert data[2]["predicted"] == [] and data[2]["seconds"] is None
    status = np.frombuffer(base64.b64decode(data[2]["arrays"]["status"]["data"]), np.uint8)
    assert (status[:64] != Status.PENDING).all() and (status[64:] == Status.PENDING).all()


# -------------------------------------------------------------------------------- the command


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["elm-lanczos", "report", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return call


def test_command_writes_page_and_figures(
    command: Any, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = command(store, "--prompt", 1, "--figures", tmp_path / "figures")
    assert (code, err) == (0, "") and "written: run.html" in out and "4 figures" in out
    text = (tmp_path / "run.html").read_text()
    assert text.count('class="prediction"') == 2
    assert os.fspath(tmp_path) not in text
    names = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert len(names) == 8 and names[0] == "prompt-0001-position-0006-sequence.png"
    assert all((tmp_path / "figures" / name).stat().st_size > 1000 for name in names)


def test_mistakes_get_one_line(command: Any, store: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.zarr"
    shutil.copytree(store, damaged)
    shard = next(
        path for path in (damaged / "prompts/000001/S").iterdir() if path.name != "zarr.json"
    )
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 0x55
    shard.write_bytes(content)
    for arguments, expected, words in [
        ([tmp_path / "nowhere.zarr"], 1, "does not exist"),
        ([store, "--prompt", "9"], 2, "has prompts 1 to 5"),
        ([store, "--out", tmp_path / "no" / "page.html"], 2, "there is no folder"),
        ([store, "--out", tmp_path], 2, "is a folder"),
        ([damaged, "--out", tmp_path / "page.html"], 1, "damaged"),
    ]:
        code, out, err = command(*arguments)
        assert code == expected and words in err, (arguments, err)
        assert err.startswith("error: ") and err.count("\n") == 1 and not out


# -------------------------------------------------------------------------------- the browser

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """Opens a page from disk; whatever it complains of or asks for fails the test."""
    complaints: list[str] = []
    pages = []

    def opened(path: Path, state: str = "", width: int = 1300, **options: Any) -> Any:
        tab = browser.new_page(viewport={"width": width, "height": 900}, **options)
        pages.append(tab)
        tab.on("console", lambda message: complaints.append(f"console: {message.text}"))
        tab.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        tab.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
        tab.on(
            "request",
            lambda request: (
                request.url.split("#")[0] == path.as_uri()
                or request.url.startswith(("data:", "blob:"))
                or complaints.append(f"request: {request.url}")
            ),
        )
        tab.goto(path.as_uri() + state)
        tab.wait_for_selector("html[data-ready]", timeout=30_000)
        return tab

    yield opened
    for tab in pages:
        assert tab.evaluate("window.hacked") is None
        tab.close()
    assert not complaints


@needs_browser
def test_a_visit_by_mouse(visit: Any, html: Path, store: Path) -> None:
    tab = visit(html)
    result = open_results(store)[0]
    assert tab.inner_text("#prompt-text") == result.text
    assert "exact" in tab.inner_text("#certificate") and "sums to the logit" in tab.inner_text(
        "#certificate"
    )
    tab.click("#token-2")
    assert tab.get_attribute("#token-2", "aria-selected") == "true"
    assert "token=2" in tab.url and "Soviet" in tab.inner_text("#token-title")
    assert f"{result.S[2, 0]:.4g}" in tab.inner_text("#direction-0")
    assert tab.locator("#spectrum .point").count() == 3
    tab.click("#direction-1")
    assert "direction=2" in tab.url and "Direction 2" in tab.inner_text("#direction-title")
    near = nearest(result.U)
    shown = [float(t.replace("−", "-")) for t in tab.locator("#near-u .cosine").all_inner_texts()]
    np.testing.assert_allclose(shown, near.cosine[2, 1], atol=6e-4)
    tab.locator("#near-u button").first.click()
    token, direction = divmod(int(near.index[2, 1, 0]), 3)
    assert f"token={token}&direction={direction + 1}" in tab.url
    tab.locator("#positions button").nth(1).click()
    assert f"position={next(iter(result.positions))}" in tab.url
    tab.click("#prompt-2")
    assert "prompt=3" in tab.url and tab.inner_text("#prompt-text").startswith("</script>")
    tab.click("#view-table")
    tab.locator("#table-head button").nth(1).click()  # by attribution, largest first
    shares = tab.locator("#table-rows .share").all_inner_texts()
    values = [float(t.replace("−", "-")) for t in shares]
    assert values == sorted(values, reverse=True) and len(values) > 5


@needs_browser
def test_a_visit_by_keys(visit: Any, html: Path) -> None:
    tab = visit(html, "#prompt=1&token=0")
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("j")
    assert "token=2&direction=2" in tab.url
    tab.focus("#strip")
    tab.keyboard.press("End")
    assert tab.get_attribute("#strip", "aria-activedescendant") == "token-5"
    assert tab.locator("#token-5[aria-selected=true]").count() == 1
    outline = tab.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"  # the focus is seen
    tab.keyboard.press("n")
    assert "prompt=2" in tab.url
    tab.keyboard.press("p")
    tab.keyboard.press("/")
    tab.keyboard.type("soviet")
    tab.wait_for_selector("#found button")
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowDown")
    assert tab.evaluate("document.activeElement.closest('#found') !== null")
    tab.keyboard.press("Enter")
    assert tab.is_hidden("#found")
    tab.keyboard.press("?")
    assert tab.evaluate("document.getElementById('notation').open")
    tab.keyboard.press("Escape")
    tab.keyboard.press("t")
    assert tab.evaluate("document.documentElement.dataset.theme") == "dark"
    tab.focus("#directions")
    tab.keyboard.press("ArrowUp")
    tab.keyboard.press("ArrowDown")


@needs_browser
def test_search_finds_prompts_tokens_and_words(visit: Any, html: Path) -> None:
    tab = visit(html)
    for query, expected in [("рос", "Prompts"), ("Soviet", "Tokens"), ("a", "words")]:
        tab.fill("#query", query)
        tab.locator("#found", has_text=expected).wait_for()
    tab.fill("#query", "no such thing")
    tab.locator("#found", has_text="Nothing").wait_for()
    tab.fill("#query", "<img")
    tab.wait_for_selector("#found button")
    assert tab.locator("#found img").count() == 0
    tab.locator("#found button").first.click()
    assert "prompt=2" in tab.url and tab.is_hidden("#found")


@needs_browser
def test_the_address_restores_a_state_and_follows_a_link(visit: Any, html: Path) -> None:
    tab = visit(html, "#prompt=1&position=6&token=3&direction=3&view=table&theme=dark")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 21, 24)"
    assert tab.is_visible("#table") and tab.is_hidden("#strip")
    assert "Union" in tab.inner_text("#token-title") and "3" in tab.inner_text("#direction-title")
    assert tab.locator("#positions [aria-selected=true]").inner_text().startswith("6")
    tab.evaluate("location.hash = '#prompt=2&token=1'")
    tab.locator("#prompt-text", has_text="hacked").wait_for()
    for wrong in ("#prompt=99&token=-5&direction=1e9", "#token=x&%%%", "#position=77&theme=red"):
        tab.evaluate(f"location.hash = '{wrong}'")
        tab.wait_for_timeout(100)
        assert tab.locator("#token-title").inner_text()


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_hostile_prompts_are_text_and_legible(visit: Any, html: Path, scheme: str) -> None:
    tab = visit(html, color_scheme=scheme)
    for number, text in enumerate(HOSTILE, start=2):
        tab.evaluate(f"location.hash = '#prompt={number}'")
        tab.locator("#prompt-facts", has_text=f"Prompt {number} ").wait_for()
        assert tab.inner_text("#prompt-text").replace("\xa0", " ").startswith(legible(text)[:20])
        assert tab.locator("main img, main a, main style").count() == 0
        count = tab.locator("#strip .token").count()
        for i in range(0, min(count, 40), 7):
            tab.evaluate(f"location.hash = '#prompt={number}&token={i}'")
        tab.evaluate(f"location.hash = '#prompt={number}&direction=2'")  # a token with triplets
        tab.locator("#direction-title", has_text="Direction 2").wait_for()
        tab.hover("#spectrum .point >> nth=0", force=True)
        tab.wait_for_timeout(50)
    assert "العربية" in tab.inner_text("#prompt-3 .text")
    ratios = tab.evaluate(_CONTRAST)
    assert min(ratios.values()) >= 4.5, ratios


_CONTRAST = """() => {
  const context = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const light = (colour) => {
    context.clearRect(0, 0, 1, 1); context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map((c) => {
      c /= 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (a, b) => {
    const [x, y] = [light(a), light(b)];
    return (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05);
  };
  const style = getComputedStyle(document.documentElement);
  const value = (name) => style.getPropertyValue('--' + name).trim();
  const found = {};
  for (const name of ['text', 'quiet', 'good', 'bad', 'unsure']) {
    for (const ground of ['surface', 'page']) {
      found[name + ' on ' + ground] = ratio(value(name), value(ground));
    }
  }
  for (const name of ['positive', 'negative']) {
    const tint = `color-mix(in srgb, ${value(name)} 62%, ${value('surface')})`;
    const probe = document.body.appendChild(document.createElement('i'));
    probe.style.color = tint;
    found['text on ' + name] = ratio(value('text'), getComputedStyle(probe).color);
    probe.remove();
  }
  return found;
}"""


@needs_browser
def test_a_phone_has_no_sideways_scroll(visit: Any, html: Path) -> None:
    for view in ("strip", "table"):
        tab = visit(html, f"#prompt=2&view={view}", width=360, is_mobile=True, has_touch=True)
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360
        tab.tap("#prompts summary")
        tab.tap("#prompt-3")
        assert "prompt=4" in tab.url
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360


@needs_browser
def test_eight_thousand_tokens_stay_quick(
    visit: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    html = folder / "long.html"
    monkeypatch.setattr(sharing, "PRODUCTS", 8000**2 * 32)  # enough for one direction of each
    write_page(MadeUpRun([long_prompt(8000)]), spell, html)
    assert html.stat().st_size < 10e6
    started = time.monotonic()
    tab = visit(html)
    assert time.monotonic() - started < 20
    assert tab.locator("*").count() < 4000
    assert "1 of 8000 tokens did not converge" in tab.inner_text("#certificate")
    tab.focus("#strip")
    started = time.monotonic()
    tab.keyboard.press("End")
    tab.wait_for_selector("#token-7999[aria-selected=true]")
    tab.keyboard.press("Home")
    tab.wait_for_selector("#token-0[aria-selected=true] .warn")
    tab.click("#token-3")
    assert tab.inner_text("#token-title").startswith("Token 3")
    assert time.monotonic() - started < 9
    assert tab.locator("#near-u button").count() == 8
    tab.click("#direction-1")
    assert "only the first 1 direction" in tab.inner_text("#near-u")
    tab.click("#view-table")
    tab.locator("#table-head button").nth(2).click()
    tab.evaluate("document.querySelector('#table-rows').scrollTop = 100000")
    tab.wait_for_timeout(100)
    assert 5 < tab.locator("#table-rows .row").count() < 60
    assert tab.locator("*").count() < 4000


@needs_browser
def test_layers_are_shown_where_they_are_stored(
    visit: Any, store: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def layers(result: PromptResult) -> dict[tuple[int, str, str], Any]:
        n = len(result.tokens)
        return {
            (layer, module, kind): SimpleNamespace(
                S=result.S * (layer + 1),
                stable_rank=result.stable_rank + layer,
                residual=result.residual,
                status=np.full(n, Status.CONVERGED, dtype=np.uint8),
                u_token=result.u_token,
                v_token=result.v_token,
            )
            for kind, module in (("cumulative", ""), ("layerwise", "mlp"))
            for layer in range(4)
        }

    monkeypatch.setattr(PromptResult, "layers", property(layers), raising=False)
    html = folder / "layers.html"
    write_page(open_results(store), spell, html, [1])
    tab = visit(html)
    assert tab.is_visible("#layers")
    assert tab.locator("#layer-kind option").all_inner_texts() == ["cumulative", "layerwise · mlp"]
    assert tab.locator("#layer-words .option").count() == 4
    tab.select_option("#layer-kind", "layerwise · mlp")
    tab.select_option("#layer-figure", "S")
    assert tab.locator("#layer-map .heatmaplayer image").count() == 1
    tab.keyboard.press("Escape")
