"""The core's operators as XLA custom calls, under every transformation: one template over the operator table.

``call`` is a stack: a batch of calls becomes one call (``vmap``), a call on a sharded array a call on each shard
(``jit``), and that the custom call. What batches and shards do to an operator says ``quark_kernels.rules``; gradients
are the functions' own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial, wraps
from math import prod
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import SdyShardingRule, custom_partitioning
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from quark_kernels import _core, ffi_api, rules, schema
from quark_kernels.rules import Split
from quark_kernels.schema import OPS, Op, OpSpec, QParams, Shape, logical_shape, made, outputs

PREFIX = "quark_kernels."
"""Before an operator's name: that of its custom call."""


def _register() -> None:
    # Before anything is registered: a handler that the runtime refuses would keep all of JAX from starting.
    if reason := ffi_api.mismatch():
        raise ImportError(f"quark_jax can't be used: {reason}")
    for platform in ("cpu", "CUDA", "ROCM"):
        for name, handler in _core.xla_handlers(platform).items():
            jax.ffi.register_ffi_target(name, handler, platform=platform)


_register()


def call(name: str, arrays: Sequence[jax.Array | None], spec: OpSpec) -> list[jax.Array]:
    """Call an operator on arrays or tracers; what is None is left out. Returns its outputs."""
    _core.cpu_level()  # raises here, while tracing, where QUARK_CPU_LEVEL is wrong
    results: list[jax.Array] = _mapped(name, spec)(*(a for a in arrays if a is not None))
    return results


def export_checks() -> list[export.DisabledSafetyCheck]:
    """Return what ``jax.export.export(..., disabled_checks=...)`` needs to serialize calls of this library.

    JAX serializes only custom calls that it knows to stay as they are. Those of this library are read back by the same
    version of it: the process that calls ``jax.export.deserialize`` must import ``quark_jax`` first. Programs for
    several devices can be serialized only where the calls are within ``jax.shard_map``: elsewhere it is Python that
    says how XLA cuts them ("NotImplementedError: serialization of host_callbacks").

    For example:

        exported = jax.export.export(jax.jit(f), disabled_checks=quark_jax.export_checks())(x)
        data = exported.serialize()

    """
    return [export.DisabledSafetyCheck.custom_call(PREFIX + name) for name in OPS]


# ---- the custom call -------------------------------------------------------------------------------------------------


def _kernel(name: str, arrays: Sequence[Any], spec: OpSpec) -> list[Any]:
    """The bare custom call, on arrays or shards; what is None is left out."""
    op = OPS[name]
    given = alike(*(a for a in arrays if a is not None))
    shape = logical_shape(op, spec, [a.shape for a in given])
    like = jax.typeof(given[0])
    results = [_result_type(like, *out) for out in outputs(op, spec, shape, given[0].dtype.name)]
    return list(jax.ffi.ffi_call(PREFIX + name, results)(*given, spec=spec.text))


def _result_type(like: Any, shape: Shape, dtype: str) -> jax.ShapeDtypeStruct:
    """The type of a result: within ``shard_map`` it differs between shards where the inputs do."""
    if not _varying(like):
        return jax.ShapeDtypeStruct(shape, np.dtype(dtype))
    manual = {name: getattr(like, name) for name in ("manual_axis_type", "vma") if hasattr(like, name)}
    sharding = NamedSharding(like.sharding.mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(shape, np.dtype(dtype), sharding=sharding, **manual)


def _varying(kind: Any) -> frozenset[Any]:
    """The mesh axes over which a value of this type differs, within ``shard_map``."""
    # jax < 0.10 has vma only.
    found: frozenset[Any] = kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma
    return found


def alike(*values: Any) -> Any:
    """Return values (pytrees of arrays) that differ over the same mesh axes, within ``shard_map``.

    Before a ``custom_vjp`` it makes the gradient of a scale that all shards share the sum over the shards.
    """
    union = frozenset().union(*(_varying(jax.typeof(a)) for a in jax.tree.leaves(values)))
    return jax.tree.map(lambda a: _spread(a, tuple(union - _varying(jax.typeof(a)))), values)


def jitted(f: Callable[..., Any], static_argnums: tuple[int, ...]) -> Callable[..., Any]:
    """Return a ``custom_vjp`` function under jit, its arrays ``alike``."""

    @partial(jax.jit, static_argnums=static_argnums)
    @wraps(f)
    def run(*arguments: Any) -> Any:
        arrays = iter(alike(*(a for i, a in enumerate(arguments) if i not in static_argnums)))
        return f(*(a if i in static_argnums else next(arrays) for i, a in enumerate(arguments)))

    return run


def _spread(a: Any, axes: tuple[Any, ...]) -> Any:
    if not axes:
        return a
    lax: Any = jax.lax  # jax < 0.9 has no pcast
    wide = a.astype(np.float32) if a.dtype.name in ("bfloat16", "float16") else a
    # The gradient's sum is then one of float32. (XLA's CPU compiler can't sum bfloat16 where some axes aren't manual.)
    wide = lax.pcast(wide, axes, to="varying") if hasattr(lax, "pcast") else lax.pvary(wide, axes)
    return wide.astype(a.dtype)


def _explicit_mesh(a: Any) -> Any:
    """The mesh of a's type, where that says how a is cut; else None."""
    mesh = jax.typeof(a).sharding.mesh
    return mesh if AxisType.Explicit in mesh.axis_types else None


def cut_like(a: Any, other: Any) -> Any:
    """Return ``a`` cut as ``other`` of the same shape is: under an explicit mesh a gradient has its array's type."""
    mesh = _explicit_mesh(other)
    return a if mesh is None else jax.sharding.reshard(a, NamedSharding(mesh, jax.typeof(other).sharding.spec))


def whole_along(a: Any, axis: int) -> Any:
    """Return ``a`` with an axis that no mesh axis cuts, under an explicit mesh: JAX can't reshape all that are cut."""
    mesh = _explicit_mesh(a)
    if mesh is None:
        return a
    split = list(jax.typeof(a).sharding.spec)
    split[axis] = None
    return jax.sharding.reshard(a, NamedSharding(mesh, PartitionSpec(*split)))


# ---- batches ---------------------------------------------------------------------------------------------------------


@lru_cache(4096)
def _mapped(name: str, spec: OpSpec) -> Callable[..., list[jax.Array]]:
    """An operator that ``vmap`` makes one call of."""
    op = OPS[name]

    @custom_vmap
    def run(*arrays: Any) -> list[Any]:
        if jax.sharding.get_abstract_mesh().manual_axes:
            # A shard already. Where some axes aren't manual XLA gathers: custom_partitioning can't be used there.
            return _kernel(name, arrays, spec)

        def on_shards(*arrays: Any) -> list[Any]:
            return _from_bytes(made(op, spec), _partitioned(name, spec, *_to_bytes(arrays)))

        types = [jax.typeof(a) for a in arrays]
        mesh = next((m for m in map(_explicit_mesh, arrays) if m is not None), None)
        if mesh is None:
            return list(on_shards(*arrays))
        cut, auto_axes = _Cut(op, spec, types, (), mesh, _typed), cast(Any, jax.sharding.auto_axes)
        with jax.sharding.use_abstract_mesh(mesh):  # arrays may have one where nothing has set one
            return list(auto_axes(on_shards, out_sharding=cut.typed)(*arrays))

    @run.def_vmap
    def batched(size: int, is_batched: list[bool], *arrays: Any) -> tuple[list[Any], list[bool]]:
        kinds = schema.given(op, spec, len(arrays))
        shapes = [a.shape[int(b) :] for a, b in zip(arrays, is_batched, strict=True)]
        if len(logical_shape(op, spec, shapes)) == _core.MAX_RANK:
            outs = _one_by_one(_mapped(name, spec), is_batched, arrays)
        else:
            whole, leading = rules.batched(op, spec, kinds, is_batched, size)
            together = [
                a if b or n is None else jnp.broadcast_to(a, (n, *a.shape))
                for a, b, n in zip(arrays, is_batched, leading, strict=True)
            ]
            outs = _mapped(name, whole)(*together)
        return outs, [True] * len(outs)

    mapped: Callable[..., list[jax.Array]] = run
    return mapped


def _one_by_one(run: Callable[..., list[Any]], is_batched: Sequence[bool], arrays: Sequence[Any]) -> list[Any]:
    """A batch of arrays that have no room for one more axis."""

    def one(own: list[Any]) -> list[Any]:
        left = iter(own)
        return run(*(next(left) if b else a for a, b in zip(arrays, is_batched, strict=True)))

    outs: list[Any] = jax.lax.map(one, [a for a, b in zip(arrays, is_batched, strict=True) if b])
    return outs


# ---- shards ----------------------------------------------------------------------------------------------------------


class _Cut:
    """How the arrays of a call are cut over a mesh: as the data is, as far as that leaves groups and bytes whole.

    ``ins`` and ``outs`` are the PartitionSpecs of the arrays; ``now`` says how a given array or result is cut.
    """

    def __init__(
        self,
        op: Op,
        spec: OpSpec,
        arrays: Sequence[Any],
        results: Sequence[Any],
        mesh: Any,
        now: Callable[[Any], Split],
    ) -> None:
        self.op, self.spec, self.sizes = op, spec, mesh.shape
        kinds = schema.given(op, spec, len(arrays))
        shapes = [a.shape for a in arrays]
        self.shape = logical_shape(op, spec, shapes)
        found = (*zip(kinds, arrays, strict=True), *zip(made(op, spec), results, strict=False))
        asked = _asked([now(a) for kind, a in found if kind in rules.DATA], len(self.shape))
        self.split = rules.fit(op, spec, self.shape, asked, self.sizes)
        self.ins = [self._partition_spec(kind, size) for kind, size in zip(kinds, shapes, strict=True)]
        sizes = [size for size, _ in outputs(op, spec, self.shape, arrays[0].dtype.name)]
        self.outs = [self._partition_spec(kind, size) for kind, size in zip(made(op, spec), sizes, strict=True)]
        # Under an explicit mesh: what is shaped like the data has its type, though it was computed otherwise.
        data = PartitionSpec(*(axes or None for axes in asked))
        self.typed = [data if size == self.shape else out for size, out in zip(sizes, self.outs, strict=True)]

    def _partition_spec(self, kind: str, shape: Shape) -> PartitionSpec:
        split = rules.split_of(kind, self.spec, self.shape, self.split, shape)
        return PartitionSpec(*(axes or None for axes in split))

    def run(self, *arrays: Any) -> list[Any]:
        """Compute the outputs of a shard."""
        op, spec = self.op, self.spec
        local = rules.shard_spec(spec, self.shape, self.split, self.sizes)
        kinds = schema.given(op, spec, len(arrays))
        if local.whole is not None:
            arrays = tuple(self._key(a) if kind == "k" else a for kind, a in zip(kinds, arrays, strict=True))
        if rules.needs_stages(op, spec, self.shape, self.split):
            named = dict(zip(kinds, arrays, strict=True))
            params = QParams(global_scale=named.get("g"), key=named.get("k"))
            return rules.staged(op, local, params, named["x"], _kernel, self._extremes, jnp.broadcast_to)
        outs = _kernel(op.name, arrays, local)
        over = rules.shared_axes(spec, self.shape, self.split)
        if op.combine is None or not over:
            return outs
        combine: Any = jax.lax.psum if op.combine == "sum" else jax.lax.pmax
        return [combine(a, over) if kind in rules.SCALES else a for kind, a in zip(made(op, spec), outs, strict=True)]

    def _extremes(self, x: Any, spec: OpSpec) -> Any:
        (ends,) = _kernel("extremes", [x], spec)
        if over := rules.shared_axes(spec, self.shape, self.split):
            ends = jax.lax.pmax(ends, over)
        return jax.lax.bitcast_convert_type(ends, np.float32)

    def _key(self, key: Any) -> Any:
        """A random key with the place of the shard: the index of its first element along each axis."""
        begins = []
        for n, axes in zip(self.shape[self.spec.batch :], self.split[self.spec.batch :], strict=True):
            index = jnp.int32(0)
            for axis in axes:
                index = index * self.sizes[axis] + jax.lax.axis_index(axis).astype(np.int32)
            begins.append(index * (n // prod(self.sizes[a] for a in axes)))
        place = jnp.broadcast_to(jnp.stack(begins), (*key.shape[:-1], len(begins)))
        return jnp.concatenate([key, place], -1)


def _typed(a: Any) -> Split:
    """The mesh axes that cut each axis of an array, as its type says."""
    return tuple(axes if isinstance(axes, tuple) else (axes,) if axes else () for axes in a.sharding.spec)


def _placed(a: Any, mesh: Any) -> Split:
    """The same as XLA decided. Where a part of a mesh axis cuts an axis there is no name for it: (), as if none did."""
    if None in mesh.devices.flat:  # under jax.set_mesh, of arrays that are on one device
        return ((),) * len(a.shape)
    try:
        windows = a.sharding.devices_indices_map(a.shape)
    except ValueError:  # shards of several lengths
        return ((),) * len(a.shape)
    starts = np.array([[w.start or 0 for w in windows[d]] for d in mesh.devices.flat], np.int64)
    index = np.stack(np.unravel_index(np.arange(mesh.size), mesh.devices.shape), -1)
    split = []
    for d, n in enumerate(a.shape):
        # How far a step along each mesh axis goes; the longest steps are the outermost axes'.
        steps = [
            starts[(index == np.eye(len(mesh.shape), dtype=int)[i]).all(-1), d].sum() for i in range(index.shape[1])
        ]
        order = sorted((i for i, step in enumerate(steps) if step), key=lambda i: -steps[i])
        lengths = [n // prod(mesh.devices.shape[j] for j in order[: k + 1]) for k in range(len(order))]
        whole = (starts[:, d] == index @ np.array(steps, np.int64)).all() and [steps[i] for i in order] == lengths
        split.append(tuple(mesh.axis_names[i] for i in order) if whole else ())
    return tuple(split)


def _asked(data: Sequence[Split], rank: int) -> Split:
    """How the data is cut: for each axis, what the first array says that says something."""
    split: list[tuple[Any, ...]] = []
    for d in range(rank):
        taken = {a for axes in split for a in axes}
        found = (cut[d] for cut in data if d < len(cut) and cut[d] and not taken.intersection(cut[d]))
        split.append(next(found, ()))
    return tuple(split)


def _to_bytes(arrays: Sequence[Any]) -> list[Any]:
    """Codes of E8M0 scales as bytes: XLA moves them between devices as float32, and flushes 2^-127."""
    e8m0 = jnp.float8_e8m0fnu
    return [jax.lax.bitcast_convert_type(a, np.uint8) if a.dtype == e8m0 else a for a in arrays]


def _from_bytes(kinds: str, arrays: Sequence[Any]) -> list[Any]:
    """The same back. No scale is a byte otherwise."""
    return [
        jax.lax.bitcast_convert_type(a, jnp.float8_e8m0fnu) if kind == "s" and a.dtype == np.uint8 else a
        for kind, a in zip(kinds, arrays, strict=True)
    ]


@partial(custom_partitioning, static_argnums=(0, 1))
def _partitioned(name: str, spec: OpSpec, *arrays: Any) -> list[Any]:
    """An operator that runs on each shard. E8M0 scales come and go as bytes."""
    kinds = schema.given(OPS[name], spec, len(arrays))
    return _to_bytes(_kernel(name, _from_bytes(kinds, arrays), spec))


def _partition(name: str, spec: OpSpec, mesh: Any, arrays: Any, results: Any) -> Any:
    cut = _Cut(OPS[name], spec, arrays, results, mesh, partial(_placed, mesh=mesh))

    def on_shard(*arrays: Any) -> list[Any]:
        # The shards know no mesh (jax 0.8 can't combine them under an explicit one).
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
            kinds = schema.given(cut.op, spec, len(arrays))
            return _to_bytes(cut.run(*_from_bytes(kinds, arrays)))

    outs, ins = ([NamedSharding(mesh, spec) for spec in specs] for specs in (cut.outs, cut.ins))
    return mesh, on_shard, outs, tuple(ins)


def _sharding_rule(name: str, spec: OpSpec, mesh: Any, arrays: Any, results: Any) -> SdyShardingRule:
    """How shardings travel through a call: what has an entry for an axis of the data is cut as that is."""
    op = OPS[name]
    kinds = schema.given(op, spec, len(arrays))
    shape = logical_shape(op, spec, [tuple(a.shape) for a in arrays])

    def factors(kind: str, a: Any, place: str) -> Any:
        # An axis of groups or of bytes shares the factor of the elements' axis, although it is shorter. (Factors of
        # factors would say it better, but partitions can't be told of the parts of mesh axes that Shardy makes then.)
        # Not where all share one scale; and E8M0 scales only where any cut is even: an uneven one would be mended after
        # they are no bytes any more.
        is_e8m0 = kind == "s" and str(a.element_type) == "ui8"
        names = [f"{place}_{d}" for d in range(len(a.shape))]
        shared = len(shape) if kind in rules.DATA + rules.SCALES else spec.batch
        for d, (n, whole) in enumerate(zip(a.shape[:shared], shape, strict=False)):
            if n == whole or (n % mesh.size == 0 if is_e8m0 else n > 1):
                names[d] = f"x{d}"
        return tuple(names)

    ins = tuple(factors(kind, a, f"in{i}") for i, (kind, a) in enumerate(zip(kinds, arrays, strict=True)))
    outs = tuple(factors(kind, a, f"out{i}") for i, (kind, a) in enumerate(zip(made(op, spec), results, strict=True)))
    return SdyShardingRule(ins, outs)


_partitioned.def_partition(_partition, sharding_rule=_sharding_rule, decode_shardings=False)
