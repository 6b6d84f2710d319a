"""Modules for training with rounded numbers and serving them, in torch; ``quark_jax.nnx`` has the same for Flax.

Both compute the same: after the same batches their states and outputs have the same bits.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from quark_kernels import documented, schema
from quark_kernels.formats import FIXED_ROUNDINGS
from quark_kernels.schema import Shape
from quark_kernels.spec import PerChannel, PerGroup, QuantSpec, as_int, one_of
from quark_kernels.training import (
    INITS,
    TINY,
    as_weight,
    channels_shape,
    check_features,
    check_observable,
    code_range,
    integers,
    learned_spec,
    mean_start,
    state_shape,
)
from quark_torch.functions import (
    SpecLike,
    check_data,
    check_tensor,
    choose_qparams,
    dequantize,
    fake_quantize,
    lsq_quantize,
    quantize,
    resolve_spec,
    tqt_quantize,
)
from quark_torch.ops import call, dtype_name
from quark_torch.qtensor import QTensor

__all__ = [
    "FakeQuantize",
    "LSQFakeQuantize",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "QuantizedLinear",
    "TQTFakeQuantize",
]

Function = TypeVar("Function", bound=Callable[..., Any])
LARGEST = float(torch.finfo(torch.float32).max)
LONGEST = 4096  # bytes of a spec's text


# ---- state -----------------------------------------------------------------------------------------------------------


def _uncompiled(function: Function) -> Function:
    """``torch.compiler.disable``, with the function's own type."""
    return cast(Function, torch.compiler.disable(function))


@_uncompiled
def _reshape(buffer: Tensor, shape: torch.Size) -> None:
    """Give a buffer another shape. It stays the tensor that DistributedDataParallel, say, took hold of."""
    new = torch.empty(shape, dtype=buffer.dtype, device=buffer.device)
    buffer.set_(new.untyped_storage(), 0, new.shape, new.stride())


class _Stateful(nn.Module):
    """A module whose buffers keep their dtypes in ``.half()``, and are loaded from no others."""

    _lazy: tuple[str, ...] = ()
    """The buffers that are 0-d until a batch gives them a shape."""

    def _store(self, name: str, value: Tensor) -> None:
        buffer: Tensor = getattr(self, name)
        if buffer.shape != value.shape:
            _reshape(buffer, value.shape)
        buffer.copy_(value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        _, _, missing, _, errors = rest
        parts = {name: state_dict.get(prefix + name) for name, buffer in self._buffers.items() if buffer is not None}
        loaded = {name: part for name, part in parts.items() if isinstance(part, Tensor)}
        refused = {prefix + name: why for name, why in self._refusals(loaded).items()}
        errors += [f"{key} {why}" for key, why in refused.items()]
        for name, part in loaded.items():
            if prefix + name not in refused and self._takes_shape(name, part):
                _reshape(getattr(self, name), part.shape)
        if refused:
            state_dict = {key: part for key, part in state_dict.items() if key not in refused}
        super()._load_from_state_dict(state_dict, prefix, *rest)
        missing[:] = [key for key in missing if key not in refused]

    def _takes_shape(self, name: str, loaded: Tensor) -> bool:
        return name in self._lazy and 0 in (getattr(self, name).dim(), loaded.dim())

    def _refusals(self, loaded: dict[str, Tensor]) -> dict[str, str]:
        """What is wrong with a ``state_dict``'s tensors for buffers. A cast would change codes and scales unseen."""
        refused: dict[str, str] = {}
        for name, part in loaded.items():
            allowed = getattr(self, name).dtype
            if part.dtype != allowed:
                refused[name] = f"has dtype {dtype_name(part.dtype)}; allowed: {dtype_name(allowed)}"
            elif self._takes_shape(name, part):
                try:
                    check_tensor(name, part)
                except (TypeError, ValueError) as error:
                    refused[name] = str(error).removeprefix(f"{name} ")
                    continue
                # An expanded tensor is a few bytes in a file and any number of them here.
                needs, has = part.numel() * part.element_size(), part.untyped_storage().nbytes()
                if needs > has:
                    refused[name] = (
                        f"has shape {tuple(part.shape)}, {needs} bytes, in a storage of {has}; allowed: tensors that "
                        "have memory for each element"
                    )
        return refused


# ---- observers -------------------------------------------------------------------------------------------------------


def _extremes(x: Tensor, block: Shape, shape: Shape) -> tuple[Tensor, Tensor]:
    """The least and the greatest element of each group, in float32."""
    split: list[int] = []
    for axis, (n, shared) in enumerate(zip(x.shape, block, strict=True)):
        size = min(shared, n) if shared else n
        groups = -(-n // size)
        split += [groups, size]
        if missing := groups * size - n:  # fill up the last group with its own last element
            filling = [-1] * x.dim()
            filling[axis] = missing
            x = torch.cat([x, x.narrow(axis, n - 1, 1).expand(filling)], axis)
    x, within = x.reshape(split), list(range(1, len(split), 2))
    low, high = (extreme(x, within).float().reshape(shape) for extreme in (torch.amin, torch.amax))
    return torch.where(low.abs() < TINY, 0, low), torch.where(high.abs() < TINY, 0, high)


class MinMaxObserver(_Stateful):
    """The least and the greatest number that each group has had in any batch.

    Called with a batch and a spec, an observer takes in the batch and returns the scale and zero point of all that it
    has seen: those that ``choose_qparams`` gives for a tensor with these extremes. Any module that does so can take its
    place in ``FakeQuantize``.

    * A group with NaN or infinity in a batch isn't taken in, though its other groups are. Nor is an empty batch.
    * A group that has had no good batch has the scale NaN.
    * Numbers below 2^-126 count as zero.
    * Groups must stay what they were: per token, say, the number of tokens. Those that change need dynamic scales.
    * The state doesn't follow ``.half()``, and ``load_state_dict`` refuses other dtypes. DistributedDataParallel gives
      all the state of rank 0, as for BatchNorm.

    Attributes:
        min_val: float32, in the scale's shape (0-d before the first batch, and per tensor); inf where there was none.
        max_val: likewise; -inf.

    """

    _lazy = ("min_val", "max_val")
    min_val: Tensor
    max_val: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("min_val", torch.tensor(torch.inf, dtype=torch.float32))
        self.register_buffer("max_val", torch.tensor(-torch.inf, dtype=torch.float32))

    def _refusals(self, loaded: dict[str, Tensor]) -> dict[str, str]:
        refused = super()._refusals(loaded)
        parts: dict[str, Tensor] = {name: getattr(self, name) for name in self._lazy}
        parts |= {name: part for name, part in loaded.items() if name in parts and name not in refused}
        shapes = {name: tuple(part.shape) for name, part in parts.items()}
        if len(set(shapes.values())) > 1:
            for name, other in (("min_val", "max_val"), ("max_val", "min_val")):
                if name in loaded:
                    why = f"has shape {shapes[name]}, {other} {shapes[other]}; allowed: the same shape for both"
                    refused.setdefault(name, why)
        return refused

    @torch.no_grad()
    def forward(self, x: Tensor, spec: SpecLike) -> tuple[Tensor, Tensor | None]:
        """Take in a batch.

        Args:
            x: any shape; float32, float16, bfloat16 or float64.
            spec: whose scales to choose, and for which groups.

        Returns:
            The scale and the zero point (None if symmetric), as ``choose_qparams`` does.

        Raises:
            TypeError: a wrong kind of tensor or dtype.
            ValueError: a spec that takes no given scale, or groups unlike those of the batches before.

        """
        x, whole = check_data("x", x), resolve_spec(spec)
        check_observable(whole)
        block, shape = state_shape(whole, tuple(x.shape))
        seen = tuple(self.min_val.shape)
        if seen not in ((), shape):
            raise ValueError(
                f"x has shape {tuple(x.shape)} and so scales of {shape}; those observed before have {seen}"
            )
        if x.numel():
            low, high = _extremes(x, block, shape)
            is_good = torch.isfinite(low) & torch.isfinite(high)
            for name, new in (("min_val", low), ("max_val", high)):
                old = getattr(self, name)
                self._store(name, torch.where(is_good, self._merge(name, old, new), old))
        return self._qparams(whole)

    def _merge(self, name: str, old: Tensor, new: Tensor) -> Tensor:
        return torch.minimum(old, new) if name == "min_val" else torch.maximum(old, new)

    def _qparams(self, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
        # The core chooses the scales: each pair of extremes is a group of its own.
        pairs = torch.stack([self.min_val.reshape(-1), self.max_val.reshape(-1)], 1)
        scale, zero_point = choose_qparams(pairs, replace(spec, granularity=PerGroup(2)))
        shape = self.min_val.shape
        return scale.reshape(shape), None if zero_point is None else zero_point.reshape(shape)


class MovingAverageMinMaxObserver(MinMaxObserver):
    """The exponential moving averages of each group's extremes: ``e + averaging_constant * (batch's - e)``.

    The first batch gives the first averages. For the rest see ``MinMaxObserver``. What is called momentum elsewhere is
    this, or 1 minus this.

    Args:
        averaging_constant: the weight of a new batch, above 0 up to 1.

    Raises:
        TypeError: not a number.
        ValueError: a number out of range.

    """

    def __init__(self, averaging_constant: float = 0.01) -> None:
        super().__init__()
        self.averaging_constant = as_weight("averaging_constant", averaging_constant)

    def _merge(self, name: str, old: Tensor, new: Tensor) -> Tensor:
        # Clamped, as then no compiler can fuse the product with the sum and give other bits.
        step = (self.averaging_constant * (new - old)).clamp(-LARGEST, LARGEST)
        return torch.where(torch.isinf(old), new, old + step)

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"averaging_constant={self.averaging_constant}"


# ---- fake quantization -----------------------------------------------------------------------------------------------


class FakeQuantize(_Stateful):
    """Round what passes through, as ``fake_quantize``, with dynamic scales or with those that an observer found.

    With an observer each observed batch first gives its new scale, and is then rounded with it. When it is observed:

    | | in training mode | in eval mode |
    | --- | --- | --- |
    | at first | yes | no: the scale is frozen |
    | after ``enable_observer()`` | yes | yes, for calibration |
    | after ``disable_observer()`` | no | no |

    While nothing was observed the scale is NaN, and so is what comes out.

    Args:
        spec: a preset's name, a torch dtype or a QuantSpec.
        observer: ``MinMaxObserver()``, ``MovingAverageMinMaxObserver()`` or another module that returns scale and zero
            point for ``(x, spec)``; None: dynamic scales, and no state.
        axis: as for ``fake_quantize``.
        group_size: as for ``fake_quantize``.
        gradient: ``"clipped"`` or ``"ste"``, as for ``fake_quantize``. Scales are constants to it.

    Attributes:
        spec: the QuantSpec, with ``axis`` and ``group_size`` applied.
        scale: the observed scale, a buffer: 0-d before the first batch, and per tensor. None without an observer.
        zero_point: likewise, int32; None for symmetric specs too.
        observer_enabled: None (in training mode), True or False.
        fake_quant_enabled: whether to round; else x is passed on.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a wrong name, axis or size, or an observer for a spec that takes no given scale.

    """

    _lazy = ("scale", "zero_point")
    scale: Tensor | None
    zero_point: Tensor | None

    def __init__(
        self,
        spec: SpecLike,
        observer: nn.Module | None = None,
        *,
        axis: int | None = None,
        group_size: int | None = None,
        gradient: str = "clipped",
    ) -> None:
        super().__init__()
        one_of("gradient", gradient, schema.GRADIENTS)
        self.spec, self.gradient = resolve_spec(spec).along(axis, group_size), gradient
        self.observer_enabled: bool | None = None
        self.fake_quant_enabled = True
        scale = zero_point = None
        if observer is not None:
            if not isinstance(observer, nn.Module):
                raise TypeError(f"observer is {observer!r}; allowed: None, or a module such as MinMaxObserver()")
            check_observable(self.spec)
            scale, zero_point = MinMaxObserver()._qparams(self.spec)  # of nothing: NaN, in the spec's dtype
        self.observer = observer
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    def enable_observer(self, enabled: bool = True) -> None:
        """Observe in eval mode too; with False: in neither."""
        self.observer_enabled = enabled

    def disable_observer(self) -> None:
        """Keep the scale as it is, in training mode too."""
        self.enable_observer(False)

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Round; with False: don't."""
        self.fake_quant_enabled = enabled

    def disable_fake_quant(self) -> None:
        """Pass x on as it is. It is still observed."""
        self.enable_fake_quant(False)

    def forward(self, x: Tensor, seed: Any = None) -> Tensor:
        """Return ``x`` rounded.

        Args:
            x: any shape; float32, float16, bfloat16 or float64.
            seed: for stochastic rounding, as for ``fake_quantize``.

        Returns:
            A tensor of x's shape and dtype.

        Raises:
            TypeError: a wrong kind of tensor or dtype, also where nothing is rounded.
            ValueError: what ``fake_quantize`` refuses.

        """
        scale, zero_point = self._qparams(check_data("x", x))
        if not self.fake_quant_enabled:
            return x
        return fake_quantize(x, self.spec, scale=scale, zero_point=zero_point, gradient=self.gradient, seed=seed)

    def _qparams(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The scale and zero point to round x with, after it was observed."""
        if self.observer is None or self.scale is None:
            return None, None
        if self.training if self.observer_enabled is None else self.observer_enabled:
            scale, zero_point = self.observer(x.detach(), self.spec)
            self._store("scale", scale)
            if zero_point is not None:
                self._store("zero_point", zero_point)
        # Copies: backward keeps them, and the next batch may come first.
        return self._spread(x, self.scale), None if self.zero_point is None else self._spread(x, self.zero_point)

    def _spread(self, x: Tensor, value: Tensor) -> Tensor:
        shape = state_shape(self.spec, tuple(x.shape))[1]
        return value.clone() if value.dim() else value.expand(shape).clone()

    def extra_repr(self) -> str:
        """Return the spec, and what isn't as at first."""
        words = [str(self.spec), f"gradient={self.gradient}"]
        if self.observer_enabled is not None:
            words.append(f"observer_enabled={self.observer_enabled}")
        if not self.fake_quant_enabled:
            words.append("fake_quant_enabled=False")
        return ", ".join(words)


# ---- learned scales --------------------------------------------------------------------------------------------------


def _given_start(name: str, value: object) -> Tensor | None:
    """A given first value in float32."""
    if value is None:
        return None
    try:
        start = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        start = None
    if start is None or start.dtype == torch.bool or start.is_complex():
        raise TypeError(f"{name} is {value!r}; allowed: None, numbers, or a tensor of them")
    return start.to(torch.float32, copy=True)


def _mean_scale(x: Tensor, spec: QuantSpec, shape: Shape) -> Tensor:
    """LSQ's first scales, ``2 * mean|x| / sqrt(quant_max)``; NaN or infinity where a batch gives none."""
    total_spec, factor = mean_start(spec, shape, tuple(x.shape))
    ones = torch.ones_like(x, dtype=torch.int8)
    total = call("dequantize_backward", [x.abs(), ones, None], total_spec).reshape(shape)
    value = total * factor
    return torch.where((total >= TINY) & (value >= TINY), value, torch.nan)


class _Learned(_Stateful):
    """A float32 parameter that starts from the first good batch, entry by entry."""

    initialized: Tensor

    def __init__(self, spec: QuantSpec, name: str, start: Tensor | None, default: float, shape: Shape) -> None:
        super().__init__()
        self.spec, self._name = spec, name
        value = torch.full(shape, default, dtype=torch.float32) if start is None else start
        self.register_parameter(name, nn.Parameter(value))
        self.register_buffer("initialized", torch.full(shape, start is not None))
        self._is_ready = False  # as initialized.all(), without waiting for the device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before: Tensor = getattr(self, self._name).data
        super()._apply(fn, recurse)
        parameter: Tensor = getattr(self, self._name)
        if parameter.dtype != before.dtype:
            parameter.data = before.to(parameter.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._is_ready = False

    def _started(self, x: Tensor) -> Tensor:
        """The parameter. Where it has no value yet it takes that of this batch; in eval mode for this call only."""
        parameter: Tensor = getattr(self, self._name)
        return parameter if self._is_ready or x.numel() == 0 else self._start(parameter, x)

    @_uncompiled
    def _start(self, parameter: Tensor, x: Tensor) -> Tensor:
        if bool(self.initialized.all()):
            self._is_ready = True
            return parameter
        with torch.no_grad():
            value = self._first(x)
            takes = torch.isfinite(value) & ~self.initialized
            if self.training and bool(takes.any()):
                parameter.copy_(torch.where(takes, value, parameter))
                self.initialized |= takes
                self._is_ready = bool(self.initialized.all())
        # A copy: backward keeps it, and the next batch may start more entries.
        return parameter.clone() if self.training else torch.where(takes, value, parameter)

    def _first(self, x: Tensor) -> Tensor:
        """The values that a batch gives; NaN where it gives none."""
        raise NotImplementedError


class LSQFakeQuantize(_Learned):
    """Round what passes through with a scale that learns, as ``lsq_quantize`` (LSQ, arXiv 1902.08153).

    The scale starts as ``2 * mean|x| / sqrt(quant_max)`` of the first batch in training mode (section 2.1 of the
    paper), per channel of each channel's elements: the sum in the core's fixed order, the rest in float32.

    * A batch, or a channel of it, whose sum of |x| or scale is zero, below 2^-126, NaN or infinite doesn't start its
      scale, nor does an empty one. The scale stays 1 and the next batch is tried.
    * In eval mode nothing is kept: a scale that hasn't started is then that of the batch itself.
    * Training may take a scale to zero, where all numbers become 0, or below, where the range is mirrored: with
      ``signed=False`` only numbers below 0 are then left. Nothing here prevents it. A low rate does, or a clamp after
      the optimizer's step.
    * Parameters of different ranks differ unless they start alike: run a batch before DistributedDataParallel wraps
      the module.
    * ``.half()`` leaves the scale in float32. ``load_state_dict`` casts the scale, but refuses another dtype of
      ``initialized``.

    Args:
        spec: a width, 2 to 16 bits; or the name, dtype or QuantSpec of integers, per tensor or per channel. They are
            used without a zero point.
        signed: whether integers of a width have a sign; None: they do.
        axis: the channels' axis; None: one scale for the whole tensor.
        channels: how many channels there are; needed per channel where ``scale`` is None.
        scale: the scale to start with, instead of the first batch's: one element; per channel 1-D.
        grad_factor: as for ``lsq_quantize``; None: ``1 / sqrt(n * quant_max)``, n elements a scale.

    Attributes:
        spec: the QuantSpec; ``quantize(x, module.spec, scale=module.scale)`` gives the codes.
        scale: the parameter, float32: 0-d, per channel 1-D.
        initialized: a buffer of the same shape: whether the scale has started.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a wrong width, name, axis or shape.

    """

    scale: Tensor

    def __init__(
        self,
        spec: SpecLike | int,
        *,
        signed: bool | None = None,
        axis: int | None = None,
        channels: int | None = None,
        scale: Tensor | float | None = None,
        grad_factor: float | None = None,
    ) -> None:
        whole = learned_spec(spec if isinstance(spec, numbers.Integral) else resolve_spec(spec), signed, axis)
        start = _given_start("scale", scale)
        shape = channels_shape(whole, channels, None if start is None else tuple(start.shape))
        if start is not None and not bool((start > 0).all()):
            raise ValueError(f"scale is {scale}; allowed: above 0")
        super().__init__(whole, "scale", None if start is None else start.reshape(shape), 1.0, shape)
        self.quant_min, self.quant_max = code_range(whole)
        self.axis = whole.granularity.axis if isinstance(whole.granularity, PerChannel) else None
        self.grad_factor = grad_factor

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` rounded: any shape; float32, float16, bfloat16 or float64."""
        return lsq_quantize(
            x,
            self._started(check_data("x", x)),
            quant_min=self.quant_min,
            quant_max=self.quant_max,
            axis=self.axis,
            grad_factor=self.grad_factor,
            rounding=self.spec.rounding,
        )

    def _first(self, x: Tensor) -> Tensor:
        return _mean_scale(x, self.spec, tuple(self.scale.shape))

    def extra_repr(self) -> str:
        """Return the arguments."""
        words = [str(self.spec)]
        if self.axis is not None:
            words.append(f"channels={self.scale.numel()}")
        if self.grad_factor is not None:
            words.append(f"grad_factor={self.grad_factor}")
        return ", ".join(words)


class TQTFakeQuantize(_Learned):
    """Round what passes through with a power of two that learns, as ``tqt_quantize`` (TQT, arXiv 1903.08066).

    The threshold starts from the first batch in training mode, rounded up to a power of two as the scale is:

    * ``init="mean"``: from the threshold that ``LSQFakeQuantize``'s first scale has, ``2 * mean|x| / sqrt(quant_max)``
      times ``2^(bits - 1)``. The sum is in the core's fixed order, the rest in float32. A few large numbers saturate.
    * ``init="max"``: from max|x|, the paper's MAX. At first nothing saturates by more than the last step; with few bits
      most numbers may then round to 0.

    Every logarithm in (E - 1, E] has the threshold 2^E; of these it starts with ``E - 0.5``, the farthest from other
    scales. E is exact.

    A batch that wouldn't start LSQ's scale doesn't start it (with "max" one whose maximum is zero, below 2^-126, NaN or
    infinite), nor does an empty one. The logarithm stays 0 and the next batch is tried. For the rest see
    ``LSQFakeQuantize``; a threshold can't be zero or negative.

    Args:
        bits: the width of the signed integers, 2 to 16.
        log_threshold: the threshold's base-2 logarithm to start with, instead of the first batch's: one element.
        init: ``"mean"`` or ``"max"``, what the first batch's threshold follows from.
        rounding: as for ``tqt_quantize``.

    Attributes:
        spec: the QuantSpec; ``quantize(x, module.spec, scale=module.scale)`` gives the codes.
        log_threshold: the parameter, float32, 0-d.
        initialized: a 0-d buffer: whether it has started.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a wrong width, name or shape.

    """

    log_threshold: Tensor

    def __init__(
        self,
        bits: int = 8,
        *,
        log_threshold: Tensor | float | None = None,
        init: str = "mean",
        rounding: str = "half_even",
    ) -> None:
        one_of("init", init, INITS)
        one_of("rounding", rounding, FIXED_ROUNDINGS)
        self.bits = as_int("bits", bits)
        spec = learned_spec(replace(integers(self.bits, True), rounding=rounding), None, None)
        start = _given_start("log_threshold", log_threshold)
        if start is not None:
            documented.expect_single("log_threshold", tuple(start.shape))
            start = start.reshape(())
        super().__init__(spec, "log_threshold", start, 0.0, ())
        self.init = init

    @property
    def scale(self) -> Tensor:
        """The scale that the threshold stands for: a power of two, float32, 0-d; without a gradient."""
        # What saturates at the lower end is the threshold itself.
        lowest = torch.full((), -torch.inf, device=self.log_threshold.device)
        threshold = -tqt_quantize(lowest, self.log_threshold.detach(), bits=self.bits)
        return threshold.div(2 ** (self.bits - 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` rounded: any shape; float32, float16, bfloat16 or float64."""
        return tqt_quantize(x, self._started(check_data("x", x)), bits=self.bits, rounding=self.spec.rounding)

    def _first(self, x: Tensor) -> Tensor:
        if self.init == "mean":
            start, shift = _mean_scale(x, self.spec, ()), self.bits - 1
        else:
            start, shift = x.abs().amax().float(), 0
        mantissa, exponent = torch.frexp(start)  # the threshold, start * 2^shift, might overflow
        value = exponent + shift - torch.where(mantissa == 0.5, 1.5, 0.5)
        return torch.where((start >= TINY) & torch.isfinite(start), value, torch.nan)

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"{self.spec}, init={self.init}"


# ---- serving ---------------------------------------------------------------------------------------------------------


class QuantizedLinear(_Stateful):
    """A linear layer that keeps its weight quantized and dequantizes it in each call, to x's dtype.

    ``x @ weight.T + bias``, the bias cast to x's dtype. The parts of the weight are buffers under the names they have
    in a QTensor; they and the spec are in the ``state_dict``, which loads with these very dtypes only. ``.half()``
    changes the bias only.

    Args:
        in_features: the length of x's last axis.
        out_features: that of the result's.
        spec: what ``quantize`` takes for the weight of shape ``[out_features, in_features]``.
        bias: whether there is a bias.
        axis: as for ``quantize``.
        group_size: as for ``quantize``.
        packed: as for ``quantize``.
        device: where it is; None: the default device.
        dtype: of the bias, and of what ``weight.dequantize()`` returns; None: the default dtype.

    Attributes:
        weight: the QTensor; zeros in a new module.
        bias: a parameter, or None.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a wrong name, size or combination; a ``state_dict`` of another spec.

    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: SpecLike,
        *,
        bias: bool = True,
        axis: int | None = None,
        group_size: int | None = None,
        packed: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = (as_int("out_features", out_features, 0), as_int("in_features", in_features, 0))
        seed = 0 if resolve_spec(spec).rounding == "stochastic" else None  # which zeros need too
        zeros = torch.zeros(shape, device=device, dtype=dtype)
        self._keep(quantize(zeros, spec, axis=axis, group_size=group_size, packed=packed, seed=seed))
        self.bias = nn.Parameter(torch.zeros(shape[0], device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        spec: SpecLike,
        *,
        axis: int | None = None,
        group_size: int | None = None,
        packed: bool | None = None,
        seed: Any = None,
    ) -> Self:
        """Return the layer with the weight of a ``torch.nn.Linear``, quantized, and a copy of its bias.

        Args:
            linear: the layer to quantize.
            spec: as for ``quantize``.
            axis: as for ``quantize``.
            group_size: as for ``quantize``.
            packed: as for ``quantize``.
            seed: as for ``quantize``.

        Returns:
            A new layer on the same device.

        Raises:
            TypeError: not a ``torch.nn.Linear``.
            ValueError: what ``quantize`` refuses.

        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear is a {type(linear).__module__}.{type(linear).__name__}; allowed: torch.nn.Linear")
        weight = linear.weight.detach()
        q = quantize(weight, spec, axis=axis, group_size=group_size, packed=packed, seed=seed)
        layer = cls(
            linear.in_features,
            linear.out_features,
            q.spec,
            bias=linear.bias is not None,
            packed=q.packed,
            device=weight.device,
            dtype=weight.dtype,
        )
        layer._keep(q)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone())
        return layer

    def _keep(self, weight: QTensor) -> None:
        for name in QTensor.ARRAYS:
            self.register_buffer(name, getattr(weight, name))
        self._static: tuple[Any, ...] = (weight.spec, weight.shape, weight.dtype, weight.packed)

    @property
    def weight(self) -> QTensor:
        """The quantized weight, of shape ``[out_features, in_features]``."""
        arrays: Any = [getattr(self, name) for name in QTensor.ARRAYS]
        return QTensor(*arrays, *self._static)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T + bias``, with the weight dequantized and the bias cast to x's dtype.

        Args:
            x: ``[..., in_features]``; float32, float16, bfloat16 or float64.

        Returns:
            ``[..., out_features]``, of x's dtype.

        Raises:
            TypeError: a wrong kind of tensor or dtype.
            ValueError: another length of x's last axis.

        """
        check_features(tuple(check_data("x", x).shape), self._static[1][1])
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(x, dequantize(self.weight, x.dtype), bias)

    def get_extra_state(self) -> Tensor:
        """Return the spec's text as bytes: a tensor, as some file formats take nothing else."""
        return torch.tensor(list(str(self._static[0]).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Check a loaded spec: a 1-D uint8 tensor of at most 4096 elements, the bytes of its text.

        Args:
            state: what ``get_extra_state`` of a layer of the same spec returned.

        Raises:
            TypeError: not a tensor.
            ValueError: a tensor of another dtype, rank or length, or another spec.

        """
        allowed = f"a 1-D uint8 tensor of at most {LONGEST} elements"
        state = check_tensor("state", state, allowed)
        if state.dtype != torch.uint8 or state.dim() != 1 or state.numel() > LONGEST:
            came = f"shape {tuple(state.shape)} and dtype {str(state.dtype).removeprefix('torch.')}"
            raise ValueError(f"state has {came}; allowed: {allowed}")
        spec = bytes(state.tolist()).decode(errors="replace")
        if spec != str(self._static[0]):
            raise ValueError(f"the state is of a layer of {spec}; this one is of {self._static[0]}, allowed: the same")

    def extra_repr(self) -> str:
        """Return sizes and spec."""
        spec, (rows, columns), _, packed = self._static
        words = f"in_features={columns}, out_features={rows}, {spec}{', packed' if packed else ''}"
        return words if self.bias is not None else f"{words}, bias=False"
