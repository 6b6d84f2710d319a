"""Modules for training with rounded numbers and serving them, in Flax NNX; ``quark_torch.nn`` has the same for torch.

Both compute the same: after the same batches their states and outputs have the same bits. Other than in torch,
``use_running_average`` says whether a module is in eval mode; ``model.train()`` and ``model.eval()`` set it.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

try:
    from flax import nnx
except ImportError:
    raise ImportError("quark_jax.nnx needs flax: pip install 'quark-kernels[flax]'") from None

from quark_jax.functions import (
    check_data,
    choose_qparams,
    dequantize,
    fake_quantize,
    lsq_quantize,
    quantize,
    resolve_spec,
    tqt_quantize,
)
from quark_jax.primitives import call
from quark_jax.qtensor import QTensor
from quark_kernels import documented, schema
from quark_kernels.formats import FIXED_ROUNDINGS
from quark_kernels.schema import OpSpec, Shape
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

__all__ = [
    "FakeQuantize",
    "LSQFakeQuantize",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "QuantizedLinear",
    "TQTFakeQuantize",
]

LARGEST = float(np.finfo(np.float32).max)


# ---- observers -------------------------------------------------------------------------------------------------------


def _extremes(x: jax.Array, block: Shape, shape: Shape) -> tuple[jax.Array, jax.Array]:
    """The least and the greatest element of each group, in float32."""
    split: list[int] = []
    filling = []
    for n, shared in zip(x.shape, block, strict=True):
        size = min(shared, n) if shared else n
        groups = -(-n // size)
        split += [groups, size]
        filling.append((0, groups * size - n))
    if any(after for _, after in filling):  # fill up the last group with its own last element
        x = jnp.pad(x, filling, mode="edge")
    x, within = x.reshape(split), tuple(range(1, len(split), 2))
    low, high = (extreme(x, within).astype(np.float32).reshape(shape) for extreme in (jnp.min, jnp.max))
    return jnp.where(abs(low) < TINY, 0, low), jnp.where(abs(high) < TINY, 0, high)


class MinMaxObserver(nnx.Module):
    """The least and the greatest number that each group has had in any batch.

    Called with a batch and a spec, an observer takes in the batch and returns the scale and zero point of all that it
    has seen: those that ``choose_qparams`` gives for a tensor with these extremes. Any module that does so can take its
    place in ``FakeQuantize``.

    * A group with NaN or infinity in a batch isn't taken in, though its other groups are. Nor is an empty batch.
    * A group that has had no good batch has the scale NaN.
    * Numbers below 2^-126 count as zero.
    * Groups must stay what they were: per token, say, the number of tokens. Those that change need dynamic scales.

    Attributes:
        min_val: an nnx.BatchStat of float32, in the scale's shape (0-d before the first batch, and per tensor); inf
            where there was none.
        max_val: likewise; -inf.

    """

    def __init__(self) -> None:
        self.min_val = nnx.BatchStat(jnp.asarray(np.float32(np.inf)))
        self.max_val = nnx.BatchStat(jnp.asarray(np.float32(-np.inf)))

    def __call__(self, x: jax.Array, spec: Any) -> tuple[jax.Array, jax.Array | None]:
        """Take in a batch.

        Args:
            x: any shape; float32, float16, bfloat16 or float64.
            spec: whose scales to choose, and for which groups.

        Returns:
            The scale and the zero point (None if symmetric), as ``choose_qparams`` does.

        Raises:
            TypeError: a wrong kind of array or dtype.
            ValueError: a spec that takes no given scale, or groups unlike those of the batches before.

        """
        x, whole = lax.stop_gradient(check_data("x", x)), resolve_spec(spec)
        check_observable(whole)
        block, shape = state_shape(whole, x.shape)
        seen = self.min_val.get_value().shape
        if seen not in ((), shape):
            raise ValueError(f"x has shape {x.shape} and so scales of {shape}; those observed before have {seen}")
        if x.size:
            low, high = _extremes(x, block, shape)
            is_good = jnp.isfinite(low) & jnp.isfinite(high)
            for name, new in (("min_val", low), ("max_val", high)):
                variable = getattr(self, name)
                old = variable.get_value()
                variable.set_value(jnp.where(is_good, self._merge(name, old, new), old))
        return self._qparams(whole)

    def _merge(self, name: str, old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.minimum(old, new) if name == "min_val" else jnp.maximum(old, new)

    def _qparams(self, spec: QuantSpec) -> tuple[jax.Array, jax.Array | None]:
        # The core chooses the scales: each pair of extremes is a group of its own.
        low, high = self.min_val.get_value(), self.max_val.get_value()
        pairs = jnp.stack([low.reshape(-1), high.reshape(-1)], 1)
        scale, zero_point = choose_qparams(pairs, replace(spec, granularity=PerGroup(2)))
        return scale.reshape(low.shape), None if zero_point is None else zero_point.reshape(low.shape)


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

    def _merge(self, name: str, old: jax.Array, new: jax.Array) -> jax.Array:
        # Clamped, as then no compiler can fuse the product with the sum and give other bits.
        step = jnp.clip(self.averaging_constant * (new - old), -LARGEST, LARGEST)
        return jnp.where(jnp.isinf(old), new, old + step)


# ---- fake quantization -----------------------------------------------------------------------------------------------


class FakeQuantize(nnx.Module):
    """Round what passes through, as ``fake_quantize``, with dynamic scales or with those that an observer found.

    With an observer each observed batch first gives its new scale, and is then rounded with it. When it is observed:

    | | in training mode | in eval mode |
    | --- | --- | --- |
    | at first | yes | no: the scale is frozen |
    | after ``enable_observer()`` | yes | yes, for calibration |
    | after ``disable_observer()`` | no | no |

    While nothing was observed the scale is NaN, and so is what comes out.

    Args:
        spec: a preset's name, a dtype or a QuantSpec.
        observer: ``MinMaxObserver()``, ``MovingAverageMinMaxObserver()`` or another module that returns scale and zero
            point for ``(x, spec)``; None: dynamic scales, and no state.
        axis: as for ``fake_quantize``.
        group_size: as for ``fake_quantize``.
        gradient: ``"clipped"`` or ``"ste"``, as for ``fake_quantize``. Scales are constants to it.

    Attributes:
        spec: the QuantSpec, with ``axis`` and ``group_size`` applied.
        scale: the observed scale, an nnx.BatchStat: 0-d before the first batch, and per tensor. None without an
            observer.
        zero_point: likewise, int32; None for symmetric specs too.
        observer_enabled: None (in training mode), True or False.
        use_running_average: whether the module is in eval mode.
        fake_quant_enabled: whether to round; else x is passed on.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a wrong name, axis or size, or an observer for a spec that takes no given scale.

    """

    def __init__(
        self,
        spec: Any,
        observer: nnx.Module | None = None,
        *,
        axis: int | None = None,
        group_size: int | None = None,
        gradient: str = "clipped",
    ) -> None:
        one_of("gradient", gradient, schema.GRADIENTS)
        self.spec, self.gradient = resolve_spec(spec).along(axis, group_size), gradient
        self.observer_enabled: bool | None = None
        self.fake_quant_enabled = True
        self.use_running_average = False
        scale = zero_point = None
        if observer is not None:
            if not isinstance(observer, nnx.Module):
                raise TypeError(f"observer is {observer!r}; allowed: None, or a module such as MinMaxObserver()")
            check_observable(self.spec)
            scale, zero_point = MinMaxObserver()._qparams(self.spec)  # of nothing: NaN, in the spec's dtype
        self.observer = observer
        self.scale = None if scale is None else nnx.BatchStat(scale)
        self.zero_point = None if zero_point is None else nnx.BatchStat(zero_point)

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

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Class method used by ``nnx.view``.

        Args:
            use_running_average: whether the view is in eval mode; None: as it was.

        """
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def __call__(self, x: jax.Array, seed: Any = None) -> jax.Array:
        """Return ``x`` rounded.

        Args:
            x: any shape; float32, float16, bfloat16 or float64.
            seed: for stochastic rounding, as for ``fake_quantize``.

        Returns:
            An array of x's shape and dtype.

        """
        x = check_data("x", x)
        self._observe(x)
        if not self.fake_quant_enabled:
            return x
        scale, zero_point = (self._spread(x, variable) for variable in (self.scale, self.zero_point))
        return fake_quantize(x, self.spec, scale=scale, zero_point=zero_point, gradient=self.gradient, seed=seed)

    def _observe(self, x: jax.Array) -> None:
        is_observed = not self.use_running_average if self.observer_enabled is None else self.observer_enabled
        if self.observer is None or self.scale is None or not is_observed:
            return
        observe: Callable[..., Any] = self.observer
        scale, zero_point = observe(x, self.spec)
        self.scale.set_value(scale)
        if self.zero_point is not None:
            self.zero_point.set_value(zero_point)

    def _spread(self, x: jax.Array, variable: nnx.BatchStat[jax.Array] | None) -> jax.Array | None:
        if variable is None:
            return None
        value = variable.get_value()
        return value if value.ndim else jnp.broadcast_to(value, state_shape(self.spec, x.shape)[1])


# ---- learned scales --------------------------------------------------------------------------------------------------


@jax.custom_vjp
def _becomes(parameter: jax.Array, value: jax.Array) -> jax.Array:
    """The value, with its gradient going to the parameter: as if that had been set to it before."""
    return value


_becomes.defvjp(lambda parameter, value: (value, None), lambda _, grad: (grad, None))


@partial(jax.jit, static_argnums=(0, 1))
def _start(
    first: Callable[..., jax.Array],
    arguments: tuple[Any, ...],
    x: jax.Array,
    parameter: jax.Array,
    initialized: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The parameter with the values that a batch gives where it has none, and where it has some now."""

    def start() -> tuple[jax.Array, jax.Array]:
        value = first(x, *arguments).reshape(parameter.shape).astype(parameter.dtype)
        takes = jnp.isfinite(value) & ~initialized
        return jnp.where(takes, value, parameter), initialized | takes

    started: tuple[jax.Array, jax.Array] = lax.cond(initialized.all(), lambda: (parameter, initialized), start)
    return started


def _given_start(name: str, value: object) -> jax.Array | None:
    """A given first value in float32."""
    if value is None:
        return None
    wrong = TypeError(f"{name} is {value!r}; allowed: None, numbers, or an array of them")
    if isinstance(value, (bool, complex, str, bytes)) or getattr(getattr(value, "dtype", None), "kind", "f") in "bcSU":
        raise wrong
    try:
        return jnp.array(value, np.float32)
    except (TypeError, ValueError, OverflowError):
        raise wrong from None


class _Learned(nnx.Module):
    """A float32 parameter that starts from the first good batch, entry by entry."""

    def __init__(self, spec: QuantSpec, name: str, start: jax.Array | None, default: float, shape: Shape) -> None:
        self.spec, self._name = spec, name
        setattr(self, name, nnx.Param(jnp.full(shape, default, np.float32) if start is None else start))
        self.initialized = nnx.BatchStat(jnp.full(shape, start is not None))
        self.use_running_average = False

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Class method used by ``nnx.view``.

        Args:
            use_running_average: whether the view is in eval mode; None: as it was.

        """
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def _started(self, x: jax.Array, first: Callable[..., jax.Array], *arguments: Any) -> jax.Array:
        """The parameter. Where it has no value yet it takes that of this batch; in eval mode for this call only."""
        variable = getattr(self, self._name)
        parameter: jax.Array = variable.get_value()
        initialized = self.initialized.get_value()
        is_ready = not isinstance(initialized, Tracer) and bool(initialized.all())
        if is_ready or x.size == 0:
            return parameter
        operands = lax.stop_gradient((x, parameter))
        value, now = _start(first, arguments, *operands, initialized)
        if self.use_running_average:
            return jnp.where(initialized, parameter, value)
        variable.set_value(value)
        self.initialized.set_value(now)
        return _becomes(parameter, value)


def _mean_scale(x: jax.Array, spec: OpSpec, factor: float) -> jax.Array:
    """LSQ's first scales, ``2 * mean|x| / sqrt(quant_max)``; NaN or infinity where a batch gives none."""
    (total,) = call("dequantize_backward", [abs(x), jnp.ones(x.shape, np.int8), None], spec)
    value = total * factor
    return jnp.where((total >= TINY) & (value >= TINY), value, np.nan)


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
    * The start is a change of state. Where only gradients leave a function (``jax.grad`` of a split model) it would be
      lost: call the model on a batch before it is split. ``nnx.jit`` and ``nnx.grad`` keep it.

    Args:
        spec: a width, 2 to 16 bits; or the name, dtype or QuantSpec of integers, per tensor or per channel. They are
            used without a zero point.
        signed: whether integers of a width have a sign; None: they do.
        axis: the channels' axis; None: one scale for the whole tensor.
        channels: how many channels there are; needed per channel where ``scale`` is None.
        scale: the scale to start with, instead of the first batch's: one element; per channel 1-D.
        grad_factor: as for ``lsq_quantize``; None: ``1 / sqrt(n * quant_max)``, n elements a scale.

    Attributes:
        spec: the QuantSpec; ``quantize(x, module.spec, scale=module.scale[...])`` gives the codes.
        scale: an nnx.Param, float32: 0-d, per channel 1-D.
        initialized: an nnx.BatchStat of the same shape: whether the scale has started.
        use_running_average: whether the module is in eval mode.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a wrong width, name, axis or shape.

    """

    scale: nnx.Param[jax.Array]

    def __init__(
        self,
        spec: Any,
        *,
        signed: bool | None = None,
        axis: int | None = None,
        channels: int | None = None,
        scale: jax.Array | float | None = None,
        grad_factor: float | None = None,
    ) -> None:
        whole = learned_spec(spec if isinstance(spec, numbers.Integral) else resolve_spec(spec), signed, axis)
        start = _given_start("scale", scale)
        shape = channels_shape(whole, channels, None if start is None else start.shape)
        if start is not None and not isinstance(start, Tracer) and not bool((start > 0).all()):
            raise ValueError(f"scale is {scale}; allowed: above 0")
        super().__init__(whole, "scale", None if start is None else start.reshape(shape), 1.0, shape)
        self.quant_min, self.quant_max = code_range(whole)
        self.axis = whole.granularity.axis if isinstance(whole.granularity, PerChannel) else None
        self.grad_factor = grad_factor

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return ``x`` rounded: any shape; float32, float16, bfloat16 or float64."""
        x = check_data("x", x)
        arguments = mean_start(self.spec, self.scale.get_value().shape, x.shape)
        return lsq_quantize(
            x,
            self._started(x, _mean_scale, *arguments),
            quant_min=self.quant_min,
            quant_max=self.quant_max,
            axis=self.axis,
            grad_factor=self.grad_factor,
            rounding=self.spec.rounding,
        )


def _log_threshold(start: jax.Array, shift: int) -> jax.Array:
    # Of the threshold start * 2^shift, which might overflow itself.
    mantissa, exponent = jnp.frexp(start)
    value = exponent + shift - jnp.where(mantissa == 0.5, np.float32(1.5), np.float32(0.5))
    return jnp.where((start >= TINY) & jnp.isfinite(start), value, np.nan)


def _tqt_mean(x: jax.Array, spec: OpSpec, factor: float, bits: int) -> jax.Array:
    return _log_threshold(_mean_scale(x, spec, factor).reshape(()), bits - 1)


def _tqt_max(x: jax.Array) -> jax.Array:
    return _log_threshold(abs(x).max().astype(np.float32), 0)


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
        log_threshold: an nnx.Param, float32, 0-d.
        initialized: a 0-d nnx.BatchStat: whether it has started.
        use_running_average: whether the module is in eval mode.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a wrong width, name or shape.

    """

    log_threshold: nnx.Param[jax.Array]

    def __init__(
        self,
        bits: int = 8,
        *,
        log_threshold: jax.Array | float | None = None,
        init: str = "mean",
        rounding: str = "half_even",
    ) -> None:
        one_of("init", init, INITS)
        one_of("rounding", rounding, FIXED_ROUNDINGS)
        self.bits = as_int("bits", bits)
        spec = learned_spec(replace(integers(self.bits, True), rounding=rounding), None, None)
        start = _given_start("log_threshold", log_threshold)
        if start is not None:
            documented.expect_single("log_threshold", start.shape)
            start = start.reshape(())
        super().__init__(spec, "log_threshold", start, 0.0, ())
        self.init = init

    @property
    def scale(self) -> jax.Array:
        """The scale that the threshold stands for: a power of two, float32, 0-d; without a gradient."""
        # What saturates at the lower end is the threshold itself.
        lowest = jnp.asarray(np.float32(-np.inf))
        threshold = -tqt_quantize(lowest, lax.stop_gradient(self.log_threshold.get_value()), bits=self.bits)
        return threshold * 2.0 ** (1 - self.bits)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return ``x`` rounded: any shape; float32, float16, bfloat16 or float64."""
        x = check_data("x", x)
        if self.init == "mean":
            threshold = self._started(x, _tqt_mean, *mean_start(self.spec, (), x.shape), self.bits)
        else:
            threshold = self._started(x, _tqt_max)
        return tqt_quantize(x, threshold, bits=self.bits, rounding=self.spec.rounding)


# ---- serving ---------------------------------------------------------------------------------------------------------


class QuantizedLinear(nnx.Module):
    """A linear layer that keeps its weight quantized and dequantizes it in each call, to x's dtype.

    ``x @ weight.T + bias``, the bias cast to x's dtype. The weight is that of ``quark_torch.nn.QuantizedLinear``, the
    transpose of an nnx.Linear's kernel, so that groups run along the inputs. Its parts are nnx.Variables under the
    names they have in a QTensor.

    Args:
        in_features: the length of x's last axis.
        out_features: that of the result's.
        spec: what ``quantize`` takes for the weight of shape ``[out_features, in_features]``.
        use_bias: whether there is a bias.
        axis: as for ``quantize``.
        group_size: as for ``quantize``.
        packed: as for ``quantize``.
        param_dtype: of the bias, and of what ``weight.dequantize()`` returns.

    Attributes:
        weight: the QTensor; zeros in a new module.
        bias: an nnx.Param, or None.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a wrong name, size or combination.

    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: Any,
        *,
        use_bias: bool = True,
        axis: int | None = None,
        group_size: int | None = None,
        packed: bool | None = None,
        param_dtype: Any = np.float32,
    ) -> None:
        shape = (as_int("out_features", out_features, 0), as_int("in_features", in_features, 0))
        seed = 0 if resolve_spec(spec).rounding == "stochastic" else None  # which zeros need too
        zeros = jnp.zeros(shape, param_dtype)
        self._keep(quantize(zeros, spec, axis=axis, group_size=group_size, packed=packed, seed=seed))
        self.bias = nnx.Param(jnp.zeros(shape[0], param_dtype)) if use_bias else None

    @classmethod
    def from_linear(
        cls,
        linear: nnx.Linear,
        spec: Any,
        *,
        axis: int | None = None,
        group_size: int | None = None,
        packed: bool | None = None,
        seed: Any = None,
    ) -> Self:
        """Return the layer with the weight of an nnx.Linear, quantized, and a copy of its bias.

        Args:
            linear: the layer to quantize.
            spec: as for ``quantize``.
            axis: as for ``quantize``, of the transposed kernel.
            group_size: as for ``quantize``.
            packed: as for ``quantize``.
            seed: as for ``quantize``.

        Returns:
            A new layer.

        Raises:
            TypeError: not an nnx.Linear.
            ValueError: what ``quantize`` refuses.

        """
        if not isinstance(linear, nnx.Linear):
            raise TypeError(f"linear is a {type(linear).__module__}.{type(linear).__name__}; allowed: flax.nnx.Linear")
        kernel = linear.kernel.get_value()
        q = quantize(kernel.T, spec, axis=axis, group_size=group_size, packed=packed, seed=seed)
        (rows, columns), use_bias = q.shape, linear.bias is not None
        layer = cls(columns, rows, q.spec, use_bias=use_bias, packed=q.packed, param_dtype=kernel.dtype)
        layer._keep(q)
        if linear.bias is not None:
            layer.bias = nnx.Param(linear.bias.get_value())
        return layer

    def _keep(self, weight: QTensor) -> None:
        for name in QTensor.ARRAYS:
            part = getattr(weight, name)
            setattr(self, name, None if part is None else nnx.Variable(part))
        self._static: tuple[Any, ...] = (weight.spec, weight.shape, weight.dtype, weight.packed)

    @property
    def weight(self) -> QTensor:
        """The quantized weight, of shape ``[out_features, in_features]``."""
        parts = [getattr(self, name) for name in QTensor.ARRAYS]
        arrays: Any = [None if part is None else part.get_value() for part in parts]
        return QTensor(*arrays, *self._static)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return ``x @ weight.T + bias``, with the weight dequantized and the bias cast to x's dtype.

        Args:
            x: ``[..., in_features]``; float32, float16, bfloat16 or float64.

        Returns:
            ``[..., out_features]``, of x's dtype.

        Raises:
            TypeError: a wrong kind of array or dtype.
            ValueError: another length of x's last axis.

        """
        x = check_data("x", x)
        check_features(x.shape, self._static[1][1])
        y = x @ dequantize(self.weight, x.dtype).T
        return y if self.bias is None else y + self.bias.get_value().astype(x.dtype)
