//! The systems that are compared: what each keeps, how it loads, where it sends requests.

use tangram_policy::packing::Strategy;

/// What stays on a device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Keep {
    /// Nothing: every request loads its whole model.
    Nothing,
    /// The model that ran last, as a warm instance (ServerlessLLM).
    LastModel,
    /// Whole models; the one used longest ago goes.
    WholeModels,
    /// Tensor groups; the one used longest ago goes (LayerWeave's "CB-LRU"), or of models used at the same time the
    /// one needed last in the forward pass ("SuffixLRU").
    Groups {
        /// Keep a prefix.
        tail_first: bool,
    },
    /// Tangram V1: size / bandwidth × access probability × sensitivity, not per byte, without decay.
    PublishedValue,
    /// LayerWeave: prefixes, chosen by a covering multiple-choice knapsack over the predicted exposed stall.
    PrefixMckp,
    /// Our retention.
    Worth(Worth),
}

/// The parts of our retention, each of which can be left out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Worth {
    /// Worth is per byte.
    pub per_byte: bool,
    /// Old demand decays.
    pub decay: bool,
    /// What the pipeline hides counts less.
    pub exposure: bool,
    /// The arrival forecast counts.
    pub forecast: bool,
    /// Next uses are known from the trace (Belady's bound) instead of estimated.
    pub oracle: bool,
}

/// Which device a request goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// The idle one with most of the model's bytes.
    MostResident,
    /// The idle one from which the model can be loaded soonest, host memory or disk (ServerlessLLM).
    Locality,
    /// LayerWeave's: least wait + stall + 0.1 × value lost by the knapsack's eviction; bounded wait for a busy one.
    Joint,
    /// Ours: `tangram_policy::placement`.
    Predicted,
}

/// A system.
#[derive(Clone, Debug, PartialEq)]
pub struct System {
    /// Its name in reports.
    pub name: String,
    /// What stays.
    pub keep: Keep,
    /// Whether prefill runs while layers arrive.
    pub overlap: bool,
    /// Where requests go.
    pub route: Route,
    /// How room is made in a contiguous segment; `None` if whole models come and go and nothing is moved.
    pub packing: Option<Strategy>,
    /// Groups per model after merging, if the system merges.
    pub merged: Option<u64>,
    /// Whether an idle link brings in what is expected.
    pub prefetch: bool,
    /// Whether a request that can start cheaply may overtake.
    pub overtaking: bool,
    /// Whether models share equal contents.
    pub sharing: bool,
}

/// Names of the systems that are run unless others are asked for.
pub const NAMES: [&str; 12] = [
    "none",
    "pipe",
    "lru-model",
    "sllm",
    "reuse",
    "tangram-v1",
    "cb-lru",
    "cb-mckp",
    "joint-mckp",
    "ours",
    "ours-belady",
    "ours-oracle",
];

/// Parts that `ours/no-PART` leaves out.
pub const PARTS: [&str; 8] =
    ["per-byte", "decay", "exposure", "forecast", "prefetch", "overtaking", "placement", "sharing"];

impl System {
    /// The system of this name; `ours/no-PART/no-PART...` leaves parts of ours out.
    pub fn named(name: &str) -> Option<System> {
        let mut parts = name.split('/');
        let group_lru = Keep::Groups { tail_first: false };
        let base = |keep, overlap, route, packing| System {
            name: name.to_owned(),
            keep,
            overlap,
            route,
            packing,
            merged: None,
            prefetch: false,
            overtaking: false,
            sharing: false,
        };
        let published = Some(Strategy::Published);
        let all = Worth { per_byte: true, decay: true, exposure: true, forecast: true, oracle: false };
        let ours = |worth, prefetch| System {
            prefetch,
            overtaking: true,
            sharing: true,
            ..base(Keep::Worth(worth), true, Route::Predicted, Some(Strategy::PartitionedGain))
        };
        let most = Route::MostResident;
        let mut system = match parts.next()? {
            "none" => base(Keep::Nothing, false, most, None),
            "pipe" => base(Keep::Nothing, true, most, None),
            "lru-model" => base(Keep::WholeModels, false, most, None),
            "sllm" => base(Keep::LastModel, false, Route::Locality, None),
            "reuse" => base(group_lru, false, most, published),
            "tangram-v1" => System {
                merged: Some(40),
                sharing: true,
                ..base(Keep::PublishedValue, false, most, published)
            },
            "cb-lru" => base(group_lru, true, most, published),
            "cb-suffix-lru" => base(Keep::Groups { tail_first: true }, true, most, published),
            "cb-mckp" => base(Keep::PrefixMckp, true, most, published),
            "joint-mckp" => base(Keep::PrefixMckp, true, Route::Joint, published),
            "ours" => ours(all, true),
            "ours-belady" => ours(Worth { oracle: true, ..all }, false),
            "ours-oracle" => ours(Worth { oracle: true, ..all }, true),
            _ => return None,
        };
        for part in parts {
            let Keep::Worth(worth) = &mut system.keep else { return None };
            match part.strip_prefix("no-")? {
                "per-byte" => worth.per_byte = false,
                "decay" => worth.decay = false,
                "exposure" => worth.exposure = false,
                "forecast" => worth.forecast = false,
                "prefetch" => system.prefetch = false,
                "overtaking" => system.overtaking = false,
                "placement" => system.route = Route::MostResident,
                "sharing" => system.sharing = false,
                _ => return None,
            }
        }
        Some(system)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert!(NAMES.iter().all(|name| System::named(name).is_some_and(|system| system.name == *name)));
        assert!(PARTS.iter().all(|part| System::named(&format!("ours/no-{part}")) != System::named("ours")));
        assert!(!System::named("ours/no-prefetch/no-sharing").unwrap().sharing);
        for wrong in ["", "theirs", "ours/prefetch", "ours/no-luck", "cb-lru/no-decay"] {
            assert_eq!(System::named(wrong), None, "{wrong}");
        }
    }
}
