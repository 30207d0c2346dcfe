//! The NATS services API (ADR-32 of nats-architecture-and-design): what `nats micro ls`, `info`, `stats` and `ping` ask
//! of every host, and what it tells.

use crate::outgoing::civil_time;
use crate::subjects::{Incoming, Kind};
use serde::Serialize;
use std::collections::BTreeMap;

/// The name that all hosts share.
pub const NAME: &str = "ostler";

/// What a service is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Question {
    /// `$SRV.PING`: who is there.
    Ping,
    /// `$SRV.INFO`: what each takes.
    Info,
    /// `$SRV.STATS`: what each has done.
    Stats,
}

impl Question {
    const ALL: [(&'static str, Self); 3] = [
        ("PING", Self::Ping),
        ("INFO", Self::Info),
        ("STATS", Self::Stats),
    ];

    /// What `subject` asks of the host `id`: `$SRV.<verb>`, `$SRV.<verb>.ostler`, `$SRV.<verb>.ostler.<id>`.
    #[must_use]
    pub fn parse(subject: &str, id: &str) -> Option<Self> {
        let mut words = subject.split('.');
        if words.next() != Some("$SRV") {
            return None;
        }
        let verb = words.next()?;
        let (name, instance, more) = (words.next(), words.next(), words.next());
        let ours = name.is_none_or(|name| name == NAME)
            && instance.is_none_or(|instance| instance == id)
            && more.is_none();
        let known = Self::ALL.iter().find(|(word, _)| *word == verb);
        known.filter(|_| ours).map(|(_, question)| *question)
    }
}

/// All subjects on which the host `id` is asked for itself.
#[must_use]
pub fn subscriptions(id: &str) -> Vec<String> {
    let of = |(verb, _): &(&str, Question)| {
        [
            format!("$SRV.{verb}"),
            format!("$SRV.{verb}.{NAME}"),
            format!("$SRV.{verb}.{NAME}.{id}"),
        ]
    };
    Question::ALL.iter().flat_map(of).collect()
}

/// Who answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Identity {
    /// [`NAME`].
    pub name: &'static str,
    /// The host's id.
    pub id: String,
    /// The agent's version: `major.minor.patch`.
    pub version: &'static str,
    /// Where and on what it runs; fixed while the agent lives.
    pub metadata: BTreeMap<&'static str, String>,
}

/// The answer to [`Question::Ping`].
#[derive(Debug, Serialize)]
pub struct Ping<'a> {
    #[serde(flatten)]
    identity: &'a Identity,
    r#type: &'static str,
}

impl<'a> Ping<'a> {
    /// Of this service.
    #[must_use]
    pub fn of(identity: &'a Identity) -> Self {
        Self {
            identity,
            r#type: "io.nats.micro.v1.ping_response",
        }
    }
}

/// The answer to [`Question::Info`].
#[derive(Debug, Serialize)]
pub struct Info<'a> {
    #[serde(flatten)]
    identity: &'a Identity,
    r#type: &'static str,
    description: &'static str,
    endpoints: Vec<Endpoint>,
}

impl<'a> Info<'a> {
    /// Of this service.
    #[must_use]
    pub fn of(identity: &'a Identity) -> Self {
        let endpoints = Incoming::answered();
        Self {
            identity,
            r#type: "io.nats.micro.v1.info_response",
            description: "makes containers and runs app instances in them (DEA protocol)",
            endpoints: endpoints
                .map(|incoming| Endpoint::of(incoming, &identity.id))
                .collect(),
        }
    }
}

/// A subject whose requests are answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Endpoint {
    name: String,
    subject: String,
    /// None: every host answers for itself.
    queue_group: &'static str,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    metadata: BTreeMap<&'static str, &'static str>,
}

impl Endpoint {
    fn of(incoming: Incoming, id: &str) -> Self {
        let told = match incoming.kind() {
            Kind::Command => "exactly one of each host",
            Kind::Query => "one for each match, none for none",
            Kind::Trigger => "none",
        };
        Self {
            name: incoming.name(),
            subject: incoming.subject(id),
            queue_group: "",
            metadata: BTreeMap::from([("answers", told)]),
        }
    }
}

/// The answer to [`Question::Stats`].
#[derive(Debug, Serialize)]
pub struct Stats<'a> {
    #[serde(flatten)]
    identity: &'a Identity,
    r#type: &'static str,
    /// RFC 3339.
    started: String,
    endpoints: Vec<EndpointStats>,
}

impl<'a> Stats<'a> {
    /// Of this service since `started`, in seconds since the epoch. `counts` are those of [`Incoming::answered`], in
    /// that order; `data` is told with the first endpoint.
    #[must_use]
    pub fn of(
        identity: &'a Identity,
        started: u64,
        counts: impl IntoIterator<Item = Counts>,
        data: Data,
    ) -> Self {
        let mut data = Some(data);
        let endpoints = Incoming::answered().zip(counts);
        let endpoints = endpoints.map(|(incoming, counts)| EndpointStats {
            endpoint: Endpoint {
                metadata: BTreeMap::new(),
                ..Endpoint::of(incoming, &identity.id)
            },
            average_processing_time: counts
                .processing_time
                .checked_div(counts.num_requests)
                .unwrap_or_default(),
            counts,
            data: data.take(),
        });
        Self {
            identity,
            r#type: "io.nats.micro.v1.stats_response",
            started: format!("{}Z", civil_time(started, 'T')),
            endpoints: endpoints.collect(),
        }
    }
}

#[derive(Debug, Serialize)]
struct EndpointStats {
    #[serde(flatten)]
    endpoint: Endpoint,
    #[serde(flatten)]
    counts: Counts,
    average_processing_time: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Data>,
}

/// What was asked of one endpoint since the agent began.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Requests that were answered.
    pub num_requests: u64,
    /// Those of them that were answered with an error.
    pub num_errors: u64,
    /// The newest of these errors, as in `Nats-Service-Error`; else empty.
    pub last_error: String,
    /// Nanoseconds from each request to its answer, together.
    pub processing_time: u64,
}

/// What a host tells beside the counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Data {
    /// Messages to the host that were dropped since the agent began, because it read too slowly.
    pub dropped: u64,
    /// Bytes of output on this host's disk that the bus has not confirmed; left out where they cannot be counted in time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spooled: Option<u64>,
    /// Left out where the agent is too busy to say it.
    #[serde(flatten)]
    pub host: Option<Host>,
}

/// How a host stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Host {
    /// Instances that are not crashed.
    pub instances: u64,
    /// Those of them that are RUNNING.
    pub running: u64,
    /// Crashes that are still told.
    pub crashed: u64,
    /// MB that are not reserved; negative when overcommitted.
    pub available_memory: i64,
    /// MB that are neither reserved nor used; negative when overcommitted. Left out where nobody knows what is used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub available_disk: Option<i64>,
}

#[cfg(test)]
mod tests {
    use super::{Question, subscriptions};

    #[test]
    fn every_subscription_is_understood_and_nothing_else() {
        let subjects = subscriptions("host-1");
        assert_eq!(subjects.len(), 9);
        for subject in &subjects {
            assert!(Question::parse(subject, "host-1").is_some(), "{subject}");
        }
        for subject in [
            "$SRV",
            "$SRV.SCHEMA",
            "$SRV.PING.other",
            "$SRV.PING.ostler.host-2",
            "$SRV.PING.ostler.host-1.x",
            "SRV.PING",
        ] {
            assert_eq!(Question::parse(subject, "host-1"), None, "{subject}");
        }
    }
}
