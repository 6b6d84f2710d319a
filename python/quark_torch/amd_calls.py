"""AMD Quark's operators (``torch.ops.quark.*``) as calls of this core: the same arguments, translated.

Each function takes the rules of the installed version, then its operator's own arguments. It raises ``DeclinedError``
(or another TypeError or ValueError) where AMD Quark's own kernel has to take the call. Nothing is computed here:
tensors are converted and laid out, zeros among scales and subnormal inputs replaced, as AMD Quark does beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn.functional import hardshrink

from quark_kernels import documented
from quark_kernels.documented import CASTS, FP8, FP8_FORMATS, INTEGERS, MINIFLOATS
from quark_kernels.schema import OpSpec, Shape
from quark_torch import kernel
from quark_torch.functions import arrange, given, kind, one
from quark_torch.ops import call, dtype_name, planned

Tensor = torch.Tensor

LEAST_SCALE = 2.0**-23
"""What AMD Quark puts in the place of a zero scale of minifloats per group."""
NORMAL = 2.0**-126
LOW_PRECISION = {(2, 1, 6.0): "fp4", (3, 2, 28.0): "fp6_e3m2", (2, 3, 7.5): "fp6_e2m3"}
RULES = {"floor": "floor", "ceil": "ceil"}
"""Scale rules by AMD Quark's ``scale_calculation_mode``; all others are ``even``."""


class Rules(NamedTuple):
    """What depends on the installed version, and on the user."""

    strict: bool
    """AMD Quark's bits wherever it has defined ones."""
    default_mode: str
    """The ``scale_calculation_mode`` of a call that names none."""
    flushes: bool
    """mx6 and mx9 take subnormal inputs for zero, and keep a pair's codes in their range: since 0.13."""


class DeclinedError(ValueError):
    """AMD Quark's own kernel has to take the call."""


def _decline_if(condition: bool) -> None:
    if condition:
        raise DeclinedError


# ---- strictness ------------------------------------------------------------------------------------------------------


def _expect_tame(rules: Rules, x: Tensor, scale: Tensor | None, ratio: float = torch.inf) -> None:
    """Where strict: decline data with NaN, infinity or numbers above ``ratio`` scales, and scales that aren't normal.

    There AMD Quark and the core differ on purpose, or AMD Quark's result depends on the compiler.
    """
    if not rules.strict or not x.numel():
        return
    low, high = x.aminmax()
    amax = max(-float(low), float(high))
    least = 1.0
    if scale is not None and scale.numel():
        least, most = map(float, scale.aminmax())
        _decline_if(not NORMAL <= least <= most < torch.inf)
    _decline_if(not amax < torch.inf or amax > ratio * least)


# ---- arguments -------------------------------------------------------------------------------------------------------


def _expect_usual(rules: Rules, x: Tensor, axis: int, group_size: int, qscheme: str) -> None:
    """Where strict: decline what AMD Quark gives another shape than x's, or refuses."""
    if rules.strict:
        _decline_if(x.dim() == 0)
        _decline_if((qscheme == "per_channel" and axis < 0) or (qscheme == "per_group" and group_size < 1))


def _without_zeros(scale: Tensor) -> Tensor:
    return scale.masked_fill(scale == 0.0, LEAST_SCALE)


def _integer_zero_point(zero_point: Tensor) -> Tensor:
    """A zero point of integers. Where it is a float, the versions differ; where there is none, they raise."""
    _decline_if(zero_point.is_floating_point() or not zero_point.numel())
    return zero_point


# ---- fp8 -------------------------------------------------------------------------------------------------------------


def _as_documented(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An operator that is a documented function, whatever the version."""
    return lambda rules, *arguments: function(*arguments)


def quant_dequant_fp8(quant_dtype: str, rules: Rules, x: Tensor) -> Tensor:
    """Compute ``quant_dequant_fp8_*``."""
    return kernel.scaled_fake_quantize(quant_dtype, x, 1.0, None, None, None, None, None, None, "per_tensor")


# ---- scaled ----------------------------------------------------------------------------------------------------------


def scaled_fake_quantize(
    rules: Rules,
    quant_dtype: str,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int,
    group_size: int,
    quant_min: float,
    quant_max: float,
    round_mode: int,
    qscheme: str,
    mx_element_dtype: str = "None",
) -> Tensor:
    """Compute ``scaled_fake_quantize``."""
    _expect_usual(rules, x, axis, group_size, qscheme)
    if quant_dtype in INTEGERS:
        z = _integer_zero_point(zero_point)
        _expect_tame(rules, x, scale, 2.0**62)
        if qscheme == "per_group":  # always read flat, whatever the shape
            scale, z = scale.reshape(-1), z.reshape(-1)
        # The CPU rounds half to even, whatever is asked.
        mode = round_mode if x.is_cuda and qscheme == "per_tensor" else None
        how = (axis, group_size, quant_min, quant_max, mode, qscheme)
        return kernel.scaled_fake_quantize(quant_dtype, x, scale, z, *how)
    if quant_dtype in CASTS:
        return kernel.scaled_fake_quantize(quant_dtype, x, None, None, None, None, None, None, None, None)
    _decline_if(quant_dtype not in MINIFLOATS)
    if quant_dtype in FP8 and qscheme != "per_group":
        x, scale = _fp8_parts(x, scale, qscheme)
        return kernel.scaled_fake_quantize(quant_dtype, x, scale, None, axis, None, None, None, None, qscheme)
    return _fake_minifloats(rules, quant_dtype, x, _without_zeros(scale), axis, group_size, qscheme)


def _fp8_parts(x: Tensor, scale: Tensor, qscheme: str) -> tuple[Tensor, Tensor]:
    """The data and scale of fp8, in the dtypes in which AMD Quark divides: 16-bit data by [1] float32 in float32."""
    if qscheme == "per_channel":
        return x, scale.to(x.dtype)
    return x.to(torch.result_type(x, scale)), scale


def _fake_minifloats(
    rules: Rules, quant_dtype: str, x: Tensor, scale: Tensor, axis: int, group_size: int, qscheme: str
) -> Tensor:
    _decline_if(qscheme == "per_tensor")
    if qscheme == "per_group" or x.dtype == torch.float32:  # else its kernel takes 16-bit numbers for float32
        _expect_tame(rules, x, scale)
    s = scale.float().reshape(-1)
    plan = planned(_minifloat_plan, quant_dtype, x.shape, kind(s), axis, group_size, qscheme, False)
    return call("fake_quantize", [x, arrange(s, plan.scale), None], plan.spec)  # type: ignore[no-any-return]


def _minifloat_plan(
    quant_dtype: str, shape: torch.Size, scale: Any, axis: int, group_size: int, qscheme: str, real: bool
) -> documented.Plan:
    s = given(scale)
    assert s is not None
    return documented.minifloat_plan(quant_dtype, tuple(shape), s, axis, group_size, qscheme, real=real)


def scaled_real_quantize(
    rules: Rules,
    quant_dtype: str,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int,
    group_size: int,
    quant_min: float,
    quant_max: float,
    round_mode: int,
    qscheme: str,
) -> Tensor:
    """Compute ``scaled_real_quantize``. Of fp6 and fp4 AMD Quark returns the values of the codes, in float32."""
    _expect_usual(rules, x, axis, group_size, qscheme)
    if quant_dtype in INTEGERS:
        z = _integer_zero_point(zero_point)
        _expect_tame(rules, x, scale)
        how = (axis, group_size, quant_min, quant_max, None, qscheme)
        return kernel.scaled_real_quantize(quant_dtype, x, scale, z, *how)
    if quant_dtype in CASTS:
        return kernel.scaled_real_quantize(quant_dtype, x, None, None, None, None, None, None, None, None)
    _decline_if(quant_dtype not in MINIFLOATS)
    if quant_dtype in FP8:
        x, scale = _fp8_parts(x, scale, qscheme)
        return kernel.scaled_real_quantize(quant_dtype, x, scale, None, axis, None, None, None, None, qscheme)
    _decline_if(qscheme != "per_group")
    return _group_values(rules, quant_dtype, x, _without_zeros(scale), axis, group_size)


def _group_values(rules: Rules, quant_dtype: str, x: Tensor, scale: Tensor, axis: int, group_size: int) -> Tensor:
    _expect_tame(rules, x, scale)
    _decline_if(not x.dim())
    s = scale.float()
    if s.dim() == x.dim() + 1:  # the axis of the groups' elements
        s = s.squeeze(axis % x.dim() + 1)
    plan = planned(_minifloat_plan, quant_dtype, x.shape, kind(s), axis, group_size, "per_group", True)
    return call("quantize_values", [x, arrange(s, plan.scale)], plan.spec)  # type: ignore[no-any-return]


def dequantize(
    rules: Rules,
    quant_dtype: str,
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int,
    group_size: int,
    qscheme: str,
) -> Tensor:
    """Compute ``dequantize``."""
    _expect_usual(rules, q, axis, group_size, qscheme)
    if quant_dtype in FP8 and qscheme == "per_block":
        return dequantize_fp8_per_block(rules, q, scale, None)
    z = None
    if quant_dtype in INTEGERS:
        _decline_if(not zero_point.numel())
        # A 0-d zero point is subtracted in the codes' dtype, which may be too narrow for it.
        _decline_if(rules.strict and qscheme == "per_tensor" and zero_point.dim() == 0 and q.dtype != torch.int32)
        z = zero_point
    else:
        _decline_if(quant_dtype not in FP8 and quant_dtype not in CASTS)
    return kernel.dequantize(quant_dtype, q, scale, z, axis, group_size, qscheme)


def dequantize_fp8_per_block(rules: Rules, q: Tensor, scale: Tensor, block_size: list[int] | None) -> Tensor:
    """Compute ``dequantize_fp8_per_block``. Scales that divide the axes say themselves how large a block is."""
    name = FP8_FORMATS.get(dtype_name(q.dtype))
    if name is None or q.dim() != 2 or scale.dim() != 2 or not scale.numel():
        raise DeclinedError
    divides = all(n % count == 0 for n, count in zip(q.shape, scale.shape, strict=True))
    _decline_if(not divides and block_size is None)
    block = _tile(tuple(q.shape), tuple(scale.shape)) if divides else tuple(block_size or ())
    spec = OpSpec((name, "ieee"), block, dtype="float32")
    return call("dequantize", [q, scale.float(), None], spec)  # type: ignore[no-any-return]


def _tile(shape: Shape, scales: Shape) -> Shape:
    return tuple(max(n // count, 1) for n, count in zip(shape, scales, strict=True))


# ---- non-scaled ------------------------------------------------------------------------------------------------------


def non_scaled_fake_quantize(
    rules: Rules,
    x: Tensor,
    quant_dtype: str,
    mx_element_dtype: str,
    axis: int,
    block_size: int,
    scale_calculation_mode: str | None = None,
) -> Tensor:
    """Compute ``non_scaled_fake_quantize``."""
    _decline_if(quant_dtype not in documented.NON_SCALED)
    rule = "floor"
    if quant_dtype == "mx":
        rule = RULES.get(scale_calculation_mode or rules.default_mode, "even")
        # int8's "even" is AMD Quark's alone. Its other rules are of a logarithm rounded to the dtype of x.
        _decline_if(rule == "even" and mx_element_dtype == "int8")
        _decline_if(rules.strict and rule != "even")
        _expect_tame(rules, x, None, 1.75 * 2.0**127)
    elif quant_dtype == "bfp16":
        _decline_if(rules.strict)  # again a rounded logarithm
    elif rules.flushes:
        _decline_if(rules.strict and (x.dtype == torch.float64 or not x.numel()))  # which it refuses
        x = hardshrink(x, _largest_subnormal(x.dtype))
    else:
        _decline_if(rules.strict)
    element = mx_element_dtype if quant_dtype == "mx" else None
    spec = planned(documented.block_plan, quant_dtype, tuple(x.shape), element, axis, block_size, rule)
    y: Tensor = call("fake_quantize_dynamic", [x], spec)[0]
    return y.copysign_(x) if quant_dtype in ("mx6", "mx9") else y  # their zeros have signs


def _largest_subnormal(dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    return info.smallest_normal * (1.0 - info.eps)


def non_scaled_real_quantize(
    rules: Rules, x: Tensor, quant_dtype: str, mx_element_dtype: str, axis: int, block_size: int
) -> Tensor:
    """Compute ``non_scaled_real_quantize`` of MXFP4."""
    _decline_if(rules.strict)  # its rule is "floor", of a rounded logarithm
    return kernel.non_scaled_real_quantize(x, quant_dtype, mx_element_dtype, axis, block_size)


def fake_quantize_to_low_precision_fp(
    rules: Rules, x: Tensor, ebits: int, mbits: int, quant_max: float, round_mode: int
) -> Tensor:
    """Compute ``fake_quantize_to_low_precision_fp``: fp6 and fp4 without a scale."""
    name = LOW_PRECISION.get((ebits, mbits, quant_max))
    if name is None or x.dtype != torch.float32:
        raise DeclinedError
    _expect_tame(rules, x, None)
    spec = planned(OpSpec, (name, "ieee", "plus_zero"), (0,) * x.dim())
    return call("fake_quantize", [x, one(x), None], spec)  # type: ignore[no-any-return]


def qdq_mxfp4(rules: Rules, x: Tensor, group_size: int) -> Tensor:
    """Compute ``quark_hw_emulation.qdq_mxfp4``, which AMD Quark has for GPUs only: 16-bit data to MXFP4, "even"."""
    _decline_if(x.is_cuda)
    block = (*(1,) * (x.dim() - 1), group_size)
    spec = planned(OpSpec, ("fp4", "scale=e8m0", "rule=even", "ieee"), block)
    return call("fake_quantize_dynamic", [x], spec)[0]  # type: ignore[no-any-return]


CALLS: dict[str, Callable[..., Tensor]] = {
    "scaled_fake_quantize": scaled_fake_quantize,
    "scaled_real_quantize": scaled_real_quantize,
    "dequantize": dequantize,
    "dequantize_fp8_per_block": dequantize_fp8_per_block,
    "non_scaled_fake_quantize": non_scaled_fake_quantize,
    "non_scaled_real_quantize": non_scaled_real_quantize,
    "fake_quantize_to_low_precision_fp": fake_quantize_to_low_precision_fp,
    "qdq_mxfp4": qdq_mxfp4,
}
"""By operator."""

for _name in FP8:
    for _operator in (f"quant_{_name}", f"dequant_{_name}"):
        CALLS[_operator] = CALLS[f"{_operator}_with_scale"] = _as_documented(getattr(kernel, _operator))
    CALLS[f"quant_dequant_{_name}"] = partial(quant_dequant_fp8, _name)
