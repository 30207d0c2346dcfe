//! The environment of an app: the DEA's variables in the DEA's order, then the user's.
//!
//! Values reach the app by `execve`, never through shell text, so what a service's password holds stays
//! what it is. Of the shell's expansions one is kept, for the user's own variables, because apps rely on
//! it: `$NAME` and `${NAME}` of variables that stand before.

use std::fmt::Write as _;
use std::net::Ipv4Addr;

use messages::trace::Trace;
use serde_json::{Map, Value, json};

/// The longest `NAME=value`, in bytes: the kernel's MAX_ARG_STRLEN less the NUL (execve(2)).
const MAX_BYTES: usize = 128 * 1024 - 1;

/// The keys of a service that apps get to see.
const SERVICE_KEYS: [&str; 7] = [
    "name",
    "label",
    "tags",
    "plan",
    "plan_option",
    "credentials",
    "syslog_drain_url",
];

/// What an app's environment is made from.
#[derive(Debug, Clone, Copy)]
pub struct AppEnv<'a> {
    /// `vcap_application` of the start message.
    pub vcap_application: &'a Map<String, Value>,
    /// `services` of the start message.
    pub services: &'a [Value],
    /// `env` of the start message, split at the first `=`, in its order.
    pub user: &'a [(String, String)],
    /// `droplet` of the start message: the app's GUID.
    pub application_id: &'a str,
    /// 32 hexadecimal digits.
    pub instance_id: &'a str,
    /// From 0.
    pub index: u64,
    /// The memory limit in MiB.
    pub memory_mb: u64,
    /// The host's address as others reach it.
    pub host_ip: Ipv4Addr,
    /// The port on the host's addresses.
    pub host_port: u16,
    /// The port that the app listens on; the same number, unless the host maps it elsewhere.
    pub container_port: u16,
    /// Entry to STARTING, in seconds since 1970.
    pub started_at: u64,
    /// The trace of the command that began the instance.
    pub trace: Option<&'a Trace>,
}

/// What has become of an app since its start message was written.
#[derive(Debug, Clone, Copy, Default)]
pub struct Changed<'a> {
    /// Its URIs.
    pub uris: Option<&'a [String]>,
    /// Its version.
    pub version: Option<&'a str>,
    /// MB of memory.
    pub mem: Option<u64>,
    /// MB of disk.
    pub disk: Option<u64>,
    /// Open files.
    pub fds: Option<u64>,
}

/// Where `vcap_application` tells what has changed, it tells it as it is now. What it does not tell it does not tell then.
pub fn retell(vcap_application: &mut Map<String, Value>, changed: Changed<'_>) {
    let mut replace = |keys: [&str; 2], value: Value| {
        for key in keys {
            if let Some(told) = vcap_application.get_mut(key) {
                told.clone_from(&value);
            }
        }
    };
    if let Some(uris) = changed.uris {
        replace(["uris", "application_uris"], json!(uris));
    }
    if let Some(version) = changed.version {
        replace(["version", "application_version"], json!(version));
    }
    let limits = [
        ("mem", changed.mem),
        ("disk", changed.disk),
        ("fds", changed.fds),
    ];
    for (key, value) in limits {
        let told = vcap_application.get_mut("limits");
        if let (Some(told), Some(value)) = (told.and_then(|told| told.get_mut(key)), value) {
            *told = json!(value);
        }
    }
}

/// A variable that no process can be given.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnvironmentError {
    /// Its name is empty or holds `=` or NUL.
    #[error("{0:?} cannot be the name of an environment variable")]
    Name(String),
    /// Its value holds a NUL.
    #[error("the environment variable {0:?} holds a NUL")]
    Nul(String),
    /// It is longer than the kernel takes.
    #[error(
        "the environment variable {0:?} is longer than the {MAX_BYTES} bytes that Linux allows"
    )]
    TooLong(String),
}

/// The environment, in order; each name once. A later variable of the same name replaces the value of
/// the earlier one.
///
/// # Errors
/// [`EnvironmentError`] names the variable that `execve` would refuse.
pub fn build(app: &AppEnv<'_>) -> Result<Vec<(String, String)>, EnvironmentError> {
    let port = app.container_port.to_string();
    let host_port = app.host_port.to_string();
    let ports = json!([{"external": app.host_port, "internal": app.container_port}]);
    let mut environment = Environment(Vec::new());
    let mut set = |name: &str, value: String| environment.set(name, value);
    set("USER", "vcap".to_owned())?;
    set("PATH", "/usr/local/bin:/usr/bin:/bin".to_owned())?;
    set("LANG", "en_US.UTF-8".to_owned())?;
    set("VCAP_APPLICATION", vcap_application(app).to_string())?;
    set("VCAP_SERVICES", vcap_services(app.services).to_string())?;
    set("MEMORY_LIMIT", format!("{}m", app.memory_mb))?;
    if !app.services.is_empty() {
        set(
            "DATABASE_URL",
            database_url(app.services).unwrap_or_default(),
        )?;
    }
    set("HOME", "/home/vcap/app".to_owned())?;
    set("TMPDIR", "/home/vcap/tmp".to_owned())?;
    set("VCAP_APP_HOST", "0.0.0.0".to_owned())?;
    set("VCAP_APP_PORT", port.clone())?;
    set("PORT", port)?;
    set("CF_INSTANCE_INDEX", app.index.to_string())?;
    set("CF_INSTANCE_IP", app.host_ip.to_string())?;
    set("CF_INSTANCE_PORT", host_port)?;
    set(
        "CF_INSTANCE_ADDR",
        format!("{}:{}", app.host_ip, app.host_port),
    )?;
    set("CF_INSTANCE_PORTS", ports.to_string())?;
    for (header, value) in app.trace.into_iter().flat_map(Trace::headers) {
        set(&header.to_ascii_uppercase(), value)?;
    }
    for (name, value) in app.user {
        let value = expand(value, &environment.0).ok_or_else(|| too_long(name))?;
        environment.set(name, value)?;
    }
    // What another tracing system keeps belongs to its parent alone.
    let own = |wanted: &str| app.user.iter().any(|(name, _)| name == wanted);
    if own("TRACEPARENT") && !own("TRACESTATE") {
        environment.0.retain(|(name, _)| name != "TRACESTATE");
    }
    Ok(environment.0)
}

struct Environment(Vec<(String, String)>);

impl Environment {
    fn set(&mut self, name: &str, value: String) -> Result<(), EnvironmentError> {
        if name.is_empty() || name.contains(['=', '\0']) {
            return Err(EnvironmentError::Name(name.chars().take(80).collect()));
        }
        if value.contains('\0') {
            return Err(EnvironmentError::Nul(name.to_owned()));
        }
        if name.len() + 1 + value.len() > MAX_BYTES {
            return Err(too_long(name));
        }
        match self.0.iter_mut().find(|(existing, _)| existing == name) {
            Some((_, old)) => *old = value,
            None => self.0.push((name.to_owned(), value)),
        }
        Ok(())
    }
}

fn too_long(name: &str) -> EnvironmentError {
    EnvironmentError::TooLong(name.chars().take(80).collect())
}

fn vcap_application(app: &AppEnv<'_>) -> Value {
    let started = ruby_time(app.started_at);
    let mut object = app.vcap_application.clone();
    for (key, value) in [
        ("application_id", json!(app.application_id)),
        ("instance_id", json!(app.instance_id)),
        ("instance_index", json!(app.index)),
        ("host", json!("0.0.0.0")),
        ("port", json!(app.container_port)),
        ("started_at", json!(started)),
        ("started_at_timestamp", json!(app.started_at)),
        ("start", json!(started)),
        ("state_timestamp", json!(app.started_at)),
    ] {
        object.insert(key.to_owned(), value);
    }
    Value::Object(object)
}

/// Label to services, each with the keys that apps get to see and that are not null.
fn vcap_services(services: &[Value]) -> Value {
    let mut by_label = Map::new();
    for service in services {
        let Some(label) = service.get("label").and_then(Value::as_str) else {
            continue;
        };
        let seen: Map<String, Value> = SERVICE_KEYS
            .iter()
            .filter_map(|key| Some(((*key).to_owned(), service.get(*key)?.clone())))
            .filter(|(_, value)| !value.is_null())
            .collect();
        let list = by_label
            .entry(label)
            .or_insert_with(|| Value::Array(Vec::new()));
        if let Value::Array(list) = list {
            list.push(Value::Object(seen));
        }
    }
    Value::Object(by_label)
}

/// The URI of the first service that is a relational database, with the scheme that Rails knows.
fn database_url(services: &[Value]) -> Option<String> {
    services.iter().find_map(|service| {
        let uri = service.get("credentials")?.get("uri")?.as_str()?;
        let (scheme, rest) = uri.split_once(':').filter(|_| !uri.contains('\0'))?;
        let scheme = match scheme.to_ascii_lowercase().as_str() {
            "mysql" | "mysql2" => "mysql2",
            "postgres" | "postgresql" => "postgres",
            "db2" | "informix" => "ibmdb",
            _ => return None,
        };
        Some(format!("{scheme}:{rest}"))
    })
}

/// `value` with `$NAME` and `${NAME}` replaced by what `earlier` holds, by nothing if it holds none, and
/// with `\$`, `\\` and `` \` `` as what stands behind the backslash: as bash does within double quotes, where
/// the DEA wrote it. Everything else stays: `$(…)`, backticks, `$1`, `$$`, `${NAME:-x}`. `None` if it
/// grows beyond what the kernel takes: a few variables that double each other would fill the memory.
fn expand(value: &str, earlier: &[(String, String)]) -> Option<String> {
    let mut expanded = String::new();
    let mut rest = value;
    while let Some((before, special)) = rest.find(['$', '\\']).map(|at| rest.split_at(at)) {
        expanded.push_str(before);
        let mut after = special.chars();
        let sign = after.next();
        let escaped = after.clone().next().filter(|c| "$\\`".contains(*c));
        match (sign, escaped, reference(after.as_str())) {
            (Some('\\'), Some(literal), _) => {
                expanded.push(literal);
                after.next();
                rest = after.as_str();
            }
            (Some('$'), _, Some((name, tail))) => {
                expanded.push_str(lookup(name, earlier));
                rest = tail;
            }
            (sign, _, _) => {
                expanded.extend(sign);
                rest = after.as_str();
            }
        }
        if expanded.len() > MAX_BYTES {
            return None;
        }
    }
    expanded.push_str(rest);
    Some(expanded)
}

/// The value of a variable; bash knows one more, its working directory.
fn lookup<'a>(name: &str, earlier: &'a [(String, String)]) -> &'a str {
    let found = earlier.iter().find(|(existing, _)| existing == name);
    match found {
        Some((_, value)) => value,
        None if name == "PWD" => "/home/vcap",
        None => "",
    }
}

/// The name that stands behind a `$`, and what follows the reference.
fn reference(after: &str) -> Option<(&str, &str)> {
    let braced = after.strip_prefix('{');
    let text = braced.unwrap_or(after);
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let end = text.find(|c| !is_name(c)).unwrap_or(text.len());
    let (name, tail) = text.split_at_checked(end)?;
    let proper = name.starts_with(|c: char| is_name(c) && !c.is_ascii_digit());
    let tail = if braced.is_some() {
        tail.strip_prefix('}')?
    } else {
        tail
    };
    proper.then_some((name, tail))
}

/// A time as Ruby writes it: `2013-08-12 00:05:29 +0000`.
fn ruby_time(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let mut text = format!("{year:04}-{month:02}-{day:02} ");
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    // Writing to a string cannot fail.
    let _ = write!(text, "{hour:02}:{minute:02}:{second:02} +0000");
    text
}

/// Year, month and day of a number of days since 1970-01-01, by Howard Hinnant's `civil_from_days`: years
/// begin in March there, so that the leap day is the last one.
fn civil(days: u64) -> (u64, u64, u64) {
    // Day 0 is the 0000-03-01 of the proleptic Gregorian calendar.
    let days = days.saturating_add(719_468);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect()
    }

    fn built(
        services: &Value,
        env: &[(&str, &str)],
    ) -> Result<Vec<(String, String)>, EnvironmentError> {
        let vcap_application = json!({
            "application_name": "orders-api",
            "instance_id": "preset by the sender",
            "limits": {"mem": 256},
            "users": null,
        });
        build(&AppEnv {
            vcap_application: vcap_application.as_object().unwrap(),
            services: services.as_array().unwrap(),
            user: &user(env),
            application_id: "5c1f7a0e",
            instance_id: "6e4c1f0b9a7d4853b2e1c0d9f8a7b6c5",
            index: 1,
            memory_mb: 256,
            host_ip: Ipv4Addr::new(10, 0, 4, 20),
            host_port: 61_001,
            container_port: 61_001,
            started_at: 1_376_265_929,
            trace: None,
        })
    }

    #[test]
    fn a_trace_is_whole_or_the_apps_own() {
        let trace = Trace::read(
            &["00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"],
            &["a=1"],
        );
        let traced = |own: &[(&str, &str)]| {
            let app = AppEnv {
                vcap_application: &Map::new(),
                services: &[],
                user: &user(own),
                application_id: "app",
                instance_id: "0123456789abcdef0123456789abcdef",
                index: 0,
                memory_mb: 64,
                host_ip: Ipv4Addr::LOCALHOST,
                host_port: 61_001,
                container_port: 61_001,
                started_at: 0,
                trace: trace.as_ref(),
            };
            let all = build(&app).unwrap().into_iter();
            let of_trace = all.filter(|(name, _)| name.starts_with("TRACE"));
            let values: Vec<String> = of_trace.map(|(_, value)| value).collect();
            values.join(" ")
        };
        let given = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01 a=1";
        assert_eq!(traced(&[]), given);
        assert_eq!(traced(&[("TRACEPARENT", "own")]), "own");
        let both = [("TRACEPARENT", "own"), ("TRACESTATE", "b=2")];
        assert_eq!(traced(&both), "own b=2");
    }

    fn get(environment: &[(String, String)], name: &str) -> String {
        environment
            .iter()
            .find(|(n, _)| n == name)
            .unwrap_or_else(|| panic!("{name}"))
            .1
            .clone()
    }

    #[test]
    fn has_the_variables_of_the_dea_in_their_order() {
        let environment = built(&json!([{"label": "x", "name": "y"}]), &[("A", "1")]).unwrap();
        let names: Vec<_> = environment.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(
            names.join(" "),
            "USER PATH LANG VCAP_APPLICATION VCAP_SERVICES MEMORY_LIMIT DATABASE_URL HOME TMPDIR \
             VCAP_APP_HOST VCAP_APP_PORT PORT CF_INSTANCE_INDEX CF_INSTANCE_IP CF_INSTANCE_PORT \
             CF_INSTANCE_ADDR CF_INSTANCE_PORTS A"
        );
        for (name, value) in [
            ("MEMORY_LIMIT", "256m"),
            ("DATABASE_URL", ""),
            ("HOME", "/home/vcap/app"),
            ("TMPDIR", "/home/vcap/tmp"),
            ("VCAP_APP_HOST", "0.0.0.0"),
            ("VCAP_APP_PORT", "61001"),
            ("PORT", "61001"),
            ("CF_INSTANCE_INDEX", "1"),
            ("CF_INSTANCE_IP", "10.0.4.20"),
            ("CF_INSTANCE_PORT", "61001"),
            ("CF_INSTANCE_ADDR", "10.0.4.20:61001"),
            (
                "CF_INSTANCE_PORTS",
                r#"[{"external":61001,"internal":61001}]"#,
            ),
        ] {
            assert_eq!(get(&environment, name), value, "{name}");
        }
    }

    #[test]
    fn vcap_application_is_overlaid() {
        let environment = built(&json!([]), &[]).unwrap();
        let value: Value = serde_json::from_str(&get(&environment, "VCAP_APPLICATION")).unwrap();
        assert_eq!(
            value,
            json!({
                "application_id": "5c1f7a0e",
                "application_name": "orders-api",
                "host": "0.0.0.0",
                "instance_id": "6e4c1f0b9a7d4853b2e1c0d9f8a7b6c5",
                "instance_index": 1,
                "limits": {"mem": 256},
                "port": 61001,
                "start": "2013-08-12 00:05:29 +0000",
                "started_at": "2013-08-12 00:05:29 +0000",
                "started_at_timestamp": 1_376_265_929,
                "state_timestamp": 1_376_265_929,
                "users": null,
            })
        );
        assert!(!environment.iter().any(|(name, _)| name == "DATABASE_URL"));
    }

    #[test]
    fn services_are_grouped_and_cut_down() {
        let services = json!([
            {"label": "pg", "name": "a", "plan": null, "provider": "core", "tags": ["sql"],
             "credentials": {"uri": "http://x", "password": "$HOME`id`\\"}},
            {"label": "redis", "name": "b", "syslog_drain_url": "syslog://x", "plan_option": "o"},
            {"label": "pg", "name": "c", "volume_mounts": []},
            {"name": "without a label"}, 7
        ]);
        let environment = built(&services, &[]).unwrap();
        let value: Value = serde_json::from_str(&get(&environment, "VCAP_SERVICES")).unwrap();
        assert_eq!(
            value,
            json!({
                "pg": [
                    {"label": "pg", "name": "a", "tags": ["sql"],
                     "credentials": {"uri": "http://x", "password": "$HOME`id`\\"}},
                    {"label": "pg", "name": "c"},
                ],
                "redis": [{"label": "redis", "name": "b", "syslog_drain_url": "syslog://x",
                           "plan_option": "o"}],
            })
        );
    }

    #[test]
    fn numbers_of_credentials_go_on_as_they_came() {
        let numbers = "[31.245270191439438,121.48791951161945,18446744073709551615]";
        let services = format!("[{{\"label\":\"pg\",\"credentials\":{numbers}}}]");
        let environment = built(&serde_json::from_str(&services).unwrap(), &[]).unwrap();
        let told = get(&environment, "VCAP_SERVICES");
        assert!(told.contains(numbers), "{told}");
    }

    #[test]
    fn database_url_is_that_of_the_first_database() {
        let of = |uris: &[&str]| {
            let services: Vec<_> = uris
                .iter()
                .map(|uri| json!({"label": "l", "credentials": {"uri": uri}}))
                .collect();
            get(&built(&json!(services), &[]).unwrap(), "DATABASE_URL")
        };
        assert_eq!(
            of(&["redis://r", "mysql://u:p$w@h/d?x", "postgres://x"]),
            "mysql2://u:p$w@h/d?x"
        );
        assert_eq!(of(&["mysql2://x"]), "mysql2://x");
        assert_eq!(of(&["postgresql://x"]), "postgres://x");
        assert_eq!(of(&["POSTGRES://x"]), "postgres://x");
        assert_eq!(of(&["db2://x"]), "ibmdb://x");
        assert_eq!(of(&["informix://x"]), "ibmdb://x");
        assert_eq!(of(&["mysqlx://x", "no uri", "", "mysql://a\0b"]), "");
        let odd = json!([{"label": "l"}, {"label": "l", "credentials": {"uri": 7}},
                         {"label": "l", "credentials": "text"}]);
        assert_eq!(get(&built(&odd, &[]).unwrap(), "DATABASE_URL"), "");
    }

    #[test]
    fn the_users_variables_win_and_refer_to_earlier_ones() {
        let environment = built(
            &json!([]),
            &[
                ("PORT", "9"),
                ("A", "$PORT-${HOME}-$LATER-${PORT"),
                ("LATER", "x"),
                ("PATH", "/opt/bin:$PATH"),
                ("B", r"`id` $(id) \n $1 $$ ${A:-x} a$ $PORTX $é"),
                ("A", "again $A"),
                ("lower.case-name", "kept"),
                ("EMPTY", ""),
            ],
        )
        .unwrap();
        for (name, value) in [
            ("PORT", "9"),
            ("VCAP_APP_PORT", "61001"),
            ("A", "again 9-/home/vcap/app--${PORT"),
            ("PATH", "/opt/bin:/usr/local/bin:/usr/bin:/bin"),
            ("B", r"`id` $(id) \n $1 $$ ${A:-x} a$  $é"),
            ("lower.case-name", "kept"),
            ("EMPTY", ""),
        ] {
            assert_eq!(get(&environment, name), value, "{name}");
        }
        assert_eq!(
            environment.iter().filter(|(name, _)| name == "A").count(),
            1
        );
    }

    #[test]
    fn what_execve_refuses_is_refused_by_name() {
        let complaint =
            |name: &str, value: &str| built(&json!([]), &[(name, value)]).unwrap_err().to_string();
        assert!(complaint("", "x").contains("cannot be the name"));
        assert!(complaint("A=B", "x").contains("A=B"));
        assert!(complaint("A", "x\0y").contains("NUL"));
        assert!(complaint("LONG", &"x".repeat(131_072)).contains("\"LONG\""));
        assert!(built(&json!([]), &[("L", &"x".repeat(131_069))]).is_ok());
        let names: Vec<_> = (0..64).map(|i| format!("V{i}")).collect();
        let values: Vec<_> = (0..64).map(|i: i32| format!("$V{0}$V{0}", i - 1)).collect();
        let mut doubling = vec![("V0", "xxxx")];
        doubling.extend(
            names
                .iter()
                .zip(&values)
                .skip(1)
                .map(|(n, v)| (n.as_str(), v.as_str())),
        );
        assert!(
            built(&json!([]), &doubling)
                .unwrap_err()
                .to_string()
                .contains("longer")
        );
    }

    #[test]
    fn times_are_those_of_the_calendar() {
        assert_eq!(ruby_time(0), "1970-01-01 00:00:00 +0000");
        assert_eq!(ruby_time(951_782_399), "2000-02-28 23:59:59 +0000");
        assert_eq!(ruby_time(951_782_400), "2000-02-29 00:00:00 +0000");
        assert_eq!(ruby_time(1_709_251_200), "2024-03-01 00:00:00 +0000");
        assert_eq!(ruby_time(4_102_444_799), "2099-12-31 23:59:59 +0000");
    }
}
