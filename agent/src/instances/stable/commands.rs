//! Commands: start, stop, update, scale. Each is answered once.

use super::waiting::{Owed, Until};
use super::{Duty, Stable, Stall, now};
use crate::engine::{DiskLimit, Place};
use crate::instances::instance::{Update, events};
use crate::instances::ledger::{self, Amount, Entry, Room, Short};
use crate::instances::record::{self, Limits, Record, StopReason};
use crate::instances::startup::environment::{self, Changed};
use messages::command::{Command, UpdateRequest};
use messages::filter::{Candidate, Filter};
use messages::outgoing::{FindReply, Heartbeat, HeartbeatEntry, ToBytes};
use messages::reply::{ErrorCode, Reply};
use messages::start::{StartRequest, Wait};
use messages::state::State;
use messages::trace::Trace;
use serde_json::{Map, Value, json};
use tokio::sync::oneshot;
use tracing::{info, warn};

/// An accepted start; its record is on its way to the disk.
pub(super) struct Accepted {
    pub(super) handle: String,
    pub(super) instance: String,
    pub(super) index: u64,
}

impl Stable {
    pub(super) fn command(
        &mut self,
        command: Command,
        (raw, trace): (Value, Option<Trace>),
        answer: oneshot::Sender<Reply>,
    ) {
        match command {
            Command::Start(request) => self.start(*request, (raw, trace), answer),
            Command::Stop(request) => {
                self.stop(&request.filter, request.wait, answer);
            }
            Command::Update(request) => {
                self.update(&request, answer);
            }
            Command::Scale(request) => self.scale(&request, trace.as_ref(), answer),
            Command::Logs(request) => self.logs(request, answer),
            Command::FindHere(request) => {
                let found: Vec<FindReply> = self
                    .matching(&request.filter)
                    .map(|stall| self.find_reply(stall))
                    .collect();
                let reply = Reply::ok(json!({
                    "dea": self.world.id, "matched": found.len(), "instances": found,
                }));
                drop(answer.send(reply));
            }
        }
    }

    fn start(
        &mut self,
        request: StartRequest,
        (raw, trace): (Value, Option<Trace>),
        answer: oneshot::Sender<Reply>,
    ) {
        let until = Until::of(request.wait);
        if let Some((handle, known)) = self.with_request_id(request.request_id.as_deref()) {
            // The agent that accepted it answered nobody, and may not have come to this.
            let template = self.as_it_is(&handle, raw);
            let mut owed = Owed::all(vec![(handle, 0)], until);
            owed.push(self.keep_template(request.droplet.to_string(), template));
            self.answer_when(owed, known, answer);
            return;
        }
        match self.accept_one(request, &raw, trace.as_ref()) {
            Ok((owed, reply)) => self.answer_when(owed, reply, answer),
            Err(refusal) => {
                self.tell_refusal(&raw, trace.as_ref(), &refusal);
                drop(answer.send(refusal));
            }
        }
    }

    /// The answer, and what must come before it: what was accepted can be scaled, whatever happens to the
    /// agent.
    fn accept_one(
        &mut self,
        request: StartRequest,
        raw: &Value,
        trace: Option<&Trace>,
    ) -> Result<(Vec<Owed>, Reply), Reply> {
        let place = self.admit_start(&request, 1, Amount::default())?.pop();
        let (droplet, until) = (request.droplet.to_string(), Until::of(request.wait));
        let template = self.keep_template(droplet.clone(), raw.clone());
        let accepted = self.accept(request, (raw.clone(), trace.cloned()), place);
        let reply = Reply::ok(json!({
            "dea": self.world.id, "droplet": droplet, "index": accepted.index,
            "instance": accepted.instance, "handle": accepted.handle,
        }));
        let mut owed = Owed::all(vec![(accepted.handle, 0)], until);
        owed.push(template);
        Ok((owed, reply))
    }

    /// Whoever only published a start learns of its refusal by an exit, as from the DEA.
    pub(super) fn tell_refusal(&self, raw: &Value, trace: Option<&Trace>, refusal: &Reply) {
        if let Some(event) = events::refused(raw, refusal) {
            events::deliver(self.world.outlet.clone(), event, trace);
        }
    }

    /// A start that was accepted under the same `request_id`, also by an earlier life of the agent.
    fn with_request_id(&self, id: Option<&str>) -> Option<(String, Reply)> {
        let id = id?;
        let view = self.stalls.values().map(|stall| &stall.view);
        let view = { view }.find(|view| view.record.request_id.as_deref() == Some(id))?;
        let reply = Reply::ok(json!({
            "dea": self.world.id, "droplet": view.droplet, "index": view.index,
            "instance": view.record.instance, "handle": view.record.handle,
        }));
        Some((view.record.handle.clone(), reply))
    }

    /// Whether `count` more instances like this one can be had beside what others grow by: then their
    /// places are taken, and crashed instances leave where there was no room for one more. All or
    /// nothing.
    pub(super) fn admit_start(
        &mut self,
        request: &StartRequest,
        count: usize,
        grown: Amount,
    ) -> Result<Vec<Place>, Reply> {
        if self.duty != Duty::Serving {
            return Err(super::shutting_down());
        }
        let stack = request.stack.as_deref().unwrap_or_default();
        let config = &self.world.config;
        if !config.stacks.contains_key(stack) {
            let known: Vec<&str> = config.stacks.keys().map(String::as_str).collect();
            return Err(Reply::error(
                ErrorCode::UnknownStack,
                format!("stack {stack:?} is not configured here; this host has {known:?}"),
            ));
        }
        if request.executable_uri.is_none() {
            return Err(Reply::error(
                ErrorCode::BadField,
                "`executableUri` is null: the droplet's URL is needed",
            ));
        }
        if request.sha1.is_none() && request.sha256.is_none() {
            return Err(Reply::error(
                ErrorCode::BadField,
                "`sha1` is null: a digest of the droplet is needed",
            ));
        }
        let each = Amount {
            memory: request.limits.mem,
            disk: request.limits.disk,
        };
        self.admit_amount((each, count as u64), grown)?;
        let bytes = heartbeat_bytes(request, &request.version);
        let leaving = self.room_for(Room {
            instances: count,
            bytes: bytes.saturating_mul(count),
        })?;
        let places = std::iter::repeat_with(|| self.world.engine.reserve())
            .take(count)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|full| Reply::error(ErrorCode::HostFull, full.to_string()))?;
        for handle in leaving {
            self.want(&handle, |wants| wants.reap = true);
            if let Some(stall) = self.stalls.get_mut(&handle) {
                stall.leaves = true;
            }
        }
        Ok(places)
    }

    /// Which crashed instances must leave so that so many more fit.
    pub(super) fn room_for(&self, wanted: Room) -> Result<Vec<String>, Reply> {
        let empty = Heartbeat {
            dea: self.world.id.clone(),
            droplets: Vec::new(),
        };
        let most = Room {
            instances: self.world.config.resources.instances,
            bytes: self.link.max_payload.saturating_sub(empty.to_bytes().len()),
        };
        // One that is STOPPED stands in no heartbeat: it only waits for the bus to hear of its end.
        let counts = |stall: &Stall| !stall.leaves && stall.view.record.state != State::Stopped;
        let here = self.stalls.iter().filter(|(_, stall)| counts(stall));
        let entries: Vec<Entry> = here
            .map(|(handle, stall)| {
                let record = &stall.view.record;
                let over = record.state == State::Crashed && record.exit.is_some();
                Entry {
                    handle: handle.clone(),
                    bytes: stall.heartbeat_bytes,
                    crashed: over.then_some(record.state_timestamp),
                }
            })
            .collect();
        let have = entries.len();
        ledger::make_room(entries, wanted, most).ok_or_else(|| {
            Reply::error(
                ErrorCode::HostFull,
                format!(
                    "this host has {have} instances; it may have {} (`resources.instances`), and a heartbeat of theirs must stay below the {} bytes that the bus takes",
                    most.instances, self.link.max_payload
                ),
            )
        })
    }

    /// Whether so many new instances that take `each` have room beside what others grow by.
    pub(super) fn admit_amount(
        &self,
        (each, count): (Amount, u64),
        grown: Amount,
    ) -> Result<(), Reply> {
        let all = |each: u64, grown: u64| each.saturating_mul(count).saturating_add(grown);
        let wanted = Amount {
            memory: all(each.memory, grown.memory),
            disk: all(each.disk, grown.disk),
        };
        let reserved = self.reserved();
        ledger::admit(self.capacity(), reserved, wanted).map_err(|short| match short {
            Short::Memory => Reply::error(
                ErrorCode::NotEnoughMemory,
                format!(
                    "{} MB of memory are asked for; {} of {} MB are reserved",
                    wanted.memory,
                    reserved.memory,
                    self.capacity().memory
                ),
            ),
            Short::Disk => Reply::error(
                ErrorCode::NotEnoughDisk,
                format!(
                    "{} MB of disk are asked for; {} of {} MB are reserved",
                    wanted.disk,
                    reserved.disk,
                    self.capacity().disk
                ),
            ),
        })?;
        let one = self.world.engine.disk_needs(self.disk_limit(each.disk));
        let needed = all(one, grown.disk.saturating_mul(1 << 20));
        match self.disk_left(count) {
            // Whoever wants nothing is not refused for what others have.
            Some(free) if needed > free && wanted.disk > 0 => Err(Reply::error(
                ErrorCode::NotEnoughDisk,
                format!(
                    "{needed} bytes of disk are needed and {free} are free in {}",
                    self.world.config.base.display()
                ),
            )),
            Some(_) | None => Ok(()),
        }
    }

    /// Bytes that the depot has for so many new instances, beside what those that are here have and will take; `None`
    /// where nothing is bounded.
    pub(super) fn disk_left(&self, count: u64) -> Option<u64> {
        let here = self.stalls.iter();
        let here = here.filter(|(_, stall)| ledger::holds_disk(&stall.view.record));
        let limits = here.map(|(handle, stall)| {
            let limit = self.disk_limit(stall.promised().disk);
            (handle.as_str(), limit)
        });
        self.world.engine.disk_left(limits, count)
    }

    /// What the engine is asked for with so many MB.
    pub(super) fn disk_limit(&self, megabytes: u64) -> DiskLimit {
        DiskLimit {
            bytes: megabytes.saturating_mul(1 << 20),
            inodes: self.world.config.instance.disk_inodes,
        }
    }

    pub(super) fn capacity(&self) -> Amount {
        let resources = &self.world.config.resources;
        Amount {
            memory: resources.memory_mb,
            disk: resources.disk_mb,
        }
    }

    /// What is reserved, with what was promised to instances that grow, and what runs by records that this agent cannot use.
    pub(super) fn reserved(&self) -> Amount {
        let here = ledger::reserved(self.stalls.values().map(|stall| {
            let record = &stall.view.record;
            let promised = stall.promised();
            (record, promised.mem, promised.disk)
        }));
        self.lodgers.reserved(here, self.capacity())
    }

    pub(super) fn accept(
        &mut self,
        request: StartRequest,
        came: (Value, Option<Trace>),
        place: Option<Place>,
    ) -> Accepted {
        let record = self.record(&request, came);
        let (handle, instance) = (record.handle.clone(), record.instance.clone());
        let (index, trace) = (request.index, record.trace.as_ref().map(Trace::id));
        info!(handle, droplet = %request.droplet, index, trace, "accepted a start");
        self.board(record, request, (None, place));
        Accepted {
            handle,
            instance,
            index,
        }
    }

    fn record(&self, request: &StartRequest, (raw, trace): (Value, Option<Trace>)) -> Record {
        let mut handle = crate::random::handle();
        while self.stalls.contains_key(&handle) {
            handle = crate::random::handle();
        }
        Record {
            format: record::FORMAT,
            boot_id: self.world.boot_id.clone(),
            handle,
            start: raw,
            trace,
            request_id: request.request_id.clone(),
            instance: crate::random::hex(16),
            private_instance: crate::random::hex(32),
            version: request.version.clone(),
            uris: request.uris.clone(),
            limits: Limits {
                mem: request.limits.mem,
                disk: request.limits.disk,
                fds: request.limits.fds,
            },
            state: State::Born,
            state_timestamp: now(),
            started_at: 0.0,
            port: None,
            container: None,
            spawned: false,
            oom_kills: 0,
            out_of_memory: false,
            healthy: false,
            listens: false,
            after_start: false,
            stopping: None,
            failure: None,
            exit: None,
            unsent: Vec::new(),
            taken_back: Vec::new(),
        }
    }

    /// The start message of an instance with what has been changed since.
    fn as_it_is(&self, handle: &str, mut start: Value) -> Value {
        let Some(stall) = self.stalls.get(handle) else {
            return start;
        };
        let (uris, version) = (stall.uris(), stall.identity().0);
        let Limits { mem, disk, fds } = stall.promised();
        let other = |place: &str, now: Value| start.pointer(place) != Some(&now);
        let changed = Changed {
            uris: other("/uris", json!(uris)).then_some(uris),
            version: other("/version", json!(version)).then_some(version),
            mem: other("/limits/mem", json!(mem)).then_some(mem),
            disk: other("/limits/disk", json!(disk)).then_some(disk),
            fds: other("/limits/fds", json!(fds)).then_some(fds),
        };
        set(&mut start, "uris", json!(uris));
        set(&mut start, "version", json!(version));
        set(
            &mut start,
            "limits",
            json!({"mem": mem, "disk": disk, "fds": fds}),
        );
        if let Some(told) = told_by(&mut start) {
            environment::retell(told, changed);
        }
        start
    }

    /// Keeps a start message for `scale`; what an answer must wait for.
    pub(super) fn keep_template(&mut self, droplet: String, raw: Value) -> Owed {
        let stalls = self.stalls.values();
        let here = stalls.map(|stall| stall.view.droplet.as_str()).collect();
        let number = self.templates.keep(&droplet, raw, &here);
        Owed::kept(number)
    }

    fn stop(&mut self, filter: &Filter, wait: Option<Wait>, answer: oneshot::Sender<Reply>) {
        let matched: Vec<String> = self
            .stalls
            .iter()
            .filter(|(_, stall)| {
                !matches!(stall.view.record.state, State::Stopped | State::Crashed)
                    && filter.matches(&candidate(stall))
            })
            .map(|(handle, _)| handle.clone())
            .collect();
        let empty: Vec<&str> = filter.empty().collect();
        if matched.is_empty() && !empty.is_empty() {
            let (droplet, empty) = (filter.droplet(), empty.join(", "));
            warn!(
                droplet,
                empty, "a stop matches nothing, as fields of its filter are empty"
            );
        }
        let asked: Vec<(String, u64)> = matched
            .into_iter()
            .map(|handle| {
                let number = self.want_stop(&handle, StopReason::Stopped);
                (handle, number)
            })
            .collect();
        let instances: Vec<&str> = asked
            .iter()
            .filter_map(|(handle, _)| self.stalls.get(handle))
            .map(|stall| stall.identity().1)
            .collect();
        let reply = Reply::ok(json!({
            "dea": self.world.id, "matched": instances.len(), "instances": instances,
        }));
        self.answer_when(Owed::all(asked, Until::of(wait)), reply, answer);
    }

    fn update(&mut self, request: &UpdateRequest, answer: oneshot::Sender<Reply>) {
        let matched: Vec<String> = self
            .stalls
            .iter()
            .filter(|(_, stall)| {
                stall.view.droplet == request.droplet && stall.view.record.state != State::Stopped
            })
            .map(|(handle, _)| handle.clone())
            .collect();
        let asked: Vec<(String, u64)> = matched
            .into_iter()
            .map(|handle| {
                let number = self.want_update(&handle, request);
                (handle, number)
            })
            .collect();
        let reply = Reply::ok(json!({"dea": self.world.id, "matched": asked.len()}));
        let mut owed = Owed::all(asked, Until::Applied);
        if let Some(mut template) = self.templates.get(&request.droplet).cloned() {
            set(&mut template, "uris", json!(request.uris));
            if let Some(version) = &request.version {
                set(&mut template, "version", json!(version));
            }
            let changed = Changed {
                uris: Some(&request.uris),
                version: request.version.as_deref(),
                ..Changed::default()
            };
            if let Some(told) = told_by(&mut template) {
                environment::retell(told, changed);
            }
            owed.push(self.keep_template(request.droplet.clone(), template));
        }
        self.answer_when(owed, reply, answer);
    }

    /// Tells an instance what it shall be; a new version makes a new id. Whatever is asked next is asked of
    /// what it shall be, so that commands take effect in their sender's order.
    fn want_update(&mut self, handle: &str, request: &UpdateRequest) -> u64 {
        let Some(stall) = self.stalls.get_mut(handle) else {
            return 0;
        };
        let (version, instance) = stall.identity();
        let (version, instance) = match &request.version {
            Some(new) if new != version => (new.clone(), crate::random::hex(16)),
            Some(_) | None => (version.to_owned(), instance.to_owned()),
        };
        let update = Update {
            uris: request.uris.clone(),
            version,
            instance,
        };
        stall.updated = Some(update.clone());
        self.want(handle, |wants| wants.update = Some(update))
    }
}

/// Most bytes that an instance of this start takes in a heartbeat, if it has this version now.
pub(super) fn heartbeat_bytes(request: &StartRequest, version: &str) -> usize {
    HeartbeatEntry::bytes_at_most(
        request.droplet.as_str(),
        &request.cc_partition,
        request.index,
        version,
    )
}

/// Instances, each with the number of what it was asked.
pub(super) type Asked = Vec<(String, u64)>;

pub(super) fn set(message: &mut Value, key: &str, value: Value) {
    if let Some(object) = message.as_object_mut() {
        object.insert(key.to_owned(), value);
    }
}

/// The key of a start message for what apps read of themselves.
const TOLD: &str = "vcap_application";

/// What apps read of a start message, if there is any.
pub(super) fn told_by(message: &mut Value) -> Option<&mut Map<String, Value>> {
    message.get_mut(TOLD)?.as_object_mut()
}

/// What a filter looks at.
pub(super) fn candidate(stall: &super::Stall) -> Candidate<'_> {
    let (view, (version, instance)) = (&stall.view, stall.identity());
    Candidate {
        droplet: &view.droplet,
        version,
        instance,
        index: view.index,
        state: view.record.state,
    }
}
