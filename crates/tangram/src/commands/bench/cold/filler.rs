//! A model that is nothing but large: of zeros, which take no room on the disk. Each tensor begins with its number, or all
//! of a shape would be one.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::{Map, json};

const HIDDEN: u64 = 1024;
const VOCAB: u64 = 64;
/// Bytes of a layer, about.
const LAYER_BYTES: u64 = 256 << 20;
/// For what is not in the large matrices, and for keys and values.
const SLACK_PER_LAYER: u64 = 1 << 20;

/// Writes a checkpoint of `bytes` or somewhat less, as Hugging Face lays it out.
pub(super) fn write(dir: &Path, bytes: u64) -> anyhow::Result<()> {
    fs::create_dir_all(dir)?;
    let layers = bytes.div_ceil(LAYER_BYTES);
    let attention = (2 * HIDDEN + HIDDEN / 8) * HIDDEN * 2;
    let room = (bytes / layers).saturating_sub(attention + SLACK_PER_LAYER);
    let intermediate = (room / (3 * HIDDEN * 2) / 64 * 64).max(64);
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": 16, "num_key_value_heads": 1, "max_position_embeddings": 64, "rope_theta": 1e4,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16",
    });
    fs::write(dir.join("config.json"), config.to_string())?;
    let (mut header, mut starts, mut end) = (Map::new(), Vec::new(), 0);
    let mut add = |name: &str, shape: &[u64]| {
        let start = end;
        starts.push(start);
        end += 2 * shape.iter().product::<u64>();
        header.insert(
            name.to_owned(),
            json!({ "dtype": "BF16", "shape": shape, "data_offsets": [start, end] }),
        );
    };
    add("model.embed_tokens.weight", &[VOCAB, HIDDEN]);
    add("model.norm.weight", &[HIDDEN]);
    for layer in 0..layers {
        let mut add = |name: &str, shape: &[u64]| add(&format!("model.layers.{layer}.{name}.weight"), shape);
        add("input_layernorm", &[HIDDEN]);
        add("post_attention_layernorm", &[HIDDEN]);
        add("self_attn.q_proj", &[HIDDEN, HIDDEN]);
        add("self_attn.k_proj", &[HIDDEN / 16, HIDDEN]);
        add("self_attn.v_proj", &[HIDDEN / 16, HIDDEN]);
        add("self_attn.o_proj", &[HIDDEN, HIDDEN]);
        add("mlp.gate_proj", &[intermediate, HIDDEN]);
        add("mlp.up_proj", &[intermediate, HIDDEN]);
        add("mlp.down_proj", &[HIDDEN, intermediate]);
    }
    let header = serde_json::to_vec(&header)?;
    let mut file = File::create(dir.join("model.safetensors"))?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    let data = 8 + header.len() as u64;
    for (number, start) in (1u64..).zip(starts) {
        file.write_all_at(&number.to_le_bytes(), data + start)?;
    }
    Ok(file.set_len(data + end)?)
}
