"""What is behind AMD Quark's operators: its own kernels, or these. Importing this changes nothing yet."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module, metadata
from typing import Any

import torch
from torch.library import Library, get_kernel

from quark_kernels import _core, requires
from quark_torch import kernel
from quark_torch.amd_calls import CALLS, Rules

__all__ = ["install", "installed", "is_installed", "uninstall"]

NAMESPACES = ("quark", "quark_hw_emulation")
LEARNED = ("lsq_quantize", "tqt_quantize")
FIRST_TO_FLUSH = (0, 13)


def is_installed() -> bool:
    """Return whether these kernels are behind AMD Quark's operators."""
    return _BACKEND.strict is not None


def install(*, strict: bool = False) -> None:
    """Put these kernels behind AMD Quark's operators, in all threads. Where they are already, change ``strict``.

    Args:
        strict: keep AMD Quark's bits wherever it has defined ones: data with NaN or infinities, scales that aren't
            normal numbers and whatever depends on a rounded logarithm are left to it, and so are LSQ and TQT.

    Raises:
        TypeError: strict is neither True nor False.
        ModuleNotFoundError: AMD Quark isn't installed.
        ImportError: it is of a version that isn't known.

    """
    if not isinstance(strict, bool):
        raise TypeError(f"strict is {strict!r}; allowed: True or False")
    _BACKEND.use(strict)


def uninstall() -> None:
    """Let AMD Quark's own kernels run again. Does nothing where they do."""
    _BACKEND.use(None)


@contextmanager
def installed(*, strict: bool = False) -> Iterator[None]:
    """Install for a while, in all threads; what was installed before is so again afterwards."""
    before = _BACKEND.strict
    install(strict=strict)
    try:
        yield
    finally:
        _BACKEND.use(before)


class Kernels:
    """Kernels in front of AMD Quark's for the operators of a namespace. Without ``rules`` they only call those.

    They are registered once: calls may be under way in other threads, so that taking them away isn't safe.
    """

    def __init__(self, namespace: str) -> None:
        self.rules: Rules | None = None
        operators = getattr(torch.ops, namespace)
        self.default_mode = _default_mode(operators)
        self.library = Library(namespace, "IMPL")
        for name, ours in CALLS.items():
            if not hasattr(operators, name):
                continue  # older versions have fewer
            for device in _devices():
                theirs = get_kernel(f"{namespace}::{name}", device)
                self.library.impl(name, self._kernel(ours, theirs), device, with_keyset=True)

    def use(self, strict: bool | None, release: tuple[int, int]) -> None:
        """Compute by the rules of a release of AMD Quark, or (None) leave everything to it."""
        self.rules = None if strict is None else Rules(strict, self.default_mode, release >= FIRST_TO_FLUSH)

    def _kernel(self, ours: Callable[..., torch.Tensor], theirs: Any) -> Callable[..., torch.Tensor]:
        def run(keys: torch._C.DispatchKeySet, *arguments: Any) -> torch.Tensor:
            rules = self.rules
            if rules is not None and not (
                torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments)
            ):
                try:
                    return ours(rules, *arguments)
                except (TypeError, ValueError):
                    pass  # what isn't for the core, their kernel computes, or refuses in its own words
            return theirs.call_boxed(keys, *arguments)  # type: ignore[no-any-return]

        return run


class Replacement:
    """A function of AMD Quark's module with one of ours in its place, unless someone puts another there."""

    def __init__(self, module: Any, name: str, ours: Any) -> None:
        self.module, self.name = module, name
        self.theirs, self.ours = getattr(module, name), ours

    def use(self, ours: bool) -> None:
        """Put ours there, or theirs."""
        if getattr(self.module, self.name) in (self.theirs, self.ours):
            setattr(self.module, self.name, self.ours if ours else self.theirs)


class _Backend:
    """One for the process, as the dispatcher is."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.strict: bool | None = None
        self.release = (0, 0)  # of AMD Quark, once it has been found
        self.kernels: list[Kernels] = []
        self.compiled: list[Replacement] = []
        self.learned: list[Replacement] = []

    def use(self, strict: bool | None) -> None:
        """Use these kernels, strictly or not, or (None) AMD Quark's."""
        with self.lock:
            if strict is not None and not self.kernels:
                self._find()
            for kernels in self.kernels:
                kernels.use(strict, self.release)
            for replacement in self.compiled:
                replacement.use(strict is not None)
            for replacement in self.learned:
                replacement.use(strict is False)
            self.strict = strict

    def _find(self) -> None:
        if problem := requires.amd_quark():
            raise problem
        self.release = requires.amd_quark_release(metadata.version("amd-quark"))
        theirs = import_module("quark.torch.kernel")
        # AMD Quark compiles this one with Inductor, which would look past the operator.
        compiled = {"scaled_fake_quantize_compiled": getattr(theirs, "scaled_fake_quantize", None)}
        learned = {name: getattr(kernel, name) for name in LEARNED}
        self.compiled, self.learned = (
            [Replacement(theirs, name, ours) for name, ours in group.items() if hasattr(theirs, name)]
            for group in (compiled, learned)
        )
        self.kernels = [Kernels(namespace) for namespace in NAMESPACES]


_BACKEND = _Backend()


def _devices() -> list[str]:
    """The devices that this build has kernels for. ROCm's are CUDA's to torch."""
    return ["CPU", *(["CUDA"] if _core.xla_handlers("ROCM" if torch.version.hip else "CUDA") else [])]


def _default_mode(operators: Any) -> str:
    """How scales are chosen where a call doesn't say: "floor" while there was no such argument."""
    operator = getattr(operators, "non_scaled_fake_quantize", None)
    names = [argument.name for argument in operator.default._schema.arguments] if operator else []
    return "even" if "scale_calculation_mode" in names else "floor"
