"""Draw an atlas of the number formats: PNG pages that each answer one question about them.

    python interop_examples/format_atlas.py [--out DIR] [--formats NAME ...] [--framework torch|jax] [--quick | --docs]

Nine pages compare formats: which keeps most for its bits, which has range and which precision, what an outlier, a scale
rule or a smaller block does. One more page for each preset shows its values, its steps and its error. Every number
drawn is what `quantize` and `fake_quantize` returned, so both frameworks draw the same pages. `--formats` chooses whose
pages are drawn, `--quick` draws three of them, and all pages small; `--docs` draws what the documentation shows.
"""

from __future__ import annotations

import argparse
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tqdm import tqdm

import quark_kernels
from quark_kernels import PRESETS, PerGroup, PerTensor, QuantSpec

Array = NDArray[Any]

FRAMEWORKS = ("torch", "jax")
QUICK_FORMATS = ("int4", "fp8_e4m3", "mxfp4")
DOCS_PAGES = ("sqnr_weights", "precision", "format_mxfp4")
DOCS_FOLDER = Path(__file__).parent.parent / "docs" / "images"
INCHES = (13.5, 7.6)
DPI, QUICK_DPI, DOCS_DPI = 120, 50, 80

# ---- numbers: what the library returns -------------------------------------------------------------------------------


class Frontend:
    """One framework behind NumPy arrays."""

    def __init__(self, name: str) -> None:
        """Import torch or JAX."""
        if name == "torch":
            import torch

            import quark_torch

            self.api: Any = quark_torch
            self.array: Callable[[Array], Any] = torch.from_numpy
            self.compiled: Callable[[Any], Any] = lambda function: function
        else:
            import jax

            import quark_jax

            self.api = quark_jax
            self.array = partial(jax.device_put, device=jax.local_devices(backend="cpu")[0])
            self.compiled = jax.jit  # several small programs in one

    def fake_quantize(self, x: Array, spec: str | QuantSpec, **options: Any) -> Array:
        """Return what the library's `fake_quantize` makes of a NumPy array."""
        return np.asarray(self.api.fake_quantize(self.array(x.astype(np.float32)), spec, **options)).astype(np.float64)

    def measure(self, arrays: Sequence[Array], spec: str | QuantSpec, **options: Any) -> tuple[float, float]:
        """Return bits per value, scales included, and SQNR in dB, over all arrays together."""

        def there_and_back(inputs: list[Any]) -> list[tuple[Any, Any]]:
            return [(q, q.dequantize()) for q in (self.api.quantize(x, spec, **options) for x in inputs)]

        codes, results = zip(*self.compiled(there_and_back)([self.array(x) for x in arrays]), strict=True)
        bits = sum(q.bits_per_value * x.size for q, x in zip(codes, arrays, strict=True))
        return bits / sum(x.size for x in arrays), sqnr(arrays, map(np.asarray, results))


def sqnr(arrays: Iterable[Array], results: Iterable[Array]) -> float:
    """Return signal to quantization noise in dB; infinite where nothing was lost."""
    signal = noise = 0.0
    for x, y in zip(arrays, results, strict=True):
        signal += float(np.sum(x.astype(np.float64) ** 2))
        noise += float(np.sum((y.astype(np.float64) - x) ** 2))
    return 10 * math.log10(signal / noise) if noise else math.inf


def decibels(rms: Array) -> Array:
    return -20 * np.log10(rms)


@cache
def digits(name: str) -> list[Array]:
    """Return the "weights" of the library's digit classifier, or its held-out "images" from 0 to 1."""
    arrays = load_file(Path(quark_kernels.__file__).with_name("data") / "digits.safetensors")
    if name == "images":
        return [arrays["images"].astype(np.float32) / 16]
    return [arrays[f"layers.{i}.weight"] for i in range(3)]


def normal(*shape: int) -> Array:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


@cache
def on_data(frontend: Frontend, preset: str, data: str) -> tuple[float, float]:
    """Return bits per value and SQNR; presets with one scale have one per output channel for weights."""
    one_scale = PRESETS[preset].granularity == PerTensor() and not PRESETS[preset].element.is_cast
    return frontend.measure(digits(data), preset, **({"axis": 0} if one_scale and data == "weights" else {}))


def at_scale_one(frontend: Frontend, preset: str, x: Array) -> Array:
    """Fake-quantize every x with scale 1: in block formats first in a block of zeros and the largest value."""
    spec = PRESETS[preset]
    if spec.element.is_cast:
        return frontend.fake_quantize(x, preset)
    if not isinstance(spec.granularity, PerGroup):
        return frontend.fake_quantize(x, preset, scale=1.0)
    blocks = np.zeros((x.size, spec.granularity.size))
    blocks[:, 0], blocks[:, -1] = x, spec.element.hi
    return frontend.fake_quantize(blocks, preset, **({"scale": 1.0} if spec.scale_format == "e4m3" else {}))[:, 0]


@cache
def grid(frontend: Frontend, preset: str) -> Array:
    """Return all values of a preset at scale 1: what it makes of numbers among which all of them are."""
    spec = PRESETS[preset]
    bfloat16 = (np.arange(0x7F80, dtype=np.uint32) << 16).view(np.float32)
    float16 = np.arange(0x7C00, dtype=np.uint16).view(np.float16)
    x = np.unique(np.concatenate([bfloat16, float16, np.arange(65536)]).astype(np.float64))
    low = spec.element.lo if spec.granularity == PerTensor() else -spec.element.hi
    x = np.concatenate([-x[x <= -low], x[x <= spec.element.hi]])
    return np.unique(at_scale_one(frontend, preset, x) + 0.0)  # + 0.0 makes -0 a 0


def relative_error(frontend: Frontend, preset: str, low: Array, high: Array) -> tuple[Array, Array]:
    """Return the worst and the root mean square relative error, at scale 1, of numbers from each low to its high."""
    places = np.arange(512) * 0.6180339887498949 % 1  # evenly spread, and on no format's grid
    x = (low[:, None] + (high - low)[:, None] * places).astype(np.float32).astype(np.float64)
    error = np.abs(at_scale_one(frontend, preset, x.ravel()).reshape(x.shape) - x)
    return (error / x).max(axis=1), np.sqrt(np.sum(error**2, axis=1) / np.sum(x**2, axis=1))


class Octaves(NamedTuple):
    """Relative errors from half the largest value up to it, from a quarter to half of it, and so on down."""

    middle: Array  # powers of two below the largest value
    worst: Array
    rms: Array


@cache
def octaves(frontend: Frontend, preset: str) -> Octaves:
    values = grid(frontend, preset)
    below = np.arange(math.ceil(math.log2(values[-1] / values[values > 0][0])) + 2)
    high = values[-1] / 2.0**below
    return Octaves(-0.5 - below, *relative_error(frontend, preset, high / 2, high))


# ---- how pages look --------------------------------------------------------------------------------------------------

# Okabe and Ito's colours. Whatever has a colour has a marker or a line style of its own as well.
BLUE, RED, GREEN, BLACK, PINK, ORANGE = COLOURS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#E69F00")
MARKERS = ("o", "s", "^", "X", "D", "P")
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (1, 1.2)), (0, (6, 2, 1.5, 2)), (0, (3, 1.5)), (0, (10, 2, 3, 2)))
GREY, PALE = "#595959", "#DDDDDD"

STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.labelsize": 13,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 14,
    "axes.titleweight": "bold",
    "font.size": 12,
    "grid.color": PALE,
    "legend.fontsize": 12,
    "legend.frameon": False,
    "xtick.color": GREY,
    "xtick.labelcolor": BLACK,
    "ytick.color": GREY,
    "ytick.labelcolor": BLACK,
}


class Family(NamedTuple):
    """Presets that are scaled alike, and how they are drawn."""

    name: str
    colour: str
    marker: str


FAMILIES = {
    "integer": Family("integers, float32 scale", BLUE, "o"),
    "float": Family("4 to 8 bit floats, float32 scale", RED, "s"),
    "e8m0": Family("MX: a power of two scales 32", GREEN, "^"),
    "e4m3": Family("NVFP4: an fp8 number scales 16", ORANGE, "P"),
    "exponent": Family("shared exponent for 8 or 16", PINK, "D"),
    "cast": Family("16-bit floats, no scale", BLACK, "X"),
}


def family(preset: str) -> Family:
    spec = PRESETS[preset]
    if spec.element.is_cast:
        return FAMILIES["cast"]
    if spec.scale_format == "float32":
        return FAMILIES["integer" if spec.element.is_integer else "float"]
    return FAMILIES[spec.scale_format.replace("microexponents", "exponent")]


def line(i: int) -> dict[str, Any]:
    """The look of a chart's line number i."""
    return {"color": COLOURS[i], "linestyle": DASHES[i], "marker": MARKERS[i], "markersize": 6, "linewidth": 2}


def page(question: str, answer: str) -> Figure:
    """Begin a page: the question that it answers, and how to read the answer."""
    figure = Figure(figsize=INCHES, facecolor="white")
    figure.text(0.03, 0.97, question, size=23, weight="bold", va="top")
    figure.text(0.03, 0.9, textwrap.fill(answer, 135), size=13, va="top", color=GREY, linespacing=1.35)
    return figure


def panels(figure: Figure, rows: int, columns: int, *, share: str = "none", **frame: Any) -> Any:
    """Divide a page below its heading."""
    frame = {"left": 0.075, "right": 0.97, "top": 0.77, "bottom": 0.1, "wspace": 0.18, "hspace": 0.32} | frame
    return figure.subplots(rows, columns, gridspec_kw=frame, sharex=share == "x", sharey=share == "y")


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Return places in the same order, at least `gap` apart, and as near to the wanted ones as can be."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    runs: list[tuple[float, int]] = []  # of places that push each other: the mean of wanted - rank * gap, how many
    for rank, i in enumerate(order):
        mean, n = wanted[i] - rank * gap, 1
        while runs and runs[-1][0] > mean:
            before, count = runs.pop()
            mean, n = (before * count + mean * n) / (count + n), count + n
        runs.append((mean, n))
    means = [mean for mean, n in runs for _ in range(n)]
    placed = {i: mean + rank * gap for rank, (i, mean) in enumerate(zip(order, means, strict=True))}
    return [placed[i] for i in range(len(wanted))]


def label(axes: Axes, points: dict[str, tuple[float, float]], x: float, inches: float = 0.21) -> None:
    """Name points in a column that begins at x, each name tied to its point."""
    low, high = axes.get_ylim()
    height = axes.get_position().height * INCHES[1]
    gap = inches * (high - low) / height
    for (name, point), y in zip(points.items(), spread([y for _, y in points.values()], gap), strict=True):
        tie = {"arrowstyle": "-", "color": GREY, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 4}
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axes.annotate(name, point, (x, y), va="center", size=12, arrowprops=tie, bbox=box, annotation_clip=False)


def percent(value: float, _: object = None) -> str:
    return f"{100 * value:.2g} %" if value < 0.995 else "100 %"


def power(exponent: int) -> str:
    return "2" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def number(value: float) -> str:
    """Write a positive value plainly, or as a power of two where that is shorter."""
    exponent = math.log2(value)
    is_power = exponent == round(exponent)
    return power(round(exponent)) if is_power and not 0.1 < value < 1e5 else f"{value:.7g}"


# ---- pages that compare ----------------------------------------------------------------------------------------------


def sqnr_page(frontend: Frontend, data: str, question: str, answer: str) -> Figure:
    points = {preset: on_data(frontend, preset, data) for preset in PRESETS}
    figure = page(question, answer)
    left, right = panels(figure, 1, 2, width_ratios=[6, 1], wspace=0.12)
    for axes, lowest, highest, step in ((left, 0, 12, 10), (right, 12, 20, 20)):
        shown = {preset: point for preset, point in points.items() if lowest <= point[0] < highest}
        largest = max(db for _, db in shown.values() if math.isfinite(db))
        exact = 1.1 * largest  # where results without an error are drawn
        if any(math.isinf(db) for _, db in shown.values()):
            axes.axhline(exact, color=GREY, linewidth=1)
        shown = {preset: (bits, min(db, exact)) for preset, (bits, db) in shown.items()}
        axes.set(ylim=(0, exact * 1.08), yticks=np.arange(0, largest + step / 2, step))
        for order, kind in enumerate(FAMILIES.values()):
            of_kind = [shown[preset] for preset in shown if family(preset) == kind] or [(math.nan, math.nan)]
            look = {"marker": kind.marker, "label": kind.name, "zorder": 9 - order}  # smaller ones lie on top
            axes.scatter(*zip(*of_kind, strict=True), 60 + 15 * order, kind.colour, **look)
        for low, high in ((0, 2.9), (2.9, 3.9), (3.9, 5.5), (5.5, 7.5), (7.5, 12), (12, 20)):  # a column of names each
            cluster = {preset: point for preset, point in shown.items() if low <= point[0] < high}
            label(axes, cluster, max((bits for bits, _ in cluster.values()), default=0) + 0.25)
    best, stairs = -math.inf, []
    for bits, db in sorted(points.values()):
        if db > best and bits < 12:
            best = db
            stairs.append((bits, min(db, left.get_ylim()[1] / 1.08)))
    left.step(*zip(*stairs, strict=True), where="post", color=GREY, linewidth=1, linestyle=DASHES[1], zorder=1)
    if math.isinf(best):
        left.text(1.75, stairs[-1][1], "no error", va="bottom")
    left.set(xlim=(1.7, 10.6), ylabel="signal to quantization noise (dB)", title="2 to 9 bits")
    left.set_xlabel("bits per value, scales included")
    right.set(xlim=(15.7, 18.2), xticks=[16, 17], title="16 bits")
    left.legend(loc="lower right", handletextpad=0.3)
    return figure


def sqnr_weights(frontend: Frontend) -> Figure:
    return sqnr_page(
        frontend,
        "weights",
        "Which format keeps most of the weights for its bits?",
        "Up is better, left is smaller; the dashed line is the best that so many bits buy. The weights of a small "
        "network (rows of 64 and 128), with a scale per output channel where the format doesn't bring its own blocks.",
    )


def sqnr_images(frontend: Frontend) -> Figure:
    return sqnr_page(
        frontend,
        "images",
        "Which format keeps most of the images for its bits?",
        "The network's images, 17 shades of grey from 0 to 1, with one scale where the format doesn't bring its own "
        "blocks. Unsigned formats spend no codes on negative numbers; multiples of 1/16 survive power-of-two scales.",
    )


# The formats whose curves differ, and their lines' looks; those left out repeat another's.
BY_BITS = {
    "16 bits": {"int16": 0, "uint16": 1, "fp16": 2, "bf16": 3},
    "8 bits": {"int8": 0, "uint8": 1, "fp8_e4m3": 2, "fp8_e5m2": 3},
    "6 bits (mx6: beside a small neighbour)": {"fp6_e2m3": 2, "fp6_e3m2": 3, "mx6": 4},
    "2 to 4 bits": {"int4": 0, "uint4": 1, "fp4": 2, "int2": 4, "int3": 5},
}


def precision(frontend: Frontend) -> Figure:
    figure = page(
        "How precise is each format, and how far down?",
        "At 0 numbers are as large as the format's (or the block's) largest value; each step to the left halves them. "
        "Integers lose 6 dB with every step, floats stay level until they run out of exponents. 0 dB: all became "
        "zero.",
    )
    charts = panels(figure, 2, 2)
    for axes, (title, presets) in zip(charts.flat, BY_BITS.items(), strict=True):
        is_upper = axes in charts[0]
        ends = {}
        for preset, look in presets.items():
            curve = octaves(frontend, preset)
            axes.plot(curve.middle, decibels(curve.rms), **line(look), markevery=2 if is_upper else 1)
            ends[preset] = curve.middle[0], decibels(curve.rms)[0]
        axes.set(title=title, ylim=(0, None), xlim=(-42, 8.5) if is_upper else (-12, 2.6), ylabel="SQNR (dB)")
        axes.set_xticks(range(-40, 1, 10) if is_upper else range(-12, 1, 2))
        label(axes, ends, 1 if is_upper else 0.3)
    for axes in charts[1]:
        axes.set_xlabel("magnitude: powers of two below the largest value")
    return figure


def range_precision(frontend: Frontend) -> Figure:
    figure = page(
        "Does a format spend its bits on range or on precision?",
        "Range: how often its smallest positive value can be doubled on the way to the largest; solid where "
        "precision is the same throughout. Precision: the worst rounding error between half the largest value and the "
        "largest.",
    )
    left, right = panels(figure, 1, 2, share="y", width_ratios=[1.5, 1], left=0.14, wspace=0.06)
    shown = [preset for preset, spec in PRESETS.items() if spec.granularity == PerTensor()]
    shown.sort(key=lambda preset: PRESETS[preset].element.bits)
    for row, preset in enumerate(shown):
        kind, element, values = family(preset), PRESETS[preset].element, grid(frontend, preset)
        span = math.log2(values[-1] / values[values > 0][0])
        level = 0 if element.is_integer else math.log2(values[-1]) - element.min_exp
        left.barh(row, min(span, 44), color=kind.colour, alpha=0.35)
        left.barh(row, min(level, 44), color=kind.colour)
        left.text(min(span, 44) + 0.5, row, f"{span:.1f}", va="center")
        if span > 44:
            left.text(42, row, "//", va="center", color="white", weight="bold")  # cut off
        worst = octaves(frontend, preset).worst[0]
        right.scatter(worst, row, 80, kind.colour, marker=kind.marker)
        right.annotate(percent(worst), (worst, row), (9, 0), textcoords="offset points", va="center")
    left.set_yticks(range(len(shown)), shown)
    left.grid(axis="y", visible=False)
    left.set(xlim=(0, 49), ylim=(len(shown) - 0.4, -0.6), title="Range", xlabel="largest / smallest (powers of two)")
    right.set(xscale="log", xlim=(5e-6, 9), title="Precision", xlabel="worst relative error near the top")
    right.set_xticks([1e-5, 1e-3, 1e-1])
    right.xaxis.set_major_formatter(FuncFormatter(percent))
    right.minorticks_off()
    return figure


def values_page(frontend: Frontend) -> Figure:
    figure = page(
        "Where do the representable values lie?",
        "Each tick is a value, relative to the largest magnitude. Integers are spaced evenly; floats crowd around "
        "zero, where most weights are. mx6 is drawn for a value whose neighbour is small: below half of the largest "
        "its steps are halved.",
    )
    axes = panels(figure, 1, 1, left=0.12)
    shown = ["int2", "int3", "uint2", "int4", "uint4", "fp4", "mx6", "fp6_e2m3", "fp6_e3m2"]
    shown += ["int8", "uint8", "fp8_e4m3", "fp8_e5m2"]
    for row, preset in enumerate(shown):
        values = grid(frontend, preset)
        look = {"color": family(preset).colour, "linewidth": np.clip(90 / len(values), 0.6, 2.5)}
        axes.vlines(values / np.abs(values).max(), row - 0.36, row + 0.36, **look)
        axes.text(1.05, row, f"{len(values)} values", va="center")
    axes.set_yticks(range(len(shown)), shown)
    axes.grid(visible=False)
    axes.set(xlim=(-1.04, 1.28), ylim=(len(shown) - 0.4, -0.6), xlabel="value / largest magnitude")
    axes.set_xticks([-1, -0.5, 0, 0.5, 1])
    return figure


OUTLIERS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8, one scale a row": ("int8", {"axis": 0}),
    "fp8_e4m3, one scale a row": ("fp8_e4m3", {"axis": 0}),
    "mxint8": ("mxint8", {}),
    "mxfp8_e4m3": ("mxfp8_e4m3", {}),
    "mxfp4": ("mxfp4", {}),
    "nvfp4": ("nvfp4", {}),
}


def outliers(frontend: Frontend) -> Figure:
    figure = page(
        "What does one outlier do to its neighbours?",
        "Normally distributed numbers in rows of 1024, of which one is an outlier; the noise is that of all the "
        "others. fp8 keeps small numbers beside a large one; int8 and fp4 lose them, with blocks only those in the "
        "outlier's block.",
    )
    axes = panels(figure, 1, 1)
    x, size = normal(128, 1024).astype(np.float64), 2.0 ** np.arange(1, 15.5, 0.5)
    rows, columns = np.arange(128), np.random.default_rng(1).integers(0, 1024, 128)
    others = np.ones(x.shape, bool)
    others[rows, columns] = False
    ends = {}
    for i, (name, (preset, options)) in enumerate(OUTLIERS.items()):
        db = []
        for outlier in size:
            x[rows, columns] = outlier
            db.append(sqnr([x[others]], [frontend.fake_quantize(x, preset, **options)[others]]))
        axes.plot(size, db, **line(i))
        ends[name] = size[-1], db[-1]
    axes.set_xscale("log")
    axes.set(xlim=(1.9, 2**19.5), ylim=(-1, 45), ylabel="SQNR of the other numbers (dB)")
    axes.set_xticks([2.0**k for k in range(1, 16, 2)], [f"{2**k}" for k in range(1, 16, 2)])
    axes.minorticks_off()
    axes.set_xlabel("size of the outlier (standard deviations of the others)", loc="left")
    label(axes, ends, 2**15.6)
    return figure


SCALES = {"float32": "float32 scale", "e4m3": "fp8 scale", "e8m0": "power-of-two scale"}
POINTS = {("fp4", "e4m3", 16): "nvfp4", ("fp4", "e8m0", 32): "mxfp4"}


def blocks(frontend: Frontend) -> Figure:
    figure = page(
        "What do smaller blocks buy, and what do their scales cost?",
        "The weights in blocks of 8 to 64 (the numbers at the points). A float32 scale costs 32 bits a block, the "
        "others cost 8. Fine scales gain from smaller blocks; powers of two gain int4, but not fp4 with exponents of "
        "its own.",
    )
    charts = panels(figure, 1, 2, share="y", wspace=0.08)
    for axes, element in zip(charts, ("int4", "fp4"), strict=True):
        for i, (scale, name) in enumerate(SCALES.items()):
            sizes = (64, 32, 16, 8) if scale != "float32" else (64, 32, 16)
            specs = [QuantSpec(element, PerGroup(size), scale_format=scale) for size in sizes]
            points = [frontend.measure(digits("weights"), spec) for spec in specs]
            axes.plot(*zip(*points, strict=True), **line(i))
            place, preset_place = ((4, -15), (-2, -30)) if scale == "e8m0" else ((-13, 6), (5, -15))
            for size, point in zip(sizes, points, strict=True):
                axes.annotate(str(size), point, place, textcoords="offset points", ha="center", size=11)
                preset = POINTS.get((element, scale, size), "")
                axes.annotate(preset, point, preset_place, textcoords="offset points", style="italic")
            axes.annotate(name, points[-1], (10, 0), textcoords="offset points", va="center", weight="bold")
        axes.set(title=element, xlim=(3.9, 6.9), ylim=(16.8, 23.7), xlabel="bits per value, scales included")
    charts[0].set_ylabel("SQNR (dB)")
    return figure


RULES = {"floor": "from 8", "ceil": "above 4", "even": "from 7", "rceil": "above 6"}


def scale_rules(frontend: Frontend) -> Figure:
    figure = page(
        "Which MX scale rule?",
        "The rules differ in when a block takes the next power of two. floor, the standard's, lets the largest values "
        "saturate; ceil never does, but costs integers a bit; even and rceil wait until the largest value would "
        "suffer.",
    )
    left = panels(figure, 4, 1, share="x", right=0.46, hspace=0.45)
    right = panels(figure, 1, 1, left=0.63)
    x, largest = normal(256, 32), np.linspace(4, 8, 129)[:-1]
    x /= np.abs(x).max(axis=1, keepdims=True)
    presets = [preset for preset, spec in PRESETS.items() if spec.scale_format == "e8m0"]
    weights = digits("weights")

    def by_largest(spec: QuantSpec) -> list[float]:
        return [sqnr([x * a], [frontend.fake_quantize(x * a, spec)]) for a in largest]

    def gains(scale: str, rule: str) -> list[float]:
        specs = {p: QuantSpec(PRESETS[p].format, PerGroup(32), scale_format=scale, scale_rule=rule) for p in presets}
        return [frontend.measure(weights, specs[p])[1] - on_data(frontend, p, "weights")[1] for p in presets]

    def compare(x: list[float], i: int, name: str) -> None:
        rows = np.arange(len(presets)) + 0.2 * (i - 2.5)
        right.scatter(x, rows, 80, COLOURS[i], marker=MARKERS[i], label=name, zorder=3)

    right.axvline(0, color=COLOURS[0], label="floor")
    ideal = by_largest(QuantSpec("fp4", PerGroup(32)))
    for i, (axes, (rule, when)) in enumerate(zip(left, RULES.items(), strict=True)):
        spec = QuantSpec("fp4", PerGroup(32), scale_format="e8m0", scale_rule=rule)
        axes.plot(largest, ideal, color=GREY, linewidth=1, linestyle=DASHES[1])
        axes.plot(largest, by_largest(spec), color=COLOURS[i], linewidth=2)
        axes.set_title(f"mxfp4, {rule}: next scale {when}", size=12)
        axes.set(xlim=(4, 8), ylim=(15.5, 20.5), yticks=[16, 18, 20], ylabel="SQNR (dB)")
        if rule != "floor":
            compare(gains("e8m0", rule), i, rule)
    left[-1].set_xlabel("largest value in the block (dashed: with a float32 scale)")
    compare(gains("float32", "absmax"), 4, "float32 scale")
    right.set(title="On the weights", xlabel="SQNR above that of floor (dB)", ylim=(len(presets) - 0.4, -0.6))
    right.set_yticks(range(len(presets)), presets)
    right.legend(loc="upper left")
    return figure


def stochastic(frontend: Frontend) -> Figure:
    figure = page(
        "When is stochastic rounding better than rounding to nearest?",
        "A single number is always best served by its nearest value. But stochastic rounding is right on average: "
        "sums of many small parts, such as gradient steps, come out right where rounding to nearest drops every part.",
    )
    left, middle, right = panels(figure, 1, 3, wspace=0.3)
    random = QuantSpec("fp4", rounding="stochastic")
    x = np.linspace(0, 6, 241)
    nearest = frontend.fake_quantize(x, "fp4", scale=1.0)
    draws = frontend.fake_quantize(np.tile(x, (1024, 1)), random, scale=1.0, seed=0)
    for axes in (left, middle):
        axes.set(xlim=(0, 6), xlabel="x")
    left.plot(x, nearest, color=BLUE, linewidth=2, label="to nearest")
    left.plot(x, draws.mean(axis=0), color=RED, linewidth=2, linestyle=DASHES[1], label="stochastic")
    left.set(title="fp4: the mean of 1024 results", ylabel="mean of fake_quantize(x)", ylim=(0, 6.2))
    left.legend(loc="upper left")
    middle.plot(x, np.abs(nearest - x), color=BLUE, linewidth=2)
    middle.plot(x, np.sqrt(np.mean((draws - x) ** 2, axis=0)), color=RED, linewidth=2, linestyle=DASHES[1])
    middle.set(title="fp4: the typical error of one", ylabel="root mean square error", ylim=(0, 1.05))
    steps, sums = np.arange(301), {"to nearest": [np.ones(256)], "stochastic": [np.ones(256)]}
    random = QuantSpec("fp8_e4m3", rounding="stochastic")
    for step in steps[1:]:
        drawn = {"seed": int(step)}
        for history, spec, seed in ((sums["to nearest"], "fp8_e4m3", {}), (sums["stochastic"], random, drawn)):
            history.append(frontend.fake_quantize(history[-1] + 0.01, spec, scale=1.0, **seed))
    low, high = np.quantile(sums["stochastic"], [0.1, 0.9], axis=1)
    right.fill_between(steps, low, high, color=RED, alpha=0.2, linewidth=0)
    right.plot(steps, 1 + 0.01 * steps, color=GREY, linewidth=1)
    for i, history in enumerate(sums.values()):
        right.plot(steps, np.mean(history, axis=1), color=COLOURS[i], linestyle=DASHES[i], linewidth=2)
    right.text(295, 1.06, "to nearest: never moves", ha="right")
    right.text(8, 4.5, "stochastic: mean of 256 sums\n(band: 80 % of them)\nthin line: the exact sum", va="center")
    right.set(
        title="fp8_e4m3: 1 + 0.01 + 0.01 + …", xlabel="numbers added", ylabel="sum", xlim=(0, 300), ylim=(0.8, 5.2)
    )
    return figure


# ---- pages of one format ---------------------------------------------------------------------------------------------


def drawn_for(preset: str) -> str:
    """Say under which conditions a format's page is drawn."""
    spec = PRESETS[preset]
    if spec.element.is_cast:
        return f"{preset} has no scale: numbers are rounded as they are, and what is too large becomes infinite."
    if not isinstance(spec.granularity, PerGroup):
        scale = "a scale of 1" if spec.symmetric else "a scale of 1 and a zero point of 0"
        return f"Drawn for {scale}. What lies beyond the ends becomes the ends, so the scale has to fit the numbers."
    text = f"Drawn for x in a block whose largest value is {number(spec.element.hi)}, which makes the scale 1. "
    if spec.scale_format == "microexponents":
        text += "As drawn, x and its neighbour are small: below half of the largest value their steps are halved. "
    return text + "Where x itself is the largest, the scale grows."


def window(preset: str, values: Array) -> tuple[str, float, float]:
    """Return the stretch of x in which a format's steps are drawn, and its name."""
    spec = PRESETS[preset]
    if spec.element.is_cast:
        i = int(np.searchsorted(values, 1.0))
        return ": around 1", values[i - 16], values[i + 16]
    if len(values) <= 16:
        margin = 0.2 * (values[-1] - values[0])
        return "", values[0] - margin, values[-1] + margin
    if spec.element.exponent_bits or len(values) < 64:
        return ": x ≥ 0", 0.0, 1.3 * values[-1]
    step = values[-1] - values[-2]
    if spec.scale_format == "microexponents":
        middle = (values[-1] + step) / 2
        return f": around {middle:g}", middle - 12 * step, middle + 12 * step
    return ": the largest", values[-20], values[-1] + 5 * step


def facts(frontend: Frontend, preset: str) -> list[tuple[str, str]]:
    """Return what a format's page says in words: names and values."""
    spec, values = PRESETS[preset], grid(frontend, preset)
    element, positive = spec.element, values[values > 0]
    span = math.log2(positive[-1] / positive[0])
    (bits, weights), (_, images) = (on_data(frontend, preset, data) for data in ("weights", "images"))
    star = " *" if spec.granularity == PerTensor() and not element.is_cast else ""
    size = spec.granularity.size if isinstance(spec.granularity, PerGroup) else 0
    scale = {
        "float32": "none" if element.is_cast else "float32" if spec.symmetric else "float32, zero point",
        "e8m0": f"power of two ({size})",
        "e4m3": f"fp8 ({size}), float32 (all)",
        "exponent": f"exponent ({size})",
        "microexponents": f"exponent ({size}), bit (2)",
    }[spec.scale_format]
    if element.exponent_bits:
        bit_fields = "sign + exponent + mantissa", f"1 + {element.exponent_bits} + {element.mantissa_bits} bits"
    else:
        unit = 2 ** (element.mantissa_bits - element.min_exp)
        integer = f"integer / {unit}" if unit > 1 else "signed integer" if element.lo < 0 else "unsigned integer"
        bit_fields = "element", f"{element.bits}-bit {integer}"
    ends = f"{values[0]:g} … {values[-1]:g}".replace("-", "−")
    if values[0] == -values[-1]:
        ends = f"±{number(values[-1])}"
    return [
        bit_fields,
        ("scale (how many share it)" if size else "scale", scale),
        ("different values", f"{len(values)}"),
        ("ends of the range", ends),
        ("smallest positive", number(positive[0])),
        ("range", f"{span:.1f} powers of two"),
        ("worst error near the largest", percent(octaves(frontend, preset).worst[0])),
        (f"bits per value with scales{star}", f"{bits:.2f}"),
        (f"SQNR on weights{star}", f"{weights:.1f} dB"),
        ("SQNR on images", f"{images:.1f} dB" if math.isfinite(images) else "no error"),
        *([("", "* one scale per output channel")] if star else []),
    ]


def format_page(preset: str, frontend: Frontend) -> Figure:
    figure = page(f"What does {preset} make of numbers?", drawn_for(preset))
    kind, values = family(preset), grid(frontend, preset)
    unit = "x" if PRESETS[preset].element.is_cast else "x / scale"
    left = [figure.add_axes((0.09, y, 0.32, height)) for y, height in ((0.725, 0.045), (0.365, 0.33), (0.1, 0.2))]
    right = [figure.add_axes((0.495, y, 0.25, 0.27)) for y in (0.5, 0.1)]

    ticks, steps, error = left
    what, low, high = window(preset, values)
    x = np.linspace(low, high, 4001)
    y = at_scale_one(frontend, preset, x)
    inside = values[(values >= low) & (values <= high)]
    ticks.vlines(inside, 0, 1, color=kind.colour, linewidth=2 if len(inside) <= 40 else 0.8)
    ticks.set(title=f"Values, steps and error{what}", yticks=[], ylim=(0, 1))
    ticks.grid(visible=False)
    steps.plot(x, y, color=kind.colour, linewidth=2)
    steps.plot(x, x, color=GREY, linewidth=1, linestyle=DASHES[1])
    steps.set_ylabel("fake_quantize(x)")
    error.plot(x, y - x, color=kind.colour, linewidth=1.3)
    error.axhline(0, color=GREY, linewidth=1, linestyle=DASHES[1])
    largest = np.abs(y - x)[(x >= values[0]) & (x <= values[-1])].max()
    error.set(xlabel=unit, ylabel="error", ylim=(-1.2 * largest, 1.2 * largest))
    for axes in left:
        axes.set_xlim(low, high)
        axes.tick_params(labelbottom=axes is error)
        axes.yaxis.set_label_coords(-0.17, 0.5)
        axes.locator_params(axis="x", nbins=6)

    count, relative = right
    positive = values[values > 0]
    exponents = range(math.floor(math.log2(positive[0])) - 2, math.floor(math.log2(positive[-1])) + 2)
    edges = np.array(exponents)
    starts = 2.0 ** edges[:-1]
    worst, rms = relative_error(frontend, preset, starts, np.minimum(2 * starts, positive[-1]))
    worst[worst == 0] = rms[rms == 0] = math.nan  # int2's last binade: its largest value alone
    count.stairs(np.histogram(np.log2(positive), edges)[0], edges, fill=True, color=kind.colour)
    count.set(title="Values from 2ⁿ to 2ⁿ⁺¹", ylabel="positive values")
    count.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    relative.stairs(worst, edges, baseline=None, color=kind.colour, linewidth=2.5, label="worst")
    relative.stairs(rms, edges, baseline=None, color=BLACK, linewidth=1.5, linestyle=DASHES[1], label="rms")
    relative.set(title="Relative error", yscale="log", xlabel=f"magnitude of {unit}")
    relative.set_ylim(10.0 ** math.floor(math.log10(np.nanmin(rms))), 1.3)
    relative.yaxis.set_major_formatter(FuncFormatter(percent))
    relative.yaxis.set_minor_locator(NullLocator())
    legend = {"ncols": 2, "borderaxespad": 0, "handlelength": 1.7, "columnspacing": 1, "fontsize": 11}
    relative.legend(loc="lower right", bbox_to_anchor=(1.02, 0.99), **legend)
    stride = math.ceil(len(edges) / 7)
    marks = [exponent for exponent in exponents if exponent % stride == 0]
    for axes in right:
        axes.set_xlim(edges[0], edges[-1])
        axes.set_xticks(marks, [power(exponent) for exponent in marks])

    for i, (name, text) in enumerate(facts(frontend, preset)):
        figure.text(0.785, 0.785 - 0.066 * i, name, color=GREY, size=12, va="top")
        look: dict[str, Any] = {"size": 13, "weight": "bold"} if name else {"size": 11}
        figure.text(0.785, 0.76 - 0.066 * i, text, va="top", **look)
    return figure


# ---- the command line ------------------------------------------------------------------------------------------------

PAGES: dict[str, Callable[[Frontend], Figure]] = {
    "sqnr_weights": sqnr_weights,
    "sqnr_images": sqnr_images,
    "precision": precision,
    "range_precision": range_precision,
    "values": values_page,
    "outliers": outliers,
    "blocks": blocks,
    "scale_rules": scale_rules,
    "stochastic": stochastic,
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    installed = [name for name in FRAMEWORKS if find_spec(name)]
    parser = argparse.ArgumentParser(description="Draw an atlas of the number formats, as PNG pages.")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the pages (default: format_atlas)")
    parser.add_argument("--formats", nargs="+", metavar="NAME", help="the presets that get a page (default: all)")
    parser.add_argument("--framework", choices=FRAMEWORKS, help="what computes (default: the first that is installed)")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--quick", action="store_true", help=f"small pages, of {', '.join(QUICK_FORMATS)} by default")
    kinds.add_argument("--docs", action="store_true", help="only the documentation's pages, by default to docs/images")
    options = parser.parse_args(arguments)

    options.framework = options.framework or (installed or [FRAMEWORKS[0]])[0]
    if options.framework not in installed:
        parser.error(f"--framework is {options.framework}, which isn't installed; allowed: {', '.join(installed)}")
    options.formats = options.formats or (QUICK_FORMATS if options.quick else tuple(PRESETS))
    for name in options.formats:
        if name not in PRESETS:
            parser.error(f"--formats has {name}; allowed: {', '.join(PRESETS)}")
    options.out = options.out or (DOCS_FOLDER if options.docs else Path("format_atlas"))
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out is {options.out}, which can't be a folder: {error.strerror}")
    return options


def main(arguments: Sequence[str] | None = None) -> list[Path]:
    options = parse(arguments)
    pages = PAGES | {f"format_{name}": partial(format_page, name) for name in PRESETS}
    names = DOCS_PAGES if options.docs else (*PAGES, *(f"format_{name}" for name in options.formats))
    dpi = DOCS_DPI if options.docs else QUICK_DPI if options.quick else DPI
    frontend, files = Frontend(options.framework), []
    with style.context(["default", STYLE]):
        for name in tqdm(names, unit="page", disable=None, leave=False):
            files.append(options.out / f"{name}.png")
            pages[name](frontend).savefig(files[-1], dpi=dpi, metadata={"Software": None})
    print(f"{len(files)} pages in {options.out}")
    return files


if __name__ == "__main__":
    main()
