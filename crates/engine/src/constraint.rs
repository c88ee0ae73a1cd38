//! Constrained output: which tokens a JSON schema, a regular expression or a grammar allows next.
//!
//! The grammars are llguidance's (an Earley parser over derivative-based lexers, walked along the trie of the
//! vocabulary). What this file adds is where the work is done: the mask for the next token is computed on a thread of
//! the vocabulary's own as soon as the last token is known, so that it is ready, or nearly so, when the forward pass in
//! between has run. It must never block a sequence that has no constraint, and never panic on a grammar from outside.

use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, SimpleVob, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

/// White space that may stand between two JSON tokens: enough for a line break with deep indentation, but bounded,
/// because a model that is only allowed white space and punctuation may well go on with white space for ever.
const JSON_WHITE_SPACE: &str = r"[\x20\x0A\x0D\x09]{1,40}";

/// Largest magnitude of a number that a schema does not bound itself. Without a bound, and without one for the
/// exponent, a model in a loop writes numbers that no parser can hold; up to here integers are exact in binary64.
const LARGEST_NUMBER: i64 = (1 << 53) - 1;

/// What a token stands for in text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenText {
    /// These bytes, whole characters or not.
    Bytes(Vec<u8>),
    /// Nothing: a control token with a name. Grammars may name it as `<name>`; text never matches it.
    Special(String),
}

/// What the output must look like.
#[derive(Clone, Debug, PartialEq)]
pub enum Grammar {
    /// A JSON document that this schema accepts.
    JsonSchema(Value),
    /// Text that this regular expression (the `regex` crate's syntax, without look-around) matches as a whole.
    Regex(String),
    /// Text of a grammar in llguidance's dialect of Lark.
    Lark(String),
}

impl Grammar {
    /// A JSON object with any content.
    pub fn json_object() -> Grammar {
        Grammar::JsonSchema(json!({"type": "object"}))
    }

    /// One of these texts.
    pub fn choice<S: AsRef<str>>(choices: &[S]) -> Grammar {
        let quoted: Vec<String> = choices.iter().map(|choice| json!(choice.as_ref()).to_string()).collect();
        Grammar::Lark(format!("start: {}", quoted.join(" | ")))
    }

    /// A document of this schema as a part of a [`Grammar::Lark`]: what stands to the right of a rule's colon.
    pub fn lark_json(schema: Value) -> String {
        format!("%json {}", bounded(schema))
    }
}

/// The schema with bounds for what it leaves without: white space and numbers.
fn bounded(mut schema: Value) -> Value {
    if schema == Value::Bool(true) {
        schema = json!({});
    }
    bound_numbers(&mut schema);
    if let Value::Object(schema) = &mut schema {
        schema.entry("x-guidance").or_insert_with(|| json!({"whitespace_pattern": JSON_WHITE_SPACE}));
    }
    schema
}

fn bound_numbers(schema: &mut Value) {
    let map = match schema {
        Value::Object(map) => map,
        Value::Array(items) => return items.iter_mut().for_each(bound_numbers),
        _ => return,
    };
    let number = |kind: &Value| matches!(kind.as_str(), Some("number" | "integer"));
    let numeric = match map.get("type") {
        Some(Value::Array(kinds)) => kinds.iter().any(number),
        Some(kind) => number(kind),
        // Anything, numbers too, unless another keyword says what.
        None => !["$ref", "anyOf", "oneOf", "allOf", "not", "if"].iter().any(|key| map.contains_key(*key)),
    };
    let given =
        ["minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"].map(|key| map.get(key).cloned());
    let moderate = |bound: &Value| bound.as_f64().is_none_or(|bound| bound.abs() < LARGEST_NUMBER as f64);
    // Bounds beyond ours, and values that are listed, stay as they are.
    if numeric
        && !map.contains_key("enum")
        && !map.contains_key("const")
        && given.iter().flatten().all(moderate)
    {
        if given[..2].iter().all(Option::is_none) {
            map.insert("minimum".to_owned(), json!(-LARGEST_NUMBER));
        }
        if given[2..].iter().all(Option::is_none) {
            map.insert("maximum".to_owned(), json!(LARGEST_NUMBER));
        }
    }
    for (key, part) in map {
        match (key.as_str(), part) {
            // Schemas by name.
            ("properties" | "patternProperties" | "$defs" | "definitions", Value::Object(parts)) => {
                parts.values_mut().for_each(bound_numbers);
            }
            // Documents.
            ("const" | "enum" | "default" | "example" | "examples", _) => {}
            (_, part) => bound_numbers(part),
        }
    }
}

/// The tokens of one tokenizer, prepared for constraints. Built once, shared by all models with the tokenizer.
pub struct Vocabulary {
    factory: ParserFactory,
    /// Stands for the end of the text; one more than the highest token id.
    end: u32,
    jobs: Sender<Job>,
}

impl fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vocabulary").field("tokens", &self.end).finish_non_exhaustive()
    }
}

/// A matcher whose next mask is wanted, and where both go.
struct Job {
    matcher: Matcher,
    done: std::sync::mpsc::SyncSender<Ready>,
}

/// A matcher between two tokens, with what it allows next.
struct Ready {
    matcher: Matcher,
    mask: Result<SimpleVob, String>,
}

impl Ready {
    fn compute(mut matcher: Matcher) -> Ready {
        let mask = matcher.compute_mask().map_err(|error| first_line(&error.to_string()));
        Ready { matcher, mask }
    }
}

impl Vocabulary {
    /// Prepares tokens, by id; takes up to a second for a large vocabulary, and a thread as long as it lives.
    ///
    /// # Errors
    /// When the tokens cannot be put into a trie, or the thread cannot be started.
    pub fn new(tokens: &[TokenText]) -> Result<Arc<Vocabulary>, String> {
        let end = u32::try_from(tokens.len()).map_err(|_| "the vocabulary is too large".to_owned())?;
        let mut words: Vec<Vec<u8>> = tokens
            .iter()
            .map(|token| match token {
                TokenText::Bytes(bytes) => bytes.clone(),
                TokenText::Special(name) => special_word(name),
            })
            .collect();
        words.push(special_word("<|tangram_end|>"));
        // The trie takes lengths in 8 bits and insists on a marker that no text has; such tokens are never allowed.
        for (word, token) in words.iter_mut().zip(tokens) {
            let broken = matches!(token, TokenText::Bytes(bytes) if bytes.contains(&0xFF));
            if word.len() > usize::from(u8::MAX) || broken {
                word.clear();
            }
        }
        let trie = TokTrie::from(&TokRxInfo::new(end + 1, end), &words);
        let env: llguidance::toktrie::TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new(
            &env,
            InferenceCapabilities::default(),
            &llguidance::earley::SlicedBiasComputer::general_slices(),
        )
        .map_err(|error| error.to_string())?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        let (jobs, queue) = channel::<Job>();
        std::thread::Builder::new()
            .name("constraints".to_owned())
            .spawn(move || {
                for Job { matcher, done } in queue {
                    // A sequence that has gone wants no mask any more.
                    let _ = done.send(Ready::compute(matcher));
                }
            })
            .map_err(|error| error.to_string())?;
        Ok(Arc::new(Vocabulary { factory, end, jobs }))
    }

    /// Compiles a grammar; blocks for milliseconds, for large schemas for longer (the work is bounded).
    ///
    /// # Errors
    /// What is wrong with the grammar, or which of its features is not supported.
    pub fn compile(self: &Arc<Self>, grammar: &Grammar) -> Result<CompiledGrammar, String> {
        let top = match grammar {
            Grammar::JsonSchema(schema) => TopLevelGrammar::from_json_schema(bounded(schema.clone())),
            Grammar::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Grammar::Lark(lark) => TopLevelGrammar::from_lark(lark.clone()),
        };
        let mut matcher = Matcher::new(self.factory.create_parser(top));
        if let Some(error) = matcher.get_error() {
            return Err(error);
        }
        let mask = matcher.compute_mask_or_eos().map_err(|error| error.to_string())?;
        if mask.is_zero() {
            return Err("no text matches it".to_owned());
        }
        Ok(CompiledGrammar { vocabulary: self.clone(), matcher: Arc::new(matcher), mask })
    }
}

/// How the trie marks tokens that text never matches.
fn special_word(name: &str) -> Vec<u8> {
    let mut word = vec![TokTrie::SPECIAL_TOKEN_MARKER];
    word.extend_from_slice(name.as_bytes());
    word
}

fn first_line(message: &str) -> String {
    message.lines().next().unwrap_or_default().to_owned()
}

/// A grammar over a vocabulary, ready to constrain any number of sequences.
#[derive(Clone)]
pub struct CompiledGrammar {
    vocabulary: Arc<Vocabulary>,
    matcher: Arc<Matcher>,
    /// What it allows first.
    mask: SimpleVob,
}

impl fmt::Debug for CompiledGrammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompiledGrammar").field("vocabulary", &self.vocabulary).finish_non_exhaustive()
    }
}

impl CompiledGrammar {
    /// The constraint of one sequence, which ends by one of `end_tokens` where the grammar lets it.
    pub fn start(&self, end_tokens: &[u32]) -> Constraint {
        // Not a shallow clone: those share the lexer, and with it a lock between the two threads.
        let ready = Ready { matcher: self.matcher.deep_clone(), mask: Ok(self.mask.clone()) };
        Constraint {
            vocabulary: self.vocabulary.clone(),
            state: State::Here(Box::new(ready)),
            end_tokens: end_tokens.to_vec(),
        }
    }
}

/// The constraint of one running sequence: [`Constraint::restrict`] and [`Constraint::accept`] in turn.
pub struct Constraint {
    vocabulary: Arc<Vocabulary>,
    state: State,
    end_tokens: Vec<u32>,
}

enum State {
    Here(Box<Ready>),
    /// The mask is being computed.
    Away(Receiver<Ready>),
    /// Nothing can follow any more.
    Over,
}

impl fmt::Debug for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Constraint").field("vocabulary", &self.vocabulary).finish_non_exhaustive()
    }
}

impl Constraint {
    /// Makes all tokens impossible (−infinity) that may not follow. Waits for the mask if it is not there yet.
    ///
    /// # Errors
    /// When the grammar became too complex on the way, or nothing at all may follow.
    pub fn restrict(&mut self, logits: &mut [f32]) -> Result<(), String> {
        self.wait()?;
        let State::Here(ready) = &self.state else { return Err("the constraint has ended".to_owned()) };
        let words = ready.mask.as_ref().map_err(Clone::clone)?.as_slice();
        let end = self.vocabulary.end;
        let allowed = |token: usize| words.get(token / 32).is_some_and(|word| word >> (token % 32) & 1 == 1);
        let may_end = allowed(end as usize);
        let ends: Vec<(u32, f32)> = self
            .end_tokens
            .iter()
            .filter(|_| may_end)
            .filter_map(|&token| Some((token, *logits.get(token as usize)?)))
            .collect();
        let mut any = !ends.is_empty();
        for (word, logits) in logits.chunks_mut(32).enumerate() {
            let mut bits = words.get(word).copied().unwrap_or(0);
            if word == end as usize / 32 {
                bits &= !(1 << (end % 32));
            }
            match bits {
                0 => logits.fill(f32::NEG_INFINITY),
                _ => {
                    any = true;
                    for (bit, logit) in logits.iter_mut().enumerate() {
                        if bits >> bit & 1 == 0 {
                            *logit = f32::NEG_INFINITY;
                        }
                    }
                }
            }
        }
        for (token, logit) in ends {
            if let Some(place) = logits.get_mut(token as usize) {
                *place = logit;
            }
        }
        if any { Ok(()) } else { Err("the constraint allows no token of the model's vocabulary".to_owned()) }
    }

    /// Moves on by a token that was allowed; `true` if the text is complete and nothing may follow it. Otherwise the
    /// next mask is on its way.
    ///
    /// # Errors
    /// When the grammar does not allow the token.
    pub fn accept(&mut self, token: u32) -> Result<bool, String> {
        self.wait()?;
        let State::Here(ready) = std::mem::replace(&mut self.state, State::Over) else { return Ok(true) };
        let Ready { mut matcher, .. } = *ready;
        let allowed = matcher.try_consume_tokens(&[token]).map_err(|error| first_line(&error.to_string()))?;
        if allowed == 0 {
            // An end token, which is no part of the text.
            return match self.end_tokens.contains(&token) {
                true => Ok(true),
                false => Err(format!("token {token} does not match the constraint")),
            };
        }
        if matcher.is_stopped() {
            let reason = matcher.stop_reason();
            return if reason.is_ok() { Ok(true) } else { Err(format!("the constraint failed: {reason}")) };
        }
        let (done, receiver) = sync_channel(1);
        self.state = match self.vocabulary.jobs.send(Job { matcher, done }) {
            Ok(()) => State::Away(receiver),
            // The thread has ended by a panic of the library; its work can be done here.
            Err(job) => State::Here(Box::new(Ready::compute(job.0.matcher))),
        };
        Ok(false)
    }

    /// Waits until the matcher is here, unless it is over.
    fn wait(&mut self) -> Result<(), String> {
        if let State::Away(receiver) = &self.state {
            let ready = receiver.recv().map_err(|_| "the constraint's mask could not be computed".to_owned());
            self.state = State::Here(Box::new(ready?));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::sampling::{Sampler, SamplingParams};

    /// One token per byte, some longer ones, and three specials (of which 256 ends).
    fn vocabulary() -> Arc<Vocabulary> {
        let mut tokens: Vec<TokenText> = (0u8..=255).map(|byte| TokenText::Bytes(vec![byte])).collect();
        tokens.extend(["<end>", "<call>"].map(|name| TokenText::Special(name.to_owned())));
        tokens.extend(["{\"", "\": ", "true", "né"].map(|text| TokenText::Bytes(text.into())));
        tokens.push(TokenText::Bytes(Vec::new()));
        Vocabulary::new(&tokens).unwrap()
    }

    const END: u32 = 256;
    const CALL: u32 = 257;
    const VOCAB: usize = 300;

    fn text(tokens: &[u32]) -> String {
        let bytes = tokens.iter().flat_map(|&token| match token {
            0..=255 => vec![token as u8],
            258 => b"{\"".to_vec(),
            259 => b"\": ".to_vec(),
            260 => b"true".to_vec(),
            261 => "né".into(),
            _ => vec![],
        });
        String::from_utf8(bytes.collect()).unwrap()
    }

    /// Draws from noise until the constraint ends the text; `None` if that takes too long.
    fn draw(grammar: &CompiledGrammar, params: SamplingParams, ends: &[u32]) -> Option<(Vec<u32>, bool)> {
        let seed = params.seed.unwrap_or(0);
        let mut sampler = Sampler::new(params, &[], VOCAB).constrained(Some(grammar.start(ends)));
        let mut tokens = Vec::new();
        for step in 0..2000u64 {
            let noise =
                |token: u64| (seed + step * 1009 + token * 9973).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40;
            let mut logits: Vec<f32> = (0..VOCAB as u64).map(|token| noise(token) as f32 / 1e6).collect();
            // Texts that end some time.
            for token in [END as usize, b'"' as usize, b'}' as usize, b']' as usize, b'1' as usize] {
                logits[token] += 8.0;
            }
            let sampled = sampler.sample(&mut logits).unwrap();
            if ends.contains(&sampled.token) {
                assert!(sampled.complete);
                return Some((tokens, true));
            }
            tokens.push(sampled.token);
            if sampled.complete {
                return Some((tokens, false));
            }
        }
        None
    }

    fn params(seed: u64) -> SamplingParams {
        SamplingParams { seed: Some(seed), ..SamplingParams::default() }
    }

    #[test]
    fn every_way_of_sampling_keeps_to_the_schema() {
        let schema = json!({
            "type": "object", "required": ["name", "ok"], "additionalProperties": false,
            "properties": {"name": {"type": "string", "maxLength": 6}, "ok": {"type": "boolean"},
                           "n": {"type": "integer", "minimum": -3, "maximum": 40}}});
        let grammar = vocabulary().compile(&Grammar::JsonSchema(schema.clone())).unwrap();
        let judge = jsonschema::validator_for(&schema).unwrap();
        let mut documents = std::collections::BTreeSet::new();
        for seed in 0..40 {
            for params in [
                params(seed),
                SamplingParams { temperature: 0.0, ..params(seed) },
                SamplingParams { top_k: Some(3), ..params(seed) },
                SamplingParams { top_p: 0.5, min_p: 0.1, ..params(seed) },
                SamplingParams {
                    repetition_penalty: 1.5,
                    frequency_penalty: 1.0,
                    logprobs: Some(2),
                    ..params(seed)
                },
            ] {
                let (tokens, ended) = draw(&grammar, params, &[END]).unwrap();
                assert!(!ended, "a closed object needs no end token");
                let document: Value = serde_json::from_str(&text(&tokens)).unwrap();
                assert!(judge.is_valid(&document), "{document}");
                documents.insert(document.to_string());
            }
        }
        assert!(documents.len() > 20, "{documents:?}");
    }

    #[test]
    fn the_end_is_allowed_where_the_text_may_end_and_only_there() {
        let vocabulary = vocabulary();
        let grammar = vocabulary.compile(&Grammar::Regex("[0-9]{2,}".into())).unwrap();
        let mut constraint = grammar.start(&[END, u32::from(b'9')]);
        let mut restricted = |token: Option<u8>| {
            if let Some(token) = token {
                assert!(!constraint.accept(u32::from(token)).unwrap());
            }
            let mut logits = vec![1.0; VOCAB];
            constraint.restrict(&mut logits).unwrap();
            (0..VOCAB as u32).filter(|&token| logits[token as usize] == 1.0).collect::<Vec<u32>>()
        };
        let digits: Vec<u32> = (b'0'..=b'9').map(u32::from).collect();
        let with_end: Vec<u32> = digits.iter().copied().chain([END]).collect();
        assert_eq!(restricted(None), digits);
        assert_eq!(restricted(Some(b'7')), digits);
        assert_eq!(restricted(Some(b'7')), with_end);
        assert!(constraint.accept(END).unwrap());
        assert!(constraint.restrict(&mut [0.0; VOCAB]).is_err(), "it is over");
        let mut constraint = grammar.start(&[]);
        assert!(constraint.accept(u32::from(b'x')).is_err());
    }

    #[test]
    fn the_mask_is_as_long_as_the_models_vocabulary() {
        let grammar = vocabulary().compile(&Grammar::choice(&["né", "n\"1\n"])).unwrap();
        for length in [1, 31, 32, 33, 200, 263, 264, 1000] {
            let mut logits = vec![1.0; length];
            let result = grammar.start(&[END]).restrict(&mut logits);
            let allowed: Vec<usize> = (0..length).filter(|&token| logits[token] == 1.0).collect();
            let expected: Vec<usize> =
                [b'n' as usize, 261].into_iter().filter(|&token| token < length).collect();
            assert_eq!(allowed, expected);
            assert_eq!(result.is_ok(), !expected.is_empty());
        }
    }

    #[test]
    fn special_tokens_are_no_text_but_grammars_can_name_them() {
        let vocabulary = vocabulary();
        let text = vocabulary.compile(&Grammar::Regex("(?s:.)*".into())).unwrap();
        let mut logits = vec![1.0; VOCAB];
        text.start(&[END]).restrict(&mut logits).unwrap();
        assert_eq!((logits[END as usize], logits[CALL as usize]), (1.0, f32::NEG_INFINITY));
        let named = vocabulary.compile(&Grammar::Lark("start: <call> \"x\"".into())).unwrap();
        let mut constraint = named.start(&[END]);
        assert!(!constraint.accept(CALL).unwrap());
        assert!(constraint.accept(u32::from(b'x')).unwrap());
    }

    #[test]
    fn numbers_without_bounds_get_some() {
        let bounds = |schema: Value| {
            let bounded = bounded(schema);
            (bounded["minimum"].clone(), bounded["maximum"].clone())
        };
        let (low, high) = (json!(-LARGEST_NUMBER), json!(LARGEST_NUMBER));
        assert_eq!(bounds(json!({"type": "number"})), (low.clone(), high.clone()));
        assert_eq!(bounds(json!({"type": ["null", "integer"], "minimum": 3})), (json!(3), high.clone()));
        assert_eq!(bounds(json!({"type": "number", "exclusiveMaximum": 1})), (low, Value::Null));
        for untouched in [
            json!({"type": "string"}),
            json!({"type": "integer", "enum": [1]}),
            json!({"type": "object", "properties": {"type": {"const": {"type": "number"}}}}),
            json!({"anyOf": [{"$ref": "#/$defs/x"}], "$defs": {"x": {"type": "null"}}}),
        ] {
            let mut schema = untouched.clone();
            bound_numbers(&mut schema);
            assert_eq!(schema, untouched);
        }
        let minimum = json!({"type": "integer", "minimum": 1e300});
        assert_eq!(bounds(minimum), (json!(1e300), Value::Null));
        let vocabulary = vocabulary();
        let kinds: Vec<std::collections::BTreeSet<u8>> =
            [json!({"type": "number"}), json!(true), json!({"items": true})]
                .map(|schema| {
                    let grammar = vocabulary.compile(&Grammar::JsonSchema(schema)).unwrap();
                    let drawn = (0..60).filter_map(|seed| draw(&grammar, params(seed), &[END]));
                    drawn
                        .map(|(tokens, _)| {
                            let document: Value = serde_json::from_str(&text(&tokens)).unwrap();
                            assert!(
                                document.as_f64().is_none_or(|n| n.abs() <= LARGEST_NUMBER as f64),
                                "{document}"
                            );
                            text(&tokens).as_bytes()[0]
                        })
                        .collect()
                })
                .to_vec();
        assert!(kinds[0].iter().all(|&first| first == b'-' || first.is_ascii_digit()), "{kinds:?}");
        for free in &kinds[1..] {
            assert!(free.contains(&b'"') && free.contains(&b'{'), "all other types stay possible: {kinds:?}");
        }
    }

    #[test]
    fn what_cannot_be_done_is_named() {
        let vocabulary = vocabulary();
        let error = |grammar: Grammar| vocabulary.compile(&grammar).unwrap_err();
        let unsupported = json!({"type": "array", "uniqueItems": true, "contains": {"type": "null"}});
        assert!(error(Grammar::JsonSchema(unsupported)).contains("contains"));
        assert!(error(Grammar::JsonSchema(json!({"type": "nonsense"}))).contains("nonsense"));
        assert!(error(Grammar::JsonSchema(json!(false))).to_lowercase().contains("unsatisfiable"));
        assert!(!error(Grammar::Regex("(".into())).is_empty());
        assert!(!error(Grammar::Lark("start: missing".into())).is_empty());
        assert!(!error(Grammar::JsonSchema(json!(5))).is_empty());
    }

    #[test]
    fn sequences_of_one_grammar_do_not_know_of_each_other() {
        let grammar = vocabulary().compile(&Grammar::json_object()).unwrap();
        let alone: Vec<_> = (0..4).map(|seed| draw(&grammar, params(seed), &[END])).collect();
        let drawn = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|seed| {
                    scope.spawn({
                        let grammar = &grammar;
                        move || draw(grammar, params(seed), &[END])
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        assert_eq!(alone, drawn);
    }

    proptest! {
        /// Grammars come from outside: errors, never panics.
        #[test]
        fn any_grammar(text in "[\\[\\](){}*+?|\\\\a-c0-9:,.^$\"/%<> \\n-]{0,24}") {
            let vocabulary = vocabulary();
            let _ = vocabulary.compile(&Grammar::Regex(text.clone()));
            let _ = vocabulary.compile(&Grammar::Lark(text.clone()));
            let _ = vocabulary.compile(&Grammar::Lark(format!("start: {text}")));
        }
    }
}
