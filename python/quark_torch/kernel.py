"""The functions that AMD Quark documents as ``quark.torch.kernel``: eleven autograd Functions, and a function for each.

A class's ``apply`` takes the arguments of its ``forward`` by position; the lower-case function takes them by position
or by name. Unless said otherwise ``inputs`` is float32, float16, bfloat16 or float64 (computed in float32) of any shape
and strides, is never written to, and the gradient passes through to ``inputs`` unchanged: no mask, no scale. None means
``axis`` 1, ``group_size`` 1, ``round_mode`` 8, ``zero_point`` 0.

- ``quant_dtype``: int2 int3 int4 int8 int16 uint2 uint4 uint8 uint16, fp8_e4m3 fp8_e5m2 (OCP OFP8), fp6_e3m2 fp6_e2m3
  fp4 (OCP MX 1.0), bfloat16 float16. The non-scaled functions have mx, mx6, mx9, bfp16 instead.
- ``qscheme``: ``per_tensor``: one scale. ``per_channel``: one for each index of ``axis``. ``per_group``: one for each
  ``group_size`` neighbours along ``axis`` (-1: the whole axis).
- ``round_mode``: 2 half up, 3 half away from zero, 8 (or None, -1) half to even.
- scales: float32, float16 or bfloat16, never validated: IEEE arithmetic decides. A number is a scale per tensor.
- zero points: integers (added after rounding) or floats (before), shaped like the scales.

A wrong dtype or kind raises TypeError; an unknown name, a wrong shape, axis, size or combination ValueError.
``docs/numerics.md`` says bit for bit what comes out, and where that differs from AMD Quark 0.8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from quark_kernels import documented
from quark_kernels.documented import LearnPlan, Plan
from quark_kernels.schema import OpSpec
from quark_kernels.spec import one_of
from quark_torch.autograd import Recorded
from quark_torch.functions import (
    DATA_DTYPES,
    Kind,
    arrange,
    check_data,
    check_tensor,
    converted,
    given,
    kind,
    learn_backward,
    learn_forward,
    learn_keep,
    learn_plan,
    number_tensor,
    one,
    scale_tensor,
    zero_point_tensor,
)
from quark_torch.ops import Run, bound, call, dtype_name, planned, run_plain

__all__ = [
    "DeQuantizeFunction",
    "DequantE4M3Function",
    "DequantE5M2Function",
    "LSQQuantize",
    "NonScaledFakeQuantizeFunction",
    "NonScaledRealQuantizeFunction",
    "QuantE4M3Function",
    "QuantE5M2Function",
    "ScaledFakeQuantizeFunction",
    "ScaledRealQuantizeFunction",
    "TQTQuantize",
    "dequant_fp8_e4m3",
    "dequant_fp8_e5m2",
    "dequantize",
    "lsq_quantize",
    "non_scaled_fake_quantize",
    "non_scaled_real_quantize",
    "quant_fp8_e4m3",
    "quant_fp8_e5m2",
    "scaled_fake_quantize",
    "scaled_real_quantize",
    "tqt_quantize",
]


# ---- fp8 -------------------------------------------------------------------------------------------------------------


def _keep_dtype(ctx: Any, inputs: torch.Tensor, *rest: Any) -> None:
    ctx.dtype = inputs.dtype


def _keep_second_dtype(ctx: Any, quant_dtype: str, inputs: torch.Tensor, *rest: Any) -> None:
    ctx.dtype = inputs.dtype


def _quant_fp8(inputs: torch.Tensor, scale: Any, quant_dtype: str) -> torch.Tensor:
    check_data("inputs", inputs)
    s = one(inputs) if scale is None else number_tensor("scale", scale, inputs)
    return call("quantize", [inputs, s, None], planned(documented.fp8_spec, quant_dtype, tuple(inputs.shape)))  # type: ignore[no-any-return]


def _dequant_fp8(inputs: torch.Tensor, scale: Any, quant_dtype: str) -> torch.Tensor:
    documented.expect_codes("inputs", dtype_name(check_tensor("inputs", inputs).dtype), quant_dtype)
    s = one(inputs) if scale is None else number_tensor("scale", scale, inputs)
    spec = planned(documented.fp8_spec, quant_dtype, tuple(inputs.shape), "float16")
    return call("dequantize", [inputs, s, None], spec)  # type: ignore[no-any-return]


class QuantE4M3Function(Recorded):
    """See ``quant_fp8_e4m3``."""

    of = "quant_fp8_e4m3"
    keep = staticmethod(_keep_dtype)

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, scale: float | None = None) -> torch.Tensor:
        """Compute ``quant_fp8_e4m3(inputs, scale)``."""
        y = _quant_fp8(inputs, scale, "fp8_e4m3")
        QuantE4M3Function.keep(ctx, inputs)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Pass the gradient, an fp8 tensor, through in the dtype of ``inputs``."""
        return converted(grad, ctx.dtype), None


class DequantE4M3Function(Recorded):
    """See ``dequant_fp8_e4m3``."""

    of = "dequant_fp8_e4m3"
    keep = staticmethod(_keep_dtype)

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, scale: float | None = None) -> torch.Tensor:
        """Compute ``dequant_fp8_e4m3(inputs, scale)``."""
        y = _dequant_fp8(inputs, scale, "fp8_e4m3")
        DequantE4M3Function.keep(ctx, inputs)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Pass the gradient through, rounded to fp8."""
        return converted(grad, ctx.dtype), None


class QuantE5M2Function(Recorded):
    """See ``quant_fp8_e5m2``."""

    of = "quant_fp8_e5m2"
    keep = staticmethod(_keep_dtype)

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, scale: float | None = None) -> torch.Tensor:
        """Compute ``quant_fp8_e5m2(inputs, scale)``."""
        y = _quant_fp8(inputs, scale, "fp8_e5m2")
        QuantE5M2Function.keep(ctx, inputs)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Pass the gradient, an fp8 tensor, through in the dtype of ``inputs``."""
        return converted(grad, ctx.dtype), None


class DequantE5M2Function(Recorded):
    """See ``dequant_fp8_e5m2``."""

    of = "dequant_fp8_e5m2"
    keep = staticmethod(_keep_dtype)

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, scale: float | None = None) -> torch.Tensor:
        """Compute ``dequant_fp8_e5m2(inputs, scale)``."""
        y = _dequant_fp8(inputs, scale, "fp8_e5m2")
        DequantE5M2Function.keep(ctx, inputs)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Pass the gradient through, rounded to fp8."""
        return converted(grad, ctx.dtype), None


def quant_fp8_e4m3(inputs: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """Return ``inputs`` (divided by ``scale``) as float8_e4m3fn: saturated at ±448, rounded half to even.

    The quotient is a float32 division, rounded to the dtype of ``inputs``. ±inf saturates, NaN stays NaN (OCP OFP8).
    """
    return QuantE4M3Function.record(inputs, scale)


def dequant_fp8_e4m3(inputs: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """Return float8_e4m3fn ``inputs`` (times ``scale``, in float32) as float16."""
    return DequantE4M3Function.record(inputs, scale)


def quant_fp8_e5m2(inputs: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """Return ``inputs`` (divided by ``scale``) as float8_e5m2: saturated at ±57344, rounded half to even.

    The quotient is a float32 division, rounded to the dtype of ``inputs``. ±inf saturates, NaN stays NaN (OCP OFP8).
    """
    return QuantE5M2Function.record(inputs, scale)


def dequant_fp8_e5m2(inputs: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """Return float8_e5m2 ``inputs`` (times ``scale``, in float32) as float16."""
    return DequantE5M2Function.record(inputs, scale)


# ---- scaled ----------------------------------------------------------------------------------------------------------


def _rounded_scale(s: torch.Tensor, scale_format: str | None) -> torch.Tensor:
    """A scale, rounded to a 16-bit format where the plan says so."""
    if scale_format is None:
        return s
    spec = planned(OpSpec, (scale_format, "ieee"), (0,) * s.dim())
    return call("fake_quantize", [s, one(s), None], spec)  # type: ignore[no-any-return]


def _scales(quant_dtype: str, scale: Any, zero_point: Any, like: torch.Tensor) -> tuple[Any, Any]:
    """The given scale and, for integers, the zero point."""
    z = zero_point_tensor(zero_point, like) if quant_dtype in documented.INTEGERS else None
    return scale_tensor("scale", scale, like), z


def _quantize(op: str, quant_dtype: str, inputs: torch.Tensor, scale: Any, zero_point: Any, *how: Any) -> torch.Tensor:
    """Scaled quantization: fake (``op`` is "fake_quantize") or real ("quantize")."""
    if zero_point is None:
        y = run_plain(_quantize_run, inputs, scale, op, quant_dtype, *how)
        if y is not None:
            return y
    x = check_data("inputs", inputs)
    one_of("quant_dtype", quant_dtype, documented.SCALED)
    if quant_dtype in documented.CASTS:
        return call(op, [x, one(x), None], planned(documented.cast_spec, quant_dtype, tuple(x.shape)))  # type: ignore[no-any-return]
    s, z = _scales(quant_dtype, scale, zero_point, x)
    plan = planned(_quantize_plan, op, quant_dtype, x.shape, x.dtype, kind(s), kind(z), *how)
    s = _rounded_scale(s, plan.scale_format)
    return call(op, [x, arrange(s, plan.scale), arrange(z, plan.zero_point)], plan.spec)  # type: ignore[no-any-return]


def _quantize_plan(
    op: str, quant_dtype: str, shape: torch.Size, dtype: torch.dtype, scale: Kind, zero_point: Kind, *how: Any
) -> Plan:
    s, z = given(scale), given(zero_point)
    assert s is not None
    return documented.quantize_plan(quant_dtype, tuple(shape), dtype_name(dtype), s, z, *how, real=op == "quantize")


def _quantize_run(
    shape: torch.Size,
    dtype: torch.dtype,
    scale_shape: torch.Size,
    scale_dtype: torch.dtype,
    op: str,
    quant_dtype: str,
    *how: Any,
) -> Run | None:
    """What a call on plain tensors comes to; None where the scale isn't as the core takes it."""
    one_of("quant_dtype", quant_dtype, documented.SCALED)
    if quant_dtype in documented.CASTS or scale_dtype != torch.float32 or dtype not in DATA_DTYPES:
        return None
    plan = _quantize_plan(op, quant_dtype, shape, dtype, (scale_shape, scale_dtype), False, *how)
    layout = plan.scale
    if (
        plan.scale_format is not None
        or layout is None
        or not layout.is_normal
        or scale_shape not in ((), layout.normal)
    ):
        return None
    return bound(op, plan.spec.text, dtype, shape)


def _dequantize_plan(quant_dtype: str, shape: torch.Size, scale: Kind, zero_point: Kind, *how: Any) -> Plan:
    s, z = given(scale), given(zero_point)
    assert s is not None
    return documented.dequantize_plan(quant_dtype, tuple(shape), s, z, *how)


class ScaledFakeQuantizeFunction(Recorded):
    """See ``scaled_fake_quantize``."""

    of = "scaled_fake_quantize"

    @staticmethod
    def forward(
        ctx: Any,
        quant_dtype: str,
        inputs: torch.Tensor,
        scale: torch.Tensor | float | None,
        zero_point: torch.Tensor | float | None,
        axis: int | None,
        group_size: int | None,
        quant_min: int | float | None,
        quant_max: int | float | None,
        round_mode: int | None,
        qscheme: str | None,
        mx_element_dtype: str | None,
    ) -> torch.Tensor:
        """Compute ``scaled_fake_quantize(...)``."""
        how = (axis, group_size, quant_min, quant_max, round_mode, qscheme)
        return _quantize("fake_quantize", quant_dtype, inputs, scale, zero_point, *how)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Pass the gradient through."""
        return None, grad, None, None, None, None, None, None, None, None, None


class ScaledRealQuantizeFunction(Recorded):
    """See ``scaled_real_quantize``."""

    of = "scaled_real_quantize"
    keep = staticmethod(_keep_second_dtype)

    @staticmethod
    def forward(
        ctx: Any,
        quant_dtype: str,
        inputs: torch.Tensor,
        scale: torch.Tensor | float | None,
        zero_point: torch.Tensor | float | None,
        axis: int | None,
        group_size: int | None,
        quant_min: int | float | None,
        quant_max: int | float | None,
        round_mode: int | None,
        qscheme: str | None,
    ) -> torch.Tensor:
        """Compute ``scaled_real_quantize(...)``."""
        how = (axis, group_size, quant_min, quant_max, round_mode, qscheme)
        y = _quantize("quantize", quant_dtype, inputs, scale, zero_point, *how)
        ScaledRealQuantizeFunction.keep(ctx, quant_dtype, inputs)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Pass the gradient through in the dtype of ``inputs``; integer codes have none."""
        return None, converted(grad, ctx.dtype), None, None, None, None, None, None, None, None


class DeQuantizeFunction(Recorded):
    """See ``dequantize``."""

    of = "dequantize"
    keep = staticmethod(_keep_second_dtype)

    @staticmethod
    def forward(
        ctx: Any,
        quant_dtype: str,
        inputs: torch.Tensor,
        scale: torch.Tensor | float | None,
        zero_point: torch.Tensor | float | None,
        axis: int | None,
        group_size: int | None,
        qscheme: str | None,
    ) -> torch.Tensor:
        """Compute ``dequantize(...)``."""
        q = check_tensor("inputs", inputs)
        one_of("quant_dtype", quant_dtype, documented.SCALED)
        documented.expect_codes("inputs", dtype_name(q.dtype), quant_dtype)
        DeQuantizeFunction.keep(ctx, quant_dtype, q)
        if quant_dtype in documented.CASTS:
            return q.clone()
        s, z = _scales(quant_dtype, scale, zero_point, q)
        plan = planned(_dequantize_plan, quant_dtype, q.shape, kind(s), kind(z), axis, group_size, qscheme)
        return call("dequantize", [q, arrange(s, plan.scale), arrange(z, plan.zero_point)], plan.spec)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Pass the gradient through in the dtype of ``inputs``; integer codes get none."""
        passed = converted(grad, ctx.dtype) if ctx.dtype.is_floating_point else None
        return None, passed, None, None, None, None, None


def scaled_fake_quantize(
    quant_dtype: str,
    inputs: torch.Tensor,
    scale: torch.Tensor | float | None,
    zero_point: torch.Tensor | float | None,
    axis: int | None,
    group_size: int | None,
    quant_min: int | float | None,
    quant_max: int | float | None,
    round_mode: int | None,
    qscheme: str | None,
    mx_element_dtype: str | None = None,
) -> torch.Tensor:
    """Return ``inputs`` rounded to what codes of ``quant_dtype`` can say, in its own dtype and shape.

    - Integers: ``(clamp(R(x * (1 / s)) + z, quant_min, quant_max) - z) * s`` in float32; a floating z is added before
      rounding. Where 1 / s is infinite x is divided. The range is the arguments' (None: that of ``quant_dtype``).
    - fp8, fp6, fp4: ``x / s`` and the result's product with s are each rounded to the dtype of ``inputs``; half to
      even, saturating. Range, zero point and ``round_mode`` are ignored. Per channel s is rounded to that dtype first;
      fp8 has no ``per_group``.
    - bfloat16, float16: the cast and back; scale and the rest are ignored.

    NaN stays NaN. Per channel s has ``inputs.shape[axis]`` elements. Per group its shape is that of ``inputs`` with
    ``axis`` cut into groups and swapped with the last axis (any shape of that many elements is read so), or without the
    swap where the shape tells the two apart. ``mx_element_dtype`` is not used.

    """
    return ScaledFakeQuantizeFunction.record(
        quant_dtype,
        inputs,
        scale,
        zero_point,
        axis,
        group_size,
        quant_min,
        quant_max,
        round_mode,
        qscheme,
        mx_element_dtype,
    )


def scaled_real_quantize(
    quant_dtype: str,
    inputs: torch.Tensor,
    scale: torch.Tensor | float | None,
    zero_point: torch.Tensor | float | None,
    axis: int | None,
    group_size: int | None,
    quant_min: int | float | None,
    quant_max: int | float | None,
    round_mode: int | None,
    qscheme: str | None,
) -> torch.Tensor:
    """Return the codes of ``inputs``.

    - Integers: ``clamp(R(x * (1 / s) + z), quant_min, quant_max)`` as int32; z is added before rounding, so at ties
      with odd z this isn't the code behind ``scaled_fake_quantize``. NaN gives the code of zero.
    - fp8: as ``scaled_fake_quantize`` up to the cast, as the float8 dtype. fp6, fp4: likewise, one code a byte, uint8.
    - bfloat16, float16: the converted tensor.

    Per group s has the layout of ``inputs`` and so says the groups' width; any other shape is read as
    ``scaled_fake_quantize`` reads it. Integer codes have no gradient.

    """
    how = (axis, group_size, quant_min, quant_max, round_mode, qscheme)
    return ScaledRealQuantizeFunction.record(quant_dtype, inputs, scale, zero_point, *how)


def dequantize(
    quant_dtype: str,
    inputs: torch.Tensor,
    scale: torch.Tensor | float | None,
    zero_point: torch.Tensor | float | None,
    axis: int | None,
    group_size: int | None,
    qscheme: str | None,
) -> torch.Tensor:
    """Return the numbers that the codes of ``scaled_real_quantize`` stand for, in float32.

    - Integers (of any integer dtype): ``(q - z) * s``. fp8 (its float8 dtype), fp6 and fp4 (uint8): ``value(q) * s``.
    - bfloat16, float16: a copy of ``inputs``, in its dtype.

    The layouts of scale and zero point are those of ``scaled_real_quantize``.
    """
    return DeQuantizeFunction.record(quant_dtype, inputs, scale, zero_point, axis, group_size, qscheme)


# ---- non-scaled ------------------------------------------------------------------------------------------------------


class NonScaledFakeQuantizeFunction(Recorded):
    """See ``non_scaled_fake_quantize``."""

    of = "non_scaled_fake_quantize"

    @staticmethod
    def forward(
        ctx: Any, input_tensor: torch.Tensor, quant_dtype: str, mx_element_dtype: str | None, axis: int, block_size: int
    ) -> torch.Tensor:
        """Compute ``non_scaled_fake_quantize(...)``."""
        x = check_data("input_tensor", input_tensor)
        spec = planned(documented.block_plan, quant_dtype, tuple(x.shape), mx_element_dtype, axis, block_size)
        return call("fake_quantize_dynamic", [x], spec)[0]  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Pass the gradient through."""
        return grad, None, None, None, None


class NonScaledRealQuantizeFunction(Recorded):
    """See ``non_scaled_real_quantize``."""

    of = "non_scaled_real_quantize"

    @staticmethod
    def keep(
        ctx: Any, input_tensor: torch.Tensor, quant_dtype: str, mx_element_dtype: str | None, axis: int, block_size: int
    ) -> None:
        """Keep the shapes and the dtype."""
        x = input_tensor
        ctx.plan = planned(documented.slot_plan, quant_dtype, tuple(x.shape), mx_element_dtype, axis, block_size)
        ctx.shape, ctx.dtype = x.shape, x.dtype

    @staticmethod
    def forward(
        ctx: Any, input_tensor: torch.Tensor, quant_dtype: str, mx_element_dtype: str | None, axis: int, block_size: int
    ) -> torch.Tensor:
        """Compute ``non_scaled_real_quantize(...)``."""
        x = check_data("input_tensor", input_tensor)
        NonScaledRealQuantizeFunction.keep(ctx, x, quant_dtype, mx_element_dtype, axis, block_size)
        plan = ctx.plan
        blocks = x.reshape(plan.split)
        scale = call("choose_qparams", [blocks], plan.spec)
        values = call("quantize_values", [blocks, scale], plan.spec)
        return torch.cat([scale, values], dim=plan.axis).reshape(plan.result)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Pass the gradient through, without the scales' slots."""
        plan = ctx.plan
        inner = grad.reshape(plan.slots).narrow(plan.axis, 1, plan.split[plan.axis])
        return converted(inner.reshape(ctx.shape), ctx.dtype), None, None, None, None


def non_scaled_fake_quantize(
    input_tensor: torch.Tensor, quant_dtype: str, mx_element_dtype: str | None, axis: int, block_size: int
) -> torch.Tensor:
    """Return ``input_tensor`` rounded to a block format whose scales follow from the data, in its own dtype and shape.

    Blocks are ``block_size`` neighbours along ``axis``; the last of a row may be shorter. E is the exponent of the
    block's largest magnitude.

    - mx (OCP MX 1.0, 6.3): scale ``2^clamp(E - emax, -127, 127)``; elements of ``mx_element_dtype``, one of int8,
      fp8_e4m3, fp8_e5m2, fp6_e3m2, fp6_e2m3, fp4; half to even, saturating. NaN or inf makes its block NaN.
    - mx6, mx9 (arXiv 2302.08007): 5- and 8-bit integers of scale ``2^(E - bits + 2)``, half of it for pairs that both
      lie below 2^E; ``block_size`` is even. Infinities and NaN stay as they are and don't count.
    - bfp16: 8-bit integers of scale ``2^(E - 6)``, doubled where one would be rounded beyond 127; blocks of 8 always.
      Infinities and NaN become 0.

    """
    return NonScaledFakeQuantizeFunction.record(input_tensor, quant_dtype, mx_element_dtype, axis, block_size)


def non_scaled_real_quantize(
    input_tensor: torch.Tensor, quant_dtype: str, mx_element_dtype: str | None, axis: int, block_size: int
) -> torch.Tensor:
    """Return the scales and E2M1 values of MXFP4 blocks in one float32 tensor (``"mx"`` and ``"fp4"`` only).

    Along ``axis`` each block of ``block_size`` elements becomes ``block_size + 1`` slots: the scale, then the values,
    not multiplied by it. ``block_size`` divides the axis. A block of zeros has scale 2^-127; one with NaN or inf is NaN
    throughout. The gradient is that of the values.
    """
    return NonScaledRealQuantizeFunction.record(input_tensor, quant_dtype, mx_element_dtype, axis, block_size)


# ---- learned scales --------------------------------------------------------------------------------------------------


LearnParts = tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], OpSpec, OpSpec]
"""The parameter, the number and the zero point as the core takes them; the specs forward and backward."""


def _tqt_parts(
    inputs: torch.Tensor, log_threshold: Any, zero_point: Any, domain: Any, round_mode: int | None
) -> LearnParts:
    x = check_data("inputs", inputs)
    t, z = scale_tensor("log_threshold", log_threshold, x), zero_point_tensor(zero_point, x)
    plan = learn_plan(documented.tqt_plan, x, t, z, round_mode)
    documented.expect_domain(domain)
    return _parts(t, number_tensor("domain", domain, x), z, plan)


def _lsq_parts(x: torch.Tensor, scale: Any, zero_point: Any, grad_factor: Any, *how: Any) -> LearnParts:
    x = check_data("x", x)
    s, z = scale_tensor("scale", scale, x), zero_point_tensor(zero_point, x)
    plan = learn_plan(documented.lsq_plan, x, s, z, *how)
    return _parts(s, number_tensor("grad_factor", grad_factor, x), z, plan)


def _parts(value: torch.Tensor, number: torch.Tensor, zero_point: torch.Tensor | None, plan: LearnPlan) -> LearnParts:
    p, z = arrange(value, plan.scale), arrange(zero_point, plan.zero_point)
    assert p is not None
    return (p, number, z), plan.forward, plan.backward


class TQTQuantize(Recorded):
    """See ``tqt_quantize``."""

    of = "tqt_quantize"

    @staticmethod
    def keep(ctx: Any, inputs: torch.Tensor, log_threshold: torch.Tensor, *rest: Any) -> None:
        """Keep what backward needs."""
        parts, _, backward = _tqt_parts(inputs, log_threshold, *rest)
        learn_keep(ctx, inputs, log_threshold, *parts, "tqt", backward)

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        log_threshold: torch.Tensor,
        zero_point: torch.Tensor | float | None,
        domain: torch.Tensor | float,
        round_mode: int | None,
    ) -> torch.Tensor:
        """Compute ``tqt_quantize(...)``."""
        parts, spec, backward = _tqt_parts(inputs, log_threshold, zero_point, domain, round_mode)
        learn_keep(ctx, inputs, log_threshold, *parts, "tqt", backward)
        return learn_forward(inputs, *parts, "tqt", spec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Compute the gradients of inputs and log_threshold."""
        return *learn_backward(ctx, grad), None, None, None


class LSQQuantize(Recorded):
    """See ``lsq_quantize``."""

    of = "lsq_quantize"

    @staticmethod
    def keep(ctx: Any, x: torch.Tensor, scale: torch.Tensor, *rest: Any) -> None:
        """Keep what backward needs."""
        parts, _, backward = _lsq_parts(x, scale, *rest)
        learn_keep(ctx, x, scale, *parts, "lsq", backward)

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor | float | None,
        grad_factor: float,
        quant_min: int,
        quant_max: int,
        ch_axis: int | None = None,
        rounding_key: int = 8,
    ) -> torch.Tensor:
        """Compute ``lsq_quantize(...)``."""
        how = (quant_min, quant_max, ch_axis, rounding_key)
        parts, spec, backward = _lsq_parts(x, scale, zero_point, grad_factor, *how)
        learn_keep(ctx, x, scale, *parts, "lsq", backward)
        return learn_forward(x, *parts, "lsq", spec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Compute the gradients of x and scale."""
        return *learn_backward(ctx, grad), None, None, None, None, None, None


def tqt_quantize(
    inputs: torch.Tensor,
    log_threshold: torch.Tensor,
    zero_point: torch.Tensor | float | None,
    domain: torch.Tensor | float,
    round_mode: int | None,
) -> torch.Tensor:
    """Fake-quantize with a trained threshold (TQT, arXiv 1903.08066), per tensor.

    ``s = 2^ceil(log_threshold) / domain``, the range is ``[-domain, domain - 1]``, the result that of
    ``scaled_fake_quantize``. With v = x / s and r = R(v) + z, the gradient of inputs is g where r is in the range, else
    0, and that of log_threshold ``s * ln2 * sum(g * d)``: d is R(v) - v inside, -domain - z below, domain - 1 - z
    above.

    Args:
        inputs: any shape.
        log_threshold: one element, float32, float16 or bfloat16; the base-2 logarithm of the threshold.
        zero_point: one element, or None.
        domain: one element: an integer from 1 to 2^22, such as 128 for 8 bits.
        round_mode: 2, 3 or 8; forward and backward.

    """
    return TQTQuantize.record(inputs, log_threshold, zero_point, domain, round_mode)


def lsq_quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | float | None,
    grad_factor: float,
    quant_min: int,
    quant_max: int,
    ch_axis: int | None = None,
    rounding_key: int = 8,
) -> torch.Tensor:
    """Fake-quantize with a learned step size (LSQ, arXiv 1902.08153), per tensor or per channel.

    The result is that of ``scaled_fake_quantize``. With v = x / scale + z and r = R(v), the gradient of x is g where r
    is in [quant_min, quant_max], else 0, and that of scale ``grad_factor * sum(g * d)`` over all axes but ``ch_axis``:
    d is r - v inside, quant_min - z below, quant_max - z above.

    Args:
        x: any shape.
        scale: one element, or ``x.shape[ch_axis]`` of them; float32, float16 or bfloat16.
        zero_point: shaped like ``scale``, or None.
        grad_factor: a number; ``1 / sqrt(n * quant_max)`` in the paper, n elements a scale.
        quant_min: the least code.
        quant_max: the greatest code.
        ch_axis: the channels' axis; None is per tensor.
        rounding_key: 2, 3 or 8, as ``round_mode``.

    """
    return LSQQuantize.record(x, scale, zero_point, grad_factor, quant_min, quant_max, ch_axis, rounding_key)
