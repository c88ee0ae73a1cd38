//! Turns tokens into text one at a time. Never splits a character and never shows U+FFFD for one that is incomplete.
//!
//! The scheme is the usual one of a prefix offset and a read offset (text-generation-inference, vLLM): decode a short
//! window of tokens and show what comes after the part that was shown before. The window begins with tokens that were
//! shown already, so that decoders which treat the first token specially (SentencePiece strips its leading space)
//! give the text as it is in the middle of a sequence.

use std::sync::Arc;

use super::tokenizer::TextTokenizer;

/// Tokens of the prompt that the first window begins with (vLLM uses as many).
const PROMPT_TOKENS: usize = 5;

/// Tokens that may wait for the end of a character. A character takes at most four bytes, so more of them are no
/// character, or tokens without text.
const MAX_PENDING: usize = 16;

/// The most tokens that an incomplete character can have.
const MAX_INCOMPLETE: usize = 3;

/// Decodes one sequence.
#[derive(Debug)]
pub(crate) struct Detokenizer {
    tokenizer: Arc<TextTokenizer>,
    skip_special_tokens: bool,
    window: Vec<u32>,
    /// Tokens at the start of the window that belong to an earlier window, too.
    read: usize,
    /// Bytes of the window's text that were shown.
    shown: usize,
    /// Replacement characters that stand for the end of the prompt. They are not part of the output.
    prompt_rest: usize,
}

impl Detokenizer {
    /// Begins after `prompt`, whose text is not shown.
    pub(crate) fn new(tokenizer: Arc<TextTokenizer>, prompt: &[u32], skip_special_tokens: bool) -> Self {
        let window = prompt[prompt.len().saturating_sub(PROMPT_TOKENS)..].to_vec();
        let mut detokenizer = Detokenizer {
            tokenizer,
            skip_special_tokens,
            read: window.len(),
            window,
            shown: 0,
            prompt_rest: 0,
        };
        let text = detokenizer.decode();
        // A character that the prompt leaves incomplete is shown once the output completes it.
        detokenizer.shown = complete(&text);
        detokenizer.prompt_rest =
            text.chars().rev().take_while(|&c| c == char::REPLACEMENT_CHARACTER).count();
        detokenizer
    }

    /// Takes the next token; the text that it completes, which may be empty.
    pub(crate) fn push(&mut self, token: u32) -> String {
        self.window.push(token);
        let text = self.decode();
        let end = complete(&text);
        let delta = self.own(text.get(self.shown..end).unwrap_or_default());
        if end == text.len() && !delta.is_empty() {
            self.window.drain(..self.read);
            self.restart();
            return delta;
        }
        self.shown = self.shown.max(end);
        if self.window.len() - self.read <= MAX_PENDING {
            return delta;
        }
        if end == text.len() {
            // Nothing but tokens without text.
            self.window.drain(..self.window.len() - PROMPT_TOKENS);
            self.restart();
            return delta;
        }
        // Nothing but bytes that are no text: show them, except for what may still become a character.
        let pending = self.window.split_off(self.window.len() - MAX_INCOMPLETE);
        let text = self.decode();
        let rest = self.own(text.get(self.shown..).unwrap_or_default());
        self.window = pending;
        self.read = 0;
        self.shown = 0;
        delta + &rest
    }

    /// Shows a text in place of the next token, after whatever is still held back.
    pub(crate) fn show(&mut self, text: &str) -> String {
        let held = self.finish();
        self.window.clear();
        self.read = 0;
        self.shown = 0;
        held + text
    }

    /// The rest at the end of the sequence: what `tokenizer.decode` gives for it, replacement characters included.
    pub(crate) fn finish(&mut self) -> String {
        let text = self.decode();
        let delta = self.own(text.get(self.shown..).unwrap_or_default());
        self.shown = text.len();
        delta
    }

    /// What of a text is the output's: bytes that the prompt ends with, and of which the output made no character, are
    /// replaced before it.
    fn own(&mut self, delta: &str) -> String {
        let mut own = delta.chars();
        if !delta.is_empty() {
            for _ in 0..std::mem::take(&mut self.prompt_rest) {
                let Some(rest) = own.as_str().strip_prefix(char::REPLACEMENT_CHARACTER) else { break };
                own = rest.chars();
            }
        }
        own.as_str().to_owned()
    }

    /// Makes the window's tokens the context of those to come.
    fn restart(&mut self) {
        self.read = self.window.len();
        self.shown = self.decode().len();
    }

    fn decode(&self) -> String {
        self.tokenizer.decode(&self.window, self.skip_special_tokens)
    }
}

/// Bytes of `text` without the replacement characters at its end, which may stand for an incomplete character. There
/// can be more than one: a byte-fallback decoder replaces every byte of a run that is not complete.
fn complete(text: &str) -> usize {
    text.trim_end_matches(char::REPLACEMENT_CHARACTER).len()
}

#[cfg(test)]
mod tests {
    use super::super::tokenizer::tests::{byte_level, sentence_piece};
    use super::*;
    use proptest::prelude::*;

    fn stream(tokenizer: &Arc<TextTokenizer>, prompt: &[u32], tokens: &[u32]) -> (Vec<String>, String) {
        let mut detokenizer = Detokenizer::new(tokenizer.clone(), prompt, true);
        let pieces: Vec<String> = tokens.iter().map(|&token| detokenizer.push(token)).collect();
        let rest = detokenizer.finish();
        (pieces, rest)
    }

    #[test]
    fn holds_an_incomplete_character_back() {
        let tokenizer = byte_level();
        let tokens = tokenizer.encode("a€b", false).unwrap();
        assert_eq!(tokens.len(), 5, "one token per byte");
        let (pieces, rest) = stream(&tokenizer, &[], &tokens);
        assert_eq!(pieces, ["a", "", "", "€", "b"]);
        assert_eq!(rest, "");
        let (pieces, rest) = stream(&tokenizer, &[], &tokens[..3]);
        assert_eq!(pieces.concat(), "a");
        assert_eq!(rest, "\u{FFFD}");
    }

    #[test]
    fn a_character_begun_by_the_prompt_is_completed() {
        let tokenizer = byte_level();
        let tokens = tokenizer.encode("x€y", false).unwrap();
        let (pieces, rest) = stream(&tokenizer, &tokens[..2], &tokens[2..]);
        assert_eq!(pieces.concat() + &rest, "€y");
    }

    #[test]
    fn a_character_that_nobody_completes_is_not_part_of_the_output() {
        let byte_level = byte_level();
        let euro = byte_level.encode("€", false).unwrap();
        let text = byte_level.encode("no", false).unwrap();
        for cut in 1..euro.len() {
            let (pieces, rest) = stream(&byte_level, &euro[..cut], &text);
            assert_eq!(pieces.concat() + &rest, "no", "{cut} bytes of the character in the prompt");
            let (pieces, rest) = stream(&byte_level, &euro[..cut], &[]);
            assert_eq!(pieces.concat() + &rest, "");
            // An incomplete character of the output's own is replaced as ever.
            let (pieces, rest) = stream(&byte_level, &euro[..cut], &[&euro[..1], &text].concat());
            assert_eq!(pieces.concat() + &rest, "\u{FFFD}no");
        }
        // A byte that begins no character, then one that does.
        let prompt = [euro[1], euro[0]];
        let (pieces, rest) = stream(&byte_level, &prompt, &[&euro[1..], &text].concat());
        assert_eq!(pieces.concat() + &rest, "€no");
        let sentence_piece = sentence_piece();
        let euro = sentence_piece.encode("€", false).unwrap();
        let euro = &euro[euro.len() - 3..];
        let text = sentence_piece.encode("hello", false).unwrap();
        let whole = stream(&sentence_piece, euro, &text);
        let (pieces, rest) = stream(&sentence_piece, &euro[..2], &text);
        assert_eq!(pieces.concat() + &rest, whole.0.concat() + &whole.1);
    }

    #[test]
    fn spaces_of_sentence_piece_survive() {
        let tokenizer = sentence_piece();
        let tokens = tokenizer.encode("hello hello €", false).unwrap();
        let (pieces, rest) = stream(&tokenizer, &[], &tokens);
        assert_eq!(pieces.concat() + &rest, "hello hello €");
        let (pieces, rest) = stream(&tokenizer, &tokens[..1], &tokens[1..]);
        assert_eq!(pieces.concat() + &rest, " hello €", "the space after the prompt belongs to the output");
    }

    #[test]
    fn special_tokens_are_skipped_or_shown() {
        let tokenizer = byte_level();
        let end = tokenizer.token_id("<|end|>").unwrap();
        let letter = tokenizer.encode("a", false).unwrap()[0];
        assert_eq!(stream(&tokenizer, &[], &[letter, end, letter]).0.concat(), "aa");
        let mut detokenizer = Detokenizer::new(tokenizer, &[], false);
        assert_eq!(detokenizer.push(letter) + &detokenizer.push(end), "a<|end|>");
    }

    #[test]
    fn a_text_can_stand_for_a_token() {
        let tokenizer = byte_level();
        let tokens = tokenizer.encode("a€b", false).unwrap();
        let mut detokenizer = Detokenizer::new(tokenizer, &[], true);
        let mut text: String = tokens[..3].iter().map(|&token| detokenizer.push(token)).collect();
        text += &detokenizer.show("[X]");
        text.extend(tokens[1..].iter().map(|&token| detokenizer.push(token)));
        assert_eq!(text, "a\u{FFFD}[X]€b");
    }

    #[test]
    fn endless_invalid_bytes_are_shown_in_bounded_time() {
        let tokenizer = byte_level();
        let invalid = tokenizer.token_id("Ģ").unwrap(); // byte 0x80
        let (pieces, rest) = stream(&tokenizer, &[], &[invalid; 500]);
        assert_eq!((pieces.concat() + &rest).chars().count(), 500);
        let mut tokens = vec![invalid; 100];
        tokens.extend(tokenizer.encode("€", false).unwrap());
        assert!(stream(&tokenizer, &[], &tokens).0.concat().ends_with('€'));
    }

    #[test]
    fn many_tokens_without_text_do_no_harm() {
        let tokenizer = byte_level();
        let mut tokens = vec![tokenizer.token_id("<|end|>").unwrap(); 100];
        tokens.extend(tokenizer.encode("a€", false).unwrap());
        let mut detokenizer = Detokenizer::new(tokenizer, &[], true);
        let text: String = tokens.iter().map(|&token| detokenizer.push(token)).collect();
        assert_eq!(text, "a€");
        assert!(detokenizer.window.len() <= MAX_PENDING + PROMPT_TOKENS);
    }

    proptest! {
        #[test]
        fn byte_level_pieces_make_up_the_text(text in any::<String>(), split in 0usize..20) {
            let tokenizer = byte_level();
            let tokens = tokenizer.encode(&text, false).unwrap();
            let (pieces, rest) = stream(&tokenizer, &[], &tokens);
            let replaced = |text: &str| text.contains(char::REPLACEMENT_CHARACTER);
            prop_assert!(!replaced(&pieces.concat()) || replaced(&text));
            prop_assert_eq!(pieces.concat() + &rest, text.as_str());
            // Cut anywhere, the shown pieces are a prefix of the text.
            let (pieces, _) = stream(&tokenizer, &[], &tokens[..split.min(tokens.len())]);
            prop_assert!(text.starts_with(&pieces.concat()));
        }

        #[test]
        fn sentence_piece_pieces_make_up_the_text(text in "[a-z€é😀 ]{0,30}") {
            let tokenizer = sentence_piece();
            let tokens = tokenizer.encode(&text, false).unwrap();
            let (pieces, rest) = stream(&tokenizer, &[], &tokens);
            prop_assert_eq!(pieces.concat() + &rest, tokenizer.decode(&tokens, true));
        }

        /// Arbitrary token ids, also ones that are no valid text: never a panic, never a lost byte at the end.
        #[test]
        fn any_tokens(tokens in prop::collection::vec(0u32..300, 0..80)) {
            for tokenizer in [byte_level(), sentence_piece()] {
                let (pieces, rest) = stream(&tokenizer, &[], &tokens);
                let text = pieces.concat() + &rest;
                prop_assert!(tokens.is_empty() || text.len() <= 4 * 12 * tokens.len());
            }
        }
    }
}
