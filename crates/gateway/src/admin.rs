//! `/admin/`: deploying, removing and watching models. The `tangram` command line uses it.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use tangram_node::{DeployError, DeployProgress, DeployedModel, RemoteSource, WeightLayout};
use tokio::sync::mpsc;

use crate::Gateway;
use crate::body::RequestBody;
use crate::openai::error::ApiError;
use crate::openai::fields::Fields;
use crate::process::ProcessStatus;

/// Least time between two progress lines.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// `GET /admin/models`.
pub(crate) async fn list(State(gateway): State<Arc<Gateway>>) -> Response {
    Json(json!({"models": gateway.node.list()})).into_response()
}

/// `GET /admin/status`: the node's figures, its models, and what the process takes.
pub(crate) async fn status(State(gateway): State<Arc<Gateway>>) -> Response {
    let (node, models) = (gateway.node.status(), gateway.node.list());
    let process = ProcessStatus::read(node.pool_taken_bytes);
    Json(json!({"node": node, "models": models, "process": process})).into_response()
}

/// `GET /admin/profile`: the device and its models as a simulator needs them.
pub(crate) async fn profile(State(gateway): State<Arc<Gateway>>) -> Response {
    Json(gateway.node.profile()).into_response()
}

/// `DELETE /admin/models/{name}`.
pub(crate) async fn remove(
    State(gateway): State<Arc<Gateway>>,
    Path(name): Path<String>,
) -> Result<Response, ApiError> {
    let remover = gateway.clone();
    let removed = tokio::task::spawn_blocking(move || {
        remover.node.remove(&name)?;
        remover.texts.retain(&remover.node.models());
        Ok::<_, DeployError>(name)
    });
    let name = removed.await.map_err(|_| ApiError::internal("the removal failed"))??;
    Ok(Json(json!({"removed": name})).into_response())
}

enum DeployEvent {
    Progress(DeployProgress),
    End(Box<Result<Arc<DeployedModel>, DeployError>>),
}

/// What to deploy.
enum Deployable {
    /// The checkpoint at this path, its tensors stored like this.
    Source(PathBuf, WeightLayout),
    /// The checkpoint at this path, its tensors left where they are.
    InPlace(PathBuf),
    /// The checkpoint at this remote source.
    Remote(RemoteSource),
    /// The adapter in this directory on the model of this name.
    Adapter(PathBuf, String),
}

/// `POST /admin/models` with `{"name", "source", "layout", "in_place"}` (the last two may be left out) or `{"name",
/// "adapter", "base"}`: answers with one JSON object per line, progress first, then the model or an error. An error before the first progress has its HTTP status. If the client goes, the deployment is
/// cancelled.
pub(crate) async fn deploy(
    State(gateway): State<Arc<Gateway>>,
    headers: HeaderMap,
    body: RequestBody,
) -> Result<Response, ApiError> {
    // A page in a browser cannot send this type to another origin without asking, and nobody here answers yes.
    let content_type =
        headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if content_type.split(';').next().map(str::trim) != Some("application/json") {
        return Err(ApiError::not_json());
    }
    let fields = Fields::parse(&body.0)?;
    let required = |name: &str| {
        let value = fields.string(name)?.filter(|value| !value.is_empty());
        value.ok_or_else(|| ApiError::param(name, format!("'{name}' is required")))
    };
    let name = required("name")?;
    let in_place = fields.boolean("in_place", false)?;
    let layout = fields.get::<WeightLayout>("layout", "plain, compressed or auto")?;
    if layout.is_some() && (in_place || fields.raw("adapter").is_some()) {
        return Err(ApiError::param("layout", "'layout' is for checkpoints that are imported"));
    }
    let what = match (fields.raw("source"), fields.raw("adapter")) {
        (Some(_), Some(_)) => {
            return Err(ApiError::param(
                "adapter",
                "an adapter comes without 'source'; 'base' names its model",
            ));
        }
        (None, Some(_)) if in_place => {
            return Err(ApiError::param(
                "in_place",
                "an adapter's tensors are converted and cannot stay in place",
            ));
        }
        (None, Some(_)) => Deployable::Adapter(PathBuf::from(required("adapter")?), required("base")?),
        (_, None) => {
            let source = required("source")?;
            match RemoteSource::parse(&source) {
                None if in_place => Deployable::InPlace(PathBuf::from(source)),
                None => Deployable::Source(PathBuf::from(source), layout.unwrap_or_default()),
                Some(_) if in_place => {
                    return Err(ApiError::param(
                        "in_place",
                        "what is downloaded has no place of its own to stay in",
                    ));
                }
                Some(_) if layout.is_some() => {
                    return Err(ApiError::param("layout", "what is downloaded is stored plain"));
                }
                Some(remote) => Deployable::Remote(remote.map_err(DeployError::from)?),
            }
        }
    };
    let param = if matches!(what, Deployable::Adapter(..)) { "adapter" } else { "source" };
    let refusal = move |error: DeployError| ApiError::from(error).instead_of_source(param);
    // Room for one progress line that waits to be sent and for the end.
    let (sender, mut events) = mpsc::channel(2);
    let deployer = gateway.clone();
    tokio::task::spawn_blocking(move || {
        let result = run(&deployer, &name, &what, &sender);
        if let Ok(model) = &result {
            deployer.texts.retain(&deployer.node.models());
            deployer.texts.warm(model);
        }
        // Fails if the client has gone; then nobody wants to know.
        let _ = sender.blocking_send(DeployEvent::End(Box::new(result)));
    });
    let first = match events.recv().await {
        Some(DeployEvent::End(result)) => Line::Last(ready(&gateway, &*result.map_err(refusal)?).await),
        Some(DeployEvent::Progress(progress)) => Line::Progress(progress),
        None => return Err(ApiError::internal("the deployment failed")),
    };
    let steps = move |(line, mut events, gateway): (
        Option<Line>,
        mpsc::Receiver<DeployEvent>,
        Arc<Gateway>,
    )| async move {
        let line = line?;
        let next = match line {
            Line::Last(_) => None,
            Line::Progress(_) => match events.recv().await {
                Some(DeployEvent::Progress(progress)) => Some(Line::Progress(progress)),
                Some(DeployEvent::End(result)) => Some(Line::Last(match *result {
                    Ok(model) => ready(&gateway, &model).await,
                    Err(error) => failed(&refusal(error)),
                })),
                None => Some(Line::Last(failed(&ApiError::internal("the deployment failed")))),
            },
        };
        Some((Ok::<_, std::convert::Infallible>(line.bytes()), (next, events, gateway)))
    };
    let stream = futures::stream::unfold((Some(first), events, gateway), steps);
    let mut response = Body::from_stream(stream).into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"));
    Ok(response)
}

/// Deploys; blocking. Stops when the receiver is gone or the server goes down.
fn run(
    gateway: &Gateway,
    name: &str,
    what: &Deployable,
    sender: &mpsc::Sender<DeployEvent>,
) -> Result<Arc<DeployedModel>, DeployError> {
    let mut last: Option<Instant> = None;
    let progress = &mut |progress| {
        if sender.is_closed() || gateway.stopping.load(Ordering::Relaxed) {
            return ControlFlow::Break(());
        }
        let due = last.is_none_or(|last| last.elapsed() >= PROGRESS_INTERVAL);
        // The second place in the channel is for the end.
        if due && sender.capacity() > 1 && sender.try_send(DeployEvent::Progress(progress)).is_ok() {
            last = Some(Instant::now());
        }
        ControlFlow::Continue(())
    };
    match what {
        Deployable::Source(source, layout) => gateway.node.deploy_as(*layout, name, source, progress),
        Deployable::InPlace(source) => gateway.node.deploy_in_place(name, source, progress),
        Deployable::Remote(source) => gateway.node.deploy_remote(name, source, progress),
        Deployable::Adapter(adapter, base) => gateway.node.deploy_adapter(name, adapter, base, progress),
    }
}

enum Line {
    Progress(DeployProgress),
    Last(Value),
}

impl Line {
    fn bytes(&self) -> Bytes {
        let value = match self {
            Line::Progress(progress) => json!({
                "status": progress.stage,
                "bytes_done": progress.bytes_done,
                "bytes_total": progress.bytes_total,
                "bytes_reused": progress.bytes_reused,
            }),
            Line::Last(value) => value.clone(),
        };
        Bytes::from(format!("{value}\n"))
    }
}

async fn ready(gateway: &Gateway, model: &DeployedModel) -> Value {
    // The node publishes a new model's status within a few hundredths of a second.
    for _ in 0..100 {
        if let Some(status) = gateway.node.list().into_iter().find(|status| status.name == model.name) {
            return json!({"status": "ready", "model": status});
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    failed(&ApiError::internal(format!("the model `{}` was removed again", model.name)))
}

fn failed(error: &ApiError) -> Value {
    let body = error.body();
    json!({"status": "error", "error": body.get("error")})
}
