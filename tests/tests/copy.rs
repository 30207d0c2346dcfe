//! `ostler cp`: files and directories between the host and a container.

use nix::sys::signal::Signal;
use std::fs::{self, Permissions};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use tests::{Droplet, Host, patience, tool};

async fn app(host: &Host) {
    let message = host.message("app", &Droplet::shell("echo up; exec sleep 1000"));
    host.run(message).await;
}

/// What a script prints in the container.
fn inside(host: &Host, user: &str, script: &str) -> String {
    let mut run = host.ostler("run");
    run.args(["app", "--user", user, "--", "sh", "-c", script]);
    let output = run.stdin(Stdio::null()).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Exit code, and what is said.
fn cp(host: &Host, arguments: &[&str]) -> (i32, String) {
    let output = host.ostler("cp").args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code().unwrap(), said)
}

/// A directory of the host's for one test.
fn desk(host: &Host) -> PathBuf {
    let desk = host.base.with_file_name("desk");
    fs::create_dir(&desk).unwrap();
    desk
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[tokio::test]
async fn a_tree_goes_in_and_comes_back() {
    let host = Host::start().await;
    app(&host).await;
    let desk = desk(&host);
    let tree = desk.join("tree");
    fs::create_dir_all(tree.join("sub")).unwrap();
    fs::write(tree.join("sub/program"), "#!/bin/sh\necho it runs\n").unwrap();
    fs::set_permissions(tree.join("sub/program"), Permissions::from_mode(0o6750)).unwrap();
    fs::hard_link(tree.join("sub/program"), tree.join("second")).unwrap();
    symlink("sub/program", tree.join("link")).unwrap();
    assert_eq!(
        cp(&host, &["--user", "vcap", text(&tree), "app:put"]),
        (0, String::new())
    );
    let script = "cd put; stat -c '%n %a %U %h %F' sub/program second link; ./link";
    assert_eq!(
        inside(&host, "vcap", script),
        "sub/program 750 vcap 1 regular file\nsecond 750 vcap 1 regular file\n\
         link 777 vcap 1 symbolic link\nit runs\n"
    );
    let back = desk.join("back");
    assert_eq!(
        cp(&host, &["app:/home/vcap/put/.", text(&back)]),
        (0, String::new())
    );
    let meta = fs::symlink_metadata(back.join("sub/program")).unwrap();
    assert_eq!((meta.mode(), meta.uid(), meta.gid()), (0o100_750, 0, 0));
    assert_eq!(
        fs::read_link(back.join("link")).unwrap(),
        Path::new("sub/program")
    );
    // As streams, with the links materialised.
    let mut out = host.ostler("cp");
    let stream = out
        .args(["--follow", "app:/home/vcap/put", "-"])
        .output()
        .unwrap();
    assert!(stream.status.success());
    fs::write(desk.join("put.tar"), stream.stdout).unwrap();
    let listed = tool("tar", &["-tvf", text(&desk.join("put.tar"))]);
    assert!(
        listed.contains("put/link\n") && !listed.contains("->"),
        "{listed}"
    );
    let mut into = host.ostler("cp");
    let stdin = fs::File::open(desk.join("put.tar")).unwrap();
    assert!(
        into.args(["-", "app:/tmp"])
            .stdin(stdin)
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(
        inside(&host, "root", "/tmp/put/link; stat -c %U /tmp/put"),
        "it runs\nroot\n"
    );
    host.stop("app").await;
}

#[tokio::test]
async fn what_a_tenant_has_made_leads_nowhere_and_blocks_nobody() {
    let host = Host::start().await;
    app(&host).await;
    let desk = desk(&host);
    inside(
        &host,
        "vcap",
        "mkdir trap; cd trap; ln -s /etc etc; ln -s ../../../../../../etc up; mkfifo fifo; echo x > file; \
         printf '%0.sy' $(seq 255) | xargs touch; touch \"$(printf 'a\\nb\\033[31m')\"; \
         i=0; while [ $i -lt 300 ]; do mkdir d; cd d; i=$((i+1)); done",
    );
    let (code, said) = cp(&host, &["app:/home/vcap/trap", text(&desk)]);
    assert_eq!(code, 1);
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines.len(), 3, "{said}");
    assert!(said.contains("\"trap/fifo\" is passed over: no file, directory or link"));
    assert!(said.contains("\": it lies too deep\n"));
    assert!(said.ends_with("ostler: not everything could be copied as it was\n"));
    let copied = desk.join("trap");
    for link in ["etc", "up"] {
        assert!(
            fs::symlink_metadata(copied.join(link))
                .unwrap()
                .is_symlink()
        );
    }
    assert!(copied.join("a\nb\u{1b}[31m").exists() && copied.join("y".repeat(255)).exists());
    // A second copy meets the links that the first one made, and leaves where they lead alone.
    let before = fs::read_dir("/etc").unwrap().count();
    inside(
        &host,
        "vcap",
        "cd trap; rm etc; mkdir etc; echo evil > etc/evil",
    );
    cp(&host, &["app:/home/vcap/trap", text(&desk)]);
    assert_eq!(fs::read_dir("/etc").unwrap().count(), before);
    assert_eq!(
        fs::read_to_string(copied.join("etc/evil")).unwrap(),
        "evil\n"
    );
    // What a copy has made is no way to anywhere for the next one, unless that is asked for.
    inside(&host, "vcap", "ln -s /etc report");
    let report = desk.join("report");
    let again = ["app:/home/vcap/report", text(&report)];
    assert_eq!(cp(&host, &again), (0, String::new()));
    inside(&host, "vcap", "rm report; echo evil > report");
    let (code, said) = cp(&host, &again);
    let refused = "is a symlink: name what it leads to, or end it with a slash\n";
    assert!(code == 1 && said.ends_with(refused), "{said}");
    assert_eq!(fs::read_dir("/etc").unwrap().count(), before);
    fs::remove_file(&report).unwrap();
    fs::create_dir(desk.join("other")).unwrap();
    symlink("other", &report).unwrap();
    let into = format!("{}/", text(&report));
    assert_eq!(cp(&host, &[again[0], &into]), (0, String::new()));
    assert_eq!(
        fs::read_to_string(desk.join("other/report")).unwrap(),
        "evil\n"
    );
    // More than is wanted.
    inside(&host, "vcap", "truncate -s 2M big; mkdir -m 0 closed");
    let (code, said) = cp(&host, &["--max-mb", "1", "app:/home/vcap/big", "-"]);
    assert_eq!(
        (code, said.trim_end()),
        (1, "ostler: more than 1048576 bytes")
    );
    let (code, said) = cp(&host, &["--max-mb", "1", "app:/home/vcap/big", text(&desk)]);
    assert_eq!(
        (code, said.as_str()),
        (1, "ostler: more than 1048576 bytes\n")
    );
    // The user's rights, and no more.
    let (code, said) = cp(&host, &["--user", "vcap", "app:/etc/shadow", text(&desk)]);
    assert_eq!(code, 1);
    assert!(
        said.contains("\"shadow\": it cannot be read: Permission denied"),
        "{said}"
    );
    assert!(!desk.join("shadow").exists());
    host.stop("app").await;
    tool("rm", &["-rf", text(&desk)]);
}

/// What the descriptors of a process lead to, sorted: paths, and the kinds of what has none.
fn open_files(proc: &Path) -> Vec<String> {
    let mut files: Vec<String> = fs::read_dir(proc.join("fd"))
        .unwrap()
        // It may close one meanwhile.
        .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
        .map(|link| text(&link).split(':').next().unwrap().to_owned())
        .collect();
    files.sort();
    files
}

#[tokio::test]
async fn a_copying_job_has_its_users_rights_and_nothing_of_the_init() {
    let host = Host::start().await;
    app(&host).await;
    inside(&host, "vcap", "truncate -s 8M big");
    let mut out = host.ostler("cp");
    // As a number of the container; nobody reads yet, so it waits.
    let mut child = out
        .args(["--user", "vcap", "app:big", "-"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let tree = host
        .tree_until("copy", |tree| !tree.named("copy").is_empty())
        .await;
    let copy = tree.one("copy");
    let proc = PathBuf::from(format!("/proc/{}", copy.pid));
    let status = fs::read_to_string(proc.join("status")).unwrap();
    let field = |name: &str| {
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap();
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    let none = "0000000000000000";
    for name in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(field(name), none, "{name}");
    }
    assert_eq!(
        (field("NoNewPrivs:"), field("Seccomp:")),
        ("1".into(), "2".into())
    );
    let inside_pid = field("NSpid:").split(' ').next_back().unwrap().to_owned();
    // Its own three, a copy of 1, and what it reads, once it has opened that.
    let wanted = [
        "/dev/null",
        "/home/vcap",
        "/home/vcap/big",
        "pipe",
        "pipe",
        "pipe",
    ];
    let deadline = Instant::now() + patience();
    loop {
        let fds = open_files(&proc);
        if fds == wanted {
            break;
        }
        assert!(Instant::now() < deadline, "{fds:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let script = format!(
        "id -u; ls /proc/{inside_pid}/fd | wc -l; readlink /proc/{inside_pid}/exe; cat /proc/{inside_pid}/environ | wc -c"
    );
    assert_eq!(
        inside(&host, "root", &script),
        "0\n0\n0\n",
        "root of the container sees nothing of it"
    );
    let mut stream = Vec::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_end(&mut stream)
        .unwrap();
    assert!(child.wait().unwrap().success());
    assert!(stream.len() > 8 << 20);
    host.stop("app").await;
}

#[tokio::test]
async fn whoever_unpacks_on_the_host_has_one_directory_of_it_and_no_rights() {
    let host = Host::start().await;
    app(&host).await;
    let desk = desk(&host);
    // Slowly: a twentieth of a processor, so that its sender is seen and held still long before the end.
    inside(&host, "vcap", "truncate -s 4G big");
    let handle = host.tree().one("iomux-spawn").argv[1].clone();
    let handle = Path::new(&handle).iter().nth_back(2).unwrap();
    let (file, slow) = match tests::is_cgroup_v2() {
        true => ("cpu.max", "5000 100000"),
        false => ("cpu.cfs_quota_us", "5000"),
    };
    let group = host.group("cpu", handle.to_str().unwrap());
    fs::write(group.join(file), slow).unwrap();
    let mut child = host
        .ostler("cp")
        .args(["--user", "vcap", "app:big", text(&desk)])
        .spawn()
        .unwrap();
    let tree = host
        .tree_until("copy", |tree| !tree.named("copy").is_empty())
        .await;
    tree.one("copy").signal(Signal::SIGSTOP);
    let mark = format!("PPid:\t{}\n", child.id());
    let deadline = Instant::now() + patience();
    let (proc, status) = loop {
        let found = fs::read_dir("/proc").unwrap().find_map(|entry| {
            let proc = entry.unwrap().path();
            let status = fs::read_to_string(proc.join("status")).ok()?;
            let shut_in = status.contains("Name:\tunpack\n") && status.contains("NoNewPrivs:\t1\n");
            (status.contains(&mark) && shut_in).then_some((proc, status))
        });
        if let Some(found) = found {
            break found;
        }
        assert!(Instant::now() < deadline, "nobody unpacks");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    for set in ["Prm", "Eff", "Bnd"] {
        // CAP_DAC_OVERRIDE, CAP_FOWNER
        let wanted = format!("Cap{set}:\t000000000000000a\n");
        assert!(status.contains(&wanted), "{set}: {status}");
    }
    assert_eq!(fs::read_link(proc.join("root")).unwrap(), desk);
    for namespace in ["pid", "net", "ipc", "uts"] {
        let of = |proc: &Path| fs::read_link(proc.join("ns").join(namespace)).unwrap();
        assert_ne!(of(&proc), of(Path::new("/proc/self")), "{namespace}");
    }
    // The stream and its report, which is its standard error, too; else what it makes, and nothing that was open before.
    let files = open_files(&proc);
    let (paths, others): (Vec<_>, Vec<_>) = files.iter().partition(|file| file.starts_with('/'));
    assert_eq!(others, ["pipe", "pipe", "pipe"]);
    assert!(
        paths.iter().all(|path| Path::new(path).starts_with(&desk)),
        "{paths:?}"
    );
    // It ends with whoever asked for it.
    child.kill().unwrap();
    child.wait().unwrap();
    let deadline = Instant::now() + patience();
    while proc.exists() {
        assert!(Instant::now() < deadline, "it outlives its parent");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    host.stop("app").await;
    tool("rm", &["-rf", text(&desk)]);
}

#[tokio::test]
async fn a_copy_that_nobody_reads_any_more_ends_in_the_container_too() {
    let host = Host::start().await;
    app(&host).await;
    inside(&host, "vcap", "truncate -s 64M big");
    let mut out = host.ostler("cp");
    let mut child = out
        .args(["app:/home/vcap/big", "-"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    host.tree_until("copy", |tree| !tree.named("copy").is_empty())
        .await;
    child.kill().unwrap();
    child.wait().unwrap();
    host.tree_until("end of the copy", |tree| tree.named("copy").is_empty())
        .await;
    host.stop("app").await;
}

#[tokio::test]
async fn a_large_file_is_copied_at_the_speed_of_the_disk() {
    const SIZE: u64 = 256 << 20;
    let host = Host::start().await;
    let mut message = host.message("app", &Droplet::shell("echo up; exec sleep 1000"));
    message["limits"]["disk"] = 1024.into();
    host.run(message).await;
    let desk = desk(&host);
    let file = desk.join("large");
    tool(
        "sh",
        &[
            "-c",
            &format!("head -c {SIZE} /dev/urandom > {}", text(&file)),
        ],
    );
    let began = Instant::now();
    assert_eq!(cp(&host, &[text(&file), "app:/tmp"]), (0, String::new()));
    let into = began.elapsed();
    let began = Instant::now();
    assert_eq!(
        cp(&host, &["app:/tmp/large", text(&desk.join("back"))]),
        (0, String::new())
    );
    let mb = f64::from(u32::try_from(SIZE >> 20).unwrap());
    println!(
        "in {:.0} MB/s, out {:.0} MB/s",
        mb / into.as_secs_f64(),
        mb / began.elapsed().as_secs_f64()
    );
    tool("cmp", &[text(&file), text(&desk.join("back"))]);
    host.stop("app").await;
    fs::remove_dir_all(desk).unwrap();
}
