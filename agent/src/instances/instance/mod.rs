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
pub(crate) mod health;
mod hooks;
mod kills;
mod route;
mod start;

pub(super) use start::JOB;

use super::output::JobView;
use super::record::{self, Entry, Limits, Record, Stopping};
use super::state::{Act, Ask, admit, is_ending};
use super::world::{World, now};
use crate::chain;
use crate::engine::{Adopted, Container, DiskChange, DiskUsage, EngineError, OomReport, Place};
use crate::host::scribe::{Scribe, UNANSWERED};
use messages::start::StartRequest;
use messages::state::State;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};
use tracing::{Instrument, Span, error, error_span, info, warn};

/// No clock is asked for more, whatever another agent accepted.
const LONGEST_GRACE: Duration = Duration::from_secs(24 * 3600);

/// What the stable is told. Unbounded in type, bounded in fact: each instance tells one change for
/// each state it enters or want it has applied.
#[derive(Debug)]
pub enum Change {
    /// An instance as it is now. The first one is told when its record is on disk; later ones say if theirs is not.
    View(Box<View>),
    /// A new one whose record could not be written, and why: it ends at once.
    Unrecorded(String, String),
    /// It has no processes, no port, no record any more.
    Gone(String),
    /// What ran by a record that this agent cannot use has ended.
    Deserted(String),
    /// Of the templates to be kept, all up to this number are on disk.
    Kept(u64),
    /// The disk takes so long for those up to this number that nobody waits for them any more.
    Waited(u64),
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
    /// The number of the newest wants that were applied, and recorded unless that is `unrecorded`.
    pub applied: u64,
    /// Why its record on disk is not this one, if so. It is tried again.
    pub unrecorded: Option<String>,
    /// Why the newest limits that it was asked to take were not, if so.
    pub refusal: Option<Refusal>,
    /// Its processes do not die, in words.
    pub stuck: Option<String>,
}

/// Why new limits were not taken.
#[derive(Debug, Clone)]
pub struct Refusal {
    /// In words.
    pub message: String,
    /// The smallest `limits.mem` that would have been, in MB, if that was the reason.
    pub smallest_mem: Option<u64>,
}

/// What is wanted of an instance; see the module.
#[derive(Debug, Clone, Default)]
pub struct Wants {
    /// Stop it; the first to want it says how.
    pub stop: Option<Stopping>,
    /// What it shall be.
    pub update: Option<Update>,
    /// The limits that it shall have, and the number of that wish: it is tried once.
    pub limits: Option<(u64, Limits)>,
    /// Go on as EVACUATING, if it lives.
    pub evacuate: bool,
    /// Forget it, if it has crashed.
    pub reap: bool,
    /// Counts the changes of this structure.
    pub number: u64,
}

/// What an instance shall be from now on, in whole: of several updates the last one holds what the others left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Update {
    /// Its URIs.
    pub uris: Vec<String>,
    /// Its version.
    pub version: String,
    /// Its id, a new one if the version is.
    pub instance: String,
}

/// A question that only the task can answer.
#[derive(Debug)]
pub enum Query {
    /// Measured use.
    Usage(oneshot::Sender<Measured>),
}

/// Measured use of one instance; `None`: it could not be read.
#[derive(Debug, Clone, Copy, Default)]
pub struct Measured {
    /// Fraction of one core, mean since the last question (at least a second).
    pub cpu: Option<f64>,
    /// Bytes of memory, without inactive file cache.
    pub memory_bytes: Option<u64>,
    /// Bytes of memory, as the limit counts them.
    pub charged_bytes: Option<u64>,
    /// The disk.
    pub disk: Option<MeasuredDisk>,
}

/// Measured use of a disk.
#[derive(Debug, Clone, Copy)]
pub enum MeasuredDisk {
    /// So much of what it may use.
    Bounded(DiskUsage),
    /// Nothing bounds it, and nothing counts.
    Unbounded,
}

/// The stable's end of an instance.
#[derive(Debug)]
pub struct Reins {
    /// What it shall do.
    pub wants: watch::Sender<Wants>,
    /// What it shall answer. Where the mailbox is full, that is left out of the answer.
    pub queries: mpsc::Sender<Query>,
}

/// Questions that may wait for one instance.
const QUERIES: usize = 32;

/// What comes while an instance waits for something.
enum Event {
    Wants,
    Confirmed,
    Heard,
    OutOfMemory(OomReport),
    Ended,
    Survived,
    Query(Query),
    /// The record that was late is on disk, or is not.
    Landed(Result<(), String>),
    Unrecorded,
}

/// Before a record that could not be saved is tried again.
const SAVE_AGAIN: Duration = Duration::from_secs(1);

/// How long an instance waits for its record to be on disk before it goes on without. Whoever asked for something waits
/// as long: `nats req` gives up after 5 s.
const PATIENCE: Duration = Duration::from_secs(4);

/// The same for what cannot go on without. A busy disk is slow for a while.
pub const MUST: Duration = Duration::from_secs(10);

/// Why the record on disk is not what it should be.
#[derive(Debug)]
enum Unrecorded {
    /// The disk has not answered yet. Until it has, no event is said that is not on it: of an agent that is killed now
    /// the next one would know nothing of that, and say another.
    Late,
    /// It said no, in words, at that time. That it will say yes nobody knows, so nothing waits for it.
    Failed(String, Instant),
}

impl Unrecorded {
    fn why(&self) -> &str {
        match self {
            Self::Late => UNANSWERED,
            Self::Failed(why, _) => why,
        }
    }
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
    untold: kills::Untold,
    instance_id: watch::Sender<String>,
    unheard: route::Unheard,
    announcer: announce::Announcer,
    scribe: Scribe<Entry>,
    /// Sees to a change of the disk's limit that the disk has not answered to in time.
    late_limit: Option<JoinHandle<()>>,
    cpu: Option<(Instant, u64, f64)>,
    applied: u64,
    unrecorded: Option<Unrecorded>,
    refusal: Option<Refusal>,
    /// What does not die, in words.
    stuck: Option<String>,
    /// How many files its processes may have open; `None`: an earlier agent started them.
    open_files: Option<u64>,
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
    let mut announcer = announce::Announcer::start(world.outlet.clone(), record.trace.clone());
    announcer.say(&record.unsent);
    let records = world.records.clone();
    let scribe = world.scribes.scribe(move |entry| records.enter(entry));
    let mut instance = Instance {
        unheard: route::Unheard::default(),
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
        untold: kills::Untold::default(),
        instance_id,
        announcer,
        scribe,
        late_limit: None,
        cpu: None,
        applied: 0,
        unrecorded: None,
        refusal: None,
        stuck: None,
        open_files: None,
    };
    instance.know_route();
    (
        instance,
        Reins {
            wants: wants_in,
            queries: queries_in,
        },
    )
}

impl Instance {
    /// What its log lines stand in: the trace of what began it. Without one there is no span.
    #[must_use]
    pub fn span(&self) -> Span {
        match &self.record.trace {
            Some(trace) => error_span!(parent: None, "instance", trace = trace.id()),
            None => Span::none(),
        }
    }

    /// Lives the whole life. The first thing that it tells is that its record is on disk, or why not: a
    /// start may be answered only then.
    pub async fn live(mut self) {
        // Nothing is known of it before it is on disk, and then it is starting.
        let fresh = self.turn(Ask::Start);
        if fresh && let Err(error) = in_words(self.save_or_give_up().await) {
            let (handle, droplet) = (&self.record.handle, &self.message.droplet);
            error!(handle, %droplet, error, "a start was refused, because it could not be recorded");
            let unrecorded = Change::Unrecorded(self.record.handle.clone(), error);
            drop(self.world.changes.send(unrecorded));
            self.gone().await;
            return;
        }
        self.tell();
        let end = if fresh {
            self.begin().await
        } else {
            self.resume().await
        };
        let end = self.unless_stopped(end).await;
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
                // Wants first: a stop must not wait behind an app that answers questions quickly. What
                // the bus has is given up before more is taken in. OOM before the end of the job: it is
                // the reason of that end.
                biased;
                Ok(()) = self.wants.changed() => Event::Wants,
                Some(()) = self.announcer.confirmed() => Event::Confirmed,
                () = self.unheard.heard() => Event::Heard,
                Some(report) = next(&mut self.ooms) => Event::OutOfMemory(report),
                () = job_is(&mut self.job, JobView::over) => Event::Ended,
                () = died(container) => Event::Ended,
                () = self.untold.due() => Event::Survived,
                Some(query) = self.queries.recv() => Event::Query(query),
                outcome = self.scribe.landed() => Event::Landed(outcome),
                () = save_again(self.unrecorded.as_ref()) => Event::Unrecorded,
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
                Event::Survived => self.tell_survived_kills().await,
                Event::Confirmed => self.confirmed().await,
                Event::Heard => self.route_heard().await,
                Event::Query(query) => self.answer(query).await,
                Event::Landed(outcome) => self.recorded(Some(outcome)),
                Event::Unrecorded => self.keep().await,
            }
        }
    }

    /// Applies what is wanted, as far as the state allows: a dying container takes no new limits.
    async fn apply_wants(&mut self) {
        let wants = self.wants.borrow_and_update().clone();
        let mut changed = false;
        if let Some(update) = wants.update {
            changed |= self.update(update);
        }
        if let (Some(stop), None) = (wants.stop, &self.record.stopping)
            && let Act::Enter(_) = admit(self.record.state, Ask::Stop)
        {
            self.record.stopping = Some(stop);
            changed = true;
        }
        let limits = { wants.limits }.filter(|(number, _)| *number > self.applied);
        if let Some((_, limits)) = limits {
            let taken = self.limit(limits).await;
            changed |= matches!(taken, Ok(true));
            self.refusal = taken.err();
        }
        if wants.evacuate && self.record.stopping.is_none() {
            self.enter(Ask::Evacuate).await;
        }
        // Whoever asks again wants to hear that it is recorded.
        let again = self.unrecorded.is_some() && self.applied != wants.number;
        if changed || again {
            self.keep().await;
        }
        if changed || self.applied != wants.number {
            self.applied = wants.number;
            self.tell();
        }
    }

    /// Whether it was anything else before.
    fn update(&mut self, update: Update) -> bool {
        let record = &mut self.record;
        let is_new = record.instance != update.instance;
        if record.uris == update.uris && record.version == update.version && !is_new {
            return false;
        }
        (record.uris, record.version) = (update.uris, update.version);
        if is_new {
            record.instance.clone_from(&update.instance);
            self.instance_id.send_replace(update.instance);
        }
        self.change_route();
        true
    }

    /// Resolves when it ends or is to be stopped.
    fn leaves(&self) -> impl Future<Output = ()> + use<> {
        let (mut wants, mut job) = (self.wants.clone(), self.job.clone());
        let container = self.container.clone();
        async move {
            tokio::select! {
                Ok(_) = wants.wait_for(|wants| wants.stop.is_some()) => {}
                () = job_is(&mut job, JobView::over) => {}
                () = died(container) => {}
            }
        }
    }

    /// Takes on new limits, whole or not at all; whether they are others.
    async fn limit(&mut self, limits: Limits) -> Result<bool, Refusal> {
        let old = self.record.limits;
        if limits == old {
            return Ok(false);
        }
        let ends = || Refusal {
            message: "the instance ends".into(),
            smallest_mem: None,
        };
        if is_ending(self.record.state) || self.record.stopping.is_some() {
            return Err(ends());
        }
        if let Some(container) = self.container.clone() {
            let leaves = self.leaves();
            let limited = tokio::select! {
                limited = self.limit_container(&container, old, limits) => limited,
                () = leaves => return Err(ends()),
            };
            if let Err(error) = limited {
                warn!(handle = self.record.handle, error = %chain(&error), "new limits were refused");
                return Err(Refusal {
                    smallest_mem: error.smallest_memory().map(|bytes| bytes >> 20),
                    message: error.to_string(),
                });
            }
        }
        self.record.limits = limits;
        Ok(true)
    }

    async fn limit_container(
        &mut self,
        container: &Container,
        old: Limits,
        new: Limits,
    ) -> Result<(), EngineError> {
        let limited = self.limit_each(container, old, new).await;
        if limited.is_err() {
            // What was given before the refusal is taken back; of the rest this changes nothing.
            let disk = match old.disk == new.disk || self.is_limit_late() {
                true => Ok(()),
                // Where it is late it comes to be in the end.
                false => self
                    .change_disk(container, old.disk, None)
                    .await
                    .unwrap_or(Ok(())),
            };
            let wanted = start::engine_limits(&self.world.config, old);
            let rest = container.limit(wanted).await;
            for error in [disk.err(), rest.err()].into_iter().flatten() {
                warn!(handle = self.record.handle, error = %chain(&error), "old limits were not restored");
            }
        }
        limited
    }

    /// One after the other, until one is refused.
    async fn limit_each(
        &mut self,
        container: &Container,
        old: Limits,
        new: Limits,
    ) -> Result<(), EngineError> {
        self.limit_disk(container, old.disk, new.disk).await?;
        let wanted = start::engine_limits(&self.world.config, new);
        container.limit(wanted).await?;
        // As long as it is not executed yet, `until_started` sees to it.
        let runs = self.record.serves() || self.job.borrow().started;
        if new.fds != old.fds && runs {
            container.limit_open_files(old.fds, new.fds).await?;
            self.open_files = Some(new.fds);
        }
        Ok(())
    }

    /// MB of disk, from `old` to `new`. What a disk that hangs does not answer to is refused, and taken back if it comes to be
    /// all the same.
    async fn limit_disk(
        &mut self,
        container: &Container,
        old: u64,
        new: u64,
    ) -> Result<(), EngineError> {
        if old == new {
            return Ok(());
        }
        if self.is_limit_late() {
            return Err(limit_late());
        }
        let done = self.change_disk(container, new, Some(old)).await;
        done.unwrap_or_else(|| Err(limit_late()))
    }

    /// To so many MB of disk. `None`: the disk has not answered yet. Once it has, it is taken `back` to so many.
    async fn change_disk(
        &mut self,
        container: &Container,
        disk: u64,
        back: Option<u64>,
    ) -> Option<Result<(), EngineError>> {
        let container = container.clone();
        let mut change = tokio::spawn(change_disk(container.clone(), disk).in_current_span());
        let hangs = self.world.scribes.lateness().hangs(PATIENCE);
        tokio::select! {
            biased;
            // An error is a panic, and the agent's end; or the runtime is shutting down.
            done = &mut change => return done.ok(),
            () = hangs => {}
        }
        let late = async move {
            let done = match (change.await, back) {
                (Ok(Ok(())), Some(back)) => change_disk(container, back).await,
                (Ok(Err(error)), None) => Err(error),
                _ => Ok(()),
            };
            if let Err(error) = done {
                warn!(error = %chain(&error), "an old limit was not restored");
            }
        };
        self.late_limit = Some(tokio::spawn(late.in_current_span()));
        None
    }

    /// Whether a change of the disk's limit is under way that nobody waits for any more.
    fn is_limit_late(&self) -> bool {
        { self.late_limit.as_ref() }.is_some_and(|late| !late.is_finished())
    }

    async fn answer(&mut self, query: Query) {
        let Query::Usage(answer) = query;
        let mut measured = Measured::default();
        if let Some(container) = self.container.clone() {
            match container.usage().await {
                Ok(usage) => {
                    measured.memory_bytes = Some(usage.memory_bytes);
                    measured.charged_bytes = Some(usage.charged_bytes);
                    measured.cpu = Some(self.cpu_since(usage.cpu_ns));
                }
                Err(error) => {
                    warn!(handle = self.record.handle, error = %chain(&error), "usage is unknown")
                }
            }
            match container.disk_usage().await {
                Ok(Some(usage)) => measured.disk = Some(MeasuredDisk::Bounded(usage)),
                // Without its disk at hand, whether it is bounded is not known.
                Ok(None) => measured.disk = container.disk().map(|_| MeasuredDisk::Unbounded),
                Err(error) => {
                    warn!(handle = self.record.handle, error = %chain(&error), "disk usage is unknown")
                }
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

    /// Enters `state` if the table says so; records and tells it.
    async fn enter(&mut self, ask: Ask) -> bool {
        let enters = self.turn(ask);
        if enters {
            self.keep().await;
            self.tell();
        }
        enters
    }

    /// Enters `state` if the table says so; it is to be recorded and told.
    fn turn(&mut self, ask: Ask) -> bool {
        let Act::Enter(state) = admit(self.record.state, ask) else {
            return false;
        };
        self.record.healthy |= self.record.state == State::Running;
        self.record.state = state;
        self.record.state_timestamp = now();
        if state == State::Starting {
            self.record.started_at = self.record.state_timestamp;
        }
        info!(
            handle = self.record.handle,
            state = state.name(),
            droplet = %self.message.droplet,
            index = self.message.index,
            "entered a state"
        );
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
            stop_grace: self
                .message
                .stop_grace
                .map(|seconds| Duration::from_secs(seconds).min(LONGEST_GRACE)),
            applied: self.applied,
            unrecorded: self.unrecorded.as_ref().map(|one| one.why().to_owned()),
            refusal: self.refusal.clone(),
            stuck: self.stuck.clone(),
        }
    }

    /// Tells the stable.
    fn tell(&self) {
        // The stable ends only when the agent does.
        drop(self.world.changes.send(Change::View(Box::new(self.view()))));
    }

    /// Saves the record for what must not go on without.
    async fn must_save(&mut self) -> Result<(), String> {
        let saved = self.save_or_give_up().await;
        self.recorded(saved.clone());
        in_words(saved)
    }

    async fn save_or_give_up(&mut self) -> Option<Result<(), String>> {
        let entry = Entry::Save(Box::new(self.record.clone()));
        self.scribe.write(entry, MUST).await
    }

    /// Saves the record. Where that fails or takes too long it is tried again, for the instance itself is as right as
    /// before.
    async fn keep(&mut self) {
        let entry = Entry::Save(Box::new(self.record.clone()));
        let saved = self.scribe.write_or_leave(entry, PATIENCE).await;
        self.recorded(saved);
    }

    /// What became of the newest record; `None`: that is not known yet. The same trouble is logged once.
    fn recorded(&mut self, saved: Option<Result<(), String>>) {
        let unrecorded = match saved {
            Some(Ok(())) => None,
            Some(Err(why)) => Some(Unrecorded::Failed(why, Instant::now())),
            None => Some(Unrecorded::Late),
        };
        let before = std::mem::replace(&mut self.unrecorded, unrecorded);
        let handle = &self.record.handle;
        match (&self.unrecorded, before) {
            (None, None) => {}
            (None, Some(_)) => {
                info!(handle, "the record was saved at last");
                self.tell();
            }
            (Some(now), before) if before.as_ref().is_none_or(|one| one.why() != now.why()) => {
                error!(handle, why = now.why(), "the record could not be saved");
                self.tell();
            }
            (Some(_), _) => {}
        }
        if !matches!(self.unrecorded, Some(Unrecorded::Late)) {
            self.announcer.say(&self.record.unsent);
        }
    }

    /// Records an event and has it said until the bus has it.
    async fn announce(&mut self, event: record::Event) {
        self.record.unsent.push(event);
        self.keep().await;
    }

    /// The bus has the oldest unsent event.
    async fn confirmed(&mut self) {
        if !self.record.unsent.is_empty() {
            self.record.unsent.remove(0);
            self.keep().await;
        }
    }
}

/// What became of a write that may not have been answered.
fn in_words(saved: Option<Result<(), String>>) -> Result<(), String> {
    saved.unwrap_or_else(|| Err(UNANSWERED.to_owned()))
}

/// What a change of the disk's limit is refused with that the disk has not answered to.
fn limit_late() -> EngineError {
    EngineError::Deadline {
        what: "a change of the disk's limit",
        waited: PATIENCE,
    }
}

/// To so many MB.
async fn change_disk(container: Container, disk: u64) -> Result<(), EngineError> {
    let change = DiskChange {
        bytes: Some(disk << 20),
        inodes: None,
    };
    container.limit_disk(change).await
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

/// Resolves when a record that could not be saved should be tried again; never, if there is none.
async fn save_again(unrecorded: Option<&Unrecorded>) {
    match unrecorded {
        Some(Unrecorded::Failed(_, tried)) => sleep_until(*tried + SAVE_AGAIN).await,
        Some(Unrecorded::Late) | None => std::future::pending().await,
    }
}

async fn died(container: Option<Container>) {
    match container {
        Some(container) => container.died().await,
        None => std::future::pending().await,
    }
}
