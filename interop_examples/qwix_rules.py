"""Formats of quark_jax under qwix's rules: which layer of a Flax model computes with which numbers.

    pip install qwix
    python interop_examples/qwix_rules.py

qwix (https://github.com/google/qwix) quantizes a model by rules that match the paths of its modules. Its own rules name
JAX dtypes, so a format without one (MX6, NVFP4's two levels of scales, int4 that rounds half away) has no place there.
What it lets others say is a provider: a subclass of `qwix.QuantizationProvider` has rules of its own and decides what
becomes of the functions that qwix intercepts within the model. This one fake-quantizes what goes into `dot_general`,
with gradients straight through, so the same model is trained and served in any of our formats.

qwix's quantized weights (`PtqProvider`, its `QArray`) stay its own: a `QArray` has one array of values and one of
scales, without packed codes, pair bits or a tensor's scale, and nothing can be put in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax import nnx
from safetensors.numpy import load_file

import quark_jax as qj
import quark_kernels

DIGITS = load_file(Path(quark_kernels.__file__).with_name("data") / "digits.safetensors")
EPOCHS, BATCH = 6, 64


@dataclass(frozen=True, kw_only=True)
class Rule(qwix.QuantizationRule):
    """The formats of a matching layer: names of presets or specs, or None for numbers as they are."""

    weight: str | qj.QuantSpec | None = None
    activation: str | qj.QuantSpec | None = None


class Provider(qwix.QuantizationProvider):
    """Fake-quantizes the inputs of every matrix product, blocks along the axis that is summed over."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        super().__init__(rules)

    def get_intercept_map(self) -> dict[str, Callable[..., Any]]:
        """Return what qwix calls instead of the functions of those names."""
        return super().get_intercept_map() | {"jax.lax.dot_general": self.dot_general}

    def dot_general(self, x: jax.Array, w: jax.Array, dimensions: Any, *rest: Any, **options: Any) -> jax.Array:
        """Compute the product of the rounded operands."""
        rule, _ = self._get_current_rule_and_op_id("dot_general")  # which its base class has for subclasses
        if isinstance(rule, Rule):
            (x_axes, w_axes), _ = dimensions
            x, w = rounded(x, rule.activation, x_axes[-1]), rounded(w, rule.weight, w_axes[-1])
        return jax.lax.dot_general(x, w, dimensions, *rest, **options)


def rounded(x: jax.Array, spec: str | qj.QuantSpec | None, axis: int) -> jax.Array:
    """Return x in a format: blocks along an axis, formats without blocks with one scale for the tensor."""
    if spec is None:
        return x
    spec = qj.PRESETS[spec] if isinstance(spec, str) else spec
    has_blocks = isinstance(spec.granularity, qj.PerGroup)
    return qj.fake_quantize(x, spec, axis=axis if has_blocks else None, gradient="ste")


RULES = [
    Rule(module_path="layers/0", weight="int8", activation="uint8"),  # pixels, 64 of them
    Rule(module_path="layers/2", weight="mx6", activation="mx9"),
    Rule(module_path="layers/.*", weight="nvfp4", activation="mxfp8_e4m3"),
]


def network() -> nnx.Sequential:
    """Return the trained classifier in float32."""
    layers: list[Any] = []
    for i in range(3):
        weight, bias = DIGITS[f"layers.{i}.weight"], DIGITS[f"layers.{i}.bias"]
        layer = nnx.Linear(weight.shape[1], weight.shape[0], rngs=nnx.Rngs(0))
        layer.kernel[...], layer.bias[...] = jnp.asarray(weight.T), jnp.asarray(bias)
        layers += [layer, jax.nn.relu]
    return nnx.Sequential(*layers[:-1])


def images(name: str) -> jax.Array:
    return jnp.asarray(DIGITS[name].astype(np.float32) / 16)


def accuracy(model: Callable[[jax.Array], jax.Array]) -> float:
    """Return the share of held-out images that the model gets right."""
    return float((model(images("images")).argmax(axis=1) == DIGITS["labels"]).mean())


def train(model: nnx.Module) -> None:
    """Train the weights through the rounding."""
    x, labels = images("train_images"), jnp.asarray(DIGITS["train_labels"])
    steps = EPOCHS * (len(x) // BATCH)
    optimizer = nnx.Optimizer(model, optax.adam(optax.linear_schedule(1e-3, 0, steps)), wrt=nnx.Param)

    @nnx.jit
    def step(model: nnx.Module, optimizer: nnx.Optimizer, batch: jax.Array) -> None:
        def loss_of(model: Any) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(x[batch]), labels[batch]).mean()

        optimizer.update(model, nnx.grad(loss_of)(model))

    rng = np.random.default_rng(0)
    for _ in range(EPOCHS):
        for batch in rng.permutation(len(x))[: len(x) // BATCH * BATCH].reshape(-1, BATCH):
            step(model, optimizer, jnp.asarray(batch))


def by_hand(model: Any) -> jax.Array:
    """Return the logits of the same network, each layer's rounding written out."""
    x = images("images")
    for i, rule in enumerate(RULES):
        layer = model.layers[2 * i]
        x = rounded(x, rule.activation, 1) @ rounded(layer.kernel[...], rule.weight, 0) + layer.bias[...]
        x = jax.nn.relu(x) if i < 2 else x
    return x


def main() -> None:
    exact = accuracy(network())
    model = qwix.quantize_model(network(), Provider(RULES), images("images")[:1])
    before = accuracy(model)
    assert jnp.array_equal(model(images("images")), by_hand(model))
    train(model)
    after = accuracy(model)
    print(f"float32 {exact:.1%}; by the rules {before:.1%} without training, {after:.1%} after it")
    for rule in RULES:
        print(f"  {rule.module_path}: weights {rule.weight}, activations {rule.activation}")
    print("the same bits as the layers written by hand")


if __name__ == "__main__":
    main()
