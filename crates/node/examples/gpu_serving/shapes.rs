//! Random decoders in the shapes of known models, all of Llama's family: what else these models have takes a thousandth of
//! their bytes.
//!
//! Either as a checkpoint with its bytes on disk ([`write`]), or only described ([`describe`]): deployed in a data directory
//! whose files are holes, for nodes whose weights come from elsewhere ([`tangram_node::Trial`]).

use std::error::Error;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rand::rngs::Xoshiro256PlusPlus;
use rand::{Rng, SeedableRng};
use redb::{Database, TableDefinition};
use serde_json::{Value, json};
use tangram_checkpoint::{
    CHUNK_BYTES, Checksum, DATA_FILE, Hash, MANIFEST_FILE, Manifest, Source, TensorEntry,
};
use tangram_node::Fill;

/// A decoder of Llama's family.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) name: &'static str,
    pub(crate) hidden: usize,
    pub(crate) intermediate: usize,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) vocab: usize,
    /// Whether the head is the embedding.
    pub(crate) tied: bool,
}

const fn shape(name: &'static str, sizes: [usize; 7], tied: bool) -> Shape {
    let [hidden, intermediate, layers, heads, kv_heads, head_dim, vocab] = sizes;
    Shape { name, hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, tied }
}

/// For trying the programs out where there is only the stand-in of the driver. Its token embedding is just large enough to
/// come last.
pub(crate) const TINY: Shape = shape("tiny", [64, 96, 2, 4, 2, 16, 8192], false);

/// Shapes that can be named.
pub(crate) const SHAPES: [Shape; 4] = [
    TINY,
    shape("llama-3.2-1b", [2048, 8192, 16, 32, 8, 64, 128_256], true),
    shape("llama-3-8b", [4096, 14_336, 32, 32, 8, 128, 128_256], false),
    shape("qwen2-14b", [5120, 13_824, 48, 40, 8, 128, 152_064], false),
];

/// The models of the switching run, in the order of the trace's numbers: 6.2, 7.6, 16.1, 17.7, 29.5, 41.1, 14.1 and
/// 29.5 GB. The vision tower of the seventh is in its layers' products, and so are the biases and the two large matrices
/// per layer (here three, of as many bytes) of the sixth.
pub(crate) const EIGHT: [Shape; 8] = [
    shape("qwen2-3b", [2048, 11_008, 36, 16, 2, 128, 151_936], true),
    shape("phi3-mini", [3072, 8192, 32, 32, 32, 96, 32_064], false),
    shape("llama3-8b", [4096, 14_336, 32, 32, 8, 128, 128_256], false),
    shape("yi-9b", [4096, 11_008, 48, 32, 4, 128, 64_000], false),
    shape("qwen2-14b", [5120, 13_824, 48, 40, 8, 128, 152_064], false),
    shape("gpt-20b", [6144, 16_384, 44, 64, 64, 96, 50_432], false),
    shape("llava-7b", [4096, 11_832, 32, 32, 32, 128, 32_064], false),
    shape("r1-14b", [5120, 13_824, 48, 40, 8, 128, 152_064], false),
];

/// As [`EIGHT`], of some megabytes, in about the same proportions.
pub(crate) const EIGHT_TINY: [Shape; 8] = [
    shape("qwen2-3b", [64, 96, 2, 4, 2, 16, 9_000], true),
    shape("phi3-mini", [64, 96, 2, 4, 4, 16, 6_000], false),
    shape("llama3-8b", [64, 96, 2, 4, 2, 16, 12_000], false),
    shape("yi-9b", [64, 96, 2, 4, 1, 16, 13_000], false),
    shape("qwen2-14b", [64, 96, 2, 4, 2, 16, 22_000], false),
    shape("gpt-20b", [64, 96, 2, 4, 4, 16, 31_000], false),
    shape("llava-7b", [64, 96, 2, 4, 4, 16, 10_000], false),
    shape("r1-14b", [64, 96, 2, 4, 2, 16, 22_000], false),
];

impl Shape {
    /// The shape of this name.
    pub(crate) fn named(name: &str) -> Result<Shape, String> {
        let found = SHAPES.into_iter().find(|shape| shape.name == name);
        found.ok_or_else(|| format!("there is no shape '{name}'"))
    }

    /// The same with a sixteenth of the width and the vocabulary, so a 256th of the bytes: for trying out policies.
    pub(crate) fn sixteenth(self) -> Shape {
        let Shape { hidden, intermediate, heads, kv_heads, head_dim, vocab, .. } = self;
        // Heads have a multiple of eight elements, so some models have fewer.
        let heads_of = |heads: usize| heads * head_dim / 16 / 8;
        Shape {
            hidden: hidden / 16,
            intermediate: intermediate / 16 / 8 * 8,
            heads: heads_of(heads),
            kv_heads: heads_of(kv_heads),
            head_dim: 8,
            vocab: vocab / 16,
            ..self
        }
    }

    /// Whether it is one for trying out.
    pub(crate) fn is_tiny(&self) -> bool {
        self.hidden < 512
    }

    /// Longest sequence.
    pub(crate) fn context(&self) -> usize {
        if self.is_tiny() { 512 } else { 32_768 }
    }

    /// Bytes of the weights.
    pub(crate) fn bytes(&self) -> u64 {
        self.tensors().iter().map(|(_, shape)| bytes_of(shape)).sum()
    }

    /// Bytes of the largest tensor.
    pub(crate) fn largest(&self) -> u64 {
        (self.vocab * self.hidden).max(self.intermediate * self.hidden) as u64 * 2
    }

    /// Operations of a pass over so many tokens after none, in the products: twice the weights that are no table.
    pub(crate) fn operations(&self, tokens: usize) -> f64 {
        let tables = self.vocab * self.hidden * if self.tied { 1 } else { 2 };
        let products = self.bytes() as f64 / 2.0 - tables as f64;
        // The head computes one row. Attention: of each pair of tokens two products in each head.
        let attention = 2.0 * (tokens * tokens * self.heads * self.head_dim * self.layers) as f64;
        2.0 * products * tokens as f64 + attention + 2.0 * (self.vocab * self.hidden) as f64
    }

    fn config(&self) -> Value {
        let Shape { hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, tied, .. } = *self;
        json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
            "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "head_dim": head_dim, "vocab_size": vocab, "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0, "max_position_embeddings": self.context(), "hidden_act": "silu",
            "tie_word_embeddings": tied, "torch_dtype": "bfloat16", "eos_token_id": 2, "bos_token_id": 1,
        })
    }

    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let Shape { hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, tied, .. } = *self;
        let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![vocab, hidden])];
        for layer in 0..layers {
            let mut add = |name: &str, shape: Vec<usize>| {
                tensors.push((format!("model.layers.{layer}.{name}.weight"), shape));
            };
            add("input_layernorm", vec![hidden]);
            add("self_attn.q_proj", vec![heads * head_dim, hidden]);
            add("self_attn.k_proj", vec![kv_heads * head_dim, hidden]);
            add("self_attn.v_proj", vec![kv_heads * head_dim, hidden]);
            add("self_attn.o_proj", vec![hidden, heads * head_dim]);
            add("post_attention_layernorm", vec![hidden]);
            add("mlp.gate_proj", vec![intermediate, hidden]);
            add("mlp.up_proj", vec![intermediate, hidden]);
            add("mlp.down_proj", vec![hidden, intermediate]);
        }
        tensors.push(("model.norm.weight".to_owned(), vec![hidden]));
        if !tied {
            tensors.push(("lm_head.weight".to_owned(), vec![vocab, hidden]));
        }
        tensors
    }
}

fn bytes_of(shape: &[usize]) -> u64 {
    shape.iter().product::<usize>() as u64 * 2
}

/// Writes `config.json` and the head of `model.safetensors`; gives the file at the place of the first tensor's bytes.
fn begin(shape: &Shape, path: &Path) -> Result<(File, u64), Box<dyn Error>> {
    std::fs::create_dir_all(path)?;
    std::fs::write(path.join("config.json"), shape.config().to_string())?;
    let (mut header, mut at) = (serde_json::Map::new(), 0);
    for (name, shape) in &shape.tensors() {
        let end = at + bytes_of(shape);
        header.insert(name.clone(), json!({ "dtype": "BF16", "shape": shape, "data_offsets": [at, end] }));
        at = end;
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = File::create(path.join("model.safetensors"))?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    Ok((file, header.len() as u64 + 8))
}

/// Random bf16 numbers of about a fiftieth, of both signs.
fn numbers(bytes: usize, seed: u64) -> Vec<u8> {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
    let mut numbers = vec![0; bytes];
    random.fill_bytes(&mut numbers);
    for pair in numbers.as_chunks_mut().0 {
        *pair = ((u16::from_le_bytes(*pair) & 0x80ff) | 0x3c00).to_le_bytes();
    }
    numbers
}

/// Writes a random bf16 model, as fast as the disk takes it; gives its bytes.
pub(crate) fn write(shape: &Shape, path: &Path) -> Result<u64, Box<dyn Error>> {
    let (file, _) = begin(shape, path)?;
    let mut file = BufWriter::with_capacity(8 << 20, file);
    // Each tensor begins elsewhere in it, so that no two are the same content.
    let piece = numbers(16 << 20, 1);
    for (index, (_, shape)) in shape.tensors().iter().enumerate() {
        let mut left = bytes_of(shape) as usize;
        if let [width] = shape[..] {
            // Norms: about 1.
            (0..width)
                .try_for_each(|at| file.write_all(&(0x3f80 + (at % 7 + index % 5) as u16).to_le_bytes()))?;
            continue;
        }
        let mut from = index * 30_014 % piece.len();
        while left > 0 {
            let count = left.min(piece.len() - from);
            file.write_all(&piece[from..from + count])?;
            (left, from) = (left - count, 0);
        }
    }
    file.flush()?;
    Ok(shape.bytes())
}

/// What fills the bytes that stand for weights: random numbers, no two pieces the same.
pub(crate) fn fill() -> Fill {
    let (random, calls) = (numbers(32 << 20, 2), AtomicUsize::new(0));
    Arc::new(move |piece: &mut [u8]| {
        let room = random.len().saturating_sub(piece.len()).max(2);
        let from = calls.fetch_add(1, Ordering::Relaxed) * 1_000_002 % room / 2 * 2;
        if let Some(numbers) = random.get(from..from + piece.len()) {
            piece.copy_from_slice(numbers);
        }
    })
}

const MODELS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("models");

/// Makes a data directory in which models of these shapes are deployed whose files have their sizes and no bytes. Their
/// tensors all have identities of their own.
pub(crate) fn describe(models: &[(String, Shape)], data: &Path) -> Result<(), Box<dyn Error>> {
    std::fs::create_dir_all(data)?;
    let database = Database::create(data.join("catalog.redb"))?;
    let write = database.begin_write()?;
    {
        let mut table = write.open_table(MODELS)?;
        for (name, shape) in models {
            let directory = data.join("checkpoints").join(name);
            let manifest = manifest(name, &source(shape, &directory)?);
            File::create(directory.join(DATA_FILE))?.set_len(manifest.data_bytes)?;
            std::fs::write(directory.join(MANIFEST_FILE), serde_json::to_vec(&manifest)?)?;
            let record = json!({ "checkpoint": name, "created": 0 }).to_string();
            table.insert(name.as_str(), record.as_bytes())?;
        }
    }
    write.commit()?;
    Ok(())
}

/// A model of this shape without its bytes. Leaves nothing in the directory.
pub(crate) fn source(shape: &Shape, directory: &Path) -> Result<Source, Box<dyn Error>> {
    let path = directory.join("source");
    let (file, head) = begin(shape, &path)?;
    file.set_len(head + shape.bytes())?;
    let source = tangram_checkpoint::open(&path)?;
    std::fs::remove_dir_all(&path)?;
    Ok(source)
}

fn manifest(name: &str, source: &Source) -> Manifest {
    let spec = source.spec().clone();
    let mut tensors: Vec<_> = source.tensors().iter().collect();
    tensors.sort_by_key(|tensor| spec.stage(tensor.role));
    let mut end = 0u64;
    let entries = tensors.into_iter().map(|tensor| {
        let offset = end.next_multiple_of(4096);
        end = offset + tensor.bytes;
        TensorEntry {
            role: tensor.role,
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
            id: Hash::of(format!("{name} {:?}", tensor.role).as_bytes()),
            bytes: tensor.bytes,
            stage: spec.stage(tensor.role) as u32,
            checkpoint: name.to_owned(),
            offset,
            chunks: vec![Checksum::of(b"nobody reads the file"); tensor.bytes.div_ceil(CHUNK_BYTES) as usize],
            stored: Vec::new(),
            in_place: None,
        }
    });
    let tensors = entries.collect();
    Manifest {
        version: Manifest::VERSION,
        checkpoint: name.to_owned(),
        spec,
        tensors,
        data_bytes: end,
        generation: source.generation().clone(),
        chat_template: None,
        special_tokens: Default::default(),
        has_tokenizer: false,
        base: None,
        in_place: None,
    }
}
