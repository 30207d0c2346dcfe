//! What a crash left can be read over the bus, byte for byte, whatever became of the agent, the app and the disk.

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tests::{Droplet, Host, Setup, Tree, rounds, tool};

/// Crashes are kept however full this machine's disk is.
const ANY_DISK: (&str, &str) = (
    "[network]",
    "[crashes]\nper_app = 2\nmax_block_usage = 1.0\nmax_inode_usage = 1.0\n[network]",
);

/// The crashes of `droplet`, newest first.
async fn list(host: &Host, droplet: &str) -> Vec<Value> {
    let all = json!({"droplet": droplet});
    let answer = host.request(&host.subject("logs"), &all).await;
    assert_eq!(answer["ok"], true, "{answer}");
    let crashes = answer["crashes"].as_array().unwrap().clone();
    assert_eq!(answer["matched"], crashes.len(), "{answer}");
    crashes
}

/// The crash of this instance, once it is kept.
async fn kept(host: &Host, droplet: &str, handle: &str) -> Value {
    let deadline = std::time::Instant::now() + tests::patience();
    loop {
        let crashes = list(host, droplet).await;
        if let Some(crash) = crashes.iter().find(|crash| crash["handle"] == handle) {
            return crash.clone();
        }
        assert!(
            std::time::Instant::now() < deadline,
            "{handle} of {droplet} is not kept: {crashes:?}\n{}",
            host.log()
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Runs `script` until it crashes and is kept; the crash.
async fn crash(host: &Host, droplet: &str, script: &str) -> Value {
    let message = host.message(droplet, &Droplet::shell(script));
    let answer = host.request(&host.subject("start"), &message).await;
    kept(host, droplet, answer["handle"].as_str().unwrap()).await
}

/// All that is kept of a file, piece by piece.
async fn read(host: &Host, crash: &Value, file: &Value) -> Vec<u8> {
    let number = |value: &Value| value.as_u64().unwrap();
    let (mut at, to) = (number(&file["from"]), number(&file["to"]));
    let mut bytes = Vec::new();
    loop {
        let request = json!({
            "droplet": crash["droplet"], "handle": crash["handle"], "file": file["name"], "offset": at,
        });
        let answer = host.request(&host.subject("logs"), &request).await;
        assert_eq!(answer["ok"], true, "{request} {answer}");
        for (key, value) in [
            ("offset", &json!(at)),
            ("from", &file["from"]),
            ("to", &file["to"]),
            ("handle", &crash["handle"]),
        ] {
            assert_eq!(&answer[key], value, "{request} {answer}");
        }
        let piece = match (answer["text"].as_str(), answer["base64"].as_str()) {
            (Some(text), None) => text.as_bytes().to_vec(),
            (None, Some(digits)) => decode(digits),
            _ => panic!("{answer}"),
        };
        let next = number(&answer["next"]);
        assert_eq!(next - at, piece.len() as u64, "{answer}");
        bytes.extend(piece);
        if next == to {
            return bytes;
        }
        assert!(next > at, "{answer}");
        at = next;
    }
}

/// Base 64 (RFC 4648).
fn decode(digits: &str) -> Vec<u8> {
    let alphabet: Vec<char> = ('A'..='Z')
        .chain('a'..='z')
        .chain('0'..='9')
        .chain(['+', '/'])
        .collect();
    let (mut word, mut bits, mut bytes) = (0_u32, 0, Vec::new());
    for digit in digits.chars().take_while(|digit| *digit != '=') {
        let value = alphabet.iter().position(|known| *known == digit).unwrap();
        word = word << 6 | u32::try_from(value).unwrap();
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            bytes.push(u8::try_from(word >> bits & 0xff).unwrap());
        }
    }
    bytes
}

fn file<'a>(crash: &'a Value, name: &str) -> &'a Value {
    let files = crash["files"].as_array().unwrap();
    let found = files.iter().find(|file| file["name"] == name);
    found.unwrap_or_else(|| panic!("no {name}: {crash}"))
}

fn names(crash: &Value) -> Vec<&str> {
    let files = crash["files"].as_array().unwrap().iter();
    files.map(|file| file["name"].as_str().unwrap()).collect()
}

/// What is in the directory of crashes.
fn directories(host: &Host) -> Vec<String> {
    let entries = std::fs::read_dir(host.base.join("crashes")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name != "lost+found").collect()
}

/// Prints and writes, and dies when it is told to.
const MORTAL: &str = r#"
perl -e 'print "line $_\n" for 1..2000'
perl -e 'print STDERR "\xff\xfe broken\n"'
printf 'ünïcödé %s\n' {1..500} > ../logs/app.log
mkdir ../logs/deep
perl -e 'print map { chr($_ % 256) } 0..9999' > ../logs/deep/raw.bin
trap 'exit 3' USR1
echo ready
while :; do sleep 0.05; done
"#;

/// Everything of it is kept as it was.
async fn is_whole(host: &Host, crash: &Value) {
    let lines: String = (1..=2000).map(|n| format!("line {n}\n")).collect();
    let log: String = (1..=500).map(|n| format!("ünïcödé {n}\n")).collect();
    let raw: Vec<u8> = (0..10_000_u32).map(|n| (n % 256) as u8).collect();
    let mut known = names(crash);
    known.sort_unstable();
    assert_eq!(
        known,
        ["logs/app.log", "logs/deep/raw.bin", "stderr", "stdout"],
        "{crash}"
    );
    for (name, bytes) in [
        ("stdout", format!("{lines}ready\n").as_bytes()),
        ("stderr", b"\xff\xfe broken\n"),
        ("logs/app.log", log.as_bytes()),
        ("logs/deep/raw.bin", &raw),
    ] {
        let is = read(host, crash, file(crash, name)).await;
        assert!(is == bytes, "{name}: {}", String::from_utf8_lossy(&is));
    }
    assert_eq!(crash["left_out"], 0, "{crash}");
}

#[tokio::test]
async fn what_a_crash_left_is_read_over_the_bus_also_after_a_restart() {
    // Small, so that files are read in many pieces.
    let config = std::env::temp_dir().join(format!("ostler-logs-{}", std::process::id()));
    std::fs::write(&config, "max_payload: 20000\n").unwrap();
    let mut host = Host::with(Setup {
        config: &[ANY_DISK],
        bus: &["--config", config.to_str().unwrap()],
        ..Default::default()
    })
    .await;
    std::fs::remove_file(&config).unwrap();
    let mut all = Vec::new();
    for round in 0..4 + 2 * rounds().min(10) {
        let droplet = format!("app-{round}");
        let mut output = host.output(&droplet).await;
        let mut exits = host.watch("droplet.exited").await;
        let answer = host
            .run(host.message(&droplet, &Droplet::shell(MORTAL)))
            .await;
        let handle = answer["handle"].as_str().unwrap().to_owned();
        output
            .until("its last line", |output| {
                output.text(0, "stdout").ends_with("ready\n")
            })
            .await;
        let tree = host.tree();
        let app = { tree.0.iter() }.find(|process| process.title() == "bash main.sh");
        let end = || app.expect("the app").signal(Signal::SIGUSR1);
        let mut status = 3;
        match round {
            0 => {
                end();
                kept(&host, &droplet, &handle).await;
                host.kill9().await;
            }
            1 => {
                end();
                exits.until("exit", |exit| exit["handle"] == *handle).await;
                host.kill9().await;
            }
            2 => {
                host.kill9().await;
                end();
                let dead = |_: &Tree| !app.unwrap().lives();
                host.tree_until("end of the app", dead).await;
            }
            3 => {
                host.kill9().await;
                tree.one("wshd").signal(Signal::SIGKILL);
                let dead = |tree: &Tree| tree.named("wshd").is_empty();
                host.tree_until("dead container", dead).await;
                status = -1;
            }
            luck => {
                end();
                tokio::time::sleep(Duration::from_millis((luck - 4) * 15)).await;
                host.kill9().await;
            }
        }
        host.start_agent().await;
        let crash = kept(&host, &droplet, &handle).await;
        assert_eq!(crash["exit_status"], status, "{round} {crash}");
        for (key, value) in [
            ("droplet", json!(droplet)),
            ("index", json!(0)),
            ("version", Host::fixture("dea.start")["version"].clone()),
            ("instance", answer["instance"].clone()),
            ("oom", json!(false)),
        ] {
            assert_eq!(crash[key], value, "{crash}");
        }
        is_whole(&host, &crash).await;
        all.push((droplet, crash));
    }
    // Neither is anything half, nor is anything of the containers left.
    assert_eq!(directories(&host).len(), all.len());
    host.tree_until("empty machine", |tree| tree.named("wshd").is_empty())
        .await;
    host.end(Signal::SIGHUP).await;
    host.start_agent().await;
    for (droplet, crash) in &all {
        assert_eq!(list(&host, droplet).await, std::slice::from_ref(crash));
    }
    is_whole(&host, &all[0].1).await;
    // Like everything of the agent's.
    host.end(Signal::SIGTERM).await;
    assert!(!host.base.join("crashes").exists());
}

#[tokio::test]
async fn a_crash_is_found_by_the_ids_that_its_host_tells() {
    let host = Host::with(Setup {
        config: &[ANY_DISK],
        ..Default::default()
    })
    .await;
    let crash = crash(&host, "app", "exit 3").await;
    let update = json!({"droplet": "app", "uris": [], "version": "newer"});
    assert_eq!(host.request("dea.update", &update).await["matched"], 1);
    let find = json!({"droplet": "app"});
    let found = host.request(&host.subject("find"), &find).await;
    let id = &found["instances"][0]["instance"];
    assert_ne!(*id, crash["instance"], "{found}");
    for filter in [
        json!({"droplet": "app", "instances": [id]}),
        json!({"droplet": "app", "version": "newer"}),
        json!({"droplet": "app", "instances": [crash["instance"]]}),
    ] {
        let answer = host.request(&host.subject("logs"), &filter).await;
        assert_eq!(answer["matched"], 1, "{filter} {answer}");
        assert_eq!(answer["crashes"][0]["handle"], crash["handle"], "{answer}");
    }
    let other = json!({"droplet": "app", "version": "other"});
    let answer = host.request(&host.subject("logs"), &other).await;
    assert_eq!(answer["matched"], 0, "{answer}");
}

#[tokio::test]
async fn the_newest_crashes_of_each_app_stay_until_they_are_old_whatever_became_of_it() {
    let mut host = Host::with(Setup {
        config: &[ANY_DISK],
        ..Default::default()
    })
    .await;
    let subject = host.subject("logs");
    let mut handles = Vec::new();
    for app in ["one", "two", "one", "one"] {
        let crash = crash(&host, app, "echo out; echo log > ../logs/log; exit 1").await;
        handles.push(crash["handle"].clone());
    }
    let of = |crashes: Vec<Value>| -> Vec<Value> {
        let handles = crashes.iter().map(|crash| crash["handle"].clone());
        handles.collect()
    };
    let (one, two) = (
        [handles[3].clone(), handles[2].clone()],
        [handles[1].clone()],
    );
    host.stop("one").await;
    // The oldest goes after the newest has come.
    let deadline = Instant::now() + tests::patience();
    while of(list(&host, "one").await) != one && Instant::now() < deadline {}
    assert_eq!(of(list(&host, "one").await), one);
    assert_eq!(of(list(&host, "two").await), two);
    assert_eq!(list(&host, "three").await, Vec::<Value>::new());
    // The filters of find, and the newest if there are more.
    for (filter, matched) in [
        (json!({"indices": [0]}), 2),
        (json!({"indices": [1]}), 0),
        (json!({"version": "v2"}), 0),
        (json!({"states": ["CRASHED"]}), 2),
        (json!({"handle": one[1]}), 1),
        (json!({"handle": two[0]}), 0),
    ] {
        let mut request = filter.clone();
        request["droplet"] = json!("one");
        let answer = host.request(&subject, &request).await;
        assert_eq!(answer["matched"], matched, "{request} {answer}");
    }
    let request = json!({"droplet": "one", "file": "logs/log", "offset": 1});
    let answer = host.request(&subject, &request).await;
    assert_eq!(
        (&answer["text"], &answer["handle"]),
        (&json!("og\n"), &one[0])
    );
    // An offset beyond the end is the end.
    let request = json!({"droplet": "one", "file": "logs/log", "offset": 1_u64 << 40});
    let answer = host.request(&subject, &request).await;
    assert_eq!((&answer["text"], &answer["next"]), (&json!(""), &json!(4)));
    for (request, code, words) in [
        (json!({}), "bad_field", "`droplet`"),
        (
            json!({"droplet": "one", "offset": 1}),
            "bad_field",
            "`file`",
        ),
        (json!({"droplet": "one", "file": 1}), "bad_field", "`file`"),
        (
            json!({"droplet": "one", "file": "stdout", "offset": -1}),
            "bad_field",
            "`offset`",
        ),
        (
            json!({"droplet": "one", "file": "../../id"}),
            "bad_field",
            "logs/log",
        ),
        (
            json!({"droplet": "three", "file": "stdout"}),
            "unknown_app",
            "kept",
        ),
    ] {
        let answer = host.request(&subject, &request).await;
        assert_eq!(answer["error"]["code"], code, "{request} {answer}");
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(message.contains(words), "{request} {message}");
    }
    // An hour passes for one of them, and an agent was killed in the middle of keeping and of removing others.
    for handle in &handles {
        // Else it would be kept once more.
        removed(&host, handle.as_str().unwrap()).await;
    }
    host.kill9().await;
    let place = |handle: &Value| host.base.join("crashes").join(handle.as_str().unwrap());
    let path = place(&one[0]).join("record.json");
    let mut record: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    record["crash"]["time"] = json!(record["crash"]["time"].as_f64().unwrap() - 3601.0);
    std::fs::write(&path, record.to_string()).unwrap();
    for name in ["0123456789a.new", "0123456789b"] {
        let half = host.base.join("crashes").join(name);
        std::fs::create_dir(&half).unwrap();
        std::fs::write(half.join("0"), "half").unwrap();
    }
    host.start_agent().await;
    host.tree_until("two directories", |_| directories(&host).len() == 2)
        .await;
    assert_eq!(of(list(&host, "one").await), one[1..]);
    assert_eq!(of(list(&host, "two").await), two);
    host.kill9().await;
    assert!(host.clean().await.success());
    assert!(!host.base.join("crashes").exists());
}

#[tokio::test]
async fn what_an_app_printed_before_a_reboot_is_kept() {
    let mut host = Host::with(Setup {
        config: &[ANY_DISK],
        ..Default::default()
    })
    .await;
    let mut output = host.output("app").await;
    let answer = host.run(host.message("app", &Droplet::shell(MORTAL))).await;
    output
        .until("its last line", |output| {
            output.text(0, "stdout").ends_with("ready\n")
        })
        .await;
    host.kill9().await;
    let mut hellos = host.watch("dea.start").await;
    host.boot().await;
    hellos.next().await;
    let crash = kept(&host, "app", answer["handle"].as_str().unwrap()).await;
    assert_eq!(crash["exit_description"], "host rebooted", "{crash}");
    let stderr = read(&host, &crash, file(&crash, "stderr")).await;
    assert_eq!(stderr, b"\xff\xfe broken\n");
    let stdout = read(&host, &crash, file(&crash, "stdout")).await;
    assert!(stdout.ends_with(b"line 2000\nready\n"));
    // Nobody has unmounted an image.
    if host.base.join("containers").exists() && host.log().contains("disk=\"images\"") {
        assert_eq!(names(&crash), ["stdout", "stderr"], "{crash}");
    }
}

/// Links and the like in the directory of logs; what is newest last.
const HOSTILE: &str = r#"
cd ../logs
echo mine > mine
mkfifo fifo
ln -s /etc/shadow shadow
ln -s /etc etc
ln -s / root
ln -s ../../../../../../etc/passwd up
echo linked > ../tmp/linked
ln ../tmp/linked hard
perl -MSocket -e 'socket(S, PF_UNIX, SOCK_STREAM, 0); bind(S, sockaddr_un("socket"))'
d=deep; for n in {1..30}; do mkdir -p $d; d=$d/d; done; echo far > deep/d/d/far
printf 'named\n' > $'new\nline\x1b[31m\xff'
touch "$(printf 'x%.0s' {1..255})"
truncate -s 1G sparse
mkdir empty
exit 1
"#;

#[tokio::test]
async fn a_hostile_directory_of_logs_reaches_nothing_and_holds_nothing_up() {
    let host = Host::with(Setup {
        config: &[ANY_DISK],
        ..Default::default()
    })
    .await;
    host.run(host.message("neighbour", &Droplet::sample("sleeper")))
        .await;
    let crash_of = crash(&host, "links", HOSTILE).await;
    let mut known = names(&crash_of);
    known.sort_unstable();
    assert_eq!(
        known,
        [
            "logs/deep/d/d/far",
            "logs/mine",
            "logs/new\\nline\\x1b[31m\\xff",
            "logs/sparse",
            "stderr",
            "stdout"
        ],
        "{crash_of}"
    );
    for (name, bytes) in [
        ("logs/deep/d/d/far", "far\n"),
        ("logs/mine", "mine\n"),
        ("logs/new\\nline\\x1b[31m\\xff", "named\n"),
        ("stderr", ""),
    ] {
        let is = read(&host, &crash_of, file(&crash_of, name)).await;
        assert_eq!(String::from_utf8_lossy(&is), bytes, "{name}");
    }
    let sparse = file(&crash_of, "logs/sparse");
    assert_eq!(
        (&sparse["from"], &sparse["to"]),
        (&json!((1 << 30) - (256 << 10)), &json!(1 << 30))
    );
    let zeros = read(&host, &crash_of, sparse).await;
    assert!(zeros.iter().all(|byte| *byte == 0));
    assert!(crash_of["left_out"].as_u64().unwrap() >= 8, "{crash_of}");

    // More than anybody looks at, and more than is kept.
    let flood = "cd ../logs; perl -e 'for (1..20000) { open F, \">\", $_; print F \"x\" x 30000 if $_ > 19900 }'\n\
                 perl -e 'print \"y\" x 63, \"\\n\" for 1..20000'; exit 1";
    let crash_of = crash(&host, "flood", flood).await;
    assert!(names(&crash_of).len() > 20, "{crash_of}");
    assert!(crash_of["left_out"].as_u64().unwrap() > 9000, "{crash_of}");
    let sizes = crash_of["files"].as_array().unwrap().iter();
    let sizes = sizes.map(|file| file["to"].as_u64().unwrap() - file["from"].as_u64().unwrap());
    assert_eq!(sizes.sum::<u64>(), 1 << 20, "{crash_of}");
    let stdout = file(&crash_of, "stdout");
    assert_eq!(stdout["to"], 20_000 * 64);
    let is = read(&host, &crash_of, stdout).await;
    let line = format!("{}\n", "y".repeat(63));
    assert_eq!(is.len(), (256 << 10) - 64, "whole lines only");
    assert!(is.chunks(64).all(|piece| piece == line.as_bytes()));

    let many = "cd ../logs; touch {1..100}; exit 1";
    let crash_of = crash(&host, "many", many).await;
    assert_eq!(names(&crash_of).len(), 64);
    assert_eq!(crash_of["left_out"], 100 - 62, "{crash_of}");

    // The directory itself leads to the stack's and the host's.
    for (app, target) in [
        ("swapped", "/etc"),
        ("looped", "logs"),
        ("above", "../../.."),
    ] {
        let script = format!("rm -rf ../logs; ln -s {target} ../logs; exit 1");
        let crash_of = crash(&host, app, &script).await;
        assert_eq!(names(&crash_of), ["stdout", "stderr"], "{crash_of}");
    }
    let one = |tree: &Tree| tree.named("wshd").len() == 1;
    host.tree_until("containers removed", one).await;
    host.stop("neighbour").await;
}

/// A small file system where crashes are kept, under an agent that finds it there. Thawed, and away, when this is
/// dropped.
struct Small(PathBuf);

impl Small {
    async fn below(host: &mut Host) -> Self {
        host.end(Signal::SIGHUP).await;
        let image = host.base.with_file_name("small.img").display().to_string();
        let place = host.base.join("crashes");
        let text = place.display().to_string();
        tool("truncate", &["-s", "16M", &image]);
        let options = ["-q", "-m", "0", "-N", "256", "-O", "^has_journal"];
        tool("mkfs.ext4", &[&options[..], &[&image]].concat());
        tool("mount", &["-o", "loop", &image, &text]);
        let small = Self(place);
        host.start_agent().await;
        small
    }

    /// Bytes in use, and those that can be.
    fn bytes(&self) -> (u64, u64) {
        let place = self.0.display().to_string();
        let text = tool("df", &["--block-size=1", "--output=used,avail", &place]);
        let mut words = text.lines().nth(1).unwrap().split_whitespace();
        let mut number = || words.next().unwrap().parse::<u64>().unwrap();
        let used = number();
        (used, used + number())
    }

    fn take(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.0.join(name);
        let (length, text) = (bytes.to_string(), path.display().to_string());
        tool("fallocate", &["--length", &length, &text]);
        path
    }

    fn freeze(&self, how: &str) {
        tool("fsfreeze", &[how, &self.0.display().to_string()]);
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let place = self.0.display();
        // Whoever waited for it may still be at it.
        let away = format!(
            "fsfreeze --unfreeze {place} 2>/dev/null; for n in $(seq 100); do umount {place} && exit; sleep 0.1; done; exit 1"
        );
        tool("sh", &["-c", &away]);
    }
}

/// Waits until nothing of a container is on the disk: an agent gives up a crash that cannot be kept after half a
/// minute at the longest.
async fn removed(host: &Host, handle: &str) {
    let place = host.base.join("containers").join(handle);
    let deadline = std::time::Instant::now() + tests::patience() * 2;
    while place.exists() {
        assert!(
            std::time::Instant::now() < deadline,
            "{handle} stays\n{}",
            host.log()
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Starts what crashes at once, and waits until its container is removed; its handle.
async fn crash_without_room(host: &Host, droplet: &str) -> String {
    let message = host.message(droplet, &Droplet::shell("echo out; exit 1"));
    let mut exits = host.watch("droplet.exited").await;
    let answer = host.request(&host.subject("start"), &message).await;
    let handle = answer["handle"].as_str().unwrap().to_owned();
    exits.until("exit", |exit| exit["handle"] == *handle).await;
    removed(host, &handle).await;
    handle
}

#[tokio::test]
async fn where_the_disk_is_too_full_droplets_of_past_apps_go_before_what_crashes_left() {
    let mut host = Host::start().await;
    let sleeper = Droplet::sample("sleeper");
    host.run(host.message("past", &sleeper)).await;
    host.stop("past").await;
    let crash_of = crash(&host, "crashed", "exit 1").await;
    // Its droplet is not one that was asked for a moment ago.
    let small = Small::below(&mut host).await;
    let left = host.base.join("droplets");
    let droplets = || std::fs::read_dir(&left).unwrap().count();
    assert_eq!(droplets(), 2);
    let (used, all) = small.bytes();
    let full = small.take("full", all * 9 / 10 - used);
    let gone = |_: &Tree| droplets() == 1;
    host.tree_until("droplets of what is here alone", gone)
        .await;
    std::fs::remove_file(full).unwrap();
    // It comes again.
    let scale = json!({"droplet": "past", "instances": 1, "wait": "running"});
    let scaled = host.request(&host.subject("scale"), &scale).await;
    assert_eq!(scaled["ok"], true, "{scaled}");
    drop(crash_of);
    host.stop("past").await;
    host.end(Signal::SIGHUP).await;
    drop(small);
    host.start_agent().await;
}

#[tokio::test]
async fn a_disk_that_is_full_or_hangs_loses_crashes_and_nothing_else() {
    let config = ("[network]", "[crashes]\nmax_kb = 1024\n[network]");
    let mut host = Host::with(Setup {
        config: &[config],
        ..Default::default()
    })
    .await;
    let small = Small::below(&mut host).await;
    let print = "perl -e 'print \"x\" x 300000'; exit 1";
    let old = crash(&host, "old", print).await;
    crash(&host, "young", print).await;
    // A little more than four fifths: the oldest goes, and no other.
    let (used, all) = small.bytes();
    let most = small.take("most", all * 4 / 5 - used + (100 << 10));
    let gone = |_: &Tree| {
        !host
            .base
            .join("crashes")
            .join(old["handle"].as_str().unwrap())
            .exists()
    };
    host.tree_until("disk without the oldest", gone).await;
    let told = |_: &Tree| host.log().contains("removed=1");
    host.tree_until("word of it", told).await;
    assert_eq!(list(&host, "old").await, Vec::<Value>::new());
    assert_eq!(list(&host, "young").await.len(), 1);
    // The same of inodes.
    std::fs::remove_file(&most).unwrap();
    let many = small.0.join("many");
    std::fs::create_dir(&many).unwrap();
    for number in 0..220 {
        std::fs::write(many.join(number.to_string()), "").unwrap();
    }
    host.tree_until("disk without crashes", |_| directories(&host) == ["many"])
        .await;
    std::fs::remove_dir_all(&many).unwrap();
    assert_eq!(list(&host, "young").await, Vec::<Value>::new());

    // Full: the container goes all the same.
    let (used, all) = small.bytes();
    let full = small.take("full", all - used);
    crash_without_room(&host, "unlucky").await;
    host.logged(0, "what a crash left is not kept").await;
    assert_eq!(list(&host, "unlucky").await, Vec::<Value>::new());
    let half = |name: &Path| name.to_string_lossy().ends_with(".new");
    assert!(!directories(&host).iter().any(|name| half(Path::new(name))));
    std::fs::remove_file(&full).unwrap();
    let fine = crash(&host, "fine", "echo out; exit 1").await;
    small.freeze("--freeze");
    tokio::join!(
        crash_without_room(&host, "stuck"),
        crash_without_room(&host, "stuck-too")
    );
    host.run(host.message("neighbour", &Droplet::sample("sleeper")))
        .await;
    host.stop("neighbour").await;
    assert_eq!(read(&host, &fine, file(&fine, "stdout")).await, b"out\n");
    small.freeze("--unfreeze");
    // It works again, and what came too late has left nothing half.
    crash(&host, "again", "echo out; exit 1").await;
    let whole = |_: &Tree| !directories(&host).iter().any(|name| half(Path::new(name)));
    host.tree_until("nothing half", whole).await;
}
