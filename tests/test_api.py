"""The public names and their signatures are those of api.txt: a rename is a change of that file, and of the changelog.

`make generated` writes it anew.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import api


@pytest.mark.parametrize("name", api.MODULES)
def test_public_names(name: str) -> None:
    for framework in ("torch", "jax", "onnx", "flax"):
        if framework in name or (framework == "flax" and name.endswith("nnx")):
            pytest.importorskip({"onnx": "onnxscript"}.get(framework, framework))
    wanted = api.FILE.read_text().partition(f"[{name}]\n")[2].partition("\n\n")[0]
    assert "\n".join(api.names(importlib.import_module(name))) == wanted.rstrip("\n")


def test_every_public_module_is_listed() -> None:
    """Those with an ``__all__``, but for what only documents another's names."""
    python = Path(__file__).parents[1] / "python"
    found = {
        ".".join(path.relative_to(python).with_suffix("").parts).removesuffix(".__init__")
        for path in python.rglob("*.py")
        if "\n__all__ = " in path.read_text()
    }
    assert found - {"quark_torch.amd_quark", "quark.torch.kernel"} <= set(api.MODULES)


def test_the_sample_of_types_runs(tmp_path: Path) -> None:
    for framework in ("torch", "jax"):
        pytest.importorskip(framework)
    import typed_sample

    assert typed_sample.in_torch(tmp_path / "w.safetensors").shape == (8, 8)
    assert typed_sample.in_jax().shape == ()
