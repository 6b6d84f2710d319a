"""Random shapes, strides, axes, group sizes and values: the frontends against the oracle and each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import reference
from conftest import make
from frontends import bits
from matrix import Case, numpy_dtype
from quark_kernels import FORMATS, PerBlock, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec
from quark_kernels.formats import FIXED_ROUNDINGS
from test_forward import assert_same

SETTINGS = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=4)))
    if draw(st.booleans()) and shape:
        shape = (*shape[:-1], draw(st.sampled_from([31, 64, 65, 1023, 1025])))
    rank = len(shape)
    row = FORMATS[draw(st.sampled_from(sorted(FORMATS)))]
    granularities: list[Any] = [st.just(PerTensor())]
    if not row.is_cast and rank > 0:
        axes = st.integers(-rank, rank - 1)
        granularities += [
            st.builds(PerChannel, axes),
            st.builds(PerGroup, st.integers(1, 40), axes),
            st.just(PerToken()),
        ]
    if not row.is_cast and rank > 1:
        granularities.append(st.builds(PerBlock, st.tuples(st.integers(1, 9), st.integers(1, 9))))
    integer = row.is_integer
    spec = QuantSpec(
        row.name,
        draw(st.one_of(granularities)),
        rounding="half_even" if row.is_cast else draw(st.sampled_from(FIXED_ROUNDINGS)),
        symmetric=not (integer and draw(st.booleans())),
    )
    scaled = not row.is_cast
    fixed = scaled and draw(st.booleans())
    zero = draw(st.one_of(st.none(), st.integers(-300, 300))) if integer and fixed else None
    dtype = draw(st.sampled_from(["float32", "float16", "bfloat16"]))
    return Case(spec, shape, dtype, fixed, zero, packed=row.can_pack and draw(st.booleans()))


def check(case: Case, frontend: Any) -> None:
    q, scale, zero = frontend.quantize(case)
    from frontends import stored_codes

    assert_same(stored_codes(case, q), case.codes, "codes")
    assert_same(bits(scale), bits(case.scale), "scales")
    if case.zero is not None:
        assert_same(zero.astype(np.int64), case.zero.astype(np.int64), "zero points")
    assert_same(bits(frontend.fake_quantize(case)), case.fake_quantized, "fake-quantized numbers")
    assert_same(bits(frontend.dequantize(case, case.dtype)), case.dequantized(case.dtype), "dequantized numbers")


@settings(SETTINGS, max_examples=400)
@given(case=cases())
@example(case=Case(QuantSpec("int4", PerGroup(3)), shape=(2, 7), packed=True))
def test_core(case: Case) -> None:
    check(case, make("core"))


@settings(SETTINGS, max_examples=300)
@given(case=cases())
def test_torch(case: Case, torch_frontend: Any) -> None:
    check(case, torch_frontend)


@settings(SETTINGS, max_examples=50)  # each is compiled
@given(case=cases())
def test_jax(case: Case, jax_frontend: Any) -> None:
    check(case, jax_frontend)


@settings(SETTINGS, max_examples=300)
@given(
    data=st.data(),
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple),
    granularity=st.sampled_from([PerTensor(), PerChannel(0), PerChannel(-1), PerGroup(3), PerToken()]),
)
def test_any_strides(data: st.DataObject, shape: tuple[int, ...], granularity: Any) -> None:
    """Permuted, sliced and reversed inputs and outputs give what a contiguous copy gives."""
    from quark_kernels import _core
    from quark_kernels.schema import op_spec, scale_shape

    order = data.draw(st.permutations(range(len(shape))))
    steps = data.draw(st.lists(st.sampled_from([1, 2, 3, -1, -2]), min_size=len(shape), max_size=len(shape)))
    spec = op_spec(QuantSpec("int8", granularity), shape)
    rng = np.random.default_rng(0)

    def strided(fill: bool) -> np.ndarray:
        sizes = [n * abs(step) for n, step in zip(shape, steps, strict=True)]
        base = np.zeros([sizes[d] for d in order], np.float32)
        if fill:
            base[...] = rng.standard_normal(base.shape)
        back = base.transpose(np.argsort(order))
        return back[tuple(slice(None, None, step) for step in steps)]

    x, out = strided(fill=True), strided(fill=False)
    assert x.shape == shape
    scale = rng.uniform(0.01, 0.1, scale_shape(shape, spec.block or ())).astype(np.float32)
    _core.fake_quantize((x, scale), (out,), spec.text)
    expanded = reference.expand(scale, shape, spec.block or ())
    assert_same(bits(out), reference.to_bits(reference.fake_quantize(x, "int8", expanded), "float32"), "numbers")


@settings(SETTINGS, max_examples=300)
@given(
    raw=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=200),
    scale=st.integers(0, 2**32 - 1),
    fmt=st.sampled_from(sorted(n for n, row in FORMATS.items() if not row.is_cast)),
    rounding=st.sampled_from(FIXED_ROUNDINGS),
)
def test_any_bits(raw: list[int], scale: int, fmt: str, rounding: str) -> None:
    """Any float32 bits as input and as scale, negative, zero, infinite and NaN scales included."""
    from quark_kernels import _core

    x, s = np.array(raw, np.uint32).view(np.float32), np.array([scale], np.uint32).view(np.float32)
    q = np.empty(x.shape, numpy_dtype(FORMATS[fmt].storage))
    text = f"{fmt} block=0 rounding={rounding}"
    _core.quantize((x, s), (q,), text)
    expected = reference.quantize(x, fmt, s[0], rounding=rounding)
    assert_same(bits(q).astype(np.int64), expected & (256**q.itemsize - 1), "codes")
    y, fake = np.empty_like(x), np.empty_like(x)
    _core.dequantize((q, s), (y,), text)
    _core.fake_quantize((x, s), (fake,), text)
    assert_same(bits(y), reference.to_bits(reference.dequantize(expected, fmt, s[0]), "float32"), "numbers")
    assert_same(bits(fake), reference.to_bits(reference.fake_quantize(x, fmt, s[0], rounding=rounding), "float32"), "f")


@pytest.mark.parametrize("count", [0, 1, 1023, 1024, 1025, 65536, 100_003])
def test_lengths_around_tiles_and_threads(count: int, frontend: Any) -> None:
    check(Case(QuantSpec("int8"), shape=(count,)), frontend)
