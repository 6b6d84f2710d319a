"""Safetensors files: written by either framework, read by either, the same bits; and files that lie."""

from __future__ import annotations

import json
import os
import random
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from matrix import numpy_dtype
from quark_kernels import PRESETS, PerBlock, PerChannel, PerGroup, QuantSpec, files, interop
from quark_kernels.qtensor import QTensorBase
from test_compressed_tensors import assert_same_qtensor, raw
from test_parity import run_python

DTYPES = [
    "bool",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "complex64",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
]
SHAPES = [(7,), (3, 5), (), (0, 4), (2, 1, 3)]
SPECS = [
    *PRESETS.values(),
    QuantSpec("int4", PerChannel(0)),
    QuantSpec("int4", PerGroup(7), symmetric=False),
    QuantSpec("uint4", PerGroup(16), symmetric=False),
    QuantSpec("fp8_e4m3", PerBlock((2, 8))),
]


def plain_arrays() -> dict[str, np.ndarray]:
    """Every dtype in every shape, with bits of every kind."""
    arrays = {}
    for dtype in DTYPES:
        for shape in SHAPES:
            kind = numpy_dtype(dtype)
            n = int(np.prod(shape)) * kind.itemsize
            data = (np.arange(n) * 37 % (2 if dtype == "bool" else 256)).astype(np.uint8)
            arrays[f"{dtype} {shape}"] = data.view(kind).reshape(shape)
    return arrays


def framework_array(framework: Any, a: np.ndarray) -> Any:
    """An array of the framework; NumPy's where JAX has no 64 bits."""
    return a if framework.name == "jax" and a.dtype.name in ("int64", "uint64", "float64") else framework.array(a)


def quantized(framework: Any) -> dict[str, Any]:
    """A QTensor of every spec, packed too where it can be."""
    x = framework.array(np.random.default_rng(0).standard_normal((4, 48)).astype(np.float32))
    tensors = {}
    for spec in SPECS:
        can_pack = spec.element.can_pack or spec.scale_format == "exponent"
        for packed in (None, True) if can_pack else (None,):
            tensors[f"{spec} {packed}"] = framework.api.quantize(x, spec, packed=packed)
    return tensors


def dtype_of(a: Any) -> str:
    return str(a.dtype).removeprefix("torch.")


# ---- there and back --------------------------------------------------------------------------------------------------


def test_plain_tensors(framework: Any, tmp_path: Path) -> None:
    arrays = plain_arrays()
    path = tmp_path / "x.safetensors"
    interop.save_safetensors(path, {name: framework_array(framework, a) for name, a in arrays.items()})
    for reader in ("torch", "jax"):
        pytest.importorskip(reader)
        loaded = interop.load_safetensors(path, reader)
        assert list(loaded) == sorted(arrays)
        for name, a in arrays.items():
            assert (dtype_of(loaded[name]), tuple(loaded[name].shape)) == (a.dtype.name, a.shape), name
            assert raw(loaded[name]) == a.tobytes(), name


def test_all_readers_agree(framework: Any, tmp_path: Path) -> None:
    """safetensors' own functions read what we write, and we what they write."""
    path = tmp_path / "x.safetensors"
    arrays = {name: a for name, a in plain_arrays().items() if hasattr(np, a.dtype.name)}
    interop.save_safetensors(path, {name: framework_array(framework, a) for name, a in arrays.items()}, {"a": "b"})
    theirs = safetensors.numpy.load_file(path)
    assert sorted(theirs) == sorted(arrays)
    assert all(theirs[name].tobytes() == a.tobytes() and theirs[name].dtype == a.dtype for name, a in arrays.items())
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"a": "b"}
    safetensors.numpy.save_file(arrays, path)
    ours = interop.load_safetensors(path, framework.name)
    assert all(raw(ours[name]) == a.tobytes() for name, a in arrays.items())


def test_torch_reads_ours_and_we_theirs(torch_frontend: Any, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = {name: torch_frontend.array(a) for name, a in plain_arrays().items()}
    tensors["float4"] = torch.arange(6, dtype=torch.uint8).view(torch.float4_e2m1fn_x2).reshape(2, 3)
    interop.save_safetensors(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs")
    for theirs, ours in (
        (load_file(tmp_path / "ours"), tensors),
        (tensors, interop.load_safetensors(tmp_path / "theirs")),
    ):
        assert sorted(theirs) == sorted(ours)
        for name, t in ours.items():
            assert (t.dtype, t.shape) == (theirs[name].dtype, theirs[name].shape)
            assert raw(t) == raw(theirs[name])


def test_qtensors(framework: Any, tmp_path: Path) -> None:
    tensors = quantized(framework)
    path = tmp_path / "x.safetensors"
    interop.save_safetensors(path, tensors)
    loaded = interop.load_safetensors(path, framework.name)
    assert list(loaded) == sorted(tensors)
    for name, q in tensors.items():
        assert type(loaded[name]) is framework.api.QTensor
        assert_same_qtensor(loaded[name], q)
        assert raw(loaded[name].dequantize()) == raw(q.dequantize())


def test_both_frameworks_write_the_same_file(torch_frontend: Any, jax_frontend: Any, tmp_path: Path) -> None:
    for frontend in (torch_frontend, jax_frontend):
        plain = {name: framework_array(frontend, a) for name, a in plain_arrays().items()}
        interop.save_safetensors(tmp_path / frontend.name, quantized(frontend) | plain, {"format": "pt"})
    assert (tmp_path / "torch").read_bytes() == (tmp_path / "jax").read_bytes()
    for frontend in (torch_frontend, jax_frontend):
        loaded = interop.load_safetensors(tmp_path / "torch", frontend.name)
        for name, q in quantized(frontend).items():
            assert_same_qtensor(loaded[name], q)
        interop.save_safetensors(tmp_path / "again", loaded, {"format": "pt"})
        assert (tmp_path / "again").read_bytes() == (tmp_path / "torch").read_bytes()


@pytest.mark.parametrize(("writer", "reader"), [("torch", "jax"), ("jax", "torch")])
def test_one_framework_at_a_time(writer: str, reader: str, tmp_path: Path) -> None:
    """Neither side needs the other's framework."""
    pytest.importorskip(writer)
    pytest.importorskip(reader)
    code = """
import sys; sys.modules[{without!r}] = None
import numpy as np
from quark_kernels import interop
import quark_{here} as api
x = np.arange(96, dtype=np.float32).reshape(2, 48)
import {module} as framework
q = lambda: api.quantize(framework.{make}(x), "nvfp4")
"""
    made = {"torch": ("torch", "from_numpy", "jax"), "jax": ("jax.numpy", "asarray", "torch")}
    path = str(tmp_path / "x")
    for here, then in (
        (writer, f"interop.save_safetensors({path!r}, {{'q': q(), 'x': framework.{made[writer][1]}(x)}})"),
        (
            reader,
            f"d = interop.load_safetensors({path!r}, {reader!r}); e = q();"
            "print((np.asarray(d['q'].dequantize()) == np.asarray(e.dequantize())).all(), d['q'].spec == e.spec)",
        ),
    ):
        module, make, without = made[here]
        done = run_python(code.format(here=here, module=module, make=make, without=without) + then)
        assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "True"]


def test_any_strides(torch_frontend: Any, tmp_path: Path) -> None:
    import torch

    x = torch.randn(6, 8)
    tensors = {
        "transposed": x.t(),
        "sliced": x[::2, 1:],
        "expanded": x[:1].expand(6, 8),
        "grad": x.clone().requires_grad_(),
        "parameter": torch.nn.Parameter(x),
        "conjugate": torch.complex(x, x).conj(),
        "negative": torch.complex(x, x).conj().imag,
        "one element": x.t()[3:4, 2:3],
        "qtensor": replace(q := torch_frontend.api.quantize(x.t(), "int8"), qvalue=q.qvalue.t().contiguous().t()),
    }
    interop.save_safetensors(tmp_path / "x", tensors)
    loaded = interop.load_safetensors(tmp_path / "x")
    assert torch.equal(loaded.pop("qtensor").dequantize(), tensors.pop("qtensor").dequantize())
    assert all(torch.equal(loaded[name], t) and loaded[name].shape == t.shape for name, t in tensors.items())
    loaded["grad"].add_(1)  # memory of its own


def test_numpy_arrays(tmp_path: Path, framework: Any) -> None:
    big = np.arange(6, dtype=">f4").reshape(2, 3)
    interop.save_safetensors(
        tmp_path / "x", {"big": big, "column": big.T, "scalar": np.float32(3), "flag": np.bool_(True)}
    )
    loaded = interop.load_safetensors(tmp_path / "x", framework.name)
    assert framework.numpy(loaded["big"]).tolist() == big.tolist()
    assert framework.numpy(loaded["column"]).tolist() == big.T.tolist()
    assert (loaded["scalar"].shape, float(loaded["scalar"])) == ((), 3)
    assert bool(loaded["flag"])


def test_64_bits_in_jax(jax_frontend: Any, tmp_path: Path) -> None:
    import jax

    a = np.array([2**40, -1])
    interop.save_safetensors(tmp_path / "x", {"a": a})
    assert isinstance(interop.load_safetensors(tmp_path / "x", "jax")["a"], np.ndarray)
    with jax.enable_x64(True):
        loaded = interop.load_safetensors(tmp_path / "x", "jax")["a"]
        assert isinstance(loaded, jax.Array)
        assert loaded.tolist() == a.tolist()


def test_loaded_tensors_are_shared_without_a_copy(torch_frontend: Any, jax_frontend: Any, tmp_path: Path) -> None:
    interop.save_safetensors(tmp_path / "x", {f"{n}": np.ones(n, np.uint8) for n in (1, 3, 7, 64)})
    for t in interop.load_safetensors(tmp_path / "x").values():
        interop.to_jax(t, copy=False)


NAMES = ["", ".", "a.b.c", "ü 漢 🙂", 'quote " \\ \n \t', "\0", "a/b", "__metadata__x", "x" * 10_000, "\u2028", "."]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:20])
def test_names(name: str, torch_frontend: Any, tmp_path: Path) -> None:
    import torch

    q = torch_frontend.api.quantize(torch.randn(2, 4), "int8")
    interop.save_safetensors(tmp_path / "x", {name: q, f"{name}_": torch.ones(3)}, {name: name})
    loaded = interop.load_safetensors(tmp_path / "x")
    assert sorted(loaded) == sorted([name, f"{name}_"])
    assert_same_qtensor(loaded[name], q)


def test_metadata_of_the_file(torch_frontend: Any, tmp_path: Path) -> None:
    q = torch_frontend.api.quantize(torch_frontend.array(np.ones((2, 32), np.float32)), "int4", group_size=16)
    interop.save_safetensors(tmp_path / "x", {"w": q}, {"format": "pt"})
    with safetensors.safe_open(tmp_path / "x", framework="numpy") as file:
        metadata = file.metadata()
        assert sorted(file.keys()) == ["w.qvalue", "w.scale"]
    assert metadata["format"] == "pt"
    assert json.loads(metadata["quark_kernels"]) == {
        "version": 1,
        "tensors": {"w": {"spec": "int4 group=16,-1", "shape": [2, 32], "dtype": "float32", "packed": False}},
    }


# ---- errors of saving ------------------------------------------------------------------------------------------------


def test_errors_of_saving(framework: Any, tmp_path: Path) -> None:
    path = tmp_path / "x"
    x = framework.array(np.ones((2, 32), np.float32))
    q = framework.api.quantize(x, "int8")
    mixed = framework.api.quantize(x, "nvfp4")
    for tensors, error, message in [
        ([x], TypeError, "tensors is a list; allowed: a dictionary"),
        ({1: x}, TypeError, "tensors has the name 1; allowed: strings"),
        ({"a": 1}, TypeError, "a is a builtins.int; allowed: QTensors, torch tensors, JAX and NumPy arrays"),
        ({"a": np.array(["x"], object)}, TypeError, "a has dtype object; allowed: bool, int8"),
        ({"a": q, "a.qvalue": x}, ValueError, "tensors has 'a.qvalue', a name that belongs to the QTensor 'a'"),
        ({"a.pair_bits": x, "a": q}, ValueError, "tensors has 'a.pair_bits', a name that belongs"),
        ({"a": q, "a.scale": q}, ValueError, "tensors has 'a.scale', a name that belongs"),
        ({"__metadata__": x}, ValueError, "a name that safetensors keeps"),
        ({"\ud800": x}, ValueError, "must be Unicode text"),
        ({"a": replace(q, scale=x)}, ValueError, "a: q.scale has shape"),
        ({"a": replace(q, qvalue=x)}, TypeError, "a: q.qvalue has dtype float32"),
        ({"a": replace(q, pair_bits=x)}, ValueError, "a: q.pair_bits is given"),
        ({"a": replace(mixed, global_scale=None)}, ValueError, "a: q.global_scale is None"),
        ({"a": replace(q, dtype=framework.dtype("int8"))}, TypeError, "a: q has dtype int8; allowed: float32"),
    ]:
        with pytest.raises(error, match=message):
            interop.save_safetensors(path, tensors)
    for metadata, error, message in [
        ([], TypeError, r"metadata is \[\]; allowed: a dictionary of strings"),
        ({"a": 1}, TypeError, "metadata is {'a': 1}"),
        ({"quark_kernels": ""}, ValueError, "metadata has 'quark_kernels', a key that this library keeps"),
        ({"a": "\udfff"}, ValueError, "must be Unicode text"),
    ]:
        with pytest.raises(error, match=message):
            interop.save_safetensors(path, {"a": x}, metadata)
    with pytest.raises(TypeError):
        interop.save_safetensors(None, {"a": x})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_tensors_without_bytes(torch_frontend: Any, tmp_path: Path) -> None:
    import torch

    for t, error, message in [
        (torch.eye(2).to_sparse(), TypeError, "a has layout torch.sparse_coo"),
        (torch.empty(3, device="meta"), ValueError, "a is a meta tensor"),
        (torch.zeros(2, dtype=torch.complex128), TypeError, "a has dtype complex128"),
    ]:
        with pytest.raises(error, match=message):
            interop.save_safetensors(tmp_path / "x", {"a": t})


def test_arrays_without_bytes(jax_frontend: Any, tmp_path: Path) -> None:
    import jax
    import jax.numpy as jnp

    deleted = jnp.ones(3)
    deleted.delete()
    for a, error, message in [
        (deleted, ValueError, "a has been deleted or donated"),
        (jnp.ones(4, jnp.int4), TypeError, "a has dtype int4"),
        (jax.random.key(0), TypeError, "a has dtype key"),
    ]:
        with pytest.raises(error, match=message):
            interop.save_safetensors(tmp_path / "x", {"a": a})
    with pytest.raises(TypeError, match="a is a tracer"):
        jax.jit(lambda x: interop.save_safetensors(tmp_path / "x", {"a": x}))(jnp.ones(3))


def test_a_failed_save_changes_nothing(torch_frontend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    path = tmp_path / "x"
    interop.save_safetensors(path, {"a": torch.ones(3)})
    before = path.read_bytes()
    for error in (KeyboardInterrupt, OSError, RuntimeError):
        calls = iter([files.to_raw, None])

        def fail(name: str, x: Any, calls: Iterator[Any] = calls, error: Any = error) -> Any:
            call = next(calls)
            if call is None:
                raise error
            return call(name, x)

        with monkeypatch.context() as patch:
            patch.setattr(files, "to_raw", fail)
            with pytest.raises(error):
                interop.save_safetensors(path, {"a": torch.zeros(3), "b": torch.zeros(3)})
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]
    interop.save_safetensors(path, {"b": torch.zeros(3)})
    assert list(interop.load_safetensors(path)) == ["b"]


def test_where_files_go(torch_frontend: Any, tmp_path: Path) -> None:
    tensors = {"a": np.ones(3, np.float32)}
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real" / "x")
    interop.save_safetensors(link, tensors)
    assert link.is_symlink()
    assert list(interop.load_safetensors(tmp_path / "real" / "x")) == ["a"]
    longest = tmp_path / ("x" * 255)
    interop.save_safetensors(str(longest), tensors)
    mask = os.umask(0)
    os.umask(mask)
    assert longest.stat().st_mode & 0o777 == 0o666 & ~mask
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(IsADirectoryError):
        interop.save_safetensors(tmp_path, tensors)
    with pytest.raises(ValueError, match="isn't a regular file; it can't be replaced"):
        interop.save_safetensors(tmp_path / "fifo", tensors)
    with pytest.raises(FileNotFoundError):
        interop.save_safetensors(tmp_path / "none" / "x", tensors)


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_memory(torch_frontend: Any, tmp_path: Path) -> None:
    """Loading needs the tensors' memory and no more; saving what torch holds needs next to none."""
    import torch

    tensors = {f"{i}": torch.ones(2**20) for i in range(8)}
    tracemalloc.start()
    try:
        interop.save_safetensors(tmp_path / "x", tensors)
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.reset_peak()
        loaded = interop.load_safetensors(tmp_path / "x")
        assert tracemalloc.get_traced_memory()[1] < 33 * 2**20
    finally:
        tracemalloc.stop()
    assert all(torch.equal(loaded[name], t) for name, t in tensors.items())


# ---- files that lie --------------------------------------------------------------------------------------------------


def file_of(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str = "U8", shape: Any = (4,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


PETABYTES = 2**53
LIES: dict[str, bytes] = {
    "empty": b"",
    "short": b"\x01\x02",
    "no header": struct.pack("<Q", 0),
    "a long header": file_of(b"{}", length=PETABYTES),
    "the longest header": file_of(b"{}", length=2**64 - 1),
    "an array": file_of([]),
    "deep": file_of(b"[" * 100_000),
    "deep objects": file_of(b'{"a":' * 100_000),
    "not UTF-8": file_of(b'{"\xff":1}'),
    "half a surrogate": file_of(b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
    "NaN": file_of(b'{"a":NaN}'),
    "truncated": file_of({"a": entry()}, bytes(3)),
    "longer": file_of({"a": entry()}, bytes(5)),
    "a hole": file_of({"a": entry(), "b": entry(offsets=(8, 12))}, bytes(12)),
    "overlap": file_of({"a": entry(), "b": entry(offsets=(2, 6))}, bytes(6)),
    "backwards": file_of({"a": entry(offsets=(4, 0))}, bytes(4)),
    "negative": file_of({"a": entry(shape=(-4,))}, bytes(4)),
    "petabytes": file_of({"a": entry(shape=(PETABYTES,), offsets=(0, PETABYTES))}, bytes(4)),
    "wrapping": file_of({"a": entry(shape=(2**32, 2**32), offsets=(0, 0))}),
    "wrapping, empty": file_of({"a": entry(shape=(2**62, 2**62, 0), offsets=(0, 0))}),
    "long and empty": file_of({"a": entry(shape=(2**63, 0), offsets=(0, 0))}),
    "too many axes": file_of({"a": entry(shape=(1,) * 65, offsets=(0, 1))}, bytes(1)),
    "a fraction": file_of({"a": entry(shape=(0.5,), offsets=(0, 0))}),
    "no shape": file_of({"a": {"dtype": "U8", "data_offsets": [0, 0]}}),
    "unknown dtype": file_of({"a": entry("I3")}, bytes(4)),
    "no framework's dtype": file_of({"a": entry("F6_E2M3", (8,), (0, 6))}, bytes(6)),
    "neither true nor false": file_of({"a": entry("BOOL")}, b"\0\1\2\0"),
    "odd F4": file_of({"a": entry("F4", (2, 3), (0, 3))}, bytes(3)),
    "metadata of numbers": file_of({"__metadata__": {"a": 1}}),
    "a name twice": file_of(
        b'{"a":%s,"a":%s}' % (json.dumps(entry()).encode(), json.dumps(entry("I8")).encode()), b"1234"
    ),
    "a name twice, once escaped": file_of(b'{"a":%s,"\\u0061":%s}' % ((json.dumps(entry()).encode(),) * 2), b"1234"),
    "metadata twice": file_of(b'{"__metadata__":{"a":"1"},"__metadata__":{"a":"2"}}'),
    "a name of metadata twice": file_of(b'{"__metadata__":{"a":"1","a":"2"}}'),
    "a dtype twice": file_of(b'{"a":{"dtype":"U8","dtype":"I8","shape":[0],"data_offsets":[0,0]}}'),
}


@pytest.mark.parametrize("lie", LIES)
def test_files_that_lie(lie: str, framework: Any, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(LIES[lie])
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="x: "):
            interop.load_safetensors(path, framework.name)
        assert tracemalloc.get_traced_memory()[1] < 4 * len(LIES[lie]) + 2**20
    finally:
        tracemalloc.stop()


def with_metadata(path: Path, change: Any) -> None:
    """Writes a QTensor's file again, its header changed."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    metadata = json.loads(header["__metadata__"]["quark_kernels"])
    changed = change(header, metadata)
    header["__metadata__"]["quark_kernels"] = changed if isinstance(changed, str) else json.dumps(metadata)
    path.write_bytes(file_of(header, data[8 + length :]))


def _set(*keys: Any, value: Any) -> Any:
    def change(_: Any, metadata: Any) -> None:
        for key in keys[:-1]:
            metadata = metadata[key]
        metadata[keys[-1]] = value

    return change


def _rename(old: str, new: str) -> Any:
    return lambda header, _: header.update({new: header.pop(old)})


W = ("tensors", "w")
FALSE_METADATA: dict[str, tuple[Any, str]] = {
    "not JSON": (lambda *_: "{", "not JSON"),
    "deep": (lambda *_: "[" * 100_000, "not JSON"),
    "long numbers": (lambda *_: "9" * 10_000, "not JSON"),
    "a tensor twice": (
        lambda _, m: json.dumps(m)[:-2] + f', "w": {json.dumps(m["tensors"]["w"])}}}}}',
        "'w' is there",
    ),
    "an array": (lambda *_: "[]", "allowed: an object of version and tensors"),
    "a number": (lambda *_: "3", "allowed: an object"),
    "no version": (lambda _, m: m.pop("version") and None, "allowed: an object"),
    "more": (_set("more", value=1), "allowed: an object"),
    "a newer version": (_set("version", value=2), "version is 2; this release reads 1"),
    "a true version": (_set("version", value=True), "version is True"),
    "tensors of an array": (_set("tensors", value=[]), "allowed: an object"),
    "a tensor of a string": (_set(*W, value="int8"), "'w': allowed: an object of spec, shape, dtype, packed"),
    "a field less": (lambda _, m: m["tensors"]["w"].pop("packed") and None, "allowed: an object of spec"),
    "a field more": (_set(*W, "x", value=1), "allowed: an object of spec"),
    "an unknown spec": (_set(*W, "spec", value="int77"), "format is 'int77'"),
    "a wild spec": (_set(*W, "spec", value="int8 group=999999999999999999999,-1"), "'w'"),
    "another spec": (_set(*W, "spec", value="uint8"), "q.qvalue has dtype int8"),
    "a spec with other parts": (_set(*W, "spec", value="nvfp4"), "'w'"),
    "a mx spec": (_set(*W, "spec", value="fp4 group=32,-1 scale=e8m0"), "'w'"),
    "a spec's number": (_set(*W, "spec", value=8), "spec and dtype must be strings"),
    "an axis too far": (_set(*W, "spec", value="int8 channel=7"), "axis is 7"),
    "a wrong shape": (_set(*W, "shape", value=[4, 48]), "q.qvalue has shape"),
    "a huge shape": (_set(*W, "shape", value=[2**60, 2**60]), "shape is one that no tensor can have"),
    "an empty huge shape": (_set(*W, "shape", value=[2**61, 2**61, 0]), "shape is one that no tensor can have"),
    "an infinite shape": (_set(*W, "shape", value=float("inf")), "shape must be a list of lengths"),
    "a negative shape": (_set(*W, "shape", value=[-4, -32]), "shape must be a list of lengths"),
    "a true shape": (_set(*W, "shape", value=[True, 128]), "shape must be a list of lengths"),
    "a fraction": (_set(*W, "shape", value=[4.0, 32]), "shape must be a list of lengths"),
    "many axes": (_set(*W, "shape", value=[1] * 40), "'w'"),
    "no axes": (_set(*W, "shape", value=[]), "'w'"),
    "a dtype": (_set(*W, "dtype", value="int8"), "dtype is 'int8'; allowed: float32"),
    "a dtype's name": (_set(*W, "dtype", value="__class__"), "dtype is '__class__'"),
    "packed": (_set(*W, "packed", value=True), "'w'"),
    "packed 1": (_set(*W, "packed", value=1), "packed true or false"),
    "a tensor that isn't there": (lambda _, m: m["tensors"].update(v=m["tensors"]["w"]), "'v': v: q.qvalue is None"),
    "a missing part": (_rename("w.scale", "v"), "q.scale is None"),
    "an extra part": (_rename("plain", "w.pair_bits"), "q.pair_bits is given"),
    "a zero point of floats": (_rename("plain", "w.zero_point"), "q.zero_point has dtype float32"),
    "a tensor of the QTensor's name": (_rename("plain", "w"), "it is a plain tensor as well"),
    "exchanged parts": (
        lambda h, _: h.update({"w.scale": h["w.qvalue"], "w.qvalue": h["w.scale"]}),
        "q.qvalue has dtype float32",
    ),
    "a part of another dtype": (lambda h, _: h["w.qvalue"].update(dtype="F8_E4M3"), "q.qvalue has dtype float8_e4m3fn"),
}


@pytest.mark.parametrize("name", FALSE_METADATA)
def test_false_metadata(name: str, framework: Any, tmp_path: Path) -> None:
    path = tmp_path / "x"
    x = framework.array(np.ones((4, 32), np.float32))
    interop.save_safetensors(path, {"w": framework.api.quantize(x, "int8"), "plain": x})
    change, message = FALSE_METADATA[name]
    with_metadata(path, change)
    with pytest.raises(ValueError, match="x: metadata 'quark_kernels': .*") as caught:
        interop.load_safetensors(path, framework.name)
    assert message in str(caught.value)


def test_what_isnt_a_file(framework: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    load = interop.load_safetensors
    for path in (tmp_path, tmp_path / "fifo", "/dev/null", "a\0b"):
        with pytest.raises(ValueError, match="not a regular file|null byte"):
            load(path, framework.name)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none", framework.name)
    with pytest.raises(TypeError):
        load(3, framework.name)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="framework is 'numpy'; allowed: torch, jax"):
        load(tmp_path, "numpy")
    assert len(os.listdir("/proc/self/fd")) < 200


def use(tensors: dict[str, Any]) -> None:
    """What has been loaded can be used."""
    for value in tensors.values():
        if isinstance(value, QTensorBase):
            repr(value)
            value.dequantize()


@pytest.mark.parametrize("seed", range(4))
def test_random_damage(seed: int, framework: Any, tmp_path: Path) -> None:
    """Bytes changed, cut out and put in: whatever a file then is, it loads or gives a clear error."""
    rng = random.Random(seed)
    x = framework.array(np.random.default_rng(seed).standard_normal((2, 32)).astype(np.float32))
    specs = ["mx6", "nvfp4", "uint4", "bfp16", "int8"]
    tensors = {f"w{i}": framework.api.quantize(x, spec) for i, spec in enumerate(specs)}
    path = tmp_path / "x"
    interop.save_safetensors(path, {**tensors, "plain": x}, {"format": "pt"})
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    loaded = 0
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            where = rng.randrange(header if rng.random() < 0.9 else len(data))
            match rng.randrange(5):
                case 0:
                    data[where] = rng.randrange(256)
                case 1:
                    data[where] = ord(rng.choice('0123456789{}[],:".\\'))
                case 2:
                    del data[where : where + rng.randrange(1, 9)]
                case 3:
                    data[where:where] = data[where : where + rng.randrange(1, 40)]
                case 4:  # the header keeps its length
                    width = rng.randrange(1, 20)
                    other = rng.randrange(8, header - width)
                    data[where : where + width] = data[other : other + width]
        path.write_bytes(data)
        with suppress(ValueError):
            use(interop.load_safetensors(path, framework.name))
            loaded += 1
    assert loaded < 150


@pytest.mark.parametrize("seed", range(2))
def test_random_headers(seed: int, framework: Any, tmp_path: Path) -> None:
    """Headers that are JSON, with values of other kinds in places."""
    rng = random.Random(seed)
    values = [0, 1, -1, 2**31, 2**53, 2**64, 1.5, True, None, "", "U8", "F4", "bfloat16", "int4", [], [0], [2, 32], {}]
    x = framework.array(np.ones((2, 32), np.float32))
    path = tmp_path / "x"
    interop.save_safetensors(path, {"w": framework.api.quantize(x, "mx9"), "v": framework.api.quantize(x, "mxfp4")})
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]

    def damage(node: Any) -> Any:
        if rng.random() < 0.04:
            return rng.choice(values)
        if isinstance(node, dict):
            return {key: damage(value) for key, value in node.items() if rng.random() > 0.01}
        return [damage(value) for value in node] if isinstance(node, list) else node

    for _ in range(200):
        header = json.loads(whole[8 : 8 + length])
        metadata = json.loads(header["__metadata__"]["quark_kernels"])
        if rng.random() < 0.6:
            header["__metadata__"]["quark_kernels"] = json.dumps(damage(metadata))
        else:
            header = damage(header)
        path.write_bytes(file_of(header, whole[8 + length :]))
        with suppress(ValueError):
            use(interop.load_safetensors(path, framework.name))
