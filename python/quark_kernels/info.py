"""What this machine, this build and this environment can do."""

from __future__ import annotations

from typing import Any

from quark_kernels import _core, ffi_api


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_level() -> str:
    try:
        return _core.cpu_level()
    except ValueError as error:
        return f"none: {error}"


def _missing_gpu(name: str, state: str) -> str | None:
    """Return why a GPU platform can't be used here, or None where it can."""
    if state.startswith("none"):
        return state
    try:
        _core.check_gpu(name)
    except RuntimeError as error:
        return str(error)
    return None


def info() -> dict[str, Any]:
    """Return versions, CPU levels, GPU builds and, for each backend that is unavailable, the reason.

    Imports neither torch nor JAX. Keys: ``version``; ``cpu_level`` (in use) and ``cpu_levels`` (compiled, and whether
    this machine has them); ``cuda`` and ``hip`` (what was compiled, or why nothing); ``torch``, ``jax``, ``jaxlib``
    (versions found, or None); ``xla_ffi_api`` (of the build and of the runtime); ``unavailable`` (backend: reason).
    """
    packages = {name: _version(name) for name in ("torch", "jax", "jaxlib")}
    gpu = dict(_core.gpu_builds())
    unavailable = {name: reason for name, state in gpu.items() if (reason := _missing_gpu(name, state))}
    if packages["torch"] is None:
        unavailable["torch"] = "torch isn't installed"
    if packages["jax"] is None or packages["jaxlib"] is None:
        unavailable["jax"] = "jax and jaxlib aren't both installed"
    elif reason := ffi_api.mismatch():
        unavailable["jax"] = reason
    runtime = ffi_api.runtime_api()
    return {
        "version": _core.VERSION,
        "cpu_level": _cpu_level(),
        "cpu_levels": {name: "supported" if works else "not on this machine" for name, works in _core.cpu_levels()},
        "cuda": gpu["CUDA"],
        "hip": gpu["HIP"],
        **packages,
        "xla_ffi_api": {
            "build": ".".join(map(str, _core.xla_ffi_api())),
            "runtime": ".".join(map(str, runtime)) if runtime else None,
        },
        "unavailable": unavailable,
    }
