//! The simulator beside the live node: the same requests, models and machine through `tangram_sim`.

use std::collections::HashMap;

use anyhow::{Context, bail};
use serde::Serialize;
use tangram_node::{MachineProfile, ModelProfile};
use tangram_policy::stall::Link;
use tangram_sim::model::{ALIGNMENT, Group, Pace};
use tangram_sim::{Model, Profile, Request, Scenario, System};

/// Bytes per second of copies inside the host's memory; only packing needs them.
const MOVE_BYTES_PER_SECOND: f64 = 5e9;

/// A request of the replay, as the simulator takes it.
pub(super) struct Simulated<'a> {
    pub(super) model: &'a str,
    pub(super) arrival_s: f64,
    pub(super) prompt: usize,
    pub(super) output: usize,
}

/// What was measured, what was simulated, and the first over the second.
#[derive(Debug, Serialize)]
pub(super) struct Agreement {
    pub(super) live_bytes: u64,
    pub(super) simulated_bytes: u64,
    pub(super) bytes_ratio: f64,
    pub(super) live_prefetched_bytes: u64,
    pub(super) simulated_prefetched_bytes: u64,
    pub(super) live_mean_ttft_ms: f64,
    pub(super) simulated_mean_ttft_ms: f64,
    pub(super) ttft_ratio: f64,
}

/// Simulates the requests on the machine of the profile and holds the figures of the live replay against it. A replay
/// in closed loop gives `pause_s`, the seconds between the end of a request and the start of the next, in which the live
/// node is idle while answer and request travel.
pub(super) fn compare(
    profile: &MachineProfile,
    requests: &[Simulated<'_>],
    pause_s: Option<f64>,
    live: (u64, u64, f64),
) -> anyhow::Result<Agreement> {
    let rate = profile.load_bytes_per_second.context("the server has not measured its rates yet")?;
    let indices: HashMap<&str, u32> =
        profile.models.iter().map(|model| model.name.as_str()).zip(0..).collect();
    let requests = requests.iter().map(|request| {
        Ok(Request {
            arrival: (request.arrival_s * 1e9) as u64,
            model: *indices.get(request.model).context("a model of the replay is gone")?,
            prompt: request.prompt as u64,
            output: request.output as u64,
        })
    });
    let requests = requests.collect::<anyhow::Result<Vec<Request>>>()?;
    let scenario = Scenario {
        profile: Profile {
            name: "measured",
            pool_bytes: profile.pool_bytes.saturating_sub(profile.cached_prefix_bytes),
            link: Link { bytes_per_second: rate, transfer_seconds: 0.0 },
            move_bytes_per_second: MOVE_BYTES_PER_SECOND,
            disk_bytes_per_second: rate,
            devices_per_node: 1,
            load_share: profile.load_share,
            ..Profile::named("cpu").context("the simulator knows no CPU")?
        },
        devices: 1,
        host_bytes: None,
        models: profile.models.iter().map(model).collect::<anyhow::Result<_>>()?,
        closed_loop: pause_s.map(|seconds| (seconds * 1e9) as u64),
        // Room beside the weights that the simulator keeps from prompts: no more than the longest answer needs.
        max_output: requests.iter().map(|request| request.output).max().unwrap_or(1),
        requests,
        kv: true,
    };
    let system = System::named("ours").context("the simulator does not know ours")?;
    let summary = tangram_sim::run(&scenario, &system, false, |_| ()).summary();
    let (live_bytes, live_prefetched_bytes, live_mean_ttft_ms) = live;
    Ok(Agreement {
        live_bytes,
        simulated_bytes: summary.loaded_bytes,
        bytes_ratio: live_bytes as f64 / summary.loaded_bytes.max(1) as f64,
        live_prefetched_bytes,
        simulated_prefetched_bytes: summary.fetched_bytes,
        live_mean_ttft_ms,
        simulated_mean_ttft_ms: summary.ttft_ms.mean,
        ttft_ratio: live_mean_ttft_ms / summary.ttft_ms.mean.max(f64::MIN_POSITIVE),
    })
}

fn model(profile: &ModelProfile) -> anyhow::Result<Model> {
    let group = |tensor: &tangram_node::TensorProfile| {
        let start = tensor.content.get(..16).context("a content id is too short")?;
        Ok(Group {
            content: u64::from_str_radix(start, 16).context("a content id is not hexadecimal")?,
            bytes: tensor.bytes.next_multiple_of(ALIGNMENT),
            stage: tensor.stage,
        })
    };
    let Some(shares) = profile.prompts.iter().find(|prompt| prompt.tokens >= 64).or(profile.prompts.last())
    else {
        bail!("the server has not measured the times of model '{}' yet", profile.name);
    };
    Ok(Model {
        name: profile.name.clone(),
        groups: profile.tensors.iter().map(group).collect::<anyhow::Result<_>>()?,
        kv_bytes_per_token: profile.kv_bytes_per_token,
        max_prompt: profile.context as u64,
        pace: Some(Pace {
            prompts: profile.prompts.iter().map(|prompt| (prompt.tokens as u64, prompt.seconds)).collect(),
            stages: shares.stage_seconds.clone(),
        }),
    })
}
