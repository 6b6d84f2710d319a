#!/usr/bin/env bash
# A compiler for aarch64 and an emulator, on Debian 12: what the preset `aarch64` needs to run the C++ tests on another
# processor's arithmetic. Tells what it does on stderr.
set -euo pipefail
say() { echo "setup_aarch64: $*" >&2; }

packages=(g++-aarch64-linux-gnu qemu-user)
missing=()
for package in "${packages[@]}"; do
  state=$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null || true)
  [ "$state" = installed ] || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then
  say "installed already: ${packages[*]}"
elif [ "$(id -u)" -ne 0 ]; then
  say "missing: apt-get install --no-install-recommends ${missing[*]}"
  exit 1
else
  say "installing ${missing[*]}"
  apt-get update -qq >&2
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
fi
say "$(aarch64-linux-gnu-g++ --version | sed -n 1p), $(qemu-aarch64 --version | sed -n 1p)"
