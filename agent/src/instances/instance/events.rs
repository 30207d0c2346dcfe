//! The messages about one instance: routes, exits, OOM kills.

use super::View;
use crate::engine::{Level, OomReport};
use crate::instances::outlet::{Message, Outlet};
use crate::instances::record::{Event, StopReason};
use crate::instances::world::{World, now};
use messages::outgoing::{DropletOom, Exited, OutputOffsets, Reason, Route, Victim};
use messages::reply::Reply;
use messages::subjects;

/// The route of an instance.
pub(super) fn route(world: &World, view: &View) -> Route {
    let record = &view.record;
    Route {
        dea: world.id.clone(),
        app: view.droplet.clone(),
        uris: record.uris.clone(),
        host: world.engine.local_ip().to_string(),
        port: record.port.unwrap_or_default(),
        tags: [(
            "component".to_owned(),
            format!("dea-{}", world.config.index),
        )]
        .into(),
        private_instance_id: record.private_instance.clone(),
        private_instance_index: view.index.to_string(),
    }
}

/// `droplet.exited` of an instance whose exit is recorded; `end` holds the final offsets.
pub(super) fn exited(view: &View, end: Option<(u64, u64)>) -> Event {
    let record = &view.record;
    let exit = record.exit.clone().unwrap_or_default();
    let reason = match record.stopping.as_ref().map(|stopping| stopping.reason) {
        Some(StopReason::Stopped) => Reason::Stopped,
        Some(StopReason::Shutdown) => Reason::DeaShutdown,
        None => Reason::Crashed,
    };
    let exited = Exited {
        cc_partition: view.cc_partition.clone(),
        droplet: view.droplet.clone(),
        version: record.version.clone(),
        instance: record.instance.clone(),
        index: view.index,
        reason,
        exit_status: exit.status,
        exit_description: exit.description,
        crash_timestamp: (reason == Reason::Crashed).then_some(exit.time),
        signal: exit.signal,
        oom: Some(record.out_of_memory),
        output: end.map(|(stdout, stderr)| OutputOffsets { stdout, stderr }),
        handle: Some(record.handle.clone()),
    };
    event(subjects::EXITED, &exited)
}

/// `droplet.exited` of a start that was refused: nothing of it is on this host. `None` if the message
/// does not even say which app it is about.
pub(crate) fn refused(start: &serde_json::Value, refusal: &Reply) -> Option<Event> {
    let (droplet, version, index, cc_partition) = messages::start::identity(start)?;
    let exited = Exited {
        cc_partition,
        droplet: droplet.to_string(),
        version,
        instance: crate::random::hex(16),
        index,
        reason: Reason::Crashed,
        exit_status: -1,
        exit_description: refusal.exit_description(),
        crash_timestamp: Some(crate::instances::world::whole_seconds(now())),
        signal: None,
        oom: None,
        output: None,
        handle: None,
    };
    Some(event(subjects::EXITED, &exited))
}

/// Says `event` until the bus has it, in a task of its own.
pub(crate) fn deliver(outlet: Outlet, event: Event) {
    tokio::spawn(async move {
        let body = event.body.to_string().into_bytes();
        outlet.deliver(&Message::plain(event.subject, body)).await;
    });
}

/// `droplet.oom`.
pub(super) fn oom(world: &World, view: &View, report: &OomReport, survived: bool) -> Event {
    let record = &view.record;
    let oom = DropletOom {
        dea: world.id.clone(),
        droplet: view.droplet.clone(),
        version: record.version.clone(),
        instance: record.instance.clone(),
        index: view.index,
        handle: record.handle.clone(),
        limit_bytes: report.limit_bytes,
        usage_bytes: report.usage_bytes,
        peak_bytes: report.peak_bytes,
        level: level(report.level).into(),
        victim: Victim {
            pid: report.victim.as_ref().map(|victim| victim.pid),
            comm: report.victim.as_ref().map(|victim| victim.comm.clone()),
        },
        survived,
        time: now(),
    };
    event(subjects::OOM, &oom)
}

fn level(level: Level) -> &'static str {
    match level {
        Level::Container => "instance",
        Level::Above => "ancestor",
        Level::Host => "host",
        Level::Unknown => "unknown",
    }
}

fn event(subject: &str, body: &impl serde::Serialize) -> Event {
    // Plain structures of strings and numbers always become JSON.
    Event {
        subject: subject.into(),
        body: serde_json::to_value(body).unwrap_or_default(),
    }
}
