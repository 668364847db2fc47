#!/bin/sh
# Runs tests/slurm on two private clusters in parallel; $1 is the pytest command.
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

logs=$(mktemp -d)
pids=
# The tests end with this script; each cluster's guardian then stops the cluster.
trap 'kill $pids 2>/dev/null; rm -rf "$logs"' EXIT
trap 'exit 130' HUP INT TERM
status=0

half() {
    log=$logs/$1
    shift
    "$pytest" -m slurm --no-header "$@" >"$log" 2>&1 &
    pids="$pids $!"
}

half signals tests/slurm/test_signals.py tests/slurm/test_command.py
half failures tests/slurm/test_failures.py
for pid in $pids; do
    wait "$pid" || status=$?
done
pids=
cat "$logs/signals" "$logs/failures"
for part in signals failures; do
    echo "SLURM tests, $part: $(tail -n 1 "$logs/$part" | tr -d =)"
    grep -h "^SKIPPED" "$logs/$part"
done
exit "$status"
