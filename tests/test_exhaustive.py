"""The short form of `exhaustive.py`: around every number where a result changes, and a stride of the others."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

import exhaustive
import reference
from exhaustive import FORMATS, NARROW, ROUNDINGS, Case, Integer, Minifloat, Pieces, Work, pieces, storage
from quark_kernels import FORMATS as LIBRARY_FORMATS
from quark_kernels.formats import FIXED_ROUNDINGS

SCALES = (1.0, 0.1, 3e21, -0.3, 2.0**-48, 1e-40, 2e38, 0.0, -0.0, float("inf"), float("nan"))
ZERO_POINTS = (3, -200, 2**23)
STRIDE = 100_003


def cases(name: str) -> Iterator[Case]:
    f = FORMATS[name]
    if isinstance(f, Minifloat) and f.is_cast:
        yield Case(name)
        return
    is_narrow = name in NARROW
    for rounding in ROUNDINGS:
        yield from (Case(name, rounding, scale) for scale in (SCALES if is_narrow else SCALES[1:2]))
        if isinstance(f, Integer) and f.steps == 1:
            yield from (Case(name, rounding, 1.0, zero) for zero in (ZERO_POINTS if is_narrow else ZERO_POINTS[:1]))


def inputs(want: Pieces) -> np.ndarray:
    """Bit patterns: a stride, and two on either side of every start of a piece."""
    near = (want.starts[:, None] + np.arange(-2, 3)).ravel()
    return np.concatenate([np.arange(0, 1 << 32, STRIDE), near[(near >= 0) & (near < 1 << 32)]]).astype(np.uint32)


@pytest.mark.parametrize("name", FORMATS)
def test_around_every_change(name: str) -> None:
    for case in cases(name):
        want = pieces(case)
        x = inputs(want)
        piece = np.searchsorted(want.starts, x, side="right") - 1
        for op in exhaustive.OPS:
            expected = (want.results.codes if op == "quantize" else want.results.values)[piece]
            out = np.empty(x.shape, expected.dtype)
            exhaustive.run(op, x.view(np.float32), case, out)
            wrong = np.flatnonzero(out != expected)
            assert not wrong.size, exhaustive.describe(Work(op, case), x[wrong[0]], out[wrong[0]], expected[wrong[0]])


@pytest.mark.parametrize("name", FORMATS)
def test_the_oracles_agree(name: str) -> None:
    """Pieces and `reference.py`, on any bit patterns."""
    random = np.random.default_rng(list(FORMATS).index(name)).integers(0, 1 << 32, 2000, np.uint32)
    for case in cases(name):
        want = pieces(case)
        x = np.concatenate([random, inputs(want)[:: 1 if name in NARROW else 50]])
        piece = np.searchsorted(want.starts, x, side="right") - 1
        how = (name, np.float32(case.scale), case.zero_point or None, case.rounding)
        codes = reference.quantize(x.view(np.float32), *how) & np.iinfo(storage(name)).max
        assert np.array_equal(codes, want.results.codes[piece]), case
        values = reference.fake_quantize(x.view(np.float32), *how).view(np.uint32)
        assert np.array_equal(values, want.results.values[piece]), case


def test_every_format_and_rounding_is_there() -> None:
    assert FORMATS.keys() == LIBRARY_FORMATS.keys()
    assert ROUNDINGS == FIXED_ROUNDINGS
    assert {name for name, row in LIBRARY_FORMATS.items() if row.bits <= 8} == set(NARROW)


@pytest.mark.parametrize("op", exhaustive.OPS)
@pytest.mark.parametrize("at", [0, 1, 54321, exhaustive.TILE - 1])
def test_one_wrong_result_of_a_tile_is_found(op: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(op, Case("fp8_e4m3"))
    want = pieces(work.case)
    start = 0x40000000
    assert exhaustive.Tile().differences(start, work, want) == (0, "")
    run = exhaustive.run

    def spoiled(op: str, x: np.ndarray, case: Case, out: np.ndarray) -> None:
        run(op, x, case, out)
        out[at] ^= 1

    monkeypatch.setattr(exhaustive, "run", spoiled)
    count, text = exhaustive.Tile().differences(start, work, want)
    assert count == 1
    assert f"(0x{start + at:x}) gives" in text
