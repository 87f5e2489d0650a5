"""A Hugging Face decoder, untouched, as the source of a linear system.

`DetachedModel` wraps a model that anybody loaded. It finds the parts of the decoder (embeddings,
layers, unembedding), turns prompts into embeddings, runs the model's own forward pass as the
reference that everything else is measured against, and hands out linearizations. The wrapped model
keeps its class, its attention implementation and its weights, bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from elm_lanczos.attention import IMPLEMENTATION, is_explicit, register_attention
from elm_lanczos.conventions import frozen_conventions
from elm_lanczos.errors import ModelError, UnsupportedModelError, UsageError, first_line
from elm_lanczos.freezing import Freezing, precision
from elm_lanczos.storage import Storage

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from elm_lanczos.linearization import Linearization

BUNDLED_MODEL = Path(__file__).parent / "bundled" / "speeches-llama"
"""Folder of the small trained model that is used when no other is named."""

_HUB_OPTIONS = (
    "revision token cache_dir subfolder local_files_only force_download proxies gguf_file".split()
)
"""Options of `from_pretrained` that say where a checkpoint is, for configuration and tokenizer."""

_PATCHING = threading.RLock()
"""Held while something that all models of a class share is replaced."""

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Prediction:
    """What the untouched model computes at one position.

    Attributes:
        hidden: (m,), the hidden state after the final norm.
        logits: (vocabulary,), the model's own logits.
    """

    hidden: Tensor
    logits: Tensor


class DetachedModel:
    """A causal language model that can be rewritten exactly as a linear system for each prompt.

    Args:
        hf_model: a causal language model of transformers, already loaded. It is left as it was. Of
            other tools it is the model they hold: `bridge.original_model` of TransformerLens,
            `_model` (since 0.8 `_module`) of nnsight's.
        tokenizer: its tokenizer; without one, prompts are given as ids or embeddings.
        compute_dtype: dtype the linear system is computed in, whatever dtype the weights are stored
            in. Default: float32, or float64 for a float64 model; never below the storage dtype.
        gate: which factor of a gated MLP `act(g) · u` is held fixed: "frozen" fixes `act(g)`; "up"
            fixes `u` and goes through `g` with `act(g)/g` fixed, as the paper does for Phi.
        precision: of float32 matrix products on CUDA: "ieee", or "tf32", which keeps 10 bits of a
            factor and is several times as fast.

    Raises:
        UsageError: if a dtype, the gate convention or the precision cannot be used.
        UnsupportedModelError: if no decoder layers, embeddings or unembedding can be found.
        ModelError: if a weight is not finite; the message names it.
    """

    def __init__(
        self,
        hf_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        compute_dtype: str | torch.dtype | None = None,
        gate: str = "frozen",
        precision: str = "ieee",
    ) -> None:
        if gate not in ("frozen", "up"):
            raise UsageError(f"gate is 'frozen' or 'up', not {gate!r}")
        self.gate = gate
        self.hf_model = hf_model = without_bridge(hf_model)
        self.tokenizer = tokenizer
        self.decoder = find_decoder(hf_model)
        self.layers = find_layers(self.decoder)
        self.dtype: torch.dtype = hf_model.dtype
        self.compute_dtype = _compute_dtype(compute_dtype, self.dtype)
        self.storage = Storage(hf_model, self.layers)
        self.precision = usable_precision(precision, self.device, self.compute_dtype)
        self._is_frozen = False
        _refuse_weights_that_are_not_finite(self.storage)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path | None = None,
        *,
        dtype: str | torch.dtype = "auto",
        compute_dtype: str | torch.dtype | None = None,
        gate: str = "frozen",
        precision: str = "ieee",
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
        use_safetensors: bool = True,
        **options: Any,
    ) -> DetachedModel:
        """Loads a model and its tokenizer from the Hugging Face hub or a local folder.

        Args:
            name: hub id or folder; the bundled model if not given.
            dtype: how the weights are stored; "auto" keeps the checkpoint's own dtype.
            compute_dtype: how the linear system is computed (see the class).
            gate: which factor of a gated MLP is held fixed (see the class).
            precision: of float32 matrix products on CUDA (see the class).
            device: device to move the model to; use `device_map` in `options` for several.
            trust_remote_code: run modelling code that comes with the checkpoint.
            use_safetensors: refuse weights stored as pickles.
            **options: passed on to `from_pretrained` of transformers' auto class (`device_map`,
                `quantization_config`, `revision`, `token`, …).

        Returns:
            The wrapped model, in evaluation mode.

        Raises:
            ModelError: if it cannot be found, has no weights, or is not a causal language model.
        """
        from transformers import AutoConfig

        source = str(BUNDLED_MODEL if name is None else name)
        shared = {k: options[k] for k in _HUB_OPTIONS if k in options}
        try:
            config = options.get("config") or AutoConfig.from_pretrained(
                source, trust_remote_code=trust_remote_code, **shared
            )
            hf_model, report = auto_class(config).from_pretrained(
                source,
                dtype=_dtype(dtype) if dtype != "auto" else "auto",
                trust_remote_code=trust_remote_code,
                use_safetensors=use_safetensors,
                output_loading_info=True,
                **options,
            )
        except Exception as error:  # the libraries below raise anything from OSError to TypeError
            raise ModelError(_why_not_loaded(source, error)) from error
        if missing := sorted(report["missing_keys"]):
            raise ModelError(
                f"{source}: the checkpoint has no weights for {_few(missing)}; a model with random "
                "weights in their place would give meaningless results"
            )
        tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code, **shared)
        if device is not None:
            hf_model = hf_model.to(usable_device(device))
        return cls(
            hf_model.eval(),
            tokenizer,
            compute_dtype=compute_dtype,
            gate=gate,
            precision=precision,
        )

    def __repr__(self) -> str:
        """Returns one line naming the model, its size and its precisions."""
        stored, computed = _name(self.dtype), _name(self.compute_dtype)
        return (
            f"DetachedModel({self.name}, {len(self.layers)} layers, d={self.hidden_size}, "
            f"stored {stored}, computed {computed})"
        )

    @property
    def name(self) -> str:
        """The hub id or folder name the model was loaded from, else its class."""
        path = self.hf_model.config._name_or_path
        if Path(path) == BUNDLED_MODEL:
            return BUNDLED_MODEL.name
        return path or type(self.hf_model).__name__

    @property
    def device(self) -> torch.device:
        """Device that the input embeddings are computed on."""
        return self.storage.device(self.embedding)

    @cached_property
    def embedding(self) -> nn.Embedding:
        """The module that maps ids to input embeddings, (vocabulary, d)."""
        module = self.hf_model.get_input_embeddings()
        if not isinstance(module, nn.Embedding):
            raise UnsupportedModelError(f"{type(module).__name__}: input embeddings not understood")
        return module

    @cached_property
    def unembedding(self) -> nn.Linear:
        """The module that maps the final hidden state to logits, weight (vocabulary, m)."""
        module = self.hf_model.get_output_embeddings()
        if not isinstance(module, nn.Linear):
            raise UnsupportedModelError(f"{type(module).__name__}: unembedding not understood")
        return module

    @property
    def hidden_size(self) -> int:
        """Width d of the input embeddings."""
        return int(self.embedding.weight.shape[1])

    @property
    def max_length(self) -> int | None:
        """Longest context the model was trained for, in tokens, if its config tells."""
        return getattr(self.decoder.config, "max_position_embeddings", None)

    # ------------------------------------------------------------------ prompts and tokens

    def encode(self, text: str) -> Tensor:
        """Returns the token ids (T,) of a text as the tokenizer makes them by default.

        Args:
            text: the prompt.

        Returns:
            A 1-D int64 tensor.

        Raises:
            UsageError: if there is no tokenizer or the text has no tokens.
        """
        if self.tokenizer is None:
            raise UsageError(f"{self.name} has no tokenizer: give token ids or embeddings instead")
        ids = torch.tensor(self.tokenizer(text)["input_ids"], dtype=torch.int64)
        if ids.numel() == 0:
            raise UsageError("the prompt is empty: it has no tokens")
        return ids

    def token_strings(self, ids: Any) -> list[str]:
        """Returns the text of each token id by itself (`<id>` where there is no tokenizer)."""
        return token_strings(self.tokenizer, ids)

    def token_id(self, token: str) -> int:
        """Returns the id of one token given as text.

        Args:
            token: its text, with the space before it if it has one, or `id:N`. Where only the text
                with a space before it is a token, that one is meant.

        Returns:
            The id.

        Raises:
            UsageError: if it is no single token; the message says which tokens it is.
        """
        vocabulary = self.embedding.weight.shape[0]
        number = token.removeprefix("id:")
        if token.startswith("id:") and number.isdecimal():
            if int(number) >= vocabulary:
                raise UsageError(f"token {token}: ids are 0 … {vocabulary - 1}")
            return int(number)
        if self.tokenizer is None:
            raise UsageError(f"{self.name} has no tokenizer: give tokens as id:N")
        if not token:
            raise UsageError("the token is empty: give its text, or id:N")
        pieces: list[int] = []
        for text in (token, f" {token}"):
            pieces = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(pieces) == 1:
                return int(pieces[0])
        raise UsageError(
            f"token {token!r} is {len(pieces)} tokens here, {self.token_strings(pieces)}: give one "
            "of them, or id:N"
        )

    def text(self, ids: Any) -> str:
        """Returns the text that token ids (T,) stand for, without special tokens."""
        if self.tokenizer is None:
            return "".join(self.token_strings(ids))
        return str(self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True))

    def embed(self, ids: Tensor) -> Tensor:
        """Returns the input embeddings (T, d) of ids (T,) in `compute_dtype`."""
        ids = ids.to(self.device)
        vocabulary = self.embedding.weight.shape[0]
        if ids.min() < 0 or ids.max() >= vocabulary:
            raise UsageError(f"token ids must be in 0 … {vocabulary - 1}")
        with torch.no_grad(), self.storage.plain(), Freezing(self.compute_dtype, {}):
            return self.embedding(ids[None])[0].to(self.compute_dtype)

    # ---------------------------------------------------------------------- the model itself

    def predict(
        self, ids_or_embeddings: Tensor, position: int = -1, layer: int | None = None
    ) -> Prediction:
        """Runs the untouched model, its weights raised to `compute_dtype` layer by layer.

        Args:
            ids_or_embeddings: (T,) ids or (T, d) embeddings.
            position: the position whose hidden state and logits are wanted.
            layer: the layer, counted from 1, behind which the hidden state is taken; behind the
                final norm if not given.

        Returns:
            The model's own hidden state and logits at that position.

        Raises:
            UnsupportedModelError: if the decoder does not give a hidden state for every token.
        """
        length = ids_or_embeddings.shape[0]
        position %= length
        name = "inputs_embeds" if ids_or_embeddings.is_floating_point() else "input_ids"
        options: dict[str, Any] = {name: ids_or_embeddings[None].to(self.device)}
        if "logits_to_keep" in inspect.signature(self.hf_model.forward).parameters:
            options["logits_to_keep"] = length - position
        caught: list[Any] = []
        module = self.decoder if layer is None else self.layers[layer - 1]
        hook = module.register_forward_hook(lambda _m, _a, output: caught.append(output))
        try:
            with self.unfrozen(length):
                logits = self.hf_model(**options, use_cache=False).logits[0]
        finally:
            hook.remove()
        row = 0 if "logits_to_keep" in options else position
        states = last_hidden_state(caught[-1]) if caught else logits[:0]
        if states.shape[:2] != (1, length):
            raise UnsupportedModelError(
                f"{self.name}: its decoder gives no hidden state for every token"
            )
        hidden = states[0, position]
        return Prediction(hidden.to(self.compute_dtype), logits[row].to(self.compute_dtype))

    def hidden_states(
        self, z: Tensor, ids: Tensor | None = None, layer: int | None = None
    ) -> Tensor:
        """Runs the model with `z` for its token embeddings, as far as its decoder's output.

        It is the whole model that is run, so that the decoder gets the masks and positions that the
        model around it makes. Where the ids are known it is given them, and its embedding module
        gives `z`: some models use ids for more than embeddings (per-layer embeddings, routing by
        token, padding).

        Args:
            z: (B, T, d), may be traced.
            ids: (B, T), the tokens that `z` stands for.
            layer: the layer, counted from 1, behind which to stop instead.

        Returns:
            (B, T, m), the hidden states after the final norm, or after the layer.

        Raises:
            UnsupportedModelError: if the embeddings are not used once and as they are.
        """
        options: dict[str, Any] = {"inputs_embeds": z}
        if ids is not None:
            options = {"input_ids": ids.to(z.device)}
        parameters = inspect.signature(self.hf_model.forward).parameters.values()
        if any(p.name == "use_cache" or p.kind == p.VAR_KEYWORD for p in parameters):
            options["use_cache"] = False
        used: list[Tensor] = []

        def put_embeddings(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            if output.numel() != z.numel() or output.shape[-1] != z.shape[-1] or used:
                raise UnsupportedModelError(
                    f"{self.name}: its token embeddings are used more than once, or not as they are"
                )
            used.append(z)
            return z if output.shape == z.shape else z.reshape(output.shape)

        def stop(_module: nn.Module, _args: Any, output: Any) -> None:
            raise _DecoderDone(last_hidden_state(output))

        last = self.decoder if layer is None else self.layers[layer - 1]
        hooks = [last.register_forward_hook(stop)]
        if ids is not None:
            hooks.append(self.embedding.register_forward_hook(put_embeddings))
        try:
            self.hf_model(**options)
        except _DecoderDone as done:
            states: Tensor = done.args[0]
            return states
        finally:
            for hook in hooks:
                hook.remove()
        raise UnsupportedModelError(f"{self.name}: its forward pass does not run its decoder")

    def head(self, y: Tensor, inputs: Tensor, position: int, ids: Tensor | None = None) -> Tensor:
        """What the model makes of a final hidden state: its own code from there to the logits.

        Args:
            y: (m,), a final hidden state; may be traced.
            inputs: (T, d), any input embeddings of the length the model was run with.
            position: where `y` stands.
            ids: (T,), the tokens the embeddings stand for, if any.

        Returns:
            (vocabulary,), the logits at that position.
        """
        options: dict[str, Any] = {"use_cache": False, "inputs_embeds": inputs[None]}
        if ids is not None:
            options = {"use_cache": False, "input_ids": ids[None].to(inputs.device)}
        if "logits_to_keep" in inspect.signature(self.hf_model.forward).parameters:
            options["logits_to_keep"] = 1

        def replace(_module: nn.Module, _args: Any, output: Any) -> Any:
            state = last_hidden_state(output)
            stand_in = y.to(state.device).expand(1, state.shape[1], -1)
            if isinstance(output, tuple):
                return (stand_in, *output[1:])
            output = copy.copy(output)
            output["last_hidden_state"] = stand_in
            return output

        hook = self.decoder.register_forward_hook(replace)
        try:
            logits: Tensor = self.hf_model(**options).logits[0, -1]
        finally:
            hook.remove()
        return logits

    def generate(self, ids: Tensor, new_tokens: int) -> Tensor:
        """Returns ids (T + new_tokens,): the prompt and its greedy continuation."""
        for _ in range(new_tokens):
            best = self.predict(ids).logits.argmax().cpu()
            ids = torch.cat([ids, best[None]])
        return ids

    def linearize(self, prompt: str | Tensor, position: int = -1, **options: Any) -> Linearization:
        """Rewrites the decoder as a linear system for one prompt: `y = Σ J_i x_i + c`.

        Args:
            prompt: text, token ids (T,), or input embeddings (T, d).
            position: the position whose final hidden state `y` is the output.
            **options: `layer`, `block`, `memory` and `keep` of `FrozenDecoder`.

        Returns:
            The linear system at this input.

        Raises:
            UnsupportedModelError: if some operation cannot be linearised exactly; the message
                names the module.
            UsageError: if the prompt or position cannot be used.
        """
        from elm_lanczos.frozen_decoder import FrozenDecoder
        from elm_lanczos.linearization import Linearization

        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        embeddings = ids if ids.is_floating_point() else None
        if ids.ndim != (1 if embeddings is None else 2) or ids.shape[0] == 0:
            raise UsageError(
                "a prompt is text, a 1-D tensor of ids or a (T, d) tensor of embeddings, "
                f"not a tensor of shape {tuple(ids.shape)}"
            )
        if not -ids.shape[0] <= position < ids.shape[0]:
            raise UsageError(f"position {position} is outside the {ids.shape[0]} tokens")
        if embeddings is None:
            return self.linearize_together([ids], position, **options)[0]
        if embeddings.shape[1] != self.hidden_size:
            raise UsageError(f"embeddings have width {embeddings.shape[1]}, not {self.hidden_size}")
        embeddings = embeddings.to(self.device, self.compute_dtype)
        return Linearization(FrozenDecoder(self, embeddings[None], position, **options))

    def linearize_together(
        self, prompts: Sequence[Tensor], position: int = -1, **options: Any
    ) -> list[Linearization]:
        """Rewrites the decoder for several prompts of one length, which go through it together.

        Args:
            prompts: token ids (T,) each.
            position: the position whose final hidden states are the outputs.
            **options: `layer`, `block`, `memory` and `keep` of `FrozenDecoder`.

        Returns:
            The linear system of each, all of one frozen decoder. `FrozenDecoder.vjp` and `jvp` do
            for all of them, with as many operations, what those of one system do for it alone;
            arithmetic and memory are those of all prompts.

        Raises:
            UnsupportedModelError: if some operation cannot be linearised exactly.
            UsageError: if there is no prompt, or their lengths differ.
        """
        from elm_lanczos.frozen_decoder import FrozenDecoder
        from elm_lanczos.linearization import Linearization

        if len({len(ids) for ids in prompts}) != 1 or prompts[0].ndim != 1:
            raise UsageError("prompts that go together are ids (T,) of one length T")
        inputs = torch.stack([self.embed(ids) for ids in prompts])
        ids = torch.stack(list(prompts))
        decoder = FrozenDecoder(self, inputs, position, ids=ids, **options)
        return [Linearization(decoder, number) for number in range(len(prompts))]

    @contextlib.contextmanager
    def arithmetic(self) -> Iterator[None]:
        """Lets float32 matrix products and convolutions have the model's precision, and no other.

        As torch keeps it for the whole process, one thread at a time can be here; others wait. So
        they do for `frozen` and `unfrozen`, which compute like this.

        Yields:
            Nothing.
        """
        with _PATCHING, _float32_products(tf32=self.precision == "tf32"):
            yield

    @contextlib.contextmanager
    def unfrozen(self, length: int) -> Iterator[None]:
        """Lets the model run as it is, its weights raised to `compute_dtype` layer by layer.

        On long inputs attention that would make T×T arrays, of probabilities where it is written
        out in torch or of a sliding mask, is replaced by this package's (see `blockwise`); fused
        causal attention stays.

        Args:
            length: number of tokens T.

        Yields:
            Nothing.
        """
        kept, raised = _state_kept(self.hf_model), self.storage.plain(self.compute_dtype)
        text = self.hf_model.config.get_text_config(decoder=True)
        heads = getattr(text, "num_attention_heads", None) or 1
        wanted = {}
        square = text._attn_implementation == "eager" or getattr(text, "sliding_window", None)
        if square and not is_explicit(heads, length, length):
            wanted["_attn_implementation_internal"] = IMPLEMENTATION
        computing, names = self.arithmetic(), self._implementations(wanted)
        with computing, names, kept, evaluating(self.hf_model), raised, torch.no_grad():
            yield

    @contextlib.contextmanager
    def differentiable(self) -> Iterator[None]:
        """Lets the model run as it is, on code that torch can differentiate forward.

        Fused attention and fused experts have no forward derivative, so they are written out for
        the time being; attention then makes T×T arrays of every head.

        Yields:
            Nothing.
        """
        written_out = {
            "_attn_implementation_internal": "eager",
            "_experts_implementation_internal": "eager",
        }
        kernels = sdpa_kernel(SDPBackend.MATH)  # for code that calls torch's attention by itself
        with self.unfrozen(1), self._implementations(written_out), kernels:
            yield

    @contextlib.contextmanager
    def _implementations(self, wanted: dict[str, str]) -> Iterator[None]:
        """Sets names of implementations in the configs for the time being."""
        register_attention()
        before = [
            (config, name, getattr(config, name))
            for config in self._configs()
            for name in wanted
            if hasattr(config, name)
        ]
        try:
            for config, name, _ in before:
                setattr(config, name, wanted[name])
            yield
        finally:
            for config, name, value in before:
                setattr(config, name, value)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Puts frozen attention, the conventions, and plain experts in reach of the model's code.

        What is changed for the time being (names of implementations in configs, evaluation mode,
        functions of modelling files, what modules keep on themselves) is restored afterwards, also
        after an exception. As some of it belongs to all models of a class, one thread at a time can
        be here; others wait. Inside another `frozen` only what modules keep is left to do.

        Yields:
            Nothing.
        """
        wanted = {
            "_attn_implementation_internal": IMPLEMENTATION,
            "_experts_implementation_internal": "eager",
        }
        hf_model = self.hf_model
        with self.arithmetic(), _state_kept(hf_model):
            if self._is_frozen:
                yield
                return
            names, conventions = self._implementations(wanted), frozen_conventions(hf_model)
            with names, evaluating(hf_model), conventions, self.storage.plain():
                self._is_frozen = True
                try:
                    yield
                finally:
                    self._is_frozen = False

    def _configs(self) -> list[Any]:
        """Every config object that some module of the model holds."""
        held = (getattr(module, "config", None) for module in self.hf_model.modules())
        return list({id(config): config for config in held if config is not None}.values())


@contextlib.contextmanager
def _float32_products(*, tf32: bool) -> Iterator[None]:
    """Sets the precision of float32 products for the process, and puts back what it was."""
    try:
        products = torch.get_float32_matmul_precision()
        convolutions = torch.backends.cudnn.allow_tf32
    except RuntimeError:  # somebody has used torch's newer settings, which exclude the older ones
        backends: Any = torch.backends
        newer = [backends.cuda.matmul, backends.cudnn.conv]
        kept = [setting.fp32_precision for setting in newer]
        try:
            for setting in newer:
                setting.fp32_precision = "tf32" if tf32 else "ieee"
            yield
        finally:
            for setting, name in zip(newer, kept, strict=True):
                setting.fp32_precision = name
        return
    try:
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def usable_precision(name: str, device: torch.device, compute_dtype: torch.dtype) -> str:
    """Returns a precision of matrix products that there is where and in what is computed.

    Args:
        name: 'ieee' or 'tf32'.
        device: where is computed.
        compute_dtype: what is computed in.

    Returns:
        The name.

    Raises:
        UsageError: if there is no such precision there.
    """
    if name not in ("ieee", "tf32"):
        raise UsageError(f"precision is 'ieee' or 'tf32', not {name!r}")
    if name == "tf32" and (device.type != "cuda" or compute_dtype != torch.float32):
        raise UsageError("precision 'tf32' is for float32 on a CUDA device; use 'ieee' here")
    return name


class _DecoderDone(Exception):
    """Stops a forward pass behind the decoder; holds its hidden states."""


_SMALL = 2**18
"""Entries of a buffer that is copied in case a forward pass changes it in place."""


@contextlib.contextmanager
def _state_kept(model: nn.Module) -> Iterator[None]:
    """Puts back what modules keep on themselves from a forward pass.

    That is attributes such as a last recurrent state, and buffers such as rotary frequencies that
    depend on the length of the prompt.

    Args:
        model: the model.

    Yields:
        Nothing.
    """
    tables = [
        table for m in model.modules() for table in (vars(m), m._buffers) if isinstance(table, dict)
    ]
    before = [(table, dict(table)) for table in tables]
    copies = [
        (buffer, buffer._version, buffer.clone())
        for buffer in model.buffers()
        if buffer.numel() <= _SMALL and not buffer.is_meta
    ]
    try:
        yield
    finally:
        for table, kept in before:
            for name in table.keys() - kept.keys():
                del table[name]
            table.update(kept)
        with torch.no_grad():
            for buffer, version, values in copies:
                if buffer._version != version:
                    buffer.copy_(values)


def auto_class(config: PreTrainedConfig) -> Any:
    """Returns transformers' class that loads the language model of a configuration.

    Args:
        config: any configuration.

    Returns:
        `AutoModelForCausalLM`, or for a model of images and text `AutoModelForImageTextToText`.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    kind = type(config)
    wrapped = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    only_wrapped = wrapped and kind not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if only_wrapped else AutoModelForCausalLM


def load_tokenizer(source: str | Path | None, **options: Any) -> PreTrainedTokenizerBase | None:
    """Returns the tokenizer of a model, or None where there is none to be had.

    Args:
        source: hub id or folder; the bundled model if None.
        **options: passed on to `AutoTokenizer.from_pretrained`.

    Returns:
        The tokenizer or None.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(BUNDLED_MODEL if source is None else source), **options
        )
    except Exception:  # whatever is wrong with it, ids can be used and shown instead
        return None
    return tokenizer


def token_strings(tokenizer: PreTrainedTokenizerBase | None, ids: Any) -> list[str]:
    """Returns the text of each token id by itself (`<id>` where there is no tokenizer)."""
    ids = [int(i) for i in ids]
    if tokenizer is None:
        return [f"<{i}>" for i in ids]
    return [str(tokenizer.decode([i])) for i in ids]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model in evaluation mode; restores every module's own flag afterwards."""
    training = [m for m in model.modules() if m.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def last_hidden_state(output: Any) -> Tensor:
    """Returns the hidden states (B, T, m) of what a decoder or one of its layers gives."""
    if isinstance(output, Tensor):
        return output
    state = getattr(output, "last_hidden_state", None)
    return state if state is not None else output[0]


def without_bridge(hf_model: PreTrainedModel) -> PreTrainedModel:
    """Returns a model without the components that TransformerLens' bridge has put around its own.

    Args:
        hf_model: any model, such as a bridge's `original_model`.

    Returns:
        The model itself if nothing is around its modules; else one with the same weights, of its
        own modules alone. The bridge stays as it is.
    """
    if not any(_inner(module) is not module for module in hf_model.modules()):
        return hf_model
    copies: dict[nn.Module, nn.Module] = {}

    def bare(module: nn.Module) -> nn.Module:
        module = _inner(module)
        if module not in copies:
            copies[module] = copy.copy(module)
            copies[module]._modules = {
                name: child and bare(child) for name, child in module._modules.items()
            }
        return copies[module]

    return cast("PreTrainedModel", bare(hf_model))


def _inner(module: nn.Module) -> nn.Module:
    inner = getattr(module, "original_component", None)
    return _inner(inner) if isinstance(inner, nn.Module) else module


def find_decoder(hf_model: PreTrainedModel) -> nn.Module:
    """Finds the module that takes input embeddings to final hidden states.

    Args:
        hf_model: a causal language model.

    Returns:
        What the model calls its decoder, or else the innermost such module with layers.

    Raises:
        UnsupportedModelError: if there is none below the model.
    """
    # it holds the token embeddings and takes `inputs_embeds`; of several, it is what the model
    # itself calls its decoder, or else the innermost one with layers
    embedding = hf_model.get_input_embeddings()
    found = [
        module
        for module in hf_model.modules()
        if module is not hf_model
        and "inputs_embeds" in inspect.signature(module.forward).parameters
        and any(child is embedding for child in module.modules())
    ]
    if not found:
        raise UnsupportedModelError(
            f"{type(hf_model).__name__}: no decoder that takes input embeddings found below it; a "
            "model with its language-modelling head is needed (AutoModelForCausalLM)"
        )
    own = hf_model.get_decoder()
    if any(own is module for module in found):
        return own
    with_layers = [module for module in found if find_layers(module)]
    return (with_layers or found)[-1]


def find_layers(decoder: nn.Module) -> list[nn.Module]:
    """Finds the decoder layers, the largest list of modules in it; empty if there is none."""
    lists = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m)]
    sizes = [sum(p.numel() for p in m.parameters()) for m in lists]
    return list(lists[sizes.index(max(sizes))]) if lists else []


def _compute_dtype(wanted: str | torch.dtype | None, stored: torch.dtype) -> torch.dtype:
    if wanted is None:
        return torch.float64 if stored == torch.float64 else torch.float32
    dtype = _dtype(wanted)
    if precision(dtype) < max(precision(stored), 4):
        raise UsageError(
            f"compute_dtype {_name(dtype)} is too low: it must be float32 or float64, and not "
            f"below the {_name(stored)} the weights are stored in"
        )
    return dtype


def _dtype(name: str | torch.dtype) -> torch.dtype:
    if isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise UsageError(f"unknown dtype {name!r}: use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def usable_device(name: str | torch.device) -> torch.device:
    """Returns a device that tensors can be made on.

    Args:
        name: such as `cpu`, `cuda` or `cuda:1`.

    Returns:
        The device.

    Raises:
        UsageError: if there is none of that name here.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {str(name)!r} cannot be used: {reason}") from error
    if device.type == "meta":
        raise UsageError("device 'meta' cannot be used: it holds no values")
    return device


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _why_not_loaded(source: str, error: Exception) -> str:
    reason = first_line(error) or repr(error)
    if not Path(source).exists() and isinstance(error, OSError):
        return (
            f"model {source!r} was not found: it is no local folder, and could not be fetched from "
            f"the Hugging Face hub ({reason[:200]})"
        )
    return f"model {source!r} cannot be loaded: {reason[:300]}"


def _refuse_weights_that_are_not_finite(storage: Storage) -> None:
    for name, weight in storage.weights():
        if not weight.is_floating_point() or weight.sum(dtype=torch.float32).isfinite():
            continue  # a sum is finite only of finite values, and takes a fraction of the time
        if not weight.isfinite().all():
            raise ModelError(f"{name} holds values that are not finite (NaN or infinity)")
