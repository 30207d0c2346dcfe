//! With a real bash, in the shape that a container has: bash, startup, the app.

#![allow(
    clippy::disallowed_methods,
    reason = "the script is tested as a process of its own"
)]

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::*;

/// A `/home/vcap` somewhere else.
struct Home(PathBuf);

impl Home {
    fn new(command: &str) -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("ostler startup '{}-{number}", std::process::id());
        let home = Self(std::env::temp_dir().join(name));
        fs::create_dir_all(home.path("app/.profile.d")).unwrap();
        let script = startup(&StartCommand::Command(command.to_owned()), None).unwrap();
        home.write("startup", &script, 0o755);
        home
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.join(path)
    }

    fn write(&self, path: &str, text: &str, mode: u32) {
        fs::write(self.path(path), text).unwrap();
        fs::set_permissions(self.path(path), fs::Permissions::from_mode(mode)).unwrap();
    }

    /// Starts the job in a process group of its own.
    fn start(&self) -> Run {
        let [program, arguments @ ..] = JOB;
        let child = Command::new(program)
            .args(arguments)
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/bin:/bin")
            .env("GEM_PATH", "/gems")
            .env("HOME", self.path("app"))
            .current_dir(&self.0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .unwrap();
        Run(child)
    }

    fn run(&self) -> Ended {
        self.start().end()
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

struct Run(Child);

/// How it ended: status, stdout, stderr.
type Ended = (Option<i32>, String, String);

impl Run {
    fn line(&mut self) -> String {
        // Byte by byte: what follows the line stays in the pipe.
        let mut line = String::new();
        let pipe = self.0.stdout.as_mut().unwrap();
        BufReader::with_capacity(1, pipe)
            .read_line(&mut line)
            .unwrap();
        line.trim_end().to_owned()
    }

    fn signal_all(&self, signal: Signal) {
        killpg(Pid::from_raw(self.0.id().try_into().unwrap()), signal).unwrap();
    }

    /// Until both shells sleep, which they do only to wait for their child. The app has spoken, so
    /// both exist.
    fn shells_wait(&self) {
        let bash = self.0.id().to_string();
        let children = fs::read_to_string(format!("/proc/{bash}/task/{bash}/children")).unwrap();
        for pid in [bash.as_str(), children.trim()] {
            let sleeps = || {
                fs::read_to_string(format!("/proc/{pid}/stat"))
                    .unwrap()
                    .contains(") S ")
            };
            while !sleeps() {
                std::thread::yield_now();
            }
        }
    }

    fn end(mut self) -> Ended {
        let (mut out, mut err) = (String::new(), String::new());
        self.0
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut out)
            .unwrap();
        self.0
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut err)
            .unwrap();
        let status = self.0.wait().unwrap();
        assert_eq!(status.signal(), None);
        (status.code(), out, err)
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if self.0.try_wait().unwrap().is_none() {
            self.signal_all(Signal::SIGKILL);
            self.0.wait().unwrap();
        }
    }
}

fn ended(code: i32, out: &str, err: &str) -> Ended {
    (Some(code), out.to_owned(), err.to_owned())
}

#[test]
fn exit_codes_come_through() {
    for code in [0, 1, 7, 126, 255] {
        let home = Home::new(&format!("echo out; echo err >&2; exit {code}"));
        assert_eq!(home.run(), ended(code, "out\n", "err\n"));
    }
    let home = Home::new("nosuchcommand");
    let (code, _, err) = home.run();
    assert_eq!(code, Some(127));
    assert!(err.contains("nosuchcommand"), "{err}");
}

#[test]
fn a_killed_app_is_128_and_the_signal_without_a_word_of_ours() {
    for (signal, code) in [("KILL", 137), ("TERM", 143), ("SEGV", 139), ("INT", 130)] {
        let home = Home::new(&format!("ulimit -c 0; kill -{signal} $$; sleep 60"));
        assert_eq!(home.run(), ended(code, "", ""), "{signal}");
    }
}

#[test]
fn a_signal_to_all_ends_the_app_and_the_shells_tell_how() {
    for (signal, code) in [
        (Signal::SIGTERM, 143),
        (Signal::SIGINT, 130),
        (Signal::SIGQUIT, 131),
    ] {
        // Not `echo ready` of bash, which would still ignore a QUIT that comes before its exec.
        let home = Home::new("ulimit -c 0; exec tail -f ../ready");
        home.write("ready", "ready\n", 0o644);
        let mut run = home.start();
        assert_eq!(run.line(), "ready");
        // An INT just when bash begins to wait meets a flaw of bash.
        run.shells_wait();
        run.signal_all(signal);
        assert_eq!(run.end(), ended(code, "", ""), "{signal}");
    }
}

#[test]
fn an_app_that_handles_term_takes_its_time_and_its_own_code() {
    let home = Home::new("");
    // It goes on only after a second line came in through a fifo: the shells must wait all the while.
    let fifo = home.path("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let app = "trap 'echo stopping; read line < ../fifo; echo $line; exit 42' TERM; \
               echo ready; while :; do sleep 60 & wait; kill $!; done";
    let script = startup(&StartCommand::Command(app.to_owned()), None).unwrap();
    home.write("startup", &script, 0o755);
    let mut run = home.start();
    assert_eq!(run.line(), "ready");
    run.signal_all(Signal::SIGTERM);
    assert_eq!(run.line(), "stopping");
    fs::write(&fifo, "done\n").unwrap();
    let (code, out, _) = run.end();
    assert_eq!((code, out.as_str()), (Some(42), "done\n"));
}

#[test]
fn the_processes_bear_their_names() {
    let home = Home::new(
        "echo $(cat /proc/$PPID/comm); \
         read -r _ _ _ parent _ < /proc/$PPID/stat; cat /proc/$parent/comm; cat ../run.pid; echo $$",
    );
    let (code, out, err) = home.run();
    let lines: Vec<_> = out.lines().collect();
    assert_eq!((code, err.as_str()), (Some(0), ""));
    assert_eq!(lines[..2], ["startup", "bash"]);
    assert_eq!(lines[2], lines[3], "run.pid is the app's pid");
}

#[test]
fn the_app_gets_default_signals_and_no_descriptor_of_ours() {
    let home = Home::new(
        "while read -r name set; do case $name in Sig[BI]*) echo $name $set; esac; \
         done < <(exec cat /proc/self/status); ls /proc/self/fd",
    );
    let (_, out, _) = home.run();
    let words: Vec<_> = out.split_whitespace().collect();
    for (label, set) in [("SigBlk:", words[1]), ("SigIgn:", words[3])] {
        assert!(words.contains(&label), "{out}");
        // Real-time signals are as the test's own parent left them.
        let standard = u64::from_str_radix(set, 16).unwrap() & 0x7fff_ffff;
        assert_eq!(standard, 0, "{label}");
    }
    // 3 is the directory that ls itself reads; higher ones are inherited from whoever runs the tests.
    let inherited = Command::new("ls")
        .arg("/proc/self/fd")
        .output()
        .unwrap()
        .stdout;
    let inherited = String::from_utf8(inherited).unwrap();
    assert_eq!(words[4..], inherited.split_whitespace().collect::<Vec<_>>());
}

#[test]
fn the_place_the_umask_and_the_variables_are_those_of_the_dea() {
    let home = Home::new(
        "pwd; echo $DROPLET_BASE_DIR; umask; echo ${GEM_PATH-unset}; env | grep -c ^ostler; touch x",
    );
    let (code, out, err) = home.run();
    let base = home.0.display();
    assert_eq!(out, format!("{base}/app\n{base}\n0077\nunset\n0\n"));
    assert_eq!((code, err.as_str()), (Some(0), ""));
    assert_eq!(
        home.path("app/x").metadata().unwrap().permissions().mode() & 0o777,
        0o600
    );
}

#[test]
fn profile_scripts_are_sourced_in_order() {
    let home = Home::new("echo $ORDER; pwd");
    // Whatever they do to the shell, the app still starts in its place.
    home.write(
        "app/.profile.d/b.sh",
        "ORDER=$ORDER:b; cd /; set -eu; DROPLET_BASE_DIR=/x",
        0o644,
    );
    home.write("app/.profile.d/a.sh", "export ORDER=a", 0o644);
    home.write(
        "app/.profile.d/c.sh",
        "ORDER=$ORDER:c; false || true",
        0o644,
    );
    home.write("app/.profile.d/d.txt", "ORDER=never", 0o644);
    fs::create_dir(home.path("app/.profile.d/.hidden.sh")).unwrap();
    assert_eq!(
        home.run(),
        ended(0, &format!("a:b:c\n{}/app\n", home.0.display()), "")
    );
    // With `set -e` from above the code still comes through.
    let script = startup(&StartCommand::Command("exit 9".to_owned()), None).unwrap();
    home.write("startup", &script, 0o755);
    assert_eq!(home.run(), ended(9, "", ""));
}

#[test]
fn a_stop_before_the_app_started_starts_none() {
    let home = Home::new("echo app");
    home.write("app/.profile.d/slow.sh", "echo ready; sleep 60", 0o644);
    let mut run = home.start();
    assert_eq!(run.line(), "ready");
    run.signal_all(Signal::SIGTERM);
    let (code, out, _) = run.end();
    assert_eq!((code, out.as_str()), (Some(143), ""));
}

#[test]
fn hostile_commands_are_one_argument_of_bash() {
    for (command, out) in [
        ("echo 'a  b' \"c'd\"", "a  b c'd\n"),
        ("echo a\necho b", "a\nb\n"),
        (r"echo \\ '\'", "\\ \\\n"),
        ("echo $((1+1)) `echo x` $(echo y) | cat", "2 x y\n"),
        ("')'; echo ) 2>/dev/null || true", ""),
        ("echo '%s' \u{e9}; #", "%s \u{e9}\n"),
        ("cat <<E\n$HOME'\nE\n", "HOME'\n"),
        ("echo a\0b", "ab\n"),
        ("echo -n ''\\'''", "'"),
    ] {
        let home = Home::new(command);
        let (code, got, _) = home.run();
        let out = out.replace("HOME", &home.path("app").display().to_string());
        if command.starts_with("')'") {
            // A syntax error is the inner bash's own: nothing of it reaches our script.
            assert_eq!((code, got.as_str()), (Some(2), ""), "{command}");
        } else {
            assert_eq!((code, got), (Some(0), out), "{command}");
        }
    }
}

#[test]
fn a_droplet_without_an_app_directory_says_so() {
    let home = Home::new("echo app");
    fs::remove_dir_all(home.path("app")).unwrap();
    let (code, out, err) = home.run();
    assert_eq!((code, out.as_str()), (Some(1), ""));
    assert!(err.contains("No such file"), "{err}");
}

#[test]
fn an_old_droplet_runs_its_own_script() {
    assert_eq!(startup(&StartCommand::OwnStartup, None), None);
    let home = Home::new("");
    home.write(
        "startup",
        "#!/bin/bash\necho own; umask; pwd; exit 5\n",
        0o755,
    );
    assert_eq!(
        home.run(),
        ended(5, &format!("own\n0077\n{}\n", home.0.display()), "")
    );
    assert!(Path::new(PATH).is_relative());
}
