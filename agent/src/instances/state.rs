//! What an instance may do next: one pure table.
//!
//! ```text
//!            start           healthy
//!   BORN ───────────▶ STARTING ───────────▶ RUNNING
//!     │                  │  │                │  │
//!     │ stop             │  │ failed, ended  │  │ ended, out of memory
//!     │                  │  └──────▶ CRASHED ◀──┘
//!     ▼        stop      ▼                │     │ stop
//!   STOPPED ◀──────── STOPPING ◀──────────┼─────┘
//!                                         ▼ reaped: gone
//! ```
//!
//! Where the host is emptied, BORN, STARTING and RUNNING become EVACUATING. One that was starting goes on
//! is to serve; it may fail as before. Nothing but an end leads out of EVACUATING. RUNNING fails only by its
//! hook `after_start`.
//!
//! The names are those of the DEA (external state names of heartbeats and `dea.find.droplet`).

use messages::state::State;

/// What happens to an instance, from outside or from its own app.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// It has a task of its own: record it, then make the container.
    Start,
    /// The health check passed.
    Healthy,
    /// A step of the start failed, or the health check did.
    StartFailed,
    /// The job ended, or its container died.
    Ended,
    /// The kernel killed a process for memory, and one kill ends this instance.
    OutOfMemory,
    /// Somebody wants it stopped.
    Stop,
    /// The host is being emptied.
    Evacuate,
    /// Everything of it is gone.
    Gone,
}

/// What is to be done about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// Enter this state, with its effects.
    Enter(State),
    /// Right as it is: a repeated stop, an end that was already known.
    Nothing,
}

/// The whole policy. Pure: it decides, the instance's task does.
#[must_use]
pub fn admit(state: State, ask: Ask) -> Act {
    match (state, ask) {
        (State::Born, Ask::Start) => Act::Enter(State::Starting),
        (State::Starting | State::Resuming, Ask::Healthy) => Act::Enter(State::Running),
        (
            State::Born | State::Starting | State::Resuming | State::Running | State::Evacuating,
            Ask::StartFailed | Ask::Ended | Ask::OutOfMemory,
        ) => Act::Enter(State::Crashed),
        (State::Born | State::Starting | State::Resuming | State::Running, Ask::Evacuate) => {
            Act::Enter(State::Evacuating)
        }
        (
            State::Born | State::Starting | State::Resuming | State::Running | State::Evacuating,
            Ask::Stop,
        ) => Act::Enter(State::Stopping),
        (State::Stopping, Ask::Gone) => Act::Enter(State::Stopped),
        // A stop whose answer got lost is sent again and must not fail; an app that ends while it is
        // being stopped has not crashed; what has ended cannot end again.
        (
            State::Stopping | State::Stopped | State::Crashed,
            Ask::Stop
            | Ask::Ended
            | Ask::OutOfMemory
            | Ask::Healthy
            | Ask::StartFailed
            | Ask::Start
            | Ask::Evacuate
            | Ask::Gone,
        )
        | (State::Born, Ask::Healthy | Ask::Gone)
        | (State::Starting | State::Resuming, Ask::Start | Ask::Gone)
        | (State::Running, Ask::Start | Ask::Healthy | Ask::Gone)
        | (State::Evacuating, Ask::Start | Ask::Healthy | Ask::Evacuate | Ask::Gone) => {
            Act::Nothing
        }
    }
}

/// Whether an instance in `state` holds memory (protocol: the table of states).
#[must_use]
pub fn holds_memory(state: State) -> bool {
    match state {
        State::Born | State::Starting | State::Running | State::Stopping => true,
        State::Stopped | State::Crashed | State::Resuming | State::Evacuating => false,
    }
}

/// Whether an instance in `state` is on its way out, or is out.
#[must_use]
pub fn is_ending(state: State) -> bool {
    match state {
        State::Stopping | State::Stopped | State::Crashed => true,
        State::Born | State::Starting | State::Running | State::Resuming | State::Evacuating => {
            false
        }
    }
}

/// Whether an instance in `state` stands in heartbeats.
#[must_use]
pub fn in_heartbeat(state: State) -> bool {
    match state {
        State::Starting | State::Running | State::Crashed | State::Evacuating => true,
        State::Born | State::Stopping | State::Stopped | State::Resuming => false,
    }
}

#[cfg(test)]
mod tests {
    use super::{Act, Ask, admit};
    use messages::state::State;

    const STATES: [State; 8] = [
        State::Born,
        State::Starting,
        State::Running,
        State::Stopping,
        State::Stopped,
        State::Crashed,
        State::Resuming,
        State::Evacuating,
    ];
    const ASKS: [Ask; 8] = [
        Ask::Start,
        Ask::Healthy,
        Ask::StartFailed,
        Ask::Ended,
        Ask::OutOfMemory,
        Ask::Stop,
        Ask::Evacuate,
        Ask::Gone,
    ];

    /// The whole table, one row a state, one letter an ask in the order of `ASKS`:
    /// `s`tarting, `r`unning, `c`rashed, `p` stopping, `d` stopped, `e`vacuating, `-` nothing.
    #[test]
    fn the_table_is_this_one() {
        let rows = [
            "s-cccpe-", "-rcccpe-", "--cccpe-", "-------d", "--------", "--------", "-rcccpe-",
            "--cccp--",
        ];
        for (state, row) in STATES.into_iter().zip(rows) {
            let told: String = ASKS
                .into_iter()
                .map(|ask| match admit(state, ask) {
                    Act::Enter(State::Starting) => 's',
                    Act::Enter(State::Running) => 'r',
                    Act::Enter(State::Crashed) => 'c',
                    Act::Enter(State::Stopping) => 'p',
                    Act::Enter(State::Stopped) => 'd',
                    Act::Enter(State::Evacuating) => 'e',
                    Act::Enter(State::Born | State::Resuming) => '?',
                    Act::Nothing => '-',
                })
                .collect();
            assert_eq!(told, row, "{state:?}");
        }
    }

    #[test]
    fn nothing_leaves_stopped_or_crashed() {
        for state in [State::Stopped, State::Crashed] {
            for ask in ASKS {
                assert_eq!(admit(state, ask), Act::Nothing);
            }
        }
    }
}
