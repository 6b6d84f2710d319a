"""Export models with ``fake_quantize`` to ONNX: QuantizeLinear and DequantizeLinear, which give the same values.

    import quark_torch.onnx
    from quark_torch.nn import FakeQuantize, MinMaxObserver

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(64, 32)
            self.round = FakeQuantize("int8", MinMaxObserver(), axis=0)

        def forward(self, x):
            return torch.nn.functional.linear(x, self.round(self.linear.weight), self.linear.bias)

    model = Net()
    model(x)  # in training mode: the observer sees the weight
    quark_torch.onnx.export(model.eval(), (x,), "net.onnx", dynamic_shapes={"x": {0: "batch"}})

``export`` is ``torch.onnx.export`` with ``translation_table()`` and operator set 21, the first that has 4 and 16 bits,
and groups. It needs the packages onnx and onnxscript.

| what | in ONNX |
| --- | --- |
| ``fake_quantize`` with a given scale, ``lsq_quantize``, ``FakeQuantize`` with an observer, ``LSQFakeQuantize`` | \
QuantizeLinear, DequantizeLinear |
| ``tqt_quantize``, ``TQTFakeQuantize`` | likewise; the scale is looked up in a table of powers of two |
| ``dequantize`` of codes that aren't packed, ``QuantizedLinear`` | DequantizeLinear |
| everything else: dynamic scales, codes, packed bytes, gradients | an error that says what to do instead |

Formats: the integers and fp8. Integers of a range that no ONNX type has (int2, int3, -127 to 127) have a wider type and
a Clip. Scales: float32, per tensor, per channel or in groups along one axis. Rounding: ``half_even``. The functions of
``quark_torch.kernel`` multiply by 1 / scale; in ONNX too, before a QuantizeLinear with the scale 1.

What differs, in onnxruntime 1.32 on CPU:

* NaN: QuantizeLinear gives integers a code of its own choice, mostly the lowest; here NaN stays NaN.
* A result too large for float32 is infinite; here it saturates. It takes a scale above 2^112.
* ``quark_torch.kernel``: with scales up to 2^-128, whose reciprocal is infinite, small numbers saturate too.
* A zero point that the integers of the graph can't hold makes its group NaN; here zero points may have 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import Any, NamedTuple, cast

import numpy as np
import torch

try:
    from onnxscript import evaluator, ir
except ImportError as error:
    raise ImportError(
        f"quark_torch.onnx can't be used: {error}; it needs onnx and onnxscript: pip install onnx onnxscript"
    ) from error

from quark_kernels.formats import FORMATS
from quark_kernels.schema import OPS, OpSpec, Shape
from quark_torch.ops import OPERATORS

__all__ = ["OPSET", "export", "translation_table"]

OPSET = 21
"""The least operator set that has what the translations need."""

NARROW = {ir.DataType.INT4: (-8, 7), ir.DataType.UINT4: (0, 15)}
WIDE = {
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT16: (0, 65535),
    ir.DataType.INT16: (-32768, 32767),
}
"""The types that can hold codes of less than their range, in the order in which they are tried."""
FP8 = {
    "fp8_e4m3": ir.DataType.FLOAT8E4M3FN,
    "fp8_e5m2": ir.DataType.FLOAT8E5M2,
    "fp8_e4m3fnuz": ir.DataType.FLOAT8E4M3FNUZ,
    "fp8_e5m2fnuz": ir.DataType.FLOAT8E5M2FNUZ,
}
DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "float64": ir.DataType.DOUBLE,
}
LARGEST = {DTYPES[name]: torch.finfo(getattr(torch, name)).max for name in ("float16", "bfloat16")}
"""The dtypes in which a float32 number may overflow."""
FLOAT_SCALES = "float32 scales (powers of two are some too: scale_format='float32' and scale.float())"
LEAST_POWER, GREATEST_POWER = -126, 127


class _UntranslatableError(ValueError):
    """What ONNX, or this module, has no form for. torch wraps it in errors of its own."""


def _refuse(name: str, text: str, what: str, allowed: str) -> _UntranslatableError:
    return _UntranslatableError(f"{name} with the spec {text!r} can't be exported to ONNX: {what}; allowed: {allowed}")


# ---- what a spec is in ONNX ------------------------------------------------------------------------------------------


class _Codes(NamedTuple):
    """The ONNX type of codes, and their range where it isn't the whole type's."""

    dtype: ir.DataType
    range: tuple[int, int] | None = None


class _Call(NamedTuple):
    """A call of an operator of ours, checked."""

    name: str
    spec: OpSpec
    codes: _Codes
    shape: Any
    """Of the data: lengths, or symbols for those that aren't fixed."""

    def refuse(self, what: str, allowed: str) -> _UntranslatableError:
        return _refuse(self.name, self.spec.text, what, allowed)

    @property
    def block(self) -> Shape:
        assert self.spec.block is not None
        return self.spec.block

    @property
    def group_axis(self) -> int | None:
        """The axis along which elements share a scale that all other axes have to themselves; else None."""
        shared = [axis for axis, size in enumerate(self.block) if size != 1]
        return shared[0] if len(shared) == 1 else None

    def length(self, axis: int) -> int:
        """The length of an axis. Raises where the graph leaves it open."""
        length = self.shape[axis]
        if isinstance(length, int):
            return length
        raise self.refuse(f"axis {axis} of the data, along which groups run, is dynamic", "a fixed length of that axis")

    def places(self) -> tuple[dict[str, int], list[int] | None]:
        """The attributes that say who shares a scale, and the scale's shape (None: as it is)."""
        block = self.block
        channels = [axis for axis, size in enumerate(block) if size == 1]
        if not any(block):
            return {}, []
        if len(channels) == 1 and sum(block) == 1:
            return {"axis": channels[0]}, [-1]
        if len(channels) == len(block):
            return {"axis": len(block) - 1, "block_size": 1}, None
        axis = self.group_axis
        if axis is None:
            raise self.refuse(
                f"who shares a scale is block={','.join(map(str, block))}, tiles of more than one axis",
                "one scale per tensor, per channel, or in groups along one axis",
            )
        size = block[axis]
        if not size or isinstance(self.shape[axis], int):
            length = max(self.length(axis), 1)
            size = min(size, length) if size else length
        return {"axis": axis, "block_size": size}, None


def _codes(name: str, spec: OpSpec) -> _Codes:
    format_name, options = spec.words[0], {key: value for key, _, value in (w.partition("=") for w in spec.words[1:])}
    row = FORMATS.get(format_name)
    if format_name in FP8:
        return _Codes(FP8[format_name])
    if row is None or not row.is_integer:
        integers = [key for key, value in FORMATS.items() if value.is_integer]
        raise _refuse(name, spec.text, f"the format is {format_name}", ", ".join([*integers, *FP8]))
    low, high = int(options.get("min", row.lo)), int(options.get("max", row.hi))
    for dtype, ends in (NARROW | WIDE).items():
        if ends == (low, high):
            return _Codes(dtype)
    for dtype, ends in WIDE.items():
        if ends[0] <= low and high <= ends[1]:
            return _Codes(dtype, (low, high))
    raise _refuse(name, spec.text, f"its codes are {low} to {high}", "ranges within int16's or uint16's")


def _call(name: str, text: str, shape: Any) -> _Call:
    """Check what the spec of a call says, word by word: a word that isn't known here isn't passed over."""
    spec = OpSpec.parse(text)
    codes = _codes(name, spec)
    for word in spec.words[1:]:
        key, _, value = word.partition("=")
        match key:
            case "min" | "max" | "asymmetric" | "reciprocal" | "narrow" | "ieee":
                pass
            case "rounding":
                raise _refuse(name, text, f"the rounding is {value}", "half_even")
            case "scale":
                raise _refuse(
                    name,
                    text,
                    f"the scales' format is {value}",
                    FLOAT_SCALES,
                )
            case "shifted":
                raise _refuse(name, text, "the zero point is floating, so added before rounding", "integers, or None")
            case _:
                raise _refuse(name, text, f"it says {word!r}", "specs without it")
    if spec.packed:
        raise _refuse(name, text, "the codes are packed", "packed=False")
    if spec.batch:
        raise _refuse(name, text, "it is a call for a batch, of torch.vmap", "calls outside torch.vmap")
    return _Call(name, spec, codes, shape)


# ---- nodes -----------------------------------------------------------------------------------------------------------


def _operators() -> Any:
    """The operators of the set that is exported to; each call makes a node."""
    opset = cast(Any, evaluator.default()).opset
    if opset.version < OPSET:
        raise _UntranslatableError(
            f"opset_version is {opset.version}; quantization in ONNX needs {OPSET} or more, allowed: "
            f"torch.onnx.export(..., opset_version={OPSET}), or quark_torch.onnx.export"
        )
    return opset


def _constant(op: Any, value: Any, dtype: Any) -> Any:
    return op.Constant(value=ir.tensor(np.asarray(value, dtype)))


def _spread(op: Any, call: _Call, scale: Any) -> Any:
    """The scale in a shape that broadcasts to the data's."""
    axis = call.group_axis
    if axis is None or call.block[axis] == 0:
        return scale
    which = np.arange(call.length(axis)) // call.block[axis]
    return op.Gather(scale, _constant(op, which, np.int64), axis=axis)


def _qparams(op: Any, call: _Call, scale: Any, zero_point: Any) -> tuple[Any, Any, dict[str, int]]:
    """The scale and zero point as QuantizeLinear takes them."""
    attributes, shape = call.places()
    stored = None if zero_point is None else zero_point.dtype  # nodes that are new have no dtype yet
    if shape is not None:
        sizes = _constant(op, shape, np.int64)
        scale = op.Reshape(scale, sizes)
        zero_point = None if zero_point is None else op.Reshape(zero_point, sizes)
    if zero_point is None:
        return scale, None, attributes
    # A cast would wrap a number round that the type can't hold, without a word: NaN can be seen.
    narrow = op.Cast(zero_point, to=call.codes.dtype)
    fits = op.Equal(op.Cast(narrow, to=stored), zero_point)
    return op.Where(fits, scale, _constant(op, np.nan, np.float32)), narrow, attributes


def _clipped(op: Any, codes: Any, call: _Call) -> Any:
    """Codes within the range of a call."""
    if call.codes.range is None:
        return codes
    if call.codes.dtype.bitwidth == 8:
        dtype = call.codes.dtype.numpy()
        return op.Clip(codes, *(_constant(op, end, dtype) for end in call.codes.range))
    # onnxruntime has no Clip for 16 bits.
    ends = (_constant(op, end, np.int32) for end in call.codes.range)
    return op.Cast(op.Clip(op.Cast(codes, to=ir.DataType.INT32), *ends), to=call.codes.dtype)


def _dequantized(op: Any, call: _Call, codes: Any, qparams: tuple[Any, Any, dict[str, int]], dtype: ir.DataType) -> Any:
    """The numbers that codes stand for."""
    scale, zero_point, attributes = qparams
    y = op.DequantizeLinear(codes, scale, zero_point, **attributes)
    if dtype == ir.DataType.FLOAT:
        return y
    if dtype in LARGEST and "ieee" not in call.spec.words:
        y = op.Clip(y, *(_constant(op, end, np.float32) for end in (-LARGEST[dtype], LARGEST[dtype])))
    return op.Cast(y, to=dtype)


def _fake_quantized(op: Any, call: _Call, x: Any, scale: Any, zero_point: Any) -> Any:
    dtype = x.dtype
    v = x if dtype == ir.DataType.FLOAT else op.Cast(x, to=ir.DataType.FLOAT)
    qparams = quantizing = _qparams(op, call, scale, zero_point)
    is_reciprocal, is_narrow = "reciprocal" in call.spec.words, "narrow" in call.spec.words and dtype in LARGEST
    if is_reciprocal or is_narrow:
        # The quotient has a rounding of its own, so it is made before, and the scale left is 1.
        shared = _spread(op, call, scale)
        if is_reciprocal:  # not Reciprocal, which may be an approximation
            v = op.Mul(v, op.Div(_constant(op, 1, np.float32), shared))
        else:
            v = op.Cast(op.Cast(op.Div(v, shared), to=dtype), to=ir.DataType.FLOAT)
        one, zeros, attributes = _constant(op, 1, np.float32), qparams[1], qparams[2]
        quantizing = (one, None, {}) if zeros is None else (op.Expand(one, op.Shape(zeros)), zeros, attributes)
    divisor, zeros, attributes = quantizing
    kind = {} if zeros is not None else {"output_dtype": call.codes.dtype}
    codes = op.QuantizeLinear(v, divisor, zeros, **attributes, **kind)
    return _dequantized(op, call, _clipped(op, codes, call), qparams, dtype)


# ---- translations ----------------------------------------------------------------------------------------------------


def _fake_quantize(x: Any, scale: Any, zero_point: Any, text: str) -> Any:
    return _fake_quantized(_operators(), _call("fake_quantize", text, x.shape), x, scale, zero_point)


def _tqt_quantize(x: Any, log_threshold: Any, zero_point: Any, text: str) -> Any:
    call, op = _call("tqt_quantize", text, x.shape), _operators()
    domain = [-int(word.removeprefix("min=")) for word in call.spec.words if word.startswith("min=")]
    if not domain:
        raise call.refuse(
            "its range is in a tensor, not in the spec",
            "quark_torch.tqt_quantize or quark_torch.nn.TQTFakeQuantize, which take bits",
        )
    # A table, as no runtime promises that its powers of two are exact.
    table = np.ldexp(1.0, np.arange(LEAST_POWER, GREATEST_POWER + 1)) / domain[0]
    ends = (_constant(op, end, np.float32) for end in (LEAST_POWER, GREATEST_POWER))
    is_nan = op.IsNaN(log_threshold)
    power = op.Clip(op.Ceil(op.Where(is_nan, _constant(op, 0, np.float32), log_threshold)), *ends)
    index = op.Sub(op.Cast(power, to=ir.DataType.INT64), _constant(op, LEAST_POWER, np.int64))
    scale = op.Where(is_nan, log_threshold, op.Gather(_constant(op, table, np.float32), index))
    return _fake_quantized(op, call, x, scale, zero_point)


def _dequantize(q: Any, scale: Any, zero_point: Any, text: str) -> Any:
    call, op = _call("dequantize", text, q.shape), _operators()
    dtype = call.spec.dtype
    assert dtype is not None  # our functions always say it
    # Codes are taken as they are stored: an int8 may hold more than an int4.
    call = call._replace(codes=_Codes(q.dtype))
    qparams = _qparams(op, call, scale, zero_point)
    return _dequantized(op, call, q, qparams, DTYPES[dtype])


def _instead(name: str) -> tuple[str, str]:
    """Why an operator has no translation, and what to do instead."""
    given = "give the scale (quark_torch.choose_qparams, once), or use a module that keeps one: "
    given += "quark_torch.nn.FakeQuantize with an observer, LSQFakeQuantize, TQTFakeQuantize"
    if name.endswith("_dynamic") or name in ("choose_qparams", "extremes"):
        return "its scales are chosen from the data in each call", given
    if name.endswith("_backward") or name == "convert":
        return "it is part of a gradient", "models without backward"
    return f"{name} has no translation", "fake_quantize, lsq_quantize, tqt_quantize, dequantize"


def _refusing(name: str) -> Callable[..., Any]:
    def translation(*arguments: Any) -> Any:
        (text,) = (argument for argument in arguments if isinstance(argument, str))
        spec = OpSpec.parse(text)
        if spec.words[0] in FORMATS:
            _codes(name, spec)  # a format that can't be had is what matters more
        raise _refuse(name, text, *_instead(name))

    return translation


def _with_zero_point(translate: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """The overloads of an operator, by name. torch reads the signatures."""

    def default(x: Any, scale: Any, spec: Any) -> Any:
        return translate(x, scale, None, spec)

    def zero_point(x: Any, scale: Any, zeros: Any, spec: Any) -> Any:
        return translate(x, scale, zeros, spec)

    return {"default": default, "zero_point": zero_point}


def _tqt_overloads() -> dict[str, Callable[..., Any]]:
    """The domain is in the spec too, as the range."""

    def default(x: Any, threshold: Any, domain: Any, spec: Any) -> Any:
        return _tqt_quantize(x, threshold, None, spec)

    def zero_point(x: Any, threshold: Any, domain: Any, zeros: Any, spec: Any) -> Any:
        return _tqt_quantize(x, threshold, zeros, spec)

    return {"default": default, "zero_point": zero_point}


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what ``torch.onnx.export(..., dynamo=True, opset_version=21, custom_translation_table=...)`` takes.

    It has every operator of ``torch.ops.quark_kernels``. Those that ONNX has no form for raise a ValueError, which
    torch wraps: its message has ours in it.

    Returns:
        A new dictionary: torch operator overloads, and functions that make their ONNX nodes.

    """
    translated = {
        "fake_quantize": _with_zero_point(_fake_quantize),
        "dequantize": _with_zero_point(_dequantize),
        "tqt_quantize": _tqt_overloads(),
    }
    table: dict[Callable[..., Any], Callable[..., Any]] = {}
    for name in OPS:
        packet = getattr(OPERATORS, name)
        for overload in packet.overloads():
            table[getattr(packet, overload)] = translated.get(name, {}).get(overload) or _refusing(name)
    return table


def export(
    model: torch.nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...] = (),
    f: str | PathLike[str] | None = None,
    *,
    opset_version: int = OPSET,
    custom_translation_table: dict[Callable[..., Any], Callable[..., Any]] | None = None,
    **kwargs: Any,
) -> torch.onnx.ONNXProgram:
    """Export a model to ONNX: ``torch.onnx.export`` with ``translation_table()``.

    Args:
        model: a module in eval mode, or what ``torch.export.export`` made of one.
        args: an example of the module's arguments.
        f: the file to write; None: none is written.
        opset_version: the operator set, 21 or more.
        custom_translation_table: for other operators, or in the place of ours.
        kwargs: the other arguments of ``torch.onnx.export``, such as ``dynamic_shapes``.

    Returns:
        The program, whose ``save`` and ``model_proto`` give the model.

    Raises:
        ValueError: something that ONNX, or this module, has no form for.

    """
    if kwargs.pop("dynamo", True) is not True:
        raise ValueError("dynamo is not True; allowed: True, as only that exporter takes translations")
    table = translation_table() | (custom_translation_table or {})
    try:
        program = torch.onnx.export(
            model,
            args,
            f,
            dynamo=True,
            opset_version=opset_version,
            custom_translation_table=table,
            **kwargs,
        )
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, _UntranslatableError):
                raise ValueError(str(cause)) from error
            if isinstance(cause, KeyError) and cause.args == (torch.float8_e8m0fnu,):
                raise ValueError(
                    "a tensor of the model can't be exported to ONNX: its dtype is float8_e8m0fnu, which torch.onnx "
                    f"doesn't know; allowed: {FLOAT_SCALES}"
                ) from error
            cause = cause.__cause__
        raise
    assert program is not None
    return program
