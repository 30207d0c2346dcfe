//! The wall: what runs inside or beside a container, and what both sides agree on.
//!
//! Five programs (`wshd`, `wsh`, `iomux-spawn`, `iomux-link`, `oom`), each a `main` in this library.
//! No runtime, no threads, no JSON, no NATS; `nix` is the only dependency, and `sys` the only room with
//! `unsafe`.

pub mod client;
pub mod copy;
pub mod exit;
pub mod fault;
pub mod fields;
pub mod frames;
mod hangup;
pub mod iomux_link;
pub mod iomux_spawn;
pub mod job;
pub mod launch;
pub mod oom;
pub mod request;
pub mod spool;
pub mod stamp;
pub mod status;
pub mod sys;
pub mod wsh;
pub mod wshd;
