//! Chat and text completions over a real node: formats, streams, stop conditions, token ids.

#![allow(clippy::unwrap_used)]

mod common;

use common::{BARE, CHAT, Server, only, start, with};
use serde_json::{Value, json};

const CHAT_PATH: &str = "/v1/chat/completions";
const TEXT_PATH: &str = "/v1/completions";
const END: u32 = tangram_testkit::EOS_TOKEN;

fn chat(fields: Value) -> Value {
    let letters: Vec<u32> = "abcdefgh".bytes().map(u32::from).collect();
    let base = json!({
        "model": CHAT, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 12, "temperature": 0,
        "logit_bias": only(&letters), "presence_penalty": 0.5, "frequency_penalty": 0.5,
    });
    with(base, fields)
}

fn text(answer: &Value) -> &str {
    answer["choices"][0]["text"].as_str().unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn chat_completion() {
    let server = start().await;
    let response = server
        .send(CHAT_PATH, &chat(json!({"return_token_ids": true, "logprobs": true, "top_logprobs": 2})))
        .await;
    let headers = response.headers().clone();
    let answer: Value = response.json().await.unwrap();
    assert_eq!(answer["object"], "chat.completion", "{answer}");
    assert_eq!(answer["model"], CHAT);
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert!(answer["id"].as_str().unwrap().ends_with(headers["x-request-id"].to_str().unwrap()));
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(choice["message"]["role"], "assistant");
    let content = choice["message"]["content"].as_str().unwrap();
    assert_eq!(content.len(), 12);
    let bytes: Vec<u32> = content.bytes().map(u32::from).collect();
    assert_eq!(ids(&choice["token_ids"]), bytes);
    // ChatML: <|im_start|> is 257, <|im_end|> 258, everything else is bytes.
    let mut prompt = vec![257];
    prompt.extend("user\nHi".bytes().map(u32::from));
    prompt.extend([258, u32::from(b'\n'), 257]);
    prompt.extend("assistant\n".bytes().map(u32::from));
    assert_eq!(ids(&answer["prompt_token_ids"]), prompt);
    let logprobs = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(logprobs.len(), 12);
    assert_eq!(logprobs[0]["token"], content[..1]);
    assert_eq!(logprobs[0]["top_logprobs"].as_array().unwrap().len(), 2);
    assert!(logprobs.iter().all(|entry| entry["logprob"].as_f64().unwrap() <= 0.0));
    let usage = &answer["usage"];
    assert_eq!((&usage["prompt_tokens"], &usage["completion_tokens"]), (&json!(prompt.len()), &json!(12)));
    assert_eq!(usage["total_tokens"], prompt.len() + 12);
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 0);
    assert!(usage["tangram"]["ttft_ms"].as_f64().unwrap() > 0.0);
    assert!(usage["tangram"]["bytes_loaded"].as_u64().unwrap() > 0, "the first request loads the model");
    assert_eq!(headers["x-tangram-bytes-loaded"], usage["tangram"]["bytes_loaded"].to_string());
    let timing = headers["server-timing"].to_str().unwrap();
    for phase in ["queue;dur=", "load;dur=", "prefill;dur=", "decode;dur="] {
        assert!(timing.contains(phase), "{timing}");
    }
    let again = server.post(CHAT_PATH, chat(json!({}))).await;
    assert_eq!(again["usage"]["tangram"]["bytes_loaded"], 0);
    assert!(again["usage"]["tangram"]["bytes_reused"].as_u64().unwrap() > 0);
    assert_eq!(again["choices"][0]["message"]["content"], content);
    assert_eq!(again["choices"][0]["logprobs"], Value::Null);
    assert!(again["choices"][0].get("token_ids").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn chat_stream_equals_the_whole_answer() {
    let server = start().await;
    let fields =
        json!({"return_token_ids": true, "logprobs": true, "stream_options": {"include_usage": true}});
    let response = server.send(CHAT_PATH, &with(chat(fields), json!({"stream": true}))).await;
    let headers = response.headers().clone();
    assert!(headers["server-timing"].to_str().unwrap().starts_with("queue;dur="));
    assert!(headers.contains_key("x-tangram-bytes-loaded") && headers.contains_key("x-request-id"));
    let events = common::events(&response.text().await.unwrap());
    let whole = server.post(CHAT_PATH, chat(json!({"return_token_ids": true, "logprobs": true}))).await;
    let expected = &whole["choices"][0];
    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(events[0]["prompt_token_ids"], whole["prompt_token_ids"]);
    let (usage, chunks) = events.split_last().unwrap();
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], 12);
    assert!(usage["usage"]["tangram"]["decode_ms"].as_f64().unwrap() > 0.0);
    assert!(
        chunks.iter().all(|chunk| chunk["usage"].is_null() && chunk["object"] == "chat.completion.chunk")
    );
    assert!(events.iter().all(|chunk| chunk["id"] == events[0]["id"]));
    let (last, chunks) = chunks.split_last().unwrap();
    assert_eq!(last["choices"][0]["delta"], json!({}));
    assert_eq!(last["choices"][0]["finish_reason"], "length");
    assert!(chunks.iter().all(|chunk| chunk["choices"][0]["finish_reason"].is_null()));
    assert!(chunks[1..].iter().all(|chunk| chunk["choices"][0]["delta"].get("role").is_none()));
    let content: String =
        chunks.iter().map(|chunk| chunk["choices"][0]["delta"]["content"].as_str().unwrap()).collect();
    assert_eq!(content, expected["message"]["content"].as_str().unwrap());
    let tokens: Vec<u32> = chunks.iter().flat_map(|chunk| ids(&chunk["choices"][0]["token_ids"])).collect();
    assert_eq!(tokens, ids(&expected["token_ids"]));
    let logprobs: Vec<Value> = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array())
        .flatten()
        .cloned()
        .collect();
    assert_eq!(Value::from(logprobs), expected["logprobs"]["content"]);
    // Without the option there is no usage anywhere.
    let events = server.stream(CHAT_PATH, chat(json!({}))).await;
    assert!(events.iter().all(|chunk| chunk.get("usage").is_none() && chunk["choices"][0].is_object()));
}

#[tokio::test(flavor = "multi_thread")]
async fn several_choices() {
    let server = start().await;
    let fields = json!({"n": 3, "temperature": 1, "seed": 7});
    let answer = server.post(CHAT_PATH, chat(fields.clone())).await;
    let contents = |answer: &Value| -> Vec<String> {
        let choices = answer["choices"].as_array().unwrap();
        assert!(choices.iter().enumerate().all(|(index, choice)| choice["index"] == index));
        choices.iter().map(|choice| choice["message"]["content"].as_str().unwrap().to_owned()).collect()
    };
    let first = contents(&answer);
    assert_eq!(first.len(), 3);
    assert!(first[0] != first[1] && first[1] != first[2], "{first:?}");
    assert_eq!(
        contents(&server.post(CHAT_PATH, chat(fields.clone())).await),
        first,
        "a seed gives the same again"
    );
    assert_eq!(answer["usage"]["completion_tokens"], 36);
    let mut streamed = vec![String::new(); 3];
    for event in server.stream(CHAT_PATH, chat(fields)).await {
        let choice = &event["choices"][0];
        streamed[choice["index"].as_u64().unwrap() as usize]
            .push_str(choice["delta"]["content"].as_str().unwrap_or(""));
    }
    assert_eq!(streamed, first);
}

#[tokio::test(flavor = "multi_thread")]
async fn prompts_in_four_forms() {
    let server = start().await;
    let token = |text: &str| text.bytes().map(u32::from).collect::<Vec<u32>>();
    let options = json!({"max_tokens": 5, "return_token_ids": true, "ignore_eos": true});
    let tokens = |answer: &Value, index: usize| ids(&answer["choices"][index]["token_ids"]);
    let one = server.complete(with(options.clone(), json!({"prompt": "one"}))).await;
    assert_eq!(one["object"], "text_completion");
    assert_eq!(ids(&one["choices"][0]["prompt_token_ids"]), token("one"));
    assert_eq!(tokens(&one, 0).len(), 5);
    let two = server.complete(with(options.clone(), json!({"prompt": "two"}))).await;
    let by_ids = server.complete(with(options.clone(), json!({"prompt": token("one")}))).await;
    assert_eq!(tokens(&by_ids, 0), tokens(&one, 0));
    for prompt in [json!(["one", "two"]), json!([token("one"), token("two")])] {
        let both = server.complete(with(options.clone(), json!({"prompt": prompt, "n": 2}))).await;
        assert_eq!(both["choices"].as_array().unwrap().len(), 4);
        for (index, expected) in [&one, &one, &two, &two].into_iter().enumerate() {
            assert_eq!(tokens(&both, index), tokens(expected, 0));
        }
        assert_eq!(both["usage"]["prompt_tokens"], 6);
        assert_eq!(both["usage"]["completion_tokens"], 20);
    }
    let default = server.complete(json!({"prompt": "one", "ignore_eos": true})).await;
    assert_eq!(default["usage"]["completion_tokens"], 16);
}

/// Text over a few letters, so that it can be searched.
async fn letters(server: &Server, fields: Value) -> Value {
    let bias = only(&[97, 98, 99, 100]);
    let base = json!({"prompt": "x", "max_tokens": 24, "logit_bias": bias, "frequency_penalty": 1.5, "return_token_ids": true});
    server.complete(with(base, fields)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_strings() {
    let server = start().await;
    let whole = letters(&server, json!({})).await;
    let whole = text(&whole).to_owned();
    let stop = &whole[10..13];
    let at = whole.find(stop).unwrap();
    let answer = letters(&server, json!({"stop": ["never", stop]})).await;
    assert_eq!(text(&answer), &whole[..at]);
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(answer["usage"]["completion_tokens"], at + 3, "up to the token that completed the match");
    assert_eq!(ids(&answer["choices"][0]["token_ids"]).len(), at + 3);
    let events = server
        .stream(
            TEXT_PATH,
            json!({"model": CHAT, "prompt": "x", "temperature": 0, "max_tokens": 24, "stop": stop,
            "logit_bias": only(&[97, 98, 99, 100]), "frequency_penalty": 1.5}),
        )
        .await;
    let streamed: String = events.iter().map(|event| event["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(streamed, &whole[..at]);
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "stop");
    // Text held back for a stop string that does not come is there at the end.
    let held = format!("{}!", &whole[20..]);
    assert_eq!(text(&letters(&server, json!({"stop": held})).await), whole);
}

#[tokio::test(flavor = "multi_thread")]
async fn end_tokens() {
    let server = start().await;
    let bias = json!({"prompt": "x", "logit_bias": only(&[END]), "max_tokens": 4, "return_token_ids": true});
    let answer = server.complete(bias.clone()).await;
    assert_eq!((text(&answer), &answer["choices"][0]["finish_reason"]), ("", &json!("stop")));
    assert_eq!(answer["usage"]["completion_tokens"], 1);
    assert_eq!(ids(&answer["choices"][0]["token_ids"]), [END]);
    let answer = server.complete(with(bias.clone(), json!({"skip_special_tokens": false}))).await;
    assert_eq!(text(&answer), "", "the end token is never part of the text");
    let answer = server.complete(with(bias.clone(), json!({"ignore_eos": true}))).await;
    assert_eq!((text(&answer), &answer["choices"][0]["finish_reason"]), ("", &json!("length")));
    let shown = json!({"ignore_eos": true, "skip_special_tokens": false, "max_tokens": 2});
    assert_eq!(text(&server.complete(with(bias, shown)).await), "<|im_end|><|im_end|>");
    let answer =
        letters(&server, json!({"logit_bias": only(&[97]), "stop_token_ids": [97], "frequency_penalty": 0}))
            .await;
    assert_eq!((text(&answer), &answer["usage"]["completion_tokens"]), ("", &json!(1)));
}

#[tokio::test(flavor = "multi_thread")]
async fn echo_and_legacy_logprobs() {
    let server = start().await;
    let answer = letters(&server, json!({"echo": true, "max_tokens": 2})).await;
    assert_eq!(text(&answer).len(), 3);
    assert!(text(&answer).starts_with('x'));
    let answer = letters(&server, json!({"logprobs": 2, "max_tokens": 3})).await;
    let logprobs = &answer["choices"][0]["logprobs"];
    assert_eq!(logprobs["text_offset"], json!([0, 1, 2]));
    assert_eq!(logprobs["tokens"].as_array().unwrap().len(), 3);
    assert!(logprobs["top_logprobs"][0].as_object().unwrap().len() >= 2);
    let token = logprobs["tokens"][0].as_str().unwrap();
    assert_eq!(logprobs["top_logprobs"][0][token], logprobs["token_logprobs"][0]);
    let events = server
        .stream(TEXT_PATH, json!({"model": CHAT, "prompt": ["ab", "c"], "echo": true, "max_tokens": 2, "logit_bias": only(&[97])}))
        .await;
    let mut texts = [String::new(), String::new()];
    for event in events {
        let choice = &event["choices"][0];
        texts[choice["index"].as_u64().unwrap() as usize].push_str(choice["text"].as_str().unwrap());
    }
    assert_eq!(texts, ["abaa", "caa"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_without_a_tokenizer() {
    let server = start().await;
    let body = json!({"model": BARE, "prompt": [1, 2, 3], "max_tokens": 6, "temperature": 0, "ignore_eos": true,
        "return_token_ids": true, "logprobs": 1});
    let answer = server.post(TEXT_PATH, body.clone()).await;
    assert_eq!(text(&answer), "");
    let tokens = ids(&answer["choices"][0]["token_ids"]);
    assert_eq!(tokens.len(), 6);
    assert_eq!(answer["choices"][0]["logprobs"]["tokens"][0], format!("token_id:{}", tokens[0]));
    let events = server.stream(TEXT_PATH, body).await;
    let streamed: Vec<u32> = events.iter().flat_map(|event| ids(&event["choices"][0]["token_ids"])).collect();
    assert_eq!(streamed, tokens);
    for (path, body, param) in [
        (TEXT_PATH, json!({"model": BARE, "prompt": "text"}), "prompt"),
        (TEXT_PATH, json!({"model": BARE, "prompt": [1], "stop": "x"}), "stop"),
        (CHAT_PATH, json!({"model": BARE, "messages": [{"role": "user", "content": "x"}]}), "model"),
    ] {
        let response = server.send(path, &body).await;
        assert_eq!(response.status(), 400);
        let error: Value = response.json().await.unwrap();
        assert_eq!(error["error"]["param"], param, "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn text_arrives_in_whole_characters() {
    let server = start().await;
    // The bytes of a euro sign over and over, as far as the model's own preferences let them be in order.
    let events = server
        .stream(
            TEXT_PATH,
            json!({"model": CHAT, "prompt": "x", "temperature": 1, "seed": 3, "max_tokens": 300,
            "ignore_eos": true, "logit_bias": only(&[0xE2, 0x82, 0xAC, 97]), "return_token_ids": true}),
        )
        .await;
    let texts: String = events.iter().map(|event| event["choices"][0]["text"].as_str().unwrap()).collect();
    let bytes: Vec<u8> =
        events.iter().flat_map(|event| ids(&event["choices"][0]["token_ids"])).map(|id| id as u8).collect();
    assert_eq!(bytes.len(), 300);
    assert_eq!(texts, String::from_utf8_lossy(&bytes));
}
