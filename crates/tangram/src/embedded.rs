//! A server inside this process, and the file by which other commands find a server on a data directory.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use tangram_gateway::GatewayConfig;
use tangram_node::{Device, Node, NodeConfig, NodeError, RemoteOptions, Trial};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::config::Settings;
use crate::device::{Choice, on_cpu};

/// Written to the data directory while a server runs on it.
#[derive(Serialize, Deserialize)]
pub(crate) struct Running {
    /// Base URL for clients on this machine.
    pub(crate) url: String,
}

const RUNNING_FILE: &str = "server.json";

/// The server that says that it runs on this data directory. It may have died since.
pub(crate) fn find_running(data: &Path) -> Option<Running> {
    serde_json::from_slice(&std::fs::read(data.join(RUNNING_FILE)).ok()?).ok()
}

/// A running server.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    /// What its user should know of the devices.
    pub(crate) note: Option<String>,
    /// Bytes of the devices' pools.
    pub(crate) pool_bytes: u64,
    running_file: std::path::PathBuf,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<std::io::Result<()>>,
}

impl Server {
    /// Opens the node and listens.
    pub(crate) async fn start(settings: &Settings) -> anyhow::Result<Server> {
        let (devices, note) = settings.device.devices()?;
        // The port first: when it is taken, nothing has been touched yet.
        let listener = TcpListener::bind(settings.listen).await.with_context(|| {
            format!("cannot listen on {}; choose another address with --listen", settings.listen)
        })?;
        let address = listener.local_addr()?;
        let (node, note) = match (&settings.device, note) {
            (Choice::Auto | Choice::AutoOne, None) => open_usable(settings, devices).await?,
            (_, note) => (open(settings, devices).await?, note),
        };
        let pool_bytes = node.pool_bytes();
        let running_file = settings.data.join(RUNNING_FILE);
        let url = format!("http://{}", reachable(address));
        std::fs::write(&running_file, serde_json::to_vec(&Running { url })?)
            .with_context(|| format!("writing {}", running_file.display()))?;
        let (stop, stopped) = oneshot::channel();
        let gateway = GatewayConfig {
            api_key: settings.api_key.clone(),
            max_body_bytes: settings.max_body,
            ..GatewayConfig::default()
        };
        let task = tokio::spawn(tangram_gateway::serve(listener, node, gateway, async {
            // An error means that the sender is gone, which is as good a reason to stop.
            let _ = stopped.await;
        }));
        Ok(Server { address, note, pool_bytes, running_file, stop: Some(stop), task })
    }

    /// Base URL for clients on this machine.
    pub(crate) fn url(&self) -> String {
        format!("http://{}", reachable(self.address))
    }

    /// Lets running requests finish and ends.
    pub(crate) async fn stop(mut self) -> anyhow::Result<()> {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        let result = self.task.await;
        let _ = std::fs::remove_file(&self.running_file);
        result?.context("serving")
    }
}

/// Opens the node on those of these GPUs that can be set up, or else on the processor; with what its user should know.
async fn open_usable(
    settings: &Settings,
    mut gpus: Vec<Device>,
) -> anyhow::Result<(Arc<Node>, Option<String>)> {
    let mut unused = Vec::new();
    loop {
        let error = match open(settings, gpus.clone()).await {
            Ok(node) => return Ok((node, (!unused.is_empty()).then(|| unused.join("\n")))),
            Err(error) => error,
        };
        match error.downcast_ref() {
            Some(NodeError::Device { place, .. }) if gpus.len() > 1 && *place < gpus.len() => {
                unused.push(format!("a GPU is not used: {error}"));
                gpus.remove(*place);
            }
            Some(NodeError::Device { .. }) => {
                unused.push(on_cpu(&format_args!("there is a GPU, but {error}")));
                return Ok((open(settings, vec![Device::Cpu]).await?, Some(unused.join("\n"))));
            }
            _ => return Err(error),
        }
    }
}

async fn open(settings: &Settings, devices: Vec<Device>) -> anyhow::Result<Arc<Node>> {
    let device_memory = settings.pool_bytes(&devices)?;
    let host_memory = settings.host_bytes(device_memory, devices.len());
    let config = NodeConfig {
        data: settings.data.clone(),
        devices,
        device_memory,
        backend: settings.pool,
        page_bytes: settings.page_size,
        host_memory,
        threads: settings.threads,
        max_waiting: settings.max_waiting,
        verification: settings.verification,
        remote: RemoteOptions::from_environment(),
        observer: None,
        trial: Trial::default(),
    };
    Ok(tokio::task::spawn_blocking(move || Node::open(config)).await??)
}

/// Where a client on this machine reaches a server that listens on all addresses.
fn reachable(address: SocketAddr) -> SocketAddr {
    let mut address = address;
    if address.ip().is_unspecified() {
        address.set_ip(match address {
            SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        });
    }
    address
}
