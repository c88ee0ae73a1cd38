//! The command line: parses, then hands over to one file per command.

mod client;
mod commands;
mod config;
mod device;
mod embedded;
mod output;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use tangram_node::WeightLayout;

use crate::commands::models::Deployable;
use crate::config::ServerOptions;

/// Serve many models from one bounded memory pool, paying on each switch only for bytes that are not resident.
#[derive(Parser)]
#[command(name = "tangram", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// [`WeightLayout`] as an argument.
#[derive(Clone, Copy, Default, clap::ValueEnum)]
enum Layout {
    #[default]
    Auto,
    Compressed,
    Plain,
}

impl From<Layout> for WeightLayout {
    fn from(layout: Layout) -> WeightLayout {
        match layout {
            Layout::Auto => WeightLayout::Auto,
            Layout::Compressed => WeightLayout::Compressed,
            Layout::Plain => WeightLayout::Plain,
        }
    }
}

#[derive(Subcommand)]
enum Command {
    /// Run the server.
    Serve {
        #[command(flatten)]
        options: ServerOptions,
    },
    /// Fetch two small models, serve them from a pool that cannot hold both, and show what each request cost.
    Quickstart(commands::quickstart::Options),
    /// Import a model and make it available under a name.
    Deploy {
        /// Name that requests will use.
        name: String,
        /// Hugging Face or ServerlessLLM directory, .safetensors file with its config.json beside it, or .gguf file; or where
        /// such a one is: https://HOST/PATH, s3://BUCKET/PATH, gs://BUCKET/PATH, az://CONTAINER/PATH,
        /// hf:ORG/NAME[@REVISION][/FILE].
        #[arg(required_unless_present = "adapter", conflicts_with = "adapter")]
        source: Option<PathBuf>,
        /// How bf16 and fp16 weights are stored: `compressed` takes about a third (bf16) or a seventh (fp16) less room,
        /// without loss. `auto` compresses where that makes loading faster on this machine.
        #[arg(long, value_enum, default_value_t, conflicts_with_all = ["in_place", "adapter"])]
        layout: Layout,
        /// Leave the weights in the files in which they are and read them there. Only what these do not hold in the form
        /// in which it is needed is stored. The files must stay as they are; they are never written to or deleted.
        #[arg(long, conflicts_with = "adapter")]
        in_place: bool,
        /// A LoRA adapter instead: PEFT directory with adapter_config.json and adapter_model.safetensors.
        #[arg(long, requires = "base")]
        adapter: Option<PathBuf>,
        /// Deployed name of the model that the adapter is made for.
        #[arg(long, requires = "adapter")]
        base: Option<String>,
        #[command(flatten)]
        target: Target,
    },
    /// List deployed models.
    Ls {
        #[command(flatten)]
        listing: Listing,
    },
    /// Show what is running and what the pool holds.
    Ps {
        #[command(flatten)]
        listing: Listing,
    },
    /// Take a model out of service and delete what only it had.
    Rm {
        /// Deployed name.
        name: String,
        #[command(flatten)]
        target: Target,
    },
    /// Send one prompt and print the answer as it comes.
    Run {
        /// Deployed name.
        name: String,
        /// The prompt; a chat message if the model has a chat template, else text to continue.
        prompt: String,
        /// Most tokens to generate.
        #[arg(long)]
        max_tokens: Option<u32>,
        /// Sampling temperature; 0 always takes the likeliest token.
        #[arg(long)]
        temperature: Option<f32>,
        #[command(flatten)]
        target: Target,
    },
    /// Measure.
    Bench {
        #[command(subcommand)]
        bench: commands::bench::Bench,
    },
    /// Compare policies on simulated machines.
    Sim(commands::sim::Options),
}

/// Which server a command talks to: the one named, else the one that runs on the data directory, else one that is
/// started inside this process for as long as the command takes.
#[derive(Args, Clone)]
pub(crate) struct Target {
    /// URL of a running server.
    #[arg(long, env = "TANGRAM_SERVER")]
    pub(crate) server: Option<String>,
    #[command(flatten)]
    pub(crate) options: ServerOptions,
}

#[derive(Args)]
struct Listing {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    target: Target,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_env("TANGRAM_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: starting the runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(run(cli.command));
    // Whatever is still blocked in the background (an import that was told to stop) must not hold up the exit.
    runtime.shutdown_timeout(std::time::Duration::from_secs(2));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Serve { options } => commands::serve::run(options).await,
        Command::Quickstart(options) => commands::quickstart::run(options).await,
        Command::Deploy { name, source, layout, in_place, adapter, base, target } => {
            let what = match (source, adapter, base) {
                (Some(source), ..) if in_place => Deployable::InPlace(source),
                (Some(source), ..) => Deployable::Source(source, layout.into()),
                (None, Some(adapter), Some(base)) => Deployable::Adapter(adapter, base),
                _ => anyhow::bail!("give a source, or --adapter with --base"),
            };
            commands::models::deploy(&name, &what, target).await
        }
        Command::Ls { listing } => commands::models::ls(listing.target, listing.json).await,
        Command::Ps { listing } => commands::models::ps(listing.target, listing.json).await,
        Command::Rm { name, target } => commands::models::rm(&name, target).await,
        Command::Run { name, prompt, max_tokens, temperature, target } => {
            commands::run::run(&name, &prompt, max_tokens, temperature, target).await
        }
        Command::Bench { bench } => commands::bench::run(bench).await,
        Command::Sim(options) => commands::sim::run_sim(&options),
    }
}
