"""How many examples hypothesis draws: a short form that is always the same, and a long one that differs every time.

``QUARK_FUZZ_FACTOR=50`` makes the long form: so many times the examples, drawn anew.
"""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, settings

FACTOR = int(os.environ.get("QUARK_FUZZ_FACTOR", "0"))


def examples(count: int, **more: Any) -> settings:
    """Settings for a test that draws so many examples in the short form."""
    return settings(
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=not FACTOR,
        max_examples=count * max(FACTOR, 1),
        **more,
    )
