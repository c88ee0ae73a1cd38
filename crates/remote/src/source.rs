//! The text that names a source: parsed, and shown again without credentials.
//!
//! ```text
//! https://HOST/DIR, https://HOST/FILE.gguf       a directory with config.json, or one file; http:// too
//! s3://BUCKET/PREFIX, gs://BUCKET/PREFIX         a prefix that holds a checkpoint, or one file
//! az://CONTAINER/PREFIX, abfs://…                account from the environment
//! hf:ORG/NAME[@REVISION][/FILE.gguf]             a model hub
//! ```

use std::fmt;

use url::Url;

use crate::RemoteError;

/// A source that is not on this disk. Its `Display` and `Debug` show no credentials.
#[derive(Clone, PartialEq, Eq)]
pub struct RemoteSource {
    pub(crate) place: Place,
}

/// Where it is.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// A web server. The URL may hold a password or a signed query, so it is never shown as it is.
    Web(Url),
    /// A bucket or container.
    Cloud {
        /// Whose protocol.
        provider: Provider,
        /// Bucket or container.
        bucket: String,
        /// Azure's account, where the address names it.
        account: Option<String>,
        /// Key or prefix without slashes at its ends; may be empty.
        key: String,
    },
    /// A repository of a model hub.
    Hub {
        /// `ORG/NAME`.
        repository: String,
        /// Branch, tag or commit.
        revision: String,
        /// One file of it instead of the whole model.
        file: Option<String>,
    },
}

/// Protocols of object stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Provider {
    S3,
    Gcs,
    Azure,
}

impl Provider {
    fn scheme(self) -> &'static str {
        match self {
            Provider::S3 => "s3",
            Provider::Gcs => "gs",
            Provider::Azure => "az",
        }
    }
}

impl RemoteSource {
    /// Parses a source. `None` if the text is the name of something on this disk.
    ///
    /// # Errors
    /// When it is meant to be remote and is not well-formed. The text is not repeated in the error beyond its scheme:
    /// it may hold a password.
    pub fn parse(text: &str) -> Option<Result<RemoteSource, RemoteError>> {
        if let Some(rest) = text.strip_prefix("hf:") {
            return Some(hub(rest.trim_start_matches('/')));
        }
        let (scheme, _) = text.split_once("://")?;
        let plain = scheme.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.'));
        if scheme.is_empty() || !plain {
            return None;
        }
        let scheme = scheme.to_ascii_lowercase();
        Some(match scheme.as_str() {
            "http" | "https" => web(text),
            "s3" | "s3a" => cloud(Provider::S3, text),
            "gs" | "gcs" => cloud(Provider::Gcs, text),
            "az" | "abfs" | "abfss" | "azure" => cloud(Provider::Azure, text),
            _ => Err(RemoteError::BadSource(format!(
                "sources of the kind {scheme}:// cannot be read; http, https, s3, gs, az, abfs and hf: can"
            ))),
        })
    }

    /// The same for equal sources, and safe as the name of a directory. A query tells sources apart although it is not
    /// shown; a user and a password do not.
    pub(crate) fn key(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.to_string().as_bytes());
        if let Place::Web(url) = &self.place {
            hasher.update(b"?").update(url.query().unwrap_or_default().as_bytes());
        }
        hasher.finalize().to_hex().as_str().chars().take(32).collect()
    }
}

fn bad(scheme: &str, problem: &str) -> RemoteError {
    RemoteError::BadSource(format!("the {scheme} source is not usable: {problem}"))
}

fn web(text: &str) -> Result<RemoteSource, RemoteError> {
    let mut url = Url::parse(text).map_err(|error| bad("http", &error.to_string()))?;
    if url.host_str().is_none_or(str::is_empty) {
        return Err(bad("http", "it names no host"));
    }
    url.set_fragment(None);
    // A folder is the same with and without a slash behind it.
    let path = url.path().trim_end_matches('/').to_owned();
    url.set_path(&path);
    Ok(RemoteSource { place: Place::Web(url) })
}

fn cloud(provider: Provider, text: &str) -> Result<RemoteSource, RemoteError> {
    let scheme = provider.scheme();
    let url = Url::parse(text).map_err(|error| bad(scheme, &error.to_string()))?;
    if url.query().is_some() || url.password().is_some() {
        return Err(bad(scheme, "credentials come from the environment, not from the address"));
    }
    let host = url.host_str().unwrap_or_default();
    // abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH puts the container where others have a user.
    let (bucket, account) = match (provider, url.username()) {
        (_, "") => (host, None),
        (Provider::Azure, container) => (container, host.split('.').next().map(str::to_owned)),
        _ => return Err(bad(scheme, "credentials come from the environment, not from the address")),
    };
    if bucket.is_empty() {
        return Err(bad(scheme, "it names no bucket"));
    }
    let key = percent_encoding::percent_decode_str(url.path().trim_matches('/')).decode_utf8();
    let key = key.map_err(|_| bad(scheme, "its path is not UTF-8"))?.into_owned();
    Ok(RemoteSource { place: Place::Cloud { provider, bucket: bucket.to_owned(), account, key } })
}

fn hub(text: &str) -> Result<RemoteSource, RemoteError> {
    let usable = |part: &str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        !part.is_empty() && part.len() <= 200 && part.chars().all(plain) && !part.contains("..")
    };
    let mut parts = text.splitn(3, '/');
    let (organisation, rest, file) = (parts.next().unwrap_or_default(), parts.next(), parts.next());
    let rest = rest
        .ok_or_else(|| bad("hf:", "it is hf:ORG/NAME, hf:ORG/NAME@REVISION or hf:ORG/NAME@REVISION/FILE"))?;
    let (name, revision) = rest.split_once('@').unwrap_or((rest, "main"));
    // A revision may be of the form refs/pr/1.
    let (revision, file) = match file {
        Some(more) if revision == "refs" => {
            let mut parts = more.splitn(3, '/');
            let (kind, number) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
            (format!("refs/{kind}/{number}"), parts.next())
        }
        file => (revision.to_owned(), file),
    };
    if !usable(organisation) || !usable(name) || !revision.split('/').all(usable) {
        return Err(bad("hf:", "organisation, name and revision are letters, digits and - _ ."));
    }
    let file = file.filter(|file| !file.is_empty());
    if file.is_some_and(|file| !file.split('/').all(|part| !part.is_empty() && part != "." && part != "..")) {
        return Err(bad("hf:", "the file is not the path of one"));
    }
    let repository = format!("{organisation}/{name}");
    Ok(RemoteSource { place: Place::Hub { repository, revision, file: file.map(str::to_owned) } })
}

/// A URL as it may be shown: without user, password and query.
pub(crate) fn shown(url: &Url) -> String {
    let mut shown = url.clone();
    // These only fail for URLs without a host, which have no user either.
    let _ = shown.set_username("");
    let _ = shown.set_password(None);
    shown.set_query(None);
    shown.set_fragment(None);
    shown.to_string()
}

impl fmt::Display for RemoteSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Web(url) => f.write_str(&shown(url)),
            Place::Cloud { bucket, account: Some(account), key, .. } => {
                write!(f, "abfs://{bucket}@{account}.dfs.core.windows.net/{key}")
            }
            Place::Cloud { provider, bucket, account: None, key } => {
                write!(f, "{}://{bucket}/{key}", provider.scheme())
            }
            Place::Hub { repository, revision, file } => {
                write!(f, "hf:{repository}@{revision}")?;
                file.as_ref().map_or(Ok(()), |file| write!(f, "/{file}"))
            }
        }
    }
}

impl fmt::Debug for RemoteSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown_as(text: &str) -> String {
        RemoteSource::parse(text).unwrap().unwrap().to_string()
    }

    #[test]
    fn every_kind_of_source_is_understood() {
        for (text, shown) in [
            ("s3://models/llama/8b/", "s3://models/llama/8b"),
            ("gs://models", "gs://models/"),
            ("az://models/a%20b", "az://models/a b"),
            (
                "abfss://models@account.dfs.core.windows.net/x/y",
                "abfs://models@account.dfs.core.windows.net/x/y",
            ),
            ("HTTPS://example.org/m/model.gguf", "https://example.org/m/model.gguf"),
            ("hf:org/name", "hf:org/name@main"),
            ("hf:org/name@v1.0", "hf:org/name@v1.0"),
            ("hf://org/name@refs/pr/7/sub/a.gguf", "hf:org/name@refs/pr/7/sub/a.gguf"),
            ("hf:org/name/a-Q4_K.gguf", "hf:org/name@main/a-Q4_K.gguf"),
        ] {
            assert_eq!(shown_as(text), shown, "{text}");
        }
        for local in ["model.gguf", "/models/x", "./a:b", "C:\\models", "dir/with://inside"] {
            assert!(RemoteSource::parse(local).is_none(), "{local}");
        }
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        for text in [
            "ftp://example.org/x",
            "hf:name",
            "hf:org/na me",
            "hf:org/../x",
            "hf:org/name@main/../../etc",
            "s3://",
            "s3://key:secret@bucket/x",
            "s3://bucket/x?token=1",
            "http://",
        ] {
            let error = RemoteSource::parse(text).unwrap().unwrap_err().to_string();
            assert!(!error.contains("secret") && !error.contains("token=1"), "{text}: {error}");
        }
    }

    #[test]
    fn credentials_are_not_shown() {
        let text = "https://ann:hunter2@example.org/m/?X-Amz-Signature=abc123#frag";
        let source = RemoteSource::parse(text).unwrap().unwrap();
        for shown in [source.to_string(), format!("{source:?}"), format!("{:?}", Some(&source))] {
            assert_eq!(shown.trim_start_matches("Some(").trim_end_matches(')'), "https://example.org/m");
        }
    }

    #[test]
    fn the_key_depends_on_the_place_and_not_on_the_credentials() {
        let key = |text: &str| RemoteSource::parse(text).unwrap().unwrap().key();
        assert_eq!(key("https://a:b@example.org/m"), key("https://example.org/m"));
        assert_ne!(key("https://example.org/m"), key("https://example.org/n"));
        assert_ne!(key("https://example.org/m?file=1"), key("https://example.org/m?file=2"));
    }
}
