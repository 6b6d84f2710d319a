"""The number formats of the core, as data."""

from __future__ import annotations

from typing import NamedTuple

from quark_kernels import _core


class ElementFormat(NamedTuple):
    """A grid of values: one row of the core's format table.

    At magnitude m the grid's spacing is ``2 ** (max(exponent(m), min_exp) - mantissa_bits)``.
    """

    name: str
    """A key of ``FORMATS``."""
    bits: int
    """How wide a code is."""
    exponent_bits: int
    """0 for the integer formats, whose spacing is the same everywhere."""
    mantissa_bits: int
    """How finely the grid divides a power of two."""
    min_exp: int
    """The exponent of the smallest normal value."""
    lo: float
    """The least value."""
    hi: float
    """The greatest."""
    specials: str
    """Which codes are no numbers: ``none``, ``nan`` (the largest magnitude), ``ieee`` (inf and NaN) or ``fnuz``."""
    storage: str
    """The dtype that holds one code when codes aren't packed."""

    @property
    def is_integer(self) -> bool:
        """Whether codes and values are the same numbers."""
        return self.exponent_bits == 0 and self.min_exp == self.mantissa_bits

    @property
    def is_cast(self) -> bool:
        """Whether the format is a framework's own 16-bit float, quantized to by a cast, without a scale."""
        return self.bits == 16 and self.exponent_bits > 0

    @property
    def can_pack(self) -> bool:
        """Whether a code is narrower than its storage."""
        return self.bits < 8


FORMATS: dict[str, ElementFormat] = {row[0]: ElementFormat(*row) for row in _core.formats()}
"""Every number format, by its name."""
ROUNDINGS: tuple[str, ...] = tuple(_core.roundings())
"""The names of the roundings."""
FIXED_ROUNDINGS: tuple[str, ...] = tuple(name for name in ROUNDINGS if name != "stochastic")
"""Those that need no random numbers."""
