"""Block formats: power-of-two, two-level and shared scales, in everyday functions; against the oracle, bit for bit."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import reference
from frontends import Core, bits
from matrix import BLOCKED, BLOCKS, DATA, FIXED_ROUNDINGS, RULES, STOCHASTIC, Case, filled, numpy_dtype
from quark_kernels import PRESETS, PerBlock, PerGroup, QuantSpec
from test_forward import assert_same, skip_layouts
from test_parity import LEVELS, SUBNORMAL, run_python

E8M0, E4M3 = ml_dtypes.float8_e8m0fnu, ml_dtypes.float8_e4m3fn


def assert_stored(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """The arrays of a QTensor. Codes are expected as int64, whatever stores them."""
    assert list(got) == list(expected)
    for name, array in expected.items():
        ours = bits(got[name])
        if array.dtype == np.int64:
            array = array & (256**ours.itemsize - 1)
        else:
            assert got[name].dtype == array.dtype, name
            array = bits(array)
        assert_same(ours.astype(np.uint64), array.astype(np.uint64), name)


def with_x(case: Case, x: np.ndarray) -> Case:
    """The case, with another input of its shape and dtype."""
    assert (x.shape, x.dtype.name) == (case.shape, case.dtype)
    case.__dict__["x"] = x
    return case


# ---- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_forward(case: Case, frontend: Any) -> None:
    skip_layouts(frontend, case)
    before = bits(np.asarray(case.x)).copy()
    if frontend.name == "core" and case.packed and "scale" not in case.stored:
        pytest.skip("the frontends join exponents and codes")
    assert_stored(frontend.stored(case), case.stored)
    assert_same(bits(frontend.fake_quantize(case)), case.fake_quantized, "fake-quantized numbers")
    assert_same(bits(frontend.dequantize(case, case.dtype)), case.dequantized(case.dtype), "dequantized numbers")
    assert_same(bits(np.asarray(case.x)), before, "the input's bits, which nothing may write,")


@pytest.mark.parametrize("case", [case for case in BLOCKS if not case.packed][::3], ids=str)
def test_clipped_gradient(case: Case, frontend: Any) -> None:
    skip_layouts(frontend, case)
    through = case.gradient.astype(np.float32).astype(numpy_dtype(case.dtype))
    expected = np.where(case.passes, through, np.zeros((), through.dtype))
    assert_same(bits(frontend.clipped_gradient(case)), bits(expected), "gradients")


@pytest.mark.parametrize("case", [case for case in BLOCKS if not case.given and not case.packed][::3], ids=str)
def test_choose_qparams_gives_what_scale_takes(case: Case, framework: Any) -> None:
    skip_layouts(framework, case)
    scale, zero = framework.choose_qparams(case)
    assert zero is None
    assert scale.dtype == case.scale_argument.dtype
    assert_same(bits(scale), bits(case.scale_argument), "scales")
    if case.spec.scale_format == "microexponents":
        return
    given = replace(case, given=True)
    given.__dict__.update(x=case.x, scale=scale, _block_scales=case._block_scales)
    assert_stored(framework.stored(given), case.stored)


@pytest.mark.parametrize("dtype", DATA)
@pytest.mark.parametrize(
    "case", [c for c in BLOCKS if c.spec in BLOCKED.values() and c.dtype == "float32"][::5], ids=str
)
def test_dequantize_to_other_dtypes(case: Case, dtype: str, torch_frontend: Any) -> None:
    """Huge numbers saturate in float16."""
    skip_layouts(torch_frontend, case)
    assert_same(bits(torch_frontend.dequantize(case, dtype)), case.dequantized(dtype), "dequantized numbers")


def digest_of_blocks() -> str:
    """A digest of everything that the core makes of every block and every stochastic case."""
    digest, core = hashlib.sha256(), Core()
    for case in (*BLOCKS, *STOCHASTIC):
        if "scale" in case.stored:
            for part in (*core.stored(case).values(), core.fake_quantize(case), core.clipped_gradient(case)):
                digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("level", LEVELS)
def test_every_cpu_level(level: str) -> None:
    code = "import test_blocks as t; from quark_kernels import info; print(info()['cpu_level'], t.digest_of_blocks())"
    done = run_python(code, QUARK_CPU_LEVEL=level)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [level, digest_of_blocks()]


# ---- the identity ----------------------------------------------------------------------------------------------------


def _products(name: str) -> list[tuple[QuantSpec, str]]:
    """A preset's spec with every axis, rule and rounding, and every dtype."""
    preset = PRESETS[name]
    rules = RULES if preset.scale_format == "e8m0" else (None,)
    return [
        (
            replace(preset, granularity=PerGroup(preset.granularity.size, axis), scale_rule=rule, rounding=rounding),
            dtype,
        )
        for axis in (0, -1)
        for rule in rules
        for rounding in (*FIXED_ROUNDINGS, "stochastic")
        for dtype in DATA
    ]


@pytest.mark.parametrize("name", BLOCKED)
def test_fake_quantize_is_dequantize_of_quantize(name: str, framework: Any) -> None:
    """The identity the library promises, without the oracle's help."""
    products = _products(name)
    for i, (spec, dtype) in enumerate(products if framework.name == "torch" else products[:: len(products) // 12]):
        seed = i if spec.rounding == "stochastic" else None
        case = Case(spec, (37, 41), dtype, data="near" if name == "nvfp4" else "wide", seed=seed)
        fake, both = bits(framework.fake_quantize(case)), bits(framework.dequantize(case, dtype))
        number = ~np.isnan(case.x32)
        assert_same(fake[number], both[number], f"{case}: fake_quantize and dequantize(quantize)")


# ---- all 16-bit inputs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["near", "far"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", BLOCKED)
def test_all_16_bit_inputs(name: str, dtype: str, order: str, framework: Any) -> None:
    """Every value among its neighbours, and in blocks of very different values."""
    x = np.arange(65536, dtype=np.uint16).view(numpy_dtype(dtype)).reshape(256, 256)
    if order == "far":
        x = np.ascontiguousarray(x.T)
    if name == "nvfp4":
        with np.errstate(invalid="ignore"):  # signalling NaNs are among them
            x = np.where(np.isfinite(x), x, np.zeros((), x.dtype))
    for rule in RULES if PRESETS[name].scale_format == "e8m0" else (None,):
        case = with_x(Case(replace(PRESETS[name], scale_rule=rule), x.shape, dtype), x)
        assert_stored(framework.stored(case), case.stored)
        assert_same(bits(framework.fake_quantize(case)), case.fake_quantized, "fake-quantized numbers")


# ---- examples by hand ------------------------------------------------------------------------------------------------


def _quantized(framework: Any, x: list[float], spec: Any, **arguments: Any) -> dict[str, list[Any]]:
    q = framework.api.quantize(framework.array(np.array(x, np.float32)), spec, **arguments)
    arrays = {name: getattr(q, name) for name in q.ARRAYS if getattr(q, name) is not None}
    return {name: framework.numpy(a).astype(np.float64).ravel().tolist() for name, a in arrays.items()}


def test_mxfp4_by_hand(framework: Any) -> None:
    """OCP MX 1.0, 6.3: amax 7 is 1.75 * 2^2, so X = 2^(2 - 2) and 7 saturates to 6; other rules double X."""
    x = [7.0, -0.5, 0.25, 3.0]
    kept, doubled = (1.0, 6, -0.5, 0, 3), (2.0, 8, 0, 0, 3)
    expected = {None: kept, "floor": kept, "ceil": doubled, "even": doubled, "rceil": doubled}
    for rule, (scale, *numbers) in expected.items():
        spec = replace(PRESETS["mxfp4"], scale_rule=rule)
        assert _quantized(framework, x, spec)["scale"] == [scale]
        q = framework.api.quantize(framework.array(np.array(x, np.float32)), spec)
        assert framework.numpy(q.dequantize()).tolist() == numbers, rule


def test_nvfp4_by_hand(framework: Any) -> None:
    """g = 2688 / 2688; the blocks' scales 448, 1 and (a block of zeros) 2^-9."""
    x = [2688.0, *[0.0] * 15, 6.0, -3.0, 1.0, *[0.0] * 29]
    got = _quantized(framework, x, "nvfp4")
    assert got["scale"] == [448.0, 1.0, 2.0**-9]
    assert got["global_scale"] == [1.0]
    assert got["qvalue"][:2] == [7, 0]
    assert got["qvalue"][8:10] == [0xD7, 0x02]


def test_mx6_by_hand(framework: Any) -> None:
    """E = 0, so the first pair's codes count eighths, the second's sixteenths; a pair of zeros lies below too."""
    got = _quantized(framework, [1.0, 0.5, 0.25, -0.25, *[0.0] * 12], "mx6")
    assert got["scale"] == [0]
    assert got["qvalue"] == [8, 4, 4, -4, *[0] * 12]
    assert got["pair_bits"] == [0b11111110]


def test_bfp16_by_hand(framework: Any) -> None:
    """E = 0, so codes count 1/64; 1.999 would round to 128 of them. Packed: E + 127, then the codes."""
    x = [1.0, -0.5, 1.999, -1.999, 1 / 128, 3 / 128, 0.0, -0.0, 0.25]
    codes = [64, -32, 127, -128, 0, 2, 0, 0, 64]
    got = _quantized(framework, x, "bfp16")
    assert got == {"qvalue": codes, "scale": [0, -2]}
    packed = _quantized(framework, x, "bfp16", packed=True)
    assert packed == {"qvalue": [127, *(c % 256 for c in codes[:8]), 125, 64, *[0] * 7]}
    spoilt = _quantized(framework, [np.nan, 1.0], "bfp16", packed=True)
    assert spoilt == {"qvalue": [255, *[0] * 8]}


# ---- the oracle's own ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_documented_functions_agree(dtype: str) -> None:
    """Where both define a format they define the same; the documented ones have no -0, and double bfp16's scale."""
    x = filled("near", np.random.default_rng(1), 6 * 96, numpy_dtype(dtype)).reshape(6, 96)
    x[:2] *= np.asarray(2.0**-9, x.dtype)
    x[5] = np.clip(x[5], -1, 1)
    x[5, ::8] = 1.9921875  # 127.5 / 64
    for name, element in [(name, BLOCKED[name].format) for name in BLOCKED if name != "nvfp4"]:
        case = with_x(Case(BLOCKED[name], x.shape, dtype), x)
        if name.startswith("mx") and name not in ("mx6", "mx9"):
            arguments = ("mx", "int8" if element == "int8f6" else element, -1, 32)
        else:
            arguments = (name, None, -1, 16)
        theirs = reference.non_scaled_fake_quantize(x, *arguments).astype(np.float32)
        ours = case.fake_quantized.view(numpy_dtype(dtype)).astype(np.float32)
        if name == "bfp16":  # doubled blocks hold a code beyond 127
            scale = case.element_scales
            q = np.rint(case.x32.astype(np.float64) / scale)
            kept = ((q >= -128) & (q <= 127)).reshape(-1, 8).all(axis=1).repeat(8).reshape(x.shape)
            assert 0.5 < kept.mean() < 1
            ours, theirs = ours[kept], theirs[kept]
        assert np.array_equal(ours, theirs), name


def test_a_scale_never_saturates_nor_wastes() -> None:
    """What each rule promises of X and amax, on every float32 exponent and next to every threshold."""
    m = np.concatenate([top * np.array([1 - 2.0**-23, 1, 1 + 2.0**-23]) for top in (1, 1.25, 1.5, 1.75, 1.875, 1.9375)])
    amax = np.ldexp(m[m >= 1][:, None], np.arange(-100, 100)).astype(np.float32)
    for name, spec in BLOCKED.items():
        if spec.scale_format != "e8m0":
            continue
        top = np.float64(reference.FORMATS[spec.format].hi)
        x = {rule: reference.power_of_two(amax, spec.format, rule).astype(np.float64) for rule in RULES}
        assert ((top * x["rceil"] >= amax) & (top * x["rceil"] / 2 < amax)).all(), name
        assert ((amax / x["floor"] >= 2.0 ** np.floor(np.log2(top))) & (amax / x["floor"] < 2 * top)).all(), name
        assert (amax / x["ceil"] <= 2.0 ** np.floor(np.log2(top))).all(), name
        assert ((x["floor"] <= x["even"]) & (x["even"] <= x["ceil"])).all(), name


# ---- calls -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BLOCKED)
def test_axis_and_group_size(name: str, framework: Any) -> None:
    preset = PRESETS[name]
    x = framework.array(filled("near", np.random.default_rng(0), 48 * 10, np.dtype(np.float32)).reshape(48, 10))
    spec = replace(preset, granularity=PerGroup(preset.granularity.size, 0))
    assert framework.api.quantize(x, name, axis=0).spec == spec
    assert framework.api.quantize(x, name, group_size=4).spec == replace(preset, granularity=PerGroup(4, -1))
    got, expected = (framework.api.fake_quantize(x, s, axis=a) for s, a in ((name, 0), (spec, None)))
    assert_same(bits(framework.numpy(got)), bits(framework.numpy(expected)), "numbers")


BITS_PER_VALUE = {
    "mxfp8_e4m3": 8.25,
    "mxfp8_e5m2": 8.25,
    "mxfp6_e3m2": 6.25,
    "mxfp6_e2m3": 6.25,
    "mxfp4": 4.25,
    "mxint8": 8.25,
    "nvfp4": 4.5 + 32 / 4096,
    "mx6": 6.0,
    "mx9": 9.0,
    "bfp16": 9.0,
}


@pytest.mark.parametrize("name", BLOCKED)
def test_bits_per_value(name: str, framework: Any) -> None:
    x = framework.array(np.ones((64, 64), np.float32))
    assert framework.api.quantize(x, name).bits_per_value == BITS_PER_VALUE[name]
    if PRESETS[name].element.can_pack or name == "bfp16":
        packed = framework.api.quantize(x, name, packed=True)
        assert packed.bits_per_value == BITS_PER_VALUE[name]
        assert packed.nbytes * 8 == 4096 * BITS_PER_VALUE[name]


@pytest.mark.parametrize("name", BLOCKED)
def test_subnormals_under_jit(name: str, jax_frontend: Any) -> None:
    """XLA runs custom calls with subnormals flushed; ours must not notice. Compared in NumPy: jnp flushes too."""
    import jax

    case = with_x(Case(PRESETS[name], shape=(2, 4)), SUBNORMAL)
    run = jax.jit(lambda x: (jax_frontend.api.quantize(x, name, packed=False), jax_frontend.api.fake_quantize(x, name)))
    q, fake = run(SUBNORMAL)
    got = {part: np.asarray(getattr(q, part)) for part in q.ARRAYS if getattr(q, part) is not None}
    assert_stored(got, case.stored)
    assert_same(
        bits(np.asarray(jax.jit(lambda q: q.dequantize())(q))), case.dequantized("float32"), "dequantized numbers"
    )
    assert_same(bits(fake), case.fake_quantized, "fake-quantized numbers")


@pytest.mark.parametrize("name", BLOCKED)
def test_torch_flush_denormal(name: str, torch_frontend: Any) -> None:
    import torch

    case = with_x(Case(PRESETS[name], shape=(2, 4)), SUBNORMAL)
    assert torch.set_flush_denormal(True)
    try:
        stored, fake = torch_frontend.stored(case), torch_frontend.fake_quantize(case)
    finally:
        torch.set_flush_denormal(False)
    assert_stored(stored, case.stored)
    assert_same(bits(fake), case.fake_quantized, "fake-quantized numbers")


@pytest.mark.parametrize("name", BLOCKED)
def test_vmap(name: str, jax_frontend: Any) -> None:
    """Each example has its own scales: nvfp4's for the tensor too."""
    import jax

    x = np.stack([filled("near", np.random.default_rng(i), 5 * 40, np.dtype(np.float32)) * 3**i for i in range(3)])
    x = x.reshape(3, 5, 40).astype(np.float32)
    got = np.asarray(jax.vmap(lambda x: jax_frontend.api.fake_quantize(x, name))(x))
    q = jax.vmap(lambda x: jax_frontend.api.quantize(x, name))(x)
    numbers = np.asarray(jax.vmap(lambda q: q.dequantize())(q))
    for i in range(3):
        expected = with_x(Case(PRESETS[name], (5, 40)), x[i]).fake_quantized
        assert_same(bits(got[i]), expected, "fake-quantized numbers")
        assert_same(bits(numbers[i]), expected, "dequantized numbers")


def test_straight_through(framework: Any) -> None:
    """ "ste" passes what "clipped" stops: 7 is beyond MXFP4's 6."""
    x, seen = np.array([7.0, 1.0, 0.3, 6.0], np.float32), np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    for gradient, expected in (("ste", [1.0, 2.0, 3.0, 4.0]), ("clipped", [0.0, 2.0, 3.0, 4.0])):
        if framework.name == "torch":
            t = framework.array(x.copy()).requires_grad_()
            framework.api.fake_quantize(t, "mxfp4", gradient=gradient).backward(framework.array(seen))
            got = t.grad
        else:
            import jax

            f = jax.vjp(lambda x, g=gradient: framework.api.fake_quantize(x, "mxfp4", gradient=g), x)[1]
            (got,) = f(framework.array(seen))
        assert framework.numpy(got).tolist() == expected


WRONG = [
    ("mxfp4", np.ones((2, 2), np.float32), TypeError),  # float32 scales of an e8m0 format
    ("mxfp4", np.ones((2, 3)).astype(E8M0), ValueError),  # a wrong shape
    ("int8", np.ones(()).astype(E8M0), TypeError),
    ("bfp16", np.ones((2, 8), np.float32), TypeError),
    ("bfp16", np.ones((2, 7), np.int8), ValueError),
    ("mx6", np.zeros((2, 4), np.int8), ValueError),  # none can be given
    ("mx9", np.ones((), np.float32), ValueError),
    ("nvfp4", np.ones((2, 4), np.float32), ValueError),  # the tensor's scale is one number
    ("nvfp4", np.ones((2, 4)).astype(E4M3), (TypeError, ValueError)),
]


@pytest.mark.parametrize(("name", "scale", "error"), WRONG, ids=[f"{w[0]}-{w[1].dtype}{w[1].shape}" for w in WRONG])
def test_wrong_scales(name: str, scale: np.ndarray, error: Any, framework: Any) -> None:
    x = framework.array(np.ones((2, 64), np.float32))
    for function in (framework.api.quantize, framework.api.fake_quantize):
        with pytest.raises(error, match="scale"):
            function(x, name, scale=framework.array(scale))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("fp4", "e8m1", None), "scale_format"),
        (("fp4", "e8m0", "absmax"), "scale_rule"),
        (("fp4", "float32", "ceil"), "scale_rule"),
        (("fp4", "e4m3", "floor"), "scale_rule"),
        (("int8", "exponent", "ceil"), "scale_rule"),
        (("fp4", "exponent", None), "exponent"),
        (("int2", "exponent", None), "exponent"),
        (("uint8", "exponent", None), "exponent"),
        (("bf16", "e8m0", None), "bf16"),
    ],
)
def test_wrong_specs(arguments: tuple[str, str, str | None], match: str) -> None:
    fmt, scale_format, rule = arguments
    with pytest.raises(ValueError, match=match):
        QuantSpec(fmt, scale_format=scale_format, scale_rule=rule)


@pytest.mark.parametrize("granularity", [PerGroup(5), PerGroup(1), PerBlock((2, 8))])
def test_pairs_need_groups_of_even_size(granularity: Any) -> None:
    with pytest.raises(ValueError, match="microexponents"):
        QuantSpec("int8", granularity, scale_format="microexponents")


@pytest.mark.parametrize("scale_format", ["e8m0", "e4m3", "exponent", "microexponents"])
def test_block_scales_are_symmetric(scale_format: str) -> None:
    with pytest.raises(ValueError, match="symmetric"):
        QuantSpec("int8", PerGroup(16), scale_format=scale_format, symmetric=False)
