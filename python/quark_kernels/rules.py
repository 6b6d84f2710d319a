"""How every operator meets batches and shards: written once, for torch's and JAX's transforms.

All follows from an operator's row (which tensors are shaped like the data, which like its scales) and the spec's
``block``. Tensors are known by their letters (``cpp/ops.inc``). The data's axes include the spec's batch axes, which
come first.

A ``Split`` says for every axis of a tensor which axes of the device mesh cut it, outermost first. Mesh axes are
whatever the framework knows them by.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from math import gcd, lcm, prod
from typing import Any

from quark_kernels import _core
from quark_kernels.schema import PAIR_BYTE, Op, OpSpec, QParams, Shape, logical_shape, made, qparams

MeshAxis = Hashable
Split = tuple[tuple[MeshAxis, ...], ...]

DATA = "xqc"
"""Letters of tensors with an entry for every element."""
SCALES = "szpe"
"""Letters of tensors with an entry for every group."""


# ---- batches ---------------------------------------------------------------------------------------------------------


def batched(op: Op, spec: OpSpec, kinds: str, is_batched: Sequence[bool], size: int) -> tuple[OpSpec, list[int | None]]:
    """Return the spec of one call for a batch of calls, and the length of each input's new leading axis.

    ``kinds`` are the letters of the inputs, ``is_batched`` says which of them have the batch's axis. An input that has
    none must get one of the returned length, 1 or ``size``; None: it stays without. Every output has one.
    """
    if _needs_examples(op, spec, kinds, is_batched):
        return replace(spec, batch=spec.batch + 1), [size if b else 1 for b in is_batched]
    if spec.block is None:
        return spec, [size] * len(kinds)
    own = _has_own_scales(op, spec, kinds, is_batched)
    leading: list[int | None] = [
        size if kind in DATA else (size if own else 1) if kind in SCALES else None for kind in kinds
    ]
    return replace(spec, block=(int(own), *spec.block)), leading


def _has_own_scales(op: Op, spec: OpSpec, kinds: str, is_batched: Sequence[bool]) -> bool:
    """Whether each example has scales of its own: the batch is then a channel axis, else one more shared axis."""
    given_own = any(b and kind in SCALES for kind, b in zip(kinds, is_batched, strict=True))
    return given_own or any(kind in SCALES for kind in made(op, spec)) or spec.has_pairs


def _needs_examples(op: Op, spec: OpSpec, kinds: str, is_batched: Sequence[bool]) -> bool:
    """Whether a batch can't be one call with one more axis: something is there once for an example, not for a group."""
    return (
        spec.batch > 0
        or "k" in kinds
        or "g" in made(op, spec)
        or "scale=global" in spec.words
        or any(b and kind in "gn" for kind, b in zip(kinds, is_batched, strict=True))
        or (spec.packed and spec.block == ())
        or (op.has_one_scale and _has_own_scales(op, spec, kinds, is_batched))
    )


# ---- shards ----------------------------------------------------------------------------------------------------------


def fit(
    op: Op,
    spec: OpSpec,
    shape: Shape,
    split: Split,
    sizes: Mapping[Any, int],
    *,
    even: bool = True,
    same_spec: bool = False,
) -> Split:
    """Return how the data can be split: as asked, but for the mesh axes that would cut what must stay whole.

    Groups with a scale of their own, bytes of packed codes and of pair bits stay whole. Of each axis' mesh axes the
    longest prefix is kept.

    Args:
        op: the operator.
        spec: its spec, for the whole data.
        shape: the logical shape of the data.
        split: how the data is split now.
        sizes: the size of each mesh axis.
        even: whether shards must be of one length.
        same_spec: whether every shard must be called with ``spec`` itself, not with ``shard_spec``.

    """
    fitting = []
    for n, unit, axes in zip(shape, _units(op, spec, shape, same_spec), split, strict=True):
        while axes and not _cuts_into_whole(n, unit, prod(sizes[a] for a in axes), even):
            axes = axes[:-1]
        fitting.append(axes)
    return tuple(fitting)


def _cuts_into_whole(n: int, unit: int | None, parts: int, even: bool) -> bool:
    if unit is None:
        return parts == 1
    return (unit == 1 and not even) or n % (unit * parts) == 0


def _units(op: Op, spec: OpSpec, shape: Shape, same_spec: bool) -> list[int | None]:
    """For every axis of the data how many neighbours must stay together; None: all."""
    example = shape[spec.batch :]
    found: list[int | None]
    if spec.block is None:
        found = [1] * len(example)
    else:
        shared = 1 if _splits_groups(op, spec) else None
        found = [shared if _is_shared(n, b) else b for n, b in zip(example, spec.block, strict=True)]
    for d, unit in enumerate(found):
        if unit is None:
            continue
        if spec.packed and "q" in op.ins + op.outs and d == len(found) - 1:
            has_length = same_spec and spec.length is not None
            found[d] = None if has_length else lcm(unit, 8 // gcd(8, spec.bits))
        if spec.has_pairs and spec.block is not None and spec.block[d] != 1:
            found[d] = lcm(unit, PAIR_BYTE)
    return [1] * spec.batch + found


def _is_shared(length: int, block: int) -> bool:
    """Whether one group takes the whole axis."""
    return block == 0 or block >= length


def _splits_groups(op: Op, spec: OpSpec) -> bool:
    """Whether a group may lie on several shards."""
    if not any(kind in SCALES for kind in op.outs) or op.combine is not None:
        return not spec.has_pairs
    # What isn't a function of the extremes: percentiles, errors, and exponents of the finite elements alone.
    needs_all = any(word.startswith("method=") for word in spec.words) or {"ieee", "scale=exponent"} <= {*spec.words}
    assert spec.block is not None
    return not needs_all and not spec.has_pairs and spec.batch + len(spec.block) < _core.MAX_RANK


def split_of(kind: str, spec: OpSpec, shape: Shape, split: Split, tensor: Shape) -> Split:
    """Return how a tensor of this letter and shape is split where data of ``shape`` is split so."""
    batch = tuple(axes if n != 1 else () for n, axes in zip(tensor, split[: spec.batch], strict=False))
    example = split[spec.batch :]
    if kind in SCALES and kind != "p":
        assert spec.block is not None
        lengths = shape[spec.batch :]
        example = tuple(
            () if _is_shared(n, b) else axes for n, b, axes in zip(lengths, spec.block, example, strict=True)
        )
    elif kind not in DATA + "p":
        example = ()
    whole = batch + example
    if kind in SCALES and len(tensor) < len(whole):  # one scale, of any shape
        return ((),) * len(tensor)
    return whole + ((),) * (len(tensor) - len(whole))


def shared_axes(spec: OpSpec, shape: Shape, split: Split) -> tuple[MeshAxis, ...]:
    """Return the mesh axes that cut groups: over these scale-shaped results are combined."""
    if spec.block is None:
        return ()
    axes = zip(shape[spec.batch :], spec.block, split[spec.batch :], strict=True)
    return tuple(a for n, b, names in axes if _is_shared(n, b) for a in names)


def example_axes(spec: OpSpec, split: Split) -> tuple[MeshAxis, ...]:
    """Return the mesh axes that cut examples: over these an example's own numbers are combined."""
    return tuple(a for names in split[spec.batch :] for a in names)


def shard_spec(spec: OpSpec, shape: Shape, split: Split, sizes: Mapping[Any, int]) -> OpSpec:
    """Return the spec of a shard's call. With random rounding the key then says where the shard begins."""
    if not example_axes(spec, split):
        return spec
    example = shape[spec.batch :]
    block, length = spec.block, spec.length
    if block is not None:  # a short shard, or one of nothing, has its group's scale too
        parts = zip(example, block, split[spec.batch :], strict=True)
        block = tuple(0 if axes and n and _is_shared(n, b) else b for n, b, axes in parts)
    if length is not None:
        length //= prod(sizes[a] for a in split[-1])
    return replace(spec, block=block, length=length, whole=example if spec.takes("k") else None)


def needs_stages(op: Op, spec: OpSpec, shape: Shape, split: Split) -> bool:
    """Whether dynamic scales take a combination over shards, so that ``staged`` must be used."""
    needs_whole = "g" in made(op, spec) or "scale=global" in spec.words
    axes = example_axes(spec, split) if needs_whole else shared_axes(spec, shape, split)
    return op.is_dynamic and bool(axes)


def staged(
    op: Op,
    spec: OpSpec,
    params: QParams,
    x: Any,
    run: Callable[[str, Sequence[Any], OpSpec], Sequence[Any]],
    extremes: Callable[[Any, OpSpec], Any],
    broadcast: Callable[[Any, Shape], Any],
) -> list[Any]:
    """Compute a dynamic operator on shards in steps: the groups' extremes, their maximum over shards, scales, codes.

    Gives the bits of the operator on the whole array.

    Args:
        op: ``choose_qparams``, ``quantize_dynamic`` or ``fake_quantize_dynamic``.
        spec: a shard's; the last step is called with it.
        params: what the call was given: a key, a tensor's scale.
        x: the data.
        run: calls an operator on shards, with an entry for every letter of its row (None: there is none).
        extremes: calls ``extremes`` and combines the result over the mesh axes that cut the spec's groups; returns it
            as float32.
        broadcast: the framework's ``broadcast_to``.

    """
    chooser = spec.choosing()
    if spec.has_global_scale and params.global_scale is None:
        chosen = _chosen(x, chooser.global_spec(), None, run, extremes)
        whole = chosen.scale
        params = params._replace(global_scale=whole.reshape(whole.shape[: spec.batch]))
    found = _chosen(x, chooser, params.global_scale, run, extremes)
    found = found._replace(global_scale=params.global_scale, key=params.key)
    outs: dict[str, Any] = {"s": found.scale, "g": found.global_scale, "p": found.pair_bits, "z": found.zero_point}
    if op.name != "choose_qparams":
        (first,) = run(op.name.removesuffix("_dynamic"), [x, *found], spec)
        outs[op.outs[0]] = first
    # Examples that share their data, but not their keys, have scales each.
    given = [tuple(a.shape) for a in (x, params.global_scale, params.key) if a is not None]
    batch = logical_shape(op, spec, given)[: spec.batch]
    return [broadcast(outs[kind], (*batch, *outs[kind].shape[spec.batch :])) for kind in made(op, spec)]


def _chosen(x: Any, spec: OpSpec, whole: Any, run: Callable[..., Any], extremes: Callable[..., Any]) -> QParams:
    """Scales and zero points of groups that shards may cut."""
    assert spec.block is not None
    if spec.has_pairs:  # whole on every shard
        return qparams("choose_qparams", spec, run("choose_qparams", [x, whole], spec))
    ends = extremes(x, spec)  # two numbers a group, along a last axis
    of_ends = replace(spec, block=(*(1 for _ in spec.block), 0))
    outs = run("choose_qparams", [ends, whole], of_ends)
    return qparams("choose_qparams", spec, [a.reshape(a.shape[:-1]) for a in outs])
