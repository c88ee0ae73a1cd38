//! `tangram bench`: measurements against a running or embedded server, and of loading alone.

mod load;
mod report;
mod simulated;
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
}

/// Runs a measurement and prints its report.
pub(crate) async fn run(bench: Bench) -> anyhow::Result<()> {
    match bench {
        Bench::Switch(options) => switch::run(*options).await,
        Bench::Load(options) => tokio::task::spawn_blocking(move || load::run(&options)).await?,
    }
}
