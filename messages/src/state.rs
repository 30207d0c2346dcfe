//! The states of an instance, by the names that the whole protocol uses.

use serde::{Serialize, Serializer};

/// A state; the names are upper case on the wire and parsed in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// Accepted.
    Born,
    /// Its container is being made, or its app has not proved healthy.
    Starting,
    /// Healthy, and routed to.
    Running,
    /// On its way out, on request.
    Stopping,
    /// Out, on request.
    Stopped,
    /// Out, by itself.
    Crashed,
    /// Being taken over by a new agent.
    Resuming,
    /// Still serving while the host is being emptied.
    Evacuating,
}

impl State {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Born,
        Self::Starting,
        Self::Running,
        Self::Stopping,
        Self::Stopped,
        Self::Crashed,
        Self::Resuming,
        Self::Evacuating,
    ];

    /// The name on the wire.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Born => "BORN",
            Self::Starting => "STARTING",
            Self::Running => "RUNNING",
            Self::Stopping => "STOPPING",
            Self::Stopped => "STOPPED",
            Self::Crashed => "CRASHED",
            Self::Resuming => "RESUMING",
            Self::Evacuating => "EVACUATING",
        }
    }

    /// The state of this name, in any case.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|state| state.name().eq_ignore_ascii_case(name))
    }
}

impl Serialize for State {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::State;

    #[test]
    fn names_are_read_in_any_case() {
        for state in State::ALL {
            assert_eq!(State::parse(state.name()), Some(state));
            assert_eq!(State::parse(&state.name().to_lowercase()), Some(state));
        }
        assert_eq!(State::parse("FLAPPING"), None);
    }
}
