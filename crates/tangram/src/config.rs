//! Server settings from flags, `TANGRAM_*` variables and a TOML file, in this order of precedence, then defaults.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use bytesize::ByteSize;
use clap::Args;
use serde::Deserialize;
use tangram_node::{Backend, Device, Verification};

use crate::device::Choice;

/// Flags of every command that runs a server, or may have to.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct ServerOptions {
    /// TOML file with the same settings, e.g. `device-memory = "8GiB"`.
    #[arg(long, env = "TANGRAM_CONFIG")]
    pub(crate) config: Option<PathBuf>,
    /// Data directory [default: tangram in the user's data directory].
    #[arg(long, env = "TANGRAM_DATA")]
    pub(crate) data: Option<PathBuf>,
    /// Address to listen on [default: 127.0.0.1:8000].
    #[arg(long, env = "TANGRAM_LISTEN")]
    pub(crate) listen: Option<SocketAddr>,
    /// Devices that models run on: `cpu`, `cuda:N` for an NVIDIA GPU, `cuda:N,cuda:M` for several, or `auto` for all GPUs, or
    /// the CPU if there is none [default: auto].
    #[arg(long, env = "TANGRAM_DEVICE")]
    pub(crate) device: Option<String>,
    /// Size of the pool for weights and KV, e.g. 8GiB; each GPU has one [default: half of the memory that is available; of
    /// a GPU's all that is free, but a reserve].
    #[arg(long, env = "TANGRAM_DEVICE_MEMORY")]
    pub(crate) device_memory: Option<ByteSize>,
    /// How the pool is laid out: `paged` maps pages under stable addresses, `segment` packs extents in one range
    /// [default: paged].
    #[arg(long, env = "TANGRAM_POOL", value_enum)]
    pub(crate) pool: Option<PoolLayout>,
    /// Size of the pool's pages, a power of two, e.g. 2MiB [default: by the size of the pool].
    #[arg(long, env = "TANGRAM_PAGE_SIZE")]
    pub(crate) page_size: Option<ByteSize>,
    /// Host memory beside the pool for what has to leave it for a while: the KV of preempted sequences, and on a GPU, which
    /// gets seven eighths of it, weights that come back without a disk. Several GPUs have equal parts of it [default: 1GiB
    /// for each device, at most a quarter of its pool].
    #[arg(long, env = "TANGRAM_HOST_MEMORY")]
    pub(crate) host_memory: Option<ByteSize>,
    /// Threads that compute [default: the cores that this process may use].
    #[arg(long, env = "TANGRAM_THREADS")]
    pub(crate) threads: Option<usize>,
    /// Requests that may wait before further ones get status 429 [default: 1024].
    #[arg(long, env = "TANGRAM_MAX_WAITING")]
    pub(crate) max_waiting: Option<usize>,
    /// How much of what is loaded is compared with its hash: `full`, or `sampled`, one part of sixteen, for machines whose
    /// links are faster than their cores hash [default: full].
    #[arg(long, env = "TANGRAM_VERIFY", value_enum)]
    pub(crate) verify: Option<Verify>,
    /// Largest request body [default: 32MiB].
    #[arg(long, env = "TANGRAM_MAX_BODY")]
    pub(crate) max_body: Option<ByteSize>,
    /// Key that inference and admin calls must carry as `Authorization: Bearer KEY`.
    #[arg(long, env = "TANGRAM_API_KEY", hide_env_values = true)]
    pub(crate) api_key: Option<String>,
}

/// The two layouts of the pool.
#[derive(clap::ValueEnum, Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum PoolLayout {
    /// Pages under stable addresses.
    Paged,
    /// Contiguous extents in one range.
    Segment,
}

impl From<PoolLayout> for Backend {
    fn from(layout: PoolLayout) -> Backend {
        match layout {
            PoolLayout::Paged => Backend::Paged,
            PoolLayout::Segment => Backend::Segment,
        }
    }
}

/// The two extents of verification.
#[derive(clap::ValueEnum, Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Verify {
    /// Everything.
    Full,
    /// One part of sixteen.
    Sampled,
}

/// The settings file.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct File {
    data: Option<PathBuf>,
    listen: Option<SocketAddr>,
    device: Option<String>,
    device_memory: Option<String>,
    pool: Option<PoolLayout>,
    page_size: Option<String>,
    host_memory: Option<String>,
    threads: Option<usize>,
    max_waiting: Option<usize>,
    verify: Option<Verify>,
    max_body: Option<String>,
    api_key: Option<String>,
}

/// Complete settings.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) data: PathBuf,
    pub(crate) listen: SocketAddr,
    pub(crate) device: Choice,
    /// As far as somebody said it.
    pub(crate) device_memory: Option<u64>,
    pub(crate) pool: Backend,
    pub(crate) page_size: Option<u64>,
    pub(crate) host_memory: Option<u64>,
    pub(crate) threads: Option<usize>,
    pub(crate) max_waiting: usize,
    pub(crate) verification: Verification,
    pub(crate) max_body: usize,
    pub(crate) api_key: Option<String>,
}

const DEFAULT_LISTEN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 8000);
const DEFAULT_HOST_MEMORY: u64 = 1 << 30;
const DEFAULT_MAX_WAITING: usize = 1024;
const DEFAULT_MAX_BODY: usize = 32 << 20;

impl ServerOptions {
    /// Fills in the file and the defaults.
    pub(crate) fn settle(self) -> anyhow::Result<Settings> {
        let file = self.config.as_deref().map_or_else(|| Ok(File::default()), read_file)?;
        let device = self.device.or(file.device).map_or(Ok(Choice::Auto), |device| device.parse())?;
        let size = |flag: Option<ByteSize>, text: Option<String>, key: &str| -> anyhow::Result<Option<u64>> {
            match (flag, text) {
                (Some(size), _) => Ok(Some(size.as_u64())),
                (None, Some(text)) => {
                    let size: ByteSize =
                        text.parse().map_err(|problem| anyhow::anyhow!("{key} = {text:?}: {problem}"))?;
                    Ok(Some(size.as_u64()))
                }
                (None, None) => Ok(None),
            }
        };
        let device_memory = size(self.device_memory, file.device_memory, "device-memory")?;
        Ok(Settings {
            data: match self.data.or(file.data) {
                Some(data) => data,
                None => default_data()?,
            },
            listen: self.listen.or(file.listen).unwrap_or(DEFAULT_LISTEN),
            device,
            device_memory,
            pool: self.pool.or(file.pool).map_or(Backend::Paged, Backend::from),
            page_size: size(self.page_size, file.page_size, "page-size")?,
            host_memory: size(self.host_memory, file.host_memory, "host-memory")?,
            threads: self.threads.or(file.threads),
            max_waiting: self.max_waiting.or(file.max_waiting).unwrap_or(DEFAULT_MAX_WAITING),
            verification: match self.verify.or(file.verify) {
                None | Some(Verify::Full) => Verification::Full,
                Some(Verify::Sampled) => Verification::Sampled,
            },
            max_body: size(self.max_body, file.max_body, "max-body")?
                .map_or(DEFAULT_MAX_BODY, |n| n as usize),
            api_key: self.api_key.or(file.api_key).filter(|key| !key.is_empty()),
        })
    }
}

impl Settings {
    /// Bytes of the pool on each of these devices; `None` for what a GPU has free.
    pub(crate) fn pool_bytes(&self, devices: &[Device]) -> anyhow::Result<Option<u64>> {
        match (self.device_memory, devices) {
            (Some(bytes), _) => Ok(Some(bytes)),
            (None, [Device::Cuda { .. }, ..]) => Ok(None),
            (None, _) => {
                let available = available_memory().context(
                    "how much memory is available cannot be read from the system; say it with --device-memory",
                )?;
                Ok(Some(available / 2))
            }
        }
    }

    /// Bytes of host memory beside so many pools of this size.
    pub(crate) fn host_bytes(&self, pool_bytes: Option<u64>, devices: usize) -> u64 {
        let of_one = || DEFAULT_HOST_MEMORY.min(pool_bytes.map_or(u64::MAX, |bytes| bytes / 4));
        self.host_memory.unwrap_or_else(|| of_one() * devices as u64)
    }
}

fn read_file(path: &Path) -> anyhow::Result<File> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    toml::from_str(&text).with_context(|| format!("reading {}", path.display()))
}

/// The user's data directory by the XDG rules.
pub(crate) fn default_data() -> anyhow::Result<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    match absolute("XDG_DATA_HOME").or_else(|| Some(absolute("HOME")?.join(".local/share"))) {
        Some(base) => Ok(base.join("tangram")),
        None => bail!("no home directory is set; name a data directory with --data"),
    }
}

/// Bytes that this process could still take: what the system has available, within its control group's limit.
fn available_memory() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find(|line| line.starts_with("MemAvailable:"))?;
    let system = line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024;
    let group = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok();
    let group = group.and_then(|text| text.trim().parse::<u64>().ok());
    Some(group.map_or(system, |limit| limit.min(system)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(file: &str) -> (tempfile::TempDir, ServerOptions) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tangram.toml");
        std::fs::write(&path, file).unwrap();
        (dir, ServerOptions { config: Some(path), ..ServerOptions::default() })
    }

    #[test]
    fn flags_go_before_the_file_and_the_file_before_defaults() {
        let (_dir, mut options) = options("data = \"/d\"\ndevice-memory = \"2GiB\"\nmax-waiting = 7\n");
        options.device_memory = Some(ByteSize::mib(64));
        let settings = options.settle().unwrap();
        assert_eq!(settings.device_memory, Some(64 << 20));
        assert_eq!([1, 3].map(|devices| settings.host_bytes(Some(64 << 20), devices)), [16 << 20, 48 << 20]);
        assert_eq!((settings.max_waiting, settings.data), (7, PathBuf::from("/d")));
        assert_eq!(settings.listen, DEFAULT_LISTEN);
    }

    #[test]
    fn mistakes_in_the_file_are_named() {
        for (file, word) in
            [("device-memroy = \"1GiB\"", "device-memroy"), ("device-memory = \"a lot\"", "device-memory")]
        {
            let (_dir, options) = options(file);
            assert!(format!("{:#}", options.settle().unwrap_err()).contains(word));
        }
        let (_dir, options) = options("device = \"tpu:0\"\ndata = \"/d\"");
        assert!(options.settle().unwrap_err().to_string().contains("tpu:0"));
    }
}
