//! `wshd --open-files` on processes of another user, pid and user namespace. Needs root.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_methods,
    reason = "a test"
)]

use container::exit;
use container::sys::pidfd;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A pid and user namespace with three processes, of which the first is its init, in a control group.
struct Namespace {
    group: PathBuf,
    unshare: Child,
}

impl Namespace {
    fn new() -> Self {
        let roots = ["/sys/fs/cgroup/memory", "/sys/fs/cgroup"].map(Path::new);
        let root = roots
            .into_iter()
            .find(|root| root.join("cgroup.procs").exists());
        let group = root
            .unwrap()
            .join(format!("ostler-files-{}", std::process::id()));
        fs::create_dir(&group).unwrap();
        // Its user is 0 of the namespace, and 100000 of the host.
        let script = "read mapped; exec setpriv --reuid 0 --regid 0 --clear-groups \
                      bash -c 'sleep 1000 & (ulimit -Sn 20; echo up; exec sleep 1000) & wait'";
        let unshare = Command::new("bash")
            .args([
                "-c",
                "echo 0 >\"$0/cgroup.procs\"; ulimit -n 1024; exec \"$@\"",
            ])
            .arg(&group)
            .args([
                "unshare",
                "--keep-caps",
                "--user",
                "--pid",
                "--fork",
                "--kill-child",
                "bash",
                "-c",
                script,
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut namespace = Self { group, unshare };
        let pid = namespace.unshare.id();
        while namespace.init().is_none() {
            std::thread::yield_now();
        }
        for map in ["uid_map", "gid_map"] {
            let init = namespace.init().unwrap();
            // It has no child before it has its namespaces, but may be a copy of `unshare` still.
            fs::write(format!("/proc/{init}/{map}"), "0 100000 65536\n")
                .unwrap_or_else(|error| panic!("{map} of {init}, child of {pid}: {error}"));
        }
        namespace
            .unshare
            .stdin
            .as_mut()
            .unwrap()
            .write_all(b"mapped\n")
            .unwrap();
        let mut line = String::new();
        let stdout = namespace.unshare.stdout.take().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        assert_eq!(line, "up\n");
        namespace
    }

    fn init(&self) -> Option<i32> {
        let pid = self.unshare.id();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        children.trim().parse().ok()
    }

    /// Soft and hard limit of each process but `unshare` itself, by number.
    fn limits(&self) -> Vec<(u64, u64)> {
        let members = fs::read_to_string(self.group.join("cgroup.procs")).unwrap();
        let mut pids: Vec<u32> = members.lines().map(|pid| pid.parse().unwrap()).collect();
        pids.sort_unstable();
        pids.retain(|pid| *pid != self.unshare.id());
        let limits = pids.into_iter().map(|pid| {
            let text = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix("Max open files"));
            let mut words = line
                .unwrap()
                .split_whitespace()
                .map(|word| word.parse().unwrap());
            (words.next().unwrap(), words.next().unwrap())
        });
        limits.collect()
    }

    /// The program's exit code.
    fn change(&self, before: u64, after: u64) -> Option<i32> {
        let init = pidfd::open(self.init().unwrap()).unwrap();
        fcntl(&init, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
        let script = format!("exec \"$0\" \"$@\" 3<&{}", init.as_raw_fd());
        let mut command = Command::new("bash");
        command
            .args(["-c", &script])
            .arg(env!("CARGO_BIN_EXE_wshd"))
            .arg("--open-files");
        let numbers = [before, after].map(|number| number.to_string());
        command
            .arg(&self.group)
            .args(numbers)
            .status()
            .unwrap()
            .code()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Some(init) = self.init().and_then(|init| pidfd::open(init).ok()) {
            let _ = pidfd::send_signal(&init, 9);
        }
        let _ = self.unshare.wait();
        // The last of its dead is counted for a moment.
        let end = Instant::now() + Duration::from_secs(10);
        while fs::remove_dir(&self.group).is_err() && Instant::now() < end {
            std::thread::yield_now();
        }
    }
}

#[test]
fn open_files_of_a_namespace_change_but_for_its_init() {
    let namespace = Namespace::new();
    let init = (1024, 1024);
    assert_eq!(namespace.limits(), [init, (1024, 1024), (20, 1024)]);
    for after in [512, 512, 64] {
        assert_eq!(namespace.change(1024, after), Some(exit::DONE.into()));
        assert_eq!(namespace.limits(), [init, (after, after), (20, after)]);
    }
    // Up again: where we have CAP_SYS_RESOURCE (bit 24) on the host.
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let set = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let set = u64::from_str_radix(set.unwrap().trim(), 16).unwrap();
    let (code, fds) = match set >> 24 & 1 {
        1 => (exit::DONE, 2000),
        _ => (exit::REFUSED, 64),
    };
    assert_eq!(namespace.change(64, 2000), Some(code.into()));
    assert_eq!(namespace.limits(), [init, (fds, fds), (20, fds)]);
}

#[test]
fn open_files_wants_two_numbers_and_an_init() {
    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_wshd"));
        let status = command
            .arg("--open-files")
            .args(arguments)
            .stderr(Stdio::null());
        status.status().unwrap().code()
    };
    assert_eq!(run(&[]), Some(exit::USAGE.into()));
    assert_eq!(run(&["/", "1", "x"]), Some(exit::USAGE.into()));
    assert_eq!(run(&["/", "1", "2"]), Some(exit::FAILED.into()));
}
