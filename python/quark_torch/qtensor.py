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
    """A quantized torch tensor; see ``QTensorBase`` for the attributes. A torch pytree whose leaves are the tensors.

    ``torch.save`` keeps it, and ``torch.load`` reads it with ``weights_only=False``; ``interop.save_safetensors`` and
    ``load_safetensors`` need no trust in the file.
    """

    qvalue: torch.Tensor
    scale: Any
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

    def native(self, *, swizzled: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the codes and scales as torch's own scaled matrix products take them, without a computation.

        Args:
            swizzled: False: scales as they are, which ROCm takes. True: 2-D scales in the tiles of 128 by 4 that CUDA's
                ``torch._scaled_mm`` takes, as one flat tensor: rows filled to 128 and columns to 4 with zero bytes,
                scale (r, c) of C columns at ``((r // 128) * ceil(C / 4) + c // 4) * 512 + (r % 32) * 16
                + (r % 128 // 32) * 4 + c % 4``.

        Returns:
            Packed fp4 codes as ``float4_e2m1fn_x2``, others as they are; and the scales. The product of nvfp4 tensors
            is to be multiplied by their ``global_scale``.

        Raises:
            ValueError: torch has no dtype for the codes, or the scales can't be swizzled.

        """
        codes, scale = self.qvalue, self.scale
        if self.spec.scale_format in ("exponent", "microexponents") or self.zero_point is not None:
            raise ValueError(
                f"{self!r} has no native form: torch's products take no shared exponents and no zero points"
            )
        if self.spec.format == "fp4":
            if not self.packed:
                raise ValueError(
                    "fp4 codes are one a byte; torch takes packed ones, allowed: quantize(..., packed=True)"
                )
            codes = codes.view(torch.float4_e2m1fn_x2)
        elif self.packed or self.spec.element.can_pack or self.spec.format == "int8f6":
            raise ValueError(f"torch has no dtype for codes of {self.spec.format}")
        if not swizzled:
            return codes, scale
        if scale.dim() != 2 or scale.element_size() != 1:
            raise ValueError(
                f"swizzled is True; the scales are {scale.dtype} {tuple(scale.shape)}, allowed: 2-D of 8 bits"
            )
        rows, columns = -(-scale.shape[0] // 128), -(-scale.shape[1] // 4)
        fill = (0, columns * 4 - scale.shape[1], 0, rows * 128 - scale.shape[0])
        tiles = torch.nn.functional.pad(scale.view(torch.uint8), fill).reshape(rows, 4, 32, columns, 4)
        return codes, tiles.permute(0, 3, 2, 1, 4).flatten().view(scale.dtype)

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.qvalue.device

    def to(self, device: torch.device | str) -> QTensor:
        """Return the same tensor with its arrays on ``device``.

        Args:
            device: a device or its name.

        Returns:
            A new QTensor; arrays that are there already are shared.

        Raises:
            RuntimeError: torch has no such device.

        """
        device = torch.device(device)  # a dtype would convert the codes
        arrays = {name: getattr(self, name) for name in self.ARRAYS}
        return replace(self, **{name: a.to(device) for name, a in arrays.items() if a is not None})


def _flatten(q: QTensor) -> tuple[list[Any], tuple[Any, ...]]:
    # Of what is None no leaf: torch.vmap takes only tensors.
    present = tuple(name for name in QTensor.ARRAYS if getattr(q, name) is not None)
    return [getattr(q, name) for name in present], (present, q.spec, q.shape, q.dtype, q.packed)


def _flatten_with_keys(q: QTensor) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
    arrays, static = _flatten(q)
    return [(_pytree.GetAttrKey(name), a) for name, a in zip(static[0], arrays, strict=True)], static


def _unflatten(arrays: Any, static: Any) -> QTensor:
    present, *rest = static
    parts = dict(zip(present, arrays, strict=True))
    return QTensor(*(parts.get(name) for name in QTensor.ARRAYS), *rest)  # type: ignore[arg-type]


def _to_json(static: Any) -> Any:
    """What is static in a form that ``torch.export.save`` writes."""
    present, spec, shape, dtype, packed = static
    return [list(present), str(spec), list(shape), str(dtype).removeprefix("torch."), packed]


def _from_json(saved: Any) -> tuple[Any, ...]:
    present, spec, shape, dtype, packed = saved
    return tuple(present), QuantSpec.parse(spec), tuple(shape), getattr(torch, dtype), packed


_pytree.register_pytree_node(
    QTensor,
    _flatten,
    _unflatten,
    flatten_with_keys_fn=_flatten_with_keys,
    serialized_type_name="quark_torch.QTensor",
    to_dumpable_context=_to_json,
    from_dumpable_context=_from_json,
)
