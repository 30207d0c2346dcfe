//! Answers that are owed when instances have reached a state (`"wait"`).

use super::Stable;
use super::commands::Asked;
use crate::instances::instance::Refusal;
use crate::instances::record::{Limits, Record};
use messages::reply::{ErrorCode, Reply};
use messages::start::Wait;
use messages::state::State;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

/// What stands in the place of a handle for whoever waits for a template.
pub(super) const TEMPLATE: &str = "";

/// All owed answers. Whoever changes is looked for in those that wait for it, and in no others: many may
/// wait.
#[derive(Debug, Default)]
pub(super) struct Waitings {
    all: HashMap<u64, Waiting>,
    /// By handle: the numbers of those that wait for it, oldest first.
    of: HashMap<String, Vec<u64>>,
    next: u64,
}

impl Waitings {
    fn add(&mut self, waiting: Waiting) {
        for handle in waiting.owed.keys() {
            self.of.entry(handle.clone()).or_default().push(self.next);
        }
        self.all.insert(self.next, waiting);
        self.next += 1;
    }

    fn remove(&mut self, number: u64) -> Option<Waiting> {
        let waiting = self.all.remove(&number)?;
        for handle in waiting.owed.keys() {
            if let Some(numbers) = self.of.get_mut(handle) {
                numbers.retain(|other| *other != number);
            }
        }
        Some(waiting)
    }
}

/// One owed answer.
#[derive(Debug)]
struct Waiting {
    /// The instances that have not reached it yet, by handle.
    owed: BTreeMap<String, Owed>,
    /// What is answered when all have.
    then: Reply,
    /// Instances that did not take their new limits, and why.
    refused: Vec<(String, Option<Refusal>)>,
    answer: oneshot::Sender<Reply>,
}

impl Waiting {
    fn reply(&self) -> Reply {
        let mut reply = self.then.clone();
        if let (Reply::Ok(fields), false) = (&mut reply, self.refused.is_empty()) {
            let handles: Vec<&String> = self.refused.iter().map(|(handle, _)| handle).collect();
            fields.insert("refused".into(), json!(handles));
            fields.insert("why".into(), self.why());
        }
        reply
    }

    /// Why limits were refused, by handle.
    fn why(&self) -> Value {
        let why = self.refused.iter().filter_map(|(handle, refusal)| {
            let refusal = refusal.as_ref()?;
            let mut why = json!({"message": refusal.message});
            if let (Some(mem), Some(fields)) = (refusal.smallest_mem, why.as_object_mut()) {
                fields.insert("smallest".into(), json!({"mem": mem}));
            }
            Some((handle.clone(), why))
        });
        Value::Object(why.collect())
    }
}

/// What is waited for of one instance, or of an app's template.
#[derive(Debug)]
pub(super) struct Owed {
    pub(super) handle: String,
    /// The number of what it was asked; of the template.
    pub(super) number: u64,
    pub(super) until: Until,
    /// What it was told to make do with.
    pub(super) limits: Option<Limits>,
}

impl Owed {
    /// The same for all of these.
    pub(super) fn all(asked: Asked, until: Until) -> Vec<Self> {
        let owed = |(handle, number)| Self {
            handle,
            number,
            until,
            limits: None,
        };
        asked.into_iter().map(owed).collect()
    }

    /// The template of this number.
    pub(super) fn kept(number: u64) -> Self {
        Self {
            handle: TEMPLATE.to_owned(),
            number,
            until: Until::Kept,
            limits: None,
        }
    }
}

/// What is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Until {
    /// What was asked is recorded: no kill of the agent can lose it.
    Recorded,
    /// So it is, also by what is on its way out or has crashed.
    Applied,
    /// The template of this number is on disk, or the disk takes too long.
    Kept,
    /// RUNNING, with what was asked.
    Running,
    /// No processes.
    Stopped,
}

impl Until {
    /// What a command that asks for `wait` waits for.
    pub(super) fn of(wait: Option<Wait>) -> Self {
        match wait {
            None => Self::Recorded,
            Some(Wait::Running) => Self::Running,
            Some(Wait::Stopped) => Self::Stopped,
        }
    }
}

/// How far one instance is.
enum Progress {
    There,
    OnTheWay,
    /// It cannot get there any more, or nobody knows when: why.
    Never(ErrorCode, String),
}

impl Stable {
    /// Answers `then`, at once or when all is as it is owed.
    pub(super) fn answer_when(
        &mut self,
        owed: Vec<Owed>,
        then: Reply,
        answer: oneshot::Sender<Reply>,
    ) {
        let owed = owed.into_iter().map(|owed| (owed.handle.clone(), owed));
        let mut waiting = Waiting {
            owed: owed.collect(),
            then,
            refused: Vec::new(),
            answer,
        };
        let handles: Vec<String> = waiting.owed.keys().cloned().collect();
        let looked = handles
            .iter()
            .find_map(|handle| self.look(&mut waiting, handle));
        let reply = looked.or_else(|| waiting.owed.is_empty().then(|| waiting.reply()));
        match reply {
            Some(reply) => drop(waiting.answer.send(reply)),
            None => self.waiting.add(waiting),
        }
    }

    /// Answers that only need the disk come in a moment: waits for them, until `deadline`.
    pub(super) async fn until_recorded(&mut self, deadline: Instant) {
        let due = |owed: &Owed| matches!(owed.until, Until::Recorded | Until::Applied);
        let waits = |waiting: &Waiting| waiting.owed.values().any(due);
        while !self.templates.are_kept()
            || self.stalls.values().any(|stall| !stall.recorded)
            || self.waiting.all.values().any(waits)
        {
            match timeout_at(deadline, self.changed.recv()).await {
                Ok(Some(change)) => self.change(change),
                Ok(None) | Err(_) => return,
            }
        }
    }

    /// Whoever still waits is told to ask this agent's successor.
    pub(super) fn dismiss_waiting(&mut self) {
        for waiting in std::mem::take(&mut self.waiting).all.into_values() {
            let refusal = Reply::error(
                ErrorCode::ShuttingDown,
                "accepted, but the agent leaves before it can say more: ask again",
            );
            drop(waiting.answer.send(refusal));
        }
    }

    /// An instance changed: answers what became answerable.
    pub(super) fn tell_waiting(&mut self, handle: &str) {
        let mut waitings = std::mem::take(&mut self.waiting);
        let numbers = waitings.of.remove(handle).unwrap_or_default();
        let mut left = Vec::new();
        for number in numbers {
            let Some(waiting) = waitings.all.get_mut(&number) else {
                continue;
            };
            if let Some(reply) = self.look(waiting, handle) {
                if let Some(waiting) = waitings.remove(number) {
                    drop(waiting.answer.send(reply));
                }
            } else if waiting.owed.contains_key(handle) {
                left.push(number);
            }
        }
        if !left.is_empty() {
            waitings.of.insert(handle.to_owned(), left);
        }
        self.waiting = waitings;
    }

    /// A start could not be recorded, so it leaves nothing: who asked for it hears why, and who only listens.
    /// Who asked for something else meanwhile is answered when it is gone.
    pub(super) fn tell_unrecorded(&mut self, handle: &str, why: &str) {
        let refusal = Reply::error(
            ErrorCode::Internal,
            format!("the start could not be recorded: {why}"),
        );
        if let Some(stall) = self.stalls.get_mut(handle) {
            // Whoever repeats it starts anew.
            stall.view.record.request_id = None;
        }
        if let Some(stall) = self.stalls.get(handle) {
            let record = &stall.view.record;
            self.tell_refusal(&record.start, record.trace.as_ref(), &refusal);
        }
        // What an instance that was there is told to be has a number.
        let starts = |waiting: &Waiting| {
            waiting
                .owed
                .get(handle)
                .is_some_and(|owed| owed.number == 0)
        };
        let numbers = self.waiting.of.get(handle).cloned().unwrap_or_default();
        for number in numbers {
            if !self.waiting.all.get(&number).is_some_and(starts) {
                continue;
            }
            if let Some(waiting) = self.waiting.remove(number) {
                drop(waiting.answer.send(refusal.clone()));
            }
        }
    }

    /// Looks how far one instance is: strikes it off if it is there. The answer, if it is due now.
    fn look(&self, waiting: &mut Waiting, handle: &str) -> Option<Reply> {
        let owed = waiting.owed.get(handle)?;
        match self.progress(owed) {
            Progress::OnTheWay => None,
            Progress::Never(code, why) => Some(Reply::error(code, why)),
            Progress::There => {
                if let Some(stall) = self.refusing(owed) {
                    let why = stall.view.refusal.clone();
                    waiting.refused.push((handle.to_owned(), why));
                }
                waiting.owed.remove(handle);
                waiting.owed.is_empty().then(|| waiting.reply())
            }
        }
    }

    /// The instance, if it did not take the limits that it was asked to; newer ones may have come before it
    /// did.
    fn refusing(&self, owed: &Owed) -> Option<&super::Stall> {
        let (stall, asked) = (self.stalls.get(&owed.handle)?, owed.limits?);
        let newest = stall
            .promise
            .is_some_and(|(number, _)| number == owed.number);
        (newest && asked != stall.view.record.limits).then_some(stall)
    }

    fn progress(&self, owed: &Owed) -> Progress {
        let (number, until) = (owed.number, owed.until);
        if until == Until::Kept {
            return match self.templates.is_settled(number) {
                true => Progress::There,
                false => Progress::OnTheWay,
            };
        }
        let Some(stall) = self.stalls.get(&owed.handle) else {
            return match until {
                Until::Recorded | Until::Applied | Until::Stopped | Until::Kept => Progress::There,
                Until::Running => Progress::Never(ErrorCode::Ended, "the instance is gone".into()),
            };
        };
        if !stall.recorded {
            return Progress::OnTheWay;
        }
        let (view, record) = (&stall.view, &stall.view.record);
        // Its processes are dead once its exit is recorded.
        let over = record.state == State::Stopped
            || record.state == State::Crashed && record.exit.is_some();
        let done = || match &view.unrecorded {
            None => Progress::There,
            Some(why) => Progress::Never(ErrorCode::Internal, unrecorded(why)),
        };
        match until {
            Until::Recorded | Until::Applied if view.applied >= number => done(),
            Until::Recorded | Until::Stopped if over => done(),
            // On its way out already.
            Until::Recorded if matches!(record.state, State::Stopping | State::Crashed) => done(),
            // Nothing of it is left that could be updated.
            Until::Applied if record.state == State::Stopped => Progress::There,
            Until::Recorded | Until::Applied | Until::Kept => Progress::OnTheWay,
            Until::Stopped => match &view.stuck {
                Some(why) => Progress::Never(ErrorCode::Stuck, format!("{why}; it is tried again")),
                None => Progress::OnTheWay,
            },
            Until::Running => match (running(record), &view.unrecorded) {
                (Progress::There, _) if view.applied < number => Progress::OnTheWay,
                (Progress::There, Some(why)) if number > 0 => {
                    Progress::Never(ErrorCode::Internal, unrecorded(why))
                }
                (progress, _) => progress,
            },
        }
    }
}

fn unrecorded(why: &str) -> String {
    format!(
        "done, but a kill of the agent would undo it, for it could not be recorded: {why}; ask again"
    )
}

fn running(record: &Record) -> Progress {
    match record.state {
        State::Running => Progress::There,
        State::Evacuating if record.healthy => Progress::There,
        State::Born | State::Starting | State::Resuming | State::Evacuating => Progress::OnTheWay,
        State::Stopping | State::Stopped => {
            Progress::Never(ErrorCode::Ended, "the instance is stopped".into())
        }
        // The exit follows the state: it says why.
        State::Crashed => match &record.exit {
            Some(exit) => Progress::Never(ErrorCode::Ended, exit.description.clone()),
            None => Progress::OnTheWay,
        },
    }
}
