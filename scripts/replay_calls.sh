#!/usr/bin/env bash
# Replays the tests' calls (dump_calls.py) in builds of other compilers and processors: the same bytes everywhere.
# usage: scripts/replay_calls.sh COMMAND ...   each a command of tests/cpp/replay, as in
#        scripts/replay_calls.sh build/cpp/tests/cpp/replay "qemu-aarch64 -L /usr/aarch64-linux-gnu build/aarch64/tests/cpp/replay"
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || { sed -n 3,4p "$0" >&2; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
calls=$work/calls
"${PYTHON:-.venv/bin/python}" scripts/dump_calls.py "$calls"

# The same with one bit of the last result wrong.
cp "$calls" "$work/wrong"
last=$(tail -c 1 "$calls" | od -An -tu1)
printf "\\x$(printf %02x $((last ^ 1)))" | dd of="$work/wrong" bs=1 seek=$(($(stat -c %s "$calls") - 1)) conv=notrunc status=none

for command in "$@"; do
  echo "== $command"
  $command "$calls"
  if found=$($command "$work/wrong" 2>&1) || [[ $found != *" calls, 1 failures" ]]; then
    echo "replay_calls: a wrong bit wasn't found: $found" >&2
    exit 1
  fi
done
