#!/usr/bin/env python3
"""llama.cpp's server out of the Python package xllamacpp, with those of llama-server's flags that throughput.sh uses."""

import argparse
import signal

import xllamacpp

parser = argparse.ArgumentParser()
parser.add_argument("-m", required=True)
parser.add_argument("--host", default="127.0.0.1")
parser.add_argument("--port", type=int, required=True)
parser.add_argument("-t", type=int, required=True)
parser.add_argument("-np", type=int, default=1)
parser.add_argument("-c", type=int, default=4096)
parser.add_argument("--cache-ram", type=int, default=0)
flags = parser.parse_args()

params = xllamacpp.CommonParams()
params.model.path = flags.m
params.hostnames = [flags.host]
params.port = flags.port
params.cpuparams.n_threads = flags.t
params.cpuparams_batch.n_threads = flags.t
params.n_parallel = flags.np
params.n_ctx = flags.c
params.cache_ram_mib = flags.cache_ram

signal.signal(signal.SIGTERM, lambda *_: exit(0))
server = xllamacpp.Server(params)
print(f"serves on {server.listening_address}", flush=True)
signal.pause()
