//! As much of HTTP/1.1 (RFC 9112) as a few pages need. Pure.

/// Longest head of a request, in bytes.
pub(super) const HEAD_MAX: usize = 8192;

/// What can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Page {
    /// `GET /metrics`
    Metrics,
    /// `GET /health`
    Health,
    /// `GET /healthz`: the same in one word, for collectors of DEA's time.
    Healthz,
    /// `GET /varz`: for them, too.
    Varz,
}

/// What there is, for whoever asked for something else.
const PAGES: &str =
    "GET /metrics and GET /health are here, and GET /healthz and GET /varz for collectors.\n";

/// Why a request has no page for its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// 400: no HTTP/1 request.
    NotUnderstood,
    /// 404: another page.
    NoSuchPage,
    /// 405: another method.
    OnlyGet,
    /// 431: more than [`HEAD_MAX`].
    TooLarge,
}

/// Whether the end of a head is in `bytes`.
pub(super) fn is_whole(bytes: &[u8]) -> bool {
    bytes.windows(4).any(|end| end == b"\r\n\r\n")
}

/// What a request asks for; its fields say nothing that matters here.
///
/// # Errors
/// What it is answered with instead.
pub fn asked(head: &[u8]) -> Result<Page, Refusal> {
    if !is_whole(head) {
        return Err(match head.len() > HEAD_MAX {
            true => Refusal::TooLarge,
            false => Refusal::NotUnderstood,
        });
    }
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let line = str::from_utf8(line).map_err(|_| Refusal::NotUnderstood)?;
    let words: Vec<&str> = line.split(' ').collect();
    let [method, target, version] = words.as_slice() else {
        return Err(Refusal::NotUnderstood);
    };
    if !version.starts_with("HTTP/1.") {
        return Err(Refusal::NotUnderstood);
    }
    let page = match target.split('?').next() {
        Some("/metrics") => Page::Metrics,
        Some("/health") => Page::Health,
        Some("/healthz") => Page::Healthz,
        Some("/varz") => Page::Varz,
        _ => return Err(Refusal::NoSuchPage),
    };
    match *method {
        "GET" => Ok(page),
        _ => Err(Refusal::OnlyGet),
    }
}

const TEXT: &str = "text/plain; charset=utf-8";

/// What is sent back.
#[derive(Debug)]
pub(super) struct Answer {
    status: &'static str,
    kind: &'static str,
    /// A header line of its own, or nothing.
    header: &'static str,
    body: String,
}

impl Answer {
    pub(super) fn metrics(body: String) -> Self {
        Self {
            status: "200 OK",
            kind: "text/plain; version=0.0.4; charset=utf-8",
            header: "",
            body,
        }
    }

    pub(super) fn health(is_well: bool, body: String) -> Self {
        Self {
            status: match is_well {
                true => "200 OK",
                false => "503 Service Unavailable",
            },
            kind: "application/json",
            header: "Cache-Control: no-store\r\n",
            body,
        }
    }

    /// A collector takes `ok` for good news and all else for bad, whatever the status (cloudfoundry/collector,
    /// `collector.rb`).
    pub(super) fn healthz(failing: &[&str]) -> Self {
        let body = match failing.is_empty() {
            true => "ok\n".to_owned(),
            false => format!("failing: {}\n", failing.join(", ")),
        };
        Self {
            kind: TEXT,
            ..Self::health(failing.is_empty(), body)
        }
    }

    pub(super) fn varz(body: String) -> Self {
        Self::health(true, body)
    }

    pub(super) fn refusal(refusal: Refusal) -> Self {
        let (status, header) = match refusal {
            Refusal::NotUnderstood => ("400 Bad Request", ""),
            Refusal::NoSuchPage => ("404 Not Found", ""),
            Refusal::OnlyGet => ("405 Method Not Allowed", "Allow: GET\r\n"),
            Refusal::TooLarge => ("431 Request Header Fields Too Large", ""),
        };
        Self {
            status,
            kind: TEXT,
            header,
            body: PAGES.into(),
        }
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let (length, body) = (self.body.len(), &self.body);
        let (status, kind, header) = (self.status, self.kind, self.header);
        format!("HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n{header}\r\n{body}").into_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::{Answer, HEAD_MAX, Page, Refusal, asked};

    #[test]
    fn a_collector_reads_ok_only_where_all_is_well() {
        let good = Answer::healthz(&[]);
        assert_eq!((good.status, good.body.as_str()), ("200 OK", "ok\n"));
        let bad = Answer::healthz(&["bus", "stable", "disk", "helpers"]);
        assert_eq!(bad.status, "503 Service Unavailable");
        assert_eq!(bad.body, "failing: bus, stable, disk, helpers\n");
    }

    #[test]
    fn the_pages_are_found_and_everything_else_has_its_reason() {
        let long = format!("GET /{} HTTP/1.1\r\n", "x".repeat(HEAD_MAX));
        for (head, wanted) in [
            ("GET /metrics HTTP/1.1\r\n\r\n", Ok(Page::Metrics)),
            ("GET /health HTTP/1.0\r\nHost: h\r\n\r\n", Ok(Page::Health)),
            ("GET /health?x=%20 HTTP/1.1\r\n\r\nmore", Ok(Page::Health)),
            ("GET /healthz HTTP/1.1\r\n\r\n", Ok(Page::Healthz)),
            ("GET /varz HTTP/1.1\r\n\r\n", Ok(Page::Varz)),
            ("GET / HTTP/1.1\r\n\r\n", Err(Refusal::NoSuchPage)),
            ("GET /metrics/ HTTP/1.1\r\n\r\n", Err(Refusal::NoSuchPage)),
            ("GET //health HTTP/1.1\r\n\r\n", Err(Refusal::NoSuchPage)),
            ("POST /metrics HTTP/1.1\r\n\r\n", Err(Refusal::OnlyGet)),
            ("get /metrics HTTP/1.1\r\n\r\n", Err(Refusal::OnlyGet)),
            ("POST /x HTTP/1.1\r\n\r\n", Err(Refusal::NoSuchPage)),
            ("GET /metrics HTTP/2.0\r\n\r\n", Err(Refusal::NotUnderstood)),
            ("GET /metrics\r\n\r\n", Err(Refusal::NotUnderstood)),
            ("GET /metrics HTTP/1.1\r\n", Err(Refusal::NotUnderstood)),
            ("\r\n\r\n", Err(Refusal::NotUnderstood)),
            ("", Err(Refusal::NotUnderstood)),
            (long.as_str(), Err(Refusal::TooLarge)),
        ] {
            assert_eq!(asked(head.as_bytes()), wanted, "{head:?}");
        }
        let no_text = b"GET /\xff HTTP/1.1\r\n\r\n";
        assert_eq!(asked(no_text), Err(Refusal::NotUnderstood));
    }
}
