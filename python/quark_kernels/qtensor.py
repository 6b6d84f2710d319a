"""What a QTensor is, apart from the framework whose arrays it holds."""

from __future__ import annotations

from math import prod
from typing import Any

from quark_kernels.spec import QuantSpec


class QTensorBase:
    """A quantized tensor: codes, and what they need to become numbers again.

    Attributes:
        qvalue: the codes; packed ones are bytes along the last axis, low bits first.
        scale: float32; 0-d per tensor, else the original's rank with one entry per group.
        zero_point: int32, shaped like ``scale``, or None.
        global_scale: a second scale for the whole tensor, or None.
        pair_bits: shared exponent bits of pairs of elements, or None.
        spec: the QuantSpec.
        shape: of the original tensor.
        dtype: of the original tensor, which ``dequantize`` returns by default.
        packed: whether ``qvalue`` is packed.

    """

    qvalue: Any
    scale: Any
    zero_point: Any
    global_scale: Any
    pair_bits: Any
    spec: QuantSpec
    shape: tuple[int, ...]
    dtype: Any
    packed: bool

    ARRAYS = ("qvalue", "scale", "zero_point", "global_scale", "pair_bits")

    @property
    def ndim(self) -> int:
        """Number of axes of the original tensor."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the arrays hold."""
        arrays = [getattr(self, name) for name in self.ARRAYS]
        return sum(prod(a.shape) * a.dtype.itemsize for a in arrays if a is not None)

    @property
    def bits_per_value(self) -> float:
        """Bits that the format needs for a value, its share of scales (32 bits) and zero points (a code's) included.

        ``nbytes`` is what memory really holds, where a 6-bit code may fill a byte. NaN for an empty tensor.
        """
        n = prod(self.shape)
        if n == 0:
            return float("nan")
        bits = n * self.spec.element.bits
        if not self.spec.element.is_cast:
            bits += prod(self.scale.shape) * 32
        if self.zero_point is not None:
            bits += prod(self.zero_point.shape) * self.spec.element.bits
        return bits / n

    def __repr__(self) -> str:
        """Return the tensor in one line: spec, shape, dtype, size."""
        words = [f"{self.spec!s}", f"shape={tuple(self.shape)}", f"dtype={str(self.dtype).removeprefix('torch.')}"]
        if self.packed:
            words.append("packed")
        words.append(f"scale{tuple(self.scale.shape)}")
        if prod(self.shape) > 0:
            words.append(f"{self.bits_per_value:.4g} bits/value")
        return f"QTensor({', '.join(words)}, {self.nbytes} bytes)"
