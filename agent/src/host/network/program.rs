//! The programs the agent runs on its own behalf: `nft` and `iptables`, when it starts, when somebody
//! else has changed the rules, and when it leaves. Never on a path that an instance takes.

use super::NetworkError;
use std::io::Write;
use std::process::{Command, Stdio};

/// Where the two are installed; a daemon's own PATH often lacks the sbin directories.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Runs `program` to its end with `input` and gives back its standard output. Blocks. What it
/// wrote to standard error is the detail of [`NetworkError::Program`].
#[expect(
    clippy::disallowed_methods,
    reason = "not a helper: a short program, whose output is read here"
)]
pub(super) fn run(
    program: &'static str,
    arguments: &[&str],
    input: &str,
) -> Result<String, NetworkError> {
    let failed = |detail: String| NetworkError::Program {
        program,
        arguments: arguments.join(" "),
        detail,
    };
    let missing = |error: std::io::Error| {
        if error.kind() == std::io::ErrorKind::NotFound {
            NetworkError::Missing { program }
        } else {
            failed(error.to_string())
        }
    };
    let mut child = Command::new(program)
        .args(arguments)
        .env_clear()
        .env("PATH", PATH)
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(missing)?;
    // The whole input goes in before anything is read: both programs read to the end of their input
    // before they write, and dropping the pipe is that end. One that gave up early has said why.
    if let Some(mut pipe) = child.stdin.take() {
        let _ = pipe.write_all(input.as_bytes());
    }
    let output = child
        .wait_with_output()
        .map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        return Err(failed(format!("{}: {}", output.status, complaint.trim())));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
