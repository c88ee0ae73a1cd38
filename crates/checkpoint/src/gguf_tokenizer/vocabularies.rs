//! Compares tokenizers made from GGUF metadata with llama.cpp's, over the vocabularies and cases that it ships
//! (`models/ggml-vocab-*.gguf` with `.inp` and `.out`). They are not part of this repository: `TANGRAM_LLAMA_CPP` names
//! a folder with llama.cpp's sources, such as `vendor/llama.cpp` in the source package of `llama-cpp-python`.

use std::path::{Path, PathBuf};

use tokenizers::Tokenizer;

use super::*;
use crate::file::SourceFile;
use crate::gguf;

/// Vocabularies that are claimed: every case must pass. `docs/tokenizers.md` says why others are not.
const CLAIMED: [&str; 10] = [
    "command-r",
    "gpt-2",
    "llama-bpe",
    "llama-spm",
    "mpt",
    "phi-3",
    "qwen2",
    "qwen35",
    "refact",
    "starcoder",
];

/// The tokenizer in a file, or why there is none.
fn tokenizer(path: &Path) -> Result<Tokenizer, String> {
    let file = SourceFile::open(path).map_err(|error| error.to_string())?;
    let header = gguf::read_header(&file).map_err(|error| error.to_string())?;
    let metadata = Metadata { path, map: header.metadata };
    let text = read(&metadata, usize::MAX).map_err(|error| error.to_string())?;
    for warning in &text.warnings {
        println!("  {warning}");
    }
    let json = text.tokenizer_json.ok_or("no tokenizer")?;
    Tokenizer::from_bytes(json).map_err(|error| error.to_string())
}

/// Failed and all cases of a vocabulary; failures are printed.
fn compare(path: &Path) -> Result<(usize, usize), String> {
    let tokenizer = tokenizer(path)?;
    let read = |extension: &str| {
        let cases = PathBuf::from(format!("{}.{extension}", path.display()));
        std::fs::read_to_string(&cases).map_err(|error| format!("{}: {error}", cases.display()))
    };
    let (input, output) = (read("inp")?, read("out")?);
    // The last separator may or may not be followed by another, empty case.
    let texts: Vec<&str> = input.split("\n__ggml_vocab_test__\n").collect();
    let mut failed = 0;
    let mut cases = 0;
    for (text, line) in texts.iter().zip(output.lines()) {
        let expected: Vec<u32> = line
            .split_whitespace()
            .map(|id| id.parse().map_err(|_| format!("not an id: {id}")))
            .collect::<Result<_, _>>()?;
        let found = tokenizer.encode(*text, false).map_err(|error| error.to_string())?;
        cases += 1;
        if found.get_ids() != expected {
            failed += 1;
            let pieces = |ids: &[u32]| {
                ids.iter().map(|&id| tokenizer.id_to_token(id).unwrap_or_default()).collect::<Vec<_>>()
            };
            println!("  {text:?}: {:?}, expected {:?}", found.get_tokens(), pieces(&expected));
        }
    }
    Ok((failed, cases))
}

#[test]
fn llama_cpps_vocabularies() {
    let Some(folder) = std::env::var_os("TANGRAM_LLAMA_CPP") else {
        println!("SKIPPED: TANGRAM_LLAMA_CPP does not name llama.cpp's sources");
        return;
    };
    let models = PathBuf::from(folder).join("models");
    let mut files: Vec<PathBuf> = std::fs::read_dir(&models)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "gguf"))
        .filter(|path| path.with_extension("gguf.inp").exists())
        .collect();
    files.sort();
    assert!(!files.is_empty(), "{} has no vocabularies", models.display());
    let mut broken = Vec::new();
    for path in files {
        let stem = path.file_stem().unwrap().to_string_lossy().into_owned();
        let name = stem.trim_start_matches("ggml-vocab-").to_owned();
        println!("{name}");
        let result = compare(&path);
        match &result {
            Ok((failed, cases)) => println!("{name}: {} of {cases} cases pass", cases - failed),
            Err(error) => println!("{name}: {error}"),
        }
        if CLAIMED.contains(&name.as_str()) && !matches!(result, Ok((0, _))) {
            broken.push(name);
        }
    }
    assert!(broken.is_empty(), "{broken:?}");
}
