"""A build with GPU kernels on a machine without a GPU: it loads, runs on the CPU, and says what is missing.

usage: no_device.py CUDA HIP: the platforms that were built
"""

from __future__ import annotations

import sys

import numpy as np

import quark_kernels
from quark_kernels import _core

info = quark_kernels.info()
for name in sys.argv[1:]:
    key = name.lower()
    assert info[key].startswith("compiled for "), info[key]
    reason = info["unavailable"].get(name, "")
    assert reason.startswith(f"no {name} device: "), f"{name}: {reason!r}"
    assert len(_core.xla_handlers("CUDA" if name == "CUDA" else "ROCM")) == len(_core.ops())
    try:
        _core.check_gpu(name)
    except RuntimeError as error:
        print(error)
    else:
        raise AssertionError(f"{name} has a device here")

codes = np.empty(3, np.int8)
_core.quantize((np.array([0.1, 0.2, 12.7], np.float32), np.array([0.1], np.float32)), (codes,), "int8 block=0")
assert codes.tolist() == [1, 2, 127]
print(f"{' and '.join(sys.argv[1:])}: no device, and it says so")
