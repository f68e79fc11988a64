#!/usr/bin/env bash
# Sets up .venv beside this repository, once: the CUDA packages where an NVIDIA driver is, the CPU packages elsewhere.
# Sourced by the launchers; afterwards $PYTHON is the interpreter to use. A change of the lock sets it up anew.
#   RLT_CPU=1     take the CPU packages although there is a driver
#   RLT_DRIVER=   the file that tells the driver's version (default: /proc/driver/nvidia/version; where it is not, as in
#                 WSL, nvidia-smi is asked)
#   RLT_PYTHON=   the Python to build .venv with (3.11 or newer; default: the first suitable on the PATH)

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$repo/.venv"
PYTHON="$venv/bin/python"
lock="$repo/requirements-cpu.txt"
driver=${RLT_DRIVER:-/proc/driver/nvidia/version}
has_card() { [[ -e $driver ]] || nvidia-smi -L >/dev/null 2>&1; }
if [[ -z ${RLT_CPU:-} ]] && has_card; then lock="$repo/requirements.txt"; fi

find_python() {
  local candidate
  for candidate in ${RLT_PYTHON:-} python3.11 python3.12 python3.13 python3 python; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "No Python 3.11 to 3.13 with venv found; install one, or name it: RLT_PYTHON=/path/to/python3.11 $0" >&2
  return 1
}

# CUDA 13, which the lock is built for, begins with this driver: better told before many GB are downloaded.
check_driver() {
  local version
  if [[ -e $driver ]]; then
    version=$(grep -m 1 -oE '[0-9]{3}\.[0-9]+(\.[0-9]+)?' "$driver" | head -n 1)
  else
    version=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)
  fi
  if [[ -n $version && ${version%%.*} -lt 580 ]]; then
    echo "The NVIDIA driver is $version, and the CUDA packages need 580 or newer: update it," >&2
    echo "or take the CPU packages, which use no GPU: RLT_CPU=1 $0" >&2
    return 1
  fi
}

install_packages() {
  local python log="$venv/setup.log"
  python=$(find_python) || return 1
  if [[ $lock == */requirements.txt ]]; then check_driver || return 1; fi
  local takes="about 3 minutes, 4 GB"
  if [[ $lock == */requirements.txt ]]; then takes="many GB"; fi
  echo "First use: setting up .venv from ${lock##*/} with $("$python" --version) ($takes; log: $log)" >&2
  rm -rf "$venv"
  "$python" -m venv "$venv" || return 1
  # The lock is complete, so nothing is resolved. On a CPU it leaves out torchvision, torchaudio and torchcodec, which
  # vLLM asks for: there is no CPU build of them, and a CUDA build breaks the import of transformers.
  if ! "$PYTHON" -m pip install --no-deps --disable-pip-version-check -r "$lock" >"$log" 2>&1; then
    tail -n 5 "$log" >&2
    echo "The packages could not be installed; see $log. Is there a network, and enough disk?" >&2
    return 1
  fi
  if ! "$PYTHON" -c 'import torch' 2>>"$log"; then
    # Without an index that offers the CPU build, pip has taken the CUDA build of torch: it needs its CUDA libraries.
    echo "This pip offers no CPU build of torch: adding the CUDA libraries of the other build (several GB)." >&2
    echo "To avoid that, stop now, set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU builds, and start again." >&2
    "$PYTHON" -m pip install --disable-pip-version-check "$(grep '^torch==' "$lock")" >>"$log" 2>&1 || return 1
  fi
  sha256sum <"$lock" >"$venv/installed-lock"
}

if [[ ! -f $venv/installed-lock ]] || [[ $(sha256sum <"$lock") != "$(<"$venv/installed-lock")" ]]; then
  install_packages || exit 1
fi
