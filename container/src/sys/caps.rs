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
    /// What root of a container keeps, in its own user namespace, which is what Docker leaves by default but for `NET_RAW`
    /// (packet rings are memory on nobody's account):
    /// `CHOWN` 0, `DAC_OVERRIDE` 1, `FOWNER` 3, `FSETID` 4, `KILL` 5, `SETGID` 6, `SETUID` 7, `SETPCAP` 8,
    /// `NET_BIND_SERVICE` 10, `SYS_CHROOT` 18, `MKNOD` 27, `AUDIT_WRITE` 29, `SETFCAP` 31
    /// (linux/capability.h).
    pub const ROOT: Self = Self(0xa804_05fb);
    /// What the init of a container keeps: what it gives on, and `SYS_RESOURCE` 24, to change limits of jobs.
    pub const INIT: Self = Self(Self::ROOT.0 | 1 << 24);

    /// What is not in another one.
    #[must_use]
    pub fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
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

/// Takes these out of the bounding set; nothing executed later can get them back.
///
/// # Errors
/// `EPERM`: no `CAP_SETPCAP`.
pub fn unbound(these: Set) -> Result<()> {
    for capability in 0..64 {
        if these.0 >> capability & 1 == 0 {
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
    set(keep, keep, Set::NONE)
}

fn set(effective: Set, permitted: Set, inheritable: Set) -> Result<()> {
    let header = Header {
        version: VERSION,
        pid: 0,
    };
    let half = |set: Set, shift: u32| {
        let bits = set.0 >> shift & u64::from(u32::MAX);
        u32::try_from(bits).unwrap_or(0)
    };
    let data = [0, 32].map(|shift| Data {
        effective: half(effective, shift),
        permitted: half(permitted, shift),
        inheritable: half(inheritable, shift),
    });
    // SAFETY: capset(2) reads a header and, for this version, two data structures.
    let answer = unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) };
    Errno::result(answer).map(drop)
}

/// The sets of a process. The ambient one, the fifth, is never more than the inheritable one
/// (capabilities(7)): empty where that is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sets {
    /// What it has now.
    pub effective: Set,
    /// What it may have.
    pub permitted: Set,
    /// What it may keep over an `exec`, with a file that says so.
    pub inheritable: Set,
    /// What it can ever get.
    pub bounding: Set,
}

impl Sets {
    /// Those of a process that can have these and no more: after [`unbound`] and [`limit`].
    #[must_use]
    pub fn of(keep: Set) -> Self {
        Self {
            effective: keep,
            permitted: keep,
            inheritable: Set::NONE,
            bounding: keep,
        }
    }
}

/// The sets of this process.
///
/// # Errors
/// None is known.
pub fn held() -> Result<Sets> {
    let mut header = Header {
        version: VERSION,
        pid: 0,
    };
    let mut data = [Data::default(); 2];
    // SAFETY: capget(2) reads and writes a header and, for this version, writes two data structures.
    let answer = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) };
    Errno::result(answer)?;
    let [low, high] = data;
    let set = |half: fn(&Data) -> u32| Set(u64::from(half(&low)) | u64::from(half(&high)) << 32);
    Ok(Sets {
        effective: set(|half| half.effective),
        permitted: set(|half| half.permitted),
        inheritable: set(|half| half.inheritable),
        bounding: bounding()?,
    })
}

fn bounding() -> Result<Set> {
    let mut set = 0;
    for capability in 0..64 {
        // SAFETY: PR_CAPBSET_READ takes a number and touches no memory.
        let answer = unsafe { libc::prctl(libc::PR_CAPBSET_READ, capability, 0, 0, 0) };
        match Errno::result(answer) {
            Ok(1) => set |= 1 << capability,
            Ok(_) => {}
            // The kernel knows no more of them.
            Err(Errno::EINVAL) => break,
            Err(errno) => return Err(errno),
        }
    }
    Ok(Set(set))
}

#[cfg(test)]
mod tests {
    use super::{Set, Sets, held, limit, set, unbound};

    #[test]
    fn each_set_is_told_by_itself() {
        // Capabilities are a thread's own. CHOWN, KILL, SETPCAP, and SYSLOG of the upper half.
        let seen = std::thread::spawn(|| {
            let [chown, kill, setpcap, syslog] = [0, 5, 8, 34].map(|number| 1_u64 << number);
            let wanted = Sets {
                effective: Set(chown | setpcap),
                permitted: Set(chown | kill | setpcap | syslog),
                inheritable: Set(kill | syslog),
                bounding: Set(Set::ROOT.0 | syslog),
            };
            unbound(Set(u64::MAX).without(wanted.bounding)).unwrap();
            set(wanted.effective, wanted.permitted, wanted.inheritable).unwrap();
            assert_eq!(held(), Ok(wanted));
            limit(Set(chown)).unwrap();
            let limited = Sets {
                bounding: wanted.bounding,
                ..Sets::of(Set(chown))
            };
            assert_eq!(held(), Ok(limited));
        });
        seen.join().unwrap();
    }
}
