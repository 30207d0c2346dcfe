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
    /// The number that is given out first; then come those behind it, and after the last the first.
    start: u32,
    /// So many numbers were passed from `start` on. No other was given out, except those in `early`.
    passed: u32,
    /// Given out last.
    last: u32,
    /// Adopted before their turn came: they come back through `resting` only.
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
            start: 0,
            passed: 0,
            last: size.saturating_sub(1),
            early: HashSet::new(),
            in_use: HashSet::new(),
            resting: VecDeque::new(),
            rest,
        }
    }

    /// Begins behind a number that was given out before this pool was made. One outside the range is
    /// as good as any.
    pub(super) fn begin_behind(&mut self, last: u32) {
        if let Some(last) = last.checked_rem(self.size) {
            self.last = last;
            self.start = (last + 1) % self.size;
        }
    }

    /// Lets a number rest that came back to an earlier pool so long ago. Before anything is given out or
    /// adopted.
    pub(super) fn let_rest(&mut self, number: u32, rested: Duration, now: Instant) {
        let left = self.rest.saturating_sub(rested);
        // It is not given out when its turn comes, and rests once.
        if left.is_zero() || !self.is_ahead(number) || !self.early.insert(number) {
            return;
        }
        let ready = now + left;
        let place = self.resting.partition_point(|(other, _)| *other <= ready);
        self.resting.insert(place, (ready, number));
    }

    /// The numbers that rest, and how long each has.
    pub(super) fn rested(&self, now: Instant) -> impl Iterator<Item = (u32, Duration)> {
        let resting = self.resting.iter();
        resting.filter_map(move |&(ready, number)| {
            let left = ready.saturating_duration_since(now);
            (!left.is_zero()).then(|| (number, self.rest.saturating_sub(left)))
        })
    }

    /// The number given out last.
    pub(super) fn last(&self) -> u32 {
        self.last
    }

    /// A number nobody has: first those never used, then the one that rested longest. `None` when all
    /// are in use or still resting.
    pub(super) fn take(&mut self, now: Instant) -> Option<u32> {
        while self.passed < self.size {
            let number = self.behind_start(self.passed);
            self.passed += 1;
            if !self.early.remove(&number) {
                return Some(self.give(number));
            }
        }
        let &(ready, number) = self.resting.front()?;
        if ready > now {
            return None;
        }
        self.resting.pop_front();
        Some(self.give(number))
    }

    /// Whether [`Pool::take`] would give a number now.
    pub(super) fn has_free(&self, now: Instant) -> bool {
        let ahead = (self.size - self.passed) as usize;
        let rested = self.resting.front().is_some_and(|&(ready, _)| ready <= now);
        // Whatever is early is ahead.
        ahead > self.early.len() || rested
    }

    fn give(&mut self, number: u32) -> u32 {
        self.in_use.insert(number);
        self.last = number;
        number
    }

    /// The number that comes `steps` (below `size`) after `start`.
    fn behind_start(&self, steps: u32) -> u32 {
        let to_the_end = self.size - self.start;
        if steps < to_the_end {
            self.start + steps
        } else {
            steps - to_the_end
        }
    }

    /// Whether a number's turn is still to come.
    fn is_ahead(&self, number: u32) -> bool {
        let steps = if number >= self.start {
            number - self.start
        } else {
            number + (self.size - self.start)
        };
        number < self.size && steps >= self.passed
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
        if self.is_ahead(number) {
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

    /// Gives back all that are in use.
    pub(super) fn release_all(&mut self, now: Instant) {
        let in_use = std::mem::take(&mut self.in_use);
        let inside = in_use.into_iter().filter(|number| *number < self.size);
        self.resting
            .extend(inside.map(|number| (now + self.rest, number)));
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

    /// Whatever happened to a pool, it says that it has a free number exactly if it gives one.
    #[test]
    fn a_pool_knows_whether_it_has_any() {
        let begun = Instant::now();
        let mut seed = 0x2545_f491_4f6c_dd1d_u64;
        let mut random = move |below: u32| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            u32::try_from(seed >> 33).unwrap() % below
        };
        for round in 0..200 {
            let mut pool = Pool::new(1 + random(4), REST);
            pool.begin_behind(random(4));
            pool.let_rest(random(4), Duration::from_secs(u64::from(random(8))), begun);
            let mut now = begun;
            for step in 0..40 {
                now += Duration::from_secs(u64::from(random(3)));
                match random(4) {
                    0 => pool.release(random(4), now),
                    1 => pool.untake(random(4), now),
                    2 => drop(pool.adopt(random(5))),
                    _ => {
                        let has = pool.has_free(now);
                        assert_eq!(pool.take(now).is_some(), has, "{round} {step}: {pool:?}");
                    }
                }
            }
        }
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
    fn what_is_given_back_at_once_rests_like_any_other() {
        let now = Instant::now();
        let mut pool = Pool::new(3, REST);
        assert_eq!((pool.take(now), pool.take(now)), (Some(0), Some(1)));
        pool.adopt(9).unwrap();
        pool.release_all(now);
        assert_eq!((pool.in_use(), pool.resting()), (0, 2));
        assert_eq!((pool.take(now), pool.take(now)), (Some(2), None));
        let later = now + REST;
        assert!(pool.take(later).is_some() && pool.take(later).is_some());
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
    fn what_rested_in_an_earlier_pool_goes_on_resting() {
        let now = Instant::now();
        let second = Duration::from_secs(1);
        let mut earlier = Pool::new(4, REST);
        while earlier.take(now).is_some() {}
        earlier.release(3, now);
        earlier.release(2, now + second);
        earlier.untake(1, now + second);
        let kept: Vec<_> = earlier.rested(now + second * 2).collect();
        assert_eq!(kept, [(3, second * 2), (2, second)]);
        assert_eq!(earlier.rested(now + REST + second).count(), 0);
        let mut pool = Pool::new(4, REST);
        pool.begin_behind(1);
        for (number, rested) in kept.into_iter().rev() {
            pool.let_rest(number, rested, now);
            pool.let_rest(number, rested, now);
        }
        pool.let_rest(1, REST, now);
        pool.let_rest(7, Duration::ZERO, now);
        assert_eq!(pool.resting(), 2);
        assert_eq!(
            [(); 3].map(|()| pool.take(now)),
            [Some(0), Some(1), None],
            "2 and 3 rest"
        );
        assert_eq!(pool.adopt(2), Ok(()));
        assert_eq!(pool.take(now + second * 2), None);
        assert_eq!(pool.take(now + second * 3), Some(3));
        assert_eq!(pool.take(now + REST), None);
    }

    #[test]
    fn an_empty_pool_gives_nothing() {
        let mut pool = Pool::new(0, REST);
        assert_eq!(pool.take(Instant::now()), None);
        pool.begin_behind(7);
        assert_eq!(pool.take(Instant::now()), None);
    }

    #[test]
    fn a_pool_goes_on_behind_the_last_and_around() {
        let now = Instant::now();
        let mut pool = Pool::new(4, REST);
        pool.begin_behind(1);
        assert_eq!(pool.last(), 1);
        assert_eq!(pool.adopt(3), Ok(()));
        assert_eq!(pool.adopt(1), Ok(()));
        assert_eq!((pool.take(now), pool.last()), (Some(2), 2));
        // Adopted before its turn and given back: it rests, as any other.
        pool.release(3, now);
        assert_eq!((pool.take(now), pool.last()), (Some(0), 0));
        assert_eq!(pool.take(now), None);
        assert_eq!(pool.take(now + REST), Some(3));
        let mut pool = Pool::new(3, REST);
        pool.begin_behind(2 + 3);
        assert_eq!(
            [(); 4].map(|()| pool.take(now)),
            [Some(0), Some(1), Some(2), None]
        );
    }
}
