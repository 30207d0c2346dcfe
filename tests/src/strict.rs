//! Whether a message is one that the components of DEA's time can read (protocol 7.1): what Go (HM9000, gorouter)
//! decodes into typed fields, and what Ruby (the cloud controller) uses without looking first.
//!
//! One field of a wrong type makes Go's decoder drop the whole message: a heartbeat of a hundred instances, say.
//! Unknown keys are ignored, as everywhere in the protocol.

use serde_json::Value;

/// Where agents speak on their own.
pub const SUBJECTS: [&str; 9] = [
    "dea.start",
    "dea.advertise",
    "dea.heartbeat",
    "dea.shutdown",
    "droplet.exited",
    "droplet.oom",
    "router.register",
    "router.unregister",
    "vcap.component.announce",
];

/// What a field must be.
#[derive(Clone, Copy)]
enum Kind {
    Text,
    /// One token of a subject.
    Token,
    /// Lower-case hexadecimal of this length.
    Hex(usize),
    /// Go's `int`, 32 bits on some machines, not negative: an index.
    Index,
    /// Go's `int64`: never written with a fraction, not even `.0`.
    Int,
    /// An `Int`, or null.
    IntOrNull,
    Uint16,
    /// Any number.
    Float,
    Bool,
    Texts,
    /// An object of strings.
    TextByText,
    /// An object of `Int`.
    IntByText,
    Null,
    OneOf(&'static [&'static str]),
    Object(&'static [Field]),
    Objects(&'static [Field]),
}

/// A field: whether it must be there, its name, what it is.
type Field = (Need, &'static str, Kind);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Need {
    Always,
    /// It may be absent; null is not absent.
    Perhaps,
}

use Kind::{
    Bool, Float, Hex, Index, Int, IntByText, IntOrNull, Null, Object, Objects, OneOf, Text,
    TextByText, Texts, Token, Uint16,
};
use Need::{Always, Perhaps};

/// `dea.start`, and the answer to `dea.discover`.
const HELLO: &[Field] = &[
    (Always, "id", Token),
    (Always, "ip", Text),
    (Always, "version", Text),
    (Perhaps, "port", Uint16),
];

const STATUS: &[Field] = &[
    (Always, "id", Token),
    (Always, "ip", Text),
    (Always, "version", Text),
    (Always, "max_memory", Float),
    (Always, "reserved_memory", Float),
    (Always, "used_memory", Float),
    (Always, "num_clients", IntOrNull),
];

const DROPLET_STATUS: &[Field] = &[(Always, "name", Text), (Always, "uris", Texts)];

/// The controller takes lists and counts as they are: null is an exception there.
const ADVERTISE: &[Field] = &[
    (Always, "id", Token),
    (Always, "stacks", Texts),
    (Always, "available_memory", Int),
    (Always, "available_disk", Int),
    (Always, "app_id_to_count", IntByText),
    (
        Always,
        "placement_properties",
        Object(&[(Always, "zone", Text)]),
    ),
    // Any URL would make the controller send starts there.
    (Perhaps, "url", Null),
];

const GOODBYE: &[Field] = &[
    (Always, "id", Token),
    (Always, "ip", Text),
    (Always, "version", Text),
    (Always, "app_id_to_count", IntByText),
];

const HEARTBEAT: &[Field] = &[(Always, "dea", Token), (Always, "droplets", Objects(ENTRY))];

const ENTRY: &[Field] = &[
    (Always, "cc_partition", Text),
    (Always, "droplet", Text),
    (Always, "version", Text),
    (Always, "instance", Hex(32)),
    (Always, "index", Index),
    (
        Always,
        "state",
        OneOf(&["STARTING", "RUNNING", "CRASHED", "EVACUATING"]),
    ),
    (Always, "state_timestamp", Float),
];

const EXITED: &[Field] = &[
    (Always, "cc_partition", Text),
    (Always, "droplet", Text),
    (Always, "version", Text),
    (Always, "instance", Hex(32)),
    (Always, "index", Index),
    (
        Always,
        "reason",
        OneOf(&["CRASHED", "STOPPED", "DEA_SHUTDOWN", "DEA_EVACUATION"]),
    ),
    (Always, "exit_status", Int),
    (Always, "exit_description", Text),
    (Perhaps, "crash_timestamp", Int),
    (Perhaps, "signal", Int),
    (Perhaps, "oom", Bool),
    (
        Perhaps,
        "output",
        Object(&[(Always, "stdout", Int), (Always, "stderr", Int)]),
    ),
    (Perhaps, "handle", Token),
];

const OOM: &[Field] = &[
    (Always, "dea", Token),
    (Always, "droplet", Text),
    (Always, "version", Text),
    (Always, "instance", Hex(32)),
    (Always, "index", Index),
    (Always, "handle", Token),
    (Always, "limit_bytes", IntOrNull),
    (Always, "usage_bytes", IntOrNull),
    (Always, "peak_bytes", IntOrNull),
    (
        Always,
        "level",
        OneOf(&["instance", "ancestor", "host", "unknown"]),
    ),
    (Always, "victim", Object(&[(Always, "pid", IntOrNull)])),
    (Always, "survived", Bool),
    (Perhaps, "missed", Int),
    (Always, "time", Float),
];

/// Of gorouter's `RegistryMessage`.
const ROUTE: &[Field] = &[
    (Always, "dea", Token),
    (Always, "app", Text),
    (Always, "uris", Texts),
    (Always, "host", Text),
    (Always, "port", Uint16),
    (Always, "tags", TextByText),
    (Always, "private_instance_id", Hex(64)),
    (Always, "private_instance_index", Text),
    (Perhaps, "stale_threshold_in_seconds", Int),
    (Perhaps, "endpoint_updated_at_ns", Int),
    (Perhaps, "tls_port", Uint16),
    (Perhaps, "server_cert_domain_san", Text),
    (Perhaps, "protocol", Text),
    (Perhaps, "availability_zone", Text),
    (Perhaps, "isolation_segment", Text),
    (Perhaps, "route_service_url", Text),
];

const FOUND: &[Field] = &[
    (Always, "dea", Token),
    (Always, "droplet", Text),
    (Always, "version", Text),
    (Always, "instance", Hex(32)),
    (Always, "index", Index),
    (
        Always,
        "state",
        OneOf(&[
            "BORN",
            "STARTING",
            "RUNNING",
            "STOPPING",
            "STOPPED",
            "CRASHED",
            "RESUMING",
            "EVACUATING",
        ]),
    ),
    (Always, "state_timestamp", Float),
    (Always, "staged", Text),
    (Perhaps, "stats", Object(STATS)),
];

const STATS: &[Field] = &[
    (Always, "name", Text),
    (Always, "uris", Texts),
    (Always, "host", Text),
    (Always, "port", Uint16),
    (Always, "uptime", Int),
    (Always, "mem_quota", Int),
    (Always, "disk_quota", IntOrNull),
    (Always, "fds_quota", Int),
    (Always, "usage", Object(USAGE)),
];

const USAGE: &[Field] = &[
    (Always, "time", Text),
    (Perhaps, "cpu", Float),
    (Perhaps, "cores", Int),
    (Perhaps, "mem", Int),
    (Perhaps, "mem_charged", Int),
    (Perhaps, "disk", IntOrNull),
];

/// Also the answer to `vcap.component.discover`.
const COMPONENT: &[Field] = &[
    (Always, "type", OneOf(&["DEA"])),
    (Always, "index", Index),
    (Always, "uuid", Text),
    (Always, "host", Text),
    (Always, "credentials", Texts),
    (Always, "start", Text),
    (Perhaps, "uptime", Text),
];

const ERROR: &[Field] = &[
    (Always, "code", Text),
    (Always, "message", Text),
    (Always, "retryable", Bool),
];

/// What stands in the answer to a query and in no other.
const ANSWERS: &[(&str, &[Field])] = &[
    ("staged", FOUND),
    ("max_memory", STATUS),
    ("ip", HELLO),
    ("uris", DROPLET_STATUS),
    ("credentials", COMPONENT),
];

/// Whether what an agent said on `subject` can be read by whom it is for. What is on none of an agent's subjects
/// is nobody's business here.
///
/// # Errors
/// What is wrong with it: which field, and what it must be.
pub fn check(subject: &str, message: &Value) -> Result<(), String> {
    let fields = match subject {
        "dea.start" => HELLO,
        "dea.advertise" => ADVERTISE,
        "dea.shutdown" => GOODBYE,
        "dea.heartbeat" => HEARTBEAT,
        "droplet.exited" => EXITED,
        "droplet.oom" => OOM,
        "router.register" | "router.unregister" => ROUTE,
        "vcap.component.announce" => COMPONENT,
        inbox if inbox.starts_with("_INBOX.") => return answer(message),
        _ => return Ok(()),
    };
    object("", message, fields)?;
    match subject {
        "droplet.exited" => crash(message),
        // A router takes port 0 for the host itself.
        "router.register" if message["port"] == 0 => Err("`port` is 0".into()),
        _ => Ok(()),
    }
}

/// The time of a crash is there exactly if it was one.
fn crash(exited: &Value) -> Result<(), String> {
    let crashed = exited["reason"] == "CRASHED";
    if crashed == exited.get("crash_timestamp").is_some() {
        Ok(())
    } else {
        Err("`crash_timestamp` and `reason` contradict each other".into())
    }
}

/// The answer to a command says `ok`, and if not, why not; one to a query is known by a field.
fn answer(message: &Value) -> Result<(), String> {
    match message.get("ok") {
        Some(Value::Bool(true)) => return Ok(()),
        Some(Value::Bool(false)) => return object("", &message["error"], ERROR),
        Some(other) => return Err(format!("`ok` is {other}")),
        None => {}
    }
    let mut known = ANSWERS.iter();
    match known.find(|(key, _)| message.get(key).is_some()) {
        Some((_, fields)) => object("", message, fields),
        None => Ok(()),
    }
}

fn object(path: &str, value: &Value, fields: &[Field]) -> Result<(), String> {
    if !value.is_object() {
        return Err(format!("`{path}` is {value}: no object"));
    }
    for (need, name, kind) in fields {
        let path = format!("{path}{name}");
        match (value.get(name), need) {
            (Some(value), _) => field(&path, value, *kind)?,
            (None, Perhaps) => {}
            (None, Always) => return Err(format!("`{path}` is absent")),
        }
    }
    Ok(())
}

fn field(path: &str, value: &Value, kind: Kind) -> Result<(), String> {
    let whole = value.as_i64();
    let text = value.as_str();
    let is = |all: fn(&Value) -> bool| {
        value
            .as_object()
            .is_some_and(|object| object.values().all(all))
    };
    let (right, wanted) = match kind {
        Text => (value.is_string(), "a string".to_owned()),
        Token => {
            let token = |text: &str| {
                !text.is_empty() && !text.contains(['.', '*', '>', ' ', '\t', '\r', '\n'])
            };
            (text.is_some_and(token), "one token of a subject".to_owned())
        }
        Hex(length) => {
            let digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
            let hex = |text: &str| text.len() == length && text.bytes().all(digit);
            let wanted = format!("{length} lower-case hexadecimal digits");
            (text.is_some_and(hex), wanted)
        }
        Index => {
            let index = whole.is_some_and(|whole| (0..=i64::from(i32::MAX)).contains(&whole));
            (index, "a whole number from 0 to 2147483647".to_owned())
        }
        Int => (whole.is_some(), "a whole number".to_owned()),
        IntOrNull => {
            let right = whole.is_some() || value.is_null();
            (right, "a whole number or null".to_owned())
        }
        Uint16 => {
            let right = whole.is_some_and(|whole| u16::try_from(whole).is_ok());
            (right, "a whole number from 0 to 65535".to_owned())
        }
        Float => (value.is_number(), "a number".to_owned()),
        Bool => (value.is_boolean(), "true or false".to_owned()),
        Texts => {
            let texts = |array: &Vec<Value>| array.iter().all(Value::is_string);
            let right = value.as_array().is_some_and(texts);
            (right, "an array of strings".to_owned())
        }
        TextByText => (is(Value::is_string), "an object of strings".to_owned()),
        IntByText => (is(Value::is_i64), "an object of whole numbers".to_owned()),
        Null => (value.is_null(), "null".to_owned()),
        OneOf(names) => {
            let right = text.is_some_and(|text| names.contains(&text));
            (right, format!("one of {names:?}"))
        }
        Object(fields) => return object(&format!("{path}."), value, fields),
        Objects(fields) => return objects(path, value, fields),
    };
    if right {
        Ok(())
    } else {
        Err(format!("`{path}` is {value}; it must be {wanted}"))
    }
}

fn objects(path: &str, value: &Value, fields: &[Field]) -> Result<(), String> {
    let array = value
        .as_array()
        .ok_or_else(|| format!("`{path}` is {value}: no array"))?;
    array
        .iter()
        .try_for_each(|value| object(&format!("{path}[]."), value, fields))
}
