//! Reads request bodies: bounded in bytes and in time.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::header;
use futures::StreamExt;

use crate::Gateway;
use crate::openai::error::ApiError;

/// How long a body may take to arrive.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A complete request body.
#[derive(Debug)]
pub(crate) struct RequestBody(pub(crate) Bytes);

impl FromRequest<Arc<Gateway>> for RequestBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, gateway: &Arc<Gateway>) -> Result<Self, ApiError> {
        let read = read(request, gateway.config.max_body_bytes);
        tokio::time::timeout(TIMEOUT, read).await.unwrap_or_else(|_| Err(ApiError::body_timeout()))
    }
}

async fn read(request: Request, limit: usize) -> Result<RequestBody, ApiError> {
    let announced = request
        .headers()
        .get(header::CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok()?.parse::<usize>().ok())
        .unwrap_or(0);
    let mut body = Vec::with_capacity(if announced > limit { 0 } else { announced });
    let mut received = 0usize;
    let mut stream = request.into_body().into_data_stream();
    while let Some(piece) = stream.next().await {
        let piece =
            piece.map_err(|error| ApiError::invalid(format!("The request body cannot be read: {error}")))?;
        received = received.saturating_add(piece.len());
        if received <= limit {
            body.extend_from_slice(&piece);
        } else if received > limit.saturating_mul(4) {
            break;
        } else {
            // Go on reading for a while: many clients read no answer before they have sent everything.
            body = Vec::new();
        }
    }
    if received > limit || announced > limit {
        Err(ApiError::body_too_large(limit))
    } else {
        Ok(RequestBody(body.into()))
    }
}
