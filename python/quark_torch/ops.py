"""The core's operators as torch operators, ``torch.ops.quark_kernels.*``: one template over the operator table.

An operator takes its row's tensors and the spec as a string. What only some calls have (a zero point, a tensor's scale,
pair bits, a random key) is in overloads of these names; the default overload has none of it. ``fake_quantize`` also has
``.out`` overloads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.library import Library, register_fake, register_vmap

from quark_kernels import _core, rules
from quark_kernels.schema import OPS, OPTIONAL, Op, OpSpec, logical_shape, outputs

if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    raise ImportError(f"quark_torch can't be used: torch {torch.__version__} is installed; it needs torch >= 2.10")

NAMESPACE = "quark_kernels"
OPERATORS = torch.ops.quark_kernels

OVERLOADS: list[tuple[Op, str, str, bool]] = []
"""Every overload: its operator, the letters of its inputs, its name, and whether it is an ``out`` one."""

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


def _vmap(op: Op, overload: Any, kinds: str, *, out: bool) -> Callable[..., Any]:
    """How an overload meets ``torch.vmap``: as one call for all examples."""

    def run(info: Any, axes: tuple[int | None, ...], *arguments: Any) -> Any:
        tensors, text = arguments[: len(kinds)], arguments[len(kinds)]
        is_batched = [axis is not None for axis in axes[: len(kinds)]]
        spec, lengths = rules.batched(op, OpSpec.parse(text), kinds, is_batched, info.batch_size)
        whole = [_lead(t, axis, n) for t, axis, n in zip(tensors, axes, lengths, strict=False)]
        if not spec.batch and spec.block is not None:  # an example's one scale may have come in any shape
            normal = (1,) * (len(spec.block) - 1)
            scales = [kind in "sz" and t.dim() <= len(normal) for kind, t in zip(kinds, whole, strict=True)]
            whole = [t.reshape(t.shape[0], *normal) if s else t for s, t in zip(scales, whole, strict=True)]
        if out:
            if axes[-1] is None:
                raise ValueError(
                    "out is one tensor for all of vmap's examples; allowed: one that is mapped over, as x is"
                )
            overload(*whole, spec.text, arguments[-1].movedim(axes[-1], 0))
            return None, None
        results = overload(*whole, spec.text)
        return results, (0,) * len(results) if isinstance(results, tuple) else 0

    return run


def _lead(t: torch.Tensor, axis: int | None, length: int | None) -> torch.Tensor:
    """A tensor with the examples' axis in front; of this length, or not at all, where the examples share it."""
    if axis is not None:
        return t.movedim(axis, 0)
    return t if length is None else t.expand(length, *t.shape)


def _overload(letters: str, *, out: bool = False) -> str:
    """The overload of calls that have these of the optional tensors."""
    return "_".join([OPTIONAL[letter] for letter in letters] + ["out"] * out) or "default"


def _variants(op: Op) -> Iterator[str]:
    """The combinations of an operator's optional tensors. Scales have one of three extras, any of them with a key."""
    for extra in ("", "g", "p", "z"):
        for key in ("", "k"):
            letters = "".join(sorted(extra + key))
            if all(letter in op.ins + op.outs for letter in letters):
                yield letters


def _define(op: Op, letters: str, *, out: bool = False) -> None:
    """Define and implement one overload."""
    present = [letter for letter in op.ins if letter not in OPTIONAL or letter in letters]
    results = [letter for letter in op.outs if letter not in OPTIONAL or letter in letters]
    overload = _overload(letters, out=out)
    name = op.name if overload == "default" else f"{op.name}.{overload}"
    arguments = ", ".join(f"Tensor {kind}{i}" for i, kind in enumerate(present))
    if out:
        result, arguments = "()", f"{arguments}, str spec, Tensor(a!) out"
    else:
        result = "Tensor" if len(results) == 1 else f"({', '.join(['Tensor'] * len(results))})"
        arguments = f"{arguments}, str spec"
    _library.define(f"{name}({arguments}) -> {result}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, _kernel_out(op) if out else _kernel(op), "CPU")
    register_fake(f"{NAMESPACE}::{name}", (lambda *_: None) if out else _fake(op), lib=_library)
    rule = _vmap(op, getattr(getattr(OPERATORS, op.name), overload), "".join(present), out=out)
    register_vmap(f"{NAMESPACE}::{name}", rule, lib=_library)
    OVERLOADS.append((op, "".join(present), name, out))


for _op in OPS.values():
    for _letters in _variants(_op):
        _define(_op, _letters)
for _letters in _variants(OPS["fake_quantize"]):
    _define(OPS["fake_quantize"], _letters, out=True)


def is_distributed(t: torch.Tensor) -> bool:
    """Return whether a tensor is a DTensor. By its name: torch alone doesn't import what defines it."""
    return type(t) is not torch.Tensor and type(t).__name__ == "DTensor"


def _find(name: str, given: Sequence[torch.Tensor], spec: OpSpec, *, out: bool = False) -> Any:
    """The overload of a call."""
    for t in given:
        if is_distributed(t):
            import quark_torch.distributed  # noqa: F401  # which torch alone doesn't import
    op = OPS[name]
    letters = [letter for letter in "gkp" if letter in op.ins + op.outs and spec.takes(letter)]
    inputs = sum(1 for letter in op.ins if letter not in OPTIONAL or letter in letters)
    if (spec.is_asymmetric and op.gives_zero_point) or len(given) > inputs:
        letters.append("z")
    return getattr(getattr(OPERATORS, name), _overload("".join(letters), out=out))


def call(name: str, tensors: Sequence[torch.Tensor | None], spec: OpSpec) -> Any:
    """Call an operator's overload for these tensors, which are in the order of its row; None is left out."""
    given = [t for t in tensors if t is not None]
    return _find(name, given, spec)(*given, spec.text)


def call_out(name: str, tensors: Sequence[torch.Tensor | None], spec: OpSpec, out: torch.Tensor) -> torch.Tensor:
    """Call an operator's ``out`` overload and return ``out``."""
    given = [t for t in tensors if t is not None]
    _find(name, given, spec, out=True)(*given, spec.text, out)
    return out
