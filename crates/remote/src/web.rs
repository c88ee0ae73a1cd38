//! An object on a web server, also of a model hub: asks for ranges and checks that exactly those are answered.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine;
use futures::FutureExt;
use futures::future::BoxFuture;
use http::header::{
    ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, ETAG, IF_MATCH, LAST_MODIFIED, RANGE,
    USER_AGENT,
};
use http::{HeaderMap, HeaderValue, StatusCode};
use url::Url;

use crate::RemoteError;
use crate::http::{Answer, Http, is_temporary, retry_after};
use crate::object::{Body, Digest, Failure, Object, Stat, Version};
use crate::source::shown;

/// How long the end of a redirection is asked directly. Shorter than any signature in it is good for.
const REDIRECT_KEPT: Duration = Duration::from_secs(240);

/// One object on a web server.
pub(crate) struct WebObject {
    http: Http,
    url: Url,
    /// Value of the `Authorization` header for the origin of `url`.
    credential: Option<HeaderValue>,
    name: String,
    /// What to do when the server wants to know who asks.
    login: &'static str,
    /// Where `url` was redirected to, and when.
    redirected: Mutex<Option<(Url, Instant)>>,
}

impl WebObject {
    /// The object at `url`; a user and password in it become a header.
    pub(crate) fn new(http: Http, url: &Url) -> WebObject {
        let credential = (!url.username().is_empty() || url.password().is_some()).then(|| {
            let decode =
                |text: &str| percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned();
            let pair = format!("{}:{}", decode(url.username()), decode(url.password().unwrap_or_default()));
            format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair))
        });
        let credential = credential.and_then(|text| HeaderValue::from_str(&text).ok());
        let login = "a user and password can stand in the address: https://USER:PASSWORD@HOST/...";
        WebObject {
            http,
            url: url.clone(),
            credential,
            name: shown(url),
            login,
            redirected: Mutex::new(None),
        }
    }

    /// The object at `url` of a model hub.
    pub(crate) fn of_hub(http: Http, url: Url, token: Option<HeaderValue>, name: String) -> WebObject {
        let login = "set HF_TOKEN in the server's environment to a token that may read it";
        WebObject { http, url, credential: token, name, login, redirected: Mutex::new(None) }
    }

    /// Gets the object or a part of it; anything but 200 and 206 is a failure.
    async fn get(&self, mut headers: HeaderMap) -> Result<Answer, Failure> {
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        headers.insert(USER_AGENT, HeaderValue::from_static(concat!("tangram/", env!("CARGO_PKG_VERSION"))));
        let kept = || self.redirected.lock().unwrap_or_else(PoisonError::into_inner);
        let direct = kept().clone().filter(|(_, since)| since.elapsed() < REDIRECT_KEPT);
        let answer = match &direct {
            // The credential was never sent there.
            Some((url, _)) => self.http.get(url, &headers, None).await,
            None => self.http.get(&self.url, &headers, self.credential.as_ref()).await,
        };
        let good = matches!(&answer, Ok(answer) if answer.status.is_success());
        if direct.is_some() && !good {
            // A signature may have run out: the next attempt asks for a new one.
            *kept() = None;
            if let Ok(answer) = &answer
                && !is_temporary(answer.status)
                && answer.status != StatusCode::PRECONDITION_FAILED
            {
                return Err(Failure::retry(format!("the server answered {}", answer.status)));
            }
        }
        let answer = answer?;
        let elsewhere = answer.url.origin() != self.url.origin();
        if good && direct.is_none() && elsewhere {
            *kept() = Some((answer.url.clone(), Instant::now()));
        }
        let coded = answer.headers.get(CONTENT_ENCODING).is_some_and(|coding| coding != "identity");
        match answer.status {
            _ if coded => Err(Failure::retry("the server compresses what it was asked to send as it is")),
            StatusCode::OK | StatusCode::PARTIAL_CONTENT => Ok(answer),
            StatusCode::RANGE_NOT_SATISFIABLE | StatusCode::PRECONDITION_FAILED => Ok(answer),
            status => Err(failure(&self.name, status, &answer.headers, self.login)),
        }
    }

    async fn ask(&self) -> Result<Stat, Failure> {
        let mut headers = HeaderMap::new();
        // GET and not HEAD: signed addresses are good for one method, and this shows whether ranges work.
        headers.insert(RANGE, HeaderValue::from_static("bytes=0-0"));
        let answer = self.get(headers).await?;
        let (size, ranges) = match answer.status {
            StatusCode::PARTIAL_CONTENT => match content_range(&answer.headers) {
                Some((Range { start: 0, end: 1 }, size)) => (size, true),
                _ => return Err(Failure::retry("the server answers with another range than was asked for")),
            },
            // An empty object has no first byte.
            StatusCode::RANGE_NOT_SATISFIABLE => match header(&answer.headers, CONTENT_RANGE) {
                Some("bytes */0") => (0, true),
                _ => return Err(Failure::retry("the server has no first byte of it")),
            },
            StatusCode::OK => match length(&answer.headers) {
                Some(size) => (size, false),
                None => {
                    let problem =
                        "the server tells neither ranges nor a length of it, so it could not be checked";
                    return Err(Failure::Fatal(RemoteError::refused(&self.name, problem)));
                }
            },
            status => return Err(Failure::retry(format!("the server answered {status}"))),
        };
        let digest = digest(&answer);
        Ok(Stat { size, version: version(&answer.headers), digest, ranges })
    }

    async fn fetch(&self, range: Option<Range<u64>>, stat: Stat) -> Result<Body, Failure> {
        let mut headers = HeaderMap::new();
        if let Some(range) = &range {
            let value = format!("bytes={}-{}", range.start, range.end.saturating_sub(1));
            headers.insert(RANGE, HeaderValue::from_str(&value).map_err(|_| Failure::retry("no range"))?);
        }
        if let Some(etag) = stat.version.strong_etag()
            && let Ok(etag) = HeaderValue::from_str(etag)
        {
            headers.insert(IF_MATCH, etag);
        }
        let answer = self.get(headers).await?;
        check(&answer.headers, answer.status, range, &stat)?;
        Ok(answer.body)
    }
}

impl Object for WebObject {
    fn name(&self) -> &str {
        &self.name
    }

    fn is_guarded(&self) -> bool {
        is_guarded(&self.url)
    }

    fn stat(&self) -> BoxFuture<'_, Result<Stat, Failure>> {
        self.ask().boxed()
    }

    fn read(&self, range: Option<Range<u64>>, stat: Stat) -> BoxFuture<'_, Result<Body, Failure>> {
        self.fetch(range, stat).boxed()
    }
}

/// Whether what comes from an address cannot be changed on its way here: over TLS, or from this machine.
pub(crate) fn is_guarded(url: &Url) -> bool {
    url.scheme() == "https"
        || match url.host() {
            Some(url::Host::Ipv4(address)) => address.is_loopback(),
            Some(url::Host::Ipv6(address)) => address.is_loopback(),
            Some(url::Host::Domain(name)) => name == "localhost",
            None => false,
        }
}

/// Whether an answer is the one that was asked for: of the same version, and of exactly these bytes.
pub(crate) fn check(
    headers: &HeaderMap,
    status: StatusCode,
    range: Option<Range<u64>>,
    stat: &Stat,
) -> Result<(), Failure> {
    match status {
        StatusCode::PRECONDITION_FAILED | StatusCode::RANGE_NOT_SATISFIABLE => return Err(Failure::Changed),
        _ if stat.version.contradicts(&version(headers)) => return Err(Failure::Changed),
        _ => {}
    }
    let expected = match (status, range) {
        (StatusCode::PARTIAL_CONTENT, Some(range)) => match content_range(headers) {
            Some((_, size)) if size != stat.size => return Err(Failure::Changed),
            Some((sent, _)) if sent == range => range.end - range.start,
            _ => return Err(Failure::retry("the server answers with another range than was asked for")),
        },
        // Everything was asked for: as good as the range.
        (StatusCode::OK, Some(range)) if range != (0..stat.size) => return Err(Failure::NoRanges),
        (StatusCode::OK, _) => stat.size,
        (status, _) => return Err(Failure::retry(format!("the server answered {status}"))),
    };
    match length(headers) {
        Some(length) if length != expected => {
            Err(Failure::retry(format!("the server announces {length} bytes instead of {expected}")))
        }
        _ => Ok(()),
    }
}

/// What a status means for whoever asked.
pub(crate) fn failure(name: &str, status: StatusCode, headers: &HeaderMap, login: &str) -> Failure {
    if is_temporary(status) {
        return Failure::Retry {
            problem: format!("the server answered {status}"),
            wish: retry_after(headers),
        };
    }
    match status {
        StatusCode::NOT_FOUND | StatusCode::GONE => Failure::Missing,
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            Failure::Fatal(RemoteError::refused(name, format!("the server answered {status}; {login}")))
        }
        StatusCode::PRECONDITION_FAILED => Failure::Changed,
        status => Failure::Fatal(RemoteError::refused(name, format!("the server answered {status}"))),
    }
}

fn header(headers: &HeaderMap, name: http::HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

fn length(headers: &HeaderMap) -> Option<u64> {
    header(headers, CONTENT_LENGTH)?.parse().ok()
}

pub(crate) fn version(headers: &HeaderMap) -> Version {
    let own = |name| header(headers, name).map(str::to_owned);
    Version { etag: own(ETAG), modified: own(LAST_MODIFIED) }
}

/// The range that an answer holds, and the size of the whole.
fn content_range(headers: &HeaderMap) -> Option<(Range<u64>, u64)> {
    let (range, size) = header(headers, CONTENT_RANGE)?.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last, size): (u64, u64, u64) = (first.parse().ok()?, last.parse().ok()?, size.parse().ok()?);
    (first <= last && last < size).then(|| (first..last + 1, size))
}

/// A hash of the whole that the server states. The hub's `X-Linked-Etag` (on the redirect to where the file lies) is
/// the SHA-256 of large files; of small ones it is git's hash of the file, which has another length.
fn digest(answer: &Answer) -> Option<Digest> {
    let linked =
        answer.passed.iter().chain([&answer.headers]).find_map(|headers| headers.get("x-linked-etag"));
    let linked = linked.and_then(|etag| Digest::sha256_from_hex(etag.to_str().ok()?.trim_matches('"')));
    linked.or_else(|| stated_digest(&answer.headers))
}

/// A hash that object stores state in headers of their own.
pub(crate) fn stated_digest(headers: &HeaderMap) -> Option<Digest> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let decode = |text: &str| base64::engine::general_purpose::STANDARD.decode(text).ok();
    // A checksum of parts' checksums has their number behind it, or says so.
    let whole = text("x-amz-checksum-type").is_none_or(|kind| kind == "FULL_OBJECT");
    if let Some(sha) = text("x-amz-checksum-sha256").filter(|_| whole).and_then(decode)
        && let Ok(sha) = sha.try_into()
    {
        return Some(Digest::Sha256(sha));
    }
    let google = headers.get_all("x-goog-hash").iter().filter_map(|value| value.to_str().ok());
    let google = google.flat_map(|list| list.split(',')).filter_map(|item| item.trim().split_once('='));
    let google_crc = google.filter(|(kind, _)| *kind == "crc32c").find_map(|(_, value)| decode(value));
    let amazon_crc = text("x-amz-checksum-crc32c").filter(|_| whole).and_then(decode);
    if let Some(crc) = google_crc.or(amazon_crc).and_then(|crc| <[u8; 4]>::try_from(crc).ok()) {
        return Some(Digest::Crc32c(u32::from_be_bytes(crc)));
    }
    let md5 = text("x-ms-blob-content-md5").and_then(decode).and_then(|md5| md5.try_into().ok());
    md5.map(Digest::Md5)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (http::HeaderName::from_static(name), value.parse().unwrap()))
            .collect()
    }

    fn stat() -> Stat {
        let version = Version { etag: Some("\"v1\"".into()), modified: None };
        Stat { size: 1000, version, digest: None, ranges: true }
    }

    fn verdict(status: u16, pairs: &[(&'static str, &str)], range: Option<Range<u64>>) -> String {
        let status = StatusCode::from_u16(status).unwrap();
        match check(&headers(pairs), status, range, &stat()) {
            Ok(()) => "ok".into(),
            Err(Failure::Retry { .. }) => "retry".into(),
            Err(Failure::Changed) => "changed".into(),
            Err(Failure::NoRanges) => "no ranges".into(),
            Err(other) => format!("{other:?}"),
        }
    }

    #[test]
    fn only_the_range_that_was_asked_for_is_taken() {
        let range = Some(100..200);
        let good = ("content-range", "bytes 100-199/1000");
        assert_eq!(verdict(206, &[good], range.clone()), "ok");
        assert_eq!(verdict(206, &[good, ("content-length", "100"), ("etag", "\"v1\"")], range.clone()), "ok");
        assert_eq!(verdict(206, &[good, ("content-length", "99")], range.clone()), "retry");
        assert_eq!(verdict(206, &[good, ("etag", "\"v2\"")], range.clone()), "changed");
        assert_eq!(verdict(206, &[("content-range", "bytes 100-199/1001")], range.clone()), "changed");
        for other in ["bytes 100-198/1000", "bytes 0-99/1000", "bytes 100-199/*", "bytes 199-100/1000", "x"] {
            assert_eq!(verdict(206, &[("content-range", other)], range.clone()), "retry", "{other}");
        }
        assert_eq!(verdict(206, &[], range.clone()), "retry");
        assert_eq!(verdict(200, &[], range.clone()), "no ranges");
        assert_eq!(verdict(412, &[], range.clone()), "changed");
        assert_eq!(verdict(416, &[], range), "changed");
        assert_eq!(verdict(200, &[("content-length", "1000")], Some(0..1000)), "ok");
        assert_eq!(verdict(200, &[("content-length", "1001")], None), "retry");
    }

    #[test]
    fn hashes_in_headers_are_found_and_those_of_parts_are_not() {
        let found =
            |pairs: &[(&'static str, &str)]| stated_digest(&headers(pairs)).map(|digest| digest.name());
        let crc = "ijo0bw==";
        assert_eq!(found(&[("x-amz-checksum-crc32c", crc)]), Some("CRC-32C"));
        assert_eq!(found(&[("x-amz-checksum-crc32c", "ijo0bw==-3")]), None);
        assert_eq!(found(&[("x-amz-checksum-crc32c", crc), ("x-amz-checksum-type", "COMPOSITE")]), None);
        assert_eq!(found(&[("x-goog-hash", "md5=xx, crc32c=ijo0bw==")]), Some("CRC-32C"));
        assert_eq!(found(&[("x-ms-blob-content-md5", "kAFQmDzST7DWlj99KOF/cg==")]), Some("MD5"));
        assert_eq!(
            found(&[("etag", "\"900150983cd24fb0d6963f7d28e17f72\"")]),
            None,
            "only S3 means its tag so"
        );
    }

    #[test]
    fn a_server_may_ask_for_patience() {
        let wish = |value: &str| match failure(
            "x",
            StatusCode::SERVICE_UNAVAILABLE,
            &headers(&[("retry-after", value)]),
            "",
        ) {
            Failure::Retry { wish, .. } => wish,
            _ => None,
        };
        assert_eq!(wish("7"), Some(Duration::from_secs(7)));
        assert_eq!(wish("Fri, 01 Jan 2027 00:00:00 GMT"), None);
    }
}
