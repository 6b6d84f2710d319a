"""Stochastic rounding: which words, where they go, that they are the same everywhere, and that the mean is right."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import reference
from frontends import bits
from matrix import BLOCKED, SCALED, STOCHASTIC, Case, filled, numpy_dtype
from quark_kernels import PRESETS, PerGroup, PerTensor, QuantSpec
from test_blocks import assert_stored, with_x
from test_forward import assert_same, skip_layouts

INT8 = QuantSpec("int8", rounding="stochastic")
X = filled("near", np.random.default_rng(0), 6 * 70, np.dtype(np.float32)).reshape(6, 70)


def expected(seed: int, x: np.ndarray = X, spec: QuantSpec = INT8) -> np.ndarray:
    return with_x(Case(spec, x.shape, x.dtype.name, seed=seed), x).fake_quantized


# ---- the words -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    """Those of the generator's authors: Random123's kat_vectors."""
    assert tuple(reference.philox(counter, key)) == words


def test_words_go_by_the_row_major_index() -> None:
    words = reference.random_words(0, (3, 5))
    assert words.ravel()[:4].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words[2, 3] == reference.philox((13 // 4, 0, 0, 0), (0, 0))[13 % 4]
    assert_same(reference.random_words(-1, (7,)), reference.random_words(2**64 - 1, (7,)), "words")
    assert_same(
        reference.random_words(5 + (9 << 32), (4,)), reference.philox((0, 0, 0, 0), (5, 9)), "words of a 64-bit seed"
    )


def test_a_word_below_the_fraction_rounds_up() -> None:
    """0.75 is 0xC0000000 of 2^32: that word itself rounds down, the one before it up; on the magnitude."""
    words = np.array([0, 0xBFFFFFFF, 0xC0000000, 0xFFFFFFFF], np.uint32)
    for fmt in ("int8", "fp4", "fp8_e4m3"):
        for x in (0.75, -0.75):
            value = x * (0.5 if fmt == "fp4" else 2.0**-9 if fmt == "fp8_e4m3" else 1)  # grid points 0 and 1
            codes = reference.quantize(np.full(4, value), fmt, 1.0, words=words)
            magnitudes = np.abs(codes) if fmt == "int8" else codes & (2 ** (reference.FORMATS[fmt].bits - 1) - 1)
            assert magnitudes.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("sign", [1, -1])
def test_fractions_that_are_the_word(sign: int, framework: Any) -> None:
    """Where a word is a float32 fraction, that very fraction rounds down and the next one up."""
    words = reference.random_words(21, (200_000,))
    fraction = np.where(words % 256 == 0, words, 0).astype(np.float32) * np.float32(2.0**-32)
    taken = fraction >= 0.5  # so the next one is 2^-24 more
    assert taken.sum() > 300
    for x, expected_size in ((fraction, 0), (np.nextafter(fraction, np.float32(2)), 1)):
        q = framework.api.quantize(framework.array(x * np.float32(sign)), INT8, scale=1.0, seed=21)
        assert (framework.numpy(q.qvalue)[taken] == sign * expected_size).all()


# ---- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", STOCHASTIC, ids=str)
def test_forward(case: Case, frontend: Any) -> None:
    skip_layouts(frontend, case)
    assert_stored(frontend.stored(case), case.stored)
    assert_same(bits(frontend.fake_quantize(case)), case.fake_quantized, "fake-quantized numbers")
    assert_same(bits(frontend.dequantize(case, case.dtype)), case.dequantized(case.dtype), "dequantized numbers")


@pytest.mark.parametrize("case", STOCHASTIC[::2], ids=str)
def test_clipped_gradient(case: Case, frontend: Any) -> None:
    """Beyond the last value the words decide whether the gradient passes."""
    skip_layouts(frontend, case)
    through = case.gradient.astype(np.float32).astype(numpy_dtype(case.dtype))
    wanted = np.where(case.passes, through, np.zeros((), through.dtype))
    assert_same(bits(frontend.clipped_gradient(case)), bits(wanted), "gradients")


def test_words_decide_at_the_end_of_the_range(framework: Any) -> None:
    x = np.full((1, 512), 127.25, np.float32)
    case = with_x(Case(INT8, x.shape, seed=3, given=True), x)
    case.__dict__["scale"] = np.ones((1, 1), np.float32)
    passed = framework.clipped_gradient(case) != 0
    assert_same(passed, case.passes, "where the gradient passes")
    assert 0.6 < passed.mean() < 0.9
    assert_same(framework.fake_quantize(case), np.full_like(x, 127), "numbers")


# ---- seeds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**32 - 1, 2**32, -(2**63), 2**63 - 1, 2**63, 2**64 - 1])
def test_python_seeds(seed: int, framework: Any) -> None:
    got = framework.numpy(framework.api.fake_quantize(framework.array(X), INT8, seed=seed))
    assert_same(bits(got), expected(seed), "numbers")


INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_array_seeds(dtype: str, shape: tuple[int, ...], framework: Any) -> None:
    """Unsigned ones are extended by zeros, signed ones by their sign."""
    import contextlib

    context: Any = contextlib.nullcontext()
    if framework.name == "jax" and "64" in dtype:
        import jax

        context = jax.enable_x64(True)
    for seed in (77, np.iinfo(dtype).max, np.iinfo(dtype).min):
        with context:
            array = framework.array(np.full(shape, seed, dtype))
            got = framework.numpy(framework.api.fake_quantize(framework.array(X), INT8, seed=array))
        assert_same(bits(got), expected(int(seed)), f"numbers with seed {seed}")


@pytest.mark.parametrize("name", ["int8", "fp4", "mxfp4", "mx6", "nvfp4", "bfp16"])
def test_traced_seeds(name: str, jax_frontend: Any) -> None:
    """A new seed compiles nothing anew, whether from a key or as a number; eager, jit and the oracle agree."""
    import jax

    spec = replace(PRESETS[name], rounding="stochastic")
    api = jax_frontend.api
    traces = []

    @jax.jit
    def run(x: Any, seed: Any) -> Any:
        traces.append(seed)
        return api.fake_quantize(x, spec, seed=seed)

    for key in range(4):
        seed = jax.random.bits(jax.random.key(key), dtype="uint32")
        got = run(X, seed)
        wanted = expected(int(seed), spec=spec)
        assert_same(bits(np.asarray(got)), wanted, "numbers under jit")
        assert_same(bits(np.asarray(api.fake_quantize(X, spec, seed=seed))), wanted, "eager numbers")
        assert_same(bits(np.asarray(api.fake_quantize(X, spec, seed=int(seed)))), wanted, "numbers of an int")
    assert len(traces) == 1


def test_traced_gradient(jax_frontend: Any) -> None:
    """The seed is traced, takes no gradient, and the mask has the same words."""
    import jax

    spec = replace(INT8, granularity=PerGroup(14))
    case = Case(spec, given=True, seed=99)
    scale = case.scale

    @jax.jit
    def gradient(x: Any, g: Any, seed: Any) -> Any:
        return jax.vjp(lambda x: jax_frontend.api.fake_quantize(x, spec, scale=scale, seed=seed), x)[1](g)[0]

    got = np.asarray(gradient(case.x, case.gradient, np.uint32(99)))
    assert_same(bits(got), bits(np.where(case.passes, case.gradient, np.float32(0))), "gradients")


def test_vmap(jax_frontend: Any) -> None:
    """Each example counts from 0; it has the common seed, or its own."""
    import jax

    def f(x: Any, seed: Any) -> Any:
        return jax_frontend.api.fake_quantize(x, INT8, seed=seed)

    x, seeds = np.stack([X, X * 2, -X]), np.array([1, 2, 3], np.uint32)
    common, own = np.asarray(jax.vmap(f, (0, None))(x, seeds[0])), np.asarray(jax.vmap(f)(x, seeds))
    alike = np.asarray(jax.vmap(f, (None, 0))(X, seeds))
    for i in range(3):
        assert_same(bits(common[i]), expected(1, x[i]), "numbers with a common seed")
        assert_same(bits(own[i]), expected(i + 1, x[i]), "numbers with seeds of their own")
        assert_same(bits(alike[i]), expected(i + 1), "numbers of one x with several seeds")


def test_sharded(jax_frontend: Any) -> None:
    """The index is that in the whole array, however it is laid out on devices."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices = jax.devices()
    if len(devices) < 2:
        pytest.skip("one device")
    mesh = Mesh(np.array(devices[:2]), ("a",))
    for spec in (INT8, replace(PRESETS["mxfp4"], rounding="stochastic")):
        f = jax.jit(lambda x, spec=spec: jax_frontend.api.fake_quantize(x, spec, seed=12))
        for where in (PartitionSpec("a"), PartitionSpec(None, "a")):
            x = jax.device_put(X, NamedSharding(mesh, where))
            assert_same(bits(np.asarray(f(x))), expected(12, spec=spec), "numbers")


# ---- threads and layouts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int8", "int4", "mxfp4", "mx9", "nvfp4", "bfp16"])
def test_any_number_of_threads(name: str, torch_frontend: Any) -> None:
    """Enough for several chunks, of a length that no chunk divides."""
    import torch

    x = filled("near", np.random.default_rng(0), 301 * 1003, np.dtype(np.float32)).reshape(301, 1003)
    case = with_x(Case(replace(PRESETS[name], rounding="stochastic"), x.shape, seed=2**40 + 1), x)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            assert_stored(torch_frontend.stored(case), case.stored)
            assert_same(bits(torch_frontend.fake_quantize(case)), case.fake_quantized, f"numbers, {threads} threads")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", BLOCKED)
def test_seeds_change_roundings_not_scales(name: str, framework: Any) -> None:
    spec = replace(PRESETS[name], rounding="stochastic")
    one, two = (framework.stored(with_x(Case(spec, X.shape, seed=seed), X)) for seed in (1, 2))
    assert 0.05 < (one.pop("qvalue") != two.pop("qvalue")).mean() < 0.9
    for part, array in one.items():
        assert_same(bits(array), bits(two[part]), part)


# ---- the mean --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SCALED, *BLOCKED])
def test_the_mean_is_x(name: str, framework: Any) -> None:
    """A result is one of x's two neighbours on the grid, so its deviation is at most half their distance.

    Then the mean of n independent ones lies within 5 * (distance / 2) / sqrt(n) of x, but once in 1.7 million means;
    there are 48 a preset. Fractions are cut to 32 bits, which moves the mean by 2^-32 of the distance at most.
    """
    n, rows = 4096, 48
    preset = PRESETS[name]
    values = np.random.default_rng(1).uniform(0.2, 1, rows).astype(np.float32)
    values[::3] *= np.float32(-1)
    values[::4] /= np.float32(64)  # subnormals of the narrow formats
    x = np.repeat(values, n).reshape(rows, n)
    x[:, ::2] = 1  # the largest in every group, exact in every format
    if name.startswith("uint"):
        x = np.abs(x)
    if preset.granularity != PerTensor():
        pairs = np.repeat(values, n // 2).reshape(rows, n // 2)
        x[:, 1::2] = np.abs(pairs) if name.startswith("uint") else pairs
    stochastic = framework.api.fake_quantize(framework.array(x), replace(preset, rounding="stochastic"), seed=1)
    below, above = (
        framework.numpy(framework.api.fake_quantize(framework.array(x), replace(preset, rounding=rounding)))
        for rounding in ("floor", "ceil")
    )
    got = framework.numpy(stochastic)
    assert ((got == below) | (got == above)).all()
    mean = got[:, 1::2].astype(np.float64).mean(axis=1)
    distance = (above - below)[:, 1].astype(np.float64)
    off = np.abs(mean - x[:, 1])
    assert (off <= 5 * (distance / 2) / math.sqrt(n // 2) + distance * 2.0**-32).all(), (off / distance).max()
    nearest = framework.numpy(framework.api.fake_quantize(framework.array(x), preset))[:, 1]
    if preset.element.bits < 16:
        assert np.abs(nearest - x[:, 1]).max() > 3 * off.max(), "stochastic means beat rounding to nearest"


def test_seeds_are_independent(framework: Any) -> None:
    """Over 2,000 seeds one element rounds up as often as its fraction says (5 sigma), and no two seeds are alike."""
    x = np.array([[1.0, *np.linspace(0.05, 0.95, 19) / 127]], np.float32)
    up = []
    for seed in range(2000):
        q = framework.api.quantize(framework.array(x), INT8, seed=seed)
        up.append(framework.numpy(q.qvalue)[0, 1:])
    rate, fraction = np.mean(up, axis=0), np.linspace(0.05, 0.95, 19)
    assert (np.abs(rate - fraction) <= 5 * 0.5 / math.sqrt(2000)).all()
    assert np.abs(np.corrcoef(np.array(up).T) - np.eye(19)).max() < 5 / math.sqrt(2000)


# ---- wrong calls -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["quantize", "fake_quantize"])
def test_a_seed_goes_with_stochastic(function: str, framework: Any) -> None:
    f, x = getattr(framework.api, function), framework.array(X)
    with pytest.raises(ValueError, match="seed"):
        f(x, INT8)
    with pytest.raises(ValueError, match="seed"):
        f(x, "int8", seed=1)


@pytest.mark.parametrize(
    ("seed", "error"),
    [
        (1.0, TypeError),
        ("1", TypeError),
        (True, TypeError),
        (-(2**63) - 1, ValueError),
        (2**64, ValueError),
        (np.ones(2, np.int32), ValueError),
        (np.ones(0, np.int32), ValueError),
        (np.ones((), np.float32), TypeError),
        (np.ones((), bool), TypeError),
    ],
    ids=repr,
)
def test_wrong_seeds(seed: Any, error: Any, framework: Any) -> None:
    if isinstance(seed, np.ndarray):
        if framework.name == "torch":
            import torch

            seed = torch.tensor(seed)
        else:
            seed = framework.array(seed)
    for function in (framework.api.quantize, framework.api.fake_quantize):
        with pytest.raises(error, match="seed"):
            function(framework.array(X), INT8, seed=seed)


def test_who_refuses_stochastic(framework: Any) -> None:
    x, one = framework.array(X), framework.array(np.ones((), np.float32))
    with pytest.raises(ValueError, match="rounding"):
        framework.api.lsq_quantize(x, one, quant_min=-8, quant_max=7, rounding="stochastic")
    with pytest.raises(ValueError, match="rounding"):
        framework.api.tqt_quantize(x, one, rounding="stochastic")
    with pytest.raises(ValueError, match="bf16"):
        QuantSpec("bf16", rounding="stochastic")


def test_choose_qparams_needs_no_seed(framework: Any) -> None:
    for name in ("int8", "mxfp4", "nvfp4", "mx6", "bfp16"):
        x = framework.array(X)
        plain, _ = framework.api.choose_qparams(x, name)
        scale, _ = framework.api.choose_qparams(x, replace(PRESETS[name], rounding="stochastic"))
        assert_same(bits(framework.numpy(scale)), bits(framework.numpy(plain)), "scales")
