//! Reads real models that lie beside the repository; prints that it skips where they do not.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use tangram_checkpoint::{
    ContentId, Manifest, Output, Role, RopeScaling, Source, TOKENIZER_FILE, import, open,
};
use tokenizers::Tokenizer;

/// A path under the shared models, if they are there.
fn shared(path: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/models").join(path);
    if path.exists() {
        return Some(path);
    }
    println!("skipped: {} is not there", path.display());
    None
}

fn import_to(source: &Source, dir: &Path) -> Manifest {
    fs::create_dir(dir).unwrap();
    import(source, dir, "model", &|_| None, &mut |_| ControlFlow::Continue(())).unwrap()
}

#[test]
fn both_formats_of_stories260k_are_the_same_model() {
    let Some(directory) = shared("stories260k") else { return };
    let temp = tempfile::tempdir().unwrap();
    let hugging_face = open(&directory).unwrap();
    let gguf = open(&directory.join("stories260k-v1.gguf")).unwrap();
    let one = import_to(&hugging_face, &temp.path().join("one"));
    let two = import_to(&gguf, &temp.path().join("two"));
    let ids = |manifest: &Manifest| -> BTreeMap<Role, ContentId> {
        manifest.tensors.iter().map(|entry| (entry.role, entry.id)).collect()
    };
    let mut of_gguf = ids(&two);
    // The GGUF writes the tied output matrix out; its bytes lie on disk once all the same.
    assert_eq!(of_gguf.remove(&Role::Output), of_gguf.get(&Role::TokenEmbedding).copied());
    assert_eq!(ids(&one), of_gguf);
    assert_eq!(one.data_bytes, two.data_bytes);
    assert_eq!(one.spec, tangram_checkpoint::ModelSpec { output: Output::Logits { tied: true }, ..two.spec });
    assert_eq!(
        (one.generation.eos.clone(), one.generation.bos),
        (two.generation.eos.clone(), two.generation.bos)
    );
    assert_eq!(two.special_tokens.get("bos_token").map(String::as_str), Some("<s>"));

    let first = Tokenizer::from_file(temp.path().join("one").join(TOKENIZER_FILE)).unwrap();
    let second = Tokenizer::from_file(temp.path().join("two").join(TOKENIZER_FILE)).unwrap();
    for text in [
        "Once upon a time, there was a little girl named Lily.",
        "  two  spaces\nand a line",
        "",
        " ",
        "naïve 日本語 🙂",
        "<s>special</s> tokens <unk>",
        "They were very happy and went to the park to play with the ball",
        "aaaaaaaa  1234567890 !?.,\"'",
    ] {
        for add_special_tokens in [true, false] {
            let one = first.encode(text, add_special_tokens).unwrap();
            let two = second.encode(text, add_special_tokens).unwrap();
            assert_eq!(one.get_ids(), two.get_ids(), "{text:?}");
            assert_eq!(
                first.decode(one.get_ids(), true).unwrap(),
                second.decode(one.get_ids(), true).unwrap()
            );
        }
    }
}

#[test]
fn the_parity_models_import() {
    let Some(parity) = shared("parity") else { return };
    let temp = tempfile::tempdir().unwrap();
    for name in [
        "gemma2",
        "gemma3",
        "gpt2",
        "gptneox",
        "llama",
        "llama3rope",
        "mistral",
        "mixtral",
        "opt",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3moe",
    ] {
        let source = open(&parity.join(name)).unwrap();
        assert_eq!(import_to(&source, &temp.path().join(name)).weight_bytes(), source.weight_bytes());
        let scaling = source.spec().rope.as_ref().map(|rope| &rope.scaling);
        assert_eq!(matches!(scaling, Some(RopeScaling::Llama3 { .. })), name == "llama3rope");
        assert_eq!(source.tokenizer_json(), None);
    }
}
