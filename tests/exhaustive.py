"""Every float32 there is, 2^32 bit patterns, through `quantize` and `fake_quantize`: `python tests/exhaustive.py`.

The oracle shares nothing with the library. It has each format as the list of its codes' values, made from sign,
exponent and mantissa, and between two neighbours the number from which the upper one is the result. So over the bit
patterns the result is constant in pieces, a few hundred of them; bisection finds where they begin, with NumPy's float32
divisions. To check a result is to see that the least and the greatest of each piece are what the oracle says.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from quark_kernels import _core

Array = np.ndarray[Any, np.dtype[Any]]

SIGN, INFINITY, NAN = 0x80000000, 0x7F800000, 0x7FC00000
LARGEST = np.finfo(np.float32).max
OPS = ("quantize", "fake_quantize")
TILE = 1 << 18
ROUNDINGS = ("half_even", "half_up", "half_away", "floor", "ceil", "toward_zero")


class Minifloat(NamedTuple):
    """Codes are sign, exponent and mantissa, from the formats' standards."""

    exponent: int
    mantissa: int
    bias: int
    largest: int
    """The code of the largest number."""
    nan: int | None = None
    has_minus_zero: bool = True
    is_cast: bool = False
    """Beyond the largest number lies infinity, which has the next code."""


class Integer(NamedTuple):
    lo: int
    hi: int
    steps: int = 1
    """Of 1: a code q stands for q / steps."""


FORMATS: dict[str, Minifloat | Integer] = {
    "int2": Integer(-2, 1),
    "int3": Integer(-4, 3),
    "int4": Integer(-8, 7),
    "int5": Integer(-16, 15),
    "int8": Integer(-128, 127),
    "int16": Integer(-32768, 32767),
    "uint2": Integer(0, 3),
    "uint4": Integer(0, 15),
    "uint8": Integer(0, 255),
    "uint16": Integer(0, 65535),
    "int8f6": Integer(-127, 127, 64),
    "fp8_e4m3": Minifloat(4, 3, 7, 0x7E, nan=0x7F),
    "fp8_e5m2": Minifloat(5, 2, 15, 0x7B, nan=0x7F),
    "fp8_e4m3fnuz": Minifloat(4, 3, 8, 0x7F, nan=0x80, has_minus_zero=False),
    "fp8_e5m2fnuz": Minifloat(5, 2, 16, 0x7F, nan=0x80, has_minus_zero=False),
    "fp6_e3m2": Minifloat(3, 2, 3, 0x1F),
    "fp6_e2m3": Minifloat(2, 3, 1, 0x1F),
    "fp4": Minifloat(2, 1, 1, 0x7),
    "bf16": Minifloat(8, 7, 127, 0x7F7F, nan=0x7FC0, is_cast=True),
    "fp16": Minifloat(5, 10, 15, 0x7BFF, nan=0x7E00, is_cast=True),
}
NARROW = tuple(name for name in FORMATS if "16" not in name)


class Case(NamedTuple):
    format: str
    rounding: str = "half_even"
    scale: float = 1.0
    zero_point: int = 0

    def __str__(self) -> str:
        zero = f" zero_point={self.zero_point}" if self.zero_point else ""
        return f"{self.format} rounding={self.rounding} scale={np.float32(self.scale)}{zero}"


# ---- the oracle ------------------------------------------------------------------------------------------------------


class Grid(NamedTuple):
    """What a quotient can become, from the lowest to the highest, -0 and +0 apart."""

    numbers: Array
    """float64, exact; infinity as the next number of the grid."""
    codes: Array
    values: Array
    """float32: what the codes stand for."""
    is_even: Array


def _order(x: Array) -> Array:
    """int64 that order as the numbers do, with -0 just below +0."""
    bits = x.view(np.uint32).astype(np.int64)
    return np.where(bits >= SIGN, SIGN - 1 - bits, bits)


def _integer_grid(f: Integer, zero_point: int) -> Grid:
    r = np.arange(f.lo - zero_point, f.hi - zero_point + 1)
    if (zero := np.flatnonzero(r == 0)).size:
        r = np.insert(r, zero[0], 0)
    numbers = r / f.steps
    if zero.size:
        numbers[zero[0]] = -0.0
    return Grid(numbers, r + zero_point, (numbers + 0.0).astype(np.float32), r % 2 == 0)


def _minifloat_grid(f: Minifloat) -> Grid:
    codes = np.arange(f.largest + 1 + f.is_cast)
    field, fraction = codes >> f.mantissa, codes & ((1 << f.mantissa) - 1)
    significand = np.where(field > 0, fraction + (1 << f.mantissa), fraction).astype(np.float64)
    numbers = np.ldexp(significand, np.maximum(field, 1) - f.bias - f.mantissa)
    values = numbers.copy()
    if f.is_cast:
        values[-1] = np.inf
    sign = 1 << (f.exponent + f.mantissa)
    below = codes | sign
    if not f.has_minus_zero:
        below[0] = 0
    minus = -values
    minus[0] = -0.0 if f.has_minus_zero else 0.0
    return Grid(
        np.concatenate([-numbers[::-1], numbers]),
        np.concatenate([below[::-1], codes]),
        np.concatenate([minus[::-1], values]).astype(np.float32),
        np.concatenate([codes[::-1], codes]) % 2 == 0,
    )


@cache
def _grid(name: str, zero_point: int) -> Grid:
    f = FORMATS[name]
    return _integer_grid(f, zero_point) if isinstance(f, Integer) else _minifloat_grid(f)


@cache
def _thresholds(name: str, zero_point: int, rounding: str) -> Array:
    """For every number of the grid but the first: the order of the least quotient that doesn't become a lower one."""
    grid = _grid(name, zero_point)
    a, b = grid.numbers[:-1], grid.numbers[1:]
    middle, is_above_zero = (a + b) / 2, b > 0
    at, is_included = {
        "half_even": (middle, grid.is_even[1:]),
        "half_up": (middle, np.ones(b.shape, bool)),
        "half_away": (middle, is_above_zero),
        "floor": (b, np.ones(b.shape, bool)),
        "ceil": (a, np.zeros(b.shape, bool)),
        "toward_zero": (np.where(is_above_zero, b, a), is_above_zero),
    }[rounding]
    between_zeros = (a == 0) & (b == 0)
    at, is_included = np.where(between_zeros, 0.0, at), is_included | between_zeros
    nearest = at.astype(np.float32)
    least: Array = _order(nearest) + ((nearest < at) | ((nearest == at) & ~is_included))
    return least


class Results(NamedTuple):
    codes: Array
    """As stored, unsigned."""
    values: Array
    """Bits of float32."""


def _quotients(x: Array, case: Case) -> Array:
    with np.errstate(all="ignore"):
        return x / np.float32(case.scale)


def _places(x: Array, case: Case) -> Array:
    """Where in the grid x / scale comes to lie; NaN anywhere."""
    v = _order(_quotients(x, case))
    return np.searchsorted(_thresholds(case.format, case.zero_point, case.rounding), v, side="right")


def storage(name: str) -> np.dtype[Any]:
    return np.dtype(np.uint16 if "16" in name else np.uint8)


def results(x: Array, case: Case) -> Results:
    """What quantize and fake_quantize make of float32 x, from docs/numerics.md."""
    f, grid, s = FORMATS[case.format], _grid(case.format, case.zero_point), np.float32(case.scale)
    sign = np.where(np.signbit(x), np.uint32(SIGN), np.uint32(0))
    v = _quotients(x, case)
    is_nan = np.isnan(v)
    place = np.where(is_nan, _places(np.zeros(1, np.float32), case._replace(scale=1.0)), _places(x, case))
    codes, y = grid.codes[place], grid.values[place]
    if isinstance(f, Minifloat) and f.nan is not None:
        code_sign = (sign >> (31 - f.exponent - f.mantissa)).astype(np.int64)
        codes = np.where(is_nan, f.nan | code_sign, codes)
        y = np.where(is_nan, (NAN | (sign if f.has_minus_zero else 0 * sign)).view(np.float32), y)
    with np.errstate(all="ignore"):
        product = y * s
    bounded = np.where(np.isinf(y), product, np.clip(product, -LARGEST, LARGEST))
    is_minus = np.signbit(y) if isinstance(f, Minifloat) else codes < 0  # of a number whose scale is NaN
    values = np.where(np.isnan(product), np.where(is_minus, NAN | SIGN, NAN).astype(np.uint32), bounded.view(np.uint32))
    return Results(codes.astype(storage(case.format)), np.where(np.isnan(x), NAN | sign, values))


class Pieces(NamedTuple):
    starts: Array
    """Ascending bit patterns, as int64; the first is 0."""
    results: Results


def pieces(case: Case) -> Pieces:
    """Where over the bit patterns the results change, and what they are from there on."""
    starts = []
    for sign in (0, SIGN):

        def place(magnitude: Array, sign: int = sign) -> Array:
            return _places((magnitude | sign).astype(np.uint32).view(np.float32), case)

        starts.append(np.array([0, 1, INFINITY, INFINITY + 1]) | sign)
        first, last = place(np.array([1, INFINITY - 1]))
        step = 1 if first < last else -1
        # Of every place passed on the way the first magnitude that lies beyond it.
        passed = np.arange(first, last, step)
        low, high = np.full(passed.shape, 1), np.full(passed.shape, INFINITY - 1)
        while (high - low > 1).any():
            middle = (low + high) // 2
            is_beyond = (place(middle) - passed) * step > 0
            low, high = np.where(is_beyond, low, middle), np.where(is_beyond, middle, high)
        starts.append(high | sign)
    at = np.unique(np.concatenate(starts))
    return Pieces(at, results(at.astype(np.uint32).view(np.float32), case))


# ---- the library -----------------------------------------------------------------------------------------------------


def run(op: str, x: Array, case: Case, out: Array) -> None:
    """The core on float32 x, results as unsigned integers into `out`."""
    f = FORMATS[case.format]
    is_signed = isinstance(f, Integer) and f.lo < 0
    inputs = [x, np.array([case.scale], np.float32)]
    if case.zero_point:
        inputs.append(np.array([case.zero_point], np.int32))
    if op == "fake_quantize":
        typed = out.view(np.float32)
    elif case.format in ("bf16", "fp16"):
        import ml_dtypes

        typed = out.view(ml_dtypes.bfloat16 if case.format == "bf16" else np.float16)
    else:
        typed = out.view(f"i{out.itemsize}") if is_signed else out
    rounding = "" if isinstance(f, Minifloat) and f.is_cast else f" rounding={case.rounding}"
    getattr(_core, op)(tuple(inputs), (typed,), f"{case.format} block=0{rounding}")


# ---- all inputs ------------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    op: str
    case: Case


class Tile:
    """One thread's memory."""

    def __init__(self) -> None:
        self.first = np.arange(TILE, dtype=np.uint32)
        self.x = np.empty(TILE, np.uint32)
        self.out = np.empty(TILE, np.uint32)

    def differences(self, start: int, work: Work, want: Pieces) -> tuple[int, str]:
        """How many of the tile's results are wrong, and the first of them."""
        op, case = work
        np.add(self.first, np.uint32(start), out=self.x)
        expected = want.results.codes if op == "quantize" else want.results.values
        out = self.out.view(expected.dtype)[:TILE]
        run(op, self.x.view(np.float32), case, out)
        begin, end = np.searchsorted(want.starts, [start, start + TILE])
        starts, values = want.starts[begin:end] - start, expected[begin:end]
        if not starts.size or starts[0] > 0:
            starts, values = np.insert(starts, 0, 0), np.insert(values, 0, expected[begin - 1])
        if (np.minimum.reduceat(out, starts) == values).all() and (np.maximum.reduceat(out, starts) == values).all():
            return 0, ""
        all_values = np.repeat(values, np.diff(starts, append=TILE))
        wrong = np.flatnonzero(out != all_values)
        return wrong.size, describe(work, self.x[wrong[0]], out[wrong[0]], all_values[wrong[0]])


def describe(work: Work, x: Any, got: Any, want: Any) -> str:
    return f"{work.op} {work.case}: {x.view(np.float32)} (0x{x:08x}) gives 0x{got:x}, not 0x{want:x}"


def _bar(total: int) -> tqdm[Any]:
    interval = 0.5 if sys.stderr.isatty() else 60.0  # seconds: a log needn't move
    return tqdm(total=total, unit="", unit_scale=True, mininterval=interval, maxinterval=interval)


def check(works: Sequence[Work], threads: int) -> int:
    """The number of differences over all bit patterns, of which the first of each call is printed."""
    tiles = [Tile() for _ in range(threads)]
    starts = [range(i * TILE, 1 << 32, threads * TILE) for i in range(threads)]
    total = 0
    with ThreadPoolExecutor(threads) as pool, _bar(len(works) << 32) as bar:
        for work in works:
            bar.set_description(f"{work.op} {work.case}", refresh=False)
            want = pieces(work.case)

            def go(i: int, work: Work = work, want: Pieces = want) -> tuple[int, str]:
                count, first = 0, ""
                for start in starts[i]:
                    more, text = tiles[i].differences(start, work, want)
                    count, first = count + more, first or text
                    bar.update(TILE)
                return count, first

            found = list(pool.map(go, range(threads)))
            count = sum(n for n, _ in found)
            total += count
            if count:
                bar.write(f"{count} differences: {next(text for _, text in found if text)}")
    return total


def cases(formats: Iterable[str], roundings: Iterable[str], scales: Iterable[float]) -> Iterator[Case]:
    """Scale 1 with every rounding, other scales with the first, integers with a zero point too."""
    first, *others = roundings
    for name in formats:
        f = FORMATS[name]
        if isinstance(f, Minifloat) and f.is_cast:
            yield Case(name)
            continue
        yield from (Case(name, first, scale) for scale in scales)
        yield from (Case(name, rounding) for rounding in others)
        if isinstance(f, Integer) and f.steps == 1:
            yield Case(name, first, zero_point=(f.lo + f.hi) // 2 + 1 if f.lo == 0 else 3)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=NARROW, help="default: those of up to 8 bits")
    parser.add_argument("--roundings", nargs="+", choices=ROUNDINGS, default=ROUNDINGS)
    parser.add_argument(
        "--scales", nargs="+", type=float, default=[1.0, 0.1, 3e21], help="of the first rounding (default: %(default)s)"
    )
    parser.add_argument(
        "--ops", nargs="+", choices=["quantize", "fake_quantize"], default=["quantize", "fake_quantize"]
    )
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    works = [Work(op, case) for case in cases(args.formats, args.roundings, args.scales) for op in args.ops]
    print(f"{len(works)} calls, each of 2^32 inputs, at CPU level {_core.cpu_level()}", flush=True)
    differences = check(works, args.threads)
    print(f"{differences} differences in {len(works)} calls of 2^32 inputs")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
