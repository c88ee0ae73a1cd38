//! `tangram run NAME "prompt"`: one request, the answer printed as it comes.

use std::io::Write;

use serde_json::{Value, json};

use crate::Target;
use crate::client::Client;
use crate::output::{bytes, milliseconds};

/// Sends the prompt as a chat message if the model takes chats, else as text to continue.
pub(crate) async fn run(
    name: &str,
    prompt: &str,
    max_tokens: Option<u32>,
    temperature: Option<f32>,
    target: Target,
) -> anyhow::Result<()> {
    let client = Client::connect(target).await?;
    let result = ask(&client, name, prompt, max_tokens, temperature).await;
    client.close().await?;
    result
}

async fn ask(
    client: &Client,
    name: &str,
    prompt: &str,
    max_tokens: Option<u32>,
    temperature: Option<f32>,
) -> anyhow::Result<()> {
    let mut body = json!({ "model": name, "stream": true, "stream_options": { "include_usage": true } });
    if let Some(max_tokens) = max_tokens {
        body["max_tokens"] = max_tokens.into();
    }
    if let Some(temperature) = temperature {
        body["temperature"] = temperature.into();
    }
    let mut chat = body.clone();
    chat["messages"] = json!([{ "role": "user", "content": prompt }]);
    let mut usage = Value::Null;
    let mut print = |line: Value| -> anyhow::Result<()> {
        let choice = &line["choices"][0];
        let text = choice["delta"]["content"].as_str().or(choice["text"].as_str()).unwrap_or_default();
        print!("{text}");
        std::io::stdout().flush()?;
        if line["usage"].is_object() {
            usage = line["usage"].clone();
        }
        Ok(())
    };
    if let Err(error) = client.post_lines("/v1/chat/completions", &chat, &mut print).await {
        if !error.to_string().contains("chat template") {
            return Err(error);
        }
        body["prompt"] = prompt.into();
        body["max_tokens"] = max_tokens.unwrap_or(128).into();
        client.post_lines("/v1/completions", &body, &mut print).await?;
    }
    println!();
    let cost = &usage["tangram"];
    let figure = |key: &str| cost[key].as_f64().unwrap_or(0.0);
    eprintln!(
        "[{} tokens; first after {}, of it loading {}; {} loaded, {} reused]",
        usage["completion_tokens"],
        milliseconds(figure("ttft_ms")),
        milliseconds(figure("load_ms")),
        bytes(figure("bytes_loaded") as u64),
        bytes(figure("bytes_reused") as u64)
    );
    Ok(())
}
