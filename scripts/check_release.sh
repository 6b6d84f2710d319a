#!/usr/bin/env bash
# Checks what a release would consist of: the sdist is the same bytes whoever makes it, holds the repository's files and
# no others, and builds without a network; the wheels link what every Linux has, can be made for old ones and need no
# compiler; the one for the stable ABI runs on newer Pythons.
#
# usage: scripts/check_release.sh
#   PYTHON     builds the first wheel (python3); of 3.12 or newer: the stable ABI's
#   ABI3       builds the stable ABI's wheel (python3.12), and
#   NEWER      runs it (python3.13); either may be missing: then that part is left out, and says so
#   POLICY     the newest platform tag that the wheels may have (scripts/check_wheel.py)
set -euo pipefail
cd "$(dirname "$0")/.."
say() { printf '== %s\n' "$*"; }
fail() {
  printf 'check_release: %s\n' "$*" >&2
  exit 1
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# An environment that can build, with what the package needs to run.
environment() { # PYTHON FOLDER
  "$1" -m venv "$2"
  "$2/bin/python" -m pip install --quiet --upgrade 'pip>=25.1'
  "$2/bin/python" - >"$2/needed" <<'EOF'
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))
print(*project["build-system"]["requires"], *project["project"]["dependencies"], "cmake", "ninja", sep="\n")
EOF
  "$2/bin/python" -m pip install --quiet --requirement "$2/needed"
}

# Nothing reaches a network from there, where user namespaces are allowed.
offline() {
  if unshare --user --map-root-user --net true 2>/dev/null; then
    unshare --user --map-root-user --net "$@"
  else
    say "skipped: taking the network away, which this machine doesn't allow"
    "$@"
  fi
}

say "sdist"
environment "${PYTHON:-python3}" "$work/tools"
python=$work/tools/bin/python
"$python" -m pip install --quiet --constraint constraints.txt --group release --group test
sdist() { (cd "$1" && PATH="$work/tools/bin:$PATH" "$python" -m build --sdist --no-isolation --outdir "$work/$2" . >/dev/null); }
sdist . one
mkdir "$work/unpacked"
tar --extract --file "$work"/one/*.tar.gz --strip-components 1 --directory "$work/unpacked"
touch "$work/unpacked/pyproject.toml"
sdist "$work/unpacked" two
cmp "$work"/one/*.tar.gz "$work"/two/*.tar.gz || fail "an sdist of the unpacked sdist is another"
tar --list --file "$work"/one/*.tar.gz | cut -d/ -f2- | sort >"$work/held"
{ git ls-files --cached --others --exclude-standard ':!.ci' && echo PKG-INFO; } | sort >"$work/wanted"
diff "$work/wanted" "$work/held" || fail "the sdist (>) doesn't hold the repository's files (<)"
"$python" -m twine check --strict "$work"/one/*.tar.gz
sha256sum "$work"/one/*.tar.gz

# The wheel that pip makes of the sdist, without a network.
wheel() { # ENVIRONMENT FOLDER
  PATH="$work/$1/bin:$PATH" offline "$work/$1/bin/python" -m pip wheel --quiet --no-deps --no-index --no-build-isolation \
    --wheel-dir "$work/$2" "$work"/one/*.tar.gz
  offline "$work/$1/bin/python" -m pip install --quiet --no-index "$work/$2"/*.whl
}

say "the sdist builds without a network, and its tests run"
wheel tools first
"$python" scripts/check_wheel.py "$work"/first/*.whl ${POLICY:+"$POLICY"}
try_core() {
  (cd "$work/unpacked" && "$python" -m pytest -q -p no:cacheprovider tests/test_formats.py tests/test_learned.py -k core)
}
try_core

# The image of manylinux has an old glibc and a new compiler. So has zig: clang, the symbols of every glibc, and a libc++
# that it links in. A second compiler and a second C++ library besides.
say "a wheel for manylinux_2_28, by zig"
machine=$(uname -m)
mkdir "$work/zig"
for tool in cc c++ ar ranlib; do
  target=
  case $tool in c*) target="-target $machine-linux-gnu.2.28" ;; esac
  printf '#!/usr/bin/env bash\nexec "%s" -m ziglang %s %s "${@//-march=x86-64-v/-march=x86_64_v}"\n' \
    "$python" "$tool" "$target" >"$work/zig/$tool"
done
chmod +x "$work"/zig/*
PATH="$work/tools/bin:$PATH" CC="$work/zig/cc" CXX="$work/zig/c++" "$python" -m pip wheel --quiet --no-deps --no-index \
  --no-build-isolation --wheel-dir "$work/old_glibc" "$work"/one/*.tar.gz \
  -C "cmake.define.CMAKE_AR=$work/zig/ar" -C "cmake.define.CMAKE_RANLIB=$work/zig/ranlib"
"$python" scripts/check_wheel.py "$work"/old_glibc/*.whl "manylinux_2_28_$machine"
"$python" -m pip install --quiet --no-deps --no-index --force-reinstall "$work"/old_glibc/*.whl
try_core

say "in a fresh environment the wheel runs the demo, with no compiler on PATH"
"${PYTHON:-python3}" -m venv "$work/user"
"$work/user/bin/python" -m pip install --quiet --constraint constraints.txt torch
"$work/user/bin/python" -m pip install --quiet --constraint constraints.txt "$(echo "$work"/first/*.whl)[torch,jax]"
(cd "$work" && env -i HOME="$work" PATH="$work/user/bin" python -m quark_kernels demo)

# ---- the stable ABI --------------------------------------------------------------------------------------------------
abi3=${ABI3:-$(command -v python3.12 || true)} newer=${NEWER:-$(command -v python3.13 || true)}
if ! "$abi3" -c '' 2>/dev/null || ! "$newer" -c '' 2>/dev/null; then
  say "skipped: the stable ABI's wheel, for want of a Python 3.12 or 3.13 (ABI3=..., NEWER=...)"
  exit
fi
say "one wheel for Python 3.12 and newer"
environment "$abi3" "$work/abi3"
wheel abi3 stable
"$python" scripts/check_wheel.py "$work"/stable/*.whl ${POLICY:+"$POLICY"}
"$python" -m abi3audit --strict "$work"/stable/*.whl
"$newer" -m venv "$work/newer"
"$work/newer/bin/python" -m pip install --quiet "$work"/stable/*-cp312-abi3-*.whl
"$work/newer/bin/python" -P - <<'EOF'
import sys

import numpy as np

import quark_kernels
from quark_kernels import _core

codes, numbers = np.empty(3, np.int8), np.empty(3, np.float32)
x, scale = np.array([0.1, 0.24, -99], np.float32), np.array([0.1], np.float32)
_core.quantize((x, scale), (codes,), "int8 block=0")
assert codes.tolist() == [1, 2, -128], codes
_core.dequantize((codes, scale), (numbers,), "int8 block=0")
assert numbers.tobytes() == (codes * np.float32(0.1)).tobytes(), numbers
try:
    _core.quantize((x, scale), (codes,), "nope")
except ValueError as error:
    assert "nope" in str(error)
else:
    raise AssertionError("no error")
print(sys.version.split()[0], quark_kernels.info()["version"], _core.__file__.rpartition("/")[2])
EOF
