"""The everyday functions on torch tensors."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch.autograd import forward_ad

from quark_kernels import schema
from quark_kernels.schema import OpSpec
from quark_kernels.spec import PerTensor, QuantSpec, as_spec, one_of
from quark_torch.ops import call, call_out, dtype_name
from quark_torch.qtensor import QTensor

SpecLike = str | torch.dtype | QuantSpec


# ---- arguments -------------------------------------------------------------------------------------------------------


def _check_tensor(name: str, x: object) -> torch.Tensor:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} is a {type(x).__module__}.{type(x).__name__}; allowed: a torch.Tensor")
    if x.layout != torch.strided:
        raise TypeError(f"{name} has layout {x.layout}; allowed: torch.strided (dense)")
    return x


def _check_data(name: str, x: object) -> torch.Tensor:
    x = _check_tensor(name, x)
    schema.expect_float(name, dtype_name(x.dtype))
    return x


def _spec(spec: object) -> QuantSpec:
    return as_spec(spec, dtype_name(spec) if isinstance(spec, torch.dtype) else None)


def _plan(*arguments: Any, **keywords: Any) -> tuple[QuantSpec, OpSpec]:
    # Dynamo traces through caches, and warns of it.
    return schema.plan(*arguments, **keywords, remember=not torch.compiler.is_compiling())


def _scales(
    spec: QuantSpec, op_spec: OpSpec, x: torch.Tensor, scale: Any, zero_point: Any
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """The given scale and zero point in normal form; None where the scale is dynamic."""
    schema.check_scale_arguments(spec, scale=scale is not None, zero_point=zero_point is not None)
    if scale is None:
        return None
    if isinstance(scale, numbers.Real):
        scale = torch.tensor(float(scale), dtype=torch.float32, device=x.device)
    schema.expect_scale(dtype_name(_check_tensor("scale", scale).dtype))
    if isinstance(zero_point, numbers.Integral):
        zero_point = torch.tensor(schema.int32_zero_point(int(zero_point)), dtype=torch.int32, device=x.device)
    if zero_point is not None:
        schema.expect_integer("zero_point", dtype_name(_check_tensor("zero_point", zero_point).dtype))
    shape = tuple(x.shape)
    for name, t in (("scale", scale), ("zero_point", zero_point)):
        if t is not None and t.device != x.device:
            raise ValueError(f"{name} is on {t.device}; x is on {x.device}, allowed: the same device")
    scale = scale.reshape(schema.scale_argument_shape("scale", tuple(scale.shape), spec, op_spec, shape)).float()
    if zero_point is not None:
        normal = schema.scale_argument_shape("zero_point", tuple(zero_point.shape), spec, op_spec, shape)
        zero_point = zero_point.reshape(normal).to(torch.int32)
    return scale, zero_point


def _part(t: torch.Tensor) -> schema.Part:
    return schema.Part(tuple(t.shape), dtype_name(t.dtype))


def _public(t: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """A scale or zero point in the shape that users see: 0-d per tensor, else the normal form that it has."""
    return t.reshape(()) if spec.granularity == PerTensor() else t


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
) -> QTensor:
    """Quantize ``x``: codes ``R(x / scale) + zero_point``, clamped to the format's range.

    The quotient is a float32 division whatever ``x.dtype``; float64 is rounded to float32 first. NaN becomes the
    format's NaN, or the code of zero where it has none; infinities saturate. Not differentiable (``fake_quantize`` is).

    Args:
        x: any shape; float32, float16, bfloat16 or float64.
        spec: a preset's name, a torch dtype or a QuantSpec.
        scale: per tensor one element of any shape; else x's rank with one entry per group (1 where shared), or 1-D per
            channel. None: dynamic, from the extremes of each group (NaN where a group holds NaN or inf).
        zero_point: integers shaped like ``scale``; for integer formats with a given scale. None: 0.
        axis: makes a per-tensor spec per channel; for a spec with groups, the axis they run along.
        group_size: makes a per-tensor spec per group along ``axis`` (default -1); for a spec with groups, their size.
        packed: whether codes narrower than a byte share bytes, low bits first. None: for fp4 only.

    Returns:
        A QTensor. Its scale is float32: 0-d per tensor, else x's rank.

    Raises:
        TypeError: a wrong kind of tensor or dtype.
        ValueError: a wrong name, shape, axis, size or combination.

    """
    x = _check_data("x", x)
    shape = tuple(x.shape)
    whole, op_spec = _plan(_spec(spec), shape, axis, group_size, packed)
    given = _scales(whole, op_spec, x, scale, zero_point)
    if given is None:
        q, s, *z = call("quantize_dynamic", [x.detach()], op_spec)
        zero = z[0] if z else None
    else:
        s, zero = given
        q = call("quantize", [x.detach(), s.detach(), zero], op_spec)
    zero = None if zero is None else _public(zero, whole)
    return QTensor(q, _public(s, whole), zero, None, None, whole, shape, x.dtype, op_spec.packed)


def dequantize(q: QTensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return the numbers that a QTensor stands for: ``(q - zero_point) * scale`` in float32, then ``dtype``.

    Values beyond the dtype's largest finite one saturate; NaN scales give NaN. Differentiable to ``q.scale``.

    Args:
        q: a QTensor of torch tensors.
        dtype: float32, float16, bfloat16 or float64; None: that of the original tensor.

    Returns:
        A tensor of ``q.shape``.

    Raises:
        TypeError: not a QTensor, or another dtype.
        ValueError: the parts of ``q`` don't fit together.

    """
    if not isinstance(q, QTensor):
        raise TypeError(f"q is a {type(q).__module__}.{type(q).__name__}; allowed: a quark_torch.QTensor")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype is {dtype!r}; allowed: a torch.dtype or None")
    name = dtype_name(q.dtype if dtype is None else dtype)
    schema.expect_float("dtype", name)
    whole, op_spec = _plan(q.spec, tuple(q.shape), packed=q.packed, dtype=name)
    for part in ("qvalue", "scale", *([] if q.zero_point is None else ["zero_point"])):
        if _check_tensor(f"q.{part}", getattr(q, part)).device != q.qvalue.device:
            raise ValueError(f"q.{part} is on {getattr(q, part).device}; q.qvalue is on {q.qvalue.device}")
    zero_part = None if q.zero_point is None else _part(q.zero_point)
    normal = schema.check_parts(whole, op_spec, tuple(q.shape), _part(q.qvalue), _part(q.scale), zero_part)
    scale, zero = q.scale.reshape(normal), None if q.zero_point is None else q.zero_point.reshape(normal)
    if _needs_function(scale):
        return _Dequantize.apply(q.qvalue, scale, zero, op_spec)  # type: ignore[no-any-return,no-untyped-call]
    return call("dequantize", [q.qvalue, scale, zero], op_spec)  # type: ignore[no-any-return]


def fake_quantize(
    x: torch.Tensor,
    spec: SpecLike,
    *,
    scale: torch.Tensor | float | None = None,
    zero_point: torch.Tensor | int | None = None,
    axis: int | None = None,
    group_size: int | None = None,
    gradient: str = "clipped",
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
        out: where to write, of x's shape, dtype and device: x itself, or a tensor whose memory range is apart from x's.
            No gradient.

    Returns:
        A tensor of x's shape and dtype (``out`` where given).

    Raises:
        TypeError: a wrong kind of tensor or dtype.
        ValueError: a wrong name, shape, axis, size or combination.

    """
    x = _check_data("x", x)
    one_of("gradient", gradient, schema.GRADIENTS)
    whole, op_spec = _plan(_spec(spec), tuple(x.shape), axis, group_size)
    given = _scales(whole, op_spec, x, scale, zero_point)
    if out is not None:
        return _fake_quantize_out(x, given, op_spec, out)
    s, zero = given if given is not None else (None, None)
    if _needs_function(x):
        return _FakeQuantize.apply(x, s, zero, op_spec, gradient)  # type: ignore[no-any-return,no-untyped-call]
    if s is None:
        return call("fake_quantize_dynamic", [x], op_spec)[0]  # type: ignore[no-any-return]
    return call("fake_quantize", [x, s.detach(), zero], op_spec)  # type: ignore[no-any-return]


def _fake_quantize_out(x: torch.Tensor, given: Any, op_spec: OpSpec, out: torch.Tensor) -> torch.Tensor:
    _check_tensor("out", out)
    if (out.shape, out.dtype, out.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"out is {dtype_name(out.dtype)} {tuple(out.shape)} on {out.device}; allowed: like x, "
            f"{dtype_name(x.dtype)} {tuple(x.shape)} on {x.device}"
        )
    if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        raise ValueError(
            "out is given and a gradient is recorded; allowed: either, so use torch.no_grad() or leave out= out"
        )
    if given is None:
        s, *z = _choose(x, op_spec)
        given = (s, z[0] if z else None)
    try:
        return call_out("fake_quantize", [x, given[0].detach(), given[1]], op_spec, out)
    except ValueError as error:
        raise ValueError(f"out can't be written to: {error}; allowed: x itself, or memory apart from x's") from None


def _choose(x: torch.Tensor, op_spec: OpSpec) -> tuple[torch.Tensor, ...]:
    """Dynamic scales, and zero points where the spec is asymmetric, in normal form."""
    outs = call("choose_qparams", [x.detach()], op_spec)
    return outs if isinstance(outs, tuple) else (outs,)


def choose_qparams(
    x: torch.Tensor,
    spec: SpecLike,
    *,
    axis: int | None = None,
    group_size: int | None = None,
    method: str = "absmax",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the scale and zero point that a dynamic ``quantize`` of ``x`` would use.

    Symmetric specs: ``scale = max|x| / quant_max`` (the format's largest value for floats). Asymmetric ones:
    ``scale = (max(x, 0) - min(x, 0)) / (quant_max - quant_min)`` and the zero point that puts 0 on a code. A group of
    zeros gets scale 1, one with NaN or inf gets NaN; a scale is never 0, subnormal or infinite. Not differentiable.

    Args:
        x: any shape; float32, float16, bfloat16 or float64.
        spec: as for ``quantize``.
        axis: as for ``quantize``.
        group_size: as for ``quantize``.
        method: ``"absmax"`` or ``"minmax"``: both take the group's extreme values.

    Returns:
        The scale (float32; 0-d per tensor, else x's rank) and the zero point (int32, same shape; None if symmetric).

    Raises:
        TypeError: a wrong kind of tensor or dtype.
        ValueError: a wrong name, axis or size.

    """
    x = _check_data("x", x)
    one_of("method", method, schema.METHODS)
    shape = tuple(x.shape)
    whole, op_spec = _plan(_spec(spec), shape, axis, group_size)
    s, *z = [_public(t, whole) for t in _choose(x, op_spec)]
    return s, z[0] if z else None


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

    """
    codes = _check_bytes("codes", codes)
    axis = schema.normal_axis(axis, codes.dim(), "codes")
    moved = codes.movedim(axis, -1)
    return call("pack", [moved], schema.codes_spec(bits, length=moved.shape[-1])).movedim(-1, axis)  # type: ignore[no-any-return]


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

    """
    packed = _check_bytes("packed", packed)
    axis = schema.normal_axis(axis, packed.dim(), "packed")
    moved = packed.movedim(axis, -1).view(torch.uint8)
    spec = schema.unpack_spec(bits, signed=signed, packed_length=moved.shape[-1])
    return call("unpack", [moved], spec).movedim(-1, axis)  # type: ignore[no-any-return]


def _check_bytes(name: str, x: object) -> torch.Tensor:
    x = _check_tensor(name, x)
    if x.dtype not in (torch.int8, torch.uint8):
        raise TypeError(f"{name} has dtype {dtype_name(x.dtype)}; allowed: int8, uint8")
    return x


# ---- gradients -------------------------------------------------------------------------------------------------------


def _needs_function(t: torch.Tensor) -> bool:
    """Whether a call must be recorded. In forward mode too: a bare operator would drop the tangent without a word."""
    return (torch.is_grad_enabled() and t.requires_grad) or forward_ad._current_level >= 0


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: Any, zero_point: Any, spec: OpSpec, gradient: str) -> torch.Tensor:
        if scale is None:
            y, scale, *zero = call("fake_quantize_dynamic", [x], spec)
            zero_point = zero[0] if zero else None
        else:
            y = call("fake_quantize", [x, scale, zero_point], spec)
        ctx.spec, ctx.gradient = spec, gradient
        if gradient == "clipped":
            ctx.save_for_backward(x, scale, zero_point)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        if ctx.gradient == "clipped":
            x, scale, zero_point = ctx.saved_tensors
            grad = _Clip.apply(grad, x.detach(), scale, zero_point, ctx.spec)  # type: ignore[no-untyped-call]
        return grad, None, None, None, None


class _Clip(torch.autograd.Function):
    """The clipped gradient: linear in ``grad``, so its own gradient is clipped alike; x only says where."""

    @staticmethod
    def forward(ctx: Any, grad: torch.Tensor, x: Any, scale: Any, zero_point: Any, spec: OpSpec) -> torch.Tensor:
        ctx.spec = spec
        ctx.save_for_backward(x, scale, zero_point)
        return call("fake_quantize_backward", [x, grad, scale, zero_point], spec)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _Clip.apply(grad, *ctx.saved_tensors, ctx.spec), None, None, None, None  # type: ignore[no-untyped-call]


class _Dequantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, scale: torch.Tensor, zero_point: Any, spec: OpSpec) -> torch.Tensor:
        ctx.spec = spec
        ctx.save_for_backward(q, zero_point)
        return call("dequantize", [q, scale, zero_point], spec)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return None, _DequantizeBackward.apply(grad, *ctx.saved_tensors, ctx.spec), None, None  # type: ignore[no-untyped-call]


class _DequantizeBackward(torch.autograd.Function):
    """The gradient to the scale: linear in ``grad``, and the transpose of dequantize, which is linear in the scale."""

    @staticmethod
    def forward(ctx: Any, grad: torch.Tensor, q: torch.Tensor, zero_point: Any, spec: OpSpec) -> torch.Tensor:
        ctx.spec = spec
        ctx.save_for_backward(q, zero_point)
        return call("dequantize_backward", [grad, q, zero_point], spec)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        q, zero_point = ctx.saved_tensors
        return _Dequantize.apply(q, grad, zero_point, ctx.spec), None, None, None  # type: ignore[no-untyped-call]
