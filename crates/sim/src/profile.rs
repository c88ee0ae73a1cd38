//! Machines: what a device's memory holds, what its link carries, how fast it computes.
//!
//! Prefill time is √(a² + b²) + launch with a = weight bytes / memory bandwidth (every weight is read once) and
//! b = 2·parameters·tokens / arithmetic rate: a smooth roof line. It ignores the quadratic term of attention. The L40's
//! rates are fitted to the Tangram authors' measurements (Qwen2-14B: 230 ms for 906 tokens, 55.6 ms for 128, 926 ms for
//! 4,096, 42.5 ms per decoded token; Llama-3-8B: 27.8 ms for 31) and meet them within 9 %. The other GPUs scale its
//! measured efficiency (80 % of peak bandwidth, 72 % of dense FP16 peak) by their data sheets and are not measured.

use tangram_policy::stall::Link;

const GIB: u64 = 1 << 30;

/// One kind of device and the node around it.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    /// Name on the command line.
    pub name: &'static str,
    /// Bytes for weights and KV.
    pub pool_bytes: u64,
    /// Pinned host memory to device memory.
    pub link: Link,
    /// Bytes per second of a copy inside device memory (payload), for compaction.
    pub move_bytes_per_second: f64,
    /// Bytes per second at which weights are read while computing.
    pub memory_bytes_per_second: f64,
    /// Arithmetic operations per second reached in prefill.
    pub operations_per_second: f64,
    /// Seconds of a forward pass that are neither.
    pub launch_seconds: f64,
    /// Bytes of weight per parameter.
    pub bytes_per_parameter: f64,
    /// Bytes per second from local disk, for what is not in host memory.
    pub disk_bytes_per_second: f64,
    /// Devices that share a host memory.
    pub devices_per_node: usize,
    /// The share (0 to 1) of the device's arithmetic that a running load takes: 0 where an engine of its own copies, up
    /// to 1 where the processor that computes also copies and verifies.
    pub load_share: f64,
}

impl Profile {
    /// All profiles, the default first.
    pub fn all() -> [Profile; 5] {
        let gpu = |name, pool_gib: u64, h2d: f64, memory: f64, operations: f64| Profile {
            name,
            pool_bytes: pool_gib * GIB,
            link: Link { bytes_per_second: h2d, transfer_seconds: 20e-6 },
            // A copy reads and writes.
            move_bytes_per_second: memory / 2.0,
            memory_bytes_per_second: memory * 0.804,
            operations_per_second: operations * 0.72,
            launch_seconds: 4e-3,
            bytes_per_parameter: 2.0,
            disk_bytes_per_second: 6e9,
            devices_per_node: 8,
            load_share: 0.0,
        };
        [
            gpu("l40", 42, 24.56e9, 864e9, 181e12),
            gpu("4090", 21, 24.56e9, 1008e9, 165e12),
            gpu("a100", 74, 24.56e9, 2039e9, 312e12),
            gpu("h100", 74, 53e9, 3350e9, 989e12),
            // Two server cores, copies within memory. Rough figures; measure before comparing with a live node.
            Profile {
                name: "cpu",
                pool_bytes: 4 * GIB,
                link: Link { bytes_per_second: 2e9, transfer_seconds: 20e-6 },
                move_bytes_per_second: 5e9,
                memory_bytes_per_second: 10e9,
                operations_per_second: 1e11,
                launch_seconds: 0.5e-3,
                bytes_per_parameter: 2.0,
                disk_bytes_per_second: 2e9,
                devices_per_node: 1,
                load_share: 0.0,
            },
        ]
    }

    /// The profile of this name.
    pub fn named(name: &str) -> Option<Profile> {
        Self::all().into_iter().find(|profile| profile.name == name)
    }

    /// Seconds that a forward pass over `tokens` new tokens of a model of `weight_bytes` computes.
    pub fn prefill_seconds(&self, weight_bytes: u64, tokens: u64) -> f64 {
        let weights = weight_bytes as f64;
        let reading = weights / self.memory_bytes_per_second;
        let computing = 2.0 * weights / self.bytes_per_parameter * tokens as f64 / self.operations_per_second;
        self.launch_seconds + reading.hypot(computing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_l40_computes_as_measured() {
        let l40 = Profile::named("l40").unwrap();
        let (qwen14b, llama8b) = (29_540_067_328, 16_060_522_496);
        let measured = [
            (qwen14b, 128, 55.6),
            (qwen14b, 906, 230.9),
            (qwen14b, 1024, 228.0),
            (qwen14b, 4096, 926.0),
            (llama8b, 31, 27.8),
        ];
        for (bytes, tokens, milliseconds) in measured {
            let ours = l40.prefill_seconds(bytes, tokens) * 1e3;
            assert!(
                (ours / milliseconds - 1.0).abs() < 0.1,
                "{tokens} tokens: {ours} ms, measured {milliseconds}"
            );
        }
        assert!((l40.prefill_seconds(qwen14b, 1) * 1e3 / 42.5 - 1.0).abs() < 0.12);
        assert_eq!(Profile::named("abacus"), None);
    }
}
