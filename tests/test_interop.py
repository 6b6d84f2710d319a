"""Tensors between the frameworks: the same memory, the same bits, and clear reasons where a copy is needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from quark_kernels import PRESETS, interop

pytest.importorskip("torch")
pytest.importorskip("jax")

import jax
import jax.numpy as jnp
import torch

import quark_jax
import quark_torch

DTYPES = [
    "float32",
    "float16",
    "bfloat16",
    "int8",
    "uint8",
    "int16",
    "uint16",
    "int32",
    "bool",
    "complex64",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
]


def raw(a: Any) -> bytes:
    if isinstance(a, torch.Tensor):
        return a.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return np.asarray(a).tobytes()


def pointer(a: Any) -> int:
    return a.data_ptr() if isinstance(a, torch.Tensor) else a.unsafe_buffer_pointer()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64,), (3, 5), (), (0, 4)])
def test_arrays(dtype: str, shape: tuple[int, ...]) -> None:
    n = int(np.prod(shape)) * getattr(torch, dtype).itemsize
    codes = torch.arange(n).to(torch.uint8) % (2 if dtype == "bool" else 255)
    t = torch.empty(shape, dtype=getattr(torch, dtype))
    t.view(-1).view(torch.uint8).copy_(codes) if n else None
    j = interop.to_jax(t, copy=False)
    back = interop.to_torch(j, copy=False)
    assert isinstance(j, jax.Array)
    assert (j.dtype.name, j.shape) == (dtype, shape)
    assert (back.dtype, back.shape) == (t.dtype, t.shape)
    assert raw(j) == raw(t) == raw(back)
    if n:
        assert pointer(j) == pointer(t) == pointer(back)


@pytest.mark.parametrize("preset", PRESETS)
def test_qtensors(preset: str) -> None:
    x = torch.randn(6, 64)
    ours = quark_torch.quantize(x, preset)
    theirs = interop.to_jax(ours, copy=False)
    assert isinstance(theirs, quark_jax.QTensor)
    for name in ours.ARRAYS:
        mine, shared = getattr(ours, name), getattr(theirs, name)
        assert (mine is None) == (shared is None)
        assert mine is None or pointer(shared) == pointer(mine)
    assert (theirs.spec, theirs.shape, theirs.packed, theirs.dtype) == (ours.spec, ours.shape, ours.packed, jnp.float32)
    assert raw(theirs.dequantize()) == raw(ours.dequantize())
    back = interop.to_torch(theirs, copy=False)
    assert isinstance(back, quark_torch.QTensor)
    assert raw(back.dequantize()) == raw(ours.dequantize())


def test_from_jax_first() -> None:
    q = quark_jax.quantize(jax.random.normal(jax.random.key(0), (4, 64)), "uint4", group_size=16)
    t = interop.to_torch(q, copy=False)
    assert pointer(t.zero_point) == pointer(q.zero_point)
    assert raw(t.dequantize()) == raw(q.dequantize())


def test_trees() -> None:
    tree = {"w": quark_torch.quantize(torch.randn(4, 32), "int4", axis=0), "b": [torch.ones(3), None, 2.5]}
    there = interop.to_jax(tree)
    assert isinstance(there["w"], quark_jax.QTensor)
    assert isinstance(there["b"][0], jax.Array)
    assert there["b"][1:] == [None, 2.5]
    back = interop.to_torch(there)
    assert raw(back["w"].dequantize()) == raw(tree["w"].dequantize())
    assert interop.to_jax(there)["b"][0] is there["b"][0]


REASONS = [
    ("aligned", torch.randn(65)[1:], "not 64-byte aligned: it starts 4 bytes past"),
    ("transposed", torch.randn(4, 8).t(), r"strided: shape \(8, 4\) has strides \(1, 8\)"),
    ("sliced", torch.randn(4, 8)[:, ::2], "strided"),
    ("expanded", torch.randn(1, 16).expand(4, 16), "strided"),
    ("grad", torch.randn(16, requires_grad=True), "requires_grad"),
    ("negative", torch.complex(torch.zeros(4), torch.ones(4)).conj().imag, "negative view"),
]


@pytest.mark.parametrize(("t", "reason"), [row[1:] for row in REASONS], ids=[row[0] for row in REASONS])
def test_reasons_to_copy(t: torch.Tensor, reason: str) -> None:
    with pytest.raises(ValueError, match=f"copy is False, but x can't be shared: .*{reason}"):
        interop.to_jax(t, copy=False)
    copied = interop.to_jax(t)
    assert np.array_equal(np.asarray(copied), t.detach().resolve_neg().numpy())
    assert pointer(copied) != pointer(t)


def test_copy_is_a_copy() -> None:
    t = torch.ones(64)
    j = interop.to_jax(t, copy=True)
    t.zero_()
    assert float(j.sum()) == 64
    back = interop.to_torch(j, copy=True)
    back.zero_()
    assert float(j.sum()) == 64


def test_shared_memory_is_shared() -> None:
    t = torch.ones(64)
    j = interop.to_jax(t, copy=False)
    t[0] = 5
    assert np.asarray(j)[0] == 5


def test_sharded_arrays() -> None:
    if len(jax.devices()) < 2:
        pytest.skip("one device only")
    mesh = jax.make_mesh((2,), ("a",))
    j = jax.device_put(jnp.arange(8.0), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a")))
    with pytest.raises(ValueError, match="x is sharded over 2 devices"):
        interop.to_torch(j, copy=False)
    assert interop.to_torch(j).tolist() == list(range(8))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: interop.to_jax("text"), TypeError, r"x holds a builtins\.str; allowed: torch tensors"),
        (lambda: interop.to_jax(np.ones(3)), TypeError, r"x holds a numpy\.ndarray"),
        (lambda: interop.to_torch([{"a": b"x"}]), TypeError, r"x holds a builtins\.bytes"),
        (lambda: interop.to_jax(torch.ones(3), copy=1), TypeError, "copy is 1; allowed: None, True or False"),
        (lambda: interop.to_jax(torch.ones(3).double()), ValueError, "x is float64; JAX has no such dtype unless"),
        (lambda: interop.to_jax(torch.ones(3).long()), ValueError, "x is int64; JAX has no such dtype unless"),
        (lambda: interop.to_jax(torch.eye(2).to_sparse()), TypeError, "x has layout torch.sparse_coo"),
        (lambda: interop.to_torch(jnp.ones(4, jnp.int4)), ValueError, "x is int4, which has no DLPack form"),
        (lambda: jax.jit(interop.to_torch)(jnp.ones(3)), TypeError, "x holds a tracer"),
    ],
)
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
