//! From whatever ended an instance to nothing left of it.
//!
//! Always in this order: the routes and the state; the processes; the job's last bytes and offsets;
//! kills that were not told; the one `droplet.exited`; of a crash, what is kept of it; and, when the bus has all of it,
//! what is on disk.

use super::hooks::Hook;
use super::kills::EndedBy;
use super::{Event, Instance, events, job_is, start};
use crate::chain;
use crate::engine::{Container, EngineError};
use crate::host::scribe::UNANSWERED;
use crate::instances::output::JobView;
use crate::instances::record::{Entry, Exit, StopReason};
use crate::instances::state::Ask;
use crate::instances::world::now;
use container::status::Status;
use messages::state::State;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::{error, info, warn};

/// How long the dead may take to close their pipes and their supervisor to write the end.
const LAST_BYTES: Duration = Duration::from_secs(5);

/// How long an init may take to say how its job ended. One that is frozen does not.
const INIT_ANSWERS: Duration = Duration::from_secs(1);

/// How long a killed job may take to be reported, before its container is killed.
const LAST_STATUS: Duration = Duration::from_secs(2);

/// Between two looks whether anybody is left whose grace is not over; the first come sooner.
const LEFT_PAUSE: Duration = Duration::from_millis(100);

/// Between two TERMs to whoever is left.
const TERM_AGAIN: Duration = Duration::from_secs(1);

/// Between two tries to kill what waits in the kernel.
const STUCK_PAUSE: Duration = Duration::from_secs(5);

/// Between the first two tries to remove a container, and then twice as long each time up to a minute.
const DESTROY_PAUSE: Duration = Duration::from_secs(1);
const DESTROY_PAUSE_MOST: Duration = Duration::from_secs(60);

/// Most characters of a failure that `exit_description` repeats.
const DESCRIPTION_MAX: usize = 500;

/// Why an app is killed that does not open its port.
pub(super) const UNHEALTHY: &str = "failed to accept connections within health check timeout";

/// Why an app is killed that opened its port and listens there no longer.
pub(super) const DEAF: &str = "stopped listening on its port";

/// How an app ends that is stopped before it runs.
const NEVER_RAN: &str = "stopped before it ran";

/// What ended it.
#[derive(Debug)]
pub(super) enum End {
    /// A stop is recorded.
    Stop,
    /// The job ended, or its container died.
    Ended,
    /// The kernel killed for memory.
    OutOfMemory,
    /// A step of the start failed, in words.
    Failed(String),
    /// The health check's time was up.
    Unhealthy,
    /// It opened its port, and listens there no longer.
    Deaf,
    /// It died while no agent looked, in words, if somebody knows.
    Died(Option<String>),
    /// Its end is recorded already; only what follows it is left to do.
    Known,
}

impl Instance {
    /// Brings the end about, and stays until nothing is left to do.
    pub(super) async fn finish(mut self, end: End) {
        // If it never came to a container.
        self.place = None;
        if self.record.exit.is_none() {
            if matches!(end, End::Stop) {
                self.stop().await;
            } else {
                self.crash(end).await;
            }
        }
        if self.record.state == State::Crashed && !self.leaves_nothing() {
            self.keep_last_words().await;
        }
        self.settle().await;
        self.count_what_is_lost().await;
        self.destroy().await;
        // An exit is small: it waits for the bus as long as it takes.
        self.events_said().await;
        if self.record.state == State::Crashed {
            self.keep_for_asking().await;
        }
        self.gone().await;
    }

    async fn stop(&mut self) {
        self.close_route();
        self.enter(Ask::Stop).await;
        self.tell_kills_as_survived().await;
        let grace = self
            .record
            .stopping
            .as_ref()
            .map_or(0.0, |stopping| stopping.grace);
        if let (Some(container), true) = (self.container.clone(), self.record.spawned) {
            self.routers_hear().await;
            self.stop_hook(Hook::BeforeStop).await;
            if let Err(error) = container.signal(nix::libc::SIGTERM).await {
                warn!(handle = self.record.handle, error = %chain(&error), "TERM could not be sent");
            }
            let grace = Duration::try_from_secs_f64(grace).unwrap_or(LAST_BYTES);
            if !self.everybody_ends_within(grace, &container).await {
                info!(handle = self.record.handle, "killed after its grace");
                self.kill_job().await;
            }
            self.stop_hook(Hook::AfterStop).await;
        }
        let words = (!self.record.spawned).then(|| NEVER_RAN.to_owned());
        self.bury(words, EndedBy::Us).await;
        self.enter(Ask::Gone).await;
    }

    async fn crash(&mut self, end: End) {
        // First of all, so that nobody sends the router to a dead port, whatever is waited for.
        self.close_route();
        let ask = match end {
            End::Failed(_) | End::Unhealthy => Ask::StartFailed,
            End::OutOfMemory => Ask::OutOfMemory,
            End::Stop | End::Ended | End::Deaf | End::Died(_) | End::Known => Ask::Ended,
        };
        let by = match end {
            End::Ended | End::Died(_) => EndedBy::Itself,
            End::Stop
            | End::OutOfMemory
            | End::Failed(_)
            | End::Unhealthy
            | End::Deaf
            | End::Known => EndedBy::Us,
        };
        // The rest goes with the one that the kernel killed; and the job's own status comes first.
        let kills = matches!(end, End::OutOfMemory | End::Unhealthy | End::Deaf);
        let words = match end {
            End::Failed(why) => {
                warn!(handle = self.record.handle, why, "a start failed");
                Some(describe_failure(&why))
            }
            End::Unhealthy => Some(UNHEALTHY.to_owned()),
            End::Deaf => Some(DEAF.to_owned()),
            End::Died(reason) => reason,
            End::Stop | End::Ended | End::OutOfMemory | End::Known => None,
        };
        self.record.failure = words.clone();
        self.enter(ask).await;
        if kills {
            self.kill_job().await;
        }
        self.bury(words, by).await;
    }

    /// Ends every process, learns the job's status and offsets, records and announces the exit.
    async fn bury(&mut self, words: Option<String>, by: EndedBy) {
        let mut known = None;
        if let Some(container) = self.container.clone() {
            known = self.known_to_init(&container).await;
            self.kill_all(&container).await;
            self.last_bytes().await;
        }
        let mut job = self.job.borrow().clone();
        job.exit = job.exit.or(known);
        self.tell_last_kills(by, &job).await;
        // What ended by itself meanwhile was not killed for it.
        let of_looks = |words: &String| [DEAF, UNHEALTHY].contains(&words.as_str());
        let words = words.filter(|words| !of_looks(words) || !ended_by_itself(&job));
        let exit = exit(&job, words, self.record.out_of_memory, now());
        info!(
            handle = self.record.handle,
            droplet = %self.message.droplet,
            index = self.message.index,
            status = exit.status,
            signal = exit.signal,
            why = exit.description,
            "ended"
        );
        self.record.exit = Some(exit);
        let reason = events::reason(&self.record);
        self.world.totals.count_exit(reason);
        let event = events::exited(&self.view(), job.end);
        self.announce(event).await;
        self.tell();
    }

    /// How its job ended, if that is not known otherwise yet: its init takes that with it.
    async fn known_to_init(&mut self, container: &Container) -> Option<Status> {
        if !self.record.spawned || self.job.borrow().exit.is_some() {
            return None;
        }
        let asked = timeout(INIT_ANSWERS, container.job_end(start::JOB));
        self.hear_while(asked).await.ok()?
    }

    /// Stays until every process is dead: nothing may be called stopped before.
    async fn kill_all(&mut self, container: &Container) {
        while let Err(error) = self.hear_while(container.kill()).await {
            error!(handle = self.record.handle, error = %chain(&error), "not everything is dead");
            if !matches!(error, EngineError::Stuck { .. }) {
                break;
            }
            // Whoever waits for the end is not kept waiting.
            self.stuck = Some(error.to_string());
            self.tell();
            self.hear_for(STUCK_PAUSE).await;
        }
        self.stuck = None;
    }

    /// A job is over when its first process is, often a shell; what it has started has its grace, too. Who outlives it
    /// is told again each second, as by Warden: a shell loses the TERM that comes to a child between fork and exec.
    async fn everybody_ends_within(&mut self, limit: Duration, container: &Container) -> bool {
        let deadline = Instant::now() + limit;
        if !self.job_ends_within(limit).await {
            return false;
        }
        let left = async {
            let (mut pause, mut again) = (Duration::from_millis(1), Instant::now() + LEFT_PAUSE);
            while !container.is_idle().await {
                if Instant::now() >= again {
                    if let Err(error) = container.signal(nix::libc::SIGTERM).await {
                        warn!(handle = container.handle(), error = %chain(&error), "TERM could not be sent again");
                    }
                    again = Instant::now() + TERM_AGAIN;
                }
                sleep(pause).await;
                pause = (pause * 2).min(LEFT_PAUSE);
            }
        };
        self.hear_while(timeout_at(deadline, left)).await.is_ok()
    }

    async fn job_ends_within(&mut self, limit: Duration) -> bool {
        let (mut job, container) = (self.job.clone(), self.container.clone());
        let either = async move {
            tokio::select! {
                () = job_is(&mut job, JobView::over) => {}
                () = super::died(container) => {}
            }
        };
        self.hear_while(timeout(limit, either)).await.is_ok()
    }

    /// KILL to every process of the job: its init lives on and tells the status.
    async fn kill_job(&mut self) {
        let Some(container) = self.container.clone() else {
            return;
        };
        match container.signal(nix::libc::SIGKILL).await {
            Ok(()) => drop(self.job_ends_within(LAST_STATUS).await),
            Err(error) => {
                warn!(handle = self.record.handle, error = %chain(&error), "KILL could not be sent")
            }
        }
    }

    async fn last_bytes(&mut self) {
        let mut job = self.job.clone();
        let ended = async move {
            job_is(&mut job, |job| job.end.is_some() || job.lost.is_some()).await;
        };
        if self.record.spawned && self.hear_while(timeout(LAST_BYTES, ended)).await.is_err() {
            warn!(
                handle = self.record.handle,
                "the end of the output is unknown"
            );
        }
    }

    /// Waits until the bus has everything. Output takes room, so it waits no longer than a crash is
    /// kept; what is missing then shows in the offsets of the exit.
    async fn settle(&mut self) {
        let deadline = Instant::now() + self.world.config.instance.crash_lifetime;
        while !self.output_said() || !self.record.unsent.is_empty() {
            if !self.hear_until(deadline).await {
                return;
            }
        }
    }

    /// Of the output that goes now, names what the bus has not.
    async fn count_what_is_lost(&mut self) {
        let job = self.job.borrow().clone();
        if !self.record.spawned || job.delivered && job.lost.is_none() {
            return;
        }
        let world = Arc::clone(&self.world);
        let handle = self.record.handle.clone();
        let counted = world.depth.of_one(&handle, super::PATIENCE);
        let bytes = self.hear_while(counted).await;
        if bytes == Some(0) {
            return;
        }
        world.totals.missing_output.add(bytes.unwrap_or_default());
        let (droplet, index) = (&self.message.droplet, self.message.index);
        match bytes {
            Some(bytes) => {
                warn!(handle, %droplet, index, bytes, "output is dropped that the bus did not take in time");
            }
            None => {
                warn!(handle, %droplet, index, "output is dropped that the bus did not take in time, nobody knows how much");
            }
        }
    }

    async fn events_said(&mut self) {
        while !self.record.unsent.is_empty() || !self.unheard.is_empty() {
            let event = self.heard().await;
            self.see_to(event).await;
        }
    }

    fn output_said(&self) -> bool {
        !self.followed || self.container.is_none() || self.job.borrow().delivered
    }

    /// Sees to whatever comes until `work` is done.
    pub(super) async fn hear_while<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        loop {
            let event = tokio::select! {
                // What is waited for first: what comes can be seen to later.
                biased;
                done = &mut work => return done,
                event = self.heard() => event,
            };
            self.see_to(event).await;
        }
    }

    /// Sees to whatever comes, for so long.
    async fn hear_for(&mut self, time: Duration) {
        let deadline = Instant::now() + time;
        while self.hear_until(deadline).await {}
    }

    /// Sees to what comes next; `false` if nothing does.
    async fn hear_until(&mut self, deadline: Instant) -> bool {
        match timeout_at(deadline, self.heard()).await {
            // Never given up half-way: it may be writing the record.
            Ok(event) => self.see_to(event).await,
            Err(_) => return false,
        }
        true
    }

    /// What comes next.
    async fn heard(&mut self) -> Event {
        let undelivered = !self.output_said();
        tokio::select! {
            Ok(()) = self.wants.changed() => Event::Wants,
            Some(()) = self.announcer.confirmed() => Event::Confirmed,
            () = self.unheard.heard() => Event::Heard,
            () = job_is(&mut self.job, |job| job.delivered), if undelivered => Event::Wants,
            Some(query) = self.queries.recv() => Event::Query(query),
            outcome = self.scribe.landed() => Event::Landed(outcome),
            () = super::save_again(self.unrecorded.as_ref()) => Event::Unrecorded,
        }
    }

    async fn see_to(&mut self, event: Event) {
        match event {
            Event::Confirmed => self.confirmed().await,
            Event::Heard => self.route_heard().await,
            Event::Query(query) => self.answer(query).await,
            // An update is for every state.
            Event::Wants => self.apply_wants().await,
            Event::Landed(outcome) => self.recorded(Some(outcome)),
            Event::Unrecorded => self.keep().await,
            Event::OutOfMemory(_) | Event::Survived | Event::Ended => {}
        }
    }

    /// Whether the host keeps nothing of it: it shuts down.
    fn leaves_nothing(&self) -> bool {
        let wants = self.wants.borrow();
        let reason = wants.stop.as_ref().map(|stopping| stopping.reason);
        reason.is_some_and(|reason| match reason {
            StopReason::Shutdown | StopReason::Evacuation => true,
            StopReason::Stopped => false,
        })
    }

    /// Keeps the ends of what it wrote. A full disk, or one that hangs, keeps nothing else from being done.
    async fn keep_last_words(&mut self) {
        let Some(container) = self.container.clone().filter(|_| self.record.spawned) else {
            return;
        };
        let saved = self.record.container.as_ref();
        let clean = saved.is_some_and(|saved| saved.boot_id == self.world.boot_id);
        let (crashes, crash) = (self.world.crashes.clone(), events::crash(&self.view()));
        let mut keeping = pin!(crashes.keep(crash, &container, start::JOB, clean));
        let kept = loop {
            tokio::select! {
                kept = &mut keeping => break kept,
                event = self.heard() => self.see_to(event).await,
            }
        };
        if let Err(why) = kept {
            warn!(
                handle = self.record.handle,
                why, "what a crash left is not kept"
            );
        }
    }

    async fn destroy(&mut self) {
        let mut pause = DESTROY_PAUSE;
        loop {
            let destroyed = match (self.container.clone(), self.record.container.clone()) {
                (Some(container), _) => self.hear_while(container.destroy()).await,
                (None, Some(saved)) => {
                    let engine = self.world.engine.clone();
                    self.hear_while(engine.destroy_handle(&saved)).await
                }
                (None, None) => return,
            };
            let Err(error) = destroyed else { break };
            // As long as something of it is there, its addresses are taken and its record stays.
            error!(handle = self.record.handle, error = %chain(&error), "a container is not removed yet");
            self.hear_for(pause).await;
            pause = (pause * 2).min(DESTROY_PAUSE_MOST);
        }
        self.container = None;
        self.record.container = None;
        self.record.port = None;
        self.keep().await;
        self.tell();
    }

    /// A crash stays in heartbeats until it is old or somebody wants it gone.
    async fn keep_for_asking(&mut self) {
        let age =
            Duration::try_from_secs_f64(now() - self.record.state_timestamp).unwrap_or_default();
        let rest = self
            .world
            .config
            .instance
            .crash_lifetime
            .saturating_sub(age);
        let deadline = Instant::now() + rest;
        while !self.wants.borrow().reap && self.hear_until(deadline).await {}
    }

    /// The record goes last; where that takes too long, by itself.
    pub(super) async fn gone(mut self) {
        let remove = Entry::Remove(self.record.handle.clone());
        let removed = self.scribe.write_or_leave(remove, super::PATIENCE).await;
        if removed.is_none() {
            let handle = &self.record.handle;
            warn!(handle, why = UNANSWERED, "a record is not removed yet");
        }
        drop(
            self.world
                .changes
                .send(super::Change::Gone(self.record.handle)),
        );
    }
}

fn describe_failure(why: &str) -> String {
    if why == "missing start command" {
        return why.to_owned();
    }
    let why: String = why.chars().take(DESCRIPTION_MAX).collect();
    format!("failed to start: {why}")
}

/// Whether a job has an end that is none of our KILL.
fn ended_by_itself(job: &JobView) -> bool {
    job.exit.is_some_and(|exit| exit != Status::Signaled(9))
}

/// The exit record of a job. `words` describe what the job itself does not know.
fn exit(job: &JobView, words: Option<String>, out_of_memory: bool, time: f64) -> Exit {
    let (status, signal, told) = match job.exit {
        Some(Status::Exited(code)) => (i32::from(code), signal_of(code), None),
        Some(Status::Signaled(signal)) => (128 + signal, Some(signal), None),
        Some(Status::Failed { step, errno }) => {
            let errno = nix::errno::Errno::from_raw(errno);
            (
                -1,
                None,
                Some(format!(
                    "failed to start: cannot {}: {errno}",
                    step.describe()
                )),
            )
        }
        Some(Status::Started { .. }) | None => (-1, None, None),
    };
    let description = if out_of_memory {
        "out of memory".to_owned()
    } else {
        told.or(words).unwrap_or_else(|| match job.exit {
            Some(_) => "app instance exited".to_owned(),
            None => "cannot be determined".to_owned(),
        })
    };
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "seconds since the epoch are positive and far below 2^52"
    )]
    Exit {
        status,
        signal,
        description,
        time: time as u64,
    }
}

/// The signal behind a shell's status: 128+n (bash(1), "EXIT STATUS").
fn signal_of(code: u8) -> Option<i32> {
    (129..=192).contains(&code).then(|| i32::from(code) - 128)
}

#[cfg(test)]
mod tests {
    use super::{describe_failure, ended_by_itself, exit};
    use crate::instances::output::JobView;
    use container::status::{Status, Step};

    fn of(status: Option<Status>, words: Option<&str>, oom: bool) -> (i32, Option<i32>, String) {
        let job = JobView {
            exit: status,
            ..JobView::default()
        };
        let exit = exit(&job, words.map(str::to_owned), oom, 1.5);
        (exit.status, exit.signal, exit.description)
    }

    #[test]
    fn every_end_has_its_numbers_and_words() {
        let ended = "app instance exited".to_owned();
        assert_eq!(
            of(Some(Status::Exited(0)), None, false),
            (0, None, ended.clone())
        );
        assert_eq!(
            of(Some(Status::Exited(255)), None, false),
            (255, None, ended.clone())
        );
        assert_eq!(
            of(Some(Status::Exited(143)), None, false),
            (143, Some(15), ended.clone())
        );
        assert_eq!(
            of(Some(Status::Signaled(11)), None, false),
            (139, Some(11), ended)
        );
        assert_eq!(
            of(Some(Status::Exited(137)), None, true),
            (137, Some(9), "out of memory".to_owned())
        );
        assert_eq!(
            of(None, Some("the host rebooted"), false),
            (-1, None, "the host rebooted".into())
        );
        assert_eq!(
            of(None, None, false),
            (-1, None, "cannot be determined".into())
        );
        let exec = Status::Failed {
            step: Step::Exec,
            errno: 2,
        };
        let (status, signal, words) = of(Some(exec), None, false);
        assert_eq!((status, signal), (-1, None));
        assert!(
            words.contains("execute the program") && words.contains("ENOENT"),
            "{words}"
        );
    }

    #[test]
    fn a_job_that_we_kill_has_not_ended_by_itself() {
        let job = |exit| JobView {
            exit,
            ..JobView::default()
        };
        assert!(!ended_by_itself(&job(Some(Status::Signaled(9)))));
        assert!(!ended_by_itself(&job(None)));
        for own in [Status::Exited(3), Status::Exited(0), Status::Signaled(15)] {
            assert!(ended_by_itself(&job(Some(own))));
        }
    }

    #[test]
    fn a_failure_says_what_failed_in_bounded_words() {
        assert_eq!(
            describe_failure("missing start command"),
            "missing start command"
        );
        assert!(describe_failure(&"x".repeat(10_000)).len() < 600);
    }
}
