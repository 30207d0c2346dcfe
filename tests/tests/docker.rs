//! Beside a Docker Engine with a running container on the same host, whichever of the two came first.
//!
//! The Docker here is the machine's program, and nobody's service: it has directories, a containerd and
//! namespaces of mounts and processes of its own, and the test's network. Where a machine has none, these
//! tests say so and end, and `.ci/run` says it again; `make deps` does not install it, because that would start
//! it, and change the machine's own rules.

#![allow(
    clippy::disallowed_methods,
    reason = "it starts, asks and ends a Docker, as the harness does its processes"
)]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tests::{Droplet, Host, Network, Running, patience, skip, tool};

/// The port that Docker publishes for its container.
const PUBLISHED: u16 = 8080;
/// Where the container listens.
const INNER: u16 = 7;

/// What [`Droplet::probe`] does to `try` and `echo`, for a container that has busybox and nothing else.
const SERVE: &str = r#"#!/bin/sh
read -r what address port
case $what in
  try) if busybox nc -w 3 "$address" "$port" -e /bin/true; then echo open; else echo shut; fi ;;
  echo) exec busybox cat ;;
esac
"#;

/// Keeps the namespaces, and starts Docker again when it has ended. A newer Docker drops, by the table `raw`,
/// what comes to a container's own address, before anybody else is asked; this one leaves it to others, as
/// older ones do.
const KEEPER: &str = "mkdir -p /run/containerd; mount -t tmpfs none /run/containerd; \
                      export DOCKER_INSECURE_NO_IPTABLES_RAW=1; while :; do dockerd \"$@\"; done";

/// A Docker Engine. Dropping it ends it with its containers; it must go before its host.
struct Docker {
    keeper: Running,
    directory: PathBuf,
    group: String,
}

impl Docker {
    /// Starts one in the host's network; `None`, and why on the terminal, where there is no Docker.
    async fn start(host: &Host) -> Option<Self> {
        for program in ["dockerd", "docker", "containerd", "busybox"] {
            if Command::new(program).arg("--help").output().is_err() {
                skip(&format!(
                    "tests beside Docker: this machine has no {program}"
                ));
                return None;
            }
        }
        let scene = host.base.parent().unwrap();
        let directory = scene.join("docker");
        let group = format!("{}-docker", scene.file_name().unwrap().display());
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("daemon.json"), "{}").unwrap();
        let inside = |name: &str| directory.join(name).display().to_string();
        let arguments = format!(
            "--pdeathsig KILL unshare --mount --pid --fork --kill-child --mount-proc bash -c KEEPER dockerd \
             --data-root {} --exec-root {} --pidfile {} --config-file {} --host unix://{} \
             --cgroup-parent /{group} --storage-driver vfs --live-restore",
            inside("data"),
            inside("exec"),
            inside("pid"),
            inside("daemon.json"),
            inside("socket")
        );
        let arguments: Vec<&str> = arguments
            .split_whitespace()
            .map(|word| if word == "KEEPER" { KEEPER } else { word })
            .collect();
        let keeper = Running::start(Path::new("setpriv"), &arguments, &directory.join("log"));
        let docker = Self {
            keeper,
            directory,
            group,
        };
        docker.ready().await;
        Some(docker)
    }

    fn client(&self, arguments: &[&str]) -> Output {
        let mut client = Command::new("docker");
        client.arg("--config").arg(self.directory.join("config"));
        let socket = self.directory.join("socket");
        client
            .arg("--host")
            .arg(format!("unix://{}", socket.display()));
        client.args(arguments).output().unwrap()
    }

    fn ask(&self, arguments: &[&str]) -> String {
        let answer = self.client(arguments);
        let said = String::from_utf8_lossy(&answer.stderr);
        assert!(
            answer.status.success(),
            "{arguments:?}: {said}\n{}",
            self.log()
        );
        String::from_utf8_lossy(&answer.stdout).trim().to_owned()
    }

    async fn ready(&self) {
        until("Docker", || {
            let ready = self.client(&["info"]).status.success();
            if ready { Ok(()) } else { Err(self.log()) }
        })
        .await;
    }

    fn log(&self) -> String {
        fs::read_to_string(self.directory.join("log")).unwrap_or_default()
    }

    /// Runs the container with its published port; the address that it has inside.
    fn run(&self) -> String {
        let root = self.directory.join("root");
        fs::create_dir_all(root.join("bin")).unwrap();
        let busybox = tool("sh", &["-c", "command -v busybox"]);
        fs::copy(busybox.trim(), root.join("bin/busybox")).unwrap();
        for applet in ["sh", "true"] {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
        fs::write(root.join("serve"), SERVE).unwrap();
        tool("chmod", &["755", &root.join("serve").to_string_lossy()]);
        let archive = self.directory.join("root.tar").display().to_string();
        tool(
            "tar",
            &["-C", &root.to_string_lossy(), "-cf", &archive, "."],
        );
        self.ask(&["import", &archive, "probe"]);
        let run = format!(
            "run --detach --name probe --publish {PUBLISHED}:{INNER} probe \
             /bin/busybox nc -ll -p {INNER} -e /serve"
        );
        self.ask(&run.split_whitespace().collect::<Vec<_>>());
        let address = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}";
        self.ask(&["inspect", "--format", address, "probe"])
    }

    /// Ends the daemon as `systemctl restart` does, and waits until the next one answers.
    async fn restart(&self, host: &Host) {
        let old = host.tree().one("dockerd").clone();
        old.signal(Signal::SIGTERM);
        until("end of Docker", || {
            if old.lives() { Err(self.log()) } else { Ok(()) }
        })
        .await;
        self.ready().await;
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        // The namespace of processes goes with it: containerd, shims, containers.
        self.keeper.end();
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let hierarchies = mounts.lines().filter(|line| line.starts_with("cgroup"));
        let tops = hierarchies.filter_map(|line| line.split(' ').nth(1));
        let groups: Vec<PathBuf> = tops.map(|top| Path::new(top).join(&self.group)).collect();
        let end = Instant::now() + patience();
        while groups.iter().any(|group| !remove(group)) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
        }
        if std::thread::panicking() {
            eprintln!("--- Docker's log:\n{}---", self.log());
        } else {
            assert!(groups.iter().all(|group| !group.exists()), "{groups:?}");
        }
    }
}

/// Removes a group and those below it; tells whether it is not there any more.
fn remove(group: &Path) -> bool {
    for below in fs::read_dir(group).into_iter().flatten().flatten() {
        if below.path().is_dir() {
            remove(&below.path());
        }
    }
    let _ = fs::remove_dir(group);
    !group.exists()
}

/// Tries until it is so.
async fn until(what: &str, is_so: impl Fn() -> Result<(), String>) {
    let end = Instant::now() + patience();
    while let Err(why) = is_so() {
        assert!(Instant::now() < end, "no {what}: {why}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A connection that is used for a long time.
struct Talk(BufReader<TcpStream>);

impl Talk {
    fn begin(port: u16, order: &str) -> std::io::Result<Self> {
        let mut stream = TcpStream::connect((Network::HOST, port))?;
        stream.set_read_timeout(Some(patience()))?;
        writeln!(stream, "{order}")?;
        Ok(Self(BufReader::new(stream)))
    }

    fn hear(&mut self) -> std::io::Result<String> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        Ok(line.trim().to_owned())
    }

    fn echoes(&mut self) -> std::io::Result<bool> {
        writeln!(self.0.get_mut(), "are you there?")?;
        Ok(self.hear()? == "are you there?")
    }

    #[track_caller]
    fn lives(&mut self) {
        assert!(self.echoes().unwrap());
    }
}

/// From outside, with whatever is behind that port of the host.
fn talk(host: &Host, port: u16) -> Talk {
    let mut talk = host.network.outside(|| Talk::begin(port, "echo").unwrap());
    talk.lives();
    talk
}

/// One instance and one of Docker's containers on a host, and somebody outside.
struct Scene {
    // The first to go.
    docker: Docker,
    host: Host,
    /// Of the instance, on the host.
    port: u16,
    /// Of the instance, inside.
    instance: (String, u16),
    /// Of Docker's container, inside.
    container: String,
    /// Outside.
    listener: TcpListener,
}

/// Starts the instance: its port on the host, its address and port inside.
async fn run_app(host: &Host) -> (u16, (String, u16)) {
    let mut message = host.message("app", &Droplet::probe());
    message["egress_network_rules"] = json!([]);
    message["uris"] = json!(["app.example.net"]);
    host.run(message).await;
    let find = json!({"droplet": "app", "include_stats": true});
    let found: Value = host.request("dea.find.droplet", &find).await;
    let port: u16 = found["stats"]["port"].as_u64().unwrap().try_into().unwrap();
    let ports = tool("nft", &["list", "map", "inet", "ostler", "ports"]);
    let (_, inside) = ports.split_once(&format!("{port} : ")).expect(&ports);
    let words: Vec<&str> = inside.split([' ', ',', '\n']).collect();
    (port, (words[0].to_owned(), words[2].parse().unwrap()))
}

fn listen_outside(host: &Host) -> TcpListener {
    let network = &host.network;
    network.outside(|| TcpListener::bind((Network::OUTSIDE, 0)).unwrap())
}

impl Scene {
    /// Whether the app behind `port` of the host, asked from outside, can connect; else why it was not heard.
    fn reaches(&self, port: u16, address: &str, far: u16) -> Result<bool, String> {
        let order = format!("try {address} {far}");
        let answer = self
            .host
            .network
            .outside(|| Talk::begin(port, &order)?.hear());
        match answer.as_deref() {
            Ok("open") => Ok(true),
            Ok("shut") => Ok(false),
            other => Err(format!("{other:?} from {port}")),
        }
    }

    fn is(&self, from: u16, (address, port): (&str, u16), open: bool) -> Result<(), String> {
        if self.reaches(from, address, port)? == open {
            return Ok(());
        }
        let rules = tool("iptables-save", &[]) + &tool("nft", &["list", "table", "inet", "ostler"]);
        Err(format!("{from} to {address}:{port} is not {open}\n{rules}"))
    }

    fn far(&self) -> (&str, u16) {
        let port = self.listener.local_addr().unwrap().port();
        (Network::OUTSIDE, port)
    }

    /// Both are reached from outside and reach the outside, and each other only as anybody reaches them.
    async fn is_whole(&self) {
        until("whole network", || {
            self.is(self.port, self.far(), true)?;
            self.is(PUBLISHED, self.far(), true)?;
            self.is(PUBLISHED, (Network::HOST, self.port), true)?;
            self.is(self.port, (Network::HOST, PUBLISHED), true)?;
            self.is(PUBLISHED, (&self.instance.0, self.instance.1), false)?;
            self.is(self.port, (&self.container, INNER), false)
        })
        .await;
    }
}

/// An agent that switches forwarding on itself, as on a host that has just been booted, or none.
async fn boot(agent: bool) -> Host {
    let mut host = Host::start().await;
    host.end(Signal::SIGTERM).await;
    fs::write("/proc/sys/net/ipv4/ip_forward", "0").unwrap();
    if agent {
        host.start_agent().await;
    }
    host
}

#[tokio::test]
async fn an_agent_beside_a_docker_that_was_there_cuts_nobody_off() {
    let mut host = boot(false).await;
    let Some(docker) = Docker::start(&host).await else {
        return;
    };
    // It has switched forwarding on, and so drops what is nobody's.
    assert!(tool("iptables", &["-S"]).contains("-P FORWARD DROP"));
    let container = docker.run();
    until("container that serves", || {
        let echo = || Talk::begin(PUBLISHED, "echo")?.echoes();
        match host.network.outside(echo) {
            Ok(true) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    let mut old = talk(&host, PUBLISHED);
    host.start_agent().await;
    old.lives();
    let (port, instance) = run_app(&host).await;
    let listener = listen_outside(&host);
    let mut scene = Scene {
        docker,
        host,
        port,
        instance,
        container,
        listener,
    };
    scene.is_whole().await;
    let mut talks = [port, PUBLISHED].map(|port| talk(&scene.host, port));

    scene.host.restart().await;
    talks.iter_mut().for_each(Talk::lives);
    scene.is_whole().await;

    scene.docker.restart(&scene.host).await;
    talks.iter_mut().for_each(Talk::lives);
    scene.is_whole().await;

    // What the configuration opens is open.
    let config = scene.host.base.parent().unwrap().join("agent.toml");
    let text = fs::read_to_string(&config).unwrap();
    let allowed = format!("allow = [\"{}\"]\n[cgroup]", scene.container);
    fs::write(&config, text.replace("[cgroup]", &allowed)).unwrap();
    scene.host.restart().await;
    until("allowed way", || {
        scene.is(port, (&scene.container, INNER), true)
    })
    .await;

    // It leaves as it came.
    scene.host.end(Signal::SIGTERM).await;
    assert!(!tool("iptables", &["-S"]).contains("ostler"));
    talks[1].lives();
    old.lives();
    scene.is(PUBLISHED, scene.far(), true).unwrap();
}

#[tokio::test]
async fn a_docker_that_comes_later_cuts_nobody_off_and_keeps_its_forwarding() {
    let host = boot(true).await;
    let (port, instance) = run_app(&host).await;
    let mut old = talk(&host, port);
    let Some(docker) = Docker::start(&host).await else {
        return;
    };
    old.lives();
    let container = docker.run();
    let listener = listen_outside(&host);
    let mut scene = Scene {
        docker,
        host,
        port,
        instance,
        container,
        listener,
    };
    scene.is_whole().await;
    let mut talks = [port, PUBLISHED].map(|port| talk(&scene.host, port));

    // Docker leaves the policy alone where forwarding is on already; an administrator may not.
    tool("iptables", &["-P", "FORWARD", "DROP"]);
    scene.is_whole().await;
    scene.docker.restart(&scene.host).await;
    scene.host.restart().await;
    scene.is_whole().await;
    talks.iter_mut().for_each(Talk::lives);
    old.lives();

    // It was the agent that switched forwarding on; by now it is not alone in wanting it.
    scene.host.end(Signal::SIGTERM).await;
    assert!(!tool("iptables", &["-S"]).contains("ostler"));
    talks[1].lives();
    scene.is(PUBLISHED, scene.far(), true).unwrap();
}
