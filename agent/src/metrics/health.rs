//! Whether this host works, found out by doing what it does when it works.

use super::Sources;
use crate::chain;
use crate::host::blocking;
use crate::host::helpers::Ended;
use crate::instances::outlet::Confirmation;
use serde_json::{Map, Value, json};
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};

/// What one trial may take.
const DEADLINE: Duration = Duration::from_secs(2);

/// The file in the base directory that is written, and removed again.
pub const TRIAL: &str = "health";

/// All trials.
#[derive(Debug)]
pub(super) struct Health {
    sources: Arc<Sources>,
    bus: Turn,
    stable: Turn,
    disk: Turn,
    helpers: Turn,
}

impl Health {
    pub(super) fn of(sources: Arc<Sources>) -> Self {
        Self {
            sources,
            bus: Turn::new(),
            stable: Turn::new(),
            disk: Turn::new(),
            helpers: Turn::new(),
        }
    }

    /// Tries everything at once.
    pub(super) async fn report(&self) -> Report {
        let sources = || Arc::clone(&self.sources);
        let (bus, stable, disk, helpers) = tokio::join!(
            self.bus.attempt(bus(sources())),
            self.stable.attempt(stable(sources())),
            self.disk.attempt(disk(sources())),
            self.helpers.attempt(helpers(sources())),
        );
        Report([
            ("bus", bus),
            ("stable", stable),
            ("disk", disk),
            ("helpers", helpers),
        ])
    }
}

/// A message to this host's own inbox comes back from the server.
async fn bus(sources: Arc<Sources>) -> Result<(), String> {
    let outlet = &sources.world.outlet;
    let mark = outlet.mark();
    let confirmation = tokio::select! {
        confirmation = outlet.settle() => confirmation,
        // A client that is connected no more keeps what it is given until it is again.
        () = outlet.changed(mark) => Confirmation::Unsure,
    };
    match confirmation {
        Confirmation::Sure => Ok(()),
        _ if !outlet.mark().up() => Err("there is no connection".into()),
        Confirmation::Unsure | Confirmation::Refused => Err("the connection broke".into()),
    }
}

/// The stable answers a question that came by its mailbox.
async fn stable(sources: Arc<Sources>) -> Result<(), String> {
    let standing = sources.standing().await;
    standing
        .map(drop)
        .ok_or_else(|| "the agent is leaving".into())
}

/// A file of the base directory gets to the disk.
async fn disk(sources: Arc<Sources>) -> Result<(), String> {
    let tried = blocking(move || write(&sources.world.config.base)).await;
    tried.map_err(|error| format!("no file can be written in the base directory: {error}"))
}

fn write(base: &Path) -> io::Result<()> {
    let path = base.join(TRIAL);
    let mut options = File::options();
    options.create(true).truncate(true).write(true).mode(0o600);
    let mut file = options.open(&path)?;
    let written = file.write_all(b"x").and_then(|()| file.sync_all());
    std::fs::remove_file(&path)?;
    written
}

/// A helper starts, and its end is seen.
async fn helpers(sources: Arc<Sources>) -> Result<(), String> {
    match sources.world.engine.try_helper().await {
        Ok(Ended::Exited(0)) => Ok(()),
        Ok(ended) => Err(format!("a helper that was only asked for help {ended}")),
        Err(error) => Err(chain(&error)),
    }
}

/// One kind of trial. One is made at a time: of what hangs, nobody who asks makes more.
#[derive(Debug)]
struct Turn(Arc<Semaphore>);

impl Turn {
    fn new() -> Self {
        Self(Arc::new(Semaphore::new(1)))
    }

    /// What comes of `work` within the deadline, the wait for its turn included. If that passes, the work goes on, and
    /// until it has ended no other one begins.
    async fn attempt(
        &self,
        work: impl Future<Output = Result<(), String>> + Send + 'static,
    ) -> Finding {
        let begun = Instant::now();
        let turn = Arc::clone(&self.0).acquire_owned();
        let trial = async {
            let turn = turn.await.map_err(|error| error.to_string())?;
            let owned = tokio::spawn(async move {
                let outcome = work.await;
                drop(turn);
                outcome
            });
            owned.await.map_err(|error| error.to_string())?
        };
        let late = || Err(format!("not done within {DEADLINE:?}"));
        let outcome = timeout(DEADLINE, trial).await.unwrap_or_else(|_| late());
        Finding {
            took: begun.elapsed(),
            outcome,
        }
    }
}

/// What came of one trial.
#[derive(Debug)]
struct Finding {
    took: Duration,
    outcome: Result<(), String>,
}

/// What came of all, by name.
#[derive(Debug)]
pub(super) struct Report([(&'static str, Finding); 4]);

impl Report {
    pub(super) fn is_well(&self) -> bool {
        self.failing().next().is_none()
    }

    pub(super) fn failing(&self) -> impl Iterator<Item = &'static str> {
        let failed = self
            .0
            .iter()
            .filter(|(_, finding)| finding.outcome.is_err());
        failed.map(|(part, _)| *part)
    }

    /// `{"ok":false,"failing":["bus"],"checks":{"bus":{"ok":false,"ms":2000.1,"error":"…"},"disk":{"ok":true,"ms":1.3},…}}`
    pub(super) fn body(&self) -> String {
        let check = |finding: &Finding| {
            let milliseconds = (finding.took.as_secs_f64() * 1e6).round() / 1e3;
            let mut check = json!({"ok": finding.outcome.is_ok(), "ms": milliseconds});
            if let (Err(error), Some(check)) = (&finding.outcome, check.as_object_mut()) {
                check.insert("error".into(), json!(error));
            }
            check
        };
        let checks = self.0.iter();
        let checks: Map<String, Value> = checks
            .map(|(part, finding)| ((*part).to_owned(), check(finding)))
            .collect();
        let failing: Vec<&str> = self.failing().collect();
        let body = json!({"ok": failing.is_empty(), "failing": failing, "checks": checks});
        format!("{body}\n")
    }
}
