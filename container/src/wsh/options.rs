//! The command line.

use crate::job::Rlimit;
use nix::sys::resource::Resource;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

pub(super) const HELP: &str = "\
wsh: run a program in a container.

    wsh --socket <container>/run/wshd.sock [--user NAME] [--env NAME=VALUE]… [--dir PATH]
        [--rlimit NAME=SOFT[:HARD]]… [--] [COMMAND [ARGUMENT…]]

    wsh --socket …/run/wshd.sock --user vcap /bin/bash      a shell, in a terminal
    wsh --socket …/run/wshd.sock ps aux | grep ruby         as root of the container, in a pipe

--socket PATH   the container's socket
--user NAME     a name or number of the container's /etc/passwd; default: root
--env NAME=VALUE   one more variable for the command; NAME alone: as it is here
--dir PATH      the command's working directory; default: the user's home
--rlimit NAME=SOFT[:HARD]   a limit of the command (nofile, core, cpu …); unlimited is a value, too
COMMAND         searched in the container's PATH; default: the user's shell

Where standard input and output are a terminal, the command gets one of the container's, which follows
the size of yours. Otherwise it gets your pipes, and files to read, themselves. What goes to a file is copied there, so that
nobody inside can keep that file: if it cannot be written, wsh fails.

The exit code is the command's, or 128+n when signal n ended it; 127: no such command, 126: it cannot
be executed, 125: wsh itself failed and says why. TERM, INT, HUP and QUIT are passed to the command, or
end wsh if it has not begun; killing wsh does not kill it, but whoever then writes to what was a
terminal or a file gets SIGPIPE. A container that does not begin it within 5 s
is given up.
";

/// What the command line asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Choice {
    Help,
    Run(Options),
}

/// A program to run.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Options {
    pub(super) socket: PathBuf,
    pub(super) user: String,
    /// `NAME=value`, beside what the terminal needs.
    pub(super) env: Vec<Vec<u8>>,
    /// The working directory.
    pub(super) dir: Option<Vec<u8>>,
    pub(super) rlimits: Vec<Rlimit>,
    /// Empty: the user's shell.
    pub(super) command: Vec<Vec<u8>>,
}

/// Everything from the first word that is no option on is the command.
pub(super) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Choice, String> {
    let mut arguments = arguments.into_iter();
    let mut socket = None;
    let mut options = Options {
        socket: PathBuf::new(),
        user: "root".to_owned(),
        env: Vec::new(),
        dir: None,
        rlimits: Vec::new(),
        command: Vec::new(),
    };
    while let Some(argument) = arguments.next() {
        let mut value = |name: &str| arguments.next().ok_or(format!("{name} needs a value"));
        match argument.to_str() {
            Some("--help" | "-h") => return Ok(Choice::Help),
            Some("--socket") => socket = Some(PathBuf::from(value("--socket")?)),
            Some("--user") => {
                let name = value("--user")?;
                options.user = name
                    .into_string()
                    .map_err(|name| format!("no such user: {name:?}"))?;
            }
            Some("--env") => options.env.extend(variable(value("--env")?)?),
            Some("--dir") => options.dir = Some(value("--dir")?.into_vec()),
            Some("--rlimit") => options.rlimits.push(rlimit(&value("--rlimit")?)?),
            Some("--") => break,
            Some(option) if option.starts_with('-') => {
                return Err(format!("there is no option '{option}'"));
            }
            _ => {
                options.command.push(argument.into_vec());
                break;
            }
        }
    }
    options.command.extend(arguments.map(OsString::into_vec));
    options.socket = socket.ok_or("--socket PATH is missing: which container?")?;
    Ok(Choice::Run(options))
}

/// `NAME=VALUE`; of a `NAME` alone the value that it has here, if it has one.
fn variable(text: OsString) -> Result<Option<Vec<u8>>, String> {
    match text.as_bytes().iter().position(|byte| *byte == b'=') {
        Some(0) => Err(format!("--env {}: a name is missing", text.display())),
        Some(_) => Ok(Some(text.into_vec())),
        None if text.is_empty() => Err("--env needs NAME=VALUE or NAME".to_owned()),
        None => {
            Ok(std::env::var_os(&text)
                .map(|value| [text.as_bytes(), b"=", value.as_bytes()].concat()))
        }
    }
}

/// The limits that a person may set, as `prlimit(1)` names them.
const RLIMITS: [(&str, Resource); 15] = [
    ("as", Resource::RLIMIT_AS),
    ("core", Resource::RLIMIT_CORE),
    ("cpu", Resource::RLIMIT_CPU),
    ("data", Resource::RLIMIT_DATA),
    ("fsize", Resource::RLIMIT_FSIZE),
    ("locks", Resource::RLIMIT_LOCKS),
    ("memlock", Resource::RLIMIT_MEMLOCK),
    ("msgqueue", Resource::RLIMIT_MSGQUEUE),
    ("nice", Resource::RLIMIT_NICE),
    ("nofile", Resource::RLIMIT_NOFILE),
    ("nproc", Resource::RLIMIT_NPROC),
    ("rss", Resource::RLIMIT_RSS),
    ("rtprio", Resource::RLIMIT_RTPRIO),
    ("sigpending", Resource::RLIMIT_SIGPENDING),
    ("stack", Resource::RLIMIT_STACK),
];

/// `NAME=SOFT[:HARD]`; one number is both.
fn rlimit(text: &OsStr) -> Result<Rlimit, String> {
    let wrong = || {
        let names = RLIMITS.map(|(name, _)| name).join(", ");
        let text = text.display();
        format!("--rlimit {text}: write NAME=SOFT[:HARD], NAME one of {names}")
    };
    let number = |text: &str| match text {
        "unlimited" => Some(u64::MAX),
        digits => digits.parse().ok(),
    };
    let (name, values) = text
        .to_str()
        .and_then(|text| text.split_once('='))
        .ok_or_else(wrong)?;
    let (soft, hard) = values.split_once(':').unwrap_or((values, values));
    let found = RLIMITS.iter().find(|(known, _)| *known == name);
    match (found, number(soft), number(hard)) {
        (Some((_, resource)), Some(soft), Some(hard)) => Ok(Rlimit {
            resource: *resource as u32,
            soft,
            hard,
        }),
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::{Choice, Options, parse};
    use crate::job::Rlimit;

    fn line(line: &str) -> Result<Choice, String> {
        parse(line.split_whitespace().map(Into::into))
    }

    fn options(user: &str, command: &[&str]) -> Options {
        let command = command
            .iter()
            .map(|word| word.as_bytes().to_vec())
            .collect();
        Options {
            socket: "/s".into(),
            user: user.to_owned(),
            env: Vec::new(),
            dir: None,
            rlimits: Vec::new(),
            command,
        }
    }

    fn run(user: &str, command: &[&str]) -> Result<Choice, String> {
        Ok(Choice::Run(options(user, command)))
    }

    #[test]
    fn options_end_where_the_command_begins() {
        assert_eq!(line("--socket /s"), run("root", &[]));
        let expected = run("vcap", &["/bin/sh", "-c", "--user"]);
        assert_eq!(line("--socket /s --user vcap /bin/sh -c --user"), expected);
        assert_eq!(
            line("--socket /s -- --odd -x"),
            run("root", &["--odd", "-x"])
        );
        assert_eq!(line("--help"), Ok(Choice::Help));
    }

    #[test]
    fn what_a_command_gets_is_said_in_words() {
        let limit = |soft, hard| Rlimit {
            resource: 7,
            soft,
            hard,
        };
        let expected = Options {
            env: vec![b"A=b=c".to_vec(), b"E=".to_vec()],
            dir: Some(b"/tmp".to_vec()),
            rlimits: vec![limit(5, 5), limit(1, u64::MAX)],
            ..options("root", &["env"])
        };
        let said = line(
            "--socket /s --env A=b=c --env E= --env NOT_SET_ANYWHERE --dir /tmp --rlimit nofile=5 \
             --rlimit nofile=1:unlimited env",
        );
        assert_eq!(said, Ok(Choice::Run(expected)));
        let here = line("--socket /s --env PATH");
        let path = std::env::var("PATH").unwrap();
        let expected = Options {
            env: vec![format!("PATH={path}").into_bytes()],
            ..options("root", &[])
        };
        assert_eq!(here, Ok(Choice::Run(expected)));
    }

    #[test]
    fn complaints_say_what_is_wrong() {
        assert_eq!(
            line("/bin/sh").unwrap_err(),
            "--socket PATH is missing: which container?"
        );
        assert_eq!(line("--socket").unwrap_err(), "--socket needs a value");
        assert_eq!(
            line("--socket /s --rsh").unwrap_err(),
            "there is no option '--rsh'"
        );
        assert_eq!(
            line("--socket /s --env =x").unwrap_err(),
            "--env =x: a name is missing"
        );
        for wrong in ["files=1", "nofile", "nofile=", "nofile=-1", "nofile=1:2:3"] {
            let told = line(&format!("--socket /s --rlimit {wrong}")).unwrap_err();
            let begin = format!("--rlimit {wrong}: write NAME=SOFT[:HARD], NAME one of as, core,");
            assert!(told.starts_with(&begin), "{told}");
        }
    }
}
