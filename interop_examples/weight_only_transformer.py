"""Weight-only quantization of a small transformer: 4-bit weights, float activations, in torch and in JAX.

    python interop_examples/weight_only_transformer.py

A decoder-only transformer learns in a few seconds to sort letters: it reads eight of them and writes them in order.
Then the weights of its linear layers are quantized, and every layer dequantizes its own on the fly: memory holds codes
of 4 bits, and the product is a float32 one. In torch `QuantizedLinear` takes the place of `nn.Linear`. In JAX a QTensor
is a parameter like any other, and the layer a line of code (for Flax, `quark_jax.nnx` has a QuantizedLinear too).

Each framework quantizes the float32 weights for itself, and "same bits" says that both got the same codes and scales,
and the same weights back. "right" is the share of letters in their place, "logits differ" the largest difference
between torch's and JAX's: they multiply the same numbers, but don't add up in the same order.
"""

from __future__ import annotations

import copy
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import quark_jax as qj
from quark_kernels import interop
from quark_torch.nn import QuantizedLinear

WIDTH, HEADS, BLOCKS = 128, 4, 2
LETTERS, LENGTH = 26, 8
STEPS, BATCH, RATE = 300, 32, 3e-3

# What `quantize` is told of each weight [outputs, inputs]. Groups run along the inputs; fp4 is packed anyway.
SPECS: dict[str, dict[str, Any]] = {
    "bf16": {"spec": "bf16"},
    "int4, groups of 128": {"spec": "int4", "group_size": 128, "packed": True},
    "mxfp4": {"spec": "mxfp4"},
    "nvfp4": {"spec": "nvfp4"},
    "int2, groups of 128": {"spec": "int2", "group_size": 128, "packed": True},
}
UNQUANTIZED = "float32"

# ---- The model in torch.


class Block(nn.Module):
    """Attention and a perceptron, each on normalized inputs and added to what was there."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.mix = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        qkv = self.qkv(functional.rms_norm(x, (WIDTH,), eps=1e-6))
        q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attention = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(attention.transpose(1, 2).flatten(2))
        return x + self.down(functional.relu(self.up(functional.rms_norm(x, (WIDTH,), eps=1e-6))))


class Transformer(nn.Module):
    """Tokens [n, length] to the logits of each next token. Token LETTERS says: now write."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(LETTERS + 1, WIDTH) / 10)
        self.position = nn.Parameter(torch.randn(2 * LENGTH, WIDTH) / 10)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.head = nn.Parameter(torch.randn(LETTERS, WIDTH) / WIDTH**0.5)

    def forward(self, tokens: Tensor) -> Tensor:  # noqa: D102
        x = self.blocks(self.token[tokens] + self.position)
        return functional.linear(functional.rms_norm(x, (WIDTH,), eps=1e-6), self.head)


def quantized(model: Transformer, arguments: dict[str, Any]) -> Transformer:
    """Return the model with every linear layer of its blocks quantized; embeddings and head stay as they are."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        for name, layer in list(block.named_children()):
            setattr(block, name, QuantizedLinear.from_linear(layer, **arguments))
    return model


# ---- The model in JAX: a function of {"blocks.0.qkv.weight": array or QTensor, ...}, torch's names.

Parameters = dict[str, Any]


def linear(x: jax.Array, weight: Any) -> jax.Array:
    """Multiply by a weight [outputs, inputs]; a quantized one is dequantized here, inside `jit`."""
    return x @ (weight.dequantize(x.dtype) if isinstance(weight, qj.QTensor) else weight).T


def rms_norm(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def block(weights: Parameters, x: jax.Array) -> jax.Array:
    qkv = linear(rms_norm(x), weights["qkv"]).reshape(*x.shape[:2], 3, HEADS, -1)
    attention = jax.nn.dot_product_attention(*jnp.moveaxis(qkv, 2, 0), is_causal=True)
    x = x + linear(attention.reshape(x.shape), weights["mix"])
    return x + linear(jax.nn.relu(linear(rms_norm(x), weights["up"])), weights["down"])


@jax.jit
def transformer(parameters: Parameters, tokens: jax.Array) -> jax.Array:
    x = parameters["token"][tokens] + parameters["position"]
    for i in range(BLOCKS):
        x = block({name: parameters[f"blocks.{i}.{name}.weight"] for name in ("qkv", "mix", "up", "down")}, x)
    return linear(rms_norm(x), parameters["head"])


# ---- The task.


def examples(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw n rows: letters, the sign to write, the sorted letters but the last; and the letters to write."""
    letters = np.random.default_rng(seed).integers(LETTERS, size=(n, LENGTH))
    answer = np.sort(letters)
    return torch.tensor(np.hstack([letters, np.full((n, 1), LETTERS), answer[:, :-1]])), torch.tensor(answer)


def loss_of(logits: Tensor, answer: Tensor) -> Tensor:
    return functional.cross_entropy(logits[:, LENGTH:].flatten(0, 1), answer.flatten())


def train() -> Transformer:
    torch.manual_seed(0)
    model = Transformer()
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * min(1, step / 50) * (1 - step / STEPS)
        tokens, answer = examples(BATCH, seed=step)
        loss = loss_of(model(tokens), answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False)


def are_same(in_torch: Any, in_jax: Any) -> bool:
    """Return whether two tensors have the same dtype, shape and bytes; QTensors also the same spec."""
    here = interop.to_jax(in_torch)  # moves bits and computes nothing
    arrays = zip(jax.tree.leaves(here), jax.tree.leaves(in_jax), strict=True)
    return jax.tree.structure(here) == jax.tree.structure(in_jax) and all(
        (a.dtype, a.shape, np.asarray(a).tobytes()) == (b.dtype, b.shape, np.asarray(b).tobytes()) for a, b in arrays
    )


def report(name: str, model: Transformer, parameters: Parameters) -> None:
    """Print a row of the table, from held-out examples. Raises AssertionError where the frameworks' weights differ."""
    tokens, answer = examples(1000, seed=STEPS)
    ours, theirs = model(tokens), interop.to_torch(transformer(parameters, interop.to_jax(tokens.int())))
    right = (ours[:, LENGTH:].argmax(dim=-1) == answer).float().mean().item()
    difference = (ours - theirs).abs().max().item()

    weights = {key: value for key, value in parameters.items() if key.startswith("blocks.")}
    nbytes = sum(value.nbytes for value in weights.values())
    bits = 8 * nbytes / sum(prod(value.shape) for value in weights.values())
    pairs = [(model.get_submodule(key.removesuffix(".weight")).weight, value) for key, value in weights.items()]
    same_codes = all(are_same(in_torch, in_jax) for in_torch, in_jax in pairs)
    if name != UNQUANTIZED:
        pairs = [(in_torch.dequantize(), in_jax.dequantize()) for in_torch, in_jax in pairs]
    same_weights = all(are_same(in_torch, in_jax) for in_torch, in_jax in pairs)
    print(
        f"{name:20}{nbytes:>9}{bits:>12.3f}{loss_of(ours, answer):>12.4f}{loss_of(theirs, answer):>10.4f}{right:>8.1%}"
        f"{'yes' if same_codes and same_weights else 'NO':>11}{difference:>15.1e}"
    )
    assert same_codes
    assert same_weights


def main() -> None:
    model = train()
    parameters = interop.to_jax(dict(model.state_dict()))
    print(
        f"{'weights':20}{'bytes':>9}{'bits/value':>12}{'torch loss':>12}{'JAX loss':>10}{'right':>8}{'same bits':>11}"
        f"{'logits differ':>15}"
    )
    report(UNQUANTIZED, model, parameters)
    for name, arguments in SPECS.items():
        blocks = {key: qj.quantize(x, **arguments) for key, x in parameters.items() if key.startswith("blocks.")}
        report(name, quantized(model, arguments), parameters | blocks)


if __name__ == "__main__":
    torch.set_num_threads(1)  # tensors this small are done before a second thread wakes
    main()
