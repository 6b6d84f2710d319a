"""What a user meets where something is missing: memory, the compiled core, a framework, a version of one."""

from __future__ import annotations

import functools
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quark_kernels
from conftest import make
from frontends import Core
from quark_kernels import PRESETS, _core, requires
from quark_kernels.schema import OpSpec, codes_spec, op_spec
from test_concurrency import LONG, Job, contents, numbers
from test_learned import gradients
from test_parity import run_python

HERE = Path(__file__).parent
PACKAGE = Path(quark_kernels.__file__).parent


# ---- memory ----------------------------------------------------------------------------------------------------------

SHAPE = (4096, 4096)
MIB = 1 << 20


def calls_of(kind: str) -> dict[str, Job]:
    """Every public function, on arrays whose results need memory of their own."""
    x, g = numbers(0, 2, SHAPE)
    if kind == "core":
        core, spec = Core(), op_spec(PRESETS["int8"], SHAPE)
        tiles, codes = op_spec(PRESETS["mxfp4"], SHAPE), np.ones(SHAPE, np.uint8)

        def run(op: str, inputs: list[np.ndarray], spec: OpSpec = spec) -> list[bytes]:
            return contents(core._run(op, inputs, spec, SHAPE, "float32"))

        return {
            "quantize_dynamic": lambda: run("quantize_dynamic", [x]),
            "fake_quantize_dynamic": lambda: run("fake_quantize_dynamic", [x]),
            "blocks": lambda: run("quantize_dynamic", [x], tiles),
            "choose_qparams": lambda: run("choose_qparams", [x], tiles),
            "percentile": lambda: run("choose_qparams", [x[:64].T], spec.choosing("percentile")),
            "pack": lambda: run("pack", [codes], codes_spec(4, length=SHAPE[1])),
        }
    framework = make(kind)
    api, array = framework.api, framework.array
    kernel = __import__(f"{api.__name__}.kernel").kernel
    scale, lsq = np.full((), 0.05, np.float32), functools.partial(api.lsq_quantize, quant_min=-8, quant_max=7)
    t, codes, s = array(x), array(x.view(np.uint8)), array(scale)
    fp8 = {name: getattr(kernel, f"quant_{name}")(t) for name in ("fp8_e4m3", "fp8_e5m2")}
    q, tensor = api.quantize(t, "int4", packed=True), (None, None, -128, 127, 8, "per_tensor")
    whole = kernel.scaled_real_quantize("int8", t, s, None, *tensor)
    calls: dict[str, Callable[[], Any]] = {
        "quantize": lambda: api.quantize(t, "int8"),
        "dequantize": lambda: api.dequantize(q),
        "fake_quantize": lambda: api.fake_quantize(t, "mxfp4"),
        "choose_qparams": lambda: api.choose_qparams(t, "mxfp4"),
        "percentile": lambda: api.choose_qparams(t, "int8", method="percentile"),
        "lsq_quantize": lambda: gradients(framework, lsq, x, scale, g),
        "tqt_quantize": lambda: gradients(framework, api.tqt_quantize, x, scale, g),
        "pack": lambda: api.pack(codes, 4),
        "unpack": lambda: api.unpack(codes, 4, signed=True),
        "kernel.quant_fp8_e4m3": lambda: kernel.quant_fp8_e4m3(t),
        "kernel.quant_fp8_e5m2": lambda: kernel.quant_fp8_e5m2(t),
        "kernel.dequant_fp8_e4m3": lambda: kernel.dequant_fp8_e4m3(fp8["fp8_e4m3"]),
        "kernel.dequant_fp8_e5m2": lambda: kernel.dequant_fp8_e5m2(fp8["fp8_e5m2"]),
        "kernel.scaled_fake_quantize": lambda: kernel.scaled_fake_quantize("int8", t, s, None, *tensor),
        "kernel.scaled_real_quantize": lambda: kernel.scaled_real_quantize("int8", t, s, None, *tensor),
        "kernel.dequantize": lambda: kernel.dequantize("int8", whole, s, None, None, None, "per_tensor"),
        "kernel.non_scaled_fake_quantize": lambda: kernel.non_scaled_fake_quantize(t, "mx", "fp4", -1, 32),
        "kernel.non_scaled_real_quantize": lambda: kernel.non_scaled_real_quantize(t, "mx", "fp4", -1, 32),
        "kernel.lsq_quantize": lambda: kernel.lsq_quantize(t, s, None, 0.1, -8, 7),
        "kernel.tqt_quantize": lambda: kernel.tqt_quantize(t, s, None, 128, 8),
    }
    return {name: lambda call=call: contents(call()) for name, call in calls.items()}  # type: ignore[misc]


def is_out_of_memory(error: Exception) -> bool:
    """Python's error, or what a framework has in its place where an array of its own finds no memory."""
    if isinstance(error, MemoryError):
        return True
    text = str(error)
    return any(words in text for words in ("can't allocate memory", "RESOURCE_EXHAUSTED", "Out of memory"))


def run_out(kind: str) -> None:
    """Each call with ever more memory, at first less than is in use: it says that there is none, or gives the same."""
    calls = calls_of(kind)
    expected = {name: call() for name, call in calls.items()}  # threads, caches and modules are there now
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    refused = set()
    for name, call in calls.items():
        for spare in (-1024, *(range(0, 256, 4) if LONG else (0, 8, 24, 56, 80, 160))):
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + spare * MIB, most))
            got, problem = None, None
            try:
                got = call()
            except Exception as error:
                problem = error
            finally:
                resource.setrlimit(resource.RLIMIT_AS, (most, most))
            if problem is not None:
                assert is_out_of_memory(problem), f"{name} with {spare} MiB: {problem!r}"
                refused.add(name)
            else:
                assert got == expected[name], f"{name} with {spare} MiB gives other bits"
            del got, problem
        assert call() == expected[name]
    # Results of a few bytes find them anywhere, and codes in a process with a framework what was freed before.
    few = {"choose_qparams", "percentile"}
    if kind == "torch":
        few |= {"quantize", "pack", "kernel.quant_fp8_e4m3", "kernel.quant_fp8_e5m2", "kernel.non_scaled_real_quantize"}
    must = {"lsq_quantize", "tqt_quantize"} if kind == "jax" else set(calls) - few
    assert refused >= must, must - refused


@pytest.mark.parametrize("kind", ["core", "torch", "jax"])
def test_out_of_memory(kind: str) -> None:
    if kind != "core":
        pytest.importorskip(kind)
    # What is allocated is mapped, and what is freed unmapped: the limit counts it.
    done = run_python(f"import test_failures as t; t.run_out({kind!r})", MALLOC_MMAP_THRESHOLD_="65536")
    assert done.returncode == 0, done.stderr


# ---- the compiled core -----------------------------------------------------------------------------------------------


def copy_of_the_package(folder: Path) -> Path:
    """The installed package in another folder; the compiled core in it."""
    copy = folder / "quark_kernels"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "_core.*"))
    shutil.copy(_core.__file__, copy)
    return copy / Path(_core.__file__).name


IMPORT = """
import sys
sys.path.insert(0, {path!r})
sys.meta_path[:] = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]  # of an editable install
try:
    import {package}
except ImportError as error:
    print(type(error).__name__, error, sep=": ")
else:
    print("imported from", {package}.__file__)
"""


def imported(package: str, path: Path) -> str:
    """The line that comes of importing a package that lies in a folder."""
    done = run_python(IMPORT.format(package=package, path=str(path)))
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return line


def test_the_core_is_found(tmp_path: Path) -> None:
    copy_of_the_package(tmp_path)
    assert imported("quark_kernels", tmp_path) == f"imported from {tmp_path}/quark_kernels/__init__.py"


def test_no_core(tmp_path: Path) -> None:
    copy_of_the_package(tmp_path).unlink()
    line = imported("quark_kernels", tmp_path)
    start = f"ImportError: quark_kernels can't be used: no compiled core for this Python in {tmp_path}/quark_kernels; "
    assert line == start + "install it for this Python from a checkout: pip install --force-reinstall --no-deps ."


@pytest.mark.parametrize("what", ["empty", "head", "half", "text"])
def test_a_core_that_is_no_library(what: str, tmp_path: Path) -> None:
    core = copy_of_the_package(tmp_path)
    data = core.read_bytes()
    core.write_bytes({"empty": b"", "head": data[:100], "half": data[: len(data) // 2], "text": b"# " * 1000}[what])
    line = imported("quark_kernels", tmp_path)
    assert line.startswith("ImportError: quark_kernels can't be used: its compiled core ")
    assert ("is cut short" if what in ("head", "half") else "can't be loaded (") in line
    assert str(core) in line
    assert line.endswith("; install it for this Python from a checkout: pip install --force-reinstall --no-deps .")


# ---- frameworks ------------------------------------------------------------------------------------------------------

STUB = "__version__ = {0!r}\n__version_info__ = tuple(map(int, {0!r}.split('.')))\n"


def stub(folder: Path, name: str, version: str, *more: str) -> Path:
    """A package of this name and version, which has nothing else."""
    path = folder / name
    path.mkdir()
    (path / "__init__.py").write_text(STUB.format(version) + "\n".join(more))
    return folder


@pytest.mark.parametrize(
    ("package", "missing", "line"),
    [
        ("quark_torch", "torch", "quark_torch needs torch >= 2.10, which isn't installed: pip install 'torch>=2.10'"),
        ("quark_jax", "jax", "quark_jax needs jax >= 0.8.0, which isn't installed: pip install 'jax>=0.8.0'"),
        ("quark_jax", "jaxlib", "quark_jax needs jaxlib >= 0.8.0, which isn't installed: pip install 'jax>=0.8.0'"),
    ],
)
def test_no_framework(package: str, missing: str, line: str) -> None:
    code = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {missing!r}: raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == {missing!r} else found(name, *rest)
import quark_kernels
try:
    import {package}
except ModuleNotFoundError as error:
    print(error.name, error, sep=": ")
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{missing}: {line}"]


def test_an_old_torch(tmp_path: Path) -> None:
    stub(tmp_path, "torch", "2.9.1", "class Tensor: pass")
    line = "quark_torch can't be used: torch 2.9.1 is installed; it needs torch >= 2.10"
    assert imported("quark_torch", tmp_path) == f"ImportError: {line}"


def test_an_old_jax(tmp_path: Path) -> None:
    stub(stub(tmp_path, "jax", "0.7.2"), "jaxlib", "0.7.2")
    line = "quark_jax can't be used: jax 0.7.2 is installed; it needs jax and jaxlib >= 0.8.0"
    assert imported("quark_jax", tmp_path) == f"ImportError: {line}"


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_a_version_of_the_future(name: str) -> None:
    """It is taken as it is: no upper bound, and no warning."""
    pytest.importorskip(name)
    code = f"""
import warnings; warnings.simplefilter("error")
import {name} as framework
framework.__version__ = "99.0.0"
framework.__version_info__ = (99, 0, 0)
import quark_{name} as q
from test_failures import make
x = make({name!r}).array(__import__("numpy").ones(3, "f4"))
print(float(q.fake_quantize(x, "int8").sum()))
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3.0"]


def test_what_is_needed_is_what_is_declared() -> None:
    """The oldest versions in the messages are those of the package's metadata."""
    from importlib.metadata import requires as declared

    lines = [line.replace(" ", "") for line in declared("quark-kernels") or []]
    for name, oldest in (
        ("torch", requires.OLDEST_TORCH),
        ("jax", requires.OLDEST_JAX),
        ("jaxlib", requires.OLDEST_JAX),
    ):
        assert any(line.startswith(f"{name}>={oldest};") for line in lines), lines
