//! Answers to commands: `{"ok":true, …}` or `{"ok":false,"dea":…,"error":{…}}`, one per host and request.

use serde_json::{Map, Value, json};

/// Why a command was refused. The names are stable; the numbers are those of
/// `Nats-Service-Error-Code`, after HTTP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorCode {
    /// The body is no JSON.
    BadJson,
    /// A field is absent, of a wrong type, or has an impossible value.
    BadField,
    /// No command has this subject.
    BadSubject,
    /// The stack is not configured on this host.
    UnknownStack,
    /// No start of this app was accepted on this host.
    UnknownApp,
    /// The memory is reserved by others.
    NotEnoughMemory,
    /// The disk is reserved by others.
    NotEnoughDisk,
    /// This host has as many instances as it may have.
    HostFull,
    /// Too much is asked at once.
    Busy,
    /// This host is shutting down.
    ShuttingDown,
    /// What was waited for cannot happen any more: the instance ended.
    Ended,
    /// What was waited for cannot happen yet: processes of the instance wait in the kernel and do not die.
    Stuck,
    /// The answer does not fit into one message.
    TooLarge,
    /// A fault of the agent.
    Internal,
}

/// Most characters of an error's message: it goes into the body and into a header, and may repeat what
/// a sender wrote.
const MESSAGE_MAX: usize = 1000;

impl ErrorCode {
    /// Every code.
    pub const ALL: [Self; 14] = [
        Self::BadJson,
        Self::BadField,
        Self::BadSubject,
        Self::UnknownStack,
        Self::UnknownApp,
        Self::NotEnoughMemory,
        Self::NotEnoughDisk,
        Self::HostFull,
        Self::Busy,
        Self::ShuttingDown,
        Self::Ended,
        Self::Stuck,
        Self::TooLarge,
        Self::Internal,
    ];

    /// The stable name, the number, and whether the same command may succeed later.
    #[must_use]
    pub fn facts(self) -> (&'static str, u16, bool) {
        match self {
            Self::BadJson => ("bad_json", 400, false),
            Self::BadField => ("bad_field", 400, false),
            Self::BadSubject => ("bad_subject", 404, false),
            Self::UnknownStack => ("unknown_stack", 404, false),
            Self::UnknownApp => ("unknown_app", 404, false),
            Self::NotEnoughMemory => ("not_enough_memory", 507, true),
            Self::NotEnoughDisk => ("not_enough_disk", 507, true),
            Self::HostFull => ("host_full", 507, true),
            Self::Busy => ("busy", 429, true),
            Self::ShuttingDown => ("shutting_down", 503, true),
            Self::Ended => ("ended", 410, false),
            Self::Stuck => ("stuck", 504, true),
            Self::TooLarge => ("too_large", 413, false),
            Self::Internal => ("internal", 500, true),
        }
    }
}

/// One answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// It was done or accepted; the fields beside `ok`.
    Ok(Map<String, Value>),
    /// It was refused.
    Error {
        /// Why, for programs.
        code: ErrorCode,
        /// Why, for people: what, where, and what to do.
        message: String,
    },
}

impl Reply {
    /// Done or accepted, with these fields, an object.
    #[must_use]
    pub fn ok(mut fields: Value) -> Self {
        Self::Ok(
            fields
                .as_object_mut()
                .map(std::mem::take)
                .unwrap_or_default(),
        )
    }

    /// Refused. A message of more than 1000 characters is cut.
    #[must_use]
    pub fn error(code: ErrorCode, message: impl Into<String>) -> Self {
        let mut message: String = message.into();
        if let Some((at, _)) = message.char_indices().nth(MESSAGE_MAX) {
            message.truncate(at);
            message.push('…');
        }
        Self::Error { code, message }
    }

    /// This error with a message that is shorter by a character or so; `None` if there is no message to cut.
    #[must_use]
    pub fn cut(&self) -> Option<Self> {
        let Self::Error { code, message } = self else {
            return None;
        };
        let mut rest = message.strip_suffix('…').unwrap_or(message).to_owned();
        rest.pop().or_else(|| message.chars().next())?;
        if !rest.is_empty() {
            rest.push('…');
        }
        Some(Self::Error {
            code: *code,
            message: rest,
        })
    }

    /// The body.
    #[must_use]
    pub fn body(&self) -> Vec<u8> {
        self.value().to_string().into_bytes()
    }

    /// The body as this host answers: an error, too, says whose it is.
    #[must_use]
    pub fn body_of(&self, dea: &str) -> Vec<u8> {
        let mut body = self.value();
        if let (Self::Error { .. }, Value::Object(fields)) = (self, &mut body) {
            fields.insert("dea".into(), dea.into());
        }
        body.to_string().into_bytes()
    }

    fn value(&self) -> Value {
        match self {
            Self::Ok(fields) => {
                let mut body = Map::new();
                body.insert("ok".into(), Value::Bool(true));
                body.extend(fields.clone());
                Value::Object(body)
            }
            Self::Error { code, message } => {
                let (name, _, retryable) = code.facts();
                json!({"ok": false, "error": {"code": name, "message": message, "retryable": retryable}})
            }
        }
    }

    /// `Nats-Service-Error` and `Nats-Service-Error-Code`; nothing for a good answer. The text is one
    /// line, as a header must be.
    #[must_use]
    pub fn headers(&self) -> Vec<(&'static str, String)> {
        match self {
            Self::Ok(_) => Vec::new(),
            Self::Error { code, message } => {
                let (name, number, _) = code.facts();
                let text: String = message
                    .chars()
                    .map(|c| if c.is_ascii_graphic() { c } else { ' ' })
                    .collect();
                vec![
                    ("Nats-Service-Error", format!("{name}: {text}")),
                    ("Nats-Service-Error-Code", number.to_string()),
                ]
            }
        }
    }

    /// Whether asking again may bring another answer.
    #[must_use]
    pub fn retryable(&self) -> bool {
        match self {
            Self::Ok(_) => false,
            Self::Error { code, .. } => code.facts().2,
        }
    }

    /// The words of `droplet.exited` for a refused start: the DEA's own where it had some.
    #[must_use]
    pub fn exit_description(&self) -> String {
        match self {
            Self::Ok(_) => String::new(),
            Self::Error {
                code: ErrorCode::NotEnoughMemory,
                ..
            } => "Not enough memory resource available.".into(),
            Self::Error {
                code: ErrorCode::NotEnoughDisk,
                ..
            } => "Not enough disk resource available.".into(),
            Self::Error { message, .. } => format!("failed to start: {message}"),
        }
    }

    /// Reads [`Reply::body`] back.
    #[must_use]
    pub fn from_body(body: &[u8]) -> Option<Self> {
        let Value::Object(mut body) = serde_json::from_slice(body).ok()? else {
            return None;
        };
        if body.remove("ok")?.as_bool()? {
            return Some(Self::Ok(body));
        }
        let error = body.get("error")?;
        let name = error.get("code")?.as_str()?;
        let code = ErrorCode::ALL
            .into_iter()
            .find(|code| code.facts().0 == name)?;
        Some(Self::Error {
            code,
            message: error.get("message")?.as_str()?.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{ErrorCode, Reply};
    use serde_json::json;

    #[test]
    fn an_error_is_cut_to_its_code() {
        let mut reply = Reply::error(ErrorCode::Busy, "né…");
        let mut said = Vec::new();
        while let Some(shorter) = reply.cut() {
            let Reply::Error { code, message } = &shorter else {
                panic!("{shorter:?}")
            };
            assert_eq!(*code, ErrorCode::Busy);
            said.push(message.clone());
            reply = shorter;
        }
        assert_eq!(said, ["n…", ""]);
        assert_eq!(Reply::error(ErrorCode::Busy, "…").cut(), Some(reply));
        assert_eq!(Reply::ok(json!({})).cut(), None);
    }

    #[test]
    fn answers_survive_their_bodies() {
        let mut all = vec![Reply::ok(json!({})), Reply::ok(json!({"matched": 2}))];
        all.extend(ErrorCode::ALL.map(|code| Reply::error(code, "why")));
        for reply in all {
            assert_eq!(Reply::from_body(&reply.body()), Some(reply));
        }
        for foreign in ["", "{}", "[]", "{\"ok\":1}", "{\"ok\":false}"] {
            assert_eq!(Reply::from_body(foreign.as_bytes()), None);
        }
    }

    /// The table in docs/bus.md: `| code | number | yes or no | when |`.
    #[test]
    fn the_documents_have_every_code() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/bus.md");
        let text = std::fs::read_to_string(path).unwrap();
        let rows = text.lines().filter_map(|line| {
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            let [_, code, number, retryable, when, _] = cells[..] else {
                return None;
            };
            let number: u16 = number.parse().ok()?;
            assert!(!when.is_empty(), "{line}");
            Some((
                code.trim_matches('`').to_owned(),
                number,
                retryable == "yes",
            ))
        });
        let mut told: Vec<_> = rows.collect();
        let own =
            |(name, number, retryable): (&str, u16, bool)| (name.to_owned(), number, retryable);
        let mut all: Vec<_> = ErrorCode::ALL.map(|code| own(code.facts())).into();
        told.sort();
        all.sort();
        assert_eq!(told, all);
    }

    #[test]
    fn an_error_header_is_one_line() {
        let headers = Reply::error(ErrorCode::BadField, "a\r\nNats-Evil: 1 ü").headers();
        assert_eq!(headers[0].1, "bad_field: a  Nats-Evil: 1  ");
        assert_eq!(headers[1].1, "400");
    }
}
