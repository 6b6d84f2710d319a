"""The operators on ``DTensor``: each rank calls the core on its shard, and the bits are those of the whole tensor.

Importing this module teaches torch the operators; the functions do so when they first meet a DTensor, and only direct
calls of ``torch.ops.quark_kernels`` need the import.

The data stays where it is as far as whole groups (and whole bytes of packed codes) lie on each shard; of what is cut
otherwise the groups are gathered. Dynamic scales of groups that shards cut come from the groups' extremes, which are
combined over the mesh, so that the data itself stays. Scales, zero points and the like go where the data is; plain
tensors of these count as the same on every rank. Gradients of scales come out as partial sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.library import register_torch_dispatch

from quark_kernels import rules
from quark_kernels.rules import DATA, SCALES, MeshAxis, Split
from quark_kernels.schema import OPS, Op, OpSpec, QParams, Shape, logical_shape, made, outputs
from quark_torch.ops import NAMESPACE, OVERLOADS, call, dtype_name

Placements = tuple[Placement, ...]


class _Output(NamedTuple):
    shape: Shape
    dtype: str
    placements: Placements


class _Plan(NamedTuple):
    """What an operator does on shards."""

    spec: OpSpec
    """The spec of a shard's call."""
    shape: Shape
    split: Split
    inputs: tuple[Placements, ...]
    outputs: tuple[_Output, ...]
    is_staged: bool


def _make_plan(
    op: Op,
    text: str,
    kinds: str,
    mesh: DeviceMesh,
    dtype: str,
    shapes: tuple[Shape, ...],
    given: tuple[Placements, ...],
) -> _Plan:
    spec = OpSpec.parse(text)
    shape = logical_shape(op, spec, list(shapes))
    sizes = dict(enumerate(mesh.shape))
    data = [_split_of(p, len(shape)) for kind, p in zip(kinds, given, strict=True) if kind in DATA]
    followed = max(data, key=lambda split: sum(map(len, split)))
    if spec.whole is not None:  # a shard already; its shards would need other keys
        followed = (*followed[: spec.batch], *[()] * (len(shape) - spec.batch))
    split = rules.fit(op, spec, shape, followed, sizes, even=False)
    over = rules.shared_axes(spec, shape, split) if op.combine else ()
    inputs = [
        _placements(rules.split_of(kind, spec, shape, split, size), mesh)
        for kind, size in zip(kinds, shapes, strict=True)
    ]
    outs = [
        _Output(
            size,
            name,
            _placements(
                rules.split_of(kind, spec, shape, split, size), mesh, over if kind in SCALES else (), op.combine
            ),
        )
        for kind, (size, name) in zip(made(op, spec), outputs(op, spec, shape, dtype), strict=True)
    ]
    is_staged = rules.needs_stages(op, spec, shape, split)
    local = rules.shard_spec(spec, shape, split, sizes)
    return _Plan(local, shape, split, tuple(inputs), tuple(outs), is_staged)


_cached_plan = lru_cache(4096)(_make_plan)


def _split_of(placements: Placements, rank: int) -> Split:
    """Which mesh dims cut each axis. What isn't a plain shard isn't followed."""
    found: list[tuple[MeshAxis, ...]] = [() for _ in range(rank)]
    for i, placement in enumerate(placements):
        if type(placement) is Shard and placement.dim < rank:
            found[placement.dim] += (i,)
    return tuple(found)


def _placements(
    split: Split, mesh: DeviceMesh, over: Sequence[MeshAxis] = (), combine: str | None = None
) -> Placements:
    """The placements of a tensor that is split so, and is yet to be combined over some mesh dims."""
    found: list[Placement] = [Replicate() for _ in range(mesh.ndim)]
    for d, axes in enumerate(split):
        for i in axes:
            assert isinstance(i, int)
            found[i] = Shard(d)
    for i in over:
        assert isinstance(i, int)
        assert combine is not None
        found[i] = Partial(combine)
    return tuple(found)


def _strides(shape: Shape) -> Shape:
    """The strides of a contiguous tensor."""
    return tuple(accumulate((max(n, 1) for n in shape[:0:-1]), lambda a, b: a * b, initial=1))[::-1] if shape else ()


def _begins(plan: _Plan, at: Sequence[int], mesh: DeviceMesh) -> list[int]:
    """Where in the whole array a rank's shard begins. DTensor cuts an axis into equal parts and a shorter rest."""
    found = []
    batch = plan.spec.batch
    for n, axes in zip(plan.shape[batch:], plan.split[batch:], strict=True):
        begin = 0
        for i in axes:
            assert isinstance(i, int)
            part = -(-n // mesh.size(i))
            skipped = min(at[i] * part, n)
            begin, n = begin + skipped, min(part, n - skipped)
        found.append(begin)
    return found


def _moved(t: DTensor, placements: Placements) -> torch.Tensor:
    """A rank's part of a tensor where it is placed so."""
    if t.placements == placements:
        return t.to_local()
    if t.dtype.itemsize > 1 or not t.dtype.is_floating_point:
        return t.redistribute(placements=placements).to_local()
    codes = DTensor.from_local(  # collectives know no float8
        t.to_local().view(torch.uint8), t.device_mesh, t.placements, shape=t.shape, stride=t.stride()
    )
    return codes.redistribute(placements=placements).to_local().view(t.dtype)


def _operands(op: Op, kinds: str, tensors: Sequence[torch.Tensor]) -> tuple[list[DTensor], DeviceMesh]:
    meshes = {t.device_mesh for t in tensors if isinstance(t, DTensor)}
    if len(meshes) > 1:
        raise ValueError(f"{op.name} got DTensors on different meshes, {meshes}; allowed: one mesh")
    (mesh,) = meshes
    operands = []
    for kind, t in zip(kinds, tensors, strict=False):
        if not isinstance(t, DTensor):
            if kind in DATA:
                raise TypeError(
                    f"{op.name} got a plain torch.Tensor of shape {tuple(t.shape)} for its data, and DTensors; "
                    "allowed: a DTensor, and plain tensors only for scales, zero points, seeds and numbers"
                )
            t = DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim)
        operands.append(t)
    return operands, mesh


def _run(op: Op, kinds: str, overload: Any, operands: list[DTensor], mesh: DeviceMesh, plan: _Plan) -> list[Any]:
    """A rank's results."""
    shards = [_moved(t, placements) for t, placements in zip(operands, plan.inputs, strict=True)]
    at = mesh.get_coordinate()
    if at is None:  # this rank has nothing to do
        return [
            torch.empty(0 if out.shape else (), dtype=getattr(torch, out.dtype), device=shards[0].device)
            for out in plan.outputs
        ]
    if "k" in kinds and rules.example_axes(plan.spec, plan.split):
        i = kinds.index("k")
        begins = torch.tensor(_begins(plan, at, mesh), dtype=torch.int32, device=shards[i].device)
        shards[i] = torch.cat([shards[i], begins.expand(*shards[i].shape[:-1], -1)], -1)
    if not plan.is_staged:
        return _as_list(overload(*shards, plan.spec.text))

    def extremes(x: torch.Tensor, spec: OpSpec) -> torch.Tensor:
        ends = call("extremes", [x], spec)
        for i in rules.shared_axes(spec, plan.shape, plan.split):
            partial = DTensor.from_local(ends, mesh, _placements((), mesh, [i], OPS["extremes"].combine))
            ends = partial.redistribute(placements=_placements((), mesh)).to_local()
        return ends.view(torch.float32)  # type: ignore[no-any-return]

    named = dict(zip(kinds, shards, strict=True))
    params = QParams(global_scale=named.get("g"), key=named.get("k"))
    return rules.staged(op, plan.spec, params, named["x"], _call, extremes, _broadcast)


def _broadcast(t: torch.Tensor, shape: Shape) -> torch.Tensor:
    return t.expand(shape).contiguous()


def _call(name: str, tensors: Sequence[torch.Tensor | None], spec: OpSpec) -> list[Any]:
    return _as_list(call(name, tensors, spec))


def _as_list(outs: Any) -> list[Any]:
    return list(outs) if isinstance(outs, tuple | list) else [outs]


def _rule(op: Op, kinds: str, *, out: bool) -> Callable[..., Any]:
    """How an overload meets DTensors: as torch asks for it of a class with ``__torch_dispatch__``."""

    @torch.no_grad()
    def run(cls: type, overload: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        count = len(kinds)
        operands, mesh = _operands(op, kinds, [*args[:count], *args[count + 1 :]])
        shapes = tuple(tuple(t.shape) for t in operands)
        placed = tuple(tuple(t.placements) for t in operands)
        is_static = all(type(n) is int for shape in shapes for n in shape)
        plan = (_cached_plan if is_static else _make_plan)(
            op, args[count], kinds, mesh, dtype_name(operands[0].dtype), shapes, placed
        )
        if out:
            return _write(op, kinds, overload, operands, mesh, plan, args[-1])
        outs = [
            DTensor.from_local(shard, mesh, to.placements, shape=torch.Size(to.shape), stride=_strides(to.shape))
            for shard, to in zip(_run(op, kinds, overload, operands, mesh, plan), plan.outputs, strict=True)
        ]
        return outs[0] if len(outs) == 1 else tuple(outs)

    return run


def _write(
    op: Op, kinds: str, overload: Any, operands: list[DTensor], mesh: DeviceMesh, plan: _Plan, out: torch.Tensor
) -> None:
    """Let a rank write its part of ``out``."""
    if not isinstance(out, DTensor):
        raise TypeError(
            "out is a plain torch.Tensor and the data a DTensor; allowed: a DTensor placed as the result is"
        )
    (result,) = plan.outputs
    if tuple(out.placements) != result.placements:
        raise ValueError(f"out is placed {out.placements}; the result is placed {result.placements}, allowed: the same")
    _run(op, kinds, lambda *arguments: overload(*arguments, out.to_local()), operands, mesh, plan)


for _op, _kinds, _name, _out in OVERLOADS:
    register_torch_dispatch(f"{NAMESPACE}::{_name}", DTensor, _rule(_op, _kinds, out=_out))
