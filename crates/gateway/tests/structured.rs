//! Constrained output and tool calls through HTTP, over a real node with a random model: what it says is noise, so
//! whatever form the answers have comes from the constraint.

#![allow(clippy::unwrap_used)]

mod common;

use std::ops::ControlFlow;

use common::{CHAT, Server, start, with, write_model};
use serde_json::{Value, json};
use tangram_testkit::{Family, RandomModel};

const CHAT_PATH: &str = "/v1/chat/completions";
const TEXT_PATH: &str = "/v1/completions";

fn schema() -> Value {
    json!({
        "type": "object", "required": ["kind", "size", "tags"], "additionalProperties": false,
        "properties": {
            "kind": {"enum": ["cat", "dog", "naïve"]},
            "size": {"type": "integer", "minimum": 0, "maximum": 99},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
            "deep": {"$ref": "#/$defs/flag"}},
        "$defs": {"flag": {"type": "object", "required": ["on"], "properties": {"on": {"type": "boolean"}},
                           "additionalProperties": false}}})
}

fn chat(fields: Value) -> Value {
    let base = json!({"model": CHAT, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 600});
    with(base, fields)
}

fn content(choice: &Value) -> &str {
    choice["message"]["content"].as_str().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_choice_is_a_document_of_the_schema() {
    let server = start().await;
    let judge = jsonschema::validator_for(&schema()).unwrap();
    let format = json!({"type": "json_schema", "json_schema": {"name": "pet", "schema": schema()}});
    let mut seen = std::collections::BTreeSet::new();
    for fields in [
        json!({"temperature": 0}),
        json!({"temperature": 1, "seed": 1, "n": 5}),
        json!({"temperature": 2, "seed": 2, "n": 5, "top_p": 0.9, "frequency_penalty": 1}),
        json!({"temperature": 1, "seed": 3, "top_k": 4, "ignore_eos": true}),
    ] {
        let body = chat(with(json!({"response_format": format}), fields));
        let answer = server.post(CHAT_PATH, body.clone()).await;
        let choices = answer["choices"].as_array().unwrap();
        let mut streamed = vec![String::new(); choices.len()];
        for event in server.stream(CHAT_PATH, body).await {
            let choice = &event["choices"][0];
            let text = choice["delta"]["content"].as_str().unwrap_or_default();
            streamed[choice["index"].as_u64().unwrap() as usize].push_str(text);
        }
        for (choice, streamed) in choices.iter().zip(streamed) {
            assert_eq!(choice["finish_reason"], "stop", "{choice}");
            let document: Value = serde_json::from_str(content(choice)).unwrap();
            assert!(judge.is_valid(&document), "{document}");
            assert_eq!(streamed, content(choice));
            seen.insert(document.to_string());
        }
    }
    assert!(seen.len() > 8, "the choices are all alike: {seen:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_grammar() {
    let server = start().await;
    for (fields, expected) in [
        (json!({"guided_choice": ["Paris"]}), "Paris"),
        (json!({"guided_regex": "Pa{2}ris"}), "Paaris"),
        (json!({"guided_grammar": "start: \"a\" b\nb: \"é\""}), "aé"),
        (json!({"structured_outputs": {"json": {"const": {"a": [1, null]}}}, "stop": "null"}), "{\"a\":[1,"),
    ] {
        let answer = server.complete(with(json!({"prompt": "x", "max_tokens": 100}), fields)).await;
        let text = answer["choices"][0]["text"].as_str().unwrap();
        assert_eq!(text.replace(char::is_whitespace, ""), expected);
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    }
    // Cut by the limit: the beginning of a document. Logprobs are there for every token.
    let body = json!({"prompt": "x", "max_tokens": 3, "guided_regex": "[ab]{9}", "logprobs": 2});
    let answer = server.complete(body).await;
    let choice = &answer["choices"][0];
    assert_eq!((choice["text"].as_str().unwrap().len(), &choice["finish_reason"]), (3, &json!("length")));
    assert!(choice["text"].as_str().unwrap().chars().all(|c| "ab".contains(c)));
    assert_eq!(choice["logprobs"]["token_logprobs"].as_array().unwrap().len(), 3);
    // A text that may go on ends by the model's own end token, once that is likely.
    let body = json!({"prompt": "x", "max_tokens": 50, "guided_regex": "a{3,}",
                      "logit_bias": {tangram_testkit::EOS_TOKEN.to_string(): 100}});
    assert_eq!(server.complete(body).await["choices"][0]["text"], "aaa");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_best_of_several() {
    let server = start().await;
    let body =
        json!({"prompt": ["one", "two"], "max_tokens": 6, "temperature": 1, "seed": 5, "ignore_eos": true});
    let all = with(body.clone(), json!({"n": 4, "logprobs": 0}));
    let all = server.complete(all).await;
    let best = server.complete(with(body, json!({"best_of": 4, "n": 2}))).await;
    assert_eq!(best["usage"]["completion_tokens"], 2 * 4 * 6, "all that were made are paid for");
    assert!(best["choices"][0]["logprobs"].is_null());
    for prompt in 0..2 {
        let mut ranked: Vec<(f64, &str)> = (0..4)
            .map(|index| {
                let choice = &all["choices"][prompt * 4 + index];
                let logprobs = choice["logprobs"]["token_logprobs"].as_array().unwrap();
                (logprobs.iter().map(|l| l.as_f64().unwrap()).sum(), choice["text"].as_str().unwrap())
            })
            .collect();
        ranked.sort_by(|left, right| right.0.total_cmp(&left.0));
        for (index, (_, text)) in ranked[..2].iter().enumerate() {
            let choice = &best["choices"][prompt * 2 + index];
            assert_eq!(
                (choice["text"].as_str().unwrap(), &choice["index"]),
                (*text, &json!(prompt * 2 + index))
            );
        }
    }
}

/// Like the templates of Hermes and Qwen.
const TAGGED: &str = "{% for t in tools or [] %}<tools>{{ t | tojson }}</tools>{% endfor %}\
{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>\n\
{\"name\": \"{{ c.function.name }}\", \"arguments\": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}\
<|im_end|>\n{% endfor %}<|im_start|>assistant\n";
/// Like Llama 3's.
const BARE: &str =
    "{% for m in messages %}{{ m.content }}{% endfor %}{# {\"name\": ..., \"parameters\": dictionary #}";
/// Like Mistral's.
const LIST: &str = "{% for m in messages %}{{ m.content }}{% endfor %}{# [TOOL_CALLS] #}";

fn deploy_with_template(server: &Server, name: &str, template: &str) {
    let model = RandomModel { context: 4096, ..RandomModel::tiny(Family::Llama) };
    let source = write_model(server.directory.path(), &format!("{name}-source"), &model);
    let path = source.join("tokenizer_config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["chat_template"] = json!(template);
    std::fs::write(path, config.to_string()).unwrap();
    server.node.deploy(name, &source, &mut |_| ControlFlow::Continue(())).unwrap();
}

fn tools() -> Value {
    json!([{"type": "function", "function": {"name": "weather", "description": "d", "parameters": {
        "type": "object", "required": ["place"], "additionalProperties": false,
        "properties": {"place": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}}}}},
           {"type": "function", "function": {"name": "time"}}])
}

/// A message put together from the chunks of a stream, as clients do it.
fn assemble(events: &[Value]) -> (Value, Value) {
    let (mut content, mut calls, mut reason) = (String::new(), Vec::<Value>::new(), Value::Null);
    for event in events {
        let choice = &event["choices"][0];
        content.push_str(choice["delta"]["content"].as_str().unwrap_or_default());
        for call in choice["delta"]["tool_calls"].as_array().into_iter().flatten() {
            let index = call["index"].as_u64().unwrap() as usize;
            if index == calls.len() {
                assert_eq!((&call["type"], &call["function"]["arguments"]), (&json!("function"), &json!("")));
                calls.push(json!({"type": "function", "function": call["function"]}));
            } else {
                let more = call["function"]["arguments"].as_str().unwrap();
                let arguments = &mut calls[index]["function"]["arguments"];
                *arguments = json!(arguments.as_str().unwrap().to_owned() + more);
            }
        }
        if !choice["finish_reason"].is_null() {
            reason = choice["finish_reason"].clone();
        }
    }
    (json!({"content": content, "tool_calls": calls}), reason)
}

#[tokio::test(flavor = "multi_thread")]
async fn required_calls_in_every_format() {
    let server = start().await;
    for (name, template) in [("tagged", TAGGED), ("bare", BARE), ("list", LIST)] {
        deploy_with_template(&server, name, template);
        let base = json!({"model": name, "messages": [{"role": "user", "content": "Hi"}], "tools": tools(),
                          "temperature": 1, "seed": 4, "max_tokens": 800});
        let named = json!({"type": "function", "function": {"name": "weather"}});
        for choice in [json!("required"), named.clone()] {
            let single = json!({"tool_choice": choice, "parallel_tool_calls": false});
            let body = with(base.clone(), single);
            let answer = server.post(CHAT_PATH, body.clone()).await;
            let message = &answer["choices"][0]["message"];
            assert_eq!(answer["choices"][0]["finish_reason"], "tool_calls", "{name}: {answer}");
            assert_eq!(message["content"], Value::Null);
            let calls = message["tool_calls"].as_array().unwrap();
            assert_eq!(calls.len(), 1);
            let function = &calls[0]["function"];
            let arguments: Value = serde_json::from_str(function["arguments"].as_str().unwrap()).unwrap();
            match function["name"].as_str().unwrap() {
                "weather" => assert!(["Oslo", "Rome"].contains(&arguments["place"].as_str().unwrap())),
                called => assert_eq!((called, &arguments, &choice), ("time", &json!({}), &json!("required"))),
            }
            assert!(
                calls[0]["id"].as_str().is_some_and(|id| id.len() >= 9) && calls[0]["type"] == "function"
            );
            assert!(calls[0].get("index").is_none());
            let (streamed, reason) = assemble(&server.stream(CHAT_PATH, body).await);
            assert_eq!(streamed["tool_calls"][0]["function"], *function);
            assert_eq!((&streamed["content"], &reason), (&json!(""), &json!("tool_calls")));
        }
    }
}

/// Answers whose text is forced stand for a model that knows how to call functions.
#[tokio::test(flavor = "multi_thread")]
async fn calls_are_found_and_fed_back() {
    let server = start().await;
    deploy_with_template(&server, "tagged", TAGGED);
    let call = r#"{"name": "weather", "arguments": {"place": "Rome"}}"#;
    let said = format!("Let me see.\n<tool_call>\n{call}\n</tool_call>\n<tool_call>{call}</tool_call>");
    let base = json!({"model": "tagged", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 400,
                      "guided_choice": [said], "return_token_ids": true, "logprobs": true});
    let with_tools = with(base.clone(), json!({"tools": tools()}));
    let answer = server.post(CHAT_PATH, with_tools.clone()).await;
    let message = &answer["choices"][0]["message"];
    assert_eq!(message["content"], "Let me see.");
    assert_eq!(message["tool_calls"].as_array().unwrap().len(), 2);
    assert_eq!(
        message["tool_calls"][1]["function"],
        json!({"name": "weather", "arguments": "{\"place\": \"Rome\"}"})
    );
    assert!(message["tool_calls"][0]["id"] != message["tool_calls"][1]["id"]);
    assert_eq!(answer["choices"][0]["finish_reason"], "tool_calls");
    let events = server.stream(CHAT_PATH, with_tools.clone()).await;
    let (streamed, reason) = assemble(&events);
    assert_eq!((&streamed["content"], &reason), (&message["content"], &json!("tool_calls")));
    assert_eq!(streamed["tool_calls"][1]["function"], message["tool_calls"][1]["function"]);
    let pieces = events.iter().filter(|event| event["choices"][0]["delta"]["tool_calls"].is_array());
    assert!(pieces.count() > 10, "the arguments arrive in pieces");
    let sum = |name: &str| -> usize {
        let choices = events.iter().map(|event| &event["choices"][0]);
        choices.filter_map(|choice| choice.pointer(name).and_then(Value::as_array)).map(Vec::len).sum()
    };
    let tokens = answer["choices"][0]["token_ids"].as_array().unwrap().len();
    assert_eq!((sum("/token_ids"), sum("/logprobs/content")), (tokens, tokens));
    let one = with(with_tools.clone(), json!({"parallel_tool_calls": false}));
    let one = server.post(CHAT_PATH, one).await;
    assert_eq!(one["choices"][0]["message"]["tool_calls"].as_array().unwrap().len(), 1);
    // Without tools, or with a choice of none, it is text.
    for fields in [json!({}), json!({"tools": tools(), "tool_choice": "none"})] {
        let plain = server.post(CHAT_PATH, with(base.clone(), fields)).await;
        assert_eq!(plain["choices"][0]["message"]["content"], said);
        assert_eq!(plain["choices"][0]["finish_reason"], "stop");
        assert!(plain["choices"][0]["message"].get("tool_calls").is_none());
    }
    // The next turn shows tools, calls and results to the model.
    let messages = json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": null,
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "time", "arguments": "{\"a\": 1}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "noon"}]);
    let next = server.post(CHAT_PATH, with(with_tools, json!({"messages": messages}))).await;
    let shown: Vec<u8> = next["prompt_token_ids"]
        .as_array()
        .unwrap()
        .iter()
        .map(|id| u8::try_from(id.as_u64().unwrap()).unwrap_or(b'|'))
        .collect();
    let shown = String::from_utf8(shown).unwrap();
    assert!(
        shown.contains("<tools>{\"type\": \"function\", \"function\": {\"name\": \"weather\""),
        "{shown}"
    );
    assert!(
        shown.contains("<tool_call>\n{\"name\": \"time\", \"arguments\": {\"a\": 1}}\n</tool_call>"),
        "{shown}"
    );
    assert!(shown.contains("|tool\nnoon|"), "{shown}");
}

/// The KV of a prompt is held once, however many choices continue it.
#[tokio::test(flavor = "multi_thread")]
async fn choices_share_the_blocks_of_their_prompt() {
    let server = start().await;
    let prompt = "ab".repeat(600);
    let body = |n: usize| json!({"model": CHAT, "prompt": prompt, "n": n, "max_tokens": 2, "temperature": 1, "ignore_eos": true});
    let eight = server.post(TEXT_PATH, body(8)).await;
    let usage = &eight["usage"];
    assert!(usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() > 1000, "{usage}");
    let cached = || server.node.status().kv_cached_bytes;
    common::eventually("all KV is back", || server.node.status().kv_blocks == 0 && cached() > 0).await;
    assert!(
        server.node.status().cached_tokens_total > 7 * 1000,
        "seven of them find what the first computes"
    );
    let after_eight = cached();
    let other = server.post(TEXT_PATH, with(body(1), json!({"prompt": "cd".repeat(600)}))).await;
    assert_eq!(other["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    common::eventually("the other prompt is cached", || cached() > after_eight).await;
    assert!(cached() <= after_eight * 2, "eight choices hold one prompt's blocks");
}
