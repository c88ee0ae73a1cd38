//! Turns the tokenizer in GGUF metadata into the `tokenizers` library's JSON, with the special tokens and the template.
//!
//! Two models are known: `gpt2`, byte-level BPE with merges, and `llama`, SentencePiece BPE with scores, whose merges
//! follow from the scores as in transformers' slow-to-fast conversion.

#[cfg(test)]
mod vocabularies;

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use crate::gguf_model::Metadata;
use crate::source::TextAssets;
use crate::{CheckpointError, GenerationDefaults, tokenizer};

/// Token types of the format.
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
const UNUSED: i64 = 5;
const BYTE: i64 = 6;

/// Longest SentencePiece token in bytes; the search for its merges takes time quadratic in this.
const MAX_PIECE_BYTES: usize = 512;
/// More merges than any known vocabulary has (about 600,000).
const MAX_MERGES: usize = 1 << 22;

/// Control tokens that end a turn in chat models whatever `eos_token_id` says.
const END_OF_TURN: [&str; 2] = ["<|im_end|>", "<|eot_id|>"];

/// Splits by GPT-2's rule come with the byte-level pre-tokenizer; these are the rules of others.
const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// As Qwen 2, with marks counted among the letters, and without its Unicode normalization.
const QWEN35_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The token table.
struct Tokens<'a> {
    texts: &'a [String],
    types: Vec<i64>,
}

/// Reads tokenizer, special tokens, end tokens and chat template.
/// The model has `vocab` token embeddings.
pub(crate) fn read(metadata: &Metadata<'_>, vocab: usize) -> Result<TextAssets, CheckpointError> {
    let mut text = TextAssets {
        chat_template: metadata.text("tokenizer.chat_template")?.map(str::to_owned),
        ..TextAssets::default()
    };
    let Some(texts) = metadata.texts("tokenizer.ggml.tokens")? else {
        text.generation = generation(metadata, None, false)?;
        text.warnings.push(tokenizer::MISSING.into());
        return Ok(text);
    };
    if texts.len() > vocab {
        return Err(metadata.invalid(format!(
            "has {} tokens, but token_embd.weight has {} rows; the file is wrongly converted",
            texts.len(),
            vocab
        )));
    }
    let types = match metadata.integers("tokenizer.ggml.token_type")? {
        Some(types) if types.len() == texts.len() => types.to_vec(),
        Some(types) => {
            return Err(metadata.invalid(format!(
                "has {} tokens, but {} token types",
                texts.len(),
                types.len()
            )));
        }
        None => vec![1; texts.len()],
    };
    let tokens = Tokens { texts, types };
    for (name, key) in
        [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")]
    {
        if let Some(id) = metadata.count(&format!("tokenizer.ggml.{key}_token_id"))?
            && let Some(token) = texts.get(id)
        {
            text.special_tokens.insert(name.into(), token.clone());
        }
    }
    text.generation = generation(metadata, Some(&tokens), text.chat_template.is_some())?;

    let value = match metadata.text("tokenizer.ggml.model")?.unwrap_or_default() {
        "gpt2" => byte_level(metadata, &tokens, &mut text.warnings)?,
        "llama" => sentence_piece(metadata, &tokens, &mut text.warnings)?,
        other => {
            text.warnings
                .push(format!("the tokenizer model {other:?} is not supported (gpt2 and llama are)"));
            text.warnings.push(tokenizer::MISSING.into());
            return Ok(text);
        }
    };
    let prepared = tokenizer::from_value(&value).map_err(|message| metadata.invalid(message))?;
    text.tokenizer_json = Some(prepared.json);
    Ok(text)
}

fn generation(
    metadata: &Metadata<'_>,
    tokens: Option<&Tokens<'_>>,
    chat: bool,
) -> Result<GenerationDefaults, CheckpointError> {
    let id = |key: &str| -> Result<Option<u32>, CheckpointError> {
        Ok(metadata.count(key)?.and_then(|id| u32::try_from(id).ok()))
    };
    let mut eos: Vec<u32> = Vec::new();
    eos.extend(id("tokenizer.ggml.eos_token_id")?);
    eos.extend(id("tokenizer.ggml.eot_token_id")?);
    if let Some(tokens) = tokens.filter(|_| chat) {
        for (index, text) in tokens.texts.iter().enumerate() {
            if END_OF_TURN.contains(&text.as_str()) && tokens.is_type(index, CONTROL) {
                eos.push(index as u32);
            }
        }
    }
    eos.sort_unstable();
    eos.dedup();
    Ok(GenerationDefaults { eos, bos: id("tokenizer.ggml.bos_token_id")?, ..GenerationDefaults::default() })
}

impl Tokens<'_> {
    fn is_type(&self, index: usize, kind: i64) -> bool {
        self.types.get(index) == Some(&kind)
    }

    /// The vocabulary as a JSON object. Of two equal tokens the first counts.
    fn vocab(&self, warnings: &mut Vec<String>) -> Map<String, Value> {
        let mut vocab = Map::new();
        let mut repeated = 0;
        for (id, text) in self.texts.iter().enumerate() {
            if vocab.contains_key(text) {
                repeated += 1;
            } else {
                vocab.insert(text.clone(), json!(id));
            }
        }
        if repeated > 0 {
            warnings.push(format!(
                "{repeated} tokens have the text of an earlier one; text never becomes such a token"
            ));
        }
        vocab
    }

    /// Tokens that are found in text before anything else is split.
    fn added(&self, special_types: &[i64]) -> Vec<Value> {
        let mut added = Vec::new();
        for (id, (text, kind)) in self.texts.iter().zip(&self.types).enumerate() {
            let special = special_types.contains(kind);
            if (special || *kind == USER_DEFINED) && !text.is_empty() {
                added.push(json!({"id": id, "content": text, "single_word": false, "lstrip": false,
                                  "rstrip": false, "normalized": false, "special": special}));
            }
        }
        added
    }
}

/// The post-processor that puts the BOS token in front, if the metadata asks for it.
fn post_processor(
    metadata: &Metadata<'_>,
    tokens: &Tokens<'_>,
    default: bool,
) -> Result<Value, CheckpointError> {
    let bos = metadata.count("tokenizer.ggml.bos_token_id")?.and_then(|id| Some((id, tokens.texts.get(id)?)));
    match (metadata.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(default), bos) {
        (true, Some((id, text))) => Ok(tokenizer::bos_processor(text, id as u32)),
        _ => Ok(Value::Null),
    }
}

/// A BPE model in the library's terms.
fn bpe(vocab: Map<String, Value>, merges: Vec<Value>) -> Map<String, Value> {
    let model = json!({
        "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
    });
    let mut model = if let Value::Object(model) = model { model } else { Map::new() };
    model.insert("vocab".into(), Value::Object(vocab));
    model.insert("merges".into(), Value::Array(merges));
    model
}

fn byte_level(
    metadata: &Metadata<'_>,
    tokens: &Tokens<'_>,
    warnings: &mut Vec<String>,
) -> Result<Value, CheckpointError> {
    let pre = metadata.text("tokenizer.ggml.pre")?.unwrap_or("default");
    let byte_level = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let sequence = |first: Value, use_regex: bool| json!({"type": "Sequence", "pretokenizers": [first, byte_level(use_regex)]});
    let split = |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
    let llama3 = matches!(pre, "llama-bpe" | "llama3" | "llama-v3");
    let qwen2 = matches!(pre, "qwen2" | "deepseek-r1-qwen");
    let pre_tokenizer = match pre {
        _ if llama3 => sequence(split(LLAMA3_SPLIT), false),
        "qwen35" => sequence(split(QWEN35_SPLIT), false),
        _ if qwen2 => sequence(split(QWEN2_SPLIT), false),
        "smollm" | "starcoder" | "refact" | "command-r" => {
            sequence(json!({"type": "Digits", "individual_digits": true}), true)
        }
        "default" | "gpt-2" | "mpt" => byte_level(true),
        other => {
            warnings.push(format!(
                "the pre-tokenizer {other:?} is not known; text is split by GPT-2's rule, \
                 which may give other tokens than the model was trained on"
            ));
            byte_level(true)
        }
    };
    let mut merges = Vec::new();
    for merge in metadata.texts("tokenizer.ggml.merges")?.unwrap_or_default() {
        let Some((left, right)) = merge.split_once(' ') else {
            return Err(metadata.invalid(format!("the tokenizer merge {merge:?} is not two tokens")));
        };
        merges.push(json!([left, right]));
    }
    let mut model = bpe(tokens.vocab(warnings), merges);
    model.insert("ignore_merges".into(), json!(llama3));
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": tokens.added(&[CONTROL]),
        "normalizer": if qwen2 { json!({"type": "NFC"}) } else { Value::Null },
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor(metadata, tokens, llama3)?,
        "decoder": byte_level(true),
        "model": model,
    }))
}

fn sentence_piece(
    metadata: &Metadata<'_>,
    tokens: &Tokens<'_>,
    warnings: &mut Vec<String>,
) -> Result<Value, CheckpointError> {
    let scores = metadata.floats("tokenizer.ggml.scores")?.unwrap_or_default();
    if scores.len() != tokens.texts.len() {
        return Err(metadata.invalid(format!(
            "has {} tokens, but {} scores",
            tokens.texts.len(),
            scores.len()
        )));
    }
    let merges = merges_by_score(tokens, scores).map_err(|message| metadata.invalid(message))?;
    let mut model = bpe(tokens.vocab(warnings), merges);
    let unknown = metadata
        .count("tokenizer.ggml.unknown_token_id")?
        .or_else(|| tokens.types.iter().position(|&kind| kind == UNKNOWN))
        .and_then(|id| tokens.texts.get(id));
    model.insert("unk_token".into(), json!(unknown));
    model.insert("fuse_unk".into(), json!(true));
    model.insert("byte_fallback".into(), json!(tokens.types.contains(&BYTE)));
    let space_prefix = metadata.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let replace =
        |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    let mut normalizers = vec![replace(" ", "▁")];
    let mut decoders = vec![replace("▁", " "), json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
    if space_prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": tokens.added(&[UNKNOWN, CONTROL]),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "post_processor": post_processor(metadata, tokens, true)?,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }))
}

/// Every way to put a token together from two others, best score first; among equals the longer left part, then the
/// longer right part, then the smaller ids of result, left and right.
fn merges_by_score(tokens: &Tokens<'_>, scores: &[f32]) -> Result<Vec<Value>, String> {
    let mut pieces: HashMap<&str, usize> = HashMap::new();
    for (id, (text, kind)) in tokens.texts.iter().zip(&tokens.types).enumerate() {
        if ![UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE].contains(kind) {
            if text.len() > MAX_PIECE_BYTES {
                return Err(format!("token {id} is longer than {MAX_PIECE_BYTES} bytes"));
            }
            pieces.entry(text).or_insert(id);
        }
    }
    let mut merges = Vec::new();
    for (id, (text, &score)) in tokens.texts.iter().zip(scores).enumerate() {
        if pieces.get(text.as_str()) != Some(&id) {
            continue;
        }
        for (at, _) in text.char_indices().skip(1) {
            let (left, right) = text.split_at(at);
            if let (Some(&left_id), Some(&right_id)) = (pieces.get(left), pieces.get(right)) {
                let lengths = (left.chars().count(), right.chars().count());
                merges.push((score, lengths, (id, left_id, right_id), left, right));
            }
        }
        if merges.len() > MAX_MERGES {
            return Err(format!("the tokenizer has more than {MAX_MERGES} merges"));
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)).then(a.2.cmp(&b.2)));
    Ok(merges.into_iter().map(|(_, _, _, left, right)| json!([left, right])).collect())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use tokenizers::Tokenizer;

    use super::*;
    use crate::gguf::Value as Meta;

    fn tokenizer(build: impl Fn(&Metadata<'_>, &Tokens<'_>) -> Value, keys: &[(&str, Meta)]) -> Tokenizer {
        let map: BTreeMap<String, Meta> =
            keys.iter().map(|(key, value)| (format!("tokenizer.ggml.{key}"), value.clone())).collect();
        let metadata = Metadata { path: Path::new("test.gguf"), map };
        let texts = metadata.texts("tokenizer.ggml.tokens").unwrap().unwrap();
        let types = metadata.integers("tokenizer.ggml.token_type").unwrap().unwrap().to_vec();
        tokenizer::from_value(&build(&metadata, &Tokens { texts, types }))
            .unwrap_or_else(|e| panic!("{e}"))
            .tokenizer
    }

    fn texts(texts: &[&str]) -> Meta {
        Meta::Texts(texts.iter().map(|&text| text.to_owned()).collect())
    }

    fn pieces(tokenizer: &Tokenizer, text: &str) -> Vec<String> {
        tokenizer.encode(text, true).unwrap().get_tokens().to_vec()
    }

    #[test]
    fn sentence_piece_merges_by_score_and_falls_back_to_bytes() {
        let tokens = [
            "<unk>", "<s>", "</s>", "<0x21>", "▁", "a", "b", "c", "ab", "bc", "▁a", "abc", "<tool>",
            "<0xC3>", "<0xA9>",
        ];
        let scores = vec![0., 0., 0., 0., -9., -9., -9., -9., -2., -1., -3., -4., 0., 0., 0.];
        let keys = |space: bool| {
            vec![
                ("tokens", texts(&tokens)),
                ("token_type", Meta::Integers(vec![2, 3, 3, 6, 1, 1, 1, 1, 1, 1, 1, 1, 4, 6, 6])),
                ("scores", Meta::Floats(scores.clone())),
                ("bos_token_id", Meta::Unsigned(1)),
                ("add_space_prefix", Meta::Bool(space)),
            ]
        };
        let build = |metadata: &Metadata<'_>, tokens: &Tokens<'_>| {
            sentence_piece(metadata, tokens, &mut vec![]).unwrap()
        };
        let spaced = tokenizer(build, &keys(true));
        // "bc" scores best, so "ab" cannot form; then "▁a" before "abc".
        assert_eq!(pieces(&spaced, "abc"), ["<s>", "▁a", "bc"]);
        assert_eq!(pieces(&spaced, "b!é"), ["<s>", "▁", "b", "<0x21>", "<0xC3>", "<0xA9>"]);
        assert_eq!(pieces(&spaced, "a<tool></s>"), ["<s>", "▁a", "<tool>", "</s>"]);
        let ids = spaced.encode("a b!é", false).unwrap();
        assert_eq!(spaced.decode(ids.get_ids(), true).unwrap(), "a b!é");
        let unspaced = tokenizer(build, &keys(false));
        assert_eq!(pieces(&unspaced, "abc"), ["<s>", "abc"]);
        assert_eq!(unspaced.decode(unspaced.encode("a b", false).unwrap().get_ids(), true).unwrap(), "a b");
    }

    #[test]
    fn byte_level_splits_as_the_pre_tokenizer_says() {
        let alphabet =
            ["<|im_end|>", "1", "2", "3", "12", "123", "1234", "4", "a", "Ġ", "Ġa", "'", "S", "'S"];
        let keys = |pre: &str| {
            let mut types = vec![1; alphabet.len()];
            types[0] = CONTROL;
            vec![
                ("tokens", texts(&alphabet)),
                ("token_type", Meta::Integers(types)),
                ("merges", texts(&["1 2", "12 3", "123 4", "Ġ a", "' S"])),
                ("pre", Meta::Text(pre.into())),
                ("bos_token_id", Meta::Unsigned(0)),
            ]
        };
        let build =
            |metadata: &Metadata<'_>, tokens: &Tokens<'_>| byte_level(metadata, tokens, &mut vec![]).unwrap();
        let cases: [(&str, &str, &[&str]); 8] = [
            ("gpt-2", "1234", &["1234"]),
            ("smollm", "1234", &["1", "2", "3", "4"]),
            ("qwen2", "1234", &["1", "2", "3", "4"]),
            ("llama-bpe", "1234", &["<|im_end|>", "123", "4"]),
            ("gpt-2", " a a<|im_end|>", &["Ġa", "Ġa", "<|im_end|>"]),
            ("qwen2", " a", &["Ġa"]),
            // Contractions in capitals stay together by the newer rules only.
            ("gpt-2", "'S", &["'", "S"]),
            ("qwen2", "'S", &["'S"]),
        ];
        for (pre, text, expected) in cases {
            assert_eq!(pieces(&tokenizer(build, &keys(pre)), text), expected, "{pre}");
        }
    }

    #[test]
    fn unknown_pre_tokenizers_warn_and_bad_merges_are_refused() {
        let metadata = |merge: &str, pre: &str| Metadata {
            path: Path::new("test.gguf"),
            map: BTreeMap::from([
                ("tokenizer.ggml.merges".to_owned(), texts(&[merge])),
                ("tokenizer.ggml.pre".to_owned(), Meta::Text(pre.into())),
            ]),
        };
        let names = ["a".to_owned(), "a".to_owned()];
        let tokens = Tokens { texts: &names, types: vec![1, 1] };
        let mut warnings = Vec::new();
        byte_level(&metadata("a a", "tekken"), &tokens, &mut warnings).unwrap();
        assert!(warnings[0].contains("tekken") && warnings[1].contains("1 tokens"), "{warnings:?}");
        let error = byte_level(&metadata("aa", "gpt-2"), &tokens, &mut warnings).unwrap_err().to_string();
        assert!(error.contains("test.gguf") && error.contains("merge"), "{error}");
    }
}
