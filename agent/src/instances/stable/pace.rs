//! How often the host says what is true of all its instances: a burst of changes is one word.

use std::time::Duration;
use tokio::time::Instant;

/// From one word to the next. The first is said at once, and what changes meanwhile is in the next.
const PAUSE: Duration = Duration::from_millis(100);

/// One kind of word.
#[derive(Debug)]
pub(super) struct Pace {
    due: bool,
    not_before: Instant,
}

impl Pace {
    /// Nothing is to be said.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            due: false,
            not_before: now,
        }
    }

    /// Something has changed.
    pub(super) fn soon(&mut self) {
        self.due = true;
    }

    /// Somebody is there who has heard nothing yet.
    pub(super) fn at_once(&mut self, now: Instant) {
        (self.due, self.not_before) = (true, now);
    }

    /// When it is to be said, if it is.
    pub(super) fn next(&self) -> Option<Instant> {
        self.due.then_some(self.not_before)
    }

    /// Whether to say it now; then it is taken for said.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        let says = self.due && now >= self.not_before;
        if says {
            (self.due, self.not_before) = (false, now + PAUSE);
        }
        says
    }
}

#[cfg(test)]
mod tests {
    use super::{PAUSE, Pace};
    use std::time::Duration;
    use tokio::time::Instant;

    #[test]
    fn a_burst_is_said_at_once_and_at_its_end() {
        let began = Instant::now();
        let mut pace = Pace::new(began);
        assert!(!pace.take(began), "nothing has changed");
        let mut said = Vec::new();
        for millisecond in 0..250 {
            let now = began + Duration::from_millis(millisecond);
            pace.soon();
            if pace.take(now) {
                said.push(millisecond);
            }
        }
        assert_eq!(said, [0, 100, 200]);
        let end = began + PAUSE * 3;
        assert_eq!(pace.next(), Some(end), "the last change is told too");
        assert!(pace.take(end));
        assert_eq!(pace.next(), None);
        assert!(!pace.take(end + PAUSE));
        pace.soon();
        assert!(!pace.take(end));
        pace.at_once(end);
        assert!(pace.take(end), "who is new does not wait");
    }
}
