"""The command line. It reads options and prints; everything else happens in `run` and `report`.

Heavy imports stay inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from json import dumps
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elm_lanczos.errors import ElmLanczosError, PeerError, UsageError

if TYPE_CHECKING:
    from elm_lanczos.check import FamilyReport
    from elm_lanczos.config import ModelConfig
    from elm_lanczos.report.record import Words
    from elm_lanczos.run import Outcome

EXIT_ERROR, EXIT_USAGE, EXIT_NOT_CERTAIN, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 3, 130, 143

# options of every verb that loads a model
RevisionOption = Annotated[str | None, typer.Option(help="Revision of the model.")]
DtypeOption = Annotated[
    str | None,
    typer.Option(help="How weights are stored: auto, float64, float32, bfloat16, float16."),
]
GateOption = Annotated[
    str | None, typer.Option(help="Factor of act(g)·u that is fixed: frozen (act(g)) or up.")
]
PrecisionOption = Annotated[
    str | None, typer.Option(help="Of float32 products on CUDA: ieee (default) or tf32.")
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …")]
DeviceMapOption = Annotated[
    str | None, typer.Option(help="Accelerate's placement of the layers, such as auto.")
]
TrustOption = Annotated[
    bool | None, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
]
PickleOption = Annotated[
    bool | None, typer.Option("--allow-pickle", help="Load weights that are no safetensors.")
]

ComputeDtypeOption = Annotated[
    str | None, typer.Option(help="How everything is computed: float32 or float64.")
]

# options of every verb that is about a run
KOption = Annotated[int | None, typer.Option(help="Triplets per token (default: 16)")]
SeqFileOption = Annotated[
    str | None,
    typer.Option(help="Prompts: text, one a line, or JSON lines with text and id; - for stdin."),
]
TextOption = Annotated[str | None, typer.Option(help="One prompt.")]
GenerateOption = Annotated[
    int | None,
    typer.Option(metavar="N", help="Append N greedy tokens; solve each prediction's system."),
]
MethodOption = Annotated[
    str | None, typer.Option(help="auto, lanczos, stream, or dense (default: auto)")
]
TolOption = Annotated[
    float | None,
    typer.Option(help="Residual relative to σ₁ (default: 1e-5 float32, 1e-10 float64)"),
]
TokensOption = Annotated[
    str | None,
    typer.Option(help="Tokens: all, last:8, first:8, 0,5,9 or start:stop:step (default: all)"),
]
PositionsOption = Annotated[
    str | None,
    typer.Option(help="Output positions: last, or as --tokens, such as all (default: last)"),
]
BatchOption = Annotated[int | None, typer.Option(help="Vectors pushed through a layer at once.")]
MemoryOption = Annotated[
    str | None,
    typer.Option(help="Memory to work within, as in 8GiB (default: 70 % of what is free)"),
]
ScratchOption = Annotated[
    str | None,
    typer.Option(help="With --method dense: folder of a file that keeps the Jacobians' rows."),
]
ConfigOption = Annotated[
    Path | None, typer.Option(help="YAML file of these options; options given here win.")
]

app = typer.Typer(
    name="elm-lanczos",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="See a language model's computation as linear algebra.",
)


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """See a language model's computation as linear algebra.

    For one input a decoder is rewritten exactly as y = Σ J_i x_i + c; the leading singular triplets
    of each token's Jacobian J_i say in words what the model reads and what it writes.
    """
    if version:
        from elm_lanczos import __version__

        typer.echo(f"elm-lanczos {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command(
    epilog="Examples:  elm-lanczos run --k 16 --seq-file prompts.txt  ·  "
    "elm-lanczos run --text 'the Soviet Union and the' --generate 3  ·  "
    "elm-lanczos run --config configs/demo.yaml --out demo.zarr --resume  ·  "
    "torchrun --nproc-per-node 4 -m elm_lanczos run --seq-file prompts.txt"
)
def run(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="Hugging Face id or folder (default: bundled model)")
    ] = None,
    revision: RevisionOption = None,
    k: KOption = None,
    seq_file: SeqFileOption = None,
    text: TextOption = None,
    generate: GenerateOption = None,
    out: Annotated[
        str | None,
        typer.Option(help="Folder or URL of the results (default: runs/<date>_<time>.zarr)"),
    ] = None,
    dtype: DtypeOption = None,
    compute_dtype: ComputeDtypeOption = None,
    gate: GateOption = None,
    precision: PrecisionOption = None,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    method: MethodOption = None,
    tol: TolOption = None,
    tokens: TokensOption = None,
    positions: PositionsOption = None,
    batch: BatchOption = None,
    top: Annotated[int | None, typer.Option(help="Words per direction (default: 8)")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random vector.")] = None,
    memory: MemoryOption = None,
    scratch: ScratchOption = None,
    config: ConfigOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the store at --out.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the store at --out.")
    ] = False,
    trust_remote_code: TrustOption = None,
    allow_pickle: PickleOption = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per prediction.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Compute, decode and store the singular triplets of every prompt."""
    from elm_lanczos.config import RunConfig, run_config

    options = run_config(config, _given(context, RunConfig), RunConfig)
    _silence_libraries()
    from elm_lanczos.report.json_lines import JsonLines
    from elm_lanczos.report.terminal import Terminal

    if _processes() > 1:
        from elm_lanczos.distributed import run as run_prompts
    else:
        from elm_lanczos.run import run as run_prompts

    first = _is_first()
    with JsonLines() if json and first else Terminal(quiet=quiet or not first) as observer:
        outcome = run_prompts(options, observer, resume=resume, overwrite=overwrite)
    if first:
        _warn(outcome, quiet=quiet or json)


@app.command(
    epilog="Examples:  elm-lanczos plan --seq-file prompts.txt --k 16  ·  "
    "elm-lanczos plan meta-llama/Llama-3.1-8B --length 128,2048 --device cuda  ·  "
    "elm-lanczos plan path/to/70B/config.json --random --length 128"
)
def plan(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            help="Hugging Face id or folder (default: bundled model); with --random also a "
            "config.json or a model type such as qwen3."
        ),
    ] = None,
    random: Annotated[
        bool,
        typer.Option("--random", help="Time a few random layers of its shape; needs no weights."),
    ] = False,
    revision: RevisionOption = None,
    k: KOption = None,
    seq_file: SeqFileOption = None,
    text: TextOption = None,
    length: Annotated[
        str | None, typer.Option(help="Numbers of tokens instead of prompts, as in 128,2048.")
    ] = None,
    generate: GenerateOption = None,
    dtype: DtypeOption = None,
    compute_dtype: ComputeDtypeOption = None,
    gate: GateOption = None,
    precision: PrecisionOption = None,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    method: MethodOption = None,
    tol: TolOption = None,
    tokens: TokensOption = None,
    positions: PositionsOption = None,
    batch: BatchOption = None,
    memory: MemoryOption = None,
    scratch: ScratchOption = None,
    config: ConfigOption = None,
    trust_remote_code: TrustOption = None,
    allow_pickle: PickleOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Predict passes, time and memory of each method, before anything runs."""
    from elm_lanczos.config import PlanConfig, run_config

    options = run_config(config, _given(context, PlanConfig), PlanConfig)
    if random and options.model is None:
        raise UsageError("--random needs a model type, a config.json or a model to be like")
    _silence_libraries()
    from rich.console import Console

    from elm_lanczos.planning import plan_run
    from elm_lanczos.report.forecast import render_forecast
    from elm_lanczos.run import load_model

    status = Console(stderr=True)
    with status.status("timing a block of passes …"):
        forecast = plan_run(options, None if random else load_model(options))
    if json:
        typer.echo(dumps(forecast.to_dict()))
    else:
        Console().print(render_forecast(forecast))


@app.command(epilog="Example:  elm-lanczos show runs/demo.zarr --prompt 2")
def show(
    store: Annotated[str, typer.Argument(help="A result store: its folder or URL.")],
    prompt: Annotated[
        list[int] | None, typer.Option(help="Number of a prompt, from 1; may be repeated.")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per prediction.")
    ] = False,
) -> None:
    """Print stored results again."""
    from elm_lanczos.report.json_lines import JsonLines
    from elm_lanczos.report.terminal import Terminal
    from elm_lanczos.store import open_results

    _silence_libraries()
    results = open_results(store)
    numbers = range(1, len(results) + 1)
    for number in prompt or ():
        if number not in numbers:
            raise UsageError(f"--prompt {number}: {store} has prompts 1 to {len(results)}")
    words = _words_of(results.attrs)
    with JsonLines() if json else Terminal() as observer:
        observer.opened(results.path, words)
        for number in prompt or numbers:
            result = results[number - 1]
            for prediction in (result, *result.positions.values()):
                observer.started(number - 1, len(results), prediction.text)
                observer.finished(prediction)


@app.command(
    epilog="Examples:  elm-lanczos verify runs/demo.zarr  ·  "
    "elm-lanczos verify runs/demo.zarr --no-model --json"
)
def verify(
    store: Annotated[str, typer.Argument(help="A result store: its folder or URL.")],
    sample: Annotated[
        int | None,
        typer.Option(min=1, help="Rows of each prediction to compute again (default: 4)"),
    ] = None,
    no_model: Annotated[
        bool, typer.Option("--no-model", help="Read the store alone; compute nothing again.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Read every file of a store and compute some rows again; changes nothing.

    Ends with exit code 0 if all that is done is right, also while the run has not ended, which it
    then says; with 1 if something is wrong.
    """
    _verify(store, sample, no_model=no_model, json=json)


def _verify(store: str, sample: int | None, *, no_model: bool, json: bool) -> None:
    """Prints what is wrong with a store, and ends with the exit code that stands for it."""
    if no_model and sample is not None:
        raise UsageError("--sample rows are computed by the model: leave out --no-model")
    _silence_libraries()
    from elm_lanczos.report.verification import verification_lines
    from elm_lanczos.run import load_model
    from elm_lanczos.verify import SAMPLE
    from elm_lanczos.verify import verify as verify_store

    found = verify_store(store, sample=sample or SAMPLE, load=None if no_model else load_model)
    typer.echo(dumps(found.to_dict()) if json else "\n".join(verification_lines(found)))
    if found.faults:
        raise typer.Exit(EXIT_ERROR)


_SENTENCE = "We hold these truths to be self-evident, that all men are created equal"
"""What a model with a tokenizer is checked on if nothing else is given."""


@app.command(
    epilog="Examples:  elm-lanczos check meta-llama/Llama-3.2-1B  ·  "
    "elm-lanczos check path/to/70B/config.json --random  ·  elm-lanczos check deepseek_v3 --random"
    "  ·  elm-lanczos check --all --jobs 4 --out families.md"
)
def check(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            help="Hugging Face id or folder (default: bundled model); with --random also a "
            "config.json or a model type such as qwen3."
        ),
    ] = None,
    random: Annotated[
        bool,
        typer.Option("--random", help="Check a tiny random instance; no weights are needed."),
    ] = False,
    all_: Annotated[
        bool, typer.Option("--all", help="Check every causal architecture of transformers so.")
    ] = False,
    text: Annotated[str | None, typer.Option(help="Prompt to check the model on.")] = None,
    revision: RevisionOption = None,
    dtype: DtypeOption = None,
    compute_dtype: Annotated[
        str | None,
        typer.Option(help="float32 or float64 (default: float64 for random instances)."),
    ] = None,
    gate: GateOption = None,
    precision: PrecisionOption = None,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Seed of every random vector.")
    ] = 0,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="With --all: how many at once (default: 1)")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="With --all: write the table here, as Markdown.")
    ] = None,
    trust_remote_code: TrustOption = None,
    allow_pickle: PickleOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object per model.")] = False,
) -> None:
    """Check that a model's linear system is exact, or name the module where it is not.

    Ends with exit code 0 if it is, 3 if a figure is beyond its bound, 1 if the model is refused.
    """
    from elm_lanczos.config import ModelConfig, validated

    given = _given(context, ModelConfig)
    others = {"text": text, "out": out, "jobs": jobs}
    _refuse_contradictions(given, others, random=random, all_=all_)
    config = validated(ModelConfig, given)
    _silence_libraries()
    if all_:
        reports = _check_all(config, seed=seed, jobs=jobs or 1, out=out, json=json)
    else:
        reports = [_check_one(config, random=random, text=text, seed=seed, json=json)]
    _judge(reports, one=not all_)


def _given(context: typer.Context, kind: type[ModelConfig]) -> dict[str, Any]:
    """The fields of a kind of record that the command line gives, by name."""
    return {
        name: value
        for name, value in context.params.items()
        if name in kind.model_fields and value is not None
    }


def _refuse_contradictions(
    given: dict[str, Any], others: dict[str, Any], *, random: bool, all_: bool
) -> None:
    if all_ and ("model" in given or random):
        raise UsageError("--all checks every architecture: give no model and no --random")
    if random and "model" not in given:
        raise UsageError("--random needs a model type, a config.json or a model to be like")
    if others["out"] is not None:
        if not all_:
            raise UsageError("--out goes with --all")
        others["out"].open("a").close()  # now, not after the sweep
    if others["jobs"] is not None and not all_:
        raise UsageError("--jobs goes with --all")
    if (all_ or random) and others["text"] is not None:
        raise UsageError("random instances have no tokenizer: --text goes with a model's weights")
    of_weights = {"dtype", "device_map", "allow_pickle"} & given.keys()
    of_weights |= {"revision", "trust_remote_code"} & given.keys() if all_ else set()
    if of_weights and (all_ or random):
        name = min(of_weights).replace("_", "-")
        raise UsageError(f"--{name} goes with a model's weights; random instances have none")


def _check_one(
    config: ModelConfig, *, random: bool, text: str | None, seed: int, json: bool
) -> FamilyReport:
    import torch
    from rich.console import Console

    from elm_lanczos.architectures import PROMPT, full_config
    from elm_lanczos.check import check_architecture, check_model
    from elm_lanczos.report.verdicts import render_report
    from elm_lanczos.run import load_model

    if random and config.model is not None:
        options = {"revision": config.revision} if config.revision is not None else {}
        source = full_config(config.model, trust_remote_code=config.trust_remote_code, **options)
        report = check_architecture(
            source,
            dtype=getattr(torch, config.compute_dtype or "float64"),
            gate=config.gate,
            device=config.device or "cpu",
            seed=seed,
        )
    else:
        model = load_model(config)
        try:
            ids = model.encode(_SENTENCE if text is None else text)
        except UsageError:  # no tokenizer, or one that knows no words
            if text is not None:
                raise
            ids = torch.tensor(PROMPT) % model.embedding.weight.shape[0]
        model.embed(ids)  # raises what is wrong with ids
        report = check_model(model, ids, architecture=model.name, seed=seed)
    if json:
        typer.echo(dumps(report.to_dict()))
    else:
        Console().print(render_report(report))
    return report


def _check_all(
    config: ModelConfig, *, seed: int, jobs: int, out: Path | None, json: bool
) -> list[FamilyReport]:
    import torch

    from elm_lanczos.architectures import causal_architectures
    from elm_lanczos.check import check_all, families_table
    from elm_lanczos.report.verdicts import Sweep

    names = causal_architectures()
    with Sweep(len(names), quiet=json) as sweep:
        reports = check_all(
            sweep.finished,
            architectures=names,
            dtype=getattr(torch, config.compute_dtype or "float64"),
            gate=config.gate,
            device=config.device or "cpu",
            jobs=jobs,
            seed=seed,
        )
    if out is not None:
        out.write_text(families_table(reports), encoding="utf-8")
    if json:
        for report in reports:
            typer.echo(dumps(report.to_dict()))
    else:
        typer.echo(families_table(reports) if out is None else f"table in {out}")
    return reports


def _judge(reports: list[FamilyReport], *, one: bool) -> None:
    """Ends with the exit code that stands for the worst report."""
    from elm_lanczos.check import Verdict

    verdicts = {report.verdict for report in reports}
    if verdicts & {Verdict.WRONG, Verdict.CRASH}:
        raise typer.Exit(EXIT_NOT_CERTAIN)
    if one and verdicts != {Verdict.EXACT}:
        raise typer.Exit(EXIT_ERROR)


def _words_of(attrs: Any) -> Words:
    """Returns the texts of token ids by the tokenizer of a store's model, if it can be found."""
    from elm_lanczos.model import load_tokenizer, token_strings

    config = attrs.get("config") or {}
    tokenizer = load_tokenizer(config.get("model"), revision=config.get("revision"))
    return lambda ids: token_strings(tokenizer, ids)


def _warn(outcome: Outcome, *, quiet: bool) -> None:
    """Says what is not certain, and ends with the exit code that stands for it."""
    if not quiet:
        typer.echo(f"results in {outcome.path}  (again: elm-lanczos show {outcome.path})")
    problems = []
    if outcome.not_converged:
        problems.append(f"{outcome.not_converged} rows did not converge (try a larger --tol)")
    if outcome.not_exact:
        problems.append(f"{outcome.not_exact} predictions are not exact within their bounds")
    if problems:
        typer.echo(f"warning: {'; '.join(problems)}", err=True)
        raise typer.Exit(EXIT_NOT_CERTAIN)


def _silence_libraries() -> None:
    """Keeps the libraries below from printing: their messages are not for this command's user."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.disable(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # writes that a signal interrupts
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


class _Signalled(BaseException):
    """SIGINT or SIGTERM arrived."""


def _raise(number: int, _frame: FrameType | None) -> None:
    raise _Signalled(number)


def main() -> None:
    """Runs the command line; every error is one line and an exit code."""
    for number in _SIGNALS:
        signal.signal(number, _raise)
    try:
        code = app(standalone_mode=False)
    except _CommandLineError as error:
        code = _fail(error.format_message(), EXIT_USAGE, quiet=not _is_first())
    except UsageError as error:
        code = _fail(str(error), EXIT_USAGE, quiet=not _is_first())
    except PeerError:
        code = EXIT_ERROR
    except ElmLanczosError as error:
        code = _fail(str(error), EXIT_ERROR)
    except _Signalled as error:
        warnings.simplefilter("ignore", RuntimeWarning)  # of coroutines that nobody awaits any more
        word, code = _SIGNALS[error.args[0]]
        line = f"{word}; finished rows are kept: go on with --resume --out STORE"
        _fail(line, code, quiet=not _is_first())
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_ERROR
    except MemoryError as error:
        code = _fail(f"out of memory ({error}): try a smaller --batch or --k", EXIT_ERROR)
    except OSError as error:
        code = _fail(f"{error.strerror or error}: {error.filename or 'output'}", EXIT_ERROR)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except RuntimeError as error:
        from elm_lanczos.chain import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        code = _fail("out of memory: try a smaller --batch or --k", EXIT_ERROR)
    sys.exit(code or 0)


_SIGNALS = {
    signal.SIGINT: ("interrupted", EXIT_INTERRUPTED),
    signal.SIGTERM: ("terminated", EXIT_TERMINATED),
}
_CommandLineError: Any = next(
    c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException"
)
"""What Typer raises for options it cannot parse (the class itself is not public)."""


def _is_first() -> bool:
    """Whether this is the only process of a run, or the one that speaks for all of them."""
    count, rank = os.environ.get("WORLD_SIZE", ""), os.environ.get("RANK", "")
    return not (count.isdecimal() and rank.isdecimal() and 0 < int(rank) < int(count))


def _processes() -> int:
    """How many processes this run has.

    Returns:
        What the launcher says, 1 if there is none.

    Raises:
        UsageError: if what it says about them cannot be used.
    """
    count = os.environ.get("WORLD_SIZE") or "1"
    if count in ("0", "1"):
        return 1
    advice = "start several processes by torchrun or accelerate launch, or unset WORLD_SIZE"
    for name in ("WORLD_SIZE", "RANK", "MASTER_PORT", "MASTER_ADDR"):
        value = os.environ.get(name)
        if not value:
            raise UsageError(f"WORLD_SIZE is {count!r} but {name} is not set: {advice}")
        if name != "MASTER_ADDR" and not value.isdecimal():
            raise UsageError(f"{name} is {value!r}, which is no number: {advice}")
    if int(os.environ["RANK"]) >= int(count):
        raise UsageError(f"RANK is {os.environ['RANK']} of WORLD_SIZE {count} processes: {advice}")
    return int(count)


def _fail(message: str, code: int, *, quiet: bool = False) -> int:
    from elm_lanczos.report.text import printable

    if not quiet:
        typer.echo(f"error: {printable(' '.join(message.split()))}", err=True)
    return code
