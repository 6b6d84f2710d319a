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
