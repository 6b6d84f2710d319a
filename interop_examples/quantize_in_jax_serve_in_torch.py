"""Quantize in JAX, write one safetensors file, serve in torch; and back.

    python interop_examples/quantize_in_jax_serve_in_torch.py

A trained digit classifier goes to a dozen formats in JAX. All of them land in one file, which torch reads: the same
codes, the same scales, and so the same weights to the last bit. What still differs between the frameworks is the order
in which a matrix product adds up, a few millionths of a logit.

The way back is no different: torch quantizes, JAX serves, and the file has the same bytes whoever wrote it.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

import quark_jax as qj
import quark_kernels
import quark_torch as qt
from quark_kernels import interop

Array = NDArray[Any]
Model = dict[str, Any]  # "layers.0.weight": a QTensor, "layers.0.bias": a tensor, ...; all of one framework

DIGITS = load_file(Path(quark_kernels.__file__).with_name("data") / "digits.safetensors")
IMAGES = DIGITS["images"].astype(np.float32) / 16  # held out; each pixel from 0 to 1

# Presets, and what else `quantize` is told. Codes below 8 bits fill a byte each unless they are packed (fp4 always is).
# bfp16 has 8-bit codes; packed, each block is its exponent's byte and then its codes.
PRESETS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "int8": {"axis": 0},
    "fp8_e4m3": {"axis": 0},
    "fp6_e2m3": {"axis": 0, "packed": True},
    "int4": {"group_size": 32, "packed": True},
    "uint4": {"group_size": 32, "packed": True},  # asymmetric: every group has a zero point too
    "int2": {"group_size": 32, "packed": True},
    "mxfp8_e4m3": {},
    "mxfp4": {},
    "nvfp4": {},
    "mx6": {"packed": True},
    "bfp16": {"packed": True},
}
BACK = "nvfp4"  # the preset for the way back: codes and two levels of scales


def classifier(quantize: Any, convert: Any, preset: str) -> Model:
    """Return the trained classifier in the framework of these functions: weights quantized, biases as they are."""
    model: Model = {}
    for name in (f"layers.{i}.{part}" for i in range(3) for part in ("weight", "bias")):
        value = convert(DIGITS[name])
        model[name] = quantize(value, preset, **PRESETS[preset]) if name.endswith("weight") else value
    return model


def logits(model: Model, images: Any) -> Array:
    """Serve. One function does for both frameworks, because a QTensor has the same methods in both."""
    x = images
    for i in range(3):
        hidden = x.clip(0) if i else x
        x = hidden @ model[f"layers.{i}.weight"].dequantize().T + model[f"layers.{i}.bias"]
    return np.asarray(x)


def accuracy(outputs: Array) -> float:
    """Return the share of held-out images that the model gets right."""
    return float(np.mean(outputs.argmax(axis=1) == DIGITS["labels"]))


def are_same(in_jax: Any, in_torch: Any) -> bool:
    """Return whether two tensors have the same dtype, shape and bytes; QTensors also the same spec."""
    there = interop.to_jax(in_torch)  # moves bits and computes nothing
    arrays = zip(jax.tree.leaves(in_jax), jax.tree.leaves(there), strict=True)
    return jax.tree.structure(in_jax) == jax.tree.structure(there) and all(
        (a.dtype, a.shape, np.asarray(a).tobytes()) == (b.dtype, b.shape, np.asarray(b).tobytes()) for a, b in arrays
    )


def write(path: Path, models: dict[str, Model]) -> bytes:
    """Write all models to one file, and return its content."""
    tensors = {f"{preset}/{name}": value for preset, model in models.items() for name, value in model.items()}
    interop.save_safetensors(path, tensors)
    return path.read_bytes()


def read(path: Path, framework: str) -> dict[str, Model]:
    """Read the models of a file: what is a QTensor, and of which spec, the file says itself."""
    models: dict[str, Model] = {}
    for full_name, value in interop.load_safetensors(path, framework=framework).items():
        preset, name = full_name.split("/")
        models.setdefault(preset, {})[name] = value
    return models


def report(preset: str, in_jax: Model, in_torch: Model) -> None:
    """Print a row of the table. Raises AssertionError unless both models have the same codes and the same weights."""
    names = [name for name in in_jax if name.endswith("weight")]
    same_codes = all(are_same(in_jax[name], in_torch[name]) for name in names)
    same_weights = all(are_same(in_jax[name].dequantize(), in_torch[name].dequantize()) for name in names)
    sizes = [prod(in_torch[name].shape) for name in names]
    nbytes = sum(in_torch[name].nbytes for name in names)
    bits = sum(in_torch[name].bits_per_value * size for name, size in zip(names, sizes, strict=True)) / sum(sizes)
    ours, theirs = logits(in_jax, jnp.asarray(IMAGES)), logits(in_torch, torch.tensor(IMAGES))
    print(
        f"{preset:12}{nbytes:>8}{bits:>12.3f}{accuracy(ours):>10.1%}{accuracy(theirs):>10.1%}"
        f"{'yes' if same_codes else 'NO':>12}{'yes' if same_weights else 'NO':>14}{abs(ours - theirs).max():>15.1e}"
    )
    assert same_codes
    assert same_weights


def main() -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "digits.safetensors"
        in_jax = {preset: classifier(qj.quantize, jnp.asarray, preset) for preset in PRESETS}
        size = len(write(path, in_jax))
        in_torch = read(path, "torch")
        print(f"JAX wrote {len(in_jax)} models to one file of {size} bytes; torch reads\n")
        print(
            f"{'preset':12}{'bytes':>8}{'bits/value':>12}{'JAX':>10}{'torch':>10}{'same codes':>12}{'same weights':>14}"
            f"{'logits differ':>15}"
        )
        for preset, model in in_jax.items():
            report(preset, model, in_torch[preset])

        # And back. The file that torch writes is the one that JAX writes, so it doesn't matter who quantized.
        from_torch = {BACK: classifier(qt.quantize, torch.tensor, BACK)}
        from_jax = {BACK: in_jax[BACK]}
        assert write(path.with_name("from_torch"), from_torch) == write(path.with_name("from_jax"), from_jax)
        served = logits(read(path.with_name("from_torch"), "jax")[BACK], jnp.asarray(IMAGES))
        assert served.tobytes() == logits(in_jax[BACK], jnp.asarray(IMAGES)).tobytes()
        print(
            f"\nback: torch quantizes {BACK} to the same file, byte for byte, and JAX serves it: {accuracy(served):.1%}"
        )


if __name__ == "__main__":
    main()
