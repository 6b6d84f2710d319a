"""Whether a package of this distribution can be imported here; where it can't, a line that says why and what to do.

Each function returns the ImportError to raise, or None where nothing is missing.
"""

from __future__ import annotations

import re
from importlib import import_module, metadata
from importlib.util import find_spec

OLDEST_TORCH = "2.10"
OLDEST_JAX = "0.8.0"
AMD_QUARK = ((0, 8), (0, 13))
"""The oldest and the newest release of AMD Quark that ``quark_torch.amd_quark`` knows."""


def core() -> ImportError | None:
    """Look at the compiled core, and whether this interpreter may have it."""
    if _is_subinterpreter():
        return ImportError(
            "quark_kernels can't be used in a subinterpreter: its compiled core has one state for the whole process; "
            "import it in the main interpreter"
        )
    again = "install it for this Python from a checkout: pip install --force-reinstall --no-deps ."
    found = find_spec("quark_kernels._core")
    if found is None or found.origin is None:
        folder = __file__.rpartition("/")[0]
        return ImportError(f"quark_kernels can't be used: no compiled core for this Python in {folder}; {again}")
    if _is_cut(found.origin):
        return ImportError(f"quark_kernels can't be used: its compiled core {found.origin} is cut short; {again}")
    try:
        import_module("quark_kernels._core")
    except ImportError as error:
        return ImportError(f"quark_kernels can't be used: its compiled core can't be loaded ({error}); {again}")
    return None


def _is_cut(path: str) -> bool:
    """Whether a library ends before its section headers, its last part. Loading it would kill the process."""
    with open(path, "rb") as file:
        head = file.read(64)
        size = file.seek(0, 2)
    if len(head) < 64 or not head.startswith(b"\x7fELF"):
        return False  # the loader says what it is
    start, each, count = (int.from_bytes(head[a:b], "little") for a, b in ((40, 48), (58, 60), (60, 62)))
    return start + each * count > size


def _is_subinterpreter() -> bool:
    for name in ("_interpreters", "_xxsubinterpreters"):  # since Python 3.13, and before
        if find_spec(name):
            interpreters = import_module(name)
            return bool(interpreters.get_current() != interpreters.get_main())
    return False


def torch() -> ImportError | None:
    """Look at torch. Newer ones than were tested are taken as they are."""
    if find_spec("torch") is None:
        line = f"quark_torch needs torch >= {OLDEST_TORCH}, which isn't installed: pip install 'torch>={OLDEST_TORCH}'"
        return ModuleNotFoundError(line, name="torch")
    import torch

    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return ImportError(
            f"quark_torch can't be used: torch {torch.__version__} is installed; it needs torch >= {OLDEST_TORCH}"
        )
    return None


def jax() -> ImportError | None:
    """Look at JAX. What jaxlib can run, ``ffi_api`` asks its headers."""
    for name in ("jax", "jaxlib"):
        if find_spec(name) is None:
            line = f"quark_jax needs {name} >= {OLDEST_JAX}, which isn't installed: pip install 'jax>={OLDEST_JAX}'"
            return ModuleNotFoundError(line, name=name)
    import jax

    if jax.__version_info__ < tuple(map(int, OLDEST_JAX.split("."))):
        return ImportError(
            f"quark_jax can't be used: jax {jax.__version__} is installed; it needs jax and jaxlib >= {OLDEST_JAX}"
        )
    return None


def amd_quark() -> ImportError | None:
    """Look at AMD Quark. A newer one may compute something else, so it isn't taken as it is."""
    low, high = (".".join(map(str, end)) for end in AMD_QUARK)
    try:
        version = metadata.version("amd-quark")
    except metadata.PackageNotFoundError:
        line = f"quark_torch.amd_quark needs amd-quark {low} to {high}, which isn't installed: "
        line += f"pip install 'amd-quark=={high}.*'"
        return ModuleNotFoundError(line, name="amd-quark")
    if not AMD_QUARK[0] <= amd_quark_release(version) <= AMD_QUARK[1]:
        return ImportError(
            f"quark_torch.amd_quark can't be used: amd-quark {version} is installed; it knows {low} to {high}"
        )
    return None


def amd_quark_release(version: str) -> tuple[int, int]:
    """Return the first two numbers of a version; (0, 0) where there are none."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)
