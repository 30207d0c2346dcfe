//! Which ranges of user ids containers have.
//!
//! A range is taken for as long as a file with its ids may exist: from the making of a container's directory
//! until that is removed from the trash. The directory itself keeps which one it is as its group (the mode
//! gives a group no right), and what is being removed in its name, so that the next agent knows it, too.

use container::launch::Ids;
use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The first id of the first range. Above what `adduser` and `systemd-nspawn` give out, and subordinate ids by
/// default (<https://systemd.io/UIDS-GIDS>).
const FIRST: u32 = 0x7000_0000;
/// How many ranges there are: up to systemd's foreign ids, at 0x7ffe0000.
const RANGES: u32 = 4094;

/// The ranges of one agent.
#[derive(Debug)]
pub(super) struct Ranges {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    next: u32,
    taken: BTreeSet<u32>,
    /// Of `taken`: what is in the trash.
    trashed: BTreeSet<u32>,
}

impl Ranges {
    /// With what directories (`living`) and the trash hold, and without what others have, as lines of
    /// subuid(5); beginning anywhere.
    pub(super) fn new(
        living: impl Iterator<Item = Ids>,
        trashed: impl Iterator<Item = Ids>,
        others: &str,
    ) -> Self {
        let trashed: BTreeSet<u32> = trashed.filter_map(number).collect();
        let mut taken: BTreeSet<u32> = living.filter_map(number).collect();
        taken.extend(&trashed);
        taken.extend(others.lines().flat_map(overlapped));
        let state = State {
            next: crate::random::u32() % RANGES,
            taken,
            trashed,
        };
        Self {
            state: Mutex::new(state),
        }
    }

    /// One that nobody has; those given back last come last. `None`: all are taken.
    pub(super) fn take(&self) -> Option<Ids> {
        let mut state = self.lock();
        let from = state.next;
        let mut candidates = (0..RANGES).map(|step| (from + step) % RANGES);
        let found = candidates.find(|number| !state.taken.contains(number))?;
        state.next = (found + 1) % RANGES;
        state.taken.insert(found);
        Some(Ids {
            first: FIRST + found * Ids::COUNT,
        })
    }

    /// Gives one back that no file ever had.
    pub(super) fn untake(&self, ids: Ids) {
        if let Some(number) = number(ids) {
            self.lock().taken.remove(&number);
        }
    }

    /// Its directory is in the trash now.
    pub(super) fn discard(&self, ids: Ids) {
        if let Some(number) = number(ids) {
            self.lock().trashed.insert(number);
        }
    }

    /// What is in the trash now, for [`Self::release`] when that was removed.
    pub(super) fn trashed(&self) -> BTreeSet<u32> {
        self.lock().trashed.clone()
    }

    /// Makes this one the next, if nobody has it.
    #[cfg(test)]
    pub(super) fn prefer(&self, ids: Ids) {
        self.lock().next = number(ids).unwrap();
    }

    #[cfg(test)]
    pub(super) fn taken(&self) -> usize {
        self.lock().taken.len()
    }

    /// What was `trashed` has no files any more, but for what is `left`.
    pub(super) fn release(&self, mut trashed: BTreeSet<u32>, left: impl Iterator<Item = Ids>) {
        for number in left.filter_map(number) {
            trashed.remove(&number);
        }
        let mut state = self.lock();
        state.trashed.retain(|number| !trashed.contains(number));
        state.taken.retain(|number| !trashed.contains(number));
    }

    /// What the holders do is too short to leave a half-changed value behind.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The ranges that a line `user:first:count` of subuid(5) takes away.
fn overlapped(line: &str) -> impl Iterator<Item = u32> + use<> {
    let mut numbers = line
        .split(':')
        .skip(1)
        .map_while(|word| word.trim().parse::<u64>().ok());
    let (first, count) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    (0..RANGES).filter(move |number| {
        let start = u64::from(FIRST + number * Ids::COUNT);
        first < start + u64::from(Ids::COUNT) && start < first.saturating_add(count)
    })
}

/// The number of a range; `None` for ids that are none of ours.
fn number(ids: Ids) -> Option<u32> {
    let offset = ids.first.checked_sub(FIRST)?;
    (offset % Ids::COUNT == 0 && offset / Ids::COUNT < RANGES).then_some(offset / Ids::COUNT)
}

#[cfg(test)]
mod tests {
    use super::{FIRST, RANGES, Ranges};
    use container::launch::Ids;

    #[test]
    fn a_range_comes_back_when_its_files_are_gone() {
        let ids = |number: u32| Ids {
            first: FIRST + number * Ids::COUNT,
        };
        let strange = [ids(RANGES), Ids { first: 0 }, Ids { first: FIRST + 1 }];
        let others = "me:100000:65536\nbroken\nyou:1879113727:2\n";
        let living = [ids(7)].into_iter().chain(strange);
        let ranges = Ranges::new(living, [ids(9)].into_iter(), others);
        let mut given = Vec::new();
        while let Some(ids) = ranges.take() {
            given.push(ids);
        }
        assert_eq!(given.len(), RANGES as usize - 4);
        // 1879113727 is the last id of range 0.
        assert!(
            [0, 1, 7, 9]
                .iter()
                .all(|taken| !given.contains(&ids(*taken)))
        );

        ranges.discard(ids(7));
        let emptied = ranges.trashed();
        ranges.discard(ids(3));
        assert_eq!(ranges.take(), None, "what is in the trash has files");
        ranges.release(emptied.clone(), [ids(7), ids(9)].into_iter());
        assert_eq!(ranges.take(), None, "what resists has files");
        ranges.release(emptied, std::iter::empty());
        let mut back = [ranges.take().unwrap(), ranges.take().unwrap()];
        back.sort_by_key(|ids| ids.first);
        assert_eq!(back, [ids(7), ids(9)]);
        assert_eq!(ranges.take(), None);
        ranges.untake(ids(9));
        assert_eq!(ranges.take(), Some(ids(9)));
    }
}
