"""Gradients against the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import reference
from frontends import bits
from matrix import CASES, Case, numpy_dtype
from test_forward import assert_same, skip_layouts

SOME = [case for case in CASES if case.layout in ("rows", "transposed")]


@pytest.mark.parametrize("case", SOME, ids=str)
def test_clipped(case: Case, frontend: Any) -> None:
    skip_layouts(frontend, case)
    through = case.gradient.astype(np.float32).astype(numpy_dtype(case.dtype))  # float64 is computed in float32
    expected = np.where(case.passes, through, np.zeros((), through.dtype))
    assert_same(bits(frontend.clipped_gradient(case)), bits(expected), "gradients")


@pytest.mark.parametrize("case", [c for c in SOME if not c.spec.element.is_cast and c.x.size], ids=str)
def test_dequantize_to_scale(case: Case, frontend: Any) -> None:
    skip_layouts(frontend, case)
    zero = None if case.zero is None else reference.expand(case.zero, case.shape, case.block)
    grad = np.asarray(case.gradient).astype(np.float32).astype(np.float64)
    expected = reference.dequantize_scale_gradient(case.codes, case.spec.format, zero, grad, case.block)
    assert_same(bits(frontend.scale_gradient(case)), bits(expected), "scale gradients")


def test_sum_of_a_million_terms(frontend: Any) -> None:
    case = Case(CASES[0].spec, shape=(1_300_001,), given=True)
    grad = case.gradient.astype(np.float64)
    expected = reference.dequantize_scale_gradient(case.codes, case.spec.format, None, grad, case.block)
    assert_same(bits(frontend.scale_gradient(case)), bits(expected), "scale gradients")


def test_straight_through(framework: Any) -> None:
    x = framework.array(np.array([-1e9, -1.0, 0.3, np.nan, np.inf, 1e9], np.float32))
    seen = np.arange(1.0, 7.0, dtype=np.float32)
    if framework.name == "torch":
        x.requires_grad_()
        y = framework.api.fake_quantize(x, "int8", scale=0.1, gradient="ste")
        y.backward(framework.array(seen))
        got = framework.numpy(x.grad)
    else:
        import jax

        _, back = jax.vjp(lambda x: framework.api.fake_quantize(x, "int8", scale=0.1, gradient="ste"), x)
        got = framework.numpy(back(framework.array(seen))[0])
    assert np.array_equal(got, seen)


@pytest.mark.parametrize("gradient", ["clipped", "ste"])
@pytest.mark.parametrize("scale", [0.01, None])
def test_second_order(gradient: str, scale: float | None, framework: Any) -> None:
    """The second derivative of sum(fake_quantize(x) * x^2): a gradient's gradient goes through the mask again."""
    x = np.array([0.3, -0.7, 5.0, 0.011], np.float32)
    api = framework.api

    if framework.name == "torch":
        import torch

        t = framework.array(x).requires_grad_()
        y = (api.fake_quantize(t, "int8", scale=scale, gradient=gradient) * t**2).sum()
        (first,) = torch.autograd.grad(y, t, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), t)
    else:
        import jax

        def f(x: Any) -> Any:
            return (api.fake_quantize(x, "int8", scale=scale, gradient=gradient) * x**2).sum()

        first = jax.grad(f)(x)
        second = jax.grad(lambda x: jax.grad(f)(x).sum())(x)
    fake = framework.numpy(api.fake_quantize(framework.array(x), "int8", scale=scale))
    inside = (np.abs(x) < 1.28) | (gradient == "ste") | (scale is None)
    # With m the mask and f the numbers: f' = m, so (f x^2)' = m x^2 + 2 f x, and its derivative m 2x + 2 m x + 2 f.
    assert np.allclose(framework.numpy(first), inside * x**2 + 2 * fake * x)
    assert np.allclose(framework.numpy(second), 4 * inside * x + 2 * fake)


def test_second_order_to_the_scale(framework: Any) -> None:
    """d/ds of d/ds sum(dequantize(s)^3) is 6 s q^3 summed."""
    import dataclasses

    q = framework.api.quantize(framework.array(np.array([0.3, -0.7, 1.2, 0.011], np.float32)), "int8", scale=0.01)
    codes = framework.numpy(q.qvalue).astype(np.float64)
    if framework.name == "torch":
        import torch

        s = q.scale.requires_grad_()
        (first,) = torch.autograd.grad((q.dequantize() ** 3).sum(), s, create_graph=True)
        (second,) = torch.autograd.grad(first, s)
    else:
        import jax

        second = jax.grad(jax.grad(lambda s: (dataclasses.replace(q, scale=s).dequantize() ** 3).sum()))(q.scale)
    assert np.allclose(float(second), 6 * 0.01 * (codes**3).sum(), rtol=1e-5)


def test_scales_are_constants(framework: Any) -> None:
    """fake_quantize's gradient to a given scale is none in torch and zero in JAX."""
    x, s = np.linspace(-3, 3, 7, dtype=np.float32), np.float32(0.1)
    if framework.name == "torch":
        scale = framework.array(np.array(s)).requires_grad_()
        assert not framework.api.fake_quantize(framework.array(x), "int8", scale=scale).requires_grad
    else:
        import jax

        grad = jax.grad(lambda s: framework.api.fake_quantize(framework.array(x), "int8", scale=s).sum())(s)
        assert grad == 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch's own, at the first use of forward mode
def test_torch_forward_mode_is_refused(torch_frontend: Any) -> None:
    import torch
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.ones(3), torch.ones(3))
        with pytest.raises(NotImplementedError, match="jvp"):
            torch_frontend.api.fake_quantize(x, "int8", scale=0.1)
