"""Number formats for neural networks: one C++ core, the same bits in PyTorch and JAX.

This package holds what both frontends share and imports neither framework. Use ``quark_torch`` or ``quark_jax``.
"""

from quark_kernels import requires

if _problem := requires.core():
    raise _problem

from quark_kernels import interop
from quark_kernels._core import VERSION
from quark_kernels.formats import FORMATS, ROUNDINGS, ElementFormat
from quark_kernels.info import info
from quark_kernels.spec import PRESETS, PerBlock, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec

__version__: str = VERSION

__all__ = [
    "FORMATS",
    "PRESETS",
    "ROUNDINGS",
    "ElementFormat",
    "PerBlock",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "QuantSpec",
    "__version__",
    "info",
    "interop",
]
