#!/usr/bin/env bash
# Train with accelerate on N processes (the SFT warm-up; RL takes one). Sets up .venv on first use.
#   ./launch.sh 1 cfgs/run_cfg/teacher_sft.yaml output_dir=results/pre_rl_model
set -euo pipefail
if [[ ! ${1:-} =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: ./launch.sh NUM_PROCESSES RUN [key=value ...]" >&2
  exit 2
fi
processes=$1
shift
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/scripts/setup.sh"
for word in "$@"; do
  case $word in --help | -h | --cfg | --cfg=* | -c | --check) WORLD_SIZE=$processes exec "$PYTHON" "$here/train.py" "$@" ;; esac
done
if ((processes == 1)); then exec "$PYTHON" "$here/train.py" "$@"; fi
# A mistake in the configuration is told once, at once, before any process starts.
WORLD_SIZE=$processes "$PYTHON" "$here/train.py" "$@" --check >/dev/null
# It has refused more processes than there are cards.
exec "$PYTHON" -m accelerate.commands.launch --multi_gpu --num_processes "$processes" --num_machines 1 \
  --mixed_precision no --dynamo_backend no "$here/train.py" "$@"
