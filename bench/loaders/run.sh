#!/bin/sh
# Measures loading beside other loaders: run.sh WORKDIR [GIB]
# Makes a random checkpoint of GIB (2) gibibytes and a Python environment in WORKDIR, which must be on the disk that is to
# be measured and needs about three times the room; builds tangram; prints the table and leaves load.json and load.svg.
# What the other loaders need (torch among it) comes from PyPI; without it only tangram is measured.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=${1:?usage: run.sh WORKDIR [GIB]}
gib=${2:-2}
mkdir -p "$work"
[ -f "$work/checkpoint/config.json" ] || python3 "$here/checkpoint.py" "$work/checkpoint" "$gib"
peers=
if [ ! -x "$work/venv/bin/python" ]; then
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet torch safetensors fastsafetensors runai-model-streamer ||
        echo "not all loaders could be installed" >&2
fi
if "$work/venv/bin/python" -c 'import torch' 2>/dev/null; then
    peers="--peers $work/venv/bin/python"
fi
(cd "$here/../.." && cargo build --release --package tangram)
tangram=$here/../../target/release/tangram
# shellcheck disable=SC2086
"$tangram" bench load "$work/checkpoint" --scratch "$work" --rounds "${ROUNDS:-5}" $peers \
    --svg "$work/load.svg" --json >"$work/load.json"
python3 - "$work/load.json" <<'PYTHON'
import json, sys

report = json.load(open(sys.argv[1]))
for row in report["rows"]:
    peak = row["peak_bytes"]
    print(
        f'{row["name"]:28} {row["bytes_per_second"] / 1e9:7.2f} GB/s {row["share"]:6.1%} of limit '
        f'{row["cpu_seconds_per_gib"]:6.3f} CPU s/GiB  {"-" if peak is None else f"{peak / 2**20:.0f} MiB"}'
    )
print("16 loads over one:", report["many_over_one"], " urgent among prefetches:", report["urgent_slowdown"])
PYTHON
