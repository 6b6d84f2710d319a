"""The rules for batches and shards, on the core alone: NumPy arrays are cut by hand, as a framework would cut them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import pytest

from frontends import bits
from matrix import numpy_dtype
from quark_kernels import PerBlock, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec, _core, rules
from quark_kernels.schema import OPS, OpSpec, QParams, codes_spec, given, logical_shape, made, op_spec, outputs, qparams
from quark_kernels.spec import PRESETS

MESH = {"a": 4, "b": 2}
SHAPE = (16, 8, 64)
SPLITS: tuple[rules.Split, ...] = (
    ((), (), ()),
    (("a",), (), ("b",)),
    (("b",), ("a",), ()),
    ((), ("b",), ("a",)),
    (("a", "b"), (), ()),
    ((), (), ("b", "a")),
)
GRANULARITIES = (
    PerTensor(),
    PerChannel(0),
    PerChannel(-1),
    PerToken(),
    PerGroup(16),
    PerGroup(4, 1),
    PerBlock((2, 16)),
)


def run(name: str, arrays: Sequence[Any], spec: OpSpec) -> list[np.ndarray]:
    """Call the core; None is left out."""
    present = [a for a in arrays if a is not None]
    op = OPS[name]
    shape = logical_shape(op, spec, [a.shape for a in present])
    outs = [np.empty(size, numpy_dtype(dtype)) for size, dtype in outputs(op, spec, shape, present[0].dtype.name)]
    getattr(_core, name)(tuple(present), tuple(outs), spec.text)
    return outs


def data(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> np.ndarray:
    """Numbers of every size, subnormals and zeros."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * np.exp2(rng.integers(-9, 9, shape))
    x[rng.random(shape) < 0.1] = 0
    x[rng.random(shape) < 0.05] = 1e-40
    return x.astype(numpy_dtype(dtype))


def key(seed: int) -> np.ndarray:
    return np.array([seed], "<u8").view(np.int32)


def inputs(name: str, spec: OpSpec, x: np.ndarray) -> tuple[list[np.ndarray], str]:
    """What an operator takes for this data, and its letters."""
    params = qparams("choose_qparams", spec, _choose(x, spec.choosing()))
    if spec.has_global_scale:
        params = params._replace(global_scale=_choose(x, spec.choosing().global_spec())[0].reshape(()))
    values = {
        "s": params.scale,
        "g": params.global_scale,
        "p": params.pair_bits,
        "z": params.zero_point,
        "k": key(12345678901234567),
        "n": np.full((), 8 if name.startswith("tqt") else 0.25, np.float32),
        "x": x,
    }
    op = OPS[name]
    if "q" in op.ins:
        operands = [x, *params._replace(key=values["k"] if spec.takes("k") else None)]
        (values["q"],) = run("quantize", operands, replace(spec, dtype=None))
    arrays, kinds = [], ""
    for kind in op.ins:
        if not spec.takes(kind) or (kind == "z" and params.zero_point is None):
            continue
        if name == "choose_qparams" and kind == "g" and spec.words[-1] == "scale=global":
            continue
        if kind == "x" and "x" in kinds:  # a gradient
            arrays.append(data(x.shape, x.dtype.name, seed=7))
        else:
            arrays.append(values[kind])
        kinds += kind
    return arrays, kinds


def _choose(x: np.ndarray, spec: OpSpec) -> list[np.ndarray]:
    whole = None
    if spec.has_global_scale:
        whole = _choose(x, spec.global_spec())[0].reshape(())
    return run("choose_qparams", [x, whole], spec)


# ---- shards ----------------------------------------------------------------------------------------------------------


def devices() -> Iterator[dict[str, int]]:
    for index in itertools.product(*(range(n) for n in MESH.values())):
        yield dict(zip(MESH, index, strict=True))


def window(shape: Sequence[int], split: rules.Split, at: dict[str, int]) -> tuple[slice, ...]:
    """What of an array lies on a device."""
    found = []
    for n, axes in zip(shape, split, strict=True):
        parts, index = 1, 0
        for axis in axes:
            parts, index = parts * MESH[axis], index * MESH[axis] + at[axis]
        assert n % parts == 0
        found.append(slice(index * n // parts, (index + 1) * n // parts))
    return tuple(found)


class Devices:
    """An array's shards, one for each device of the mesh."""

    def __init__(self, shards: list[Any]) -> None:
        self.shards = shards

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shards[0].shape

    def reshape(self, shape: tuple[int, ...]) -> Devices:
        return Devices([s.reshape(shape) for s in self.shards])


def cut(a: np.ndarray, split: rules.Split) -> Devices:
    return Devices([a[window(a.shape, split, at)] for at in devices()])


def broadcast(a: Devices, shape: tuple[int, ...]) -> Devices:
    return Devices([np.broadcast_to(shard, shape) for shard in a.shards])


def combined(a: Devices, axes: Sequence[Any], function: Any) -> Devices:
    """Every shard combined with those that differ from it along these mesh axes only."""
    places = list(devices())
    groups = [
        [
            other
            for other, to in zip(a.shards, places, strict=True)
            if all(at[m] == to[m] for m in MESH if m not in axes)
        ]
        for at in places
    ]
    return Devices([function(group) for group in groups])


def sharded(name: str, spec: OpSpec, arrays: list[np.ndarray], kinds: str, asked: rules.Split) -> list[np.ndarray]:
    """Call an operator on shards as the rules say, and put the results together."""
    op = OPS[name]
    shape = logical_shape(op, spec, [a.shape for a in arrays])
    split = rules.fit(op, spec, shape, asked, MESH)
    local = rules.shard_spec(spec, shape, split, MESH)
    operands: dict[str, list[Devices]] = {kind: [] for kind in kinds}
    for kind, a in zip(kinds, arrays, strict=True):
        parts = cut(a, rules.split_of(kind, spec, shape, split, a.shape))
        if kind == "k" and local.whole is not None:
            begins = [[s.start for s in window(shape, split, at)] for at in devices()]
            places = [np.array(b[spec.batch :], np.int32) for b in begins]
            parts = Devices([np.concatenate([a, np.broadcast_to(p, (*a.shape[:-1], p.size))], -1) for p in places])
        operands[kind].append(parts)

    def on_shards(name: str, arguments: Sequence[Any], spec: OpSpec) -> list[Devices]:
        results = [
            run(name, [None if a is None else a.shards[i] for a in arguments], spec) for i in range(prod(MESH.values()))
        ]
        return [Devices(list(shards)) for shards in zip(*results, strict=True)]

    if rules.needs_stages(op, spec, shape, split):

        def extremes(x: Devices, spec: OpSpec) -> Devices:
            (ends,) = on_shards("extremes", [x], spec)
            most = combined(ends, rules.shared_axes(spec, shape, split), np.maximum.reduce)
            return Devices([e.view(np.float32) for e in most.shards])

        params = QParams(
            **{field: operands[kind][0] for kind, field in (("g", "global_scale"), ("k", "key")) if kind in operands}
        )
        outs = rules.staged(op, local, params, operands["x"][0], on_shards, extremes, broadcast)
    else:
        outs = on_shards(name, [parts for kind in dict.fromkeys(kinds) for parts in operands[kind]], local)
    results = []
    for kind, parts, (size, dtype) in zip(
        made(op, spec), outs, outputs(op, spec, shape, arrays[0].dtype.name), strict=True
    ):
        if kind in rules.SCALES and op.combine is not None:
            over = rules.shared_axes(spec, shape, split)
            parts = combined(parts, over, np.maximum.reduce if op.combine == "max" else sum)
        whole = np.empty(size, numpy_dtype(dtype))
        seen = np.zeros(size, bool)
        for at, shard in zip(devices(), parts.shards, strict=True):
            place = window(size, rules.split_of(kind, spec, shape, split, size), at)
            assert shard.shape == whole[place].shape, (kind, shard.shape, whole[place].shape)
            assert not seen[place].any() or np.array_equal(bits(whole[place]), bits(shard)), f"{kind} differs"
            whole[place], seen[place] = shard, True
        assert seen.all()
        results.append(whole)
    return results


def specs() -> Iterator[OpSpec]:
    for granularity in GRANULARITIES:
        for preset in ("int8", "uint4", "fp8_e4m3"):
            spec = PRESETS[preset]
            yield op_spec(QuantSpec(spec.format, granularity, symmetric=spec.symmetric), SHAPE)
        yield op_spec(QuantSpec("fp4", granularity, scale_format="e8m0"), SHAPE, packed=True)
        yield op_spec(QuantSpec("int4", granularity, rounding="stochastic"), SHAPE)
    for preset in ("mxfp4", "nvfp4", "mx6", "mx9", "bfp16", "mxint8"):
        yield op_spec(PRESETS[preset], SHAPE)
    yield op_spec(PRESETS["nvfp4"], SHAPE, packed=True)
    yield op_spec(QuantSpec("fp4", PerTensor(), scale_format="e4m3", rounding="stochastic"), SHAPE)
    yield op_spec(QuantSpec("fp6_e2m3", PerGroup(32), scale_format="e8m0", rounding="stochastic"), SHAPE)
    yield op_spec(PRESETS["int3"], SHAPE, packed=True)


def fits(name: str, spec: OpSpec) -> bool:
    """Whether an operator takes a spec."""
    op = OPS[name]
    is_float32 = spec.has_float32_scales
    if name in ("pack", "unpack", "convert", "quantize_values"):
        return False
    if name.startswith(("lsq", "tqt")):
        is_one = all(b == 0 for b in spec.block or ())
        is_integer = spec.words[0].startswith(("int", "uint"))
        return (
            is_float32 and is_integer and not spec.takes("k") and (is_one or not op.has_one_scale) and not spec.packed
        )
    return name != "dequantize_backward" or is_float32


def told(name: str, spec: OpSpec) -> OpSpec:
    """The spec as a call of this operator has it: where no data comes in, with the dtype of what comes out."""
    return spec if "x" in OPS[name].ins else replace(spec, dtype="bfloat16")


CALLS = [(name, told(name, spec)) for name in OPS for spec in specs() if fits(name, spec)]


@pytest.mark.parametrize(("name", "spec"), CALLS, ids=[f"{name} {spec}".replace(" ", "_") for name, spec in CALLS])
def test_shards(name: str, spec: OpSpec) -> None:
    """Shards of an array give the bits of the array, however the mesh cuts it; sums only nearly."""
    arrays, kinds = inputs(name, spec, data(SHAPE))
    want = run(name, arrays, spec)
    for split in SPLITS:
        got = sharded(name, spec, arrays, kinds, split)
        for kind, a, b in zip(made(OPS[name], spec), want, got, strict=True):
            if OPS[name].combine == "sum" and kind == "s":
                assert np.allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(a).max())
            else:
                assert np.array_equal(bits(a), bits(b)), f"{kind} with {split}"


@pytest.mark.parametrize("name", ["fake_quantize_dynamic", "quantize_dynamic"])
@pytest.mark.parametrize("scale_format", ["float32", "e4m3"])
def test_shards_of_a_batch_of_keys(name: str, scale_format: str) -> None:
    """Examples that share their data have scales each, as without shards."""
    spec = op_spec(QuantSpec("fp4", PerTensor(), scale_format=scale_format, rounding="stochastic"), SHAPE)
    spec = replace(spec, batch=1)
    arrays = [data(SHAPE)[None], np.stack([key(seed) for seed in range(3)])]
    want = run(name, arrays, spec)
    for split in SPLITS:
        for a, b in zip(want, sharded(name, spec, arrays, "xk", ((), *split)), strict=True):
            assert np.array_equal(bits(a), bits(b)), split


def test_fit_keeps_what_it_can() -> None:
    """Mesh axes that leave whole groups stay; of the others the outer ones do, as far as they fit."""
    fit = rules.fit
    quantize, choose, dynamic = OPS["quantize"], OPS["choose_qparams"], OPS["quantize_dynamic"]
    group = op_spec(QuantSpec("int8", PerGroup(16)), SHAPE)
    assert fit(quantize, group, SHAPE, ((), (), ("a",)), MESH) == ((), (), ("a",))
    assert fit(quantize, group, SHAPE, ((), (), ("b", "a")), MESH) == ((), (), ("b",))
    assert fit(quantize, group, SHAPE, ((), (), ("a", "b")), MESH) == ((), (), ("a",))
    for op in (quantize, choose, dynamic):
        assert fit(op, op_spec(PRESETS["int8"], SHAPE), SHAPE, SPLITS[1], MESH) == SPLITS[1]
    by_error = op_spec(PRESETS["int8"], SHAPE).choosing("mse")
    assert fit(choose, by_error, SHAPE, SPLITS[1], MESH) == ((), (), ())
    tokens = op_spec(QuantSpec("int8", PerToken()), SHAPE).choosing("mse")
    assert fit(choose, tokens, SHAPE, SPLITS[1], MESH) == (("a",), (), ())
    pairs = op_spec(PRESETS["mx6"], (16, 48))
    assert fit(dynamic, pairs, (16, 48), ((), ("b",)), MESH) == ((), ())
    odd = op_spec(PRESETS["int8"], (5, 6))
    assert fit(quantize, odd, (5, 6), (("b",), ()), MESH) == ((), ())
    assert fit(quantize, odd, (5, 6), (("b",), ()), MESH, even=False) == (("b",), ())
    packed = op_spec(PRESETS["int4"], (4, 12), packed=True)
    assert fit(quantize, packed, (4, 12), ((), ("a",)), MESH) == ((), ())  # 3 codes: half a byte
    assert fit(quantize, packed, (4, 12), ((), ("b",)), MESH) == ((), ("b",))
    assert fit(quantize, packed, (4, 12), ((), ("b",)), MESH, same_spec=True) == ((), ())


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "spec"), CALLS, ids=[f"{name} {spec}".replace(" ", "_") for name, spec in CALLS])
def test_batches(name: str, spec: OpSpec) -> None:
    """One call for a batch gives what a call for each example gives, whichever inputs the examples share."""
    op, size = OPS[name], 3
    examples = [inputs(name, spec, data(SHAPE, seed=i)) for i in range(size)]
    kinds = examples[0][1]
    assert given(op, spec, len(kinds)) == kinds
    for shared in (None, *range(len(kinds))):
        is_batched = [i != shared for i in range(len(kinds))]
        calls = [
            [arrays[i] if own else examples[0][0][i] for i, own in enumerate(is_batched)] for arrays, _ in examples
        ]
        if not any(is_batched):
            continue
        want = [run(name, arrays, spec) for arrays in calls]
        whole, leading = rules.batched(op, spec, kinds, is_batched, size)
        together = []
        for i, (own, n) in enumerate(zip(is_batched, leading, strict=True)):
            a = np.stack([arrays[i] for arrays in calls]) if own else calls[0][i]
            together.append(a if own or n is None else np.broadcast_to(a, (n, *np.shape(a))))
        got = run(name, together, whole)
        for n, kind in enumerate(made(op, spec)):
            expected = np.stack([outs[n] for outs in want])
            assert got[n].shape == expected.shape
            assert np.array_equal(bits(got[n]), bits(expected)), f"{kind}, shared: {shared}"


@pytest.mark.parametrize("width", [3, 4, 8])
def test_batches_of_codes(width: int) -> None:
    """pack and unpack take any number of axes before the last."""
    codes = np.random.default_rng(0).integers(0, 2**width, (3, 5, 7), np.uint8)
    spec = codes_spec(width, length=7)
    for name, a in (("pack", codes), ("unpack", run("pack", [codes], spec)[0])):
        whole, leading = rules.batched(OPS[name], spec, OPS[name].ins, [True], 3)
        assert leading == [3]
        (got,) = run(name, [a], whole)
        assert np.array_equal(got, np.stack([run(name, [example], spec)[0] for example in a]))
