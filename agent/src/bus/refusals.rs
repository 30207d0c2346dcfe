//! What the server refuses to take from this host.
//!
//! A message that the host has no permission for is dropped by the server, which says so (`-ERR`) and
//! goes on: a barrier that is sent after it comes back all the same. So whoever waits for a barrier is
//! told here whether anything of his own was refused before it.
//!
//! The refusal comes before the barrier on the connection, but by another way out of the client: as an
//! event. Both ways end in tasks of the bus' own thread, whose runtime takes its tasks in the order in
//! which they were woken. So whoever has got the barrier, and then lets all others take their turn, has
//! the refusals of everything before it. Some may be of what was said after it: whom they hit says it again.

use crate::instances::outlet::Counter;
use std::collections::HashSet;
use std::mem;
use std::sync::{Mutex, PoisonError};

/// With so many between two barriers the client may have dropped others (it keeps 128 events, 0.51).
const CROWD: usize = 64;

/// So many kinds of subjects are complained of by name on one connection.
const NAMED: usize = 256;

/// All refusals.
#[derive(Debug)]
pub(super) struct Refusals {
    counter: Counter,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Since the last barrier.
    now: Vec<Refusal>,
    /// Since the one before it.
    before: Vec<Refusal>,
    told: HashSet<String>,
}

/// Which one it was, and of what; of everything if that is not known.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Refusal {
    number: u64,
    subject: Option<String>,
}

/// What stood before a barrier and was refused.
#[derive(Debug)]
pub(super) struct Verdict(Vec<Refusal>);

impl Refusals {
    /// None yet; `counter` counts them for those who will wait.
    pub(super) fn new(counter: Counter) -> Self {
        let state = Mutex::default();
        Self { counter, state }
    }

    /// Something was refused. Whether nothing of its kind was before, on this connection.
    pub(super) fn note(&self, subject: &str) -> bool {
        let mut state = self.lock();
        let number = self.counter.count();
        if state.now.len() < CROWD {
            let subject = Some(subject.to_owned());
            state.now.push(Refusal { number, subject });
        } else {
            let subject = None;
            state.now.truncate(CROWD);
            state.now.push(Refusal { number, subject });
        }
        state.is_new(kind(subject))
    }

    /// Whether `words` of the server were not heard before on this connection.
    pub(super) fn is_new(&self, words: &str) -> bool {
        self.lock().is_new(words.to_owned())
    }

    /// A barrier is back, and all others had their turn since.
    pub(super) fn barrier(&self) -> Verdict {
        let mut state = self.lock();
        let now = mem::take(&mut state.now);
        let before = mem::replace(&mut state.before, now.clone());
        Verdict([before, now].concat())
    }

    /// A new connection: nothing was said on it yet.
    pub(super) fn forget(&self) {
        *self.lock() = State::default();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn is_new(&mut self, what: String) -> bool {
        self.told.len() < NAMED && self.told.insert(what)
    }
}

impl Verdict {
    /// Whether anything on the subject `about` or below it was refused after the first `since` refusals.
    pub(super) fn hits(&self, about: &str, since: u64) -> bool {
        let below = |subject: &str| {
            let rest = subject.strip_prefix(about);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        let mut refusals = self.0.iter().filter(|refusal| refusal.number > since);
        refusals.any(|refusal| refusal.subject.as_deref().is_none_or(below))
    }
}

/// The subject in the server's words for a message that it did not take; `None` for other words.
pub(super) fn refused(words: &str) -> Option<&str> {
    let (_, after) = words.split_once("Permissions Violation for Publish to \"")?;
    let (subject, _) = after.split_once('"')?;
    Some(subject)
}

/// What is complained of once: an app's output and an answer have subjects without end.
fn kind(subject: &str) -> String {
    let tokens: Vec<&str> = subject.split('.').collect();
    match tokens.as_slice() {
        ["droplet", "output", ..] => "droplet.output.>".into(),
        [first, ..] if first.starts_with('_') => format!("{first}.>"),
        _ => subject.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::{CROWD, Refusals, refused};
    use crate::instances::outlet::Counter;

    #[test]
    fn a_refusal_hits_whoever_said_it_and_nobody_else() {
        let refusals = Refusals::new(Counter::default());
        assert!(refusals.note("droplet.output.a.0.h.stdout"));
        assert!(!refusals.note("droplet.output.a.1.i.stdout"), "it was told");
        let first = refusals.barrier();
        assert!(first.hits("droplet.output.a.0.h", 0));
        assert!(
            !first.hits("droplet.output.a.0.h", 2),
            "that was said later"
        );
        assert!(!first.hits("droplet.exited", 0));
        assert!(!first.hits("droplet.output.a.0.hh", 0));
        // It may have been of what was said after the first barrier.
        assert!(refusals.barrier().hits("droplet.output.a.0.h", 0));
        assert!(!refusals.barrier().hits("droplet.output.a.0.h", 0));
    }

    #[test]
    fn of_a_crowd_everybody_is_hit() {
        let refusals = Refusals::new(Counter::default());
        let told = (0..=CROWD).filter(|_| refusals.note("dea.heartbeat"));
        assert_eq!(told.count(), 1);
        assert!(refusals.barrier().hits("droplet.exited", 0));
        assert!(refusals.note("x"));
        refusals.forget();
        assert!(!refusals.barrier().hits("x", 0));
    }

    #[test]
    fn the_servers_words_are_understood() {
        let words = "Permissions Violation for Publish to \"droplet.exited\"";
        assert_eq!(refused(words), Some("droplet.exited"));
        assert_eq!(
            refused("Permissions Violation for Subscription to \"dea.stop\""),
            None
        );
    }
}
