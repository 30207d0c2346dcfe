//! One host to test: a namespace, a bus, an agent.

use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use std::{fs, process};

use async_nats::{Client, Message};
use futures_util::StreamExt;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout};

use crate::watch::{known, parse};
use crate::{
    Body, Droplet, Files, Network, Output, Running, Tree, Watch, fixtures, leftovers, patience,
    strict, tool,
};

/// How a host differs from the usual one.
#[derive(Debug, Default)]
pub struct Setup<'a> {
    /// Texts in the configuration and what stands there instead: see [`Host::start`].
    pub config: &'a [(&'a str, &'a str)],
    /// Commands to run in the namespace before the agent starts; `{base}` is its base directory, not made yet.
    pub before: &'a [&'a [&'a str]],
    /// More arguments for nats-server.
    pub bus: &'a [&'a str],
    /// How the test itself connects: with what nats-server wants to be shown.
    pub client: async_nats::ConnectOptions,
    /// The agent's environment, beside the test's own without `NATS_*`.
    pub agent_env: &'a [(&'a str, &'a str)],
}

impl Setup<'_> {
    /// For [`Setup::config`]: no interval ends while a test lasts, so whatever is heard was caused.
    pub const NO_TIMER: (&'static str, &'static str) = (
        "heartbeat = 1\nadvertise = 1\nrouter_register = 1",
        "heartbeat = 3600\nadvertise = 3600\nrouter_register = 3600",
    );
}

/// One question of [`Host::ask_each`].
#[derive(Debug, Clone)]
pub struct Question {
    /// Where it is asked.
    pub subject: String,
    /// What; need not be JSON.
    pub body: Vec<u8>,
    /// How many answers must come.
    pub answers: usize,
}

/// A host under test. Dropping it ends it, and fails the test if anything is left on the machine, or if its agent
/// said anything that nobody can decode.
#[derive(Debug)]
pub struct Host {
    /// The agent's id, from its hello.
    pub id: String,
    /// Where its droplets are served.
    pub files: Files,
    /// Its network, and the outside.
    pub network: Network,
    /// Its base directory.
    pub base: PathBuf,
    nats: Client,
    /// Hear all that the agent says of itself, in every test.
    ears: Vec<Watch>,
    mark: String,
    directory: PathBuf,
    bus_arguments: Vec<String>,
    agent_env: Vec<String>,
    // `None` while a test has ended them.
    bus: Option<Running>,
    agent: Option<Running>,
}

impl Host {
    /// Where its nats-server listens, inside the namespace.
    pub const BUS: &str = "127.0.0.1:4222";

    /// What a bus is started with that another host shall reach, too.
    pub const SHARED: &[&str] = &["--addr", "0.0.0.0"];

    /// A host with 4 GB for apps and all intervals at one second, ready: its hello has come.
    pub async fn start() -> Self {
        Self::with(Setup::default()).await
    }

    /// A host that differs from the usual one.
    pub async fn with(setup: Setup<'_>) -> Self {
        let network = Network::enter();
        let (mark, directory, base) = room(setup.config);
        for command in setup.before {
            let words: Vec<String> = { command[1..].iter() }
                .map(|word| word.replace("{base}", &base.display().to_string()))
                .collect();
            tool(
                command[0],
                &words.iter().map(String::as_str).collect::<Vec<_>>(),
            );
        }
        let bus_arguments: Vec<String> = setup
            .bus
            .iter()
            .map(|&argument| argument.to_owned())
            .collect();
        let bus = bus(&bus_arguments, &directory).await;
        let client = setup.client;
        let options = client
            .connection_timeout(patience())
            .reconnect_delay_callback(|_| Duration::from_millis(20))
            .subscription_capacity(1 << 20);
        let nats = options.connect(Self::BUS).await.expect("it accepts");
        let mut ears = Vec::new();
        for subject in strict::SUBJECTS {
            ears.push(Watch::subscribe(&nats, subject).await);
        }
        let files = Files::serve().await;
        let (bus, id) = (Some(bus), String::new());
        let agent_env = variables(setup.agent_env);
        let mut host = Self {
            id,
            files,
            network,
            base,
            nats,
            ears,
            mark,
            directory,
            bus_arguments,
            agent_env,
            bus,
            agent: None,
        };
        let _ = host.start_agent().await;
        host
    }

    /// Another host on this one's bus, which was started with [`Host::SHARED`]: its network, base directory,
    /// addresses and cgroup parent are its own. Its agent is not started. It must be dropped first.
    pub async fn place_beside(&self, config: &[(&str, &str)]) -> Self {
        let network = self.network.beside();
        let bus = Self::BUS.replace("127.0.0.1", Network::NEAR);
        let mut changes = vec![
            (Self::BUS, bus.as_str()),
            ("10.254.0.0/16", "10.253.0.0/16"),
        ];
        changes.extend(config);
        let (mark, directory, base) = room(&changes);
        Self {
            id: String::new(),
            files: Files::serve_at(Network::NEAR).await,
            network,
            base,
            nats: self.nats.clone(),
            agent_env: Vec::new(),
            // Those of the other host hear it.
            ears: Vec::new(),
            mark,
            directory,
            bus_arguments: Vec::new(),
            bus: None,
            agent: None,
        }
    }

    /// [`Host::place_beside`], ready: its hello has come.
    pub async fn beside(&self, config: &[(&str, &str)]) -> Self {
        let mut host = self.place_beside(config).await;
        let _ = host.start_agent().await;
        host
    }

    /// The nats-server that tests start: the one of `OSTLER_NATS_SERVER`, or Debian's.
    #[must_use]
    pub fn nats_server() -> String {
        std::env::var("OSTLER_NATS_SERVER").unwrap_or("nats-server".into())
    }

    /// The connection that the test itself has to the bus.
    #[must_use]
    pub fn nats(&self) -> &Client {
        &self.nats
    }

    /// `dea.<id>.<verb>`.
    #[must_use]
    pub fn subject(&self, verb: &str) -> String {
        format!("dea.{}.{verb}", self.id)
    }

    /// Publishes `body`; the server has it when this returns.
    pub async fn publish(&self, subject: &str, body: &Value) {
        self.publish_bytes(subject, &body.to_string()).await;
    }

    /// Sends `body` and gives the first answer.
    pub async fn request(&self, subject: &str, body: &Value) -> Value {
        parse(&self.request_bytes(subject, &body.to_string()).await)
    }

    /// Sends `body`, which need not be JSON, and gives the first answer with its headers.
    pub async fn request_bytes(&self, subject: &str, body: &str) -> Message {
        let request = async_nats::Request::new()
            .payload(body.to_owned().into())
            .timeout(Some(patience()));
        let answer = self.nats.send_request(subject.to_owned(), request).await;
        answer.unwrap_or_else(|error| panic!("{subject} {body}: {error}\n{}", self.log()))
    }

    /// Sends these commands or queries in one piece, in this order, an inbox each; gives the first answer to each.
    pub async fn burst(&self, asked: &[(&str, Value)]) -> Vec<Value> {
        let mut inboxes = Vec::new();
        for _ in asked {
            let inbox = self.nats.new_inbox();
            inboxes.push((self.watch(&inbox).await, inbox));
        }
        for ((subject, body), (_, inbox)) in asked.iter().zip(&inboxes) {
            let (subject, body) = ((*subject).to_owned(), body.to_string().into());
            let sent = self.nats.publish_with_reply(subject, inbox.clone(), body);
            sent.await.expect("connected");
        }
        self.nats.flush().await.expect("connected");
        let mut answers = Vec::new();
        for (watch, _) in &mut inboxes {
            answers.push(watch.next().await);
        }
        answers
    }

    /// Sends `body`, which need not be JSON, and gives the first `count` answers.
    pub async fn request_many(&self, subject: &str, body: &str, count: usize) -> Vec<Value> {
        let inbox = self.nats.new_inbox();
        let mut answers = self.watch(&inbox).await;
        let (subject, body) = (subject.to_owned(), body.to_owned().into());
        let sent = self.nats.publish_with_reply(subject, inbox, body).await;
        sent.expect("connected");
        while answers.all().len() < count {
            answers.next().await;
        }
        answers.all().to_vec()
    }

    /// Sends `body`, which need not be JSON; the server has it when this returns.
    pub async fn publish_bytes(&self, subject: &str, body: &str) {
        let (subject, body) = (subject.to_owned(), body.to_owned().into());
        self.nats.publish(subject, body).await.expect("connected");
        self.nats.flush().await.expect("connected");
    }

    /// Sends `body`, waits for `least` answers, and gives all that come before `within` has passed without another one.
    pub async fn request_all(
        &self,
        subject: &str,
        body: &Value,
        (least, within): (usize, Duration),
    ) -> Vec<Value> {
        let inbox = self.nats.new_inbox();
        let mut answers = self.watch(&inbox).await;
        let sent = self
            .nats
            .publish_with_reply(subject.to_owned(), inbox, body.to_string().into())
            .await;
        sent.expect("connected");
        while answers.all().len() < least {
            answers.next().await;
        }
        while timeout(within, answers.next()).await.is_ok() {}
        answers.all().to_vec()
    }

    /// Asks all at once, each with an inbox of its own. Waits until each has as many answers as it must have,
    /// and then two seconds more for those that must not come. Gives all, in the order of the questions.
    pub async fn ask_each(&self, questions: &[Question]) -> Vec<Vec<Message>> {
        let lanes = [self.nats.clone()];
        self.ask_each_over(&lanes, questions, |_| 0).await
    }

    /// [`Host::ask_each`] over several connections: the question of a number goes over that of `lane`.
    pub async fn ask_each_over(
        &self,
        lanes: &[Client],
        questions: &[Question],
        lane: impl Fn(usize) -> usize,
    ) -> Vec<Vec<Message>> {
        let inbox = self.nats.new_inbox();
        let all = self.nats.subscribe(format!("{inbox}.*")).await;
        let mut all = all.expect("a good subject");
        // Before anybody asks over another connection.
        self.nats.flush().await.expect("connected");
        for (number, question) in questions.iter().enumerate() {
            let (subject, to) = (question.subject.clone(), format!("{inbox}.{number}"));
            let body = question.body.clone().into();
            let sent = lanes[lane(number)].publish_with_reply(subject, to, body);
            sent.await.expect("connected");
        }
        for lane in lanes {
            lane.flush().await.expect("connected");
        }
        let mut answers = vec![Vec::new(); questions.len()];
        let mut missing: usize = questions.iter().map(|question| question.answers).sum();
        loop {
            let longest = if missing > 0 {
                patience()
            } else {
                Duration::from_secs(2)
            };
            let Ok(answer) = timeout(longest, all.next()).await else {
                break;
            };
            let answer = answer.expect("the subscription lives");
            let (_, number) = answer.subject.rsplit_once('.').expect("below the inbox");
            let number: usize = number.parse().expect("one of ours");
            if answers[number].len() < questions[number].answers {
                missing -= 1;
            }
            answers[number].push(answer);
        }
        answers
    }

    /// Subscribes to `subject`.
    pub async fn watch(&self, subject: &str) -> Watch {
        Watch::subscribe(&self.nats, subject).await
    }

    /// Reads the output of `droplet` from now on.
    pub async fn output(&self, droplet: &str) -> Output {
        Output::of(&self.nats, droplet).await
    }

    /// A message of the protocol reference: the file `fixtures/messages/<name>.json`, as it stands.
    #[must_use]
    pub fn fixture_text(name: &str) -> String {
        let path = fixtures().join(format!("messages/{name}.json"));
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    /// [`Host::fixture_text`], to be changed where a test needs it.
    #[must_use]
    pub fn fixture(name: &str) -> Value {
        serde_json::from_str(&Self::fixture_text(name)).expect("a fixture is JSON")
    }

    /// The start message of the protocol reference, for `package` under the id `droplet` on this host: instance 0,
    /// 128 MB, no routes and so no health check. The rest is as a controller sends it; its egress rules too.
    #[must_use]
    pub fn message(&self, droplet: &str, package: &Droplet) -> Value {
        let url = self
            .files
            .put(&format!("{droplet}.tgz"), Body::Bytes(package.0.clone()));
        let mut message = Self::fixture("dea.start");
        for (key, value) in [
            ("droplet", json!(droplet)),
            ("index", json!(0)),
            ("uris", json!([])),
            ("executableUri", json!(url)),
            ("sha1", json!(package.sha1())),
            ("limits", json!({"mem": 128, "disk": 256, "fds": 1024})),
            ("stack", json!("debian")),
        ] {
            message[key] = value;
        }
        message
    }

    /// Starts an instance and waits until it runs: the answer, with its ids.
    pub async fn run(&self, mut message: Value) -> Value {
        message["wait"] = json!("running");
        let answer = self.request(&self.subject("start"), &message).await;
        assert_eq!(answer["ok"], true, "{message}\n{answer}\n{}", self.log());
        answer
    }

    /// Stops all instances of `droplet` here and waits until they are gone.
    pub async fn stop(&self, droplet: &str) {
        let mut message = Self::fixture("dea.stop-app");
        message["droplet"] = json!(droplet);
        message["wait"] = json!("stopped");
        let answer = self.request(&self.subject("stop"), &message).await;
        assert_eq!(answer["ok"], true, "{answer}\n{}", self.log());
    }

    /// What the agent keeps of an instance.
    ///
    /// # Panics
    /// There is no such record.
    #[must_use]
    pub fn record(&self, handle: &str) -> Value {
        let path = self.base.join("instances").join(handle).join("record.json");
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    }

    /// Waits until the agent knows that the bus has what was said of an instance: it is not said again.
    pub async fn confirmed(&self, handle: &str) {
        let all = |_: &_| self.record(handle)["unsent"] == json!([]);
        self.tree_until("confirmation", all).await;
    }

    /// The agent and all processes of its base directory and its containers.
    #[must_use]
    pub fn tree(&self) -> Tree {
        Tree::read(self.agent.as_ref().map(Running::pid), &self.mark)
    }

    /// The tree, once it is as `wanted`.
    ///
    /// # Panics
    /// After the deadline, with the tree that there is.
    pub async fn tree_until(&self, what: &str, wanted: impl Fn(&Tree) -> bool) -> Tree {
        let deadline = Instant::now() + patience();
        loop {
            let tree = self.tree();
            if wanted(&tree) {
                return tree;
            }
            assert!(
                Instant::now() < deadline,
                "no {what}:\n{tree}\n{}",
                self.log()
            );
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// The agent, which must run.
    #[must_use]
    pub fn agent(&self) -> &Running {
        self.agent.as_ref().expect("the test has not ended it")
    }

    /// The nats-server, which must run.
    #[must_use]
    pub fn bus(&self) -> &Running {
        self.bus.as_ref().expect("the test has not ended it")
    }

    /// Kills the agent with SIGKILL.
    pub async fn kill9(&mut self) {
        let agent = self.agent.take().expect("it runs");
        agent.signal(Signal::SIGKILL);
        agent
            .ended(patience())
            .await
            .expect("nothing survives SIGKILL");
    }

    /// Sends `signal` to the agent and waits for its end.
    pub async fn end(&mut self, signal: Signal) -> ExitStatus {
        let agent = self.agent.take().expect("it runs");
        agent.signal(signal);
        let ended = agent.ended(patience() * 2).await;
        ended.unwrap_or_else(|| panic!("the agent still runs after {signal}\n{}", self.log()))
    }

    /// Waits until the agent ends by itself.
    pub async fn ended(&mut self) -> ExitStatus {
        let agent = self.agent.take().expect("it runs");
        let ended = agent.ended(patience() * 2).await;
        ended.unwrap_or_else(|| panic!("the agent does not end\n{}", self.log()))
    }

    /// Starts the agent, waits for its hello and gives it.
    pub async fn start_agent(&mut self) -> Value {
        let mut hellos = self.watch("dea.start").await;
        self.spawn_agent();
        let agent = self.agent.as_ref().expect("just started");
        let hello = tokio::select! {
            hello = hellos.next() => hello,
            status = agent.ended(patience() * 2) => panic!("the agent ended: {status:?}\n{}", self.log()),
        };
        hello["id"]
            .as_str()
            .expect("the hello has an id")
            .clone_into(&mut self.id);
        hello
    }

    /// Starts the agent without waiting for anything.
    pub fn spawn_agent(&mut self) {
        self.spawn_agent_by(&[]);
    }

    /// From the next start on the agent has these variables instead of those that it began with.
    pub fn set_agent_env(&mut self, agent_env: &[(&str, &str)]) {
        self.agent_env = variables(agent_env);
    }

    /// [`Host::spawn_agent`] by a wrapper that executes its last arguments in its own place.
    pub fn spawn_agent_by(&mut self, wrapper: &[&str]) {
        let agent = self.agent_command("agent");
        let environment = self.agent_env.iter().map(String::as_str);
        let words = environment.chain(wrapper.iter().copied());
        let words = words.chain(agent.iter().map(String::as_str));
        let arguments: Vec<&str> = words.chain(["--log", "text"]).collect();
        let log = self.agent_log();
        let start = || Running::start(Path::new("env"), &arguments, &log);
        self.agent = Some(self.network.inside(start));
    }

    /// After the agent was killed: everything of this host dies, the kernel that comes up has another boot id, and the
    /// agent is started, without waiting for anything.
    pub async fn boot(&mut self) {
        for process in self.tree().0 {
            process.signal(Signal::SIGKILL);
        }
        self.tree_until("dark machine", |tree| tree.0.is_empty())
            .await;
        let id = self.base.join("boot_id");
        fs::write(&id, "00000000-0000-4000-8000-000000000001\n").expect("the base is there");
        let script = format!(
            "mount --bind {} /proc/sys/kernel/random/boot_id && exec \"$@\"",
            id.display()
        );
        self.spawn_agent_by(&["unshare", "--mount", "bash", "-c", &script, "bash"]);
    }

    /// Runs `ostler clean` to its end.
    pub async fn clean(&self) -> ExitStatus {
        let clean = self.start_clean().ended(patience()).await;
        clean.unwrap_or_else(|| panic!("`ostler clean` does not end\n{}", self.log()))
    }

    /// Starts another agent beside the one that runs, which must refuse, with a base directory of its own.
    pub async fn end_of_second_agent(&self, base: &Path) -> ExitStatus {
        let command = self.agent_command("agent");
        let base = base.display().to_string();
        let mut arguments: Vec<&str> = command.iter().skip(1).map(String::as_str).collect();
        arguments.extend(["--base", &base]);
        let second = Running::start(Path::new(&command[0]), &arguments, &self.agent_log());
        let ended = second.ended(patience()).await;
        ended.unwrap_or_else(|| panic!("a second agent runs\n{}", self.log()))
    }

    /// `ostler <verb> --config <this host's>`, for a verb of a person; to be given arguments and run.
    #[must_use]
    pub fn ostler(&self, verb: &str) -> process::Command {
        self.ostler_by(&[], verb)
    }

    /// [`Host::ostler`] by a wrapper that executes its last arguments.
    #[must_use]
    pub fn ostler_by(&self, wrapper: &[&str], verb: &str) -> process::Command {
        let ostler = self.agent_command(verb);
        let ostler = ostler.iter().map(String::as_str);
        let mut words = wrapper.iter().copied().chain(ostler);
        let mut command = process::Command::new(words.next().expect("at least ostler"));
        command.args(words);
        command
    }

    fn start_clean(&self) -> Running {
        let command = self.agent_command("clean");
        let arguments: Vec<&str> = command.iter().skip(1).map(String::as_str).collect();
        let log = self.agent_log();
        let start = || Running::start(Path::new(&command[0]), &arguments, &log);
        self.network.inside(start)
    }

    /// `ostler <verb> --config <this host's>`.
    fn agent_command(&self, verb: &str) -> [String; 4] {
        let program = crate::path("OSTLER_AGENT", "target/debug/ostler")
            .display()
            .to_string();
        let config = self.directory.join("agent.toml").display().to_string();
        [program, verb.to_owned(), "--config".to_owned(), config]
    }

    fn agent_log(&self) -> PathBuf {
        self.directory.join("agent.log")
    }

    /// SIGKILL and a new start; gives the hello.
    pub async fn restart(&mut self) -> Value {
        self.kill9().await;
        self.start_agent().await
    }

    /// Takes the bus away, once the test has all that the server took from the agent.
    pub async fn stop_bus(&mut self) {
        // What a server has confirmed and not passed on is lost with it, and no loss of the agent's: it is held until the
        // server has nothing more for us. One that hangs has no answer.
        self.agent
            .iter()
            .for_each(|agent| agent.signal(Signal::SIGSTOP));
        for _ in 0..2 {
            let _ = timeout(Duration::from_secs(2), known(&self.nats)).await;
        }
        let bus = self.bus.take().expect("it runs");
        bus.signal(Signal::SIGKILL);
        bus.ended(patience())
            .await
            .expect("nothing survives SIGKILL");
        self.agent
            .iter()
            .for_each(|agent| agent.signal(Signal::SIGCONT));
    }

    /// Brings the bus back; the test's own subscriptions are there again when this returns.
    pub async fn start_bus(&mut self) {
        // What an agent publishes before anybody has subscribed again reaches nobody and is no loss of
        // its own: it is held until the test is connected.
        self.agent
            .iter()
            .for_each(|agent| agent.signal(Signal::SIGSTOP));
        self.bus = Some(bus(&self.bus_arguments, &self.directory).await);
        known(&self.nats).await;
        self.agent
            .iter()
            .for_each(|agent| agent.signal(Signal::SIGCONT));
    }

    /// What the agent has logged, its last lines.
    #[must_use]
    pub fn log(&self) -> String {
        let log = fs::read_to_string(self.agent_log()).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let tail = lines.len().saturating_sub(60);
        format!(
            "--- the agent's log ({} lines):\n{}\n---",
            lines.len(),
            lines[tail..].join("\n")
        )
    }

    /// All that the agent has logged, once `words` stand in what it has logged after the first `from` bytes.
    ///
    /// # Panics
    /// After the deadline.
    pub async fn logged(&self, from: usize, words: &str) -> String {
        let deadline = Instant::now() + patience();
        loop {
            let log = fs::read_to_string(self.agent_log()).unwrap_or_default();
            if log.get(from..).is_some_and(|log| log.contains(words)) {
                return log;
            }
            let late = Instant::now() >= deadline;
            assert!(!late, "the agent does not log {words:?}\n{}", self.log());
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// From here on the test speaks in hosts' places itself: what comes on their subjects is not held to anything.
    pub fn listen_no_more(&mut self) {
        self.ears.clear();
    }

    /// What nats-server has logged.
    #[must_use]
    pub fn bus_log(&self) -> String {
        fs::read_to_string(self.directory.join("nats.log")).unwrap_or_default()
    }

    /// How long the agent says that something took, each time that it has logged this.
    #[must_use]
    pub fn took(&self, event: &str) -> Vec<Duration> {
        let log = fs::read_to_string(self.agent_log()).unwrap_or_default();
        let lines = log.lines().filter(|line| line.contains(event));
        lines
            .filter_map(|line| {
                let (_, after) = line.split_once("elapsed_us=")?;
                after.split(' ').next()?.parse().ok()
            })
            .map(Duration::from_micros)
            .collect()
    }

    /// The control group of a container, in the hierarchy of `controller` (cgroup v2 has one for all).
    #[must_use]
    pub fn group(&self, controller: &str, handle: &str) -> PathBuf {
        let root = Path::new("/sys/fs/cgroup");
        let hierarchy = if crate::is_cgroup_v2() {
            root.to_owned()
        } else {
            root.join(controller)
        };
        hierarchy.join(&self.mark).join(handle)
    }

    /// What is on the machine of this host that a stopped agent must have removed; one line each.
    #[must_use]
    pub fn leftovers(&self) -> Vec<String> {
        let find = || leftovers::find(&self.mark, &self.base);
        self.network.inside(find)
    }

    /// Ends the agent as an operator does, or cleans up after one that a test has killed.
    fn shut_down(&mut self) -> Result<(), String> {
        let Some(agent) = self.agent.take() else {
            let status = self
                .start_clean()
                .wait(patience())
                .ok_or("`ostler clean` does not end")?;
            return if status.success() {
                Ok(())
            } else {
                Err(format!("`ostler clean`: {status}"))
            };
        };
        agent.signal(Signal::SIGTERM);
        // What resists may cost it half a minute: the grace, what a shutdown has beyond it, and one more try.
        let status = agent
            .wait(patience() * 2)
            .ok_or("the agent does not end after SIGTERM")?;
        if status.success() {
            Ok(())
        } else {
            Err(format!("after SIGTERM the agent ended with {status}"))
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let mut complaints = Vec::from_iter(self.shut_down().err());
        complaints.extend(
            self.leftovers()
                .into_iter()
                .map(|what| format!("left over: {what}")),
        );
        complaints.extend(self.ears.iter_mut().flat_map(Watch::complaints));
        let log = self.log();
        leftovers::remove(&self.mark, &self.directory);
        if std::thread::panicking() {
            eprintln!("{log}\n{}", complaints.join("\n"));
        } else {
            assert!(complaints.is_empty(), "{}\n{log}", complaints.join("\n"));
        }
    }
}

/// A mark of its own, a directory with the configuration, and where the base directory is to be.
fn room(changes: &[(&str, &str)]) -> (String, PathBuf, PathBuf) {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    // Short: socket paths below it have 108 bytes at most.
    let mark = format!(
        "ostler-test-{}-{}",
        process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed)
    );
    let directory = Path::new("/tmp").join(&mark);
    let base = directory.join("base");
    fs::create_dir_all(&directory).expect("/tmp is writable");
    let config = config(&base, &mark, changes);
    fs::write(directory.join("agent.toml"), config).expect("just made");
    (mark, directory, base)
}

fn variables(variables: &[(&str, &str)]) -> Vec<String> {
    let variables = variables.iter();
    variables
        .map(|(name, value)| format!("{name}={value}"))
        .collect()
}

fn config(base: &Path, mark: &str, changes: &[(&str, &str)]) -> String {
    let helpers = crate::path("OSTLER_HELPERS", "target/x86_64-unknown-linux-gnu/helpers");
    let mut config = format!(
        r#"base = "{}"
helpers = "{}"
[nats]
url = "nats://{}"
[stacks]
debian = "{}"
[resources]
memory_mb = 4096
disk_mb = 16384
[intervals]
heartbeat = 1
advertise = 1
router_register = 1
[network]
pool = "10.254.0.0/16"
[cgroup]
parent = "{mark}"
"#,
        base.display(),
        helpers.display(),
        Host::BUS,
        crate::stack().display(),
    );
    for (old, new) in changes {
        assert!(config.contains(old), "the configuration has no {old:?}");
        config = config.replace(old, new);
    }
    config
}

/// Starts a nats-server and waits until it accepts.
async fn bus(arguments: &[String], directory: &Path) -> Running {
    let (address, port) = Host::BUS.split_once(':').expect("an address and a port");
    // It ends with this thread also when the test itself is killed.
    let program = Host::nats_server();
    let mut all = vec![
        "--pdeathsig",
        "KILL",
        &program,
        "--addr",
        address,
        "--port",
        port,
    ];
    all.extend(arguments.iter().map(String::as_str));
    let bus = Running::start(Path::new("setpriv"), &all, &directory.join("nats.log"));
    let deadline = Instant::now() + patience();
    while tokio::net::TcpStream::connect(Host::BUS).await.is_err() {
        assert!(
            Instant::now() < deadline,
            "nats-server does not listen: see {}",
            directory.display()
        );
        sleep(Duration::from_millis(5)).await;
    }
    bus
}
