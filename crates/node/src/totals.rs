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
    // Both of the same device: where most of it is.
    let there = |of: &ModelStatus| (of.resident_bytes, of.hosted_bytes);
    if there(other) > there(total) {
        (total.resident_bytes, total.hosted_bytes) = there(other);
    }
    total.running += other.running;
    total.waiting += other.waiting;
    let fit = &mut total.forecast.tokens_beside_weights;
    *fit = (*fit).max(other.forecast.tokens_beside_weights);
    let rank = |state: &str| ["idle", "loading", "active"].iter().position(|known| *known == state);
    if rank(&other.state) > rank(&total.state) {
        total.state.clone_from(&other.state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::ModelForecast;

    fn model(name: &str, resident_bytes: u64, state: &str, running: usize) -> ModelStatus {
        ModelStatus {
            name: name.to_owned(),
            base: None,
            family: "llama".to_owned(),
            task: "generate".to_owned(),
            dtype: "F32".to_owned(),
            weight_bytes: 100,
            in_place_bytes: None,
            stored_bytes: 100,
            shared_bytes: 0,
            resident_bytes,
            resident_by_device: Vec::new(),
            hosted_bytes: 0,
            kv_bytes_per_token: 1,
            context: 10,
            forecast: ModelForecast {
                tokens_beside_weights: Some(resident_bytes),
                scratch_bytes: 0,
                prompt_tokens: 10,
                cold_first_token_seconds: None,
                resident_first_token_seconds: None,
                load_bytes_per_second: None,
            },
            state: state.to_owned(),
            running,
            waiting: 1,
            created: 5,
        }
    }

    #[test]
    fn one_device_is_shown_as_it_is() {
        let status = NodeStatus { device: "cpu".to_owned(), free_bytes: 7, ..NodeStatus::default() };
        let shown = node(vec![("another name", false, status)]);
        assert_eq!((shown.device.as_str(), shown.free_bytes, shown.devices.len()), ("cpu", 7, 0));
        let listed = models(vec![vec![model("a", 30, "idle", 0)]]);
        assert!(listed[0].resident_by_device.is_empty());
        let text = serde_json::to_string(&(shown, listed)).unwrap();
        assert!(!text.contains("devices") && !text.contains("by_device"), "{text}");
    }

    #[test]
    fn several_are_added_up_and_listed() {
        let status =
            |free_bytes| NodeStatus { free_bytes, running: 2, kv_blocks: 3, ..NodeStatus::default() };
        let shown = node(vec![("g0", false, status(7)), ("g1", true, status(5))]);
        assert_eq!(
            (shown.device.as_str(), shown.free_bytes, shown.running, shown.kv_blocks),
            ("g0, g1", 12, 4, 6)
        );
        let devices: Vec<_> = shown
            .devices
            .iter()
            .map(|device| (device.device.as_str(), device.lost, device.free_bytes))
            .collect();
        assert_eq!(devices, [("g0", false, 7), ("g1", true, 5)]);
        let listed = models(vec![
            vec![model("a", 30, "active", 1), model("b", 0, "idle", 0)],
            // What was removed or deployed a moment ago is not on all of them.
            vec![model("b", 90, "loading", 3), model("c", 1, "idle", 0)],
        ]);
        let figures: Vec<_> = listed
            .iter()
            .map(|model| {
                (
                    &model.name[..],
                    &model.resident_by_device[..],
                    &model.state[..],
                    model.running,
                    model.waiting,
                )
            })
            .collect();
        assert_eq!(
            figures,
            [
                ("a", &[30, 0][..], "active", 1, 1),
                ("b", &[0, 90], "loading", 3, 2),
                ("c", &[0, 1], "idle", 0, 1)
            ]
        );
        assert_eq!((listed[1].resident_bytes, listed[1].forecast.tokens_beside_weights), (90, Some(90)));
    }
}
