"""What CMake says to machines that aren't supported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def test_big_endian_is_refused(tmp_path: Path) -> None:
    """clang alone can say what s390x is like: nothing is linked."""
    tools = [shutil.which(name, path=PATH) for name in ("cmake", "ninja", "clang++-19")]
    if None in tools:
        pytest.skip("needs cmake, ninja and clang++-19")
    options = {
        "CMAKE_CXX_COMPILER": "clang++-19",
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "s390x",
        "CMAKE_CXX_COMPILER_TARGET": "s390x-linux-gnu",
        "CMAKE_TRY_COMPILE_TARGET_TYPE": "STATIC_LIBRARY",
        "QUARK_PYTHON": "OFF",
    }
    command = [
        "cmake",
        "-S",
        HERE,
        "-B",
        tmp_path,
        "-G",
        "Ninja",
        *(f"-D{key}={value}" for key, value in options.items()),
    ]
    done = subprocess.run(command, env={**os.environ, "PATH": PATH}, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "big-endian machines aren't supported" in " ".join(done.stderr.split())
