//! The host agent: what `ostler` runs, and in [`foreign`] its parsers of foreign bytes.

mod bus;
mod chain;
pub mod cli;
pub mod config;
pub mod daemon;
mod engine;
pub mod foreign;
mod host;
mod instances;
mod log;
mod metrics;
mod quiet;
mod random;

pub use bus::{CLIENT_OFF, causes};
pub use chain::chain;
pub use log::{Graded as GradedLog, Out as LogOut, flush as flush_log, last_words};
pub use quiet::Quiet;

/// What this agent calls itself, on the bus too: its version and, where `make build` built it, the commit (`0.1.0+1a2b3c4`,
/// semantic versioning's build metadata).
pub const VERSION: &str = env!("OSTLER_VERSION");
