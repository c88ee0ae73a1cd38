#!/usr/bin/env bash
# Correctness and speed on an NVIDIA GPU, in under eight minutes: needs the driver, no CUDA, and no compiler if the programs
# are there already.
#
#   scripts/gpu-check.sh [--build-only] [--only PART[,PART...]] [FOLDER]
#
# FOLDER gets results.jsonl, a table (results.txt) and the programs' own words, part by part. With --build-only the programs
# are built, stripped and left in FOLDER/bin: copy this script, scripts/gpu-peers.py and FOLDER to a machine with a GPU and
# run it there. Parts, of which the first six run unless others are named:
#
#   device     gpu_check: bytes are kept, what pages of 2 to 64 MiB cost, uploads beside a plain pinned copy
#   pool       100,000 random operations on the pool, byte by byte
#   kernels    cuda-check: every kernel against its twin, then the speed of those that matter
#   parity     gpu_serving: all families in all types of random GGUF files as on the processor; reference models (GOLDENS)
#   serving    gpu_serving: a model in the shape of Llama 3 8B, resident and cold from pinned host memory
#   switching  gpu_serving: eight models in turn under ours, the published policy, whole-model LRU and without reuse
#   files      gpu_serving: cold from the page cache; 16 GB are written to FOLDER for a while
#   peers      as files, then the same files in the loaders of others, as far as Python has them (scripts/gpu-peers.py); name
#              serving too, whose figures prefill and decoding are held against
#
# A part named alone has nine and a half minutes. Variables: SHAPES (of serving, files and peers), ROUNDS (how often kernels
# meet their twins), OPERATIONS (on the pool), SWITCHING (options of gpu_serving switching), TRACE (servegen8.csv), GOLDENS (a
# folder of models with golden.json).
set -uo pipefail

build_only=false
parts="device,pool,kernels,parity,serving,switching"
alone=false
folder=gpu-check
while [[ $# -gt 0 ]]; do
    case "$1" in
        --build-only) build_only=true ;;
        --only) parts="${2:?}" && alone=true && shift ;;
        *) folder="$1" ;;
    esac
    shift
done
here="$(cd "$(dirname "$0")" && pwd)"
mkdir -p "$folder/bin"
folder="$(cd "$folder" && pwd)"
programs=(gpu_check cuda-check gpu_serving model_based)

if [[ ! -x "$folder/bin/model_based" ]]; then
    cd "$here/.." || exit 1
    cargo build --release -p tangram-device --example gpu_check || exit 1
    cargo build --release -p tangram-engine --example cuda-check || exit 1
    cargo build --release -p tangram-node --example gpu_serving || exit 1
    for program in gpu_check cuda-check gpu_serving; do
        cp "target/release/examples/$program" "$folder/bin/" || exit 1
    done
    # With the checks of a debug build.
    built=$(cargo test -p tangram-pool --test model_based --no-run --message-format=json |
        sed -n 's/.*"name":"model_based".*"executable":"\([^"]*\)".*/\1/p' | tail -1)
    cp "${built:?no test program}" "$folder/bin/model_based" || exit 1
    for program in "${programs[@]}"; do
        strip "$folder/bin/$program" 2>/dev/null
    done
fi
$build_only && exit 0

failed=0
: > "$folder/results.jsonl"
wanted() { [[ ",$parts," == *",$1,"* ]]; }
# run NAME SECONDS COMMAND...: a program's JSON lines join the results as they come, and its end is one of them.
run() {
    local name="$1" limit="$2" started seconds status
    shift 2
    $alone && [[ "$parts" != *,* ]] && limit=570
    started=$(date +%s)
    timeout "$limit" "$@" 2> "$folder/$name.err" | tee "$folder/$name.out" | grep --line-buffered '^{' | tee -a "$folder/results.jsonl"
    status=${PIPESTATUS[0]}
    seconds=$(($(date +%s) - started))
    echo "{\"program\":\"$name\",\"status\":$status,\"seconds\":$seconds}" | tee -a "$folder/results.jsonl"
    if [[ $status -ne 0 ]]; then
        failed=1
        echo "$name failed ($status):" >&2
        tail -5 "$folder/$name.err" >&2
        grep -v '^{' "$folder/$name.out" | tail -15 >&2
    fi
}
# pool TEST OPERATIONS: random programs in one layout; passed as a finding.
pool() {
    TANGRAM_TEST_GPU=0 TANGRAM_MODEL_READS=16 TANGRAM_MODEL_OPS="$2" run "pool-$1" 90 "$folder/bin/model_based" "$1" --exact --nocapture
    local met=false
    grep -q '^test result: ok. 1 passed' "$folder/pool-$1.out" && met=true
    echo "{\"line\":1,\"goal\":\"random operations on the pool, byte by byte: $1\",\"value\":$2,\"met\":$met}" | tee -a "$folder/results.jsonl"
}

wanted device && run device 90 "$folder/bin/gpu_check"
if wanted pool; then
    operations="${OPERATIONS:-100000}"
    pool paged_with_pages_of_4_kib $((operations / 4))
    pool segment $((operations - operations / 4))
fi
wanted kernels && run kernels 120 "$folder/bin/cuda-check" "${ROUNDS:-20}"
wanted parity && run parity 60 "$folder/bin/gpu_serving" parity "$folder/models" ${GOLDENS:+"goldens=$GOLDENS"}
# shellcheck disable=SC2086 # Shapes and options are words.
{
    wanted serving && run serving 120 "$folder/bin/gpu_serving" serving "$folder/models" ${SHAPES:-}
    if wanted switching; then
        usual="requests=200 seconds=25"
        $alone && usual="requests=1000 seconds=220"
        [[ -n "${TRACE:-}" ]] && usual="$usual trace=$TRACE"
        run switching 210 "$folder/bin/gpu_serving" switching "$folder/models" $usual ${SWITCHING:-}
    fi
    keep=""
    wanted peers && keep=keep
    { wanted files || wanted peers; } && run files 200 "$folder/bin/gpu_serving" files "$folder/models" $keep ${SHAPES:-}
    if wanted peers; then
        for shape in ${SHAPES:-llama-3-8b}; do
            run "peers-$shape" 400 python3 "$here/gpu-peers.py" "$folder/models/$shape/source" "$folder/results.jsonl"
        done
    fi
}
rm -rf "$folder/models"

{
    command -v nvidia-smi > /dev/null &&
        nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader
    echo
    # A finding per line, without the marks of JSON; goals once more, together.
    grep -v '"goal"' "$folder/results.jsonl" | sed -e 's/[{}"]//g' -e 's/[,:]/  /g'
    echo
    [[ -f "$folder/kernels.out" ]] && grep -v '^{' "$folder/kernels.out"
    echo
    for line in 1 2 3 4 5 6; do
        grep "^{\"line\":$line," "$folder/results.jsonl" |
            sed -e 's/^{"line":\([0-9]\),"goal":"\(.*\)","value":\([^,]*\),\(.*\)"met":\(.*\)}$/\1  met: \5  \3  \4 \2/' -e 's/[{}"]//g'
    done
} > "$folder/results.txt"
cat "$folder/results.txt"
exit $failed
