#!/bin/bash
# A whole Tangram server beside a whole llama.cpp server on the same GGUF file and the same cores, taking turns:
#
#   bench/servers/throughput.sh MODEL.gguf DIR [FLAGS OF tangram bench serve...]
#
# Installs the peer into DIR (PEER=built, the default; PEER=prebuilt; or PEER=/path/to/llama-server), starts both
# servers, measures 1, 4 and 16 streams, prints a table and writes DIR/throughput.json, and stops them. CORES=0,1 are
# the cores of both; the client runs wherever there is room. PEER_FLAGS are added to the peer's. TANGRAM=/path/to/tangram
# takes that program instead of building one.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,/^set/{/^#/p}' "$0" >&2; exit 2; }
model=$(realpath "$1")
DIR=$2
PEER=${PEER:-built}
shift 2
# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"
choose_peer

# As many tokens per stream as both servers need for 16 streams of the default lengths, and room to raise them.
context=${CONTEXT:-1024}
data=$DIR/data-throughput
rm -rf "$data"
"$tangram" deploy model "$model" --data "$data" --device-memory "${MEMORY:-4GiB}" --threads "$threads"
start "$DIR/tangram.log" "$tangram" serve --data "$data" --listen "${ours#http://}" \
    --device-memory "${MEMORY:-4GiB}" --threads "$threads"
# The peer keeps no prompts of requests that are over: none comes again.
# shellcheck disable=SC2086
start "$DIR/peer.log" "${peer[@]}" -m "$model" --host 127.0.0.1 --port "${theirs##*:}" -t "$threads" -np 16 \
    -c $((16 * context)) --cache-ram 0 ${PEER_FLAGS:-}
wait_for "$ours" "$DIR/tangram.log"
wait_for "$theirs" "$DIR/peer.log"
"$tangram" bench serve --url "$ours" --against "$theirs" --model model --save "$DIR/throughput.json" "$@"
