//! The fence: the kernel's calls that `nix` does not make safe, one file for each family.
//!
//! Everything here is a thin, safe function; errors are [`SysError`](crate::fault::SysError) or the
//! bare errno where the caller knows the argument better.
#![allow(
    unsafe_code,
    reason = "the one room with unsafe; every block names its precondition"
)]

pub mod bpf;
pub mod caps;
pub mod clone;
pub mod fdpass;
pub mod inherit;
pub mod interrupt;
pub mod mount;
pub mod pidfd;
pub mod pipe;
pub mod process;
pub mod quota;
pub mod seccomp;
pub mod terminal;
pub mod volume;
