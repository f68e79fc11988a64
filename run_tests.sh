#!/usr/bin/env bash
# Run the CPU test suite. Sets up .venv on first use.
#   ./run_tests.sh [pytest arguments]     -m slow: the tests that take minutes each, left out otherwise
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/scripts/setup.sh"
cd "$here"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest -m "not gpu and not slow" "$@"
