r"""Freezing: what each operation makes of its input is held fixed, and the network becomes affine.

A decoder computes `y = A(x) x + b`, where every `A(x)` is made of norm scales, attention
probabilities and gates. This module runs *unmodified* model code and types every tensor in it:

| kind        | meaning                                                       | example           |
|-------------|---------------------------------------------------------------|-------------------|
| (none)      | does not depend on the input                                  | a weight, a mask  |
| `LINEAR`    | affine in the input once the coefficients are fixed           | residual stream   |
| `NONLINEAR` | another function of the input: may only become a coefficient  | `rsqrt(mean(x²))` |
| `FROZEN`    | a coefficient that has been fixed                             | attention weights |

A rule per torch function says what comes out (`RULES`, below). A `NONLINEAR` tensor is fixed at the
moment it multiplies a `LINEAR` one; a product of two `LINEAR` tensors is resolved by the activation
mark (`act(g) · u` freezes `act(g)`), or else is `NONLINEAR`. So an exact answer is one whose last
tensor is `LINEAR`, a `NONLINEAR` one is refused with the name of the operation that made it, and a
function without a rule is refused as soon as a `LINEAR` tensor reaches it.

Coefficients can be *recorded* and *replayed*: replaying them on another input `z` evaluates the
affine map `F(z)` itself, which is how the constant `c = F(0)` and the leak are obtained.

The freezing of norms, attention and gates follows Golden, "Equivalent Linear Mappings of Large
Language Models" (TMLR 2025), which replaced modelling files; here a
`torch.overrides.TorchFunctionMode` does it, and nothing global is changed.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from elm_lanczos.attention import attention, frozen_product
from elm_lanczos.errors import UnsupportedModelError


class Kind(enum.IntEnum):
    """How a tensor depends on the input. Constants carry no kind at all."""

    FROZEN = 1
    LINEAR = 2
    NONLINEAR = 3


class Mark(NamedTuple):
    """What is known of one tensor: its kind, and where that came from."""

    kind: Kind
    activated: bool = False
    """The output of an activation function: the factor that `act(g) · u` freezes."""
    origin: str = ""
    """For a `NONLINEAR` tensor: the operation (and module) that made it so."""


def mark_of(value: object) -> Mark | None:
    """Returns the mark of a tensor, or None for constants and anything that is not a tensor."""
    return getattr(value, "_elm_mark", None)


def set_mark(value: object, mark: Mark | None) -> None:
    """Marks a tensor, or every tensor of a tuple or list of them."""
    if isinstance(value, Tensor):
        value._elm_mark = mark  # type: ignore[attr-defined]
    elif isinstance(value, (tuple, list)):
        for item in value:
            set_mark(item, mark)


def linear(x: Tensor) -> Tensor:
    """Returns a view of `x` marked as the input of the linear system."""
    x = x.view_as(x)
    set_mark(x, Mark(Kind.LINEAR))
    return x


def flatten(values: Any) -> Iterator[Any]:
    """Yields the leaves of nested tuples, lists and dicts of arguments."""
    if isinstance(values, (tuple, list)):
        for value in values:
            yield from flatten(value)
    elif isinstance(values, dict):
        for value in values.values():
            yield from flatten(value)
    else:
        yield values


def rebuild(change: Callable[[Any], Any], values: Any) -> Any:
    """Returns nested arguments with `change` applied to every leaf."""
    if isinstance(values, tuple) and not hasattr(values, "_fields"):
        return tuple(rebuild(change, v) for v in values)
    if isinstance(values, list):
        return [rebuild(change, v) for v in values]
    if isinstance(values, dict):
        return {k: rebuild(change, v) for k, v in values.items()}
    return change(values)


def precision(dtype: torch.dtype) -> int:
    """Returns the number of bytes of a floating dtype, 0 for the others."""
    return dtype.itemsize if dtype.is_floating_point else 0


def function_name(func: Callable[..., Any]) -> str:
    """Returns a torch function's plain name: `add` for `torch.add`, `Tensor.add_`, `__iadd__`."""
    name = getattr(func, "__name__", str(func))
    if name == "__get__":  # a property such as Tensor.shape or Tensor.mT
        return str(getattr(func, "__self__").__name__)  # noqa: B009 (absent from the stubs)
    if name.startswith("__"):
        name = name.strip("_")
        return _OPERATORS.get(name, name)
    return name.removeprefix("_").removesuffix("_")


_OPERATORS = {"iadd": "add", "radd": "add", "isub": "sub", "imul": "mul", "rmul": "mul"}
_OPERATORS |= {"itruediv": "truediv", "rpow": "pow", "ipow": "pow"}


_NAMED_CASTS = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}
_IN_PLACE = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}


class Tape:
    """Coefficients of one evaluation in the order in which they were fixed."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._next = 0

    def rewind(self) -> Tape:
        """Starts the next replay at the first coefficient."""
        self._next = 0
        return self

    def read(self) -> Any:
        """Returns the next recorded coefficient."""
        self._next += 1
        return self.values[self._next - 1]


class Freezing(TorchFunctionMode):
    """Runs model code with every coefficient held fixed, so that it is affine in its input.

    Nothing that depends on the input is ever computed below `compute_dtype`: weights stored in a
    lower precision are raised where they are used, one operation at a time, and casts that would
    lower a tensor (`.to(float32)` inside a norm of a float64 model) leave it as it is; the same
    holds for what is made of weights alone (`1 + weight.float()`). Other constants (rotary tables,
    masks) are computed as the model writes them, but never below float32.

    Args:
        compute_dtype: working precision of the linear path.
        record: a tape to which every coefficient is appended.
        replay: a tape whose coefficients are used instead of the ones this input would give.
        without_constants: drop additive constants (biases, learned positions, `+ 1`), so that
            `F(0)` shows only what reaches the output in no accounted way: the leak.
        rules: the rule table (another one only to test what a wrong rule does).
        module: name of the module being run, for messages.
    """

    def __init__(
        self,
        compute_dtype: torch.dtype,
        *,
        record: Tape | None = None,
        replay: Tape | None = None,
        without_constants: bool = False,
        rules: dict[str, Rule] | None = None,
        module: str = "the model",
    ) -> None:
        super().__init__()
        self.compute_dtype = compute_dtype
        self.record = record
        self.replay = replay.rewind() if replay is not None else None
        self.without_constants = without_constants
        self.rules = RULES if rules is None else rules
        self.module = module

    def freeze(self, value: Any) -> Any:
        """Fixes a coefficient: a tensor, or a decision such as a Python number or a list."""
        if self.replay is not None:
            fixed = self.replay.read()
        else:
            fixed = value.detach() if isinstance(value, Tensor) else value
            if self.record is not None:
                self.record.values.append(fixed)
        if isinstance(fixed, Tensor):
            fixed = fixed.view_as(fixed)
            set_mark(fixed, Mark(Kind.FROZEN))
        return fixed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Applies the rule of `func`, or calls it plainly when no argument depends on the input."""
        kwargs = kwargs or {}
        name = function_name(func)
        if name in UNTYPED:
            return func(*args, **kwargs)
        marks = _marks(args, kwargs)
        if not marks:
            of_weights = any(isinstance(leaf, nn.Parameter) for leaf in flatten((args, kwargs)))
            floor = self.compute_dtype if of_weights else torch.float32
            return self.call(func, args, kwargs, floor)
        rule = self.rules.get(name)
        if rule is not None:
            return rule(self, func, args, kwargs)
        if any(m.kind == Kind.LINEAR for m in marks):
            raise UnsupportedModelError(
                f"{self.module}: no freezing rule for {name}(), so this model cannot be linearised "
                "exactly (rules are rows of elm_lanczos.freezing.RULES)"
            )
        result = self.call(func, args, kwargs)
        set_mark(result, max(marks, key=lambda m: m.kind))
        return result

    def call(self, func: Any, args: Any, kwargs: Any, floor: torch.dtype | None = None) -> Any:
        """Calls `func` with floating arguments and dtypes below `floor` raised to `compute_dtype`.

        Args:
            func: a torch function.
            args: its positional arguments; the target of an in-place operation is left as it is.
            kwargs: its keyword arguments.
            floor: the lowest dtype left alone; the working precision itself if not given.

        Returns:
            What `func` returns.
        """
        floor = floor or self.compute_dtype

        def change(value: Any) -> Any:
            return self.raise_precision(value, floor)

        if function_name(func) == "embedding":  # raise the rows looked up, not the whole table
            return change(func(*args, **kwargs))
        if func.__name__ in _NAMED_CASTS:
            func, args = torch.Tensor.to, (args[0], _NAMED_CASTS[func.__name__])
        if func.__name__ in _IN_PLACE or func.__name__.endswith("_"):
            return func(args[0], *rebuild(change, args[1:]), **rebuild(change, kwargs))
        return func(*rebuild(change, args), **rebuild(change, kwargs))

    def raise_precision(self, value: Any, floor: torch.dtype | None = None) -> Any:
        """Returns a floating tensor or dtype below `floor` raised, anything else unchanged."""
        bytes_ = precision(floor or self.compute_dtype)
        if isinstance(value, torch.dtype) and 0 < precision(value) < bytes_:
            return self.compute_dtype
        if isinstance(value, Tensor) and 0 < precision(value.dtype) < bytes_:
            raised = value.to(self.compute_dtype)
            set_mark(raised, mark_of(value))
            return raised
        return value

    def nonlinear(self, func: Any, marks: list[Mark]) -> Mark:
        """Returns the mark of a nonlinear result, keeping the origin of an earlier one."""
        earlier = next((m for m in marks if m.kind == Kind.NONLINEAR), None)
        return earlier or Mark(Kind.NONLINEAR, origin=f"{function_name(func)}() in {self.module}")


Rule = Callable[[Freezing, Any, tuple[Any, ...], dict[str, Any]], Any]


def _marks(*values: Any) -> list[Mark]:
    return [m for leaf in flatten(values) if (m := mark_of(leaf)) is not None]


# ---------------------------------------------------------------------------- kinds of rules


def structural(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """Linear in all tensor arguments together: reshapes, slices, sums, concatenations.

    Integer and boolean arguments that depend on the input (indices, conditions) are decisions and
    are frozen. A mixture of `LINEAR` and `NONLINEAR` is `NONLINEAR`.

    Returns:
        The function's own result, marked.
    """

    def decide(value: Any) -> Any:
        decision = isinstance(value, Tensor) and not value.dtype.is_floating_point
        return mode.freeze(value) if decision and mark_of(value) is not None else value

    if any(m.kind == Kind.LINEAR for m in _marks(args, kwargs)):
        args, kwargs = rebuild(decide, args), rebuild(decide, kwargs)
    marks = _marks(args, kwargs)
    result = mode.call(func, args, kwargs)
    kind = max(m.kind for m in marks)
    activated = all(m.activated for m in marks) and function_name(func) not in _REDUCTIONS
    origin = next((m.origin for m in marks if m.origin), "")
    set_mark(args[0] if func.__name__ == "__setitem__" else result, Mark(kind, activated, origin))
    return result


_REDUCTIONS = {"sum", "mean", "cumsum"}


def addition(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """A sum or difference: `LINEAR` plus a constant stays `LINEAR`, the constant going to `c`."""
    if mode.without_constants and max(m.kind for m in _marks(args)) == Kind.LINEAR:
        args = tuple(_zero(a) if mark_of(a) is None else a for a in args)
    return structural(mode, func, args, kwargs)


def constant(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """A new tensor of the shape of another, whose values do not depend on it."""
    return mode.call(func, args, kwargs)


def _zero(constant: Any) -> Any:
    return torch.zeros_like(constant) if isinstance(constant, Tensor) else type(constant)(0)


def product(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """Bilinear in its first two arguments: elementwise and matrix products.

    `LINEAR · NONLINEAR` freezes the second; `act(g) · u`, elementwise and of one shape as in a gated
    MLP, freezes `act(g)`; any other product of two `LINEAR` tensors is `NONLINEAR`. A gate times a
    `NONLINEAR` tensor is `NONLINEAR` too: both would be coefficients.

    Returns:
        The product, marked.
    """
    marks = [mark_of(a) for a in args[:2]]
    kinds = [m.kind if m else None for m in marks]
    frozen = None
    if kinds == [Kind.LINEAR, Kind.LINEAR]:
        activated = [bool(m and m.activated) for m in marks]
        gated = function_name(func) in _ELEMENTWISE and args[0].shape == args[1].shape
        frozen = activated.index(True) if gated and sum(activated) == 1 else None
    elif Kind.LINEAR in kinds and Kind.NONLINEAR in kinds:
        gate = marks[kinds.index(Kind.LINEAR)]
        frozen = None if gate and gate.activated else kinds.index(Kind.NONLINEAR)
    if frozen is not None:
        args = tuple(mode.freeze(a) if i == frozen else a for i, a in enumerate(args))
        kinds[frozen] = Kind.FROZEN
    result = mode.call(func, args, kwargs)
    if kinds.count(Kind.LINEAR) == 1 and Kind.NONLINEAR not in kinds:
        scaled_gate = kinds.count(None) == 1 and any(m and m.activated for m in marks)
        mark = Mark(Kind.LINEAR, activated=scaled_gate)
    elif kinds.count(Kind.LINEAR) == 2 or Kind.NONLINEAR in kinds:
        mark = mode.nonlinear(func, _marks(args))
    else:
        mark = Mark(Kind.FROZEN)
    set_mark(result, mark)
    return result


_ELEMENTWISE = {"mul", "multiply"}


def quotient(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """A quotient is a product with the reciprocal: linear in the numerator alone."""
    if mark_of(args[1]) is None:
        return product(mode, func, args, kwargs)
    kinds = [mark.kind if (mark := mark_of(arg)) else None for arg in args[:2]]
    if kinds == [Kind.LINEAR, Kind.NONLINEAR]:
        return product(mode, func, args, kwargs)
    return coefficient(mode, func, args, kwargs)


def matrix_product(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """A product by a matrix; of batches of matrices with a frozen left factor: `frozen_product`."""
    left, right = (mark.kind if (mark := mark_of(arg)) else None for arg in args[:2])
    if (
        left in (Kind.NONLINEAR, Kind.FROZEN)
        and right == Kind.LINEAR
        and args[0].ndim == args[1].ndim >= 3
        and args[0].shape[:-2] == args[1].shape[:-2]
    ):
        P = mode.freeze(args[0]) if left == Kind.NONLINEAR else args[0]
        result = frozen_product(P, args[1])
        set_mark(result, Mark(Kind.LINEAR))
        return result
    return product(mode, func, args, kwargs)


def affine(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """`linear(x, W, b)`, convolutions: a product, plus a bias that goes to `c`."""
    names = ("input", "weight", "bias")
    given = dict(zip(names, args[:3], strict=False)) | {n: kwargs[n] for n in names if n in kwargs}
    rest = {k: v for k, v in kwargs.items() if k not in names}
    bias = given.get("bias")
    linear_input = any(m.kind == Kind.LINEAR for m in _marks(given["input"], given["weight"]))
    if mode.without_constants and linear_input and bias is not None and mark_of(bias) is None:
        bias = None
    bias = mode.raise_precision(bias)

    def apply(x: Tensor, W: Tensor, **options: Any) -> Any:
        return func(x, W, bias, *args[3:], **options)

    apply.__name__ = func.__name__
    return product(mode, apply, (given["input"], given["weight"]), rest)


def coefficient(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """A function whose value may only serve as a coefficient: `NONLINEAR`."""
    marks = _marks(args, kwargs)
    result = mode.call(func, args, kwargs)
    if all(m.kind == Kind.FROZEN for m in marks):
        set_mark(result, Mark(Kind.FROZEN))
    else:
        set_mark(result, mode.nonlinear(func, marks))
    return result


def decision(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """A Python value read from a tensor (`item`, `tolist`, `bool`): replayed, not recomputed."""
    return mode.freeze(mode.call(func, args, kwargs))


def activation(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """`act(z) = z · (act(z)/z)` with the ratio frozen; the result is marked as activated."""
    z = args[0]
    mark = mark_of(z)
    if mark is None or mark.kind != Kind.LINEAR:
        return coefficient(mode, func, args, kwargs)
    kwargs = {k: v for k, v in kwargs.items() if k != "inplace"}
    fixed = z.detach()
    small = torch.full((), torch.finfo(z.dtype).tiny ** 0.5, dtype=z.dtype, device=z.device)
    at_zero = func(small, *args[1:], **kwargs) / small
    ratio = mode.call(func, (fixed, *args[1:]), kwargs) / fixed
    ratio = torch.where(fixed == 0, at_zero, ratio)
    result = z * mode.freeze(ratio)
    set_mark(result, Mark(Kind.LINEAR, activated=True))
    return result


def root_mean_square_norm(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """`rms_norm(x, shape, weight, eps)` with its scale frozen."""
    x, shape, weight, eps = _arguments(args, kwargs, ("input", "normalized_shape", "weight", "eps"))
    return _normalise(mode, func, x, shape, weight, None, eps, centred=False)


def layer_norm(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """`layer_norm(x, shape, weight, bias, eps)` with its scale frozen; centring is linear."""
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    x, shape, weight, bias, eps = _arguments(args, kwargs, names)
    return _normalise(mode, func, x, shape, weight, bias, eps if eps else 1e-5, centred=True)


def _arguments(args: Any, kwargs: Any, names: tuple[str, ...]) -> list[Any]:
    given = dict(zip(names, args, strict=False)) | kwargs
    return [given.get(name) for name in names]


def _normalise(
    mode: Freezing,
    func: Any,
    x: Tensor,
    shape: Any,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    *,
    centred: bool,
) -> Any:
    mark = mark_of(x)
    if mark is None or mark.kind != Kind.LINEAR:
        args = (x, shape, weight, bias, eps) if centred else (x, shape, weight, eps)
        return coefficient(mode, func, args, {})
    dims = tuple(range(-len(shape), 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    x = mode.raise_precision(x)
    if centred:
        x = x - x.mean(dims, keepdim=True)
    scale = torch.rsqrt(x.detach().square().mean(dims, keepdim=True) + eps)
    result = x * mode.freeze(scale)
    if weight is not None:
        result = result * mode.raise_precision(weight)
    if bias is not None and not mode.without_constants:
        result = result + mode.raise_precision(bias)
    set_mark(result, Mark(Kind.LINEAR))
    return result


def cast(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """A change of dtype or device, never to a precision below the working one."""
    source = args[0]
    result = mode.call(func, args, kwargs)
    if not result.dtype.is_floating_point and source.dtype.is_floating_point:
        set_mark(result, mode.nonlinear(func, _marks(source)))
    else:
        set_mark(result, mark_of(source))
    return result


def scaled_dot_product_attention(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """`softmax(q kᵀ) v` as torch's fused function spells it, with the probabilities frozen."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
    q, k, v, mask, _, is_causal, scale = _arguments(args, kwargs, names)
    if is_causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    with mode:
        return attention(q, k, v, mask, scale if scale is not None else q.shape[-1] ** -0.5)


# ---------------------------------------------------------------------------- the rule table

UNTYPED = frozenset(
    "shape dtype device ndim layout is_cuda is_cpu is_meta is_sparse is_quantized requires_grad "
    "size dim numel stride storage_offset data_ptr is_contiguous is_floating_point is_complex "
    "element_size get_device len hash repr format is_leaf grad_fn grad is_nested names itemsize "
    "nbytes is_inference retain_grad version output_nr device_mesh is_mps is_xpu".split()
)
"""Questions about a tensor that do not depend on its values."""

_STRUCTURAL = (
    "view view_as reshape reshape_as flatten unflatten ravel squeeze unsqueeze transpose swapaxes "
    "swapdims permute movedim T mT t expand expand_as broadcast_to repeat repeat_interleave tile "
    "contiguous clone split chunk tensor_split unbind narrow select slice getitem "
    "setitem index_select gather take_along_dim index_add index_copy scatter scatter_add copy "
    "masked_select masked_fill masked_scatter where cat concat concatenate stack hstack vstack "
    "flip roll pad tril triu diagonal unfold dropout sum mean cumsum neg positive"
)
_CONSTANT = "zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full"
_COEFFICIENT = (
    "pow square rsqrt sqrt reciprocal exp exp2 expm1 log log1p log2 softmax log_softmax sigmoid "
    "logsigmoid softplus abs sign norm vector_norm var std logsumexp max min amax amin clamp "
    "clamp_min clamp_max maximum minimum cos sin topk sort argsort argmax argmin argtopk cumprod "
    "prod rdiv rtruediv eq ne lt le gt ge isnan isinf isfinite logical_and logical_or logical_not "
    "bitwise_and bitwise_or bitwise_not and or invert nonzero one_hot bincount histc round floor "
    "any all normalize detach data"
)
_DECISION = "item tolist bool int index nonzero_static contains"
_ACTIVATION = "silu gelu relu relu6 tanh mish elu selu celu leaky_relu hardswish hardtanh softsign"

RULES: dict[str, Rule] = {
    **dict.fromkeys(_STRUCTURAL.split(), structural),
    **dict.fromkeys(_CONSTANT.split(), constant),
    **dict.fromkeys(_COEFFICIENT.split(), coefficient),
    **dict.fromkeys(_DECISION.split(), decision),
    **dict.fromkeys(_ACTIVATION.split(), activation),
    **dict.fromkeys("add sub rsub subtract".split(), addition),
    **dict.fromkeys(_ELEMENTWISE, product),
    **dict.fromkeys("div truediv divide".split(), quotient),
    **dict.fromkeys("matmul bmm mm mv".split(), matrix_product),
    **dict.fromkeys("linear conv1d".split(), affine),
    **dict.fromkeys("to type type_as float double half bfloat16 cuda cpu".split(), cast),
    "rms_norm": root_mean_square_norm,
    "layer_norm": layer_norm,
    "scaled_dot_product_attention": scaled_dot_product_attention,
}
"""Torch function name (without in-place underscore) → the rule that freezes it."""
