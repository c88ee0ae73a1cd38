//! One set of figures out of those of several devices. A node with one device shows that device's as they are.

use std::collections::BTreeMap;

use crate::api::{DeviceStatus, ModelStatus, NodeStatus};

/// The figures of a node from those of its devices, each with its name and whether it is lost.
pub(crate) fn node(devices: Vec<(&str, bool, NodeStatus)>) -> NodeStatus {
    let mut listed = Vec::new();
    let mut total: Option<NodeStatus> = None;
    let several = devices.len() > 1;
    for (name, lost, mut status) in devices {
        if several {
            status.device = name.to_owned();
            listed.push(of_device(lost, &status));
        }
        match &mut total {
            None => total = Some(status),
            Some(total) => add(total, status),
        }
    }
    NodeStatus { devices: listed, ..total.unwrap_or_default() }
}

fn of_device(lost: bool, status: &NodeStatus) -> DeviceStatus {
    DeviceStatus {
        device: status.device.clone(),
        lost,
        pool_bytes: status.pool_bytes,
        free_bytes: status.free_bytes,
        resident_bytes: status.resident_bytes,
        leased_bytes: status.leased_bytes,
        kv_bytes: status.kv_bytes,
        host_tier_bytes: status.host_tier_bytes,
        host_weight_bytes: status.host_weight_bytes,
        running: status.running,
        waiting: status.waiting,
        bytes_loaded_total: status.bytes_loaded_total,
        bytes_evicted_total: status.bytes_evicted_total,
        activations_total: status.activations_total,
        device_rebuilds_total: status.device_rebuilds_total,
    }
}

fn add(total: &mut NodeStatus, other: NodeStatus) {
    total.device = format!("{}, {}", total.device, other.device);
    total.running += other.running;
    total.waiting += other.waiting;
    for (sum, part) in [
        (&mut total.pool_bytes, other.pool_bytes),
        (&mut total.free_bytes, other.free_bytes),
        (&mut total.pool_taken_bytes, other.pool_taken_bytes),
        (&mut total.resident_bytes, other.resident_bytes),
        (&mut total.leased_bytes, other.leased_bytes),
        (&mut total.kv_bytes, other.kv_bytes),
        (&mut total.kv_blocks, other.kv_blocks),
        (&mut total.kv_cached_bytes, other.kv_cached_bytes),
        (&mut total.cached_tokens_total, other.cached_tokens_total),
        (&mut total.bytes_loaded_total, other.bytes_loaded_total),
        (&mut total.bytes_prefetched_total, other.bytes_prefetched_total),
        (&mut total.bytes_reused_total, other.bytes_reused_total),
        (&mut total.bytes_evicted_total, other.bytes_evicted_total),
        (&mut total.bytes_moved_total, other.bytes_moved_total),
        (&mut total.preemptions_total, other.preemptions_total),
        (&mut total.swaps_total, other.swaps_total),
        (&mut total.host_kv_bytes, other.host_kv_bytes),
        (&mut total.host_tier_bytes, other.host_tier_bytes),
        (&mut total.host_weight_bytes, other.host_weight_bytes),
        (&mut total.host_tensors, other.host_tensors),
        (&mut total.bytes_from_host_total, other.bytes_from_host_total),
        (&mut total.activations_total, other.activations_total),
        (&mut total.device_rebuilds_total, other.device_rebuilds_total),
        (&mut total.graphs, other.graphs),
        (&mut total.replayed_steps_total, other.replayed_steps_total),
        (&mut total.copied_rows_total, other.copied_rows_total),
        (&mut total.scratch_bytes, other.scratch_bytes),
    ] {
        *sum += part;
    }
}

/// The models of a node from what each of its devices says of them, by name.
pub(crate) fn models(mut devices: Vec<Vec<ModelStatus>>) -> Vec<ModelStatus> {
    if devices.len() == 1 {
        return devices.pop().unwrap_or_default();
    }
    let count = devices.len();
    let mut total: BTreeMap<(String, u64), ModelStatus> = BTreeMap::new();
    for (device, models) in devices.into_iter().enumerate() {
        for model in models {
            let resident = model.resident_bytes;
            let entry = total.entry((model.name.clone(), model.created));
            let entry = entry.and_modify(|known| merge(known, &model));
            let known =
                entry.or_insert_with(|| ModelStatus { resident_by_device: vec![0; count], ..model.clone() });
            known.resident_by_device.iter_mut().skip(device).take(1).for_each(|bytes| *bytes = resident);
        }
    }
    total.into_values().collect()
}

fn merge(total: &mut ModelStatus, other: &ModelStatus) {
    total.resident_bytes = total.resident_bytes.max(other.resident_bytes);
    total.hosted_bytes = total.hosted_bytes.max(other.hosted_bytes);
    total.running += other.running;
    total.waiting += other.waiting;
    let fit = &mut total.forecast.tokens_beside_weights;
    *fit = (*fit).max(other.forecast.tokens_beside_weights);
    let rank = |state: &str| ["idle", "loading", "active"].iter().position(|known| *known == state);
    if rank(&other.state) > rank(&total.state) {
        total.state.clone_from(&other.state);
    }
}
