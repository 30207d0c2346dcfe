//! The pool of addresses, and how it is cut.

use super::NetworkError;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::Ipv4Addr;

/// The two ends of a container's link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The host's end: the container's gateway.
    pub host: Ipv4Addr,
    /// The container's address.
    pub container: Ipv4Addr,
    /// Prefix length of both: 30.
    pub prefix: u8,
}

/// The pool: a network that is cut into /30 blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Subnet {
    base: Ipv4Addr,
    prefix: u8,
}

impl Subnet {
    pub(super) fn parse((base, prefix): (Ipv4Addr, u8)) -> Result<Self, NetworkError> {
        let subnet = Self { base, prefix };
        if !(8..=30).contains(&prefix) || u32::from(base) & !subnet.mask() != 0 {
            return Err(NetworkError::Pool(base, prefix));
        }
        Ok(subnet)
    }

    fn mask(self) -> u32 {
        u32::MAX << (32 - u32::from(self.prefix))
    }

    pub(super) fn contains(self, address: Ipv4Addr) -> bool {
        u32::from(address) & self.mask() == u32::from(self.base)
    }

    pub(super) fn blocks(self) -> u32 {
        1 << (30 - u32::from(self.prefix))
    }

    pub(super) fn block(self, number: u32) -> Lease {
        let first = u32::from(self.base) + 4 * number;
        Lease {
            host: (first + 1).into(),
            container: (first + 2).into(),
            prefix: 30,
        }
    }

    /// The number of a container's block; of one outside the pool, a number beyond the last.
    pub(super) fn number(self, container: Ipv4Addr) -> u32 {
        let offset = u32::from(container).wrapping_sub(u32::from(self.base));
        offset / 4
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subnet(text: [u8; 4], prefix: u8) -> Result<Subnet, NetworkError> {
        Subnet::parse((Ipv4Addr::from(text), prefix))
    }

    #[test]
    fn blocks_are_numbered_both_ways() {
        let pool = subnet([10, 254, 0, 0], 22).unwrap();
        assert_eq!(pool.blocks(), 256);
        for (number, host) in [
            (0, [10, 254, 0, 1]),
            (1, [10, 254, 0, 5]),
            (255, [10, 254, 3, 253]),
        ] {
            let lease = pool.block(number);
            assert_eq!(lease.host, Ipv4Addr::from(host));
            assert_eq!(u32::from(lease.container), u32::from(lease.host) + 1);
            assert_eq!(pool.number(lease.container), number);
        }
        let foreign = subnet([10, 253, 0, 0], 22).unwrap().block(0);
        assert!(pool.number(foreign.container) >= pool.blocks());
        assert!(pool.contains([10, 254, 3, 255].into()) && !pool.contains([10, 254, 4, 0].into()));
        assert_eq!(subnet([10, 254, 0, 4], 30).unwrap().blocks(), 1);
        assert_eq!(subnet([10, 0, 0, 0], 8).unwrap().blocks(), 1 << 22);
    }

    #[test]
    fn what_is_no_network_is_refused() {
        for (base, prefix) in [
            ([10, 254, 0, 1], 22),
            ([10, 0, 0, 0], 31),
            ([0, 0, 0, 0], 0),
        ] {
            let error = subnet(base, prefix).unwrap_err().to_string();
            assert!(
                error.ends_with("give the first address of one, /8 to /30"),
                "{error}"
            );
        }
    }
}
