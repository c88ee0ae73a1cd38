//! `tangram bench`: measurements against a running or embedded server.

mod report;
mod simulated;
mod switch;
mod trace;

use clap::Subcommand;

/// What to measure.
#[derive(Subcommand)]
pub(crate) enum Bench {
    /// Replay a trace of requests over many models and report what switching between them costs.
    Switch(switch::Options),
}

/// Runs a measurement and prints its report.
pub(crate) async fn run(bench: Bench) -> anyhow::Result<()> {
    match bench {
        Bench::Switch(options) => switch::run(options).await,
    }
}
