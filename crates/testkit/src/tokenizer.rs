//! A byte-level tokenizer without merges: one token per byte, so that every text has an obvious encoding.

use serde_json::{Map, Value, json};

use crate::model::{Family, RandomModel};

/// Tokens after the 256 bytes: ids 256, 257 and 258. For BERT they are `[PAD]`, `[CLS]` and `[SEP]`.
pub const SPECIAL_TOKENS: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// Token id that ends a sequence of a generating model (`<|im_end|>`).
pub const EOS_TOKEN: u32 = 258;

const BERT_TOKENS: [&str; 3] = ["[PAD]", "[CLS]", "[SEP]"];

/// The ChatML-like template that models are written with.
pub const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + \
message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}\
{{ '<|im_start|>assistant\n' }}{% endif %}";

/// The token id of a byte: the byte itself.
pub const fn byte_token_id(byte: u8) -> u32 {
    byte as u32
}

/// The visible character by which byte-level tokenizers write a byte (GPT-2's table).
fn byte_character(byte: u8) -> char {
    let visible = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if visible(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&other| !visible(other)).count() as u32;
    char::from_u32(256 + before).unwrap()
}

/// The text of every token up to `vocab`, at least 259: bytes, specials, then fillers that only decoding gives.
pub(crate) fn token_texts(vocab: usize, family: Family) -> Vec<String> {
    let specials = if family == Family::Bert { BERT_TOKENS } else { SPECIAL_TOKENS };
    let mut texts: Vec<String> = (0..=255).map(|byte| byte_character(byte).to_string()).collect();
    texts.extend(specials.map(str::to_owned));
    texts.extend((texts.len()..vocab).map(|id| format!("t{id}_")));
    texts
}

/// `tokenizer.json`, or `None` for a vocabulary too small for it.
pub(crate) fn tokenizer_json(model: &RandomModel) -> Option<Value> {
    if model.vocab < 259 {
        return None;
    }
    let texts = token_texts(model.vocab, model.family);
    let mut vocab = Map::new();
    for (id, text) in texts.iter().enumerate() {
        vocab.insert(text.clone(), json!(id));
    }
    let added: Vec<Value> = texts
        .iter()
        .enumerate()
        .skip(256)
        .take(3)
        .map(|(id, text)| {
            json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        })
        .collect();
    let post_processor = if model.family == Family::Bert {
        let special = |text: &str, id: u32| json!({"id": text, "ids": [id], "tokens": [text]});
        let piece = |text: &str, type_id: u32| json!({"SpecialToken": {"id": text, "type_id": type_id}});
        let sequence = |name: &str, type_id: u32| json!({"Sequence": {"id": name, "type_id": type_id}});
        json!({
            "type": "TemplateProcessing",
            "single": [piece("[CLS]", 0), sequence("A", 0), piece("[SEP]", 0)],
            "pair": [piece("[CLS]", 0), sequence("A", 0), piece("[SEP]", 0), sequence("B", 1), piece("[SEP]", 1)],
            "special_tokens": {"[CLS]": special("[CLS]", 257), "[SEP]": special("[SEP]", 258)},
        })
    } else {
        Value::Null
    };
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    Some(json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": post_processor, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocab, "merges": []},
    }))
}

/// `tokenizer_config.json`.
pub(crate) fn tokenizer_config(model: &RandomModel) -> Value {
    match model.family {
        Family::Bert => json!({"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}),
        _ => json!({
            "bos_token": SPECIAL_TOKENS[1], "eos_token": SPECIAL_TOKENS[2], "pad_token": SPECIAL_TOKENS[0],
            "add_bos_token": false, "chat_template": CHAT_TEMPLATE,
        }),
    }
}
