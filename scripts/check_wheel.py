"""Check what a wheel holds, and what its compiled module asks of a machine.

usage: python scripts/check_wheel.py WHEEL [POLICY]

POLICY is the newest platform tag that is allowed, such as manylinux_2_28_x86_64; without it any manylinux.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

FILES = r"quark(_kernels|_torch|_jax)?/.*|quark_kernels-[\d.]+\.dist-info/.*"
LICENCES = (
    "LICENSE",
    "licenses/README.txt",
    "licenses/nanobind.txt",
    "licenses/robin-map.txt",
    "licenses/apache-2.0.txt",
)
TYPED = ("quark_kernels", "quark_torch", "quark_jax", "quark/torch")
# What every Linux with glibc has. Not libgomp: the one that torch brings is looked up when it is needed.
LIBRARIES = r"libstdc\+\+\.so\.6|libgcc_s\.so\.1|lib(c|m|dl|pthread|rt)\.so\.\d|ld-linux[\w-]*\.so\.\d"


def number(tag: str) -> tuple[int, ...]:
    """The glibc version of a tag such as manylinux_2_28_x86_64."""
    found = re.match(r"manylinux_(\d+)_(\d+)_", tag)
    if not found:
        sys.exit(f"the platform tag is '{tag}'; allowed: manylinux_*")
    return tuple(map(int, found.groups()))


def check(wheel: Path, policy: str | None) -> str:
    """Return what was found; leave with an error where that isn't allowed."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    others = [name for name in names if not re.fullmatch(FILES, name)]
    if others:
        sys.exit(f"{wheel.name} holds other files: {', '.join(others)}")
    missing = [name for name in LICENCES if not any(n.endswith(f".dist-info/licenses/{name}") for n in names)]
    missing += [file for package in TYPED if (file := f"{package}/py.typed") not in names]
    if missing:
        sys.exit(f"{wheel.name} lacks {', '.join(missing)}")

    command = [sys.executable, "-m", "auditwheel", "show", "--json", str(wheel)]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
    linked = sorted({*found["external_libs"], *found["versioned_symbols"]})
    if not all(re.fullmatch(LIBRARIES, name) for name in linked):
        sys.exit(f"{wheel.name} links {', '.join(linked)}; allowed: {LIBRARIES}")
    newest = {name: max(versions, key=_version) for name, versions in _by_kind(found["versioned_symbols"]).items()}
    text = f"{wheel.name}: {found['overall_tag']}, links {', '.join(linked)}, with symbols up to "
    text += ", ".join(f"{name}_{version}" for name, version in sorted(newest.items()))
    if number(found["overall_tag"]) > (number(policy) if policy else (99,)):
        sys.exit(f"{text}; allowed: {policy} or older")
    return text


def _version(text: str) -> list[int]:
    return [int(n) for n in text.split(".")]


def _by_kind(symbols: dict[str, list[str]]) -> dict[str, set[str]]:
    """By GLIBC, GLIBCXX and the like: the versions that are asked for."""
    kinds: dict[str, set[str]] = {}
    for name in [name for names in symbols.values() for name in names]:
        kind, _, version = name.rpartition("_")
        kinds.setdefault(kind, set()).add(version)
    return kinds


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    print(check(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None))
