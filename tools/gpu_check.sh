#!/bin/sh
# Proves the CUDA path in one call: versions, the tests for a GPU, every system, speed and memory.
# `sh tools/gpu_check.sh --help` lists the options.
set -u

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}
device=cuda
output=output/gpu_check
only=
# Each part with the most seconds that it may take.
limits="versions:60 tests:150 faster_rcnn_fp32:150 faster_rcnn_bf16:150 mask_rcnn:60 retinanet:60
fcos:60 pspnet:60 cityscapes_mask_rcnn:60 classifier:60 network:90"

usage() {
    echo "usage: [PYTHON=python] sh tools/gpu_check.sh [--only PART]... [--device cuda|cpu]"
    echo "           [--output FOLDER]"
    echo "Checks that everything runs on a GPU, and measures it, in about six minutes. FOLDER"
    echo "(output/gpu_check) gets results.jsonl, with a line for each measurement, and the log of"
    echo "each part. The exit status is 1 if a part failed. --device cpu tries the parts out, small."
    echo "Parts:"
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
        --only | --device | --output) [ $# -gt 1 ] || fail "$1 needs a value" ;;
        *) fail "unknown option $1: --help lists them" ;;
    esac
    case $1 in
        --only)
            case " $(echo $limits) " in *" $2:"*) ;; *) fail "no part $2: --help lists them" ;; esac
            only="$only $2 "
            ;;
        --device) device=$2 ;;
        --output) output=$2 ;;
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
: >"$results" || exit 1
export PYTHONUNBUFFERED=1
export PYTHONPATH="$root:$root/projects/ConTNet:$root/tests${PYTHONPATH:+:$PYTHONPATH}"
# Workers that load images pass them on as open files.
ulimit -n 65536 2>/dev/null || ulimit -n "$(ulimit -Hn)"
status=0
pid=
trap '[ -z "$pid" ] || kill "$pid" 2>/dev/null' EXIT
trap 'exit 130' HUP INT TERM

for each in $limits; do
    part=${each%:*}
    limit=${each#*:}
    [ $device = cuda ] || limit=$((limit * 3))
    case ${only:-" $part "} in *" $part "*) ;; *) continue ;; esac
    figures=$output/$part.figures
    rm -f "$figures"
    start=$(date +%s)
    timeout -k 10 "$limit" "$python" -m benchmarks.gpu_check "$part" \
        --device "$device" --output "$output" >"$output/$part.log" 2>&1 &
    pid=$!
    ended=ok
    wait "$pid" || ended=failed
    pid=
    seconds=$(($(date +%s) - start))
    [ $ended = ok ] || status=1
    [ $ended = ok ] || [ $seconds -lt "$limit" ] || ended="timed out"
    [ -s "$figures" ] || echo "{}" >"$figures"
    sed "s/.*/{\"part\": \"$part\", \"status\": \"$ended\", \"seconds\": $seconds, \"figures\": &}/" \
        "$figures" >>"$results"
    rm "$figures"
    echo "$part: $ended, $seconds s"
    [ "$ended" = ok ] || echo "    $(tail -n 1 "$output/$part.log")"
done
exit $status
