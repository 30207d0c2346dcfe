//! What a droplet is known by: the digest of its archive.

use std::fmt;

use serde_json::Value;
use sha1::Digest as _;

/// The digest of a droplet's archive, and so the name it is kept under.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Digest {
    /// What cloud controllers send in `sha1`.
    Sha1([u8; 20]),
    /// The stronger one that Ostler accepts as well.
    Sha256([u8; 32]),
}

/// A text that is no digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no droplet digest: give 40 (SHA-1) or 64 (SHA-256) hexadecimal digits")]
pub struct DigestError(String);

impl Digest {
    /// Reads 40 (SHA-1) or 64 (SHA-256) hexadecimal digits, in either case.
    ///
    /// # Errors
    /// Anything else is refused; the error quotes at most 80 characters of it.
    pub fn from_hex(text: &str) -> Result<Self, DigestError> {
        match text.len() {
            40 => bytes(text).map(Self::Sha1),
            64 => bytes(text).map(Self::Sha256),
            _ => None,
        }
        .ok_or_else(|| DigestError(text.chars().take(80).collect()))
    }

    /// That of the droplet that a start message wants.
    #[must_use]
    pub fn wanted_by(start: &Value) -> Option<Self> {
        let text = |key| start.get(key).and_then(Value::as_str);
        Self::from_hex(text("sha256").or_else(|| text("sha1"))?).ok()
    }
}

/// The name of the droplet's directory: `sha1-3f78…` or `sha256-9f86…`.
impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, bytes): (_, &[u8]) = match self {
            Self::Sha1(bytes) => ("sha1", bytes),
            Self::Sha256(bytes) => ("sha256", bytes),
        };
        write!(f, "{kind}-")?;
        bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

fn bytes<const N: usize>(hex: &str) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    for (byte, digits) in bytes.iter_mut().zip(hex.as_bytes().chunks(2)) {
        // Digit by digit: `from_str_radix` would take a sign as well.
        for digit in digits {
            let value = char::from(*digit).to_digit(16)?;
            *byte = (*byte << 4) | u8::try_from(value).ok()?;
        }
    }
    Some(bytes)
}

/// A digest in the making.
pub(super) enum Hasher {
    Sha1(sha1::Sha1),
    Sha256(sha2::Sha256),
}

impl Hasher {
    /// One of the same kind as `wanted`.
    pub(super) fn like(wanted: &Digest) -> Self {
        match wanted {
            Digest::Sha1(_) => Self::Sha1(sha1::Sha1::new()),
            Digest::Sha256(_) => Self::Sha256(sha2::Sha256::new()),
        }
    }

    pub(super) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha1(hasher) => hasher.update(bytes),
            Self::Sha256(hasher) => hasher.update(bytes),
        }
    }

    pub(super) fn finish(self) -> Digest {
        match self {
            Self::Sha1(hasher) => Digest::Sha1(hasher.finalize().into()),
            Self::Sha256(hasher) => Digest::Sha256(hasher.finalize().into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_both_kinds_and_names_their_directories() {
        let sha1 = Digest::from_hex("3F786850e387550fdab836ed7e6dc881de23001b").unwrap();
        assert_eq!(
            sha1.to_string(),
            "sha1-3f786850e387550fdab836ed7e6dc881de23001b"
        );
        let sha256 = Digest::from_hex(&"0a".repeat(32)).unwrap();
        assert_eq!(sha256.to_string(), format!("sha256-{}", "0a".repeat(32)));
    }

    #[test]
    fn refuses_what_is_no_digest() {
        let wide = "é".repeat(20);
        let cases = [
            "",
            "3f78",
            &"g".repeat(40),
            &"+f".repeat(20),
            &"../".repeat(14),
            &wide,
        ];
        for text in cases {
            let error = Digest::from_hex(text).unwrap_err();
            assert!(error.to_string().contains("hexadecimal"), "{error}");
        }
    }

    #[test]
    fn hashes_as_the_standards_say() {
        for (wanted, hex) in [
            (
                Digest::Sha1([0; 20]),
                "a9993e364706816aba3e25717850c26c9cd0d89d",
            ),
            (
                Digest::Sha256([0; 32]),
                "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            ),
        ] {
            let mut hasher = Hasher::like(&wanted);
            hasher.update(b"ab");
            hasher.update(b"c");
            assert_eq!(hasher.finish(), Digest::from_hex(hex).unwrap());
        }
    }
}
