"""Steering a concept onto another prompt: what it gains and costs, on pairs it was not tuned on.

The gain is the rise of the log-probability of the concept's own words (`concept_tokens`: chosen
from the concept alone): at each step, the log of their total probability; the mean over the steps
of the steered continuation under the steered model, less that of the unsteered continuation under
the unsteered model. The cost is the unsteered model's loss on the steered text less that on its
own, nats a token. Both texts are greedy. The control is the rise of the same words where the prompt
is steered by the next pair's concept: what any concept does to them.

The layer, the strength and k were chosen on `TUNING`; `PAIRS` are ten others. Other forms at the
same layer are compared on the tuning pairs:

- image: J_k x of the concept's tokens, as carried to a token behind them (the form of `steer`);
- full: the same without truncation, J x;
- k=1: the leading triplet alone;
- whole: the whole hidden state h_l of the concept prompt, as activation addition takes it;
- last: h_l at the concept's own last token, the concept said once;
- mixture: (1 − λ) h + λ ‖h‖ s, with the strength as λ;
- operator: (Σ_i J_i) applied to the embedding of each new token, scaled like the others.

    python benchmarks/steering.py
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import mean
from typing import Annotated, Any

import torch
import typer
from machine import write_results
from rich.console import Console
from rich.table import Table
from torch import Tensor

from elm_lanczos.analysis import SteeringOperator, steering_operator
from elm_lanczos.analysis.steering import (
    RANK,
    STRENGTH,
    Continuation,
    _concept_ids,
    _Writer,
    concept_tokens,
    default_layer,
)
from elm_lanczos.model import DetachedModel

PAIRS = {
    "war": "The children of this nation",
    "peace": "The price of food",
    "economy": "My fellow citizens,",
    "Constitution": "Our farmers",
    "health care": "The treaty with Spain",
    "children": "The Navy",
    "freedom": "The budget for next year",
    "taxes": "The people of the world",
    "energy": "We gather here today",
    "nuclear weapons": "Our schools",
}
TUNING = {
    "agriculture": "The state of our union is",
    "education": "Tonight I ask the Congress",
    "Soviet Union": "America is",
    "jobs": "Every year",
    "trade": "I believe that",
    "crime": "The great question",
    "labor": "We have seen",
    "schools": "There is no",
}
STRENGTHS = (0.5, 0.75, 1.0)
LAYERS = (4, 6, 8)
BOUNDS = {"rise": 2.0, "excess_loss": 1.0}


class _Applied:
    """An operator that adds another thing than its image; `hook` changes h (B, t, d)."""

    def __init__(self, layer: int, change: Callable[[Tensor, Tensor, float], Tensor]) -> None:
        self.layer, self.change = layer, change

    @contextlib.contextmanager
    def applied(self, model: DetachedModel, strength: float, start: int) -> Iterator[None]:
        embedded: list[Tensor] = []

        def add(_module: Any, _args: Any, h: Tensor) -> Tensor:
            first = start if h.shape[1] > start else 0
            changed = self.change(h[:, first:], embedded[-1][:, first:], strength)
            return torch.cat([h[:, :first], changed], 1)

        hooks = [
            model.embedding.register_forward_hook(lambda _m, _a, x: embedded.append(x)),
            model.layers[self.layer - 1].register_forward_hook(add),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def forms(model: DetachedModel, concept: str, layer: int) -> dict[str, Any]:
    """Returns what can be applied at a layer, by name.

    Args:
        model: the model.
        concept: the concept.
        layer: the layer.

    Returns:
        Objects with the method `applied` of `SteeringOperator`.
    """
    operator = steering_operator(model, concept, layer)
    lin = model.linearize(_concept_ids(model, concept), layer=layer)
    once = model.linearize(model.encode(f" {concept}"), layer=layer)
    tokens = list(operator.tokens)
    J = lin.vjp(torch.eye(lin.shape[1]).to(lin.output))[:, tokens].sum(1)
    full = lin.joint(tokens) @ lin.inputs[tokens].flatten()

    def added(v: Tensor) -> Callable[[Tensor, Tensor, float], Tensor]:
        return lambda h, _x, s: h + s * h.norm(dim=-1, keepdim=True) * v / v.norm()

    def mixed(h: Tensor, _x: Tensor, s: float) -> Tensor:
        return (1 - s) * h + s * h.norm(dim=-1, keepdim=True) * operator.direction

    def on_new(h: Tensor, x: Tensor, s: float) -> Tensor:
        v = x @ J.T
        return h + s * h.norm(dim=-1, keepdim=True) * v / v.norm(dim=-1, keepdim=True)

    one = replace(operator, U=operator.U[:1], S=operator.S[:1], V=operator.V[:1])
    changes = {"full": added(full), "whole": added(lin.output), "last": added(once.output)}
    changes |= {"mixture": mixed, "operator": on_new}
    others = {name: _Applied(layer, change) for name, change in changes.items()}
    return {"image": operator, "k=1": one, **others}


def figures(plain: Continuation, steered: Continuation) -> dict[str, Any]:
    """Returns gain, cost and text of one continuation beside the unsteered one."""
    return {
        "rise": steered.concept - plain.concept,
        "excess_loss": steered.loss - plain.loss,
        "text": steered.text,
    }


def writers(
    model: DetachedModel, pairs: dict[str, str], tokens: int
) -> Iterator[tuple[str, _Writer, Continuation]]:
    """Gives each concept with what continues its prompt, and the unsteered continuation."""
    for concept, prompt in pairs.items():
        words = concept_tokens(model, concept)
        writer = _Writer(model, model.encode(prompt), words, tokens, 0.0, 0, False)
        yield concept, writer, writer.write()[0]


def tuned(model: DetachedModel, tokens: int) -> list[dict[str, Any]]:
    """Returns mean gain and cost over the tuning pairs: layers by strengths, and other forms."""
    found: dict[tuple[str, int, float], list[dict[str, Any]]] = {}
    for concept, writer, plain in writers(model, TUNING, tokens):
        for layer in LAYERS:
            tried: dict[str, SteeringOperator | _Applied]
            if layer == default_layer(model):
                tried = forms(model, concept, layer)
            else:
                tried = {"image": steering_operator(model, concept, layer)}
            for form, operator in tried.items():
                for strength in STRENGTHS if form == "image" else (STRENGTH,):
                    steered = writer.write(operator, strength)[0]  # type: ignore[arg-type]
                    found.setdefault((form, layer, strength), []).append(figures(plain, steered))
    return [
        {"form": form, "layer": layer, "strength": strength}
        | {name: mean(one[name] for one in ones) for name in BOUNDS}
        for (form, layer, strength), ones in found.items()
    ]


def main(
    tokens: Annotated[int, typer.Option(help="Tokens of a continuation.")] = 40,
    tune: Annotated[
        bool, typer.Option("--tune", help="Also layers, strengths and forms on the tuning pairs.")
    ] = False,
) -> None:
    """Print the table and write benchmarks/results/steering.json."""
    model = DetachedModel.from_pretrained(dtype="float32")  # in which it computes anyway
    console = Console()
    layer, rows = default_layer(model), []
    table = Table(title=f"bundled model, layer {layer}, strength {STRENGTH}, k = {RANK}, greedy")
    for column in ("concept", "prompt", "without", "steered", "rise", "excess loss", "control"):
        table.add_column(column, justify="left" if column in ("concept", "prompt") else "right")
    operators = {concept: steering_operator(model, concept, layer) for concept in PAIRS}
    following = dict(zip(PAIRS, [*list(PAIRS)[1:], *PAIRS], strict=False))
    for concept, writer, plain in writers(model, PAIRS, tokens):
        operator = operators[concept]
        steered = writer.write(operator, STRENGTH)[0]
        control = writer.write(operators[following[concept]], STRENGTH)[0]
        row = {
            "concept": concept,
            "prompt": PAIRS[concept],
            "words": model.token_strings(writer.words),
            "energy": operator.energy,
            "without": plain.concept,
            "steered": steered.concept,
            "text_without": plain.text,
            **figures(plain, steered),
            "control": control.concept - plain.concept,
        }
        rows.append(row)
        values = [f"{row[name]:.2f}" for name in ("without", "steered", *BOUNDS, "control")]
        table.add_row(concept, PAIRS[concept], *values)
    console.print(table)
    means = {name: mean(row[name] for row in rows) for name in (*BOUNDS, "control")}
    console.print(f"mean rise by another concept: {means['control']:.2f} nats")
    for name in BOUNDS:
        value = means[name]
        met = value >= BOUNDS[name] if name == "rise" else value <= BOUNDS[name]
        least = "at least" if name == "rise" else "at most"
        console.print(
            f"mean {name.replace('_', ' ')}: {value:.2f} nats, {least} {BOUNDS[name]}: "
            f"{'met' if met else 'MISSED'}"
        )
    found = {"layer": layer, "strength": STRENGTH, "k": RANK, "tokens": tokens, "bounds": BOUNDS}
    results: dict[str, Any] = {**found, "means": means, "pairs": rows}
    if tune:
        results["tuning"] = tuned(model, tokens)
        table = Table(title="means over the tuning pairs")
        for column in ("form", "layer", "strength", "rise", "excess loss"):
            table.add_column(column, justify="right")
        for one in results["tuning"]:
            table.add_row(
                one["form"],
                str(one["layer"]),
                f"{one['strength']:.2f}",
                f"{one['rise']:.2f}",
                f"{one['excess_loss']:.2f}",
            )
        console.print(table)
    print(f"written to {write_results('steering', results).name}")


if __name__ == "__main__":
    typer.run(main)
