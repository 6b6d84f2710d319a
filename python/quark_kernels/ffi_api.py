"""The XLA FFI API of the JAX that is installed, found without importing JAX."""

from __future__ import annotations

from importlib.util import find_spec

from quark_kernels import _core
from quark_kernels.requires import OLDEST_JAX


def runtime_api() -> tuple[int, int] | None:
    """Return the (major, minor) FFI API of the installed jaxlib; None where there is no jaxlib, or no header in it."""
    import re  # here and not above: `import quark_kernels` is to stay quick
    from pathlib import Path

    found = find_spec("jaxlib")
    if found is None or found.origin is None:
        return None
    header = Path(found.origin).parent / "include/xla/ffi/api/c_api.h"
    if not header.is_file():
        return None
    versions = re.findall(r"#define XLA_FFI_API_(?:MAJOR|MINOR) (\d+)", header.read_text(encoding="utf-8"))
    return (int(versions[0]), int(versions[1])) if len(versions) == 2 else None


def mismatch() -> str | None:
    """Return why the handlers can't be registered with the installed jaxlib, or None where they can."""
    runtime, built = runtime_api(), _core.xla_ffi_api()
    need = f"install jaxlib >= {OLDEST_JAX}"
    if runtime is None:
        return f"no XLA FFI headers found in the installed jaxlib, so its FFI API is unknown; {need}"
    if runtime[0] != built[0] or runtime[1] < built[1]:
        return (
            f"the installed jaxlib has XLA FFI API {runtime[0]}.{runtime[1]}; this build of quark-kernels was compiled "
            f"for {built[0]}.{built[1]} and runs with {built[0]}.{built[1]} or a newer {built[0]}.x; {need}"
        )
    return None
