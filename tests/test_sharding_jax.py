"""Sharded arrays under jit: the bits of the whole array, and nothing is gathered that needn't be."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

jax = pytest.importorskip("jax")

from jax.sharding import AxisType, NamedSharding, PartitionSpec

import quark_jax
import test_rules
from quark_kernels import PRESETS, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec, rules
from quark_kernels.schema import OPS, op_spec
from test_rules import GRANULARITIES, SHAPE
from test_rules import MESH as SIZES
from test_transforms_jax import assert_bits, numpy

P = PartitionSpec
SPLITS = (P("a", None, "b"), P("b", "a"), P(None, "b", "a"), P(("a", "b")), P(None, None, ("b", "a")))


@pytest.fixture(scope="module", autouse=True)
def eight_devices(device: str) -> None:
    if device != "cpu":
        pytest.skip("the mesh is of eight CPU devices: run without --device")
    assert len(jax.devices()) == 8, "tests/conftest.py asks for 8"


def mesh(kind: AxisType = AxisType.Auto) -> Any:
    return jax.make_mesh(tuple(SIZES.values()), tuple(SIZES), axis_types=(kind,) * len(SIZES))


def on_mesh(a: Any, split: PartitionSpec, kind: AxisType = AxisType.Auto) -> Any:
    return jax.device_put(a, NamedSharding(mesh(kind), split))


def data() -> np.ndarray:
    """Numbers of every size, zeros and subnormals."""
    return test_rules.data(SHAPE)


def strange(x: np.ndarray) -> np.ndarray:
    """The same with a NaN and an infinity in two corners, and a whole row of subnormals."""
    x = x.copy()
    x[0, 0, 0], x[-1, -1, -1], x[3] = np.nan, -np.inf, np.where(x[3] > 0, 1e-41, -3e-42)
    return x


GRADIENT = np.random.default_rng(5).standard_normal(SHAPE).astype(np.float32)


# ---- what is gathered ------------------------------------------------------------------------------------------------


class Gather(NamedTuple):
    """An all-gather of compiled code: its result's shape, how many devices it takes, how many elements come out."""

    dtype: str
    shape: tuple[int, ...]
    devices: int


def gathers(compiled: Any) -> list[Gather]:
    found = []
    for line in compiled.as_text().splitlines():
        if match := re.search(r"= (\w+)\[([\d,]*)\]\S* all-gather\(.*replica_groups=(.*?), dimensions", line):
            dtype, shape, groups = match.groups()
            found.append(Gather(dtype, tuple(map(int, shape.split(","))) if shape else (), _group_size(groups)))
        else:
            assert "all-gather(" not in line, line
    return found


def fitting(name: str, spec: QuantSpec, split: PartitionSpec, packed: bool = False) -> tuple[rules.Split, rules.Split]:
    """How the data is cut, and how an operator leaves it cut."""
    asked = entries((*split, None, None)[: len(SHAPE)])
    return asked, rules.fit(OPS[name], op_spec(spec, SHAPE, packed), SHAPE, asked, SIZES)


def _group_size(groups: str) -> int:
    """The devices of a group; XLA writes ``{{0,1},{2,3}}``, ``[4,2]<=[8]`` or ``mesh['x'=4,'y'=2] {'y'}``."""
    if groups.startswith("mesh"):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", groups))
        return int(np.prod([int(axes[name]) for name in re.findall(r"'(\w+)'", groups.split("{")[1])]))
    if tiled := re.match(r"\[\d+,(\d+)\]", groups):
        return int(tiled[1])
    return groups.split("}")[0].count(",") + 1


def entries(split: Any) -> rules.Split:
    return tuple(() if e is None else e if isinstance(e, tuple) else (e,) for e in split)


def not_fitting(asked: rules.Split, kept: rules.Split) -> int:
    """How many shards each gathered shard is made of; 1: nothing is gathered."""
    lost = [a for cut, left in zip(asked, kept, strict=True) for a in cut[len(left) :]]
    return int(np.prod([SIZES[a] for a in lost]))


def check(
    f: Callable[..., Any],
    arrays: tuple[Any, ...],
    placed: tuple[Any, ...],
    parts: int,
    operands: int,
    spec: QuantSpec | None = None,
) -> None:
    """The bits of the whole arrays; at most ``operands`` gathers, of ``parts`` devices, and none where that is 1.

    E8M0 scales are so few bytes that they may be gathered, where not every cut of them is even.
    """
    compiled = jax.jit(f).lower(*placed).compile()
    found = gathers(compiled)
    if spec is not None and spec.scale_format == "e8m0":
        scales = op_spec(spec, SHAPE).scale_shape(SHAPE)
        is_uneven = any(n > 1 and n % mesh().size for n in scales)
        found = [g for g in found if not (is_uneven and g.dtype == "u8" and np.prod(g.shape) <= np.prod(scales))]
    if parts == 1:
        assert not found
    else:
        assert len(found) <= operands, found
        assert all(g.devices <= parts for g in found), found
    assert_bits(compiled(*placed), numpy(jax.jit(f)(*arrays)))  # jit keeps what it has compiled for f


# ---- granularities ---------------------------------------------------------------------------------------------------


def specs() -> Iterator[QuantSpec]:
    for i, granularity in enumerate(GRANULARITIES):
        yield (QuantSpec("int8", granularity), QuantSpec("fp6_e2m3", granularity, scale_format="e8m0"))[i % 2]
        yield (QuantSpec("fp8_e4m3", granularity), QuantSpec("uint4", granularity, symmetric=False))[i % 2]
    yield from (PRESETS[name] for name in ("mxfp4", "nvfp4", "mx6", "bfp16"))


@pytest.mark.parametrize("spec", list(specs()), ids=str)
def test_dynamic(spec: QuantSpec) -> None:
    """Forward, codes and gradients, of scales that are chosen over all shards."""

    def fake(x: Any) -> Any:
        return quark_jax.fake_quantize(x, spec)

    def gradient(x: Any, g: Any) -> Any:
        return jax.vjp(fake, x)[1](g)

    def quantize(x: Any) -> Any:
        return quark_jax.quantize(x, spec)

    x = data()
    odd = strange(x)
    for split in SPLITS:
        parts = not_fitting(*fitting("fake_quantize_dynamic", spec, split))
        check(fake, (odd,), (on_mesh(odd, split),), parts, 1, spec)
        check(quantize, (x,), (on_mesh(x, split),), parts, 1, spec)
        check(gradient, (x, GRADIENT), (on_mesh(x, split), on_mesh(GRADIENT, split)), parts, 2, spec)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_given(granularity: Any) -> None:
    """A given scale, replicated as it comes: forward, codes and back, gradients to the data and to the scale."""
    spec = QuantSpec("int8", granularity)
    x = strange(data())
    scale = np.asarray(quark_jax.choose_qparams(data(), spec)[0]) / 2

    def forward(x: Any, s: Any) -> Any:
        return quark_jax.fake_quantize(x, spec, scale=s)

    def gradient(x: Any, s: Any, g: Any) -> Any:
        return jax.vjp(lambda x: forward(x, s), x)[1](g)

    def to_scale(q: Any, g: Any) -> Any:
        return jax.vjp(lambda s: quark_jax.dequantize(type(q)(q.qvalue, s, *rest)), q.scale)[1](g)[0]

    for split in SPLITS:
        parts = not_fitting(*fitting("fake_quantize", spec, split))
        xs, ss, gs = on_mesh(x, split), on_mesh(scale, P()), on_mesh(GRADIENT, split)
        check(forward, (x, scale), (xs, ss), parts, 1)
        check(gradient, (x, scale, GRADIENT), (xs, ss, gs), parts, 2)
        q = quark_jax.quantize(x, spec, scale=scale)
        rest = (None, None, None, q.spec, q.shape, q.dtype, q.packed)
        placed = type(q)(on_mesh(q.qvalue, split), ss, *rest)
        check(lambda q: q.dequantize(), (q,), (placed,), parts, 1)
        compiled = jax.jit(to_scale, out_shardings=None).lower(placed, gs).compile()
        want = np.asarray(to_scale(q, GRADIENT))
        assert np.allclose(compiled(placed, gs), want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
        assert np.any(want)
        data_shaped = [g for g in gathers(compiled) if np.prod(g.shape) > scale.size]
        assert len(data_shaped) <= (0 if parts == 1 else 2)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("int3", QuantSpec("int3", PerToken())),
        ("int4", QuantSpec("int4", PerGroup(16))),
        ("fp4", QuantSpec("fp4", PerTensor())),
        ("mxfp4", PRESETS["mxfp4"]),
    ],
    ids=str,
)
def test_packed(name: str, spec: QuantSpec) -> None:
    """Shards hold whole bytes of codes."""
    x = data()
    whole = quark_jax.quantize(x, spec, packed=True)
    for split in SPLITS:
        parts = not_fitting(*fitting("quantize_dynamic", spec, split, packed=True))
        check(lambda x: quark_jax.quantize(x, spec, packed=True), (x,), (on_mesh(x, split),), parts, 1, spec)
        if whole.qvalue.shape[-1] % 8 == 0:
            q = type(whole)(
                on_mesh(whole.qvalue, split), on_mesh(whole.scale, P()), None, None, None,
                whole.spec, whole.shape, whole.dtype, True,
            )  # fmt: skip
            parts = not_fitting(*fitting("dequantize", spec, split, packed=True))
            check(lambda q: q.dequantize(), (whole,), (q,), parts, 1, spec)


@pytest.mark.parametrize("width", [3, 4])
def test_pack_and_unpack(width: int) -> None:
    codes = np.random.default_rng(0).integers(0, 2**width, SHAPE, np.uint8)
    packed = np.asarray(quark_jax.pack(codes, width))
    for split in SPLITS[:4]:
        check(lambda c: quark_jax.pack(c, width), (codes,), (on_mesh(codes, split),), 1, 0)
        check(lambda p: quark_jax.unpack(p, width, signed=False), (packed,), (on_mesh(packed, split),), 1, 0)


def test_chosen_by_error_needs_whole_groups() -> None:
    """A scale that isn't made from extremes: groups are gathered, over the mesh axes that cut them."""
    x = data()
    for spec, parts in ((QuantSpec("int4", PerToken()), 2), (QuantSpec("int4", PerTensor()), 8)):
        for method in ("mse", "percentile=99"):
            placed = (on_mesh(x, P("a", None, "b")),)
            check(lambda x, s=spec, m=method: quark_jax.choose_qparams(x, s, method=m), (x,), placed, parts, 2)


# ---- learned scales --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [None, 0, -1])
def test_lsq(axis: int | None) -> None:
    x = data()
    scale = np.float32(0.3) if axis is None else np.full(SHAPE[axis], 0.3, np.float32)

    def gradients(x: Any, s: Any, g: Any) -> Any:
        y, pull = jax.vjp(lambda x, s: quark_jax.lsq_quantize(x, s, quant_min=-8, quant_max=7, axis=axis), x, s)
        return y, *pull(g)

    want = numpy(jax.jit(gradients)(x, scale, GRADIENT))
    for split in SPLITS:
        placed = on_mesh(x, split), on_mesh(scale, P()), on_mesh(GRADIENT, split)
        compiled = jax.jit(gradients).lower(*placed).compile()
        assert not [g for g in gathers(compiled) if np.prod(g.shape) > scale.size]
        y, dx, ds = numpy(compiled(*placed))
        assert_bits([y, dx], want[:2])
        assert np.any(ds)
        assert np.allclose(ds, want[2], rtol=1e-4)


def test_tqt() -> None:
    x = data()

    def gradients(x: Any, t: Any, g: Any) -> Any:
        y, pull = jax.vjp(lambda x, t: quark_jax.tqt_quantize(x, t), x, t)
        return y, *pull(g)

    want = numpy(jax.jit(gradients)(x, np.float32(1.5), GRADIENT))
    for split in SPLITS:
        placed = on_mesh(x, split), on_mesh(np.float32(1.5), P()), on_mesh(GRADIENT, split)
        compiled = jax.jit(gradients).lower(*placed).compile()
        assert not gathers(compiled)
        y, dx, dt = numpy(compiled(*placed))
        assert_bits([y, dx], want[:2])
        assert dt != 0
        assert np.allclose(dt, want[2], rtol=1e-4)


# ---- random rounding -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec("int4", PerTensor(), rounding="stochastic"),
        QuantSpec("fp8_e5m2", PerToken(), rounding="stochastic"),
        QuantSpec("fp4", PerGroup(16), scale_format="e8m0", rounding="stochastic"),
        QuantSpec("fp4", PerGroup(16), scale_format="e4m3", rounding="stochastic"),
    ],
    ids=str,
)
def test_random_rounding(spec: QuantSpec) -> None:
    """Every shard draws the numbers of its place in the whole array."""
    x, seeds = data(), np.arange(2, dtype=np.uint32)

    def both(x: Any, seed: Any) -> Any:
        y, pull = jax.vjp(lambda x: quark_jax.fake_quantize(x, spec, seed=seed), x)
        return y, pull(GRADIENT), quark_jax.quantize(x, spec, seed=seed)

    for split in SPLITS:
        parts = not_fitting(*fitting("fake_quantize_dynamic", spec, split))
        check(both, (x, np.int32(7)), (on_mesh(x, split), np.int32(7)), parts, 4, spec)
        # Examples that share their data, or have their own, and a seed each.
        many = jax.vmap(lambda x, seed: quark_jax.fake_quantize(x, spec, seed=seed), (None, 0))
        check(many, (x, seeds), (on_mesh(x, split), seeds), parts, 1, spec)
    own = jax.vmap(lambda x, seed: quark_jax.fake_quantize(x, spec, seed=seed))
    check(own, (x, np.arange(16)), (on_mesh(x, P("a", "b")), np.arange(16)), 1, 0)


def test_devices_in_another_order() -> None:
    """Where a shard begins says the mesh, not the device's number."""
    order = np.array(jax.devices())[[3, 1, 7, 0, 2, 6, 5, 4]].reshape(4, 2)
    spec = QuantSpec("int4", PerTensor(), rounding="stochastic")
    x = data()
    placed = jax.device_put(x, NamedSharding(jax.sharding.Mesh(order, ("a", "b")), P("b", None, "a")))
    assert_bits(
        jax.jit(lambda x: quark_jax.fake_quantize(x, spec, seed=3))(placed),
        numpy(quark_jax.fake_quantize(x, spec, seed=3)),
    )


# ---- other meshes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [QuantSpec("int8"), QuantSpec("int8", PerGroup(16)), PRESETS["nvfp4"]], ids=str)
def test_explicit(spec: QuantSpec) -> None:
    """The type of the result says how it is cut: as the data."""
    x = strange(data())
    want = numpy(jax.jit(lambda x: quark_jax.fake_quantize(x, spec))(x))
    for split in SPLITS:
        placed = on_mesh(x, split, AxisType.Explicit)
        y = jax.jit(lambda x: quark_jax.fake_quantize(x, spec))(placed)
        assert_bits(y, want)
        assert jax.typeof(y).sharding.spec == jax.typeof(placed).sharding.spec
        assert_bits(quark_jax.fake_quantize(placed, spec), want)


def test_explicit_gradients() -> None:
    """A gradient is cut as its array is, whatever the data's type."""
    x = data()
    scale, thresholds = np.full(16, 0.3, np.float32), np.float32(1.5)

    def gradients(x: Any, s: Any, t: Any) -> Any:
        def loss(x: Any, s: Any, t: Any) -> Any:
            y = quark_jax.lsq_quantize(x, s, quant_min=-8, quant_max=7, axis=0)
            q = quark_jax.quantize(x, QuantSpec("int8", PerChannel(0)), scale=s)
            return (y + quark_jax.tqt_quantize(x, t) + q.dequantize()).sum()

        return jax.grad(loss, (0, 1, 2))(x, s, t)

    want = numpy(jax.jit(gradients)(x, scale, thresholds))
    for split in SPLITS:
        for of_scale in (P(), P("a"), P("b")):
            placed = on_mesh(x, split, AxisType.Explicit), on_mesh(scale, of_scale, AxisType.Explicit)
            dx, ds, dt = jax.jit(gradients)(*placed, on_mesh(thresholds, P(), AxisType.Explicit))
            assert_bits(dx, want[:1])
            assert np.allclose(ds, want[1], rtol=1e-4)
            assert np.allclose(dt, want[2], rtol=1e-4)


def test_shard_map_sums_scale_gradients() -> None:
    """A scale that all shards share gets the sum of their gradients."""
    x, scale = data(), np.float32(0.3)

    def loss(x: Any, s: Any) -> Any:
        return (quark_jax.lsq_quantize(x, s, quant_min=-8, quant_max=7, grad_factor=1.0) * 2).sum()

    def on_shard(x: Any, s: Any) -> Any:
        return jax.lax.psum(loss(x, s), ("a", "b"))

    whole = jax.shard_map(on_shard, mesh=mesh(), in_specs=(P("a", None, "b"), P()), out_specs=P())
    dx, ds = jax.jit(jax.grad(whole, (0, 1)))(x, scale)
    want = jax.grad(loss, (0, 1))(x, scale)
    assert_bits(dx, numpy(want[0]))
    assert ds != 0
    assert np.allclose(ds, want[1], rtol=1e-4)


def test_uneven_shards() -> None:
    """An axis that the mesh doesn't divide within jit is gathered."""
    x = data()[:14]

    def f(x: Any) -> Any:
        x = jax.lax.with_sharding_constraint(x * 1.0, NamedSharding(mesh(), P("a")))
        return quark_jax.fake_quantize(x, QuantSpec("int8", PerToken()))

    assert_bits(
        jax.jit(f)(on_mesh(x, P("b"))),
        numpy(jax.jit(lambda x: quark_jax.fake_quantize(x, QuantSpec("int8", PerToken())))(x)),
    )


def test_parts_of_mesh_axes() -> None:
    """A reshape leaves an axis cut by a part of a mesh axis: a sharding that has no name."""
    x = data()[:3, 0]
    spec = QuantSpec("int8", PerToken())

    def reshaped(x: Any) -> Any:
        return quark_jax.fake_quantize(x.reshape(3, 2, 32), spec)

    assert_bits(jax.jit(reshaped)(on_mesh(x, P(None, "a"))), numpy(jax.jit(reshaped)(x)))


def test_export_of_a_sharded_call_says_why_not() -> None:
    """Custom partitioning is Python: only shard_map's programs are serialized for several devices."""
    pytest.importorskip("flatbuffers")
    from jax import export

    x = on_mesh(data(), P("a"))
    checks = quark_jax.export_checks()
    fake = jax.jit(lambda x: quark_jax.fake_quantize(x, "int8"))
    with pytest.raises(NotImplementedError, match="serialization of host_callbacks"):
        export.export(fake, disabled_checks=checks)(x)
    run = jax.jit(jax.shard_map(fake, mesh=mesh(), in_specs=P("a"), out_specs=P("a")))
    back = export.deserialize(export.export(run, disabled_checks=checks)(x).serialize())
    assert_bits(back.call(x), numpy(run(x)))


# ---- what XLA would change -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8_e4m3", "mxint8"])
def test_least_scales(name: str, kind: AxisType) -> None:
    """2^-127, the scale of zeros, is a subnormal float32: XLA must not move it as one, even where groups are cut."""
    cube = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(kind,) * 3)
    for split in (P(None, ("a", "b", "c")), P("a", ("b", "c")), P("a")):
        q = quark_jax.quantize(jax.device_put(np.zeros((4, 64), np.float32), NamedSharding(cube, split)), name)
        assert not np.asarray(q.scale).view(np.uint8).any()
        assert not np.asarray(q.dequantize()).any()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_arrays_from_before_the_mesh(kind: AxisType) -> None:
    """Arrays on one device, used under a mesh that is set later."""
    x = jax.numpy.asarray(data())
    want = quark_jax.fake_quantize(x, "int8")
    with jax.set_mesh(jax.make_mesh((2,), ("a",), axis_types=(kind,), devices=jax.devices()[:2])):
        assert_bits(quark_jax.fake_quantize(x, "int8"), numpy(want))
        assert_bits(jax.jit(lambda x: quark_jax.fake_quantize(x, "int8"))(data()), numpy(want))
