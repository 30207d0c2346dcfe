//! `iomux-spawn`: the supervisor of one job. Owns the read ends of its stdout and stderr and its
//! status pipe, and writes all three into the job's spool. It outlives the agent; when it is
//! killed, another takes over.
//!
//! ```text
//! app ──stdout──▶┐                             ┌─▶ spool.*   records
//!     ──stderr──▶┤ iomux-spawn (one epoll loop)┤
//! wshd ─status──▶┘                             └─▶ link.sock one byte to each reader: "there is more"
//!
//! running ─ status frame ─▶ exited ─ both pipes closed ─▶ End, synced; forget the job; exit 0
//!    └──── status pipe closed without one (the container's init died), both pipes closed ──▶ End
//! ```
//!
//! Readers only ever get wake-ups, and those without waiting: a reader that was stopped stops
//! nobody.

mod line;
mod pace;
mod readers;
mod source;
mod start;
mod supervise;

use crate::{
    client::Client,
    exit,
    fault::{Context, SysError},
    spool::{DEFAULT_CAP, SpoolWriter, Stream, Tail, open_dir, open_in},
    sys::inherit,
};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl, open},
    sys::stat,
    unistd::{dup2_stdout, setsid},
};
pub(crate) use readers::{REFUSED, path_in};

use readers::Readers;
use std::{
    ffi::{CString, OsString},
    fs::File,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::{Path, PathBuf},
    process::ExitCode,
};
use supervise::{Pipes, Supervisor};

const USAGE: &str = "\
usage: iomux-spawn <jobdir> <program> [arguments…]
       iomux-spawn --takeover <jobdir> --socket <wshd.sock>

Supervises one job: runs <program> (usually wsh), keeps everything that it writes in <jobdir>/spool.*, and the
way in which it ended. Follow it with `iomux-link <jobdir>`. The program must say what becomes of the job on
the descriptor in WSH_STATUS_FD, as wsh lets wshd do.

  --takeover    continue where a killed iomux-spawn left off; the last part of <jobdir> is the job's number

IOMUX_SPOOL_BYTES   how large the spool may grow before its oldest part goes (default 16777216)
IOMUX_JOB_FD        a descriptor to hand to the program as WSH_JOB_FD
Standard output is closed once readers can connect.
Exit: 0 the job ended and is recorded; 1 failure; 2 usage; 5 it has a supervisor; 6 <program> cannot be executed
";

/// What the command line asks for.
#[derive(Debug, PartialEq, Eq)]
enum Args {
    Help,
    Supervise { job_dir: PathBuf, mode: Mode },
}

#[derive(Debug, PartialEq, Eq)]
enum Mode {
    Start { program: Vec<CString> },
    TakeOver { socket: PathBuf },
}

impl Mode {
    /// Where the container's init listens; of a program that is no `wsh` it is not known.
    fn socket(&self) -> Option<PathBuf> {
        match self {
            Self::TakeOver { socket } => Some(socket.clone()),
            Self::Start { program } => {
                let mut args = program
                    .iter()
                    .skip_while(|arg| arg.to_bytes() != b"--socket");
                let path = args.nth(1)?;
                Some(PathBuf::from(OsString::from_vec(path.to_bytes().to_vec())))
            }
        }
    }
}

/// The program.
#[must_use]
pub fn main() -> ExitCode {
    match parse(std::env::args_os().skip(1).collect()) {
        None => {
            eprint!("{USAGE}");
            ExitCode::from(exit::USAGE)
        }
        Some(Args::Help) => {
            print!("{USAGE}");
            ExitCode::from(exit::DONE)
        }
        Some(Args::Supervise { job_dir, mode }) => run(&job_dir, &mode).unwrap_or_else(|error| {
            eprintln!("iomux-spawn: {error}");
            ExitCode::from(exit::FAILED)
        }),
    }
}

fn parse(args: Vec<OsString>) -> Option<Args> {
    let mut args = args.into_iter();
    let first = args.next()?;
    match first.as_bytes() {
        b"--help" | b"-h" => Some(Args::Help),
        b"--takeover" => {
            let job_dir = args.next()?.into();
            let socket = (args.next()? == "--socket").then(|| args.next())??.into();
            let mode = Mode::TakeOver { socket };
            args.next()
                .is_none()
                .then_some(Args::Supervise { job_dir, mode })
        }
        [b'-', ..] | [] => None,
        _ => {
            let program: Result<Vec<_>, _> = args.map(|arg| CString::new(arg.into_vec())).collect();
            let program = program.ok().filter(|program| !program.is_empty())?;
            Some(Args::Supervise {
                job_dir: first.into(),
                mode: Mode::Start { program },
            })
        }
    }
}

fn run(job_dir: &Path, mode: &Mode) -> Result<ExitCode, SysError> {
    let job_fd = inherit::descriptor("IOMUX_JOB_FD")?;
    // A person's shell has made this process the leader of its group, and then it stays in its
    // session.
    let _ = setsid();
    inherit::reap_by_kernel()?;
    let cap = std::env::var("IOMUX_SPOOL_BYTES")
        .ok()
        .and_then(|bytes| bytes.parse().ok());
    let dir = open_dir(job_dir)?;
    let Some(_lock) = lock(&dir)? else {
        eprintln!(
            "iomux-spawn: {} has a supervisor already",
            job_dir.display()
        );
        return Ok(ExitCode::from(exit::LOCKED));
    };
    let mut spool = SpoolWriter::open(job_dir, cap.unwrap_or(DEFAULT_CAP))?;
    let readers = Readers::listen(dir)?;
    ready()?;
    let job = job_number(job_dir);
    let (pipes, code) = match mode {
        Mode::Start { program } => {
            if *spool.tail() != Tail::default() {
                return Err(Errno::EEXIST)
                    .context("start", format_args!("{job_dir:?}: use --takeover"));
            }
            start_or_say(&mut spool, program, job_fd)?
        }
        // The last one was killed after its last record.
        Mode::TakeOver { .. } if spool.tail().ended => (None, exit::DONE),
        Mode::TakeOver { socket } => (take_over(&mut spool, socket, job)?, exit::DONE),
    };
    Supervisor::new(spool, readers, pipes)?.run()?;
    if let (Some(socket), Some(job)) = (mode.socket(), job) {
        // The init may be gone, and what it retained with it.
        let _ = Client::connect(&socket).and_then(|client| client.forget(job));
    }
    Ok(ExitCode::from(code))
}

/// Starts the job; if that fails the log says so, and the code does too.
fn start_or_say(
    spool: &mut SpoolWriter,
    program: &[CString],
    job_fd: Option<OwnedFd>,
) -> Result<(Option<Pipes>, u8), SysError> {
    match start::start(program, job_fd) {
        Ok(pipes) => Ok((Some(pipes), exit::DONE)),
        Err(error) => {
            eprintln!("iomux-spawn: {error}");
            spool.exit(start::failed(error.errno))?;
            Ok((None, exit::NOT_STARTED))
        }
    }
}

/// Held until this process ends, however it ends; `None` if somebody holds it.
fn lock(dir: &OwnedFd) -> Result<Option<File>, SysError> {
    let file = File::from(open_in(
        dir.as_fd(),
        "lock",
        OFlag::O_RDWR | OFlag::O_CREAT,
    )?);
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(std::fs::TryLockError::WouldBlock) => Ok(None),
        Err(std::fs::TryLockError::Error(error)) => Err(error).context("flock", "lock"),
    }
}

/// Tells whoever waits at the other end of standard output that the lock is held and readers can
/// connect.
fn ready() -> Result<(), SysError> {
    let null = open(
        "/dev/null",
        OFlag::O_WRONLY | OFlag::O_CLOEXEC,
        stat::Mode::empty(),
    )
    .context("open", "/dev/null")?;
    dup2_stdout(null).context("dup2", "stdout")
}

/// Gets the pipes of a running job from its init. `None`: the init is dead or knows no such job,
/// and what the pipes held is gone with it, which the log then says.
fn take_over(
    spool: &mut SpoolWriter,
    socket: &Path,
    job: Option<u32>,
) -> Result<Option<Pipes>, SysError> {
    let job = job
        .ok_or(Errno::EINVAL)
        .context("takeover", "the directory is not named by a job's number")?;
    let (status, theirs) = start::pipe("status")?;
    let attached = Client::connect(socket).and_then(|client| client.attach(job, theirs.as_fd()));
    match attached {
        Ok((stdout, stderr)) => {
            // Those that an older program made may block.
            for pipe in [&stdout, &stderr] {
                fcntl(pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).context("fcntl", "takeover")?;
            }
            Ok(Some(Pipes {
                stdout,
                stderr,
                status,
            }))
        }
        Err(error) if is_dead(error.errno) => {
            Stream::ALL
                .into_iter()
                .try_for_each(|stream| spool.uncertain(stream))?;
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Whether the answer to an attach says that there is nothing to attach to, now and for ever.
fn is_dead(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::ENOENT | Errno::ECONNREFUSED | Errno::ECONNRESET | Errno::EPIPE | Errno::ENODATA
    )
}

/// A job's directory is named by its number.
fn job_number(job_dir: &Path) -> Option<u32> {
    job_dir.file_name()?.to_str()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::{Args, Mode, job_number, parse};
    use std::path::Path;

    fn parsed(line: &str) -> Option<Args> {
        parse(line.split_whitespace().map(Into::into).collect())
    }

    #[test]
    fn command_lines() {
        let Some(Args::Supervise { job_dir, mode }) =
            parsed("/j/1 wsh --socket /s --user vcap /bin/bash")
        else {
            panic!("a start")
        };
        assert_eq!(
            (job_dir.as_path(), mode.socket().as_deref()),
            (Path::new("/j/1"), Some(Path::new("/s")))
        );
        assert!(matches!(mode, Mode::Start { program } if program.len() == 6));
        let mode = Mode::TakeOver {
            socket: "/s".into(),
        };
        let takeover = Args::Supervise {
            job_dir: "/j/2".into(),
            mode,
        };
        assert_eq!(parsed("--takeover /j/2 --socket /s"), Some(takeover));
        for line in [
            "",
            "/j/1",
            "--takeover",
            "--takeover /j/1",
            "--takeover /j/1 --socket",
            "--what /j/1 x",
        ] {
            assert_eq!(parsed(line), None, "{line:?}");
        }
        assert_eq!(parsed("--help"), Some(Args::Help));
    }

    #[test]
    fn the_directory_names_the_job() {
        assert_eq!(job_number(Path::new("/a/jobs/17/")), Some(17));
        assert_eq!(job_number(Path::new("/a/jobs/x")), None);
    }
}
