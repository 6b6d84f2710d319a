"""The calls that are timed, made in the process that measures; and what each must compute."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from math import log, prod
from typing import Any, NamedTuple

from cases import CHAIN, COLUMNS, FEW, Kernel, Overhead, Peer
from plain import Jnp, Torch, expression
from quark_kernels import PRESETS, _core, documented, schema
from quark_kernels.documented import Given
from quark_kernels.schema import OPS, OpSpec

Call = Callable[[], Any]

CORES = sorted(os.sched_getaffinity(0))  # before OpenMP binds this thread to one of them


class Contest(NamedTuple):
    """Calls to be timed in turns."""

    calls: dict[str, Call]
    """By name: "quark", the copies, the peers."""
    bytes: int
    """What must be read or written once: the size of all inputs and outputs."""
    pairs: Callable[[], Iterator[tuple[Any, Any]]]
    """Computes what ours gives, and what it should."""
    tolerance: float = 1e-3
    """Mean difference to mean: a reciprocal instead of a division, or a tie that goes up, moves a few numbers."""

    def check(self) -> None:
        """Stop unless all compute the same thing."""
        for ours, expected in self.pairs():
            difference = float(abs(ours - expected).mean() / abs(expected).mean())
            if not difference < self.tolerance:
                raise AssertionError(f"what is compared computes something else: mean difference {difference:.2g}")


# ---- copies ----------------------------------------------------------------------------------------------------------


class Memcpy:
    """libc's memcpy, in as many parts as there are threads: ctypes lets go of the GIL."""

    def __init__(self, threads: int) -> None:
        self.memcpy = ctypes.CDLL(None).memcpy
        self.memcpy.argtypes, self.memcpy.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_void_p
        self.others = [
            ThreadPoolExecutor(1, initializer=os.sched_setaffinity, initargs=(0, {core})) for core in CORES[1:threads]
        ]

    def call(self, target: int, source: int, size: int) -> Call:
        """Return the call that copies between two addresses."""
        if not self.others:
            return partial(self.memcpy, target, source, size)
        part = size // (len(self.others) + 1) // 64 * 64

        def run() -> None:
            running = [
                other.submit(self.memcpy, target + i * part, source + i * part, part)
                for i, other in enumerate(self.others)
            ]
            done = len(running) * part
            self.memcpy(target + done, source + done, size - done)
            for copy in running:
                copy.result()

        return run


memcpy = cache(Memcpy)


def copies(inputs: Sequence[Any], outputs: Sequence[Any], threads: int) -> dict[str, Call]:
    """Return copies that move as many bytes as these tensors have: half of them read, half written.

    On several threads torch's too, which starts its threads sooner.

    Where one input and one output are as large as that, between these: the copy has the operator's pages.
    """
    import torch

    size = nbytes(inputs, outputs) // 2
    source, target = (max(tensors, key=lambda t: int(t.nbytes)) for tensors in (inputs, outputs))
    if source.nbytes == target.nbytes and source.nbytes > 0.99 * size:
        source, target = (t.view(-1).view(torch.uint8) for t in (source, target))
    else:
        source, target = (torch.full((size,), i, dtype=torch.uint8) for i in range(2))
    call: Any = memcpy(threads).call(target.data_ptr(), source.data_ptr(), source.nbytes)
    call.tensors = source, target  # alive as long as their addresses are in use
    if threads == 1:
        return {"memcpy": call}
    return {"memcpy": call, "torch copy_": lambda: target.copy_(source)}


def nbytes(*tensors: Sequence[Any]) -> int:
    """Return the size of tensors together."""
    return sum(int(t.nbytes) for some in tensors for t in some)


# ---- kernels ---------------------------------------------------------------------------------------------------------


@cache
def random_block() -> Any:
    """Return a million normally distributed numbers."""
    import torch

    return torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))


def normal(elements: int, dtype: str = "float32") -> Any:
    """Return rows of normally distributed numbers; many repeat a million."""
    block = random_block()[:elements]
    x = block.new_empty(elements, dtype=torch_dtype(dtype))
    x.view(-1, len(block)).copy_(block)
    return x.view(-1, min(COLUMNS, elements))


def torch_dtype(name: str) -> Any:
    """Return torch's dtype of a name of ours."""
    import torch

    return getattr(torch, name)


def allocate(op: str, spec: OpSpec, shape: tuple[int, ...], dtype: str) -> tuple[Any, ...]:
    """Return an operator's outputs, every page of them touched."""
    outs = tuple(
        random_block().new_empty(size, dtype=torch_dtype(name))
        for size, name in schema.outputs(OPS[op], spec, shape, dtype)
    )
    for out in outs:
        out.view(-1).view(torch_dtype("uint8")).fill_(1)
    return outs


def operands(case: Kernel, elements: int, threads: int) -> tuple[str, OpSpec, dict[str, Any]]:
    """Return an operator, its spec, and its inputs by their letter (d: the gradient to y)."""
    import torch

    x = normal(elements, case.dtype)
    shape = tuple(x.shape)
    packed = case.spec.element.bits < 8 and case.operation != "fake_quantize"
    _, spec = schema.plan(case.spec, shape, packed=packed)
    tensors = {"x": x, "k": torch.tensor([1, 2], dtype=torch.int32)}
    op = f"{case.operation}_dynamic" if case.dynamic else case.operation
    if not case.dynamic:
        inputs = [tensors[letter] for letter in schema.given(OPS["quantize_dynamic"], spec, 2)]
        outs = allocate("quantize_dynamic", spec, shape, case.dtype)
        _core.quantize_dynamic(tuple(inputs), outs, spec.text, threads)
        tensors |= zip(schema.made(OPS["quantize_dynamic"], spec), outs, strict=True)
    if case.operation == "dequantize":
        spec = replace(spec, dtype=case.dtype)
    elif case.operation.endswith("_backward"):
        spec, scale, number = learned(case, shape, tensors["s"])
        tensors |= {"s": scale, "n": torch.tensor(number), "d": x.flip(0)}
    letters = schema.given(OPS[op], spec, len(OPS[op].ins)).replace("xx", "xd")
    return op, spec, {letter: tensors[letter] for letter in letters if letter in tensors}


def learned(case: Kernel, shape: tuple[int, ...], scale: Any) -> tuple[OpSpec, Any, float]:
    """Return what LSQ's and TQT's gradients take: a spec, a scale or threshold that some of x exceeds, a number."""
    if case.operation == "tqt_backward":
        tqt, domain = documented.everyday_tqt_plan(shape, Given(()), None, 8, "half_even")
        return tqt.backward, scale.new_ones(1, 1), domain
    axis = 0 if case.along == "per channel" else None
    lsq = documented.everyday_lsq_plan(shape, Given((scale.numel(),)), None, -128, 127, axis, "half_even")
    return lsq.backward, scale / 2, documented.grad_factor(prod(shape), scale.numel(), 127)


def kernel_contest(case: Kernel, elements: int, threads: int) -> Contest:
    """Compare an operator of the core with a copy; and, untimed, with the same in plain torch."""
    op, spec, tensors = operands(case, elements, threads)
    shape = (elements // COLUMNS or 1, min(COLUMNS, elements))
    inputs = tuple(tensors.values())
    outputs = allocate(op, spec, shape, case.dtype)
    call = partial(getattr(_core, op), inputs, outputs, spec.text, threads)

    def pairs() -> Iterator[tuple[Any, Any]]:
        call()
        expected = in_plain_torch(case, spec.scale_shape(shape), tensors)
        for ours, right in zip(outputs, expected, strict=False):
            right = right.to(ours.dtype) if case.operation == "fake_quantize" else right  # a 16-bit result is rounded
            yield ours.float().view(-1), right.float().reshape(-1)

    calls: dict[str, Call] = {"quark": call, **copies(inputs, outputs, threads)}
    return Contest(calls, nbytes(inputs, outputs), pairs, 0.1 if is_near_x(case) else 2e-3)


def is_near_x(case: Kernel) -> bool:
    """Return whether plain torch has no short way to the result, which is then only compared with x."""
    return case.rounding == "stochastic" or case.spec.scale_format == "microexponents"


def in_plain_torch(case: Kernel, scale_shape: tuple[int, ...], tensors: dict[str, Any]) -> list[Any]:
    """Return the first outputs, by another way."""
    data = tensors["q" if case.operation == "dequantize" else "x"]
    if is_near_x(case):
        return [data]
    if data.dtype.itemsize > 1:
        data = data.float()
    data = data.reshape(*scale_shape, -1)
    scale: Any = None
    if "s" in tensors:
        scale = (tensors["s"].float() * tensors.get("g", 1)).unsqueeze(-1)
    if case.operation == "lsq_backward":
        dx, ds = Torch().lsq_gradients(data, tensors["d"].reshape(data.shape), scale)
        return [dx, ds * tensors["n"]]
    if case.operation == "tqt_backward":
        scale = scale.ceil().exp2() / tensors["n"]
        dx, ds = Torch().lsq_gradients(data, tensors["d"].reshape(data.shape), scale)
        return [dx, ds * scale.squeeze(-1) * log(2)]
    return [expression(Torch(), case.operation, case.spec)(data, scale)]


# ---- peers: what allocates its result --------------------------------------------------------------------------------


def peer_contest(case: Peer, elements: int, names: Sequence[str]) -> Contest:
    """Compare a public function with the peers of these names."""
    return (torch_contest if case.framework == "torch" else jax_contest)(case, elements, names)


def torch_contest(case: Peer, elements: int, names: Sequence[str]) -> Contest:
    """Compare a function of quark_torch."""
    import torch

    import quark_torch

    x, f = normal(elements), Torch()
    packed = case.spec.element.bits < 8
    q = quark_torch.quantize(x, case.spec, packed=packed)
    has_blocks = case.spec.scale_format != "float32"
    s = None if has_blocks else q.scale
    codes_or_x = q.qvalue if case.operation == "dequantize" else x
    grouped = codes_or_x.reshape(*(q.scale.shape if q.scale.dim() else (1, 1)), -1)
    scale = None if s is None else s.reshape(*grouped.shape[:-1], 1)
    formula = expression(f, case.operation, case.spec)
    ours: dict[str, Call] = {
        "fake_quantize": lambda: quark_torch.fake_quantize(x, case.spec, scale=s),
        "quantize": lambda: quark_torch.quantize(x, case.spec, scale=s, packed=packed).qvalue,
        "dequantize": lambda: quark_torch.dequantize(q),
    }
    peers: dict[str, Callable[[], Call]] = {
        "torch eager": lambda: partial(formula, grouped, scale),
        "torch.compile": lambda: partial(compiled(formula), grouped, scale),
        "torch.fake_quantize_per_tensor_affine": lambda: partial(
            torch.fake_quantize_per_tensor_affine, x, q.scale.item(), 0, -128, 127
        ),
        "torch.fake_quantize_per_channel_affine": lambda: partial(
            torch.fake_quantize_per_channel_affine,
            *(x, q.scale.flatten(), torch.zeros(len(x), dtype=torch.int32), 0, -128, 127),
        ),
        "torchao": lambda: torchao_call(case.preset, x, q),
        "ml_dtypes": lambda: ml_dtypes_call(case.preset, x, s),
    }
    calls = {"quark": ours[case.operation], "copy": x.clone} | {name: peers[name]() for name in names}
    result = calls["quark"]()

    def pairs() -> Iterator[tuple[Any, Any]]:
        for name in names:
            theirs = calls[name]()
            if name == "ml_dtypes":
                theirs = torch.from_numpy(theirs.view("uint8")).view(result.dtype)
            yield result.float().view(-1), theirs.float().reshape(-1)

    return Contest(calls, nbytes([codes_or_x, result, q.scale]), pairs)


def compiled(formula: Callable[..., Any]) -> Callable[..., Any]:
    """Return a formula as torch.compile makes it for the shapes of its first call."""
    import torch

    torch._dynamo.reset()  # else other shapes of the same formula make it dynamic
    return torch.compile(formula, dynamic=False, fullgraph=True)


def torchao_call(preset: str, x: Any, q: Any) -> Call:
    """Return torchao's function for a preset with blocks."""
    import torch

    mx, nvfp4 = (import_module(f"torchao.prototype.mx_formats.{name}_tensor") for name in ("mx", "nvfp4"))
    if preset == "nvfp4":
        return lambda: nvfp4.nvfp4_quantize(x, 16, x.abs().amax() / (448 * 6))[1].view(torch.uint8)
    element = {"mxfp4": torch.float4_e2m1fn_x2, "mxfp8_e4m3": torch.float8_e4m3fn}[preset]
    return lambda: mx.to_mx(x, element, 32)[1].view(q.qvalue.dtype)


def ml_dtypes_call(preset: str, x: Any, s: Any) -> Call:
    """Return NumPy's cast to a dtype of ml_dtypes."""
    import ml_dtypes
    import numpy as np

    assert preset == "fp8_e4m3"
    numbers, scale = x.numpy(), s.numpy()
    return lambda: np.clip(numbers / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)


def jax_contest(case: Peer, elements: int, names: Sequence[str]) -> Contest:
    """Compare a function of quark_jax, under jit, with jnp's, under jit."""
    import jax
    import jax.numpy as jnp

    import quark_jax

    x = jax.random.normal(jax.random.key(0), (elements // COLUMNS, COLUMNS))
    q = quark_jax.quantize(x, case.spec)
    ours: dict[str, tuple[Any, ...]] = {
        "fake_quantize": (lambda x, s: quark_jax.fake_quantize(x, case.spec, scale=s), x, q.scale),
        "quantize": (lambda x, s: quark_jax.quantize(x, case.spec, scale=s).qvalue, x, q.scale),
        "dequantize": (quark_jax.dequantize, q),
    }
    codes_or_x = q.qvalue if case.operation == "dequantize" else x
    grouped = codes_or_x.reshape(*(q.scale.shape or (1, 1)), -1)
    formula = expression(Jnp(), case.operation, case.spec)
    peers: dict[str, tuple[Any, ...]] = {"jnp jitted": (formula, grouped, q.scale.reshape(*grouped.shape[:-1], 1))}

    def jitted(function: Callable[..., Any], *arguments: Any) -> Call:
        run = jax.jit(function)
        return lambda: run(*arguments).block_until_ready()

    calls = {"quark": jitted(*ours[case.operation]), "copy": jitted(jnp.copy, x)}
    calls |= {name: jitted(*peers[name]) for name in names}
    result = calls["quark"]()

    def pairs() -> Iterator[tuple[Any, Any]]:
        for name in names:
            yield result.astype(jnp.float32).ravel(), calls[name]().astype(jnp.float32).ravel()

    return Contest(calls, nbytes([codes_or_x, result, q.scale]), pairs)


# ---- overhead --------------------------------------------------------------------------------------------------------


def overhead_contest(case: Overhead) -> Contest:
    """Compare a call on few elements with the yardstick's."""
    return (torch_overhead if case.framework == "torch" else jax_overhead)(case)


def torch_overhead(case: Overhead) -> Contest:
    """Compare a function of quark_torch with torch's own fake quantization."""
    import torch

    import quark_torch
    from quark_torch import kernel

    x, scale = normal(FEW), torch.tensor(0.05)
    if "gradient recorded" in case.name:
        x = x.clone().requires_grad_()
    q = quark_torch.quantize(x, "int8", scale=scale)
    documented_function: Any = kernel.ScaledFakeQuantizeFunction.apply
    calls: dict[str, Call] = {
        "fake_quantize": lambda: quark_torch.fake_quantize(x, "int8", scale=scale),
        "fake_quantize of a number as scale": lambda: quark_torch.fake_quantize(x, "int8", scale=0.05),
        "ScaledFakeQuantizeFunction.apply": lambda: documented_function(
            "int8", x, scale, None, None, None, -128, 127, 8, "per_tensor", None
        ),
        "quantize": lambda: quark_torch.quantize(x, "int8", scale=scale),
        "dequantize": lambda: quark_torch.dequantize(q),
    }
    ours = calls[case.name.partition(",")[0]]
    yardstick = partial(torch.fake_quantize_per_tensor_affine, x, 0.05, 0, -128, 127)

    def pairs() -> Iterator[tuple[Any, Any]]:
        result = ours()
        result = result.dequantize() if case.name == "quantize" else result
        yield result.detach(), yardstick().detach()

    return Contest({"quark": ours, case.yardstick: yardstick}, 2 * x.nbytes, pairs)


def jax_overhead(case: Overhead) -> Contest:
    """Compare a function of quark_jax with an addition: as a jitted call, or in chains inside one."""
    import jax
    import jax.numpy as jnp

    import quark_jax

    x, scale = jax.random.normal(jax.random.key(0), (FEW,)), jnp.float32(0.05)

    def jitted(step: Callable[..., Any], length: int) -> Call:
        def chain(x: Any, s: Any) -> Any:
            for _ in range(length):
                x = step(x, s)
            return x

        run = jax.jit(chain)
        return lambda: run(x, scale).block_until_ready()

    def step(x: Any, s: Any) -> Any:
        return quark_jax.fake_quantize(x, "int8", scale=s)

    calls = {"quark": jitted(step, 1), case.yardstick: jitted(lambda x, s: x + 1, 1)}
    if case.name == "fake_quantize inside a jit":
        calls["quark, longer chain"] = jitted(step, 1 + CHAIN)
    formula = expression(Jnp(), "fake_quantize", PRESETS["int8"])

    def pairs() -> Iterator[tuple[Any, Any]]:
        yield calls["quark"](), formula(x, scale)

    return Contest(calls, 2 * x.nbytes, pairs)
