//! The command line.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

pub(super) const HELP: &str = "\
wsh: run a program in a container.

    wsh --socket <container>/run/wshd.sock [--user NAME] [--] [COMMAND [ARGUMENT…]]

    wsh --socket …/run/wshd.sock --user vcap /bin/bash      a shell, in a terminal
    wsh --socket …/run/wshd.sock ps aux | grep ruby         as root of the container, in a pipe

--socket PATH   the container's socket
--user NAME     a name or number of the container's /etc/passwd; default: root
COMMAND         searched in the container's PATH; default: the user's shell

The exit code is the command's, or 128+n when signal n ended it; 127: no such command, 126: it cannot
be executed, 125: wsh itself failed and says why. TERM, INT, HUP and QUIT are passed to the command, or
end wsh if it has not begun; killing wsh does not kill it. A container that does not begin it within 5 s
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
    /// Empty: the user's shell.
    pub(super) command: Vec<Vec<u8>>,
}

/// Everything from the first word that is no option on is the command.
pub(super) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Choice, String> {
    let mut arguments = arguments.into_iter();
    let (mut socket, mut user) = (None, "root".to_owned());
    let mut command: Vec<Vec<u8>> = Vec::new();
    while let Some(argument) = arguments.next() {
        let mut value = |name: &str| arguments.next().ok_or(format!("{name} needs a value"));
        match argument.to_str() {
            Some("--help" | "-h") => return Ok(Choice::Help),
            Some("--socket") => socket = Some(PathBuf::from(value("--socket")?)),
            Some("--user") => {
                let name = value("--user")?;
                user = name
                    .into_string()
                    .map_err(|name| format!("no such user: {name:?}"))?;
            }
            Some("--") => break,
            Some(option) if option.starts_with('-') => {
                return Err(format!("there is no option '{option}'"));
            }
            _ => {
                command.push(argument.into_vec());
                break;
            }
        }
    }
    command.extend(arguments.map(OsString::into_vec));
    let socket = socket.ok_or("--socket PATH is missing: which container?")?;
    Ok(Choice::Run(Options {
        socket,
        user,
        command,
    }))
}

#[cfg(test)]
mod tests {
    use super::{Choice, Options, parse};

    fn line(line: &str) -> Result<Choice, String> {
        parse(line.split_whitespace().map(Into::into))
    }

    fn run(user: &str, command: &[&str]) -> Result<Choice, String> {
        let command = command
            .iter()
            .map(|word| word.as_bytes().to_vec())
            .collect();
        Ok(Choice::Run(Options {
            socket: "/s".into(),
            user: user.to_owned(),
            command,
        }))
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
    }
}
