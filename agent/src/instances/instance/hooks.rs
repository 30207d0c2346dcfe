//! Hooks: files of the host whose text runs in an instance's container, as its user and in its environment.
//!
//! Each is a job of its own beside the app's, and is started once for a container, whatever happens to the
//! agent: one that finds it started waits for its end, as long as a hook may take. A start waits for its hooks
//! like for anything else, so a stop ends them. One that hangs in a stop is ended with all that is left.

use super::finish::End;
use super::start::failed;
use super::{Instance, PATIENCE, died};
use crate::chain;
use crate::config::Hooks;
use crate::engine::{Container, Followed};
use crate::host::blocking;
use crate::host::scribe::UNANSWERED;
use container::job::JobRequest;
use container::spool::{Cursor, Record};
use container::status::Status;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::timeout;
use tracing::warn;

/// Most bytes of a failed hook's last words that are told.
const LAST_WORDS: usize = 300;

/// When it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hook {
    /// The container is made, the app does not run yet. If it fails, so does the start.
    BeforeStart,
    /// The instance is RUNNING. If it fails, so does the start.
    AfterStart,
    /// The route is taken back, TERM is not sent yet.
    BeforeStop,
    /// The app has ended.
    AfterStop,
}

impl Hook {
    fn name(self) -> &'static str {
        match self {
            Self::BeforeStart => "before_start",
            Self::AfterStart => "after_start",
            Self::BeforeStop => "before_stop",
            Self::AfterStop => "after_stop",
        }
    }

    /// Its number in the container; the app has 1.
    fn job(self) -> u32 {
        match self {
            Self::BeforeStart => 2,
            Self::AfterStart => 3,
            Self::BeforeStop => 4,
            Self::AfterStop => 5,
        }
    }

    fn file(self, hooks: &Hooks) -> Option<&PathBuf> {
        match self {
            Self::BeforeStart => hooks.before_start.as_ref(),
            Self::AfterStart => hooks.after_start.as_ref(),
            Self::BeforeStop => hooks.before_stop.as_ref(),
            Self::AfterStop => hooks.after_stop.as_ref(),
        }
    }
}

impl Instance {
    /// Runs a hook of the start, if there is one.
    pub(super) async fn start_hook(&mut self, hook: Hook) -> Result<(), End> {
        let Some(run) = self.prepare(hook)? else {
            return Ok(());
        };
        // It is not to fail for a disk that hangs.
        let mut disk = self.world.scribes.lateness();
        self.attend(disk.passes()).await?;
        let done = self.attend(run.within()).await?;
        done.map_err(|why| failed(format!("{} {why}", hook.name())))
    }

    /// Runs a hook of the stop, if there is one and the container lives. The stop goes on whatever comes of it.
    pub(super) async fn stop_hook(&mut self, hook: Hook) {
        let run = match self.prepare(hook) {
            Ok(Some(run)) => run,
            Ok(None) => return,
            Err(why) => {
                let (handle, hook) = (&self.record.handle, hook.name());
                warn!(handle, hook, ?why, "a hook is left out");
                return;
            }
        };
        let disk = self.world.scribes.lateness();
        let mut passing = disk.clone();
        let answers = async {
            tokio::select! {
                biased;
                () = passing.passes() => true,
                () = disk.lasts(PATIENCE) => false,
            }
        };
        if !self.hear_while(answers).await {
            let (handle, hook) = (&self.record.handle, hook.name());
            warn!(handle, hook, why = UNANSWERED, "a hook is left out");
            return;
        }
        let dead = died(self.container.clone());
        let ended = async {
            tokio::select! {
                biased;
                () = dead => Ok(()),
                done = run.within() => done,
            }
        };
        if let Err(why) = self.hear_while(ended).await {
            let (handle, hook) = (&self.record.handle, hook.name());
            warn!(handle, hook, why, "a hook failed");
        }
    }

    fn prepare(&self, hook: Hook) -> Result<Option<Run>, End> {
        let config = &self.world.config;
        let file = hook.file(&config.hooks);
        let (Some(file), Some(container), Some(port)) =
            (file, self.container.clone(), self.record.port)
        else {
            return Ok(None);
        };
        Ok(Some(Run {
            job: hook.job(),
            file: file.clone(),
            container,
            user: config.instance.user.clone(),
            request: self.job_request(port)?,
            limit: config.hooks.timeout,
        }))
    }
}

/// A hook that is to be run.
struct Run {
    job: u32,
    file: PathBuf,
    container: Container,
    user: String,
    /// The app's, but for the program.
    request: JobRequest,
    limit: Duration,
}

impl Run {
    /// What becomes of it, in words if that is not good.
    async fn within(self) -> Result<(), String> {
        let limit = self.limit;
        timeout(limit, self.done()).await.unwrap_or_else(|_late| {
            Err(format!(
                "took longer than {} s (`hooks.timeout`)",
                limit.as_secs()
            ))
        })
    }

    async fn done(self) -> Result<(), String> {
        let begun = self.container.job(self.job);
        let (file, job) = (self.file, self.job);
        let begun = blocking(move || begun.exists()).await;
        if !begun {
            let Some(text) = read(&file).await else {
                return Ok(());
            };
            let request = JobRequest {
                argv: vec![b"/bin/bash".into(), b"-c".into(), text],
                ..self.request
            };
            let spawned = self.container.spawn(job, &self.user, request).await;
            spawned.map_err(|error| chain(&error))?;
        }
        let mut records = self.container.follow(job, Cursor::default());
        let mut said = Vec::new();
        let mut unknown = "ended, and nobody knows how".to_owned();
        while let Some(followed) = records.recv().await {
            match followed {
                Followed::Frame(frame) => match frame.record {
                    Record::Output { bytes, .. } => {
                        said.extend(bytes);
                        said.drain(..said.len().saturating_sub(LAST_WORDS));
                    }
                    Record::Exit { status, .. } => return outcome(status, &said),
                    Record::Started | Record::Gap { .. } | Record::End { .. } => {}
                },
                Followed::Lost(why) => unknown = format!("was lost: {why}"),
            }
        }
        if begun {
            // An earlier agent died with what it was about to do: the app is not to suffer for that.
            warn!(job, unknown, "a hook of an earlier agent is left as it is");
            return Ok(());
        }
        Err(unknown)
    }
}

/// The text of a hook; `None`, with a warning, if it cannot be read.
async fn read(file: &Path) -> Option<Vec<u8>> {
    let path = file.to_owned();
    let text = blocking(move || std::fs::read(&path)).await;
    let told = |error| warn!(file = %file.display(), %error, "a hook is left out");
    text.map_err(told).ok()
}

fn outcome(status: Status, said: &[u8]) -> Result<(), String> {
    let how = match status {
        Status::Exited(0) => return Ok(()),
        Status::Exited(code) => format!("exited with status {code}"),
        Status::Signaled(signal) => format!("was ended by signal {signal}"),
        Status::Failed { step, errno } => {
            let errno = nix::errno::Errno::from_raw(errno);
            format!("could not {}: {errno}", step.describe())
        }
        Status::Started { .. } => "ended, and nobody knows how".to_owned(),
    };
    let said = String::from_utf8_lossy(said);
    Err(match said.trim() {
        "" => how,
        said => format!("{how}: {said}"),
    })
}

#[cfg(test)]
mod tests {
    use super::outcome;
    use container::status::{Status, Step};

    #[test]
    fn a_failure_has_its_last_words() {
        assert_eq!(outcome(Status::Exited(0), b"noise"), Ok(()));
        let failed = |status, said: &[u8]| outcome(status, said).unwrap_err();
        assert_eq!(
            failed(Status::Exited(3), b"no licence\n"),
            "exited with status 3: no licence"
        );
        assert_eq!(failed(Status::Signaled(9), b"\n"), "was ended by signal 9");
        let exec = Status::Failed {
            step: Step::Exec,
            errno: 7,
        };
        assert!(failed(exec, b"").contains("E2BIG"));
    }
}
