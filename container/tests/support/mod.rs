//! The harness of `wall.rs`: a root file system, a container in it, jobs in that, and programs beside it.

use container::client::{Client, Stdio};
use container::job::JobRequest;
use container::launch::{
    Access, Bind, CONTROL_FD, Event, FIRST_GROUP_FD, GO, Ids, LAUNCH_FD, Launch,
};
use container::status::Status;
use container::sys::{fdpass, pidfd};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{Winsize, openpty};
use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, posix_spawn};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, socketpair};
use nix::sys::termios::Termios;
use nix::unistd::pipe2;
use std::ffi::CString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// One generous limit for every wait.
const DEADLINE: u16 = 60_000;

const APPLETS: [&str; 32] = [
    "cat", "chmod", "chown", "cut", "echo", "env", "grep", "head", "hostname", "id", "kill", "ls",
    "md5sum", "mkfifo", "mknod", "mount", "ps", "pwd", "readlink", "sed", "sh", "sleep", "sort",
    "stat", "stty", "touch", "tr", "true", "tty", "umount", "uniq", "wc",
];

/// The users of every container here: they meet in no file.
pub(crate) const IDS: Ids = Ids { first: 0x6fff_0000 };

/// The directories of a container, and what it is to be made of.
pub(crate) struct Files {
    pub(crate) dir: PathBuf,
    pub(crate) launch: Launch,
    /// What makes the container.
    pub(crate) wshd: PathBuf,
    /// Measures that are left out, as arguments of `wshd`.
    pub(crate) without: Vec<&'static str>,
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

pub(crate) fn files() -> Files {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let handle = format!("w{:06}t{number:03}", std::process::id() % 1_000_000);
    let dir = std::env::temp_dir().join(format!("ostler-wall-{handle}"));
    for part in ["to,p:x", "upper", "work", "root", "run"] {
        std::fs::create_dir_all(dir.join(part)).unwrap();
    }
    std::fs::write(dir.join("to,p:x/layer"), "top").unwrap();
    chown(dir.join("upper"), Some(IDS.first), Some(IDS.first)).unwrap();
    let stack = dir.join("stack");
    make_stack(&stack);
    let bind = |source: &str, target: &str, access| Bind {
        source: dir.join(source),
        target: target.into(),
        access,
    };
    let launch = Launch {
        handle,
        ids: IDS,
        hostname: "wall".to_owned(),
        root: dir.join("root"),
        lowers: vec![dir.join("to,p:x"), stack],
        upper: dir.join("upper"),
        work: dir.join("work"),
        socket: dir.join("run/wshd.sock"),
        binds: vec![bind("run", "/bound", Access::ReadOnly)],
        network: None,
        tmpfs_bytes: 1 << 20,
        v1_tasks: 0,
        disk: false,
        v2_dir: false,
    };
    Files {
        dir,
        launch,
        wshd: env!("CARGO_BIN_EXE_wshd").into(),
        without: Vec::new(),
    }
}

/// The root file system: one program under many names, and two users.
fn make_stack(stack: &Path) {
    for part in ["bin", "etc", "home/vcap", "root", "tmp", "bound"] {
        std::fs::create_dir_all(stack.join(part)).unwrap();
    }
    std::fs::copy("/usr/bin/busybox", stack.join("bin/busybox")).expect("busybox-static is needed");
    for applet in APPLETS {
        symlink("busybox", stack.join("bin").join(applet)).unwrap();
    }
    let mode = |path: &str, mode| {
        std::fs::set_permissions(stack.join(path), PermissionsExt::from_mode(mode)).unwrap();
    };
    let passwd = "root:x:0:0::/root:/bin/sh\nvcap:x:2000:2000::/home/vcap:/bin/sh\n";
    std::fs::write(stack.join("etc/passwd"), passwd).unwrap();
    std::fs::write(stack.join("etc/group"), "web:x:33:vcap\nvcap:x:2000:\n").unwrap();
    chown(stack.join("home/vcap"), Some(2000), Some(2000)).unwrap();
    mode("tmp", 0o1777);
    mode("root", 0o700);
}

/// A control group of this test's own.
pub(crate) struct Group(PathBuf);

impl Drop for Group {
    fn drop(&mut self) {
        // Busy until the last of its dead is released.
        wait_until("the group is empty", || {
            std::fs::remove_dir(&self.0).is_ok()
        });
    }
}

impl Group {
    /// `None` where there is no such hierarchy.
    pub(crate) fn new(hierarchy: &str) -> Option<Self> {
        let path = Path::new(hierarchy).join(format!("ostler-wall-{}", std::process::id()));
        std::fs::create_dir(&path).ok().map(|()| Self(path))
    }

    pub(crate) fn open(&self, file: &str) -> OwnedFd {
        let path = self.0.join(file);
        let options = File::options()
            .write(!path.is_dir())
            .read(path.is_dir())
            .open(path);
        options.unwrap().into()
    }

    pub(crate) fn members(&self) -> Vec<i32> {
        let procs = std::fs::read_to_string(self.0.join("cgroup.procs")).unwrap();
        procs.lines().map(|pid| pid.parse().unwrap()).collect()
    }
}

/// A container that serves.
pub(crate) struct Place {
    pub(crate) handle: String,
    pub(crate) dir: PathBuf,
    /// On the host.
    pub(crate) pid: i32,
    files: Files,
    pidfd: OwnedFd,
}

impl Drop for Place {
    fn drop(&mut self) {
        // The pid namespace goes with its init; the pidfd turns readable when it is dead.
        let _ = pidfd::send_signal(&self.pidfd, 9);
        let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut fds, DEADLINE);
    }
}

impl Place {
    pub(crate) fn new() -> Self {
        Self::make(files(), &[], None)
    }

    pub(crate) fn make(mut files: Files, tasks: &[OwnedFd], group: Option<OwnedFd>) -> Self {
        files.launch.v1_tasks = tasks.len().try_into().unwrap();
        files.launch.v2_dir = group.is_some();
        let groups: Vec<BorrowedFd<'_>> = tasks.iter().chain(&group).map(AsFd::as_fd).collect();
        let (control, launcher) = start(&files, &groups);
        let (event, fds) = heard(&control);
        assert_eq!(event, Event::Cloned);
        let [pidfd, netns] = <[OwnedFd; 2]>::try_from(fds).unwrap();
        let pid = pidfd::pid_of(&pidfd).unwrap().unwrap();
        let theirs = std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
        let ours = std::fs::read_link(format!("/proc/self/fd/{}", netns.as_raw_fd())).unwrap();
        assert_eq!(theirs, ours);
        assert_eq!(launcher.wait(), Status::Exited(0), "the launcher ends");
        if files.launch.network.is_some() {
            wire(pid);
        }
        fdpass::send(&control, GO, &[], MsgFlags::empty()).unwrap();
        // From here on its death is the guard's.
        let (dir, handle) = (files.dir.clone(), files.launch.handle.clone());
        let place = Self {
            handle,
            dir,
            pid,
            files,
            pidfd,
        };
        assert_eq!(heard(&control).0, Event::Ready);
        let mut byte = [0; 1];
        let after = fdpass::receive(&control, &mut byte, MsgFlags::empty());
        assert_eq!(
            after.unwrap().length,
            0,
            "the init lets the control socket go"
        );
        place
    }

    /// Signals the init.
    pub(crate) fn signal(&self, signal: i32) {
        pidfd::send_signal(&self.pidfd, signal).unwrap();
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.files.launch.socket.clone()
    }

    pub(crate) fn client(&self) -> Client {
        Client::connect(&self.files.launch.socket).unwrap()
    }

    /// Asks for a job with three pipes and a status pipe.
    pub(crate) fn spawn(&self, user: &str, request: &JobRequest) -> Running {
        let ((stdin, in_), (out, stdout), (err, stderr)) = (pipe(), pipe(), pipe());
        let (status, theirs) = pipe();
        let client = self.client();
        let file = request.to_memfd().unwrap();
        let three = [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()];
        client
            .run(
                user,
                file.as_fd(),
                Stdio::Descriptors(three),
                Some(theirs.as_fd()),
            )
            .unwrap();
        let pipes = Pipes {
            stdout: out,
            stderr: err,
        };
        Running {
            job: 0,
            stdin: Some(File::from(in_)),
            pipes,
            client,
            status,
        }
    }

    /// What a script says as root of the container.
    pub(crate) fn run_inside(&self, script: &str) -> String {
        self.spawn("", &sh(script)).finish().0
    }

    /// Runs `wsh` to its end: exit code, stdout, stderr.
    pub(crate) fn wsh(&self, arguments: &[&str], input: &[u8]) -> (i32, String, String) {
        let mut wsh = self.start_wsh(arguments, &[]);
        wsh.stdin.take().unwrap().write_all(input).unwrap();
        let (out, err) = (read_all(&wsh.stdout), read_all(&wsh.stderr));
        match wsh.wait() {
            Status::Exited(code) => (i32::from(code), out, err),
            Status::Started { .. } | Status::Signaled(_) | Status::Failed { .. } => {
                panic!("wsh was killed: {err}")
            }
        }
    }

    /// Starts `wsh` with pipes, and with these descriptors named in its environment.
    pub(crate) fn start_wsh(&self, arguments: &[&str], given: &[(&str, BorrowedFd<'_>)]) -> Wsh {
        let ((stdin, in_), (out, stdout), (err, stderr)) = (pipe(), pipe(), pipe());
        let mut fds = vec![(stdin.as_fd(), 0), (stdout.as_fd(), 1), (stderr.as_fd(), 2)];
        fds.extend(
            given
                .iter()
                .zip(10..)
                .map(|((_, fd), number)| (*fd, number)),
        );
        let environment: Vec<String> = given
            .iter()
            .zip(10..)
            .map(|((name, _), number)| format!("{name}={number}"))
            .collect();
        let child = self.spawn_wsh(arguments, &environment, &fds);
        Wsh {
            child,
            stdin: Some(File::from(in_)),
            stdout: out,
            stderr: err,
        }
    }

    fn spawn_wsh(
        &self,
        arguments: &[&str],
        environment: &[String],
        fds: &[(BorrowedFd<'_>, RawFd)],
    ) -> Child {
        let socket = self.socket();
        let mut argv = vec!["wsh", "--socket", socket.to_str().unwrap()];
        argv.extend(arguments);
        Child::spawn(env!("CARGO_BIN_EXE_wsh"), &argv, environment, fds)
    }

    /// Runs a script through `wsh`, those of its descriptors that are named being a terminal of 41 lines
    /// and the others the null device; `keys` says what to type, once.
    pub(crate) fn wsh_in_terminal(
        &self,
        terminal: [bool; 3],
        script: &str,
        keys: impl Fn(&str) -> Option<&'static [u8]>,
    ) -> (String, Status) {
        self.start_wsh_in_terminal(terminal, script).watch(keys)
    }

    /// The same, and nobody looks at the terminal yet.
    pub(crate) fn start_wsh_in_terminal(&self, terminal: [bool; 3], script: &str) -> Screen {
        let size = Winsize {
            ws_row: 41,
            ws_col: 101,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let pty = openpty(Some(&size), None).unwrap();
        let (master, slave) = (
            pty.master.try_clone().unwrap(),
            pty.slave.try_clone().unwrap(),
        );
        // openpty(3) knows no close-on-exec; other tests start processes at the same time.
        drop(pty);
        let before = nix::sys::termios::tcgetattr(&slave).unwrap();
        let null = File::options()
            .read(true)
            .write(true)
            .open("/dev/null")
            .unwrap();
        let given = |is: bool| if is { slave.as_fd() } else { null.as_fd() };
        let fds: Vec<_> = terminal.map(given).into_iter().zip(0..).collect();
        let arguments = ["--user", "vcap", "sh", "-c", script];
        let wsh = self.spawn_wsh(&arguments, &["TERM=dumb".to_owned()], &fds);
        Screen {
            wsh,
            master,
            slave,
            before,
        }
    }
}

/// A terminal with a `wsh` in it.
pub(crate) struct Screen {
    pub(crate) wsh: Child,
    master: OwnedFd,
    slave: OwnedFd,
    before: Termios,
}

impl Screen {
    /// Reads a piece of what is on it.
    pub(crate) fn read(&self) -> String {
        let mut buffer = [0; 1024];
        let read = nix::unistd::read(&self.master, &mut buffer).unwrap();
        String::from_utf8(buffer[..read].to_vec()).unwrap()
    }

    /// Reads until `wsh` has ended; `keys` says what to type, once.
    pub(crate) fn watch(self, keys: impl Fn(&str) -> Option<&'static [u8]>) -> (String, Status) {
        let (mut seen, mut typed) = (String::new(), false);
        let began = Instant::now();
        let end = loop {
            let fds = [&self.master, &self.wsh.pidfd];
            let mut fds = fds.map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN));
            assert!(poll(&mut fds, DEADLINE).unwrap() > 0, "{seen}");
            let late = began.elapsed() > Duration::from_millis(DEADLINE.into());
            assert!(!late, "wsh does not end");
            let [output, ended] = fds.map(|fd| fd.any().unwrap());
            if output {
                seen.push_str(&self.read());
            }
            if let Some(keys) = keys(&seen).filter(|_| !typed) {
                nix::unistd::write(&self.master, keys).unwrap();
                typed = true;
            }
            if ended && !output {
                break self.wsh.wait();
            }
        };
        let after = nix::sys::termios::tcgetattr(&self.slave).unwrap();
        assert_eq!(self.before, after, "the terminal is as it was");
        (seen, end)
    }
}

/// A job that was asked for.
pub(crate) struct Running {
    /// Its number, once it started.
    pub(crate) job: u32,
    pub(crate) stdin: Option<File>,
    pub(crate) pipes: Pipes,
    client: Client,
    status: OwnedFd,
}

pub(crate) struct Pipes {
    pub(crate) stdout: OwnedFd,
    pub(crate) stderr: OwnedFd,
}

impl Running {
    /// Its stdout, stderr and all frames.
    pub(crate) fn finish(&mut self) -> (String, String, Vec<Status>) {
        drop(self.stdin.take());
        let (out, err) = (read_all(&self.pipes.stdout), read_all(&self.pipes.stderr));
        let frames = frames(&self.client);
        if let Some(Status::Started { job }) = frames.first() {
            self.job = *job;
        }
        (out, err, frames)
    }

    pub(crate) fn next_frame(&mut self) -> Option<Status> {
        wait_readable(&self.client);
        let status = self
            .client
            .read_status()
            .unwrap()
            .map(|report| report.status);
        if let Some(Status::Started { job }) = status {
            self.job = job;
        }
        status
    }

    /// What came through the status pipe.
    pub(crate) fn pipe_frames(&self) -> Vec<Status> {
        pipe_frames(&self.status, 2)
    }
}

/// All frames of a connection.
pub(crate) fn frames(client: &Client) -> Vec<Status> {
    let next = || {
        wait_readable(client);
        client.read_status().unwrap().map(|report| report.status)
    };
    std::iter::from_fn(next).collect()
}

pub(crate) fn pipe_frames(pipe: &OwnedFd, count: usize) -> Vec<Status> {
    let mut file = File::from(pipe.try_clone().unwrap());
    let mut frame = || {
        wait_readable(pipe);
        let mut bytes = [0; Status::SIZE];
        file.read_exact(&mut bytes).unwrap();
        Status::decode(bytes).unwrap()
    };
    (0..count).map(|_| frame()).collect()
}

/// A program that was started by a test.
pub(crate) struct Child {
    pidfd: OwnedFd,
}

impl Child {
    pub(crate) fn spawn(
        program: &str,
        argv: &[&str],
        environment: &[String],
        fds: &[(BorrowedFd<'_>, RawFd)],
    ) -> Self {
        let mut actions = PosixSpawnFileActions::init().unwrap();
        // High copies first: a source's number may be another one's target.
        let high = |fd: &BorrowedFd<'_>| fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(200)).unwrap();
        let copies: Vec<RawFd> = fds.iter().map(|(fd, _)| high(fd)).collect();
        for (copy, (_, target)) in copies.iter().zip(fds) {
            actions.add_dup2(*copy, *target).unwrap();
        }
        let strings = |all: &[&str]| -> Vec<CString> {
            all.iter().map(|one| CString::new(*one).unwrap()).collect()
        };
        let environment: Vec<&str> = environment.iter().map(String::as_str).collect();
        let attributes = PosixSpawnAttr::init().unwrap();
        let (argv, environment) = (strings(argv), strings(&environment));
        let pid = posix_spawn(program, &actions, &attributes, &argv, &environment);
        copies
            .into_iter()
            .for_each(|copy| nix::unistd::close(copy).unwrap());
        Self {
            pidfd: pidfd::open(pid.unwrap().as_raw()).unwrap(),
        }
    }

    pub(crate) fn wait(&self) -> Status {
        wait_readable(&self.pidfd);
        pidfd::wait(&self.pidfd).unwrap()
    }

    pub(crate) fn has_ended(&self) -> bool {
        is_readable(&self.pidfd)
    }

    pub(crate) fn signal(&self, signal: i32) {
        pidfd::send_signal(&self.pidfd, signal).unwrap();
    }

    pub(crate) fn pid(&self) -> i32 {
        pidfd::pid_of(&self.pidfd).unwrap().unwrap()
    }

    /// Whether it keeps `TERM` from ending it.
    pub(crate) fn blocks_term(&self) -> bool {
        let pid = self.pid();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let mut lines = status.lines();
        let blocked = lines.find_map(|line| line.strip_prefix("SigBlk:\t"));
        u64::from_str_radix(blocked.unwrap(), 16).unwrap() & 1 << (15 - 1) != 0
    }
}

/// A `wsh` between pipes.
pub(crate) struct Wsh {
    pub(crate) child: Child,
    stdin: Option<File>,
    stdout: OwnedFd,
    pub(crate) stderr: OwnedFd,
}

impl Wsh {
    pub(crate) fn read_line(&mut self, expected: &str) {
        let mut line = vec![0; expected.len() + 1];
        wait_readable(&self.stdout);
        File::from(self.stdout.try_clone().unwrap())
            .read_exact(&mut line)
            .unwrap();
        assert_eq!(String::from_utf8(line).unwrap(), format!("{expected}\n"));
    }

    pub(crate) fn signal(&self, signal: i32) {
        self.child.signal(signal);
    }

    pub(crate) fn wait(&self) -> Status {
        self.child.wait()
    }
}

fn start(files: &Files, groups: &[BorrowedFd<'_>]) -> (OwnedFd, Child) {
    let kind = SockType::SeqPacket;
    let (control, theirs) =
        socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).unwrap();
    let launch = files.launch.to_memfd().unwrap();
    let mut fds = vec![(theirs.as_fd(), CONTROL_FD), (launch.as_fd(), LAUNCH_FD)];
    fds.extend(groups.iter().copied().zip(FIRST_GROUP_FD..));
    // One that must not get through, and an environment that must not either.
    let foreign = File::open("/").unwrap();
    fds.push((foreign.as_fd(), 50));
    let title = format!("wshd: {}", files.launch.handle);
    let secret = ["SECRET=host".to_owned()];
    let argv = [&[title.as_str()], &files.without[..]].concat();
    let child = Child::spawn(files.wshd.to_str().unwrap(), &argv, &secret, &fds);
    (control, child)
}

/// Gives a container a link, whose other end stays in the same network namespace, and up.
fn wire(pid: i32) {
    for words in ["link add eth0 type veth peer name far", "link set far up"] {
        ip(pid, &words.split(' ').collect::<Vec<_>>());
    }
}

/// What `ip` says in the network namespace of a process.
pub(crate) fn ip(pid: i32, arguments: &[&str]) -> String {
    let namespace = format!("--net=/proc/{pid}/ns/net");
    let (status, said) = output(
        "/usr/bin/nsenter",
        &[&[&namespace, "/usr/sbin/ip"], arguments].concat(),
    );
    assert_eq!(status, Status::Exited(0), "{arguments:?}: {said}");
    said
}

fn heard(control: &OwnedFd) -> (Event, Vec<OwnedFd>) {
    wait_readable(control);
    let mut buffer = [0; container::launch::MAX_EVENT];
    let packet = fdpass::receive(control, &mut buffer, MsgFlags::empty()).unwrap();
    (Event::decode(&buffer[..packet.length]).unwrap(), packet.fds)
}

/// Makes a container that cannot be made; says what it said first, once both its processes are gone. One
/// that could be made all the same is `made`, and ended.
pub(crate) fn try_make(files: &Files) -> String {
    let (control, launcher) = start(files, &[]);
    let (mut failures, mut init) = (Vec::new(), None);
    let mut buffer = [0; container::launch::MAX_EVENT];
    loop {
        wait_readable(&control);
        let packet = match fdpass::receive(&control, &mut buffer, MsgFlags::empty()) {
            Ok(fdpass::Packet { length: 0, .. }) => break,
            // It hung up before it read GO; what it said is still there.
            Err(Errno::ECONNRESET) => continue,
            packet => packet.unwrap(),
        };
        match Event::decode(&buffer[..packet.length]).unwrap() {
            Event::Cloned => {
                let _ = fdpass::send(&control, GO, &[], MsgFlags::empty());
                init = packet.fds.into_iter().next();
            }
            Event::Ready => {
                pidfd::send_signal(init.as_ref().unwrap(), 9).unwrap();
                failures.push("made".to_owned());
            }
            Event::Failed { what, errno } => {
                failures.push(format!("{what}: {:?}", Errno::from_raw(errno)));
            }
        }
    }
    launcher.wait();
    failures.swap_remove(0)
}

/// Whether the init ends when the agent leaves before `GO`.
pub(crate) fn hang_up_before_go(files: &Files) {
    let (control, launcher) = start(files, &[]);
    let (_, fds) = heard(&control);
    assert_eq!(launcher.wait(), Status::Exited(0));
    drop(control);
    wait_readable(&fds[0]);
}

pub(crate) fn job(argv: &[&str]) -> JobRequest {
    let argv = argv.iter().map(|word| word.as_bytes().to_vec()).collect();
    JobRequest {
        argv,
        ..JobRequest::default()
    }
}

pub(crate) fn sh(script: &str) -> JobRequest {
    job(&["/bin/sh", "-c", script])
}

/// Reader and writer, close-on-exec.
pub(crate) fn pipe() -> (OwnedFd, OwnedFd) {
    pipe2(OFlag::O_CLOEXEC).unwrap()
}

/// Everything until the last writer is gone.
pub(crate) fn read_all(fd: &OwnedFd) -> String {
    let mut text = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        wait_readable(fd);
        match nix::unistd::read(fd, &mut buffer).unwrap() {
            0 => return String::from_utf8(text).unwrap(),
            read => text.extend(&buffer[..read]),
        }
    }
}

pub(crate) fn wait_readable(fd: &impl AsFd) {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, DEADLINE), Ok(1), "nothing came");
}

/// Whether there is something to be read now.
pub(crate) fn is_readable(fd: &impl AsFd) -> bool {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).unwrap() == 1
}

/// For what no descriptor tells: looks again every 10 ms, until the deadline.
pub(crate) fn wait_until(what: &str, reached: impl Fn() -> bool) {
    for _ in 0..DEADLINE / 10 {
        if reached() {
            return;
        }
        let _ = poll(&mut [], PollTimeout::from(10_u8));
    }
    panic!("never: {what}");
}

pub(crate) fn parent(pid: i32) -> i32 {
    let stat =
        std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")).unwrap();
    let (_, rest) = stat.rsplit_once(')').unwrap();
    rest.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// A file of the host with this content, that goes with the container.
pub(crate) fn file_with(place: &Place, content: &[u8]) -> PathBuf {
    let path = place.dir.join("file");
    std::fs::write(&path, content).unwrap();
    path
}

/// Exit code and stdout of a program.
pub(crate) fn output(program: &str, arguments: &[&str]) -> (Status, String) {
    let (out, stdout) = pipe();
    let mut argv = vec![program];
    argv.extend(arguments);
    let child = Child::spawn(program, &argv, &[], &[(stdout.as_fd(), 1)]);
    drop(stdout);
    let text = read_all(&out);
    (child.wait(), text)
}
