//! What this machine must have for containers, and what it should have: asked of the kernel, once.
//!
//! Everything is tried in throw-away namespaces and child processes, and nothing of it stays; what came of it
//! is judged by pure functions. What a container cannot do without is [`required`]: the agent refuses to start
//! without it, in the same words in which `ostler doctor` tells it (but for the network's rules, which it
//! tries by loading them). To be called while the process has one thread: it forks.

use super::cgroups::{CgroupError, Cgroups, Look};
use super::depot::disk;
use super::network;
use container::launch::Ids;
use container::stamp;
use container::sys::clone::{Side, into_namespaces};
use container::sys::mount::cover_idmapped;
use container::sys::{pidfd, process};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl, open};
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::Mode;
use nix::unistd::{pipe2, read};
use serde::Serialize;
use std::fs;
use std::net::{Ipv4Addr, UdpSocket};
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long one child may take; mounts take milliseconds.
const DEADLINE: Duration = Duration::from_secs(10);

/// What a finding means for the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// It is as it should be.
    Ok,
    /// The agent works without it; something is weaker or will not be reached.
    Warn,
    /// The agent does not start without it.
    Missing,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What.
    pub name: String,
    /// How it is.
    pub level: Level,
    /// What was found, and what it means.
    pub meaning: String,
    /// What to do about it; empty if nothing.
    pub advice: String,
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.name, self.meaning)?;
        if !self.advice.is_empty() {
            write!(f, ". {}", self.advice)?;
        }
        Ok(())
    }
}

/// What is looked at.
#[derive(Debug, Clone)]
pub struct Wanted<'a> {
    /// Where containers and droplets are kept; it need not exist.
    pub base: &'a Path,
    /// The stacks, by name.
    pub stacks: Vec<(&'a str, &'a Path)>,
    /// The parent of all control groups.
    pub cgroup_parent: &'a str,
    /// The ports that are mapped.
    pub ports: RangeInclusive<u16>,
    /// How writable layers are to be bounded.
    pub disk: disk::Wanted,
    /// The cap on an instance's processor time, in hundredths of a processor, if there is to be one.
    pub cpu_cap: Option<u64>,
    /// Where the helpers are.
    pub helpers: &'a Path,
    /// The `resolv.conf` of containers.
    pub resolv_conf: String,
    /// Whether containers may reach a name server on this host.
    pub host_dns: bool,
}

fn ok(name: &str, meaning: impl Into<String>) -> Finding {
    finding(name, Level::Ok, meaning, "")
}

fn finding(name: &str, level: Level, meaning: impl Into<String>, advice: &str) -> Finding {
    Finding {
        name: name.to_owned(),
        level,
        meaning: meaning.into(),
        advice: advice.to_owned(),
    }
}

/// What containers cannot do without.
#[must_use]
pub fn required(wanted: &Wanted<'_>) -> Vec<Finding> {
    let others = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP;
    let mut found = vec![
        kernel(&read_trimmed("/proc/sys/kernel/osrelease").unwrap_or_default()),
        users(clone_into(CloneFlags::CLONE_NEWUSER)),
        namespaces(clone_into(others)),
        seccomp(&read_trimmed("/proc/sys/kernel/seccomp/actions_avail").unwrap_or_default()),
        memory_files(
            read_trimmed("/proc/sys/vm/memfd_noexec").as_deref(),
            seal_memory_file(),
        ),
    ];
    found.extend(layers(wanted));
    let swaps = read_trimmed("/proc/swaps").unwrap_or_default();
    let look = Cgroups::look(wanted.cgroup_parent);
    found.extend(cgroups(look, &swaps, wanted.cpu_cap));
    found.extend([
        links(elsewhere(network::try_link)),
        name_servers(&wanted.resolv_conf, is_here, wanted.host_dns),
        helpers(wanted.helpers),
    ]);
    found
}

/// All that there is to say: first what is required.
#[must_use]
pub fn all(wanted: &Wanted<'_>) -> Vec<Finding> {
    let mut found = required(wanted);
    found.extend([
        disk(wanted),
        rules(elsewhere(|| {
            network::try_rules().map_err(|error| error.to_string())
        })),
        bandwidth(elsewhere(|| {
            network::try_bandwidth().map_err(|error| error.to_string())
        })),
    ]);
    found.extend(match network::dropping_chains() {
        Ok(chains) => foreign_chains(chains, |chain| {
            network::is_iptables(chain)
                .then(|| network::try_accepts().map_err(|error| error.to_string()))
        }),
        // That nft is missing is told already.
        Err(error) => vec![finding(FIREWALLS, Level::Warn, error.to_string(), "")],
    });
    found.extend([
        names(network::strange_links().map_err(|errno| errno.to_string())),
        kernel_log(fs::File::open("/dev/kmsg").map_err(|error| error.to_string())),
        conntrack(read_trimmed("/proc/sys/net/netfilter/nf_conntrack_max").as_deref()),
        ports(&wanted.ports),
        terminals(read_trimmed("/proc/sys/dev/tty/legacy_tiocsti").as_deref()),
    ]);
    found
}

/// The oldest kernel on which everything was tried (Debian 12).
const FLOOR: (u32, u32) = (6, 1);

fn kernel(release: &str) -> Finding {
    let name = "kernel";
    let mut numbers = release
        .split(['.', '-'])
        .map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= FLOOR {
        return ok(name, format!("Linux {release}"));
    }
    let meaning = format!("Linux {release} is too old");
    finding(name, Level::Missing, meaning, "Boot Linux 6.1 or newer")
}

fn users(made: Result<(), Errno>) -> Finding {
    let name = "user namespaces";
    match made {
        Ok(()) => ok(name, "every container has users of its own"),
        Err(errno) => {
            let advice = if matches!(errno, Errno::ENOSPC | Errno::EUSERS) {
                "Set user.max_user_namespaces to 10000 or more, by sysctl"
            } else if errno == Errno::EPERM {
                "Run it as root of the host, with CAP_SYS_ADMIN, outside of sandboxes that forbid clone3"
            } else {
                "Boot a kernel with CONFIG_USER_NS"
            };
            let meaning = format!("cannot be made ({})", errno.desc());
            finding(name, Level::Missing, meaning, advice)
        }
    }
}

fn namespaces(made: Result<(), Errno>) -> Finding {
    let name = "other namespaces";
    match made {
        Ok(()) => ok(name, "mount, pid, net, ipc, uts, cgroup; held by pidfd"),
        Err(errno) => {
            let meaning = format!("cannot be made ({})", errno.desc());
            let advice = "Run it as root with CAP_SYS_ADMIN; see /proc/sys/user/max_*_namespaces";
            finding(name, Level::Missing, meaning, advice)
        }
    }
}

fn seccomp(actions: &str) -> Finding {
    let name = "seccomp filters";
    if actions.split(' ').any(|action| action == "errno") {
        return ok(
            name,
            "apps may make the system calls of a list, and no others",
        );
    }
    let advice = "Boot a kernel with CONFIG_SECCOMP_FILTER";
    finding(name, Level::Missing, "the kernel has none", advice)
}

/// A file as a container's init is kept in.
fn seal_memory_file() -> Result<(), Errno> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = memfd_create(c"ostler", flags)?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).map(drop)
}

fn memory_files(noexec: Option<&str>, sealed: Result<(), Errno>) -> Finding {
    let name = "sealed memory files";
    // vm.memfd_noexec of Linux 6.3; 2 forbids what can be executed.
    if noexec == Some("2") {
        let advice = "Set vm.memfd_noexec to 0 or 1, by sysctl";
        let meaning = "those of programs are forbidden, and a container's init is one";
        return finding(name, Level::Missing, meaning, advice);
    }
    match sealed {
        Ok(()) => ok(name, "no container can rewrite the program of its init"),
        Err(errno) => {
            let meaning = format!("cannot be made ({})", errno.desc());
            finding(
                name,
                Level::Missing,
                meaning,
                "Boot a kernel with CONFIG_MEMFD_CREATE",
            )
        }
    }
}

/// Overlays from mapped layers, as a container's root is made.
fn layers(wanted: &Wanted<'_>) -> Vec<Finding> {
    let desk = match Desk::new(wanted.base) {
        Ok(desk) => desk,
        Err(error) => {
            let errno = Errno::from_raw(error.raw_os_error().unwrap_or_default());
            return vec![unwritable(&quoted(wanted.base), errno)];
        }
    };
    let users = match user_namespace() {
        Ok(users) => users,
        Err(errno) => {
            let meaning = format!("none can get ids of its own ({})", errno.desc());
            let advice = "Give the agent CAP_SETUID and CAP_SETGID of the host; in a user namespace it cannot work";
            return vec![finding("user namespaces", Level::Missing, meaning, advice)];
        }
    };
    let lower = desk.path.join("lower");
    let droplets = ("base directory".to_owned(), &*lower, wanted.base);
    let stacks = wanted
        .stacks
        .iter()
        .map(|(name, path)| (format!("stack {name}"), *path, *path));
    let layers = std::iter::once(droplets).chain(stacks);
    layers
        .map(|(name, layer, shown)| {
            let mapped = in_child(|| {
                unshare(CloneFlags::CLONE_NEWNS)?;
                let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
                mount(None::<&str>, "/", None::<&str>, private, None::<&str>)?;
                map_layer(layer, &users)
            });
            let laid = mapped.and_then(|()| in_child(|| desk.overlay(layer, &users)));
            layer_finding(&name, (shown, wanted.base), mapped, laid)
        })
        .collect()
}

/// What a directory is good for in which nothing can be made.
fn unwritable(base: &str, errno: Errno) -> Finding {
    let name = "base directory";
    if is_full(errno) {
        // What runs is to be taken over all the same, and can be stopped.
        let meaning = format!(
            "the file system of {base} is full ({}): nothing can be started, and layers were not tried",
            errno.desc()
        );
        return finding(name, Level::Warn, meaning, "Make room there");
    }
    let meaning = format!("{base} cannot be written ({})", errno.desc());
    let advice = "Choose another `base`, or mount it for writing";
    finding(name, Level::Missing, meaning, advice)
}

fn is_full(errno: Errno) -> bool {
    matches!(errno, Errno::ENOSPC | Errno::EDQUOT)
}

fn quoted(path: &Path) -> String {
    format!("\"{}\"", path.display())
}

/// Whether a layer could be `mapped` to a container's users, and `laid` under its changes in `base`.
fn layer_finding(
    name: &str,
    (layer, base): (&Path, &Path),
    mapped: Result<(), Errno>,
    laid: Result<(), Errno>,
) -> Finding {
    let (layer, base) = (quoted(layer), quoted(base));
    let (meaning, advice) = match (mapped, laid) {
        (Ok(()), Ok(())) => return ok(name, format!("{layer} can be a layer of containers")),
        (Ok(()), Err(errno)) if is_full(errno) => return unwritable(&base, errno),
        (Err(Errno::ETIMEDOUT), _) | (_, Err(Errno::ETIMEDOUT)) => (
            format!("{layer}, or {base}, does not answer"),
            "See to the disk that it is on; apps that run there run on",
        ),
        (Err(errno), _) => (
            format!(
                "{layer} lies on a file system that cannot be mapped to a container's users ({})",
                errno.desc()
            ),
            "Put it on ext4, xfs, btrfs or tmpfs; overlay, 9p, FUSE and most network file systems cannot",
        ),
        (Ok(()), Err(errno)) => (
            format!(
                "no overlay can be made of {layer} with its changes in {base} ({})",
                errno.desc()
            ),
            "Load the module overlay, and put `base` on ext4, xfs or btrfs",
        ),
    };
    finding(name, Level::Missing, meaning, advice)
}

fn map_layer(layer: &Path, users: &OwnedFd) -> Result<(), Errno> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let directory = open(layer, flags, Mode::empty())?;
    let mapped = cover_idmapped(directory.as_fd(), users.as_fd(), "layer");
    mapped.map(drop).map_err(|error| error.errno)
}

/// How the name of a [`Desk`] begins; the number of its process follows.
const DESK: &str = ".ostler-probe-";

/// Removes the desks of processes that were killed.
fn remove_of_the_dead(there: &Path) {
    for entry in fs::read_dir(there).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|name| name.strip_prefix(DESK));
        let Some(owner) = owner.and_then(|owner| owner.parse::<u32>().ok()) else {
            continue;
        };
        if owner == std::process::id() || !Path::new(&format!("/proc/{owner}")).exists() {
            // Its owner may just be at it, too.
            let _gone = fs::remove_dir_all(entry.path());
        }
    }
}

/// A directory beside or below the base, for as long as this lives.
struct Desk {
    path: PathBuf,
}

impl Desk {
    fn new(base: &Path) -> std::io::Result<Self> {
        let there = base.ancestors().find(|path| path.is_dir()).unwrap_or(base);
        remove_of_the_dead(there);
        let path = there.join(format!("{DESK}{}", std::process::id()));
        fs::create_dir(&path)?;
        let desk = Self { path };
        for name in ["lower", "upper", "work", "root"] {
            fs::create_dir(desk.path.join(name))?;
        }
        Ok(desk)
    }

    /// In a child: the mounts go with its namespace.
    fn overlay(&self, layer: &Path, users: &OwnedFd) -> Result<(), Errno> {
        unshare(CloneFlags::CLONE_NEWNS)?;
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>)?;
        map_layer(layer, users)?;
        // By descriptors, as paths may hold what mount options cannot.
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let open = |path: &Path| open(path, flags, Mode::empty());
        let (upper, work) = (self.path.join("upper"), self.path.join("work"));
        let (lower, upper, work) = (open(layer)?, open(&upper)?, open(&work)?);
        let number = |fd: &OwnedFd| format!("/proc/self/fd/{}", fd.as_raw_fd());
        let [lowers, uppers, works] = [&lower, &upper, &work].map(number);
        let options = format!("lowerdir={lowers},upperdir={uppers},workdir={works}");
        let root = self.path.join("root");
        mount(
            Some("overlay"),
            &root,
            Some("overlay"),
            MsFlags::empty(),
            Some(&*options),
        )
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "a probe's directory stays");
        }
    }
}

/// Whether a process can be made in such namespaces.
fn clone_into(namespaces: CloneFlags) -> Result<(), Errno> {
    match into_namespaces(namespaces, None).map_err(|error| error.errno)? {
        Side::Child => process::exit_now(0),
        Side::Parent { pidfd, .. } => ended(&pidfd).map(drop),
    }
}

/// A user namespace with ids of its own.
fn user_namespace() -> Result<OwnedFd, Errno> {
    /// Any that are not the host's own.
    const FIRST: u32 = 0x1000_0000;
    let (held, hold) = pipe2(OFlag::O_CLOEXEC)?;
    let side = into_namespaces(CloneFlags::CLONE_NEWUSER, None).map_err(|error| error.errno)?;
    let Side::Parent { pidfd, pid } = side else {
        drop(hold);
        let _hung_up = read(&held, &mut [0]);
        process::exit_now(0)
    };
    let errno = |error: std::io::Error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
    let map = format!("0 {FIRST} {}", Ids::COUNT);
    let made = fs::write(format!("/proc/{pid}/uid_map"), &map)
        .and_then(|()| fs::write(format!("/proc/{pid}/gid_map"), &map))
        .and_then(|()| fs::File::open(format!("/proc/{pid}/ns/user")));
    drop((held, hold));
    ended(&pidfd)?;
    made.map(OwnedFd::from).map_err(errno)
}

/// Runs it in a child.
fn in_child(work: impl FnOnce() -> Result<(), Errno>) -> Result<(), Errno> {
    let pid = process::fork(|| {
        let code = work().map_or_else(|errno| errno as i32, |()| 0);
        process::exit_now(code.clamp(0, 255))
    })?;
    let pidfd = pidfd::open(pid).map_err(|error| error.errno)?;
    match ended(&pidfd)? {
        0 => Ok(()),
        code => Err(Errno::from_raw(code)),
    }
}

/// The exit code of a child, which is killed after the deadline.
fn ended(child: &OwnedFd) -> Result<i32, Errno> {
    use container::status::Status;
    let timeout = PollTimeout::try_from(DEADLINE).unwrap_or(PollTimeout::MAX);
    let mut fds = [PollFd::new(child.as_fd(), PollFlags::POLLIN)];
    let late = poll(&mut fds, timeout) == Ok(0);
    if late {
        // Dead already: so be it.
        let _ = pidfd::send_signal(child, 9);
        if poll(&mut fds, timeout) == Ok(0) {
            // It waits in the kernel, for a mount that does not answer: it is left to that.
            return Err(Errno::ETIMEDOUT);
        }
    }
    match pidfd::wait(child).map_err(|error| error.errno)? {
        Status::Exited(code) if !late => Ok(code.into()),
        Status::Exited(_)
        | Status::Signaled(_)
        | Status::Started { .. }
        | Status::Failed { .. } => Err(Errno::ETIMEDOUT),
    }
}

/// Of what this host has, of the text of `/proc/swaps` (proc(5)), and of the cap that is wanted.
fn cgroups(look: Result<Look, CgroupError>, swaps: &str, wanted_cap: Option<u64>) -> Vec<Finding> {
    let look = match look {
        Ok(found) => found,
        Err(error) => {
            let mut meaning = error.to_string();
            if let Some(cause) = std::error::Error::source(&error) {
                meaning = format!("{meaning}: {cause}");
            }
            return vec![finding("control groups", Level::Missing, meaning, "")];
        }
    };
    let found = look.controllers.into_iter().map(|(controller, version)| {
        let name = format!("control group {controller}");
        let Some(version) = version else {
            // That of freezing: without another there is no layout.
            let advice = "Mount the controller, or boot with a pure cgroup v2 hierarchy";
            return finding(
                &name,
                Level::Warn,
                "absent: nobody can freeze a container",
                advice,
            );
        };
        ok(&name, version.to_string())
    });
    let more = [
        swap(look.swap, swaps),
        cpu_cap(look.cpu_cap, wanted_cap),
        tcp(look.tcp),
    ];
    found.chain(more).collect()
}

fn cpu_cap(possible: Option<bool>, wanted: Option<u64>) -> Finding {
    let name = "control group cpu cap";
    match (possible, wanted) {
        (Some(true), _) => ok(name, "possible"),
        (None, _) => ok(name, "no group shows yet whether it is possible"),
        (Some(false), None) => ok(name, "not possible, and not wanted"),
        (Some(false), Some(percent)) => {
            let meaning = format!("not possible, and `instance.max_cpu_percent` is {percent}");
            let advice = "Leave it out, or boot a kernel with CONFIG_CFS_BANDWIDTH";
            finding(name, Level::Missing, meaning, advice)
        }
    }
}

fn tcp(counted: Option<bool>) -> Finding {
    let name = "control group tcp";
    match counted {
        Some(true) => ok(name, "counted"),
        None => ok(name, "no group shows yet whether it is counted"),
        Some(false) => {
            let meaning = "not counted: what an instance's connections have in their queues is not its memory";
            let advice =
                "Boot without cgroup.memory=nosocket and nokmem, on a kernel with CONFIG_INET";
            finding(name, Level::Warn, meaning, advice)
        }
    }
}

fn swap(limited: Option<bool>, swaps: &str) -> Finding {
    let name = "control group swap";
    // One line is its heading.
    let some = swaps.lines().count() > 1;
    match (limited, some) {
        (Some(true), _) => ok(name, "limited"),
        (None, _) => ok(name, "no group shows yet whether it is counted"),
        (Some(false), false) => ok(name, "not counted, and this host has none"),
        (Some(false), true) => {
            let meaning = "not counted: beyond its memory an instance may fill the host's swap";
            let advice = "Boot with swapaccount=1, or without swap";
            finding(name, Level::Missing, meaning, advice)
        }
    }
}

/// How the disk of one instance will be limited.
fn disk(wanted: &Wanted<'_>) -> Finding {
    let quotas = disk::has_project_quotas(wanted.base)
        .then_some(())
        .ok_or("its file system is not mounted with prjquota (ext4, xfs)");
    let images = match Path::new("/dev/loop-control").exists() {
        true => disk::can_make_images(),
        false => Err("there are no loop devices, load the module loop".to_owned()),
    };
    disk_finding(wanted.disk, quotas, images)
}

fn disk_finding(
    way: disk::Wanted,
    quotas: Result<(), &str>,
    images: Result<(), String>,
) -> Finding {
    use disk::Wanted::{Auto, Image, Quota, Unlimited};
    let name = "disk limits";
    let weak = |meaning: String| {
        let advice = "Mount the file system of `base` with prjquota, or install e2fsprogs and load the module loop";
        finding(name, Level::Warn, meaning, advice)
    };
    let missing = |why: &str| {
        let meaning = format!("`instance.disk` is {way:?}, which does not work here: {why}");
        let advice = "Mend that, or set `instance.disk` to \"auto\"";
        finding(name, Level::Missing, meaning, advice)
    };
    match (way, quotas, images) {
        (Unlimited, ..) => weak("switched off: an instance may fill the disk".to_owned()),
        (Auto | Quota, Ok(()), _) => ok(name, "by project quotas"),
        (Quota, Err(why), _) => missing(why),
        (Image, _, Err(why)) => missing(&why),
        (Auto | Image, _, Ok(())) => ok(name, "by an image on a loop device for each instance"),
        (Auto, Err(quotas), Err(images)) => weak(format!(
            "an instance may fill the disk: no project quotas ({quotas}) and no images ({images})"
        )),
    }
}

/// The programs that the agent starts.
fn helpers(directory: &Path) -> Finding {
    let name = "helpers";
    let (mut absent, mut others) = (Vec::new(), Vec::new());
    for helper in ["wshd", "wsh", "iomux-spawn", "iomux-link", "oom"] {
        match fs::read(directory.join(helper)) {
            Ok(program) if stamp::is_in(&program) => {}
            Ok(_) => others.push(helper),
            Err(_) => absent.push(helper),
        }
    }
    let there = directory.display();
    let (meaning, advice) = if !absent.is_empty() {
        (
            format!("\"{there}\" has no {}", absent.join(", ")),
            "Install them, or correct `helpers` in the configuration",
        )
    } else if !others.is_empty() {
        (
            format!(
                "in \"{there}\" {} of another build than this program (not `{}`, as `--version` tells): \
                 no app would start, or with less around it",
                if let [one] = others[..] {
                    format!("{one} is")
                } else {
                    format!("{} are", others.join(", "))
                },
                stamp::STAMP
            ),
            "Install those that were built with it, or correct `helpers` in the configuration",
        )
    } else {
        return ok(name, format!("in \"{there}\""));
    };
    finding(name, Level::Missing, meaning, advice)
}

/// Does something in a network namespace of a thread that ends.
fn elsewhere(work: fn() -> Result<(), String>) -> Result<(), String> {
    let tried = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| errno.desc().to_owned())?;
        work()
    });
    tried
        .join()
        .unwrap_or_else(|_| Err("nobody knows".to_owned()))
}

fn links(made: Result<(), String>) -> Finding {
    let name = "network links";
    match made {
        Ok(()) => ok(name, "a container has a link of its own"),
        Err(why) => {
            let meaning = format!("cannot be made ({why})");
            finding(name, Level::Missing, meaning, "Load the module veth")
        }
    }
}

fn rules(loaded: Result<(), String>) -> Finding {
    let name = "network rules";
    match loaded {
        Ok(()) => ok(name, "nft loads the table"),
        Err(why) => {
            let advice = "Install nftables, and load the modules nf_tables, nft_ct, nft_fib_inet, nft_masq and nft_nat";
            finding(
                name,
                Level::Missing,
                format!("nft cannot load the table: {why}"),
                advice,
            )
        }
    }
}

/// With a program that the agent itself never runs.
fn bandwidth(tried: Result<(), String>) -> Finding {
    let name = "bandwidth limits";
    match tried {
        Ok(()) => ok(name, "in both directions"),
        Err(why) => {
            let advice = "Install tc (iproute2) to have it tried, and load the modules sch_tbf and nft_limit";
            finding(
                name,
                Level::Warn,
                format!("they were not tried with success: {why}"),
                advice,
            )
        }
    }
}

const FIREWALLS: &str = "others' firewalls";

/// `edit` tells of a chain that is iptables' whether the agent can edit it.
fn foreign_chains(
    chains: Vec<String>,
    edit: impl Fn(&str) -> Option<Result<(), String>>,
) -> Vec<Finding> {
    let name = FIREWALLS;
    if chains.is_empty() {
        return vec![ok(name, "none drops what is forwarded")];
    }
    let tell = |chain: String| {
        let cannot = match edit(&chain) {
            Some(Ok(())) => {
                let meaning = format!(
                    "chain {chain} drops what is forwarded (Docker, ufw); the agent puts two accepts there"
                );
                return ok(name, meaning);
            }
            Some(Err(why)) => format!("cannot edit it ({why})"),
            None => "does not edit it".to_owned(),
        };
        let meaning = format!("chain {chain} drops what is forwarded, and the agent {cannot}");
        let advice = "Let packets from and to the interfaces os-* through there, or containers have no network";
        finding(name, Level::Warn, meaning, advice)
    };
    chains.into_iter().map(tell).collect()
}

fn names(strange: Result<Vec<String>, String>) -> Finding {
    let name = "names of links";
    match strange {
        Ok(strange) if strange.is_empty() => ok(name, "os-* are containers' alone"),
        Ok(strange) => {
            let meaning = format!(
                "{} is taken for a container's: the agent does not start beside it",
                strange.join(", ")
            );
            let advice = "Give it a name that does not begin with os-";
            finding(name, Level::Missing, meaning, advice)
        }
        Err(error) => finding(name, Level::Warn, error, ""),
    }
}

/// Whether an address is one of this host: to reach it, the kernel comes from it.
fn is_here(address: Ipv4Addr) -> bool {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0));
    let own = socket.and_then(|socket| {
        socket.connect((address, 53))?;
        socket.local_addr()
    });
    own.is_ok_and(|own| own.ip() == address)
}

fn name_servers(resolv_conf: &str, is_here: impl Fn(Ipv4Addr) -> bool, host_dns: bool) -> Finding {
    let name = "name servers";
    let lines = resolv_conf.lines();
    let named = lines.filter_map(|line| line.strip_prefix("nameserver")?.trim().parse().ok());
    let servers: Vec<Ipv4Addr> = named.collect();
    if servers.is_empty() {
        let meaning = "the host has none that a container can reach, so names mean nothing in it";
        return finding(name, Level::Warn, meaning, "Name some in `network.dns`");
    }
    if let Some(own) = servers.iter().find(|server| !host_dns && is_here(**server)) {
        let meaning = format!("{own} is this host, which containers do not reach");
        let advice = "Allow it by `network.host_allow = [\"udp/53\", \"tcp/53\"]`, or name others in `network.dns`";
        return finding(name, Level::Warn, meaning, advice);
    }
    let servers: Vec<String> = servers.iter().map(Ipv4Addr::to_string).collect();
    ok(name, servers.join(", "))
}

/// Who was killed for want of memory is read there.
fn kernel_log(opened: Result<fs::File, String>) -> Finding {
    let name = "the kernel's log";
    match opened {
        Ok(_log) => ok(name, "victims of memory kills are named"),
        Err(error) => {
            let meaning = format!(
                "/dev/kmsg cannot be read ({error}): victims of memory kills have no name, and kills that had a reason \
                 outside of the container are taken for its own"
            );
            let advice =
                "Give the agent the device, and CAP_SYSLOG where kernel.dmesg_restrict is 1";
            finding(name, Level::Warn, meaning, advice)
        }
    }
}

fn conntrack(most: Option<&str>) -> Finding {
    let name = "connection tracking";
    match most {
        Some(most) => ok(name, format!("{most} connections at most")),
        None => {
            let advice = "Load the module nf_conntrack";
            finding(name, Level::Warn, "not loaded yet", advice)
        }
    }
}

fn ports(mapped: &RangeInclusive<u16>) -> Finding {
    let name = "mapped ports";
    let range = read_trimmed("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let reserved = read_trimmed("/proc/sys/net/ipv4/ip_local_reserved_ports").unwrap_or_default();
    match overlap(mapped, &range, &reserved) {
        None => ok(name, "the host takes none of them for its own connections"),
        Some(port) => {
            let (first, last) = (mapped.start(), mapped.end());
            let meaning = format!(
                "the host may take {port} for a connection of its own, and then it leads nowhere"
            );
            let advice =
                format!("Set net.ipv4.ip_local_reserved_ports to {first}-{last}, by sysctl");
            finding(name, Level::Warn, meaning, &advice)
        }
    }
}

/// The first mapped port that is in the kernel's range and not reserved.
fn overlap(mapped: &RangeInclusive<u16>, range: &str, reserved: &str) -> Option<u16> {
    let mut bounds = range
        .split_whitespace()
        .filter_map(|word| word.parse::<u16>().ok());
    let local = bounds.next()?..=bounds.next()?;
    let reserved: Vec<RangeInclusive<u16>> = reserved
        .split(',')
        .filter_map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            Some(first.trim().parse().ok()?..=last.trim().parse().ok()?)
        })
        .collect();
    let free =
        |port: &u16| local.contains(port) && !reserved.iter().any(|range| range.contains(port));
    mapped.clone().find(free)
}

fn terminals(legacy: Option<&str>) -> Finding {
    let name = "terminals";
    match legacy {
        Some("0") => ok(name, "nobody types into another's terminal (TIOCSTI)"),
        _ => {
            let meaning =
                "programs of the host may type into their terminal (TIOCSTI); containers may not";
            let advice =
                "Set dev.tty.legacy_tiocsti to 0, by sysctl, where the kernel has it (6.2)";
            finding(name, Level::Warn, meaning, advice)
        }
    }
}

fn read_trimmed(path: &str) -> Option<String> {
    fs::read_to_string(path)
        .ok()
        .map(|text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::depot::disk::Wanted;

    /// Each with its level and a word of what it says or advises.
    fn judged(table: impl IntoIterator<Item = (Finding, Level, &'static str)>) {
        for (found, level, word) in table {
            assert_eq!(found.level, level, "{found}");
            assert!(found.to_string().contains(word), "{word}: {found}");
            let to_do = !found.advice.is_empty();
            assert_eq!(to_do, level != Level::Ok, "{found}");
        }
    }

    #[test]
    fn a_kernel_is_judged_by_what_it_is_and_does() {
        use Level::{Missing, Ok as Good};
        judged([
            (kernel("6.1.0-18-amd64"), Good, "Linux 6.1.0-18-amd64"),
            (kernel("7.0-rc1"), Good, "7.0"),
            (kernel("6.0.19"), Missing, "Boot Linux 6.1 or newer"),
            (kernel("5.15.0"), Missing, "too old"),
            (kernel(""), Missing, "too old"),
            (users(Ok(())), Good, ""),
            (
                users(Err(Errno::ENOSPC)),
                Missing,
                "user.max_user_namespaces",
            ),
            (
                users(Err(Errno::EUSERS)),
                Missing,
                "user.max_user_namespaces",
            ),
            (users(Err(Errno::EPERM)), Missing, "CAP_SYS_ADMIN"),
            (users(Err(Errno::EINVAL)), Missing, "CONFIG_USER_NS"),
            (namespaces(Ok(())), Good, "pidfd"),
            (
                namespaces(Err(Errno::EPERM)),
                Missing,
                "Operation not permitted",
            ),
            (
                seccomp("kill_process kill_thread trap errno user_notif"),
                Good,
                "",
            ),
            (
                seccomp("kill_process noerrno"),
                Missing,
                "CONFIG_SECCOMP_FILTER",
            ),
            (seccomp(""), Missing, "CONFIG_SECCOMP_FILTER"),
            (memory_files(None, Ok(())), Good, ""),
            (memory_files(Some("1"), Ok(())), Good, ""),
            (memory_files(Some("2"), Ok(())), Missing, "vm.memfd_noexec"),
            (
                memory_files(None, Err(Errno::ENOSYS)),
                Missing,
                "CONFIG_MEMFD_CREATE",
            ),
            (links(Ok(())), Good, ""),
            (links(Err("no".to_owned())), Missing, "module veth"),
            (rules(Ok(())), Good, ""),
            (rules(Err("no".to_owned())), Missing, "nftables"),
        ]);
    }

    #[test]
    fn a_layer_is_judged_by_what_stops_it_first() {
        let layer = |mapped, laid| {
            let paths = (Path::new("/stack"), Path::new("/base"));
            layer_finding("stack debian", paths, mapped, laid)
        };
        let refused = Err(Errno::EINVAL);
        judged([
            (layer(Ok(()), Ok(())), Level::Ok, "\"/stack\" can be"),
            (
                layer(refused, refused),
                Level::Missing,
                "\"/stack\" lies on a file system",
            ),
            (
                layer(Ok(()), Err(Errno::ETIMEDOUT)),
                Level::Missing,
                "\"/stack\", or \"/base\", does not answer",
            ),
            (
                layer(Ok(()), refused),
                Level::Missing,
                "of \"/stack\" with its changes in \"/base\" (Invalid argument). Load",
            ),
        ]);
    }

    #[test]
    fn control_groups_that_bind_nobody_are_missing() {
        let none = "Filename\tType\tSize\tUsed\tPriority";
        let some = "Filename\tType\tSize\tUsed\tPriority\n/dev/sda2 partition 1 0 -2";
        judged([
            (swap(Some(true), some), Level::Ok, "limited"),
            (swap(None, some), Level::Ok, "yet"),
            (swap(Some(false), none), Level::Ok, "has none"),
            // A kernel without swap has no such file.
            (swap(Some(false), ""), Level::Ok, "has none"),
            (swap(Some(false), some), Level::Missing, "swapaccount=1"),
        ]);
        judged([
            (cpu_cap(Some(true), Some(50)), Level::Ok, "possible"),
            (cpu_cap(None, Some(50)), Level::Ok, "yet"),
            (cpu_cap(Some(false), None), Level::Ok, "not wanted"),
            (
                cpu_cap(Some(false), Some(50)),
                Level::Missing,
                "CONFIG_CFS_BANDWIDTH",
            ),
        ]);
        let look = Look {
            controllers: vec![("freezer", None)],
            swap: Some(true),
            cpu_cap: Some(true),
            tcp: Some(true),
        };
        let found = cgroups(Ok(look), none, None);
        let found = found.iter().map(|found| (&*found.name, found.level));
        assert_eq!(
            found.collect::<Vec<_>>(),
            [
                ("control group freezer", Level::Warn),
                ("control group swap", Level::Ok),
                ("control group cpu cap", Level::Ok),
                ("control group tcp", Level::Ok)
            ]
        );
        for (error, word) in [
            (CgroupError::NoMemory, "cgroup_enable=memory"),
            (CgroupError::NoCpu, "'cpu'"),
            (CgroupError::NoPids, "'pids'"),
            (CgroupError::NoDevices, "devices"),
        ] {
            let found = cgroups(Err(error), none, None);
            assert_eq!(found.len(), 1);
            assert_eq!(found[0].level, Level::Missing);
            assert!(found[0].meaning.contains(word), "{}", found[0]);
        }
    }

    #[test]
    fn what_is_weaker_without_harm_to_others_is_a_warning() {
        use Level::{Ok as Good, Warn};
        const TWO: &str = "search lan\nnameserver 9.9.9.9\nnameserver 10.0.0.1\n";
        let own = |server: Ipv4Addr| server == Ipv4Addr::new(10, 0, 0, 1);
        judged([
            (bandwidth(Ok(())), Good, ""),
            (bandwidth(Err("no".to_owned())), Warn, "sch_tbf"),
            (conntrack(Some("65536")), Good, "65536 connections"),
            (conntrack(None), Warn, "nf_conntrack"),
            (kernel_log(Err("no".to_owned())), Warn, "CAP_SYSLOG"),
            (tcp(Some(true)), Good, "counted"),
            (tcp(None), Good, "yet"),
            (tcp(Some(false)), Warn, "nosocket"),
            (
                name_servers(TWO, |_| false, false),
                Good,
                "9.9.9.9, 10.0.0.1",
            ),
            (name_servers(TWO, own, false), Warn, "host_allow"),
            (name_servers(TWO, own, true), Good, "10.0.0.1"),
            (name_servers("search lan\n", own, true), Warn, "network.dns"),
            (terminals(Some("0")), Good, "TIOCSTI"),
            (terminals(Some("1")), Warn, "dev.tty.legacy_tiocsti"),
            (terminals(None), Warn, "6.2"),
        ]);
        let chains = |chains: &[&str]| {
            let edit = |chain: &str| match chain {
                "ip filter FORWARD" => Some(Ok(())),
                "ip filter OTHER" => Some(Err("missing".to_owned())),
                _ => None,
            };
            foreign_chains(
                chains.iter().map(|chain| (*chain).to_owned()).collect(),
                edit,
            )
        };
        let levels =
            |found: Vec<Finding>| found.iter().map(|found| found.level).collect::<Vec<_>>();
        assert_eq!(levels(chains(&[])), [Good]);
        assert_eq!(
            levels(chains(&[
                "ip filter FORWARD",
                "inet others passing",
                "ip filter OTHER"
            ])),
            [Good, Warn, Warn]
        );
    }

    #[test]
    fn helpers_that_are_not_there_are_named() {
        let empty = std::env::temp_dir();
        judged([(
            helpers(&empty),
            Level::Missing,
            "has no wshd, wsh, iomux-spawn",
        )]);
    }

    #[test]
    fn disks_are_judged_by_what_is_configured() {
        use Level::{Missing, Ok as Good, Warn};
        use Wanted::{Auto, Image, Quota, Unlimited};
        let table = [
            (Auto, [Good, Good, Good, Warn]),
            (Quota, [Good, Good, Missing, Missing]),
            (Image, [Good, Missing, Good, Missing]),
            (Unlimited, [Warn, Warn, Warn, Warn]),
        ];
        for (way, levels) in table {
            let ways = [(true, true), (true, false), (false, true), (false, false)];
            let found = ways.map(|(quotas, images)| {
                let quotas = quotas.then_some(()).ok_or("no quotas");
                let images = images.then_some(()).ok_or("no images".to_owned());
                disk_finding(way, quotas, images).level
            });
            assert_eq!(found, levels, "{way:?}");
        }
    }

    #[test]
    fn ports_of_the_kernels_own_range_are_found_unless_reserved() {
        let (mapped, range) = (61001..=65000, "32768\t60999");
        assert_eq!(overlap(&mapped, range, ""), None);
        assert_eq!(overlap(&(60000..=61000), range, ""), Some(60000));
        assert_eq!(overlap(&(60000..=61000), range, "8080,60000-60999"), None);
        assert_eq!(overlap(&(60000..=61000), range, "60000-60500"), Some(60501));
        assert_eq!(overlap(&(60000..=60001), range, "60000"), Some(60001));
        assert_eq!(overlap(&mapped, "", ""), None);
    }
}
