"""Calls whose plan was made by an earlier one: the same errors, and torch's modes and wrappers see them as before."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from quark_kernels import QuantSpec, schema

torch = pytest.importorskip("torch")
quark_jax = pytest.importorskip("quark_jax")

from torch.overrides import TorchFunctionMode

import quark_torch
from quark_torch import kernel

HOW = (None, None, -128, 127, 8, "per_tensor")


def tensors() -> tuple[Any, Any]:
    return torch.linspace(-3, 3, 64).reshape(8, 8), torch.tensor(0.1)


def calls() -> list[Any]:
    """Calls that need torch's dispatcher only where something is there that looks at it."""
    return [
        lambda x, s: quark_torch.fake_quantize(x, "int8", scale=s),
        lambda x, s: quark_torch.fake_quantize(x, "int8"),
        lambda x, s: quark_torch.quantize(x, "int4", scale=s).qvalue,
        lambda x, s: kernel.scaled_fake_quantize("int8", x, s, None, *HOW),
        lambda x, s: kernel.ScaledRealQuantizeFunction.apply("int8", x, s, None, *HOW),
    ]


def test_an_argument_of_another_type_is_another_call(framework: Any) -> None:
    """True equals 1, but isn't an axis."""
    x = framework.array(np.ones((4, 4), np.float32))
    framework.api.fake_quantize(x, "int8", axis=1)
    with pytest.raises(TypeError, match="axis is True"):
        framework.api.fake_quantize(x, "int8", axis=True)
    with pytest.raises(TypeError, match=r"axis is \[1\]"):  # which no plan can be looked up by
        framework.api.fake_quantize(x, "int8", axis=[1])


def test_what_raises_isnt_kept() -> None:
    made = []

    def plan(value: int) -> int:
        made.append(value)
        if value < 0:
            raise ValueError("negative")
        return value

    assert [schema.planned(plan, v) for v in (1, 1, True)] == [1, 1, 1]
    assert len(made) == 2
    for _ in range(2):
        with pytest.raises(ValueError, match="negative"):
            schema.planned(plan, -1)
    assert len(made) == 4


@pytest.mark.parametrize("call", calls())
def test_dispatch_modes_see_every_operator(call: Any) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(op.namespace)
            return op(*args, **(kwargs or {}))

    x, s = tensors()
    expected = call(x, s)
    with Mode():
        found = call(x, s)
    assert "quark_kernels" in seen
    assert torch.equal(found, expected)


@pytest.mark.parametrize("call", calls())
def test_the_profiler_sees_every_operator(call: Any) -> None:
    x, s = tensors()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(x, s)
    assert any(event.key.startswith("quark_kernels::") for event in profile.key_averages())


@pytest.mark.parametrize("call", calls())
def test_make_fx_records_every_operator(call: Any) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(call)(*tensors())
    assert any("quark_kernels" in str(node.target) for node in graph.graph.nodes)
    assert torch.equal(graph(*tensors()), call(*tensors()))


@pytest.mark.parametrize("call", calls())
def test_what_got_out_of_a_transform(call: Any) -> None:
    """torch takes such tensors for what they wrap."""
    x, s = tensors()
    kept = []
    torch.func.grad(lambda x: (kept.append(x), x.sum())[1])(x)
    assert torch.equal(call(kept[0], s), call(x, s))


@pytest.mark.parametrize("call", calls())
def test_lazy_negatives(call: Any) -> None:
    x, s = tensors()
    negative = torch._neg_view(x)
    assert torch.equal(call(negative, s), call(-x, s))


@pytest.mark.parametrize("call", calls())
def test_parameters(call: Any) -> None:
    x, s = tensors()
    with torch.no_grad():
        assert torch.equal(call(torch.nn.Parameter(x), torch.nn.Parameter(s)), call(x, s))


def test_a_scale_that_requires_a_gradient_is_a_constant() -> None:
    x, s = tensors()
    y = quark_torch.fake_quantize(x, "int8", scale=s.requires_grad_())
    assert not y.requires_grad
    q = quark_torch.quantize(x, "int8", scale=s)
    assert not q.scale.requires_grad
    assert q.scale is not s


# ---- what isn't plain ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [np.float64(0.25), np.float32(0.25), np.int64(1), 0.25])
def test_numpy_scalars_are_numbers(number: Any) -> None:
    x = np.linspace(-3, 3, 32, dtype=np.float32).reshape(4, 8)
    ours = quark_torch.fake_quantize(torch.from_numpy(x), "uint8", scale=number, zero_point=np.int64(3))
    theirs = quark_jax.fake_quantize(x, "uint8", scale=number, zero_point=np.int64(3))
    assert np.array_equal(ours.numpy(), np.asarray(theirs))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused() -> None:
    nested = torch.nested.nested_tensor([torch.ones(3), torch.ones(4)])
    with pytest.raises(TypeError, match="x has layout nested"):
        quark_torch.fake_quantize(nested, "int8", scale=torch.tensor(0.1))


def test_function_modes_see_operators() -> None:
    seen = []

    class Log(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Log():
        quark_torch.fake_quantize(torch.ones(3), "int8", scale=torch.tensor(0.1))
    assert "quark_kernels.fake_quantize.default" in seen


def test_autograd_knows_that_out_is_written() -> None:
    weight, x = torch.ones(3, requires_grad=True), torch.ones(3)
    y = weight * x
    quark_torch.fake_quantize(x, "int8", scale=torch.tensor(0.3), out=x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_specs_without_their_text_make_it_anew() -> None:
    spec = QuantSpec("int8")
    other = object.__new__(QuantSpec)
    other.__dict__.update({name: value for name, value in spec.__dict__.items() if name != "text"})
    assert (other, hash(other), str(other)) == (spec, hash(spec), "int8")
    assert QuantSpec(**{f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}) == spec


class _WithContext(kernel.QuantE4M3Function):
    """A user's own, whose forward asks its context."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, scale: float | None = None) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        assert ctx.needs_input_grad[0] is inputs.requires_grad
        return kernel.QuantE4M3Function.forward(ctx, inputs, scale)


@pytest.mark.parametrize("has_gradient", [False, True])
def test_a_context_with_and_without_gradients(has_gradient: bool) -> None:
    x = torch.linspace(-2, 2, 33, requires_grad=has_gradient)
    y = _WithContext.apply(x, None)
    assert y.requires_grad == has_gradient
    assert torch.equal(y.detach().view(torch.uint8), kernel.quant_fp8_e4m3(x.detach()).view(torch.uint8))
