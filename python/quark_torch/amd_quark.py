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

from quark_torch.amd_backend import install, installed, is_installed, uninstall

__all__ = ["install", "installed", "is_installed", "uninstall"]

install()
