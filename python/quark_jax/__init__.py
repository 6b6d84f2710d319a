"""quark-kernels for JAX."""

from quark_kernels import requires

if _problem := requires.jax():
    raise _problem

from quark_jax.functions import (
    choose_qparams,
    dequantize,
    fake_quantize,
    lsq_quantize,
    pack,
    quantize,
    tqt_quantize,
    unpack,
)
from quark_jax.primitives import export_checks
from quark_jax.qtensor import QTensor
from quark_kernels import (
    PRESETS,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantSpec,
    __version__,
)

__all__ = [
    "PRESETS",
    "PerBlock",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "QTensor",
    "QuantSpec",
    "__version__",
    "choose_qparams",
    "dequantize",
    "export_checks",
    "fake_quantize",
    "lsq_quantize",
    "pack",
    "quantize",
    "tqt_quantize",
    "unpack",
]
