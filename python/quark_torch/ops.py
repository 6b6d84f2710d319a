"""The core's operators as torch operators, ``torch.ops.quark_kernels.*``: one template over the operator table.

An operator takes its row's tensors and the spec as a string. What only some calls have (a zero point, a tensor's scale,
pair bits, a random key) is in overloads of these names; the default overload has none of it. ``fake_quantize`` also has
``.out`` overloads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import is_grad_enabled
from torch._C import (
    _are_functorch_transforms_active,
    _is_torch_function_mode_enabled,
    _is_tracing,
    _len_torch_dispatch_stack,
)
from torch._C._autograd import _profiler_enabled
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.library import Library, register_fake, register_vmap

from quark_kernels import _core, rules, schema
from quark_kernels.schema import OPS, OPTIONAL, Op, OpSpec, logical_shape, outputs

R = TypeVar("R")
NAMESPACE = "quark_kernels"
PLAIN = (torch.Tensor, torch.nn.Parameter)
"""The classes of tensors that are no more than that."""
OPERATORS = torch.ops.quark_kernels

OVERLOADS: list[tuple[Op, str, str, bool]] = []
"""Every overload: its operator, the letters of its inputs, its name, and whether it is an ``out`` one."""

_library = Library(NAMESPACE, "DEF")


def dtype_name(dtype: torch.dtype) -> str:
    """Return NumPy's (or ml_dtypes') name of a torch dtype, which is torch's own."""
    return str(dtype).removeprefix("torch.")


def planned(plan: Callable[..., R], *arguments: Any) -> R:
    """Return ``schema.planned``. Dynamo, which traces through caches and warns of it, plans once for a graph anyway."""
    return plan(*arguments) if is_compiling() else schema.planned(plan, *arguments)


def _outputs(op: Op, text: str, dtype: torch.dtype, *shapes: torch.Size) -> list[tuple[schema.Shape, torch.dtype]]:
    """The shape and dtype of every output of a call."""
    spec = OpSpec.parse(text)
    shape = logical_shape(op, spec, [tuple(size) for size in shapes])
    return [(size, getattr(torch, name)) for size, name in outputs(op, spec, shape, dtype_name(dtype))]


Run = Callable[..., Any]
"""What an operator does on tensors of given types, with a given spec: takes the tensors, returns the results."""


@lru_cache(4096)
def bound(name: str, text: str, dtype: torch.dtype, *shapes: torch.Size) -> Run:
    """Return what an operator does on plain tensors whose first has this dtype.

    ``shapes``: of the first one, which has the shape of the data or codes; with a batch, of all.
    """
    core, made = getattr(_core, name), _outputs(OPS[name], text, dtype, *shapes)
    if made[0][0] == shapes[0] and len(made) == 1:
        result = made[0][1]

        def run_like(*tensors: torch.Tensor) -> Any:  # torch has less to parse
            first = tensors[0]
            if result is dtype and first.is_contiguous():
                out = torch.empty_like(first)
            else:
                out = torch.empty_like(first, dtype=result, memory_format=torch.contiguous_format)
            core(tensors, (out,), text, torch.get_num_threads())
            return out

        return run_like

    def run(*tensors: torch.Tensor) -> Any:
        device = tensors[0].device
        outs = tuple([torch.empty(size, dtype=dtype, device=device) for size, dtype in made])
        core(tensors, outs, text, torch.get_num_threads())
        return outs[0] if len(outs) == 1 else outs

    return run


def _kernel(op: Op) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        tensors, text = arguments[:-1], arguments[-1]
        first = tensors[0]
        shapes = [t.shape for t in tensors] if "batch=" in text else [first.shape]
        return bound(op.name, text, first.dtype, *shapes)(*tensors)

    return run


def _fake(op: Op) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        tensors, text = arguments[:-1], arguments[-1]
        made, device = _outputs(op, text, tensors[0].dtype, *[t.shape for t in tensors]), tensors[0].device
        outs = tuple(torch.empty(size, dtype=dtype, device=device) for size, dtype in made)
        return outs[0] if len(outs) == 1 else outs

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
    for device in ("CPU", "CUDA"):  # ROCm's devices are CUDA's to torch
        _library.impl(name, _kernel_out(op) if out else _kernel(op), device)
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


def _find(name: str, count: int, spec: OpSpec, out: bool) -> Any:
    """The overload of a call that is given so many tensors."""
    op = OPS[name]
    letters = [letter for letter in "gkp" if letter in op.ins + op.outs and spec.takes(letter)]
    inputs = sum(1 for letter in op.ins if letter not in OPTIONAL or letter in letters)
    if (spec.is_asymmetric and op.gives_zero_point) or count > inputs:
        letters.append("z")
    return getattr(getattr(OPERATORS, name), _overload("".join(letters), out=out))


def is_plain(*tensors: Any) -> bool:
    """Return whether torch's dispatcher would come to the kernel with these, and have nothing to do on the way.

    Then what is ``bound`` can be called at once: the way takes as long again. Kernels that a user has put in place of
    ours, and observers of the dispatcher other than torch's profiler, don't see such calls.
    """
    if (
        is_compiling()
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _len_torch_dispatch_stack()
        or _is_torch_function_mode_enabled()
        or _profiler_enabled()
        or _is_tracing()
    ):
        return False
    is_recorded = is_grad_enabled()
    on_gpu = 0
    for t in tensors:
        if type(t) not in PLAIN or not (t.is_cpu or t.is_cuda) or t.is_nested or (is_recorded and t.requires_grad):
            return False
        if t.is_neg() or t._is_zerotensor():
            return False
        on_gpu += t.is_cuda
    return on_gpu in (0, len(tensors))


def run_plain(plan: Callable[..., Run | None], x: Any, scale: Any, *how: Any) -> torch.Tensor | None:
    """Return what the core makes of x and its scale; None if they aren't plain or the plan of the call is None."""
    if not is_plain(x, scale):
        return None
    try:
        run = schema.remembered(plan, x.shape, x.dtype, scale.shape, scale.dtype, *how)
        return None if run is None else run(x, scale)
    except (TypeError, RuntimeError):
        return None  # what is wrong, if anything, turns out on the long way


def call(name: str, tensors: Sequence[torch.Tensor | None], spec: OpSpec, *out: torch.Tensor) -> Any:
    """Call an operator's overload for these tensors, which are in the order of its row; None is left out."""
    given = [t for t in tensors if t is not None]
    if not out and is_plain(*given):
        shapes = [t.shape for t in given] if spec.batch else [given[0].shape]
        try:
            return bound(name, spec.text, given[0].dtype, *shapes)(*given)
        except RuntimeError:
            pass  # no memory of its own has what torch.func has wrapped, where it has got out of there
    for t in (*given, *out):
        if is_distributed(t):
            import quark_torch.distributed  # noqa: F401  # which torch alone doesn't import
    return planned(_find, name, len(given), spec, bool(out))(*given, spec.text, *out)
