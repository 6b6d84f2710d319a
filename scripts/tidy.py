"""clang-tidy over the core and the bindings; the checks are in .clang-tidy.

Every file once: kernels.cpp for the lowest CPU level alone, since the others differ only in intrinsics.
Nothing is compiled.

usage: python scripts/tidy.py [FILE ...]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build/tidy"
TOOLS = Path(sys.executable).parent


def configure() -> list[Path]:
    """Write the commands that clang-tidy reads, one a file, and return the files: the one that takes longest first."""
    options = {
        "Python_EXECUTABLE": sys.executable,
        "QUARK_CUDA": "OFF",
        "QUARK_HIP": "OFF",
    }
    arguments = [f"-D{key}={value}" for key, value in options.items()]
    environment = {**os.environ, "PATH": os.pathsep.join([str(TOOLS), os.environ["PATH"]])}
    command = ["cmake", "-S", ROOT, "-B", BUILD / "cmake", "-G", "Ninja", *arguments]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    found: dict[str, dict[str, str]] = {}
    for entry in json.loads((BUILD / "cmake/compile_commands.json").read_text()):
        if Path(entry["file"]).is_relative_to(ROOT / "cpp"):  # not nanobind's
            found.setdefault(entry["file"], entry)
    (BUILD / "compile_commands.json").write_text(json.dumps([*found.values()]))
    files = sorted(Path(file).relative_to(ROOT) for file in found)
    return sorted(files, key=lambda file: file.name != "kernels.cpp")


def check(file: Path) -> bool:
    """Whether nothing was found. Prints what was."""
    command = [TOOLS / "clang-tidy", "-p", BUILD, "--quiet", file]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(f"== {file}\n{done.stdout or done.stderr}", flush=True)
    return done.returncode == 0


def main() -> None:
    files = configure()
    if len(sys.argv) > 1:
        files = [file for file in files if str(file) in sys.argv[1:]]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        clean = [*pool.map(check, files)]
    print(f"{len(files)} files, {clean.count(False)} with findings")
    sys.exit(not files or not all(clean))


if __name__ == "__main__":
    main()
