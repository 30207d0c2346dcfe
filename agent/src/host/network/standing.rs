//! Where the pools stand, kept across agents: what was handed out last is handed out again last.
//!
//! One line, `<address> <port>`, in a file that is written in place. It needs no sync: whom the agent
//! could confuse (routers, connections in flight) does not outlive the machine either, or finds a
//! number at random where the file is no good.

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use tracing::warn;

/// The line's length in bytes, which never changes: the longest address and port, and a line end.
const LENGTH: usize = 22;

/// The file, or nothing where nobody wants one.
#[derive(Debug)]
pub(super) struct Standing {
    file: Option<(PathBuf, File)>,
}

impl Standing {
    /// Opens the file, and makes it if need be. Gives back, too, the address and the port that were
    /// handed out last, if it says so. Blocks. Without the file the pools work, and forget.
    pub(super) fn open(path: Option<PathBuf>) -> (Self, Option<(Ipv4Addr, u16)>) {
        let Some(path) = path else {
            return (Self { file: None }, None);
        };
        let mut options = File::options();
        options.read(true).write(true).create(true).mode(0o600);
        match options.open(&path) {
            Ok(file) => {
                let last = read(&file);
                let file = Some((path, file));
                (Self { file }, last)
            }
            Err(error) => {
                warn!(path = %path.display(), %error, "where the pools stand is not kept");
                (Self { file: None }, None)
            }
        }
    }

    /// Keeps what was handed out last. A write into the page cache: waits for no disk.
    pub(super) fn keep(&self, address: Ipv4Addr, port: u16) {
        let Some((path, file)) = &self.file else {
            return;
        };
        let line = format!("{:<1$}\n", format!("{address} {port}"), LENGTH - 1);
        if let Err(error) = file.write_all_at(line.as_bytes(), 0) {
            warn!(path = %path.display(), %error, "where the pools stand was not kept");
        }
    }

    /// Removes the file. None is fine.
    pub(super) fn remove(&self) -> io::Result<()> {
        match &self.file {
            Some((path, _)) => match std::fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            },
            None => Ok(()),
        }
    }
}

fn read(file: &File) -> Option<(Ipv4Addr, u16)> {
    let mut line = [0; LENGTH];
    file.read_exact_at(&mut line, 0).ok()?;
    let (address, port) = std::str::from_utf8(&line)
        .ok()?
        .trim_end()
        .split_once(' ')?;
    Some((address.parse().ok()?, port.parse().ok()?))
}
