//! What a deployed model can do, found out by asking it, and its answers when nothing else runs.

use std::rc::Rc;

use anyhow::{Context, bail};
use serde_json::{Value, json};
use tangram_node::ModelStatus;

use super::answer::{Answer, Reply, Request};
use super::forms::Form;
use super::trace;
use crate::client::Client;

/// A request with the answer that it got when it ran alone.
#[derive(Debug)]
pub(super) struct Recorded {
    pub(super) request: Request,
    pub(super) answer: Answer,
}

/// A deployed model.
#[derive(Debug)]
pub(super) struct Subject {
    pub(super) name: String,
    /// Longest sequence, tokens.
    pub(super) context: usize,
    /// Whether it generates; else it embeds.
    pub(super) generates: bool,
    /// Whether it takes text.
    pub(super) text: bool,
    /// Whether it takes chats.
    pub(super) chat: bool,
    /// Token ids of prompts are less than this.
    pub(super) vocabulary: u32,
    pub(super) recorded: Vec<Rc<Recorded>>,
}

/// Bounds of token ids to try, the first that all tokens of a prompt are below.
const VOCABULARIES: [u32; 3] = [250, 100, 20];

impl Subject {
    /// Asks the model what it can do, and records some of its answers.
    ///
    /// # Errors
    /// When it does not even answer a plain request.
    pub(super) async fn meet(
        client: &Client,
        model: &ModelStatus,
        most_input: usize,
    ) -> anyhow::Result<Subject> {
        let mut subject = Subject {
            name: model.name.clone(),
            context: model.context,
            generates: model.task == "generate",
            text: false,
            chat: false,
            vocabulary: 0,
            recorded: Vec::new(),
        };
        let mut refusal = String::new();
        for vocabulary in VOCABULARIES {
            subject.vocabulary = vocabulary;
            match subject.plain(vocabulary - 1).send(client).await? {
                Reply::Answer(_) => break,
                Reply::Refused(_, message) => {
                    refusal = message.unwrap_or_default();
                    subject.vocabulary = 0;
                }
                Reply::Left => bail!("a client left that was not to"),
            }
        }
        if subject.vocabulary == 0 {
            bail!("{}: {refusal}", model.name);
        }
        let accepts =
            async |request: Request| anyhow::Ok(matches!(request.send(client).await?, Reply::Answer(_)));
        if subject.generates {
            let mut body = subject.completion(json!("a"), 1);
            subject.text = accepts(Request::new("/v1/completions", body.clone())).await?;
            if let Value::Object(fields) = &mut body {
                fields.remove("prompt");
            }
            body["messages"] = message("a");
            subject.chat = accepts(Request::new("/v1/chat/completions", body)).await?;
        } else {
            let body = json!({ "model": subject.name, "input": "a" });
            subject.text = accepts(Request::new("/v1/embeddings", body)).await?;
        }
        for request in subject.to_record(most_input) {
            match request.send(client).await? {
                Reply::Answer(answer) => subject.recorded.push(Rc::new(Recorded { request, answer })),
                reply => bail!("{}: a plain request got {reply:?}", subject.name),
            }
        }
        Ok(subject)
    }

    /// The shortest request, with this token.
    fn plain(&self, token: u32) -> Request {
        if self.generates {
            Request::new("/v1/completions", self.completion(json!([token]), 1))
        } else {
            Request::new("/v1/embeddings", json!({ "model": self.name, "input": [token] }))
        }
    }

    /// The body of a greedy completion.
    pub(super) fn completion(&self, prompt: Value, max_tokens: usize) -> Value {
        json!({
            "model": self.name, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0,
            "return_token_ids": true,
        })
    }

    /// Token ids of a prompt that is the same for the same seed.
    pub(super) fn prompt(&self, seed: u64, tokens: usize) -> Vec<u32> {
        // Ids below 3 are the start and end tokens of most vocabularies.
        trace::prompt(seed, tokens).into_iter().map(|id| 3 + (id - 3) % (self.vocabulary - 3)).collect()
    }

    fn to_record(&self, most_input: usize) -> Vec<Request> {
        if !self.generates {
            let inputs = [self.prompt(1, 1), self.prompt(2, most_input.min(self.context / 2).max(1))];
            let body = json!({ "model": self.name, "input": inputs });
            return vec![Request::new("/v1/embeddings", body)];
        }
        let prompt = |seed, input, output| {
            let (input, output) = trace::fit(input, output, self.context);
            self.completion(json!(self.prompt(seed, input)), output)
        };
        let mut bodies = vec![prompt(1, 24, 24), prompt(2, most_input, 8), prompt(3, 40, 16)];
        for body in &mut bodies {
            body["ignore_eos"] = true.into();
        }
        if let Some(sampled) = bodies.last_mut() {
            sampled["temperature"] = 1.into();
            sampled["seed"] = 7.into();
            sampled["n"] = 2.into();
        }
        if self.text {
            let mut body = prompt(4, 12, 64);
            Form::Schema.ask(&mut body);
            bodies.push(body);
        }
        let mut requests: Vec<Request> =
            bodies.into_iter().map(|body| Request::new("/v1/completions", body)).collect();
        if self.chat {
            let body = json!({
                "model": self.name, "messages": message("Name a colour."), "max_tokens": 16, "temperature": 0,
                "return_token_ids": true,
            });
            requests.push(Request::new("/v1/chat/completions", body));
        }
        requests
    }

    /// Asks again for everything that was recorded, one at a time; gives what is different now.
    ///
    /// # Errors
    /// When the server does not answer.
    pub(super) async fn confirm(&self, client: &Client) -> anyhow::Result<Option<String>> {
        for recorded in &self.recorded {
            let reply = recorded.request.send(client).await.with_context(|| self.name.clone())?;
            if !matches!(&reply, Reply::Answer(answer) if answer.same(&recorded.answer)) {
                return Ok(Some(format!("{}: alone again, {:?} got {reply:?}", self.name, recorded.request)));
            }
        }
        Ok(None)
    }
}

/// One message of a user.
pub(super) fn message(text: &str) -> Value {
    json!([{ "role": "user", "content": text }])
}
