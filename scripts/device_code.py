"""Compile the GPU kernels to PTX and LLVM IR with the flags of a build, and lint that (lint_device_code.py).

Each architecture is compiled twice: as it is built, where the fused multiply-adds are those that numerics.h writes, and
with QUARK_NO_FMA, where there must be none: else the compiler has made some of its own.

    cmake -S . -B BUILD -DQUARK_CUDA=ON ...
    python scripts/device_code.py BUILD FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

LINT = Path(__file__).with_name("lint_device_code.py")


class Job(NamedTuple):
    """One compilation to a text file."""

    command: list[str]
    output: Path
    is_fma_free: bool


def jobs(build: Path, folder: Path, only: list[str] | None) -> list[Job]:
    """Return the compilations of a build's kernels for each architecture, or only for some."""
    found = []
    for entry in json.loads((build / "compile_commands.json").read_text()):
        platform = re.search(r"kernels\.(cuda|hip)\.cu$", entry["file"])
        if not platform:
            continue
        command = shlex.split(entry["command"])
        for name in architectures(command):
            if only and name not in only:
                continue
            for is_fma_free in (False, True):
                suffix = ".no_fma" if is_fma_free else ""
                output = folder / f"{name}{suffix}.{'ptx' if platform[1] == 'cuda' else 'll'}"
                extra = ["-DQUARK_NO_FMA"] * is_fma_free
                found.append(Job([*for_one(command, name), *extra, "-o", str(output)], output, is_fma_free))
    return found


def architectures(command: list[str]) -> list[str]:
    """Return the devices that a command compiles for."""
    text = " ".join(command)
    return sorted(set(re.findall(r"arch=compute_(\d+)", text))) or re.findall(r"--offload-arch=(\w+)", text)


def for_one(command: list[str], architecture: str) -> list[str]:
    """Return the command for one device, to text and without an output."""
    kept, skip = [], False
    for word in command:
        if skip or word in ("-c", "-o") or word.startswith(("--generate-code", "--offload-arch", "-arch")):
            skip = word == "-o"
            continue
        kept.append(word)
    if architecture.isdigit():
        return [*kept, "-ptx", f"-arch=compute_{architecture}"]
    return [*kept, f"--offload-arch={architecture}", "--cuda-device-only", "-S", "-emit-llvm"]


def main() -> int:
    """Compile, lint, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("build", type=Path, help="a build folder of CMake, with QUARK_CUDA or QUARK_HIP")
    parser.add_argument("folder", type=Path, help="where to write the PTX and the LLVM IR")
    parser.add_argument("--only", nargs="+", metavar="ARCHITECTURE", help="such as 90 or gfx942; default: all")
    arguments = parser.parse_args()
    todo = jobs(arguments.build, arguments.folder, arguments.only)
    if not todo:
        print(f"{arguments.build} has no GPU kernels: configure it with QUARK_CUDA=ON or QUARK_HIP=ON", file=sys.stderr)
        return 2
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: subprocess.run(job.command, check=True), todo))
    status = 0
    for is_fma_free in (False, True):
        files = [str(job.output) for job in todo if job.is_fma_free == is_fma_free]
        options = [] if is_fma_free else ["--allow-fma"]
        print("without explicit fma:" if is_fma_free else "as built:", flush=True)
        status |= subprocess.run([sys.executable, str(LINT), *options, *files], check=False).returncode
    return status


if __name__ == "__main__":
    sys.exit(main())
