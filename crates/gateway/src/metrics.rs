//! Prometheus metrics. Labels take values from deployed models and from fixed sets only, so their number is bounded.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use tangram_node::{DeviceStatus, ModelStatus, Node, Timing};

use crate::process::ProcessStatus;

/// The content type of [`Metrics::encode`].
pub(crate) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Upper bounds in seconds: an activation takes microseconds, a cold load seconds.
const SECONDS: [f64; 18] = [
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
    30.0, 120.0,
];

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RequestLabels {
    endpoint: &'static str,
    model: String,
    status: u32,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct DeviceLabels {
    device: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ModelLabels {
    model: String,
}

type Histograms = Family<ModelLabels, Histogram, fn() -> Histogram>;
type Counters = Family<ModelLabels, Counter>;

/// What the gateway counts, and the node's figures at the time of the scrape.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    queue: Histograms,
    load: Histograms,
    prefill: Histograms,
    decode: Histograms,
    first_token: Histograms,
    prompt_tokens: Counters,
    generated_tokens: Counters,
    bytes_loaded: Counters,
    bytes_reused: Counters,
}

impl Metrics {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        let mut registry = Registry::with_prefix("tangram");
        let requests = Family::<RequestLabels, Counter>::default();
        registry.register("requests", "HTTP requests by endpoint, model and status", requests.clone());
        let mut histogram = |name: &str, help: &str| {
            let family: Histograms = Family::new_with_constructor(|| Histogram::new(SECONDS));
            registry.register_with_unit(name, help, Unit::Seconds, family.clone());
            family
        };
        let queue = histogram("request_queue", "Time from submission to admission");
        let load = histogram("request_load", "Time from admission until all weights were there");
        let prefill = histogram("request_prefill", "Time to process the prompt, without waiting for weights");
        let decode = histogram("request_decode", "Time from the first token to the last");
        let first_token =
            histogram("request_first_token", "Time from submission to the first token or embedding");
        let mut counter = |name: &str, help: &str| {
            let family = Counters::default();
            registry.register(name, help, family.clone());
            family
        };
        let prompt_tokens = counter("prompt_tokens", "Tokens of prompts and embedding inputs");
        let generated_tokens = counter("generated_tokens", "Tokens generated");
        let bytes_loaded = counter("request_bytes_loaded", "Weight bytes that requests brought in");
        let bytes_reused = counter("request_bytes_reused", "Weight bytes that requests found resident");
        registry.register_collector(Box::new(NodeCollector(node)));
        Metrics {
            registry,
            requests,
            queue,
            load,
            prefill,
            decode,
            first_token,
            prompt_tokens,
            generated_tokens,
            bytes_loaded,
            bytes_reused,
        }
    }

    /// Counts a request. `model` is empty unless it is a deployed one.
    pub(crate) fn count_request(&self, endpoint: &'static str, model: &str, status: u16) {
        let labels = RequestLabels { endpoint, model: model.to_owned(), status: status.into() };
        self.requests.get_or_create(&labels).inc();
    }

    /// Counts a request's tokens.
    pub(crate) fn observe_tokens(&self, model: &str, prompt: usize, generated: usize) {
        let labels = ModelLabels { model: model.to_owned() };
        self.prompt_tokens.get_or_create(&labels).inc_by(prompt as u64);
        self.generated_tokens.get_or_create(&labels).inc_by(generated as u64);
    }

    /// Counts where a generation's or embedding's time went. `decoded` says whether the decode phase came to its end.
    pub(crate) fn observe_timing(&self, model: &str, timing: &Timing, decoded: bool) {
        let labels = ModelLabels { model: model.to_owned() };
        self.queue.get_or_create(&labels).observe(timing.queue.as_secs_f64());
        self.load.get_or_create(&labels).observe(timing.load.as_secs_f64());
        self.prefill.get_or_create(&labels).observe(timing.prefill.as_secs_f64());
        self.first_token.get_or_create(&labels).observe(timing.first_token.as_secs_f64());
        if decoded {
            self.decode.get_or_create(&labels).observe(timing.decode.as_secs_f64());
        }
        self.bytes_loaded.get_or_create(&labels).inc_by(timing.bytes_loaded);
        self.bytes_reused.get_or_create(&labels).inc_by(timing.bytes_reused);
    }

    /// The exposition in OpenMetrics text.
    pub(crate) fn encode(&self) -> Result<String, fmt::Error> {
        let mut out = String::new();
        text::encode(&mut out, &self.registry)?;
        Ok(out)
    }
}

/// Reads the node's figures when asked for.
struct NodeCollector(Arc<Node>);

impl fmt::Debug for NodeCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NodeCollector")
    }
}

impl Collector for NodeCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let status = self.0.status();
        let gauges = [
            ("pool_bytes", "Bytes of the pool", status.pool_bytes),
            ("pool_free_bytes", "Bytes of the pool that are free", status.free_bytes),
            ("pool_resident_bytes", "Bytes of resident tensors", status.resident_bytes),
            ("pool_leased_bytes", "Bytes of resident tensors held by running requests", status.leased_bytes),
            ("pool_kv_bytes", "Bytes of KV blocks in use", status.kv_bytes),
            ("kv_blocks", "KV blocks in use", status.kv_blocks),
            ("kv_cached_bytes", "Bytes of KV kept as cached prefixes", status.kv_cached_bytes),
            ("host_kv_bytes", "Bytes of preempted sequences' KV in host memory", status.host_kv_bytes),
            ("host_tier_bytes", "Bytes of host memory for copies of weights", status.host_tier_bytes),
            ("host_weight_bytes", "Bytes of it that are taken", status.host_weight_bytes),
            ("host_tensors", "Tensors of which host memory has a copy", status.host_tensors),
            ("sequences_running", "Sequences running", status.running as u64),
            ("requests_waiting", "Requests waiting for admission", status.waiting as u64),
        ];
        let process = ProcessStatus::read(status.pool_taken_bytes).map(|process| {
            [
                ("process_resident_bytes", "Bytes of the process in memory", process.resident_bytes),
                ("process_private_bytes", "Bytes of heap and stacks in memory", process.private_bytes),
                ("process_open_files", "Open files, sockets included", process.open_files),
                ("process_threads", "Threads of the process", process.threads),
            ]
        });
        for (name, help, value) in gauges.into_iter().chain(process.into_iter().flatten()) {
            let gauge = ConstGauge::<u64>::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        let counters = [
            ("bytes_loaded", "Weight bytes brought in for requests", status.bytes_loaded_total),
            ("bytes_prefetched", "Weight bytes brought in before a request", status.bytes_prefetched_total),
            ("bytes_from_host", "Weight bytes brought in from host memory", status.bytes_from_host_total),
            ("bytes_reused", "Weight bytes found resident by activations", status.bytes_reused_total),
            ("bytes_evicted", "Weight bytes evicted", status.bytes_evicted_total),
            ("bytes_moved", "Bytes moved inside the device to make room", status.bytes_moved_total),
            ("preemptions", "Sequences whose KV was taken", status.preemptions_total),
            ("swaps", "Preempted sequences whose KV was copied to host memory", status.swaps_total),
            ("cached_tokens", "Prompt tokens found in cached prefixes", status.cached_tokens_total),
            ("activations", "Models activated", status.activations_total),
            ("replayed_steps", "Decode steps replayed from a CUDA graph", status.replayed_steps_total),
            ("copied_rows", "Rows of logits copied from a GPU", status.copied_rows_total),
            ("device_rebuilds", "Times that a lost device was set up anew", status.device_rebuilds_total),
        ];
        for (name, help, value) in counters {
            let counter = ConstCounter::<u64>::new(value);
            counter.encode(encoder.encode_descriptor(name, help, None, MetricType::Counter)?)?;
        }
        encode_devices(&mut encoder, &status.devices)?;
        let models = self.0.list();
        type Value = fn(&ModelStatus) -> u64;
        let per_model: [(&str, &str, Value); 4] = [
            ("model_weight_bytes", "Bytes of a model's weights", |model| model.weight_bytes),
            ("model_resident_bytes", "Bytes of a model's weights in device memory", |model| {
                model.resident_bytes
            }),
            ("model_running", "Sequences of a model running", |model| model.running as u64),
            ("model_waiting", "Requests for a model waiting", |model| model.waiting as u64),
        ];
        for (name, help, value) in per_model {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for model in &models {
                let gauge = ConstGauge::<u64>::new(value(model));
                gauge.encode(family.encode_family(&ModelLabels { model: model.name.clone() })?)?;
            }
        }
        Ok(())
    }
}

/// What each of several devices is like; the figures of the node are their sums.
fn encode_devices(encoder: &mut DescriptorEncoder<'_>, devices: &[DeviceStatus]) -> Result<(), fmt::Error> {
    type Value = fn(&DeviceStatus) -> u64;
    let per_device: [(&str, &str, Value); 6] = [
        ("device_pool_bytes", "Bytes of a device's pool", |device| device.pool_bytes),
        ("device_free_bytes", "Bytes of a device's pool that are free", |device| device.free_bytes),
        ("device_resident_bytes", "Bytes of resident tensors on a device", |device| device.resident_bytes),
        ("device_running", "Sequences running on a device", |device| device.running as u64),
        ("device_waiting", "Requests waiting for a device", |device| device.waiting as u64),
        ("device_lost", "Whether a device is lost", |device| u64::from(device.lost)),
    ];
    for (name, help, value) in per_device.into_iter().filter(|_| !devices.is_empty()) {
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for device in devices {
            // `cuda:0`, without the kind of GPU that follows.
            let label = device.device.split(' ').next().unwrap_or_default().to_owned();
            let gauge = ConstGauge::<u64>::new(value(device));
            gauge.encode(family.encode_family(&DeviceLabels { device: label })?)?;
        }
    }
    Ok(())
}
