"""The layouts of compressed-tensors: what the package wrote, what it reads, and the bits counted by hand.

``compressed_tensors.safetensors`` holds what compressed-tensors 0.20.0 made of small weights. With the package
installed, ``python tests/test_compressed_tensors.py`` records it anew, and the tests compare with it directly as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quark_kernels import PRESETS, PerBlock, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec, interop

RECORDED = Path(__file__).with_name("compressed_tensors.safetensors")
NAME = "model.layers.0.mlp.up_proj.weight"


@dataclass(frozen=True)
class Weight:
    """A weight, and the spec that it is quantized to."""

    spec: QuantSpec
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.spec} {self.shape}"

    @property
    def strategy(self) -> str:
        return interop.compressed_tensors_scheme(self.spec)["weights"]["strategy"]

    def values(self) -> np.ndarray:
        seed = sum(map(ord, str(self)))
        return np.random.default_rng(seed).standard_normal(self.shape).astype(np.float32)


def _weights() -> Iterator[Weight]:
    for bits in (2, 3, 4, 5, 8):
        for symmetric in (True, False):
            spec = QuantSpec(f"int{bits}", symmetric=symmetric)
            yield Weight(spec, (5, 33))
            yield Weight(replace(spec, granularity=PerToken()), (7, 33))
            yield Weight(replace(spec, granularity=PerGroup(8)), (12, 40))
    yield Weight(QuantSpec("int4", PerChannel(0), symmetric=False), (9, 5))
    yield Weight(QuantSpec("int4", PerGroup(16), symmetric=False), (2, 9, 32))
    yield Weight(QuantSpec("int3", PerToken(), symmetric=False), (2, 9, 7))
    yield Weight(PRESETS["mxfp4"], (3, 64))
    yield Weight(PRESETS["nvfp4"], (4, 48))


WEIGHTS = list(_weights())
UNSIGNED = [
    Weight(replace(PRESETS[name], granularity=granularity), (7, 40))
    for name in ("uint2", "uint4", "uint8")
    for granularity in (PerTensor(), PerChannel(0), PerGroup(8))
]


def raw(a: Any) -> bytes:
    """A tensor's bytes, whichever the framework."""
    if isinstance(a, np.ndarray) or not hasattr(a, "detach"):
        return np.asarray(a).tobytes()
    import torch

    return a.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy().tobytes()


def as_numpy(a: Any) -> np.ndarray:
    return np.asarray(a) if not hasattr(a, "detach") else a.numpy()


def assert_same_tensors(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert sorted(ours) == sorted(theirs)
    for name, a in ours.items():
        b = theirs[name]
        assert (tuple(a.shape), str(a.dtype).removeprefix("torch.")) == (
            tuple(b.shape),
            str(b.dtype).removeprefix("torch."),
        ), name
        assert raw(a) == raw(b), name


def assert_same_qtensor(ours: Any, theirs: Any) -> None:
    assert (ours.spec, ours.shape, ours.dtype, ours.packed) == (theirs.spec, theirs.shape, theirs.dtype, theirs.packed)
    for name in ours.ARRAYS:
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert (a.shape, a.dtype, raw(a)) == (b.shape, b.dtype, raw(b)), name


# ---- what the package wrote ------------------------------------------------------------------------------------------


def recorded(weight: Weight, framework: str) -> tuple[dict[str, Any], Any]:
    """The package's tensors, and the numbers that it read back from them."""
    prefix = f"{weight}: "
    tensors = interop.load_safetensors(RECORDED, framework)
    mine = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return {name: t for name, t in mine.items() if name.startswith("weight_")}, mine["decompressed"]


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_recorded(weight: Weight, framework: Any) -> None:
    tensors, decompressed = recorded(weight, framework.name)
    q = interop.from_compressed_tensors(tensors, weight.spec, dtype="float32")
    assert q.shape == weight.shape
    numbers, expected = framework.numpy(q.dequantize()), framework.numpy(decompressed).astype(np.float32)
    if weight.strategy == "tensor_group":  # the package divides by the global scale, in bfloat16
        assert np.allclose(numbers, expected, rtol=2**-7, atol=0)
    else:
        assert np.array_equal(numbers, expected)
    assert_same_tensors(interop.to_compressed_tensors(q), tensors)


@pytest.mark.parametrize("weight", [w for w in WEIGHTS if w.strategy != "tensor_group"], ids=str)
def test_quantize_gives_the_recorded_codes(weight: Weight, framework: Any) -> None:
    tensors, _ = recorded(weight, framework.name)
    given = interop.from_compressed_tensors(tensors, weight.spec)
    x = framework.array(weight.values())
    q = framework.api.quantize(x, weight.spec, scale=given.scale, zero_point=given.zero_point)
    assert_same_tensors(interop.to_compressed_tensors(q), tensors)


# ---- the bits, counted by hand ---------------------------------------------------------------------------------------


def codes_of(words: np.ndarray, bits: int, length: int) -> np.ndarray:
    """Codes of the last axis as Python integers: a row is one number of 32 bits a word, the first word the lowest."""
    rows = []
    for row in words.reshape(-1, words.shape[-1]).tolist():
        number = sum((word % 2**32) << (32 * i) for i, word in enumerate(row))
        rows.append([number >> (bits * i) & (2**bits - 1) for i in range(length)])
        assert number >> (bits * length) == 0, "filled up with zeros"
    return np.array(rows, np.int64).reshape(*words.shape[:-1], length)


@pytest.mark.parametrize(
    ("weight", "packed"),
    [(w, p) for w in (*WEIGHTS[:-2], *UNSIGNED) for p in (False, True) if not (p and w.spec.element.bits == 8)],
    ids=str,
)
def test_integers_bit_by_bit(weight: Weight, packed: bool, framework: Any) -> None:
    bits = weight.spec.element.bits
    q = framework.api.quantize(framework.array(weight.values()), weight.spec, packed=packed)
    tensors = interop.to_compressed_tensors(q, NAME)
    half = 2 ** (bits - 1) if weight.spec.element.lo < 0 else 0
    whole = framework.api.quantize(framework.array(weight.values()), weight.spec)
    words = as_numpy(tensors[f"{NAME}_packed"])
    assert words.dtype == np.int32
    assert words.shape == (*weight.shape[:-1], -(-weight.shape[-1] * bits // 32))
    assert np.array_equal(
        codes_of(words, bits, weight.shape[-1]), framework.numpy(whole.qvalue).astype(np.int64) + half
    )
    assert np.asarray(tensors[f"{NAME}_shape"]).tolist() == list(weight.shape)
    assert np.asarray(tensors[f"{NAME}_shape"]).dtype == np.int64
    scale = as_numpy(tensors[f"{NAME}_scale"])
    assert np.array_equal(scale.reshape(-1), framework.numpy(q.scale).reshape(-1))
    if q.zero_point is None:
        assert len(tensors) == 3
        return
    zero = framework.numpy(q.zero_point).astype(np.int64) + half
    given = as_numpy(tensors[f"{NAME}_zero_point"])
    if weight.strategy == "tensor":
        assert (given.dtype, given.shape) == (np.int8, (1,))
        assert given[0] == zero - 2 ** (bits - 1)
        return
    assert given.dtype == np.int32
    rows = zero.reshape(*weight.shape[:-1], -1).swapaxes(-1, -2)
    assert np.array_equal(codes_of(given.swapaxes(-1, -2), bits, weight.shape[-2]), rows)


@pytest.mark.parametrize("weight", [*WEIGHTS[:-1], *UNSIGNED], ids=str)
def test_there_and_back(weight: Weight, framework: Any) -> None:
    packs = [False] if weight.spec.element.bits == 8 else [False, True]
    for packed in packs:
        q = framework.api.quantize(framework.array(weight.values()), weight.spec, packed=packed)
        tensors = interop.to_compressed_tensors(q, NAME)
        assert all(name.startswith(f"{NAME}_") for name in tensors)
        back = interop.from_compressed_tensors(tensors, weight.spec, NAME, dtype="float32", packed=packed)
        assert_same_qtensor(back, q)


def test_torch_and_jax_give_the_same_file(torch_frontend: Any, jax_frontend: Any, tmp_path: Path) -> None:
    for weight in (*WEIGHTS, *UNSIGNED):
        for frontend in (torch_frontend, jax_frontend):
            q = frontend.api.quantize(frontend.array(weight.values()), weight.spec)
            interop.save_safetensors(tmp_path / frontend.name, interop.to_compressed_tensors(q, NAME))
        assert (tmp_path / "torch").read_bytes() == (tmp_path / "jax").read_bytes()
    loaded = interop.load_safetensors(tmp_path / "jax", "jax")
    assert_same_qtensor(interop.from_compressed_tensors(loaded, weight.spec, NAME, dtype="float32"), q)


@pytest.mark.parametrize("shape", [(0, 32), (3, 0), (0, 4, 32)])
def test_empty_weights(shape: tuple[int, ...], framework: Any) -> None:
    for symmetric in (True, False):
        spec = QuantSpec("int4", PerGroup(16), symmetric=symmetric)
        q = framework.api.quantize(framework.array(np.zeros(shape, np.float32)), spec)
        back = interop.from_compressed_tensors(interop.to_compressed_tensors(q), spec, dtype="float32")
        assert_same_qtensor(back, q)


# ---- scales ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_scales(dtype: str, framework: Any) -> None:
    """A scale of 16 bits becomes float32 and goes back exactly; one that doesn't fit is refused."""
    from matrix import numpy_dtype

    spec = QuantSpec("int4", PerGroup(8))
    x = np.random.default_rng(1).standard_normal((4, 16)).astype(np.float32)
    scale = np.array([[0.1, 3e-39], [6e-8, 1.0], [np.inf, np.nan], [2.5, 0.3]], np.float32).astype(numpy_dtype(dtype))
    q = framework.api.quantize(framework.array(x), spec, scale=framework.array(scale))
    tensors = interop.to_compressed_tensors(q, scale_dtype=dtype)
    assert raw(tensors["weight_scale"]) == scale.tobytes()
    back = interop.from_compressed_tensors(tensors, spec)
    assert str(back.dtype).removeprefix("torch.") == dtype
    assert raw(back.scale) == raw(q.scale)
    assert_same_tensors(interop.to_compressed_tensors(back, scale_dtype=dtype), tensors)
    with pytest.raises(ValueError, match=f"scale_dtype is {dtype}; q.scale has other values than {dtype} can hold"):
        interop.to_compressed_tensors(framework.api.quantize(framework.array(x), spec), scale_dtype=dtype)


def test_global_scale(framework: Any) -> None:
    """The reciprocal of g comes back as g or its neighbour, and then stays; the package's own comes back as it was."""
    x = framework.array(np.random.default_rng(2).standard_normal((2, 32)).astype(np.float32))
    moved = 0
    for g in np.random.default_rng(3).uniform(1e-4, 1, 60).astype(np.float32):
        q = framework.api.quantize(x, "nvfp4", scale=framework.array(np.array(g)))
        assert framework.numpy(q.global_scale) == g
        tensors = interop.to_compressed_tensors(q)
        assert as_numpy(tensors["weight_global_scale"]).tolist() == [np.float32(1) / g]
        back = interop.from_compressed_tensors(tensors, "nvfp4", dtype="float32")
        again = framework.numpy(back.global_scale)
        assert abs(int(again.view(np.int32)) - int(g.view(np.int32))) <= 1
        moved += int(again != g)
        assert_same_tensors(interop.to_compressed_tensors(back), tensors)
        assert raw(back.qvalue) == raw(q.qvalue)
        assert raw(back.scale) == raw(q.scale)
        if again == g:
            assert_same_qtensor(back, q)
    assert 0 < moved < 20


@pytest.mark.parametrize("g", [0.0, 1e-45, np.inf, -1.0])
def test_global_scales_without_a_reciprocal(g: float, framework: Any) -> None:
    q = framework.api.quantize(framework.array(np.ones((2, 32), np.float32)), "nvfp4")
    one = framework.array(np.float32(g).reshape(1))
    with pytest.raises(ValueError, match="q.global_scale is .*; allowed: positive numbers whose reciprocal"):
        interop.to_compressed_tensors(replace(q, global_scale=one.reshape(())))
    tensors = {**interop.to_compressed_tensors(q), "weight_global_scale": one}
    with pytest.raises(ValueError, match="weight_global_scale is .*; allowed: positive numbers"):
        interop.from_compressed_tensors(tensors, "nvfp4")


# ---- schemes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_schemes(weight: Weight, framework: Any) -> None:
    """A config group says as much as the spec."""
    q = framework.api.quantize(framework.array(weight.values()), weight.spec)
    tensors = interop.to_compressed_tensors(q)
    group = interop.compressed_tensors_scheme(weight.spec)
    for given in (group, group["weights"]):
        back = interop.from_compressed_tensors(tensors, given)
        assert framework.numpy(back.scale).tobytes() == framework.numpy(q.scale).tobytes()
        assert raw(back.qvalue) == raw(q.qvalue)
        assert raw(back.dequantize(q.dtype)) == raw(
            interop.from_compressed_tensors(tensors, weight.spec).dequantize(q.dtype)
        )


def test_unsigned_schemes_are_asymmetric() -> None:
    assert interop.compressed_tensors_scheme(QuantSpec("uint4", PerGroup(32))) == {
        "format": "pack-quantized",
        "weights": {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32},
    }


def test_unsigned_without_zero_points(framework: Any) -> None:
    """The package's codes are signed, so a zero point of 0 is one of -8 there and has to be written."""
    spec = QuantSpec("uint4", PerChannel(0))
    q = framework.api.quantize(framework.array(np.arange(40, dtype=np.float32).reshape(5, 8)), spec)
    assert q.zero_point is None
    tensors = interop.to_compressed_tensors(q)
    assert not as_numpy(tensors["weight_zero_point"]).any()
    back = interop.from_compressed_tensors(tensors, QuantSpec("int4", PerChannel(0), symmetric=False), dtype="float32")
    assert framework.numpy(back.zero_point).tolist() == [[-8]] * 5
    assert raw(back.dequantize()) == raw(q.dequantize())


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (QuantSpec("int16"), (4, 32)),
        (QuantSpec("int4", PerChannel(1)), (4, 32)),
        (QuantSpec("int4", PerChannel(0)), (2, 4, 32)),
        (QuantSpec("int4", PerGroup(2, 0)), (4, 32)),
        (QuantSpec("int4", PerBlock((2, 2))), (4, 32)),
        (QuantSpec("int4"), (32,)),
        (PRESETS["fp4"], (4, 32)),
        (PRESETS["mxfp8_e4m3"], (4, 32)),
        (replace(PRESETS["mxfp4"], granularity=PerGroup(16)), (4, 32)),
        (PRESETS["mxfp4"], (2, 4, 32)),
    ],
    ids=str,
)
def test_no_layout(spec: QuantSpec, shape: tuple[int, ...], framework: Any) -> None:
    q = framework.api.quantize(framework.array(np.ones(shape, np.float32)), spec)
    with pytest.raises(ValueError, match=f"a tensor with {len(shape)} axes; compressed-tensors has integers of"):
        interop.to_compressed_tensors(q)


def test_errors_of_to(framework: Any) -> None:
    api, x = framework.api, framework.array(np.ones((4, 36), np.float32))
    with pytest.raises(TypeError, match="q is a builtins.int; allowed: a QTensor"):
        interop.to_compressed_tensors(3)
    with pytest.raises(ValueError, match="has no shorter last group"):
        interop.to_compressed_tensors(api.quantize(x, "int4", group_size=16))
    with pytest.raises(ValueError, match="has no shorter last group"):
        interop.to_compressed_tensors(api.quantize(x, "mxfp4"))
    with pytest.raises(ValueError, match="q.zero_point has 9 to 9; int4 has room for -8 to 7"):
        interop.to_compressed_tensors(api.quantize(x, "int4", scale=1.0, zero_point=9))
    with pytest.raises(ValueError, match="scale_dtype is 'float64'; allowed: float32, bfloat16, float16"):
        interop.to_compressed_tensors(api.quantize(x, "int4"), scale_dtype="float64")
    q = api.quantize(x, "int4")
    with pytest.raises(ValueError, match="q.scale has shape"):
        interop.to_compressed_tensors(replace(q, scale=framework.array(np.ones((2, 2), np.float32))))
    if framework.name == "jax":
        import jax

        with pytest.raises(TypeError, match="is a tracer; inside jit there are no bytes"):
            jax.jit(lambda x: interop.to_compressed_tensors(api.quantize(x, "int4"))["weight_scale"])(x)


SPEC = QuantSpec("int4", PerGroup(8), symmetric=False)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight_packed": None}, ValueError, "weight_packed is missing; of weight there are: weight_scale"),
        ({"weight_scale": None}, ValueError, "weight_scale is missing"),
        ({"weight_shape": None}, ValueError, "weight_shape is missing"),
        ({"weight_zero_point": None}, ValueError, "weight_zero_point is missing"),
        ({"weight_g_idx": np.zeros(32, np.int32)}, ValueError, "weight_g_idx is there"),
        ({"weight_packed": np.zeros((4, 4), np.uint8)}, TypeError, "weight_packed has dtype uint8; allowed: int32"),
        ({"weight_packed": np.zeros((4, 5), np.int32)}, ValueError, r"weight_packed has shape \(4, 5\); allowed"),
        ({"weight_packed": np.zeros(4, np.int32)}, ValueError, "a tensor with 1 axes"),
        ({"weight_shape": np.array([4, 2**40], np.int64)}, ValueError, "weight_packed has shape"),
        ({"weight_shape": np.array([2**62, 2**62], np.int64)}, ValueError, "weight_packed has shape"),
        ({"weight_shape": np.array([-4, 32], np.int64)}, ValueError, r"weight_shape is \(-4, 32\)"),
        ({"weight_shape": np.array([4, 30], np.int64)}, ValueError, "needs whole groups"),
        ({"weight_shape": np.array([128], np.int64)}, ValueError, "weight_packed has shape"),
        ({"weight_shape": np.array([[4, 32]], np.int64)}, ValueError, "weight_packed has shape"),
        ({"weight_shape": np.array([4.0, 32.0], np.float32)}, TypeError, "weight_shape has dtype float32"),
        ({"weight_scale": np.ones((4, 3), np.float32)}, ValueError, "weight_scale has shape"),
        ({"weight_scale": np.ones((4, 4), np.uint8)}, TypeError, "weight_scale has dtype uint8; allowed: float32"),
        ({"weight_zero_point": np.zeros((4, 4), np.int8)}, TypeError, "weight_zero_point has dtype int8"),
        ({"weight_zero_point": np.zeros((4, 4), np.int32)}, ValueError, "weight_zero_point has shape"),
    ],
)
def test_errors_of_from(change: dict[str, Any], error: type[Exception], message: str, framework: Any) -> None:
    q = framework.api.quantize(framework.array(np.ones((4, 32), np.float32)), SPEC)
    tensors = interop.to_compressed_tensors(q)
    for name, a in change.items():
        tensors[name] = a if a is None or a.dtype == np.int64 else framework.array(a)
    tensors = {name: a for name, a in tensors.items() if a is not None}
    with pytest.raises(error, match=message):
        interop.from_compressed_tensors(tensors, SPEC)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (None, TypeError, "spec is None; allowed"),
        ("int5x", ValueError, "spec is 'int5x'; allowed"),
        ({}, ValueError, "spec has type None, num_bits None"),
        ({"weights": 3}, TypeError, "spec has weights 3"),
        ({"num_bits": 7, "type": "int", "strategy": "channel"}, ValueError, "format is 'int7'"),
        ({"num_bits": [], "type": "int", "strategy": "channel"}, ValueError, "format is 'int"),
        ({"num_bits": 4, "type": "int", "strategy": "block"}, ValueError, "strategy 'block'"),
        ({"num_bits": 4, "type": "int", "strategy": "group"}, ValueError, "group_size None"),
        ({"num_bits": 4, "type": "int", "group_size": -2}, ValueError, "size is -2"),
        ({"num_bits": 8, "type": "float", "strategy": "tensor"}, ValueError, "type 'float', num_bits 8"),
        ({"num_bits": 4, "type": "int", "symmetric": "no"}, TypeError, "symmetric is 'no'"),
        (PRESETS["int16"], ValueError, "compressed-tensors has integers of"),
        (PRESETS["nvfp4"], TypeError, "weight_packed has dtype int32; allowed: uint8"),
    ],
)
def test_errors_of_specs(spec: Any, error: type[Exception], message: str, framework: Any) -> None:
    q = framework.api.quantize(framework.array(np.ones((4, 32), np.float32)), SPEC)
    with pytest.raises(error, match=message):
        interop.from_compressed_tensors(interop.to_compressed_tensors(q), spec)


def test_errors_of_other_arguments(framework: Any) -> None:
    q = framework.api.quantize(framework.array(np.ones((4, 32), np.float32)), SPEC)
    tensors = interop.to_compressed_tensors(q)
    with pytest.raises(TypeError, match="tensors is a list; allowed: a dictionary"):
        interop.from_compressed_tensors([], SPEC)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="other_packed is missing; of other there are: none"):
        interop.from_compressed_tensors(tensors, SPEC, "other")
    with pytest.raises(ValueError, match="dtype is 'int8'; allowed: float32"):
        interop.from_compressed_tensors(tensors, SPEC, dtype="int8")
    with pytest.raises(TypeError, match="weight_packed is a NumPy array; allowed: a torch tensor or a JAX array"):
        interop.from_compressed_tensors({name: as_numpy(a) for name, a in tensors.items()}, SPEC)
    with pytest.raises(TypeError, match="weight_scale is a builtins.str"):
        interop.from_compressed_tensors({**tensors, "weight_scale": "x"}, SPEC)


# ---- the package itself ----------------------------------------------------------------------------------------------


class Package:
    """compressed-tensors, as far as the tests need it."""

    def __init__(self) -> None:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

        self.compressors, self.args, self.scheme_type = BaseCompressor, QuantizationArgs, QuantizationScheme
        self.calculate_qparams, self.generate_gparam = calculate_qparams, generate_gparam

    def scheme(self, weight: Weight) -> tuple[Any, Any]:
        """The compressor and the scheme that ours describes."""
        ours = interop.compressed_tensors_scheme(weight.spec)
        args = self.args(**ours["weights"])
        return self.compressors.get_value_from_registry(ours["format"]), self.scheme_type(targets=["x"], weights=args)

    def compress(self, weight: Weight) -> dict[str, Any]:
        """The tensors that the package makes of a weight, with scales of its own."""
        import torch

        compressor, scheme = self.scheme(weight)
        x, args = torch.from_numpy(weight.values()), scheme.weights
        state, more = {"weight": x}, {}
        if args.strategy == "tensor_group":
            state["weight_global_scale"] = more["global_scale"] = self.generate_gparam(x.min(), x.max())
        groups = x if args.group_size is None else x.unflatten(-1, (-1, args.group_size))
        axes = tuple(range(x.ndim)) if args.strategy == "tensor" else (-1,)
        low, high = groups.amin(axes), groups.amax(axes)
        if args.strategy == "channel":
            low, high = low.unsqueeze(-1), high.unsqueeze(-1)
        scale, zero = self.calculate_qparams(low, high, args, **more)
        state |= {"weight_scale": scale, "weight_zero_point": zero}
        return compressor.compress(state, scheme)

    def decompress(self, weight: Weight, tensors: dict[str, Any]) -> Any:
        """The numbers that the package reads from a weight's tensors."""
        compressor, scheme = self.scheme(weight)
        return compressor.decompress(dict(tensors), scheme)["weight"]


@pytest.fixture(scope="module")
def package() -> Package:
    pytest.importorskip("compressed_tensors")
    pytest.importorskip("torch")
    return Package()


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_the_recording(weight: Weight, package: Package) -> None:
    tensors, decompressed = recorded(weight, "torch")
    now = package.compress(weight)
    assert_same_tensors(now, tensors)
    assert raw(package.decompress(weight, now)) == raw(decompressed)


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_the_package_reads_ours(weight: Weight, package: Package) -> None:
    import torch

    import quark_torch

    q = quark_torch.quantize(torch.from_numpy(weight.values()), weight.spec)
    read = package.decompress(weight, interop.to_compressed_tensors(q))
    ours = q.dequantize(read.dtype)
    if weight.strategy == "tensor_group":
        torch.testing.assert_close(read, ours, rtol=2**-7, atol=0)
    else:
        assert torch.equal(read, ours)


if __name__ == "__main__":
    tensors = {}
    for weight in WEIGHTS:
        package = Package()
        made = package.compress(weight)
        tensors |= {f"{weight}: {name}": t.contiguous() for name, t in made.items()}
        tensors[f"{weight}: decompressed"] = package.decompress(weight, made)
    interop.save_safetensors(RECORDED, tensors)
    print(f"{len(WEIGHTS)} weights, {RECORDED.stat().st_size} bytes")
