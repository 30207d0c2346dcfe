//! Why an attempt to connect failed.
//!
//! The client's events name the kind only ("IO error"); the cause, as a certificate that nobody trusts, it
//! tells the log alone (0.51, `Connector::try_connect`). So a layer of the log listens for it.

use std::fmt::Debug;
use std::sync::{Mutex, PoisonError};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

/// A log filter's words for the client's own lines.
pub const CLIENT_OFF: &str = "async_nats=off";

/// The part of the client that connects.
const CONNECTOR: &str = "async_nats::connector";

/// What was told last, until it is taken.
static LAST: Mutex<Option<String>> = Mutex::new(None);

/// The layer; it needs no filter.
pub fn causes<S: Subscriber + for<'a> LookupSpan<'a>>() -> impl Layer<S> {
    Causes.with_filter(Targets::new().with_target(CONNECTOR, LevelFilter::DEBUG))
}

/// What the client told last of a failure.
pub(super) fn take() -> Option<String> {
    LAST.lock().unwrap_or_else(PoisonError::into_inner).take()
}

struct Causes;

impl<S: Subscriber> Layer<S> for Causes {
    fn on_event(&self, event: &Event<'_>, _context: Context<'_, S>) {
        event.record(&mut Listener);
    }
}

struct Listener;

impl Visit for Listener {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == "error" {
            let words = format!("{value:?}");
            *LAST.lock().unwrap_or_else(PoisonError::into_inner) = Some(words);
        }
    }
}
