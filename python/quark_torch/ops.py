"""The core's operators as torch operators, ``torch.ops.quark_kernels.*``: one template over the operator table.

An operator takes its row's tensors and the spec as a string. Where the row ends in an optional zero point, the overload
``.zero_point`` has it and the default overload doesn't. ``fake_quantize`` also has ``.out`` overloads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.library import Library, register_fake

from quark_kernels import _core
from quark_kernels.schema import OPS, Op, OpSpec, logical_shape, outputs

if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    raise ImportError(f"quark_torch can't be used: torch {torch.__version__} is installed; it needs torch >= 2.10")

NAMESPACE = "quark_kernels"
OPERATORS = torch.ops.quark_kernels

_library = Library(NAMESPACE, "DEF")


def dtype_name(dtype: torch.dtype) -> str:
    """Return NumPy's (or ml_dtypes') name of a torch dtype, which is torch's own."""
    return str(dtype).removeprefix("torch.")


def _allocate(op: Op, tensors: Sequence[torch.Tensor], text: str) -> tuple[torch.Tensor, ...]:
    spec = OpSpec.parse(text)
    shape = logical_shape(op, spec, [tuple(t.shape) for t in tensors])
    first = tensors[0]
    return tuple(
        torch.empty(size, dtype=getattr(torch, name), device=first.device)
        for size, name in outputs(op, spec, shape, dtype_name(first.dtype))
    )


def _result(outs: tuple[torch.Tensor, ...]) -> torch.Tensor | tuple[torch.Tensor, ...]:
    return outs[0] if len(outs) == 1 else outs


def _kernel(op: Op) -> Callable[..., Any]:
    core = getattr(_core, op.name)

    def run(*arguments: Any) -> Any:
        *tensors, text = arguments
        outs = _allocate(op, tensors, text)
        core(tuple(tensors), outs, text, torch.get_num_threads())
        return _result(outs)

    return run


def _fake(op: Op) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        *tensors, text = arguments
        return _result(_allocate(op, tensors, text))

    return run


def _kernel_out(op: Op) -> Callable[..., None]:
    core = getattr(_core, op.name)

    def run(*arguments: Any) -> None:
        *tensors, text, out = arguments
        core(tuple(tensors), (out,), text, torch.get_num_threads())

    return run


def _define(op: Op, *, zero_point: bool, out: bool = False) -> None:
    """Define and implement one overload."""
    ins, outs = op.ins, op.outs
    if not zero_point:
        ins, outs = ins.removesuffix("z"), outs.removesuffix("z")
    overload = "_".join(word for word, present in (("zero_point", zero_point), ("out", out)) if present)
    name = f"{op.name}.{overload}" if overload else op.name
    arguments = ", ".join(f"Tensor {kind}{i}" for i, kind in enumerate(ins))
    if out:
        result, arguments = "()", f"{arguments}, str spec, Tensor(a!) out"
    else:
        result = "Tensor" if len(outs) == 1 else f"({', '.join(['Tensor'] * len(outs))})"
        arguments = f"{arguments}, str spec"
    _library.define(f"{name}({arguments}) -> {result}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, _kernel_out(op) if out else _kernel(op), "CPU")
    register_fake(f"{NAMESPACE}::{name}", (lambda *_: None) if out else _fake(op), lib=_library)


for _op in OPS.values():
    _define(_op, zero_point=False)
    if _op.takes_zero_point or _op.gives_zero_point:
        _define(_op, zero_point=True)
for _with_zero_point in (False, True):
    _define(OPS["fake_quantize"], zero_point=_with_zero_point, out=True)


def call(name: str, tensors: Sequence[torch.Tensor | None], spec: OpSpec) -> Any:
    """Call an operator's overload for these tensors; a zero point that is None is left out."""
    op = OPS[name]
    given = [t for t in tensors if t is not None]
    with_zero_point = spec.is_asymmetric if op.gives_zero_point else len(given) == len(op.ins) and op.takes_zero_point
    packet = getattr(OPERATORS, name)
    return (packet.zero_point if with_zero_point else packet.default)(*given, spec.text)


def call_out(name: str, tensors: Sequence[torch.Tensor | None], spec: OpSpec, out: torch.Tensor) -> torch.Tensor:
    """Call an operator's ``out`` overload and return ``out``."""
    given = [t for t in tensors if t is not None]
    packet = getattr(OPERATORS, name)
    (packet.zero_point_out if len(given) == len(OPS[name].ins) else packet.out)(*given, spec.text, out)
    return out
