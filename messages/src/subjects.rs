//! The subjects: every one that is listened to or spoken on is on this screen.

use std::fmt;

/// Everything of this host that counts.
pub const HEARTBEAT: &str = "dea.heartbeat";
/// What is free on this host.
pub const ADVERTISE: &str = "dea.advertise";
/// This host is ready.
pub const HELLO: &str = "dea.start";
/// This host takes no more commands.
pub const SHUTDOWN: &str = "dea.shutdown";
/// An instance ended.
pub const EXITED: &str = "droplet.exited";
/// The kernel killed a process of an instance for memory.
pub const OOM: &str = "droplet.oom";
/// A route is served.
pub const ROUTER_REGISTER: &str = "router.register";
/// A route is served no longer.
pub const ROUTER_UNREGISTER: &str = "router.unregister";

/// Where a host tells over HTTP how it is.
pub const COMPONENT_ANNOUNCE: &str = "vcap.component.announce";
/// Who tells that, is asked here.
pub const COMPONENT_DISCOVER: &str = "vcap.component.discover";

/// Longest id, in characters.
pub const TOKEN_MAX: usize = 128;

/// Whether `text` can be an id: `[A-Za-z0-9_-]{1,128}`, so one token of a subject.
#[must_use]
pub fn is_token(text: &str) -> bool {
    (1..=TOKEN_MAX).contains(&text.len())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-')
}

/// An app's id, safe as one token of a subject and as a file name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DropletId(String);

impl DropletId {
    /// Takes `text` if it is a token.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        is_token(text).then(|| Self(text.to_owned()))
    }

    /// The id.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DropletId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a subject that a host listens to asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Incoming {
    /// `dea.<id>.start`
    Start,
    /// `dea.<id>.stop`
    StopHere,
    /// `dea.<id>.find`
    FindHere,
    /// `dea.<id>.scale`
    Scale,
    /// `dea.<id>.logs`
    Logs,
    /// `dea.stop`
    Stop,
    /// `dea.update`
    Update,
    /// `dea.find.droplet`
    FindDroplet,
    /// `dea.locate`
    Locate,
    /// `dea.status`
    Status,
    /// `dea.discover`
    Discover,
    /// `droplet.status`
    DropletStatus,
    /// `healthmanager.start`
    HealthmanagerStart,
    /// `router.start`
    RouterStart,
}

/// How what is asked is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// By each host, exactly once, whether it is understood or not.
    Command,
    /// As the protocol says: never, once, or many times.
    Query,
    /// Never: what is said on it makes a host say something to all.
    Trigger,
}

impl Incoming {
    const HERE: [(&'static str, Self); 5] = [
        ("start", Self::Start),
        ("stop", Self::StopHere),
        ("find", Self::FindHere),
        ("scale", Self::Scale),
        ("logs", Self::Logs),
    ];
    const EVERYWHERE: [(&'static str, Self); 9] = [
        ("dea.stop", Self::Stop),
        ("dea.update", Self::Update),
        ("dea.find.droplet", Self::FindDroplet),
        ("dea.locate", Self::Locate),
        ("dea.status", Self::Status),
        ("dea.discover", Self::Discover),
        ("droplet.status", Self::DropletStatus),
        ("healthmanager.start", Self::HealthmanagerStart),
        ("router.start", Self::RouterStart),
    ];

    /// The verbs after `dea.<id>.`.
    pub fn verbs_here() -> impl Iterator<Item = &'static str> {
        Self::HERE.iter().map(|(verb, _)| *verb)
    }

    /// All that are answered: commands and queries.
    pub fn answered() -> impl Iterator<Item = Self> {
        let all = Self::HERE.iter().chain(&Self::EVERYWHERE);
        all.map(|(_, incoming)| *incoming)
            .filter(|incoming| incoming.kind() != Kind::Trigger)
    }

    /// How it is answered.
    #[must_use]
    pub fn kind(self) -> Kind {
        match self {
            Self::Start
            | Self::StopHere
            | Self::FindHere
            | Self::Scale
            | Self::Logs
            | Self::Stop
            | Self::Update => Kind::Command,
            Self::FindDroplet | Self::Status | Self::Discover | Self::DropletStatus => Kind::Query,
            Self::Locate | Self::HealthmanagerStart | Self::RouterStart => Kind::Trigger,
        }
    }

    /// Its subject at the host `id`.
    #[must_use]
    pub fn subject(self, id: &str) -> String {
        let is_this = |(_, incoming): &&(&str, Self)| *incoming == self;
        if let Some((verb, _)) = Self::HERE.iter().find(is_this) {
            return format!("dea.{id}.{verb}");
        }
        let everywhere = Self::EVERYWHERE.iter().find(is_this);
        everywhere.map_or_else(String::new, |(subject, _)| (*subject).to_owned())
    }

    /// The name of its endpoint in the services API: the verb, or the subject with `-` for `.`.
    #[must_use]
    pub fn name(self) -> String {
        let here = Self::HERE.iter().find(|(_, incoming)| *incoming == self);
        here.map_or_else(
            || self.subject("").replace('.', "-"),
            |(verb, _)| (*verb).to_owned(),
        )
    }

    /// What `subject` asks of the host `id`; `None` if it is none of ours.
    #[must_use]
    pub fn parse(subject: &str, id: &str) -> Option<Self> {
        let own = subject
            .strip_prefix("dea.")
            .and_then(|rest| rest.strip_prefix(id));
        if let Some(verb) = own.and_then(|rest| rest.strip_prefix('.')) {
            return find(&Self::HERE, verb);
        }
        find(&Self::EVERYWHERE, subject)
    }
}

fn find(table: &[(&str, Incoming)], name: &str) -> Option<Incoming> {
    table
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, incoming)| *incoming)
}

/// All subjects that the host `id` subscribes to: what is said to every host, and last whatever is said
/// to this one.
#[must_use]
pub fn subscriptions(id: &str) -> Vec<String> {
    let everywhere = Incoming::EVERYWHERE.iter();
    everywhere
        .map(|(subject, _)| (*subject).to_owned())
        .chain([format!("dea.{id}.*")])
        .collect()
}

/// Where an instance's output goes; `.stdout` or `.stderr` is added.
#[must_use]
pub fn output(droplet: &DropletId, index: u64, handle: &str) -> String {
    format!("droplet.output.{droplet}.{index}.{handle}")
}

#[cfg(test)]
mod tests {
    use super::{DropletId, Incoming, subscriptions};

    #[test]
    fn every_subscription_is_understood_once() {
        let mut subjects = subscriptions("host-1");
        assert_eq!(subjects.pop().as_deref(), Some("dea.host-1.*"));
        subjects.extend(Incoming::verbs_here().map(|verb| format!("dea.host-1.{verb}")));
        let mut seen = Vec::new();
        for subject in subjects {
            let incoming = Incoming::parse(&subject, "host-1").unwrap();
            assert!(!seen.contains(&incoming), "{subject}");
            seen.push(incoming);
        }
        assert_eq!(seen.len(), 14);
    }

    #[test]
    fn other_hosts_and_other_words_are_not_ours() {
        for subject in [
            "dea.host-2.start",
            "dea.host-1",
            "dea.host-1.",
            "dea.host-1.start.x",
            "dea.host-1x.start",
            "",
            "dea",
        ] {
            assert_eq!(Incoming::parse(subject, "host-1"), None, "{subject}");
        }
    }

    #[test]
    fn ids_are_tokens() {
        assert!(DropletId::parse("5c1f7a0e-33d2-4b68_A").is_some());
        let long = "x".repeat(129);
        for id in ["", "a.b", "a*", ">", "a b", "ü", "a/b", long.as_str()] {
            assert_eq!(DropletId::parse(id), None, "{id:?}");
        }
    }
}
