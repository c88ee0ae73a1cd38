//! A client of our own server: finds it, calls it, turns its error objects into errors.

use std::time::Duration;

use anyhow::{Context, bail};
use futures::StreamExt;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::Target;
use crate::embedded::{self, Server};

/// A server to talk to, possibly one inside this process.
pub(crate) struct Client {
    http: reqwest::Client,
    base: String,
    key: Option<String>,
    embedded: Option<Server>,
}

impl Client {
    /// Talks to the server at `base`.
    pub(crate) fn new(base: &str, key: Option<String>) -> anyhow::Result<Client> {
        Client::build(base, key, reqwest::Client::builder())
    }

    /// Talks to the server at `base` over a new connection for each request.
    pub(crate) fn without_reuse(base: &str, key: Option<String>) -> anyhow::Result<Client> {
        Client::build(base, key, reqwest::Client::builder().pool_max_idle_per_host(0))
    }

    fn build(base: &str, key: Option<String>, builder: reqwest::ClientBuilder) -> anyhow::Result<Client> {
        let http = builder.no_proxy().connect_timeout(Duration::from_secs(5)).build()?;
        Ok(Client { http, base: base.trim_end_matches('/').to_owned(), key, embedded: None })
    }

    /// Finds the server that a command means, or starts one inside this process.
    pub(crate) async fn connect(target: Target) -> anyhow::Result<Client> {
        let key = target.options.api_key.clone();
        if let Some(url) = &target.server {
            return Client::new(url, key);
        }
        let mut settings = target.options.settle()?;
        if let Some(running) = embedded::find_running(&settings.data) {
            let client = Client::new(&running.url, settings.api_key.clone())?;
            if client.http.get(format!("{}/health", client.base)).send().await.is_ok() {
                return Ok(client);
            }
        }
        settings.listen = "127.0.0.1:0".parse()?;
        settings.api_key = None;
        let server = Server::start(&settings).await?;
        let mut client = Client::new(&server.url(), None)?;
        client.embedded = Some(server);
        Ok(client)
    }

    /// Stops the server if it is inside this process.
    pub(crate) async fn close(self) -> anyhow::Result<()> {
        match self.embedded {
            Some(server) => server.stop().await,
            None => Ok(()),
        }
    }

    /// The same server over connections of its own.
    pub(crate) fn another(&self) -> anyhow::Result<Client> {
        Client::new(&self.base, self.key.clone())
    }

    /// A request that can be completed and sent.
    pub(crate) fn request(&self, method: reqwest::Method, path: &str) -> reqwest::RequestBuilder {
        let request = self.http.request(method, format!("{}{path}", self.base));
        match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    /// Sends a request and gives the response if it is a success.
    pub(crate) async fn send(
        &self,
        method: reqwest::Method,
        path: &str,
        body: Option<&Value>,
    ) -> anyhow::Result<reqwest::Response> {
        let mut request = self.request(method, path);
        if let Some(body) = body {
            request = request.json(body);
        }
        let response = request.send().await.with_context(|| format!("no answer from {}", self.base))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let body: Value = response.json().await.unwrap_or_default();
        match error_message(&body) {
            Some(message) => bail!("{message}"),
            None => bail!("{} answered with status {status}", self.base),
        }
    }

    /// GET, as JSON.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        Ok(self.send(reqwest::Method::GET, path, None).await?.json().await?)
    }

    /// POST, as JSON.
    pub(crate) async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        Ok(self.send(reqwest::Method::POST, path, Some(body)).await?.json().await?)
    }

    /// POST whose answer is a stream of lines; each goes to `line`, as [`read_lines`] has them.
    pub(crate) async fn post_lines(
        &self,
        path: &str,
        body: &Value,
        line: impl FnMut(Value) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        read_lines(self.send(reqwest::Method::POST, path, Some(body)).await?, line).await
    }
}

/// Reads an answer that is a stream of lines of JSON. For server-sent events the `data: ` is taken off and empty lines,
/// comments and `[DONE]` are left out.
///
/// # Errors
/// When the connection breaks, a line is no JSON or an error object, or `line` fails, which ends the reading.
pub(crate) async fn read_lines(
    response: reqwest::Response,
    mut line: impl FnMut(Value) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut bytes = response.bytes_stream();
    let mut buffer = Vec::new();
    while let Some(part) = bytes.next().await {
        buffer.extend_from_slice(&part.context("the server broke off")?);
        while let Some(end) = buffer.iter().position(|&byte| byte == b'\n') {
            let text: Vec<u8> = buffer.drain(..=end).collect();
            let text = text.trim_ascii();
            let text = text.strip_prefix(b"data:").unwrap_or(text).trim_ascii();
            // A colon begins a comment, by which other servers keep the connection alive.
            if text.is_empty() || text == b"[DONE]" || text.starts_with(b":") {
                continue;
            }
            let value: Value =
                serde_json::from_slice(text).context("the server sent a line that is no JSON")?;
            if let Some(message) = error_message(&value) {
                bail!("{message}");
            }
            line(value)?;
        }
    }
    Ok(())
}

fn error_message(body: &Value) -> Option<String> {
    Some(body.get("error")?.get("message")?.as_str()?.to_owned())
}
