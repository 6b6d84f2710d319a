"""Train and quantize in torch, serve in JAX.

    python interop_examples/train_in_torch_serve_in_jax.py

The codes cross over without a copy and mean the same bits there: both frameworks run the same compiled functions.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional

import quark_torch as qt
from quark_kernels import interop

# Any preset or QuantSpec does; layers may differ. fp4 codes share bytes in pairs, fp8 is the frameworks' own dtype.
SPECS = {"0": qt.QuantSpec("fp8_e4m3", qt.PerChannel(0)), "2": qt.QuantSpec("fp4", qt.PerGroup(32))}


def train(steps: int = 100) -> tuple[nn.Sequential, torch.Tensor]:
    """Train a float32 classifier: which of four stretches of eight numbers has the largest sum."""
    torch.manual_seed(0)
    x = torch.randn(1024, 32)
    labels = x.view(-1, 4, 8).sum(dim=2).argmax(dim=1)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(steps):
        loss = functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, x


def quantized(model: nn.Sequential) -> dict[str, dict[str, Any]]:
    """Return {layer: {"weight": QTensor, "bias": Tensor}} of the linear layers."""
    return {
        name: {"weight": qt.quantize(layer.weight, SPECS[name]), "bias": layer.bias.detach()}
        for name, layer in model.named_children()
        if isinstance(layer, nn.Linear)
    }


@jax.jit
def serve(layers: dict[str, dict[str, Any]], x: jax.Array) -> jax.Array:
    """Compute the logits. QTensors are pytrees of arrays, so they enter `jit` (and vmap, scan) like any argument."""
    first, last = layers["0"], layers["2"]
    hidden = jax.nn.relu(x @ first["weight"].dequantize().T + first["bias"])
    return hidden @ last["weight"].dequantize().T + last["bias"]


def main() -> float:
    model, x = train()
    here = quantized(model)
    # One call takes the whole tree. copy=False promises that JAX reads torch's memory, or raises and says why it can't.
    there = interop.to_jax(here, copy=False)

    for name, layer in here.items():
        ours, theirs = layer["weight"], there[name]["weight"]
        assert theirs.qvalue.unsafe_buffer_pointer() == ours.qvalue.data_ptr()  # the same bytes, not equal ones
        assert np.asarray(theirs.qvalue).tobytes() == ours.qvalue.view(torch.uint8).numpy().tobytes()
        assert np.asarray(theirs.dequantize()).tobytes() == ours.dequantize().numpy().tobytes()
        print(f"layer {name}: {theirs}, shared with torch")

    logits = np.asarray(serve(there, interop.to_jax(x)))
    exact = model(x).detach().numpy()
    agree = float(np.mean(logits.argmax(axis=1) == exact.argmax(axis=1)))
    print(f"quantized in JAX and float32 in torch agree on {agree:.1%} of {len(exact)} inputs")
    assert agree > 0.9
    return agree


if __name__ == "__main__":
    main()
