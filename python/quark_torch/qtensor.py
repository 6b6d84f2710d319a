"""QTensor on torch tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree

from quark_kernels.qtensor import QTensorBase
from quark_kernels.spec import QuantSpec


@dataclass(frozen=True, eq=False, repr=False)
class QTensor(QTensorBase):
    """A quantized torch tensor; see ``QTensorBase`` for the attributes. A torch pytree whose leaves are the tensors."""

    qvalue: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    global_scale: torch.Tensor | None
    pair_bits: torch.Tensor | None
    spec: QuantSpec
    shape: tuple[int, ...]
    dtype: torch.dtype
    packed: bool

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the numbers, as ``quark_torch.dequantize(self, dtype)``."""
        from quark_torch.functions import dequantize

        return dequantize(self, dtype)

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.qvalue.device

    def to(self, device: torch.device | str) -> QTensor:
        """Return the same tensor with its arrays on ``device``."""
        device = torch.device(device)  # a dtype would convert the codes
        arrays = {name: getattr(self, name) for name in self.ARRAYS}
        return replace(self, **{name: a.to(device) for name, a in arrays.items() if a is not None})


def _flatten(q: QTensor) -> tuple[list[Any], tuple[Any, ...]]:
    return [getattr(q, name) for name in QTensor.ARRAYS], (q.spec, q.shape, q.dtype, q.packed)


def _unflatten(arrays: Any, static: Any) -> QTensor:
    return QTensor(*arrays, *static)


_pytree.register_pytree_node(QTensor, _flatten, _unflatten, serialized_type_name="quark_torch.QTensor")
