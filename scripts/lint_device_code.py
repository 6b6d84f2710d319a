"""Checks that compiled device code computes with IEEE 754's basic operations alone.

    python scripts/lint_device_code.py [--allow-fma] FILE ...

The files are PTX (`nvcc -ptx`) or LLVM IR for AMD GPUs (`clang++ -x hip --cuda-device-only -S -emit-llvm`, optimized).
Reported is what may give other bits than the same C++ on a CPU: multiplications and additions that are fused or that a
later step may fuse, results that aren't rounded to nearest, approximations, and subnormals flushed to zero. Whatever
computes with floats and isn't known to be exact or correctly rounded is reported too, so that a new instruction has to
be looked up once.

`--allow-fma` accepts `fma.rn` and `llvm.fma`, for sources that call fma themselves. A second build, without those calls
and checked without the option, proves that the compiler fused nothing else.

Exits with 0 if all files are clean, with 1 after findings, and with 2 if a file can't be judged: because it is neither
PTX nor IR for AMD GPUs, or because there is no kernel in it.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Finding(NamedTuple):
    """A line that may compute something else."""

    line: int
    reason: str
    instruction: str


class Checked(NamedTuple):
    """What was read in one file."""

    functions: int
    kernels: int
    findings: list[Finding]


FUSED = "fused multiplication and addition"
CONTRACTED = "may be fused, being without .rn"
FLUSHES = "subnormals become zero"
APPROXIMATES = "approximation"
ROUNDING = "isn't rounded to nearest"
ORDER = "a sum whose order isn't fixed"
UNKNOWN = "not known to be exact or correctly rounded"
BODILESS = "a function that isn't in this file"

# ---- PTX ------------------------------------------------------------------------------------------------------------

# What isn't code: comments, and strings, which may look like them.
PTX_ASIDE = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', re.DOTALL)
PTX_FUNCTION = re.compile(r"\.(entry|func)\b[^;{]*([;{])")  # with `;` it is only declared
PTX_EXTERN = re.compile(r"\.extern\s+\.func\b")
# Only mnemonics have dots after a word: names can't, and registers and directives start with other characters.
PTX_INSTRUCTION = re.compile(r"(?<![\w.$%])([a-z]\w*)((?:\.[\w:]+)+)[^;{}\n]*")
PTX_FLOAT = re.compile(r"(b?f16|tf32|f32|f64)(x\d)?|ue\dm\d(x\d)?|e\dm\d(x\d)?")
PTX_DIRECTED = {"rz", "rm", "rp", "rna", "rs"}  # .rzi and its like round to an integer and are exact
# ptxas may fuse `mul.f32` and `add.f32`, but neither `mul.rn.f32` nor `add.rn.f32`.
PTX_ROUNDED = {"add", "sub", "mul", "div", "rcp", "sqrt"}
PTX_ORDERED = {"atom", "red"}  # sums are rounded in another order each time
PTX_EXACT = {"abs", "atom", "copysign", "cvt", "ld", "ldu", "max", "min", "mov", "neg", "red", "redux", "selp", "set"}
PTX_EXACT |= {"setp", "slct", "st", "testp"}


def ptx_reasons(name: str, parts: list[str], allow_fma: bool) -> Iterator[str]:
    """Why an instruction is reported; `add.rn.f32` is "add" with ["rn", "f32"]."""
    if not any(PTX_FLOAT.fullmatch(part) for part in parts):
        return
    approximate = "approx" in parts or "full" in parts
    directed = not PTX_DIRECTED.isdisjoint(parts)
    if "ftz" in parts:
        yield FLUSHES
    if approximate:
        yield APPROXIMATES
    if directed:
        yield ROUNDING
    if name in ("fma", "mad"):
        if name == "mad" or not allow_fma:
            yield FUSED
    elif name in PTX_ROUNDED:
        if not (approximate or directed or "rn" in parts):
            yield CONTRACTED
    elif name in PTX_ORDERED and "add" in parts:
        yield ORDER
    elif name not in PTX_EXACT and not approximate:
        yield UNKNOWN


def check_ptx(text: str, allow_fma: bool) -> Checked:
    """Checks every instruction of a PTX file."""
    code = PTX_ASIDE.sub(lambda match: "\n" * match[0].count("\n"), text)
    defined = [match[1] for match in PTX_FUNCTION.finditer(code) if match[2] == "{"]
    findings = []
    for number, line in enumerate(code.split("\n"), 1):
        if PTX_EXTERN.search(line):
            findings.append(Finding(number, BODILESS, line.strip()))
        for match in PTX_INSTRUCTION.finditer(line):
            instruction = " ".join(match[0].split())
            for reason in ptx_reasons(match[1], match[2][1:].split("."), allow_fma):
                findings.append(Finding(number, reason, instruction))
    return Checked(len(defined), defined.count("entry"), findings)


# ---- LLVM IR --------------------------------------------------------------------------------------------------------

IR_TRIPLE = re.compile(r'^target triple = "([^"]*)"', re.MULTILINE)
IR_STRING = re.compile(r'"[^"\n]*"')
IR_FLAGS = re.compile(
    r"= (?:(?:tail|musttail|notail) )?(?:fneg|fadd|fsub|fmul|fdiv|frem|fcmp|fptrunc|fpext|phi|select|call) "
    r"((?:(?:fast|nnan|ninf|nsz|arcp|contract|afn|reassoc) )+)"
)
IR_DEFINED = re.compile(r"^define [^@]*@([\w.$-]+)", re.MULTILINE)
IR_CALLED = re.compile(r"\bcall [^@]*@([\w.$-]+)\(")
IR_SUFFIX = re.compile(r"(\.(v\d+)?(i\d+|b?f\d+|p\d+))+$")  # the types that an intrinsic is made for
IR_FLOAT = re.compile(r"\b(half|bfloat|float|double)\b")
IR_SUM = re.compile(r"\batomicrmw (?:volatile )?f(?:add|sub)\b")
IR_ASM = re.compile(r'\bcall\b.*\basm (?:\w+ )*"([^"]*)"')  # an empty one only holds the optimizer back
IR_ATTRIBUTE = re.compile(r'"([\w-]+)"="([^"]*)"')
IR_DENORMAL = {"denormal-fp-math", "denormal-fp-math-f32"}
IR_UNSAFE = {"unsafe-fp-math", "approx-func-fp-math", "less-precise-fpmad", "no-infs-fp-math", "no-nans-fp-math"}
IR_UNSAFE |= {"no-signed-zeros-fp-math"}
# Compilers up to clang 19 divide halves by way of an approximate reciprocal.
IR_DIVISION = re.compile(r"= (?:frem|fdiv (?:<\d+ x )?(?:half|bfloat))\b")
# llvm.sqrt is correctly rounded unless it has !fpmath, as fdiv is.
IR_EXACT = {"canonicalize", "ceil", "copysign", "fabs", "floor", "fptosi.sat", "fptoui.sat", "frexp", "is.fpclass"}
IR_EXACT |= {"ldexp", "llrint", "llround", "lrint", "lround", "maximum", "maxnum", "minimum", "minnum", "nearbyint"}
IR_EXACT |= {"rint", "round", "roundeven", "sqrt", "trunc", "vector.reduce.fmax", "vector.reduce.fmin"}
IR_EXACT |= {"amdgcn.class", "amdgcn.fmed3", "amdgcn.frexp.exp", "amdgcn.frexp.mant", "amdgcn.ldexp"}
IR_EXACT |= {"amdgcn.mov.dpp", "amdgcn.permlane16", "amdgcn.permlane64", "amdgcn.permlanex16"}
IR_EXACT |= {"amdgcn.readfirstlane", "amdgcn.readlane", "amdgcn.update.dpp", "amdgcn.writelane"}
IR_EXACT |= {"dbg.declare", "dbg.value"}


def ir_reasons(line: str, defined: set[str], allow_fma: bool) -> Iterator[str]:
    """Why an instruction is reported; the functions that are `defined` are checked themselves."""
    if (match := IR_ASM.search(line)) and match[1]:
        yield "inline assembly, which isn't checked"
    code = IR_STRING.sub('""', line).split(";")[0]  # names of types may hold any words
    if match := IR_FLAGS.search(code):
        yield f"may be computed otherwise: {match[1].strip()}"
    if "!fpmath" in code:
        yield f"{APPROXIMATES}, by !fpmath"
    if IR_DIVISION.search(code):  # the remainder is made of a quotient, truncated and multiplied
        yield APPROXIMATES
    if IR_SUM.search(code):
        yield ORDER
    if match := IR_CALLED.search(code):
        name = IR_SUFFIX.sub("", match[1])
        if name in ("llvm.fma", "llvm.fmuladd"):
            if not (allow_fma and name == "llvm.fma"):  # fmuladd is fused or not, as the compiler likes
                yield FUSED
        elif name.startswith("llvm."):
            if name.removeprefix("llvm.") not in IR_EXACT and IR_FLOAT.search(code):
                yield UNKNOWN
        elif match[1] not in defined:
            yield BODILESS


def ir_attributes(line: str) -> Iterator[str]:
    """Why a group of functions' attributes is reported."""
    for name, value in IR_ATTRIBUTE.findall(line):
        if name in IR_DENORMAL and not set(value.split(",")) <= {"ieee"}:
            yield f"{FLUSHES}: {name}={value}"
        if name in IR_UNSAFE and value == "true":
            yield f"may be computed otherwise: {name}"


def check_ir(text: str, allow_fma: bool) -> Checked:
    """Checks every line of an IR file."""
    functions = kernels = 0
    findings = []
    defined = set(IR_DEFINED.findall(text))
    for number, line in enumerate(text.splitlines(), 1):
        reasons: list[str] = []
        if line.startswith(("define ", "attributes ")):
            functions += line.startswith("define ")
            kernels += line.startswith("define ") and " amdgpu_kernel " in line
            reasons = list(ir_attributes(line))
            line = re.split("[=(]", line)[0]  # what follows is long
        elif line.startswith(" "):
            reasons = list(ir_reasons(line, defined, allow_fma))
        findings += [Finding(number, reason, line.strip()) for reason in reasons]
    return Checked(functions, kernels, findings)


# ---- files ----------------------------------------------------------------------------------------------------------


def check(text: str, allow_fma: bool = False) -> Checked:
    """Checks a file's text. ValueError if it isn't code of the two kinds with a kernel in it."""
    triples = IR_TRIPLE.findall(text)
    if triples and all(triple.startswith("amdgcn") for triple in triples):
        checked = check_ir(text, allow_fma)
    elif triples:
        raise ValueError(f"IR for {', '.join(triples)}, not for amdgcn alone")
    elif re.search(r"^\.version\b", text, re.MULTILINE):
        checked = check_ptx(text, allow_fma)
    else:
        raise ValueError("neither PTX nor LLVM IR")
    if not checked.kernels:
        raise ValueError("there is no kernel in it")
    return checked


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(description="Finds what isn't IEEE 754's basic arithmetic in PTX and AMD's IR.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="PTX or LLVM IR")
    parser.add_argument("--allow-fma", action="store_true", help="accept fma.rn and llvm.fma")
    options = parser.parse_args(arguments)

    functions = found = 0
    for path in options.files:
        try:
            checked = check(path.read_text(), options.allow_fma)
        except (OSError, ValueError) as error:  # UnicodeDecodeError, of binary files, is a ValueError
            print(f"{path}: {error}", file=sys.stderr)
            return 2
        functions += checked.functions
        found += len(checked.findings)
        for finding in checked.findings:
            print(f"{path}:{finding.line}: {finding.reason}: {finding.instruction}")
    print(f"{functions} functions in {len(options.files)} files: {f'{found} findings' if found else 'clean'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
