"""Trains the demo's digit classifier and writes `python/quark_kernels/data/digits.safetensors`.

    python scripts/train_digits.py [OUTPUT]

A 64-128-64-10 perceptron with ReLU learns scikit-learn's bundled 8x8 digits; a quarter of them is held out. It holds

    layers.{0,1,2}.weight   float32 [out, in]
    layers.{0,1,2}.bias     float32 [out]
    images                  uint8 [450, 64], the held-out ones; pixels 0 to 16 (the model's input is pixel / 16)
    labels                  uint8 [450]
    train_images            uint8 [1347, 64], the others, for examples that train on
    train_labels            uint8 [1347]

and the float32 accuracy on the held-out images as metadata. The seed is fixed: a second run on the same machine writes
the same bytes (another BLAS may round the weights' last bits differently).

Needs numpy, safetensors and scikit-learn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

SEED = 0
HELD_OUT = 450
HIDDEN = (128, 64)  # multiples of 32: every block format fills its blocks
DARKEST = 16
OUTPUT = Path(__file__).parents[1] / "python" / "quark_kernels" / "data" / "digits.safetensors"

Layers = list[tuple[NDArray[np.float32], NDArray[np.float32]]]


def train(images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> Layers:
    """Fits the perceptron and returns each layer's (weight [out, in], bias [out])."""
    model = MLPClassifier(HIDDEN, alpha=1e-2, batch_size=64, max_iter=1000, random_state=SEED)
    model.fit(images / DARKEST, labels)
    return [
        (np.ascontiguousarray(weight.T, dtype=np.float32), bias.astype(np.float32))
        for weight, bias in zip(model.coefs_, model.intercepts_, strict=True)
    ]


def accuracy(layers: Layers, images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> float:
    """The share of `images` that the stored float32 layers classify as `labels` say."""
    x = images.astype(np.float32) / DARKEST
    for weight, bias in layers[:-1]:
        x = np.maximum(x @ weight.T + bias, 0)
    weight, bias = layers[-1]
    return float(np.mean(np.argmax(x @ weight.T + bias, axis=1) == labels))


def main() -> None:
    """Trains, prints the held-out accuracy and writes the file."""
    parser = argparse.ArgumentParser(description="Train the demo's digit classifier.")
    parser.add_argument("output", nargs="?", type=Path, default=OUTPUT, help=f"default: {OUTPUT}")
    output: Path = parser.parse_args().output

    digits = load_digits()
    images, labels = digits.data.astype(np.uint8), digits.target.astype(np.uint8)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=HELD_OUT, random_state=SEED, stratify=labels
    )
    layers = train(train_images, train_labels)
    score = accuracy(layers, test_images, test_labels)

    tensors: dict[str, NDArray[np.generic]] = {
        "images": test_images,
        "labels": test_labels,
        "train_images": train_images,
        "train_labels": train_labels,
    }
    for i, (weight, bias) in enumerate(layers):
        tensors |= {f"layers.{i}.weight": weight, f"layers.{i}.bias": bias}
    # One key alone: safetensors writes metadata in a random order, and the same run should write the same bytes.
    metadata = {"accuracy": f"{score:.6f}"}
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output, metadata)
    print(f"{output}: {output.stat().st_size} bytes, accuracy {score:.2%} on {HELD_OUT} held-out images")


if __name__ == "__main__":
    main()
