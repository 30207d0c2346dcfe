//! Telling who was killed for memory, in which container, and why.
//!
//! Whether something was killed is said by the group's own counter alone, against a baseline that the
//! caller keeps: so a kill is found although nobody looked when it happened. Who it was is said by the
//! kernel's log, which is asked afterwards ([`log`]).

mod log;
mod victims;

pub(super) use log::KillLog;
pub(super) use victims::Victims;

use super::{Container, blocking, lock};
use crate::chain;
use crate::host::helpers::{Child, Command, Ended, HelperError, Leash};
use crate::host::kmsg::OomKill;
use container::exit;
use container::fault::SysError;
use container::launch::Ids;
use log::{Complete, PATIENCE, Whose};
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::unix::pipe;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};
use tracing::Instrument;

/// One process of a container that the kernel killed for memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OomReport {
    /// The group's counter of kills with this one: the baseline for the next question.
    pub count: u64,
    /// Whose memory had run out.
    pub level: Level,
    /// Who was killed; `None`: the kernel's log has forgotten it, or cannot be read.
    pub victim: Option<Victim>,
    /// The container's limit, in bytes.
    pub limit_bytes: Option<u64>,
    /// The most it ever used (v1: since its limit was last made smaller), in bytes.
    pub peak_bytes: Option<u64>,
    /// What it used when this was asked, after the kill, in bytes.
    pub usage_bytes: Option<u64>,
}

/// A killed process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Victim {
    /// Its number in the host's initial pid namespace.
    pub pid: i32,
    /// Its command name.
    pub comm: String,
}

/// Which limit was hit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// The container's own.
    Container,
    /// That of a control group above the container's.
    Above,
    /// The machine's memory ran out.
    Host,
    /// Nobody knows.
    Unknown,
}

/// Reports that wait for the receiver.
const WAITING: usize = 16;

/// Most kills that are told one by one after nobody looked: as many as the log remembers.
const MOST_REPORTS: u64 = log::REMEMBERED as u64;

/// How often the log is read again because processes were killed meanwhile.
const RECOUNTS: u32 = 8;

/// Between two helpers, when they end by themselves.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

const HANGUP_FD: i32 = 3;

impl Container {
    /// Reports every kill in this container from now on, and those since its counter stood at
    /// `baseline`. The channel closes when the container's group is gone; dropping the receiver ends
    /// the helper that watches.
    #[must_use]
    pub fn oom(&self, baseline: u64) -> mpsc::Receiver<OomReport> {
        let (sender, receiver) = mpsc::channel(WAITING);
        let span = tracing::error_span!("oom", handle = self.handle());
        let watcher = Watcher {
            container: self.clone(),
            known: baseline,
            sender,
        };
        tokio::spawn(watcher.run().instrument(span));
        receiver
    }

    /// The kills since the counter stood at `baseline`, read at once: for the moment when the container
    /// or its job has died, and the event may not have come yet. A group that is gone has none.
    pub async fn oom_now(&self, baseline: u64) -> Vec<OomReport> {
        let group = self.inner.group.clone();
        match blocking(move || group.oom_kills()).await {
            Ok(total) => self.reports(baseline, total).await,
            Err(error) => {
                tracing::debug!(handle = self.handle(), error = %chain(&error), "kills could not be counted");
                Vec::new()
            }
        }
    }

    /// How the kernel's log names its processes.
    async fn whose(&self) -> Whose<'_> {
        let directory = self.inner.directory.clone();
        let ids = blocking(move || directory.ids()).await;
        Whose {
            handle: self.handle(),
            uids: ids.map(|ids| ids.first..ids.first.saturating_add(Ids::COUNT)),
            log_end: self.inner.log_end,
        }
    }

    /// The log's records of this container's kills, and how many were counted by then: `total` or more. A kill
    /// is counted before it is logged, so when the count has not changed meanwhile, no record is of a later
    /// one.
    async fn records(&self, mut total: u64) -> (u64, Vec<OomKill>, Complete) {
        let whose = self.whose().await;
        let until = Instant::now() + PATIENCE;
        let kills = &self.inner.shared.kills;
        for _ in 0..RECOUNTS {
            let (wanted, after) = lock(&self.inner.victims).expected(total);
            let (records, complete) = kills.of(&whose, (wanted, after), until).await;
            let group = self.inner.group.clone();
            // A group that is gone counts no more.
            let now = blocking(move || group.oom_kills()).await.unwrap_or(total);
            if now <= total {
                return (total, records, complete);
            }
            total = now;
        }
        let (wanted, after) = lock(&self.inner.victims).expected(total);
        let (records, complete) = kills.of(&whose, (wanted, after), until).await;
        (total, records, complete)
    }

    /// Takes what the log has by now for the records of the kills up to `known`, which an earlier agent told:
    /// so none of them is waited for, though the log may have forgotten some. A kill is counted before it is
    /// logged, so what was read before the count is of no later one.
    async fn begin(&self, whose: &Whose<'_>, known: u64) {
        let kills = &self.inner.shared.kills;
        kills.end().await;
        let (records, _) = kills.of(whose, (0, None), Instant::now()).await;
        let group = self.inner.group.clone();
        if blocking(move || group.oom_kills()).await.ok() == Some(known) {
            lock(&self.inner.victims).begin(&records, known);
        }
    }

    /// One report for each kill after `known`, up to `total` and those that came while this was asked.
    async fn reports(&self, known: u64, total: u64) -> Vec<OomReport> {
        let known = known.max(total.saturating_sub(MOST_REPORTS));
        if total <= known {
            return Vec::new();
        }
        let handle = self.handle();
        let (total, records, complete) = self.records(total).await;
        let victims = lock(&self.inner.victims).decide(&records, complete, known, total);
        let group = self.inner.group.clone();
        let (limit_bytes, peak_bytes, usage_bytes, at_limit) = blocking(move || {
            let usage = group.usage().ok().map(|usage| usage.memory_bytes);
            let (limit, peak) = (group.memory_limit(), group.memory_peak());
            (limit, peak, usage, group.memory_ran_out())
        })
        .await;
        let reports = victims
            .into_iter()
            .zip(known + 1..)
            .map(|(record, count)| OomReport {
                count,
                level: level(record.as_ref(), handle, at_limit),
                victim: record.map(|record| Victim {
                    pid: record.pid,
                    comm: record.comm,
                }),
                limit_bytes,
                peak_bytes,
                usage_bytes,
            });
        reports.collect()
    }
}

/// What the record says; where it has only the words of the kill, or there is none, whether the
/// container was ever at its own limit (`at_limit`) decides.
fn level(record: Option<&OomKill>, handle: &str, at_limit: bool) -> Level {
    match record {
        Some(kill) if kill.constraint == "CONSTRAINT_MEMCG" => {
            let own = match kill.oom_memcg.as_str() {
                "" => at_limit,
                group => log::is_of(group, handle),
            };
            if own { Level::Container } else { Level::Above }
        }
        Some(kill) if !kill.constraint.is_empty() => Level::Host,
        Some(_) | None if at_limit => Level::Container,
        Some(_) | None => Level::Unknown,
    }
}

struct Watcher {
    container: Container,
    known: u64,
    sender: mpsc::Sender<OomReport>,
}

enum Turn {
    Unwanted,
    Ended(Ended),
}

#[derive(Debug, thiserror::Error)]
enum WatchError {
    #[error(transparent)]
    Helper(#[from] HelperError),
    #[error(transparent)]
    Refused(#[from] SysError),
    #[error("the helper's pipe failed: {0}")]
    Pipe(#[from] io::Error),
}

impl Watcher {
    async fn run(mut self) {
        let mut pause = FIRST_PAUSE;
        loop {
            let began = Instant::now();
            match self.watch().await {
                Ok(Turn::Unwanted) => return,
                Ok(Turn::Ended(Ended::Exited(code))) if code == i32::from(exit::GONE) => return,
                Ok(Turn::Ended(ended)) => {
                    let handle = self.container.handle();
                    tracing::warn!(handle, %ended, "a watcher of memory kills ended, another one follows");
                }
                Err(error) => {
                    tracing::warn!(error = %chain(&error), "memory kills are not watched")
                }
            }
            if began.elapsed() > LONGEST_PAUSE {
                pause = FIRST_PAUSE;
            }
            tokio::select! {
                biased;
                () = self.sender.closed() => return,
                () = sleep(pause) => pause = (pause * 2).min(LONGEST_PAUSE),
            }
        }
    }

    /// Starts a helper and reports what it counts until it ends or nobody listens. The kernel's log is a
    /// second sign: v1 tells a group nothing of a kill for the host's memory.
    async fn watch(&mut self) -> Result<Turn, WatchError> {
        let (lines, helper) = self.start().await?;
        let leash = Leash(helper);
        let mut lines = BufReader::new(lines).lines();
        let container = self.container.clone();
        let (whose, mut seen) = (container.whose().await, None);
        container.begin(&whose, self.known).await;
        loop {
            let line = tokio::select! {
                biased;
                () = self.sender.closed() => return Ok(Turn::Unwanted),
                line = lines.next_line() => Some(line?),
                seq = container.inner.shared.kills.newer(&whose, seen) => {
                    seen = Some(seq);
                    None
                }
            };
            let total = match line {
                Some(None) => break,
                Some(Some(line)) => total_of(&line),
                // It was counted before it was logged (mm/oom_kill.c, __oom_kill_process).
                None => {
                    let group = container.inner.group.clone();
                    blocking(move || group.oom_kills()).await.ok()
                }
            };
            let Some(total) = total else {
                continue;
            };
            for report in self.container.reports(self.known, total).await {
                let count = report.count;
                if self.sender.send(report).await.is_err() {
                    return Ok(Turn::Unwanted);
                }
                self.known = count;
            }
        }
        Ok(Turn::Ended(leash.0.wait().await))
    }

    async fn start(&self) -> Result<(pipe::Receiver, Child), WatchError> {
        let inner = &self.container.inner;
        let (ours, theirs) = io::pipe()?;
        let directory = inner.directory.clone();
        let log = blocking(move || directory.log()).await?;
        let command = Command {
            program: "oom",
            argv0: None,
            args: vec![inner.group.memory_dir().into()],
            env: vec![("OSTLER_HANGUP_FD", HANGUP_FD.to_string().into())],
            fds: vec![
                (OwnedFd::from(theirs), 1),
                (log.into(), 2),
                (inner.shared.helpers.hangup()?, HANGUP_FD),
            ],
        };
        let helper = inner.shared.helpers.spawn(command).await?;
        Ok((pipe::Receiver::from_owned_fd(ours.into())?, helper))
    }
}

/// `baseline 3` and `oom_kill 3` both say that three were killed so far.
#[must_use]
pub fn total_of(line: &str) -> Option<u64> {
    let (word, number) = line.split_once(' ')?;
    let counts = matches!(word, "baseline" | "oom_kill");
    counts.then(|| number.trim().parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::{Level, level, total_of};
    use crate::host::kmsg::OomKill;

    const HANDLE: &str = "0123456789v";

    fn kill(pid: i32, constraint: &str, oom_memcg: &str) -> OomKill {
        OomKill {
            seq: pid.unsigned_abs().into(),
            time_us: 0,
            constraint: constraint.to_owned(),
            oom_memcg: oom_memcg.to_owned(),
            task_memcg: format!("/ostler/{HANDLE}"),
            comm: "app".to_owned(),
            pid,
            uid: 0,
        }
    }

    #[test]
    fn the_level_is_what_the_kernel_says_or_the_limit_shows() {
        let own = kill(1, "CONSTRAINT_MEMCG", &format!("/ostler/{HANDLE}"));
        let above = kill(1, "CONSTRAINT_MEMCG", "/ostler");
        let words = kill(1, "CONSTRAINT_MEMCG", "");
        let host = kill(1, "CONSTRAINT_NONE", "");
        let silent = kill(1, "", "");
        assert_eq!(level(Some(&own), HANDLE, false), Level::Container);
        assert_eq!(level(Some(&above), HANDLE, true), Level::Above);
        assert_eq!(level(Some(&words), HANDLE, true), Level::Container);
        assert_eq!(level(Some(&words), HANDLE, false), Level::Above);
        assert_eq!(level(Some(&host), HANDLE, true), Level::Host);
        assert_eq!(level(Some(&silent), HANDLE, true), Level::Container);
        assert_eq!(level(Some(&silent), HANDLE, false), Level::Unknown);
        assert_eq!(level(None, HANDLE, true), Level::Container);
        assert_eq!(level(None, HANDLE, false), Level::Unknown);
    }

    #[test]
    fn the_helper_counts_in_two_words() {
        assert_eq!(total_of("baseline 0"), Some(0));
        assert_eq!(total_of("oom_kill 12"), Some(12));
        for line in ["", "oom_kill", "oom_kill x", "local 3"] {
            assert_eq!(total_of(line), None, "{line}");
        }
    }
}
