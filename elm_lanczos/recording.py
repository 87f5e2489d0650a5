"""What a solved prediction leaves in its group of the store (see `store`): rows and attributes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elm_lanczos.analysis.attribution import shares_of
from elm_lanczos.certificate import Certificate
from elm_lanczos.decode import decode_triplets
from elm_lanczos.linearization import Linearization
from elm_lanczos.model import DetachedModel
from elm_lanczos.store import PromptGroup
from elm_lanczos.store.faults import FINISHED
from elm_lanczos.svd.result import SVDResult

RUNNERS_UP = 5
"""Predicted tokens that are stored beside the best one, itself included."""


def write_outputs(
    group: PromptGroup, lin: Linearization, model: DetachedModel, certificate: Certificate
) -> None:
    """Writes what belongs to the prediction as a whole: output, constant, attribution.

    Args:
        group: the group of the prediction.
        lin: its linear system.
        model: the model.
        certificate: of the system, without the figures of triplets.
    """
    logits = lin.prediction.logits.double()
    log_probabilities = torch.log_softmax(logits, -1)
    best = logits.topk(min(RUNNERS_UP, len(logits))).indices
    shares, logit = shares_of(lin, lin.readout(int(best[0]))), float(logits[best[0]])
    words = model.token_strings(best)
    group.write_outputs(
        output=_numpy(lin.output),
        constant=_numpy(lin.constant),
        attribution=_numpy(shares.tokens),
        attrs={
            "certificate": certificate.to_dict(),
            "predicted": [
                {
                    "id": int(i),
                    "token": word,
                    "logit": float(logits[i]),
                    "probability": float(log_probabilities[i].exp()),
                }
                for i, word in zip(best.tolist(), words, strict=True)
            ],
            "attribution": {
                "target": int(best[0]),
                "logit": logit,
                "constant": shares.constant,
                "bias": shares.bias,
                "error": abs(shares.total - logit) / max(abs(logit), 1.0),
            },
        },
    )


def rows_of(
    group: PromptGroup,
    owner: int,
    tokens: Sequence[int],
    result: SVDResult,
    model: DetachedModel,
    top: int,
) -> dict[str, Any]:
    """Returns the rows of one owner.

    Args:
        group: the group of the prediction.
        owner: the number of the owner.
        tokens: the tokens of the owner that were solved.
        result: their triplets.
        model: spells the words.
        top: words of each direction.

    Returns:
        The values by the name of their array; rows of other tokens are empty.
    """
    words = decode_triplets(result, model, top)
    assert result.contribution is not None  # tokens have inputs
    computed = {
        "U": result.U,
        "V": result.V,
        "S": result.S,
        "residual": result.residual,
        "error_bound": result.error_bound,
        "stable_rank": result.stable_rank,
        "stable_rank_error": result.stable_rank_error,
        "contribution_norm": result.contribution.norm(dim=-1),
        "n_iter": result.n_iter,
        "status": result.status,
        "u_token": words.u.ids,
        "u_score": words.u.scores,
        "v_token": words.v.ids,
        "v_score": words.v.scores,
    }
    rows = group.empty_rows(owner)
    place = [token - group.owners()[owner].start for token in tokens]
    for name, values in computed.items():
        rows[name][place] = _numpy(values)
    return rows


def finish(group: PromptGroup, certificate: Certificate, seconds: float) -> None:
    """Completes the certificate from what is stored, and marks the group as finished.

    Args:
        group: the group of the prediction, with all its rows.
        certificate: of its linear system, without the figures of triplets.
        seconds: what it took.
    """
    residuals, overlaps = [0.0], [0.0]
    for owner, tokens in enumerate(group.owners()):
        asked = group.requested[tokens.start : tokens.stop]
        if not asked.any():
            continue
        S, residual, U, V = (
            group.read_rows(owner, name)[asked] for name in ("S", "residual", "U", "V")
        )
        residuals.append(float((residual / np.where(S[:, :1] > 0, S[:, :1], 1)).max()))
        overlaps += [_orthogonality(U), _orthogonality(V)]
    # A NaN stays one, which the maximum of Python's floats does not see to.
    certificate = replace(
        certificate,
        residual=float(np.max(residuals)),
        orthogonality=float(np.max(overlaps)),
    )
    group.set_attrs(
        {"certificate": certificate.to_dict(), "seconds": round(seconds, 3), FINISHED: True}
    )


def _orthogonality(vectors: Any) -> float:
    """Largest entry of XᵀX − I over all tokens, for vectors (n, k, ·)."""
    X = torch.from_numpy(np.ascontiguousarray(vectors)).double()
    return float((X @ X.mT - torch.eye(X.shape[1])).abs().max())


def _numpy(tensor: Tensor) -> Any:
    return tensor.detach().cpu().numpy()
