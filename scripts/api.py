"""Writes tests/api.txt: the public names, with their signatures. A test compares, so a change of the API is visible.

`python scripts/api.py` rewrites the file; with `--print` it goes to the terminal instead.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

FILE = Path(__file__).parents[1] / "tests" / "api.txt"
MODULES = (
    "quark_kernels",
    "quark_kernels.interop",
    "quark_torch",
    "quark_torch.amd_backend",  # quark_torch.amd_quark, which needs AMD Quark to be imported, has the same names
    "quark_torch.kernel",
    "quark_torch.nn",
    "quark_torch.onnx",
    "quark_jax",
    "quark_jax.kernel",
    "quark_jax.nnx",
)


def is_inherited(cls: type, name: str) -> bool:
    """Whether a member comes from another library's class."""
    owner = next(base for base in cls.__mro__ if name in base.__dict__)
    return not owner.__module__.startswith("quark")


def members(cls: type) -> Iterator[tuple[str, Any]]:
    """What a class makes public, its constructor first. Of autograd Functions, what `apply` takes."""
    if hasattr(cls, "backward"):
        yield "forward", inspect.getattr_static(cls, "forward")
        return
    for name in sorted({"__init__", *dir(cls)}):
        if (name == "__init__" or not name.startswith("_")) and not is_inherited(cls, name):
            yield name, inspect.getattr_static(cls, name)


def line(path: str, value: Any) -> str:
    """A public name, with its signature if it has one; annotations are mypy's matter."""
    if isinstance(value, ModuleType):
        return f"{path}  module"
    function = getattr(value, "__func__", value)
    if callable(function) and not isinstance(function, type):
        signature = inspect.signature(function)
        plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
        return path + str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))
    return path


def names(module: ModuleType) -> Iterator[str]:
    for name in module.__all__:
        value = getattr(module, name)
        if not isinstance(value, type):
            yield line(name, value)
            continue
        home = value.__module__.partition(".")[0]
        if home != module.__name__.partition(".")[0]:
            yield f"{name}  is {home}'s"
            continue
        yield f"{name}  class"
        yield from (line(f"{name}.{member}", found) for member, found in members(value))


def text() -> str:
    """The file: a heading for each module, then its names."""
    return "\n".join("\n".join([f"[{name}]", *names(importlib.import_module(name)), ""]) for name in MODULES)


if __name__ == "__main__":
    if "--print" in sys.argv[1:]:
        print(text(), end="")
    else:
        FILE.write_text(text())
