"""Loads safetensors files into CPU memory with one library, and prints what it took as one line of JSON.

peers.py list FILE...      the loaders that can be imported here
peers.py LOADER FILE...    loads the files; the time begins after the imports and ends when every byte is in memory
"""

import importlib.util
import json
import resource
import sys
import time


def safetensors(files):
    """Every tensor into memory of its own."""
    from safetensors import safe_open

    kept = []
    for file in files:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            # A clone, because what safe_open gives is a mapping of the file whose pages have not been read.
            kept += [tensors.get_tensor(name).clone() for name in tensors.keys()]
    return kept


def fastsafetensors(files):
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    loader = SafeTensorsFileLoader(SingleGroup(), "cpu", nogds=True)
    loader.add_filenames({0: list(files)})
    buffers = loader.copy_files_to_device()
    kept = [buffers.get_tensor(name) for name in loader.get_keys()]
    return kept, buffers, loader


def runai(files):
    from runai_model_streamer import SafetensorsStreamer

    kept = []
    with SafetensorsStreamer() as streamer:
        streamer.stream_files(list(files))
        for _, tensor in streamer.get_tensors():
            # The streamer reuses its memory.
            kept.append(tensor.clone())
    return kept


LOADERS = {
    "safetensors": (safetensors, ["safetensors", "torch"]),
    "fastsafetensors": (fastsafetensors, ["fastsafetensors", "torch"]),
    "runai streamer": (runai, ["runai_model_streamer", "torch"]),
}


def resident(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))


def main():
    what, files = sys.argv[1], sys.argv[2:]
    if what == "list":
        there = [
            name for name, (_, modules) in LOADERS.items() if all(importlib.util.find_spec(m) for m in modules)
        ]
        print(json.dumps(there))
        return
    load, modules = LOADERS[what]
    for module in modules:
        importlib.import_module(module)
    before = resident("VmRSS")
    usage = resource.getrusage(resource.RUSAGE_SELF)
    started = time.perf_counter()
    kept = load(files)
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF)
    import os

    print(
        json.dumps(
            {
                "bytes": sum(os.path.getsize(file) for file in files),
                "seconds": seconds,
                "cpu_seconds": after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime,
                "peak_bytes": resident("VmHWM") - before,
            }
        ),
        flush=True,
    )
    del kept


main()
