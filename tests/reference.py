"""The independent oracle: what the specification says, in NumPy float64, by another method than the library's.

Every grid is a table of its representable values. A value's *position* is its place on that table's number line
(grid points are the integers 0, 1, 2, ...; in between, linear), so one set of roundings on plain float64 numbers
serves integers, minifloats (OFP8, OCP MX 1.0, fnuz) and the two casts alike. Only the quotient x/s and the final
product (q - z) * s round to float32; everything else is exact.

Codes are int64: signed values for the integer formats (int8f6: q of the value q/64), bit patterns for the others.
Only the plain integers have a zero point (exact up to 2^23 in magnitude). The casts bf16 and fp16 have no scale:
pass 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]


class Format(NamedTuple):
    """One row of the format table. A grid without `min_exp` is the integers times 2^-mantissa."""

    bits: int
    mantissa: int
    min_exp: int | None
    lo: float
    hi: float
    nan: int | None = None  # the code written for +NaN; only the fnuz formats have it where -0 would be
    inf: int | None = None
    cast: bool = False  # overflow gives inf, not the largest value

    @property
    def negative_zero(self) -> bool:
        return self.min_exp is not None and self.nan != 1 << (self.bits - 1)


def _int(bits: int) -> Format:
    return Format(bits, 0, None, -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1)


def _uint(bits: int) -> Format:
    return Format(bits, 0, None, 0.0, 2.0**bits - 1)


FORMATS: dict[str, Format] = {
    **{f"int{bits}": _int(bits) for bits in (2, 3, 4, 5, 8, 16)},
    **{f"uint{bits}": _uint(bits) for bits in (2, 4, 8, 16)},
    "int8f6": Format(8, 6, None, -127 / 64, 127 / 64),
    "fp8_e4m3": Format(8, 3, -6, -448.0, 448.0, nan=0x7F),
    "fp8_e5m2": Format(8, 2, -14, -57344.0, 57344.0, nan=0x7F, inf=0x7C),
    "fp8_e4m3fnuz": Format(8, 3, -7, -240.0, 240.0, nan=0x80),
    "fp8_e5m2fnuz": Format(8, 2, -15, -57344.0, 57344.0, nan=0x80),
    "fp6_e3m2": Format(6, 2, -2, -28.0, 28.0),
    "fp6_e2m3": Format(6, 3, 0, -7.5, 7.5),
    "fp4": Format(4, 1, 0, -6.0, 6.0),
    "bf16": Format(16, 7, -126, -(2 - 2.0**-7) * 2.0**127, (2 - 2.0**-7) * 2.0**127, 0x7FC0, 0x7F80, cast=True),
    "fp16": Format(16, 10, -14, -65504.0, 65504.0, 0x7E00, 0x7C00, cast=True),
}
CAST_OF = {"float16": "fp16", "bfloat16": "bf16"}
LARGEST = {dtype: FORMATS[cast].hi for dtype, cast in CAST_OF.items()} | dict.fromkeys(
    ("float32", "float64"), float(np.finfo(np.float32).max)
)
SMALLEST_SCALE = np.float32(2.0**-126)


@cache
def values(fmt_name: str) -> Array:
    """The value (float64) of every code 0 .. 2^bits - 1; integer codes in two's complement."""
    f = FORMATS[fmt_name]
    half = 1 << (f.bits - 1)
    if f.min_exp is None:
        codes = np.arange(2 * half)
        table = np.where((codes >= half) & (f.lo < 0), codes - 2 * half, codes) * 2.0**-f.mantissa
    else:
        field, fraction = np.divmod(np.arange(half), 1 << f.mantissa)
        significand = fraction * 2.0**-f.mantissa + (field > 0)
        magnitude = np.ldexp(significand, np.maximum(field - 1, 0) + f.min_exp)
        magnitude[magnitude > f.hi] = np.nan
        if f.inf is not None:
            magnitude[f.inf] = np.inf
        table = np.concatenate([magnitude, np.copysign(magnitude, -1.0)])
        if not f.negative_zero:
            table[half] = np.nan  # +NaN: this code's top bit is not a sign
    table.flags.writeable = False
    return table


@cache
def _grid(fmt_name: str) -> Array:
    """The non-negative finite values of a float format, in order of code, and the next one past the end."""
    f = FORMATS[fmt_name]
    finite = values(fmt_name)[: 1 << (f.bits - 1)]
    finite = finite[finite <= f.hi]
    return np.append(finite, 2 * finite[-1] - finite[-2])


def _half_up(t: Array) -> Array:
    below = np.floor(t)
    return below + (t - below >= 0.5)


ROUNDINGS: dict[str, Callable[[Array], Array]] = {
    "half_even": np.rint,
    "half_up": _half_up,
    "half_away": lambda t: np.copysign(_half_up(np.abs(t)), t),
    "floor": np.floor,
    "ceil": np.ceil,
    "toward_zero": np.trunc,
}


def _divide(x: ArrayLike, scale: ArrayLike) -> Array:
    with np.errstate(all="ignore"):
        return np.asarray(np.asarray(x, np.float32) / np.asarray(scale, np.float32))


def _or_zero(zero_point: ArrayLike | None) -> Array:
    return np.asarray(0 if zero_point is None else zero_point)


def _round(v: ArrayLike, fmt: str, rounding: str) -> Array:
    """v on the format's grid continued past its ends, as a signed position (floats: one step past at most)."""
    f = FORMATS[fmt]
    v = np.asarray(v, np.float64)
    with np.errstate(invalid="ignore"):
        if f.min_exp is None:
            return ROUNDINGS[rounding](v * 2.0**f.mantissa)
        grid, size = _grid(fmt), np.abs(v)
        below = np.clip(np.searchsorted(grid, size, side="right") - 1, 0, len(grid) - 2)
        position = below + (size - grid[below]) / (grid[below + 1] - grid[below])
        return ROUNDINGS[rounding](np.copysign(np.minimum(position, len(grid) - 1), v))


def _bounds(f: Format, quant_min: int | None, quant_max: int | None) -> tuple[int, int]:
    """An integer format's clamp [a, b], in codes."""
    a = int(f.lo * 2**f.mantissa) if quant_min is None else quant_min
    b = int(f.hi * 2**f.mantissa) if quant_max is None else quant_max
    return a, b


def quantize(
    x: ArrayLike,
    fmt: str,
    scale: ArrayLike,
    zero_point: ArrayLike | None = None,
    rounding: str = "half_even",
    quant_min: int | None = None,
    quant_max: int | None = None,
) -> Array:
    """The codes of x; scale and zero_point broadcast to x.

    Where the format can, a zero result has the sign of x/s and a NaN code the sign of x.
    """
    f = FORMATS[fmt]
    v = _divide(x, scale)
    is_nan = np.isnan(v)
    r = _round(np.where(is_nan, np.float32(0), v), fmt, rounding)
    if f.min_exp is None:
        a, b = _bounds(f, quant_min, quant_max)
        return np.asarray(np.clip(r + _or_zero(zero_point), a, b), np.int64)
    largest = len(_grid(fmt)) - (1 if f.cast else 2)  # past the end: a cast's inf is the next code
    magnitude = np.minimum(np.abs(r), largest).astype(np.int64)
    sign = np.signbit(np.where(is_nan, x, v)).astype(np.int64) << (f.bits - 1)
    number = magnitude | np.where((magnitude > 0) | f.negative_zero, sign, 0)
    return np.where(is_nan, np.int64(0) if f.nan is None else sign | f.nan, number)


def _decode(codes: ArrayLike, fmt: str) -> Array:
    f = FORMATS[fmt]
    return np.asarray(codes, np.float64) * 2.0**-f.mantissa if f.min_exp is None else values(fmt)[np.asarray(codes)]


def dequantize(
    codes: ArrayLike, fmt: str, scale: ArrayLike, zero_point: ArrayLike | None = None, dtype: str = "float32"
) -> Array:
    """(q - z) * s, saturated; a float32 array of values that `dtype` represents exactly (see `to_bits`).

    Only an inf code gives inf. NaN is canonical, with the sign of the code's value.
    """
    decoded = _decode(codes, fmt)
    largest = np.float32(LARGEST[dtype])
    with np.errstate(all="ignore"):
        product = (decoded - _or_zero(zero_point)) * np.asarray(scale, np.float32).astype(np.float64)
        rounded = np.asarray(product, np.float32)
        result = np.where(np.isinf(decoded), rounded, np.clip(rounded, -largest, largest))
    if dtype in CAST_OF:
        result = values(CAST_OF[dtype])[quantize(result, CAST_OF[dtype], 1)]
    return _canonical_nan(result, np.isnan(product), decoded)


def _canonical_nan(result: ArrayLike, where: Array, sign: ArrayLike) -> Array:
    """result, with float32's canonical NaN of the given sign where asked."""
    nan = np.where(np.signbit(sign), np.uint32(0xFFC00000), np.uint32(0x7FC00000)).view(np.float32)
    return np.where(where, nan, np.asarray(result, np.float32))


def to_bits(values_f32: ArrayLike, dtype: str) -> Array:
    """The bit patterns, in `dtype`, of a result of `dequantize` or `fake_quantize`."""
    if dtype in CAST_OF:
        return quantize(values_f32, CAST_OF[dtype], 1).astype(np.uint16)
    native = np.asarray(values_f32, np.float32).astype(dtype)
    return native.view(np.dtype(f"u{native.itemsize}"))


def fake_quantize(
    x: ArrayLike,
    fmt: str,
    scale: ArrayLike,
    zero_point: ArrayLike | None = None,
    rounding: str = "half_even",
    quant_min: int | None = None,
    quant_max: int | None = None,
    dtype: str = "float32",
) -> Array:
    """dequantize(quantize(x)), but a NaN x stays NaN, with its sign."""
    codes = quantize(x, fmt, scale, zero_point, rounding, quant_min, quant_max)
    return _canonical_nan(dequantize(codes, fmt, scale, zero_point, dtype), np.isnan(x), x)


def clipped(
    x: ArrayLike,
    fmt: str,
    scale: ArrayLike,
    zero_point: ArrayLike | None = None,
    rounding: str = "half_even",
    quant_min: int | None = None,
    quant_max: int | None = None,
) -> Array:
    """True where the "clipped" gradient passes: x, rounded on the grid continued past its ends, is inside them."""
    f = FORMATS[fmt]
    r = _round(_divide(x, scale), fmt, rounding)
    if f.min_exp is not None:
        return np.asarray(np.abs(r) <= len(_grid(fmt)) - 2)
    a, b = _bounds(f, quant_min, quant_max)
    shifted = r + _or_zero(zero_point)
    return (a <= shifted) & (shifted <= b)


def scale_shape(shape: Sequence[int], block: Sequence[int]) -> tuple[int, ...]:
    """The shape of the scales: block[d] neighbours along axis d share one, 0 is the whole axis."""
    return tuple(-(-n // b) if b else 1 for n, b in zip(shape, block, strict=True))


def expand(scale: ArrayLike, shape: Sequence[int], block: Sequence[int]) -> Array:
    """Each element's scale, in the shape of x; the last block of an axis may be ragged."""
    result = np.asarray(scale)
    for axis, (n, b) in enumerate(zip(shape, block, strict=True)):
        result = result.take(np.arange(n) // (b or max(n, 1)), axis=axis)
    return result


def _groups(flat: Array, shape: Sequence[int], block: Sequence[int]) -> Iterator[Array]:
    """The elements of each scale, scale after scale, in row-major order of x."""
    count = int(np.prod(scale_shape(shape, block), dtype=np.int64))
    owner = expand(np.arange(count).reshape(scale_shape(shape, block)), shape, block).ravel()
    by_owner = flat[np.argsort(owner, kind="stable")]
    sizes = np.bincount(owner, minlength=count)
    ends = np.cumsum(sizes)
    return (by_owner[start:end] for start, end in zip(ends - sizes, ends, strict=True))


def _group_qparams(group: Array, top: np.float32, span: tuple[int, int] | None) -> tuple[np.float32, int]:
    """One group's scale and zero point; span is [a, b] where the zero point is free."""
    amax = (group.view(np.uint32) & np.uint32(0x7FFFFFFF)).max(initial=np.uint32(0)).view(np.float32)
    a, b = span or (0, 0)
    if not np.isfinite(amax):
        return np.float32(np.nan), a
    if amax == 0:
        return np.float32(1), a
    if span is None:
        return max(np.float32(amax / top), SMALLEST_SCALE), 0
    lo, hi, width = min(group.min(), np.float32(0)), max(group.max(), np.float32(0)), np.float32(b - a)
    with np.errstate(over="ignore"):
        reach = hi - lo
        scale = max(reach / width if np.isfinite(reach) else hi / width - lo / width, SMALLEST_SCALE)
        scale = min(scale, np.finfo(np.float32).max)  # two codes for the whole range: a scale is never inf
    return scale, int(np.clip(a - float(np.rint(lo / scale)), a, b))


def choose_qparams(
    x: ArrayLike,
    fmt: str,
    block: Sequence[int],
    symmetric: bool = True,
    quant_min: int | None = None,
    quant_max: int | None = None,
) -> tuple[Array, Array | None]:
    """The dynamic float32 scales of x and, for an asymmetric integer format, its int32 zero points."""
    f = FORMATS[fmt]
    x = np.asarray(x, np.float32)
    shape = scale_shape(x.shape, block)
    if f.cast:
        return np.ones(shape, np.float32), None
    asymmetric = not symmetric and f.min_exp is None and f.mantissa == 0
    top = np.float32(f.hi if quant_max is None else quant_max)
    span = _bounds(f, quant_min, quant_max) if asymmetric else None
    pairs = [_group_qparams(group, top, span) for group in _groups(x.ravel(), x.shape, block)]
    scale = np.array([s for s, _ in pairs], np.float32).reshape(shape)
    return scale, np.array([z for _, z in pairs], np.int32).reshape(shape) if asymmetric else None


def pack(codes: ArrayLike, bits: int) -> Array:
    """Code i of a row is bits [b*i, b*i + b) of its little-endian bit stream, padded with zeros to a whole byte."""
    codes = np.asarray(codes, np.int64)
    stream = (codes[..., None] >> np.arange(bits)) & 1
    return np.packbits(
        stream.reshape(*codes.shape[:-1], codes.shape[-1] * bits).astype(np.uint8), axis=-1, bitorder="little"
    )


def unpack(packed: ArrayLike, bits: int, length: int, signed: bool) -> Array:
    """The first `length` codes of each packed row, as int64."""
    packed = np.asarray(packed, np.uint8)
    stream = np.unpackbits(packed, axis=-1, count=length * bits, bitorder="little").astype(np.int64)
    codes: Array = (stream.reshape(*packed.shape[:-1], length, bits) << np.arange(bits)).sum(axis=-1)
    return np.where(signed & (codes >> (bits - 1) == 1), codes - (1 << bits), codes)


def tree_sum(terms: ArrayLike) -> float:
    """The fixed-order sum: chunks of 1024 in 64 lanes, the lanes folded in halves, then the chunk sums likewise."""
    sums = np.asarray(terms, np.float64)
    while True:
        chunks = max(1, -(-len(sums) // 1024))
        rows = np.zeros(chunks * 1024)
        rows[: len(sums)] = sums
        lanes = np.zeros((chunks, 64))
        with np.errstate(invalid="ignore"):
            for row in rows.reshape(chunks, 16, 64).swapaxes(0, 1):
                lanes = lanes + row
            for width in (32, 16, 8, 4, 2, 1):
                lanes = lanes[:, :width] + lanes[:, width:]
        sums = lanes[:, 0]
        if chunks == 1:
            return float(sums[0])


def dequantize_scale_gradient(
    codes: ArrayLike, fmt: str, zero_point: ArrayLike | None, grad: ArrayLike, block: Sequence[int]
) -> Array:
    """The gradient of `dequantize` to its float32 scales: the sum of g * (q - z) over each scale's elements."""
    shape = np.shape(codes)
    with np.errstate(all="ignore"):
        terms = np.asarray(grad, np.float64) * (_decode(codes, fmt) - _or_zero(zero_point))
        sums = np.array([tree_sum(group) for group in _groups(terms.ravel(), shape, block)])
        result = sums.astype(np.float32).reshape(scale_shape(shape, block))
    return _canonical_nan(result, np.isnan(result), np.zeros_like(result))


# The documented functions, in the order and with the argument names of their documentation. Arguments are taken to be
# valid. Here float32 rounds every step, as documented, and a result narrowed to the input's dtype overflows to inf.

ROUND_MODES = {None: "half_even", -1: "half_even", 2: "half_up", 3: "half_away", 8: "half_even"}
FLOAT8 = {"fp8_e4m3": np.dtype(ml_dtypes.float8_e4m3fn), "fp8_e5m2": np.dtype(ml_dtypes.float8_e5m2)}
CASTS = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
NAN = np.float32(np.nan)


def _f32(x: ArrayLike) -> Array:
    return np.asarray(x).astype(np.float32)


def _narrow(x: ArrayLike, dtype: np.dtype[Any]) -> Array:
    """The cast of a float32 to float32, float16, bfloat16 or float64."""
    return to_bits(x, dtype.name).view(dtype)


def _codes(x: Array, fmt: str, scale: ArrayLike) -> tuple[Array, Array]:
    """The bit patterns of x/s on a float format's grid, x/s itself being rounded to x.dtype; and where x/s is NaN."""
    v = _f32(_narrow(_divide(_f32(x), scale), x.dtype))
    return quantize(v, fmt, 1).astype(np.uint8), np.isnan(v)


@np.errstate(all="ignore")
def quant_fp8(inputs: ArrayLike, fmt: str, scale: float | None = None) -> Array:
    codes, _ = _codes(np.asarray(inputs), fmt, 1 if scale is None else scale)
    return codes.view(FLOAT8[fmt])


@np.errstate(all="ignore")
def dequant_fp8(inputs: ArrayLike, fmt: str, scale: float | None = None) -> Array:
    value = _decode(np.asarray(inputs).view(np.uint8), fmt)
    return _narrow(_f32(value) * np.float32(1 if scale is None else scale), CASTS["float16"])


def _lay_out(
    qparam: ArrayLike, shape: tuple[int, ...], qscheme: str | None, axis: int | None, group: int | None = None
) -> Array:
    """A scale or zero point, of any documented layout, broadcast against the input.

    `group` is the fake functions' group size; without one the groups' width is what the layout says.
    """
    qparam = np.asarray(qparam)
    axis = 1 if axis is None else axis
    if qscheme == "per_tensor" or qparam.size == 1:
        return qparam.reshape(())
    if qscheme == "per_channel":
        return np.moveaxis(qparam.reshape(-1, *[1] * (len(shape) - 1)), 0, axis)
    if group is None:
        return np.repeat(qparam, shape[axis] // qparam.shape[axis], axis)
    block = [1] * len(shape)
    block[axis] = shape[axis] if group == -1 else group
    own = scale_shape(shape, block)
    swapped = np.swapaxes(np.empty(own), axis, -1).shape
    if qparam.shape != own or own == swapped:
        qparam = qparam.reshape(swapped).swapaxes(axis, -1)
    return expand(qparam, shape, block)


def _float_scale(x: Array, scale: ArrayLike, qscheme: str | None, axis: int | None, group: int | None = None) -> Array:
    """The scale that a float format's quantization uses: per channel it is rounded to x.dtype."""
    s = _f32(_lay_out(scale, x.shape, qscheme, axis, group))
    return _f32(_narrow(s, x.dtype)) if qscheme == "per_channel" and s.ndim else s


def _integers(
    x: Array, s: Array, z: Array, quant_min: float, quant_max: float, round_mode: int | None, before: bool
) -> Array:
    """The integers q (float64) of x, NaN where x·inv (+ z, if added before rounding) is."""
    x, inv = _f32(x), _divide(1, s)
    v = np.where(np.isinf(inv), x / s, x * inv)
    v, after = (v + _f32(z), np.asarray(0)) if before else (v, z)
    return np.asarray(np.clip(ROUNDINGS[ROUND_MODES[round_mode]](v.astype(np.float64)) + after, quant_min, quant_max))


def _is_floating(zero_point: Array) -> bool:
    return not np.issubdtype(zero_point.dtype, np.integer)


@np.errstate(all="ignore")
def scaled_fake_quantize(
    quant_dtype: str,
    inputs: ArrayLike,
    scale: ArrayLike | None = None,
    zero_point: ArrayLike | None = None,
    axis: int | None = None,
    group_size: int | None = None,
    quant_min: float | None = None,
    quant_max: float | None = None,
    round_mode: int | None = None,
    qscheme: str | None = None,
) -> Array:
    x = np.asarray(inputs)
    if quant_dtype in CASTS:
        return _narrow(_f32(_narrow(_f32(x), CASTS[quant_dtype])), x.dtype)
    assert scale is not None
    group = 1 if group_size is None else group_size
    if FORMATS[quant_dtype].min_exp is not None:
        s = _float_scale(x, scale, qscheme, axis, group)
        codes, is_nan = _codes(x, quant_dtype, s)
        return _narrow(np.where(is_nan, NAN, _f32(_decode(codes, quant_dtype)) * s), x.dtype)
    assert quant_min is not None
    assert quant_max is not None
    s = _f32(_lay_out(scale, x.shape, qscheme, axis, group))
    z = _lay_out(_or_zero(zero_point), x.shape, qscheme, axis, group)
    q = _integers(x, s, z, quant_min, quant_max, round_mode, before=_is_floating(z))
    return _narrow((_f32(q) - _f32(z)) * s, x.dtype)


@np.errstate(all="ignore")
def scaled_real_quantize(
    quant_dtype: str,
    inputs: ArrayLike,
    scale: ArrayLike | None = None,
    zero_point: ArrayLike | None = None,
    axis: int | None = None,
    group_size: int | None = None,
    quant_min: float | None = None,
    quant_max: float | None = None,
    round_mode: int | None = None,
    qscheme: str | None = None,
) -> Array:
    """int32 for an integer format, float8, or (fp6, fp4) the bit patterns as uint8."""
    x = np.asarray(inputs)
    if quant_dtype in CASTS:
        return _narrow(_f32(x), CASTS[quant_dtype])
    assert scale is not None
    if FORMATS[quant_dtype].min_exp is not None:
        codes, _ = _codes(x, quant_dtype, _float_scale(x, scale, qscheme, axis))
        return codes.view(FLOAT8.get(quant_dtype, np.uint8))
    assert quant_min is not None
    assert quant_max is not None
    s = _f32(_lay_out(scale, x.shape, qscheme, axis))
    z = _lay_out(_or_zero(zero_point), x.shape, qscheme, axis)
    q = _integers(x, s, z, quant_min, quant_max, round_mode, before=True)
    code_of_zero = ROUNDINGS[ROUND_MODES[round_mode]](np.where(np.isnan(_f32(z)), 0, _f32(z)))
    return np.where(np.isnan(q), np.clip(code_of_zero, quant_min, quant_max), q).astype(np.int32)


@np.errstate(all="ignore")
def dequantize_documented(
    quant_dtype: str,
    inputs: ArrayLike,
    scale: ArrayLike | None = None,
    zero_point: ArrayLike | None = None,
    axis: int | None = None,
    group_size: int | None = None,
    qscheme: str | None = None,
) -> Array:
    q = np.asarray(inputs)
    if quant_dtype in CASTS:
        return q
    assert scale is not None
    s = _f32(_lay_out(scale, q.shape, qscheme, axis))
    if FORMATS[quant_dtype].min_exp is not None:
        return np.asarray(_f32(_decode(q.view(np.uint8), quant_dtype)) * s)
    z = _f32(_lay_out(_or_zero(zero_point), q.shape, qscheme, axis))
    return np.asarray((_f32(q) - z) * s)


def _blocks(x: ArrayLike, axis: int, size: int) -> Array:
    """x (float64) as [..., blocks, size]: `axis` last, zero-padded."""
    x = np.moveaxis(np.asarray(x).astype(np.float64), axis, -1)
    count = -(-x.shape[-1] // size)
    x = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count * size - x.shape[-1])])
    return x.reshape(*x.shape[:-1], count, size)


def _unblock(blocks: Array, axis: int, length: int) -> Array:
    *outer, count, size = blocks.shape
    return np.moveaxis(blocks.reshape(*outer, count * size)[..., :length], -1, axis)


def _exponent(x: Array) -> Array:
    """floor(log2 |x|), exactly; anything for 0, inf and NaN."""
    return np.asarray(np.frexp(x)[1] - 1)


def _mx(blocks: Array, mx_element_dtype: str) -> tuple[Array, Array]:
    """The scale and the elements' values of each block, all NaN where the block isn't finite."""
    fmt = {"int8": "int8f6"}.get(mx_element_dtype, mx_element_dtype)
    amax = np.abs(blocks).max(axis=-1, keepdims=True)
    exponent = np.clip(_exponent(amax) - _exponent(np.asarray(FORMATS[fmt].hi)), -127, 127)
    scale = np.ldexp(1.0, np.where(amax > 0, exponent, -127))
    elements = _decode(quantize(blocks / scale, fmt, 1), fmt)
    if not mx_element_dtype.startswith("fp8"):
        elements = elements + 0.0  # no -0
    finite = np.isfinite(amax)
    return np.where(finite, scale, np.nan), np.where(finite, elements, np.nan)


def _shared_micro_exponents(blocks: Array, bits: int, min_exp: int) -> Array:
    """mx6 and mx9: a bit per pair lowers the block's exponent by one. Integers have no -0."""
    finite = np.isfinite(blocks)
    normal = finite & (np.abs(blocks) >= 2.0**min_exp)
    field = np.where(normal, _exponent(blocks), min_exp - 1)
    shared = field.max(axis=-1, keepdims=True)
    pairs = field.reshape(*field.shape[:-1], field.shape[-1] // 2, 2).max(axis=-1)
    scale = np.ldexp(1.0, shared - np.repeat(pairs < shared, 2, axis=-1) - bits + 2)
    top = 2 ** (bits - 1) - 1
    return np.where(finite, np.clip(np.rint(blocks / scale), -top, top) * scale + 0.0, blocks)


def _bfp16(blocks: Array) -> Array:
    blocks = np.where(np.isfinite(blocks), blocks, 0)
    scale = np.ldexp(1.0, _exponent(np.abs(blocks).max(axis=-1, keepdims=True)) - 6)
    q = np.rint(blocks / scale)
    scale = scale * np.where(((q < -128) | (q > 127)).any(axis=-1, keepdims=True), 2, 1)
    return np.asarray(np.clip(np.rint(blocks / scale), -128, 127) * scale + 0.0)  # no -0


@np.errstate(all="ignore")
def non_scaled_fake_quantize(
    input_tensor: ArrayLike, quant_dtype: str, mx_element_dtype: str | None, axis: int, block_size: int
) -> Array:
    x = np.asarray(input_tensor)
    blocks = _blocks(_f32(x), axis, 8 if quant_dtype == "bfp16" else block_size)
    if quant_dtype == "mx":
        assert mx_element_dtype is not None
        scale, elements = _mx(blocks, mx_element_dtype)
        result = scale * elements
    elif quant_dtype == "bfp16":
        result = _bfp16(blocks)
    else:
        min_exp = -14 if x.dtype == np.float16 else -126
        result = _shared_micro_exponents(blocks, {"mx6": 5, "mx9": 8}[quant_dtype], min_exp)
    return _narrow(_f32(_unblock(result, axis, x.shape[axis])), x.dtype)


@np.errstate(all="ignore")
def non_scaled_real_quantize(
    input_tensor: ArrayLike, quant_dtype: str, mx_element_dtype: str, axis: int, block_size: int
) -> Array:
    """Only "mx": each block becomes its scale's value followed by its elements' values, float32."""
    slots = np.concatenate(_mx(_blocks(_f32(input_tensor), axis, block_size), mx_element_dtype), axis=-1)
    return _f32(_unblock(slots, axis, slots.shape[-2] * slots.shape[-1]))


def non_scaled_real_gradient(grad: ArrayLike, axis: int, block_size: int, dtype: np.dtype[Any]) -> Array:
    """The cotangent without the scales' slots, in the input's dtype."""
    grad = np.asarray(grad)
    kept = np.arange(grad.shape[axis]) % (block_size + 1) > 0
    return _narrow(_f32(grad.compress(kept, axis)), dtype)


def _clip_gradients(
    x: Array, s: Array, z: Array, grad: Array, rounding: str, a: float, b: float, shifted: bool
) -> tuple[Array, Array]:
    """The gradient to x of round, shift, clamp; and the terms (float64), one per element, of the one to the scale.

    `shifted`: z is added before rounding, not after. Slopes are float32, so a term is exact.
    """
    v = _divide(_f32(x), s)
    if shifted:
        v = v + _f32(z)
    rounded = ROUNDINGS[rounding](v.astype(np.float64))
    r = rounded if shifted else rounded + z
    inside, a_z, b_z = (a <= r) & (r <= b), a - z.astype(np.float64), b - z.astype(np.float64)
    slope = _f32(np.where(inside, rounded - v, np.where(r < a, a_z, b_z)))
    terms = np.where(np.isnan(r), 0, _f32(grad).astype(np.float64) * slope)
    return np.where(inside, grad, np.zeros_like(grad)), terms


def _tqt_scale(log_threshold: ArrayLike, domain: ArrayLike) -> tuple[Array, float, float]:
    """s, a and b."""
    exponent = np.clip(np.ceil(_f32(log_threshold).reshape(())), -126, 127)
    power = np.where(np.isnan(exponent), NAN, np.ldexp(1.0, np.nan_to_num(exponent).astype(int)))
    top = float(np.asarray(domain).reshape(()))
    return _divide(power, top), -top, top - 1


@np.errstate(all="ignore")
def tqt_quantize(
    inputs: ArrayLike,
    log_threshold: ArrayLike,
    zero_point: ArrayLike | None,
    domain: ArrayLike,
    round_mode: int | None = None,
) -> Array:
    s, a, b = _tqt_scale(log_threshold, domain)
    return scaled_fake_quantize("int8", inputs, s, zero_point, None, None, a, b, round_mode, "per_tensor")


@np.errstate(all="ignore")
def tqt_gradients(
    inputs: ArrayLike,
    log_threshold: ArrayLike,
    zero_point: ArrayLike | None,
    domain: ArrayLike,
    round_mode: int | None,
    grad: ArrayLike,
) -> tuple[Array, Array]:
    """The gradients to inputs and log_threshold."""
    s, a, b = _tqt_scale(log_threshold, domain)
    z, rounding = _or_zero(zero_point).reshape(()), ROUND_MODES[round_mode]
    grad_inputs, terms = _clip_gradients(np.asarray(inputs), s, z, np.asarray(grad), rounding, a, b, shifted=False)
    total = float(s) * math.log(2) * tree_sum(terms.ravel())
    return grad_inputs, np.full(np.shape(log_threshold), total).astype(np.float32)


@np.errstate(all="ignore")
def lsq_quantize(
    x: ArrayLike,
    scale: ArrayLike,
    zero_point: ArrayLike | None,
    grad_factor: float,
    quant_min: float,
    quant_max: float,
    ch_axis: int | None = None,
    rounding_key: int | None = 8,
) -> Array:
    qscheme = "per_tensor" if ch_axis is None else "per_channel"
    return scaled_fake_quantize(
        "int8", x, scale, zero_point, ch_axis, None, quant_min, quant_max, rounding_key, qscheme
    )


@np.errstate(all="ignore")
def lsq_gradients(
    x: ArrayLike,
    scale: ArrayLike,
    zero_point: ArrayLike | None,
    grad_factor: float,
    quant_min: float,
    quant_max: float,
    ch_axis: int | None,
    rounding_key: int | None,
    grad: ArrayLike,
    shifted: bool = True,
) -> tuple[Array, Array]:
    """The gradients to x and (float32) scale. `shifted=False`: the everyday function's, z added after rounding."""
    x = np.asarray(x)
    s, z = (
        _lay_out(qparam, x.shape, "per_tensor" if ch_axis is None else "per_channel", ch_axis)
        for qparam in (_f32(scale), _or_zero(zero_point))
    )
    grad_x, terms = _clip_gradients(x, s, z, np.asarray(grad), ROUND_MODES[rounding_key], quant_min, quant_max, shifted)
    block = [0] * x.ndim
    if s.ndim and ch_axis is not None:
        block[ch_axis] = 1
    sums = np.array([tree_sum(group) for group in _groups(terms.ravel(), x.shape, block)])
    return grad_x, (float(np.float32(grad_factor)) * sums).astype(np.float32).reshape(np.shape(scale))
