//! `wshd`, the container's init.
//!
//! ```text
//! launcher (a process of the host)
//!    │ user, network, ipc, uts namespaces, of the container's root
//!    │ clone3: mount, pid namespaces [, v2 group]                        Cloned ──▶ agent
//!    ▼ exits 0
//! init (pid 1) ── setup ─────────────────────────────────────────────────────────────────
//!    join v1 groups · cgroup namespace · session · overlay · listener · proc dev sys
//!    binds · masks · pivot · wait for GO ◀── agent · network
//!    cross into the user namespace · filter · few capabilities              Ready ──▶ agent
//!    ▼ the line that it never comes back over
//! serve() -> !     poll: children that end · connections · requests · jobs between fork and exec
//!    └── fork ── exec: session · descriptors · limits · groups, ids, capabilities · a look at them ── execve
//! ```
//!
//! Before the line every error ends the process, and is told on the control socket; after it none does:
//! its death is the container's. Nothing of the root file system is executed before a job is.

mod exec;
pub mod files;
mod jobs;
mod launcher;
mod measure;
mod mounts;
mod network;
mod root;
mod seccomp;
mod serve;
mod setup;
mod stdio;
mod users;

use nix::errno::Errno;
use std::process::ExitCode;

const HELP: &str = "\
wshd: the init of a container. The Ostler agent starts it; a person does not.

It expects a control socket as descriptor 3, a memory file that says what the container is made of as
descriptor 4, and the container's control groups from descriptor 5 on. It makes the namespaces, the root
file system and the network, and then runs jobs that `wsh` asks for on the container's wshd.sock:

    wsh --socket <container>/run/wshd.sock --user vcap /bin/bash

With --open-files <group> <before> <after> and an init as descriptor 3 it changes how many files the processes
of that container may have open: who had `before` has `after`.

Its title is `wshd: <handle>`. It ends only by SIGKILL from the host, and the container with it.
";

/// The program; comes back in the launcher only, and in an init whose making failed.
#[must_use]
pub fn main() -> ExitCode {
    if std::env::args_os().any(|argument| argument == "--help" || argument == "-h") {
        print!("{HELP}");
        return ExitCode::SUCCESS;
    }
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().is_some_and(|first| first == files::OPTION) {
        let rest: Vec<_> = arguments.collect();
        return ExitCode::from(files::main(&rest));
    }
    match launcher::launch() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let by_hand = error.errno == Errno::EBADF;
            let hint = if by_hand {
                " (the agent starts wshd: see wshd --help)"
            } else {
                ""
            };
            eprintln!("wshd: {error}{hint}");
            ExitCode::FAILURE
        }
    }
}
