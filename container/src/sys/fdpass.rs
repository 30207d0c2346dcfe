//! Packets with descriptors over a unix socket (`SOCK_SEQPACKET`).

use nix::Result;
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{ControlMessage, MsgFlags, SockFlag, UnixAddr, sendmsg};
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Most descriptors of one packet (`SCM_MAX_FD`). The receive buffer always has room for as many, so
/// the kernel never installs a descriptor that we do not hear of.
const MAX_FDS: usize = 253;

/// A received packet.
#[derive(Debug)]
pub struct Packet {
    /// Bytes of the buffer that were filled; 0: the peer is gone.
    pub length: usize,
    /// The descriptors that came along, close-on-exec.
    pub fds: Vec<OwnedFd>,
}

/// Sends one packet with descriptors; never raises `SIGPIPE`.
///
/// # Errors
/// As `sendmsg(2)`: `EPIPE`, the peer is gone; `EAGAIN`, its queue is full.
pub fn send(
    socket: impl AsFd,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
    flags: MsgFlags,
) -> Result<()> {
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    let flags = flags | MsgFlags::MSG_NOSIGNAL;
    let socket = socket.as_fd().as_raw_fd();
    loop {
        match sendmsg::<UnixAddr>(socket, &[IoSlice::new(bytes)], control, flags, None) {
            Err(Errno::EINTR) => {}
            other => return other.map(drop),
        }
    }
}

/// Receives one packet. (nix's own forgets the descriptors of a packet that did not fit whole.)
///
/// # Errors
/// As `recvmsg(2)`. `EMSGSIZE`: the packet is longer than `buffer`, or we have no numbers left for its
/// descriptors; it is lost with them.
pub fn receive(socket: impl AsFd, buffer: &mut [u8], flags: MsgFlags) -> Result<Packet> {
    let socket = socket.as_fd().as_raw_fd();
    let flags = (flags | MsgFlags::MSG_CMSG_CLOEXEC).bits();
    // u64: aligned for a cmsghdr. 130 of them hold 253 numbers and the header.
    let mut control = [0_u64; 130];
    let mut slice = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: all zeros are a valid msghdr: null pointers and lengths of 0.
    let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    message.msg_iov = &raw mut slice;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    let length = loop {
        // SAFETY: recvmsg(2) writes through the iovec and the control pointer, each with the length of
        // the live array that it points to.
        match Errno::result(unsafe { libc::recvmsg(socket, &raw mut message, flags) }) {
            Err(Errno::EINTR) => {}
            other => break other?,
        }
    };
    let fds = rights(&message);
    if message.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
        return Err(Errno::EMSGSIZE);
    }
    Ok(Packet {
        length: usize::try_from(length).unwrap_or(0),
        fds,
    })
}

/// Takes possession of the descriptors of a received message. To be called once for each.
fn rights(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: msg_control and msg_controllen are as recvmsg(2) left them, over a live, aligned buffer.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(message) };
    // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR return null or a whole header within that buffer.
    while let Some(header) = unsafe { next.as_ref() } {
        if (header.cmsg_level, header.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: the header is within the buffer, as above.
            let data = unsafe { libc::CMSG_DATA(header) };
            // SAFETY: CMSG_LEN is arithmetic.
            let head = usize::try_from(unsafe { libc::CMSG_LEN(0) }).unwrap_or(usize::MAX);
            let count = header.cmsg_len.saturating_sub(head) / size_of::<RawFd>();
            for at in 0..count.min(MAX_FDS) {
                // SAFETY: cmsg_len says that this many numbers follow the header.
                let place = unsafe { data.cast::<RawFd>().add(at) };
                // SAFETY: initialised by the kernel, and perhaps not aligned.
                let fd = unsafe { place.read_unaligned() };
                // SAFETY: recvmsg(2) has just installed this number and nobody else knows it.
                fds.push(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
        // SAFETY: both pointers are of the message just received, as above.
        next = unsafe { libc::CMSG_NXTHDR(message, next) };
    }
    fds
}

/// Accepts a connection.
///
/// # Errors
/// As `accept4(2)`: `EAGAIN`, there is none; `EMFILE`, no number is left for it.
pub fn accept(listener: impl AsFd, flags: SockFlag) -> Result<OwnedFd> {
    let fd = nix::sys::socket::accept4(listener.as_fd().as_raw_fd(), flags)?;
    // SAFETY: the call has just returned this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::{receive, send};
    use nix::errno::Errno;
    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, socketpair};
    use std::os::fd::{AsFd, OwnedFd};

    fn pair() -> (OwnedFd, OwnedFd) {
        let kind = SockType::SeqPacket;
        socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).unwrap()
    }

    #[test]
    fn descriptors_arrive_close_on_exec() {
        let (ours, theirs) = pair();
        let (reader, writer) = nix::unistd::pipe().unwrap();
        send(&ours, b"hello", &[writer.as_fd()], MsgFlags::empty()).unwrap();
        drop(writer);
        let mut buffer = [0; 16];
        let packet = receive(&theirs, &mut buffer, MsgFlags::empty()).unwrap();
        assert_eq!(&buffer[..packet.length], b"hello");
        let [fd] = &packet.fds[..] else {
            panic!("one descriptor")
        };
        let flags = fcntl(fd, FcntlArg::F_GETFD).unwrap();
        assert_eq!(flags & FdFlag::FD_CLOEXEC.bits(), FdFlag::FD_CLOEXEC.bits());
        nix::unistd::write(fd, b"x").unwrap();
        assert_eq!(nix::unistd::read(&reader, &mut buffer), Ok(1));
    }

    #[test]
    fn a_packet_that_is_too_long_takes_its_descriptors_with_it() {
        let (ours, theirs) = pair();
        let (reader, writer) = nix::unistd::pipe().unwrap();
        send(
            &ours,
            &[0; 64],
            &[writer.as_fd(), writer.as_fd()],
            MsgFlags::empty(),
        )
        .unwrap();
        drop(writer);
        let answer = receive(&theirs, &mut [0; 16], MsgFlags::empty());
        assert_eq!(answer.unwrap_err(), Errno::EMSGSIZE);
        assert_eq!(
            nix::unistd::read(&reader, &mut [0]),
            Ok(0),
            "no writer is left"
        );
    }

    #[test]
    fn a_peer_that_is_gone_is_an_errno_and_no_signal() {
        let (ours, theirs) = pair();
        drop(theirs);
        assert_eq!(send(&ours, b"x", &[], MsgFlags::empty()), Err(Errno::EPIPE));
        assert_eq!(
            receive(&ours, &mut [0; 4], MsgFlags::empty())
                .unwrap()
                .length,
            0
        );
    }
}
