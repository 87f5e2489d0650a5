"""One prediction as plain data: what `--json` prints, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from elm_lanczos.status import Status
from elm_lanczos.store import PromptResult
from elm_lanczos.store.attributes import to_json

Words = Callable[[Sequence[int]], list[str]]
"""Maps token ids to their texts."""


def record(result: PromptResult, words: Words) -> dict[str, Any]:
    """Returns everything of a prediction but the vectors themselves.

    Args:
        result: one prediction of a store.
        words: texts of token ids.

    Returns:
        Plain data that strict JSON can hold.
    """
    return {
        "id": result.id,
        "text": result.text,
        "position": result.position,
        "predicted": result.attrs.get("predicted"),
        "certificate": result.certificate,
        "attribution": result.attrs.get("attribution"),
        "method": result.plan["svd"]["method"],
        "store": str(result.path),
        "tokens": [_token(result, words, i) for i in range(len(result.tokens))],
    }


def json_line(result: PromptResult, words: Words) -> str:
    """Returns `record` as one line of strict JSON (no NaN)."""
    return json.dumps(to_json(record(result, words)), ensure_ascii=False, allow_nan=False)


def _token(result: PromptResult, words: Words, i: int) -> dict[str, Any]:
    status = Status(int(result.status[i]))
    token: dict[str, Any] = {
        "index": i,
        "id": int(result.token_ids[i]),
        "token": result.tokens[i],
        "status": status.name.lower(),
        "attribution": float(result.attribution[i]),
    }
    if status in (Status.NOT_REQUESTED, Status.PENDING):
        return token
    return token | {
        "singular_values": result.S[i].tolist(),
        "residual": result.residual[i].tolist(),
        "error_bound": result.error_bound[i].tolist(),
        "stable_rank": float(result.stable_rank[i]),
        "stable_rank_error": float(result.stable_rank_error[i]),
        "contribution_norm": float(result.contribution_norm[i]),
        "writes": [words(ids) for ids in np.asarray(result.u_token[i])],
        "reads": [words(ids) for ids in np.asarray(result.v_token[i])],
    }
