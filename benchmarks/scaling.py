"""Growth with length, width and depth at the shapes of published models of 8B to 70B parameters.

All layers of a model share one layer's random weights (`elm_lanczos.shared_layer`), so that flops
and activations are those of the real model while memory is one layer. Per shape and length T, in
turn and in the same run: a block of VJPs, and the matrix products that the block cannot do without:
v, o, up and down of every layer for `block · T` rows, and `Pᵀ G` of every head. The last layer is
narrowed to the output position (`Linearization.narrowed`): of it only v is for all these rows; o,
up and down are for `block` rows, and Pᵀ is that of one query. The ratio of the two times is the
share of the matrix-product limit. The total time for k triplets of all T tokens is the number
of passes that `svd.plan` predicts over the measured passes per second; the solvers' own algebra,
the preparation of the linear system and that a JVP may not cost what a VJP costs are not in it.

On a CPU a few vectors are pushed through LAYERS layers, the last of them narrowed, and the time of
all L layers, L − 1 full ones and the narrowed one, is extrapolated in proportion to the flops of
these products (`shapes.layer_flops`); what is extrapolated is marked. If anything it is too
slow: the narrowed layer multiplies few rows, in more time than its flops take in a full one. The
first shape is also run at DEPTHS, to show by how much. With one thread the clock is the processor
time, which other programs do not lengthen. On a CUDA device all layers are run, at T = 32 … 2048,
and with `--whole` also every method from start to end:

    OMP_NUM_THREADS=1 python benchmarks/scaling.py --seconds 4
    python benchmarks/scaling.py --device cuda --precision ieee,tf32 --whole
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import psutil
import torch
import typer
from machine import write_results
from rich.console import Console
from rich.table import Table
from shapes import (
    SHAPES,
    layer_flops,
    linear_weights,
    load_shape,
    matrix_products,
    weight_bytes,
)

from elm_lanczos import DetachedModel, svd
from elm_lanczos.errors import UsageError
from elm_lanczos.linearization import Linearization
from elm_lanczos.model import usable_device
from elm_lanczos.shared_layer import VOCABULARY, shared_layer_model
from elm_lanczos.svd.plan import Plan, make_plan
from elm_lanczos.svd.result import SVDResult

METHODS = ("lanczos", "stream", "dense")
PRECISIONS = ("ieee", "tf32")
MOST_REPEATS, MOST_RESTARTS = 7, 5
LAYERS = 3
DEPTHS = (2, 3, 5)
WHOLE_SHAPE, WHOLE_TOKENS = "gemma-3-4b", 427
PAPER = {
    "seconds": 42 * 60 + 47,
    "k": 1,
    "tokens": WHOLE_TOKENS,
    "source": "Golden, TMLR 2025: Gemma 3 4B, float32, one A100, 128 iterations per token",
}
TARGET = 0.6


@dataclass(frozen=True)
class Setting:
    """What is run, resolved for the device.

    Attributes:
        device: where.
        shapes: names of files in `configs/shapes`, the first of which is also run at DEPTHS.
        lengths: sequence lengths T.
        layers: layers that are run at most, the last of them narrowed; all if None.
        rows: rows of a matrix product, `block · T`, as far as whole vectors allow.
        k: triplets for each token.
        seconds: time for each row of the table.
        memory: bytes to work within, for linear systems and plans.
    """

    device: torch.device
    shapes: tuple[str, ...]
    lengths: tuple[int, ...]
    layers: int | None
    rows: int
    k: int
    seconds: float
    memory: int


@dataclass(frozen=True)
class Row:
    """What one shape, length and precision came to.

    Attributes:
        shape: the model.
        precision: of float32 matrix products, 'ieee' or 'tf32'.
        tokens: sequence length T.
        block: vectors in a block.
        layers_run: layers that were run, with the last.
        narrowed: whether the last one was run for the output position alone behind its attention.
        layers: layers that the model has.
        hidden_size: d.
        linear_parameters: of v, o, up and down of one layer.
        weight_bytes: what the parameters really took.
        flops: of the matrix products of one VJP through the layers run.
        whole_flops: of one through all layers.
        full_layer_flops: of one through a layer that is not narrowed.
        prepare_seconds: of the linear system and its linearised layers, for the layers run.
        pass_seconds: of one VJP through the layers run, median.
        product_seconds: of its matrix products alone, median.
        share: of the matrix-product limit, median of the ratios of neighbouring repeats.
        repeats: timed blocks.
        extrapolated: whether the following are, in proportion from `flops` to `whole_flops`.
        passes_per_second: VJPs through all layers.
        passes: that each method is predicted to need for k triplets of all T tokens.
        total_seconds: those passes at that rate, by method: always a prediction.
        peak_bytes: of the device's memory; None on a CPU.
    """

    shape: str
    precision: str
    tokens: int
    block: int
    layers_run: int
    narrowed: bool
    layers: int
    hidden_size: int
    linear_parameters: int
    weight_bytes: int
    flops: int
    whole_flops: int
    full_layer_flops: int
    prepare_seconds: float
    pass_seconds: float
    product_seconds: float
    share: float
    repeats: int
    extrapolated: bool
    passes_per_second: float
    passes: dict[str, int]
    total_seconds: dict[str, float]
    peak_bytes: int | None

    @property
    def full_layer_seconds(self) -> float:
        """The part of `pass_seconds` that a full layer has in `flops`."""
        return self.pass_seconds * self.full_layer_flops / self.flops


@dataclass(frozen=True)
class Whole:
    """One method from start to end.

    Attributes:
        shape: the model.
        precision: of float32 matrix products.
        method: of `svd`.
        tokens: sequence length T.
        tokens_computed: tokens whose triplets were computed.
        k: triplets for each token.
        seconds: for all T tokens, without the model and the linear system.
        extrapolated: whether they are, from the tokens computed in proportion.
        passes: made for the tokens computed.
        share: time that the matrix products of these passes alone would take, over the time taken.
        tol: largest residual asked for, relative to σ₁.
        residual: the largest, relative to σ₁.
        converged: tokens that did.
        speedup: over the paper's time for one triplet of each token.
        peak_bytes: of the device's memory.
    """

    shape: str
    precision: str
    method: str
    tokens: int
    tokens_computed: int
    k: int
    seconds: float
    extrapolated: bool
    passes: int
    share: float
    tol: float
    residual: float
    converged: int
    speedup: float
    peak_bytes: int


# ---------------------------------------------------------------------------- the device


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock_of(device: torch.device) -> str:
    """Returns 'processor' for a CPU with one thread: a time that other programs do not lengthen."""
    return "processor" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Returns the seconds that a call takes, up to the last operation on the device."""
    now = time.process_time if clock_of(device) == "processor" else time.perf_counter
    synchronize(device)
    begun = now()
    work()
    synchronize(device)
    return now() - begun


def free_bytes(device: torch.device) -> int:
    """Returns the memory of a device that nothing uses yet."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def reset_peak(device: torch.device) -> None:
    """Returns unused memory to the device and forgets how much was used at most."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Returns the most memory that tensors took since `reset_peak`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


# ---------------------------------------------------------------------------- one row


def linear_system(model: DetachedModel, tokens: int, **options: Any) -> Linearization:
    """Returns the linear system of a prompt of random tokens."""
    generator = torch.Generator().manual_seed(0)
    return model.linearize(torch.randint(VOCABULARY, (tokens,), generator=generator), **options)


def plan_of(lin: Linearization, method: str, setting: Setting, tokens: int) -> Plan:
    """Returns the plan of `svd` for k triplets of some tokens, within the precision's reach.

    Args:
        lin: the linear system.
        method: of `svd`.
        setting: k and memory.
        tokens: how many.

    Returns:
        The plan; a token that it leaves without convergence is given up soon.
    """
    _, m, d = lin.shape
    options = {"method": method, "memory": setting.memory}
    options |= {"vectors": lin.block, "precision": lin.precision}
    plan = make_plan(tokens, m, d, lin.inputs.dtype, setting.k, **options)
    return dataclasses.replace(plan, max_restarts=MOST_RESTARTS)


def measure(model: DetachedModel, shape: str, layers: int, tokens: int, setting: Setting) -> Row:
    """Times blocks of VJPs and their matrix products in turn.

    Args:
        model: the layers to run.
        shape: what it is called.
        layers: how many layers the whole model has.
        tokens: sequence length T.
        setting: the rest.

    Returns:
        The row.
    """
    device, block = setting.device, max(1, setting.rows // tokens)
    reset_peak(device)
    held: list[Linearization] = []
    options = {"block": block, "memory": setting.memory}
    tracing = seconds_of(lambda: held.append(linear_system(model, tokens, **options)), device)
    (lin,) = held
    _, m, d = lin.shape
    cotangents = torch.randn(block, m, generator=torch.Generator().manual_seed(1)).to(device)
    multiply = matrix_products(model, tokens, block, lin.narrowed)
    linearising = seconds_of(lambda: lin.vjp(cotangents), device)
    multiply()
    synchronize(device)
    vjps, products, begun = [], [], time.perf_counter()
    while not vjps or (len(vjps) < MOST_REPEATS and time.perf_counter() - begun < setting.seconds):
        products.append(seconds_of(multiply, device) / block)
        vjps.append(seconds_of(lambda: lin.vjp(cotangents), device) / block)
    pass_seconds, run = statistics.median(vjps), len(model.layers)
    full, narrow = layer_flops(model, tokens)
    last = narrow if lin.narrowed else full
    flops, whole_flops = (run - 1) * full + last, (layers - 1) * full + last
    rate = flops / whole_flops / pass_seconds
    plan = plan_of(lin, "auto", setting, tokens)
    passes = {method: plan.passes[method] for method in METHODS}
    return Row(
        shape=shape,
        precision=model.precision,
        tokens=tokens,
        block=block,
        layers_run=run,
        narrowed=lin.narrowed,
        layers=layers,
        hidden_size=d,
        linear_parameters=sum(weight.numel() for weight in linear_weights(model.layers[0])),
        weight_bytes=weight_bytes(model),
        flops=flops,
        whole_flops=whole_flops,
        full_layer_flops=full,
        prepare_seconds=tracing + max(0.0, linearising - pass_seconds * block),
        pass_seconds=pass_seconds,
        product_seconds=statistics.median(products),
        share=statistics.median(p / v for p, v in zip(products, vjps, strict=True)),
        repeats=len(vjps),
        extrapolated=run < layers,
        passes_per_second=rate,
        passes=passes,
        total_seconds={method: count / rate for method, count in passes.items()},
        peak_bytes=peak_bytes(device),
    )


# ------------------------------------------------------------------------- whole methods


def whole(model: DetachedModel, method: str, sample: int, setting: Setting) -> Whole:
    """Runs one method from start to end at the paper's length.

    Args:
        model: all layers of WHOLE_SHAPE.
        method: of `svd`.
        sample: tokens that Lanczos computes, as its passes grow with them.
        setting: device, k and memory.

    Returns:
        What it came to.
    """
    device = setting.device
    lin = linear_system(model, WHOLE_TOKENS, memory=setting.memory)
    count = min(sample, WHOLE_TOKENS) if method == "lanczos" else WHOLE_TOKENS
    tokens = [i * WHOLE_TOKENS // count for i in range(count)]
    plan = plan_of(lin, method, setting, tokens=count)
    lin.vjp(torch.ones(lin.block, lin.shape[1], device=device))  # linearises every layer
    lin.jvp(lin.inputs.expand(lin.block, -1, -1))
    multiply = matrix_products(model, WHOLE_TOKENS, lin.block, lin.narrowed)
    multiply()
    floor = statistics.median(seconds_of(multiply, device) / lin.block for _ in range(3))
    del multiply
    reset_peak(device)
    found: list[SVDResult] = []
    made: list[int] = []
    options: dict[str, Any] = {"tokens": tokens, "plan": plan, "progress": made.append}
    taken = seconds_of(lambda: found.append(svd(lin, setting.k, **options)), device)
    (result,), passes = found, made[-1]
    seconds = taken * WHOLE_TOKENS / count
    return Whole(
        shape=WHOLE_SHAPE,
        precision=model.precision,
        method=method,
        tokens=WHOLE_TOKENS,
        tokens_computed=count,
        k=setting.k,
        seconds=seconds,
        extrapolated=count < WHOLE_TOKENS,
        passes=passes,
        share=passes * floor / taken,
        tol=plan.tol,
        residual=float((result.residual / result.S[:, :1]).max()),
        converged=int(result.converged.sum()),
        speedup=PAPER["seconds"] / seconds,
        peak_bytes=peak_bytes(device) or 0,
    )


# ------------------------------------------------------------------------------- growth


def exponent(points: list[tuple[float, float]]) -> float | None:
    """Fits seconds ∝ x^p.

    Args:
        points: x and seconds.

    Returns:
        p by least squares of the logarithms; None for fewer than two different x.
    """
    if len({x for x, _ in points}) < 2:
        return None
    x, y = np.log(np.array(points)).T
    return float(np.polyfit(x, y, 1)[0])


def growth(rows: list[Row], depths: list[Row]) -> dict[str, Any]:
    """Fits how the seconds of one full layer, and with the depth those of one pass, grow.

    Args:
        rows: of all shapes and lengths, one precision.
        depths: of one shape and length at several depths.

    Returns:
        Exponents of a full layer's seconds: with T for each shape; with d, and with the parameters
        of the linear path, for each T. And of the seconds of a pass at several depths, narrowed
        layer included: with its flops, which is 1 where extrapolating by flops is right.
    """

    def across_shapes(tokens: int, name: str) -> float | None:
        return exponent(
            [(getattr(row, name), row.full_layer_seconds) for row in rows if row.tokens == tokens]
        )

    lengths = sorted({row.tokens for row in rows})
    return {
        "T": {
            shape: exponent([(r.tokens, r.full_layer_seconds) for r in rows if r.shape == shape])
            for shape in dict.fromkeys(row.shape for row in rows)
        },
        "d": {str(tokens): across_shapes(tokens, "hidden_size") for tokens in lengths},
        "linear_parameters": {
            str(tokens): across_shapes(tokens, "linear_parameters") for tokens in lengths
        },
        "flops_of_depths": exponent([(row.flops, row.pass_seconds) for row in depths]),
    }


# ------------------------------------------------------------------------------- output


def duration(seconds: float) -> str:
    """Returns a time in the unit that suits it."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.2g} s"


def table_of(rows: list[Row], setting: Setting) -> Table:
    """Returns rows of one precision as a table."""
    where = f"{setting.device.type}, float32 ({rows[0].precision})"
    table = Table(
        title=f"{where}: VJPs, and k = {setting.k} for all T tokens",
        pad_edge=False,
        caption=(
            "layers: run/all; * extrapolated in proportion to flops; totals are predicted passes "
            "over passes/s, without the solvers' own algebra; the vocabulary, which is not on the "
            "linear path, is shrunk"
        ),
    )
    table.add_column("shape", no_wrap=True)
    for column in ("T", "layers", "passes/s", "share", *METHODS):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        mark = "*" if row.extrapolated else ""
        table.add_row(
            row.shape,
            str(row.tokens),
            f"{row.layers_run}/{row.layers}",
            f"{row.passes_per_second:.2g}{mark}",
            f"{row.share:.0%}",
            *(duration(row.total_seconds[method]) + mark for method in METHODS),
        )
    return table


def whole_table(runs: list[Whole]) -> Table:
    """Returns whole runs as a table, beside the paper's time."""
    table = Table(
        title=f"{WHOLE_SHAPE}, {WHOLE_TOKENS} tokens, k = {runs[0].k}; the paper, k = 1: "
        f"{duration(PAPER['seconds'])}",
        caption=f"* extrapolated from the tokens computed; target: share of at least {TARGET:.0%}",
    )
    columns = ("method", "precision", "tokens", "seconds", "share", "× paper", "residual", "GiB")
    for column in columns:
        table.add_column(column, justify="left" if column == "method" else "right")
    for run in runs:
        table.add_row(
            run.method,
            run.precision,
            str(run.tokens_computed),
            f"{run.seconds:.3g}" + ("*" if run.extrapolated else ""),
            f"{run.share:.0%}",
            f"{run.speedup:.3g}",
            f"{run.residual:.0e}",
            f"{run.peak_bytes / 2**30:.3g}",
        )
    return table


def growth_lines(fitted: dict[str, Any]) -> Iterator[str]:
    """Yields the exponents in words."""
    for name, found in fitted.items():
        entries = found.items() if isinstance(found, dict) else [("", found)]
        cells = [f"{key} {p:.2f}".strip() for key, p in entries if p is not None]
        what = "pass" if name == "flops_of_depths" else "full layer"
        if cells:
            yield f"seconds per {what} ∝ {name}^p: p = {', '.join(cells)}"


# ---------------------------------------------------------------------------- the program


@contextlib.contextmanager
def noted_if_too_large(what: dict[str, Any], too_large: list[dict[str, Any]]) -> Iterator[None]:
    """Lets the rest go on where one thing needs more memory than there is.

    Args:
        what: is run.
        too_large: what did not fit is appended here.

    Yields:
        Nothing.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        too_large.append(what)


def resolve(
    device: torch.device, shapes: str, lengths: str | None, layers: int | None, **options: Any
) -> Setting:
    """Completes the options with the defaults of a device.

    Args:
        device: where to run.
        shapes: names separated by commas.
        lengths: numbers separated by commas, or None.
        layers: how many to run at most, or None.
        **options: rows (or None), k and seconds.

    Returns:
        The setting.

    Raises:
        BadParameter: where there is no such shape.
    """
    known = {path.stem for path in SHAPES.glob("*.yaml")}
    chosen = tuple(shapes.split(","))
    if unknown := sorted(set(chosen) - known):
        raise typer.BadParameter(f"no shape {', '.join(unknown)} among {', '.join(sorted(known))}")
    small = device.type != "cuda"
    lengths = lengths or ("8,32" if small else "32,64,128,256,512,1024,2048")
    options["rows"] = options["rows"] or (128 if small else 8192)
    return Setting(
        device=device,
        shapes=chosen,
        lengths=tuple(int(length) for length in lengths.split(",")),
        layers=layers or (LAYERS if small else None),
        memory=2 ** ((free_bytes(device) // 2).bit_length() - 1),
        **options,
    )


def main(
    device: Annotated[
        str | None, typer.Option(help="Default: cuda where there is one, else cpu.")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="Of float32 matrix products: ieee; on CUDA also ieee,tf32.")
    ] = "ieee",
    shapes: Annotated[
        str, typer.Option(help="Names in configs/shapes, separated by commas.")
    ] = "llama-3.1-8b,qwen-3-14b,qwen-3-32b,llama-3.3-70b",
    lengths: Annotated[
        str | None, typer.Option(help="Sequence lengths T, separated by commas.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=2, help=f"Layers to run; default: all on CUDA, else {LAYERS}.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(help="block · T; default: 8192 on CUDA, else 128.")
    ] = None,
    k: Annotated[int, typer.Option(help="Triplets for each token.")] = 16,
    seconds: Annotated[float, typer.Option(help="Time for the repeats of each row.")] = 8.0,
    with_whole: Annotated[
        bool, typer.Option("--whole", help=f"Every method at {WHOLE_TOKENS} tokens (CUDA).")
    ] = False,
    sample: Annotated[int, typer.Option(help="Tokens of Lanczos's whole run.")] = 64,
) -> None:
    """Print tables and write benchmarks/results/scaling.json (on CUDA scaling-cuda.json).

    Raises:
        BadParameter: where the options do not suit the device.
    """
    try:
        place = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except UsageError as error:
        raise typer.BadParameter(str(error)) from None
    precisions = precision.split(",")
    if unknown := sorted(set(precisions) - set(PRECISIONS)):
        raise typer.BadParameter(f"unknown precision {', '.join(unknown)}")
    if place.type != "cuda" and (with_whole or "tf32" in precisions):
        raise typer.BadParameter("tf32 and --whole need a CUDA device")
    setting = resolve(place, shapes, lengths, layers, rows=rows, k=k, seconds=seconds)
    console = Console()
    found: list[Row] = []
    depths: list[Row] = []
    runs: list[Whole] = []
    too_large: list[dict[str, Any]] = []
    for name in setting.shapes:
        config = load_shape(SHAPES / f"{name}.yaml")
        full = config.num_hidden_layers
        model = shared_layer_model(config, min(setting.layers or full, full), place)
        console.print(f"{name}: weights take {weight_bytes(model) / 2**30:.2f} GiB")
        for mode, tokens in itertools.product(precisions, setting.lengths):
            what = {"shape": name, "tokens": tokens, "precision": mode}
            with noted_if_too_large(what, too_large):
                precise = DetachedModel(model.hf_model, precision=mode)
                found.append(measure(precise, name, full, tokens, setting))
        del model
    name, tokens, mode = setting.shapes[0], max(setting.lengths), precisions[0]
    config = load_shape(SHAPES / f"{name}.yaml")
    for depth in DEPTHS:
        model = shared_layer_model(config, depth, place)
        what = {"shape": name, "tokens": tokens, "precision": mode, "layers": depth}
        with noted_if_too_large(what, too_large):
            full = config.num_hidden_layers
            precise = DetachedModel(model.hf_model, precision=mode)
            depths.append(measure(precise, name, full, tokens, setting))
        del model
    if with_whole:
        model = shared_layer_model(load_shape(SHAPES / f"{WHOLE_SHAPE}.yaml"), device=place)
        for mode, method in itertools.product(precisions, METHODS):
            what = {"shape": WHOLE_SHAPE, "method": method, "precision": mode}
            with noted_if_too_large(what, too_large):
                precise = DetachedModel(model.hf_model, precision=mode)
                runs.append(whole(precise, method, sample, setting))
    fitted = {}
    for mode in precisions:
        if rows_of_mode := [row for row in found if row.precision == mode]:
            fitted[mode] = growth(rows_of_mode, depths if mode == precisions[0] else [])
            console.print(table_of(rows_of_mode, setting))
            for line in growth_lines(fitted[mode]):
                console.print(line)
    if runs:
        console.print(whole_table(runs))
    for what in too_large:
        console.print(f"out of memory: {what}")
    figures = {
        "device": str(place),
        "clock": clock_of(place),
        "k": k,
        "rows_of_a_product": setting.rows,
        "memory": setting.memory,
        "vocabulary": VOCABULARY,
        "rows": [asdict(row) for row in found],
        "depths": [asdict(row) for row in depths],
        "growth": fitted,
        "whole": [asdict(run) for run in runs],
        "paper": PAPER,
        "target_share": TARGET,
        "too_large": too_large,
    }
    path = write_results("scaling" if place.type == "cpu" else f"scaling-{place.type}", figures)
    console.print(f"written to {path.name}")


if __name__ == "__main__":
    typer.run(main)
