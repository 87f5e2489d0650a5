"""One run: prompts → linear systems → triplets → words → store, prompt by prompt.

Everything that decides the bits of a result (method, block sizes, number of threads, seed) is
resolved when a prompt's group is created and stored with it, so that a resumed run repeats it. Rows
are computed and committed one owner (see `store`) at a time; a prompt is finished when its last
attributes are written.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from elm_lanczos.analysis import attribute
from elm_lanczos.config import ModelConfig, RunConfig, select_tokens
from elm_lanczos.decode import decode_triplets
from elm_lanczos.errors import UnsupportedModelError, UsageError
from elm_lanczos.linearization import Certificate, Linearization
from elm_lanczos.memory import ceiling
from elm_lanczos.model import DetachedModel
from elm_lanczos.operators import TokenOperators
from elm_lanczos.prompts import Prompt, read_prompts
from elm_lanczos.storage import checksum
from elm_lanczos.store import (
    PromptGroup,
    PromptHeader,
    PromptResult,
    ResultStore,
    Status,
    open_results,
)
from elm_lanczos.store.faults import FINISHED
from elm_lanczos.store.provenance import package_versions
from elm_lanczos.svd.cost import faster_dense, predict
from elm_lanczos.svd.plan import Plan
from elm_lanczos.svd.result import SVDResult
from elm_lanczos.svd.solve import plan_for, solve

_WORTH_SECONDS = 1.0
"""Nobody chooses another method to save less than this on a prompt."""

RUNNERS_UP = 5
"""Predicted tokens that are stored beside the best one, itself included."""


class Observer(Protocol):
    """What a run tells while it works; every method may do nothing."""

    def note(self, message: str) -> None:
        """Something the user should know."""

    def opened(self, path: Path, words: Callable[[Sequence[int]], list[str]]) -> None:
        """The store is open; `words` spells token ids."""

    def started(self, number: int, total: int, text: str) -> None:
        """Work on one prediction begins."""

    def planned(self, plan: Plan, passes: int) -> None:
        """The method is chosen; `passes` are predicted."""

    def passes(self, made: int) -> None:
        """So many passes have been made for this prediction."""

    def finished(self, result: PromptResult) -> None:
        """One prediction is in the store."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        path: the store.
        not_converged: rows that did not reach the tolerance.
        not_exact: predictions whose certificate misses a bound.
    """

    path: Path
    not_converged: int
    not_exact: int


@dataclass(frozen=True)
class Prediction:
    """One linear system to solve: the tokens up to and including the output position.

    Attributes:
        prompt: the prompt it belongs to.
        ids: (T,) token ids; the output position is the last.
        text: the text of these tokens.
        continuation: how many of the tokens were generated.
    """

    prompt: Prompt
    ids: Tensor
    text: str
    continuation: int


def run(
    config: RunConfig,
    observer: Observer,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Outcome:
    """Computes the triplets of every prompt into a store.

    Args:
        config: what to compute.
        observer: told what happens.
        resume: continue the store at `config.out` if it exists.
        overwrite: replace the store at `config.out` if it exists.

    Returns:
        Where the results are and whether anything in them is not certain.

    Raises:
        UsageError: if the options or prompts cannot be used.
        ModelError: if the model cannot be loaded or linearised.
        StoreError: if the store cannot be created, continued or written.
    """
    if resume and overwrite:
        raise UsageError("--resume keeps a store and --overwrite replaces it: choose one")
    if resume and config.out is None:
        raise UsageError("--resume needs the store to continue: add --out FOLDER")
    if config.out == "":
        raise UsageError("--out is empty")
    prompts = _prompts(config)
    model = load_model(config)
    if config.k > model.hidden_size:
        raise UsageError(
            f"--k {config.k} is more than the {model.hidden_size} dimensions of {model.name}"
        )
    ids = [_encode(model, prompt, config, observer) for prompt in prompts]
    # everything that can be refused is, before a store is made or replaced
    model.linearize(ids[0], block=config.batch)
    fingerprint = run_fingerprint(config, model, prompts, ids)
    path = Path(config.out) if config.out is not None else default_path()
    with _open_store(path, config, model, fingerprint, resume, overwrite) as store:
        observer.opened(path, model.token_strings)
        torch.set_num_threads(_resources(store)["threads"])
        for number, prompt in enumerate(prompts):
            _solve_prompt(store, model, config, prompt, ids[number], number, len(prompts), observer)
        store.write_summary()
    return _outcome(path)


def _resources(store: ResultStore) -> dict[str, int]:
    """The memory and threads that plans are made for: those of the machine the run began on."""
    resources: Any = store.attrs["resources"]
    return {name: int(resources[name]) for name in ("memory", "threads")}


def load_model(config: ModelConfig) -> DetachedModel:
    """Loads the model a run is about.

    Args:
        config: which model, and how it is to be loaded.

    Returns:
        The model.

    Raises:
        ModelError: if it cannot be loaded.
        UsageError: if the device or a dtype cannot be used.
    """
    options: dict[str, Any] = {
        name: value
        for name in ("revision", "device_map")
        if (value := getattr(config, name)) is not None
    }
    return DetachedModel.from_pretrained(
        config.model,
        dtype=config.dtype,
        compute_dtype=config.compute_dtype,
        gate=config.gate,
        precision=config.precision,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
        use_safetensors=not config.allow_pickle,
        **options,
    )


def default_path() -> Path:
    """Returns a new path `runs/<date>_<time>.zarr` that nothing uses yet."""
    name = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    candidates = [Path("runs") / f"{name}.zarr"]
    while candidates[-1].exists():
        candidates.append(Path("runs") / f"{name}-{len(candidates) + 1}.zarr")
    return candidates[-1]


def run_fingerprint(
    config: RunConfig, model: DetachedModel, prompts: Sequence[Prompt], ids: Sequence[Tensor]
) -> dict[str, object]:
    """Returns everything that must be equal for a run to be continued.

    Args:
        config: the options.
        model: the model, identified by its config and its weights.
        prompts: the prompts.
        ids: their token ids.

    Returns:
        Plain data.
    """
    texts = [(p.id, p.text, i.tolist()) for p, i in zip(prompts, ids, strict=True)]
    hf_config = {
        name: value
        for name, value in model.hf_model.config.to_dict().items()
        if name not in ("_name_or_path", "transformers_version")
    }
    names = "k generate method tol tokens batch top seed gate precision revision".split()
    versions = {k: v for k, v in package_versions().items() if k != "python"}
    return {
        "model": model.name,
        "weights": weights_digest(model),
        "stored_dtype": str(model.dtype),
        "compute_dtype": str(model.compute_dtype),
        "device": model.device.type,
        "model_config": _digest(sorted(hf_config.items())),
        "prompts": _digest(texts),
        "options": {name: getattr(config, name) for name in names},
        "versions": versions,
    }


def weights_digest(model: DetachedModel) -> str:
    """Returns a digest of every weight's name, shape, dtype and bytes (crc32 of each)."""
    sums = []
    for name, weight in model.storage.weights():
        sums.append((name, tuple(weight.shape), str(weight.dtype), checksum(weight)))
    return _digest(sums)


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _prompts(config: RunConfig) -> list[Prompt]:
    if config.seq_file is not None:
        return read_prompts(config.seq_file)
    text = config.text or ""
    if not text.strip():
        raise UsageError("--text is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError("--text is not valid UTF-8") from error
    return [Prompt("0", text)]


def _open_store(
    path: Path,
    config: RunConfig,
    model: DetachedModel,
    fingerprint: Mapping[str, object],
    resume: bool,
    overwrite: bool,
) -> ResultStore:
    if resume and path.exists():
        store = ResultStore.open(path, "r+")
        store.resume(fingerprint)
        return store
    hf_config = model.hf_model.config
    attrs = {
        "title": f"Singular triplets of detached Jacobians of {model.name}",
        "model": {
            "name": model.name,
            "revision": getattr(hf_config, "_commit_hash", None),
            "config": hf_config.to_json_string(),
        },
        "dtype": str(model.compute_dtype).removeprefix("torch."),
        "seed": config.seed,
        "method": config.method,
        "config": config.model_dump(),
        "resources": {
            "memory": int(config.memory or ceiling(model.device)),
            "threads": torch.get_num_threads(),
        },
    }
    return ResultStore.create(path, attrs=attrs, fingerprint=fingerprint, overwrite=overwrite)


# ------------------------------------------------------------------------------ one prompt


def _solve_prompt(
    store: ResultStore,
    model: DetachedModel,
    config: RunConfig,
    prompt: Prompt,
    ids: Tensor,
    number: int,
    total: int,
    observer: Observer,
) -> None:
    """Solves the system of the prompt's prediction, then those of the tokens to generate."""
    first = store.prompts[number] if number < len(store) else None
    lengths = range(len(ids), len(ids) + max(1, config.generate))
    groups = {} if first is None else {len(ids): first}
    groups |= {position + 1: g for position, g in (first.positions if first else {}).items()}
    for fault in (f for group in groups.values() for f in group.forget_damaged()):
        observer.note(f"{fault}; it is computed again")
    missing = [n for n in lengths if n not in groups or not groups[n].attrs.get(FINISHED)]
    full = model.generate(ids, max(missing) - len(ids)) if missing else ids
    for length in lengths:
        if length not in missing:  # of the run that is continued
            done = open_results(store.path).group(groups[length].name)
            observer.started(number, total, done.text)
            observer.finished(done)
            continue
        text = prompt.text + "".join(model.token_strings(full[len(ids) : length]))
        prediction = Prediction(prompt, full[:length], text, length - len(ids))
        observer.started(number, total, text)
        begun = time.perf_counter()
        group, lin, plan = _prepare(store, groups, model, config, prediction, number, observer)
        certificate = lin.certificate()
        if certificate.refuted:
            figures = ", ".join(f"{n} {getattr(certificate, n):.0e}" for n in certificate.refuted)
            raise UnsupportedModelError(
                f"{model.name} is not rewritten exactly ({figures}): no rule fits something in it"
            )
        _write_outputs(group, lin, model, certificate)
        observer.planned(plan, plan.passes[plan.method])
        _write_triplets(group, lin, plan, model, config, observer)
        _finish(group, certificate, time.perf_counter() - begun)
        observer.finished(open_results(store.path).group(group.name))


def _encode(model: DetachedModel, prompt: Prompt, config: RunConfig, observer: Observer) -> Tensor:
    """The token ids of a prompt, once it is known that every token asked for exists."""
    try:
        ids = model.encode(prompt.text)
        select_tokens(config.tokens, len(ids))
    except UsageError as error:
        raise UsageError(f"prompt {prompt.id}: {error}") from error
    longest, length = model.max_length, len(ids) + config.generate
    if longest is not None and length > longest:
        observer.note(
            f"prompt {prompt.id} has {length} tokens, more than the {longest} that {model.name} "
            "was trained for: the model itself may be poor there"
        )
    return ids


def _prepare(
    store: ResultStore,
    groups: dict[int, PromptGroup],
    model: DetachedModel,
    config: RunConfig,
    prediction: Prediction,
    number: int,
    observer: Observer,
) -> tuple[PromptGroup, Linearization, Plan]:
    """Linearises at one prediction, under the stored plan if its group exists already."""
    length = len(prediction.ids)
    if length in groups:
        stored: Any = groups[length].plan
        chain = stored["chain"]
        options = {name: chain[name] for name in ("block", "keep", "narrow")}
        lin = model.linearize(prediction.ids, **options)
        plan = Plan(**stored["svd"])
        if plan.scratch is not None and config.scratch is None:
            raise UsageError("this run keeps rows in a scratch file: add --scratch FOLDER")
        if plan.scratch is not None:
            plan = replace(plan, scratch=config.scratch)
        tokens = select_tokens(config.tokens, length)
        strings = model.token_strings(prediction.ids)
        groups[length].restore(prediction.ids.tolist(), strings, tokens)
        return groups[length], lin, plan
    memory = _resources(store)["memory"]
    lin = model.linearize(prediction.ids, block=config.batch, memory=memory)
    tokens = select_tokens(config.tokens, length)
    batch = TokenOperators(lin, tokens)
    plan = _plan(batch, lin.spare_bytes, config, number, prediction.continuation)
    if number == prediction.continuation == 0 and (line := _hint(batch, config, plan)):
        observer.note(line)
    chain = {"block": lin.block, "keep": lin.keep, "narrow": lin.narrowed}
    header = _header(model, config, prediction, lin, tokens, {"svd": asdict(plan), "chain": chain})
    if prediction.continuation == 0:
        groups[length] = store.create_prompt(header)
    else:
        groups[length] = store.prompts[number].create_position(header)
    return groups[length], lin, plan


def _write_triplets(
    group: PromptGroup,
    lin: Linearization,
    plan: Plan,
    model: DetachedModel,
    config: RunConfig,
    observer: Observer,
) -> None:
    """Computes and commits every owner that is not done yet."""
    tokens = np.flatnonzero(group.requested).tolist()
    batch = TokenOperators(lin, tokens)
    place = {token: i for i, token in enumerate(tokens)}
    pending = group.pending()
    members = [[place[t] for t in group.owners()[owner] if t in place] for owner in pending]
    for which, result in solve(batch, plan, members, observer.passes):
        rows = _rows(group, pending[which], result, model, config.top)
        group.write_rows(pending[which], rows)
        group.commit(pending[which])


def _plan(batch: TokenOperators, memory: int, config: RunConfig, number: int, step: int) -> Plan:
    """The plan of one linear system; its seed depends on the run's, the prompt and the step."""
    seed = int(np.random.SeedSequence([config.seed, number, step]).generate_state(1)[0])
    options = (config.k, config.method, config.tol, seed, memory)
    plan = plan_for(batch, *options, scratch=config.scratch)
    if plan.refusal:
        raise UsageError(plan.refusal)
    return plan


def _hint(batch: TokenOperators, config: RunConfig, plan: Plan) -> str | None:
    """One line where explicit Jacobians would be at least twice as fast, from a timed block."""
    if plan.method == "dense" or plan.passes[plan.method] < 2 * plan.passes["dense"]:
        return None
    methods = (plan.method, "dense")
    costs = predict(batch, config.k, tol=config.tol, memory=plan.memory, methods=methods)
    chosen = costs[plan.method]
    if chosen.seconds is not None and chosen.seconds < _WORTH_SECONDS:
        return None
    return faster_dense(chosen, costs["dense"])


def _header(
    model: DetachedModel,
    config: RunConfig,
    prediction: Prediction,
    lin: Linearization,
    tokens: Sequence[int],
    plan: Mapping[str, object],
) -> PromptHeader:
    _, m, d = lin.shape
    ids = prediction.ids.tolist()
    return PromptHeader(
        id=prediction.prompt.id,
        text=prediction.text,
        token_ids=ids,
        token_strings=model.token_strings(ids),
        m=m,
        d=d,
        k=config.k,
        top=min(config.top, model.embedding.weight.shape[0]),
        dtype=str(lin.output.dtype).removeprefix("torch."),
        requested=tokens,
        position=len(ids) - 1,
        plan=plan,
        attrs={"generated": prediction.continuation},
    )


def _write_outputs(
    group: PromptGroup, lin: Linearization, model: DetachedModel, certificate: Certificate
) -> None:
    """Writes what belongs to the prediction as a whole: output, constant, attribution."""
    logits = lin.prediction.logits.double()
    log_probabilities = torch.log_softmax(logits, -1)
    best = logits.topk(min(RUNNERS_UP, len(logits))).indices
    shares = attribute(lin, int(best[0]))
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
                "target": shares.target,
                "logit": shares.logit,
                "constant": shares.constant,
                "bias": shares.bias,
                "error": shares.error,
            },
        },
    )


def _rows(
    group: PromptGroup,
    owner: int,
    result: SVDResult,
    model: DetachedModel,
    top: int,
) -> dict[str, Any]:
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
    place = [token - group.owners()[owner].start for token in result.tokens]
    for name, values in computed.items():
        rows[name][place] = _numpy(values)
    return rows


def _finish(group: PromptGroup, certificate: Certificate, seconds: float) -> None:
    """Completes the certificate from what is stored, and marks the group as finished."""
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
    gram = np.einsum("nkd,njd->nkj", vectors, vectors, dtype=np.float64)
    return float(np.abs(gram - np.eye(vectors.shape[1])).max())


def _numpy(tensor: Tensor) -> Any:
    return tensor.detach().cpu().numpy()


def _outcome(path: Path) -> Outcome:
    not_converged = not_exact = 0
    for prompt in open_results(path):
        for result in (prompt, *prompt.positions.values()):
            not_converged += int((result.status == Status.NOT_CONVERGED).sum())
            not_exact += not result.certificate.get("exact", False)
    return Outcome(path, not_converged, not_exact)
