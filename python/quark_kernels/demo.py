"""`python -m quark_kernels demo`: real tensors through every preset, in torch and in JAX, bit against bit.

For each preset it quantizes a trained digit classifier (or the tensors of `--input`), compares every byte that the two
frameworks return, on these tensors and on edge cases, and measures signal to noise, accuracy and speed.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from . import PRESETS, PerTensor, QuantSpec, __version__, info
from .formats import FORMATS

Array = NDArray[Any]

DIGITS = Path(__file__).with_name("data") / "digits.safetensors"
DARKEST_PIXEL = 16
CASTS = ("bf16", "fp16")
QTENSOR_ARRAYS = ("qvalue", "scale", "zero_point", "global_scale", "pair_bits")

# The shape of the first layer's weights as well: JAX compiles a program for every preset, shape and dtype.
EDGE_ROWS, EDGE_COLUMNS = 128, 64
GIVEN_SCALES = (1.0, 0.037, 2.0**-140)  # exact, ordinary, subnormal
TIMED_SHAPE = (2048, 2048)
TIMED_ROUNDS = 7


class DemoError(Exception):
    """What the user can put right; shown as one line."""


# ---- Tensors as bits: NumPy alone has no bfloat16, and NaN bits must survive every step.


@dataclass(frozen=True)
class Tensor:
    """An array's bits (unsigned integers as wide as its dtype), with names for its rows where it is made of cases."""

    name: str
    dtype: str
    bits: Array
    row_names: tuple[str, ...] = ()

    def values(self) -> Array:
        """The values; bfloat16 widened to float32."""
        return decode(self.bits, self.dtype)


@dataclass(frozen=True)
class FloatRange:
    """A float dtype's ends."""

    largest: float
    smallest_normal: float
    smallest: float


FLOATS = {
    "float32": FloatRange((2 - 2.0**-23) * 2.0**127, 2.0**-126, 2.0**-149),
    "float16": FloatRange(65504.0, 2.0**-14, 2.0**-24),
    "bfloat16": FloatRange((2 - 2.0**-7) * 2.0**127, 2.0**-126, 2.0**-133),
}


def decode(bits: Array, dtype: str) -> Array:
    """Bits to values; bfloat16 to float32."""
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(dtype)


def encode(name: str, values: Array, dtype: str, row_names: tuple[str, ...] = ()) -> Tensor:
    """Values, rounded to the nearest of `dtype`, as a `Tensor`."""
    with np.errstate(over="ignore", under="ignore"):
        narrow = np.ascontiguousarray(values, dtype="float32" if dtype == "bfloat16" else dtype)
    bits = narrow.view(f"u{narrow.itemsize}")
    if dtype == "bfloat16":
        bits = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype(np.uint16)
    return Tensor(name, dtype, bits, row_names)


# ---- The frameworks, each behind the same few methods.


class Framework(Protocol):
    """What the demo needs of a framework."""

    name: str
    version: str
    functions: Any  # the frontend package: quantize, dequantize, fake_quantize

    def to_framework(self, bits: Array, dtype: str) -> Any:
        """Bits as this framework's array of `dtype`, on the CPU."""
        raise NotImplementedError

    def to_bits(self, x: Any) -> Array:
        """An array's bits as unsigned integers of the same width."""
        raise NotImplementedError

    def timed_fake_quantize(self, x: Tensor, preset: str) -> Callable[[], object]:
        """A call that fake-quantizes `x` and returns when the values are there."""
        raise NotImplementedError


class Torch:
    """torch, through `quark_torch`."""

    name = "torch"

    def __init__(self) -> None:
        """Imports torch and the frontend; raises what they raise."""
        import torch

        import quark_torch

        self._torch: Any = torch
        self.version = str(torch.__version__)
        self.functions: Any = quark_torch

    def to_framework(self, bits: Array, dtype: str) -> Any:
        """Bits as a tensor of `dtype`."""
        return self._torch.from_numpy(bits.view(f"i{bits.itemsize}")).view(getattr(self._torch, dtype))

    def to_bits(self, x: Any) -> Array:
        """A tensor's bits."""
        same_width = {1: self._torch.uint8, 2: self._torch.int16, 4: self._torch.int32, 8: self._torch.int64}
        signed: Array = x.detach().contiguous().view(same_width[x.element_size()]).numpy()
        return signed.view(f"u{signed.itemsize}")

    def timed_fake_quantize(self, x: Tensor, preset: str) -> Callable[[], object]:
        """Writes into memory that is there already, on one thread, as the copy does."""
        inputs = self.to_framework(x.bits, x.dtype)
        out = self._torch.empty_like(inputs)

        def call() -> None:
            threads = self._torch.get_num_threads()
            self._torch.set_num_threads(1)
            try:
                self.functions.fake_quantize(inputs, preset, out=out)
            finally:
                self._torch.set_num_threads(threads)

        return call


class Jax:
    """JAX, through `quark_jax`."""

    name = "jax"

    def __init__(self) -> None:
        """Imports JAX and the frontend; raises what they raise."""
        import jax

        import quark_jax

        self._jax: Any = jax
        self._cpu: Any = jax.local_devices(backend="cpu")[0]
        self.version = str(jax.__version__)
        self.functions: Any = quark_jax

    def to_framework(self, bits: Array, dtype: str) -> Any:
        """Bits as a JAX array of `dtype`."""
        return self._jax.device_put(bits.view(getattr(self._jax.numpy, dtype).dtype), self._cpu)

    def to_bits(self, x: Any) -> Array:
        """An array's bits."""
        array = np.asarray(x)
        return array.view(f"u{array.itemsize}")

    def timed_fake_quantize(self, x: Tensor, preset: str) -> Callable[[], object]:
        """JAX has no `out=`: each call allocates its result."""
        inputs = self.to_framework(x.bits, x.dtype)
        return lambda: self.functions.fake_quantize(inputs, preset).block_until_ready()


def load_frameworks() -> tuple[list[Framework], dict[str, str]]:
    """The frameworks that are here, and for each other one the reason why not."""
    found: list[Framework] = []
    missing: dict[str, str] = {}
    adapters: tuple[type[Torch] | type[Jax], ...] = (Torch, Jax)
    for adapter in adapters:
        try:
            found.append(adapter())
        except (ImportError, OSError, RuntimeError) as error:  # OSError: a shared library that doesn't load
            missing[adapter.name] = one_line(error)
    return found, missing


# ---- What goes in: the digits or the user's tensors, and the edge cases.


@dataclass(frozen=True)
class Model:
    """The digit classifier's biases, and the images it is judged by; its weights are a `Workload`'s tensors."""

    biases: list[Array]
    images: Array
    labels: Array

    def accuracy(self, weights: Sequence[Array], activation: Callable[[Array], Array]) -> float:
        """The share of images classified right; `activation` sees every layer's input."""
        x = self.images
        for i, (weight, bias) in enumerate(zip(weights, self.biases, strict=True)):
            hidden = np.maximum(x, 0) if i else x
            with np.errstate(all="ignore"):
                x = activation(hidden) @ weight.T + bias
        return float(np.mean(np.argmax(x, axis=1) == self.labels))


@dataclass(frozen=True)
class Workload:
    """The tensors to quantize, and the model they belong to, if any."""

    tensors: list[Tensor]
    model: Model | None = None


def load_digits() -> Workload:
    """The bundled classifier and its held-out test images."""
    from safetensors.numpy import load_file

    arrays = load_file(DIGITS)
    layers = range(sum(name.endswith(".weight") for name in arrays))
    weights = [encode(f"layers.{i}.weight", arrays[f"layers.{i}.weight"], "float32") for i in layers]
    biases = [arrays[f"layers.{i}.bias"] for i in layers]
    images = arrays["images"].astype(np.float32) / DARKEST_PIXEL
    return Workload(weights, Model(biases, images, arrays["labels"]))


def load_input(path: Path) -> Workload:
    """Every floating tensor of a .safetensors, .npy or .npz file."""
    readers = {".safetensors": read_safetensors, ".npy": read_npy, ".npz": read_npz}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DemoError(f"{path}: unknown suffix {path.suffix!r}; allowed are {', '.join(readers)}")
    if not path.is_file():
        raise DemoError(f"{path}: no such file")
    try:
        tensors = [tensor for tensor in reader(path) if tensor.bits.size]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DemoError(f"{path}: cannot be read: {one_line(error)}") from error
    if not tensors:
        raise DemoError(f"{path}: no floating tensors (float16, bfloat16, float32 or float64) in it")
    return Workload(tensors)


def read_safetensors(path: Path) -> Iterator[Tensor]:
    """The floating tensors of a .safetensors file."""
    from quark_kernels.files import Reader

    with Reader(path) as reader:
        for name in sorted(reader.entries):
            if reader.entries[name].code == "BF16":
                yield Tensor(name, "bfloat16", reader.raw(name).array(np.uint16))
            elif reader.entries[name].code in ("F16", "F32", "F64"):
                yield from floating(name, reader.raw(name).array())


def read_npy(path: Path) -> Iterator[Tensor]:
    """The one array of a .npy file (np.load would take any broken file for a pickle)."""
    with path.open("rb") as file:
        yield from floating(path.stem, np.lib.format.read_array(file))


def read_npz(path: Path) -> Iterator[Tensor]:
    """Every array of a .npz file."""
    if not zipfile.is_zipfile(path):
        raise ValueError("not a zip archive")
    with np.load(path) as arrays:
        for name in arrays.files:
            yield from floating(name, arrays[name])


def floating(name: str, array: Array) -> Iterator[Tensor]:
    """The array as a tensor, if it is floating: float16 as it is, every other width as float32, a scalar as one row."""
    if array.dtype.kind == "f":
        array = array.reshape(array.shape[0], -1) if array.ndim > 2 and array.size else array  # channels stay channels
        yield encode(name, array, "float16" if array.itemsize == 2 else "float32")


def edge_cases() -> list[Tensor]:
    """The hard values in every input dtype. A row is a case of its own, since it has its own scale in most presets."""
    return [case for dtype in FLOATS for case in (extremes(dtype), ties(dtype), two_level_ties(dtype))]


def extremes(dtype: str) -> Tensor:
    """Zeros, subnormals, infinities, NaNs, the largest and the smallest values."""
    ends = FLOATS[dtype]
    steps = np.arange(EDGE_COLUMNS, dtype=np.float64)
    signs = np.where(steps % 2, -1.0, 1.0)
    ordinary = signs * (steps + 1) / 8
    rows = {
        "+0": 0 * steps,
        "-0": np.copysign(0, -1 - steps),
        "both zeros": 0 * signs,
        "subnormals": signs * steps * ends.smallest,
        "largest subnormals, smallest normals": signs * (ends.smallest_normal + (steps - 32) * ends.smallest),
        "tiny normals": signs * ends.smallest_normal * (1 + steps / 7),
        "ordinary with subnormals": np.where(steps % 3, ordinary, signs * steps * ends.smallest),
        "huge": signs * ends.largest * (1 - steps / 256),
        "3e38": signs * np.minimum(3e38, ends.largest),
        "huge with subnormals": np.where(steps % 2, -ends.largest, steps * ends.smallest),
        "+inf": with_special(ordinary, np.inf),
        "-inf": with_special(ordinary, -np.inf),
        "inf among zeros": with_special(0 * signs, np.inf),
        "NaN": with_special(ordinary, np.nan),
        "-NaN": with_special(ordinary, -np.nan),
        "NaN and inf": with_special(with_special(ordinary, np.inf), np.nan, column=20),
        "all inf": signs * np.inf,
        "all NaN": np.copysign(np.nan, signs),
    }
    return stack(f"extremes, {dtype}", rows, dtype)


def with_special(row: Array, value: float, column: int = 5) -> Array:
    """The row with one value replaced, in its first half: the second half shows that other blocks aren't touched."""
    row = row.copy()
    row[column] = value
    return row


def ties(dtype: str) -> Tensor:
    """Each format's largest value, which makes the dynamic scale exactly 1, with its ties and their neighbours."""
    rows: dict[str, Array] = {}
    steps = np.zeros((EDGE_ROWS, EDGE_COLUMNS), np.int64)
    for name, number_format in FORMATS.items():
        # Above 65504 a float16 row would be all infinite.
        largest = min(number_format.hi, FLOATS["float16"].largest)
        row = tie_row(largest, number_format.mantissa_bits, number_format.min_exp, signed=number_format.lo < 0)
        for place, step in (("ties", 0), ("just above ties", 1), ("just below ties", -1)):
            steps[len(rows)] = step
            rows[f"{place} of {name}"] = row
    steps[:, ::8] = 0  # the largest value stays
    cases = stack(f"ties, {dtype}", rows, dtype)
    magnitudes = np.abs(cases.values())
    steps[(magnitudes == 0) | (magnitudes >= FLOATS[dtype].largest)] = 0  # float16's ends: next come NaN and inf
    return replace(cases, bits=(cases.bits + steps).astype(cases.bits.dtype))


def tie_row(largest: float, mantissa_bits: int, min_exp: int, *, signed: bool) -> Array:
    """`largest` in every eighth place (so in every block of every preset), ties of the grid in the others."""
    steps = np.arange(2**mantissa_bits) / 2**mantissa_bits
    binades = np.arange(min_exp, math.floor(math.log2(largest)) + 1)
    grid = np.concatenate([steps * 2.0**min_exp, *((1 + steps) * 2.0**e for e in binades)])
    grid = grid[grid <= largest]
    midpoints = (grid[1:] + grid[:-1]) / 2
    row: Array = midpoints[np.linspace(0, len(midpoints) - 1, EDGE_COLUMNS).round().astype(int)]
    if signed:
        row[1::2] *= -1
    row[::8] = largest
    return row


def two_level_ties(dtype: str) -> Tensor:
    """fp4 ties for nvfp4: 2688 = 6 * 448 makes the tensor's scale exactly 1, and so each block's a power of two."""
    fp4 = FORMATS["fp4"]
    row = tie_row(fp4.hi, fp4.mantissa_bits, fp4.min_exp, signed=True)
    rows = {f"ties of fp4, times 2^{e}": row * 2.0**e for e in range(-9, 9)}
    return stack(f"two-level ties, {dtype}", {"2688": np.full(EDGE_COLUMNS, 2688.0)} | rows, dtype)


def stack(name: str, rows: Mapping[str, Array], dtype: str) -> Tensor:
    """The rows, and random ones of all magnitudes up to the common shape, as one tensor."""
    random = np.random.default_rng(0)
    spare = EDGE_ROWS - len(rows)
    magnitudes = 2.0 ** random.integers(-10, 10, (spare, 1))
    filling = random.standard_normal((spare, EDGE_COLUMNS)) * magnitudes
    names = (*rows, *(f"random {i}" for i in range(spare)))
    return encode(name, np.concatenate([np.stack(list(rows.values())), filling]), dtype, names)


# ---- One preset: what every framework returns, and where two of them differ.


@dataclass(frozen=True)
class Case:
    """A tensor with the options of the call: static ones as they are, arrays as bits."""

    tensor: Tensor
    options: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The tensor and the arrays given with it."""
        given = "".join(f", {array.name}" for array in self.arrays.values())
        return f"{self.tensor.name} ({self.tensor.dtype}{given})"


@dataclass(frozen=True)
class Outcome:
    """What one framework made of a case; `None` stands for an array that the preset doesn't have."""

    arrays: dict[str, Array | None]
    bits_per_value: float

    @property
    def dequantized(self) -> Array:
        """The bits of the dequantized values, which every preset has."""
        array = self.arrays["dequantized"]
        assert array is not None
        return array


def apply(framework: Framework, preset: str, case: Case) -> Outcome:
    """Quantizes, dequantizes and fake-quantizes."""
    x = framework.to_framework(case.tensor.bits, case.tensor.dtype)
    given = {name: framework.to_framework(array.bits, array.dtype) for name, array in case.arrays.items()}
    q = framework.functions.quantize(x, preset, **case.options, **given)
    parts = {name: getattr(q, name) for name in QTENSOR_ARRAYS} | {
        "dequantized": framework.functions.dequantize(q),
        "fake_quantized": framework.functions.fake_quantize(x, preset, **case.options, **given),
    }
    arrays = {name: None if part is None else framework.to_bits(part) for name, part in parts.items()}
    return Outcome(arrays, float(q.bits_per_value))


def differences(case: Case, outcomes: Mapping[str, Outcome]) -> Iterator[str]:
    """Describes every array in which two frameworks, or fake_quantize and dequantize(quantize), differ."""
    (first, expected), *others = outcomes.items()
    for other, got in others:
        for name, array in expected.arrays.items():
            yield from difference(case, f"{name}: {first}", array, other, got.arrays[name])
    numbers = ~np.isnan(case.tensor.values())
    for framework, outcome in outcomes.items():
        fake, dequantized = outcome.arrays["fake_quantized"], outcome.arrays["dequantized"]
        yield from difference(case, f"{framework}: fake_quantize", fake, "dequantize(quantize)", dequantized, numbers)


def difference(
    case: Case, left: str, a: Array | None, right: str, b: Array | None, where: Array | None = None
) -> Iterator[str]:
    """Describes the first element in which two arrays differ, if any."""
    if a is None or b is None:
        if a is not b:
            yield f"{case.name}, {left} has {describe(a)}, {right} {describe(b)}"
    elif a.shape != b.shape or a.dtype != b.dtype:
        yield f"{case.name}, {left} has {describe(a)}, {right} {describe(b)}"
    else:
        different = a != b if where is None else (a != b) & where
        if different.any():
            index = tuple(int(i) for i in np.argwhere(different)[0])
            ours, theirs = (f"0x{int(array[index]):0{2 * array.itemsize}x}" for array in (a, b))
            place = f"{list(index)}{row_note(case.tensor, index)}"
            yield f"{case.name}, {left} has {ours}, {right} {theirs} at {place}"


def describe(array: Array | None) -> str:
    """Kind of an array, for differences that aren't one of values."""
    return "none" if array is None else f"{array.itemsize}-byte elements of shape {list(array.shape)}"


def row_note(tensor: Tensor, index: tuple[int, ...]) -> str:
    """The name of an edge case's row."""
    return f" (row {tensor.row_names[index[0]]!r})" if tensor.row_names and len(index) == 2 else ""


def per_channel(preset: str, spec: QuantSpec, tensor: Tensor) -> dict[str, int]:
    """Presets with one scale get one for each output channel; blocks already run along the last axis, the inputs'."""
    one_scale = preset not in CASTS and isinstance(spec.granularity, PerTensor)
    return {"axis": 0} if one_scale and tensor.bits.ndim >= 2 else {}


def edge_calls(preset: str, spec: QuantSpec, edges: Sequence[Tensor]) -> Iterator[Case]:
    """Every edge tensor with dynamic scales, and with given ones in the presets that are run per channel."""
    for tensor in edges:
        options = per_channel(preset, spec, tensor)
        yield Case(tensor, options)
        for scale in GIVEN_SCALES if options else ():
            yield Case(tensor, options, given_arrays(scale, spec))


def given_arrays(scale: float, spec: QuantSpec) -> dict[str, Tensor]:
    """One scale for all rows, and a zero point where the preset has one."""
    shape = (EDGE_ROWS, 1)
    arrays = {"scale": encode(f"scale {scale:.3g}", np.full(shape, scale), "float32")}
    if not spec.symmetric:
        arrays["zero_point"] = Tensor("zero point 1", "int32", np.ones(shape, np.uint32))
    return arrays


# ---- Measurements.


@dataclass
class Row:
    """A line of the table; `None` where a column has no meaning."""

    preset: str
    bits_per_value: float
    sqnr_db: float
    accuracy: float | None
    same_bits: bool | None
    gb_per_s: float
    of_copy: float
    difference: str | None = None


@dataclass(frozen=True)
class Bench:
    """The speed test's memory, shared by all presets."""

    source: Tensor
    target: Array

    @classmethod
    def create(cls) -> Bench:
        """4 M values (16 MiB)."""
        values = np.random.default_rng(0).standard_normal(TIMED_SHAPE, dtype=np.float32)
        return cls(encode("timed", values, "float32"), np.zeros(TIMED_SHAPE, np.uint32))

    def copy(self) -> None:
        """The yardstick: as many bytes read and written as fake_quantize has to."""
        np.copyto(self.target, self.source.bits)

    def speed(self, call: Callable[[], object]) -> tuple[float, float]:
        """GB/s (read and written) of `call`, and its share of the copy's."""
        call()  # compiles and touches the memory
        ours, copy = interleaved_medians(call, self.copy)
        return 2 * self.source.bits.nbytes / ours / 1e9, copy / ours


def interleaved_medians(*calls: Callable[[], object]) -> list[float]:
    """Median seconds of each call, taken in turns: what slows the machine down slows all of them."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(TIMED_ROUNDS):
        for call, taken in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]


def sqnr(originals: Sequence[Array], results: Sequence[Array]) -> float:
    """Signal to quantization noise over all tensors together, in dB."""
    signal = noise = 0.0
    with np.errstate(all="ignore"):
        for x, y in zip(originals, results, strict=True):
            wide = x.astype(np.float64)
            signal += float(np.sum(wide**2))
            noise += float(np.sum((wide - y) ** 2))
    if math.isnan(signal) or not math.isfinite(noise):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def unquantized(workload: Workload, bench: Bench) -> Row:
    """The line to compare with: the tensors as they are, at the speed of a copy."""
    values = [tensor.values() for tensor in workload.tensors]
    bits = sum(8 * tensor.bits.nbytes for tensor in workload.tensors) / sum(x.size for x in values)
    accuracy = workload.model.accuracy(values, lambda x: x) if workload.model else None
    name = "float32" if all(tensor.dtype == "float32" for tensor in workload.tensors) else "as stored"
    gb_per_s, _ = bench.speed(bench.copy)
    return Row(name, bits, math.inf, accuracy, None, gb_per_s, 1.0)


class Measurement:
    """One preset, in every framework; collects the differences on its way."""

    def __init__(self, preset: str, spec: QuantSpec, frameworks: Sequence[Framework]) -> None:
        """Nothing runs yet."""
        self.preset, self.spec, self.frameworks = preset, spec, frameworks
        self.differences: list[str] = []

    def row(self, workload: Workload, edges: Sequence[Tensor], bench: Bench) -> Row:
        """Runs everything."""
        outcomes = [self.compare(Case(t, per_channel(self.preset, self.spec, t))) for t in workload.tensors]
        originals = [tensor.values() for tensor in workload.tensors]
        results = [
            decode(outcome.dequantized, tensor.dtype)
            for outcome, tensor in zip(outcomes, workload.tensors, strict=True)
        ]
        bits = sum(outcome.bits_per_value * x.size for outcome, x in zip(outcomes, originals, strict=True))
        accuracy = workload.model.accuracy(results, self.quantize_activation) if workload.model else None
        for case in edge_calls(self.preset, self.spec, edges):
            self.compare(case)
        return Row(
            self.preset,
            bits / sum(x.size for x in originals),
            sqnr(originals, results),
            accuracy,
            self.same_bits(),
            *bench.speed(self.frameworks[0].timed_fake_quantize(bench.source, self.preset)),
            difference=next(iter(self.differences), None),
        )

    def compare(self, case: Case) -> Outcome:
        """Runs a case in every framework and returns the first one's outcome."""
        outcomes = {framework.name: apply(framework, self.preset, case) for framework in self.frameworks}
        self.differences += differences(case, outcomes)
        return next(iter(outcomes.values()))

    def quantize_activation(self, x: Array) -> Array:
        """Activations with dynamic scales, as they would be quantized while the model runs."""
        tensor = encode("activations", x, "float32")
        first, *others = self.frameworks
        expected = self.fake_quantize(first, tensor)
        for other in others:
            got = self.fake_quantize(other, tensor)
            self.differences += difference(Case(tensor), f"fake_quantize: {first.name}", expected, other.name, got)
        return decode(expected, "float32")

    def fake_quantize(self, framework: Framework, x: Tensor) -> Array:
        """One framework's fake_quantize, as bits."""
        inputs = framework.to_framework(x.bits, x.dtype)
        return framework.to_bits(framework.functions.fake_quantize(inputs, self.preset))

    def same_bits(self) -> bool | None:
        """No where anything differs; with a single framework there is nothing to say yes to."""
        if self.differences:
            return False
        return True if len(self.frameworks) > 1 else None


# ---- The report.

HEADER = ("preset", "bits/value", "SQNR dB", "accuracy", "same bits", "GB/s")


def headline(frameworks: Sequence[Framework], missing: Mapping[str, str]) -> str:
    """What runs; then a line for each framework that doesn't."""
    versions = [f"quark-kernels {__version__}", *(f"{framework.name} {framework.version}" for framework in frameworks)]
    lines = [", ".join([*versions, f"CPU level {info()['cpu_level']}"])]
    lines += [f"without {name}: {reason}" for name, reason in missing.items()]
    return "\n".join(lines)


def cells(row: Row, *, compared: bool) -> tuple[str, ...]:
    """A line of the table as text."""
    return (
        row.preset,
        f"{row.bits_per_value:.2f}",
        f"{row.sqnr_db:.1f}",
        "-" if row.accuracy is None else f"{100 * row.accuracy:.1f} %",
        {True: "yes", False: "NO", None: "n/a" if compared else "-"}[row.same_bits],
        f"{row.gb_per_s:.1f} ({100 * row.of_copy:.0f} % of a copy)",
    )


def table(rows: Sequence[Row]) -> str:
    """The aligned table; its first row has nothing to compare."""
    lines = [HEADER, *(cells(row, compared=i > 0) for i, row in enumerate(rows))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def first_difference(rows: Sequence[Row]) -> str | None:
    """The line below the table, if anything differs."""
    return next((f"first difference: {row.preset}: {row.difference}" for row in rows if row.difference), None)


def write_json(path: Path, rows: Sequence[Row], frameworks: Sequence[Framework], missing: Mapping[str, str]) -> None:
    """The table as JSON; a number that isn't finite becomes null."""
    report = {
        "quark_kernels": __version__,
        "frameworks": {framework.name: framework.version for framework in frameworks},
        "missing": dict(missing),
        "rows": [{key: finite_or_none(value) for key, value in asdict(row).items()} for row in rows],
    }
    try:
        path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise DemoError(f"{path}: cannot be written: {one_line(error)}") from error


def finite_or_none(value: object) -> object:
    """JSON has no inf and no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def run(input: str | None = None, json_path: str | None = None) -> int:
    """The demo. Returns the exit status: 0 bits agree, 1 they don't or there is no framework, 2 wrong argument."""
    try:
        if json_path and not Path(json_path).parent.is_dir():
            raise DemoError(f"{json_path}: no such folder")
        workload = load_input(Path(input)) if input else load_digits()
        frameworks, missing = load_frameworks()
        if not frameworks:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
            print(f"quark_kernels demo: needs torch or JAX ({reasons})", file=sys.stderr)
            return 1
        print(headline(frameworks, missing), flush=True)
        rows = measure(workload, frameworks)
        print(table(rows))
        if json_path:
            write_json(Path(json_path), rows, frameworks, missing)
    except DemoError as error:
        print(f"quark_kernels demo: {error}", file=sys.stderr)
        return 2
    difference_line = first_difference(rows)
    if difference_line:
        print(difference_line)
    return 1 if difference_line else 0


def measure(workload: Workload, frameworks: Sequence[Framework]) -> list[Row]:
    """The unquantized row, then one for each preset."""
    from tqdm import tqdm

    bench, edges = Bench.create(), edge_cases()
    rows = [unquantized(workload, bench)]
    # disable=None: no bar where stderr isn't a terminal.
    with tqdm(PRESETS.items(), unit="preset", file=sys.stderr, disable=None, leave=False) as progress:
        for preset, spec in progress:
            progress.set_postfix_str(preset)
            rows.append(Measurement(preset, spec, frameworks).row(workload, edges, bench))
    return rows
