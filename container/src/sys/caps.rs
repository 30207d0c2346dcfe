//! Capabilities (capabilities(7)).

use nix::Result;
use nix::errno::Errno;
use nix::libc;

/// A set of capabilities: bit n is capability n.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Set(pub u64);

impl Set {
    /// None at all: what applications get.
    pub const NONE: Self = Self(0);
    /// What root of a container keeps: `CHOWN` 0, `DAC_OVERRIDE` 1, `FOWNER` 3, `FSETID` 4, `KILL` 5,
    /// `SETGID` 6, `SETUID` 7, `NET_BIND_SERVICE` 10 (linux/capability.h).
    pub const ROOT: Self = Self(0b100_1111_1011);
}

#[repr(C)]
struct Header {
    version: u32,
    pid: libc::c_int,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// `_LINUX_CAPABILITY_VERSION_3`: two [`Data`], low half first.
const VERSION: u32 = 0x2008_0522;

/// Takes everything but `keep` out of the bounding set; nothing executed later can get it back.
///
/// # Errors
/// `EPERM`: no `CAP_SETPCAP`.
pub fn bound(keep: Set) -> Result<()> {
    for capability in 0..64 {
        if keep.0 >> capability & 1 == 1 {
            continue;
        }
        // SAFETY: PR_CAPBSET_DROP takes a number and touches no memory.
        let answer = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        match Errno::result(answer) {
            // The kernel knows no more of them.
            Err(Errno::EINVAL) => break,
            other => other.map(drop)?,
        }
    }
    Ok(())
}

/// Makes `keep` the permitted and effective set, and empties the inheritable and ambient ones.
///
/// # Errors
/// `EPERM`: `keep` is not within the permitted set.
pub fn limit(keep: Set) -> Result<()> {
    let ambient = libc::PR_CAP_AMBIENT;
    // SAFETY: PR_CAP_AMBIENT_CLEAR_ALL takes no further argument and touches no memory.
    let answer = unsafe { libc::prctl(ambient, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) };
    Errno::result(answer)?;
    let header = Header {
        version: VERSION,
        pid: 0,
    };
    let half = |bits: u64| {
        let bits = u32::try_from(bits & u64::from(u32::MAX)).unwrap_or(0);
        Data {
            effective: bits,
            permitted: bits,
            inheritable: 0,
        }
    };
    let data = [half(keep.0), half(keep.0 >> 32)];
    // SAFETY: capset(2) reads a header and, for this version, two data structures.
    let answer = unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) };
    Errno::result(answer).map(drop)
}

/// The permitted set of this process, united with the effective and inheritable ones.
///
/// # Errors
/// None is known.
pub fn held() -> Result<Set> {
    let mut header = Header {
        version: VERSION,
        pid: 0,
    };
    let mut data = [Data::default(); 2];
    // SAFETY: capget(2) reads and writes a header and, for this version, writes two data structures.
    let answer = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) };
    Errno::result(answer)?;
    let [low, high] =
        data.map(|half| u64::from(half.effective | half.permitted | half.inheritable));
    Ok(Set(low | high << 32))
}
