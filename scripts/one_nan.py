"""Run the simulated GPU's kernels with the one NaN that NVIDIA's GPUs compute, and see that no bit of a result changes.

CPUs hand on the NaN of an operand, so a result that should have been chosen looks right there. Here every float32
operation of the kernels is followed by a select, in LLVM's IR, that makes 0x7fffffff of a NaN. Needs clang++-19 and
build/simt (make test-cpp PRESET=simt). Prints the tests' output and returns their exit status.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from mutate_gpu import ROOT, compile_command, link

OPERATION = re.compile(
    r"^  (%[\w.]+) = (?:\w+ )*(?:(?:fadd|fsub|fmul|fdiv) (?:\w+ )*float|call .*float @llvm\.fma\.f32)"
)
ONE_NAN = "0x7FFFFFFFE0000000"  # as LLVM writes a float: the double of the same value


def with_one_nan(ir: str) -> tuple[str, int]:
    """Return the IR with every NaN that is computed replaced, and how many operations there are."""
    lines, count = [], 0
    for line in ir.splitlines():
        if found := OPERATION.match(line):
            name = found[1]
            lines += [
                line.replace(f"{name} =", f"%computed{count} =", 1),
                f"  %isnan{count} = fcmp uno float %computed{count}, %computed{count}",
                f"  {name} = select i1 %isnan{count}, float {ONE_NAN}, float %computed{count}",
            ]
            count += 1
        else:
            lines.append(line)
    return "\n".join(lines) + "\n", count


def main() -> int:
    """Compile, rewrite, link and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--build", type=Path, default=ROOT / "build/simt", help="the built preset (build/simt)")
    parser.add_argument("--calls", type=int, default=500, help="random calls of each operator (500)")
    parser.add_argument("--compiler", default="clang++-19", help="a clang (clang++-19)")
    parser.add_argument("tests", nargs="*", metavar="TEST", help="parts of tests' names; all where none is given")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        ir, level, program = (Path(name) / file for file in ("level.ll", "level.o", "test_kernels"))
        source = ROOT / "tests/cpp/simt/level.cpp"
        flags = [w for w in compile_command(arguments.build)[1:] if w != "-Werror"]
        # Vectors of floats would be operations of other types.
        scalar = ["-O1", "-fno-vectorize", "-fno-slp-vectorize", "-w"]
        compiler = [arguments.compiler, *flags, *scalar]
        subprocess.run([*compiler, "-S", "-emit-llvm", str(source), "-o", str(ir)], check=True)
        text, count = with_one_nan(ir.read_text())
        if not count:
            sys.exit("no operation was found in the IR")
        print(f"{count} operations have one NaN")
        ir.write_text(text)
        subprocess.run([arguments.compiler, "-O1", "-fPIC", "-c", str(ir), "-o", str(level)], check=True)
        link(arguments.build, level, program)
        environment = {**os.environ, "QUARK_TEST_LEVEL": "simt", "QUARK_TEST_CALLS": str(arguments.calls)}
        for test in arguments.tests or [""]:
            if status := subprocess.run([program, test], env=environment, check=False).returncode:
                return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
