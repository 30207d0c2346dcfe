//! Framed fields: the form in which requests and set-ups travel.
//!
//! ```text
//! "OSTL"  version (u32, little-endian)  { tag (u16)  length (u32)  bytes }*
//! ```
//!
//! Unknown tags are for the reader to skip or refuse. Everything is bounded ([`MAX_BYTES`],
//! [`MAX_FIELDS`]), and hostile bytes get [`Malformed`], never a panic. What is too large for a packet,
//! or must not show in a command line, travels as a sealed memfd ([`memfd`], [`read_memfd`]): its
//! content cannot change between the check and the use.

use crate::fault::{Context, SysError};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::uio::pread;
use std::fmt;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};

/// Most bytes of one set of fields, head included: what a job's environment may weigh.
pub const MAX_BYTES: usize = 1 << 20;
/// Most fields of one set.
pub const MAX_FIELDS: usize = 4096;

const MAGIC: [u8; 4] = *b"OSTL";
const VERSION: u32 = 1;

/// Bytes that are not what they should be; says which rule they break.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed(pub &'static str);

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "malformed fields: {}", self.0)
    }
}

impl std::error::Error for Malformed {}

impl From<Malformed> for SysError {
    fn from(malformed: Malformed) -> Self {
        Self {
            call: "parse",
            on: malformed.0.to_owned(),
            errno: Errno::EBADMSG,
        }
    }
}

/// Writes fields one after the other.
#[derive(Debug, Clone)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Default for Writer {
    fn default() -> Self {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        Self { bytes }
    }
}

impl Writer {
    /// Appends a field. A value of 4 GiB or more is cut; its reader refuses anything above
    /// [`MAX_BYTES`] anyway.
    #[must_use]
    pub fn put(mut self, tag: u16, value: &[u8]) -> Self {
        let length = u32::try_from(value.len()).unwrap_or(u32::MAX);
        self.bytes.extend(tag.to_le_bytes());
        self.bytes.extend(length.to_le_bytes());
        self.bytes.extend(value);
        self
    }

    /// Appends a number of four bytes, little-endian.
    #[must_use]
    pub fn put_u32(self, tag: u16, value: u32) -> Self {
        self.put(tag, &value.to_le_bytes())
    }

    /// The finished bytes.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        self.bytes
    }
}

/// Reads fields in the order in which they were written.
#[derive(Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
    taken: usize,
}

impl<'a> Reader<'a> {
    /// Checks the head.
    ///
    /// # Errors
    /// Wrong magic or version, or more than [`MAX_BYTES`].
    pub fn new(bytes: &'a [u8]) -> Result<Self, Malformed> {
        if bytes.len() > MAX_BYTES {
            return Err(Malformed("more than 1 MiB"));
        }
        let (magic, rest) = bytes.split_first_chunk::<4>().ok_or(Malformed("no head"))?;
        let (version, rest) = rest.split_first_chunk::<4>().ok_or(Malformed("no head"))?;
        if *magic != MAGIC {
            return Err(Malformed("wrong magic"));
        }
        if u32::from_le_bytes(*version) != VERSION {
            return Err(Malformed("another version"));
        }
        Ok(Self { rest, taken: 0 })
    }

    /// The next field, `None` after the last one.
    ///
    /// # Errors
    /// A field that is cut short, or more than [`MAX_FIELDS`] of them.
    pub fn field(&mut self) -> Result<Option<(u16, &'a [u8])>, Malformed> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        if self.taken == MAX_FIELDS {
            return Err(Malformed("more than 4096 fields"));
        }
        let short = Malformed("a field is cut short");
        let (tag, rest) = self.rest.split_first_chunk::<2>().ok_or(short)?;
        let (length, rest) = rest.split_first_chunk::<4>().ok_or(short)?;
        let length = usize::try_from(u32::from_le_bytes(*length)).map_err(|_| short)?;
        let (value, rest) = rest.split_at_checked(length).ok_or(short)?;
        self.rest = rest;
        self.taken += 1;
        Ok(Some((u16::from_le_bytes(*tag), value)))
    }
}

/// A field that must be a number of four bytes.
///
/// # Errors
/// Any other length.
pub fn u32_of(value: &[u8]) -> Result<u32, Malformed> {
    value
        .try_into()
        .map(u32::from_le_bytes)
        .map_err(|_| Malformed("a number is not of four bytes"))
}

/// A field that must be a number of eight bytes.
///
/// # Errors
/// Any other length.
pub fn u64_of(value: &[u8]) -> Result<u64, Malformed> {
    value
        .try_into()
        .map(u64::from_le_bytes)
        .map_err(|_| Malformed("a number is not of eight bytes"))
}

const SEALS: SealFlag = SealFlag::F_SEAL_WRITE
    .union(SealFlag::F_SEAL_SHRINK)
    .union(SealFlag::F_SEAL_GROW)
    .union(SealFlag::F_SEAL_SEAL);

/// Puts `bytes` into a memory file named `name` (for people who look) that nobody can change any more.
///
/// # Errors
/// `memfd_create`, `write` or the sealing failed: no memory or no descriptors left.
pub fn memfd(bytes: &[u8], name: &str) -> Result<OwnedFd, SysError> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    seal(
        memfd_create(name, flags).context("memfd_create", name)?,
        bytes,
        name,
    )
}

/// The same of a program, to be executed.
///
/// # Errors
/// `EACCES`: this host allows no programs in memory (`vm.memfd_noexec` is 2).
pub fn program_memfd(bytes: &[u8], name: &str) -> Result<OwnedFd, SysError> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    // Said aloud, because a host may make others not executable (Linux 6.3).
    let executable = flags | MFdFlags::from_bits_retain(nix::libc::MFD_EXEC);
    let fd = match memfd_create(name, executable) {
        Err(Errno::EINVAL) => memfd_create(name, flags),
        other => other,
    };
    seal(fd.context("memfd_create", name)?, bytes, name)
}

fn seal(fd: OwnedFd, bytes: &[u8], name: &str) -> Result<OwnedFd, SysError> {
    let mut file = File::from(fd);
    file.write_all(bytes).context("write", name)?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(SEALS)).context("fcntl", "F_ADD_SEALS")?;
    Ok(file.into())
}

/// Reads a memory file of [`memfd`] from its beginning, wherever its offset stands.
///
/// # Errors
/// `EPERM`: not sealed, so its content could change under us. `EFBIG`: above [`MAX_BYTES`].
pub fn read_memfd(fd: impl AsFd) -> Result<Vec<u8>, SysError> {
    let seals = fcntl(&fd, FcntlArg::F_GET_SEALS).context("fcntl", "F_GET_SEALS")?;
    if !SealFlag::from_bits_retain(seals).contains(SEALS) {
        return Err(Errno::EPERM).context("fcntl", "the memory file is not sealed");
    }
    let size = nix::sys::stat::fstat(&fd)
        .context("fstat", "memfd")?
        .st_size;
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    if size > MAX_BYTES {
        return Err(Errno::EFBIG).context("fstat", "the memory file is above 1 MiB");
    }
    let mut bytes = vec![0; size];
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        let offset = i64::try_from(filled).unwrap_or(i64::MAX);
        match pread(&fd, rest, offset).context("pread", "memfd")? {
            0 => return Err(Errno::EIO).context("pread", "the memory file ends early"),
            read => filled += read,
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::{MAX_BYTES, MAX_FIELDS, Malformed, Reader, Writer, memfd, read_memfd};

    fn drain(bytes: &[u8]) -> Result<usize, Malformed> {
        let mut reader = Reader::new(bytes)?;
        let mut count = 0;
        while reader.field()?.is_some() {
            count += 1;
        }
        Ok(count)
    }

    #[test]
    fn fields_come_back_in_their_order() {
        let bytes = Writer::default()
            .put(1, b"one")
            .put(7, b"")
            .put_u32(1, 5)
            .finish();
        let mut reader = Reader::new(&bytes).unwrap();
        assert_eq!(reader.field(), Ok(Some((1, &b"one"[..]))));
        assert_eq!(reader.field(), Ok(Some((7, &b""[..]))));
        assert_eq!(reader.field(), Ok(Some((1, &5u32.to_le_bytes()[..]))));
        assert_eq!(reader.field(), Ok(None));
    }

    #[test]
    fn every_cut_and_every_flipped_byte_is_survived() {
        let bytes = Writer::default()
            .put(1, b"PATH=/bin")
            .put(2, &[0; 40])
            .finish();
        for end in 0..bytes.len() {
            let whole_fields = [8, 8 + 6 + 9].contains(&end);
            assert_eq!(drain(&bytes[..end]).is_ok(), whole_fields, "cut at {end}");
        }
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut hostile = bytes.clone();
                hostile[at] ^= 1 << bit;
                let _ = drain(&hostile);
            }
        }
    }

    #[test]
    fn bounds_are_refused() {
        assert!(Reader::new(&vec![0; MAX_BYTES + 1]).is_err());
        let many = (0..=MAX_FIELDS).fold(Writer::default(), |fields, _| fields.put(1, b""));
        assert_eq!(
            drain(&many.finish()),
            Err(Malformed("more than 4096 fields"))
        );
    }

    #[test]
    fn a_memory_file_is_read_back_and_an_unsealed_one_is_not() {
        let bytes = vec![7; 100_000];
        let fd = memfd(&bytes, "test").unwrap();
        assert_eq!(read_memfd(&fd).unwrap(), bytes);
        assert_eq!(
            read_memfd(&fd).unwrap(),
            bytes,
            "the offset does not matter"
        );
        assert!(nix::unistd::write(&fd, b"x").is_err(), "sealed");
        let open =
            nix::sys::memfd::memfd_create("open", nix::sys::memfd::MFdFlags::MFD_ALLOW_SEALING)
                .unwrap();
        assert_eq!(
            read_memfd(&open).unwrap_err().errno,
            nix::errno::Errno::EPERM
        );
        let file = std::fs::File::open("/etc/passwd").unwrap();
        assert!(read_memfd(&file).is_err(), "no memory file at all");
    }
}
