"""Every example runs, as a user would run it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "interop_examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path) -> None:
    for framework in ("torch", "jax"):
        if framework in path.stem and find_spec(framework) is None:
            pytest.skip(f"{framework} isn't installed")
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("method", ["lsq", "tqt"])
def test_both_qat_examples_start_alike(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first quantized forward of the torch and the JAX example: the same logits, bit for bit."""
    for framework in ("torch", "jax"):
        pytest.importorskip(framework)
    monkeypatch.syspath_prepend(str(EXAMPLES[0].parent))
    logits = [importlib.import_module(f"lsq_qat_{name}").first_forward(method) for name in ("torch", "jax")]
    assert logits[0].shape == (64, 10)
    assert logits[0].std() > 0.1
    assert logits[0].tobytes() == logits[1].tobytes()
