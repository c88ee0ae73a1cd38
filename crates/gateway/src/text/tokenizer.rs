//! Tokenizers of deployed models: loading, encoding, decoding. Never truncates or pads, whatever the file says.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use tangram_node::{TextPair, TokenText, Vocabulary};
use tokenizers::{DecoderWrapper, Tokenizer};

/// A loaded `tokenizer.json`.
pub(crate) struct TextTokenizer {
    tokenizer: Tokenizer,
    /// Bytes of the longest entry of the vocabulary.
    longest_token: usize,
    byte_level: bool,
    /// For constrained output; made when first asked for.
    vocabulary: OnceLock<Result<Arc<Vocabulary>, String>>,
}

impl std::fmt::Debug for TextTokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TextTokenizer").field("longest_token", &self.longest_token).finish_non_exhaustive()
    }
}

impl TextTokenizer {
    /// Reads a `tokenizer.json`; blocking, up to a second for large vocabularies.
    pub(crate) fn load(path: &Path) -> Result<Self, String> {
        let bytes = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
        Self::from_json(&bytes).map_err(|error| format!("{}: {error}", path.display()))
    }

    fn from_json(json: &[u8]) -> Result<Self, String> {
        let mut tokenizer = Tokenizer::from_bytes(json).map_err(|error| error.to_string())?;
        // Sentence-transformers files cut at their training length; a request that is too long gets an error instead.
        tokenizer.with_truncation(None).map_err(|error| error.to_string())?;
        tokenizer.with_padding(None);
        let longest_token = tokenizer.get_vocab(true).keys().map(String::len).max().unwrap_or(1).max(1);
        let byte_level = matches!(tokenizer.get_decoder(), Some(DecoderWrapper::ByteLevel(_)));
        Ok(TextTokenizer { tokenizer, longest_token, byte_level, vocabulary: OnceLock::new() })
    }

    /// Token ids of `text`.
    pub(crate) fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, String> {
        match self.tokenizer.encode_fast(text, add_special_tokens) {
            Ok(encoding) => Ok(encoding.get_ids().to_vec()),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Two texts as one input, with the special tokens around them.
    pub(crate) fn encode_pair(&self, first: &str, second: &str) -> Result<TextPair, String> {
        let encoding =
            self.tokenizer.encode_fast((first, second), true).map_err(|error| error.to_string())?;
        let second = encoding.get_type_ids().iter().position(|&kind| kind == 1);
        Ok(TextPair { tokens: encoding.get_ids().to_vec(), second })
    }

    /// The fewest tokens that a text of this many bytes can have; spares tokenizing what is hopelessly too long.
    /// Only byte-level vocabularies give a bound: others may make one unknown token of any text.
    pub(crate) fn least_tokens(&self, bytes: usize) -> usize {
        // A Unicode normalizer may shorten text, though to no less than a quarter.
        if self.byte_level { bytes / self.longest_token / 4 } else { 0 }
    }

    /// Text of tokens; unknown ids give nothing.
    pub(crate) fn decode(&self, tokens: &[u32], skip_special_tokens: bool) -> String {
        match self.tokenizer.decode(tokens, skip_special_tokens) {
            Ok(text) => text,
            Err(error) => {
                tracing::warn!(%error, "tokens could not be decoded");
                String::new()
            }
        }
    }

    /// Bytes that a single token stands for, whole character or not (for logprobs).
    pub(crate) fn token_bytes(&self, token: u32) -> Vec<u8> {
        let Some(text) = self.tokenizer.id_to_token(token) else { return Vec::new() };
        if self.tokenizer.get_added_vocabulary().get_added_tokens_decoder().contains_key(&token) {
            return text.into_bytes();
        }
        if self.byte_level {
            let bytes: Option<Vec<u8>> = text.chars().map(byte_of_char).collect();
            return bytes.unwrap_or_else(|| text.into_bytes());
        }
        match text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>')) {
            Some(digits) => {
                u8::from_str_radix(digits, 16).map_or_else(|_| text.clone().into_bytes(), |byte| vec![byte])
            }
            None => text.replace('\u{2581}', " ").into_bytes(),
        }
    }

    /// Those of these texts that are tokens which decoding leaves out.
    pub(crate) fn special_tokens(&self, texts: &[&str]) -> Vec<(u32, String)> {
        let special = |text: &&str| {
            let id = self.tokenizer.token_to_id(text)?;
            let added = self.tokenizer.get_added_vocabulary().get_added_tokens_decoder().get(&id)?;
            added.special.then(|| (id, (*text).to_owned()))
        };
        texts.iter().filter_map(special).collect()
    }

    /// The tokens as constrained output needs them. Blocks for up to a second when first asked.
    pub(crate) fn vocabulary(&self) -> Result<Arc<Vocabulary>, String> {
        self.vocabulary.get_or_init(|| Vocabulary::new(&self.token_texts())).clone()
    }

    /// What each token stands for, by id.
    fn token_texts(&self) -> Vec<TokenText> {
        let ids = self.tokenizer.get_vocab(true).into_values().max().map_or(0, |highest| highest + 1);
        let added = self.tokenizer.get_added_vocabulary().get_added_tokens_decoder();
        let text = |id: u32| match added.get(&id) {
            Some(token) if token.special => TokenText::Special(token.content.clone()),
            _ => TokenText::Bytes(self.token_bytes(id)),
        };
        (0..ids).map(text).collect()
    }

    #[cfg(test)]
    pub(crate) fn token_id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }
}

/// The byte that a character of GPT-2's byte-level vocabulary stands for: printable Latin-1 stands for itself, the 68
/// other bytes (0 to 32, 127 to 160, 173) follow in order from U+0100.
fn byte_of_char(character: char) -> Option<u8> {
    let code = character as u32;
    let byte = match code {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => code,
        0x100..=0x120 => code - 0x100,
        0x121..=0x142 => code - 0x121 + 0x7F,
        0x143 => 0xAD,
        _ => return None,
    };
    u8::try_from(byte).ok()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use serde_json::json;

    fn byte_chars() -> Vec<char> {
        (0u8..=255)
            .map(|byte| {
                (0u32..0x200).filter_map(char::from_u32).find(|&c| byte_of_char(c) == Some(byte)).unwrap()
            })
            .collect()
    }

    /// One token per byte and a special token `<|end|>`.
    pub(crate) fn byte_level() -> Arc<TextTokenizer> {
        static TOKENIZER: OnceLock<Arc<TextTokenizer>> = OnceLock::new();
        TOKENIZER
            .get_or_init(|| {
                let vocab: serde_json::Map<String, serde_json::Value> =
                    byte_chars().into_iter().enumerate().map(|(id, c)| (c.to_string(), json!(id))).collect();
                let file = json!({
                    "version": "1.0",
                    "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
                    "added_tokens": [{"id": 256, "content": "<|end|>", "single_word": false, "lstrip": false,
                                      "rstrip": false, "normalized": false, "special": true}],
                    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
                    "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
                    "model": {"type": "BPE", "vocab": vocab, "merges": []},
                });
                Arc::new(TextTokenizer::from_json(file.to_string().as_bytes()).unwrap())
            })
            .clone()
    }

    /// Llama 2's kind: byte fallback, `▁` for spaces, the first one stripped; `hello` is one token.
    pub(crate) fn sentence_piece() -> Arc<TextTokenizer> {
        static TOKENIZER: OnceLock<Arc<TextTokenizer>> = OnceLock::new();
        TOKENIZER
            .get_or_init(|| {
                let mut vocab = serde_json::Map::new();
                let mut add = |token: String| {
                    let id = vocab.len();
                    vocab.insert(token, json!(id));
                };
                add("<unk>".into());
                (0..=255).for_each(|byte| add(format!("<0x{byte:02X}>")));
                ('a'..='z').for_each(|letter| add(letter.to_string()));
                for token in ["▁", "he", "ll", "hell", "hello", "▁hello"] {
                    add(token.into());
                }
                let file = json!({
                    "version": "1.0",
                    "added_tokens": [],
                    "normalizer": {"type": "Sequence", "normalizers": [
                        {"type": "Prepend", "prepend": "▁"},
                        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
                    "decoder": {"type": "Sequence", "decoders": [
                        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                        {"type": "ByteFallback"}, {"type": "Fuse"},
                        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
                    "model": {"type": "BPE", "vocab": vocab, "unk_token": "<unk>", "fuse_unk": true,
                              "byte_fallback": true,
                              "merges": [["h", "e"], ["l", "l"], ["he", "ll"], ["hell", "o"], ["▁", "hello"]]},
                });
                Arc::new(TextTokenizer::from_json(file.to_string().as_bytes()).unwrap())
            })
            .clone()
    }

    #[test]
    fn byte_characters_are_a_bijection() {
        let chars = byte_chars();
        assert_eq!(chars[b' ' as usize], 'Ġ');
        assert_eq!(chars[b'\n' as usize], 'Ċ');
        let distinct: std::collections::BTreeSet<char> = chars.into_iter().collect();
        assert_eq!(distinct.len(), 256);
    }

    #[test]
    fn truncation_in_the_file_is_ignored() {
        assert_eq!(byte_level().encode("0123456789", false).unwrap().len(), 10);
    }

    #[test]
    fn bytes_of_single_tokens() {
        let tokenizer = byte_level();
        let tokens = tokenizer.encode(" é", false).unwrap();
        let bytes: Vec<Vec<u8>> = tokens.iter().map(|&token| tokenizer.token_bytes(token)).collect();
        assert_eq!(bytes, [vec![b' '], vec![0xC3], vec![0xA9]]);
        assert_eq!(tokenizer.token_bytes(256), b"<|end|>");
        assert_eq!(tokenizer.token_bytes(9999), b"");
        let tokenizer = sentence_piece();
        let hello = tokenizer.token_id("▁hello").unwrap();
        assert_eq!(tokenizer.token_bytes(hello), b" hello");
        assert_eq!(tokenizer.token_bytes(1 + 0xE2), [0xE2]);
    }

    #[test]
    fn the_vocabulary_tells_text_from_control() {
        let tokenizer = byte_level();
        let texts = tokenizer.token_texts();
        assert_eq!(texts.len(), 257);
        assert_eq!(texts[0xE9], TokenText::Bytes(vec![0xE9]));
        assert_eq!(texts[256], TokenText::Special("<|end|>".into()));
        assert_eq!(tokenizer.special_tokens(&["<|end|>", "a", "b"]), [(256, "<|end|>".to_owned())]);
        assert!(Arc::ptr_eq(&tokenizer.vocabulary().unwrap(), &tokenizer.vocabulary().unwrap()));
        let texts = sentence_piece().token_texts();
        assert_eq!(texts[1 + 0xE9], TokenText::Bytes(vec![0xE9]));
        assert!(texts.contains(&TokenText::Bytes(b" hello".to_vec())));
    }

    #[test]
    fn the_lower_bound_of_tokens_holds() {
        let tokenizer = byte_level();
        let text = "x".repeat(1000);
        assert!(tokenizer.least_tokens(text.len()) <= tokenizer.encode(&text, false).unwrap().len());
        assert!(tokenizer.least_tokens(text.len()) > 0);
        assert_eq!(sentence_piece().least_tokens(text.len()), 0);
    }
}
