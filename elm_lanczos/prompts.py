"""Prompts: one per line of a text file, or JSON lines with `text` and `id`."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from elm_lanczos.errors import UsageError

PHRASES = Path(__file__).parent / "bundled" / "phrases.txt"
"""A hundred short phrases, in the public domain, to compare models by."""


@dataclass(frozen=True)
class Prompt:
    """A text and the name it goes by in the results."""

    id: str
    text: str


def read_prompts(source: str | Path) -> list[Prompt]:
    """Reads prompts from a file, or from standard input for `-`.

    A file named `*.jsonl` (or input whose first line is a JSON object) holds one JSON object a
    line, with `text` and, if wanted, `id`; anything else is text with one prompt a line. Blank
    lines are skipped. Prompts without an id are named by their position.

    Args:
        source: a path, or `-`.

    Returns:
        The prompts in order; at least one.

    Raises:
        UsageError: if the file is missing, empty, binary, not UTF-8 or not what it seems to be.
    """
    name = "standard input" if str(source) == "-" else str(source)
    raw = sys.stdin.buffer.read() if str(source) == "-" else _read(Path(source))
    if b"\0" in raw:
        raise UsageError(f"{name} is a binary file, not a list of prompts")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{name} is not UTF-8 (byte {error.start}): convert it, for example with "
            "iconv -f latin1 -t utf-8"
        ) from error
    lines = [(i, line) for i, line in enumerate(re.split(r"\r\n|\n|\r", text), 1) if line.strip()]
    if not lines:
        raise UsageError(f"{name} holds no prompts: put one on each line")
    if name.endswith(".jsonl") or lines[0][1].lstrip().startswith('{"'):
        return _unique([_from_json(name, i, line, n) for n, (i, line) in enumerate(lines)], name)
    return [Prompt(str(n), line) for n, (_, line) in enumerate(lines)]


def _read(path: Path) -> bytes:
    if not path.exists():
        raise UsageError(f"{path} does not exist")
    if path.is_dir():
        raise UsageError(f"{path} is a folder, not a file of prompts")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


def _from_json(name: str, number: int, line: str, position: int) -> Prompt:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # not JSON, or a number of too many digits
        raise UsageError(f"{name} line {number} is not JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise UsageError(f'{name} line {number} must be an object with a string "text"')
    if not record["text"].strip():
        raise UsageError(f'{name} line {number} has an empty "text"')
    if not isinstance(record.get("id", ""), (str, int)):
        raise UsageError(f'{name} line {number}: "id" must be a string or a number')
    label = str(record.get("id", position))
    try:
        (record["text"] + label).encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{name} line {number} holds a lone surrogate, not text") from error
    return Prompt(label, record["text"])


def _unique(prompts: list[Prompt], name: str) -> list[Prompt]:
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise UsageError(f"{name}: the id {prompt.id!r} is used twice")
        seen.add(prompt.id)
    return prompts
