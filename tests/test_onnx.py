"""quark_torch.onnx: what is exported gives in onnxruntime the bits that it gives in torch."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch isn't installed")
onnx = pytest.importorskip("onnx", reason="onnx isn't installed")
pytest.importorskip("onnxscript", reason="onnxscript isn't installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime isn't installed")

import quark_torch as qt
import quark_torch.onnx as qonnx
from quark_torch import PerBlock, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec, kernel
from quark_torch.nn import FakeQuantize, LSQFakeQuantize, MinMaxObserver, QuantizedLinear, TQTFakeQuantize

# torch's own, inside torch.onnx and torch.export.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning"),
]

ROWS, COLUMNS = 8, 96
QDQ = ["QuantizeLinear", "DequantizeLinear"]
CLIPPED = ["QuantizeLinear", "Clip", "DequantizeLinear"]
WIDE_CLIPPED = ["QuantizeLinear", "Cast", "Clip", "Cast", "DequantizeLinear"]
Function = Callable[[Any], Any]


class Linear(torch.nn.Module):
    """A linear layer with a rounded weight, which it returns too."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(COLUMNS, ROWS)
        self.function = function

    def forward(self, x: Any) -> Any:
        weight = self.function(self.linear.weight)
        return weight, torch.nn.functional.linear(x, weight, self.linear.bias)


class Several(torch.nn.Module):
    """Functions of the same data, in one graph: an export takes a second."""

    def __init__(self, functions: dict[str, Function]) -> None:
        super().__init__()
        self.functions = functions
        self.eval()

    def forward(self, x: Any) -> Any:
        return tuple(function(x) for function in self.functions.values())


def Elementwise(function: Function) -> Several:
    return Several({"y": function})


def made(model: Any, *args: Any, **options: Any) -> Any:
    """The exported model, checked."""
    proto = qonnx.export(model.eval(), args, verbose=False, **options).model_proto
    onnx.checker.check_model(proto, full_check=True)
    return proto


def kinds(proto: Any) -> list[str]:
    return [node.op_type for node in proto.graph.node]


def computed(proto: Any, *inputs: Any) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, (t.numpy() for t in inputs), strict=True)))


def path_to(proto: Any, output: str) -> list[str]:
    """The kinds of the nodes that lead from the data to an output."""
    producers = {name: node for node in proto.graph.node for name in node.output}
    found: list[str] = []
    while node := producers.get(output):
        if node.op_type != "Identity":  # of outputs that are alike
            found.insert(0, node.op_type)
        output = node.input[0]
    return found


def compared(model: Several, x: Any) -> Iterator[tuple[str, np.ndarray, Any, list[str]]]:
    """For each function its name, onnxruntime's result, torch's and the nodes."""
    proto = made(model, x)
    rows = zip(model.functions, computed(proto, x), model(x), proto.graph.output, strict=True)
    for name, got, expected, output in rows:
        yield name, got, expected, path_to(proto, output.name)


def same(got: np.ndarray, expected: Any) -> bool:
    """Whether two arrays are bit for bit alike."""
    want = expected.detach().numpy()
    return got.dtype == want.dtype and got.shape == want.shape and got.tobytes() == want.tobytes()


def scale_for(spec: QuantSpec, shape: tuple[int, ...] = (ROWS, COLUMNS)) -> Any:
    """Scales that are no powers of two, by which numbers around 1 fill the range and pass its ends."""
    top = spec.element.hi if spec.quant_max is None else spec.quant_max
    normal = qt.choose_qparams(torch.zeros(shape), spec)[0].shape
    return (torch.linspace(0.31, 0.87, max(int(np.prod(normal)), 1)) / top).reshape(normal)


def hard(scale: Any) -> Any:
    """Data of all signs and sizes: ties, both zeros, infinities, subnormals."""
    x = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    x[0] = (torch.arange(COLUMNS) - COLUMNS // 2 + 0.5) * scale
    x[1, :12] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e38, -1e38, 1e-45, -1e-45, 1e-39, -1e-39, 3e3, -3e3])
    return x


# ---- fake_quantize with a given scale --------------------------------------------------------------------------------

SPECS: dict[str, tuple[QuantSpec, list[str]]] = {
    **{
        f"{name} {label}": (QuantSpec(name, granularity), QDQ)
        for name in ("int4", "uint4", "int8", "uint8", "int16", "uint16")
        for label, granularity in {
            "tensor": PerTensor(),
            "channel": PerChannel(0),
            "group": PerGroup(32),
        }.items()
    },
    **{
        f"{name} {label}": (QuantSpec(name, granularity), QDQ)
        for name in ("fp8_e4m3", "fp8_e5m2", "fp8_e4m3fnuz", "fp8_e5m2fnuz")
        for label, granularity in {"tensor": PerTensor(), "channel": PerChannel(0), "group": PerGroup(32)}.items()
    },
    "last channel": (QuantSpec("int8", PerChannel(-1)), QDQ),
    "token": (QuantSpec("int8", PerToken()), QDQ),
    "ragged groups": (QuantSpec("int4", PerGroup(20)), QDQ),
    "groups along 0": (QuantSpec("int4", PerGroup(4, 0)), QDQ),
    "longer groups": (QuantSpec("int8", PerGroup(128)), QDQ),
    "groups of one": (QuantSpec("int8", PerGroup(1)), QDQ),
    "flat tiles": (QuantSpec("int8", PerBlock((1, 16))), QDQ),
    "tall tiles": (QuantSpec("int8", PerBlock((3, 1))), QDQ),
    "int2": (QuantSpec("int2"), CLIPPED),
    "int3": (QuantSpec("int3", PerChannel(0)), CLIPPED),
    "int5": (QuantSpec("int5", PerGroup(32)), CLIPPED),
    "uint2": (QuantSpec("uint2", PerGroup(32)), CLIPPED),
    "from -127": (QuantSpec("int8", PerChannel(0), quant_min=-127), CLIPPED),
    "from -7": (QuantSpec("int4", PerGroup(32), quant_min=-7), CLIPPED),
    "to 100": (QuantSpec("uint8", quant_max=100), CLIPPED),
    "from -32767": (QuantSpec("int16", PerChannel(0), quant_min=-32767), WIDE_CLIPPED),
    "12 bits": (QuantSpec("uint16", quant_max=4095), WIDE_CLIPPED),
    "another's range": (QuantSpec("int8", quant_min=-8, quant_max=7), QDQ),
}


def given_scale(spec: QuantSpec) -> Function:
    scale = scale_for(spec)
    return lambda x: qt.fake_quantize(x, spec, scale=scale)


def test_given_scale() -> None:
    model = Several({name: given_scale(spec) for name, (spec, _) in SPECS.items()})
    x = hard(torch.tensor(0.6 / 127))
    for name, got, expected, nodes in compared(model, x):
        assert nodes == SPECS[name][1], name
        assert same(got, expected), name
        assert not torch.equal(expected, x), name


def with_zero_point(spec: QuantSpec, *, zero_point: bool = True) -> Function:
    scale = scale_for(spec)
    zeros = (torch.arange(scale.numel()) % int(spec.element.hi) + 1).reshape(scale.shape).int()
    return lambda x: qt.fake_quantize(x, spec, scale=scale, zero_point=zeros if zero_point else None)


def test_zero_point() -> None:
    specs = {
        f"{name} {granularity}": QuantSpec(name, granularity, symmetric=False)
        for name in ("int4", "uint4", "int8", "uint8", "int16", "uint16", "int3")
        for granularity in (PerTensor(), PerChannel(0), PerGroup(32))
    }
    x = hard(torch.tensor(0.6 / 127))
    for name, got, expected, nodes in compared(Several({k: with_zero_point(s) for k, s in specs.items()}), x):
        assert nodes == (CLIPPED if "int3" in name else QDQ), name
        assert same(got, expected), name
        assert not torch.equal(expected, with_zero_point(specs[name], zero_point=False)(x)), name


def test_attributes() -> None:
    specs = [QuantSpec("int8"), QuantSpec("uint4", PerChannel(1)), QuantSpec("fp8_e5m2", PerGroup(32))]
    proto = made(Several({str(spec): given_scale(spec) for spec in specs}), torch.ones(ROWS, COLUMNS))
    dims = {t.name: list(t.dims) for t in proto.graph.initializer}
    found = []
    for node in proto.graph.node:
        values = {a.name: a.i for a in node.attribute}
        where = () if len(dims[node.input[1]]) == 0 else (values["axis"], values.get("block_size", 0))
        found.append((node.op_type, values.get("output_dtype"), dims[node.input[1]], where))
    expected = [
        (onnx.TensorProto.INT8, [], ()),
        (onnx.TensorProto.UINT4, [COLUMNS], (1, 0)),
        (onnx.TensorProto.FLOAT8E5M2, [ROWS, COLUMNS // 32], (1, 32)),
    ]
    rows = [[("QuantizeLinear", *row), ("DequantizeLinear", None, *row[1:])] for row in expected]
    assert found == [node for pair in rows for node in pair]


def in_dtype(function: Function, dtype: str) -> Function:
    """The function on data of another dtype; torch's NumPy has no bfloat16."""
    return lambda x: function(x.to(getattr(torch, dtype))).float()


def test_other_dtypes() -> None:
    """The graph rounds to float32 and back, and saturates where the dtype ends."""
    model = Several(
        {
            f"{name} {dtype}": in_dtype(lambda x, name=name: qt.fake_quantize(x, name, scale=600.7), dtype)
            for name in ("int8", "fp8_e4m3")
            for dtype in ("float16", "bfloat16", "float64")
        }
    )
    for name, got, expected, _ in compared(model, torch.linspace(-9e4, 9e4, 1001)):
        assert same(got, expected), name
        assert "float16" not in name or "bfloat16" in name or expected.max() == 65504


def test_nan() -> None:
    """fp8 keeps NaN; integers have a code of the runtime's choice, as the module's docstring says."""
    names = ("fp8_e4m3", "fp8_e5m2", "fp8_e4m3fnuz", "fp8_e5m2fnuz", "int8")
    model = Several({name: lambda x, name=name: qt.fake_quantize(x, name, scale=0.3) for name in names})
    for name, got, expected, _ in compared(model, torch.tensor([torch.nan, 1.0])):
        assert torch.isnan(expected[0])
        assert np.isnan(got[0]) == (name != "int8")
        assert got[1] == expected[1]


def test_zero_point_that_no_code_can_be() -> None:
    scale, zeros = torch.full((2,), 0.1), torch.tensor([127, 128], dtype=torch.int32)
    model = Elementwise(lambda x: qt.fake_quantize(x, "int8", scale=scale, zero_point=zeros, axis=0))
    x = torch.ones(2, 3)
    (got,) = computed(made(model, x), x)
    assert same(got[:1], model(x)[0][:1])
    assert np.isnan(got[1]).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_three_axes(axis: int) -> None:
    spec = QuantSpec("int8", PerChannel(axis))
    x = torch.randn(4, 6, 10)
    scale = scale_for(spec, tuple(x.shape))
    model = Elementwise(lambda x: qt.fake_quantize(x, spec, scale=scale))
    assert same(computed(made(model, x), x)[0], model(x)[0])


# ---- modules ---------------------------------------------------------------------------------------------------------

MODULES: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "int8 channels": (lambda: FakeQuantize("int8", MinMaxObserver(), axis=0), QDQ),
    "uint8": (lambda: FakeQuantize("uint8", MinMaxObserver()), QDQ),
    "uint4 groups": (lambda: FakeQuantize("uint4", MinMaxObserver(), group_size=32), QDQ),
    "int3 ragged groups": (lambda: FakeQuantize("int3", MinMaxObserver(), group_size=20), CLIPPED),
    "fp8": (lambda: FakeQuantize("fp8_e4m3", MinMaxObserver()), QDQ),
    "lsq": (lambda: LSQFakeQuantize(8), QDQ),
    "lsq channels": (lambda: LSQFakeQuantize(4, axis=0, channels=ROWS), QDQ),
    "lsq unsigned": (lambda: LSQFakeQuantize(3, signed=False), CLIPPED),
    "tqt": (lambda: TQTFakeQuantize(8), QDQ),
    "tqt 4 bits": (lambda: TQTFakeQuantize(4, init="max"), QDQ),
    "tqt 12 bits": (lambda: TQTFakeQuantize(12), WIDE_CLIPPED),
    "given threshold": (lambda: TQTFakeQuantize(8, log_threshold=-1.0), QDQ),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str) -> None:
    """Trained, or observed, and then exported in eval mode, with another length of the batch."""
    make, expected = MODULES[name]
    model = Linear(make())
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for seed in range(3):
        x = torch.randn(4, COLUMNS, generator=torch.Generator().manual_seed(seed))
        model(x)[1].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    proto = made(model, x, dynamic_shapes={"x": {0: "batch"}})
    assert kinds(proto) == [*expected, "Gemm"]
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    for length in (4, 7):
        x = torch.randn(length, COLUMNS)
        weight, y = model(x)
        got = computed(proto, x)
        assert same(got[0], weight)
        np.testing.assert_allclose(got[1], y.detach().numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(-1), PerGroup(32)], ids=str)
def test_rounded_inputs_with_a_dynamic_batch(granularity: Any) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # Groups would be the batch's: their scales are one row's, given.
            self.register_buffer("scale", scale_for(QuantSpec("int8", granularity), (1, COLUMNS)))

        def forward(self, x: Any) -> Any:
            spec = QuantSpec("int8", granularity)
            normal = self.scale if not isinstance(granularity, PerGroup) else self.scale.expand(x.shape[0], -1)
            return (qt.fake_quantize(x, spec, scale=normal),)

    model, x = Model(), torch.randn(4, COLUMNS)
    proto = made(model, x, dynamic_shapes={"x": {0: "batch"}})
    for length in (2, 9):
        x = torch.randn(length, COLUMNS)
        assert same(computed(proto, x)[0], model(x)[0])


@pytest.mark.parametrize(
    ("spec", "options"),
    [("int8", {"axis": 0}), ("uint8", {}), ("int4", {"group_size": 32}), ("int4", {"axis": 0}), ("fp8_e4m3", {})],
    ids=str,
)
def test_quantized_linear(spec: str, options: dict[str, int]) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    layer, x = QuantizedLinear.from_linear(linear, spec, **options), torch.eye(COLUMNS)
    proto = made(layer, x)
    assert kinds(proto)[0] == "DequantizeLinear"
    assert "QuantizeLinear" not in kinds(proto)
    assert same(computed(proto, x)[0], layer(x))  # the identity gives the weight itself


def test_thresholds_are_exact() -> None:
    """Whatever the threshold is: 2^ceil(t), clamped, and NaN."""
    model = Elementwise(lambda t: qt.tqt_quantize(torch.full((1,), -torch.inf), t, bits=8))
    proto = made(model, torch.tensor(0.5))
    for t in [*np.linspace(-126, 126, 85), 0.0, -0.3, 1.0, 127.0, 300.0, -300.0, torch.inf, -torch.inf]:
        threshold = torch.tensor(float(t))
        assert same(computed(proto, threshold)[0], model(threshold)[0])
    assert np.isnan(computed(proto, torch.tensor(torch.nan))[0]).all()


# ---- documented functions --------------------------------------------------------------------------------------------


def scaled(name: str, x: Any, scale: Any, zero_point: Any = None, axis: Any = None, **options: Any) -> Any:
    size, scheme = options.pop("group_size", None), options.pop("qscheme", "per_tensor")
    low, high = options.pop("ends", (None, None))
    return kernel.scaled_fake_quantize(name, x, scale, zero_point, axis, size, low, high, 8, scheme)


CHANNELS = torch.linspace(0.011, 0.093, ROWS)
GROUPS = torch.linspace(0.011, 0.093, ROWS * 6).reshape(ROWS, 6)
DOCUMENTED: dict[str, tuple[Function, list[str]]] = {
    "tensor": (lambda x: scaled("int8", x, torch.tensor(0.0123)), ["Mul", *QDQ]),
    "zero point": (lambda x: scaled("int8", x, torch.tensor(0.0123), torch.tensor(5)), ["Mul", *QDQ]),
    "narrow": (lambda x: scaled("int8", x, torch.tensor(0.0123), ends=(-127, 127)), ["Mul", *CLIPPED]),
    "channels": (lambda x: scaled("uint8", x, CHANNELS, axis=0, qscheme="per_channel"), ["Mul", *QDQ]),
    "channels, zero points": (
        lambda x: scaled("uint8", x, CHANNELS, torch.arange(ROWS), 0, qscheme="per_channel"),
        ["Mul", *QDQ],
    ),
    "groups": (lambda x: scaled("int4", x, GROUPS, axis=1, group_size=16, qscheme="per_group"), ["Mul", *QDQ]),
    "groups, zero points": (
        lambda x: scaled("int4", x, GROUPS, (GROUPS * 50).int(), 1, group_size=16, qscheme="per_group"),
        ["Mul", *QDQ],
    ),
    "fp8": (lambda x: scaled("fp8_e4m3", x, torch.tensor(0.0123)), QDQ),
    "fp8 channels": (lambda x: scaled("fp8_e5m2", x, CHANNELS, axis=0, qscheme="per_channel"), QDQ),
    "lsq": (lambda x: kernel.lsq_quantize(x, torch.tensor(0.0123), None, 1.0, -8, 7), ["Mul", *QDQ]),
}


def test_documented_functions() -> None:
    """Integers are multiplied by 1 / s: at ties that isn't the division."""
    x = hard(torch.tensor(0.0123))
    for name, got, expected, nodes in compared(Several({name: row[0] for name, row in DOCUMENTED.items()}), x):
        assert nodes == DOCUMENTED[name][1], name
        assert same(got, expected), name
    assert not torch.equal(DOCUMENTED["tensor"][0](x), qt.fake_quantize(x, "int8", scale=0.0123))


def test_documented_functions_of_other_dtypes() -> None:
    """fp8's quotient is rounded to the dtype first; a result that is too large is infinite."""
    model = Several(
        {
            f"{name} {dtype}": in_dtype(lambda x, name=name: scaled(name, x, torch.tensor(600.7)), dtype)
            for name in ("int8", "fp8_e4m3")
            for dtype in ("float16", "bfloat16")
        }
    )
    x = torch.linspace(-9e4, 9e4, 10001)
    for name, got, expected, _ in compared(model, x):
        assert same(got, expected), name
        assert "bfloat16" in name or expected.max() == torch.inf
    # The first rounding shows in the data.
    for dtype in (torch.float16, torch.bfloat16):
        x = x.to(dtype)
        once = qt.fake_quantize(x, "fp8_e4m3", scale=600.7)
        assert not torch.equal(scaled("fp8_e4m3", x, torch.tensor(600.7)).nan_to_num(), once)


# ---- the table and export --------------------------------------------------------------------------------------------


def test_table_in_torch_onnx_export(tmp_path: Any) -> None:
    model, x = Elementwise(lambda x: qt.fake_quantize(x, "int8", scale=0.1)), torch.randn(3, 4)
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model,
        (x,),
        path,
        dynamo=True,
        opset_version=21,
        custom_translation_table=qonnx.translation_table(),
        verbose=False,
    )
    assert same(computed(onnx.load(path), x)[0], model(x)[0])


def test_table_has_every_operator() -> None:
    table = qonnx.translation_table()
    packets = [getattr(torch.ops.quark_kernels, name) for name in dir(torch.ops.quark_kernels)]
    names = {f"{p}.{overload}" for p in packets if hasattr(p, "overloads") for overload in p.overloads()}
    assert {str(overload) for overload in table} >= names
    assert "quark_kernels.fake_quantize.zero_point" in {str(overload) for overload in table}


def test_export_writes_and_passes_on(tmp_path: Any) -> None:
    model, x = Elementwise(lambda x: qt.fake_quantize(x, "int8", scale=0.1)), torch.randn(3, 4)
    path = tmp_path / "model.onnx"
    qonnx.export(model, (x,), path, verbose=False, input_names=["data"], opset_version=23)
    proto = onnx.load(path)
    assert proto.graph.input[0].name == "data"
    assert proto.opset_import[0].version == 23
    assert same(computed(proto, x)[0], model(x)[0])


def test_export_of_an_exported_program() -> None:
    model, x = Elementwise(lambda x: qt.fake_quantize(x, "int8", scale=0.1)), torch.randn(3, 4)
    program = qonnx.export(torch.export.export(model, (x,)), verbose=False)
    assert same(computed(program.model_proto, x)[0], model(x)[0])


def test_own_translations_come_first() -> None:
    overload = torch.ops.quark_kernels.fake_quantize.default

    def translation(x: Any, scale: Any, spec: Any) -> Any:
        from onnxscript import opset21

        return opset21.Identity(x)

    model, x = Elementwise(lambda x: qt.fake_quantize(x, "int8", scale=0.1)), torch.randn(3, 4)
    proto = made(model, x, custom_translation_table={overload: translation})
    assert same(computed(proto, x)[0], x)


def test_docstring_example(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = textwrap.dedent((qonnx.__doc__ or "").split("\n\n", 1)[1].split("\n\n``export``")[0])
    exec(blocks, {"torch": torch, "x": torch.randn(4, 64)})
    assert kinds(onnx.load(tmp_path / "net.onnx")) == [*QDQ, "Gemm"]


# ---- errors ----------------------------------------------------------------------------------------------------------

DYNAMIC = "its scales are chosen from the data in each call; allowed: give the scale"
E8M0 = torch.full((ROWS, 3), 0.5).to(torch.float8_e8m0fnu)
REFUSED: dict[str, tuple[Function, str]] = {
    "dynamic": (lambda x: qt.fake_quantize(x, "int8"), f"'int8 block=0,0' can't be exported to ONNX: {DYNAMIC}"),
    "choose_qparams": (lambda x: qt.choose_qparams(x, "int8")[0], DYNAMIC),
    "module without an observer": (FakeQuantize("int8", axis=0), DYNAMIC),
    "fp4": (lambda x: qt.fake_quantize(x, "fp4", scale=0.3), "the format is fp4; allowed: int2, int3, "),
    "fp6": (lambda x: qt.fake_quantize(x, "fp6_e2m3", scale=0.3), "the format is fp6_e2m3; allowed: int2, int3, "),
    "bf16": (lambda x: qt.fake_quantize(x, "bf16"), "the format is bf16; allowed: int2, int3, "),
    "mxfp4": (lambda x: qt.fake_quantize(x, "mxfp4"), "the format is fp4; allowed: "),
    "mxint8": (
        lambda x: qt.fake_quantize(x, "mxint8"),
        "the format is int8f6; allowed: int2, int3, int4, int5, int8, int16, uint2, uint4, uint8, uint16, "
        "fp8_e4m3, fp8_e5m2, fp8_e4m3fnuz, fp8_e5m2fnuz",
    ),
    "e8m0": (
        lambda x: qt.fake_quantize(x, "mxfp8_e4m3", scale=E8M0),
        "its dtype is float8_e8m0fnu, which torch.onnx doesn't know; allowed: float32 scales (powers of two are some",
    ),
    "exponents": (
        lambda x: qt.fake_quantize(x, "bfp16", scale=torch.zeros(ROWS, 12, dtype=torch.int8)),
        "the scales' format is exponent; allowed: float32 scales (powers of two are some too: ",
    ),
    "nvfp4": (lambda x: qt.fake_quantize(x, "nvfp4", scale=torch.tensor(0.3)), "can't be exported to ONNX"),
    "tiles": (
        lambda x: qt.fake_quantize(x, QuantSpec("int8", PerBlock((4, 16))), scale=torch.ones(2, 6)),
        "who shares a scale is block=4,16, tiles of more than one axis; allowed: one scale per tensor, per channel, or",
    ),
    "rounding": (
        lambda x: qt.fake_quantize(x, QuantSpec("int8", rounding="floor"), scale=0.3),
        "the rounding is floor; allowed: half_even",
    ),
    "stochastic": (
        lambda x: qt.fake_quantize(x, QuantSpec("int8", rounding="stochastic"), scale=0.3, seed=1),
        "can't be exported to ONNX",
    ),
    "codes": (
        lambda x: qt.quantize(x, "int8", scale=0.3).qvalue,
        "quantize has no translation; allowed: fake_quantize, lsq_quantize, tqt_quantize, dequantize",
    ),
    "pack": (lambda x: qt.pack(x.to(torch.uint8), 4), "pack has no translation; allowed: fake_quantize, "),
    "packed codes": (QuantizedLinear(COLUMNS, 4, "int4", packed=True), "the codes are packed; allowed: packed=False"),
    "floating zero point": (
        lambda x: scaled("int8", x, torch.tensor(0.3), torch.tensor(0.5)),
        "the zero point is floating, so added before rounding; allowed: integers, or None",
    ),
    "wide range": (
        lambda x: scaled("int8", x, torch.tensor(0.3), ends=(-100000, 100000)),
        "its codes are -100000 to 100000; allowed: ranges within int16's or uint16's",
    ),
    "documented tqt": (
        lambda x: kernel.tqt_quantize(x, torch.tensor(0.3), None, 128, 8),
        "its range is in a tensor, not in the spec; allowed: quark_torch.tqt_quantize or quark_torch.nn.TQT",
    ),
    "documented codes": (
        lambda x: kernel.scaled_real_quantize(
            "int8", x, torch.tensor(0.3), None, None, None, None, None, 8, "per_tensor"
        ),
        "quantize has no translation",
    ),
    "gradient": (
        lambda x: torch.ops.quark_kernels.fake_quantize_backward(x, x, torch.ones(1, 1), "int8 block=0,0"),
        "it is part of a gradient; allowed: models without backward",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    function, message = REFUSED[name]
    model = function if isinstance(function, torch.nn.Module) else Elementwise(function)
    x = torch.ones(ROWS, COLUMNS)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        qonnx.export(model.eval(), (x,), verbose=False)
    assert "can't be exported to ONNX" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int8 block=0 batch=1", "it is a call for a batch, of torch.vmap; allowed: calls outside torch.vmap"),
        ("int8 plus_zero block=0", "it says 'plus_zero'; allowed: specs without it"),
    ],
)
def test_words_that_change_the_meaning(text: str, message: str) -> None:
    """No word is passed over."""
    with pytest.raises(
        ValueError, match=re.escape(f"fake_quantize with the spec {text!r} can't be exported to ONNX: {message}")
    ):
        qonnx._call("fake_quantize", text, (3,))


def test_torchs_error_shows_ours() -> None:
    model = Elementwise(lambda x: qt.fake_quantize(x, "int8"))
    with pytest.raises(torch.onnx.errors.OnnxExporterError) as raised:
        torch.onnx.export(
            model,
            (torch.ones(2, 3),),
            dynamo=True,
            opset_version=21,
            custom_translation_table=qonnx.translation_table(),
            verbose=False,
        )
    assert DYNAMIC in str(raised.value)


@pytest.mark.parametrize("version", [18, 20])
def test_old_operator_sets(version: int) -> None:
    model = Elementwise(lambda x: qt.fake_quantize(x, "int8", scale=0.3))
    with pytest.raises(
        ValueError, match=f"opset_version is {version}; quantization in ONNX needs 21 or more, allowed: "
    ):
        qonnx.export(model, (torch.ones(2, 3),), verbose=False, opset_version=version)


def test_other_errors_stay_what_they_are() -> None:
    class Unknown(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return torch.linalg.eigvals(x)

    with pytest.raises(torch.onnx.errors.OnnxExporterError):
        qonnx.export(Unknown().eval(), (torch.ones(2, 2),), verbose=False)
    with pytest.raises(ValueError, match="dynamo is not True; allowed: True, as only that exporter takes translations"):
        qonnx.export(Unknown(), (torch.ones(2, 2),), dynamo=False)


def test_grouped_axis_of_open_length() -> None:
    spec = QuantSpec("int8", PerToken())
    model = Elementwise(lambda x: qt.fake_quantize(x, spec, scale=torch.ones(2, 3, 1)))
    message = "axis 2 of the data, along which groups run, is dynamic; allowed: a fixed length of that axis"
    with pytest.raises(ValueError, match=message):
        qonnx.export(model, (torch.ones(2, 3, 8),), verbose=False, dynamic_shapes={"x": {2: "length"}})


def test_needs_onnxscript() -> None:
    code = """
        import sys
        import quark_torch
        assert not {"onnx", "onnxscript", "onnx_ir"} & set(sys.modules), "imported without need"
        sys.modules["onnxscript"] = None
        try:
            import quark_torch.onnx
        except ImportError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("quark_torch.onnx can't be used: ")
    assert done.stdout.endswith("; it needs onnx and onnxscript: pip install onnx onnxscript\n")
