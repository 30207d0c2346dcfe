//! What a hostile root file system and hostile apps would try against the host and their neighbours. Each
//! attack comes with its control: with the one measure left out that is named (which only a debug build of
//! `wshd` can do), or outside of any container, the same steps succeed. Needs root and a C compiler.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test, its harness included"
)]

#[allow(dead_code, reason = "a part of it is for wall.rs")]
mod support;

use container::client::Stdio;
use container::fields::program_memfd;
use container::job::{JobRequest, Rlimit};
use container::launch::{Access, Bind, Ids, Link, hardware_addresses};
use container::status::{Status, Step};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::collections::BTreeSet;
use std::io::Write;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use support::{Child, Files, Place, Running, job, pipe, read_all, sh};

/// The attacker, built once for its text.
fn hostile() -> &'static Path {
    static BUILT: LazyLock<PathBuf> = LazyLock::new(build);
    &BUILT
}

fn build() -> PathBuf {
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/hostile/hostile.c");
    let built = Path::new(env!("CARGO_TARGET_TMPDIR")).join("hostile");
    let age = |path: &Path| std::fs::metadata(path).and_then(|data| data.modified());
    if age(&built).is_ok_and(|built| built > age(Path::new(source)).unwrap()) {
        return built;
    }
    let new = built.with_extension(std::process::id().to_string());
    let arguments = ["-static", "-O1", "-o", new.to_str().unwrap(), source];
    let path = format!("PATH={}", std::env::var("PATH").unwrap());
    let argv = [&["cc"], &arguments[..]].concat();
    let cc = Child::spawn("/usr/bin/cc", &argv, &[path], &[]);
    assert_eq!(cc.wait(), Status::Exited(0), "{source} is not built");
    std::fs::rename(new, &built).unwrap();
    built
}

/// What would keep a job from its start once another measure is left out.
const SECOND_LOOK: &str = "--without=second-look";

/// The directories of a container whose root file system has the attacker as `/bin/hostile`.
fn files(without: &[&'static str]) -> Files {
    let mut files = support::files();
    std::fs::copy(hostile(), files.dir.join("stack/bin/hostile")).unwrap();
    files.without = without.to_vec();
    if !without.is_empty() {
        files.without.push(SECOND_LOOK);
    }
    files
}

fn place(without: &[&'static str]) -> Place {
    Place::make(files(without), &[], None)
}

/// Starts the attacker in a container, and says all its input.
fn start_inside(place: &Place, user: &str, step: &[&str], input: &str) -> Running {
    let argv = [&["/bin/hostile"], step].concat();
    let mut run = place.spawn(user, &job(&argv));
    run.stdin
        .take()
        .unwrap()
        .write_all(input.as_bytes())
        .unwrap();
    run
}

/// Runs the attacker in a container: what it says, and how it ends.
fn inside(place: &Place, user: &str, step: &[&str], input: &str) -> (String, Status) {
    let (stdout, stderr, frames) = start_inside(place, user, step, input).finish();
    assert_eq!(stderr, "");
    (stdout, *frames.last().unwrap())
}

/// The same attacker on the host, as root.
fn outside(step: &[&str], input: &str) -> (String, Status) {
    let ((stdin, typed), (out, stdout)) = (pipe(), pipe());
    let argv = [&["hostile"], step].concat();
    let fds = [(stdin.as_fd(), 0), (stdout.as_fd(), 1)];
    let child = Child::spawn(hostile().to_str().unwrap(), &argv, &[], &fds);
    drop((stdin, stdout));
    std::fs::File::from(typed)
        .write_all(input.as_bytes())
        .unwrap();
    (read_all(&out), child.wait())
}

/// What became of each call, by its name.
fn calls(place: &Place, user: &str, input: &str) -> Vec<String> {
    let (said, end) = inside(place, user, &["calls"], input);
    assert_eq!(end, Status::Exited(0), "{said}");
    said.lines().map(str::to_owned).collect()
}

/// What no job needs, and every kernel lets anybody have; the last one changes who the caller is.
const REFUSED: &str = "setns 308 0 0
add_key 248 s:user s:ostler s:x 1 -3
keyctl 250 0 -3 0
request_key 249 s:user s:ostler-none 0 0
io_uring_setup 425 1 z:120
userfaultfd 323 1
vsock 41 40 1 0
alg 41 38 5 0
personality 135 0x40000
get_mempolicy 239 0 0 0 0 0
move_pages 279 0 0 0 0 0 0
process_madvise 440 -1 0 0 0 0
pidfd_getfd 438 -1 0 0
open_tree 428 -100 s:/ 0
ustat 136 1 z:64
unshare 272 0x10000000
";

#[test]
fn what_the_list_does_not_name_is_refused_by_the_kernel() {
    let filtered = place(&[]);
    for user in ["vcap", ""] {
        for answer in calls(&filtered, user, REFUSED) {
            assert!(answer.ends_with(" EPERM"), "{user}: {answer}");
        }
        // Two that a C library has an older way for: of an older kernel, and of a size that none takes.
        let newer = "clone3 435 z:88 1\nfile_getattr 468 -100 s:/ z:8 1 0\nx32 0x40000027";
        let answers = calls(&filtered, user, newer);
        let wanted = ["clone3", "file_getattr", "x32"].map(|call| format!("{call} ENOSYS"));
        assert_eq!(answers, wanted, "{user}");
        for flag in ["0x10000000", "0x20000", "0x2000000", "0x40000000"] {
            assert_eq!(inside(&filtered, user, &["clone", flag], "").0, "EPERM\n");
        }
        // The 32-bit entry is no way around: the process ends.
        let (said, end) = inside(&filtered, user, &["int80"], "");
        assert_eq!((said.as_str(), end), ("", Status::Signaled(31)), "{user}");
    }

    let open = place(&["--without=filter"]);
    for user in ["vcap", ""] {
        for answer in calls(&open, user, REFUSED) {
            assert!(!answer.ends_with(" EPERM"), "{user}: {answer}");
        }
        assert_eq!(calls(&open, user, "clone3 435 z:88 1"), ["clone3 EINVAL"]);
        assert_eq!(inside(&open, user, &["clone", "0x10000000"], "").0, "ok\n");
        let (said, end) = inside(&open, user, &["int80"], "");
        assert_eq!((said.as_str(), end), ("ok\n", Status::Exited(0)), "{user}");
    }
}

#[test]
fn sockets_that_the_kernel_keeps_elsewhere_or_has_modules_for_are_refused() {
    // NETLINK_USERSOCK, whose messages are on nobody's account; UDP-Lite, which needs no module; a pair.
    let refused = "usersock 41 16 3 2\nudplite 41 2 2 136\npair 53 2 1 0 z:8\n";
    // What modules are for, only where it is refused: that must load none.
    let modules = "sctp 41 2 1 132\nseqpacket 41 10 5 0\ndccp 41 2 6 33\nsmc 41 2 1 256\ngeneric 41 16 3 16\n";
    let mut useful = "route 41 16 3 0\nudev 41 16 2 15\ntcp 41 2 0x80801 6\nudp 41 2 2 17\n\
        unix 41 1 1 0\npair 53 1 1 0 z:8\n"
        .to_owned();
    if Path::new("/proc/net/if_inet6").exists() {
        useful += "tcp6 41 10 0x80801 0\n";
    }
    let (filtered, open) = (place(&[]), place(&["--without=filter"]));
    for user in ["vcap", ""] {
        let answers = calls(&filtered, user, &[refused, modules].concat());
        let (pair, others): (Vec<_>, Vec<_>) =
            answers.iter().partition(|said| said.starts_with("pair"));
        assert_eq!(pair, ["pair EOPNOTSUPP"]);
        for answer in others {
            assert!(answer.ends_with(" EPROTONOSUPPORT"), "{user}: {answer}");
        }
        for answer in calls(&filtered, user, &useful) {
            assert!(answer.ends_with(" ok"), "{user}: {answer}");
        }
        // Not every kernel has UDP-Lite.
        assert_eq!(calls(&open, user, refused)[0], "usersock ok", "{user}");
    }
    // Protocol 0 is none; the kernel looks for it among its modules, where it is not refused.
    let none = "raw 41 2 3 0\nraw6 41 10 3 0\n";
    assert_eq!(calls(&filtered, "", none), ["raw EPERM", "raw6 EPERM"]);
}

#[test]
fn nobody_joins_groups() {
    // setsockopt(2): IP_ADD_MEMBERSHIP, MCAST_JOIN_GROUP, IPV6_ADD_MEMBERSHIP of no socket; and IP_TTL.
    let options = "join 54 -1 0 35 z:12 12\ngroup 54 -1 0 42 z:136 136\njoin6 54 -1 41 20 z:20 20\nttl 54 -1 0 2 z:4 4\n";
    let (filtered, open) = (place(&[]), place(&["--without=filter"]));
    for user in ["vcap", ""] {
        let answers = ["join ENODEV", "group ENODEV", "join6 ENODEV", "ttl EBADF"];
        assert_eq!(calls(&filtered, user, options), answers, "{user}");
        assert!(
            calls(&open, user, options)
                .iter()
                .all(|said| said.ends_with(" EBADF"))
        );
    }
}

#[test]
fn nobody_gets_a_core_for_itself() {
    // PR_SCHED_CORE_CREATE for itself. A kernel with cores of one thread says ENODEV, one without the option EINVAL.
    let take = "take 157 62 1 0 0 0\n";
    let (filtered, open) = (place(&[]), place(&["--without=filter"]));
    for user in ["vcap", ""] {
        assert_eq!(calls(&filtered, user, take), ["take EINVAL"], "{user}");
        let said = calls(&open, user, take);
        let known = ["take ok", "take ENODEV", "take EINVAL"];
        assert!(known.contains(&&said[0][..]), "{user}: {said:?}");
    }
}

/// The user namespace of a process.
fn users_of(pid: impl std::fmt::Display) -> OwnedFd {
    std::fs::File::open(format!("/proc/{pid}/ns/user"))
        .unwrap()
        .into()
}

#[test]
fn no_other_users_can_be_joined() {
    let enter = |place: &Place, user: &str, users: &OwnedFd| {
        let client = place.client();
        let file = job(&["/bin/hostile", "enter"]).to_memfd().unwrap();
        let (out, stdout) = pipe();
        let three = [users.as_fd(), stdout.as_fd(), stdout.as_fd()];
        client
            .run(user, file.as_fd(), Stdio::Descriptors(three), None)
            .unwrap();
        drop(stdout);
        read_all(&out)
    };
    let neighbour = neighbour(&[]);
    let (hosts, neighbours) = (users_of("self"), users_of(neighbour.pid));
    let all: [&[&str]; 3] = [&[], &["--without=filter"], &["--without=capabilities"]];
    for without in all {
        let place = place(without);
        for user in ["vcap", ""] {
            assert_eq!(enter(&place, user, &hosts), "EPERM\n", "{user}");
            assert_eq!(enter(&place, user, &neighbours), "EPERM\n", "{user}");
            let own = enter(&place, user, &users_of(place.pid));
            assert_eq!(own, "EINVAL\n", "{user}");
        }
    }
    // The host's root may.
    let (out, stdout) = pipe();
    let fds = [(neighbours.as_fd(), 0), (stdout.as_fd(), 1)];
    let child = Child::spawn(
        hostile().to_str().unwrap(),
        &["hostile", "enter"],
        &[],
        &fds,
    );
    drop(stdout);
    assert_eq!(
        (read_all(&out).as_str(), child.wait()),
        ("ok\n", Status::Exited(0))
    );
}

/// What filters that are compiled may take of the machine's memory, to be put back.
struct JitLimit(String);

impl JitLimit {
    const PATH: &str = "/proc/sys/net/core/bpf_jit_limit";

    fn exhaust() -> Self {
        let before = std::fs::read_to_string(Self::PATH).unwrap();
        std::fs::write(Self::PATH, "1").unwrap();
        Self(before)
    }
}

impl Drop for JitLimit {
    fn drop(&mut self) {
        std::fs::write(Self::PATH, &self.0).unwrap();
    }
}

/// In the virtual machine only, where nobody else needs filters meanwhile.
#[test]
fn filters_of_apps_take_from_no_container_to_be() {
    if std::env::var_os("OSTLER_VM").is_none() {
        eprintln!(
            "skipped: a machine without memory for filters: it is tried in the virtual machine"
        );
        return;
    }
    let before = place(&[]);
    assert_eq!(inside(&before, "vcap", &["filter"], "").0, "ok\n");
    let _limit = JitLimit::exhaust();
    // ENOTSUPP (524), as of a kernel that compiles all filters: who has no right over the machine gets none.
    assert_eq!(inside(&before, "vcap", &["filter"], "").0, "unnamed\n");
    let after = place(&[]);
    assert_eq!(inside(&after, "vcap", &["filter"], "").0, "unnamed\n");
    assert!(calls(&after, "vcap", "setns 308 0 0")[0].ends_with(" EPERM"));
}

#[test]
fn the_init_is_behind_the_filter_too() {
    for (without, seccomp) in [(&[][..], "2"), (&["--without=filter"], "0")] {
        let place = place(without);
        let status = std::fs::read_to_string(format!("/proc/{}/status", place.pid)).unwrap();
        assert!(
            status.contains(&format!("Seccomp:\t{seccomp}\n")),
            "{status}"
        );
    }
}

#[test]
fn an_app_has_its_threads_and_processes_behind_the_filter() {
    let place = place(&[]);
    let (said, end) = inside(&place, "vcap", &["threads"], "");
    assert_eq!(
        (said.as_str(), end),
        ("thread fork 7\n2000 2000 2000\n", Status::Exited(0))
    );
}

#[test]
fn nobody_types_into_a_terminal_or_changes_what_serves_it() {
    // TIOCSTI, the same with a high half (CVE-2019-10063), TIOCLINUX; and TIOCSETD, with the number of a line discipline past all.
    let script = "for way in 0x5412 0x100005412 0x541c 0x5423; do hostile type $way; done";
    let said = |without: &[&'static str]| {
        let (seen, end) = place(without).wsh_in_terminal([true; 3], script, |_| None);
        assert_eq!(end, Status::Exited(0));
        seen
    };
    assert_eq!(said(&[]), "EPERM\r\n".repeat(4));
    // Some kernels can be, and are, told to do without the first.
    let legacy = std::fs::read_to_string("/proc/sys/dev/tty/legacy_tiocsti");
    let typed = if legacy.is_ok_and(|legacy| legacy == "0\n") {
        "EIO"
    } else {
        "ok"
    };
    let open = said(&["--without=filter"]);
    let answers: Vec<&str> = open
        .split_whitespace()
        .map(|word| word.trim_matches('x'))
        .collect();
    assert_eq!(answers, [typed, typed, "ENOTTY", "EINVAL"], "{open}");
}

/// All limits that there are, below what any host has.
fn limits() -> Vec<Rlimit> {
    (0..16)
        .map(|resource| {
            let (soft, hard) = match resource {
                3 => (8 << 20, 8 << 20),
                6 | 11 => (512, 512),
                7 => (1024, 4096),
                8 => (65_536, 65_536),
                12 => (819_200, 819_200),
                4 | 13 | 14 => (0, 0),
                _ => (u64::MAX, u64::MAX),
            };
            Rlimit {
                resource,
                soft,
                hard,
            }
        })
        .collect()
}

#[test]
fn a_job_has_what_the_golden_list_says_and_nothing_else() {
    let place = place(&[]);
    for user in ["vcap", "root"] {
        let request = JobRequest {
            rlimits: limits(),
            ..job(&["/bin/hostile", "state"])
        };
        let (state, stderr, _) = place.spawn(user, &request).finish();
        let path = format!(
            "{}/../fixtures/hostile/state.{user}",
            env!("CARGO_MANIFEST_DIR")
        );
        let golden = std::fs::read_to_string(&path).unwrap();
        assert_eq!(state, golden, "{path}: {stderr}");
    }
}

#[test]
fn what_has_kept_a_right_is_not_executed() {
    let forgotten = [
        ("vcap", "--without=groups"),
        ("vcap", "--without=group-id"),
        ("vcap", "--without=user-id"),
        ("vcap", "--without=bounding-set"),
        ("vcap", "--without=capabilities"),
        ("vcap", "--without=no-new-privileges"),
        ("vcap", "--without=filter"),
        ("", "--without=bounding-set"),
        ("", "--without=capabilities"),
    ];
    for (user, step) in forgotten {
        let end = |without: &[&'static str]| {
            let mut files = files(&[]);
            files.without = without.to_vec();
            let place = Place::make(files, &[], None);
            let frames = place.spawn(user, &sh("exit 7")).finish().2;
            *frames.last().unwrap()
        };
        let refused = Status::Failed {
            step: Step::Privileges,
            errno: Errno::EPERM as i32,
        };
        assert_eq!(end(&[step]), refused, "{user}: {step}");
        let unseen = end(&[step, SECOND_LOOK]);
        assert_eq!(unseen, Status::Exited(7), "{user}: {step}");
    }
}

#[test]
fn a_release_build_leaves_nothing_out() {
    let helpers = std::env::var_os("OSTLER_HELPERS").map(PathBuf::from);
    let default = "../target/x86_64-unknown-linux-gnu/helpers";
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join(default);
    let state = |wshd: Option<PathBuf>| {
        let mut files = files(&["--without=filter", "--without=no-new-privileges"]);
        files.wshd = wshd.unwrap_or(files.wshd.clone());
        let place = Place::make(files, &[], None);
        inside(&place, "vcap", &["state"], "").0
    };
    let release = state(Some(helpers.unwrap_or(default).join("wshd")));
    let debug = state(None);
    for (held, left_out) in [
        ("NoNewPrivs: 1\n", "NoNewPrivs: 0\n"),
        ("Seccomp: 2\n", "Seccomp: 0\n"),
    ] {
        assert!(
            release.contains(held) && debug.contains(left_out),
            "{release}{debug}"
        );
    }
}

/// The most memory that the init ever had, in KiB.
fn peak(place: &Place) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", place.pid)).unwrap();
    let mut lines = status.lines();
    let peak = lines.find_map(|line| line.strip_prefix("VmHWM:"));
    peak.unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap()
}

/// Puts something where a file should be.
type Put<'a> = &'a dyn Fn(&Path);

#[test]
fn users_are_read_from_short_plain_files_only() {
    let make = |passwd: Put<'_>, group: Put<'_>, without: &[&'static str]| {
        let files = files(without);
        for (name, put) in [("passwd", passwd), ("group", group)] {
            let path = files.dir.join("stack/etc").join(name);
            std::fs::remove_file(&path).unwrap();
            put(&path);
        }
        Place::make(files, &[], None)
    };
    let fifo = |path: &Path| nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let device = |path: &Path| std::os::unix::fs::symlink("/dev/zero", path).unwrap();
    let sparse = |bytes: u64| {
        move |path: &Path| std::fs::File::create(path).unwrap().set_len(bytes).unwrap()
    };
    let fine = |path: &Path| std::fs::write(path, "").unwrap();
    let huge = sparse(4 << 30);
    let attacks: [(Put<'_>, Errno); 3] = [
        (&fifo, Errno::EINVAL),
        (&device, Errno::EINVAL),
        (&huge, Errno::EFBIG),
    ];
    for (attack, errno) in attacks {
        for place in [make(attack, &fine, &[]), make(&fine, attack, &[])] {
            let (step, errno) = (Step::User, errno as i32);
            let frames = place.spawn("vcap", &sh("exit")).finish().2;
            assert_eq!(frames, [Status::Failed { step, errno }]);
            assert_eq!(place.client().info().unwrap(), [], "the init serves on");
            assert!(peak(&place) < 16 << 10, "{} KiB", peak(&place));
        }
    }

    let without = ["--without=plain-files"];
    let place = make(&sparse(20 << 20), &fine, &without);
    let (said, end) = inside(&place, "", &["ids"], "");
    assert_eq!((said.as_str(), end), ("0 0 0\n", Status::Exited(0)));
    assert!(peak(&place) > 20 << 10, "{} KiB", peak(&place));
    let place = make(&fifo, &fine, &without);
    let _waits = place.spawn("vcap", &sh("exit"));
    let silence = place.client().info().unwrap_err().errno;
    assert_eq!(silence, Errno::ETIMEDOUT, "it waits for a writer");
}

#[test]
fn users_are_read_from_no_device() {
    let (devices, plain) = ("--without=no-devices", "--without=plain-files");
    let make = |device: Put<'_>, without: &[&'static str]| {
        let files = files(without);
        let passwd = files.dir.join("stack/etc/passwd");
        std::fs::remove_file(&passwd).unwrap();
        device(&passwd);
        let place = Place::make(files, &[], None);
        let frames = place.spawn("vcap", &sh("exit")).finish().2;
        let [Status::Failed { step, errno }] = frames[..] else {
            panic!("{without:?}: {frames:?}");
        };
        assert_eq!(step, Step::User, "{without:?}");
        assert_eq!(place.client().info().unwrap(), [], "the init serves on");
        (Errno::from_raw(errno), peak(&place) > 20 << 10)
    };
    // A node that the root file system brings itself, and a way to one that every container has. Endless ones.
    let node = |path: &Path| {
        let zero = nix::sys::stat::makedev(1, 5);
        let (kind, mode) = (nix::sys::stat::SFlag::S_IFCHR, nix::sys::stat::Mode::all());
        nix::sys::stat::mknod(path, kind, mode, zero).unwrap();
    };
    let link = |path: &Path| symlink("/dev/zero", path).unwrap();
    // Without both, the init takes its fill of it, as much as a test lets it have.
    for (device, without, found) in [
        (&node as Put<'_>, &[][..], (Errno::EACCES, false)),
        (&node, &[plain], (Errno::EACCES, false)),
        (&node, &[devices], (Errno::EINVAL, false)),
        (&node, &[devices, plain], (Errno::EFBIG, true)),
        (&link, &[], (Errno::EINVAL, false)),
        (&link, &[plain], (Errno::EFBIG, true)),
    ] {
        assert_eq!(make(device, without), found, "{without:?}");
    }
}

/// A root file system with nothing but the attacker under the names of what an engine could want to run.
fn traps() -> Files {
    const NAMES: &str = "bash sh init wshd mount ip ifconfig hostname nft env id tar busybox \
        ld-linux-x86-64.so.2 libnss_files.so.2";
    let files = files(&[]);
    for directory in ["bin", "sbin", "usr/bin", "usr/sbin", "lib", "lib64"] {
        let directory = files.dir.join("stack").join(directory);
        std::fs::create_dir_all(&directory).unwrap();
        for name in NAMES.split_whitespace() {
            let _ = std::fs::remove_file(directory.join(name));
            std::fs::copy(hostile(), directory.join(name)).unwrap();
        }
    }
    files
}

#[test]
fn nothing_of_the_root_file_system_runs_before_a_job_and_none_with_privileges() {
    for (user, uid) in [("vcap", 2000), ("", 0)] {
        let place = Place::make(traps(), &[], None);
        let ran = place.dir.join("upper/tmp/was-run");
        place.client().info().unwrap();
        assert!(!ran.exists(), "{}", std::fs::read_to_string(ran).unwrap());
        // The control: it tells when it runs. The user's shell is the program when none is named.
        let (_, _, frames) = place.spawn(user, &JobRequest::default()).finish();
        assert_eq!(frames.last(), Some(&Status::Exited(0)));
        let state = std::fs::read_to_string(&ran).unwrap();
        let ids = format!("Uid: {uid} {uid} {uid} {uid}\n");
        for held in [&ids[..], "NoNewPrivs: 1\n", "Seccomp: 2\n"] {
            assert!(state.contains(held), "{state}");
        }
    }
}

#[test]
fn a_setuid_program_makes_nobody_root() {
    let ids = |without: &[&'static str]| {
        let files = files(without);
        let program = files.dir.join("stack/bin/hostile");
        std::fs::set_permissions(program, PermissionsExt::from_mode(0o4755)).unwrap();
        inside(&Place::make(files, &[], None), "vcap", &["ids"], "").0
    };
    let (mount, promise) = ("--without=no-setuid", "--without=no-new-privileges");
    for without in [&[][..], &[mount], &[promise]] {
        assert_eq!(ids(without), "2000 2000 2000\n", "{without:?}");
    }
    assert_eq!(ids(&[mount, promise]), "2000 0 0\n");
}

/// What a job sees of the leaked directory `/` of the host (see the harness), descriptor 50.
fn leak(without: &[&'static str], request: JobRequest) -> (String, Vec<Status>) {
    let files = files(without);
    std::fs::write(files.dir.join("secret"), "the host's").unwrap();
    let place = Place::make(files, &[], None);
    let secret = place.dir.join("secret").display().to_string();
    let argv = request.argv.into_iter();
    let argv = argv.map(|word| {
        if word == b"SECRET" {
            secret.clone().into()
        } else {
            word
        }
    });
    let argv = argv.collect();
    let (said, _, frames) = place.spawn("", &JobRequest { argv, ..request }).finish();
    (said, frames)
}

#[test]
fn no_directory_of_the_host_reaches_a_job() {
    let place = place(&[]);
    for fd in 0..64 {
        let request = JobRequest {
            cwd: Some(format!("/proc/self/fd/{fd}").into_bytes()),
            ..job(&["/bin/hostile", "state"])
        };
        let frames = place.spawn("", &request).finish().2;
        let refused = matches!(
            frames[..],
            [Status::Failed {
                step: Step::Directory,
                ..
            }]
        );
        assert!(refused, "{fd}: {frames:?}");
    }

    // CVE-2024-21626: the working directory is set while the init's descriptors are still there.
    let (init, directory) = ("--without=init-descriptors", "--without=directory");
    let by_directory = || JobRequest {
        cwd: Some(b"/proc/self/fd/50".to_vec()),
        ..job(&["/bin/sh", "-c", "cat .$0", "SECRET"])
    };
    for without in [&[][..], &[init], &[directory]] {
        let (said, frames) = leak(without, by_directory());
        let refused = matches!(
            frames[..],
            [Status::Failed {
                step: Step::Directory,
                ..
            }]
        );
        assert!(refused && said.is_empty(), "{without:?}: {frames:?}");
    }
    assert_eq!(leak(&[init, directory], by_directory()).0, "the host's");

    let by_descriptor = || job(&["/bin/sh", "-c", "cat /proc/self/fd/50$0", "SECRET"]);
    let jobs = "--without=job-descriptors";
    for without in [&[][..], &[init], &[jobs]] {
        assert_eq!(leak(without, by_descriptor()).0, "", "{without:?}");
    }
    assert_eq!(leak(&[init, jobs], by_descriptor()).0, "the host's");
}

/// Makes a container whose root file system has, at `link`, a symlink to a directory of the host, and a bind
/// mount if one is named: what the making said, and how much is in that directory then.
fn follow(link: &str, bind: Option<&str>, without: &[&'static str]) -> (String, usize) {
    let mut files = files(without);
    let outside = files.dir.join("outside");
    std::fs::create_dir(&outside).unwrap();
    symlink(&outside, files.dir.join("stack").join(link)).unwrap();
    if let Some(target) = bind {
        let (source, target) = (files.dir.join("to,p:x/layer"), target.into());
        let access = Access::ReadWrite;
        files.launch.binds.push(Bind {
            source,
            target,
            access,
        });
    }
    let told = support::try_make(&files);
    (told, std::fs::read_dir(&outside).unwrap().count())
}

#[test]
fn no_symlink_of_the_root_file_system_leads_a_mount_out_of_it() {
    let (followed, inside) = ("--without=no-symlinks", "--without=inside-root");
    for link in ["proc", "sys", "dev"] {
        let refused = (format!("openat2({link}): ELOOP"), 0);
        for without in [&[][..], &[inside]] {
            assert_eq!(follow(link, None, without), refused, "{without:?}");
        }
        // Inside, there is no such directory; on the host there is, and it is mounted on.
        let (told, _) = follow(link, None, &[followed]);
        assert_eq!(told, format!("create({link}): EEXIST"));
        let (told, _) = follow(link, None, &[followed, inside]);
        assert!(
            !told.starts_with("openat2") && !told.starts_with("create"),
            "{told}"
        );
    }
    // A bind mount may go through links of the root file system, as far as they stay in it.
    for target in ["/trap/file", "/trap/directory/file", "/trap"] {
        let (told, made) = follow("trap", Some(target), &[]);
        let refused = told.starts_with("create(") && told.ends_with("trap): EEXIST");
        assert!(refused && made == 0, "{target}: {told}, {made}");
    }
    let (told, made) = follow("trap", Some("/trap/file"), &[inside]);
    assert_eq!(
        (told.as_str(), made),
        ("made", 1),
        "a file is made on the host"
    );
}

#[test]
fn what_the_root_file_system_has_where_the_kernels_files_come_to_lie_does_not_matter() {
    const PLACES: [&str; 14] = [
        "dev/null",
        "dev/tty",
        "dev/pts",
        "dev/shm",
        "dev/mqueue",
        "dev/ptmx",
        "dev/fd",
        "proc/kcore",
        "proc/keys",
        "proc/sys",
        "proc/sysrq-trigger",
        "proc/self",
        "sys/firmware",
        "sys/fs",
    ];
    let files = files(&[]);
    let outside = files.dir.join("outside");
    std::fs::create_dir(&outside).unwrap();
    for place in PLACES {
        let path = files.dir.join("stack").join(place);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(&outside, path).unwrap();
    }
    let place = Place::make(files, &[], None);
    let mounts = place.run_inside("cut -d' ' -f5 /proc/self/mountinfo");
    let mounts: BTreeSet<&str> = mounts.lines().collect();
    for mount in ["/dev/null", "/dev/tty", "/dev/pts", "/dev/shm", "/proc/sys"] {
        assert!(mounts.contains(mount), "{mount}: {mounts:?}");
    }
    assert_eq!(
        std::fs::read_dir(place.dir.join("outside"))
            .unwrap()
            .count(),
        0
    );
}

#[test]
fn devices_cannot_be_made() {
    // mknod(2): the first disk, the null device.
    let nodes = "disk 133 s:/tmp/disk 0x6180 0x800\nnull 133 s:/tmp/null 0x2180 0x103";
    let make = |user: &str, without: &[&'static str]| calls(&place(without), user, nodes);
    let refused = ["disk EPERM", "null EPERM"];
    assert_eq!(make("vcap", &[]), refused);
    assert_eq!(make("vcap", &["--without=users"]), refused);
    // Root may, by its capabilities; but it is nobody's root.
    assert_eq!(make("", &[]), refused);
    assert_eq!(make("", &["--without=capabilities"]), refused);
    // And once they are made they are none still.
    let (users, devices) = ("--without=users", "--without=no-devices");
    for (without, opened) in [(&[users][..], "EACCES\n"), (&[users, devices], "ok\n")] {
        let open = place(without);
        assert_eq!(calls(&open, "", nodes), ["disk ok", "null ok"]);
        assert_eq!(inside(&open, "", &["open", "/tmp/null"], "").0, opened);
    }
}

#[test]
fn nobody_has_raw_sockets() {
    // socket(2): ICMP by hand, whole IP packets, whole frames.
    let sockets = "icmp 41 2 3 1\nip 41 2 3 255\nframes 41 17 3 0x300";
    let make = |user: &str, without: &[&'static str]| calls(&place(without), user, sockets);
    let refused = ["icmp EPERM", "ip EPERM", "frames EPERM"];
    let (filter, capabilities) = ("--without=filter", "--without=capabilities");
    for user in ["vcap", ""] {
        for without in [&[][..], &[filter], &[capabilities]] {
            assert_eq!(make(user, without), refused, "{user} {without:?}");
        }
    }
    // Where they lead to is the host's to say, too (the network's walls).
    let made = ["icmp ok", "ip ok", "frames ok"];
    assert_eq!(make("", &[filter, capabilities]), made);
}

/// A container with a link at whose other end nobody is.
fn linked(without: &[&'static str]) -> Place {
    let mut files = files(without);
    files.launch.network = Some(Link {
        name: "eth0".to_owned(),
        address: Ipv4Addr::new(10, 254, 0, 2),
        prefix: 30,
        gateway: Ipv4Addr::new(10, 254, 0, 1),
        mtu: 1400,
    });
    Place::make(files, &[], None)
}

/// The kernel's table of neighbours is one for all namespaces, and does not drop those that it is asking for: with
/// a thousand of them it is full everywhere. Two hundred show it and hurt nobody.
#[test]
fn whom_an_app_sends_to_is_asked_for_on_no_link() {
    let strangers = ["strangers", "eth0", "200"];
    // Still, or in vain.
    let asked = |place: &Place, family: &str| {
        let wanted = "neigh show dev eth0 nud incomplete nud failed".split(' ');
        let words: Vec<&str> = [family].into_iter().chain(wanted).collect();
        support::ip(place.pid, &words).lines().count()
    };
    let fixed = linked(&[]);
    for user in ["vcap", ""] {
        assert_eq!(
            inside(&fixed, user, &strangers, "").0,
            "200 0 ok\n",
            "{user}"
        );
        assert_eq!((asked(&fixed, "-4"), asked(&fixed, "-6")), (0, 0), "{user}");
    }
    // But they are known to the kernel, and the one neighbour there is for ever.
    let known = support::ip(fixed.pid, &["neigh", "show", "dev", "eth0", "nud", "noarp"]);
    assert!(known.contains("198.18.0.1 "), "{known}");
    let [host, _] = hardware_addresses(&fixed.handle).map(|one| one.map(|b| format!("{b:02x}")));
    let permanent = support::ip(
        fixed.pid,
        &["neigh", "show", "dev", "eth0", "nud", "permanent"],
    );
    let host = format!("10.254.0.1 lladdr {} PERMANENT", host.join(":"));
    assert_eq!(permanent.trim(), host);

    let open = linked(&["--without=neighbours"]);
    // IPv6 once it has an address, which the kernel looks for on the link first.
    let families = match Path::new("/proc/net/if_inet6").exists() {
        true => &["-4", "-6"][..],
        false => &["-4"],
    };
    for family in families {
        support::wait_until("the kernel asks for all of them", || {
            inside(&open, "vcap", &strangers, "");
            asked(&open, family) == 200
        });
    }
}

#[test]
fn nothing_can_be_mounted() {
    let (filter, few, users) = (
        "--without=filter",
        "--without=capabilities",
        "--without=users",
    );
    let mount = |without: &[&'static str]| {
        let calls = calls(&place(without), "", "mount 165 s:none s:/tmp s:tmpfs 0 0");
        calls.concat()
    };
    for without in [
        &[][..],
        &[filter],
        &[few],
        &[users],
        &[filter, few],
        &[few, users],
        &[filter, users],
    ] {
        assert_eq!(mount(without), "mount EPERM", "{without:?}");
    }
    assert_eq!(mount(&[filter, few, users]), "mount ok");
}

fn sleeper(place: &Place) -> (Running, String) {
    let mut run = place.spawn("", &sh("echo; exec sleep 1000"));
    assert!(matches!(run.next_frame(), Some(Status::Started { .. })));
    support::wait_readable(&run.pipes.stdout);
    (run, only_job(place))
}

/// The host's number of the only job that there is.
fn only_job(place: &Place) -> String {
    let children = format!("/proc/{0}/task/{0}/children", place.pid);
    let children = std::fs::read_to_string(children).unwrap();
    children.trim().to_owned()
}

#[test]
fn processes_of_others_can_be_neither_traced_nor_signalled() {
    let (ours, theirs) = (place(&[]), place(&[]));
    let (mut run, victim) = sleeper(&theirs);
    let host = std::process::id().to_string();
    let init = theirs.pid.to_string();
    for pid in [&victim, &host, &init] {
        for step in ["trace", "signal"] {
            let (said, _) = inside(&ours, "", &[step, pid], "");
            assert_eq!(said, "ESRCH\n", "{step} {pid}");
        }
        assert_eq!(
            inside(&ours, "", &["open", &format!("/proc/{pid}/mem")], "").0,
            "ENOENT\n"
        );
    }
    // The control: the same steps of the same users, towards a process of their own container.
    let (mut own, _) = sleeper(&ours);
    let number = ours.client().info().unwrap()[0].pid.to_string();
    for step in ["trace", "signal"] {
        assert_eq!(inside(&ours, "", &[step, &number], "").0, "ok\n", "{step}");
    }
    let memory = format!("/proc/{number}/mem");
    assert_eq!(inside(&ours, "", &["open", &memory], "").0, "ok\n");
    // Everybody that there is, the init's children and itself.
    ours.run_inside("kill -9 -1; kill -9 1");
    assert_eq!(own.next_frame(), Some(Status::Signaled(9)));
    for step in ["trace", "signal"] {
        assert_eq!(outside(&[step, &victim], "").0, "ok\n", "{step}");
    }
    theirs.client().signal(run.job, 9).unwrap();
    assert_eq!(run.next_frame(), Some(Status::Signaled(9)));
    // Nor the own init, whose memory is what serves the next job.
    for step in [
        &["trace", "1"][..],
        &["open", "/proc/1/mem"],
        &["open", "/proc/1/exe"],
    ] {
        let (said, _) = inside(&ours, "", step, "");
        assert!(
            ["EPERM\n", "EACCES\n"].contains(&said.as_str()),
            "{step:?}: {said}"
        );
    }
}

/// Whether a process of one container can be traced, signalled and written to by one of another that knows
/// what the host calls it.
fn across(ours: &Place, theirs: &Place) -> [String; 3] {
    let (mut run, victim) = sleeper(theirs);
    let memory = format!("/proc/{victim}/mem");
    let steps = [["trace", &victim], ["signal", &victim], ["open", &memory]];
    let said = steps.map(|step| inside(ours, "", &step, "").0.trim().to_owned());
    // By its own init: without numbers of its own it would outlive that.
    theirs.client().signal(run.job, 9).unwrap();
    assert_eq!(run.next_frame(), Some(Status::Signaled(9)));
    said
}

#[test]
fn a_process_of_another_container_has_no_number_and_is_a_strangers() {
    let (numbers, users) = ("--without=pid-namespace", "--without=users");
    for (without, wanted) in [
        (&[][..], ["ESRCH", "ESRCH", "ENOENT"]),
        (&[users], ["ESRCH", "ESRCH", "ENOENT"]),
        (&[numbers], ["EPERM", "EPERM", "EACCES"]),
        (&[numbers, users], ["ok", "ok", "ok"]),
    ] {
        let (ours, theirs) = (place(without), neighbour(without));
        assert_eq!(across(&ours, &theirs), wanted, "{without:?}");
    }
    // The same ids on the host are enough for a signal; for the rest they must mean the same, too.
    let [ours, theirs] = [place(&[numbers]), place(&[numbers])];
    assert_eq!(across(&ours, &theirs)[..2], ["EPERM", "ok"]);
}

/// What a debug build of the init, which is not static, would load: what this process has loaded.
fn libraries() -> BTreeSet<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let paths = maps.split_whitespace().filter(|word| word.contains(".so"));
    let loader = "/lib64/ld-linux-x86-64.so.2";
    paths.chain([loader]).map(PathBuf::from).collect()
}

/// Runs the init's own program as a job, which so has it as `/proc/<pid>/exe`, and writes to that once it has
/// ended: what the write said, and whether the program is still as it was.
fn rewrite(program: OwnedFd, without: &[&'static str]) -> (String, bool) {
    let mut files = files(without);
    for library in libraries() {
        let inside = files
            .dir
            .join("stack")
            .join(library.strip_prefix("/").unwrap());
        std::fs::create_dir_all(inside.parent().unwrap()).unwrap();
        std::fs::copy(library, inside).unwrap();
    }
    let original = std::fs::read(&files.wshd).unwrap();
    // Out of the way of the numbers that it is given descriptors under.
    let program = fcntl(&program, FcntlArg::F_DUPFD_CLOEXEC(300)).unwrap();
    files.wshd = format!("/proc/self/fd/{program}").into();
    let path = files.wshd.clone();
    let place = Place::make(files, &[], None);

    // It has something to say that nobody hears yet, and so stays.
    let ((stdin, _typed), (heard, stdout)) = (pipe(), pipe());
    let room = fcntl(&stdout, FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
    std::fs::File::from(stdout.try_clone().unwrap())
        .write_all(&vec![b'.'; room.try_into().unwrap()])
        .unwrap();
    let client = place.client();
    let file = job(&["/proc/self/exe", "--help"]).to_memfd().unwrap();
    let three = [stdin.as_fd(), stdout.as_fd(), stdout.as_fd()];
    client
        .run("", file.as_fd(), Stdio::Descriptors(three), None)
        .unwrap();
    drop(stdout);
    let started = client.read_status().unwrap().unwrap().status;
    assert!(matches!(started, Status::Started { .. }), "{started:?}");
    let pid = place.client().info().unwrap()[0].pid;

    let exe = format!("/proc/{pid}/exe");
    let mut attack = place.spawn("", &job(&["/bin/hostile", "overwrite", &exe]));
    support::wait_readable(&attack.pipes.stdout);
    assert!(read_all(&heard).contains("wshd.sock"));
    assert_eq!(support::frames(&client), [Status::Exited(0)]);
    let _ = attack.stdin.as_ref().unwrap().write_all(b"now\n");
    let (said, _, _) = attack.finish();
    let same = std::fs::read(path).unwrap() == original;
    nix::unistd::close(program).unwrap();
    (said, same)
}

/// The same in a container where nobody runs that program any more when it is written to, which the init
/// would do all its life: a job has it as a descriptor, and executes it.
fn rewrite_inside(program: &OwnedFd) -> String {
    let place = place(&[]);
    let ((stdin, typed), (_out, stdout)) = (pipe(), pipe());
    let script = "ln -s /proc/self/fd/2 /tmp/hostile; exec /tmp/hostile calls";
    let (client, file) = (place.client(), sh(script).to_memfd().unwrap());
    let three = [stdin.as_fd(), stdout.as_fd(), program.as_fd()];
    client
        .run("", file.as_fd(), Stdio::Descriptors(three), None)
        .unwrap();
    drop(stdin);
    let started = client.read_status().unwrap().unwrap().status;
    assert!(matches!(started, Status::Started { .. }), "{started:?}");
    let pid = place.client().info().unwrap()[0].pid;
    support::wait_until("the program runs", || {
        let comm = std::fs::read_to_string(format!("/proc/{}/comm", only_job(&place)));
        comm.is_ok_and(|comm| comm == "hostile\n")
    });
    let exe = format!("/proc/{pid}/exe");
    let mut attack = place.spawn("", &job(&["/bin/hostile", "overwrite", &exe]));
    support::wait_readable(&attack.pipes.stdout);
    drop(typed);
    assert_eq!(support::frames(&client), [Status::Exited(0)]);
    let _ = attack.stdin.as_ref().unwrap().write_all(b"now\n");
    attack.finish().0
}

/// The same on the host, as root, with a program that nobody runs any more when it is written to.
fn rewrite_outside(program: &str) -> String {
    let (stdin, typed) = pipe();
    let argv = ["hostile", "calls"];
    let running = Child::spawn(program, &argv, &[], &[(stdin.as_fd(), 0)]);
    let exe = format!("/proc/{}/exe", running.pid());
    let ((waits, go), (out, stdout)) = (pipe(), pipe());
    let fds = [(waits.as_fd(), 0), (stdout.as_fd(), 1)];
    let argv = ["hostile", "overwrite", &exe];
    let attack = Child::spawn(hostile().to_str().unwrap(), &argv, &[], &fds);
    drop((stdin, stdout));
    support::wait_readable(&out);
    drop(typed);
    running.wait();
    std::fs::File::from(go).write_all(b"now\n").unwrap();
    attack.wait();
    read_all(&out)
}

#[test]
fn the_inits_program_cannot_be_rewritten_by_what_runs_inside() {
    // As the agent starts it: in memory, and sealed. While one runs it, most kernels refuse even root.
    let original = std::fs::read(env!("CARGO_BIN_EXE_wshd")).unwrap();
    for without in [&[][..], &["--without=users"]] {
        let sealed = program_memfd(&original, "wshd").unwrap();
        let (said, same) = rewrite(sealed, without);
        let refused = ["open\nETXTBSY\n", "open\nEPERM\n", "open\nEACCES\n"];
        assert!(
            same && refused.contains(&said.as_str()),
            "{without:?}: {said}"
        );
    }
    // Without those who run it, and without a container: what holds is the seal.
    let sealed = program_memfd(&std::fs::read(hostile()).unwrap(), "hostile").unwrap();
    let sealed = fcntl(&sealed, FcntlArg::F_DUPFD_CLOEXEC(300)).unwrap();
    assert_eq!(
        rewrite_outside(&format!("/proc/self/fd/{sealed}")),
        "open\nEPERM\n"
    );
    nix::unistd::close(sealed).unwrap();
    // In a container that has all the other measures: what holds is the seal.
    let program = std::fs::read(hostile()).unwrap();
    let sealed = program_memfd(&program, "hostile").unwrap();
    assert_eq!(rewrite_inside(&sealed), "open\nEPERM\n");
    let unsealed = memfd_create(c"hostile", MFdFlags::MFD_CLOEXEC).unwrap();
    std::fs::File::from(unsealed.try_clone().unwrap())
        .write_all(&program)
        .unwrap();
    assert_eq!(rewrite_inside(&unsealed), "open\nok\n");
    let files = files(&[]);
    let plain = files.dir.join("plain");
    // By another process: what is open here for writing would be in whatever starts meanwhile.
    let copy = ["cp", hostile().to_str().unwrap(), plain.to_str().unwrap()];
    assert_eq!(
        support::output("/usr/bin/busybox", &copy).0,
        Status::Exited(0)
    );
    assert_eq!(rewrite_outside(plain.to_str().unwrap()), "open\nok\n");
    assert!(std::fs::read(plain).unwrap().starts_with(b"owned\n"));
}

#[test]
fn keys_of_the_host_stay_on_the_host() {
    // A session keyring that whatever this process starts inherits, with a key in it.
    container::sys::process::new_session_keyring().unwrap();
    let (said, _) = outside(&["calls"], "add_key 248 s:user s:ostler-test s:secret 6 -3");
    assert_eq!(said, "add_key ok\n");
    assert_eq!(outside(&["key", "ostler-test"], "").0, "secret\n");

    let read =
        |without: &[&'static str]| inside(&place(without), "", &["key", "ostler-test"], "").0;
    let (filter, keyring) = ("--without=filter", "--without=keyring");
    assert_eq!(read(&[]), "EPERM\n");
    assert_eq!(read(&[keyring]), "EPERM\n");
    assert_eq!(read(&[filter]), "ENOKEY\n");
    assert_eq!(read(&[filter, keyring]), "secret\n");
}

/// Whether this kernel shows a path in a container.
fn there(place: &Place, path: &str) -> bool {
    Path::new(&format!("/proc/{}/root{path}", place.pid)).exists()
}

#[test]
fn what_is_write_protected_refuses_before_it_asks_who_wants_to_write() {
    // A mount that is read only refuses a change of mode first of all: mnt_want_write() of the kernel.
    let (read_only, open) = (place(&[]), place(&["--without=write-protection"]));
    let names = "bus fs irq sys sysrq-trigger".split(' ');
    let paths = names.map(|name| format!("/proc/{name}"));
    let paths: Vec<String> = paths.filter(|path| there(&read_only, path)).collect();
    let change = paths
        .iter()
        .map(|path| format!("{path} 90 s:{path} 0555\n"));
    let change: String = change.collect();
    for (place, errno) in [(&read_only, "EROFS"), (&open, "EPERM")] {
        let wanted = paths.iter().map(|path| format!("{path} {errno}"));
        let wanted: Vec<String> = wanted.collect();
        for user in ["vcap", ""] {
            assert_eq!(calls(place, user, &change), wanted);
        }
    }
}

#[test]
fn what_rules_the_machine_cannot_be_written() {
    let open = |place: &Place, user: &str, path: &str| inside(place, user, &["open", path], "").0;
    let (shut, users) = (place(&[]), place(&["--without=users"]));
    for path in [
        "/proc/sysrq-trigger",
        "/proc/sys/kernel/core_pattern",
        "/proc/sys/kernel/modprobe",
        "/proc/sys/vm/drop_caches",
        "/proc/sys/fs/binfmt_misc/register",
        "/proc/irq/default_smp_affinity",
        "/proc/sys/net/ipv4/ip_forward",
        "/sys/kernel/uevent_helper",
        "/sys/kernel/mm/ksm/run",
        "/sys/fs/cgroup/release_agent",
    ] {
        // Not every kernel has every one.
        let wanted = if there(&shut, path) {
            "EROFS\n"
        } else {
            "ENOENT\n"
        };
        // File modes come first, and everybody inside is a stranger to them; the machine's root is none.
        assert_eq!(open(&users, "", path), wanted, "{path}");
        for user in ["vcap", ""] {
            let said = open(&shut, user, path);
            assert!(
                said == wanted || said == "EACCES\n",
                "{user}: {path}: {said}"
            );
        }
    }
    // Of the container's own network: what holds is the protection, and that a job is no administrator.
    let own = "/proc/sys/net/ipv4/ip_forward";
    let (read_only, few) = ("--without=write-protection", "--without=capabilities");
    assert_eq!(open(&place(&[few]), "", own), "EROFS\n");
    assert_eq!(open(&place(&[read_only]), "", own), "EACCES\n");
    assert_eq!(open(&place(&[read_only, few]), "", own), "ok\n");
    // Of the machine: what holds is that protection, and that the container's root is nobody's.
    let (machine, users) = ("/proc/sys/kernel/core_pattern", "--without=users");
    assert_eq!(open(&place(&[users]), "", machine), "EROFS\n");
    assert_eq!(open(&place(&[read_only, few]), "", machine), "EACCES\n");
    assert_eq!(open(&place(&[read_only, users]), "", machine), "ok\n");
}

#[test]
fn what_tells_of_the_machine_is_hidden() {
    let files = "interrupts keys timer_list kcore kmsg diskstats partitions".split(' ');
    let files = files.map(|name| format!("/proc/{name}"));
    let directories = "/proc/acpi /proc/scsi /proc/fs/ext4 /proc/fs/jbd2 /sys/firmware /sys/fs/ext4 /sys/devices/virtual/block";
    let looks = files.map(|path| format!("[ \"$(busybox head -c 1 {path})\" ] && echo {path}\n"));
    let lists =
        { directories.split(' ') }.map(|path| format!("[ \"$(ls -A {path})\" ] && echo {path}\n"));
    let script =
        "exec 2> /dev/null\n".to_owned() + &looks.chain(lists).collect::<String>() + "true";
    assert_eq!(place(&[]).run_inside(&script).trim(), "");
    let seen = place(&["--without=masks"]).run_inside(&script);
    for path in ["/proc/diskstats", "/proc/partitions"] {
        assert!(seen.contains(path), "{seen}");
    }
    // A machine may have nothing of that kind.
    for path in [
        "/sys/fs/ext4",
        "/proc/fs/jbd2",
        "/sys/devices/virtual/block",
    ] {
        let here = std::fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_some());
        assert_eq!(seen.contains(path), here, "{path}: {seen}");
    }
}

#[test]
fn a_release_agent_cannot_be_set() {
    // CVE-2022-0492: a program of ours that the host's kernel starts, as root, when a group is empty. $1 is
    // what the host calls this directory.
    let attack = "cd $0 && mkdir group && mount -t cgroup -o none,name=own-release-agent none group && \
        printf '#!/bin/sh\necho $1 > %s/ran\n' $1 > agent && chmod 755 agent && \
        mkdir group/x && echo $1/agent > group/release_agent && echo 1 > group/x/notify_on_release && \
        sh -c 'echo $$ > group/x/cgroup.procs' && echo set";
    // The kernel forgets the hierarchy some time after it was unmounted, if the last group was gone by then.
    let clean = "cd $0; rmdir group/x; sleep 0.5; umount group; sleep 0.5; \
        while grep -q own-release-agent /proc/self/cgroup; do \
            mount -t cgroup -o none,name=own-release-agent none group; sleep 1; umount group; sleep 1; done";
    let run = |place: &Place, script: &str| {
        let upper = place.dir.join("upper/tmp").display().to_string();
        let script = job(&["/bin/sh", "-c", script, "/tmp", &upper]);
        let (said, told, _) = place.spawn("", &script).finish();
        (said, told)
    };
    let all = [
        "--without=filter",
        "--without=capabilities",
        "--without=users",
        "--without=cgroup-namespace",
    ];
    let one_held = all.map(|held| {
        let others = all.into_iter().filter(|other| *other != held);
        others.collect::<Vec<_>>()
    });
    for without in one_held.iter().map(Vec::as_slice).chain([&[][..]]) {
        let place = place(without);
        let (said, told) = run(&place, attack);
        assert!(
            !said.contains("set") && told.contains("mount"),
            "{without:?}: {said}{told}"
        );
        assert!(!place.dir.join("upper/tmp/agent").exists());
    }

    let place = place(&all);
    let (said, told) = run(&place, attack);
    assert_eq!(said, "set\n", "{told}");
    let ran = place.dir.join("upper/tmp/ran");
    support::wait_until("the kernel started the program", || {
        std::fs::read_to_string(&ran).is_ok_and(|ran| ran == "/x\n")
    });
    run(&place, clean);
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap();
    assert!(!groups.contains("own-release-agent"), "{groups}");
}

/// The directories of a container with ids that no other one has.
fn neighbour(without: &[&'static str]) -> Place {
    let mut files = files(without);
    files.launch.ids.first -= Ids::COUNT;
    let first = Some(files.launch.ids.first);
    std::os::unix::fs::chown(files.dir.join("upper"), first, first).unwrap();
    Place::make(files, &[], None)
}

#[test]
fn what_the_kernel_counts_for_users_is_counted_for_each_container() {
    let one = "inotify_init 253\n";
    for (without, others) in [(&[][..], "ok"), (&["--without=account"], "EMFILE")] {
        let (place, neighbour) = (place(without), neighbour(without));
        let mut hoarder = place.spawn("vcap", &job(&["/bin/hostile", "hoard"]));
        let mut said = [0; 5];
        support::wait_readable(&hoarder.pipes.stdout);
        nix::unistd::read(&hoarder.pipes.stdout, &mut said).unwrap();
        assert_eq!(&said, b"full\n");
        let wanted = format!("inotify_init {others}");
        assert_eq!(
            calls(&place, "", one),
            ["inotify_init EMFILE"],
            "{without:?}"
        );
        assert_eq!(calls(&neighbour, "vcap", one), [&wanted[..]], "{without:?}");
        assert_eq!(outside(&["calls"], one).0.trim(), wanted, "{without:?}");
        hoarder.stdin.take().unwrap().write_all(b"\n").unwrap();
        hoarder.finish();
    }
}

/// This test's mounts are its own from here on.
fn apart() {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    run("/usr/bin/mount", &["--make-rprivate", "/"]);
}

fn run(program: &str, arguments: &[&str]) {
    let end = support::output(program, arguments).0;
    assert_eq!(end, Status::Exited(0), "{program} {arguments:?}");
}

#[test]
fn nothing_of_others_is_written_out() {
    // A file system that is no container's, and a file whose content is not on its disk yet.
    const CONTENT: &[u8] = b"somebody else's, and not on the disk";
    apart();
    let is_written = |without: &[&'static str]| {
        let place = place(without);
        let (image, disk) = (place.dir.join("disk.img"), place.dir.join("disk"));
        let file = std::fs::File::create(&image).unwrap();
        file.set_len(16 << 20).unwrap();
        std::fs::create_dir(&disk).unwrap();
        let (path, at) = (image.to_str().unwrap(), disk.to_str().unwrap());
        run("/usr/sbin/mkfs.ext4", &["-q", path]);
        run("/usr/bin/mount", &["-o", "loop", path, at]);
        std::fs::write(disk.join("file"), CONTENT).unwrap();
        for user in ["vcap", ""] {
            assert_eq!(calls(&place, user, "sync 162\n"), ["sync ok"]);
        }
        // The loop device's bytes are the image's.
        let bytes = std::fs::read(&image).unwrap();
        run("/usr/bin/umount", &["--lazy", at]);
        bytes.windows(CONTENT.len()).any(|part| part == CONTENT)
    };
    assert!(is_written(&["--without=filter"]));
    // Somebody else may have called sync(2) meanwhile, but not every time.
    assert!((0..5).any(|_| !is_written(&[])));
}

#[test]
fn the_blocks_of_the_hosts_root_are_not_for_containers() {
    // A file system of its own, of which half is set aside for root.
    apart();
    for (without, filled) in [(&[][..], 0..65), (&["--without=account"], 80..101)] {
        let mut files = files(without);
        let (image, disk) = (files.dir.join("disk.img"), files.dir.join("disk"));
        std::fs::File::create(&image)
            .unwrap()
            .set_len(64 << 20)
            .unwrap();
        std::fs::create_dir(&disk).unwrap();
        let (image, at) = (image.to_str().unwrap(), disk.to_str().unwrap());
        run("/usr/sbin/mkfs.ext4", &["-q", "-m", "50", image]);
        run("/usr/bin/mount", &["-o", "loop", image, at]);
        for layer in ["upper", "work"] {
            std::fs::create_dir(disk.join(layer)).unwrap();
        }
        let first = Some(files.launch.ids.first);
        std::os::unix::fs::chown(disk.join("upper"), first, first).unwrap();
        (files.launch.upper, files.launch.work) = (disk.join("upper"), disk.join("work"));
        let place = Place::make(files, &[], None);
        place.run_inside("busybox dd if=/dev/zero of=/root/fill bs=64k 2> /dev/null");
        let stat = nix::sys::statvfs::statvfs(&disk).unwrap();
        let percent = 100 - stat.blocks_free() * 100 / stat.blocks();
        run("/usr/bin/umount", &["--lazy", at]);
        drop(place);
        assert!(
            filled.contains(&percent),
            "{without:?}: {percent} % are full"
        );
    }
}

#[test]
fn the_inits_limits_are_its_own() {
    // No descriptors at all for the init: no more jobs.
    let limit = "prlimit 302 1 7 z:16 0\nown 302 0 7 0 z:16\n";
    assert_eq!(calls(&place(&[]), "", limit), ["prlimit EPERM", "own ok"]);
    // An init without descriptors cannot even wait (poll(2), EINVAL): how the job ended it may never tell.
    let open = place(&["--without=filter"]);
    let run = start_inside(&open, "", &["calls"], limit);
    assert_eq!(read_all(&run.pipes.stdout), "prlimit ok\nown ok\n");
}

#[test]
fn a_persons_pipe_stays_a_persons() {
    use std::os::unix::fs::MetadataExt;
    let owner = |fd: &OwnedFd| {
        std::fs::File::from(fd.try_clone().unwrap())
            .metadata()
            .unwrap()
            .uid()
    };
    let (place, neighbour) = (place(&[]), neighbour(&[]));
    let (out, stdout) = pipe();
    let null: OwnedFd = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .unwrap()
        .into();
    for place in [&place, &neighbour] {
        let client = place.client();
        let file = sh("echo word; cat < /proc/self/fd/1").to_memfd().unwrap();
        let three = [null.as_fd(), stdout.as_fd(), null.as_fd()];
        client
            .run("vcap", file.as_fd(), Stdio::Descriptors(three), None)
            .unwrap();
        // Nobody inside reads what others have written to it.
        assert_eq!(*support::frames(&client).last().unwrap(), Status::Exited(1));
        assert_eq!(owner(&stdout), 0);
    }
    drop(stdout);
    assert_eq!(read_all(&out), "word\nword\n");
}

#[test]
fn who_changes_the_number_of_open_files_shows_nothing_of_the_host() {
    let roots = ["/sys/fs/cgroup/pids", "/sys/fs/cgroup"];
    let is_one = |root: &&str| Path::new(root).join("cgroup.procs").exists();
    let root = roots.into_iter().find(is_one).unwrap();
    let group = support::Group::new(root).unwrap();
    let place = if root.ends_with("pids") {
        Place::make(files(&[]), &[group.open("tasks")], None)
    } else {
        Place::make(files(&[]), &[], Some(group.open(".")))
    };
    // Whoever has just ended says nothing.
    let watch = "look() { is=$(cat $1/$2 2> /dev/null); [ -z \"$is\" ] && return; \
            [ \"$is\" = \"$(cat /proc/self/$2)\" ] && echo met || echo host; }; \
        while [ ! -e /tmp/enough ]; do for p in /proc/[0-9]*; do [ $p = /proc/1 ] && continue; \
            [ \"$(cat $p/comm 2> /dev/null)\" = wshd ] || continue; \
            look $p mountinfo; look $p net/dev; done; done";
    let mut watcher = place.spawn("vcap", &sh(watch));
    let init = place.client().peer_pidfd().unwrap();
    let directory = format!("{root}/ostler-wall-{}", std::process::id());
    let program = place.socket().with_file_name("wshd");
    std::fs::copy(env!("CARGO_BIN_EXE_wshd"), &program).unwrap();
    let program = program.to_str().unwrap().to_owned();
    for round in 0..400 {
        if round >= 20 && support::is_readable(&watcher.pipes.stdout) {
            break;
        }
        let number = (500 - round).to_string();
        let argv = [&program[..], "--open-files", &directory, "0", &number];
        let changed = Child::spawn(&program, &argv, &[], &[(init.as_fd(), 3)]);
        assert_eq!(changed.wait(), Status::Exited(0));
    }
    place.run_inside("touch /tmp/enough; chmod 644 /tmp/enough");
    let (said, told, _) = watcher.finish();
    assert!(
        said.contains("met") && !said.contains("host"),
        "{said}{told}"
    );
    drop(place);
}
