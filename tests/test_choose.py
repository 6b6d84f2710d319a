"""choose_qparams: percentiles and the least squared error, against the oracle and against what they promise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import reference
from frontends import bits
from matrix import CHOICES, Case, filled, numpy_dtype
from quark_kernels import PRESETS, PerBlock, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec
from test_forward import assert_same


@pytest.mark.parametrize("case", CHOICES, ids=str)
def test_against_the_oracle(case: Case, framework: Any) -> None:
    scale, zero = framework.choose_qparams(case)
    assert scale.dtype == case.scale.dtype
    assert_same(bits(scale), bits(case.scale), "scales")
    assert (zero is None) == (case.zero is None)
    if zero is not None and case.zero is not None:
        assert_same(zero.astype(np.int64), case.zero.astype(np.int64), "zero points")


def test_the_oracle_finds_percentiles_by_rank() -> None:
    """Of 1 .. 1000 the 99.5th percentile is the 995th; without P, 99.99, it is the last."""
    x = np.random.default_rng(0).permutation(np.arange(1, 1001)).astype(np.float32) * np.float32(-1)
    for method, rank in (
        ("percentile=99.5", 995),
        ("percentile=0.01", 1),
        ("percentile=99.91", 1000),
        ("percentile", 1000),
    ):
        scale, _ = reference.choose_qparams(x, "int8", (0,), method=method)
        assert scale == np.float32(rank) / np.float32(127)
    scale, zero = reference.choose_qparams(x, "uint8", (0,), symmetric=False, method="percentile=50")
    assert (scale, zero) == (np.float32(500) / np.float32(255), 255)


def errors(x: np.ndarray, fmt: str, method: str, framework: Any, **arguments: Any) -> float:
    """The squared error after choosing scales in the way of the method."""
    spec = QuantSpec(fmt, **arguments)
    scale, zero = framework.api.choose_qparams(framework.array(x), spec, method=method)
    fake = framework.api.fake_quantize(framework.array(x), spec, scale=scale, zero_point=zero)
    return float(np.square(framework.numpy(fake).astype(np.float64) - x).sum())


@pytest.mark.parametrize("fmt", ["int2", "int4", "int8", "uint4", "fp4", "fp6_e2m3"])
@pytest.mark.parametrize(
    "granularity", [PerTensor(), PerChannel(0), PerGroup(32), PerToken(), PerBlock((2, 16))], ids=str
)
def test_mse_beats_absmax(fmt: str, granularity: Any, framework: Any) -> None:
    """Heavy tails: an extreme value isn't worth coarse steps for all others. absmax is a candidate."""
    x = np.random.default_rng(3).standard_t(2, (8, 128)).astype(np.float32)
    arguments = {"granularity": granularity, "symmetric": not fmt.startswith("uint")}
    mse, absmax = (errors(x, fmt, method, framework, **arguments) for method in ("mse", "absmax"))
    assert mse <= absmax
    if fmt in ("int2", "int4", "uint4"):
        assert mse < absmax


def test_mse_tries_80_ranges_and_takes_the_first_of_the_best(framework: Any) -> None:
    """int2 has the codes -2 .. 1. Many 0.2 are worth more than one 1; -1 is exact with steps of 1 and of 1/2."""
    narrowest = np.full(1000, 0.2, np.float32)
    narrowest[7] = 1
    for x, expected in ((narrowest, np.float32(21) / np.float32(100)), (np.float32([-1, -1, 0]), np.float32(1))):
        scale, _ = framework.api.choose_qparams(framework.array(x), "int2", method="mse")
        assert framework.numpy(scale) == expected


def test_percentile_drops_outliers(framework: Any) -> None:
    x = np.ones(10_000, np.float32)
    x[5] = 1e6
    scale, _ = framework.api.choose_qparams(framework.array(x), "int8", method="percentile")
    assert framework.numpy(scale) == np.float32(1) / np.float32(127)
    whole, _ = framework.api.choose_qparams(framework.array(x), "int8", method="percentile=100")
    assert framework.numpy(whole) == np.float32(1e6) / np.float32(127)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", ["percentile=50", "mse"])
@pytest.mark.parametrize("name", ["int8", "uint4", "mxfp4"])
def test_a_group_that_is_not_finite(name: str, method: str, bad: float, framework: Any) -> None:
    """Even where the percentile would drop the value."""
    x = np.ones((2, 64), np.float32)
    x[1, 40] = bad
    spec = replace(PRESETS[name], granularity=PerGroup(32))
    scale, _ = framework.api.choose_qparams(framework.array(x), spec, method=method)
    assert np.isnan(framework.numpy(scale).astype(np.float32)).tolist() == [[False, False], [False, True]]


@pytest.mark.parametrize("method", ["percentile=99", "mse"])
def test_many_elements(method: str, framework: Any) -> None:
    """More than one chunk of the sum's tree, and of the threads' work."""
    x = filled("near", np.random.default_rng(0), 40_003, np.dtype(np.float32))
    for spec in (QuantSpec("int4"), QuantSpec("uint8", symmetric=False), QuantSpec("fp4", scale_format="e8m0")):
        case = Case(spec, x.shape, method=method)
        case.__dict__["x"] = x
        scale, zero = framework.choose_qparams(case)
        assert_same(bits(scale), bits(case.scale), "scales")
        assert (zero is None) == (case.zero is None)
        if zero is not None:
            assert zero == case.zero


@pytest.mark.parametrize("method", ["percentile=90", "mse"])
def test_layouts(method: str, torch_frontend: Any) -> None:
    for layout in ("transposed", "sliced", "broadcast"):
        case = Case(QuantSpec("uint4", PerGroup(16), symmetric=False), layout=layout, data="near", method=method)
        scale, zero = torch_frontend.choose_qparams(case)
        assert_same(bits(scale), bits(case.scale), "scales")
        assert_same(zero, case.zero, "zero points")


@pytest.mark.parametrize("method", ["percentile=90", "mse"])
def test_under_jit_and_vmap(method: str, jax_frontend: Any) -> None:
    import jax

    choose, tiny = jax_frontend.api.choose_qparams, filled("tiny", np.random.default_rng(0), 300, np.dtype(np.float32))
    for x in (
        tiny.reshape(3, 100),
        filled("near", np.random.default_rng(0), 300, numpy_dtype("bfloat16")).reshape(3, 100),
    ):
        case = Case(QuantSpec("int4", PerToken()), x.shape, x.dtype.name, method=method)
        case.__dict__["x"] = x
        jitted = jax.jit(lambda x, m=method: choose(x, "int4", axis=0, method=m)[0])(x)
        mapped = jax.vmap(lambda x, m=method: choose(x, "int4", method=m)[0])(x)
        assert_same(bits(np.asarray(jitted)).ravel(), bits(case.scale).ravel(), "scales under jit")
        assert_same(bits(np.asarray(mapped)), bits(case.scale).ravel(), "scales under vmap")


@pytest.mark.parametrize(
    "method",
    ["percentile=0", "percentile=-1", "percentile=100.01", "percentile=nan", "percentile=", "percentile=x", "MSE"],
)
def test_wrong_methods(method: str, framework: Any) -> None:
    with pytest.raises(ValueError, match="method"):
        framework.api.choose_qparams(framework.array(np.ones(4, np.float32)), "int8", method=method)


@pytest.mark.parametrize("method", ["percentile", "percentile=99", "mse"])
@pytest.mark.parametrize("name", ["nvfp4", "mx6", "mx9", "bfp16"])
def test_formats_without_a_search(name: str, method: str, framework: Any) -> None:
    with pytest.raises(ValueError, match="method"):
        framework.api.choose_qparams(framework.array(np.ones((2, 32), np.float32)), name, method=method)
