"""Writes a random bf16 checkpoint of about GIB gibibytes with the shapes of a Llama of that size: checkpoint.py DIR GIB"""

import json
import os
import struct
import sys

HIDDEN, INTERMEDIATE, VOCAB, HEADS = 2048, 8192, 32000, 32


def tensors(layers):
    yield "model.embed_tokens.weight", [VOCAB, HIDDEN]
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name in "qkvo":
            yield at + f"self_attn.{name}_proj.weight", [HIDDEN, HIDDEN]
        yield at + "mlp.gate_proj.weight", [INTERMEDIATE, HIDDEN]
        yield at + "mlp.up_proj.weight", [INTERMEDIATE, HIDDEN]
        yield at + "mlp.down_proj.weight", [HIDDEN, INTERMEDIATE]
        yield at + "input_layernorm.weight", [HIDDEN]
        yield at + "post_attention_layernorm.weight", [HIDDEN]
    yield "model.norm.weight", [HIDDEN]
    yield "lm_head.weight", [VOCAB, HIDDEN]


def size(shape):
    count = 2
    for dim in shape:
        count *= dim
    return count


def main():
    target, gib = sys.argv[1], float(sys.argv[2])
    ends = 2 * size([VOCAB, HIDDEN])
    layer = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE + 2 * HIDDEN)
    layers = max(1, round((gib * 2**30 - ends) / layer))
    os.makedirs(target, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    with open(os.path.join(target, "config.json"), "w") as file:
        json.dump(config, file)
    header, at = {}, 0
    for name, shape in tensors(layers):
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size(shape)]}
        at += size(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(os.path.join(target, "model.safetensors"), "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        while at > 0:
            file.write(os.urandom(min(at, 16 << 20)))
            at -= min(at, 16 << 20)
        os.fsync(file.fileno())


main()
