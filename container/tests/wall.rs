//! A real container around a root file system of one static busybox, made by the real `wshd`, without an
//! agent. Needs root. What it makes dies with it: the container by its pidfd, the files by their guard.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test, its harness included"
)]

mod support;

use container::client::Stdio;
use container::job::{JobRequest, Rlimit};
use container::launch::{Access, Bind};
use container::request::Window;
use container::status::{Status, Step};
use nix::errno::Errno;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, socket,
};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use support::{Group, Place, job, pipe, read_all, sh, wait_until};

#[test]
fn a_job_runs_as_its_user_with_its_pipes() {
    let place = Place::new();
    let script =
        "id -u; id -g; pwd; echo $HOME $USER; umask; read line; echo got $line >&2; exit 7";
    let mut run = place.spawn("vcap", &sh(script));
    run.stdin.take().unwrap().write_all(b"hello\n").unwrap();
    let (stdout, stderr, end) = run.finish();
    assert_eq!(stdout, "2000\n2000\n/home/vcap\n/home/vcap vcap\n0022\n");
    assert_eq!(stderr, "got hello\n");
    assert_eq!(end, [Status::Started { job: run.job }, Status::Exited(7)]);
}

#[test]
fn a_job_has_the_least_core_file_unless_it_asks_for_another() {
    let cores = |ours: (u64, u64), asked: Vec<Rlimit>| {
        setrlimit(Resource::RLIMIT_CORE, ours.0, ours.1).unwrap();
        let mut request = sh("grep core /proc/self/limits | tr -s ' '");
        request.rlimits = asked;
        Place::new().spawn("vcap", &request).finish().0
    };
    let core = |soft, hard| Rlimit {
        resource: Resource::RLIMIT_CORE as u32,
        soft,
        hard,
    };
    let open = Rlimit {
        resource: Resource::RLIMIT_NOFILE as u32,
        soft: 100,
        hard: 100,
    };
    let said = |soft, hard| format!("Max core file size {soft} {hard} bytes \n");
    let all = (u64::MAX, u64::MAX);
    assert_eq!(cores(all, vec![core(4096, 8192)]), said(4096, 8192));
    assert_eq!(cores(all, vec![core(0, 0)]), said(0, 0));
    for ours in [all, (0, u64::MAX)] {
        assert_eq!(cores(ours, Vec::new()), said(1, 1), "{ours:?}");
        assert_eq!(cores(ours, vec![open]), said(1, 1), "{ours:?}");
    }
    // Not even root has more than it was left where it lacks `CAP_SYS_RESOURCE`.
    setrlimit(Resource::RLIMIT_CORE, 0, 0).unwrap();
    let least = setrlimit(Resource::RLIMIT_CORE, 0, 1).map_or(0, |()| 1);
    assert_eq!(cores((0, 0), Vec::new()), said(least, least));
}

#[test]
fn every_end_comes_through_on_both_ways() {
    let place = Place::new();
    for (script, end) in [
        ("exit 0", Status::Exited(0)),
        ("exit 1", Status::Exited(1)),
        ("exit 255", Status::Exited(255)),
        ("kill -TERM $$", Status::Signaled(15)),
        ("kill -KILL $$", Status::Signaled(9)),
        ("kill -SEGV $$", Status::Signaled(11)),
        ("kill -40 $$", Status::Signaled(40)),
    ] {
        let mut run = place.spawn("vcap", &sh(script));
        let (_, _, frames) = run.finish();
        assert_eq!(frames, [Status::Started { job: run.job }, end], "{script}");
        assert_eq!(run.pipe_frames(), frames, "{script}");
    }
}

#[test]
fn what_cannot_run_says_at_which_step() {
    let place = Place::new();
    let failed = |user: &str, request: &JobRequest| {
        let mut run = place.spawn(user, request);
        let (_, _, frames) = run.finish();
        match frames[..] {
            [Status::Failed { step, errno }] => (step, Errno::from_raw(errno)),
            _ => panic!("{frames:?}"),
        }
    };
    assert_eq!(
        failed("vcap", &job(&["/nonexistent"])),
        (Step::Exec, Errno::ENOENT)
    );
    assert_eq!(
        failed("vcap", &job(&["nonexistent"])),
        (Step::Exec, Errno::ENOENT)
    );
    assert_eq!(
        failed("vcap", &job(&["/etc/passwd"])),
        (Step::Exec, Errno::EACCES)
    );
    assert_eq!(failed("nobody", &sh("exit 0")), (Step::User, Errno::ENOENT));
    // A container has 65536 users.
    let beyond = (Step::User, Errno::EOVERFLOW);
    assert_eq!(failed("70000", &sh("exit 0")), beyond);
    let in_root = JobRequest {
        cwd: Some(b"/root".to_vec()),
        ..sh("exit 0")
    };
    assert_eq!(failed("vcap", &in_root), (Step::Directory, Errno::EACCES));
    let limit = Rlimit {
        resource: 99,
        soft: 1,
        hard: 1,
    };
    let limited = JobRequest {
        rlimits: vec![limit],
        ..sh("exit 0")
    };
    assert_eq!(failed("vcap", &limited), (Step::Rlimit, Errno::EINVAL));
    assert_eq!(place.client().info().unwrap(), [], "nothing is retained");
}

#[test]
fn limits_umask_environment_and_directory_are_the_requests() {
    let place = Place::new();
    let request = JobRequest {
        env: vec![b"A=b c".to_vec(), b"PATH=/bin".to_vec()],
        cwd: Some(b"/tmp".to_vec()),
        rlimits: vec![Rlimit {
            resource: 7,
            soft: 99,
            hard: 100,
        }],
        umask: Some(0o77),
        ..sh("ulimit -Sn; ulimit -Hn; umask; pwd; env | sort")
    };
    let (stdout, _, _) = place.spawn("vcap", &request).finish();
    // The shell itself adds PWD and SHLVL.
    let wanted =
        "99\n100\n0077\n/tmp\nA=b c\nHOME=/home/vcap\nPATH=/bin\nPWD=/tmp\nSHLVL=1\nUSER=vcap\n";
    assert_eq!(stdout, wanted);
}

#[test]
fn a_job_has_nothing_of_the_host() {
    let place = Place::new();
    let script = "grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs|SigBlk|SigIgn)' /proc/self/status; \
                  ls /proc/self/fd | wc -l; env | sort; hostname; cat /proc/self/cgroup | grep -c ostler; \
                  ls /dev | tr '\\n' ' '; echo; cat /proc/1/comm; cat /proc/1/cmdline | tr '\\0' '|'";
    let (stdout, stderr, _) = place.spawn("vcap", &sh(script)).finish();
    let lines: Vec<String> = stdout
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect();
    let none = "0000000000000000";
    let expected = [
        "Uid: 2000 2000 2000 2000".to_owned(),
        "Gid: 2000 2000 2000 2000".to_owned(),
        "Groups: 33 2000".to_owned(),
        format!("SigBlk: {none}"),
        format!("SigIgn: {none}"),
        format!("CapInh: {none}"),
        format!("CapPrm: {none}"),
        format!("CapEff: {none}"),
        format!("CapBnd: {none}"),
        format!("CapAmb: {none}"),
        "NoNewPrivs: 1".to_owned(),
        // 0, 1, 2 and the directory that ls reads.
        "4".to_owned(),
        "HOME=/home/vcap".to_owned(),
        "PATH=/usr/local/bin:/usr/bin:/bin".to_owned(),
        "PWD=/home/vcap".to_owned(),
        "SHLVL=1".to_owned(),
        "USER=vcap".to_owned(),
        "wall".to_owned(),
        "0".to_owned(),
        "fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero".to_owned(),
        "wshd".to_owned(),
        format!("wshd: {}|", place.handle),
    ];
    assert_eq!(lines, expected, "{stderr}");
}

#[test]
fn root_inside_keeps_thirteen_capabilities_and_none_of_the_kernel() {
    let place = Place::new();
    let script = "grep -E '^Cap(Inh|Prm|Eff|Bnd|Amb)' /proc/self/status | tr -d '\\t\\n'; echo; \
        for try in 'echo b > /proc/sysrq-trigger' 'echo x > /proc/sys/kernel/core_pattern' \
            'mount -t tmpfs none /tmp' 'mknod /tmp/sda b 8 0' 'chmod 777 /dev/null' \
            'touch /sys/x' 'cat /proc/1/environ' 'readlink /proc/1/fd/0' 'readlink /proc/1/exe' 'umount /proc'; \
        do sh -c \"$try\" > /dev/null 2>&1 && echo \"could: $try\"; done; \
        cat /proc/kcore /proc/timer_list 2> /dev/null | wc -c; chown 5 /tmp && ls -ldn /tmp | cut -c1-10; \
        cut -d' ' -f2 /proc/mounts | grep -v '^/\\(proc\\|sys\\|dev\\)' | sort | uniq | tr '\\n' ' '";
    let (stdout, stderr, _) = place.spawn("", &sh(script)).finish();
    let kept = "00000000a80405fb";
    let caps = format!(
        "CapInh:0000000000000000CapPrm:{kept}CapEff:{kept}CapBnd:{kept}CapAmb:0000000000000000"
    );
    let expected = [&caps[..], "0", "drwxrwxrwt", "/ /bound "];
    assert_eq!(stdout.lines().collect::<Vec<_>>(), expected, "{stderr}");
    // A bind mount names its source; nothing else names a path of the host.
    let mounts = place.run_inside("grep -v ' /bound ' /proc/self/mountinfo; cat /proc/net/unix");
    assert!(!mounts.contains(place.handle.as_str()), "{mounts}");
}

#[test]
fn everybody_inside_is_a_stranger_on_the_host() {
    let files = support::files();
    let stack = files.dir.join("stack");
    let as_built: Vec<_> = ["etc/passwd", "home/vcap"]
        .map(|path| owner(&stack.join(path)))
        .into();
    let place = Place::make(files, &[], None);
    let first = support::IDS.first;
    let status = std::fs::read_to_string(format!("/proc/{}/status", place.pid)).unwrap();
    for ids in ["Uid", "Gid"] {
        let line = format!("{ids}:\t{first}\t{first}\t{first}\t{first}\n");
        assert!(status.contains(&line), "the init itself: {status}");
    }
    // What jobs of root have, and SYS_RESOURCE.
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert!(
            status.contains(&format!("{set}:\t00000000a90405fb\n")),
            "{status}"
        );
    }
    assert!(status.contains("NoNewPrivs:\t1\n"));
    let user = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/user")).unwrap();
    assert_ne!(user(&place.pid.to_string()), user("self"));
    // Owners of the layers show as they were built, and what is written is nobody's on the host.
    let script = "stat -c %u:%g /etc/passwd /home/vcap; echo x >> /etc/passwd; \
                  touch /root/new; chown 2000:33 /root/new; stat -c %u:%g /root/new /proc/1 /dev /dev/shm; \
                  cat /proc/self/uid_map | tr -s ' '";
    let seen = place.run_inside(script);
    let inside = "0:0\n2000:2000\n2000:33\n0:0\n0:0\n0:0\n";
    assert_eq!(seen, format!("{inside} 0 {first} 65536\n"));
    let upper = place.dir.join("upper");
    assert_eq!(owner(&upper.join("etc/passwd")), (first, first));
    assert_eq!(owner(&upper.join("root/new")), (first + 2000, first + 33));
    for (path, before) in ["etc/passwd", "home/vcap"].iter().zip(as_built) {
        assert_eq!(owner(&stack.join(path)), before, "the stack is untouched");
    }
    let hostname = "hostname elsewhere 2>&1; hostname";
    assert!(
        place.run_inside(hostname).ends_with("wall\n"),
        "no CAP_SYS_ADMIN for jobs"
    );
}

fn owner(path: &Path) -> (u32, u32) {
    let metadata = std::fs::symlink_metadata(path).unwrap();
    (
        std::os::unix::fs::MetadataExt::uid(&metadata),
        std::os::unix::fs::MetadataExt::gid(&metadata),
    )
}

#[test]
fn a_layer_that_cannot_be_mapped_is_named() {
    let mut files = support::files();
    // A proc file system, as one that has no owners to map.
    files.launch.lowers.insert(0, "/proc/sys".into());
    let told = support::try_make(&files);
    assert_eq!(told, "mount_setattr(/proc/sys): EINVAL");
}

#[test]
fn the_root_is_layered_and_bind_mounts_stay_inside() {
    let mut files = support::files();
    let (dir, stack) = (files.dir.clone(), files.dir.join("stack"));
    std::fs::create_dir_all(dir.join("data")).unwrap();
    // What is bound keeps its owners, and only this one is the container's.
    std::os::unix::fs::chown(dir.join("data"), Some(support::IDS.first), None).unwrap();
    std::fs::write(dir.join("file"), "from the host\n").unwrap();
    std::os::unix::fs::symlink("/etc", stack.join("link")).unwrap();
    for (source, target, access) in [
        ("data", "/made/here", Access::ReadWrite),
        ("file", "/link/file", Access::ReadOnly),
    ] {
        let (source, target) = (dir.join(source), target.into());
        files.launch.binds.push(Bind {
            source,
            target,
            access,
        });
    }
    let place = Place::make(files, &[], None);
    let script = "cat /layer; echo; echo new > /made/here/x; echo lost > /bound/x; \
                  cat /etc/file; echo more > /etc/file; echo changed > /etc/passwd; \
                  grep -c size=1024k /proc/mounts; head -1 /etc/passwd";
    let (stdout, stderr, _) = place.spawn("", &sh(script)).finish();
    assert_eq!(stdout, "top\nfrom the host\n1\nchanged\n", "{stderr}");
    assert_eq!(
        stderr.matches("Read-only file system").count(),
        2,
        "{stderr}"
    );
    let read = |path: &str| std::fs::read_to_string(dir.join(path)).unwrap();
    assert_eq!(
        (read("data/x"), read("upper/etc/passwd")),
        ("new\n".into(), "changed\n".into())
    );
    assert!(
        read("stack/etc/passwd").starts_with("root:"),
        "the stack is never written"
    );

    let mut files = support::files();
    let (source, target) = (files.dir.join("run"), "/trap/x".into());
    let stack = files.dir.join("stack");
    std::os::unix::fs::symlink(files.dir.join("root"), stack.join("trap")).unwrap();
    files.launch.binds.push(Bind {
        source,
        target,
        access: Access::ReadWrite,
    });
    let told = support::try_make(&files);
    assert!(
        told.starts_with("create(trap): EEXIST"),
        "a dangling link is nobody's way out: {told}"
    );
}

#[test]
fn the_init_is_nobodys_child_and_holds_nothing_of_the_host() {
    let place = Place::new();
    let ours = std::process::id().cast_signed();
    let mut ancestors = vec![support::parent(ours)];
    while let Some(last) = ancestors.last().copied().filter(|pid| *pid > 1) {
        ancestors.push(support::parent(last));
    }
    assert!(ancestors.contains(&support::parent(place.pid)) || support::parent(place.pid) == 1);
    let proc = |name: &str| std::fs::read(format!("/proc/{}/{name}", place.pid)).unwrap();
    assert_eq!(proc("comm"), b"wshd\n");
    assert_eq!(
        proc("cmdline"),
        format!("wshd: {}\0", place.handle).into_bytes()
    );
    assert_eq!(proc("environ"), b"");
    let mut links: Vec<String> = std::fs::read_dir(format!("/proc/{}/fd", place.pid))
        .unwrap()
        .map(|entry| {
            std::fs::read_link(entry.unwrap().path())
                .unwrap()
                .display()
                .to_string()
        })
        .map(|link| link.split('[').next().unwrap().to_owned())
        .collect();
    links.sort();
    // The eventfd-like one is the signalfd; the socket is the listener.
    let null = "/dev/null";
    assert_eq!(links, [null, null, null, "anon_inode:", "socket:"]);
    let own = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!own.contains(&place.handle) && !own.contains(place.dir.to_str().unwrap()));
    let mode = std::fs::metadata(place.socket()).unwrap();
    assert_eq!(
        std::os::unix::fs::PermissionsExt::mode(&mode.permissions()) & 0o777,
        0o600
    );
}

#[test]
fn the_init_joins_its_control_groups() {
    let (v1, v2) = (
        Group::new("/sys/fs/cgroup/pids"),
        Group::new("/sys/fs/cgroup/unified"),
    );
    let files = support::files();
    let tasks = v1.as_ref().map(|group| group.open("tasks"));
    let place = Place::make(
        files,
        tasks.as_slice(),
        v2.as_ref().map(|group| group.open(".")),
    );
    for (group, line) in [(&v1, ":pids:/"), (&v2, "0::/")] {
        let Some(group) = group else { continue };
        assert_eq!(group.members(), [place.pid], "{line}");
        // Its own namespace: the group is the root of all that it sees.
        let seen = place.run_inside("cat /proc/self/cgroup");
        assert!(seen.lines().any(|seen| seen.ends_with(line)), "{seen}");
    }
    drop(place);
}

#[test]
fn the_init_is_its_sockets_peer() {
    let place = Place::new();
    let pidfd = place.client().peer_pidfd().unwrap();
    assert_eq!(
        container::sys::pidfd::pid_of(&pidfd).unwrap(),
        Some(place.pid)
    );
}

fn stranger(place: &Place) -> OwnedFd {
    let kind = SockType::SeqPacket;
    let fd = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None).unwrap();
    connect(fd.as_raw_fd(), &UnixAddr::new(&place.socket()).unwrap()).unwrap();
    fd
}

#[test]
fn silent_and_lying_clients_harm_nobody() {
    let place = Place::new();
    // More than the init keeps: the oldest must go, and nobody waits for them.
    let silent: Vec<OwnedFd> = (0..100).map(|_| stranger(&place)).collect();
    let refused = Status::Failed {
        step: Step::Request,
        errno: Errno::EINVAL as i32,
    };
    let good = container::request::Request::Signal { job: 0, signal: 0 }.encode();
    let mut packets = vec![
        b"x".to_vec(),
        vec![0; 9656],
        vec![0xff; 70_000],
        b"OSTL".to_vec(),
    ];
    packets.extend(
        (9..good.len())
            .map(|end| good[..end].to_vec())
            .filter(|cut| container::request::Request::decode(cut).is_err()),
    );
    // A run without descriptors, and an attach without a pipe to nothing.
    let io = container::request::Io::Descriptors;
    packets.push(
        container::request::Request::Run {
            user: b"vcap".to_vec(),
            io,
        }
        .encode(),
    );
    for packet in packets {
        let liar = stranger(&place);
        send(liar.as_raw_fd(), &packet, MsgFlags::empty()).unwrap();
        let mut answer = [0; 64];
        assert_eq!(
            recv(liar.as_raw_fd(), &mut answer, MsgFlags::empty()),
            Ok(Status::SIZE)
        );
        assert_eq!(answer[..8], refused.encode(), "{} bytes", packet.len());
    }
    let (reader, _writer) = pipe();
    let not_a_job = place.client();
    let three = [reader.as_fd(); 3];
    not_a_job
        .run("vcap", reader.as_fd(), Stdio::Descriptors(three), None)
        .unwrap();
    let answer = not_a_job.read_status().unwrap().unwrap().status;
    assert!(
        matches!(
            answer,
            Status::Failed {
                step: Step::Request,
                ..
            }
        ),
        "{answer:?}"
    );
    let (_, _, frames) = place.spawn("vcap", &sh("exit 3")).finish();
    assert_eq!(frames.last(), Some(&Status::Exited(3)));
    drop(silent);
}

#[test]
fn the_standard_streams_can_be_reopened() {
    let place = Place::new();
    let script = "echo one > /dev/stdout; echo two > /dev/stderr; echo three > /proc/self/fd/1; \
                  cat < /dev/stdin";
    let mut run = place.spawn("vcap", &sh(script));
    run.stdin.take().unwrap().write_all(b"four\n").unwrap();
    let (stdout, stderr, _) = run.finish();
    assert_eq!(
        (stdout.as_str(), stderr.as_str()),
        ("one\nthree\nfour\n", "two\n")
    );
}

#[test]
fn a_directory_is_no_descriptor_for_a_job_and_the_hosts_null_device_becomes_its_own() {
    let place = Place::new();
    let run = |stdin: &std::fs::File| {
        let (reader, writer) = pipe();
        let client = place.client();
        let file = sh("stat -c %m- /proc/self/fd/0; stat -L -c '%t %T' /proc/self/fd/0")
            .to_memfd()
            .unwrap();
        let three = [stdin.as_fd(), writer.as_fd(), writer.as_fd()];
        client
            .run("vcap", file.as_fd(), Stdio::Descriptors(three), None)
            .unwrap();
        drop(writer);
        (support::frames(&client), read_all(&reader))
    };
    let (frames, _) = run(&std::fs::File::open("/").unwrap());
    let errno = Errno::EISDIR as i32;
    assert_eq!(
        frames,
        [Status::Failed {
            step: Step::Descriptors,
            errno
        }]
    );
    let null = std::fs::File::open("/dev/null").unwrap();
    let (_, text) = run(&null);
    assert!(text.ends_with("1 3\n"), "{text}");
}

#[test]
fn a_supervised_job_outlives_its_supervisor_and_is_taken_over() {
    let place = Place::new();
    let script = "echo one; read go < /tmp/go; echo two; echo err >&2; exit 9";
    place.run_inside("mkfifo -m 666 /tmp/go");
    let request = JobRequest {
        job: 1,
        keep_readers: true,
        ..sh(script)
    };
    let mut run = place.spawn("vcap", &request);
    assert_eq!(run.next_frame(), Some(Status::Started { job: 1 }));
    let mut line = [0; 4];
    std::fs::File::from(run.pipes.stdout.try_clone().unwrap())
        .read_exact(&mut line)
        .unwrap();
    drop(run);
    let taken = place.spawn("vcap", &request).finish().2;
    let errno = Errno::EEXIST as i32;
    assert_eq!(
        taken,
        [Status::Failed {
            step: Step::Request,
            errno
        }]
    );
    assert_eq!(place.client().forget(1).unwrap_err().errno, Errno::EBUSY);

    let (status, theirs) = pipe();
    let (stdout, stderr) = place.client().attach(1, theirs.as_fd()).unwrap();
    drop(theirs);
    place.run_inside("echo > /tmp/go");
    assert_eq!(
        support::pipe_frames(&status, 2),
        [Status::Started { job: 1 }, Status::Exited(9)]
    );
    assert_eq!(
        (read_all(&stdout), read_all(&stderr)),
        ("two\n".to_owned(), "err\n".to_owned())
    );

    // Once more, after the end: the status is retained until it is forgotten.
    let (status, theirs) = pipe();
    place.client().attach(1, theirs.as_fd()).unwrap();
    assert_eq!(
        support::pipe_frames(&status, 2),
        [Status::Started { job: 1 }, Status::Exited(9)]
    );
    let known = place.client().info().unwrap();
    assert_eq!(
        (known[0].job, known[0].status),
        (1, Some(Status::Exited(9)))
    );
    place.client().forget(1).unwrap();
    assert_eq!(place.client().forget(1).unwrap_err().errno, Errno::ENOENT);
    let again = place.client().attach(1, theirs.as_fd());
    assert_eq!(again.unwrap_err().errno, Errno::ENOENT);
}

#[test]
fn a_job_whose_supervisor_is_gone_never_begins() {
    let place = Place::new();
    place.run_inside("mkdir -m 777 /tmp/ran");
    let ask = |job: u32, status: &OwnedFd| {
        let ((stdin, _in), (_out, stdout), (_err, stderr)) = (pipe(), pipe(), pipe());
        let request = JobRequest {
            job,
            ..sh("touch /tmp/ran/$$")
        };
        let file = request.to_memfd().unwrap();
        let three = [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()];
        let client = place.client();
        let stdio = Stdio::Descriptors(three);
        client
            .run("vcap", file.as_fd(), stdio, Some(status.as_fd()))
            .unwrap();
        support::frames(&client)
    };
    let refused = [Status::Failed {
        step: Step::Request,
        errno: Errno::EPIPE as i32,
    }];
    // The supervisor was killed before the request came.
    let (status, theirs) = pipe();
    drop(status);
    assert_eq!(ask(1, &theirs), refused);
    // A takeover has been told that there is no such job: it has written the end.
    let (_status, theirs) = pipe();
    let told = place.client().attach(2, theirs.as_fd()).unwrap_err().errno;
    assert_eq!(told, Errno::ENOENT);
    assert_eq!(ask(2, &theirs), refused);
    assert_eq!(place.client().info().unwrap(), [], "nothing is retained");
    assert_eq!(place.run_inside("ls /tmp/ran"), "");
    assert_eq!(ask(3, &theirs).last(), Some(&Status::Exited(0)));
}

#[test]
fn signals_go_to_a_job_or_to_everybody() {
    let place = Place::new();
    let spawn = |script: &str| {
        let mut run = place.spawn("vcap", &sh(script));
        let mut ready = [0; 1];
        std::fs::File::from(run.pipes.stdout.try_clone().unwrap())
            .read_exact(&mut ready)
            .unwrap();
        assert!(matches!(run.next_frame(), Some(Status::Started { .. })));
        run
    };
    let mut one = spawn("trap 'exit 5' TERM; echo; while :; do sleep 1; done");
    let mut two = spawn("trap 'exit 6' TERM; echo; while :; do sleep 1; done");
    place.client().signal(one.job, 15).unwrap();
    assert_eq!(one.next_frame(), Some(Status::Exited(5)));
    assert_eq!(
        place.client().signal(one.job, 15).unwrap_err().errno,
        Errno::ENOENT
    );
    assert_eq!(
        place.client().signal(two.job, 999).unwrap_err().errno,
        Errno::EINVAL
    );
    place.client().signal(0, 15).unwrap();
    assert_eq!(two.next_frame(), Some(Status::Exited(6)));
    wait_until("everybody is gone", || {
        place
            .client()
            .signal(0, 0)
            .is_err_and(|error| error.errno == Errno::ESRCH)
    });
    // TERM, and KILL from inside, do nothing to the init.
    assert_eq!(
        place.run_inside("kill -9 1; kill -TERM 1; echo lives"),
        "lives\n"
    );
}

#[test]
fn orphans_are_reaped() {
    let place = Place::new();
    let out = place.run_inside("for i in 1 2 3; do (sleep 0 &) ; done; echo ok");
    assert_eq!(out, "ok\n");
    wait_until("no zombie is left", || {
        place
            .run_inside("ps -o stat,comm | grep -c '^Z' || :")
            .trim()
            == "0"
    });
}

#[test]
fn a_terminal_job_controls_its_terminal() {
    let place = Place::new();
    let client = place.client();
    let script = "stty size; tty; ls -ln $(tty) | tr -s ' ' | cut -d' ' -f1,3; read line; stty size; \
                  echo out:$line > /dev/tty; echo err >&2; exit 4";
    let file = sh(script).to_memfd().unwrap();
    let window = Window {
        rows: 33,
        columns: 77,
    };
    client
        .run("vcap", file.as_fd(), Stdio::Terminal(window), None)
        .unwrap();
    let report = client.read_status().unwrap().unwrap();
    assert!(
        matches!(report.status, Status::Started { .. }),
        "{:?}",
        report.status
    );
    let master = report.terminal.unwrap();
    let mut copy = std::fs::File::from(master.try_clone().unwrap());
    let mut text = String::new();
    let mut buffer = [0; 256];
    while !text.contains("crw") || !text.ends_with("2000\r\n") {
        let read = copy.read(&mut buffer).unwrap();
        text.push_str(std::str::from_utf8(&buffer[..read]).unwrap());
    }
    assert_eq!(text, "33 77\r\n/dev/pts/0\r\ncrw------- 2000\r\n");
    container::sys::terminal::resize(
        &master,
        Window {
            rows: 10,
            columns: 20,
        },
    )
    .unwrap();
    copy.write_all(b"word\n").unwrap();
    assert_eq!(
        client.read_status().unwrap().unwrap().status,
        Status::Exited(4)
    );
    let mut rest = Vec::new();
    // The slave's last close ends the reading with EIO.
    let _ = copy.read_to_end(&mut rest);
    assert_eq!(
        String::from_utf8(rest).unwrap(),
        "word\r\n10 20\r\nout:word\r\nerr\r\n"
    );
}

#[test]
fn wsh_passes_streams_and_exit_codes() {
    let place = Place::new();
    let (code, out, err) = place.wsh(
        &["--user", "vcap", "sh", "-c", "cat; id -un; exit 42"],
        b"in\n",
    );
    assert_eq!((code, out.as_str(), err.as_str()), (42, "in\nvcap\n", ""));
    assert_eq!(place.wsh(&["sh", "-c", "kill -9 $$"], b"").0, 137);
    let (code, _, err) = place.wsh(&["nonexistent"], b"");
    let line = "wsh: nonexistent as 'root': cannot execute the program: ENOENT: No such file or directory\n";
    assert_eq!((code, err.as_str()), (127, line));
    assert_eq!(place.wsh(&["--user", "nobody", "true"], b"").0, 125);
    assert_eq!(place.wsh(&[], b"echo from a shell; exit 3").0, 3);
}

#[test]
fn wsh_passes_a_persons_signals() {
    let place = Place::new();
    let script = "trap 'echo caught; exit 8' TERM; echo ready; while :; do sleep 1; done";
    let mut wsh = place.start_wsh(&["--user", "vcap", "sh", "-c", script], &[]);
    wsh.read_line("ready");
    wsh.signal(15);
    wsh.read_line("caught");
    assert_eq!(wsh.wait(), Status::Exited(8));
}

#[test]
fn a_killed_wsh_loses_no_status_and_a_lone_one_ends() {
    let place = Place::new();
    place.run_inside("mkfifo -m 666 /tmp/go");
    let request = JobRequest {
        job: 7,
        ..sh("echo ready; read x < /tmp/go; exit 77")
    };
    let (status, theirs) = pipe();
    let file = request.to_memfd().unwrap();
    let given = [
        ("WSH_JOB_FD", file.as_fd()),
        ("WSH_STATUS_FD", theirs.as_fd()),
    ];
    let mut wsh = place.start_wsh(&["--user", "vcap", "/bin/bash"], &given);
    wsh.read_line("ready");
    wsh.signal(9);
    assert_eq!(wsh.wait(), Status::Signaled(9));
    drop(theirs);
    place.run_inside("echo > /tmp/go");
    assert_eq!(
        support::pipe_frames(&status, 2),
        [Status::Started { job: 7 }, Status::Exited(77)]
    );

    let (status, theirs) = pipe();
    let file = sh("echo ready; sleep 60").to_memfd().unwrap();
    let given = [
        ("WSH_JOB_FD", file.as_fd()),
        ("WSH_STATUS_FD", theirs.as_fd()),
    ];
    let mut wsh = place.start_wsh(&["--user", "vcap", "/bin/bash"], &given);
    drop(theirs);
    wsh.read_line("ready");
    drop(status);
    assert_eq!(wsh.wait(), Status::Exited(125), "its supervisor is gone");
}

#[test]
fn wsh_gives_a_stopped_init_up_and_its_job_never_begins() {
    let place = Place::new();
    place.run_inside("mkdir -m 777 /tmp/ran");
    place.signal(19);
    let touch = ["--user", "vcap", "touch", "/tmp/ran/file"];
    // While one that began earlier has not given up yet; where it has, the machine stood still.
    let mut scenes = (0..10).filter_map(|_| {
        let given_up = place.start_wsh(&touch, &[]);
        let interrupted = place.start_wsh(&touch, &[]);
        let in_terminal = place.start_wsh_in_terminal([true; 3], "touch /tmp/ran/file");
        for wsh in [&interrupted.child, &in_terminal.wsh] {
            wait_until("signals are the job's", || wsh.blocks_term());
            wsh.signal(15);
        }
        let ends = [interrupted.wait(), in_terminal.watch(|_| None).1];
        (!given_up.child.has_ended()).then_some((given_up, ends))
    });
    let (given_up, ends) = scenes.next().expect("before the deadline");
    assert_eq!(ends, [Status::Exited(128 + 15); 2]);
    assert_eq!(given_up.wait(), Status::Exited(125));
    // No end of file: its request is still on the way, with a copy of the pipe.
    let mut buffer = [0; 1024];
    let read = nix::unistd::read(&given_up.stderr, &mut buffer).unwrap();
    let told = String::from_utf8_lossy(&buffer[..read]);
    assert!(told.contains("5 s") && told.contains("ETIMEDOUT"), "{told}");
    place.signal(18);
    assert_eq!(place.run_inside("ls /tmp/ran"), "");
}

#[test]
fn wsh_in_a_terminal_is_transparent() {
    let place = Place::new();
    let terminal = [true, true, true];
    let text = place.wsh_in_terminal(
        terminal,
        "stty size; echo $TERM; trap 'exit 12' INT; echo wait; while :; do sleep 1; done",
        |seen| {
            // Ctrl-C is the job's.
            seen.contains("wait\r\n").then_some(&b"\x03"[..])
        },
    );
    assert!(text.0.starts_with("41 101\r\ndumb\r\nwait\r\n"), "{text:?}");
    assert_eq!(text.1, Status::Exited(12));
}

#[test]
fn a_job_does_not_get_the_persons_terminal() {
    let place = Place::new();
    let script = "test -t 1 && echo has it; echo out; echo err >&2; exit 2";
    let (seen, end) = place.wsh_in_terminal([false, true, true], script, |_| None);
    assert_eq!(end, Status::Exited(2));
    let mut lines: Vec<&str> = seen.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["err", "out"]);
}

#[test]
fn a_job_with_a_piped_output_reads_what_is_typed_and_has_no_terminal() {
    let place = Place::new();
    let script = "test -t 0 && echo has it >&2; echo ready >&2; cat >&2; echo end >&2; exit 6";
    let (seen, end) = place.wsh_in_terminal([true, false, true], script, |seen| {
        // Two lines, and the key for the end of all input.
        seen.contains("ready\r\n").then_some(&b"one\ntwo\n\x04"[..])
    });
    assert_eq!(end, Status::Exited(6), "{seen}");
    let typed = |line: &str| seen.lines().filter(|seen| *seen == line).count();
    // Once from the terminal that shows what is typed, once from the job.
    let counts = ["has it", "one", "two", "end"].map(typed);
    assert_eq!(counts, [0, 2, 2, 1], "{seen}");
}

#[test]
fn wsh_gives_variables_a_directory_and_limits() {
    let place = Place::new();
    let options = [
        "--env",
        "A=b c",
        "--env",
        "TERM=own",
        "--dir",
        "/tmp",
        "--rlimit",
        "nofile=50:60",
    ];
    let script = "echo $A $TERM; pwd; ulimit -Sn; ulimit -Hn";
    let said = place.wsh(&[&options[..], &["sh", "-c", script]].concat(), b"");
    let wanted = (0, "b c own\n/tmp\n50\n60\n".to_owned(), String::new());
    assert_eq!(said, wanted);
    let (code, _, err) = place.wsh(&["--dir", "/nowhere", "true"], b"");
    assert_eq!(code, 125);
    assert!(
        err.contains("cannot enter") && err.contains("ENOENT"),
        "{err}"
    );
}

#[test]
fn a_large_input_is_delivered_whole_with_its_end() {
    const SIZE: usize = 8 << 20;
    let place = Place::new();
    let input: Vec<u8> = (0..=250_u8).cycle().take(SIZE).collect();
    let (code, out, err) = place.wsh(
        &["--user", "vcap", "sh", "-c", "md5sum; cat; echo end"],
        &input,
    );
    let file = support::file_with(&place, &input);
    let sum = support::output("/usr/bin/busybox", &["md5sum", file.to_str().unwrap()]).1;
    let expected = format!("{}  -\nend\n", sum.split(' ').next().unwrap());
    assert_eq!((code, out, err), (0, expected, String::new()));
}

#[test]
fn a_hundred_jobs_of_two_users_run_side_by_side() {
    const JOBS: usize = 100;
    let place = Place::new();
    let mut jobs: Vec<_> = (0..JOBS)
        .map(|number| {
            let script = format!("id -u; read line; echo $line; exit {number}");
            place.spawn(["vcap", "root"][number % 2], &sh(&script))
        })
        .collect();
    for job in &mut jobs {
        assert!(matches!(job.next_frame(), Some(Status::Started { .. })));
    }
    let mut numbers: Vec<u32> = place
        .client()
        .info()
        .unwrap()
        .iter()
        .map(|job| job.job)
        .collect();
    numbers.dedup();
    assert_eq!(numbers.len(), JOBS, "each has a number of its own");
    // One that is ended by its number harms no other.
    place.client().signal(jobs[7].job, 9).unwrap();
    for (number, mut job) in jobs.into_iter().enumerate() {
        let line = format!("line {number}\n");
        let mut stdin = job.stdin.take().unwrap();
        // The one that was ended reads no more.
        let _ = stdin.write_all(line.as_bytes());
        drop(stdin);
        let (stdout, stderr, frames) = job.finish();
        let uid = [2000, 0][number % 2];
        let (wanted, end) = if number == 7 {
            (format!("{uid}\n"), Status::Signaled(9))
        } else {
            (
                format!("{uid}\n{line}"),
                Status::Exited(number.try_into().unwrap()),
            )
        };
        // A job that was ended at once may not have said who it is.
        assert!(number == 7 || stdout == wanted, "{stdout} {stderr}");
        assert_eq!(frames, [end], "{number}");
    }
    assert_eq!(place.client().info().unwrap(), []);
}

#[test]
fn wsh_does_not_wait_for_what_a_job_leaves_behind() {
    let place = Place::new();
    let script = "trap '' HUP; busybox yes & exit 3";
    for terminal in [[true, true, true], [false, true, true]] {
        let (_, end) = place.wsh_in_terminal(terminal, script, |_| None);
        assert_eq!(end, Status::Exited(3), "{terminal:?}");
    }
}

/// Leaves 60 KiB in its pipe, and one who fills it up.
const FULL_PIPE: &str =
    "touch /tmp/began; head -c 60000 /dev/zero | tr '\\0' a; echo the end; busybox yes & exit 3";

fn wait_for_the_end(place: &Place) {
    let began = place.dir.join("upper/tmp/began");
    wait_until("the job ended", || {
        began.exists() && place.client().info().unwrap().is_empty()
    });
}

#[test]
fn what_a_job_had_written_when_it_ended_is_printed() {
    let place = Place::new();
    let screen = place.start_wsh_in_terminal([false, true, true], FULL_PIPE);
    // Nobody reads the terminal, so the most of it is in the pipe when the job ends.
    wait_for_the_end(&place);
    let (seen, end) = screen.watch(|_| None);
    assert_eq!(end, Status::Exited(3));
    let (job, _) = seen.split_once("the end").expect("it is whole");
    assert_eq!(job.len(), 60_000);
}

#[test]
fn wsh_heeds_signals_once_its_job_has_ended() {
    let place = Place::new();
    let screen = place.start_wsh_in_terminal([false, true, true], FULL_PIPE);
    wait_for_the_end(&place);
    // Until it has heard of the end; then it stands before a terminal that nobody reads.
    wait_until("signals are let through", || {
        let blocked = screen.wsh.blocks_term();
        if blocked {
            screen.read();
        }
        !blocked
    });
    screen.wsh.signal(15);
    assert_eq!(screen.wsh.wait(), Status::Signaled(15));
}

#[test]
fn failures_of_the_making_are_told_and_leave_nothing() {
    let mut launch = support::files();
    launch.launch.lowers = vec!["/nonexistent".into()];
    assert_eq!(support::try_make(&launch), "open(/nonexistent): ENOENT");
    let mut launch = support::files();
    launch.launch.binds.push(Bind {
        source: "/nonexistent-source".into(),
        target: "/x".into(),
        access: Access::ReadOnly,
    });
    assert_eq!(
        support::try_make(&launch),
        "open(/nonexistent-source): ENOENT"
    );
    support::hang_up_before_go(&support::files());
}

#[test]
fn the_programs_teach_a_person() {
    for (program, word) in [
        (env!("CARGO_BIN_EXE_wsh"), "--socket"),
        (env!("CARGO_BIN_EXE_wshd"), "init"),
    ] {
        let (code, out) = support::output(program, &["--help"]);
        assert!(code == Status::Exited(0) && out.contains(word), "{out}");
    }
}
