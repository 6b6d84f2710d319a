"""What a QTensor is, apart from the framework whose arrays it holds."""

from __future__ import annotations

import operator
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple, Self

from quark_kernels import schema
from quark_kernels.spec import PRESETS, PerBlock, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec

PRESET_NAMES = {spec: name for name, spec in PRESETS.items()}


class QTensorBase:
    """A quantized tensor: codes, and what they need to become numbers again.

    Attributes:
        qvalue: the codes; packed ones are bytes along the last axis, low bits first.
        scale: 0-d per tensor, else the original's rank with one entry per group. float32; float8_e8m0fnu for e8m0,
            float8_e4m3fn for e4m3, int8 exponents (-128: NaN) for shared exponents. None where packed blocks hold their
            exponents themselves (bfp16).
        zero_point: int32, shaped like ``scale``, or None.
        global_scale: float32, 0-d: what e4m3 scales are multiplied by (NVFP4), or None.
        pair_bits: uint8: with microexponents, one bit for two neighbours along the groups' axis, set where their scale
            is half the group's; a little-endian bit stream along that axis, 16 elements a byte. Or None.
        spec: the QuantSpec.
        shape: of the original tensor.
        dtype: of the original tensor, which ``dequantize`` returns by default.
        packed: whether ``qvalue`` is packed.

    """

    qvalue: Any
    scale: Any
    zero_point: Any
    global_scale: Any
    pair_bits: Any
    spec: QuantSpec
    shape: tuple[int, ...]
    dtype: Any
    packed: bool

    ARRAYS = ("qvalue", "scale", "zero_point", "global_scale", "pair_bits")

    @property
    def ndim(self) -> int:
        """Number of axes of the original tensor."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the arrays hold."""
        arrays = [getattr(self, name) for name in self.ARRAYS]
        return sum(prod(a.shape) * a.dtype.itemsize for a in arrays if a is not None)

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """The shape of the scales, stored apart or in packed blocks: 0-d per tensor, else the original's rank."""
        if self.spec.granularity == PerTensor():
            return ()
        return schema.scale_shape(self.shape, schema.block_of(self.spec, self.shape))

    @property
    def bits_per_value(self) -> float:
        """Bits that the format needs for a value, its share of scales and zero points (a code's width each) included.

        Scales count 32 bits, or 8 in every other format; nvfp4's global scale 32, and pair bits one a pair.

        ``nbytes`` is what memory really holds, where a 6-bit code may fill a byte. NaN for an empty tensor.
        """
        n = prod(self.shape)
        if n == 0:
            return float("nan")
        bits = n * self.spec.element.bits
        if not self.spec.element.is_cast:
            bits += prod(self.scale_shape) * (32 if self.spec.scale_format == "float32" else 8)
        if self.global_scale is not None:
            bits += 32
        if self.spec.scale_format == "microexponents" and isinstance(self.spec.granularity, PerGroup):
            axis = self.spec.granularity.axis
            bits += n // self.shape[axis] * -(-self.shape[axis] // 2)
        if self.zero_point is not None:
            bits += prod(self.zero_point.shape) * self.spec.element.bits
        return bits / n

    def __len__(self) -> int:
        """Return the length of the first axis."""
        if not self.shape:
            raise TypeError("len() of a 0-d QTensor")
        return self.shape[0]

    def __getitem__(self, key: Any) -> Self:
        """Return the QTensor of a part, without a computation.

        Args:
            key: integers, slices with a step of 1 or more, or a tuple of them, for leading axes along which no scale is
                shared by a group: not the axis of groups or blocks, and not the packed last axis.

        Raises:
            TypeError: another kind of key.
            IndexError: an index outside the axis, or more indices than axes.
            ValueError: an axis whose elements can't be taken apart, or a negative step.

        """
        entries = key if isinstance(key, tuple) else (key,)
        if len(entries) > len(self.shape):
            raise IndexError(f"key has {len(entries)} indices; the QTensor has {len(self.shape)} axes")
        part = _part_of(self.spec, self.shape, self.packed, entries)
        arrays: dict[str, Any] = {}
        for name in self.ARRAYS:
            array = getattr(self, name)
            if array is not None and array.ndim > 0:
                array = array[part.codes if name in ("qvalue", "pair_bits") else part.scales]
                if name in ("scale", "zero_point") and part.spec.granularity == PerTensor():
                    array = array.reshape(())
            arrays[name] = array
        return replace(self, **arrays, spec=part.spec, shape=part.shape)  # type: ignore[type-var]

    def __repr__(self) -> str:
        """Return the tensor in one line: spec, shape, dtype, size."""
        words = [
            PRESET_NAMES.get(self.spec, str(self.spec)),
            f"shape={tuple(self.shape)}",
            f"dtype={str(self.dtype).removeprefix('torch.')}",
        ]
        if self.packed:
            words.append("packed")
        if not self.spec.element.is_cast:
            words.append(f"scale{self.scale_shape}")
        if prod(self.shape) > 0:
            words.append(f"{self.bits_per_value:.4g} bits/value")
        return f"QTensor({', '.join(words)}, {self.nbytes} bytes)"


class _Part(NamedTuple):
    """How a part of a QTensor is taken from its arrays, and what the part is."""

    codes: tuple[Any, ...]
    scales: tuple[Any, ...]
    spec: QuantSpec
    shape: tuple[int, ...]


def _part_of(spec: QuantSpec, shape: tuple[int, ...], packed: bool, entries: tuple[Any, ...]) -> _Part:
    block = schema.block_of(spec, shape)
    grouped = _grouped_axes(spec, len(shape))
    codes: list[Any] = []
    scales: list[Any] = []
    lengths: list[int] = []
    dropped = 0
    for axis, (entry, length) in enumerate(zip(entries, shape, strict=False)):
        is_packed = packed and axis == len(shape) - 1
        if is_packed or axis in grouped:
            why = "is packed" if is_packed else f"{spec.granularity} cuts into groups"
            raise ValueError(f"key indexes axis {axis}, which {why}; allowed: the other axes, or dequantize first")
        if isinstance(entry, slice):
            start, stop, step = entry.indices(length)
            if step < 1:
                raise ValueError(f"key has a slice of step {step}; allowed: 1 or more")
            lengths.append(len(range(start, stop, step)))
            index: Any = slice(start, stop, step)
        else:
            index = _index(entry, axis, length)
            dropped += 1
        codes.append(index)
        is_shared = block[axis] == 0
        scales.append((slice(None) if isinstance(entry, slice) else 0) if is_shared else index)
    lengths += shape[len(entries) :]
    return _Part(tuple(codes), tuple(scales), _without_axes(spec, len(shape), codes, dropped), tuple(lengths))


def _grouped_axes(spec: QuantSpec, rank: int) -> tuple[int, ...]:
    """The axes along which elements of a group lie side by side."""
    match spec.granularity:
        case PerGroup(_, axis):
            return (axis % rank,)
        case PerBlock():
            return (rank - 2, rank - 1)
        case PerToken():
            return (rank - 1,)
        case _:
            return ()


def _index(entry: Any, axis: int, length: int) -> int:
    try:
        index = operator.index(entry)
    except TypeError:
        index = None
    if index is None or isinstance(entry, bool):
        raise TypeError(f"key has a {type(entry).__name__} for axis {axis}; allowed: integers and slices")
    if not -length <= index < length:
        raise IndexError(f"key has {index} for axis {axis} of length {length}")
    return index % length


def _without_axes(spec: QuantSpec, rank: int, codes: list[Any], dropped: int) -> QuantSpec:
    """The spec of what is left where integers have taken axes away."""
    granularity = spec.granularity
    if dropped == 0 or not isinstance(granularity, (PerChannel, PerGroup)):
        return spec
    axis = granularity.axis % rank
    if axis < len(codes) and not isinstance(codes[axis], slice):
        return replace(spec, granularity=PerTensor())
    if granularity.axis < 0:
        return spec  # counted from the end, where nothing has changed
    before = sum(1 for index in codes[:axis] if not isinstance(index, slice))
    return replace(spec, granularity=replace(granularity, axis=granularity.axis - before))
