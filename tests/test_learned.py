"""LSQ and TQT: gradients bit for bit, against the papers' formulas, and against finite differences.

`test_documented.py` goes over the cases of the matrix; here are the everyday functions, and what a table can't say.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

import reference
from frontends import bits
from matrix import EDGES, DocumentedCase, narrow, numpy_dtype
from test_documented import check, kernel, run_jax, wrong

ROUNDINGS = ("half_even", "half_up", "half_away", "floor", "ceil", "toward_zero")
Function = Callable[[Any, Any], Any]  # of x and the parameter


def gradients(framework: Any, f: Function, x: Any, p: Any, g: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """f's result, and its gradients to x and the parameter."""
    if framework.name == "torch":
        import torch

        tensors = [framework.array(np.array(a)).requires_grad_() for a in (x, p)]
        y = f(*tensors)
        return tuple(map(framework.numpy, (y, *torch.autograd.grad(y, tensors, framework.array(g)))))  # type: ignore[return-value]
    import jax

    with jax.enable_x64(x.dtype == np.float64):
        y, back = jax.vjp(f, framework.array(x), framework.array(p))
        return tuple(map(framework.numpy, (y, *back(framework.array(g)))))  # type: ignore[return-value]


def expect(got: np.ndarray, expected: np.ndarray, what: str) -> None:
    with np.errstate(invalid="ignore"):
        assert wrong(what, got, expected) == []


# ---- the papers' formulas --------------------------------------------------------------------------------------------


class Slopes(NamedTuple):
    """What LSQ (equations 2 and 3) and TQT (7 and 8) say of every element, with a zero point."""

    inside: np.ndarray
    d: np.ndarray  # of the fake-quantized number to the scale
    x: np.ndarray
    residual: np.ndarray  # R(v) - v


def slopes(x: np.ndarray, s: Any, z: Any, low: int, high: int, rounding: str, shifted: bool = False) -> Slopes:
    """`s` and `z` broadcast to x. `shifted`: z is added before rounding."""
    with np.errstate(all="ignore"):
        x32 = x.astype(np.float32)
        v = (x32 / np.float32(s)).astype(np.float32)
        if shifted:
            v = v + np.float32(z)
        v = v.astype(np.float64)
        residual = reference.ROUNDINGS[rounding](v) - v
        r = reference.ROUNDINGS[rounding](v) + (0 if shifted else z)
        d = np.where(r < low, low - np.float64(z), np.where(r > high, high - np.float64(z), residual))
    d = np.where(np.isnan(v), 0, d.astype(np.float32).astype(np.float64))
    return Slopes((low <= r) & (r <= high), d, x32.astype(np.float64), residual)


def summed(terms: np.ndarray, axis: int | None) -> np.ndarray:
    """The fixed-order sums over all axes but one."""
    if axis is None:
        return np.array(reference.tree_sum(terms.ravel()))
    rows = np.moveaxis(terms, axis, 0)
    return np.array([reference.tree_sum(row.ravel()) for row in rows])


def broadcast(a: Any, rank: int, axis: int | None) -> Any:
    return a if axis is None or np.ndim(a) == 0 else np.moveaxis(a.reshape(-1, *[1] * (rank - 1)), 0, axis)


def data(seed: int, shape: tuple[int, ...], dtype: str = "float32", special: bool = True) -> np.ndarray:
    random = np.random.default_rng(seed)
    x = random.standard_normal(math.prod(shape)) * 2.0
    if special:
        x[: len(EDGES)] = EDGES
        random.shuffle(x)
    with np.errstate(over="ignore", under="ignore"):
        return x.reshape(shape).astype(numpy_dtype(dtype))


# ---- the everyday functions ------------------------------------------------------------------------------------------

PLACES = ((None, (5, 31)), (0, (5, 31)), (-1, (5, 31)), (1, (4, 6, 7)))


@pytest.mark.parametrize("zero", [None, "integer", 300])
@pytest.mark.parametrize(("axis", "shape"), PLACES, ids=str)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_everyday_lsq(rounding: str, axis: int | None, shape: tuple[int, ...], zero: Any, framework: Any) -> None:
    seed = ROUNDINGS.index(rounding) * 4 + len(shape)
    random = np.random.default_rng(seed)
    dtype = ("float32", "float16", "bfloat16", "float64")[seed % 4]
    scale_dtype = numpy_dtype(("float32", "bfloat16", "float16")[seed % 3])
    low, high = ((-8, 7), (0, 255), (-128, 127))[seed % 3]
    x, g = data(seed, shape, dtype), random.standard_normal(shape).astype(numpy_dtype(dtype))
    scales = () if axis is None else (shape[axis],)
    s = np.asarray(random.uniform(0.02, 0.7, scales)).astype(scale_dtype)
    z = random.integers(-3, 4, scales, dtype=np.int32) if zero == "integer" else zero
    factor = None if zero is None else 0.037

    def f(x: Any, s: Any) -> Any:
        z_array = framework.array(z) if isinstance(z, np.ndarray) else z
        return framework.api.lsq_quantize(
            x, s, z_array, quant_min=low, quant_max=high, axis=axis, grad_factor=factor, rounding=rounding
        )

    y, dx, ds = gradients(framework, f, x, s, g)
    s32, whole = s.astype(np.float32), 0 if z is None else z
    s_all, z_all = broadcast(s32, x.ndim, axis), broadcast(whole, x.ndim, axis)
    fmt = "uint8" if low == 0 else "int8"
    numbers = reference.fake_quantize(x.astype(np.float32), fmt, s_all, z_all, rounding, low, high, dtype)
    expect(y, reference.to_bits(numbers, dtype).view(x.dtype), "y")
    at = slopes(x, s_all, z_all, low, high, rounding)
    g32 = g.astype(np.float32)
    expect(dx, np.where(at.inside, g32, np.float32(0)).astype(x.dtype), "the gradient of x")
    elements = x.size // s.size
    used = np.float32(1 / math.sqrt(elements * high) if factor is None else factor)
    total = float(used) * summed(g32.astype(np.float64) * at.d, axis)
    expect(ds, narrow(np.asarray(total).astype(np.float32), scale_dtype).reshape(s.shape), "the gradient of scale")


@pytest.mark.parametrize("zero", [None, -3, 300])
@pytest.mark.parametrize("number", [2, 4, 8, 16])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_everyday_tqt(rounding: str, number: int, zero: int | None, framework: Any) -> None:
    seed = ROUNDINGS.index(rounding) * 4 + number
    dtype = ("float32", "float16", "bfloat16", "float64")[seed % 4]
    shape, threshold_dtype = (5, 31), numpy_dtype(("float32", "bfloat16", "float16")[seed % 3])
    x, g = data(seed, shape, dtype), np.random.default_rng(seed).standard_normal(shape).astype(numpy_dtype(dtype))
    t = np.array([0.75]).astype(threshold_dtype)

    def f(x: Any, t: Any) -> Any:
        return framework.api.tqt_quantize(x, t, bits=number, zero_point=zero, rounding=rounding)

    y, dx, dt = gradients(framework, f, x, t, g)
    domain, z = 2 ** (number - 1), 0 if zero is None else zero
    s = np.float32(2.0 / domain)
    numbers = reference.fake_quantize(x.astype(np.float32), "int16", s, z, rounding, -domain, domain - 1, dtype)
    expect(y, reference.to_bits(numbers, dtype).view(x.dtype), "y")
    at = slopes(x, s, z, -domain, domain - 1, rounding)
    g32 = g.astype(np.float32)
    expect(dx, np.where(at.inside, g32, np.float32(0)).astype(x.dtype), "the gradient of x")
    total = float(s) * math.log(2) * summed(g32.astype(np.float64) * at.d, None)
    expect(dt, narrow(total.astype(np.float32), threshold_dtype).reshape(1), "the gradient of log_threshold")


# ---- the documented functions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [None, -3, 2.5, 0.1])
@pytest.mark.parametrize("mode", [2, 3, 8])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_documented_lsq(axis: int | None, mode: int, zero: Any, framework: Any) -> None:
    x, g = data(mode, (5, 31)), data(mode + 1, (5, 31), special=False)
    s = np.array(0.3, np.float32) if axis is None else np.linspace(0.05, 0.6, x.shape[axis], dtype=np.float32)
    call = kernel(framework).lsq_quantize
    _, dx, ds = gradients(framework, lambda x, s: call(x, s, zero, 0.5, -8, 7, axis, mode), x, s, g)
    rounding = reference.ROUND_MODES[mode]
    at = slopes(x, broadcast(s, 2, axis), np.float32(zero or 0), -8, 7, rounding, shifted=True)
    expect(dx, np.where(at.inside, g, np.float32(0)), "the gradient of x")
    expect(ds, (0.5 * summed(g.astype(np.float64) * at.d, axis)).astype(np.float32), "the gradient of scale")


@pytest.mark.parametrize("zero", [None, -3, 2.5, 0.1])
@pytest.mark.parametrize("mode", [2, 3, 8])
def test_documented_tqt(mode: int, zero: Any, framework: Any) -> None:
    x, g, t = data(mode, (5, 31)), data(mode + 1, (5, 31), special=False), np.array(1.2, np.float32)
    call = kernel(framework).tqt_quantize
    _, dx, dt = gradients(framework, lambda x, t: call(x, t, zero, 8, mode), x, t, g)
    at = slopes(x, 0.5, np.float32(zero or 0), -8, 7, reference.ROUND_MODES[mode])
    expect(dx, np.where(at.inside, g, np.float32(0)), "the gradient of inputs")
    total = 0.5 * math.log(2) * summed(g.astype(np.float64) * at.d, None)
    expect(dt, total.astype(np.float32), "the gradient of log_threshold")


MILLION = [
    DocumentedCase("tqt_quantize", shape=(1_300_001,), scale=1.0, size=8, scale_layout="0-d"),
    DocumentedCase("lsq_quantize", shape=(3, 350_003), clamp=(-8, 7), scale_layout="0-d"),
    DocumentedCase("lsq_quantize", shape=(2, 1_049_601), clamp=(-8, 7), qscheme="per_channel", axis=0),
    DocumentedCase("lsq_quantize", shape=(1_049_601, 2), clamp=(-8, 7), qscheme="per_channel", axis=1),
]


@pytest.mark.parametrize("case", MILLION, ids=str)
def test_sum_of_a_million_terms(case: DocumentedCase, framework: Any) -> None:
    result = framework.documented(case) if framework.name == "torch" else run_jax([case])[0]
    assert check(case, result) == []


# ---- finite differences ----------------------------------------------------------------------------------------------


def difference(loss: Callable[[float], float], at: float) -> float:
    h = 1e-4 * abs(at)
    return (loss(at + h) - loss(at - h)) / (2 * h)


@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize("mode", [2, 3, 8])
def test_lsq_finite_differences(mode: int, zero: int, framework: Any) -> None:
    """With R(v) - v and the side of the range held, y = s * clamp(x / s + (R(v) - v)) is smooth in s and x."""
    x, g, s0 = data(3, (211,), special=False), data(4, (211,), special=False), 0.23
    call = kernel(framework).lsq_quantize
    scale = np.array(s0, np.float32)
    _, dx, ds = gradients(framework, lambda x, s: call(x, s, zero, 1.0, -8, 7, None, mode), x, scale, g)
    at = slopes(x, scale, zero, -8, 7, reference.ROUND_MODES[mode], shifted=True)
    assert 0 < at.inside.sum() < x.size
    end = np.where(x < 0, -8 - zero, 7 - zero)

    def loss(s: float, x: np.ndarray = at.x) -> float:
        return float((g.astype(np.float64) * s * np.where(at.inside, x / s + at.residual, end)).sum())

    assert np.isclose(ds, difference(loss, float(scale)), rtol=1e-5)
    by_x = [
        difference(lambda a, i=i: loss(float(scale), np.where(np.arange(211) == i, a, at.x)), at.x[i]) for i in range(9)
    ]
    assert np.allclose(dx[:9], by_x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize("mode", [2, 3, 8])
def test_tqt_finite_differences(mode: int, zero: int, framework: Any) -> None:
    """Likewise in the threshold, ceil(t) - t being held too: s = 2^(t + (ceil(t0) - t0)) / domain."""
    x, g, t0 = data(5, (211,), special=False), data(6, (211,), special=False), np.array(0.6, np.float32)
    call = kernel(framework).tqt_quantize
    _, _, dt = gradients(framework, lambda x, t: call(x, t, zero, 8, mode), x, t0, g)
    at = slopes(x, 0.25, zero, -8, 7, reference.ROUND_MODES[mode])
    end = np.where(x < 0, -8 - zero, 7 - zero)

    def loss(t: float) -> float:
        s = 2.0 ** (t + 1 - float(t0)) / 8
        return float((g.astype(np.float64) * s * np.where(at.inside, at.x / s + at.residual, end)).sum())

    assert np.isclose(dt, difference(loss, float(t0)), rtol=1e-5)


@pytest.mark.parametrize("name", ["int8", "fp8_e4m3", "fp4"])
def test_dequantize_finite_differences(name: str, framework: Any) -> None:
    """dequantize is linear in its scales, so a wide difference is the derivative."""
    import dataclasses

    x, g = data(7, (6, 20), special=False), data(8, (6, 20), special=False)
    scale = np.linspace(0.01, 0.3, 6, dtype=np.float32).reshape(6, 1)
    q = framework.api.quantize(framework.array(x), name, scale=framework.array(scale), axis=0)

    def f(_: Any, s: Any) -> Any:
        return dataclasses.replace(q, scale=s).dequantize() + 0 * _

    _, _, ds = gradients(framework, f, x, scale, g)

    def loss(s: np.ndarray) -> np.ndarray:
        y = framework.numpy(dataclasses.replace(q, scale=framework.array(s)).dequantize())
        return (g.astype(np.float64) * y).sum(axis=1, keepdims=True)

    half = scale / 2
    assert np.allclose(ds, (loss(scale + half) - loss(scale - half)) / (2 * half), rtol=1e-5, atol=1e-5)


# ---- what else is promised -------------------------------------------------------------------------------------------


def test_python_numbers(framework: Any) -> None:
    """A scale that is a number gives the bits of the 0-d array, and a gradient to x."""
    x, g = data(9, (5, 31)), data(10, (5, 31), special=False)
    api, k, array = framework.api, kernel(framework), framework.array
    pairs: list[Function] = [
        lambda x, p: api.lsq_quantize(x, p, 2, quant_min=-8, quant_max=7),
        lambda x, p: api.tqt_quantize(x, p, bits=4),
        lambda x, p: k.lsq_quantize(x, p, 2, 0.1, -8, 7),
        lambda x, p: k.tqt_quantize(x, p, None, 8, 8),
    ]
    for f in pairs:
        y, dx, _ = gradients(framework, f, x, np.array(0.25, np.float32), g)
        assert np.array_equal(bits(framework.numpy(f(array(x), 0.25))), bits(y))
        dummy = np.zeros((), np.float32)
        _, again, _ = gradients(framework, lambda x, d, f=f: f(x, 0.25) + 0 * d, x, dummy, g)
        assert np.array_equal(bits(again), bits(dx))


def test_numbers_and_arrays_for_the_rest(framework: Any) -> None:
    """domain and grad_factor: a number, or one element of any shape and dtype."""
    x, g, k = data(11, (5, 31)), data(12, (5, 31), special=False), kernel(framework)
    p, array = np.array(0.3, np.float32), framework.array
    for domain in (8.0, np.array([[8]], np.int32), np.array(8, np.float16)):
        given = array(domain) if isinstance(domain, np.ndarray) else domain
        got = gradients(framework, lambda x, t, d=given: k.tqt_quantize(x, t, None, d, 2), x, p, g)
        for a, b in zip(got, gradients(framework, lambda x, t: k.tqt_quantize(x, t, None, 8, 2), x, p, g), strict=True):
            assert np.array_equal(bits(a), bits(b))
    factor = array(np.array([0.125], np.float32))
    got = gradients(framework, lambda x, s: k.lsq_quantize(x, s, None, factor, -8, 7), x, p, g)
    for a, b in zip(
        got, gradients(framework, lambda x, s: k.lsq_quantize(x, s, None, 0.125, -8, 7), x, p, g), strict=True
    ):
        assert np.array_equal(bits(a), bits(b))


@pytest.mark.parametrize("g", [np.inf, -np.inf, np.nan])
def test_masks_select(g: float, framework: Any) -> None:
    """An infinite gradient where x saturates gives no NaN."""
    x, s = np.array([-9.0, 0.2, 9.0, np.nan, np.inf], np.float32), np.array(0.5, np.float32)
    grad = np.array([g, 1.0, g, g, g], np.float32)
    for f in (
        lambda x, s: kernel(framework).lsq_quantize(x, s, None, 1.0, -4, 3),
        lambda x, s: kernel(framework).tqt_quantize(x, s, None, 4, 8),
        lambda x, s: framework.api.lsq_quantize(x, s, quant_min=-4, quant_max=3),
    ):
        _, dx, _ = gradients(framework, f, x, s, grad)
        assert np.array_equal(bits(dx), bits(np.array([0, 1, 0, 0, 0], np.float32)))


def test_zero_point_has_no_gradient(framework: Any) -> None:
    x, z = data(13, (5, 31), special=False), np.array(1.5, np.float32)
    k = kernel(framework)
    for f in (lambda x, z: k.lsq_quantize(x, 0.3, z, 1.0, -8, 7), lambda x, z: k.tqt_quantize(x, 1.0, z, 8, 8)):
        if framework.name == "torch":
            import torch

            tensors = [framework.array(a).requires_grad_() for a in (x, z)]
            assert torch.autograd.grad(f(*tensors).sum(), tensors, allow_unused=True)[1] is None
        else:
            import jax

            assert jax.grad(lambda z, f=f: f(x, z).sum())(z) == 0


SECOND_ORDER: dict[str, Callable[[Any, Any], Function]] = {
    "lsq": lambda api, k: lambda x, p: k.lsq_quantize(x, p, None, 1.0, -8, 7),
    "tqt": lambda api, k: lambda x, p: k.tqt_quantize(x, p, None, 8, 8),
    "everyday lsq": lambda api, k: lambda x, p: api.lsq_quantize(x, p, quant_min=-8, quant_max=7),
    "everyday tqt": lambda api, k: lambda x, p: api.tqt_quantize(x, p),
}


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_second_order_is_refused(name: str, framework: Any) -> None:
    f = SECOND_ORDER[name](framework.api, kernel(framework))
    x, p = np.array([0.3, -0.7], np.float32), np.array(0.25, np.float32)
    if framework.name == "torch":
        import torch

        tensors = [framework.array(a).requires_grad_() for a in (x, p)]
        firsts = torch.autograd.grad((f(*tensors) ** 2).sum(), tensors, create_graph=True)
        for first in firsts:
            with pytest.raises(RuntimeError, match="once_differentiable"):
                first.sum().backward(retain_graph=True)
            with pytest.raises(RuntimeError, match="appears to not have been used"):
                torch.autograd.grad(first.sum(), tensors[0])
    else:
        import jax

        first = jax.grad(lambda x, p: (f(x, p) ** 2).sum(), argnums=1)
        for argument in (0, 1):
            with pytest.raises(ValueError, match="differentiat"):
                jax.grad(first, argnums=argument)(framework.array(x), framework.array(p))


def test_subnormal_factor(framework: Any) -> None:
    """XLA's threads flush subnormals; the core mustn't."""
    x, s, call = np.array([0.3, -0.7, 2.2], np.float32), np.array(0.25, np.float32), kernel(framework).lsq_quantize
    g = np.full(3, 1e30, np.float32)
    _, _, ds = gradients(framework, lambda x, s: call(x, s, None, 1e-39, -8, 7), x, s, g)
    at = slopes(x, s, 0, -8, 7, "half_even")
    expected = float(np.float32(1e-39)) * summed(g.astype(np.float64) * at.d, None)
    expect(ds, expected.astype(np.float32), "the gradient of scale")
