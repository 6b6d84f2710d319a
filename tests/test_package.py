"""The package as people meet it: imports, the command line, the demo, incompatible runtimes, forks and threads."""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quark_kernels
from matrix import numpy_dtype
from quark_kernels import PRESETS, __main__, _core, demo, ffi_api
from test_parity import run_python


def test_versions_agree() -> None:
    root = Path(__file__).parents[1]
    where = {
        "pyproject.toml": r'^version = "(.+)"$',
        "CMakeLists.txt": r"^project\(quark_kernels VERSION (\S+) ",
        "CITATION.cff": r"^version: (.+)$",
        "CHANGELOG.md": r"^## \[(.+?)\]",
    }
    found = {file: re.search(pattern, (root / file).read_text(), re.MULTILINE) for file, pattern in where.items()}
    assert {file: match and match[1] for file, match in found.items()} == dict.fromkeys(where, _core.VERSION)


def test_import_brings_in_no_framework() -> None:
    code = "import sys, quark_kernels; print(sorted({'torch', 'jax', 'jaxlib', 'numpy'} & set(sys.modules)))"
    assert run_python(code).stdout.strip() == "[]"


def test_import_never_starts_a_jax_backend() -> None:
    pytest.importorskip("jax")
    code = "import quark_jax, jax; from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized())"
    assert run_python(code).stdout.strip() == "False"


def test_import_changes_no_global_state() -> None:
    pytest.importorskip("torch")
    code = """
import torch
state = lambda: (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.initial_seed())
torch.manual_seed(1); before = state()
import quark_torch
quark_torch.fake_quantize(torch.ones(1 << 17), "int8")
print(before == state())
"""
    assert run_python(code).stdout.strip() == "True"


@pytest.mark.parametrize("runtime", [None, (0, 0), (1, 5)])
def test_incompatible_jaxlib(runtime: Any) -> None:
    """quark_jax refuses to import with a clear line, and JAX itself still works."""
    pytest.importorskip("jax")
    code = f"""
from quark_kernels import ffi_api
ffi_api.runtime_api = lambda: {runtime!r}
try:
    import quark_jax
except ImportError as error:
    print(error)
import jax.numpy as jnp
print(float(jnp.ones(3).sum()))
"""
    lines = run_python(code).stdout.splitlines()
    assert lines[0].startswith("quark_jax can't be used: ")
    assert "install jaxlib >= 0.8.0" in lines[0]
    assert lines[1] == "3.0"


def test_ffi_api_of_the_runtime() -> None:
    pytest.importorskip("jaxlib")
    assert ffi_api.mismatch() is None
    assert ffi_api.runtime_api() >= (0, 1)  # type: ignore[operator]


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    info = quark_kernels.info()
    assert info["version"] == quark_kernels.__version__
    assert info["cpu_level"] in info["cpu_levels"]
    assert {"cuda", "hip", "torch", "jax", "jaxlib", "xla_ffi_api", "unavailable"} <= set(info)
    assert __main__.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert quark_kernels.__version__ in printed
    for name, state in _core.gpu_builds():
        assert state in printed  # what was compiled, or why nothing
        assert state.startswith("none: ") <= (info["unavailable"].get(name) == state)


def test_demo(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The whole demo: every preset in the table, and the same bits in each."""
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    path = tmp_path / "table.json"
    assert __main__.main(["demo", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    for name in PRESETS:
        assert name in printed
    rows = json.loads(path.read_text())["rows"]
    quantized = [row for row in rows if row["preset"] in PRESETS]
    assert [row["preset"] for row in quantized] == list(PRESETS)
    assert all(row["same_bits"] is True for row in quantized)
    accuracy = {row["preset"]: row["accuracy"] for row in rows}
    assert accuracy["int8"] > 0.95
    assert accuracy["int2"] < accuracy["int8"]


def test_demo_on_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("torch")
    path = tmp_path / "x.npz"
    np.savez(path, a=np.random.default_rng(0).standard_normal((8, 33)).astype(np.float32), b=np.arange(3))
    assert __main__.main(["demo", "--input", str(path)]) == 0
    assert "int8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.npy", None, "missing.npy"),
        ("x.txt", b"1", "txt"),
        ("x.npy", b"not an array", "x.npy"),
        ("x.safetensors", b"\xff" * 20, "x.safetensors"),
    ],
)
def test_demo_refuses(
    name: str, content: bytes | None, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert demo.run(input=str(path)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def _work(api: Any, x: Any, result: list[Any]) -> None:
    result.append([api.fake_quantize(x, "int8") for _ in range(20)])


def test_threads(framework: Any) -> None:
    x = framework.array(np.random.default_rng(0).standard_normal((300, 700)).astype(np.float32))
    expected = framework.numpy(framework.api.fake_quantize(x, "int8"))
    results: list[Any] = []
    workers = [threading.Thread(target=_work, args=(framework.api, x, results)) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 8
    assert all(np.array_equal(framework.numpy(y), expected) for ys in results for y in ys)


def _child(x: Any, queue: Any) -> None:
    import quark_torch

    queue.put(quark_torch.fake_quantize(x, "int8").numpy().astype(np.float64).sum())  # torch's own kernels could hang


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning", "ignore:.*fork.*:RuntimeWarning")
def test_fork_after_use(torch_frontend: Any) -> None:
    """A forked child works after the parent has used OpenMP threads."""
    import torch

    x = torch.linspace(-1, 1, 1 << 18)
    expected = torch_frontend.api.fake_quantize(x, "int8").numpy().astype(np.float64).sum()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_child, args=(x, queue))
    child.start()
    child.join(60)
    if child.exitcode is None:
        child.kill()
    assert child.exitcode == 0, "the child hangs or died"
    assert queue.get() == expected


def test_scale_dtypes(framework: Any) -> None:
    """Narrow scales are widened exactly, subnormal ones too; float64 would have to be rounded, so it is refused."""
    x = framework.array(np.array([1.0, 3.0, -2.0, 1e-39], np.float32))
    for dtype in ("float16", "bfloat16"):
        for value in (0.1, 6e-8 if dtype == "float16" else 1e-39):
            narrow = np.array(value, numpy_dtype(dtype))
            q = framework.api.quantize(x, "int8", scale=framework.array(narrow))
            assert framework.numpy(q.scale).dtype == np.float32
            assert float(framework.numpy(q.scale)) == float(narrow)
    if framework.name == "torch":
        with pytest.raises(TypeError, match="scale has dtype float64; allowed: float32, float16, bfloat16"):
            framework.api.quantize(x, "int8", scale=framework.array(np.array(0.1)))


def test_numpy_scalars(framework: Any) -> None:
    x = framework.array(np.ones((4, 8), np.float32))
    q = framework.api.quantize(x, "int8", scale=np.float32(0.1), zero_point=np.int32(3))
    assert framework.numpy(q.qvalue).min() == 13
    assert str(framework.api.quantize(x, "int8", group_size=np.int64(4)).spec) == "int8 group=4,-1"


def test_default_dtype(torch_frontend: Any) -> None:
    import torch

    x = torch.ones(3)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch_frontend.api.quantize(x, "int8", scale=0.1).scale.item() == np.float32(0.1)
    finally:
        torch.set_default_dtype(torch.float32)


def test_channels_of_an_empty_tensor(framework: Any) -> None:
    x = framework.array(np.ones((0, 4), np.float32))
    q = framework.api.quantize(x, "int8", axis=0, scale=framework.array(np.ones(0, np.float32)))
    assert tuple(q.scale.shape) == (0, 1)


def test_vmap_gives_each_example_its_own_scale(jax_frontend: Any) -> None:
    import jax

    x = np.random.default_rng(0).standard_normal((5, 3, 8)).astype(np.float32) * np.arange(1, 6)[:, None, None]
    api = jax_frontend.api
    together = jax.vmap(lambda x: api.quantize(x, "int8"))(x)
    apart = [api.quantize(one, "int8") for one in x]
    assert np.array_equal(together.scale, [q.scale for q in apart])
    assert np.array_equal(together.qvalue, [q.qvalue for q in apart])
    grad = jax.grad(lambda x: (api.fake_quantize(x, "int8", scale=0.02) ** 2).sum())
    assert np.array_equal(jax.vmap(grad)(x), [grad(one) for one in x])


def test_compile_without_a_warning(torch_frontend: Any) -> None:
    import torch

    x = torch.randn(4, 8)
    compiled = torch.compile(
        lambda x: torch_frontend.api.fake_quantize(x, "int4", axis=0), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), torch_frontend.api.fake_quantize(x, "int4", axis=0))


def test_pytrees(framework: Any) -> None:
    q = framework.api.quantize(framework.array(np.ones((4, 8), np.float32)), "uint8", axis=0)
    if framework.name == "torch":
        from torch.utils import _pytree

        leaves, tree = _pytree.tree_flatten(q)
        again = _pytree.tree_unflatten(leaves, tree)
        moved = q.to("meta")
        with pytest.raises(TypeError):
            q.to(q.dtype)
        assert moved.device.type == "meta"
        assert moved.spec == q.spec
    else:
        import jax

        leaves, tree = jax.tree.flatten(q)
        again = jax.tree.unflatten(tree, leaves)
        through = jax.jit(lambda q: q)(q)
        assert through.spec == q.spec
        assert np.array_equal(through.qvalue, q.qvalue)
    assert [leaf.shape for leaf in leaves if leaf is not None] == [(4, 8), (4, 1), (4, 1)]
    assert again.spec == q.spec
    assert again.shape == (4, 8)


def test_qtensor_sizes(framework: Any) -> None:
    x = framework.array(np.ones((4, 100), np.float32))
    q = framework.api.quantize(x, "int4", group_size=50, packed=True)
    assert q.nbytes == 4 * 50 + 4 * 2 * 4
    assert q.bits_per_value == 4 + 8 * 32 / 400
    assert (
        repr(q)
        == "QTensor(int4 group=50,-1, shape=(4, 100), dtype=float32, packed, scale(4, 2), 4.64 bits/value, 232 bytes)"
    )
    assert framework.api.quantize(x, "bf16").bits_per_value == 16
    assert framework.api.quantize(x, "uint8", axis=0).bits_per_value == 8 + 4 * (32 + 8) / 400
    assert np.isnan(framework.api.quantize(x[:0], "int8").bits_per_value)


def test_dtypes_as_specs(framework: Any) -> None:
    x = framework.array(np.ones((4, 8), np.float32))
    for name, preset in {
        "int8": "int8",
        "float8_e4m3fn": "fp8_e4m3",
        "float8_e5m2": "fp8_e5m2",
        "bfloat16": "bf16",
    }.items():
        assert framework.api.quantize(x, framework.dtype(name)).spec == PRESETS[preset]
    with pytest.raises(ValueError, match="spec is 'float64'; allowed: int8"):
        framework.api.quantize(x, framework.dtype("float64"))


def test_one_dimensional_and_scalar_scales(framework: Any) -> None:
    x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    api, array = framework.api, framework.array
    s = np.linspace(0.01, 0.04, 4, dtype=np.float32)
    z = np.arange(4, dtype=np.int64 if framework.name == "torch" else np.int32)
    want = api.quantize(array(x), "int8", axis=0, scale=array(s[:, None]), zero_point=array(z[:, None]))
    got = api.quantize(array(x), "int8", axis=0, scale=array(s), zero_point=array(z))
    assert np.array_equal(framework.numpy(got.qvalue), framework.numpy(want.qvalue))
    assert tuple(got.scale.shape) == tuple(got.zero_point.shape) == (4, 1)
    for scale in (0.5, array(np.array(0.5, np.float32)), array(np.full((1, 1, 1), 0.5, np.float32))):
        q = api.quantize(array(x), "int8", scale=scale, zero_point=3)
        assert tuple(q.scale.shape) == tuple(q.zero_point.shape) == ()
        assert np.array_equal(framework.numpy(q.qvalue), np.rint(x / np.float32(0.5)) + 3)


AMD_QUARK = {
    "quark/__init__.py": "__version__ = '0.8'",
    "quark/torch/__init__.py": "",
    "quark/torch/kernel/__init__.py": "scaled_fake_quantize = 'theirs'",
}


@pytest.mark.parametrize("amd", [False, True], ids=["alone", "with-amd-quark"])
def test_documented_path(amd: bool, tmp_path: Path, torch_frontend: Any) -> None:
    """`quark.torch.kernel` is ours, unless AMD's wheel is installed in the same folder: then theirs, and ours stays."""
    ours = Path(__file__).parents[1] / "python/quark"
    site = tmp_path / "site"
    shutil.copytree(ours, site / "quark", ignore=shutil.ignore_patterns("__pycache__"))
    assert [p.name for p in (site / "quark").rglob("*.py")] == ["kernel.py"], "namespace packages have no __init__.py"
    if amd:
        for name, text in AMD_QUARK.items():
            path = site / name
            assert not path.exists(), "no file of ours stands where one of theirs goes"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    code = f"""
import sys, quark_torch.kernel
sys.path.insert(0, {str(site)!r})
sys.meta_path[:] = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]  # of an editable install
import quark.torch.kernel
ours = quark_torch.kernel.scaled_fake_quantize
print(quark.torch.kernel.scaled_fake_quantize is ours, callable(ours), quark.torch.kernel.__file__)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    same, works, path_of = done.stdout.split()
    assert (same, works) == (str(not amd), "True")
    assert path_of.startswith(str(site))
