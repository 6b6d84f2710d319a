"""The everyday functions on torch tensors."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from quark_kernels import documented, schema
from quark_kernels.documented import Given, Layout, LearnPlan
from quark_kernels.formats import FIXED_ROUNDINGS
from quark_kernels.schema import CallPlan, OpSpec, Part, QParams, Shape
from quark_kernels.spec import PerTensor, QuantSpec, as_spec, one_of
from quark_torch.autograd import Recorded, is_recorded, is_transformed
from quark_torch.ops import Run, bound, call, dtype_name, is_distributed, planned, run_plain
from quark_torch.qtensor import QTensor

NUMBER = "a number or a torch.Tensor"
INTEGER = "an integer or a torch.Tensor"
DATA_DTYPES = tuple(getattr(torch, name) for name in schema.FLOAT_DTYPES)
SpecLike = str | torch.dtype | QuantSpec


# ---- arguments -------------------------------------------------------------------------------------------------------


def check_tensor(name: str, x: object, allowed: str = "a torch.Tensor") -> torch.Tensor:
    """Return ``x``. Raises TypeError unless it is a dense tensor."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} is a {type(x).__module__}.{type(x).__name__}; allowed: {allowed}")
    if x.layout != torch.strided or x.is_nested:
        layout = "nested" if x.is_nested else x.layout
        raise TypeError(f"{name} has layout {layout}; allowed: torch.strided (dense)")
    schema.expect_rank(name, x.dim())
    return x


def check_data(name: str, x: object) -> torch.Tensor:
    """Return ``x``. Raises TypeError unless it is a tensor of a data dtype."""
    x = check_tensor(name, x)
    if x.dtype not in DATA_DTYPES:
        schema.expect_float(name, dtype_name(x.dtype))
    return x


def resolve_spec(spec: object) -> QuantSpec:
    """Return the QuantSpec that a preset's name, a dtype or a QuantSpec stands for."""
    return as_spec(spec, dtype_name(spec) if isinstance(spec, torch.dtype) else None)


Kind = tuple[torch.Size, torch.dtype] | bool
"""What a plan needs to know of a scale or zero point: the type of a tensor, or whether there is a number instead."""


def kind(t: Any) -> Kind:
    """Return what a plan needs to know of a scale or zero point."""
    return (t.shape, t.dtype) if isinstance(t, torch.Tensor) else t is not None


def _part(kind: Kind) -> Part | bool:
    """A kind as the schema knows it."""
    return kind if isinstance(kind, bool) else Part(tuple(kind[0]), dtype_name(kind[1]))


def _plan(
    spec: SpecLike,
    scale: Kind,
    zero_point: Kind,
    has_seed: bool,
    shape: torch.Size,
    axis: int | None,
    group_size: int | None,
    packed: bool | None,
) -> CallPlan:
    parts = _part(scale), _part(zero_point)
    return schema.call_plan(resolve_spec(spec), *parts, has_seed, tuple(shape), axis, group_size, packed)


def _float32(name: str, value: Any, like: torch.Tensor) -> torch.Tensor:
    """A number as a 0-d float32 tensor beside ``like``."""
    number = schema.as_float(name, value)
    # In torch.compile it may be a symbol, with which nothing but arithmetic can be done.
    if torch.compiler.is_compiling() and not 0 < abs(number) < 2**-126:
        return _filled(number, torch.float32, like)
    return _filled(schema.float32_bits(number), torch.int32, like).view(torch.float32)


def _filled(number: float, dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
    """A 0-d tensor beside ``like``. A GPU fills it: a copy would make the host wait, and be refused in a CUDA graph."""
    if like.is_cpu:
        return torch.tensor(number, dtype=dtype, device=like.device)
    return torch.full((), number, dtype=dtype, device=like.device)


def _qparams(
    spec: SpecLike,
    x: torch.Tensor,
    axis: int | None,
    group_size: int | None,
    packed: bool | None,
    scale: Any,
    zero_point: Any,
    seed: Any,
) -> tuple[CallPlan, QParams]:
    """The plan of a call; the given scale, zero point and seed as the core takes them, no scale where it is dynamic."""
    has_seed = seed is not None
    plan = planned(_plan, spec, kind(scale), kind(zero_point), has_seed, x.shape, axis, group_size, packed)
    key = _key(seed, x) if has_seed else None
    if scale is None:
        return plan, QParams(None, None, None, key)
    scale_format = plan.spec.scale_format
    may_be_number = scale_format in ("float32", "e4m3")
    if may_be_number and not isinstance(scale, torch.Tensor) and isinstance(scale, numbers.Real):
        scale = _float32("scale", scale, x)
    scale = normal(_beside_x("scale", scale, x, NUMBER if may_be_number else "a torch.Tensor"), plan.scale_shape)
    if plan.op_spec.has_global_scale:
        scale = scale.float()
        return plan, QParams(call("choose_qparams", [x.detach(), scale], plan.op_spec), scale, None, key)
    if scale_format == "float32" and scale.dtype != torch.float32:
        scale = scale.float()
    if zero_point is not None:
        if not isinstance(zero_point, torch.Tensor) and isinstance(zero_point, numbers.Integral):
            zero_point = _filled(schema.int32_zero_point(int(zero_point)), torch.int32, x)
        zero_point = _int32(normal(_beside_x("zero_point", zero_point, x, INTEGER), plan.scale_shape))
    return plan, QParams(scale, None, None, key, zero_point)


def _beside_x(name: str, t: Any, x: torch.Tensor, allowed: str) -> torch.Tensor:
    tensor = check_tensor(name, t, allowed)
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {t.device}; x is on {x.device}, allowed: the same device")
    return tensor


def constant(t: torch.Tensor) -> torch.Tensor:
    """Return a tensor without the gradient that it may have."""
    return t.detach() if t.requires_grad or is_transformed() else t


def shaped(t: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Return a scale or zero point in its normal form. One that is 0-d the core takes as well; batches of them not."""
    if t.shape == shape or (t.dim() == 0 and not is_transformed()):
        return t
    return t.reshape(shape)


def normal(t: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Return a scale or zero point as a constant in its normal form."""
    if is_transformed():
        return t.detach().reshape(shape)
    if t.requires_grad:
        t = t.detach()
    return t if t.dim() == 0 or t.shape == shape else t.reshape(shape)


def _key(seed: Any, like: torch.Tensor) -> torch.Tensor:
    """A seed as the two int32 words that the core takes."""
    if isinstance(seed, int | numbers.Integral) and seed is not True and seed is not False:
        pair = schema.seed_words(int(seed))
        if like.is_cpu:
            return torch.tensor(pair, dtype=torch.int32, device=like.device)
        return torch.stack([_filled(word, torch.int32, like) for word in pair])
    seed = _beside("seed", check_tensor("seed", seed, "an integer or a torch.Tensor of one"), like)
    if seed.is_floating_point() or seed.is_complex() or seed.dtype == torch.bool:
        raise TypeError(f"seed has dtype {dtype_name(seed.dtype)}; allowed: an integer dtype")
    documented.expect_single("seed", tuple(seed.shape))
    words: torch.Tensor = seed.detach().reshape(1).to(torch.int64).view(torch.int32)
    return words


def scale_tensor(name: str, scale: Any, like: torch.Tensor) -> torch.Tensor:
    """Return a given scale (or another number of the user's) as a float32 tensor beside ``like``."""
    if not isinstance(scale, torch.Tensor) and isinstance(scale, numbers.Real):
        return _float32(name, scale, like)
    scale = _beside(name, check_tensor(name, scale, NUMBER), like)
    if scale.dtype != torch.float32:
        schema.expect_scale(dtype_name(scale.dtype), name)
        scale = scale.float()
    return constant(scale)


def number_tensor(name: str, value: Any, like: torch.Tensor) -> torch.Tensor:
    """Return a number, or a tensor of one element and any real dtype, as a 0-d float32 tensor beside ``like``."""
    if not isinstance(value, torch.Tensor) and isinstance(value, numbers.Real):
        return _float32(name, value, like)
    value = check_tensor(name, value, NUMBER)
    schema.expect_number(dtype_name(value.dtype), name)
    documented.expect_single(name, tuple(value.shape))
    return constant(_beside(name, value, like)).reshape(()).to(torch.float32)


def zero_point_tensor(zero_point: Any, like: torch.Tensor) -> torch.Tensor | None:
    """Return a given zero point as an int32 or float32 tensor beside ``like``."""
    if zero_point is None:
        return None
    if not isinstance(zero_point, torch.Tensor):
        if isinstance(zero_point, numbers.Integral):
            return _filled(schema.int32_zero_point(int(zero_point)), torch.int32, like)
        if isinstance(zero_point, numbers.Real):
            return _float32("zero_point", zero_point, like)
    zero_point = _beside("zero_point", check_tensor("zero_point", zero_point, NUMBER), like)
    schema.expect_zero_point(dtype_name(zero_point.dtype))
    zero_point = constant(zero_point)
    return zero_point.float() if zero_point.is_floating_point() else _int32(zero_point)


def _int32(zero_point: torch.Tensor) -> torch.Tensor:
    """An integer zero point as int32; what is beyond saturates."""
    if zero_point.dtype == torch.int64:
        zero_point = zero_point.clamp(-(2**31), 2**31 - 1)
    return zero_point.to(torch.int32)


def _beside(name: str, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if t.device != like.device:
        raise ValueError(f"{name} is on {t.device}; the data is on {like.device}, allowed: the same device")
    return t


def given(kind: Kind) -> Given | None:
    """Return a kind as the plans of documented functions know it."""
    return None if isinstance(kind, bool) else Given(tuple(kind[0]), kind[1].is_floating_point)


def arrange(t: torch.Tensor | None, layout: Layout | None) -> torch.Tensor | None:
    """Return a scale or zero point in the core's layout."""
    if t is None or layout is None:
        return None
    if layout.is_normal:
        return shaped(t, layout.normal)
    t = t.reshape(layout.shape)
    if layout.swap is not None:
        t = t.swapaxes(*layout.swap)
    return t.expand(layout.normal)


def one(like: torch.Tensor) -> torch.Tensor:
    """Return the scale 1."""
    return torch.ones((), dtype=torch.float32, device=like.device)


def converted(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a gradient in another dtype, by the core."""
    return t if t.dtype == dtype else _Converted.record(t, dtype)


def summed(grad: torch.Tensor, distributed: bool) -> torch.Tensor:
    """Return a gradient of a parameter that is a DTensor or not: a plain one's is the whole of a DTensor's gradient."""
    return grad if distributed or not is_distributed(grad) else grad.full_tensor()  # type: ignore[attr-defined]


def _public(t: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """A scale or zero point in the shape that users see: 0-d per tensor, else the normal form that it has."""
    return t.reshape(()) if t.dim() and spec.granularity == PerTensor() else t


# ---- functions -------------------------------------------------------------------------------------------------------


def quantize(
    x: torch.Tensor,
    spec: SpecLike,
    *,
    scale: torch.Tensor | float | None = None,
    zero_point: torch.Tensor | int | None = None,
    axis: int | None = None,
    group_size: int | None = None,
    packed: bool | None = None,
    seed: torch.Tensor | int | None = None,
) -> QTensor:
    """Quantize ``x``: codes ``R(x / scale) + zero_point``, clamped to the format's range.

    The quotient is a float32 division whatever ``x.dtype``; float64 is rounded to float32 first. NaN becomes the
    format's NaN, or the code of zero where it has none; infinities saturate. Not differentiable
    (``fake_quantize`` is): the result is a constant to gradients and tangents, as that of ``detach()``.

    Args:
        x: any shape; float32, float16, bfloat16 or float64.
        spec: a preset's name, a torch dtype or a QuantSpec.
        scale: per tensor one element of any shape; else x's rank with one entry per group (1 where shared), or 1-D per
            channel. None: dynamic, from the extremes of each group (NaN where a group holds NaN or inf). float32,
            float16 or bfloat16 for float32 scales; float8_e8m0fnu for e8m0 ones, int8 exponents for ``exponent``; for
            e4m3 the one scale of the whole tensor, whose blocks' scales stay dynamic; microexponents take none.
        zero_point: integers shaped like ``scale``; for integer formats with a given scale. None: 0.
        axis: makes a per-tensor spec per channel; for a spec with groups, the axis they run along.
        group_size: makes a per-tensor spec per group along ``axis`` (default -1); for a spec with groups, their size.
        packed: whether codes narrower than a byte share bytes, low bits first; for 8-bit codes with a shared exponent
            (bfp16), whether a block is its exponent's byte and then its codes. None: for fp4 only.
        seed: an integer of 64 bits, or a tensor of one: with ``rounding="stochastic"``, and only then. Random word i of
            Philox4x32-10 (Salmon et al., SC'11) decides for element i, whatever the device and the framework.

    Returns:
        A QTensor. Its scale is 0-d per tensor, else has x's rank.

    Raises:
        TypeError: a wrong kind of tensor or dtype.
        ValueError: a wrong name, shape, axis, size or combination.

    Examples:
        >>> x = torch.tensor([[0.1, -0.5, 1.0, 0.26]])
        >>> q = quark_torch.quantize(x, "int8", axis=0)
        >>> q.qvalue
        tensor([[ 13, -64, 127,  33]], dtype=torch.int8)
        >>> q.scale
        tensor([[0.0079]])
        >>> quark_torch.quantize(x, "fp4", scale=0.25, packed=False).dequantize()
        tensor([[ 0.1250, -0.5000,  1.0000,  0.2500]])

    """
    x = check_data("x", x)
    (whole, op_spec, packed, _), params = _qparams(spec, x, axis, group_size, packed, scale, zero_point, seed)
    if params.scale is None:
        q, *outs = call("quantize_dynamic", [constant(x), params.key], op_spec)
        params = schema.qparams("quantize_dynamic", op_spec, outs)
    else:
        if schema.is_interleaved(whole, packed):
            params = params._replace(scale=_exponent_code(params.scale))
        q = call("quantize", [constant(x), *params], op_spec)
        params = params._replace(scale=params.scale.detach())  # not the user's own
    return _qtensor(q, params, whole, x, packed)


def _qtensor(q: torch.Tensor, params: QParams, spec: QuantSpec, x: torch.Tensor, packed: bool) -> QTensor:
    """Codes and scales as users see them."""
    zero = None if params.zero_point is None else _public(params.zero_point, spec)
    scale: Any = _public(params.scale, spec)
    if schema.is_interleaved(spec, packed):
        q, scale = _interleave(q, scale, schema.group_size(spec)), None
    return QTensor(q, scale, zero, params.global_scale, params.pair_bits, spec, tuple(x.shape), x.dtype, packed)


def _exponent_code(exponent: torch.Tensor) -> torch.Tensor:
    """int8 exponents as E8M0 codes: 127 more, modulo 256."""
    return (exponent.view(torch.uint8) + 127).view(torch.float8_e8m0fnu)


def _interleave(q: torch.Tensor, scale: torch.Tensor, size: int) -> torch.Tensor:
    """Blocks of bytes: the exponent's code, then the codes; the last block of a row is filled with zeros."""
    blocks = scale.shape[-1]
    codes = torch.nn.functional.pad(q.view(torch.uint8), (0, blocks * size - q.shape[-1]))
    codes = codes.reshape(*q.shape[:-1], blocks, size)
    return torch.cat([scale.view(torch.uint8).unsqueeze(-1), codes], -1).flatten(-2)


def _take_apart(q: torch.Tensor, size: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes and the exponents' codes of packed blocks."""
    blocks = q.reshape(*q.shape[:-1], -(-length // size), size + 1)
    codes = blocks[..., 1:].flatten(-2)[..., :length].view(torch.int8)
    return codes, blocks[..., 0].contiguous().view(torch.float8_e8m0fnu)


def dequantize(q: QTensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return the numbers that a QTensor stands for: ``(q - zero_point) * scale`` in float32, then ``dtype``.

    Values beyond the dtype's largest finite one saturate; NaN scales give NaN. Differentiable to ``q.scale`` where that
    is float32.

    Args:
        q: a QTensor of torch tensors.
        dtype: float32, float16, bfloat16 or float64; None: that of the original tensor.

    Returns:
        A tensor of ``q.shape``.

    Raises:
        TypeError: not a QTensor, or another dtype.
        ValueError: the parts of ``q`` don't fit together.

    Examples:
        >>> q = quark_torch.quantize(torch.tensor([0.1, -0.5, 1.0]), "fp8_e4m3", scale=1.0)
        >>> quark_torch.dequantize(q)
        tensor([ 0.1016, -0.5000,  1.0000])

    """
    if not isinstance(q, QTensor):
        raise TypeError(f"q is a {type(q).__module__}.{type(q).__name__}; allowed: a quark_torch.QTensor")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype is {dtype!r}; allowed: a torch.dtype or None")
    parts = q.qvalue, q.scale, q.zero_point, q.global_scale, q.pair_bits
    for part, t in zip(q.ARRAYS, parts, strict=True):
        if t is not None and check_tensor(f"q.{part}", t).device != check_tensor("q.qvalue", q.qvalue).device:
            raise ValueError(f"q.{part} is on {t.device}; q.qvalue is on {q.qvalue.device}")
    kinds = map(kind, parts)
    plan = planned(_dequantize_plan, q.spec, q.shape, q.packed, dtype or q.dtype, *kinds)
    whole, op_spec, packed, shape = plan
    codes, scale, zero, whole_scale, pair_bits = parts
    if schema.is_interleaved(whole, packed):
        codes, scale = _take_apart(codes, schema.group_size(whole), q.shape[-1])
    scale, zero = shaped(scale, shape), None if zero is None else shaped(zero, shape)
    if whole.scale_format == "float32" and is_recorded(scale):
        return _Dequantize.record(codes, scale, zero, op_spec)
    whole_scale = None if whole_scale is None else constant(whole_scale)
    return call("dequantize", [codes, constant(scale), whole_scale, pair_bits, None, zero], op_spec)  # type: ignore[no-any-return]


def _dequantize_plan(spec: QuantSpec, shape: Shape, packed: bool, dtype: torch.dtype, *kinds: Kind) -> CallPlan:
    name, size = dtype_name(dtype), tuple(shape)
    schema.expect_float("dtype", name)
    whole, op_spec = schema.plan(spec, size, packed=packed, dtype=name)
    parts = {part: _part(kind) or None for part, kind in zip(QTensor.ARRAYS, kinds, strict=True)}
    schema.check_parts(whole, op_spec, size, packed, parts)  # type: ignore[arg-type]  # True isn't among them
    return CallPlan(whole, op_spec, packed, op_spec.scale_shape(size))


def fake_quantize(
    x: torch.Tensor,
    spec: SpecLike,
    *,
    scale: torch.Tensor | float | None = None,
    zero_point: torch.Tensor | int | None = None,
    axis: int | None = None,
    group_size: int | None = None,
    gradient: str = "clipped",
    seed: torch.Tensor | int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
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
        out: where to write, of x's shape, dtype and device: x itself, or a tensor whose memory range is apart from x's.
            No gradient.

    Returns:
        A tensor of x's shape and dtype (``out`` where given).

    Raises:
        TypeError: a wrong kind of tensor or dtype.
        ValueError: a wrong name, shape, axis, size or combination.

    Examples:
        >>> x = torch.tensor([0.1, -0.5, 1.0, 9.0])
        >>> quark_torch.fake_quantize(x, "int4", scale=0.25)
        tensor([ 0.0000, -0.5000,  1.0000,  1.7500])

    """
    if zero_point is None and seed is None and out is None:
        y = run_plain(_fake_quantize_run, x, scale, spec, axis, group_size, gradient)
        if y is not None:
            return y
    x = check_data("x", x)
    one_of("gradient", gradient, schema.GRADIENTS)
    (_, op_spec, _, _), params = _qparams(spec, x, axis, group_size, False, scale, zero_point, seed)
    if out is not None:
        return _fake_quantize_out(x, params, op_spec, out)
    if is_recorded(x):
        if params.scale is None and is_transformed():  # what the twin keeps must be an argument
            params = choose(x, op_spec)._replace(key=params.key)
        return _FakeQuantize.record(x, op_spec, gradient, *params)
    if params.scale is None:
        return call("fake_quantize_dynamic", [x, params.key], op_spec)[0]  # type: ignore[no-any-return]
    return call("fake_quantize", [x, *params], op_spec)  # type: ignore[no-any-return]


def _fake_quantize_run(
    shape: torch.Size,
    dtype: torch.dtype,
    scale_shape: torch.Size,
    scale_dtype: torch.dtype,
    spec: SpecLike,
    axis: int | None,
    group_size: int | None,
    gradient: str,
) -> Run | None:
    """What a call on plain tensors comes to; None where the scale isn't as the core takes it."""
    schema.expect_float("x", dtype_name(dtype))
    one_of("gradient", gradient, schema.GRADIENTS)
    plan = _plan(spec, (scale_shape, scale_dtype), False, False, shape, axis, group_size, False)
    is_number = plan.spec.scale_format == "float32"
    if (
        plan.op_spec.has_global_scale
        or scale_shape not in ((), plan.scale_shape)
        or (is_number and scale_dtype != torch.float32)
    ):
        return None
    return bound("fake_quantize", plan.op_spec.text, dtype, shape)


def _fake_quantize_out(x: torch.Tensor, params: QParams, op_spec: OpSpec, out: torch.Tensor) -> torch.Tensor:
    check_tensor("out", out)
    if (out.shape, out.dtype, out.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"out is {dtype_name(out.dtype)} {tuple(out.shape)} on {out.device}; allowed: like x, "
            f"{dtype_name(x.dtype)} {tuple(x.shape)} on {x.device}"
        )
    if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        raise ValueError(
            "out is given and a gradient is recorded; allowed: either, so use torch.no_grad() or leave out= out"
        )
    if params.scale is None:
        params = choose(x, op_spec)._replace(key=params.key)
    try:
        call("fake_quantize", [x, *params], op_spec, out)
    except ValueError as error:
        raise ValueError(f"out can't be written to: {error}; allowed: x itself, or memory apart from x's") from None
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(out)  # for autograd: what is saved of it has changed
    return out


def choose(x: torch.Tensor, spec: OpSpec) -> QParams:
    """Return dynamic scales, and what else the spec has with them, in normal form."""
    x = constant(x)
    whole = call("choose_qparams", [x], planned(OpSpec.global_spec, spec)) if spec.has_global_scale else None
    outs = call("choose_qparams", [x, whole], spec)
    params = schema.qparams("choose_qparams", spec, outs if isinstance(outs, tuple) else (outs,))
    return params._replace(global_scale=whole)


def choose_qparams(
    x: torch.Tensor,
    spec: SpecLike,
    *,
    axis: int | None = None,
    group_size: int | None = None,
    method: str = "absmax",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the scale and zero point that a dynamic ``quantize`` of ``x`` would use.

    Symmetric specs: ``scale = max|x| / quant_max`` (the format's largest value for floats), or a power of two by the
    spec's ``scale_rule``. Asymmetric ones: ``scale = (max(x, 0) - min(x, 0)) / (quant_max - quant_min)`` and the zero
    point that puts 0 on a code. A group of zeros gets scale 1 (the least power of two), one with NaN or inf gets NaN; a
    float32 scale is never 0, subnormal or infinite. Not differentiable: constants, as those of ``detach()``.

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
        exponents, and for e4m3 the whole tensor's float32 scale. And the zero point (int32, same shape; None if
        symmetric).

    Raises:
        TypeError: a wrong kind of tensor or dtype.
        ValueError: a wrong name, axis or size.

    Examples:
        >>> x, spec = torch.tensor([0.0, 0.5, 2.55]), quark_torch.QuantSpec("uint8", symmetric=False)
        >>> scale, zero_point = quark_torch.choose_qparams(x, spec)
        >>> scale
        tensor(0.0100)
        >>> zero_point
        tensor(0, dtype=torch.int32)

    """
    x = check_data("x", x)
    whole, op_spec = planned(_choose_plan, spec, x.shape, axis, group_size, method)
    if op_spec.has_global_scale:
        return call("choose_qparams", [constant(x)], planned(OpSpec.global_spec, op_spec)).reshape(()), None
    params = choose(x, op_spec)
    zero = params.zero_point
    return _public(params.scale, whole), None if zero is None else _public(zero, whole)


def _choose_plan(
    spec: SpecLike, shape: torch.Size, axis: int | None, group_size: int | None, method: str
) -> tuple[QuantSpec, OpSpec]:
    whole, op_spec = schema.plan(resolve_spec(spec), tuple(shape), axis, group_size)
    return whole, op_spec.choosing(schema.expect_method(whole, method))


def lsq_quantize(
    x: torch.Tensor,
    scale: torch.Tensor | float,
    zero_point: torch.Tensor | int | None = None,
    *,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    grad_factor: float | None = None,
    rounding: str = "half_even",
) -> torch.Tensor:
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
        axis: the channels' axis; None: one scale for the whole tensor.
        grad_factor: what the scale's gradient is multiplied by; None: ``1 / sqrt(n * quant_max)``, n elements a scale.
        rounding: ``half_even``, ``half_up``, ``half_away``, ``floor``, ``ceil`` or ``toward_zero``.

    Returns:
        A tensor of x's shape and dtype. First-order gradients only.

    Raises:
        TypeError: a wrong kind of tensor or dtype.
        ValueError: a wrong name, shape, axis, range or combination.

    Examples:
        >>> quark_torch.lsq_quantize(torch.tensor([0.12, -0.5, 1.0]), torch.tensor(0.1), quant_min=-8, quant_max=7)
        tensor([ 0.1000, -0.5000,  0.7000])

    """
    x = check_data("x", x)
    one_of("rounding", rounding, FIXED_ROUNDINGS)
    s, z = scale_tensor("scale", scale, x), zero_point_tensor(zero_point, x)
    plan = learn_plan(documented.everyday_lsq_plan, x, s, z, quant_min, quant_max, axis, rounding)
    number = _lsq_factor(x, s, quant_max) if grad_factor is None else number_tensor("grad_factor", grad_factor, x)
    return _learned("lsq", x, scale, s, number, z, plan)


def learn_plan(plan: Any, x: torch.Tensor, parameter: torch.Tensor, zero_point: torch.Tensor | None, *how: Any) -> Any:
    """Return the plan of a function whose parameter learns, made once."""
    return planned(_learn_plan, plan, x.shape, kind(parameter), kind(zero_point), *how)


def _learn_plan(plan: Any, shape: torch.Size, parameter: Kind, zero_point: Kind, *how: Any) -> Any:
    return plan(tuple(shape), given(parameter), given(zero_point), *how)


def _lsq_factor(x: torch.Tensor, scale: torch.Tensor, quant_max: int) -> torch.Tensor:
    """``documented.grad_factor``, also of sizes that a compiled graph leaves open."""
    if not torch.compiler.is_compiling():
        return _float32("grad_factor", documented.grad_factor(x.numel(), scale.numel(), quant_max), x)
    # In tensors, step by step: a symbolic expression would be simplified, and its last bit differ.
    n = torch.full((), x.numel() // max(scale.numel(), 1), dtype=torch.int64, device=x.device).clamp(min=1)
    return (n * quant_max).double().sqrt().reciprocal().float()


def tqt_quantize(
    x: torch.Tensor,
    log_threshold: torch.Tensor | float,
    *,
    bits: int = 8,
    zero_point: torch.Tensor | int | None = None,
    rounding: str = "half_even",
) -> torch.Tensor:
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
        A tensor of x's shape and dtype. First-order gradients only.

    Raises:
        TypeError: a wrong kind of tensor or dtype.
        ValueError: a wrong name, shape or width.

    Examples:
        >>> quark_torch.tqt_quantize(torch.tensor([0.12, -0.5, 1.5]), torch.tensor(0.0), bits=4)
        tensor([ 0.1250, -0.5000,  0.8750])

    """
    x = check_data("x", x)
    one_of("rounding", rounding, FIXED_ROUNDINGS)
    t, z = scale_tensor("log_threshold", log_threshold, x), zero_point_tensor(zero_point, x)
    plan, domain = learn_plan(documented.everyday_tqt_plan, x, t, z, bits, rounding)
    number = number_tensor("domain", domain, x)
    return _learned("tqt", x, log_threshold, t, number, z, plan)


def pack(codes: torch.Tensor, bits: int, axis: int = -1) -> torch.Tensor:
    """Pack codes into a bit stream along an axis: code i is bits ``bits * i`` and up, low bits first.

    Args:
        codes: int8 or uint8, at least 1-D; only the low ``bits`` of a code are kept.
        bits: 1 to 8.
        axis: which axis shrinks to ``ceil(length * bits / 8)`` bytes; the last byte is filled with zero bits.

    Returns:
        A uint8 tensor.

    Raises:
        TypeError: another dtype.
        ValueError: bits or axis out of range.

    Examples:
        >>> quark_torch.pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4)
        tensor([33,  3], dtype=torch.uint8)

    """
    codes = _check_bytes("codes", codes)
    axis = schema.normal_axis(axis, codes.dim(), "codes")
    moved = codes.movedim(axis, -1)
    return call("pack", [moved], schema.codes_spec(bits)).movedim(-1, axis)  # type: ignore[no-any-return]


def unpack(packed: torch.Tensor, bits: int, axis: int = -1, *, signed: bool) -> torch.Tensor:
    """Unpack what ``pack`` made: one code a byte.

    Args:
        packed: uint8, at least 1-D.
        bits: 1 to 8.
        axis: the packed axis; it grows to ``length * 8 // bits`` codes, of which a filled last byte may add some zeros.
        signed: whether codes are two's complement (int8 results), or not (uint8).

    Returns:
        An int8 or uint8 tensor.

    Raises:
        TypeError: another dtype.
        ValueError: bits or axis out of range.

    Examples:
        >>> quark_torch.unpack(torch.tensor([33, 3], dtype=torch.uint8), 4, signed=False)
        tensor([1, 2, 3, 0], dtype=torch.uint8)

    """
    packed = _check_bytes("packed", packed)
    axis = schema.normal_axis(axis, packed.dim(), "packed")
    moved = packed.movedim(axis, -1).view(torch.uint8)
    spec = schema.unpack_spec(bits, signed=signed, packed_length=moved.shape[-1])
    return call("unpack", [moved], spec).movedim(-1, axis)  # type: ignore[no-any-return]


def _check_bytes(name: str, x: object) -> torch.Tensor:
    x = check_tensor(name, x)
    if x.dtype not in (torch.int8, torch.uint8):
        raise TypeError(f"{name} has dtype {dtype_name(x.dtype)}; allowed: int8, uint8")
    return x


# ---- gradients -------------------------------------------------------------------------------------------------------


class _Converted(Recorded):
    """A gradient in another dtype: linear, so its own gradient is converted back."""

    of = "the conversion of a gradient"

    @staticmethod
    def keep(ctx: Any, t: torch.Tensor, dtype: torch.dtype) -> None:
        ctx.dtype = t.dtype

    @staticmethod
    def forward(ctx: Any, t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        _Converted.keep(ctx, t, dtype)
        op, spec = documented.conversion(dtype_name(t.dtype), dtype_name(dtype), tuple(t.shape))
        return call(op, [t] if op == "convert" else [t, one(t), None], spec)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return converted(grad, ctx.dtype), None


class _FakeQuantize(Recorded):
    of = "fake_quantize"

    @staticmethod
    def keep(ctx: Any, x: torch.Tensor, spec: OpSpec, gradient: str, *params: Any) -> None:
        ctx.spec, ctx.gradient = spec, gradient
        if gradient == "clipped":
            ctx.save_for_backward(x, *params)

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, spec: OpSpec, gradient: str, *given: Any) -> torch.Tensor:
        params = QParams(*given)
        if params.scale is None:
            y, *outs = call("fake_quantize_dynamic", [x, params.key], spec)
            params = schema.qparams("fake_quantize_dynamic", spec, outs)._replace(key=params.key)
        else:
            y = call("fake_quantize", [x, *params], spec)
        _FakeQuantize.keep(ctx, x, spec, gradient, *params)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        if ctx.gradient == "clipped":
            x, *params = ctx.saved_tensors
            grad = _Clip.record(grad, ctx.spec, x.detach(), *params)
        return grad, *[None] * (2 + len(QParams._fields))


class _Clip(Recorded):
    """The clipped gradient: linear in ``grad``, so its own gradient is clipped alike; x only says where."""

    of = "the gradient of fake_quantize"

    @staticmethod
    def keep(ctx: Any, grad: torch.Tensor, spec: OpSpec, x: torch.Tensor, *params: Any) -> None:
        ctx.spec = spec
        ctx.save_for_backward(x, *params)

    @staticmethod
    def forward(ctx: Any, grad: torch.Tensor, spec: OpSpec, x: torch.Tensor, *params: Any) -> torch.Tensor:
        _Clip.keep(ctx, grad, spec, x, *params)
        return call("fake_quantize_backward", [x, grad, *params], spec)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        grad = _Clip.record(grad, ctx.spec, *ctx.saved_tensors)
        return grad, *[None] * (2 + len(QParams._fields))


class _Dequantize(Recorded):
    of = "dequantize"

    @staticmethod
    def keep(ctx: Any, q: torch.Tensor, scale: torch.Tensor, zero_point: Any, spec: OpSpec) -> None:
        ctx.spec, ctx.distributed = spec, is_distributed(scale)
        ctx.save_for_backward(q, zero_point)

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, scale: torch.Tensor, zero_point: Any, spec: OpSpec) -> torch.Tensor:
        _Dequantize.keep(ctx, q, scale, zero_point, spec)
        return call("dequantize", [q, scale, zero_point], spec)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        found = _DequantizeBackward.record(grad, *ctx.saved_tensors, ctx.spec)
        return None, summed(found, ctx.distributed), None, None


class _DequantizeBackward(Recorded):
    """The gradient to the scale: linear in ``grad``, and the transpose of dequantize, which is linear in the scale."""

    of = "the gradient of dequantize"

    @staticmethod
    def keep(ctx: Any, grad: torch.Tensor, q: torch.Tensor, zero_point: Any, spec: OpSpec) -> None:
        ctx.spec = spec
        ctx.save_for_backward(q, zero_point)

    @staticmethod
    def forward(ctx: Any, grad: torch.Tensor, q: torch.Tensor, zero_point: Any, spec: OpSpec) -> torch.Tensor:
        _DequantizeBackward.keep(ctx, grad, q, zero_point, spec)
        return call("dequantize_backward", [grad, q, zero_point], spec)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        q, zero_point = ctx.saved_tensors
        return _Dequantize.record(q, grad, zero_point, ctx.spec), None, None, None


def learn_keep(
    ctx: Any,
    x: torch.Tensor,
    parameter: Any,
    value: torch.Tensor,
    number: torch.Tensor,
    zero_point: torch.Tensor | None,
    kind: str,
    backward: OpSpec,
    *rest: Any,
) -> None:
    """Keep what ``learn_backward`` needs. ``value`` and the zero point are in the core's layout."""
    ctx.kind, ctx.spec = kind, backward
    is_tensor = isinstance(parameter, torch.Tensor)
    ctx.parameter = (parameter.shape, parameter.dtype, is_distributed(parameter)) if is_tensor else None
    ctx.save_for_backward(x, value, number, zero_point)


def learn_forward(
    x: torch.Tensor, value: torch.Tensor, number: torch.Tensor, zero_point: torch.Tensor | None, kind: str, spec: OpSpec
) -> torch.Tensor:
    """Compute a fake quantization whose parameter learns: ``kind`` is lsq (a scale) or tqt (a threshold)."""
    if kind == "lsq":
        return call("fake_quantize", [x, value, zero_point], spec)  # type: ignore[no-any-return]
    return call("tqt_quantize", [x, value, number, zero_point], spec)  # type: ignore[no-any-return]


def learn_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute the gradients of x and of the parameter."""
    x, p, number, z = ctx.saved_tensors
    if is_transformed():  # where once_differentiable doesn't see to it
        dx, dp = _LearnedBackward.record(grad, x, p, number, z, ctx.kind, ctx.spec)
    else:
        dx, dp = call(f"{ctx.kind}_backward", [x, grad, p, number, z], ctx.spec)
    if ctx.parameter is None:
        return dx, None
    shape, dtype, distributed = ctx.parameter
    return dx, converted(summed(dp, distributed).reshape(shape), dtype)


class _LearnedBackward(Recorded):
    """The gradients to x and to what is learned, which have none."""

    of = "the gradient of lsq_quantize or tqt_quantize"

    @staticmethod
    def forward(
        ctx: Any,
        grad: torch.Tensor,
        x: torch.Tensor,
        value: torch.Tensor,
        number: torch.Tensor,
        zero_point: torch.Tensor | None,
        kind: str,
        spec: OpSpec,
    ) -> Any:
        return call(f"{kind}_backward", [x, grad, value, number, zero_point], spec)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError("lsq_quantize and tqt_quantize have first-order gradients only: no gradient of these")


def _learned(
    kind: str,
    x: torch.Tensor,
    parameter: Any,
    value: torch.Tensor,
    number: torch.Tensor,
    zero_point: torch.Tensor | None,
    plan: LearnPlan,
) -> torch.Tensor:
    p, z = arrange(value, plan.scale), arrange(zero_point, plan.zero_point)
    return _Learned.record(x, parameter, p, number, z, kind, plan.backward, plan.forward)


class _Learned(Recorded):
    of = "lsq_quantize or tqt_quantize"
    keep = staticmethod(learn_keep)

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        parameter: Any,
        value: torch.Tensor,
        number: torch.Tensor,
        zero_point: torch.Tensor | None,
        kind: str,
        backward: OpSpec,
        forward: OpSpec,
    ) -> torch.Tensor:
        learn_keep(ctx, x, parameter, value, number, zero_point, kind, backward)
        return learn_forward(x, value, number, zero_point, kind, forward)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return *learn_backward(ctx, grad), None, None, None, None, None, None
