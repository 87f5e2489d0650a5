r"""Stable ranks and spectra of several models over many phrases.

The stable rank `‖J_i‖_F² / σ_1²` says how many directions a token's detached Jacobian uses. One
phrase says little about a model; so the triplets of every token of many phrases are computed, and
their distributions are compared between models, position by position, counted from the end (where
the prediction is made) or from the start (where many models park attention).

Prompts of one length go through a model together: one VJP serves all their tokens. Models are
loaded one after another, with the memory of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from elm_lanczos.analysis.result import Analysis, Progress
from elm_lanczos.certificate import Certificate
from elm_lanczos.decode import decode_input, decode_output
from elm_lanczos.errors import UsageError
from elm_lanczos.linearization import Together
from elm_lanczos.model import DetachedModel
from elm_lanczos.status import Status
from elm_lanczos.svd.solve import svd

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_TOGETHER = 256
"""Tokens of prompts of one length that go through a model together."""

_ARRAYS = ("S", "error_bound", "stable_rank", "stable_rank_error", "status")


@dataclass(frozen=True)
class Spectra:
    """What one model gave for all tokens of all prompts; n tokens in the order of the prompts.

    Attributes:
        model: name of the model, unique among those compared.
        shape: (m, d) of each token's Jacobian.
        prompt: (n,), number of the prompt that a token is in.
        index: (n,), its place there, from 0.
        from_end: (n,), its place counted from the end; the last token is at -1.
        token: n texts.
        S: (n, k), the leading singular values, descending.
        error_bound: (n, k), bounds on their errors.
        stable_rank: (n,).
        stable_rank_error: (n,), its standard error; 0 where it is exact.
        status: (n,), codes of `Status`.
        writes: for each token the words of its leading output direction, best first.
        reads: for each token the words of its leading input direction, best first.
        predicted: for each prompt the token that the untouched model predicts.
        method: how the triplets were computed.
        certificate: the worst figures over all prompts.
    """

    model: str
    shape: tuple[int, int]
    prompt: np.ndarray[Any, Any]
    index: np.ndarray[Any, Any]
    from_end: np.ndarray[Any, Any]
    token: list[str]
    S: np.ndarray[Any, Any]
    error_bound: np.ndarray[Any, Any]
    stable_rank: np.ndarray[Any, Any]
    stable_rank_error: np.ndarray[Any, Any]
    status: np.ndarray[Any, Any]
    writes: list[list[str]]
    reads: list[list[str]]
    predicted: list[str]
    method: str
    certificate: Certificate

    @property
    def not_converged(self) -> int:
        """How many tokens' triplets did not converge."""
        met = (Status.CONVERGED, Status.CONVERGED_TO_ROUNDING)
        return int((~np.isin(self.status, met)).sum())


@dataclass(frozen=True, kw_only=True)
class Comparison(Analysis):
    """Stable ranks, spectra and leading directions of several models over many prompts.

    Attributes:
        prompts: the prompts.
        models: what each model gave, in the order asked for.
        origin: where positions are counted from, "end" or "start".
    """

    kind: ClassVar[str] = "compare"

    prompts: list[str]
    models: list[Spectra]
    origin: str = "end"

    def places(self, spectra: Spectra) -> np.ndarray[Any, Any]:
        """Returns (n,) the positions of tokens, from -1 down or from 0 up (see `origin`)."""
        return spectra.from_end if self.origin == "end" else spectra.index

    @property
    def facts(self) -> list[str]:
        """How much was computed of each model, how, and how exactly."""
        return [
            f"{each.model}: {len(each.token)} tokens of {len(self.prompts)} prompts, "
            f"k = {each.S.shape[1]} of {min(each.shape)}, by {each.method}; stable rank "
            f"{_quartiles(each.stable_rank)}; σ within {_worst_bound(each):.0e} of σ_1; "
            f"reconstruction {each.certificate.reconstruction:.1e}, fidelity "
            f"{each.certificate.fidelity:.1e} at worst"
            for each in self.models
        ]

    @property
    def doubts(self) -> list[str]:
        """Names models whose worst certificate misses a bound, and tokens that did not converge."""
        found = []
        for each in self.models:
            if failures := each.certificate.failures:
                worst = (f"{name} {getattr(each.certificate, name):.0e}" for name in failures)
                found.append(f"{each.model} is not exact within the bounds of: {', '.join(worst)}")
            if each.not_converged:
                found.append(
                    f"{each.model}: {each.not_converged} of {len(each.token)} tokens did not "
                    "converge"
                )
        return found

    def to_dataframe(self) -> pd.DataFrame:
        """Returns one row for each model, prompt and token."""
        import pandas as pd

        return pd.concat([self._rows(each) for each in self.models], ignore_index=True)

    def _rows(self, each: Spectra) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(
            {
                "model": each.model,
                "prompt": each.prompt,
                "text": [self.prompts[number] for number in each.prompt],
                "index": each.index,
                "from_end": each.from_end,
                "token": each.token,
                "stable_rank": each.stable_rank,
                "stable_rank_error": each.stable_rank_error,
                **{f"sigma_{j + 1}": each.S[:, j] for j in range(each.S.shape[1])},
                "error_bound": each.error_bound.max(1),
                "status": [Status(int(code)).name.lower() for code in each.status],
                "writes": each.writes,
                "reads": each.reads,
            }
        )

    def distribution(self) -> pd.DataFrame:
        """Returns one row for each model and position: count, median and quartiles.

        Returns:
            Columns model, position, tokens, then q1, median and q3 of the stable rank, its largest
            standard error, and the median of σ_1.
        """
        import pandas as pd

        rows = []
        for each in self.models:
            places = self.places(each)
            for place in sorted(set(places.tolist()), reverse=self.origin == "end"):
                here = places == place
                q1, median, q3 = np.percentile(each.stable_rank[here], (25, 50, 75))
                rows.append(
                    {
                        "model": each.model,
                        "position": place,
                        "tokens": int(here.sum()),
                        "q1": q1,
                        "median": median,
                        "q3": q3,
                        "standard_error": each.stable_rank_error[here].max(),
                        "sigma_1": np.median(each.S[here, 0]),
                    }
                )
        return pd.DataFrame(rows)

    def directions(self) -> pd.DataFrame:
        """Returns the leading directions of the last token, the models side by side.

        Returns:
            One row a prompt; for each model what it predicts and what the leading direction of the
            last token writes.
        """
        import pandas as pd

        columns: dict[str, Any] = {"text": self.prompts}
        for each in self.models:
            last = {int(each.prompt[i]): i for i in np.flatnonzero(each.from_end == -1)}
            order = [last[number] for number in range(len(self.prompts))]
            columns[f"{each.model}: predicts"] = each.predicted
            columns["writes" if len(self.models) == 1 else f"{each.model}: writes"] = [
                each.writes[i] for i in order
            ]
        return pd.DataFrame(columns)

    def tables(self) -> list[pd.DataFrame]:
        """Returns the leading directions side by side, and the distributions by position."""
        return [self.directions(), self.distribution()]

    def facts_to_dict(self) -> dict[str, Any]:
        """Returns the distributions and the worst certificate of each model."""
        return {
            "origin": self.origin,
            "distribution": self.distribution().to_dict(orient="records"),
            "models": {
                each.model: {"method": each.method, "certificate": each.certificate.to_dict()}
                for each in self.models
            },
        }

    def plot(self) -> Figure:
        """Draws the distributions of stable rank by position, and the spectra."""
        from elm_lanczos.report.figures.comparison import draw

        return draw(self)


def compare(
    models: Sequence[str | Path | DetachedModel | None],
    prompts: Sequence[str],
    *,
    k: int = 4,
    method: str = "auto",
    tol: float | None = 1e-2,
    top: int = 4,
    origin: str = "end",
    seed: int = 0,
    memory: int | None = None,
    load: Callable[[Any], DetachedModel] = DetachedModel.from_pretrained,
    progress: Progress | None = None,
) -> Comparison:
    """Computes spectra of every token of many prompts in several models, and compares them.

    Args:
        models: names, folders, or loaded models; None is the bundled one. Those to be loaded are
            loaded once before the work starts, so that one that cannot be ends it at once, and then
            one after another.
        prompts: texts.
        k: triplets for each token.
        method: how they are computed (see `svd`).
        tol: largest residual relative to σ_1. Errors of singular values are of its second order,
            and ‖J‖_F² does not depend on it: 1e-2 is ample for distributions.
        top: words of each leading direction.
        origin: where positions are counted from, "end" or "start".
        seed: of every random vector.
        memory: bytes that linearised layers and what is done with them may use.
        load: loads a model by its name.
        progress: told how many prompts of how many are done.

    Returns:
        The comparison.

    Raises:
        UsageError: if there is no model or no prompt, or an option cannot be used.
    """
    if not models or not prompts:
        raise UsageError("compare needs at least one model and one prompt")
    if origin not in ("end", "start"):
        raise UsageError(f"positions are counted from the 'end' or the 'start', not {origin!r}")
    found: list[Spectra] = []
    for model in _one_after_another(models, prompts, load):
        done = len(found) * len(prompts)

        def tell(some: int, done: int = done) -> None:
            if progress is not None:
                progress(done + some, len(models) * len(prompts))

        options = {"k": k, "method": method, "tol": tol, "seed": seed}
        spectra = _spectra(model, prompts, top, memory, tell, options)
        del model  # before the next one is loaded
        same = sum(each.model.split(" #")[0] == spectra.model for each in found)
        found.append(replace(spectra, model=f"{spectra.model} #{same + 1}") if same else spectra)
    return Comparison(
        model=", ".join(each.model for each in found),
        prompt=f"{len(prompts)} prompts",
        prompts=list(prompts),
        models=found,
        origin=origin,
    )


def _one_after_another(
    models: Sequence[str | Path | DetachedModel | None],
    prompts: Sequence[str],
    load: Callable[[Any], DetachedModel],
) -> Iterator[DetachedModel]:
    """Yields the models; all have been loaded once, and tried on the prompts' texts, before."""
    first: DetachedModel | None = None
    for given in reversed(models):
        first = None  # let the one before go first
        first = given if isinstance(given, DetachedModel) else load(given)
        for prompt in prompts:
            first.encode(prompt)
    for number, given in enumerate(models):
        if isinstance(given, DetachedModel):
            yield given
        elif number == 0 and first is not None:
            yield first
        else:
            first = None
            yield load(given)
        first = None


def _spectra(
    model: DetachedModel,
    prompts: Sequence[str],
    top: int,
    memory: int | None,
    tell: Callable[[int], None],
    options: dict[str, Any],
) -> Spectra:
    """What one model gives for all prompts."""
    ids = [model.encode(prompt) for prompt in prompts]
    parts: dict[int, dict[str, Any]] = {}
    certificates: list[Certificate] = []
    tell(0)
    for numbers in _together([len(each) for each in ids]):
        lins = model.linearize_together([ids[number] for number in numbers], memory=memory)
        decoder = lins[0].decoder
        result = svd(Together(decoder), memory=lins[0].spare_bytes, **options)
        residual = float((result.residual / result.S[:, :1].clamp_min(1e-300)).max())
        certificates += [replace(each, residual=residual) for each in decoder.certificates()]
        length = len(ids[numbers[0]])
        words = {
            "writes": decode_output(result.U[:, 0], model, top).ids,
            "reads": decode_input(result.V[:, 0], model, top).ids,
        }
        for i, number in enumerate(numbers):
            rows = slice(i * length, (i + 1) * length)
            best = int(lins[i].prediction.logits.argmax())
            parts[number] = {
                name: getattr(result, name)[rows].cpu().numpy() for name in _ARRAYS
            } | {
                "token": lins[i].tokens,
                "predicted": model.token_strings([best])[0],
                "method": result.method,
                "shape": tuple(lins[i].shape[1:]),
                **{name: _words(model, found[rows]) for name, found in words.items()},
            }
        tell(len(parts))
    ordered = [parts[number] for number in range(len(prompts))]
    lengths = [len(each) for each in ids]
    arrays: dict[str, Any] = {
        name: np.concatenate([part[name] for part in ordered]) for name in _ARRAYS
    }
    return Spectra(
        model=model.name,
        shape=ordered[0]["shape"],
        prompt=np.repeat(np.arange(len(prompts)), lengths),
        index=np.concatenate([np.arange(length) for length in lengths]),
        from_end=np.concatenate([np.arange(-length, 0) for length in lengths]),
        token=[token for part in ordered for token in part["token"]],
        writes=[words for part in ordered for words in part["writes"]],
        reads=[words for part in ordered for words in part["reads"]],
        predicted=[part["predicted"] for part in ordered],
        method=", ".join(sorted({part["method"] for part in ordered})),
        certificate=_worst(certificates),
        **arrays,
    )


def _words(model: DetachedModel, ids: Tensor) -> list[list[str]]:
    return [model.token_strings(row) for row in ids.tolist()]


def _together(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of the prompts that go through a model together: of one length, some at a time."""
    found = []
    for length in sorted(set(lengths)):
        same = [number for number, other in enumerate(lengths) if other == length]
        several = max(1, _TOGETHER // length)
        found += [same[i : i + several] for i in range(0, len(same), several)]
    return found


def _worst(certificates: Sequence[Certificate]) -> Certificate:
    """The largest of each figure (NaN is larger than any)."""
    worst: dict[str, Any] = {}
    for field in fields(Certificate):
        values = [getattr(each, field.name) for each in certificates]
        if all(isinstance(value, float) for value in values):
            worst[field.name] = max(values, key=lambda x: math.inf if math.isnan(x) else x)
    return replace(certificates[0], **worst)


def _quartiles(values: np.ndarray[Any, Any]) -> str:
    q1, median, q3 = np.percentile(values, (25, 50, 75))
    return f"{median:.3g} (quartiles {q1:.3g} to {q3:.3g})"


def _worst_bound(each: Spectra) -> float:
    largest = np.maximum(each.S[:, :1], torch.finfo(torch.float64).tiny)
    return float((each.error_bound / largest).max())
