#!/usr/bin/env bash
# Debian packages that a test needs: installs those that are missing, or says which. Tells what it does on stderr.
# usage: scripts/packages.sh PACKAGE ...
set -euo pipefail
say() { echo "packages: $*" >&2; }

missing=()
for package in "$@"; do
  state=$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null || true)
  [ "$state" = installed ] || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then
  say "installed already: $*"
elif [ "$(id -u)" -ne 0 ]; then
  say "missing: apt-get install --no-install-recommends ${missing[*]}"
  exit 1
else
  say "installing ${missing[*]}"
  apt-get update -qq >&2
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
fi
