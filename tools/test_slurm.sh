#!/bin/sh
# Runs the tests marked slurm on three private clusters in parallel; $1 is the pytest command.
# As root, it installs SLURM if it is missing (Debian's packages), and fails if it cannot.
set -u
pytest=$1
export PATH="$PATH:/usr/sbin:/sbin"
packages="slurmctld slurmd slurm-client munge"

installed() {
    for program in slurmctld slurmd srun munged; do
        command -v "$program" >/dev/null || return 1
    done
}

install() {
    command -v apt-get >/dev/null || { echo "no apt-get: install SLURM and munge" >&2; return 1; }
    export DEBIAN_FRONTEND=noninteractive
    # shellcheck disable=SC2086
    apt-get install -y -qq --no-install-recommends $packages >/dev/null 2>&1 && return
    apt-get update -qq && apt-get install -y -qq --no-install-recommends $packages >/dev/null
}

if ! installed && [ "$(id -u)" = 0 ]; then
    install && installed || { echo "error: SLURM cannot be installed ($packages)" >&2; exit 1; }
fi
installed || echo "SLURM is missing: as root, apt-get install --no-install-recommends $packages"

# The tests mostly wait for SLURM, so three clusters fit on two cores; the longest test starts first.
exec "$pytest" -m slurm -n 3 --dist worksteal \
    tests/slurm/test_signals.py tests/slurm/test_failures.py tests/slurm/test_command.py
