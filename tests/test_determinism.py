"""Every public function gives the same bits whatever the host has made of its float environment and of its threads.

`tests/cpp/test_determinism.cpp` has the operators themselves, with other layouts and CPU levels.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import host
from quark_kernels.schema import float32_bits
from transforms import CELLS, IDS, Function, Variant

HERE = Path(__file__).parent
ROUNDINGS = ("upward", "downward", "toward_zero")
Call = Callable[[], list[bytes]]

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in cast:RuntimeWarning")


def wild(variant: Variant) -> list[np.ndarray]:
    """A variant's arrays, with subnormals in its float32 data."""
    first, *rest = (np.array(a) for a in variant.example())
    if first.dtype == np.float32 and first.ndim:
        few = first.reshape(-1)[::7]
        few *= np.float32(2.0**-100)
        few *= np.float32(2.0**-30)
    return [first, *rest]


# ---- the frameworks: a call gives the bytes of its results, and of gradients -----------------------------------------


def _torch_bytes(t: Any) -> bytes:
    import torch

    return bytes(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def torch_call(function: Function, variant: Variant, given: Sequence[np.ndarray]) -> Call:
    import torch
    from torch.utils import _pytree

    import quark_torch
    from frontends import Torch

    api = function.api(quark_torch)
    arrays = [Torch().array(a) for a in given]
    for i in variant.differentiable:
        arrays[i].requires_grad_()

    def call() -> list[bytes]:
        outs = [leaf for leaf in _pytree.tree_leaves(variant.call(api, *arrays)) if leaf is not None]
        grads: Sequence[Any] = ()
        if variant.differentiable:
            g = torch.ones(outs[0].shape).to(outs[0].dtype)
            grads = torch.autograd.grad(outs[0], [arrays[i] for i in variant.differentiable], g)
        return [_torch_bytes(t) for t in (*outs, *grads)]

    return call


def jax_call(function: Function, variant: Variant, given: Sequence[np.ndarray], jit: bool = False) -> Call:
    import jax
    import jax.numpy as jnp

    import quark_jax

    api = function.api(quark_jax)
    arrays = [jnp.asarray(a) for a in given]

    def results(*arrays: Any) -> list[Any]:
        return jax.tree.leaves(variant.call(api, *arrays))

    def all_results(*arrays: Any) -> list[Any]:
        if not variant.differentiable:
            return results(*arrays)

        def of(*wanted: Any) -> Any:
            every = list(arrays)
            for i, a in zip(variant.differentiable, wanted, strict=True):
                every[i] = a
            first, *rest = results(*every)
            return first, rest

        y, pull, rest = jax.vjp(of, *(arrays[i] for i in variant.differentiable), has_aux=True)
        return [y, *rest, *pull(np.ones(y.shape, np.float32).astype(y.dtype))]

    run = jax.jit(all_results) if jit else all_results
    return lambda: [np.asarray(a).tobytes() for a in run(*arrays)]


def calls(framework: str, function: Function, variant: Variant) -> Iterator[tuple[str, Call]]:
    given = wild(variant)
    if framework == "torch":
        yield "torch", torch_call(function, variant, given)
        return
    yield "jax", jax_call(function, variant, given)
    yield "jax under jit", jax_call(function, variant, given, jit=True)


needs = {
    name: pytest.mark.skipif(find_spec(name) is None, reason=f"{name} isn't installed") for name in ("torch", "jax")
}
frameworks = pytest.mark.parametrize("framework", [pytest.param(name, marks=needs[name]) for name in needs])


# ---- the float environment -------------------------------------------------------------------------------------------


def environments() -> Iterator[tuple[str, AbstractContextManager[None]]]:
    for name in ROUNDINGS:
        yield f"rounding {name}", host.rounded(name)
    if find_spec("torch") is not None:
        yield "flushing subnormals", host.flushed()


@frameworks
@pytest.mark.parametrize(("function", "variant"), CELLS, ids=IDS)
def test_any_float_environment(framework: str, function: Function, variant: Variant) -> None:
    for how, call in calls(framework, function, variant):
        want = call()
        for environment, entered in environments():
            with entered:
                got = call()
            assert got == want, f"{how}, {environment}"


@needs["jax"]
@pytest.mark.parametrize("name", ROUNDINGS)
def test_tracing_in_any_float_environment(name: str) -> None:
    """What a plan or a trace remembers is right, too, if it was made in such an environment."""
    import jax

    from quark_kernels import schema

    some = CELLS[:: len(CELLS) // 12]
    every = [call for function, variant in some for _, call in calls("jax", function, variant)]
    want = [call() for call in every]
    jax.clear_caches()
    schema.remembered.cache_clear()
    with host.rounded(name):
        got = [call() for call in every]
    assert got == want
    jax.clear_caches()


NUMBERS = (0.1, -0.1, 1 / 3, 1e-40, -1e-45, 2.0**-126, 3e38, 1e39, 0.0, -0.0, 2**60 + 1, float("inf"), float("nan"))


@pytest.mark.parametrize("name", host.ROUNDINGS)
def test_numbers_become_float32(name: str) -> None:
    """Python's numbers, ties among them, as NumPy has them where the host rounds to nearest."""
    random = np.random.default_rng(3)
    some = random.integers(0, 2**31 - 2**23 - 2, 2000, np.uint32)
    ties = (some.view(np.float32).astype(np.float64) + (some + np.uint32(1)).view(np.float32).astype(np.float64)) / 2
    near = np.concatenate([ties, -ties, np.nextafter(ties, 0), np.nextafter(ties, np.inf)])
    numbers = [*map(float, NUMBERS), *near.tolist(), *random.integers(0, 2**63, 2000).view(np.float64).tolist()]
    with np.errstate(all="ignore"):
        want = np.array(numbers).astype(np.float32).view(np.int32)
    nan = np.isnan(numbers)
    with host.rounded(name):
        got = np.array([float32_bits(number) for number in numbers], np.int64)
    assert np.array_equal(got[~nan], want[~nan])
    assert set(got[nan].tolist()) <= {0x7FC00000, 0x7FC00000 - 2**31}


# ---- threads ---------------------------------------------------------------------------------------------------------

LONG = (3, 200_000)
"""Enough for three threads of either framework."""


def long_calls(api: Any, array: Callable[[np.ndarray], Any]) -> dict[str, Callable[[], Any]]:
    """Calls whose work is shared among threads."""
    bits = np.random.default_rng(4).integers(0, 2**32, LONG, np.uint32)
    # Numbers around 1, and every so often a subnormal: made of bits, so that no environment has a say.
    bits = (bits & np.uint32(0x80FFFFFF)) | np.uint32(0x3F000000)
    bits[:, ::1001] &= np.uint32(0x800FFFFF)
    x = array(bits.view(np.float32))
    return {
        "quantize": lambda: api.quantize(x, "int8", axis=0),
        "groups": lambda: api.quantize(x, "uint4", group_size=100, packed=True),
        "given": lambda: api.quantize(x, "fp8_e4m3", scale=0.1),
        "mxfp4": lambda: api.quantize(x, "mxfp4"),
        "nvfp4": lambda: api.quantize(x, "nvfp4"),
        "dequantize": lambda: api.quantize(x, "mx9").dequantize(),
        "fake_quantize": lambda: api.fake_quantize(x, "int4", axis=-1),
        "stochastic": lambda: api.fake_quantize(x, api.QuantSpec("fp8_e5m2", rounding="stochastic"), seed=5),
        "percentile": lambda: api.choose_qparams(x, "int8", method="percentile=99.9"),
        "lsq": lambda: api.lsq_quantize(x, 0.1, quant_min=-8, quant_max=7),
    }


def digests_of_torch(threads: int) -> dict[str, str]:
    import torch
    from torch.utils import _pytree

    import quark_torch

    torch.set_num_threads(threads)
    found = {}
    for name, call in long_calls(quark_torch, torch.from_numpy).items():
        leaves = [leaf for leaf in _pytree.tree_leaves(call()) if leaf is not None]
        found[name] = hashlib.sha256(b"".join(map(_torch_bytes, leaves))).hexdigest()
    assert torch.get_num_threads() == threads
    return found


def digests_of_jax(threads: int) -> dict[str, str]:
    """As many threads as NPROC said before the import."""
    import jax
    import jax.numpy as jnp

    import quark_jax

    found = {}
    for name, call in long_calls(quark_jax, jnp.asarray).items():
        leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(call())]
        found[name] = hashlib.sha256(b"".join(leaves)).hexdigest()
    return found


def digests(framework: str, threads: int, rounding: str) -> dict[str, str]:
    """Of a process whose threads all begin in that environment: a thread has its creator's."""
    code = (
        "import json, sys, host, test_determinism as t\n"
        "framework, threads, rounding = sys.argv[1:]\n"
        "host.set_rounding(rounding)\n"
        "found = getattr(t, 'digests_of_' + framework)(int(threads))\n"
        "assert host.rounding() == rounding\n"
        "print(json.dumps(found))\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]), "NPROC": str(threads)}
    env.pop("XLA_FLAGS", None)  # one device, with all threads
    command = [sys.executable, "-c", code, framework, str(threads), rounding]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@frameworks
def test_any_number_of_threads(framework: str) -> None:
    """And both frameworks alike."""
    want = digests("torch" if find_spec("torch") else framework, 1, "to_nearest")
    for threads, rounding in ((1, "downward"), (2, "upward"), (3, "toward_zero")):
        assert digests(framework, threads, rounding) == want, f"{threads} threads, rounding {rounding}"
