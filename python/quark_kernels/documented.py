"""What AMD Quark's documented functions, and all with learned scales, do, apart from the framework.

Each ``*_plan`` checks the static arguments of a function and returns the ``OpSpec`` that the core needs and how given
scales and zero points are laid out. ``quark_torch.kernel`` and ``quark_jax.kernel`` do the rest.
"""

from __future__ import annotations

from math import prod, sqrt
from numbers import Real
from typing import Any, NamedTuple

from quark_kernels.formats import FORMATS
from quark_kernels.schema import (
    FLOAT_DTYPES,
    INTEGER_DTYPES,
    LONGEST,
    OpSpec,
    Shape,
    as_float,
    expect_rank,
    normal_axis,
    scale_shape,
)
from quark_kernels.spec import as_int, one_of

INTEGERS = ("int2", "int3", "int4", "int8", "int16", "uint2", "uint4", "uint8", "uint16")
FP8 = ("fp8_e4m3", "fp8_e5m2")
MINIFLOATS = (*FP8, "fp6_e3m2", "fp6_e2m3", "fp4")
CASTS = {"bfloat16": "bf16", "float16": "fp16"}
SCALED = (*INTEGERS, *MINIFLOATS, *CASTS)
NON_SCALED = ("mx", "mx6", "mx9", "bfp16")
MX_ELEMENTS = {"int8": "int8f6"} | {name: name for name in MINIFLOATS}
QSCHEMES = ("per_tensor", "per_channel", "per_group")
ROUND_MODES = {None: "half_even", -1: "half_even", 8: "half_even", 2: "half_up", 3: "half_away"}
BFP16_BLOCK = 8
WIDEST = 2**23
"""Integers up to here are exact in every step."""
FP8_FORMATS = {FORMATS[name].storage: name for name in FP8}


class Layout(NamedTuple):
    """How a given scale or zero point becomes the core's: reshape, swap two axes, broadcast."""

    shape: Shape
    swap: tuple[int, int] | None
    normal: Shape

    @property
    def is_normal(self) -> bool:
        """Whether the first step is all there is to do."""
        return self.swap is None and self.shape == self.normal


class Plan(NamedTuple):
    """What a call does: the core's spec, and the layouts of its scale and zero point (None: there is none)."""

    spec: OpSpec
    scale: Layout | None = None
    zero_point: Layout | None = None
    scale_format: str | None = None
    """The format that the scale is rounded to first, if any."""


class Given(NamedTuple):
    """A given scale or zero point, as far as a plan needs it."""

    shape: Shape
    is_float: bool = True


# ---- arguments -------------------------------------------------------------------------------------------------------


def rounding(name: str, round_mode: int | None) -> str:
    """Return the rounding that the argument ``name`` stands for."""
    if round_mode is not None:
        round_mode = as_int(name, round_mode)
    if round_mode not in ROUND_MODES:
        raise ValueError(f"{name} is {round_mode!r}; allowed: 2 (half up), 3 (half away from zero), 8 (half to even)")
    return ROUND_MODES[round_mode]


def _bound(name: str, value: Any, default: float) -> int:
    if value is None:
        return int(default)
    if not isinstance(value, (bool, int)) and isinstance(value, Real) and float(value).is_integer():
        value = int(float(value))  # as AMD Quark passes them: 127.0
    number = as_int(name, value)
    if not -WIDEST <= number <= WIDEST:
        raise ValueError(f"{name} is {number}; allowed: {-WIDEST} to {WIDEST}")
    return number


def _range_words(quant_min: Any, quant_max: Any, lo: float, hi: float) -> list[str]:
    low, high = _bound("quant_min", quant_min, lo), _bound("quant_max", quant_max, hi)
    if low >= high:
        raise ValueError(f"quant_min is {low}; allowed: less than quant_max, {high}")
    return [f"min={low}", f"max={high}"]


def _rounding_words(name: str) -> list[str]:
    return [] if name == "half_even" else [f"rounding={name}"]


def _block(shape: Shape, axis: int, size: int) -> Shape:
    block = [1] * len(shape)
    block[axis] = min(size, LONGEST)
    return tuple(block)


def _channel(shape: Shape, axis: int) -> Shape:
    return tuple(int(d == axis) for d in range(len(shape)))


def default_axis(axis: int | None, shape: Shape, name: str) -> int:
    """Return the axis counted from the front; None is 1."""
    return normal_axis(1 if axis is None else axis, len(shape), name)


def expect_single(name: str, shape: Shape) -> None:
    """Raise ValueError unless a tensor of this shape has one element."""
    if prod(shape) != 1:
        raise ValueError(f"{name} has shape {shape}; allowed: one element, of any shape")


def expect_domain(domain: Any) -> None:
    """Raise ValueError where a number can't be TQT's domain. The core checks those in arrays."""
    if not isinstance(domain, Real):
        return
    number = as_float("domain", domain)
    if not (1 <= number <= 2**22 and number.is_integer()):
        raise ValueError(f"domain is {domain}; allowed: an integer from 1 to {2**22}")


def expect_codes(name: str, dtype: str, quant_dtype: str) -> None:
    """Raise TypeError unless codes (or numbers, of the casts) of ``quant_dtype`` may have this dtype."""
    if quant_dtype in INTEGERS:
        allowed: tuple[str, ...] = INTEGER_DTYPES
    elif quant_dtype in CASTS:
        allowed = FLOAT_DTYPES
    else:
        allowed = (FORMATS[quant_dtype].storage,)
    if dtype not in allowed:
        raise TypeError(f"{name} has dtype {dtype}; {quant_dtype} allows: {', '.join(allowed)}")


def grad_factor(elements: int, scales: int, quant_max: int) -> float:
    """LSQ's factor of the scale's gradient, 1 / sqrt(n * quant_max) with n elements a scale."""
    return 1.0 / sqrt(max(elements // max(scales, 1), 1) * quant_max)


# ---- layouts ---------------------------------------------------------------------------------------------------------


def _expect_one(name: str, given: Shape, shape: Shape) -> Layout:
    expect_single(name, given)
    one = (1,) * len(shape)
    return Layout(one, None, one)


def _per_group(name: str, given: Shape, shape: Shape, block: Shape, axis: int, *, own_first: bool) -> Layout:
    """As many elements as there are scales, with ``axis`` and the last axis swapped unless the shape says otherwise."""
    normal = scale_shape(shape, block)
    order = list(range(len(shape)))
    order[axis], order[-1] = order[-1], order[axis]
    swapped = tuple(normal[d] for d in order)
    if prod(given) == 1:
        return Layout((1,) * len(shape), None, normal)
    if given == normal and (own_first or normal != swapped):
        return Layout(normal, None, normal)
    if prod(given) == prod(normal):
        return Layout(swapped, (axis, len(shape) - 1), normal)
    shapes = f"{swapped}" if swapped == normal else f"{swapped} or {normal}"
    raise ValueError(
        f"{name} has shape {given}; per group of {block[axis] or shape[axis]} along axis {axis} of {shape} allows "
        f"{prod(normal)} elements: {shapes}"
    )


def _per_channel(name: str, given: Shape, shape: Shape, axis: int) -> Layout:
    normal = scale_shape(shape, _channel(shape, axis))
    if prod(given) not in (1, shape[axis]):
        raise ValueError(f"{name} has shape {given}; per channel on axis {axis} of {shape} allows ({shape[axis]},)")
    return Layout((1,) * len(shape) if prod(given) == 1 else normal, None, normal)


def _group_length(group_size: int | None, length: int, name: str) -> int:
    """The groups' width; 0 is the whole axis."""
    size = as_int("group_size", 1 if group_size is None else group_size)
    if size == -1:
        return 0
    if size < 1:
        raise ValueError(f"group_size is {size}; allowed: 1 or more, or -1 for the whole axis")
    if length % size:
        raise ValueError(f"group_size is {size}; the axis of {name} has length {length}, allowed: a divisor of it")
    return size


def _own_width(given: Shape, shape: Shape, axis: int) -> int | None:
    """The groups' width, if the scale has the data's own layout; else None."""
    if len(given) != len(shape) or any(g != n for d, (g, n) in enumerate(zip(given, shape, strict=True)) if d != axis):
        return None
    groups = given[axis]
    if groups == 0 or shape[axis] % groups:
        return None
    return max(shape[axis] // groups, 1)


def _granularity(
    name: str,
    shape: Shape,
    scale: Given,
    zero_point: Given | None,
    axis: int | None,
    group_size: int | None,
    qscheme: str | None,
    *,
    own_first: bool,
) -> tuple[Shape, Layout, Layout | None]:
    """The block of a qscheme, and the layouts of the scale and zero point."""
    one_of("qscheme", qscheme, QSCHEMES)
    given = [("scale", scale.shape), *([] if zero_point is None else [("zero_point", zero_point.shape)])]
    singles = all(prod(size) == 1 for _, size in given)
    if qscheme == "per_tensor" or (qscheme == "per_channel" and singles):
        if qscheme == "per_channel":
            default_axis(axis, shape, name)
        layouts = [_expect_one(argument, size, shape) for argument, size in given]
        block = (0,) * len(shape)
    elif qscheme == "per_channel":
        at = default_axis(axis, shape, name)
        layouts = [_per_channel(argument, size, shape, at) for argument, size in given]
        block = _channel(shape, at)
    else:
        at = default_axis(axis, shape, name)
        width = _own_width(scale.shape, shape, at) if own_first else None
        if width is None:
            width = _group_length(group_size, shape[at], name)
        block = _block(shape, at, width)
        layouts = [_per_group(argument, size, shape, block, at, own_first=own_first) for argument, size in given]
    return block, layouts[0], layouts[1] if zero_point is not None else None


# ---- scaled functions ------------------------------------------------------------------------------------------------


def quantize_plan(
    quant_dtype: str,
    shape: Shape,
    dtype: str,
    scale: Given,
    zero_point: Given | None,
    axis: int | None,
    group_size: int | None,
    quant_min: Any,
    quant_max: Any,
    round_mode: int | None,
    qscheme: str | None,
    *,
    real: bool,
) -> Plan:
    """Plan scaled_real_quantize, or scaled_fake_quantize, of ``inputs`` of this shape and dtype. Not of the casts."""
    expect_rank("inputs", len(shape))
    _no_fp8_groups(quant_dtype, qscheme)
    block, s, z = _granularity("inputs", shape, scale, zero_point, axis, group_size, qscheme, own_first=real)
    if quant_dtype not in INTEGERS:
        per_channel = qscheme == "per_channel" and any(block)
        scale_format = CASTS.get(dtype) if per_channel else None
        return Plan(OpSpec((quant_dtype, "ieee", "narrow"), block), s, None, scale_format)
    row = FORMATS[quant_dtype]
    words = [quant_dtype, "ieee", "reciprocal", *_range_words(quant_min, quant_max, row.lo, row.hi)]
    words += _rounding_words(rounding("round_mode", round_mode))
    # Codes have z added before rounding; fake quantization only where z is a float.
    if real or (zero_point is not None and zero_point.is_float):
        words.append("shifted")
    return Plan(OpSpec(tuple(words), block, dtype="int32" if real else None), s, z)


def minifloat_plan(
    quant_dtype: str,
    shape: Shape,
    scale: Given,
    axis: int | None,
    group_size: int | None,
    qscheme: str,
    *,
    real: bool,
) -> Plan:
    """Plan AMD Quark's fp8 per group, fp6 and fp4 as they are since 0.9: in float32, and fp6's and fp4's zero is +0.

    Where ``real``, the results are float32 values and not codes.
    """
    block, s, _ = _granularity("inputs", shape, scale, None, axis, group_size, qscheme, own_first=real)
    words = (quant_dtype, "ieee", *([] if quant_dtype in FP8 else ["plus_zero"]))
    return Plan(OpSpec(words, block, dtype="float32" if real else None), s)


def _no_fp8_groups(quant_dtype: str, qscheme: str | None) -> None:
    if quant_dtype in FP8 and qscheme == "per_group":
        raise ValueError(
            f"qscheme is 'per_group'; {quant_dtype} allows: per_tensor, per_channel (fake_quantize has groups)"
        )


def dequantize_plan(
    quant_dtype: str,
    shape: Shape,
    scale: Given,
    zero_point: Given | None,
    axis: int | None,
    group_size: int | None,
    qscheme: str | None,
) -> Plan:
    """Plan dequantize of ``inputs`` of this shape."""
    _no_fp8_groups(quant_dtype, qscheme)
    block, s, z = _granularity("inputs", shape, scale, zero_point, axis, group_size, qscheme, own_first=True)
    return Plan(OpSpec((quant_dtype, "ieee"), block, dtype="float32"), s, z)


def cast_spec(quant_dtype: str, shape: Shape) -> OpSpec:
    """Return the spec of the casts, bfloat16 and float16."""
    return OpSpec((CASTS[quant_dtype], "ieee"), (0,) * len(shape))


def fp8_spec(quant_dtype: str, shape: Shape, dtype: str | None = None) -> OpSpec:
    """Return the spec of quant_fp8_* and, with a dtype, dequant_fp8_*."""
    return OpSpec((quant_dtype, "ieee", *([] if dtype else ["narrow"])), (0,) * len(shape), dtype=dtype)


def cast_plan(quant_dtype: str, shape: Shape) -> Plan:
    """Return the plan of the casts, with a scale of 1."""
    return Plan(cast_spec(quant_dtype, shape), _expect_one("scale", (), shape))


def fp8_plan(quant_dtype: str, shape: Shape, dtype: str | None = None) -> Plan:
    """Return the plan of quant_fp8_* and, with a dtype, dequant_fp8_*."""
    return Plan(fp8_spec(quant_dtype, shape, dtype), _expect_one("scale", (), shape))


def conversion(source: str, target: str, shape: Shape) -> tuple[str, OpSpec]:
    """Return the operator and spec that convert gradients between two dtypes; fp8 ones are quantized or dequantized."""
    block = (0,) * len(shape)
    if target in FP8_FORMATS:
        return "quantize", OpSpec((FP8_FORMATS[target], "ieee"), block)
    if source in FP8_FORMATS:
        return "dequantize", OpSpec((FP8_FORMATS[source], "ieee"), block, dtype=target)
    return "convert", OpSpec(("codes", "bits=8"), None, dtype=target)


# ---- non-scaled functions --------------------------------------------------------------------------------------------


def block_plan(
    quant_dtype: str, shape: Shape, mx_element_dtype: str | None, axis: int, block_size: int, rule: str = "floor"
) -> OpSpec:
    """Plan non_scaled_fake_quantize of ``input_tensor`` of this shape. The scale rule is for mx."""
    one_of("quant_dtype", quant_dtype, NON_SCALED)
    axis = normal_axis(axis, len(shape), "input_tensor")
    size = BFP16_BLOCK if quant_dtype == "bfp16" else as_int("block_size", block_size, 1)
    match quant_dtype:
        case "mx":
            one_of("mx_element_dtype", mx_element_dtype, MX_ELEMENTS)
            assert mx_element_dtype is not None
            words = [MX_ELEMENTS[mx_element_dtype], "scale=e8m0", "ieee"]
            if rule != "floor":
                words.append(f"rule={rule}")
            if FORMATS[words[0]].bits < 8:
                words.append("plus_zero")
        case "bfp16":
            words = ["int8", "scale=exponent", "rule=fit", "ieee"]
        case _:
            if size % 2:
                raise ValueError(f"block_size is {size}; {quant_dtype} has pairs, allowed: an even number")
            name, top = ("int5", 15) if quant_dtype == "mx6" else ("int8", 127)
            words = [name, "scale=microexponents", "ieee", f"min={-top}", f"max={top}"]
    return OpSpec(tuple(words), _block(shape, axis, size))


class SlotPlan(NamedTuple):
    """What non_scaled_real_quantize does: on x with the axis split into blocks, then a slot before each block."""

    spec: OpSpec
    axis: int
    """The axis within a block; the blocks lie along the axis before it."""
    split: Shape
    slots: Shape
    """The split shape of the result: one longer within each block."""
    result: Shape


def slot_plan(quant_dtype: str, shape: Shape, mx_element_dtype: str | None, axis: int, block_size: int) -> SlotPlan:
    """Plan non_scaled_real_quantize of ``input_tensor`` of this shape."""
    if (quant_dtype, mx_element_dtype) != ("mx", "fp4"):
        raise ValueError(
            f"quant_dtype is {quant_dtype!r} and mx_element_dtype is {mx_element_dtype!r}; allowed: 'mx' and 'fp4'"
        )
    spec = block_plan(quant_dtype, shape, mx_element_dtype, axis, block_size)
    expect_rank("input_tensor with its axis split", len(shape) + 1)
    axis = normal_axis(axis, len(shape), "input_tensor")
    size = as_int("block_size", block_size, 1)
    if shape[axis] % size:
        raise ValueError(f"block_size is {size}; axis {axis} has length {shape[axis]}, allowed: a divisor of it")
    blocks = shape[axis] // size
    before, after = shape[:axis], shape[axis + 1 :]
    split = (*before, blocks, size, *after)
    return SlotPlan(
        OpSpec(spec.words, _block(split, axis + 1, size), dtype="float32"),
        axis + 1,
        split,
        (*before, blocks, size + 1, *after),
        (*before, blocks * (size + 1), *after),
    )


# ---- learned scales --------------------------------------------------------------------------------------------------


class LearnPlan(NamedTuple):
    """What a function with a learned scale does: its two specs, and the layouts of its scale and zero point."""

    forward: OpSpec
    backward: OpSpec
    scale: Layout
    zero_point: Layout | None


def lsq_plan(
    shape: Shape,
    scale: Given,
    zero_point: Given | None,
    quant_min: Any,
    quant_max: Any,
    ch_axis: int | None,
    rounding_key: int | None,
) -> LearnPlan:
    """Plan the documented lsq_quantize of ``x`` of this shape."""
    for name, value in (("quant_min", quant_min), ("quant_max", quant_max)):
        if value is None:
            raise ValueError(f"{name} is None; allowed: an integer")
    words = ["int8", "ieee", *_range_words(quant_min, quant_max, 0, 0)]  # any integers: the range is the arguments'
    words += _rounding_words(rounding("rounding_key", rounding_key))
    block, s, z = _learned_granularity(shape, scale, zero_point, ch_axis, "ch_axis")
    order = ["reciprocal", *(["shifted"] if zero_point is not None and zero_point.is_float else [])]
    return LearnPlan(OpSpec((*words, *order), block), OpSpec((*words, "shifted"), block), s, z)


def everyday_lsq_plan(
    shape: Shape,
    scale: Given,
    zero_point: Given | None,
    quant_min: Any,
    quant_max: Any,
    axis: int | None,
    rounding_name: str,
) -> LearnPlan:
    """Plan the everyday lsq_quantize of ``x`` of this shape."""
    low, high = as_int("quant_min", quant_min), as_int("quant_max", quant_max)
    if not -WIDEST <= low < high <= WIDEST or high <= 0:
        raise ValueError(
            f"quant_min is {low} and quant_max is {high}; allowed: quant_min < quant_max, quant_max > 0, "
            f"both within {-WIDEST} to {WIDEST}"
        )
    if zero_point is not None and zero_point.is_float:
        raise TypeError("zero_point is floating; allowed: integers")
    fitting = [
        name for name in ("int8", "uint8", "int16", "uint16") if FORMATS[name].lo <= low <= high <= FORMATS[name].hi
    ]
    if not fitting:
        raise ValueError(f"quant_min is {low} and quant_max is {high}; allowed: a range within int16's or uint16's")
    words = (fitting[0], f"min={low}", f"max={high}", *_rounding_words(rounding_name))
    block, s, z = _learned_granularity(shape, scale, zero_point, axis, "axis")
    return LearnPlan(OpSpec(words, block), OpSpec(words, block), s, z)


def _learned_granularity(
    shape: Shape, scale: Given, zero_point: Given | None, axis: int | None, name: str
) -> tuple[Shape, Layout, Layout | None]:
    if axis is None:
        s = _expect_one("scale", scale.shape, shape)
        z = None if zero_point is None else _expect_one("zero_point", zero_point.shape, shape)
        return (0,) * len(shape), s, z
    at = as_int(name, axis)
    if not -len(shape) <= at < len(shape):
        raise ValueError(f"{name} is {at}; x has {len(shape)} axes, allowed: {-len(shape)} to {len(shape) - 1}")
    at %= len(shape)
    if prod(scale.shape) != shape[at]:
        raise ValueError(f"scale has shape {scale.shape}; per channel on axis {at} of {shape} allows ({shape[at]},)")
    s = _per_channel("scale", scale.shape, shape, at)
    z = None if zero_point is None else _per_channel("zero_point", zero_point.shape, shape, at)
    return _channel(shape, at), s, z


def tqt_plan(shape: Shape, log_threshold: Given, zero_point: Given | None, round_mode: int | None) -> LearnPlan:
    """Plan the documented tqt_quantize of ``inputs`` of this shape. The core takes the range from the domain."""
    return _tqt(shape, log_threshold, zero_point, rounding("round_mode", round_mode), ["int8", "ieee"], ["reciprocal"])


def everyday_tqt_plan(
    shape: Shape, log_threshold: Given, zero_point: Given | None, bits: int, rounding_name: str
) -> tuple[LearnPlan, float]:
    """Plan the everyday tqt_quantize of ``x`` of this shape; also returns the domain, 2^(bits - 1)."""
    bits = as_int("bits", bits)
    if not 2 <= bits <= 16:
        raise ValueError(f"bits is {bits}; allowed: 2 to 16")
    if zero_point is not None and zero_point.is_float:
        raise TypeError("zero_point is floating; allowed: integers")
    domain = 2 ** (bits - 1)
    # The core takes the range from the domain; who reads the graph finds it here.
    words = ["int16", f"min={-domain}", f"max={domain - 1}"]
    return _tqt(shape, log_threshold, zero_point, rounding_name, words, []), float(domain)


def _tqt(
    shape: Shape, threshold: Given, zero_point: Given | None, rounding_name: str, words: list[str], order: list[str]
) -> LearnPlan:
    words = [*words, *_rounding_words(rounding_name)]
    if zero_point is not None and zero_point.is_float:
        order = [*order, "shifted"]
    block = (0,) * len(shape)
    s = _expect_one("log_threshold", threshold.shape, shape)
    z = None if zero_point is None else _expect_one("zero_point", zero_point.shape, shape)
    return LearnPlan(OpSpec((*words, *order), block), OpSpec(tuple(words), block), s, z)
