//! How often output is looked at.
//!
//! Each look costs the host's processors: here, where the spool is followed, and in the agent. An app that prints a
//! little all the time would make thousands of them in a second, which nothing of its limits bounds. So after a look
//! that found little there is a rest, and lines of that time go together; also after one that moved nothing, as of
//! a line that comes byte by byte or a pipe that the app empties itself. One that prints much is looked at all the
//! time: it would fill its pipe meanwhile and wait.

use std::time::{Duration, Instant};

/// A rest: a line that comes meanwhile is so much later.
pub(super) const REST: Duration = Duration::from_millis(2);

/// Bytes of a look that found much: somewhat less than the half of a pipe, which is what a full one may hold. Who
/// prints less in the time of a rest does not wait for its end.
const MUCH: u32 = 24 * 1024;

/// How long at most no look is followed by a rest after much was found.
const BUSY: Duration = Duration::from_millis(50);

/// What is remembered of earlier looks.
#[derive(Debug, Default)]
pub(super) struct Pace {
    busy_until: Option<Instant>,
    /// The last look moved nothing.
    vain: bool,
}

impl Pace {
    /// Whether there is a rest after a look that moved so many bytes.
    ///
    /// What was moved is paid for with time without rests: as much as it would have taken to print it at the pace
    /// from which on rests are in the way. So who prints faster is never rested after, and who once printed
    /// much is soon. One look that moves nothing is for free: it may be for what the look before had seen already, or
    /// for a line of which the end comes at once.
    pub(super) fn rests_after(&mut self, moved: usize, now: Instant) -> bool {
        let moved = u32::try_from(moved).unwrap_or(u32::MAX);
        let busy_until = self.busy_until.unwrap_or(now).max(now);
        let busy = now < busy_until;
        self.busy_until = Some((busy_until + REST * moved / MUCH).min(now + BUSY));
        let vain_before = std::mem::replace(&mut self.vain, moved == 0);
        let free = moved == 0 && !vain_before;
        moved < MUCH && !busy && !free
    }
}

#[cfg(test)]
mod tests {
    use super::{BUSY, MUCH, Pace, REST};
    use std::time::{Duration, Instant};

    const ENOUGH: usize = MUCH as usize;

    #[test]
    fn little_is_followed_by_a_rest_and_much_by_none_for_a_while() {
        let (mut pace, begin) = (Pace::default(), Instant::now());
        let ms = |ms| begin + Duration::from_millis(ms);
        assert!(pace.rests_after(1, ms(1)));
        assert!(pace.rests_after(ENOUGH - 1, ms(2)));
        assert!(!pace.rests_after(ENOUGH, ms(5)));
        assert!(!pace.rests_after(1, ms(6)));
        assert!(!pace.rests_after(0, ms(6)));
        assert!(pace.rests_after(1, ms(8)));
        // However much it was.
        assert!(!pace.rests_after(100 * ENOUGH, ms(10)));
        assert!(!pace.rests_after(1, ms(9) + BUSY));
        assert!(pace.rests_after(1, ms(11) + BUSY));
    }

    #[test]
    fn nothing_is_followed_by_a_rest_but_the_first_time() {
        let (mut pace, begin) = (Pace::default(), Instant::now());
        let found = [0, 0, 0, 1, 0, 0, 1];
        let rests = (1..)
            .zip(found)
            .map(|(look, moved)| pace.rests_after(moved, begin + REST * look));
        let wanted = [false, true, true, true, false, true, true];
        assert_eq!(rests.collect::<Vec<_>>(), wanted);
    }

    /// Looks that an app gets in a second that prints so many bytes in a millisecond.
    fn looks(bytes: usize) -> usize {
        const LOOK: Duration = Duration::from_micros(10);
        let (mut pace, begin) = (Pace::default(), Instant::now());
        let (mut passed, mut looks, mut taken) = (Duration::ZERO, 0, 0);
        while passed < Duration::from_secs(1) {
            let printed = usize::try_from(passed.as_micros()).unwrap() * bytes / 1000;
            let rests = pace.rests_after(printed - taken, begin + passed);
            (taken, looks) = (printed, looks + 1);
            passed += LOOK + if rests { REST } else { Duration::ZERO };
        }
        looks
    }

    #[test]
    fn who_prints_faster_than_rests_allow_is_looked_at_all_the_time_and_nobody_else() {
        for slow in [0, 1, 1000, 10_000] {
            assert!(looks(slow) <= 1000, "{slow}: {}", looks(slow));
        }
        for fast in [15_000, 1_000_000] {
            assert!(looks(fast) > 90_000, "{fast}: {}", looks(fast));
        }
    }
}
