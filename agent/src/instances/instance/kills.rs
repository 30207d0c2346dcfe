//! Kills for want of memory, told each with an event of its own, but never more than can be kept.
//!
//! Where a kill does not end the instance (`oom_group: false`), workers may be killed as fast as they are
//! replaced, for as long as the bus is away. So kills are recorded together after a while, and where too many
//! wait for the bus, the newest says how many it stands for. The kernel's counter numbers them: a number
//! that is left out is a kill that is missed.

use super::{Instance, events};
use crate::engine::OomReport;
use crate::instances::output::JobView;
use crate::instances::record::Event;
use container::status::Status;
use messages::outgoing::DropletOom;
use messages::subjects;
use nix::libc::SIGKILL;
use std::time::Duration;
use tokio::time::{Instant, sleep_until};
use tracing::info;

/// How long the end that a kill leads to may take to be known: a status goes through two shells and two
/// helpers, in milliseconds, or on a loaded host a second. Whether the instance survived is told afterwards.
const OUTCOME: Duration = Duration::from_secs(2);

/// Most kills with an event of their own that wait for the bus.
const APART: usize = 64;

/// What an end has to do with the kills that were not told before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EndedBy {
    /// It came by itself: they may be its reason.
    Itself,
    /// We brought it about.
    Us,
}

/// Kills whose outcome is not known yet.
#[derive(Debug, Default)]
pub(super) struct Untold {
    /// With when each has been survived, oldest first.
    reports: Vec<(Instant, OomReport)>,
}

impl Untold {
    fn take_in(&mut self, report: OomReport) {
        if self.reports.len() == APART {
            self.reports.pop();
        }
        self.reports.push((Instant::now() + OUTCOME, report));
    }

    /// Resolves when the oldest has been survived.
    pub(super) async fn due(&self) {
        match self.reports.first() {
            Some((due, _)) => sleep_until(*due).await,
            None => std::future::pending().await,
        }
    }

    /// Takes out those that have been survived `now`.
    fn survived(&mut self, now: Instant) -> Vec<OomReport> {
        let many = self
            .reports
            .iter()
            .take_while(|(due, _)| *due <= now)
            .count();
        let survived = self.reports.drain(..many);
        survived.map(|(_, report)| report).collect()
    }

    fn all(&mut self) -> Vec<OomReport> {
        self.reports.drain(..).map(|(_, report)| report).collect()
    }
}

impl Instance {
    /// Takes note of a kill; `true` if it ends the instance.
    pub(super) async fn out_of_memory(&mut self, report: OomReport) -> bool {
        let ends = self.a_kill_ends_it();
        self.untold.take_in(report);
        if ends {
            self.record.out_of_memory = true;
            let kills = self.untold.all();
            self.tell_kills(kills, false).await;
        }
        ends
    }

    /// Reports those that the instance has survived by now; its end may belong to a later one.
    pub(super) async fn tell_survived_kills(&mut self) {
        let kills = self.untold.survived(Instant::now());
        self.tell_kills(kills, true).await;
    }

    /// Reports all that were not told yet, of an instance whose end is another's doing.
    pub(super) async fn tell_kills_as_survived(&mut self) {
        let kills = self.untold.all();
        self.tell_kills(kills, true).await;
    }

    /// Reports what was not told yet, before the end that follows it.
    pub(super) async fn tell_last_kills(&mut self, by: EndedBy, job: &JobView) {
        if let Some(container) = self.container.clone() {
            let newest = self.untold.reports.last().map(|(_, report)| report.count);
            let known = newest.unwrap_or_default().max(self.record.oom_kills);
            for report in container.oom_now(known).await {
                self.untold.take_in(report);
            }
        }
        if self.untold.reports.is_empty() {
            return;
        }
        let by_itself = by == EndedBy::Itself;
        self.record.out_of_memory |= self.a_kill_ends_it() || by_itself && may_be_killed(job);
        let kills = self.untold.all();
        self.tell_kills(kills, !self.a_kill_ends_it() && !by_itself)
            .await;
    }

    /// Records the events of kills, all at once, and has them said.
    async fn tell_kills(&mut self, kills: Vec<OomReport>, survived: bool) {
        let before = self.record.oom_kills;
        for report in kills {
            // Told already, or another container's.
            let Some(more) = report.count.checked_sub(self.record.oom_kills + 1) else {
                continue;
            };
            self.record.oom_kills = report.count;
            self.world.totals.oom_kills.add(more + 1);
            info!(handle = self.record.handle, victim = ?report.victim, "out of memory");
            let mut oom = events::oom(&self.world, &self.record, &self.message, &report);
            (oom.missed, oom.survived) = (more, survived);
            add(&mut self.record.unsent, oom);
        }
        if self.record.oom_kills != before {
            self.keep().await;
        }
    }

    fn a_kill_ends_it(&self) -> bool {
        self.message.oom_group.unwrap_or(true)
    }
}

/// Whether the job ended as those do who are killed, or nobody knows how.
fn may_be_killed(job: &JobView) -> bool {
    match job.exit {
        Some(Status::Exited(code)) => i32::from(code) == 128 + SIGKILL,
        Some(Status::Signaled(signal)) => signal == SIGKILL,
        Some(Status::Failed { .. }) => false,
        Some(Status::Started { .. }) | None => true,
    }
}

/// Adds a kill to what the bus does not have. If too many are there, it takes the place of the newest, which
/// is never the one that is being said.
fn add(unsent: &mut Vec<Event>, mut oom: DropletOom) {
    let full = unsent.len() >= APART;
    if let Some(event) = unsent.pop_if(|event| full && event.subject == subjects::OOM) {
        let missed = event.body.get("missed").and_then(serde_json::Value::as_u64);
        oom.missed += 1 + missed.unwrap_or_default();
    }
    unsent.push(events::event(subjects::OOM, &oom));
}

#[cfg(test)]
mod tests {
    use super::{APART, OUTCOME, Untold, add, may_be_killed};
    use crate::engine::{Level, OomReport};
    use crate::instances::output::JobView;
    use crate::instances::record::Event;
    use container::status::Status;
    use messages::outgoing::{DropletOom, Victim};
    use std::time::Duration;
    use tokio::time::Instant;

    fn oom(missed: u64, pid: i32) -> DropletOom {
        DropletOom {
            dea: String::new(),
            droplet: String::new(),
            version: String::new(),
            instance: String::new(),
            index: 0,
            handle: String::new(),
            limit_bytes: None,
            usage_bytes: None,
            peak_bytes: None,
            level: String::new(),
            victim: Victim {
                pid: Some(pid),
                comm: None,
            },
            survived: true,
            missed,
            time: 0.0,
        }
    }

    #[test]
    fn each_kill_is_survived_in_its_own_time() {
        let report = |count| OomReport {
            count,
            level: Level::Container,
            victim: None,
            limit_bytes: None,
            peak_bytes: None,
            usage_bytes: None,
        };
        let begun = Instant::now();
        let mut untold = Untold::default();
        untold.take_in(report(1));
        let counts = |reports: Vec<OomReport>| reports.into_iter().map(|one| one.count);
        assert_eq!(counts(untold.survived(begun)).count(), 0);
        let later = Instant::now() + OUTCOME;
        untold
            .reports
            .push((later + Duration::from_secs(1), report(2)));
        assert!(counts(untold.survived(later)).eq([1]));
        assert_eq!(counts(untold.survived(later)).count(), 0);
        assert!(counts(untold.all()).eq([2]));
        assert!(untold.reports.is_empty());
    }

    #[test]
    fn each_kill_is_an_event_or_counted_in_one() {
        let mut unsent = Vec::new();
        let mut kills = 0;
        for number in 0..1000 {
            let missed = u64::from(number % 7 == 0);
            kills += 1 + missed;
            add(&mut unsent, oom(missed, number));
        }
        assert_eq!(unsent.len(), APART);
        let missed = |event: &Event| {
            event
                .body
                .get("missed")
                .map_or(0, |it| it.as_u64().unwrap())
        };
        let told: u64 = unsent.iter().map(|event| 1 + missed(event)).sum();
        assert_eq!(told, kills);
        assert_eq!(unsent[0].body["victim"]["pid"], 0, "it may be on its way");
        assert_eq!(unsent[APART - 1].body["victim"]["pid"], 999);
        assert_eq!(unsent[1].body.get("missed"), None);
    }

    #[test]
    fn who_is_killed_ends_by_sigkill() {
        for (exit, may) in [
            (Some(Status::Exited(137)), true),
            (Some(Status::Signaled(9)), true),
            (None, true),
            (Some(Status::Exited(0)), false),
            (Some(Status::Exited(143)), false),
            (Some(Status::Signaled(11)), false),
        ] {
            let job = JobView {
                exit,
                ..JobView::default()
            };
            assert_eq!(may_be_killed(&job), may, "{exit:?}");
        }
    }
}
