"""Stored directions for other tools: a safetensors file of arrays, or one flat table.

A safetensors file holds plain arrays by name and text by name, and no code: any framework reads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from elm_lanczos.errors import UsageError
from elm_lanczos.status import Status
from elm_lanczos.store import PromptResult, Results

if TYPE_CHECKING:
    import pandas as pd

_ARRAYS = "U S V residual stable_rank status token_ids attribution output constant".split()
_PER_TOKEN = set("U S V residual stable_rank status token_ids attribution".split())


def to_safetensors(
    results: Results, path: str | Path, prompts: Sequence[int] | None = None
) -> None:
    """Writes the directions of a store as one safetensors file.

    The arrays of a prompt are `000000.U` (T, k, m), `.S` (T, k), `.V` (T, k, d), `.residual`,
    `.stable_rank`, `.status`, `.token_ids`, `.attribution` (T,), `.output` and `.constant` (m,);
    those of a further output position are `000000.position_0012.U` and so on. Tokens without
    triplets are left out: `.index` (n,) says which of the T tokens the rows are. Metadata are the
    `model`, its `revision`, the `config` of the run and the `prompts` with their texts and tokens,
    the last two as JSON.

    Args:
        results: an opened store.
        path: the file.
        prompts: indices of the prompts to write; all of them by default.

    Raises:
        UsageError: if none of their tokens has triplets.
        DamagedError: if an array cannot be read.
    """
    from safetensors.numpy import save_file

    arrays: dict[str, Any] = {}
    texts: dict[str, Any] = {}
    for result in _predictions(results, prompts):
        rows = _solved(result)
        if not len(rows):
            continue
        name = result.name.removeprefix("prompts/").replace("/", ".")
        arrays[f"{name}.index"] = rows
        for kind in _ARRAYS:
            values = getattr(result, kind)
            arrays[f"{name}.{kind}"] = np.ascontiguousarray(
                values[rows] if kind in _PER_TOKEN else values
            )
        texts[name] = {
            "id": result.id,
            "text": result.text,
            "position": result.position,
            "tokens": result.tokens,
        }
    if not arrays:
        raise UsageError(f"{results.path}: nothing in it has triplets yet")
    config: Any = results.attrs.get("config") or {}
    metadata = {
        "format": "elm-lanczos directions, version 1",
        "model": str(config.get("model") or "the bundled model"),
        "revision": str(config.get("revision") or ""),
        "config": json.dumps(config, ensure_ascii=False),
        "prompts": json.dumps(texts, ensure_ascii=False),
    }
    save_file(arrays, path, metadata)


def to_dataframe(
    results: Results,
    words: Callable[[Sequence[int]], list[str]],
    prompts: Sequence[int] | None = None,
) -> pd.DataFrame:
    """Returns one row for every triplet that is there.

    Args:
        results: an opened store.
        words: texts of token ids.
        prompts: indices of the prompts to take; all of them by default.

    Returns:
        A table of prompt, position, index and text of the token, its attribution, status and stable
        rank; component, singular value and residual; and what the triplet writes and reads, as
        lists of token texts, best first.
    """
    import pandas as pd

    rows = [row for one in _predictions(results, prompts) for row in _rows(one, words)]
    return pd.DataFrame(rows, columns=_COLUMNS)


_COLUMNS = (
    "prompt position index token attribution status stable_rank component singular_value residual "
    "writes reads"
).split()


def _rows(result: PromptResult, words: Callable[[Sequence[int]], list[str]]) -> Iterator[list[Any]]:
    for i in _solved(result):
        of_token = [
            result.id,
            result.position,
            int(i),
            result.tokens[i],
            float(result.attribution[i]),
            Status(int(result.status[i])).name.lower(),
            float(result.stable_rank[i]),
        ]
        for j in range(result.S.shape[1]):
            yield [
                *of_token,
                j,
                float(result.S[i, j]),
                float(result.residual[i, j]),
                words(result.u_token[i, j].tolist()),
                words(result.v_token[i, j].tolist()),
            ]


def _solved(result: PromptResult) -> npt.NDArray[np.int64]:
    """The tokens that have triplets, whether or not they converged."""
    asked = ~np.isin(result.status, (Status.NOT_REQUESTED, Status.PENDING))
    return np.flatnonzero(result.done & asked)


def _predictions(results: Results, prompts: Sequence[int] | None) -> Iterator[PromptResult]:
    """The chosen prompts and their further output positions."""
    for number in range(len(results)) if prompts is None else prompts:
        yield results[number]
        yield from results[number].positions.values()
