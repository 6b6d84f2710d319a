"""THE table: every case that the core, torch and JAX must get right, bit for bit.

A case is data. `reference.py` says what is expected, `frontends.py` runs it, and the tests go over `CASES`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

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

    def __str__(self) -> str:
        words = [str(self.spec).replace(" ", ","), "x".join(map(str, self.shape)) or "0-d", self.dtype]
        words += ["given" if self.given else "dynamic"]
        words += [f"z{self.zero_point}"] if self.zero_point is not None else []
        words += ["packed"] if self.packed else []
        words += [self.layout] if self.layout != "rows" else []
        return "-".join(words)

    @cached_property
    def block(self) -> tuple[int, ...]:
        return block_of(self.spec, self.shape)

    @cached_property
    def random(self) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(str(self).encode()))

    @cached_property
    def x(self) -> np.ndarray:
        """The input: values over many magnitudes, ties, and everything special (where the scale is given)."""
        n = int(np.prod(self.shape))
        x = self.random.standard_normal(n) * np.exp2(self.random.integers(-6, 3, n))
        if n >= 64:
            x[: len(EDGES)] = EDGES if self.given else np.where(np.isfinite(EDGES), EDGES, 0.5)
            if not self.given:
                x[np.abs(x) > 1e4] = 0.25
            self.random.shuffle(x)
            if not self.given and self.spec.granularity != PerTensor():
                x[n // 2], x[n // 3] = np.inf, np.nan  # each spoils its own group only
        with np.errstate(over="ignore", under="ignore"):
            x = x.astype(numpy_dtype(self.dtype)).reshape(self.shape)
        return self._laid_out(x)

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
        """The scales, in normal form: given ones, or those that the oracle chooses."""
        if not self.given:
            return self._chosen[0]
        shape = scale_shape(self.shape, self.block)
        top = reference.FORMATS[self.spec.format].hi if self.spec.quant_max is None else self.spec.quant_max
        scale = np.asarray(self.random.uniform(0.5, 4.0, shape) / top, np.float32)
        if scale.size > 3:  # powers of two: exact ties; a subnormal; NaN
            scale.flat[1], scale.flat[2] = 2.0**-4, 1e-40
        if scale.size > 5:
            scale.flat[5] = np.nan
        return np.ones(shape, np.float32) if self.spec.element.is_cast else scale

    @cached_property
    def zero(self) -> np.ndarray | None:
        """The zero points, likewise."""
        if not self.given:
            return self._chosen[1]
        if self.zero_point is None:
            return None
        return np.asarray(self.zero_point + self.random.integers(-2, 3, self.scale.shape), np.int32)

    @cached_property
    def _chosen(self) -> tuple[np.ndarray, np.ndarray | None]:
        return reference.choose_qparams(
            self.x32, self.spec.format, self.block, self.spec.symmetric, self.spec.quant_min, self.spec.quant_max
        )

    def _expanded(self) -> dict[str, object]:
        zero = None if self.zero is None else reference.expand(self.zero, self.shape, self.block)
        return {
            "fmt": self.spec.format,
            "scale": reference.expand(self.scale, self.shape, self.block),
            "zero_point": zero,
            "rounding": self.spec.rounding,
            "quant_min": self.spec.quant_min,
            "quant_max": self.spec.quant_max,
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
        return self.random.standard_normal(self.shape).astype(numpy_dtype(self.dtype))


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

INTEGERS = [name for name, spec in PRESETS.items() if spec.element.is_integer]
SCALED = [name for name, spec in PRESETS.items() if not spec.element.is_cast]
NARROW = [name for name, spec in PRESETS.items() if spec.element.can_pack]
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
    for name, preset in PRESETS.items():
        for granularity in GRANULARITIES if name in SCALED else (PerTensor(),):
            for given in (False, True) if name in SCALED else (False,):
                yield Case(replace(preset, granularity=granularity), given=given)
    for rounding in ROUNDINGS:
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
                yield Case(replace(PRESETS[name], granularity=granularity), dtype=dtype, given=given)
    for shape in ((), (1,), (0,), (3, 0, 5), (7,), (1025,), (2, 3, 4, 5), (2, 1, 3, 2, 5), (40, 1), (1, 2049)):
        for name in ("int8", "uint8", "fp8_e4m3", "fp4", "bf16"):
            yield Case(PRESETS[name], shape=shape)
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
            yield Case(replace(PRESETS[name], granularity=PerGroup(16)), shape=(3, length), packed=True)
        yield Case(PRESETS[name], shape=(4100,), packed=True, given=True)
        yield Case(PRESETS[name], shape=(), packed=True)


CASES: tuple[Case, ...] = tuple({str(case): case for case in _cases()}.values())
