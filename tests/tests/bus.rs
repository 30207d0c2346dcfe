//! How an agent finds the bus, what it shows there, and how it behaves on the connection.

use async_nats::{Client, ConnectOptions, Event, RequestErrorKind};
use futures_util::StreamExt;
use nix::sys::signal::Signal;
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tests::{
    Certificates, Droplet, Host, Operator, Output, Running, Setup, Watch, get, numbered, patience,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

/// A directory for what the server and the agent read; goes with the test.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = format!("/tmp/ostler-bus-{}-{number}", std::process::id());
        fs::create_dir_all(&path).unwrap();
        Self(path.into())
    }

    /// Writes `text` into `name` and gives its path.
    fn write(&self, name: &str, text: &str) -> String {
        let path = self.0.join(name);
        fs::write(&path, text).unwrap();
        path.display().to_string()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

/// What no log may hold, in every scenario.
const SECRET: &str = "s3cret-of-the-host";
const WRONG: &str = "s3cret-of-nobody";

/// One way in: with `right` the agent comes up; with `wrong` it does not, and says `why`.
struct Way<'a> {
    server: String,
    client: ConnectOptions,
    /// The agent's `[nats]` table, beside the address.
    table: &'a str,
    right: &'a [(&'a str, &'a str)],
    wrong: &'a [(&'a str, &'a str)],
    why: &'a str,
    secrets: &'a [&'a str],
}

impl Way<'_> {
    async fn check(self, directory: &Directory) {
        let server = directory.write("server.conf", &self.server);
        let table = format!("[nats]\n{}\n", self.table);
        let debug = ("RUST_LOG", "debug");
        let right = [&[debug], self.right].concat();
        let mut host = Host::with(Setup {
            config: &[("[nats]\n", table.as_str())],
            bus: &["--config", &server],
            client: self.client,
            agent_env: &right,
            ..Setup::default()
        })
        .await;
        host.kill9().await;
        let before = host.logged(0, "").await.len();
        let mut hellos = host.watch("dea.start").await;
        host.set_agent_env(&[&[debug], self.wrong].concat());
        host.spawn_agent();
        let log = host.logged(before, "the bus cannot be reached").await;
        let line = log[before..]
            .lines()
            .find(|line| line.contains("the bus cannot be reached"));
        assert!(line.unwrap().contains(self.why), "{line:?}\n{}", host.log());
        host.nats().flush().await.unwrap();
        assert!(
            hellos.arrived().is_empty(),
            "it is on the bus\n{}",
            host.log()
        );
        // It waits, and what was wrong is put right for the next one.
        host.kill9().await;
        host.set_agent_env(&right);
        host.start_agent().await;
        let log = host.logged(0, "").await;
        for secret in self.secrets.iter().chain(&[SECRET, WRONG]) {
            assert!(!log.contains(secret), "{secret} stands in\n{log}");
        }
    }
}

fn as_tester() -> ConnectOptions {
    ConnectOptions::new().user_and_password("tester".into(), "tester".into())
}

/// A server for the tester and one more user.
fn users(user: &str) -> String {
    format!("authorization {{ users = [ {{ user: tester, password: tester }}, {{ {user} }} ] }}")
}

fn password() -> String {
    users(&format!("user: host, password: \"{SECRET}\""))
}

#[tokio::test]
async fn a_user_and_a_password_in_the_url() {
    let url = |password: &str| format!("nats://host:{password}@{}", Host::BUS);
    let way = Way {
        server: password(),
        client: as_tester(),
        table: "",
        right: &[("NATS_URL", &url(SECRET))],
        wrong: &[("NATS_URL", &url(WRONG))],
        why: "uthorization",
        secrets: &[],
    };
    way.check(&Directory::new()).await;
}

#[tokio::test]
async fn a_user_and_a_password() {
    let way = Way {
        server: password(),
        client: as_tester(),
        table: "",
        right: &[("NATS_USER", "host"), ("NATS_PASSWORD", SECRET)],
        wrong: &[("NATS_USER", "host"), ("NATS_PASSWORD", WRONG)],
        why: "uthorization",
        secrets: &[],
    };
    way.check(&Directory::new()).await;
}

#[tokio::test]
async fn a_token() {
    let way = Way {
        server: format!("authorization {{ token: \"{SECRET}\" }}"),
        client: ConnectOptions::new().token(SECRET.into()),
        table: "",
        right: &[("NATS_TOKEN", SECRET)],
        wrong: &[("NATS_TOKEN", WRONG)],
        why: "uthorization",
        secrets: &[],
    };
    way.check(&Directory::new()).await;
}

#[tokio::test]
async fn an_nkey() {
    let directory = Directory::new();
    let pair = nkeys::KeyPair::new_user();
    let (seed, other) = (
        pair.seed().unwrap(),
        nkeys::KeyPair::new_user().seed().unwrap(),
    );
    let right = directory.write("host.nk", &seed);
    let wrong = directory.write("other.nk", &other);
    let way = Way {
        server: users(&format!("nkey: {}", pair.public_key())),
        client: as_tester(),
        table: "",
        right: &[("NATS_NKEY", &right)],
        wrong: &[("NATS_NKEY", &wrong)],
        why: "uthorization",
        secrets: &[&seed, &other],
    };
    way.check(&directory).await;
}

#[tokio::test]
async fn credentials() {
    let directory = Directory::new();
    let (operator, other) = (Operator::default(), Operator::default());
    let account = operator.account();
    let (_, creds) = account.creds();
    let (_, foreign) = other.account().creds();
    let tester = ConnectOptions::with_credentials(&account.creds().1).unwrap();
    let seed = |creds: &str| {
        creds
            .lines()
            .find(|line| line.starts_with("SU"))
            .unwrap()
            .to_owned()
    };
    let (right, wrong) = (
        directory.write("host.creds", &creds),
        directory.write("other.creds", &foreign),
    );
    let way = Way {
        server: operator.server(&account, &[]),
        client: tester,
        table: "",
        right: &[("NATS_CREDS", &right)],
        wrong: &[("NATS_CREDS", &wrong)],
        why: "uthorization",
        secrets: &[&seed(&creds), &seed(&foreign)],
    };
    way.check(&directory).await;
}

#[tokio::test]
async fn credentials_that_are_not_there_are_waited_for_like_a_server() {
    let directory = Directory::new();
    let operator = Operator::default();
    let account = operator.account();
    let creds = account.creds().1;
    let right = directory.write("host.creds", &creds);
    let missing = directory.0.join("later.creds").display().to_string();
    let server = directory.write("server.conf", &operator.server(&account, &[]));
    let mut host = Host::with(Setup {
        bus: &["--config", &server],
        client: ConnectOptions::with_credentials(&account.creds().1).unwrap(),
        agent_env: &[("NATS_CREDS", &right)],
        ..Setup::default()
    })
    .await;
    host.kill9().await;
    let mut hellos = host.watch("dea.start").await;
    host.set_agent_env(&[("NATS_CREDS", &missing)]);
    host.spawn_agent();
    host.logged(0, &format!("cannot read {missing}: No such file"))
        .await;
    directory.write("later.creds", &creds);
    hellos.next().await;
}

#[tokio::test]
async fn a_jwt_and_a_seed() {
    let (operator, other) = (Operator::default(), Operator::default());
    let account = operator.account();
    let (_, jwt, seed) = account.user();
    let (_, foreign, key) = other.account().user();
    let way = Way {
        server: operator.server(&account, &[]),
        client: ConnectOptions::with_credentials(&account.creds().1).unwrap(),
        table: "",
        right: &[("NATS_JWT", &jwt), ("NATS_SEED", &seed)],
        wrong: &[("NATS_JWT", &foreign), ("NATS_SEED", &key)],
        why: "uthorization",
        secrets: &[&seed, &key, &jwt, &foreign],
    };
    way.check(&Directory::new()).await;
}

#[tokio::test]
async fn tls() {
    let directory = Directory::new();
    let files = Certificates::make(&directory.0);
    let (ca, other) = (files.path("ca.pem"), files.path("other.pem"));
    let way = Way {
        server: format!(
            "tls {{ cert_file: \"{}\", key_file: \"{}\" }}",
            files.path("cert.pem"),
            files.path("key.pem")
        ),
        client: ConnectOptions::new().add_root_certificates(ca.clone().into()),
        table: "",
        right: &[("NATS_CA", &ca)],
        wrong: &[("NATS_CA", &other)],
        why: "UnknownIssuer",
        secrets: &[],
    };
    way.check(&directory).await;
}

#[tokio::test]
async fn tls_with_an_authority_that_is_not_there() {
    let directory = Directory::new();
    let files = Certificates::make(&directory.0);
    let (ca, none) = (files.path("ca.pem"), files.path("none.pem"));
    let way = Way {
        server: format!(
            "tls {{ cert_file: \"{}\", key_file: \"{}\" }}",
            files.path("cert.pem"),
            files.path("key.pem")
        ),
        client: ConnectOptions::new().add_root_certificates(ca.clone().into()),
        table: "",
        right: &[("NATS_CA", &ca)],
        wrong: &[("NATS_CA", &none)],
        why: "none.pem: No such file",
        secrets: &[],
    };
    way.check(&directory).await;
}

#[tokio::test]
async fn mutual_tls() {
    let directory = Directory::new();
    let files = Certificates::make(&directory.0);
    let path = |name: &str| files.path(name);
    let (ca, cert, key) = (path("ca.pem"), path("client.pem"), path("client-key.pem"));
    let (own, its_key) = (path("other.pem"), path("other.key"));
    let server = format!(
        "tls {{ cert_file: \"{}\", key_file: \"{}\", ca_file: \"{ca}\", verify: true }}",
        path("cert.pem"),
        path("key.pem")
    );
    let client = ConnectOptions::new().add_root_certificates(ca.clone().into());
    let way = Way {
        server,
        client: client.add_client_certificate(cert.clone().into(), key.clone().into()),
        table: &format!("ca = \"{ca}\""),
        right: &[("NATS_CERT", &cert), ("NATS_KEY", &key)],
        wrong: &[("NATS_CERT", &own), ("NATS_KEY", &its_key)],
        why: "lert",
        secrets: &[],
    };
    way.check(&directory).await;
}

/// nats-server 2.9 begins in plain text always: openssl stands before it.
fn tls_first_at(address: &str, directory: &Directory, files: &Certificates) -> Running {
    let (host, port) = Host::BUS.split_once(':').unwrap();
    let script = format!(
        "cd {directory} && rm -f back && mkfifo back && \
         exec setpriv --pdeathsig KILL openssl s_server -quiet -accept {address} -cert {cert} -key {key} <>back \
           > >(exec 3<>/dev/tcp/{host}/{port}; setpriv --pdeathsig KILL cat <&3 >back & exec setpriv --pdeathsig KILL cat >&3)",
        directory = directory.0.display(),
        cert = files.path("cert.pem"),
        key = files.path("key.pem"),
    );
    Running::start(
        "bash".as_ref(),
        &["-c", &script],
        &directory.0.join("tls.log"),
    )
}

#[tokio::test]
async fn tls_before_the_first_word() {
    const ADDRESS: &str = "127.0.0.1:4333";
    let directory = Directory::new();
    let files = Certificates::make(&directory.0);
    let ca = files.path("ca.pem");
    let mut host = Host::start().await;
    host.kill9().await;
    let proxy = tls_first_at(ADDRESS, &directory, &files);
    let mut hellos = host.watch("dea.start").await;
    let url = format!("nats://{ADDRESS}");
    let context = |tls_first: bool| {
        directory.write(
            "context.json",
            &format!("{{\"url\":\"{url}\",\"ca\":\"{ca}\",\"tls_first\":{tls_first}}}"),
        )
    };
    let path = context(false);
    let environment = [
        ("NATS_URL", url.as_str()),
        ("NATS_CONTEXT", path.as_str()),
        ("NATS_TIMEOUT", "1s"),
    ];
    host.set_agent_env(&environment);
    host.spawn_agent();
    host.logged(0, "timed out").await;
    assert!(hellos.arrived().is_empty(), "{}", host.log());
    host.kill9().await;
    context(true);
    host.set_agent_env(&environment[..2]);
    proxy.end();
    let proxy = tls_first_at(ADDRESS, &directory, &files);
    host.spawn_agent();
    hellos.next().await;
    host.end(Signal::SIGTERM).await;
    proxy.end();
}

/// As systemd starts a service without `User=`.
#[tokio::test]
async fn a_context_is_looked_for_at_home_also_without_that_variable() {
    let directory = Directory::new();
    let at = directory.0.display();
    let passwd = directory.write("passwd", &format!("root:x:0:0:root:{at}:/bin/sh\n"));
    let mut host = Host::start().await;
    host.kill9().await;
    host.set_agent_env(&[("NATS_CONTEXT", "prod")]);
    let script = format!(
        "mount --bind {passwd} /etc/passwd && exec env -u HOME -u XDG_CONFIG_HOME \"$0\" \"$@\""
    );
    host.spawn_agent_by(&["unshare", "--mount", "sh", "-c", &script]);
    let wanted = format!("{at}/.config/nats/context/prod.json");
    host.logged(0, &wanted).await;
    let ended = host.ended().await;
    assert_eq!(ended.code(), Some(78), "{}", host.log());
}

#[tokio::test]
async fn a_context_of_the_nats_command() {
    let directory = Directory::new();
    fs::create_dir_all(directory.0.join("nats/context")).unwrap();
    let context = |name: &str, password: &str| {
        let text = format!("{{\"url\":\"\",\"user\":\"host\",\"password\":\"{password}\"}}");
        directory.write(&format!("nats/context/{name}.json"), &text)
    };
    context("right", SECRET);
    context("wrong", WRONG);
    let config = directory.0.display().to_string();
    let way = Way {
        server: password(),
        client: as_tester(),
        table: "",
        right: &[("XDG_CONFIG_HOME", &config), ("NATS_CONTEXT", "right")],
        wrong: &[("XDG_CONFIG_HOME", &config), ("NATS_CONTEXT", "wrong")],
        why: "uthorization",
        secrets: &[],
    };
    way.check(&directory).await;
}

#[tokio::test]
async fn credentials_that_are_replaced_are_used_at_the_next_connect() {
    let directory = Directory::new();
    let operator = Operator::default();
    let account = operator.account();
    let (old, creds) = account.creds();
    let path = directory.write("host.creds", &creds);
    let server = directory.write("server.conf", &operator.server(&account, &[]));
    let mut host = Host::with(Setup {
        bus: &["--config", &server],
        client: ConnectOptions::with_credentials(&account.creds().1).unwrap(),
        agent_env: &[("NATS_CREDS", &path)],
        ..Setup::default()
    })
    .await;
    host.stop_bus().await;
    directory.write("server.conf", &operator.server(&account, &[&old]));
    host.start_bus().await;
    host.logged(0, "uthorization").await;
    let mut beats = host.watch("dea.heartbeat").await;
    directory.write("host.creds", &account.creds().1);
    beats.next().await;
}

#[tokio::test]
async fn a_wrong_setting_ends_the_agent_with_a_word() {
    let mut host = Host::start().await;
    host.kill9().await;
    for (variables, words) in [
        (
            &[("NATS_URL", "nats://host:s3cret-of-nobody@h:x")][..],
            "NATS_URL cannot be used",
        ),
        (
            &[("NATS_TOKEN", WRONG), ("NATS_CREDS", "/x")],
            "NATS_TOKEN and NATS_CREDS are two ways",
        ),
        (
            &[("NATS_CONTEXT", "/does/not/exist.json")],
            "/does/not/exist.json",
        ),
    ] {
        host.set_agent_env(variables);
        host.spawn_agent();
        let ended = host.agent().ended(patience()).await;
        assert_eq!(ended.expect("it ends").code(), Some(78), "{}", host.log());
        let log = host.logged(0, words).await;
        assert!(!log.contains(WRONG), "{log}");
    }
    host.kill9().await;
    let directory = Directory::new();
    let absent = "[stacks]\ndebian = \"/does/not/exist\"\n";
    // What is not there may come with a disk that is mounted late.
    for (file, words, code) in [
        (
            directory.write("wrong.toml", "nonsense = 1"),
            "nonsense",
            78,
        ),
        (
            directory.0.join("none.toml").display().to_string(),
            "none.toml",
            1,
        ),
        (directory.write("absent.toml", absent), "/does/not/exist", 1),
    ] {
        let log = directory.0.join("log");
        let ostler = tests::path("OSTLER_AGENT", "target/debug/ostler");
        let agent = Running::start(&ostler, &["agent", "--config", &file], &log);
        let ended = agent.ended(patience()).await.expect("it ends");
        let said = fs::read_to_string(log).unwrap();
        assert!(
            ended.code() == Some(code) && said.contains(words),
            "{ended} {said}"
        );
    }
}

/// The server's configuration with one user per role, all with the password of the tester. `of_host` is the
/// host's permissions.
fn roles(of_host: &str) -> String {
    let role = |name: &str| fs::read_to_string(tests::fixtures().join("nats").join(name)).unwrap();
    let user = |name: &str, permissions: &str| {
        format!("{{ user: {name}, password: tester, permissions {{\n{permissions}\n}} }}\n")
    };
    format!(
        "authorization {{ users = [\n{}{}{}] }}",
        user("host", of_host),
        user("controller", &role("controller.conf")),
        user("reader", &role("reader.conf")),
    )
}

fn least_of_host(id: &str) -> String {
    let block = fs::read_to_string(tests::fixtures().join("nats/host.conf")).unwrap();
    block.replace("HOST_ID", id)
}

const ALL: &str = "publish: \">\", subscribe: \">\"";

fn as_controller() -> ConnectOptions {
    ConnectOptions::new()
        .user_and_password("controller".into(), "tester".into())
        .custom_inbox_prefix("_INBOX_controller")
}

const AS_HOST: [(&str, &str); 2] = [("NATS_USER", "host"), ("NATS_PASSWORD", "tester")];

/// A host whose user may do what `of_host` says, given its id; the test is the controller.
async fn with_permissions(directory: &Directory, of_host: impl Fn(&str) -> String) -> Host {
    let server = directory.write("server.conf", &roles(ALL));
    let mut host = Host::with(Setup {
        // With all that a host may say.
        config: &[("[cgroup]", "[metrics]\nlisten = \"0.0.0.0:9464\"\n[cgroup]")],
        bus: &["--config", &server],
        client: as_controller(),
        agent_env: &AS_HOST,
        ..Setup::default()
    })
    .await;
    host.end(Signal::SIGTERM).await;
    host.stop_bus().await;
    directory.write("server.conf", &roles(&of_host(&host.id)));
    host.start_bus().await;
    host.start_agent().await;
    host
}

/// Hears what a reader may hear, until it has heard all kinds of it.
async fn read_all() -> impl Future<Output = ()> {
    let block = fs::read_to_string(tests::fixtures().join("nats/reader.conf")).unwrap();
    let lines = block.lines().filter(|line| !line.starts_with('#'));
    let quoted = lines.flat_map(|line| line.split('"').skip(1).step_by(2));
    let mut kinds: Vec<String> = quoted
        .filter(|text| *text != ">")
        .map(str::to_owned)
        .collect();
    let options = ConnectOptions::new().user_and_password("reader".into(), "tester".into());
    let reader = options.connect(Host::BUS).await.unwrap();
    let mut heard = Vec::new();
    for kind in &kinds {
        heard.push(reader.subscribe(kind.clone()).await.unwrap());
    }
    reader.flush().await.unwrap();
    let mut heard = futures_util::stream::select_all(heard);
    async move {
        while !kinds.is_empty() {
            let message = timeout(patience(), heard.next()).await;
            let message = message.unwrap_or_else(|_| panic!("never heard: {kinds:?}"));
            let subject = message.expect("it is connected").subject;
            kinds.retain(|kind| !subject.starts_with(kind.trim_end_matches('>')));
        }
        drop(reader);
    }
}

#[tokio::test]
async fn a_host_does_its_work_with_the_least_permissions() {
    let directory = Directory::new();
    let mut host = with_permissions(&directory, least_of_host).await;
    let read = read_all().await;
    let mut output = host.output("app").await;
    let mut exits = host.watch("droplet.exited").await;
    let mut ooms = host.watch("droplet.oom").await;
    let mut routes = host.watch("router.register").await;
    host.run(host.message("app", &Droplet::shell("echo hello; sleep infinity")))
        .await;
    output
        .until("hello", |output| output.text(0, "stdout") == "hello\n")
        .await;
    let scale = json!({"droplet": "app", "instances": 2, "wait": "running"});
    assert_eq!(
        host.request(&host.subject("scale"), &scale).await["ok"],
        true
    );
    let found = host
        .request("dea.find.droplet", &json!({"droplet": "app"}))
        .await;
    assert_eq!(found["dea"], json!(host.id));
    let update = json!({"droplet": "app", "uris": []});
    assert_eq!(host.request("dea.update", &update).await["matched"], 2);
    let wanted = json!({"droplet": "app", "limits": {"mem": 64, "disk": 64}});
    for (subject, body) in [("dea.discover", &wanted), ("$SRV.PING", &json!(null))] {
        assert_eq!(host.request(subject, body).await["id"], json!(host.id));
    }
    let component = host.request("vcap.component.discover", &json!(null)).await;
    assert_eq!(component["type"], "DEA", "{component}");
    host.restart().await;
    let status = host.request("dea.status", &json!({})).await;
    assert_eq!(status["id"], json!(host.id));
    let mut hog = host.message("hog", &Droplet::sample("hog"));
    hog["limits"]["mem"] = json!(64);
    host.publish(&host.subject("start"), &hog).await;
    ooms.until("an OOM of hog", |oom| oom["droplet"] == "hog")
        .await;
    exits
        .until("the end of hog", |exit| exit["droplet"] == "hog")
        .await;
    let logs = json!({"droplet": "hog"});
    assert!(
        host.request(&host.subject("logs"), &logs).await["ok"].is_boolean(),
        "answered"
    );
    let mut web = host.message("web", &Droplet::sample("sinatra"));
    web["uris"] = json!(["web.example.net"]);
    host.run(web).await;
    routes
        .until("a route", |route| {
            route["uris"] == json!(["web.example.net"])
        })
        .await;
    host.stop("web").await;
    host.stop("app").await;
    host.end(Signal::SIGTERM).await;
    read.await;
    let log = host.bus_log();
    assert!(!log.contains("Violation"), "{log}");
}

/// Prints, and does not end by TERM; always the same process.
const DEAF: &str = "exec perl -e '$0 = \"deafapp\"; $SIG{TERM} = \"IGNORE\"; $| = 1; print \"up\\n\"; sleep 1 while 1'";

#[tokio::test]
async fn what_was_asked_before_a_reconnect_is_answered_when_it_is_asked_again() {
    let directory = Directory::new();
    let mut host = with_permissions(&directory, least_of_host).await;
    let begun = host.logged(0, "").await.len();
    let mut output = host.output("deaf").await;
    let mut start = host.message("deaf", &Droplet::shell(DEAF));
    start["stop_grace"] = json!(600);
    host.run(start).await;
    output
        .until("first line", |output| output.text(0, "stdout") == "up\n")
        .await;
    let mut stop = json!({"droplet": "deaf", "wait": "stopped", "request_id": "once"});
    let inbox = host.nats().new_inbox();
    let mut answers = host.watch(&inbox).await;
    let (subject, body) = (host.subject("stop"), stop.to_string().into());
    let asked = host.nats().publish_with_reply(subject, inbox, body);
    asked.await.unwrap();
    host.logged(begun, "state=\"STOPPING\"").await;
    host.stop_bus().await;
    host.start_bus().await;
    host.logged(begun, "connects=2").await;
    // What was asked is done, and the exit is told. The leave to answer went with the connection.
    let mut exits = host.watch("droplet.exited").await;
    host.tree().one("deafapp").signal(Signal::SIGKILL);
    let log = host.logged(begun, "subject=\"_INBOX_controller").await;
    assert!(log.contains("the bus refuses what this host says"), "{log}");
    assert_eq!(exits.next().await["reason"], "STOPPED");
    host.nats().flush().await.unwrap();
    assert!(answers.arrived().is_empty());
    // Asked again it is answered as it would have been, and not as a new question.
    let again = host.request(&host.subject("stop"), &stop).await;
    assert_eq!((&again["ok"], &again["matched"]), (&json!(true), &json!(1)));
    stop["request_id"] = json!("another");
    let other = host.request(&host.subject("stop"), &stop).await;
    assert_eq!((&other["ok"], &other["matched"]), (&json!(true), &json!(0)));
    // Nothing else was lost with it, not even the connection.
    host.run(host.message("next", &Droplet::sample("sleeper")))
        .await;
    host.stop("next").await;
    assert!(answers.arrived().is_empty());
    let log = host.logged(begun, "").await;
    assert!(!log[begun..].contains("connects=3"), "{log}");
    let refused = log[begun..].matches("the bus refuses what this host says");
    assert_eq!(refused.count(), 1, "{log}");
}

/// A client that hears what the server refuses it.
async fn listening(user: &str) -> (Client, mpsc::UnboundedReceiver<String>) {
    let (tell, told) = mpsc::unbounded_channel();
    let options = ConnectOptions::new().user_and_password(user.into(), "tester".into());
    let options = options.event_callback(move |event| {
        if let Event::ServerError(error) = event {
            drop(tell.send(error.to_string()));
        }
        std::future::ready(())
    });
    (options.connect(Host::BUS).await.unwrap(), told)
}

#[tokio::test]
async fn each_role_is_kept_to_its_subjects() {
    let directory = Directory::new();
    let mut host = with_permissions(&directory, least_of_host).await;
    host.kill9().await;
    host.listen_no_more();
    let id = host.id.clone();
    let own = |verb: &str| format!("dea.{id}.{verb}");
    let commands = [
        "dea.stop",
        "dea.update",
        "dea.find.droplet",
        "dea.locate",
        "dea.discover",
        "droplet.status",
        "healthmanager.start",
        "router.start",
        "vcap.component.discover",
    ];
    let words = [
        "dea.start",
        "dea.heartbeat",
        "dea.advertise",
        "dea.shutdown",
        "droplet.exited",
        "droplet.oom",
        "router.register",
        "router.unregister",
        "vcap.component.announce",
    ];
    let mut asked = vec![own("*"), format!("_INBOX_{id}.>"), "dea.status".into()];
    for verb in ["PING", "INFO", "STATS"] {
        asked.push(format!("$SRV.{verb}"));
        asked.push(format!("$SRV.{verb}.ostler"));
        asked.push(format!("$SRV.{verb}.ostler.{id}"));
    }
    let output = "droplet.output.a.0.h.stdout";
    let texts = |texts: &[&str], more: &[String]| -> Vec<String> {
        texts
            .iter()
            .map(|text| (*text).to_owned())
            .chain(more.iter().cloned())
            .collect()
    };
    let others = [
        "dea.other.start".to_owned(),
        "_INBOX.x".to_owned(),
        "$SYS.REQ.SERVER.PING".to_owned(),
    ];
    // Who, what it may say, what it may not, what it may hear, what it may not.
    let table = [
        (
            "host",
            texts(
                &words,
                &[
                    output.into(),
                    format!("_INBOX_{id}.x"),
                    own("find"),
                    "dea.status".into(),
                ],
            ),
            texts(&commands, &[&others[..], &[own("start")]].concat()),
            texts(&commands, &asked),
            texts(
                &words,
                &[
                    output.into(),
                    ">".into(),
                    "dea.*.start".into(),
                    "_INBOX_controller.>".into(),
                ],
            ),
        ),
        (
            "controller",
            texts(
                &commands,
                &[
                    own("start"),
                    own("find"),
                    own("scale"),
                    own("logs"),
                    "dea.other.stop".into(),
                    "dea.status".into(),
                    "$SRV.PING".into(),
                ],
            ),
            texts(&words, &[output.into(), format!("_INBOX_{id}.x"), own("x")]),
            texts(
                &words,
                &["droplet.output.>".into(), "_INBOX_controller.>".into()],
            ),
            texts(
                &commands,
                &[
                    own("*"),
                    ">".into(),
                    "dea.>".into(),
                    format!("_INBOX_{id}.>"),
                    "_INBOX.>".into(),
                ],
            ),
        ),
        (
            "reader",
            Vec::new(),
            texts(
                &commands,
                &[&others[..], &texts(&words, &[output.into(), own("start")])].concat(),
            ),
            texts(&words, &["droplet.output.>".into()]),
            texts(
                &commands,
                &[own("*"), ">".into(), "dea.>".into(), "_INBOX.>".into()],
            ),
        ),
    ];
    for (who, may_say, may_not_say, may_hear, may_not_hear) in table {
        let (client, mut refused) = listening(who).await;
        for subject in &may_say {
            client.publish(subject.clone(), "{}".into()).await.unwrap();
        }
        let mut heard = Vec::new();
        for subject in &may_hear {
            heard.push(client.subscribe(subject.clone()).await.unwrap());
        }
        for subject in &may_not_say {
            client.publish(subject.clone(), "{}".into()).await.unwrap();
            let words = timeout(patience(), refused.recv())
                .await
                .unwrap_or_else(|_| panic!("{who} may say {subject}"));
            let words = words.unwrap();
            assert!(
                words.contains(&format!("Publish to \"{subject}\"")),
                "{who}: {words}"
            );
        }
        for subject in &may_not_hear {
            heard.push(client.subscribe(subject.clone()).await.unwrap());
            let words = timeout(patience(), refused.recv())
                .await
                .unwrap_or_else(|_| panic!("{who} may hear {subject}"));
            let words = words.unwrap();
            assert!(
                words.contains(&format!("Subscription to \"{subject}\"")),
                "{who}: {words}"
            );
        }
    }
}

#[tokio::test]
async fn what_the_server_refuses_is_said_again_until_it_is_allowed() {
    let directory = Directory::new();
    let without = |id: &str| {
        let allowed = least_of_host(id);
        allowed
            .replace("\"droplet.exited\", ", "")
            .replace(", \"droplet.output.>\"", "")
    };
    let mut host = with_permissions(&directory, without).await;
    let mut messages = host
        .nats()
        .subscribe("droplet.output.lines.>")
        .await
        .unwrap();
    let mut exits = host.watch("droplet.exited").await;
    let mut message = host.message("lines", &Droplet::sample("lines"));
    message["env"] = json!(["RATE=3000000", "LINES=60000"]);
    host.publish(&host.subject("start"), &message).await;
    host.logged(0, "subject=\"droplet.output.lines").await;
    host.logged(0, "subject=\"droplet.exited\"").await;
    assert!(exits.arrived().is_empty());
    // A new agent knows that it is owed.
    host.kill9().await;
    host.start_agent().await;
    spooled(&host, |bytes| bytes >= 12_000_000).await;
    directory.write("server.conf", &roles(&least_of_host(&host.id)));
    host.bus().signal(Signal::SIGHUP);
    let mut streams = [Pieces::default(), Pieces::default()];
    while streams.iter().any(|pieces| pieces.whole.len() < 6_000_000) {
        let message = timeout(patience(), messages.next())
            .await
            .expect("more lines")
            .unwrap();
        let headers = message.headers.as_ref().unwrap();
        let offset: u64 = headers
            .get("Ostler-Offset")
            .unwrap()
            .as_str()
            .parse()
            .unwrap();
        streams[usize::from(message.subject.ends_with("stderr"))].put(offset, &message.payload);
    }
    for (pieces, word) in streams.iter().zip(["out", "err"]) {
        assert_eq!(numbered(word, &pieces.whole), Ok(60000));
    }
    let exit = exits.next().await;
    assert_eq!(
        exit["output"],
        json!({"stdout": 6_000_000, "stderr": 6_000_000})
    );
    spooled(&host, |bytes| bytes == 0).await;
    // It was complained of, and not each time.
    let log = host.logged(0, "").await;
    let complaints = log.matches("the bus refuses what this host says").count();
    assert!((2..=8).contains(&complaints), "{complaints}\n{log}");
}

/// Waits until the host says that so much output waits for the bus.
async fn spooled(host: &Host, wanted: impl Fn(u64) -> bool) {
    let subject = format!("$SRV.STATS.ostler.{}", host.id);
    let asked = async {
        loop {
            let stats = host.request(&subject, &json!(null)).await;
            let told = &stats["endpoints"][0]["data"]["spooled"];
            if told.as_u64().is_some_and(&wanted) {
                break;
            }
        }
    };
    timeout(patience(), asked).await.expect("it says so");
}

/// What came of one stream, put in its place: bytes that a server did not take at first come after later ones.
#[derive(Default)]
struct Pieces {
    whole: Vec<u8>,
    /// What stands behind a hole, by its offset.
    later: BTreeMap<u64, Vec<u8>>,
}

impl Pieces {
    fn put(&mut self, offset: u64, bytes: &[u8]) {
        self.later.insert(offset, bytes.to_vec());
        while let Some(first) = self.later.first_entry() {
            let Some(known) = (self.whole.len() as u64).checked_sub(*first.key()) else {
                break;
            };
            let known = usize::try_from(known).unwrap();
            self.whole.extend(first.remove().iter().skip(known));
        }
    }
}

#[tokio::test]
async fn numbered_lines_survive_permissions_that_come_and_go() {
    let directory = Directory::new();
    let host = with_permissions(&directory, least_of_host).await;
    let allowed = roles(&least_of_host(&host.id));
    let denied = allowed.replacen("\"droplet.output.>\"", "\"droplet.output.nobodys\"", 1);
    let mut messages = host
        .nats()
        .subscribe("droplet.output.lines.>")
        .await
        .unwrap();
    let mut message = host.message("lines", &Droplet::sample("lines"));
    message["env"] = json!(["RATE=200000"]);
    host.run(message).await;
    let mut streams = [Pieces::default(), Pieces::default()];
    let refused = |host: &Host| host.bus_log().matches("Publish Violation").count();
    let (mut rounds, mut wanted) = (0, 100_000);
    // The server takes any of the lines, and then any of them not: what is refused first, and what stood
    // before it, is the question each time.
    loop {
        let message = timeout(patience(), messages.next())
            .await
            .expect("more lines")
            .unwrap();
        let headers = message.headers.as_ref().unwrap();
        assert!(headers.get("Ostler-Dropped").is_none(), "{headers:?}");
        let offset: u64 = headers
            .get("Ostler-Offset")
            .unwrap()
            .as_str()
            .parse()
            .unwrap();
        let stream = usize::from(message.subject.ends_with("stderr"));
        streams[stream].put(offset, &message.payload);
        let whole = streams.each_ref().map(|pieces| &pieces.whole);
        if whole.iter().any(|bytes| bytes.len() < wanted) {
            continue;
        }
        for (bytes, word) in whole.iter().zip(["out", "err"]) {
            let lines = &bytes[..bytes.len() - bytes.len() % 100];
            assert_eq!(numbered(word, lines), Ok(lines.len() as u64 / 100));
        }
        rounds += 1;
        if rounds == 3 {
            break;
        }
        wanted = whole[0].len().max(whole[1].len()) + 100_000;
        let before = refused(&host);
        directory.write("server.conf", &denied);
        host.bus().signal(Signal::SIGHUP);
        let refuses = async {
            while refused(&host) == before {
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(patience(), refuses)
            .await
            .expect("the server refuses it");
        directory.write("server.conf", &allowed);
        host.bus().signal(Signal::SIGHUP);
    }
    host.stop("lines").await;
}

/// What the server with its monitoring at `address` says of its connection with the name `name`, if it has one.
async fn connection(address: &str, name: &str) -> Option<serde_json::Value> {
    let (_, body) = get(address, "/connz?subs=1").await.ok()?;
    let told: serde_json::Value = serde_json::from_str(&body).unwrap();
    let mut all = told["connections"].as_array().unwrap().iter();
    all.find(|connection| connection["name"] == name).cloned()
}

#[tokio::test]
async fn a_host_has_a_name_and_an_inbox_of_its_own() {
    inbox_of(&[], &[], None).await;
    let url = "url = \"nats://127.0.0.1:4222\"";
    let with_prefix = format!("{url}\ninbox_prefix = \"_INBOX_of.mine\"");
    inbox_of(&[(url, &with_prefix)], &[], Some("_INBOX_of.mine.")).await;
    let directory = Directory::new();
    fs::create_dir_all(directory.0.join("nats/context")).unwrap();
    directory.write(
        "nats/context/here.json",
        r#"{"url":"","inbox_prefix":"_INBOX_of.context"}"#,
    );
    let at = directory.0.display().to_string();
    let context = [("XDG_CONFIG_HOME", &*at), ("NATS_CONTEXT", "here")];
    inbox_of(&[], &context, Some("_INBOX_of.context.")).await;
}

/// Sees the name and the only inbox of a host on the wire. Without a `prefix` the inbox has the host's id.
async fn inbox_of(config: &[(&str, &str)], agent_env: &[(&str, &str)], prefix: Option<&str>) {
    let host = Host::with(Setup {
        config,
        agent_env,
        bus: &["--http_port", "8222"],
        ..Setup::default()
    })
    .await;
    let name = format!("ostler/{}", host.id);
    let connection = connection("127.0.0.1:8222", &name)
        .await
        .expect("it is connected");
    let subjects = connection["subscriptions_list"].as_array().unwrap();
    let is_inbox = |subject: &&serde_json::Value| subject.as_str().unwrap().contains("INBOX");
    let inboxes: Vec<_> = subjects.iter().filter(is_inbox).collect();
    let own = prefix.map_or_else(|| format!("_INBOX_{}.", host.id), str::to_owned);
    assert_eq!(inboxes.len(), 1, "{subjects:?}");
    assert!(
        inboxes[0].as_str().unwrap().starts_with(&own),
        "{inboxes:?}"
    );
}

#[tokio::test]
async fn a_name_is_asked_for_again_at_each_connect() {
    let directory = Directory::new();
    let mut host = Host::start().await;
    host.kill9().await;
    let names = directory.write("hosts", "127.0.0.1 bus.example\n");
    let script = format!("mount --bind {names} /etc/hosts && exec \"$@\"");
    let mut hellos = host.watch("dea.start").await;
    host.set_agent_env(&[("NATS_URL", "nats://bus.example:4222")]);
    host.spawn_agent_by(&["unshare", "--mount", "bash", "-c", &script, "bash"]);
    hellos.next().await;
    // The bus moves: another server, at another address, and the old one is gone.
    let server = Host::nats_server();
    let arguments = [
        "--pdeathsig",
        "KILL",
        &server,
        "--addr",
        "127.0.0.2",
        "--port",
        "4222",
        "--http_port",
        "8223",
    ];
    let moved = Running::start(
        "setpriv".as_ref(),
        &arguments,
        &directory.0.join("nats.log"),
    );
    directory.write("hosts", "127.0.0.2 bus.example\n");
    host.stop_bus().await;
    let name = format!("ostler/{}", host.id);
    let come = async {
        while connection("127.0.0.2:8223", &name).await.is_none() {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(patience(), come)
        .await
        .expect("it goes to the new address");
    moved.end();
}

#[tokio::test]
async fn a_server_that_is_going_to_end_is_left_in_time() {
    let directory = Directory::new();
    // Servers that came after the connect are known by their names only: the client does not hear of them.
    let both = "url = \"nats://127.0.0.1:4222,nats://127.0.0.1:4223\"";
    let mut host = Host::with(Setup {
        config: &[("url = \"nats://127.0.0.1:4222\"", both)],
        bus: &[
            "--cluster_name",
            "c",
            "--cluster",
            "nats://127.0.0.1:6222",
            "--routes",
            "nats://127.0.0.1:6223",
        ],
        ..Setup::default()
    })
    .await;
    let server = Host::nats_server();
    let arguments = [
        "--pdeathsig",
        "KILL",
        &server,
        "--addr",
        "127.0.0.1",
        "--port",
        "4223",
        "--http_port",
        "8223",
        "--cluster_name",
        "c",
        "--cluster",
        "nats://127.0.0.1:6223",
        "--routes",
        "nats://127.0.0.1:6222",
    ];
    let other = Running::start(
        "setpriv".as_ref(),
        &arguments,
        &directory.0.join("nats.log"),
    );
    let options = ConnectOptions::new().retry_on_initial_connect();
    let client = options.connect("127.0.0.1:4223").await.unwrap();
    let mut output = Output::of(&client, "lines").await;
    let mut beats = Watch::subscribe(&client, "dea.heartbeat").await;
    beats.next().await;
    let mut message = host.message("lines", &Droplet::sample("lines"));
    message["env"] = json!(["RATE=50000"]);
    host.run(message).await;
    output
        .until("lines", |output| output.stream(0, "stdout").next > 10_000)
        .await;
    host.bus().signal(Signal::SIGUSR2);
    // Commands flow all the time, by the other server. One that nobody hears is known at once; without a word may be
    // the one that is on its way when it leaves, and one that the other server sends after it.
    let (subject, question) = (
        host.subject("find"),
        json!({"droplet": "lines"}).to_string(),
    );
    let name = format!("ostler/{}", host.id);
    let (mut answered, mut without_a_word) = (0, 0);
    let flow = async {
        while connection("127.0.0.1:8223", &name).await.is_none() || answered < 100 {
            let request = async_nats::Request::new().payload(question.clone().into());
            let request = request.timeout(Some(patience() / 3));
            match client.send_request(subject.clone(), request).await {
                Ok(answer) => {
                    let answer: serde_json::Value =
                        serde_json::from_slice(&answer.payload).unwrap();
                    assert_eq!(answer["matched"], 1, "{answer}");
                    answered += 1;
                }
                Err(error) if error.kind() == RequestErrorKind::NoResponders => {}
                Err(error) => {
                    assert_eq!(error.kind(), RequestErrorKind::TimedOut, "{error}");
                    without_a_word += 1;
                }
            }
        }
    };
    timeout(patience() * 2, flow)
        .await
        .expect("it comes to the other server");
    assert!(without_a_word <= 2, "{without_a_word}");
    // The one that ends cuts nobody within ten seconds: it was left.
    host.stop_bus().await;
    let seen = output.stream(0, "stdout").next;
    output
        .until("more lines", |output| {
            output.stream(0, "stdout").next > seen + 100_000
        })
        .await;
    for (stream, word) in [("stdout", "out"), ("stderr", "err")] {
        let got = output.stream(0, stream);
        assert_eq!((got.dropped, got.holes.len()), (0, 0));
        let whole = got.bytes.len() - got.bytes.len() % 100;
        assert!(numbered(word, &got.bytes[..whole]).is_ok());
    }
    let log = host.logged(0, "leaving it for another one").await;
    assert_eq!(log.matches("connected to the bus").count(), 2, "{log}");
    host.end(Signal::SIGTERM).await;
    other.end();
}

/// Between an agent and its bus: what the bus says passes, and what the agent says while `reads` is true.
async fn between(listener: TcpListener, mut reads: watch::Receiver<bool>) {
    let (agent, _) = listener.accept().await.unwrap();
    let bus = TcpStream::connect(Host::BUS).await.unwrap();
    let ((mut agent_says, mut to_agent), (mut bus_says, mut to_bus)) =
        (agent.into_split(), bus.into_split());
    let down = async { tokio::io::copy(&mut bus_says, &mut to_agent).await };
    let up = async {
        let mut bytes = vec![0; 64 << 10];
        loop {
            reads.wait_for(|reads| *reads).await.unwrap();
            match agent_says.read(&mut bytes).await? {
                0 => return std::io::Result::Ok(0),
                read => to_bus.write_all(&bytes[..read]).await?,
            }
        }
    };
    drop(tokio::join!(down, up));
}

/// A host whose agent reaches the bus as long as what this returns is true.
async fn behind_a_gate(directory: &Directory) -> (Host, watch::Sender<bool>, JoinHandle<()>) {
    // What was held back comes all at once: no reason to take the test for too slow.
    let server = directory.write("server.conf", "max_pending: 1073741824");
    let mut host = Host::with(Setup {
        bus: &["--config", &server],
        ..Setup::default()
    })
    .await;
    host.kill9().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    host.set_agent_env(&[("NATS_URL", &address)]);
    let (gate, reads) = watch::channel(true);
    let relay = tokio::spawn(between(listener, reads));
    host.start_agent().await;
    (host, gate, relay)
}

#[tokio::test]
async fn deaths_are_seen_also_while_the_bus_takes_nothing() {
    let directory = Directory::new();
    let (mut host, gate, relay) = behind_a_gate(&directory).await;
    let mut exits = host.watch("droplet.exited").await;
    // Together they have more to say than fits on the way.
    let flood = "exec perl -e '$SIG{USR1} = sub { $go = 1 }; $0 = \"flood\"; sleep 1 until $go; \
                 print \"x\" x 65535, \"\\n\" for 1 .. 100; sleep 1 while 1'";
    for number in 0..6 {
        host.run(host.message(&format!("flood{number}"), &Droplet::shell(flood)))
            .await;
    }
    let victim = "exec perl -e '$0 = \"victim\"; $| = 1; while (1) { print \"x\\n\"; select undef, undef, undef, 0.02 }'";
    let mut start = host.message("victim", &Droplet::shell(victim));
    start["limits"]["mem"] = json!(32);
    host.run(start).await;
    let tree = host
        .tree_until("all of them", |tree| {
            tree.named("flood").len() == 6 && tree.named("victim").len() == 1
        })
        .await;
    gate.send_replace(false);
    for flood in tree.named("flood") {
        flood.signal(Signal::SIGUSR1);
    }
    sleep(Duration::from_secs(3)).await;
    tree.one("victim").signal(Signal::SIGKILL);
    // Before the connection is given up.
    let log = host.logged(0, "state=\"CRASHED\"").await;
    assert!(!log.contains("the bus is away"), "{log}");
    gate.send_replace(true);
    let exit = exits.next().await;
    assert_eq!(
        (&exit["droplet"], &exit["signal"]),
        (&json!("victim"), &json!(9))
    );
    host.end(Signal::SIGTERM).await;
    relay.abort();
}

/// More commands and queries than answers get through.
#[tokio::test]
async fn a_bus_that_takes_no_answers_costs_an_agent_no_memory_without_end() {
    const ASKED: u64 = 240_000;
    let directory = Directory::new();
    let (mut host, gate, relay) = behind_a_gate(&directory).await;
    host.run(host.message("sleeper", &Droplet::sample("sleeper")))
        .await;
    let resident = || -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", host.agent().pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        line.unwrap()
            .trim()
            .trim_end_matches(" kB")
            .parse()
            .unwrap()
    };
    let before = resident();

    gate.send_replace(false);
    let (inbox, here) = (host.nats().new_inbox(), host.subject("find"));
    let mut answers = host.nats().subscribe(inbox.clone()).await.unwrap();
    for number in 0..ASKED {
        let subject = match number % 3 {
            0 => "dea.find.droplet",
            1 => &here,
            _ => "$SRV.STATS.ostler",
        };
        let asked = host.nats().publish_with_reply(
            subject.to_owned(),
            inbox.clone(),
            r#"{"droplet": "sleeper"}"#.into(),
        );
        asked.await.unwrap();
        if number % 4000 == 0 {
            // No faster than it takes them.
            sleep(Duration::from_millis(150)).await;
        }
    }
    sleep(Duration::from_secs(3)).await;
    let waiting = resident();
    gate.send_replace(true);
    let (mut came, subject) = (0, format!("$SRV.STATS.ostler.{}", host.id));
    let deadline = Instant::now() + patience();
    let dropped = loop {
        while timeout(Duration::from_secs(1), answers.next())
            .await
            .is_ok()
        {
            came += 1;
        }
        let stats = host.request(&subject, &json!({})).await;
        let dropped = stats["endpoints"][0]["data"]["dropped"].as_u64().unwrap();
        if came + dropped >= ASKED || Instant::now() > deadline {
            break dropped;
        }
    };
    // Whatever was asked is answered, or counted.
    assert!(dropped > 0);
    assert_eq!(came + dropped, ASKED, "{dropped}");
    // 128 MiB of answers, 65,536 messages, and whoever is with each. All of them would be a gigabyte.
    assert!(waiting < before + 450_000, "{before} kB, {waiting} kB");
    host.stop("sleeper").await;
    host.end(Signal::SIGTERM).await;
    relay.abort();
}

/// The bus as a server would be that knows no headers, until `old` is false; then as it is.
async fn without_headers(listener: TcpListener, mut old: watch::Receiver<bool>) {
    let (mut agent, _) = listener.accept().await.unwrap();
    let mut bus = TcpStream::connect(Host::BUS).await.unwrap();
    let mut info = vec![0; 4096];
    let read = bus.read(&mut info).await.unwrap();
    let info = String::from_utf8(info[..read].to_vec()).unwrap();
    assert!(info.ends_with('\n'), "{info}");
    let info = info.replace("\"headers\":true", "\"headers\":false");
    agent.write_all(info.as_bytes()).await.unwrap();
    tokio::select! {
        _ = tokio::io::copy_bidirectional(&mut agent, &mut bus) => {}
        _ = old.wait_for(|old| !old) => {}
    }
    drop((agent, bus));
    between(listener, watch::channel(true).1).await;
}

#[tokio::test]
async fn a_bus_without_headers_is_named_and_nothing_is_said_to_it() {
    let mut host = Host::start().await;
    let mut output = host.output("lines").await;
    let mut message = host.message("lines", &Droplet::sample("lines"));
    message["env"] = json!(["RATE=100000", "LINES=6000"]);
    host.run(message).await;
    host.kill9().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    host.set_agent_env(&[("NATS_URL", &address)]);
    let (old, until) = watch::channel(true);
    let relay = tokio::spawn(without_headers(listener, until));
    let mut said = host.watch("dea.heartbeat").await;
    host.spawn_agent();
    let log = host.logged(0, "knows no headers").await;
    sleep(Duration::from_secs(3)).await;
    assert!(said.arrived().is_empty(), "{log}");
    old.send_replace(false);
    let all = |output: &Output| output.stream(0, "stdout").next >= 600_000;
    output.until("all", all).await;
    let got = output.stream(0, "stdout");
    assert_eq!((got.dropped, got.holes.len()), (0, 0));
    host.stop("lines").await;
    host.end(Signal::SIGTERM).await;
    relay.abort();
}

/// A host on a bus with the usual largest message, which [`resize`] changes by this directory.
async fn on_a_bus_that_is_resized() -> (Directory, Host) {
    let directory = Directory::new();
    let server = directory.write("server.conf", "max_payload: 1048576");
    let host = Host::with(Setup {
        bus: &["--config", &server],
        ..Setup::default()
    })
    .await;
    (directory, host)
}

/// Starts the bus again with another largest message, in bytes, and waits until the host answers there. What waited in the
/// host's client may be too large for the new server, which then ends their first connection.
async fn resize(directory: &Directory, host: &mut Host, most: u32) {
    host.stop_bus().await;
    directory.write("server.conf", &format!("max_payload: {most}"));
    host.start_bus().await;
    // No verb: whatever the size, an error comes.
    let asked = || host.nats().request(host.subject("x"), "".into());
    let answered = async {
        while asked().await.is_err() {
            sleep(Duration::from_millis(20)).await;
        }
    };
    let answered = timeout(patience(), answered).await;
    assert!(
        answered.is_ok(),
        "no answer on a bus of {most} bytes\n{}",
        host.log()
    );
}

#[tokio::test]
async fn a_smaller_largest_message_is_kept_to_after_a_reconnect() {
    let (directory, mut host) = on_a_bus_that_is_resized().await;
    let mut output = host.output("lines").await;
    let mut message = host.message("lines", &Droplet::sample("lines"));
    message["env"] = json!(["RATE=200000", "LINES=6000"]);
    host.run(message).await;
    for index in 0..6 {
        let mut message = host.message("sleeper", &Droplet::sample("sleeper"));
        message["index"] = json!(index);
        message["version"] = json!("v".repeat(60));
        host.run(message).await;
    }
    resize(&directory, &mut host, 1400).await;
    for (stream, word) in [("stdout", "out"), ("stderr", "err")] {
        output
            .until("all", |output| output.stream(0, stream).next >= 600_000)
            .await;
        let got = output.stream(0, stream);
        assert_eq!((got.next, got.dropped, got.holes.len()), (600_000, 0, 0));
        assert_eq!(numbered(word, &got.bytes), Ok(6000));
    }
    let answer = host
        .request(&host.subject("find"), &json!({"droplet": "sleeper"}))
        .await;
    assert_eq!(answer["error"]["code"], "too_large", "{answer}");
    host.stop("sleeper").await;
}

#[tokio::test]
async fn routes_that_fill_more_than_one_message_are_told_in_several() {
    let (directory, mut host) = on_a_bus_that_is_resized().await;
    let uris: Vec<String> = (0..60)
        .map(|number| format!("{number:02}{}.example.net", "x".repeat(50)))
        .collect();
    let mut message = host.message("web", &Droplet::sample("sinatra"));
    message["uris"] = json!([&uris[..], &["y".repeat(3000)]].concat());
    let answer = host.run(message).await;
    let mut exits = host.watch("droplet.exited").await;
    resize(&directory, &mut host, 2000).await;
    let mut registered = host.watch("router.register").await;
    let mut taken_back = host.watch("router.unregister").await;
    let all = |words: &[serde_json::Value]| {
        let said = words
            .iter()
            .flat_map(|word| word["uris"].as_array().unwrap());
        let said: BTreeSet<&str> = said.map(|uri| uri.as_str().unwrap()).collect();
        uris.iter().all(|uri| said.contains(uri.as_str()))
    };
    while !all(registered.all()) {
        registered.next().await;
    }
    host.stop("web").await;
    while !all(taken_back.all()) {
        taken_back.next().await;
    }
    // What no message can hold keeps nothing: neither its instance's record, nor that of another.
    exits.next().await;
    let handle = answer["handle"].as_str().unwrap();
    let record = host.base.join("instances").join(handle);
    host.tree_until("no record", |_| !record.exists()).await;
}

#[tokio::test]
async fn a_heartbeat_that_does_not_fit_is_without_the_crashed_and_never_split() {
    let (directory, mut host) = on_a_bus_that_is_resized().await;
    let mut beats = host.watch("dea.heartbeat").await;
    for index in 0..3 {
        let mut message = host.message("sleeper", &Droplet::sample("sleeper"));
        message["index"] = json!(index);
        host.run(message).await;
    }
    host.publish(
        &host.subject("start"),
        &host.message("crasher", &Droplet::shell("exit 1")),
    )
    .await;
    let crashed = |beat: &serde_json::Value| {
        let entries = beat["droplets"].as_array().unwrap();
        entries.iter().any(|entry| entry["state"] == "CRASHED")
    };
    let whole = beats.until("a crash", crashed).await;
    let mut living = whole.clone();
    let entries = living["droplets"].as_array_mut().unwrap();
    entries.retain(|entry| entry["state"] == "RUNNING");
    assert_eq!(entries.len(), 3, "{whole}");
    // A little less than it had: a time that was read may have more digits than it was written with.
    let below = |beat: &serde_json::Value| u32::try_from(beat.to_string().len()).unwrap() - 40;

    resize(&directory, &mut host, below(&whole)).await;
    let told = beats.until("a shorter one", |beat| !crashed(beat)).await;
    assert_eq!(told, living);
    host.logged(0, "crashed ones are left out").await;
    let from = host.logged(0, "").await.len();
    resize(&directory, &mut host, below(&living)).await;
    beats.arrived();
    host.logged(from, "it hears of none").await;
    assert_eq!(beats.arrived(), Vec::<serde_json::Value>::new());
    // What fits is said.
    assert_eq!(host.request("dea.status", &json!({})).await["id"], host.id);
    resize(&directory, &mut host, 1048576).await;
    assert_eq!(beats.next().await, whole);
    host.stop("sleeper").await;
}

#[tokio::test]
async fn an_error_that_does_not_fit_keeps_its_code() {
    let (directory, mut host) = on_a_bus_that_is_resized().await;
    let scale = host.subject("scale");
    // Its message repeats the name.
    let wrong = json!({"droplet": "none", "instances": "x".repeat(40)});
    let whole = host.request(&scale, &wrong).await;
    let code = whole["error"]["code"].clone();
    let told = whole["error"]["message"].as_str().unwrap();
    let mut lengths = vec![told.chars().count()];
    for most in [300, 220, 160] {
        resize(&directory, &mut host, most).await;
        let answer = host.request_bytes(&scale, &wrong.to_string()).await;
        let body: serde_json::Value = serde_json::from_slice(&answer.payload).unwrap();
        assert_eq!(body["error"]["code"], code, "{most}: {body}");
        let message = body["error"]["message"].as_str().unwrap();
        let rest = message.strip_suffix('…').unwrap_or(message);
        assert!(told.starts_with(rest), "{most}: {body}");
        lengths.push(rest.chars().count());
        // The name of the code alone takes more than there is.
        assert_eq!(answer.headers.is_some(), most > 160, "{answer:?}");
    }
    assert!(
        lengths.is_sorted_by(|one, next| one > next || *next == 0),
        "{lengths:?}"
    );
    resize(&directory, &mut host, 1048576).await;
    let again = host.request(&scale, &wrong).await;
    assert_eq!(again, whole);
}

#[tokio::test]
async fn an_event_that_is_too_large_is_said_to_a_server_that_takes_it() {
    let (directory, mut host) = on_a_bus_that_is_resized().await;
    let mut exits = host.watch("droplet.exited").await;
    host.run(host.message("app", &Droplet::shell("sleep infinity")))
        .await;
    resize(&directory, &mut host, 150).await;
    host.publish(&host.subject("stop"), &json!({"droplet": "app"}))
        .await;
    host.logged(0, "too large for the bus subject=\"droplet.exited\"")
        .await;
    assert!(exits.arrived().is_empty());
    resize(&directory, &mut host, 1048576).await;
    let exit = exits.next().await;
    assert_eq!(exit["reason"], "STOPPED");
}

/// Publishes as whoever writes to the server's socket by hand; returns when the server has taken it, or has closed the connection.
async fn publish_raw(bytes: &[u8]) {
    let mut stream = tokio::net::TcpStream::connect(Host::BUS).await.unwrap();
    let hello = b"CONNECT {\"verbose\":false,\"headers\":true,\"no_responders\":false}\r\n";
    stream.write_all(hello).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    // It may have closed the connection by now.
    let _ = stream.write_all(b"PING\r\n").await;
    let mut said = Vec::new();
    while !said.windows(6).any(|six| six == b"PONG\r\n") {
        let mut some = [0; 4096];
        match timeout(patience(), stream.read(&mut some)).await.unwrap() {
            Ok(0) | Err(_) => return,
            Ok(count) => said.extend_from_slice(&some[..count]),
        }
    }
}

#[tokio::test]
async fn what_is_broken_in_a_message_breaks_no_connection() {
    let host = Host::start().await;
    let find = host.subject("find");
    let mut inboxes = host.watch("answers.*").await;
    let headers: [&[u8]; 8] = [
        b"NATS/1.0\r\nX: a\rb\r\n\r\n",
        b"NATS/1.0\r\nno colon\r\n\r\n",
        b"NATS/1.0\r\na name: x\r\n\r\n",
        b"NATS/1.0\r\n: x\r\n\r\n",
        b"NATS/1.0\r\nX: \xff\xfe\r\n\r\n",
        b"NATS/9.9\r\nX: a\r\n\r\n",
        b"NATS/1.0 x y\r\ntraceparent: x\r\n\r\n",
        b"no headers",
    ];
    for (number, header) in headers.iter().enumerate() {
        let body = b"{\"droplet\":\"x\"}\r\n";
        let (length, all) = (header.len(), header.len() + body.len() - 2);
        let line = format!("HPUB {find} answers.{number} {length} {all}\r\n");
        publish_raw(&[line.as_bytes(), header, body].concat()).await;
        // The command itself is as good as any.
        let answer = inboxes.next().await;
        assert_eq!(answer["ok"], true, "{number}: {answer}");
    }
    // Subjects are words of others, too.
    for word in [&b"\xff"[..], "a\u{3000}b".as_bytes(), b"a\x0cb", b"\x1b[2J"] {
        let subject = [b"dea.", host.id.as_bytes(), b".", word].concat();
        let plain = [b"PUB ", &subject[..], b" answers.x 2\r\n{}\r\n"].concat();
        let headed = [
            b"HPUB ",
            &subject[..],
            b" answers.x 12 14\r\nNATS/1.0\r\n\r\n{}\r\n",
        ];
        for message in [plain, headed.concat()] {
            publish_raw(&message).await;
            let answer = inboxes.next().await;
            assert_eq!(answer["error"]["code"], "bad_subject", "{answer}");
        }
    }
    let log = host.log();
    assert!(!log.contains("connects=2"), "{log}");
    // What a terminal would obey does not reach one that shows the log.
    assert!(!log.contains('\u{1b}'), "{log}");
    host.run(host.message("app", &Droplet::sample("sleeper")))
        .await;
    host.stop("app").await;
}
