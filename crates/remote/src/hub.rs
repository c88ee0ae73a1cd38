//! A repository of a model hub: its listing by the hub's API, its files by their addresses, all of one commit.
//!
//! `HF_ENDPOINT` names a mirror, `HF_TOKEN` who asks. The token goes to the endpoint and nowhere else.

use http::{HeaderMap, HeaderValue, StatusCode};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use serde::Deserialize;
use url::Url;

use crate::RemoteError;
use crate::http::{Http, read_small};
use crate::object::Failure;
use crate::web::{WebObject, failure};

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
/// What must not stand in a path segment as it is.
const SEGMENT: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'"')
    .add(b'#')
    .add(b'%')
    .add(b'/')
    .add(b'<')
    .add(b'>')
    .add(b'?')
    .add(b'`')
    .add(b'{')
    .add(b'}');
const LOGIN: &str = "set HF_TOKEN in the server's environment to a token that may read it (gated models also ask to be accepted first)";

/// A hub.
pub(crate) struct Hub {
    http: Http,
    endpoint: Url,
    token: Option<HeaderValue>,
}

/// A commit of a repository.
pub(crate) struct Commit {
    repository: String,
    /// Its hash, so that files of two commits are never mixed; the revision where the hub does not tell it.
    revision: String,
    /// Paths of its files.
    pub(crate) files: Vec<String>,
}

#[derive(Deserialize)]
struct Answer {
    sha: Option<String>,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

impl Hub {
    pub(crate) fn new(http: Http, environment: &[(String, String)]) -> Result<Hub, RemoteError> {
        let setting = |name: &str| {
            let found = environment.iter().find(|(key, _)| key == name);
            found.map(|(_, value)| value.trim()).filter(|value| !value.is_empty())
        };
        let bad =
            |what: &str| RemoteError::BadSource(format!("{what} in the server's environment is not usable"));
        let endpoint = setting("HF_ENDPOINT").unwrap_or(DEFAULT_ENDPOINT).trim_end_matches('/');
        let endpoint = Url::parse(&format!("{endpoint}/")).map_err(|_| bad("HF_ENDPOINT"))?;
        if !matches!(endpoint.scheme(), "http" | "https") {
            return Err(bad("HF_ENDPOINT"));
        }
        let token = setting("HF_TOKEN").map(|token| HeaderValue::from_str(&format!("Bearer {token}")));
        let token = token.transpose().map_err(|_| bad("HF_TOKEN"))?;
        Ok(Hub { http, endpoint, token })
    }

    fn url(&self, path: &str) -> Result<Url, Failure> {
        let bad = |_| Failure::Fatal(RemoteError::BadSource("the hub has no such address".to_owned()));
        self.endpoint.join(path).map_err(bad)
    }

    /// What the repository holds at a revision.
    pub(crate) async fn commit(&self, repository: &str, revision: &str) -> Result<Commit, Failure> {
        let name = format!("hf:{repository}@{revision}");
        let encoded = utf8_percent_encode(revision, SEGMENT);
        let url = self.url(&format!("api/models/{repository}/revision/{encoded}"))?;
        let answer = self.http.get(&url, &HeaderMap::new(), self.token.as_ref()).await?;
        if answer.status != StatusCode::OK {
            return Err(match failure(&name, answer.status, &answer.headers, LOGIN) {
                // The hub does not tell strangers what exists.
                Failure::Missing => Failure::Fatal(RemoteError::refused(
                    &name,
                    format!("the hub has no such repository or revision, or hides it; {LOGIN}"),
                )),
                other => other,
            });
        }
        let answer: Answer = serde_json::from_slice(&read_small(answer.body).await?)
            .map_err(|_| Failure::retry("the hub's answer is no listing"))?;
        let sha =
            answer.sha.filter(|sha| !sha.is_empty() && sha.bytes().all(|byte| byte.is_ascii_hexdigit()));
        Ok(Commit {
            repository: repository.to_owned(),
            revision: sha.unwrap_or_else(|| revision.to_owned()),
            files: answer.siblings.into_iter().map(|sibling| sibling.rfilename).collect(),
        })
    }

    /// A file of a commit.
    pub(crate) fn object(&self, commit: &Commit, file: &str) -> Result<WebObject, Failure> {
        let Commit { repository, revision, .. } = commit;
        let path: Vec<String> =
            file.split('/').map(|part| utf8_percent_encode(part, SEGMENT).to_string()).collect();
        let encoded = utf8_percent_encode(revision, SEGMENT);
        let url = self.url(&format!("{repository}/resolve/{encoded}/{}", path.join("/")))?;
        let name = format!("hf:{repository}/{file}");
        Ok(WebObject::of_hub(self.http.clone(), url, self.token.clone(), name))
    }
}
