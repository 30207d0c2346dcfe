//! What a container is to be made of, and what its making says.
//!
//! The agent starts `wshd` with argv[0] `wshd: <handle>`, no environment, and these descriptors; the
//! conversation on the control socket (`SOCK_SEQPACKET`, one packet for each line):
//!
//! ```text
//! 3   control            wshd → agent  Cloned + [pidfd of the init, its network namespace]
//! 4   memfd of Launch    agent → wshd  GO, once the link is in that namespace
//! 5…  v1 `tasks` files   wshd → agent  Ready: the container serves; or Failed at any time
//!  …  v2 group directory
//!  …  mount of the writable layer's file system (last)
//! ```
//!
//! The process that was started ends with 0 after `Cloned` and must be reaped; the init is then a child
//! of the host's init. An init that fails at once may say so before `Cloned` comes; the first `Failed` is
//! the one that counts. A hang-up of the control socket before `GO` ends the init.

use crate::fault::SysError;
use crate::fields::{Malformed, Reader, Writer, memfd, read_memfd, u32_of, u64_of};
use std::ffi::OsStr;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// The descriptor of the control socket.
pub const CONTROL_FD: i32 = 3;
/// The descriptor of the [`Launch`] memory file.
pub const LAUNCH_FD: i32 = 4;
/// The first descriptor of the control groups.
pub const FIRST_GROUP_FD: i32 = 5;
/// What the agent says when the container's link is in its network namespace.
pub const GO: &[u8] = b"go";
/// A packet of the control socket is never longer.
pub const MAX_EVENT: usize = 512;

/// Whether the container may write to a bind mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// It may not.
    ReadOnly,
    /// It may, as far as file modes go.
    ReadWrite,
}

/// The user and group ids of a container: its 0…65535 are `first`… on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Ids {
    /// The host's number of the container's root.
    pub first: u32,
}

impl Ids {
    /// How many ids a container has.
    pub const COUNT: u32 = 65_536;
    /// By custom nobody: what has no number inside shows as it (`/proc/sys/kernel/overflowuid`).
    const NOBODY: u32 = 65_534;

    /// The host's number of an id of the container; nobody's for one that it does not have.
    #[must_use]
    pub fn on_host(self, id: u32) -> u32 {
        let id = if id < Self::COUNT { id } else { Self::NOBODY };
        self.first.saturating_add(id)
    }
}

/// A directory or file of the host that shows in the container (nosuid, nodev). Its owners are not mapped:
/// what belongs to no id of the container shows as nobody's, and its root has no right to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// On the host.
    pub source: PathBuf,
    /// In the container; symlinks are resolved inside its root, what is missing is created.
    pub target: PathBuf,
    /// Writable or not.
    pub access: Access,
}

/// The container's end of its link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its name inside, as the agent has made it: `eth0`.
    pub name: String,
    /// Its address.
    pub address: Ipv4Addr,
    /// Bits of its network.
    pub prefix: u8,
    /// Next hop of the default route.
    pub gateway: Ipv4Addr,
    /// Largest packet, in bytes; 0 leaves it as it is.
    pub mtu: u32,
}

/// The hardware addresses of a container's link: of the host's end, and of its own. The agent gives them, `wshd` knows
/// whom the container speaks to, and nobody has to ask. They are as good as random, as a handle is: apps make ids of
/// theirs. Addresses of one's own choice (IEEE 802c), which udev leaves alone (systemd.link(5), `MACAddressPolicy=`).
#[must_use]
pub fn hardware_addresses(handle: &str) -> [[u8; 6]; 2] {
    let digits = handle.chars().filter_map(|digit| digit.to_digit(32));
    let number = digits.fold(0_u64, |number, digit| number << 5 | u64::from(digit));
    let [.., a, b, c, d, e] = number.to_be_bytes();
    [[0x02, a, b, c, d, e], [0x12, a, b, c, d, e]]
}

/// A container's set-up.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Launch {
    /// Its handle, for the messages.
    pub handle: String,
    /// Its host name.
    pub hostname: String,
    /// An empty directory of the host: where the root is mounted, inside the container's own mount
    /// namespace only.
    pub root: PathBuf,
    /// Its users and groups.
    pub ids: Ids,
    /// Read-only directories of the root, uppermost first. Their owners are taken as ids of the container.
    pub lowers: Vec<PathBuf>,
    /// Where changes go.
    pub upper: PathBuf,
    /// Overlay's own directory, empty, on the file system of `upper`.
    pub work: PathBuf,
    /// Where the init listens: a path of the host, made by it with mode 0600.
    pub socket: PathBuf,
    /// Bind mounts, in their order.
    pub binds: Vec<Bind>,
    /// Its link; `None`: only `lo`.
    pub network: Option<Link>,
    /// Size of `/dev/shm` in bytes.
    pub tmpfs_bytes: u64,
    /// How many v1 `tasks` files follow from descriptor 5 on.
    pub v1_tasks: u32,
    /// Whether the directory of a v2 group follows them.
    pub v2_dir: bool,
    /// Whether a mount follows, at no place yet, that holds `upper` and `work` when it is put on the
    /// directory above them.
    pub disk: bool,
}

/// What `wshd` says on the control socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The init exists; its pidfd and network namespace come along.
    Cloned,
    /// It serves.
    Ready,
    /// It could not be made.
    Failed {
        /// The call and what it was about, 200 bytes at most.
        what: String,
        /// Why, as `errno`.
        errno: i32,
    },
}

mod tag {
    pub(super) const HANDLE: u16 = 1;
    pub(super) const HOSTNAME: u16 = 2;
    pub(super) const ROOT: u16 = 3;
    pub(super) const LOWER: u16 = 4;
    pub(super) const UPPER: u16 = 5;
    pub(super) const WORK: u16 = 6;
    pub(super) const SOCKET: u16 = 7;
    pub(super) const BIND: u16 = 8;
    pub(super) const LINK: u16 = 9;
    pub(super) const TMPFS: u16 = 10;
    pub(super) const V1_TASKS: u16 = 11;
    pub(super) const V2_DIR: u16 = 12;
    pub(super) const IDS: u16 = 13;
    pub(super) const DISK: u16 = 14;
    pub(super) const EVENT: u16 = 1;
    pub(super) const WHAT: u16 = 2;
    pub(super) const ERRNO: u16 = 3;
}

impl Launch {
    /// As framed fields.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let path = |path: &Path| path.as_os_str().as_bytes().to_vec();
        let mut fields = Writer::default()
            .put(tag::HANDLE, self.handle.as_bytes())
            .put(tag::HOSTNAME, self.hostname.as_bytes())
            .put(tag::ROOT, &path(&self.root))
            .put(tag::UPPER, &path(&self.upper))
            .put(tag::WORK, &path(&self.work))
            .put(tag::SOCKET, &path(&self.socket))
            .put(tag::TMPFS, &self.tmpfs_bytes.to_le_bytes())
            .put_u32(tag::V1_TASKS, self.v1_tasks)
            .put_u32(tag::V2_DIR, u32::from(self.v2_dir))
            .put_u32(tag::IDS, self.ids.first)
            .put_u32(tag::DISK, u32::from(self.disk));
        for lower in &self.lowers {
            fields = fields.put(tag::LOWER, &path(lower));
        }
        for bind in &self.binds {
            let access = u8::from(bind.access == Access::ReadOnly);
            let parts = [
                vec![access],
                path(&bind.source),
                vec![0],
                path(&bind.target),
            ];
            fields = fields.put(tag::BIND, &parts.concat());
        }
        if let Some(link) = &self.network {
            let [a, g] = [link.address.octets(), link.gateway.octets()];
            let parts = [&[link.prefix], &a[..], &g[..], &link.mtu.to_le_bytes()[..]];
            fields = fields.put(
                tag::LINK,
                &[parts.concat(), link.name.clone().into()].concat(),
            );
        }
        fields.finish()
    }

    /// Reads framed fields back.
    ///
    /// # Errors
    /// Anything that is not exactly one set-up.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes)?;
        let mut launch = Self::default();
        while let Some((tag, value)) = reader.field()? {
            match tag {
                tag::HANDLE => launch.handle = text(value)?,
                tag::HOSTNAME => launch.hostname = text(value)?,
                tag::ROOT => launch.root = path(value)?,
                tag::LOWER => launch.lowers.push(path(value)?),
                tag::UPPER => launch.upper = path(value)?,
                tag::WORK => launch.work = path(value)?,
                tag::SOCKET => launch.socket = path(value)?,
                tag::BIND => launch.binds.push(bind(value)?),
                tag::LINK => launch.network = Some(link(value)?),
                tag::TMPFS => launch.tmpfs_bytes = u64_of(value)?,
                tag::V1_TASKS => launch.v1_tasks = u32_of(value)?,
                tag::V2_DIR => launch.v2_dir = u32_of(value)? != 0,
                tag::IDS => launch.ids.first = u32_of(value)?,
                tag::DISK => launch.disk = u32_of(value)? != 0,
                _ => return Err(Malformed("an unknown field in a launch")),
            }
        }
        let needed = [&launch.root, &launch.upper, &launch.work, &launch.socket];
        if launch.lowers.is_empty() || needed.iter().any(|path| path.as_os_str().is_empty()) {
            return Err(Malformed("a launch lacks a directory"));
        }
        if launch.ids.first < Ids::COUNT || launch.ids.first.checked_add(Ids::COUNT).is_none() {
            // The host's own users are below.
            return Err(Malformed("a launch has no ids"));
        }
        Ok(launch)
    }

    /// As a sealed memory file.
    ///
    /// # Errors
    /// As [`memfd`].
    pub fn to_memfd(&self) -> Result<OwnedFd, SysError> {
        memfd(&self.encode(), "launch")
    }

    /// From a sealed memory file.
    ///
    /// # Errors
    /// As [`read_memfd`]; `EBADMSG` for a content that is no set-up.
    pub fn from_memfd(fd: impl AsFd) -> Result<Self, SysError> {
        Ok(Self::decode(&read_memfd(fd)?)?)
    }
}

impl Event {
    /// The packet's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let fields = Writer::default();
        match self {
            Self::Cloned => fields.put_u32(tag::EVENT, 1),
            Self::Ready => fields.put_u32(tag::EVENT, 2),
            Self::Failed { what, errno } => {
                let end = (0..=what.len().min(200))
                    .rev()
                    .find(|end| what.is_char_boundary(*end));
                let what = end.and_then(|end| what.get(..end)).unwrap_or_default();
                fields
                    .put_u32(tag::EVENT, 3)
                    .put(tag::WHAT, what.as_bytes())
                    .put_u32(tag::ERRNO, errno.cast_unsigned())
            }
        }
        .finish()
    }

    /// Reads a packet.
    ///
    /// # Errors
    /// Anything that is not exactly one event.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes)?;
        let (mut event, mut what, mut errno) = (0, String::new(), 0);
        while let Some((tag, value)) = reader.field()? {
            match tag {
                tag::EVENT => event = u32_of(value)?,
                tag::WHAT => what = text(value)?,
                tag::ERRNO => errno = u32_of(value)?.cast_signed(),
                _ => return Err(Malformed("an unknown field in an event")),
            }
        }
        match event {
            1 => Ok(Self::Cloned),
            2 => Ok(Self::Ready),
            3 => Ok(Self::Failed { what, errno }),
            _ => Err(Malformed("an unknown event")),
        }
    }
}

impl From<SysError> for Event {
    fn from(error: SysError) -> Self {
        let what = format!("{}({})", error.call, error.on);
        Self::Failed {
            what,
            errno: error.errno as i32,
        }
    }
}

fn text(value: &[u8]) -> Result<String, Malformed> {
    String::from_utf8(value.to_vec()).map_err(|_| Malformed("a name is not UTF-8"))
}

fn path(value: &[u8]) -> Result<PathBuf, Malformed> {
    if value.contains(&0) {
        return Err(Malformed("a zero byte inside a path"));
    }
    Ok(PathBuf::from(OsStr::from_bytes(value)))
}

fn bind(value: &[u8]) -> Result<Bind, Malformed> {
    let wrong = Malformed("a bind mount is not access, source, target");
    let (access, paths) = value.split_first().ok_or(wrong)?;
    let end = paths.iter().position(|byte| *byte == 0).ok_or(wrong)?;
    let (source, target) = paths.split_at_checked(end).ok_or(wrong)?;
    let target = target.get(1..).ok_or(wrong)?;
    let access = if *access == 0 {
        Access::ReadWrite
    } else {
        Access::ReadOnly
    };
    Ok(Bind {
        source: path(source)?,
        target: path(target)?,
        access,
    })
}

fn link(value: &[u8]) -> Result<Link, Malformed> {
    let wrong = Malformed("a link is not prefix, address, gateway, mtu, name");
    let ([prefix], rest) = value.split_first_chunk::<1>().ok_or(wrong)?;
    let (address, rest) = rest.split_first_chunk::<4>().ok_or(wrong)?;
    let (gateway, rest) = rest.split_first_chunk::<4>().ok_or(wrong)?;
    let (mtu, name) = rest.split_first_chunk::<4>().ok_or(wrong)?;
    if *prefix > 32 || name.is_empty() || name.len() > 15 {
        return Err(wrong);
    }
    Ok(Link {
        name: text(name)?,
        address: Ipv4Addr::from(*address),
        prefix: *prefix,
        gateway: Ipv4Addr::from(*gateway),
        mtu: u32::from_le_bytes(*mtu),
    })
}

#[cfg(test)]
mod tests {
    use super::{Access, Bind, Event, Ids, Launch, Link, MAX_EVENT, hardware_addresses};
    use crate::fields::{Malformed, Writer};
    use std::net::Ipv4Addr;

    fn small() -> Launch {
        Launch {
            handle: "178l4d6v637".to_owned(),
            ids: Ids { first: 1 << 30 },
            hostname: "app".to_owned(),
            root: "/c/root".into(),
            lowers: vec!["/layers/a:b,c".into(), "/stack".into()],
            upper: "/c/upper".into(),
            work: "/c/work".into(),
            socket: "/c/run/wshd.sock".into(),
            ..Launch::default()
        }
    }

    #[test]
    fn a_launch_comes_back_as_it_was() {
        let mut full = small();
        full.binds = [Access::ReadOnly, Access::ReadWrite]
            .map(|access| Bind {
                source: "/a b".into(),
                target: "/home/x".into(),
                access,
            })
            .to_vec();
        full.network = Some(Link {
            name: "eth0".to_owned(),
            address: Ipv4Addr::new(10, 254, 0, 2),
            prefix: 30,
            gateway: Ipv4Addr::new(10, 254, 0, 1),
            mtu: 1450,
        });
        (full.tmpfs_bytes, full.v1_tasks, full.v2_dir) = (1 << 40, 6, true);
        full.disk = true;
        for launch in [small(), full] {
            assert_eq!(Launch::decode(&launch.encode()), Ok(launch));
        }
    }

    #[test]
    fn hardware_addresses_are_of_ones_own_choice_and_differ_as_handles_do() {
        let all = ["178l4d6v637", "178l4d6v638", "178m4d6v637", ""].map(hardware_addresses);
        assert_eq!(
            all[0],
            [
                [0x02, 0xa9, 0x1a, 0x6f, 0x98, 0x67],
                [0x12, 0xa9, 0x1a, 0x6f, 0x98, 0x67]
            ]
        );
        let all = all.concat();
        assert!(all.iter().all(|one| one[0] & 3 == 2), "{all:?}");
        let different: std::collections::BTreeSet<_> = all.iter().collect();
        assert_eq!(different.len(), all.len());
    }

    #[test]
    fn root_of_the_container_is_no_user_of_the_host() {
        for first in [0, 1000, 65_535, u32::MAX - 65_534] {
            let launch = Launch {
                ids: Ids { first },
                ..small()
            };
            let refused = Launch::decode(&launch.encode()).unwrap_err();
            assert_eq!(refused, Malformed("a launch has no ids"), "{first}");
        }
        let ids = Ids { first: 1 << 30 };
        assert_eq!(ids.on_host(0), 1 << 30);
        assert_eq!(ids.on_host(70_000), ids.on_host(65_534));
    }

    #[test]
    fn half_a_launch_is_refused() {
        let nothing = Launch::decode(&Writer::default().finish()).unwrap_err();
        assert_eq!(nothing, Malformed("a launch lacks a directory"));
        let refused = |tag, value: &[u8]| {
            Launch::decode(&Writer::default().put(tag, value).finish()).unwrap_err()
        };
        assert_eq!(
            refused(8, b"\x01/only"),
            Malformed("a bind mount is not access, source, target")
        );
        let wrong = Malformed("a link is not prefix, address, gateway, mtu, name");
        assert_eq!(refused(9, &[33; 20]), wrong);
        assert_eq!(refused(9, &[24; 13]), wrong);
    }

    #[test]
    fn events_come_back_and_long_ones_are_cut_between_characters() {
        for event in [Event::Cloned, Event::Ready] {
            assert_eq!(Event::decode(&event.encode()), Ok(event));
        }
        let event = Event::Failed {
            what: "é".repeat(400),
            errno: 22,
        };
        let bytes = event.encode();
        assert!(bytes.len() <= MAX_EVENT);
        let cut = Event::Failed {
            what: "é".repeat(100),
            errno: 22,
        };
        assert_eq!(Event::decode(&bytes), Ok(cut));
    }
}
