//! A log that nobody can flood: of the warnings and errors of one place in the code so many are written at once,
//! and of the rest how many there were.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};
use tracing::callsite::Identifier;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::subscriber::Interest;
use tracing::{Event, Level, Metadata, Subscriber, warn};
use tracing_subscriber::layer::{Context, Filter};

/// The lines of one place that are written within [`WINDOW`].
const LINES: u64 = 20;

/// After this the count begins anew, and what was left out is told.
const WINDOW: Duration = Duration::from_secs(10);

static PLACES: LazyLock<Mutex<HashMap<Identifier, Place>>> = LazyLock::new(Mutex::default);

/// Somewhere a line was left out.
static LEFT_OUT: Notify = Notify::const_new();

/// The filter; to be combined with one that says which levels are wanted.
#[derive(Debug)]
pub struct Quiet;

/// One place in the code.
#[derive(Debug)]
struct Place {
    since: Instant,
    written: u64,
    left_out: u64,
    /// The words of the first line that was left out.
    like: String,
}

impl Place {
    fn new(now: Instant) -> Self {
        Self {
            since: now,
            written: 0,
            left_out: 0,
            like: String::new(),
        }
    }

    /// Whether one more line may be written. What was left out before is still to be told.
    fn admit(&mut self, now: Instant) -> bool {
        if now.duration_since(self.since) >= WINDOW {
            (self.since, self.written) = (now, 0);
        }
        if self.written < LINES {
            self.written += 1;
            return true;
        }
        self.left_out += 1;
        false
    }
}

impl<S: Subscriber> Filter<S> for Quiet {
    fn enabled(&self, _metadata: &Metadata<'_>, _context: &Context<'_, S>) -> bool {
        true
    }

    fn callsite_enabled(&self, _metadata: &'static Metadata<'static>) -> Interest {
        Interest::always()
    }

    fn event_enabled(&self, event: &Event<'_>, _context: &Context<'_, S>) -> bool {
        let metadata = event.metadata();
        if *metadata.level() > Level::WARN {
            return true;
        }
        let now = Instant::now();
        let mut places = PLACES.lock().unwrap_or_else(PoisonError::into_inner);
        let place = places.entry(metadata.callsite());
        let place = place.or_insert_with(|| Place::new(now));
        if place.admit(now) {
            return true;
        }
        if place.left_out == 1 {
            place.like.clear();
            event.record(&mut Words(&mut place.like));
            LEFT_OUT.notify_one();
        }
        false
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::TRACE)
    }
}

/// Tells what was left out, as long as the agent runs.
pub async fn tell() {
    loop {
        LEFT_OUT.notified().await;
        sleep(WINDOW).await;
        let mut untold = Vec::new();
        {
            let mut places = PLACES.lock().unwrap_or_else(PoisonError::into_inner);
            for place in places.values_mut().filter(|place| place.left_out > 0) {
                untold.push((std::mem::take(&mut place.left_out), place.like.clone()));
            }
        }
        for (left_out, like) in untold {
            warn!(left_out, like, "more lines of one kind were left out");
        }
    }
}

/// Takes the words of an event, which are the same each time, and not its values.
struct Words<'a>(&'a mut String);

impl Visit for Words<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == "message" {
            *self.0 = format!("{value:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Duration, Instant, LINES, Place, WINDOW};

    #[test]
    fn a_flood_is_cut_and_its_rest_counted() {
        let begin = Instant::now();
        let mut place = Place::new(begin);
        let written = (0..1000).filter(|_| place.admit(begin)).count();
        assert_eq!((written as u64, place.left_out), (LINES, 1000 - LINES));
        assert!(!place.admit(begin + WINDOW - Duration::from_millis(1)));
        assert!(place.admit(begin + WINDOW));
        assert_eq!(place.left_out, 1001 - LINES, "until it is told");
    }
}
