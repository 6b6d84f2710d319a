"""`python -m quark_kernels quantize`: whole checkpoints, the memory it takes, and what it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

from quark_kernels import PRESETS, PerGroup, QuantSpec, __main__, checkpoint, files, interop
from test_compressed_tensors import assert_same_qtensor, raw
from test_parity import run_python

METADATA = {"format": "pt", "by": "a test"}


def tensors_of(framework: Any) -> dict[str, Any]:
    """A small model: weights of several dtypes, and what isn't quantized."""
    rng = np.random.default_rng(0)

    def values(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    arrays = {
        "embed.weight": values(10, 32),
        "layers.0.up.weight": values(8, 32).astype(np.float16),
        "layers.0.norm.weight": values(32),
        "layers.0.ids": np.arange(6, dtype=np.int32).reshape(2, 3),
        "layers.1.conv.weight": values(2, 3, 32),
        "scalar": values(),
        "empty": values(0, 32),
    }
    return {name: framework.array(a) for name, a in arrays.items()}


QUANTIZED = ("embed.weight", "layers.0.up.weight", "layers.1.conv.weight")


def write(path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> Path:
    interop.save_safetensors(path, tensors, METADATA if metadata is None else metadata)
    return path


def quantize(*arguments: Any) -> int:
    return __main__.main(["quantize", *map(str, arguments)])


def metadata_of(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, framework="numpy") as file:
        return file.metadata()


def shards(path: Path, tensors: dict[str, Any]) -> Path:
    """A directory of two shards, as Hugging Face has them."""
    path.mkdir()
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[:3], names[3:]), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        write(path / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1, "total_parameters": 2}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


# ---- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "options", "keywords"),
    [
        ("int8", [], {}),
        ("int4", ["--axis", "0", "--packed"], {"axis": 0, "packed": True}),
        ("uint4", ["--group-size", "16"], {"group_size": 16, "packed": True}),
        ("int4 group=16,-1 asymmetric", ["--no-packed"], {}),
        ("mxfp4", ["--no-packed"], {"packed": False}),
        ("nvfp4", [], {}),
        ("mx6", ["--packed", "--group-size", "8"], {"packed": True, "group_size": 8}),
        ("bfp16", ["--packed"], {"packed": True}),
        ("bf16", [], {}),
    ],
)
def test_a_file(spec: str, options: list[str], keywords: dict[str, Any], framework: Any, tmp_path: Path) -> None:
    """What is in the new file is what quantize returns; the rest is there byte for byte, metadata too."""
    tensors = tensors_of(framework)
    source = write(tmp_path / "in", tensors)
    assert quantize(source, tmp_path / "out", "--spec", spec, "--framework", framework.name, *options) == 0
    loaded = interop.load_safetensors(tmp_path / "out", framework.name)
    assert sorted(loaded) == sorted(tensors)
    given = PRESETS[spec] if spec in PRESETS else QuantSpec.parse(spec)
    for name, t in tensors.items():
        if name in QUANTIZED:
            assert_same_qtensor(loaded[name], framework.api.quantize(t, given, **keywords))
        else:
            assert raw(loaded[name]) == raw(t)
            assert (loaded[name].shape, loaded[name].dtype) == (t.shape, t.dtype)
    assert {key: text for key, text in metadata_of(tmp_path / "out").items() if key in METADATA} == METADATA
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_both_frameworks_write_the_same_file(torch_frontend: Any, jax_frontend: Any, tmp_path: Path) -> None:
    write(tmp_path / "in", tensors_of(torch_frontend))
    for name in ("torch", "jax"):
        assert quantize(tmp_path / "in", tmp_path / name, "--spec", "nvfp4", "--framework", name) == 0
    assert (tmp_path / "torch").read_bytes() == (tmp_path / "jax").read_bytes()


def test_like_save_safetensors(torch_frontend: Any, tmp_path: Path) -> None:
    """The streamed file is the one that would be written at once."""
    tensors = tensors_of(torch_frontend)
    write(tmp_path / "in", tensors)
    assert quantize(tmp_path / "in", tmp_path / "out", "--spec", "uint4", "--axis", "0") == 0
    for name in QUANTIZED:
        tensors[name] = torch_frontend.api.quantize(tensors[name], "uint4", axis=0, packed=True)
    write(tmp_path / "at once", tensors)
    assert (tmp_path / "out").read_bytes() == (tmp_path / "at once").read_bytes()


@pytest.mark.parametrize(
    ("options", "quantized"),
    [
        (["--include", r"layers\.\d+\."], ["layers.0.up.weight", "layers.1.conv.weight"]),
        (["--exclude", "embed"], ["layers.0.up.weight", "layers.1.conv.weight"]),
        (["--include", "layers", "--exclude", "conv"], ["layers.0.up.weight"]),
        (["--min-dim", "3"], ["layers.1.conv.weight"]),
        (["--min-dim", "0", "--exclude", "empty|conv|up"], ["embed.weight", "layers.0.norm.weight", "scalar"]),
    ],
)
def test_choices(options: list[str], quantized: list[str], torch_frontend: Any, tmp_path: Path) -> None:
    write(tmp_path / "in", tensors_of(torch_frontend))
    assert quantize(tmp_path / "in", tmp_path / "out", "--spec", "int8", *options) == 0
    loaded = interop.load_safetensors(tmp_path / "out")
    assert [name for name, t in loaded.items() if hasattr(t, "qvalue")] == quantized


def test_twice(torch_frontend: Any, tmp_path: Path) -> None:
    """QTensors that are in the input stay as they are, their scales too."""
    write(tmp_path / "in", tensors_of(torch_frontend))
    assert quantize(tmp_path / "in", tmp_path / "once", "--spec", "mxfp4", "--include", "embed") == 0
    assert quantize(tmp_path / "once", tmp_path / "twice", "--spec", "int4", "--group-size", "8") == 0
    once, twice = (interop.load_safetensors(tmp_path / name) for name in ("once", "twice"))
    assert_same_qtensor(twice["embed.weight"], once["embed.weight"])
    assert str(twice["layers.0.up.weight"].spec) == "int4 group=8,-1"
    assert metadata_of(tmp_path / "twice")["format"] == "pt"


@pytest.mark.parametrize("from_index", [False, True])
def test_shards(from_index: bool, torch_frontend: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = tensors_of(torch_frontend)
    source = shards(tmp_path / "in", tensors)
    (source / "config.json").write_text("{}")
    given = source / "model.safetensors.index.json" if from_index else source
    assert quantize(given, tmp_path / "out", "--spec", "int8") == 0
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    found = {}
    for path in out.glob("*.safetensors"):
        with safetensors.safe_open(path, framework="numpy") as file:
            found |= dict.fromkeys(file.keys(), path.name)
        for name, t in interop.load_safetensors(path).items():
            if name in QUANTIZED:
                assert_same_qtensor(t, torch_frontend.api.quantize(tensors.pop(name), "int8"))
            else:
                assert raw(t) == raw(tensors.pop(name))
    assert not tensors
    assert index["weight_map"] == dict(sorted(found.items()))
    size = sum(entry.nbytes for path in out.glob("*.safetensors") for entry in entries(path).values())
    assert index["metadata"] == {"total_size": size, "total_parameters": 2}
    assert f"{size:,} after" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def entries(path: Path) -> dict[str, files.Entry]:
    with files.Reader(path) as reader:
        return reader.entries


def test_a_directory_without_an_index(torch_frontend: Any, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    for name in ("a", "b"):
        write(tmp_path / "in" / f"{name}.safetensors", tensors_of(torch_frontend))
    assert quantize(tmp_path / "in", f"{tmp_path}/out/", "--spec", "int8") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.safetensors", "b.safetensors"]


def test_what_it_says(torch_frontend: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    x = torch.linspace(-1, 1, 4096).reshape(64, 64)
    noisy = x.clone()
    noisy[0, 0] = 1000
    write(tmp_path / "in", {"fine": x, "noisy": noisy, "half": x.half(), "wide": x.bfloat16(), "double": x.double()})
    assert quantize(tmp_path / "in", tmp_path / "out", "--spec", "int8", "--axis", "0", "--sqnr") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path / 'out'}: 5 tensors quantized to int8 channel=0, 0 copied"
    assert lines[1].startswith("81,920 bytes before, 21,760 after, 26.6 %")
    assert lines[2] == "8.500 bits per quantized value"
    q = torch_frontend.api.quantize(noisy, "int8", axis=0)
    noise = (noisy.double() - q.dequantize().double()).square().sum()
    db = 10 * float(torch.log10(noisy.double().square().sum() / noise))
    assert lines[3] == f"worst signal to noise: {db:.1f} dB in noisy"
    noisy[0, 0] = torch.nan
    write(tmp_path / "in", {"fine": x, "noisy": noisy, "wide": x.bfloat16()})
    assert quantize(tmp_path / "in", tmp_path / "out", "--spec", "int8", "--sqnr") == 0
    assert capsys.readouterr().out.splitlines()[3] == "worst signal to noise: nan dB in noisy"


@pytest.mark.parametrize(
    ("x", "y", "db"),
    [
        ([1.0, 2.0], [1.0, 2.0], np.inf),
        ([0.0, 0.0], [0.0, 1.0], -np.inf),
        ([np.nan, 1.0], [0.0, 1.0], np.nan),
        ([3.0, 4.0], [3.0, 4.5], 20.0),
        ([], [], np.inf),
    ],
)
def test_sqnr(x: list[float], y: list[float], db: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "BLOCK", 1)
    one, other = (files.Raw.of(np.array(a, np.float32)) for a in (x, y))
    assert np.array_equal(checkpoint.sqnr(one, other), db, equal_nan=True)


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["mxfp4", "int8"])
def test_memory(spec: str, torch_frontend: Any, tmp_path: Path) -> None:
    """A file of 320 MB takes a few times one of its tensors of 16 MB: the tensor, its codes, and what malloc keeps."""
    pytest.importorskip("resource")
    tensor, count = 2**24, 20
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for i in range(count):
        start = i * tensor
        dtype, shape = ("U8", [tensor]) if i % 4 == 0 else ("F32", [2**11, 2**11])
        header[f"w{i:02}"] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + tensor]}
    text = json.dumps(header).encode()
    with (tmp_path / "in").open("wb") as file:  # the data is a hole: zeros that take no room on the disk
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + count * tensor)
    code = f"""
import resource, sys
from pathlib import Path
from quark_kernels import __main__
import quark_torch, torch
torch.set_num_threads(1)
run = lambda source, target: __main__.main(["quantize", source, target, "--spec", {spec!r}])
def peak():
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0])
x = torch.zeros(64, 64)
from quark_kernels import interop
interop.save_safetensors("small", {{"x": x}})
run("small", "small out")
before = peak()
assert run("in", "out") == 0
print(peak() - before)
"""
    done = run_python(f"import os; os.chdir({str(tmp_path)!r})\n{code}")
    assert done.returncode == 0, done.stderr
    kilobytes = int(done.stdout.split()[-1])
    assert kilobytes < 4 * 2**14, f"{kilobytes} KB more than a small file takes"


# ---- what it refuses -------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The one line on stderr of a call that exits with 2."""
    assert quantize(*arguments) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("quark_kernels quantize: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--spec", "mxfp99"], "spec is 'mxfp99'; allowed: int2, int3"),
        (["--spec", "mxfp99"], "mxfp4, mxint8, nvfp4"),
        (["--spec", "int8 group=x"], "can't read 'group=x'"),
        (["--spec", ""], "spec is ''; allowed"),
        (["--spec", "int8", "--axis", "5"], "'embed.weight' of shape (10, 32): axis is 5"),
        (["--spec", "int8", "--group-size", "0"], "group_size is 0; allowed: 1 or more"),
        (["--spec", "int8", "--packed"], "packed is True; a code of int8 fills its bytes"),
        (["--spec", "int4 token", "--axis", "0"], "takes neither"),
        (["--spec", "int8 rounding=stochastic"], "a checkpoint has no seed"),
        (["--spec", "int8", "--include", "("], "include is '('; allowed: a regular expression"),
        (["--spec", "int8", "--exclude", "*"], "exclude is '*'"),
        (["--spec", "int8", "--min-dim", "-1"], "min_dim is -1; allowed: 0 or more"),
        (["--spec", "int8", "--include", "no such"], "none of its 7 tensors is to be quantized"),
    ],
)
def test_wrong_options(
    options: list[str], message: str, torch_frontend: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in", tensors_of(torch_frontend))
    assert message in refused(capsys, source, tmp_path / "out", *options)
    assert list(tmp_path.iterdir()) == [source]


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["a", "b"], ["--spec", "int8"], ["a", "b", "--spec", "int8", "--axis", "x"]):
        with pytest.raises(SystemExit) as caught:
            quantize(*arguments)
        assert caught.value.code == 2
        assert "usage: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        quantize("--help")
    assert "--group-size" in capsys.readouterr().out


def test_wrong_files(torch_frontend: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = ("--spec", "int8")
    source = write(tmp_path / "in", tensors_of(torch_frontend))
    link = tmp_path / "link"
    link.symlink_to(source)
    out = tmp_path / "out"
    assert "is the input; allowed: another output" in refused(capsys, source, source, *spec)
    assert "is the input" in refused(capsys, source, link, *spec)
    assert "is the input" in refused(capsys, tmp_path, f"{tmp_path}/../{tmp_path.name}", *spec)
    assert "No such file" in refused(capsys, tmp_path / "none", out, *spec)
    assert "No such file" in refused(capsys, source, tmp_path / "none" / "out", *spec)
    (tmp_path / "dir").mkdir()
    assert "is a directory; allowed: a file's name" in refused(capsys, source, tmp_path / "dir", *spec)
    assert "no .safetensors files in this directory" in refused(capsys, tmp_path / "dir", out, *spec)
    model = shards(tmp_path / "model", tensors_of(torch_frontend))
    assert "is there; allowed: an empty directory" in refused(capsys, model, source, *spec)
    (tmp_path / "dir" / "x").write_text("mine")
    assert "is there; allowed: an empty directory" in refused(capsys, model, tmp_path / "dir", *spec)
    for name, data in (("short", b"\x01"), ("text", b"not a safetensors file"), ("empty", b"")):
        (tmp_path / name).write_bytes(data)
        assert name in refused(capsys, tmp_path / name, out, *spec)
    os.mkfifo(tmp_path / "fifo")
    assert "not a regular file" in refused(capsys, tmp_path / "fifo", out, *spec)
    assert not out.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert (tmp_path / "dir" / "x").read_text() == "mine"
    assert source.read_bytes() == link.read_bytes()


INDEXES: dict[str, tuple[Any, str]] = {
    "not JSON": (b"{", "not JSON"),
    "not text": (b"\xff\xfe", "not JSON"),
    "deep": (b"[" * 100_000, "not JSON"),
    "an array": ([], "it has no weight_map"),
    "no map": ({"metadata": {}}, "it has no weight_map"),
    "a tensor twice": (b'{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}', "'a' is there more than once"),
    "an empty map": ({"weight_map": {}}, "it has no weight_map"),
    "metadata": ({"metadata": 3, "weight_map": {"a": "a.safetensors"}}, "metadata is 3"),
    "a number": ({"weight_map": {"a": 3}}, "'a' is in 3; allowed: the name of"),
    "above": ({"weight_map": {"a": "../a.safetensors"}}, "allowed: the name of"),
    "absolute": ({"weight_map": {"a": "/etc/a.safetensors"}}, "allowed: the name of"),
    "another file": ({"weight_map": {"a": "config.json"}}, "allowed: the name of"),
    "NUL": ({"weight_map": {"a": "a\0.safetensors"}}, "allowed: the name of"),
    "a missing shard": ({"weight_map": {"a": "none.safetensors"}}, "No such file"),
    "a missing tensor": (
        {"weight_map": {"a": "model-00001-of-00002.safetensors"}},
        "'a' is missing; model.safetensors.index.json says it is there",
    ),
}


@pytest.mark.parametrize("name", INDEXES)
def test_wrong_indexes(name: str, torch_frontend: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, message = INDEXES[name]
    source = shards(tmp_path / "in", tensors_of(torch_frontend))
    path = source / "model.safetensors.index.json"
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    assert message in refused(capsys, source, tmp_path / "out", "--spec", "int8")
    assert list(tmp_path.iterdir()) == [source]


def test_wrong_shards(torch_frontend: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = tensors_of(torch_frontend)
    source = shards(tmp_path / "in", tensors)
    second = source / "model-00002-of-00002.safetensors"
    write(second, interop.load_safetensors(second) | {"embed.weight": tensors["embed.weight"]})
    assert "'embed.weight.qvalue' would be both in" in refused(capsys, source, tmp_path / "out", "--spec", "int8")
    (source / "other.safetensors.index.json").write_text("{}")
    assert "more than one index" in refused(capsys, source, tmp_path / "out", "--spec", "int8")


def test_names_that_are_taken(torch_frontend: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    source = write(tmp_path / "in", {"a": torch.ones(2, 2), "a.scale": torch.ones(2)})
    message = "tensors has 'a.scale', a name that belongs to the QTensor 'a'"
    assert message in refused(capsys, source, tmp_path / "out", "--spec", "int8")


def test_float64_in_jax(jax_frontend: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in", {"a": np.ones((2, 2))})
    arguments = (source, tmp_path / "out", "--spec", "int8", "--framework", "jax")
    assert "'a' is float64; JAX has no such dtype" in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left"), 2, "No space left"),
        (ZeroDivisionError(), None, ""),
    ],
    ids=["ctrl-c", "disk", "bug"],
)
def test_half_a_checkpoint_is_removed(
    sharded: bool,
    raised: BaseException,
    status: int | None,
    message: str,
    torch_frontend: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tensors = tensors_of(torch_frontend)
    source = shards(tmp_path / "in", tensors) if sharded else write(tmp_path / "in", tensors)
    out = tmp_path / "out"
    if not sharded:
        out.write_text("what was there before")
    whole = checkpoint.Quantizer.quantize

    def fail(self: Any, name: str, *arguments: Any) -> Any:
        if "conv" in name:
            raise raised
        return whole(self, name, *arguments)

    monkeypatch.setattr(checkpoint.Quantizer, "quantize", fail)
    if status is None:
        with pytest.raises(type(raised)):
            quantize(source, out, "--spec", "int8")
    else:
        assert quantize(source, out, "--spec", "int8") == status
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == (["in"] if sharded else ["in", "out"])
    assert sharded or out.read_text() == "what was there before"


def test_without_the_framework(tmp_path: Path) -> None:
    write(tmp_path / "in", {"a": np.ones((2, 2), np.float32)})
    code = f"""
import sys; sys.modules["torch"] = None
from quark_kernels import __main__
sys.exit(__main__.main(["quantize", {str(tmp_path / "in")!r}, {str(tmp_path / "out")!r}, "--spec", "int8"]))
"""
    done = run_python(code)
    assert done.returncode == 2
    assert done.stderr.startswith("quark_kernels quantize: ")
    assert "torch" in done.stderr
    assert "Traceback" not in done.stderr


def test_from_python(torch_frontend: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "in", tensors_of(torch_frontend))
    options = checkpoint.Options(QuantSpec("int4", PerGroup(8)), packed=True)
    done = checkpoint.quantize_checkpoint(str(source), tmp_path / "out", options)
    assert (done.quantized, done.copied, done.worst) == (3, 4, None)
    assert done.values == 10 * 32 + 8 * 32 + 2 * 3 * 32
    assert done.bits == done.values * (4 + 32 // 8)
    with pytest.raises(ValueError, match="framework is 'numpy'"):
        checkpoint.Options(QuantSpec("int4"), framework="numpy")
