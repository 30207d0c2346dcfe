//! The container's network, by rtnetlink(7): interfaces up, address, neighbour, default route.
//!
//! The kernel has one table of link neighbours for all network namespaces, for IPv4 and for IPv6 (arp(7),
//! net/core/neighbour.c). Whom an app sends to on its own link without a router (`MSG_DONTROUTE`, `SO_DONTROUTE`) becomes an
//! entry there, as many as it likes; while the kernel asks for each of them (`NUD_INCOMPLETE`, some seconds) none can be
//! dropped, and a full table takes no neighbour of anybody's. On a link without ARP nobody is asked for: such an
//! entry (`NUD_NOARP`) goes as soon as room is wanted. So the one neighbour there is, the host, is told to the kernel
//! (`NUD_PERMANENT`, which is in nobody's way). IPv6 is off: there is nobody to speak it with.

use super::measure::Measure;
use crate::fault::{Context, SysError};
use crate::launch::{Link, hardware_addresses};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::libc;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};
use nix::sys::stat::Mode;
use nix::unistd::write;
use std::os::fd::{AsRawFd, OwnedFd};

/// Sees to it that links that come from here on have no IPv6; `lo`, which is there already, keeps its own. While the
/// host's `/proc` is there: the container's cannot be written.
pub(super) fn leave_out_ipv6() -> Result<(), SysError> {
    let path = "/proc/sys/net/ipv6/conf/default/disable_ipv6";
    if !Measure::Neighbours.holds() {
        return Ok(());
    }
    match std::fs::read(path) {
        // A kernel without IPv6 has nothing to leave out.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        // In a container that was set up so beforehand it may be read-only.
        Ok(value) if value.starts_with(b"1") => return Ok(()),
        Ok(_) | Err(_) => {}
    }
    let file =
        open(path, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty()).context("open", path)?;
    write(&file, b"1").context("write", path).map(drop)
}

/// Brings `lo` up, and the link with its address, its neighbour and default route if there is one.
pub(super) fn configure(handle: &str, link: Option<&Link>) -> Result<(), SysError> {
    let kind = SockType::Raw;
    let netlink = socket(
        AddressFamily::Netlink,
        kind,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )
    .context("socket", "AF_NETLINK")?;
    ask(&netlink, &up(index("lo")?, IFF_UP, 0), "lo up")?;
    let Some(link) = link else { return Ok(()) };
    let index = index(&link.name)?;
    ask(
        &netlink,
        &address(index, link),
        &format!("address {}/{}", link.address, link.prefix),
    )?;
    let fixed = Measure::Neighbours.holds();
    ask(
        &netlink,
        &up(
            index,
            if fixed { IFF_UP | IFF_NOARP } else { IFF_UP },
            link.mtu,
        ),
        &format!("{} up, mtu {}", link.name, link.mtu),
    )?;
    if fixed {
        ask(
            &netlink,
            &neighbour(index, handle, link),
            &format!("neighbour {}", link.gateway),
        )?;
    }
    ask(
        &netlink,
        &default_route(index, link),
        &format!("default route by {}", link.gateway),
    )
}

fn index(name: &str) -> Result<u32, SysError> {
    if_nametoindex(name).context("if_nametoindex", name)
}

const IFF_UP: u32 = 1;
const IFF_NOARP: u32 = 1 << 7;

/// `RTM_NEWLINK` with `struct ifinfomsg`: flags to be set, and the MTU unless it is 0.
fn up(index: u32, flags: u32, mtu: u32) -> Vec<u8> {
    let mut message = header(libc::RTM_NEWLINK, 0);
    message.extend([0, 0, 0, 0]);
    message.extend([index, flags, flags].map(u32::to_ne_bytes).concat());
    if mtu > 0 {
        attribute(&mut message, libc::IFLA_MTU, &mtu.to_ne_bytes());
    }
    finish(message)
}

/// `RTM_NEWADDR` with `struct ifaddrmsg`.
fn address(index: u32, link: &Link) -> Vec<u8> {
    let mut message = header(libc::RTM_NEWADDR, create());
    message.extend([INET, link.prefix, 0, libc::RT_SCOPE_UNIVERSE]);
    message.extend(index.to_ne_bytes());
    attribute(&mut message, libc::IFA_LOCAL, &link.address.octets());
    attribute(&mut message, libc::IFA_ADDRESS, &link.address.octets());
    finish(message)
}

/// `RTM_NEWNEIGH` with `struct ndmsg`: the host's end, for ever. After the link is up: a change of its flags forgets
/// them all.
fn neighbour(index: u32, handle: &str, link: &Link) -> Vec<u8> {
    const NUD_PERMANENT: u16 = 0x80;
    let [host, _] = hardware_addresses(handle);
    let mut message = header(libc::RTM_NEWNEIGH, create());
    message.extend([INET, 0, 0, 0]);
    message.extend(index.to_ne_bytes());
    message.extend(NUD_PERMANENT.to_ne_bytes());
    message.extend([0, 0]);
    attribute(&mut message, libc::NDA_DST, &link.gateway.octets());
    attribute(&mut message, libc::NDA_LLADDR, &host);
    finish(message)
}

/// `RTM_NEWROUTE` with `struct rtmsg`.
fn default_route(index: u32, link: &Link) -> Vec<u8> {
    let mut message = header(libc::RTM_NEWROUTE, create());
    let (table, boot) = (libc::RT_TABLE_MAIN, libc::RTPROT_BOOT);
    message.extend([
        INET,
        0,
        0,
        0,
        table,
        boot,
        libc::RT_SCOPE_UNIVERSE,
        libc::RTN_UNICAST,
    ]);
    message.extend([0, 0, 0, 0]);
    attribute(&mut message, libc::RTA_GATEWAY, &link.gateway.octets());
    attribute(&mut message, libc::RTA_OIF, &index.to_ne_bytes());
    finish(message)
}

/// `AF_INET` as the one byte that the messages have for it.
const INET: u8 = 2;

fn create() -> u16 {
    flag(libc::NLM_F_CREATE | libc::NLM_F_EXCL)
}

fn flag(flags: libc::c_int) -> u16 {
    u16::try_from(flags).unwrap_or(0)
}

/// `struct nlmsghdr` with its length still to be filled in.
fn header(kind: u16, flags: u16) -> Vec<u8> {
    let flags = flags | flag(libc::NLM_F_REQUEST | libc::NLM_F_ACK);
    let mut message = vec![0; 4];
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend([0; 8]);
    message
}

/// `struct rtattr` and its value, padded to four bytes.
fn attribute(message: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(value);
    message.resize(message.len().next_multiple_of(4), 0);
}

fn finish(mut message: Vec<u8>) -> Vec<u8> {
    let length = u32::try_from(message.len())
        .unwrap_or(u32::MAX)
        .to_ne_bytes();
    message
        .iter_mut()
        .zip(length)
        .for_each(|(to, from)| *to = from);
    message
}

/// Sends one request and takes its acknowledgement: `struct nlmsgerr` behind the header.
fn ask(netlink: &OwnedFd, message: &[u8], what: &str) -> Result<(), SysError> {
    send(netlink.as_raw_fd(), message, MsgFlags::empty()).context("rtnetlink", what)?;
    let mut answer = [0; 4096];
    let length = recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty());
    let length = length.context("rtnetlink", what)?;
    let error = answer.get(..length).and_then(|answer| answer.get(16..20));
    let error = error
        .and_then(|bytes| bytes.try_into().ok())
        .map(i32::from_ne_bytes);
    match error {
        Some(0) => Ok(()),
        Some(errno) => Err(Errno::from_raw(-errno)).context("rtnetlink", what),
        None => Err(Errno::EBADMSG).context("rtnetlink", what),
    }
}

#[cfg(test)]
mod tests {
    use super::configure;
    use crate::launch::Link;
    use nix::sched::{CloneFlags, unshare};
    use std::net::Ipv4Addr;

    const HANDLE: &str = "178l4d6v637";

    /// A link to nowhere is enough: `lo` under another address in a namespace of this test's own.
    #[test]
    fn a_link_gets_its_address_and_its_route() {
        let routes = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let link = Link {
                name: "lo".to_owned(),
                address: Ipv4Addr::new(10, 254, 7, 2),
                prefix: 30,
                gateway: Ipv4Addr::new(10, 254, 7, 1),
                mtu: 1400,
            };
            configure(HANDLE, Some(&link)).unwrap();
            let again = configure(HANDLE, Some(&link)).unwrap_err();
            let absent = Link {
                name: "none".to_owned(),
                ..link
            };
            let absent = configure(HANDLE, Some(&absent)).unwrap_err();
            let routes = std::fs::read_to_string("/proc/thread-self/net/route").unwrap();
            (routes, again.to_string(), absent.to_string())
        });
        let (routes, again, absent) = routes.join().unwrap();
        let default = routes
            .lines()
            .find(|line| line.starts_with("lo\t00000000\t0107FE0A"));
        assert!(default.is_some(), "{routes}");
        assert!(
            again.contains("address 10.254.7.2/30") && again.contains("EEXIST"),
            "{again}"
        );
        assert!(
            absent.starts_with("if_nametoindex(none): ENODEV"),
            "{absent}"
        );
    }
}
