"""Learn the quantizer's scales in JAX: the twin of `lsq_qat_torch.py`, with Flax NNX and optax.

    python interop_examples/lsq_qat_jax.py

A digit classifier goes to 4 bits with LSQ (arXiv 1902.08153), which learns the scale itself, and with TQT (arXiv
1903.08066), which learns the logarithm of the range's end and has a power of two as its scale.

Both files start from the same numbers and give the same logits, bit for bit, because every initial scale is a power of
two: sums of products of 4-bit numbers are then exact in float32, whatever their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from numpy.typing import NDArray
from safetensors.numpy import load_file

import quark_jax as qj
import quark_kernels
from quark_jax.nnx import LSQFakeQuantize, TQTFakeQuantize

Array = NDArray[Any]

DIGITS = load_file(Path(quark_kernels.__file__).with_name("data") / "digits.safetensors")
METHODS = ("lsq", "tqt")
EPOCHS, BATCH = 20, 64
RATE, SCALE_RATE = 3e-3, {"lsq": 1e-3, "tqt": 3e-2}  # thresholds are logarithms and take larger steps
SMALLEST = 2.0**-12  # a scale must stay positive; this one also serves neurons whose weights all died

# ---- NumPy, word for word as in the twin: the data, and where the scales start.


def pixels(name: str) -> Array:
    """Return the images "images" (held out) or "train_images", from 0 to 1."""
    return DIGITS[name].astype(np.float32) / 16


def batches() -> Iterator[Array]:
    """Draw the indices of each batch's training images."""
    rng = np.random.default_rng(0)
    for _ in range(EPOCHS):
        order = rng.permutation(len(DIGITS["train_images"]))
        yield from order[: len(order) // BATCH * BATCH].reshape(-1, BATCH)


def power_of_two(x: Array) -> Array:
    return np.ldexp(np.float32(1), np.rint(np.log2(np.maximum(x, SMALLEST))).astype(int))


def start(method: str) -> list[dict[str, Array]]:
    """Return each layer's trained weight and bias and its first scales; a batch shows how large the inputs are."""
    layers, x = [], pixels("train_images")[next(batches())]
    for i in range(3):
        weight, bias = DIGITS[f"layers.{i}.weight"], DIGITS[f"layers.{i}.bias"]
        if method == "lsq":  # the paper's 2 mean|x| / sqrt(quant_max); for weights one per output channel
            weight_scale = power_of_two(2 * np.abs(weight).mean(axis=1) / math.sqrt(7))
            input_scale = power_of_two(2 * np.abs(x).mean() / math.sqrt(15))
        else:  # nothing saturates at first
            weight_scale, input_scale = np.log2(np.abs(weight).max()), np.log2(np.abs(x).max())
        layers.append({"weight": weight, "bias": bias, "weight_scale": weight_scale, "input_scale": input_scale})
        x = np.maximum(x @ weight.T + bias, 0)
    return layers


# ---- Flax.


def rounding(method: str, layer: dict[str, Array]) -> tuple[nnx.Module, nnx.Module]:
    """Return what rounds a layer's weight and its inputs to 4 bits."""
    weight, inputs = layer["weight_scale"], layer["input_scale"]
    if method == "lsq":  # neither pixels nor what ReLU leaves is negative
        return LSQFakeQuantize(4, axis=0, scale=weight), LSQFakeQuantize(4, signed=False, scale=inputs)
    return TQTFakeQuantize(4, log_threshold=weight), TQTFakeQuantize(4, log_threshold=inputs)


class QuantLinear(nnx.Module):
    """A linear layer with 4-bit weights and inputs that learns their scales; with "float" it computes in float32."""

    def __init__(self, method: str, layer: dict[str, Array]) -> None:
        self.weight, self.bias = (nnx.Param(jnp.asarray(layer[name])) for name in ("weight", "bias"))
        if method != "float":
            self.of_weight, self.of_input = rounding(method, layer)

    def __call__(self, x: jax.Array) -> jax.Array:  # noqa: D102
        weight = self.weight[...]
        if hasattr(self, "of_weight"):
            x, weight = self.of_input(x), self.of_weight(weight)
        product = x @ weight.T  # exact with the first scales
        return product + self.bias[...]


def network(method: str) -> nnx.Sequential:
    first, second, last = (QuantLinear(method, layer) for layer in start(method))
    return nnx.Sequential(first, jax.nn.relu, second, jax.nn.relu, last)


def first_forward(method: str) -> Array:
    """Compute the logits of the first training batch with the first scales: the same bits as the twin's.

    Without `jit`, which would leave XLA free to start a sum with the bias, and then its order would matter.
    """
    return np.asarray(network(method)(jnp.asarray(pixels("train_images")[next(batches())])))


def adam(method: str, steps: int) -> optax.GradientTransformation:
    """Return an Adam that gives weights and scales a rate each."""
    # LSQ scales a scale's gradient by grad_factor, by default 1/sqrt(n * quant_max), so that scale and weights learn at
    # one pace. It matters to SGD; Adam divides any constant factor out again and needs a rate of its own instead.
    # A threshold between two good powers of two would hop to and fro for ever. So scales rest after half of the time,
    # and the weights settle around them.
    rates = {
        False: optax.linear_schedule(RATE, 0, steps),
        True: optax.linear_schedule(SCALE_RATE[method], 0, steps // 2),
    }
    parts = {is_scale: optax.adam(rate) for is_scale, rate in rates.items()}
    return optax.partition(parts, lambda tree: jax.tree.map_with_path(lambda path, _: "of_" in str(path), tree))


@nnx.jit
def step(model: nnx.Module, optimizer: nnx.Optimizer, x: jax.Array, labels: jax.Array) -> None:
    def loss_of(model: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

    optimizer.update(model, nnx.grad(loss_of)(model))
    for _, module in nnx.iter_modules(model):
        if isinstance(module, LSQFakeQuantize):
            module.scale[...] = jnp.maximum(module.scale[...], SMALLEST)


def train(model: nnx.Module, method: str) -> None:
    """Train weights and scales together."""
    x, labels, indices = jnp.asarray(pixels("train_images")), jnp.asarray(DIGITS["train_labels"]), list(batches())
    optimizer = nnx.Optimizer(model, adam(method, len(indices)), wrt=nnx.Param)
    for batch in indices:
        step(model, optimizer, x[batch], labels[batch])


def accuracy(model: nnx.Module) -> float:
    """Return the share of held-out images that the model gets right."""
    guesses = model(jnp.asarray(pixels("images"))).argmax(axis=1)
    return float(np.mean(np.asarray(guesses) == DIGITS["labels"]))


def main() -> dict[str, float]:
    exact, accuracies = accuracy(network("float")), {}
    print(f"float32: {exact:.1%} of the held-out images right")
    for method in METHODS:
        first, model = network(method), network(method)
        before = accuracy(first)
        train(model, method)
        after = accuracies[method] = accuracy(model)
        print(f"{method}, 4 bits: {before:.1%} rounded without training, {after:.1%} after QAT")
        for i, (old, layer) in enumerate(zip(first.layers[::2], model.layers[::2], strict=True)):
            for name in ("of_input", "of_weight"):
                was, now = (jnp.asarray(getattr(module, name).scale) for module in (old, layer))
                what = f"layer {i} {name[3:]} scale" + (f", mean of {now.size}" if now.ndim else "")
                print(f"  {what}: {was.mean():.4f} -> {now.mean():.4f}")
                assert (now > 0).all()
            states = (jax.tree.leaves(nnx.state(module, nnx.Param)) for module in (old, layer))
            assert not any(jnp.array_equal(a, b) for a, b in zip(*states, strict=True))
        assert after > exact - 0.015

        # A learned scale is a scale like any other: the codes to serve stand for what training computed with.
        last = model.layers[-1]
        weight, scale = last.weight[...], jnp.asarray(last.of_weight.scale)
        codes = qj.quantize(weight, last.of_weight.spec, scale=scale, packed=True)
        assert jnp.array_equal(codes.dequantize(), last.of_weight(weight))
        print(f"  serving {codes}")
    return accuracies


if __name__ == "__main__":
    main()
