"""Options: files, precedence, the nearest key, token selections."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elm_lanczos.config import RunConfig, run_config, select_positions, select_tokens
from elm_lanczos.errors import UsageError
from elm_lanczos.prompts import read_prompts

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("all", [0, 1, 2, 3, 4, 5]),
        ("last:2", [4, 5]),
        ("last:99", [0, 1, 2, 3, 4, 5]),
        ("first:2", [0, 1]),
        ("0,5,2,2", [0, 2, 5]),
        ("-1", [5]),
        ("1:6:2", [1, 3, 5]),
        ("::3", [0, 3]),
    ],
)
def test_token_selections(spec: str, expected: list[int]) -> None:
    assert select_tokens(spec, 6) == expected


@given(st.text(max_size=12), st.integers(1, 50))
def test_any_selection_is_valid_or_refused(spec: str, length: int) -> None:
    try:
        chosen = select_tokens(spec, length)
    except UsageError as error:
        assert "--tokens" in str(error)
    else:
        assert chosen == sorted(set(chosen)) and 0 <= chosen[0] <= chosen[-1] < length


def test_options_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("k: 3\nseq-file: a.txt\nseed: 7\n")
    config = run_config(file, {"k": 5, "text": None}, RunConfig)
    assert (config.k, config.seq_file, config.seed, config.top) == (5, "a.txt", 7, 8)
    assert run_config(file, {"text": "b"}, RunConfig).seq_file is None  # another source replaces it


def test_demo_configuration_is_valid() -> None:
    config = run_config(ROOT / "configs" / "demo.yaml", {}, RunConfig)
    assert isinstance(config, RunConfig) and (ROOT / str(config.seq_file)).exists()


@given(st.binary(max_size=200))
def test_any_bytes_are_prompts_or_a_clear_error(tmp_path_factory: object, data: bytes) -> None:
    file = (
        Path("/dev/shm" if Path("/dev/shm").exists() else ".")
        / f"elm_lanczos_prompts_{os.getpid()}.txt"
    )
    file.write_bytes(data)
    try:
        prompts = read_prompts(file)
    except UsageError as error:
        assert "\n" not in str(error)
    else:
        assert prompts and all(prompt.text.strip() for prompt in prompts)
    finally:
        file.unlink()


def test_prompt_files_keep_lines_and_names(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_bytes("\ufeffone\r\n\n two \u2028 still two\n".encode())
    assert [(p.id, p.text) for p in read_prompts(file)] == [
        ("0", "one"),
        ("1", " two \u2028 still two"),
    ]
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"text": "a\\nb", "id": "x"}\n{"text": "c", "id": 7}\n')
    assert [(p.id, p.text) for p in read_prompts(lines)] == [("x", "a\nb"), ("7", "c")]


def test_positions_are_named_as_tokens_are_or_last() -> None:
    assert select_positions("last", 7) == select_positions("last:1", 7) == [6]
    assert select_positions("all", 3) == [0, 1, 2]
    with pytest.raises(UsageError, match="--positions 7: the prompt has only 7 tokens"):
        select_positions("7", 7)


def test_numbers_that_begin_with_one() -> None:
    def chosen(spec: str) -> list[int]:
        return select_tokens(spec, 8, "--layers", of="the model", what="layers", start=1)

    assert chosen("all") == list(range(1, 9)) and chosen("last:2") == [7, 8]
    assert chosen("first:2") == [1, 2] and chosen("8,1,-1") == [1, 8]
    assert chosen("1:8:2") == [1, 3, 5, 7] and chosen("2:") == list(range(2, 9))
    assert chosen(":-1") == list(range(1, 8))
    for spec in ("0", "9", "0:3"):
        with pytest.raises(UsageError, match="the model has layers 1 to 8"):
            chosen(spec)
