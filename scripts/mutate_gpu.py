"""Plant bugs in the GPU kernels, one at a time, and see whether the simulated GPU's tests find them.

A mutant is compiled from a copy of the sources and linked with the objects of build/simt (make test-cpp PRESET=simt).
Prints the score, and fails where a mutant survives or a planted line is no more in the sources.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]


class Mutant(NamedTuple):
    """A change of one line, and the tests (parts of their names) that should notice."""

    file: str
    line: str
    instead: str
    tests: tuple[str, ...]


ELEMENTS = ("vectors", "quantize", "pack")
SCALES = ("extremes", "choose_qparams", "groups_of_one_row")
SUMS = ("vectors", "backward", "sums", "long_groups")
MUTANTS = [
    Mutant("arrays.h", "if (path.has_blocks) index = divide(index, axis[2]);", "", ELEMENTS),
    Mutant("arrays.h", "if (shift + form.bits > 8)", "if (shift + form.bits > 9)", ELEMENTS),
    Mutant("arrays.h", "form.number_of(code, stored_bits())", "form.number_of(code, 8)", ELEMENTS),
    Mutant("arrays.h", "* form.bits + 7) / 8; ++i)", "* form.bits) / 8; ++i)", ELEMENTS),
    Mutant("arrays.h", "(along % kPairByte / 2)", "(along % kPairByte / 4)", ELEMENTS),
    Mutant("arrays.h", ".word[index % 4]", ".word[(index + 1) % 4]", ELEMENTS),
    Mutant("arrays.h", "uint8_t(r.code - offset)", "uint8_t(r.code)", SCALES),
    Mutant("elements.h", "(a.elements - first + kThreads - 1)", "(a.elements - first + kThreads)", ELEMENTS),
    Mutant("elements.h", "k < count; ++k", "k < count - 1; ++k", ELEMENTS),
    Mutant("elements.h", "a.out.form.row % 8 * a.out.form.bits % 8 == 0", "true", ELEMENTS),
    Mutant("groups.h", "if (group >= 0) raise(group, e);", "", SCALES),
    Mutant("groups.h", "mask < 32; mask *= 2", "mask < 16; mask *= 2", SCALES),
    Mutant("groups.h", "is_alone && !has_others && other == group", "is_alone", SCALES),
    Mutant("groups.h", "rest = divide(k, part.width)", "rest = divide(k, all.block[d])", SUMS),
    Mutant("groups.h", "for (int mask = kTeam / 2; mask > 0", "for (int mask = kTeam / 4; mask > 0", SUMS),
    Mutant("groups.h", "(lane[0] + lane[2]) + (lane[1] + lane[3])", "(lane[0] + lane[1]) + (lane[2] + lane[3])", SUMS),
    Mutant("groups.h", "a.learned ? a.sums[i] * a.learned->factor", "a.learned ? a.sums[i]", SUMS),
    Mutant("groups.h", "int64_t(a.less[index]) < wanted", "int64_t(a.less[index]) <= wanted", SCALES),
    Mutant("groups.h", "a.less[index] = a.lesser[index] = 0;", "", SCALES),
    Mutant("groups.h", "a.sums[i] >= a.least[i]", "a.sums[i] < a.least[i]", SCALES),
    Mutant("vectors.h", "int mask = a.lanes / 2; mask > 0", "int mask = a.lanes / 4; mask > 0", ("vectors", "groups")),
    Mutant("vectors.h", "thread() % a.lanes == 0", "thread() % a.lanes == 1", ("vectors", "groups")),
    Mutant("vectors.h", "  barrier();\n", "", ("vectors", "groups")),
    Mutant(
        "vectors.h",
        "i < end; i += kThreads * kVector",
        "i < end - kVector; i += kThreads * kVector",
        ("vectors", "groups"),
    ),
    Mutant("vectors.h", "if (!is_ordinary(s, z, largest, a_.each.limit))", "if (false)", ELEMENTS),
    Mutant("vectors.h", "(w | w >> 4) & 0x00ff00ffu", "(w | w >> 8) & 0x00ff00ffu", ELEMENTS),
    Mutant("vectors.h", "philox(uint64_t(i + j) / 4, key_)", "philox(uint64_t(i) / 4, key_)", ELEMENTS),
    Mutant("vectors.h", "float_of(i % 2 ? words[i / 2]", "float_of(i % 2 == 0 ? words[i / 2]", ELEMENTS),
    Mutant("vectors.h", "is_nan(r.dx) ? nan_like(r.dx) : r.dx", "false ? 0.0f : r.dx", ("nan", *SUMS)),
    Mutant("kernels.cu", "call_.clear(low_, 2 * n * 4);", "", SCALES),
    Mutant("kernels.cu", "    sums = to;\n", "", SUMS),
    Mutant("kernels.cu", "w.size[w.rank - 1] % kVector == 0", "true", ELEMENTS),
    Mutant(
        "kernels.cu", "return is_whole && reinterpret_cast<uintptr_t>(t.data) % 16 == 0;", "return is_whole;", ELEMENTS
    ),
    Mutant("kernels.cu", "if (own_.format.is_cast() || own_.is_shard ||", "if (own_.format.is_cast() ||", ELEMENTS),
    Mutant("kernels.cu", "arguments_->elements / kVector * kVector", "arguments_->elements", ELEMENTS),
]


def compile_command(build: Path) -> list[str]:
    """Return how level.cpp is compiled, without its output."""
    for entry in json.loads((build / "compile_commands.json").read_text()):
        if entry["file"].endswith("simt/level.cpp"):
            words = shlex.split(entry["command"])
            words = words[: words.index("-o")] if "-o" in words else words
            return [w for w in words if not w.startswith(("-M", "-O"))]
    sys.exit(f"{build} has no simulated GPU: make test-cpp PRESET=simt")


def link(build: Path, level: Path, program: Path) -> None:
    """Make a program of a build's test_kernels with another level.cpp.o."""
    tests = build / "tests/cpp/CMakeFiles/test_kernels.dir/test_kernels.cpp.o"
    libraries = [str(build / "libquark_core.a"), "-lpthread", "-ldl"]
    subprocess.run(["c++", str(tests), str(level), *libraries, "-o", str(program)], check=True)


def survives(mutant: Mutant, build: Path, calls: int) -> str | None:
    """Return None where a test notices the mutant, else why it wasn't noticed."""
    source = (ROOT / "cpp/gpu" / mutant.file).read_text()
    if mutant.line not in source:
        return "its line is not in the sources"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / "cpp", folder / "cpp")
        (folder / "cpp/gpu" / mutant.file).write_text(source.replace(mutant.line, mutant.instead))
        level, program = folder / "level.o", folder / "test_kernels"
        # The copy is found first; a mutant may leave something unused.
        compiled = [*compile_command(build), "-O1", "-Wno-error", "-w", "-c", str(ROOT / "tests/cpp/simt/level.cpp")]
        compiled.insert(1, f"-I{folder / 'cpp'}")
        subprocess.run([*compiled, "-o", str(level)], check=True)
        link(build, level, program)
        environment = {**os.environ, "QUARK_TEST_LEVEL": "simt", "QUARK_TEST_CALLS": str(calls)}
        for test in mutant.tests or ("",):
            done = subprocess.run([program, test], env=environment, capture_output=True, check=False)
            if done.returncode != 0:
                return None
    return "no test fails"


def main() -> int:
    """Try the mutants and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--build", type=Path, default=ROOT / "build/simt", help="the built preset (build/simt)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every N-th mutant")
    parser.add_argument("--calls", type=int, default=1000, help="random calls of each operator (1000)")
    arguments = parser.parse_args()
    mutants = MUTANTS[:: arguments.every]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tries = pool.map(lambda m: survives(m, arguments.build, arguments.calls), mutants)
        reasons = list(tqdm(tries, total=len(mutants), unit="mutant"))
    for mutant, reason in zip(mutants, reasons, strict=True):
        if reason:
            print(f"survived: {mutant.file}: {mutant.line.strip()!r} -> {mutant.instead.strip()!r}: {reason}")
    caught = reasons.count(None)
    print(f"{caught} of {len(mutants)} planted bugs were caught")
    return caught != len(mutants)


if __name__ == "__main__":
    sys.exit(main())
