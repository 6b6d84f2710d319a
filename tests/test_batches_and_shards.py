"""The core's words for batches and shards, and the extremes of groups: NumPy arrays straight into the module."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from math import prod

import numpy as np
import pytest

import reference
from frontends import bits
from matrix import numpy_dtype
from quark_kernels import _core
from quark_kernels.schema import OPS, OpSpec, logical_shape, outputs

SHAPE = (4, 6, 16)
FLOATS = ("float32", "float16", "bfloat16", "float64")


def run(name: str, arrays: Sequence[np.ndarray], text: str, shape: tuple[int, ...] | None = None) -> list[np.ndarray]:
    """Call an operator; the outputs start as noise."""
    op, spec = OPS[name], OpSpec.parse(text)
    if shape is None:
        shape = logical_shape(op, spec, [a.shape for a in arrays])
    outs = [
        np.frombuffer(np.random.default_rng(0).bytes(prod(size) * numpy_dtype(dtype).itemsize), numpy_dtype(dtype))
        .reshape(size)
        .copy()
        for size, dtype in outputs(op, spec, shape, arrays[0].dtype.name)
    ]
    getattr(_core, name)(tuple(arrays), tuple(outs), text)
    return outs


def assert_same(got: np.ndarray, want: np.ndarray, what: str) -> None:
    assert got.shape == want.shape, what
    assert np.array_equal(bits(got), bits(want)), what


def data(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0, special: float = 0.0) -> np.ndarray:
    """Numbers of every size; where `special`, NaN, infinities, subnormals and both zeros too."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * np.exp2(rng.integers(-9, 9, shape))
    x[rng.random(shape) < 0.1] = 0
    rare = rng.choice([np.nan, -np.nan, np.inf, -np.inf, 1e-45, -1e-40, -0.0, 3e38, -3e38], shape)
    with np.errstate(over="ignore"):
        return np.where(rng.random(shape) < special, rare, x).astype(numpy_dtype(dtype))


# ---- extremes --------------------------------------------------------------------------------------------------------

BLOCKS = ("0,0,0", "1,0,0", "0,1,0", "0,0,1", "1,1,0", "1,0,1", "1,1,1", "1,1,4", "1,1,5", "2,4,8", "1,1,999", "3,1,1")
CHOICES = (
    "int8",
    "int4 min=-7 asymmetric",
    "uint8 asymmetric",
    "fp8_e4m3",
    "bf16",
    *(f"fp4 scale=e8m0 rule={rule}" for rule in ("floor", "ceil", "even", "rceil")),
    "int8f6 scale=e8m0",
    "fp4 scale=global",
    "fp4 scale=e4m3 scales=float8_e4m3fn",
    "int8 scale=exponent",
    "int3 scale=exponent packed",
    "fp8_e5m2 rounding=stochastic",
)


def inputs_of_choice(text: str, x: np.ndarray) -> list[np.ndarray]:
    return [x, np.full((), 0.37, np.float32)] if "scale=e4m3" in text else [x]


def choice_of(ends: np.ndarray, text: str) -> list[np.ndarray]:
    """choose_qparams of extremes, seen as numbers; without their axis."""
    block = ",".join("1" * (ends.ndim - 1) + "0")
    found = run("choose_qparams", inputs_of_choice(text, ends.view(np.float32)), f"{text} block={block}")
    return [a[..., 0] for a in found]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("text", CHOICES, ids=[text.replace(" ", "_") for text in CHOICES])
def test_choosing_from_extremes(text: str, block: str, dtype: str) -> None:
    """Extremes are all that a scale needs."""
    for seed, special in ((0, 0.0), (1, 0.01), (2, 0.3), (3, 1.0)):
        x = data(SHAPE, dtype, seed, special)
        if seed == 1:
            x[1:3] = 0
        want = run("choose_qparams", inputs_of_choice(text, x), f"{text} block={block}")
        (ends,) = run("extremes", [x], f"{text} block={block}")
        for a, b in zip(choice_of(ends, text), want, strict=True):
            assert_same(a, b, f"seed {seed}")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("block", ["0,0,0", "1,0,0", "0,1,0", "1,1,0", "2,0,4", "0,1,1"])
def test_extremes_by_definition(block: str, dtype: str) -> None:
    """max(x, +0) and min(x, -0) of every group; NaN, once for each sign, where there is one."""
    lengths = [n if int(b) == 0 else int(b) for b, n in zip(block.split(","), SHAPE, strict=True)]
    for special in (0.0, 0.02, 0.5):
        x = data(SHAPE, dtype, 4, special)
        (ends,) = run("extremes", [x], f"int8 block={block}")
        for index in np.ndindex(ends.shape[:-1]):
            with np.errstate(over="ignore"):
                group = x[tuple(slice(i * n, i * n + n) for i, n in zip(index, lengths, strict=True))].astype(
                    np.float32
                )
            most, least = ends[index].view(np.float32)
            if np.isnan(group).any():
                assert ends[index].view(np.uint32).tolist() == [0x7FC00000, 0xFFC00000]
            else:
                assert most == max(group.max(), 0)
                assert least == min(group.min(), 0)
                assert (np.signbit(most), np.signbit(least)) == (False, True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("special", [0.0, 0.01, 0.3])
def test_extremes_of_parts(special: float, dtype: str) -> None:
    """A maximum over the parts of a group, as signed integers, is that of the group."""
    x = data((8, 12), dtype, 5, special)
    for block, axes in (("0,0", (0, 1)), ("1,0", (1,)), ("0,1", (0,)), ("0,4", (0,))):
        (want,) = run("extremes", [x], f"int8 block={block}")
        for axis, parts in itertools.product(axes, (2, 3, 4)):
            cuts = np.array_split(x, parts, axis)  # parts of any lengths
            shards = [run("extremes", [part], f"int8 block={block}")[0] for part in cuts]
            assert_same(np.maximum.reduce(shards), want, f"{block} along {axis}")


def test_extremes_of_nothing() -> None:
    """A group without elements has those of zeros."""
    for shape, block in (((0,), "0"), ((3, 0), "1,0"), ((0, 4), "0,1")):
        (ends,) = run("extremes", [np.zeros(shape, np.float32)], f"int8 block={block}")
        assert ends.size > 0
        assert (ends.view(np.uint32) == [0, 0x80000000]).all()
        for a, b in zip(
            choice_of(ends, "int8 asymmetric"),
            run("choose_qparams", [np.zeros(shape, np.float32)], f"int8 asymmetric block={block}"),
            strict=True,
        ):
            assert_same(a, b, block)
    assert run("extremes", [np.zeros((0, 4), np.float32)], "int8 block=1,1")[0].shape == (0, 4, 2)


def test_extremes_of_views_and_scalars() -> None:
    x = data((5, 7, 9), seed=6)
    for view in (x.T, x[::-1, ::2], np.broadcast_to(x[:, :1], (5, 3, 9)), x[0, 0, :0].reshape(1, 1, 0), x[:0]):
        for block in ("0,0,0", "1,0,0", "1,1,0", "0,2,1"):
            (got,) = run("extremes", [view], f"int8 block={block}")
            assert_same(got, run("extremes", [view.copy()], f"int8 block={block}")[0], f"{view.shape} {block}")
    (ends,) = run("extremes", [np.array(-3, np.float32)], "int8 block=")
    assert ends.view(np.float32).tolist() == [0, -3]


def test_long_groups_have_extremes() -> None:
    """In one piece, in pieces of several threads, and across rows."""
    x = data((3, 2**18 + 5), "bfloat16", 7)
    for block in ("0,0", "1,0", "1,5000", "3,131072", "0,1"):
        (ends,) = run("extremes", [x], f"int8 block={block}")
        want = run("choose_qparams", [x], f"int8 block={block}")
        assert_same(choice_of(ends, "int8")[0], want[0], block)
        threaded = np.empty_like(ends)
        _core.extremes((x,), (threaded,), f"int8 block={block}", 4)
        assert_same(threaded, ends, block)


@pytest.mark.parametrize(
    ("shape", "out", "text", "message"),
    [
        ((4, 4), (4, 2), "int8 block=1,0", r"output 0 has shape \(4, 2\); expected \(4, 1, 2\)"),
        ((4, 4), (4, 1, 2), "int8 block=0", r"block has 1 axes; the data has shape \(4, 4\)"),
        ((4,), (1, 2), "int8 block=0 method=mse", "method is for choose_qparams"),
        ((1,) * 16, (1,) * 15 + (2,), "int8 block=" + ",".join("0" * 16), "16 dimensions; extremes take at most 15"),
    ],
)
def test_wrong_extremes(shape: tuple[int, ...], out: tuple[int, ...], text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _core.extremes((np.ones(shape, np.float32),), (np.empty(out, np.int32),), text)


# ---- batches ---------------------------------------------------------------------------------------------------------

KEY = np.array([123, -456], np.int32)


def calls() -> Iterator[tuple[str, str, dict[str, np.ndarray]]]:
    """For every row a few specs, and its inputs by their letters: what one example has."""
    x, grad = data((6, 32), seed=8), data((6, 32), seed=9)
    one, rows = np.full((1, 1), 0.25, np.float32), np.linspace(0.1, 2, 6, dtype=np.float32).reshape(6, 1)
    blocks = np.full((6, 2), 0x38, np.uint8)
    g, exponents = np.array(0.3, np.float32), np.linspace(-6, 5, 12).reshape(6, 2).astype(np.int8)
    e4m3 = blocks.view(numpy_dtype("float8_e4m3fn"))
    e8m0 = (blocks + 69).view(numpy_dtype("float8_e8m0fnu"))
    z, pairs = np.arange(-3, 3, dtype=np.int32).reshape(6, 1), data((6, 2), seed=10).view(np.uint8)[:, :2].copy()
    common = {"x": x, "xx": grad, "k": KEY}
    scaled: list[tuple[str, dict[str, np.ndarray]]] = [
        ("int8 block=0,0", {"s": one}),
        ("int4 block=1,0 asymmetric packed", {"s": rows, "z": z}),
        ("fp8_e4m3 block=1,0 rounding=stochastic", {"s": rows}),
        ("fp4 block=1,16 scale=e8m0 packed", {"s": e8m0}),
        ("fp4 block=1,16 scale=e4m3 scales=float8_e4m3fn", {"s": e4m3, "g": g}),
        ("int8 block=1,16 scale=exponent rounding=stochastic", {"s": exponents}),
        ("int5 block=1,16 scale=microexponents packed", {"s": exponents, "p": pairs}),
    ]
    for text, given in scaled:
        yield "extremes", text, common
        yield "choose_qparams", text, {**common, **given}
        yield "quantize_dynamic", text, common
        yield "fake_quantize_dynamic", text, common
        yield "fake_quantize", text, {**common, **given}
        yield "fake_quantize_backward", text, {**common, **given}
        yield "quantize", text, {**common, **given}
        quantized = run("quantize", arrays_of("quantize", text, {**common, **given}), text)[0]
        yield "dequantize", text + " length=32 dtype=bfloat16", {**common, **given, "q": quantized}
        if "scale" not in text:
            yield "dequantize_backward", text, {**common, **given, "q": quantized}
        if "stochastic" not in text and ("scale" not in text or "e8m0" in text):
            yield "quantize_values", text.replace(" packed", ""), {**common, **given}
    n = np.array(0.5, np.float32)
    yield "lsq_backward", "int8 block=1,0", {**common, "s": rows, "z": z, "n": n}
    threshold = {**common, "s": np.array([0.7], np.float32), "n": np.array([[8]], np.float32)}
    yield "tqt_quantize", "int8 block=0,0", threshold
    yield "tqt_backward", "int8 block=0,0", {**threshold, "z": np.array(2, np.int32)}
    yield "convert", "codes bits=8 dtype=float16", common
    codes = np.arange(6 * 32, dtype=np.uint8).reshape(6, 32) % 8
    yield "pack", "codes bits=3 packed", {"c": codes}
    packed = run("pack", [codes], "codes bits=3 packed")[0]
    yield "unpack", "codes bits=3 packed length=32", {"q": packed}


def arrays_of(name: str, text: str, given: dict[str, np.ndarray]) -> list[np.ndarray]:
    found, seen = [], ""
    for letter in OPS[name].ins:
        if OpSpec.parse(text).takes(letter) and (letter != "z" or "z" in given):
            found.append(given["xx" if letter == "x" and "x" in seen else letter])
            seen += letter
    return found


CALLS = list(calls())
IDS = [f"{name} {text}".replace(" ", "_") for name, text, _ in CALLS]


def test_every_operator_is_here() -> None:
    assert {name for name, *_ in CALLS} == {name for name, *_ in _core.ops()}


def other(a: np.ndarray, letter: str, example: int) -> np.ndarray:
    """Another example's: the same elements in other places, or another key."""
    if letter == "k":
        return a + np.int32(example)
    if letter == "n":
        return a * np.float32(2**example)
    return np.roll(a.ravel(), 7 * example).reshape(a.shape)


@pytest.mark.parametrize("lengths", [(3,), (1,), (2, 3), (2, 1, 2)], ids=str)
@pytest.mark.parametrize(("name", "text", "given"), CALLS, ids=IDS)
def test_batches(name: str, text: str, given: dict[str, np.ndarray], lengths: tuple[int, ...]) -> None:
    """Each example is a call of its own, whichever inputs it shares, and along which axes."""
    model = arrays_of(name, text, given)
    letters = OPS[name].ins
    if len(model) < len(letters):
        letters = "".join(c for c in letters if OpSpec.parse(text).takes(c))[: len(model)]
    count = prod(lengths)
    rng = np.random.default_rng(len(text))
    for shared in ((), *((i,) for i in range(1, len(model))), tuple(range(1, len(model)))):
        batch = []
        for i, (a, letter) in enumerate(zip(model, letters, strict=True)):
            all_of_them = np.stack([other(a, letter, e) for e in range(count)]).reshape(*lengths, *a.shape)
            for axis in range(len(lengths)):
                if i in shared and (axis == 0 or rng.random() < 0.5):
                    all_of_them = all_of_them.take([0], axis)
            batch.append(all_of_them)
        got = run(name, batch, f"{text} batch={len(lengths)}")
        for index in np.ndindex(*lengths):
            one = [a[tuple(min(i, n - 1) for i, n in zip(index, a.shape, strict=False))] for a in batch]
            for whole, want in zip(got, run(name, one, text), strict=True):
                assert_same(whole[index], want, f"example {index}, shared {shared}")
        threaded = [np.zeros_like(a) for a in got]
        getattr(_core, name)(tuple(batch), tuple(threaded), f"{text} batch={len(lengths)}", 4)
        for a, b in zip(threaded, got, strict=True):
            assert_same(a, b, "threads")


@pytest.mark.parametrize(("name", "text", "given"), CALLS, ids=IDS)
def test_no_examples(name: str, text: str, given: dict[str, np.ndarray]) -> None:
    """Nothing is run, but what there would be is checked."""
    model = arrays_of(name, text, given)
    batch = [np.empty((0, *a.shape), a.dtype) for a in model]
    outs = run(name, batch, f"{text} batch=1")
    assert all(a.shape[0] == 0 for a in outs)
    with pytest.raises(ValueError, match=f"{name}: .*of one example"):
        getattr(_core, name)(
            tuple(batch), tuple(np.empty((0, 2, *a.shape[1:]), a.dtype) for a in outs), f"{text} batch=1"
        )


def test_threads_share_large_examples() -> None:
    x = data((3, 2, 2**17 + 9), seed=11)
    text = "int8 block=0,0 rounding=stochastic"
    keys = np.array([[1, 2], [3, 4], [5, 6]], np.int32)
    outs = [np.empty_like(x), np.empty((3, 1, 1), np.float32)]
    _core.fake_quantize_dynamic((x, keys), tuple(outs), text + " batch=1", 4)
    for i in range(3):
        for a, b in zip(outs, run("fake_quantize_dynamic", [x[i], keys[i]], text), strict=True):
            assert_same(a[i], b, f"example {i}")


def test_batches_in_place_and_of_any_layout() -> None:
    x = data((6, 5, 32), seed=12)
    s = np.linspace(1, 2, 6, dtype=np.float32)[:, None, None]
    text = "int8 block=0,0 batch=1"
    want = run("fake_quantize", [x, s], text)[0]
    for view in (x.copy(), x.transpose(2, 1, 0).copy().T, np.repeat(x, 2, 0)[::2], x[::-1].copy()[::-1]):
        (got,) = run("fake_quantize", [view, s], text)
        assert_same(got, want, "layout")
        _core.fake_quantize((view, s), (view,), text)
        assert_same(view, want, "in place")


@pytest.mark.parametrize(
    ("shapes", "out", "words", "message"),
    [
        (((3, 4), (2, 1)), (3, 4), "batch=1", r"input 1 has shape \(2, 1\); along batch axis 0 there are 3 examples"),
        (((3, 4), (3, 1)), (1, 4), "batch=1", r"output 0 has shape \(1, 4\); along batch axis 0 there are 3 examples"),
        (((1, 4), (1, 1)), (3, 4), "batch=1", r"output 0 has shape \(3, 4\); along batch axis 0 there are 1 examples"),
        (((3, 4), ()), (3, 4), "batch=1", r"input 1 has shape \(\); the spec has 1 batch axes"),
        (((3, 4), (3, 2)), (3, 4), "batch=1", r"input 1 has shape \(2,\); expected \(1,\) \(of one example\)"),
        (((3, 4), (3, 1)), (3, 4), "batch=2", r"block has 1 axes; the data has shape \(\) \(of one example\)"),
        (((3, 4), (3, 1)), (3, 4), "batch=17", "can't read 'batch=17'"),
        (((3, 4), (3, 1)), (3, 4), "batch=-1", "can't read 'batch=-1'"),
    ],
)
def test_wrong_batches(shapes: tuple[tuple[int, ...], ...], out: tuple[int, ...], words: str, message: str) -> None:
    inputs = tuple(np.ones(shape, np.float32) for shape in shapes)
    result = np.full(out, 7, np.float32)
    with pytest.raises(ValueError, match=message):
        _core.fake_quantize(inputs, (result,), f"int8 block=0 {words}")
    assert (result == 7).all()


def test_examples_must_not_share_memory() -> None:
    """The rules of overlap hold for whole tensors, not for one example after the other."""
    x, s, text = data((3, 8), seed=13), np.ones((3, 1), np.float32), "int8 block=0 batch=1"
    before = x.copy()
    out = np.lib.stride_tricks.as_strided(np.empty(8, np.float32), (3, 8), (0, 4))
    with pytest.raises(ValueError, match="output 0 overlaps itself"):
        _core.fake_quantize((x, s), (out,), text)
    with pytest.raises(ValueError, match="output 0 overlaps input 0"):  # the first example's is the very same
        _core.fake_quantize((x[:1], s), (x,), text)
    longer = np.zeros((4, 8), np.float32)
    with pytest.raises(ValueError, match="output 0 overlaps input 0"):  # what the next example reads
        _core.fake_quantize((longer[:3], s), (longer[1:],), text)
    with pytest.raises(ValueError, match="output 0 overlaps input 1"):
        _core.fake_quantize((x, longer[:3, :1]), (longer[:3],), text)
    assert_same(x, before, "x")
    assert not longer.any()


def test_one_wrong_example_stops_the_batch() -> None:
    x, out = np.ones((3, 4), np.float32), np.full((3, 4), 7, np.float32)
    threshold, domain = np.ones((3, 1), np.float32), np.array([[8], [8], [0.5]], np.float32)
    with pytest.raises(ValueError, match="domain is 0.5"):
        _core.tqt_quantize((x, threshold, domain), (out,), "int8 block=0 batch=1")
    assert (out == 7).all()


# ---- shards ----------------------------------------------------------------------------------------------------------

SHARDED = [
    ("fake_quantize", "int8 block=0,0,0 rounding=stochastic"),
    ("quantize", "fp8_e4m3 block=0,0,0 rounding=stochastic"),
    ("quantize", "int4 block=0,0,0 rounding=stochastic packed"),
    ("fake_quantize_backward", "int4 block=0,0,0 rounding=stochastic"),
    ("fake_quantize_dynamic", "int8 block=1,1,1 rounding=stochastic"),
    ("quantize_dynamic", "fp4 block=1,1,2 scale=e8m0 rounding=stochastic packed"),
]


def windows(shape: tuple[int, ...], step: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    starts = [range(0, n, by) for n, by in zip(shape, step, strict=True)]
    for begin in itertools.product(*starts):
        yield tuple(slice(b, min(b + by, n)) for b, by, n in zip(begin, step, shape, strict=True))


@pytest.mark.parametrize("shape", [(4, 6, 16), (3, 5, 14), (2, 1, 8), (40, 3, 26), (1, 2, 3000)], ids=str)
@pytest.mark.parametrize(("name", "text"), SHARDED, ids=[f"{n} {t}".replace(" ", "_") for n, t in SHARDED])
def test_shards_have_the_random_numbers_of_the_whole(name: str, text: str, shape: tuple[int, ...]) -> None:
    """Cut along any axes into parts of any lengths, rows of packed codes into whole bytes."""
    arrays = {"x": data(shape, "bfloat16", 14), "s": np.full((1, 1, 1), 0.9, np.float32), "k": KEY}
    arrays["xx"] = data(shape, "bfloat16", 15)
    want = run(name, arrays_of(name, text, arrays), text)
    whole = f"{text} whole={','.join(map(str, shape))}"
    parts = [{max(1, n // k) for k in (1, 2, 3)} for n in shape[:2]]
    steps = list(itertools.product(*parts, {max(2, shape[2] // k // 2 * 2) for k in (1, 2, 3)}))
    if "packed" not in text and prod(shape) < 500:
        steps += [(1, 1, 1), (2, 1, 5), (shape[0], shape[1], 1), (1, shape[1], 7)]
    for step in steps:
        for place in windows(shape, step):
            key = np.concatenate([KEY, np.array([s.start for s in place], np.int32)])
            shard = {**arrays, "x": arrays["x"][place], "xx": arrays["xx"][place], "k": key}
            got = run(name, arrays_of(name, text, shard), whole)
            at = place
            if "packed" in text:
                at = (*place[:2], slice(place[2].start // 2, (place[2].stop + 1) // 2))
            assert_same(got[0], want[0][at], f"{place}")


def test_shards_of_arrays_beyond_32_bits() -> None:
    """Word i of a shard is that of i in the whole array, by the generator's definition."""
    rows, columns, at = 2**33, 5, (2**31 - 3, 2)
    x = np.full((3, 3), 0.5, np.float32)
    key = np.array([*KEY, *at], np.int32)
    (got,) = run(
        "fake_quantize",
        [x, np.ones((1, 1), np.float32), key],
        f"int8 block=0,0 rounding=stochastic whole={rows},{columns}",
    )
    seed = tuple(int(k) % 2**32 for k in KEY)
    for r, c in np.ndindex(3, 3):
        i = (at[0] + r) * columns + at[1] + c
        word = reference.philox((i // 4 % 2**32, i // 4 >> 32, 0, 0), seed)[i % 4]
        assert got[r, c] == (word < 2**31)


def test_batches_of_shards() -> None:
    """Each example is a shard of an array of its own; one key serves all or each has one."""
    x, s = data((3, 4, 6), seed=16), np.ones((1, 1, 1), np.float32)
    text = "int8 block=0,0 rounding=stochastic whole=8,12"
    own = np.array([[1, 2, 0, 0], [1, 2, 4, 6], [5, 6, 3, 1]], np.int32)
    for keys in (own, own[1:2]):
        (got,) = run("fake_quantize", [x, s, keys], text + " batch=1")
        for i in range(3):
            want = run("fake_quantize", [x[i], s[0], keys[min(i, len(keys) - 1)]], text)[0]
            assert_same(got[i], want, f"example {i}")
    out = np.full((3, 4, 6), 7, np.float32)
    own[2, 3] = 7
    with pytest.raises(ValueError, match="input 2 places the shard at 7 along axis 1"):
        _core.fake_quantize((x, s, own), (out,), text + " batch=1")
    assert (out == 7).all()


@pytest.mark.parametrize("begin", [(5, 0), (0, 4), (-1, 0), (0, -(2**31)), (2**31 - 1, 0), (8, 0)])
def test_shards_outside(begin: tuple[int, int]) -> None:
    out, key = np.full((4, 6), 7, np.float32), np.array([1, 2, *begin], np.int32)
    inputs = (np.ones((4, 6), np.float32), np.ones((1, 1), np.float32), key)
    with pytest.raises(
        ValueError, match=r"input 2 places the shard at .* its shape is \(4, 6\), the whole .* \(8, 9\)"
    ):
        _core.fake_quantize(inputs, (out,), "int8 block=0,0 rounding=stochastic whole=8,9")
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int8 block=0,0 whole=8,9", "needs rounding=stochastic"),
        ("int8 block=0,0 rounding=stochastic whole=8", "whole has 1 axes, block 2"),
        ("int8 block=0,0 rounding=stochastic whole=8,-9", "lengths must be integers >= 0"),
        ("int8 block=0,0 rounding=stochastic whole=4294967296,4294967296", "whole has too many elements"),
        ("int8 block=0,0 rounding=stochastic", r"input 2 has shape \(4,\); expected \(2,\)"),
    ],
)
def test_wrong_wholes(text: str, message: str) -> None:
    x, s, key = np.ones((4, 6), np.float32), np.ones((1, 1), np.float32), np.zeros(4, np.int32)
    with pytest.raises(ValueError, match=message):
        _core.fake_quantize((x, s, key), (np.empty_like(x),), text)


# ---- packed codes without a length -----------------------------------------------------------------------------------


def test_packed_codes_need_no_length_beside_the_data() -> None:
    """Where data comes in or goes out, its last axis says it all; a length that is there must be the same."""
    x, s = data((3, 7), seed=17), np.ones((3, 1), np.float32)
    text = "int3 block=1,0 packed"
    (codes,) = run("quantize", [x, s], text)
    assert_same(codes, run("quantize", [x, s], text + " length=7")[0], "codes")
    assert_same(run("quantize_dynamic", [x], text)[0], run("quantize_dynamic", [x], text + " length=7")[0], "codes")
    y = [run("dequantize", [codes, s], words + " dtype=float32", (3, 7))[0] for words in (text, text + " length=7")]
    assert_same(y[0], y[1], "values")
    assert_same(y[0], run("fake_quantize", [x, s], "int3 block=1,0")[0], "values")
    numbers = np.arange(21, dtype=np.uint8).reshape(3, 7) % 8
    (packed,) = run("pack", [numbers], "codes bits=3 packed")
    assert_same(packed, run("pack", [numbers], "codes bits=3 packed length=7")[0], "pack")
    assert_same(run("unpack", [packed], "codes bits=3 packed", (3, 7))[0], numbers, "unpack")
    with pytest.raises(ValueError, match=r"length is 8; the data has shape \(3, 7\)"):
        run("quantize", [x, s], text + " length=8")
