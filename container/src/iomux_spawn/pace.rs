//! How often output is looked at.
//!
//! Each look costs the host's processors: here, where the spool is followed, and in the agent. An app that prints a
//! little all the time would make thousands of them in a second, which nothing of its limits bounds. So after a look
//! that found little there is a rest, and lines of that time go together. One that prints much is looked at all the
//! time: it would fill its pipe meanwhile and wait.

use std::time::{Duration, Instant};

/// Bytes of a look that found much: somewhat less than the half of a pipe, which is what a full one may hold.
const MUCH: usize = 24 * 1024;

/// How long no look is followed by a rest after one that found much.
const BUSY: Duration = Duration::from_millis(50);

/// What is remembered of earlier looks.
#[derive(Debug, Default)]
pub(super) struct Pace {
    busy_until: Option<Instant>,
}

impl Pace {
    /// Whether there is a rest after a look that found so many bytes.
    pub(super) fn rests_after(&mut self, moved: usize, now: Instant) -> bool {
        if moved >= MUCH {
            self.busy_until = Some(now + BUSY);
        }
        let busy = self.busy_until.is_some_and(|until| now < until);
        moved > 0 && !busy
    }
}

#[cfg(test)]
mod tests {
    use super::{BUSY, MUCH, Pace};
    use std::time::{Duration, Instant};

    #[test]
    fn little_is_followed_by_a_rest_and_much_by_none_for_a_while() {
        let (mut pace, begin) = (Pace::default(), Instant::now());
        let ms = |ms| begin + Duration::from_millis(ms);
        assert!(!pace.rests_after(0, ms(0)));
        assert!(pace.rests_after(1, ms(1)));
        assert!(pace.rests_after(MUCH - 1, ms(2)));
        assert!(!pace.rests_after(MUCH, ms(3)));
        assert!(!pace.rests_after(1, ms(4)));
        assert!(!pace.rests_after(1, ms(2) + BUSY));
        assert!(pace.rests_after(1, ms(3) + BUSY));
    }
}
