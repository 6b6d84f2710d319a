"""The Python of README.md and of the pages in docs/ runs, page by page, and prints what stands there.

A block that is marked as `py` is only shown: it needs what isn't installed.

`make docs` looks at links and docstrings.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
import sys
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
FILES = [str(path.relative_to(ROOT)) for top in ("cpp", "python") for path in (ROOT / top).rglob("*.*")]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OPTIONAL = ("torch", "jax", "flax", "optax", "onnx", "onnxscript", "onnxruntime")

BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<text>.*?)^```\n)?", re.DOTALL | re.MULTILINE)
PRINTED = re.compile(r"^ *print\(.*\)  # (.*\n)", re.MULTILINE)


def blocks(path: Path) -> list[tuple[int, str, str]]:
    """Each block's line, its code and what it prints: the ```text block after it, or the comments after its prints."""
    text = path.read_text()
    found = []
    for block in BLOCK.finditer(text):
        code, shown = block["code"], block["text"]
        line = text.count("\n", 0, block.start("code"))
        found.append((line, code, "".join(PRINTED.findall(code)) if shown is None else shown))
    return found


def skip_unless_installed(code: str) -> None:
    imported = set(re.findall(r"^ *(?:import|from) (?:quark[._])?(\w+)", code, re.MULTILINE))
    for name in OPTIONAL:
        if name in imported and find_spec(name) is None:
            pytest.skip(f"{name} isn't installed")


@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # torch's own, in Inductor
@pytest.mark.parametrize("path", [p for p in PAGES if blocks(p)], ids=lambda path: path.stem)
def test_page(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    if device != "cpu":
        pytest.skip("pages are written for arrays on the CPU")
    skip_unless_installed("".join(code for _, code, _ in blocks(path)))
    monkeypatch.chdir(tmp_path)
    page = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)  # where the classes of the page are looked for
    for line, code, shown in blocks(path):
        with redirect_stdout(StringIO()) as printed:
            exec(compile("\n" * line + code, str(path), "exec"), page.__dict__)
        assert printed.getvalue() == shown, f"{path.name}, the block at line {line + 1}"


def test_every_block_is_found() -> None:
    for path in PAGES:
        assert len(blocks(path)) == path.read_text().count("```python"), path


def test_every_page_is_in_the_navigation() -> None:
    """What `make docs` checks too, but without its packages: the pages there are, and pages that are not."""
    named = set(re.findall(r"^ +- .*: ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    made = {"index.md", "contributing.md", "adding.md", "changelog.md", "examples.md"}
    assert named - made == {str(path.relative_to(ROOT / "docs")) for path in PAGES[1:]}


def test_the_walk_through_the_code() -> None:
    """From a public function to the arithmetic: what CONTRIBUTING.md names is in the files that it names."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    steps = re.findall(
        r"^ {4,}(\S.*?) +([\w/]+(?:\.(?:py|h|cpp)|/)) ", text.partition("## How data flows")[2], re.MULTILINE
    )
    assert len(steps) == 11
    for names, place in steps:
        files = [ROOT / path for path in FILES if f"/{place}" in path]
        source = "".join(path.read_text() for path in files)
        for name in names.partition("(")[0].split(", "):
            word = name.split(".")[-1].split("::")[-1]
            # One operator's name is a row of ops.inc, from which bindings are made.
            assert word in source or f"QUARK_OP({word}" in (ROOT / "cpp/ops.inc").read_text(), (name, place)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_examples_of_docstrings(framework: str) -> None:
    """Every function of tensors has one, and it is true."""
    pytest.importorskip(framework)
    package = importlib.import_module(f"quark_{framework}")
    names = {package.__name__: package, "torch": sys.modules.get("torch"), "jnp": sys.modules.get("jax.numpy")}
    examples = doctest.DocTestFinder().find(package.functions, extraglobs=names)
    runner = doctest.DocTestRunner(verbose=False)
    for example in examples:
        runner.run(example)
    assert runner.failures == 0
    shown = {example.name.rpartition(".")[2] for example in examples if example.examples}
    assert shown == {name for name in package.__all__ if inspect.isfunction(getattr(package.functions, name, None))}


def public(module: Path) -> set[str]:
    """The names in a module's ``__all__``; where it has none, its functions and classes."""
    body = ast.parse(module.read_text()).body
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value)) - {"__version__"}
    names = {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize(
    ("module", "pages"),
    [
        ("quark_torch/__init__.py", ["quark_torch", "quark_kernels"]),
        ("quark_jax/__init__.py", ["quark_jax", "quark_kernels"]),
        ("quark_kernels/__init__.py", ["quark_kernels", "interop"]),
        ("quark_kernels/interop.py", ["interop"]),
        ("quark_torch/amd_quark.py", ["amd_quark"]),
        ("quark_torch/onnx.py", ["onnx"]),
        ("quark_jax/kernel.py", ["torch_kernel"]),
    ],
)
def test_every_public_name_is_in_the_reference(module: str, pages: list[str]) -> None:
    reference = " ".join((ROOT / f"docs/api/{page}.md").read_text() for page in pages)
    assert public(ROOT / "python" / module) <= set(re.findall(r"\w+", reference))
