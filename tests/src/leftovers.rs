//! What an agent may leave on a machine: found, named, and in the end removed by force.

use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{Tree, tool};

/// Everything in this network namespace and machine that carries `mark`, which stands in the paths,
/// the cgroups and the command lines of one host; one line each.
pub(crate) fn find(mark: &str, base: &Path) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    found.extend(Tree::read(None, mark).0.iter().map(|process| {
        format!(
            "process {} [{}] {}",
            process.pid,
            process.comm,
            process.title()
        )
    }));
    found.extend(
        groups(mark)
            .iter()
            .map(|group| format!("cgroup {}", group.display())),
    );
    // A test may have given it a file system of its own.
    let disk = image(base).display().to_string();
    let mounts = mounts(mark).into_iter().filter(|at| Path::new(at) != base);
    found.extend(mounts.map(|mount| format!("mount {mount}")));
    let loops = loops(mark).into_iter().filter(|file| *file != disk);
    found.extend(loops.map(|file| format!("loop on {file}")));
    let lines = |text: String, with: &str| {
        text.lines()
            .filter(|line| line.contains(with))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    found.extend(lines(tool("ip", &["-oneline", "link"]), " os-"));
    found.extend(lines(tool("nft", &["list", "tables"]), "ostler"));
    found.extend(lines(tool("iptables", &["-S"]), "ostler"));
    for directory in ["containers", "instances"] {
        let entries = fs::read_dir(base.join(directory))
            .into_iter()
            .flatten()
            .flatten();
        found.extend(entries.map(|entry| format!("directory {}", entry.path().display())));
    }
    found
}

/// The file that a base directory's own file system is in.
pub(crate) fn image(base: &Path) -> PathBuf {
    base.with_extension("img")
}

/// Removes what [`find`] finds and a network namespace does not take with it, and the directory itself.
pub(crate) fn remove(mark: &str, directory: &Path) {
    // What is killed may have had a sibling that was about to be born: again until nothing is there.
    for _ in 0..100 {
        let processes = Tree::read(None, mark).0;
        for process in &processes {
            // Seen a moment ago with our mark: nobody else's.
            let _ = kill(Pid::from_raw(process.pid), Signal::SIGKILL);
        }
        let groups = groups(mark);
        for group in &groups {
            remove_group(group);
        }
        if processes.is_empty() && groups.is_empty() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    for mount in mounts(mark).iter().rev() {
        let _ = umount2(mount.as_str(), MntFlags::MNT_DETACH);
    }
    let _ = fs::remove_dir_all(directory);
}

/// The groups called `mark` right below the root of each hierarchy.
fn groups(mark: &str) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("/proc is mounted");
    let cgroups = mounts.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split(' ').collect();
        fields[2]
            .starts_with("cgroup")
            .then(|| Path::new(fields[1]).join(mark))
    });
    cgroups.filter(|group| group.is_dir()).collect()
}

fn remove_group(group: &Path) {
    let below = fs::read_dir(group)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path());
    below
        .filter(|path| path.is_dir())
        .for_each(|path| remove_group(&path));
    let _ = fs::remove_dir(group);
}

/// The files below a directory with `mark` in its path that loop devices stand on.
fn loops(mark: &str) -> Vec<String> {
    let devices = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let files = devices.map(|device| device.path().join("loop/backing_file"));
    files
        .filter_map(|file| fs::read_to_string(file).ok())
        .filter(|file| file.contains(mark))
        .map(|file| file.trim().to_owned())
        .collect()
}

fn mounts(mark: &str) -> Vec<String> {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("/proc is mounted");
    let paths = mounts.lines().filter_map(|line| line.split(' ').nth(1));
    paths
        .filter(|path| path.contains(mark))
        .map(str::to_owned)
        .collect()
}
