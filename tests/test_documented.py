"""The functions that AMD Quark documents, each case of the matrix through torch and JAX, against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import pytest

from conformance_cases import Result, run_jax
from frontends import Torch, bits
from matrix import CLASSES, DOCUMENTED, DocumentedCase
from quark_kernels import _core
from test_parity import LEVELS, run_python

ROWS = [case for case in DOCUMENTED if case.layout == "rows"]  # JAX has no strides
BATCH = 64  # cases in one jax.jit
CANONICAL = {"float32": 0x7FC00000, "float16": 0x7E00, "bfloat16": 0x7FC0}


def kernel(framework: Any) -> Any:
    return import_module({"torch": "quark_torch.kernel", "jax": "quark_jax.kernel"}[framework.name])


def wrong(what: str, got: np.ndarray, expected: np.ndarray) -> list[str]:
    """How two arrays differ in dtype, shape or bits: at most one line. NaN equals NaN."""
    if (got.dtype, got.shape) != (expected.dtype, expected.shape):
        return [f"{what} is {got.dtype} {got.shape}, expected {expected.dtype} {expected.shape}"]
    differ = bits(got) != bits(expected)
    if got.dtype.kind not in "iu":
        nan = np.isnan(got.astype(np.float64))
        differ &= ~(nan & np.isnan(expected.astype(np.float64)))
    if not differ.any():
        return []
    at = tuple(int(i) for i in np.argwhere(differ)[0])
    return [f"{what} differs in {differ.sum()} of {differ.size}, at {at}: got {got[at]!r}, expected {expected[at]!r}"]


def check(case: DocumentedCase, result: Result | Exception) -> list[str]:
    if isinstance(result, Exception):
        raise result
    with np.errstate(invalid="ignore"):  # signaling NaNs
        found = wrong("out", result.out, case.out)
        for name, expected in case.grads.items():
            found += wrong(f"the gradient of {name}", result.grads[name], expected)
    for name, before in case.arrays.items():
        if not np.array_equal(bits(result.inputs[name]), bits(before)):
            found.append(f"{name} was written to")
    canonical = CANONICAL.get(case.out.dtype.name)
    if canonical and case.function != "dequantize":
        nans = bits(result.out)[np.isnan(result.out)]
        sign = 1 << (8 * case.out.itemsize - 1)
        if not ((nans & ~nans.dtype.type(sign)) == canonical).all():
            found.append("a NaN isn't canonical")
    return found


@cache
def _jax_batches() -> tuple[dict[str, int], list[list[DocumentedCase]]]:
    """Which batch a case is in, and the batches; 64-bit cases by themselves."""
    wide = [case for case in ROWS if case.inputs.dtype.itemsize == 8]
    rest = [case for case in ROWS if case.inputs.dtype.itemsize < 8]
    batches = [some[i : i + BATCH] for some in (rest, wide) for i in range(0, len(some), BATCH)]
    return {str(case): i for i, batch in enumerate(batches) for case in batch}, batches


@cache
def _jax_results(batch: int) -> dict[str, Result | Exception]:
    import jax

    some = _jax_batches()[1][batch]
    with jax.enable_x64(some[0].inputs.dtype.itemsize == 8):
        return {str(case): result for case, result in zip(some, run_jax(some), strict=True)}


@pytest.mark.parametrize("case", DOCUMENTED, ids=str)
def test_torch(case: DocumentedCase, torch_frontend: Any) -> None:
    assert check(case, torch_frontend.documented(case)) == []


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_jax(case: DocumentedCase, jax_frontend: Any) -> None:
    assert check(case, _jax_results(_jax_batches()[0][str(case)])[str(case)]) == []


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_same_bits(case: DocumentedCase, torch_frontend: Any, jax_frontend: Any) -> None:
    """torch and JAX, NaNs included."""
    ours, theirs = torch_frontend.documented(case), _jax_results(_jax_batches()[0][str(case)])[str(case)]
    assert isinstance(theirs, Result)
    assert np.array_equal(bits(ours.out), bits(theirs.out))
    for name in case.grads:
        assert np.array_equal(bits(ours.grads[name]), bits(theirs.grads[name])), name


def replay() -> None:
    """Print what torch gets wrong, and the CPU level, on threads that flush subnormals as XLA's do."""
    import torch

    frontend, level = Torch(), _core.cpu_level()
    for case in DOCUMENTED:
        if case.scale_layout == "number" and isinstance(case.scale, float) and 0 < abs(case.scale) < 2.0**-126:
            continue  # whoever makes a float32 of a Python number flushes it: torch or NumPy
        case.out, case.grads, case.grad_output  # noqa: B018 - NumPy computes them, and mustn't flush
        torch.set_flush_denormal(True)
        result = frontend.documented(case)
        torch.set_flush_denormal(False)
        for line in check(case, result):
            print(case, line)
    print(level)


@pytest.mark.parametrize("level", LEVELS)
def test_every_cpu_level(level: str, torch_frontend: Any) -> None:
    done = run_python("import test_documented; test_documented.replay()", QUARK_CPU_LEVEL=level)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [level]


# ---- calls -----------------------------------------------------------------------------------------------------------

SMALL = [case for case in ROWS if 100 < case.inputs.size < 1000 and case.scale_layout != "number"]
ONE_EACH = list({case.function: case for case in reversed(SMALL)}.values())


def test_import_path(torch_frontend: Any) -> None:
    documented, ours = import_module("quark.torch.kernel"), import_module("quark_torch.kernel")
    assert sorted(documented.__all__) == sorted([*CLASSES, *CLASSES.values()])
    assert documented.__all__ == ours.__all__
    assert all(getattr(documented, name) is getattr(ours, name) for name in ours.__all__)
    assert sorted(import_module("quark_jax.kernel").__all__) == sorted(CLASSES)


@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.function)
def test_keywords(case: DocumentedCase, framework: Any) -> None:
    """The function, outside jit, by position and by name, in any order."""
    function = getattr(kernel(framework), case.function)
    with framework.context(case):
        given = {**case.args, **{name: framework.array(a) for name, a in case.arrays.items()}}
        for out in (function(*given.values()), function(**dict(reversed(given.items())))):
            assert wrong("out", framework.numpy(out), case.out) == []


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own
@pytest.mark.parametrize("apply", [True, False], ids=["class", "function"])
@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.function)
def test_compile(case: DocumentedCase, apply: bool, torch_frontend: Any) -> None:
    """torch.compile gives the same bits, forward and backward, without a graph break."""
    import torch

    k = kernel(torch_frontend)
    function = getattr(k, case.class_name).apply if apply else getattr(k, case.function)
    arrays = {name: torch_frontend.array(a) for name, a in case.arrays.items()}
    inputs = [arrays[name].requires_grad_() for name in case.grads]
    torch._dynamo.reset()

    def call(arrays: dict[str, Any]) -> Any:
        return function(*{**case.args, **arrays}.values())

    out = torch.compile(call, fullgraph=True, backend="aot_eager")(arrays)
    assert wrong("out", torch_frontend.numpy(out), case.out) == []
    if not inputs:
        return
    grads = torch.autograd.grad(out, inputs, torch_frontend.array(case.grad_output))
    for (name, expected), grad in zip(case.grads.items(), grads, strict=True):
        assert wrong(f"the gradient of {name}", torch_frontend.numpy(grad), expected) == []


# ---- JAX -------------------------------------------------------------------------------------------------------------


def test_new_floats_compile_nothing(jax_frontend: Any, caplog: Any) -> None:
    import jax

    k, x = kernel(jax_frontend), np.linspace(-3, 3, 14, dtype=np.float32)
    calls = {
        "quant": lambda s: k.quant_fp8_e4m3(x, s),
        "dequant": lambda s: k.dequant_fp8_e5m2(x.astype("float8_e5m2"), s),
        "fake": lambda s: k.scaled_fake_quantize("int8", x, s, s, None, None, -8, 7, 8, "per_tensor"),
        "real": lambda s: k.scaled_real_quantize("fp4", x, s, None, None, None, None, None, 8, "per_tensor"),
        "dequantize": lambda s: k.dequantize("int8", np.arange(14), s, None, None, None, "per_tensor"),
        "tqt": lambda s: k.tqt_quantize(x, s, s, 8, 8),
        "lsq": lambda s: k.lsq_quantize(x, s, None, s, -8, 7),
    }
    kinds = (float, np.float32, jax.numpy.float32)
    for name, call in calls.items():
        jitted = jax.jit(call)
        for kind in kinds:
            assert np.array_equal(np.asarray(call(kind(0.5))), np.asarray(jitted(kind(0.5)))), name
        caplog.clear()
        with jax.log_compiles(True):
            for kind in kinds:
                call(kind(0.25)), jitted(kind(0.75))
        assert [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()] == [], name
    caplog.clear()
    with jax.log_compiles(True):
        k.quant_fp8_e4m3(x[:5], 0.5)
    assert "Compiling" in caplog.text  # so the above says something


def test_traced_once(jax_frontend: Any) -> None:
    import jax

    k, traces = kernel(jax_frontend), []

    @jax.jit
    def f(x: Any, s: Any) -> Any:
        traces.append(s)
        return jax.value_and_grad(lambda s: k.lsq_quantize(x, s, None, 0.1, -8, 7).sum())(s)

    for s in (0.1, 0.2, 0.3):
        f(np.ones(7, np.float32), s)
    assert len(traces) == 1


VMAPPED: dict[str, Any] = {
    "fake": lambda k, x, s: k.scaled_fake_quantize("int4", x, s, None, -1, None, -8, 7, 2, "per_channel"),
    "blocks": lambda k, x, s: k.non_scaled_fake_quantize(x, "mx", "fp4", 0, 2),
    "slots": lambda k, x, s: k.non_scaled_real_quantize(x, "mx", "fp4", -1, 5),
    "fp8": lambda k, x, s: k.dequant_fp8_e4m3(k.quant_fp8_e4m3(x, s[0])),
    "lsq": lambda k, x, s: k.lsq_quantize(x, s, None, 0.1, -8, 7, 1),
}


@pytest.mark.parametrize("name", VMAPPED)
def test_vmap(name: str, jax_frontend: Any) -> None:
    """Each example on its own, and so its gradients."""
    import jax

    k, random = kernel(jax_frontend), np.random.default_rng(3)
    x, s = random.standard_normal((3, 6, 5), np.float32), random.uniform(0.1, 1, (3, 5)).astype(np.float32)

    def f(x: Any, s: Any) -> Any:
        y, back = jax.vjp(lambda x, s: VMAPPED[name](k, x, s), x, s)
        return y, back(y)

    batched = jax.tree.leaves(jax.vmap(f)(x, s))
    single = [jax.tree.leaves(f(*each)) for each in zip(x, s, strict=True)]
    for got, expected in zip(batched, zip(*single, strict=True), strict=True):
        assert np.array_equal(bits(np.asarray(got)), bits(np.stack(expected)))


# ---- wrong calls -----------------------------------------------------------------------------------------------------

X = np.ones((4, 6), np.float32)


def fake(
    k: Any,
    x: Any,
    name: Any = "int8",
    s: Any = 1.0,
    z: Any = None,
    axis: Any = 1,
    size: Any = 1,
    low: Any = -8,
    high: Any = 7,
    mode: Any = 8,
    scheme: Any = "per_tensor",
) -> Any:
    return k.scaled_fake_quantize(name, x, s, z, axis, size, low, high, mode, scheme)


def real(
    k: Any,
    x: Any,
    name: Any = "int8",
    s: Any = 1.0,
    z: Any = None,
    axis: Any = 1,
    size: Any = 1,
    low: Any = -8,
    high: Any = 7,
    mode: Any = 8,
    scheme: Any = "per_tensor",
) -> Any:
    return k.scaled_real_quantize(name, x, s, z, axis, size, low, high, mode, scheme)


def back(
    k: Any,
    q: Any,
    name: Any = "int8",
    s: Any = 1.0,
    z: Any = None,
    axis: Any = 1,
    size: Any = 1,
    scheme: Any = "per_tensor",
) -> Any:
    return k.dequantize(name, q, s, z, axis, size, scheme)


def floats(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


WRONG: dict[str, tuple[Callable[[Any, Any, Any], Any], type[Exception], str]] = {
    # names
    "quant_dtype": (lambda k, a, x: fake(k, x, "int5"), ValueError, "quant_dtype is 'int5'; allowed: int2, int3, int4"),
    "quant_dtype_mx": (lambda k, a, x: real(k, x, "mx"), ValueError, "quant_dtype is 'mx'; allowed: int2"),
    "quant_dtype_none": (lambda k, a, x: back(k, x, None), ValueError, "quant_dtype is None; allowed: int2"),
    "quant_dtype_block": (
        lambda k, a, x: k.non_scaled_fake_quantize(x, "int8", None, -1, 32),
        ValueError,
        "quant_dtype is 'int8'; allowed: mx, mx6, mx9, bfp16",
    ),
    "element": (
        lambda k, a, x: k.non_scaled_fake_quantize(x, "mx", "int4", -1, 32),
        ValueError,
        "mx_element_dtype is 'int4'; allowed: int8, fp8_e4m3, fp8_e5m2, fp6_e3m2, fp6_e2m3, fp4",
    ),
    "element_none": (
        lambda k, a, x: k.non_scaled_fake_quantize(x, "mx", None, -1, 32),
        ValueError,
        "mx_element_dtype is None; allowed: int8",
    ),
    "slots_element": (
        lambda k, a, x: k.non_scaled_real_quantize(x, "mx", "int8", -1, 2),
        ValueError,
        "quant_dtype is 'mx' and mx_element_dtype is 'int8'; allowed: 'mx' and 'fp4'",
    ),
    "qscheme": (
        lambda k, a, x: fake(k, x, scheme="per_token"),
        ValueError,
        "qscheme is 'per_token'; allowed: per_tensor, per_channel, per_group",
    ),
    "qscheme_none": (lambda k, a, x: real(k, x, scheme=None), ValueError, "qscheme is None; allowed: per_tensor"),
    "qscheme_fp8": (lambda k, a, x: fake(k, x, "fp8_e4m3", scheme=None), ValueError, "qscheme is None; allowed"),
    "fp8_groups": (
        lambda k, a, x: real(k, x, "fp8_e5m2", scheme="per_group"),
        ValueError,
        "qscheme is 'per_group'; fp8_e5m2 allows: per_tensor, per_channel",
    ),
    "fp8_groups_back": (
        lambda k, a, x: back(k, k.quant_fp8_e4m3(x), "fp8_e4m3", scheme="per_group"),
        ValueError,
        "qscheme is 'per_group'; fp8_e4m3 allows: per_tensor, per_channel",
    ),
    "round_mode": (lambda k, a, x: fake(k, x, mode=1), ValueError, r"round_mode is 1; allowed: 2 \(half up\), 3"),
    "round_mode_type": (lambda k, a, x: real(k, x, mode=True), TypeError, "round_mode is True; allowed: an integer"),
    "round_mode_tqt": (lambda k, a, x: k.tqt_quantize(x, 1.0, None, 8, 9), ValueError, "round_mode is 9; allowed: 2"),
    "rounding_key": (
        lambda k, a, x: k.lsq_quantize(x, 1.0, None, 1.0, -8, 7, None, 4),
        ValueError,
        "rounding_key is 4; allowed: 2",
    ),
    # axes and sizes
    "axis": (
        lambda k, a, x: fake(k, x, s=a(floats(6)), axis=2, scheme="per_channel"),
        ValueError,
        "axis is 2; inputs has 2 axes, allowed: -2 to 1",
    ),
    "axis_negative": (
        lambda k, a, x: real(k, x, axis=-3, scheme="per_group"),
        ValueError,
        "axis is -3; inputs has 2 axes, allowed: -2 to 1",
    ),
    "axis_type": (
        lambda k, a, x: fake(k, x, axis=1.5, scheme="per_channel"),
        TypeError,
        "axis is 1.5; allowed: an integer",
    ),
    "axis_default": (
        lambda k, a, x: fake(k, a(floats(5)), s=a(floats(5)), axis=None, scheme="per_channel"),
        ValueError,
        "axis is 1; inputs has 1 axes, allowed: -1 to 0",
    ),
    "axis_0d": (
        lambda k, a, x: back(k, a(np.array(1, np.int32)), axis=0, scheme="per_group"),
        ValueError,
        "axis is 0; inputs has 0 axes, allowed: none",
    ),
    "axis_block": (
        lambda k, a, x: k.non_scaled_fake_quantize(x, "mx6", None, 2, 32),
        ValueError,
        "axis is 2; input_tensor has 2 axes, allowed: -2 to 1",
    ),
    "axis_block_0d": (
        lambda k, a, x: k.non_scaled_fake_quantize(a(floats()), "bfp16", None, 0, 8),
        ValueError,
        "axis is 0; input_tensor has 0 axes",
    ),
    "ch_axis": (
        lambda k, a, x: k.lsq_quantize(x, a(floats(6)), None, 1.0, -8, 7, 2),
        ValueError,
        "ch_axis is 2; x has 2 axes, allowed: -2 to 1",
    ),
    "group": (
        lambda k, a, x: fake(k, x, s=a(floats(4)), size=4, scheme="per_group"),
        ValueError,
        "group_size is 4; the axis of inputs has length 6, allowed: a divisor of it",
    ),
    "group_0": (
        lambda k, a, x: fake(k, x, size=0, scheme="per_group"),
        ValueError,
        "group_size is 0; allowed: 1 or more, or -1",
    ),
    "group_negative": (
        lambda k, a, x: real(k, x, size=-2, scheme="per_group"),
        ValueError,
        "group_size is -2; allowed: 1 or more, or -1",
    ),
    "group_type": (
        lambda k, a, x: back(k, a(X.astype(np.int32)), size=2.5, scheme="per_group"),
        TypeError,
        "group_size is 2.5; allowed: an integer",
    ),
    "block_0": (
        lambda k, a, x: k.non_scaled_fake_quantize(x, "mx", "fp4", -1, 0),
        ValueError,
        "block_size is 0; allowed: 1 or more",
    ),
    "block_type": (
        lambda k, a, x: k.non_scaled_real_quantize(x, "mx", "fp4", -1, "3"),
        TypeError,
        "block_size is '3'; allowed: an integer",
    ),
    "block_odd": (
        lambda k, a, x: k.non_scaled_fake_quantize(x, "mx6", None, -1, 3),
        ValueError,
        "block_size is 3; mx6 has pairs, allowed: an even number",
    ),
    "block_odd_mx9": (
        lambda k, a, x: k.non_scaled_fake_quantize(x, "mx9", None, -1, 1),
        ValueError,
        "block_size is 1; mx9 has pairs",
    ),
    "block_divides": (
        lambda k, a, x: k.non_scaled_real_quantize(x, "mx", "fp4", 1, 4),
        ValueError,
        "block_size is 4; axis 1 has length 6, allowed: a divisor of it",
    ),
    # scales and zero points
    "scale_tensor": (
        lambda k, a, x: fake(k, x, s=a(floats(6))),
        ValueError,
        r"scale has shape \(6,\); allowed: one element",
    ),
    "scale_channel": (
        lambda k, a, x: fake(k, x, "fp4", s=a(floats(5)), scheme="per_channel"),
        ValueError,
        r"scale has shape \(5,\); per channel on axis 1 of \(4, 6\) allows \(6,\)",
    ),
    "scale_group": (
        lambda k, a, x: fake(k, x, s=a(floats(4, 2)), size=2, scheme="per_group"),
        ValueError,
        r"scale has shape \(4, 2\); per group of 2 along axis 1 of \(4, 6\) allows 12 elements",
    ),
    "zero_shape": (
        lambda k, a, x: fake(k, x, s=a(floats(6)), z=a(np.ones(4, np.int32)), scheme="per_channel"),
        ValueError,
        r"zero_point has shape \(4,\); per channel on axis 1 of \(4, 6\) allows \(6,\)",
    ),
    "scale_learned": (
        lambda k, a, x: k.lsq_quantize(x, a(floats(1)), None, 1.0, -8, 7, 1),
        ValueError,
        r"scale has shape \(1,\); per channel on axis 1 of \(4, 6\) allows \(6,\)",
    ),
    "scale_lsq": (
        lambda k, a, x: k.lsq_quantize(x, a(floats(6)), None, 1.0, -8, 7),
        ValueError,
        r"scale has shape \(6,\); allowed: one element",
    ),
    "threshold": (
        lambda k, a, x: k.tqt_quantize(x, a(floats(2)), None, 8, 8),
        ValueError,
        r"log_threshold has shape \(2,\); allowed: one element",
    ),
    "scale_fp8": (
        lambda k, a, x: k.quant_fp8_e4m3(x, a(floats(2))),
        ValueError,
        r"scale has shape \(2,\); allowed: one element",
    ),
    "scale_none": (lambda k, a, x: fake(k, x, s=None), TypeError, "scale is a builtins.NoneType; allowed"),
    "scale_none_fp8": (lambda k, a, x: real(k, x, "fp8_e4m3", s=None), TypeError, "scale is a builtins.NoneType"),
    "scale_none_lsq": (
        lambda k, a, x: k.lsq_quantize(x, None, None, 1.0, -8, 7),
        TypeError,
        "scale is a builtins.NoneType",
    ),
    "scale_string": (lambda k, a, x: back(k, a(X.astype(np.int8)), s="1"), TypeError, "scale is a builtins.str"),
    "scale_int": (
        lambda k, a, x: fake(k, x, s=a(np.array(1, np.int32))),
        TypeError,
        "scale has dtype int32; allowed: float32, float16, bfloat16",
    ),
    "threshold_int": (
        lambda k, a, x: k.tqt_quantize(x, a(np.array(1, np.int32)), None, 8, 8),
        TypeError,
        "log_threshold has dtype int32; allowed: float32, float16, bfloat16",
    ),
    "zero_bool": (
        lambda k, a, x: fake(k, x, z=a(np.array(True))),
        TypeError,
        "zero_point has dtype bool; allowed: int8, uint8",
    ),
    "zero_big": (lambda k, a, x: fake(k, x, z=2**31), ValueError, "zero_point is 2147483648; allowed: -2147483648 to"),
    # ranges and numbers
    "range": (lambda k, a, x: fake(k, x, low=7, high=7), ValueError, "quant_min is 7; allowed: less than quant_max, 7"),
    "range_reversed": (
        lambda k, a, x: real(k, x, low=7.0, high=-8.0),
        ValueError,
        "quant_min is 7; allowed: less than",
    ),
    "range_fraction": (lambda k, a, x: fake(k, x, low=-7.5), TypeError, "quant_min is -7.5; allowed: an integer"),
    "range_far": (
        lambda k, a, x: fake(k, x, high=2**24),
        ValueError,
        "quant_max is 16777216; allowed: -8388608 to 838",
    ),
    "range_lsq": (
        lambda k, a, x: k.lsq_quantize(x, 1.0, None, 1.0, 7, -8),
        ValueError,
        "quant_min is 7; allowed: less than quant_max, -8",
    ),
    "range_none": (
        lambda k, a, x: k.lsq_quantize(x, 1.0, None, 1.0, None, 7),
        ValueError,
        "quant_min is None; allowed: an integer",
    ),
    "factor_shape": (
        lambda k, a, x: k.lsq_quantize(x, 1.0, None, a(floats(2)), -8, 7),
        ValueError,
        r"grad_factor has shape \(2,\); allowed: one element",
    ),
    "factor_none": (
        lambda k, a, x: k.lsq_quantize(x, 1.0, None, None, -8, 7),
        TypeError,
        "grad_factor is a builtins.NoneType; allowed",
    ),
    "domain_0": (lambda k, a, x: k.tqt_quantize(x, 1.0, None, 0, 8), ValueError, "domain is 0.*; allowed: "),
    "domain_fraction": (lambda k, a, x: k.tqt_quantize(x, 1.0, None, 1.5, 8), ValueError, "domain is 1.5; allowed: "),
    "domain_far": (
        lambda k, a, x: k.tqt_quantize(x, 1.0, None, 2.0**23, 8),
        ValueError,
        "domain is 8388608.*; allowed",
    ),
    "domain_nan": (lambda k, a, x: k.tqt_quantize(x, 1.0, None, float("nan"), 8), ValueError, "domain is nan; allowed"),
    "domain_shape": (
        lambda k, a, x: k.tqt_quantize(x, 1.0, None, a(floats(2)), 8),
        ValueError,
        r"domain has shape \(2,\); allowed: one element",
    ),
    # kinds and dtypes
    "list": (lambda k, a, x: fake(k, [1.0]), TypeError, r"inputs is a builtins\.list; allowed: a "),
    "list_block": (
        lambda k, a, x: k.non_scaled_fake_quantize([1.0], "bfp16", None, 0, 8),
        TypeError,
        r"input_tensor is a builtins\.list",
    ),
    "integers": (
        lambda k, a, x: fake(k, a(X.astype(np.int32))),
        TypeError,
        "inputs has dtype int32; allowed: float32, float16, bfloat16, float64",
    ),
    "integers_real": (lambda k, a, x: real(k, a(X.astype(np.int8)), "bfloat16"), TypeError, "inputs has dtype int8"),
    "integers_fp8": (lambda k, a, x: k.quant_fp8_e5m2(a(X.astype(np.uint8))), TypeError, "inputs has dtype uint8"),
    "integers_block": (
        lambda k, a, x: k.non_scaled_real_quantize(a(X.astype(np.int32)), "mx", "fp4", -1, 2),
        TypeError,
        "input_tensor has dtype int32; allowed: float32",
    ),
    "integers_lsq": (
        lambda k, a, x: k.lsq_quantize(a(X.astype(np.int32)), 1.0, None, 1.0, -8, 7),
        TypeError,
        "x has dtype int32; allowed: float32",
    ),
    "integers_tqt": (
        lambda k, a, x: k.tqt_quantize(a(X.astype(np.int32)), 1.0, None, 8, 8),
        TypeError,
        "inputs has dtype int32; allowed: float32",
    ),
    "floats": (
        lambda k, a, x: back(k, x),
        TypeError,
        "inputs has dtype float32; int8 allows: int8, uint8, int16, uint16, int32, int64",
    ),
    "floats_fp8": (
        lambda k, a, x: back(k, x, "fp8_e4m3"),
        TypeError,
        "inputs has dtype float32; fp8_e4m3 allows: float8_e4m3fn",
    ),
    "floats_fp4": (lambda k, a, x: back(k, x, "fp4"), TypeError, "inputs has dtype float32; fp4 allows: uint8"),
    "floats_cast": (
        lambda k, a, x: back(k, a(X.astype(np.int8)), "float16"),
        TypeError,
        "inputs has dtype int8; float16 allows: float32, float16, bfloat16, float64",
    ),
    "floats_dequant": (
        lambda k, a, x: k.dequant_fp8_e4m3(x),
        TypeError,
        "inputs has dtype float32; fp8_e4m3 allows: float8_e4m3fn",
    ),
    "other_fp8": (
        lambda k, a, x: k.dequant_fp8_e4m3(k.quant_fp8_e5m2(x)),
        TypeError,
        "inputs has dtype float8_e5m2; fp8_e4m3 allows: float8_e4m3fn",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_call(name: str, framework: Any) -> None:
    call, error, message = WRONG[name]
    with pytest.raises(error, match="^" + message):
        call(kernel(framework), framework.array, framework.array(X))


JITTED = [name for name in WRONG if not name.startswith("domain") or name == "domain_shape"]  # domains may be traced


@pytest.mark.parametrize("name", JITTED)
def test_wrong_call_while_tracing(name: str, jax_frontend: Any) -> None:
    import jax

    call, error, message = WRONG[name]
    with pytest.raises(error, match="^" + message):
        jax.eval_shape(lambda x: call(kernel(jax_frontend), jax_frontend.array, x), X)


def test_float64_scales(framework: Any) -> None:
    case = DocumentedCase("lsq_quantize", dtype="float64")
    with framework.context(case):
        s = framework.array(np.array(1.0))
        for call in (lambda k, x: fake(k, x, s=s), lambda k, x: k.lsq_quantize(x, s, None, 1.0, -8, 7)):
            with pytest.raises(TypeError, match="^scale has dtype float64; allowed: float32, float16, bfloat16"):
                call(kernel(framework), framework.array(X))


def test_sparse(torch_frontend: Any) -> None:
    import torch

    k, x = kernel(torch_frontend), torch.ones(4, 6)
    message = r"has layout torch.sparse_coo; allowed: torch.strided \(dense\)"
    with pytest.raises(TypeError, match="^inputs " + message):
        fake(k, x.to_sparse())
    with pytest.raises(TypeError, match="^scale " + message):
        fake(k, x, s=torch.ones(6).to_sparse(), scheme="per_channel")
    with pytest.raises(TypeError, match="^inputs " + message):
        back(k, x.int().to_sparse())
    with pytest.raises(TypeError, match="^x " + message):
        k.lsq_quantize(x.to_sparse(), 1.0, None, 1.0, -8, 7)


def test_mixed_up(torch_frontend: Any, jax_frontend: Any) -> None:
    for ours, other in ((torch_frontend, jax_frontend), (jax_frontend, torch_frontend)):
        k, x, theirs = kernel(ours), ours.array(X), other.array(X)
        kind = f"{type(theirs).__module__}.{type(theirs).__name__}"
        for name, call in {
            "inputs": lambda k=k, theirs=theirs: fake(k, theirs),
            "input_tensor": lambda k=k, theirs=theirs: k.non_scaled_fake_quantize(theirs, "bfp16", None, 0, 8),
            "scale": lambda k=k, x=x, theirs=theirs: fake(k, x, s=theirs[0], scheme="per_channel"),
            "zero_point": lambda k=k, x=x, theirs=theirs: fake(k, x, z=theirs[0, 0]),
            "domain": lambda k=k, x=x, theirs=theirs: k.tqt_quantize(x, 1.0, None, theirs[0, 0], 8),
            "log_threshold": lambda k=k, x=x, theirs=theirs: k.tqt_quantize(x, theirs[0, 0], None, 8, 8),
        }.items():
            with pytest.raises(TypeError, match=f"^{name} is a {kind}; allowed: a "):
                call()


# ---- what users passed -----------------------------------------------------------------------------------------------


def test_gradient_to_a_python_scale(jax_frontend: Any) -> None:
    """A Python number among grad's arguments; scales are constants to pass-through gradients."""
    import jax

    api = kernel(jax_frontend)
    x = np.array([0.3, -5.0, 1.26], np.float32)

    def run(x: Any, s: Any) -> Any:
        return api.scaled_fake_quantize("int8", x, s, None, None, None, -8, 7, 8, "per_tensor").sum()

    dx, ds = jax.grad(run, argnums=(0, 1))(x, 0.1)
    assert np.array_equal(dx, np.ones(3))
    assert ds == 0


def test_traced_python_floats_with_x64(jax_frontend: Any) -> None:
    import jax

    api = kernel(jax_frontend)
    x = np.array([0.3, -5.0, 1.26], np.float32)
    arguments = (None, None, -8, 7, 8, "per_tensor")
    expected = api.scaled_fake_quantize("int8", x, 0.1, 0.5, *arguments)
    with jax.enable_x64(True):
        got = jax.jit(lambda s, z: api.scaled_fake_quantize("int8", x, s, z, *arguments))(0.1, 0.5)
        everyday = jax.jit(lambda s: jax_frontend.api.fake_quantize(x, "int4", scale=s))(0.1)
    assert np.array_equal(bits(got), bits(expected))
    assert np.array_equal(bits(everyday), bits(jax_frontend.api.fake_quantize(x, "int4", scale=0.1)))


def test_wide_zero_points(framework: Any) -> None:
    """Beyond int32 they saturate, and never wrap."""
    api = kernel(framework)
    x = framework.array(np.array([1.0, 2.0], np.float32))
    z = np.array([2**32 + 5])
    if framework.name == "jax":
        with pytest.raises(ValueError, match="zero_point has integers beyond 32 bits"):
            api.scaled_real_quantize("int8", x, 1.0, z, None, None, -128, 127, 8, "per_tensor")
        with pytest.raises(ValueError, match="inputs has integers beyond 32 bits"):
            api.dequantize("int8", np.array([2**40, 3]), 1.0, None, None, None, "per_tensor")
        return
    q = api.scaled_real_quantize("int8", x, 1.0, framework.array(z), None, None, -128, 127, 8, "per_tensor")
    assert q.tolist() == [127, 127]
    q = framework.api.quantize(x, "int8", scale=1.0, zero_point=framework.array(z))
    assert q.qvalue.tolist() == [127, 127]


def test_more_wrong_calls(framework: Any) -> None:
    api = kernel(framework)
    x, many = (framework.array(np.ones(shape, np.float32)) for shape in ((4, 8), (1,) * 17))
    per_tensor = (None, None, -8, 7, 8, "per_tensor")
    with pytest.raises(ValueError, match="inputs has 17 dimensions; at most 16"):
        api.scaled_fake_quantize("int8", many, 0.1, None, *per_tensor)
    with pytest.raises(ValueError, match="input_tensor with its axis split has 17 dimensions"):
        api.non_scaled_real_quantize(many.reshape((1,) * 16), "mx", "fp4", 0, 1)
    with pytest.raises(TypeError, match="scale has dtype complex64; allowed: float32"):
        api.quant_fp8_e4m3(x, framework.array(np.array(1j, np.complex64)))
    with pytest.raises(TypeError, match="domain has dtype bool"):
        api.tqt_quantize(x, 1.0, None, framework.array(np.array(True)), 8)
    with pytest.raises(TypeError, match=r"round_mode is \[8\]; allowed: an integer"):
        api.scaled_fake_quantize("int8", x, 0.1, None, None, None, -8, 7, [8], "per_tensor")
    with pytest.raises(ValueError, match="domain is 1000.*; allowed: numbers that a float can hold"):
        api.tqt_quantize(x, 1.0, None, 10**400, 8)
    with pytest.raises(TypeError, match="ch_axis is True; allowed: an integer"):
        api.lsq_quantize(x, 0.1, None, 1.0, -8, 7, True)
