//! Text in and out of models: tokenizers, chat templates, detokenizing, stop strings. Knows nothing of HTTP.

mod detokenizer;
mod stop;
mod template;
mod tokenizer;
mod tools;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tangram_node::{DeployedModel, TextPair};

pub(crate) use detokenizer::Detokenizer;
pub(crate) use stop::{StopMatcher, StopOutcome};
pub(crate) use template::{ChatInput, ChatTemplate};
pub(crate) use tokenizer::TextTokenizer;
#[cfg(test)]
pub(crate) use tokenizer::tests::byte_level as test_tokenizer;
pub(crate) use tools::{Function, ToolFormat, ToolParser, ToolPiece};

/// Text that is tokenized on the thread that serves the request; more goes to a thread that may block.
const INLINE_BYTES: usize = 16 << 10;

/// Tokenizers and templates of deployed models, loaded when first asked for and shared by models that have equal ones.
#[derive(Debug, Default)]
pub(crate) struct Texts {
    /// By the hash of `tokenizer.json`. The inner lock is held while one is loaded, so that it is loaded once.
    tokenizers: Mutex<HashMap<String, Slot>>,
    /// By the template's text.
    templates: Mutex<HashMap<String, Arc<ChatTemplate>>>,
}

type Slot = Arc<Mutex<Option<Arc<TextTokenizer>>>>;

impl Texts {
    /// The model's tokenizer; `None` if it has none. The error names the file.
    pub(crate) async fn tokenizer(
        self: &Arc<Self>,
        model: &Arc<DeployedModel>,
    ) -> Result<Option<Arc<TextTokenizer>>, String> {
        let Some(hash) = &model.tokenizer else { return Ok(None) };
        let slot = self.slot(hash);
        if let Ok(loaded) = slot.try_lock()
            && let Some(tokenizer) = loaded.as_ref()
        {
            return Ok(Some(tokenizer.clone()));
        }
        let (texts, model) = (self.clone(), model.clone());
        match tokio::task::spawn_blocking(move || texts.load_tokenizer(&model)).await {
            Ok(loaded) => loaded,
            Err(_) => Err("loading the tokenizer failed".into()),
        }
    }

    /// The model's compiled chat template; `None` if it has none.
    pub(crate) fn template(&self, model: &DeployedModel) -> Result<Option<Arc<ChatTemplate>>, String> {
        let Some(source) = &model.chat_template else { return Ok(None) };
        if let Some(template) = lock(&self.templates).get(source) {
            return Ok(Some(template.clone()));
        }
        let template = Arc::new(ChatTemplate::new(source)?);
        lock(&self.templates).insert(source.clone(), template.clone());
        Ok(Some(template))
    }

    /// Loads what a model needs before somebody waits for it. Blocking; errors come again with the first request.
    pub(crate) fn warm(&self, model: &DeployedModel) {
        if let Err(error) = self.load_tokenizer(model) {
            tracing::warn!(model = model.name, %error, "the tokenizer cannot be loaded");
        }
        if let Err(error) = self.template(model) {
            tracing::warn!(model = model.name, %error, "the chat template cannot be used");
        }
    }

    /// Forgets what none of these models needs.
    pub(crate) fn retain(&self, models: &[Arc<DeployedModel>]) {
        lock(&self.tokenizers)
            .retain(|hash, _| models.iter().any(|model| model.tokenizer.as_ref() == Some(hash)));
        lock(&self.templates)
            .retain(|source, _| models.iter().any(|model| model.chat_template.as_ref() == Some(source)));
    }

    fn slot(&self, hash: &str) -> Slot {
        lock(&self.tokenizers).entry(hash.to_owned()).or_default().clone()
    }

    fn load_tokenizer(&self, model: &DeployedModel) -> Result<Option<Arc<TextTokenizer>>, String> {
        let Some(hash) = &model.tokenizer else { return Ok(None) };
        let slot = self.slot(hash);
        let mut loaded = lock(&slot);
        if let Some(tokenizer) = loaded.as_ref() {
            return Ok(Some(tokenizer.clone()));
        }
        // An error is not kept: the next request tries again.
        let tokenizer = Arc::new(TextTokenizer::load(&model.directory.join("tokenizer.json"))?);
        *loaded = Some(tokenizer.clone());
        Ok(Some(tokenizer))
    }
}

/// Token ids of several texts, in order.
pub(crate) async fn encode_all(
    tokenizer: &Arc<TextTokenizer>,
    texts: Vec<String>,
    add_special_tokens: bool,
) -> Result<Vec<Vec<u32>>, String> {
    let bytes: usize = texts.iter().map(String::len).sum();
    let tokenizer = tokenizer.clone();
    let encode = move || texts.iter().map(|text| tokenizer.encode(text, add_special_tokens)).collect();
    if bytes <= INLINE_BYTES {
        return encode();
    }
    tokio::task::spawn_blocking(encode)
        .await
        .unwrap_or_else(|_| Err("the text could not be tokenized".into()))
}

/// Pairs of texts as token ids, in order.
pub(crate) async fn encode_pairs(
    tokenizer: &Arc<TextTokenizer>,
    pairs: Vec<(String, String)>,
) -> Result<Vec<TextPair>, String> {
    let bytes: usize = pairs.iter().map(|(first, second)| first.len() + second.len()).sum();
    let tokenizer = tokenizer.clone();
    let encode = move || pairs.iter().map(|(first, second)| tokenizer.encode_pair(first, second)).collect();
    if bytes <= INLINE_BYTES {
        return encode();
    }
    tokio::task::spawn_blocking(encode)
        .await
        .unwrap_or_else(|_| Err("the texts could not be tokenized".into()))
}

/// Locks; a panic of another holder left nothing half done in any of the maps here.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
