//! Writes what ServerlessLLM makes of a Hugging Face checkpoint.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};

/// Writes the single-file Hugging Face model in `source` to `target` as ServerlessLLM's Transformers backend saves it, in
/// data files of at most `file_bytes` (10 GiB there). A tied output matrix is in the index under both names.
pub fn write_serverlessllm(source: &Path, target: &Path, file_bytes: usize) {
    fs::create_dir_all(target).unwrap();
    for entry in fs::read_dir(source).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap();
        let of_tokenizer = ["tokenizer.json", "tokenizer_config.json"].iter().any(|file| name == *file);
        if of_tokenizer {
            fs::create_dir_all(target.join("tokenizer")).unwrap();
            fs::copy(&path, target.join("tokenizer").join(name)).unwrap();
        } else if path.extension().is_some_and(|extension| extension == "json") {
            fs::copy(&path, target.join(name)).unwrap();
        }
    }
    let file = fs::read(source.join("model.safetensors")).unwrap();
    let header_bytes = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header: Map<String, Value> = serde_json::from_slice(&file[8..8 + header_bytes]).unwrap();
    let data = &file[8 + header_bytes..];
    let (mut index, mut files, mut global) = (Map::new(), vec![Vec::new()], 0);
    for (name, entry) in header.iter().filter(|(name, _)| *name != "__metadata__") {
        let offset = |which: usize| entry["data_offsets"][which].as_u64().unwrap() as usize;
        let bytes = &data[offset(0)..offset(1)];
        let shape: Vec<u64> = serde_json::from_value(entry["shape"].clone()).unwrap();
        let strides = (0..shape.len()).map(|dim| shape[dim + 1..].iter().product());
        let dtype = match entry["dtype"].as_str().unwrap() {
            "F32" => "torch.float32",
            "F16" => "torch.float16",
            "BF16" => "torch.bfloat16",
            other => panic!("{name} has type {other}"),
        };
        if files.last().unwrap().len() + bytes.len() > file_bytes && !files.last().unwrap().is_empty() {
            files.push(Vec::new());
        }
        let part: &mut Vec<u8> = files.last_mut().unwrap();
        let record = json!([global, bytes.len(), shape, strides.collect::<Vec<u64>>(), dtype]);
        if name == "model.embed_tokens.weight" && !header.contains_key("lm_head.weight") {
            index.insert("lm_head.weight".to_owned(), record.clone());
        }
        index.insert(name.clone(), record);
        part.extend(bytes);
        part.resize(part.len().next_multiple_of(8), 0xa5);
        global += bytes.len().next_multiple_of(8);
    }
    for (number, bytes) in files.iter().enumerate() {
        fs::write(target.join(format!("tensor.data_{number}")), bytes).unwrap();
    }
    fs::write(target.join("tensor_index.json"), serde_json::to_vec(&index).unwrap()).unwrap();
}
