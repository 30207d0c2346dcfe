//! Which of a fixed range of numbers are in use, and which were a moment ago.
//!
//! A number that comes back rests before it is given out again, and then queues behind all that
//! rested longer: whoever still holds it by mistake (a router, a connection in flight) has as long
//! as possible to notice. Nothing here reads the clock.

use std::collections::{HashSet, VecDeque};
use std::time::{Duration, Instant};

/// The numbers `0..size`, each free, in use, or resting.
#[derive(Debug)]
pub(super) struct Pool {
    size: u32,
    /// From here on no number was given out, except those in `early`.
    fresh: u32,
    /// Adopted before `fresh` came to them: they come back through `resting` only.
    early: HashSet<u32>,
    in_use: HashSet<u32>,
    /// When each may be given out again, earliest first.
    resting: VecDeque<(Instant, u32)>,
    rest: Duration,
}

/// The number is already in use.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct InUse;

impl Pool {
    pub(super) fn new(size: u32, rest: Duration) -> Self {
        Self {
            size,
            fresh: 0,
            early: HashSet::new(),
            in_use: HashSet::new(),
            resting: VecDeque::new(),
            rest,
        }
    }

    /// A number nobody has: first those never used, then the one that rested longest. `None` when all
    /// are in use or still resting.
    pub(super) fn take(&mut self, now: Instant) -> Option<u32> {
        while self.fresh < self.size {
            let number = self.fresh;
            self.fresh += 1;
            if !self.early.remove(&number) {
                self.in_use.insert(number);
                return Some(number);
            }
        }
        let &(ready, number) = self.resting.front()?;
        if ready > now {
            return None;
        }
        self.resting.pop_front();
        self.in_use.insert(number);
        Some(number)
    }

    /// Takes back what [`Pool::take`] gave at `now` and nobody used: it need not rest.
    pub(super) fn untake(&mut self, number: u32, now: Instant) {
        if self.in_use.remove(&number) {
            self.resting.push_front((now, number));
        }
    }

    /// Claims a number that its holder says it has, also when it is resting. One outside the range
    /// (of an earlier configuration) is claimed too: it is in use, whatever the range is today.
    pub(super) fn adopt(&mut self, number: u32) -> Result<(), InUse> {
        if !self.in_use.insert(number) {
            return Err(InUse);
        }
        self.resting.retain(|&(_, resting)| resting != number);
        if number >= self.fresh && number < self.size {
            self.early.insert(number);
        }
        Ok(())
    }

    /// Gives a number back, to rest. A second release of the same number does nothing, and one
    /// outside the range is forgotten.
    pub(super) fn release(&mut self, number: u32, now: Instant) {
        if self.in_use.remove(&number) && number < self.size {
            self.resting.push_back((now + self.rest, number));
        }
    }

    pub(super) fn in_use(&self) -> usize {
        self.in_use.len()
    }

    pub(super) fn resting(&self) -> usize {
        self.resting.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REST: Duration = Duration::from_secs(5);

    #[test]
    fn gives_out_what_was_never_used_before_what_was() {
        let now = Instant::now();
        let mut pool = Pool::new(3, REST);
        assert_eq!(pool.take(now), Some(0));
        pool.release(0, now);
        let later = now + REST;
        assert_eq!(pool.take(later), Some(1));
        assert_eq!(pool.take(later), Some(2));
        assert_eq!(pool.take(later), Some(0));
        assert_eq!(pool.take(later), None);
        assert_eq!((pool.in_use(), pool.resting()), (3, 0));
    }

    #[test]
    fn a_number_rests_before_it_is_given_out_again() {
        let now = Instant::now();
        let mut pool = Pool::new(1, REST);
        assert_eq!(pool.take(now), Some(0));
        pool.release(0, now);
        assert_eq!(pool.take(now + REST - Duration::from_millis(1)), None);
        assert_eq!(pool.resting(), 1);
        assert_eq!(pool.take(now + REST), Some(0));
    }

    #[test]
    fn the_longest_rested_comes_first() {
        let now = Instant::now();
        let mut pool = Pool::new(3, REST);
        while pool.take(now).is_some() {}
        pool.release(2, now);
        pool.release(0, now + Duration::from_secs(1));
        let later = now + REST * 2;
        assert_eq!(pool.take(later), Some(2));
        assert_eq!(pool.take(later), Some(0));
    }

    #[test]
    fn what_nobody_used_need_not_rest() {
        let now = Instant::now();
        let mut pool = Pool::new(2, REST);
        assert_eq!((pool.take(now), pool.take(now)), (Some(0), Some(1)));
        pool.release(0, now);
        pool.untake(1, now);
        assert_eq!((pool.take(now), pool.take(now)), (Some(1), None));
        assert_eq!((pool.in_use(), pool.resting()), (1, 1));
    }

    #[test]
    fn a_second_release_changes_nothing() {
        let now = Instant::now();
        let mut pool = Pool::new(1, REST);
        assert_eq!(pool.take(now), Some(0));
        pool.release(0, now);
        pool.release(0, now);
        assert_eq!(pool.take(now + REST), Some(0));
        assert_eq!(pool.take(now + REST), None);
    }

    #[test]
    fn what_was_adopted_is_not_given_out_and_rests_like_any_other() {
        let now = Instant::now();
        let mut pool = Pool::new(3, REST);
        assert_eq!(pool.adopt(1), Ok(()));
        assert_eq!(pool.adopt(1), Err(InUse));
        assert_eq!(pool.take(now), Some(0));
        pool.release(1, now);
        assert_eq!(pool.take(now), Some(2));
        assert_eq!(pool.take(now), None);
        assert_eq!(pool.take(now + REST), Some(1));
    }

    #[test]
    fn a_resting_number_can_be_adopted() {
        let now = Instant::now();
        let mut pool = Pool::new(1, REST);
        assert_eq!(pool.take(now), Some(0));
        pool.release(0, now);
        assert_eq!(pool.adopt(0), Ok(()));
        assert_eq!(pool.take(now + REST), None);
    }

    #[test]
    fn what_lies_outside_the_range_is_adopted_and_then_forgotten() {
        let now = Instant::now();
        let mut pool = Pool::new(1, REST);
        assert_eq!(pool.adopt(7), Ok(()));
        assert_eq!(pool.adopt(7), Err(InUse));
        pool.release(7, now);
        assert_eq!(pool.take(now), Some(0));
        assert_eq!(pool.take(now + REST), None);
    }

    #[test]
    fn an_empty_pool_gives_nothing() {
        assert_eq!(Pool::new(0, REST).take(Instant::now()), None);
    }
}
