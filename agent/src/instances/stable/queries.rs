//! Queries: answered as the protocol says, zero, one or many times, never with an error object.

use super::commands::candidate;
use super::{Answers, Duration, Duty, Instant, Query, Stable, Stall, now, timeout_at};
use crate::instances::instance::{MUST, Measured, MeasuredDisk, View};
use crate::instances::ledger::{Amount, Room};
use messages::command::{DiscoverRequest, Query as Asked, discover_delay_ms};
use messages::filter::Filter;
use messages::outgoing::{
    DiskUse, DropletStatus, FindReply, HeartbeatEntry, Hello, Stats, StatusReply, ToBytes, Usage,
    usage_time,
};
use messages::state::State;
use tokio::sync::oneshot;
use tokio::time::timeout;

/// How long a measurement may take; the DEA's callers wait 2 s for all answers.
const MEASURE: Duration = Duration::from_secs(1);

impl Stable {
    pub(super) fn query(&self, query: Asked, answers: Answers) {
        match query {
            Asked::FindDroplet(request) => {
                for stall in self.matching(&request.filter) {
                    self.found(stall, request.include_stats, answers.clone());
                }
            }
            Asked::Status => self.status(answers),
            Asked::DropletStatus => self.droplet_status(&answers),
            Asked::Discover(request) => self.discover(&request, answers),
        }
    }

    pub(super) fn matching<'a>(&'a self, filter: &'a Filter) -> impl Iterator<Item = &'a Stall> {
        self.stalls
            .values()
            .filter(move |stall| filter.matches(&candidate(stall)))
    }

    /// Answers for one instance; with stats, after its task has measured. If it is too busy to measure in
    /// time, its use is left out, and where the bus does not take so much all its stats; never the answer.
    fn found(&self, stall: &Stall, include_stats: bool, answers: Answers) {
        let reply = self.find_reply(stall);
        if !include_stats || stall.view.record.state != State::Running {
            answers.send(reply.to_bytes());
            return;
        }
        let measured = measure(stall);
        let (mut view, host) = (stall.view.clone(), self.world.engine.local_ip().to_string());
        view.record.uris = stall.uris().to_vec();
        let most = self.link.max_payload;
        tokio::spawn(async move {
            let measured = match measured {
                Some(told) => timeout(MEASURE, told).await.ok().and_then(Result::ok),
                None => None,
            };
            let whole = FindReply {
                stats: Some(stats(&view, host, measured.unwrap_or_default())),
                ..reply.clone()
            };
            let whole = Some(whole.to_bytes()).filter(|body| body.len() <= most);
            answers.send(whole.unwrap_or_else(|| reply.to_bytes()));
        });
    }

    pub(super) fn find_reply(&self, stall: &Stall) -> FindReply {
        let (view, (version, instance)) = (&stall.view, stall.identity());
        FindReply {
            dea: self.world.id.clone(),
            droplet: view.droplet.clone(),
            version: version.to_owned(),
            instance: instance.to_owned(),
            index: view.index,
            state: view.record.state,
            state_timestamp: view.record.state_timestamp,
            staged: format!("/{instance}"),
            stats: None,
        }
    }

    fn hello(&self) -> Hello {
        Hello {
            id: self.world.id.clone(),
            ip: self.world.engine.local_ip().to_string(),
            version: crate::VERSION.into(),
            port: None,
        }
    }

    /// Says that this host is ready.
    pub(super) fn say_hello(&self) {
        let body = self.hello().to_bytes();
        self.say(super::Message::plain(messages::subjects::HELLO, body));
    }

    /// Answers once every instance has measured, or not in time: the sum is of those that could.
    fn status(&self, answers: Answers) {
        let mut reply = StatusReply {
            hello: self.hello(),
            max_memory: self.capacity().memory,
            reserved_memory: self.reserved().memory,
            used_memory: 0,
            num_clients: None,
        };
        let measured: Vec<_> = self.stalls.values().filter_map(measure).collect();
        tokio::spawn(async move {
            let deadline = Instant::now() + MEASURE;
            let mut bytes = 0;
            for measured in measured {
                if let Ok(Ok(measured)) = timeout_at(deadline, measured).await {
                    bytes += measured.memory_bytes.unwrap_or_default();
                }
            }
            reply.used_memory = bytes >> 20;
            answers.send(reply.to_bytes());
        });
    }

    /// Whether there is what an instance needs beside memory and disk space: a place in the heartbeat, an address, ports, and
    /// a disk that takes its record: one that refuses it, or does not answer within what a start waits for it, refuses the start;
    /// of one that nobody could look at for long nobody knows.
    pub(super) fn takes_one_more(&self, droplet: &str) -> bool {
        let room = Room {
            instances: 1,
            bytes: HeartbeatEntry::bytes_at_most(droplet, "default", 0, ""),
        };
        self.room_for(room).is_ok()
            && self.world.engine.has_place()
            && self.world.scribes.lateness().time() < MUST
            && !self.world.scribes.refuses()
            && !self.world.engine.is_disk_unknown()
    }

    fn droplet_status(&self, answers: &Answers) {
        for stall in self.stalls.values() {
            let record = &stall.view.record;
            if matches!(record.state, State::Starting | State::Running) {
                let status = DropletStatus {
                    name: stall.view.name.clone(),
                    uris: stall.uris().to_vec(),
                };
                answers.send(status.to_bytes());
            }
        }
    }

    fn discover(&self, request: &DiscoverRequest, answers: Answers) {
        let wanted = Amount {
            memory: request.memory,
            disk: request.disk,
        };
        if self.duty != Duty::Serving {
            return;
        }
        let (capacity, reserved) = (self.capacity(), self.reserved());
        let fits = self.admit_amount((wanted, 1), Amount::default()).is_ok();
        if !fits || !self.takes_one_more(&request.droplet) {
            return;
        }
        let of_app = self
            .stalls
            .values()
            .filter(|stall| stall.view.droplet == request.droplet);
        let delay = discover_delay_ms(of_app.count() as u64, reserved.memory, capacity.memory);
        let body = self.hello().to_bytes();
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(delay)).await;
            answers.send(body);
        });
    }
}

/// Asks a running instance to measure.
fn measure(stall: &Stall) -> Option<oneshot::Receiver<Measured>> {
    let (tell, told) = oneshot::channel();
    let runs = stall.view.record.serves();
    (runs && stall.reins.queries.try_send(Query::Usage(tell)).is_ok()).then_some(told)
}

fn stats(view: &View, host: String, measured: Measured) -> Stats {
    let now = now();
    let record = &view.record;
    Stats {
        name: view.name.clone(),
        uris: record.uris.clone(),
        host,
        port: record.port.unwrap_or_default(),
        uptime: crate::instances::world::whole_seconds(now - record.started_at),
        mem_quota: record.limits.mem << 20,
        disk_quota: match measured.disk {
            Some(MeasuredDisk::Unbounded) => None,
            Some(MeasuredDisk::Bounded(_)) | None => Some(record.limits.disk << 20),
        },
        fds_quota: record.limits.fds,
        usage: Usage {
            time: usage_time(crate::instances::world::whole_seconds(now)),
            cpu: measured.cpu,
            cores: std::thread::available_parallelism().ok().map(usize::from),
            mem: measured.memory_bytes,
            mem_charged: measured.charged_bytes,
            disk: measured.disk.map(|disk| match disk {
                MeasuredDisk::Bounded(disk) => DiskUse::Bytes(disk.bytes),
                MeasuredDisk::Unbounded => DiskUse::Uncounted,
            }),
        },
    }
}
