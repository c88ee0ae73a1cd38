//! OpenAI's error object with its HTTP status. Every error that leaves the gateway is one of these.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value as Json, json};
use tangram_node::{DeployError, DeployedModel, RemoteError, RequestError};

/// An error for the client.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    message: String,
    kind: &'static str,
    param: Option<String>,
    code: Option<&'static str>,
}

impl ApiError {
    fn new(
        status: StatusCode,
        kind: &'static str,
        code: Option<&'static str>,
        message: impl Into<String>,
    ) -> Self {
        ApiError { status, message: message.into(), kind, param: None, code }
    }

    /// The same where `source` was not what the client gave, but `param`.
    pub(crate) fn instead_of_source(mut self, param: &str) -> Self {
        if self.param.as_deref() == Some("source") {
            self.param = Some(param.to_owned());
        }
        self
    }

    /// 400 without a particular parameter.
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", None, message)
    }

    /// 400 because of one parameter.
    pub(crate) fn param(name: &str, message: impl Into<String>) -> Self {
        ApiError { param: Some(name.to_owned()), ..Self::invalid(message) }
    }

    /// 400 for something of OpenAI's API that does not exist here.
    pub(crate) fn unsupported(name: &str, message: impl Into<String>) -> Self {
        ApiError { code: Some("unsupported_parameter"), ..Self::param(name, message) }
    }

    /// 400 because the prompt, or the prompt with `max_tokens`, is longer than the model can take.
    pub(crate) fn context_length(param: &str, message: impl Into<String>) -> Self {
        ApiError { code: Some("context_length_exceeded"), ..Self::param(param, message) }
    }

    /// 404 for a model.
    pub(crate) fn unknown_model(name: &str) -> Self {
        let message = format!("The model `{name}` does not exist; GET /v1/models lists those that do");
        let error =
            Self::new(StatusCode::NOT_FOUND, "invalid_request_error", Some("model_not_found"), message);
        ApiError { param: Some("model".into()), ..error }
    }

    /// 400 because the model is of the other kind.
    pub(crate) fn wrong_task(model: &DeployedModel) -> Self {
        let name = &model.name;
        let message = if model.spec.generates() {
            format!("The model `{name}` generates text; use /v1/chat/completions or /v1/completions")
        } else if model.spec.scores() {
            format!("The model `{name}` scores pairs of texts; use /v1/rerank or /v1/score")
        } else {
            format!("The model `{name}` makes embeddings; use /v1/embeddings")
        };
        Self::param("model", message)
    }

    /// 401.
    pub(crate) fn unauthorized(message: &str) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "invalid_request_error", Some("invalid_api_key"), message)
    }

    /// 404 for a path.
    pub(crate) fn unknown_path(method: &str, path: &str) -> Self {
        let message = format!("Unknown request URL: {method} {path}");
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", Some("unknown_url"), message)
    }

    /// 405.
    pub(crate) fn method_not_allowed(method: &str, path: &str) -> Self {
        let message = format!("Method {method} is not allowed for {path}");
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "invalid_request_error",
            Some("method_not_allowed"),
            message,
        )
    }

    /// 408.
    pub(crate) fn body_timeout() -> Self {
        let message = "The request body did not arrive in time";
        Self::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", None, message)
    }

    /// 413.
    pub(crate) fn body_too_large(limit: usize) -> Self {
        let message = format!("The request body is larger than {limit} bytes, which is this server's limit");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", Some("request_too_large"), message)
    }

    /// 415.
    pub(crate) fn not_json() -> Self {
        let message = "This call needs the header `Content-Type: application/json`";
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "invalid_request_error", None, message)
    }

    /// 500.
    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", None, message)
    }

    /// The body: `{"error": {"message", "type", "param", "code"}}`.
    pub(crate) fn body(&self) -> Json {
        json!({"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}})
    }
}

impl From<RequestError> for ApiError {
    fn from(error: RequestError) -> Self {
        let message = error.to_string();
        match error {
            RequestError::Invalid(_) => Self::invalid(message),
            RequestError::UnknownModel(name) => Self::unknown_model(&name),
            RequestError::QueueFull { .. } => Self::new(
                StatusCode::TOO_MANY_REQUESTS,
                "rate_limit_error",
                Some("rate_limit_exceeded"),
                message,
            ),
            RequestError::LoadFailed { .. } => Self::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "server_error",
                Some("model_load_failed"),
                message,
            ),
            RequestError::DeviceLost(_) => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", Some("device_lost"), message)
            }
            RequestError::ShuttingDown => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", Some("shutting_down"), message)
            }
            RequestError::Internal(_) => Self::internal(message),
        }
    }
}

impl From<DeployError> for ApiError {
    fn from(error: DeployError) -> Self {
        let message = error.to_string();
        match error {
            DeployError::Remote(RemoteError::Io { source, .. })
                if source.kind() == std::io::ErrorKind::StorageFull =>
            {
                Self::new(StatusCode::INSUFFICIENT_STORAGE, "server_error", Some("disk_full"), message)
            }
            DeployError::Remote(RemoteError::Io { .. }) => Self::internal(message),
            DeployError::Remote(RemoteError::GaveUp { .. }) => {
                Self::new(StatusCode::BAD_GATEWAY, "server_error", Some("source_unavailable"), message)
            }
            DeployError::Checkpoint(_) | DeployError::Remote(_) => Self::param("source", message),
            DeployError::DoesNotFit(_) => {
                ApiError { code: Some("does_not_fit"), ..Self::param("source", message) }
            }
            DeployError::BadName(_) => Self::param("name", message),
            DeployError::UnknownModel(name) => Self::unknown_model(&name),
            DeployError::Arriving(_) => {
                Self::new(StatusCode::CONFLICT, "invalid_request_error", Some("arriving"), message)
            }
            DeployError::Cancelled => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", Some("cancelled"), message)
            }
            DeployError::Storage { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
                Self::new(StatusCode::INSUFFICIENT_STORAGE, "server_error", Some("disk_full"), message)
            }
            DeployError::Storage { .. } | DeployError::Catalogue(_) => Self::internal(message),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.body())).into_response();
        let headers = response.headers_mut();
        match self.status {
            StatusCode::UNAUTHORIZED => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            }
            _ => {}
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_errors_have_the_statuses_of_openai() {
        let status = |error: RequestError| ApiError::from(error).status.as_u16();
        assert_eq!(status(RequestError::Invalid("x".into())), 400);
        assert_eq!(status(RequestError::UnknownModel("x".into())), 404);
        assert_eq!(status(RequestError::QueueFull { waiting: 3 }), 429);
        assert_eq!(status(RequestError::LoadFailed { model: "m".into(), reason: "r".into() }), 500);
        assert_eq!(status(RequestError::DeviceLost("x".into())), 503);
        assert_eq!(status(RequestError::ShuttingDown), 503);
        assert_eq!(status(RequestError::Internal("x".into())), 500);
    }

    #[test]
    fn the_body_is_the_error_object() {
        let error = ApiError::param("temperature", "must be at most 2");
        assert_eq!(
            error.body(),
            json!({"error": {"message": "must be at most 2", "type": "invalid_request_error",
                             "param": "temperature", "code": null}})
        );
        let response = ApiError::from(RequestError::QueueFull { waiting: 3 }).into_response();
        assert_eq!(response.headers()[header::RETRY_AFTER], "1");
        assert_eq!(ApiError::unknown_model("m").body()["error"]["code"], "model_not_found");
    }
}
