"""Autograd Functions that work under every transform.

PyTorch has two styles of Functions. ``forward(ctx, ...)`` is the faster one (5 us a call), and the one that AMD Quark's
classes have; but ``torch.func`` takes only those with ``setup_context``. So each Function here is written once, in the
first style, and a twin of the second style is made of it, for calls under ``torch.func`` and in forward mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _are_functorch_transforms_active
from torch._C._functorch import unwrap_if_dead as _unwrap_if_dead
from torch.autograd import Function, forward_ad
from torch.autograd.function import FunctionCtx
from torch.compiler import is_compiling

from quark_kernels.schema import OpSpec

_twins: dict[str, type[Function]] = {}


class Recorded(Function):
    """A Function whose ``forward(ctx, ...)`` calls ``keep`` and computes."""

    of: str
    """The public function, for messages."""

    record: Callable[..., torch.Tensor]
    """Calls the Function, under whatever transform."""

    _apply: Callable[..., Any]
    """``Function.apply`` outside of ``torch.func``, where it takes half as long."""

    def __init_subclass__(cls) -> None:
        """Make the twin."""
        name = cls.__name__
        _twins[name] = _twin(cls)
        cls._apply = super(Function, cls).apply  # type: ignore[misc]

        def record(*arguments: Any) -> Any:
            if not is_transformed():
                return cls.apply(*arguments) if is_compiling() else _record(cls, arguments)
            if torch.compiler.is_exporting():
                raise NotImplementedError(
                    f"{cls.of} is under torch.func while torch.export traces it, which torch has no way for; allowed: "
                    "calls outside torch.func, and a batch as one tensor with axis="
                )
            if torch.compiler.is_dynamo_compiling():
                _allow_in_graph()
            specs = tuple(i for i, a in enumerate(arguments) if isinstance(a, OpSpec))
            return _in_graph(name, specs, *(a.text if isinstance(a, OpSpec) else a for a in arguments))

        cls.record = staticmethod(record)

    @classmethod
    def apply(cls, *arguments: Any, **keywords: Any) -> Any:
        """Call the Function, as ``Function.apply`` does."""
        if _are_functorch_transforms_active():
            return super().apply(*arguments, **keywords)  # type: ignore[no-untyped-call]
        if is_compiling() or keywords or forward_ad._current_level >= 0:
            alive = [_unwrap_if_dead(a) if isinstance(a, Tensor) else a for a in arguments]
            return super(Function, cls).apply(*alive, **keywords)  # type: ignore[misc]
        return _record(cls, arguments)

    @staticmethod
    def keep(ctx: Any, *arguments: Any) -> None:
        """Keep what backward needs of the arguments."""


class _Nowhere(FunctionCtx):
    """A ctx that nothing is kept in."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self.needs_input_grad = (False,) * len(arguments)

    def save_for_backward(self, *tensors: Any) -> None:
        pass


def _record(cls: type[Recorded], arguments: tuple[Any, ...]) -> Any:
    """Call a Function outside of torch.func; where nothing has a gradient, what it computes."""
    has_gradient = False
    for t in [a for a in arguments if isinstance(a, Tensor)]:
        if _unwrap_if_dead(t) is not t:
            return _record(cls, tuple([_unwrap_if_dead(a) if isinstance(a, Tensor) else a for a in arguments]))
        has_gradient = has_gradient or t.requires_grad
    if has_gradient and is_grad_enabled():
        return cls._apply(*arguments)
    return cls.forward(_Nowhere(arguments), *arguments)


def _twin(cls: type[Recorded]) -> type[Function]:
    """The same Function in ``setup_context`` style. Its vmap rule is that of the operators it calls."""

    def forward(*arguments: Any) -> Any:
        return cls.forward(_Nowhere(arguments), *arguments)

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        cls.keep(ctx, *inputs)

    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            f"there is no forward-mode derivative of {cls.of} (torch.func.jvp, jacfwd, hessian, dual tensors): its "
            "gradient is defined for reverse mode; allowed: backward(), torch.func.grad, vjp, jacrev"
        )

    # once_differentiable turns gradients off, and torch.func would take second ones for zero.
    backward = getattr(cls.backward, "__wrapped__", cls.backward)
    methods = {"forward": forward, "setup_context": setup_context, "jvp": jvp, "backward": backward}
    statics = {name: staticmethod(f) for name, f in methods.items()}
    return type(f"{cls.__name__}Twin", (Function,), {**statics, "generate_vmap_rule": True})


def is_transformed() -> bool:
    """Whether a call is under ``torch.func`` or in forward mode, where ``requires_grad`` doesn't say all."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_recorded(t: torch.Tensor) -> bool:
    """Whether a call must be recorded for a derivative. A bare operator would drop it without a word."""
    return (torch.is_grad_enabled() and t.requires_grad) or is_transformed()


def _in_graph(name: str, specs: tuple[int, ...], *arguments: Any) -> Any:
    """Call a twin. Dynamo doesn't look in here: of a Function under ``torch.func`` it would see the forward only.

    What it keeps in its graph for this call are tensors, numbers and strings; ``specs`` says which of these are specs.
    """
    whole = [OpSpec.parse(a) if i in specs else a for i, a in enumerate(arguments)]
    return _twins[name].apply(*whole)


def _allow_in_graph() -> None:
    """Tell Dynamo of ``_in_graph``, when it comes here: to tell it at import would import it, for a second or more."""
    torch.compiler.allow_in_graph(_in_graph)


# Dynamo calls it while it traces.
_allow_in_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]
