#!/usr/bin/env bash
# Measure on this machine's GPU, within 25 minutes: ceilings, student, update, engine, a whole step.
#   bash benchmarks/gpu/all.sh [OUT]     tables are printed, JSON files and logs written to OUT (default: results/gpu)
#   PYTHON=...                           the interpreter (default: .venv's if it is there, else python3)
# Models of random weights are made once, for all. A script that fails, or is cut off at its limit, does not stop the
# others, and what it has measured until then is kept.
set -uo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
out=${1:-$repo/results/gpu}
python=${PYTHON:-$repo/.venv/bin/python}
[[ -x $python ]] || python=$(command -v "${PYTHON:-python3}")
models=$(mktemp -d)
trap 'rm -rf "$models"' EXIT
export TMPDIR=$models  # what is cut off cannot clear up after itself
mkdir -p "$out"
failed=()
measure() {  # SECONDS SCRIPT [ARGUMENTS]
  local limit=$1 script=$2
  shift 2
  timeout -k 10 "$limit" "$python" "$repo/benchmarks/gpu/$script.py" --out "$out" --models "$models" "$@" || failed+=("$script")
}
measure 60 ceilings
measure 180 student
measure 330 update
measure 270 engine
measure 660 step
if ((${#failed[@]})); then
  echo "failed, or cut off: ${failed[*]} (logs and what was measured until then: $out)" >&2
  exit 1
fi
