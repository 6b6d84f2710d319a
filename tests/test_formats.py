"""Every code of every format of at most 8 bits, and every 16-bit input, against ml_dtypes and the oracle."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import reference
from frontends import bits
from matrix import numpy_dtype
from quark_kernels import FORMATS, PRESETS, _core
from quark_kernels.formats import FIXED_ROUNDINGS
from test_forward import assert_same

ML_DTYPES = {
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "fp8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "fp8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp4": ml_dtypes.float4_e2m1fn,
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
}
ALL_16_BIT = np.arange(65536, dtype=np.uint16)
ONE = np.ones((), np.float32)


def core_quantize(x: np.ndarray, fmt: str, extra: str = "") -> np.ndarray:
    q = np.empty(x.shape, numpy_dtype(FORMATS[fmt].storage))
    _core.quantize((x, ONE), (q,), f"{fmt} block=0{extra}")
    return bits(q)


def core_dequantize(codes: np.ndarray, fmt: str) -> np.ndarray:
    x = np.empty(codes.shape, np.float32)
    _core.dequantize((codes.view(numpy_dtype(FORMATS[fmt].storage)), ONE), (x,), f"{fmt} block=0")
    return x


def test_the_oracle_has_the_same_formats() -> None:
    assert set(reference.FORMATS) == set(FORMATS)
    for name, row in FORMATS.items():
        assert (row.bits, row.lo, row.hi) == reference.FORMATS[name][:1] + reference.FORMATS[name][3:5], name


def test_presets() -> None:
    assert list(PRESETS) == [
        "int2",
        "int3",
        "int4",
        "int8",
        "int16",
        "uint2",
        "uint4",
        "uint8",
        "uint16",
        "fp8_e4m3",
        "fp8_e5m2",
        "fp8_e4m3fnuz",
        "fp8_e5m2fnuz",
        "fp6_e3m2",
        "fp6_e2m3",
        "fp4",
        "bf16",
        "fp16",
        "mxfp8_e4m3",
        "mxfp8_e5m2",
        "mxfp6_e3m2",
        "mxfp6_e2m3",
        "mxfp4",
        "mxint8",
        "nvfp4",
        "mx6",
        "mx9",
        "bfp16",
    ]
    assert [name for name, spec in PRESETS.items() if not spec.symmetric] == ["uint2", "uint4", "uint8", "uint16"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("fmt", ML_DTYPES)
def test_all_16_bit_inputs_against_ml_dtypes(fmt: str, dtype: str) -> None:
    x = ALL_16_BIT.view(numpy_dtype(dtype))
    with np.errstate(invalid="ignore"):  # signalling NaNs are among them
        x32 = x.astype(np.float32)
    number = ~np.isnan(x32)
    clamped = x32 if FORMATS[fmt].is_cast else np.clip(x32, FORMATS[fmt].lo, FORMATS[fmt].hi)
    with np.errstate(all="ignore"):
        expected = bits(clamped.astype(ML_DTYPES[fmt]))
    got = core_quantize(x, fmt)
    if fmt.endswith("fnuz"):
        expected = np.where((expected == 0x80) & number, 0, expected)  # a cast of -0 is not NaN to us
    assert_same(got[number], expected[number], "codes")


@pytest.mark.parametrize("rounding", FIXED_ROUNDINGS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_all_16_bit_inputs_against_the_oracle(fmt: str, dtype: str, rounding: str) -> None:
    if FORMATS[fmt].is_cast and rounding != "half_even":
        with pytest.raises(ValueError, match="is a cast and rounds half_even only"):
            core_quantize(ALL_16_BIT.view(numpy_dtype(dtype)), fmt, f" rounding={rounding}")
        return
    x = ALL_16_BIT.view(numpy_dtype(dtype))
    with np.errstate(invalid="ignore"):  # signalling NaNs are among them
        x32 = x.astype(np.float32)
    expected = reference.quantize(x32, fmt, 1.0, rounding=rounding)
    got = core_quantize(x, fmt, f" rounding={rounding}")
    assert_same(got.astype(np.int64), expected & (256**got.itemsize - 1), "codes")


@pytest.mark.parametrize("fmt", [name for name, row in FORMATS.items() if row.bits <= 8])
def test_all_codes(fmt: str) -> None:
    row = FORMATS[fmt]
    codes = np.arange(2**row.bits, dtype=np.uint8)
    if row.exponent_bits == 0 and row.lo < 0:
        codes = (codes.astype(np.int8) << (8 - row.bits) >> (8 - row.bits)).view(np.uint8)  # as int8 holds them
    value = core_dequantize(codes, fmt)
    expected = reference.to_bits(reference.dequantize(_oracle_codes(codes, fmt), fmt, 1.0), "float32")
    assert_same(bits(value), expected, "values")
    if fmt in ML_DTYPES:
        theirs = codes.view(np.uint8).view(ML_DTYPES[fmt]).astype(np.float32)
        assert np.array_equal(value, theirs, equal_nan=True)
    back = core_quantize(value, fmt)
    kept = np.isfinite(value) & (value >= row.lo)  # int8f6's -128 is read but never written
    assert_same(back[kept], codes[kept], "codes of their own values")


def _oracle_codes(codes: np.ndarray, fmt: str) -> np.ndarray:
    signed = FORMATS[fmt].exponent_bits == 0 and FORMATS[fmt].lo < 0
    return codes.view(np.int8 if signed else np.uint8).astype(np.int64)


@pytest.mark.parametrize("fmt", [name for name, row in FORMATS.items() if row.can_pack])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 1024, 1027, 5000])
def test_pack_and_unpack(fmt: str, length: int, frontend: Any) -> None:
    row = FORMATS[fmt]
    signed = row.exponent_bits == 0 and row.lo < 0
    codes = np.random.default_rng(length).integers(0, 256, (3, length)).astype(np.int8 if signed else np.uint8)
    packed = frontend.pack(codes, row.bits)
    assert packed.dtype == np.uint8
    assert_same(packed, reference.pack(codes.astype(np.int64) & (2**row.bits - 1), row.bits), "bytes")
    unpacked = frontend.unpack(packed, row.bits, length, signed)
    assert unpacked.dtype == codes.dtype
    assert_same(unpacked.astype(np.int64), reference.unpack(packed, row.bits, length, signed), "codes")


def test_pack_on_another_axis(framework: Any) -> None:
    codes = np.random.default_rng(0).integers(-8, 8, (6, 5, 4)).astype(np.int8)
    packed = framework.numpy(framework.api.pack(framework.array(codes), 4, axis=0))
    assert_same(packed, np.moveaxis(reference.pack(np.moveaxis(codes & 15, 0, -1), 4), -1, 0), "bytes")
    back = framework.numpy(framework.api.unpack(framework.array(packed), 4, axis=-3, signed=True))
    assert_same(back, codes, "codes")
