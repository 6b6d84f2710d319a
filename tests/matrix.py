"""THE tables: every case that the core, torch and JAX must get right, bit for bit.

A case is data. `reference.py` says what is expected, `frontends.py` runs it, and the tests go over `CASES` (the
everyday functions with float32 scales), `BLOCKS` (with other scales), `STOCHASTIC`, `CHOICES` (how scales are chosen)
and `DOCUMENTED` (the functions that AMD Quark documents).
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np

import reference
from quark_kernels import PRESETS, ROUNDINGS, PerBlock, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec
from quark_kernels.schema import block_of, scale_shape

NUMPY_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16)}


def numpy_dtype(name: str) -> np.dtype:
    return NUMPY_DTYPES.get(name) or np.dtype(getattr(ml_dtypes, name, name))


@dataclass(frozen=True)
class Case:
    """One call: a spec, a tensor, and who chooses the scale."""

    spec: QuantSpec
    shape: tuple[int, ...] = (6, 70)
    dtype: str = "float32"
    given: bool = False  # the scale; else it is dynamic
    zero_point: int | None = None  # given zero points lie around this one
    packed: bool = False
    layout: str = "rows"  # rows | transposed | sliced | reversed (NumPy and the core only) | broadcast
    data: str = "plain"  # plain, or how groups are filled: near | wide | tiny | huge | zero | nan | inf
    seed: int | None = None
    method: str = "absmax"

    def __str__(self) -> str:
        words = [str(self.spec).replace(" ", ","), "x".join(map(str, self.shape)) or "0-d", self.dtype]
        words += ["given" if self.given else "dynamic"]
        words += [f"z{self.zero_point}"] if self.zero_point is not None else []
        words += ["packed"] if self.packed else []
        words += [word for word in (self.layout, self.data, self.method) if word not in ("rows", "plain", "absmax")]
        words += [f"seed={self.seed}"] if self.seed is not None else []
        return "-".join(words)

    @cached_property
    def block(self) -> tuple[int, ...]:
        return block_of(self.spec, self.shape)

    def random(self, part: str) -> np.random.Generator:
        """Of each part of a case its own, so that it doesn't matter which is made first."""
        return np.random.default_rng(zlib.crc32(f"{self} {part}".encode()))

    @cached_property
    def x(self) -> np.ndarray:
        """The input."""
        return self._laid_out(self._plain() if self.data == "plain" else self._in_groups())

    def _plain(self) -> np.ndarray:
        """Values over many magnitudes, ties, and everything special (where the scale is given)."""
        random = self.random("x")
        n = int(np.prod(self.shape))
        x = random.standard_normal(n) * np.exp2(random.integers(-6, 3, n))
        if n >= 64:
            x[: len(EDGES)] = EDGES if self.given else np.where(np.isfinite(EDGES), EDGES, 0.5)
            if not self.given:
                x[np.abs(x) > 1e4] = 0.25
            random.shuffle(x)
            if not self.given and self.spec.granularity != PerTensor():
                x[n // 2], x[n // 3] = np.inf, np.nan  # each spoils its own group only
        with np.errstate(over="ignore", under="ignore"):
            return x.astype(numpy_dtype(self.dtype)).reshape(self.shape)

    def _in_groups(self) -> np.ndarray:
        """Neighbours along the groups' axis are alike."""
        random = self.random("x")
        axis = next((d for d, b in enumerate(self.block) if b > 1), -1)
        moved = np.moveaxis(np.empty(self.shape), axis, -1).shape if self.shape else ()
        x = filled(self.data, random, math.prod(self.shape), numpy_dtype(self.dtype)).reshape(moved)
        return np.ascontiguousarray(np.moveaxis(x, -1, axis)) if self.shape else x

    def _laid_out(self, x: np.ndarray) -> np.ndarray:
        match self.layout:
            case "transposed":
                return np.ascontiguousarray(x.T).T
            case "sliced":
                wide = np.zeros((*x.shape[:-1], x.shape[-1] * 2 + 1), x.dtype)
                wide[..., 1::2] = x
                return wide[..., 1::2]
            case "reversed":
                return np.ascontiguousarray(x[..., ::-1])[..., ::-1]
            case "broadcast":
                return np.broadcast_to(x[:1], x.shape)
        return x

    @cached_property
    def x32(self) -> np.ndarray:
        """The input as the core computes with it."""
        with np.errstate(over="ignore"):
            return np.asarray(self.x).astype(np.float32)

    @cached_property
    def scale(self) -> np.ndarray:
        """The scales, in normal form and as they are stored: given ones, or those that the oracle chooses."""
        random = self.random("scale")
        if self.spec.scale_format != "float32":
            return self._block_scales["scale"]
        if not self.given:
            return self._chosen[0]
        shape = scale_shape(self.shape, self.block)
        top = reference.FORMATS[self.spec.format].hi if self.spec.quant_max is None else self.spec.quant_max
        scale = np.asarray(random.uniform(0.5, 4.0, shape) / top, np.float32)
        if scale.size > 3:  # powers of two: exact ties; a subnormal; NaN
            scale.flat[1], scale.flat[2] = 2.0**-4, 1e-40
        if scale.size > 5:
            scale.flat[5] = np.nan
        return np.ones(shape, np.float32) if self.spec.element.is_cast else scale

    @cached_property
    def zero(self) -> np.ndarray | None:
        """The zero points, likewise."""
        random = self.random("zero")
        if self.spec.scale_format != "float32":
            return None
        if not self.given:
            return self._chosen[1]
        if self.zero_point is None:
            return None
        return np.asarray(self.zero_point + random.integers(-2, 3, self.scale.shape), np.int32)

    @cached_property
    def _chosen(self) -> tuple[np.ndarray, np.ndarray | None]:
        spec, rule = self.spec, None
        if spec.scale_format == "e8m0":
            rule = spec.scale_rule or "floor"
        return reference.choose_qparams(
            *(self.x32, spec.format, self.block, spec.symmetric, spec.quant_min, spec.quant_max),
            *(self.method, rule, spec.rounding),
        )

    @cached_property
    def _block_scales(self) -> dict[str, np.ndarray]:
        """What a block format stores beside its codes."""
        random = self.random("block_scales")
        spec, amax = self.spec, reference.group_amax(self.x32, self.block)
        match spec.scale_format:
            case "e8m0":
                codes = reference.e8m0(
                    reference.power_of_two(amax, spec.format, spec.scale_rule or "floor", spec.quant_max)
                    if self.method == "absmax"
                    else self._chosen[0]
                )
                if self.given:
                    codes = self._some(range(119, 130), (0, 254, 255)).astype(np.uint8)
                return {"scale": codes.view(ml_dtypes.float8_e8m0fnu)}
            case "e4m3":
                g = np.float32(random.uniform(0.001, 0.01)) if self.given else None
                codes, g = reference.two_level(amax, spec.format, spec.quant_max, g)
                return {"scale": codes.view(ml_dtypes.float8_e4m3fn), "global_scale": g}
            case "exponent":
                exponents = reference.shared_exponents(amax)
                if self.given:
                    exponents = self._some(range(-6, 4), (-127, 127, -128)).astype(np.int8)
                return {"scale": exponents}
        exponents, pair_bits = reference.micro_exponents(self.x32, self.block, -14 if self.dtype == "float16" else -126)
        return {"scale": exponents, "pair_bits": pair_bits}

    def _some(self, usual: range, special: tuple[int, ...]) -> np.ndarray:
        """Scales, most of them usual."""
        random = self.random("some")
        shape = scale_shape(self.shape, self.block)
        return np.where(random.random(shape) < 0.8, random.choice(usual, shape), random.choice(special, shape))

    @property
    def scale_argument(self) -> np.ndarray:
        """What is given as `scale=`."""
        return self._block_scales["global_scale"] if self.spec.scale_format == "e4m3" else self.scale

    @cached_property
    def stored(self) -> dict[str, np.ndarray]:
        """The expected arrays of a QTensor, bit for bit and scales in normal form."""
        others = {"scale": self.scale} if self.spec.scale_format == "float32" else self._block_scales
        if self.zero is not None:
            others = {**others, "zero_point": self.zero}
        if not self.packed:
            return {"qvalue": self.codes, **others}
        if self.spec.scale_format == "exponent" and self.spec.element.bits == 8:
            return {"qvalue": reference.pack_blocks(self.codes, self.scale, self.block[-1])}
        return {"qvalue": reference.pack(self.codes.reshape(self.shape or 1), self.spec.element.bits), **others}

    @property
    def element_scales(self) -> np.ndarray:
        """The float32 scale of every element."""
        if self.spec.scale_format == "float32":
            return reference.expand(self.scale, self.shape, self.block)
        parts = {name: a for name, a in self._block_scales.items() if name != "scale"}
        codes = self.scale if self.scale.dtype == np.int8 else self.scale.view(np.uint8)
        return reference.element_scales(
            codes, self.spec.scale_format, self.shape, self.block, self.spec.element.bits, **parts
        )

    def _expanded(self) -> dict[str, object]:
        zero = None if self.zero is None else reference.expand(self.zero, self.shape, self.block)
        return {
            "fmt": self.spec.format,
            "scale": self.element_scales,
            "zero_point": zero,
            "rounding": self.spec.rounding,
            "quant_min": self.spec.quant_min,
            "quant_max": self.spec.quant_max,
            "words": None if self.seed is None else reference.random_words(self.seed, self.shape),
        }

    @cached_property
    def codes(self) -> np.ndarray:
        """Expected codes, one apiece, as int64."""
        return reference.quantize(self.x32, **self._expanded())

    def dequantized(self, dtype: str) -> np.ndarray:
        """Expected bits of dequantize."""
        e = self._expanded()
        return reference.to_bits(reference.dequantize(self.codes, e["fmt"], e["scale"], e["zero_point"], dtype), dtype)

    @cached_property
    def fake_quantized(self) -> np.ndarray:
        """Expected bits of fake_quantize."""
        return reference.to_bits(reference.fake_quantize(self.x32, **self._expanded(), dtype=self.dtype), self.dtype)

    @cached_property
    def passes(self) -> np.ndarray:
        """Where the clipped gradient passes."""
        return reference.clipped(self.x32, **self._expanded())

    @cached_property
    def gradient(self) -> np.ndarray:
        """A gradient of the output."""
        random = self.random("gradient")
        return random.standard_normal(self.shape).astype(numpy_dtype(self.dtype))


TIES = np.concatenate([np.arange(-40, 41) / 8.0, np.arange(-40, 41) / 32.0, [0.49999997, 2.4999998, 0.050000004]])
EDGES = np.concatenate(
    [
        TIES[:: len(TIES) // 36],
        [
            0.0,
            -0.0,
            np.inf,
            -np.inf,
            np.nan,
            -np.nan,
            3e38,
            -3e38,
            1e-40,
            -1e-40,
            2.0**-149,
            2.0**-126,
            65504,
            65519.99,
        ],
    ]
)


def wide(random: np.random.Generator, n: int, dtype: np.dtype) -> np.ndarray:
    """Neighbours of like magnitude, from the least subnormal to the largest number; blocks of zeros; specials."""
    info = ml_dtypes.finfo(dtype)
    least, most = math.frexp(float(info.smallest_subnormal))[1], math.frexp(float(info.max))[1]
    if dtype == np.float64:
        least, most = -149, 128
    runs = np.repeat(random.integers(least - 1, most + 1, n // 16 + 1), 16)[:n]
    with np.errstate(over="ignore"):
        x = random.uniform(-1, 1, n) * np.exp2(np.clip(runs - random.integers(0, 7, n), -1000, 1000))
    x[random.random(n) < 0.15] *= 0
    near = random.random(n) < 0.1  # next to powers of two, and ties
    x[near] = np.copysign(np.exp2(np.ceil(np.log2(np.abs(x[near]) + 1e-45))), x[near]) * random.choice(
        [1, 1 - 2.0**-24, 1 - 2.0**-9, 1 - 2.0**-12, 1.5, 1.75], near.sum()
    )
    with np.errstate(over="ignore"):
        x = x.astype(dtype)
    if n >= 64:
        x[5:8] = np.nan, 1.0, 1e4
        x[n // 2] = -np.inf
        x[n // 4 : n // 4 + 16] = 0.0
        x[n // 3 : n // 3 + 8] = -0.0
        x[n - 3] = info.max
    return x


def filled(kind: str, random: np.random.Generator, n: int, dtype: np.dtype) -> np.ndarray:
    """Numbers of one kind; all but "wide", "nan" and "inf" are finite."""
    info = ml_dtypes.finfo(dtype)
    top, tiny = (float(x) for x in ((info.max, info.smallest_subnormal) if dtype != np.float64 else (3e38, 2.0**-149)))
    x = random.standard_normal(n) * np.exp2(random.integers(-6, 3, n))
    match kind:
        case "wide":
            return wide(random, n, dtype)
        case "tiny":
            x = np.rint(x * np.exp2(random.integers(-2, 8, n))) * tiny
        case "huge":
            x = random.uniform(-1, 1, n) * top * np.exp2(random.integers(-3, 1, n))
        case "zero":
            x = np.copysign(0.0, x)
        case _:
            at = random.random(n) < 0.3  # ties, zeros
            x[at] = np.rint(x[at] * 8) / 8
            x[n // 2 :][:1] = {"nan": np.nan, "inf": -np.inf}.get(kind, 1.0)
    return x.astype(dtype)


PLAIN = {name: spec for name, spec in PRESETS.items() if spec.scale_format == "float32"}
BLOCKED = {name: spec for name, spec in PRESETS.items() if spec.scale_format != "float32"}
RULES = ("floor", "ceil", "even", "rceil")
FIXED_ROUNDINGS = tuple(name for name in ROUNDINGS if name != "stochastic")
INTEGERS = [name for name, spec in PLAIN.items() if spec.element.is_integer]
SCALED = [name for name, spec in PLAIN.items() if not spec.element.is_cast]
NARROW = [name for name, spec in PLAIN.items() if spec.element.can_pack]
GRANULARITIES = (
    PerTensor(),
    PerChannel(0),
    PerChannel(-1),
    PerGroup(32),
    PerGroup(4, 0),
    PerBlock((4, 16)),
    PerToken(),
)


def _cases() -> Iterator[Case]:
    for name, preset in PLAIN.items():
        for granularity in GRANULARITIES if name in SCALED else (PerTensor(),):
            for given in (False, True) if name in SCALED else (False,):
                yield Case(replace(preset, granularity=granularity), given=given)
    for rounding in FIXED_ROUNDINGS:
        for name in ("int8", "int4", "uint8", "fp8_e4m3", "fp8_e5m2fnuz", "fp6_e2m3", "fp4", "int8f6"):
            symmetric = not name.startswith("uint")
            yield Case(QuantSpec(name, PerGroup(14), rounding=rounding, symmetric=symmetric), given=True)
    for name in INTEGERS:
        for granularity in (PerTensor(), PerChannel(1), PerGroup(32)):
            yield Case(QuantSpec(name, granularity, symmetric=False), zero_point=1, given=True)
            yield Case(QuantSpec(name, granularity, symmetric=False))
    for z in (-(2**23), 2**23, 1000, -7):
        for rounding in ("half_even", "floor", "half_up"):
            yield Case(QuantSpec("int8", PerGroup(7), rounding=rounding), zero_point=z, given=True)
    for low, high in ((-7, 7), (0, 7), (-1, 1), (-8, 3)):
        yield Case(QuantSpec("int4", quant_min=low, quant_max=high))
        yield Case(QuantSpec("int4", PerToken(), quant_min=low, quant_max=high, symmetric=False))
        yield Case(QuantSpec("int8", PerChannel(0), quant_min=low, quant_max=high), zero_point=low, given=True)
    for dtype in ("float16", "bfloat16", "float64"):
        for name in ("int8", "uint8", "int16", "fp8_e4m3", "fp8_e5m2", "fp4", "bf16", "fp16"):
            for given in (False, True) if name in SCALED else (False,):
                granularity = PerGroup(16) if name in SCALED else PerTensor()
                yield Case(replace(PLAIN[name], granularity=granularity), dtype=dtype, given=given)
    for shape in ((), (1,), (0,), (3, 0, 5), (7,), (1025,), (2, 3, 4, 5), (2, 1, 3, 2, 5), (40, 1), (1, 2049)):
        for name in ("int8", "uint8", "fp8_e4m3", "fp4", "bf16"):
            yield Case(PLAIN[name], shape=shape)
        if shape and 0 not in shape:
            yield Case(QuantSpec("int8", PerToken()), shape=shape, given=True)
            yield Case(QuantSpec("fp6_e3m2", PerGroup(3, 0)), shape=shape)
            yield Case(QuantSpec("int4", PerChannel(-1), symmetric=False), shape=shape)
    for layout in ("transposed", "sliced", "reversed", "broadcast"):
        for granularity in GRANULARITIES:
            yield Case(QuantSpec("int8", granularity), layout=layout, given=True)
        yield Case(QuantSpec("fp8_e4m3", PerGroup(32)), layout=layout, dtype="bfloat16")
    for name in NARROW:
        for length in (1, 5, 8, 33, 1027):
            yield Case(replace(PLAIN[name], granularity=PerGroup(16)), shape=(3, length), packed=True)
        yield Case(PLAIN[name], shape=(4100,), packed=True, given=True)
        yield Case(PLAIN[name], shape=(), packed=True)


def _block_cases() -> Iterator[Case]:
    for name, preset in BLOCKED.items():
        group = preset.granularity.size
        two_level = preset.scale_format == "e4m3"  # a NaN spoils the whole tensor
        for dtype in DATA:
            for data in ("near", "tiny", "huge", "zero", "nan", "inf", *([] if two_level else ["wide"])):
                yield Case(preset, dtype=dtype, data=data)
        for shape, axis in (((70, 3), 0), ((2, 35, 3), 1), ((5, 4 * group), -1), ((2, 3, 4, group), 3)):
            spec = replace(preset, granularity=PerGroup(group, axis))
            yield Case(spec, shape, data="near" if two_level else "wide")
        for shape in ((1,), (0,), (3, 0, 5), (7,), (1025,), (1, 2049), (40, 1)):
            yield Case(preset, shape, data="near")
        for rounding in FIXED_ROUNDINGS:
            yield Case(replace(preset, rounding=rounding), data="near")
        for dtype in DATA:
            yield Case(replace(preset, rounding="stochastic"), dtype=dtype, data="near", seed=7)
        for layout in ("transposed", "sliced", "broadcast"):
            yield Case(preset, data="near", layout=layout)
        if preset.scale_format != "microexponents":
            for data in ("near", "inf", "nan"):
                yield Case(preset, data=data, given=True)
            yield Case(preset, shape=(3, 65), dtype="float16", data="near", given=True)
        if preset.element.can_pack or name == "bfp16":
            for length in (1, 8, 33, 1027):
                yield Case(preset, shape=(3, length), data="near", packed=True)
            yield Case(preset, dtype="bfloat16", data="wide", packed=True)
        if preset.scale_format == "e8m0":
            for rule in RULES:
                for data in ("near", "wide", "huge"):
                    yield Case(replace(preset, scale_rule=rule), data=data)
                yield Case(replace(preset, scale_rule=rule), dtype="float16", data="wide")
    for granularity in GRANULARITIES:
        for name, scale_format in (("fp4", "e8m0"), ("int8f6", "e8m0"), ("fp4", "e4m3"), ("int8", "exponent")):
            spec = QuantSpec(name, granularity, scale_format=scale_format)
            yield Case(spec, data="near")
            yield Case(spec, data="near", dtype="bfloat16", given=True)
    for name in ("int2", "int3", "int4", "int8", "int16", "uint4", "fp8_e4m3fnuz", "fp8_e5m2fnuz"):
        for rule in RULES:
            yield Case(QuantSpec(name, PerGroup(32), scale_format="e8m0", scale_rule=rule), data="wide")
        yield Case(QuantSpec(name, PerGroup(16), scale_format="e4m3"), data="near")
    for rule in RULES:
        spec = QuantSpec("int8", PerGroup(32), scale_format="e8m0", scale_rule=rule, quant_min=-127, quant_max=100)
        yield Case(spec, data="wide")
    for name in ("int3", "int4", "int5", "int8", "int16"):
        for size, dtype in ((2, "float16"), (6, "float32"), (16, "float16"), (64, "float32")):
            for scale_format in ("exponent", "microexponents"):
                yield Case(QuantSpec(name, PerGroup(size), scale_format=scale_format), dtype=dtype, data="wide")
    for scale_format in ("e8m0", "e4m3"):
        yield Case(QuantSpec("fp4", scale_format=scale_format), (), data="near")


def _stochastic_cases() -> Iterator[Case]:
    for name in SCALED:
        spec = replace(PLAIN[name], rounding="stochastic")
        for seed, granularity in zip(SEEDS, GRANULARITIES, strict=True):
            yield Case(replace(spec, granularity=granularity), seed=seed, given=seed > 3)
        for dtype in ("float16", "bfloat16", "float64"):
            yield Case(spec, dtype=dtype, seed=5, given=True)
    for name in INTEGERS:
        for z in (-7, 3, 2**23):
            spec = QuantSpec(name, PerGroup(14), rounding="stochastic", symmetric=z < 0)
            yield Case(spec, zero_point=z, given=True, seed=z)
    for layout in ("transposed", "sliced", "reversed", "broadcast"):
        yield Case(QuantSpec("int4", PerGroup(32), rounding="stochastic"), layout=layout, given=True, seed=1)
    for shape in ((), (1,), (0,), (3, 0, 5), (7,), (1025,), (2, 3, 4, 5), (3, 4100)):
        for name in ("int8", "fp8_e4m3", "fp4"):
            yield Case(QuantSpec(name, rounding="stochastic"), shape, seed=2**64 - 3)
    for low, high in ((-7, 7), (0, 7), (-1, 1)):
        yield Case(
            QuantSpec("int4", PerToken(), rounding="stochastic", quant_min=low, quant_max=high), seed=9, given=True
        )


def _choices() -> Iterator[Case]:
    methods = ("percentile", "percentile=100", "percentile=90", "percentile=0.5", "percentile=33.3333", "mse")
    for method in methods:
        for granularity in GRANULARITIES:
            yield Case(QuantSpec("int8", granularity), data="near", method=method)
            yield Case(QuantSpec("uint4", granularity, symmetric=False), data="near", method=method)
            yield Case(QuantSpec("fp4", granularity, scale_format="e8m0"), data="near", method=method)
        for name in ("int2", "uint2", "uint8", "fp8_e4m3", "fp8_e5m2fnuz", "fp6_e3m2"):
            spec = replace(PLAIN[name], granularity=PerToken())
            for data in ("wide", "tiny", "zero"):
                yield Case(spec, (5, 70), data=data, method=method)
        for dtype in ("float16", "bfloat16", "float64"):
            yield Case(QuantSpec("int4", PerGroup(32), symmetric=False), dtype=dtype, data="near", method=method)
            yield Case(QuantSpec("fp8_e4m3", PerToken()), dtype=dtype, data="huge", method=method)
        for rule in RULES:
            for name in ("mxfp4", "mxint8"):
                yield Case(replace(BLOCKED[name], scale_rule=rule), data="wide", method=method)
        for shape in ((), (1,), (0,), (3, 0, 5), (1025,), (2, 2500)):
            yield Case(QuantSpec("int8"), shape, data="near", method=method)
            yield Case(QuantSpec("uint4", symmetric=False), shape, data="near", method=method)
    for rounding in ROUNDINGS:
        yield Case(QuantSpec("int4", PerToken(), rounding=rounding), data="near", method="mse")
    for low, high in ((-7, 7), (0, 7), (-8, 3)):
        for symmetric in (True, False):
            spec = QuantSpec("int4", PerToken(), quant_min=low, quant_max=high, symmetric=symmetric)
            yield Case(spec, data="near", method="mse")


def _table(cases: Iterator[Case]) -> tuple[Case, ...]:
    return tuple({str(case): case for case in cases}.values())


SEEDS = (0, 1, 2, 3, 2**31, 2**63, 2**64 - 1)
DATA = ("float32", "float16", "bfloat16", "float64")
CASES = _table(_cases())
BLOCKS = _table(_block_cases())
STOCHASTIC = _table(_stochastic_cases())
CHOICES = _table(_choices())


# ---- the documented functions ----------------------------------------------------------------------------------------

CLASSES = {
    "quant_fp8_e4m3": "QuantE4M3Function",
    "quant_fp8_e5m2": "QuantE5M2Function",
    "dequant_fp8_e4m3": "DequantE4M3Function",
    "dequant_fp8_e5m2": "DequantE5M2Function",
    "scaled_fake_quantize": "ScaledFakeQuantizeFunction",
    "scaled_real_quantize": "ScaledRealQuantizeFunction",
    "dequantize": "DeQuantizeFunction",
    "non_scaled_fake_quantize": "NonScaledFakeQuantizeFunction",
    "non_scaled_real_quantize": "NonScaledRealQuantizeFunction",
    "tqt_quantize": "TQTQuantize",
    "lsq_quantize": "LSQQuantize",
}
INTEGER_RANGES = {f"int{b}": (-(2 ** (b - 1)), 2 ** (b - 1) - 1) for b in (2, 3, 4, 8, 16)} | {
    f"uint{b}": (0, 2**b - 1) for b in (2, 4, 8, 16)
}
CODE_DTYPES = {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"} | dict.fromkeys(
    ("fp6_e3m2", "fp6_e2m3", "fp4"), "uint8"
)
SPECIAL_SCALES = (
    *(0.0, -0.0, -0.037, -2.0, 1e-40, 2.0**-149, 2.0**-128, 2.0**-127, 2.0**-126, 1.5e-38),
    *(np.inf, -np.inf, np.nan, 2.0**127, 3e38),
)


@dataclass(frozen=True)
class DocumentedCase:
    """One call of a documented function: `args` in the order of the call, the expected `out` and `grads`."""

    function: str
    quant_dtype: str = "int8"
    shape: tuple[int, ...] = (6, 70)
    dtype: str = "float32"  # of the data, or codes
    qscheme: str | None = "per_tensor"
    axis: int | None = None
    size: int | None = None  # of groups or blocks; TQT's domain
    round_mode: int | None = 8
    clamp: tuple[float, float] | None = None  # None: the quant_dtype's
    scale: str | float | None = "random"  # random | powers | special | a value for all
    scale_dtype: str = "float32"
    scale_layout: str = "1-D"  # 1-D | own | swapped | ones (as many as data has axes, and one more) | 0-d | number
    zero_point: str | float | None = None  # integer | far | float | a Python number
    element: str | None = None
    layout: str = "rows"

    def __str__(self) -> str:
        changed = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return "-".join(
            str(value).replace(" ", "") if name == "function" else f"{name}={value}".replace(" ", "")
            for name, value in changed
        )

    @property
    def class_name(self) -> str:
        return CLASSES[self.function]

    def random(self, part: str) -> np.random.Generator:
        """Of each part of a case its own, so that it doesn't matter which is made first."""
        return np.random.default_rng(zlib.crc32(f"{self} {part}".encode()))

    # -- arguments

    @cached_property
    def inputs(self) -> np.ndarray:
        random = self.random("inputs")
        n, dtype = math.prod(self.shape), numpy_dtype(self.dtype)
        with np.errstate(over="ignore", under="ignore"):
            if dtype.kind in "iu":
                x = self._integers(n, dtype)
            elif self.dtype.startswith("float8"):
                x = np.resize(random.permutation(256), n).astype(np.uint8).view(dtype)
            elif self.function.startswith("non_scaled"):
                x = wide(random, n, dtype)
            else:
                x = self._numbers(n).astype(dtype)
                if n >= 64 and self.dtype == "float32":
                    x.view(np.uint32)[:2] = 0x7FA00001, 0xFFFFFFFF  # a signaling NaN, a payload
        return Case._laid_out(self, x.reshape(self.shape))  # type: ignore[arg-type]

    def _integers(self, n: int, dtype: np.dtype) -> np.ndarray:
        random = self.random("integers")
        if self.quant_dtype in CODE_DTYPES:
            return random.integers(0, 1 << FORMAT_BITS[self.quant_dtype], n).astype(dtype)
        info = np.iinfo(dtype)
        x = random.integers(-200, 200, n)
        x[: n // 4] = random.integers(info.min, info.max, n // 4, endpoint=True, dtype=dtype).astype(np.int64)
        return np.clip(x, info.min, info.max).astype(dtype)

    def _numbers(self, n: int) -> np.ndarray:
        random = self.random("numbers")
        x = random.standard_normal(n) * np.exp2(random.integers(-6, 3, n))
        special = np.concatenate([EDGES, MORE_EDGES])
        if n >= 2 * len(special):
            x[: len(special)] = special
            random.shuffle(x)
        elif n > 1:
            x[: n // 2] = random.choice(special, n // 2)
        return x

    @property
    def bounds(self) -> tuple[float, float]:
        return INTEGER_RANGES.get(self.quant_dtype, (0, 1)) if self.clamp is None else self.clamp

    @property
    def _groups_axis(self) -> int:
        return (1 if self.axis is None else self.axis) % max(len(self.shape), 1)

    @cached_property
    def block(self) -> tuple[int, ...]:
        """The scales' blocks, in normal form."""
        block = [0] * len(self.shape)
        if self.qscheme == "per_channel":
            block[self._groups_axis] = 1
        elif self.qscheme == "per_group":
            block = [1] * len(self.shape)
            block[self._groups_axis] = {None: 1, -1: 0}.get(self.size, self.size)
        return tuple(block)

    @cached_property
    def _scales_shape(self) -> tuple[int, ...]:
        one = self.scale_layout in ("0-d", "ones", "number")
        return (1,) * len(self.shape) if one else scale_shape(self.shape, self.block)

    @cached_property
    def normal_scale(self) -> np.ndarray:
        """The scales, in normal form or one."""
        random = self.random("normal_scale")
        n = math.prod(self._scales_shape)
        match self.scale:
            case "powers":
                s = np.exp2(random.integers(-6, 2, n))
            case "special":
                s = random.permutation(np.resize(SPECIAL_SCALES, n))
            case "random":
                top = max(abs(b) for b in self.bounds) if self.quant_dtype in INTEGER_RANGES else 6.0
                s = random.uniform(0.5, 4.0, n) / min(top, 1e4)
            case _:
                s = np.full(n, self.scale, np.float64)
        with np.errstate(over="ignore", under="ignore"):
            return s.reshape(self._scales_shape).astype(numpy_dtype(self.scale_dtype))

    @cached_property
    def normal_zero_point(self) -> Any:
        random = self.random("normal_zero_point")
        match self.zero_point:
            case "integer":
                dtype = random.choice(["int8", "int16", "int32"])
                return random.integers(-3, 4, self._scales_shape).astype(dtype)
            case "far":
                return random.choice([-(2**23), -1000, -129, 300, 70000, 2**23], self._scales_shape).astype(np.int32)
            case "float":
                dtype = numpy_dtype(random.choice(["float32", "float16", "bfloat16"]))
                return (random.integers(-20, 20, self._scales_shape) / random.choice([1, 4, 7])).astype(dtype)
        return self.zero_point

    def _arranged(self, a: Any) -> Any:
        if not isinstance(a, np.ndarray):
            return a
        match self.scale_layout:
            case "number":
                return float(a.ravel()[0]) if a.dtype.kind not in "iu" else int(a.ravel()[0])
            case "0-d":
                return a.reshape(())
            case "ones":
                return a.reshape((1,) * (len(self.shape) + 1))
            case "own":
                return a
            case "swapped":
                return np.ascontiguousarray(a.swapaxes(self._groups_axis, -1))
        if self.qscheme == "per_group":
            a = a.swapaxes(self._groups_axis, -1)
        return a.reshape(-1)

    def _given(self, *, arranged: bool) -> dict[str, Any]:
        arrange = self._arranged if arranged else lambda a: a
        scale = None if self.scale is None else arrange(self.normal_scale)
        return {"scale": scale, "zero_point": arrange(self.normal_zero_point)}

    def _arguments(self, *, arranged: bool) -> dict[str, Any]:
        given = self._given(arranged=arranged)
        low, high = self.bounds
        limits = {"quant_min": low, "quant_max": high}
        grouped = {"axis": self.axis, "group_size": self.size}
        match self.function:
            case "scaled_fake_quantize" | "scaled_real_quantize":
                d = {"quant_dtype": self.quant_dtype, "inputs": self.inputs, **given, **grouped, **limits}
                d |= {"round_mode": self.round_mode, "qscheme": self.qscheme}
                return d | ({"mx_element_dtype": None} if "fake" in self.function else {})
            case "dequantize":
                d = {"quant_dtype": self.quant_dtype, "inputs": self.inputs, **given, **grouped}
                return d | {"qscheme": self.qscheme}
            case "tqt_quantize":
                d = {"inputs": self.inputs, "log_threshold": given["scale"], "zero_point": given["zero_point"]}
                return d | {"domain": self.size, "round_mode": self.round_mode}
            case "lsq_quantize":
                d = {"x": self.inputs, **given, "grad_factor": 0.0123, **limits}
                return d | {"ch_axis": self.axis, "rounding_key": self.round_mode}
            case "non_scaled_fake_quantize" | "non_scaled_real_quantize":
                d = {"input_tensor": self.inputs, "quant_dtype": self.quant_dtype, "mx_element_dtype": self.element}
                return d | {"axis": self.axis, "block_size": self.size}
        return {"inputs": self.inputs, "scale": given["scale"]}

    @cached_property
    def args(self) -> dict[str, Any]:
        return self._arguments(arranged=True)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return {name: a for name, a in self.args.items() if isinstance(a, np.ndarray)}

    # -- what is expected

    @cached_property
    def _oracle(self) -> dict[str, Any]:
        """The arguments as the oracle takes them: for codes it knows scales of the data's own layout only."""
        own = self.qscheme == "per_group" and self.function in ("scaled_real_quantize", "dequantize")
        d = self._arguments(arranged=not own)
        d.pop("mx_element_dtype", None) if self.function == "scaled_fake_quantize" else None
        if own:
            d.pop("group_size")
        return d

    @cached_property
    def out(self) -> np.ndarray:
        if "_fp8_" in self.function:
            kind, fmt = self.function.split("_", 1)
            scale = self.args["scale"]
            return getattr(reference, f"{kind}_fp8")(
                self.inputs, fmt, None if scale is None else np.asarray(scale).reshape(())
            )
        name = {"dequantize": "dequantize_documented"}.get(self.function, self.function)
        return getattr(reference, name)(**self._oracle)

    @cached_property
    def grad_output(self) -> np.ndarray | None:
        random = self.random("grad_output")
        if self.out.dtype.kind in "iu" or (self.function == "dequantize" and self.inputs.dtype.kind in "iu"):
            return None
        g = random.standard_normal(self.out.size)
        if g.size >= 64 and "lsq" not in self.function and "tqt" not in self.function:
            g[:8] = 0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 1e30, 2.0**-24
        with np.errstate(over="ignore", under="ignore"):
            return g.astype(self.out.dtype).reshape(self.out.shape)

    @cached_property
    def grads(self) -> dict[str, np.ndarray]:
        g = self.grad_output
        if g is None:
            return {}
        with np.errstate(all="ignore"):
            match self.function:
                case "tqt_quantize" | "lsq_quantize":
                    return self._learned(g)
                case "non_scaled_real_quantize":
                    grad = reference.non_scaled_real_gradient(g, self.axis, self.size, self.inputs.dtype)
                    return {"input_tensor": grad}
                case "dequant_fp8_e4m3" | "dequant_fp8_e5m2":
                    return {"inputs": reference.quant_fp8(g, self.function.removeprefix("dequant_"))}
            name = "input_tensor" if self.function == "non_scaled_fake_quantize" else "inputs"
            if g.dtype == self.inputs.dtype:
                return {name: g}
            if self.inputs.dtype in reference.FLOAT8.values():
                return {name: reference.quant_fp8(g, self.quant_dtype)}
            return {name: narrow(g.astype(np.float32), self.inputs.dtype)}

    def _learned(self, g: np.ndarray) -> dict[str, np.ndarray]:
        tqt = self.function == "tqt_quantize"
        grad_x, grad_p = getattr(reference, self.function.replace("quantize", "gradients"))(**self.args, grad=g)
        grads = {"inputs" if tqt else "x": grad_x.astype(np.float32).astype(grad_x.dtype)}
        parameter = self.args["log_threshold" if tqt else "scale"]
        if isinstance(parameter, np.ndarray):
            grads["log_threshold" if tqt else "scale"] = narrow(grad_p, parameter.dtype)
        return grads


FORMAT_BITS = {"fp6_e3m2": 6, "fp6_e2m3": 6, "fp4": 4}
MORE_EDGES = (
    *(2.0**-24, -(2.0**-24), 3 * 2.0**-25, 2.0**-14, 2.0**-133, 1 + 2.0**-25, 1e300, -1e300, 1e-320),
    *(448.0, 464.0, 465.0, 57344.0, 61440.0, -1e4, 6.0, 5.0, 7.75, 28.5, 0.25, 2.5, -2.5, -0.5, 127.5, -128.5),
)


def narrow(x32: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """float32 numbers rounded to another dtype, overflow to inf."""
    return reference.to_bits(x32, dtype.name).view(dtype)


MINIFLOATS = ("fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp6_e2m3", "fp4")
ZERO_POINTS = (None, "integer", "far", "float", -3, 2.5)
SCHEMES: tuple[dict[str, Any], ...] = (
    {"qscheme": "per_tensor"},
    {"qscheme": "per_channel", "axis": 0},
    {"qscheme": "per_channel", "axis": -1},
    {"qscheme": "per_channel"},
    {"qscheme": "per_group", "axis": 1, "size": 14},
    {"qscheme": "per_group", "axis": 0, "size": 3},
    {"qscheme": "per_group", "axis": -2, "size": -1},
    {"qscheme": "per_group"},
    {"qscheme": "per_group", "axis": 1, "size": 4, "shape": (3, 8, 5)},
    {"qscheme": "per_group", "axis": -3, "size": 2, "shape": (2, 4, 3, 5)},
    {"qscheme": "per_channel", "axis": -3, "shape": (2, 4, 3, 5)},
)
LAYOUTS = {
    "per_tensor": ("0-d", "1-D", "own", "ones", "number"),
    "per_channel": ("1-D", "own", "ones", "1-D"),
    "per_group": ("own", "swapped", "1-D", "0-d"),
}


def _fp8_cases() -> Iterator[DocumentedCase]:
    for name in ("fp8_e4m3", "fp8_e5m2"):
        for dtype in DATA:
            for scale in (None, 0.37, 2.0):
                yield DocumentedCase(f"quant_{name}", dtype=dtype, scale=scale, scale_layout="number")
        for scale in SPECIAL_SCALES:
            for layout in ("0-d", "number"):
                dtype = DATA[len(repr(scale)) % 4]
                yield DocumentedCase(f"quant_{name}", dtype=dtype, scale=scale, scale_layout=layout)
                yield DocumentedCase(
                    f"dequant_{name}", dtype=CODE_DTYPES[name], shape=(256,), scale=scale, scale_layout=layout
                )
        for scale in (None, 0.37, 300.0, 2.0**-12):
            yield DocumentedCase(
                f"dequant_{name}", dtype=CODE_DTYPES[name], shape=(2, 128), scale=scale, scale_layout="ones"
            )
        for shape in ((), (0,), (3, 0, 5), (2, 3, 4, 5), (1300,)):
            yield DocumentedCase(f"quant_{name}", shape=shape)
            yield DocumentedCase(f"dequant_{name}", dtype=CODE_DTYPES[name], shape=shape)
        for layout in ("transposed", "sliced", "broadcast"):
            yield DocumentedCase(f"quant_{name}", layout=layout, dtype="float16")
            yield DocumentedCase(f"dequant_{name}", dtype=CODE_DTYPES[name], layout=layout)


def _scaled_cases() -> Iterator[DocumentedCase]:
    choose = random.Random(8).choice
    for name in (*INTEGER_RANGES, *MINIFLOATS):
        for scheme in SCHEMES:
            if name.startswith("fp8") and scheme["qscheme"] == "per_group":
                continue
            for function in ("scaled_fake_quantize", "scaled_real_quantize"):
                layout = choose(LAYOUTS[scheme["qscheme"]])
                scales = (
                    ("random", "powers") if layout in ("0-d", "number", "ones") else ("random", "powers", "special")
                )
                yield DocumentedCase(
                    function,
                    name,
                    dtype=choose(DATA),
                    round_mode=choose((2, 3, 8, None)),
                    clamp=choose((None, None, (-40, 40), (0, 300), (-3.0, 2.0))),
                    scale=choose(scales),
                    scale_dtype="float32"
                    if layout == "number"
                    else choose(("float32", "float32", "float16", "bfloat16")),
                    scale_layout=layout,
                    zero_point=choose(ZERO_POINTS),
                    **scheme,
                )
            codes = choose(("int32", "int8", "int64", "uint8", "int16", "uint16"))
            yield DocumentedCase(
                "dequantize",
                name,
                dtype=CODE_DTYPES.get(name, codes),
                scale=choose(("random", "powers", "special")),
                scale_dtype=choose(("float32", "float16", "bfloat16")),
                scale_layout=choose(LAYOUTS[scheme["qscheme"]][:-1]),
                zero_point=choose(ZERO_POINTS),
                **scheme,
            )
    for scale in SPECIAL_SCALES:  # per tensor, each of them
        for name in ("int8", "uint4", "fp8_e4m3", "fp4"):
            for function in ("scaled_fake_quantize", "scaled_real_quantize"):
                dtype, zero = choose(DATA), choose(ZERO_POINTS)
                yield DocumentedCase(function, name, dtype=dtype, scale=scale, zero_point=zero, scale_layout="0-d")
    for mode in (2, 3, 8, None, -1):  # ties, with every kind of zero point
        for zero in (*ZERO_POINTS, 0.0, 1, -1.5):
            for function in ("scaled_fake_quantize", "scaled_real_quantize"):
                common = {"round_mode": mode, "zero_point": zero, "scale": "powers"}
                yield DocumentedCase(function, "int4", (420,), **common, scale_layout="0-d")
                if zero == "float" or mode == 2:
                    yield DocumentedCase(function, "int8", qscheme="per_channel", axis=0, **common)
    for clamp in ((-(2**23), 2**23), (-5, -2), (7, 9), (0, 1), (-129.0, 70000.0)):
        for function in ("scaled_fake_quantize", "scaled_real_quantize"):
            for zero in (None, 5, 0.5):
                yield DocumentedCase(function, "int8", clamp=clamp, zero_point=zero, scale=0.01, scale_layout="number")
    for name in ("bfloat16", "float16"):
        for dtype in DATA:
            for function in ("scaled_fake_quantize", "scaled_real_quantize", "dequantize"):
                for scale in (None, "random"):
                    yield DocumentedCase(function, name, dtype=dtype, scale=scale, scale_layout="0-d", qscheme=None)
    for shape in ((), (1,), (0,), (3, 0, 5), (7,), (2, 1, 3, 2, 5), (3, 1500)):
        for name in ("int8", "fp8_e5m2", "fp6_e2m3", "float16"):
            for function in ("scaled_fake_quantize", "scaled_real_quantize"):
                yield DocumentedCase(function, name, shape)
                if shape:
                    scheme = choose(("per_channel", "per_group")) if name != "fp8_e5m2" else "per_channel"
                    yield DocumentedCase(function, name, shape, qscheme=scheme, axis=-1, size=-1)
                    yield DocumentedCase(function, name, shape, qscheme="per_channel", axis=0, zero_point="integer")
    for layout in ("transposed", "sliced", "broadcast"):
        for name in ("int8", "uint16", "fp8_e4m3", "fp4", "bfloat16"):
            for scheme in SCHEMES[:5] if not name.startswith("fp8") else SCHEMES[:3]:
                function = choose(("scaled_fake_quantize", "scaled_real_quantize"))
                yield DocumentedCase(function, name, layout=layout, dtype=choose(DATA), scale_layout="1-D", **scheme)
        yield DocumentedCase("dequantize", "int4", dtype="int32", layout=layout, **SCHEMES[4])


def _block_cases() -> Iterator[DocumentedCase]:
    fake, real = "non_scaled_fake_quantize", "non_scaled_real_quantize"
    places = ((-1, 32), (0, 4), (1, 14), (-2, 10), (-1, 1))
    for element in ("int8", *MINIFLOATS):
        for i, (axis, size) in enumerate(places):
            for dtype in DATA if i == 0 else (DATA[i - 1],):
                yield DocumentedCase(fake, "mx", dtype=dtype, element=element, axis=axis, size=size)
        yield DocumentedCase(fake, "mx", (3, 9, 5), element=element, axis=1, size=4)
    for name in ("mx6", "mx9", "bfp16"):
        for axis, size in ((-1, 16), (0, 2), (1, 14), (-2, 8)):
            for dtype in DATA:
                yield DocumentedCase(fake, name, dtype=dtype, axis=axis, size=size)
        for shape in ((3, 9, 5), (5, 7, 3)):  # an odd axis: the last pair is half empty
            yield DocumentedCase(fake, name, shape, axis=1, size=4, dtype="float16")
    for name, element in (("mx", "fp4"), ("mx", "fp8_e4m3"), ("mx", "int8"), ("mx6", None), ("bfp16", None)):
        for shape in ((0,), (3, 0, 5), (1,), (7,), (2, 3, 4, 5), (2, 5000), (2, 1, 3, 2, 70)):
            yield DocumentedCase(fake, name, shape, element=element, axis=-1, size=2048)
        for layout in ("transposed", "sliced", "broadcast"):
            yield DocumentedCase(fake, name, element=element, axis=-1, size=32, layout=layout, dtype="bfloat16")
            yield DocumentedCase(fake, name, element=element, axis=0, size=2, layout=layout)
    for axis, size in ((-1, 14), (0, 3), (1, 35), (-2, 6), (1, 1)):
        for dtype in DATA:
            yield DocumentedCase(real, "mx", element="fp4", axis=axis, size=size, dtype=dtype)
    for shape in ((0,), (3, 0, 4), (8,), (2, 8, 3, 5), (2, 4096)):
        yield DocumentedCase(real, "mx", shape, element="fp4", axis=1 if len(shape) > 1 else 0, size=4)
    for layout in ("transposed", "sliced", "broadcast"):
        yield DocumentedCase(real, "mx", element="fp4", axis=1, size=14, layout=layout)
        yield DocumentedCase(real, "mx", element="fp4", axis=0, size=2, layout=layout, dtype="float16")


def _learned_cases() -> Iterator[DocumentedCase]:
    choose = random.Random(9).choice
    tqt, lsq = "tqt_quantize", "lsq_quantize"
    for mode in (2, 3, 8, None):
        for zero in (None, "integer", -3, 300, 0.1, "float"):
            layout = choose(LAYOUTS["per_tensor"])
            dtypes = {"dtype": choose(DATA), "scale_dtype": choose(("float32", "float16", "bfloat16"))}
            common = {**dtypes, "round_mode": mode, "zero_point": zero}
            yield DocumentedCase(
                tqt, scale=choose((1.3, -0.2, 2.0)), size=choose((8, 128)), scale_layout=layout, **common
            )
            yield DocumentedCase(lsq, clamp=choose(((-8, 7), (0, 15), (-128, 127))), scale_layout=layout, **common)
            for axis, shape in ((0, (6, 70)), (-1, (6, 70)), (1, (3, 8, 5)), (-3, (2, 4, 3, 5))):
                scale = choose(("random", "powers", "special"))
                layout = choose(("1-D", "own"))
                yield DocumentedCase(
                    lsq,
                    shape=shape,
                    qscheme="per_channel",
                    axis=axis,
                    clamp=choose(((-8, 7), (0, 15), (-40.0, 300.0))),
                    scale=scale,
                    scale_layout=layout,
                    **common,
                )
    for scale in SPECIAL_SCALES:
        yield DocumentedCase(lsq, clamp=(-8, 7), scale=scale, scale_layout="0-d")
    for threshold in (-1000.0, -127.5, -126.0, 126.5, 127.0, 1e30, np.inf, -np.inf, np.nan, -0.0, 3.0000002, 0.5):
        yield DocumentedCase(tqt, scale=threshold, size=8, scale_layout="0-d", dtype=choose(DATA))
    for domain in (1, 2, 3, 100, 32768, 2**22):
        yield DocumentedCase(tqt, scale=1.0, size=domain, scale_layout="1-D", zero_point=choose((None, 1)))
    for shape in ((), (1,), (0,), (3, 0, 5), (1025,), (3, 2049), (2049, 3), (2, 1, 3, 2, 5)):
        yield DocumentedCase(tqt, shape=shape, scale=1.0, size=8, scale_layout="0-d")
        yield DocumentedCase(lsq, shape=shape, clamp=(-8, 7), scale_layout="0-d")
        for axis in (0, -1) if shape else ():
            yield DocumentedCase(lsq, shape=shape, clamp=(-8, 7), qscheme="per_channel", axis=axis)
    for layout in ("transposed", "sliced", "broadcast"):
        yield DocumentedCase(tqt, scale=1.0, size=8, layout=layout)
        for axis in (None, 0, 1):
            scheme = "per_tensor" if axis is None else "per_channel"
            yield DocumentedCase(lsq, clamp=(-8, 7), qscheme=scheme, axis=axis, layout=layout)


def _documented() -> Iterator[DocumentedCase]:
    yield from _fp8_cases()
    yield from _scaled_cases()
    yield from _block_cases()
    yield from _learned_cases()


DOCUMENTED: tuple[DocumentedCase, ...] = tuple({str(case): case for case in _documented()}.values())
