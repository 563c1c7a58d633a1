#!/usr/bin/env bash
# Installs what tests need from the system, where that is possible: as root, on a machine with apt. Elsewhere the tests that
# need what is missing are skipped, each with its reason.
#   a C and C++ compiler   the compiled functions of the data; `compile` kernels
#   SLURM                  tests/slurm: each test starts a cluster of its own in a folder of its own, no daemon is started here
#   Chromium               the page of a study, as a browser draws it
# To be run before the package is installed, which compiles what there is a compiler for.
set -uo pipefail

packages=()
need() { # PACKAGES PROGRAM...: the packages, unless all programs are there
  local wanted=$1 program
  shift
  for program in "$@"; do
    command -v "$program" >/dev/null && continue
    # words, since one need may take several packages
    # shellcheck disable=SC2206
    packages+=($wanted)
    return
  done
}

need "gcc g++ libc6-dev" cc "${CXX:-g++}"
# torch.compile builds against the headers of the interpreter, which Debian's own Python has in a package of their own
python=$(command -v "${PYTHON:-python3}" || true)
if [ "${python%/*}" = /usr/bin ]; then
  header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include") + "/Python.h")')
  [ -e "$header" ] || packages+=("$(basename "$(readlink -f "$python")")-dev")
fi
need "slurm-wlm munge" slurmctld slurmd munged sbatch
command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || need chromium chromium

if [ ${#packages[@]} = 0 ]; then exit 0; fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "not installed, which only root on a machine with apt can do here: ${packages[*]}; tests that need them will be skipped" >&2
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
apt-get -qq update
# one that is unavailable does not keep the others away
for package in "${packages[@]}"; do
  apt-get -qq install --yes --no-install-recommends "$package" >/dev/null ||
    echo "$package could not be installed (see above); tests that need it will be skipped" >&2
done
