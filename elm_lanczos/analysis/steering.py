r"""Steering by a concept's detached Jacobian to a layer.

A concept prompt says the concept a few times, `war, war, war,`. In its linear system to layer l at
the last position, `h_l = Σ_i J_i x_i + c` (the cumulative Jacobian), the tokens of the concept have
their own part, `Σ_{i ∈ concept} J_i x_i`: what attention has carried from them to a token behind
them. The other parts are left out: that of the last token says what follows it, and that of special
tokens is common to all prompts. The operator `J = [J_i]_{i ∈ concept}` is close to low rank; its k
leading triplets are found without forming it, and the image `s = J_k x` is the direction of
steering. While a continuation of another prompt is generated,

    h_l ← h_l + strength · ‖h_l‖ · s / ‖s‖

at the positions that are generated from. The idea of a detached Jacobian as steering operator is
that of Golden, "Large language models are locally linear mappings" (TMLR 2025), which applies it to
the new prompt's own embeddings. `benchmarks/steering.py` compares the forms: applied to the new
token's embedding the operator does not steer here, the image does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from elm_lanczos.analysis.result import Analysis, Progress
from elm_lanczos.certificate import Certificate
from elm_lanczos.errors import UsageError
from elm_lanczos.model import DetachedModel
from elm_lanczos.svd import svd

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

DEPTH, STRENGTH, RANK = 0.75, 0.75, 16
"""Default layer as a share of the depth, strength relative to ‖h‖, and number of triplets."""

SWEPT_DEPTHS, SWEPT_STRENGTHS = (0.25, 0.5, 0.75, 1.0), (0.25, 0.5, 0.75, 1.0, 1.5)
"""What a sweep goes through."""

_REPEATS = 3
_RAISED = 8


@dataclass(frozen=True)
class SteeringOperator:
    """The detached Jacobian of a concept's tokens to a layer, by its k leading triplets.

    Attributes:
        layer: the layer l, counted from 1.
        prompt: the concept prompt.
        tokens: places of the concept's n tokens in it.
        U: (k, m), left singular vectors.
        S: (k,), singular values.
        V: (k, n, d), right singular vectors.
        inputs: (n, d), the embeddings of the concept's tokens.
        energy: share of ‖J‖_F² that the k triplets have.
        energy_error: its standard error; 0 where ‖J‖_F is exact.
        alignment: cosine of `J_k x` and `J x`, how much of the direction they have.
        converged: whether the triplets are found to the tolerance.
        certificate: how exactly the linear system reproduces the model at the layer.
    """

    layer: int
    prompt: str
    tokens: tuple[int, ...]
    U: Tensor
    S: Tensor
    V: Tensor
    inputs: Tensor
    energy: float
    energy_error: float
    alignment: float
    converged: bool
    certificate: Certificate

    @property
    def image(self) -> Tensor:
        """(m,), what the operator makes of the concept's own tokens, `J_k x`."""
        return _image(self.U, self.S, self.V, self.inputs)

    @property
    def direction(self) -> Tensor:
        """(m,), the image at unit norm."""
        return self.image / self.image.norm()

    @contextmanager
    def applied(
        self, model: DetachedModel, strength: float = STRENGTH, start: int = 0
    ) -> Iterator[None]:
        """Steers the model for the time being, with or without a cache of keys and values.

        Args:
            model: the model; `model.hf_model.generate` and calls of it are steered.
            strength: norm of what is added, relative to that of the hidden state; negative steers
                away from the concept.
            start: the first position of a whole prompt that is steered, from 0; a later piece of a
                sequence, as it comes with a cache, is steered as a whole.

        Yields:
            Nothing. The model is afterwards as it was, also after an exception.

        Raises:
            UsageError: if the strength is not finite.
        """
        if not math.isfinite(strength):
            raise UsageError(f"the strength must be a finite number, not {strength}")

        def add(_module: nn.Module, _args: Any, output: Any) -> Any:
            h = output if isinstance(output, Tensor) else output[0]
            first = start if h.shape[1] > start else 0
            norms = h[:, first:].norm(dim=-1, keepdim=True)
            steered = h.clone()
            steered[:, first:] += strength * norms * self.direction.to(h)
            return steered if isinstance(output, Tensor) else (steered, *output[1:])

        hook = model.layers[self.layer - 1].register_forward_hook(add)
        try:
            yield
        finally:
            hook.remove()


def steering_operator(
    model: DetachedModel,
    concept: str | Tensor,
    layer: int | None = None,
    *,
    k: int = RANK,
    seed: int = 0,
    memory: int | None = None,
) -> SteeringOperator:
    """Finds the leading triplets of a concept's detached Jacobian to a layer.

    Args:
        model: the model, a chain of layers.
        concept: words, which are repeated for the concept prompt; or the ids (T,) of a concept
            prompt as it is. All of its tokens but special ones and the last are the concept's.
        layer: the layer, counted from 1; at three quarters of the depth if not given.
        k: triplets; as many as there are, if fewer.
        seed: of the solver's random vectors.
        memory: bytes to work within.

    Returns:
        The operator.

    Raises:
        UsageError: if the concept or the layer cannot be used.
        UnsupportedModelError: if the model is not a chain of layers.
    """
    ids = _concept_ids(model, concept) if isinstance(concept, str) else concept
    special = set(getattr(model.tokenizer, "all_special_ids", ()))
    tokens = tuple(i for i, token in enumerate(ids[:-1].tolist()) if token not in special)
    if ids.is_floating_point() or not tokens:
        raise UsageError("a concept is text, or ids (T,) with a token before the last")
    layer = default_layer(model) if layer is None else layer
    lin = model.linearize(ids, layer=layer, memory=memory)
    joint, x = lin.joint(tokens), lin.inputs[list(tokens)]
    found = svd(joint, min(k, *joint.shape), seed=seed, memory=lin.spare_bytes)
    U, S, V = found.U[0], found.S[0], found.V[0].unflatten(1, x.shape)
    whole, image = joint @ x.flatten(), _image(U, S, V, x)
    if not image.norm() > 0:
        raise UsageError("the concept leaves nothing at the last token of its prompt: give another")
    energy = float(S.double().square().sum() / found.frobenius_squared[0])
    return SteeringOperator(
        layer=layer,
        prompt=lin.text,
        tokens=tokens,
        U=U,
        S=S,
        V=V,
        inputs=x,
        energy=energy,
        energy_error=energy * float(found.stable_rank_error[0] / found.stable_rank[0]),
        alignment=float(torch.cosine_similarity(whole, image, dim=0)),
        converged=bool(found.converged[0]),
        certificate=lin.certificate(),
    )


def default_layer(model: DetachedModel, depth: float = DEPTH) -> int:
    """Returns the layer at a share of the depth."""
    return max(1, round(depth * len(model.layers)))


def _image(U: Tensor, S: Tensor, V: Tensor, x: Tensor) -> Tensor:
    return (S * (V.flatten(1) @ x.flatten())) @ U


def _concept_ids(model: DetachedModel, concept: str) -> Tensor:
    if not concept.strip():
        raise UsageError("the concept is empty: give one or a few words")
    said = ", ".join([concept.strip()] * _REPEATS) + ","
    # a space before the first word, where that makes it the token it is inside a text
    return min((model.encode(f"{space}{said}") for space in (" ", "")), key=len)


def concept_tokens(model: DetachedModel, concept: str) -> list[int]:
    """Returns the tokens that begin a word of the concept, from the concept alone.

    They are the tokens that are one of its words with or without a space before it, as given, in
    small letters, or capitalised; of a word that is no single token, its first piece.

    Args:
        model: the model, with a tokenizer.
        concept: words.

    Returns:
        Their ids in ascending order.

    Raises:
        UsageError: if there is no tokenizer or no word.
    """
    if model.tokenizer is None:
        raise UsageError(f"{model.name} has no tokenizer: a concept's words cannot be found")

    def pieces(text: str) -> list[int]:
        ids: list[int] = model.tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[misc]
        strings = model.token_strings(ids)
        return [i for i, string in zip(ids, strings, strict=True) if string.strip()]

    found: set[int] = set()
    for word in concept.split():
        forms = {word, word.lower(), word.capitalize()}
        spelt = [pieces(space + form) for form in forms for space in (" ", "")]
        single = {ids[0] for ids in spelt if len(ids) == 1}
        found |= single or set(pieces(f" {word}")[:1])
    if not found:
        raise UsageError("the concept has no words: give one or a few")
    return sorted(found)


@dataclass(frozen=True)
class Continuation:
    """What a model wrote, token by token.

    Attributes:
        ids: (n,), the new tokens.
        log_probability: (n,), of each under the model that wrote it.
        plain_log_probability: (n,), of each under the model without steering.
        concept_log_probability: (n,), at each step of all the concept's words together, under the
            model that wrote it.
        text: the new tokens as text.
        tokens: each as text.
    """

    ids: Tensor
    log_probability: Tensor
    plain_log_probability: Tensor
    concept_log_probability: Tensor
    text: str
    tokens: list[str]

    @property
    def concept(self) -> float:
        """The concept words' log-probability, the mean over the steps, nats."""
        return float(self.concept_log_probability.mean())

    @property
    def loss(self) -> float:
        """The loss of the model without steering on this text, nats a token."""
        return -float(self.plain_log_probability.mean())


@dataclass(frozen=True)
class _Writer:
    """Continues one prompt again and again in one way.

    Attributes:
        model: the model.
        ids: (T,), the prompt.
        words: tokens that begin the concept's words.
        new_tokens: how many are written, unless the text ends before.
        temperature: of sampling; 0 always takes the most probable token.
        seed: of sampling.
        every_position: whether the prompt's positions are steered too.
    """

    model: DetachedModel
    ids: Tensor
    words: list[int]
    new_tokens: int
    temperature: float
    seed: int
    every_position: bool

    def write(
        self, operator: SteeringOperator | None = None, strength: float = 0.0
    ) -> tuple[Continuation, Tensor]:
        """Writes a continuation.

        Args:
            operator: what to steer with, if anything.
            strength: how strongly.

        Returns:
            The continuation, and the logarithmic probabilities (vocabulary,) of its first token.
        """
        from transformers import GenerationConfig, LogitsProcessorList

        model, prompt = self.model, self.ids[None].to(self.model.device)
        T = prompt.shape[1]
        end = model.hf_model.generation_config.eos_token_id
        if end is None:
            end = model.hf_model.config.get_text_config(decoder=True).eos_token_id
        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature:
            sampling = {"do_sample": True, "temperature": self.temperature}
            sampling |= {"top_k": 0, "top_p": 1.0}
        config = GenerationConfig(
            max_new_tokens=self.new_tokens,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            eos_token_id=end,
            pad_token_id=0 if end is None else end if isinstance(end, int) else end[0],
            output_logits=True,
            return_dict_in_generate=True,
            **sampling,
        )
        start = 0 if self.every_position else T - 1
        with torch.random.fork_rng(), model.unfrozen(1):
            torch.manual_seed(self.seed)
            with _steering(model, operator, strength, start):
                made: Any = model.hf_model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=config,
                    logits_processor=LogitsProcessorList([_RequireFinite(strength)]),
                )
            plain = model.hf_model(input_ids=made.sequences, use_cache=False).logits[0, T - 1 : -1]
        new = made.sequences[0, T:].cpu()
        own = _log_probabilities(torch.cat(list(made.logits)))
        return Continuation(
            ids=new,
            log_probability=own.gather(1, new[:, None])[:, 0],
            plain_log_probability=_log_probabilities(plain).gather(1, new[:, None])[:, 0],
            concept_log_probability=own[:, self.words].logsumexp(1),
            text=model.text(new),
            tokens=model.token_strings(new),
        ), own[0]


@dataclass(frozen=True)
class _RequireFinite:
    """Ends a generation whose logits are not finite, before a token is chosen by them.

    Attributes:
        strength: of the steering.
    """

    strength: float

    def __call__(self, _ids: Tensor, scores: Tensor) -> Tensor:
        """Returns the scores as they are."""
        if not scores.isfinite().all():
            raise UsageError(
                f"strength {self.strength:g} takes the model out of the range of its arithmetic: "
                "use a smaller one"
            )
        return scores


@contextmanager
def _steering(
    model: DetachedModel, operator: SteeringOperator | None, strength: float, start: int
) -> Iterator[None]:
    if operator is None:
        yield
        return
    with operator.applied(model, strength, start):
        yield


def _share(operator: SteeringOperator) -> str:
    """What of ‖J‖_F² the triplets have, with its standard error where it is an estimate."""
    spread = f" ± {operator.energy_error:.1%}" if operator.energy_error else ""
    return f"{operator.energy:.1%}{spread}"


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(-1).cpu()


@dataclass(frozen=True, kw_only=True)
class _Steered(Analysis):
    """What one steering and several have in common.

    Attributes:
        concept: the concept.
        words: the tokens that count as its words, as text.
        depth: number of layers.
        unsteered: the continuation without steering.
    """

    kind: ClassVar[str] = "steer"

    concept: str
    words: list[str]
    depth: int
    unsteered: Continuation

    @property
    def title(self) -> str:
        """Which concept is steered onto which prompt."""
        return f"steer: {self.concept} onto {self.prompt}"

    def rise(self, steered: Continuation) -> float:
        """Returns how much steering raises the concept words' log-probability, nats."""
        return steered.concept - self.unsteered.concept

    def damage(self, steered: Continuation) -> float:
        """Returns how much more loss the plain model has on steered text, nats a token."""
        return steered.loss - self.unsteered.loss

    def _doubts(self, operators: Sequence[SteeringOperator]) -> list[str]:
        lines = []
        for operator in operators:
            if missed := operator.certificate.failures:
                lines.append(f"layer {operator.layer}: not exact within {', '.join(missed)}")
            if not operator.converged:
                lines.append(f"layer {operator.layer}: its triplets did not converge")
        return lines


@dataclass(frozen=True, kw_only=True)
class Steering(_Steered):
    """One prompt continued with and without a concept steered onto it.

    Attributes:
        operator: what steers.
        strength: norm of what is added, relative to that of the hidden state.
        steered: the continuation with steering.
        raised: the tokens whose log-probability at the first step steering raises most, as text.
    """

    operator: SteeringOperator
    strength: float
    steered: Continuation
    raised: list[str]

    @property
    def facts(self) -> list[str]:
        """What steers, both texts, what it gains and what it costs."""
        operator, plain = self.operator, self.unsteered
        return [
            f"without: {plain.text}",
            f"steered: {self.steered.text}",
            f"layer {operator.layer} of {self.depth}, strength {self.strength:g} of ‖h‖; "
            f"{len(operator.S)} triplets of the Jacobian of {len(operator.tokens)} tokens in "
            f"{operator.prompt!r}: {_share(operator)} of ‖J‖²_F, cosine of J_k x with J x "
            f"{operator.alignment:.4f}",
            f"log-probability of the concept's words ({', '.join(map(repr, self.words))}), mean "
            f"over the steps: {plain.concept:.2f} → {self.steered.concept:.2f} "
            f"({self.rise(self.steered):+.2f} nats)",
            f"loss of the unsteered model: {plain.loss:.2f} nats a token on its own text, "
            f"{self.steered.loss:.2f} on the steered ({self.damage(self.steered):+.2f})",
            f"raised most at the first step: {', '.join(map(repr, self.raised))}",
        ]

    @property
    def doubts(self) -> list[str]:
        """Also names triplets that did not converge."""
        return self._doubts([self.operator])

    def facts_to_dict(self) -> dict[str, Any]:
        """Returns texts, settings and figures by name."""
        return {
            "concept": self.concept,
            "words": self.words,
            "layer": self.operator.layer,
            "strength": self.strength,
            "k": len(self.operator.S),
            "energy": self.operator.energy,
            "energy_error": self.operator.energy_error,
            "alignment": self.operator.alignment,
            "singular_values": self.operator.S.tolist(),
            "text_without": self.unsteered.text,
            "text_steered": self.steered.text,
            "concept_without": self.unsteered.concept,
            "concept_steered": self.steered.concept,
            "loss_without": self.unsteered.loss,
            "loss_steered": self.steered.loss,
            "raised": self.raised,
        }

    def to_dataframe(self) -> pd.DataFrame:
        """Returns one row a step: the tokens written without and with steering.

        Beside each are its log-probability and that of the concept's words under the model that
        wrote it; `logp_plain` is that of the steered token without steering.
        """
        import pandas as pd

        plain, steered = self.unsteered, self.steered
        columns = {
            "plain": plain.tokens,
            "plain_logp": plain.log_probability.tolist(),
            "plain_concept": plain.concept_log_probability.tolist(),
            "steered": steered.tokens,
            "logp": steered.log_probability.tolist(),
            "logp_plain": steered.plain_log_probability.tolist(),
            "concept": steered.concept_log_probability.tolist(),
        }
        table = pd.DataFrame({name: pd.Series(values) for name, values in columns.items()})
        table[["plain", "steered"]] = table[["plain", "steered"]].fillna("")
        return table.rename_axis("step").reset_index()

    def plot(self) -> Figure:
        """Draws the concept words' log-probability and the tokens' losses, step by step."""
        from elm_lanczos.report.figures.steering import draw

        return draw(self)


@dataclass(frozen=True)
class Trial:
    """One setting of a sweep.

    Attributes:
        operator: what steers.
        strength: how strongly.
        steered: what was written.
    """

    operator: SteeringOperator
    strength: float
    steered: Continuation


@dataclass(frozen=True, kw_only=True)
class SteeringSweep(_Steered):
    """A concept steered onto one prompt at several layers and strengths.

    Attributes:
        trials: one of each layer and strength.
    """

    trials: list[Trial]

    @property
    def facts(self) -> list[str]:
        """Every continuation, the words that count and their figures without steering."""
        steered = [
            f"layer {trial.operator.layer}, strength {trial.strength:g}: {trial.steered.text}"
            for trial in self.trials
        ]
        return [
            *steered,
            f"without: {self.unsteered.text}",
            f"without: log-probability of the concept's words "
            f"({', '.join(map(repr, self.words))}) {self.unsteered.concept:.2f}, loss "
            f"{self.unsteered.loss:.2f} nats a token",
        ]

    @property
    def doubts(self) -> list[str]:
        """Also names triplets that did not converge."""
        return self._doubts(list({t.operator.layer: t.operator for t in self.trials}.values()))

    def facts_to_dict(self) -> dict[str, Any]:
        """Returns the figures without steering by name."""
        return {
            "concept": self.concept,
            "words": self.words,
            "text_without": self.unsteered.text,
            "concept_without": self.unsteered.concept,
            "loss_without": self.unsteered.loss,
            "texts_steered": [trial.steered.text for trial in self.trials],
        }

    def to_dataframe(self) -> pd.DataFrame:
        """Returns one row a trial: its setting, what steering gains and what it costs."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "layer": trial.operator.layer,
                    "strength": trial.strength,
                    "concept": trial.steered.concept,
                    "rise": self.rise(trial.steered),
                    "loss": trial.steered.loss,
                    "excess_loss": self.damage(trial.steered),
                    "energy": trial.operator.energy,
                }
                for trial in self.trials
            ]
        )

    def plot(self) -> Figure:
        """Draws gain and cost against the strength, one line a layer."""
        from elm_lanczos.report.figures.steering import draw_sweep

        return draw_sweep(self)


def steer(
    model: DetachedModel,
    concept: str,
    prompt: str | Tensor,
    *,
    layer: int | None = None,
    strength: float = STRENGTH,
    k: int = RANK,
    new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
    every_position: bool = False,
    memory: int | None = None,
) -> Steering:
    """Continues a prompt with and without a concept steered onto it.

    Args:
        model: the model, a chain of layers with a tokenizer.
        concept: one or a few words.
        prompt: text or ids (T,) to continue.
        layer: where to steer, counted from 1; at three quarters of the depth if not given.
        strength: norm of what is added, relative to that of the hidden state.
        k: triplets of the concept's Jacobian.
        new_tokens: how many to write.
        temperature: of sampling; 0 always takes the most probable token.
        seed: of sampling and of the solver.
        every_position: steer the prompt's positions too, not only those that are written from.
        memory: bytes to work within.

    Returns:
        Both continuations and what steering gained and cost.

    Raises:
        UsageError: if some argument cannot be used.
        UnsupportedModelError: if the model is not a chain of layers.
    """
    writer = _writer(model, concept, prompt, new_tokens, temperature, seed, every_position)
    operator = steering_operator(model, concept, layer, k=k, seed=seed, memory=memory)
    steered, first = writer.write(operator, strength)
    unsteered, before = writer.write()
    return Steering(
        model=model.name,
        prompt=model.text(writer.ids),
        certificate=operator.certificate,
        concept=concept,
        words=model.token_strings(writer.words),
        depth=len(model.layers),
        unsteered=unsteered,
        operator=operator,
        strength=strength,
        steered=steered,
        raised=model.token_strings((first - before).topk(_RAISED).indices),
    )


def sweep_steering(
    model: DetachedModel,
    concept: str,
    prompt: str | Tensor,
    *,
    layers: Sequence[int] | None = None,
    strengths: Sequence[float] = SWEPT_STRENGTHS,
    k: int = RANK,
    new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
    every_position: bool = False,
    memory: int | None = None,
    progress: Progress | None = None,
) -> SteeringSweep:
    """Steers a concept onto a prompt at every one of some layers and strengths.

    Args:
        model: see `steer`, as for the rest.
        concept: see there.
        prompt: see there.
        layers: where to steer; every quarter of the depth if not given.
        strengths: how strongly.
        k: see there.
        new_tokens: see there.
        temperature: see there.
        seed: see there.
        every_position: see there.
        memory: see there.
        progress: told how many of the continuations are written.

    Returns:
        The continuations and what steering gained and cost.

    Raises:
        UsageError: if some argument cannot be used.
        UnsupportedModelError: if the model is not a chain of layers.
    """
    if layers is None:
        layers = sorted({default_layer(model, depth) for depth in SWEPT_DEPTHS})
    writer = _writer(model, concept, prompt, new_tokens, temperature, seed, every_position)
    unsteered, _ = writer.write()
    trials: list[Trial] = []
    for layer in layers:
        operator = steering_operator(model, concept, layer, k=k, seed=seed, memory=memory)
        for strength in strengths:
            trials.append(Trial(operator, strength, writer.write(operator, strength)[0]))
            if progress is not None:
                progress(len(trials), len(layers) * len(strengths))
    return SteeringSweep(
        model=model.name,
        prompt=model.text(writer.ids),
        concept=concept,
        words=model.token_strings(writer.words),
        depth=len(model.layers),
        unsteered=unsteered,
        trials=trials,
    )


def _writer(
    model: DetachedModel,
    concept: str,
    prompt: str | Tensor,
    new_tokens: int,
    temperature: float,
    seed: int,
    every_position: bool,
) -> _Writer:
    """Checks what a text is to be written from and how."""
    ids = model.encode(prompt) if isinstance(prompt, str) else prompt
    if ids.is_floating_point() or ids.ndim != 1 or not len(ids):
        raise UsageError("a prompt to be continued is text or ids (T,)")
    model.embed(ids)  # refuses ids that there are not
    if new_tokens < 1:
        raise UsageError(f"at least one token must be written, not {new_tokens}")
    if not 0 <= seed < 2**63:
        raise UsageError(f"the seed is 0 … 2**63 - 1, not {seed}")
    if not 0 <= temperature < math.inf:
        raise UsageError(f"the temperature is 0 or a positive number, not {temperature}")
    if model.max_length is not None and len(ids) + new_tokens > model.max_length:
        raise UsageError(
            f"{len(ids)} tokens and {new_tokens} new ones are more than the {model.max_length} "
            "that the model takes: write fewer"
        )
    words = concept_tokens(model, concept)
    return _Writer(model, ids.cpu(), words, new_tokens, temperature, seed, every_position)
