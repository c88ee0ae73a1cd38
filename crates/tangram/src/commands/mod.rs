//! One file per command.

pub(crate) mod bench;
pub(crate) mod models;
pub(crate) mod quickstart;
pub(crate) mod run;
pub(crate) mod serve;
pub(crate) mod sim;
