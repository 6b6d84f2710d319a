"""What only a GPU shows: ``pytest --device cuda`` runs these, and the suite's other tests with arrays there.

``QUARK_EXHAUSTIVE=1`` adds all 2^32 float32 inputs of every format of up to 8 bits.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from quark_kernels import PRESETS, QuantSpec, _core
from quark_kernels.formats import FORMATS

pytestmark = pytest.mark.usefixtures("cuda")
SMALL = [name for name, row in FORMATS.items() if row.bits <= 8 and name != "int5"]


@pytest.fixture
def cuda(device: str) -> str:
    if device == "cpu":
        pytest.skip("needs a GPU: pytest --device cuda")
    return device


@pytest.fixture
def torch(cuda: str) -> Any:
    module = pytest.importorskip("torch")
    assert module.cuda.is_available(), "--device cuda, but torch has no GPU"
    return module


def quark() -> Any:
    import quark_torch

    return quark_torch


def same(a: Any, b: Any) -> bool:
    """Whether tensors, on any devices, have the same bits."""
    return a.shape == b.shape and bool((a.detach().cpu().view(_int(a)) == b.detach().cpu().view(_int(b))).all())


def _int(t: Any) -> Any:
    import torch

    return getattr(torch, f"int{8 * t.element_size()}")


def same_parts(q: Any, p: Any) -> bool:
    pairs = [(getattr(q, name), getattr(p, name)) for name in q.ARRAYS]
    return all(a is b is None or same(a, b) for a, b in pairs)


def all_words(torch: Any, dtype: Any) -> Any:
    """All 65,536 numbers of 16 bits."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


def chunks_of_floats(torch: Any, device: str) -> Iterator[Any]:
    """All float32 numbers."""
    step = 2**26
    for begin in range(-(2**31), 2**31, step):
        yield torch.arange(begin, begin + step, dtype=torch.int32, device=device).view(torch.float32)


# ---- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rounding", ["half_even", "half_up", "half_away", "floor", "ceil", "toward_zero"])
@pytest.mark.parametrize("name", SMALL)
def test_all_16_bit_inputs(torch: Any, name: str, rounding: str, dtype: str) -> None:
    x = all_words(torch, getattr(torch, dtype))
    spec = QuantSpec(name, rounding=rounding)
    for scale in (1.0, 0.37, 2.0**-14):
        s = torch.tensor(scale)
        on_cpu, on_gpu = (quark().quantize(x.to(d), spec, scale=s.to(d)) for d in ("cpu", "cuda"))
        assert same_parts(on_cpu, on_gpu)
        assert same(on_cpu.dequantize(), on_gpu.dequantize())
        assert same(quark().fake_quantize(x, spec, scale=s), quark().fake_quantize(x.cuda(), spec, scale=s.cuda()))


@pytest.mark.skipif(not os.environ.get("QUARK_EXHAUSTIVE"), reason="minutes: set QUARK_EXHAUSTIVE=1")
@pytest.mark.parametrize("name", SMALL)
def test_all_float32_inputs(torch: Any, name: str) -> None:
    scale = torch.tensor(0.37)
    spec = QuantSpec(name)
    for x in chunks_of_floats(torch, "cuda"):
        y = quark().fake_quantize(x, spec, scale=scale.cuda())
        assert same(y, quark().fake_quantize(x.cpu(), spec, scale=scale))
        q = quark().quantize(x, spec, scale=scale.cuda(), packed=False)
        assert same_parts(q, quark().quantize(x.cpu(), spec, scale=scale, packed=False))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", list(PRESETS))
@pytest.mark.parametrize("shape", [(4096, 4096), (513, 1000), (7, 33), (16, 8, 3, 3)], ids=str)
def test_presets(torch: Any, name: str, shape: tuple[int, ...], dtype: str) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape) * torch.exp(3 * torch.randn(shape))).to(getattr(torch, dtype))
    on_cpu, on_gpu = quark().quantize(x, PRESETS[name]), quark().quantize(x.cuda(), PRESETS[name])
    assert same_parts(on_cpu, on_gpu)
    assert same(on_cpu.dequantize(), on_gpu.dequantize())
    assert same(quark().fake_quantize(x, PRESETS[name]), quark().fake_quantize(x.cuda(), PRESETS[name]))


@pytest.mark.parametrize("axis", [None, 0, -1])
def test_learned_scales(torch: Any, axis: int | None) -> None:
    torch.manual_seed(0)
    grads = []
    for device in ("cpu", "cuda"):
        x = torch.linspace(-3, 3, 2**20).reshape(1024, 1024).to(device).requires_grad_()
        n = 1 if axis is None else 1024
        s = torch.full((n,) if n > 1 else (), 0.03, device=device).requires_grad_()
        y = quark().lsq_quantize(x, s, quant_min=-8, quant_max=7, axis=axis)
        grads.append(torch.autograd.grad((y * y).sum() / 2, (x, s)))
    assert all(same(a, b) for a, b in zip(*grads, strict=True))


def test_long_arrays(torch: Any) -> None:
    """More than 2^31 elements: indices have 64 bits."""
    n = 2**31 + 4096
    if torch.cuda.mem_get_info()[0] < 4 * n:
        pytest.skip(f"needs {4 * n >> 30} GiB of free memory on the GPU")
    x = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    x[-4096:] = 1.0
    q = quark().quantize(x, "int8", scale=torch.tensor(0.5, device="cuda"))
    assert int(q.qvalue[-4096:].sum()) == 2 * 4096
    assert int(q.qvalue[:4096].sum()) == 0


# ---- streams ---------------------------------------------------------------------------------------------------------


RANDOM = QuantSpec("int8", rounding="stochastic")
CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "given": lambda x, s: quark().fake_quantize(x, "int8", scale=s),
    "per tensor": lambda x, s: quark().fake_quantize(x, "int8"),
    "mxfp4": lambda x, s: quark().quantize(x, PRESETS["mxfp4"]).qvalue,
    "nvfp4": lambda x, s: quark().quantize(x, PRESETS["nvfp4"]).qvalue,
    "numbers": lambda x, s: quark().fake_quantize(x, RANDOM, scale=0.05, zero_point=3, seed=7),
    "lsq": lambda x, s: quark().lsq_quantize(x, s, quant_min=-8, quant_max=7),
    "tqt": lambda x, s: quark().tqt_quantize(x, s, bits=4),
    "mse": lambda x, s: quark().choose_qparams(x, "int8", method="mse")[0],
}


@pytest.mark.parametrize("name", list(CALLS))
def test_graph_capture(torch: Any, name: str) -> None:
    call, s = CALLS[name], torch.tensor(0.05, device="cuda")
    x = torch.randn(512, 512, device="cuda")
    call(x, s)  # plans, and memory
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(x, s)
    x.copy_(torch.randn(512, 512))
    graph.replay()
    assert same(y, call(x.cpu(), s.cpu()))


def test_the_current_stream(torch: Any) -> None:
    """A call waits for what its stream is doing, and for nothing else."""
    s, x = torch.tensor(0.05, device="cuda"), torch.zeros(2**20, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        quark().fake_quantize(x.fill_(0.5), "int8", scale=s)  # the first call loads the kernel, and waits
        torch.cuda._sleep(0)
        stream.synchronize()
        torch.cuda._sleep(50_000_000)
        x.fill_(1.0)
        y = quark().fake_quantize(x, "int8", scale=s)
    assert not stream.query(), "the call waited for the stream"
    stream.synchronize()
    assert same(y, torch.full((2**20,), float(y[0])))
    assert float(y[0]) == pytest.approx(1.0, abs=0.05)


def test_two_streams_and_two_threads(torch: Any) -> None:
    x = torch.randn(1024, 1024)
    expected = {name: call(x, torch.tensor(0.05)) for name, call in CALLS.items()}
    wrong: list[str] = []

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            on_gpu, s = x.cuda(), torch.tensor(0.05, device="cuda")
            for _ in range(20):
                wrong.extend(name for name, call in CALLS.items() if not same(call(on_gpu, s), expected[name]))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- frameworks ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # torch's own, in Inductor
def test_torch_compile(torch: Any) -> None:
    x = torch.randn(256, 256, device="cuda")
    compiled = torch.compile(lambda v: quark().fake_quantize(v * 2, PRESETS["mxfp8_e4m3"]), fullgraph=True)
    assert same(compiled(x), quark().fake_quantize((x * 2).cpu(), PRESETS["mxfp8_e4m3"]))


def test_several_devices(torch: Any) -> None:
    x = torch.randn(4, 4, device="cuda")
    with pytest.raises(ValueError, match=r"scale is on cpu; .* cuda:0"):
        quark().fake_quantize(x, "int8", scale=torch.tensor(0.1))
    tensors = (x, torch.tensor([[0.1]]))
    with pytest.raises(ValueError, match="input 1 is on the CPU; the call is on cuda:0"):
        _core.fake_quantize(tensors, (torch.empty_like(x),), "int8 block=0,0")


def test_interop_shares_memory(torch: Any) -> None:
    jax = pytest.importorskip("jax")
    from quark_kernels.interop import to_jax, to_torch

    x = torch.randn(64, 64, device="cuda")
    q = quark().quantize(x, PRESETS["fp8_e4m3"])
    moved = to_jax(q, copy=False)
    assert moved.qvalue.unsafe_buffer_pointer() == q.qvalue.data_ptr()
    assert same_parts(to_torch(moved, copy=False), q)
    back = to_torch(jax.jit(lambda p: p.dequantize())(moved))
    assert same(back, q.dequantize())


def test_jit(torch: Any) -> None:
    jax = pytest.importorskip("jax")
    import quark_jax

    x = np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32)
    on_gpu = jax.device_put(x, jax.devices("gpu")[0])
    for name in PRESETS:
        y = jax.jit(lambda v, preset=PRESETS[name]: quark_jax.fake_quantize(v, preset))(on_gpu)
        assert y.devices() == {jax.devices("gpu")[0]}
        expected = quark().fake_quantize(torch.from_numpy(x), PRESETS[name]).numpy()
        assert (np.asarray(y).view(np.int32) == expected.view(np.int32)).all(), name


def test_info(torch: Any) -> None:
    import quark_kernels

    state = quark_kernels.info()["hip" if torch.version.hip else "cuda"]
    assert state.startswith("compiled for")
