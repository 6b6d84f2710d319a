"""The core's operators as XLA custom calls: one template over the operator table."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from quark_kernels import _core, ffi_api
from quark_kernels.schema import OPS, OpSpec, logical_shape, outputs


def _register() -> None:
    # Before anything is registered: a handler that the runtime refuses would keep all of JAX from starting.
    if reason := ffi_api.mismatch():
        raise ImportError(f"quark_jax can't be used: {reason}")
    for name, handler in _core.xla_handlers().items():
        jax.ffi.register_ffi_target(name, handler, platform="cpu")


_register()


def call(name: str, arrays: Sequence[jax.Array | None], spec: OpSpec) -> list[jax.Array]:
    """Call an operator on arrays or tracers; a zero point that is None is left out. Returns its outputs."""
    _core.cpu_level()  # raises here, while tracing, where QUARK_CPU_LEVEL is wrong
    op = OPS[name]
    given = [a for a in arrays if a is not None]
    shape = logical_shape(op, spec, [a.shape for a in given])
    results = [
        jax.ShapeDtypeStruct(size, np.dtype(dtype)) for size, dtype in outputs(op, spec, shape, given[0].dtype.name)
    ]
    # Under vmap each example is a call of its own: with its own dynamic scale.
    kernel = jax.ffi.ffi_call(f"quark_kernels.{name}", results, vmap_method="sequential")
    return list(kernel(*given, spec=spec.text))
