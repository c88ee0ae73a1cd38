//! OpenAI's API: `/v1/chat/completions`, `/v1/completions`, `/v1/embeddings`, `/v1/models`; and
//! `/v1/rerank` and `/v1/score`, which others have added.

pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod embeddings;
pub(crate) mod error;
pub(crate) mod fields;
pub(crate) mod models;
mod options;
pub(crate) mod rerank;
mod run;
mod stream;
mod structured;
mod tools;
mod types;

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::response::{IntoResponse, Response};
use serde::Serialize;
use tangram_node::DeployedModel;

use self::error::ApiError;
use self::fields::Fields;
use self::run::{ChoiceEvent, Delta, Run};
use crate::body::RequestBody;
use crate::headers::add_timing;
use crate::text::{TextTokenizer, encode_all};
use crate::{Gateway, ServedModel};

/// The model that a request names.
fn find_model(gateway: &Gateway, fields: &Fields<'_>) -> Result<Arc<DeployedModel>, ApiError> {
    let name = fields.string("model")?.ok_or_else(|| ApiError::param("model", "'model' is required"))?;
    gateway.node.model(&name).ok_or_else(|| ApiError::unknown_model(&name))
}

/// The fields of a request for text and the model that it names, which is noted in `served`.
fn read_request<'a>(
    gateway: &Gateway,
    body: &'a RequestBody,
    served: &mut Option<Arc<DeployedModel>>,
) -> Result<(Fields<'a>, Arc<DeployedModel>), ApiError> {
    let fields = Fields::parse(&body.0)?;
    let model = find_model(gateway, &fields)?;
    *served = Some(model.clone());
    if !model.spec.generates() {
        return Err(ApiError::wrong_task(&model));
    }
    Ok((fields, model))
}

/// The model's tokenizer, if it has one.
async fn tokenizer(
    gateway: &Gateway,
    model: &Arc<DeployedModel>,
) -> Result<Option<Arc<TextTokenizer>>, ApiError> {
    gateway.texts.tokenizer(model).await.map_err(|error| {
        tracing::error!(model = model.name, %error, "the tokenizer cannot be loaded");
        ApiError::internal(format!(
            "The tokenizer of `{}` cannot be loaded ({error}); re-deploy the model",
            model.name
        ))
    })
}

/// Token ids of texts; a text that cannot fit into the context is refused before it is tokenized.
async fn encode(
    model: &DeployedModel,
    tokenizer: &Arc<TextTokenizer>,
    texts: Vec<String>,
    add_special_tokens: bool,
    param: &str,
) -> Result<Vec<Vec<u32>>, ApiError> {
    let least = texts.iter().map(|text| tokenizer.least_tokens(text.len())).max().unwrap_or(0);
    if least > model.context {
        return Err(options::too_long(model, param, &format!("at least {least}")));
    }
    encode_all(tokenizer, texts, add_special_tokens)
        .await
        .map_err(|error| ApiError::param(param, format!("'{param}' cannot be tokenized: {error}")))
}

/// A choice after its end.
#[derive(Debug, Default)]
struct FinishedChoice {
    delta: Delta,
    reason: Option<&'static str>,
}

/// Waits for all choices.
async fn collect(run: &mut Run) -> Result<Vec<FinishedChoice>, ApiError> {
    let mut choices: Vec<FinishedChoice> =
        std::iter::repeat_with(FinishedChoice::default).take(run.choices()).collect();
    while let Some((index, event)) = run.next().await? {
        let Some(choice) = choices.get_mut(index) else { continue };
        match event {
            ChoiceEvent::Delta(delta) => choice.delta.append(delta),
            ChoiceEvent::Finished { delta, reason, .. } => {
                choice.delta.append(delta);
                choice.reason = Some(reason);
            }
            ChoiceEvent::Started(_) => {}
            ChoiceEvent::Failed(error) => return Err(error.into()),
        }
    }
    Ok(choices)
}

/// A complete answer with the timing headers.
fn respond(body: &impl Serialize, timing: &tangram_node::Timing) -> Response {
    let mut response = axum::Json(body).into_response();
    add_timing(response.headers_mut(), timing, true);
    response
}

/// Turns a handler's result into the response and notes which model it was about, for the metrics.
fn finish(model: Option<Arc<DeployedModel>>, result: Result<Response, ApiError>) -> Response {
    let mut response = result.into_response();
    if let Some(model) = model {
        response.extensions_mut().insert(ServedModel(model.name.clone()));
    }
    response
}

/// Unix seconds.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}
