"""Wrong calls raise the right exception, and the message names the argument, what came and what is allowed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from quark_kernels import PerBlock, PerChannel, PerGroup, PerToken, QuantSpec, _core

X = np.ones((4, 6), np.float32)
Call = Callable[[Any, Any, Any], Any]  # of the api, its array(), and x

WRONG: list[tuple[str, Call, type[Exception], str]] = [
    ("list", lambda api, a, x: api.quantize([1.0], "int8"), TypeError, r"x is a builtins\.list; allowed: a "),
    ("none", lambda api, a, x: api.fake_quantize(None, "int8"), TypeError, r"x is a builtins\.NoneType"),
    (
        "int_x",
        lambda api, a, x: api.quantize(a(np.ones(3, np.int32)), "int8"),
        TypeError,
        "x has dtype int32; allowed: float32, float16, bfloat16, float64",
    ),
    ("spec_type", lambda api, a, x: api.quantize(x, 8), TypeError, "spec is 8; allowed: a QuantSpec, a preset's name"),
    ("spec_list", lambda api, a, x: api.quantize(x, ["int8"]), TypeError, r"spec is \['int8'\]; allowed"),
    ("spec_none", lambda api, a, x: api.quantize(x, None), TypeError, "spec is None; allowed"),
    (
        "preset",
        lambda api, a, x: api.quantize(x, "int5"),
        ValueError,
        "spec is 'int5'; allowed: int2, int3, int4, int8",
    ),
    (
        "axis",
        lambda api, a, x: api.quantize(x, "int8", axis=2),
        ValueError,
        "axis is 2; x has 2 axes, allowed: -2 to 1",
    ),
    (
        "axis_0d",
        lambda api, a, x: api.quantize(a(np.array(1, np.float32)), "int8", axis=0),
        ValueError,
        "axis is 0; x has 0 axes",
    ),
    (
        "axis_type",
        lambda api, a, x: api.fake_quantize(x, "int8", axis=1.5),
        TypeError,
        "axis is 1.5; allowed: an integer",
    ),
    (
        "group",
        lambda api, a, x: api.quantize(x, "int8", group_size=0),
        ValueError,
        "group_size is 0; allowed: 1 or more",
    ),
    (
        "group_type",
        lambda api, a, x: api.quantize(x, "int8", group_size="3"),
        TypeError,
        "group_size is '3'; allowed: an integer",
    ),
    (
        "token_axis",
        lambda api, a, x: api.quantize(x, QuantSpec("int8", PerToken()), axis=0),
        ValueError,
        r"axis is 0 and group_size is None; PerToken\(\) takes neither",
    ),
    (
        "cast_axis",
        lambda api, a, x: api.quantize(x, "bf16", axis=0),
        ValueError,
        "axis and group_size: bf16 is a cast and has no scales",
    ),
    (
        "cast_scale",
        lambda api, a, x: api.fake_quantize(x, "fp16", scale=1.0),
        ValueError,
        "scale is given; fp16 is a cast and has no scales",
    ),
    (
        "scale_shape",
        lambda api, a, x: api.quantize(x, "int8", axis=0, scale=a(np.ones(5, np.float32))),
        ValueError,
        r"scale has shape \(5,\); int8 channel=0 on x of shape \(4, 6\) allows \(4, 1\), or \(4,\)",
    ),
    (
        "scale_shape_tensor",
        lambda api, a, x: api.quantize(x, "int8", scale=a(np.ones(4, np.float32))),
        ValueError,
        r"scale has shape \(4,\); int8 on x of shape \(4, 6\) allows \(1, 1\), or any shape of one element",
    ),
    (
        "scale_dtype",
        lambda api, a, x: api.quantize(x, "int8", scale=a(np.ones((), np.int32))),
        TypeError,
        "scale has dtype int32; allowed: float32, float16, bfloat16",
    ),
    (
        "scale_type",
        lambda api, a, x: api.quantize(x, "int8", scale="1"),
        TypeError,
        r"scale is a builtins\.str; allowed: a number",
    ),
    (
        "zero_number",
        lambda api, a, x: api.quantize(x, "int8", scale=1.0, zero_point=1.5),
        TypeError,
        "zero_point is a builtins.float; allowed: an integer",
    ),
    (
        "zero_alone",
        lambda api, a, x: api.quantize(x, "int8", zero_point=1),
        ValueError,
        "zero_point is given without scale",
    ),
    (
        "zero_float_format",
        lambda api, a, x: api.quantize(x, "fp8_e4m3", scale=1.0, zero_point=1),
        ValueError,
        "zero_point is given; fp8_e4m3 has none",
    ),
    (
        "zero_dtype",
        lambda api, a, x: api.quantize(x, "int8", scale=1.0, zero_point=a(np.ones((), np.float32))),
        TypeError,
        "zero_point has dtype float32; allowed: int8",
    ),
    (
        "zero_shape",
        lambda api, a, x: api.fake_quantize(x, "int8", scale=1.0, zero_point=a(np.ones(3, np.int32))),
        ValueError,
        r"zero_point has shape \(3,\)",
    ),
    (
        "packed_int8",
        lambda api, a, x: api.quantize(x, "int8", packed=True),
        ValueError,
        "packed is True; a code of int8 fills its bytes already",
    ),
    (
        "packed_type",
        lambda api, a, x: api.quantize(x, "int4", packed=1),
        TypeError,
        "packed is 1; allowed: True, False",
    ),
    (
        "gradient",
        lambda api, a, x: api.fake_quantize(x, "int8", gradient="soft"),
        ValueError,
        "gradient is 'soft'; allowed: clipped, ste",
    ),
    (
        "method",
        lambda api, a, x: api.choose_qparams(x, "int8", method="max"),
        ValueError,
        "method is 'max'; allowed: absmax, minmax",
    ),
    (
        "tile_rank",
        lambda api, a, x: api.quantize(x[0], QuantSpec("int8", PerBlock((2, 2)))),
        ValueError,
        r"x has shape \(6,\); PerBlock tiles the last two axes",
    ),
    ("bits", lambda api, a, x: api.pack(a(np.ones(3, np.uint8)), 9), ValueError, "bits is 9; allowed: 1 to 8"),
    (
        "bits_type",
        lambda api, a, x: api.unpack(a(np.ones(3, np.uint8)), 4.0, signed=True),
        TypeError,
        "bits is 4.0; allowed: an integer",
    ),
    ("pack_dtype", lambda api, a, x: api.pack(x, 4), TypeError, "codes has dtype float32; allowed: int8, uint8"),
    ("pack_0d", lambda api, a, x: api.pack(a(np.array(3, np.uint8)), 4), ValueError, "axis is -1; codes has 0 axes"),
    ("signed", lambda api, a, x: api.unpack(a(np.ones(3, np.uint8)), 4, signed=1), TypeError, "signed is 1; allowed"),
    ("pack_axis", lambda api, a, x: api.pack(a(np.ones(3, np.uint8)), 4, axis="0"), TypeError, "axis is '0'; allowed"),
    (
        "axis_list",
        lambda api, a, x: api.quantize(x, "int8", axis=[0]),
        TypeError,
        r"axis is \[0\]; allowed",
    ),
    ("axis_bool", lambda api, a, x: api.quantize(x, "int8", axis=True), TypeError, "axis is True; allowed: an integer"),
    (
        "channel_group",
        lambda api, a, x: api.quantize(x, QuantSpec("int8", PerChannel(0)), group_size=2),
        ValueError,
        "takes axis= only",
    ),
    ("token_0d", lambda api, a, x: api.quantize(x[0, 0], QuantSpec("int8", PerToken())), ValueError, "x has no axes"),
    (
        "rank",
        lambda api, a, x: api.fake_quantize(x.reshape((1,) * 15 + (4, 6)), "int8"),
        ValueError,
        "x has 17 dimensions; at most 16",
    ),
    (
        "zero_range",
        lambda api, a, x: api.quantize(x, "int8", scale=1.0, zero_point=2**40),
        ValueError,
        "zero_point is 1099511627776; allowed: -2147483648 to 2147483647",
    ),
    ("dequantize_x", lambda api, a, x: api.dequantize(x), TypeError, r"q is a .*; allowed: a quark_\w+\.QTensor"),
    (
        "dequantize_dtype",
        lambda api, a, x: api.quantize(x, "int8").dequantize("bogus"),
        TypeError,
        "dtype is 'bogus'; allowed: a .*dtype or None",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_wrong_calls(call: Call, error: type[Exception], message: str, framework: Any) -> None:
    with pytest.raises(error, match=message):
        call(framework.api, framework.array, framework.array(X))


def test_wrong_calls_under_jit(jax_frontend: Any) -> None:
    """What can be known while tracing is raised while tracing, with the same message."""
    import jax

    api = jax_frontend.api
    with pytest.raises(ValueError, match="axis is 5; x has 2 axes"):
        jax.jit(lambda x: api.quantize(x, "int8", axis=5))(X)
    with pytest.raises(TypeError, match="x has dtype int32"):
        jax.jit(lambda x: api.fake_quantize(x, "int8"))(X.astype(np.int32))


def test_the_other_framework(torch_frontend: Any, jax_frontend: Any) -> None:
    with pytest.raises(TypeError, match=r"x is a jaxlib.*; allowed: a torch\.Tensor"):
        torch_frontend.api.quantize(jax_frontend.array(X), "int8")
    with pytest.raises(TypeError, match=r"x is a torch\.Tensor; allowed: a jax\.Array or NumPy array"):
        jax_frontend.api.quantize(torch_frontend.array(X), "int8")
    with pytest.raises(TypeError, match=r"q is a quark_jax\.qtensor\.QTensor; allowed: a quark_torch\.QTensor"):
        torch_frontend.api.dequantize(jax_frontend.api.quantize(X, "int8"))


def test_corrupt_qtensors(framework: Any) -> None:
    import dataclasses

    q = framework.api.quantize(framework.array(X), "int8", axis=0)
    with pytest.raises(ValueError, match=r"q.qvalue has shape \(4, 5\); .* has qvalue of \(4, 6\)"):
        dataclasses.replace(q, qvalue=q.qvalue[:, :5]).dequantize()
    with pytest.raises(ValueError, match=r"q.scale has shape \(3, 1\); .* allows \(4, 1\)"):
        dataclasses.replace(q, scale=q.scale[:3]).dequantize()
    with pytest.raises(TypeError, match="q.qvalue has dtype uint8; qvalue of int8 channel=0 has dtype int8"):
        dataclasses.replace(q, qvalue=q.qvalue.view(framework.dtype("uint8"))).dequantize()
    with pytest.raises(TypeError, match="q.scale has dtype int8; scale of int8 channel=0 has dtype float32"):
        dataclasses.replace(q, scale=q.qvalue[:, :1]).dequantize()
    with pytest.raises(ValueError, match=r"q\.scale is None; a QTensor of int8 channel=0 has one"):
        dataclasses.replace(q, scale=None).dequantize()


def test_blocks_that_need_any_memory(framework: Any) -> None:
    """A packed block is filled up, so it can't be much longer than the row."""
    for size in (257, 2**31, 2**62):
        with pytest.raises(ValueError, match=f"packed is True; .* has blocks of {size}, allowed for .*: 256"):
            framework.api.quantize(framework.array(X), "bfp16", group_size=size, packed=True)
    for size in (256, 2**62):
        q = framework.api.quantize(framework.array(X), "bfp16", group_size=size, packed=size == 256)
        assert framework.numpy(q.dequantize()).shape == X.shape


def test_specs_that_are_none(framework: Any) -> None:
    import dataclasses

    q = framework.api.quantize(framework.array(X), "int8")
    for spec in ("int8", None, 8):
        with pytest.raises(TypeError, match=f"spec is {spec!r}; allowed: a QuantSpec"):
            dataclasses.replace(q, spec=spec).dequantize()


def test_checks_do_not_depend_on_what_came_before(framework: Any) -> None:
    """1, True and 1.0 are one dictionary key, but only 1 is an axis."""
    api, x = framework.api, framework.array(X)
    api.quantize(x, "int4", axis=1, packed=True)
    for wrong in (True, 1.0):
        with pytest.raises(TypeError, match=f"axis is {wrong}; allowed: an integer"):
            api.quantize(x, "int4", axis=wrong)
    with pytest.raises(TypeError, match="packed is 1; allowed: True, False or None"):
        api.quantize(x, "int4", axis=1, packed=1)


class TestTorch:
    @pytest.fixture
    def api(self, torch_frontend: Any) -> Any:
        return torch_frontend.api

    def test_sparse(self, api: Any) -> None:
        import torch

        with pytest.raises(TypeError, match=r"x has layout torch\.sparse_coo; allowed: torch\.strided"):
            api.quantize(torch.eye(3).to_sparse(), "int8")

    def test_complex(self, api: Any) -> None:
        import torch

        with pytest.raises(TypeError, match="x has dtype complex64"):
            api.fake_quantize(torch.ones(3, dtype=torch.complex64), "int8")

    def test_negative_view(self, api: Any) -> None:
        """A lazy negation must be seen, not the memory behind it."""
        import torch

        x = torch.complex(torch.zeros(4), torch.arange(4.0)).conj().imag
        assert x.is_neg()
        assert api.fake_quantize(x, "int8", scale=1.0).tolist() == [0.0, -1.0, -2.0, -3.0]

    def test_out(self, api: Any) -> None:
        import torch

        x = torch.randn(4, 6)
        expected = api.fake_quantize(x, "int8")
        base = torch.zeros(50)
        with pytest.raises(ValueError, match="overlaps input 0; only data may be the very same tensor in and out"):
            api.fake_quantize(base[:24], "int8", out=base[1:25])
        with pytest.raises(
            ValueError, match=r"out is float32 \(6, 4\) on cpu; allowed: like x, float32 \(4, 6\) on cpu"
        ):
            api.fake_quantize(x, "int8", out=torch.zeros(6, 4))
        with pytest.raises(ValueError, match="out is float16"):
            api.fake_quantize(x, "int8", out=torch.zeros(4, 6, dtype=torch.float16))
        with pytest.raises(ValueError, match="overlaps itself"):
            api.fake_quantize(x, "int8", out=torch.zeros(1, 6).expand(4, 6))
        with pytest.raises(ValueError, match="a gradient is recorded"):
            api.fake_quantize(x.requires_grad_(), "int8", out=torch.zeros(4, 6))
        x = x.detach()
        strided = torch.zeros(6, 4).t()
        assert api.fake_quantize(x, "int8", out=strided) is strided
        assert torch.equal(strided, expected)
        assert api.fake_quantize(x, "int8", out=x) is x
        assert torch.equal(x, expected)

    def test_scale_elsewhere(self, api: Any) -> None:
        import torch

        with pytest.raises(ValueError, match="scale is on meta; x is on cpu"):
            api.quantize(torch.ones(3), "int8", scale=torch.ones((), device="meta"))


class TestCore:
    """The core checks everything again: a frontend's mistake must not become a crash."""

    def test_not_tensors(self) -> None:
        with pytest.raises(TypeError, match="input 0 is a list; allowed: torch tensors and NumPy arrays"):
            _core.pack(([1],), (np.zeros(1, np.uint8),), "codes bits=4")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "empty"),
            ("int6", "unknown format 'int6'; known: int2"),
            ("int8 block=1,x", "lengths must be integers >= 0"),
            ("int8 block=1 block=2", "block is given twice"),
            ("int8 block=1,", "ends in a comma"),
            ("int8 bits=4", "can't read 'bits=4'"),
            ("int8 signed", "can't read 'signed'"),
            ("int8 block=-1", "lengths must be integers >= 0"),
            ("int8 rounding=up", "can't read 'rounding=up'"),
            ("int8 min=5 max=5", "with min < max"),
            ("int8 min=0.5", "must be codes of int8"),
            ("int8 max=nan", "must be codes of int8"),
            ("fp4 min=0", "min and max are for integer formats"),
            ("int16 packed", "int16 has no packed form"),
            ("bf16 rounding=floor", "rounds half_even only"),
            ("int8 nonsense", "can't read 'nonsense'"),
            ("codes bits=9", "packing takes 1 to 8"),
            ("int8 block=" + ",".join(["1"] * 17), "more than 16 axes"),
        ],
    )
    def test_specs(self, text: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            _core.fake_quantize((X, X), (X.copy(),), text)

    def test_tensors(self) -> None:
        one, out = np.ones((1, 1), np.float32), np.empty_like(X)
        wrong: list[tuple[tuple[Any, ...], tuple[Any, ...], type[Exception], str]] = [
            ((X,), (out,), ValueError, "got 1 inputs and 1 outputs"),
            ((X.astype(np.int32), one), (out,), TypeError, "input 0 has dtype int32; allowed: float32"),
            ((X[:, :3], one), (out,), ValueError, r"output 0 has shape \(4, 6\); expected \(4, 3\)"),
            ((X, np.ones((4, 1), np.float32)), (out,), ValueError, r"input 1 has shape \(4, 1\); expected \(1, 1\)"),
            ((X, one), (np.broadcast_to(out[:1], X.shape),), ValueError, "read-only"),
            ((X.astype(">f4"), one), (out,), TypeError, "input 0 is big-endian"),
            ((X, one), (out[:, ::-1][:, :5],), ValueError, "output 0 has shape"),
            ((X.reshape((1,) * 15 + X.shape), one), (out,), ValueError, "has 17 dimensions; at most 16"),
            ((X.astype(np.complex64), one), (out,), TypeError, "complex64, which has no kernel"),
        ]
        for ins, outs, error, message in wrong:
            with pytest.raises(error, match=message):
                _core.fake_quantize(ins, outs, "int8 block=0,0")

    def test_misaligned(self) -> None:
        raw = np.zeros(4 * 24 + 1, np.uint8)[1:].view(np.float32).reshape(4, 6)
        with pytest.raises(ValueError, match="not aligned to its dtype, float32"):
            _core.fake_quantize((raw, np.ones((1, 1), np.float32)), (np.empty_like(X),), "int8 block=0,0")

    def test_reversed_output_overlapping_its_input(self) -> None:
        x = np.arange(6, dtype=np.float32)
        with pytest.raises(ValueError, match="overlaps input 0"):
            _core.fake_quantize((x, np.ones(1, np.float32)), (x[::-1],), "int8 block=0")

    def test_fake_tensors(self, torch_frontend: Any) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            import torch

            x = torch.ones(4)
            assert torch_frontend.api.fake_quantize(x, "int8").shape == (4,)
            with pytest.raises(ValueError, match="has no memory"):
                _core.fake_quantize((x, x[:1]), (x,), "int8 block=0")

    def test_no_leaks(self) -> None:
        """Errors in a loop leave nothing behind."""
        for _ in range(3):
            with pytest.raises(ValueError, match="unknown format"):
                _core.fake_quantize((X, X), (X.copy(),), "nope")
        gc.collect()
        before = len(gc.get_objects())
        for _ in range(500):
            with pytest.raises(ValueError, match="unknown format"):
                _core.fake_quantize((X, X), (X.copy(),), "nope")
        gc.collect()
        assert len(gc.get_objects()) - before < 200


class TestSpecs:
    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (lambda: QuantSpec("int9"), ValueError, "format is 'int9'; allowed: int2"),
            (lambda: QuantSpec(8), ValueError, "format is 8; allowed"),  # type: ignore[arg-type]
            (lambda: QuantSpec("int8", rounding="up"), ValueError, "rounding is 'up'; allowed: half_even, half_up"),
            (lambda: QuantSpec("int8", scale_format="e5m2"), ValueError, "scale_format is 'e5m2'; allowed: float32"),
            (lambda: QuantSpec("int8", scale_rule="best"), ValueError, "scale_rule is 'best'; .* float32 take absmax"),
            (
                lambda: QuantSpec("fp4", scale_format="e8m0", scale_rule="absmax"),
                ValueError,
                "e8m0 take floor, ceil, even",
            ),
            (lambda: QuantSpec("uint8", scale_format="exponent"), ValueError, "it goes with signed integers"),
            (lambda: QuantSpec("int2", scale_format="exponent"), ValueError, "of 3 bits or more, not int2"),
            (lambda: QuantSpec("int8", scale_format="microexponents"), ValueError, "need PerGroup of an even size"),
            (
                lambda: QuantSpec("int8", PerGroup(5), scale_format="microexponents"),
                ValueError,
                "need PerGroup of an even size",
            ),
            (
                lambda: QuantSpec("int8", symmetric=False, scale_format="e8m0"),
                ValueError,
                "go with symmetric specs only",
            ),
            (lambda: QuantSpec("fp16", scale_format="e8m0"), ValueError, "fp16 is a cast: it has no scales"),
            (lambda: QuantSpec.parse("fp4 scale=e8m0 scale=e4m3"), ValueError, "'scale=e4m3' says again"),
            (lambda: QuantSpec.parse("fp4 scale=e8m0 rule=up"), ValueError, "scale_rule is 'up'"),
            (lambda: QuantSpec("int8", 3), TypeError, r"granularity is 3; allowed: PerTensor\(\)"),  # type: ignore[arg-type]
            (lambda: QuantSpec("int8", symmetric=1), TypeError, "symmetric is 1"),  # type: ignore[arg-type]
            (lambda: QuantSpec("fp4", symmetric=False), ValueError, "symmetric is False; fp4 has no zero point"),
            (lambda: QuantSpec("fp4", quant_max=3), ValueError, "quant_max is 3; only integer formats take a range"),
            (lambda: QuantSpec("int4", quant_max=8), ValueError, "quant_max is 8; int4 has codes from -8 to 7"),
            (lambda: QuantSpec("int4", quant_min=2.0), TypeError, "quant_min is 2.0; allowed: an integer"),  # type: ignore[arg-type]
            (lambda: QuantSpec("int4", quant_min=3, quant_max=3), ValueError, "quant_min 3 isn't below quant_max 3"),
            (
                lambda: QuantSpec("int4", quant_max=-1),
                ValueError,
                "quant_max is -1; a symmetric range needs it above 0",
            ),
            (lambda: QuantSpec("bf16", PerToken()), ValueError, "bf16 is a cast: it has no scales"),
            (lambda: QuantSpec("bf16", rounding="floor"), ValueError, "bf16 is a cast"),
            (lambda: PerGroup(0), ValueError, "size is 0; allowed: 1 or more"),
            (lambda: PerGroup(2.0), TypeError, "size is 2.0"),  # type: ignore[arg-type]
            (lambda: PerChannel("0"), TypeError, "axis is '0'"),  # type: ignore[arg-type]
            (lambda: PerBlock(128), ValueError, r"size is 128; allowed: a tuple \(rows, columns\)"),  # type: ignore[arg-type]
            (lambda: PerBlock((0, 1)), ValueError, "size is 0; allowed: 1 or more"),
            (lambda: QuantSpec.parse("int8 what=1"), ValueError, "can't read 'what=1' in the spec"),
            (lambda: QuantSpec.parse("int8 group=1,0 channel=0"), ValueError, "'channel=0' says again"),
            (lambda: QuantSpec.parse(None), TypeError, "text is None"),  # type: ignore[arg-type]
            (lambda: QuantSpec.parse("int8 group=1"), ValueError, "can't read 'group=1'"),
            (lambda: QuantSpec.parse(""), ValueError, "format is ''; allowed: int2"),
            (lambda: QuantSpec.from_json({}), ValueError, "not a QuantSpec's JSON"),
        ],
    )
    def test_wrong_specs(self, make: Callable[[], Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            make()

    def test_round_trips(self) -> None:
        import json

        from matrix import CASES

        for spec in {case.spec for case in CASES}:
            assert QuantSpec.parse(str(spec)) == spec
            assert QuantSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
            assert len(str(spec)) < 80


def test_byte_orders_in_jax() -> None:
    pytest.importorskip("jax")
    import quark_jax

    for x in (np.ones(4, ">f4"), np.ones((), ">f8")):
        with pytest.raises(TypeError, match=f"x has dtype {x.dtype.str}; allowed: this machine's byte order, <f"):
            quark_jax.fake_quantize(x, "int8")
