"""Every example runs, as a user would run it."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from quark_kernels import requires

EXAMPLES = sorted((Path(__file__).parent.parent / "interop_examples").glob("*.py"))
OPTIONAL = ("torch", "jax", "flax", "optax", "matplotlib", "qwix")
OPTIONS = {"format_atlas": ["--quick"]}

ACCURACY = r"9[5-9]\.\d%"
KEY_LINES = {
    "quantize_in_jax_serve_in_torch": [
        r"JAX wrote 12 models to one file of \d+ bytes",
        *(
            rf"{preset} +\d+ +{bits} +{ACCURACY} +{ACCURACY} +yes +yes +\d\.\de-0[5-7]"
            for preset, bits in (("bf16", r"16\.000"), ("int4", r"5\.000"), ("mxfp4", r"4\.250"), ("mx6", r"6\.000"))
        ),
        rf"back: torch quantizes nvfp4 to the same file, byte for byte, and JAX serves it: {ACCURACY}",
    ],
    "weight_only_transformer": [
        rf"float32 +1572864 +32\.000 .* {ACCURACY} +yes",
        rf"bf16 +\d+ +16\.\d+ .* {ACCURACY} +yes",
        rf"int4, groups of 128 +208896 +4\.250 .* {ACCURACY} +yes",
        rf"mxfp4 +208896 +4\.250 .* {ACCURACY} +yes",
    ],
    "qwix_rules": [
        r"by the rules 9\d\.\d% without training, 9[5-9]\.\d% after it",
        "the same bits as the layers written by hand",
    ],
    "fp8_per_token_activations": [
        *(rf"{method} +{ACCURACY} +{ACCURACY} " for method in ("dequantized", "codes", "codes in bfloat16")),
        r"the same codes and scales in torch and JAX",
        r"times a copy of as many bytes in torch, \d+\.\d times in JAX",
    ],
}
"""Patterns that each example's output must have."""


def skip_unless_installed(path: Path) -> None:
    imported = re.findall(r"^(?:import|from) (\w+)", path.read_text(), re.MULTILINE)
    for name in OPTIONAL:
        if name in imported and find_spec(name) is None:
            pytest.skip(f"{name} isn't installed")
    if path.stem == "amd_quark_backend" and (problem := requires.amd_quark()):
        pytest.skip(str(problem))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path, tmp_path: Path) -> None:
    skip_unless_installed(path)
    command = [sys.executable, str(path), *OPTIONS.get(path.stem, ())]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    for line in KEY_LINES.get(path.stem, ()):
        assert re.search(line, done.stdout), f"{line}\n{done.stdout}"


@pytest.mark.parametrize("method", ["lsq", "tqt"])
def test_both_qat_examples_start_alike(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first quantized forward of the torch and the JAX example: the same logits, bit for bit."""
    for path in EXAMPLES:
        if path.stem.startswith("lsq_qat_"):
            skip_unless_installed(path)
    monkeypatch.syspath_prepend(str(EXAMPLES[0].parent))
    logits = [importlib.import_module(f"lsq_qat_{name}").first_forward(method) for name in ("torch", "jax")]
    assert logits[0].shape == (64, 10)
    assert logits[0].std() > 0.1
    assert logits[0].tobytes() == logits[1].tobytes()
