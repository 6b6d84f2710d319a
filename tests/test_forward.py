"""Every case through every frontend, against the oracle: codes, scales, zero points, numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from frontends import bits, stored_codes
from matrix import CASES, Case


def skip_layouts(frontend: Any, case: Case) -> None:
    if case.layout not in frontend.layouts:
        pytest.skip(f"{frontend.name} has no {case.layout} arrays")


def assert_same(got: np.ndarray, expected: np.ndarray, what: str) -> None:
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape, what
    if not np.array_equal(got, expected):
        at = tuple(np.argwhere(got != expected)[0])
        pytest.fail(f"{what} differ at {at}: got {got[at]:#x}, expected {expected[at]:#x}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case: Case, frontend: Any) -> None:
    skip_layouts(frontend, case)
    before = bits(np.asarray(case.x)).copy()
    q, scale, zero = frontend.quantize(case)
    assert_same(stored_codes(case, q), case.codes, "codes")
    assert_same(bits(scale), bits(case.scale), "scales")
    if case.zero is None:
        assert zero is None
    else:
        assert zero.dtype == np.int32
        assert_same(zero.astype(np.int64), case.zero.astype(np.int64), "zero points")
    assert_same(bits(frontend.fake_quantize(case)), case.fake_quantized, "fake-quantized numbers")
    assert_same(bits(frontend.dequantize(case, case.dtype)), case.dequantized(case.dtype), "dequantized numbers")
    assert_same(bits(np.asarray(case.x)), before, "the input's bits, which nothing may write,")


@pytest.mark.parametrize("case", [c for c in CASES if not c.given], ids=str)
def test_choose_qparams(case: Case, frontend: Any) -> None:
    skip_layouts(frontend, case)
    scale, zero = frontend.choose_qparams(case)
    assert_same(bits(scale), bits(case.scale), "scales")
    assert (zero is None) == (case.zero is None)
    if zero is not None:
        assert_same(zero.astype(np.int64), case.zero.astype(np.int64), "zero points")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", [c for c in CASES if c.given and c.dtype == "float32"][::7], ids=str)
def test_dequantize_to_other_dtypes(case: Case, dtype: str, frontend: Any) -> None:
    skip_layouts(frontend, case)
    assert_same(bits(frontend.dequantize(case, dtype)), case.dequantized(dtype), "dequantized numbers")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fake_quantize_is_dequantize_of_quantize(case: Case, frontend: Any) -> None:
    """The identity the library promises, without the oracle's help."""
    skip_layouts(frontend, case)
    fake, both = bits(frontend.fake_quantize(case)), bits(frontend.dequantize(case, case.dtype))
    number = ~np.isnan(case.x32)
    assert_same(fake[number], both[number], "fake_quantize and dequantize(quantize)")
