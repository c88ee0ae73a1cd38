#!/usr/bin/env python3
"""The same model in the loaders and the executor that a user would take otherwise, on GPU 0.

    scripts/gpu-peers.py MODEL [RESULTS]

MODEL is a directory with config.json and model.safetensors, in the page cache; RESULTS the lines of JSON of
`gpu_serving files` and `gpu_serving serving`, which ratios are against. Needs PyTorch, transformers and safetensors on the
machine. fastsafetensors and Run:ai's streamer are taken where they can be imported: their wheels have a few megabytes
(`pip download --no-deps fastsafetensors runai-model-streamer`), so they can be brought along. What is missing is said.

Every peer runs in a process of its own, with context and libraries up before anything is timed, as ours has; the best of
some rounds counts. Timed are: all tensors on the GPU ("load"), and from there, with the model put together, to the first
token of a prompt of 1,024 tokens ("first token", load included). transformers is timed decoding and in prefill too.
"""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

PROMPT = 1024
ROUNDS = 3
DECODED = 64
DEVICE = "cuda:0"
LOADERS = {
    "safetensors": "safetensors",
    "fastsafetensors": "fastsafetensors",
    "runai": "runai_model_streamer",
    "from_pretrained": "transformers",
}


def say(**finding):
    print(json.dumps(finding), flush=True)


def load_safetensors(path):
    from safetensors.torch import load_file

    return load_file(path, device=DEVICE)


def load_fastsafetensors(path):
    from fastsafetensors import SafeTensorsFileLoader

    # Without GPUDirect Storage: the file is in memory.
    loader = SafeTensorsFileLoader(None, DEVICE, nogds=True)
    loader.add_filenames({0: [str(path)]})
    buffers = loader.copy_files_to_device()
    return {name: buffers.get_tensor(name) for name in buffers.key_to_rank_lidx}


def load_runai(path):
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_file(str(path))
        return {name: tensor.to(DEVICE, non_blocking=True) for name, tensor in streamer.get_tensors()}


def assemble(directory, tensors):
    """A model with these tensors in the place of its own."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention())
    if config.tie_word_embeddings:
        tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    model.load_state_dict(tensors, strict=True, assign=True)
    # What is computed and in no file.
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=config).to(DEVICE)
    return model.eval()


def from_pretrained(directory):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, device_map=DEVICE, attn_implementation=attention()
    )
    return model.eval()


def attention():
    return "flash_attention_2" if importlib.util.find_spec("flash_attn") else "sdpa"


def prompt(tokens, batch=1, seed=0):
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 30_000, (batch, tokens), generator=generator).to(DEVICE)


def first_token(model, tokens, seed=0):
    return int(model(prompt(tokens, seed=seed), logits_to_keep=1).logits[0, -1].argmax())


def decode(model, batch):
    """Seconds per step of sequences that decode together, the first steps left out."""
    import torch

    output = model(prompt(16, batch), use_cache=True, logits_to_keep=1)
    cache, tokens = output.past_key_values, output.logits[:, -1:].argmax(-1)
    started = None
    for step in range(DECODED + 8):
        if step == 8:
            torch.cuda.synchronize()
            started = time.perf_counter()
        output = model(tokens, past_key_values=cache, use_cache=True)
        cache, tokens = output.past_key_values, output.logits[:, -1:].argmax(-1)
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / DECODED


def measure(peer, directory):
    """In a process of its own."""
    import gc

    import torch
    import transformers  # noqa: F401  Imported before anything is timed.

    warm = torch.randn(1024, 1024, device=DEVICE, dtype=torch.bfloat16)
    (warm @ warm).sum().item()
    path = directory / "model.safetensors"
    loads, firsts, model = [], [], None
    with torch.inference_mode():
        for round_ in range(ROUNDS):
            model = None
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.synchronize()
            started = time.perf_counter()
            if peer == "from_pretrained":
                model = from_pretrained(directory)
                torch.cuda.synchronize()
                loads.append(time.perf_counter() - started)
            else:
                tensors = globals()[f"load_{peer}"](path)
                torch.cuda.synchronize()
                loads.append(time.perf_counter() - started)
                model = assemble(directory, tensors)
                del tensors
            first_token(model, PROMPT, round_)
            firsts.append(time.perf_counter() - started)
        size = path.stat().st_size
        say(
            peer=peer, finding="load", seconds=min(loads), first_seconds=loads[0], gb_per_s=size / min(loads) / 1e9,
            first_token_seconds=min(firsts), attention=attention(),
        )
        if peer == "from_pretrained":
            resident = []
            for tokens in [PROMPT, PROMPT, PROMPT, 2 * PROMPT, 2 * PROMPT, 2 * PROMPT]:
                started = time.perf_counter()
                first_token(model, tokens, tokens)
                resident.append(time.perf_counter() - started)
            say(peer=peer, finding="resident", first_token_seconds=min(resident[:3]), prefill_2k_seconds=min(resident[3:]))
            for batch in (1, 32):
                seconds = decode(model, batch)
                say(peer=peer, finding="decoding", sequences=batch, seconds_per_step=seconds, tokens_per_second=batch / seconds)


def findings(lines):
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def ours(results):
    """Our figures: the best cold start from the page cache, prefill of 2,048 tokens, decoding."""
    found = {}
    for line in findings(results):
        value = line.get("value")
        match line.get("finding"):
            case "cold_first_token_from_page_cache":
                found["load"] = min(found.get("load", 1e9), value["load_seconds"])
                found["first_token"] = min(found.get("first_token", 1e9), value["seconds"])
            case "prefill" if value["tokens"] == 2 * PROMPT:
                found["prefill"] = value["seconds"]
            case "decoding":
                found[f"decode_{value['sequences']}"] = value["seconds_per_token"]
    return found


def goal(line, what, value, at_least):
    say(line=line, goal=what, value=value, wanted={"at_least": at_least}, met=value >= at_least)


def main():
    if sys.argv[1] == "--one":
        return measure(sys.argv[2], Path(sys.argv[3]))
    directory = Path(sys.argv[1])
    if importlib.util.find_spec("torch") is None:
        say(peer="all", left_out="there is no PyTorch on this machine")
        return
    our = ours(Path(sys.argv[2]).read_text().splitlines()) if len(sys.argv) > 2 else {}
    for peer, module in LOADERS.items():
        if importlib.util.find_spec(module) is None:
            say(peer=peer, left_out=f"the module {module} is not on this machine")
            continue
        run = subprocess.run(
            [sys.executable, __file__, "--one", peer, str(directory)], capture_output=True, text=True, timeout=240
        )
        print(run.stdout, end="", flush=True)
        if run.returncode != 0:
            say(peer=peer, left_out="it failed", why=run.stderr.strip().splitlines()[-1:])
        for line in findings(run.stdout.splitlines()):
            match line["finding"]:
                case "load" if "load" in our:
                    say(
                        peer=peer, finding="beside ours", load=line["seconds"] / our["load"],
                        first_token=line["first_token_seconds"] / our["first_token"],
                    )
                case "resident" if "prefill" in our:
                    goal(6, "prefill of 2,048 tokens: transformers / ours", line["prefill_2k_seconds"] / our["prefill"], 1.5)
                case "decoding" if f"decode_{line['sequences']}" in our:
                    ratio = line["seconds_per_step"] / our[f"decode_{line['sequences']}"]
                    if line["sequences"] == 32:
                        goal(6, "decoding of 32 sequences: transformers / ours", ratio, 1.5)
                    else:
                        say(peer=peer, finding="beside ours", decoding_of_one_sequence=ratio)


if __name__ == "__main__":
    main()
