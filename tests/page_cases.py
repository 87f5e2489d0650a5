"""A long prompt's results without a long run: what `open_results` gives, made up in memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np

from elm_lanczos.status import Status

FIGURES = {
    name: 1e-7 for name in ("fidelity", "raised", "reconstruction", "leak", "adjoint", "affinity")
}
WORDS = ["the", " peace", " nation", ",", " men", " of", "\n", " العربية", " 和平", " $x_1$"]


def long_prompt(
    tokens: int, k: int = 2, features: int = 16, top: int = 4, name: str = "prompts/000000"
) -> SimpleNamespace:
    """One finished prediction; the first token did not converge, the last was not requested."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 4096, tokens)
    names = [WORDS[i % len(WORDS)] for i in ids]
    shared = rng.standard_normal((40, features))
    near = [
        (shared[rng.integers(0, 40, (tokens, k))] + rng.standard_normal((tokens, k, features)))
        for _ in "UV"
    ]
    unit = [values / np.linalg.norm(values, axis=-1, keepdims=True) for values in near]
    status = np.full(tokens, Status.CONVERGED, dtype=np.uint8)
    status[0] = Status.NOT_CONVERGED
    status[-1] = Status.NOT_REQUESTED
    size = rng.uniform(0.5, 2.0, (tokens, 1)) * (1 + np.sin(np.arange(tokens) / 500)[:, None] / 2)
    share = rng.standard_normal(tokens) ** 3
    decoded = [rng.integers(0, 4096, (tokens, k, top)).astype(np.int32) for _ in "uv"]
    scores = [-np.sort(-rng.uniform(0, 1, (tokens, k, top)), axis=-1) for _ in "uv"]
    rows = {
        "S": 9.0 / np.arange(1, k + 1) * size,
        "residual": np.full((tokens, k), 1e-6),
        "error_bound": np.full((tokens, k), 1e-6),
        "stable_rank": rng.uniform(1.0, 5.0, tokens),
        "stable_rank_error": np.full(tokens, 0.01),
        "contribution_norm": np.ones(tokens),
        "U": unit[0],
        "V": unit[1],
    }
    for values in rows.values():
        values[-1] = np.nan
    logit = {"target": 5, "logit": float(share.sum()), "constant": 0.0, "bias": 0.0, "error": 1e-8}
    predicted = [{"id": 5, "token": " United", "logit": 6.5, "probability": 0.4}]
    text = "".join(names)
    return SimpleNamespace(
        layers={},
        **rows,
        name=name,
        id="long",
        text=text,
        prompt=text,
        position=tokens - 1,
        positions={},
        plan={"svd": {"method": "stream", "reason": "made up", "tol": 1e-5}},
        certificate=FIGURES | {"dtype": "float32", "exact": True, "failures": []},
        attrs={"attribution": logit, "predicted": predicted, "seconds": 100.0},
        token_ids=ids.astype(np.int32),
        tokens=names,
        n_iter=np.full(tokens, 3, dtype=np.int32),
        status=status,
        u_token=decoded[0],
        u_score=scores[0],
        v_token=decoded[1],
        v_score=scores[1],
        output=np.zeros(features),
        attribution=share,
    )


class MadeUpRun(list[SimpleNamespace]):
    """Predictions as `open_results` gives them."""

    path = Path("made-up.zarr")
    complete = True
    attrs: ClassVar[dict[str, object]] = {"title": "made up"}

    def group(self, name: str) -> SimpleNamespace:
        """The prediction of a name."""
        return next(prompt for prompt in self if prompt.name == name)
