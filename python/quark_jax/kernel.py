"""The functions that AMD Quark documents as ``quark.torch.kernel``, on JAX arrays: the same arguments and bits.

Strings and integers are static; arrays are traced, and so are floats, which may also be 0-d arrays: a new scale doesn't
recompile. Unless said otherwise ``inputs`` is float32, float16, bfloat16 or float64 (computed in float32) of any shape,
and the gradient passes through to ``inputs`` unchanged: no mask, no scale. None means ``axis`` 1, ``group_size`` 1,
``round_mode`` 8, ``zero_point`` 0.

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

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from quark_jax.functions import (
    ONE,
    Kind,
    arrange,
    check_array,
    check_data,
    choose,
    converted,
    given,
    kind,
    learn_plan,
    learned,
    number_array,
    scale_array,
    zero_point_array,
)
from quark_jax.primitives import call, jitted, whole_along
from quark_kernels import documented, schema
from quark_kernels.documented import Layout, Plan
from quark_kernels.schema import OpSpec, Shape
from quark_kernels.spec import one_of

__all__ = [
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


# ---- gradients that pass through ------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0, 4, 5))
def _passing_vjp(
    op: str, x: jax.Array, scale: jax.Array | None, zero_point: jax.Array | None, spec: OpSpec, dtype: str
) -> jax.Array:
    return call(op, [a for a in (x, scale, zero_point) if a is not None], spec)[0]


def _passing_forward(op: str, x: Any, scale: Any, zero_point: Any, spec: OpSpec, dtype: str) -> tuple[jax.Array, None]:
    return _passing_vjp(op, x, scale, zero_point, spec, dtype), None


def _passing_backward(op: str, spec: OpSpec, dtype: str, saved: None, grad: jax.Array) -> Any:
    return converted(grad, dtype), None, None


_passing_vjp.defvjp(_passing_forward, _passing_backward)


@partial(jitted, static_argnums=(0, 4))
def _passing(op: str, x: jax.Array, scale: Any, zero_point: Any, plan: Plan) -> jax.Array:
    """Call an operator; its gradient goes to x as it is, but for its dtype."""
    return _passing_vjp(op, x, *_arranged(scale, zero_point, plan), plan.spec, x.dtype.name)


@partial(jax.jit, static_argnums=(0, 4))
def _constant(op: str, x: jax.Array, scale: Any, zero_point: Any, plan: Plan) -> jax.Array:
    """Call an operator whose outputs have no gradient."""
    (y,) = call(op, jax.lax.stop_gradient([x, *_arranged(scale, zero_point, plan)]), plan.spec)
    return y


def _arranged(scale: Any, zero_point: Any, plan: Plan) -> tuple[Any, Any]:
    """The given scale, which is a constant to every gradient, and the zero point in the core's layout."""
    scale = jax.lax.stop_gradient(scale)
    if plan.scale_format is not None:
        spec = OpSpec((plan.scale_format, "ieee"), (0,) * scale.ndim)
        (scale,) = call("fake_quantize", [scale, jnp.ones((1,) * scale.ndim, np.float32), None], spec)
    return arrange(scale, plan.scale), arrange(zero_point, plan.zero_point)


# ---- fp8 -------------------------------------------------------------------------------------------------------------


def _quant_fp8(inputs: jax.Array, scale: Any, quant_dtype: str) -> jax.Array:
    x = check_data("inputs", inputs)
    s = ONE if scale is None else number_array("scale", scale)
    y: jax.Array = _passing("quantize", x, s, None, schema.planned(documented.fp8_plan, quant_dtype, x.shape))
    return y


def _dequant_fp8(inputs: jax.Array, scale: Any, quant_dtype: str) -> jax.Array:
    q = check_array("inputs", inputs)
    documented.expect_codes("inputs", q.dtype.name, quant_dtype)
    s = ONE if scale is None else number_array("scale", scale)
    plan = schema.planned(documented.fp8_plan, quant_dtype, q.shape, "float16")
    y: jax.Array = _passing("dequantize", q, s, None, plan)
    return y


def quant_fp8_e4m3(inputs: jax.Array, scale: jax.Array | float | None = None) -> jax.Array:
    """Return ``inputs`` (divided by ``scale``) as float8_e4m3fn: saturated at ±448, rounded half to even.

    The quotient is a float32 division, rounded to the dtype of ``inputs``. ±inf saturates, NaN stays NaN (OCP OFP8).
    """
    return _quant_fp8(inputs, scale, "fp8_e4m3")


def dequant_fp8_e4m3(inputs: jax.Array, scale: jax.Array | float | None = None) -> jax.Array:
    """Return float8_e4m3fn ``inputs`` (times ``scale``, in float32) as float16."""
    return _dequant_fp8(inputs, scale, "fp8_e4m3")


def quant_fp8_e5m2(inputs: jax.Array, scale: jax.Array | float | None = None) -> jax.Array:
    """Return ``inputs`` (divided by ``scale``) as float8_e5m2: saturated at ±57344, rounded half to even.

    The quotient is a float32 division, rounded to the dtype of ``inputs``. ±inf saturates, NaN stays NaN (OCP OFP8).
    """
    return _quant_fp8(inputs, scale, "fp8_e5m2")


def dequant_fp8_e5m2(inputs: jax.Array, scale: jax.Array | float | None = None) -> jax.Array:
    """Return float8_e5m2 ``inputs`` (times ``scale``, in float32) as float16."""
    return _dequant_fp8(inputs, scale, "fp8_e5m2")


# ---- scaled ----------------------------------------------------------------------------------------------------------


def _scales(quant_dtype: str, scale: Any, zero_point: Any) -> tuple[Any, Any]:
    """The given scale and, for integers, the zero point."""
    z = zero_point_array(zero_point) if quant_dtype in documented.INTEGERS else None
    return scale_array("scale", scale), z


def _quantize(op: str, quant_dtype: str, inputs: jax.Array, scale: Any, zero_point: Any, *how: Any) -> jax.Array:
    """Scaled quantization: fake (``op`` is "fake_quantize") or real ("quantize")."""
    x = check_data("inputs", inputs)
    one_of("quant_dtype", quant_dtype, documented.SCALED)
    if quant_dtype in documented.CASTS:
        s, z = ONE, None
        plan = schema.planned(documented.cast_plan, quant_dtype, x.shape)
    else:
        s, z = _scales(quant_dtype, scale, zero_point)
        plan = schema.planned(_quantize_plan, op, quant_dtype, x.shape, x.dtype, kind(s), kind(z), *how)
    run = _constant if op == "quantize" and quant_dtype not in (*documented.FP8, *documented.CASTS) else _passing
    y: jax.Array = run(op, x, s, z, plan)
    return y


def _quantize_plan(
    op: str, quant_dtype: str, shape: Shape, dtype: Any, scale: Kind, zero_point: Kind, *how: Any
) -> Plan:
    s, z = given(scale), given(zero_point)
    assert s is not None
    return documented.quantize_plan(quant_dtype, shape, dtype.name, s, z, *how, real=op == "quantize")


def _dequantize_plan(quant_dtype: str, shape: Shape, scale: Kind, zero_point: Kind, *how: Any) -> Plan:
    s, z = given(scale), given(zero_point)
    assert s is not None
    return documented.dequantize_plan(quant_dtype, shape, s, z, *how)


def scaled_fake_quantize(
    quant_dtype: str,
    inputs: jax.Array,
    scale: jax.Array | float | None,
    zero_point: jax.Array | float | None,
    axis: int | None,
    group_size: int | None,
    quant_min: int | float | None,
    quant_max: int | float | None,
    round_mode: int | None,
    qscheme: str | None,
    mx_element_dtype: str | None = None,
) -> jax.Array:
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
    how = (axis, group_size, quant_min, quant_max, round_mode, qscheme)
    return _quantize("fake_quantize", quant_dtype, inputs, scale, zero_point, *how)


def scaled_real_quantize(
    quant_dtype: str,
    inputs: jax.Array,
    scale: jax.Array | float | None,
    zero_point: jax.Array | float | None,
    axis: int | None,
    group_size: int | None,
    quant_min: int | float | None,
    quant_max: int | float | None,
    round_mode: int | None,
    qscheme: str | None,
) -> jax.Array:
    """Return the codes of ``inputs``.

    - Integers: ``clamp(R(x * (1 / s) + z), quant_min, quant_max)`` as int32; z is added before rounding, so at ties
      with odd z this isn't the code behind ``scaled_fake_quantize``. NaN gives the code of zero.
    - fp8: as ``scaled_fake_quantize`` up to the cast, as the float8 dtype. fp6, fp4: likewise, one code a byte, uint8.
    - bfloat16, float16: the converted array.

    Per group s has the layout of ``inputs`` and so says the groups' width; any other shape is read as
    ``scaled_fake_quantize`` reads it. Integer codes have no gradient.

    """
    how = (axis, group_size, quant_min, quant_max, round_mode, qscheme)
    return _quantize("quantize", quant_dtype, inputs, scale, zero_point, *how)


def dequantize(
    quant_dtype: str,
    inputs: jax.Array,
    scale: jax.Array | float | None,
    zero_point: jax.Array | float | None,
    axis: int | None,
    group_size: int | None,
    qscheme: str | None,
) -> jax.Array:
    """Return the numbers that the codes of ``scaled_real_quantize`` stand for, in float32.

    - Integers (of any integer dtype): ``(q - z) * s``. fp8 (its float8 dtype), fp6 and fp4 (uint8): ``value(q) * s``.
    - bfloat16, float16: ``inputs``.

    The layouts of scale and zero point are those of ``scaled_real_quantize``.
    """
    q = check_array("inputs", inputs)
    one_of("quant_dtype", quant_dtype, documented.SCALED)
    documented.expect_codes("inputs", q.dtype.name, quant_dtype)
    if quant_dtype in documented.CASTS:
        return q
    s, z = _scales(quant_dtype, scale, zero_point)
    plan = schema.planned(_dequantize_plan, quant_dtype, q.shape, kind(s), kind(z), axis, group_size, qscheme)
    run = _passing if quant_dtype in documented.FP8 else _constant
    y: jax.Array = run("dequantize", q, s, z, plan)
    return y


# ---- non-scaled ------------------------------------------------------------------------------------------------------


def non_scaled_fake_quantize(
    input_tensor: jax.Array, quant_dtype: str, mx_element_dtype: str | None, axis: int, block_size: int
) -> jax.Array:
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
    x = check_data("input_tensor", input_tensor)
    spec = schema.planned(documented.block_plan, quant_dtype, x.shape, mx_element_dtype, axis, block_size)
    y: jax.Array = _passing("fake_quantize_dynamic", x, None, None, Plan(spec))
    return y


def non_scaled_real_quantize(
    input_tensor: jax.Array, quant_dtype: str, mx_element_dtype: str | None, axis: int, block_size: int
) -> jax.Array:
    """Return the scales and E2M1 values of MXFP4 blocks in one float32 array (``"mx"`` and ``"fp4"`` only).

    Along ``axis`` each block of ``block_size`` elements becomes ``block_size + 1`` slots: the scale, then the values,
    not multiplied by it. ``block_size`` divides the axis. A block of zeros has scale 2^-127; one with NaN or inf is NaN
    throughout. The gradient is that of the values.
    """
    x = check_data("input_tensor", input_tensor)
    plan = schema.planned(documented.slot_plan, quant_dtype, x.shape, mx_element_dtype, axis, block_size)
    blocks = whole_along(x, axis).reshape(plan.split)
    scale = choose(blocks, plan.spec).scale
    whole = Layout(scale.shape, None, scale.shape)
    values = _passing("quantize_values", blocks, scale, None, Plan(plan.spec, whole))
    return jnp.concatenate([scale, values], axis=plan.axis).reshape(plan.result)


# ---- learned scales --------------------------------------------------------------------------------------------------


def tqt_quantize(
    inputs: jax.Array,
    log_threshold: jax.Array | float,
    zero_point: jax.Array | float | None,
    domain: jax.Array | float,
    round_mode: int | None,
) -> jax.Array:
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
    x = check_data("inputs", inputs)
    t, z = scale_array("log_threshold", log_threshold), zero_point_array(zero_point)
    plan = learn_plan(documented.tqt_plan, x, t, z, round_mode)
    documented.expect_domain(domain)
    number = number_array("domain", domain)
    if not isinstance(number, Tracer):
        documented.expect_domain(float(number))
    return learned("tqt", x, t, number, z, plan)


def lsq_quantize(
    x: jax.Array,
    scale: jax.Array | float,
    zero_point: jax.Array | float | None,
    grad_factor: jax.Array | float,
    quant_min: int,
    quant_max: int,
    ch_axis: int | None = None,
    rounding_key: int = 8,
) -> jax.Array:
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
    x = check_data("x", x)
    s, z = scale_array("scale", scale), zero_point_array(zero_point)
    plan = learn_plan(documented.lsq_plan, x, s, z, quant_min, quant_max, ch_axis, rounding_key)
    return learned("lsq", x, s, number_array("grad_factor", grad_factor), z, plan)
