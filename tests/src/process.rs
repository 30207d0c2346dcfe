//! The processes of one host, read from `/proc`.

use std::collections::{BTreeSet, HashSet};
use std::fmt::{self, Write as _};
use std::fs;

use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;

/// One process as it was when the tree was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its number on this machine.
    pub pid: i32,
    /// Its parent's number.
    pub ppid: i32,
    /// Ticks from boot to its start: with `pid`, its identity.
    pub started: u64,
    /// The kernel's name for it, at most 15 bytes.
    pub comm: String,
    /// Its arguments, the title first.
    pub argv: Vec<String>,
}

impl Process {
    /// The process `pid`, if it lives. A zombie does not.
    #[must_use]
    pub fn read(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name may hold anything, also spaces and parentheses: it ends at the last one.
        let (head, tail) = stat.rsplit_once(") ")?;
        let fields: Vec<&str> = tail.split(' ').collect();
        if matches!(fields[0], "Z" | "X") {
            return None;
        }
        let argv = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let argv = String::from_utf8_lossy(&argv)
            .trim_end_matches('\0')
            .split('\0')
            .map(str::to_owned)
            .collect();
        Some(Self {
            pid,
            ppid: fields[1].parse().ok()?,
            started: fields[19].parse().ok()?,
            comm: head.split_once(" (")?.1.to_owned(),
            argv,
        })
    }

    /// Its command line, the arguments separated by spaces.
    #[must_use]
    pub fn title(&self) -> String {
        self.argv.join(" ")
    }

    /// Sends `signal`, if this very process still lives.
    pub fn signal(&self, signal: Signal) {
        if self.lives() {
            // Looked at a moment ago: numbers are not reused that fast.
            let _ = signal::kill(Pid::from_raw(self.pid), signal);
        }
    }

    /// Whether this very process still lives.
    #[must_use]
    pub fn lives(&self) -> bool {
        Self::read(self.pid).is_some_and(|now| now.started == self.started)
    }
}

/// Processes of one host, by number.
#[derive(Debug, Clone)]
pub struct Tree(pub Vec<Process>);

impl Tree {
    /// The process `root` (if there is one), whatever descends from it, whatever has `mark` in its
    /// arguments or its cgroup, and their descendants.
    #[must_use]
    pub fn read(root: Option<i32>, mark: &str) -> Self {
        let numbers = fs::read_dir("/proc").expect("/proc is mounted").flatten();
        let numbers = numbers.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let mut all: Vec<Process> = numbers
            .filter(|pid| !is_anothers(*pid, mark))
            .filter_map(Process::read)
            .collect();
        all.sort_by_key(|process| process.pid);
        let us = i32::try_from(std::process::id()).expect("a pid");
        let mut ours: HashSet<i32> = root.into_iter().collect();
        ours.extend(
            all.iter()
                .filter(|process| process.pid != us && is_marked(process, mark))
                .map(|p| p.pid),
        );
        loop {
            let before = ours.len();
            ours.extend(
                all.iter()
                    .filter(|process| ours.contains(&process.ppid))
                    .map(|p| p.pid)
                    .collect::<Vec<_>>(),
            );
            if ours.len() == before {
                break;
            }
        }
        all.retain(|process| ours.contains(&process.pid));
        Self(all)
    }

    /// All with this name.
    #[must_use]
    pub fn named(&self, comm: &str) -> Vec<&Process> {
        self.0
            .iter()
            .filter(|process| process.comm == comm)
            .collect()
    }

    /// What must outlive an agent, by number, birth and name.
    #[must_use]
    pub fn survivors(&self) -> BTreeSet<(i32, u64, String)> {
        // A helper that is just being started bears the name of the agent's thread that starts it.
        let mortal = ["ostler", "iomux-link", "oom", "helpers"];
        let lasting = self.0.iter().filter(|one| !mortal.contains(&&*one.comm));
        lasting
            .map(|one| (one.pid, one.started, one.comm.clone()))
            .collect()
    }

    /// The only one with this name.
    #[must_use]
    #[track_caller]
    pub fn one(&self, comm: &str) -> &Process {
        let found = self.named(comm);
        assert_eq!(found.len(), 1, "one {comm} in\n{self}");
        found[0]
    }

    /// The children of `pid`.
    #[must_use]
    pub fn children(&self, pid: i32) -> Vec<&Process> {
        self.0
            .iter()
            .filter(|process| process.ppid == pid)
            .collect()
    }

    /// The only child of `pid`.
    #[must_use]
    #[track_caller]
    pub fn child(&self, pid: i32) -> &Process {
        let found = self.children(pid);
        assert_eq!(found.len(), 1, "one child of {pid} in\n{self}");
        found[0]
    }
}

/// Whether it is in a container of another test. The arguments of such a one are not even looked at: that
/// waits while it forks, and a fork bomb that has little processor time forks for minutes.
fn is_anothers(pid: i32, mark: &str) -> bool {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    groups
        .split(['/', '\n'])
        .any(|part| part.starts_with("ostler-test-") && part != mark)
}

fn is_marked(process: &Process, mark: &str) -> bool {
    process.argv.iter().any(|argument| argument.contains(mark))
        || fs::read_to_string(format!("/proc/{}/cgroup", process.pid))
            .is_ok_and(|groups| groups.split(['/', '\n']).any(|part| part == mark))
}

impl fmt::Display for Tree {
    /// Like `pstree`: children indented below their parent.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fn write(tree: &Tree, of: &Process, depth: usize, out: &mut String) -> fmt::Result {
            let Process {
                pid, ppid, comm, ..
            } = of;
            let above = if depth == 0 {
                format!(" (of {ppid})")
            } else {
                String::new()
            };
            writeln!(
                out,
                "{:indent$}{pid}{above} [{comm}] {}",
                "",
                of.title(),
                indent = 2 * depth
            )?;
            tree.children(*pid)
                .into_iter()
                .try_for_each(|child| write(tree, child, depth + 1, out))
        }
        let mut out = String::new();
        for root in self
            .0
            .iter()
            .filter(|one| !self.0.iter().any(|other| other.pid == one.ppid))
        {
            write(self, root, 0, &mut out)?;
        }
        f.write_str(&out)
    }
}
