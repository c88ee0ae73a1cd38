"""Trains the example adapter: SmolLM2-135M-Instruct answers as a ship's log.

    pip install 'torch>=2.2' numpy gguf tokenizers safetensors
    python train.py SmolLM2-135M-Instruct.Q4_1.gguf log.jsonl OUT_DIR

The base is the GGUF file itself, dequantised, so that the adapter is trained on the very weights that are served.
Plain torch: the forward pass of a Llama in f32, low-rank updates on query and value, loss on the answers only.
Writes a PEFT directory (adapter_config.json, adapter_model.safetensors).
"""

import json
import math
import pathlib
import sys

import gguf
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

RANK, ALPHA = 4, 16
EPOCHS, BATCH, RATE = 4, 4, 3e-3
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def field(reader, name):
    return reader.fields[name].contents()


def tokenizer(reader):
    tokens = field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field(reader, "tokenizer.ggml.merges")]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    made.decoder = decoders.ByteLevel()
    kinds = field(reader, "tokenizer.ggml.token_type")
    made.add_special_tokens([token for token, kind in zip(tokens, kinds) if kind == 3])
    return made


class Base:
    """The frozen model: weights by their GGUF names."""

    def __init__(self, reader):
        key = lambda name: field(reader, f"llama.{name}")
        self.layers, self.heads = key("block_count"), key("attention.head_count")
        self.kv_heads, self.hidden = key("attention.head_count_kv"), key("embedding_length")
        self.head_dim = self.hidden // self.heads
        self.epsilon, self.theta = key("attention.layer_norm_rms_epsilon"), key("rope.freq_base")
        self.weights = {}
        for tensor in reader.tensors:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            values = torch.from_numpy(values.astype("float32")).reshape(tuple(reversed(tensor.shape.tolist())))
            # GGUF keeps the rotary pairs of llama side by side; the Hugging Face order, which adapters are in, does not.
            if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
                rows, columns = values.shape
                values = values.view(rows // self.head_dim, self.head_dim // 2, 2, columns)
                values = values.transpose(1, 2).reshape(rows, columns)
            self.weights[tensor.name] = values.contiguous()

    def norm(self, x, name):
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return x * scale * self.weights[name]

    def forward(self, ids, adapter):
        """Logits of a batch of token ids [batch, tokens]."""
        batch, length = ids.shape
        x = F.embedding(ids, self.weights["token_embd.weight"])
        half = self.head_dim // 2
        frequency = 1.0 / self.theta ** (torch.arange(half) * 2.0 / self.head_dim)
        angle = torch.arange(length)[:, None] * frequency
        cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
        rotate = lambda t: t * cos + torch.cat([-t[..., half:], t[..., :half]], -1) * sin
        split = lambda t: t.view(batch, length, -1, self.head_dim).transpose(1, 2)
        for layer in range(self.layers):
            weight = lambda name: self.weights[f"blk.{layer}.{name}.weight"]
            h = self.norm(x, f"blk.{layer}.attn_norm.weight")
            q = rotate(split(h @ weight("attn_q").T + adapter(layer, "q_proj", h)))
            k = rotate(split(h @ weight("attn_k").T))
            v = split(h @ weight("attn_v").T + adapter(layer, "v_proj", h))
            groups = self.heads // self.kv_heads
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + out.transpose(1, 2).reshape(batch, length, -1) @ weight("attn_output").T
            h = self.norm(x, f"blk.{layer}.ffn_norm.weight")
            x = x + (F.silu(h @ weight("ffn_gate").T) * (h @ weight("ffn_up").T)) @ weight("ffn_down").T
        return self.norm(x, "output_norm.weight") @ self.weights["token_embd.weight"].T


class Adapter:
    """The trained part."""

    def __init__(self, base):
        widths = {"q_proj": base.hidden, "v_proj": base.kv_heads * base.head_dim}
        self.parameters = {}
        for layer in range(base.layers):
            for module, width in widths.items():
                a = torch.randn(RANK, base.hidden) / math.sqrt(base.hidden)
                self.parameters[layer, module] = [a.requires_grad_(), torch.zeros(width, RANK, requires_grad=True)]

    def __call__(self, layer, module, x):
        a, b = self.parameters[layer, module]
        return (x @ a.T @ b.T) * (ALPHA / RANK)

    def save(self, directory):
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for (layer, module), (a, b) in self.parameters.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = a.detach().to(torch.bfloat16).contiguous()
            tensors[f"{name}.lora_B.weight"] = b.detach().to(torch.bfloat16).contiguous()
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "r": RANK,
            "lora_alpha": ALPHA,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": ["q_proj", "v_proj"],
            "inference_mode": True,
        }
        (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def examples(lines, encode):
    """Token ids and, for each, whether it is part of the answer."""
    for line in lines:
        pair = json.loads(line)
        prompt = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{pair['user']}<|im_end|>\n"
        prompt = encode(prompt + "<|im_start|>assistant\n")
        answer = encode(f"{pair['assistant']}<|im_end|>\n")
        yield prompt + answer, [False] * len(prompt) + [True] * len(answer)


def main():
    model_path, lines_path, out = sys.argv[1:4]
    torch.manual_seed(1)
    reader = gguf.GGUFReader(model_path)
    base, coder = Base(reader), tokenizer(reader)
    encode = lambda text: coder.encode(text, add_special_tokens=False).ids
    lines = pathlib.Path(lines_path).read_text().splitlines()
    data = list(examples(lines, encode))
    adapter = Adapter(base)
    trained = [tensor for pair in adapter.parameters.values() for tensor in pair]
    optimiser = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    steps = EPOCHS * math.ceil(len(data) / BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / 5) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    step = 0
    for epoch in range(EPOCHS):
        order = torch.randperm(len(data)).tolist()
        for start in range(0, len(data), BATCH):
            chosen = [data[i] for i in order[start : start + BATCH]]
            longest = max(len(ids) for ids, _ in chosen)
            pad = lambda values, filler: values + [filler] * (longest - len(values))
            ids = torch.tensor([pad(ids, 0) for ids, _ in chosen])
            counted = torch.tensor([pad(mask, False) for _, mask in chosen])[:, 1:]
            logits = base.forward(ids, adapter)[:, :-1]
            loss = F.cross_entropy(logits[counted], ids[:, 1:][counted])
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            schedule.step()
            step += 1
            print(f"epoch {epoch} step {step}/{steps} loss {loss.item():.4f}", flush=True)
    adapter.save(pathlib.Path(out))


if __name__ == "__main__":
    main()
