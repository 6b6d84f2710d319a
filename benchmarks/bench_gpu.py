"""Speed on a GPU (CUDA or ROCm): of every kind of call against a copy on the device, and against its peers.

    python benchmarks/bench_gpu.py [--quick] [--size-mb MB ...] [--json FILE] [--docs]

Before anything is timed, every case is computed on the CPU and on the GPU; one whose bits differ isn't timed, and the
exit code is 1. Without a GPU it is 2.

Everything that is compared runs in turns; kept are the median and the quartiles. A sample is several launches between
two events, after one that isn't counted, which also lets the host run ahead. Calls take turns over several sets of
arrays where one might stay in a cache. Results are preallocated where a function takes ``out=`` and works in one pass
with it, and else come from torch's caching allocator. Sizes are those of x: of what is quantized, or comes back.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import cycle
from math import ceil, prod
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

import report
from bench import FEWEST_ROUNDS, LONGEST, QUICK_ROUNDS, ROUNDS, Job, measure, quartiles
from cases import ALONG, BLOCKS, COLUMNS, FEW, GIB, JITTED, MIB, PEERS, TORCH_OWN
from contenders import Call, Contest, compiled, torch_dtype, torchao_call
from plain import EXPRESSIONS, Torch
from quark_kernels import PRESETS, QuantSpec, info, schema
from quark_kernels.spec import PerChannel
from report import Row, Run

DTYPES = ("bfloat16", "float32")
SIZES = (256, 1024)  # MiB
ROWS, DYNAMIC, STOCHASTIC, LEARNED = 0.90, 0.85, 0.75, 0.80  # targets: the least share of a copy's GB/s
BEYOND_EMPTY = 2.0  # µs: the most that a call on few elements takes longer than torch's smallest kernel

CHECKED = 1 << 20  # elements that CPU and GPU are compared on
FOOTPRINT = GIB  # bytes that calls go over before they come back to the same: four times the largest cache
SAMPLE, FEWEST_LAUNCHES = 5e-3, 4
CAPTURED = 100  # calls in a graph
HOST_CALLS = 200  # fewer than a queue takes before the host has to wait
TOLERANCE = 1e-2  # mean difference of a contender to mean: ties that go up
NEAR_X = 0.1  # the same where the rounding is random

BEGIN, END = "<!-- gpu begin -->", "<!-- gpu end -->"
DOCUMENT = report.ROOT / "docs" / "performance.md"

# ---- what is measured, and what is expected of it --------------------------------------------------------------------

LAST_AXIS = "per channel (last axis)"
GRANULARITIES = ALONG | {LAST_AXIS: PerChannel(-1)}
OPERATIONS = ("fake_quantize", "quantize", "dequantize")


@dataclass(frozen=True)
class Case:
    """One public function of quark_torch, or the gradients of one."""

    operation: str
    preset: str
    along: str = "blocks"
    """A key of GRANULARITIES; blocks: as the preset has them."""
    dynamic: bool = False
    """Whether scales are found from x in the same call, or given."""
    rounding: str = "half_even"
    target: float | None = ROWS
    """None: measured for information."""

    @property
    def spec(self) -> QuantSpec:
        """The preset with this granularity and rounding."""
        preset = replace(PRESETS[self.preset], rounding=self.rounding)
        return replace(preset, granularity=GRANULARITIES[self.along]) if self.along in GRANULARITIES else preset

    @property
    def packed(self) -> bool:
        """Whether codes share bytes."""
        return self.spec.element.bits < 8

    @property
    def reads_twice(self) -> bool:
        """Whether a scale of the whole tensor must be known before the first element can be quantized."""
        return self.dynamic and (self.along == "per tensor" or self.spec.scale_format == "e4m3")

    def __str__(self) -> str:
        words = [f"{self.operation} {self.preset}"]
        words += [self.along] if self.along in GRANULARITIES else []
        words += [self.rounding] if self.rounding != "half_even" else []
        words += ["dynamic"] if self.dynamic and self.along in GRANULARITIES else []
        return ", ".join(words)


GIVEN = (
    *(("int8", along) for along in ("per tensor", "per channel", LAST_AXIS, "per token")),
    ("fp8_e4m3", "per tensor"),
    ("int4", "groups of 128"),
)

CASES = (
    *(Case(operation, *how) for how in GIVEN for operation in OPERATIONS),
    # Block formats are dynamic where they are made.
    *(Case(operation, preset, dynamic=operation != "dequantize") for preset in BLOCKS for operation in OPERATIONS),
    *(Case(operation, "fp8_e4m3", "per token", True, target=DYNAMIC) for operation in OPERATIONS[:2]),
    Case("dequantize", "fp8_e4m3", "per token"),
    *(Case(operation, "int8", "per tensor", rounding="stochastic", target=STOCHASTIC) for operation in OPERATIONS[:2]),
    *(Case("lsq_backward", "int8", along, target=LEARNED) for along in ("per tensor", "per channel")),
    *(Case(operation, "int8", "per tensor", True, target=None) for operation in OPERATIONS[:2]),
)

FEW_CASES = (
    *(Case(operation, "int8", "per tensor") for operation in OPERATIONS),
    Case("quantize", "mxfp8_e4m3", dynamic=True),
    Case("quantize", "nvfp4", dynamic=True),
    Case("quantize", "fp8_e4m3", "per token", True),
    Case("fake_quantize", "int8", "per tensor", True),
)

CAST = "x.to(torch.float8_e4m3fn)"
AO, AO_COMPILED = "torchao", "torchao, compiled"


def against(case: Case, *, quick: bool) -> list[str]:
    """Return the contenders of a case."""
    names = [TORCH_OWN["per channel" if case.along == LAST_AXIS else case.along]] if has_torch_own(case) else []
    names += [CAST] if (case.operation, case.preset, case.along) == ("quantize", "fp8_e4m3", "per tensor") else []
    names += ["torch eager", "torch.compile"]
    names += [AO, AO_COMPILED] if case.operation == "quantize" and case.preset in BLOCKS else []
    return [name for name in names if not (quick and "compile" in name)]


def has_torch_own(case: Case) -> bool:
    """Return whether torch has this fake quantization."""
    is_alike = (case.operation, case.preset, case.rounding) == ("fake_quantize", "int8", "half_even")
    return is_alike and not case.dynamic and case.along in (*TORCH_OWN, LAST_AXIS)


# ---- sizes -----------------------------------------------------------------------------------------------------------


def shape_of(case: Case, elements: int) -> tuple[int, ...]:
    """Return the shape of x: rows, or, where its tokens have scales, a batch of 8."""
    columns = min(COLUMNS, elements // 8)
    rows = elements // columns
    return (8, rows // 8, columns) if case.along == "per token" else (rows, columns)


def moved(case: Case, elements: int, dtype: str) -> int:
    """Return the bytes that must be read or written once: the size of all inputs and outputs."""
    shape = shape_of(case, elements)
    whole, spec = schema.plan(case.spec, shape, packed=case.packed)
    parts = schema.made_parts(whole, spec, shape, case.packed)
    sizes = {name: prod(part.shape) * item_size(part.dtype) for name, part in parts.items() if part}
    codes, x = sizes.pop("qvalue"), data_bytes(elements, dtype)
    scales = sum(sizes.values())
    match case.operation:
        case "fake_quantize":
            return 2 * x + scales
        case "lsq_backward":
            return 3 * x + 2 * scales
    return x + codes + scales


def data_bytes(elements: int, dtype: str) -> int:
    """Return the size of x."""
    return elements * item_size(dtype)


def item_size(dtype: str) -> int:
    """Return the bytes of an element."""
    size: int = torch_dtype(dtype).itemsize
    return size


def limit_of(case: Case, elements: int, dtype: str) -> float:
    """Return the most that can be had of a copy's GB/s: less than 1 where x is read twice, and counted once."""
    size = moved(case, elements, dtype)
    return size / (size + data_bytes(elements, dtype) * case.reads_twice)


def sets_of(size: int, footprint: int = FOOTPRINT) -> int:
    """Return how many sets of arrays of this size together calls take turns over."""
    return max(1, ceil(footprint / size))


# ---- the calls -------------------------------------------------------------------------------------------------------


class Operands(NamedTuple):
    """What a case is computed from, on one device."""

    x: Any
    q: Any
    """x as a QTensor, by dynamic scales."""
    scale: Any
    """What is given; None: nothing."""
    grad: Any
    seed: Any
    out: Any


def numbers(shape: tuple[int, ...], dtype: str, device: str, seed: int = 0) -> Any:
    """Return normally distributed numbers."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=torch_dtype(dtype))


def operands(case: Case, x: Any) -> Operands:
    """Return what follows from x, by the functions that are measured."""
    import torch

    import quark_torch

    seed = torch.tensor(1, device=x.device) if case.rounding == "stochastic" else None
    q = quark_torch.quantize(x, case.spec, packed=case.packed, seed=seed)
    scale = None if case.dynamic else q.scale
    grad = x.flip(0) if case.operation == "lsq_backward" else None
    # Dynamic scales and a result in one's own memory are two passes.
    out = torch.empty_like(x) if case.operation == "fake_quantize" and not case.dynamic else None
    return Operands(x, q, scale, grad, seed, out)


def ours(case: Case, t: Operands) -> Call:
    """Return the call that is measured."""
    import torch

    import quark_torch

    how: dict[str, Any] = {"scale": t.scale, "seed": t.seed}
    match case.operation:
        case "fake_quantize":
            return lambda: quark_torch.fake_quantize(t.x, case.spec, out=t.out, **how)
        case "quantize":
            return lambda: quark_torch.quantize(t.x, case.spec, packed=case.packed, **how)
        case "dequantize":
            return lambda: quark_torch.dequantize(t.q)
    x = t.x.detach().requires_grad_()
    scale = (t.scale / 2).flatten().requires_grad_()  # some of x exceeds it
    axis = 0 if case.along == "per channel" else None
    y = quark_torch.lsq_quantize(x, scale, quant_min=-128, quant_max=127, axis=axis)
    return lambda: torch.autograd.grad(y, (x, scale), t.grad, retain_graph=True)


def arrays_of(result: Any) -> list[Any]:
    """Return the tensors of a result."""
    if hasattr(result, "ARRAYS"):
        return [a for name in result.ARRAYS if (a := getattr(result, name)) is not None]
    return list(result) if isinstance(result, tuple) else [result]


def data_of(result: Any) -> Any:
    """Return the first of them: codes, numbers, or the gradient of x."""
    return arrays_of(result)[0]


# ---- the same bits ---------------------------------------------------------------------------------------------------


def same_bits(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    """Return whether tensors, on any devices, have the same shapes, dtypes and bits."""
    import torch

    def data(t: Any) -> Any:
        return t.detach().cpu().reshape(-1).view(torch.uint8)

    return len(ours) == len(theirs) and all(
        (a.shape, a.dtype) == (b.shape, b.dtype) and torch.equal(data(a), data(b))
        for a, b in zip(ours, theirs, strict=True)
    )


def why_wrong(case: Case, dtype: str, device: str, elements: int = CHECKED) -> str | None:
    """Return why a case mustn't be timed: None where the device gives the CPU's bits."""
    x = numbers(shape_of(case, elements), dtype, "cpu")
    x *= numbers((*x.shape[:-1], 1), dtype, "cpu", 1).exp()
    found = []
    try:
        for place in ("cpu", device):
            t = operands(case, x.to(place))
            result = arrays_of(ours(case, t)())
            found.append([*result, *arrays_of(t.q)])
    except Exception as error:
        return reason(error)
    return None if same_bits(*found) else "its bits aren't those of the CPU"


def reason(error: Exception) -> str:
    """Return the first line of what an exception says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


# ---- contenders ------------------------------------------------------------------------------------------------------

# As in plain.py: of x in groups that share a scale, s the scales, c the codes.
MORE_EXPRESSIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("fake_quantize", "int4"): lambda f, x, s, c: f.clip(f.round(x / s), -8, 7) * s,
    ("dequantize", "fp4"): lambda f, x, s, c: f.fp4_values(fp4_codes(f, c)) * s,
    ("fake_quantize", "stochastic"): lambda f, x, s, c: randomly_rounded(f, x / s) * s,
    ("quantize", "stochastic"): lambda f, x, s, c: f.cast(randomly_rounded(f, x / s), f.int8),
    ("lsq_backward", "int8"): lambda f, x, s, c: f.lsq_gradients(x, c, s),
}


def fp4_codes(f: Any, packed: Any) -> Any:
    """Two codes of every byte, as indices."""
    return f.torch.stack([packed & 15, packed >> 4], -1).flatten(-2).to(f.torch.int32)


def randomly_rounded(f: Any, v: Any) -> Any:
    """Integers of 8 bits: up with the probability of the distance from the one below."""
    return f.clip(f.torch.floor(v + f.torch.rand_like(v)), -128, 127)


def formula(case: Case, device: str) -> Callable[..., Any]:
    """Return what a user would write, as a function of `arguments`."""
    import torch

    with torch.device(device):
        f = Torch()
    kind = case.rounding if case.rounding == "stochastic" else case.spec.format
    expression = (EXPRESSIONS | MORE_EXPRESSIONS)[case.operation, kind]

    def run(data: Any, scale: Any, other: Any, dtype: Any) -> Any:
        if scale is None:
            data = data.float()
            scale = f.dynamic_scales(data, case.spec)
        y = expression(f, data, scale, other)
        return y.to(dtype) if case.operation in ("fake_quantize", "dequantize") else y

    return run


def arguments(case: Case, t: Operands) -> tuple[Any, ...]:
    """Return what the formula takes: data in groups, their scales, the gradient or codes, and the result's dtype."""
    data = t.q.qvalue if case.operation == "dequantize" else t.x
    _, spec = schema.plan(case.spec, tuple(t.x.shape))
    normal = spec.scale_shape(tuple(t.x.shape))
    grouped = tuple(data.shape) if case.along == LAST_AXIS else (*normal, -1)
    scale: Any = None
    if not case.dynamic:
        scale = t.q.scale.float() * (1 if t.q.global_scale is None else t.q.global_scale)
        scale = scale.reshape(normal if case.along == LAST_AXIS else (*normal, 1))
    other = data
    if case.operation == "lsq_backward":
        scale, other = scale / 2, t.grad
    return data.reshape(grouped), scale, other.reshape(grouped), t.x.dtype


def contender(name: str, case: Case, device: str) -> Callable[[Operands], Call]:
    """Return what makes a contender's call of operands."""
    import torch

    def affine(t: Operands) -> Call:
        if name == TORCH_OWN["per tensor"]:
            return partial(torch.fake_quantize_per_tensor_affine, t.x, t.scale.item(), 0, -128, 127)
        scale, axis = t.scale.flatten(), 1 if case.along == LAST_AXIS else 0
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return partial(torch.fake_quantize_per_channel_affine, t.x, scale, zero, axis, -128, 127)

    if name in TORCH_OWN.values():
        return affine
    if name == CAST:
        return lambda t: partial(t.x.to, torch.float8_e4m3fn)
    if name in (AO, AO_COMPILED):
        if not find_spec("torchao"):
            raise ImportError("not installed (pip install --group peers)")
        change = compiled if name == AO_COMPILED else lambda call: call
        return lambda t: change(torchao_call(case.preset, t.x, t.q))
    run = formula(case, device)
    run = compiled(run) if name == "torch.compile" else run
    return lambda t: partial(run, *arguments(case, t))


def check(case: Case, name: str, t: Operands, result: Any) -> None:
    """Raise AssertionError where a contender computes something else than ours."""
    import quark_torch

    # A cast has no scale.
    mine = quark_torch.quantize(t.x, case.spec, scale=1.0) if name == CAST else ours(case, t)()

    def pairs() -> Iterator[tuple[Any, Any]]:
        yield data_of(mine).float().reshape(-1), data_of(result).float().reshape(-1)

    Contest({}, 0, pairs, NEAR_X if case.rounding == "stochastic" else TOLERANCE).check()


# ---- measuring -------------------------------------------------------------------------------------------------------


class Gpu:
    """What measuring needs of the device: the only code here that can't run without one."""

    device = "cuda"
    footprint = FOOTPRINT

    def seconds(self, call: Call, launches: int) -> float:
        """Return the seconds between two launches of a call, one behind the other."""
        import torch

        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        call()
        start.record()
        for _ in range(launches):
            call()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3 / launches

    def captured(self, call: Call, count: int) -> Call:
        """Return a call that replays a graph of so many calls: none of the host's time is left."""
        import torch

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                call()
        return graph.replay

    def host_seconds(self, call: Call, count: int) -> float:
        """Return the seconds that the host takes for a call, which it doesn't wait for."""
        self.wait()
        start = time.perf_counter()
        for _ in range(count):
            call()
        took = time.perf_counter() - start
        self.wait()
        return took / count

    def wait(self) -> None:
        """Wait for all that is running."""
        import torch

        torch.cuda.synchronize()

    def clear(self) -> None:
        """Give back the memory of what has been dropped."""
        import torch

        gc.collect()
        torch.cuda.empty_cache()

    def described(self) -> dict[str, Any]:
        """Return what the device is, and whose software runs it."""
        import torch

        found = torch.cuda.get_device_properties(0)
        hip = torch.version.hip
        return {
            "gpu": found.name,
            "architecture": getattr(found, "gcnArchName", "") if hip else f"sm_{found.major}{found.minor}",
            "processors": found.multi_processor_count,
            "memory": f"{found.total_memory / GIB:.0f} GiB",
            "L2 cache": f"{getattr(found, 'L2_cache_size', 0) / MIB:.0f} MiB",
            "driver": driver(),
            **({"rocm": hip} if hip else {"cuda": torch.version.cuda}),
        }


def driver(root: Path = Path("/")) -> str:
    """Return the version of NVIDIA's or AMD's kernel module."""
    for path in ("proc/driver/nvidia/version", "sys/module/amdgpu/version"):
        if (root / path).exists():
            text = (root / path).read_text()
            found = re.search(r"\b\d+(\.\d+){1,3}\b", text)
            return found[0] if found else text.splitlines()[0]
    return "unknown"


def in_turn(calls: Sequence[Call]) -> Call:
    """Return a call that is the first, then the second, and so on, and then the first again.

    Results are kept until their turn comes again: else all would be in the same memory.
    """
    turns, kept = cycle(calls), deque[Any](maxlen=len(calls) - 1)
    return lambda: kept.append(next(turns)())


def copy_of(size: int, device: str) -> Call:
    """Return the yardstick: a copy that reads half of the bytes and writes the other half."""
    import torch

    source, target = (torch.full((size // 2,), i, dtype=torch.uint8, device=device) for i in range(2))
    return lambda: target.copy_(source)


def interleaved(
    gpu: Gpu, calls: dict[str, Call], rounds: int, launches: dict[str, int] | None = None
) -> dict[str, list[float]]:
    """Return the seconds of calls that run in turns."""
    if launches is None:
        shortest = {who: min(gpu.seconds(call, 2) for _ in range(2)) for who, call in calls.items()}
        launches = {who: max(FEWEST_LAUNCHES, ceil(SAMPLE / seconds)) for who, seconds in shortest.items()}
    times: dict[str, list[float]] = {who: [] for who in calls}
    end = time.perf_counter() + LONGEST
    for i in range(rounds):
        for who, call in calls.items():
            times[who].append(gpu.seconds(call, launches[who]))
        if i + 1 >= FEWEST_ROUNDS and time.perf_counter() > end:
            break
    return times


def rounded(times: dict[str, list[float]], count: int = 1) -> dict[str, list[float]]:
    """Return the quartiles of one of so many calls, in four digits."""
    return {who: [float(f"{t / count:.4g}") for t in found] for who, found in quartiles(times).items()}


Failed = dict[tuple[str, str], list[str]]
"""Contenders and why they aren't there, with what they aren't there for."""


class Task(NamedTuple):
    """A case to be timed."""

    case: Case
    dtype: str
    size: int
    """Of x, in MiB."""
    against: list[str]

    def __str__(self) -> str:
        return f"{self.case}, {self.dtype}, {self.size} MiB"


def measure_case(task: Task, gpu: Gpu, rounds: int, failed: Failed) -> Row:
    """Return a row. Why a contender isn't in it is added to what failed."""
    case, dtype = task.case, task.dtype
    elements = task.size * MIB // item_size(dtype)
    size = moved(case, elements, dtype)
    sets = sets_of(size, gpu.footprint)
    shape = shape_of(case, elements)
    tensors = [operands(case, numbers(shape, dtype, gpu.device, seed)) for seed in range(sets)]
    calls = {
        "quark": in_turn([ours(case, t) for t in tensors]),
        "copy": in_turn([copy_of(size, gpu.device) for _ in range(sets)]),
    }
    for name in task.against:
        try:
            make = contender(name, case, gpu.device)
            theirs = [make(t) for t in tensors]
            check(case, name, tensors[0], theirs[0]())
        except Exception as error:
            failed.setdefault((name, reason(error)), []).append(str(task))
        else:
            calls[name] = in_turn(theirs)
    return {
        "kind": "case",
        "name": str(case),
        "dtype": dtype,
        "size": task.size,
        "target": case.target,
        "bytes": size,
        "limit": round(limit_of(case, elements, dtype), 4),
        "seconds": rounded(interleaved(gpu, calls, rounds)),
    }


def measure_call(case: Case, gpu: Gpu, rounds: int) -> Row:
    """Return the row of a call on few elements: what the GPU takes in a graph, and what the host takes for a call."""
    import torch

    t = operands(case, numbers(shape_of(case, FEW), "float32", gpu.device))
    one = torch.ones(1, device=gpu.device)
    calls: dict[str, Call] = {"quark": ours(case, t), "empty": lambda: one.add_(1)}
    if has_torch_own(case):
        name = TORCH_OWN[case.along]
        calls[name] = contender(name, case, gpu.device)(t)
    graphs = {who: gpu.captured(calls[who], CAPTURED) for who in ("quark", "empty")}
    times = interleaved(gpu, graphs, rounds, dict.fromkeys(graphs, FEWEST_LAUNCHES))
    host: dict[str, list[float]] = {who: [] for who in calls}
    for _ in range(rounds):
        for who, call in calls.items():
            host[who].append(gpu.host_seconds(call, HOST_CALLS))
    return {
        "kind": "call",
        "name": str(case),
        "target": BEYOND_EMPTY,
        "seconds": rounded(times, CAPTURED),
        "host": rounded(host),
    }


def why_no_jax() -> str | None:
    """Return why JAX isn't measured."""
    if not find_spec("jax"):
        return "not installed"
    try:
        import jax

        import quark_jax  # noqa: F401

        return "it has no GPU" if jax.default_backend() == "cpu" else None
    except (RuntimeError, ImportError) as error:
        return reason(error)


def jax_jobs(size: int, rounds: int) -> list[Job]:
    """Return quark_jax under jit against jnp under jit, as bench.py has them: by the host's clock, which waits."""
    elements = size * MIB // item_size("float32")
    return [Job(case, elements, 1, rounds, (JITTED.peer,)) for case in PEERS if case.framework == "jax"]


def plan(sizes: Sequence[int], *, quick: bool) -> list[Task]:
    """Return the cases of a run. Contenders run at the first size."""
    return [
        Task(case, dtype, size, against(case, quick=quick) if size == sizes[0] else [])
        for size in sizes
        for dtype in DTYPES
        for case in CASES
    ]


def measure_all(run: Run, sizes: Sequence[int], gpu: Gpu, *, quick: bool, elements: int = CHECKED) -> None:
    """Check the bits of every case, then measure those that are right, with a progress bar on stderr."""
    rounds = QUICK_ROUNDS if quick else ROUNDS
    checked: dict[tuple[Case, str, int], str | None] = dict.fromkeys(
        [
            *((case, dtype, elements) for dtype in DTYPES for case in CASES),
            *((case, "float32", FEW) for case in FEW_CASES),
        ]
    )
    tasks = plan(sizes, quick=quick)
    failed: Failed = {}
    no_jax = why_no_jax()
    jobs = [] if no_jax else jax_jobs(sizes[0], rounds)
    run["left_out"] += [f"jax: {no_jax}"] if no_jax else []
    run["left_out"] += ["torch.compile, all but one size: only without --quick"] if quick else []
    with tqdm(total=len(checked) + len(tasks) + len(FEW_CASES) + len(jobs), unit="row") as bar:

        def attempt(name: str, measure_it: Callable[[], Row]) -> None:
            bar.set_description(name)
            try:
                run["rows"].append(measure_it())
            except Exception as error:
                run["left_out"].append(f"{name}: {reason(error)}")
            gpu.clear()
            bar.update()

        for case, dtype, few in checked:
            bar.set_description(f"bits of {case}, {dtype}")
            checked[case, dtype, few] = why_wrong(case, dtype, gpu.device, few)
            bar.update()
        run["wrong"] += [
            f"{case}, {dtype}, {few} elements: {why}" for (case, dtype, few), why in checked.items() if why
        ]
        right = [task for task in tasks if not checked[task.case, task.dtype, elements]]
        right_few = [case for case in FEW_CASES if not checked[case, "float32", FEW]]
        bar.total -= len(tasks) - len(right) + len(FEW_CASES) - len(right_few)
        for task in right:
            attempt(str(task), partial(measure_case, task, gpu, rounds, failed))
        for case in right_few:
            attempt(f"{case}, {FEW} elements", partial(measure_call, case, gpu, rounds))
        for job in jobs:
            attempt(f"jax: {job.case}", partial(measure, job))
    run["left_out"] += lines_of(failed)


def lines_of(failed: Failed) -> list[str]:
    """Return a line for every reason."""
    more = {which: f", and {len(found) - 1} more" if len(found) > 1 else "" for which, found in failed.items()}
    return [f"{name}: {why} ({failed[name, why][0]}{more[name, why]})" for name, why in failed]


def machine(gpu: Gpu) -> dict[str, Any]:
    """Return what the numbers depend on."""
    kept = ("cpu", "kernel", "quark-kernels", "python", "torch", "jax", "torchao", "date")
    here = report.machine()
    return gpu.described() | {name: here[name] for name in kept if name in here}


# ---- the report ------------------------------------------------------------------------------------------------------

HOW = (
    "Shares are of the GB/s of torch's `copy_` of as many bytes on the device, in the same run. Each byte of every "
    "input and output counts once, also where x must be read twice, because a scale of the whole tensor comes first. "
    "Sizes are those of x. Figures are medians of GPU events around several calls; bold is less than the target. Calls "
    "on few elements are timed in a graph, and once more by the host, which doesn't wait for them. Before a case is "
    "timed, its bits are compared with the CPU's."
)


def section(run: Run) -> str:
    """Return what stands under the heading GPU of docs/performance.md."""
    judged = [met for kind in ("case", "call") for r in report.of_kind(run, kind) if (met := is_met(r)) is not None]
    listed = {**run, "left_out": [*(f"**wrong, and not timed**: {what}" for what in run["wrong"]), *run["left_out"]]}
    parts = [
        "From `python benchmarks/bench_gpu.py --docs`. " + HOW,
        report.described(listed, f"{sum(judged)} of {len(judged)} targets were met."),
        "### On a GPU against a copy",
        case_table(run),
        "### On a GPU against what you would call or write instead",
        contender_table(run),
        f"### On a GPU, calls on {FEW:,} elements",
        call_table(run),
    ]
    if report.of_kind(run, "peer"):
        parts += ["### On a GPU under `jax.jit`", jax_table(run)]
    return "\n\n".join(parts)


def is_met(r: Row) -> bool | None:
    """Return whether a row meets its target; None where it has none."""
    if r["target"] is None:
        return None
    return bool(beyond_empty(r) <= r["target"] if r["kind"] == "call" else report.of_copy(r) >= r["target"])


def beyond_empty(r: Row) -> float:
    """Return the microseconds that a call takes longer than an empty launch, on the GPU's side."""
    return float(r["seconds"]["quark"][1] - r["seconds"]["empty"][1]) * 1e6


def verdict(r: Row, text: str) -> tuple[str, str]:
    """Return what was measured, in bold where it misses its target, and whether it is met."""
    met = is_met(r)
    return f"**{text}**" if met is False else text, {None: "", True: "met", False: "missed"}[met]


def case_table(run: Run) -> str:
    """Return every case as a share of a copy."""
    rows = []
    for r in report.of_kind(run, "case"):
        share, met = verdict(r, f"{report.of_copy(r):.0%}")
        target = "" if r["target"] is None else f"≥ {r['target']:.0%}"
        most = f"x is read twice: {r['limit']:.0%}" if r["limit"] < 1 else ""
        speeds = [f"{report.speed(r, who)[1]:.0f}" for who in ("quark", "copy")]
        rows.append([r["name"], r["dtype"], f"{r['size']} MiB", *speeds, share, target, met, most])
    head = ["case", "dtype", "x", "GB/s", "copy, GB/s", "share", "target", "", "the most"]
    return report.markdown(head, rows)


def contender_table(run: Run) -> str:
    """Return how many times as long as ours contenders take."""
    rows = []
    for r in report.of_kind(run, "case"):
        names = [name for name in r["seconds"] if name not in ("quark", "copy")]
        times = ", ".join(f"{name} {report.times_as_fast(r, name):.2f}x" for name in names)
        if names:
            rows.append([r["name"], r["dtype"], f"{r['size']} MiB", f"{1e6 * r['seconds']['quark'][1]:.0f}", times])
    return report.markdown(["case", "dtype", "x", "µs", "contenders (ours is faster by)"], rows)


def call_table(run: Run) -> str:
    """Return calls on few elements: the GPU's side of them, in a graph, and the host's."""
    rows = []
    for r in report.of_kind(run, "call"):
        more, met = verdict(r, f"{beyond_empty(r):.2f}")
        gpu = [f"{1e6 * r['seconds'][who][1]:.2f}" for who in ("quark", "empty")]
        others = ", ".join(f"{1e6 * t[1]:.1f} {who}" for who, t in r["host"].items() if who not in ("quark", "empty"))
        host = [f"{1e6 * r['host'][who][1]:.1f}" for who in ("quark", "empty")]
        rows.append([r["name"], *gpu, more, f"≤ {r['target']:g}", met, *host, others])
    head = ["call, float32", "GPU, µs", "empty launch, µs", "more, µs", "target", "", "host, µs", "host, empty, µs"]
    return report.markdown([*head, "host, others, µs"], rows)


def jax_table(run: Run) -> str:
    """Return functions of quark_jax under jit against jnp's."""
    rows = [
        [
            r["name"],
            f"{4 * r['elements'] // MIB} MiB",
            f"{1e6 * r['seconds']['quark'][1]:.0f}",
            f"{report.of_copy(r):.0%}",
            f"{report.times_as_fast(r, JITTED.peer):.2f}x",
        ]
        for r in report.of_kind(run, "peer")
    ]
    return report.markdown(
        ["function, float32", "x", "µs", "of a copy's GB/s", f"{JITTED.peer} (ours is faster by)"], rows
    )


# ---- files -----------------------------------------------------------------------------------------------------------


def placed(text: str, part: str) -> str:
    """Return a document with this between its markers. Raises ValueError where they aren't there, once and in order."""
    before, begun, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (begun and ended) or text.count(BEGIN) + text.count(END) != 2:
        raise ValueError(f"expected one {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n\n{part}\n\n{END}{after}"


def write_docs(run: Run, document: Path = DOCUMENT) -> None:
    """Write the section on GPUs."""
    document.write_text(placed(document.read_text(), section(run)))


# ---- the command line ------------------------------------------------------------------------------------------------


def missing() -> str | None:
    """Return what is missing on this machine, in one line; None where there is a GPU."""
    if not find_spec("torch"):
        return "no CUDA device: torch, which looks for it, isn't installed"
    import torch

    if not (torch.version.cuda or torch.version.hip):
        return f"no CUDA device: torch {torch.__version__} is a build without GPUs"
    with warnings.catch_warnings():  # of old drivers, which the error says as well
        warnings.simplefilter("ignore")
        if not torch.cuda.is_available():
            try:
                torch.cuda.init()
            except Exception as error:
                return f"no CUDA device: {reason(error)}"
            return f"no CUDA device: torch {torch.__version__} finds none"
    state = info()["hip" if torch.version.hip else "cuda"]
    return f"no GPU kernels in this build of quark-kernels: {state}" if state.startswith("none") else None


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measure quark-kernels on a GPU, against a copy and its peers.")
    parser.add_argument("--size-mb", type=positive, nargs="+", metavar="MB", help="sizes of x, in MiB: 256 and 1024")
    parser.add_argument("--quick", action="store_true", help="the first size only, fewer rounds, no torch.compile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements there")
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/performance.md")
    options = parser.parse_args(words)
    sizes = tuple(dict.fromkeys(options.size_mb or SIZES))
    options.sizes = sizes[:1] if options.quick else sizes
    return options


def positive(word: str) -> int:
    """Read a number of MiB."""
    if (number := int(word)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def main(words: Sequence[str] | None = None) -> int:
    options = parse(words)
    if why := missing():
        print(why, file=sys.stderr)
        return 2
    if options.docs:
        try:
            placed(DOCUMENT.read_text(), "")  # before the time is spent
        except ValueError as error:
            sys.exit(f"{DOCUMENT}: {error}")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # XLA would take most of the memory
    gpu = Gpu()
    run: Run = {"machine": machine(gpu), "left_out": [], "wrong": [], "rows": []}
    try:
        measure_all(run, options.sizes, gpu, quick=options.quick)
    finally:  # what has been measured is written whatever comes after
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(report.as_json(run))
    print(section(run))
    if options.docs:
        write_docs(run)
    return 1 if run["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
