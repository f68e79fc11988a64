#!/usr/bin/env bash
# Measure on this machine's GPU, within 25 minutes: ceilings, student, update, engine, a whole step.
#   bash benchmarks/gpu/all.sh [OUT] [MODELS]
#     OUT         tables are printed, JSON files and logs written there (default: results/gpu)
#     MODELS      folder of the models of random weights: made once, for all, and used again by the next call and by
#                 the scripts themselves (--models MODELS), with what vLLM compiled for them (default: one that is
#                 removed; both shapes take 20 GB). A card of less than 80 GB gets smaller ones, and without what takes 80
#   PYTHON=...    the interpreter (default: .venv's if it is there, else python3)
# A script that fails, or is cut off at its limit, does not stop the others, and what it has measured until then is
# kept. Each asks first what is wanted most. By estimates for an H100 there is no time for the last bridges of
# engine.py, the last optimizers of update.py, and of step.py for more than the preset for 80 GB and a comparison with
# TRL: the docstrings say how to measure these by themselves.
set -uo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
out=${1:-$repo/results/gpu}
python=${PYTHON:-$repo/.venv/bin/python}
[[ -x $python ]] || python=$(command -v "${PYTHON:-python3}")
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
export TMPDIR=$temporary  # what is cut off cannot clear up after itself
models=${2:-$temporary/models}
mkdir -p "$out"
failed=()
measure() {  # SECONDS SCRIPT [ARGUMENTS]
  local limit=$1 script=$2
  shift 2
  timeout -k 10 "$limit" "$python" "$repo/benchmarks/gpu/$script.py" --out "$out" --models "$models" "$@" || failed+=("$script")
}
# By the card's memory; without a card each says that it has none.
card='from trainers.plan.machine import GB, read_card
print(getattr(read_card(), "total", 80 * GB) // GB)'
gb=$(PYTHONPATH=$repo CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0} "$python" -c "$card") || exit 1
student=7b update=7b engine=1.5b presets=() stock=()
for size in 80 48 24 16 12; do
  if ((size <= gb && ${#presets[@]} < 2)); then presets+=("${size}gb"); fi
done
if ((gb < 80)); then
  update=1.5b stock=(--stock)
  if ((gb < 24)); then student=1.5b update=0.5b engine=0.5b; fi
  echo "On a card of $gb GB: student.py with $student, update.py with $update, engine.py with $engine, step.py with" >&2
  echo "${presets[*]:-no preset, as the smallest is for 12 GB}. Left out: 7B with all weights (update.py, the preset" >&2
  echo "for 80 GB, and stock TRL beside it), which takes a card of 80 GB." >&2
fi
measure 60 ceilings
measure 190 student --model "$student"
measure 240 update --model "$update"
measure 290 engine --model "$engine"
measure 665 step --presets ${presets[@]+"${presets[@]}"} ${stock[@]+"${stock[@]}"}
if ((${#failed[@]})); then
  echo "failed, or cut off: ${failed[*]} (logs and what was measured until then: $out)" >&2
  exit 1
fi
