"""Readers of files, states and specs given anything: what comes out is right, or an error that says where it is wrong.

``test_files.py`` has the lies by name; here hypothesis makes them up. What a file holds is worked out anew, from its
JSON and its bytes.
"""

from __future__ import annotations

import json
import shutil
import struct
import tracemalloc
from collections import Counter
from collections.abc import Callable
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from conftest import make
from fuzzing import examples
from quark_kernels import PRESETS, QuantSpec, checkpoint, compressed_tensors, files, interop
from quark_kernels.qtensor import QTensorBase
from test_compressed_tensors import assert_same_qtensor, raw
from test_files import file_of

WIDTHS = {"U8": 8, "I8": 8, "BOOL": 8, "F8_E4M3": 8, "I16": 16, "F16": 16, "BF16": 16, "I32": 32, "F32": 32, "F4": 4}
"""Bits, by safetensors' names."""
HUGE = [2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30]
WILD = [0, 1, -1, *HUGE, 1.5, True, None, "", "U8", "F4", "int4", "bfloat16", [], [0], [-1], [2, 32], [2**62, 4], {}]
"""Values of other kinds, to be anywhere in JSON."""
SPECS = ("int8", "uint4", "mxfp4", "nvfp4", "mx6", "bfp16", "int4 group=16,-1 asymmetric", "fp8_e4m3 channel=0", "bf16")

wild = st.sampled_from(WILD)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all examples of a test."""
    return tmp_path_factory.mktemp("files")


def attempt(call: Callable[[], Any], *allowed: type[Exception]) -> tuple[Any, str]:
    """What a call returns, and the words of the error that it raises instead."""
    try:
        return call(), ""
    except allowed as error:
        assert str(error)  # noqa: PT017 (of an error that may or may not be)
        return None, str(error)


def load(path: Path, framework: Any) -> dict[str, Any] | None:
    """Reads a file. Whatever is in it: no more memory than a few times its own, or a ValueError that names it."""
    tracemalloc.start()
    try:
        tensors, error = attempt(lambda: interop.load_safetensors(path, framework.name), ValueError)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert tensors is not None or str(path) in error
    assert peak < 8 * path.stat().st_size + 2**20, f"{peak} bytes of memory: {error}"
    return tensors


def use(q: Any) -> None:
    """A QTensor that was accepted is one."""
    repr(q)
    assert tuple(q.dequantize().shape) == q.shape
    bits = q.spec.element.bits
    if q.spec.scale_format == "exponent" and q.packed:
        return  # exponents lie between the codes
    *rows, length = q.shape or (1,)
    codes = prod(rows) * (-(-length * bits // 8) if q.packed else length)
    assert prod(q.qvalue.shape) == codes


# ---- headers ---------------------------------------------------------------------------------------------------------


class Tensor(NamedTuple):
    """A tensor of a header; anything may be anything."""

    name: Any
    dtype: Any
    shape: Any
    offsets: Any


def text_of(tensors: list[Tensor], metadata: Any) -> bytes:
    """A header's JSON, written out so that names may come twice."""
    items = [
        f"{json.dumps(t.name)}:{json.dumps({'dtype': t.dtype, 'shape': t.shape, 'data_offsets': t.offsets})}"
        for t in tensors
    ]
    if metadata is not None:
        items.insert(len(items) // 2, f'"__metadata__":{json.dumps(metadata)}')
    return ("{" + ",".join(items) + "}").encode("utf-8", "surrogatepass")


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A file that is sound, or that one to three things are wrong with."""
    tensors, start = [], 0
    names = draw(st.lists(st.sampled_from(["a", "b", "w.qvalue", "ü", ""]), min_size=1, max_size=4, unique=True))
    for name in names:
        dtype = draw(st.sampled_from(sorted(WIDTHS)))
        shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 6]), max_size=4))
        nbytes = prod(shape) * WIDTHS[dtype] // 8
        tensors.append(Tensor(name, dtype, shape, [start, start + nbytes]))
        start += nbytes
    data = draw(st.binary(min_size=start, max_size=start))
    metadata = draw(st.sampled_from([None, {}, {"format": "pt"}, {"a": "\x00"}]))
    length = None
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2, 3]))):
        at = draw(st.integers(0, len(tensors) - 1)) if tensors else -1
        match draw(st.integers(0, 9)) if tensors else draw(st.integers(7, 9)):
            case 0:
                tensors[at] = tensors[at]._replace(**{draw(st.sampled_from(Tensor._fields)): draw(wild)})
            case 1:
                shape = list(tensors[at].shape) if isinstance(tensors[at].shape, list) else []
                shape.insert(draw(st.integers(0, len(shape))), draw(wild))
                tensors[at] = tensors[at]._replace(shape=shape)
            case 2:
                offsets = draw(st.lists(st.sampled_from([-1, 0, 1, 2, 4, start, start + 1, *HUGE]), max_size=3))
                tensors[at] = tensors[at]._replace(offsets=offsets)
            case 3:
                tensors.insert(draw(st.integers(0, len(tensors))), tensors[at])
            case 4:
                names = [tensors[0].name, "\ud800", "__metadata__", "\0"]
                tensors[at] = tensors[at]._replace(name=draw(st.sampled_from(names)))
            case 5:
                tensors[at] = tensors[at]._replace(shape=[*tensors[at].shape, 2**62, 0, 2**62], offsets=[0, 0])
            case 6:
                del tensors[at]
            case 7:
                data = data[: draw(st.integers(0, len(data)))] + draw(st.binary(max_size=9))
            case 8:
                metadata = draw(st.one_of(wild, st.dictionaries(st.sampled_from(["a", "quark_kernels"]), wild)))
            case _:
                length = draw(st.sampled_from([0, 1, 7, 8, 100, *(n for n in HUGE if n < 2**64)]))
    try:
        text = text_of(tensors, metadata)
    except TypeError:  # a name that isn't text
        text = b"{1:2}"
    if draw(st.integers(0, 9)) == 0:  # bytes of the text itself
        for _ in range(draw(st.integers(1, 3))):
            at = draw(st.integers(0, max(len(text) - 1, 0)))
            text = text[:at] + draw(st.binary(max_size=3)) + text[at + draw(st.integers(0, 3)) :]
    return file_of(text, data, length)


def expected(data: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    """The tensors of a sound file: dtype, shape and bytes."""
    length = struct.unpack("<Q", data[:8])[0]

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert max(Counter(name for name, _ in pairs).values(), default=0) <= 1, "a name came twice and was accepted"
        return dict(pairs)

    header = json.loads(data[8 : 8 + length], object_pairs_hook=unique)
    header.pop("__metadata__", None)
    tensors = {}
    for name, value in header.items():
        first, last = value["data_offsets"]
        tensors[name] = value["dtype"], value["shape"], data[8 + length + first : 8 + length + last]
    assert sum(len(part) for *_, part in tensors.values()) == len(data) - 8 - length
    return tensors


@examples(250)
@given(data=headers())
@example(data=file_of(b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', b"xy"))
@example(data=file_of(text_of([Tensor("a", "U8", [1], [0, 1]), Tensor("a", "U8", [1], [1, 2])], None), b"xy"))
@example(data=file_of(text_of([Tensor("a", "U8", [1], [0, 1]), Tensor("a", "U8", [1], [0, 1])], None), b"x"))
def test_headers(data: bytes, folder: Path) -> None:
    path = folder / "x.safetensors"
    path.write_bytes(data)
    for name in ("torch", "jax"):
        tensors = load(path, make(name))
        if tensors is None:
            continue
        want = expected(data)
        assert sorted(tensors) == sorted(want)
        for key, (dtype, shape, content) in want.items():
            if dtype == "F4":
                shape = [*shape[:-1], shape[-1] // 2]
            assert str(tensors[key].dtype).removeprefix("torch.") == files.DTYPES[dtype]
            assert list(tensors[key].shape) == shape
            assert raw(tensors[key]) == content


# ---- what the metadata says of QTensors ------------------------------------------------------------------------------


def json_of(whole: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", whole[:8])[0]
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


@cache
def qtensors(path: Path) -> bytes:
    """A file of a QTensor of every kind, and a plain tensor."""
    torch = make("torch")
    x = torch.array(np.random.default_rng(0).standard_normal((2, 32)).astype(np.float32))
    tensors = {f"w{i}": torch.api.quantize(x, spec_of(spec)) for i, spec in enumerate(SPECS)}
    interop.save_safetensors(path, tensors | {"plain": x}, {"format": "pt"})
    return path.read_bytes()


def spec_of(text: str) -> Any:
    return text if text in PRESETS else QuantSpec.parse(text)


def paths_in(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, value in inner for place in paths_in(value, (*path, key)))]


def replaced(node: Any, path: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    """The JSON value with one place changed."""
    if not path:
        return change(node)
    copy = dict(node) if isinstance(node, dict) else list(node)
    copy[path[0]] = replaced(copy[path[0]], path[1:], change)
    return copy


OTHER_SPECS = [
    *SPECS,
    "int4",
    "uint8",
    "mxfp6_e2m3",
    "mx9",
    "int8 tile=2,2",
    "int8 token",
    "int16",
    "mxfp8_e4m3",
    "int8 min=-7 max=9",
]
TEXTS = [str(spec_of(spec)) for spec in OTHER_SPECS] + ["", "int8 ", "int9", "int8 group=0,0", "int8 channel=99"]


@st.composite
def damages(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value of which one to three places have become something else."""
    for _ in range(draw(st.integers(1, 3))):
        places = paths_in(value)
        place = draw(st.sampled_from(places if draw(st.integers(0, 9)) == 0 else places[1:] or places))
        other = draw(st.one_of(wild, st.sampled_from(TEXTS), st.sampled_from(["float32", "float16", "int8"])))
        match draw(st.integers(0, 3)):
            case 0 | 1:
                value = replaced(value, place, lambda _, other=other: other)
            case 2 if place:
                value = replaced(value, place[:-1], lambda node, key=place[-1]: without(node, key))
            case _:
                numbers = [n for n in places if type(at(value, n)) is int]
                if numbers:
                    change = draw(st.sampled_from([1, -1, 16, 2**40]))
                    value = replaced(value, draw(st.sampled_from(numbers)), lambda n, by=change: n + by)
    return value


def without(node: Any, key: Any) -> Any:
    return {k: v for k, v in node.items() if k != key} if isinstance(node, dict) else [*node[:key], *node[key + 1 :]]


def at(node: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        node = node[key]
    return node


@examples(120)
@given(choice=st.data())
def test_qtensors(choice: st.DataObject, folder: Path) -> None:
    """Metadata, or the header beside it, of a file of QTensors: an error, or QTensors that are what the file says."""
    path = folder / "q.safetensors"
    header, data = json_of(qtensors(folder / "whole"))
    metadata = json.loads(header["__metadata__"]["quark_kernels"])
    if choice.draw(st.integers(0, 2)):
        name = choice.draw(st.sampled_from(sorted(metadata["tensors"])))
        metadata["tensors"][name] = choice.draw(damages(metadata["tensors"][name]))
    else:
        metadata = choice.draw(damages(metadata))
    header["__metadata__"]["quark_kernels"] = json.dumps(metadata)
    for _ in range(choice.draw(st.sampled_from([0, 0, 1, 2]))):
        one, other = (choice.draw(st.sampled_from(sorted(set(header) - {"__metadata__"}))) for _ in range(2))
        match choice.draw(st.integers(0, 2)):
            case 0:
                header[one], header[other] = header[other], header[one]
            case 1:
                names = [one + choice.draw(st.sampled_from([".scale", "x", ".pair_bits"])), "w0", "w3.zero_point"]
                header[choice.draw(st.sampled_from(names))] = header.pop(one)
            case _:
                kinds = [code for code, bits in WIDTHS.items() if bits == WIDTHS.get(header[one]["dtype"])]
                header[one] = header[one] | {"dtype": choice.draw(st.sampled_from(kinds or ["U8"]))}
    path.write_bytes(file_of(header, data))
    for framework in (make("torch"), make("jax")):
        tensors = load(path, framework)
        if tensors is None:
            continue
        found = {name: q for name, q in tensors.items() if isinstance(q, QTensorBase)}
        assert set(found) == set(metadata["tensors"])
        want = expected(path.read_bytes())
        for name, q in found.items():
            said = metadata["tensors"][name]
            assert (q.spec, list(q.shape), q.packed) == (QuantSpec.parse(said["spec"]), said["shape"], said["packed"])
            use(q)
            for part in q.ARRAYS:
                if getattr(q, part) is not None:
                    assert raw(getattr(q, part)) == want[f"{name}.{part}"][2]
        again = path.with_name("again")
        interop.save_safetensors(again, tensors)
        for name, q in interop.load_safetensors(again, framework.name).items():
            if name in found:
                assert_same_qtensor(q, found[name])


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@examples(40)
@given(choice=st.data())
def test_checkpoints(choice: st.DataObject, folder: Path) -> None:
    """An index and a shard that may be damaged: a new checkpoint, or an error and nothing left behind."""
    root = folder
    source = root / "in"
    source.mkdir(exist_ok=True)
    whole = qtensors(root / "whole")
    header, data = json_of(whole)
    index: Any = {"metadata": {"total_size": 1}, "weight_map": {"plain": "a.safetensors", "w0.scale": "a.safetensors"}}
    if choice.draw(st.booleans()):
        index = choice.draw(damages(index))
        if choice.draw(st.integers(0, 3)) == 0 and isinstance(index, dict):
            bad = ["../a.safetensors", f"{root}/a.safetensors", "a", "/dev/null", "a.safetensors\0"]
            index["weight_map"] = {"plain": choice.draw(st.sampled_from(bad))}
    if choice.draw(st.booleans()):
        header = choice.draw(damages(header))
    for path in (source, root):  # beside it and above it, where it must not be looked for
        (path / "a.safetensors").write_bytes(file_of(header, data))
    (source / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    target = root / "out"
    spec = choice.draw(st.sampled_from(["int8", "mxfp4", "uint4"]))
    options = checkpoint.Options(PRESETS[spec])
    done, error = attempt(lambda: checkpoint.quantize_checkpoint(source, target, options), ValueError, OSError)
    if done is None:
        names = header if isinstance(header, dict) else {}
        files = str(source / "model.safetensors.index.json"), str(source / "a.safetensors")
        assert any(name in error for name in (*files, *map(repr, names))), error
        assert not target.exists()
    else:
        assert done.quantized > 0
        assert set(index["weight_map"].values()) == {"a.safetensors"}
        loaded = interop.load_safetensors(target / "a.safetensors")
        assert {name.removesuffix(".scale") for name in index["weight_map"]} <= {
            n.removesuffix(".scale") for n in loaded
        }
        assert sum(isinstance(t, QTensorBase) for t in loaded.values()) >= done.quantized
        shutil.rmtree(target)
    assert not list(root.glob(".quark*"))


# ---- compressed-tensors ----------------------------------------------------------------------------------------------


@cache
def compressed(framework: Any, text: str) -> dict[str, Any]:
    x = framework.array(np.random.default_rng(1).standard_normal((4, 32)).astype(np.float32))
    return interop.to_compressed_tensors(framework.api.quantize(x, spec_of(text)))


@examples(120)
@given(choice=st.data(), name=st.sampled_from(["torch", "jax"]))
def test_compressed_tensors(choice: st.DataObject, name: str) -> None:
    """Tensors and a config group that may be damaged: a QTensor of the same tensors, or an error that says why."""
    framework = make(name)
    text = choice.draw(
        st.sampled_from(["int4", "int8 channel=0", "uint4 group=8,-1 asymmetric", "mxfp4", "nvfp4", "int3 asymmetric"])
    )
    tensors = dict(compressed(framework, text))
    group: Any = interop.compressed_tensors_scheme(spec_of(text))
    if choice.draw(st.booleans()):
        group = choice.draw(damages(group))
    for _ in range(choice.draw(st.sampled_from([0, 1, 1, 2]))):
        key = choice.draw(st.sampled_from(sorted(tensors))) if tensors else "weight_packed"
        match choice.draw(st.integers(0, 4)):
            case 0:
                tensors.pop(key, None)
            case 1:
                length = choice.draw(st.sampled_from([-1, 0, 1, 3, 4, 31, 33, 2**31 - 1, 2**62]))
                lengths = choice.draw(st.sampled_from([[4, length], [length, 32], [length], [4, 32, length], []]))
                tensors["weight_shape"] = np.array(lengths, np.int64)
            case 2:
                other = choice.draw(st.sampled_from(["float32", "uint8", "int8", "int32", "int16", "bool"]))
                tensors[key] = framework.array(np.ones((4, 4), other))
            case 3:
                tensors[key] = choice.draw(wild)
            case _:
                kept = choice.draw(st.sampled_from([(0, 32), (3, 32), (4, 1), (0, 0)]))
                if getattr(tensors.get(key), "ndim", 0) == 2:
                    tensors[key] = tensors[key][: kept[0], : kept[1]]
    q, error = attempt(lambda: interop.from_compressed_tensors(tensors, group), ValueError, TypeError)
    if q is None:
        assert any(word in error for word in ("weight", "spec", "format", "symmetric")), error
        return
    use(q)
    layout = compressed_tensors.layout_of(q.spec, q.ndim)
    again = interop.to_compressed_tensors(q)
    assert raw(again["weight_packed"]) == raw(tensors["weight_packed"])
    if layout.format == compressed_tensors.INTEGERS:
        assert [int(n) for n in tensors["weight_shape"]] == list(q.shape)


# ---- specs -----------------------------------------------------------------------------------------------------------

WORDS = [
    *(str(spec_of(spec)) for spec in OTHER_SPECS),
    *("channel", "group", "tile", "token", "asymmetric", "scale", "rule", "rounding", "min", "max", "block", "packed"),
    *(f"{key}={value}" for key in ("channel", "group", "tile", "min", "max") for value in (0, "1", "2,3", -1, 10**30)),
    *(f"scale={name}" for name in ("float32", "e8m0", "e4m3", "exponent", "microexponents", "global")),
    *("rule=floor", "rule=even", "rounding=half_up", "rounding=stochastic"),
    "=",
    ",",
    "\0",
    "group=1_6,-1",
    "group=\u0661,-1",
    "\u2003",
    "9" * 5000,
]


@examples(200)
@given(words=st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=6)), max_size=6), joint=st.sampled_from(" \t"))
def test_spec_texts(words: list[str], joint: str) -> None:
    """A text is refused, or it is a spec whose own text and JSON are read back as the same one."""
    text = joint.join(words)
    spec, _ = attempt(lambda: QuantSpec.parse(text), ValueError)
    if spec is None:
        return
    for again in (QuantSpec.parse(str(spec)), QuantSpec.from_json(json.loads(json.dumps(spec.to_json())))):
        assert again == spec
        assert hash(again) == hash(spec)
        assert str(again) == str(spec)


@examples(100)
@given(value=damages({"version": 1, "spec": "int4 group=16,-1"}))
def test_spec_json(value: Any) -> None:
    spec, _ = attempt(lambda: QuantSpec.from_json(value), ValueError)
    assert spec is None or spec == QuantSpec.parse(value["spec"])


# ---- states of modules -----------------------------------------------------------------------------------------------


@examples(60)
@given(choice=st.data(), spec=st.sampled_from(SPECS))
def test_module_states(choice: st.DataObject, spec: str, torch_frontend: Any) -> None:
    """A state that doesn't fit a layer is refused, by a name in it, and leaves the layer's weight as it was."""
    import torch

    from quark_torch.nn import QuantizedLinear

    def layer() -> QuantizedLinear:
        return QuantizedLinear.from_linear(torch.nn.Linear(32, 4), spec_of(spec))

    mine, theirs = layer(), layer()
    state = dict(theirs.state_dict())
    is_damaged = choice.draw(st.booleans())
    key = choice.draw(st.sampled_from(sorted(state)))
    if is_damaged:
        t = state[key]
        others = [
            torch.zeros(3),
            t[None],
            t.to(torch.float64),
            t.view(-1)[:1].clone(),
            t.bool(),
            "x",
            None,
        ]
        state[key] = choice.draw(st.sampled_from(others))
        if choice.draw(st.booleans()):
            del state[key]
    before = {name: t.clone() for name, t in mine.state_dict().items()}
    done, error = attempt(lambda: mine.load_state_dict(state), RuntimeError, ValueError, TypeError)
    if done is None:
        assert is_damaged
        assert key.removeprefix("_extra_") in error, error
        for name, t in mine.state_dict().items():  # the others may have been loaded before
            assert raw(t) == raw(before[name]) or (name != key and raw(t) == raw(theirs.state_dict()[name]))
        return
    use(mine.weight)
    for name, t in theirs.state_dict().items():
        assert raw(mine.state_dict()[name]) == raw(t) or (is_damaged and name == key)
