//! `dea.<id>.scale`: this host converges an app to so many instances of its own, all or nothing.

use super::Stable;
use super::commands::{Accepted, Asked, set, told_by};
use super::waiting::{Owed, Until};
use crate::instances::ledger::Amount;
use crate::instances::record::{Limits, StopReason};
use crate::instances::scale;
use crate::instances::startup::environment::{self, Changed};
use messages::command::{ScaleLimits, ScaleRequest};
use messages::reply::{ErrorCode, Reply};
use messages::start::{StartRequest, Wait};
use messages::state::State;
use messages::trace::Trace;
use serde_json::{Value, json};
use tokio::sync::oneshot;

impl Stable {
    pub(super) fn scale(
        &mut self,
        request: &ScaleRequest,
        trace: Option<&Trace>,
        answer: oneshot::Sender<Reply>,
    ) {
        match self.scaled(request, trace) {
            Ok((reply, owed)) => self.answer_when(owed, reply, answer),
            Err(refusal) => drop(answer.send(refusal)),
        }
    }

    /// Converges; the answer, and what must come before it.
    fn scaled(
        &mut self,
        request: &ScaleRequest,
        trace: Option<&Trace>,
    ) -> Result<(Reply, Vec<Owed>), Reply> {
        let droplet = request.droplet.to_string();
        let template = self.templates.get(&droplet).cloned();
        let template = template.ok_or_else(|| self.unknown(&droplet))?;
        self.templates.heard_of(&droplet);
        let most = self.world.config.resources.instances;
        if request.instances > most as u64 {
            return Err(Reply::error(
                ErrorCode::HostFull,
                format!("this host may have {most} instances (`resources.instances`)"),
            ));
        }
        let have = self.alive(&droplet);
        let plan = scale::plan(&have, request.instances);
        let limits = request.limits;
        let kept: Vec<String> = have
            .into_iter()
            .map(|(_, handle)| handle)
            .filter(|handle| !plan.stop.contains(handle))
            .collect();
        let grown = limits.map_or_else(Amount::default, |limits| self.growth(&kept, limits));
        let template = with_limits(template, limits);
        let started = self.starts((&template, trace), &plan.start, grown)?;
        let mut stopped: Asked = Vec::new();
        for handle in &plan.stop {
            let number = self.want_stop(handle, StopReason::Stopped);
            stopped.push((handle.clone(), number));
        }
        let until = |wait| match request.wait {
            Some(wanted) if wanted == wait => Until::of(Some(wait)),
            Some(_) | None => Until::Recorded,
        };
        let mut owed = Vec::new();
        if let Some(limits) = limits {
            let until = until(Wait::Running);
            owed.extend(
                kept.into_iter()
                    .map(|handle| self.want_limits(handle, limits, until)),
            );
            owed.push(self.keep_template(droplet.clone(), template));
        } else if request.wait == Some(Wait::Running) {
            // Of a repeated request those that the first one has started.
            let kept = kept.into_iter().map(|handle| (handle, 0)).collect();
            owed.extend(Owed::all(kept, Until::Running));
        }
        let new: Vec<Value> = started
            .iter()
            .map(|one| json!({"index": one.index, "instance": one.instance, "handle": one.handle}))
            .collect();
        let reply = Reply::ok(json!({
            "dea": self.world.id, "droplet": droplet, "instances": request.instances,
            "started": new, "stopped": plan.stop,
        }));
        let started = started.into_iter().map(|one| (one.handle, 0)).collect();
        owed.extend(Owed::all(started, until(Wait::Running)));
        if request.wait == Some(Wait::Stopped) {
            stopped = self.leaving(&droplet);
        }
        owed.extend(Owed::all(stopped, until(Wait::Stopped)));
        Ok((reply, owed))
    }

    fn unknown(&self, droplet: &str) -> Reply {
        let id = &self.world.id;
        let why =
            format!("no start of app {droplet:?} was accepted here: send dea.{id}.start first");
        Reply::error(ErrorCode::UnknownApp, why)
    }

    /// Wants of an instance what the new limits name; the rest stays as it has, or will have, it.
    fn want_limits(&mut self, handle: String, limits: ScaleLimits, until: Until) -> Owed {
        let new = self.stalls.get(&handle).map(|stall| {
            let wants = stall.reins.wants.borrow();
            let old = match wants.limits {
                Some((number, limits)) if number > stall.view.applied => limits,
                Some(_) | None => stall.view.record.limits,
            };
            changed(old, limits)
        });
        let number = self.want(&handle, |wants| {
            wants.limits = new.map(|new| (wants.number, new));
        });
        if let (Some(stall), Some(new)) = (self.stalls.get_mut(&handle), new) {
            stall.promise = Some((number, super::larger(stall.promised(), new)));
        }
        Owed {
            handle,
            number,
            until,
            limits: new,
        }
    }

    /// What these instances need more with the new limits.
    fn growth(&self, handles: &[String], limits: ScaleLimits) -> Amount {
        let stalls = handles.iter().filter_map(|handle| self.stalls.get(handle));
        stalls
            .map(super::Stall::promised)
            .fold(Amount::default(), |sum, old| {
                let new = changed(old, limits);
                Amount {
                    memory: sum.memory + new.mem.saturating_sub(old.mem),
                    disk: sum.disk + new.disk.saturating_sub(old.disk),
                }
            })
    }

    /// The instances of an app that count: index and handle.
    fn alive(&self, droplet: &str) -> Vec<(u64, String)> {
        self.stalls
            .iter()
            .filter(|(_, stall)| {
                stall.view.droplet == droplet
                    && matches!(
                        stall.view.record.state,
                        State::Born | State::Starting | State::Running | State::Evacuating
                    )
                    && stall.reins.wants.borrow().stop.is_none()
                    && stall.view.record.stopping.is_none()
            })
            .map(|(handle, stall)| (stall.view.index, handle.clone()))
            .collect()
    }

    /// The instances of an app that are on their way out, each with the number of what it was asked last.
    fn leaving(&self, droplet: &str) -> Asked {
        let of_app = self.stalls.iter();
        of_app
            .filter(|(_, stall)| stall.view.droplet == droplet)
            .filter(|(_, stall)| {
                let record = &stall.view.record;
                let ends = stall.reins.wants.borrow().stop.is_some() || record.stopping.is_some();
                match record.state {
                    State::Stopped => false,
                    // Its processes are dead once its exit is recorded.
                    State::Crashed => record.exit.is_none(),
                    State::Stopping => true,
                    State::Born
                    | State::Starting
                    | State::Resuming
                    | State::Running
                    | State::Evacuating => ends,
                }
            })
            .map(|(handle, stall)| (handle.clone(), stall.reins.wants.borrow().number))
            .collect()
    }

    /// Admits the starts at these indices, and what others grow by, and begins them: all or none.
    fn starts(
        &mut self,
        (template, trace): (&Value, Option<&Trace>),
        indices: &[u64],
        grown: Amount,
    ) -> Result<Vec<Accepted>, Reply> {
        let mut raw = template.clone();
        for key in ["request_id", "wait"] {
            set(&mut raw, key, Value::Null);
        }
        let mut messages = Vec::new();
        for index in indices {
            set(&mut raw, "index", json!(index));
            let message = StartRequest::from_kept(&raw)
                .map_err(|bad| Reply::error(ErrorCode::Internal, bad.to_string()))?;
            messages.push((message, raw.clone()));
        }
        // The last has the longest index, and so the longest entry in heartbeats.
        let Some((last, _)) = messages.last() else {
            self.admit_amount((Amount::default(), 0), grown)?;
            return Ok(Vec::new());
        };
        let places = self.admit_start(last, messages.len(), grown)?;
        let places = places.into_iter().map(Some);
        Ok(messages
            .into_iter()
            .zip(places)
            .map(|((message, raw), place)| self.accept(message, (raw, trace.cloned()), place))
            .collect())
    }
}

/// What a scale leaves out stays as it was.
fn changed(old: Limits, new: ScaleLimits) -> Limits {
    Limits {
        mem: new.mem.unwrap_or(old.mem),
        disk: new.disk.unwrap_or(old.disk),
        fds: new.fds.unwrap_or(old.fds),
    }
}

/// The start message for instances that come with these limits.
fn with_limits(mut template: Value, limits: Option<ScaleLimits>) -> Value {
    let Some(limits) = limits else {
        return template;
    };
    let named = [
        ("mem", limits.mem),
        ("disk", limits.disk),
        ("fds", limits.fds),
    ];
    if let Some(old) = template.get_mut("limits") {
        for (key, value) in named {
            if let Some(value) = value {
                set(old, key, json!(value));
            }
        }
    }
    let changed = Changed {
        mem: limits.mem,
        disk: limits.disk,
        fds: limits.fds,
        ..Changed::default()
    };
    if let Some(told) = told_by(&mut template) {
        environment::retell(told, changed);
    }
    template
}
