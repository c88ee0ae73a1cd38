#!/usr/bin/env bash
# Compiles the CUDA kernels (crates/engine/kernels/cuda) for every GPU that is served and writes what the engine embeds:
# cuda.fatbin, compressed machine code with PTX for newer GPUs, and cuda.sums, the hashes of the sources that it came
# from. Needs no GPU; the compiler comes from PyPI. Takes minutes.
#
#   scripts/cuda-kernels.sh [--check] [FOLDER]
#
# FOLDER holds the compiler (about 300 MB; a temporary one if not given). With --check nothing is written: the outcome
# is compared with what is committed.
set -euo pipefail
cd "$(dirname "$0")/../crates/engine/kernels"

check=false
if [[ "${1:-}" == --check ]]; then
    check=true
    shift
fi
folder="${1:-}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
folder="${folder:-$work}"

# All of one release: left alone, pip takes a newer code generator than the compiler knows.
version="13.0.*"
if [[ ! -x "$folder/nvcc/bin/python" ]]; then
    python3 -m venv "$folder/nvcc"
    "$folder/nvcc/bin/python" -m pip install --quiet --disable-pip-version-check \
        "nvidia-cuda-nvcc==$version" "nvidia-nvvm==$version" "nvidia-cuda-crt==$version" \
        "nvidia-cuda-runtime==$version" "nvidia-cuda-cccl==$version"
fi
nvcc="$(find "$folder/nvcc" -path '*/bin/nvcc' -type f | head -n 1)"

flags=(-std=c++17 -O3 -fmad=false -fatbin -Xfatbin=-compress-all --compress-mode=size)
# One intermediate code for all: nothing in the sources is for newer GPUs only.
flags+=("-gencode=arch=compute_80,code=[sm_80,sm_86,sm_89,sm_90,sm_100,sm_120,compute_80]")
"$nvcc" "${flags[@]}" cuda/all.cu -o "$work/cuda.fatbin"

{
    echo "# $("$nvcc" --version | grep -o 'V[0-9][0-9.]*') ${flags[*]}"
    sha256sum cuda/*.cu cuda/*.cuh
    (cd "$work" && sha256sum cuda.fatbin)
} > "$work/cuda.sums"

if $check; then
    cmp "$work/cuda.fatbin" cuda.fatbin
    cmp "$work/cuda.sums" cuda.sums
    echo "what is committed comes from these sources"
else
    cp "$work/cuda.fatbin" "$work/cuda.sums" .
    ls -l cuda.fatbin
fi
