#!/usr/bin/env bash
# Train on one GPU, or in small without one. Sets up .venv on first use.
#   ./launch_mono.sh                                         the default run: the whole method in a few minutes
#   ./launch_mono.sh teacher_rlt_mono.yaml [key=value ...]   a run of cfgs/run_cfg, with overrides
#   ./launch_mono.sh teacher_rlt_mono.yaml --cfg job         show its configuration
#   ./launch_mono.sh --help                                  list every option
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/scripts/setup.sh"
exec "$PYTHON" "$here/train.py" "$@"
