//! HTTP: the OpenAI API, the admin API, metrics. Knows nothing of tensors.
//!
//! Whatever a client sends is answered with a response or an OpenAI error object: never a panic, never a hang. A
//! client that goes away cancels what it asked for.

mod admin;
mod body;
mod headers;
mod metrics;
mod openai;
mod process;
mod text;

use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, Method, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::serve::ListenerExt;
use serde_json::json;
use tangram_node::{Generator, Node};
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};

use crate::metrics::Metrics;
use crate::openai::error::ApiError;
pub use crate::process::ProcessStatus;
use crate::text::Texts;

/// How long a shutdown waits for the last bytes of answers to leave.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// How the gateway behaves.
#[derive(Clone)]
pub struct GatewayConfig {
    /// Key that every call except `/health` must bring as `Authorization: Bearer`; `None` lets everybody in.
    pub api_key: Option<String>,
    /// Largest request body in bytes.
    pub max_body_bytes: usize,
    /// How long running requests may go on once the server is told to stop.
    pub shutdown_grace: Duration,
}

impl Default for GatewayConfig {
    fn default() -> Self {
        GatewayConfig { api_key: None, max_body_bytes: 32 << 20, shutdown_grace: Duration::from_secs(30) }
    }
}

impl fmt::Debug for GatewayConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("GatewayConfig");
        // Not the key itself: debug output ends up in logs.
        debug.field("api_key", &self.api_key.as_ref().map(|_| "..."));
        debug
            .field("max_body_bytes", &self.max_body_bytes)
            .field("shutdown_grace", &self.shutdown_grace)
            .finish()
    }
}

/// What all handlers share.
pub(crate) struct Gateway {
    node: Arc<Node>,
    /// The node, or what generates in its stead.
    generator: Arc<dyn Generator>,
    config: GatewayConfig,
    texts: Arc<Texts>,
    metrics: Arc<Metrics>,
    ids: RequestIds,
    /// The server was told to stop: deployments end at once.
    stopping: AtomicBool,
    /// Requests to models that have not been answered in full.
    active: watch::Sender<usize>,
    /// Becomes true when the grace of a shutdown is over: whatever still runs ends with an error.
    cut: watch::Sender<bool>,
}

/// The id of a request: `x-request-id`, and part of the ids of completions.
#[derive(Clone, Debug)]
pub(crate) struct RequestId(String);

/// See [`Gateway::begin_request`].
#[derive(Debug)]
pub(crate) struct ActiveRequest(watch::Sender<usize>);

impl Drop for ActiveRequest {
    fn drop(&mut self) {
        self.0.send_modify(|requests| *requests = requests.saturating_sub(1));
    }
}

/// Attached to responses about a deployed model.
#[derive(Clone, Debug)]
pub(crate) struct ServedModel(String);

/// Makes ids that nobody guesses by accident and no two requests share.
#[derive(Debug, Default)]
struct RequestIds {
    keys: [RandomState; 2],
    count: AtomicU64,
}

impl RequestIds {
    fn next(&self) -> RequestId {
        let count = self.count.fetch_add(1, Ordering::Relaxed);
        let [high, low] = self.keys.each_ref().map(|keys| keys.hash_one(count));
        RequestId(format!("{high:016x}{low:016x}"))
    }
}

/// The routes over a node. Tokenizers are loaded when first needed; [`serve`] loads them beforehand.
pub fn router(node: Arc<Node>, config: GatewayConfig) -> Router {
    router_with_generator(node.clone(), node, config)
}

/// The same with tokens from elsewhere: the node only says which models there are, and how their text is made.
pub fn router_with_generator(
    node: Arc<Node>,
    generator: Arc<dyn Generator>,
    config: GatewayConfig,
) -> Router {
    routes(Arc::new(Gateway::new(node, generator, config)))
}

impl Gateway {
    fn new(node: Arc<Node>, generator: Arc<dyn Generator>, config: GatewayConfig) -> Self {
        Gateway {
            metrics: Arc::new(Metrics::new(node.clone())),
            node,
            generator,
            config,
            texts: Arc::default(),
            ids: RequestIds::default(),
            stopping: AtomicBool::new(false),
            active: watch::Sender::new(0),
            cut: watch::Sender::new(false),
        }
    }

    /// Counts a request until the guard is dropped; a shutdown waits for it.
    fn begin_request(&self) -> ActiveRequest {
        self.active.send_modify(|requests| *requests += 1);
        ActiveRequest(self.active.clone())
    }
}

fn routes(gateway: Arc<Gateway>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(openai::chat::create))
        .route("/v1/completions", post(openai::completions::create))
        .route("/v1/embeddings", post(openai::embeddings::create))
        .route("/v1/rerank", post(openai::rerank::rerank))
        .route("/v1/score", post(openai::rerank::score))
        .route("/v1/models", get(openai::models::list))
        .route("/v1/models/{*name}", get(openai::models::get))
        .route("/admin/models", get(admin::list).post(admin::deploy))
        .route("/admin/models/{*name}", delete(admin::remove))
        .route("/admin/profile", get(admin::profile))
        .route("/admin/status", get(admin::status))
        .route("/metrics", get(expose_metrics))
        .route("/health", get(health))
        .fallback(unknown_path)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(middleware::from_fn_with_state(gateway.clone(), authorize))
        .layer(middleware::from_fn_with_state(gateway.clone(), account))
        .with_state(gateway)
}

/// Serves until `shutdown` resolves; then accepts nothing new, lets running requests finish for at most
/// [`GatewayConfig::shutdown_grace`], ends what is left with an error, and drains the node.
///
/// # Errors
/// When the listener fails for good.
pub async fn serve(
    listener: TcpListener,
    node: Arc<Node>,
    config: GatewayConfig,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let grace = config.shutdown_grace;
    let gateway = Arc::new(Gateway::new(node.clone(), node.clone(), config));
    let warming = gateway.clone();
    tokio::task::spawn_blocking(move || {
        for model in warming.node.models() {
            if warming.stopping.load(Ordering::Relaxed) {
                break;
            }
            warming.texts.warm(&model);
        }
    });
    // Without this, small pieces of a stream wait for the acknowledgement of the piece before.
    let listener = listener.tap_io(|stream| {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY cannot be set");
        }
    });
    let (stop, stopped) = oneshot::channel();
    let stopping = gateway.clone();
    let server = axum::serve(listener, routes(gateway.clone())).with_graceful_shutdown(async move {
        shutdown.await;
        stopping.stopping.store(true, Ordering::Relaxed);
        let _ = stop.send(());
    });
    let mut server = std::pin::pin!(server.into_future());
    tokio::select! {
        result = &mut server => return result,
        _ = stopped => {}
    }
    let mut active = gateway.active.subscribe();
    // Clients that hold a connection without a request do not count.
    let quiet = async {
        // Draining also makes the node refuse what still comes in over open connections.
        node.drain().await;
        // Fails if nobody can count any more, which is as good as zero.
        let _ = active.wait_for(|requests| *requests == 0).await;
        tokio::time::sleep(LAST_WORDS).await;
    };
    let mut ended = std::pin::pin!(async {
        tokio::select! {
            result = server => result,
            () = quiet => Ok(()),
        }
    });
    if let Ok(result) = tokio::time::timeout(grace, &mut ended).await {
        return result;
    }
    tracing::warn!(
        seconds = grace.as_secs(),
        "requests still run after the grace of the shutdown; ending them"
    );
    gateway.cut.send_replace(true);
    // A client that reads nothing can hold its connection, but not the server.
    tokio::time::timeout(2 * LAST_WORDS, ended).await.unwrap_or(Ok(()))
}

async fn health() -> Response {
    axum::Json(json!({"status": "ok"})).into_response()
}

async fn expose_metrics(State(gateway): State<Arc<Gateway>>) -> Result<Response, ApiError> {
    let text = gateway.metrics.encode().map_err(|_| ApiError::internal("the metrics cannot be written"))?;
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response())
}

async fn unknown_path(method: Method, uri: Uri) -> ApiError {
    ApiError::unknown_path(method.as_str(), uri.path())
}

async fn method_not_allowed(method: Method, uri: Uri) -> ApiError {
    ApiError::method_not_allowed(method.as_str(), uri.path())
}

/// Lets a request through if it brings the key, or needs none.
async fn authorize(State(gateway): State<Arc<Gateway>>, request: Request, next: Next) -> Response {
    let Some(key) = &gateway.config.api_key else { return next.run(request).await };
    if request.uri().path() == "/health" {
        return next.run(request).await;
    }
    let given = request.headers().get(header::AUTHORIZATION).map(HeaderValue::as_bytes);
    match given.and_then(bearer_token) {
        Some(token) if equal_in_constant_time(token, key.as_bytes()) => next.run(request).await,
        Some(_) => ApiError::unauthorized("Incorrect API key provided").into_response(),
        None => {
            let message = "This server needs an API key; send it as `Authorization: Bearer KEY`";
            ApiError::unauthorized(message).into_response()
        }
    }
}

/// The token of an `Authorization` header; the scheme's case does not matter.
fn bearer_token(value: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| token.trim_ascii())
}

/// Takes as long for a wrong key as for the right one, so that time does not tell how much of it was right. The
/// length is no secret.
fn equal_in_constant_time(left: &[u8], right: &[u8]) -> bool {
    let differences =
        left.iter().zip(right).fold(0u8, |all, (left, right)| std::hint::black_box(all | (left ^ right)));
    left.len() == right.len() && differences == 0
}

/// Gives the request its id and counts it, also if the client goes before the answer.
async fn account(State(gateway): State<Arc<Gateway>>, mut request: Request, next: Next) -> Response {
    let id = gateway.ids.next();
    let mut counted = CountOnDrop {
        metrics: &gateway.metrics,
        endpoint: endpoint(request.uri().path()),
        model: String::new(),
        status: 499,
    };
    request.extensions_mut().insert(id.clone());
    let mut response = next.run(request).await;
    if let Ok(value) = HeaderValue::from_str(&id.0) {
        response.headers_mut().insert("x-request-id", value);
    }
    if let Some(ServedModel(model)) = response.extensions_mut().remove() {
        counted.model = model;
    }
    counted.status = response.status().as_u16();
    drop(counted);
    response
}

struct CountOnDrop<'a> {
    metrics: &'a Metrics,
    endpoint: &'static str,
    model: String,
    /// 499, nginx's "client closed request", unless there is an answer.
    status: u16,
}

impl Drop for CountOnDrop<'_> {
    fn drop(&mut self) {
        self.metrics.count_request(self.endpoint, &self.model, self.status);
    }
}

/// The label of a path.
fn endpoint(path: &str) -> &'static str {
    match path {
        "/v1/chat/completions" => "chat_completions",
        "/v1/completions" => "completions",
        "/v1/embeddings" => "embeddings",
        "/v1/rerank" => "rerank",
        "/v1/score" => "score",
        "/metrics" => "metrics",
        "/health" => "health",
        _ if path.starts_with("/v1/models") => "models",
        _ if path.starts_with("/admin/") => "admin",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_compared_whole() {
        assert!(equal_in_constant_time(b"secret", b"secret"));
        for wrong in [&b"secreT"[..], b"secre", b"secrets", b""] {
            assert!(!equal_in_constant_time(wrong, b"secret"));
        }
    }

    #[test]
    fn bearer_tokens() {
        assert_eq!(bearer_token(b"Bearer abc"), Some(&b"abc"[..]));
        assert_eq!(bearer_token(b"bearer  abc "), Some(&b"abc"[..]));
        assert_eq!(bearer_token(b"Basic abc"), None);
        assert_eq!(bearer_token(b"Bearer"), None);
    }

    #[test]
    fn request_ids_differ() {
        let ids = RequestIds::default();
        let (first, second) = (ids.next(), ids.next());
        assert_eq!(first.0.len(), 32);
        assert_ne!(first.0, second.0);
    }
}
