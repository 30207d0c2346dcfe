//! One instance: one task, which alone changes its record.
//!
//! The task reads as the life does: [`start`](Instance::start) until RUNNING, then
//! [`attend`](Instance::attend) until something ends it, then [`finish`](Instance::finish). Every wait
//! goes through `attend`, so a stop, an update, new limits, an OOM kill and the end of the app are seen
//! in every phase. Wants are level-triggered: they coalesce and are never refused; questions come
//! through a bounded mailbox.

mod announce;
pub(crate) mod events;
mod finish;
mod health;
mod route;
mod start;

pub use route::Route;

use super::output::JobView;
use super::record::{self, Limits, Record, Stopping};
use super::state::{Act, Ask, admit};
use super::world::{World, now};
use crate::engine::{Adopted, Container, OomReport, Place};
use messages::start::StartRequest;
use messages::state::State;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tracing::{error, info, warn};

/// What the stable is told. Unbounded in type, bounded in fact: each instance tells one change for
/// each state it enters or want it has applied.
#[derive(Debug)]
pub enum Change {
    /// An instance as it is now.
    View(Box<View>),
    /// It has no processes, no port, no record any more.
    Gone(String),
}

/// What the outside may know of an instance.
#[derive(Debug, Clone)]
pub struct View {
    /// Its record.
    pub record: Record,
    /// `name` of the start message.
    pub name: String,
    /// `cc_partition` of the start message.
    pub cc_partition: String,
    /// `droplet` of the start message.
    pub droplet: String,
    /// `index` of the start message.
    pub index: u64,
    /// `stop_grace` of the start message.
    pub stop_grace: Option<Duration>,
    /// The number of the newest wants that were applied and recorded.
    pub applied: u64,
}

/// What is wanted of an instance; see the module.
#[derive(Debug, Clone, Default)]
pub struct Wants {
    /// Stop it; the first to want it says how.
    pub stop: Option<Stopping>,
    /// The URIs and version that it shall have.
    pub update: Option<(Vec<String>, Option<String>)>,
    /// The limits that it shall have, and the number of that wish: it is tried once.
    pub limits: Option<(u64, Limits)>,
    /// Forget it, if it has crashed.
    pub reap: bool,
    /// Counts the changes of this structure.
    pub number: u64,
}

/// A question that only the task can answer.
#[derive(Debug)]
pub enum Query {
    /// Measured use.
    Usage(oneshot::Sender<Measured>),
}

/// Measured use of one instance.
#[derive(Debug, Clone, Copy, Default)]
pub struct Measured {
    /// Fraction of one core, mean since the last question (at least a second).
    pub cpu: f64,
    /// Bytes of memory, without inactive file cache.
    pub memory_bytes: u64,
}

/// The stable's end of an instance.
#[derive(Debug)]
pub struct Reins {
    /// What it shall do.
    pub wants: watch::Sender<Wants>,
    /// What it shall answer. A full mailbox is silence for a query.
    pub queries: mpsc::Sender<Query>,
    /// To be repeated.
    pub route: Arc<Route>,
}

/// Questions that may wait for one instance.
const QUERIES: usize = 32;

/// What comes while an instance waits for something.
enum Event {
    Wants,
    OutOfMemory(OomReport),
    Ended,
    Confirmed,
    Query(Query),
}

/// Why a wait ended early.
#[derive(Debug)]
enum Interrupt {
    /// A stop is wanted.
    Stop,
    /// The app ended or its container died.
    Ended,
    /// The kernel killed for memory, and that ends the instance.
    OutOfMemory,
}

/// One instance; see the module.
pub struct Instance {
    world: Arc<World>,
    record: Record,
    message: StartRequest,
    container: Option<Container>,
    remains: Option<Remains>,
    place: Option<Place>,
    wants: watch::Receiver<Wants>,
    queries: mpsc::Receiver<Query>,
    job: watch::Receiver<JobView>,
    /// Somebody brings the job's output to the bus.
    followed: bool,
    ooms: Option<mpsc::Receiver<OomReport>>,
    instance_id: watch::Sender<String>,
    route: Arc<Route>,
    announcer: announce::Announcer,
    cpu: Option<(Instant, u64, f64)>,
    applied: u64,
}

impl std::fmt::Debug for Instance {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Instance")
            .field("handle", &self.record.handle)
            .finish_non_exhaustive()
    }
}

/// What is left of the container of an instance from an earlier life of the agent.
#[derive(Debug)]
pub enum Remains {
    /// It runs, and is ours again.
    Alive(Container),
    /// It is dead: why, and what is left of it.
    Dead(String, Container),
    /// Nobody could find out: why.
    Unknown(String),
}

impl Remains {
    /// What is left of the container that `record` names.
    pub async fn of(world: &World, record: &Record) -> Self {
        let Some(saved) = &record.container else {
            return Self::Unknown("its record names no container".into());
        };
        match world.engine.adopt(saved).await {
            Ok(Adopted::Alive(container)) => Self::Alive(container),
            Ok(Adopted::Dead { reason, container }) => Self::Dead(reason.to_owned(), container),
            Err(error) => Self::Unknown(error.to_string()),
        }
    }
}

/// Makes an instance from its record; the caller runs [`Instance::live`] in a task of its own.
/// It has what was found of the container that the record names, or a place for one.
#[must_use]
pub fn instance(
    world: Arc<World>,
    record: Record,
    message: StartRequest,
    (remains, place): (Option<Remains>, Option<Place>),
) -> (Instance, Reins) {
    let (wants_in, wants) = watch::channel(Wants::default());
    let (queries_in, queries) = mpsc::channel(QUERIES);
    let (instance_id, _) = watch::channel(record.instance.clone());
    let announcer = announce::Announcer::start(world.outlet.clone(), &record.unsent);
    let route = Arc::new(Route::new(world.outlet.clone()));
    let instance = Instance {
        route: Arc::clone(&route),
        world,
        record,
        message,
        container: None,
        remains,
        place,
        wants,
        queries,
        job: watch::channel(JobView::default()).1,
        followed: false,
        ooms: None,
        instance_id,
        announcer,
        cpu: None,
        applied: 0,
    };
    if instance.record.state == State::Running {
        let known = events::route(&instance.world, &instance.view());
        route.known(known);
    }
    (
        instance,
        Reins {
            wants: wants_in,
            queries: queries_in,
            route,
        },
    )
}

impl Instance {
    /// Lives the whole life. `accepted` is told once the record is on disk: a start may be answered
    /// only then.
    pub async fn live(mut self, accepted: oneshot::Sender<Result<(), String>>) {
        let fresh = self.record.state == State::Born;
        if fresh && let Err(error) = self.save().await {
            drop(accepted.send(Err(error)));
            self.gone().await;
            return;
        }
        drop(accepted.send(Ok(())));
        self.tell();
        let end = if fresh {
            self.begin().await
        } else {
            self.resume().await
        };
        self.finish(end).await;
    }

    /// Runs `work` while seeing to everything else that concerns the instance.
    async fn attend<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Interrupt> {
        let mut work = pin!(work);
        loop {
            self.apply_wants().await;
            if self.record.stopping.is_some() {
                return Err(Interrupt::Stop);
            }
            let container = self.container.clone();
            let event = tokio::select! {
                // Wants first: a stop must not wait behind an app that answers questions quickly. OOM
                // before the end of the job: it is the reason of that end.
                biased;
                Ok(()) = self.wants.changed() => Event::Wants,
                Some(report) = next(&mut self.ooms) => Event::OutOfMemory(report),
                () = job_is(&mut self.job, JobView::over) => Event::Ended,
                () = died(container) => Event::Ended,
                Some(()) = self.announcer.confirmed() => Event::Confirmed,
                Some(query) = self.queries.recv() => Event::Query(query),
                done = &mut work => return Ok(done),
            };
            match event {
                Event::Wants => {}
                Event::OutOfMemory(report) => {
                    if self.out_of_memory(report).await {
                        return Err(Interrupt::OutOfMemory);
                    }
                }
                Event::Ended => return Err(Interrupt::Ended),
                Event::Confirmed => self.confirmed().await,
                Event::Query(query) => self.answer(query).await,
            }
        }
    }

    /// Applies what is wanted, as far as the state allows.
    async fn apply_wants(&mut self) {
        let wants = self.wants.borrow_and_update().clone();
        let mut changed = false;
        if let Some((uris, version)) = wants.update {
            changed |= self.update(uris, version);
        }
        if let Some((_, limits)) = wants.limits.filter(|(number, _)| *number > self.applied) {
            changed |= self.limit(limits).await;
        }
        if let (Some(stop), None) = (wants.stop, &self.record.stopping)
            && let Act::Enter(_) = admit(self.record.state, Ask::Stop)
        {
            self.record.stopping = Some(stop);
            changed = true;
        }
        if changed {
            self.keep().await;
        }
        if changed || self.applied != wants.number {
            self.applied = wants.number;
            self.tell();
        }
    }

    fn update(&mut self, uris: Vec<String>, version: Option<String>) -> bool {
        let version = version.unwrap_or_else(|| self.record.version.clone());
        if self.record.uris == uris && self.record.version == version {
            return false;
        }
        self.record.uris = uris;
        if self.record.version != version {
            self.record.version = version;
            self.record.instance = crate::random::hex(16);
            self.instance_id.send_replace(self.record.instance.clone());
        }
        self.route.change(&self.record.uris);
        true
    }

    /// Takes on new limits, whole or not at all.
    async fn limit(&mut self, limits: Limits) -> bool {
        // A process keeps the number of open files with which it was started.
        let fds = if self.record.spawned {
            self.record.limits.fds
        } else {
            limits.fds
        };
        let limits = Limits { fds, ..limits };
        if limits == self.record.limits {
            return false;
        }
        if let Some(container) = &self.container {
            let wanted = start::engine_limits(&self.world.config, limits);
            if let Err(error) = container.limit(wanted).await {
                warn!(handle = self.record.handle, %error, "new limits were refused");
                return false;
            }
        }
        self.record.limits = limits;
        true
    }

    async fn answer(&mut self, query: Query) {
        let Query::Usage(answer) = query;
        let mut measured = Measured::default();
        if let Some(container) = &self.container {
            match container.usage().await {
                Ok(usage) => {
                    measured.memory_bytes = usage.memory_bytes;
                    measured.cpu = self.cpu_since(usage.cpu_ns);
                }
                Err(error) => warn!(handle = self.record.handle, %error, "usage is unknown"),
            }
        }
        let _gone = answer.send(measured);
    }

    fn cpu_since(&mut self, now_ns: u64) -> f64 {
        let now = Instant::now();
        match self.cpu {
            Some((then, _, mean)) if now - then < Duration::from_secs(1) => mean,
            Some((then, then_ns, _)) => {
                let used = Duration::from_nanos(now_ns.saturating_sub(then_ns));
                let mean = used.as_secs_f64() / (now - then).as_secs_f64();
                self.cpu = Some((now, now_ns, mean));
                mean
            }
            None => {
                self.cpu = Some((now, now_ns, 0.0));
                0.0
            }
        }
    }

    /// Reports a kill; `true` if it ends the instance.
    async fn out_of_memory(&mut self, report: OomReport) -> bool {
        let ends = self.message.oom_group.unwrap_or(true);
        self.record.oom_kills = self.record.oom_kills.max(report.count);
        self.record.out_of_memory |= ends;
        info!(handle = self.record.handle, victim = ?report.victim, "out of memory");
        let event = events::oom(&self.world, &self.view(), &report, !ends);
        self.announce(event).await;
        ends
    }

    /// Enters `state` if the table says so; records and tells it.
    async fn enter(&mut self, ask: Ask) -> bool {
        let Act::Enter(state) = admit(self.record.state, ask) else {
            return false;
        };
        self.record.state = state;
        self.record.state_timestamp = now();
        if state == State::Starting {
            self.record.started_at = self.record.state_timestamp;
        }
        self.keep().await;
        info!(
            handle = self.record.handle,
            state = state.name(),
            "entered a state"
        );
        self.tell();
        true
    }

    /// The instance as it is now.
    #[must_use]
    pub fn view(&self) -> View {
        View {
            record: self.record.clone(),
            name: self.message.name.clone(),
            cc_partition: self.message.cc_partition.clone(),
            droplet: self.message.droplet.to_string(),
            index: self.message.index,
            stop_grace: self.message.stop_grace.map(Duration::from_secs),
            applied: self.applied,
        }
    }

    /// Tells the stable.
    fn tell(&self) {
        // The stable ends only when the agent does.
        drop(self.world.changes.send(Change::View(Box::new(self.view()))));
    }

    async fn save(&self) -> Result<(), String> {
        let (records, record) = (self.world.records.clone(), self.record.clone());
        crate::host::blocking(move || records.save(&record))
            .await
            .map_err(|error| error.to_string())
    }

    /// Saves the record; a failure is logged, for the instance itself is as right as before.
    async fn keep(&self) {
        if let Err(error) = self.save().await {
            error!(
                handle = self.record.handle,
                error, "the record could not be saved"
            );
        }
    }

    /// Records an event and has it said until the bus has it.
    async fn announce(&mut self, event: record::Event) {
        self.record.unsent.push(event.clone());
        self.keep().await;
        self.announcer.say(event);
    }

    /// The bus has the oldest unsent event.
    async fn confirmed(&mut self) {
        if !self.record.unsent.is_empty() {
            self.record.unsent.remove(0);
            self.keep().await;
        }
    }
}

/// Resolves when the job is so; never, if nobody follows it.
async fn job_is(job: &mut watch::Receiver<JobView>, so: impl FnMut(&JobView) -> bool) {
    let known = job.wait_for(so).await.is_ok();
    if !known {
        std::future::pending().await
    }
}

async fn next<T>(channel: &mut Option<mpsc::Receiver<T>>) -> Option<T> {
    match channel {
        Some(channel) => channel.recv().await,
        None => std::future::pending().await,
    }
}

async fn died(container: Option<Container>) {
    match container {
        Some(container) => container.died().await,
        None => std::future::pending().await,
    }
}
