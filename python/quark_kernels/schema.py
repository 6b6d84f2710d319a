"""What the frontends must know of an operator before it runs: shapes, dtypes and which axes carry scales.

This is the one home of those rules; both frontends read them here, and the core checks them again.

Normal form: a scale has the rank of x, and ``block[d]`` says how many neighbours along axis d share one, 0 = the whole
axis.
Per tensor (0, 0), channel 0 (1, 0), group 128 along the last axis (1, 128), tiles (rows, columns).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import lru_cache
from operator import index
from typing import Any, NamedTuple, TypeVar

from quark_kernels import _core
from quark_kernels.formats import FORMATS
from quark_kernels.spec import PerBlock, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec, as_int

R = TypeVar("R")
Shape = tuple[int, ...]

SCALE_DTYPES = ("float32", "float16", "bfloat16")
FLOAT_DTYPES = ("float32", "float16", "bfloat16", "float64")
INTEGER_DTYPES = ("int8", "uint8", "int16", "uint16", "int32", "int64")
LONGEST = 2**62
"""No axis is longer, so a longer group is none either."""
METHODS = ("absmax", "minmax", "percentile", "percentile=P", "mse")
PERCENTILE = "99.99"
"""What ``method="percentile"`` means."""
GRADIENTS = ("clipped", "ste")
OPTIONAL = {"g": "global_scale", "p": "pair_bits", "k": "key", "z": "zero_point"}
"""The letters of tensors that only some calls have (``cpp/ops.inc``), with their names."""
PAIR_BYTE = 16
"""Elements along an axis that share a byte of pair bits."""
SCALE_STORAGE = {"e8m0": "float8_e8m0fnu", "e4m3": "float8_e4m3fn", "exponent": "int8", "microexponents": "int8"}
"""The dtype of stored scales, where it isn't float32."""


class Op(NamedTuple):
    """One row of the core's operator table: a letter for each tensor (``cpp/ops.inc`` explains them)."""

    name: str
    ins: str
    outs: str

    @property
    def takes_zero_point(self) -> bool:
        """Whether the last input is an optional zero point."""
        return self.ins.endswith("z")

    @property
    def gives_zero_point(self) -> bool:
        """Whether the last output is a zero point, for asymmetric specs."""
        return self.outs.endswith("z")

    @property
    def is_dynamic(self) -> bool:
        """Whether scales are chosen from the data."""
        return "s" in self.outs and self.combine is None

    @property
    def has_one_scale(self) -> bool:
        """Whether the only granularity is one scale for all."""
        return self.name.startswith("tqt")

    @property
    def combine(self) -> str | None:
        """How scale-shaped results of shards of a group give those of the group: "max", "sum"; None: they don't."""
        if self.outs == "e":
            return "max"
        return "sum" if "s" in self.outs and self.name.endswith("_backward") else None


class QParams(NamedTuple):
    """What turns numbers into codes: arrays of a framework in the core's normal form, None where there is none."""

    scale: Any = None
    global_scale: Any = None
    pair_bits: Any = None
    key: Any = None
    zero_point: Any = None


OPS: dict[str, Op] = {row[0]: Op(*row) for row in _core.ops()}


@dataclass(frozen=True, eq=False)
class OpSpec:
    """A QuantSpec for one call: its granularity as a ``block``, and what else an operator is told.

    ``str()`` is the text that crosses into the core, and through torch's and XLA's graphs; the core caches its meaning.
    """

    words: tuple[str, ...]
    """The format's name, then the words of ``QuantSpec.core_words``."""
    block: Shape | None = None
    packed: bool = False
    length: int | None = None
    """Logical length of the last axis where codes are packed."""
    dtype: str | None = None
    """Name of the dtype of data outputs and unpacked codes; None: that of the data input, and the format's."""
    scales: str | None = None
    """Name of the dtype of scale outputs; None: float32."""
    batch: int = 0
    """So many leading axes are batches: each example is a call of its own, which the rest describes."""
    whole: Shape | None = None
    """The shape of the array that the data is a shard of, where a random key says which."""
    text: str = field(init=False, repr=False)
    """The core's text form, made once. It says all, so that specs are compared by it."""

    def __post_init__(self) -> None:
        """Make the text."""
        words = list(self.words)
        if self.block is not None:
            # index: of a size that a graph being compiled leaves open this is a number.
            words.append("block=" + ",".join(str(index(b)) for b in self.block))
        if self.packed:
            words.append("packed")
        if self.length is not None:
            words.append(f"length={index(self.length)}")
        if self.dtype is not None:
            words.append(f"dtype={self.dtype}")
        if self.scales is not None:
            words.append(f"scales={self.scales}")
        if self.batch:
            words.append(f"batch={self.batch}")
        if self.whole is not None:
            words.append("whole=" + ",".join(map(str, self.whole)))
        object.__setattr__(self, "text", " ".join(words))

    def __str__(self) -> str:
        """Return the core's text form."""
        return self.text

    def __eq__(self, other: object) -> bool:
        """Return whether another spec says the same."""
        return isinstance(other, OpSpec) and self.text == other.text

    def __hash__(self) -> int:
        """Return the hash of the text, which Python keeps."""
        return hash(self.text)

    @classmethod
    @lru_cache(4096)
    def parse(cls, text: str) -> OpSpec:
        """Read what ``str()`` wrote."""
        words, block, packed, length, dtype, scales = [], None, False, None, None, None
        batch, whole = 0, None
        for word in text.split():
            key, _, value = word.partition("=")
            match key:
                case "block":
                    block = tuple(map(int, value.split(","))) if value else ()
                case "packed":
                    packed = True
                case "length":
                    length = int(value)
                case "dtype":
                    dtype = value
                case "scales":
                    scales = value
                case "batch":
                    batch = int(value)
                case "whole":
                    whole = tuple(map(int, value.split(",")))
                case _:
                    words.append(word)
        return cls(tuple(words), block, packed, length, dtype, scales, batch, whole)

    @property
    def bits(self) -> int:
        """The width of a code."""
        name = self.words[0]
        return FORMATS[name].bits if name in FORMATS else int(self.words[1].removeprefix("bits="))

    @property
    def code_dtype(self) -> str:
        """The dtype that holds codes, as the frameworks name it."""
        if self.packed:
            return "uint8"
        return FORMATS[self.words[0]].storage

    def scale_shape(self, shape: Shape) -> Shape:
        """Return the normal form of the scales of data of this shape."""
        assert self.block is not None
        return scale_shape(shape, self.block)

    @property
    def is_asymmetric(self) -> bool:
        """Whether dynamic scales come with zero points."""
        return "asymmetric" in self.words

    def takes(self, letter: str) -> bool:
        """Whether calls have a tensor of this letter, where the operator's row does. A zero point input is optional."""
        needed = {"g": "scale=e4m3", "p": "scale=microexponents", "k": "rounding=stochastic"}
        return letter not in needed or needed[letter] in self.words

    @property
    def has_float32_scales(self) -> bool:
        """Whether scales are numbers that have a gradient."""
        return not any(word.startswith("scale=") for word in self.words)

    @property
    def has_global_scale(self) -> bool:
        """Whether block scales are relative to a scale of the whole tensor."""
        return self.takes("g")

    @property
    def has_pairs(self) -> bool:
        """Whether pairs of neighbours have bits, so that one axis alone can have groups."""
        return self.takes("p")

    def global_spec(self) -> OpSpec:
        """Return the spec that chooses the scale of the whole tensor."""
        assert self.block is not None
        words = tuple("scale=global" if word == "scale=e4m3" else word for word in self.words)
        return OpSpec(words, (0,) * len(self.block), batch=self.batch)

    def choosing(self, method: str = "absmax") -> OpSpec:
        """Return the spec that chooses scales by ``method``. Random numbers have no part in that."""
        words = [word for word in self.words if word != "rounding=stochastic"]
        if method.startswith("percentile"):
            percent = method.partition("=")[2] or PERCENTILE
            # Through no float: the host's float environment would have a say in its last bit.
            words.append(f"method=percentile:{Decimal(percent)}")
        elif method == "mse":
            words.append("method=mse")
        return replace(self, words=tuple(words), packed=False, length=None, dtype=None, whole=None)

    def pair_shape(self, shape: Shape) -> Shape:
        """Return the shape of the pair bits of data of this shape: its own, with a byte for 16 elements of one axis."""
        assert self.block is not None
        (axis,) = (d for d, size in enumerate(self.block) if size != 1)
        return (*shape[:axis], -(-shape[axis] // PAIR_BYTE), *shape[axis + 1 :])


def op_spec(spec: QuantSpec, shape: Shape, packed: bool = False, dtype: str | None = None) -> OpSpec:
    """Return the OpSpec of ``spec`` for data of this shape."""
    interleaved = is_interleaved(spec, packed)
    packed = packed and not interleaved
    return OpSpec(
        (spec.format, *spec.core_words()),
        block_of(spec, shape),
        packed,
        (shape[-1] if shape else 1) if packed else None,
        dtype,
        # A packed block starts with its exponent as an E8M0 code.
        SCALE_STORAGE["e8m0"] if interleaved else SCALE_STORAGE.get(spec.scale_format),
    )


def plan(
    spec: QuantSpec,
    shape: Shape,
    axis: int | None = None,
    group_size: int | None = None,
    packed: bool | None = False,
    dtype: str | None = None,
) -> tuple[QuantSpec, OpSpec]:
    """Return what a call with these static arguments does: the spec with its granularity, and the core's spec."""
    if not isinstance(spec, QuantSpec):
        raise TypeError(f"spec is {spec!r}; allowed: a QuantSpec")
    if axis is not None:
        axis = as_int("axis", axis)
    if group_size is not None:
        group_size = as_int("group_size", group_size, 1)
    if packed is not None and not isinstance(packed, bool):
        raise TypeError(f"packed is {packed!r}; allowed: True, False or None")
    whole = spec.along(axis, group_size)
    packed = use_packed(whole, packed)
    if is_interleaved(whole, packed):
        _expect_interleaved(whole, shape)
    return whole, op_spec(whole, shape, packed, dtype)


class Part(NamedTuple):
    """An array, as far as a plan and its checks need it."""

    shape: Shape
    dtype: str


class CallPlan(NamedTuple):
    """What a call does, as far as the arguments that aren't arrays and the types of the arrays say."""

    spec: QuantSpec
    op_spec: OpSpec
    packed: bool
    scale_shape: Shape
    """Of a given scale or zero point: its normal form."""


def call_plan(
    spec: QuantSpec,
    scale: Part | bool,
    zero_point: Part | bool,
    has_seed: bool,
    shape: Shape,
    axis: int | None,
    group_size: int | None,
    packed: bool | None,
) -> CallPlan:
    """Plan a call. Raises where what it is given doesn't go together.

    A scale or zero point is an array, a number (True; whether it is one the frontend sees), or not there (False).
    """
    whole, op_spec = plan(spec, shape, axis, group_size, packed)
    check_seed(whole, given=has_seed)
    check_scale_arguments(whole, scale=scale is not False, zero_point=zero_point is not False)
    normal = () if op_spec.has_global_scale else op_spec.scale_shape(shape)
    if isinstance(scale, Part):
        expect_scale_of(whole, scale.dtype)
    if isinstance(zero_point, Part):
        expect_integer("zero_point", zero_point.dtype)
    is_number = scale is True and whole.scale_format not in ("float32", "e4m3")  # refused by the frontend
    for name, part in (("scale", scale), ("zero_point", zero_point)):
        if part is not False and not is_number:
            expect_scale_shape(name, () if part is True else part.shape, whole, normal, shape)
    return CallPlan(whole, op_spec, use_packed(whole, packed), normal)


@lru_cache(4096, typed=True)
def remembered(plan: Callable[..., Any], *arguments: Any) -> Any:
    """Return ``plan(*arguments)``, kept for equal arguments of the same types: True isn't 1."""
    return plan(*arguments)


def planned(plan: Callable[..., R], *arguments: Any) -> R:
    """Return ``plan(*arguments)``, made once: a plan follows from what is the same call after call.

    What raises, or has arguments that can't be looked up, is planned each time.
    """
    try:
        result: R = remembered(plan, *arguments)
        return result
    except TypeError:
        pass
    return plan(*arguments)


def codes_spec(bits: int, *, signed: bool = False, length: int | None = None) -> OpSpec:
    """Return the OpSpec of pack and unpack: bare codes of a width."""
    if not isinstance(signed, bool):
        raise TypeError(f"signed is {signed!r}; allowed: True or False")
    bits = as_int("bits", bits)
    if not 1 <= bits <= 8:
        raise ValueError(f"bits is {bits!r}; allowed: 1 to 8")
    words = ("codes", f"bits={bits}", *(["signed"] if signed else []))
    return OpSpec(words, None, packed=True, length=length, dtype="int8" if signed else "uint8")


# ---- shapes ----------------------------------------------------------------------------------------------------------


def normal_axis(axis: int, rank: int, name: str = "x") -> int:
    """Return ``axis`` of the argument ``name`` counted from the front. Raises where there is no such axis."""
    axis = as_int("axis", axis)
    if not -rank <= axis < rank:
        allowed = f"{-rank} to {rank - 1}" if rank else "none"
        raise ValueError(f"axis is {axis}; {name} has {rank} axes, allowed: {allowed}")
    return axis % rank


def block_of(spec: QuantSpec, shape: Shape) -> Shape:
    """Return the normal form of a granularity for data of this shape."""
    rank = len(shape)
    expect_rank("x", rank)
    block = [0] * rank
    match spec.granularity:
        case PerTensor():
            pass
        case PerChannel(axis):
            block[normal_axis(axis, rank)] = 1
        case PerGroup(size, axis):
            block = [1] * rank
            block[normal_axis(axis, rank)] = size
        case PerBlock(tile):
            if rank < 2:
                raise ValueError(f"x has shape {shape}; PerBlock tiles the last two axes, so it needs at least two")
            block = [1] * (rank - 2) + list(tile)
        case PerToken():
            if rank == 0:
                raise ValueError("x has no axes; PerToken needs a last axis")
            block = [1] * (rank - 1) + [0]
    return tuple(min(b, LONGEST) for b in block)


def scale_shape(shape: Shape, block: Shape) -> Shape:
    """Return the shape of the scales, in normal form: x's rank, 1 where shared, ceil where ragged."""
    return tuple(-(-n // b) if b else 1 for n, b in zip(shape, block, strict=True))


def packed_shape(shape: Shape, bits: int) -> Shape:
    """Return the shape of codes packed along the last axis; a 0-d tensor packs into one byte."""
    *outer, last = shape or (1,)
    return (*outer, -(-last * bits // 8))


def stored_shape(spec: OpSpec, shape: Shape) -> Shape:
    """Return the shape of the codes of data of this shape."""
    return packed_shape(shape, spec.bits) if spec.packed else shape


def outputs(op: Op, spec: OpSpec, shape: Shape, dtype: str) -> list[tuple[Shape, str]]:
    """Return the shape and dtype name of every output, for data (or codes) of this logical shape and dtype."""
    batch, example = shape[: spec.batch], shape[spec.batch :]
    return [(batch + size, name) for size, name in (_output(kind, spec, example, dtype) for kind in made(op, spec))]


def made(op: Op, spec: OpSpec) -> str:
    """Return the letters of the outputs that a call has."""
    kinds = op.outs[:-1] if op.gives_zero_point and not spec.is_asymmetric else op.outs
    return "".join(kind for kind in kinds if spec.takes(kind))


def given(op: Op, spec: OpSpec, count: int) -> str:
    """Return the letters of the inputs of a call that has so many."""
    return "".join(kind for kind in op.ins if spec.takes(kind))[:count]


def qparams(name: str, spec: OpSpec, outs: Any) -> QParams:
    """Return the last outputs of an operator, which are scales and what goes with them."""
    letters = [letter for letter in OPS[name].outs.lstrip("xq") if spec.takes(letter)]
    given = dict(zip(letters, outs, strict=False))
    return QParams(given["s"], given.get("g"), given.get("p"), None, given.get("z"))


def _output(kind: str, spec: OpSpec, shape: Shape, dtype: str) -> tuple[Shape, str]:
    match kind:
        case "x" | "c":
            return shape, spec.dtype or dtype
        case "q":
            return stored_shape(spec, shape), spec.code_dtype if spec.packed else spec.dtype or spec.code_dtype
        case "s":
            return spec.scale_shape(shape), spec.scales or "float32"
        case "g":
            return (), "float32"
        case "e":
            return (*spec.scale_shape(shape), 2), "int32"
        case "p":
            return spec.pair_shape(shape), "uint8"
        case _:
            return spec.scale_shape(shape), "int32"


def logical_shape(op: Op, spec: OpSpec, shapes: list[Shape]) -> Shape:
    """Return the shape of the data, given those of the inputs."""
    if not spec.batch:
        return _logical_shape(op, spec, shapes)
    # An input that the examples share has length 1 there.
    lengths = zip(*(shape[: spec.batch] for shape in shapes), strict=True)
    batch = tuple(next((n for n in of_axis if n != 1), 1) for of_axis in lengths)
    return batch + _logical_shape(op, spec, [shape[spec.batch :] for shape in shapes])


def _logical_shape(op: Op, spec: OpSpec, shapes: list[Shape]) -> Shape:
    for kind, shape in zip(op.ins, shapes, strict=False):
        if kind in "xc":
            return shape
    codes = shapes[op.ins.index("q")]
    if not spec.packed:
        return codes
    if spec.block == ():
        return ()
    assert spec.length is not None
    return (*codes[:-1], spec.length)


# ---- arguments -------------------------------------------------------------------------------------------------------


def expect_float(name: str, dtype: str) -> None:
    """Raise TypeError unless the dtype is one of the data dtypes."""
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} has dtype {dtype}; allowed: {', '.join(FLOAT_DTYPES)}")


def expect_rank(name: str, rank: int) -> None:
    """Raise ValueError where a tensor has more axes than the core takes."""
    if rank > _core.MAX_RANK:
        raise ValueError(f"{name} has {rank} dimensions; at most {_core.MAX_RANK} are supported")


def expect_number(dtype: str, name: str) -> None:
    """Raise TypeError unless one element of this dtype is a real number."""
    if dtype not in (*FLOAT_DTYPES, *INTEGER_DTYPES):
        raise TypeError(f"{name} has dtype {dtype}; allowed: {', '.join((*FLOAT_DTYPES, *INTEGER_DTYPES))}")


def expect_scale(dtype: str, name: str = "scale") -> None:
    """Raise TypeError unless a scale of this dtype becomes float32 exactly."""
    if dtype not in SCALE_DTYPES:
        raise TypeError(f"{name} has dtype {dtype}; allowed: {', '.join(SCALE_DTYPES)}")


def as_float(name: str, value: Any) -> float:
    """Return a number as a float. Raises where it is a bool, or too large for one."""
    if isinstance(value, bool):
        raise TypeError(f"{name} is {value}; allowed: a number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is {value}; allowed: numbers that a float can hold") from None


def float32_bits(value: float) -> int:
    """Return a number's float32 bits as an int32: to nearest even, whatever the host's float environment does."""
    if 0 < abs(value) < 2**-126:  # in multiples of the least
        return round(abs(value) * 2.0**149) - (2**31 if value < 0 else 0)
    sign = 2**31 if math.copysign(1.0, value) < 0 else 0
    if value == 0 or not math.isfinite(value):
        return (0x7FC00000 if math.isnan(value) else 0x7F800000 if value else 0) - sign
    mantissa, exponent = math.frexp(abs(value))
    digits = int(mantissa * 2.0**53)
    kept, rest = digits >> 29, digits & (2**29 - 1)
    kept += rest > 2**28 or (rest == 2**28 and kept % 2 == 1)
    return min(((exponent + 125) << 23) + kept, 0x7F800000) - sign


def int32_zero_point(value: int) -> int:
    """Return a Python zero point. Raises ValueError where it isn't an int32."""
    if not -(2**31) <= value < 2**31:
        raise ValueError(f"zero_point is {value}; allowed: {-(2**31)} to {2**31 - 1}")
    return value


def expect_integer(name: str, dtype: str) -> None:
    """Raise TypeError unless the dtype is an integer one that zero points may have."""
    if dtype not in INTEGER_DTYPES:
        raise TypeError(f"{name} has dtype {dtype}; allowed: {', '.join(INTEGER_DTYPES)}")


def expect_zero_point(dtype: str) -> None:
    """Raise TypeError unless the documented functions take zero points of this dtype."""
    if dtype not in (*INTEGER_DTYPES, *SCALE_DTYPES):
        raise TypeError(f"zero_point has dtype {dtype}; allowed: {', '.join((*INTEGER_DTYPES, *SCALE_DTYPES))}")


def expect_scale_of(spec: QuantSpec, dtype: str, name: str = "scale") -> None:
    """Raise TypeError unless a given scale has the dtype that the spec's scale format takes."""
    if spec.scale_format in ("float32", "e4m3"):
        expect_scale(dtype, name)
    elif dtype != SCALE_STORAGE[spec.scale_format]:
        allowed = SCALE_STORAGE[spec.scale_format]
        raise TypeError(f"{name} has dtype {dtype}; scales of {spec} are {allowed}, as choose_qparams gives them")


def expect_method(spec: QuantSpec, method: object) -> str:
    """Return the method of choose_qparams. Raises ValueError unless it is one that the spec's scales can have."""
    name, equals, percent = method.partition("=") if isinstance(method, str) else ("", "", "")
    good = name in ("absmax", "minmax", "mse") and not equals
    if name == "percentile":
        try:
            good = not equals or 0 < float(percent) <= 100
        except ValueError:
            good = False
    if not good:
        raise ValueError(f"method is {method!r}; allowed: {', '.join(METHODS)} with 0 < P <= 100")
    assert isinstance(method, str)
    if name in ("mse", "percentile") and spec.scale_format not in ("float32", "e8m0"):
        raise ValueError(f"method is {method!r}; scales of format {spec.scale_format} are chosen by absmax only")
    return method


def check_seed(spec: QuantSpec, *, given: bool) -> None:
    """Raise ValueError where a seed (True: given) doesn't go with the spec's rounding."""
    if given and spec.rounding != "stochastic":
        raise ValueError(f"seed is given; rounding is {spec.rounding!r}, and only 'stochastic' takes a seed")
    if not given and spec.rounding == "stochastic":
        raise ValueError("seed is None; rounding='stochastic' needs one, an integer")


def seed_words(seed: int) -> tuple[int, int]:
    """Return a seed as 64-bit two's complement: the low and the high word, each as an int32."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed}; allowed: integers of 64 bits, from -2^63 to 2^64 - 1")
    low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    return low - (low >> 31 << 32), high - (high >> 31 << 32)


def expect_scale_shape(name: str, given: Shape, spec: QuantSpec, normal: Shape, shape: Shape) -> None:
    """Raise ValueError unless a scale or zero point of this shape can be brought into its normal form.

    Allowed are the normal form itself, any shape of one element where there is one scale, and 1-D per channel.
    """
    if given == normal or (set(normal) <= {1} and set(given) <= {1}):
        return
    channel = spec.granularity.axis if isinstance(spec.granularity, PerChannel) else None
    if channel is not None and given == (shape[channel],):
        return
    also = (
        f", or ({shape[channel]},)"
        if channel is not None
        else ", or any shape of one element"
        if set(normal) <= {1}
        else ""
    )
    raise ValueError(f"{name} has shape {given}; {spec} on x of shape {shape} allows {normal}{also}")


def check_scale_arguments(spec: QuantSpec, *, scale: bool, zero_point: bool) -> None:
    """Raise ValueError where the given scale and zero point (True: given) don't go with the spec or each other."""
    if spec.element.is_cast and scale:
        raise ValueError(f"scale is given; {spec.format} is a cast and has no scales")
    if spec.scale_format == "microexponents" and scale:
        raise ValueError("scale is given; microexponents come with a bit for each pair, so they are dynamic only")
    if zero_point and not spec.element.is_integer:
        raise ValueError(f"zero_point is given; {spec.format} has none, only integer formats do")
    if zero_point and spec.scale_format != "float32":
        raise ValueError(f"zero_point is given; scales of format {spec.scale_format} have none")
    if zero_point and not scale:
        raise ValueError("zero_point is given without scale; give both, or neither for a dynamic scale")


def made_parts(spec: QuantSpec, op_spec: OpSpec, shape: Shape, packed: bool) -> dict[str, Part | None]:
    """Return the arrays of the QTensor that a dynamic ``quantize`` makes, by name; None where it has none."""
    scales = () if spec.granularity == PerTensor() else op_spec.scale_shape(shape)
    parts: dict[str, Part | None] = {
        "qvalue": Part(stored_shape(op_spec, shape), op_spec.code_dtype),
        "scale": Part(scales, SCALE_STORAGE.get(spec.scale_format, "float32")),
        "zero_point": Part(scales, "int32") if op_spec.is_asymmetric else None,
        "global_scale": Part((), "float32") if op_spec.has_global_scale else None,
        "pair_bits": Part(op_spec.pair_shape(shape), "uint8") if op_spec.takes("p") else None,
    }
    if is_interleaved(spec, packed):
        parts |= {"qvalue": Part(interleaved_shape(spec, shape), "uint8"), "scale": None}
    return parts


def check_parts(spec: QuantSpec, op_spec: OpSpec, shape: Shape, packed: bool, parts: dict[str, Part | None]) -> None:
    """Raise where a QTensor's parts, by name, don't fit together."""
    normal = op_spec.scale_shape(shape)
    for name, want in made_parts(spec, op_spec, shape, packed).items():
        if name == "zero_point":  # a given one is there or not
            continue
        got = parts[name]
        if got is None or want is None:
            if (got is None) != (want is None):
                what = "is None" if got is None else "is given"
                form = f"{spec}{' packed' if packed else ''}"
                raise ValueError(f"q.{name} {what}; a QTensor of {form} has {'one' if want else 'none'}")
            continue
        if got.dtype != want.dtype:
            raise TypeError(f"q.{name} has dtype {got.dtype}; {name} of {spec} has dtype {want.dtype}")
        if name == "scale":
            expect_scale_shape("q.scale", got.shape, spec, normal, shape)
        elif got.shape != want.shape:
            raise ValueError(f"q.{name} has shape {got.shape}; a QTensor of shape {shape} has {name} of {want.shape}")
    zero = parts["zero_point"]
    if zero is not None:
        check_scale_arguments(spec, scale=not spec.element.is_cast, zero_point=True)
        expect_integer("q.zero_point", zero.dtype)
        expect_scale_shape("q.zero_point", zero.shape, spec, normal, shape)


def use_packed(spec: QuantSpec, packed: bool | None) -> bool:
    """Return whether codes are packed: as asked, by default for fp4 only."""
    if packed is None:
        return spec.format == "fp4"
    if packed and not spec.element.can_pack and not is_interleaved(spec, packed):
        raise ValueError(f"packed is True; a code of {spec.format} fills its bytes already, there is nothing to pack")
    return packed


def is_interleaved(spec: QuantSpec, packed: bool) -> bool:
    """Whether packed blocks are bytes of their own: the exponent's E8M0 code, then the codes (BFP16)."""
    return packed and spec.scale_format == "exponent" and spec.element.bits == 8


def _expect_interleaved(spec: QuantSpec, shape: Shape) -> None:
    granularity = spec.granularity
    if not isinstance(granularity, PerGroup) or granularity.axis not in (-1, len(shape) - 1):
        raise ValueError(f"packed is True; {spec} has packed blocks only in groups along the last axis")
    longest = max(shape[-1], 256)  # a short block is filled up, so a long one could need any memory
    if granularity.size > longest:
        raise ValueError(f"packed is True; {spec} has blocks of {granularity.size}, allowed for {shape}: {longest}")


def group_size(spec: QuantSpec) -> int:
    """Return the size of the groups of a spec that has groups."""
    assert isinstance(spec.granularity, PerGroup)
    return spec.granularity.size


def interleaved_shape(spec: QuantSpec, shape: Shape) -> Shape:
    """Return the shape of packed blocks: each has one byte more than it has codes."""
    size = group_size(spec)
    return (*shape[:-1], -(-shape[-1] // size) * (size + 1))


def unpack_spec(bits: int, *, signed: bool, packed_length: int) -> OpSpec:
    """Return the OpSpec of unpack: the most codes that rows of this many bytes hold."""
    one = codes_spec(bits, signed=signed)
    return replace(one, length=packed_length * 8 // one.bits)
