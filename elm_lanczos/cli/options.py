"""Options that several verbs have."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from elm_lanczos.config import ModelConfig

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


def given(context: typer.Context, kind: type[ModelConfig]) -> dict[str, Any]:
    """The fields of a kind of record that the command line gives, by name."""
    return {
        name: value
        for name, value in context.params.items()
        if name in kind.model_fields and value is not None
    }
