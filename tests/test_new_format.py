"""A format is one row: what CONTRIBUTING.md says of adding one, done in a copy of the tree that is built and tried."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from test_builds import PATH

ROOT = Path(__file__).parents[1]
TREE = (
    "CMakeLists.txt",
    "LICENSE",
    "README.md",
    "cmake",
    "cpp",
    "docs",
    "licenses",
    "pyproject.toml",
    "python",
    "scripts",
    "tests",
)
NAME = "fp5_e2m2"

# Every number of the format, by hand: steps of a quarter up to 2, of a half up to 4, of 1 up to 7.
NUMBERS = """
0 0.25 0.5 0.75 1 1.25 1.5 1.75 2 2.5 3 3.5 4 5 6 7
"""

TRY = """
import importlib, sys
import numpy as np
from quark_kernels import FORMATS, QuantSpec

name, numbers = sys.argv[1], np.float32(sys.argv[2].split())
x = np.concatenate([numbers, -numbers, np.float32([1.124, 1.126, 0.125, 0.376, -5.5, 6.5, 7.4, 99, -99])])
nearest = np.concatenate([numbers, -numbers, np.float32([1, 1.25, 0, 0.5, -6, 6, 7, 7, -7])])
codes = np.concatenate([np.arange(16), 16 + np.arange(16), [4, 5, 0, 2, 16 + 14, 14, 15, 15, 16 + 15]]).astype(np.uint8)
assert FORMATS[name].bits == 5
for framework in sys.argv[3:]:
    api = importlib.import_module(f"quark_{framework}")
    array = __import__("torch").tensor if framework == "torch" else __import__("jax").numpy.asarray
    for packed in (True, False):
        q = api.quantize(array(x), QuantSpec(name), scale=1.0, packed=packed)
        assert np.asarray(api.dequantize(q)).tobytes() == nearest.tobytes(), framework
    assert np.asarray(q.qvalue).tolist() == codes.tolist(), framework
    assert np.asarray(api.fake_quantize(array(x), QuantSpec(name), scale=1.0)).tobytes() == nearest.tobytes(), framework
"""


def changes() -> dict[str, list[tuple[str, str]]]:
    """Per file of the tree, the lines that CONTRIBUTING.md adds, and after which."""
    found: dict[str, list[tuple[str, str]]] = {}
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for block in re.findall(r"^```diff\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        before, lines = "", []
        for line in block.splitlines():
            if line.startswith("--- "):
                lines = found.setdefault(line[4:], [])
            elif line.startswith("+"):
                lines.append((before, line[1:]))
            else:
                before = line[1:]
    return found


def run(*command: str | Path, folder: Path, **environment: str) -> str:
    mine = {key: value for key, value in os.environ.items() if not key.startswith(("QUARK_", "PYTEST_"))}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**mine, "PATH": PATH, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


def make_tree(tree: Path) -> None:
    """A copy of the tree with the format, and the package built from it in ``site``."""
    for name in TREE:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name)
    for file, lines in changes().items():
        text = (tree / file).read_text()
        for before, line in lines:
            assert text.count(f"\n{before}\n") == 1, f"{file}: {before}"
            text = text.replace(f"\n{before}\n", f"\n{before}\n{line}\n")
        (tree / file).write_text(text)
    options = ("--no-build-isolation", "--no-deps", "--quiet", "-C", "cmake.build-type=Debug")
    run("-m", "pip", "install", *options, "--target", "site", ".", folder=tree)


def test_one_row_is_all() -> None:
    """Of the library; the tests' oracles have one each."""
    assert {file: len(lines) for file, lines in changes().items()} == {
        "cpp/formats.inc": 1,
        "tests/reference.py": 1,
        "tests/exhaustive.py": 1,
    }


def both_frameworks_have_it(tree: Path) -> None:
    frameworks = [name for name in ("torch", "jax") if importlib.util.find_spec(name)]
    run("-c", TRY, NAME, NUMBERS, *frameworks, folder=tree, PYTHONPATH="site")


def the_documentation_has_it(tree: Path) -> None:
    run("scripts/format_table.py", folder=tree, PYTHONPATH="site")
    old, new = ((folder / "docs/numerics.md").read_text().splitlines() for folder in (ROOT, tree))
    row = f"| `{NAME}` | 5 | 2 + 2 | 0.25 | 1 | 7 | 32 finite codes | - | - | 0x10 | saturates | uint8 |"
    assert [line for line in new if line not in old] == [row]
    assert [line for line in old if line not in new] == []


def the_tests_have_it(tree: Path) -> None:
    """With all 16-bit inputs, all codes, and every float32 where a result changes; nothing was said to them by name."""
    files = ("tests/test_formats.py", "tests/test_exhaustive.py")
    found = run(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        f"{NAME} or every_format",
        *files,
        folder=tree,
        PYTHONPATH="site",
    )
    passed = re.search(r"(\d+) passed", found)
    assert passed
    assert int(passed[1]) > 20


def test_a_new_format(tmp_path: Path) -> None:
    needed = ("scikit_build_core", "nanobind", "tvm_ffi", "jaxlib")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"builds the package, which needs {', '.join(missing)}")
    make_tree(tmp_path)
    both_frameworks_have_it(tmp_path)
    the_documentation_has_it(tmp_path)
    the_tests_have_it(tmp_path)
