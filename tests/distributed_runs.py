"""Programs for torchrun, each process of which does as `elm_lanczos` does and tells what it did.

`-m tests.distributed_runs count FILE` makes the runs whose options FILE lists, and writes beside it
how many vectors each process put through its operators, as `FILE.0`, `FILE.1`, …
`-m tests.distributed_runs fail RANK run …` is the command line, but for one process that meets a
full disk when it writes its first rows.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from elm_lanczos import cli
from elm_lanczos.config import RunConfig
from elm_lanczos.distributed import run
from elm_lanczos.errors import StoreError
from elm_lanczos.operators import TokenOperators
from elm_lanczos.report.json_lines import JsonLines
from elm_lanczos.store import PromptGroup

PRODUCTS = ("rows", "matvec", "rmatvec")


def count_products(patch: pytest.MonkeyPatch, counts: Counter[str]) -> None:
    """Counts the vectors that go through the operators, by kind of product."""

    def counted(name: str) -> Any:
        original = getattr(TokenOperators, name)

        def product(self: TokenOperators, X: torch.Tensor, *index: torch.Tensor) -> torch.Tensor:
            counts[name] += len(X)
            return original(self, X, *index)

        return product

    for name in PRODUCTS:
        patch.setattr(TokenOperators, name, counted(name))


def count(file: Path) -> None:
    counts = []
    for given in json.loads(file.read_text()):
        made: Counter[str] = Counter()
        with pytest.MonkeyPatch.context() as patch:
            count_products(patch, made)
            resume = given.pop("resume", False)
            run(RunConfig(**given), JsonLines(), resume=resume)
        counts.append(made)
    file.with_name(f"{file.name}.{os.environ['RANK']}").write_text(json.dumps(counts))


def refuse(*_: object) -> None:
    raise StoreError("no space left")


if __name__ == "__main__":
    if sys.argv[1] == "count":
        count(Path(sys.argv[2]))
    else:
        if os.environ["RANK"] == sys.argv[2]:
            PromptGroup.write_rows = refuse  # type: ignore[method-assign, assignment]
        sys.argv[1:3] = []
        cli.main()
