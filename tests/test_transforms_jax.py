"""Every function under every transform of JAX: the bits of plain calls, gradients too, or an error that says why."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import transforms
from transforms import CELLS, IDS, Function, Variant

jax = pytest.importorskip("jax")

import jax.numpy as jnp
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import quark_jax
from quark_kernels import PerToken, QuantSpec

P = PartitionSpec
NO_GRADIENT = "no gradient: codes and scales are constants, zero by definition"
FORWARD_MODE = "no forward-mode derivative: TypeError"
N = 3
"""Examples of a batch."""

cells = pytest.mark.parametrize(("function", "variant"), CELLS, ids=IDS)
# Where a transform can't meet the variants of a function differently, every third of them.
FEW = [i for i, (function, variant) in enumerate(CELLS) if function.variants.index(variant) % 3 == 0]
few_cells = pytest.mark.parametrize(("function", "variant"), [CELLS[i] for i in FEW], ids=[IDS[i] for i in FEW])


def record(function: Function, transform: str, outcome: str = "works") -> None:
    transforms.record("jax", function.name, transform, outcome)


# ---- calls and their results -----------------------------------------------------------------------------------------


@cache
def call_of(function: Function, variant: Variant) -> Callable[..., list[Any]]:
    """The call, giving a flat list of arrays."""
    api = function.api(quark_jax)
    return lambda *arrays: jax.tree.leaves(variant.call(api, *arrays))


@cache
def plain(function: Function, variant: Variant, i: int = 0) -> list[np.ndarray]:
    """What a plain call gives for example i."""
    return numpy(call_of(function, variant)(*map(jnp.asarray, variant.example(i))))


def batch(variant: Variant, n: int = N, axis: int = 0) -> list[np.ndarray]:
    """The arrays of n examples, along a new axis."""
    return [np.stack(parts, axis) for parts in zip(*(variant.example(i) for i in range(n)), strict=True)]


def numpy(tree: Any) -> list[np.ndarray]:
    return [np.asarray(a) for a in jax.tree.leaves(tree)]


def assert_bits(got: Any, want: Sequence[np.ndarray]) -> None:
    got = numpy(got)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        # In words: only the bytes of a NaN say which it is.
        assert a.tobytes() == b.tobytes(), f"{np.sum(a != b)} of {a.size} differ"


def assert_near(got: np.ndarray, want: np.ndarray) -> None:
    got, want = got.astype(np.float64), want.astype(np.float64)
    assert np.allclose(got, want, rtol=2e-2 if want.size == 0 else 1e-2, atol=1e-3 * np.abs(want).max(initial=0))


def cotangents(outs: Sequence[Any]) -> list[Any]:
    """Gradients of the results, the same numbers whatever the transform. Integers have none."""
    found = []
    for a in outs:
        shape, dtype = np.shape(a), jnp.asarray(a).dtype if not hasattr(a, "dtype") else a.dtype
        if jnp.issubdtype(dtype, jnp.floating):
            found.append(np.random.default_rng(9).uniform(0.25, 2.0, shape).astype(dtype))
        else:
            found.append(np.zeros(shape, jax.dtypes.float0))
    return found


def gradients_of(call: Callable[..., list[Any]], diff: Sequence[int], like: Sequence[Any]) -> Callable[..., list[Any]]:
    """The gradients of a call's differentiable arguments, for the cotangents of results like these."""
    given = cotangents(like)

    def gradients(*arrays: Any) -> list[Any]:
        def of(*wanted: Any) -> list[Any]:
            every = list(arrays)
            for i, a in zip(diff, wanted, strict=True):
                every[i] = a
            return call(*every)

        _, pull = jax.vjp(of, *(arrays[i] for i in diff))
        return list(pull(given))

    return gradients


def is_float(a: np.ndarray) -> bool:
    return bool(jnp.issubdtype(a.dtype, jnp.floating))


def floats(variant: Variant) -> tuple[int, ...]:
    """The first argument, if it could have a gradient. (A given scale is a part of what quantize returns.)"""
    return (0,) if is_float(variant.example()[0]) else ()


@cache
def plain_gradients(function: Function, variant: Variant, i: int = 0) -> list[np.ndarray]:
    gradients = gradients_of(call_of(function, variant), variant.differentiable, plain(function, variant))
    return numpy(gradients(*map(jnp.asarray, variant.example(i))))


# ---- compilation -----------------------------------------------------------------------------------------------------


@cells
def test_jit(function: Function, variant: Variant) -> None:
    assert_bits(jax.jit(call_of(function, variant))(*variant.example()), plain(function, variant))
    record(function, "jit")


@few_cells
def test_aot(function: Function, variant: Variant) -> None:
    compiled = jax.jit(call_of(function, variant)).lower(*shapes(variant)).compile()
    assert_bits(compiled(*variant.example(1)), plain(function, variant, 1))
    record(function, "AOT")


def shapes(variant: Variant) -> list[Any]:
    return [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in variant.example()]


@few_cells
@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_donation(function: Function, variant: Variant) -> None:
    """The results may take the place of the inputs."""
    arrays = [jnp.array(a) for a in variant.example()]
    run = jax.jit(call_of(function, variant), donate_argnums=tuple(range(len(arrays))))
    assert_bits(run(*arrays), plain(function, variant))
    record(function, "donation")


def test_donated_data_is_overwritten() -> None:
    x = jnp.arange(4096.0)
    run = jax.jit(lambda x: quark_jax.fake_quantize(x, "int8"), donate_argnums=0)
    want = np.asarray(quark_jax.fake_quantize(x, "int8"))
    assert_bits(run(x), [want])
    assert x.is_deleted()


# ---- gradients -------------------------------------------------------------------------------------------------------


@cells
def test_grad(function: Function, variant: Variant) -> None:
    """Gradients are there, and the same compiled. Where there are none, results are constants."""
    want = plain(function, variant)
    if not variant.differentiable:
        gradients = gradients_of(call_of(function, variant), floats(variant), want)
        for grad in numpy(gradients(*variant.example())):
            assert not np.any(grad.astype(np.float32))
        record(function, "grad", NO_GRADIENT)
        return
    found = plain_gradients(function, variant)
    for i, grad in zip(variant.differentiable, found, strict=True):
        x = variant.example()[i]
        assert (grad.shape, grad.dtype) == (x.shape, x.dtype)
        assert np.isfinite(grad.astype(np.float64)).all()
        assert np.any(grad.astype(np.float64)), f"the gradient of argument {i} is silently zero"
    gradients = gradients_of(call_of(function, variant), variant.differentiable, want)
    assert_bits(jax.jit(gradients)(*variant.example()), found)
    record(function, "grad")


@cells
def test_jvp(function: Function, variant: Variant) -> None:
    """No forward mode: an error says so. Results that are constants have a zero tangent."""
    call, arrays = call_of(function, variant), [jnp.asarray(a) for a in variant.example()]
    wanted = variant.differentiable or floats(variant)

    def of(*given: Any) -> list[Any]:
        every = list(arrays)
        for i, a in zip(wanted, given, strict=True):
            every[i] = a
        return call(*every)

    primals = [arrays[i] for i in wanted]
    tangents = [jnp.ones_like(a) for a in primals]
    if function.name == "kernel.dequantize" and variant.label == "float16":
        assert_bits(jax.jvp(of, primals, tangents)[1], numpy(tangents))  # what came is returned
        return
    if variant.differentiable or (function.name == "dequantize" and floats(variant)):
        with pytest.raises(TypeError, match=r"forward-mode .*\(jvp\) to a custom_vjp function"):
            jax.jvp(of, primals, tangents)
        record(function, "jvp", FORWARD_MODE)
        return
    outs, found = jax.jvp(of, primals, tangents)
    assert_bits(outs, plain(function, variant))
    for out, tangent in zip(outs, found, strict=True):
        if not is_float(out):
            assert tangent.dtype == jax.dtypes.float0
        elif out.dtype != jnp.float8_e8m0fnu:  # which has no zero
            assert not np.any(np.asarray(tangent, np.float32))
    record(function, "jvp", NO_GRADIENT)


@few_cells
def test_checkpoint(function: Function, variant: Variant) -> None:
    call = jax.checkpoint(call_of(function, variant))
    assert_bits(jax.jit(call)(*variant.example()), plain(function, variant))
    if variant.differentiable:
        gradients = gradients_of(call, variant.differentiable, plain(function, variant))
        assert_bits(jax.jit(gradients)(*variant.example()), plain_gradients(function, variant))
    record(function, "checkpoint")


# ---- batches ---------------------------------------------------------------------------------------------------------


def stacked(outs: Sequence[Sequence[np.ndarray]], axis: int = 0) -> list[np.ndarray]:
    return [np.stack(parts, axis) for parts in zip(*outs, strict=True)]


@cells
def test_vmap(function: Function, variant: Variant) -> None:
    """Over the first and the last axis, and over each argument alone."""
    call = call_of(function, variant)
    want = [plain(function, variant, i) for i in range(N)]
    assert_bits(jax.vmap(call, -1, -1)(*batch(variant, axis=-1)), stacked(want, -1))
    first, every = variant.example(), batch(variant)
    for i in range(len(first) if len(first) > 1 else 0):
        axes = [0 if j == i else None for j in range(len(first))]
        got = jax.vmap(call, axes)(*(b if axis == 0 else a for a, b, axis in zip(first, every, axes, strict=True)))
        mixed = [[variant.example(n)[j] if j == i else a for j, a in enumerate(first)] for n in range(N)]
        assert_bits(got, stacked([numpy(call(*arrays)) for arrays in mixed]))
    record(function, "vmap")


@cells
def test_vmap_of_grad(function: Function, variant: Variant) -> None:
    want = plain(function, variant)
    diff = variant.differentiable or floats(variant)
    gradients = gradients_of(call_of(function, variant), diff, want)
    got = numpy(jax.vmap(gradients)(*batch(variant)))
    if not variant.differentiable:
        assert not any(np.any(grad.astype(np.float32)) for grad in got)
        record(function, "vmap(grad)", NO_GRADIENT)
        return
    assert_bits(got, stacked([plain_gradients(function, variant, i) for i in range(N)]))
    record(function, "vmap(grad)")


@cells
def test_grad_of_vmap(function: Function, variant: Variant) -> None:
    """The first argument is batched, the others are shared: their gradients are sums."""
    call, (_, *shared) = call_of(function, variant), variant.example()
    x = batch(variant)[0]
    axes = (0, *(None for _ in shared))
    want = [numpy(call(one, *shared)) for one in x]
    given = stacked([cotangents(outs) for outs in want])

    def gradients(call: Any, given: list[Any], *arrays: Any) -> list[np.ndarray]:
        _, pull = jax.vjp(lambda *d: call(*merged(arrays, d)), *(arrays[i] for i in diff))
        return numpy(pull(given))

    def merged(arrays: Sequence[Any], wanted: Sequence[Any]) -> list[Any]:
        every = list(arrays)
        for i, a in zip(diff, wanted, strict=True):
            every[i] = a
        return every

    diff = variant.differentiable or floats(variant)
    got = gradients(jax.vmap(call, axes), given, x, *shared)
    if not variant.differentiable:
        assert not any(np.any(grad.astype(np.float32)) for grad in got)
        record(function, "grad(vmap)", NO_GRADIENT)
        return
    alone = [gradients(call, cotangents(outs), one, *shared) for one, outs in zip(x, want, strict=True)]
    for i, grad, parts in zip(diff, got, zip(*alone, strict=True), strict=True):
        if i == 0:
            assert_bits(grad, [np.stack(parts)])
        else:
            assert_near(grad, np.sum([p.astype(np.float32) for p in parts], 0))
    record(function, "grad(vmap)")


NESTED = [
    i for i, (_, variant) in enumerate(CELLS) if variant.label in ("dynamic", "nvfp4", "stochastic", "per tensor")
]


@pytest.mark.parametrize("index", NESTED, ids=[IDS[i] for i in NESTED])
def test_nested_vmap(index: int) -> None:
    """Two batch axes, of which the inner one comes last, and arguments that only one of them batches."""
    function, variant = CELLS[index]
    call = call_of(function, variant)
    grid = [[variant.example(2 * i + j) for j in range(2)] for i in range(3)]
    arrays = [np.stack([np.stack(row, -1) for row in zip(*part)]) for part in zip(*(zip(*row) for row in grid))]  # noqa: B905
    arrays = [
        np.stack([np.stack([grid[i][j][k] for j in range(2)], -1) for i in range(3)]) for k in range(len(grid[0][0]))
    ]
    want = stacked([stacked([numpy(call(*cell)) for cell in row]) for row in grid])
    assert_bits(jax.vmap(jax.vmap(call, -1))(*arrays), want)
    if len(arrays) > 1:
        outer = [
            np.stack([row[0][1] for row in grid]),
            *(np.stack([row[0][k] for row in grid]) for k in range(2, len(arrays))),
        ]
        want = stacked([stacked([numpy(call(cell[0], *row[0][1:])) for cell in row]) for row in grid])
        inner = jax.vmap(call, (-1, *(None for _ in outer)))
        assert_bits(jax.vmap(inner)(arrays[0], *outer), want)


def test_vmap_of_the_most_axes() -> None:
    x = np.random.default_rng(0).standard_normal((3, *(1 for _ in range(14)), 2, 4)).astype(np.float32)
    got = jax.vmap(lambda x: quark_jax.fake_quantize(x, "int8"))(x)
    assert_bits(got, [np.stack([np.asarray(quark_jax.fake_quantize(one, "int8")) for one in x])])


# ---- loops -----------------------------------------------------------------------------------------------------------


@few_cells
def test_scan(function: Function, variant: Variant) -> None:
    call = call_of(function, variant)
    _, got = jax.lax.scan(lambda carry, arrays: (carry, call(*arrays)), 0, batch(variant, 2))
    assert_bits(got, stacked([plain(function, variant, i) for i in range(2)]))
    record(function, "scan")


def test_map_and_while() -> None:
    x = np.random.default_rng(0).standard_normal((4, 3, 32)).astype(np.float32)
    fake = lambda x: quark_jax.fake_quantize(x, "int8")  # noqa: E731
    want = np.stack([np.asarray(fake(one)) for one in x])
    assert_bits(jax.lax.map(fake, x), [want])
    assert_bits(jax.lax.map(fake, x, batch_size=2), [want])

    def halves(x: Any) -> Any:
        return jax.lax.while_loop(lambda state: state[0] < 3, lambda state: (state[0] + 1, fake(state[1] / 2)), (0, x))[
            1
        ]

    want = x[0]
    for _ in range(3):
        want = np.asarray(fake(want / 2))
    assert_bits(jax.jit(halves)(x[0]), [want])


def test_gradient_through_a_scan() -> None:
    """A learned scale that every step shares."""
    x = np.random.default_rng(0).standard_normal((4, 3, 32)).astype(np.float32)

    def lsq(x: Any, s: Any) -> Any:
        return quark_jax.lsq_quantize(x, s, quant_min=-8, quant_max=7).sum()

    def looped(s: Any) -> Any:
        return jax.lax.scan(lambda total, x: (total + lsq(x, s), None), 0.0, x)[0]

    want = sum(jax.grad(lsq, 1)(one, 0.2) for one in x)
    assert want != 0
    assert np.allclose(jax.grad(looped)(0.2), want, rtol=1e-5)


# ---- export ----------------------------------------------------------------------------------------------------------

LOAD = """
import sys
import ml_dtypes, numpy as np
import jax
from jax import export
import quark_jax  # registers the calls
import transforms
from test_transforms_jax import assert_bits, plain
directory = sys.argv[1]
for i, (function, variant) in enumerate(transforms.CELLS):
    with open(f"{directory}/{i}", "rb") as file:
        exported = export.deserialize(bytearray(file.read()))
    assert_bits(exported.call(*variant.example(1)), plain(function, variant, 1))
print("all", i + 1)
"""


def test_export(tmp_path: Path) -> None:
    """Every call is serialized here; a fresh process reads and calls them."""
    pytest.importorskip("flatbuffers")
    for i, (function, variant) in enumerate(CELLS):
        run = jax.jit(call_of(function, variant))
        exported = export.export(run, disabled_checks=quark_jax.export_checks())(*shapes(variant))
        (tmp_path / str(i)).write_bytes(exported.serialize())
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["all", str(len(CELLS))]
    for function, _ in CELLS:
        record(function, "export")


def test_export_of_gradients_and_qtensors() -> None:
    pytest.importorskip("flatbuffers")
    x = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)

    def step(x: Any, s: Any) -> Any:
        return jax.value_and_grad(lambda s: quark_jax.lsq_quantize(x, s, quant_min=-8, quant_max=7).sum())(s)

    checks = quark_jax.export_checks()
    data = export.export(jax.jit(step), disabled_checks=checks)(x, np.float32(0.2)).serialize(vjp_order=0)
    assert_bits(export.deserialize(data).call(x, np.float32(0.2)), numpy(jax.jit(step)(x, np.float32(0.2))))
    quantize = jax.jit(lambda x: quark_jax.quantize(x, "nvfp4"))
    q = export.deserialize(export.export(quantize, disabled_checks=checks)(x).serialize()).call(x)
    assert isinstance(q, quark_jax.QTensor)
    assert q.spec == quantize(x).spec
    assert q.dtype == np.float32
    assert_bits(q.dequantize(), numpy(quantize(x).dequantize()))
    back = export.export(jax.jit(lambda q: q.dequantize()), disabled_checks=checks)(q).serialize()
    assert_bits(export.deserialize(back).call(q), numpy(q.dequantize()))


def test_export_needs_the_checks() -> None:
    with pytest.raises(ValueError, match="quark_kernels.fake_quantize_dynamic"):
        export.export(jax.jit(lambda x: quark_jax.fake_quantize(x, "int8")))(jnp.ones(8))


# ---- meshes ----------------------------------------------------------------------------------------------------------


@cache
def mesh(kind: AxisType) -> Any:
    if len(jax.devices()) < 8:
        pytest.skip("the mesh is of eight CPU devices: run without --device")
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)


def sharded(variant: Variant, kind: AxisType) -> list[Any]:
    """The arrays on a mesh, cut where 4 devices can cut them."""
    placed = []
    for a in variant.example():
        split = [None] * a.ndim
        for d in range(a.ndim):
            if a.shape[d] % 4 == 0:
                split[d] = "a"
                break
        placed.append(jax.device_put(a, NamedSharding(mesh(kind), P(*split))))
    return placed


def check_on_mesh(function: Function, variant: Variant, kind: AxisType) -> None:
    call, want = call_of(function, variant), plain(function, variant)
    arrays = sharded(variant, kind)
    gradients = gradients_of(call, variant.differentiable, want)
    outs, found = jax.jit(lambda *arrays: (call(*arrays), gradients(*arrays)))(*arrays)
    assert_bits(outs, want)
    if variant.differentiable:
        alone = plain_gradients(function, variant)
        for i, grad, one in zip(variant.differentiable, numpy(found), alone, strict=True):
            assert_bits(grad, [one]) if i == 0 and one.ndim else assert_near(grad, one)


@cells
def test_sharded_jit(function: Function, variant: Variant) -> None:
    check_on_mesh(function, variant, AxisType.Auto)
    record(function, "sharded jit")


@cells
def test_explicit_mesh(function: Function, variant: Variant) -> None:
    check_on_mesh(function, variant, AxisType.Explicit)
    record(function, "explicit mesh")


def check_shard_map(function: Function, variant: Variant, manual: set[str]) -> None:
    """An example on each device: the first argument its own, the others shared, whose gradients are sums."""
    call, (_, *shared) = call_of(function, variant), variant.example()
    own = batch(variant, 4)[0]
    specs = (P("a"), *(P() for _ in shared))
    want = [numpy(call(x, *shared)) for x in own]

    def on_shard(x: Any, *shared: Any) -> list[Any]:
        return [out[None] for out in call(x[0], *shared)]

    run = jax.shard_map(on_shard, mesh=mesh(AxisType.Auto), in_specs=specs, out_specs=P("a"), axis_names=manual)
    assert_bits(jax.jit(run)(own, *shared), stacked(want))
    if not variant.differentiable:
        return
    given = stacked([cotangents(outs) for outs in want])

    def gradients(call: Any, given: Any, *arrays: Any) -> Any:
        def of(*wanted: Any) -> Any:
            every = list(arrays)
            for i, a in zip(variant.differentiable, wanted, strict=True):
                every[i] = a
            return call(*every)

        return jax.vjp(of, *(arrays[i] for i in variant.differentiable))[1](given)

    got = numpy(jax.jit(lambda *arrays: gradients(run, given, *arrays))(own, *shared))
    alone = [numpy(gradients(call, cotangents(outs), x, *shared)) for x, outs in zip(own, want, strict=True)]
    for i, grad, parts in zip(variant.differentiable, got, zip(*alone, strict=True), strict=True):
        if i == 0:
            assert_bits(grad, [np.stack(parts)])
        else:
            assert_near(grad, np.sum([p.astype(np.float32) for p in parts], 0))


@cells
def test_shard_map(function: Function, variant: Variant) -> None:
    check_shard_map(function, variant, {"a", "b"})
    record(function, "shard_map")


@few_cells
def test_partial_shard_map(function: Function, variant: Variant) -> None:
    check_shard_map(function, variant, {"a"})
    record(function, "partial shard_map")


def test_scales_and_random_numbers_of_a_shard() -> None:
    """Within shard_map a call sees its shard alone."""
    x = np.random.default_rng(0).standard_normal((8, 32)).astype(np.float32)
    spec = QuantSpec("int4", PerToken(), rounding="stochastic")
    over = jax.shard_map(
        lambda x: quark_jax.fake_quantize(x, spec, seed=5), mesh=mesh(AxisType.Auto), in_specs=P("a"), out_specs=P("a")
    )
    want = [np.asarray(quark_jax.fake_quantize(part, spec, seed=5)) for part in np.split(x, 4)]
    assert_bits(jax.jit(over)(x), [np.concatenate(want)])
