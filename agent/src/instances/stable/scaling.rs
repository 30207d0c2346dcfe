//! `dea.<id>.scale`: this host converges an app to so many instances of its own, all or nothing.

use super::Stable;
use super::commands::{Accepted, Asked, on_disk, set};
use super::waiting::Until;
use crate::instances::ledger::Amount;
use crate::instances::record::{Limits, StopReason};
use crate::instances::scale;
use messages::command::ScaleRequest;
use messages::reply::{ErrorCode, Reply};
use messages::start::{StartRequest, Wait};
use messages::state::State;
use serde_json::{Value, json};
use tokio::sync::oneshot;

impl Stable {
    pub(super) async fn scale(&mut self, request: &ScaleRequest, answer: oneshot::Sender<Reply>) {
        let reply = self.scaled(request).await;
        let (reply, started, changed) = match reply {
            Ok(done) => done,
            Err(refusal) => {
                drop(answer.send(refusal));
                return;
            }
        };
        let asked = match request.wait {
            Some(Wait::Running) => started,
            Some(Wait::Stopped) => changed
                .into_iter()
                .filter(|(handle, _)| self.is_stopping(handle))
                .collect(),
            None => changed,
        };
        self.answer_when(asked, Until::of(request.wait), reply, answer);
    }

    fn is_stopping(&self, handle: &str) -> bool {
        self.stalls
            .get(handle)
            .is_some_and(|stall| stall.reins.wants.borrow().stop.is_some())
    }

    /// Converges; the answer, and what was started and what was changed.
    async fn scaled(&mut self, request: &ScaleRequest) -> Result<(Reply, Asked, Asked), Reply> {
        let droplet = request.droplet.to_string();
        let template = self.templates.get(&droplet).cloned().ok_or_else(|| {
            Reply::error(
                ErrorCode::UnknownApp,
                format!(
                    "no start of app {droplet:?} was accepted here: send dea.{}.start first",
                    self.world.id
                ),
            )
        })?;
        let most = self.world.config.resources.instances;
        if request.instances > most as u64 {
            return Err(Reply::error(
                ErrorCode::HostFull,
                format!("this host may have {most} instances (`resources.instances`)"),
            ));
        }
        let have = self.alive(&droplet);
        let plan = scale::plan(&have, request.instances);
        let limits = scaled_limits(request, &template);
        let kept: Vec<String> = have
            .into_iter()
            .map(|(_, handle)| handle)
            .filter(|handle| !plan.stop.contains(handle))
            .collect();
        let grown = limits.map_or_else(Amount::default, |limits| self.growth(&kept, limits));
        let started = self.starts(&template, limits, &plan.start, grown)?;
        let mut changed: Asked = Vec::new();
        for handle in &plan.stop {
            let number = self.want_stop(handle, StopReason::Stopped);
            changed.push((handle.clone(), number));
        }
        if let Some(limits) = limits {
            for handle in kept {
                let number = self.want(&handle, |wants| wants.limits = Some(limits));
                changed.push((handle, number));
            }
        }
        let new: Vec<Value> = started
            .iter()
            .map(|one| json!({"index": one.index, "instance": one.instance, "handle": one.handle}))
            .collect();
        let reply = Reply::ok(json!({
            "dea": self.world.id, "droplet": droplet, "instances": request.instances,
            "started": new, "stopped": plan.stop,
        }));
        Ok((reply, on_disk(started).await?, changed))
    }

    /// What these instances need more with the new limits.
    fn growth(&self, handles: &[String], limits: Limits) -> Amount {
        let old = handles.iter().filter_map(|handle| self.stalls.get(handle));
        old.map(|stall| stall.view.record.limits)
            .fold(Amount::default(), |sum, old| Amount {
                memory: sum.memory + limits.mem.saturating_sub(old.mem),
                disk: sum.disk + limits.disk.saturating_sub(old.disk),
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
                        State::Born | State::Starting | State::Running
                    )
                    && stall.reins.wants.borrow().stop.is_none()
                    && stall.view.record.stopping.is_none()
            })
            .map(|(handle, stall)| (stall.view.index, handle.clone()))
            .collect()
    }

    /// Admits the starts at these indices, and what others grow by, and begins them: all or none.
    fn starts(
        &mut self,
        template: &Value,
        limits: Option<Limits>,
        indices: &[u64],
        grown: Amount,
    ) -> Result<Vec<Accepted>, Reply> {
        let mut raw = template.clone();
        if let Some(limits) = limits {
            let limits = json!({"mem": limits.mem, "disk": limits.disk, "fds": limits.fds});
            set(&mut raw, "limits", limits);
        }
        for key in ["request_id", "wait"] {
            set(&mut raw, key, Value::Null);
        }
        let mut messages = Vec::new();
        for index in indices {
            set(&mut raw, "index", json!(index));
            let message = StartRequest::from_value(&raw)
                .map_err(|bad| Reply::error(ErrorCode::Internal, bad.to_string()))?;
            messages.push((message, raw.clone()));
        }
        // The last has the longest index, and so the longest entry in heartbeats.
        let Some((last, _)) = messages.last() else {
            self.admit_amount(grown)?;
            return Ok(Vec::new());
        };
        let places = self.admit_start(last, messages.len(), grown)?;
        let places = places.into_iter().map(Some);
        Ok(messages
            .into_iter()
            .zip(places)
            .map(|((message, raw), place)| self.accept(message, raw, place))
            .collect())
    }
}

/// The limits that a scale asks for; what it leaves out stays as in the template.
fn scaled_limits(request: &ScaleRequest, template: &Value) -> Option<Limits> {
    let wanted = request.limits.as_ref()?;
    let old = StartRequest::from_value(template).ok()?.limits;
    Some(Limits {
        mem: wanted.mem.unwrap_or(old.mem),
        disk: wanted.disk.unwrap_or(old.disk),
        fds: wanted.fds.unwrap_or(old.fds),
    })
}
