"""One run: its options, its model, its store, and the order of things.

What can be refused is refused before a store is made or replaced; what is solved, and how, is told
in `solving`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elm_lanczos.config import ModelConfig, RunConfig, select_positions, select_tokens
from elm_lanczos.errors import UsageError
from elm_lanczos.memory import ceiling
from elm_lanczos.model import DetachedModel
from elm_lanczos.prompts import Prompt, read_prompts
from elm_lanczos.solving import Job, Observer, groups_of, resources, solve_all
from elm_lanczos.storage import checksum
from elm_lanczos.store import ResultStore, Status, open_results
from elm_lanczos.store.place import Address, place_at
from elm_lanczos.store.provenance import package_versions


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        path: the store.
        not_converged: rows that did not reach the tolerance.
        not_exact: predictions whose certificate misses a bound.
    """

    path: Address
    not_converged: int
    not_exact: int


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
    check_destination(config, resume=resume, overwrite=overwrite)
    job = prepare(config, prompts_of(config), observer)
    with open_store(job, observer, resume=resume, overwrite=overwrite) as store:
        observer.opened(store.path, job.model.token_strings)
        forget_damaged(store, job, observer)
        solve_all(store, job, observer)
        store.write_summary()
    return outcome(store.path)


def check_destination(config: RunConfig, *, resume: bool, overwrite: bool) -> None:
    """Refuses options that contradict each other about the store.

    Args:
        config: what to compute.
        resume: continue the store at `config.out` if it exists.
        overwrite: replace it if it exists.

    Raises:
        UsageError: if they do.
        StoreError: if `config.out` is a URL that cannot be used.
    """
    if resume and overwrite:
        raise UsageError("--resume keeps a store and --overwrite replaces it: choose one")
    if resume and config.out is None:
        raise UsageError("--resume needs the store to continue: add --out FOLDER")
    if config.out == "":
        raise UsageError("--out is empty")
    if config.out is not None:
        place_at(config.out)


def prepare(config: RunConfig, prompts: Sequence[Prompt], observer: Observer) -> Job:
    """Loads the model and refuses what can be refused before a store is made or replaced.

    Args:
        config: what to compute.
        prompts: the prompts.
        observer: told what the user should know of them.

    Returns:
        The run, ready to begin.

    Raises:
        UsageError: if the options or prompts cannot be used.
    """
    model = load_model(config)
    if config.k > model.hidden_size:
        raise UsageError(
            f"--k {config.k} is more than the {model.hidden_size} dimensions of {model.name}"
        )
    ids = [_encode(model, prompt, config, observer) for prompt in prompts]
    model.linearize(ids[0], block=config.batch)
    return Job(config, model, prompts, ids, run_fingerprint(config, model, prompts, ids))


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


def stored_config(attributes: Mapping[str, Any]) -> RunConfig:
    """Reads the options of a run from its store, which never make a model's own code run.

    Args:
        attributes: the attributes of the store.

    Returns:
        The options, without trust in code from a hub and without pickled weights.

    Raises:
        ValidationError: if there are none, or they are not as they should be.
    """
    config = RunConfig.model_validate(attributes.get("config"))
    return config.model_copy(update={"trust_remote_code": False, "allow_pickle": False})


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
    names = "k generate method tol tokens positions batch top seed gate precision revision".split()
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


def prompts_of(config: RunConfig) -> list[Prompt]:
    """Returns the prompts of a run.

    Args:
        config: names a file of prompts, or holds one.

    Returns:
        The prompts; at least one.

    Raises:
        UsageError: if they cannot be read.
    """
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


def open_store(
    job: Job, observer: Observer, *, resume: bool, overwrite: bool, sharing: int = 1
) -> ResultStore:
    """Creates or continues the store of a run, and computes with its threads from here on.

    Args:
        job: the run.
        observer: told what the user should know of the store.
        resume: continue the store if it exists.
        overwrite: replace it if it exists.
        sharing: processes that share the memory of the device.

    Returns:
        The store, locked.

    Raises:
        StoreError: if it cannot be created or continued.
    """
    path = job.config.out or default_path()
    if resume and place_at(path).exists(""):
        store = ResultStore.open(path, "r+")
        store.resume(job.fingerprint, observer.note)
    else:
        store = _create_store(path, job, observer, overwrite, sharing)
    try:
        torch.set_num_threads(resources(store)["threads"])
    except BaseException:
        store.close()
        raise
    return store


def _create_store(
    path: str | Path, job: Job, observer: Observer, overwrite: bool, sharing: int
) -> ResultStore:
    config, model = job.config, job.model
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
            "memory": int(config.memory or ceiling(model.device) // sharing),
            "threads": torch.get_num_threads(),
        },
    }
    return ResultStore.create(
        path,
        attrs=attrs,
        fingerprint=job.fingerprint,
        overwrite=overwrite,
        note=observer.note,
    )


def forget_damaged(
    store: ResultStore, job: Job, observer: Observer, beat: Callable[[], None] = lambda: None
) -> None:
    """Reads what a continued run has done, so that what is damaged is computed again.

    Args:
        store: the store, open for writing.
        job: the run.
        observer: told which files are damaged.
        beat: called before each group is read.
    """
    for number in range(len(job.prompts)):
        for group in groups_of(store, number).values():
            beat()
            for fault in group.forget_damaged():
                observer.note(f"{fault}; it is computed again")


def _encode(model: DetachedModel, prompt: Prompt, config: RunConfig, observer: Observer) -> Tensor:
    """The token ids of a prompt, once it is known that every token asked for exists."""
    try:
        ids = model.encode(prompt.text)
        for position in select_positions(config.positions, len(ids)):
            select_tokens(config.tokens, position + 1)
    except UsageError as error:
        raise UsageError(f"prompt {prompt.id}: {error}") from error
    longest, length = model.max_length, len(ids) + config.generate
    if longest is not None and length > longest:
        observer.note(
            f"prompt {prompt.id} has {length} tokens, more than the {longest} that {model.name} "
            "was trained for: the model itself may be poor there"
        )
    return ids


def outcome(path: Address) -> Outcome:
    """Returns how the run of a store ended.

    Args:
        path: the store, all of whose predictions are finished.

    Returns:
        What in it is not certain.
    """
    not_converged = not_exact = 0
    for prompt in open_results(path):
        for result in (prompt, *prompt.positions.values()):
            not_converged += int((result.status == Status.NOT_CONVERGED).sum())
            not_exact += not result.certificate.get("exact", False)
    return Outcome(path, not_converged, not_exact)
