"""Quantization-aware training in torch: train with the rounding in place, then serve the codes.

    python interop_examples/torch_qat.py

A network trained in float32 and rounded to int4 afterwards loses accuracy. Here every forward pass already computes
with the rounded numbers that serving will use (`fake_quantize`), and the gradient goes straight through the rounding,
so the optimizer finds weights that survive it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

import quark_torch as qt


def rings(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw points in the plane, labelled 0, 1 or 2 by how far out they lie."""
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
    radius = x.norm(dim=1)
    return x, (radius > 0.8).long() + (radius > 1.5).long()


class QuantLinear(nn.Linear):
    """A linear layer that computes with int4 weights, one scale per output channel, and int8 activations."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        weight = qt.fake_quantize(self.weight, "int4", axis=0)
        return functional.linear(qt.fake_quantize(x, "int8"), weight, self.bias)


def train(model: nn.Module, x: Tensor, labels: Tensor, steps: int = 200) -> list[float]:
    """Train as usual: nothing in the loop knows of quantization."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(steps):
        loss = functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> float:
    torch.manual_seed(0)
    first, last = QuantLinear(2, 64), QuantLinear(64, 3)
    model = nn.Sequential(first, nn.ReLU(), last)
    losses = train(model, *rings(1024, seed=1))
    print(f"loss: {losses[0]:.3f} at first, {losses[-1]:.3f} after {len(losses)} steps")
    assert losses[-1] < losses[0] / 3

    # For serving: 4-bit codes, two in a byte, and a scale for each output channel.
    q1, q2 = (qt.quantize(layer.weight, "int4", axis=0, packed=True) for layer in (first, last))
    print(f"serving {q2}")

    # Training saw exactly the numbers that these codes stand for, so serving gives the very same logits.
    x, labels = rings(1024, seed=2)
    with torch.no_grad():
        hidden = functional.linear(qt.fake_quantize(x, "int8"), q1.dequantize(), first.bias).relu()
        logits = functional.linear(qt.fake_quantize(hidden, "int8"), q2.dequantize(), last.bias)
        assert torch.equal(logits, model(x))
    accuracy = (logits.argmax(dim=1) == labels).float().mean().item()
    print(f"accuracy on new points: {accuracy:.1%}")
    assert accuracy > 0.9
    return accuracy


if __name__ == "__main__":
    torch.set_num_threads(1)  # tensors this small are done before a second thread wakes
    main()
