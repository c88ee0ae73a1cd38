#!/bin/sh
# Everything that docs/measurements/2026-11-cpu-speed.md reports: `bench/llama/run.sh SMOLLM2.gguf DIR`. Writes the random
# models into DIR if they are not there, then idle.json and busy.json beside them. About ten minutes on a quiet machine.
set -eu
smollm2=$(realpath "$1")
mkdir -p "$2"
dir=$(realpath "$2")
cd "$(dirname "$0")"
cargo build --release
run() { cargo run --release --quiet -- "$@"; }
[ -f "$dir/qwen2-0.5b.q4_k_m.gguf" ] || run make "$dir"
set -- "$smollm2" "$dir/qwen2-0.5b.bf16.gguf" "$dir/qwen2-0.5b.q8_0.gguf" "$dir/qwen2-0.5b.q4_k_m.gguf"
run compare "$smollm2" --rounds 1 --text text.txt,../../LICENSE
run compare "$@" --json "$dir/idle.json"
run compare "$@" --busy 2 --json "$dir/busy.json"
