//! The stable: all instances of this host, and whatever needs to see them together.
//!
//! One task with one mailbox owns the list. It admits starts (atomically: what does not fit is refused
//! whole), hands wants to the instances, answers queries from what the instances told, and speaks for
//! the host: heartbeats, advertisements, routes. It never blocks and never waits for an instance.

mod beats;
mod commands;
mod queries;
mod scaling;
mod waiting;

use super::droplets::Digest;
use super::instance::{Change, Instance, Query, Reins, Remains, View, Wants, instance};
use super::outlet::{Link, Message};
use super::record::{Limits, Record, StopReason, Stopping, Unread};
use super::world::{World, now};
use crate::engine::{Adopted, Container, Place, Saved};
use crate::host::{blocking, in_background};
use messages::command::{Command, Trigger};
use messages::reply::{ErrorCode, Reply};
use messages::start::StartRequest;
use messages::state::State;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout_at};
use tracing::{error, info, warn};
use waiting::Waiting;

/// Asks that may wait for the stable; a start beyond is answered `busy` by the bus.
pub const MAILBOX: usize = 1024;

/// Between two looks for old crashes (DEA: 10 s).
const REAPER: Duration = Duration::from_secs(10);

/// Between two looks for droplets that nobody uses (DEA: 60 s).
const DROPLET_REAPER: Duration = Duration::from_secs(60);

/// What a shutdown may take beyond the longest grace: kill, last bytes, last events.
const SHUTDOWN_REST: Duration = Duration::from_secs(15);

/// What the agent's leaving waits for what was asked before it, and for its being recorded.
const LAST_ASKS: Duration = Duration::from_secs(2);

/// What a shutdown waits for a bus that is away, once every process is dead.
const SHUTDOWN_WITHOUT_BUS: Duration = Duration::from_secs(2);

/// How the agent goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Farewell {
    /// Apps are stopped, nothing stays.
    Shutdown,
    /// Apps run on for the next agent.
    Leave,
}

/// What the bus asks of the stable.
#[derive(Debug)]
pub enum Ask {
    /// Do something, and answer once.
    Command {
        /// What.
        command: Command,
        /// The message as it came: a start is kept with its instance.
        raw: serde_json::Value,
        /// Where the one answer goes. A dropped one is an `internal` error there.
        answer: oneshot::Sender<Reply>,
    },
    /// Answer as often as the protocol says.
    Query {
        /// What is asked.
        query: messages::command::Query,
        /// Where the answers go, each a body; closed when there are no more. Unbounded in type, bounded
        /// by the number of instances.
        answers: mpsc::UnboundedSender<Vec<u8>>,
    },
    /// Say something again.
    Trigger(Trigger),
    /// All subjects are subscribed to: this host can be asked.
    Ready,
}

/// One instance as the stable sees it.
#[derive(Debug)]
struct Stall {
    view: View,
    reins: Reins,
    /// Most bytes that it takes in a heartbeat.
    heartbeat_bytes: usize,
    /// It crashed, and makes room for another one: it is counted and told no more.
    leaves: bool,
    /// The number of the newest limits that it was asked to take, and the largest of those since it had
    /// none open: so much may be its.
    promise: Option<(u64, Limits)>,
}

impl Stall {
    /// The limits that it has or, as long as it has not answered to them, may get: the larger of each.
    fn promised(&self) -> Limits {
        let has = self.view.record.limits;
        match self.promise {
            Some((number, most)) if number > self.view.applied => larger(has, most),
            Some(_) | None => has,
        }
    }
}

fn larger(one: Limits, other: Limits) -> Limits {
    Limits {
        mem: one.mem.max(other.mem),
        disk: one.disk.max(other.disk),
        fds: one.fds.max(other.fds),
    }
}

/// The hello is said once in an agent's life, when it can be asked and heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Greeting {
    TooEarly,
    Owed,
    Said,
}

/// See the module.
pub struct Stable {
    world: Arc<World>,
    stalls: BTreeMap<String, Stall>,
    /// The newest accepted start message of each app, for `scale`.
    templates: HashMap<String, serde_json::Value>,
    changed: mpsc::UnboundedReceiver<Change>,
    tasks: JoinSet<()>,
    waiting: Vec<Waiting>,
    link: Link,
    greeting: Greeting,
    /// The goodbye is said: no more starts.
    parting: bool,
    /// What runs, but by records of another agent's: their addresses and ports are not given away.
    _kept: Vec<Container>,
}

impl std::fmt::Debug for Stable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stable")
            .field("instances", &self.stalls.len())
            .finish_non_exhaustive()
    }
}

impl Stable {
    /// Takes over what earlier lives of the agent left: adopts what lives, reports what died, removes
    /// what is nobody's.
    ///
    /// # Errors
    /// If the records cannot be listed, or the network of what lives cannot be rebuilt.
    pub async fn open(
        world: Arc<World>,
        changed: mpsc::UnboundedReceiver<Change>,
    ) -> Result<Self, Box<dyn std::error::Error>> {
        let records = world.records.clone();
        let found = blocking(move || records.load()).await?;
        let kept = keep_unread(&world, &found.unread).await;
        // All are adopted before anything new is made: what lives takes its addresses and ports out of
        // the pools.
        let mut adopted = Vec::new();
        for record in found.records {
            let remains = match &record.container {
                Some(_) => Some(Remains::of(&world, &record).await),
                None => None,
            };
            adopted.push((record, remains));
        }
        let saved = |keep: fn(&Remains) -> bool| -> Vec<&Saved> {
            adopted
                .iter()
                .filter(|(_, remains)| remains.as_ref().is_some_and(keep))
                .filter_map(|(record, _)| record.container.as_ref())
                .collect()
        };
        let mut known: HashSet<String> = saved(|_| true)
            .iter()
            .map(|saved| saved.handle.clone())
            .collect();
        known.extend(found.unread.iter().map(|unread| unread.handle.clone()));
        let unread_saved: Vec<&Saved> = found
            .unread
            .iter()
            .filter_map(|unread| unread.container.as_ref())
            .collect();
        let mut live = saved(|remains| !matches!(remains, Remains::Dead(..)));
        live.extend(unread_saved);
        world.engine.rebuild_network(&live).await?;
        // Cut off between a container and its record: that handle is used again.
        let again = adopted.iter().map(|(record, _)| record.handle.clone());
        let again = again.filter(|handle| !known.contains(handle)).collect();
        world.engine.sweep_beside(&known, &again).await;
        info!(adopted = adopted.len(), "took over what was here");
        let templates = commands::load_templates(&world.config.base).await;
        let mut stable = Self {
            world,
            stalls: BTreeMap::new(),
            templates,
            changed,
            tasks: JoinSet::new(),
            waiting: Vec::new(),
            link: Link {
                max_payload: 1 << 20,
                ..Link::default()
            },
            greeting: Greeting::TooEarly,
            parting: false,
            _kept: kept,
        };
        for (record, remains) in adopted {
            stable.take_in(record, remains);
        }
        Ok(stable)
    }

    fn take_in(&mut self, record: Record, remains: Option<Remains>) {
        match StartRequest::from_value(&record.start) {
            Ok(message) => {
                let (accepted, _) = oneshot::channel();
                // Accepted, and without a container yet: its place is kept before others can ask for one.
                let waits = matches!(record.state, State::Born | State::Starting)
                    && record.container.is_none()
                    && record.stopping.is_none();
                let place = waits.then(|| self.world.engine.reserve().ok()).flatten();
                self.board(record, message, (remains, place), accepted);
            }
            Err(why) => {
                error!(handle = record.handle, %why, "a kept start message is not understood");
            }
        }
    }

    /// Gives an instance its task and its stall.
    fn board(
        &mut self,
        record: Record,
        message: StartRequest,
        begins_with: (Option<Remains>, Option<Place>),
        accepted: oneshot::Sender<Result<(), String>>,
    ) {
        let handle = record.handle.clone();
        let heartbeat_bytes = commands::heartbeat_bytes(&message);
        let (instance, reins): (Instance, Reins) =
            instance(Arc::clone(&self.world), record, message, begins_with);
        let stall = Stall {
            view: instance.view(),
            reins,
            heartbeat_bytes,
            leaves: false,
            promise: None,
        };
        self.tasks.spawn(instance.live(accepted));
        self.stalls.insert(handle, stall);
    }

    /// Serves until the agent goes.
    pub async fn run(
        mut self,
        mut inbox: mpsc::Receiver<Ask>,
        mut link: watch::Receiver<Link>,
        mut farewell: oneshot::Receiver<Farewell>,
    ) {
        let intervals = self.world.config.intervals.clone();
        let mut heartbeat = ticks(intervals.heartbeat);
        let mut advertise = ticks(intervals.advertise);
        let mut routes = ticks(intervals.router_register);
        let mut reaper = ticks(REAPER);
        let mut droplet_reaper = ticks(DROPLET_REAPER);
        let mut parting = None;
        let mut deadline = Instant::now();
        // At the end all that was asked is heard, so that nobody waits for an answer in vain.
        let mut asked_out = false;
        while parting.is_none() || !asked_out {
            tokio::select! {
                // What the instances told first: every answer is made from it. Then the parting, which
                // must not wait behind a flood of asks.
                biased;
                Some(change) = self.changed.recv() => self.change(change),
                how = &mut farewell, if parting.is_none() => {
                    parting = Some(how.unwrap_or(Farewell::Leave));
                    deadline = Instant::now() + LAST_ASKS;
                    self.goodbye();
                    self.parting = true;
                }
                () = sleep_until(deadline), if parting.is_some() => break,
                Ok(()) = link.changed() => {
                    let now = *link.borrow_and_update();
                    self.link(now);
                }
                Some(_) = self.tasks.join_next() => {}
                _ = heartbeat.tick() => self.heartbeat(),
                _ = advertise.tick() => self.advertise(),
                _ = routes.tick() => self.register_routes(),
                _ = reaper.tick() => self.reap(),
                _ = droplet_reaper.tick() => self.reap_droplets(),
                ask = inbox.recv(), if !asked_out => match ask {
                    Some(ask) => self.hear(ask).await,
                    None => asked_out = true,
                },
            }
        }
        inbox.close();
        while let Ok(ask) = inbox.try_recv() {
            self.turn_away(ask);
        }
        self.until_recorded(deadline).await;
        if parting == Some(Farewell::Shutdown) {
            self.shut_down(link).await;
        } else {
            self.dismiss_waiting();
        }
    }

    async fn hear(&mut self, ask: Ask) {
        match ask {
            Ask::Command {
                command,
                raw,
                answer,
            } => self.command(command, raw, answer).await,
            Ask::Query { query, answers } => self.query(query, answers),
            Ask::Trigger(Trigger::Locate) => self.advertise(),
            Ask::Trigger(Trigger::HealthmanagerStart) => self.heartbeat(),
            Ask::Trigger(Trigger::RouterStart) => self.register_routes(),
            Ask::Ready => {
                self.greeting = Greeting::Owed;
                self.link(self.link);
            }
        }
    }

    /// What could not be heard in time is answered all the same.
    fn turn_away(&self, ask: Ask) {
        if let Ask::Command {
            command,
            raw,
            answer,
        } = ask
        {
            let refusal = shutting_down();
            if matches!(command, Command::Start(_)) {
                self.tell_refusal(&raw, &refusal);
            }
            drop(answer.send(refusal));
        }
    }

    /// A new connection hears everything at once; so nobody waits an interval to know this host.
    fn link(&mut self, link: Link) {
        self.link = link;
        if link.up {
            if self.greeting == Greeting::Owed {
                self.greeting = Greeting::Said;
                self.say_hello();
            }
            self.advertise();
            self.heartbeat();
            self.register_routes();
        }
    }

    fn change(&mut self, change: Change) {
        match change {
            Change::View(view) => {
                let handle = view.record.handle.clone();
                let Some(stall) = self.stalls.get_mut(&handle) else {
                    return;
                };
                let old = std::mem::replace(&mut stall.view, *view);
                let (old, new) = (&old.record, &stall.view.record);
                let beat = old.state != new.state && new.state == State::Running
                    || old.instance != new.instance
                    || old.uris != new.uris;
                let reserve = old.state != new.state || old.limits != new.limits;
                self.tell_waiting(&handle);
                if beat {
                    self.heartbeat();
                }
                if reserve {
                    self.advertise();
                }
            }
            Change::Gone(handle) => {
                self.stalls.remove(&handle);
                self.tell_waiting(&handle);
                self.advertise();
            }
        }
    }

    /// Of each app only the newest crash is kept; the instance itself knows when that is old.
    fn reap(&mut self) {
        let mut newest: HashMap<&str, (f64, &str)> = HashMap::new();
        let mut old = Vec::new();
        for (handle, stall) in &self.stalls {
            let record = &stall.view.record;
            if record.state != State::Crashed {
                continue;
            }
            let this = (record.state_timestamp, handle.as_str());
            match newest.insert(&stall.view.droplet, this) {
                Some(other) if other.0 > this.0 => {
                    newest.insert(&stall.view.droplet, other);
                    old.push(handle.clone());
                }
                Some(other) => old.push(other.1.to_owned()),
                None => {}
            }
        }
        for handle in old {
            self.want(&handle, |wants| wants.reap = true);
        }
    }

    /// Keeps the droplets of what is here and of what may be scaled up again.
    fn reap_droplets(&self) {
        let starts = self.stalls.values().map(|stall| &stall.view.record.start);
        let in_use: HashSet<String> = starts
            .chain(self.templates.values())
            .filter_map(|start| StartRequest::from_value(start).ok())
            .filter_map(|start| start.sha256.or(start.sha1))
            .filter_map(|hex| Digest::from_hex(&hex).ok())
            .map(|digest| digest.to_string())
            .collect();
        let droplets = self.world.droplets.clone();
        in_background(move || {
            let removed = droplets.reap(&in_use, DROPLET_REAPER);
            if removed > 0 {
                info!(removed, "removed droplets that nobody uses");
            }
        });
    }

    /// Changes what is wanted of an instance; returns the change's number.
    fn want(&self, handle: &str, change: impl FnOnce(&mut Wants)) -> u64 {
        let Some(stall) = self.stalls.get(handle) else {
            return 0;
        };
        stall.reins.wants.send_modify(|wants| {
            wants.number += 1;
            change(wants);
        });
        stall.reins.wants.borrow().number
    }

    fn want_stop(&self, handle: &str, reason: StopReason) -> u64 {
        let grace = self.grace(handle);
        self.want(handle, |wants| {
            wants.stop.get_or_insert(Stopping {
                reason,
                grace: grace.as_secs_f64(),
            });
        })
    }

    fn grace(&self, handle: &str) -> Duration {
        let own = self
            .stalls
            .get(handle)
            .and_then(|stall| stall.view.stop_grace);
        own.unwrap_or(self.world.config.instance.stop_grace)
    }

    /// Stops everything and waits until it is gone, with a deadline for all together.
    async fn shut_down(mut self, mut link: watch::Receiver<Link>) {
        let handles: Vec<String> = self.stalls.keys().cloned().collect();
        let longest = handles
            .iter()
            .map(|handle| self.grace(handle))
            .max()
            .unwrap_or_default();
        for handle in &handles {
            self.want_stop(handle, StopReason::Shutdown);
            self.want(handle, |wants| wants.reap = true);
        }
        let deadline = Instant::now() + longest + SHUTDOWN_REST;
        let mut until = deadline;
        while !self.stalls.is_empty() {
            let dead =
                |stall: &Stall| matches!(stall.view.record.state, State::Stopped | State::Crashed);
            if !link.borrow().up && until == deadline && self.stalls.values().all(dead) {
                until = deadline.min(Instant::now() + SHUTDOWN_WITHOUT_BUS);
            }
            tokio::select! {
                change = timeout_at(until, self.changed.recv()) => match change {
                    Ok(Some(change)) => self.change(change),
                    Ok(None) | Err(_) => break,
                },
                Ok(()) = link.changed() => {}
            }
        }
        if !self.stalls.is_empty() {
            warn!(
                left = self.stalls.len(),
                "not everything was said in time; removing it all the same"
            );
        }
        self.dismiss_waiting();
        self.tasks.shutdown().await;
        self.world.engine.sweep(&HashSet::new()).await;
        for handle in self.stalls.into_keys() {
            let records = self.world.records.clone();
            if let Err(error) = blocking(move || records.remove(&handle)).await {
                error!(%error, "a record stays");
            }
        }
    }

    /// Never waits: what the host says on its own, it says again. Nothing is said before it can be
    /// asked: whoever hears of this host may send it a command at once.
    fn say(&self, message: Message) {
        if self.greeting != Greeting::TooEarly {
            self.world.outlet.offer(message);
        }
    }
}

/// Adopts the containers of records that this agent cannot use, so that their apps run on untouched. What
/// is adopted keeps its addresses, dead or alive. Only a shutdown takes it away, as everything.
async fn keep_unread(world: &World, unread: &[Unread]) -> Vec<Container> {
    let mut kept = Vec::new();
    for one in unread {
        error!(
            handle = one.handle, path = %one.path.display(), why = one.why,
            "a record cannot be used: what runs by it is left alone; start the agent that wrote it, or run `ostler clean`"
        );
        let Some(saved) = &one.container else {
            continue;
        };
        match world.engine.adopt(saved).await {
            Ok(Adopted::Alive(container) | Adopted::Dead { container, .. }) => kept.push(container),
            Err(error) => error!(handle = one.handle, %error, "its container cannot be adopted"),
        }
    }
    kept
}

/// What an agent that leaves says to whatever it cannot begin any more.
pub fn shutting_down() -> Reply {
    Reply::error(
        ErrorCode::ShuttingDown,
        "this host takes no more commands: its agent is leaving",
    )
}

fn ticks(period: Duration) -> tokio::time::Interval {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}
