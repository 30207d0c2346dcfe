//! Answers that are owed when instances have reached a state (`"wait"`).

use super::Stable;
use messages::reply::{ErrorCode, Reply};
use messages::start::Wait;
use messages::state::State;
use tokio::sync::oneshot;

/// One owed answer.
#[derive(Debug)]
pub(super) struct Waiting {
    /// The instances that have not reached it yet.
    handles: Vec<String>,
    until: Wait,
    /// What is answered when all have.
    then: Reply,
    answer: Option<oneshot::Sender<Reply>>,
}

/// How far one instance is.
enum Progress {
    There,
    OnTheWay,
    /// It cannot get there any more: why.
    Never(String),
}

impl Stable {
    /// Answers `then`, at once or when all of `handles` are where `until` says.
    pub(super) fn answer_when(
        &mut self,
        handles: Vec<String>,
        until: Option<Wait>,
        then: Reply,
        answer: oneshot::Sender<Reply>,
    ) {
        let Some(until) = until else {
            // Whoever asked may have gone.
            drop(answer.send(then));
            return;
        };
        self.waiting.push(Waiting {
            handles,
            until,
            then,
            answer: Some(answer),
        });
        self.tell_all_waiting();
    }

    /// An instance changed: answers what became answerable.
    pub(super) fn tell_waiting(&mut self, handle: &str) {
        if self
            .waiting
            .iter()
            .any(|waiting| waiting.handles.iter().any(|one| one == handle))
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
        waiting
            .handles
            .retain(|handle| match self.progress(handle, waiting.until) {
                Progress::There => false,
                Progress::OnTheWay => true,
                Progress::Never(why) => {
                    never = Some(why);
                    true
                }
            });
        let reply = match never {
            Some(why) => Reply::error(ErrorCode::Ended, why),
            None if waiting.handles.is_empty() => waiting.then.clone(),
            None => return true,
        };
        if let Some(answer) = waiting.answer.take() {
            drop(answer.send(reply));
        }
        false
    }

    fn progress(&self, handle: &str, until: Wait) -> Progress {
        let record = self.stalls.get(handle).map(|stall| &stall.view.record);
        match (until, record) {
            (Wait::Stopped, None) => Progress::There,
            (Wait::Running, None) => Progress::Never("the instance is gone".into()),
            (Wait::Stopped, Some(record)) => match record.state {
                State::Stopped | State::Crashed => Progress::There,
                State::Born
                | State::Starting
                | State::Running
                | State::Stopping
                | State::Resuming
                | State::Evacuating => Progress::OnTheWay,
            },
            (Wait::Running, Some(record)) => match record.state {
                State::Running | State::Evacuating => Progress::There,
                State::Born | State::Starting | State::Resuming => Progress::OnTheWay,
                State::Stopping | State::Stopped => {
                    Progress::Never("the instance is stopped".into())
                }
                // The exit follows the state: it says why.
                State::Crashed => match &record.exit {
                    Some(exit) => Progress::Never(exit.description.clone()),
                    None => Progress::OnTheWay,
                },
            },
        }
    }
}
