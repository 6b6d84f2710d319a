"""What a run of `bench.py` says: targets and whether they are met, tables, charts, and docs/performance.md.

`python benchmarks/report.py FILE.json` writes docs/performance.md, what belongs to it, and README.md's sentence on
speed, from a run that was kept.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cases import (
    BEYOND_CACHES,
    CHAIN,
    GIB,
    HUGE,
    IN_L2,
    KIB,
    LARGE,
    LINEAR,
    MIB,
    ROOFLINE,
    SPEEDUP,
    Kernel,
    Overhead,
    Peer,
)
from quark_kernels import info

ROOT = Path(__file__).parent.parent
COPIES = ("memcpy", "torch copy_", "copy")
CHARTS = ("roofline.png", "kernels.png")

Row = dict[str, Any]
Run = dict[str, Any]

# ---- rows ------------------------------------------------------------------------------------------------------------


def row(case: Kernel | Peer | Overhead, elements: int, threads: int, size: int, seconds: dict[str, list[float]]) -> Row:
    """Return what is kept of a measurement."""
    kept: Row = {"kind": type(case).__name__.lower(), "name": str(case)}
    match case:
        case Kernel():
            kept |= {"target": case.target, "target in L2": case.in_l2 if case.target else None}
        case Peer():
            kept |= {
                "framework": case.framework,
                "expected": {a.peer: a.times for a in case.against if a.times and elements in a.elements},
            }
        case Overhead():
            kept |= {"yardstick": case.yardstick, "microseconds": case.microseconds, "times": case.times}
    rounded = {who: [float(f"{t:.4g}") for t in times] for who, times in seconds.items()}
    return kept | {"elements": elements, "threads": threads, "bytes": size, "seconds": rounded}


def of_kind(run: Run, kind: str) -> list[Row]:
    """Return the rows of a kind."""
    return [r for r in run["rows"] if r["kind"] == kind]


def speed(r: Row, who: str = "quark") -> list[float]:
    """Return GB/s at the upper quartile of the times, at their median and at the lower quartile."""
    return [r["bytes"] / t / 1e9 for t in reversed(r["seconds"][who])]


def fastest_copy(r: Row) -> str:
    """Return the yardstick: the fastest of the copies."""
    return min((who for who in COPIES if who in r["seconds"]), key=lambda who: float(r["seconds"][who][1]))


def of_copy(r: Row) -> float:
    """Return ours as a share of the fastest copy's GB/s."""
    return speed(r)[1] / speed(r, fastest_copy(r))[1]


def times_as_fast(r: Row, peer: str) -> float:
    """Return how many times as fast as a peer ours is."""
    return float(r["seconds"][peer][1] / r["seconds"]["quark"][1])


def per_call(r: Row, who: str = "quark") -> float:
    """Return the microseconds of a call on few elements; inside a jit, of one more in a chain."""
    longer = r["seconds"].get(f"{who}, longer chain")
    seconds = r["seconds"][who][1]
    return float((longer[1] - seconds) / CHAIN if longer else seconds) * 1e6


def size_of(r: Row) -> str:
    """Return the bytes of float32 that a kernel's input has, or as many elements of 16 bits."""
    size = 4 * r["elements"]
    unit, name = next(
        (unit, name) for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB"), (1, "B")) if size >= unit
    )
    return f"{size // unit} {name}"


def count(elements: int) -> str:
    """Return a number of elements."""
    return f"{elements // MIB}M" if elements >= MIB else f"{elements // KIB}k"


# ---- targets ---------------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """A line of a table of targets."""

    what: str
    wanted: str
    measured: dict[int, str]
    """By threads."""
    met: dict[int, bool]

    @property
    def cells(self) -> list[str]:
        """The line: what was measured and is less than wanted is in bold."""
        shown = [self.measured[n] if self.met[n] else f"**{self.measured[n]}**" for n in self.met]
        shown += [""] * (2 - len(shown))
        return [self.what, self.wanted, *shown, "yes" if all(self.met.values()) else "no"]


def judged(
    what: str, wanted: str, rows: Sequence[Row], show: Callable[[Row], str], is_met: Callable[[Row], bool]
) -> Target:
    """Return the line of rows that differ in threads."""
    return Target(what, wanted, {r["threads"]: show(r) for r in rows}, {r["threads"]: is_met(r) for r in rows})


def by_name(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Return rows in groups that differ in nothing but threads, in the order of the cases."""
    groups: dict[str, list[Row]] = {}
    for r in rows:
        groups.setdefault(f"{r.get('framework', '')} {r['name']}, {r['elements']}", []).append(r)
    for group in groups.values():
        yield group[0]["name"], group


def targets(run: Run) -> dict[str, list[Target]]:
    """Return the tables of targets by their name."""
    return {
        "large": list(kernel_targets(run, LARGE, "target")),
        "cached": list(kernel_targets(run, IN_L2, "target in L2")),
        "speedup": list(speedup_targets(run)),
        "linear": list(linear_targets(run)),
        "peers": list(peer_targets(run)),
        "overhead": list(overhead_targets(run)),
    }


def kernel_targets(run: Run, size: int, key: str) -> Iterator[Target]:
    """Kernels of one size against a copy."""
    for name, rows in by_name([r for r in of_kind(run, "kernel") if r[key] and 4 * r["elements"] == size]):
        least = rows[0][key]
        yield judged(
            name,
            f"≥ {least:.0%}",
            rows,
            lambda r: f"{of_copy(r):.0%} ({speed(r)[1]:.1f} GB/s)",
            lambda r, least=least: of_copy(r) >= least,  # type: ignore[misc]
        )


def speedup_targets(run: Run) -> Iterator[Target]:
    """Two threads against one, in L2."""
    for name, rows in by_name([r for r in of_kind(run, "kernel") if r["target"] and 4 * r["elements"] == IN_L2]):
        if len(rows) == 2:
            times = rows[0]["seconds"]["quark"][1] / rows[1]["seconds"]["quark"][1]
            yield Target(name, f"≥ {SPEEDUP}x", {2: f"{times:.2f}x"}, {2: times >= SPEEDUP})


def linear_targets(run: Run) -> Iterator[Target]:
    """GB/s of huge inputs against those of smaller ones that no cache holds either."""
    kernels = of_kind(run, "kernel")
    usual = {(r["name"], r["threads"]): speed(r)[1] for r in kernels if 4 * r["elements"] == BEYOND_CACHES}
    for name, rows in by_name([r for r in kernels if 4 * r["elements"] in HUGE]):

        def share(r: Row) -> float:
            return speed(r)[1] / usual[r["name"], r["threads"]]

        yield judged(
            f"{name}, {size_of(rows[0])}",
            f"≥ {LINEAR:.0%} of the GB/s at 256 MiB",
            rows,
            lambda r: f"{share(r):.0%} ({speed(r)[1]:.1f} GB/s)",
            lambda r: share(r) >= LINEAR,
        )


def peer_targets(run: Run) -> Iterator[Target]:
    """Public functions against peers."""
    for name, rows in by_name(of_kind(run, "peer")):
        for peer, times in rows[0]["expected"].items():
            if peer in rows[0]["seconds"]:
                yield judged(
                    f"{name}, {count(rows[0]['elements'])}: {peer}",
                    f"≥ {times}x",
                    rows,
                    lambda r, peer=peer: f"{times_as_fast(r, peer):.1f}x",  # type: ignore[misc]
                    lambda r, peer=peer, times=times: times_as_fast(r, peer) >= times,  # type: ignore[misc]
                )


def overhead_targets(run: Run) -> Iterator[Target]:
    """Calls on few elements."""
    for r in of_kind(run, "overhead"):
        took, times = per_call(r), per_call(r) / per_call(r, r["yardstick"])
        if r["microseconds"]:
            met = took <= r["microseconds"]
            yield Target(r["name"], f"≤ {r['microseconds']} µs", {1: f"{took:.2f} µs"}, {1: met})
        if r["times"]:
            wanted = f"≤ {r['times']}x {r['yardstick']}"
            yield Target(r["name"], wanted, {1: f"{times:.2f}x"}, {1: times <= r["times"]})


# ---- tables ----------------------------------------------------------------------------------------------------------


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; numbers are to the right."""
    line = ["---", *["--:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, line, *rows))


def target_table(lines: Sequence[Target], what: str) -> str:
    """Return a table of targets."""
    if not lines:
        return "Not measured in this run."
    return markdown([what, "target", "1 thread", "2 threads", "met"], [padded(line) for line in lines])


def padded(line: Target) -> list[str]:
    """Return the cells, where only two threads were measured with an empty one for one."""
    what, wanted, first, second, met = line.cells
    return [what, wanted, "", first, met] if list(line.met) == [2] else [what, wanted, first, second, met]


def kernel_table(run: Run) -> str:
    """Return every measurement of a kernel."""
    rows = [
        [
            r["name"],
            size_of(r),
            str(r["threads"]),
            "{1:.1f} ({0:.1f}-{2:.1f})".format(*speed(r)),
            f"{of_copy(r):.0%}",
            "{1:.1f} ({0:.1f}-{2:.1f}) ".format(*speed(r, fastest_copy(r))) + fastest_copy(r),
        ]
        for r in of_kind(run, "kernel")
    ]
    return markdown(["kernel", "size", "threads", "GB/s", "of the copy's", "copy, GB/s"], rows)


def peer_table(run: Run) -> str:
    """Return every measurement of a public function."""
    rows = [
        [
            f"{r['framework']} {r['name']}",
            count(r["elements"]),
            str(r["threads"]),
            "{1:.0f} ({0:.0f}-{2:.0f})".format(*(1e6 * t for t in r["seconds"]["quark"])),
            f"{of_copy(r):.0%}",
            ", ".join(
                f"{peer} {1e6 * times[1]:.0f} ({times_as_fast(r, peer):.1f}x)"
                for peer, times in r["seconds"].items()
                if peer not in (*COPIES, "quark")
            ),
        ]
        for r in of_kind(run, "peer")
    ]
    return markdown(
        ["function", "elements", "threads", "µs", "of a copy's GB/s", "peers, µs (ours is faster by)"], rows
    )


def overhead_table(run: Run) -> str:
    """Return every measurement of a call on few elements."""
    rows = [
        [r["name"], f"{per_call(r):.2f}", f"{per_call(r, r['yardstick']):.2f}", r["yardstick"]]
        for r in of_kind(run, "overhead")
    ]
    return markdown(["call, 1,024 elements", "µs", "yardstick, µs", "yardstick"], rows)


def sections(run: Run) -> dict[str, str]:
    """Return what docs/performance.md takes from a run, by the names of its places."""
    lines = targets(run)
    heads = {
        "large": "kernel, 64 MiB",
        "cached": "kernel, 256 KiB",
        "speedup": "kernel, 256 KiB",
        "linear": "kernel",
        "peers": "function, elements: peer",
        "overhead": "call, 1,024 elements",
    }
    met = sum(all(line.met.values()) for table in lines.values() for line in table)
    everything = [f"{title}\n\n{table(run)}" for title, table in TABLES.items()]
    return {
        "headline": headline(run),
        "machine": described(run, f"{met} of {sum(map(len, lines.values()))} targets were met."),
        **{name: target_table(lines[name], head) for name, head in heads.items()},
        "calls": overhead_table(run),
        "everything": "\n\n".join(everything),
    }


def headline(run: Run) -> str:
    """Return what README.md says of speed."""
    name, peer = "fake_quantize int8, per tensor", "torch.fake_quantize_per_tensor_affine"
    kernels = [r for r in of_kind(run, "kernel") if (r["name"], 4 * r["elements"]) == (name, LARGE)]
    peers = [r for r in of_kind(run, "peer") if r["name"] == name and peer in r["seconds"]]
    most = max((r["elements"] for r in peers), default=0)
    shares = ", ".join(f"{of_copy(r):.0%} ({plural(r['threads'])})" for r in kernels)
    times = ", ".join(f"{times_as_fast(r, peer):.1f} ({plural(r['threads'])})" for r in peers if r["elements"] == most)
    machine = run["machine"]
    return (
        f"On {machine['cores']} cores of an {machine['cpu']} (CPU level {machine['cpu level']}), `fake_quantize` of "
        f"64 MiB of float32 to int8 runs at {shares} of a copy's speed; of {count(most)} elements, allocating, "
        f"{times} times as fast as `{peer}`."
    )


TABLES: dict[str, Callable[[Run], str]] = {
    "Kernels, outputs preallocated:": kernel_table,
    "Public functions, results allocated:": peer_table,
    "Calls:": overhead_table,
}

# ---- the machine -----------------------------------------------------------------------------------------------------


def load() -> float:
    """Return the load average of a minute."""
    return round(os.getloadavg()[0], 1)


def memory(key: str) -> int:
    """Return a number of bytes from /proc/meminfo."""
    found = re.search(rf"{key}: +(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) * KIB if found else 0


def machine() -> dict[str, Any]:
    """Return what the numbers depend on."""
    cpu = dict(
        re.findall(r"^([^\t\n]+)\t+: (.*)$", Path("/proc/cpuinfo").read_text().partition("\n\n")[0], re.MULTILINE)
    )
    huge_pages = re.search(r"\[(\w+)\]", _text(Path("/sys/kernel/mm/transparent_hugepage/enabled")))
    here = info()
    return {
        "cpu": f"{cpu.get('model name', platform.machine())}, family {cpu.get('cpu family')}, model {cpu.get('model')}",
        "cores": len(os.sched_getaffinity(0)),
        "caches": ", ".join(caches()),
        "memory": f"{memory('MemTotal') / GIB:.0f} GiB",
        "huge pages": huge_pages[1] if huge_pages else "unknown",
        "kernel": f"{platform.system()} {platform.release()}",
        "glibc": platform.libc_ver()[1],
        "cpu level": here["cpu_level"],
        "quark-kernels": here["version"],
        "python": platform.python_version(),
        **{name: found for name in ("numpy", "torch", "jax", "torchao", "ml_dtypes") if (found := installed(name))},
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "load before": load(),
    }


def caches() -> Iterator[str]:
    """Return the caches of the first core that hold data."""
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size, shared = (_text(index / name) for name in ("level", "type", "size", "shared_cpu_list"))
        if kind != "Instruction":
            yield f"L{level} {size}" + (" shared" if re.search("[,-]", shared) else " a core")


def _text(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


def installed(package: str) -> str | None:
    """Return the version of a package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def described(run: Run, summary: str) -> str:
    """Return the machine as a list, what wasn't measured, and the summary."""
    lines = [f"- {name}: {value}" for name, value in run["machine"].items()]
    lines += [f"- not measured: {reason}" for reason in run["left_out"]]
    return "\n".join([*lines, "", summary])


# ---- charts ----------------------------------------------------------------------------------------------------------


def draw(run: Run, folder: Path, names: Sequence[str] = CHARTS) -> None:
    """Draw both charts."""
    import matplotlib as mpl

    mpl.use("Agg")
    kernels = sorted(of_kind(run, "kernel"), key=lambda r: r["threads"])
    panels = [(n, list(rows)) for n, rows in groupby(kernels, key=lambda r: int(r["threads"]))]
    title = f"quark-kernels {run['machine']['quark-kernels']} ({run['machine']['cpu level']}), {run['machine']['cpu']}"
    for name, chart in zip(names, (draw_roofline, draw_kernels), strict=True):
        chart(panels, title, folder / name)


def draw_roofline(panels: list[tuple[int, list[Row]]], title: str, path: Path) -> None:
    """Draw GB/s against bytes, a line for each kernel that has every size, and the copy as a black one."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter

    figure, axes = plt.subplots(1, len(panels), figsize=(6.2 * len(panels), 4.8), sharey=True, squeeze=False)
    for axis, (threads, rows) in zip(axes[0], panels, strict=True):
        for name in ROOFLINE:
            line = sorted((r for r in rows if r["name"] == name), key=lambda r: int(r["bytes"]))
            x = [r["bytes"] for r in line]
            low, middle, high = zip(*(speed(r) for r in line), strict=True) if line else ((), (), ())
            (drawn,) = axis.plot(x, middle, marker="o", markersize=3, linewidth=1.4, label=name)
            axis.fill_between(x, low, high, color=drawn.get_color(), alpha=0.2, linewidth=0)
        copies = sorted((r["bytes"], speed(r, fastest_copy(r))[1]) for r in rows if r["name"] == ROOFLINE[0])
        axis.plot(*zip(*copies, strict=True), color="black", linewidth=2, linestyle="--", label="the fastest copy")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: size_of({"elements": int(x) // 4})))
        axis.tick_params(axis="x", labelrotation=45)
        axis.grid(alpha=0.3)
        axis.set_xlabel("bytes read and written")
        axis.set_title(plural(threads), fontsize=10)
    axes[0, 0].set_ylabel("GB/s, read and written")
    axes[0, 0].legend(fontsize=8)
    save(figure, title, path)


def draw_kernels(panels: list[tuple[int, list[Row]]], title: str, path: Path) -> None:
    """Draw every kernel at 64 MiB as a bar, as a share of a copy's speed, with its target."""
    from matplotlib import pyplot as plt

    panels = [(n, [r for r in rows if 4 * r["elements"] == LARGE]) for n, rows in panels]
    tallest = max(len(rows) for _, rows in panels)
    size = (4.5 + 4.2 * len(panels), 1.4 + 0.21 * tallest)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for axis, (threads, rows) in zip(axes[0], panels, strict=True):
        places = np.arange(len(rows))
        shares = [100 * of_copy(r) for r in rows]
        axis.barh(places, shares, 0.7, color=[bar_color(r) for r in rows])
        wanted = [(place, 100 * r["target"]) for place, r in zip(places, rows, strict=True) if r["target"]]
        for place, target in wanted:
            axis.vlines(target, place - 0.45, place + 0.45, color="black", linewidth=1.5)
        axis.axvline(100, color="black", linestyle="--", linewidth=1)
        for place, r, share in zip(places, rows, shares, strict=True):
            axis.text(share + 1, place, f"{speed(r)[1]:.1f}", va="center", fontsize=6)
        axis.set_yticks(places, [r["name"] for r in rows], fontsize=7)
        axis.set_xlabel("% of the fastest copy's GB/s (figures: GB/s); | target", fontsize=8)
        axis.set_title(f"64 MiB of float32 or as many elements, {plural(threads)}", fontsize=9)
        axis.set_xlim(0, 1.1 * max(100, *shares))
        axis.margins(y=0.01)
    axes[0, 0].invert_yaxis()
    save(figure, title, path)


def bar_color(r: Row) -> str:
    """Return the color of a kernel that meets its target, doesn't, or has none."""
    if r["target"] is None:
        return "#9e9e9e"
    return "#2166ac" if of_copy(r) >= r["target"] else "#d6604d"


def plural(threads: int) -> str:
    """Return so many threads."""
    return f"{threads} thread{'s' * (threads > 1)}"


def save(figure: Any, title: str, path: Path) -> None:
    """Write a chart."""
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


# ---- files -----------------------------------------------------------------------------------------------------------


def write(run: Run, folder: Path) -> None:
    """Write the measurements, the tables and the charts."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(as_json(run))
    parts = sections(run)
    (folder / "bench.md").write_text("\n\n".join(part for name, part in parts.items() if name != "calls") + "\n")
    draw(run, folder)


def as_json(run: Run) -> str:
    """Return a run, a row a line."""
    fields = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in run.items() if name != "rows"]
    rows = ",\n".join(json.dumps(r) for r in run["rows"])
    return '{{\n{},\n"rows": [\n{}\n]}}\n'.format(",\n".join(fields), rows)


def write_docs(run: Run, root: Path = ROOT) -> None:
    """Write what a run says into the places for it in README.md and docs/performance.md; and the charts and rows."""
    docs = root / "docs"
    parts = sections(run)
    for document, names in ((root / "README.md", ["headline"]), (docs / "performance.md", [*parts][1:])):
        text = document.read_text()
        for name in names:
            begin, end = f"<!-- {name}: written by benchmarks/report.py -->", f"<!-- /{name} -->"
            before, found, rest = text.partition(begin)
            _, closed, after = rest.partition(end)
            if not (found and closed):
                sys.exit(f"{document}: expected {begin} ... {end}")
            text = f"{before}{begin}\n\n{parts[name]}\n\n{end}{after}"
        document.write_text(text)
    (docs / "performance.json").write_text(as_json(run))
    draw(run, docs / "images", [f"speed_{name}" for name in CHARTS])


if __name__ == "__main__":
    write_docs(json.loads(Path(sys.argv[1]).read_text()))
