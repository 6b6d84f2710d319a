"""AMD Quark on these kernels: importing this puts them behind its operators, ``torch.ops.quark.*``.

    import quark_torch.amd_quark   # and AMD Quark's ModelQuantizer, modules and functions run as before, but on these

    quark_torch.amd_quark.install(strict=True)   # its bits, wherever it has defined ones
    quark_torch.amd_quark.uninstall()            # its own kernels again
    with quark_torch.amd_quark.installed(): ...  # for a while

The kernels are registered with torch's dispatcher for CPU and, in builds for GPUs, CUDA (or HIP) tensors, in front of
AMD Quark's, which stay: they take what the core has no way for, and calls that torch differentiates.
``docs/guides/amd_quark_backend.md`` says what is replaced, and ``docs/errata.md`` what differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module, metadata
from typing import Any

from quark_kernels import requires
from quark_torch import kernel
from quark_torch.amd_calls import register

__all__ = ["install", "installed", "is_installed", "uninstall"]

NAMESPACES = ("quark", "quark_hw_emulation")
LEARNED = ("lsq_quantize", "tqt_quantize")

Undo = Callable[[], None]


class _State:
    """What is installed: how, and what takes it away again."""

    strict: bool | None = None
    undo: list[Undo] = []  # noqa: RUF012  # one for the process, as the dispatcher is


def is_installed() -> bool:
    """Return whether these kernels are behind AMD Quark's operators."""
    return _State.strict is not None


def install(*, strict: bool = False) -> None:
    """Put these kernels behind AMD Quark's operators. Where they are already, only ``strict`` can change.

    Args:
        strict: keep AMD Quark's bits wherever it has defined ones: data with NaN or infinities, scales that aren't
            normal numbers and whatever depends on a rounded logarithm are left to it, and so are LSQ and TQT.

    Raises:
        ModuleNotFoundError: AMD Quark isn't installed.
        ImportError: it is of a version that isn't known.

    """
    if _State.strict is strict:
        return
    if problem := requires.amd_quark():
        raise problem
    theirs = import_module("quark.torch.kernel")
    uninstall()
    release = requires.amd_quark_release(metadata.version("amd-quark"))
    _State.undo += [register(namespace, strict=strict, release=release) for namespace in NAMESPACES]
    # It compiles this one with Inductor, which would look past the operator.
    replaced = {"scaled_fake_quantize_compiled": getattr(theirs, "scaled_fake_quantize", None)}
    if not strict:
        replaced |= {name: getattr(kernel, name) for name in LEARNED}
    _State.undo += [_replace(theirs, name, value) for name, value in replaced.items() if hasattr(theirs, name)]
    _State.strict = strict


def uninstall() -> None:
    """Give AMD Quark its own kernels back. Does nothing where they are in place."""
    while _State.undo:
        _State.undo.pop()()
    _State.strict = None


@contextmanager
def installed(*, strict: bool = False) -> Iterator[None]:
    """Install for a while; what was installed before is so again afterwards."""
    before = _State.strict
    install(strict=strict)
    try:
        yield
    finally:
        if before is None:
            uninstall()
        else:
            install(strict=before)


def _replace(module: Any, name: str, value: Any) -> Undo:
    before = getattr(module, name)
    setattr(module, name, value)
    return lambda: setattr(module, name, before)


install()
