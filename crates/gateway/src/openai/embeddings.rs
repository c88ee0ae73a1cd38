//! `POST /v1/embeddings`.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use base64::Engine;
use serde::Serialize;
use tangram_node::DeployedModel;

use super::completions::{read_inputs, tokenize};
use super::error::ApiError;
use super::fields::Fields;
use super::types::Usage;
use crate::Gateway;
use crate::body::RequestBody;

/// Inputs per request; OpenAI's limit.
const MAX_INPUTS: usize = 2048;

#[derive(Debug, Serialize)]
struct EmbeddingList<'a> {
    object: &'static str,
    data: Vec<EmbeddingItem>,
    model: &'a str,
    usage: Usage,
}

#[derive(Debug, Serialize)]
struct EmbeddingItem {
    object: &'static str,
    index: usize,
    embedding: Vector,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Vector {
    Numbers(Vec<f32>),
    /// Little-endian binary32 in base64.
    Base64(String),
}

/// Answers a request.
pub(crate) async fn create(State(gateway): State<Arc<Gateway>>, body: RequestBody) -> Response {
    let mut model = None;
    let result = answer(&gateway, &body, &mut model).await;
    super::finish(model, result)
}

async fn answer(
    gateway: &Gateway,
    body: &RequestBody,
    served: &mut Option<Arc<DeployedModel>>,
) -> Result<Response, ApiError> {
    let fields = Fields::parse(&body.0)?;
    let model = super::find_model(gateway, &fields)?;
    *served = Some(model.clone());
    if model.spec.generates() || model.spec.scores() {
        return Err(ApiError::wrong_task(&model));
    }
    let base64 = match fields.string("encoding_format")?.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(_) => {
            return Err(ApiError::param("encoding_format", "'encoding_format' must be 'float' or 'base64'"));
        }
    };
    let hidden = model.spec.hidden;
    if let Some(dimensions) = fields.integer("dimensions", 1..=i64::MAX)?
        && usize::try_from(dimensions) != Ok(hidden)
    {
        let message = format!("'dimensions' must be {hidden} for this model, got {dimensions}");
        return Err(ApiError::unsupported("dimensions", message));
    }
    let inputs = read_inputs(&fields, "input")?;
    if inputs.len() > MAX_INPUTS {
        let message = format!("'input' may have at most {MAX_INPUTS} elements, got {}", inputs.len());
        return Err(ApiError::param("input", message));
    }
    let tokenizer = super::tokenizer(gateway, &model).await?;
    let add_special_tokens = fields.boolean("add_special_tokens", true)?;
    let inputs = tokenize(inputs, &model, tokenizer.as_ref(), add_special_tokens, "input").await?;
    for tokens in &inputs {
        if tokens.is_empty() {
            return Err(ApiError::param("input", "'input' must not be empty"));
        }
        if tokens.len() > model.context {
            return Err(super::options::too_long(&model, "input", &tokens.len().to_string()));
        }
    }
    let prompt_tokens: usize = inputs.iter().map(Vec::len).sum();
    let _active = gateway.begin_request();
    let mut cut = gateway.cut.subscribe();
    let embeddings = tokio::select! {
        result = gateway.node.embed(&model, inputs)?.result() => result?,
        Ok(_) = cut.wait_for(|cut| *cut) => return Err(tangram_node::RequestError::ShuttingDown.into()),
    };
    let timing = embeddings.timing;
    gateway.metrics.observe_tokens(&model.name, prompt_tokens, 0);
    gateway.metrics.observe_timing(&model.name, &timing, false);
    let items = embeddings.vectors.into_iter().enumerate().map(|(index, vector)| EmbeddingItem {
        object: "embedding",
        index,
        embedding: if base64 { Vector::Base64(to_base64(&vector)) } else { Vector::Numbers(vector) },
    });
    let list = EmbeddingList {
        object: "list",
        data: items.collect(),
        model: &model.name,
        usage: Usage::of_embeddings(prompt_tokens, &timing),
    };
    Ok(super::respond(&list, &timing))
}

fn to_base64(vector: &[f32]) -> String {
    let bytes: Vec<u8> = vector.iter().flat_map(|value| value.to_le_bytes()).collect();
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

#[cfg(test)]
mod tests {
    #[test]
    fn base64_is_little_endian() {
        assert_eq!(super::to_base64(&[1.0, -2.5]), "AACAPwAAIMA=");
        assert_eq!(super::to_base64(&[]), "");
    }
}
