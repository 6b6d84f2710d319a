"""What the modules for training share in both frameworks: which scales they hold, and of which shapes."""

from __future__ import annotations

from dataclasses import replace
from math import inf, prod, sqrt
from numbers import Integral
from typing import Any

from quark_kernels import documented, schema
from quark_kernels.documented import Given
from quark_kernels.formats import FORMATS
from quark_kernels.schema import OpSpec, Shape
from quark_kernels.spec import PerChannel, PerTensor, QuantSpec, as_int

TINY = 2.0**-126
"""The smallest normal number. XLA takes what is below it for zero, so every observed magnitude does."""

INITS: tuple[str, ...] = ("mean", "max")
"""What a threshold's first value follows from."""


def as_weight(name: str, value: Any) -> float:
    """Return a number above 0 up to 1 as a float. Raises unless it is one; a string isn't, even of digits."""
    try:
        number = float(None if isinstance(value, (bool, str, bytes)) else value)  # type: ignore[arg-type]
    except OverflowError:
        number = inf
    except (TypeError, ValueError, RuntimeError):  # of several elements, say
        raise TypeError(f"{name} is {value!r}; allowed: a number above 0, up to 1") from None
    if not 0 < number <= 1:
        raise ValueError(f"{name} is {value}; allowed: above 0, up to 1")
    return number


def check_observable(spec: QuantSpec) -> None:
    """Raise ValueError where a spec takes no given scale, as an observer gives one."""
    if spec.element.is_cast or spec.scale_format == "microexponents":
        raise ValueError(f"spec is {spec}, whose scale can't be given; an observer needs one whose scale can")


def state_shape(spec: QuantSpec, shape: Shape) -> tuple[Shape, Shape]:
    """Return who shares an observed scale, as a block, and the shape of these scales: 0-d per tensor."""
    if spec.granularity == PerTensor() or spec.scale_format == "e4m3":  # which takes the scale of the whole tensor
        return (0,) * len(shape), ()
    block = schema.block_of(spec, shape)
    return block, schema.scale_shape(shape, block)


def learned_spec(spec: QuantSpec | Integral, signed: bool | None, axis: int | None) -> QuantSpec:
    """Return the integers whose scale is to be learned, per tensor or per channel; ``spec`` may be a width."""
    if isinstance(spec, QuantSpec):
        if signed is not None:
            raise ValueError(
                f"signed is {signed}; {spec} has a sign or none already, allowed: None, or a width as spec"
            )
        whole = spec
    else:
        whole = integers(as_int("spec", spec), signed is not False)
    whole = whole.along(axis, None)
    if not whole.element.is_integer or whole.scale_format != "float32" or whole.rounding == "stochastic":
        raise ValueError(f"spec is {whole}; allowed: integers with float32 scales, and no stochastic rounding")
    if not isinstance(whole.granularity, (PerTensor, PerChannel)):
        raise ValueError(f"spec is {whole}; allowed: PerTensor() and PerChannel(axis)")
    return replace(whole, symmetric=True)


def integers(bits: int, signed: bool) -> QuantSpec:
    """Return all integers of a width."""
    if not 2 <= bits <= 16:
        raise ValueError(f"bits is {bits}; allowed: 2 to 16")
    kind = "int" if signed else "uint"
    if f"{kind}{bits}" in FORMATS:
        return QuantSpec(f"{kind}{bits}")
    low = -(2 ** (bits - 1)) if signed else 0
    return QuantSpec(f"{kind}{8 if bits < 8 else 16}", quant_min=low, quant_max=low + 2**bits - 1)


def code_range(spec: QuantSpec) -> tuple[int, int]:
    """Return the least and the greatest code."""
    low, high = spec.quant_min, spec.quant_max
    return int(spec.element.lo) if low is None else low, int(spec.element.hi) if high is None else high


def mean_start(spec: QuantSpec, scales: Shape, shape: Shape) -> tuple[OpSpec, float]:
    """Return how the first scales, ``2 * mean|x| / sqrt(quant_max)``, follow from a batch of this shape.

    The gradient of dequantize to the scale is a sum of gradients times codes. That of |x| times 1, with the OpSpec, has
    the totals; the factor makes the scales of them.
    """
    low, high = code_range(spec)
    axis = spec.granularity.axis if isinstance(spec.granularity, PerChannel) else None
    plan = documented.everyday_lsq_plan(shape, Given(scales), None, low, high, axis, spec.rounding)
    return OpSpec(("int8",), plan.forward.block), 2 * prod(scales) / (max(prod(shape), 1) * sqrt(high))


def check_features(shape: Shape, in_features: int) -> None:
    """Raise ValueError unless the last axis of a linear layer's ``x`` has the layer's length."""
    if shape[-1:] != (in_features,):
        raise ValueError(f"x has shape {shape}; allowed: [..., {in_features}], as in_features is {in_features}")


def channels_shape(spec: QuantSpec, channels: int | None, given: Shape | None) -> Shape:
    """Return the shape of learned scales. Raises where the number of channels and the shape of given ones don't fit."""
    if not isinstance(spec.granularity, PerChannel):
        if channels is not None:
            raise ValueError(f"channels is {channels}; {spec} has one scale, allowed: None, or an axis")
        if given is not None:
            documented.expect_single("scale", given)
        return ()
    if channels is None and given is None:
        raise ValueError(f"channels is None; {spec} needs it, or scale")
    if channels is not None:
        channels = as_int("channels", channels, 1)
    if given is not None and (len(given) != 1 or channels not in (None, given[0])):
        raise ValueError(f"scale has shape {given}; allowed: 1-D, with an element for each channel")
    return given if channels is None and given is not None else (channels or 0,)
