"""Quantization-aware training in JAX: the twin of `torch_qat.py`, with jit, grad and plain gradient descent.

    python interop_examples/jax_qat.py

Every forward pass computes with the rounded numbers that serving will use, and `jax.grad` goes straight through the
rounding. The `quark_jax` functions are ordinary JAX functions: arrays are traced, all other arguments are static.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import quark_jax as qj

Layers = list[dict[str, Any]]  # of {"weight": [out, in], "bias": [out]}; served weights are QTensors


def rings(n: int, seed: int) -> tuple[jax.Array, jax.Array]:
    """Draw points in the plane, labelled 0, 1 or 2 by how far out they lie."""
    x = jax.random.normal(jax.random.key(seed), (n, 2))
    radius = jnp.linalg.norm(x, axis=1)
    return x, (radius > 0.8).astype(int) + (radius > 1.5).astype(int)


def mlp(layers: Layers, x: jax.Array) -> jax.Array:
    """Compute the logits from weights that are rounded already; activations become int8 on the way."""
    for i, layer in enumerate(layers):
        x = qj.fake_quantize(jax.nn.relu(x) if i else x, "int8") @ layer["weight"].T + layer["bias"]
    return x


def loss_of(layers: Layers, x: jax.Array, labels: jax.Array) -> jax.Array:
    """Compute the loss that training sees: with int4 weights, one scale per output channel."""
    rounded = [{**layer, "weight": qj.fake_quantize(layer["weight"], "int4", axis=0)} for layer in layers]
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(mlp(rounded, x)), labels[:, None], axis=1))


@jax.jit
def step(layers: Layers, x: jax.Array, labels: jax.Array) -> tuple[Layers, jax.Array]:
    loss, gradients = jax.value_and_grad(loss_of)(layers, x, labels)
    return jax.tree.map(lambda p, g: p - 0.3 * g, layers, gradients), loss


@jax.jit
def serve(codes: Layers, x: jax.Array) -> jax.Array:
    """Compute the logits from codes. A QTensor is a pytree, so it enters `jit` like any other argument."""
    return mlp([{**layer, "weight": layer["weight"].dequantize()} for layer in codes], x)


def main() -> float:
    key1, key2 = jax.random.split(jax.random.key(0))
    layers: Layers = [
        {"weight": jax.random.normal(key1, (64, 2)), "bias": jnp.zeros(64)},
        {"weight": jax.random.normal(key2, (3, 64)) / 8, "bias": jnp.zeros(3)},
    ]
    (x, labels), losses = rings(1024, seed=1), []
    for _ in range(300):
        layers, loss = step(layers, x, labels)
        losses.append(float(loss))
    print(f"loss: {losses[0]:.3f} at first, {losses[-1]:.3f} after {len(losses)} steps")
    assert losses[-1] < losses[0] / 3

    # For serving: 4-bit codes, two in a byte, and a scale for each output channel.
    codes = [{**layer, "weight": qj.quantize(layer["weight"], "int4", axis=0, packed=True)} for layer in layers]
    print(f"serving {codes[-1]['weight']}")
    # Training saw exactly the numbers that these codes stand for.
    for layer, served in zip(layers, codes, strict=True):
        assert jnp.array_equal(served["weight"].dequantize(), qj.fake_quantize(layer["weight"], "int4", axis=0))

    x, labels = rings(1024, seed=2)
    accuracy = float(jnp.mean(serve(codes, x).argmax(axis=1) == labels))
    print(f"accuracy on new points: {accuracy:.1%}")
    assert accuracy > 0.9
    return accuracy


if __name__ == "__main__":
    main()
