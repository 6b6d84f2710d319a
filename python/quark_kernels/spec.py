"""What a quantization is: a number format, who shares a scale, and how to round."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from quark_kernels.formats import FORMATS, ROUNDINGS, ElementFormat


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""


@dataclass(frozen=True)
class PerChannel:
    """One scale for each index of ``axis``."""

    axis: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "axis", as_int("axis", self.axis))


@dataclass(frozen=True)
class PerGroup:
    """One scale for each ``size`` neighbours along ``axis``; the last group of a row may be shorter."""

    size: int
    axis: int = -1

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", as_int("size", self.size, 1))
        object.__setattr__(self, "axis", as_int("axis", self.axis))


@dataclass(frozen=True)
class PerBlock:
    """One scale for each tile of ``size = (rows, columns)`` of the last two axes."""

    size: tuple[int, int]

    def __post_init__(self) -> None:
        if not isinstance(self.size, tuple) or len(self.size) != 2:
            raise ValueError(f"PerBlock: size is {self.size!r}; allowed: a tuple (rows, columns)")
        object.__setattr__(self, "size", tuple(as_int("size", length, 1) for length in self.size))


@dataclass(frozen=True)
class PerToken:
    """One scale for each row of the last axis."""


Granularity = PerTensor | PerChannel | PerGroup | PerBlock | PerToken

SCALE_RULES: dict[str, tuple[str, ...]] = {
    "float32": ("absmax",),
    "e8m0": ("floor", "ceil", "even", "rceil"),
    "e4m3": ("absmax",),
    "exponent": ("floor",),
    "microexponents": ("floor",),
}
"""How a dynamic scale of each format may follow from its group; the first rule is the default."""
SCALE_FORMATS = tuple(SCALE_RULES)


def as_int(name: str, value: Any, least: int | None = None) -> int:
    """Return an integer (NumPy's too) as an int. Raises unless it is one, of at least ``least``."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; allowed: an integer") from None
    if isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; allowed: an integer")
    if least is not None and number < least:
        raise ValueError(f"{name} is {value}; allowed: {least} or more")
    return number


def one_of(name: str, value: object, allowed: Any) -> None:
    """Raise ValueError unless ``value`` is one of the ``allowed``."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")


@dataclass(frozen=True)
class QuantSpec:
    """A quantization, as one hashable value.

    ``str(spec)`` is short and canonical, and ``QuantSpec.parse`` reads it back; ``to_json`` and ``from_json`` do the
    same with plain dictionaries.

    Args:
        format: name of the number format, a key of ``quark_kernels.FORMATS``.
        granularity: who shares a scale.
        scale_format: how scales are stored. ``"float32"``; ``"e8m0"``: powers of two (OCP MX 1.0, 5.3.1); ``"e4m3"``:
            fp8 numbers, relative to a float32 scale of the whole tensor (NVFP4); ``"exponent"``: the group's exponent
            E, a code is worth 2^(E - bits + 2) (block floating point); ``"microexponents"``: the same, halved for pairs
            of neighbours that both lie below 2^E (MX6 and MX9, arXiv 2302.08007).
        scale_rule: how a dynamic scale follows from its group. ``"absmax"`` for float32 and e4m3: the extreme value
            lands on the end of the range. For e8m0, amax being m * 2^E with 1 <= m < 2, and emax the exponent of the
            format's largest value, the scale is 2^(E - emax): with ``"floor"`` (OCP MX 1.0, 6.3; the default) as it is,
            with ``"ceil"`` once more where m > 1, with ``"even"`` where amax would round up to a next power of two on
            the element's grid, with ``"rceil"`` where amax would saturate. None: the format's default.
        rounding: ``half_even``, ``half_up``, ``half_away``, ``floor``, ``ceil``, ``toward_zero``, or ``stochastic``: up
            with the probability of the distance from the value below, by random numbers that a ``seed`` gives.
        symmetric: False gives dynamic scales of an integer format a zero point. True by default for every format; the
            presets ``uint2`` to ``uint16`` have False.
        quant_min: the least code, where it isn't the format's own; integer formats only.
        quant_max: the greatest code, likewise.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an unknown name, a range outside the format's, or a combination that has no meaning.

    """

    format: str
    granularity: Granularity = PerTensor()
    scale_format: str = field(default="float32", kw_only=True)
    scale_rule: str | None = field(default=None, kw_only=True)
    rounding: str = field(default="half_even", kw_only=True)
    symmetric: bool = field(default=True, kw_only=True)
    quant_min: int | None = field(default=None, kw_only=True)
    quant_max: int | None = field(default=None, kw_only=True)
    text: ClassVar[str]  # of each spec its own: the canonical form, made once

    def __post_init__(self) -> None:
        """Check every field, and what only makes sense together."""
        one_of("format", self.format, FORMATS)
        one_of("scale_format", self.scale_format, SCALE_FORMATS)
        one_of("rounding", self.rounding, ROUNDINGS)
        if self.scale_rule is not None:
            rules = SCALE_RULES[self.scale_format]
            if self.scale_rule not in rules:
                raise ValueError(
                    f"scale_rule is {self.scale_rule!r}; scales of format {self.scale_format} take {', '.join(rules)}"
                )
            if self.scale_rule == rules[0]:
                object.__setattr__(self, "scale_rule", None)  # what None means: one value, one spec
        if not isinstance(self.granularity, Granularity):
            raise TypeError(
                f"granularity is {self.granularity!r}; allowed: PerTensor(), PerChannel(axis), PerGroup(size, axis), "
                "PerBlock((rows, columns)), PerToken()"
            )
        if not isinstance(self.symmetric, bool):
            raise TypeError(f"symmetric is {self.symmetric!r}; allowed: True or False")
        row = self.element
        is_plain = self.rounding == "half_even" and self.scale_format == "float32"
        if row.is_cast and not (is_plain and self.granularity == PerTensor()):
            raise ValueError(
                f"{self.format} is a cast: it has no scales and rounds half_even; use QuantSpec({self.format!r})"
            )
        if not row.is_integer and not self.symmetric:
            raise ValueError(f"symmetric is False; {self.format} has no zero point, only integer formats have one")
        self._check_range(row)
        self._check_scale_format(row)
        object.__setattr__(self, "text", self._text())

    def __getattr__(self, name: str) -> str:
        """Return the text of a spec that was pickled without it."""
        if name != "text":
            raise AttributeError(f"QuantSpec has no attribute {name!r}")
        object.__setattr__(self, "text", self._text())
        return self.text

    def __hash__(self) -> int:
        """Return the hash of the text: equal specs have the same, and Python keeps it."""
        return hash(self.text)

    def _check_scale_format(self, row: ElementFormat) -> None:
        name = self.scale_format
        if name != "float32" and not self.symmetric:
            raise ValueError(f"symmetric is False; scales of format {name} go with symmetric specs only")
        if name in ("exponent", "microexponents") and not (row.is_integer and row.lo < 0 and row.bits >= 3):
            raise ValueError(
                f"scale_format is {name!r}; it goes with signed integers of 3 bits or more, not {row.name}"
            )
        if name == "microexponents" and not (isinstance(self.granularity, PerGroup) and self.granularity.size % 2 == 0):
            raise ValueError(f"granularity is {self.granularity}; microexponents need PerGroup of an even size")

    def _check_range(self, row: ElementFormat) -> None:
        for name, value in (("quant_min", self.quant_min), ("quant_max", self.quant_max)):
            if value is None:
                continue
            object.__setattr__(self, name, as_int(name, value))
            if not row.is_integer:
                raise ValueError(f"{name} is {value}; only integer formats take a range, not {self.format}")
            if not row.lo <= value <= row.hi:
                raise ValueError(f"{name} is {value}; {self.format} has codes from {row.lo:.0f} to {row.hi:.0f}")
        if not row.is_integer:
            return
        lo = row.lo if self.quant_min is None else self.quant_min
        hi = row.hi if self.quant_max is None else self.quant_max
        if lo >= hi:
            raise ValueError(f"quant_min {lo:.0f} isn't below quant_max {hi:.0f}")
        if self.symmetric and hi <= 0:
            raise ValueError(f"quant_max is {hi:.0f}; a symmetric range needs it above 0")

    @property
    def element(self) -> ElementFormat:
        """The format's row."""
        return FORMATS[self.format]

    def __str__(self) -> str:
        """Return the canonical short form, such as ``"int4 group=128,-1 asymmetric"``."""
        return self.text

    def _text(self) -> str:
        words = [self.format]
        match self.granularity:
            case PerChannel(axis):
                words.append(f"channel={axis}")
            case PerGroup(size, axis):
                words.append(f"group={size},{axis}")
            case PerBlock((rows, columns)):
                words.append(f"tile={rows},{columns}")
            case PerToken():
                words.append("token")
        return " ".join([*words, *self.core_words()])

    def core_words(self) -> list[str]:
        """Return what the core's spec says in the same words: all but format and granularity."""
        words = []
        if self.scale_format != "float32":
            words.append(f"scale={self.scale_format}")
        if self.scale_rule is not None:
            words.append(f"rule={self.scale_rule}")
        if self.rounding != "half_even":
            words.append(f"rounding={self.rounding}")
        if not self.symmetric:
            words.append("asymmetric")
        if self.quant_min is not None:
            words.append(f"min={self.quant_min}")
        if self.quant_max is not None:
            words.append(f"max={self.quant_max}")
        return words

    @classmethod
    def parse(cls, text: str) -> QuantSpec:
        """Read what ``str(spec)`` wrote. Raises ValueError for anything else."""
        if not isinstance(text, str):
            raise TypeError(f"text is {text!r}; allowed: a string")
        name, *words = text.split() or [""]
        values: dict[str, Any] = {}
        for word in words:
            key, _, value = word.partition("=")
            known = len(values)
            try:
                match key:
                    case "channel":
                        values["granularity"] = PerChannel(int(value))
                    case "group":
                        size, axis = map(int, value.split(","))
                        values["granularity"] = PerGroup(size, axis)
                    case "tile":
                        rows, columns = map(int, value.split(","))
                        values["granularity"] = PerBlock((rows, columns))
                    case "token" if not value:
                        values["granularity"] = PerToken()
                    case "asymmetric" if not value:
                        values["symmetric"] = False
                    case "scale":
                        values["scale_format"] = value
                    case "rule":
                        values["scale_rule"] = value
                    case "rounding":
                        values["rounding"] = value
                    case "min" | "max":
                        values[f"quant_{key}"] = int(value)
                    case _:
                        raise ValueError
            except ValueError:
                raise ValueError(f"can't read {word!r} in the spec {text!r}") from None
            if len(values) == known:
                raise ValueError(f"{word!r} says again what the spec {text!r} has said before")
        return cls(name, **values)

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary of strings, numbers and booleans that ``from_json`` reads."""
        return {"version": 1, "spec": str(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> QuantSpec:
        """Read what ``to_json`` wrote."""
        if not isinstance(data, dict) or data.get("version") != 1 or not isinstance(data.get("spec"), str):
            raise ValueError(f"not a QuantSpec's JSON: {data!r}")
        return cls.parse(data["spec"])

    def along(self, axis: int | None, group_size: int | None) -> QuantSpec:
        """Return this spec with the ``axis=`` and ``group_size=`` of a call applied to its granularity."""
        if axis is None and group_size is None:
            return self
        if self.element.is_cast:
            raise ValueError(f"axis and group_size: {self.format} is a cast and has no scales")
        match self.granularity:
            case PerTensor() if group_size is None:
                return replace(self, granularity=PerChannel(axis if axis is not None else -1))
            case PerTensor() if group_size is not None:
                return replace(self, granularity=PerGroup(group_size, -1 if axis is None else axis))
            case PerGroup(size, own):
                return replace(
                    self,
                    granularity=PerGroup(size if group_size is None else group_size, own if axis is None else axis),
                )
            case PerChannel() if group_size is None and axis is not None:
                return replace(self, granularity=PerChannel(axis))
        takes = "axis= only" if isinstance(self.granularity, PerChannel) else "neither"
        raise ValueError(f"axis is {axis} and group_size is {group_size}; {self.granularity} takes {takes}")


def _presets() -> dict[str, QuantSpec]:
    names = "int2 int3 int4 int8 int16 uint2 uint4 uint8 uint16 fp8_e4m3 fp8_e5m2 fp8_e4m3fnuz fp8_e5m2fnuz"
    names += " fp6_e3m2 fp6_e2m3 fp4 bf16 fp16"
    presets = {name: QuantSpec(name, symmetric=not name.startswith("uint")) for name in names.split()}
    for element in ("fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp6_e2m3", "fp4"):
        presets[f"mx{element}"] = QuantSpec(element, PerGroup(32), scale_format="e8m0")
    presets["mxint8"] = QuantSpec("int8f6", PerGroup(32), scale_format="e8m0")
    presets["nvfp4"] = QuantSpec("fp4", PerGroup(16), scale_format="e4m3")
    presets["mx6"] = QuantSpec("int5", PerGroup(16), scale_format="microexponents", quant_min=-15)
    presets["mx9"] = QuantSpec("int8", PerGroup(16), scale_format="microexponents", quant_min=-127)
    presets["bfp16"] = QuantSpec("int8", PerGroup(8), scale_format="exponent")
    return presets


PRESETS: dict[str, QuantSpec] = _presets()
"""What the names that ``quantize`` takes stand for."""


def _dtype_formats() -> dict[str, str]:
    formats: dict[str, str] = {}
    for row in FORMATS.values():
        if row.bits >= 8 and row.name in PRESETS:
            formats.setdefault(row.storage, row.name)  # the first row that is stored in a dtype has it
    formats |= {name: name for name in ("int2", "int3", "int4", "uint2", "uint4")}
    formats |= {"float4_e2m1fn": "fp4", "float4_e2m1fn_x2": "fp4"}
    return formats | {"float6_e2m3fn": "fp6_e2m3", "float6_e3m2fn": "fp6_e3m2"}


DTYPE_FORMATS: dict[str, str] = _dtype_formats()
"""The preset that a framework's dtype stands for, by name."""


def as_spec(spec: object, dtype_name: str | None) -> QuantSpec:
    """Return the QuantSpec that ``spec`` names: itself, a preset's name, or a dtype (whose name the frontend found)."""
    if isinstance(spec, QuantSpec):
        return spec
    if isinstance(spec, str):
        one_of("spec", spec, PRESETS)
        return PRESETS[spec]
    if dtype_name is None:
        raise TypeError(f"spec is {spec!r}; allowed: a QuantSpec, a preset's name or a dtype")
    one_of("spec", dtype_name, DTYPE_FORMATS)
    return PRESETS[DTYPE_FORMATS[dtype_name]]
