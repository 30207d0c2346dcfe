//! Trace context in headers: W3C Trace Context, level 1 (<https://www.w3.org/TR/trace-context-1/>).
//!
//! A host begins no spans of its own for others to see. It passes on what a command came with, unchanged, as the
//! recommendation lets a participant do that takes no part in the trace.

use serde::{Deserialize, Serialize};

/// The header that says which span a request belongs to. NATS keeps the case of header names; the recommendation
/// wants this one sent in lower case, and taken in any (3.2.1).
pub const PARENT: &str = "traceparent";

/// The header with what tracing systems want to keep beside it.
pub const STATE: &str = "tracestate";

/// Bytes of a `tracestate` that every participant should pass on (3.3.1.5); a longer one is not kept.
const STATE_MAX: usize = 512;

/// List members of a `tracestate` at most (3.3.1.1).
const MEMBERS_MAX: usize = 32;

/// Bytes of a `traceparent` of a version to come. Version 00 has 55.
const PARENT_MAX: usize = 256;

/// The context of a request, well-formed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "Kept", try_from = "Kept")]
pub struct Trace {
    parent: String,
    state: Option<String>,
}

/// A context in a record on disk: the two values.
#[derive(Serialize, Deserialize)]
struct Kept(String, Option<String>);

impl From<Trace> for Kept {
    fn from(trace: Trace) -> Self {
        Self(trace.parent, trace.state)
    }
}

impl TryFrom<Kept> for Trace {
    type Error = &'static str;

    fn try_from(Kept(parent, state): Kept) -> Result<Self, Self::Error> {
        let states: Vec<&str> = state.as_deref().into_iter().collect();
        Self::read(&[&parent], &states).ok_or("no trace context")
    }
}

impl Trace {
    /// Reads the values of the two headers. Without exactly one well-formed `traceparent` there is no context,
    /// whatever `tracestate` says; a broken `tracestate` alone is left out (4.3). Several are one list (3.3.1).
    #[must_use]
    pub fn read(parents: &[&str], states: &[&str]) -> Option<Self> {
        let [parent] = parents else { return None };
        let state = states.join(",");
        is_parent(parent).then(|| Self {
            parent: (*parent).to_owned(),
            state: is_state(&state).then_some(state),
        })
    }

    /// The id of the whole trace: 32 hexadecimal digits.
    #[must_use]
    pub fn id(&self) -> &str {
        self.parent.split('-').nth(1).unwrap_or_default()
    }

    /// Names and values of the headers.
    pub fn headers(&self) -> impl Iterator<Item = (&'static str, String)> {
        let state = self.state.iter().map(|state| (STATE, state.clone()));
        std::iter::once((PARENT, self.parent.clone())).chain(state)
    }
}

/// `version-trace-parent-flags`; of a version to come perhaps more behind another `-` (3.2.4).
fn is_parent(text: &str) -> bool {
    let hex = |part: &str, digits: usize| {
        let digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        part.len() == digits && part.bytes().all(digit)
    };
    let zero = |part: &str| part.bytes().all(|byte| byte == b'0');
    let mut parts = text.splitn(5, '-');
    let mut next = || parts.next().unwrap_or_default();
    let (version, trace, span, flags) = (next(), next(), next(), next());
    let shape = hex(version, 2) && hex(trace, 32) && hex(span, 16) && hex(flags, 2);
    let rest = parts.next();
    let rest = match version {
        "ff" => false,
        "00" => rest.is_none(),
        _ => text.len() <= PARENT_MAX && rest.is_none_or(|rest| rest.bytes().all(printable)),
    };
    shape && rest && !zero(trace) && !zero(span)
}

/// `key=value` and commas, not empty.
fn is_state(text: &str) -> bool {
    let mut members = text.split(',').map(str::trim).filter(|one| !one.is_empty());
    let well_formed = |one: &str| one.split_once('=').is_some_and(|(key, _)| !key.is_empty());
    let count = members.clone().count();
    (1..=MEMBERS_MAX).contains(&count)
        && text.len() <= STATE_MAX
        && text.bytes().all(printable)
        && members.all(well_formed)
}

fn printable(byte: u8) -> bool {
    byte == b' ' || byte.is_ascii_graphic()
}

#[cfg(test)]
mod tests {
    use super::Trace;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn headers(parents: &[&str], states: &[&str]) -> Vec<String> {
        let trace = Trace::read(parents, states);
        let all = trace.iter().flat_map(Trace::headers);
        all.map(|(name, value)| format!("{name}: {value}"))
            .collect()
    }

    #[test]
    fn what_is_well_formed_is_passed_on_unchanged() {
        let state = "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE";
        assert_eq!(
            headers(&[PARENT], &[state]),
            [
                format!("traceparent: {PARENT}"),
                format!("tracestate: {state}")
            ]
        );
        assert_eq!(
            headers(&[PARENT], &["a=1", "b=2, ,c@d= "])[1],
            "tracestate: a=1,b=2, ,c@d= "
        );
        let newer = format!("cc{}-what the future will be like", &PARENT[2..]);
        assert_eq!(headers(&[&newer], &[]), [format!("traceparent: {newer}")]);
        let trace = Trace::read(&[PARENT], &[]).unwrap();
        assert_eq!(trace.id(), "0af7651916cd43dd8448eb211c80319c");
        for states in [&[][..], &["a=1"]] {
            let trace = Trace::read(&[PARENT], states).unwrap();
            let kept = serde_json::to_string(&trace).unwrap();
            assert_eq!(serde_json::from_str::<Trace>(&kept).unwrap(), trace);
            let broken = kept.replace("00-", "00-\\n");
            assert!(serde_json::from_str::<Trace>(&broken).is_err(), "{broken}");
        }
    }

    #[test]
    fn what_is_broken_is_no_context() {
        let changed = |at: usize, to: &str| {
            let mut text = PARENT.to_owned();
            text.replace_range(at..at + to.len(), to);
            text
        };
        for broken in [
            String::new(),
            changed(0, "ff"),
            changed(0, "0") + "-",
            changed(3, "0AF7"),
            changed(3, &"0".repeat(32)),
            changed(36, &"0".repeat(16)),
            changed(36, "g"),
            changed(2, "_"),
            changed(53, "é"),
            PARENT[..54].to_owned(),
            format!("{PARENT}-01"),
            format!("{PARENT} "),
            format!("01{}x", &PARENT[2..]),
            format!("01{}-\n", &PARENT[2..]),
            format!("01{}-{}", &PARENT[2..], "x".repeat(256)),
        ] {
            assert_eq!(headers(&[&broken], &["a=1"]), [""; 0], "{broken:?}");
        }
        assert_eq!(headers(&[PARENT, PARENT], &[]), [""; 0], "which one?");
        assert_eq!(headers(&[], &["a=1"]), [""; 0]);
    }

    #[test]
    fn a_broken_state_is_left_out_alone() {
        let long = format!("a={}", "x".repeat(511));
        let many = vec!["a=1"; 33].join(",");
        for broken in [
            "", " , ", "a", "=1", "a=1,b", "a=\u{7f}", "a=ü", "a=1\nb=2", &long, &many,
        ] {
            assert_eq!(headers(&[PARENT], &[broken]).len(), 1, "{broken:?}");
        }
        assert_eq!(headers(&[PARENT], &[&long[..512]]).len(), 2);
    }
}
