"""Sequences of public calls, in torch and in JAX side by side: quantize, take parts, move, save, load, pack, convert.

After every step both frameworks hold the same bits, and what was there before is as it was.
"""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

pytest.importorskip("torch")
pytest.importorskip("jax")

import jax
import torch

from conftest import make
from fuzzing import examples
from quark_kernels import PRESETS, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec, compressed_tensors, interop
from quark_kernels.schema import packed_shape
from test_compressed_tensors import assert_same_qtensor, raw

SHAPES = [(2, 32), (3, 33), (2, 3, 16), (5,), (), (0, 4)]
"""Few, and few specs, so that JAX compiles little: what is random is the order of the calls."""
SPECS = [
    PRESETS["int8"],
    PRESETS["uint4"],
    QuantSpec("int4", PerChannel(0)),
    QuantSpec("int8", PerChannel(1)),
    QuantSpec("int8", PerToken(), symmetric=False),
    QuantSpec("int4", PerGroup(8), rounding="half_away"),
    PRESETS["fp8_e4m3"],
    PRESETS["mxfp4"],
    PRESETS["nvfp4"],
    PRESETS["mx6"],
    PRESETS["bfp16"],
    PRESETS["bf16"],
]
DTYPES: list[Any] = [np.float32, np.float16, ml_dtypes.bfloat16]
SPECIAL = np.array([0, -0.0, np.nan, np.inf, -np.inf, 1e-45, 65504, -3e38], np.float32)


@dataclass(eq=False)
class Numbers:
    """An array in both frameworks, and its bytes as they were."""

    x: np.ndarray
    torch: Any
    jax: Any

    def __repr__(self) -> str:
        return f"{self.x.dtype} {self.x.shape}"


@dataclass(eq=False)
class Pair:
    """The same QTensor in both frameworks, and its numbers as they were."""

    torch: Any
    jax: Any
    bits: bytes

    def __repr__(self) -> str:
        return repr(self.torch)


def outcome(call: Callable[[], Any]) -> tuple[Any, str]:
    """What a call gives, or the error that it raises, of those that the documentation names."""
    try:
        return call(), ""
    except (ValueError, TypeError, IndexError) as error:
        return None, f"{type(error).__name__}: {error}"


def assert_same_bits(a: Any, b: Any) -> None:
    """Of the torch tensor and the JAX array, or of two of one framework."""
    names = [str(t.dtype).removeprefix("torch.") for t in (a, b)]
    assert (names[0], tuple(a.shape), raw(a)) == (names[1], tuple(b.shape), raw(b))


class Calls(RuleBasedStateMachine):
    """Any order of calls."""

    numbers = Bundle("numbers")
    pairs = Bundle("pairs")

    def __init__(self) -> None:
        super().__init__()
        self.frontends = make("torch"), make("jax")
        self.made_numbers: list[Numbers] = []
        self.made_pairs: list[Pair] = []
        self.folder = tempfile.TemporaryDirectory()
        self.file = Path(self.folder.name) / "x.safetensors"

    def teardown(self) -> None:
        self.folder.cleanup()

    def keep(self, ours: Any, theirs: Any) -> Pair:
        """A new pair, whose parts and numbers have the same bits."""
        assert (ours.spec, ours.shape, ours.packed) == (theirs.spec, theirs.shape, theirs.packed)
        for name in ours.ARRAYS:
            a, b = getattr(ours, name), getattr(theirs, name)
            assert (a is None) == (b is None), name
            if a is not None:
                assert_same_bits(a, b)
        y = ours.dequantize()
        assert tuple(y.shape) == ours.shape
        assert_same_bits(y, theirs.dequantize())
        pair = Pair(ours, theirs, raw(y))
        self.made_pairs.append(pair)
        return pair

    # ---- new ones ----

    @rule(
        target=numbers,
        shape=st.sampled_from(SHAPES),
        dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, 2**16),
        wild=st.sampled_from([0, 0, 0, 3]),
    )
    def data(self, shape: tuple[int, ...], dtype: Any, seed: int, wild: int) -> Numbers:
        rng = np.random.default_rng(seed)
        x = rng.standard_normal(shape).astype(np.float32)
        for _ in range(wild if x.size else 0):
            x.reshape(-1)[rng.integers(x.size)] = rng.choice(SPECIAL)
        with np.errstate(over="ignore"):
            x = x.astype(dtype)
        made = Numbers(x, *(frontend.array(x.copy()) for frontend in self.frontends))
        self.made_numbers.append(made)
        return made

    @rule(target=pairs, x=numbers, spec=st.sampled_from(SPECS), packed=st.sampled_from([None, True, False]))
    def quantize(self, x: Numbers, spec: QuantSpec, packed: bool | None) -> Any:
        """Both frameworks agree; the numbers are those of fake_quantize; a scale that is given back changes nothing."""
        torch_api, jax_api = (frontend.api for frontend in self.frontends)
        ours, error = outcome(lambda: torch_api.quantize(x.torch, spec, packed=packed))
        theirs, other = outcome(lambda: jax_api.quantize(x.jax, spec, packed=packed))
        assert error == other
        if ours is None:
            return multiple()
        pair = self.keep(ours, theirs)
        for api, array in ((torch_api, x.torch), (jax_api, x.jax)):
            assert raw(api.fake_quantize(array, spec)) == pair.bits
        if spec.scale_format == "float32" and not spec.element.is_cast:
            scale, zero = torch_api.choose_qparams(x.torch, spec)
            again = torch_api.quantize(x.torch, spec, scale=scale, zero_point=zero, packed=packed)
            assert_same_bits(again.qvalue, ours.qvalue)
            assert_same_bits(scale, ours.scale)
        return pair

    @initialize(target=pairs, shape=st.sampled_from(SHAPES[:3]), specs=st.lists(st.sampled_from(SPECS), min_size=3))
    def start(self, shape: tuple[int, ...], specs: list[QuantSpec]) -> Any:
        x = self.data(shape, np.float32, 0, 0)
        return multiple(*(self.quantize(x, spec, None) for spec in specs[:5]))

    @rule(x=numbers, spec=st.sampled_from([QuantSpec("int8", PerChannel(0)), QuantSpec("fp8_e4m3", PerGroup(8, 1))]))
    def transpose(self, x: Numbers, spec: QuantSpec) -> None:
        """The codes of a transposed view, along the other axis, are the transposed codes."""
        if x.x.ndim != 2:
            return
        granularity: Any = spec.granularity
        other = replace(spec, granularity=replace(granularity, axis=1 - granularity.axis))
        for frontend, a in zip(self.frontends, (x.torch, x.jax), strict=True):
            q, turned = frontend.api.quantize(a, spec), frontend.api.quantize(a.T, other)
            assert_same_bits(turned.qvalue, q.qvalue.T)
            assert_same_bits(turned.scale, q.scale.T)
            assert_same_bits(turned.dequantize(), q.dequantize().T)

    # ---- from one to the next ----

    @rule(
        target=pairs,
        pair=pairs,
        key=st.sampled_from([0, -1, 1, slice(1, None), slice(0, 9, 2), (0, 1), (slice(None), 0), (), slice(0, 0), 7]),
    )
    def part(self, pair: Pair, key: Any) -> Any:
        """The numbers of a part are that part of the numbers."""
        ours, error = outcome(lambda: pair.torch[key])
        theirs, other = outcome(lambda: pair.jax[key])
        assert error == other
        if ours is None:
            return multiple()
        made = self.keep(ours, theirs)
        assert raw(pair.torch.dequantize()[key]) == made.bits
        return made

    @rule(target=pairs, pair=pairs, share=st.sampled_from([None, True]))
    def exchange(self, pair: Pair, share: bool | None) -> Pair:
        """Each framework's becomes the other's."""
        ours, theirs = interop.to_torch(pair.jax, copy=share), interop.to_jax(pair.torch, copy=share)
        assert_same_qtensor(ours, pair.torch)
        assert_same_qtensor(theirs, pair.jax)
        return self.keep(ours, theirs)

    @rule(target=pairs, pair=pairs, how=st.sampled_from(["to", "save", "deepcopy", "tree", "strides"]))
    def same_again(self, pair: Pair, how: str) -> Pair:
        """Copies of several kinds, and codes with other strides."""

        def same(q: Any) -> Any:
            match how:
                case "save" if q is pair.torch:  # torch's own tensors of fp8 can't be pickled without it
                    torch.save(q, self.file.with_name("x.pt"))
                    return torch.load(self.file.with_name("x.pt"), weights_only=False)
                case "save":
                    return pickle.loads(pickle.dumps(q))
                case "deepcopy":
                    return copy.deepcopy(q)
                case "tree" if q is pair.jax:
                    return jax.tree.map(lambda a: a + 0 if a.dtype == np.int32 else a, q)
                case "tree":
                    return torch.utils._pytree.tree_map(torch.clone, q)
                case "to" if q is pair.torch:
                    return q.to("cpu")
                case "strides" if q is pair.torch and q.qvalue.dim() > 1:
                    return replace(q, qvalue=q.qvalue.transpose(0, -1).contiguous().transpose(0, -1))
                case _:
                    return q

        ours, theirs = same(pair.torch), same(pair.jax)
        assert_same_qtensor(ours, pair.torch)
        assert_same_qtensor(theirs, pair.jax)
        return self.keep(ours, theirs)

    @rule(target=pairs, pair=pairs)
    def repack(self, pair: Pair) -> Any:
        """Packed codes are taken apart, and the other way round; then back."""
        q = pair.torch
        bits, signed = q.spec.element.bits, q.spec.element.lo < 0 and q.spec.element.is_integer
        if not q.spec.element.can_pack or not q.shape or q.qvalue.dtype not in (torch.int8, torch.uint8):
            return multiple()
        made = []
        for frontend, whole in zip(self.frontends, (pair.torch, pair.jax), strict=True):
            if whole.packed:
                codes = frontend.api.unpack(whole.qvalue, bits, signed=signed)[..., : q.shape[-1]]
                assert_same_bits(frontend.api.pack(codes, bits), whole.qvalue)
            else:
                codes = frontend.api.pack(whole.qvalue, bits)
                assert tuple(codes.shape) == packed_shape(q.shape, bits)
                back = frontend.api.unpack(codes, bits, signed=signed)[..., : q.shape[-1]]
                assert_same_bits(back, whole.qvalue)
            made.append(replace(whole, qvalue=codes, packed=not whole.packed))
        again = self.keep(*made)
        assert again.bits == pair.bits
        return again

    @rule(target=pairs, pair=pairs)
    def compress(self, pair: Pair) -> Any:
        """Through compressed-tensors' layout, where there is one. Its nvfp4 keeps a reciprocal."""
        theirs, other = outcome(lambda: interop.to_compressed_tensors(pair.jax))
        ours, error = outcome(lambda: interop.to_compressed_tensors(pair.torch))
        assert error == other
        if ours is None or pair.torch.spec.scale_format == "e4m3":
            return multiple()
        made = []
        for tensors, q in ((ours, pair.torch), (theirs, pair.jax)):
            found = interop.from_compressed_tensors(tensors, q.spec, dtype=q.dtype, packed=q.packed)
            if q.zero_point is None and compressed_tensors.has_zero_point(q.spec):
                found = replace(found, zero_point=None)
            made.append(found)
            assert raw(found.dequantize()) == pair.bits
        return self.keep(*made)

    @rule(target=pairs, some=st.lists(pairs, min_size=1, max_size=4), writer=st.sampled_from(["torch", "jax"]))
    def save_and_load(self, some: list[Pair], writer: str) -> Any:
        """One framework writes, both read, and write the same file again."""
        tensors = {f"{i}": getattr(pair, writer) for i, pair in enumerate(some)}
        interop.save_safetensors(self.file, tensors)
        content = self.file.read_bytes()
        loaded = [interop.load_safetensors(self.file, name) for name in ("torch", "jax")]
        for found, name in zip(loaded, ("torch", "jax"), strict=True):
            for i, pair in enumerate(some):
                assert_same_qtensor(found[f"{i}"], getattr(pair, name))
            interop.save_safetensors(self.file, found)
            assert self.file.read_bytes() == content
        return self.keep(loaded[0]["0"], loaded[1]["0"])

    @rule(pair=consumes(pairs))
    def forget(self, pair: Pair) -> None:
        """What is left doesn't depend on it."""
        self.made_pairs.remove(pair)

    # ---- always ----

    @invariant()
    def nothing_has_changed(self) -> None:
        for x in self.made_numbers:
            assert raw(x.torch) == raw(x.jax) == x.x.tobytes()
        for pair in self.made_pairs[-3:]:
            assert raw(pair.torch.dequantize()) == pair.bits == raw(pair.jax.dequantize())
            if pair.torch.spec.granularity == PerTensor() and pair.torch.scale is not None:
                assert tuple(pair.torch.scale.shape) == ()


TestCalls = Calls.TestCase
TestCalls.settings = examples(40, stateful_step_count=20)
