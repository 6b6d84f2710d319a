"""Tensors between the frameworks, without a copy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax
    import torch

ALIGNMENT = 64
"""Bytes; XLA's CPU backend takes only buffers that start on such a boundary."""
