use super::{Heard, Route, Routes};
use crate::instances::outlet::{Echo, Inlet, Link, Request, outlet};
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

const HERE: &str = "192.0.2.1";

fn route(port: u16, uris: &[&str]) -> Route {
    Route {
        dea: "d".into(),
        app: "a".into(),
        uris: list(uris),
        host: HERE.into(),
        port,
        tags: BTreeMap::new(),
        private_instance_id: "p".into(),
        private_instance_index: "0".into(),
    }
}

fn list(uris: &[&str]) -> Vec<String> {
    uris.iter().map(|uri| (*uri).to_owned()).collect()
}

/// The routes of a host, and the bus's end of what they say.
struct Bus {
    routes: Arc<Routes>,
    inlet: Inlet,
    connects: u64,
    speaker: JoinHandle<()>,
}

impl Bus {
    /// One that is away.
    fn away() -> Self {
        let (outlet, inlet) = outlet();
        let routes = Arc::new(Routes::new(outlet));
        let speaks = Arc::clone(&routes);
        let speaker = tokio::spawn(async move { speaks.speak().await });
        Self {
            routes,
            inlet,
            connects: 0,
            speaker,
        }
    }

    fn there() -> Self {
        let mut bus = Self::away();
        bus.connect();
        bus
    }

    fn connect(&mut self) {
        self.connects += 1;
        self.inlet.link.send_replace(Link {
            up: true,
            connects: self.connects,
            max_payload: 1 << 20,
        });
    }

    fn lose(&self) {
        self.inlet.link.send_modify(|link| link.up = false);
    }

    async fn next(&mut self) -> Request {
        self.inlet.routes.recv().await.unwrap()
    }

    /// The next word: `+` or `-`, the port, the URIs.
    async fn word(&mut self) -> String {
        let Request::Publish(message) = self.next().await else {
            panic!("no word");
        };
        let body: serde_json::Value = serde_json::from_slice(&message.body).unwrap();
        let registers = message.subject == "router.register";
        let sign = if registers { '+' } else { '-' };
        format!("{sign}{} {}", body["port"], body["uris"])
    }

    async fn words<const N: usize>(&mut self, wanted: [&str; N]) {
        for wanted in wanted {
            assert_eq!(self.word().await, wanted);
        }
    }

    async fn barrier(&mut self) -> oneshot::Sender<Echo> {
        let Request::Barrier(barrier) = self.next().await else {
            panic!("no barrier");
        };
        barrier.answer
    }

    /// Confirms what was said, and nothing more is.
    async fn confirm(&mut self) {
        let connects = self.connects;
        self.barrier()
            .await
            .send(Echo::Confirmed(connects))
            .unwrap();
        self.silence().await;
    }

    /// Nothing more is said.
    async fn silence(&mut self) {
        // What runs on this thread has run as far as it can.
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert!(self.inlet.routes.is_empty(), "{:?}", self.next().await);
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        self.speaker.abort();
    }
}

fn heard(heard: &mut Heard) -> bool {
    heard.try_recv().is_ok()
}

#[tokio::test]
async fn nothing_is_said_after_it_was_taken_back() {
    let mut bus = Bus::there();
    let routes = Arc::clone(&bus.routes);
    routes.repeat(HERE);
    assert!(routes.change(1, &list(&["x"])).is_none());
    assert!(routes.close(1).is_none());
    bus.silence().await;
    routes.open(route(1, &["a", "b"]));
    bus.words([r#"+1 ["a","b"]"#]).await;
    routes.repeat(HERE);
    bus.words([r#"+1 ["a","b"]"#]).await;
    routes.change(1, &list(&["b", "c"])).unwrap();
    bus.words([r#"+1 ["c"]"#, r#"-1 ["a"]"#]).await;
    bus.confirm().await;
    routes.repeat(HERE);
    bus.words([r#"-1 ["a"]"#, r#"+1 ["b","c"]"#]).await;
    bus.confirm().await;
    routes.repeat(HERE);
    // Before it is its turn: what is said then is what is true then.
    let (closed, _) = routes.close(1).unwrap();
    assert_eq!(closed.uris, list(&["b", "c"]));
    assert!(routes.close(1).is_none());
    assert!(routes.change(1, &list(&["d"])).is_none());
    bus.words([r#"-1 ["b","c"]"#]).await;
    bus.confirm().await;
}

#[tokio::test]
async fn what_is_too_large_for_one_message_is_said_in_parts() {
    let mut bus = Bus::there();
    bus.inlet.link.send_modify(|link| link.max_payload = 500);
    let routes = Arc::clone(&bus.routes);
    let [a, b, c, d] = ["a", "b", "c", "d"].map(|letter| letter.repeat(100));
    let (first, last) = (format!(r#"1 ["{a}","{b}"]"#), format!(r#"1 ["{c}","{d}"]"#));
    // One that no message can hold is nobody's.
    let huge = "e".repeat(500);
    routes.open(route(1, &[&a, &b, &c, &d]));
    routes.open(route(2, &[&huge]));
    bus.words([&*format!("+{first}"), &*format!("+{last}")])
        .await;
    bus.silence().await;
    routes.repeat(HERE);
    bus.words([&*format!("+{first}"), &*format!("+{last}")])
        .await;
    bus.silence().await;
    let (_, mut told) = routes.close(1).unwrap();
    let (_, mut of_nobody) = routes.close(2).unwrap();
    bus.words([&*format!("-{first}"), &*format!("-{last}")])
        .await;
    assert!(!heard(&mut told));
    bus.confirm().await;
    assert!(heard(&mut told));
    // Nobody waits for that.
    let closed = of_nobody.try_recv();
    assert_eq!(closed, Err(oneshot::error::TryRecvError::Closed));
    // The parts are said once more, at least that for which somebody waited.
    routes.repeat(HERE);
    bus.words([&*format!("-{last}")]).await;
}

#[tokio::test]
async fn what_was_taken_back_is_said_until_it_was_heard_and_once_more() {
    let mut bus = Bus::away();
    let routes = Arc::clone(&bus.routes);
    routes.known(route(1, &["a"]));
    let (_, mut told) = routes.close(1).unwrap();
    bus.silence().await;
    bus.connect();
    bus.words([r#"-1 ["a"]"#]).await;
    let lost = bus.barrier().await;
    bus.lose();
    drop(lost);
    bus.silence().await;
    bus.connect();
    bus.words([r#"-1 ["a"]"#]).await;
    // A confirmation of the connection before this one.
    bus.barrier().await.send(Echo::Confirmed(1)).unwrap();
    bus.silence().await;
    assert!(!heard(&mut told));
    bus.lose();
    bus.connect();
    bus.words([r#"-1 ["a"]"#]).await;
    bus.confirm().await;
    assert!(heard(&mut told));
    // A router may have missed it, also when the repeat is lost again.
    routes.repeat(HERE);
    bus.words([r#"-1 ["a"]"#]).await;
    drop(bus.barrier().await);
    bus.lose();
    bus.connect();
    bus.words([r#"-1 ["a"]"#]).await;
    bus.confirm().await;
    routes.repeat(HERE);
    bus.silence().await;
}

#[tokio::test]
async fn what_stands_again_is_no_longer_taken_back() {
    let mut bus = Bus::away();
    let routes = Arc::clone(&bus.routes);
    routes.known(route(1, &["a", "b", "c"]));
    let (_, mut first) = routes.change(1, &list(&["c"])).unwrap();
    routes.change(1, &list(&["b", "c"]));
    // An instance that had this port, before it rested and became another one's.
    let mut of_old = routes.take_back(route(1, &["b", "c", "d"]));
    let mut elsewhere = routes.take_back(route(2, &["b"]));
    bus.connect();
    let words = [r#"-1 ["a"]"#, r#"+1 ["b"]"#, r#"-1 ["d"]"#, r#"-2 ["b"]"#];
    bus.words(words).await;
    let barrier = bus.barrier().await;
    routes.open(route(2, &["b"]));
    let ended = elsewhere.try_recv();
    assert_eq!(ended, Err(oneshot::error::TryRecvError::Closed));
    bus.words([r#"+2 ["b"]"#]).await;
    barrier.send(Echo::Confirmed(1)).unwrap();
    bus.silence().await;
    assert!(heard(&mut first) && heard(&mut of_old));
}

#[tokio::test]
async fn a_host_that_has_another_address_takes_the_old_one_back() {
    let mut bus = Bus::there();
    let routes = Arc::clone(&bus.routes);
    routes.open(route(1, &["a"]));
    routes.known(route(2, &[]));
    bus.words([r#"+1 ["a"]"#]).await;
    routes.repeat("192.0.2.2");
    for (sign, host) in [('+', "192.0.2.2"), ('-', HERE)] {
        let Request::Publish(message) = bus.next().await else {
            panic!("no word");
        };
        let body: serde_json::Value = serde_json::from_slice(&message.body).unwrap();
        let registers = message.subject == "router.register";
        assert_eq!((registers, &body["host"]), (sign == '+', &host.into()));
    }
    bus.confirm().await;
    // What was taken back once more, and what stands.
    routes.repeat("192.0.2.2");
    bus.words([r#"-1 ["a"]"#, r#"+1 ["a"]"#]).await;
    let (closed, _) = routes.close(1).unwrap();
    assert_eq!(closed.host, "192.0.2.2");
}

/// Taking it back under its old spelling would take it back under the new one, too.
#[tokio::test]
async fn another_spelling_is_the_same_route() {
    let mut bus = Bus::there();
    let routes = Arc::clone(&bus.routes);
    routes.open(route(1, &["Foo.x/A", "b"]));
    bus.words([r#"+1 ["Foo.x/A","b"]"#]).await;
    assert!(routes.change(1, &list(&["foo.X/a", "b"])).is_none());
    bus.silence().await;
    routes.repeat(HERE);
    bus.words([r#"+1 ["foo.X/a","b"]"#]).await;
    let (closed, _) = routes.change(1, &list(&["B"])).unwrap();
    assert_eq!(closed.uris, list(&["foo.X/a"]));
    bus.words([r#"-1 ["foo.X/a"]"#]).await;
    bus.confirm().await;
}

#[tokio::test]
async fn however_many_there_are_none_is_left_out() {
    let mut bus = Bus::away();
    let routes = Arc::clone(&bus.routes);
    let ports = 10_000..15_000_u16;
    for port in ports.clone() {
        routes.known(route(port, &["a"]));
    }
    routes.known(route(1, &[]));
    let gone = ports.clone().step_by(2);
    let told: Vec<Heard> = gone.map(|port| routes.close(port).unwrap().1).collect();
    let mut all_heard = std::pin::pin!(async {
        for told in told {
            told.await.unwrap();
        }
    });
    bus.connect();
    // A connection is new, and a router as well.
    routes.repeat(HERE);
    routes.repeat(HERE);
    let mut state: BTreeMap<u16, bool> = ports.map(|port| (port, port % 2 == 0)).collect();
    let mut words = 0;
    loop {
        let request = tokio::select! {
            () = &mut all_heard, if words >= 5000 => break,
            request = bus.next() => request,
        };
        match request {
            Request::Barrier(barrier) => {
                let _gone = barrier.answer.send(Echo::Confirmed(bus.connects));
            }
            Request::Publish(message) => {
                words += 1;
                let body: serde_json::Value = serde_json::from_slice(&message.body).unwrap();
                let port = u16::try_from(body["port"].as_u64().unwrap()).unwrap();
                let registers = message.subject == "router.register";
                assert_eq!(registers, port % 2 == 1, "{body}");
                if registers {
                    state.insert(port, true);
                } else {
                    state.remove(&port);
                }
            }
            Request::Answer(..) | Request::Pause(_) => panic!("nobody asks for one"),
        }
    }
    assert_eq!(words, 5000, "each once");
    assert_eq!(state.len(), 2500);
    assert!(state.values().all(|told| *told), "{state:?}");
}
