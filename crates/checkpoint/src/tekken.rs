//! Turns Mistral's `tekken.json` into the `tokenizers` library's JSON.
//!
//! A tekken file lists byte strings by rank, as tiktoken does: of all neighbours that together are in the list, those of
//! the lowest rank are put together first. The library wants the pairs: every way to cut a string of the list into two
//! of it, in the order of its rank. Ids begin with the special tokens; format and numbering are mistral-common's.

use std::collections::HashMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::tokenizer;

/// The name of such a file.
pub(crate) const FILE: &str = "tekken.json";

/// Longest token in bytes; the search for its pairs takes time quadratic in this.
const MAX_TOKEN_BYTES: usize = 512;
/// More special tokens than any known file has (1000).
const MAX_SPECIAL: usize = 1 << 16;

/// The special tokens of files that do not list them.
const SPECIAL: [&str; 20] = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
];

/// The first special token of every sequence, and the one that ends an answer.
pub(crate) const BOS: &str = "<s>";
pub(crate) const EOS: &str = "</s>";

#[derive(Deserialize)]
struct File {
    config: Config,
    vocab: Vec<Token>,
    special_tokens: Option<Vec<Special>>,
}

#[derive(Deserialize)]
struct Config {
    pattern: String,
    default_vocab_size: usize,
    default_num_special_tokens: usize,
}

#[derive(Deserialize)]
struct Token {
    rank: usize,
    token_bytes: String,
}

#[derive(Deserialize)]
struct Special {
    rank: usize,
    token_str: String,
}

/// The tokenizer in a `tekken.json`, with [`BOS`] in front of sequences.
pub(crate) fn convert(json: &[u8]) -> Result<tokenizer::Prepared, String> {
    let file: File = serde_json::from_slice(json).map_err(|error| format!("is no tekken file: {error}"))?;
    let special = special_tokens(&file)?;
    let size = file.config.default_vocab_size.checked_sub(special.len());
    let size = size.filter(|&size| size <= file.vocab.len()).ok_or_else(|| {
        format!(
            "promises {} tokens, {} of them special, but lists {}",
            file.config.default_vocab_size,
            special.len(),
            file.vocab.len()
        )
    })?;
    // What is beyond the size is not used.
    let mut tokens = vec![Vec::new(); size];
    let mut ranks: HashMap<Vec<u8>, usize> = HashMap::with_capacity(size);
    for Token { rank, token_bytes } in &file.vocab {
        let Some(place) = tokens.get_mut(*rank) else { continue };
        let bytes = STANDARD.decode(token_bytes).map_err(|error| format!("token {rank}: {error}"))?;
        if bytes.is_empty() || bytes.len() > MAX_TOKEN_BYTES || ranks.insert(bytes.clone(), *rank).is_some() {
            return Err(format!("token {rank} is empty, far too long or there twice"));
        }
        *place = bytes;
    }
    if let Some(rank) = tokens.iter().position(Vec::is_empty) {
        return Err(format!("token {rank} is missing"));
    }

    let mut vocab = Map::new();
    let mut merges = Vec::new();
    for (id, text) in special.iter().enumerate() {
        vocab.insert(text.clone(), json!(id));
    }
    for (rank, token) in tokens.iter().enumerate() {
        vocab.insert(characters(token), json!(special.len() + rank));
        let cuts = (1..token.len()).filter_map(|at| {
            let (left, right) = token.split_at(at);
            Some((ranks.get(left)?, ranks.get(right)?, left, right))
        });
        let mut cuts: Vec<_> = cuts.collect();
        cuts.sort_unstable();
        merges
            .extend(cuts.into_iter().map(|(_, _, left, right)| json!([characters(left), characters(right)])));
    }
    let added: Vec<Value> = special
        .iter()
        .enumerate()
        .map(|(id, text)| {
            json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        })
        .collect();
    let post_processor = match special.iter().position(|text| text == BOS) {
        Some(id) => tokenizer::bos_processor(BOS, id as u32),
        None => Value::Null,
    };
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let split = json!({"type": "Split", "pattern": {"Regex": file.config.pattern}, "behavior": "Isolated",
                       "invert": false});
    tokenizer::from_value(&json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": post_processor, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": true,
                  "vocab": vocab, "merges": merges},
    }))
}

/// The texts of the special tokens by their ids; ids without one are filled up as mistral-common does.
fn special_tokens(file: &File) -> Result<Vec<String>, String> {
    let count = file.config.default_num_special_tokens;
    if count > MAX_SPECIAL {
        return Err(format!("has {count} special tokens"));
    }
    let mut texts: Vec<String> = (0..count).map(|id| format!("<SPECIAL_{id}>")).collect();
    let listed: Vec<(usize, &str)> = match &file.special_tokens {
        Some(tokens) => tokens.iter().map(|token| (token.rank, token.token_str.as_str())).collect(),
        None => SPECIAL.into_iter().enumerate().collect(),
    };
    for (rank, text) in listed {
        match texts.get_mut(rank) {
            Some(place) => text.clone_into(place),
            None => return Err(format!("the special token {text} has id {rank} of {count}")),
        }
    }
    Ok(texts)
}

/// Bytes as byte-level vocabularies write them: GPT-2's table.
fn characters(bytes: &[u8]) -> String {
    bytes.iter().map(|&byte| character(byte)).collect()
}

fn character(byte: u8) -> char {
    let shift = match byte {
        b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => return char::from(byte),
        // The others follow each other from U+0100 on.
        0..=0x20 => 0,
        0x7F..=0xA0 => 0x7F - 0x21,
        0xAD => 0xAD - 0x43,
    };
    char::from_u32(0x100 + u32::from(byte) - shift).unwrap_or(char::REPLACEMENT_CHARACTER)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATTERN: &str = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+";

    /// All bytes in order, then these strings.
    fn file(strings: &[&str], special: Value, size: usize) -> Vec<u8> {
        let bytes = (0..=255u8).map(|byte| vec![byte]);
        let all = bytes.chain(strings.iter().map(|text| text.as_bytes().to_vec()));
        let vocab: Vec<Value> = all
            .enumerate()
            .map(|(rank, bytes)| json!({"rank": rank, "token_bytes": STANDARD.encode(bytes), "token_str": null}))
            .collect();
        let config = json!({"pattern": PATTERN, "num_vocab_tokens": vocab.len(), "default_vocab_size": size,
                            "default_num_special_tokens": 30, "version": "v3"});
        let mut file = json!({"config": config, "vocab": vocab});
        if !special.is_null() {
            file["special_tokens"] = special;
        }
        file.to_string().into_bytes()
    }

    #[test]
    fn the_lowest_rank_is_put_together_first() {
        let strings = ["bc", "ab", "abc", " x", "é", "beyond"];
        let tokenizer = convert(&file(&strings, Value::Null, 30 + 256 + 5)).unwrap().tokenizer;
        let ids = |text: &str| tokenizer.encode(text, false).unwrap().get_ids().to_vec();
        let byte = |byte: u8| 30 + u32::from(byte);
        let string = |place: u32| 30 + 256 + place;
        // "bc" before "ab"; a whole piece that is in the list at once, also where its parts would not lead there.
        assert_eq!(ids("abcd"), [string(2), byte(b'd')]);
        assert_eq!(ids("dabcb"), [byte(b'd'), string(2), byte(b'b')]);
        assert_eq!(ids("dabd"), [byte(b'd'), string(1), byte(b'd')]);
        assert_eq!(ids("é x"), [string(4), string(3)]);
        assert_eq!(ids("ÿ"), [byte(0xC3), byte(0xBF)]);
        assert_eq!(ids("\n\u{7f}"), [byte(b'\n'), byte(0x7f)]);
        // Beyond the size there is nothing.
        assert_eq!(ids("beyond").len(), 6);
        // Special tokens: by their text, in front, and left out of the text.
        assert_eq!(ids("[INST]a[/INST]"), [3, byte(b'a'), 4]);
        assert_eq!(tokenizer.token_to_id("<SPECIAL_29>"), Some(29));
        let encoded = tokenizer.encode("abc é\n", true).unwrap();
        assert_eq!(encoded.get_ids()[0], 1);
        assert_eq!(tokenizer.decode(encoded.get_ids(), true).unwrap(), "abc é\n");
    }

    #[test]
    fn special_tokens_can_be_listed() {
        let special = json!([{"rank": 0, "token_str": "<unk>", "is_control": true},
                             {"rank": 1, "token_str": "<s>", "is_control": true},
                             {"rank": 9, "token_str": "[ARGS]", "is_control": true}]);
        let tokenizer = convert(&file(&[], special, 286)).unwrap().tokenizer;
        assert_eq!(tokenizer.token_to_id("[ARGS]"), Some(9));
        assert_eq!(tokenizer.token_to_id("[INST]"), None);
    }

    #[test]
    fn files_that_contradict_themselves_are_refused() {
        for (bytes, word) in [
            (b"{}".to_vec(), "config"),
            (file(&["ab"], Value::Null, 288), "promises"),
            (file(&["ab"], Value::Null, 20), "promises"),
            (file(&["ab", "ab"], Value::Null, 288), "twice"),
            (file(&[""], Value::Null, 287), "empty"),
            (file(&[], json!([{"rank": 30, "token_str": "x"}]), 286), "30"),
        ] {
            let Err(message) = convert(&bytes) else { panic!("{word}: accepted") };
            assert!(message.contains(word), "{word}: {message}");
        }
    }
}
