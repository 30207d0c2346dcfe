//! `wsh`: runs a program in a container and waits for it.
//!
//! It hands its own descriptors to `wshd`, so the program reads and writes them without anybody between;
//! only a person's terminal, and files that it shall write, are not handed over, which others inside could keep: then the job gets a
//! terminal of the container's, or pipes, and this process copies. Killing it does not kill the job.
//!
//! Under a supervisor (`iomux-spawn`) the job comes in a memory file, and its status goes down a pipe
//! that is passed on to `wshd` as well: this process may be killed and no status is lost. Once it has
//! asked it holds nothing of the job, so it may be stopped as well.

mod follow;
mod options;
mod person;

use crate::client::{Client, Stdio};
use crate::fault::{Context, SysError};
use crate::job::JobRequest;
use crate::status::{Status, Step};
use crate::sys::{inherit, terminal};
use follow::{End, Keys, Output, Peer, Relay, Supervisor};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::unistd::{dup2_stderr, dup2_stdout};
use options::{Choice, Options};
use person::{Raw, Signals};
use std::io::IsTerminal;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::process::ExitCode;

/// The environment variable with the number of a descriptor of a [`JobRequest`] memory file.
pub const JOB_FD: &str = "WSH_JOB_FD";
/// The environment variable with the number of the status pipe's descriptor.
pub const STATUS_FD: &str = "WSH_STATUS_FD";

/// This program failed, and not the job (as docker and ssh have it, below the shell's own 126).
const FAILED: u8 = 125;
/// The job's program could not be executed.
const NOT_EXECUTABLE: u8 = 126;
/// The job's program does not exist.
const NOT_FOUND: u8 = 127;

/// The program.
#[must_use]
pub fn main() -> ExitCode {
    let options = match options::parse(std::env::args_os().skip(1)) {
        Ok(Choice::Run(options)) => options,
        Ok(Choice::Help) => {
            print!("{}", options::HELP);
            return ExitCode::SUCCESS;
        }
        Err(complaint) => {
            eprintln!("wsh: {complaint} (see wsh --help)");
            return ExitCode::from(FAILED);
        }
    };
    let (code, line) = match run(&options) {
        Ok(end) => verdict(end, &options),
        Err(error) => (FAILED, Some(error.to_string())),
    };
    if let Some(line) = line {
        eprintln!("wsh: {line}");
    }
    ExitCode::from(code)
}

fn run(options: &Options) -> Result<End, SysError> {
    let job = inherit::descriptor(JOB_FD)?;
    let status = inherit::descriptor(STATUS_FD)?;
    let client = Client::connect(&options.socket)?;
    let peer = Peer {
        client: &client,
        socket: &options.socket,
    };
    let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    let own = Stdio::Descriptors([stdin.as_fd(), stdout.as_fd(), stderr.as_fd()]);
    if let Some(job) = job {
        let job = with_command(job, options)?;
        let supervisor = status.as_ref().map(Supervisor::watch).transpose()?;
        let pipe = status.as_ref().map(AsFd::as_fd);
        client.run(&options.user, job.as_fd(), own, pipe)?;
        if supervisor.is_some() {
            let_go()?;
        }
        drop((job, status));
        return follow::supervised(&peer, supervisor.as_ref());
    }
    let request = JobRequest {
        argv: options.command.clone(),
        env: environment(options),
        cwd: options.dir.clone(),
        rlimits: options.rlimits.clone(),
        ..JobRequest::default()
    };
    let (job, status) = (request.to_memfd()?, status.as_ref().map(AsFd::as_fd));
    // Before the request: a signal from now on is the job's.
    let signals = Signals::take()?;
    if stdin.is_terminal() && stdout.is_terminal() {
        let window = terminal::size(&stdin).context("ioctl", "TIOCGWINSZ")?;
        client.run(&options.user, job.as_fd(), Stdio::Terminal(window), status)?;
        let _raw = Raw::enter(&stdin)?;
        follow::terminal(&peer, &signals)
    } else {
        plain(&peer, &signals, options, job.as_fd(), status)
    }
}

/// Lets the job's outputs go, and our words with them: its end is known to the supervisor when nobody
/// holds them any more, and we may be stopped.
fn let_go() -> Result<(), SysError> {
    let null = open(
        "/dev/null",
        OFlag::O_WRONLY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
    .context("open", "/dev/null")?;
    dup2_stdout(&null).context("dup2", "stdout")?;
    dup2_stderr(&null).context("dup2", "stderr")
}

/// A person's job without a terminal of its own. What is the person's terminal, or a file for output, is relayed: whoever is inside with
/// the same user could take the descriptor from the job, and write there for ever.
fn plain(
    peer: &Peer<'_>,
    signals: &Signals,
    options: &Options,
    job: BorrowedFd<'_>,
    status: Option<BorrowedFd<'_>>,
) -> Result<End, SysError> {
    let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    let mut relays = Vec::new();
    let mut instead = |output: Output| -> Result<OwnedFd, SysError> {
        let (relay, writer) = Relay::new(output)?;
        relays.push(relay);
        Ok(writer)
    };
    let [to, and] = [stdout.as_fd(), stderr.as_fd()].map(kept);
    let out = to.map(|_| instead(Output::Stdout)).transpose()?;
    let err = match &out {
        // By one pipe, or their lines would not come in their order.
        Some(out) if to == and => Some(out.try_clone().context("dup", "relay")?),
        _ => and.map(|_| instead(Output::Stderr)).transpose()?,
    };
    let (mut keys, in_) = if stdin.is_terminal() {
        let (keys, reader) = Keys::new()?;
        (Some(keys), Some(reader))
    } else {
        (None, None)
    };
    let three = [
        in_.as_ref().map_or(stdin.as_fd(), AsFd::as_fd),
        out.as_ref().map_or(stdout.as_fd(), AsFd::as_fd),
        err.as_ref().map_or(stderr.as_fd(), AsFd::as_fd),
    ];
    peer.client
        .run(&options.user, job, Stdio::Descriptors(three), status)?;
    drop((out, err, in_));
    follow::descriptors(peer, signals, &mut relays, &mut keys)
}

/// Device and inode of an output that is not handed over: a terminal or a file.
fn kept(stream: BorrowedFd<'_>) -> Option<(u64, u64)> {
    let status = fstat(stream).ok()?;
    let kind = SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT;
    (kind == SFlag::S_IFREG || stream.is_terminal()).then_some((status.st_dev, status.st_ino))
}

/// The supervisor's job; the command line's program only where the job names none.
fn with_command(job: OwnedFd, options: &Options) -> Result<OwnedFd, SysError> {
    let request = JobRequest::from_memfd(&job)?;
    if !request.argv.is_empty() || options.command.is_empty() {
        return Ok(job);
    }
    JobRequest {
        argv: options.command.clone(),
        ..request
    }
    .to_memfd()
}

/// What the person gives, and what programs want to know of the terminal; nothing else of the host's.
fn environment(options: &Options) -> Vec<Vec<u8>> {
    let given = |start: &[u8]| options.env.iter().any(|one| one.starts_with(start));
    let of_terminal = ["TERM", "LANG"].into_iter().filter_map(|name| {
        let start = [name.as_bytes(), b"="].concat();
        let value = std::env::var_os(name)?.into_vec();
        (!given(&start)).then(|| [start, value].concat())
    });
    options.env.iter().cloned().chain(of_terminal).collect()
}

/// The exit code, and the line that explains one of our own.
fn verdict(end: End, options: &Options) -> (u8, Option<String>) {
    let status = match end {
        End::Job(status) => status,
        End::ContainerGone => {
            let socket = options.socket.display();
            return (
                FAILED,
                Some(format!("the container behind {socket} is gone")),
            );
        }
        End::SupervisorGone => return (FAILED, None),
        End::Interrupted(signal) => Status::Signaled(signal),
    };
    match status {
        Status::Exited(code) => (code, None),
        Status::Signaled(signal) => (u8::try_from(128 + signal).unwrap_or(u8::MAX), None),
        // Not an end: follow does not return it.
        Status::Started { .. } => (FAILED, None),
        Status::Failed { step, errno } => {
            let code = match (step, Errno::from_raw(errno)) {
                (Step::Exec, Errno::ENOENT) => NOT_FOUND,
                (Step::Exec, _) => NOT_EXECUTABLE,
                _ => FAILED,
            };
            let program = options
                .command
                .first()
                .map(|name| String::from_utf8_lossy(name));
            let program = program.unwrap_or("the user's shell".into());
            let (what, errno) = (step.describe(), Errno::from_raw(errno));
            (
                code,
                Some(format!(
                    "{program} as '{}': cannot {what}: {errno}",
                    options.user
                )),
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{End, Options, verdict};
    use crate::status::{Status, Step};

    #[test]
    fn exit_codes_are_the_jobs_or_explained() {
        let options = Options {
            socket: "/run/wshd.sock".into(),
            user: "vcap".to_owned(),
            env: Vec::new(),
            dir: None,
            rlimits: Vec::new(),
            command: vec![b"rake".to_vec()],
        };
        let failed = |step, errno| End::Job(Status::Failed { step, errno });
        assert_eq!(
            verdict(End::Job(Status::Exited(255)), &options),
            (255, None)
        );
        assert_eq!(
            verdict(End::Job(Status::Signaled(9)), &options),
            (137, None)
        );
        let (code, line) = verdict(failed(Step::Exec, 2), &options);
        let expected =
            "rake as 'vcap': cannot execute the program: ENOENT: No such file or directory";
        assert_eq!((code, line.as_deref()), (127, Some(expected)));
        assert_eq!(verdict(failed(Step::Exec, 13), &options).0, 126);
        assert_eq!(verdict(failed(Step::User, 2), &options).0, 125);
        let gone = Some("the container behind /run/wshd.sock is gone".to_owned());
        assert_eq!(verdict(End::ContainerGone, &options), (125, gone));
    }
}
