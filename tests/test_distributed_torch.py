"""Operators and functions on DTensors, in real processes: the results are those of one process.

This file is also the program of each process: the cases of a world run in one set of processes, which write what came
of each case; the tests read it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quark_kernels import PerBlock, PerChannel, PerGroup, PerToken, QuantSpec, documented
from quark_kernels.schema import OPS, OpSpec, codes_spec, made, op_spec
from quark_kernels.spec import PRESETS
from test_rules import CALLS, data, inputs
from transforms import CELLS, IDS, Function, Variant, record

torch = pytest.importorskip("torch")
if not torch.distributed.is_available():
    pytest.skip("torch has no distributed tensors", allow_module_level=True)

import quark_torch
import quark_torch.kernel
import quark_torch.nn

SECONDS = 400
"""No world takes longer, unless it hangs."""

CASES: dict[int, dict[str, Callable[[], None]]] = {2: {}, 4: {}}
"""Number of processes -> what they run."""


def case(world: int, name: str, *arguments: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let processes run the function, called with these arguments."""

    def add(run: Callable[..., None]) -> Callable[..., None]:
        name_ = name.replace(" ", "_")
        assert name_ not in CASES[world], name_
        CASES[world][name_] = lambda: run(*arguments)
        return run

    return add


# ---- processes -------------------------------------------------------------------------------------------------------


def work(rank: int, world: int, folder: Path, only: str = "") -> None:
    """Run a world's cases, those whose names match, as one of its processes."""
    warnings.filterwarnings("error")
    warnings.filterwarnings("ignore", message=".*should not be instantiated")  # Dynamo's own
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    with (folder / f"{rank}.jsonl").open("w") as results:
        for name, run in CASES[world].items():
            if not re.search(only, name):
                continue
            try:
                run()
                outcome = ""
            except Exception:
                outcome = traceback.format_exc()
            results.write(json.dumps([name, outcome]) + "\n")
            results.flush()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, str]]:
    """What came of the cases of a world: "" or what went wrong in the first process where it did."""
    found: dict[int, dict[str, str]] = {}

    def run(world: int) -> dict[str, str]:
        if world not in found:
            found[world] = run_world(world, tmp_path_factory.mktemp(f"world{world}"))
        return found[world]

    return run


def run_world(world: int, folder: Path) -> dict[str, str]:
    processes = []
    for rank in range(world):
        with (folder / f"{rank}.err").open("w") as errors:
            command = [sys.executable, __file__, str(rank), str(world), str(folder)]
            processes.append(subprocess.Popen(command, cwd=Path(__file__).parent, stderr=errors))
    end = time.monotonic() + SECONDS
    try:
        for process in processes:
            process.wait(max(end - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
            process.wait()
    found: dict[str, str] = {}
    for rank in range(world):
        lines = (folder / f"{rank}.jsonl").read_text().splitlines() if (folder / f"{rank}.jsonl").exists() else []
        ran = dict(json.loads(line) for line in lines)
        last = (folder / f"{rank}.err").read_text()[-2000:]
        for name in CASES[world]:
            outcome = ran.get(name, f"it didn't end; standard error: {last}")
            if outcome and not found.get(name):
                found[name] = f"rank {rank}: {outcome}"
            found.setdefault(name, "")
    return found


# ---- tensors ---------------------------------------------------------------------------------------------------------


def tensor(a: Any) -> Any:
    """A NumPy array as a tensor."""
    a = np.array(a)
    name = a.dtype.name
    if name in ("bfloat16",) or name.startswith("float8"):
        return torch.from_numpy(a.view(f"uint{8 * a.itemsize}")).view(getattr(torch, name))
    return torch.from_numpy(a)


_meshes: dict[tuple[int, ...], Any] = {}


def mesh_of(*sizes: int) -> Any:
    if sizes not in _meshes:
        _meshes[sizes] = torch.distributed.device_mesh.init_device_mesh("cpu", sizes)
    return _meshes[sizes]


def placements(text: str) -> list[Any]:
    """Placements: a digit is the axis that a mesh dim shards, "r" replicates, "p" is a partial sum."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    return [Replicate() if c == "r" else Partial() if c == "p" else Shard(int(c)) for c in text]


def placed(t: Any, mesh: Any, text: str) -> Any:
    """A DTensor of a tensor that every process has."""
    from torch.distributed.tensor import DTensor, Replicate

    if "p" in text:
        at = mesh.get_coordinate()
        mine = all(c != "p" or i == 0 for c, i in zip(text, at, strict=True))
        sharded = placed(t, mesh, text.replace("p", "r"))
        local = sharded.to_local() if mine else torch.zeros_like(sharded.to_local())
        return DTensor.from_local(local, mesh, placements(text), shape=t.shape, stride=t.stride())
    is_float8 = t.element_size() == 1 and t.is_floating_point()
    raw = t.view(torch.uint8) if is_float8 else t
    d = DTensor.from_local(raw, mesh, [Replicate()] * mesh.ndim).redistribute(placements=placements(text))
    if not is_float8:
        return d
    return DTensor.from_local(d.to_local().view(t.dtype), mesh, d.placements, shape=t.shape, stride=t.stride())


def whole(d: Any) -> Any:
    """The tensor that a DTensor stands for."""
    from torch.distributed.tensor import DTensor

    if not isinstance(d, DTensor):
        return d
    if d.element_size() > 1 or not d.is_floating_point():
        return d.full_tensor()
    raw = DTensor.from_local(
        d.to_local().view(torch.uint8), d.device_mesh, d.placements, shape=d.shape, stride=d.stride()
    )
    return raw.full_tensor().view(d.dtype)


def expect_same(got: Any, want: Any, what: str) -> None:
    """Raise unless two tensors have the same bits."""
    assert got.dtype == want.dtype, what
    assert got.shape == want.shape, what
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (got, want))
    same = torch.equal(a, b)
    assert same, f"{what}: {int((a != b).sum())} of {a.numel()} bytes differ"


def expect_near(got: Any, want: Any, size: Any, what: str) -> None:
    """Raise unless sums agree to 1e-6 of the sum of the magnitudes."""
    assert got.dtype == want.dtype, what
    assert got.shape == want.shape, what
    error = (got.double() - want.double()).abs()
    good = (error <= 1e-6 * size.double() + 2.0**-146) | (got.isnan() & want.isnan())
    bad = ~good
    assert not bad.any(), f"{what}: {got[bad]} isn't {want[bad]}, magnitudes {size[bad]}"


# ---- operators -------------------------------------------------------------------------------------------------------


def terms(name: str, spec: OpSpec, arrays: list[np.ndarray], kinds: str) -> np.ndarray:
    """What a scale's gradient is the sum of, for every element: each is an example of its own."""
    shape = arrays[0].shape
    own = replace(spec, batch=len(shape), block=(), packed=False, length=None)
    given = []
    for kind, a in zip(kinds, arrays, strict=True):
        if kind == "q" and spec.packed:
            bare = codes_spec(spec.bits, signed=spec.words[0].startswith("int"), length=spec.length)
            a = call("unpack", [tensor(a)], "q", bare)[0].numpy()
        if kind in "sz":
            for d, n in enumerate(shape):
                a = np.repeat(a, -(-n // a.shape[d]), d)
            a = a[tuple(slice(n) for n in shape)]
        given.append(a.reshape((1,) * len(shape)) if kind == "n" else a)
    outs = call(name, [tensor(a) for a in given], kinds, own)
    return np.abs(outs[-1].numpy())


def call(name: str, tensors: list[Any], kinds: str, spec: OpSpec) -> list[Any]:
    """Call an operator with inputs of these letters."""
    letters = dict.fromkeys(OPS[name].ins)
    repeated: dict[str, list[Any]] = {kind: [] for kind in letters}
    for kind, t in zip(kinds, tensors, strict=True):
        repeated[kind].append(t)
    row = [repeated[kind].pop(0) if repeated[kind] else None for kind in OPS[name].ins]
    outs = quark_torch.ops.call(name, row, spec)
    return list(outs) if isinstance(outs, tuple) else [outs]


def compare(name: str, spec: OpSpec, x: np.ndarray, mesh: Any, texts: list[str]) -> None:
    """Compare an operator's results on DTensors with those on tensors."""
    from torch.distributed.tensor.debug import CommDebugMode

    arrays, kinds = inputs(name, spec, x)
    want = call(name, [tensor(a) for a in arrays], kinds, spec)
    is_sum = OPS[name].combine == "sum"
    sizes = tensor(group_sums(terms(name, spec, arrays, kinds), spec)) if is_sum else None
    replicated = "r" * mesh.ndim
    for text in texts:
        # Of several tensors of data the first is where the others go.
        first = next(i for i, kind in enumerate(kinds) if kind in ("x" if "p" in text else "xq"))
        given = [placed(tensor(a), mesh, text if i == first else replicated) for i, a in enumerate(arrays)]
        with CommDebugMode() as comms:
            got = call(name, given, kinds, spec)
        used = {str(op).rpartition(".")[2] for op, n in comms.get_comm_counts().items() if n}
        for kind, a, b in zip(made(OPS[name], spec), got, want, strict=True):
            what = f"{kind} of {text}"
            if is_sum and kind == "s":
                expect_near(whole(a), b, sizes, what)
            else:
                expect_same(whole(a), b, what)
            if kind in "xq" and list(a.placements) == placements(text):  # nothing but extremes was sent
                assert used <= ({"all_reduce"} if OPS[name].is_dynamic else set()), f"{what}: {used}"


def group_sums(each: np.ndarray, spec: OpSpec) -> np.ndarray:
    assert spec.block is not None
    for d, b in enumerate(spec.block):
        n = each.shape[d]
        each = np.add.reduceat(each, np.arange(0, n, min(b, n) or n), d)
    return each


def special(shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of every kind."""
    x = data(shape, seed=5)
    x[0, 0, 0], x[1, 1, 1], x[2, 2, 2], x[3, 3, 3] = np.nan, np.inf, -np.inf, -0.0
    return x


for _name, _spec in CALLS:
    _id = f"{_name} {_spec}"

    @case(2, f"operator {_id}", _name, _spec)
    def _(name: str, spec: OpSpec) -> None:
        compare(name, spec, data((16, 8, 64)), mesh_of(2), ["1", *"p" * ("x" in OPS[name].ins)])
        compare(name, spec, special((16, 8, 64)), mesh_of(2), ["0", "2"])

    if {"fp8_e4m3", "uint4", "mx9"} & {_spec.words[0]}:  # the same as others here
        continue

    @case(4, f"operator {_id}", _name, _spec)
    def _(name: str, spec: OpSpec) -> None:
        compare(name, spec, data((16, 8, 64)), mesh_of(2, 2), ["02", "22", "1r"])
        if spec.packed:
            spec = replace(spec, length=48)
        compare(name, spec, data((5, 4, 48)), mesh_of(4), ["0", "1", "2"])


# ---- special placements ----------------------------------------------------------------------------------------------


INT8 = QuantSpec("int8", PerToken())
RANDOM = QuantSpec("int4", rounding="stochastic")


def expect_error(kind: type[Exception], text: str, run: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=re.escape(text)):
        run()


@case(2, "codes alone")
def _() -> None:
    """pack, unpack, convert and quantize_values: what isn't whole bytes on each shard is gathered."""
    mesh = mesh_of(2)
    codes = tensor(np.random.default_rng(0).integers(0, 8, (4, 5, 32), np.uint8))
    x = tensor(data((4, 5, 32)))
    scale = torch.full((4, 5, 2), 0.25)
    spec = op_spec(QuantSpec("fp4", PerGroup(16)), (4, 5, 32))
    for text in "012r":
        for bits in (3, 4, 8):
            want = quark_torch.pack(codes, bits)
            got = quark_torch.pack(placed(codes, mesh, text), bits)
            assert list(got.placements) == placements(text), (bits, text, got.placements)
            expect_same(whole(got), want, f"pack {bits} {text}")
            back = quark_torch.unpack(got, bits, signed=False)
            assert list(back.placements) == placements(text), (bits, text, back.placements)
            expect_same(whole(back), quark_torch.unpack(want, bits, signed=False), f"unpack {bits} {text}")
        odd = quark_torch.pack(placed(codes[..., :30], mesh, text), 3)
        assert list(odd.placements) == placements("r" if text == "2" else text)
        expect_same(whole(odd), quark_torch.pack(codes[..., :30], 3), f"odd pack {text}")
        d = placed(x, mesh, text)
        op, to = documented.conversion("float32", "bfloat16", (4, 5, 32))
        assert op == "convert"
        expect_same(whole(quark_torch.ops.call(op, [d], to)), x.bfloat16(), f"convert {text}")
        got = quark_torch.ops.call("quantize_values", [d, scale], spec)
        assert list(got.placements) == placements(text)
        expect_same(whole(got), quark_torch.ops.call("quantize_values", [x, scale], spec), f"quantize_values {text}")


@case(4, "strided shards")
def _() -> None:
    """Shards of another order, as fully_shard makes them of tensor-parallel weights, are gathered as far as needed."""
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh = mesh_of(2, 2)
    x = tensor(data((8, 32)))
    rows = placed(x, mesh, "r0").to_local()
    mine = rows.chunk(2)[mesh.get_coordinate()[0]]
    d = DTensor.from_local(mine, mesh, [_StridedShard(0, split_factor=2), Shard(0)], shape=x.shape, stride=x.stride())
    expect_same(d.full_tensor(), x, "x")
    for spec in (INT8, QuantSpec("int8"), PRESETS["mxfp4"]):
        expect_same(whole(quark_torch.fake_quantize(d, spec)), quark_torch.fake_quantize(x, spec), str(spec))


@case(4, "part of the processes")
def _() -> None:
    """A mesh need not have all processes; the others have nothing to do."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = DeviceMesh("cpu", [0, 1])
    x = tensor(data((8, 32)))
    rank = torch.distributed.get_rank()
    d = DTensor.from_local(x.chunk(2)[rank % 2], mesh, [Shard(0)], shape=x.shape, stride=x.stride())
    q = quark_torch.quantize(d, "nvfp4")
    y = quark_torch.dequantize(q)
    if rank < 2:
        expect_same(y.full_tensor(), quark_torch.fake_quantize(x, "nvfp4"), "y")
    else:
        assert y.to_local().numel() == 0
        assert y.shape == x.shape


@case(4, "uneven random rounding")
def _() -> None:
    """Each element has its own random word, wherever it lies: forward and backward."""
    shape = (5, 7, 6)
    x = tensor(data(shape))
    w = tensor(data(shape, seed=3))
    scale = torch.full((5, 1, 1), 0.37)
    tokens = QuantSpec("int4", PerChannel(0), rounding="stochastic")
    for mesh, texts in ((mesh_of(4), "012r"), (mesh_of(2, 2), ("01", "10", "22", "2r", "00"))):
        for text in texts:
            for spec, given in ((RANDOM, None), (tokens, None), (tokens, scale)):
                for seed in (7, torch.tensor(-(2**40) + 1), placed(torch.tensor(11), mesh, "r" * mesh.ndim)):
                    plain = seed if isinstance(seed, int) else whole(seed)
                    a, b = x.clone().requires_grad_(), placed(x, mesh, text).requires_grad_()
                    want = quark_torch.fake_quantize(a, spec, scale=given, seed=plain)
                    got = quark_torch.fake_quantize(b, spec, scale=given, seed=seed)
                    expect_same(whole(got), want, f"{spec} {text}")
                    (want * w).sum().backward()
                    got.backward(placed(w, mesh, "r" * mesh.ndim))
                    expect_same(whole(b.grad), a.grad, f"gradient of {spec} {text}")
                    expect_same(
                        whole(quark_torch.quantize(b, spec, scale=given, seed=seed).qvalue),
                        quark_torch.quantize(a, spec, scale=given, seed=plain).qvalue,
                        f"codes of {spec} {text}",
                    )


@case(2, "batches")
def _() -> None:
    """Calls with batch axes, which vmap makes, may be split along these and along an example's axes."""
    mesh = mesh_of(2)
    x = tensor(data((3, 4, 32)))
    key = tensor(np.arange(6, dtype=np.int32).reshape(3, 2))
    one = replace(op_spec(RANDOM, (4, 32)), batch=1)
    scale = torch.tensor([0.1, 0.2, 0.3]).reshape(3, 1, 1)
    want = quark_torch.ops.call("fake_quantize_dynamic", [x, key], one)
    given = quark_torch.ops.call("fake_quantize", [x, scale, None, None, key, None], one)
    for text in "012r":
        d = placed(x, mesh, text)
        got = quark_torch.ops.call("fake_quantize_dynamic", [d, key], one)
        for a, b in zip(got, want, strict=True):
            assert list(got[0].placements) == placements(text)
            expect_same(whole(a), b, f"dynamic {text}")
        expect_same(
            whole(quark_torch.ops.call("fake_quantize", [d, scale, None, None, key, None], one)), given, f"given {text}"
        )


@case(2, "batches of shared data")
def _() -> None:
    """Examples with one data and a key each have scales each, as on one device."""
    x, key = tensor(data((1, 4, 32))), tensor(np.arange(6, dtype=np.int32).reshape(3, 2))
    one = replace(op_spec(RANDOM, (4, 32)), batch=1)
    want = quark_torch.ops.call("fake_quantize_dynamic", [x, key], one)
    for text in "12r":
        got = quark_torch.ops.call("fake_quantize_dynamic", [placed(x, mesh_of(2), text), key], one)
        for a, b in zip(got, want, strict=True):
            expect_same(whole(a), b, f"shared data {text}")


@case(2, "out")
def _() -> None:
    """A result is written where a DTensor's shards are."""
    mesh = mesh_of(2)
    x = tensor(data((6, 32)))
    for spec in (INT8, QuantSpec("int8"), PRESETS["nvfp4"]):
        want = quark_torch.fake_quantize(x, spec)
        for text in "01":
            d, other = placed(x, mesh, text), placed(torch.zeros_like(x), mesh, text)
            before = other.to_local()
            assert quark_torch.fake_quantize(d, spec, out=other) is other
            expect_same(before, other.to_local(), "the same memory")
            expect_same(whole(other), want, f"{spec} {text}")
            assert quark_torch.fake_quantize(d, spec, out=d) is d
            expect_same(whole(d), want, f"{spec} {text} in place")
    d = placed(x, mesh, "0")
    elsewhere = placed(x, mesh, "1")
    expect_error(ValueError, "allowed: the same", lambda: quark_torch.fake_quantize(d, "int8", out=elsewhere))
    expect_error(TypeError, "allowed: a DTensor", lambda: quark_torch.fake_quantize(d, "int8", out=x.clone()))


@case(2, "errors")
def _() -> None:
    """What can't be had says so."""
    from torch.distributed.device_mesh import DeviceMesh

    mesh = mesh_of(2)
    x = tensor(data((6, 32)))
    scale = placed(torch.full((6, 1), 0.1), mesh, "0")
    expect_error(TypeError, "for its data, and DTensors", lambda: quark_torch.fake_quantize(x, INT8, scale=scale))
    other = placed(torch.full((6, 1), 0.1), DeviceMesh("cpu", [1, 0]), "r")
    d = placed(x, mesh, "0")
    expect_error(ValueError, "different meshes", lambda: quark_torch.fake_quantize(d, INT8, scale=other))


@case(2, "data stays")
def _() -> None:
    """Shards of whole groups stay; of others only those mesh dims are gathered that cut groups or bytes."""
    mesh = mesh_of(2)
    x = tensor(data((8, 64)))
    stays = {
        ("int8", "0"): "0",
        ("int8", "1"): "1",
        (PerGroup(16), "1"): "1",
        (PerGroup(64), "1"): "1",
        (PerGroup(24), "1"): "r",
        (PerBlock((4, 32)), "0"): "0",
        (PerBlock((4, 32)), "1"): "1",
        (PerBlock((8, 64)), "1"): "1",
        (PerBlock((3, 64)), "0"): "r",
        ("mxfp4", "1"): "1",
        ("nvfp4", "1"): "1",
        ("mx6", "1"): "1",
        ("bfp16", "1"): "1",
    }
    for (spec, text), at in stays.items():
        spec = spec if isinstance(spec, str) else QuantSpec("int8", spec)
        q = quark_torch.quantize(placed(x, mesh, text), spec)
        want = quark_torch.quantize(x, spec)
        assert list(q.qvalue.placements) == placements(at), (spec, text, q.qvalue.placements)
        expect_same(whole(q.qvalue), want.qvalue, f"{spec} {text}")
        expect_same(whole(q.scale), want.scale, f"{spec} {text}")
        expect_same(whole(q.dequantize()), want.dequantize(), f"{spec} {text}")
    for method in ("mse", "percentile=90"):
        for text in "01":
            scale, _ = quark_torch.choose_qparams(placed(x, mesh, text), "int8", axis=0, method=method)
            expect_same(whole(scale), quark_torch.choose_qparams(x, "int8", axis=0, method=method)[0], method)
            assert list(scale.placements) == placements("0" if text == "0" else "r")


# ---- training --------------------------------------------------------------------------------------------------------


def compiled_step(x: Any, scale: Any, seed: int) -> Any:
    y = quark_torch.fake_quantize(x, "int8", axis=0)
    y = quark_torch.lsq_quantize(y, scale, quant_min=-8, quant_max=7, axis=1)
    return quark_torch.fake_quantize(y, RANDOM, seed=seed)


@case(2, "compile")
def _() -> None:
    """Under torch.compile, in one graph with its backward."""
    mesh = mesh_of(2)
    x, scale = tensor(data((6, 32))), torch.full((32,), 0.21)
    w = tensor(data((6, 32), seed=1))
    a, s = x.clone().requires_grad_(), scale.clone().requires_grad_()
    want = compiled_step(a, s, 5)
    want.backward(w)
    compiled = torch.compile(compiled_step, backend="aot_eager", fullgraph=True)
    for text in "01":
        b = placed(x, mesh, text).requires_grad_()
        t = placed(scale, mesh, "r").requires_grad_()
        got = compiled(b, t, 5)
        expect_same(whole(got), want, f"compiled {text}")
        got.backward(placed(w, mesh, "r"))
        expect_same(whole(b.grad), a.grad, f"compiled {text}")
        torch.testing.assert_close(whole(t.grad), s.grad, rtol=1e-5, atol=1e-5)


def layers() -> Any:
    """Two linear layers of fake-quantized numbers, whose weights' scales learn."""
    from torch import nn

    class Layer(nn.Linear):
        def __init__(self, ins: int, outs: int) -> None:
            super().__init__(ins, outs)
            self.step = nn.Parameter(torch.full((outs,), 0.02))

        def forward(self, x: Any) -> Any:
            x = quark_torch.fake_quantize(x, INT8)
            weight = quark_torch.lsq_quantize(self.weight, self.step, quant_min=-8, quant_max=7, axis=0)
            return nn.functional.linear(x, quark_torch.fake_quantize(weight, "int8"), self.bias)

    torch.manual_seed(0)
    return nn.Sequential(Layer(16, 32), nn.ReLU(), Layer(32, 8))


def step(model: Any, x: Any, y: Any) -> float:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loss = (model(x) - y).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()  # type: ignore[no-any-return]


@case(2, "fully_shard")
def _() -> None:
    """A step of FSDP2 is that of one process, but for the rounding of sums."""
    from torch.distributed.fsdp import fully_shard

    x, y = tensor(data((8, 16))), tensor(data((8, 8), seed=1)) / 64
    alone, sharded = layers(), layers()
    before = {name: p.detach().clone() for name, p in alone.named_parameters()}
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer, mesh=mesh_of(2))
    rank = torch.distributed.get_rank()
    mine = slice(4 * rank, 4 * rank + 4)
    step(alone, x, y)
    step(sharded, x[mine], y[mine])
    for (name, p), (other, d) in zip(alone.named_parameters(), sharded.named_parameters(), strict=True):
        assert name == other
        assert not torch.equal(p, before[name]), name
        torch.testing.assert_close(whole(d), p, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    # The weights themselves are DTensors.
    weight = sharded[0].weight.detach()
    expect_same(
        whole(quark_torch.quantize(weight, "mxfp4").qvalue),
        quark_torch.quantize(whole(weight), "mxfp4").qvalue,
        "codes",
    )


@case(2, "tensor parallel")
def _() -> None:
    """A step with columns and rows of weights on different processes is that of one process, but for rounding."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    x, y = tensor(data((8, 16))), tensor(data((8, 8), seed=1)) / 64
    alone, parallel = layers(), layers()
    parallelize_module(parallel, mesh_of(2), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    step(alone, x, y)
    step(parallel, x, y)
    for (name, p), (_, d) in zip(alone.named_parameters(), parallel.named_parameters(), strict=True):
        torch.testing.assert_close(whole(d), p, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


# ---- functions -------------------------------------------------------------------------------------------------------


def results_of(function: Function, variant: Variant, given: list[Any], cotangent: Callable[[Any], Any]) -> list[Any]:
    """What a function gives for these tensors, and the gradients of those that have one."""
    leaves = [t.detach().requires_grad_() if i in variant.differentiable else t for i, t in enumerate(given)]
    outs = variant.call(function.api(quark_torch), *leaves)
    outs = [t for t in torch.utils._pytree.tree_leaves(outs) if isinstance(t, torch.Tensor)]
    asked = [leaves[i] for i in variant.differentiable]
    if not asked:
        return outs
    return [*outs, *torch.autograd.grad(outs[0], asked, cotangent(outs[0]))]


def compare_function(function: Function, variant: Variant) -> None:
    """Compare a function's results and gradients on DTensors with those on tensors."""
    from torch.distributed.tensor import DTensor

    mesh = mesh_of(2)
    given = [tensor(a) for a in variant.example()]

    def cotangent(out: Any) -> Any:
        return torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype)

    want = results_of(function, variant, given, cotangent)
    for text in ["r", *map(str, range(given[0].dim()))]:
        for is_plain in (True, False):
            x, *rest = given
            rest = [t if is_plain else placed(t, mesh, "r") for t in rest]
            got = results_of(
                function, variant, [placed(x, mesh, text), *rest], lambda out: placed(cotangent(out), mesh, "r")
            )
            for i, (a, b) in enumerate(zip(got, want, strict=True)):
                what = f"result {i} of {text}"
                at = i - (len(want) - len(variant.differentiable))
                leaf = variant.differentiable[at] if at >= 0 else 0
                if at >= 0:  # of a plain tensor a plain one
                    assert isinstance(a, DTensor) != (leaf > 0 and is_plain), what
                if leaf == 0:
                    expect_same(whole(a), b, what)
                else:
                    size = cotangent(want[0]).abs().sum() * (b.abs().max() + 1)
                    expect_near(whole(a), b, size * (1 if b.dtype == torch.float32 else 2**12), what)


for (_function, _variant), _id in zip(CELLS, IDS, strict=True):
    case(2, f"function {_id}", _function, _variant)(compare_function)


@pytest.mark.parametrize(("function", "variant"), CELLS, ids=IDS)
def test_function(function: Function, variant: Variant, outcomes: Callable[[int], dict[str, str]]) -> None:
    """Each public function on DTensors gives what it gives on tensors, and so do its gradients."""
    outcome = outcomes(2)[f"function_{IDS[CELLS.index((function, variant))]}"]
    assert not outcome, outcome
    record("torch", function.name, "DTensor")


# ---- tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "name"),
    [(world, name) for world, cases in CASES.items() for name in cases if not name.startswith("function_")],
    ids=[f"{world}-{name}" for world, cases in CASES.items() for name in cases if not name.startswith("function_")],
)
def test_case(world: int, name: str, outcomes: Callable[[int], dict[str, str]]) -> None:
    """A case went well in every process."""
    outcome = outcomes(world)[name]
    assert not outcome, outcome


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
