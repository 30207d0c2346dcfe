//! The messages about one instance: routes, exits, OOM kills.

use super::View;
use crate::engine::{Level, OomReport};
use crate::instances::outlet::{Message, Outlet};
use crate::instances::record::{Event, Record, StopReason};
use crate::instances::world::{World, now};
use messages::crash::Crash;
use messages::outgoing::{
    DropletOom, Exited, OutputOffsets, Reason, Route, Victim, exit_description,
};
use messages::reply::Reply;
use messages::start::StartRequest;
use messages::subjects;
use messages::trace::Trace;
use tracing::warn;

/// The route of an instance to a port.
pub(super) fn route(world: &World, view: &View, port: u16) -> Route {
    let record = &view.record;
    Route {
        dea: world.id.clone(),
        app: view.droplet.clone(),
        uris: record.uris.clone(),
        host: world.engine.local_ip().to_string(),
        port,
        tags: [(
            "component".to_owned(),
            format!("dea-{}", world.config.index),
        )]
        .into(),
        private_instance_id: record.private_instance.clone(),
        private_instance_index: view.index.to_string(),
    }
}

/// Why the instance of this record ends, or has ended.
pub(super) fn reason(record: &Record) -> Reason {
    match record.stopping.as_ref().map(|stopping| stopping.reason) {
        Some(StopReason::Stopped) => Reason::Stopped,
        Some(StopReason::Shutdown) => Reason::DeaShutdown,
        Some(StopReason::Evacuation) => Reason::DeaEvacuation,
        None => Reason::Crashed,
    }
}

/// `droplet.exited` of an instance whose exit is recorded; `end` holds the final offsets.
pub(super) fn exited(view: &View, end: Option<(u64, u64)>) -> Event {
    let record = &view.record;
    let exit = record.exit.clone().unwrap_or_default();
    let reason = reason(record);
    let exited = Exited {
        cc_partition: view.cc_partition.clone(),
        droplet: view.droplet.clone(),
        version: record.version.clone(),
        instance: record.instance.clone(),
        index: view.index,
        reason,
        exit_status: exit.status,
        exit_description: exit_description(&exit.description),
        crash_timestamp: (reason == Reason::Crashed).then_some(exit.time),
        signal: exit.signal,
        oom: Some(record.out_of_memory),
        output: end.map(|(stdout, stderr)| OutputOffsets { stdout, stderr }),
        handle: Some(record.handle.clone()),
    };
    event(subjects::EXITED, &exited)
}

/// A crash whose exit is recorded; what is kept of it is not known yet.
pub(super) fn crash(view: &View) -> Crash {
    let record = &view.record;
    let exit = record.exit.clone().unwrap_or_default();
    Crash {
        handle: record.handle.clone(),
        droplet: view.droplet.clone(),
        index: view.index,
        instance: record.instance.clone(),
        version: record.version.clone(),
        time: record.state_timestamp,
        exit_status: exit.status,
        signal: exit.signal,
        exit_description: exit.description,
        oom: record.out_of_memory,
        files: Vec::new(),
        left_out: 0,
    }
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
        exit_description: exit_description(&refusal.exit_description()),
        crash_timestamp: Some(crate::instances::world::whole_seconds(now())),
        signal: None,
        oom: None,
        output: None,
        handle: None,
    };
    Some(event(subjects::EXITED, &exited))
}

/// Says that a start was refused until the bus has it, in a task of its own. Where it takes none, not without end.
pub(crate) fn deliver(outlet: Outlet, event: Event, trace: Option<&Trace>) {
    let message = message(event, trace);
    let Some(room) = outlet.room_for_refusal(message.size()) else {
        let left_out = outlet.left_out().count();
        warn!(
            left_out,
            "the bus does not take that starts are refused: exits of such are left out"
        );
        return;
    };
    tokio::spawn(async move {
        outlet.deliver(&message).await;
        drop(room);
    });
}

/// An event as it is said, with the trace of what began the instance.
pub(super) fn message(event: Event, trace: Option<&Trace>) -> Message {
    Message::plain(event.subject, event.body.to_string().into_bytes()).within(trace)
}

/// `droplet.oom` of a kill that was not survived, none missed.
pub(super) fn oom(
    world: &World,
    record: &Record,
    message: &StartRequest,
    report: &OomReport,
) -> DropletOom {
    DropletOom {
        dea: world.id.clone(),
        droplet: message.droplet.to_string(),
        version: record.version.clone(),
        instance: record.instance.clone(),
        index: message.index,
        handle: record.handle.clone(),
        limit_bytes: report.limit_bytes,
        usage_bytes: report.usage_bytes,
        peak_bytes: report.peak_bytes,
        level: level(report.level).into(),
        victim: Victim {
            pid: report.victim.as_ref().map(|victim| victim.pid),
            comm: report.victim.as_ref().map(|victim| victim.comm.clone()),
        },
        survived: false,
        missed: 0,
        time: now(),
    }
}

fn level(level: Level) -> &'static str {
    match level {
        Level::Container => "instance",
        Level::Above => "ancestor",
        Level::Host => "host",
        Level::Unknown => "unknown",
    }
}

pub(super) fn event(subject: &str, body: &impl serde::Serialize) -> Event {
    // Plain structures of strings and numbers always become JSON.
    Event {
        subject: subject.into(),
        body: serde_json::to_value(body).unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::{deliver, refused};
    use crate::instances::outlet::outlet;
    use messages::reply::{ErrorCode, Reply};
    use serde_json::json;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use tracing::{Event, Subscriber};
    use tracing_subscriber::Layer;
    use tracing_subscriber::layer::{Context, SubscriberExt};

    /// Counts the lines that come to it.
    struct Lines(Arc<AtomicU64>);

    impl<S: Subscriber> Layer<S> for Lines {
        fn on_event(&self, _event: &Event<'_>, _context: Context<'_, S>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[tokio::test]
    async fn refusals_that_the_bus_never_takes_are_left_out_in_the_end() {
        const TOO_MANY: u64 = 70_000;
        let (outlet, inlet) = outlet();
        inlet.link.send_modify(|link| link.up = true);
        let refusal = Reply::error(ErrorCode::Busy, "later");
        let start = json!({
            "droplet": "app", "version": "1", "index": 0, "cc_partition": "default",
        });
        let lines = Arc::new(AtomicU64::new(0));
        let log = Lines(Arc::clone(&lines)).with_filter(crate::Quiet);
        // As `main` has them.
        let log = tracing_subscriber::registry()
            .with(log)
            .with(crate::causes());
        let _log = tracing::subscriber::set_default(log);
        for _ in 0..TOO_MANY {
            let event = refused(&start, &refusal).unwrap();
            deliver(outlet.clone(), event, None);
        }
        // Each counts for a KiB, of 64 MiB.
        assert_eq!(outlet.left_out().value(), TOO_MANY - (64 << 10));
        // As many as of any place in the code within ten seconds, and not fewer the longer the agent lives.
        let lines = lines.load(Ordering::Relaxed);
        assert!(lines >= 20 && lines.is_multiple_of(20), "{lines}");
    }
}
