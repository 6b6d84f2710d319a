"""Every function under every transform of torch: the bits of plain calls, gradients too, or a clear error."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import transforms
from transforms import CELLS, IDS, Function, Variant

torch = pytest.importorskip("torch")

from torch.utils import _pytree

import quark_torch
from frontends import Torch
from quark_kernels.schema import OPTIONAL
from quark_torch import kernel
from quark_torch.ops import OVERLOADS

FRONTEND = Torch()
FIRST = [
    (function, variant)
    for function in transforms.FUNCTIONS
    for variant in function.variants
    if any(variant is v for v in function.variants[:2])
    or variant.label in ("packed", "nvfp4", "stochastic", "zero points")
]
"""What slow tests are run on."""
NO_GRADIENT = "no gradient: codes and scales are constants"
FORWARD_MODE = "no forward-mode derivative: NotImplementedError"

# What torch itself does in forward mode, in Dynamo and in Inductor.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]
cells = pytest.mark.parametrize(("function", "variant"), CELLS, ids=IDS)
some_cells = pytest.mark.parametrize(
    ("function", "variant"),
    FIRST,
    ids=[f"{function.name} {variant.label}".replace(" ", "-") for function, variant in FIRST],
)


def record(function: Function, transform: str, outcome: str = "works") -> None:
    transforms.record("torch", function.name, transform, outcome)


def call_of(function: Function, variant: Variant) -> Callable[..., list[Any]]:
    """The call, giving a flat list of tensors."""
    api = function.api(quark_torch)

    def call(*arrays: Any) -> list[Any]:
        return [leaf for leaf in _pytree.tree_leaves(variant.call(api, *arrays)) if leaf is not None]

    return call


def example(variant: Variant, i: int = 0) -> list[Any]:
    return [FRONTEND.array(a) for a in variant.example(i)]


def examples(variant: Variant, n: int = 3) -> list[Any]:
    """The arrays of n examples, along a first axis."""
    return [stack(parts) for parts in zip(*(example(variant, i) for i in range(n)), strict=True)]


def stack(parts: Sequence[Any], axis: int = 0) -> Any:
    """torch.stack, of any dtype."""
    first = parts[0]
    if first.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int32):
        return torch.stack(tuple(parts), axis)
    return torch.stack([p.view(torch.uint8) for p in parts], axis).view(first.dtype)


def same(got: Any, expected: Any) -> None:
    """The same shapes, dtypes and bits."""
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert np.array_equal(bits(a), bits(b))


def bits(a: Any) -> np.ndarray:
    a = a.detach().contiguous()
    return a.view(getattr(torch, f"int{8 * a.element_size()}")).numpy()


def cotangent(y: Any, seed: int = 7) -> Any:
    """A gradient of a result."""
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))
    return g.to(y.dtype)


def gradients(call: Callable[..., list[Any]], variant: Variant, arrays: Sequence[Any], g: Any) -> list[Any]:
    """Plain backward."""
    arrays = [a.detach() for a in arrays]
    inputs = [arrays[i].requires_grad_() for i in variant.differentiable]
    (y,) = call(*arrays)
    return list(torch.autograd.grad(y, inputs, g))


def pulled_back(call: Callable[..., list[Any]], variant: Variant, arrays: Sequence[Any], g: Any) -> list[Any]:
    """torch.func's backward."""

    def f(*inputs: Any) -> Any:
        whole = list(arrays)
        for i, x in zip(variant.differentiable, inputs, strict=True):
            whole[i] = x
        return call(*whole)[0]

    _, back = torch.func.vjp(f, *(arrays[i] for i in variant.differentiable))
    return list(back(g))


# ---- torch.func ------------------------------------------------------------------------------------------------------


@cells
def test_vmap(function: Function, variant: Variant) -> None:
    call, batch = call_of(function, variant), examples(variant)
    each = [call(*(a[i] for a in batch)) for i in range(3)]
    expected = [stack(parts) for parts in zip(*each, strict=True)]
    same(torch.vmap(call)(*batch), expected)
    # Each argument alone, the others shared; the examples along the last axis.
    for k, shared in enumerate(example(variant, 5) for _ in batch):
        axes = tuple(-1 if i == k else None for i in range(len(batch)))
        given = [a.movedim(0, -1) if i == k else shared[i] for i, a in enumerate(batch)]
        each = [call(*(a[i] if j == k else shared[j] for j, a in enumerate(batch))) for i in range(3)]
        same(torch.vmap(call, axes)(*given), [stack(parts) for parts in zip(*each, strict=True)])
    record(function, "vmap")


@cells
def test_nested_vmap(function: Function, variant: Variant) -> None:
    call = call_of(function, variant)
    batch = [stack([examples(variant, 2)[k], examples(variant, 2)[k].flip(0)]) for k in range(len(variant.example()))]
    each = [[call(*(a[i, j] for a in batch)) for j in range(2)] for i in range(2)]
    rows = [[stack(parts) for parts in zip(*row, strict=True)] for row in each]
    same(torch.vmap(torch.vmap(call))(*batch), [stack(parts) for parts in zip(*rows, strict=True)])


@cells
def test_func_grad(function: Function, variant: Variant) -> None:
    call, arrays = call_of(function, variant), example(variant)
    if not variant.differentiable:
        return record(function, "func.grad", no_gradient(call, arrays))
    g = cotangent(call(*arrays)[0])
    same(pulled_back(call, variant, arrays, g), gradients(call, variant, arrays, g))
    return record(function, "func.grad")


def no_gradient(call: Callable[..., list[Any]], arrays: Sequence[Any]) -> str:
    """What floats come out don't depend on floats that go in, to a derivative: as of ``detach()``."""
    floats = [a.clone().requires_grad_() if a.is_floating_point() else a for a in arrays]
    wanted = [a for a in floats if a.requires_grad]
    for y in call(*floats):
        if y.requires_grad:  # as a documented class' results are
            assert torch.autograd.grad(y, wanted, cotangent(y), allow_unused=True) == (None,) * len(wanted)
    return NO_GRADIENT


@cells
def test_vmap_of_grad(function: Function, variant: Variant) -> None:
    call, batch = call_of(function, variant), examples(variant)
    if not variant.differentiable:
        return record(function, "vmap(grad)", NO_GRADIENT)
    g = stack([cotangent(call(*example(variant, i))[0], i) for i in range(3)])
    each = [gradients(call, variant, [a[i] for a in batch], g[i]) for i in range(3)]
    got = torch.vmap(lambda g, *arrays: pulled_back(call, variant, arrays, g))(g, *batch)
    same(got, [stack(parts) for parts in zip(*each, strict=True)])
    return record(function, "vmap(grad)")


@cells
def test_grad_of_vmap(function: Function, variant: Variant) -> None:
    if not variant.differentiable:
        return
    call, batch = call_of(function, variant), examples(variant)
    g = stack([cotangent(call(*example(variant, i))[0], i) for i in range(3)])
    each = [gradients(call, variant, [a[i] for a in batch], g[i]) for i in range(3)]
    expected = [stack(parts) for parts in zip(*each, strict=True)]
    mapped = lambda *arrays: torch.vmap(call)(*arrays)  # noqa: E731
    same(pulled_back(mapped, variant, batch, g), expected)
    same(gradients(mapped, variant, batch, g), expected)


@cells
def test_forward_mode(function: Function, variant: Variant) -> None:
    call, arrays = call_of(function, variant), example(variant)
    floats = [i for i, a in enumerate(arrays) if a.dtype in (torch.float32, torch.float16, torch.bfloat16)]

    def f(*inputs: Any) -> Any:
        whole = list(arrays)
        for i, x in zip(wanted, inputs, strict=True):
            whole[i] = x
        return [y for y in call(*whole) if y.is_floating_point() and y.dtype != torch.float8_e8m0fnu]  # no zero

    wanted = floats
    if not variant.differentiable and not (function.name == "kernel.dequantize" and wanted):
        ones = tuple(torch.ones_like(arrays[i]) for i in wanted)
        _, tangents = torch.func.jvp(f, tuple(arrays[i] for i in wanted), ones) if wanted and f(*ones) else (0, [])
        assert not any(t.any() for t in tangents)
        return record(function, "forward-mode", NO_GRADIENT)
    for i in variant.differentiable or wanted:
        wanted, x = [i], arrays[i]
        message = f"no forward-mode derivative of .*{function.name.removeprefix('kernel.')} .*allowed: backward"
        with pytest.raises(NotImplementedError, match=message):
            torch.func.jvp(f, (x,), (x,))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x.clone())
            with pytest.raises(NotImplementedError, match=message):
                f(dual)
    return record(function, "forward-mode", FORWARD_MODE)


@pytest.mark.parametrize("name", ["lsq_quantize", "tqt_quantize"])
def test_second_order_is_refused(name: str) -> None:
    function = next(f for f in transforms.FUNCTIONS if f.name == name)
    call, (x, p) = call_of(function, function.variants[0]), example(function.variants[0])
    for i in (0, 1):
        first = torch.func.grad(lambda *a: (call(*a)[0] ** 2).sum(), i)
        with pytest.raises(NotImplementedError, match="first-order gradients only"):
            torch.func.grad(lambda *a, first=first: first(*a).sum(), i)(x, p)


def test_second_order() -> None:
    """The gradient of fake_quantize is linear in its cotangent: it has a gradient itself."""
    x = torch.linspace(-3, 3, 24)
    f = lambda x: quark_torch.fake_quantize(x, "int4", scale=0.3)  # noqa: E731
    second = torch.func.grad(lambda x: torch.func.grad(lambda x: (f(x) ** 3).sum())(x).sum())(x)
    plain = x.clone().requires_grad_()
    (first,) = torch.autograd.grad((f(plain) ** 3).sum(), plain, create_graph=True)
    (expected,) = torch.autograd.grad(first.sum(), plain)
    assert expected.any()
    same([second], [expected])


def test_jacobian() -> None:
    x, s = torch.linspace(-3, 3, 24), torch.tensor(0.3)
    f = lambda s: quark_torch.lsq_quantize(x, s, quant_min=-8, quant_max=7)  # noqa: E731
    p = s.clone().requires_grad_()
    each = [torch.autograd.grad(f(p), p, one)[0] for one in torch.eye(24)]
    same([torch.func.jacrev(f)(s)], [torch.stack(each)])


def test_vmap_with_out() -> None:
    x, out = torch.randn(4, 3, 64), torch.empty(3, 4, 64)
    f = lambda x, out: quark_torch.fake_quantize(x, "int8", out=out)  # noqa: E731
    torch.vmap(f, (0, 1))(x, out)
    same([out.movedim(1, 0)], [torch.stack([quark_torch.fake_quantize(one, "int8") for one in x])])
    with pytest.raises(ValueError, match="out is one tensor for all of vmap's examples; allowed: one that is mapped"):
        torch.vmap(f, (0, None))(x, torch.empty(3, 64))


def test_qtensor_under_vmap() -> None:
    """Its arrays are batched; its shape stays an example's."""
    x = torch.randn(4, 3, 64)
    q = torch.vmap(lambda x: quark_torch.quantize(x, "nvfp4"))(x)
    assert (q.shape, q.qvalue.shape, q.global_scale.shape) == ((3, 64), (4, 3, 32), (4,))
    same(
        [torch.vmap(quark_torch.dequantize)(q)],
        [torch.stack([quark_torch.quantize(a, "nvfp4").dequantize() for a in x])],
    )


# ---- operators -------------------------------------------------------------------------------------------------------


@contextmanager
def captured() -> Iterator[list[tuple[Any, tuple[Any, ...]]]]:
    """The operators that are called meanwhile, with their arguments."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: list[tuple[Any, tuple[Any, ...]]] = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op.namespace == "quark_kernels":
                calls.append((op, args))
            return op(*args, **(kwargs or {}))

    with Mode():
        yield calls


CHECKED: set[str] = set()
UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def opcheck(op: Any, arguments: tuple[Any, ...]) -> None:
    result = op(*arguments)
    tensors = [a for a in (*arguments, *_pytree.tree_leaves(result)) if isinstance(a, torch.Tensor)]
    utilities = UTILITIES
    if any(a.is_floating_point() and a.element_size() == 1 for a in tensors):
        # test_schema's own comparison doesn't know fp8: here is what it checks.
        utilities = UTILITIES[1:]
        inputs = [a for a in arguments if isinstance(a, torch.Tensor)]
        before = [bits(a).copy() for a in inputs]
        outs = [y.untyped_storage().data_ptr() for y in _pytree.tree_leaves(op(*arguments)) if y is not None]
        assert all(np.array_equal(bits(a), b) for a, b in zip(inputs, before, strict=True))
        assert not set(outs) & {a.untyped_storage().data_ptr() for a in inputs}
    assert torch.library.opcheck(op, arguments, test_utils=utilities) == dict.fromkeys(utilities, "SUCCESS")
    CHECKED.add(str(op))


@cells
def test_opcheck(function: Function, variant: Variant) -> None:
    call, arrays = call_of(function, variant), example(variant)
    with captured() as calls:
        if variant.differentiable:
            gradients(call, variant, arrays, cotangent(call(*arrays)[0]))
        call(*arrays)
    assert calls or variant.label == "float16"  # which is a copy
    seen: set[Any] = set()
    for op, arguments in calls:
        key = op, *(a.dtype if isinstance(a, torch.Tensor) else a for a in arguments)
        if key not in seen:
            seen.add(key)
            opcheck(op, tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments))
    record(function, "opcheck")


# ---- torch.compile ---------------------------------------------------------------------------------------------------


def compiled(f: Callable[..., Any], dynamic: bool = False, backend: Any = "aot_eager") -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, dynamic=dynamic, backend=backend)


def backward_of(call: Callable[..., list[Any]], variant: Variant) -> Callable[..., list[Any]]:
    """A function of arrays and a gradient that gives results and gradients, by plain backward."""

    def run(g: Any, *arrays: Any) -> list[Any]:
        inputs = [a.detach().requires_grad_(i in variant.differentiable) for i, a in enumerate(arrays)]
        ys = call(*inputs)
        if not variant.differentiable:
            return ys
        return [*ys, *torch.autograd.grad(ys[0], [inputs[i] for i in variant.differentiable], g)]

    return run


@some_cells
def test_compile(function: Function, variant: Variant) -> None:
    """No graph break, and nothing is compiled anew for a second call."""
    call = call_of(function, variant)
    run, fast = backward_of(call, variant), compiled(call)
    compiled_run = backward_of(fast, variant)
    for i in (0, 1):
        arrays = example(variant, i)
        g = cotangent(call(*arrays)[0]) if variant.differentiable else None
        with torch._dynamo.config.patch(error_on_recompile=True):
            same(compiled_run(g, *arrays), run(g, *arrays))
    record(function, "compile")


def test_compile_with_numbers_that_change() -> None:
    """After the first calls such a number is a symbol to torch.compile."""
    torch._dynamo.reset()
    x = torch.linspace(-3, 3, 64)

    def f(x: Any, s: float) -> Any:
        return quark_torch.fake_quantize(x, "int8", scale=s)

    compiled = torch.compile(f, fullgraph=True)
    for s in (0.1, 0.2, 1 / 3, 1e-40, 0.7):
        same([compiled(x, s)], [f(x, s)])


@some_cells
def test_compile_grad(function: Function, variant: Variant) -> None:
    if not variant.differentiable:
        return record(function, "compile(grad)", NO_GRADIENT)
    call, arrays = call_of(function, variant), example(variant)
    g = cotangent(call(*arrays)[0])
    fast = compiled(lambda g, *arrays: pulled_back(call, variant, arrays, g))
    same(fast(g, *arrays), gradients(call, variant, arrays, g))
    return record(function, "compile(grad)")


def longer(variant: Variant, times: int) -> list[Any]:
    """The arrays with a first axis that is longer by so many times."""
    arrays = example(variant)
    tile = lambda a: stack([a] * times).flatten(0, 1) if a.dim() and a.shape[0] == 3 else a  # noqa: E731
    return [tile(a) for a in arrays]


@some_cells
def test_compile_dynamic(function: Function, variant: Variant) -> None:
    """One compilation serves every size."""
    if variant.label == "given tiles" or (function.name, variant.label) == ("unpack", "first axis"):
        return  # a tile's scales don't grow with the rows; packed codes' own axis is compiled for its length
    call = call_of(function, variant)
    run, fast = backward_of(call, variant), compiled(call, dynamic=True)
    compiled_run = backward_of(fast, variant)
    for times in (2, 3, 5):
        arrays = longer(variant, times)
        g = cotangent(call(*arrays)[0]) if variant.differentiable else None
        with torch._dynamo.config.patch(error_on_recompile=True):
            same(compiled_run(g, *arrays), run(g, *arrays))
    record(function, "compile (dynamic shapes)")


def test_compile_with_inductor() -> None:
    """The default backend gives the same bits, gradients too, for every size."""

    def f(x: Any, s: Any, t: Any) -> list[Any]:
        y = quark_torch.lsq_quantize(x * 2, s, quant_min=-8, quant_max=7)
        y = quark_torch.tqt_quantize(y + 1, t) + quark_torch.fake_quantize(x, "nvfp4")
        return [kernel.non_scaled_fake_quantize(y, "mx", "fp8_e4m3", -1, 32)]

    variant = Variant("", lambda rng: (), f, (0, 1, 2))
    fast = compiled(f, dynamic=True, backend="inductor")
    for rows in (3, 5, 8):
        x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows))
        arrays = [x, torch.tensor(0.1), torch.tensor(1.3)]
        g = cotangent(x)
        with torch._dynamo.config.patch(error_on_recompile=True):
            same(backward_of(fast, variant)(g, *arrays), backward_of(f, variant)(g, *arrays))


def test_lsq_factor_of_any_size() -> None:
    """The factor of the scale's gradient, 1 / sqrt(n * quant_max), is the same float32 in a graph of open sizes."""

    def f(x: Any, s: Any) -> list[Any]:
        return [quark_torch.lsq_quantize(x, s, quant_min=-8, quant_max=7)]

    variant = Variant("", lambda rng: (), f, (1,))
    fast = compiled(f, dynamic=True)
    for n in (*range(2, 40), 1000, 4097):
        x = torch.arange(n) * 0.37 - 3
        with torch._dynamo.config.patch(error_on_recompile=True):
            same(backward_of(fast, variant)(x, x, torch.tensor(0.3)), backward_of(f, variant)(x, x, torch.tensor(0.3)))


def test_compile_of_mapped_gradients() -> None:
    def each(x: Any, s: Any) -> Any:
        loss = lambda x, s: (quark_torch.lsq_quantize(x, s, quant_min=-8, quant_max=7) ** 2).sum()  # noqa: E731
        return torch.func.grad(loss, (0, 1))(x, s)

    x, s = torch.randn(4, 3, 16), torch.rand(4) / 5
    mapped = torch.vmap(each)
    expected = mapped(x, s)
    assert all(g.any() for g in expected)  # not zero without a word
    same(compiled(mapped)(x, s), expected)


# ---- torch.export ----------------------------------------------------------------------------------------------------

RELOAD = """
import sys, pathlib, torch, quark_torch
for path in pathlib.Path(sys.argv[1]).glob("*.pt2"):
    arrays = torch.load(path.with_suffix(".in"))
    torch.save(torch.export.load(path).module()(*arrays), path.with_suffix(".out"))
"""


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool, tmp_path: Path) -> None:
    """A function is exported, saved, and gives the same bits in a process that only imports quark_torch."""
    for i, (function, variant) in enumerate(FIRST):
        call, arrays = call_of(function, variant), tuple(example(variant))

        class Module(torch.nn.Module):
            def forward(self, *arrays: Any, call: Any = call) -> Any:
                return call(*arrays)

        exported = torch.export.export(Module(), arrays, strict=strict)
        torch.export.save(exported, tmp_path / f"{i}.pt2")
        torch.save(arrays, tmp_path / f"{i}.in")
    subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path)], check=True, capture_output=True)
    for i, (function, variant) in enumerate(FIRST):
        same(torch.load(tmp_path / f"{i}.out"), call_of(function, variant)(*example(variant)))
        record(function, "export (strict)" if strict else "export")


def test_export_of_qtensors() -> None:
    """A QTensor is an argument like others."""

    class Module(torch.nn.Module):
        def forward(self, q: Any) -> Any:
            return q.dequantize()

    q = quark_torch.quantize(torch.randn(4, 32), "nvfp4")
    for strict in (False, True):
        same(torch.export.export(Module(), (q,), strict=strict).module()(q), q.dequantize())


def test_export_of_torch_func() -> None:
    """torch has no way to trace it; a plain export works after that."""

    class Module(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return torch.vmap(lambda x: quark_torch.fake_quantize(x, "int8"))(x)

    with pytest.raises(NotImplementedError, match="fake_quantize is under torch.func while torch.export traces it"):
        torch.export.export(Module(), (torch.randn(4, 8),), strict=False)


# ---- tensors without data --------------------------------------------------------------------------------------------


@cells
def test_fake_tensors(function: Function, variant: Variant) -> None:
    """On the meta device and in FakeTensorMode: the shapes and dtypes of the results and gradients."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    call, arrays = call_of(function, variant), example(variant)
    run = backward_of(call, variant)
    g = cotangent(call(*arrays)[0]) if variant.differentiable else None
    expected = [(y.shape, y.dtype) for y in run(g, *arrays)]
    meta = run(None if g is None else g.to("meta"), *(a.to("meta") for a in arrays))
    assert [(y.shape, y.dtype) for y in meta] == expected
    assert all(y.is_meta for y in meta)
    with FakeTensorMode() as mode:
        fakes = run(None if g is None else mode.from_tensor(g), *(mode.from_tensor(a) for a in arrays))
    assert [(y.shape, y.dtype) for y in fakes] == expected
    record(function, "fake tensors")


# ---- training --------------------------------------------------------------------------------------------------------


@cells
def test_backward(function: Function, variant: Variant) -> None:
    """Plain backward gives each differentiable input a gradient; what it is, test_gradients.py and others say."""
    call, arrays = call_of(function, variant), example(variant)
    if not variant.differentiable:
        return record(function, "eager backward", no_gradient(call, arrays))
    for i, x in zip(variant.differentiable, gradients(call, variant, arrays, cotangent(call(*arrays)[0])), strict=True):
        assert (x.shape, x.dtype) == (arrays[i].shape, arrays[i].dtype)
        assert bits(x).any()
    return record(function, "eager backward")


@cells
def test_checkpoint(function: Function, variant: Variant) -> None:
    from torch.utils.checkpoint import checkpoint

    call, arrays = call_of(function, variant), example(variant)
    run = backward_of(call, variant)
    g = cotangent(call(*arrays)[0]) if variant.differentiable else None
    same(backward_of(lambda *a: checkpoint(call, *a, use_reentrant=False), variant)(g, *arrays), run(g, *arrays))
    if variant.differentiable:  # which works with backward() only
        inputs = [a.clone().requires_grad_(i in variant.differentiable) for i, a in enumerate(arrays)]
        torch.autograd.backward(checkpoint(lambda *a: call(*a)[0], *inputs, use_reentrant=True), g)
        same([inputs[i].grad for i in variant.differentiable], gradients(call, variant, arrays, g))
    record(function, "checkpoint")


@cells
def test_autocast(function: Function, variant: Variant) -> None:
    """Functions don't follow autocast: the same bits."""
    call, arrays = call_of(function, variant), example(variant)
    run = backward_of(call, variant)
    g = cotangent(call(*arrays)[0]) if variant.differentiable else None
    with torch.autocast("cpu", torch.bfloat16):
        got = run(g, *arrays)
    same(got, run(g, *arrays))
    record(function, "autocast")


class Everything(torch.utils.data.Dataset):
    """Each function's results, and gradients, as items."""

    def __len__(self) -> int:
        return len(CELLS)

    def __getitem__(self, i: int) -> list[np.ndarray]:
        function, variant = CELLS[i]
        call, arrays = call_of(function, variant), example(variant)
        g = cotangent(call(*arrays)[0]) if variant.differentiable else None
        return [bits(y) for y in backward_of(call, variant)(g, *arrays)]


def check_workers(start: str) -> None:
    quark_torch.fake_quantize(torch.randn(1024, 1024), "int8")  # threads, before workers are forked
    everything = Everything()
    loader = torch.utils.data.DataLoader(
        everything, num_workers=2, batch_size=None, multiprocessing_context=start, collate_fn=list
    )
    for i, item in enumerate(loader):
        assert all(np.array_equal(a, b) for a, b in zip(item, everything[i], strict=True))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_dataloader_workers(start: str) -> None:
    """In a process of its own: one in which JAX has run can't be forked."""
    script = f"import test_transforms_torch as t; t.check_workers({start!r})"
    subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, check=True)
    for function, _ in CELLS:
        record(function, "DataLoader workers")


def test_threads() -> None:
    """Python threads that call functions at once get the same bits."""
    everything = Everything()
    expected = [everything[i] for i in range(len(CELLS))]
    with ThreadPoolExecutor(4) as pool:
        for got, one in zip(pool.map(everything.__getitem__, range(len(CELLS))), expected, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(got, one, strict=True))


def test_opcheck_of_other_overloads() -> None:
    """Those that no function's example has called: opcheck sees every overload, whatever its tensors."""
    x, g = torch.randn(3, 32), torch.randn(3, 32)
    tensors = {
        "s": torch.full((3, 2), 0.1),
        "g": torch.tensor(0.5),
        "p": torch.zeros(3, 2, dtype=torch.uint8),
        "k": torch.tensor([3, 4], dtype=torch.int32),
        "z": torch.full((3, 2), 2, dtype=torch.int32),
        "n": torch.tensor(8.0),
        "c": torch.zeros(3, 32, dtype=torch.int8),
    }
    stored = {"g": ("fp4", "scale=e4m3", torch.float8_e4m3fn), "p": ("int5", "scale=microexponents", torch.int8)}
    for op, kinds, name, out in OVERLOADS:
        overload = getattr(getattr(torch.ops.quark_kernels, op.name), name.partition(".")[2] or "default")
        extra = next((k for k in "gp" if OPTIONAL[k] in name), None)
        form, scale, dtype = stored[extra] if extra else ("int8", "", torch.float32)
        if op.has_one_scale:
            tensors["s"], tensors["z"], block = torch.ones(1, 1), torch.ones(1, 1, dtype=torch.int32), "block=0,0"
        else:
            tensors["s"], tensors["z"] = torch.full((3, 2), 0.1), torch.full((3, 2), 2, dtype=torch.int32)
            block = "block=1,16"
        tensors["s"] = tensors["s"].to(dtype) if dtype != torch.int8 else torch.zeros(3, 2, dtype=dtype)
        tensors["q"] = torch.zeros(3, 32, dtype=torch.uint8 if form == "fp4" else torch.int8)
        words = [form, scale, block, "rounding=stochastic" if "key" in name else ""]
        words += ["asymmetric"] if "z" in op.outs and "zero_point" in name else []
        words += [f"scales={str(dtype).removeprefix('torch.')}"] if extra and op.is_dynamic else []
        if op.name in ("pack", "unpack"):
            words = ["codes", "bits=8", "packed", "length=32", f"dtype={'uint8' if op.name == 'pack' else 'int8'}"]
            tensors["q"] = torch.zeros(3, 32, dtype=torch.uint8)
        if op.name == "convert":
            words = ["codes", "bits=8", "dtype=bfloat16"]
        if op.name == "dequantize":
            words.append("dtype=float32")
        data = iter((x, g))
        arguments = [tensors[k] if k != "x" else next(data) for k in kinds]
        opcheck(overload, (*arguments, " ".join(w for w in words if w), *([torch.empty_like(x)] if out else [])))


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered:UserWarning")
def test_gradients_through_a_twin_are_needed(monkeypatch: Any) -> None:
    """These tests see it where a gradient is zero without a word: here a bare operator is called instead."""
    function, variant = next(cell for cell in FIRST if cell[0].name == "fake_quantize")
    call, arrays = call_of(function, variant), example(variant)
    g = cotangent(call(*arrays)[0])
    expected = gradients(call, variant, arrays, g)
    monkeypatch.setattr("quark_torch.functions.is_recorded", lambda t: False)
    wrong = pulled_back(call, variant, arrays, g)
    assert not wrong[0].any()
    with pytest.raises(AssertionError):
        same(wrong, expected)


def test_import_leaves_the_compiler_alone() -> None:
    """Importing quark_torch imports neither Dynamo nor DTensor, which take longer than torch itself."""
    heavy = "{'torch._dynamo', 'torch.distributed.tensor'}"
    script = f"import sys, torch, quark_torch; sys.exit(bool({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
