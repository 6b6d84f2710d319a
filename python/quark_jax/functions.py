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
from quark_kernels.schema import OpSpec, QParams
from quark_kernels.spec import PerTensor, QuantSpec, as_spec, one_of

ONE: Any = np.float32(1)
"""The scale 1."""
NUMBER = "a number, a jax.Array or a NumPy array"

# ---- arguments -------------------------------------------------------------------------------------------------------


def float32(name: str, value: Any) -> np.float32:
    """Return a number as a float32."""
    number = schema.as_float(name, value)
    bits = schema.subnormal_bits(number)
    return np.float32(number) if bits is None else np.int32(bits).view(np.float32)


def check_array(name: str, x: object, allowed: str = "a jax.Array or NumPy array") -> jax.Array:
    """Return ``x`` as a JAX array. Raises TypeError unless it is an array."""
    if isinstance(x, jax.Array):
        return x
    if isinstance(x, (np.ndarray, np.generic)):
        _expect_32_bits(name, x)
        return jnp.asarray(x)
    raise TypeError(f"{name} is a {type(x).__module__}.{type(x).__name__}; allowed: {allowed}")


def _expect_32_bits(name: str, x: np.ndarray[Any, Any] | np.generic) -> None:
    """Raise ValueError where integers would be cut: JAX has 64 bits only with jax_enable_x64."""
    is_cut = x.dtype.kind in "iu" and jax.dtypes.canonicalize_dtype(x.dtype).itemsize < x.dtype.itemsize
    if is_cut and x.size and (int(x.min()) < -(2**31) or int(x.max()) >= 2**31):
        raise ValueError(f"{name} has integers beyond 32 bits; allowed with jax_enable_x64 only")


def check_data(name: str, x: object) -> jax.Array:
    """Return ``x`` as a JAX array. Raises TypeError unless it is an array of a data dtype."""
    x = check_array(name, x)
    schema.expect_float(name, x.dtype.name)
    schema.expect_rank(name, x.ndim)
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


def _qparams(spec: QuantSpec, op_spec: OpSpec, x: jax.Array, scale: Any, zero_point: Any, seed: Any = None) -> QParams:
    """The given scale, zero point and seed in normal form; no scale where it is dynamic."""
    schema.check_seed(spec, given=seed is not None)
    key = None if seed is None else _key(seed)
    schema.check_scale_arguments(spec, scale=scale is not None, zero_point=zero_point is not None)
    if scale is None:
        return QParams(key=key)
    is_number = spec.scale_format in ("float32", "e4m3")
    if isinstance(scale, numbers.Real) and is_number:
        scale = float32("scale", scale)
    if isinstance(zero_point, numbers.Integral):
        zero_point = np.int32(schema.int32_zero_point(int(zero_point)))
    scale = check_array("scale", scale)
    if is_number:
        scale = _narrow_scale("scale", scale).astype(np.float32)
    schema.expect_scale_of(spec, scale.dtype.name)
    normal = () if op_spec.has_global_scale else op_spec.scale_shape(x.shape)
    schema.expect_scale_shape("scale", scale.shape, spec, normal, x.shape)
    scale = scale.reshape(normal)
    if op_spec.has_global_scale:
        return QParams(_choose_blocks(x, scale, op_spec), scale, None, key)
    if zero_point is not None:
        zero_point = check_array("zero_point", zero_point)
        schema.expect_integer("zero_point", zero_point.dtype.name)
        schema.expect_scale_shape("zero_point", zero_point.shape, spec, normal, x.shape)
        zero_point = _int32(zero_point.reshape(normal))
    return QParams(scale, None, None, key, zero_point)


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


def scale_array(name: str, scale: Any) -> jax.Array:
    """Return a given scale (or another number of the user's) as an array that the core takes."""
    if isinstance(scale, numbers.Real):
        scale = float32(name, scale)
    return _narrow_scale(name, check_array(name, scale, NUMBER))


def _narrow_scale(name: str, scale: jax.Array) -> jax.Array:
    """A scale of a dtype that becomes float32 exactly, or a Python float that jit has traced."""
    if scale.dtype.name == "float64" and getattr(scale, "weak_type", False):
        scale = scale.astype(np.float32)
    schema.expect_scale(scale.dtype.name, name)
    return scale


def number_array(name: str, value: Any) -> jax.Array:
    """Return a number, or an array of one element and any real dtype, as a 0-d float32 array."""
    if isinstance(value, numbers.Real):
        value = float32(name, value)
    array = check_array(name, value, NUMBER)
    schema.expect_number(array.dtype.name, name)
    documented.expect_single(name, array.shape)
    return array.reshape(()).astype(np.float32)


def zero_point_array(zero_point: Any) -> jax.Array | None:
    """Return a given zero point as an int32 or float32 array."""
    if zero_point is None:
        return None
    if isinstance(zero_point, numbers.Integral):
        zero_point = np.int32(schema.int32_zero_point(int(zero_point)))
    elif isinstance(zero_point, numbers.Real):
        zero_point = float32("zero_point", zero_point)
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


def given(a: jax.Array | None) -> Any:
    """Return what a plan needs to know of a scale or zero point; None of None."""
    return None if a is None else Given(a.shape, bool(jnp.issubdtype(a.dtype, jnp.floating)))


def arrange(a: jax.Array | None, layout: Layout | None) -> jax.Array | None:
    """Return a scale or zero point in the core's layout."""
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


def _part(a: jax.Array | None) -> schema.Part | None:
    return None if a is None else schema.Part(a.shape, a.dtype.name)


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

    """
    x = check_data("x", x)
    whole, op_spec = schema.plan(resolve_spec(spec), x.shape, axis, group_size, packed)
    packed = schema.use_packed(whole, packed)
    params = _qparams(whole, op_spec, x, scale, zero_point, seed)
    if params.scale is None:
        q, params = _quantize_dynamic(x, params.key, op_spec)
    else:
        if schema.is_interleaved(whole, packed):
            params = params._replace(scale=_exponent_code(params.scale))
        q = _quantize(x, params, op_spec)
    return _qtensor(q, params, whole, x, packed)


def _qtensor(q: jax.Array, params: QParams, spec: QuantSpec, x: jax.Array, packed: bool) -> QTensor:
    """Codes and scales as users see them."""
    zero = None if params.zero_point is None else _public(params.zero_point, spec)
    scale: Any = _public(params.scale, spec)
    if schema.is_interleaved(spec, packed):
        q, scale = _interleave(q, scale, schema.group_size(spec)), None
    return QTensor(q, scale, zero, params.global_scale, params.pair_bits, spec, x.shape, x.dtype, packed)


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
    shape = tuple(q.shape)
    whole, op_spec = schema.plan(q.spec, shape, packed=q.packed, dtype=name)
    given = {part: getattr(q, part) for part in q.ARRAYS}
    parts = {part: None if a is None else check_array(f"q.{part}", a) for part, a in given.items()}
    schema.check_parts(whole, op_spec, shape, q.packed, {part: _part(a) for part, a in parts.items()})
    codes, scale, zero = (parts[name] for name in ("qvalue", "scale", "zero_point"))
    if schema.is_interleaved(whole, q.packed):
        codes, scale = _take_apart(codes, schema.group_size(whole), shape[-1])
    assert scale is not None
    normal = op_spec.scale_shape(shape)
    zero = None if zero is None else zero.reshape(normal)
    params = QParams(scale.reshape(normal), parts["global_scale"], parts["pair_bits"], None, zero)
    y: jax.Array = _dequantize(codes, params, op_spec)
    return y


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

    """
    x = check_data("x", x)
    one_of("gradient", gradient, schema.GRADIENTS)
    whole, op_spec = schema.plan(resolve_spec(spec), x.shape, axis, group_size)
    params = _qparams(whole, op_spec, x, scale, zero_point, seed)
    y: jax.Array = _fake_quantize(x, params, op_spec, gradient)
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

    """
    x = check_data("x", x)
    whole, op_spec = schema.plan(resolve_spec(spec), x.shape, axis, group_size)
    params = choose(x, op_spec.choosing(schema.expect_method(whole, method)))
    if op_spec.has_global_scale:
        return params.global_scale.reshape(()), None
    zero = params.zero_point
    return _public(params.scale, whole), None if zero is None else _public(zero, whole)


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

    """
    x = check_data("x", x)
    one_of("rounding", rounding, FIXED_ROUNDINGS)
    s, z = scale_array("scale", scale), zero_point_array(zero_point)
    plan = documented.everyday_lsq_plan(x.shape, given(s), given(z), quant_min, quant_max, axis, rounding)
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

    """
    x = check_data("x", x)
    one_of("rounding", rounding, FIXED_ROUNDINGS)
    t, z = scale_array("log_threshold", log_threshold), zero_point_array(zero_point)
    plan, domain = documented.everyday_tqt_plan(x.shape, given(t), given(z), bits, rounding)
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


@partial(jax.jit, static_argnums=2)
def _choose_blocks(x: jax.Array, global_scale: jax.Array, spec: OpSpec) -> jax.Array:
    return call("choose_qparams", [jax.lax.stop_gradient(x), jax.lax.stop_gradient(global_scale)], spec)[0]


@partial(jax.jit, static_argnums=2)
def _quantize_dynamic(x: jax.Array, key: jax.Array | None, spec: OpSpec) -> tuple[jax.Array, QParams]:
    q, *outs = call("quantize_dynamic", [jax.lax.stop_gradient(x), key], spec)
    return q, schema.qparams("quantize_dynamic", spec, outs)


@partial(jax.jit, static_argnums=2)
def _quantize(x: jax.Array, params: QParams, spec: OpSpec) -> jax.Array:
    return call("quantize", [jax.lax.stop_gradient(x), *jax.lax.stop_gradient(params)], spec)[0]


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
    y = _fake_quantize_vjp(x, params, spec, gradient)
    return y, ((x, params) if gradient == "clipped" else None)


def _fake_quantize_backward(spec: OpSpec, gradient: str, saved: Any, grad: jax.Array) -> Any:
    if gradient == "clipped":
        grad = _clip(grad, *jax.lax.stop_gradient(saved), spec)
    return grad, None


_fake_quantize_vjp.defvjp(_fake_quantize_forward, _fake_quantize_backward)
_fake_quantize = jitted(_fake_quantize_vjp, (2, 3))


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
_dequantize = jitted(_dequantize_vjp, (2,))


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
    p, z = arrange(parameter, plan.scale), arrange(zero_point, plan.zero_point)
    y: jax.Array = _learned(x, p, number, z, kind, plan.forward, plan.backward)
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
    y = _learned_vjp(x, parameter, number, zero_point, kind, forward, backward)
    return y, (x, parameter, number, zero_point)


def _learned_backward(kind: str, forward: OpSpec, backward: OpSpec, saved: Any, grad: jax.Array) -> Any:
    parameter = saved[1]
    dx, dp = _learned_gradients(grad, *saved, kind, backward)
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
_learned = jitted(_learned_vjp, (4, 5, 6))
