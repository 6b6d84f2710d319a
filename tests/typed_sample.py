"""What a user writes, for the type checkers: mypy (strict) and pyright check it, and a test runs it."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import jax
import jax.numpy as jnp
import torch

import quark_jax
import quark_torch
from quark_kernels import PerGroup, QuantSpec
from quark_kernels.interop import load_safetensors, save_safetensors, to_jax
from quark_torch import nn


def in_torch(path: Path) -> torch.Tensor:
    w = torch.linspace(-1, 1, 256).reshape(8, 32)
    spec = QuantSpec("int4", PerGroup(16), rounding="half_away")
    q = quark_torch.quantize(w, spec, packed=True)
    assert_type(q, quark_torch.QTensor)
    assert_type(q.dequantize(), torch.Tensor)
    assert_type(q.shape, tuple[int, ...])
    save_safetensors(path, {"w": q})
    back: quark_torch.QTensor = load_safetensors(path)["w"]
    layer = nn.QuantizedLinear.from_linear(torch.nn.Linear(32, 8), "mxfp4")
    assert_type(layer, nn.QuantizedLinear)
    y: torch.Tensor = layer(back.dequantize())
    scale = torch.tensor(0.05, requires_grad=True)
    return y + quark_torch.lsq_quantize(w, scale, quant_min=-8, quant_max=7).sum()


def in_jax() -> jax.Array:
    w = jnp.linspace(-1, 1, 256).reshape(8, 32)
    q = quark_jax.quantize(w, "fp8_e4m3", axis=0)
    assert_type(q, quark_jax.QTensor)
    assert_type(q.dequantize(), jax.Array)
    y = quark_jax.fake_quantize(w, "int8", scale=0.01)
    assert_type(y, jax.Array)
    shared: quark_jax.QTensor = to_jax(quark_torch.quantize(torch.ones(4), "int8"))
    return y.sum() + shared.dequantize().sum()
