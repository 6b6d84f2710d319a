"""Tensors between the frameworks, through DLPack or through files, and in the layouts of compressed-tensors.

DLPack copies nothing wherever that is possible. A zero-copy result shares memory with its source: writing into the
torch tensor changes the JAX array, which JAX takes to be immutable. Pass ``copy=True`` where either side will be
written to.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from quark_kernels.spec import QuantSpec

if TYPE_CHECKING:
    import jax
    import torch

__all__ = [
    "compressed_tensors_scheme",
    "from_compressed_tensors",
    "load_safetensors",
    "save_safetensors",
    "to_compressed_tensors",
    "to_jax",
    "to_torch",
]

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
    from jax.core import Tracer

    import quark_jax
    import quark_torch

    _check_copy(copy)

    def leaf(value: Any) -> Any:
        if isinstance(value, quark_jax.QTensor):
            dtype = getattr(torch, value.dtype.name)
            return quark_torch.QTensor(**_parts(value, lambda a: _array_to_torch(a, copy), dtype))
        if isinstance(value, Tracer):
            raise TypeError("x holds a tracer; inside jit there is no value to share, call to_torch outside")
        if isinstance(value, jax.Array):
            return _array_to_torch(value, copy)
        if isinstance(value, (torch.Tensor, int, float, complex)):
            return value
        raise _unknown(value, "jax.Array, quark_jax.QTensor")

    return _map(leaf, x, (quark_jax.QTensor, torch.Tensor))


def save_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Write QTensors and plain tensors to a safetensors file that either framework reads back with the same bits.

    A QTensor ``NAME`` becomes the tensors ``NAME.qvalue``, ``NAME.scale`` and, where it has them, ``NAME.zero_point``,
    ``NAME.global_scale`` and ``NAME.pair_bits``, for any reader of safetensors. Spec, shape, dtype and packed are JSON
    in the file's metadata under ``"quark_kernels"``. Equal tensors give equal files, whichever framework wrote them.
    The file appears under its name when it is complete: a call that fails leaves what was there before.

    Args:
        path: the file's name. One that is there is replaced.
        tensors: by name: QTensors of either framework, torch tensors, JAX and NumPy arrays; any device, any strides.
        metadata: more text for the file's metadata, such as ``{"format": "pt"}``.

    Raises:
        TypeError: something else is in ``tensors``, or a dtype that safetensors doesn't have.
        ValueError: two tensors would have one name, the parts of a QTensor don't fit together, or a tensor has no bytes
            here (meta, deleted, on other hosts).
        OSError: the file can't be written.

    """
    from quark_kernels import files

    files.save(path, tensors, metadata)


def load_safetensors(path: str | os.PathLike[str], framework: str = "torch") -> dict[str, Any]:
    """Read a safetensors file: what ``save_safetensors`` wrote, or any other.

    Nothing in the file is trusted: every part's dtype and shape is checked before memory is allocated.

    Args:
        path: the file's name.
        framework: ``"torch"`` (tensors on the CPU) or ``"jax"`` (arrays on the default device).

    Returns:
        QTensors and plain tensors by name, in the names' order. For JAX, int64, uint64 and float64 come as NumPy arrays
        unless ``jax_enable_x64`` is set.

    Raises:
        ValueError: the file isn't what it says, or has a dtype that the framework lacks.
        OSError: the file can't be read.

    """
    from quark_kernels import files

    return files.load(path, framework)


def to_compressed_tensors(q: Any, name: str = "weight", *, scale_dtype: str = "float32") -> dict[str, Any]:
    """Return a QTensor's tensors in the layout of compressed-tensors (0.20), which vLLM and llm-compressor read.

    ``pack-quantized``, for integers of at most 8 bits: ``NAME_packed`` (int32 words of a stream of offset binary codes
    along the last axis), ``NAME_scale``, ``NAME_shape`` (int64) and, where ``q`` has zero points, ``NAME_zero_point``
    (words too, along the rows; int8 per tensor). ``mxfp4-pack-quantized``: ``NAME_packed`` (uint8, low nibble first)
    and ``NAME_scale`` (uint8, E8M0 codes). ``nvfp4-pack-quantized``: a float8_e4m3fn ``NAME_scale`` and
    ``NAME_global_scale``, which is ``1 / q.global_scale`` in float32.

    Only bits move, so that ``from_compressed_tensors`` gives the same QTensor. The exception is nvfp4's global scale g:
    ``1 / (1 / g)`` is g's neighbour for one g in six. No choice of the reciprocal would keep them all, and what has
    been there and back once stays as it is.

    Args:
        q: a QTensor of either framework: integers with float32 scales per tensor, per row (``PerChannel(0)`` in 2-D,
            ``PerToken()``) or per group along the last axis, at least 2-D; or 2-D mxfp4 or nvfp4. Whole groups only.
        name: what the tensors' names start with: the name of the weight, such as ``"lm_head.weight"``.
        scale_dtype: of a pack-quantized scale: float32, bfloat16 or float16 (models store it in their own dtype).

    Returns:
        Tensors of q's framework, on q's device; they may share its memory. In JAX ``NAME_shape`` is a NumPy array
        unless ``jax_enable_x64`` is set.

    Raises:
        TypeError: not a QTensor.
        ValueError: the package has no layout for it, ``q``'s scales don't fit ``scale_dtype`` exactly, a zero point
            isn't one of the format's codes, or the parts of ``q`` don't fit together.

    """
    from quark_kernels import compressed_tensors

    return compressed_tensors.to_tensors(q, name, scale_dtype)


def from_compressed_tensors(
    tensors: Mapping[str, Any], spec: Any, name: str = "weight", *, dtype: Any = None, packed: bool | None = None
) -> Any:
    """Return the QTensor that tensors in the layout of compressed-tensors stand for; see ``to_compressed_tensors``.

    The tensors alone don't say what they are, so ``spec`` does. Bits move, and scales of 16 bits become float32 ones.
    Of an unsigned spec, such as ``uint4``, codes and zero points are the package's plus half the range: the same bits.

    Args:
        tensors: torch tensors or JAX arrays by name; others than the weight's are ignored.
        spec: a QuantSpec, a preset's name, or what the model's ``config.json`` has: a config group or its ``weights``.
        name: what the tensors' names start with.
        dtype: of the original weight, or its name; None: that of the scale, or bfloat16 for mxfp4 and nvfp4.
        packed: as for ``quantize``.

    Returns:
        A QTensor of the tensors' framework, on the device of ``NAME_packed``, whose memory it may share.

    Raises:
        TypeError: a wrong kind of tensor or dtype.
        ValueError: a tensor is missing or has another shape, or the package has no layout for the spec.

    """
    from quark_kernels import compressed_tensors

    return compressed_tensors.from_tensors(tensors, spec, name, dtype, packed)


def compressed_tensors_scheme(spec: QuantSpec | str) -> dict[str, Any]:
    """Return what ``config.json`` says of weights in this spec: a config group's ``format`` and ``weights``.

    ``from_compressed_tensors`` takes it as its ``spec``. Unsigned formats are the package's asymmetric integers.

    Args:
        spec: a QuantSpec, or a preset's name.

    Returns:
        A dictionary that JSON can hold.

    Raises:
        TypeError: another kind of spec.
        ValueError: the package has no layout for the spec.

    """
    from quark_kernels import compressed_tensors

    return compressed_tensors.scheme(spec)


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
    from torch.utils.dlpack import from_dlpack

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
    t = from_dlpack(a)
    return t.clone() if copy else t
