//! What the host says on its own: hello, heartbeats, advertisements, routes, goodbye.

use super::{Greeting, Message, Stable, State};
use crate::instances::state::in_heartbeat;
use messages::outgoing::{
    Advertise, Goodbye, Heartbeat, HeartbeatEntry, PlacementProperties, ToBytes,
};
use messages::subjects;
use std::collections::BTreeMap;
use tracing::warn;

impl Stable {
    /// The complete state of this host, never split. Admission sees to it that it fits; where a server
    /// takes less than the one before it did, those that live are told rather than nobody.
    pub(super) fn heartbeat(&self) {
        let whole = self.beat(in_heartbeat);
        let most = self.link.max_payload;
        if whole.len() <= most {
            return self.say(Message::plain(subjects::HEARTBEAT, whole));
        }
        warn!(
            bytes = whole.len(),
            most, "too many instances for one heartbeat of this bus: crashed ones are left out"
        );
        let living = self.beat(|state| in_heartbeat(state) && state != State::Crashed);
        self.say(Message::plain(subjects::HEARTBEAT, living));
    }

    fn beat(&self, told: impl Fn(State) -> bool) -> Vec<u8> {
        let droplets = self
            .stalls
            .values()
            .filter(|stall| !stall.leaves)
            .map(|stall| &stall.view)
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

    /// What is free here, as long as somebody may ask for it.
    pub(super) fn advertise(&self) {
        if self.parting {
            return;
        }
        let (capacity, reserved) = (self.capacity(), self.reserved());
        let config = &self.world.config;
        let advertise = Advertise {
            id: self.world.id.clone(),
            stacks: config.stacks.keys().cloned().collect(),
            available_memory: difference(capacity.memory, reserved.memory),
            available_disk: difference(capacity.disk, reserved.disk),
            app_id_to_count: self.app_id_to_count(),
            placement_properties: PlacementProperties {
                zone: config.zone.clone(),
            },
            url: None,
        };
        self.say(Message::plain(subjects::ADVERTISE, advertise.to_bytes()));
    }

    pub(super) fn app_id_to_count(&self) -> BTreeMap<String, u64> {
        let mut counts = BTreeMap::new();
        for stall in self.stalls.values() {
            *counts.entry(stall.view.droplet.clone()).or_default() += 1;
        }
        counts
    }

    /// The routes of everything that serves.
    pub(super) fn register_routes(&self) {
        if self.greeting == Greeting::TooEarly {
            return;
        }
        for stall in self.stalls.values() {
            stall.reins.route.repeat();
        }
    }

    /// This host takes no more commands.
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
