"""What the code of a model does not tell: which of its tensors are the coefficients.

In `S_t = a_t S_{t-1} + b_t x_t`, `y_t = c_t S_t` (linear attention, state spaces), in a short
convolution `C · conv(B · x)` and in `(q kᵀ) v` without a softmax, nothing in the multiplications
tells the value path `x`, `v` from the coefficients: three factors that depend on the input are
multiplied, and each choice of the one to go through is an exact linear system. The field's choice
is the value path (`mathematics`: decays, steps, gates, keys and queries are fixed). The tables of
this module say where it is: adding a model is adding a row. A product of three that no row explains
is refused (see `freezing.Mark.bilinear`).

While a model is traced, what is named here fixes everything but the value; where no freezing is
active, in other threads too, it does what it always does.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from elm_lanczos.errors import UnsupportedModelError
from elm_lanczos.freezing import (
    Freezing,
    Kind,
    active_mode,
    flatten,
    kind_of,
    mark_of,
    rebuild,
    set_mark,
)
from elm_lanczos.rules import as_value

VALUE_ARGUMENT = {
    "mamba_selective_scan": "hidden_states",  # Mamba: Gu & Dao 2023
    "mamba2_chunk_scan": "hidden_states",  # Mamba 2: Dao & Gu 2024
    "torch_chunk_gated_delta_rule": "value",  # gated DeltaNet: Yang, Kautz & Hatamizadeh 2024
    "torch_recurrent_gated_delta_rule": "value",
    "chunk_kimi_delta_attention": "value",  # Kimi Linear 2025
    "recurrent_kimi_delta_attention": "value",
    "rwkv_linear_attention": "value",  # RWKV: Peng et al. 2023
    "rwkv_linear_attention_cpu": "value",
    "xLSTMBackend.forward": "value",  # mLSTM: Beck et al. 2024
    "RecurrentGemmaRglru._rnn_scan": "hidden_states",  # RG-LRU: De et al. 2024
    "Inkling2SoftcappedSwiGLU.forward": "up",  # both factors are soft-capped
}
"""For each function or method of transformers' modelling files, most of them recurrences: the
argument that is its value. All its other arguments are fixed."""

VALUE_PART = {
    "Lfm2ShortConv.forward": (3, 2),  # B, C, x: LFM 2, Liquid AI 2025
    "Lfm2MoeShortConv.forward": (3, 2),
    "Lfm3ShortConv.forward": (3, 2),
    "MiniMaxLightningAttention.forward": (3, 2),  # q, k, v: Qin et al. 2024
}
"""For each method that splits one projection: into how many parts, and which of them is its value.
The other parts are fixed."""

COEFFICIENT_MODULES = {
    "Gemma3nTextAltUp": ("prediction_coefs", "correction_coefs"),  # AltUp: Baykal et al. 2023
    "Inkling2DynamicShortConvolution": ("weight_proj",),
}
"""For each module: its submodules whose outputs are coefficients."""


@contextlib.contextmanager
def frozen_conventions(model: nn.Module) -> Iterator[None]:
    """Lets what the tables name fix everything but its value; restores all of it afterwards.

    Functions of torch's autograd that modelling files define are run as the plain torch of their
    forward pass, so that its operations are seen.

    Args:
        model: the model whose modelling files are looked through.

    Yields:
        Nothing.
    """
    spaces = {type(m).__module__: vars(sys.modules[type(m).__module__]) for m in model.modules()}
    with contextlib.ExitStack() as stack:
        for space in spaces.values():
            for name, value in VALUE_ARGUMENT.items():
                stack.enter_context(_replaced(space, name, _with_fixed_arguments, value))
            for name, part in VALUE_PART.items():
                stack.enter_context(_replaced(space, name, _with_fixed_parts, part))
            for name in [n for n, v in space.items() if _is_autograd_function(v)]:
                stack.enter_context(_replaced(space, f"{name}.apply", _as_plain_torch, space[name]))
        for module in model.modules():
            for name in COEFFICIENT_MODULES.get(type(module).__name__, ()):
                handle = getattr(module, name).register_forward_hook(_fix_output)
                stack.callback(handle.remove)
        yield


@contextlib.contextmanager
def _replaced(
    space: dict[str, Any], name: str, wrap: Callable[[Any, Any], Any], option: Any
) -> Iterator[None]:
    """Replaces a function, or a method `Class.method`, of a modelling file where it has one."""
    owner, _, attribute = name.rpartition(".")
    holder = space.get(owner) if owner else None
    if owner and holder is not None and hasattr(holder, attribute):
        own = vars(holder).get(attribute)  # None if it is inherited
        setattr(holder, attribute, wrap(getattr(holder, attribute), option))
        try:
            yield
        finally:
            delattr(holder, attribute) if own is None else setattr(holder, attribute, own)
    elif not owner and attribute in space:
        before = space[attribute]
        space[attribute] = wrap(before, option)
        try:
            yield
        finally:
            space[attribute] = before
    else:
        yield


def _with_fixed_arguments(function: Callable[..., Any], value: str) -> Callable[..., Any]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        mode = _freezing()
        if mode is None:
            return function(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        fix = functools.partial(_fixed, mode)
        for name, argument in bound.arguments.items():
            change = as_value if name == value else fix
            bound.arguments[name] = rebuild(change, argument)
        return rebuild(_as_mixed, function(*bound.args, **bound.kwargs))

    return run


def _with_fixed_parts(function: Callable[..., Any], part: tuple[int, int]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        mode = _freezing()
        if mode is None:
            return function(*args, **kwargs)
        mode.value_part = part
        try:
            result = function(*args, **kwargs)
            if mode.value_part is not None:
                raise UnsupportedModelError(
                    f"{mode.module}: splits no projection into {part[0]} parts, unlike the code "
                    "that its convention is written for"
                )
            return result
        finally:
            mode.value_part = None

    return run


def _fix_output(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    mode = _freezing()
    return output if mode is None else _fixed(mode, output)


def _freezing() -> Freezing | None:
    """The freezing that is active in this thread, unless it only raises precision."""
    mode = active_mode()
    return mode if mode is not None and mode.rules else None


def _as_mixed(value: Any) -> Any:
    mark = mark_of(value)
    if mark is not None and mark.kind == Kind.LINEAR:
        set_mark(value, mark._replace(activated=False, source=None, mixed=True))
    return value


def _fixed(mode: Freezing, argument: Any) -> Any:
    unfixed = kind_of(argument) in (Kind.LINEAR, Kind.NONLINEAR)
    return mode.freeze(argument) if unfixed else argument


# ---------------------------------------------------------------- functions of torch's autograd


def _is_autograd_function(value: Any) -> bool:
    base = torch.autograd.Function
    return isinstance(value, type) and issubclass(value, base) and value is not base


def _as_plain_torch(apply: Callable[..., Any], function: Any) -> Callable[..., Any]:
    @functools.wraps(apply)
    def run(*args: Any, **kwargs: Any) -> Any:
        if _freezing() is None or not any(mark_of(leaf) for leaf in flatten((args, kwargs))):
            return apply(*args, **kwargs)
        separate = function.setup_context is not torch.autograd.Function.setup_context
        context = () if separate else (_NoContext(),)
        return function.forward(*context, *args, **kwargs)

    return run


class _NoContext:
    """Stands for the context of an autograd function whose backward pass is not used."""

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return lambda *_args, **_kwargs: None
