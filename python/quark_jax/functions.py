"""The everyday functions on JAX arrays.

Public functions resolve the static arguments, then enter one jitted function each, whose static argument is the OpSpec.
"""

from __future__ import annotations

import numbers
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quark_jax.primitives import call
from quark_jax.qtensor import QTensor
from quark_kernels import schema
from quark_kernels.schema import OpSpec, Shape
from quark_kernels.spec import PerTensor, QuantSpec, as_spec, one_of

# ---- arguments -------------------------------------------------------------------------------------------------------


def _check_array(name: str, x: object) -> jax.Array:
    if isinstance(x, jax.Array):
        return x
    if isinstance(x, (np.ndarray, np.generic)):
        return jnp.asarray(x)
    raise TypeError(f"{name} is a {type(x).__module__}.{type(x).__name__}; allowed: a jax.Array or NumPy array")


def _check_data(name: str, x: object) -> jax.Array:
    x = _check_array(name, x)
    schema.expect_float(name, x.dtype.name)
    return x


def _dtype_name(spec: Any) -> str | None:
    if isinstance(spec, (str, QuantSpec)):
        return None
    try:
        return str(np.dtype(spec).name)
    except TypeError:
        return None


def _spec(spec: object) -> QuantSpec:
    return as_spec(spec, None if spec is None else _dtype_name(spec))


def _scales(
    spec: QuantSpec, op_spec: OpSpec, shape: Shape, scale: Any, zero_point: Any
) -> tuple[jax.Array, jax.Array | None] | None:
    """The given scale and zero point in normal form; None where the scale is dynamic."""
    schema.check_scale_arguments(spec, scale=scale is not None, zero_point=zero_point is not None)
    if scale is None:
        return None
    if isinstance(scale, numbers.Real):
        scale = np.float32(scale)
    if isinstance(zero_point, numbers.Integral):
        zero_point = np.int32(schema.int32_zero_point(int(zero_point)))
    scale = _check_array("scale", scale)
    schema.expect_scale(scale.dtype.name)
    scale = scale.reshape(schema.scale_argument_shape("scale", scale.shape, spec, op_spec, shape))
    if zero_point is not None:
        zero_point = _check_array("zero_point", zero_point)
        schema.expect_integer("zero_point", zero_point.dtype.name)
        normal = schema.scale_argument_shape("zero_point", zero_point.shape, spec, op_spec, shape)
        zero_point = zero_point.reshape(normal).astype(np.int32)
    return scale.astype(np.float32), zero_point


def _part(a: jax.Array) -> schema.Part:
    return schema.Part(a.shape, a.dtype.name)


def _public(a: jax.Array, spec: QuantSpec) -> jax.Array:
    """A scale or zero point in the shape that users see: 0-d per tensor, else the normal form that it has."""
    return a.reshape(()) if spec.granularity == PerTensor() else a


# ---- functions -------------------------------------------------------------------------------------------------------


def quantize(
    x: jax.Array,
    spec: Any,
    *,
    scale: jax.Array | float | None = None,
    zero_point: jax.Array | int | None = None,
    axis: int | None = None,
    group_size: int | None = None,
    packed: bool | None = None,
) -> QTensor:
    """Quantize ``x``: codes ``R(x / scale) + zero_point``, clamped to the format's range.

    The quotient is a float32 division whatever ``x.dtype``; float64 is rounded to float32 first. NaN becomes the
    format's NaN, or the code of zero where it has none; infinities saturate. Its gradient is zero (``fake_quantize``
    has one).
    Arguments other than arrays are static under ``jit``.

    Args:
        x: any shape; float32, float16, bfloat16 or float64.
        spec: a preset's name, a dtype or a QuantSpec.
        scale: per tensor one element of any shape; else x's rank with one entry per group (1 where shared), or 1-D per
            channel. None: dynamic, from the extremes of each group (NaN where a group holds NaN or inf).
        zero_point: integers shaped like ``scale``; for integer formats with a given scale. None: 0.
        axis: makes a per-tensor spec per channel; for a spec with groups, the axis they run along.
        group_size: makes a per-tensor spec per group along ``axis`` (default -1); for a spec with groups, their size.
        packed: whether codes narrower than a byte share bytes, low bits first. None: for fp4 only.

    Returns:
        A QTensor. Its scale is float32: 0-d per tensor, else x's rank.

    Raises:
        TypeError: a wrong kind of array or dtype.
        ValueError: a wrong name, shape, axis, size or combination.

    """
    x = _check_data("x", x)
    whole, op_spec = schema.plan(_spec(spec), x.shape, axis, group_size, packed)
    given = _scales(whole, op_spec, x.shape, scale, zero_point)
    if given is None:
        q, s, *z = _quantize_dynamic(x, op_spec)
        zero = z[0] if z else None
    else:
        s, zero = given
        q = _quantize(x, s, zero, op_spec)
    zero = None if zero is None else _public(zero, whole)
    return QTensor(q, _public(s, whole), zero, None, None, whole, x.shape, x.dtype, op_spec.packed)


def dequantize(q: QTensor, dtype: Any = None) -> jax.Array:
    """Return the numbers that a QTensor stands for: ``(q - zero_point) * scale`` in float32, then ``dtype``.

    Values beyond the dtype's largest finite one saturate; NaN scales give NaN. Differentiable to ``q.scale``.

    Args:
        q: a QTensor of JAX arrays.
        dtype: float32, float16, bfloat16 or float64; None: that of the original array.

    Returns:
        An array of ``q.shape``.

    Raises:
        TypeError: not a QTensor, or another dtype.
        ValueError: the parts of ``q`` don't fit together.

    """
    if not isinstance(q, QTensor):
        raise TypeError(f"q is a {type(q).__module__}.{type(q).__name__}; allowed: a quark_jax.QTensor")
    try:
        name = np.dtype(q.dtype if dtype is None else dtype).name
    except TypeError:
        raise TypeError(f"dtype is {dtype!r}; allowed: a dtype or None") from None
    schema.expect_float("dtype", name)
    if name == "float64" and jax.dtypes.canonicalize_dtype(name).name != name:
        raise TypeError("dtype is float64; JAX has it only with jax_enable_x64")
    whole, op_spec = schema.plan(q.spec, tuple(q.shape), packed=q.packed, dtype=name)
    for part in ("qvalue", "scale", *([] if q.zero_point is None else ["zero_point"])):
        _check_array(f"q.{part}", getattr(q, part))
    zero_part = None if q.zero_point is None else _part(q.zero_point)
    normal = schema.check_parts(whole, op_spec, tuple(q.shape), _part(q.qvalue), _part(q.scale), zero_part)
    zero = None if q.zero_point is None else q.zero_point.reshape(normal)
    y: jax.Array = _dequantize(q.qvalue, q.scale.reshape(normal), zero, op_spec)
    return y


def fake_quantize(
    x: jax.Array,
    spec: Any,
    *,
    scale: jax.Array | float | None = None,
    zero_point: jax.Array | int | None = None,
    axis: int | None = None,
    group_size: int | None = None,
    gradient: str = "clipped",
) -> jax.Array:
    """Return ``dequantize(quantize(x))`` in one pass, bit for bit, but NaN stays NaN in every format.

    Args:
        x: any shape; float32, float16, bfloat16 or float64 (computed in float32).
        spec: as for ``quantize``.
        scale: as for ``quantize``; a constant to the gradient, dynamic or given.
        zero_point: as for ``quantize``.
        axis: as for ``quantize``.
        group_size: as for ``quantize``.
        gradient: ``"clipped"``: zero where x saturated (or is NaN), else passed through (float64 rounded to float32);
            ``"ste"``: always passed through.

    Returns:
        An array of x's shape and dtype.

    Raises:
        TypeError: a wrong kind of array or dtype.
        ValueError: a wrong name, shape, axis, size or combination.

    """
    x = _check_data("x", x)
    one_of("gradient", gradient, schema.GRADIENTS)
    whole, op_spec = schema.plan(_spec(spec), x.shape, axis, group_size)
    s, zero = _scales(whole, op_spec, x.shape, scale, zero_point) or (None, None)
    y: jax.Array = _fake_quantize(x, s, zero, op_spec, gradient)
    return y


def choose_qparams(
    x: jax.Array, spec: Any, *, axis: int | None = None, group_size: int | None = None, method: str = "absmax"
) -> tuple[jax.Array, jax.Array | None]:
    """Return the scale and zero point that a dynamic ``quantize`` of ``x`` would use.

    Symmetric specs: ``scale = max|x| / quant_max`` (the format's largest value for floats). Asymmetric ones:
    ``scale = (max(x, 0) - min(x, 0)) / (quant_max - quant_min)`` and the zero point that puts 0 on a code. A group of
    zeros gets scale 1, one with NaN or inf gets NaN; a scale is never 0, subnormal or infinite. Its gradient is zero.

    Args:
        x: any shape; float32, float16, bfloat16 or float64.
        spec: as for ``quantize``.
        axis: as for ``quantize``.
        group_size: as for ``quantize``.
        method: ``"absmax"`` or ``"minmax"``: both take the group's extreme values.

    Returns:
        The scale (float32; 0-d per tensor, else x's rank) and the zero point (int32, same shape; None if symmetric).

    Raises:
        TypeError: a wrong kind of array or dtype.
        ValueError: a wrong name, axis or size.

    """
    x = _check_data("x", x)
    one_of("method", method, schema.METHODS)
    whole, op_spec = schema.plan(_spec(spec), x.shape, axis, group_size)
    s, *z = [_public(a, whole) for a in _choose_qparams(x, op_spec)]
    return s, z[0] if z else None


def pack(codes: jax.Array, bits: int, axis: int = -1) -> jax.Array:
    """Pack codes into a bit stream along an axis: code i is bits ``bits * i`` and up, low bits first.

    Args:
        codes: int8 or uint8, at least 1-D; only the low ``bits`` of a code are kept.
        bits: 1 to 8.
        axis: which axis shrinks to ``ceil(length * bits / 8)`` bytes; the last byte is filled with zero bits.

    Returns:
        A uint8 array.

    Raises:
        TypeError: another dtype.
        ValueError: bits or axis out of range.

    """
    codes = _check_bytes("codes", codes)
    axis = schema.normal_axis(axis, codes.ndim, "codes")
    packed: jax.Array = _along_last("pack", codes, axis, schema.codes_spec(bits, length=codes.shape[axis]))
    return packed


def unpack(packed: jax.Array, bits: int, axis: int = -1, *, signed: bool) -> jax.Array:
    """Unpack what ``pack`` made: one code a byte.

    Args:
        packed: uint8, at least 1-D.
        bits: 1 to 8.
        axis: the packed axis; it grows to ``length * 8 // bits`` codes, of which a filled last byte may add some zeros.
        signed: whether codes are two's complement (int8 results), or not (uint8).

    Returns:
        An int8 or uint8 array.

    Raises:
        TypeError: another dtype.
        ValueError: bits or axis out of range.

    """
    packed = _check_bytes("packed", packed)
    axis = schema.normal_axis(axis, packed.ndim, "packed")
    spec = schema.unpack_spec(bits, signed=signed, packed_length=packed.shape[axis])
    codes: jax.Array = _along_last("unpack", packed, axis, spec)
    return codes


def _check_bytes(name: str, x: object) -> jax.Array:
    x = _check_array(name, x)
    if x.dtype.name not in ("int8", "uint8"):
        raise TypeError(f"{name} has dtype {x.dtype.name}; allowed: int8, uint8")
    return x


# ---- compiled functions and gradients --------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=(0, 2, 3))
def _along_last(name: str, codes: jax.Array, axis: int, spec: OpSpec) -> jax.Array:
    (result,) = call(name, [jnp.moveaxis(codes, axis, -1)], spec)
    return jnp.moveaxis(result, -1, axis)


@partial(jax.jit, static_argnums=1)
def _choose_qparams(x: jax.Array, spec: OpSpec) -> list[jax.Array]:
    return call("choose_qparams", [jax.lax.stop_gradient(x)], spec)


@partial(jax.jit, static_argnums=1)
def _quantize_dynamic(x: jax.Array, spec: OpSpec) -> list[jax.Array]:
    return call("quantize_dynamic", [jax.lax.stop_gradient(x)], spec)


@partial(jax.jit, static_argnums=3)
def _quantize(x: jax.Array, scale: jax.Array, zero_point: jax.Array | None, spec: OpSpec) -> jax.Array:
    return call("quantize", [jax.lax.stop_gradient(x), jax.lax.stop_gradient(scale), zero_point], spec)[0]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _fake_quantize_vjp(
    x: jax.Array, scale: jax.Array | None, zero_point: jax.Array | None, spec: OpSpec, gradient: str
) -> jax.Array:
    if scale is None:
        return call("fake_quantize_dynamic", [x], spec)[0]
    return call("fake_quantize", [x, scale, zero_point], spec)[0]


# Forward rules call differentiable functions and backward rules are linear ones, so gradients have gradients.


def _fake_quantize_forward(x: Any, scale: Any, zero_point: Any, spec: OpSpec, gradient: str) -> tuple[jax.Array, Any]:
    given = scale
    if given is None:
        scale, *zero = call("choose_qparams", [jax.lax.stop_gradient(x)], spec)
        zero_point = zero[0] if zero else None
    y = _fake_quantize_vjp(x, scale, zero_point, spec, gradient)
    return y, ((x, scale, zero_point) if gradient == "clipped" else None, given)


def _fake_quantize_backward(spec: OpSpec, gradient: str, saved: Any, grad: jax.Array) -> Any:
    operands, given = saved
    if gradient == "clipped":
        grad = _clip(grad, *jax.lax.stop_gradient(operands), spec)
    return grad, None if given is None else jnp.zeros_like(given), None


_fake_quantize_vjp.defvjp(_fake_quantize_forward, _fake_quantize_backward)
_fake_quantize = jax.jit(_fake_quantize_vjp, static_argnums=(3, 4))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _clip(grad: jax.Array, x: jax.Array, scale: jax.Array, zero_point: jax.Array | None, spec: OpSpec) -> jax.Array:
    """The clipped gradient: linear in ``grad``, so its own gradient is clipped alike; x only says where."""
    return call("fake_quantize_backward", [x, grad, scale, zero_point], spec)[0]


def _clip_forward(grad: Any, x: Any, scale: Any, zero_point: Any, spec: OpSpec) -> tuple[jax.Array, Any]:
    return _clip(grad, x, scale, zero_point, spec), (x, scale, zero_point)


def _clip_backward(spec: OpSpec, saved: Any, grad: jax.Array) -> Any:
    return _clip(grad, *saved, spec), None, None, None


_clip.defvjp(_clip_forward, _clip_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _dequantize_vjp(q: jax.Array, scale: jax.Array, zero_point: jax.Array | None, spec: OpSpec) -> jax.Array:
    return call("dequantize", [q, scale, zero_point], spec)[0]


def _dequantize_forward(q: Any, scale: Any, zero_point: Any, spec: OpSpec) -> tuple[jax.Array, Any]:
    return _dequantize_vjp(q, scale, zero_point, spec), (q, zero_point)


def _dequantize_backward(spec: OpSpec, saved: Any, grad: jax.Array) -> Any:
    return None, _to_scale(grad, *saved, spec), None


_dequantize_vjp.defvjp(_dequantize_forward, _dequantize_backward)
_dequantize = jax.jit(_dequantize_vjp, static_argnums=3)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _to_scale(grad: jax.Array, q: jax.Array, zero_point: jax.Array | None, spec: OpSpec) -> jax.Array:
    """The gradient to the scale: linear in ``grad``, and the transpose of dequantize, which is linear in the scale."""
    return call("dequantize_backward", [grad, q, zero_point], spec)[0]


def _to_scale_forward(grad: Any, q: Any, zero_point: Any, spec: OpSpec) -> tuple[jax.Array, Any]:
    return _to_scale(grad, q, zero_point, spec), (q, zero_point)


def _to_scale_backward(spec: OpSpec, saved: Any, dscale: jax.Array) -> Any:
    q, zero_point = saved
    return _dequantize_vjp(q, dscale, zero_point, spec), None, None


_to_scale.defvjp(_to_scale_forward, _to_scale_backward)
