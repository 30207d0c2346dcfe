//! Answers that are owed when instances have reached a state (`"wait"`).

use super::Stable;
use super::commands::Asked;
use crate::instances::record::Record;
use messages::reply::{ErrorCode, Reply};
use messages::start::Wait;
use messages::state::State;
use serde_json::json;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

/// One owed answer.
#[derive(Debug)]
pub(super) struct Waiting {
    /// The instances that have not reached it yet.
    owed: Vec<Owed>,
    /// What is answered when all have.
    then: Reply,
    /// Instances whose new limits do not fit what they use.
    refused: Vec<String>,
    answer: Option<oneshot::Sender<Reply>>,
}

impl Waiting {
    fn reply(&self) -> Reply {
        let mut reply = self.then.clone();
        if let (Reply::Ok(fields), false) = (&mut reply, self.refused.is_empty()) {
            fields.insert("refused".into(), json!(self.refused));
        }
        reply
    }
}

/// What is waited for of one instance.
#[derive(Debug)]
pub(super) struct Owed {
    pub(super) handle: String,
    /// The number of what it was asked.
    pub(super) number: u64,
    pub(super) until: Until,
    /// MB of memory and of disk that it was told to make do with.
    pub(super) limits: Option<(u64, u64)>,
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
}

/// What is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Until {
    /// What was asked is recorded: no kill of the agent can lose it.
    Recorded,
    /// RUNNING.
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
    /// It cannot get there any more: why.
    Never(String),
}

impl Stable {
    /// Answers `then`, at once or when all is as it is owed.
    pub(super) fn answer_when(
        &mut self,
        owed: Vec<Owed>,
        then: Reply,
        answer: oneshot::Sender<Reply>,
    ) {
        self.waiting.push(Waiting {
            owed,
            then,
            refused: Vec::new(),
            answer: Some(answer),
        });
        self.tell_all_waiting();
    }

    /// Answers that only need a record on disk come in a moment: waits for them, until `deadline`.
    pub(super) async fn until_recorded(&mut self, deadline: Instant) {
        while self
            .waiting
            .iter()
            .flat_map(|waiting| &waiting.owed)
            .any(|owed| owed.until == Until::Recorded)
        {
            match timeout_at(deadline, self.changed.recv()).await {
                Ok(Some(change)) => self.change(change),
                Ok(None) | Err(_) => return,
            }
        }
    }

    /// Whoever still waits is told to ask this agent's successor.
    pub(super) fn dismiss_waiting(&mut self) {
        for mut waiting in self.waiting.drain(..) {
            let refusal = Reply::error(
                ErrorCode::ShuttingDown,
                "accepted, but the agent leaves before it can say more: ask again",
            );
            if let Some(answer) = waiting.answer.take() {
                drop(answer.send(refusal));
            }
        }
    }

    /// An instance changed: answers what became answerable.
    pub(super) fn tell_waiting(&mut self, handle: &str) {
        if self
            .waiting
            .iter()
            .any(|waiting| waiting.owed.iter().any(|owed| owed.handle == handle))
        {
            self.tell_all_waiting();
        }
    }

    fn tell_all_waiting(&mut self) {
        let mut waiting = std::mem::take(&mut self.waiting);
        waiting.retain_mut(|one| self.still_waiting(one));
        self.waiting = waiting;
    }

    fn still_waiting(&self, waiting: &mut Waiting) -> bool {
        let mut never = None;
        waiting.owed.retain(|owed| match self.progress(owed) {
            Progress::There => {
                if self.refuses(owed) {
                    waiting.refused.push(owed.handle.clone());
                }
                false
            }
            Progress::OnTheWay => true,
            Progress::Never(why) => {
                never = Some(why);
                true
            }
        });
        let reply = match never {
            Some(why) => Reply::error(ErrorCode::Ended, why),
            None if waiting.owed.is_empty() => waiting.reply(),
            None => return true,
        };
        if let Some(answer) = waiting.answer.take() {
            drop(answer.send(reply));
        }
        false
    }

    /// Whether it did not take the limits that it was asked to; newer ones may have come before it did.
    fn refuses(&self, owed: &Owed) -> bool {
        let Some(stall) = self.stalls.get(&owed.handle) else {
            return false;
        };
        let limits = stall.view.record.limits;
        let newest = stall
            .promise
            .is_some_and(|(number, _)| number == owed.number);
        newest
            && owed
                .limits
                .is_some_and(|asked| asked != (limits.mem, limits.disk))
    }

    fn progress(&self, owed: &Owed) -> Progress {
        let (number, until) = (owed.number, owed.until);
        let Some(view) = self.stalls.get(&owed.handle).map(|stall| &stall.view) else {
            return match until {
                Until::Recorded | Until::Stopped => Progress::There,
                Until::Running => Progress::Never("the instance is gone".into()),
            };
        };
        let record = &view.record;
        // Its processes are dead once its exit is recorded.
        let over = record.state == State::Stopped
            || record.state == State::Crashed && record.exit.is_some();
        match until {
            Until::Recorded if view.applied >= number || over => Progress::There,
            // On its way out already: the way out is recorded.
            Until::Recorded if matches!(record.state, State::Stopping | State::Crashed) => {
                Progress::There
            }
            Until::Stopped if over => Progress::There,
            Until::Recorded | Until::Stopped => Progress::OnTheWay,
            Until::Running => running(record),
        }
    }
}

fn running(record: &Record) -> Progress {
    match record.state {
        State::Running | State::Evacuating => Progress::There,
        State::Born | State::Starting | State::Resuming => Progress::OnTheWay,
        State::Stopping | State::Stopped => Progress::Never("the instance is stopped".into()),
        // The exit follows the state: it says why.
        State::Crashed => match &record.exit {
            Some(exit) => Progress::Never(exit.description.clone()),
            None => Progress::OnTheWay,
        },
    }
}
