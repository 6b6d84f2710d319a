"""The same bits in torch and JAX, at every CPU level and thread count, whatever the host does to subnormals."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frontends import Core, bits
from matrix import CASES, SCALED, Case
from quark_kernels import PRESETS, PerGroup, PerTensor, PerToken, QuantSpec, _core
from test_forward import assert_same

HERE = Path(__file__).parent


def parts(frontend: Any, case: Case) -> list[np.ndarray]:
    q, scale, zero = frontend.quantize(case)
    numbers = [frontend.dequantize(case, case.dtype), frontend.fake_quantize(case), frontend.clipped_gradient(case)]
    return [q, scale, *([] if zero is None else [zero]), *numbers]


@pytest.mark.parametrize("case", [c for c in CASES if c.layout == "rows"][::2], ids=str)
def test_torch_and_jax(case: Case, torch_frontend: Any, jax_frontend: Any) -> None:
    for ours, theirs in zip(parts(torch_frontend, case), parts(jax_frontend, case), strict=True):
        assert ours.dtype == theirs.dtype
        assert_same(bits(ours), bits(theirs), "torch and JAX")


def digest_of_the_matrix() -> str:
    """A digest of everything that the core makes of every case."""
    digest, core = hashlib.sha256(), Core()
    for case in CASES:
        for part in parts(core, case):
            digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]), **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


LEVELS = [name for name, works in _core.cpu_levels() if works]


@pytest.mark.parametrize("level", LEVELS)
def test_every_cpu_level(level: str) -> None:
    """Each level in a process of its own; all must give what this process's level does."""
    code = (
        "import test_parity as t; from quark_kernels import info; print(info()['cpu_level'], t.digest_of_the_matrix())"
    )
    done = run_python(code, QUARK_CPU_LEVEL=level)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [level, digest_of_the_matrix()]


def test_unknown_cpu_level() -> None:
    code = "import numpy as np; from quark_kernels import _core; _core.cpu_level()"
    done = run_python(code, QUARK_CPU_LEVEL="v9")
    assert "ValueError: QUARK_CPU_LEVEL is 'v9'; this machine and build support: baseline" in done.stderr


@pytest.mark.parametrize("threads", [2, 3, 8])
@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec("int8", PerToken()),
        QuantSpec("uint4", PerGroup(48), symmetric=False),
        QuantSpec("fp8_e4m3"),
        QuantSpec("int4", PerGroup(7, 0)),
    ],
    ids=str,
)
def test_any_number_of_threads(spec: QuantSpec, threads: int) -> None:
    from quark_kernels.schema import OPS, op_spec, outputs

    x = np.random.default_rng(0).standard_normal((301, 1003), np.float32)
    op = op_spec(spec, x.shape, packed=spec.format == "int4")

    def run(count: int) -> list[np.ndarray]:
        outs = [
            np.zeros(shape, getattr(__import__("ml_dtypes"), name, name))
            for shape, name in outputs(OPS["quantize_dynamic"], op, x.shape, "float32")
        ]
        _core.quantize_dynamic((x,), tuple(outs), op.text, count)
        return outs

    for one, many in zip(run(1), run(threads), strict=True):
        assert_same(bits(many), bits(one), "threads")


SUBNORMAL = np.array([[1e-40, -3e-41, 2.0**-149, 0.0], [1e-38, 5e-39, -1e-39, 2.0**-127]], np.float32)


@pytest.mark.parametrize("name", SCALED)
def test_subnormals_under_jit(name: str, jax_frontend: Any) -> None:
    """XLA runs custom calls with subnormals flushed; ours must not notice. Compared in NumPy: jnp flushes too."""
    import jax

    api = jax_frontend.api
    for granularity in (PerTensor(), PerToken()):
        case = Case(QuantSpec(name, granularity, symmetric=PRESETS[name].symmetric), shape=(2, 4), given=True)
        for scale in (np.float32(1e-40), np.float32(2.0**-127), np.float32(1e-39)):
            case.__dict__["x"], case.__dict__["scale"] = SUBNORMAL, np.full_like(case.scale, scale)
            for stale in ("x32", "codes", "fake_quantized"):
                case.__dict__.pop(stale, None)

            @jax.jit
            def run(x: Any, s: Any, case: Case = case) -> Any:
                q = api.quantize(x, case.spec, scale=s)
                return q.qvalue, q.dequantize(), api.fake_quantize(x, case.spec, scale=s)

            q, numbers, fake = run(SUBNORMAL, case.scale)
            assert_same(bits(numbers), case.dequantized("float32"), "numbers")
            assert_same(bits(fake), case.fake_quantized, "numbers")
            if not case.spec.element.can_pack:
                assert_same(np.asarray(bits(q)).astype(np.int64), case.codes & (256**q.dtype.itemsize - 1), "codes")


def test_subnormal_amax_under_jit(framework: Any) -> None:
    x = framework.array(SUBNORMAL)
    choose = framework.api.choose_qparams
    if framework.name == "jax":
        import jax

        choose = jax.jit(choose, static_argnums=1, static_argnames="axis")
    s, _ = choose(x, "int8", axis=0)
    assert_same(bits(framework.numpy(s)).ravel(), bits(np.array([2.0**-126, 2.0**-126], np.float32)), "scales")


def test_torch_flush_denormal(torch_frontend: Any) -> None:
    import torch

    case = Case(QuantSpec("fp8_e5m2"), shape=(2, 4), given=True)
    case.__dict__["x"], case.__dict__["scale"] = SUBNORMAL, np.full((1, 1), 1e-40, np.float32)
    before = torch_frontend.fake_quantize(case)
    assert torch.set_flush_denormal(True)
    try:
        after = torch_frontend.fake_quantize(case)
        assert torch.tensor([1e-40]).add(0).item() == 0, "the host's mode is the host's again"
    finally:
        torch.set_flush_denormal(False)
    assert_same(bits(after), bits(before), "numbers")
    assert_same(bits(before), case.fake_quantized, "numbers")
