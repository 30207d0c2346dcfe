//! Processes that a test starts: the agent and the nats-server.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;

/// How a process ended, once it has. Reaping happens under the lock, so while it is `None` the number
/// still names the child and may be signalled.
#[derive(Debug, Default)]
pub struct Ended {
    status: Mutex<Option<ExitStatus>>,
    changed: Condvar,
}

/// A child process with its output in a file.
#[derive(Debug)]
pub struct Running {
    pid: Pid,
    ended: Arc<Ended>,
}

impl Running {
    /// Starts `program`; its stdout and stderr are appended to `log`.
    #[must_use]
    pub fn start(program: &Path, arguments: &[&str], log: &Path) -> Self {
        let log = File::options()
            .create(true)
            .append(true)
            .open(log)
            .expect("a log file");
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null());
        command.stdout(log.try_clone().expect("dup")).stderr(log);
        // What a person has set for their own bus must not reach a test's agent.
        for (variable, _) in std::env::vars_os() {
            if variable.to_string_lossy().starts_with("NATS_") {
                command.env_remove(variable);
            }
        }
        let child = command.spawn();
        Self::watch(
            child.unwrap_or_else(|error| panic!("cannot run {}: {error}", program.display())),
        )
    }

    fn watch(mut child: Child) -> Self {
        let pid = Pid::from_raw(child.id().try_into().expect("a pid"));
        let ended = Arc::new(Ended::default());
        let announce = Arc::clone(&ended);
        thread::spawn(move || {
            // Seen, not reaped: see `Ended`.
            let _ = waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT);
            *announce.status.lock().unwrap() = child.wait().ok();
            announce.changed.notify_all();
        });
        Self { pid, ended }
    }

    /// Its number, also after its end.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    /// Sends `signal` if it still runs.
    pub fn signal(&self, signal: Signal) {
        let status = self.ended.status.lock().unwrap();
        if status.is_none() {
            kill(self.pid, signal).expect("an unreaped child can be signalled");
        }
    }

    /// Waits for its end without blocking the runtime; `None` if it does not end within `patience`.
    pub async fn ended(&self, patience: Duration) -> Option<ExitStatus> {
        let ended = Arc::clone(&self.ended);
        tokio::task::spawn_blocking(move || ended.wait(patience))
            .await
            .expect("no panic")
    }

    /// [`Running::ended`] for where nothing can be awaited.
    #[must_use]
    pub fn wait(&self, patience: Duration) -> Option<ExitStatus> {
        self.ended.wait(patience)
    }

    /// Kills it and waits until it is gone.
    pub fn end(&self) {
        self.signal(Signal::SIGKILL);
        let _ = self.wait(crate::patience());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}

impl Ended {
    fn wait(&self, patience: Duration) -> Option<ExitStatus> {
        let status = self.status.lock().unwrap();
        *self
            .changed
            .wait_timeout_while(status, patience, |status| status.is_none())
            .unwrap()
            .0
    }
}
