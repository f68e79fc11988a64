#!/usr/bin/env bash
# Run the CPU test suite. Sets up the CPU packages on first use (with a card in .venv-cpu, see scripts/setup.sh).
#   ./run_tests.sh [pytest arguments]     -m slow: the tests that take minutes each, left out otherwise
#                                         -m gpu: those that need a card, with the CUDA packages
#                                         -n 0: one after the other, as --pdb wants it
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
marks="" word_before=""
for word in "$@"; do
  if [[ $word_before == -m ]]; then marks=$word; elif [[ $word == -m?* ]]; then marks=${word#-m}; fi
  word_before=$word
done
# Engines are built on the CPU, which the CUDA build of vLLM cannot.
if [[ $marks != *gpu* || $marks == *"not gpu"* ]]; then export RLT_CPU=1; fi
source "$here/scripts/setup.sh"
cd "$here"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
# Files of tests side by side, each on its share of the cores: two processes that both want all slow each other down many
# times. One may hold 3 GiB. A GPU's tests run alone.
if [[ " $* " != *" -n"* && " $* " != *gpu* ]]; then
  room='import os; from trainers.plan.machine import host_room
print(len(os.sched_getaffinity(0)), host_room()[1] // (3 << 30))'
  read -r cores fitting <<<"$("$PYTHON" -c "$room")"
  workers=$((cores < fitting ? cores : fitting))
  workers=$((workers > 8 ? 8 : workers < 1 ? 1 : workers))
  export OMP_NUM_THREADS=$((cores / workers))
  set -- -n "$workers" --dist loadfile "$@"
fi
exec "$PYTHON" -m pytest -m "not gpu and not slow" "$@"
