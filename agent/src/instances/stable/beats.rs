//! What the host says on its own: hello, heartbeats, advertisements, routes, goodbye.

use super::{Duty, Greeting, Message, Pace, Stable, State, View};
use crate::instances::ledger::Amount;
use crate::instances::record::Limits;
use crate::instances::state::in_heartbeat;
use messages::outgoing::{
    Advertise, Goodbye, Heartbeat, HeartbeatEntry, PlacementProperties, ToBytes,
};
use messages::service::Host;
use messages::subjects;
use serde::Serialize;
use std::collections::BTreeMap;
use tokio::time::Instant;
use tracing::{error, warn};

/// How this host stands.
#[derive(Debug, Clone)]
pub struct Standing {
    /// What the services API tells of it.
    pub host: Host,
    /// How many instances are in each state.
    pub states: [(State, u64); State::ALL.len()],
    /// What all instances together may reserve, in MB.
    pub capacity: Amount,
    /// Instances whose record on disk is not what it should be.
    pub unrecorded: u64,
    /// Instances with processes that do not die.
    pub stuck: u64,
}

/// The instances by their app and id.
pub type Registry = BTreeMap<String, BTreeMap<String, Registered>>;

/// One instance.
#[derive(Debug, Clone, Serialize)]
pub struct Registered {
    /// The name of its state.
    pub state: &'static str,
    /// What it may have.
    pub limits: Limits,
}

impl Stable {
    /// Says what is due. What the bus is behind with is said again.
    pub(super) fn speak(&mut self) {
        let now = Instant::now();
        if self.adverts.take(now) && !self.advertise() {
            self.adverts.soon();
        }
        if self.heartbeats.take(now) && !self.heartbeat() {
            self.heartbeats.soon();
        }
        if self.routes.take(now) && self.greeting != Greeting::TooEarly && self.link.up {
            let host = self.world.engine.local_ip().to_string();
            self.world.routes.repeat(&host);
        }
    }

    /// When something is to be said next.
    pub(super) fn next_word(&self) -> Option<Instant> {
        let paces = [&self.adverts, &self.heartbeats, &self.routes];
        paces.into_iter().filter_map(Pace::next).min()
    }

    /// The complete state of this host, never split. Admission sees to it that it fits; where a server
    /// takes less than the one before it did, those that live are told rather than nobody. If they alone are too many,
    /// nothing true can be said in one message.
    fn heartbeat(&self) -> bool {
        let whole = self.beat(in_heartbeat);
        let most = self.link.max_payload;
        if whole.len() <= most {
            return self.say(Message::plain(subjects::HEARTBEAT, whole));
        }
        let living = self.beat(|state| in_heartbeat(state) && state != State::Crashed);
        if living.len() <= most {
            warn!(
                bytes = whole.len(),
                most, "too many instances for one heartbeat of this bus: crashed ones are left out"
            );
        } else {
            error!(
                bytes = living.len(),
                most,
                "too many instances for one heartbeat of this bus: it hears of none and takes this host for dead; raise its max_payload"
            );
        }
        self.say(Message::plain(subjects::HEARTBEAT, living))
    }

    fn beat(&self, told: impl Fn(State) -> bool) -> Vec<u8> {
        let droplets = self
            .told()
            .filter(|view| told(view.record.state))
            .map(|view| HeartbeatEntry {
                cc_partition: view.cc_partition.clone(),
                droplet: view.droplet.clone(),
                version: view.record.version.clone(),
                instance: view.record.instance.clone(),
                index: view.index,
                state: view.record.state,
                state_timestamp: view.record.state_timestamp,
            })
            .collect();
        let heartbeat = Heartbeat {
            dea: self.world.id.clone(),
            droplets,
        };
        heartbeat.to_bytes()
    }

    /// MB that may still be reserved and that the depot really has for one more, as far as it was seen; negative if too much is.
    fn available_disk(&self) -> i64 {
        let unreserved = difference(self.capacity().disk, self.reserved().disk);
        let left = self.disk_left(1).unwrap_or(u64::MAX);
        // What bounding takes, too: for the largest limit, so that no smaller one takes more.
        let bounded = self.disk_limit(left >> 20);
        let beside = self.world.engine.disk_needs(bounded) - bounded.bytes;
        let free = left.saturating_sub(beside) >> 20;
        unreserved.min(i64::try_from(free).unwrap_or(i64::MAX))
    }

    /// What is free here, as long as somebody may ask for it.
    fn advertise(&self) -> bool {
        if self.duty != Duty::Serving {
            return true;
        }
        let (capacity, reserved) = (self.capacity(), self.reserved());
        let mut available_memory = difference(capacity.memory, reserved.memory);
        // Whoever places by this alone would ask a host that must refuse, again and again. Controllers name an app by a UUID, too.
        if !self.takes_one_more(&self.world.id) {
            available_memory = available_memory.min(0);
        }
        let mut available_disk = self.available_disk();
        if self.world.engine.is_disk_unknown() {
            available_disk = available_disk.min(0);
        }
        let config = &self.world.config;
        let advertise = Advertise {
            id: self.world.id.clone(),
            stacks: config.stacks.keys().cloned().collect(),
            available_memory,
            available_disk,
            app_id_to_count: self.app_id_to_count(),
            placement_properties: PlacementProperties {
                zone: config.zone.clone(),
            },
            url: None,
        };
        self.say(Message::plain(subjects::ADVERTISE, advertise.to_bytes()))
    }

    /// Which instances are on this host.
    pub(super) fn registry(&self) -> Registry {
        let mut registry = Registry::new();
        for view in self.told() {
            let registered = Registered {
                state: view.record.state.name(),
                limits: view.record.limits,
            };
            let app = registry.entry(view.droplet.clone()).or_default();
            app.insert(view.record.instance.clone(), registered);
        }
        registry
    }

    fn told(&self) -> impl Iterator<Item = &View> {
        let told = self.stalls.values().filter(|stall| !stall.leaves);
        told.map(|stall| &stall.view)
    }

    /// How this host stands, for whoever asks for it by itself.
    pub(super) fn standing(&self) -> Standing {
        let count = |state: State| {
            let told = self.told().filter(|view| view.record.state == state);
            told.count() as u64
        };
        let states = State::ALL.map(|state| (state, count(state)));
        let crashed = count(State::Crashed);
        let (capacity, reserved) = (self.capacity(), self.reserved());
        let host = Host {
            instances: states.iter().map(|(_, count)| count).sum::<u64>() - crashed,
            running: count(State::Running),
            crashed,
            available_memory: difference(capacity.memory, reserved.memory),
            available_disk: (!self.world.engine.is_disk_unknown()).then(|| self.available_disk()),
        };
        Standing {
            host,
            states,
            capacity,
            unrecorded: self.count(|view| view.unrecorded.is_some()),
            stuck: self.count(|view| view.stuck.is_some()),
        }
    }

    fn count(&self, so: impl Fn(&View) -> bool) -> u64 {
        let views = self.stalls.values().map(|stall| &stall.view);
        views.filter(|view| so(view)).count() as u64
    }

    pub(super) fn app_id_to_count(&self) -> BTreeMap<String, u64> {
        let mut counts = BTreeMap::new();
        for stall in self.stalls.values() {
            *counts.entry(stall.view.droplet.clone()).or_default() += 1;
        }
        counts
    }

    /// This host takes no more starts.
    pub(super) fn goodbye(&self) {
        let goodbye = Goodbye {
            id: self.world.id.clone(),
            ip: self.world.engine.local_ip().to_string(),
            version: crate::VERSION.into(),
            app_id_to_count: self.app_id_to_count(),
        };
        self.say(Message::plain(subjects::SHUTDOWN, goodbye.to_bytes()));
    }
}

fn difference(capacity: u64, reserved: u64) -> i64 {
    i64::try_from(i128::from(capacity) - i128::from(reserved)).unwrap_or(i64::MAX)
}
