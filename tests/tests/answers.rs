//! What is asked, however and however often, is answered as often as it must be, and the machine is as it
//! was told to be.

use async_nats::Message;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::Duration;
use tests::{Body, Dice, Droplet, Host, Question, Setup};
use tokio::time::sleep;

/// All codes that an answer may have.
const CODES: [&str; 14] = [
    "bad_json",
    "bad_field",
    "bad_subject",
    "unknown_stack",
    "unknown_app",
    "not_enough_memory",
    "not_enough_disk",
    "host_full",
    "busy",
    "shutting_down",
    "ended",
    "stuck",
    "too_large",
    "internal",
];

/// Prints, and dies of KILL alone.
const DEAF: &str = "trap '' TERM; echo up; while :; do sleep 0.05; done";

/// Prints, waits for USR1, then serves on its port.
const SLOW: &str = "trap go=1 USR1\necho up\nwhile [ -z \"$go\" ]; do sleep 0.05; done\nexec perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(Listen => 5, LocalPort => $ENV{PORT}) or die; while (1) { $c = $s->accept }'";

fn body(message: &Message) -> Value {
    serde_json::from_slice(&message.payload).unwrap_or_else(|error| panic!("{error}: {message:?}"))
}

/// The code of an answer, or `ok`; the answer is whole.
fn code(message: &Message) -> String {
    let body = body(message);
    if body["ok"] == true {
        assert_eq!(message.headers, None, "{body}");
        return "ok".to_owned();
    }
    let error = &body["error"];
    let code = error["code"].as_str().unwrap_or_default().to_owned();
    assert!(CODES.contains(&code.as_str()), "{body}");
    assert!(error["message"].is_string() && error["retryable"].is_boolean());
    let headers = message.headers.as_ref().expect("an error has headers");
    let header = |name| headers.get(name).expect("both headers").as_str();
    assert!(header("Nats-Service-Error").starts_with(&code), "{body}");
    let number: u16 = header("Nats-Service-Error-Code").parse().unwrap();
    assert!((400..600).contains(&number), "{body}");
    code
}

/// What no subject with fields can make sense of.
fn junk(dice: &mut Dice) -> Vec<u8> {
    let long = "x".repeat(200_000);
    match dice.number(14) {
        0 => Vec::new(),
        1 => b"{".to_vec(),
        2 => b"[]".to_vec(),
        3 => b"7".to_vec(),
        4 => b"\"droplet\"".to_vec(),
        5 => b"null".to_vec(),
        6 => b"\xff\xfe\0".to_vec(),
        7 => b"{\"droplet\":".to_vec(),
        8 => "[".repeat(5000).into_bytes(),
        9 => format!("{{\"droplet\":\"{long}").into_bytes(),
        10 => b"{}".to_vec(),
        11 => b"{\"droplet\":null}".to_vec(),
        12 => b"{\"droplet\":1e999}".to_vec(),
        _ => format!("{{\"droplet\":{{\"{long}\":[[[]]]}}}}").into_bytes(),
    }
}

fn is_json(body: &[u8]) -> bool {
    serde_json::from_slice::<Value>(body).is_ok()
}

/// `body` with one of its fields gone, of another type, or of an unlikely size. Some still mean something.
fn spoiled(dice: &mut Dice, mut body: Value) -> Value {
    let fields = body.as_object_mut().expect("an object");
    let keys: Vec<String> = fields.keys().cloned().collect();
    let key = dice.pick(&keys);
    let numbers: Vec<u32> = (0..20_000).collect();
    let value = match dice.number(11) {
        0 => json!(true),
        1 => json!(-1),
        2 => json!(1.5),
        3 => json!(""),
        4 => json!("x".repeat(100_000)),
        5 => json!([[], "a"]),
        6 => json!({"a": {"droplet": "a"}}),
        7 => json!(numbers),
        8 => json!(u64::MAX),
        9 => json!("\u{0}\u{7f}ü\r\nNats-Evil: 1"),
        _ => {
            fields.remove(&key);
            return body;
        }
    };
    fields.insert(key, value);
    body
}

/// A question, and how many answers it may have at most.
struct Case {
    question: Question,
    most: usize,
    is_command: bool,
}

impl Case {
    fn command(subject: String, body: Vec<u8>, hosts: usize) -> Self {
        let answers = hosts;
        Self {
            question: Question {
                subject,
                body,
                answers,
            },
            most: hosts,
            is_command: true,
        }
    }

    fn query(subject: &str, body: Vec<u8>, answers: std::ops::RangeInclusive<usize>) -> Self {
        Self {
            question: Question {
                subject: subject.to_owned(),
                body,
                answers: *answers.start(),
            },
            most: *answers.end(),
            is_command: false,
        }
    }

    fn check(&self, answers: &[Message]) {
        let Question { subject, body, .. } = &self.question;
        let head = body.get(..200).unwrap_or(body);
        let about = format!("{subject} {:?}: {answers:?}", String::from_utf8_lossy(head));
        let wanted = self.question.answers..=self.most;
        assert!(wanted.contains(&answers.len()), "not {wanted:?}: {about}");
        if self.is_command {
            let from = answers.iter().map(self::body);
            let from: BTreeSet<String> = from
                .map(|answer| answer["dea"].as_str().unwrap().to_owned())
                .collect();
            assert_eq!(from.len(), answers.len(), "{about}");
        } else {
            let mut told = BTreeSet::new();
            for answer in answers.iter().map(self::body) {
                assert!(answer.get("ok").is_none(), "{about}");
                assert!(answer.get("error").is_none(), "{about}");
                let instance = answer["instance"].as_str().map(str::to_owned);
                assert!(instance.is_none_or(|one| told.insert(one)), "{about}");
            }
        }
    }
}

/// Two hosts with an app that nobody touches, and others that come and go.
struct Stage {
    ids: Vec<String>,
    start: Value,
    /// What stays: index and instance.
    stay: Vec<(u64, String)>,
}

impl Stage {
    fn here(&self, dice: &mut Dice, verb: &str) -> String {
        format!("dea.{}.{verb}", dice.pick(&self.ids))
    }

    fn case(&self, dice: &mut Dice) -> Case {
        if dice.number(10) < 6 {
            return self.command(dice);
        }
        let body = junk(dice);
        let of_json = |hosts: usize| {
            if body.is_empty() || is_json(&body) {
                hosts
            } else {
                0
            }
        };
        match dice.number(11) {
            0..=2 => self.find(dice),
            3 => {
                let find = json!({"droplet": coming(dice), "include_stats": true});
                Case::query("dea.find.droplet", bytes(&find), 0..=1000)
            }
            4 => Case::query(
                dice.pick(&["dea.find.droplet", "dea.discover"]),
                body,
                0..=0,
            ),
            5 => {
                let answers = of_json(2);
                Case::query("dea.status", body, answers..=answers)
            }
            6 => {
                let (least, most) = (of_json(self.stay.len()), of_json(1000));
                Case::query("droplet.status", body, least..=most)
            }
            7 => {
                let (mem, fits) = dice.pick(&[(1_u64, 2), (1 << 40, 0)]);
                let discover = json!({"droplet": coming(dice), "limits": {"mem": mem}});
                Case::query("dea.discover", bytes(&discover), fits..=fits)
            }
            8 => {
                let triggers = ["dea.locate", "healthmanager.start", "router.start"];
                Case::query(dice.pick(&triggers), body, 0..=0)
            }
            9 => Case::query("vcap.component.discover", body, 2..=2),
            _ => {
                let verb = dice.pick(&["PING", "INFO", "STATS"]);
                let one = format!(".ostler.{}", dice.pick(&self.ids));
                let (whose, hosts) = dice.pick(&[("", 2), (".ostler", 2), (one.as_str(), 1)]);
                Case::query(&format!("$SRV.{verb}{whose}"), body, hosts..=hosts)
            }
        }
    }

    fn command(&self, dice: &mut Dice) -> Case {
        let droplet = coming(dice);
        let indices: Vec<u64> = (0..dice.number(4)).collect();
        let (subject, hosts, mut good) = match dice.number(8) {
            0 => {
                let mut start = self.start.clone();
                start["droplet"] = json!(droplet);
                start["index"] = json!(dice.number(4));
                (self.here(dice, "start"), 1, start)
            }
            1 => ("dea.stop".to_owned(), 2, json!({"droplet": droplet})),
            2 => {
                let stop = json!({"droplet": droplet, "indices": indices, "version": "v1"});
                (self.here(dice, "stop"), 1, stop)
            }
            3 => {
                let some = ["a.example.net", "b.example.net"];
                let uris = dice.pick(&[&some[..0], &some]);
                let update = json!({"droplet": droplet, "uris": uris, "version": "v1"});
                ("dea.update".to_owned(), 2, update)
            }
            4 => {
                let scale = json!({"droplet": droplet, "instances": dice.number(3), "limits": {"mem": 16 + dice.number(8)}});
                (self.here(dice, "scale"), 1, scale)
            }
            5 if indices.is_empty() => (
                self.here(dice, "logs"),
                1,
                json!({"droplet": dice.pick(&["stay", droplet.as_str()]), "file": "stdout"}),
            ),
            5 => (
                self.here(dice, "find"),
                1,
                json!({"droplet": dice.pick(&["stay", droplet.as_str()]), "indices": indices}),
            ),
            6 => (self.here(dice, "stop"), 1, json!({"droplet": droplet})),
            _ => (self.here(dice, &droplet), 1, json!({"droplet": droplet})),
        };
        let verb = subject.rsplit('.').next().unwrap_or_default();
        match (dice.number(5), verb) {
            (0, "start") => good["wait"] = json!("running"),
            (0, "stop") => good["wait"] = json!("stopped"),
            (1, _) => good["request_id"] = json!(format!("r-{}", dice.number(8))),
            _ => {}
        }
        let body = match dice.number(10) {
            0..=3 => bytes(&good),
            4..=6 => bytes(&spoiled(dice, good)),
            _ => junk(dice),
        };
        Case::command(subject, body, hosts)
    }

    /// A query for what stays, with as many answers as the protocol's table of filters says (2.2).
    fn find(&self, dice: &mut Dice) -> Case {
        let mut find = json!({"droplet": "stay", "include_stats": dice.number(2) == 0});
        let mut left: BTreeSet<u64> = self.stay.iter().map(|(index, _)| *index).collect();
        match dice.number(6) {
            0 => find["version"] = json!("v1"),
            1 => find["version"] = dice.pick(&[json!(null), json!(false)]).clone(),
            2 => {
                find["version"] = dice.pick(&[json!(""), json!("v9")]);
                left.clear();
            }
            _ => {}
        }
        match dice.number(6) {
            0 => find["indices"] = dice.pick(&[json!([]), json!(null), json!([null])]).clone(),
            1 => {
                find["indices"] = json!(["1"]);
                left.clear();
            }
            2 | 3 => {
                let some: Vec<u64> = (0..7).filter(|_| dice.number(2) == 0).collect();
                find["indices"] = json!(some);
                left.retain(|index| some.is_empty() || some.contains(index));
            }
            _ => {}
        }
        match dice.number(6) {
            0 => find["states"] = dice.pick(&[json!([]), json!(["running"])]).clone(),
            1 => find["states"] = json!(["CRASHED", "Running"]),
            2 => {
                let none = [json!(["STOPPED"]), json!(["FLYING"]), json!("RUNNING")];
                find["states"] = dice.pick(&none);
                left.clear();
            }
            _ => {}
        }
        match dice.number(6) {
            0 => find["instances"] = json!([]),
            1 | 2 => {
                let (index, instance) = dice.pick(&self.stay);
                let (other, more) = dice.pick(&self.stay);
                find["instances"] = json!(["0123", instance]);
                find["instance_ids"] = json!([more]);
                left.retain(|one| *one == index || *one == other);
            }
            3 => {
                find["instance_ids"] = json!(["0123"]);
                left.clear();
            }
            _ => {}
        }
        Case::query("dea.find.droplet", bytes(&find), left.len()..=left.len())
    }
}

fn coming(dice: &mut Dice) -> String {
    format!("come-{}", dice.number(6))
}

fn bytes(body: &Value) -> Vec<u8> {
    body.to_string().into_bytes()
}

fn small(host: &Host, droplet: &str, index: u64) -> Value {
    let mut message = host.message(droplet, &Droplet::sample("sleeper"));
    message["version"] = json!("v1");
    message["index"] = json!(index);
    message["limits"] = json!({"mem": 16, "disk": 16, "fds": 64});
    // The host's own holds: nobody waits long for a port that an update has made necessary.
    let fields = message.as_object_mut().expect("an object");
    fields.remove("health_check_timeout");
    message
}

/// Whatever the host tells of in its next heartbeat, apps and their states.
async fn apps(host: &Host) -> Vec<(String, String)> {
    let mut heartbeats = host.watch("dea.heartbeat").await;
    let beat = heartbeats
        .until("heartbeat of it", |beat| beat["dea"] == host.id.as_str())
        .await;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let entries = beat["droplets"].as_array().unwrap().iter();
    entries
        .map(|entry| (text(&entry["droplet"]), text(&entry["state"])))
        .collect()
}

/// Little patience with ports, and a page that collectors are told of.
const PATIENCE_AND_PAGE: (&str, &str) = (
    "[network]",
    "[metrics]\nlisten = \"0.0.0.0:9464\"\n[instance]\nhealth_check_timeout = 2\n[network]",
);

#[tokio::test]
async fn a_thousand_random_requests_are_answered_once_each_by_every_host() {
    let one = Host::with(Setup {
        config: &[PATIENCE_AND_PAGE],
        bus: Host::SHARED,
        ..Default::default()
    })
    .await;
    let two = one.beside(&[PATIENCE_AND_PAGE]).await;
    assert_ne!(one.id, two.id);
    let mut stay = Vec::new();
    for index in 0..5 {
        let host = if index < 3 { &one } else { &two };
        let answer = host.run(small(&two, "stay", index)).await;
        stay.push((index, answer["instance"].as_str().unwrap().to_owned()));
    }
    let stage = Stage {
        ids: vec![one.id.clone(), two.id.clone()],
        start: small(&two, "come", 0),
        stay,
    };
    let mut dice = Dice(19);
    for _ in 0..4 {
        let cases: Vec<Case> = (0..250).map(|_| stage.case(&mut dice)).collect();
        let questions: Vec<Question> = cases.iter().map(|case| case.question.clone()).collect();
        let answers = one.ask_each(&questions).await;
        for (case, answers) in cases.iter().zip(&answers) {
            case.check(answers);
        }
    }
    // What was not to be touched is as it was; the rest does as it is told.
    for host in [&one, &two] {
        for (droplet, _) in apps(host).await {
            if droplet != "stay" {
                host.stop(&droplet).await;
            }
        }
    }
    let find = json!({"droplet": "stay", "states": ["RUNNING"], "include_stats": true});
    let questions = ["dea.find.droplet", "droplet.status"].map(|subject| Question {
        subject: subject.to_owned(),
        body: bytes(&find),
        answers: 5,
    });
    let answers = one.ask_each(&questions).await;
    assert_eq!(answers.iter().map(Vec::len).collect::<Vec<_>>(), [5, 5]);
    let mut found: Vec<(u64, String)> = answers[0]
        .iter()
        .map(body)
        .map(|found| {
            let instance = found["instance"].as_str().unwrap().to_owned();
            (found["index"].as_u64().unwrap(), instance)
        })
        .collect();
    found.sort_unstable();
    assert_eq!(found, stage.stay);
    for host in [&one, &two] {
        host.stop("stay").await;
    }
}

/// Sends, and says which answers are right.
#[derive(Clone)]
struct Sent {
    question: Question,
    right: &'static [&'static str],
    /// The app that it is about; each has a connection of its own, so that the order of what is asked of it is known.
    app: usize,
}

const APPS: u64 = 8;

/// Of these, instances run when all is said: nobody stops them whole.
const KEPT: usize = 6;

const REFUSED: &[&str] = &[
    "ok",
    "busy",
    "host_full",
    "not_enough_memory",
    "not_enough_disk",
];

const SCALED: &[&str] = &[
    "ok",
    "busy",
    "host_full",
    "not_enough_memory",
    "not_enough_disk",
    "unknown_app",
];

fn sent(subject: &str, body: &Value, right: &'static [&'static str]) -> Sent {
    Sent {
        question: Question {
            subject: subject.to_owned(),
            body: bytes(body),
            answers: 1,
        },
        right,
        app: 0,
    }
}

/// A start of one of [`APPS`].
fn begin(host: &Host, start: &Value, app: usize, index: u64) -> Value {
    let mut start = start.clone();
    start["droplet"] = json!(format!("app-{app}"));
    start["index"] = json!(index);
    if app > 0 {
        // Its droplet never comes: it starts until it is stopped, and costs little.
        start["executableUri"] = json!(host.files.put("silent.tgz", Body::Silent));
        start["sha1"] = json!("0".repeat(40));
    }
    start
}

fn good(host: &Host, start: &Value, dice: &mut Dice) -> Sent {
    let app = usize::try_from(dice.number(APPS)).unwrap();
    let droplet = format!("app-{app}");
    // Under the same id the same is asked, or something else.
    let id = |dice: &mut Dice, verb: &str| format!("{verb}-{app}-{}", dice.number(30));
    let sent = match dice.number(8) {
        0..=2 => {
            let mut start = begin(host, start, app, dice.number(100));
            if dice.number(2) == 0 {
                start["request_id"] = json!(id(dice, "start"));
            }
            sent(&host.subject("start"), &start, REFUSED)
        }
        3 | 4 if app < KEPT => sent("dea.stop", &json!({"droplet": droplet}), &["ok"]),
        5 if app < KEPT => {
            let mut stop = json!({"droplet": droplet, "indices": [dice.number(100)]});
            stop["request_id"] = json!(id(dice, "stop"));
            sent(&host.subject("stop"), &stop, &["ok"])
        }
        6 => {
            let update =
                json!({"droplet": droplet, "uris": [], "version": format!("v{}", dice.number(4))});
            sent("dea.update", &update, &["ok"])
        }
        _ => {
            let least = u64::from(app >= KEPT);
            let scale = json!({"droplet": droplet, "instances": least + dice.number(3)});
            sent(&host.subject("scale"), &scale, SCALED)
        }
    };
    Sent { app, ..sent }
}

fn broken(host: &Host, start: &Value, dice: &mut Dice) -> Sent {
    let mut bad = start.clone();
    let sent = match dice.number(8) {
        0 => {
            bad["limits"]["mem"] = json!("16");
            sent(&host.subject("start"), &bad, &["bad_field"])
        }
        1 => {
            bad["stack"] = json!("none");
            sent(&host.subject("start"), &bad, &["unknown_stack", "busy"])
        }
        2 => sent("dea.stop", &json!({"indices": [0]}), &["bad_field"]),
        3 => sent("dea.update", &json!({"droplet": "app-0"}), &["bad_field"]),
        4 => {
            let scale = json!({"droplet": "app-0", "instances": -1});
            sent(&host.subject("scale"), &scale, &["bad_field"])
        }
        5 => sent(&host.subject("restart"), &json!({}), &["bad_subject"]),
        6 => {
            let scale = json!({"droplet": "nobody", "instances": 1});
            sent(&host.subject("scale"), &scale, &["unknown_app", "busy"])
        }
        _ => {
            let verb = dice.pick(&["start", "stop", "scale", "find", "logs"]);
            let mut sent = sent(&host.subject(verb), &json!({}), &["bad_json"]);
            sent.question.body = b"{\"droplet\":\"app-0\",".to_vec();
            sent
        }
    };
    // Over either connection.
    let app = usize::from(dice.number(2) == 0);
    Sent { app, ..sent }
}

/// An instance as its host must have it.
#[derive(Debug)]
struct Lives {
    index: u64,
    version: String,
    handle: String,
    /// `None`: an update gave it another one.
    instance: Option<String>,
}

/// What must become of an app by what was asked of it in this order, and how that was answered.
#[derive(Debug, Default)]
struct Ledger {
    lives: Vec<Lives>,
    /// Whatever was to stop; some of it may still be there.
    leaving: usize,
    /// What `scale` starts.
    version: String,
    answered: std::collections::BTreeMap<String, Value>,
}

impl Ledger {
    /// What was refused is not done; nor is what is asked again.
    fn enter(&mut self, asked: &Value, verb: &str, answer: &Value) {
        if answer["ok"] != true {
            return;
        }
        if let Some(id) = asked["request_id"].as_str() {
            if let Some(first) = self.answered.get(id) {
                assert_eq!(first, answer, "{asked}");
                return;
            }
            self.answered.insert(id.to_owned(), answer.clone());
        }
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        match verb {
            "start" => {
                self.version = text(&asked["version"]);
                self.begins(answer);
            }
            "stop" => {
                let of = |index| match asked["indices"].as_array() {
                    Some(indices) => indices.contains(&json!(index)),
                    None => true,
                };
                let told: Vec<String> = { answer["instances"].as_array().unwrap().iter() }
                    .map(text)
                    .collect();
                let (go, stay): (Vec<Lives>, Vec<Lives>) = std::mem::take(&mut self.lives)
                    .into_iter()
                    .partition(|one| of(one.index));
                let named = go.iter().filter_map(|one| one.instance.as_ref());
                for one in named {
                    assert!(told.contains(one), "{one}: {asked} {answer}");
                }
                // One that is stopping already matches, too, as long as it is there.
                let most = go.len() + self.leaving;
                assert!((go.len()..=most).contains(&told.len()), "{asked} {answer}");
                self.leaving += go.len();
                self.lives = stay;
            }
            "update" => {
                let most = self.lives.len() + self.leaving;
                let matched = usize::try_from(answer["matched"].as_u64().unwrap()).unwrap();
                let some = self.lives.len()..=most;
                assert!(some.contains(&matched), "{asked} {answer} {self:?}");
                self.version = text(&asked["version"]);
                for one in &mut self.lives {
                    if one.version != self.version {
                        one.version.clone_from(&self.version);
                        one.instance = None;
                    }
                }
            }
            _ => {
                let wanted = usize::try_from(asked["instances"].as_u64().unwrap()).unwrap();
                let stopped: Vec<String> = { answer["stopped"].as_array().unwrap().iter() }
                    .map(text)
                    .collect();
                for handle in &stopped {
                    let at = self.lives.iter().position(|one| one.handle == *handle);
                    self.lives.remove(at.expect("one that lived"));
                }
                self.leaving += stopped.len();
                let started = answer["started"].as_array().unwrap();
                started.iter().for_each(|one| self.begins(one));
                assert!(stopped.is_empty() || started.is_empty(), "{answer}");
                assert_eq!(self.lives.len(), wanted, "{asked} {answer}");
            }
        }
    }

    fn begins(&mut self, told: &Value) {
        let text = |key: &str| told[key].as_str().unwrap().to_owned();
        self.lives.push(Lives {
            index: told["index"].as_u64().unwrap(),
            version: self.version.clone(),
            handle: text("handle"),
            instance: Some(text("instance")),
        });
    }

    /// All of it is there, and nothing else.
    fn check(&self, found: &[Value]) {
        let mut must: Vec<(u64, &str)> = { self.lives.iter() }
            .map(|one| (one.index, one.version.as_str()))
            .collect();
        let mut is: Vec<(u64, &str)> = found
            .iter()
            .map(|one| {
                (
                    one["index"].as_u64().unwrap(),
                    one["version"].as_str().unwrap(),
                )
            })
            .collect();
        must.sort_unstable();
        is.sort_unstable();
        assert_eq!(is, must, "{found:?}");
        let named = self.lives.iter().filter_map(|one| one.instance.as_ref());
        for one in named {
            assert!(
                found.iter().any(|found| found["instance"] == **one),
                "{one}"
            );
        }
    }
}

/// A third of them broken, some again and late; stops of half of the apps at the end.
fn ten_thousand(host: &Host, dice: &mut Dice) -> Vec<Sent> {
    let start = small(host, "app", 0);
    let mut all: Vec<Sent> = Vec::new();
    while all.len() < 9996 {
        let next = match dice.number(30) {
            0..=9 => broken(host, &start, dice),
            10..=27 => good(host, &start, dice),
            _ => match all.get(usize::try_from(dice.number(10_000)).unwrap()) {
                Some(old) => old.clone(),
                None => good(host, &start, dice),
            },
        };
        all.push(next);
    }
    for app in 0..4 {
        let stop = json!({"droplet": format!("app-{app}"), "wait": "stopped"});
        all.push(Sent {
            app,
            ..sent("dea.stop", &stop, &["ok"])
        });
    }
    all
}

#[tokio::test]
async fn ten_thousand_at_once_leave_a_right_state() {
    let host = Host::with(Setup {
        config: &[(
            "disk_mb = 16384",
            "disk_mb = 16384\ninstances = 16\n[droplets]\ninactivity = 600",
        )],
        ..Default::default()
    })
    .await;
    let all = ten_thousand(&host, &mut Dice(23));
    let mut ledgers: [Ledger; 8] = Default::default();
    for (app, ledger) in ledgers.iter_mut().enumerate().skip(KEPT) {
        let start = begin(&host, &small(&host, "app", 0), app, 0);
        ledger.enter(&start, "start", &ask(&host, "start", &start).await);
    }
    assert_eq!(all.len(), 10_000);
    let mut heartbeats = host.watch("dea.heartbeat").await;
    let beats = tokio::spawn(async move {
        let mut longest = Duration::ZERO;
        loop {
            let before = tokio::time::Instant::now();
            let beat = heartbeats.next().await;
            longest = longest.max(before.elapsed());
            if beat["dea"] == "the-end" {
                return longest;
            }
        }
    });
    let questions: Vec<Question> = all.iter().map(|sent| sent.question.clone()).collect();
    let lanes = [
        host.nats().clone(),
        async_nats::connect(Host::BUS).await.unwrap(),
    ];
    let began = tokio::time::Instant::now();
    let over = |number: usize| all[number].app % lanes.len();
    let answers = host.ask_each_over(&lanes, &questions, over).await;
    let took = began.elapsed();
    let mut codes = std::collections::BTreeMap::<String, usize>::new();
    for (sent, answers) in all.iter().zip(&answers) {
        let Question { subject, body, .. } = &sent.question;
        let about = String::from_utf8_lossy(body);
        assert_eq!(answers.len(), 1, "{subject}: {about}");
        let code = code(&answers[0]);
        let answer = self::body(&answers[0]);
        assert!(
            sent.right.contains(&code.as_str()),
            "{subject}: {about}: {answer}"
        );
        if let (Ok(asked), Some((_, verb))) = (
            serde_json::from_slice::<Value>(body),
            subject.rsplit_once('.'),
        ) {
            ledgers[sent.app].enter(&asked, verb, &answer);
        }
        *codes.entry(code).or_default() += 1;
    }
    eprintln!("{took:?} {codes:?}");
    let end = json!({"dea": "the-end", "droplets": []});
    host.publish("dea.heartbeat", &end).await;
    let longest = beats.await.unwrap();
    eprintln!("longest without a heartbeat: {longest:?}");
    assert!(longest < tests::patience(), "{longest:?}");
    // Each app is as the answers said, in their order; what was to stop goes.
    for (app, ledger) in ledgers.iter().enumerate() {
        let droplet = format!("app-{app}");
        assert!(app < KEPT || !ledger.lives.is_empty(), "{droplet}");
        assert!(app >= 4 || ledger.lives.is_empty(), "{droplet}");
        let states = json!(["BORN", "STARTING", "RUNNING", "CRASHED"]);
        let find = json!({"droplet": droplet, "states": states});
        let found = ask(&host, "find", &find).await;
        ledger.check(found["instances"].as_array().unwrap());
    }
    let lives: usize = ledgers.iter().map(|ledger| ledger.lives.len()).sum();
    eprintln!("{lives} live");
    let told = apps(&host).await.len();
    assert!(
        (lives..=16).contains(&told),
        "{lives} live, {told} are told"
    );
    for app in 4..8 {
        host.stop(&format!("app-{app}")).await;
    }
    host.tree_until("empty machine", |tree| tree.named("wshd").is_empty())
        .await;
    assert_eq!(apps(&host).await, []);
    // It goes on as ever.
    host.run(small(&host, "app-0", 0)).await;
    host.stop("app-0").await;
}

async fn ask(host: &Host, verb: &str, body: &Value) -> Value {
    let subject = if verb == "update" {
        "dea.update".to_owned()
    } else {
        host.subject(verb)
    };
    host.request(&subject, body).await
}

async fn found(host: &Host, droplet: &str) -> Vec<Value> {
    let found = ask(host, "find", &json!({"droplet": droplet})).await;
    let all = found["instances"].as_array().unwrap().clone();
    all.into_iter()
        .filter(|one| one["state"] == "RUNNING")
        .collect()
}

#[tokio::test]
async fn each_command_is_repeatable_also_after_restarts() {
    let mut host = Host::start().await;
    host.run(small(&host, "app", 0)).await;
    let scale = json!({"droplet": "app", "instances": 3, "wait": "running", "request_id": "scale"});
    let scaled = ask(&host, "scale", &scale).await;
    assert_eq!(scaled["started"].as_array().unwrap().len(), 2, "{scaled}");
    let one = json!({"droplet": "app", "instances": 1, "wait": "stopped"});
    assert_eq!(ask(&host, "scale", &one).await["ok"], true);
    let first = json!({"droplet": "app", "uris": [], "version": "v2", "request_id": "update"});
    let updated = ask(&host, "update", &first).await;
    assert_eq!(updated["matched"], 1, "{updated}");
    let second = json!({"droplet": "app", "uris": [], "version": "v3"});
    assert_eq!(ask(&host, "update", &second).await["ok"], true);
    let stop = json!({"droplet": "app", "wait": "stopped", "request_id": "stop"});
    let stopped = ask(&host, "stop", &stop).await;
    assert_eq!(stopped["matched"], 1, "{stopped}");
    host.run(small(&host, "app", 0)).await;
    let repeated = async |host: &Host| {
        assert_eq!(ask(host, "scale", &scale).await, scaled);
        assert_eq!(ask(host, "update", &first).await, updated);
        assert_eq!(ask(host, "stop", &stop).await, stopped);
        // One name space, whatever the command.
        let mut start = small(host, "other", 0);
        start["request_id"] = json!("stop");
        assert_eq!(ask(host, "start", &start).await, stopped);
    };
    repeated(&host).await;
    host.restart().await;
    repeated(&host).await;
    let here = found(&host, "app").await;
    assert_eq!(here.len(), 1, "{here:?}");
    assert_eq!(here[0]["version"], "v1", "none acted again");
    assert!(found(&host, "other").await.is_empty());
    // A shutdown takes the apps away, and no answer.
    let status = host.end(nix::sys::signal::Signal::SIGTERM).await;
    assert!(status.success(), "{status}");
    host.start_agent().await;
    repeated(&host).await;
    assert!(found(&host, "app").await.is_empty());
}

#[tokio::test]
async fn two_at_once_under_one_id_are_one() {
    let host = Host::start().await;
    for round in 0..tests::rounds().min(5) {
        let droplet = format!("app-{round}");
        let mut start = small(&host, &droplet, 0);
        start["request_id"] = json!(droplet);
        let mut questions = Vec::new();
        for waits in [false, true, false, true] {
            if waits {
                start["wait"] = json!("running");
            }
            questions.push(Question {
                subject: host.subject("start"),
                body: bytes(&start),
                answers: 1,
            });
        }
        let answers = host.ask_each(&questions).await;
        let first = body(&answers[0][0]);
        assert_eq!(first["ok"], true, "{first}");
        for answers in &answers {
            assert_eq!(answers.len(), 1);
            assert_eq!(body(&answers[0]), first);
        }
        let all = ask(&host, "find", &json!({"droplet": droplet})).await;
        assert_eq!(all["matched"], 1, "{all}");
        host.stop(&droplet).await;
    }
}

#[tokio::test]
async fn each_refusal_has_its_code() {
    let host = Host::start().await;
    let refused =
        async |verb: &str, body: &str| code(&host.request_bytes(&host.subject(verb), body).await);
    for verb in ["start", "stop", "find", "scale", "logs"] {
        assert_eq!(refused(verb, "{").await, "bad_json");
        assert_eq!(refused(verb, "").await, "bad_json");
        assert_eq!(refused(verb, "{}").await, "bad_field");
    }
    assert_eq!(refused("restart", "{}").await, "bad_subject");
    let mut start = small(&host, "app", 0);
    start["stack"] = json!("none");
    assert_eq!(refused("start", &start.to_string()).await, "unknown_stack");
    let scale = json!({"droplet": "app", "instances": 1});
    assert_eq!(refused("scale", &scale.to_string()).await, "unknown_app");
    // What cannot be written down is not accepted; it is the agent's fault, and may go better the next time.
    let mut start = small(&host, "app", 0);
    start["request_id"] = json!("again");
    let (records, away) = (host.base.join("instances"), host.base.join("away"));
    std::fs::rename(&records, &away).unwrap();
    std::fs::write(&records, "").unwrap();
    assert_eq!(refused("start", &start.to_string()).await, "internal");
    std::fs::remove_file(&records).unwrap();
    std::fs::rename(&away, &records).unwrap();
    host.run(start).await;
    // It ends before it runs: by its own doing, and by a stop.
    let mut start = host.message("short", &Droplet::shell("exit 3"));
    start["uris"] = json!(["short.example.net"]);
    start["wait"] = json!("running");
    assert_eq!(refused("start", &start.to_string()).await, "ended");
    let mut start = host.message("slow", &Droplet::shell(SLOW));
    start["uris"] = json!(["slow.example.net"]);
    start["wait"] = json!("running");
    let stop = json!({"droplet": "slow"});
    let questions = [("start", start), ("stop", stop)].map(|(verb, body)| Question {
        subject: host.subject(verb),
        body: bytes(&body),
        answers: 1,
    });
    let answers = host.ask_each(&questions).await;
    assert_eq!([&answers[0][0], &answers[1][0]].map(code), ["ended", "ok"]);
    host.stop("app").await;
}

#[tokio::test]
async fn a_start_beyond_what_may_wait_is_busy_and_stops_and_queries_are_not() {
    let host = Host::start().await;
    let mut exits = host.watch("droplet.exited").await;
    // What is kept of it for `scale` is large, and each update makes it anew: the host is busy for a while.
    let mut known = small(&host, "known", 0);
    known["padding"] = json!("x".repeat(900_000));
    host.run(known).await;
    exits.arrived();
    let mut questions = Vec::new();
    for number in 0..1800 {
        let (subject, body) = match number {
            // None of these is refused: they fill whatever there is to wait in.
            0..200 => {
                let update =
                    json!({"droplet": "known", "uris": [], "version": format!("v{number}")});
                ("dea.update".to_owned(), update)
            }
            200..1200 => (host.subject("stop"), json!({"droplet": "nobody"})),
            _ if number % 30 == 0 => (host.subject("stop"), json!({"droplet": "nobody"})),
            _ if number % 30 == 15 => ("dea.status".to_owned(), json!({})),
            // Whose memory no host has: it takes no time to refuse it.
            _ => {
                let start = json!({
                    "droplet": "app", "index": number, "version": "v1", "name": "app", "uris": [],
                    "executableUri": "http://127.0.0.1:9/", "sha1": "0".repeat(40), "services": [],
                    "limits": {"mem": 1 << 29, "disk": 16, "fds": 64}, "cc_partition": "default",
                    "stack": "debian",
                });
                (host.subject("start"), start)
            }
        };
        questions.push(Question {
            subject,
            body: bytes(&body),
            answers: 1,
        });
    }
    // All are there before it takes the first: it would be as fast as whoever asks.
    host.agent().signal(nix::sys::signal::Signal::SIGSTOP);
    let goes_on = async {
        sleep(Duration::from_secs(2)).await;
        host.agent().signal(nix::sys::signal::Signal::SIGCONT);
    };
    let (answers, ()) = tokio::join!(host.ask_each(&questions), goes_on);
    let mut busy = 0;
    for (question, answers) in questions.iter().zip(&answers) {
        assert_eq!(answers.len(), 1, "{}", question.subject);
        if question.subject == "dea.status" {
            assert_eq!(body(&answers[0])["id"], host.id.as_str());
            continue;
        }
        match (
            question.subject.ends_with(".start"),
            code(&answers[0]).as_str(),
        ) {
            (false, "ok") | (true, "not_enough_memory") => {}
            (true, "busy") => busy += 1,
            (_, other) => panic!("{}: {other}", question.subject),
        }
    }
    assert!(busy > 0, "{}", host.log());
    // Whoever only publishes learns of it by an exit.
    let told = |exit: &Value| {
        exit["exit_description"]
            .as_str()
            .is_some_and(|words| words.contains("too many commands at once"))
    };
    for _ in 0..busy {
        exits.until("exit of one that was busy", told).await;
    }
    host.stop("known").await;
}

/// Runs an app that hears no TERM, and has ten minutes to.
async fn run_deaf(host: &Host) {
    let mut output = host.output("deaf").await;
    let mut start = host.message("deaf", &Droplet::shell(DEAF));
    start["stop_grace"] = json!(600);
    host.run(start).await;
    let up = |output: &tests::Output| output.text(0, "stdout") == "up\n";
    output.until("first line", up).await;
}

/// The process that an app's script is.
fn shell(host: &Host) -> tests::Process {
    let tree = host.tree();
    let shell = tree.0.iter().find(|one| one.title() == "bash main.sh");
    shell.expect("the app").clone()
}

/// Asks in a task of its own; gives the answer when it is there.
fn asked(host: &Host, verb: &str, body: &Value) -> tokio::task::JoinHandle<Value> {
    let (nats, subject) = (host.nats().clone(), host.subject(verb));
    let request = async_nats::Request::new()
        .payload(bytes(body).into())
        .timeout(Some(tests::patience()));
    tokio::spawn(async move {
        let answer = nats.send_request(subject, request).await.unwrap();
        self::body(&answer)
    })
}

#[tokio::test]
async fn who_waits_for_an_agent_that_leaves_asks_its_successor() {
    let mut host = Host::start().await;
    let mut output = host.output("slow").await;
    let mut start = host.message("slow", &Droplet::shell(SLOW));
    start["uris"] = json!(["slow.example.net"]);
    start["stop_grace"] = json!(600);
    start["wait"] = json!("running");
    start["request_id"] = json!("start");
    let up = |output: &tests::Output| output.text(0, "stdout") == "up\n";
    let first = asked(&host, "start", &start);
    output.until("first line", up).await;
    host.end(nix::sys::signal::Signal::SIGHUP).await;
    let cut = first.await.unwrap();
    assert_eq!(cut["error"]["code"], "shutting_down", "{cut}");
    assert_eq!(cut["error"]["retryable"], true, "{cut}");
    host.start_agent().await;
    let again = asked(&host, "start", &start);
    shell(&host).signal(nix::sys::signal::Signal::SIGUSR1);
    let answer = again.await.unwrap();
    assert_eq!(answer["ok"], true, "{answer}");
    assert_eq!(found(&host, "slow").await.len(), 1, "one start");
    host.stop("slow").await;

    run_deaf(&host).await;
    let stop = json!({"droplet": "deaf", "wait": "stopped", "request_id": "stop"});
    let mut heartbeats = host.watch("dea.heartbeat").await;
    let first = asked(&host, "stop", &stop);
    // One that is stopping is in no heartbeat.
    heartbeats
        .until("a stop", |beat| beat["droplets"] == json!([]))
        .await;
    host.end(nix::sys::signal::Signal::SIGHUP).await;
    let cut = first.await.unwrap();
    assert_eq!(cut["error"]["code"], "shutting_down", "{cut}");
    host.start_agent().await;
    let again = asked(&host, "stop", &stop);
    shell(&host).signal(nix::sys::signal::Signal::SIGKILL);
    let answer = again.await.unwrap();
    assert_eq!(
        (&answer["ok"], &answer["matched"]),
        (&json!(true), &json!(1))
    );
}

#[tokio::test]
async fn a_scale_waits_for_what_an_earlier_one_began() {
    let host = Host::start().await;
    let up = |output: &tests::Output| output.text(0, "stdout") == "up\n";
    let mut output = host.output("slow").await;
    let mut start = host.message("slow", &Droplet::shell(SLOW));
    start["uris"] = json!(["slow.example.net"]);
    host.request(&host.subject("start"), &start).await;
    output.until("first line", up).await;
    let scale = |droplet: &str, more: Value| {
        let mut scale = json!({"droplet": droplet, "instances": 1});
        let fields = scale.as_object_mut().unwrap();
        fields.extend(more.as_object().unwrap().clone());
        scale
    };
    let subject = host.subject("scale");
    let waits = asked(&host, "scale", &scale("slow", json!({"wait": "running"})));
    let limits = json!({"limits": {"fds": 100}, "wait": "running"});
    let also_waits = asked(&host, "scale", &scale("slow", limits));
    let at_once = host.request(&subject, &scale("slow", json!({}))).await;
    assert_eq!(at_once["ok"], true, "{at_once}");
    assert!(!waits.is_finished() && !also_waits.is_finished());
    shell(&host).signal(nix::sys::signal::Signal::SIGUSR1);
    for waits in [waits, also_waits] {
        let answer = waits.await.unwrap();
        let told = (&answer["ok"], &answer["started"]);
        assert_eq!(told, (&json!(true), &json!([])), "{answer}");
        assert_eq!(found(&host, "slow").await[0]["state"], "RUNNING");
    }
    host.stop("slow").await;

    run_deaf(&host).await;
    let none = json!({"instances": 0});
    let stopped = host.request(&subject, &scale("deaf", none.clone())).await;
    assert_eq!(stopped["stopped"].as_array().unwrap().len(), 1, "{stopped}");
    let waiting = json!({"instances": 0, "wait": "stopped"});
    let waits = asked(&host, "scale", &scale("deaf", waiting));
    let at_once = host.request(&subject, &scale("deaf", none)).await;
    assert_eq!(at_once["ok"], true, "{at_once}");
    assert!(!waits.is_finished());
    shell(&host).signal(nix::sys::signal::Signal::SIGKILL);
    let answer = waits.await.unwrap();
    assert_eq!(answer["ok"], true, "{answer}");
    assert!(host.tree().named("wshd").is_empty(), "{answer}");
}

#[tokio::test]
async fn an_answer_that_falls_due_without_a_bus_still_comes() {
    let mut host = Host::start().await;
    run_deaf(&host).await;
    let mut heartbeats = host.watch("dea.heartbeat").await;
    let stop = asked(
        &host,
        "stop",
        &json!({"droplet": "deaf", "wait": "stopped"}),
    );
    heartbeats
        .until("a stop", |beat| beat["droplets"] == json!([]))
        .await;
    host.stop_bus().await;
    host.tree_until("agent that knows", |_| {
        host.log().contains("the bus is away")
    })
    .await;
    shell(&host).signal(nix::sys::signal::Signal::SIGKILL);
    host.tree_until("empty machine", |tree| tree.named("wshd").is_empty())
        .await;
    host.start_bus().await;
    let answer = stop.await.unwrap();
    assert_eq!(
        (&answer["ok"], &answer["matched"]),
        (&json!(true), &json!(1))
    );
}

#[tokio::test]
async fn an_instance_that_is_asked_too_much_is_found_all_the_same() {
    let host = Host::start().await;
    host.run(small(&host, "app", 0)).await;
    let find = json!({"droplet": "app", "include_stats": true});
    let question = Question {
        subject: "dea.find.droplet".to_owned(),
        body: bytes(&find),
        answers: 1,
    };
    let answers = host.ask_each(&vec![question; 1500]).await;
    for answers in &answers {
        assert_eq!(answers.len(), 1);
        let found = body(&answers[0]);
        assert_eq!(found["stats"]["mem_quota"], 16 << 20, "{found}");
        let usage = &found["stats"]["usage"];
        assert!(usage["time"].is_string(), "{found}");
        assert!(usage.get("mem").is_none_or(|mem| *mem != 0), "{found}");
    }
    host.stop("app").await;
}

#[tokio::test]
async fn an_instance_that_nobody_can_measure_yet_is_found_all_the_same() {
    let mut host = Host::start().await;
    let handle = host.run(small(&host, "app", 0)).await["handle"].clone();
    let container = host.base.join("containers").join(handle.as_str().unwrap());
    let (run, away) = (container.join("run"), container.join("away"));
    host.kill9().await;
    // Whether its init lives cannot be asked.
    std::fs::rename(&run, &away).unwrap();
    std::fs::write(&run, "").unwrap();
    host.start_agent().await;
    host.logged(0, "cannot be adopted yet").await;
    let question = Question {
        subject: "dea.find.droplet".to_owned(),
        body: bytes(&json!({"droplet": "app", "include_stats": true})),
        answers: 1,
    };
    let answers = host.ask_each(&vec![question; 50]).await;
    for answers in &answers {
        assert_eq!(answers.len(), 1);
        let found = body(&answers[0]);
        assert_eq!(found["state"], "RUNNING", "{found}");
        assert_eq!(found["stats"]["mem_quota"], 16 << 20, "{found}");
        assert_eq!(found["stats"]["usage"].get("mem"), None, "{found}");
    }
    std::fs::remove_file(&run).unwrap();
    std::fs::rename(&away, &run).unwrap();
    host.stop("app").await;
}

#[tokio::test]
async fn stats_that_the_bus_does_not_take_keep_no_answer_back() {
    let config = std::env::temp_dir().join(format!("ostler-little-{}", std::process::id()));
    std::fs::write(&config, "max_payload: 2000\n").unwrap();
    let host = Host::with(Setup {
        bus: &["--config", config.to_str().unwrap()],
        // The bus takes its last route back neither.
        config: &[("[network]", "[instance]\nstop_grace = 1\n[network]")],
        ..Default::default()
    })
    .await;
    std::fs::remove_file(&config).unwrap();
    host.run(small(&host, "app", 0)).await;
    for (length, stats) in [(100, true), (1850, false)] {
        let update = json!({"droplet": "app", "uris": ["x".repeat(length)]});
        assert_eq!(ask(&host, "update", &update).await["matched"], 1);
        let find = json!({"droplet": "app", "include_stats": true});
        let found = host.request("dea.find.droplet", &find).await;
        assert_eq!(found["state"], "RUNNING", "{found}");
        assert_eq!(found.get("stats").is_some(), stats, "{found}");
    }
    host.stop("app").await;
}
