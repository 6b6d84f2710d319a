"""FP8 matrix products with a dynamic scale for every token, in torch and in JAX.

    python interop_examples/fp8_per_token_activations.py

This is how FP8 is served: weights are quantized once, with a scale for each output channel, and activations in every
call, with a scale for each token (here: for each image). The matrix product multiplies codes. A scale is a factor of a
whole row or column of it, so scales come last:

    y[t, c] = sum_k(x_code[t, k] * w_code[c, k]) * x_scale[t] * w_scale[c] + bias[c]

The table compares three ways to compute this, in both frameworks, with the float32 model: the product of codes, the
same in bfloat16 (which has every e4m3 number, so only sums are rounded), and the product of dequantized numbers. Codes
and scales have the same bits in both frameworks, in every layer. Then: how long quantizing the activations takes,
compared with a copy of as many bytes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import Tensor
from torch.nn import functional

import quark_jax as qj
import quark_kernels
import quark_torch as qt
from quark_kernels import PerChannel, PerToken, QuantSpec, interop

Array = NDArray[Any]

WEIGHTS = QuantSpec("fp8_e4m3", PerChannel(0))  # of a weight [outputs, inputs]
ACTIVATIONS = QuantSpec("fp8_e4m3", PerToken())

DIGITS = load_file(Path(quark_kernels.__file__).with_name("data") / "digits.safetensors")
IMAGES = DIGITS["images"].astype(np.float32) / 16  # held out; each pixel from 0 to 1
LAYERS = [(DIGITS[f"layers.{i}.weight"], DIGITS[f"layers.{i}.bias"]) for i in range(3)]

METHODS = ("dequantized", "codes", "codes in bfloat16")
TIMED_SHAPE, TIMED_ROUNDS = (4096, 4096), 15  # tokens, features

# ---- The layer, in each framework.


def torch_linear(x: Tensor, weight: qt.QTensor, bias: Tensor, method: str) -> Tensor:
    q = qt.quantize(x, ACTIVATIONS)
    if method == "dequantized":
        return functional.linear(q.dequantize(), weight.dequantize(), bias)
    # torch.nn.functional.scaled_mm takes these codes and scales as they are; this is what it computes.
    dtype = torch.bfloat16 if method == "codes in bfloat16" else torch.float32
    sums = functional.linear(q.qvalue.to(dtype), weight.qvalue.to(dtype)).float()
    return sums * q.scale * weight.scale.T + bias  # scales are [tokens, 1] and [outputs, 1]


@partial(jax.jit, static_argnames="method")
def jax_linear(x: jax.Array, weight: qj.QTensor, bias: jax.Array, method: str) -> jax.Array:
    q = qj.quantize(x, ACTIVATIONS)
    if method == "dequantized":
        return q.dequantize() @ weight.dequantize().T + bias
    dtype = jnp.bfloat16 if method == "codes in bfloat16" else q.qvalue.dtype  # XLA multiplies fp8 numbers
    codes, weight_codes = q.qvalue.astype(dtype), weight.qvalue.astype(dtype)
    sums = jnp.matmul(codes, weight_codes.T, preferred_element_type=jnp.float32)
    return sums * q.scale * weight.scale.T + bias


def network(linear: Callable[..., Any], layers: list[tuple[Any, Any]], images: Any, method: str) -> tuple[Any, Any]:
    """Return the input of every layer, and the logits."""
    inputs, x = [], images
    for weight, bias in layers:
        inputs.append(x.clip(0))  # which leaves pixels as they are
        x = linear(inputs[-1], weight, bias, method)
    return inputs, x


def accuracy(logits: Array) -> float:
    """Return the share of held-out images that the model gets right."""
    return float(np.mean(logits.argmax(axis=1) == DIGITS["labels"]))


def are_same(in_torch: qt.QTensor, in_jax: qj.QTensor) -> bool:
    """Return whether two QTensors have the same spec and shape, and arrays of the same dtypes, shapes and bytes."""
    here = interop.to_jax(in_torch)  # moves bits and computes nothing
    arrays = zip(jax.tree.leaves(here), jax.tree.leaves(in_jax), strict=True)
    return jax.tree.structure(here) == jax.tree.structure(in_jax) and all(
        (a.dtype, a.shape, np.asarray(a).tobytes()) == (b.dtype, b.shape, np.asarray(b).tobytes()) for a, b in arrays
    )


def medians(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median seconds of each call. They take turns, so that whatever else is running slows all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(TIMED_ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def compare_speed() -> None:
    x = torch.randn(TIMED_SHAPE, generator=torch.Generator().manual_seed(0))
    # Quantizing reads x, and writes codes and scales. A copy writes as much as it reads: half of these bytes.
    source = torch.ones((x.nbytes + qt.quantize(x, ACTIVATIONS).nbytes) // 2, dtype=torch.uint8)
    target = torch.empty_like(source)
    x_jax, quantize = interop.to_jax(x), jax.jit(lambda x: qj.quantize(x, ACTIVATIONS))
    seconds = medians(
        {
            "torch": lambda: qt.quantize(x, ACTIVATIONS),
            "JAX": lambda: jax.block_until_ready(quantize(x_jax)),
            "copy": lambda: target.copy_(source),
        }
    )
    print(
        f"quantizing {TIMED_SHAPE[0]} tokens of {TIMED_SHAPE[1]} features takes "
        f"{seconds['torch'] / seconds['copy']:.1f} times a copy of as many bytes in torch, "
        f"{seconds['JAX'] / seconds['copy']:.1f} times in JAX"
    )


def main() -> None:
    in_torch = [(qt.quantize(torch.tensor(w), WEIGHTS), torch.tensor(b)) for w, b in LAYERS]
    in_jax = [(qj.quantize(jnp.asarray(w), WEIGHTS), jnp.asarray(b)) for w, b in LAYERS]

    _, exact = network(lambda x, weight, bias, _: x @ weight.T + bias, LAYERS, IMAGES, "float32")
    print(
        f"largest differences of logits, which go up to {abs(exact).max():.0f}; the share of images classified right\n"
    )
    print(f"{'product of':20}{'torch':>8}{'JAX':>8}{'from float32':>15}{'from dequantized':>19}{'torch from JAX':>17}")
    print(f"{'float32':20}{accuracy(exact):>8.1%}")
    expected = None
    for method in METHODS:
        inputs, logits = network(torch_linear, in_torch, torch.tensor(IMAGES), method)
        ours, theirs = logits.numpy(), np.asarray(network(jax_linear, in_jax, jnp.asarray(IMAGES), method)[1])
        expected = ours if method == "dequantized" else expected
        apart = [f"{abs(ours - other).max():.1e}" for other in (exact, expected, theirs)]
        print(f"{method:20}{accuracy(ours):>8.1%}{accuracy(theirs):>8.1%}{apart[0]:>15}{apart[1]:>19}{apart[2]:>17}")

    for x, (weight, _), (weight_jax, _) in zip(inputs, in_torch, in_jax, strict=True):
        q = qt.quantize(x, ACTIVATIONS)
        assert are_same(weight, weight_jax)
        assert are_same(q, qj.quantize(interop.to_jax(x), ACTIVATIONS))
    print("\nthe same codes and scales in torch and JAX, of weights and of activations, in every layer; such as")
    print(f"  {weight}\n  {q}\n")
    compare_speed()


if __name__ == "__main__":
    main()
