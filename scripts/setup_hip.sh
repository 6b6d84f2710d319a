#!/usr/bin/env bash
# A HIP compiler on Debian 12, for machines that compile kernels and needn't run them: clang 19 with Debian's HIP 5.2,
# and in DIR a ROCm folder of links, plus what the two lack of each other. Tells what it does on stderr and writes
# CMake's arguments to stdout, one a line:
#
#   cmake -S . -B build $(scripts/setup_hip.sh DIR)
#
# Without CMake: clang++-19 -x hip --rocm-path=DIR --offload-arch=gfx90a ...
#
# usage: scripts/setup_hip.sh DIR [ARCHITECTURE ...]
set -euo pipefail
say() { echo "setup_hip: $*" >&2; }

if [ $# -eq 0 ]; then
  say "usage: $0 DIR [ARCHITECTURE ...]"
  exit 2
fi
mkdir -p "$1"
root=$(cd "$1" && pwd)
if [[ $root == *[[:space:]\;]* ]]; then
  say "'$root' has spaces or semicolons, which CMake's flags can't hold"
  exit 2
fi
shift
architectures=("$@")
[ ${#architectures[@]} -gt 0 ] || architectures=(gfx90a gfx942 gfx1100 gfx1201)

# ---- packages -------------------------------------------------------------------------------------------------------
# clang-tools-19 has clang-offload-bundler, which joins the code of several architectures; lld-19 links each of them.
"$(dirname "$0")/packages.sh" clang-19 clang-tools-19 lld-19 libamdhip64-dev rocm-device-libs

clang=/usr/bin/clang++-19
known=$("$clang" --target=amdgcn-amd-amdhsa -nogpulib --print-supported-cpus 2>&1)
for architecture in "${architectures[@]}"; do
  if ! [[ $architecture =~ ^gfx[0-9a-f]{3,4}$ ]] || ! grep -qw "$architecture" <<<"$known"; then
    say "'$architecture' is no architecture that $clang knows"
    exit 1
  fi
done

# ---- a ROCm folder --------------------------------------------------------------------------------------------------
libraries=/usr/lib/$(dpkg-architecture -qDEB_HOST_MULTIARCH 2>/dev/null || echo x86_64-linux-gnu)
bitcode=$root/amdgcn/bitcode
mkdir -p "$bitcode" "$root/include" "$root/share" "$root/lib/cmake/hip-lang"
ln -sfn /usr/include/hip "$root/include/hip"
ln -sfn /usr/share/hip "$root/share/hip" # its version
ln -sfn "$libraries/libamdhip64.so" "$root/lib/libamdhip64.so"
ln -sf "$libraries"/amdgcn/bitcode/*.bc "$bitcode/"

# Per architecture, clang asks for a file with one constant, its number: gfx90a is 9.0.10, thus 9010. Debian's libraries
# lack those of architectures that are younger than they.
for architecture in "${architectures[@]}"; do
  version=${architecture#gfx}
  file=$bitcode/oclc_isa_version_$version.bc
  [ ! -e "$file" ] || continue
  number=$((${version:0:-2} * 1000 + ${version: -2:1} * 100 + 16#${version: -1}))
  "$clang" -x ir --target=amdgcn-amd-amdhsa -nogpulib -Wno-override-module -emit-llvm -c -o "$file" - <<EOF
target triple = "amdgcn-amd-amdhsa"
@__oclc_ISA_version = linkonce_odr protected local_unnamed_addr addrspace(4) constant i32 $number, align 4
EOF
  say "$file: $number"
done

# CMake's HIP language reads this package for what to link. Debian's own wants ROCm's clang around it.
cat >"$root/lib/cmake/hip-lang/hip-lang-config.cmake" <<EOF
if(NOT TARGET hip-lang::device)
  add_library(hip-lang::device INTERFACE IMPORTED)
  set_target_properties(hip-lang::device PROPERTIES INTERFACE_LINK_LIBRARIES "$libraries/libamdhip64.so")
endif()
set(_CMAKE_HIP_DEVICE_RUNTIME_TARGET hip-lang::device)
EOF
say "ready: $root"

list=$(IFS=';' && echo "${architectures[*]}")
printf '%s\n' \
  "-DCMAKE_HIP_COMPILER=$clang" \
  "-DCMAKE_HIP_COMPILER_ROCM_ROOT=$root" \
  "-DCMAKE_HIP_FLAGS=--rocm-path=$root" \
  "-DCMAKE_HIP_ARCHITECTURES=$list"
