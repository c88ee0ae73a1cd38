//! The response headers that say where a request's time went.

use std::time::Duration;

use axum::http::{HeaderMap, HeaderValue};
use tangram_node::Timing;

/// Adds `Server-Timing` (milliseconds) and the byte counters. Streams leave out `decode`: it is not over yet.
pub(crate) fn add_timing(headers: &mut HeaderMap, timing: &Timing, with_decode: bool) {
    let entry = |name: &str, duration: Duration| format!("{name};dur={:.3}", duration.as_secs_f64() * 1000.0);
    let mut value =
        [entry("queue", timing.queue), entry("load", timing.load), entry("prefill", timing.prefill)]
            .join(", ");
    if with_decode {
        value = value + ", " + &entry("decode", timing.decode);
    }
    if let Ok(value) = HeaderValue::from_str(&value) {
        headers.insert("server-timing", value);
    }
    headers.insert("x-tangram-bytes-loaded", HeaderValue::from(timing.bytes_loaded));
    headers.insert("x-tangram-bytes-reused", HeaderValue::from(timing.bytes_reused));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn milliseconds_with_three_decimals() {
        let mut headers = HeaderMap::new();
        let timing = Timing {
            queue: Duration::from_micros(12),
            load: Duration::from_millis(1500),
            bytes_loaded: 7,
            ..Timing::default()
        };
        add_timing(&mut headers, &timing, true);
        assert_eq!(
            headers["server-timing"],
            "queue;dur=0.012, load;dur=1500.000, prefill;dur=0.000, decode;dur=0.000"
        );
        assert_eq!(headers["x-tangram-bytes-loaded"], "7");
        add_timing(&mut headers, &timing, false);
        assert_eq!(headers["server-timing"], "queue;dur=0.012, load;dur=1500.000, prefill;dur=0.000");
    }
}
