//! What this host still does, from serving to parting; and how it is emptied.
//!
//! An evacuation is kept on disk before anything is said of it: whoever ordered it waits for the agent's
//! end, and an agent that came back meanwhile and took starts would have them cut off. It holds for one
//! boot of the kernel, for a host that was emptied and booted shall serve again (docs/adr/0015).

use super::{Duration, Instant, Interval, Stable, State, World, ticks_from};
use crate::host::blocking;
use crate::instances::record::{StopReason, write_durably};
use crate::instances::state::{Act, Ask, admit};
use crate::instances::world::since_boot;
use serde::{Deserialize, Serialize};
use std::path::Path;
use tokio::time::timeout;
use tracing::{error, info, warn};

/// The file below the base directory that says that this host is being emptied.
pub const KEPT: &str = "evacuation";

/// Most between two heartbeats of an evacuation (DEA: 5 s).
const EVACUATION_BEAT: Duration = Duration::from_secs(5);

/// Most time that the disk may take to keep an evacuation: whoever ordered it waits.
const KEEPING: Duration = Duration::from_secs(2);

/// What this host does. Each is more than the ones before it, and there is no way back but the agent's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Duty {
    /// Everything.
    Serving,
    /// It takes no starts and does not offer itself; its instances run on.
    Drained,
    /// As drained, and its instances are EVACUATING: they serve until others have taken their places. When
    /// none is left, or after `evacuation.bail_out`, the agent ends.
    Evacuating,
    /// The goodbye is said, the agent ends.
    Parting(Farewell),
}

/// How the agent goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Farewell {
    /// Apps run on for the next agent.
    Leave,
    /// The host is empty, or was given time enough: as a shutdown, told as an evacuation.
    Evacuated,
    /// Apps are stopped, nothing stays.
    Shutdown,
}

impl Farewell {
    /// Why what still runs is stopped, if it is.
    #[must_use]
    pub fn stops(self) -> Option<StopReason> {
        match self {
            Self::Leave => None,
            Self::Evacuated => Some(StopReason::Evacuation),
            Self::Shutdown => Some(StopReason::Shutdown),
        }
    }
}

/// [`KEPT`], JSON.
#[derive(Debug, Serialize, Deserialize)]
struct Evacuation {
    /// The kernel's boot id when it began.
    boot_id: String,
    /// When it began, in seconds since that boot.
    since: f64,
}

/// How long an evacuation that an earlier life of the agent began may still take, if there is one.
async fn kept(world: &World) -> Option<Duration> {
    let path = world.config.base.join(KEPT);
    let read = blocking(move || std::fs::read(&path)).await.ok()?;
    let left = left(&read, &world.boot_id, world.config.bail_out, since_boot());
    left.unwrap_or_else(|error| {
        error!(%error, "whether this host was being emptied is not known: send USR2 again if so");
        None
    })
}

/// What is left at `now`, in seconds since the boot, of the evacuation that [`KEPT`] tells of, if it began in this boot and may take `all`.
///
/// # Errors
/// If it is not understood.
pub fn left(
    kept: &[u8],
    boot_id: &str,
    all: Duration,
    now: f64,
) -> serde_json::Result<Option<Duration>> {
    let begun: Evacuation = serde_json::from_slice(kept)?;
    Ok((begun.boot_id == boot_id).then(|| rest(all, now - begun.since)))
}

async fn keep(world: &World) {
    let begun = Evacuation {
        boot_id: world.boot_id.clone(),
        since: since_boot(),
    };
    let base = world.config.base.clone();
    let kept = blocking(move || write(&base, &begun)).await;
    if let Err(error) = kept {
        error!(%error, "an agent that replaces this one will not go on evacuating");
    }
}

fn write(base: &Path, begun: &Evacuation) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let bytes = serde_json::to_vec(begun)?;
    Ok(write_durably(base, KEPT, &bytes)?)
}

/// What is left of `all` after so many seconds.
fn rest(all: Duration, seconds: f64) -> Duration {
    let gone = Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(all);
    all.saturating_sub(gone)
}

impl Stable {
    /// Does what `duty` asks for, which is more than was done before.
    pub(super) async fn take_up(&mut self, duty: Duty) {
        info!(?duty, "takes no starts any more");
        if duty == Duty::Evacuating {
            if timeout(KEEPING, keep(&self.world)).await.is_err() {
                error!("the disk hangs: an agent that replaces this one may not go on evacuating");
            }
            self.evacuate(self.world.config.bail_out);
        }
        self.duty = duty;
        self.goodbye();
        self.tell_evacuation();
    }

    /// Does so, if an earlier life of the agent did.
    pub(super) async fn go_on_evacuating(&mut self) {
        if let Some(rest) = kept(&self.world).await {
            info!("goes on evacuating");
            self.evacuate(rest);
        } else if self.is_left_evacuating() {
            // It could not be kept, but its instances know: nothing else leads out of that state.
            warn!("goes on evacuating, as its instances do; since when is not known");
            self.evacuate(self.world.config.bail_out);
        }
    }

    /// Whether an instance of this boot is EVACUATING.
    fn is_left_evacuating(&self) -> bool {
        let mut records = self.stalls.values().map(|stall| &stall.view.record);
        records
            .any(|record| record.state == State::Evacuating && record.boot_id == self.world.boot_id)
    }

    /// Every instance that is here shall be EVACUATING, and gone within `rest`.
    fn evacuate(&mut self, rest: Duration) {
        self.duty = Duty::Evacuating;
        self.bail_out = Some(Instant::now() + rest);
        self.evacuation_untold = true;
        let handles: Vec<String> = self.stalls.keys().cloned().collect();
        for handle in handles {
            self.want(&handle, |wants| wants.evacuate = true);
        }
    }

    /// Says in one heartbeat for all that they are EVACUATING, once they are.
    pub(super) fn tell_evacuation(&mut self) {
        let settled = |state| admit(state, Ask::Evacuate) == Act::Nothing;
        let mut states = self.stalls.values().map(|stall| stall.view.record.state);
        if self.evacuation_untold && states.all(settled) {
            self.evacuation_untold = false;
            self.heartbeats.soon();
        }
    }

    /// Whether an evacuation is over, because nothing is left or its time is up. Crashed instances are kept
    /// as long as others serve; then they leave, each when the bus has all of it.
    pub(super) fn is_evacuated(&self) -> bool {
        let ended = |state| match state {
            State::Stopped | State::Crashed => true,
            State::Born
            | State::Starting
            | State::Running
            | State::Stopping
            | State::Resuming
            | State::Evacuating => false,
        };
        if self.duty != Duty::Evacuating {
            return false;
        }
        let mut stalls = self.stalls.values();
        if self.bail_out.is_none() || !stalls.all(|stall| ended(stall.view.record.state)) {
            return self.bail_out.is_none();
        }
        for (handle, stall) in &self.stalls {
            if !stall.reins.wants.borrow().reap {
                self.want(handle, |wants| wants.reap = true);
            }
        }
        self.stalls.is_empty()
    }

    /// The time for an evacuation is up.
    pub(super) fn bail_out(&mut self) {
        self.bail_out = None;
        warn!(
            left = self.stalls.len(),
            "the evacuation takes too long: what is left is stopped (`evacuation.bail_out`)"
        );
    }

    /// When heartbeats are due from now on, whatever happens.
    pub(super) fn beats(&self) -> Interval {
        let usual = self.world.config.intervals.heartbeat;
        let pause = match self.duty {
            Duty::Serving | Duty::Drained | Duty::Parting(_) => usual,
            Duty::Evacuating => usual.min(EVACUATION_BEAT),
        };
        ticks_from(Instant::now() + pause, pause)
    }
}

#[cfg(test)]
mod tests {
    use super::{Duty, Farewell, rest};
    use std::time::Duration;

    #[test]
    fn there_is_no_way_back() {
        let parting = Duty::Parting(Farewell::Leave);
        let all = [Duty::Serving, Duty::Drained, Duty::Evacuating, parting];
        assert!(all.is_sorted());
    }

    #[test]
    fn an_evacuation_has_its_time_once_whatever_the_clock_does() {
        let all = Duration::from_secs(600);
        for (seconds, left) in [
            (0.0, 600),
            (599.0, 1),
            (601.0, 0),
            (f64::MAX, 0),
            (f64::NAN, 600),
            (-3600.0, 600),
        ] {
            assert_eq!(rest(all, seconds), Duration::from_secs(left), "{seconds}");
        }
    }
}
