"""Speed: of the kernels against a copy, of the public functions against what a user would call or write instead.

    python benchmarks/bench.py [--quick] [--peers] [--output FOLDER] [--docs]

Everything that is compared runs in turns within one process, so that whatever else the machine does hits all alike;
kept are the median and the quartiles. A process has one framework and one thread count. Its malloc keeps what is freed,
so that a call that allocates pays for the allocation, but not each time for fresh pages; OpenMP threads keep to their
cores. Each sample begins with a call that isn't counted, so that no contender finds the caches as another left them.

Written are `bench.json`, `bench.md` and two charts; `--docs` also rewrites docs/performance.md and what belongs to it,
which `benchmarks/report.py FILE.json` does from a run that was kept. `cases.py` says what is measured and expected.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from tqdm import tqdm

import report
from cases import EXTRA, FEW, GIB, HUGE, IN_L2, KERNELS, LARGE, OVERHEADS, PEERS, Kernel, Overhead, Peer
from contenders import Call, Contest, kernel_contest, overhead_contest, peer_contest

THREADS = (1, 2)
ROUNDS, QUICK_ROUNDS = 21, 5
FEWEST_ROUNDS, LONGEST = 3, 4.0  # a slow row ends after this many seconds
SAMPLE = 1e-3  # a sample repeats calls that take less
WARM = 0.25  # a call that takes this long needs none before it
CHECKED = 1 << 18  # elements: larger kernels are checked on fewer


@dataclass(frozen=True)
class Job:
    """One row to be measured."""

    case: Kernel | Peer | Overhead
    elements: int
    threads: int
    rounds: int
    peers: tuple[str, ...] = ()

    @property
    def framework(self) -> str:
        """What the process imports."""
        return "core" if isinstance(self.case, Kernel) else self.case.framework

    def contest(self) -> Contest:
        """Make the calls."""
        match self.case:
            case Kernel():
                return kernel_contest(self.case, self.elements, self.threads)
            case Peer():
                return peer_contest(self.case, self.elements, self.peers)
            case Overhead():
                return overhead_contest(self.case)


# ---- what to measure -------------------------------------------------------------------------------------------------


def plan(*, quick: bool, peers: bool) -> tuple[list[Job], list[str]]:
    """Return the rows of a run, and what isn't measured and why."""
    rounds = QUICK_ROUNDS if quick else ROUNDS
    left_out = [] if len(os.sched_getaffinity(0)) > 1 else ["2 threads: one core is all there is"]
    threads = THREADS[: 1 if left_out else None]
    huge = [size for size in HUGE if report.memory("MemAvailable") < 3.5 * size]
    left_out += [f"{size // GIB} GiB: too little memory is free" for size in huge if not quick]
    names, unavailable = extra_peers() if peers else ([], [f"{', '.join(EXTRA)}: only with --peers"])
    left_out += unavailable
    missing = [name for name in ("torch", "jax") if not find_spec(name)]
    left_out += [f"{name}: not installed" for name in missing]

    jobs = [
        Job(case, size // 4, n, rounds)
        for case in KERNELS
        for size in case.sizes
        for n in threads
        if size not in huge and (not quick or size in (LARGE, IN_L2))
    ]
    jobs += [
        Job(case, elements, n, rounds, kept)
        for case in PEERS
        for elements in (case.sizes[-1:] if quick else case.sizes)
        for n in threads
        if (kept := tuple(a.peer for a in case.against if a.peer not in EXTRA or a.peer in names))
    ]
    jobs += [Job(case, FEW, 1, rounds) for case in OVERHEADS]
    if quick:
        left_out.append("torch.compile, all but two sizes: only without --quick")
        jobs = [replace(job, peers=tuple(name for name in job.peers if name != "torch.compile")) for job in jobs]
    jobs = [
        job for job in jobs if job.framework not in missing and not ("torch" in missing and job.framework == "core")
    ]
    return sorted(jobs, key=process_of), left_out


def extra_peers() -> tuple[list[str], list[str]]:
    """Return which of the other libraries are here, and why the rest isn't."""
    found = [name for name, package in EXTRA.items() if find_spec(package)]
    left_out = [f"{name}: not installed (pip install --group peers)" for name in EXTRA if name not in found]
    return found, [*left_out, "amd-quark: its package and this one both have a module quark.torch.kernel"]


def process_of(job: Job) -> tuple[str, int]:
    """Return what rows that share a process have in common."""
    return job.framework, job.threads


# ---- measuring -------------------------------------------------------------------------------------------------------


def prepare(framework: str, threads: int) -> None:
    """Set up the process that measures."""
    gc.disable()  # `run` collects between rows
    if framework != "jax":
        import torch

        torch.set_num_threads(threads)


def sample(call: Call, repeats: int, *, warm: bool) -> float:
    """Return the seconds of one call, as the mean of a few."""
    if warm:
        call()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def measure(job: Job) -> dict[str, Any]:
    """Check what is computed, run the contenders in turns, and return the row."""
    if isinstance(job.case, Kernel) and job.elements > CHECKED:
        replace(job, elements=CHECKED).contest().check()
        contest = job.contest()
    else:
        contest = job.contest()
        contest.check()
    shortest = {who: min(sample(call, 1, warm=False) for _ in range(3)) for who, call in contest.calls.items()}
    times: dict[str, list[float]] = {who: [] for who in contest.calls}
    end = time.perf_counter() + LONGEST
    for i in range(job.rounds):
        for who, call in contest.calls.items():
            repeats = 1 + int(SAMPLE / shortest[who])
            times[who].append(sample(call, repeats, warm=shortest[who] < WARM))
        if i + 1 >= FEWEST_ROUNDS and time.perf_counter() > end:
            break
    return report.row(job.case, job.elements, job.threads, contest.bytes, quartiles(times))


def quartiles(times: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return the lower quartile, the median and the upper quartile."""
    return {who: np.quantile(values, [0.25, 0.5, 0.75]).tolist() for who, values in times.items()}


def run(jobs: Sequence[Job]) -> Iterator[dict[str, Any]]:
    """Measure every row, with a progress bar on stderr."""
    with tqdm(total=len(jobs), unit="row") as bar:
        for (framework, threads), group in groupby(jobs, key=process_of):
            with (
                patch.dict(os.environ, environment(threads)),
                ProcessPoolExecutor(1, get_context("spawn"), prepare, (framework, threads)) as pool,
            ):
                for job in group:
                    bar.set_description(f"{job.case}, {threads} thread{'s' * (threads > 1)}")
                    yield pool.submit(measure, job).result()
                    pool.submit(gc.collect).result()
                    bar.update()


def environment(threads: int) -> dict[str, str]:
    """Return what must be set before a process starts."""
    return {
        "PJRT_NPROC": str(threads),  # the size of XLA's pool
        "JAX_PLATFORMS": "cpu",
        "OMP_PROC_BIND": "true" if threads > 1 else "false",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(64 * GIB),
    }


# ---- the command line ------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    """Read the command line."""
    root = Path(__file__).parent.parent
    parser = argparse.ArgumentParser(description="Measure quark-kernels against a copy and against its peers.")
    parser.add_argument("--quick", action="store_true", help="64 MiB, 256 KiB and 4M elements only, in fewer rounds")
    parser.add_argument("--peers", action="store_true", help="with torchao and ml_dtypes, where installed")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", default=root / "build" / "bench", help="for the results"
    )
    parser.add_argument("--docs", action="store_true", help="write the results into docs/performance.md, too")
    return parser.parse_args()


def main() -> None:
    if not find_spec("matplotlib"):
        sys.exit("the charts need matplotlib: pip install matplotlib")
    options = parse()
    jobs, left_out = plan(quick=options.quick, peers=options.peers)
    where = report.machine()
    rows: list[report.Row] = []
    measured = {"machine": where, "left_out": left_out, "rows": rows}
    try:
        rows.extend(run(jobs))  # one by one: what has been measured is written whatever comes after
    finally:
        where["load after"] = report.load()
        report.write(measured, options.output)
    print((options.output / "bench.md").read_text())
    if options.docs:
        report.write_docs(measured)


if __name__ == "__main__":
    main()
