//! Why something about the network did not work.

use nix::errno::Errno;
use std::io;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

/// Why something about the network did not work.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The configured pool is none.
    #[error("network pool \"{0}/{1}\" is no network: give the first address of one, /8 to /30")]
    Pool(Ipv4Addr, u8),
    /// The pool would hide an address that this host has.
    #[error("network pool \"{pool}\" contains \"{address}\" of \"{link}\": choose another pool")]
    PoolInUse {
        /// The pool.
        pool: String,
        /// The address inside it.
        address: Ipv4Addr,
        /// Whose address it is.
        link: String,
    },
    /// What is meant for our links would be done to another one.
    #[error("link \"{0}\" is not the agent's, and names that begin with \"os-\" are: rename it")]
    NameInUse(String),
    /// No address block is free.
    #[error("no free address: {in_use} in use, {resting} resting; a larger network pool has more")]
    NoAddress {
        /// Blocks held by containers.
        in_use: usize,
        /// Blocks given back a moment ago.
        resting: usize,
    },
    /// No port is free.
    #[error("no free port: {in_use} in use, {resting} resting; a wider range of ports has more")]
    NoPort {
        /// Ports held by containers.
        in_use: usize,
        /// Ports given back a moment ago.
        resting: usize,
    },
    /// More egress rules than the table is meant for.
    #[error("too many egress rules: an instance may have 1000, and they must not be too fine")]
    TooManyRules,
    /// The rules of all containers are more than the table is meant for.
    #[error(
        "no room for {wanted} elements of egress rules beside {held} of other instances, {max} in all: \
         fewer or coarser rules need less"
    )]
    NoRoomForRules {
        /// How many elements the rules become.
        wanted: usize,
        /// How many those of others are.
        held: usize,
        /// How many all may be.
        max: usize,
    },
    /// Two claim the same address or port.
    #[error("\"{0}\" is in use already")]
    Taken(String),
    /// A program the agent needs is not installed.
    #[error("\"{program}\" is not installed: install the package \"nftables\"")]
    Missing {
        /// Its name.
        program: &'static str,
    },
    /// A program failed.
    #[error("{program} {arguments}: {detail}")]
    Program {
        /// Its name.
        program: &'static str,
        /// Its arguments.
        arguments: String,
        /// How it ended and what it said.
        detail: String,
    },
    /// A program did not end. Whether it has done what it should is not known.
    #[error("{program} {arguments}: did not end within {deadline:?} and was killed")]
    Hung {
        /// Its name.
        program: &'static str,
        /// Its arguments.
        arguments: String,
        /// How long it was given.
        deadline: Duration,
    },
    /// No netlink socket for links, or no thread to serve it.
    #[error("cannot open a socket to change links")]
    Netlink(#[source] io::Error),
    /// No socket for nftables' events, or no thread to read it.
    #[error("cannot watch for changes of nftables")]
    Watch(#[source] io::Error),
    /// The container has no place in the network, or no longer.
    #[error("container \"{0}\" is not attached to the network")]
    Detached(String),
    /// The kernel refused to change a link.
    #[error("cannot {doing} link \"{link}\"")]
    Link {
        /// What was tried.
        doing: &'static str,
        /// The link.
        link: String,
        /// Why not.
        source: rtnetlink::Error,
    },
    /// The kernel refused to list or forget connections.
    #[error("cannot make the kernel forget connections: {0}")]
    Connections(Errno),
    /// The kernel refused to change the table.
    #[error("cannot {doing} nftables table \"{table}\": {errno}")]
    Table {
        /// What was tried.
        doing: &'static str,
        /// The table.
        table: &'static str,
        /// Why not.
        errno: Errno,
    },
    /// A setting of the kernel cannot be read or written.
    #[error("cannot read or write \"{path}\" (in a container, /proc/sys must not be read-only)")]
    Sysctl {
        /// The setting.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}
