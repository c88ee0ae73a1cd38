//! `tangram bench`: measurements against a running or embedded server, and of loading alone.

mod cold;
mod load;
mod report;
mod serve;
mod simulated;
mod soak;
mod switch;
mod trace;

use clap::Subcommand;

/// What to measure.
#[derive(Subcommand)]
pub(crate) enum Bench {
    /// Replay a trace of requests over many models and report what switching between them costs.
    Switch(Box<switch::Options>),
    /// Load a checkpoint from disk as fast as it goes, cold and warm, beside what the disk and the memory can give.
    Load(load::Options),
    /// Measure the time to the first token of a model that lies on the disk only, and show what was loaded and computed
    /// when.
    Cold(cold::Options),
    /// Put load on an OpenAI-compatible server, or on two in turn, and report rates and times to the first token.
    Serve(serve::Options),
    /// Send random requests of all kinds to the deployed models, check every answer, and look for leaks.
    Soak(soak::Options),
}

/// Runs a measurement and prints its report.
pub(crate) async fn run(bench: Bench) -> anyhow::Result<()> {
    match bench {
        Bench::Switch(options) => switch::run(*options).await,
        Bench::Load(options) => tokio::task::spawn_blocking(move || load::run(&options)).await?,
        Bench::Cold(options) => tokio::task::spawn_blocking(move || cold::run(&options)).await?,
        Bench::Serve(options) => serve::run(options).await,
        Bench::Soak(options) => soak::run(options).await,
    }
}

/// Reads a flag that is a number of at least 1.
fn parse_count(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|count| *count > 0).ok_or_else(|| "not a whole number of at least 1".to_owned())
}
