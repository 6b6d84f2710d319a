"""Many callers: threads, forks, other processes and interpreters, signals. Each gets the bits of a lone caller.

What is a matter of luck is tried a few times; with QUARK_TEST_LONG=1 often, for minutes.
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from conftest import make
from frontends import Core
from quark_kernels import PRESETS, PerChannel, PerToken, QuantSpec
from quark_kernels.schema import codes_spec, op_spec, qparams
from test_learned import gradients
from test_parity import run_python
from transforms import CELLS

LONG = bool(os.environ.get("QUARK_TEST_LONG"))
THREADS = 32
SHAPE = (90, 1031)
XLA_SHAPE = (257, 1031)
"""Enough elements for more than one of the core's threads."""

Job = Callable[[], list[bytes]]
"""A call: the bytes of its results."""


# ---- jobs ------------------------------------------------------------------------------------------------------------


def numbers(seed: int, count: int = 1, shape: tuple[int, ...] = SHAPE) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    exponents = rng.integers(-6, 3, shape, np.int8)
    return [np.ldexp(rng.standard_normal(shape, np.float32), exponents) for _ in range(count)]


def core_jobs(seed: int) -> list[Job]:
    """The core on NumPy arrays, with threads."""
    core, key = Core(threads=3), np.array([seed, 1], np.int32)
    x, g = numbers(seed, 2)
    specs = [*PRESETS.values(), QuantSpec("int4", PerToken(), rounding="stochastic")]

    def run(op: str, inputs: list[Any], spec: Any, dtype: str = "float32") -> list[np.ndarray]:
        return core._run(op, inputs, spec, SHAPE, dtype)

    def dynamic(spec: QuantSpec) -> list[bytes]:
        op = op_spec(spec, SHAPE, packed=spec.format in ("int3", "fp4"))
        random_key = [key] if spec.rounding == "stochastic" else []
        q = run("quantize_dynamic", [x, *random_key], op)
        fake = run("fake_quantize_dynamic", [x, *random_key], op_spec(spec, SHAPE))
        whole = qparams("quantize_dynamic", op, q[1:]).global_scale
        return contents([q, run("dequantize", q, op), fake, run("choose_qparams", [x, whole], op.choosing())])

    def given(spec: QuantSpec) -> list[bytes]:
        op = op_spec(spec, SHAPE)
        scales = run("choose_qparams", [x], op)
        (q,) = run("quantize", [x, *scales], op)
        back = run("fake_quantize_backward", [x, g, *scales], op), run("dequantize_backward", [g, q, *scales[1:]], op)
        return contents([q, run("fake_quantize", [x, *scales], op), run("extremes", [x], op), *back])

    def packed(bits: int) -> list[bytes]:
        codes = x.view(np.uint8)[:, : SHAPE[1]].copy()
        spec = codes_spec(bits, length=SHAPE[1])
        bytes_ = run("pack", [codes], spec, "uint8")
        return contents([bytes_, run("unpack", bytes_, spec)])

    affine = QuantSpec("uint8", PerChannel(0), symmetric=False)
    return [
        *(functools.partial(dynamic, spec) for spec in specs),
        *(functools.partial(given, spec) for spec in (QuantSpec("int8"), affine, QuantSpec("fp8_e4m3", PerChannel(1)))),
        *(functools.partial(packed, bits) for bits in (3, 4)),
    ]


def small_jobs(framework: Any) -> list[Job]:
    """Every public function, every way that it can be called, on arrays too small for threads."""
    return [
        functools.partial(
            lambda call, api, arrays: contents(call(api, *arrays)),
            variant.call,
            function.api(framework.api),
            [framework.array(a) for a in variant.example()],
        )
        for function, variant in CELLS
    ]


def large_jobs(framework: Any, seed: int, count: int | None = None) -> list[Job]:
    """Every public function on large arrays, gradients too; of the presets the first ``count``."""
    api, kernel = framework.api, functools.partial(getattr, __import__(f"{framework.api.__name__}.kernel").kernel)
    a, g = numbers(seed, 2, XLA_SHAPE if framework.name == "jax" else SHAPE)
    x, scale = framework.array(a), np.full((), 0.05, np.float32)
    codes = framework.array(np.random.default_rng(seed).integers(0, 8, a.shape, np.uint8))
    s = framework.array(scale)

    def everyday(spec: str) -> list[bytes]:
        q = api.quantize(x, spec)
        return contents([q, api.dequantize(q), api.fake_quantize(x, spec), api.choose_qparams(x, spec)])

    def learned(f: Callable[..., Any]) -> list[bytes]:
        return contents(gradients(framework, f, a, scale, g))

    fake, tensor = kernel("scaled_fake_quantize"), (None, None, -128, 127, 8, "per_tensor")
    real, element = kernel("scaled_real_quantize"), ("mx", "fp4", -1, 32)
    calls: list[Callable[[], Any]] = [
        lambda: api.quantize(x, "uint8", scale=0.02, zero_point=7),
        lambda: api.quantize(x, QuantSpec("int4", rounding="stochastic"), seed=seed),
        lambda: api.choose_qparams(x, "int4", axis=0, method="percentile=90"),
        lambda: api.pack(codes, 3),
        lambda: api.unpack(codes, 3, signed=True),
        lambda: kernel("quant_fp8_e4m3")(x),
        lambda: kernel("quant_fp8_e5m2")(x),
        lambda: kernel("dequant_fp8_e4m3")(kernel("quant_fp8_e4m3")(x)),
        lambda: kernel("dequant_fp8_e5m2")(kernel("quant_fp8_e5m2")(x)),
        lambda: fake("int8", x, s, None, *tensor),
        lambda: kernel("dequantize")("int8", real("int8", x, s, None, *tensor), s, None, None, None, "per_tensor"),
        lambda: kernel("non_scaled_fake_quantize")(x, *element),
        lambda: kernel("non_scaled_real_quantize")(x[:, :1024], *element),
    ]
    return [
        *(functools.partial(everyday, spec) for spec in list(PRESETS)[:count]),
        *(functools.partial(lambda call: contents(call()), call) for call in calls),
        functools.partial(learned, lambda x, s: api.fake_quantize(x, "int8", axis=0) * s),
        functools.partial(learned, lambda x, s: api.lsq_quantize(x, s, quant_min=-8, quant_max=7)),
        functools.partial(learned, lambda x, t: api.tqt_quantize(x, t)),
        functools.partial(learned, lambda x, s: kernel("lsq_quantize")(x, s, None, 0.1, -8, 7)),
        functools.partial(learned, lambda x, t: kernel("tqt_quantize")(x, t, None, 128, 8)),
    ]


def contents(tree: Any) -> list[bytes]:
    """The bytes of all arrays in there."""
    if tree is None:
        return []
    if isinstance(tree, list | tuple):
        return [b for one in tree for b in contents(one)]
    if hasattr(tree, "ARRAYS"):
        return contents([getattr(tree, name) for name in tree.ARRAYS])
    if isinstance(tree, np.ndarray):
        return [tree.tobytes()]
    return [make("torch" if type(tree).__module__.startswith("torch") else "jax").numpy(tree).tobytes()]


# ---- threads ---------------------------------------------------------------------------------------------------------


@contextmanager
def hasty() -> Iterator[None]:
    """Python's threads take turns as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def race(shared: list[Job], own: list[list[Job]], rounds: int) -> None:
    """Each thread makes all calls, on inputs that the others have too and on its own, in an order of its own."""
    expected = {job: job() for job in (*shared, *(job for jobs in own for job in jobs))}
    start = threading.Barrier(THREADS)

    def work(i: int) -> int:
        jobs, order = [*shared, *own[i % len(own)]] * rounds, random.Random(i)
        order.shuffle(jobs)
        start.wait()
        return sum(job() != expected[job] for job in jobs)

    with hasty(), ThreadPoolExecutor(THREADS) as pool:
        assert sum(pool.map(work, range(THREADS))) == 0


ROUNDS = 20 if LONG else 1


def test_threads_in_the_core() -> None:
    race(core_jobs(0), [core_jobs(1 + i)[i % 4 :: 4] for i in range(THREADS)], ROUNDS)


def test_threads_and_small_calls(framework: Any) -> None:
    jobs = small_jobs(framework)
    race(jobs if LONG else jobs[:: 1 if framework.name == "torch" else 3], [[]], 4 * ROUNDS)


def test_threads_and_large_calls(framework: Any) -> None:
    own = [large_jobs(framework, 1 + i)[i % 4 :: 4] for i in range(THREADS)]
    race(large_jobs(framework, 0)[:: 1 if LONG else 2], own if LONG else [jobs[:3] for jobs in own], ROUNDS)


@pytest.mark.skipif("not LONG")
def test_threads_that_compile_the_same() -> None:
    """XLA's first calls, all at once."""
    pytest.importorskip("jax")
    code = "import test_concurrency as t; t.compile_at_once()"
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def compile_at_once() -> None:
    jobs = small_jobs(make("jax"))
    start = threading.Barrier(8)

    def work(i: int) -> list[list[bytes]]:
        start.wait()
        return [job() for job in jobs]

    with ThreadPoolExecutor(8) as pool:
        first, *others = pool.map(work, range(8))
    assert all(other == first for other in others)


# ---- forks -----------------------------------------------------------------------------------------------------------


def child(work: Callable[[], Any], seconds: int = 60) -> int:
    """The exit status of a forked child that does the work; it dies of SIGALRM if that hangs."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        signal.alarm(seconds)
        status = 1
        try:
            work()
            status = 0
        finally:
            if status:
                sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def expect(jobs: list[Job], expected: list[list[bytes]]) -> None:
    assert [job() for job in jobs] == expected


def torch_jobs(seed: int = 0) -> list[Job]:
    """Those of torch's calls in which torch's own kernels have nothing to do: they hang where libgomp does."""
    torch, api = make("torch"), make("torch").api
    x = torch.array(numbers(seed)[0])
    fixed = torch.array(np.full((), 0.05, np.float32))
    return [
        lambda: contents(api.quantize(x, "int8")),
        lambda: contents(api.quantize(x, "mxfp4")),
        lambda: contents(api.fake_quantize(x, "fp8_e4m3", axis=0)),
        lambda: contents(api.fake_quantize(x, "int8", scale=fixed)),
        lambda: contents(api.choose_qparams(x, "nvfp4")),
    ]


def fork_after_use(kind: str) -> None:
    jobs = core_jobs(0)
    if "jax" in kind:
        jax = make("jax")
        jax.numpy(jax.api.fake_quantize(jax.array(numbers(0)[0]), "int8"))
    if "torch" in kind:
        jobs = [*jobs, *torch_jobs()]
    expected = [job() for job in jobs]

    def grandchild_too() -> None:
        expect(jobs, expected)
        assert child(lambda: expect(jobs, expected)) == 0

    for _ in range(20 if LONG else 2):
        assert child(grandchild_too) == 0
        expect(jobs, expected)  # the parent still has its threads


def exit_of_a_child() -> None:
    """A child that ends as Python does, with all that wants to clean up."""
    jobs = [*core_jobs(0)[:3], *torch_jobs()]
    expected = [job() for job in jobs]
    pid = os.fork()
    if pid:
        assert os.waitpid(pid, 0)[1] == 0
    else:
        signal.alarm(60)
    expect(jobs, expected)


def fork_after_torch() -> None:
    """Of the host's calls only: the core has had no threads yet, but libgomp has."""
    import torch

    jobs = torch_jobs()
    torch.set_num_threads(4)
    torch.linspace(-1, 1, 1 << 22).exp().sum()
    assert child(lambda: [job() for job in jobs]) == 0


def fork_during_use(kind: str) -> None:
    """While other threads are inside kernels."""
    jobs = [*core_jobs(0)[:6], *(torch_jobs() if "torch" in kind else [])]
    expected = [job() for job in jobs]
    stop = False

    def work(i: int) -> None:
        while not stop:
            job = (i + 1) % len(jobs)
            assert jobs[job]() == expected[job]
            i = job

    with ThreadPoolExecutor(3) as pool:
        workers = [pool.submit(work, i) for i in range(3)]
        try:
            for i in range(500 if LONG else 12):
                assert child(functools.partial(expect, jobs[i % len(jobs) :][:2], expected[i % len(jobs) :][:2])) == 0
        finally:
            stop = True
        for worker in workers:
            worker.result()


def fork_during_first_use() -> None:
    """While another thread is in the first call of all, which finds libgomp and chooses the CPU level."""
    jobs = core_jobs(0)[:1]

    def first() -> None:
        worker = threading.Thread(target=jobs[0])
        worker.start()
        time.sleep(random.random() * 2e-3)
        assert child(lambda: [job() for job in jobs], seconds=20) == 0
        worker.join()

    for _ in range(2000 if LONG else 40):
        assert child(first) == 0


FORKS = [
    "fork_after_use('core')",
    "fork_after_use('torch')",
    "fork_after_use('torch and jax')",
    "exit_of_a_child()",
    "fork_after_torch()",
    "fork_during_use('core')",
    "fork_during_use('torch')",
    "fork_during_first_use()",
]


@pytest.mark.parametrize("how", FORKS)
def test_forks(how: str) -> None:
    """In a process of its own, since JAX has run in this one."""
    for package in ("torch", "jax"):
        if package in how or "exit" in how:
            pytest.importorskip(package)
    code = f"import warnings; warnings.simplefilter('ignore'); import test_concurrency as t; t.{how}"
    done = run_python(code)
    assert done.returncode == 0, done.stderr


# ---- other processes -------------------------------------------------------------------------------------------------


def digest(kind: str) -> str:
    """The bytes of large calls, in any process."""
    jobs = core_jobs(0) if kind == "core" else large_jobs(make(kind), 0, count=4)
    return hashlib.sha256(b"".join(b for job in jobs for b in job())).hexdigest()


@pytest.mark.parametrize("start", ["spawn", "forkserver"])
@pytest.mark.parametrize("kind", ["core", "torch", "jax"])
def test_processes(kind: str, start: str) -> None:
    if kind != "core":
        pytest.importorskip(kind)
    if start == "forkserver" and not LONG:
        pytest.skip("with QUARK_TEST_LONG=1")
    with multiprocessing.get_context(start).Pool(2) as pool:
        assert set(pool.map(digest, [kind] * 2, chunksize=1)) == {digest(kind)}


# ---- interpreters ----------------------------------------------------------------------------------------------------

IN_AN_INTERPRETER = """
import sys
sys.path[:] = {path!r}
try:
    import quark_kernels
except ImportError as error:
    print("refused:", error, flush=True)
else:
    print("imported", flush=True)
"""

SUBINTERPRETER = """
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
import sys
{before}
text = {text!r}.format(path=sys.path)
for _ in range(3):
    found = interpreters.create()
    print(interpreters.run_string(found, text) or "", end="", flush=True)
    interpreters.destroy(found)
{after}
"""


@pytest.mark.parametrize("first", [False, True], ids=["alone", "after-import"])
def test_subinterpreters_are_refused(first: bool) -> None:
    """With a line that says so; the main interpreter goes on."""
    use = "import test_concurrency as t; t.core_jobs(0)[0]()"
    code = SUBINTERPRETER.format(before=use if first else "", text=IN_AN_INTERPRETER, after=use)
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("refused: ") and "interpreter" in line for line in lines), lines


# ---- signals ---------------------------------------------------------------------------------------------------------


def interrupt(kind: str) -> None:
    """Ctrl-C at any time within calls: it raises, and whatever is called then gives the bits that it gave."""
    jobs = core_jobs(0) if kind == "core" else large_jobs(make(kind), 0, count=4)
    if kind != "core":
        jobs += small_jobs(make(kind))[:: 1 if kind == "torch" else 4]
    expected = [job() for job in jobs]
    order, raised, rounds = random.Random(0), 0, 300 if LONG else 25
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    for _ in range(rounds):
        try:
            end = time.monotonic() + 1  # Python may have had to swallow it, in a finalizer
            signal.setitimer(signal.ITIMER_REAL, 1e-4 + order.random() * 0.02)
            while time.monotonic() < end:
                i = order.randrange(len(jobs))
                assert jobs[i]() == expected[i]
        except KeyboardInterrupt:
            raised += 1
        i = order.randrange(len(jobs))
        assert jobs[i]() == expected[i]
    expect(jobs, expected)
    assert raised > rounds / 2, f"{raised} of {rounds}"


@pytest.mark.parametrize("kind", ["core", "torch", "jax"])
def test_interrupts(kind: str) -> None:
    if kind != "core":
        pytest.importorskip(kind)
    done = run_python(f"import test_concurrency as t; t.interrupt({kind!r})")
    assert done.returncode == 0, done.stderr
