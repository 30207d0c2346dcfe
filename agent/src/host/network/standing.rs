//! Where the pools stand, kept across agents: what was handed out last is handed out again last, and what
//! rests goes on resting.
//!
//! Lines of two words: first `<address> <port>`, given out last, then `<address or port> <when>` for each
//! that rests, given back so many seconds after 1970. The file is written beside its place and renamed. It
//! needs no sync: whom the agent could confuse (routers, connections in flight) does not outlive the machine
//! either, or finds a number at random where the file is no good.

use crate::host::in_background;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::net::Ipv4Addr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tracing::warn;

/// What is kept.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Kept {
    /// Given out last.
    pub(super) last: Option<(Ipv4Addr, u16)>,
    /// Given back, in seconds since 1970.
    pub(super) addresses: Vec<(Ipv4Addr, u64)>,
    /// The same of ports.
    pub(super) ports: Vec<(u16, u64)>,
}

/// The keeper of the file.
#[derive(Debug)]
pub(super) struct Standing {
    /// Held while the file is written. `None`: nobody wants one, or none any more.
    path: Mutex<Option<PathBuf>>,
    /// Something is to be kept, and somebody will see to it.
    due: AtomicBool,
}

impl Standing {
    /// Reads the file. Blocks. Without it the pools work, and forget.
    pub(super) fn open(path: Option<PathBuf>) -> (Self, Kept) {
        let kept = path.as_deref().map(read).unwrap_or_default();
        let standing = Self {
            path: Mutex::new(path),
            due: AtomicBool::new(false),
        };
        (standing, kept)
    }

    /// Keeps, where blocking is allowed, what `now` says when its turn comes. Calls that come before that
    /// are one: never more than one writes and one waits.
    pub(super) fn keep(self: &Arc<Self>, now: impl FnOnce() -> Kept + Send + 'static) {
        if !self.due.swap(true, Ordering::SeqCst) {
            let standing = Arc::clone(self);
            in_background(move || standing.write(now));
        }
    }

    fn write(&self, now: impl FnOnce() -> Kept) {
        let path = self.path();
        let Some(path) = path.as_deref() else {
            return;
        };
        // Before it is asked what to keep: who comes later finds that nobody will see to it.
        self.due.store(false, Ordering::SeqCst);
        if let Err(error) = replace(path, &now().text()) {
            warn!(path = %path.display(), %error, "where the pools stand was not kept");
        }
    }

    /// Writes the last word, for good: the file is gone unless ports rest. Blocks.
    pub(super) fn finish(&self, kept: &Kept) -> io::Result<()> {
        let Some(path) = self.path().take() else {
            return Ok(());
        };
        if !kept.ports.is_empty() {
            return replace(&path, &kept.text());
        }
        for path in [beside(&path), path] {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    fn path(&self) -> MutexGuard<'_, Option<PathBuf>> {
        self.path.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn text(&self) -> String {
        let mut text = String::new();
        if let Some((address, port)) = self.last {
            let _ = writeln!(text, "{address} {port}");
        }
        for (address, when) in &self.addresses {
            let _ = writeln!(text, "{address} {when}");
        }
        for (port, when) in &self.ports {
            let _ = writeln!(text, "{port} {when}");
        }
        text
    }

    /// Of what is not understood, the rest.
    fn parse(text: &str) -> Self {
        let mut lines = text.lines().map(|line| line.trim_end().split_once(' '));
        let mut kept = Self::default();
        let Some(Some((address, port))) = lines.next() else {
            return kept;
        };
        kept.last = address.parse().ok().zip(port.parse().ok());
        for (number, when) in lines.flatten() {
            let Ok(when) = when.parse() else { continue };
            if let Ok(address) = number.parse() {
                kept.addresses.push((address, when));
            } else if let Ok(port) = number.parse() {
                kept.ports.push((port, when));
            }
        }
        kept
    }
}

/// Where the pools stand, written again as it is understood.
#[must_use]
pub fn again(text: &str) -> String {
    Kept::parse(text).text()
}

fn read(path: &Path) -> Kept {
    match fs::read_to_string(path) {
        Ok(text) => Kept::parse(&text),
        Err(error) => {
            if error.kind() != io::ErrorKind::NotFound {
                warn!(path = %path.display(), %error, "where the pools stood is not known");
            }
            Kept::default()
        }
    }
}

fn replace(path: &Path, text: &str) -> io::Result<()> {
    let new = beside(path);
    let mut options = File::options();
    options.write(true).create(true).truncate(true).mode(0o600);
    options.open(&new)?.write_all(text.as_bytes())?;
    fs::rename(new, path)
}

fn beside(path: &Path) -> PathBuf {
    path.with_extension("new")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_read_and_what_is_not_understood_is_not() {
        let kept = Kept {
            last: Some(([10, 254, 0, 2].into(), 61_001)),
            addresses: vec![([10, 254, 0, 6].into(), 1_800_000_000)],
            ports: vec![(61_002, 1_800_000_000), (61_003, 1_800_000_001)],
        };
        assert_eq!(Kept::parse(&kept.text()), kept);
        // As an older agent wrote it; torn.
        let old = Kept::parse("10.254.0.2 61001      \n");
        assert_eq!((old.last, old.ports.len()), (kept.last, 0));
        let torn = Kept::parse(&(kept.text() + "61004 \n61005 x\nno 1\n610"));
        assert_eq!(torn, kept);
        for garbage in ["", "\n", "61002 1800000000 1\n", "no address 1\n"] {
            assert_eq!(Kept::parse(garbage), Kept::default(), "{garbage}");
        }
    }
}
