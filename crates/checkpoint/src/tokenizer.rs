//! Tokenizer files: checks that the tokenizer library accepts them, completes and normalises them.

use serde_json::{Value, json};
use tokenizers::Tokenizer;

/// Largest `tokenizer.json` in bytes.
pub(crate) const MAX_TOKENIZER_BYTES: u64 = 256 << 20;

/// The warning about a checkpoint without one.
pub(crate) const MISSING: &str =
    "there is no tokenizer that can be used; the model can be served for token ids only";

/// A tokenizer known to parse.
pub(crate) struct Prepared {
    pub(crate) json: Vec<u8>,
    pub(crate) tokenizer: Tokenizer,
}

/// Checks a `tokenizer.json`. Truncation and padding are taken out: they are habits of the checkpoint's author, and
/// would silently shorten prompts. `add_bos` is the token to put in front where the file itself says nothing about
/// special tokens but its configuration asks for one.
pub(crate) fn prepare(json: Vec<u8>, add_bos: Option<&str>) -> Result<Prepared, String> {
    let tokenizer = parse(&json)?;
    let bos = add_bos
        .filter(|_| tokenizer.get_post_processor().is_none())
        .and_then(|bos| Some((bos, tokenizer.token_to_id(bos)?)));
    if tokenizer.get_truncation().is_none() && tokenizer.get_padding().is_none() && bos.is_none() {
        try_out(&tokenizer)?;
        return Ok(Prepared { json, tokenizer });
    }
    let mut value: Value = serde_json::from_slice(&json).map_err(|error| error.to_string())?;
    if let Some(object) = value.as_object_mut() {
        object.insert("truncation".into(), Value::Null);
        object.insert("padding".into(), Value::Null);
        if let Some((bos, id)) = bos {
            object.insert("post_processor".into(), bos_processor(bos, id));
        }
    }
    from_value(&value)
}

/// Serialises a tokenizer and checks that the library accepts it.
pub(crate) fn from_value(value: &Value) -> Result<Prepared, String> {
    let json = serde_json::to_vec(value).map_err(|error| error.to_string())?;
    let tokenizer = parse(&json)?;
    try_out(&tokenizer)?;
    Ok(Prepared { json, tokenizer })
}

fn parse(json: &[u8]) -> Result<Tokenizer, String> {
    guarded(|| Tokenizer::from_bytes(json))
}

/// Encodes and decodes a short text, because some faults (a template that names an undefined token) show only then.
fn try_out(tokenizer: &Tokenizer) -> Result<(), String> {
    guarded(|| {
        let encoding = tokenizer.encode("Hello, 1 2", true)?;
        tokenizer.decode(encoding.get_ids(), false).map(drop)
    })
}

/// Calls the library, which answers some inconsistent files with a panic instead of an error.
fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|error| format!("the tokenizer cannot be read: {error}")),
        Err(_) => Err("the tokenizer cannot be read: it contradicts itself".into()),
    }
}

/// A post-processor that puts `bos` in front of every sequence.
pub(crate) fn bos_processor(bos: &str, id: u32) -> Value {
    let special = |type_id: u32| json!({"SpecialToken": {"id": bos, "type_id": type_id}});
    let sequence = |name: &str, type_id: u32| json!({"Sequence": {"id": name, "type_id": type_id}});
    let mut specials = serde_json::Map::new();
    specials.insert(bos.into(), json!({"id": bos, "ids": [id], "tokens": [bos]}));
    json!({
        "type": "TemplateProcessing",
        "single": [special(0), sequence("A", 0)],
        "pair": [special(0), sequence("A", 0), special(1), sequence("B", 1)],
        "special_tokens": specials,
    })
}
