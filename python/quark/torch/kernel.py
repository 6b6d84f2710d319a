"""The documented import path of ``quark_torch.kernel``, where everything is defined.

``quark`` and ``quark.torch`` are namespace packages here: where AMD's own ``amd-quark`` is installed, its packages win.
"""

from quark_torch.kernel import *  # noqa: F403
from quark_torch.kernel import __all__ as __all__
