//! The stream: POSIX tar (ustar with pax headers, pax(1)), written and read. Reading also takes GNU tar's
//! long names and large numbers.

use super::{Fault, PATH_MAX, errno_of};
use nix::errno::Errno;
use std::io::{self, Read, Write};

const BLOCK: usize = 512;
const ZEROS: [u8; BLOCK] = [0; BLOCK];

/// Most bytes of an entry's extended header or long name: a path has 4 KiB, and some writers add attributes.
const MAX_EXTRA: u64 = 256 * 1024;

/// Most bytes after the end mark; GNU tar fills up to 10 KiB, pipes of others to a MiB.
const MAX_TAIL: u64 = 1 << 20;

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Directory,
    /// To this target.
    Symlink(Vec<u8>),
    /// To the entry with this path.
    HardLink(Vec<u8>),
    /// A device, a fifo, or nobody knows.
    Other,
}

/// One entry's header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) path: Vec<u8>,
    pub(super) kind: Kind,
    /// Bytes that follow.
    pub(super) size: u64,
    /// All that the header says, set-id bits too.
    pub(super) mode: u32,
    /// Seconds since the epoch.
    pub(super) modified: i64,
}

/// Writes entries one after the other.
pub(super) struct Writer<W> {
    to: W,
}

impl<W: Write> Writer<W> {
    pub(super) fn new(to: W) -> Self {
        Self { to }
    }

    /// Writes a header; `size` bytes of content must follow by [`Self::content`].
    pub(super) fn entry(&mut self, entry: &Entry) -> Result<(), Fault> {
        let (flag, target): (u8, &[u8]) = match &entry.kind {
            Kind::File => (b'0', b""),
            Kind::Directory => (b'5', b""),
            Kind::Symlink(target) => (b'2', target),
            Kind::HardLink(target) => (b'1', target),
            Kind::Other => return Err(Fault::Malformed("an entry of no kind")),
        };
        let mut records = Vec::new();
        let mut size = entry.size;
        if entry.path.len() > 100 {
            record(&mut records, "path", &entry.path);
        }
        if target.len() > 100 {
            record(&mut records, "linkpath", target);
        }
        if size > MAX_OCTAL {
            record(&mut records, "size", size.to_string().as_bytes());
            size = 0;
        }
        if !records.is_empty() {
            let length = records.len() as u64;
            self.write(&header(b"@PaxHeader", b'x', b"", length, 0o644, 0))?;
            self.write(&records)?;
            self.pad(length)?;
        }
        let (mode, modified) = (entry.mode & 0o7777, entry.modified);
        self.write(&header(&entry.path, flag, target, size, mode, modified))
    }

    pub(super) fn content(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        self.write(bytes)
    }

    /// Fills up the last block of a content of this length.
    pub(super) fn pad(&mut self, length: u64) -> Result<(), Fault> {
        let fill = ZEROS.get(..padding(length)).unwrap_or_default();
        self.write(fill)
    }

    /// Writes the end mark.
    pub(super) fn finish(mut self) -> Result<(), Fault> {
        self.write(&ZEROS)?;
        self.write(&ZEROS)?;
        self.to
            .flush()
            .map_err(|error| Fault::Stream(errno_of(&error)))
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        let written = self.to.write_all(bytes);
        written.map_err(|error| Fault::Stream(errno_of(&error)))
    }
}

/// Bytes from the end of a content to the end of its block.
fn padding(length: u64) -> usize {
    let over = usize::try_from(length % BLOCK as u64).unwrap_or(0);
    (BLOCK - over) % BLOCK
}

/// A pax record: its length in decimal, which counts itself, ` name=value\n`.
fn record(records: &mut Vec<u8>, name: &str, value: &[u8]) {
    let rest = name.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    records.extend(format!("{length} {name}=").bytes());
    records.extend(value);
    records.push(b'\n');
}

/// The largest number of eleven octal digits.
const MAX_OCTAL: u64 = 0o777_7777_7777;

/// Where the fields of a header are: offset and length.
mod field {
    pub(super) const NAME: (usize, usize) = (0, 100);
    pub(super) const MODE: (usize, usize) = (100, 8);
    pub(super) const UID: (usize, usize) = (108, 8);
    pub(super) const GID: (usize, usize) = (116, 8);
    pub(super) const SIZE: (usize, usize) = (124, 12);
    pub(super) const MTIME: (usize, usize) = (136, 12);
    pub(super) const CHECKSUM: (usize, usize) = (148, 8);
    pub(super) const FLAG: (usize, usize) = (156, 1);
    pub(super) const LINK: (usize, usize) = (157, 100);
    pub(super) const MAGIC: (usize, usize) = (257, 8);
    pub(super) const PREFIX: (usize, usize) = (345, 155);
}

fn header(
    name: &[u8],
    flag: u8,
    target: &[u8],
    size: u64,
    mode: u32,
    modified: i64,
) -> [u8; BLOCK] {
    let mut block = ZEROS;
    let modified = u64::try_from(modified).unwrap_or(0).min(MAX_OCTAL);
    put(&mut block, field::NAME, name);
    put(&mut block, field::MODE, format!("{mode:07o}").as_bytes());
    put(&mut block, field::UID, b"0000000");
    put(&mut block, field::GID, b"0000000");
    put(&mut block, field::SIZE, format!("{size:011o}").as_bytes());
    put(
        &mut block,
        field::MTIME,
        format!("{modified:011o}").as_bytes(),
    );
    put(&mut block, field::FLAG, &[flag]);
    put(&mut block, field::LINK, target);
    put(&mut block, field::MAGIC, b"ustar\x0000");
    let sum = checksum(&block);
    put(
        &mut block,
        field::CHECKSUM,
        format!("{sum:06o}\0 ").as_bytes(),
    );
    block
}

/// Puts as much of the value as has room.
fn put(block: &mut [u8; BLOCK], (offset, length): (usize, usize), value: &[u8]) {
    let room = block.iter_mut().skip(offset).take(length);
    room.zip(value).for_each(|(to, from)| *to = *from);
}

fn get(block: &[u8; BLOCK], (offset, length): (usize, usize)) -> &[u8] {
    block.get(offset..offset + length).unwrap_or_default()
}

/// The sum of all bytes, with the checksum's own taken for spaces.
fn checksum(block: &[u8; BLOCK]) -> u32 {
    let (offset, length) = field::CHECKSUM;
    let own = offset..offset + length;
    let byte = |(at, byte): (usize, &u8)| {
        if own.contains(&at) {
            32
        } else {
            u32::from(*byte)
        }
    };
    block.iter().enumerate().map(byte).sum()
}

/// Octal digits between spaces and zeros, or, as GNU tar writes what has no room, a number of 256s.
fn number(field: &[u8]) -> Option<u64> {
    if let Some((first, rest)) = field.split_first()
        && first & 0x80 != 0
    {
        // A set second bit is a negative number.
        let start = u64::from(first & 0x7f);
        let next = |sum: u64, byte: &u8| sum.checked_mul(256)?.checked_add(u64::from(*byte));
        return rest
            .iter()
            .try_fold(start, next)
            .filter(|_| first & 0x40 == 0);
    }
    let digits = field
        .split(|byte| matches!(byte, b' ' | 0))
        .find(|part| !part.is_empty());
    let text = std::str::from_utf8(digits.unwrap_or(b"0")).ok()?;
    text.bytes()
        .all(|byte| byte.is_ascii_digit())
        .then_some(())?;
    u64::from_str_radix(text, 8).ok()
}

/// Up to its first zero.
fn string(field: &[u8]) -> Vec<u8> {
    field
        .split(|byte| *byte == 0)
        .next()
        .unwrap_or_default()
        .to_vec()
}

/// Reads entries one after the other.
pub(super) struct Reader<R> {
    from: R,
    /// Of the current entry's content, and then of its padding.
    content: u64,
    padding: usize,
}

/// What stands before an entry and overrides its header.
#[derive(Default)]
struct Extra {
    path: Option<Vec<u8>>,
    target: Option<Vec<u8>>,
    size: Option<u64>,
}

impl<R: Read> Reader<R> {
    pub(super) fn new(from: R) -> Self {
        Self {
            from,
            content: 0,
            padding: 0,
        }
    }

    /// The next entry; `None` after the last one, when the end of the stream has been read, too. What was
    /// not read of the content before is passed over. `most`: headers before an entry, at most.
    pub(super) fn next(&mut self, most: u64) -> Result<Option<Entry>, Fault> {
        let mut extra = Extra::default();
        for _ in 0..most {
            self.pass_over()?;
            let mut block = ZEROS;
            self.fill(&mut block)?;
            if block == ZEROS {
                return self.end().map(|()| None);
            }
            let said = number(get(&block, field::CHECKSUM));
            if said != Some(u64::from(checksum(&block))) {
                return Err(Fault::Malformed("a header's checksum is wrong"));
            }
            let size =
                number(get(&block, field::SIZE)).filter(|size| *size <= i64::MAX.unsigned_abs());
            let size = size.ok_or(Fault::Malformed("a size is no number"))?;
            match get(&block, field::FLAG) {
                b"x" => extra.pax(&self.extra(size)?)?,
                b"L" => extra.path = Some(string(&self.extra(size)?)),
                b"K" => extra.target = Some(string(&self.extra(size)?)),
                b"g" => drop(self.extra(size)?),
                flag => return self.entry(&block, flag, size, extra).map(Some),
            }
        }
        Err(Fault::Malformed("too many headers without an entry"))
    }

    /// Reads content of the current entry; 0 at its end.
    pub(super) fn content(&mut self, buffer: &mut [u8]) -> Result<usize, Fault> {
        let most = usize::try_from(self.content)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let Some(buffer) = buffer.get_mut(..most).filter(|buffer| !buffer.is_empty()) else {
            return Ok(0);
        };
        let read = self.read(buffer)?;
        if read == 0 {
            return Err(Fault::Malformed("it ends inside a file"));
        }
        self.content -= read as u64;
        Ok(read)
    }

    fn entry(
        &mut self,
        block: &[u8; BLOCK],
        flag: &[u8],
        size: u64,
        extra: Extra,
    ) -> Result<Entry, Fault> {
        let size = extra.size.unwrap_or(size);
        let path = extra.path.unwrap_or_else(|| {
            let name = string(get(block, field::NAME));
            // Only POSIX's own has a prefix; GNU's has other things there.
            let posix = get(block, field::MAGIC).starts_with(b"ustar\0");
            let prefix = string(get(block, field::PREFIX));
            if posix && !prefix.is_empty() {
                [&prefix, &b"/"[..], &name].concat()
            } else {
                name
            }
        });
        let target = || {
            extra
                .target
                .unwrap_or_else(|| string(get(block, field::LINK)))
        };
        let (kind, size) = match flag {
            // Before POSIX a directory was a file whose name ends so.
            b"0" | b"\0" | b"7" if path.ends_with(b"/") => (Kind::Directory, size),
            b"0" | b"\0" | b"7" => (Kind::File, size),
            b"1" => (Kind::HardLink(target()), 0),
            b"2" => (Kind::Symlink(target()), 0),
            b"5" => (Kind::Directory, size),
            _ => (Kind::Other, size),
        };
        (self.content, self.padding) = (size, padding(size));
        let mode =
            number(get(block, field::MODE)).ok_or(Fault::Malformed("a mode is no number"))?;
        let modified = number(get(block, field::MTIME)).unwrap_or(0);
        Ok(Entry {
            path,
            kind,
            size,
            mode: u32::try_from(mode & 0o7777).unwrap_or(0),
            modified: i64::try_from(modified).unwrap_or(0),
        })
    }

    /// A content that belongs to the next header.
    fn extra(&mut self, size: u64) -> Result<Vec<u8>, Fault> {
        if size > MAX_EXTRA {
            return Err(Fault::Malformed("an extended header is too long"));
        }
        let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
        self.fill(&mut bytes)?;
        self.padding = padding(size);
        Ok(bytes)
    }

    fn pass_over(&mut self) -> Result<(), Fault> {
        let mut buffer = [0; 16 * 1024];
        while self.content(&mut buffer)? > 0 {}
        let mut rest = ZEROS;
        let length = std::mem::take(&mut self.padding);
        self.fill(rest.get_mut(..length).unwrap_or_default())
    }

    /// Reads on to the end of the stream, so that nobody writes into a closed pipe.
    fn end(&mut self) -> Result<(), Fault> {
        let mut buffer = [0; 16 * 1024];
        let mut tail = 0;
        loop {
            let read = self.read(&mut buffer)?;
            if read == 0 {
                return Ok(());
            }
            tail += read as u64;
            if tail > MAX_TAIL {
                return Err(Fault::Malformed("it goes on after its end"));
            }
        }
    }

    fn fill(&mut self, mut buffer: &mut [u8]) -> Result<(), Fault> {
        while !buffer.is_empty() {
            match self.read(buffer)? {
                0 => return Err(Fault::Malformed("its end is missing")),
                read => buffer = buffer.get_mut(read..).unwrap_or_default(),
            }
        }
        Ok(())
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, Fault> {
        loop {
            match self.from.read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Fault::Stream(errno_of(&error))),
                // Nobody reads more than there is room for.
                Ok(read) if read > buffer.len() => return Err(Fault::Stream(Errno::EIO)),
                Ok(read) => return Ok(read),
            }
        }
    }
}

impl Extra {
    /// Takes pax records; those that are not known do not matter.
    fn pax(&mut self, mut records: &[u8]) -> Result<(), Fault> {
        let wrong = Fault::Malformed("a pax record is none");
        while !records.is_empty() {
            let digits = records
                .iter()
                .take_while(|byte| byte.is_ascii_digit())
                .count();
            let length = records
                .get(..digits)
                .and_then(|digits| std::str::from_utf8(digits).ok());
            let length: usize = length
                .and_then(|text| text.parse().ok())
                .ok_or(wrong.clone())?;
            let whole = records.get(digits..length).ok_or(wrong.clone())?;
            let (name, value) = whole
                .strip_prefix(b" ")
                .and_then(|text| text.strip_suffix(b"\n"))
                .and_then(|text| {
                    let at = text.iter().position(|byte| *byte == b'=')?;
                    Some((text.get(..at)?, text.get(at + 1..)?))
                })
                .ok_or(wrong.clone())?;
            match name {
                b"path" if value.len() < PATH_MAX => self.path = Some(value.to_vec()),
                b"linkpath" if value.len() < PATH_MAX => self.target = Some(value.to_vec()),
                b"path" | b"linkpath" => return Err(Fault::Malformed("a path is too long")),
                b"size" => {
                    let text = std::str::from_utf8(value).ok();
                    let size = text.and_then(|text| text.parse().ok());
                    let size = size.filter(|size| *size <= i64::MAX.unsigned_abs());
                    self.size = Some(size.ok_or(wrong.clone())?);
                }
                _ if name.starts_with(b"GNU.sparse") => {
                    return Err(Fault::Malformed("sparse files are not taken"));
                }
                _ => {}
            }
            records = records.get(length..).unwrap_or_default();
        }
        Ok(())
    }
}
