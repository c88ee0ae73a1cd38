#!/bin/sh
# Builds a fuzz target with the coverage that libFuzzer needs, on a stable compiler, and runs it:
# run.sh TARGET [options of libFuzzer]
set -eu
cd "$(dirname "$0")"
target=$1
shift
host=$(rustc -vV | sed -n 's/^host: //p')
coverage="-Cpasses=sancov-module"
for option in level=4 inline-8bit-counters pc-table trace-compares; do
    coverage="$coverage -Cllvm-args=-sanitizer-coverage-$option"
done
# With --target the flags are not those of build scripts, which know nothing of libFuzzer.
RUSTFLAGS="--cfg fuzzing $coverage -Clink-dead-code" cargo build --release --target "$host" --bin "$target"
mkdir -p "found/$target"
exec "target/$host/release/$target" "found/$target" "corpus/$target" \
    -rss_limit_mb=512 -max_len=16384 -artifact_prefix="found/$target-" "$@"
