//! The supervisors of a container's jobs: starting one with its job, or for a job that has lost its own.

use super::container::Destroyed;
use super::{Container, EngineError, blocking, lock};
use crate::host::depot::Directory;
use crate::host::helpers::{Child, Command, Ended};
use container::exit;
use container::fault::{Context, SysError};
use container::job::JobRequest;
use container::sys::pidfd;
use futures_util::FutureExt;
use nix::errno::Errno;
use nix::sys::socket::sockopt::{PeerCredentials, PeerPidfd};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, getsockopt, recv, socket,
};
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::time::timeout;

/// The number at which `iomux-spawn` gets the job's memory file.
const JOB_FD: i32 = 3;

/// How long a supervisor may take until it listens for readers. It takes milliseconds.
const READY: Duration = Duration::from_secs(10);

impl Container {
    /// Starts a job and its supervisor; when this returns, the job can be followed. What becomes of the
    /// program is for [`Self::follow`] to tell. `job` counts from 1; the request's own `job` and
    /// `keep_readers` are set here.
    ///
    /// # Errors
    /// [`EngineError::JobInUse`], [`EngineError::Destroyed`], or the supervisor was not started.
    pub async fn spawn(
        &self,
        job: u32,
        user: &str,
        request: JobRequest,
    ) -> Result<(), EngineError> {
        let request = JobRequest {
            job,
            keep_readers: true,
            ..request
        };
        let program = request
            .argv
            .first()
            .map(|program| OsStr::from_bytes(program).to_owned());
        let directory = self.inner.directory.clone();
        let make = move || Ok((request.to_memfd()?, directory.create_job(job)?));
        let made = self.inner.shared.changes.run(make);
        let made = timeout(READY, made).await.map_err(|_| overdue())?;
        let (memfd, path) = made.map_err(|error: SysError| match error {
            SysError {
                call: "mkdir",
                errno: Errno::EEXIST,
                ..
            } => EngineError::JobInUse(job),
            other => other.into(),
        })?;
        let wsh = self.inner.shared.helpers.path("wsh");
        let mut args: Vec<OsString> = vec![path.clone().into(), wsh.into()];
        args.extend(["--socket".into(), self.inner.directory.socket().into()]);
        args.extend(["--user".into(), user.into()]);
        // Only the program shows in a process list: arguments and environment are in the memory file.
        args.extend(program);
        let started = self.start_supervisor(job, args, Some(memfd)).await;
        if let Err(EngineError::Helper(_)) = started {
            // Nobody has written to it, and the number is free again.
            let _may_stay = blocking(move || std::fs::remove_dir(&path)).await;
        }
        started
    }

    /// Makes sure that a job has a supervisor: starts one that takes it over unless one that this
    /// agent started still runs. Several at once are one, by the lock in the job's directory.
    pub(super) async fn supervise(&self, job: u32) -> Result<(), EngineError> {
        let known = lock(&self.inner.supervisors).get(&job).cloned();
        let ended = known.map(|child| child.ended());
        if ended == Some(None) {
            return Ok(());
        }
        let directory = &self.inner.directory;
        let (path, socket) = (directory.job(job), directory.socket());
        let args = vec![
            "--takeover".into(),
            path.into(),
            "--socket".into(),
            socket.into(),
        ];
        // One that an earlier agent started is nobody's child.
        let ended = ended.flatten().unwrap_or(Ended::Unknown);
        let handle = self.handle();
        if self.died().now_or_never().is_none() {
            tracing::warn!(handle, job, supervisor = %ended, "a job's supervisor was gone before its job, another one is started");
        } else {
            tracing::info!(handle, job, supervisor = %ended, "what a job's supervisor left is taken over");
        }
        self.start_supervisor(job, args, None).await
    }

    async fn start_supervisor(
        &self,
        job: u32,
        args: Vec<OsString>,
        request: Option<OwnedFd>,
    ) -> Result<(), EngineError> {
        let shared = &self.inner.shared;
        let directory = self.inner.directory.clone();
        let log = blocking(move || directory.log()).await?;
        let (ready, theirs) = io::pipe().context("pipe", "supervisor")?;
        let mut env: Vec<(&'static str, OsString)> =
            vec![("IOMUX_SPOOL_BYTES", shared.spool_bytes.to_string().into())];
        let mut fds = vec![(OwnedFd::from(theirs), 1), (log.into(), 2)];
        if let Some(request) = request {
            env.push(("IOMUX_JOB_FD", JOB_FD.to_string().into()));
            fds.push((request, JOB_FD));
        }
        let command = Command {
            program: "iomux-spawn",
            argv0: None,
            args,
            env,
            fds,
        };
        // Held until it is known: `destroy` must not miss it.
        let destroyed = self.inner.destroyed.lock().await;
        if *destroyed == Destroyed::Yes {
            return Err(EngineError::Destroyed(self.inner.handle.clone()));
        }
        let child = shared.helpers.spawn(command).await?;
        tracing::info!(
            handle = self.handle(),
            job,
            pid = child.pid,
            "supervisor started"
        );
        lock(&self.inner.supervisors).insert(job, child.clone());
        drop(destroyed);
        self.wait_ready(job, &child, ready.into()).await
    }

    /// The supervisor closes its output when it listens, and when it ends.
    async fn wait_ready(&self, job: u32, child: &Child, ready: OwnedFd) -> Result<(), EngineError> {
        let mut ready = pipe::Receiver::from_owned_fd(ready).context("epoll_ctl", "supervisor")?;
        let mut nothing = [0; 1];
        let closed = timeout(READY, ready.read(&mut nothing))
            .await
            .map_err(|_| overdue())?;
        closed.context("read", "supervisor")?;
        let directory = self.inner.directory.clone();
        if blocking(move || listening(&directory, job)).await.is_some() {
            return Ok(());
        }
        match timeout(READY, child.wait()).await.map_err(|_| overdue())? {
            // The job was a short one, or could not be executed: its records tell.
            Ended::Exited(code)
                if [exit::DONE, exit::NOT_STARTED]
                    .map(i32::from)
                    .contains(&code) =>
            {
                Ok(())
            }
            ended @ (Ended::Exited(_) | Ended::Signaled(_) | Ended::Unknown) => {
                let directory = self.inner.directory.clone();
                let said = blocking(move || directory.last_words()).await;
                Err(EngineError::Supervisor { job, ended, said })
            }
        }
    }
}

fn overdue() -> EngineError {
    EngineError::Deadline {
        what: "a job's supervisor",
        waited: READY,
    }
}

/// The process that listens for a job's readers, if there is one. Blocks, but waits for nobody.
pub(super) fn listening(directory: &Directory, job: u32) -> Option<OwnedFd> {
    let address = UnixAddr::new(&directory.job(job).join("link.sock")).ok()?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None).ok()?;
    connect(socket.as_raw_fd(), &address).ok()?;
    match getsockopt(&socket, PeerPidfd) {
        Ok(pidfd) => Some(pidfd),
        Err(Errno::ENOPROTOOPT) => {
            // Before Linux 6.5. A second look afterwards: as long as the listener has not hung up, the
            // number is still its own.
            let pid = getsockopt(&socket, PeerCredentials).ok()?.pid();
            let pidfd = pidfd::open(pid).ok()?;
            let look = recv(socket.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK);
            matches!(look, Err(Errno::EAGAIN) | Ok(1..)).then_some(pidfd)
        }
        Err(_) => None,
    }
}
