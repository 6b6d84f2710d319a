"""The public functions that every transform of torch and JAX is tried on, and what came of it.

A ``Variant`` is one way to call a function: what it is given, as NumPy arrays, and which of these have a gradient. Its
``example(i)`` are the arrays of example i, all of the same shapes, so that a batch can be made of them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from quark_kernels import PerBlock, PerChannel, PerGroup, PerToken, QuantSpec
from quark_kernels.spec import as_spec

Arrays = tuple[np.ndarray, ...]
Make = Callable[[np.random.Generator], Arrays]

SHAPE = (3, 64)

TRANSFORMS: dict[str, tuple[str, ...]] = {
    "torch": (
        "eager backward",
        "opcheck",
        "compile",
        "compile (dynamic shapes)",
        "export",
        "export (strict)",
        "fake tensors",
        "vmap",
        "func.grad",
        "vmap(grad)",
        "compile(grad)",
        "forward-mode",
        "checkpoint",
        "autocast",
        "DataLoader workers",
        "DTensor",
    ),
    "jax": (
        "jit",
        "grad",
        "vmap",
        "vmap(grad)",
        "grad(vmap)",
        "jvp",
        "scan",
        "checkpoint",
        "donation",
        "export",
        "AOT",
        "sharded jit",
        "explicit mesh",
        "shard_map",
        "partial shard_map",
    ),
}

RESULTS: dict[tuple[str, str, str], str] = {}
"""(framework, function, transform): "works", or the outcome that a test has checked."""


def record(framework: str, function: str, transform: str, outcome: str = "works") -> None:
    """Note what a test found. Where variants of a function differ, what isn't "works" is kept."""
    assert transform in TRANSFORMS[framework], transform
    assert any(f.name == function for f in FUNCTIONS), function
    key = framework, function, transform
    outcomes = {*RESULTS.get(key, "works").split("; "), *outcome.split("; ")} - {"works"}
    RESULTS[key] = "; ".join(sorted(outcomes)) or "works"


class Variant(NamedTuple):
    """One way to call a function."""

    label: str
    make: Make
    call: Callable[..., Any]
    """Takes a framework's module (``quark_torch``, or ``quark_torch.kernel`` for a documented function) and arrays."""
    differentiable: tuple[int, ...] = ()
    """Which of the arrays have a gradient."""

    def example(self, i: int = 0) -> Arrays:
        """The arrays of example i."""
        return tuple(np.asarray(a) for a in self.make(np.random.default_rng(i)))


class Function(NamedTuple):
    """A public function: its name ("kernel.x": a documented one) and how it is called."""

    name: str
    variants: tuple[Variant, ...]

    def api(self, package: Any) -> Any:
        """The module of ``quark_torch`` or ``quark_jax`` that has the function."""
        return importlib.import_module(f"{package.__name__}.kernel") if self.name.startswith("kernel.") else package


def dtype_of(api: Any, name: str) -> Any:
    """A framework's dtype of this name."""
    if "torch" in api.__name__:
        return getattr(sys.modules["torch"], name)
    return np.dtype(getattr(ml_dtypes, name, name))


# ---- arrays ----------------------------------------------------------------------------------------------------------


def _data(shape: tuple[int, ...] = SHAPE, dtype: Any = np.float32) -> Make:
    return lambda rng: ((rng.standard_normal(shape) * np.exp2(rng.integers(-3, 3, shape))).astype(dtype),)


def _scale(shape: tuple[int, ...], dtype: Any = np.float32) -> Make:
    return lambda rng: (rng.uniform(0.02, 0.1, shape).astype(dtype),)


def _whole(low: int, high: int, shape: tuple[int, ...], dtype: Any = np.int32) -> Make:
    return lambda rng: (rng.integers(low, high, shape).astype(dtype),)


def _bytes(shape: tuple[int, ...], dtype: Any = np.uint8, top: int = 256) -> Make:
    """Any codes of 8 bits, or fewer."""
    return lambda rng: (rng.integers(0, top, shape).astype(np.uint8).view(dtype),)


def _threshold(rng: np.random.Generator) -> Arrays:
    return (np.float32(rng.uniform(-1.0, 2.0)).reshape(()),)


def _fp8(dtype: Any) -> Make:
    return lambda rng: (rng.standard_normal(SHAPE).astype(dtype),)


def _all(*makers: Make) -> Make:
    return lambda rng: tuple(a for make in makers for a in make(rng))


_E4M3, _E5M2, _BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.bfloat16
_SEED = _whole(0, 2**31 - 1, ())
_STOCHASTIC = QuantSpec("int4", PerToken(), rounding="stochastic")


# ---- the everyday functions ------------------------------------------------------------------------------------------


def _scaled(name: str, spec: Any, **keywords: Any) -> Callable[..., Any]:
    """A call of quantize or fake_quantize with x and, in this order, a scale and a zero point."""

    def call(api: Any, x: Any, scale: Any = None, zero_point: Any = None) -> Any:
        return getattr(api, name)(x, spec, scale=scale, zero_point=zero_point, **keywords)

    return call


def _seeded(name: str, **keywords: Any) -> Callable[..., Any]:
    def call(api: Any, x: Any, seed: Any, scale: Any = None) -> Any:
        return getattr(api, name)(x, _STOCHASTIC, seed=seed, scale=scale, **keywords)

    return call


def _quantizers(name: str, gradient: tuple[int, ...], **keywords: Any) -> tuple[Variant, ...]:
    """What quantize and fake_quantize have in common."""
    affine = QuantSpec("uint8", PerChannel(0), symmetric=False)
    groups, tiles = QuantSpec("int4", PerGroup(16)), QuantSpec("fp8_e4m3", PerBlock((2, 32)))
    x = _data()
    return (
        Variant("dynamic", x, _scaled(name, "int8", **keywords), gradient),
        Variant("dynamic affine", x, _scaled(name, affine, **keywords), gradient),
        Variant("dynamic 0-d", _data(()), _scaled(name, "int8", **keywords), gradient),
        Variant("given", _all(x, _scale(())), _scaled(name, "int8", **keywords), gradient),
        Variant(
            "given zero point",
            _all(_data(dtype=_BF16), _scale((3,)), _whole(100, 150, (3,))),
            _scaled(name, affine, **keywords),
            gradient,
        ),
        Variant("given groups", _all(x, _scale((3, 4))), _scaled(name, groups, **keywords), gradient),
        Variant(
            "given tiles", _all(_data(dtype=np.float16), _scale((2, 2))), _scaled(name, tiles, **keywords), gradient
        ),
        Variant("mxfp4", x, _scaled(name, "mxfp4", **keywords), gradient),
        Variant("nvfp4", x, _scaled(name, "nvfp4", **keywords), gradient),
        Variant("nvfp4 given", _all(x, _scale(())), _scaled(name, "nvfp4", **keywords), gradient),
        Variant("mx6", x, _scaled(name, "mx6", **keywords), gradient),
        Variant("bfp16", x, _scaled(name, "bfp16", **keywords), gradient),
        Variant("cast", x, _scaled(name, "bf16", **keywords), gradient),
        Variant("stochastic", _all(x, _SEED), _seeded(name, **keywords), gradient),
        Variant("stochastic given", _all(x, _SEED, _scale((3, 1))), _seeded(name, **keywords), gradient),
        Variant(
            "stochastic number",
            x,
            lambda api, x: getattr(api, name)(x, _STOCHASTIC, seed=2**64 - 3, **keywords),
            gradient,
        ),
    )


_QUANTIZE = (
    *_quantizers("quantize", ()),
    Variant("packed", _data(), _scaled("quantize", "int3", axis=0, packed=True)),
    Variant("packed blocks", _data(), _scaled("quantize", "bfp16", packed=True)),
    Variant("packed 0-d", _data(()), _scaled("quantize", "int4", packed=True)),
)

_PARTS = ("qvalue", "scale", "zero_point", "global_scale", "pair_bits")


def _dequantize(
    spec: Any, *parts: str, packed: bool = False, dtype: str | None = None, shape: tuple[int, ...] = SHAPE
) -> Callable[..., Any]:
    """A call of dequantize with these parts of a QTensor."""

    def call(api: Any, *arrays: Any) -> Any:
        given = dict(zip(parts, arrays, strict=True))
        everything = [given.get(part) for part in _PARTS]
        whole = (*arrays[0].shape[:-1], shape[-1]) if shape else ()
        q = api.QTensor(*everything, as_spec(spec, None), whole, dtype_of(api, "float32"), packed)
        return api.dequantize(q) if dtype is None else api.dequantize(q, dtype_of(api, dtype))

    return call


_DEQUANTIZE = (
    Variant(
        "per tensor",
        _all(_whole(-128, 128, SHAPE, np.int8), _scale(())),
        _dequantize("int8", "qvalue", "scale"),
        (1,),
    ),
    Variant(
        "zero points",
        _all(_whole(0, 256, SHAPE, np.uint8), _scale((3, 1)), _whole(100, 150, (3, 1))),
        _dequantize(QuantSpec("uint8", PerChannel(0)), "qvalue", "scale", "zero_point", dtype="bfloat16"),
        (1,),
    ),
    Variant(
        "groups",
        _all(_fp8(_E4M3), _scale((3, 4))),
        _dequantize(QuantSpec("fp8_e4m3", PerGroup(16)), "qvalue", "scale"),
        (1,),
    ),
    Variant(
        "packed",
        _all(_bytes((3, 32)), _scale((3, 1))),
        _dequantize(QuantSpec("int4", PerToken()), "qvalue", "scale", packed=True),
        (1,),
    ),
    Variant(
        "packed 0-d",
        _all(_bytes((1,)), _scale(())),
        _dequantize("int4", "qvalue", "scale", packed=True, shape=()),
        (1,),
    ),
    Variant(
        "mxfp4",
        _all(
            _bytes((3, 32)),
            lambda rng: (rng.integers(119, 130, (3, 2)).astype(np.uint8).view(np.dtype(ml_dtypes.float8_e8m0fnu)),),
        ),
        _dequantize("mxfp4", "qvalue", "scale", packed=True),
    ),
    Variant(
        "nvfp4",
        _all(
            _bytes((3, 32)),
            lambda rng: (rng.uniform(1, 100, (3, 4)).astype(_E4M3),),
            _scale(()),
        ),
        _dequantize("nvfp4", "qvalue", "scale", "global_scale", packed=True),
    ),
    Variant(
        "mx6",
        _all(_whole(-15, 16, SHAPE, np.int8), _whole(-6, 4, (3, 4), np.int8), _bytes((3, 4))),
        _dequantize("mx6", "qvalue", "scale", "pair_bits"),
    ),
    Variant("packed blocks", _bytes((3, 72)), _dequantize("bfp16", "qvalue", packed=True)),
)

_FAKE_QUANTIZE = (
    *_quantizers("fake_quantize", (0,)),
    Variant("straight through", _data(), _scaled("fake_quantize", "int8", gradient="ste"), (0,)),
    Variant(
        "straight through given", _all(_data(), _scale(())), _scaled("fake_quantize", "int4", gradient="ste"), (0,)
    ),
)


def _choose(spec: Any, **keywords: Any) -> Callable[..., Any]:
    return lambda api, x: api.choose_qparams(x, spec, **keywords)


_CHOOSE_QPARAMS = (
    Variant("absmax", _data(), _choose("int8")),
    Variant("affine groups", _data(dtype=_BF16), _choose("uint8", group_size=16)),
    Variant("percentile", _data(), _choose("int4", axis=0, method="percentile=90")),
    Variant("mse", _data(), _choose("uint4", axis=0, method="mse")),
    Variant("mxfp4", _data(), _choose("mxfp4")),
    Variant("nvfp4", _data(), _choose("nvfp4")),
    Variant("bfp16", _data(), _choose("bfp16")),
)


def _lsq(api: Any, x: Any, scale: Any, zero_point: Any = None, axis: int | None = None, **keywords: Any) -> Any:
    return api.lsq_quantize(x, scale, zero_point, quant_min=-8, quant_max=7, axis=axis, **keywords)


_LSQ = (
    Variant("per tensor", _all(_data(), _scale(())), _lsq, (0, 1)),
    Variant("per channel", _all(_data(dtype=_BF16), _scale((3,), _BF16)), lambda *a: _lsq(*a, axis=0), (0, 1)),
    Variant(
        "zero points",
        _all(_data(), _scale((3,)), _whole(-3, 4, (3,))),
        lambda *a: _lsq(*a, axis=0, rounding="half_away"),
        (0, 1),
    ),
    Variant("factor", _all(_data(), _scale((1,))), lambda *a: _lsq(*a, grad_factor=0.5), (0, 1)),
)

_TQT = (
    Variant("plain", _all(_data(), _threshold), lambda api, x, t: api.tqt_quantize(x, t), (0, 1)),
    Variant(
        "zero point",
        _all(_data(dtype=np.float16), _threshold, _whole(-3, 4, ())),
        lambda api, x, t, z: api.tqt_quantize(x, t, bits=4, zero_point=z, rounding="half_up"),
        (0, 1),
    ),
)

_PACK = (
    Variant("last axis", _bytes((3, 10)), lambda api, c: api.pack(c, 3)),
    Variant("first axis", _bytes((3, 10), np.int8), lambda api, c: api.pack(c, 4, 0)),
)

_UNPACK = (
    Variant("last axis", _bytes((3, 10)), lambda api, p: api.unpack(p, 3, signed=True)),
    Variant("first axis", _bytes((3, 10)), lambda api, p: api.unpack(p, 4, 0, signed=False)),
)


# ---- the documented functions ----------------------------------------------------------------------------------------


def _quant_fp8(name: str) -> tuple[Variant, ...]:
    return (
        Variant("plain", _data(), lambda api, x: getattr(api, name)(x), (0,)),
        Variant("scale", _all(_data(dtype=_BF16), _scale(())), lambda api, x, s: getattr(api, name)(x, s), (0,)),
    )


def _dequant_fp8(name: str, dtype: Any) -> tuple[Variant, ...]:
    return (
        Variant("plain", _fp8(dtype), lambda api, x: getattr(api, name)(x), (0,)),
        Variant("scale", _all(_fp8(dtype), _scale(())), lambda api, x, s: getattr(api, name)(x, s), (0,)),
    )


def _documented(
    name: str, quant_dtype: str, qscheme: str | None, axis: int | None = None, size: int | None = None, **how: Any
) -> Callable[..., Any]:
    """A call of the scaled functions with inputs, scale and zero point."""

    def call(api: Any, x: Any, s: Any = None, z: Any = None) -> Any:
        if name == "dequantize":
            return api.dequantize(quant_dtype, x, s, z, axis, size, qscheme)
        low, high, mode = how.get("low"), how.get("high"), how.get("mode", 8)
        return getattr(api, name)(quant_dtype, x, s, z, axis, size, low, high, mode, qscheme)

    return call


def _scaled_fake(name: str, codes: bool) -> tuple[Variant, ...]:
    """What the two scaled functions have in common. ``codes``: integers and bytes come out, without a gradient."""
    passing, integers = (0,), () if codes else (0,)
    return (
        Variant("int8", _all(_data(), _scale(())), _documented(name, "int8", "per_tensor"), integers),
        Variant(
            "per channel",
            _all(_data(dtype=_BF16), _scale((64,)), _whole(-3, 4, (64,))),
            _documented(name, "int4", "per_channel", 1, low=-8, high=7, mode=3),
            integers,
        ),
        Variant(
            "per group",
            _all(_data(), _scale((3, 4)), _scale((3, 4))),
            _documented(name, "uint8", "per_group", -1, 16),
            integers,
        ),
        Variant("fp8", _all(_data(), _scale(())), _documented(name, "fp8_e4m3", "per_tensor"), passing),
        Variant(
            "fp8 per channel",
            _all(_data(dtype=np.float16), _scale((3,))),
            _documented(name, "fp8_e5m2", "per_channel", 0),
            passing,
        ),
        Variant("fp4", _all(_data(), _scale((3, 4))), _documented(name, "fp4", "per_group", 1, 16), integers),
        Variant("float16", _data(), _documented(name, "float16", None), passing),
    )


_DOCUMENTED_DEQUANTIZE = (
    Variant(
        "int8",
        _all(_whole(-128, 128, SHAPE), _scale((3,)), _whole(-3, 4, (3,))),
        _documented("dequantize", "int8", "per_channel", 0),
    ),
    Variant("fp4", _all(_bytes(SHAPE, top=16), _scale((3, 4))), _documented("dequantize", "fp4", "per_group", 1, 16)),
    Variant("fp8", _all(_fp8(_E4M3), _scale(())), _documented("dequantize", "fp8_e4m3", "per_tensor"), (0,)),
    Variant("float16", _data(dtype=np.float16), _documented("dequantize", "float16", None), (0,)),
)


def _block(name: str, quant_dtype: str, element: str | None, axis: int, size: int) -> Callable[..., Any]:
    return lambda api, x: getattr(api, name)(x, quant_dtype, element, axis, size)


_NON_SCALED_FAKE = tuple(
    Variant(f"{kind} {element or ''}".strip(), _data(dtype=dtype), _block(fake, kind, element, axis, size), (0,))
    for fake in ("non_scaled_fake_quantize",)
    for kind, element, axis, size, dtype in (
        ("mx", "fp4", -1, 32, np.float32),
        ("mx", "fp8_e5m2", 0, 2, _BF16),
        ("mx6", None, -1, 16, np.float32),
        ("mx9", None, 1, 16, _BF16),
        ("bfp16", None, -1, 8, np.float32),
    )
)

_NON_SCALED_REAL = (
    Variant("last axis", _data(), _block("non_scaled_real_quantize", "mx", "fp4", -1, 32), (0,)),
    Variant("first axis", _data(dtype=_BF16), _block("non_scaled_real_quantize", "mx", "fp4", 0, 3), (0,)),
)

_DOCUMENTED_TQT = (
    Variant("plain", _all(_data(), _threshold), lambda api, x, t: api.tqt_quantize(x, t, None, 128, 8), (0, 1)),
    Variant(
        "zero point",
        _all(_data(dtype=_BF16), _threshold, _whole(-3, 4, ())),
        lambda api, x, t, z: api.tqt_quantize(x, t, z, 8.0, 3),
        (0, 1),
    ),
)

_DOCUMENTED_LSQ = (
    Variant(
        "per tensor", _all(_data(), _scale(())), lambda api, x, s: api.lsq_quantize(x, s, None, 0.1, -8, 7), (0, 1)
    ),
    Variant(
        "per channel",
        _all(_data(dtype=_BF16), _scale((3,)), _scale((3,))),
        lambda api, x, s, z: api.lsq_quantize(x, s, z, 0.1, -8, 7, 0, 3),
        (0, 1),
    ),
)

FUNCTIONS: tuple[Function, ...] = (
    Function("quantize", _QUANTIZE),
    Function("dequantize", _DEQUANTIZE),
    Function("fake_quantize", _FAKE_QUANTIZE),
    Function("choose_qparams", _CHOOSE_QPARAMS),
    Function("lsq_quantize", _LSQ),
    Function("tqt_quantize", _TQT),
    Function("pack", _PACK),
    Function("unpack", _UNPACK),
    Function("kernel.quant_fp8_e4m3", _quant_fp8("quant_fp8_e4m3")),
    Function("kernel.dequant_fp8_e4m3", _dequant_fp8("dequant_fp8_e4m3", _E4M3)),
    Function("kernel.quant_fp8_e5m2", _quant_fp8("quant_fp8_e5m2")),
    Function("kernel.dequant_fp8_e5m2", _dequant_fp8("dequant_fp8_e5m2", _E5M2)),
    Function("kernel.scaled_fake_quantize", _scaled_fake("scaled_fake_quantize", codes=False)),
    Function("kernel.non_scaled_fake_quantize", _NON_SCALED_FAKE),
    Function("kernel.scaled_real_quantize", _scaled_fake("scaled_real_quantize", codes=True)),
    Function("kernel.non_scaled_real_quantize", _NON_SCALED_REAL),
    Function("kernel.dequantize", _DOCUMENTED_DEQUANTIZE),
    Function("kernel.tqt_quantize", _DOCUMENTED_TQT),
    Function("kernel.lsq_quantize", _DOCUMENTED_LSQ),
)

CELLS: list[tuple[Function, Variant]] = [(function, variant) for function in FUNCTIONS for variant in function.variants]
IDS = [f"{function.name} {variant.label}".replace(" ", "-") for function, variant in CELLS]
