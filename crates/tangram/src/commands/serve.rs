//! `tangram serve`.

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

use crate::config::ServerOptions;
use crate::embedded::Server;
use crate::output;

/// Serves until SIGINT or SIGTERM, then lets running requests finish.
pub(crate) async fn run(options: ServerOptions) -> anyhow::Result<()> {
    let settings = options.settle()?;
    let server = Server::start(&settings).await?;
    if let Some(note) = &server.note {
        eprintln!("{note}");
    }
    println!(
        "tangram serves on {} with a pool of {} and data in {}",
        server.url(),
        output::bytes(server.pool_bytes),
        settings.data.display()
    );
    if !settings.listen.ip().is_loopback() && settings.api_key.is_none() {
        eprintln!(
            "warning: everybody who reaches {} may use and change this server; --api-key protects it",
            settings.listen
        );
    }
    until_signal().await?;
    eprintln!("stopping: running requests finish first");
    server.stop().await
}

/// Returns at the first SIGINT or SIGTERM.
pub(crate) async fn until_signal() -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    tokio::select! {
        result = tokio::signal::ctrl_c() => result.context("listening for SIGINT"),
        _ = terminate.recv() => Ok(()),
    }
}
