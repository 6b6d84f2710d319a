"""Tensors between the frameworks through DLPack, without a copy wherever that is possible.

A zero-copy result shares memory with its source: writing into the torch tensor changes the JAX array, which JAX takes
to be immutable. Pass ``copy=True`` where either side will be written to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax
    import torch

ALIGNMENT = 64
"""Bytes. XLA's CPU backend uses a buffer as it is only if it starts on such a boundary."""


def to_jax(x: Any, copy: bool | None = None) -> Any:
    """Return ``x`` with every torch tensor as a JAX array and every torch QTensor as a JAX one; the same bits.

    Args:
        x: a torch tensor, a ``quark_torch.QTensor``, or a pytree of them. JAX arrays, Python numbers and None stay.
        copy: None: copy only where there is no other way; False: never; True: always.

    Returns:
        The same structure, for JAX. Shares memory with ``x`` where nothing was copied.

    Raises:
        TypeError: something else is in ``x``.
        ValueError: a tensor has a dtype that JAX doesn't have; or, with ``copy=False``, needs a copy. The message says
            why: strided, not 64-byte aligned, requires_grad, a view with the conjugate or negative bit.

    """
    import jax
    import torch

    import quark_jax
    import quark_torch

    _check_copy(copy)

    def leaf(value: Any) -> Any:
        if isinstance(value, quark_torch.QTensor):
            dtype = jax.numpy.dtype(str(value.dtype).removeprefix("torch."))
            return quark_jax.QTensor(**_parts(value, lambda a: _tensor_to_jax(a, copy), dtype))
        if isinstance(value, torch.Tensor):
            return _tensor_to_jax(value, copy)
        if isinstance(value, (jax.Array, int, float, complex)):
            return value
        raise _unknown(value, "torch tensors, quark_torch.QTensor")

    return _map(leaf, x, (quark_torch.QTensor, torch.Tensor))


def to_torch(x: Any, copy: bool | None = None) -> Any:
    """Return ``x`` with every JAX array as a torch tensor and every JAX QTensor as a torch one; the same bits.

    Args:
        x: a JAX array, a ``quark_jax.QTensor``, or a pytree of them. torch tensors, Python numbers and None stay.
        copy: None: copy only where there is no other way; False: never; True: always.

    Returns:
        The same structure, for torch. Shares memory with ``x`` where nothing was copied: don't write into it.

    Raises:
        TypeError: something else is in ``x``, such as a tracer: inside ``jit`` there are no values to share.
        ValueError: an array has a dtype that torch doesn't have; or, with ``copy=False``, needs a copy (it is sharded).

    """
    import jax
    import torch

    import quark_jax
    import quark_torch

    _check_copy(copy)

    def leaf(value: Any) -> Any:
        if isinstance(value, quark_jax.QTensor):
            dtype = getattr(torch, value.dtype.name)
            return quark_torch.QTensor(**_parts(value, lambda a: _array_to_torch(a, copy), dtype))
        if isinstance(value, jax.core.Tracer):
            raise TypeError("x holds a tracer; inside jit there is no value to share, call to_torch outside")
        if isinstance(value, jax.Array):
            return _array_to_torch(value, copy)
        if isinstance(value, (torch.Tensor, int, float, complex)):
            return value
        raise _unknown(value, "jax.Array, quark_jax.QTensor")

    return _map(leaf, x, (quark_jax.QTensor, torch.Tensor))


# ---- pieces ----------------------------------------------------------------------------------------------------------


def _check_copy(copy: object) -> None:
    if copy is not None and not isinstance(copy, bool):
        raise TypeError(f"copy is {copy!r}; allowed: None, True or False")


def _unknown(value: object, allowed: str) -> TypeError:
    return TypeError(
        f"x holds a {type(value).__module__}.{type(value).__name__}; allowed: {allowed} and pytrees of them"
    )


def _map(leaf: Callable[[Any], Any], tree: Any, leaves: tuple[type, ...]) -> Any:
    import jax

    return jax.tree.map(leaf, tree, is_leaf=lambda value: isinstance(value, leaves))


def _parts(q: Any, convert: Callable[[Any], Any], dtype: Any) -> dict[str, Any]:
    """A QTensor's fields with its arrays converted."""
    arrays = {name: getattr(q, name) for name in q.ARRAYS}
    converted = {name: None if a is None else convert(a) for name, a in arrays.items()}
    return {**converted, "spec": q.spec, "shape": q.shape, "dtype": dtype, "packed": q.packed}


def _reason_to_copy(t: torch.Tensor) -> str | None:
    """Why JAX can't use this tensor's memory as it is."""
    if t.requires_grad:
        return "it requires_grad, and JAX can't record torch gradients (detach it)"
    if t.is_conj() or t.is_neg():
        return "it is a lazy conjugate or negative view"
    if not t.is_contiguous():
        return f"it is strided: shape {tuple(t.shape)} has strides {t.stride()}, and JAX takes row-major arrays"
    if t.data_ptr() % ALIGNMENT != 0:
        return f"it is not {ALIGNMENT}-byte aligned: it starts {t.data_ptr() % ALIGNMENT} bytes past such an address"
    return None


def _tensor_to_jax(t: torch.Tensor, copy: bool | None) -> jax.Array:
    import jax
    import torch

    if t.layout != torch.strided:
        raise TypeError(f"x has layout {t.layout}; allowed: torch.strided (dense)")
    if t.device.type == "meta":
        raise ValueError("x is a meta tensor; it has no memory to share or to copy")
    name = str(t.dtype).removeprefix("torch.")
    if name.endswith("64") and name != "complex64" and jax.dtypes.canonicalize_dtype(name).name != name:
        raise ValueError(f"x is {name}; JAX has no such dtype unless jax_enable_x64 is set")
    if not hasattr(jax.numpy, "bool_" if name == "bool" else name):
        raise ValueError(f"x is {name}; JAX has no such dtype")
    reason = _reason_to_copy(t)
    if copy is False and reason is not None:
        raise ValueError(f"copy is False, but x can't be shared: {reason}; allowed: copy=None or copy=True")
    if copy or reason is not None:
        t = t.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    shared: jax.Array = jax.dlpack.from_dlpack(t)
    return shared


def _array_to_torch(a: jax.Array, copy: bool | None) -> torch.Tensor:
    import jax
    import torch

    if a.is_deleted():
        raise ValueError("x has been deleted or donated; it has no memory to share or to copy")
    if not hasattr(torch, a.dtype.name):
        raise ValueError(f"x is {a.dtype.name}; torch has no such dtype")
    if a.dtype.name in ("int2", "int4", "uint2", "uint4", "float4_e2m1fn"):
        raise ValueError(f"x is {a.dtype.name}, which has no DLPack form; use codes one a byte or packed ones (uint8)")
    if not a.is_fully_addressable:
        raise ValueError("x has shards on other hosts; gather it first")
    devices = a.sharding.device_set
    if len(devices) > 1:
        if copy is False:
            raise ValueError(
                f"copy is False, but x is sharded over {len(devices)} devices; allowed: copy=None or copy=True"
            )
        a = jax.device_put(a, next(iter(sorted(devices, key=str))))
    t = torch.utils.dlpack.from_dlpack(a)
    return t.clone() if copy else t
