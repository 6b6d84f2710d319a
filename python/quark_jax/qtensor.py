"""QTensor on JAX arrays."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import export

from quark_kernels.qtensor import QTensorBase
from quark_kernels.spec import QuantSpec


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, eq=False, repr=False)
class QTensor(QTensorBase):
    """A quantized JAX array; see ``QTensorBase`` for the attributes. A pytree whose leaves are the arrays."""

    qvalue: jax.Array
    scale: Any
    zero_point: jax.Array | None
    global_scale: jax.Array | None
    pair_bits: jax.Array | None
    spec: QuantSpec
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    packed: bool

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """Return the numbers, as ``quark_jax.dequantize(self, dtype)``."""
        from quark_jax.functions import dequantize

        return dequantize(self, dtype)

    def native(self) -> tuple[jax.Array, jax.Array]:
        """Return codes in JAX's own dtype and scales, as ``lax.scaled_dot`` and ``jax.nn.scaled_matmul`` take them.

        Returns:
            Codes of the logical shape: narrow integers as int2, int4, uint2 or uint4, fp4 as ``float4_e2m1fn``, others
            as they are; and the scales. The product of nvfp4 arrays is to be multiplied by their ``global_scale``.

        Raises:
            ValueError: JAX has no dtype for the codes.

        """
        from quark_jax.functions import native_codes

        return native_codes(self), self.scale

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        """Return the arrays with their names, and what is static."""
        leaves = [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in self.ARRAYS]
        return leaves, (self.spec, self.shape, self.dtype, self.packed)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], leaves: Any) -> QTensor:
        """Put a flattened QTensor together again."""
        return cls(*leaves, *static)

    def __repr__(self) -> str:
        """Return the tensor in one line; transformations may put anything in an array's place."""
        if all(a is None or hasattr(a, "shape") for a in (self.qvalue, self.scale, self.zero_point)):
            return super().__repr__()
        return f"QTensor({self.spec}, shape={self.shape})"


def _write_static(static: tuple[Any, ...]) -> bytes:
    spec, shape, dtype, packed = static
    return json.dumps([spec.to_json(), shape, np.dtype(dtype).name, packed]).encode()


def _read_static(data: bytes) -> tuple[Any, ...]:
    spec, shape, dtype, packed = json.loads(data)
    return QuantSpec.from_json(spec), tuple(shape), jax.numpy.dtype(dtype), packed


# Exported programs say which pytrees they take and give.
export.register_pytree_node_serialization(
    QTensor,
    serialized_name="quark_jax.QTensor",
    serialize_auxdata=_write_static,
    deserialize_auxdata=_read_static,
)
