"""Learn the quantizer's scales in torch: a digit classifier at 4 bits, with LSQ and with TQT.

    python interop_examples/lsq_qat_torch.py

`torch_qat.py` takes its scales from the data. Here they are parameters, and the optimizer weighs what a larger scale
loses to coarse steps against what a smaller one loses to saturation. LSQ (arXiv 1902.08153) learns the scale itself,
TQT (arXiv 1903.08066) the logarithm of the range's end, whose scale is a power of two: on hardware a shift of bits.

`lsq_qat_jax.py` is the twin. It starts from the same numbers and gives the same logits, bit for bit, because every
initial scale is a power of two: sums of products of 4-bit numbers are then exact in float32, whatever their order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import Tensor, nn
from torch.nn import functional

import quark_kernels
import quark_torch as qt
from quark_torch.nn import LSQFakeQuantize, TQTFakeQuantize

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


# ---- torch.


def rounding(method: str, layer: dict[str, Array]) -> tuple[nn.Module, nn.Module]:
    """Return what rounds a layer's weight and its inputs to 4 bits."""
    weight, inputs = (torch.tensor(layer[name]) for name in ("weight_scale", "input_scale"))
    if method == "lsq":  # neither pixels nor what ReLU leaves is negative
        return LSQFakeQuantize(4, axis=0, scale=weight), LSQFakeQuantize(4, signed=False, scale=inputs)
    return TQTFakeQuantize(4, log_threshold=weight), TQTFakeQuantize(4, log_threshold=inputs)


class QuantLinear(nn.Module):
    """A linear layer with 4-bit weights and inputs that learns their scales; with "float" it computes in float32."""

    def __init__(self, method: str, layer: dict[str, Array]) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.tensor(layer[name])) for name in ("weight", "bias"))
        float32 = nn.Identity(), nn.Identity()
        self.of_weight, self.of_input = float32 if method == "float" else rounding(method, layer)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        product = functional.linear(self.of_input(x), self.of_weight(self.weight))  # exact with the first scales
        return product + self.bias


def network(method: str) -> nn.Sequential:
    first, second, last = (QuantLinear(method, layer) for layer in start(method))
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)


def first_forward(method: str) -> Array:
    """Compute the logits of the first training batch with the first scales: the same bits as the twin's."""
    with torch.no_grad():
        return network(method)(torch.tensor(pixels("train_images")[next(batches())])).numpy()


def train(model: nn.Sequential, method: str) -> None:
    """Train weights and scales together; each group has its rate."""
    scales = [p for name, p in model.named_parameters() if ".of_" in name]
    others = [p for name, p in model.named_parameters() if ".of_" not in name]
    # LSQ scales a scale's gradient by grad_factor, by default 1/sqrt(n * quant_max), so that scale and weights learn at
    # one pace. It matters to SGD; Adam divides any constant factor out again and needs a rate of its own instead.
    optimizer = torch.optim.Adam([{"params": others}, {"params": scales}])
    x, labels = torch.tensor(pixels("train_images")), torch.tensor(DIGITS["train_labels"]).long()
    indices = list(batches())
    for step, batch in enumerate(indices):
        # A threshold between two good powers of two would hop to and fro for ever. So scales rest after half of the
        # time, and the weights settle around them.
        done = step / len(indices)
        optimizer.param_groups[0]["lr"] = RATE * (1 - done)
        optimizer.param_groups[1]["lr"] = SCALE_RATE[method] * max(1 - 2 * done, 0)
        loss = functional.cross_entropy(model(x[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if method == "lsq":
            with torch.no_grad():
                for scale in scales:
                    scale.clamp_(min=SMALLEST)


def accuracy(model: nn.Module) -> float:
    """Return the share of held-out images that the model gets right."""
    with torch.no_grad():
        guesses = model(torch.tensor(pixels("images"))).argmax(dim=1).numpy()
    return float(np.mean(guesses == DIGITS["labels"]))


def main() -> dict[str, float]:
    exact, accuracies = accuracy(network("float")), {}
    print(f"float32: {exact:.1%} of the held-out images right")
    for method in METHODS:
        first, model = network(method), network(method)
        before = accuracy(first)
        train(model, method)
        after = accuracies[method] = accuracy(model)
        print(f"{method}, 4 bits: {before:.1%} rounded without training, {after:.1%} after QAT")
        for i, (old, layer) in enumerate(zip(first[::2], model[::2], strict=True)):
            for name in ("of_input", "of_weight"):
                was, now = (getattr(module, name).scale.detach() for module in (old, layer))
                what = f"layer {i} {name[3:]} scale" + (f", mean of {now.numel()}" if now.dim() else "")
                print(f"  {what}: {was.mean():.4f} -> {now.mean():.4f}")
                assert (now > 0).all()
            assert not any(torch.equal(a, b) for a, b in zip(old.parameters(), layer.parameters(), strict=True))
        assert after > exact - 0.015

        # A learned scale is a scale like any other: the codes to serve stand for what training computed with.
        last = model[-1]
        codes = qt.quantize(last.weight, last.of_weight.spec, scale=last.of_weight.scale, packed=True)
        assert torch.equal(codes.dequantize(), last.of_weight(last.weight))
        print(f"  serving {codes}")
    return accuracies


if __name__ == "__main__":
    torch.set_num_threads(1)  # tensors this small are done before a second thread wakes
    main()
