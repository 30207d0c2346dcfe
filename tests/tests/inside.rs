//! `ostler run` and `ostler shell`: a person on the host goes into a container.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::process::{Command, Output, Stdio};
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{Winsize, openpty};
use serde_json::Value;
use tests::{Droplet, Host, Process, patience, tool};

/// Starts an app that sleeps; its handle.
async fn app(host: &Host, droplet: &str, index: u64) -> String {
    let mut message = host.message(droplet, &Droplet::shell("echo up; exec sleep 1000"));
    message["index"] = index.into();
    let answer = host.run(message).await;
    handle(&answer)
}

fn handle(answer: &Value) -> String {
    answer["handle"].as_str().expect("it has one").to_owned()
}

/// Runs it to its end with this input.
fn finish(command: &mut Command, input: &[u8]) -> Output {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    std::thread::scope(|scope| {
        // A command that reads nothing closes it.
        scope.spawn(move || drop(stdin.write_all(input)));
        child.wait_with_output().unwrap()
    })
}

fn said(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let code = output.status.code().expect("it was not killed");
    (code, text(&output.stdout), text(&output.stderr))
}

#[tokio::test]
async fn a_command_runs_with_its_streams_user_variables_limits_and_exit_code() {
    let mut host = Host::start().await;
    let handle = app(&host, "app", 0).await;
    // No agent is needed.
    host.kill9().await;
    let mut run = host.ostler("run");
    let script = "id -un; pwd; echo $A; ulimit -Sn; ulimit -Hn; cat; echo err >&2; exit 42";
    run.args([
        &handle[..],
        "--user",
        "vcap",
        "--env",
        "A=b c",
        "--dir",
        "/tmp",
    ]);
    run.args(["--rlimit", "nofile=50:60", "--", "sh", "-c", script]);
    let wanted = (
        42,
        "vcap\n/tmp\nb c\n50\n60\nin\n".to_owned(),
        "err\n".to_owned(),
    );
    assert_eq!(said(&finish(&mut run, b"in\n")), wanted);
    for (command, code) in [
        (&["sh", "-c", "kill -9 $$"][..], 137),
        (&["no-such-command"], 127),
        (&["/etc/passwd"], 126),
        // What looks like an option is the command's.
        (&["test", "--user", "=", "--user"], 0),
    ] {
        let mut run = host.ostler("run");
        run.arg(&handle).args(command);
        let (found, _, err) = said(&finish(&mut run, b""));
        assert_eq!(found, code, "{command:?}: {err}");
    }
    let mut nobody = host.ostler("run");
    nobody.args([&handle[..], "--user", "nobody-here", "--", "true"]);
    let (code, _, err) = said(&finish(&mut nobody, b""));
    assert_eq!(code, 125);
    assert!(err.contains("as 'nobody-here'"), "{err}");
}

/// Whoever is inside as the same user could keep it, and write to the host's disk for ever. What is to be read is the job's: it goes on
/// where the last one stopped.
#[tokio::test]
async fn what_a_job_writes_to_is_no_file_of_the_persons() {
    let host = Host::start().await;
    let handle = app(&host, "app", 0).await;
    let (input, output) = (host.base.join("../input"), host.base.join("../output"));
    std::fs::write(&input, "in\n".repeat(100)).unwrap();
    std::fs::write(&output, "before\n").unwrap();
    let append = || File::options().append(true).open(&output).unwrap();
    let script = "for fd in 1 2; do readlink /proc/self/fd/$fd | cut -d: -f1; done; head -c 30 | wc -l; \
                  for i in $(seq 200); do echo out $i; echo err $i >&2; done; exit 3";
    let mut read = File::open(&input).unwrap();
    let status = host
        .ostler("run")
        .args([&handle[..], "--user", "vcap", "--", "sh", "-c", script])
        .stdin(read.try_clone().unwrap())
        .stdout(append())
        .stderr(append())
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(3));
    let told = std::fs::read_to_string(&output).unwrap();
    let lines = (1..=200).map(|i| format!("out {i}\nerr {i}\n"));
    let wanted = format!(
        "before\n{}10\n{}",
        "pipe\n".repeat(2),
        lines.collect::<String>()
    );
    assert_eq!(told, wanted);
    assert_eq!(read.stream_position().unwrap(), 30);
    // A file that takes no more, whether the job still writes then or not.
    for (bytes, limit) in [(1000, 1), (1_000_000, 1)] {
        let script = format!("ulimit -f {limit}; trap '' XFSZ; exec \"$0\" \"$@\"");
        let output = host
            .ostler_by(&["bash", "-c", &script], "run")
            .args([&handle, "--", "head", "-c", &bytes.to_string(), "/dev/zero"])
            .stdout(append())
            .output()
            .unwrap();
        let (code, _, words) = said(&output);
        assert_eq!(code, 125, "{words}");
        let why = "wsh: write(standard output): EFBIG";
        assert!(words.contains(why), "{words}");
    }
}

#[tokio::test]
async fn a_large_input_comes_whole_and_ends() {
    const SIZE: usize = 16 << 20;
    let host = Host::start().await;
    app(&host, "app", 0).await;
    let input: Vec<u8> = (0..=250_u8).cycle().take(SIZE).collect();
    let mut run = host.ostler("run");
    run.args(["app", "--user", "vcap", "--", "sh", "-c", "cat; exit 3"]);
    let output = finish(&mut run, &input);
    assert_eq!(output.status.code(), Some(3));
    assert!(
        output.stdout == input,
        "{} bytes came back",
        output.stdout.len()
    );
    host.stop("app").await;
}

#[tokio::test]
async fn a_container_is_found_by_its_names_and_others_are_listed() {
    let host = Host::start().await;
    let [first, second] = [app(&host, "app", 0).await, app(&host, "app", 1).await];
    let find = |which: &str| {
        let mut run = host.ostler("run");
        said(&finish(run.args([which, "--", "hostname"]), b""))
    };
    let common = first
        .bytes()
        .zip(second.bytes())
        .take_while(|(a, b)| a == b)
        .count();
    let (name, _, err) = (find(&first).1, 0, find(&first).2);
    assert!(!name.is_empty(), "{err}");
    assert_eq!(
        find(&first[..=common]).1,
        name,
        "a beginning that only one has"
    );
    assert_eq!(find("app/0").1, name);
    assert_ne!(find("app/1").1, name);
    for (which, words) in [
        ("app", "more than one container is \"app\""),
        ("no-such-app", "no container is \"no-such-app\""),
    ] {
        let (code, out, err) = find(which);
        assert_eq!((code, out.as_str()), (1, ""));
        assert!(err.contains(words), "{err}");
        for line in [
            format!("{first}  RUNNING   app/0"),
            format!("{second}  RUNNING   app/1"),
        ] {
            assert!(err.contains(&line), "{err}");
        }
    }
    host.stop("app").await;
    // Its record may outlive it for a moment.
    let (code, _, err) = find(&first);
    let gone = ["does not answer: ", "no container is "]
        .iter()
        .any(|words| err.contains(words));
    assert!(code == 1 && gone, "{code} {err}");
}

#[tokio::test]
async fn a_stack_that_is_missing_keeps_nobody_out_of_what_runs() {
    let host = Host::start().await;
    app(&host, "app", 0).await;
    let config = host.base.with_file_name("agent.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    let without = text.replace("debian = \"", "debian = \"/no/such");
    assert_ne!(text, without);
    std::fs::write(&config, without).unwrap();
    let mut run = host.ostler("run");
    let (code, _, err) = said(&finish(run.args(["app", "--", "true"]), b""));
    assert_eq!(code, 0, "{err}");
    std::fs::write(&config, text).unwrap();
    host.stop("app").await;
}

#[tokio::test]
async fn signals_are_passed_to_the_command() {
    let host = Host::start().await;
    app(&host, "app", 0).await;
    for (signal, name, number) in [
        (nix::sys::signal::Signal::SIGTERM, "TERM", 15),
        (nix::sys::signal::Signal::SIGINT, "INT", 2),
        (nix::sys::signal::Signal::SIGHUP, "HUP", 1),
    ] {
        let script = format!(
            "trap 'echo got {name}; exit {number}' {name}; echo ready; while :; do sleep 0.1; done"
        );
        let mut run = host.ostler("run");
        run.args(["app", "--", "sh", "-c", &script]);
        let mut child = run
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdout = child.stdout.take().unwrap();
        let mut line = [0; 6];
        stdout.read_exact(&mut line).unwrap();
        assert_eq!(line, *b"ready\n");
        let wsh = Process::read(child.id().try_into().unwrap()).unwrap();
        assert_eq!(wsh.comm, "wsh", "nothing stands between");
        wsh.signal(signal);
        let mut rest = String::new();
        stdout.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, format!("got {name}\n"));
        assert_eq!(child.wait().unwrap().code(), Some(number));
    }
    host.stop("app").await;
}

/// Reads what a terminal shows until it contains this.
fn shows(screen: &mut File, seen: &mut String, what: &str) {
    let deadline = Instant::now() + patience();
    while !seen.contains(what) {
        assert!(Instant::now() < deadline, "no {what:?} in {seen:?}");
        let left = deadline - Instant::now();
        let mut ready = [PollFd::new(screen.as_fd(), PollFlags::POLLIN)];
        poll(&mut ready, PollTimeout::try_from(left).unwrap()).unwrap();
        if ready[0].any() != Some(true) {
            continue;
        }
        let mut buffer = [0; 4096];
        let length = screen.read(&mut buffer).unwrap();
        seen.push_str(&String::from_utf8_lossy(&buffer[..length]));
    }
}

#[tokio::test]
async fn a_shell_has_a_terminal_that_follows_the_persons() {
    let host = Host::start().await;
    let handle = app(&host, "app", 0).await;
    let size = Winsize {
        ws_row: 41,
        ws_col: 101,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let pty = openpty(Some(&size), None).unwrap();
    let path = std::fs::read_link(format!("/proc/self/fd/{}", pty.slave.as_raw_fd())).unwrap();
    let before = tool("stty", &["-F", path.to_str().unwrap(), "-g"]);
    // In a session of its own, so that the terminal is its controlling one and tells it of its size.
    let mut shell = host.ostler_by(&["setsid", "--ctty"], "shell");
    shell.args([&handle[..6], "--user", "vcap"]);
    shell.env("TERM", "dumb").env("SECRET", "host");
    let end = || Stdio::from(pty.slave.try_clone().unwrap());
    let mut child = shell
        .stdin(end())
        .stdout(end())
        .stderr(end())
        .spawn()
        .unwrap();
    let (mut screen, mut seen) = (File::from(pty.master.try_clone().unwrap()), String::new());
    screen
        .write_all(b"echo $(stty size) $(tty) $TERM $(id -un) x$SECRET.\n")
        .unwrap();
    shows(&mut screen, &mut seen, "41 101 /dev/pts/0 dumb vcap x.\r\n");
    // The kernel tells the foreground group; the shell inside sees it a moment later.
    tool(
        "stty",
        &["-F", path.to_str().unwrap(), "rows", "50", "cols", "132"],
    );
    screen
        .write_all(b"until stty size | grep 132; do sleep 0.05; done\n")
        .unwrap();
    shows(&mut screen, &mut seen, "\n50 132\r\n");
    // The keys for signals are the foreground job's.
    screen
        .write_all(b"sh -c 'trap \"echo got it; exit 5\" INT; echo slee''ping; while :; do sleep 0.1; done'\n")
        .unwrap();
    shows(&mut screen, &mut seen, "\nsleeping\r\n");
    screen.write_all(b"\x03").unwrap();
    shows(&mut screen, &mut seen, "got it\r\n");
    screen.write_all(b"echo $? is 5; exit 9\n").unwrap();
    shows(&mut screen, &mut seen, "\n5 is 5\r\n");
    assert_eq!(child.wait().unwrap().code(), Some(9));
    let after = tool("stty", &["-F", path.to_str().unwrap(), "-g"]);
    assert_eq!(before, after, "the person's terminal is as it was");
    host.stop("app").await;
}
