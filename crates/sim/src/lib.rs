//! Discrete-event simulator: virtual devices, links and hosts, real traces, and the published systems beside ours.
//!
//! It drives the same `tangram_policy` code as the live node, so what it measures of retention, packing, placement and
//! prefetching is what the node would do. It must never take a decision of ours itself, and never depend on the
//! machine that it runs on: the same scenario and seed give the same event log, byte for byte.
//!
//! What it leaves out: batching of several requests on a device (one runs at a time), the cost of chunking prefill,
//! attention's quadratic part, and engine start-up, which no system here pays.

pub mod chart;
mod device;
mod economy;
mod layout;
mod mckp;
pub mod model;
pub mod profile;
pub mod report;
pub mod rng;
pub mod system;
pub mod trace;
pub mod workload;
mod world;

pub use model::Model;
pub use profile::Profile;
pub use report::{Recorded, Summary, table};
pub use system::System;
pub use trace::Request;
pub use workload::{Pattern, generate};
pub use world::{Scenario, run};
