//! What new containers may have: one look at the depot, and the reckoning with what that look has not counted.

use super::Limit;
use std::collections::BTreeMap;

/// As of one look.
#[derive(Debug, Clone, Default)]
pub struct Free {
    /// Bytes that are neither used, nor promised to whoever is `counted`, nor kept for what the agent writes itself.
    pub(super) bytes: u64,
    /// The containers whose writable layers were bounded, each with the bytes of its limit: all of these are used or
    /// promised. `u64::MAX` where nobody knows them.
    pub(super) counted: BTreeMap<String, u64>,
    /// Bytes that each container's output may take.
    pub(super) spool_bytes: u64,
}

impl Free {
    /// Bytes that `more` new containers can have together beside those that are `here`, each with its limit: what
    /// was not counted of these is theirs all the same. `needs` tells what bounding one takes.
    #[must_use]
    pub fn left(
        &self,
        here: &BTreeMap<&str, Limit>,
        more: u64,
        needs: impl Fn(Limit) -> u64,
    ) -> u64 {
        let uncounted = here.iter().map(|(handle, limit)| {
            let new = || needs(*limit).saturating_add(self.spool_bytes);
            let counted = self.counted.get(*handle);
            counted.map_or_else(new, |counted| limit.bytes.saturating_sub(*counted))
        });
        let spools = self.spool_bytes.saturating_mul(more);
        uncounted.fold(self.bytes.saturating_sub(spools), u64::saturating_sub)
    }
}

#[cfg(test)]
impl Free {
    /// So many bytes, and nothing counted.
    pub(crate) fn of(bytes: u64) -> Self {
        Self {
            bytes,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Free, Limit};
    use std::collections::BTreeMap;

    fn limit(bytes: u64) -> Limit {
        Limit { bytes, inodes: 1 }
    }

    fn left(free: &Free, here: &[(&str, u64)], more: u64) -> u64 {
        let here: BTreeMap<&str, Limit> = { here.iter() }
            .map(|(handle, bytes)| (*handle, limit(*bytes)))
            .collect();
        free.left(&here, more, |limit| limit.bytes + 3)
    }

    #[test]
    fn what_a_look_has_not_counted_is_not_free() {
        let free = Free {
            bytes: 1000,
            counted: BTreeMap::from([("made".into(), 100), ("unknown".into(), u64::MAX)]),
            spool_bytes: 10,
        };
        assert_eq!(left(&free, &[], 0), 1000);
        assert_eq!(left(&free, &[], 3), 970);
        // Counted, whatever it is to be; or with a limit that it had before it grew or shrank.
        assert_eq!(left(&free, &[("made", 100), ("unknown", 500)], 1), 990);
        assert_eq!(left(&free, &[("made", 150)], 1), 940);
        assert_eq!(left(&free, &[("made", 50)], 1), 990);
        // Accepted, and nothing is there of it: its limit, what that takes beside it, and its output.
        assert_eq!(left(&free, &[("new", 200)], 1), 1000 - 213 - 10);
        assert_eq!(left(&free, &[("new", 200), ("newer", 700)], 1), 64);
        assert_eq!(left(&free, &[("new", 200), ("newer", 900)], 1), 0);
        // One that is gone, and was not seen to be, is.
        assert_eq!(left(&free, &[("gone", u64::MAX - 3)], 0), 0);
    }
}
