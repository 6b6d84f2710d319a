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

from quark_jax.primitives import call, cut_like, jitted
from quark_jax.qtensor import QTensor
from quark_kernels import documented, schema
from quark_kernels.documented import Given, Layout, LearnPlan
from quark_kernels.formats import FIXED_ROUNDINGS
from quark_kernels.schema import OPS, CallPlan, OpSpec, Part, QParams, Shape
from quark_kernels.spec import PerTensor, QuantSpec, as_spec, one_of

ONE: Any = np.float32(1)
"""The scale 1."""
NUMBER = "a number, a jax.Array or a NumPy array"
INTEGER = "an integer, a jax.Array or a NumPy array"
DATA_DTYPES = tuple(jnp.dtype(name) for name in schema.FLOAT_DTYPES)

# ---- arguments -------------------------------------------------------------------------------------------------------


def float32(name: str, value: Any) -> np.float32:
    """Return a number as a float32."""
    return np.int32(schema.float32_bits(schema.as_float(name, value))).view(np.float32)


def check_array(name: str, x: object, allowed: str = "a jax.Array or NumPy array") -> jax.Array:
    """Return ``x`` as a JAX array. Raises TypeError unless it is an array."""
    if not isinstance(x, (jax.Array, np.ndarray, np.generic)):
        raise TypeError(f"{name} is a {type(x).__module__}.{type(x).__name__}; allowed: {allowed}")
    schema.expect_rank(name, x.ndim)
    if isinstance(x, jax.Array):
        return x
    if not x.dtype.isnative:
        raise TypeError(
            f"{name} has dtype {x.dtype.str}; allowed: this machine's byte order, {x.dtype.newbyteorder().str}"
        )
    _expect_32_bits(name, x)
    return jnp.asarray(x)


def _expect_32_bits(name: str, x: np.ndarray[Any, Any] | np.generic) -> None:
    """Raise ValueError where integers would be cut: JAX has 64 bits only with jax_enable_x64."""
    is_cut = x.dtype.kind in "iu" and jax.dtypes.canonicalize_dtype(x.dtype).itemsize < x.dtype.itemsize
    if is_cut and x.size and (int(x.min()) < -(2**31) or int(x.max()) >= 2**31):
        raise ValueError(f"{name} has integers beyond 32 bits; allowed with jax_enable_x64 only")


def check_data(name: str, x: object) -> jax.Array:
    """Return ``x`` as a JAX array. Raises TypeError unless it is an array of a data dtype."""
    x = check_array(name, x)
    if x.dtype not in DATA_DTYPES:
        schema.expect_float(name, x.dtype.name)
    return x


def _dtype_name(spec: Any) -> str | None:
    if isinstance(spec, (str, QuantSpec)):
        return None
    try:
        return str(np.dtype(spec).name)
    except TypeError:
        return None


def resolve_spec(spec: object) -> QuantSpec:
    """Return the QuantSpec that a preset's name, a dtype or a QuantSpec stands for."""
    return as_spec(spec, None if spec is None else _dtype_name(spec))


Kind = tuple[Shape, Any] | bool
"""What a plan needs to know of a scale or zero point: the type of an array, or whether there is a number instead."""


def kind(a: Any) -> Kind:
    """Return what a plan needs to know of a scale or zero point."""
    return (a.shape, a.dtype) if isinstance(a, (jax.Array, np.generic)) else a is not None


def _part(kind: Kind) -> Part | bool:
    """A kind as the schema knows it."""
    return kind if isinstance(kind, bool) else Part(kind[0], kind[1].name)


def _plan(
    spec: Any,
    scale: Kind,
    zero_point: Kind,
    has_seed: bool,
    shape: Shape,
    axis: int | None,
    group_size: int | None,
    packed: bool | None,
) -> CallPlan:
    parts = _part(scale), _part(zero_point)
    return schema.call_plan(resolve_spec(spec), *parts, has_seed, shape, axis, group_size, packed)


def _qparams(
    spec: Any,
    x: jax.Array,
    axis: int | None,
    group_size: int | None,
    packed: bool | None,
    scale: Any,
    zero_point: Any,
    seed: Any,
) -> tuple[CallPlan, QParams]:
    """The plan of a call, and the given scale, zero point and seed; no scale where it is dynamic.

    They aren't in normal form yet: that costs more than all else outside of jit, so it is done within.
    """
    scale = _array_or_number("scale", scale, NUMBER)
    zero_point = _array_or_number("zero_point", zero_point, INTEGER)
    has_seed = seed is not None
    # NumPy's scalars are numbers here, as Python's are.
    kinds = [isinstance(a, numbers.Real) or kind(a) for a in (scale, zero_point)]
    plan = schema.planned(_plan, spec, *kinds, has_seed, x.shape, axis, group_size, packed)
    key = _key(seed) if has_seed else None
    if scale is None:
        return plan, QParams(key=key)
    if not isinstance(scale, jax.Array):
        is_number = plan.spec.scale_format in ("float32", "e4m3")
        scale = float32("scale", scale) if is_number else check_array("scale", scale)
    if plan.op_spec.has_global_scale:
        return plan, _choose_blocks(x, scale, plan.op_spec)._replace(key=key)
    if isinstance(zero_point, numbers.Integral):
        zero_point = np.int32(schema.int32_zero_point(int(zero_point)))
    elif zero_point is not None:
        zero_point = check_array("zero_point", zero_point, INTEGER)
    return plan, QParams(scale, None, None, key, zero_point)


def _array_or_number(name: str, a: Any, allowed: str) -> Any:
    """A given scale or zero point: None, a number or an array, a Python float that jit has traced as a float32 one."""
    if a is None or (not isinstance(a, jax.Array) and isinstance(a, numbers.Real)):
        return a
    a = check_array(name, a, allowed)
    return a.astype(np.float32) if a.dtype == np.float64 and getattr(a, "weak_type", False) else a


def _normal(params: QParams, spec: OpSpec, shape: Shape) -> QParams:
    """A given scale and zero point in normal form, for data of this shape. Called within jit."""
    if params.scale is None or params.global_scale is not None:
        return params
    scale, zero_point = params.scale.reshape(spec.scale_shape(shape)), params.zero_point
    if spec.has_float32_scales:
        scale = scale.astype(np.float32)
    if zero_point is not None:
        zero_point = _int32(zero_point.reshape(scale.shape))
    return params._replace(scale=scale, zero_point=zero_point)


def _key(seed: Any) -> jax.Array | np.ndarray[Any, Any]:
    """A seed as the two int32 words that the core takes."""
    if isinstance(seed, (np.ndarray, np.generic)) and seed.dtype.kind in "iu":
        documented.expect_single("seed", seed.shape)
        seed = seed.item()
    if isinstance(seed, int | numbers.Integral) and seed is not True and seed is not False:
        return np.array(schema.seed_words(int(seed)), np.int32)
    seed = check_array("seed", seed, "an integer or an array of one")
    if not jnp.issubdtype(seed.dtype, jnp.integer):
        raise TypeError(
            f"seed has dtype {seed.dtype.name}; allowed: an integer dtype (jax.random.bits makes one of a key)"
        )
    documented.expect_single("seed", seed.shape)
    seed = seed.reshape(())
    if seed.dtype.itemsize > 4:
        low, high = seed.astype(np.uint32), (seed >> 32).astype(np.uint32)
    elif jnp.issubdtype(seed.dtype, jnp.signedinteger):
        low = seed.astype(np.int32)
        high = low >> 31
    else:
        low, high = seed.astype(np.uint32), jnp.zeros((), np.uint32)
    return jnp.stack([jax.lax.bitcast_convert_type(word, np.int32) for word in (low, high)])


def scale_array(name: str, scale: Any) -> Any:
    """Return a given scale (or another number of the user's) as an array that the core takes."""
    if not isinstance(scale, jax.Array) and isinstance(scale, numbers.Real):
        return float32(name, scale)
    return _narrow_scale(name, check_array(name, scale, NUMBER))


def _narrow_scale(name: str, scale: jax.Array) -> jax.Array:
    """A scale of a dtype that becomes float32 exactly, or a Python float that jit has traced."""
    if scale.dtype.name == "float64" and getattr(scale, "weak_type", False):
        scale = scale.astype(np.float32)
    schema.expect_scale(scale.dtype.name, name)
    return scale


def number_array(name: str, value: Any) -> Any:
    """Return a number, or an array of one element and any real dtype, as a 0-d float32 array."""
    if not isinstance(value, jax.Array) and isinstance(value, numbers.Real):
        return float32(name, value)
    array = check_array(name, value, NUMBER)
    schema.expect_number(array.dtype.name, name)
    documented.expect_single(name, array.shape)
    # Where it is there is nothing to do: out of jit each of these takes longer than a call.
    return array if array.shape == () and array.dtype == np.float32 else array.reshape(()).astype(np.float32)


def zero_point_array(zero_point: Any) -> Any:
    """Return a given zero point as an int32 or float32 array; None of None."""
    if zero_point is None:
        return None
    if not isinstance(zero_point, jax.Array):
        if isinstance(zero_point, numbers.Integral):
            return np.int32(schema.int32_zero_point(int(zero_point)))
        if isinstance(zero_point, numbers.Real):
            return float32("zero_point", zero_point)
    array = check_array("zero_point", zero_point, NUMBER)
    if array.dtype.name == "float64" and getattr(array, "weak_type", False):
        array = array.astype(np.float32)
    schema.expect_zero_point(array.dtype.name)
    return array.astype(np.float32) if jnp.issubdtype(array.dtype, jnp.floating) else _int32(array)


def _int32(zero_point: jax.Array) -> jax.Array:
    """An integer zero point as int32; what is beyond saturates."""
    if zero_point.dtype.name == "int64":
        zero_point = zero_point.clip(-(2**31), 2**31 - 1)
    return zero_point.astype(np.int32)


def given(kind: Kind) -> Given | None:
    """Return a kind as the plans of documented functions know it."""
    return None if isinstance(kind, bool) else Given(kind[0], bool(jnp.issubdtype(kind[1], jnp.floating)))


def learn_plan(plan: Any, x: jax.Array, parameter: Any, zero_point: Any, *how: Any) -> Any:
    """Return the plan of a function whose parameter learns, made once."""
    return schema.planned(_learn_plan, plan, x.shape, kind(parameter), kind(zero_point), *how)


def _learn_plan(plan: Any, shape: Shape, parameter: Kind, zero_point: Kind, *how: Any) -> Any:
    return plan(shape, given(parameter), given(zero_point), *how)


def arrange(a: jax.Array | None, layout: Layout | None) -> jax.Array | None:
    """Return a scale or zero point in the core's layout. Called within jit."""
    if a is None or layout is None:
        return None
    a = a.reshape(layout.shape)
    if layout.swap is not None:
        a = a.swapaxes(*layout.swap)
    return jnp.broadcast_to(a, layout.normal)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def converted(a: jax.Array, dtype: str) -> jax.Array:
    """Return a gradient in another dtype, by the core: linear, so its own gradient is converted back."""
    if a.dtype.name == dtype:
        return a
    op, spec = documented.conversion(a.dtype.name, dtype, a.shape)
    return call(op, [a] if op == "convert" else [a, ONE, None], spec)[0]


def _converted_forward(a: jax.Array, dtype: str) -> tuple[jax.Array, jax.Array]:
    return converted(a, dtype), jnp.zeros(0, a.dtype)


def _converted_backward(dtype: str, saved: jax.Array, grad: jax.Array) -> Any:
    return (converted(grad, saved.dtype.name),)


converted.defvjp(_converted_forward, _converted_backward)


def _public(params: QParams, is_per_tensor: bool) -> QParams:
    """Scales and zero points in the shape that users see: 0-d per tensor, else the normal form. Called within jit."""
    if not is_per_tensor:
        return params
    zero_point = None if params.zero_point is None else params.zero_point.reshape(())
    return params._replace(scale=params.scale.reshape(()), zero_point=zero_point)


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
    seed: jax.Array | int | None = None,
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
            channel. None: dynamic, from the extremes of each group (NaN where a group holds NaN or inf). float32,
            float16 or bfloat16 for float32 scales; float8_e8m0fnu for e8m0 ones, int8 exponents for ``exponent``; for
            e4m3 the one scale of the whole tensor, whose blocks' scales stay dynamic; microexponents take none.
        zero_point: integers shaped like ``scale``; for integer formats with a given scale. None: 0.
        axis: makes a per-tensor spec per channel; for a spec with groups, the axis they run along.
        group_size: makes a per-tensor spec per group along ``axis`` (default -1); for a spec with groups, their size.
        packed: whether codes narrower than a byte share bytes, low bits first; for 8-bit codes with a shared exponent
            (bfp16), whether a block is its exponent's byte and then its codes. None: for fp4 only.
        seed: an integer of 64 bits, or an array of one (32 bits without jax_enable_x64), which may be traced: with
            ``rounding="stochastic"``, and only then. Random word i of Philox4x32-10 (Salmon et al., SC'11) decides for
            element i, whatever the device and the framework. ``jax.random.bits(key)`` makes a seed of a key.

    Returns:
        A QTensor. Its scale is 0-d per tensor, else has x's rank.

    Raises:
        TypeError: a wrong kind of array or dtype.
        ValueError: a wrong name, shape, axis, size or combination.

    Examples:
        >>> x = jnp.array([[0.1, -0.5, 1.0, 0.26]])
        >>> q = quark_jax.quantize(x, "int8", axis=0)
        >>> q.qvalue
        Array([[ 13, -64, 127,  33]], dtype=int8)
        >>> q.scale
        Array([[0.00787402]], dtype=float32)
        >>> quark_jax.quantize(x, "fp4", scale=0.25, packed=False).dequantize()
        Array([[ 0.125, -0.5  ,  1.   ,  0.25 ]], dtype=float32)

    """
    x = check_data("x", x)
    (whole, op_spec, packed, _), params = _qparams(spec, x, axis, group_size, packed, scale, zero_point, seed)
    is_per_tensor, is_interleaved = whole.granularity == PerTensor(), schema.is_interleaved(whole, packed)
    q: jax.Array
    if params.scale is None:
        q, params = _quantize_dynamic(x, params.key, op_spec, is_per_tensor)
    else:
        if is_interleaved:
            params = params._replace(scale=_exponent_code(params.scale))
        q, params = _quantize(x, params, op_spec, is_per_tensor)
    if is_interleaved:
        q, params = _interleave(q, params.scale, schema.group_size(whole)), params._replace(scale=None)
    arrays = q, params.scale, params.zero_point, params.global_scale, params.pair_bits
    return QTensor(*arrays, whole, x.shape, x.dtype, packed)


def _exponent_code(exponent: jax.Array) -> jax.Array:
    """int8 exponents as E8M0 codes: 127 more, modulo 256."""
    return (exponent.view(np.uint8) + np.uint8(127)).view(jnp.float8_e8m0fnu)


def dequantize(q: QTensor, dtype: Any = None) -> jax.Array:
    """Return the numbers that a QTensor stands for: ``(q - zero_point) * scale`` in float32, then ``dtype``.

    Values beyond the dtype's largest finite one saturate; NaN scales give NaN. Differentiable to ``q.scale`` where that
    is float32.

    Args:
        q: a QTensor of JAX arrays.
        dtype: float32, float16, bfloat16 or float64; None: that of the original array.

    Returns:
        An array of ``q.shape``.

    Raises:
        TypeError: not a QTensor, or another dtype.
        ValueError: the parts of ``q`` don't fit together.

    Examples:
        >>> q = quark_jax.quantize(jnp.array([0.1, -0.5, 1.0]), "fp8_e4m3", scale=1.0)
        >>> quark_jax.dequantize(q)
        Array([ 0.1015625, -0.5      ,  1.       ], dtype=float32)

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
    given = [getattr(q, part) for part in q.ARRAYS]
    parts = [None if a is None else check_array(f"q.{part}", a) for part, a in zip(q.ARRAYS, given, strict=True)]
    whole, op_spec = schema.planned(_dequantize_plan, q.spec, q.shape, q.packed, name, *map(kind, parts))
    codes, scale, zero_point, global_scale, pair_bits = parts
    assert codes is not None
    if schema.is_interleaved(whole, q.packed):
        codes, scale = _take_apart(codes, schema.group_size(whole), q.shape[-1])
    y: jax.Array = _dequantize(codes, QParams(scale, global_scale, pair_bits, None, zero_point), op_spec)
    return y


def _dequantize_plan(spec: QuantSpec, shape: Shape, packed: bool, dtype: str, *kinds: Kind) -> tuple[QuantSpec, OpSpec]:
    size = tuple(shape)
    whole, op_spec = schema.plan(spec, size, packed=packed, dtype=dtype)
    parts = {part: _part(kind) or None for part, kind in zip(QTensor.ARRAYS, kinds, strict=True)}
    schema.check_parts(whole, op_spec, size, packed, parts)  # type: ignore[arg-type]  # True isn't among them
    return whole, op_spec


def native_codes(q: QTensor) -> jax.Array:
    """Return the codes in JAX's own dtype and the logical shape; see ``QTensor.native``."""
    name = "float4_e2m1fn" if q.spec.format == "fp4" else q.spec.format
    if q.spec.scale_format in ("exponent", "microexponents") or q.zero_point is not None:
        raise ValueError(f"{q!r} has no native form: JAX's products take no shared exponents and no zero points")
    if q.spec.format == "int8f6" or (q.spec.element.can_pack and not hasattr(jnp, name)):
        raise ValueError(f"JAX has no dtype for codes of {q.spec.format}")
    if not q.spec.element.can_pack:
        return q.qvalue
    codes = q.qvalue
    if q.packed:
        codes = unpack(codes, q.spec.element.bits, signed=q.spec.element.lo < 0)
        codes = codes[..., : q.shape[-1]] if q.shape else codes[0]
    native: jax.Array = _as_native(codes, name)
    return native


def fake_quantize(
    x: jax.Array,
    spec: Any,
    *,
    scale: jax.Array | float | None = None,
    zero_point: jax.Array | int | None = None,
    axis: int | None = None,
    group_size: int | None = None,
    gradient: str = "clipped",
    seed: jax.Array | int | None = None,
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
        seed: as for ``quantize``.

    Returns:
        An array of x's shape and dtype.

    Raises:
        TypeError: a wrong kind of array or dtype.
        ValueError: a wrong name, shape, axis, size or combination.

    Examples:
        >>> x = jnp.array([0.1, -0.5, 1.0, 9.0])
        >>> quark_jax.fake_quantize(x, "int4", scale=0.25)
        Array([ 0.  , -0.5 ,  1.  ,  1.75], dtype=float32)

    """
    x = check_data("x", x)
    one_of("gradient", gradient, schema.GRADIENTS)
    plan, params = _qparams(spec, x, axis, group_size, False, scale, zero_point, seed)
    y: jax.Array = _fake_quantize(x, params, plan.op_spec, gradient)
    return y


def choose_qparams(
    x: jax.Array, spec: Any, *, axis: int | None = None, group_size: int | None = None, method: str = "absmax"
) -> tuple[jax.Array, jax.Array | None]:
    """Return the scale and zero point that a dynamic ``quantize`` of ``x`` would use.

    Symmetric specs: ``scale = max|x| / quant_max`` (the format's largest value for floats), or a power of two by the
    spec's ``scale_rule``. Asymmetric ones: ``scale = (max(x, 0) - min(x, 0)) / (quant_max - quant_min)`` and the zero
    point that puts 0 on a code. A group of zeros gets scale 1 (the least power of two), one with NaN or inf gets NaN; a
    float32 scale is never 0, subnormal or infinite. Its gradient is zero.

    Args:
        x: any shape; float32, float16, bfloat16 or float64.
        spec: as for ``quantize``.
        axis: as for ``quantize``.
        group_size: as for ``quantize``.
        method: what is taken for the extreme values of a group of n. ``"absmax"``, ``"minmax"``: they themselves.
            ``"percentile=P"`` (``"percentile"``: P = 99.99): those of nearest rank, the ``ceil(P / 100 * n)``-th
            smallest of |x|, or, asymmetric, of max(-x, 0) and of max(x, 0). ``"mse"``: of the shares 1, 0.99, ... 0.21
            of them the one that leaves the least sum of ``(dequantize(quantize(x), float32) - x)^2``, the largest of
            equals. The last two for float32 and e8m0 scales only.

    Returns:
        The scale (0-d per tensor, else x's rank), as ``quantize`` takes it: float32, float8_e8m0fnu for e8m0, int8
        exponents, and for e4m3 the whole array's float32 scale. And the zero point (int32, same shape; None if
        symmetric).

    Raises:
        TypeError: a wrong kind of array or dtype.
        ValueError: a wrong name, axis or size.

    Examples:
        >>> x, spec = jnp.array([0.0, 0.5, 2.55]), quark_jax.QuantSpec("uint8", symmetric=False)
        >>> scale, zero_point = quark_jax.choose_qparams(x, spec)
        >>> scale
        Array(0.01, dtype=float32)
        >>> zero_point
        Array(0, dtype=int32)

    """
    x = check_data("x", x)
    op_spec, is_per_tensor = schema.planned(_choose_plan, spec, x.shape, axis, group_size, method)
    params = _chosen(x, op_spec, is_per_tensor)
    return (params.global_scale, None) if op_spec.has_global_scale else (params.scale, params.zero_point)


def _choose_plan(spec: Any, shape: Shape, axis: int | None, group_size: int | None, method: str) -> tuple[OpSpec, bool]:
    whole, op_spec = schema.plan(resolve_spec(spec), shape, axis, group_size)
    return op_spec.choosing(schema.expect_method(whole, method)), whole.granularity == PerTensor()


def lsq_quantize(
    x: jax.Array,
    scale: jax.Array | float,
    zero_point: jax.Array | int | None = None,
    *,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    grad_factor: jax.Array | float | None = None,
    rounding: str = "half_even",
) -> jax.Array:
    """Fake-quantize ``x`` with a scale that learns (LSQ, arXiv 1902.08153).

    The result is that of ``fake_quantize``: ``(clamp(R(x / scale) + z, quant_min, quant_max) - z) * scale``. The
    gradient of x is g where ``r = R(x / scale) + z`` is in the range, else 0; that of scale is ``grad_factor * sum(g *
    d)`` over the elements of each scale, d being R(x / scale) - x / scale inside, quant_min - z below, quant_max - z
    above.

    Args:
        x: any shape; float32, float16, bfloat16 or float64 (computed in float32).
        scale: one element of any shape; with ``axis`` ``x.shape[axis]`` of them. float32, float16 or bfloat16.
        zero_point: integers shaped like ``scale``; None: 0. It has no gradient.
        quant_min: the least code.
        quant_max: the greatest code; the range has at most 16 bits.
        axis: the channels' axis; None: one scale for the whole array.
        grad_factor: what the scale's gradient is multiplied by; None: ``1 / sqrt(n * quant_max)``, n elements a scale.
        rounding: ``half_even``, ``half_up``, ``half_away``, ``floor``, ``ceil`` or ``toward_zero``.

    Returns:
        An array of x's shape and dtype. First-order gradients only.

    Raises:
        TypeError: a wrong kind of array or dtype.
        ValueError: a wrong name, shape, axis, range or combination.

    Examples:
        >>> quark_jax.lsq_quantize(jnp.array([0.12, -0.5, 1.0]), jnp.array(0.1), quant_min=-8, quant_max=7)
        Array([ 0.1, -0.5,  0.7], dtype=float32)

    """
    x = check_data("x", x)
    one_of("rounding", rounding, FIXED_ROUNDINGS)
    s, z = scale_array("scale", scale), zero_point_array(zero_point)
    plan = learn_plan(documented.everyday_lsq_plan, x, s, z, quant_min, quant_max, axis, rounding)
    factor = documented.grad_factor(x.size, s.size, quant_max) if grad_factor is None else grad_factor
    return learned("lsq", x, s, number_array("grad_factor", factor), z, plan)


def tqt_quantize(
    x: jax.Array,
    log_threshold: jax.Array | float,
    *,
    bits: int = 8,
    zero_point: jax.Array | int | None = None,
    rounding: str = "half_even",
) -> jax.Array:
    """Fake-quantize ``x`` with a power-of-two scale whose threshold learns (TQT, arXiv 1903.08066).

    The result is that of ``fake_quantize`` with ``scale = 2^ceil(log_threshold) / 2^(bits - 1)`` and the range of
    signed integers of that width. The gradient of x is g where ``r = R(x / scale) + z`` is in the range, else 0; that
    of log_threshold is ``scale * ln2 * sum(g * d)``, d being R(x / scale) - x / scale inside, the range's end - z
    outside.

    Args:
        x: any shape; float32, float16, bfloat16 or float64 (computed in float32).
        log_threshold: one element; float32, float16 or bfloat16: the base-2 logarithm of the threshold. Its ceiling is
            clamped to -126 .. 127.
        bits: 2 to 16.
        zero_point: one integer; None: 0. It has no gradient.
        rounding: as for ``lsq_quantize``.

    Returns:
        An array of x's shape and dtype. First-order gradients only.

    Raises:
        TypeError: a wrong kind of array or dtype.
        ValueError: a wrong name, shape or width.

    Examples:
        >>> quark_jax.tqt_quantize(jnp.array([0.12, -0.5, 1.5]), jnp.array(0.0), bits=4)
        Array([ 0.125, -0.5  ,  0.875], dtype=float32)

    """
    x = check_data("x", x)
    one_of("rounding", rounding, FIXED_ROUNDINGS)
    t, z = scale_array("log_threshold", log_threshold), zero_point_array(zero_point)
    plan, domain = learn_plan(documented.everyday_tqt_plan, x, t, z, bits, rounding)
    return learned("tqt", x, t, number_array("domain", domain), z, plan)


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

    Examples:
        >>> quark_jax.pack(jnp.array([1, 2, 3], jnp.uint8), 4)
        Array([33,  3], dtype=uint8)

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

    Examples:
        >>> quark_jax.unpack(jnp.array([33, 3], jnp.uint8), 4, signed=False)
        Array([1, 2, 3, 0], dtype=uint8)

    """
    packed = _check_bytes("packed", packed)
    axis = schema.normal_axis(axis, packed.ndim, "packed")
    spec = schema.unpack_spec(bits, signed=signed, packed_length=packed.shape[axis])
    codes: jax.Array = _along_last("unpack", packed, axis, spec)
    return codes


def _check_bytes(name: str, x: object) -> jax.Array:
    x = check_array(name, x)
    if x.dtype.name not in ("int8", "uint8"):
        raise TypeError(f"{name} has dtype {x.dtype.name}; allowed: int8, uint8")
    return x


# ---- compiled functions and gradients --------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=(0, 2, 3))
def _along_last(name: str, codes: jax.Array, axis: int, spec: OpSpec) -> jax.Array:
    (result,) = call(name, [jnp.moveaxis(codes, axis, -1)], spec)
    return jnp.moveaxis(result, -1, axis)


@partial(jax.jit, static_argnums=1)
def _as_native(codes: jax.Array, name: str) -> jax.Array:
    dtype = jnp.dtype(name)
    if name.startswith("float4"):
        return jax.lax.bitcast_convert_type(codes.view(np.uint8).astype(jnp.uint4), dtype)
    return codes.astype(dtype)


@partial(jax.jit, static_argnums=1)
def choose(x: jax.Array, spec: OpSpec) -> QParams:
    """Return dynamic scales, and what else the spec has with them, in normal form."""
    x = jax.lax.stop_gradient(x)
    whole = call("choose_qparams", [x], spec.global_spec())[0] if spec.has_global_scale else None
    params = schema.qparams("choose_qparams", spec, call("choose_qparams", [x, whole], spec))
    return params._replace(global_scale=whole)


@partial(jax.jit, static_argnums=(1, 2))
def _chosen(x: jax.Array, spec: OpSpec, is_per_tensor: bool) -> QParams:
    params: QParams = choose(x, spec)
    if spec.has_global_scale:
        return params._replace(global_scale=params.global_scale.reshape(()))
    return _public(params, is_per_tensor)


@partial(jax.jit, static_argnums=2)
def _choose_blocks(x: jax.Array, global_scale: jax.Array, spec: OpSpec) -> QParams:
    whole = global_scale.reshape(()).astype(np.float32)
    (scale,) = call("choose_qparams", [jax.lax.stop_gradient(x), jax.lax.stop_gradient(whole)], spec)
    return QParams(scale, whole)


@partial(jax.jit, static_argnums=(2, 3))
def _quantize_dynamic(
    x: jax.Array, key: jax.Array | None, spec: OpSpec, is_per_tensor: bool
) -> tuple[jax.Array, QParams]:
    q, *outs = call("quantize_dynamic", [jax.lax.stop_gradient(x), key], spec)
    return q, _public(schema.qparams("quantize_dynamic", spec, outs), is_per_tensor)


@partial(jax.jit, static_argnums=(2, 3))
def _quantize(x: jax.Array, params: QParams, spec: OpSpec, is_per_tensor: bool) -> tuple[jax.Array, QParams]:
    params = _normal(params, spec, x.shape)
    q = call("quantize", [jax.lax.stop_gradient(x), *jax.lax.stop_gradient(params)], spec)[0]
    return q, _public(params, is_per_tensor)._replace(key=None)


@partial(jax.jit, static_argnums=2)
def _interleave(q: jax.Array, scale: jax.Array, size: int) -> jax.Array:
    """Blocks of bytes: the exponent's code, then the codes; the last block of a row is filled with zeros."""
    blocks = scale.shape[-1]
    fill = [(0, 0)] * (q.ndim - 1) + [(0, blocks * size - q.shape[-1])]
    codes = jnp.pad(q.view(np.uint8), fill).reshape(*q.shape[:-1], blocks, size)
    whole = jnp.concatenate([scale.view(np.uint8)[..., None], codes], -1)
    return whole.reshape(*q.shape[:-1], blocks * (size + 1))


@partial(jax.jit, static_argnums=(1, 2))
def _take_apart(q: jax.Array, size: int, length: int) -> tuple[jax.Array, jax.Array]:
    """The codes and the exponents' codes of packed blocks."""
    outer, count = q.shape[:-1], -(-length // size)
    blocks = q.reshape(*outer, count, size + 1)
    codes = blocks[..., 1:].reshape(*outer, count * size)[..., :length]
    return codes.view(np.int8), blocks[..., 0].view(jnp.float8_e8m0fnu)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _fake_quantize_vjp(x: jax.Array, params: QParams, spec: OpSpec, gradient: str) -> jax.Array:
    if params.scale is None:
        return call("fake_quantize_dynamic", [x, params.key], spec)[0]
    return call("fake_quantize", [x, *params], spec)[0]


# Forward rules call differentiable functions and backward rules are linear ones, so gradients have gradients.


def _fake_quantize_forward(x: Any, params: QParams, spec: OpSpec, gradient: str) -> tuple[jax.Array, Any]:
    if params.scale is None:
        params = choose(x, spec)._replace(key=params.key)
    y: Any = _fake_quantize_vjp(x, params, spec, gradient)
    return y, ((x, params) if gradient == "clipped" else None)


def _fake_quantize_backward(spec: OpSpec, gradient: str, saved: Any, grad: jax.Array) -> Any:
    if gradient == "clipped":
        grad = _clip(grad, *jax.lax.stop_gradient(saved), spec)
    return grad, None


_fake_quantize_vjp.defvjp(_fake_quantize_forward, _fake_quantize_backward)


@partial(jitted, static_argnums=(2, 3))
def _fake_quantize(x: jax.Array, params: QParams, spec: OpSpec, gradient: str) -> jax.Array:
    return _fake_quantize_vjp(x, _normal(params, spec, x.shape), spec, gradient)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _clip(grad: jax.Array, x: jax.Array, params: QParams, spec: OpSpec) -> jax.Array:
    """The clipped gradient: linear in ``grad``, so its own gradient is clipped alike; x only says where."""
    return call("fake_quantize_backward", [x, grad, *params], spec)[0]


def _clip_forward(grad: Any, x: Any, params: QParams, spec: OpSpec) -> tuple[jax.Array, Any]:
    return _clip(grad, x, params, spec), (x, params)


def _clip_backward(spec: OpSpec, saved: Any, grad: jax.Array) -> Any:
    return _clip(grad, *saved, spec), None, None


_clip.defvjp(_clip_forward, _clip_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dequantize_vjp(q: jax.Array, params: QParams, spec: OpSpec) -> jax.Array:
    return call("dequantize", [q, *params], spec)[0]


def _dequantize_forward(q: Any, params: QParams, spec: OpSpec) -> tuple[jax.Array, Any]:
    return _dequantize_vjp(q, params, spec), (q, params.scale, params.zero_point)


def _dequantize_backward(spec: OpSpec, saved: Any, grad: jax.Array) -> Any:
    if not spec.has_float32_scales:
        return None, None
    q, scale, zero_point = saved
    return None, QParams(cut_like(_to_scale(grad, q, zero_point, spec), scale))


_dequantize_vjp.defvjp(_dequantize_forward, _dequantize_backward)


@partial(jitted, static_argnums=(2,))
def _dequantize(q: jax.Array, params: QParams, spec: OpSpec) -> jax.Array:
    normal = spec.scale_shape(schema.logical_shape(OPS["dequantize"], spec, [q.shape]))
    zero_point = None if params.zero_point is None else params.zero_point.reshape(normal)
    return _dequantize_vjp(q, params._replace(scale=params.scale.reshape(normal), zero_point=zero_point), spec)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _to_scale(grad: jax.Array, q: jax.Array, zero_point: jax.Array | None, spec: OpSpec) -> jax.Array:
    """The gradient to the scale: linear in ``grad``, and the transpose of dequantize, which is linear in the scale."""
    return call("dequantize_backward", [grad, q, zero_point], spec)[0]


def _to_scale_forward(grad: Any, q: Any, zero_point: Any, spec: OpSpec) -> tuple[jax.Array, Any]:
    return _to_scale(grad, q, zero_point, spec), (q, zero_point)


def _to_scale_backward(spec: OpSpec, saved: Any, dscale: jax.Array) -> Any:
    q, zero_point = saved
    return _dequantize_vjp(q, QParams(dscale, zero_point=zero_point), spec), None, None


_to_scale.defvjp(_to_scale_forward, _to_scale_backward)


# ---- learned scales --------------------------------------------------------------------------------------------------


def learned(
    kind: str, x: jax.Array, parameter: jax.Array, number: jax.Array, zero_point: jax.Array | None, plan: LearnPlan
) -> jax.Array:
    """Compute a fake quantization whose ``parameter`` learns: ``kind`` is lsq (a scale) or tqt (a threshold)."""
    y: jax.Array = _learned(x, parameter, number, zero_point, kind, plan)
    return y


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _learned_vjp(
    x: jax.Array,
    parameter: jax.Array,
    number: jax.Array,
    zero_point: jax.Array | None,
    kind: str,
    forward: OpSpec,
    backward: OpSpec,
) -> jax.Array:
    if kind == "lsq":
        return call("fake_quantize", [x, parameter, zero_point], forward)[0]
    return call("tqt_quantize", [x, parameter, number, zero_point], forward)[0]


def _learned_forward(
    x: Any, parameter: Any, number: Any, zero_point: Any, kind: str, forward: OpSpec, backward: OpSpec
) -> tuple[jax.Array, Any]:
    y: Any = _learned_vjp(x, parameter, number, zero_point, kind, forward, backward)
    return y, (x, parameter, number, zero_point)


def _learned_backward(kind: str, forward: OpSpec, backward: OpSpec, saved: Any, grad: jax.Array) -> Any:
    parameter = saved[1]
    gradients: Any = _learned_gradients(grad, *saved, kind, backward)
    dx, dp = gradients
    return dx, cut_like(converted(dp.reshape(parameter.shape), parameter.dtype.name), parameter), None, None


_learned_vjp.defvjp(_learned_forward, _learned_backward)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _learned_gradients(
    grad: jax.Array, x: Any, parameter: Any, number: Any, zero_point: Any, kind: str, spec: OpSpec
) -> tuple[jax.Array, ...]:
    return tuple(call(f"{kind}_backward", [x, grad, parameter, number, zero_point], spec))


def _first_order_only(*_: Any) -> Any:
    raise ValueError(
        "the gradients of lsq_quantize and tqt_quantize can't be differentiated; allowed: first-order gradients"
    )


_learned_gradients.defvjp(_first_order_only, _first_order_only)


@partial(jitted, static_argnums=(4, 5))
def _learned(
    x: jax.Array, parameter: jax.Array, number: jax.Array, zero_point: jax.Array | None, kind: str, plan: LearnPlan
) -> jax.Array:
    p, z = arrange(parameter, plan.scale), arrange(zero_point, plan.zero_point)
    return _learned_vjp(x, p, number, z, kind, plan.forward, plan.backward)
