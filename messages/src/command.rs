//! Everything a host can be asked, parsed once.

use crate::field::{BadMessage, Fields, Read};
use crate::filter::{Empty, Filter};
use crate::reply::ErrorCode;
use crate::start::{self, StartRequest, Wait, megabytes, open_files};
use crate::subjects::{DropletId, Incoming};
use serde_json::{Value, json};

/// A message to this host, understood.
#[derive(Debug, Clone, PartialEq)]
pub enum Asked {
    /// Answered once, as Ostler answers.
    Command(Command),
    /// Answered as the protocol says: zero, one or many times.
    Query(Query),
    /// Not answered: something is to be said again.
    Trigger(Trigger),
}

/// Something to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// Start an instance here.
    Start(Box<StartRequest>),
    /// Stop what matches.
    Stop(StopRequest),
    /// Give an app other URIs, and perhaps another version.
    Update(UpdateRequest),
    /// Have so many instances of an app here.
    Scale(ScaleRequest),
    /// Tell what matches, in one answer (Ostler).
    FindHere(FindRequest),
    /// Tell what crashes left (Ostler).
    Logs(LogsRequest),
}

/// Something to tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Query {
    /// What matches, an answer each.
    FindDroplet(FindRequest),
    /// This host.
    Status,
    /// Every instance.
    DropletStatus,
    /// Whether this would fit, the sooner the better it fits.
    Discover(DiscoverRequest),
}

/// Something to say again, now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trigger {
    /// The advertisement.
    Locate,
    /// The heartbeat.
    HealthmanagerStart,
    /// All routes.
    RouterStart,
}

/// `dea.stop`, `dea.<id>.stop`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StopRequest {
    /// Which instances.
    pub filter: Filter,
    /// Makes the command repeatable.
    pub request_id: Option<String>,
    /// When to answer.
    pub wait: Option<Wait>,
}

/// `dea.update`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpdateRequest {
    /// The app.
    pub droplet: String,
    /// Its complete new list.
    pub uris: Vec<String>,
    /// Its new version; unchanged if absent.
    pub version: Option<String>,
    /// Makes the command repeatable.
    pub request_id: Option<String>,
}

/// `dea.<id>.scale`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScaleRequest {
    /// The app.
    pub droplet: DropletId,
    /// How many instances this host shall have.
    pub instances: u64,
    /// New limits, for the new ones and for those that run.
    pub limits: Option<ScaleLimits>,
    /// Makes the command repeatable.
    pub request_id: Option<String>,
    /// When to answer: at the state of those that are started, or of those that are stopped.
    pub wait: Option<Wait>,
}

/// Limits that shall change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScaleLimits {
    /// Memory in MB.
    pub mem: Option<u64>,
    /// Disk in MB.
    pub disk: Option<u64>,
    /// Open files.
    pub fds: Option<u64>,
}

/// `dea.find.droplet`, `dea.<id>.find`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FindRequest {
    /// Which instances.
    pub filter: Filter,
    /// Measure those that run.
    pub include_stats: bool,
}

/// `dea.<id>.logs`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogsRequest {
    /// Which crashes; of those that match, a file is read of the newest.
    pub filter: Filter,
    /// The one of this instance.
    pub handle: Option<String>,
    /// The file to read, and from which byte on; `None`: list.
    pub file: Option<(String, u64)>,
}

/// `dea.discover`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiscoverRequest {
    /// The app.
    pub droplet: String,
    /// MB of memory.
    pub memory: u64,
    /// MB of disk.
    pub disk: u64,
}

impl Command {
    /// The id under which the same command may come again.
    #[must_use]
    pub fn request_id(&self) -> Option<&str> {
        match self {
            Self::Start(request) => request.request_id.as_deref(),
            Self::Stop(request) => request.request_id.as_deref(),
            Self::Update(request) => request.request_id.as_deref(),
            Self::Scale(request) => request.request_id.as_deref(),
            Self::FindHere(_) | Self::Logs(_) => None,
        }
    }
}

/// Reads the body of a message on a subject of ours. Returns it as JSON too.
///
/// # Errors
/// What is wrong with it, in words.
pub fn parse(incoming: Incoming, body: &[u8]) -> Read<(Asked, Value)> {
    let value = json(incoming, body)?;
    let asked = understand(incoming, &value)?;
    Ok((asked, value))
}

/// The body as JSON. An empty one is `{}` where the message is only a trigger.
///
/// # Errors
/// If it is none.
pub fn json(incoming: Incoming, body: &[u8]) -> Read<Value> {
    if body.is_empty() && is_trigger(incoming) {
        return Ok(json!({}));
    }
    serde_json::from_slice(body).map_err(|error| BadMessage {
        code: ErrorCode::BadJson,
        message: format!("the message is no JSON: {error}"),
    })
}

fn is_trigger(incoming: Incoming) -> bool {
    match incoming {
        Incoming::Locate
        | Incoming::Status
        | Incoming::DropletStatus
        | Incoming::HealthmanagerStart
        | Incoming::RouterStart => true,
        Incoming::Start
        | Incoming::StopHere
        | Incoming::FindHere
        | Incoming::Scale
        | Incoming::Logs
        | Incoming::Stop
        | Incoming::Update
        | Incoming::FindDroplet
        | Incoming::Discover => false,
    }
}

fn understand(incoming: Incoming, value: &Value) -> Read<Asked> {
    let fields = || Fields::of(value, "");
    let command = match incoming {
        Incoming::Start => Command::Start(Box::new(StartRequest::from_value(value)?)),
        Incoming::Stop | Incoming::StopHere => Command::Stop(stop(&fields()?)?),
        Incoming::Update => Command::Update(update(&fields()?)?),
        Incoming::Scale => Command::Scale(scale(&fields()?)?),
        Incoming::FindHere => Command::FindHere(find(&fields()?)?),
        Incoming::Logs => Command::Logs(logs(&fields()?)?),
        Incoming::FindDroplet => return Ok(Asked::Query(Query::FindDroplet(find(&fields()?)?))),
        Incoming::Discover => return Ok(Asked::Query(Query::Discover(discover(&fields()?)?))),
        // The bodies of these say nothing that is used.
        Incoming::Status => return Ok(Asked::Query(Query::Status)),
        Incoming::DropletStatus => return Ok(Asked::Query(Query::DropletStatus)),
        Incoming::Locate => return Ok(Asked::Trigger(Trigger::Locate)),
        Incoming::HealthmanagerStart => return Ok(Asked::Trigger(Trigger::HealthmanagerStart)),
        Incoming::RouterStart => return Ok(Asked::Trigger(Trigger::RouterStart)),
    };
    Ok(Asked::Command(command))
}

fn stop(fields: &Fields<'_>) -> Read<StopRequest> {
    Ok(StopRequest {
        filter: Filter::read(fields, Empty::MatchesNothing)?,
        request_id: start::request_id(fields)?,
        wait: start::wait(fields, Wait::Stopped)?,
    })
}

fn find(fields: &Fields<'_>) -> Read<FindRequest> {
    Ok(FindRequest {
        filter: Filter::read(fields, Empty::MatchesAll)?,
        include_stats: fields.optional_bool("include_stats")?.unwrap_or(false),
    })
}

fn logs(fields: &Fields<'_>) -> Read<LogsRequest> {
    let offset = fields.optional_number("offset")?;
    let file = fields.optional_string("file")?;
    if offset.is_some() && file.is_none() {
        return Err(fields.refuse("offset", "given together with `file`"));
    }
    Ok(LogsRequest {
        filter: Filter::read(fields, Empty::MatchesAll)?,
        handle: fields.optional_string("handle")?,
        file: file.map(|name| (name, offset.unwrap_or(0))),
    })
}

fn update(fields: &Fields<'_>) -> Read<UpdateRequest> {
    if fields.get("uris").is_none() {
        return Err(fields.refuse("uris", "an array of strings, the complete new list"));
    }
    Ok(UpdateRequest {
        droplet: fields.id("droplet")?,
        uris: fields.strings("uris")?,
        version: fields
            .get("version")
            .map(|_| start::label(fields, "version", start::VERSION_MAX))
            .transpose()?,
        request_id: start::request_id(fields)?,
    })
}

fn scale(fields: &Fields<'_>) -> Read<ScaleRequest> {
    let optional = |limits: &Fields<'_>, key, read: fn(&Fields<'_>, &str) -> Read<u64>| {
        limits.get(key).map(|_| read(limits, key)).transpose()
    };
    let limits = match fields.get("limits") {
        None => None,
        Some(_) => {
            let limits = fields.object("limits", "limits.")?;
            Some(ScaleLimits {
                mem: optional(&limits, "mem", megabytes)?,
                disk: optional(&limits, "disk", megabytes)?,
                fds: optional(&limits, "fds", open_files)?,
            })
        }
    };
    Ok(ScaleRequest {
        droplet: start::droplet(fields)?,
        instances: fields.number("instances")?,
        limits,
        request_id: start::request_id(fields)?,
        wait: match start::wait(fields, Wait::Running) {
            Ok(wait) => wait,
            Err(_) => start::wait(fields, Wait::Stopped)
                .map_err(|_| fields.refuse("wait", "\"running\", \"stopped\" or absent"))?,
        },
    })
}

fn discover(fields: &Fields<'_>) -> Read<DiscoverRequest> {
    let limits = fields.object("limits", "limits.")?;
    Ok(DiscoverRequest {
        droplet: fields.id("droplet")?,
        memory: limits.number("mem")?,
        disk: limits.optional_number("disk")?.unwrap_or(0),
    })
}

/// How long an answer to `dea.discover` is held back, in ms: 10 for each instance of the app and 100
/// times the share of memory that is reserved, 250 at most (protocol 2.6).
#[must_use]
pub fn discover_delay_ms(instances: u64, reserved_mb: u64, capacity_mb: u64) -> u64 {
    let taint = instances.saturating_mul(10);
    let memory = reserved_mb
        .saturating_mul(100)
        .checked_div(capacity_mb)
        .unwrap_or(250);
    taint.saturating_add(memory).min(250)
}

#[cfg(test)]
mod tests {
    use super::discover_delay_ms;

    /// Protocol 2.6: the smaller of 250, and 10 for each instance with 100 times the share of memory.
    #[test]
    fn the_fuller_a_host_the_later_it_answers_a_discover() {
        for (instances, reserved, capacity, delay) in [
            (0, 0, 4096, 0),
            (3, 0, 4096, 30),
            (0, 1024, 4096, 25),
            (2, 2048, 4096, 70),
            (0, 4096, 4096, 100),
            (15, 4096, 4096, 250),
            (26, 0, 4096, 250),
            (25, 1, 4096, 250),
            (u64::MAX, u64::MAX, 1, 250),
            // A host without memory for apps has none to lose by being slow.
            (0, 0, 0, 250),
        ] {
            let told = discover_delay_ms(instances, reserved, capacity);
            assert_eq!(told, delay, "{instances} {reserved} {capacity}");
        }
    }
}
