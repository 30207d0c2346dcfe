//! The wall: what runs inside or beside a container, and what both sides agree on.
//!
//! Five programs (`wshd`, `wsh`, `iomux-spawn`, `iomux-link`, `oom`), each a `main` in this library.
//! No runtime, no threads, no JSON, no NATS; `nix` is the only dependency, and `sys` the only room with
//! `unsafe`.

pub mod fault;
pub mod status;
pub mod client;
pub mod fields;
pub mod job;
pub mod request;
pub mod sys;
pub mod launch;
pub mod exit;
pub mod frames;
pub mod spool;
pub mod wshd;
pub mod iomux_spawn;
pub mod wsh;
pub mod iomux_link;
pub mod oom;
mod hangup;
