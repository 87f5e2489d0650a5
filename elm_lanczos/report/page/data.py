"""A store as the plain data that the page shows: texts once in a table, numbers as packed arrays.

Every text is data of unknown origin. Control and direction characters are spelt out here, and the
page shows texts as text only.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from elm_lanczos.certificate import Certificate
from elm_lanczos.report.page.sharing import compared_components, nearest
from elm_lanczos.report.record import Words
from elm_lanczos.report.text import printable
from elm_lanczos.store import PromptResult, Results
from elm_lanczos.store.attributes import to_json
from elm_lanczos.store.layout import Array

COSINE_UNITS = 10_000
"""Cosines are kept as integers, to four digits."""

FIGURES = {
    "reconstruction": "output against Σ J_i x_i + c",
    "leak": "F(0) with every known constant removed",
    "adjoint": "⟨u, Jv⟩ against ⟨Jᵀu, v⟩",
    "affinity": "F(z) against Jz + c at a random z",
    "raised": "against the model's own code without casts to a lower precision",
    "fidelity": "frozen forward pass against the untouched model",
    "residual": "largest residual of a triplet, relative to σ₁",
    "orthogonality": "largest entry of UᵀU − I and VᵀV − I",
}
"""The figures of a certificate, and what each compares."""

_JOINERS = "\u200c\u200d"
"""Format characters without which words and emoji come apart; they steer nothing."""


def legible(text: str) -> str:
    """Returns text with control, direction and invisible characters spelt out, `⏎` for newlines."""
    return "".join(
        c if c in _JOINERS else "⏎" if c == "\n" else printable(c)
        for c in text.replace("\r\n", "\n")
    )


def token_text(token: str) -> str:
    """Returns a token as the page shows it, its leading space made visible."""
    return legible("␣" + token[1:] if token.startswith(" ") else token) or "∅"


class Vocabulary:
    """The texts of all tokens and words of a page, each once; number 0 is no word.

    Args:
        words: texts of token ids.
    """

    def __init__(self, words: Words) -> None:
        self._words = words
        self._numbers: dict[str, int] = {"": 0}
        self._of_ids: dict[int, int] = {-1: 0}

    @property
    def texts(self) -> list[str]:
        """All texts by their number."""
        return list(self._numbers)

    def numbers(self, texts: Iterable[str]) -> Array:
        """Returns the numbers of texts, uint32."""
        found = [self._numbers.setdefault(token_text(t), len(self._numbers)) for t in texts]
        return np.array(found, dtype=np.uint32)

    def numbers_of_ids(self, ids: Array) -> Array:
        """Returns the numbers of the words that token ids stand for, uint32 of the same shape."""
        unique, places = np.unique(ids, return_inverse=True)
        new = [i for i in unique.tolist() if i not in self._of_ids]
        self._of_ids.update(zip(new, self.numbers(self._words(new)).tolist(), strict=True))
        table = np.array([self._of_ids[i] for i in unique.tolist()], dtype=np.uint32)
        return table[places].reshape(ids.shape)


def pack(array: Array) -> dict[str, Any]:
    """Returns an array as JSON: its type, its shape, and its little-endian bytes in base64."""
    kind, size = array.dtype.kind, array.dtype.itemsize
    narrow = {"f": "float32", "i": f"int{8 * min(size, 4)}", "u": f"uint{8 * min(size, 4)}"}[kind]
    if kind == "u" and size > 2 and array.max(initial=0) < 1 << 16:
        narrow = "uint16"
    values = np.ascontiguousarray(array, dtype=np.dtype(narrow).newbyteorder("<"))
    return {
        "dtype": narrow,
        "shape": list(array.shape),
        "data": base64.b64encode(values.tobytes()).decode("ascii"),
    }


def as_script(value: object) -> str:
    """Returns plain data as JSON that can stand in a script element: ASCII without <, > and &."""
    text = json.dumps(to_json(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def run_data(results: Results, numbers: Iterable[int]) -> dict[str, Any]:
    """Returns what belongs to a run as a whole.

    Args:
        results: the store.
        numbers: the prompts shown, from 1.

    Returns:
        Plain data; prompts with their predictions' positions, but without these themselves.
    """
    attrs: Any = results.attrs
    model = attrs.get("model")
    name = model.get("name") if isinstance(model, Mapping) else model
    fingerprint = attrs.get("fingerprint") or {}
    options = fingerprint.get("options") or {}
    facts = {
        "model": name,
        "revision": model.get("revision") if isinstance(model, Mapping) else None,
        "weights": fingerprint.get("weights"),
        "weights stored as": fingerprint.get("stored_dtype"),
        "computed in": attrs.get("dtype"),
        "device": fingerprint.get("device"),
        **{name: options.get(name) for name in ("tol", "tokens", "positions", "gate", "precision")},
        "seed": attrs.get("seed"),
        **(attrs.get("package_versions") or {}),
        "commit": attrs.get("git_commit"),
    }
    prompts = []
    for number in numbers:
        prompt = results[number - 1]
        predictions = [prompt, *prompt.positions.values()]
        prompts.append(
            {
                "number": number,
                "id": legible(prompt.id),
                "text": legible(prompt.prompt),
                "positions": [prediction.position for prediction in predictions],
                "predicted": [_predicted(prediction) for prediction in predictions],
            }
        )
    return {
        "title": legible(str(attrs.get("title") or results.path)),
        "store": legible(str(results.path).rstrip("/").rpartition("/")[2]),
        "complete": results.complete,
        "of": len(results),
        "facts": [
            {"name": name, "value": legible(str(value))}
            for name, value in facts.items()
            if value is not None
        ],
        "prompts": prompts,
    }


def prediction_data(
    result: PromptResult, vocabulary: Vocabulary, vectors: Callable[[str], Array]
) -> dict[str, Any]:
    """Returns everything of a prediction but the singular vectors themselves.

    Args:
        result: one prediction of a store.
        vocabulary: where texts are put.
        vectors: reads U or V.

    Returns:
        Plain data with packed arrays.
    """
    attrs: Any = result.attrs
    plan = result.plan.get("svd") or {}
    figures = certificate_figures(result.certificate)
    tokens, k = result.S.shape
    m, d, compared, shared = _sharing(result, vectors)
    return {
        "text": legible(result.text),
        "position": result.position,
        "generated": attrs.get("generated") or 0,
        "tokens": tokens,
        "k": k,
        "top": result.u_token.shape[2],
        "m": m,
        "d": d,
        "predicted": [
            {"word": token_text(p["token"]), "probability": p["probability"], "logit": p["logit"]}
            for p in attrs.get("predicted") or []
        ],
        "certificate": figures,
        "logit": _logit(result),
        "method": plan.get("method", result.plan.get("method")),
        "reason": legible(str(plan.get("reason", ""))),
        "tol": plan.get("tol"),
        "seconds": attrs.get("seconds"),
        "compared": compared,
        "arrays": {
            "id": pack(result.token_ids),
            "token": pack(vocabulary.numbers(result.tokens)),
            "status": pack(result.status),
            "S": pack(result.S),
            "residual": pack(result.residual),
            "error_bound": pack(result.error_bound),
            "stable_rank": pack(result.stable_rank),
            "stable_rank_error": pack(result.stable_rank_error),
            "contribution": pack(result.contribution_norm),
            "attribution": pack(result.attribution),
            "iterations": pack(result.n_iter),
            "u_word": pack(vocabulary.numbers_of_ids(result.u_token)),
            "u_score": pack(result.u_score),
            "v_word": pack(vocabulary.numbers_of_ids(result.v_token)),
            "v_score": pack(result.v_score),
            **shared,
        },
        "layers": layers_data(result, vocabulary),
    }


def certificate_figures(certificate: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns a certificate as its verdict and one row a figure.

    Args:
        certificate: the figures by name, as a store has them.

    Returns:
        None if there are none yet.
    """
    if not certificate:
        return None
    names = [field.name for field in dataclasses.fields(Certificate)]
    known = {name: certificate[name] for name in names if name in certificate}
    required = [f.name for f in dataclasses.fields(Certificate) if f.default is dataclasses.MISSING]
    numbers = {name: _number(known.get(name)) for name in required}
    whole = Certificate(**(known | numbers))
    failures = certificate.get("failures", whole.failures)  # as JSON has it, NaN is missing
    rows = [
        {
            "name": name,
            "meets": name not in failures,
            "value": getattr(whole, name),
            "bound": whole.bounds.get(name),
            "meaning": FIGURES[name],
        }
        for name in FIGURES
    ]
    return {
        "exact": certificate.get("exact", whole.exact),
        "failures": failures,
        "dtype": whole.dtype,
        "not_a_chain": legible(whole.not_a_chain),
        "rows": rows,
    }


def layers_data(result: PromptResult, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """Returns the layers of a prediction, one entry per layer, module and kind of Jacobian.

    Args:
        result: one prediction of a store.
        vocabulary: where texts are put.

    Returns:
        Plain data with packed arrays; empty where no layers are stored.
    """
    return [
        {
            "layer": layer,
            "module": legible(module),
            "kind": legible(kind),
            "k": found.S.shape[1],
            "top": found.u_token.shape[2],
            "arrays": {
                "S": pack(found.S),
                "residual": pack(found.residual),
                "stable_rank": pack(found.stable_rank),
                "status": pack(found.status),
                "u_word": pack(vocabulary.numbers_of_ids(found.u_token)),
                "v_word": pack(vocabulary.numbers_of_ids(found.v_token)),
            },
        }
        for (layer, module, kind), found in result.layers.items()
    ]


def _predicted(result: PromptResult) -> str:
    """The word that is predicted; empty while it is not known."""
    predicted: Any = result.attrs.get("predicted") or []
    return token_text(predicted[0]["token"]) if predicted else ""


def _logit(result: PromptResult) -> dict[str, float] | None:
    """How the attribution sums to the logit."""
    share: Any = result.attrs.get("attribution")
    if not share:
        return None
    return {
        "logit": share["logit"],
        "tokens": float(result.attribution.astype(np.float64).sum()),
        "constant": share["constant"],
        "bias": share["bias"],
        "error": share["error"],
    }


def _sharing(
    result: PromptResult, vectors: Callable[[str], Array]
) -> tuple[int, int, int, dict[str, Any]]:
    """The features m and d, how many components are compared, and what they share, packed."""
    tokens, k = result.S.shape
    m = len(result.output)
    packed: dict[str, Any] = {}
    d = compared = 0
    for side in "VU":  # one at a time: they may be large
        values = vectors(side)
        if side == "V":
            d = values.shape[2]
            compared = compared_components(tokens, k, m + d)
        if compared:
            found = nearest(values[:, :compared])
            packed[f"{side.lower()}_near"] = pack(found.index)
            packed[f"{side.lower()}_cosine"] = pack(
                np.rint(found.cosine * COSINE_UNITS).astype(np.int16)
            )
    return m, d, compared, packed


def _number(value: Any) -> float:
    """A figure as it was before it was stored as strict JSON."""
    return float("nan") if value is None else float(value)
