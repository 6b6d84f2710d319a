"""The benchmark on tiny sizes: every row computes what it is compared with, and the files are written. No times."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import bench
import report
from cases import BEYOND_CACHES, EXTRA, HUGE, IN_L2, KERNELS, LARGE, OVERHEADS, PEERS, Overhead, Peer

ELEMENTS = 2 * 4096


def job(case: Any, threads: int = 1) -> bench.Job:
    """One round of a case; torch.compile takes too long here, and what it compiles is `torch eager`."""
    if isinstance(case, (Peer, Overhead)):
        pytest.importorskip(case.framework)
    peers = [a.peer for a in case.against if a.peer not in (*EXTRA, "torch.compile")] if isinstance(case, Peer) else ()
    return bench.Job(case, ELEMENTS, threads, 1, tuple(peers))


@pytest.mark.parametrize("case", [*KERNELS, *PEERS, *OVERHEADS], ids=lambda case: f"{type(case).__name__}-{case}")
def test_row(case: Any) -> None:
    row = bench.measure(job(case))  # which checks the results
    assert row["name"] == str(case)
    assert {"quark"} < set(row["seconds"])
    assert all(0 < low <= middle <= high for low, middle, high in row["seconds"].values())


def test_a_wrong_result_is_found() -> None:
    contest = job(KERNELS[0]).contest()
    pairs = [(ours + 1, right) for ours, right in contest.pairs()]
    with pytest.raises(AssertionError, match="computes something else"):
        contest._replace(pairs=lambda: iter(pairs)).check()


def test_names_are_unique() -> None:
    for cases in (KERNELS, [f"{case.framework} {case}" for case in PEERS], OVERHEADS):
        assert len(set(map(str, cases))) == len(cases)


def test_every_row_is_planned() -> None:
    full, _ = bench.plan(quick=False, peers=False)
    quick, _ = bench.plan(quick=True, peers=False)
    assert {str(j.case) for j in full} == {str(j.case) for j in quick}
    assert len(quick) < len(full)


@pytest.fixture(scope="module")
def run() -> dict[str, Any]:
    """A run of two kernels, a peer and a call, in processes of their own; sizes are as if they were large."""
    cases = (KERNELS[0], KERNELS[6])
    rows = [bench.measure(job(case)) for case in cases]
    rows += bench.run([*(job(case, threads=2) for case in cases), job(PEERS[0]), job(OVERHEADS[0])])
    kernels = [r for r in rows if r["kind"] == "kernel"]
    rows += [{**r, "elements": size // 4} for r in kernels for size in (LARGE, IN_L2, BEYOND_CACHES, *HUGE)]
    return {"machine": report.machine(), "left_out": ["something: a reason"], "rows": rows}


def test_files(run: dict[str, Any], tmp_path: Path) -> None:
    report.write(run, tmp_path)
    assert json.loads((tmp_path / "bench.json").read_text()) == run
    text = (tmp_path / "bench.md").read_text()
    assert "| fake_quantize int8, per tensor | ≥ 90% |" in text
    assert "something: a reason" in text
    for name in report.CHARTS:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_docs(run: dict[str, Any], tmp_path: Path) -> None:
    images = tmp_path / "docs" / "images"
    images.mkdir(parents=True)
    for name in ("README.md", "docs/performance.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    for _ in range(2):  # the second time over what the first wrote
        report.write_docs(run, tmp_path)
    text = (tmp_path / "docs" / "performance.md").read_text()
    assert text.count("| fake_quantize int8, per tensor | ≥ 90% |") == 1
    assert "64 MiB of float32 to int8" in " ".join((tmp_path / "README.md").read_text().split())
    assert {path.name for path in images.iterdir()} == {f"speed_{name}" for name in report.CHARTS}
    assert json.loads((tmp_path / "docs" / "performance.json").read_text()) == run
