"""Results for machines: one JSON object per prediction and line on standard output."""

from __future__ import annotations

import sys

from elm_lanczos.report.record import Words, json_line
from elm_lanczos.report.text import printable
from elm_lanczos.store import PromptResult
from elm_lanczos.store.place import Address
from elm_lanczos.svd.plan import Plan


class JsonLines:
    """Prints each prediction as it is finished; notes go to standard error."""

    def __init__(self) -> None:
        self._words: Words = lambda ids: [f"<{i}>" for i in ids]

    def __enter__(self) -> JsonLines:
        """Nothing to prepare."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Nothing to end."""

    def note(self, message: str) -> None:
        """Prints a line on standard error."""
        print(f"note: {printable(message)}", file=sys.stderr)

    def opened(self, path: Address, words: Words) -> None:
        """Remembers how to spell tokens."""
        self._words = words

    def started(self, number: int, total: int, text: str) -> None:
        """Says nothing."""

    def planned(self, plan: Plan, passes: int) -> None:
        """Says nothing."""

    def passes(self, made: int) -> None:
        """Says nothing."""

    def finished(self, result: PromptResult) -> None:
        """Prints one line."""
        print(json_line(result, self._words), flush=True)
