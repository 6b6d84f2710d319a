"""Large arrays, empty ones, arrays of many axes, and what memory a call takes: `python tests/test_memory.py` shows it.

QUARK_TEST_LONG=1 adds arrays of more than 2^31 elements (10 GiB) and ten times as many calls.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import reference
from conftest import make
from frontends import bits
from quark_kernels import QuantSpec, _core
from test_learned import gradients
from test_parity import run_python

LONG = bool(os.environ.get("QUARK_TEST_LONG"))
MIB = 1 << 20
MANY = 2**31 + 4099
"""Elements that 32 bits don't count."""


def status(name: str) -> int:
    """A size from this process's or the machine's status, in bytes."""
    path = "/proc/meminfo" if name == "MemAvailable" else "/proc/self/status"
    found = re.search(rf"^{name}:\s+(\d+) kB", Path(path).read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def settle() -> None:
    """Give back what is free."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


# ---- more than 2^31 elements -----------------------------------------------------------------------------------------

large = pytest.mark.skipif(
    not LONG or status("MemAvailable") < 12 << 30, reason="needs QUARK_TEST_LONG=1 and 12 GiB of memory"
)


def repeated(pattern: np.ndarray, n: int) -> np.ndarray:
    return np.resize(pattern, n)


def assert_repeated(a: np.ndarray, pattern: np.ndarray) -> None:
    """Every element, a part of the array at a time."""
    step = len(pattern) << 14
    for begin in range(0, len(a), step):
        part = a[begin : begin + step]
        assert np.array_equal(part, np.resize(pattern, len(part))), begin


@large
def test_core_on_many_elements() -> None:
    """All fp8 codes, over and over, to bfloat16 and back; 2^31 + 4099 elements in one row."""
    one = np.ones(1, np.float32)
    numbers = reference.values("fp8_e4m3")
    pattern = np.arange(256, dtype=np.uint8)
    pattern = pattern[np.isfinite(numbers)]  # 254 of them: no part of any tile
    codes = repeated(pattern, MANY)
    x = np.empty(MANY, ml_dtypes.bfloat16)
    _core.dequantize((codes.view(ml_dtypes.float8_e4m3fn), one), (x,), "fp8_e4m3 block=0", 2)
    assert_repeated(x.view(np.uint16), numbers[pattern].astype(ml_dtypes.bfloat16).view(np.uint16))
    codes[:] = 0
    _core.quantize((x, one), (codes.view(ml_dtypes.float8_e4m3fn),), "fp8_e4m3 block=0", 2)
    assert_repeated(codes, pattern)
    # What only the last element says.
    x[-1] = 8192.0
    scale = np.empty(1, np.float32)
    _core.choose_qparams((x,), (scale,), "int8 block=0", 2)
    assert scale[0] == np.float32(8192) / np.float32(127)
    # Groups that end with the row, four codes in three bytes.
    del codes
    scales = np.empty(-(-MANY // 1000), np.float32)
    packed = np.empty(-(-MANY * 6 // 8), np.uint8)
    _core.quantize_dynamic((x,), (packed, scales), f"fp6_e2m3 block=1000 packed length={MANY}", 2)
    begin = MANY // 1000 * 1000
    tail = x[begin:].astype(np.float32)
    s = np.float32(np.abs(tail).max()) / np.float32(7.5)
    assert scales[-1] == s
    got = reference.unpack(packed[begin * 6 // 8 :], 6, len(tail), False)
    assert np.array_equal(got, reference.quantize(tail, "fp6_e2m3", s))


@large
def test_random_numbers_of_many_elements() -> None:
    """Elements beyond 2^32, of an array that is one row again and again."""
    rows, length = 2**16 + 1, 2**16
    row = np.random.default_rng(1).uniform(-2, 1, length).astype(np.float32)
    x = np.broadcast_to(row, (rows, length))
    out = np.empty((rows, length // 4), np.uint8)
    key = np.array([7, 9], np.int32)
    spec = f"int2 block=0,0 packed length={length} rounding=stochastic"
    _core.quantize((x, np.ones((1, 1), np.float32), key), (out,), spec, 2)
    for at in (0, 1, rows // 2, rows - 1):
        counter = np.arange(at * length // 4, (at + 1) * length // 4, dtype=np.uint64)
        words = reference.philox((counter & np.uint64(2**32 - 1), counter >> np.uint64(32), 0, 0), (7, 9)).ravel()
        want = reference.quantize(row, "int2", 1.0, rounding="stochastic", words=words)
        assert np.array_equal(reference.unpack(out[at], 2, length, True), want), at


@large
@pytest.mark.parametrize("name", ["torch", "jax"])
def test_frameworks_on_many_elements(name: str) -> None:
    framework = make(name)
    pattern = np.linspace(-3, 3, 1021).astype(ml_dtypes.bfloat16)
    x = framework.array(repeated(pattern.view(np.uint16), MANY).view(ml_dtypes.bfloat16))
    q = framework.api.quantize(x, "fp8_e5m2", scale=0.25)
    want = reference.quantize(pattern.astype(np.float32), "fp8_e5m2", 0.25)
    assert_repeated(bits(framework.numpy(q.qvalue)), want.astype(np.uint8))
    del x
    y = framework.api.dequantize(q, framework.dtype("bfloat16"))
    numbers = reference.dequantize(want, "fp8_e5m2", 0.25, dtype="bfloat16")
    assert_repeated(bits(framework.numpy(y)), reference.to_bits(numbers, "bfloat16"))


# ---- no elements, many axes ------------------------------------------------------------------------------------------

SPECS: tuple[tuple[Any, dict[str, Any]], ...] = (
    ("int8", {}),
    ("int4", {"axis": 0}),
    ("uint4", {"group_size": 16}),
    ("fp8_e4m3", {"axis": -1}),
    ("fp6_e3m2", {"group_size": 7}),
    ("mxfp4", {}),
    ("nvfp4", {}),
    ("mx9", {}),
    ("bfp16", {}),
    ("bf16", {}),
)


@pytest.mark.parametrize("shape", [(0,), (0, 64), (3, 0), (0, 0), (2, 0, 64), (2, 3, 0), (0, 3, 64)], ids=str)
@pytest.mark.parametrize(("spec", "how"), SPECS, ids=[f"{spec}-{how}" for spec, how in SPECS])
def test_no_elements(spec: Any, how: dict[str, Any], shape: tuple[int, ...], framework: Any) -> None:
    api, x = framework.api, framework.array(np.empty(shape, np.float32))
    q = api.quantize(x, spec, **how)
    assert q.shape == shape
    for y in (q.dequantize(), api.fake_quantize(x, spec, **how)):
        assert framework.numpy(y).shape == shape
    if spec != "bf16":
        scale, _ = api.choose_qparams(x, spec, **how)
        assert np.isfinite(framework.numpy(scale).astype(np.float32)).all()


@pytest.mark.parametrize("dimensions", [17, 64])
def test_too_many_axes(dimensions: int, framework: Any) -> None:
    """Every function says so by the argument's name."""
    arrays = np.ones((1,) * (dimensions - 1) + (32,), np.float32), np.ones((), np.float32)
    x, one = map(framework.array, arrays)
    codes = framework.array(np.ones(arrays[0].shape, np.int8))
    fp8 = framework.array(np.ones(arrays[0].shape, ml_dtypes.float8_e5m2))
    api = framework.api
    kernel = importlib.import_module(f"{api.__name__}.kernel")
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("x", lambda: api.quantize(x, "int8")),
        ("x", lambda: api.fake_quantize(x, "mxfp4")),
        ("x", lambda: api.choose_qparams(x, "int8")),
        ("x", lambda: api.lsq_quantize(x, one, quant_min=-8, quant_max=7)),
        ("x", lambda: api.tqt_quantize(x, one)),
        ("codes", lambda: api.pack(codes, 4)),
        ("packed", lambda: api.unpack(codes, 4, signed=True)),
        ("inputs", lambda: kernel.quant_fp8_e5m2(x)),
        ("inputs", lambda: kernel.dequant_fp8_e5m2(fp8)),
        ("inputs", lambda: kernel.dequantize("int8", codes, one, None, 1, 1, "per_tensor")),
        ("inputs", lambda: kernel.scaled_fake_quantize("int8", x, one, None, 1, 1, -128, 127, 8, "per_tensor")),
        ("inputs", lambda: kernel.scaled_real_quantize("int8", x, one, None, 1, 1, -128, 127, 8, "per_tensor")),
        ("input_tensor", lambda: kernel.non_scaled_fake_quantize(x, "mx", "fp4", -1, 32)),
        ("input_tensor", lambda: kernel.non_scaled_real_quantize(x, "mx", "fp4", -1, 32)),
        ("x", lambda: kernel.lsq_quantize(x, one, None, 0.1, -8, 7)),
        ("inputs", lambda: kernel.tqt_quantize(x, one, None, 128, 8)),
    ]
    for name, call in calls:
        with pytest.raises(ValueError, match=f"{name} has {dimensions} dimensions; at most 16"):
            call()


@pytest.mark.parametrize("dimensions", [17, 64])
def test_too_many_axes_for_the_core(dimensions: int) -> None:
    x, out = np.ones((1,) * dimensions, np.float32), np.empty((1,) * dimensions, np.float32)
    with pytest.raises(ValueError, match=f"input 0 has {dimensions} dimensions; at most 16"):
        _core.fake_quantize((x, np.ones(1, np.float32)), (out,), "int8 block=0")
    with pytest.raises(ValueError, match=f"output 0 has {dimensions} dimensions; at most 16"):
        _core.fake_quantize((np.ones(1, np.float32), np.ones(1, np.float32)), (out,), "int8 block=0")


# ---- memory ----------------------------------------------------------------------------------------------------------


def leaves_of(framework: Any, result: Any) -> list[Any]:
    if framework.name == "torch":
        from torch.utils import _pytree

        return [leaf for leaf in _pytree.tree_leaves(result) if leaf is not None]
    import jax

    return [leaf.block_until_ready() for leaf in jax.tree.leaves(result)]


def extra_memory(framework: Any, call: Callable[[], Any]) -> int:
    """How far beyond its outputs a call's memory rises."""
    leaves_of(framework, call())  # what is made once
    settle()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    outputs = leaves_of(framework, call())
    extra = status("VmHWM") - before - sum(int(a.nbytes) for a in outputs)
    return max(extra, 0)


SHAPE = (1024, 8192)
"""32 MiB of float32: a copy would be seen."""
ROOM = 2 * MIB
"""Tiles of every thread, and what the frameworks take for themselves."""


def data_calls(framework: Any) -> dict[str, Callable[[], Any]]:
    """A call of every public function, or of a few sorts of it, on data of SHAPE."""
    api, kernel = framework.api, importlib.import_module(f"{framework.api.__name__}.kernel")
    rng = np.random.default_rng(2)
    x = framework.array(rng.standard_normal(SHAPE, np.float32))
    g = framework.array(rng.standard_normal(SHAPE, np.float32))
    one, threshold = framework.array(np.full((), 0.1, np.float32)), framework.array(np.full((), 0.5, np.float32))
    codes = framework.array(rng.integers(0, 16, SHAPE, np.uint8))
    packed = api.pack(codes, 4)
    fp8 = {name: getattr(kernel, f"quant_fp8_{name}")(x) for name in ("e4m3", "e5m2")}
    int8 = kernel.scaled_real_quantize("int8", x, one, None, 1, 1, None, None, 8, "per_tensor")
    stochastic = QuantSpec("int8", rounding="stochastic")
    q = {spec: api.quantize(x, spec) for spec in ("int8", "mxfp4", "mx9")}

    def backward(f: Callable[..., Any], *arrays: Any) -> Callable[[], Any]:
        """The result and the gradients."""
        if framework.name == "torch":
            import torch

            def call() -> Any:
                inputs = [a.detach().requires_grad_() for a in arrays]
                y = f(*inputs)
                return y, torch.autograd.grad(y, inputs, g)

            return call
        import jax

        def run(*arrays: Any) -> Any:
            y, back = jax.vjp(f, *arrays)
            return y, back(g)

        return lambda: run(*arrays)

    return {
        "quantize, given scale": lambda: api.quantize(x, "int8", scale=one),
        "quantize, per tensor": lambda: api.quantize(x, "int8"),
        "quantize, per channel 1": lambda: api.quantize(x, "int8", axis=1),
        "quantize, groups, packed": lambda: api.quantize(x, "int4", group_size=128, packed=True),
        "quantize, groups along axis 0": lambda: api.quantize(x, QuantSpec.parse("int4 group=128,0")),
        "quantize, mxfp4": lambda: api.quantize(x, "mxfp4"),
        "quantize, nvfp4": lambda: api.quantize(x, "nvfp4"),
        "quantize, mx9": lambda: api.quantize(x, "mx9"),
        "quantize, bfp16": lambda: api.quantize(x, "bfp16"),
        "quantize, stochastic": lambda: api.quantize(x, stochastic, seed=3),
        **{f"dequantize, {spec}": (lambda spec=spec: q[spec].dequantize()) for spec in q},
        "fake_quantize, given scale": lambda: api.fake_quantize(x, "int8", scale=one),
        "fake_quantize, dynamic": lambda: api.fake_quantize(x, "fp8_e4m3", axis=0),
        "fake_quantize, gradient": backward(lambda x: api.fake_quantize(x, "int8", axis=0), x),
        "choose_qparams, absmax": lambda: api.choose_qparams(x, "int8", axis=0),
        "choose_qparams, percentile, rows": lambda: api.choose_qparams(x, "int8", axis=0, method="percentile"),
        "choose_qparams, percentile": lambda: api.choose_qparams(x, "int8", method="percentile"),
        "choose_qparams, mse, rows": lambda: api.choose_qparams(x, "int8", axis=0, method="mse"),
        "lsq_quantize, gradients": backward(lambda x, s: api.lsq_quantize(x, s, quant_min=-8, quant_max=7), x, one),
        "tqt_quantize, gradients": backward(api.tqt_quantize, x, threshold),
        "pack": lambda: api.pack(codes, 4),
        "pack, axis 0": lambda: api.pack(codes, 4, 0),
        "unpack": lambda: api.unpack(packed, 4, signed=False),
        "kernel.quant_fp8_e4m3": lambda: kernel.quant_fp8_e4m3(x),
        "kernel.quant_fp8_e5m2": lambda: kernel.quant_fp8_e5m2(x),
        "kernel.dequant_fp8_e4m3": lambda: kernel.dequant_fp8_e4m3(fp8["e4m3"]),
        "kernel.dequant_fp8_e5m2": lambda: kernel.dequant_fp8_e5m2(fp8["e5m2"]),
        "kernel.scaled_fake_quantize": lambda: kernel.scaled_fake_quantize(
            "int8", x, one, None, 1, 1, None, None, 8, "per_tensor"
        ),
        "kernel.scaled_real_quantize": lambda: kernel.scaled_real_quantize(
            "int8", x, one, None, 1, 1, None, None, 8, "per_tensor"
        ),
        "kernel.dequantize": lambda: kernel.dequantize("int8", int8, one, None, 1, 1, "per_tensor"),
        "kernel.non_scaled_fake_quantize": lambda: kernel.non_scaled_fake_quantize(x, "mx", "fp4", -1, 32),
        "kernel.non_scaled_real_quantize": lambda: kernel.non_scaled_real_quantize(x, "mx", "fp4", -1, 32),
        "kernel.lsq_quantize, gradients": backward(lambda x, s: kernel.lsq_quantize(x, s, None, 0.1, -8, 7), x, one),
        "kernel.tqt_quantize, gradients": backward(lambda x, t: kernel.tqt_quantize(x, t, None, 128, 8), x, threshold),
    }


COPIES = {
    # Nearest ranks are found in a copy of the group.
    ("torch", "choose_qparams, percentile"): 1.0,
    ("jax", "choose_qparams, percentile"): 1.0,
    # The framework puts the slots of scales between elements that are there, and swaps axes.
    ("torch", "kernel.non_scaled_real_quantize"): 1.1,
    ("jax", "kernel.non_scaled_real_quantize"): 3.2,
    ("jax", "pack, axis 0"): 0.4,
}
"""Calls that take memory of the data's size, and how many times that is."""


def expect_no_extra_memory(name: str) -> None:
    """A few tiles of every thread. What comes between once isn't the call's."""
    framework, too_much = make(name), {}
    for call_name, call in data_calls(framework).items():
        allowed = ROOM + COPIES.get((name, call_name), 0) * 32 * MIB
        extra = [extra_memory(framework, call)]
        while extra[-1] > allowed and len(extra) < 3:
            extra.append(extra_memory(framework, call))
        if extra[-1] > allowed:
            too_much[call_name] = f"{extra[-1] / MIB:.1f} MiB"
    assert not too_much, too_much


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this Linux doesn't measure peaks anew")
@pytest.mark.parametrize("name", ["torch", "jax"])
def test_calls_take_no_memory_but_their_results(name: str) -> None:
    """In a process of its own: in a small one little else happens, and the collector is quick."""
    pytest.importorskip(name)
    done = run_python(f"import test_memory as t; t.expect_no_extra_memory({name!r})")
    assert done.returncode == 0, done.stderr


CALLS = 100_000 if LONG else 10_000


@pytest.mark.parametrize("name", ["core", "torch", "jax"])
def test_memory_does_not_grow(name: str) -> None:
    """Over many calls, of every sort and with errors among them."""
    x, one = np.linspace(-3, 3, 96, dtype=np.float32).reshape(3, 32), np.ones((1, 1), np.float32)
    out = np.empty_like(x)
    calls: list[Callable[[], Any]]
    if name == "core":
        calls = [
            lambda: _core.fake_quantize((x, one), (out,), "int8 block=0,0"),
            lambda: _core.fake_quantize_dynamic((x,), (out, one.copy()), "int8 block=0,0"),
            lambda: pytest.raises(ValueError, _core.fake_quantize, (x, one), (out,), "int8 block=1,0"),
        ]
    else:
        framework = make(name)
        api, data = framework.api, framework.array(x)
        q, codes = api.quantize(data, "mxfp4"), framework.array(x.astype(np.int8).view(np.uint8) & 7)
        kernel = importlib.import_module(f"{api.__name__}.kernel")
        learned = functools.partial(api.lsq_quantize, quant_min=-8, quant_max=7)
        calls = [
            lambda: api.quantize(data, "int4", group_size=16, packed=True),
            lambda: api.fake_quantize(data, "fp8_e4m3", scale=0.1),
            lambda: api.choose_qparams(data, "int8", axis=0),
            lambda: q.dequantize(),
            lambda: api.pack(codes, 3),
            lambda: kernel.non_scaled_fake_quantize(data, "mx", "fp4", -1, 32),
            lambda: gradients(framework, learned, x, one[0, 0], x),
            lambda: pytest.raises(ValueError, api.quantize, data, "int8", axis=5),
        ]

    def run(count: int) -> None:
        for i in range(count):
            calls[i % len(calls)]()

    run(CALLS // 5)  # pools and caches fill
    settle()
    before = status("VmRSS")
    run(CALLS)
    settle()
    assert status("VmRSS") - before < 2 * MIB


def main() -> None:
    """Write a table of what each call's memory rises by, beyond its results."""
    tables = [
        {name: extra_memory(framework, call) for name, call in data_calls(framework).items()}
        for framework in map(make, ("torch", "jax"))
    ]
    print("| call on 32 MiB | torch | jax |\n| --- | --- | --- |")
    for name in tables[0]:
        print(f"| {name} | " + " | ".join(f"{table[name] / MIB:.1f} MiB" for table in tables) + " |")


if __name__ == "__main__":
    main()
