//! The programs the agent runs on its own behalf: `nft` and `iptables`, when it starts, when somebody
//! else has changed the rules, and when it leaves. Never on a path that an instance takes.

use super::NetworkError;
use container::sys::pidfd;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsFd;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// Where the two are installed; a daemon's own PATH often lacks the sbin directories.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// How long one may take. Others' large transactions go first.
const DEADLINE: Duration = Duration::from_secs(30);

/// Bytes of input for which one gets a millisecond more.
const PER_MILLISECOND: usize = 500;

/// Runs `program` to its end with `input` and gives back its standard output. Blocks, for 30 s at
/// most, and longer for megabytes of input. What it wrote to standard error is the detail of [`NetworkError::Program`].
pub(super) fn run(
    program: &'static str,
    arguments: &[&str],
    input: &str,
) -> Result<String, NetworkError> {
    let more = u64::try_from(input.len() / PER_MILLISECOND).unwrap_or(u64::MAX);
    let deadline = DEADLINE.saturating_add(Duration::from_millis(more));
    run_within(deadline, program, arguments, input)
}

#[expect(
    clippy::disallowed_methods,
    reason = "not a helper: a short program, whose output is read here"
)]
fn run_within(
    deadline: Duration,
    program: &'static str,
    arguments: &[&str],
    input: &str,
) -> Result<String, NetworkError> {
    let failed = |detail: String| NetworkError::Program {
        program,
        arguments: arguments.join(" "),
        detail,
    };
    let error = |error: io::Error| failed(error.to_string());
    // No pipes: whatever it does, nothing here waits for anything but its end.
    let input = file(input).map_err(error)?;
    let (mut output, mut complaint) = (file("").map_err(error)?, file("").map_err(error)?);
    let copy = |file: &File| file.try_clone().map_err(error);
    let mut child = Command::new(program)
        .args(arguments)
        .env_clear()
        .env("PATH", PATH)
        .env("LC_ALL", "C")
        .stdin(input)
        .stdout(copy(&output)?)
        .stderr(copy(&complaint)?)
        .spawn()
        .map_err(|spawn| {
            if spawn.kind() == io::ErrorKind::NotFound {
                NetworkError::Missing { program }
            } else {
                error(spawn)
            }
        })?;
    let ended = ends_within(deadline, &child);
    if !matches!(ended, Ok(true)) {
        // Dead already: so be it.
        let _ = child.kill();
    }
    let status = child.wait().map_err(error)?;
    if !ended.map_err(error)? {
        return Err(NetworkError::Hung {
            program,
            arguments: arguments.join(" "),
            deadline,
        });
    }
    if !status.success() {
        let complaint = text(&mut complaint).map_err(error)?;
        return Err(failed(format!("{status}: {}", complaint.trim())));
    }
    text(&mut output).map_err(error)
}

/// A file in memory, to be read from its beginning.
fn file(content: &str) -> io::Result<File> {
    let mut file = File::from(memfd_create("ostler", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(content.as_bytes())?;
    file.rewind()?;
    Ok(file)
}

fn text(file: &mut File) -> io::Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Waits for a child of ours that nobody has waited for.
fn ends_within(deadline: Duration, child: &Child) -> io::Result<bool> {
    let pid = i32::try_from(child.id()).unwrap_or(-1);
    let pidfd = pidfd::open(pid).map_err(|error| io::Error::from(error.errno))?;
    let end = Instant::now() + deadline;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(
            &mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)],
            timeout,
        ) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// More than a pipe holds.
    const MUCH: usize = 1 << 20;

    #[test]
    fn input_output_and_complaints_come_through() {
        let input = "x".repeat(MUCH);
        assert_eq!(run("cat", &[], &input).unwrap(), input);
        assert_eq!(run("cat", &["/dev/stdin"], &input).unwrap(), input);
        // One that writes before it reads, and one that never reads.
        let script = "head -c 1000000 /dev/zero; cat";
        let both = run("sh", &["-c", script], &input).unwrap();
        assert_eq!(both.len(), 1_000_000 + MUCH);
        let failed = run("sh", &["-c", "echo why >&2; exit 3"], &input).unwrap_err();
        assert_eq!(
            failed.to_string(),
            "sh -c echo why >&2; exit 3: exit status: 3: why"
        );
        let missing = run("no-such-program", &[], "").unwrap_err();
        assert!(matches!(missing, NetworkError::Missing { .. }), "{missing}");
    }

    #[test]
    fn a_program_that_does_not_end_is_ended() {
        let directory = std::env::temp_dir().join(format!("ostler-hung-{}", std::process::id()));
        let path = directory.to_str().unwrap();
        // Stopped, as by a terminal.
        let script = format!("echo $$ > {path}; kill -STOP $$");
        let deadline = Duration::from_secs(3);
        let begun = Instant::now();
        let error = run_within(deadline, "sh", &["-c", &script], &"x".repeat(MUCH)).unwrap_err();
        assert!(begun.elapsed() < Duration::from_secs(60));
        let told = "did not end within 3s and was killed";
        assert!(error.to_string().ends_with(told), "{error}");
        let pid = std::fs::read_to_string(path).unwrap();
        std::fs::remove_file(path).unwrap();
        assert!(!std::path::Path::new("/proc").join(pid.trim()).exists());
    }
}
