"""The style that all figures share, and what results of analyses are written as."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib
import pandas as pd
import pytest
import torch
import xarray
from rich.console import Console

from elm_lanczos import DetachedModel, cli
from elm_lanczos.analysis import Attribution, attribute
from elm_lanczos.certificate import Certificate
from elm_lanczos.errors import UsageError
from elm_lanczos.report.figures.style import PALETTE, legible, token_label
from elm_lanczos.report.text import printable
from tests.figures import assert_legible

SCRIPTS = (
    "中国| 人民|Россия|السلام| عليكم|Việt|ữ|😀| 🚀|\U0001f468\u200d\U0001f469|$x^2$|$|\x1b[31m|"
    "<b>|\n|\u202eabc|ไทย|한국|"
).split("|")


def _attribution(tokens: list[str], prompt: str = "a prompt") -> Attribution:
    shares = torch.randn(len(tokens), generator=torch.Generator().manual_seed(0)).double()
    constant = 1.0 - float(shares.sum())
    return Attribution(
        model="a model",
        prompt=prompt,
        target=1,
        contrast=None,
        target_token=" 世界",
        contrast_token="",
        logit=1.0,
        model_logit=1.0,
        tokens=tokens,
        shares=shares,
        constant=constant,
        bias=0.0,
        bound=1e-5,
    )


@pytest.mark.parametrize("length", [1, 10, 58, 59, 150, 500])
def test_labels_of_many_tokens_do_not_overlap(length: int) -> None:
    assert_legible(_attribution([f" token{i}" for i in range(length)]).plot())


def test_every_script_is_legible_in_a_figure() -> None:
    assert_legible(_attribution(SCRIPTS).plot())
    assert token_label("$x^2$") == r"\$x^2\$"
    assert token_label(" 世界").endswith("世界") or "U+4E16" in token_label(" 世界")
    assert "\x1b" not in legible("\x1b[31m") and "\u202e" not in legible("\u202eabc")
    assert legible("\U0001f680") in ("\U0001f680", ":rocket:")  # by its name where no font has it
    assert token_label("") == '""'


def test_joined_emoji_stay_joined_in_a_terminal_and_control_characters_do_not_pass() -> None:
    family = "👨\u200d👩\u200d👧"
    assert printable(family) == family
    assert printable("\x1b[31m\u202e\u2066\ufeff") == "\\x1b[31m\\u202e\\u2066\\ufeff"


def test_colours_can_be_told_apart_without_colour_vision() -> None:
    """Simulated by Viénot, Brettel & Mollon (1999), for protanopia and deuteranopia."""
    to_lms = torch.tensor(
        [[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]]
    ).double()
    blind = {
        "protanopia": [[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]],
        "deuteranopia": [[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]],
    }
    rgb = torch.tensor([matplotlib.colors.to_rgb(c) for c in PALETTE[:6]]).double() ** 2.2
    for matrix in blind.values():
        seen = rgb @ (to_lms.inverse() @ torch.tensor(matrix).double() @ to_lms).T
        seen = seen.clamp(0, 1) ** (1 / 2.2)
        distances = torch.pdist(seen)
        assert distances.min() > 0.1  # of a range of √3; red and green of equal light are at 0.03


def test_matplotlib_is_left_as_it_was() -> None:
    before = dict(matplotlib.rcParams)
    _attribution(["a", "b"]).plot()
    assert dict(matplotlib.rcParams) == before


def test_equal_results_are_equal_files(tmp_path: Path) -> None:
    for suffix in (".svg", ".png", ".json", ".html"):
        files = [tmp_path / f"{number}{suffix}" for number in (1, 2)]
        for file in files:
            _attribution(["a", " b"]).save(file)
        assert files[0].read_bytes() == files[1].read_bytes(), suffix


def test_every_form_holds_the_result(tmp_path: Path) -> None:
    result = _attribution(SCRIPTS, prompt="a <script>prompt</script>")
    for suffix in (".json", ".csv", ".png", ".svg", ".pdf", ".html", ".zarr"):
        result.save(tmp_path / f"result{suffix}")
    stored = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    shares = result.shares.tolist()
    assert [row["share"] for row in stored["rows"]] == shares
    assert [row["token"] for row in stored["rows"]] == SCRIPTS
    table = pd.read_csv(tmp_path / "result.csv", keep_default_na=False, lineterminator="\n")
    assert table["token"].tolist() == SCRIPTS
    with xarray.open_zarr(tmp_path / "result.zarr", consolidated=False) as dataset:
        assert dataset["share"].values.tolist() == shares
        assert dataset.attrs["prompt"] == result.prompt
    page = (tmp_path / "result.html").read_text(encoding="utf-8")
    assert "<script>" not in page and "&lt;script&gt;" in page and "<b>" not in page
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "result.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "said"), [("x.bmp", "use a name that ends in"), ("no/x.png", "no folder")]
)
def test_a_file_that_cannot_be_written_is_said(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        _attribution(["a"]).save(tmp_path / name)


def test_a_folder_that_is_no_result_is_not_replaced(tmp_path: Path) -> None:
    result, path = _attribution(["a", " b"]), tmp_path / "run.zarr"
    result.save(path)
    result.save(path)  # what an analysis has written may be written again
    for content in ('{"attributes": {"format": "elm-lanczos results"}}', "[]", "no JSON"):
        (path / "zarr.json").write_text(content, encoding="utf-8")
        with pytest.raises(UsageError, match="would be lost"):
            result.save(path)
        assert (path / "share").is_dir()


def test_words_in_a_table_of_values_are_json(tmp_path: Path) -> None:
    class Worded(Attribution):
        def to_dataframe(self) -> pd.DataFrame:
            return pd.DataFrame({"writes": [[" a", 'b"'], []]})

    Worded(**vars(_attribution(["a"]))).save(tmp_path / "words.csv")
    table = pd.read_csv(tmp_path / "words.csv")
    assert [json.loads(words) for words in table["writes"]] == [[" a", 'b"'], []]


def test_a_notebook_and_a_terminal_show_the_result_escaped() -> None:
    result = _attribution(SCRIPTS, prompt="<script>alert(1)</script>\x1b[2J")
    page = result._repr_html_()
    assert "<script>" not in page and "data:image/png;base64," in page and "\x1b" not in page
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(result)
    shown = console.export_text()
    assert "中国" in shown and "السلام" in shown and "😀" in shown and "\x1b" not in shown
    assert result.plot()._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]


def test_long_tables_say_what_they_leave_out() -> None:
    result = _attribution([f" token{i}" for i in range(1000)])
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(result)
    shown = console.export_text()
    assert "940 more rows" in shown and "token0 " in shown and "token999" in shown


def test_what_is_not_exact_is_a_doubt(tiny: DetachedModel) -> None:
    result = attribute(tiny.linearize(torch.tensor([0, 5, 9])))
    assert result.doubts == [] and result.certificate is not None
    figures = {"reconstruction": 1.0}
    broken = Certificate(**{**vars(result.certificate), **figures})
    wrong = Attribution(**{**vars(result), "certificate": broken})
    assert "reconstruction" in wrong.doubts[0]
    off = Attribution(**{**vars(result), "constant": result.constant + 1})
    assert "sum" in off.doubts[0]
    assert "not exact" in json.dumps(wrong.to_dict())


def _run(arguments: list[str]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["elm-lanczos", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
    return int(end.value.code or 0)


def test_attribute_at_the_command_line(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(tiny_folder)]
    out = tmp_path / "shares.csv"
    arguments = ["attribute", "the people of", *model, "--json", "--out", str(out)]
    assert _run([*arguments, "--target", "the", "--contrast", "id:7"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["contrast"] == 7 and found["error"] <= 1e-5 and found["doubts"] == []
    total = sum(row["share"] for row in found["rows"]) + found["constant"] + found["bias"]
    assert abs(total - found["logit"]) <= 1e-5 * max(1, abs(found["logit"]))
    assert len(pd.read_csv(out)) == len(found["rows"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "two words here"], "give one of them, or id:N"),
        (["--target", "id:99999999"], "ids are 0"),
        (["--target", ""], "the token is empty"),
        (["--target", "id:7", "--contrast", "id:7"], "same token"),
        (["--position", "99"], "outside"),
        (["--out", "x.bmp"], "use a name that ends in"),
        (["--compute-dtype", "float16"], "compute-dtype"),
        (["--model", "/no/such/model"], "not found"),
    ],
)
def test_what_cannot_be_attributed_is_said(
    tiny_folder: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [] if "--model" in arguments else ["--model", str(tiny_folder)]
    assert _run(["attribute", "the people", *model, *arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error
