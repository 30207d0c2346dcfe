//! The container's network, by rtnetlink(7): interfaces up, address, default route.

use crate::fault::{Context, SysError};
use crate::launch::Link;
use nix::errno::Errno;
use nix::libc;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};
use std::os::fd::{AsRawFd, OwnedFd};

/// Brings `lo` up, and the link with its address and default route if there is one.
pub(super) fn configure(link: Option<&Link>) -> Result<(), SysError> {
    let kind = SockType::Raw;
    let netlink = socket(
        AddressFamily::Netlink,
        kind,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )
    .context("socket", "AF_NETLINK")?;
    ask(&netlink, &up(index("lo")?, 0), "lo up")?;
    let Some(link) = link else { return Ok(()) };
    let index = index(&link.name)?;
    ask(
        &netlink,
        &address(index, link),
        &format!("address {}/{}", link.address, link.prefix),
    )?;
    ask(
        &netlink,
        &up(index, link.mtu),
        &format!("{} up, mtu {}", link.name, link.mtu),
    )?;
    ask(
        &netlink,
        &default_route(index, link),
        &format!("default route by {}", link.gateway),
    )
}

fn index(name: &str) -> Result<u32, SysError> {
    if_nametoindex(name).context("if_nametoindex", name)
}

/// `RTM_NEWLINK` with `struct ifinfomsg`: flag `IFF_UP`, and the MTU unless it is 0.
fn up(index: u32, mtu: u32) -> Vec<u8> {
    const IFF_UP: u32 = 1;
    let mut message = header(libc::RTM_NEWLINK, 0);
    message.extend([0, 0, 0, 0]);
    message.extend([index, IFF_UP, IFF_UP].map(u32::to_ne_bytes).concat());
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
            configure(Some(&link)).unwrap();
            let again = configure(Some(&link)).unwrap_err();
            let absent = Link {
                name: "none".to_owned(),
                ..link
            };
            let absent = configure(Some(&absent)).unwrap_err();
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
