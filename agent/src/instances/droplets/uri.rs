//! Where a droplet comes from: the URI taken apart, its secrets kept out of every text.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use ureq::http::Uri;
use ureq::http::uri::Authority;

use super::error::DropletError;

/// A droplet URI that can be fetched.
#[derive(PartialEq, Eq)]
pub(crate) struct Source {
    /// The URI as errors and logs may show it: without userinfo, query and fragment.
    pub(crate) shown: String,
    pub(super) place: Place,
}

/// Where the bytes are. No `Debug`: it holds credentials.
#[derive(PartialEq, Eq)]
pub(super) enum Place {
    /// `http://` or `https://`.
    Web {
        /// Without userinfo.
        uri: Uri,
        /// The value of an `Authorization` header, from the userinfo.
        authorization: Option<String>,
    },
    /// `file://`: an absolute path on this host.
    File(PathBuf),
}

/// Takes `uri` apart.
///
/// # Errors
/// [`DropletError::Uri`] if it is no http, https or file URI. Of such a text nothing but the scheme is
/// shown: where a password ends cannot be told in what does not parse.
pub(crate) fn parse(uri: &str) -> Result<Source, DropletError> {
    let parsed = match uri.strip_prefix("file://") {
        Some(rest) => file(rest),
        None => web(uri),
    };
    parsed.map_err(|why| DropletError::Uri {
        uri: scheme_only(uri),
        why,
    })
}

fn file(rest: &str) -> Result<Source, &'static str> {
    let path = rest.strip_prefix("localhost").unwrap_or(rest);
    if !path.starts_with('/') {
        return Err("a file URI names an absolute path: file:///path/to/droplet.tgz");
    }
    let shown = printable(&format!("file://{path}"));
    let path = percent_decode(path);
    if path.contains(&0) {
        return Err("the path holds a NUL");
    }
    Ok(Source {
        shown,
        place: Place::File(OsString::from_vec(path).into()),
    })
}

fn web(uri: &str) -> Result<Source, &'static str> {
    let parsed: Uri = uri.parse().map_err(|_| "it is no valid URI")?;
    let scheme = match parsed.scheme_str() {
        Some(scheme @ ("http" | "https")) => scheme.to_owned(),
        Some(_) | None => return Err("droplets come by http, https or file"),
    };
    let authority = parsed.authority().ok_or("it names no host")?.as_str();
    let (userinfo, host) = match authority.rsplit_once('@') {
        Some((userinfo, host)) => (Some(userinfo.to_owned()), host.to_owned()),
        None => (None, authority.to_owned()),
    };
    let mut parts = parsed.into_parts();
    let authority: Authority = host.parse().map_err(|_| "it names no valid host")?;
    let port_missing = authority.port_u16().is_none() && authority.as_str() != authority.host();
    if authority.host().is_empty() || port_missing {
        return Err("it names no valid host and port");
    }
    parts.authority = Some(authority);
    let uri = Uri::from_parts(parts).map_err(|_| "it is no valid URI")?;
    let shown = printable(&format!("{scheme}://{host}{}", uri.path()));
    let authorization = userinfo.as_deref().map(basic);
    Ok(Source {
        shown,
        place: Place::Web { uri, authorization },
    })
}

fn scheme_only(uri: &str) -> String {
    match uri.split_once("://") {
        Some((scheme, _)) if scheme.len() <= 10 => printable(&format!("{scheme}://…")),
        Some(_) | None => "…".to_owned(),
    }
}

/// At most 300 characters, none of them a control character.
fn printable(text: &str) -> String {
    text.chars()
        .take(300)
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

/// The `Authorization` header for `user:password` as a URI holds it (RFC 7617).
fn basic(userinfo: &str) -> String {
    let (user, password) = userinfo.split_once(':').unwrap_or((userinfo, ""));
    let mut plain = percent_decode(user);
    plain.push(b':');
    plain.extend(percent_decode(password));
    format!("Basic {}", base64(&plain))
}

/// `%41` becomes `A`; a `%` that begins no escape stays.
pub(crate) fn percent_decode(text: &str) -> Vec<u8> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let escape = match (byte, after) {
            (b'%', [high, low, tail @ ..]) => hex(*high)
                .zip(hex(*low))
                .map(|(high, low)| (high << 4 | low, tail)),
            _ => None,
        };
        let (byte, tail) = escape.unwrap_or((byte, after));
        decoded.push(byte);
        rest = tail;
    }
    decoded
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit)
        .to_digit(16)
        .and_then(|value| u8::try_from(value).ok())
}

/// Base 64 with padding (RFC 4648, section 4).
pub(crate) fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let at = |i: usize| u32::from(three.get(i).copied().unwrap_or(0));
        let word = at(0) << 16 | at(1) << 8 | at(2);
        for place in 0..4 {
            let digit = DIGITS.get((word >> (18 - 6 * place) & 63) as usize);
            let digit = digit
                .filter(|_| place <= three.len())
                .copied()
                .unwrap_or(b'=');
            text.push(char::from(digit));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn web(uri: &str) -> (String, Option<String>, String) {
        let source = parse(uri).unwrap();
        match source.place {
            Place::Web { uri, authorization } => (uri.to_string(), authorization, source.shown),
            Place::File(path) => panic!("{path:?}"),
        }
    }

    #[test]
    fn userinfo_becomes_a_header_and_is_shown_nowhere() {
        let (uri, authorization, shown) = web("http://bits:s3%40cret@10.0.4.20:9022/d?sig=abc");
        assert_eq!(uri, "http://10.0.4.20:9022/d?sig=abc");
        assert_eq!(
            authorization.unwrap(),
            format!("Basic {}", base64(b"bits:s3@cret"))
        );
        assert_eq!(shown, "http://10.0.4.20:9022/d");
    }

    #[test]
    fn a_plain_uri_stays() {
        let (uri, authorization, shown) = web("https://[::1]:8443/a/b");
        assert_eq!(uri, "https://[::1]:8443/a/b");
        assert_eq!(
            (authorization, shown.as_str()),
            (None, "https://[::1]:8443/a/b")
        );
    }

    #[test]
    fn a_file_uri_is_a_path() {
        for uri in ["file:///srv/a%20b.tgz", "file://localhost/srv/a b.tgz"] {
            assert!(
                parse(uri).unwrap().place == Place::File("/srv/a b.tgz".into()),
                "{uri}"
            );
        }
    }

    #[test]
    fn what_cannot_be_used_is_refused_without_telling_secrets() {
        for uri in [
            "",
            "droplet.tgz",
            "ftp://u:s3cret@host/x",
            "file://other/srv/x",
            "file:///srv/%00",
            "http://",
            "http://u:s3cret@",
            "http://u:s3cret@:80/",
            "http://u:s3cret@ho st/x",
            "http://u:s3/cret@host/x",
            "http://u:s3?cret@host/x",
            "http://host:/x",
            "http://host:port/x",
            "u:s3cret@host/x",
            "http://host/\u{7}?s3cret",
        ] {
            let error = parse(uri)
                .err()
                .unwrap_or_else(|| panic!("{uri} was taken"));
            let text = format!("{error} {error:?}");
            assert!(
                !text.contains("s3cret") && !text.contains("s3") && !text.contains("cret@"),
                "{text}"
            );
            assert!(!text.contains('\u{7}'), "{text}");
        }
    }

    #[test]
    fn base64_is_that_of_the_rfc() {
        let pairs = [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foobar", "Zm9vYmFy"),
        ];
        for (plain, encoded) in pairs {
            assert_eq!(base64(plain.as_bytes()), encoded);
        }
        assert_eq!(base64(&[0xff, 0xfe]), "//4=");
    }
}
