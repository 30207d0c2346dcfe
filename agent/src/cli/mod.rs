//! The verbs for a person on the host: what they do needs no agent and no bus.

mod cp;
mod doctor;
mod find;

pub use cp::{CopyArguments, cp};
pub use doctor::{doctor, refuse_weaker};

use crate::config::{self, Overrides};
use crate::daemon::host_memory_mb;
use nix::unistd::execv;
use std::error::Error;
use std::ffi::{CString, OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Which container, and as whom.
#[derive(Debug, clap::Args)]
pub struct Inside {
    /// The container: its handle or the beginning of it, or its app as `droplet` or `droplet/index`.
    #[arg(value_name = "HANDLE")]
    pub which: String,
    /// A name or number of the container's /etc/passwd.
    #[arg(long, default_value = "root")]
    pub user: String,
    /// One more variable for the command; NAME alone: as it is here.
    #[arg(long, value_name = "NAME=VALUE")]
    pub env: Vec<OsString>,
    /// The command's working directory; the user's home if absent.
    #[arg(long, value_name = "PATH")]
    pub dir: Option<OsString>,
    /// A limit of the command: nofile, core, cpu, …; `unlimited` is a value, too.
    #[arg(long, value_name = "NAME=SOFT[:HARD]")]
    pub rlimit: Vec<OsString>,
}

/// `ostler run` and `ostler shell`: becomes `wsh`, which passes descriptors, signals and the exit code.
/// An empty command is the user's shell. Returns only on failure.
///
/// # Errors
/// Not root, no configuration, no such container or more than one, no `wsh`.
pub fn run(
    config: &Path,
    overrides: Overrides,
    inside: &Inside,
    command: &[OsString],
) -> Outcome<()> {
    let (helpers, socket) = open(config, overrides, &inside.which)?;
    let wsh = helpers.join("wsh");
    let words = arguments(wsh.as_os_str(), &socket, inside, command);
    let words = words
        .iter()
        .map(|word| CString::new(word.as_bytes()))
        .collect::<Result<Vec<_>, _>>()?;
    let program = CString::new(wsh.as_os_str().as_bytes())?;
    let Err(errno) = execv(&program, &words);
    let wsh = wsh.display();
    Err(format!("cannot execute {wsh}: {errno}; is `helpers` in the configuration right?").into())
}

/// The helpers' directory, and the socket of the container that a person means.
fn open(config: &Path, overrides: Overrides, which: &str) -> Outcome<(PathBuf, PathBuf)> {
    if !nix::unistd::geteuid().is_root() {
        return Err("must be run as root: containers' sockets are root's alone".into());
    }
    let config = config::load_to_clean(config, overrides, host_memory_mb())?;
    let socket = find::socket(&config.base, which)?;
    Ok((config.helpers, socket))
}

fn arguments<'a>(
    wsh: &'a OsStr,
    socket: &'a Path,
    inside: &'a Inside,
    command: &'a [OsString],
) -> Vec<&'a OsStr> {
    let mut words = vec![wsh, OsStr::new("--socket"), socket.as_os_str()];
    let mut option = |name: &'static str, value: &'a OsStr| words.extend([OsStr::new(name), value]);
    option("--user", OsStr::new(&inside.user));
    for variable in &inside.env {
        option("--env", variable);
    }
    if let Some(dir) = &inside.dir {
        option("--dir", dir);
    }
    for limit in &inside.rlimit {
        option("--rlimit", limit);
    }
    words.push(OsStr::new("--"));
    words.extend(command.iter().map(OsString::as_os_str));
    words
}
