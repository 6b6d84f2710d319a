"""The GPU benchmark without a GPU: its cases, its arithmetic, its calls on the CPU with made-up times, its report."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import bench_gpu
import report
from bench_gpu import BEGIN, CASES, DTYPES, END, FEW_CASES, LAST_AXIS, Case, Gpu, Task
from cases import FEW, MIB

ELEMENTS = 8 * 4096


class OnCpu(Gpu):
    """The CPU in place of a GPU. Calls are made; each takes a millisecond, and what isn't ours 1% more."""

    device, footprint = "cpu", 0

    def __init__(self) -> None:
        self.first: Any = None

    def seconds(self, call: Any, launches: int) -> float:
        call()
        self.first = self.first or call
        return 1e-3 if call is self.first else 1.01e-3

    def captured(self, call: Any, count: int) -> Any:
        return call

    def host_seconds(self, call: Any, count: int) -> float:
        call()
        return 5e-6

    def clear(self) -> None:
        self.first = None

    def described(self) -> dict[str, Any]:
        return {"gpu": "a GPU", "driver": "1.2.3"}


def without_compiling(case: Case) -> list[str]:
    return bench_gpu.against(case, quick=True)


# ---- cases -----------------------------------------------------------------------------------------------------------


def test_names_are_unique() -> None:
    assert len(set(map(str, CASES))) == len(CASES)
    assert len(set(map(str, FEW_CASES))) == len(FEW_CASES)


def test_targets() -> None:
    targets = {str(case): case.target for case in CASES}
    assert targets["quantize int8, per token"] == targets["dequantize nvfp4"] == 0.90
    assert targets["fake_quantize fp8_e4m3, per token, dynamic"] == 0.85
    assert targets["quantize int8, per tensor, stochastic"] == 0.75
    assert targets["lsq_backward int8, per channel"] == 0.80
    assert targets["quantize int8, per tensor, dynamic"] is None


def test_plan() -> None:
    tasks = bench_gpu.plan((256, 1024), quick=False)
    assert len(tasks) == 2 * len(DTYPES) * len(CASES)
    assert all(task.against for task in tasks if task.size == 256)
    assert not any(task.against for task in tasks if task.size == 1024)
    assert not any("compile" in name for task in bench_gpu.plan((256,), quick=True) for name in task.against)


def test_command_line() -> None:
    assert bench_gpu.parse([]).sizes == (256, 1024)
    assert bench_gpu.parse(["--quick"]).sizes == (256,)
    assert bench_gpu.parse(["--size-mb", "64", "512", "64"]).sizes == (64, 512)
    with pytest.raises(SystemExit):
        bench_gpu.parse(["--size-mb", "0"])


# ---- arithmetic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "dtype", "size"),
    [
        (Case("fake_quantize", "int8", "per tensor"), "float32", 8 * ELEMENTS + 4),
        (Case("quantize", "int8", "per channel"), "bfloat16", 3 * ELEMENTS + 4 * 8),
        (Case("quantize", "int8", LAST_AXIS), "bfloat16", 3 * ELEMENTS + 4 * 4096),
        (Case("dequantize", "int4", "groups of 128"), "float32", 4 * ELEMENTS + ELEMENTS // 2 + 4 * ELEMENTS // 128),
        (Case("quantize", "mxfp4", dynamic=True), "bfloat16", 2 * ELEMENTS + ELEMENTS // 2 + ELEMENTS // 32),
        (Case("quantize", "nvfp4", dynamic=True), "bfloat16", 2 * ELEMENTS + ELEMENTS // 2 + ELEMENTS // 16 + 4),
        (Case("lsq_backward", "int8", "per channel"), "bfloat16", 6 * ELEMENTS + 2 * 4 * 8),
    ],
    ids=str,
)
def test_bytes(case: Case, dtype: str, size: int) -> None:
    assert bench_gpu.moved(case, ELEMENTS, dtype) == size


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bytes_are_those_of_the_arrays(case: Case) -> None:
    x = bench_gpu.numbers(bench_gpu.shape_of(case, ELEMENTS), "bfloat16", "cpu")
    t = bench_gpu.operands(case, x)
    codes, *scales = bench_gpu.arrays_of(t.q)
    result = bench_gpu.arrays_of(bench_gpu.ours(case, t)())
    arrays = {
        "fake_quantize": [t.x, *scales, *result],
        "quantize": [t.x, *result],
        "dequantize": [codes, *scales, *result],
        "lsq_backward": [t.x, t.grad, t.scale, *result],
    }
    assert bench_gpu.moved(case, ELEMENTS, "bfloat16") == sum(a.nbytes for a in arrays[case.operation])


def test_reading_twice() -> None:
    def limit(case: Case) -> float:
        return bench_gpu.limit_of(case, ELEMENTS, "bfloat16")

    assert limit(Case("quantize", "mxfp4", dynamic=True)) == limit(Case("quantize", "int8", "per tensor")) == 1
    assert limit(Case("fake_quantize", "int8", "per tensor", True)) == pytest.approx(2 / 3, abs=1e-3)
    assert limit(Case("quantize", "nvfp4", dynamic=True)) == pytest.approx(2.5625 / 4.5625, abs=1e-3)


def test_sets() -> None:
    assert [bench_gpu.sets_of(size * MIB) for size in (1, 300, 512, 1024, 2048)] == [1024, 4, 2, 1, 1]


def test_turns() -> None:
    seen: list[int] = []
    call = bench_gpu.in_turn([lambda i=i: seen.append(i) for i in range(3)])
    for _ in range(7):
        call()
    assert seen == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("elements", [FEW, ELEMENTS, MIB])
def test_shapes(elements: int) -> None:
    for case in CASES:
        shape = bench_gpu.shape_of(case, elements)
        assert torch.Size(shape).numel() == elements
        assert len(shape) == (3 if case.along == "per token" else 2)
        assert shape[-1] % 128 == 0


def test_driver(tmp_path: Path) -> None:
    assert bench_gpu.driver(tmp_path) == "unknown"
    path = tmp_path / "proc/driver/nvidia/version"
    path.parent.mkdir(parents=True)
    path.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC 12.2\n"
    )
    assert bench_gpu.driver(tmp_path) == "550.54.15"


# ---- bits and calls --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CASES, *FEW_CASES[3:]], ids=str)
def test_row(case: Case, dtype: str) -> None:
    """Contenders compute the same: one that doesn't is left out."""
    failed: bench_gpu.Failed = {}
    row = bench_gpu.measure_case(Task(case, dtype, 1, without_compiling(case)), OnCpu(), 1, failed)
    assert (row["name"], row["dtype"], row["target"]) == (str(case), dtype, case.target)
    assert report.of_copy(row) == pytest.approx(1.01, abs=1e-3)
    assert set(row["seconds"]) | {name for name, _ in failed} == {"quark", "copy", *without_compiling(case)}
    assert not [why for name, why in failed if name != "torchao"]


def test_a_wrong_contender_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_gpu, "contender", lambda *_: lambda t: lambda: t.x + 1)
    failed: bench_gpu.Failed = {}
    for dtype in DTYPES:
        task = Task(Case("fake_quantize", "int8", "per tensor"), dtype, 1, ["torch eager"])
        row = bench_gpu.measure_case(task, OnCpu(), 1, failed)
        assert set(row["seconds"]) == {"quark", "copy"}
    assert all("computes something else" in why for _, why in failed)


def test_failures_are_grouped() -> None:
    failed = {("one", "isn't installed"): ["a", "b", "c"], ("two", "fails"): ["a"]}
    assert bench_gpu.lines_of(failed) == ["one: isn't installed (a, and 2 more)", "two: fails (a)"]


@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_call_on_few_elements(case: Case) -> None:
    row = bench_gpu.measure_call(case, OnCpu(), 3)
    assert set(row["seconds"]) == {"quark", "empty"} <= set(row["host"])
    assert bench_gpu.beyond_empty(row) == pytest.approx(-0.1)
    assert bench_gpu.is_met(row)


def test_jax() -> None:
    pytest.importorskip("jax")
    job = bench_gpu.jax_jobs(1, 1)[0]
    (line,) = bench_gpu.jax_table({"rows": [bench_gpu.measure(job)]}).splitlines()[2:]
    assert line.startswith("| fake_quantize int8, per tensor | 1 MiB | ")


class Recorder:
    """Stands for torch.cuda: writes down what is asked of it."""

    def __init__(self, seen: list[str]) -> None:
        self.seen = seen

    def Event(self, *, enable_timing: bool) -> Recorder:
        return self

    def record(self) -> None:
        self.seen.append("record")

    def synchronize(self) -> None:
        self.seen.append("synchronize")

    def elapsed_time(self, end: Recorder) -> float:
        return 6.0

    def Stream(self) -> Recorder:
        return self

    current_stream = CUDAGraph = Stream

    def wait_stream(self, other: Recorder) -> None:
        self.seen.append("wait")

    def stream(self, stream: Recorder) -> Any:
        return contextlib.nullcontext()

    def graph(self, graph: Recorder) -> Any:
        self.seen.append("capture")
        return contextlib.nullcontext()

    def replay(self) -> None:
        self.seen.append("replay")


def test_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(torch, "cuda", Recorder(seen))
    call, gpu = lambda: seen.append("call"), Gpu()
    assert gpu.seconds(call, 3) == pytest.approx(2e-3)
    assert seen == ["call", "record", "call", "call", "call", "record", "synchronize"]

    seen.clear()
    gpu.captured(call, 2)()
    assert seen == ["wait", "call", "call", "call", "wait", "capture", "call", "call", "replay"]

    seen.clear()
    assert 0 < gpu.host_seconds(call, 2) < 1
    assert seen == ["synchronize", "call", "call", "synchronize"]


def test_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[0]
    assert bench_gpu.why_wrong(case, "float32", "cpu", ELEMENTS) is None
    a = torch.tensor([0.0, 1.0])
    assert bench_gpu.same_bits([a, a[0]], [a.clone(), a[0].clone()])
    assert not bench_gpu.same_bits([a], [-a.flip(0).flip(0)])
    assert not bench_gpu.same_bits([a], [torch.tensor([-0.0, 1.0])])
    assert not bench_gpu.same_bits([a], [a.bfloat16()])
    assert not bench_gpu.same_bits([a], [a, a])

    found = iter([0.0, -0.0])
    monkeypatch.setattr(bench_gpu, "ours", lambda *_: lambda: torch.tensor([next(found)]))
    assert bench_gpu.why_wrong(case, "float32", "cpu", ELEMENTS) == "its bits aren't those of the CPU"

    def fail(*_: Any) -> Any:
        raise RuntimeError("no kernel\nand more")

    monkeypatch.setattr(bench_gpu, "ours", fail)
    assert bench_gpu.why_wrong(case, "float32", "cpu", ELEMENTS) == "no kernel"


# ---- report and files ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run() -> dict[str, Any]:
    """A run of a few cases, one of which has other bits, and one of which fails."""
    kept = [case for case in CASES if case.preset in ("nvfp4", "int4") or case.operation == "lsq_backward"]
    why_wrong, measure_case = bench_gpu.why_wrong, bench_gpu.measure_case

    def wrong(case: Case, *rest: Any) -> str | None:
        return "its bits aren't those of the CPU" if case == kept[0] else why_wrong(case, *rest)

    def fails(task: Task, *rest: Any) -> Any:
        if task.case == kept[1]:
            raise RuntimeError("out of memory")
        return measure_case(task, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_gpu, "QUICK_ROUNDS", 1)
        patch.setattr(bench_gpu, "CASES", kept)
        patch.setattr(bench_gpu, "FEW_CASES", FEW_CASES[:1])
        patch.setattr(bench_gpu, "why_no_jax", lambda: "it has no GPU")
        patch.setattr(bench_gpu, "why_wrong", wrong)
        patch.setattr(bench_gpu, "measure_case", fails)
        gpu = OnCpu()
        run: dict[str, Any] = {"machine": bench_gpu.machine(gpu), "left_out": [], "wrong": [], "rows": []}
        bench_gpu.measure_all(run, (1,), gpu, quick=True, elements=ELEMENTS)
    return run


def test_run(run: dict[str, Any]) -> None:
    names = [r["name"] for r in report.of_kind(run, "case")]
    assert str(CASES[0]) not in names
    assert names.count("lsq_backward int8, per tensor") == len(DTYPES)
    wrong = "fake_quantize int4, groups of 128"
    assert run["wrong"] == [
        f"{wrong}, {dtype}, {ELEMENTS} elements: its bits aren't those of the CPU" for dtype in DTYPES
    ]
    assert wrong not in names
    assert "quantize int4, groups of 128, float32, 1 MiB: out of memory" in run["left_out"]
    assert "jax: it has no GPU" in run["left_out"]
    assert json.loads(report.as_json(run)) == run


def row(target: float | None, ours: float, limit: float = 1.0) -> dict[str, Any]:
    seconds = {"quark": [ours] * 3, "copy": [1e-3] * 3, "torch eager": [5e-3] * 3}
    return {
        "kind": "case",
        "name": "quantize int8",
        "dtype": "bfloat16",
        "size": 256,
        "target": target,
        "bytes": 2 * 10**9,
        "limit": limit,
        "seconds": seconds,
    }


def test_tables() -> None:
    rows = [row(0.9, 1e-3), row(0.9, 2e-3, 0.56), row(None, 2e-3)]
    table = bench_gpu.case_table({"rows": rows}).splitlines()[2:]
    assert table == [
        "| quantize int8 | bfloat16 | 256 MiB | 2000 | 2000 | 100% | ≥ 90% | met |  |",
        "| quantize int8 | bfloat16 | 256 MiB | 1000 | 2000 | **50%** | ≥ 90% | missed | x is read twice: 56% |",
        "| quantize int8 | bfloat16 | 256 MiB | 1000 | 2000 | 50% |  |  |  |",
    ]
    table = bench_gpu.contender_table({"rows": rows}).splitlines()[2:]
    assert table[1] == "| quantize int8 | bfloat16 | 256 MiB | 2000 | torch eager 2.50x |"


def test_call_table() -> None:
    call = {"kind": "call", "name": "a call", "target": 2.0, "seconds": {"quark": [4e-6] * 3, "empty": [1.5e-6] * 3}}
    call["host"] = {"quark": [6e-6] * 3, "empty": [3e-6] * 3, "torch's": [7e-6] * 3}
    (line,) = bench_gpu.call_table({"rows": [call]}).splitlines()[2:]
    assert line == "| a call | 4.00 | 1.50 | **2.50** | ≤ 2 | missed | 6.0 | 3.0 | 7.0 torch's |"


def test_docs(run: dict[str, Any], tmp_path: Path) -> None:
    document = tmp_path / "performance.md"
    document.write_text(f"before\n\n{BEGIN}\nfrom another run\n{END}\n\nafter\n")
    for _ in range(2):  # the second time over what the first wrote
        bench_gpu.write_docs(run, document)
    text = document.read_text()
    assert text.startswith(f"before\n\n{BEGIN}\n\nFrom `python benchmarks/bench_gpu.py")
    assert text.endswith(f"\n\n{END}\n\nafter\n")
    assert "another run" not in text
    for line in ("- gpu: a GPU", "- driver: 1.2.3", f"- torch: {torch.__version__}", "- date: 2"):
        assert text.count(line) == 1, line
    assert "**wrong, and not timed**: fake_quantize int4, groups of 128, bfloat16" in text
    assert "targets were met." in text


@pytest.mark.parametrize("text", ["", BEGIN, END, f"{END} {BEGIN}", f"{BEGIN} {BEGIN} {END}"])
def test_docs_without_markers(text: str) -> None:
    with pytest.raises(ValueError, match="expected one <!-- gpu begin --> ... <!-- gpu end -->"):
        bench_gpu.placed(text, "")


def test_the_document_has_the_place() -> None:
    assert f"{BEGIN}\n\nsomething\n\n{END}" in bench_gpu.placed(bench_gpu.DOCUMENT.read_text(), "something")


def test_missing_markers_end_it_before_it_measures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    document = tmp_path / "performance.md"
    document.write_text("no markers")
    monkeypatch.setattr(bench_gpu, "missing", lambda: None)
    monkeypatch.setattr(bench_gpu, "DOCUMENT", document)
    with pytest.raises(SystemExit, match=r"performance.md: expected one"):
        bench_gpu.main(["--docs"])


@pytest.mark.parametrize("wrong", [[], ["a case"]])
def test_exit_code_and_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: list[str]) -> None:
    def measured(run: dict[str, Any], *_: Any, **__: Any) -> None:
        run["wrong"] += wrong

    monkeypatch.setattr(bench_gpu, "missing", lambda: None)
    monkeypatch.setattr(bench_gpu, "Gpu", OnCpu)
    monkeypatch.setattr(bench_gpu, "measure_all", measured)
    path = tmp_path / "new" / "run.json"
    assert bench_gpu.main(["--json", str(path)]) == len(wrong)
    assert json.loads(path.read_text())["wrong"] == wrong


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    ended = subprocess.run([sys.executable, ROOT / "benchmarks" / "bench_gpu.py"], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith("no CUDA device: ")
