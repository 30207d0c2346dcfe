//! What was asked of this host, counted for the services API.

use crate::instances::outlet::{Counter, Outlet};
use crate::instances::world::{World, now, whole_seconds};
use messages::reply::{ErrorCode, Reply};
use messages::service::{Counts, Data, Host, Identity, NAME};
use messages::subjects::Incoming;
use messages::trace::Trace;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use tokio::time::Instant;

/// A request from its arrival to its answer.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) incoming: Incoming,
    pub(super) begun: Instant,
    pub(super) reply_to: Option<String>,
    /// What it came with, and what its answers go back with.
    pub(super) trace: Option<Trace>,
}

/// Counts since the agent began.
#[derive(Debug)]
pub struct Tally {
    /// Seconds since the epoch.
    pub since: u64,
    counts: Mutex<Vec<(Incoming, Counts)>>,
    refused: [Counter; ErrorCode::ALL.len()],
}

impl Tally {
    /// From now on.
    #[must_use]
    pub fn begin() -> Self {
        let none = |incoming| (incoming, Counts::default());
        Self {
            since: whole_seconds(now()),
            counts: Mutex::new(Incoming::answered().map(none).collect()),
            refused: Default::default(),
        }
    }

    /// Counts a request as answered. A query is never answered by an error, but one that was not understood is
    /// counted as one.
    pub(super) fn count(&self, call: &Call, reply: Option<&Reply>) {
        let took = u64::try_from(call.begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let error = match reply {
            Some(Reply::Error { code, message }) => {
                self.count_refused(*code);
                Some(format!("{}: {message}", code.facts().0))
            }
            Some(Reply::Ok(_)) | None => None,
        };
        let mut all = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let this = all
            .iter_mut()
            .find(|(incoming, _)| *incoming == call.incoming);
        if let Some((_, counts)) = this {
            counts.num_requests += 1;
            counts.processing_time = counts.processing_time.saturating_add(took);
            if let Some(error) = error {
                counts.num_errors += 1;
                counts.last_error = error;
            }
        }
    }

    fn count_refused(&self, code: ErrorCode) {
        let all = ErrorCode::ALL.into_iter().zip(&self.refused);
        for (_, refused) in all.filter(|(each, _)| *each == code) {
            refused.count();
        }
    }

    /// How many requests were refused with each code.
    pub fn refused(&self) -> impl Iterator<Item = (ErrorCode, u64)> {
        let counts = self.refused.iter().map(Counter::value);
        ErrorCode::ALL.into_iter().zip(counts)
    }

    /// In the order of [`Incoming::answered`].
    #[must_use]
    pub fn counts(&self) -> Vec<Counts> {
        let all = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().map(|(_, counts)| counts.clone()).collect()
    }
}

/// What is told beside the counts; `spooled` and `host` as far as they are known.
pub(super) fn data(outlet: &Outlet, spooled: Option<u64>, host: Option<Host>) -> Data {
    Data {
        dropped: outlet.drops().value(),
        spooled,
        host,
    }
}

/// Who this host is, for whoever asks all services.
pub(super) fn identity(world: &World) -> Identity {
    let mut metadata = BTreeMap::from([
        ("zone", world.config.zone.clone()),
        ("arch", std::env::consts::ARCH.to_owned()),
        ("ip", world.engine.local_ip().to_string()),
    ]);
    let read = |name: &str| std::fs::read_to_string(format!("/proc/sys/kernel/{name}")).ok();
    for (key, name) in [("kernel", "osrelease"), ("hostname", "hostname")] {
        if let Some(text) = read(name) {
            metadata.insert(key, text.trim().to_owned());
        }
    }
    Identity {
        name: NAME,
        id: world.id.clone(),
        version: crate::VERSION,
        metadata,
    }
}

#[cfg(test)]
mod tests {
    use super::data;
    use crate::instances::outlet::outlet;
    use serde_json::json;

    #[test]
    fn what_was_dropped_is_told_also_by_a_busy_host() {
        let (outlet, inlet) = outlet();
        inlet.dropped.count();
        inlet.dropped.count();
        let told = |spooled| serde_json::to_value(data(&outlet, spooled, None)).unwrap();
        assert_eq!(told(None), json!({"dropped": 2}));
        assert_eq!(told(Some(7)), json!({"dropped": 2, "spooled": 7}));
    }
}
