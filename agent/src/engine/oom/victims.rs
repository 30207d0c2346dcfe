//! Which record of the kernel's log belongs to which kill.
//!
//! The kernel counts every kill and logs each, though only ten in five seconds with the victim's group (its
//! `oom_kill_process` is rate-limited; then the victim's user tells), and the log forgets. So counts and records are matched once,
//! when a kill is first asked for, and what was decided then stays.

use super::log::{Complete, REMEMBERED};
use crate::host::kmsg::OomKill;
use std::collections::BTreeMap;

/// What was decided for one container.
#[derive(Debug, Default)]
pub(in crate::engine) struct Victims {
    /// By the counter's value with that kill. `None`: the log does not say.
    decided: BTreeMap<u64, Option<OomKill>>,
    /// The newest record at the last decision.
    seen: Option<u64>,
}

impl Victims {
    /// Nothing was decided yet: all of `records` are of the kills up to `known`.
    pub(super) fn begin(&mut self, records: &[OomKill], known: u64) {
        if self.decided.is_empty() {
            self.decided.insert(known, None);
            self.seen = records.iter().map(|record| record.seq).max();
        }
    }

    /// Which records to wait for if the counter stands at `total`: how many, and after which one.
    pub(super) fn expected(&self, total: u64) -> (u64, Option<u64>) {
        match self.decided.last_key_value() {
            Some((last, _)) => (total.saturating_sub(*last), self.seen),
            None => (total, None),
        }
    }

    /// The records of the kills after `known` up to `total`, in their order, given all records of the
    /// container.
    pub(super) fn decide(
        &mut self,
        records: &[OomKill],
        complete: Complete,
        known: u64,
        total: u64,
    ) -> Vec<Option<OomKill>> {
        if let Some((last, _)) = self.decided.last_key_value() {
            let (last, seen) = (*last, self.seen);
            let new: Vec<&OomKill> = records
                .iter()
                .filter(|record| Some(record.seq) > seen)
                .collect();
            let surplus = length(&new).saturating_sub(total.saturating_sub(last));
            let mut new = new.into_iter().skip(index(surplus));
            for count in last + 1..=total {
                self.decided.insert(count, new.next().cloned());
            }
        }
        for count in known + 1..=total {
            if !self.decided.contains_key(&count) {
                let taken = |record: &&OomKill| {
                    self.decided
                        .values()
                        .flatten()
                        .any(|other| other.seq == record.seq)
                };
                let record = aligned(records, complete, count, total);
                let record = record.filter(|record| !taken(record)).cloned();
                self.decided.insert(count, record);
            }
        }
        self.seen = self.seen.max(records.iter().map(|record| record.seq).max());
        let wanted = (known + 1..=total).map(|count| self.decided.get(&count).cloned().flatten());
        let wanted = wanted.collect();
        while self.decided.len() > REMEMBERED {
            self.decided.pop_first();
        }
        wanted
    }
}

/// The record of kill number `count` (from 1) of `total`, of which none was asked for before. A complete
/// log holds them from the first one on; one that has lost its beginning is counted from its end.
fn aligned(records: &[OomKill], complete: Complete, count: u64, total: u64) -> Option<&OomKill> {
    let index = match complete {
        Complete::Yes => count.checked_sub(1),
        Complete::No => (length(records) + count).checked_sub(total + 1),
    };
    records.get(self::index(index?))
}

fn length<T>(items: &[T]) -> u64 {
    u64::try_from(items.len()).unwrap_or(u64::MAX)
}

fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::{Complete, OomKill, Victims};

    /// Records whose process number is their sequence number.
    fn records(seqs: &[u32]) -> Vec<OomKill> {
        let record = |seq: &u32| OomKill {
            seq: u64::from(*seq),
            time_us: 0,
            constraint: String::new(),
            oom_memcg: String::new(),
            task_memcg: String::new(),
            comm: String::new(),
            pid: seq.cast_signed(),
            uid: 0,
        };
        seqs.iter().map(record).collect()
    }

    fn decide(
        victims: &mut Victims,
        seqs: &[u32],
        complete: Complete,
        known: u64,
        total: u64,
    ) -> Vec<Option<i32>> {
        let decided = victims.decide(&records(seqs), complete, known, total);
        decided
            .into_iter()
            .map(|record| record.map(|record| record.pid))
            .collect()
    }

    #[test]
    fn at_first_records_are_aligned_with_the_counter() {
        let first = |seqs: &[u32], complete, known, total| {
            decide(&mut Victims::default(), seqs, complete, known, total)
        };
        assert_eq!(first(&[5, 7, 9], Complete::Yes, 1, 3), [Some(7), Some(9)]);
        assert_eq!(
            first(&[5, 7], Complete::Yes, 0, 3),
            [Some(5), Some(7), None]
        );
        assert_eq!(first(&[7, 9], Complete::No, 0, 3), [None, Some(7), Some(9)]);
        assert_eq!(first(&[], Complete::Yes, 0, 1), [None]);
        assert_eq!(first(&[5], Complete::Yes, 1, 1), []);
    }

    #[test]
    fn later_only_new_records_belong_to_new_kills() {
        for complete in [Complete::Yes, Complete::No] {
            let mut victims = Victims::default();
            assert_eq!(decide(&mut victims, &[5], complete, 0, 1), [Some(5)]);
            // The kernel logged nothing of the second kill, and then of the third.
            assert_eq!(victims.expected(2), (1, Some(5)));
            assert_eq!(decide(&mut victims, &[5], complete, 1, 2), [None]);
            assert_eq!(decide(&mut victims, &[5, 9], complete, 2, 3), [Some(9)]);
            assert_eq!(
                decide(&mut victims, &[5, 9], complete, 0, 3),
                [Some(5), None, Some(9)]
            );
            // What was asked for stays when the log has forgotten it.
            assert_eq!(
                decide(&mut victims, &[9], Complete::No, 0, 3),
                [Some(5), None, Some(9)]
            );
        }
    }

    #[test]
    fn what_an_earlier_agent_told_is_not_waited_for() {
        let mut victims = Victims::default();
        // Of four kills the log remembers one.
        victims.begin(&records(&[5]), 4);
        assert_eq!(victims.expected(5), (1, Some(5)));
        assert_eq!(decide(&mut victims, &[5, 9], Complete::No, 4, 5), [Some(9)]);
        victims.begin(&records(&[5, 9]), 7);
        assert_eq!(victims.expected(6), (1, Some(9)), "only at first");
        // Nor if it remembers none.
        let mut victims = Victims::default();
        victims.begin(&[], 4);
        assert_eq!(victims.expected(5), (1, None));
        assert_eq!(decide(&mut victims, &[9], Complete::No, 4, 5), [Some(9)]);
    }

    #[test]
    fn a_record_belongs_to_one_kill() {
        let mut victims = Victims::default();
        assert_eq!(decide(&mut victims, &[9], Complete::No, 1, 2), [Some(9)]);
        // An older one is asked for later: the only record is the newer kill's.
        assert_eq!(
            decide(&mut victims, &[9], Complete::Yes, 0, 2),
            [None, Some(9)]
        );
    }

    #[test]
    fn decisions_are_bounded() {
        let mut victims = Victims::default();
        assert_eq!(
            decide(&mut victims, &[], Complete::Yes, 0, 5000).len(),
            5000
        );
        assert_eq!(victims.decided.len(), super::REMEMBERED);
    }
}
