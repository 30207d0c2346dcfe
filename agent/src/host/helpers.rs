//! Starting helpers: one thread does it, for as long as the agent lives.
//!
//! ```text
//! spawn(Command) ─▶ the thread: posix_spawn, pidfd_open ─▶ Child ◀─ its end, from a task that reaps it
//! ```
//!
//! One thread, because `PR_SET_PDEATHSIG` and the like follow the thread that forked and a thread of
//! the blocking pool lives ten seconds. `posix_spawn`, because it shares memory until `exec`: what it
//! costs does not grow with the agent. `wshd`, which goes into containers, is executed from a sealed copy in
//! memory: no way from inside through `/proc/<pid>/exe` leads to a file (CVE-2019-5736). Helpers that must die with the agent get the read end of a pipe
//! whose write end lives here ([`Helpers::hangup`]).

use container::fault::{Context, SysError};
use container::fields::program_memfd;
use container::sys::{pidfd, process};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::stat::Mode;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;
use std::ffi::{CString, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::Duration;
use tokio::io::Interest;
use tokio::runtime::Handle;
use tokio::sync::{oneshot, watch};

/// How often a helper is looked at that cannot be watched.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// What to start. The environment is exactly `env`, the descriptors exactly `fds`: 0, 1 and 2 are
/// `/dev/null` unless they are named.
#[derive(Debug)]
pub struct Command {
    /// File name in the helpers' directory.
    pub program: &'static str,
    /// The title in a process list; the program's path when `None`.
    pub argv0: Option<OsString>,
    /// What follows `argv[0]`.
    pub args: Vec<OsString>,
    /// Environment variables.
    pub env: Vec<(&'static str, OsString)>,
    /// Descriptors and the numbers that they get in the helper.
    pub fds: Vec<(OwnedFd, RawFd)>,
}

/// Why a helper was not started.
#[derive(Debug, thiserror::Error)]
pub enum HelperError {
    /// The kernel refused.
    #[error("helper \"{program}\" was not started")]
    Start {
        /// Its file name.
        program: &'static str,
        /// The call and its errno.
        source: SysError,
    },
    /// The thread that starts helpers is gone; the agent is leaving.
    #[error("helper \"{0}\" was not started: the agent is leaving")]
    Leaving(&'static str),
}

/// How a helper ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It exited with this code.
    Exited(i32),
    /// A signal ended it.
    Signaled(i32),
    /// Somebody else reaped it: nobody knows.
    Unknown,
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "exited with {code}"),
            Self::Signaled(signal) => write!(f, "ended by signal {signal}"),
            Self::Unknown => f.write_str("ended in an unknown way"),
        }
    }
}

/// A running helper. It is reaped whether or not anybody holds this; dropping it ends nothing.
#[derive(Debug, Clone)]
pub struct Child {
    /// Its process id, for logs.
    pub pid: i32,
    pidfd: Arc<OwnedFd>,
    end: watch::Receiver<Option<Ended>>,
}

impl Child {
    /// Waits for its end. May be called again and dropped at any time.
    pub async fn wait(&self) -> Ended {
        let mut end = self.end.clone();
        let ended = end
            .wait_for(Option::is_some)
            .await
            .map(|ended| ended.unwrap_or(Ended::Unknown));
        match ended {
            Ok(ended) => ended,
            // The runtime dropped the reaper: it is shutting down.
            Err(_) => std::future::pending().await,
        }
    }

    /// Its end, if it has come.
    #[must_use]
    pub fn ended(&self) -> Option<Ended> {
        *self.end.borrow()
    }

    /// Sends SIGKILL; nothing happens if it has ended.
    pub fn kill(&self) {
        // The only other failure is EPERM, which root does not get.
        let _ended_already = pidfd::send_signal(self.pidfd.as_fd(), Signal::SIGKILL as i32);
    }
}

/// A helper that ends when this is dropped, also with the task that held it.
#[derive(Debug)]
pub struct Leash(pub Child);

impl Drop for Leash {
    fn drop(&mut self) {
        self.0.kill();
    }
}

/// One command on its way to the thread.
#[derive(Debug)]
struct Ask {
    command: Command,
    runtime: Handle,
    answer: oneshot::Sender<Result<Unclaimed, SysError>>,
}

/// A helper on its way to whoever asked for it. What nobody takes must not live on: it may die in the
/// channel, with the one who waited.
#[derive(Debug)]
struct Unclaimed(Option<Child>);

impl Unclaimed {
    fn claim(mut self) -> Option<Child> {
        self.0.take()
    }
}

impl Drop for Unclaimed {
    fn drop(&mut self) {
        if let Some(child) = &self.0 {
            child.kill();
        }
    }
}

/// What can be started.
#[derive(Debug)]
struct Programs {
    directory: PathBuf,
    /// A sealed copy.
    wshd: OwnedFd,
}

/// The program that goes into containers.
const INIT: &str = "wshd";

impl Programs {
    fn open(directory: PathBuf) -> Result<Self, SysError> {
        let path = directory.join(INIT);
        let program = std::fs::read(&path).context("read", path.display())?;
        let wshd = program_memfd(&program, INIT)?;
        Ok(Self { directory, wshd })
    }

    /// What to execute: a path that the new process can open until it has.
    fn path(&self, program: &str) -> PathBuf {
        if program == INIT {
            // Of the agent's descriptors, not of the new process's own, which are being replaced.
            return format!("/proc/{}/fd/{}", std::process::id(), self.wshd.as_raw_fd()).into();
        }
        self.directory.join(program)
    }
}

/// The thread that starts helpers, and the pipe by which they notice the agent's death.
#[derive(Debug)]
pub struct Helpers {
    programs: Arc<Programs>,
    asks: mpsc::Sender<Ask>,
    hangup: OwnedFd,
    // Never written to: it closes with the agent.
    _alive: OwnedFd,
}

impl Helpers {
    /// Starts the thread. `directory` holds the helpers' programs. Descriptors that whoever started the
    /// agent left open become close-on-exec: a helper that outlives the agent would keep them. The soft
    /// limit on open files is raised to the hard one, which helpers inherit; apps get a limit of their own.
    ///
    /// # Errors
    /// `wshd` is not in the directory; no thread, no pipe or no memory file could be had.
    pub fn start(directory: PathBuf) -> Result<Self, SysError> {
        process::close_on_exec_from(3).context("close_range", 3)?;
        let programs = Arc::new(Programs::open(directory)?);
        raise_open_files();
        let (reader, writer) = io::pipe().context("pipe2", "hang-up")?;
        let (asks, inbox) = mpsc::channel();
        let served = Arc::clone(&programs);
        std::thread::Builder::new()
            .name("helpers".to_owned())
            .spawn(move || inbox.into_iter().for_each(|ask| serve(&served, ask)))
            .context("clone", "the thread of the helpers")?;
        Ok(Self {
            programs,
            asks,
            hangup: reader.into(),
            _alive: writer.into(),
        })
    }

    /// Where the helpers' programs are.
    #[must_use]
    pub fn path(&self, program: &str) -> PathBuf {
        self.programs.directory.join(program)
    }

    /// A descriptor that hangs up when the agent dies, for a helper that shall die with it.
    ///
    /// # Errors
    /// `EMFILE`.
    pub fn hangup(&self) -> io::Result<OwnedFd> {
        self.hangup.try_clone()
    }

    /// Starts a helper.
    ///
    /// # Errors
    /// [`HelperError`]: not executable, no process or descriptor could be had.
    pub async fn spawn(&self, command: Command) -> Result<Child, HelperError> {
        let program = command.program;
        let (answer, started) = oneshot::channel();
        self.asks
            .send(Ask {
                command,
                runtime: Handle::current(),
                answer,
            })
            .map_err(|_| HelperError::Leaving(program))?;
        let child = started
            .await
            .map_err(|_| HelperError::Leaving(program))?
            .map_err(|source| HelperError::Start { program, source })?
            .claim()
            .ok_or(HelperError::Leaving(program))?;
        tracing::debug!(helper = program, pid = child.pid, "helper started");
        Ok(child)
    }
}

/// Each instance costs the agent a handful of descriptors, and a shell's soft limit is 1024.
fn raise_open_files() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map(|()| (soft, hard))
    });
    match raised {
        Ok((before, open_files)) => tracing::info!(open_files, before, "limit on open files"),
        Err(error) => tracing::warn!(%error, "the limit on open files cannot be raised"),
    }
}

/// On the thread: starts the helper and the task that reaps it.
fn serve(programs: &Programs, ask: Ask) {
    if ask.answer.is_closed() {
        return;
    }
    let child = start(programs, &ask.command).map(|(pid, pidfd)| {
        let (ended, end) = watch::channel(None);
        let pidfd = Arc::new(pidfd);
        ask.runtime.spawn(reap(Arc::clone(&pidfd), ended));
        Unclaimed(Some(Child { pid, pidfd, end }))
    });
    // Nobody waits any more: it ends here.
    drop(ask.answer.send(child));
}

/// Waits on the pidfd, which becomes readable when the process has ended (`pidfd_open(2)`). Where that
/// cannot be had (descriptors are short), looks now and then, until it can: a helper that lives is
/// never told as ended, and one that ended is always reaped.
async fn reap(pidfd: Arc<OwnedFd>, ended: watch::Sender<Option<Ended>>) {
    let mut warned = false;
    let how = loop {
        if let Err(error) = watch_end(&pidfd).await {
            if !std::mem::replace(&mut warned, true) {
                tracing::warn!(%error, "a helper cannot be watched and is looked at every second");
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        if let Some(how) = how_it_ended(&pidfd) {
            break how;
        }
    };
    ended.send_replace(Some(how));
}

async fn watch_end(pidfd: &OwnedFd) -> io::Result<()> {
    let pidfd = super::watched(pidfd.try_clone()?, Interest::READABLE)?;
    pidfd.readable().await.map(drop)
}

/// Reaps a helper that has ended; `None`: it lives.
fn how_it_ended(pidfd: &OwnedFd) -> Option<Ended> {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG;
    match waitid(Id::PIDFd(pidfd.as_fd()), flags) {
        Ok(WaitStatus::Exited(_, code)) => Some(Ended::Exited(code)),
        Ok(WaitStatus::Signaled(_, signal, _)) => Some(Ended::Signaled(signal as i32)),
        Ok(
            WaitStatus::Stopped(..)
            | WaitStatus::PtraceEvent(..)
            | WaitStatus::PtraceSyscall(..)
            | WaitStatus::Continued(..)
            | WaitStatus::StillAlive,
        )
        | Err(Errno::EINTR) => None,
        Err(_) => Some(Ended::Unknown),
    }
}

fn start(programs: &Programs, command: &Command) -> Result<(i32, OwnedFd), SysError> {
    let path = programs.path(command.program);
    let fault = |call: &'static str, errno| SysError {
        call,
        on: path.display().to_string(),
        errno,
    };
    let strings = |all: Vec<Vec<u8>>| -> Result<Vec<CString>, SysError> {
        let zero = |_| fault("posix_spawn, a zero byte in an argument of", Errno::EINVAL);
        all.into_iter()
            .map(|bytes| CString::new(bytes).map_err(zero))
            .collect()
    };
    let argv0 = command
        .argv0
        .clone()
        .unwrap_or_else(|| path.clone().into_os_string());
    let args = std::iter::once(argv0).chain(command.args.iter().cloned());
    let args = strings(args.map(OsString::into_vec).collect())?;
    let env = strings(
        command
            .env
            .iter()
            .map(|(name, value)| assignment(name, value))
            .collect(),
    )?;
    let actions = actions(command).map_err(|errno| fault("posix_spawn_file_actions", errno))?;
    let attributes = attributes().map_err(|errno| fault("posix_spawnattr", errno))?;
    let pid = posix_spawn(&path, &actions, &attributes, &args, &env)
        .map_err(|errno| fault("posix_spawn", errno))?;
    // The number is still this process: nobody but the reaper waits for it, and that needs the pidfd.
    let pidfd = pidfd::open(pid.as_raw()).inspect_err(|_| end(pid))?;
    Ok((pid.as_raw(), pidfd))
}

/// Kills and reaps a child that no pidfd could be had for: the caller hears that it was not started.
#[expect(
    clippy::disallowed_methods,
    reason = "a child that only this thread knows and nobody has waited for: its number is its own"
)]
fn end(pid: Pid) {
    let _ended_already = kill(pid, Signal::SIGKILL);
    while waitpid(pid, None) == Err(Errno::EINTR) {}
}

fn assignment(name: &str, value: &OsString) -> Vec<u8> {
    [name.as_bytes(), b"=", value.as_encoded_bytes()].concat()
}

/// Every descriptor goes to its number by way of a number above all others, because a target may be
/// the source of another one. `EMFILE` where such a number is beyond what the helper may have.
fn actions(command: &Command) -> nix::Result<PosixSpawnFileActions> {
    let mut actions = PosixSpawnFileActions::init()?;
    let numbers = command
        .fds
        .iter()
        .flat_map(|(fd, target)| [fd.as_raw_fd(), *target]);
    let above = numbers.max().unwrap_or(2).max(2);
    // The C library refuses such numbers by returning an errno, nix looks for -1: unless it is checked
    // here, the helper would start without its descriptors.
    let highest = i32::try_from(command.fds.len()).map(|count| above.checked_add(count));
    let highest = highest.ok().flatten().and_then(|n| u64::try_from(n).ok());
    let (most, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if highest.is_none_or(|highest| highest >= most) {
        return Err(Errno::EMFILE);
    }
    for ((fd, _), spare) in command.fds.iter().zip(above + 1..) {
        actions.add_dup2(fd.as_raw_fd(), spare)?;
    }
    for standard in 0..=2 {
        if !command.fds.iter().any(|(_, target)| *target == standard) {
            actions.add_open(standard, "/dev/null", OFlag::O_RDWR, Mode::empty())?;
        }
    }
    for ((_, target), spare) in command.fds.iter().zip(above + 1..) {
        actions.add_dup2(spare, *target)?;
        actions.add_close(spare)?;
    }
    Ok(actions)
}

/// No signal blocked, none ignored: `SIGPIPE` is ignored in every Rust program.
fn attributes() -> nix::Result<PosixSpawnAttr> {
    let mut attributes = PosixSpawnAttr::init()?;
    attributes.set_sigmask(&SigSet::empty())?;
    attributes.set_sigdefault(&SigSet::all())?;
    attributes.set_flags(
        PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK | PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF,
    )?;
    Ok(attributes)
}

#[cfg(test)]
mod tests {
    use super::{Command, Ended, HelperError, Helpers};
    use nix::errno::Errno;
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    use nix::sys::wait::WaitPidFlag;
    use std::fs;
    use std::io::{Read, Write, pipe};
    use std::ops::Deref;
    use std::os::fd::{AsRawFd, OwnedFd};
    use std::os::unix::fs::symlink;
    use std::path::{Path, PathBuf};
    use std::time::{Duration, Instant};

    fn shell(script: &str, fds: Vec<(OwnedFd, i32)>) -> Command {
        let args = vec!["-c".into(), script.into()];
        Command {
            program: "sh",
            argv0: None,
            args,
            env: Vec::new(),
            fds,
        }
    }

    /// A shell by the side of a `wshd` that nobody starts here.
    struct Shells {
        helpers: Helpers,
        directory: PathBuf,
    }

    impl Deref for Shells {
        type Target = Helpers;

        fn deref(&self) -> &Helpers {
            &self.helpers
        }
    }

    impl Drop for Shells {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.directory).unwrap();
        }
    }

    fn helpers() -> Shells {
        let name = format!("ostler-helpers-{}", std::process::id());
        let directory = std::env::temp_dir().join(name);
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("wshd"), "not started").unwrap();
        symlink("/bin/sh", directory.join("sh")).unwrap();
        let helpers = Helpers::start(directory.clone()).unwrap();
        Shells { helpers, directory }
    }

    async fn output(helpers: &Helpers, mut command: Command) -> String {
        let (mut reader, writer) = pipe().unwrap();
        command.fds.push((writer.into(), 1));
        let child = helpers.spawn(command).await.unwrap();
        assert_eq!(child.wait().await, Ended::Exited(0));
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        text
    }

    #[tokio::test]
    async fn ends_come_through() {
        let helpers = helpers();
        let exits = helpers.spawn(shell("exit 7", Vec::new())).await.unwrap();
        assert_eq!(exits.wait().await, Ended::Exited(7));
        assert_eq!(exits.ended(), Some(Ended::Exited(7)));
        let killed = helpers
            .spawn(shell("kill -9 $$", Vec::new()))
            .await
            .unwrap();
        assert_eq!(killed.wait().await, Ended::Signaled(9));
        let (reader, _writer) = pipe().unwrap();
        let waits = shell("read x", vec![(reader.into(), 0)]);
        let waits = helpers.spawn(waits).await.unwrap();
        assert_eq!(waits.ended(), None);
        waits.kill();
        assert_eq!(waits.wait().await, Ended::Signaled(9));
        assert!(
            !Path::new(&format!("/proc/{}", waits.pid)).exists(),
            "reaped"
        );
        waits.kill();
    }

    #[tokio::test]
    async fn a_helper_has_the_given_descriptors_and_environment_only() {
        let helpers = helpers();
        let (a, mut to_a) = pipe().unwrap();
        let (b, mut to_b) = pipe().unwrap();
        to_a.write_all(b"a\n").unwrap();
        to_b.write_all(b"b\n").unwrap();
        // Each goes to the other's number.
        let (number_a, number_b) = (a.as_raw_fd(), b.as_raw_fd());
        let script = format!(
            "read a < /proc/$$/fd/{number_b}; read b < /proc/$$/fd/{number_a}; echo $a $b; ls /proc/self/fd; env"
        );
        let fds = vec![(a.into(), number_b), (b.into(), number_a)];
        let mut command = shell(&script, fds);
        command.env = vec![("ONE", "x y".into())];
        let text = output(&helpers, command).await;
        let mut expected = vec!["0".to_owned(), "1".to_owned(), "2".to_owned()];
        expected.extend([number_a, number_b].map(|number| number.to_string()));
        let (words, rest) = text.split_once('\n').unwrap();
        assert_eq!(words, "a b");
        let (numbers, variables): (Vec<&str>, Vec<&str>) =
            rest.lines().partition(|line| line.parse::<i32>().is_ok());
        // One more is the listing itself.
        assert_eq!(numbers.len(), expected.len() + 1, "{numbers:?}");
        assert!(
            expected
                .iter()
                .all(|number| numbers.contains(&number.as_str())),
            "{numbers:?}"
        );
        assert!(variables.contains(&"ONE=x y"));
        // What the shell itself sets.
        assert!(
            variables
                .iter()
                .all(|v| ["ONE=", "PWD=", "_=", "SHLVL=", "OLDPWD="]
                    .iter()
                    .any(|own| v.starts_with(own))),
            "{variables:?}"
        );
    }

    #[tokio::test]
    async fn a_helper_is_titled_and_ignores_no_signal() {
        let helpers = helpers();
        let mut command = shell(
            "tr '\\0' ' ' < /proc/$$/cmdline; echo; grep SigIgn /proc/$$/status",
            vec![],
        );
        command.argv0 = Some("wshd: title".into());
        let text = output(&helpers, command).await;
        assert!(text.starts_with("wshd: title -c "), "{text}");
        // But for the two signals that the C library keeps for itself: it cannot give them back.
        let ignored = text.trim().rsplit('\t').next().unwrap();
        let ignored = u64::from_str_radix(ignored, 16).unwrap();
        assert_eq!(ignored & !(0b11 << 31), 0, "{text}");
    }

    #[tokio::test]
    async fn a_helper_notices_that_the_agent_is_gone() {
        let helpers = helpers();
        let hangup = helpers.hangup().unwrap();
        let child = helpers
            .spawn(shell("read x <&3; exit 5", vec![(hangup, 3)]))
            .await
            .unwrap();
        assert_eq!(child.ended(), None);
        drop(helpers);
        assert_eq!(child.wait().await, Ended::Exited(5));
    }

    /// Opens `/dev/null` until no number below `limit`, now the soft limit, is free.
    fn exhaust(limit: u64) -> Vec<OwnedFd> {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, limit, hard).unwrap();
        std::iter::from_fn(|| std::fs::File::open("/dev/null").ok())
            .map(OwnedFd::from)
            .collect()
    }

    /// Whether this process has children, dead or alive.
    fn has_children() -> bool {
        use nix::sys::wait::waitpid;
        waitpid(None, Some(WaitPidFlag::WNOHANG)) != Err(Errno::ECHILD)
    }

    #[tokio::test]
    async fn a_helper_that_nobody_waits_for_any_more_does_not_live() {
        use std::future::Future;
        use std::task::{Context, Poll, Waker};
        let helpers = helpers();
        let mut context = Context::from_waker(Waker::noop());
        let (mut reader, spawned) = loop {
            let (reader, writer) = pipe().unwrap();
            let command = shell("echo; exec sleep 600", vec![(writer.into(), 1)]);
            let mut spawned = Box::pin(helpers.spawn(command));
            // On a busy machine it may be there at once: that one is not the matter here.
            match spawned.as_mut().poll(&mut context) {
                Poll::Pending => break (reader, spawned),
                Poll::Ready(child) => child.unwrap().kill(),
            }
        };
        // It runs. Its `Child` is on its way, or there.
        reader.read_exact(&mut [0]).unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        let begun = Instant::now();
        drop(spawned);
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
        assert!(begun.elapsed() < Duration::from_secs(60), "it lived on");
    }

    #[tokio::test]
    async fn a_helper_that_cannot_be_held_does_not_live() {
        let helpers = helpers();
        let taken = exhaust(64);
        let error = helpers.spawn(shell("sleep 5", Vec::new())).await;
        assert!(
            matches!(&error, Err(HelperError::Start { source, .. }) if source.errno == Errno::EMFILE),
            "{error:?}"
        );
        assert!(!has_children());
        drop(taken);
    }

    #[tokio::test]
    async fn a_helper_that_cannot_be_watched_is_followed_to_its_end() {
        let helpers = helpers();
        let mut taken = exhaust(64);
        // One for the pidfd, none to watch it with.
        taken.pop();
        let command = shell("sleep 0.2; exit 7", Vec::new());
        let child = helpers.spawn(command).await.unwrap();
        tokio::task::yield_now().await;
        drop(taken);
        assert_eq!(child.wait().await, Ended::Exited(7));
        assert!(!has_children());
    }

    #[tokio::test]
    async fn a_descriptor_that_has_no_place_is_an_error() {
        let helpers = helpers();
        let (reader, _writer) = pipe().unwrap();
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, 64, hard).unwrap();
        let high = nix::fcntl::fcntl(&reader, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(63)).unwrap();
        let high = container::sys::process::inherited(high).unwrap();
        let error = helpers.spawn(shell("exit 0", vec![(high, 3)])).await;
        assert!(
            matches!(&error, Err(HelperError::Start { source, .. }) if source.errno == Errno::EMFILE),
            "{error:?}"
        );
        let error = helpers
            .spawn(shell("exit 0", vec![(reader.into(), 4000)]))
            .await;
        assert!(error.is_err(), "{error:?}");
        assert!(!has_children());
    }

    #[tokio::test]
    async fn the_agent_may_open_what_the_machine_allows() {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, hard.min(256), hard).unwrap();
        let _helpers = helpers();
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), (hard, hard));
    }

    #[tokio::test]
    async fn what_cannot_be_executed_is_an_error() {
        let helpers = helpers();
        let mut command = shell("", Vec::new());
        command.program = "no-such-helper";
        let error = helpers.spawn(command).await.unwrap_err();
        let HelperError::Start {
            program: "no-such-helper",
            source,
        } = error
        else {
            panic!("{error}")
        };
        let path = helpers.directory.join("no-such-helper");
        assert_eq!(source.errno, Errno::ENOENT);
        assert_eq!(Path::new(&source.on), path);
        let mut command = shell("", Vec::new());
        command.args.push("a\0b".into());
        assert!(helpers.spawn(command).await.is_err());
    }
}
