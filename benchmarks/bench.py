"""Speed against a copy of the same memory, and against what a user would call or write instead.

    python benchmarks/bench.py [--quick] [--json FILE] [--plot FILE]

A row is one operation on normally distributed float32 numbers, through the public API. The operation, the copy and the
peer run in turns, so that whatever else the machine does hits all three; shown are medians, with quartiles in brackets.
GB/s counts each byte that must be read or written once: 8 a number for fake_quantize and the copy, 5 for quantize and
dequantize. In torch, fake_quantize has `out=` and the copy a target; everything else allocates its result. Each
framework and thread count has a process of its own, where malloc keeps freed memory, so that no contender pays for
fresh pages, and OpenMP threads keep to their cores. Two threads need two idle cores: look at the load.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from quark_kernels import info

Call = Callable[[], Any]

M = 1 << 20
EVERY_SIZE = (M // 16, 4 * M, 16 * M)
COLUMNS = 4096
THREADS = (1, 2)
ROUNDS, QUICK_ROUNDS = 31, 11
SAMPLE_SECONDS = 1e-3  # a sample repeats calls that are shorter

# ---- what is measured: data ------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """One operation; its scale is given, or dynamic (found from x in the same call)."""

    framework: str
    operation: str
    preset: str
    granularity: str = "per tensor"
    dynamic: bool = False
    sizes: tuple[int, ...] = (4 * M,)

    def __str__(self) -> str:
        scale = ", dynamic" if self.dynamic else ""
        return f"{self.framework} {self.operation} {self.preset}, {self.granularity}{scale}"


HEADLINE = Case("torch", "fake_quantize", "int8", sizes=EVERY_SIZE)
CLAIM = 8  # times faster than torch's own, at 4M elements

CASES = (
    HEADLINE,
    Case("torch", "fake_quantize", "int8", dynamic=True),
    Case("torch", "fake_quantize", "int8", "per channel"),
    Case("torch", "fake_quantize", "int8", "groups of 128"),
    Case("torch", "fake_quantize", "fp8_e4m3", sizes=EVERY_SIZE),
    Case("torch", "fake_quantize", "fp8_e4m3", "per channel"),
    Case("torch", "fake_quantize", "fp8_e4m3", "groups of 128"),
    Case("torch", "quantize", "int8"),
    Case("torch", "quantize", "fp8_e4m3"),
    Case("torch", "dequantize", "int8"),
    Case("torch", "dequantize", "fp8_e4m3"),
    Case("jax", "fake_quantize", "int8", sizes=EVERY_SIZE),
    Case("jax", "fake_quantize", "int8", "groups of 128"),
    Case("jax", "fake_quantize", "fp8_e4m3"),
)

ALONG: dict[str, dict[str, int]] = {"per tensor": {}, "per channel": {"axis": 0}, "groups of 128": {"group_size": 128}}

# Ours: f is a framework below, s the scale (None: dynamic), q a QTensor.
OPERATIONS: dict[str, Callable[..., Any]] = {
    "fake_quantize": lambda f, case, x, s, q: f.fake_quantize(x, case.preset, scale=s, **ALONG[case.granularity]),
    "quantize": lambda f, case, x, s, q: f.api.quantize(x, case.preset, scale=s, **ALONG[case.granularity]).qvalue,
    "dequantize": lambda f, case, x, s, q: f.api.dequantize(q),
}

# What a user would write instead: x and s in rows that share a scale, c the codes.
EXPRESSIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("fake_quantize", "int8"): lambda f, x, s, c: f.clip(f.round(x / s), -128, 127) * s,
    ("fake_quantize", "fp8_e4m3"): lambda f, x, s, c: f.cast(f.cast(f.clip(x / s, -448, 448), f.fp8), f.float32) * s,
    ("quantize", "int8"): lambda f, x, s, c: f.cast(f.clip(f.round(x / s), -128, 127), f.int8),
    ("quantize", "fp8_e4m3"): lambda f, x, s, c: f.cast(f.clip(x / s, -448, 448), f.fp8),
    ("dequantize", "int8"): lambda f, x, s, c: f.cast(c, f.float32) * s,
    ("dequantize", "fp8_e4m3"): lambda f, x, s, c: f.cast(c, f.float32) * s,
}


@dataclass(frozen=True)
class Result:
    """Seconds a call of quark, copy and peer: lower quartile, median, upper quartile."""

    case: Case
    elements: int
    threads: int
    peer: str
    seconds: dict[str, list[float]]

    def speed(self, who: str) -> list[float]:
        """Return GB/s at the upper quartile of the times, at their median, and at the lower quartile."""
        width = 8 if who == "copy" or self.case.operation == "fake_quantize" else 5
        return [width * self.elements / t / 1e9 for t in reversed(self.seconds[who])]

    @property
    def of_copy(self) -> float:
        return self.speed("quark")[1] / self.speed("copy")[1]

    @property
    def times_peer(self) -> float:
        return self.seconds["peer"][1] / self.seconds["quark"][1]

    @property
    def size(self) -> str:
        return f"{self.elements // M}M" if self.elements >= M else f"{self.elements // 1024}K"


# ---- the frameworks: in the process that measures --------------------------------------------------------------------


class Torch:
    """torch, eager."""

    expressions = "torch expression"

    def __init__(self, threads: int) -> None:
        import torch

        import quark_torch

        torch.set_num_threads(threads)
        self.torch, self.api = torch, quark_torch
        self.clip, self.round = torch.clip, torch.round
        self.fp8, self.int8, self.float32 = torch.float8_e4m3fn, torch.int8, torch.float32

    def normal(self, rows: int) -> Any:
        self.target = self.torch.zeros(rows, COLUMNS)
        return self.torch.randn(rows, COLUMNS, generator=self.torch.Generator().manual_seed(0))

    def cast(self, a: Any, dtype: Any) -> Any:
        return a.to(dtype)

    def bind(self, function: Callable[..., Any], *arguments: Any) -> Call:
        return lambda: function(*arguments)

    def copy(self, x: Any) -> Call:
        return lambda: self.target.copy_(x)

    def fake_quantize(self, x: Any, preset: str, **arguments: Any) -> Any:
        return self.api.fake_quantize(x, preset, out=self.target, **arguments)

    def library_peer(self, case: Case, x: Any, s: Any) -> tuple[str, Call] | None:
        """Return torch's own function for the case and a call of it, where it has one."""
        if (case.operation, case.preset) != ("fake_quantize", "int8"):
            return None
        if ALONG[case.granularity]:
            name, scale = "fake_quantize_per_channel_affine", s.flatten()
            zero: Any = self.torch.zeros(len(scale), dtype=self.torch.int32)
            arguments: tuple[Any, ...] = (x, scale, zero, 0, -128, 127)
        else:
            name = "fake_quantize_per_tensor_affine"
            arguments = (x, s.item(), 0, -128, 127)
        function = getattr(self.torch, name)
        if case.dynamic:
            return f"abs().max(), torch.{name}", lambda: function(x, x.abs().max().item() / 127, *arguments[2:])
        return f"torch.{name}", lambda: function(*arguments)


class Jax:
    """JAX on the CPU, everything under jit."""

    expressions = "jitted jnp expression"

    def __init__(self, threads: int) -> None:
        import jax

        import quark_jax

        self.jax, self.api = jax, quark_jax
        self.clip, self.round = jax.numpy.clip, jax.numpy.round
        self.fp8, self.int8, self.float32 = jax.numpy.float8_e4m3fn, jax.numpy.int8, jax.numpy.float32
        self.fake_quantize = quark_jax.fake_quantize

    def normal(self, rows: int) -> Any:
        return self.jax.random.normal(self.jax.random.key(0), (rows, COLUMNS))

    def cast(self, a: Any, dtype: Any) -> Any:
        return a.astype(dtype)

    def bind(self, function: Callable[..., Any], *arguments: Any) -> Call:
        compiled = self.jax.jit(function)
        return lambda: compiled(*arguments).block_until_ready()

    def copy(self, x: Any) -> Call:
        return self.bind(self.jax.numpy.copy, x)

    def library_peer(self, case: Case, x: Any, s: Any) -> None:
        return None


FRAMEWORKS: dict[str, type[Torch] | type[Jax]] = {"torch": Torch, "jax": Jax}

# ---- measuring -------------------------------------------------------------------------------------------------------


def contenders(case: Case, elements: int, threads: int) -> tuple[dict[str, Call], str]:
    """Return the calls to compare, and the peer's name."""
    f = FRAMEWORKS[case.framework](threads)
    along = ALONG[case.granularity]
    x = f.normal(elements // COLUMNS)
    scale, _ = f.api.choose_qparams(x, case.preset, **along)
    q = f.api.quantize(x, case.preset, scale=scale, **along)
    in_rows = (x.reshape(-1, along.get("group_size", COLUMNS)), scale.reshape(-1, 1) if along else scale)

    ours = f.bind(lambda x, s, q: OPERATIONS[case.operation](f, case, x, s, q), x, None if case.dynamic else scale, q)
    name, peer = f.library_peer(case, *in_rows) or (
        f.expressions,
        f.bind(lambda *a: EXPRESSIONS[case.operation, case.preset](f, *a), *in_rows, q.qvalue),
    )
    check(f.cast(ours(), f.float32), f.cast(peer().reshape(x.shape), f.float32))
    return {"quark": ours, "copy": f.copy(x), "peer": peer}, name


def check(ours: Any, peers: Any) -> None:
    """Stop unless both computed the same thing; a reciprocal instead of a division may move a few numbers a step."""
    difference = abs(ours - peers).mean() / abs(peers).mean()
    if not difference < 1e-3:
        raise AssertionError(f"the peer computes something else: mean difference {float(difference):.2g}")


def sample(call: Call, repeats: int) -> float:
    """Return the seconds of one call, as the mean of a few."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def measure(case: Case, elements: int, threads: int, rounds: int) -> Result:
    """Run the contenders in turns."""
    calls, peer = contenders(case, elements, threads)
    repeats = {who: 1 + int(SAMPLE_SECONDS / min(sample(call, 1) for _ in range(3))) for who, call in calls.items()}
    times: dict[str, list[float]] = {who: [] for who in calls}
    for _ in range(rounds):
        for who, call in calls.items():
            times[who].append(sample(call, repeats[who]))
    quartiles = {who: statistics.quantiles(values, n=4) for who, values in times.items()}
    return Result(case, elements, threads, peer, quartiles)


def process(threads: int) -> ProcessPoolExecutor:
    """Return a process whose frameworks use that many threads."""
    os.environ.update(
        PJRT_NPROC=str(threads),  # the size of XLA's pool
        JAX_PLATFORMS="cpu",
        OMP_PROC_BIND="true" if threads > 1 else "false",
        MALLOC_MMAP_MAX_="0",
        MALLOC_TRIM_THRESHOLD_=str(1 << 34),
    )
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def run(cases: Sequence[Case], *, quick: bool) -> Iterator[Result]:
    """Measure every case at every size and thread count, with a progress bar on stderr."""
    cores = len(os.sched_getaffinity(0))
    jobs = [
        (case, elements, threads, QUICK_ROUNDS if quick else ROUNDS)
        for threads in THREADS[:cores]
        for case in cases
        for elements in case.sizes
        if not quick or elements == 4 * M
    ]
    with tqdm(total=len(jobs), unit="row") as bar:
        for (_, threads), group in groupby(jobs, key=lambda job: (job[0].framework, job[2])):
            with process(threads) as pool:
                for job in group:
                    bar.set_description(f"{job[0]}, {threads} thread{'s' * (threads > 1)}")
                    yield pool.submit(measure, *job).result()
                    bar.update()


# ---- showing ---------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Return what the numbers depend on."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    here = info()
    return {
        "cpu": models[0].partition(": ")[2] if models else "unknown",
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "quark_kernels": here["version"],
        **{name: here[name] for name in ("cpu_level", "torch", "jax")},
    }


def table(results: Sequence[Result]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| operation | elements | threads | GB/s | of the copy's | times the peer | peer |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for r in results:
        low, middle, high = r.speed("quark")
        lines.append(
            f"| {r.case} | {r.size} | {r.threads} | {middle:.1f} ({low:.1f}-{high:.1f}) | {r.of_copy:.0%} "
            f"| {r.times_peer:.1f} | {r.peer} |"
        )
    return "\n".join(lines)


def headline(results: Sequence[Result]) -> str:
    """Return the README's claim, measured."""
    lines = []
    for r in results:
        if r.case == HEADLINE and r.elements == 4 * M:
            ours, theirs = r.seconds["quark"][1] * 1e3, r.seconds["peer"][1] * 1e3
            lines.append(
                f"float32 fake_quantize int8, 4M elements, {r.threads} thread{'s' * (r.threads > 1)}: {ours:.2f} ms; "
                f"{r.peer}: {theirs:.2f} ms; {r.times_peer:.1f} times faster (claimed: at least {CLAIM})"
            )
    return "\n".join(lines)


def as_json(results: Sequence[Result], where: dict[str, Any]) -> str:
    """Return everything that was measured."""
    rows = [
        {**r.case._asdict(), **asdict(r), "case": str(r.case), "of_copy": r.of_copy, "times_peer": r.times_peer}
        | {f"{who}_gb_per_second": r.speed(who)[1] for who in r.seconds}
        for r in results
    ]
    return json.dumps({"machine": where, "results": rows}, indent=2) + "\n"


def plot(results: Sequence[Result], where: dict[str, Any], path: Path) -> None:
    """Draw GB/s at 4M elements as bars, a panel for each thread count; the line across two bars is the copy."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = [r for r in results if r.elements == 4 * M]
    panels = [list(group) for _, group in groupby(shown, key=lambda r: r.threads)]
    size = (6.5 * len(panels), 1.6 + 0.42 * max(map(len, panels)))
    figure, axes = plt.subplots(
        1, len(panels), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        draw_panel(axis, panel)
    axes[0, 0].invert_yaxis()
    axes[0, 0].legend(loc="lower right")
    title = f"quark-kernels {where['quark_kernels']}, {where['cpu']}, {where['cpu_level']}; 4M elements"
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=120)


def draw_panel(axis: Any, panel: Sequence[Result]) -> None:
    """Draw the results of one thread count."""
    places = range(len(panel))
    for who, shift, color in (("quark", -0.2, "#2166ac"), ("peer", 0.2, "#bdbdbd")):
        low, middle, high = zip(*(r.speed(who) for r in panel), strict=True)
        spread = [[m - v for m, v in zip(middle, low, strict=True)], [v - m for m, v in zip(middle, high, strict=True)]]
        axis.barh(
            [i + shift for i in places], middle, 0.4, xerr=spread, color=color, label=who, error_kw={"elinewidth": 0.8}
        )
    copies = [r.speed("copy")[1] for r in panel]
    axis.vlines(copies, [i - 0.45 for i in places], [i + 0.45 for i in places], color="black", label="copy")
    axis.set_yticks(places, [str(r.case) for r in panel], fontsize=8)
    axis.set_xlabel("GB/s, read and written; more is better")
    axis.set_title(f"{panel[0].threads} thread{'s' * (panel[0].threads > 1)}", fontsize=10)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measure quark-kernels against a copy and against its peers.")
    parser.add_argument("--quick", action="store_true", help="4M elements only, and fewer rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a PNG")
    options = parser.parse_args()
    if options.plot and not find_spec("matplotlib"):
        parser.error("--plot needs matplotlib: pip install matplotlib")
    return options


def main() -> None:
    options, where = parse(), machine()
    results = list(run([case for case in CASES if find_spec(case.framework)], quick=options.quick))
    print(", ".join(f"{name} {value}" for name, value in where.items()), end="\n\n")
    print(table(results), headline(results), sep="\n\n")
    if options.json:
        options.json.write_text(as_json(results, where))
    if options.plot:
        plot(results, where, options.plot)


if __name__ == "__main__":
    main()
