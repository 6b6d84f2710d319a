"""quark_torch.nn: observers and first batches against NumPy, states, gradients, training, serving."""

from __future__ import annotations

import copy
import io
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import quark_torch as qt
import reference
from frontends import bits
from quark_kernels import PRESETS, PerBlock, PerToken, QuantSpec, schema
from quark_kernels.formats import FIXED_ROUNDINGS
from quark_torch.nn import (
    FakeQuantize,
    LSQFakeQuantize,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    QuantizedLinear,
    TQTFakeQuantize,
)

SPECS: dict[str, tuple[Any, dict[str, int]]] = {
    "per tensor": ("int8", {}),
    "asymmetric": ("uint8", {}),
    "channel": ("int4", {"axis": 0}),
    "asymmetric channels": ("uint4", {"axis": -1}),
    "groups": ("fp8_e4m3", {"group_size": 8}),
    "ragged groups": ("int4", {"group_size": 5}),
    "groups along axis 0": ("int8", {"axis": 0, "group_size": 4}),
    "groups longer than the axis": ("int8", {"group_size": 100}),
    "tiles": (QuantSpec("int8", PerBlock((4, 5))), {}),
    "tokens": (QuantSpec("fp8_e5m2", PerToken()), {}),
}
SHAPE = (6, 16)


def batch(seed: int, shape: tuple[int, ...] = SHAPE, dtype: str = "float32") -> np.ndarray:
    random = np.random.default_rng(seed)
    return (random.standard_normal(shape) * random.uniform(0.1, 3, shape[-1:])).astype(dtype)


def tensor(x: np.ndarray) -> Any:
    return torch.from_numpy(np.asarray(x))


def numpy(a: Any) -> np.ndarray:
    if not isinstance(a, torch.Tensor):
        return np.asarray(a)
    a = a.detach().cpu()
    return a.view(getattr(torch, f"int{8 * a.element_size()}")).numpy() if a.is_floating_point() else a.numpy()


def same(ours: Any, theirs: Any) -> bool:
    """The same shape and bits."""
    ours, theirs = numpy(ours), numpy(theirs)
    return ours.shape == theirs.shape and bool((bits(ours) == bits(theirs)).all())


def state_of(module: Any) -> dict[str, Any]:
    return copy.deepcopy(module.state_dict())


def reloaded(value: Any, weights_only: bool = True) -> Any:
    """What torch.load reads of what torch.save wrote."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def extremes(x: np.ndarray, block: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest number of each group, group by group."""
    low, high = (np.empty(schema.scale_shape(x.shape, block), np.float32) for _ in range(2))
    for at in np.ndindex(low.shape):
        group = x[tuple(slice(i * b, (i + 1) * b) if b else slice(None) for i, b in zip(at, block, strict=True))]
        low[at], high[at] = group.min(), group.max()
    return low, high


def scale_of(spec: QuantSpec, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """What the oracle chooses for these extremes."""
    pairs = np.stack([low.ravel(), high.ravel()], 1)
    scale, zero = reference.choose_qparams(pairs, spec.format, (1, 0), spec.symmetric)
    return scale.reshape(low.shape), None if zero is None else zero.reshape(low.shape)


# ---- observers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("observer", [MinMaxObserver, MovingAverageMinMaxObserver])
@pytest.mark.parametrize("name", SPECS)
def test_first_batch_is_as_dynamic(name: str, observer: Any, dtype: str) -> None:
    spec, places = SPECS[name]
    x = tensor(batch(0)).to(getattr(torch, dtype))
    module = FakeQuantize(spec, observer(), **places)
    assert torch.equal(module(x), qt.fake_quantize(x, spec, **places))
    scale, zero_point = qt.choose_qparams(x, spec, **places)
    assert same(module.scale, scale)
    assert zero_point is None if module.zero_point is None else same(module.zero_point, zero_point)


@pytest.mark.parametrize("name", SPECS)
def test_min_max_against_numpy(name: str) -> None:
    spec, places = SPECS[name]
    module = FakeQuantize(spec, MinMaxObserver(), **places)
    block = schema.block_of(module.spec, SHAPE)
    batches = [batch(seed) for seed in range(4)]
    for x in batches:
        y = module(tensor(x))
    low, high = extremes(np.minimum.reduce(batches), block)[0], extremes(np.maximum.reduce(batches), block)[1]
    scale, zero_point = scale_of(module.spec, low, high)
    shape = module.scale.shape
    assert shape == (() if name in ("per tensor", "asymmetric") else scale.shape)
    assert same(module.observer.min_val, low.reshape(shape))
    assert same(module.observer.max_val, high.reshape(shape))
    assert same(module.scale, scale.reshape(shape))
    assert zero_point is None or same(module.zero_point, zero_point.reshape(shape))
    x = tensor(batches[-1])
    assert same(y, qt.fake_quantize(x, spec, scale=module.scale, zero_point=module.zero_point, **places))


@pytest.mark.parametrize("constant", [0.01, 0.3, 1])
@pytest.mark.parametrize("name", ["per tensor", "ragged groups"])
def test_moving_average_against_numpy(name: str, constant: float) -> None:
    spec, places = SPECS[name]
    module = FakeQuantize(spec, MovingAverageMinMaxObserver(constant), **places)
    block, averages = schema.block_of(module.spec, SHAPE), None
    for seed in range(5):
        module(tensor(batch(seed)))
        new = extremes(batch(seed), block)
        averages = new if averages is None else tuple(
            old + np.float32(constant) * (n - old) for old, n in zip(averages, new, strict=True)
        )  # fmt: skip
    for got, expected in zip((module.observer.min_val, module.observer.max_val), averages, strict=True):
        assert same(got, expected.reshape(got.shape))
    assert same(module.scale, scale_of(module.spec, *averages)[0].reshape(module.scale.shape))


def test_moving_average_stays_finite() -> None:
    module = FakeQuantize("int8", MovingAverageMinMaxObserver(1))
    largest = torch.finfo(torch.float32).max
    for sign in (1, -1, 1):
        module(torch.tensor([sign * largest]))
    assert torch.isfinite(module.observer.max_val)
    assert torch.isfinite(module.scale)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("observer", [MinMaxObserver, MovingAverageMinMaxObserver])
def test_bad_numbers_are_not_taken_in(observer: Any, bad: float) -> None:
    module, never, first = FakeQuantize("int8", observer(), axis=0), FakeQuantize("int8", observer(), axis=0), batch(0)
    module(tensor(first))
    before = module.scale.clone()
    second = first * 2
    second[1, 3] = bad
    y = module(tensor(second))
    assert torch.equal(module.scale[1], before[1])
    assert (module.scale != before).flatten().tolist() == [i != 1 for i in range(SHAPE[0])]
    assert y.isnan().sum() == np.isnan(bad)

    never(tensor(second))  # group 1 has had no good batch
    assert never.scale.isnan().flatten().tolist() == [i == 1 for i in range(SHAPE[0])]
    assert never(tensor(first))[1].isfinite().all()
    assert torch.equal(never.scale[1], before[1])


def test_float64_beyond_float32_is_not_taken_in() -> None:
    module = FakeQuantize("int8", MinMaxObserver())
    module(torch.tensor([1.0, -2.0], dtype=torch.float64))
    before = state_of(module)
    module(torch.tensor([1e300], dtype=torch.float64))
    assert all(same(a, b) for a, b in zip(state_of(module).values(), before.values(), strict=True))


@pytest.mark.parametrize(("number", "scale"), [(0.0, 1.0), (-0.0, 1.0), (1e-40, 1.0), (2.0**-126, 2.0**-126)])
def test_zeros_and_subnormals(number: float, scale: float) -> None:
    module = FakeQuantize("int8", MinMaxObserver())
    module(torch.full((3,), number))
    assert module.scale == scale
    assert same(module.observer.min_val, np.float32(0 if scale == 1 else number))


def test_empty_batches_and_no_axes() -> None:
    module = FakeQuantize("uint8", MinMaxObserver(), axis=1)
    assert module(torch.zeros(0, 4)).shape == (0, 4)
    assert module.scale.isnan()
    assert module(torch.zeros(2, 4)).shape == (2, 4)
    assert module.scale.shape == (1, 4)
    assert module(torch.zeros(0, 4)).shape == (0, 4)
    number = FakeQuantize("int8", MinMaxObserver())
    assert number(torch.tensor(3.0)) == 3


def test_groups_must_stay() -> None:
    module = FakeQuantize("int8", MinMaxObserver(), axis=1)
    module(torch.ones(3, 4))
    module(torch.ones(7, 4))
    with pytest.raises(ValueError, match=r"x has shape \(3, 5\) and so scales of \(1, 5\).* before have \(1, 4\)"):
        module(torch.ones(3, 5))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_is_observed(name: str) -> None:
    x = tensor(batch(1, (4, 40)))
    if PRESETS[name].element.is_cast or PRESETS[name].scale_format == "microexponents":
        with pytest.raises(ValueError, match="whose scale can't be given"):
            FakeQuantize(name, MinMaxObserver())
        assert torch.equal(FakeQuantize(name)(x), qt.fake_quantize(x, name))
        return
    module = FakeQuantize(name, MinMaxObserver())
    assert module.eval()(x).isnan().all()
    assert torch.equal(module.train()(x), qt.fake_quantize(x, name))
    module.half().eval()
    assert module.scale.dtype == qt.choose_qparams(x, name)[0].dtype
    module(2 * x)
    assert torch.equal(module(x), qt.fake_quantize(x, name))


def test_an_observer_of_the_user() -> None:
    class Median(torch.nn.Module):
        def forward(self, x: Any, spec: QuantSpec) -> Any:
            return x.abs().median() / 7, None

    x = tensor(batch(2))
    module = FakeQuantize("int4", Median())
    assert torch.equal(module(x), qt.fake_quantize(x, "int4", scale=x.abs().median() / 7))


def passed(x: Any) -> Any:
    """What a module makes of x that neither observes nor rounds."""
    module = FakeQuantize("int8")
    module.disable_fake_quant()
    return module(x)


# ---- modes, states, gradients ----------------------------------------------------------------------------------------


def test_modes() -> None:
    x = tensor(batch(0))
    module = FakeQuantize("int8", MinMaxObserver())
    module(x)
    scale = module.scale.clone()
    module.eval()(2 * x)
    assert module.scale == scale
    module.enable_observer()
    module(2 * x)
    assert module.scale == 2 * scale
    module.disable_observer()
    module.train()(4 * x)
    assert module.scale == 2 * scale
    module.enable_observer()
    module.disable_fake_quant()
    assert module(4 * x + 0.1).equal(4 * x + 0.1)
    assert module.scale > 2 * scale
    module.enable_fake_quant()
    assert not module(4 * x + 0.1).equal(4 * x + 0.1)
    assert "int8, gradient=clipped, observer_enabled=True" in repr(module)
    assert "averaging_constant=0.25" in repr(FakeQuantize("int8", MovingAverageMinMaxObserver(0.25)))


def test_dynamic_has_no_state() -> None:
    module = FakeQuantize("uint4", axis=0, gradient="ste")
    x = tensor(batch(0)).requires_grad_()
    assert torch.equal(module(x), qt.fake_quantize(x, "uint4", axis=0))
    assert not module.state_dict()


MODULES: dict[str, Any] = {
    "per tensor": lambda: FakeQuantize("int8", MinMaxObserver()),
    "asymmetric channels": lambda: FakeQuantize("uint4", MovingAverageMinMaxObserver(0.1), axis=1),
    "ragged groups": lambda: FakeQuantize("int4", MinMaxObserver(), group_size=5),
    "mxfp4": lambda: FakeQuantize("mxfp4", MinMaxObserver()),
    "lsq": lambda: LSQFakeQuantize(4),
    "lsq channels": lambda: LSQFakeQuantize(3, axis=0, channels=SHAPE[0]),
    "tqt": lambda: TQTFakeQuantize(4),
    "tqt max": lambda: TQTFakeQuantize(4, init="max"),
}


@pytest.mark.parametrize("name", MODULES)
def test_round_trips(name: str) -> None:
    x, module = tensor(batch(0)), MODULES[name]()
    unseen = copy.deepcopy(module.state_dict())
    for _ in range(2):
        module(x)
    y = module.eval()(x / 2)

    def check(other: Any) -> None:
        assert all(same(a, b) for a, b in zip(state_of(other).values(), state_of(module).values(), strict=True))
        assert torch.equal(other.eval()(x / 2), y)

    fresh = MODULES[name]()
    fresh.load_state_dict(reloaded(module.state_dict()))
    check(fresh)
    assigned = MODULES[name]()
    assigned.load_state_dict(module.state_dict(), assign=True)
    check(assigned)
    check(copy.deepcopy(module))
    check(reloaded(module, weights_only=False))
    if name != "mxfp4":  # torch can't pickle its 8-bit floats
        check(pickle.loads(pickle.dumps(module)))
    check(copy.deepcopy(module).half().to(torch.float64))
    check(torch.nn.Sequential(copy.deepcopy(module)).to("cpu")[0])
    fresh.train()(3 * x)
    assert module.state_dict().keys() == fresh.state_dict().keys()

    fresh.load_state_dict(unseen)  # and back
    again = MODULES[name]()
    assert torch.equal(fresh.train()(x), again(x))
    assert all(same(a, b) for a, b in zip(state_of(fresh).values(), state_of(again).values(), strict=True))


def test_buffers_that_others_hold_take_their_shape() -> None:
    """NumPy arrays that share their memory, and a first batch in inference mode."""
    module = FakeQuantize("int8", MinMaxObserver(), axis=0)
    views = [buffer.numpy() for buffer in module.buffers()]
    with torch.inference_mode():
        module(tensor(batch(0)))
    x = tensor(batch(1)).requires_grad_()
    module(x).sum().backward()
    assert module.scale.shape == (SHAPE[0], 1)
    assert all(view.shape == () for view in views)


def test_load_of_other_channels_fails() -> None:
    modules = [FakeQuantize("int8", MinMaxObserver(), axis=1) for _ in range(2)]
    for module, width in zip(modules, (4, 5), strict=True):
        module(torch.ones(2, width))
    with pytest.raises(RuntimeError, match="size mismatch"):
        modules[0].load_state_dict(modules[1].state_dict())


def of_channels(observer: bool) -> Any:
    module = FakeQuantize("uint4", MinMaxObserver(), axis=0)
    module(tensor(batch(0)))
    return module.observer if observer else module


# What is loaded into which module, and the error; the rest of the state is the module's own.
REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (lambda: QuantizedLinear(8, 4, "int8"), {"qvalue": torch.full((4, 8), 300)}, "qvalue has dtype int64; .*: int8"),
    (lambda: QuantizedLinear(8, 4, "int8"), {"qvalue": torch.full((4, 8), 0.7)}, "qvalue has dtype float32; .*: int8"),
    (lambda: QuantizedLinear(8, 4, "int8"), {"scale": torch.ones((), dtype=torch.float16)}, "scale has dtype float16"),
    (
        lambda: QuantizedLinear(8, 4, "mxfp4"),
        {"scale": torch.full((4, 1), 127, dtype=torch.uint8)},
        "scale has dtype uint8; allowed: float8_e8m0fnu",
    ),
    (
        lambda: QuantizedLinear(16, 4, "nvfp4"),
        {"global_scale": torch.ones((), dtype=torch.float64)},
        "global_scale has dtype float64; allowed: float32",
    ),
    (lambda: QuantizedLinear(16, 4, "mx6"), {"pair_bits": torch.ones(4, 1)}, "pair_bits has dtype float32; .*: uint8"),
    (lambda: QuantizedLinear(8, 4, "uint8"), {"zero_point": torch.tensor(1.5)}, "zero_point has dtype float32"),
    (
        lambda: FakeQuantize("int8", MinMaxObserver()),
        {"scale": torch.ones((), dtype=torch.bfloat16)},
        "scale has dtype bfloat16; allowed: float32",
    ),
    (
        lambda: FakeQuantize("uint8", MinMaxObserver()),
        {"zero_point": torch.tensor(3.0)},
        "zero_point has dtype float32",
    ),
    (
        lambda: FakeQuantize("int8", MinMaxObserver()),
        {"observer.min_val": torch.zeros((), dtype=torch.int32)},
        "observer.min_val has dtype int32; allowed: float32",
    ),
    (
        MovingAverageMinMaxObserver,
        {"max_val": torch.zeros(3, dtype=torch.float64), "min_val": torch.zeros(3)},
        "max_val has dtype float64; .*: float32[^$]*min_val has shape .3,., max_val ..; allowed: the same shape",
    ),
    (lambda: LSQFakeQuantize(4), {"initialized": torch.tensor(1.0)}, "initialized has dtype float32; allowed: bool"),
    (TQTFakeQuantize, {"initialized": torch.tensor(1)}, "initialized has dtype int64; allowed: bool"),
    (
        lambda: FakeQuantize("int8", MinMaxObserver()),
        {"scale": torch.ones(1).expand(2**40, 1)},
        r"scale has shape \(1099511627776, 1\), 4398046511104 bytes, in a storage of 4; allowed: tensors that have mem",
    ),
    (
        MinMaxObserver,
        {"min_val": torch.zeros(4), "max_val": torch.zeros(1).expand(4)},
        r"max_val has shape \(4,\), 16 bytes, in a storage of 4",
    ),
    (
        lambda: FakeQuantize("int8", MinMaxObserver()),
        {"scale": torch.ones([1] * 17)},
        "scale has 17 dimensions; at most 16",
    ),
    (
        lambda: FakeQuantize("int8", MinMaxObserver()),
        {"scale": torch.ones(3).to_sparse()},
        "scale has layout torch.sparse_coo; allowed: torch.strided",
    ),
    (
        MinMaxObserver,
        {"min_val": torch.zeros(3), "max_val": torch.zeros(2)},
        r"min_val has shape \(3,\), max_val \(2,\); allowed: the same shape for both",
    ),
    (lambda: of_channels(True), {"min_val": torch.tensor(0.0)}, r"min_val has shape \(\), max_val \(6, 1\); allowed"),
]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("make", "parts", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_load_refuses(make: Any, parts: dict[str, Any], message: str, assign: bool) -> None:
    """The key is named once, isn't missing, and its buffer stays as it was."""
    module = torch.nn.Sequential(make())
    before = state_of(module)
    with pytest.raises(RuntimeError, match=f"0.({message})") as error:
        module.load_state_dict({**before, **{f"0.{name}": part for name, part in parts.items()}}, assign=assign)
    assert "issing" not in str(error.value)
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(same(after[k], before[k]) for k in before)


def test_load_casts_parameters() -> None:
    learned, linear = LSQFakeQuantize(4), QuantizedLinear(8, 4, "int8")
    learned.load_state_dict({"scale": torch.tensor(0.5, dtype=torch.float64), "initialized": torch.tensor(True)})
    assert same(learned.scale, np.float32(0.5))
    linear.load_state_dict({**linear.state_dict(), "bias": torch.ones(4, dtype=torch.float16)})
    assert same(linear.bias, np.ones(4, np.float32))
    module, part = MinMaxObserver(), torch.arange(12.0).reshape(3, 4)[:, 1:2]  # a view has the memory
    module.load_state_dict({"min_val": part, "max_val": part + 1})
    assert torch.equal(module.min_val, part)


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (2**40, TypeError, "state is a builtins.int; allowed: a 1-D uint8 tensor of at most 4096 elements"),
        (b"int8", TypeError, "state is a builtins.bytes"),
        ("int8", TypeError, "state is a builtins.str"),
        (
            torch.tensor(2**40),
            ValueError,
            r"state has shape \(\) and dtype int64; allowed: a 1-D uint8 tensor of at most",
        ),
        (torch.tensor(5, dtype=torch.uint8), ValueError, r"state has shape \(\) and dtype uint8"),
        (torch.zeros(4), ValueError, r"state has shape \(4,\) and dtype float32"),
        (torch.zeros(2, 2, dtype=torch.uint8), ValueError, r"state has shape \(2, 2\)"),
        (torch.zeros(4097, dtype=torch.uint8), ValueError, r"state has shape \(4097,\)"),
        (torch.zeros(1, dtype=torch.uint8).expand(2**40), ValueError, r"state has shape \(1099511627776,\)"),
        (torch.full((4,), 255, dtype=torch.uint8), ValueError, "state is of a layer of .*; this one is of int8"),
    ],
    ids=str,
)
def test_extra_state(state: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        QuantizedLinear(4, 4, "int8").set_extra_state(state)


@pytest.mark.parametrize("gradient", ["clipped", "ste"])
def test_gradients_of_two_batches_before_backward(gradient: str) -> None:
    """What backward needs of the first batch is still there after the second."""
    module = FakeQuantize("int4", MovingAverageMinMaxObserver(0.5), gradient=gradient)
    xs = [tensor(batch(seed)).requires_grad_() for seed in range(2)]
    scales, total = [], torch.zeros(())
    for x in xs:
        total = total + module(x).sum()
        scales.append(module.scale.clone())
    module.eval()
    last = tensor(batch(7)).requires_grad_()
    total = total + module(last).sum()
    module.train()(5 * xs[0].detach())
    total.backward()
    for x, scale in zip([*xs, last], [*scales, scales[-1]], strict=True):
        again = x.detach().clone().requires_grad_()
        qt.fake_quantize(again, "int4", scale=scale, gradient=gradient).sum().backward()
        assert torch.equal(x.grad, again.grad)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own
@pytest.mark.parametrize("name", ["asymmetric channels", "lsq"])
def test_compile(name: str) -> None:
    """After its first batch a module compiles without a graph break, and gives the same bits."""
    torch._dynamo.reset()
    eager = MODULES[name]()
    eager(tensor(batch(0)))
    compiled = torch.compile(module := copy.deepcopy(eager), fullgraph=True, backend="aot_eager")
    for seed in (1, 2):
        results = []
        for f in (eager, compiled):
            x = tensor(batch(seed)).requires_grad_()
            y = f(x)
            y.sum().backward()
            results.append((y, x.grad))
        assert all(same(a, b) for a, b in zip(*results, strict=True))
    assert all(same(a, b) for a, b in zip(state_of(eager).values(), state_of(module).values(), strict=True))


def test_distributed_data_parallel(tmp_path: Path) -> None:
    """The buffers that DDP took hold of are those that get their shape later."""
    from torch import distributed

    if not distributed.is_available():
        pytest.skip("torch.distributed isn't available")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        module = torch.nn.Sequential(torch.nn.Linear(16, 4), FakeQuantize("uint8", MinMaxObserver(), axis=1))
        buffers = list(module.buffers())
        parallel = torch.nn.parallel.DistributedDataParallel(module)
        for seed in range(2):
            parallel(tensor(batch(seed))).sum().backward()
        assert all(a is b for a, b in zip(buffers, module.buffers(), strict=True))
        assert module[1].scale.shape == (1, 4)
    finally:
        distributed.destroy_process_group()


# ---- learned scales --------------------------------------------------------------------------------------------------


def lsq_start(x: np.ndarray, quant_max: int, axis: int | None) -> np.ndarray:
    """2 mean|x| / sqrt(quant_max), the sum in the core's order, the rest in float32."""
    rows = x.reshape(1, -1) if axis is None else np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)
    totals = np.array([reference.tree_sum(np.abs(row.astype(np.float64))) for row in rows]).astype(np.float32)
    start = totals * np.float32(2 / (rows.shape[1] * math.sqrt(quant_max)))
    return start[0] if axis is None else start


LSQ: list[tuple[Any, dict[str, Any], int, int]] = [
    (4, {}, -8, 7),
    (5, {"signed": True}, -16, 15),
    (6, {"signed": False}, 0, 63),
    (8, {"axis": 0}, -128, 127),
    (11, {"axis": -1}, -1024, 1023),
    (16, {}, -32768, 32767),
    ("uint4", {"axis": 1}, 0, 15),
    (QuantSpec("int8", quant_min=-100, quant_max=90, rounding="half_up"), {}, -100, 90),
]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("spec", "keywords", "low", "high"), LSQ, ids=str)
def test_lsq_starts_from_the_first_batch(spec: Any, keywords: dict[str, Any], low: int, high: int, dtype: str) -> None:
    axis = keywords.get("axis")
    module = LSQFakeQuantize(spec, **keywords, channels=None if axis is None else SHAPE[axis])
    assert (module.quant_min, module.quant_max) == (low, high)
    x = batch(3, dtype=dtype)
    y = module(tensor(x))
    start = lsq_start(x, high, axis)
    assert np.allclose(start, 2 * np.abs(x.astype(np.float64)).mean(None if axis is None else 1 - axis % 2) / high**0.5)
    assert same(module.scale, start)
    assert module.initialized.all()
    rounding = module.spec.rounding
    ours = qt.lsq_quantize(tensor(x), tensor(start), quant_min=low, quant_max=high, axis=axis, rounding=rounding)
    assert same(y, ours)
    module(tensor(x) * 5)
    assert same(module.scale, start)
    codes = qt.quantize(tensor(x), module.spec, scale=module.scale)
    assert same(codes.dequantize(), y)


@pytest.mark.parametrize("scale", [0.3, torch.tensor([0.3]), np.float32(0.3)], ids=str)
def test_lsq_with_a_given_start(scale: Any) -> None:
    module = LSQFakeQuantize(4, scale=scale)
    module(tensor(batch(0)))
    assert same(module.scale, np.float32(0.3))
    rows = LSQFakeQuantize(4, axis=0, scale=torch.linspace(0.1, 0.6, 6))
    rows(tensor(batch(0)))
    assert torch.equal(rows.scale, torch.linspace(0.1, 0.6, 6))
    assert "int4 channel=0, channels=6" in repr(rows)


@pytest.mark.parametrize("bad", [np.zeros(5), np.full(5, np.nan), np.full(5, -np.inf), np.zeros(0), np.full(5, 1e-41)])
@pytest.mark.parametrize("make", [lambda: LSQFakeQuantize(4), lambda: TQTFakeQuantize(4)], ids=["lsq", "tqt"])
def test_a_bad_first_batch_starts_nothing(make: Any, bad: np.ndarray) -> None:
    module, clean, bad = make(), make(), bad.astype(np.float32)
    y = module(tensor(bad))
    assert not module.initialized
    assert np.array_equal(y.isnan().numpy(), np.isnan(bad))
    for m in (module, clean):
        m(tensor(batch(0)))
        assert m.initialized
    assert all(same(a, b) for a, b in zip(module.state_dict().values(), clean.state_dict().values(), strict=True))


def test_channels_start_one_by_one() -> None:
    module = LSQFakeQuantize(4, axis=0, channels=SHAPE[0])
    x = batch(0)
    x[2] = 0
    module(tensor(x))
    assert module.initialized.tolist() == [i != 2 for i in range(SHAPE[0])]
    assert module.scale[2] == 1
    expected = lsq_start(x, 7, 0)
    expected[2] = lsq_start(batch(1), 7, 0)[2]
    first = module(tensor(x)).sum()
    module(tensor(batch(1)))
    assert same(module.scale, expected)
    first.backward()  # the second batch hasn't changed what it needs
    assert module.scale.grad.isfinite().all()


@pytest.mark.parametrize("make", [lambda: LSQFakeQuantize(4), lambda: TQTFakeQuantize(4)], ids=["lsq", "tqt"])
def test_eval_keeps_nothing(make: Any) -> None:
    x = tensor(batch(0))
    module, other = make(), make()
    y = module.eval()(x)
    assert not module.initialized
    assert torch.equal(y, other(x))
    assert torch.equal(module.train()(x), y)
    assert module.initialized


@pytest.mark.parametrize("factor", [1, 0.7, 0.5, 0.999, 1e30, 2.0**-120])
@pytest.mark.parametrize("number", [2, 4, 8, 16])
def test_tqt_starts_from_the_first_batch(number: int, factor: float) -> None:
    x = tensor(batch(5))
    x = x / x.abs().max() * factor
    module = TQTFakeQuantize(number, init="max")
    assert "init=max" in repr(module)
    y = module(x)
    exponent = math.ceil(math.log2(float(x.abs().max())))
    assert module.log_threshold == exponent - 0.5
    assert same(module.scale, np.float32(2.0 ** (exponent + 1 - number)))
    assert same(qt.quantize(x, module.spec, scale=module.scale).dequantize(), y)
    assert (y - x).abs().max() <= module.scale  # nothing saturates by more than the last step


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("factor", [1, 0.7, 0.5, 2.0**-10, 1e3])
@pytest.mark.parametrize("number", [2, 3, 4, 8, 16])
def test_tqt_starts_from_the_mean(number: int, factor: float, dtype: str) -> None:
    x = (batch(5) * np.float32(factor)).astype(dtype)
    module = TQTFakeQuantize(number)
    y = module(tensor(x))
    threshold = float(lsq_start(x.astype(np.float32), 2 ** (number - 1) - 1, None)) * 2 ** (number - 1)
    exponent = math.ceil(math.log2(threshold))
    assert same(module.log_threshold, np.float32(exponent - 0.5))
    assert same(module.scale, np.float32(2.0 ** (exponent + 1 - number)))
    assert same(qt.quantize(tensor(x), module.spec, scale=module.scale).dequantize(), y)


@pytest.mark.parametrize("number", [2, 4, 8, 16])
@pytest.mark.parametrize("power", [-100, -3, 0, 5, 110])
@pytest.mark.parametrize("step", [-1, 0, 1])
def test_tqt_mean_next_to_powers_of_two(number: int, power: int, step: int) -> None:
    """A threshold that is a power of two stays; the next number above it doubles."""
    least = np.float32(2.0**power)
    near = {-1: np.nextafter(least, np.float32(0)), 0: least, 1: np.nextafter(least, np.float32(np.inf))}[step]
    x = np.full(1, near / 2 * math.sqrt(2 ** (number - 1) - 1), np.float32)
    start = lsq_start(x, 2 ** (number - 1) - 1, None)
    mantissa, exponent = math.frexp(float(start))
    module = TQTFakeQuantize(number)
    module(tensor(x))
    assert module.log_threshold == exponent - (mantissa == 0.5) + number - 1 - 0.5
    if number == 2:  # whose quant_max has an exact root
        assert start == near
        assert module.log_threshold == power + (step > 0) + 0.5


def test_tqt_with_a_given_start() -> None:
    module = TQTFakeQuantize(4, log_threshold=1.25, rounding="half_up")
    x = tensor(batch(0))
    assert torch.equal(module(x), qt.tqt_quantize(x, 1.25, bits=4, rounding="half_up"))
    assert module.scale == 0.5
    assert TQTFakeQuantize(8, log_threshold=torch.tensor([200.0])).scale == 2.0**120


def test_tqt_starts_where_the_threshold_overflows() -> None:
    x = torch.full((1,), 2.0**127)
    module = TQTFakeQuantize(16)
    assert module(x).isfinite().all()
    assert module.log_threshold.isfinite()
    assert module.initialized


@pytest.mark.parametrize("factor", [None, 0.25])
def test_gradients_reach_the_parameter(factor: float | None) -> None:
    x = tensor(batch(0)).requires_grad_()
    module = LSQFakeQuantize(3, axis=1, channels=SHAPE[1], grad_factor=factor)
    module(x).square().sum().backward()
    scale = module.scale.detach().clone().requires_grad_()
    again = x.detach().clone().requires_grad_()
    qt.lsq_quantize(again, scale, quant_min=-4, quant_max=3, axis=1, grad_factor=factor).square().sum().backward()
    assert torch.equal(module.scale.grad, scale.grad)
    assert torch.equal(x.grad, again.grad)
    assert module.scale.grad.abs().min() > 0
    threshold = TQTFakeQuantize(3)
    threshold(x).square().sum().backward()
    assert threshold.log_threshold.grad != 0


def test_a_scale_below_zero_mirrors_the_range() -> None:
    """As the docstring says; and a scale of zero leaves zeros."""
    x = torch.tensor([-100.0, -1.0, 1.0, 100.0])
    module = LSQFakeQuantize(4, scale=1.0)
    with torch.no_grad():
        module.scale.fill_(-1.0)
    assert module(x).tolist() == [-7, -1, 1, 8]
    with torch.no_grad():
        module.scale.zero_()
    assert module(x).tolist() == [0, 0, 0, 0]
    positive = LSQFakeQuantize(4, signed=False, scale=1.0)
    with torch.no_grad():
        positive.scale.fill_(-1.0)
    assert positive(x).tolist() == [-15, -1, 0, 0]


@pytest.mark.parametrize("kind", ["lsq", "tqt", "observer"])
def test_training_reduces_the_loss(kind: str) -> None:
    torch.manual_seed(0)
    x, target = torch.randn(256, 8), torch.randn(8, 3)
    linear = torch.nn.Linear(8, 3, bias=False)
    rounded: dict[str, tuple[Any, Any]] = {
        "lsq": (LSQFakeQuantize(4), LSQFakeQuantize(4, axis=0, channels=3)),
        "tqt": (TQTFakeQuantize(4), TQTFakeQuantize(4)),
        "observer": (
            FakeQuantize("int4", MovingAverageMinMaxObserver(0.1)),
            FakeQuantize("int4", MinMaxObserver(), axis=0),
        ),
    }
    of_x, of_weight = rounded[kind]
    parameters = [*linear.parameters(), *of_x.parameters(), *of_weight.parameters()]
    optimizer, losses = torch.optim.Adam(parameters, 0.03), []
    starts = [p.detach().clone() for p in parameters]
    for step in range(80):
        product = torch.nn.functional.linear(of_x(x), of_weight(linear.weight))
        loss = (product - x @ target).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 0:
            starts = [p.detach().clone() for p in parameters]
    assert losses[-1] < 0.15 * losses[0]
    assert all(not torch.equal(p, start) for p, start in zip(parameters, starts, strict=True))


# ---- serving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [None, True])
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_quantized_linear(name: str, packed: bool | None) -> None:
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(40, 6), torch.randn(3, 40)
    if packed and not (PRESETS[name].element.can_pack or name == "bfp16"):
        with pytest.raises(ValueError, match="packed is True"):
            QuantizedLinear(40, 6, name, packed=True)
        return
    layer = QuantizedLinear.from_linear(linear, name, packed=packed)
    q = qt.quantize(linear.weight.detach(), name, packed=packed)
    expected = torch.nn.functional.linear(x, q.dequantize(), linear.bias)
    assert torch.equal(layer(x), expected)
    assert layer.weight.spec == q.spec
    assert layer.weight.packed == q.packed
    assert str(q.spec) in repr(layer)

    fresh = QuantizedLinear(40, 6, name, packed=packed)
    fresh.load_state_dict(reloaded(layer.state_dict()))
    for other in (fresh, copy.deepcopy(layer), reloaded(layer, weights_only=False), copy.deepcopy(layer).to("cpu")):
        assert torch.equal(other(x), expected)
    before = state_of(layer)
    half = layer.half()
    assert half.bias.dtype == torch.float16
    assert half(x.half()).dtype == torch.float16
    assert all(same(a, before[k]) for k, a in state_of(half).items() if k != "bias")


def test_quantized_linear_arguments() -> None:
    linear = torch.nn.Linear(12, 5, bias=False, dtype=torch.bfloat16)
    layer = QuantizedLinear.from_linear(linear, "int4", group_size=4, packed=True)
    assert layer.bias is None
    assert "bias=False" in repr(layer)
    assert (layer.weight.shape, layer.weight.dtype, layer.weight.scale.shape) == ((5, 12), torch.bfloat16, (5, 3))
    x = torch.randn(2, 3, 12, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape
    assert not any(p.requires_grad for p in layer.buffers())
    stochastic = QuantSpec("int4", rounding="stochastic")
    rounded = QuantizedLinear.from_linear(linear, stochastic, seed=5)
    assert torch.equal(rounded.weight.qvalue, qt.quantize(linear.weight.detach(), stochastic, seed=5).qvalue)
    meta = QuantizedLinear(12, 5, "mxfp4", device="meta")
    assert meta(torch.ones(2, 12, device="meta")).shape == (2, 5)
    with pytest.raises(ValueError, match="state is of a layer of fp6_e3m2; this one is of fp6_e2m3"):
        QuantizedLinear(4, 4, "fp6_e2m3").load_state_dict(QuantizedLinear(4, 4, "fp6_e3m2").state_dict())
    with pytest.raises(TypeError, match="linear is a .*Conv1d; allowed: torch.nn.Linear"):
        QuantizedLinear.from_linear(torch.nn.Conv1d(1, 1, 1), "int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="in_features is -1"):
        QuantizedLinear(-1, 4, "int8")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("of_bias", ["float32", "bfloat16"])
def test_quantized_linear_computes_in_the_dtype_of_x(dtype: str, of_bias: str, bias: bool) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(12, 5, bias=bias, dtype=getattr(torch, of_bias))
    layer, x = QuantizedLinear.from_linear(linear, "int8"), torch.randn(2, 12).to(getattr(torch, dtype))
    y = layer(x)
    assert y.dtype == x.dtype
    cast = layer.bias.to(x.dtype) if bias else None
    assert same(y, torch.nn.functional.linear(x, layer.weight.dequantize(x.dtype), cast))
    if bias:
        y.sum().backward()
        assert layer.bias.grad.dtype == layer.bias.dtype


def test_stochastic() -> None:
    spec, x = QuantSpec("int4", rounding="stochastic"), tensor(batch(0))
    module = FakeQuantize(spec, MinMaxObserver())
    assert torch.equal(module(x, seed=3), qt.fake_quantize(x, spec, seed=3))
    with pytest.raises(ValueError, match="seed is None"):
        module(x)


# ---- wrong arguments -------------------------------------------------------------------------------------------------

ROUNDINGS = ", ".join(FIXED_ROUNDINGS)
WRONG: list[tuple[Any, type[Exception], str]] = [
    (lambda: FakeQuantize("int9"), ValueError, "spec is 'int9'"),
    (lambda: FakeQuantize("int8", MinMaxObserver), TypeError, "observer is <class.*allowed: None, or a module"),
    (lambda: FakeQuantize("int8", gradient="none"), ValueError, "gradient is 'none'"),
    (lambda: FakeQuantize("bf16", MinMaxObserver()), ValueError, "spec is bf16, whose scale can't be given"),
    (lambda: FakeQuantize("int8", MinMaxObserver())([1.0]), TypeError, "x is a builtins.list"),
    (lambda: MinMaxObserver()(torch.ones(3, dtype=torch.int8), "int8"), TypeError, "x has dtype int8"),
    (lambda: MinMaxObserver()(torch.ones(3), "mx6"), ValueError, "whose scale can't be given"),
    (lambda: MovingAverageMinMaxObserver(0), ValueError, "averaging_constant is 0; allowed: above 0, up to 1"),
    (lambda: MovingAverageMinMaxObserver(1.5), ValueError, "averaging_constant is 1.5"),
    (lambda: MovingAverageMinMaxObserver(True), TypeError, "averaging_constant is True"),
    (lambda: MovingAverageMinMaxObserver(None), TypeError, "averaging_constant is None; allowed: a number"),
    (
        lambda: MovingAverageMinMaxObserver(10**400),
        ValueError,
        "averaging_constant is 1000.*; allowed: above 0, up to 1",
    ),
    (lambda: MovingAverageMinMaxObserver("x"), TypeError, "averaging_constant is 'x'; allowed: a number above 0"),
    (lambda: MovingAverageMinMaxObserver("0.1"), TypeError, "averaging_constant is '0.1'; allowed: a number"),
    (
        lambda: MovingAverageMinMaxObserver(torch.ones(2)),
        TypeError,
        r"averaging_constant is .*\[1.*; allowed: a number",
    ),
    (lambda: passed([1]), TypeError, "x is a builtins.list; allowed"),
    (lambda: passed(3), TypeError, "x is a builtins.int; allowed"),
    (lambda: passed("abc"), TypeError, "x is a builtins.str; allowed"),
    (lambda: passed(torch.ones(3, dtype=torch.int8)), TypeError, "x has dtype int8; allowed"),
    (lambda: LSQFakeQuantize(1), ValueError, "bits is 1; allowed: 2 to 16"),
    (lambda: LSQFakeQuantize(4.0), TypeError, "spec is 4.0; allowed: a QuantSpec"),
    (lambda: LSQFakeQuantize("int4", signed=False), ValueError, "signed is False; int4 has a sign or none already"),
    (lambda: LSQFakeQuantize("fp4"), ValueError, "spec is fp4; allowed: integers"),
    (lambda: LSQFakeQuantize("mxint8"), ValueError, "spec is int8f6 .*; allowed: integers"),
    (lambda: LSQFakeQuantize(QuantSpec("int4", rounding="stochastic")), ValueError, "int4 .*no stochastic rounding"),
    (lambda: LSQFakeQuantize(QuantSpec("int4", PerToken())), ValueError, "allowed: PerTensor"),
    (lambda: LSQFakeQuantize(4, axis=0), ValueError, "channels is None; int4 channel=0 needs it"),
    (lambda: LSQFakeQuantize(4, channels=3), ValueError, "channels is 3; int4 has one scale"),
    (lambda: LSQFakeQuantize(4, scale=torch.ones(2)), ValueError, r"scale has shape \(2,\); allowed: one element"),
    (lambda: LSQFakeQuantize(4, axis=0, channels=3, scale=torch.ones(2)), ValueError, r"scale has shape \(2,\)"),
    (lambda: LSQFakeQuantize(4, scale=0), ValueError, "scale is 0; allowed: above 0"),
    (lambda: LSQFakeQuantize(4, scale="a"), TypeError, "scale is 'a'; allowed: None, numbers, or a"),
    (lambda: LSQFakeQuantize(4, scale="1.5"), TypeError, "scale is '1.5'; allowed: None"),
    (lambda: LSQFakeQuantize(4, scale=True), TypeError, "scale is True; allowed: None"),
    (lambda: LSQFakeQuantize(4, scale=1j), TypeError, "scale is 1j; allowed: None"),
    (lambda: LSQFakeQuantize(4, scale=object), TypeError, "scale is <class 'object'>; allowed: None"),
    (lambda: LSQFakeQuantize(4, axis=0, channels=3)(torch.ones(2, 4)), ValueError, "scale has shape"),
    (lambda: TQTFakeQuantize(17), ValueError, "bits is 17; allowed: 2 to 16"),
    (lambda: TQTFakeQuantize(rounding="stochastic"), ValueError, f"rounding is 'stochastic'; allowed: {ROUNDINGS}$"),
    (lambda: TQTFakeQuantize(rounding="x"), ValueError, f"rounding is 'x'; allowed: {ROUNDINGS}$"),
    (lambda: TQTFakeQuantize(init="x"), ValueError, "init is 'x'; allowed: mean, max$"),
    (lambda: TQTFakeQuantize(init=None), ValueError, "init is None; allowed: mean, max$"),
    (lambda: TQTFakeQuantize(log_threshold="a"), TypeError, "log_threshold is 'a'; allowed: None, numbers, or a"),
    (lambda: TQTFakeQuantize(log_threshold=torch.ones(2)), ValueError, r"log_threshold has shape \(2,\)"),
    (lambda: QuantizedLinear(4, 3, "int8")(torch.ones(2, 5)), ValueError, r"x has shape \(2, 5\); allowed: \[..., 4\]"),
    (lambda: QuantizedLinear(4, 3, "int8")(torch.ones(4)[0]), ValueError, r"x has shape \(\); allowed: \[..., 4\]"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG, ids=[message for _, _, message in WRONG])
def test_wrong_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
