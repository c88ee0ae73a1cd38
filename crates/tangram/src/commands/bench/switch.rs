//! `tangram bench switch`.

use clap::Args;

use crate::Target;

/// Flags.
#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    target: Target,
}

/// Runs the measurement.
pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let _ = options.target;
    Ok(())
}
