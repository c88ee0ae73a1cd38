//! `POST /v1/rerank`, in the form that Jina and vLLM share, and vLLM's `POST /v1/score`: how well texts fit a query, by
//! a model that reads both together.

use std::sync::Arc;

use axum::extract::{Extension, State};
use axum::response::Response;
use serde::{Deserialize, Serialize};
use tangram_node::{DeployedModel, Timing};

use super::error::ApiError;
use super::fields::Fields;
use super::types::Usage;
use crate::body::RequestBody;
use crate::text::encode_pairs;
use crate::{Gateway, RequestId};

/// Texts per request.
const MAX_DOCUMENTS: usize = 2048;

/// A text that is to be judged: a string, or an object that has one.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Document {
    Text(String),
    Object { text: String },
}

/// One text or several.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Texts {
    One(String),
    Many(Vec<String>),
}

#[derive(Debug, Serialize)]
struct Ranking<'a> {
    id: String,
    model: &'a str,
    usage: Usage,
    results: Vec<Ranked<'a>>,
}

#[derive(Debug, Serialize)]
struct Ranked<'a> {
    /// Place in the request's `documents`.
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    document: Option<DocumentText<'a>>,
    relevance_score: f32,
}

#[derive(Debug, Serialize)]
struct DocumentText<'a> {
    text: &'a str,
}

#[derive(Debug, Serialize)]
struct ScoreList<'a> {
    id: String,
    object: &'static str,
    created: u64,
    model: &'a str,
    data: Vec<ScoreItem>,
    usage: Usage,
}

#[derive(Debug, Serialize)]
struct ScoreItem {
    index: usize,
    object: &'static str,
    score: f32,
}

/// Answers `/v1/rerank`.
pub(crate) async fn rerank(
    State(gateway): State<Arc<Gateway>>,
    Extension(id): Extension<RequestId>,
    body: RequestBody,
) -> Response {
    let mut model = None;
    let result = answer_rerank(&gateway, &id, &body, &mut model).await;
    super::finish(model, result)
}

/// Answers `/v1/score`.
pub(crate) async fn score(
    State(gateway): State<Arc<Gateway>>,
    Extension(id): Extension<RequestId>,
    body: RequestBody,
) -> Response {
    let mut model = None;
    let result = answer_score(&gateway, &id, &body, &mut model).await;
    super::finish(model, result)
}

async fn answer_rerank(
    gateway: &Gateway,
    id: &RequestId,
    body: &RequestBody,
    served: &mut Option<Arc<DeployedModel>>,
) -> Result<Response, ApiError> {
    let (fields, model) = read(gateway, body, served)?;
    let query = fields.string("query")?.ok_or_else(|| ApiError::param("query", "'query' is required"))?;
    let documents: Vec<Document> = fields
        .get("documents", "a list of strings or of objects with a 'text'")?
        .ok_or_else(|| ApiError::param("documents", "'documents' is required"))?;
    let texts: Vec<String> = documents
        .into_iter()
        .map(|document| match document {
            Document::Text(text) | Document::Object { text } => text,
        })
        .collect();
    let top = fields.integer("top_n", 1..=i64::MAX)?.map_or(usize::MAX, |top| top as usize);
    let show = fields.boolean("return_documents", true)?;
    let pairs = texts.iter().map(|text| (query.clone(), text.clone())).collect();
    let judged = judge(gateway, &model, pairs, "documents").await?;
    let mut order: Vec<(usize, f32)> = judged.scores.into_iter().enumerate().collect();
    // Of equal ones the first.
    order.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    order.truncate(top);
    let results = order.into_iter().map(|(index, relevance_score)| Ranked {
        index,
        document: texts.get(index).filter(|_| show).map(|text| DocumentText { text }),
        relevance_score,
    });
    let ranking = Ranking {
        id: format!("rerank-{}", id.0),
        model: &model.name,
        usage: Usage::of_embeddings(judged.tokens, &judged.timing),
        results: results.collect(),
    };
    Ok(super::respond(&ranking, &judged.timing))
}

async fn answer_score(
    gateway: &Gateway,
    id: &RequestId,
    body: &RequestBody,
    served: &mut Option<Arc<DeployedModel>>,
) -> Result<Response, ApiError> {
    let (fields, model) = read(gateway, body, served)?;
    let (first, second) = (read_texts(&fields, "text_1")?, read_texts(&fields, "text_2")?);
    let pairs = match first.as_slice() {
        [query] => second.into_iter().map(|text| (query.clone(), text)).collect(),
        _ if first.len() == second.len() => first.into_iter().zip(second).collect(),
        _ => {
            let message = format!(
                "'text_1' must be one text or as many as 'text_2', got {} and {}",
                first.len(),
                second.len()
            );
            return Err(ApiError::param("text_1", message));
        }
    };
    let judged = judge(gateway, &model, pairs, "text_2").await?;
    let items = judged.scores.into_iter().enumerate();
    let list = ScoreList {
        id: format!("score-{}", id.0),
        object: "list",
        created: super::now(),
        model: &model.name,
        data: items.map(|(index, score)| ScoreItem { index, object: "score", score }).collect(),
        usage: Usage::of_embeddings(judged.tokens, &judged.timing),
    };
    Ok(super::respond(&list, &judged.timing))
}

/// The fields of a request and the model that it names, which must be one that judges pairs.
fn read<'a>(
    gateway: &Gateway,
    body: &'a RequestBody,
    served: &mut Option<Arc<DeployedModel>>,
) -> Result<(Fields<'a>, Arc<DeployedModel>), ApiError> {
    let fields = Fields::parse(&body.0)?;
    let model = super::find_model(gateway, &fields)?;
    *served = Some(model.clone());
    if !model.spec.scores() {
        return Err(ApiError::wrong_task(&model));
    }
    Ok((fields, model))
}

fn read_texts(fields: &Fields<'_>, name: &str) -> Result<Vec<String>, ApiError> {
    match fields.get(name, "a string or a list of strings")? {
        None => Err(ApiError::param(name, format!("'{name}' is required"))),
        Some(Texts::One(text)) => Ok(vec![text]),
        Some(Texts::Many(texts)) => Ok(texts),
    }
}

/// What came of the pairs of a request.
struct Judged {
    /// One for each pair.
    scores: Vec<f32>,
    /// Of all pairs.
    tokens: usize,
    timing: Timing,
}

/// Scores pairs of texts. `param` is the field that errors about them name.
async fn judge(
    gateway: &Gateway,
    model: &Arc<DeployedModel>,
    pairs: Vec<(String, String)>,
    param: &str,
) -> Result<Judged, ApiError> {
    if pairs.is_empty() {
        return Err(ApiError::param(param, format!("'{param}' must not be empty")));
    }
    if pairs.len() > MAX_DOCUMENTS {
        let message = format!("'{param}' may have at most {MAX_DOCUMENTS} elements, got {}", pairs.len());
        return Err(ApiError::param(param, message));
    }
    let Some(tokenizer) = super::tokenizer(gateway, model).await? else {
        let message =
            format!("The model `{}` has no tokenizer, without which it cannot read pairs", model.name);
        return Err(ApiError::param("model", message));
    };
    let inputs = encode_pairs(&tokenizer, pairs)
        .await
        .map_err(|error| ApiError::param(param, format!("'{param}' cannot be tokenized: {error}")))?;
    if let Some(long) = inputs.iter().find(|input| input.tokens.len() > model.context) {
        return Err(super::options::too_long(model, param, &long.tokens.len().to_string()));
    }
    let tokens = inputs.iter().map(|input| input.tokens.len()).sum();
    let _active = gateway.begin_request();
    let mut cut = gateway.cut.subscribe();
    let scored = tokio::select! {
        result = gateway.node.score(model, inputs)?.result() => result?,
        Ok(_) = cut.wait_for(|cut| *cut) => return Err(tangram_node::RequestError::ShuttingDown.into()),
    };
    gateway.metrics.observe_tokens(&model.name, tokens, 0);
    gateway.metrics.observe_timing(&model.name, &scored.timing, false);
    let scores = scored.vectors.into_iter().map(|vector| vector.first().copied().unwrap_or(f32::NAN));
    Ok(Judged { scores: scores.collect(), tokens, timing: scored.timing })
}
