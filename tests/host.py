"""The float environment of this thread, as a host may have set it."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

_LIBM = ctypes.CDLL("libm.so.6")
_CODES = {"x86_64": (0x800, 0x400, 0xC00), "aarch64": (0x400000, 0x800000, 0xC00000)}[platform.machine()]
ROUNDINGS = dict(zip(("upward", "downward", "toward_zero"), _CODES, strict=True)) | {"to_nearest": 0}


def rounding() -> str:
    """How this thread rounds, as fenv.h has it."""
    return next(name for name, code in ROUNDINGS.items() if code == _LIBM.fegetround())


def set_rounding(name: str) -> None:
    assert _LIBM.fesetround(ROUNDINGS[name]) == 0


@contextmanager
def rounded(name: str) -> Iterator[None]:
    """This thread rounds like that, and must do so still at the end."""
    set_rounding(name)
    try:
        yield
        assert rounding() == name
    finally:
        set_rounding("to_nearest")


@contextmanager
def flushed() -> Iterator[None]:
    """Subnormals are zero to this thread, and must be so still at the end."""
    import torch

    assert torch.set_flush_denormal(True)
    try:
        yield
        assert torch.tensor([1e-40]).add(0).item() == 0
    finally:
        torch.set_flush_denormal(False)
