"""The same operations in plain torch or jnp: what a user would write instead, and what ours are compared with.

``f`` is one of the two classes below: the names that the expressions need, in torch or in jnp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from quark_kernels import QuantSpec

# Of x in groups that share a scale, s the scales, c the codes.
EXPRESSIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("fake_quantize", "int8"): lambda f, x, s, c: f.clip(f.round(x / s), -128, 127) * s,
    ("fake_quantize", "fp8_e4m3"): lambda f, x, s, c: f.cast(f.cast(f.clip(x / s, -448, 448), f.fp8), f.float32) * s,
    ("fake_quantize", "fp4"): lambda f, x, s, c: f.fp4_values(f.fp4_codes(x / s)) * s,
    ("quantize", "int8"): lambda f, x, s, c: f.cast(f.clip(f.round(x / s), -128, 127), f.int8),
    ("quantize", "int4"): lambda f, x, s, c: f.packed(f.cast(f.clip(f.round(x / s), -8, 7), f.int8) & 15),
    ("quantize", "fp8_e4m3"): lambda f, x, s, c: f.cast(f.clip(x / s, -448, 448), f.fp8),
    ("quantize", "fp4"): lambda f, x, s, c: f.packed(f.fp4_codes(x / s)),
    ("dequantize", "int8"): lambda f, x, s, c: f.cast(c, f.float32) * s,
    ("dequantize", "int4"): lambda f, x, s, c: f.int4_values(c) * s,
    ("dequantize", "fp8_e4m3"): lambda f, x, s, c: f.cast(c, f.float32) * s,
}


def expression(f: Torch | Jnp, operation: str, spec: QuantSpec) -> Callable[..., Any]:
    """Return the operation as a function of x and s (None: they follow from x) or of codes and s; x is in groups."""
    formula = EXPRESSIONS[operation, spec.format]

    def run(data: Any, s: Any = None) -> Any:
        return formula(f, data, f.dynamic_scales(data, spec) if s is None else s, data)

    return run


class Torch:
    """torch's names."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.clip, self.round = torch.clip, torch.round
        self.fp8, self.int8, self.float32 = torch.float8_e4m3fn, torch.int8, torch.float32
        positive = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        self.fp4, self.fp4_middles = torch.cat([positive, -positive]), (positive[1:] + positive[:-1]) / 2

    def cast(self, a: Any, dtype: Any) -> Any:
        return a.to(dtype)

    def packed(self, codes: Any) -> Any:
        """Two codes a byte, the first one low."""
        return (codes[..., ::2] | codes[..., 1::2] << 4).to(self.torch.uint8)

    def int4_values(self, packed: Any) -> Any:
        codes = self.torch.stack([packed & 15, packed >> 4], -1).flatten(-2).to(self.int8)
        return ((codes ^ 8) - 8).to(self.float32)

    def fp4_codes(self, v: Any) -> Any:
        return self.torch.bucketize(v.abs(), self.fp4_middles) + 8 * (v < 0)

    def fp4_values(self, codes: Any) -> Any:
        return self.fp4[codes]

    def dynamic_scales(self, x: Any, spec: QuantSpec) -> Any:
        """The scales of groups, as factors in float32."""
        torch, hi = self.torch, spec.element.hi
        amax = x.abs().amax(-1, keepdim=True)
        if spec.scale_format == "e8m0":
            largest = torch.frexp(torch.tensor(hi)).exponent
            return torch.ldexp(torch.ones_like(amax), torch.frexp(amax).exponent - largest)
        if spec.scale_format == "e4m3":
            whole = amax.max() / (448 * hi)
            return (amax / hi / whole).to(self.fp8).to(self.float32) * whole
        return amax / hi

    def lsq_gradients(self, x: Any, g: Any, s: Any, lo: int = -128, hi: int = 127) -> tuple[Any, Any]:
        """The gradient of x, and the sum of those of s over each group."""
        v = x / s
        r = self.round(v)
        inside = (lo <= r) & (r <= hi)
        of_scale = self.torch.where(inside, r - v, self.clip(r, lo, hi))
        return self.torch.where(inside, g, 0), (g * of_scale).sum(-1)


class Jnp:
    """jnp's names, as far as JAX is measured."""

    def __init__(self) -> None:
        import jax.numpy as jnp

        self.clip, self.round = jnp.clip, jnp.round
        self.fp8, self.int8, self.float32 = jnp.float8_e4m3fn, jnp.int8, jnp.float32

    def cast(self, a: Any, dtype: Any) -> Any:
        return a.astype(dtype)

    def dynamic_scales(self, x: Any, spec: QuantSpec) -> Any:
        raise NotImplementedError
