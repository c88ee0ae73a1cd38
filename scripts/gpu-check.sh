#!/usr/bin/env bash
# Correctness and speed on an NVIDIA GPU, in under eight minutes: needs the driver, no CUDA, and no compiler if the programs
# are there already.
#
#   scripts/gpu-check.sh [--build-only] [FOLDER]
#
# FOLDER gets results.jsonl, a table (results.txt) and the programs' own words; 20 GB are used in it for a while. With
# --build-only the programs are built, stripped and left in FOLDER/bin: copy this script and FOLDER to a machine with a
# GPU and run it there.
#
# 1. gpu_check: the device: bytes are kept, what pages cost, uploads beside a plain pinned copy.
# 2. cuda-check: every kernel against its twin, then the speed of those that matter.
# 3. gpu_serving: random models in known shapes on the whole node: cold and resident first tokens, prefill, decoding.
set -uo pipefail

build_only=false
if [[ "${1:-}" == --build-only ]]; then
    build_only=true
    shift
fi
folder="${1:-gpu-check}"
mkdir -p "$folder/bin"
folder="$(cd "$folder" && pwd)"
programs=(gpu_check cuda-check gpu_serving)

if [[ ! -x "$folder/bin/gpu_serving" ]]; then
    cd "$(dirname "$0")/.." || exit 1
    cargo build --release -p tangram-device --example gpu_check || exit 1
    cargo build --release -p tangram-engine --example cuda-check || exit 1
    cargo build --release -p tangram-node --example gpu_serving || exit 1
    for program in "${programs[@]}"; do
        cp "target/release/examples/$program" "$folder/bin/" && strip "$folder/bin/$program" 2>/dev/null
    done
fi
$build_only && exit 0

failed=0
: > "$folder/results.jsonl"
# run NAME SECONDS COMMAND...: a program's JSON lines join the results, and its end is one of them.
run() {
    local name="$1" limit="$2" started seconds status
    shift 2
    started=$(date +%s)
    timeout "$limit" "$@" > "$folder/$name.out" 2> "$folder/$name.err"
    status=$?
    seconds=$(($(date +%s) - started))
    grep '^{' "$folder/$name.out" >> "$folder/results.jsonl"
    echo "{\"program\":\"$name\",\"status\":$status,\"seconds\":$seconds}" >> "$folder/results.jsonl"
    if [[ $status -ne 0 ]]; then
        failed=1
        echo "$name failed ($status):" >&2
        tail -5 "$folder/$name.err" >&2
    fi
}

run gpu_check 90 "$folder/bin/gpu_check"
run cuda-check 150 "$folder/bin/cuda-check" "${ROUNDS:-20}"
# shellcheck disable=SC2086 # Shapes are words.
run gpu_serving 230 "$folder/bin/gpu_serving" "$folder/models" ${SHAPES:-}
rm -rf "$folder/models"

{
    command -v nvidia-smi > /dev/null &&
        nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader
    echo
    # A finding per line, without the marks of JSON.
    sed -e 's/[{}"]//g' -e 's/[,:]/  /g' "$folder/results.jsonl"
    echo
    grep -v '^{' "$folder/cuda-check.out"
} > "$folder/results.txt"
cat "$folder/results.txt"
exit $failed
