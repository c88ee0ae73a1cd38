//! `tangram deploy`, `ls`, `ps`, `rm`.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tangram_node::{ModelStatus, NodeStatus, RemoteSource, WeightLayout};

use crate::Target;
use crate::client::Client;
use crate::output::{bytes, milliseconds, table};

#[derive(Serialize, Deserialize)]
struct Models {
    models: Vec<ModelStatus>,
}

/// What to deploy.
pub(crate) enum Deployable {
    /// A checkpoint on this machine or at a remote source, and how its weights are to be stored.
    Source(PathBuf, WeightLayout),
    /// A checkpoint whose tensors stay where they are.
    InPlace(PathBuf),
    /// An adapter's directory and the deployed name of its base.
    Adapter(PathBuf, String),
}

/// Imports a model with a progress bar.
pub(crate) async fn deploy(name: &str, what: &Deployable, target: Target) -> anyhow::Result<()> {
    let client = Client::connect(target).await?;
    let result = deploy_on(&client, name, what).await;
    client.close().await?;
    let model = result?;
    println!(
        "{} is deployed: {} {}, {} of weights ({} shared with other models), {} of KV per token, context {}",
        model.name,
        model.family,
        model.dtype,
        bytes(model.weight_bytes),
        bytes(model.shared_bytes),
        bytes(model.kv_bytes_per_token),
        model.context
    );
    if let (Deployable::InPlace(_), Some(in_place)) = (what, model.in_place_bytes) {
        println!("  {}", in_place_line(in_place, model.weight_bytes));
    }
    if model.stored_bytes < model.weight_bytes {
        println!(
            "  its weights are stored without loss in {}, {:.0} % of their size",
            bytes(model.stored_bytes),
            100.0 * model.stored_bytes as f64 / model.weight_bytes as f64
        );
    }
    for line in forecast_lines(&model) {
        println!("  {line}");
    }
    Ok(())
}

/// What an import in place left where it was, for people.
fn in_place_line(in_place: u64, all: u64) -> String {
    match all - in_place {
        0 => {
            "all of its weights are read from the files in which they are; leave these as they are".to_owned()
        }
        stored => format!(
            "{} of its weights are read from the files in which they are, so leave these as they are; {} are not there \
             in the form in which they are needed and were stored converted",
            bytes(in_place),
            bytes(stored)
        ),
    }
}

/// What a model will take, for people.
fn forecast_lines(model: &ModelStatus) -> Vec<String> {
    let forecast = &model.forecast;
    let here = match model.resident_bytes {
        0 => "none of its weights are in device memory yet".to_owned(),
        resident => format!("{} of its weights are in device memory already", bytes(resident)),
    };
    let here = match model.hosted_bytes {
        0 => here,
        hosted => format!("{here}, {} in host memory", bytes(hosted)),
    };
    let room = forecast
        .tokens_beside_weights
        .map_or(String::new(), |tokens| format!("{tokens} tokens of KV fit beside the weights; "));
    let mut lines =
        vec![format!("{here}; {room}up to {} of host memory for activations", bytes(forecast.scratch_bytes))];
    if let (Some(cold), Some(resident)) =
        (forecast.cold_first_token_seconds, forecast.resident_first_token_seconds)
    {
        let what = if model.task == "generate" { "first token" } else { "result" };
        lines.push(format!(
            "predicted {what} for {} prompt tokens: {} when nothing is in device memory, {} when all is",
            forecast.prompt_tokens,
            milliseconds(cold * 1e3),
            milliseconds(resident * 1e3)
        ));
    }
    lines
}

/// Imports a model through a server, showing bytes, rate and time left.
pub(crate) async fn deploy_on(client: &Client, name: &str, what: &Deployable) -> anyhow::Result<ModelStatus> {
    let absolute =
        |path: &Path| std::fs::canonicalize(path).with_context(|| format!("there is no {}", path.display()));
    let body = match what {
        // The server reads it, with the credentials of its own environment.
        Deployable::Source(source, _) if is_remote(source) => json!({ "name": name, "source": source }),
        Deployable::Source(source, layout) => {
            json!({ "name": name, "source": absolute(source)?, "layout": layout })
        }
        Deployable::InPlace(source) => {
            json!({ "name": name, "source": absolute(source)?, "in_place": true })
        }
        Deployable::Adapter(adapter, base) => {
            json!({ "name": name, "adapter": absolute(adapter)?, "base": base })
        }
    };
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    bar.set_style(
        ProgressStyle::with_template("{prefix} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}")
            .context("progress bar")?
            .progress_chars("=> "),
    );
    let mut deployed = None;
    let figure = |value: &Value, key: &str| value.get(key).and_then(Value::as_u64).unwrap_or(0);
    client
        .post_lines("/admin/models", &body, |line| {
            match line.get("model") {
                Some(model) => deployed = Some(serde_json::from_value::<ModelStatus>(model.clone())?),
                None => {
                    let what = line.get("status").and_then(Value::as_str).unwrap_or("deploying");
                    bar.set_prefix(format!("{what} {name}"));
                    bar.set_length(figure(&line, "bytes_total"));
                    bar.set_position(figure(&line, "bytes_done"));
                }
            }
            Ok(())
        })
        .await?;
    bar.finish_and_clear();
    deployed.context("the server ended the deployment without an answer")
}

fn is_remote(source: &Path) -> bool {
    source.to_str().is_some_and(|source| RemoteSource::parse(source).is_some())
}

/// Lists deployed models.
pub(crate) async fn ls(target: Target, as_json: bool) -> anyhow::Result<()> {
    let client = Client::connect(target).await?;
    let result: anyhow::Result<Models> = client.get("/admin/models").await;
    client.close().await?;
    let models = result?;
    if as_json {
        println!("{}", serde_json::to_string_pretty(&models)?);
        return Ok(());
    }
    let rows: Vec<Vec<String>> = models
        .models
        .iter()
        .map(|model| {
            vec![
                model.name.clone(),
                model.base.clone().unwrap_or_default(),
                model.family.clone(),
                model.dtype.clone(),
                model.task.clone(),
                bytes(model.weight_bytes),
                bytes(model.shared_bytes),
                bytes(model.resident_bytes),
                bytes(model.kv_bytes_per_token),
                model.forecast.tokens_beside_weights.map_or("-".to_owned(), |tokens| tokens.to_string()),
                model.context.to_string(),
                seconds(model.forecast.cold_first_token_seconds),
                seconds(model.forecast.resident_first_token_seconds),
                age(model.created),
            ]
        })
        .collect();
    let header = [
        "NAME",
        "BASE",
        "FAMILY",
        "DTYPE",
        "TASK",
        "WEIGHTS",
        "SHARED",
        "RESIDENT",
        "KV/TOKEN",
        "TOKENS FIT",
        "CONTEXT",
        "COLD",
        "WARM",
        "DEPLOYED",
    ];
    table(&header, &rows);
    if let Some(model) = models.models.first() {
        println!(
            "COLD and WARM: predicted time to the first token of a prompt of {} tokens, with none and with all of the \
             weights in device memory",
            model.forecast.prompt_tokens
        );
    }
    Ok(())
}

/// A predicted time, `-` before the server has measured its machine.
fn seconds(seconds: Option<f64>) -> String {
    seconds.map_or("-".to_owned(), |seconds| milliseconds(seconds * 1e3))
}

#[derive(Serialize, Deserialize)]
struct Status {
    node: NodeStatus,
    models: Vec<ModelStatus>,
}

/// Shows the pool and what runs.
pub(crate) async fn ps(target: Target, as_json: bool) -> anyhow::Result<()> {
    let client = Client::connect(target).await?;
    let result: anyhow::Result<Status> = client.get("/admin/status").await;
    client.close().await?;
    let status = result?;
    if as_json {
        println!("{}", serde_json::to_string_pretty(&status)?);
        return Ok(());
    }
    let node = &status.node;
    println!(
        "{}: pool {}, free {}, resident weights {} ({} in use), KV {} in {} blocks",
        node.device,
        bytes(node.pool_bytes),
        bytes(node.free_bytes),
        bytes(node.resident_bytes),
        bytes(node.leased_bytes),
        bytes(node.kv_bytes),
        node.kv_blocks
    );
    for device in &node.devices {
        println!(
            "  {}{}: pool {}, free {}, resident weights {}, {} running, {} waiting",
            device.device,
            if device.lost { " (lost)" } else { "" },
            bytes(device.pool_bytes),
            bytes(device.free_bytes),
            bytes(device.resident_bytes),
            device.running,
            device.waiting
        );
    }
    println!(
        "{} running, {} waiting; since the start: {} loaded, {} reused, {} evicted, {} preemptions",
        node.running,
        node.waiting,
        bytes(node.bytes_loaded_total),
        bytes(node.bytes_reused_total),
        bytes(node.bytes_evicted_total),
        node.preemptions_total
    );
    if node.host_tier_bytes > 0 {
        println!(
            "host memory: {} of {} taken by {} tensors; since the start {} of what was brought in came from it",
            bytes(node.host_weight_bytes),
            bytes(node.host_tier_bytes),
            node.host_tensors,
            bytes(node.bytes_from_host_total)
        );
    }
    let rows: Vec<Vec<String>> = status
        .models
        .iter()
        .filter(|model| model.resident_bytes > 0 || model.state != "idle" || model.waiting > 0)
        .map(|model| {
            let share = model.resident_bytes as f64 / model.weight_bytes.max(1) as f64;
            vec![
                model.name.clone(),
                model.state.clone(),
                format!("{} ({:.0} %)", bytes(model.resident_bytes), share * 100.0),
                model.running.to_string(),
                model.waiting.to_string(),
            ]
        })
        .collect();
    if !rows.is_empty() {
        table(&["NAME", "STATE", "RESIDENT", "RUNNING", "WAITING"], &rows);
    }
    Ok(())
}

/// Takes a model out of service.
pub(crate) async fn rm(name: &str, target: Target) -> anyhow::Result<()> {
    let client = Client::connect(target).await?;
    let result = client.send(reqwest::Method::DELETE, &format!("/admin/models/{name}"), None).await;
    client.close().await?;
    result?;
    println!("{name} is removed");
    Ok(())
}

fn age(created: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = now.saturating_sub(Duration::from_secs(created)).as_secs();
    match seconds {
        0..120 => format!("{seconds} s ago"),
        120..7200 => format!("{} min ago", seconds / 60),
        7200..172_800 => format!("{} h ago", seconds / 3600),
        _ => format!("{} d ago", seconds / 86_400),
    }
}
