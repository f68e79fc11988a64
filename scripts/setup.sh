#!/usr/bin/env bash
# Sets up the environment beside this repository, once: .venv, with the CUDA packages where an NVIDIA driver is, with
# the CPU packages elsewhere. Sourced by the launchers; afterwards $PYTHON is the interpreter to use. A change of the lock
# sets it up anew, but not under a run: what uses the environment holds it, and the change waits.
#   RLT_CPU=1     run on the CPU although there is a driver: the CPU packages, then in .venv-cpu, and no card is seen
#   RLT_DRIVER=   the file that tells the driver's version (default: /proc/driver/nvidia/version; where it is not, as in
#                 WSL, nvidia-smi is asked)
#   RLT_PYTHON=   the Python to build it with (3.11 or newer; default: the first suitable on the PATH)

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$repo/.venv"
lock="$repo/requirements-cpu.txt"
driver=${RLT_DRIVER:-/proc/driver/nvidia/version}
has_card() { [[ -e $driver ]] || nvidia-smi -L >/dev/null 2>&1; }
if [[ -n ${RLT_CPU:-} ]]; then
  export CUDA_VISIBLE_DEVICES=  # else the plan would be made for a card that these packages cannot use
  if has_card; then venv="$repo/.venv-cpu"; fi
elif has_card; then
  lock="$repo/requirements.txt"
fi
PYTHON="$venv/bin/python"
name=${venv##*/}

find_python() {
  local candidate PATH=${PATH//"$venv/bin:"/}  # its own, where it is activated, is about to be put aside
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

# Where an index of CPU builds is configured, pip takes one (2.13.0+cpu) for newer than what the lock of the CUDA packages
# names; === means a version to the letter.
take_cuda_build() {
  local log=$1 has_cuda='import sys, torch; sys.exit(3 * (torch.version.cuda is None))' exact status=0
  "$PYTHON" -c "$has_cuda" 2>>"$log" || status=$?
  if ((status == 0)); then return; fi
  if ((status != 3)); then
    tail -n 5 "$log" >&2
    echo "torch was installed and cannot be imported; see $log." >&2
    return 1
  fi
  echo "This pip has taken a CPU build of torch, which uses no card: taking the CUDA build in its place." >&2
  mapfile -t exact < <(sed -nE 's/^(torch|torchvision|torchaudio|torchcodec)==/\1===/p' "$lock")
  "$PYTHON" -m pip install --force-reinstall --no-deps --disable-pip-version-check "${exact[@]}" >>"$log" 2>&1
  status=0
  "$PYTHON" -c "$has_cuda" 2>>"$log" || status=$?
  if ((status == 0)); then return; fi
  tail -n 5 "$log" >&2
  if ((status != 3)); then
    echo "The CUDA build of torch cannot be imported; see $log." >&2
    return 1
  fi
  echo "pip finds no CUDA build of ${exact[0]}; see $log. Unset PIP_INDEX_URL and PIP_EXTRA_INDEX_URL (pip config list" >&2
  echo "shows what else is set) and start again, or take the CPU packages, which use no GPU: RLT_CPU=1 $0" >&2
  return 1
}

install_packages() {
  local python=$1 log=$2 wanted
  wanted=$(sha256sum <"$lock")  # of what is installed, though a pull may change it meanwhile
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
  if [[ $lock == */requirements.txt ]]; then take_cuda_build "$log" || return 1; fi
  echo "$wanted" >"$venv/installed-lock.part" && mv "$venv/installed-lock.part" "$venv/installed-lock"  # complete
}

is_ready() { [[ -s $venv/installed-lock && $(sha256sum <"$lock") == "$(<"$venv/installed-lock")" ]]; }

# An environment cannot be moved to where it is used, so the new one is made in place, and the one before waits beside
# it. It comes back if the new one fails, or if that was killed (then at the next launch).
bring_back() {
  if [[ -s $venv/installed-lock || ! -s $venv.old/installed-lock ]]; then return; fi
  rm -rf "$venv"
  mv "$venv.old" "$venv"
}
drop_old() { rm -rf "$venv.old/installed-lock" "$venv.old"; }  # in this order: half of it must not come back

set_up() {
  local python log="$venv.log" takes="about 3 minutes, 4 GB"
  bring_back
  if is_ready; then return; fi
  python=$(find_python) || return 1
  if [[ $lock == */requirements.txt ]]; then
    check_driver || return 1
    takes="many GB"
  fi
  local why="First use"
  if [[ -s $venv/installed-lock ]]; then why="Other packages are wanted than are there"; fi
  echo "$why: setting up $name from ${lock##*/} with $("$python" --version) ($takes; log: $log)" >&2
  drop_old
  if [[ -s $venv/installed-lock ]]; then mv "$venv" "$venv.old"; else rm -rf "$venv"; fi
  if install_packages "$python" "$log"; then return; fi
  bring_back
  if [[ -s $venv/installed-lock ]]; then
    echo "$name is again what it was before (if the disk is full, rm -r $name makes room)." >&2
  fi
  return 1
}

# Who uses the environment holds this file with others, for as long as it lives (Python inherits it); who sets it up has
# it alone. False if others are in the way. Without flock, or where it fails (some network disks), nothing is held.
held=
if command -v flock >/dev/null; then
  { exec {held}<>"$venv.in-use" || exec {held}<"$venv.in-use"; } 2>/dev/null || held=
fi
hold() { [[ -z $held ]] || flock --nonblock "$1" "$held" 2>/dev/null || (($? != 1)); }

told=
until is_ready && hold --shared && is_ready; do
  if hold --exclusive; then
    set_up || exit 1
    continue
  fi
  why="Another launch is setting up $name: waiting for it"
  if [[ -s $venv/installed-lock ]]; then
    why="A run uses $name, which ${lock##*/} would now change: waiting until it ends (fuser $venv.in-use names it;
$PYTHON $repo/train.py ... starts with what is there)"
  fi
  if [[ $why != "$told" ]]; then echo "$why" >&2; fi
  told=$why
  hold --unlock
  sleep 2
done
if [[ -e $venv.old ]]; then drop_old || true; fi
