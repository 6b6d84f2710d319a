"""The compiled kernels: nothing in them that a linker could merge across CPU levels, and loops that are vectorized."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = {"baseline": "xmm", "v3": "ymm", "v4": "zmm"}  # and the registers of their widest vectors
# The operation that no body can do without, on whole vectors: x / s, and q * s.
OPERATIONS = {
    "QuantizeBody": "div",
    "FakeQuantizeBody": "div",
    "FakeQuantizeBackwardBody": "div",
    "DequantizeBody": "mul",
}
# In the order of the C++ enumeration.
ARITHMETICS = (
    *("integer", "affine", "shifted", "reciprocal", "reciprocal_shifted", "finite"),
    *("minifloat", "minifloat_float16", "minifloat_bfloat16", "float16", "bfloat16"),
)
EVERYDAY = {"integer", "affine", "minifloat", "float16", "bfloat16"}
ARITHMETICS_OF = {
    "QuantizeBody": set(ARITHMETICS) - {"finite"},
    "FakeQuantizeBody": set(ARITHMETICS),
    "FakeQuantizeBackwardBody": EVERYDAY,
    "DequantizeBody": EVERYDAY,
}
FIXED_ROUNDINGS = ("half_even", "half_up", "half_away", "floor", "ceil", "toward_zero")
ROUNDINGS = (*FIXED_ROUNDINGS, "stochastic")
MAYBE_RANDOM = {"integer", "affine", "minifloat"}
NEAREST_ONLY = {"float16", "bfloat16", "finite", "minifloat_float16", "minifloat_bfloat16"}


# ---- objects ---------------------------------------------------------------------------------------------------------


def tool(*names: str) -> str:
    """The first of the programs found beside this Python or on the path; the test is skipped where there is none."""
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    for name in names:
        if name and (found := shutil.which(name, path=search)):
            return found
    pytest.skip(f"needs {' or '.join(filter(None, names))}, which isn't installed")


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def object_in(build: Path, level: str) -> Path:
    return build / f"CMakeFiles/quark_level_{level}.dir/cpp/cpu/kernels.cpp.o"


def is_current(build: Path) -> bool:
    """Whether a build folder has Release objects of the sources as they are."""
    cache = dict(re.findall(r"^(\w+):\w+=(.*)$", (build / "CMakeCache.txt").read_text(), re.MULTILINE))
    plain = not any(cache.get(key) for key in ("QUARK_SANITIZE", "CMAKE_CXX_FLAGS"))
    if cache.get("CMAKE_BUILD_TYPE") not in ("", "Release") or not plain:
        return False
    objects = [object_in(build, level) for level in LEVELS]
    if cache.get("CMAKE_HOME_DIRECTORY") != str(ROOT) or not all(path.exists() for path in objects):
        return False
    sources = [ROOT / "CMakeLists.txt", *(ROOT / "cpp").glob("*.*"), *(ROOT / "cpp" / "cpu").glob("*.*")]
    return max(path.stat().st_mtime for path in sources) < min(path.stat().st_mtime for path in objects)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build folder with the objects of every level."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"looks at x86-64 instructions; this machine is {platform.machine()}")
    for cache in sorted(ROOT.glob("build/*/CMakeCache.txt")):
        if is_current(cache.parent):
            return cache.parent
    cmake, ninja = tool("cmake"), tool("ninja", "ninja-build")
    compiler = tool(os.environ.get("CXX", ""), "c++", "g++", "clang++")
    folder = tmp_path_factory.mktemp("objects")
    output_of(
        *(cmake, "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"),
        *(f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_BUILD_TYPE=Release", "-DQUARK_PYTHON=OFF", "-DQUARK_TESTS=OFF"),
    )
    output_of(cmake, "--build", folder, "--target", *(f"quark_level_{level}" for level in LEVELS))
    return folder


# ---- symbols ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_levels_share_no_symbol(build: Path, level: str) -> None:
    """A weak function would be one level's code for all: an illegal instruction on older machines."""
    lines = output_of(tool("nm"), "-P", object_in(build, level)).splitlines()
    symbols = [line.split()[:2] for line in lines]
    assert [name for name, kind in symbols if kind in "VWvwu"] == []
    exported = [name for name, kind in symbols if kind.isupper() and kind != "U"]
    assert len(exported) == 1, exported  # the kernel table
    assert "kernels" in exported[0]
    assert level in exported[0]


# ---- loops -----------------------------------------------------------------------------------------------------------


class Instruction(NamedTuple):
    address: int
    text: str


def functions_in(disassembly: str) -> dict[str, list[Instruction]]:
    """Name to instructions, from what `objdump -d` prints."""
    functions: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in disassembly.splitlines():
        if head := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            code = functions.setdefault(head[1], [])
        elif instruction := re.match(r"\s+([0-9a-f]+):\t(.*)$", line):
            code.append(Instruction(int(instruction[1], 16), instruction[2].strip()))
    return functions


Loop = list[str]
Key = tuple[str, str, str]  # body, arithmetic, rounding


def innermost_loops(code: list[Instruction]) -> Iterator[Loop]:
    """What lies between a jump back and its target, where there is no other such loop inside."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    loops = []
    for i, (address, text) in enumerate(code):
        jump = re.match(r"j\w+\s+([0-9a-f]+)\b", text)
        target = int(jump[1], 16) if jump else -1
        if target in index and target <= address:
            loops.append((index[target], i))
    for begin, end in loops:
        if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in loops):
            yield [text for _, text in code[begin : end + 1]]


def is_vectorized(loop: Loop, operation: str, register: str) -> bool:
    """Whether a loop does the operation on whole vectors, and nothing one element at a time."""
    if any(re.match(r"v?(add|sub|mul|div)ss\b|call", text) for text in loop):
        return False
    return any(re.match(rf"v?{operation}ps\b", text) and f"%{register}" in text for text in loop)


def loops_of(name: str, functions: dict[str, list[Instruction]]) -> list[Loop]:
    """The loops of a function, or of the one that it only jumps to: compilers share equal code."""
    for _ in range(4):
        code = functions.get(name, [])
        if loops := list(innermost_loops(code)):
            return loops
        jumps = [jump[1] for _, text in code if (jump := re.match(r"jmp\s+[0-9a-f]+ <(.*)>$", text))]
        if not jumps:
            break
        name = jumps[-1]
    return []


@pytest.fixture(scope="module")
def tile_loops(build: Path) -> dict[str, dict[Key, list[Loop]]]:
    """For each level the innermost loops of every tile_loop."""
    result = {}
    pattern = re.compile(r"\btile_loop<.*?(\w+Body), \(.*?Arithmetic\)(\d+), \(.*?Rounding\)(\d)>\([^\[]*$")
    slopes = re.compile(r"\b(slope_loop)<\(.*?Arithmetic\)(\d+), \(.*?Rounding\)(\d)>\([^\[]*$")
    for level in LEVELS:
        listing = output_of(tool("objdump"), "-d", "-C", "--no-show-raw-insn", object_in(build, level))
        functions = functions_in(listing)
        result[level] = {
            (found[1], ARITHMETICS[int(found[2])], ROUNDINGS[int(found[3])]): loops_of(name, functions)
            for name in functions
            if (found := pattern.search(name) or slopes.search(name))
        }
    return result


@pytest.fixture(scope="module")
def ordinary_loops(build: Path) -> dict[str, dict[str, list[Loop]]]:
    """For each level the innermost loops of every loop for ordinary scales, by what it is made of."""
    result = {}
    for level in LEVELS:
        listing = output_of(tool("objdump"), "-d", "-C", "--no-show-raw-insn", object_in(build, level))
        functions = functions_in(listing.replace(f"quark::{level}::(anonymous namespace)::", ""))
        pattern = re.compile(r"\bordinary_loop<.*>\(void const\*|\bsmall_slope_loop<.*>\(SlopeRun")
        result[level] = {
            name[: name.index("(", name.rindex(">"))]: loops_of(name, functions)
            for name in functions
            if pattern.search(name)
        }
    return result


def roundings_of(body: str, arithmetic: str) -> tuple[str, ...]:
    """The roundings that a body has a loop for."""
    if body == "DequantizeBody" or arithmetic in NEAREST_ONLY:
        return ("half_even",)
    return ROUNDINGS if arithmetic in MAYBE_RANDOM else FIXED_ROUNDINGS


@pytest.mark.parametrize("body", OPERATIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_tile_loops_are_vectorized(tile_loops: dict[str, dict[Key, list[Loop]]], level: str, body: str) -> None:
    """Each has two hot loops, for one scale and for a scale per element, beside what compilers add for remainders."""
    wanted = [(body, a, r) for a in ARITHMETICS_OF[body] for r in roundings_of(body, a)]
    assert [key for key in tile_loops[level] if key[0] == body and key not in wanted] == []
    hot = {
        key: sum(is_vectorized(loop, OPERATIONS[body], LEVELS[level]) for loop in tile_loops[level].get(key, []))
        for key in wanted
    }
    assert {key: count for key, count in hot.items() if count < 2} == {}


@pytest.mark.parametrize("level", LEVELS)
def test_slope_loops_are_vectorized(tile_loops: dict[str, dict[Key, list[Loop]]], level: str) -> None:
    """The backward loops of learned scales: z added before and after rounding, every rounding."""
    wanted = {("slope_loop", a, r) for a in ("affine", "shifted") for r in FIXED_ROUNDINGS}
    found = {key: loops for key, loops in tile_loops[level].items() if key[0] == "slope_loop"}
    assert set(found) == wanted
    assert [key for key, loops in found.items() if not any(is_vectorized(p, "div", LEVELS[level]) for p in loops)] == []


@pytest.mark.parametrize("level", LEVELS)
def test_ordinary_loops_are_vectorized(ordinary_loops: dict[str, dict[str, list[Loop]]], level: str) -> None:
    """Each has hot loops for one scale, for a scale per group and for one per element (slopes: without the second)."""
    loops = ordinary_loops[level]
    bodies = Counter(re.search(r"\w*Ordinary\b|slope", name)[0] for name in loops)  # type: ignore[index]
    # Three dtypes, two roundings, fixed point and minifloats; codes to three dtypes; gradients.
    assert bodies == {"FakeQuantizeOrdinary": 12, "QuantizeOrdinary": 12, "DequantizeOrdinary": 9, "slope": 3}
    # A step's own loop asks for what comes next; a scale's reciprocals and compilers' remainders don't.
    hot = {
        name: sum(
            is_vectorized(p, "(mul|div)", LEVELS[level]) and ("prefetch" in " ".join(p) or level == "baseline")
            for p in found
        )
        for name, found in loops.items()
    }
    assert {name: count for name, count in hot.items() if count < (2 if "slope" in name else 4)} == {}


def test_a_loop_of_scalars_or_calls_is_not_vectorized() -> None:
    """The test's own reading: a vector instruction outside the loop doesn't count."""
    listing = """
0000000000000000 <scalars>:
   0:\tvdivps %ymm1,%ymm0,%ymm0
   4:\tvmovss (%rdi),%xmm0
   8:\tvdivss %xmm1,%xmm0,%xmm0
   c:\tjne    4 <scalars+0x4>
   e:\tret

0000000000000010 <vectors>:
  10:\txor    %eax,%eax
  12:\tvdivps (%rdi,%rax,1),%ymm1,%ymm0
  16:\tjne    12 <vectors+0x2>
  18:\tjmp    10 <vectors>
  1a:\tret

0000000000000020 <same>:
  20:\tjmp    10 <vectors>
"""
    functions = functions_in(listing)
    assert [is_vectorized(loop, "div", "ymm") for loop in loops_of("scalars", functions)] == [False]
    for name in ("vectors", "same"):
        assert [is_vectorized(loop, "div", "ymm") for loop in loops_of(name, functions)] == [True]
    assert not is_vectorized(["vdivps %xmm1,%xmm0,%xmm0"], "div", "ymm")
    assert not is_vectorized(["vdivps %ymm1,%ymm0,%ymm0", "call   1234 <f>"], "div", "ymm")
