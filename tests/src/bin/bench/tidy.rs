//! After the measuring process, however it ended: what it left is removed.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use nix::sys::signal::Signal;
use tests::{Tree, patience};

use crate::peers;

/// How many hosts the measuring process has, one after the other.
const HOSTS: usize = 2;

/// Removes what the measuring process `pid` has left; gives what could not be removed.
pub fn after(pid: u32) -> Vec<String> {
    // As the harness names the hosts of a process.
    let mut left = Vec::new();
    for number in 0..HOSTS {
        left.extend(after_host(&format!("ostler-test-{pid}-{number}")));
    }
    let peers = peers::mark(pid);
    let state = peers::directory(&peers);
    for container in fs::read_dir(state.join("state"))
        .into_iter()
        .flatten()
        .flatten()
    {
        let mut delete = peers::runc(&state);
        delete
            .args(["delete", "--force"])
            .arg(container.file_name());
        left.extend(run(&mut delete).err());
    }
    left.extend(end(&peers, |_| true));
    left.extend(remove(&state));
    left
}

fn after_host(host: &str) -> Vec<String> {
    let directory = Path::new("/tmp").join(host);
    // A new agent could not clean beside the old one.
    let mut left = end(host, |comm| comm == "ostler");
    let config = directory.join("agent.toml");
    if config.exists() {
        left.extend(clean(&config).err());
    }
    left.extend(end(host, |_| true));
    left.extend(remove(&directory));
    left
}

fn remove(directory: &Path) -> Option<String> {
    let error = fs::remove_dir_all(directory).err()?;
    directory
        .exists()
        .then(|| format!("{}: {error}", directory.display()))
}

/// Kills all processes with `mark` whose name is `wanted`; gives those that do not end.
fn end(mark: &str, wanted: impl Fn(&str) -> bool) -> Vec<String> {
    let deadline = Instant::now() + patience();
    loop {
        let mut all = Tree::read(None, mark).0;
        all.retain(|process| wanted(&process.comm));
        if all.is_empty() || Instant::now() > deadline {
            return all.iter().map(tests::Process::title).collect();
        }
        all.iter()
            .for_each(|process| process.signal(Signal::SIGKILL));
        thread::sleep(Duration::from_millis(20));
    }
}

/// `ostler clean`, in an empty network namespace: the table of an agent of this machine is not ours.
fn clean(config: &Path) -> Result<(), String> {
    let agent = env::var_os("OSTLER_AGENT").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/debug/ostler"),
        PathBuf::from,
    );
    let mut clean = Command::new("unshare");
    clean.arg("--net").arg(agent);
    run(clean.args(["clean", "--config"]).arg(config))
}

fn run(command: &mut Command) -> Result<(), String> {
    // Ours is for figures.
    match command.stdout(Stdio::null()).status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{command:?}: {status}")),
        Err(error) => Err(format!("{command:?}: {error}")),
    }
}
