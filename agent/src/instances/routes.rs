//! What routers are told of this host. Only here: whoever else said a route could say it again after it
//! was taken back, and then a router would send people to a dead port for two minutes.
//!
//! ```text
//!  instances: open, change, close ─┐
//!  the stable: repeat              ├─▶ one queue ──▶ speak ──▶ the bus
//!  a new connection: once more     ┘
//! ```
//!
//! One task says what is in the queue, in its order and whenever the bus has room, so however many
//! routes there are, none is left out; what is too large for one message is said in several. A route that
//! was taken back is said until the server is sure to have it, on each new connection again, and once more
//! with the next repeat: a router may miss a word.

use super::outlet::{Mark, Message, Outlet};
use messages::outgoing::{Route, ToBytes};
use messages::subjects::{ROUTER_REGISTER, ROUTER_UNREGISTER};
use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, oneshot};
use tokio::time::timeout;
use tracing::warn;

/// Before what could not be confirmed on a connection that still stands is said again.
const AGAIN: Duration = Duration::from_secs(1);

/// Resolves when the server has heard that a route was taken back, or when that is not true any more.
pub type Heard = oneshot::Receiver<()>;

/// See the module. Filling the queue never waits, so the lock is short.
#[derive(Debug)]
pub struct Routes {
    outlet: Outlet,
    state: Mutex<State>,
    /// The queue is no longer empty.
    more: Notify,
    /// Something is to be confirmed.
    unsure: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// What stands, by port: routers know an instance by its address and port.
    open: BTreeMap<u16, Route>,
    /// What was taken back and may be said again, by number.
    taken_back: BTreeMap<u64, TakenBack>,
    /// To be said.
    queue: VecDeque<Word>,
    /// The number that was given last.
    count: u64,
}

#[derive(Debug)]
enum Word {
    /// This is new.
    Register(Route),
    /// Whatever stands at this port when its turn comes.
    Repeat(u16),
    /// What was taken back under this number, as far as it still is.
    Unregister(u64),
}

#[derive(Debug)]
struct TakenBack {
    route: Route,
    stage: Stage,
    /// Told when the server has it for the first time.
    heard: Option<oneshot::Sender<()>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// In the queue.
    Queued,
    /// Said, perhaps into the void.
    Said,
    /// The server has it; it waits for the next repeat.
    Sure,
}

impl Routes {
    /// None, and nobody who says them: see [`Self::speak`].
    #[must_use]
    pub fn new(outlet: Outlet) -> Self {
        Self {
            outlet,
            state: Mutex::default(),
            more: Notify::new(),
            unsure: Notify::new(),
        }
    }

    /// Routers were told by an earlier life of the agent.
    pub fn known(&self, route: Route) {
        self.state().stands(route);
    }

    /// An instance serves.
    pub fn open(&self, route: Route) {
        let mut state = self.state();
        state.stands(route.clone());
        self.queue(&mut state, Word::Register(route));
    }

    /// The instance at this port has these URIs now; the router is told the difference. What was taken
    /// back, if anything.
    pub fn change(&self, port: u16, uris: &[String]) -> Option<(Route, Heard)> {
        let mut state = self.state();
        let route = state.open.get(&port)?.clone();
        let part = |uris| Route {
            uris,
            ..route.clone()
        };
        let (new, old) = (without(uris, &route.uris), without(&route.uris, uris));
        state.stands(part(uris.to_vec()));
        if !new.is_empty() {
            self.queue(&mut state, Word::Register(part(new)));
        }
        (!old.is_empty()).then(|| self.unregister(&mut state, part(old)))
    }

    /// The instance at this port serves no longer. What was taken back, if it ever served.
    pub fn close(&self, port: u16) -> Option<(Route, Heard)> {
        let mut state = self.state();
        let route = state.open.remove(&port)?;
        Some(self.unregister(&mut state, route))
    }

    /// An earlier life of the agent has taken this back, and did not know whether it was heard.
    pub fn take_back(&self, mut route: Route) -> Heard {
        let mut state = self.state();
        if let Some(stands) = state.open.get(&route.port) {
            route.uris = without(&route.uris, &stands.uris);
        }
        self.unregister(&mut state, route).1
    }

    /// Says everything again, for routers forget, and miss a word now and then. What they were told of another address
    /// than `host`, which this one had before, is taken back.
    pub fn repeat(&self, host: &str) {
        let mut state = self.state();
        state.queue.retain(|word| !matches!(word, Word::Repeat(_)));
        state.requeue(Stage::Sure);
        let elsewhere = state.open.values().filter(|route| route.host != host);
        let elsewhere: Vec<Route> = elsewhere.cloned().collect();
        for route in &elsewhere {
            state.stands(Route {
                host: host.to_owned(),
                ..route.clone()
            });
        }
        let State { open, queue, .. } = &mut *state;
        let told = open.iter().filter(|(_, route)| !route.uris.is_empty());
        queue.extend(told.map(|(port, _)| Word::Repeat(*port)));
        for route in elsewhere.into_iter().filter(|route| !route.uris.is_empty()) {
            let (_, _nobody_waits) = self.unregister(&mut state, route);
        }
        self.more.notify_one();
    }

    /// Says what there is to say, for ever.
    pub async fn speak(&self) {
        loop {
            let mark = self.outlet.up().await;
            tokio::select! {
                // A broken connection first: what was said on it is not confirmed by the next one.
                biased;
                () = self.outlet.changed(mark) => {}
                () = self.say_all() => {}
                () = self.confirm_all(mark) => {}
            }
            self.state().requeue(Stage::Said);
            self.more.notify_one();
        }
    }

    async fn say_all(&self) {
        loop {
            if self.state().queue.is_empty() {
                self.more.notified().await;
                continue;
            }
            let room = self.outlet.room().await;
            let most = self.outlet.mark().max_payload();
            // The word is chosen now: what was taken back meanwhile is not registered.
            let mut state = self.state();
            if let Some(message) = state.next(most) {
                room.say(message);
                self.unsure.notify_one();
            }
        }
    }

    /// Ends when something cannot be confirmed.
    async fn confirm_all(&self, mark: Mark) {
        loop {
            let said = self.state().said();
            if said.is_empty() {
                self.unsure.notified().await;
            } else if self.outlet.confirm_routes(mark).await {
                self.state().sure(&said);
            } else {
                return drop(timeout(AGAIN, self.outlet.changed(mark)).await);
            }
        }
    }

    fn unregister(&self, state: &mut State, route: Route) -> (Route, Heard) {
        let (heard, told) = oneshot::channel();
        state.count += 1;
        let number = state.count;
        let taken_back = TakenBack {
            route: route.clone(),
            stage: Stage::Queued,
            heard: Some(heard),
        };
        state.taken_back.insert(number, taken_back);
        self.queue(state, Word::Unregister(number));
        (route, told)
    }

    fn queue(&self, state: &mut State, word: Word) {
        state.queue.push_back(word);
        self.more.notify_one();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// What stands is no longer taken back.
    fn stands(&mut self, route: Route) {
        self.taken_back.retain(|_, taken_back| {
            let old = &mut taken_back.route;
            if (&old.host, old.port) != (&route.host, route.port) {
                return true;
            }
            old.uris = without(&old.uris, &route.uris);
            !old.uris.is_empty()
        });
        self.open.insert(route.port, route);
    }

    /// The next word, if it is still true and the bus takes it: `most` bytes. A larger one makes way for its parts.
    fn next(&mut self, most: usize) -> Option<Message> {
        let word = self.queue.pop_front()?;
        let (subject, route) = match &word {
            Word::Register(route) => (ROUTER_REGISTER, route),
            Word::Repeat(port) => (ROUTER_REGISTER, self.open.get(port)?),
            Word::Unregister(number) => (ROUTER_UNREGISTER, &self.taken_back.get(number)?.route),
        };
        let message = Message::plain(subject, route.to_bytes());
        if message.size() > most {
            let route = route.clone();
            self.split(&word, route);
            return None;
        }
        if let Word::Unregister(number) = word {
            self.taken_back.get_mut(&number)?.stage = Stage::Said;
        }
        Some(message)
    }

    /// Puts both halves of a word that is too large in its place. One URI alone no router can have heard of: that is
    /// left out.
    fn split(&mut self, word: &Word, mut route: Route) {
        let rest = route.uris.split_off(route.uris.len() / 2);
        if route.uris.is_empty() {
            let (port, bytes) = (route.port, rest.first().map(String::len));
            warn!(port, bytes, "a route is too large for the bus");
            if let Word::Unregister(number) = word {
                // For good: whoever waits for it waits no longer.
                drop(self.taken_back.remove(number));
            }
            return;
        }
        let rest = Route {
            uris: rest,
            ..route.clone()
        };
        match word {
            Word::Register(_) | Word::Repeat(_) => {
                self.queue.push_front(Word::Register(rest));
                self.queue.push_front(Word::Register(route));
            }
            Word::Unregister(number) => {
                // Who waits for it hears of the last part: the server takes them in their order.
                if let Some(whole) = self.taken_back.get_mut(number) {
                    whole.route = rest;
                }
                self.queue.push_front(Word::Unregister(*number));
                self.count += 1;
                let part = TakenBack {
                    route,
                    stage: Stage::Queued,
                    heard: None,
                };
                self.taken_back.insert(self.count, part);
                self.queue.push_front(Word::Unregister(self.count));
            }
        }
    }

    fn said(&self) -> Vec<u64> {
        self.at(Stage::Said)
    }

    fn at(&self, stage: Stage) -> Vec<u64> {
        let all = self.taken_back.iter();
        all.filter(|(_, taken_back)| taken_back.stage == stage)
            .map(|(number, _)| *number)
            .collect()
    }

    /// The server has these, for the first time or again.
    fn sure(&mut self, numbers: &[u64]) {
        for number in numbers {
            let Some(taken_back) = self.taken_back.get_mut(number) else {
                continue;
            };
            taken_back.stage = Stage::Sure;
            match taken_back.heard.take() {
                // Whoever waited may have left.
                Some(heard) => drop(heard.send(())),
                None => drop(self.taken_back.remove(number)),
            }
        }
    }

    /// Says again what is at `stage`, before all else: it is the oldest.
    fn requeue(&mut self, stage: Stage) {
        for number in self.at(stage).into_iter().rev() {
            if let Some(taken_back) = self.taken_back.get_mut(&number) {
                taken_back.stage = Stage::Queued;
                self.queue.push_front(Word::Unregister(number));
            }
        }
    }
}

/// Routers fold the case of URIs (gorouter, `route.Uri.RouteKey`): what differs in case alone is the same route.
fn without(some: &[String], others: &[String]) -> Vec<String> {
    let folded = |one: &String| one.to_ascii_lowercase();
    let others: HashSet<String> = others.iter().map(folded).collect();
    let new = some.iter().filter(|one| !others.contains(&folded(one)));
    new.cloned().collect()
}

#[cfg(test)]
mod tests;
