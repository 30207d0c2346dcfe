//! The stable: all instances of this host, and whatever needs to see them together.
//!
//! One task with one mailbox owns the list. It admits starts (atomically: what does not fit is refused
//! whole), hands wants to the instances, answers queries from what the instances told, and speaks for
//! the host: heartbeats, advertisements, routes. It never blocks, and never waits for an instance or a disk.

mod beats;
mod commands;
mod duty;
mod lodgers;
mod logs;
mod pace;
mod queries;
mod scaling;
mod templates;
mod waiting;

pub use beats::{Registry, Standing};
pub use duty::{Duty, Farewell, KEPT, left as left_of_evacuation};

use super::droplets::Digest;
use super::instance::{Change, Instance, Query, Reins, Remains, Update, View, Wants, instance};
use super::outlet::{Counted, Link, Message, Unsent};
use super::record::{Limits, Record, StopReason, Stopping};
use super::world::{World, now};
use crate::chain;
use crate::config::Intervals;
use crate::engine::{Place, Saved};
use crate::host::{blocking, in_background};
use lodgers::Lodgers;
use messages::command::{Command, Trigger};
use messages::reply::{ErrorCode, Reply};
use messages::start::StartRequest;
use messages::state::State;
use messages::trace::Trace;
use pace::Pace;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;
use templates::Templates;
use tokio::sync::{Mutex, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at, sleep_until, timeout_at};
use tracing::{Instrument, error, info, warn};
use waiting::Waitings;

/// Asks that may wait for the stable; a start beyond is answered `busy` by the bus.
pub const MAILBOX: usize = 1024;

/// Between two looks for old crashes (DEA: 10 s).
const REAPER: Duration = Duration::from_secs(10);

/// A droplet that was asked for so short a time ago is spared: an instance may just be about to use it.
const JUST_ASKED_FOR: Duration = Duration::from_secs(60);

/// What a shutdown may take beyond the hooks and the longest grace: kill, last bytes, last events.
const SHUTDOWN_REST: Duration = Duration::from_secs(15);

/// What the agent's leaving waits for what was asked before it, and for its being recorded.
const LAST_ASKS: Duration = Duration::from_secs(2);

/// What a shutdown waits for a bus that is away, once every process is dead.
const SHUTDOWN_WITHOUT_BUS: Duration = Duration::from_secs(2);

/// What the bus asks of the stable.
#[derive(Debug)]
pub enum Ask {
    /// Do something, and answer once.
    Command {
        /// What.
        command: Command,
        /// The message as it came: a start is kept with its instance.
        raw: serde_json::Value,
        /// The trace that it belongs to.
        trace: Option<Trace>,
        /// Where the one answer goes. A dropped one is an `internal` error there.
        answer: oneshot::Sender<Reply>,
    },
    /// Answer as often as the protocol says.
    Query {
        /// What is asked.
        query: messages::command::Query,
        /// Where the answers go; closed when there are no more.
        answers: Answers,
    },
    /// How this host stands.
    Host(oneshot::Sender<Standing>),
    /// Which instances are on it.
    Registry(oneshot::Sender<Registry>),
    /// Say something again.
    Trigger(Trigger),
    /// All subjects are subscribed to: this host can be asked.
    Ready,
}

/// Where the answers to one query go, each a body. Unbounded in type, bounded by the number of instances; whoever
/// takes queries in sees what waits of all of them.
#[derive(Debug, Clone)]
pub struct Answers {
    to: mpsc::UnboundedSender<(Vec<u8>, Counted)>,
    unsent: Unsent,
}

impl Answers {
    /// Answers that count in `unsent` until the bus has them.
    #[must_use]
    pub fn counted(unsent: Unsent) -> (Self, mpsc::UnboundedReceiver<(Vec<u8>, Counted)>) {
        let (to, answered) = mpsc::unbounded_channel();
        (Self { to, unsent }, answered)
    }

    fn send(&self, body: Vec<u8>) {
        let counted = self.unsent.count(body.len());
        // Whoever waits for them does so until they end.
        drop(self.to.send((body, counted)));
    }
}

/// One instance as the stable sees it.
#[derive(Debug)]
struct Stall {
    view: View,
    reins: Reins,
    /// Its record is on disk.
    recorded: bool,
    /// Most bytes that it takes in a heartbeat.
    heartbeat_bytes: usize,
    /// What it was told to be last, if an update came since it has a stall.
    updated: Option<Update>,
    /// It crashed, and makes room for another one: it is counted and told no more.
    leaves: bool,
    /// The number of the newest limits that it was asked to take, and the largest of those since it had
    /// none open: so much may be its.
    promise: Option<(u64, Limits)>,
}

impl Stall {
    /// Its version and its id, as everything that was asked so far leaves them.
    fn identity(&self) -> (&str, &str) {
        let record = &self.view.record;
        match &self.updated {
            Some(update) => (&update.version, &update.instance),
            None => (&record.version, &record.instance),
        }
    }

    /// Its URIs, as everything that was asked so far leaves them.
    fn uris(&self) -> &[String] {
        let updated = self.updated.as_ref().map(|update| &update.uris);
        updated.unwrap_or(&self.view.record.uris)
    }

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
    templates: Templates,
    changed: mpsc::UnboundedReceiver<Change>,
    tasks: JoinSet<()>,
    waiting: Waitings,
    link: Link,
    greeting: Greeting,
    /// What this host still does.
    duty: Duty,
    /// When an evacuation must be over; `None` once it is.
    bail_out: Option<Instant>,
    /// The heartbeat that tells of an evacuation is not said yet.
    evacuation_untold: bool,
    heartbeats: Pace,
    adverts: Pace,
    routes: Pace,
    /// What may run by records that this agent cannot use.
    lodgers: Lodgers,
    /// What is perhaps nobody's. Whoever looks for it has it.
    sighted: Arc<Mutex<BTreeSet<String>>>,
    /// Whoever removes what is on the disk for nobody has it.
    reaping: Arc<std::sync::Mutex<()>>,
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
        let (lodgers, ends) = Lodgers::take_in(&world, &found.unread).await;
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
        known.extend(lodgers.handles().cloned());
        let unread_saved: Vec<&Saved> = found
            .unread
            .iter()
            .filter_map(|unread| unread.legible.container.as_ref())
            .collect();
        let mut live = saved(|remains| !matches!(remains, Remains::Dead(..)));
        live.extend(unread_saved);
        world.engine.rebuild_network(&live).await?;
        // Cut off between a container and its record: that handle is used again.
        let again = adopted.iter().map(|(record, _)| record.handle.clone());
        let again = again.filter(|handle| !known.contains(handle)).collect();
        world.engine.sweep_beside(&known, &again).await;
        info!(adopted = adopted.len(), "took over what was here");
        let mut stable = Self::new(world, changed, lodgers).await;
        for end in ends {
            stable.tasks.spawn(end);
        }
        for (record, remains) in adopted {
            stable.take_in(record, remains);
        }
        stable.go_on_evacuating().await;
        Ok(stable)
    }

    /// One without instances, with whoever writes and speaks for it.
    async fn new(
        world: Arc<World>,
        changed: mpsc::UnboundedReceiver<Change>,
        lodgers: Lodgers,
    ) -> Self {
        let told = world.changes.clone();
        let (templates, writer) = Templates::open(&world.config.base, told).await;
        let mut tasks = JoinSet::new();
        tasks.spawn(writer);
        let speaker = Arc::clone(&world);
        tasks.spawn(async move { speaker.routes.speak().await });
        let now = Instant::now();
        Self {
            world,
            stalls: BTreeMap::new(),
            templates,
            changed,
            tasks,
            waiting: Waitings::default(),
            link: Link {
                max_payload: 1 << 20,
                ..Link::default()
            },
            greeting: Greeting::TooEarly,
            heartbeats: Pace::new(now),
            adverts: Pace::new(now),
            routes: Pace::new(now),
            duty: Duty::Serving,
            bail_out: None,
            evacuation_untold: false,
            lodgers,
            sighted: Arc::default(),
            reaping: Arc::default(),
        }
    }

    fn take_in(&mut self, record: Record, remains: Option<Remains>) {
        match StartRequest::from_kept(&record.start) {
            Ok(message) => {
                // Accepted, and without a container yet: its place is kept before others can ask for one.
                let waits = matches!(
                    record.state,
                    State::Born | State::Starting | State::Evacuating
                ) && record.container.is_none()
                    && record.stopping.is_none();
                let place = waits.then(|| self.world.engine.reserve().ok()).flatten();
                self.board(record, message, (remains, place));
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
    ) {
        let handle = record.handle.clone();
        let heartbeat_bytes = commands::heartbeat_bytes(&message, &record.version);
        let (instance, reins): (Instance, Reins) =
            instance(Arc::clone(&self.world), record, message, begins_with);
        let stall = Stall {
            recorded: false,
            view: instance.view(),
            reins,
            heartbeat_bytes,
            updated: None,
            leaves: false,
            promise: None,
        };
        let span = instance.span();
        self.tasks.spawn(instance.live().instrument(span));
        self.stalls.insert(handle, stall);
    }

    /// Does what is `ordered` until that is the parting. `relief` is told when an evacuation is over.
    pub async fn run(
        mut self,
        mut inbox: mpsc::Receiver<Ask>,
        mut link: watch::Receiver<Link>,
        mut ordered: watch::Receiver<Duty>,
        relief: mpsc::Sender<()>,
    ) {
        let intervals = self.world.config.intervals.clone();
        let mut heartbeat = self.beats();
        let mut advertise = ticks(intervals.advertise);
        let mut routes = ticks(intervals.router_register);
        let mut chores = Chores::every(&intervals);
        let mut farewell = None;
        let mut deadline = Instant::now();
        // At the end all that was asked is heard, so that nobody waits for an answer in vain.
        let mut asked_out = false;
        while farewell.is_none() || !asked_out {
            let next_word = self.next_word();
            tokio::select! {
                // What the instances told first: every answer is made from it. Then what is ordered, which
                // must not wait behind a flood of asks.
                biased;
                Some(change) = self.changed.recv() => self.change(change),
                changed = ordered.changed(), if farewell.is_none() => {
                    let leave = Duty::Parting(Farewell::Leave);
                    let duty = changed.map_or(leave, |()| *ordered.borrow_and_update());
                    if self.duty < duty {
                        self.take_up(duty).await;
                        heartbeat = self.beats();
                    }
                    if let Duty::Parting(how) = duty {
                        farewell = Some(how);
                        deadline = Instant::now() + LAST_ASKS;
                    }
                }
                () = sleep_until(deadline), if farewell.is_some() => break,
                Ok(()) = link.changed() => {
                    let now = *link.borrow_and_update();
                    self.link(now);
                }
                Some(_) = self.tasks.join_next() => {}
                () = at(next_word) => {}
                _ = heartbeat.tick() => self.heartbeats.soon(),
                _ = advertise.tick() => self.adverts.soon(),
                _ = routes.tick() => self.routes.soon(),
                chore = chores.next() => self.tidy(chore),
                () = at(self.bail_out) => self.bail_out(),
                ask = inbox.recv(), if !asked_out => match ask {
                    Some(ask) => self.hear(ask),
                    None => asked_out = true,
                },
            }
            if self.is_evacuated() {
                // Once is enough.
                let _told = relief.try_send(());
            }
            self.speak();
        }
        inbox.close();
        while let Ok(ask) = inbox.try_recv() {
            self.turn_away(ask);
        }
        self.until_recorded(deadline).await;
        match farewell.and_then(Farewell::stops) {
            Some(reason) => self.shut_down(reason, link, heartbeat).await,
            None => self.dismiss_waiting(),
        }
    }

    fn hear(&mut self, ask: Ask) {
        match ask {
            Ask::Command {
                command,
                raw,
                trace,
                answer,
            } => self.command(command, (raw, trace), answer),
            Ask::Query { query, answers } => self.query(query, answers),
            Ask::Host(answer) => drop(answer.send(self.standing())),
            Ask::Registry(answer) => drop(answer.send(self.registry())),
            Ask::Trigger(Trigger::Locate) => self.adverts.soon(),
            Ask::Trigger(Trigger::HealthmanagerStart) => self.heartbeats.soon(),
            Ask::Trigger(Trigger::RouterStart) => self.routes.soon(),
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
            trace,
            answer,
        } = ask
        {
            let refusal = shutting_down();
            if matches!(command, Command::Start(_)) {
                self.tell_refusal(&raw, trace.as_ref(), &refusal);
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
            let now = Instant::now();
            match self.duty {
                Duty::Serving => self.adverts.at_once(now),
                Duty::Drained | Duty::Evacuating | Duty::Parting(_) => self.goodbye(),
            }
            self.heartbeats.at_once(now);
            self.routes.at_once(now);
            self.speak();
        }
    }

    fn change(&mut self, change: Change) {
        match change {
            Change::View(view) => {
                let handle = view.record.handle.clone();
                let Some(stall) = self.stalls.get_mut(&handle) else {
                    return;
                };
                stall.recorded = true;
                let old = std::mem::replace(&mut stall.view, *view);
                let (old, new) = (&old.record, &stall.view.record);
                let beat = old.state != new.state && new.state == State::Running
                    || old.instance != new.instance
                    || old.uris != new.uris;
                let reserve = old.state != new.state || old.limits != new.limits;
                self.tell_waiting(&handle);
                self.tell_evacuation();
                if beat {
                    self.heartbeats.soon();
                }
                if reserve {
                    self.adverts.soon();
                }
            }
            Change::Unrecorded(handle, why) => self.tell_unrecorded(&handle, &why),
            Change::Gone(handle) => {
                self.stalls.remove(&handle);
                self.tell_waiting(&handle);
                self.tell_evacuation();
                self.adverts.soon();
            }
            Change::Deserted(handle) => {
                self.lodgers.ended(&handle);
                self.adverts.soon();
            }
            Change::Kept(number) => {
                self.templates.note(number);
                self.tell_waiting(waiting::TEMPLATE);
            }
            Change::Waited(number) => {
                self.templates.note_waited(number);
                self.tell_waiting(waiting::TEMPLATE);
            }
        }
    }

    fn tidy(&mut self, chore: Chore) {
        match chore {
            Chore::Crashes => self.reap(),
            Chore::Droplets => self.reap_disk(true),
            Chore::Orphans => self.reap_orphans(),
        }
    }

    /// Of each app only the newest crash is told; the instance itself knows when that is old. What crashes left
    /// has bounds of its own.
    fn reap(&mut self) {
        let mut newest: HashMap<&str, (f64, &str)> = HashMap::new();
        let mut old = Vec::new();
        for (handle, stall) in &self.stalls {
            let record = &stall.view.record;
            if record.state != State::Crashed {
                continue;
            }
            // A clock that was set back must not make the newest one the oldest.
            let time = Some(record.state_timestamp).filter(|time| *time <= now());
            let this = (time.unwrap_or_default(), handle.as_str());
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
        self.reap_disk(false);
    }

    /// Removes what is on the disk for nobody: what crashes left and is old, and, now and then, droplets. Those of what
    /// is here stay; so do those of what may be scaled up again, but where the disk is too full: the next scale from 0
    /// downloads them again. What crashes left yields last. None is removed as long as something runs of which nobody can
    /// tell by which droplet.
    fn reap_disk(&self, droplets_too: bool) {
        let starts = self.stalls.values().map(|stall| &stall.view.record.start);
        let (mut spared, may_come) = (droplets_of(starts), droplets_of(self.templates.all()));
        let lodging = self.lodgers.droplets();
        let (droplets, crashes) = (self.world.droplets.clone(), self.world.crashes.clone());
        let turn = Arc::clone(&self.reaping);
        let seen = Instant::now();
        in_background(move || {
            // A disk that hangs is looked at by one.
            let Ok(_turn) = turn.try_lock() else { return };
            let crowded = crashes.is_crowded();
            if !crowded {
                spared.extend(may_come);
            }
            if let (Some(lodging), true) = (lodging, droplets_too || crowded) {
                spared.extend(lodging);
                // What came since is not among the spared, however long the disk took to be looked at.
                let removed = droplets.reap(&spared, JUST_ASKED_FOR + seen.elapsed());
                if removed > 0 {
                    info!(removed, crowded, "removed droplets that nobody uses");
                }
            }
            crashes.reap();
        });
    }

    /// Removes what is in no record, once two looks have seen it: what is on its way into one, or out of it,
    /// is nobody's for a moment.
    fn reap_orphans(&mut self) {
        let Ok(mut sighted) = Arc::clone(&self.sighted).try_lock_owned() else {
            // The last look has found something that resists.
            return;
        };
        let known = self.stalls.keys().chain(self.lodgers.handles());
        let known = known.cloned().collect();
        let engine = self.world.engine.clone();
        self.tasks.spawn(async move {
            *sighted = engine.sweep_orphans(&known, sighted.clone()).await;
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

    /// Stops everything and waits until it is gone, with a deadline for all together. Heartbeats go on: a
    /// grace may be longer than what a health manager waits for one.
    async fn shut_down(
        mut self,
        reason: StopReason,
        mut link: watch::Receiver<Link>,
        mut heartbeat: Interval,
    ) {
        let handles: Vec<String> = self.stalls.keys().cloned().collect();
        let longest = handles
            .iter()
            .map(|handle| self.grace(handle))
            .max()
            .unwrap_or_default();
        for handle in &handles {
            self.want_stop(handle, reason);
            self.want(handle, |wants| wants.reap = true);
        }
        let hooks = self.world.config.hooks.longest_stop();
        let deadline = Instant::now() + hooks + longest + SHUTDOWN_REST;
        let mut until = deadline;
        while !self.stalls.is_empty() {
            let dead =
                |stall: &Stall| matches!(stall.view.record.state, State::Stopped | State::Crashed);
            if !link.borrow().up && until == deadline && self.stalls.values().all(dead) {
                until = deadline.min(Instant::now() + SHUTDOWN_WITHOUT_BUS);
            }
            let next_word = self.next_word();
            tokio::select! {
                change = timeout_at(until, self.changed.recv()) => match change {
                    Ok(Some(change)) => self.change(change),
                    Ok(None) | Err(_) => break,
                },
                () = at(next_word) => {}
                Ok(()) = link.changed() => {
                    let now = *link.borrow_and_update();
                    if now.up {
                        // What is left can be said after all.
                        until = deadline;
                    }
                    self.link(now);
                }
                _ = heartbeat.tick() => self.heartbeats.soon(),
            }
            self.speak();
        }
        if !self.stalls.is_empty() {
            warn!(
                left = self.stalls.len(),
                "not everything was said in time; removing it all the same"
            );
        }
        self.dismiss_waiting();
        self.tasks.shutdown().await;
        let (world, stalls) = (&self.world, self.stalls);
        let removed = async {
            world.engine.sweep(&HashSet::new()).await;
            // What was to be saved is not to come back.
            world.scribes.close().await;
            for handle in stalls.into_keys() {
                let records = world.records.clone();
                if let Err(error) = blocking(move || records.remove(&handle)).await {
                    error!(error = %chain(&error), "a record stays");
                }
            }
        };
        world.unless_disk_hangs(removed).await;
    }

    /// Never waits: what the host says on its own, it says again. Nothing is said before it can be
    /// asked: whoever hears of this host may send it a command at once. `false`: the bus is behind.
    fn say(&self, message: Message) -> bool {
        self.greeting == Greeting::TooEarly || self.world.outlet.offer(message)
    }
}

/// What an agent that leaves says to whatever it cannot begin any more.
pub fn shutting_down() -> Reply {
    Reply::error(
        ErrorCode::ShuttingDown,
        "this host takes no more commands: its agent is leaving",
    )
}

fn ticks(period: Duration) -> Interval {
    ticks_from(Instant::now(), period)
}

fn ticks_from(first: Instant, period: Duration) -> Interval {
    let mut ticks = interval_at(first, period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

/// The names of the droplets that these start messages want.
fn droplets_of<'a>(starts: impl Iterator<Item = &'a Value>) -> HashSet<String> {
    starts
        .filter_map(Digest::wanted_by)
        .map(|digest| digest.to_string())
        .collect()
}

/// What is looked for from time to time, to be removed.
#[derive(Debug, Clone, Copy)]
enum Chore {
    Crashes,
    Droplets,
    Orphans,
}

/// When each chore is due.
struct Chores {
    crashes: Interval,
    droplets: Interval,
    orphans: Interval,
}

impl Chores {
    fn every(intervals: &Intervals) -> Self {
        Self {
            crashes: ticks(REAPER),
            droplets: ticks(intervals.droplets),
            orphans: ticks(intervals.orphans),
        }
    }

    async fn next(&mut self) -> Chore {
        tokio::select! {
            _ = self.crashes.tick() => Chore::Crashes,
            _ = self.droplets.tick() => Chore::Droplets,
            _ = self.orphans.tick() => Chore::Orphans,
        }
    }
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}
