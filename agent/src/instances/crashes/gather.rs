//! The ends of what a dead instance wrote: its streams, and the files in its directory of logs.
//!
//! The files are a tenant's: any names, any number, any size, and links to anywhere. Only regular files with one
//! name are read, through no symlink and no mount, so what is read belongs to that tenant.

use crate::instances::droplets::tree::{open_below, open_directory};
use container::fault::SysError;
use container::spool::{Cursor, Record, SpoolReader, Stream};
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{FileStat, SFlag, fstatat};
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Where an app's log files are, in its writable layer.
const LOGS: &str = "home/vcap/logs";

/// Entries of directories that are looked at.
const LOOKED_AT: usize = 10_000;

/// Directories below each other that are entered.
const DEPTH: usize = 8;

/// Longest name, in bytes.
const NAME_MAX: usize = 256;

/// How far the first whole line is looked for.
const LINE: usize = 4096;

/// The end of a stream or a file.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) name: String,
    /// Where it begins, counted from the beginning of the whole.
    pub(super) from: u64,
    pub(super) bytes: Vec<u8>,
}

/// Files that can be read, newest first.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) files: Vec<LogFile>,
    /// How many things cannot be, or were not even looked at: at least so many.
    pub(super) left_out: u64,
}

#[derive(Debug)]
pub(super) struct LogFile {
    name: String,
    path: PathBuf,
    changed: (i64, i64),
}

/// The last `most` bytes of each stream of a job, none across a hole.
pub(super) fn streams(job: &Path, most: usize) -> Result<[Piece; 2], SysError> {
    let mut reader = SpoolReader::open(job, Cursor::default())?;
    let mut pieces = Stream::ALL.map(|stream| Piece {
        name: stream.to_string(),
        from: 0,
        bytes: Vec::new(),
    });
    let [stdout, stderr] = &mut pieces;
    // What is torn further on takes nothing from what stands before.
    while let Ok(Some((record, _))) = reader.next() {
        if let Record::Output {
            stream,
            offset,
            bytes,
            ..
        } = record
        {
            let piece = match stream {
                Stream::Stdout => &mut *stdout,
                Stream::Stderr => &mut *stderr,
            };
            piece.append(offset, bytes, most);
        }
    }
    pieces.iter_mut().for_each(|piece| piece.cut(most));
    Ok(pieces)
}

impl Piece {
    fn append(&mut self, offset: u64, bytes: &[u8], most: usize) {
        if self.from + self.bytes.len() as u64 != offset {
            self.from = offset;
            self.bytes.clear();
        }
        self.bytes.extend_from_slice(bytes);
        if self.bytes.len() > most.saturating_mul(2) {
            self.forget(self.bytes.len() - most);
        }
    }

    /// Leaves its end, from a line's beginning on where one is near.
    fn cut(&mut self, most: usize) {
        self.forget(self.bytes.len().saturating_sub(most));
        let near = self.bytes.iter().take(LINE);
        let end_of_line = near.copied().position(|byte| byte == b'\n');
        if let Some(end) = end_of_line
            && self.from > 0
            && end + 1 < self.bytes.len()
        {
            self.forget(end + 1);
        }
    }

    fn forget(&mut self, count: usize) {
        self.bytes.drain(..count);
        self.from += count as u64;
    }
}

/// What there is to be read in the writable layer `upper`.
pub(super) fn log_files(upper: &Path) -> io::Result<(OwnedFd, Found)> {
    let root = open_directory(upper)?;
    let mut found = Found::default();
    let mut looked_at = 0;
    let mut ways = vec![(PathBuf::from(LOGS), 0)];
    while let Some((way, depth)) = ways.pop() {
        let Ok(directory) = open_below(&root, &way) else {
            // There is none, or it is none: a symlink, something mounted.
            found.left_out += u64::from(depth > 0);
            continue;
        };
        let mut entries = Dir::from_fd(directory.try_clone()?)?;
        for entry in entries.iter() {
            let entry = entry?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            if looked_at == LOOKED_AT {
                found.left_out += 1;
                break;
            }
            looked_at += 1;
            let path = way.join(OsStr::from_bytes(name.to_bytes()));
            let stat = fstatat(&directory, name, AtFlags::AT_SYMLINK_NOFOLLOW);
            match stat.map(|stat| seen(&path, &stat)) {
                Ok(Seen::Directory) if depth < DEPTH => ways.push((path, depth + 1)),
                Ok(Seen::File(file)) => found.files.push(file),
                Ok(Seen::Directory | Seen::Other) | Err(_) => found.left_out += 1,
            }
        }
    }
    found.files.sort_by(|one, other| {
        let newest_first = other.changed.cmp(&one.changed);
        newest_first.then_with(|| one.name.cmp(&other.name))
    });
    Ok((root, found))
}

enum Seen {
    Directory,
    File(LogFile),
    Other,
}

fn seen(path: &Path, stat: &FileStat) -> Seen {
    let kind = SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits());
    if kind == SFlag::S_IFDIR {
        return Seen::Directory;
    }
    let name = path.strip_prefix(LOGS).ok().and_then(name);
    match name {
        Some(name) if kind == SFlag::S_IFREG && stat.st_nlink == 1 => Seen::File(LogFile {
            name,
            path: path.to_owned(),
            changed: (stat.st_mtime, stat.st_mtime_nsec),
        }),
        Some(_) | None => Seen::Other,
    }
}

/// A path below the directory of logs as a name to show and to ask for; `None` if it is too long.
fn name(path: &Path) -> Option<String> {
    let bytes = path.as_os_str().as_bytes();
    let text = std::str::from_utf8(bytes).ok();
    let plain = text.filter(|text| !text.contains(char::is_control));
    let name = match plain {
        Some(text) => format!("logs/{text}"),
        None => format!("logs/{}", bytes.escape_ascii()),
    };
    (name.len() <= NAME_MAX).then_some(name)
}

/// The last `most` bytes of a file below `root`.
pub(super) fn read(root: &OwnedFd, file: &LogFile, most: usize) -> io::Result<Piece> {
    let handle = open_file(root, &file.path)?;
    let metadata = handle.metadata()?;
    if !metadata.is_file() || metadata.nlink() != 1 {
        return Err(io::Error::other("it is no regular file with one name"));
    }
    let from = metadata.len().saturating_sub(most as u64);
    let mut bytes = vec![0; usize::try_from(metadata.len() - from).unwrap_or(most)];
    let mut have = 0;
    while let Some(rest) = bytes.get_mut(have..).filter(|rest| !rest.is_empty()) {
        match handle.read_at(rest, from + have as u64)? {
            0 => break,
            count => have += count,
        }
    }
    bytes.truncate(have);
    let mut piece = Piece {
        name: file.name.clone(),
        from,
        bytes,
    };
    piece.cut(most);
    Ok(piece)
}

/// Through no symlink and no mount. Never waits for the other end of a fifo.
fn open_file(root: impl AsFd, path: &Path) -> Result<File, Errno> {
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let how = OpenHow::new().flags(flags).resolve(
        ResolveFlag::RESOLVE_BENEATH
            | ResolveFlag::RESOLVE_NO_SYMLINKS
            | ResolveFlag::RESOLVE_NO_XDEV,
    );
    openat2(root, path, how).map(File::from)
}

#[cfg(test)]
mod tests {
    use super::{LOGS, Piece, log_files, read};
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicBool, Ordering};

    /// A writable layer that goes when the test ends, with its directory of logs.
    struct Layer(PathBuf);

    impl Layer {
        fn new(name: &str) -> Self {
            let path = format!("ostler-gather-{name}-{}", std::process::id());
            let layer = Self(std::env::temp_dir().join(path));
            fs::create_dir_all(layer.logs()).unwrap();
            layer
        }

        fn logs(&self) -> PathBuf {
            self.0.join(LOGS)
        }

        fn pieces(&self, most: usize) -> (Vec<Piece>, u64) {
            let (root, found) = log_files(&self.0).unwrap();
            let read = found.files.iter().map(|file| read(&root, file, most));
            (read.filter_map(Result::ok).collect(), found.left_out)
        }
    }

    impl Drop for Layer {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    fn piece(from: u64, bytes: &[u8]) -> Piece {
        Piece {
            name: "x".into(),
            from,
            bytes: bytes.to_vec(),
        }
    }

    #[test]
    fn an_end_begins_with_a_line_where_one_is_near_and_never_spans_a_hole() {
        let mut end = piece(0, b"");
        end.append(0, b"one\ntwo\n", 6);
        end.append(8, b"three\n", 6);
        end.cut(8);
        assert_eq!(end, piece(8, b"three\n"));
        end.append(14, b"four\nfive\n", 6);
        end.cut(10);
        assert_eq!(end, piece(19, b"five\n"));
        end.append(40, b"after", 6);
        end.cut(8);
        assert_eq!(end, piece(40, b"after"));
        let mut short = piece(0, b"all\nof it");
        short.cut(9);
        assert_eq!(short, piece(0, b"all\nof it"));
    }

    #[test]
    fn the_newest_files_come_first_and_each_by_its_end() {
        let layer = Layer::new("newest");
        let logs = layer.logs();
        fs::create_dir(logs.join("deep")).unwrap();
        for (name, age) in [("old", 20), ("deep/new", 0), ("middle", 10)] {
            fs::write(logs.join(name), format!("{name}\nthe end\n")).unwrap();
            let time = std::time::SystemTime::now() - std::time::Duration::from_secs(age);
            let file = fs::File::open(logs.join(name)).unwrap();
            file.set_modified(time).unwrap();
        }
        let (pieces, left_out) = layer.pieces(10);
        let names: Vec<&str> = pieces.iter().map(|piece| &*piece.name).collect();
        assert_eq!(names, ["logs/deep/new", "logs/middle", "logs/old"]);
        assert_eq!(pieces[0].bytes, b"the end\n");
        assert_eq!((pieces[0].from, pieces[2].from, left_out), (9, 4, 0));
    }

    #[test]
    fn nothing_but_the_tenants_own_files_is_read() {
        let layer = Layer::new("hostile");
        let logs = layer.logs();
        let secret = layer.0.join("secret");
        fs::write(&secret, "secret").unwrap();
        symlink(&secret, logs.join("link")).unwrap();
        symlink(&layer.0, logs.join("directory")).unwrap();
        fs::hard_link(&secret, logs.join("hard")).unwrap();
        nix::unistd::mkfifo(&logs.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(logs.join("socket")).unwrap();
        fs::write(logs.join("a\nb"), "strange").unwrap();
        fs::write(logs.join("x".repeat(255)), "long").unwrap();
        let mut nested = logs.clone();
        for _ in 0..20 {
            nested.push("d");
            fs::create_dir(&nested).unwrap();
        }
        fs::write(nested.join("far"), "far").unwrap();
        let (pieces, left_out) = layer.pieces(100);
        assert_eq!(pieces.len(), 1, "{pieces:?}");
        assert_eq!(
            (&*pieces[0].name, &*pieces[0].bytes),
            ("logs/a\\nb", &b"strange"[..])
        );
        assert_eq!(left_out, 7);
        // The directory itself.
        fs::remove_dir_all(&logs).unwrap();
        symlink("../..", &logs).unwrap();
        assert_eq!(layer.pieces(100), (vec![], 0));
    }

    #[test]
    fn a_directory_that_is_swapped_for_a_symlink_meanwhile_leads_nowhere() {
        let layer = Layer::new("swapped");
        // Within the layer, where it would be followed by whoever only stays inside.
        let (logs, outside) = (layer.logs(), layer.0.join("outside"));
        let [inside, away] = ["deep", "away"].map(|name| logs.join(name));
        for (place, text) in [(&inside, "own"), (&outside, "secret")] {
            fs::create_dir(place).unwrap();
            fs::write(place.join("file"), text).unwrap();
        }
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    fs::rename(&inside, &away).unwrap();
                    symlink("../../../outside", &inside).unwrap();
                    fs::remove_file(&inside).unwrap();
                    fs::rename(&away, &inside).unwrap();
                }
            });
            let pieces = (0..2000).flat_map(|_| layer.pieces(100).0);
            let read: Vec<Vec<u8>> = pieces.map(|piece| piece.bytes).collect();
            over.store(true, Ordering::Relaxed);
            assert!(!read.is_empty());
            assert!(read.iter().all(|bytes| bytes == b"own"), "{read:?}");
        });
    }
}
