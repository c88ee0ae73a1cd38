//! `/v1/models`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use tangram_node::DeployedModel;

use super::error::ApiError;
use crate::Gateway;

/// `GET /v1/models`.
pub(crate) async fn list(State(gateway): State<Arc<Gateway>>) -> Response {
    let data: Vec<Value> = gateway.node.models().iter().map(|model| describe(model)).collect();
    Json(json!({"object": "list", "data": data})).into_response()
}

/// `GET /v1/models/{id}`.
pub(crate) async fn get(
    State(gateway): State<Arc<Gateway>>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let model = gateway.node.model(&name).ok_or_else(|| ApiError::unknown_model(&name))?;
    Ok(Json(describe(&model)))
}

/// OpenAI's model object with vLLM's `max_model_len` (tokens) and, of an adapter, its `parent`.
fn describe(model: &DeployedModel) -> Value {
    let mut described = json!({
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "tangram",
        "max_model_len": model.context,
    });
    if let (Some(base), Some(object)) = (&model.base, described.as_object_mut()) {
        object.insert("parent".to_owned(), json!(base));
    }
    described
}
