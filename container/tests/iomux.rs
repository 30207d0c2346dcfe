//! `iomux-spawn`, `iomux-link` and `oom` as they are run: every byte of a job arrives once or is
//! named as missing, whatever is killed or stopped.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_methods,
    reason = "a test"
)]

#[allow(dead_code, reason = "shared with wall.rs, which uses all of it")]
mod support;

use container::{
    fault::SysError,
    frames::{Frame, FrameReader},
    job::JobRequest,
    spool::{Cursor, Record},
    status::{Status, Step},
    sys::{pidfd, volume},
};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, FdFlag, OFlag, fcntl},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::pipe2,
};
use std::{
    fs::{self, File},
    io::Read,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{net::UnixStream, process::ExitStatusExt},
    },
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, ExitStatus, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::Instant,
};
use support::{Place, job, sh};

/// One generous limit for every wait, in ms.
const DEADLINE_MS: u16 = 60_000;

/// What stands in for `wsh` and the container: `status(kind, value)` speaks on the status pipe.
const PRELUDE: &str = r#"
import os, struct, sys, time
def status(kind, value, step=0):
    os.write(int(os.environ["WSH_STATUS_FD"]), struct.pack("<BBBBi", kind, step, 0, 0, value))
def say(data, fd=1):
    while data:
        data = data[os.write(fd, data):]
status(1, 1)
"#;

struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path =
            std::env::temp_dir().join(format!("ostler-iomux-{}-{number}", std::process::id()));
        fs::create_dir_all(path.join("1")).unwrap();
        Self(path)
    }

    /// The directory of job 1.
    fn job(&self) -> PathBuf {
        self.0.join("1")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A child that does not outlive its test.
struct Process {
    child: Child,
    pidfd: OwnedFd,
}

impl Process {
    fn start(command: &mut Command) -> Self {
        let child = command.spawn().unwrap();
        let pidfd = pidfd::open(child.id().cast_signed()).unwrap();
        Self { child, pidfd }
    }

    fn signal(&self, signal: i32) {
        pidfd::send_signal(&self.pidfd, signal).unwrap();
    }

    fn wait(mut self) -> ExitStatus {
        assert!(readable(&self.pidfd, DEADLINE_MS), "did not end");
        self.child.wait().unwrap()
    }

    fn code(self) -> i32 {
        self.wait().code().unwrap()
    }

    fn kill(mut self) {
        self.signal(9);
        self.child.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn readable(fd: &impl AsFd, timeout_ms: u16) -> bool {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::from(timeout_ms)).unwrap() > 0
}

/// A supervisor, once its readers can connect.
fn ready(command: &mut Command) -> Process {
    let mut process = Process::start(command.stdout(Stdio::piped()));
    let mut ready = process.child.stdout.take().unwrap();
    assert_eq!(ready.read_to_end(&mut Vec::new()).unwrap(), 0);
    process
}

fn iomux_spawn() -> Command {
    Command::new(env!("CARGO_BIN_EXE_iomux-spawn"))
}

/// Supervises a python script in the place of `wsh`; its argument is a path that it may wait for.
fn supervise_python(script: &str, job_dir: &Path) -> Process {
    let script = format!("{PRELUDE}{script}");
    ready(
        iomux_spawn()
            .arg(job_dir)
            .args(["python3", "-c", &script])
            .arg(go(job_dir)),
    )
}

/// What the script waits for.
fn go(job_dir: &Path) -> PathBuf {
    job_dir.with_extension("go")
}

/// Supervises a job in a container, by the real `wsh`. The last part of the directory is its
/// number.
fn supervise(place: &Place, request: JobRequest, job_dir: &Path) -> Process {
    let number = job_dir
        .file_name()
        .unwrap()
        .to_str()
        .unwrap()
        .parse()
        .unwrap();
    let request = JobRequest {
        job: number,
        keep_readers: true,
        ..request
    };
    let request = inheritable(request.to_memfd().unwrap());
    let mut command = iomux_spawn();
    command
        .arg(job_dir)
        .args([env!("CARGO_BIN_EXE_wsh"), "--socket"])
        .arg(place.socket());
    command
        .args(["--user", "vcap"])
        .env("IOMUX_JOB_FD", request.as_raw_fd().to_string());
    ready(&mut command)
}

fn take_over(socket: &Path, job_dir: &Path) -> Process {
    ready(
        iomux_spawn()
            .arg("--takeover")
            .arg(job_dir)
            .arg("--socket")
            .arg(socket),
    )
}

fn inheritable(fd: OwnedFd) -> OwnedFd {
    fcntl(&fd, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    fd
}

/// The two ends of a hang-up pipe: the helper's and ours.
fn hangup() -> (OwnedFd, File) {
    let (theirs, ours) = pipe2(OFlag::O_CLOEXEC).unwrap();
    (inheritable(theirs), File::from(ours))
}

/// A linker as the agent runs it.
struct Link {
    process: Process,
    output: ChildStdout,
    frames: FrameReader,
    hangup: Option<File>,
}

impl Link {
    fn start(job_dir: &Path, from: Cursor) -> Self {
        let (theirs, ours) = hangup();
        let mut command = Command::new(env!("CARGO_BIN_EXE_iomux-link"));
        command
            .arg(job_dir)
            .env("IOMUX_FRAMES", "1")
            .env("IOMUX_FROM", from.to_string());
        command
            .env("OSTLER_HANGUP_FD", theirs.as_raw_fd().to_string())
            .stdout(Stdio::piped());
        let mut process = Process::start(&mut command);
        let output = process.child.stdout.take().unwrap();
        Self {
            process,
            output,
            frames: FrameReader::default(),
            hangup: Some(ours),
        }
    }

    /// The next frame; `None` when the linker has ended.
    fn next(&mut self) -> Result<Option<Frame>, SysError> {
        let mut buffer = vec![0; 1 << 16];
        loop {
            if let Some(frame) = self.frames.next()? {
                return Ok(Some(frame));
            }
            assert!(readable(&self.output, DEADLINE_MS), "nothing came");
            let count = self.output.read(&mut buffer).unwrap();
            if count == 0 {
                return Ok(None);
            }
            self.frames.push(&buffer[..count]);
        }
    }

    fn until_end(mut self) -> (Heard, i32) {
        let mut heard = Heard::default();
        while let Some(frame) = self.next().unwrap() {
            heard.take(frame);
        }
        (heard, self.process.code())
    }
}

/// What came through a linker, put together again.
#[derive(Default)]
struct Heard {
    bytes: [Vec<u8>; 2],
    at: [u64; 2],
    missing: [u64; 2],
    uncertain: u32,
    started: u32,
    exits: Vec<(Status, [u64; 2])>,
    ended: bool,
    cursor: Cursor,
}

impl Heard {
    fn take(&mut self, frame: Frame) {
        match frame.record {
            Record::Started => self.started += 1,
            Record::Output {
                stream,
                offset,
                bytes,
                ..
            } => {
                assert_eq!(
                    offset, self.at[stream as usize],
                    "{stream}: neither gap nor repeat"
                );
                self.at[stream as usize] += bytes.len() as u64;
                self.bytes[stream as usize].extend(bytes);
            }
            Record::Gap {
                stream,
                offset,
                bytes,
                certain,
            } => {
                assert_eq!(offset, self.at[stream as usize]);
                self.at[stream as usize] += bytes;
                self.missing[stream as usize] += bytes;
                self.uncertain += u32::from(!certain);
            }
            Record::Exit {
                status,
                stdout,
                stderr,
                ..
            } => self.exits.push((status, [stdout, stderr])),
            Record::End { stdout, stderr } => {
                assert_eq!([stdout, stderr], self.at);
                self.ended = true;
            }
        }
        assert_eq!([frame.next.stdout, frame.next.stderr], self.at);
        self.cursor = frame.next;
    }
}

fn hear(job_dir: &Path) -> (Heard, i32) {
    Link::start(job_dir, Cursor::default()).until_end()
}

fn rounds() -> u32 {
    std::env::var("OSTLER_ROUNDS")
        .ok()
        .and_then(|rounds| rounds.parse().ok())
        .unwrap_or(20)
}

/// Points at the first difference between texts that are too long to print.
fn same(heard: &[u8], said: &[u8]) {
    let lengths = [heard.len(), said.len()];
    let pairs = heard.iter().zip(said);
    let Some(at) = pairs.into_iter().position(|(heard, said)| heard != said) else {
        assert_eq!(lengths[0], lengths[1]);
        return;
    };
    let around = |text: &[u8]| {
        String::from_utf8_lossy(&text[at.saturating_sub(40)..text.len().min(at + 100)]).into_owned()
    };
    assert_eq!(around(heard), around(said), "at {at} of {lengths:?}");
}

/// What `seq` says.
fn sequence(from: u32, to: u32) -> Vec<u8> {
    (from..=to)
        .flat_map(|n| format!("{n}\n").into_bytes())
        .collect()
}

#[test]
fn a_mebibyte_and_exit_arrives_whole_with_no_one_and_three_readers() {
    let expected = sequence(1_000_000, 1_131_071);
    assert_eq!(expected.len(), 1 << 20);
    let place = Place::new();
    for round in 0..rounds() {
        for readers in [0, 1, 3] {
            let dir = Scratch::new();
            let request = sh("busybox seq 1000000 1131071");
            let job = supervise(&place, request, &dir.job());
            let mut links: Vec<_> = (0..readers)
                .map(|_| Link::start(&dir.job(), Cursor::default()))
                .collect();
            let stopped = if readers == 3 { links.pop() } else { None };
            stopped.iter().for_each(|link| link.process.signal(19));
            let mut told: Vec<_> = links.into_iter().map(Link::until_end).collect();
            assert_eq!(
                job.code(),
                0,
                "round {round}: a stopped reader stops nobody"
            );
            stopped.iter().for_each(|link| link.process.signal(18));
            told.extend(stopped.map(Link::until_end));
            told.push(hear(&dir.job()));
            for (heard, code) in told {
                let count = heard.at[0];
                assert!(
                    heard.bytes[0] == expected,
                    "round {round}: {count} bytes of {readers}"
                );
                assert_eq!(
                    (heard.missing, heard.uncertain, heard.started),
                    ([0, 0], 0, 1)
                );
                assert_eq!(heard.exits, [(Status::Exited(0), [1 << 20, 0])]);
                assert_eq!((heard.ended, code), (true, 0));
            }
            assert_eq!(place.client().info().unwrap(), [], "the job is forgotten");
        }
    }
}

#[test]
fn a_reader_that_was_left_behind_hears_exactly_what_it_missed() {
    let dir = Scratch::new();
    let script = r#"
sys.stdin.read()
for n in range(40): say(b"%01048575d\n" % n); say(b"x\n", 2)
status(3, 9)
"#;
    let job = supervise_python(script, &dir.job());
    let link = Link::start(&dir.job(), Cursor::default());
    link.process.signal(19);
    assert_eq!(job.code(), 0);
    link.process.signal(18);
    let (heard, code) = link.until_end();
    assert_eq!((heard.at, heard.uncertain, code), ([40 << 20, 80], 0, 0));
    assert!(
        heard.missing[0] > 20 << 20 && heard.missing[0] < 30 << 20,
        "{:?}",
        heard.missing
    );
    assert_eq!(heard.bytes[0].len() as u64 + heard.missing[0], 40 << 20);
    assert_eq!(heard.exits, [(Status::Signaled(9), [40 << 20, 80])]);
}

#[test]
fn output_of_a_background_child_follows_the_exit() {
    let dir = Scratch::new();
    let script = r#"
say(b"early\n")
if os.fork() == 0:
    os.close(int(os.environ["WSH_STATUS_FD"]))
    while not os.path.exists(sys.argv[1]): time.sleep(0.01)
    say(b"late\n"); say(b"late too", 2)
    os._exit(0)
status(2, 4)
"#;
    let job = supervise_python(script, &dir.job());
    let mut link = Link::start(&dir.job(), Cursor::default());
    let mut heard = Heard::default();
    while heard.exits.is_empty() {
        heard.take(link.next().unwrap().unwrap());
    }
    assert_eq!((heard.at, heard.ended), ([6, 0], false));
    // From here another linker goes on, as after an agent's restart.
    drop(link);
    fs::write(go(&dir.job()), "").unwrap();
    let mut link = Link::start(&dir.job(), heard.cursor);
    while let Some(frame) = link.next().unwrap() {
        heard.take(frame);
    }
    assert_eq!(
        heard.bytes,
        [b"early\nlate\n".to_vec(), b"late too".to_vec()]
    );
    assert_eq!(
        (heard.exits, heard.ended),
        (vec![(Status::Exited(4), [6, 0])], true)
    );
    assert_eq!(job.code(), 0);
}

#[test]
fn lines_are_cut_at_their_ends_and_the_rest_soon_follows() {
    let dir = Scratch::new();
    let script = r#"
say(b"one\ntwo\nthr")
while not os.path.exists(sys.argv[1]): time.sleep(0.01)
say(b"ee\n"); status(2, 0)
"#;
    let job = supervise_python(script, &dir.job());
    let mut link = Link::start(&dir.job(), Cursor::default());
    let mut output = || loop {
        if let Record::Output { bytes, time_ns, .. } = link.next().unwrap().unwrap().record {
            break (String::from_utf8(bytes).unwrap(), time_ns);
        }
    };
    let ((lines, first), (rest, second)) = (output(), output());
    assert_eq!((lines.as_str(), rest.as_str()), ("one\ntwo\n", "thr"));
    // 20 ms from the look on; how long after that the first record is written is the machine's business.
    assert!(
        second - first >= 5_000_000,
        "waited {} ns for the line's end",
        second - first
    );
    fs::write(go(&dir.job()), "").unwrap();
    assert_eq!(output().0, "ee\n");
    assert_eq!(job.code(), 0);
}

#[test]
fn what_brings_no_bytes_is_not_looked_at_all_the_time() {
    let dir = Scratch::new();
    // It takes out of its pipe again what it has put in.
    let script = r#"
read = os.open("/proc/self/fd/1", os.O_RDONLY | os.O_NONBLOCK)
supervisor = os.getppid()
while not os.path.exists(sys.argv[1]) and os.getppid() == supervisor:
    for _ in range(1000):
        os.write(1, b"x")
        try: os.read(read, 9)
        except BlockingIOError: pass
os.close(read); status(2, 0)
"#;
    let job = supervise_python(script, &dir.job());
    pause(200);
    let switches = || {
        let status = fs::read_to_string(format!("/proc/{}/status", job.child.id())).unwrap();
        let line = |line: &str| {
            line.strip_prefix("voluntary_ctxt_switches:\t")?
                .parse()
                .ok()
        };
        status.lines().find_map(line).unwrap()
    };
    let (began, before): (_, u128) = (Instant::now(), switches());
    pause(1000);
    // A look and a rest are two, and one look is for free between two rests of 2 ms.
    let (count, took) = (switches() - before, began.elapsed().as_millis());
    assert!(count < 3 * took, "{count} in {took} ms");
    fs::write(go(&dir.job()), "").unwrap();
    assert_eq!(job.code(), 0);
}

#[test]
fn a_program_that_cannot_be_executed_is_told_and_never_exit_0() {
    let dir = Scratch::new();
    let mut command = Command::new(env!("CARGO_BIN_EXE_iomux-spawn"));
    command
        .arg(dir.job())
        .args(["/no/such/wsh", "--socket", "/no/such/socket"]);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(6));
    assert!(String::from_utf8_lossy(&output.stderr).contains("posix_spawn(/no/such/wsh): ENOENT"));
    let (heard, code) = hear(&dir.job());
    let failed = Status::Failed {
        step: Step::Exec,
        errno: Errno::ENOENT as i32,
    };
    assert_eq!(
        (heard.exits, heard.started, heard.ended, code),
        (vec![(failed, [0, 0])], 0, true, 0)
    );
    let person = person(&dir.job(), &[]);
    assert_eq!(person.0, 127);
    assert!(
        person.2.contains("could not execute the program"),
        "{}",
        person.2
    );
}

/// Runs `iomux-link` for a person: exit code, stdout, stderr.
fn person(job_dir: &Path, options: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_iomux-link"));
    let output = command.args(options).arg(job_dir).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (
        output.status.code().unwrap(),
        text(output.stdout),
        text(output.stderr),
    )
}

#[test]
fn a_person_gets_both_streams_and_the_exit_code() {
    for (end, expected) in [
        ("status(2, 3)", 3),
        ("status(3, 15)", 143),
        ("status(2, 0)", 0),
    ] {
        let dir = Scratch::new();
        let job = supervise_python(
            &format!("say(b'to out\\n'); say(b'to err\\n', 2); {end}"),
            &dir.job(),
        );
        let told = (expected, "to out\n".to_owned(), "to err\n".to_owned());
        assert_eq!(person(&dir.job(), &[]), told);
        assert_eq!(job.code(), 0);
        assert_eq!(person(&dir.job(), &[]), told, "and again when all is over");
        let (code, stdout, _) = person(&dir.job(), &["--from", "0:3:0", "--no-follow"]);
        assert_eq!((code, stdout.as_str()), (expected, "to out\n"));
        // From every place on, those behind the exit and behind the end too.
        let mut link = Link::start(&dir.job(), Cursor::default());
        while let Some(frame) = link.next().unwrap() {
            let from = frame.next.to_string();
            let (code, _, stderr) = person(&dir.job(), &["--from", &from]);
            let told = if stderr.contains("to err") {
                "to err\n"
            } else {
                ""
            };
            assert_eq!((code, stderr.as_str()), (expected, told), "from {from}");
        }
    }
}

#[test]
fn a_job_has_one_supervisor_and_a_directory_one_job() {
    let dir = Scratch::new();
    let script = "while not os.path.exists(sys.argv[1]): time.sleep(0.01)\nstatus(2, 0)";
    let job = supervise_python(script, &dir.job());
    assert_eq!(take_over(Path::new("/none"), &dir.job()).code(), 5);
    fs::write(go(&dir.job()), "").unwrap();
    assert_eq!(job.code(), 0);
    assert_eq!(
        take_over(Path::new("/none"), &dir.job()).code(),
        0,
        "nothing is left to do"
    );
    assert_eq!(supervise_python(script, &dir.job()).code(), 1);
    assert_eq!(hear(&dir.job()).0.exits.len(), 1);
}

#[test]
fn an_end_is_told_once_when_all_of_it_is_on_the_disk() {
    let dir = Scratch::new();
    // The pipes are closed before the status comes, so Exit and End are one step.
    let script = r#"
while not os.path.exists(sys.argv[1]): time.sleep(0.01)
os.close(1); os.close(2); time.sleep(0.3)
status(2, 0)
"#;
    let job = supervise_python(script, &dir.job());
    let mut link = Link::start(&dir.job(), Cursor::default());
    assert_eq!(link.next().unwrap().unwrap().record, Record::Started);
    let mut woken = UnixStream::connect(dir.job().join("link.sock")).unwrap();
    woken.read_exact(&mut [0]).unwrap();
    fs::write(go(&dir.job()), "").unwrap();
    let mut wakes = Vec::new();
    woken.read_to_end(&mut wakes).unwrap();
    assert_eq!(wakes, b".", "after the sync, and not before it as well");
    assert_eq!(job.code(), 0);
    assert_eq!(link.until_end().1, 0);
}

#[test]
fn one_reader_too_many_is_told_so() {
    let dir = Scratch::new();
    let script = "while not os.path.exists(sys.argv[1]): time.sleep(0.01)\nstatus(2, 0)";
    let job = supervise_python(script, &dir.job());
    let readers: Vec<_> = (0..64)
        .map(|_| UnixStream::connect(dir.job().join("link.sock")).unwrap())
        .collect();
    assert_eq!(Link::start(&dir.job(), Cursor::default()).until_end().1, 7);
    drop(readers);
    fs::write(go(&dir.job()), "").unwrap();
    assert_eq!(job.code(), 0);
    assert_eq!(hear(&dir.job()).1, 0);
}

#[test]
fn hang_up_ends_a_linker_that_waits_and_one_that_nobody_reads() {
    let dir = Scratch::new();
    let script = r#"
say(b"x" * (4 << 20))
while not os.path.exists(sys.argv[1]): time.sleep(0.01)
status(2, 0)
"#;
    let job = supervise_python(script, &dir.job());
    let mut unread = Link::start(&dir.job(), Cursor::default());
    assert!(readable(&unread.output, DEADLINE_MS));
    let mut waiting = Link::start(&dir.job(), Cursor::default());
    let mut heard = Heard::default();
    while heard.at[0] < 4 << 20 {
        heard.take(waiting.next().unwrap().unwrap());
    }
    for link in [&mut unread, &mut waiting] {
        drop(link.hangup.take());
    }
    assert_eq!((unread.process.code(), waiting.process.code()), (4, 4));
    // One whose reader went away ends too, without any hang-up.
    let Link {
        process,
        output,
        hangup,
        ..
    } = Link::start(&dir.job(), Cursor::default());
    drop(output);
    assert_eq!(process.code(), 4);
    drop(hangup);
    fs::write(go(&dir.job()), "").unwrap();
    assert_eq!(job.code(), 0);
}

/// A job that says something and then waits, and what was heard of it.
fn job_that_waits(place: &Place, dir: &Scratch) -> (Process, Link, Heard) {
    let job = supervise(place, sh("echo before; sleep 1000"), &dir.job());
    let mut link = Link::start(&dir.job(), Cursor::default());
    let mut heard = Heard::default();
    heard.take(link.next().unwrap().unwrap());
    assert_eq!(
        (heard.started, heard.at),
        (1, [0, 0]),
        "the log begins with the start"
    );
    while heard.at[0] < 7 {
        heard.take(link.next().unwrap().unwrap());
    }
    (job, link, heard)
}

#[test]
fn a_container_that_dies_ends_its_jobs_without_a_status() {
    let (place, dir) = (Place::new(), Scratch::new());
    let (job, mut link, mut heard) = job_that_waits(&place, &dir);
    drop(place);
    while let Some(frame) = link.next().unwrap() {
        heard.take(frame);
    }
    assert_eq!((link.process.code(), job.code()), (0, 0));
    // Nor does wsh say anything in the job's name.
    assert_eq!(
        (heard.at, heard.missing, heard.uncertain),
        ([7, 0], [0, 0], 0)
    );
    assert_eq!((heard.exits.len(), heard.ended), (0, true));
}

/// A stopped process that does not outlive its test.
struct Stopped(OwnedFd);

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = pidfd::send_signal(&self.0, 9);
    }
}

/// The `wsh` of a supervised job, stopped once it has nothing to do but to wait.
fn stop_wsh(job: &Process) -> Stopped {
    let supervisor = job.child.id();
    let children = format!("/proc/{supervisor}/task/{supervisor}/children");
    let pid: i32 = fs::read_to_string(children)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    let wsh = pidfd::open(pid).unwrap();
    let own = |fd: i32| fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap();
    support::wait_until("wsh has let the job's pipes go", || {
        [1, 2].map(own) == ["/dev/null"; 2].map(PathBuf::from)
    });
    pidfd::send_signal(&wsh, 19).unwrap();
    Stopped(wsh)
}

#[test]
fn a_stopped_wsh_keeps_no_end_away() {
    // The job's own end, and its container's.
    for container_dies in [false, true] {
        let (place, dir) = (Place::new(), Scratch::new());
        place.run_inside("mkfifo -m 666 /tmp/go");
        let script = "echo before; read go < /tmp/go; exit 4";
        let job = supervise(&place, sh(script), &dir.job());
        let mut link = Link::start(&dir.job(), Cursor::default());
        let mut heard = Heard::default();
        while heard.at[0] < 7 {
            heard.take(link.next().unwrap().unwrap());
        }
        let _wsh = stop_wsh(&job);
        if container_dies {
            drop(place);
        } else {
            place.run_inside("echo > /tmp/go");
        }
        assert_eq!(job.code(), 0);
        while let Some(frame) = link.next().unwrap() {
            heard.take(frame);
        }
        let exits = if container_dies {
            vec![]
        } else {
            vec![(Status::Exited(4), [7, 0])]
        };
        assert_eq!((heard.exits, heard.ended, heard.at), (exits, true, [7, 0]));
    }
}

#[test]
fn a_supervisor_and_its_container_killed_leave_a_named_end() {
    let (place, dir) = (Place::new(), Scratch::new());
    let (job, mut link, _) = job_that_waits(&place, &dir);
    let socket = place.socket();
    job.kill();
    assert!(link.next().unwrap().is_none());
    assert_eq!(link.process.code(), 3);
    drop(place);
    assert_eq!(take_over(&socket, &dir.job()).code(), 0);
    let (heard, code) = hear(&dir.job());
    assert_eq!(
        (heard.at, heard.missing, heard.uncertain),
        ([7, 0], [0, 0], 2)
    );
    assert_eq!((heard.exits.len(), heard.ended, code), (0, true, 0));
    let (code, _, stderr) = person(&dir.job(), &[]);
    assert_eq!(code, 125);
    assert!(
        stderr.contains("at least 0 bytes of stdout are missing"),
        "{stderr}"
    );
}

#[test]
fn a_failed_write_ends_no_output() {
    let dir = Scratch::new();
    // Up to Linux 6.14 each of these may leave a buffer without a byte in the pipe; a whole page does so beside others, and some
    // fill it. The last ones come behind all bytes, before the pipe is closed.
    let script = r#"
open(my $status, ">&=", $ENV{WSH_STATUS_FD});
sub status { syswrite($status, pack("CCCCl", $_[0], 0, 0, 0, $_[1])) }
sub fail { for my $fd (1, 2) { syscall(1, $fd, 8, $_[0]) == -1 or die } }
fail(4096) for 1 .. 8;
status(1, 1);
for my $n (1 .. 1000) {
    fail(1);
    syswrite(STDOUT, "$n\n");
    select(undef, undef, undef, 0.002);
    fail($n % 4 ? 1 : 4096) for 1 .. 20;
    syswrite(STDERR, "$n\n");
}
fail(4096);
status(2, 0);
"#;
    let job = ready(iomux_spawn().arg(dir.job()).args(["perl", "-e", script]));
    let (heard, code) = hear(&dir.job());
    same(&heard.bytes[0], &sequence(1, 1000));
    same(&heard.bytes[1], &sequence(1, 1000));
    assert_eq!((heard.missing, heard.uncertain), ([0, 0], 0));
    assert_eq!((heard.exits.len(), heard.ended, code), (1, true, 0));
    assert_eq!(job.code(), 0);
}

#[test]
fn a_dead_jobs_end_is_written_on_a_full_disk() {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    struct Mounted(PathBuf);
    impl Drop for Mounted {
        fn drop(&mut self) {
            let _ = umount2(&self.0, MntFlags::MNT_DETACH);
        }
    }
    let dir = Scratch::new();
    let mounted = Mounted(dir.job());
    let tmpfs = Some("tmpfs");
    mount(tmpfs, &mounted.0, tmpfs, MsFlags::empty(), Some("size=1m")).unwrap();
    let script = r#"
supervisor = os.getppid()
say(b"x" * (4 << 20)); open(sys.argv[1], "w")
while os.getppid() == supervisor: time.sleep(0.01)
"#;
    let job = supervise_python(script, &dir.job());
    support::wait_until("all was said", || go(&dir.job()).exists());
    job.kill();
    assert_eq!(take_over(Path::new("/none"), &dir.job()).code(), 0);
    let (heard, code) = hear(&dir.job());
    assert_eq!((heard.uncertain, heard.ended, code), (2, true, 0));
    // What was in the pipe has died with it, and what it was just throwing away was not counted.
    assert!(heard.at[0] >= (4 << 20) - (128 << 10), "{:?}", heard.at);
    assert!(heard.missing[0] >= 2 << 20, "{:?}", heard.missing);
}

/// An ext4 file system in a file, mounted.
struct SmallDisk {
    place: PathBuf,
    number: u32,
}

impl SmallDisk {
    fn mount(place: PathBuf) -> Self {
        use nix::mount::{MsFlags, mount};
        let image = place.with_extension("img");
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&image)
            .unwrap();
        file.set_len(64 << 20).unwrap();
        let mut mkfs = Command::new("mkfs.ext4");
        let made = mkfs.args(["-q", "-b", "4096"]).arg(&image).status();
        assert!(made.unwrap().success());
        // The device goes with the mount.
        let (_device, number) = volume::attach(&file, 4096).unwrap();
        let device = PathBuf::from(format!("/dev/loop{number}"));
        let options = Some("errors=remount-ro");
        mount(
            Some(&device),
            &place,
            Some("ext4"),
            MsFlags::empty(),
            options,
        )
        .unwrap();
        Self { place, number }
    }

    /// The device is gone, as it were: EIO.
    fn abandon(&self) {
        volume::abandon_ext4(File::open(&self.place).unwrap().as_fd()).unwrap();
    }

    /// The file system finds itself broken: EROFS.
    fn break_down(&self) {
        let error = format!("/sys/fs/ext4/loop{}/trigger_fs_error", self.number);
        fs::write(error, "a test").unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.place, nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn an_app_goes_on_where_its_output_can_no_longer_be_kept() {
    // Three segments before, and as much after.
    let script = "busybox yes | busybox head -c 6291456; read go < /tmp/go
        busybox yes | busybox head -c 6291456; echo said >&2; echo said > /tmp/said; exit 4";
    for fail in [SmallDisk::abandon, SmallDisk::break_down] {
        let (place, dir) = (Place::new(), Scratch::new());
        let disk = SmallDisk::mount(dir.job());
        place.run_inside("mkfifo -m 666 /tmp/go /tmp/said");
        let job = supervise(&place, sh(script), &dir.job());
        let mut link = Link::start(&dir.job(), Cursor::default());
        let mut heard = Heard::default();
        while heard.at[0] < 6 << 20 {
            heard.take(link.next().unwrap().unwrap());
        }
        // The next write to a clean page is news to the file system.
        nix::unistd::syncfs(File::open(dir.job()).unwrap()).unwrap();
        fail(&disk);
        assert_eq!(place.run_inside("echo > /tmp/go; cat /tmp/said"), "said\n");
        assert_eq!(job.code(), 1, "the end cannot be in the log");
        let jobs = place.client().info().unwrap();
        assert_eq!((jobs.len(), jobs[0].status), (1, Some(Status::Exited(4))));
    }
}

#[test]
fn killed_supervisors_lose_and_repeat_nothing() {
    // A fast machine is done with a job before many of its supervisors are killed.
    let (mut noise, mut kills) = (88_172_645_463_325_252, 0);
    let enough = (0..20).any(|_| {
        kills += with_supervisors_killed(&mut noise);
        kills >= 10
    });
    assert!(enough, "{kills} kills");
}

/// Runs a job to its end, and tells how many of its supervisors were killed meanwhile.
fn with_supervisors_killed(noise: &mut u64) -> u32 {
    let (place, dir) = (Place::new(), Scratch::new());
    let script = "busybox seq 1000000 >&2 & busybox seq 1000000 2000000; wait; exit 7";
    let mut supervisor = supervise(&place, sh(script), &dir.job());
    let mut kills = 0;
    let mut heard = Heard::default();
    loop {
        let mut link = Link::start(&dir.job(), heard.cursor);
        *noise ^= *noise << 13;
        *noise ^= *noise >> 7;
        *noise ^= *noise << 17;
        // Killed after so many records, wherever it is then.
        let mut left = 1 + *noise % 12;
        while let Some(frame) = link.next().unwrap() {
            heard.take(frame);
            left = left.saturating_sub(1);
            if left == 0 && !heard.ended {
                kills += 1;
                supervisor.signal(9);
                left = u64::MAX;
            }
        }
        let code = link.process.code();
        assert_eq!(code, if heard.ended { 0 } else { 3 });
        if heard.ended {
            break;
        }
        assert_eq!(supervisor.wait().signal(), Some(9));
        supervisor = take_over(&place.socket(), &dir.job());
    }
    assert_eq!(
        (heard.missing, heard.uncertain, heard.started),
        ([0, 0], 0, 1)
    );
    assert_eq!(
        (heard.exits.len(), heard.exits[0].0),
        (1, Status::Exited(7))
    );
    same(&heard.bytes[0], &sequence(1_000_000, 2_000_000));
    same(&heard.bytes[1], &sequence(1, 1_000_000));
    let _ = supervisor.wait();
    let finished = take_over(&place.socket(), &dir.job());
    assert_eq!(finished.code(), 0);
    assert_eq!(place.client().info().unwrap(), [], "the job is forgotten");
    kills
}

#[test]
fn a_job_that_cannot_be_executed_says_why() {
    let (place, dir) = (Place::new(), Scratch::new());
    assert_eq!(
        supervise(&place, job(&["/no/such/app"]), &dir.job()).code(),
        0
    );
    let failed = Status::Failed {
        step: Step::Exec,
        errno: Errno::ENOENT as i32,
    };
    let (heard, _) = hear(&dir.job());
    assert_eq!((heard.exits[0].0, heard.exits.len()), (failed, 1));
    assert_eq!((heard.at, heard.started, heard.ended), ([0, 0], 0, true));
    assert_eq!(person(&dir.job(), &[]).0, 127);
}

/// A control group of this test.
struct MemoryGroup(PathBuf);

impl MemoryGroup {
    /// On v1; `None` where there is none.
    fn new(name: &str) -> Option<Self> {
        let root = Path::new("/sys/fs/cgroup/memory");
        if !root.join("memory.limit_in_bytes").exists() {
            return None;
        }
        let path = root.join(format!("ostler-test-{}-{name}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Some(Self(path))
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

fn start_oom(group: &Path) -> (Process, ChildStdout, File) {
    let (theirs, ours) = hangup();
    let mut command = Command::new(env!("CARGO_BIN_EXE_oom"));
    command
        .arg(group)
        .env("OSTLER_HANGUP_FD", theirs.as_raw_fd().to_string())
        .stdout(Stdio::piped());
    let mut oom = Process::start(&mut command);
    let lines = oom.child.stdout.take().unwrap();
    (oom, lines, ours)
}

fn line(from: &mut ChildStdout) -> String {
    let mut line = String::new();
    let mut byte = [0];
    while readable(from, DEADLINE_MS) && from.read(&mut byte).unwrap() == 1 && byte[0] != b'\n' {
        line.push(byte[0].into());
    }
    line
}

#[test]
fn oom_tells_every_kill_and_the_end_of_the_group() {
    let Some(group) = MemoryGroup::new("kill") else {
        return;
    };
    fs::write(group.0.join("memory.limit_in_bytes"), "33554432").unwrap();
    let _ = fs::write(group.0.join("memory.memsw.limit_in_bytes"), "33554432");
    let (oom, mut lines, _hangup) = start_oom(&group.0);
    assert_eq!(line(&mut lines), "baseline 0");
    for kills in 1..=2 {
        let script = "import sys\nopen(sys.argv[1], 'w').write('0')\nx = bytearray(64 << 20)";
        let mut eater = Command::new("python3");
        let eater = Process::start(eater.args(["-c", script]).arg(group.0.join("cgroup.procs")));
        let killed = eater.wait().signal();
        assert_eq!(killed, Some(9));
        assert_eq!(line(&mut lines), format!("oom_kill {kills}"));
    }
    let (second, mut more, hangup) = start_oom(&group.0);
    assert_eq!(line(&mut more), "baseline 2");
    drop(hangup);
    assert_eq!(second.code(), 4);
    fs::remove_dir(&group.0).unwrap();
    assert_eq!(oom.code(), 3);
    assert_eq!(line(&mut lines), "");
}

/// Waits for as long as nothing but time can tell.
fn pause(milliseconds: u16) {
    let _ = poll(&mut [], PollTimeout::from(milliseconds));
}

#[test]
fn oom_tells_a_kill_at_once_after_wake_ups_without_one() {
    let Some(group) = MemoryGroup::new("deaf") else {
        return;
    };
    let limit = |file: &str, bytes: u64| {
        let _ = fs::write(group.0.join(file), bytes.to_string());
    };
    limit("memory.limit_in_bytes", 32 << 20);
    limit("memory.memsw.limit_in_bytes", 32 << 20);
    let (_oom, mut lines, _hangup) = start_oom(&group.0);
    assert_eq!(line(&mut lines), "baseline 0");
    // It has looked again and again since, with growing pauses; the last one has just begun.
    pause(2300);
    let script = "import sys\nopen(sys.argv[1], 'w').write('0')\nx = bytearray(64 << 20)";
    let mut eater = Command::new("python3");
    let eater = Process::start(eater.args(["-c", script]).arg(group.0.join("cgroup.procs")));
    assert_eq!(eater.wait().signal(), Some(9));
    assert!(
        readable(&lines, 1500),
        "not told within a second and a half"
    );
    assert_eq!(line(&mut lines), "oom_kill 1");
}

#[test]
fn oom_without_a_group_says_that_it_is_gone() {
    let dir = Scratch::new();
    let (oom, mut lines, _hangup) = start_oom(&dir.0.join("none"));
    assert_eq!((oom.code(), line(&mut lines).as_str()), (3, ""));
    let (oom, _lines, _hangup) = start_oom(&dir.0);
    assert_eq!(oom.code(), 1, "no memory group");
}

#[test]
fn oom_on_v2_ends_with_the_last_process_of_the_group() {
    let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(Path::new);
    let Some(root) = roots
        .into_iter()
        .find(|root| root.join("cgroup.controllers").exists())
    else {
        return;
    };
    let group = MemoryGroup(root.join(format!("ostler-test-{}-v2", std::process::id())));
    fs::create_dir(&group.0).unwrap();
    // The group as oom sees it: its life is real, its counters are ours where the host has no v2
    // memory.
    let dir = Scratch::new();
    std::os::unix::fs::symlink(group.0.join("cgroup.events"), dir.0.join("cgroup.events")).unwrap();
    fs::write(dir.0.join("memory.events"), "low 0\noom 1\noom_kill 3\n").unwrap();
    fs::write(
        dir.0.join("memory.events.local"),
        "low 0\noom 1\noom_kill 2\n",
    )
    .unwrap();
    let sleeper = Process::start(Command::new("sleep").arg("1000"));
    fs::write(group.0.join("cgroup.procs"), sleeper.child.id().to_string()).unwrap();
    let (oom, mut lines, _hangup) = start_oom(&dir.0);
    assert_eq!(
        [line(&mut lines), line(&mut lines)],
        ["local 2", "baseline 3"]
    );
    fs::write(dir.0.join("memory.events"), "low 0\noom 1\noom_kill 4\n").unwrap();
    sleeper.kill();
    assert_eq!(
        [line(&mut lines), line(&mut lines)],
        ["local 2", "oom_kill 4"]
    );
    assert_eq!(oom.code(), 3);
}
