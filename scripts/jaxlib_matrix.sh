#!/usr/bin/env bash
# Builds one wheel and runs the JAX tests with it under several jaxlib releases, the oldest supported first.
# usage: scripts/jaxlib_matrix.sh [VERSION ...]
set -euo pipefail
cd "$(dirname "$0")/.."
versions=("$@")
[ ${#versions[@]} -gt 0 ] || versions=(0.8.0 0.9.2 0.10.2)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m pip wheel --quiet --no-deps --wheel-dir "$work" .
for version in "${versions[@]}"; do
  echo "== jaxlib $version"
  "${PYTHON:-python3}" -m venv "$work/$version"
  "$work/$version/bin/python" -m pip install --quiet "jax==$version" "jaxlib==$version" pytest hypothesis "$work"/quark_kernels-*.whl
  "$work/$version/bin/python" -m pytest -q -p no:cacheprovider tests -k "jax and not examples"
done
