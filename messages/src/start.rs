//! `dea.<id>.start` (protocol 2.1).

use crate::field::{Fields, Read};
use crate::subjects::DropletId;
use serde_json::{Map, Value};
use std::net::Ipv4Addr;

/// What an instance may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Memory in MB.
    pub mem: u64,
    /// Disk in MB.
    pub disk: u64,
    /// Open files.
    pub fds: u64,
}

/// Most MB of memory or disk that make sense: 1 PiB. Beyond, arithmetic in bytes would overflow.
pub const MEGABYTES_MAX: u64 = 1 << 30;

/// Largest index of an instance.
const INDEX_MAX: u64 = 2_147_483_647;

/// Most bytes of a `version` in JSON: every heartbeat repeats it, and a heartbeat is never split. The
/// controllers of DEA's time send at most 36 (NG) or some 45 (V1).
pub const VERSION_MAX: usize = 64;

/// Most bytes of a `cc_partition` in JSON, for the same reason.
pub const PARTITION_MAX: usize = 64;

/// At which state a command is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// `"running"`
    Running,
    /// `"stopped"`
    Stopped,
}

/// A start, understood.
#[derive(Debug, Clone, PartialEq)]
pub struct StartRequest {
    /// The app.
    pub droplet: DropletId,
    /// Which of its instances.
    pub index: u64,
    /// The app's version.
    pub version: String,
    /// The app's name.
    pub name: String,
    /// Host names, perhaps with a path, without a scheme.
    pub uris: Vec<String>,
    /// Where the droplet is.
    pub executable_uri: Option<String>,
    /// SHA-1 of the droplet, hexadecimal.
    pub sha1: Option<String>,
    /// SHA-256 of the droplet, hexadecimal; wins (Ostler).
    pub sha256: Option<String>,
    /// What it may use.
    pub limits: Limits,
    /// Service bindings, as they came.
    pub services: Vec<Value>,
    /// The user's variables, in order.
    pub env: Vec<(String, String)>,
    /// Echoed in heartbeats and exits.
    pub cc_partition: String,
    /// Overrides the staged command.
    pub start_command: Option<String>,
    /// The root file system's name.
    pub stack: Option<String>,
    /// Base of VCAP_APPLICATION.
    pub vcap_application: Map<String, Value>,
    /// What it may reach outside.
    pub egress_network_rules: Vec<EgressRule>,
    /// Seconds for the port to open.
    pub health_check_timeout: Option<u64>,
    /// Makes the command repeatable (Ostler).
    pub request_id: Option<String>,
    /// When to answer (Ostler).
    pub wait: Option<Wait>,
    /// Seconds between TERM and KILL (Ostler).
    pub stop_grace: Option<u64>,
    /// Whether one OOM kill ends the instance; true if absent (Ostler).
    pub oom_group: Option<bool>,
}

/// One egress rule, its port lists already taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EgressRule {
    /// Which traffic.
    pub traffic: Traffic,
    /// First and last address.
    pub destination: (Ipv4Addr, Ipv4Addr),
    /// Whether its connections are logged.
    pub log: bool,
}

/// The protocol of a rule, and what narrows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Traffic {
    /// Everything.
    All,
    /// These TCP ports, first and last; all if empty.
    Tcp(Vec<(u16, u16)>),
    /// These UDP ports, first and last; all if empty.
    Udp(Vec<(u16, u16)>),
    /// This ICMP type and code; -1 is any.
    Icmp(i16, i16),
}

impl StartRequest {
    /// Reads a start message that came by the bus.
    ///
    /// # Errors
    /// The first field that is wrong or beyond its bounds, in words.
    pub fn from_value(value: &Value) -> Read<Self> {
        let start = Self::from_kept(value)?;
        let fields = Fields::of(value, "")?;
        index(&fields)?;
        label(&fields, "version", VERSION_MAX)?;
        label(&fields, "cc_partition", PARTITION_MAX)?;
        bounded(&fields.object("limits", "limits.")?)?;
        request_id(&fields)?;
        stop_grace(&fields)?;
        few(&fields, &start.egress_network_rules)?;
        Ok(start)
    }

    /// Reads one that was accepted once, perhaps by an agent that had other bounds: what runs by it runs on.
    ///
    /// # Errors
    /// The first field that is wrong, in words.
    pub fn from_kept(value: &Value) -> Read<Self> {
        let fields = Fields::of(value, "")?;
        Ok(Self {
            droplet: droplet(&fields)?,
            index: fields.number("index")?,
            version: fields.string("version")?,
            name: fields.string("name")?,
            uris: fields.strings("uris")?,
            executable_uri: fields.optional_string("executableUri")?,
            sha1: hex(&fields, "sha1", 40)?,
            sha256: hex(&fields, "sha256", 64)?,
            limits: limits(&fields.object("limits", "limits.")?)?,
            services: services(&fields)?,
            env: env(&fields)?,
            cc_partition: fields.string("cc_partition")?,
            start_command: fields.optional_string("start_command")?,
            stack: fields.optional_string("stack")?,
            vcap_application: match fields.get("vcap_application") {
                None => Map::new(),
                Some(Value::Object(object)) => object.clone(),
                Some(_) => return Err(fields.refuse("vcap_application", "an object")),
            },
            egress_network_rules: egress(&fields)?,
            health_check_timeout: fields.optional_number("health_check_timeout")?,
            request_id: fields.optional_string("request_id")?,
            wait: wait(&fields, Wait::Running)?,
            stop_grace: fields.optional_number("stop_grace")?,
            oom_group: fields.optional_bool("oom_group")?,
        })
    }
}

/// The app of a message.
pub(crate) fn droplet(fields: &Fields<'_>) -> Read<DropletId> {
    DropletId::parse(&fields.id("droplet")?)
        .ok_or_else(|| fields.refuse("droplet", "1 to 128 of A-Z a-z 0-9 _ - (one subject token)"))
}

/// A string that heartbeats repeat: it takes at most `most` bytes of JSON.
pub(crate) fn label(fields: &Fields<'_>, key: &str, most: usize) -> Read<String> {
    let text = fields.string(key)?;
    let quoted = Value::from(text.as_str()).to_string();
    if quoted.len() > most + 2 {
        return Err(fields.refuse(key, &format!("a string of at most {most} bytes")));
    }
    Ok(text)
}

/// A `request_id`: not empty, and bounded, for it is kept.
pub(crate) fn request_id(fields: &Fields<'_>) -> Read<Option<String>> {
    let id = fields.optional_string("request_id")?;
    match &id {
        Some(text) if text.is_empty() || text.len() > 256 => {
            Err(fields.refuse("request_id", "a string of 1 to 256 bytes"))
        }
        _ => Ok(id),
    }
}

/// `wait`, where only one state makes sense.
pub(crate) fn wait(fields: &Fields<'_>, only: Wait) -> Read<Option<Wait>> {
    let (name, wanted) = match only {
        Wait::Running => ("running", "\"running\" or absent"),
        Wait::Stopped => ("stopped", "\"stopped\" or absent"),
    };
    match fields.optional_string("wait")?.as_deref() {
        None => Ok(None),
        Some(text) if text == name => Ok(Some(only)),
        Some(_) => Err(fields.refuse("wait", wanted)),
    }
}

/// An index: DEA's health managers read it as a Go `int`, 32 bits on some.
fn index(fields: &Fields<'_>) -> Read<u64> {
    match fields.number("index")? {
        index @ 0..=INDEX_MAX => Ok(index),
        _ => Err(fields.refuse("index", "from 0 to 2147483647")),
    }
}

fn stop_grace(fields: &Fields<'_>) -> Read<Option<u64>> {
    match fields.optional_number("stop_grace")? {
        Some(seconds) if seconds > 600 => Err(fields.refuse("stop_grace", "0 to 600 seconds")),
        other => Ok(other),
    }
}

fn hex(fields: &Fields<'_>, key: &str, length: usize) -> Read<Option<String>> {
    let text = fields.optional_string(key)?;
    match &text {
        Some(hex) if hex.len() != length || !hex.bytes().all(|b| b.is_ascii_hexdigit()) => {
            Err(fields.refuse(key, &format!("{length} hexadecimal digits")))
        }
        _ => Ok(text.map(|hex| hex.to_ascii_lowercase())),
    }
}

fn limits(fields: &Fields<'_>) -> Read<Limits> {
    Ok(Limits {
        mem: fields.number("mem")?,
        disk: fields.number("disk")?,
        fds: fields.number("fds")?,
    })
}

fn bounded(limits: &Fields<'_>) -> Read<()> {
    megabytes(limits, "mem")?;
    megabytes(limits, "disk")?;
    open_files(limits, "fds")?;
    Ok(())
}

/// MB of something.
pub(crate) fn megabytes(fields: &Fields<'_>, key: &str) -> Read<u64> {
    match fields.number(key)? {
        amount @ 1..=MEGABYTES_MAX => Ok(amount),
        _ => Err(fields.refuse(key, "from 1 to 1073741824 MB")),
    }
}

/// A count of open files.
pub(crate) fn open_files(fields: &Fields<'_>, key: &str) -> Read<u64> {
    match fields.number(key)? {
        count @ 8..=1_048_576 => Ok(count),
        _ => Err(fields.refuse(key, "from 8 to 1048576")),
    }
}

fn services(fields: &Fields<'_>) -> Read<Vec<Value>> {
    let wanted = "an array of services, each with strings `name` and `label`";
    let services = fields
        .optional_array("services")?
        .ok_or_else(|| fields.refuse("services", wanted))?;
    for service in services {
        let service = Fields::of(service, "services[].")?;
        service.string("name")?;
        service.string("label")?;
        for key in ["plan", "vendor", "version", "type"] {
            if service.has(key) {
                service.string(key)?;
            }
        }
        service.optional_string("plan_option")?;
    }
    Ok(services.to_vec())
}

fn env(fields: &Fields<'_>) -> Read<Vec<(String, String)>> {
    let pairs = fields.strings("env")?;
    pairs
        .into_iter()
        .map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((&pair, ""));
            if name.is_empty() || pair.contains('\0') {
                return Err(fields.refuse("env", "an array of \"NAME=value\" without NUL bytes"));
            }
            Ok((name.to_owned(), value.to_owned()))
        })
        .collect()
}

fn egress(fields: &Fields<'_>) -> Read<Vec<EgressRule>> {
    let rules = fields
        .optional_array("egress_network_rules")?
        .unwrap_or_default();
    let rules = rules.iter();
    rules
        .map(|rule| egress_rule(&Fields::of(rule, "egress_network_rules[].")?))
        .collect()
}

fn few(fields: &Fields<'_>, rules: &[EgressRule]) -> Read<()> {
    let ranges = rules.iter().map(|rule| match &rule.traffic {
        Traffic::Tcp(ports) | Traffic::Udp(ports) => ports.len(),
        Traffic::All | Traffic::Icmp(..) => 0,
    });
    if rules.len() > MOST_RULES || ranges.sum::<usize>() > MOST_RANGES {
        return Err(fields.refuse("egress_network_rules", MOST));
    }
    Ok(())
}

/// What is reckoned with them grows with their product.
const MOST_RULES: usize = 1000;
const MOST_RANGES: usize = 512;
const MOST: &str = "at most 1000 rules, with at most 512 ports and ranges of ports together";

fn egress_rule(rule: &Fields<'_>) -> Read<EgressRule> {
    let number = |key| -> Read<i16> {
        match rule.get(key) {
            None => Ok(-1),
            Some(value) => value
                .as_i64()
                .and_then(|number| i16::try_from(number).ok())
                .filter(|number| (-1..=255).contains(number))
                .ok_or_else(|| rule.refuse(key, "from -1 to 255")),
        }
    };
    let traffic = match rule.string("protocol")?.as_str() {
        "all" => Traffic::All,
        "tcp" => Traffic::Tcp(ports(rule)?),
        "udp" => Traffic::Udp(ports(rule)?),
        "icmp" => Traffic::Icmp(number("type")?, number("code")?),
        _ => return Err(rule.refuse("protocol", "tcp, udp, icmp or all")),
    };
    let destination = addresses(&rule.string("destination")?)
        .ok_or_else(|| rule.refuse("destination", "an IPv4 address, a network, or first-last"))?;
    Ok(EgressRule {
        traffic,
        destination,
        log: rule.optional_bool("log")?.unwrap_or(false),
    })
}

fn ports(rule: &Fields<'_>) -> Read<Vec<(u16, u16)>> {
    let Some(text) = rule.optional_string("ports")? else {
        return Ok(Vec::new());
    };
    let one = |part: &str| -> Option<(u16, u16)> {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let range = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        (range.0 <= range.1).then_some(range)
    };
    text.split(',')
        .map(one)
        .collect::<Option<Vec<_>>>()
        .ok_or_else(|| rule.refuse("ports", "like \"80\", \"80,443\" or \"8000-9000\""))
}

/// First and last of addresses written as one, as a network, or as first-last.
#[must_use]
pub fn addresses(text: &str) -> Option<(Ipv4Addr, Ipv4Addr)> {
    if let Some((first, last)) = text.split_once('-') {
        let range: (Ipv4Addr, Ipv4Addr) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        return (range.0 <= range.1).then_some(range);
    }
    if let Some((address, prefix)) = text.split_once('/') {
        let address: Ipv4Addr = address.parse().ok()?;
        let prefix: u32 = prefix.parse().ok().filter(|prefix| *prefix <= 32)?;
        let hosts = u32::MAX.checked_shr(prefix).unwrap_or(0);
        let first = address.to_bits() & !hosts;
        return Some((
            Ipv4Addr::from_bits(first),
            Ipv4Addr::from_bits(first | hosts),
        ));
    }
    text.parse().ok().map(|address| (address, address))
}

/// What a refused start still says of itself, for `droplet.exited`: droplet, version, index, partition. `None` if
/// droplet or index are none that a start may have. A version or a partition that a start may not have is left out.
#[must_use]
pub fn identity(value: &Value) -> Option<(DropletId, String, u64, String)> {
    let fields = Fields::of(value, "").ok()?;
    Some((
        droplet(&fields).ok()?,
        label(&fields, "version", VERSION_MAX).unwrap_or_default(),
        index(&fields).ok()?,
        label(&fields, "cc_partition", PARTITION_MAX).unwrap_or_else(|_| "default".into()),
    ))
}

#[cfg(test)]
mod tests {
    use super::identity;
    use serde_json::json;

    #[test]
    fn a_refused_start_says_of_itself_only_what_a_start_may_say() {
        let of = |changes: serde_json::Value| {
            let mut start = json!({"droplet": 7, "index": 1, "version": "v", "cc_partition": "p"});
            for (key, value) in changes.as_object().unwrap() {
                start[key] = value.clone();
            }
            identity(&start).map(|(droplet, version, index, partition)| {
                format!("{droplet} {version} {index} {partition}")
            })
        };
        assert_eq!(of(json!({})).unwrap(), "7 v 1 p");
        assert_eq!(of(json!({"version": null})).unwrap(), "7  1 p");
        assert_eq!(of(json!({"version": "v".repeat(65)})).unwrap(), "7  1 p");
        assert_eq!(
            of(json!({"cc_partition": "\u{1}".repeat(11)})).unwrap(),
            "7 v 1 default"
        );
        assert_eq!(
            of(json!({"index": 2_147_483_647})).unwrap(),
            "7 v 2147483647 p"
        );
        for none in [
            json!({"index": 2_147_483_648_u64}),
            json!({"index": -1}),
            json!({"index": 1.0}),
            json!({"index": null}),
            json!({"droplet": "a.b"}),
            json!({"droplet": "d".repeat(129)}),
        ] {
            assert_eq!(of(none), None);
        }
        assert_eq!(identity(&json!([])), None);
    }
}
