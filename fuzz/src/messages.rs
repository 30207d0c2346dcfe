//! What comes by the bus and with droplets, as text.

use messages::command::{Asked, json, parse};
use messages::reply::Reply;
use messages::service::Question;
use messages::start::{StartRequest, addresses, identity};
use messages::state::State;
use messages::subjects::{DropletId, Incoming, is_token, subscriptions};
use messages::trace::Trace;
use ostler::foreign;

/// A message on each subject, and an answer that was kept.
pub(crate) fn message(bytes: &[u8]) {
    let here = Incoming::verbs_here().map(|verb| format!("dea.host.{verb}"));
    // The one with the wildcard, which stands for those, is no subject of a message.
    let all = here.chain(subscriptions("host"));
    for incoming in all.filter_map(|subject| Incoming::parse(&subject, "host")) {
        match parse(incoming, bytes) {
            Ok((Asked::Command(_) | Asked::Query(_) | Asked::Trigger(_), value)) => {
                // It is kept, and read by the next agent.
                let again = parse(incoming, value.to_string().as_bytes());
                assert!(again.is_ok(), "{incoming:?} {value}");
                if incoming == Incoming::Start {
                    assert!(StartRequest::from_value(&value).is_ok(), "{value}");
                    assert!(identity(&value).is_some(), "{value}");
                }
            }
            Err(bad) => {
                let reply = Reply::error(bad.code, bad.message);
                for (_, value) in reply.headers() {
                    let one_line = |byte: u8| byte == b' ' || byte.is_ascii_graphic();
                    assert!(value.bytes().all(one_line), "{value:?}");
                }
                let start = json(Incoming::Start, bytes).unwrap_or_default();
                let _told_as_an_exit = identity(&start);
            }
        }
    }
    if let Some(reply) = Reply::from_body(bytes) {
        assert_eq!(Reply::from_body(&reply.body()), Some(reply));
    }
}

/// A subject, and the words in it.
pub(crate) fn subject(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    if let Some(incoming) = Incoming::parse(text, "host") {
        assert_eq!(incoming.subject("host"), text);
    }
    if Question::parse(text, "host").is_some() {
        assert!(messages::service::subscriptions("host").contains(&text.to_owned()));
    }
    assert_eq!(DropletId::parse(text).is_some(), is_token(text));
    let _known = State::parse(text);
    if let Some((first, last)) = addresses(text) {
        assert!(first <= last, "{text}");
    }
    if let Ok(shown) = foreign::droplet_uri(text) {
        // Neither control characters nor what stands before an `@`.
        assert!(!shown.chars().any(char::is_control), "{shown:?}");
    }
}

/// The values of a `traceparent` and of some `tracestate`s, one in a line.
pub(crate) fn trace(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let mut lines = text.split('\n');
    let parent = lines.next().unwrap_or_default();
    let states: Vec<&str> = lines.collect();
    let Some(trace) = Trace::read(&[parent], &states) else {
        return;
    };
    assert_eq!(trace.id().len(), 32, "{parent:?}");
    for (header, value) in trace.headers() {
        // A header is one line, and a variable holds no NUL.
        let one_line = |byte: u8| byte == b' ' || byte.is_ascii_graphic();
        assert!(value.bytes().all(one_line), "{header} {value:?}");
        assert!(value.len() <= 512, "{header} {value:?}");
    }
    // It is kept, and read by the next agent.
    let kept = serde_json::to_string(&trace);
    let again = kept.and_then(|kept| serde_json::from_str::<Trace>(&kept));
    assert_eq!(again.ok(), Some(trace));
}

/// Variables of an app's own, one in a line; the first line has the services, as JSON.
pub(crate) fn environment(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let mut lines = text.split('\n');
    let services = serde_json::from_str(lines.next().unwrap_or_default());
    let services: Vec<serde_json::Value> = services.unwrap_or_default();
    let user: Vec<(String, String)> = lines
        .map(|line| line.split_once('=').unwrap_or((line, "")))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    if let Ok(variables) = foreign::environment(&services, &user) {
        for (at, (name, value)) in variables.iter().enumerate() {
            assert!(!name.is_empty() && !name.contains(['=', '\0']), "{name:?}");
            assert!(!value.contains('\0'), "{name}={value:?}");
            let once = variables
                .iter()
                .skip(at + 1)
                .all(|(other, _)| other != name);
            assert!(once, "{name} stands there twice");
        }
        // Of these no app may say otherwise.
        let has = |wanted: &str| variables.iter().any(|(name, _)| name == wanted);
        assert!(has("VCAP_APPLICATION") && has("PORT"));
    }
}

/// The YAML of a stager.
pub(crate) fn stager(bytes: &[u8]) {
    let Ok(document) = std::str::from_utf8(bytes) else {
        return;
    };
    for key in ["start_command", "detected_buildpack", "state_file"] {
        let _understood_or_refused = foreign::stager_text(document, key);
    }
}

/// The passwd file of a stack, and the kernel's log with the names that processes choose.
pub(crate) fn users(bytes: &[u8]) {
    for name in ["vcap", "root", "1000", ""] {
        let _found = foreign::user(bytes, name);
    }
    let _kill = foreign::kernel_log(bytes);
}

/// A request to the port of the metrics.
pub(crate) fn http(bytes: &[u8]) {
    if let Some(page) = foreign::page(bytes) {
        assert!(bytes.starts_with(format!("GET {page}").as_bytes()));
    }
}
