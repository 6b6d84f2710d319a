"""quark-kernels for PyTorch."""

import sys

from quark_kernels import requires

if _problem := requires.torch():
    raise _problem

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
from quark_torch.functions import (
    choose_qparams,
    dequantize,
    fake_quantize,
    lsq_quantize,
    pack,
    quantize,
    tqt_quantize,
    unpack,
)
from quark_torch.qtensor import QTensor

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
    "fake_quantize",
    "lsq_quantize",
    "pack",
    "quantize",
    "tqt_quantize",
    "unpack",
]

if "torch.distributed.tensor" in sys.modules:  # which torch alone doesn't import
    import quark_torch.distributed  # noqa: F401
