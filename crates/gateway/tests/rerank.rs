//! Reranking and scoring over a real node, compared with the model computed plainly in f64.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use common::{CHAT, EMBED, Server, start};
use serde_json::{Value, json};
use tangram_testkit::{Family, Float, RandomModel, write_cross_encoder};

const IDENTITY: &str = "torch.nn.modules.linear.Identity";
const HEADS: usize = 4;
const EPSILON: f64 = 1e-12;

fn model() -> RandomModel {
    RandomModel { context: 66, dtype: Float::F32, ..RandomModel::tiny(Family::Bert) }
}

/// A cross-encoder as its file has it.
struct Reference {
    tensors: BTreeMap<String, (Vec<usize>, Vec<f64>)>,
    roberta: bool,
}

impl Reference {
    fn read(dir: &Path, roberta: bool) -> Reference {
        let file = fs::read(dir.join("model.safetensors")).unwrap();
        let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let header: BTreeMap<String, Value> = serde_json::from_slice(&file[8..8 + length]).unwrap();
        let tensors = header.into_iter().filter(|(name, _)| name != "__metadata__").map(|(name, entry)| {
            let shape: Vec<usize> = serde_json::from_value(entry["shape"].clone()).unwrap();
            let offsets: [usize; 2] = serde_json::from_value(entry["data_offsets"].clone()).unwrap();
            let bytes = &file[8 + length + offsets[0]..8 + length + offsets[1]];
            let values = Float::F32.decode(bytes).into_iter().map(f64::from).collect();
            (name, (shape, values))
        });
        Reference { tensors: tensors.collect(), roberta }
    }

    fn tensor(&self, name: &str) -> &(Vec<usize>, Vec<f64>) {
        let inner = if self.roberta { "roberta" } else { "bert" };
        self.tensors.get(name).unwrap_or_else(|| &self.tensors[&format!("{inner}.{name}")])
    }

    fn row(&self, name: &str, row: usize) -> Vec<f64> {
        let (shape, values) = self.tensor(name);
        values[row * shape[1]..(row + 1) * shape[1]].to_vec()
    }

    fn linear(&self, name: &str, input: &[f64]) -> Vec<f64> {
        let (shape, weight) = self.tensor(&format!("{name}.weight"));
        let (_, bias) = self.tensor(&format!("{name}.bias"));
        assert_eq!(shape[1], input.len());
        let product = |row: &[f64]| row.iter().zip(input).map(|(w, x)| w * x).sum::<f64>();
        weight.chunks(shape[1]).zip(bias).map(|(row, bias)| product(row) + bias).collect()
    }

    fn norm(&self, name: &str, input: &[f64]) -> Vec<f64> {
        let mean = input.iter().sum::<f64>() / input.len() as f64;
        let variance = input.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / input.len() as f64;
        let (weight, bias) = (self.tensor(&format!("{name}.weight")), self.tensor(&format!("{name}.bias")));
        let scaled = input.iter().map(|x| (x - mean) / (variance + EPSILON).sqrt());
        scaled.zip(&weight.1).zip(&bias.1).map(|((x, weight), bias)| x * weight + bias).collect()
    }

    /// The score of tokens before the activation.
    fn score(&self, tokens: &[u32], types: &[usize]) -> f64 {
        let add = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a + b).collect::<Vec<f64>>();
        let first_position = if self.roberta { 2 } else { 0 };
        let mut states: Vec<Vec<f64>> = (0..tokens.len())
            .map(|at| {
                let kind = if self.roberta { 0 } else { types[at] };
                let word = self.row("embeddings.word_embeddings.weight", tokens[at] as usize);
                let position = self.row("embeddings.position_embeddings.weight", first_position + at);
                let kind = self.row("embeddings.token_type_embeddings.weight", kind);
                self.norm("embeddings.LayerNorm", &add(&add(&word, &position), &kind))
            })
            .collect();
        let layers = (0..).take_while(|layer| {
            let name = format!("encoder.layer.{layer}.output.dense.weight");
            self.tensors.keys().any(|key| key.ends_with(&name))
        });
        for layer in layers {
            let name = |rest: &str| format!("encoder.layer.{layer}.{rest}");
            let project = |part: &str| -> Vec<Vec<f64>> {
                states
                    .iter()
                    .map(|state| self.linear(&name(&format!("attention.self.{part}")), state))
                    .collect()
            };
            let (queries, keys, values) = (project("query"), project("key"), project("value"));
            let size = queries[0].len() / HEADS;
            let attended = queries.iter().map(|query| {
                (0..HEADS)
                    .flat_map(|head| {
                        let range = head * size..(head + 1) * size;
                        let weights: Vec<f64> = keys
                            .iter()
                            .map(|key| {
                                let dot: f64 = query[range.clone()]
                                    .iter()
                                    .zip(&key[range.clone()])
                                    .map(|(q, k)| q * k)
                                    .sum();
                                (dot / (size as f64).sqrt()).exp()
                            })
                            .collect();
                        let total: f64 = weights.iter().sum();
                        let of = move |at: usize, values: &[Vec<f64>]| -> f64 {
                            weights.iter().zip(values).map(|(w, value)| w / total * value[at]).sum()
                        };
                        range.map(|at| of(at, &values)).collect::<Vec<f64>>()
                    })
                    .collect::<Vec<f64>>()
            });
            let attended: Vec<Vec<f64>> = attended.collect();
            states = states
                .iter()
                .zip(&attended)
                .map(|(state, attended)| {
                    let out = self.linear(&name("attention.output.dense"), attended);
                    let state = self.norm(&name("attention.output.LayerNorm"), &add(state, &out));
                    let inner = self.linear(&name("intermediate.dense"), &state);
                    let inner: Vec<f64> = inner.into_iter().map(gelu).collect();
                    let out = self.linear(&name("output.dense"), &inner);
                    self.norm(&name("output.LayerNorm"), &add(&state, &out))
                })
                .collect();
        }
        let (pooler, classifier) = match self.roberta {
            true => ("classifier.dense", "classifier.out_proj"),
            false => ("pooler.dense", "classifier"),
        };
        let pooled: Vec<f64> = self.linear(pooler, &states[0]).into_iter().map(f64::tanh).collect();
        self.linear(classifier, &pooled)[0]
    }

    /// The score of two texts, byte by byte as the tokenizer of these models has them.
    fn pair(&self, first: &str, second: &str) -> f64 {
        let bytes = |text: &str| text.bytes().map(u32::from).collect::<Vec<u32>>();
        let (first, second) = (bytes(first), bytes(second));
        let types = [vec![0; first.len() + 2], vec![1; second.len() + 1]].concat();
        self.score(&[vec![257], first, vec![258], second, vec![258]].concat(), &types)
    }
}

/// GELU by the integral of the normal distribution, whose series converges fast for what occurs here.
fn gelu(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return x.max(0.0);
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= -x * x / 2.0 / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    x * (0.5 + sum / (2.0 * std::f64::consts::PI).sqrt())
}

fn close(found: &Value, expected: f64) {
    let found = found.as_f64().unwrap();
    assert!((found - expected).abs() < 2e-4 * expected.abs().max(1.0), "{found} instead of {expected}");
}

async fn deploy(server: &Server, name: &str, roberta: bool, activation: Option<&str>) -> Reference {
    let source = server.directory.path().join(name);
    write_cross_encoder(&source, &model(), roberta, activation);
    server.node.deploy(name, &source, &mut |_| ControlFlow::Continue(())).unwrap();
    Reference::read(&source, roberta)
}

#[tokio::test(flavor = "multi_thread")]
async fn scores_are_the_models() {
    let server = start().await;
    for (name, roberta) in [("bert", false), ("roberta", true)] {
        let reference = deploy(&server, name, roberta, Some(IDENTITY)).await;
        let texts = ["a cat", "", "the sea is blue", "zz"];
        let body = json!({"model": name, "text_1": "what is blue?", "text_2": texts});
        let answer = server.post("/v1/score", body).await;
        assert_eq!((&answer["object"], &answer["model"]), (&json!("list"), &json!(name)));
        for (index, text) in texts.iter().enumerate() {
            let item = &answer["data"][index];
            assert_eq!((&item["index"], &item["object"]), (&json!(index), &json!("score")));
            close(&item["score"], reference.pair("what is blue?", text));
        }
        let tokens: usize = texts.iter().map(|text| text.len() + 13 + 3).sum();
        assert_eq!(answer["usage"]["prompt_tokens"], tokens);
        // As many of one as of the other, and one of each.
        let body = json!({"model": name, "text_1": ["a", "bc"], "text_2": ["d", "e"]});
        let answer = server.post("/v1/score", body).await;
        close(&answer["data"][1]["score"], reference.pair("bc", "e"));
        let answer = server.post("/v1/score", json!({"model": name, "text_1": "a", "text_2": "d"})).await;
        close(&answer["data"][0]["score"], reference.pair("a", "d"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_are_ranked() {
    let server = start().await;
    let reference = deploy(&server, "ranker", false, None).await;
    let documents = ["one", "two two", "three", "4", "one"];
    let mut body = json!({"model": "ranker", "query": "which?", "documents": documents});
    let answer = server.post("/v1/rerank", body.clone()).await;
    assert!(answer["id"].as_str().unwrap().starts_with("rerank-"));
    let results = answer["results"].as_array().unwrap();
    assert_eq!(results.len(), documents.len());
    for result in results {
        let document = documents[result["index"].as_u64().unwrap() as usize];
        assert_eq!(result["document"]["text"], document);
        close(&result["relevance_score"], 1.0 / (1.0 + (-reference.pair("which?", document)).exp()));
    }
    let scores: Vec<f64> = results.iter().map(|result| result["relevance_score"].as_f64().unwrap()).collect();
    assert!(scores.is_sorted_by(|a, b| a >= b), "{scores:?}");
    // Equal texts have equal scores, whatever else is in the batch; the first comes first.
    let places: Vec<u64> = results.iter().map(|result| result["index"].as_u64().unwrap()).collect();
    let first = places.iter().position(|&index| index == 0).unwrap();
    assert_eq!((places[first + 1], scores[first]), (4, scores[first + 1]));

    body["top_n"] = json!(2);
    body["return_documents"] = json!(false);
    body["documents"] = json!(documents.map(|text| json!({"text": text})));
    let answer = server.post("/v1/rerank", body).await;
    let short = answer["results"].as_array().unwrap();
    assert_eq!(short.len(), 2);
    for (short, whole) in short.iter().zip(results) {
        assert_eq!(short["relevance_score"], whole["relevance_score"]);
        assert!(short.get("document").is_none());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_ranked_is_refused() {
    let server = start().await;
    deploy(&server, "ranker", false, None).await;
    let documents = json!(["a"]);
    for (path, body, param) in [
        ("/v1/rerank", json!({"model": CHAT, "query": "q", "documents": documents}), "model"),
        ("/v1/rerank", json!({"model": EMBED, "query": "q", "documents": documents}), "model"),
        ("/v1/rerank", json!({"model": "ranker", "documents": documents}), "query"),
        ("/v1/rerank", json!({"model": "ranker", "query": "q"}), "documents"),
        ("/v1/rerank", json!({"model": "ranker", "query": "q", "documents": []}), "documents"),
        ("/v1/rerank", json!({"model": "ranker", "query": "q", "documents": [1]}), "documents"),
        ("/v1/rerank", json!({"model": "ranker", "query": "q", "documents": documents, "top_n": 0}), "top_n"),
        ("/v1/rerank", json!({"model": "ranker", "query": "q", "documents": ["a".repeat(80)]}), "documents"),
        ("/v1/score", json!({"model": "ranker", "text_1": ["a", "b"], "text_2": ["c"]}), "text_1"),
        ("/v1/score", json!({"model": "ranker", "text_1": "a"}), "text_2"),
        ("/v1/embeddings", json!({"model": "ranker", "input": "a"}), "model"),
        ("/v1/completions", json!({"model": "ranker", "prompt": "a"}), "model"),
    ] {
        let response = server.send(path, &body).await;
        assert_eq!(response.status(), 400, "{body}");
        let answer: Value = response.json().await.unwrap();
        assert_eq!(answer["error"]["param"], param, "{body} -> {answer}");
    }
    let status = server.node.list().into_iter().find(|model| model.name == "ranker").unwrap();
    assert_eq!((status.task.as_str(), status.context), ("score", 66));
}
