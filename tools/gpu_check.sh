#!/bin/sh
# Checks the CUDA path in one command: versions, GPU tests, every system, speed and memory.
# `sh tools/gpu_check.sh --help` lists the options.
set -u

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}
device=cuda
output=output/gpu_check
budget=360
only=
# Each part with its time limit in seconds, the most important part first.
limits="versions:60 tests:120 attention:60 faster_rcnn:150 network:90 systems:150 steps:90
inference:60 profile:60 ddp:60 checkpoint:90 compiled:150"
export GPU_CHECK_COMMAND="sh tools/gpu_check.sh${*:+ $*}"

usage() {
    echo "usage: [PYTHON=python] sh tools/gpu_check.sh [--only PART]... [--device cuda|cpu]"
    echo "           [--budget SECONDS] [--output FOLDER]"
    echo "Checks that everything runs on a GPU, and measures it, in about six minutes. FOLDER"
    echo "(output/gpu_check) gets results.jsonl, with a line for each measurement, and log.txt."
    echo "Parts end, or are left out, when the seconds (360) are over. The exit status is 1 if a"
    echo "part failed or was left out. --device cpu tries the parts out, small."
    echo "python tools/gpu_check.py --report writes docs/gpu.md from the folder."
    echo "Parts, in this order:"
    for each in $limits; do
        echo "    ${each%:*} (at most ${each#*:} s)"
    done
}

fail() {
    echo "error: $1" >&2
    exit 1
}

while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) usage && exit ;;
        --only | --device | --output | --budget) [ $# -gt 1 ] || fail "$1 needs a value" ;;
        *) fail "unknown option $1: --help lists them" ;;
    esac
    case $1 in
        --only)
            case " $(echo $limits) " in *" $2:"*) ;; *) fail "no part $2: --help lists them" ;; esac
            only="$only $2 "
            ;;
        --device) device=$2 ;;
        --output) output=$2 ;;
        --budget)
            case $2 in '' | *[!0-9]*) fail "--budget is a number of seconds, not $2" ;; esac
            budget=$2
            ;;
    esac
    shift 2
done
case $device in
    cuda) ;;
    cpu) export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" ;;
    *) fail "--device is cuda or cpu, not $device" ;;
esac

mkdir -p "$output" || exit 1
results=$output/results.jsonl
log=$output/log.txt
: >"$results" && : >"$log" || exit 1
export PYTHONUNBUFFERED=1
export PYTHONPATH="$root:$root/projects/ConTNet:$root/tests${PYTHONPATH:+:$PYTHONPATH}"
# Data loader workers pass images on as open files.
ulimit -n 65536 2>/dev/null || ulimit -n "$(ulimit -Hn)"
status=0
pid=
trap '[ -z "$pid" ] || kill "$pid" 2>/dev/null' EXIT
trap 'exit 130' HUP INT TERM
begin=$(date +%s)

for each in $limits; do
    part=${each%:*}
    limit=${each#*:}
    case ${only:-" $part "} in *" $part "*) ;; *) continue ;; esac
    figures=$output/$part.figures
    rm -f "$figures"
    start=$(date +%s)
    left=$((begin + budget - start))
    ended=ok
    if [ $left -lt 10 ]; then
        ended="left out"
    else
        [ $device = cuda ] || limit=$((limit * 3))
        [ $limit -lt $left ] || limit=$left
        echo "=== $part" >>"$log"
        timeout -k 10 "$limit" "$python" -m benchmarks.gpu_check "$part" \
            --device "$device" --output "$output" >>"$log" 2>&1 &
        pid=$!
        wait "$pid" || ended=failed
        pid=
    fi
    seconds=$(($(date +%s) - start))
    [ "$ended" = ok ] || status=1
    [ "$ended" != failed ] || [ $seconds -lt "$limit" ] || ended="timed out"
    [ -s "$figures" ] || echo "{}" >"$figures"
    sed "s/.*/{\"part\": \"$part\", \"status\": \"$ended\", \"seconds\": $seconds, \"figures\": &}/" \
        "$figures" >>"$results"
    rm "$figures"
    echo "$part: $ended, $seconds s"
    case $ended in failed | "timed out") echo "    $(tail -n 1 "$log")" ;; esac
done
exit $status
