"""The independent oracle: what the specification says, in NumPy float64, by another method than the library's.

Every grid is a table of its representable values. A value's *position* is its place on that table's number line
(grid points are the integers 0, 1, 2, ...; in between, linear), so one set of roundings on plain float64 numbers
serves integers, minifloats (OFP8, OCP MX 1.0, fnuz) and the two casts alike. Only the quotient x/s and the final
product (q - z) * s round to float32; everything else is exact.

Codes are int64: signed values for the integer formats (int8f6: q of the value q/64), bit patterns for the others.
Only the plain integers have a zero point (exact up to 2^23 in magnitude). The casts bf16 and fp16 have no scale:
pass 1. Block formats add nothing to elements: whatever their scales are stored as, a float32 scale for each element
follows (`element_scales`). Stochastic rounding takes its random words as an array (`random_words`).
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
NAN = np.float32(np.nan)


def _f32(x: ArrayLike) -> Array:
    return np.asarray(x).astype(np.float32)


def _exponent(x: ArrayLike) -> Array:
    """floor(log2 |x|), exactly; anything for 0, inf and NaN."""
    return np.asarray(np.frexp(x)[1] - 1)


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


def _stochastic(t: Array, words: ArrayLike) -> Array:
    """|t| up or down, up as often as its fraction says: where a 32-bit word is below fraction * 2^32."""
    below = np.trunc(np.abs(t))
    return np.asarray(np.copysign(below + (words < np.trunc((np.abs(t) - below) * 2.0**32)), t))


def _divide(x: ArrayLike, scale: ArrayLike) -> Array:
    with np.errstate(all="ignore"):
        return np.asarray(np.asarray(x, np.float32) / np.asarray(scale, np.float32))


def _or_zero(zero_point: ArrayLike | None) -> Array:
    return np.asarray(0 if zero_point is None else zero_point)


def _position(v: Array, fmt: str) -> Array:
    """The signed position of v on the format's number line continued past its ends (floats: one step at most)."""
    f = FORMATS[fmt]
    if f.min_exp is None:
        return np.asarray(v * 2.0**f.mantissa)
    grid, size = _grid(fmt), np.abs(v)
    below = np.clip(np.searchsorted(grid, size, side="right") - 1, 0, len(grid) - 2)
    position = below + (size - grid[below]) / (grid[below + 1] - grid[below])
    return np.asarray(np.copysign(np.minimum(position, len(grid) - 1), v))


def _round(v: ArrayLike, fmt: str, rounding: str, words: ArrayLike | None = None) -> Array:
    """The position of v, rounded; `words` are the random ones of "stochastic"."""
    with np.errstate(invalid="ignore"):
        position = _position(np.asarray(v, np.float64), fmt)
        return ROUNDINGS[rounding](position) if words is None else _stochastic(position, words)


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
    words: ArrayLike | None = None,
) -> Array:
    """The codes of x; scale and zero_point broadcast to x.

    Where the format can, a zero result has the sign of x/s and a NaN code the sign of x.
    """
    f = FORMATS[fmt]
    v = _divide(x, scale)
    is_nan = np.isnan(v)
    r = _round(np.where(is_nan, np.float32(0), v), fmt, rounding, words)
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
    words: ArrayLike | None = None,
) -> Array:
    """dequantize(quantize(x)), but a NaN x stays NaN, with its sign."""
    codes = quantize(x, fmt, scale, zero_point, rounding, quant_min, quant_max, words)
    return _canonical_nan(dequantize(codes, fmt, scale, zero_point, dtype), np.isnan(x), x)


def clipped(
    x: ArrayLike,
    fmt: str,
    scale: ArrayLike,
    zero_point: ArrayLike | None = None,
    rounding: str = "half_even",
    quant_min: int | None = None,
    quant_max: int | None = None,
    words: ArrayLike | None = None,
) -> Array:
    """True where the "clipped" gradient passes: x, rounded on the grid continued past its ends, is inside them."""
    f = FORMATS[fmt]
    r = _round(_divide(x, scale), fmt, rounding, words)
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


def _extremes(group: Array, asymmetric: bool, method: str) -> tuple[np.float32, np.float32]:
    """The range lo <= 0 <= hi of a group that its scale follows from (symmetric: 0 and amax), NaN if not all finite."""
    if not np.isfinite(group).all():
        return NAN, NAN
    sides = (np.maximum(-group, 0), np.maximum(group, 0)) if asymmetric else (np.zeros_like(group), np.abs(group))
    rank = group.size
    if method.startswith("percentile"):
        percent = float(method.partition("=")[2] or 99.99)
        rank = min(max(math.ceil(percent / 100.0 * group.size), 1), group.size)
    below, above = (np.sort(side)[:rank].max(initial=0) for side in sides)
    return np.float32(-below), np.float32(above)


@np.errstate(all="ignore")
def _qparams(
    lo: Array, hi: Array, fmt: str, asymmetric: bool, quant_min: int | None, quant_max: int | None, rule: str | None
) -> tuple[Array, Array]:
    """The scale and zero point of each range lo <= 0 <= hi; with a `rule`, the power of two."""
    a, b = _bounds(FORMATS[fmt], quant_min, quant_max)
    if rule is not None:
        return power_of_two(hi, fmt, rule, quant_max), np.zeros(hi.shape, np.int32)
    if asymmetric:
        width = np.float32(b - a)
        scale = np.where(np.isfinite(hi - lo), (hi - lo) / width, hi / width - lo / width)
        scale = np.minimum(scale, np.finfo(np.float32).max)  # two codes for the whole range: a scale is never inf
    else:
        scale = hi / np.float32(FORMATS[fmt].hi if quant_max is None else quant_max)
    scale = _f32(np.where(lo == hi, 1, np.maximum(scale, SMALLEST_SCALE)))  # lo == hi: all zero
    zero = np.clip(a - np.rint(np.nan_to_num(lo / scale)).astype(np.float64), a, b)
    return scale, (zero if asymmetric else np.zeros_like(zero)).astype(np.int32)


def _least_error(
    group: Array, lo: np.float32, hi: np.float32, fmt: str, asymmetric: bool, rounding: str, *rest: Any
) -> tuple[np.float32, np.float32]:
    """Of 80 narrower and narrower ranges the first with the least sum of squared errors."""
    share = np.arange(100, 20, -1).astype(np.float32) / np.float32(100)
    scale, zero = (a[:, None] for a in _qparams(lo * share, hi * share, fmt, asymmetric, *rest))
    fake = fake_quantize(group, fmt, scale, zero, rounding, *rest[:2])
    error = fake.astype(np.float64) - group.astype(np.float64)
    best = int(np.argmin([tree_sum(terms) for terms in error * error]))
    return lo * share[best], hi * share[best]


def choose_qparams(
    x: ArrayLike,
    fmt: str,
    block: Sequence[int],
    symmetric: bool = True,
    quant_min: int | None = None,
    quant_max: int | None = None,
    method: str = "absmax",
    rule: str | None = None,
    rounding: str = "half_even",
) -> tuple[Array, Array | None]:
    """The dynamic scales of x (float32) and, for an asymmetric integer format, its int32 zero points.

    `method`: absmax | minmax | percentile | percentile=P | mse. `rule`: that of power-of-two scales.
    """
    f = FORMATS[fmt]
    x = np.asarray(x, np.float32)
    shape = scale_shape(x.shape, block)
    if f.cast:
        return np.ones(shape, np.float32), None
    asymmetric = not symmetric and f.min_exp is None and f.mantissa == 0
    ranges = []
    for group in _groups(x.ravel(), x.shape, block):
        lo, hi = _extremes(group, asymmetric, method)
        if method == "mse" and np.isfinite(hi):
            rounds = "half_even" if rounding == "stochastic" else rounding
            lo, hi = _least_error(group, lo, hi, fmt, asymmetric, rounds, quant_min, quant_max, rule)
        ranges.append((lo, hi))
    los, his = np.moveaxis(np.array(ranges, np.float32).reshape(*shape, 2), -1, 0)
    scale, zero = _qparams(los, his, fmt, asymmetric, quant_min, quant_max, rule)
    return scale, zero if asymmetric else None


# Power-of-two and two-level scales. A group here is a box of `block` neighbours; an axis may end with a ragged one.


def _boxes_max(x: Array, block: Sequence[int]) -> Array:
    """The greatest of each group's numbers >= 0; NaN if one is."""
    sizes = [min(b or n, n) or 1 for n, b in zip(x.shape, block, strict=True)]
    counts = scale_shape(x.shape, block)
    ends = [(0, count * b - n) for n, b, count in zip(x.shape, sizes, counts, strict=True)]
    boxes = (np.pad(x, ends) if ends else x).reshape([n for pair in zip(counts, sizes, strict=True) for n in pair])
    return np.asarray(boxes.max(axis=tuple(range(1, 2 * x.ndim, 2)), initial=0))


def group_amax(x: ArrayLike, block: Sequence[int]) -> Array:
    """The greatest magnitude in each group (float32), NaN where one isn't finite."""
    x = _f32(x)
    amax = _boxes_max(np.where(np.isfinite(x), np.abs(x), NAN), block)
    return _f32(amax)


def power_of_two(amax: ArrayLike, fmt: str, rule: str, quant_max: int | None = None) -> Array:
    """The scale 2^-127 .. 2^127 (float32) of each amax by one of the four rules; NaN where amax isn't finite."""
    f, amax = FORMATS[fmt], np.asarray(amax, np.float64)
    top = np.float64(f.hi if quant_max is None else quant_max)
    emax = int(_exponent(top))
    mantissa = emax if f.min_exp is None and f.mantissa == 0 else f.mantissa
    with np.errstate(invalid="ignore"):
        m = np.ldexp(amax, -_exponent(amax))
        up = {
            "floor": np.zeros(m.shape, bool),
            "ceil": m > 1,
            "even": m >= 2 - 2.0 ** -(mantissa + 1),
            "rceil": m > np.ldexp(top, -emax),
        }[rule]
    exponent = np.where(amax > 0, np.clip(_exponent(amax) - emax + up, -127, 127), -127)
    return _f32(np.where(np.isfinite(amax), np.ldexp(1.0, exponent), np.nan))


def e8m0(scale: ArrayLike) -> Array:
    """The codes of power-of-two scales: exponent + 127, 0xFF for NaN."""
    scale = np.asarray(scale, np.float64)
    return np.where(np.isnan(scale), 255, _exponent(scale) + 127).astype(np.uint8)


@np.errstate(all="ignore")
def two_level(
    amax: Array, fmt: str, quant_max: int | None = None, global_scale: ArrayLike | None = None
) -> tuple[Array, Array]:
    """The e4m3 codes of the groups' scales, and the tensor's scale (float32, 0-d) that they count in."""
    top = np.float32(FORMATS[fmt].hi if quant_max is None else quant_max)
    largest = np.max(amax, initial=np.float32(0))
    wanted = np.maximum(largest / (np.float32(448) * top), SMALLEST_SCALE) if largest != 0 else 1
    g = _f32(wanted if global_scale is None else global_scale).reshape(())
    scale = np.clip(amax / top / g, np.float32(2.0**-9), np.float32(448))
    return np.where(np.isnan(scale), 0x7F, quantize(scale, "fp8_e4m3", 1)).astype(np.uint8), g


def shared_exponents(amax: ArrayLike) -> Array:
    """Block floating point: the exponent of each amax (int8), at least -126; -128 where amax isn't finite."""
    amax = np.asarray(amax, np.float64)
    exponent = np.where(amax > 0, np.clip(_exponent(amax), -126, 127), -126)
    return np.where(np.isfinite(amax), exponent, -128).astype(np.int8)


def micro_exponents(x: ArrayLike, block: Sequence[int], min_exp: int) -> tuple[Array, Array]:
    """The exponent field (less the bias, int8) of each group, and a bit for each pair that lies below it.

    The bits are a little-endian stream along the groups' axis, uint8. A group that isn't finite: -128, no bits.
    """
    x = _f32(x)
    bias, axis = 1 - min_exp, _axis_of(block)
    field = _exponent_field(np.nan_to_num(x, nan=0, posinf=0, neginf=0), min_exp) + bias
    pair = [2 if d == axis else 1 for d in range(x.ndim)]
    shared, pairs = _boxes_max(field, block), _boxes_max(field, pair)
    finite = np.isfinite(group_amax(x, block))
    owner = np.arange(pairs.shape[axis]) * 2 // min(block[axis], x.shape[axis] or 1)
    below = (pairs < shared.take(owner, axis)) & finite.take(owner, axis)
    return np.where(finite, shared - bias, -128).astype(np.int8), np.packbits(below, axis, "little")


def _axis_of(block: Sequence[int]) -> int:
    """The axis that groups run along."""
    return next(d for d, b in enumerate(block) if b != 1)


def _exponent_field(x: ArrayLike, min_exp: int) -> Array:
    """The exponent of x, as the field of a format with this least normal exponent says: all below it have one less."""
    x = np.abs(np.asarray(x, np.float64))
    return np.where(x >= 2.0**min_exp, _exponent(x), min_exp - 1)


def element_scales(
    stored: ArrayLike,
    scale_format: str,
    shape: Sequence[int],
    block: Sequence[int],
    bits: int = 8,
    global_scale: ArrayLike | None = None,
    pair_bits: ArrayLike | None = None,
) -> Array:
    """The float32 scale of each element, from what is stored (e8m0, e4m3: bit patterns)."""
    stored = np.asarray(stored)
    if scale_format == "float32":
        return expand(stored, shape, block)
    if scale_format == "e4m3":
        assert global_scale is not None
        with np.errstate(all="ignore"):
            return expand(_f32(_decode(stored, "fp8_e4m3")) * _f32(global_scale), shape, block)
    if scale_format == "e8m0":
        return expand(_f32(np.where(stored == 255, np.nan, np.ldexp(1.0, stored.astype(int) - 127))), shape, block)
    exponent = expand(stored.astype(int), shape, block)
    nan = exponent == -128
    if pair_bits is not None:
        axis = _axis_of(block)
        pairs = np.unpackbits(np.asarray(pair_bits, np.uint8), axis, None, "little")
        exponent = exponent - pairs.take(np.arange(shape[axis]) // 2, axis)
    return _f32(np.where(nan, np.nan, np.ldexp(1.0, exponent - bits + 2)))


def pack_blocks(codes: ArrayLike, exponents: ArrayLike, size: int) -> Array:
    """Blocks of bytes along the last axis: the exponent + 127, then the codes, zeros after a ragged end."""
    codes, exponents = np.asarray(codes), np.asarray(exponents).astype(int)
    lacking = exponents.shape[-1] * size - codes.shape[-1]
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, lacking)]).reshape(*exponents.shape, size)
    blocks = np.concatenate([exponents[..., None] + 127, codes], axis=-1) & 255
    return blocks.reshape(*codes.shape[:-2], -1).astype(np.uint8)


# Random words: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).


def philox(counter: Sequence[ArrayLike], key: tuple[int, int]) -> Array:
    """The four random words (along the last axis, uint32) of each counter of four words."""
    low = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(word, np.uint64) for word in counter))
    for round_number in range(10):
        k0, k1 = (
            np.uint64((k + round_number * step) % 2**32) for k, step in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True)
        )
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> np.uint64(32)) ^ c1 ^ k0, p1 & low, (p0 >> np.uint64(32)) ^ c3 ^ k1, p0 & low
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def random_words(seed: int, shape: Sequence[int]) -> Array:
    """The word of each element of an array: by its row-major index, four to a counter."""
    n, seed = math.prod(shape), seed % 2**64
    index = np.arange(-(-n // 4), dtype=np.uint64)
    counter = (index & np.uint64(0xFFFFFFFF), index >> np.uint64(32), 0, 0)
    return philox(counter, (seed % 2**32, seed >> 32)).ravel()[:n].reshape(shape)


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


def _mx(blocks: Array, mx_element_dtype: str) -> tuple[Array, Array]:
    """The scale and the elements' values of each block, all NaN where the block isn't finite."""
    fmt = {"int8": "int8f6"}.get(mx_element_dtype, mx_element_dtype)
    amax = np.abs(blocks).max(axis=-1, keepdims=True)
    scale = power_of_two(amax, fmt, "floor").astype(np.float64)
    elements = _decode(quantize(blocks / scale, fmt, 1), fmt)
    if not mx_element_dtype.startswith("fp8"):
        elements = elements + 0.0  # no -0
    return scale, np.where(np.isfinite(amax), elements, np.nan)


def _shared_micro_exponents(blocks: Array, bits: int, min_exp: int) -> Array:
    """mx6 and mx9: a bit per pair lowers the block's exponent by one. Integers have no -0."""
    finite = np.isfinite(blocks)
    field = _exponent_field(np.where(finite, blocks, 0), min_exp)
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
