"""QTensor: parts, sizes, text, and the forms that the frameworks' own products take."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from quark_kernels import PRESETS, PerBlock, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec

RNG = np.random.default_rng(0)


def data(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def bits(framework: Any, q: Any) -> np.ndarray:
    return framework.numpy(q.dequantize()).view(np.uint32)


# ---- parts -----------------------------------------------------------------------------------------------------------

SPECS = {
    "per tensor": QuantSpec("int8"),
    "per channel": QuantSpec("uint8", PerChannel(1), symmetric=False),
    "first channel": QuantSpec("int4", PerChannel(0)),
    "last channel": QuantSpec("int8", PerChannel(-1)),
    "per token": QuantSpec("fp8_e4m3", PerToken()),
    "tiles": QuantSpec("fp8_e4m3", PerBlock((2, 16))),
    "middle groups": QuantSpec("fp6_e2m3", PerGroup(2, 1), scale_format="e8m0"),
} | {name: PRESETS[name] for name in ("bf16", "mxfp4", "nvfp4", "mx6", "bfp16")}
PACKED = [name for name, spec in SPECS.items() if spec.element.can_pack or name == "bfp16"]


@pytest.mark.parametrize(
    "key", [1, -1, slice(1, None), slice(0, 3, 2), slice(0, 0), (0, slice(1, 3)), (slice(None), 2), (2, 3)], ids=str
)
@pytest.mark.parametrize(("name", "packed"), [(name, None) for name in SPECS] + [(name, True) for name in PACKED])
def test_parts(framework: Any, name: str, key: Any, packed: bool | None) -> None:
    """A part of the codes dequantizes to that part of the numbers."""
    spec = SPECS[name]
    q = framework.api.quantize(framework.array(data(3, 4, 40)), spec, packed=packed)
    axes = len(key) if isinstance(key, tuple) else 1
    if (name == "middle groups" and axes > 1) or (name == "tiles" and axes > 1):
        with pytest.raises(ValueError, match="key indexes axis 1, which .* cuts into groups"):
            q[key]
        return
    part, whole = q[key], framework.numpy(q.dequantize())
    assert part.shape == whole[key].shape
    np.testing.assert_array_equal(bits(framework, part), whole[key].view(np.uint32))


def test_parts_of_parts(framework: Any) -> None:
    q = framework.api.quantize(framework.array(data(3, 4, 40)), QuantSpec("int8", PerChannel(1)))
    row = q[1][2]
    assert row.spec.granularity == PerTensor()
    assert row.scale.shape == ()
    np.testing.assert_array_equal(framework.numpy(row.dequantize()), framework.numpy(q.dequantize())[1, 2])
    assert len(q) == 3
    assert [part.shape for part in q] == [(4, 40)] * 3


@pytest.mark.parametrize(
    ("spec", "key", "error", "message"),
    [
        ("mxfp4", (0, 0, 0), ValueError, "key indexes axis 2, which is packed"),
        (
            "mxfp8_e4m3",
            (0, 0, slice(0, 32)),
            ValueError,
            r"key indexes axis 2, which PerGroup\(size=32, axis=-1\) cuts",
        ),
        (QuantSpec("int8", PerToken()), (0, 0, 0), ValueError, r"axis 2, which PerToken\(\) cuts"),
        ("int8", 3, IndexError, "key has 3 for axis 0 of length 3"),
        ("int8", (0, 0, 0, 0), IndexError, "key has 4 indices; the QTensor has 3 axes"),
        ("int8", 1.0, TypeError, "key has a float for axis 0; allowed: integers and slices"),
        ("int8", True, TypeError, "key has a bool for axis 0"),
        ("int8", None, TypeError, "key has a NoneType for axis 0"),
        ("int8", slice(None, None, -1), ValueError, "key has a slice of step -1"),
    ],
    ids=str,
)
def test_wrong_parts(framework: Any, spec: Any, key: Any, error: type[Exception], message: str) -> None:
    q = framework.api.quantize(framework.array(data(3, 4, 40)), spec)
    with pytest.raises(error, match=message):
        q[key]


# ---- sizes and text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "packed", "bits_per_value", "nbytes"),
    [
        ("int8", None, 8 + 32 / 256, 256 + 4),
        ("mxfp8_e4m3", None, 8.25, 256 + 8),
        ("mxfp6_e3m2", True, 6.25, 192 + 8),
        ("mxfp4", None, 4.25, 128 + 8),
        ("mxint8", None, 8.25, 256 + 8),
        ("nvfp4", None, 4.5 + 32 / 256, 128 + 16 + 4),
        ("mx6", None, 6.0, 256 + 16 + 16),
        ("mx6", True, 6.0, 160 + 16 + 16),
        ("mx9", None, 9.0, 256 + 16 + 16),
        ("bfp16", None, 9.0, 256 + 32),
        ("bfp16", True, 9.0, 9 * 32),
    ],
)
def test_sizes(framework: Any, preset: str, packed: bool | None, bits_per_value: float, nbytes: int) -> None:
    q = framework.api.quantize(framework.array(data(4, 64)), preset, packed=packed)
    assert q.bits_per_value == bits_per_value
    assert q.nbytes == nbytes


def test_broken_parts_have_a_text(framework: Any) -> None:
    q = framework.api.quantize(framework.array(data(4, 64)), "int8")
    assert "int8" in repr(dataclasses.replace(q, pair_bits=q.qvalue))


def test_repr(framework: Any) -> None:
    x = framework.array(data(4, 64))
    assert repr(framework.api.quantize(x, "nvfp4")) == (
        "QTensor(nvfp4, shape=(4, 64), dtype=float32, packed, scale(4, 4), 4.625 bits/value, 148 bytes)"
    )
    assert repr(framework.api.quantize(x, "bfp16", packed=True)) == (
        "QTensor(bfp16, shape=(4, 64), dtype=float32, packed, scale(4, 8), 9 bits/value, 288 bytes)"
    )
    assert repr(framework.api.quantize(x, "int8", axis=0)).startswith("QTensor(int8 channel=0, shape=(4, 64)")


# ---- native forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["mxfp8_e4m3", "mxfp8_e5m2", "mxfp4", "nvfp4"])
def test_native_in_a_scaled_dot(jax_frontend: Any, preset: str) -> None:
    """XLA's own product of native forms is that of the dequantized arrays (in float32: sums of few exact products)."""
    import jax
    import jax.numpy as jnp

    api = jax_frontend.api
    a, b = api.quantize(data(8, 64), preset), api.quantize(data(64, 5), preset, axis=0)
    (qa, sa), (qb, sb) = a.native(), b.native()
    assert qa.shape == a.shape
    got = jax.lax.scaled_dot(qa, qb, lhs_scale=sa, rhs_scale=sb, preferred_element_type=jnp.float32)
    if preset == "nvfp4":
        assert qa.dtype == jnp.float4_e2m1fn
        got = got * (a.global_scale * b.global_scale)
    expected = np.asarray(a.dequantize(), np.float64) @ np.asarray(b.dequantize(), np.float64)
    np.testing.assert_allclose(np.asarray(got), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("preset", ["int4", "uint4", "int2", "fp4"])
def test_native_codes_in_jax(jax_frontend: Any, preset: str) -> None:
    for packed in (True, False):
        q = jax_frontend.api.quantize(data(3, 7), preset, axis=0, scale=np.full(3, 0.5, np.float32), packed=packed)
        codes, _ = q.native()
        assert codes.shape == (3, 7)
        values = np.asarray(codes.astype(np.float32)) * np.float32(0.5)
        np.testing.assert_array_equal(values, np.asarray(q.dequantize()))


def swizzled(scales: np.ndarray) -> np.ndarray:
    """The layout by its definition, one scale at a time."""
    rows, columns = -(-scales.shape[0] // 128) * 128, -(-scales.shape[1] // 4) * 4
    out = np.zeros(rows * columns, np.uint8)
    for (r, c), scale in np.ndenumerate(scales):
        out[((r // 128) * (columns // 4) + c // 4) * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4] = scale
    return out


@pytest.mark.parametrize("shape", [(128, 128), (200, 96), (1, 32), (300, 500)])
@pytest.mark.parametrize("preset", ["mxfp4", "nvfp4", "mxfp8_e4m3"])
def test_native_in_torch(torch_frontend: Any, preset: str, shape: tuple[int, int]) -> None:
    import torch

    q = torch_frontend.api.quantize(torch.from_numpy(data(*shape)), preset)
    codes, scale = q.native()
    assert codes.data_ptr() == q.qvalue.data_ptr()
    assert scale is q.scale
    assert codes.dtype == (torch.float8_e4m3fn if preset == "mxfp8_e4m3" else torch.float4_e2m1fn_x2)
    _, blocked = q.native(swizzled=True)
    assert blocked.dtype == scale.dtype
    np.testing.assert_array_equal(blocked.view(torch.uint8).numpy(), swizzled(scale.view(torch.uint8).numpy()))


def test_no_native_form(torch_frontend: Any, jax_frontend: Any) -> None:
    x = data(4, 64)
    for frontend in (torch_frontend, jax_frontend):
        array = frontend.array(x)
        with pytest.raises(ValueError, match="bfp16.*has no native form"):
            frontend.api.quantize(array, "bfp16").native()
        for preset, name in (("mxfp6_e2m3", "fp6_e2m3"), ("mxint8", "int8f6")):  # whose codes count 64ths
            with pytest.raises(ValueError, match=f"no dtype for codes of {name}"):
                frontend.api.quantize(array, preset).native()
    with pytest.raises(ValueError, match="fp4 codes are one a byte"):
        torch_frontend.api.quantize(torch_frontend.array(x), "mxfp4", packed=False).native()
    with pytest.raises(ValueError, match="swizzled is True; the scales are torch.float32"):
        torch_frontend.api.quantize(torch_frontend.array(x), "fp8_e4m3").native(swizzled=True)


def test_to_a_device(torch_frontend: Any) -> None:
    """Every array moves; the meta device stands for another one."""
    q = torch_frontend.api.quantize(torch_frontend.array(data(4, 64)), "mx6").to("meta")
    assert {q.qvalue.device.type, q.scale.device.type, q.pair_bits.device.type} == {"meta"}
