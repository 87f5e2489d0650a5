"""The rule table: for every torch function a model may call, what is frozen and what is linear.

A rule is called as `rule(mode, func, args, kwargs)` instead of the function when one of its
arguments depends on the input, and returns its result, marked (see `freezing`). To support a new
function, add its name to the row of the table that describes it, at the end of this file, and a
line to `tests/test_rules.py`. There are few kinds of rules:

| rule | what comes out |
|---|---|
| `structural` | linear in all its tensors together: reshapes, slices, sums |
| `addition` | linear plus a constant, which goes to `c` |
| `product`, `matrix_product`, `affine` | linear times a coefficient, which is frozen |
| `coefficient` | only ever a coefficient: powers, exponentials, softmax, comparisons |
| `activation` | `z · (act(z)/z)` with the ratio frozen |
| `decision` | a Python value, or a choice of indices: recorded like a coefficient |
| norms, attention | their own frozen forms |
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from elm_lanczos.attention import attention, frozen_product, is_shared
from elm_lanczos.errors import UnsupportedModelError
from elm_lanczos.freezing import (
    Freezing,
    Kind,
    Mark,
    Rule,
    Scaled,
    flatten,
    function_name,
    is_in_place,
    kind_of,
    mark_of,
    marks_of,
    rebuild,
    root_of,
    set_mark,
)
from elm_lanczos.masks import causal


def structural(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """Linear in all tensor arguments together: reshapes, slices, sums, concatenations.

    Integer and boolean arguments that depend on the input (indices, conditions) are decisions and
    are frozen. A mixture of `LINEAR` and `NONLINEAR` is `NONLINEAR`.

    Returns:
        The function's own result, marked.
    """

    def decide(value: Any) -> Any:
        unfixed = kind_of(value) in (Kind.LINEAR, Kind.NONLINEAR)
        return mode.freeze(value) if unfixed and is_decision(value) else value

    if kwargs.get("reduce") is not None:  # scatter(…, reduce="multiply") is not linear
        return coefficient(mode, func, args, kwargs)
    tensors, marks = marked_tensors(args, kwargs)
    if any(m.kind == Kind.LINEAR for m in marks):
        if any(is_decision(tensor) for tensor in tensors):
            args, kwargs = rebuild(decide, args), rebuild(decide, kwargs)
        if mode.without_constants and function_name(func) in _JOINS:
            args, kwargs = rebuild(_without_constant, args), rebuild(_without_constant, kwargs)
        tensors, marks = marked_tensors(args, kwargs)
    result = mode.call(func, args, kwargs)
    amounts = [tensor for tensor in tensors if not is_decision(tensor)]
    if amounts and not marks_of(amounts) and all(m.kind == Kind.FROZEN for m in marks):
        return result  # a weight looked up by a recorded choice is a constant, such as its bias
    target = args[0] if func.__name__ == "__setitem__" else result
    kind = max(m.kind for m in marks)
    activated = all(m.activated for m in marks) and function_name(func) not in _REDUCTIONS
    origin = next((m.origin for m in marks if m.origin), "")
    bilinear = kind == Kind.NONLINEAR and any(m.bilinear for m in marks)
    root = _common_root(func, tensors, result)
    linear = [m for m in marks if m.kind == Kind.LINEAR]
    mixed = bool(linear) and all(m.mixed for m in linear)
    source = _common_source(linear)
    set_mark(target, Mark(kind, activated, origin, root, source, mixed, bilinear))
    return result


def marked_tensors(*values: Any) -> tuple[list[Tensor], list[Mark]]:
    """Returns the tensors in nested arguments, and the marks of those that have one."""
    tensors = [leaf for leaf in flatten(values) if isinstance(leaf, Tensor)]
    return tensors, [m for tensor in tensors if (m := mark_of(tensor)) is not None]


def split(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """Parts of a tensor; of a fused projection only the value's stays linear (`conventions`)."""
    parts = structural(mode, func, args, kwargs)
    if mode.value_part is None or kind_of(args[0]) != Kind.LINEAR:
        return parts
    count, value = mode.value_part
    if len(parts) != count:
        return parts
    mode.value_part = None  # one split to a method
    return tuple(
        as_value(part) if i == value else mode.freeze(part) for i, part in enumerate(parts)
    )


def as_value(tensor: Tensor) -> Tensor:
    """Returns a value path that is no longer taken for a gate if an activation made it.

    Args:
        tensor: any tensor.

    Returns:
        A view of it without `activated` if it is `LINEAR`, else itself.
    """
    if kind_of(tensor) == Kind.LINEAR:
        tensor = tensor.view_as(tensor)
        set_mark(tensor, Mark(Kind.LINEAR))
    return tensor


_REDUCTIONS = {"sum", "mean", "cumsum"}
_JOINS = {"cat", "concat", "concatenate", "stack", "hstack", "vstack", "where"}


def _without_constant(value: Any) -> Any:
    """A constant joined to linear tensors goes to `c`, like one added to them."""
    known = not isinstance(value, Tensor) or is_decision(value) or mark_of(value) is not None
    return value if known else torch.zeros_like(value)


def _common_root(func: Any, given: Any, result: Any) -> Tensor | None:
    """The one linear tensor that an elementwise result of some arguments is a function of."""
    if function_name(func) not in _ELEMENTWISE or not isinstance(result, Tensor):
        return None
    marked = [leaf for leaf in flatten(given) if mark_of(leaf) is not None]
    roots = [root_of(leaf) for leaf in marked if kind_of(leaf) != Kind.FROZEN]
    root = roots[0] if roots else None
    same = root is not None and all(other is root for other in roots)
    return root if same and root is not None and root.shape == result.shape else None


def _common_source(linear: list[Mark]) -> Tensor | None:
    """What all of some linear tensors are projections of, if it is one tensor."""
    sources = [m.source for m in linear]
    same = bool(sources) and all(source is sources[0] for source in sources)
    return sources[0] if same else None


def shaped(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """`a.expand_as(b)`: of the second tensor only the shape is used."""
    if mark_of(args[0]) is None:
        return mode.call(func, args, kwargs)
    return structural(mode, func, (args[0], args[1].detach()), kwargs)


def addition(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """A sum or difference: `LINEAR` plus a constant stays `LINEAR`, the constant going to `c`."""
    if mode.without_constants and max(m.kind for m in marks_of(args)) == Kind.LINEAR:
        args = tuple(_zero(a) if mark_of(a) is None else a for a in args)
    return structural(mode, func, args, kwargs)


def constant(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """A new tensor of the shape of another, whose values do not depend on it."""
    return mode.call(func, args, kwargs)


def _zero(constant: Any) -> Any:
    return torch.zeros_like(constant) if isinstance(constant, Tensor) else type(constant)(0)


def product(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """Bilinear in its first two arguments: elementwise and matrix products.

    `LINEAR · NONLINEAR` freezes the second; `act(g) · u`, elementwise and of one shape, freezes
    `act(g)`. Where `g` and `u` are projections of the same tensor, this is a gated MLP, and the
    mode's `gate` may fix `u` instead. Any other product of two `LINEAR` tensors is `NONLINEAR`. A
    gate times a `NONLINEAR` tensor is `NONLINEAR` too, as both would be coefficients, unless that
    is one number per row: a norm's scale, an expert's weight.

    Returns:
        The product, marked.
    """
    marks = [mark_of(a) for a in args[:2]]
    kinds = [m.kind if m else None for m in marks]
    activated = [bool(m and m.activated) for m in marks]
    multiplies = function_name(func) in _MULTIPLY
    shape = _broadcast(args)
    root = _common_root(func, args[:2], shape)
    frozen = None
    if kinds == [Kind.LINEAR, Kind.LINEAR]:
        gated = multiplies and args[0].shape == args[1].shape and sum(activated) == 1
        if gated:
            frozen = _factor_of_gate(mode, args, activated, own=root is not None)
        elif multiplies and args[0] is args[1] and all(activated):  # relu(z)²
            frozen = 1
    elif Kind.LINEAR in kinds and Kind.NONLINEAR in kinds and not _of_three(marks):
        other = args[kinds.index(Kind.NONLINEAR)]
        per_row = multiplies and (other.ndim == 0 or other.shape[-1] == 1)
        gate = activated[kinds.index(Kind.LINEAR)] and root is None and not per_row
        frozen = None if gate else kinds.index(Kind.NONLINEAR)
    if frozen is not None:
        func = _out_of_place(mode, func) if frozen == 0 and is_in_place(func) else func
        args = tuple(mode.freeze(a) if i == frozen else a for i, a in enumerate(args))
        kinds[frozen] = Kind.FROZEN
    given, factors = args, None
    if multiplies and Kind.LINEAR in kinds and not is_in_place(func) and not kwargs:
        args, factors = _merged(mode, args, kinds, shape)
    result = mode.call(func, args, kwargs)
    scaled = None if factors is None else Scaled.of(*factors, result)
    if kinds.count(Kind.LINEAR) == 1 and Kind.NONLINEAR not in kinds:
        by_constant = multiplies and kinds.count(None) == 1 and any(activated)
        gate = by_constant or (root is not None and frozen is not None)
        linear = given[kinds.index(Kind.LINEAR)]
        source, mixed = _source_of(linear), _is_mixed(linear)
        if not multiplies and function_name(func) not in _DIVIDE:  # a matrix
            mixed = mixed or None not in kinds
            source = None if mixed else _projected_from(linear)
        mark = Mark(Kind.LINEAR, gate, "", root, source, mixed, scaled=scaled)
    elif Kind.LINEAR in kinds or Kind.NONLINEAR in kinds:
        mark = mode.nonlinear(func, marks_of(args))._replace(root=root)
        mark = mark._replace(bilinear=root is None and _is_bilinear(marks))
        mark = _without_convention(mode, func, marks, mark)
    else:
        mark = Mark(Kind.FROZEN)
    set_mark(result, mark)
    return result


def _merged(
    mode: Freezing, args: Any, kinds: list[Kind | None], shape: Tensor
) -> tuple[Any, tuple[Tensor, Tensor] | None]:
    """Turns `(x · a) · b` into `x · (a b)`, so that every later pass multiplies once.

    Norms multiply by a scale per token and then by a weight per channel.

    Args:
        mode: the freezing.
        args: the factors.
        kinds: their kinds.
        shape: a tensor of the product's shape.

    Returns:
        The factors to multiply instead, and again as (x, coefficient); None if the product is not a
        multiple of a linear tensor of its own shape.
    """
    linear = kinds.index(Kind.LINEAR)
    x, coefficient = args[linear], args[1 - linear]
    if not isinstance(coefficient, Tensor) or kinds[1 - linear] not in (None, Kind.FROZEN):
        return args, None
    if x.shape != shape.shape:
        return args, None
    coefficient = mode.raise_precision(coefficient)
    mark = mark_of(x)
    earlier = mark.scaled if mark is not None else None
    if earlier is not None and earlier.holds_for(x):
        x, coefficient = earlier.x, earlier.coefficient * coefficient
        args = (x, coefficient) if linear == 0 else (coefficient, x)
    return args, (x, coefficient)


def _of_three(marks: list[Mark | None]) -> bool:
    """Whether a linear tensor meets a product of two others, with no function in between."""
    return any(m is not None and m.bilinear for m in marks)


def _without_convention(mode: Freezing, func: Any, marks: list[Mark | None], mark: Mark) -> Mark:
    """The mark of a product, saying so if no convention tells which of three factors is linear."""
    if not (_of_three(marks) and any(m and m.kind == Kind.LINEAR for m in marks)):
        return mark
    what = f"a product of three linear factors ({function_name(func)}() in {mode.module}), for "
    return mark._replace(origin=f"{what}which elm_lanczos.conventions names no value path,")


def _is_bilinear(marks: list[Mark | None]) -> bool:
    """Whether a nonlinear product is of two linear tensors, or such a one times a constant."""
    kinds = [m.kind if m else None for m in marks]
    return kinds.count(Kind.LINEAR) >= 2 or (_of_three(marks) and Kind.LINEAR not in kinds)


def _factor_of_gate(
    mode: Freezing, factors: Any, activated: list[bool], *, own: bool
) -> int | None:
    """Which factor of `act(g) · u` is held fixed.

    Args:
        mode: the freezing.
        factors: the two of them.
        activated: which of them is `act(g)`.
        own: whether `u` is a function of `g` as well, as in `g · sigmoid(g)`.

    Returns:
        Its index, or None if that would fix what tokens were mixed into (the value path) and go
        through a projection.

    Raises:
        UnsupportedModelError: if the mode's gate is "up" and it cannot be told whether this is a
            gated MLP.
    """
    gate = activated.index(True)
    if own:
        return gate
    mixed = [_is_mixed(factor) for factor in factors[:2]]
    if mixed[gate] and not mixed[1 - gate]:
        return None
    if mode.gate != "up" or any(mixed):  # the output gate of a mixer is no gated MLP
        return gate
    sources = [_source_of(factor) for factor in factors[:2]]
    for i, other in enumerate(reversed(sources)):
        if sources[i] is None and other is not None and root_of(factors[i]) is other:
            sources[i] = other  # the very tensor that the other factor is a projection of
    if any(source is None for source in sources):
        raise UnsupportedModelError(
            f"{mode.module}: cannot tell whether a product is a gated MLP, so gate='up' cannot be "
            "used; gate='frozen' can"
        )
    return 1 - gate if sources[0] is sources[1] else gate


_MULTIPLY = {"mul", "multiply"}
_DIVIDE = {"div", "truediv", "divide"}


def _broadcast(args: Any) -> Tensor:
    """A tensor of the shape of an elementwise product, without its memory."""
    shapes = [a.shape for a in args[:2] if isinstance(a, Tensor)]
    try:  # NumPy's function takes a tenth of the time of torch's
        return torch.empty(np.broadcast_shapes(*shapes), device="meta")
    except ValueError:  # a matrix product
        return torch.empty(0, device="meta")


def _out_of_place(mode: Freezing, func: Any) -> Any:
    """The operator that leaves its first argument, a frozen coefficient, as it is."""
    if func.__name__ == "__imul__":
        return torch.Tensor.mul
    raise UnsupportedModelError(
        f"{mode.module}: {func.__name__}() multiplies into a coefficient, so the module cannot be "
        "linearised exactly"
    )


def square(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """`square(a)`, `a ** 2`: of an activation `relu(z)²` another activation, else a coefficient."""
    exponent = args[1] if len(args) > 1 else kwargs.get("exponent", 2)
    mark = mark_of(args[0])
    if mark is None or not mark.activated or not isinstance(exponent, int) or exponent != 2:
        return coefficient(mode, func, args, kwargs)
    return product(mode, torch.mul, (args[0], args[0]), {})


def fused(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """`addmm`, `baddbmm`, `addbmm`, `addcmul`: a sum of a tensor and a product, `β a + α b·c`."""
    name = function_name(func)
    start, left, right = _arguments(args, kwargs, ("input", *_FACTORS[name]))
    with mode:
        if name == "addcmul":
            return start + kwargs.get("value", 1) * (left * right)
        scaled = left @ right
        scaled = scaled.sum(0) if name == "addbmm" else scaled
        alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
        scaled = scaled if alpha == 1 else scaled * alpha
        if beta == 0:
            return scaled
        return (start if beta == 1 else start * beta) + scaled


_FACTORS = {
    "addmm": ("mat1", "mat2"),
    "baddbmm": ("batch1", "batch2"),
    "addbmm": ("batch1", "batch2"),
    "addcmul": ("tensor1", "tensor2"),
}
"""Names of the two factors of each fused product."""


def einsum(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """A contraction of one or two tensors; of more, all but the linear one must be coefficients."""
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    marks = [mark_of(x) for x in operands]
    kinds = [m.kind if m else None for m in marks]
    if kinds.count(Kind.LINEAR) == 1:
        gate = any(m and m.activated for m in marks) and Kind.NONLINEAR in kinds
        if not gate and not _of_three(marks):
            operands = [
                mode.freeze(x) if k == Kind.NONLINEAR else x
                for x, k in zip(operands, kinds, strict=True)
            ]
            kinds = [Kind.FROZEN if k == Kind.NONLINEAR else k for k in kinds]
    result = mode.call(func, (equation, *operands), kwargs)
    if kinds.count(Kind.LINEAR) == 1 and Kind.NONLINEAR not in kinds:
        linear = operands[kinds.index(Kind.LINEAR)]
        mixed = _is_mixed(linear) or Kind.FROZEN in kinds
        source = None if mixed else _projected_from(linear)
        mark = Mark(Kind.LINEAR, source=source, mixed=mixed)
    elif Kind.LINEAR in kinds or Kind.NONLINEAR in kinds:
        mark = mode.nonlinear(func, marks_of(operands))._replace(bilinear=_is_bilinear(marks))
        mark = _without_convention(mode, func, marks, mark)
    else:
        mark = Mark(Kind.FROZEN)
    set_mark(result, mark)
    return result


def quotient(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """A quotient is a product with the reciprocal, which can only be a coefficient."""
    if kwargs.get("rounding_mode") is not None:
        return coefficient(mode, func, args, kwargs)
    divisor, kinds = args[1], [kind_of(arg) for arg in args[:2]]
    if kinds[0] is None or kinds[1] == Kind.LINEAR:
        return coefficient_keeping_bilinear(mode, func, args, kwargs)
    if kinds[1] == Kind.NONLINEAR:  # whatever made it: nothing goes through a divisor
        divisor = divisor.view_as(divisor)
        set_mark(divisor, Mark(Kind.NONLINEAR, root=root_of(args[1])))
    return product(mode, func, (args[0], divisor, *args[2:]), kwargs)


def coefficient_keeping_bilinear(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """A coefficient that makes no weights of a product `kᵀ v`: limits, scales, chosen entries.

    Returns:
        The function's own result, marked.
    """
    bilinear = any(m.bilinear for m in marks_of(args, kwargs))
    result = coefficient(mode, func, args, kwargs)
    for leaf in flatten(result):
        mark = mark_of(leaf)
        if bilinear and mark is not None and mark.kind == Kind.NONLINEAR:
            set_mark(leaf, mark._replace(bilinear=True))
    return result


def matrix_product(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """A product by a matrix; of batches of matrices with a frozen left factor: `frozen_product`."""
    if mark_of(args[1]) is None:
        args = (as_activation(mode, args[0]), *args[1:])
    left, right = (kind_of(arg) for arg in args[:2])
    if (
        left in (Kind.NONLINEAR, Kind.FROZEN)
        and not _of_three([mark_of(args[0])])
        and right == Kind.LINEAR
        and is_shared(args[0], args[1])
    ):
        P = mode.freeze(args[0]) if left == Kind.NONLINEAR else args[0]
        result = frozen_product(P, args[1])
        set_mark(result, Mark(Kind.LINEAR, mixed=True))
        return result
    return product(mode, func, args, kwargs)


def affine(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """`linear(x, W, b)`, convolutions: a product, plus a bias that goes to `c`."""
    names = ("input", "weight", "bias")
    given = dict(zip(names, args[:3], strict=False)) | {n: kwargs[n] for n in names if n in kwargs}
    given["input"] = as_activation(mode, given["input"])
    rest = {k: v for k, v in kwargs.items() if k not in names}
    bias = given.get("bias")
    linear_input = any(m.kind == Kind.LINEAR for m in marks_of(given["input"], given["weight"]))
    if mode.without_constants and linear_input and bias is not None and mark_of(bias) is None:
        bias = None
    bias = mode.raise_precision(bias)

    def apply(x: Tensor, W: Tensor, **options: Any) -> Any:
        return func(x, W, bias, *args[3:], **options)

    apply.__name__ = func.__name__
    return product(mode, apply, (given["input"], given["weight"]), rest)


def as_activation(mode: Freezing, value: Tensor) -> Tensor:
    """Turns an elementwise function `f(z)` that a weight is about to multiply into `z · (f(z)/z)`.

    Where `z = 0`, `f(0)` is a constant. This is how activations written out in torch (xIELU, GELU
    by hand) are linearised: not until they are used as values are they more than a coefficient.

    Args:
        mode: the freezing.
        value: any tensor.

    Returns:
        The tensor itself, or, for a `NONLINEAR` elementwise function of one `LINEAR` tensor, its
        `LINEAR` form.
    """
    mark = mark_of(value)
    if mark is None or mark.kind != Kind.NONLINEAR or mark.root is None:
        return value
    z = mark.root
    fixed = z.detach()
    zero, none = fixed == 0, torch.zeros_like(fixed)
    result = z * mode.freeze(torch.where(zero, none, value.detach() / fixed))
    at_zero = mode.freeze(torch.where(zero, value.detach(), none))
    if not mode.without_constants:
        result = result + at_zero
    root = root_of(z)
    set_mark(result, Mark(Kind.LINEAR, True, "", root, _source_of(z), _is_mixed(z)))
    return result


def _source_of(value: Any) -> Tensor | None:
    mark = mark_of(value)
    return None if mark is None else mark.source


def _projected_from(linear: Tensor) -> Tensor:
    """What a projection of a linear tensor is a projection of: its own source, or itself."""
    source = _source_of(linear)
    return linear if source is None else source


def _is_mixed(value: Any) -> bool:
    mark = mark_of(value)
    return mark is not None and mark.mixed


def coefficient(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """A function whose value may only serve as a coefficient: `NONLINEAR`."""
    marks = marks_of(args, kwargs)
    result = mode.call(func, args, kwargs)
    fixed = all(m.kind == Kind.FROZEN for m in marks)

    def mark(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if fixed:
            set_mark(value, Mark(Kind.FROZEN))
        elif is_decision(value):  # fixed at once, so that whatever depends on it is the same again
            value = mode.freeze(value)
        else:
            root = _common_root(func, (args, kwargs), value)
            set_mark(value, mode.nonlinear(func, marks)._replace(root=root, bilinear=False))
        return value

    return rebuild(mark, result)


def is_decision(value: Any) -> bool:
    """Whether a tensor holds a choice (indices, conditions) rather than amounts."""
    return isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())


def unfrozen(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """The function itself, but never below the working precision. For comparison only."""
    result = mode.call(func, args, kwargs)
    target = args[0] if func.__name__ == "__setitem__" else result
    set_mark(target, Mark(Kind.LINEAR))
    return result


def clamped(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """`clamp(z) = z · (clamp(z)/z)` with the ratio frozen; no gate, unlike an activation."""
    if kind_of(args[0]) != Kind.LINEAR:
        return coefficient_keeping_bilinear(mode, func, args, kwargs)
    zero = args[0].detach() == 0
    at_zero = mode.call(func, (torch.zeros_like(args[0].detach()), *args[1:]), kwargs)
    result = activation(mode, func, args, kwargs)
    mark = mark_of(result)
    if at_zero.any():
        offset = mode.freeze(torch.where(zero, at_zero, torch.zeros_like(at_zero)))
        result = result if mode.without_constants else result.add_(offset)
    if mark is not None and mark.kind == Kind.LINEAR:
        given = mark_of(args[0])
        set_mark(result, mark._replace(activated=given is not None and given.activated))
    return result


def iteration(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """`for row in tensor`: the rows, of a nonlinear tensor (chosen experts) as decisions."""
    tensor = args[0]
    if kind_of(tensor) == Kind.NONLINEAR:
        tensor = mode.freeze(tensor)
    with mode:
        return iter(tensor.unbind(0))


def decision(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """A Python value read from a tensor (`item`, `tolist`, `bool`): replayed, not recomputed.

    Amounts are refused: as plain numbers they could reach the output unseen.

    Returns:
        The recorded value.

    Raises:
        UnsupportedModelError: if the tensor holds amounts, not choices.
    """
    if function_name(func) != "bool" and not is_decision(args[0]):
        raise UnsupportedModelError(
            f"{mode.module}: {function_name(func)}() reads a number that depends on the input, so "
            "the module cannot be linearised exactly"
        )
    return mode.freeze(mode.call(func, args, kwargs))


def activation(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """`act(z) = z · (act(z)/z)` with the ratio frozen; the result is marked as activated."""
    z = args[0]
    mark = mark_of(z)
    if mark is None or mark.kind != Kind.LINEAR:
        return coefficient(mode, func, args, kwargs)
    in_place = is_in_place(func) or bool(kwargs.get("inplace"))
    kwargs = {k: v for k, v in kwargs.items() if k != "inplace"}
    fixed = z.detach().clone() if in_place else z.detach()
    small = torch.full_like(fixed, torch.finfo(z.dtype).tiny ** 0.5)
    at_zero = mode.call(func, (small.clone(), *args[1:]), kwargs) / small
    ratio = mode.call(func, (fixed.clone(), *args[1:]), kwargs) / fixed
    ratio = mode.freeze(torch.where(fixed == 0, at_zero, ratio))
    result = z.mul_(ratio) if in_place else z * ratio
    set_mark(result, mark._replace(activated=True, root=root_of(z)))
    return result


def normalize(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """`normalize(x, p, dim, eps)`, `x / max(‖x‖, eps)`, with its scale frozen like a norm's."""
    x = args[0]
    if kind_of(x) != Kind.LINEAR:
        return coefficient_keeping_bilinear(mode, func, args, kwargs)
    names = ("input", "p", "dim", "eps")
    given = dict(zip(names, args, strict=False)) | kwargs
    power, dim, eps = given.get("p", 2.0), given.get("dim", 1), given.get("eps", 1e-12)
    x = mode.raise_precision(x)
    size = torch.linalg.vector_norm(x.detach(), power, dim, keepdim=True).clamp_min(eps)
    result = x * mode.freeze(size.reciprocal())
    set_mark(result, Mark(Kind.LINEAR, source=_source_of(args[0]), mixed=_is_mixed(args[0])))
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
        return coefficient_keeping_bilinear(mode, func, args, {})
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
    set_mark(result, Mark(Kind.LINEAR, source=mark.source, mixed=mark.mixed))
    return result


def triangular_solve(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """`solve_triangular(A, B) = A⁻¹ B`: a product with `A⁻¹`, which can only be a coefficient."""
    if kind_of(args[0]) in (Kind.LINEAR, Kind.NONLINEAR):
        if kind_of(args[1]) != Kind.LINEAR:
            return coefficient(mode, func, args, kwargs)
        args = (mode.freeze(args[0]), *args[1:])
    return product(mode, func, args, kwargs)


def cast(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """A change of dtype or device, never to a precision below the working one."""
    source = args[0]
    result = mode.call(func, args, kwargs)
    if not isinstance(result, Tensor):  # int(x), float(x)
        return decision(mode, func, args, kwargs)
    if is_decision(result) and not is_decision(source) and kind_of(source) != Kind.FROZEN:
        result = mode.freeze(result)
    else:
        mark = mark_of(source)
        set_mark(result, mark._replace(root=root_of(source)) if mark is not None else None)
    return result


def scaled_dot_product_attention(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """`softmax(q kᵀ) v` as torch's fused function spells it, with the probabilities frozen."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
    q, k, v, mask, _, is_causal, scale = _arguments(args, kwargs, names)
    masks = [] if mask is None else [mask]
    if is_causal:
        masks.append(causal(q.shape[-2], k.shape[-2], q.device))
    with mode:
        return attention(q, k, v, masks, scale if scale is not None else q.shape[-1] ** -0.5)


def piecewise_attention(mode: Freezing, func: Any, args: Any, kwargs: Any) -> Any:
    """`blockwise_attention(q, k, v, …)`: linear in v, with q and k frozen instead of P."""
    q, k, v, scores, sinks = args
    if kind_of(v) != Kind.LINEAR:
        result = coefficient(mode, func, args, kwargs)
        mark = mark_of(result)
        if mark is not None and mark.kind == Kind.NONLINEAR:
            set_mark(result, mark._replace(bilinear=_of_three([mark_of(v)])))
        return result
    unfixed = (Kind.LINEAR, Kind.NONLINEAR)
    fixed = [
        mode.freeze(mode.raise_precision(x)) if kind_of(x) in unfixed else x for x in (q, k, sinks)
    ]
    result = mode.call(func, (*fixed[:2], v, scores, fixed[2]), kwargs)
    set_mark(result, Mark(Kind.LINEAR, mixed=True))
    return result


# ---------------------------------------------------------------------------- the rule table

_STRUCTURAL = (
    "view reshape flatten unflatten ravel squeeze unsqueeze transpose swapaxes swapdims permute "
    "movedim T mT t expand broadcast_to repeat repeat_interleave tile contiguous clone "
    "narrow select slice getitem setitem index_select gather "
    "take_along_dim index_add index_copy scatter scatter_add copy masked_select masked_fill "
    "masked_scatter where cat concat concatenate stack hstack vstack embedding flip roll pad tril "
    "triu diagonal unfold dropout sum mean cumsum neg positive view_as_complex view_as_real"
)
_CONSTANT = "zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full"
_COEFFICIENT = (
    "rsqrt sqrt reciprocal exp exp2 expm1 log log1p log2 softmax log_softmax sigmoid logsigmoid "
    "log_sigmoid softplus sign norm vector_norm linalg_vector_norm var std logsumexp cos sin "
    "argsort argmax argmin argtopk cumprod prod rdiv rtruediv threshold erf eq ne lt le gt ge "
    "isnan isinf isfinite logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not "
    "and or invert nonzero one_hot bincount histc floor any all"
)
_KEEPING_BILINEAR = "max min maximum minimum abs detach data amax amin topk sort round"
_DECISION = "item tolist bool int index nonzero_static contains"
_ELEMENTWISE = frozenset(
    "add sub rsub mul multiply div truediv where pow square exp expm1 sigmoid softplus tanh erf "
    "abs sign clamp clamp_min clamp_max minimum maximum min max gt ge lt le eq ne relu silu gelu "
    "neg positive dropout clone contiguous to float double sqrt rdiv rtruediv".split()
)
"""Functions that act on each entry by itself (when their result has the shape of the entry)."""

_ACTIVATION = "silu gelu relu relu6 tanh mish elu selu celu leaky_relu hardswish hardtanh softsign"

RULES: dict[str, Rule] = {
    **dict.fromkeys(_STRUCTURAL.split(), structural),
    **dict.fromkeys("split chunk tensor_split unbind".split(), split),
    **dict.fromkeys(_CONSTANT.split(), constant),
    **dict.fromkeys(_COEFFICIENT.split(), coefficient),
    **dict.fromkeys(_KEEPING_BILINEAR.split(), coefficient_keeping_bilinear),
    **dict.fromkeys(_DECISION.split(), decision),
    **dict.fromkeys(_ACTIVATION.split(), activation),
    **dict.fromkeys("add sub rsub subtract".split(), addition),
    **dict.fromkeys(_MULTIPLY, product),
    **dict.fromkeys("pow square".split(), square),
    **dict.fromkeys("clamp clamp_min clamp_max clip".split(), clamped),
    "linalg_solve_triangular": triangular_solve,
    "normalize": normalize,
    **dict.fromkeys(_FACTORS, fused),
    **dict.fromkeys("div truediv divide".split(), quotient),
    **dict.fromkeys("matmul bmm mm mv".split(), matrix_product),
    **dict.fromkeys("linear conv1d".split(), affine),
    **dict.fromkeys("view_as reshape_as expand_as".split(), shaped),
    "einsum": einsum,
    "iter": iteration,
    **dict.fromkeys(
        "to type type_as float double half bfloat16 long int short cuda cpu".split(), cast
    ),
    "rms_norm": root_mean_square_norm,
    "layer_norm": layer_norm,
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "blockwise_attention": piecewise_attention,
}
"""Torch function name (without in-place underscore) → the rule that freezes it."""
