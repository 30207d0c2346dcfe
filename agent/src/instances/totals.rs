//! What has become of this host's instances since its agent began, counted for whoever watches.

use super::outlet::Counter;
use messages::outgoing::Reason;

/// The counts, each once only. Exits and kills count when they are known, before that is recorded, for a disk may never take it;
/// output when the bus has been told that it is missing, or when it goes.
#[derive(Debug, Default)]
pub struct Totals {
    exits: [Counter; Reason::ALL.len()],
    /// Processes that were killed for want of memory.
    pub oom_kills: Counter,
    /// Bytes of output of which readers were told that they are missing, or that went before the bus had them.
    pub missing_output: Counter,
}

impl Totals {
    /// Counts an instance that is no more.
    pub fn count_exit(&self, reason: Reason) {
        let all = Reason::ALL.into_iter().zip(&self.exits);
        for (_, exits) in all.filter(|(each, _)| *each == reason) {
            exits.count();
        }
    }

    /// How many there were of each.
    pub fn exits(&self) -> impl Iterator<Item = (Reason, u64)> {
        let counts = self.exits.iter().map(Counter::value);
        Reason::ALL.into_iter().zip(counts)
    }
}
