"""Learn the quantizer's scales in JAX: the twin of `lsq_qat_torch.py`, with jit, grad and a hand-written Adam.

    python interop_examples/lsq_qat_jax.py

A digit classifier goes to 4 bits with LSQ (arXiv 1902.08153), which learns the scale itself, and with TQT (arXiv
1903.08066), which learns the logarithm of the range's end and has a power of two as its scale.

Both files start from the same numbers and give the same logits, bit for bit, because every initial scale is a power of
two: sums of products of 4-bit numbers are then exact in float32, whatever their order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

import quark_jax as qj
import quark_kernels

Array = NDArray[Any]
Layers = list[dict[str, Any]]  # of {"weight": [out, in], "bias": [out], "weight_scale", "input_scale"}
State = tuple[Layers, Layers, Layers, jax.Array]  # layers, Adam's two means, the steps taken

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


def scale_of(method: str, learned: Array) -> Array:
    """Return the scale that a learned parameter means."""
    return learned if method == "lsq" else np.ldexp(np.float32(1), np.ceil(learned).astype(int) - 3)


# ---- JAX.


def rounded_weight(method: str, layer: dict[str, Any]) -> jax.Array:
    if method == "lsq":
        return qj.lsq_quantize(layer["weight"], layer["weight_scale"], quant_min=-8, quant_max=7, axis=0)
    if method == "tqt":
        return qj.tqt_quantize(layer["weight"], layer["weight_scale"], bits=4)
    return layer["weight"]


def rounded_input(method: str, layer: dict[str, Any], x: jax.Array) -> jax.Array:
    if method == "lsq":  # neither pixels nor what ReLU leaves is negative
        return qj.lsq_quantize(x, layer["input_scale"], quant_min=0, quant_max=15)
    if method == "tqt":
        return qj.tqt_quantize(x, layer["input_scale"], bits=4)
    return x


def network(method: str, layers: Layers, x: jax.Array) -> jax.Array:
    """Compute the logits with 4-bit weights and inputs, or with the method "float" in float32."""
    for i, layer in enumerate(layers):
        x = jax.nn.relu(x) if i else x
        product = rounded_input(method, layer, x) @ rounded_weight(method, layer).T  # exact with the first scales
        x = product + layer["bias"]
    return x


def first_forward(method: str) -> Array:
    """Compute the logits of the first training batch with the first scales: the same bits as the twin's.

    Without `jit`, which would leave XLA free to start a sum with the bias, and then its order would matter.
    """
    layers = jax.tree.map(jnp.asarray, start(method))
    return np.asarray(network(method, layers, jnp.asarray(pixels("train_images")[next(batches())])))


def loss_of(layers: Layers, method: str, x: jax.Array, labels: jax.Array) -> jax.Array:
    log_probabilities = jax.nn.log_softmax(network(method, layers, x))
    return -jnp.mean(jnp.take_along_axis(log_probabilities, labels[:, None], axis=1))


@partial(jax.jit, static_argnames="method")
def adam(state: State, done: jax.Array, x: jax.Array, labels: jax.Array, method: str) -> State:
    """Take one step after the share `done` of them. Scales have a rate of their own."""
    layers, mean, square, t = state
    t = t + 1
    gradients = jax.grad(loss_of)(layers, method, x, labels)
    mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, gradients)
    square = jax.tree.map(lambda s, g: 0.999 * s + 0.001 * g**2, square, gradients)

    def update(path: Any, p: jax.Array, m: jax.Array, s: jax.Array) -> jax.Array:
        # LSQ scales a scale's gradient by grad_factor, by default 1/sqrt(n * quant_max), so that scale and weights
        # learn at one pace. It matters to SGD; Adam divides any constant factor out again.
        # A threshold between two good powers of two would hop to and fro for ever. So scales rest after half of the
        # time, and the weights settle around them.
        is_scale = path[-1].key.endswith("_scale")
        rate = SCALE_RATE[method] * jnp.maximum(1 - 2 * done, 0) if is_scale else RATE * (1 - done)
        p = p - rate * (m / (1 - 0.9**t)) / (jnp.sqrt(s / (1 - 0.999**t)) + 1e-8)
        return jnp.maximum(p, SMALLEST) if is_scale and method == "lsq" else p

    return jax.tree.map_with_path(update, layers, mean, square), mean, square, t


def train(layers: Layers, method: str) -> Layers:
    """Train weights and scales together."""
    x, labels, indices = jnp.asarray(pixels("train_images")), jnp.asarray(DIGITS["train_labels"]), list(batches())
    zeros = jax.tree.map(jnp.zeros_like, layers)
    state = (layers, zeros, zeros, jnp.zeros(()))
    for i, batch in enumerate(indices):
        state = adam(state, jnp.float32(i / len(indices)), x[batch], labels[batch], method)
    return state[0]


def accuracy(layers: Layers, method: str) -> float:
    """Return the share of held-out images that the model gets right."""
    guesses = network(method, layers, jnp.asarray(pixels("images"))).argmax(axis=1)
    return float(np.mean(np.asarray(guesses) == DIGITS["labels"]))


def main() -> dict[str, float]:
    first = {method: jax.tree.map(jnp.asarray, start(method)) for method in METHODS}
    exact, accuracies = accuracy(first["lsq"], "float"), {}
    print(f"float32: {exact:.1%} of the held-out images right")
    for method in METHODS:
        layers = train(first[method], method)
        before, after = accuracy(first[method], method), accuracy(layers, method)
        accuracies[method] = after
        print(f"{method}, 4 bits: {before:.1%} rounded without training, {after:.1%} after QAT")
        for i, (old, layer) in enumerate(zip(first[method], layers, strict=True)):
            for name in ("input_scale", "weight_scale"):
                was, now = (scale_of(method, np.asarray(x[name])) for x in (old, layer))
                what = f"layer {i} {name.replace('_', ' ')}" + (f", mean of {now.size}" if now.size > 1 else "")
                print(f"  {what}: {was.mean():.4f} -> {now.mean():.4f}")
                assert (now > 0).all()
                assert not jnp.array_equal(layer[name], old[name])
        assert after > exact - 0.01

        # A learned scale is a scale like any other: the codes to serve stand for what training computed with.
        last = layers[-1]
        scale = jnp.asarray(scale_of(method, np.asarray(last["weight_scale"])))
        axis = 0 if method == "lsq" else None
        codes = qj.quantize(last["weight"], "int4", scale=scale, axis=axis, packed=True)
        assert jnp.array_equal(codes.dequantize(), rounded_weight(method, last))
        print(f"  serving {codes}")
    return accuracies


if __name__ == "__main__":
    main()
