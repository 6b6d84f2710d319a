"""QTensors in the layouts of compressed-tensors, the files that vLLM and llm-compressor exchange.

Layouts (compressed-tensors 0.20): ``pack-quantized`` for integers, ``mxfp4-pack-quantized`` and
``nvfp4-pack-quantized``. Only bits move here, through the core's pack and unpack, so a round trip is exact. The one
exception is nvfp4's scale of the tensor, of which the layout stores the reciprocal.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from quark_kernels import _core, schema
from quark_kernels.files import Raw, Static, describe, framework_of, from_raw, make_qtensor, static_of, to_raw, widen
from quark_kernels.qtensor import QTensorBase
from quark_kernels.schema import Part, Shape, codes_spec
from quark_kernels.spec import (
    PRESETS,
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantSpec,
    as_spec,
    one_of,
)

Array = NDArray[Any]

INTEGERS, MXFP4, NVFP4 = "pack-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized"
SCALE_DTYPES = ("float32", "bfloat16", "float16")
WORD = 32
"""Bits that a row of codes is filled up to."""


class Layout(NamedTuple):
    """A spec in the package's words."""

    format: str
    strategy: str
    group_size: int | None = None


def layout_of(spec: QuantSpec, rank: int = 2) -> Layout:
    """Return the layout of a spec for weights of this rank. Raises ValueError where the package has none."""
    size = spec.granularity.size if isinstance(spec.granularity, PerGroup) else None
    along_rows = isinstance(spec.granularity, PerGroup) and spec.granularity.axis in (-1, rank - 1)
    if spec.format == "fp4" and along_rows and rank == 2:
        if (spec.scale_format, size) == ("e8m0", 32):
            return Layout(MXFP4, "group", size)
        if (spec.scale_format, size) == ("e4m3", 16):
            return Layout(NVFP4, "tensor_group", size)
    if spec.element.is_integer and spec.element.bits <= 8 and spec.scale_format == "float32" and rank >= 2:
        match spec.granularity:
            case PerTensor():
                return Layout(INTEGERS, "tensor")
            case PerToken():
                return Layout(INTEGERS, "channel")
            case PerChannel(axis) if rank == 2 and axis in (0, -2):
                return Layout(INTEGERS, "channel")
            case PerGroup() if along_rows:
                return Layout(INTEGERS, "group", size)
    raise ValueError(
        f"spec is {spec} of a tensor with {rank} axes; compressed-tensors has integers of at most 8 bits, 2-D or "
        "more, with float32 scales per tensor, per row or per group along rows; mxfp4 and nvfp4, 2-D, along rows"
    )


def has_zero_point(spec: QuantSpec) -> bool:
    """Whether the package has zero points with every such weight. To its signed codes, an unsigned 0 is one."""
    return not spec.symmetric or (spec.element.is_integer and spec.element.lo >= 0)


def scheme(spec: QuantSpec | str) -> dict[str, Any]:
    """Return the ``format`` and ``weights`` of a config group; ``interop.compressed_tensors_scheme`` says the rest."""
    spec = as_spec(spec, None)
    layout = layout_of(spec)
    weights: dict[str, Any] = {
        "num_bits": spec.element.bits,
        "type": "int" if layout.format == INTEGERS else "float",
        "symmetric": not has_zero_point(spec),
        "strategy": layout.strategy,
    }
    if layout.group_size is not None:
        weights["group_size"] = layout.group_size
    if layout.format != INTEGERS:
        weights["scale_dtype"] = "torch.uint8" if layout.format == MXFP4 else "torch.float8_e4m3fn"
    return {"format": layout.format, "weights": weights}


def spec_of(given: object, rank: int) -> QuantSpec:
    """Return the spec that is given: as one, as a preset's name, or as a config group or its ``weights``."""
    if not isinstance(given, Mapping):
        return as_spec(given, None)
    weights = given.get("weights", given)
    if not isinstance(weights, Mapping):
        raise TypeError(f"spec has weights {weights!r}; allowed: a dictionary")
    bits, kind, strategy, size = (weights.get(key) for key in ("num_bits", "type", "strategy", "group_size"))
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    granularity: Granularity
    match (kind, strategy, size):
        case ("float", "group", 32) if bits == 4:
            return PRESETS["mxfp4"]
        case ("float", "tensor_group", 16) if bits == 4:
            return PRESETS["nvfp4"]
        case ("int", "tensor", _):
            granularity = PerTensor()
        case ("int", "channel", _):
            granularity = PerChannel(0) if rank == 2 else PerToken()
        case ("int", "group", int()):
            granularity = PerGroup(size)
        case _:
            raise ValueError(
                f"spec has type {kind!r}, num_bits {bits!r}, strategy {strategy!r} and group_size {size!r}; allowed: "
                "int per tensor, channel or group; float of 4 bits in groups of 32, or in a tensor_group of 16"
            )
    return QuantSpec(f"int{bits}", granularity, symmetric=weights.get("symmetric", True))


# ---- bits ------------------------------------------------------------------------------------------------------------


def offset_binary(codes: Array, bits: int, *, signed: bool) -> Array:
    """Codes, or zero points, as the package counts them: from 0 for the least. Those of unsigned formats already do."""
    return codes.astype(np.uint8) + np.uint8(signed << (bits - 1))  # modulo 256


def from_offset_binary(codes: Array, bits: int, *, signed: bool) -> Array:
    """Return the codes, int8 or uint8, of which these are the offset binary ones."""
    return (codes - np.uint8(1 << (bits - 1))).view(np.int8) if signed else codes


def pack(codes: Array, bits: int) -> Array:
    """Pack the low bits of codes along the last axis into bytes."""
    packed = np.empty(schema.packed_shape(codes.shape, bits), np.uint8)
    _core.pack((codes,), (packed,), codes_spec(bits, length=codes.shape[-1]).text)
    return packed


def to_words(codes: Array, bits: int) -> Array:
    """Pack the low bits of codes along the last axis into int32 words: a stream of bits, rows filled up with zeros."""
    packed = pack(codes, bits)
    words = np.zeros((*codes.shape[:-1], words_of(codes.shape[-1], bits)), np.int32)
    if words.size:
        words.view(np.uint8)[..., : packed.shape[-1]] = packed
    return words


def from_words(words: Array, bits: int, length: int) -> Array:
    """Return the codes that ``to_words`` packed, one a byte."""
    shape = (*words.shape[:-1], length)
    if not prod(shape):
        return np.zeros(shape, np.uint8)
    packed = np.ascontiguousarray(words).view(np.uint8)[..., : schema.packed_shape(shape, bits)[-1]]
    return unpack(packed, bits, length)


def unpack(packed: Array, bits: int, length: int) -> Array:
    """Return the unsigned codes of a stream along the last axis, one a byte."""
    codes = np.empty((*packed.shape[:-1], length), np.uint8)
    _core.unpack((packed,), (codes,), codes_spec(bits, length=length).text)
    return codes


def words_of(length: int, bits: int) -> int:
    """The words that a row of codes fills."""
    return -(-length * bits // WORD)


def scale_shape(shape: Shape, layout: Layout) -> Shape:
    """The shape that the package gives scales and unpacked zero points."""
    if layout.strategy == "tensor":
        return (1,)
    return (*shape[:-1], 1 if layout.group_size is None else shape[-1] // layout.group_size)


def narrow(scale: Array, dtype: str) -> Raw:
    """A float32 scale in the package's dtype. Raises ValueError where it doesn't fit exactly."""
    if dtype == "float32":
        return Raw.of(scale)
    bits = np.ascontiguousarray(scale).view(np.uint32)
    with np.errstate(over="ignore"):
        raw = Raw.of((bits >> 16).astype(np.uint16) if dtype == "bfloat16" else scale.astype(np.float16))
    raw = raw._replace(dtype=dtype)
    if not np.array_equal(widen(raw).view(np.uint32), bits):
        raise ValueError(f"scale_dtype is {dtype}; q.scale has other values than {dtype} can hold, allowed: float32")
    return raw


def reciprocal(name: str, value: Array) -> Array:
    """A division of IEEE 754, as NumPy does it and XLA doesn't; NaN stays NaN."""
    with np.errstate(all="ignore"):
        result = np.float32(1) / value.reshape(1)
    if not result.all() or np.isinf(result).any() or result[0] < 0:
        raise ValueError(f"{name} is {value.reshape(())}; allowed: positive numbers whose reciprocal is a float32")
    return result


# ---- there and back --------------------------------------------------------------------------------------------------


def to_tensors(q: Any, name: str, scale_dtype: str) -> dict[str, Any]:
    """Return a QTensor's tensors; ``interop.to_compressed_tensors`` says the rest."""
    if not isinstance(q, QTensorBase):
        raise TypeError(f"q is a {type(q).__module__}.{type(q).__name__}; allowed: a QTensor")
    one_of("scale_dtype", scale_dtype, SCALE_DTYPES)
    layout = layout_of(q.spec, q.ndim)
    if layout.group_size is not None and q.shape[-1] % layout.group_size:
        raise ValueError(
            f"q has shape {q.shape}; compressed-tensors has no shorter last group, {q.spec} needs whole ones"
        )
    raws = {part: to_raw(f"q.{part}", getattr(q, part)) for part in q.ARRAYS if getattr(q, part) is not None}
    static_of(q).check("q", {part: describe(f"q.{part}", getattr(q, part)) for part in raws})
    made = _from_integers(q, layout, raws, scale_dtype) if layout.format == INTEGERS else _from_fp4(q, layout, raws)
    framework = framework_of(q.qvalue)
    assert framework is not None
    tensors = {f"{name}_{key}": from_raw(raw, framework) for key, raw in made.items()}
    return {key: t.to(q.qvalue.device) for key, t in tensors.items()} if framework == "torch" else tensors


def _from_integers(q: Any, layout: Layout, raws: Mapping[str, Raw], scale_dtype: str) -> dict[str, Raw]:
    bits, signed = q.spec.element.bits, q.spec.element.lo < 0
    stored = raws["qvalue"].array(np.uint8)
    # A packed code is two's complement in its own width, and adding the offset carries nothing beyond it that is kept.
    codes = unpack(stored, bits, q.shape[-1]) if q.packed else stored
    per_group = scale_shape(q.shape, layout)
    made = {
        "packed": Raw.of(to_words(offset_binary(codes, bits, signed=signed), bits)),
        "scale": narrow(raws["scale"].array(np.float32).reshape(per_group), scale_dtype),
        "shape": Raw.of(np.array(q.shape, np.int64)),
    }
    if q.zero_point is not None or has_zero_point(q.spec):
        zero = np.zeros(per_group, np.int32) if q.zero_point is None else raws["zero_point"].array()
        lo, hi = q.spec.element.lo, q.spec.element.hi
        if zero.size and not lo <= zero.min() <= zero.max() <= hi:
            raise ValueError(
                f"q.zero_point has {zero.min()} to {zero.max()}; {q.spec.format} has room for {lo:.0f} to {hi:.0f}"
            )
        zero = offset_binary(zero, bits, signed=signed).reshape(per_group)
        if layout.strategy == "tensor":  # the only one that the package doesn't pack
            made["zero_point"] = Raw.of(from_offset_binary(zero, bits, signed=True))
        else:
            made["zero_point"] = Raw.of(to_words(zero.swapaxes(-1, -2), bits).swapaxes(-1, -2))
    return made


def _from_fp4(q: Any, layout: Layout, raws: Mapping[str, Raw]) -> dict[str, Raw]:
    codes = raws["qvalue"] if q.packed else Raw.of(pack(raws["qvalue"].array(), 4))
    scale = raws["scale"]
    if layout.format == MXFP4:
        return {"packed": codes, "scale": scale._replace(dtype="uint8")}
    g = reciprocal("q.global_scale", raws["global_scale"].array(np.float32))
    return {"packed": codes, "scale": scale, "global_scale": Raw.of(g)}


def from_tensors(tensors: Mapping[str, Any], spec: object, name: str, dtype: str | None, packed: bool | None) -> Any:
    """Return a QTensor of a weight's tensors; ``interop.from_compressed_tensors`` says the rest."""
    if not isinstance(tensors, Mapping):
        raise TypeError(f"tensors is a {type(tensors).__name__}; allowed: a dictionary of names and tensors")
    weight = Weight(tensors, name)
    words = weight.need("packed")
    framework = framework_of(tensors[f"{name}_packed"])
    if framework not in ("torch", "jax"):
        raise TypeError(f"{name}_packed is a NumPy array; allowed: a torch tensor or a JAX array")
    whole = spec_of(spec, len(words.shape))
    layout = layout_of(whole, len(words.shape))
    packed = schema.use_packed(whole, packed)
    shape, parts = (_integers if layout.format == INTEGERS else _fp4)(weight, whole, layout, packed)
    if dtype is None:
        dtype = weight.need("scale").dtype if layout.format == INTEGERS else "bfloat16"
    name_of_dtype = dtype if isinstance(dtype, str) else str(getattr(dtype, "__name__", dtype)).removeprefix("torch.")
    one_of("dtype", name_of_dtype, schema.FLOAT_DTYPES)
    static = Static(whole, shape, name_of_dtype, packed)
    static.check(name, {part: Part(raw.shape, raw.dtype) for part, raw in parts.items()})
    q: Any = make_qtensor(static, parts, framework)
    return q.to(tensors[f"{name}_packed"].device) if framework == "torch" else q


class Weight:
    """A weight's tensors among others, as bytes."""

    def __init__(self, tensors: Mapping[str, Any], name: str) -> None:
        self.tensors, self.name = tensors, name
        if f"{name}_g_idx" in tensors:
            raise ValueError(f"{name}_g_idx is there; groups in another order than the columns' aren't supported")

    def get(self, part: str) -> Raw | None:
        """One of them; None where it isn't there."""
        full = f"{self.name}_{part}"
        return to_raw(full, self.tensors[full]) if full in self.tensors else None

    def need(self, part: str, *dtypes: str) -> Raw:
        """One of them. Raises where it isn't there or of another dtype."""
        raw = self.get(part)
        if raw is None:
            has = ", ".join(key for key in self.tensors if key.startswith(f"{self.name}_")) or "none"
            raise ValueError(f"{self.name}_{part} is missing; of {self.name} there are: {has}")
        if dtypes and raw.dtype not in dtypes:
            raise TypeError(f"{self.name}_{part} has dtype {raw.dtype}; allowed: {', '.join(dtypes)}")
        return raw

    def expect_shape(self, part: str, raw: Raw, shape: Shape) -> None:
        """Raises ValueError where a tensor has another shape."""
        if raw.shape != shape:
            raise ValueError(f"{self.name}_{part} has shape {raw.shape}; allowed: {shape}")


def _integers(weight: Weight, spec: QuantSpec, layout: Layout, packed: bool) -> tuple[Shape, dict[str, Raw]]:
    bits, signed = spec.element.bits, spec.element.lo < 0
    words = weight.need("packed", "int32")
    lengths = weight.need("shape", "int64", "int32").array()
    shape = tuple(int(n) for n in lengths.reshape(-1))
    if lengths.ndim != 1 or len(shape) != len(words.shape) or min(shape) < 0:
        raise ValueError(f"{weight.name}_shape is {shape}; {weight.name}_packed has shape {words.shape}")
    weight.expect_shape("packed", words, (*shape[:-1], words_of(shape[-1], bits)))
    if layout.group_size is not None and shape[-1] % layout.group_size:
        raise ValueError(f"{weight.name}_shape is {shape}; {spec} needs whole groups")
    per_group = scale_shape(shape, layout)
    scale = weight.need("scale", *SCALE_DTYPES)
    weight.expect_shape("scale", scale, per_group)
    codes = from_offset_binary(from_words(words.array(), bits, shape[-1]), bits, signed=signed)
    parts = {"qvalue": Raw.of(codes), "scale": Raw.of(widen(scale).reshape(_own_shape(per_group, layout)))}
    if packed:
        parts["qvalue"] = Raw.of(pack(codes, bits))
    if has_zero_point(spec) or weight.get("zero_point") is not None:
        zero = _zero_point(weight, bits, layout, per_group)
        zero = from_offset_binary(zero, bits, signed=signed).astype(np.int32)
        parts["zero_point"] = Raw.of(zero.reshape(_own_shape(per_group, layout)))
    return shape, parts


def _zero_point(weight: Weight, bits: int, layout: Layout, per_group: Shape) -> Array:
    """A weight's zero points in offset binary."""
    if layout.strategy == "tensor":
        raw = weight.need("zero_point", "int8")
        weight.expect_shape("zero_point", raw, per_group)
        return offset_binary(raw.array(), bits, signed=True)
    raw = weight.need("zero_point", "int32")
    *outer, rows, groups = per_group
    weight.expect_shape("zero_point", raw, (*outer, words_of(rows, bits), groups))
    return from_words(raw.array().swapaxes(-1, -2), bits, rows).swapaxes(-1, -2)


def _own_shape(per_group: Shape, layout: Layout) -> Shape:
    return () if layout.strategy == "tensor" else per_group


def _fp4(weight: Weight, spec: QuantSpec, layout: Layout, packed: bool) -> tuple[Shape, dict[str, Raw]]:
    codes = weight.need("packed", "uint8")
    rows, length = codes.shape[0], 2 * codes.shape[1]
    if length % (layout.group_size or 1):
        raise ValueError(f"{weight.name}_packed has shape {codes.shape}; {spec} needs whole groups")
    kinds = ("uint8", "float8_e8m0fnu") if layout.format == MXFP4 else ("float8_e4m3fn",)
    scale = weight.need("scale", *kinds)
    weight.expect_shape("scale", scale, scale_shape((rows, length), layout))
    parts = {"qvalue": codes if packed else Raw.of(unpack(codes.array(), 4, length)), "scale": scale}
    if layout.format == MXFP4:
        parts["scale"] = scale._replace(dtype="float8_e8m0fnu")
    else:
        given = weight.need("global_scale", "float32")
        if prod(given.shape) != 1:
            raise ValueError(f"{weight.name}_global_scale has shape {given.shape}; allowed: one element")
        g = reciprocal(f"{weight.name}_global_scale", given.array())
        parts["global_scale"] = Raw.of(g.reshape(()))
    return (rows, length), parts
