"""The options of a run: one validated record, from a YAML file and the command line."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    StrictInt,
    ValidationError,
    model_validator,
)

from elm_lanczos.errors import UsageError

StoredDtype = Literal["auto", "float64", "float32", "bfloat16", "float16"]
ComputeDtype = Literal["float64", "float32"]
Gate = Literal["frozen", "up"]
Precision = Literal["ieee", "tf32"]
Method = Literal["auto", "lanczos", "stream", "dense"]


class ModelConfig(BaseModel):
    """Which model, how it is stored and computed, and what loading it may do."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(None, description="Hugging Face id or folder; default: bundled model")
    revision: str | None = Field(None, description="revision of the model on the hub")
    dtype: StoredDtype = Field("auto", description="dtype the weights are stored in")
    compute_dtype: ComputeDtype | None = Field(None, description="dtype everything is computed in")
    gate: Gate = Field("frozen", description="the factor of act(g)·u that is fixed: act(g), or u")
    precision: Precision = Field("ieee", description="of float32 matrix products on CUDA")
    device: str | None = Field(None, description="cpu, cuda, cuda:1, …")
    device_map: str | None = Field(None, description="accelerate's placement, for example auto")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")
    allow_pickle: bool = Field(False, description="load weights that are not safetensors")


class AnalysisConfig(ModelConfig):
    """What the verbs of analysis share: a model, an output position and memory."""

    position: StrictInt = Field(-1, description="output position; -1 is the last")
    memory: ByteSize | None = Field(None, ge=1, description="bytes to work within, as in 8GiB")


class RunConfig(ModelConfig):
    """Everything that decides what `elm-lanczos run` computes and where it goes.

    The fields are the keys of a `--config` file and, with dashes, the options of the command line.
    """

    k: StrictInt = Field(16, ge=1, description="singular triplets per token")
    seq_file: str | None = Field(
        None, description="prompts, one a line, or JSON lines; - for stdin"
    )
    text: str | None = Field(None, description="one prompt")
    generate: StrictInt = Field(0, ge=0, description="greedy tokens to append and solve for")
    out: str | None = Field(None, description="folder or URL of the result store")
    method: Method = Field("auto", description="how the triplets are computed")
    tol: float | None = Field(None, gt=0, description="residual to reach, relative to σ₁")
    tokens: str = Field("all", description="positions: all, last:8, 0,5,9 or start:stop:step")
    positions: str = Field("last", description="output positions: last, or as tokens")
    batch: StrictInt | None = Field(None, ge=1, description="vectors per block")
    top: StrictInt = Field(8, ge=1, le=64, description="decoded words per direction")
    seed: StrictInt = Field(0, ge=0, lt=2**63, description="seed of every random vector")
    memory: ByteSize | None = Field(None, ge=1, description="bytes to work within, as in 8GiB")
    scratch: str | None = Field(None, description="dense: folder of a file that keeps the rows")

    @model_validator(mode="after")
    def _one_source_of_prompts(self) -> RunConfig:
        if (self.seq_file is None) == (self.text is None):
            raise ValueError("give prompts with either --seq-file FILE or --text TEXT")
        return self


class PlanConfig(RunConfig):
    """What a run would be, for `elm-lanczos plan`: prompts may be given by their lengths alone."""

    length: str | None = Field(None, description="numbers of tokens instead of prompts")

    @model_validator(mode="after")
    def _one_source_of_prompts(self) -> PlanConfig:
        given = [x for x in (self.seq_file, self.text, self.length) if x is not None]
        if len(given) != 1:
            raise ValueError("give one of --seq-file FILE, --text TEXT and --length 128,2048")
        return self


Options = TypeVar("Options", bound=RunConfig)


def run_config(file: Path | None, given: dict[str, Any], kind: type[Options]) -> Options:
    """Returns the options of a run: those given over those of the file over the defaults.

    Args:
        file: a YAML file of options, or None.
        given: options by field name; None means not given.
        kind: RunConfig, or PlanConfig.

    Returns:
        The validated options.

    Raises:
        UsageError: if a key is unknown (the nearest is named) or a value cannot be used.
    """
    options = _read_yaml(file, kind) if file is not None else {}
    given = {key: value for key, value in given.items() if value is not None}
    sources = ("text", "seq_file", "length")
    if given.keys() & set(sources):  # one source given replaces the other in the file
        options = {k: v for k, v in options.items() if k not in sources}
    return validated(kind, options | given)


Config = TypeVar("Config", bound=BaseModel)


def validated(kind: type[Config], options: dict[str, Any]) -> Config:
    """Returns options as a validated record.

    Args:
        kind: the kind of record.
        options: by field name.

    Returns:
        The record.

    Raises:
        UsageError: if a key is unknown (the nearest is named) or a value cannot be used.
    """
    try:
        return kind(**options)
    except ValidationError as error:
        raise UsageError(_explain(error)) from error


def _read_yaml(file: Path, kind: type[RunConfig]) -> dict[str, Any]:
    try:
        options = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"config {file} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"config {file} cannot be read: {error}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"config {file} is not plain YAML: {reason}") from error
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise UsageError(f"config {file} must be a list of `key: value` lines")
    options = {str(key).replace("-", "_"): value for key, value in options.items()}
    for key in options:
        if key not in kind.model_fields:
            raise UsageError(f"config {file}: unknown key {key!r}{nearest(key)}")
    return options


def nearest(key: str) -> str:
    """Returns a hint naming the option that looks most like `key`, or nothing."""
    close = difflib.get_close_matches(key, list(RunConfig.model_fields), n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else ""


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    field = ".".join(str(part) for part in first["loc"])
    if not field:
        return message
    return f"--{field.replace('_', '-')} {first.get('input')!r}: {message[0].lower()}{message[1:]}"


def select_positions(spec: str, length: int) -> list[int]:
    """Returns the output positions that `--positions` names, in ascending order.

    Args:
        spec: `last`, or what `select_tokens` takes.
        length: number of tokens T.

    Returns:
        Positions in 0 … T - 1, each once.
    """
    return select_tokens("-1" if spec.strip() == "last" else spec, length, "--positions")


def output_positions(config: RunConfig, length: int) -> list[int]:
    """Returns the output positions of a prompt: the one its group is for, then the others in order.

    Args:
        config: `positions` and `generate` count.
        length: number of tokens T of the prompt.

    Returns:
        The largest one within the prompt, smaller ones, and those of the tokens to generate.
    """
    wanted = set(select_positions(config.positions, length))
    wanted |= {length - 1 + step for step in range(config.generate)}
    main = max(position for position in wanted if position < length)
    return [main, *sorted(wanted - {main})]


def select_tokens(
    spec: str,
    length: int,
    option: str = "--tokens",
    *,
    of: str = "the prompt",
    what: str = "tokens",
    start: int = 0,
) -> list[int]:
    """Returns the token positions that `--tokens` names, in ascending order.

    Args:
        spec: `all`, `last:N`, `first:N`, positions `0,5,-1`, or a slice `start:stop:step`.
        length: number of tokens T.
        option: the option to name in errors.
        of: what has so many, for errors.
        what: of what, for errors.
        start: the number of the first of them.

    Returns:
        Numbers in start … start + T - 1, each once.

    Raises:
        UsageError: if the selection cannot be read, is outside the prompt, or is empty.
    """
    spec = spec.strip()
    everything = range(start, start + length)

    def place(number: str) -> int:
        """The place of a number; negative ones count from the end."""
        if 0 <= int(number) < start:
            raise IndexError
        return int(number) - start * (int(number) >= start)

    try:
        if spec == "all":
            chosen: Any = everything
        elif spec.startswith("last:"):
            chosen = everything[-int(spec[5:]) :] if int(spec[5:]) else []
        elif spec.startswith("first:"):
            chosen = everything[: int(spec[6:])]
        elif ":" in spec:
            chosen = _sliced(everything, spec, place)
        else:
            chosen = [everything[place(part)] for part in spec.split(",")]
    except IndexError as error:
        there = f"{what} {start} to {length}" if start else f"only {length} {what}"
        raise UsageError(f"{option} {spec}: {of} has {there}") from error
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"{option} {spec}: use all, last:8, first:8, positions like 0,5,9, or start:stop:step"
        ) from error
    if not chosen:
        raise UsageError(f"{option} {spec} selects none of the {length} {what}")
    return sorted(set(chosen))


def _sliced(numbers: range, spec: str, place: Callable[[str], int]) -> range:
    """A slice `start:stop:step` of numbers, of which start and stop are some."""
    ends, step = spec.split(":")[:2], spec.split(":")[2:]
    begin, end = (place(one) if one else None for one in ends)
    return numbers[slice(begin, end, *(int(one) if one else None for one in step))]
