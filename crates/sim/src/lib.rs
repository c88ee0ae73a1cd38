//! Discrete-event simulator: virtual devices, links and hosts, real traces, and the published systems beside ours.
//!
//! Ours is driven by `tangram_policy` and nothing else, the crate that decides in the live node. This crate must never take a decision of ours itself, and never depend on
//! how fast or busy the machine is: the same scenario and seed give the same event log, byte for byte. (Logarithms and
//! powers are the platform's, so another platform may differ in a last digit, and then in a decision.)
//!
//! What it leaves out: batching of several requests on a device (one runs at a time), the cost of chunking prefill,
//! attention's quadratic part, and engine start-up, which no system here pays.

pub mod chart;
mod device;
mod economy;
mod host;
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
