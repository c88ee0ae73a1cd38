//! An object in S3 (or what is compatible), Google Cloud Storage or Azure: signed by `object_store`, sent by our client.
//!
//! Nothing that `object_store` says about a failed request is passed on: it may hold the signed address. What the
//! server really answered is seen by the client underneath.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use http::{Extensions, HeaderMap, StatusCode};
use http_body_util::{BodyExt, Full};
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody,
    HttpService,
};
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::path::Path;
use object_store::{ClientOptions, GetOptions, GetRange, ObjectStore, RetryConfig};

use crate::RemoteError;
use crate::http::Http;
use crate::object::{Body, Digest, Failure, Object, Stat};
use crate::source::Provider;
use crate::web;

/// A bucket or container.
#[derive(Clone)]
pub(crate) struct Bucket {
    store: Arc<dyn ObjectStore>,
    provider: Provider,
    /// `s3://bucket`.
    name: String,
    /// What the last request that was not about an object was answered.
    last: Sight,
    stall: Duration,
    /// Whether no setting leads to a service without TLS on another machine.
    guarded: bool,
}

/// What a server answered to one request, seen below `object_store`.
#[derive(Debug, Default)]
struct Seen {
    status: Option<StatusCode>,
    headers: HeaderMap,
    /// Why there was no answer.
    problem: Option<String>,
}

type Sight = Arc<Mutex<Seen>>;

/// Makes the clients of `object_store`, and is one: all are the same.
#[derive(Clone, Debug)]
struct Service {
    http: Http,
    /// Where the answers go that nobody else looks at.
    last: Sight,
}

impl HttpConnector for Service {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}

/// Stands for the text in [`Seen`].
#[derive(Debug, thiserror::Error)]
#[error("no answer")]
struct NoAnswer;

impl HttpService for Service {
    fn call<'a, 'b>(&'a self, request: HttpRequest) -> BoxFuture<'b, Result<HttpResponse, HttpError>>
    where
        'a: 'b,
        Self: 'b,
    {
        async move {
            let (mut parts, body) = request.into_parts();
            let sight = parts.extensions.remove::<Sight>().unwrap_or_else(|| self.last.clone());
            // Whatever a library's own logging shows of a request, it is not this.
            parts.headers.values_mut().for_each(|value| value.set_sensitive(true));
            let body = Full::new(body.as_bytes().cloned().unwrap_or_default());
            let answer = self.http.send(http::Request::from_parts(parts, body)).await;
            let mut seen = sight.lock().unwrap_or_else(PoisonError::into_inner);
            *seen = Seen::default();
            match answer {
                Ok(answer) => {
                    (seen.status, seen.headers) = (Some(answer.status()), answer.headers().clone());
                    let broken = |_| HttpError::new(HttpErrorKind::Interrupted, NoAnswer);
                    Ok(answer.map(|body| HttpResponseBody::new(body.map_err(broken))))
                }
                Err(failure) => {
                    if let Failure::Retry { problem, .. } = failure {
                        seen.problem = Some(problem);
                    }
                    Err(HttpError::new(HttpErrorKind::Connect, NoAnswer))
                }
            }
        }
        .boxed()
    }
}

impl Bucket {
    /// Opens a bucket with the settings in `environment` (`AWS_…`, `GOOGLE_…`, `AZURE_…`, as their own tools have them).
    pub(crate) fn open(
        http: &Http,
        provider: Provider,
        bucket: &str,
        account: Option<&str>,
        environment: &[(String, String)],
    ) -> Result<Bucket, RemoteError> {
        // What is tried again, and when, is decided where downloads are driven.
        let retry = RetryConfig { max_retries: 0, ..RetryConfig::default() };
        let last = Sight::default();
        let connector = Service { http: http.clone(), last: last.clone() };
        let of = |prefix: &'static str| {
            let wanted = environment.iter().filter(move |(name, _)| name.starts_with(prefix));
            wanted.map(|(name, value)| (name.to_ascii_lowercase(), value))
        };
        let name = |scheme: &str| format!("{scheme}://{bucket}");
        let (built, name): (object_store::Result<Arc<dyn ObjectStore>>, _) = match provider {
            Provider::S3 => {
                let mut builder = AmazonS3Builder::new();
                for (key, value) in of("AWS_") {
                    if let Ok(key) = key.parse() {
                        builder = builder.with_config(key, value);
                    }
                }
                let builder =
                    builder.with_bucket_name(bucket).with_retry(retry).with_http_connector(connector);
                (builder.build().map(|store| Arc::new(store) as _), name("s3"))
            }
            Provider::Gcs => {
                let mut builder = GoogleCloudStorageBuilder::new();
                for (key, value) in of("GOOGLE_") {
                    if let Ok(key) = key.parse() {
                        builder = builder.with_config(key, value);
                    }
                }
                let builder =
                    builder.with_bucket_name(bucket).with_retry(retry).with_http_connector(connector);
                (builder.build().map(|store| Arc::new(store) as _), name("gs"))
            }
            Provider::Azure => {
                let mut builder = MicrosoftAzureBuilder::new();
                for (key, value) in of("AZURE_") {
                    if let Ok(key) = key.parse() {
                        builder = builder.with_config(key, value);
                    }
                }
                if let Some(account) = account {
                    builder = builder.with_account(account);
                }
                let builder =
                    builder.with_container_name(bucket).with_retry(retry).with_http_connector(connector);
                (builder.build().map(|store| Arc::new(store) as _), name("az"))
            }
        };
        // The builder's own words may repeat a setting, and settings hold secrets.
        let store = built.map_err(|_| {
            let problem = format!("it cannot be reached with these settings: {}", login(provider));
            RemoteError::refused(&name, problem)
        })?;
        let endpoints = of("").filter(|(name, _)| name.contains("endpoint") || name.contains("url"));
        let guarded =
            endpoints.filter_map(|(_, value)| url::Url::parse(value).ok()).all(|url| web::is_guarded(&url));
        Ok(Bucket { store, provider, name, last, stall: http.stall, guarded })
    }

    /// The names and sizes below `prefix`, relative to it, down to one folder deep.
    pub(crate) async fn list(&self, prefix: &str) -> Result<Vec<(String, u64)>, Failure> {
        let path = self.path(prefix)?;
        let mut found = Vec::new();
        let top = self.list_folder(&path).await?;
        for folder in top.common_prefixes {
            let listed = self.list_folder(&folder).await?;
            found.extend(listed.objects);
        }
        found.extend(top.objects);
        let relative = |object: object_store::ObjectMeta| {
            let parts = object.location.prefix_match(&path)?;
            let name = parts.map(|part| part.as_ref().to_owned()).collect::<Vec<_>>().join("/");
            Some((name, object.size))
        };
        Ok(found.into_iter().filter_map(relative).filter(|(name, _)| !name.is_empty()).collect())
    }

    async fn list_folder(&self, path: &Path) -> Result<object_store::ListResult, Failure> {
        let listed = tokio::time::timeout(4 * self.stall, self.store.list_with_delimiter(Some(path))).await;
        let listed = listed.map_err(|_| Failure::retry("the listing does not come"))?;
        let seen = std::mem::take(&mut *self.last.lock().unwrap_or_else(PoisonError::into_inner));
        listed.map_err(|_| self.failure(&self.name, seen))
    }

    /// What a failed request means.
    fn failure(&self, name: &str, seen: Seen) -> Failure {
        let login = login(self.provider);
        match seen.status {
            Some(status) if status.is_success() => {
                Failure::retry("the server answers with something else than was asked for")
            }
            Some(status) => web::failure(name, status, &seen.headers, login),
            // Signing fails where credentials do not come.
            None => Failure::retry(seen.problem.unwrap_or_else(|| format!("no credentials; {login}"))),
        }
    }

    fn path(&self, key: &str) -> Result<Path, Failure> {
        let bad = |_| Failure::Fatal(RemoteError::refused(&self.name, "the key cannot be asked for"));
        Path::parse(key).map_err(bad)
    }

    /// The object with this key.
    pub(crate) fn object(&self, key: &str) -> CloudObject {
        CloudObject { bucket: self.clone(), key: key.to_owned(), name: format!("{}/{key}", self.name) }
    }
}

/// What a user can do about credentials.
fn login(provider: Provider) -> &'static str {
    match provider {
        Provider::S3 => {
            "the server's environment names them: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, \
             AWS_ENDPOINT_URL for other services, AWS_SKIP_SIGNATURE=true for public buckets"
        }
        Provider::Gcs => {
            "the server's environment names them: GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_ACCOUNT, \
             GOOGLE_SKIP_SIGNATURE=true for public buckets"
        }
        Provider::Azure => {
            "the server's environment names them: AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or \
             AZURE_STORAGE_SAS_KEY, AZURE_SKIP_SIGNATURE=true for public containers"
        }
    }
}

/// One object of a [`Bucket`].
pub(crate) struct CloudObject {
    bucket: Bucket,
    key: String,
    name: String,
}

impl CloudObject {
    async fn get(
        &self,
        options: GetOptions,
    ) -> Result<(object_store::GetResult, HeaderMap, StatusCode), Failure> {
        let path = self.bucket.path(&self.key)?;
        let sight = Sight::default();
        let mut extensions = Extensions::new();
        extensions.insert(sight.clone());
        let result = self.bucket.store.get_opts(&path, GetOptions { extensions, ..options }).await;
        let seen = std::mem::take(&mut *sight.lock().unwrap_or_else(PoisonError::into_inner));
        match (result, seen.status) {
            (Ok(result), Some(status)) => Ok((result, seen.headers, status)),
            (Err(_), Some(StatusCode::OK)) => Err(Failure::NoRanges),
            (_, Some(StatusCode::RANGE_NOT_SATISFIABLE)) => Err(Failure::Changed),
            _ => Err(self.bucket.failure(&self.name, seen)),
        }
    }

    async fn ask(&self) -> Result<Stat, Failure> {
        let (result, headers, _) = self.get(GetOptions { head: true, ..GetOptions::default() }).await?;
        let version = web::version(&headers);
        let digest = web::stated_digest(&headers).or_else(|| {
            // The tag of an object that was encrypted with a key of the service's own is not its MD5.
            let plain = headers.get("x-amz-server-side-encryption").is_none_or(|kind| kind == "AES256");
            let tagged = plain && self.bucket.provider == Provider::S3;
            version.etag.as_deref().filter(|_| tagged).and_then(Digest::md5_from_etag)
        });
        Ok(Stat { size: result.meta.size, version, digest, ranges: true })
    }

    async fn fetch(&self, range: Option<Range<u64>>, stat: Stat) -> Result<Body, Failure> {
        let options = GetOptions {
            if_match: stat.version.strong_etag().map(str::to_owned),
            range: range.clone().map(GetRange::Bounded),
            ..GetOptions::default()
        };
        let (result, headers, status) = self.get(options).await?;
        web::check(&headers, status, range, &stat)?;
        let stall = self.bucket.stall;
        let pieces = futures::stream::unfold(Some(result.into_stream()), move |stream| async move {
            let mut stream = stream?;
            match tokio::time::timeout(stall, stream.next()).await {
                Err(_) => Some((Err(Failure::retry("the server sends nothing more")), None)),
                Ok(None) => None,
                Ok(Some(Err(_))) => Some((Err(Failure::retry("the answer broke off")), None)),
                Ok(Some(Ok(data))) => Some((Ok::<Bytes, Failure>(data), Some(stream))),
            }
        });
        Ok(pieces.boxed())
    }
}

impl Object for CloudObject {
    fn name(&self) -> &str {
        &self.name
    }

    fn is_guarded(&self) -> bool {
        self.bucket.guarded
    }

    fn stat(&self) -> BoxFuture<'_, Result<Stat, Failure>> {
        self.ask().boxed()
    }

    fn read(&self, range: Option<Range<u64>>, stat: Stat) -> BoxFuture<'_, Result<Body, Failure>> {
        self.fetch(range, stat).boxed()
    }
}
