//! HTTP/1.1 over TCP or TLS: sends one request, follows redirects, gives headers and body. Never forwards credentials to
//! another origin, never puts a URL or a header into an error.
//!
//! One client for everything, object stores included; HTTP/1.1 because ranges are fetched over several connections, and
//! separate ones share no window.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use http::header::{AUTHORIZATION, LOCATION, RETRY_AFTER};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_rustls::{ConfigBuilderExt, HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use url::Url;

use crate::RemoteError;
use crate::object::{Body, Failure};

/// Longest wait for a connection.
const CONNECT: Duration = Duration::from_secs(15);
/// Redirects of one request.
const MAX_REDIRECTS: usize = 10;
/// Longest small answer (a listing, a small file) that is read into memory, bytes.
const MAX_SMALL: usize = 64 << 20;

/// The connections.
#[derive(Clone, Debug)]
pub(crate) struct Http {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    /// Longest wait for the headers of an answer, and for the next piece of a body.
    pub(crate) stall: Duration,
}

/// A request's answer after redirects.
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    /// Headers of the redirects on the way, first first.
    pub(crate) passed: Vec<HeaderMap>,
    /// Where it came from.
    pub(crate) url: Url,
    pub(crate) body: Body,
}

impl Http {
    /// A client that trusts the certificates that this system trusts.
    pub(crate) fn new(stall: Duration) -> Result<Http, RemoteError> {
        let tls = || {
            let provider = Arc::new(rustls::crypto::ring::default_provider());
            rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()
        };
        let broken = |error: rustls::Error| RemoteError::BadSource(format!("TLS cannot be set up: {error}"));
        let tls = match tls().map_err(broken)?.with_native_roots() {
            Ok(trusting) => trusting,
            // Sources without TLS can be read all the same.
            Err(error) => {
                tracing::warn!(%error, "this system has no root certificates: https will not work");
                tls().map_err(broken)?.with_root_certificates(rustls::RootCertStore::empty())
            }
        }
        .with_no_client_auth();
        let mut tcp = HttpConnector::new();
        tcp.set_connect_timeout(Some(CONNECT));
        tcp.set_nodelay(true);
        tcp.enforce_http(false);
        let connector = HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1();
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_secs(30))
            .build(connector.wrap_connector(tcp));
        Ok(Http { client, stall })
    }

    /// Sends a request as it is, without following redirects.
    pub(crate) async fn send(&self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, Failure> {
        let answer = tokio::time::timeout(self.stall + CONNECT, self.client.request(request)).await;
        match answer {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) if error.is_connect() => {
                Err(Failure::retry(format!("no connection ({})", innermost(&error))))
            }
            Ok(Err(error)) => Err(Failure::retry(format!("the request broke off ({})", innermost(&error)))),
            Err(_) => Err(Failure::retry("the server does not answer")),
        }
    }

    /// Gets `url`, following redirects. `credential` goes only to the origin of `url`.
    pub(crate) async fn get(
        &self,
        url: &Url,
        headers: &HeaderMap,
        credential: Option<&HeaderValue>,
    ) -> Result<Answer, Failure> {
        let (mut at, mut passed) = (url.clone(), Vec::new());
        loop {
            let mut request = Request::new(Full::default());
            *request.method_mut() = Method::GET;
            *request.uri_mut() = uri(&at)?;
            *request.headers_mut() = headers.clone();
            if let Some(credential) = credential.filter(|_| at.origin() == url.origin()) {
                let mut credential = credential.clone();
                credential.set_sensitive(true);
                request.headers_mut().insert(AUTHORIZATION, credential);
            }
            let (parts, body) = self.send(request).await?.into_parts();
            let redirect = matches!(parts.status.as_u16(), 301 | 302 | 303 | 307 | 308);
            let Some(location) = parts.headers.get(LOCATION).filter(|_| redirect) else {
                let body = self.body(body);
                return Ok(Answer { status: parts.status, headers: parts.headers, passed, url: at, body });
            };
            let next = location.to_str().ok().and_then(|location| at.join(location).ok());
            let next = next.filter(|next| {
                // Nothing that began encrypted goes on in the clear.
                next.scheme() == "https" || (next.scheme() == "http" && at.scheme() == "http")
            });
            passed.push(parts.headers);
            at = next.ok_or_else(|| Failure::retry("the server redirects to nowhere sensible"))?;
            if passed.len() > MAX_REDIRECTS {
                return Err(Failure::retry("the server redirects without end"));
            }
        }
    }

    /// The data of a body, each piece waited for no longer than a stall.
    pub(crate) fn body(&self, body: Incoming) -> Body {
        let stall = self.stall;
        let pieces = futures::stream::unfold(Some(body), move |body| async move {
            let mut body = body?;
            loop {
                match tokio::time::timeout(stall, body.frame()).await {
                    Err(_) => return Some((Err(Failure::retry("the server sends nothing more")), None)),
                    Ok(None) => return None,
                    Ok(Some(Err(error))) => {
                        let problem = format!("the answer broke off ({})", innermost(&error));
                        return Some((Err(Failure::retry(problem)), None));
                    }
                    Ok(Some(Ok(frame))) => {
                        if let Ok(data) = frame.into_data() {
                            return Some((Ok(data), Some(body)));
                        }
                    }
                }
            }
        });
        pieces.boxed()
    }
}

/// All of a small answer.
pub(crate) async fn read_small(mut body: Body) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    while let Some(piece) = body.next().await {
        bytes.extend_from_slice(&piece?);
        if bytes.len() > MAX_SMALL {
            return Err(Failure::retry("the answer is longer than any of its kind"));
        }
    }
    Ok(bytes)
}

/// How long a server wants to be left alone: `Retry-After` in seconds. Dates are not looked at.
pub(crate) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds))
}

/// Whether a status may go away by itself.
pub(crate) fn is_temporary(status: StatusCode) -> bool {
    status.is_server_error() || matches!(status.as_u16(), 408 | 425 | 429)
}

fn uri(url: &Url) -> Result<http::Uri, Failure> {
    let mut plain = url.clone();
    // Goes into a header instead.
    let _ = plain.set_username("");
    let _ = plain.set_password(None);
    plain.as_str().parse().map_err(|_| Failure::retry("the address cannot be asked for"))
}

/// The cause at the end of a chain of errors. Those of the system and of TLS say what happened and nothing about the
/// request; what stands before them may hold an address.
fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}
