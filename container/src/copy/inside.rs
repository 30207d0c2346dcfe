//! The container's side: what a copying job of `wshd` does in place of executing a program.

use super::{Fault, Limits, errno_of, pack, unpack};
use crate::job::Copy;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufReader, BufWriter, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Most complaints that are written: whoever asked reads them at the end, and a pipe holds 64 KiB.
const MAX_COMPLAINTS: u32 = 100;

/// Copies from or to descriptor 0 or 1, complains on 2. The result is the exit code of the job:
/// [`Copy::WHOLE`] and so on.
pub(crate) fn run(copy: &Copy) -> u8 {
    let mut told = 0;
    let mut complain = |line: String| {
        told += 1;
        if told <= MAX_COMPLAINTS {
            say(&line);
        }
    };
    let done = match copy {
        Copy::Out { path, links } => {
            // By a copy of its descriptor: the library's own has a buffer for lines.
            let to = own(std::io::stdout()).map(|to| BufWriter::with_capacity(64 * 1024, to));
            to.and_then(|to| {
                pack(
                    Path::new(OsStr::from_bytes(path)),
                    *links,
                    to,
                    &mut complain,
                )
            })
        }
        Copy::In { path, naming } => {
            let from = own(std::io::stdin()).map(|from| BufReader::with_capacity(64 * 1024, from));
            let path = Path::new(OsStr::from_bytes(path));
            // The container's own disk limit binds.
            from.and_then(|from| unpack(from, path, *naming, Limits::NONE, &mut complain))
        }
    };
    if told > MAX_COMPLAINTS {
        say(&format!("and {} more", told - MAX_COMPLAINTS));
    }
    match done {
        Ok(done) if done.damaged == 0 => Copy::WHOLE,
        Ok(_) => Copy::DAMAGED,
        Err(fault) => {
            // Whoever cut the stream knows why.
            if !matches!(fault, Fault::Stream(_)) {
                say(&fault.to_string());
            }
            Copy::FAILED
        }
    }
}

fn own(fd: impl AsFd) -> Result<File, Fault> {
    let copy = fd.as_fd().try_clone_to_owned();
    copy.map(File::from)
        .map_err(|error| Fault::Stream(errno_of(&error)))
}

/// Nobody may be there to hear it.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}
