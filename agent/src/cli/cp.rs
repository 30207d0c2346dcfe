//! `ostler cp`: files and directories between the host and a container.

use super::{Outcome, open};
use crate::config::Overrides;
use crate::engine::{Copied, Inside, copy_into, copy_out, pour, unpack_apart};
use container::copy::{Limits, Links, Naming, pack};
use nix::sys::stat::{Mode, umask};
use std::ffi::{OsStr, OsString};
use std::io::{BufWriter, IsTerminal};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// What `ostler cp` copies.
#[derive(Debug, clap::Args)]
pub struct CopyArguments {
    /// Where from: HANDLE:PATH is in a container, - a tar stream on standard input.
    #[arg(value_name = "SOURCE")]
    pub source: OsString,
    /// Where to: HANDLE:PATH is in a container, - a tar stream on standard output. A symlink of the host's
    /// is refused, unless a slash follows it.
    #[arg(value_name = "TARGET")]
    pub target: OsString,
    /// As whom the container's files are read or made: a name or number of its /etc/passwd.
    #[arg(long, default_value = "root")]
    pub user: String,
    /// Copy what symlinks point to in place of the symlinks.
    #[arg(long, short = 'L')]
    pub follow: bool,
    /// Most megabytes that are taken out of a container.
    #[arg(long, value_name = "MB", default_value_t = 16 * 1024)]
    pub max_mb: u64,
}

/// Most files, links and directories that are taken out of a container.
const MAX_ENTRIES: u64 = 1_000_000;

/// As `cp -r`: what a container calls writable for all is not that on the host.
fn umask_now() -> u32 {
    let mask = umask(Mode::empty());
    umask(mask);
    mask.bits()
}

/// One side of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Side {
    Host(PathBuf),
    /// Standard input or output.
    Stream,
    /// Which container, and where in it.
    Container(String, PathBuf),
}

/// A path of the host begins with `/` or `.`, or has no colon.
fn side(text: &OsStr) -> Side {
    let bytes = text.as_bytes();
    if bytes == b"-" {
        return Side::Stream;
    }
    let colon = bytes.iter().position(|byte| *byte == b':');
    let parts = colon.and_then(|at| Some((bytes.get(..at)?, bytes.get(at + 1..)?)));
    let named = parts.and_then(|(which, path)| Some((std::str::from_utf8(which).ok()?, path)));
    match named {
        Some((which, path)) if !bytes.starts_with(b"/") && !bytes.starts_with(b".") => {
            // Nothing: the user's home.
            let path = if path.is_empty() { &b"."[..] } else { path };
            let path = OsString::from_vec(path.to_vec()).into();
            Side::Container(which.to_owned(), path)
        }
        _ => Side::Host(text.into()),
    }
}

/// Copies.
///
/// # Errors
/// Not root, no such container or path, or not everything could be copied.
pub fn cp(config: &Path, overrides: Overrides, cp: &CopyArguments) -> Outcome<()> {
    let links = if cp.follow {
        Links::Follow
    } else {
        Links::Keep
    };
    let limits = Limits {
        bytes: cp.max_mb.saturating_mul(1 << 20),
        entries: MAX_ENTRIES,
        modes: 0o777 & !umask_now(),
    };
    match (side(&cp.source), side(&cp.target)) {
        (Side::Container(which, path), to @ (Side::Host(_) | Side::Stream)) => {
            let (_, socket) = open(config, overrides, &which)?;
            let from = inside(&socket, cp, &path);
            out(&from, links, &to, limits)
        }
        (from @ (Side::Host(_) | Side::Stream), Side::Container(which, path)) => {
            let (_, socket) = open(config, overrides, &which)?;
            let to = inside(&socket, cp, &path);
            into(&from, links, &to)
        }
        _ => {
            Err("one of SOURCE and TARGET must be HANDLE:PATH, in a container, and one not".into())
        }
    }
}

fn inside<'a>(socket: &'a Path, cp: &'a CopyArguments, path: &'a Path) -> Inside<'a> {
    Inside {
        socket,
        user: &cp.user,
        path,
    }
}

fn out(from: &Inside<'_>, links: Links, to: &Side, limits: Limits) -> Outcome<()> {
    let Side::Host(path) = to else {
        let stdout = std::io::stdout();
        if stdout.is_terminal() {
            return Err("a tar stream is nothing for a terminal".into());
        }
        let copied = copy_out(from, links, |stream| {
            pour(stream, &mut stdout.lock(), limits.bytes)
        })?;
        return tell(&copied, 0);
    };
    let copied = copy_out(from, links, |stream| {
        unpack_apart(from.path, stream, path, limits, &mut complain)
    })?;
    tell(&copied, 0)
}

fn into(from: &Side, links: Links, to: &Inside<'_>) -> Outcome<()> {
    let Side::Host(path) = from else {
        let mut stdin = std::io::stdin().lock();
        let copied = copy_into(to, Naming::AsGiven, |stream| {
            pour(&mut stdin, stream, u64::MAX)
        })?;
        return tell(&copied, 0);
    };
    let copied = copy_into(to, Naming::AsCopied, |stream| {
        let stream = BufWriter::with_capacity(64 * 1024, stream);
        pack(path, links, stream, &mut complain)
    })?;
    tell(&copied, copied.done.damaged)
}

fn complain(line: String) {
    eprintln!("ostler: {line}");
}

fn tell<T>(copied: &Copied<T>, damaged: u64) -> Outcome<()> {
    for line in &copied.complaints {
        eprintln!("ostler: in the container: {line}");
    }
    if copied.damaged || damaged > 0 {
        return Err("not everything could be copied as it was".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{Side, side};

    #[test]
    fn a_side_is_of_the_host_unless_it_names_a_container() {
        let inside = |which: &str, path: &str| Side::Container(which.to_owned(), path.into());
        for (text, wanted) in [
            ("-", Side::Stream),
            ("app:/tmp/x", inside("app", "/tmp/x")),
            ("app/0:logs:old", inside("app/0", "logs:old")),
            ("app:", inside("app", ".")),
            ("file", Side::Host("file".into())),
            ("./a:b", Side::Host("./a:b".into())),
            ("/a:b", Side::Host("/a:b".into())),
        ] {
            assert_eq!(side(text.as_ref()), wanted, "{text}");
        }
    }
}
