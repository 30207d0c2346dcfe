//! `iomux-link`: follows one job's output, for a person or for the agent.
//!
//! Reads the spool by itself; the supervisor's `link.sock` only says when to look again, and by
//! closing that the supervisor is gone. Whatever happens to this process costs nobody anything: a
//! successor goes on at the cursor.

mod sink;

use crate::{
    exit,
    fault::{Context, SysError},
    hangup::{Hangup, Woken},
    iomux_spawn::{REFUSED, path_in},
    spool::{Cursor, Record, SpoolReader, open_dir},
    status::Status,
};
use nix::poll::{PollFlags, PollTimeout};
use sink::Sink;
use std::{
    ffi::OsString,
    io::{ErrorKind, Read},
    os::{
        fd::AsFd,
        unix::{ffi::OsStrExt, net::UnixStream},
    },
    path::PathBuf,
    process::ExitCode,
};

const USAGE: &str = "\
usage: iomux-link [--from CURSOR] [--no-follow] <jobdir>

Writes what a job writes: its stdout to descriptor 1, its stderr to descriptor 2, from the beginning of what is
kept, until the job has ended. Ends as the job ended: with its exit code, or 128 + the number of its signal.

  --from CURSOR   go on at this place (position:stdout:stderr, as --no-follow prints it)
  --no-follow     write what there is, then say at which cursor to go on

Exit 125: the job's end is not known, or iomux-link itself failed; descriptor 2 says which.

For the agent: IOMUX_FRAMES=1 writes records as frames to descriptor 1, from the cursor in IOMUX_FROM;
OSTLER_HANGUP_FD is a pipe whose end ends this process. Exit: 0 the job's end was written; 3 its supervisor is
gone (iomux-spawn --takeover); 4 hang-up; 7 it has too many readers; 1 failure; 2 usage
";

/// What the command line asks for.
#[derive(Debug, PartialEq, Eq)]
enum Args {
    Help,
    Follow {
        job_dir: PathBuf,
        from: Option<Cursor>,
        patience: Patience,
    },
}

/// What to do where the log ends for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Patience {
    Follow,
    Leave,
}

/// Why following stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// The end was written, now or before the cursor; and how the job ended, if that is known.
    Ended(Option<Status>),
    /// All there is was written.
    Left(Cursor),
    /// The supervisor is gone, and the end is not in the log.
    Gone,
    HungUp,
    /// The supervisor has too many readers.
    Refused,
}

/// The program.
#[must_use]
pub fn main() -> ExitCode {
    let for_agent = std::env::var_os("IOMUX_FRAMES").is_some_and(|value| value == "1");
    let (job_dir, from, patience) = match parse(std::env::args_os().skip(1).collect()) {
        Some(Args::Follow {
            job_dir,
            from,
            patience,
        }) => (job_dir, from, patience),
        Some(Args::Help) => {
            print!("{USAGE}");
            return ExitCode::from(exit::DONE);
        }
        None => {
            eprint!("{USAGE}");
            return ExitCode::from(exit::USAGE);
        }
    };
    let mut sink = if for_agent {
        Sink::frames()
    } else {
        Sink::Person
    };
    let outcome = start_of(from).and_then(|from| {
        let hangup = Hangup::inherit()?;
        follow(&job_dir, from, patience, &mut sink, &hangup)
    });
    ExitCode::from(match (outcome, sink) {
        (Ok(outcome), Sink::Person) => tell(outcome),
        (Ok(outcome), Sink::Frames { .. }) => code_of(outcome),
        (Err(error), sink) => {
            eprintln!("iomux-link: {error}");
            if matches!(sink, Sink::Person) {
                exit::OWN_FAILURE
            } else {
                exit::FAILED
            }
        }
    })
}

fn parse(args: Vec<OsString>) -> Option<Args> {
    let mut args = args.into_iter();
    let (mut from, mut patience, mut job_dir) = (None, Patience::Follow, None);
    while let Some(arg) = args.next() {
        match arg.as_bytes() {
            b"--help" | b"-h" => return Some(Args::Help),
            b"--no-follow" => patience = Patience::Leave,
            b"--from" => from = Some(args.next()?.to_str()?.parse().ok()?),
            [b'-', ..] | [] => return None,
            _ if job_dir.is_some() => return None,
            _ => job_dir = Some(PathBuf::from(arg)),
        }
    }
    Some(Args::Follow {
        job_dir: job_dir?,
        from,
        patience,
    })
}

/// The command line's cursor, else the environment's, else the beginning.
fn start_of(from: Option<Cursor>) -> Result<Cursor, SysError> {
    match (from, std::env::var("IOMUX_FROM")) {
        (Some(from), _) => Ok(from),
        (None, Err(_)) => Ok(Cursor::default()),
        (None, Ok(text)) => text
            .parse()
            .map_err(|_| nix::errno::Errno::EINVAL)
            .context("IOMUX_FROM", format_args!("{text:?}")),
    }
}

fn follow(
    job_dir: &std::path::Path,
    from: Cursor,
    patience: Patience,
    sink: &mut Sink,
    hangup: &Hangup,
) -> Result<Outcome, SysError> {
    let dir = open_dir(job_dir)?;
    // Before the first look, so that nothing appended after it goes unheard.
    let mut link = UnixStream::connect(path_in(&dir)).ok();
    let mut reader = SpoolReader::open(job_dir, from)?;
    let mut cursor = from;
    loop {
        while let Some((record, next)) = reader.next()? {
            let last = matches!(record, Record::End { .. });
            cursor = next;
            if sink.put(&record, &next, hangup)? == Woken::HungUp {
                return Ok(Outcome::HungUp);
            }
            if last {
                let flushed = sink.flush(hangup)?;
                return Ok(if flushed == Woken::HungUp {
                    Outcome::HungUp
                } else {
                    Outcome::Ended(reader.exit())
                });
            }
        }
        if sink.flush(hangup)? == Woken::HungUp {
            return Ok(Outcome::HungUp);
        }
        // The agent has had it, and does not ask again; a person wants to know how it went.
        if reader.ended() && matches!(sink, Sink::Person) {
            return Ok(Outcome::Ended(reader.exit()));
        }
        match (patience, &mut link) {
            (Patience::Leave, _) => return Ok(Outcome::Left(cursor)),
            (Patience::Follow, None) => return Ok(Outcome::Gone),
            (Patience::Follow, Some(socket)) => match wait(socket, hangup)? {
                Wait::More => {}
                Wait::HungUp => return Ok(Outcome::HungUp),
                Wait::Refused => return Ok(Outcome::Refused),
                // It may have written after the last look.
                Wait::Gone => link = None,
            },
        }
    }
}

enum Wait {
    More,
    Gone,
    Refused,
    HungUp,
}

/// Waits for a wake-up, and takes all that came.
fn wait(link: &mut UnixStream, hangup: &Hangup) -> Result<Wait, SysError> {
    if hangup.wait([(link.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE)? == Woken::HungUp {
        return Ok(Wait::HungUp);
    }
    let mut bytes = [0; 512];
    match link.read(&mut bytes) {
        Ok(0) => Ok(Wait::Gone),
        Ok(count) => {
            let refused = bytes.iter().take(count).any(|byte| *byte == REFUSED);
            Ok(if refused { Wait::Refused } else { Wait::More })
        }
        Err(error) if error.kind() == ErrorKind::Interrupted => Ok(Wait::More),
        // Reset: it was killed with our connection not yet accepted.
        Err(_) => Ok(Wait::Gone),
    }
}

/// The agent's exit code.
fn code_of(outcome: Outcome) -> u8 {
    match outcome {
        Outcome::Ended(_) | Outcome::Left(_) => exit::DONE,
        Outcome::Gone => exit::GONE,
        Outcome::HungUp => exit::HUNG_UP,
        Outcome::Refused => exit::FULL,
    }
}

/// A person's exit code, and what there is to say about it.
fn tell(outcome: Outcome) -> u8 {
    match outcome {
        Outcome::Ended(Some(status)) => return sink::code_of(status),
        Outcome::Left(cursor) => {
            eprintln!("iomux-link: go on with --from {cursor}");
            return exit::DONE;
        }
        Outcome::Ended(None) => {
            eprintln!("iomux-link: the container ended before the job's end was known")
        }
        Outcome::Gone => {
            eprintln!(
                "iomux-link: the job's supervisor is gone: continue it with iomux-spawn --takeover"
            );
        }
        Outcome::Refused => {
            eprintln!("iomux-link: the job has as many readers as its supervisor takes")
        }
        Outcome::HungUp => {}
    }
    exit::OWN_FAILURE
}

#[cfg(test)]
mod tests {
    use super::{Args, Patience, parse};
    use crate::spool::Cursor;

    #[test]
    fn command_lines() {
        let parsed = |line: &str| parse(line.split_whitespace().map(Into::into).collect());
        let job_dir = || "/j/1".into();
        let whole = Args::Follow {
            job_dir: job_dir(),
            from: None,
            patience: Patience::Follow,
        };
        assert_eq!(parsed("/j/1"), Some(whole));
        let from = Some(Cursor {
            position: 1,
            stdout: 2,
            stderr: 3,
        });
        let rest = Args::Follow {
            job_dir: job_dir(),
            from,
            patience: Patience::Leave,
        };
        assert_eq!(parsed("--no-follow --from 1:2:3 /j/1"), Some(rest));
        for line in [
            "",
            "/j/1 /j/2",
            "--from /j/1",
            "--from 1:2 /j/1",
            "--wat /j/1",
        ] {
            assert_eq!(parsed(line), None, "{line:?}");
        }
        assert_eq!(parsed("--help"), Some(Args::Help));
    }
}
