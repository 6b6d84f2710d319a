#!/usr/bin/env bash
# Builds one wheel and runs the JAX tests with it under several jaxlib releases, the oldest supported first.
# usage: scripts/jaxlib_matrix.sh [VERSION ...]     a version, or `newest`: what $PYTHON (python3) finds
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
  jax=(jax jaxlib)
  [ "$version" = newest ] || jax=("jax==$version" "jaxlib==$version")
  "$work/$version/bin/python" -m pip install --quiet "${jax[@]}" pytest hypothesis "$work"/quark_kernels-*.whl
  "$work/$version/bin/python" -c 'import jaxlib, sys; print("jaxlib", jaxlib.__version__, "on Python", sys.version.split()[0])'
  "$work/$version/bin/python" -m pytest -q -p no:cacheprovider tests -k "jax and not examples"
done
