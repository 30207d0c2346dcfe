//! A file system in a file, for depots whose own cannot limit a directory.
//!
//! ```text
//! disk.img   │ in use by the container, or free for it: has its bytes in the depot │ ballast: a hole │
//! ```
//!
//! ext4 can be enlarged only by whoever has `CAP_SYS_RESOURCE`, and made smaller by nobody while it is
//! mounted. So it is made larger than it may be, and a file in it, which the container cannot see, takes
//! what is too much. Whatever the ballast lies on is a hole in the image; everything else is allocated in
//! the depot, so the container can always write what it may.
//!
//! The mount belongs to descriptors and to the container's namespace, and the loop device to the mount:
//! with the last of them both are gone, whoever died when.

use super::pattern::{Kind, Patterns};
use super::space::Promise;
use super::{Change, DiskError, Limit, Mkfs, Space, Usage, whole_mb};
use crate::host::depot::Directory;
use container::fault::{Context, SysError};
use container::sys::volume;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, OFlag, fallocate, openat};
use nix::sys::stat::{Mode, fstat};
use nix::sys::statvfs::fstatvfs;
use std::ffi::{CString, OsString};
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// An image has an inode for so many bytes at most: each takes 256 bytes of the depot, used or not.
const BYTES_PER_INODE: u64 = 4096;

/// Bytes of a block.
const BLOCK: u64 = 4096;

/// How far an image can grow, in multiples of its first limit and in bytes. What it could grow by costs
/// next to nothing until it does, but for the time to make it.
const GROWTH: u64 = 3;
const LEAST_GROWTH: u64 = 512 << 20;
const MOST_GROWTH: u64 = 8 << 30;

/// What ext4 itself needs beside inodes, at most: bitmaps, descriptors, and what it sets aside for its
/// own accounts (2 % but not more than 16 MiB).
const OWN: u64 = 20 << 20;

/// Where the program may be that makes file systems.
const PROGRAMS: [&str; 4] = [
    "/usr/sbin/mkfs.ext4",
    "/sbin/mkfs.ext4",
    "/usr/local/sbin/mkfs.ext4",
    "/usr/bin/mkfs.ext4",
];

/// A mounted image.
#[derive(Debug)]
pub(super) struct Image {
    space: Space,
    /// Where its [`Notes`] are kept.
    notes: PathBuf,
    number: u32,
    /// The mount (`O_PATH`).
    mount: OwnedFd,
    ballast: File,
    file: File,
}

/// The program that makes file systems, if it is installed.
pub(super) fn program() -> Result<&'static str, String> {
    let found = PROGRAMS.into_iter().find(|path| Path::new(path).exists());
    found.ok_or_else(|| "mkfs.ext4 is missing, install e2fsprogs".to_owned())
}

/// Makes the file of an image, as a hole; whether there is a file system in it already, for it is like one before.
pub(super) fn create(
    directory: &Directory,
    limit: Limit,
    patterns: &Patterns,
) -> Result<bool, SysError> {
    let path = directory.image();
    let growth = limit
        .bytes
        .saturating_mul(GROWTH)
        .clamp(LEAST_GROWTH, MOST_GROWTH);
    let size = limit
        .bytes
        .saturating_add(growth + OWN + inodes(limit) * 256);
    let file = fresh(&path)?;
    file.set_len(size.next_multiple_of(BLOCK))
        .context("ftruncate", path.display())?;
    let made = patterns.write(kind(limit), &file);
    made.context("write", path.display())
}

/// Images of one kind are made alike.
fn kind(limit: Limit) -> Kind {
    (limit.bytes, inodes(limit))
}

/// What makes the file system in it. Nobody needs it after a crash of the host: no journal. What is a
/// hole reads as zeros already.
pub(super) fn mkfs(program: &'static str, directory: &Directory, limit: Limit) -> Mkfs {
    let inodes = inodes(limit).to_string();
    let words = [
        "-q",
        "-F",
        "-b",
        "4096",
        "-I",
        "256",
        "-m",
        "0",
        "-N",
        &inodes,
        "-O",
        "^has_journal,^resize_inode",
        "-E",
        "nodiscard,lazy_itable_init=1",
    ];
    let mut args: Vec<OsString> = words.iter().map(Into::into).collect();
    args.push(directory.image().into());
    Mkfs { program, args }
}

/// Mounts a fresh file system, at no place, and makes it as large as it may be.
pub(super) fn complete(
    space: &Space,
    directory: &Directory,
    limit: Limit,
    patterns: &Patterns,
) -> Result<Image, DiskError> {
    let path = directory.image();
    let file = open_file(&path)?;
    let learned = patterns.learn(kind(limit), &file);
    learned.context("read", path.display())?;
    let (device, number) = volume::attach(&file, 4096)?;
    let mount = mount(number)?;
    drop(device);
    let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
    let ballast = openat(&mount, BALLAST, flags, Mode::from_bits_truncate(0o600))
        .context("open", "ballast")?;
    let image = Image {
        space: space.clone(),
        notes: directory.loop_number(),
        number,
        mount,
        ballast: ballast.into(),
        file,
    };
    // What nobody may use comes from the depot, too, and 2 MiB of it are enough; where this cannot be
    // set (/sys is read-only), it is up to 16 MiB.
    let path = format!("/sys/fs/ext4/loop{number}/reserved_clusters");
    let _as_it_is = fs::write(path, "512");
    image.weigh(limit.bytes)?;
    image.note()?;
    Ok(image)
}

/// What an image was promised, and of that what it does not have: holes where its ballast is not. `None` before it
/// is complete.
pub(super) fn promise(directory: &Directory) -> Result<Option<Promise>, SysError> {
    let Some(notes) = noted(&directory.loop_number())? else {
        return Ok(None);
    };
    let path = directory.image();
    let file = match fs::metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.context("stat", path.display())?,
    };
    let has = file.blocks().saturating_mul(512);
    let may_have = file.len().saturating_sub(notes.ballast);
    Ok(Some(Promise {
        limit: notes.limit.unwrap_or(u64::MAX),
        owed: may_have.saturating_sub(has),
    }))
}

/// Most bytes of the depot that an image takes from the beginning.
pub(super) fn needs(limit: Limit) -> u64 {
    let beside = OWN + inodes(limit).saturating_mul(256) + BLOCK;
    limit.bytes.saturating_add(beside)
}

/// What is kept of an image that is complete.
#[derive(Debug, Clone, Copy)]
struct Notes {
    /// Of its loop device.
    number: u32,
    /// Bytes of its ballast.
    ballast: u64,
    /// Bytes of its limit; `None`: an agent wrote this that did not keep them.
    limit: Option<u64>,
}

fn noted(path: &Path) -> Result<Option<Notes>, SysError> {
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.context("read", path.display())?,
    };
    let mut words = text.split(' ');
    let number = words.next().and_then(|word| word.parse().ok());
    let ballast = words.next().and_then(|word| word.parse().ok());
    let limit = words.next().and_then(|word| word.parse().ok());
    let noted = number.zip(ballast).map(|(number, ballast)| Notes {
        number,
        ballast,
        limit,
    });
    let noted = noted.ok_or(Errno::EBADMSG);
    noted.map(Some).context("read", path.display())
}

/// What takes the place that the container may not have.
const BALLAST: &str = "ballast";

fn inodes(limit: Limit) -> u64 {
    limit.inodes.min(limit.bytes / BYTES_PER_INODE).max(64)
}

fn mount(number: u32) -> Result<OwnedFd, SysError> {
    let device = CString::new(format!("/dev/loop{number}")).unwrap_or_default();
    // No thread that writes zeros over holes.
    volume::mount(c"ext4", &device, &[c"noinit_itable"])
}

impl Image {
    /// The image of a living container; `None` if it has none.
    pub(super) fn find(space: &Space, directory: &Directory) -> Result<Option<Self>, SysError> {
        let file = match open_file(&directory.image()) {
            Err(SysError {
                errno: Errno::ENOENT,
                ..
            }) => return Ok(None),
            other => other?,
        };
        let path = directory.loop_number();
        let noted = noted(&path)?.ok_or(Errno::ENOENT);
        let number = noted.context("read", path.display())?.number;
        let stat = fstat(&file).context("fstat", "image")?;
        let held = volume::attached(number, (stat.st_dev, stat.st_ino))?;
        // Nobody has it mounted.
        let _held = held
            .ok_or(Errno::ENXIO)
            .context("loop device", path.display())?;
        Self::of(space, directory, file, number).map(Some)
    }

    /// The image of a dead container, mounted once more if it is `clean`; `None` if it has none.
    pub(super) fn find_dead(
        space: &Space,
        directory: &Directory,
        clean: bool,
    ) -> Result<Option<Self>, SysError> {
        if let Ok(found) = Self::find(space, directory) {
            // The kernel is still at taking it apart, or there is none.
            return Ok(found);
        }
        let path = directory.image();
        if !clean {
            return Err(Errno::EUCLEAN).context("mount", path.display());
        }
        let file = open_file(&path)?;
        let (_device, number) = volume::attach(&file, 4096)?;
        Self::of(space, directory, file, number).map(Some)
    }

    /// The image that a loop device stands on.
    fn of(space: &Space, directory: &Directory, file: File, number: u32) -> Result<Self, SysError> {
        let mount = mount(number)?;
        let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC;
        let ballast = openat(&mount, BALLAST, flags, Mode::empty()).context("open", "ballast")?;
        Ok(Self {
            space: space.clone(),
            notes: directory.loop_number(),
            number,
            mount,
            ballast: ballast.into(),
            file,
        })
    }

    /// Keeps what [`noted`] reads.
    fn note(&self) -> Result<(), SysError> {
        let (room, number) = (self.room()?, self.number);
        let new = self.notes.with_extension("new");
        fs::write(&new, format!("{number} {} {}", room.ballast, room.limit()))
            .and_then(|()| fs::rename(&new, &self.notes))
            .context("write", self.notes.display())
    }

    pub(super) fn mount(&self) -> BorrowedFd<'_> {
        self.mount.as_fd()
    }

    /// Its root, as long as this is held.
    pub(super) fn root(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.mount.as_raw_fd()).into()
    }

    fn room(&self) -> Result<Room, SysError> {
        let space = fstatvfs(&self.mount).context("fstatvfs", "image")?;
        let ballast = self.ballast.metadata().context("fstat", "ballast")?;
        let set_aside = space.blocks_free() - space.blocks_available().min(space.blocks_free());
        let used = space.blocks().saturating_sub(space.blocks_free()) * space.fragment_size();
        Ok(Room {
            all: (space.blocks() - set_aside) * space.fragment_size(),
            // Where the ballast lies is written down in a block or two: they count as the container's.
            used: used.saturating_sub(ballast.len()),
            ballast: ballast.len(),
            inodes: space.files(),
            used_inodes: space.files().saturating_sub(space.files_free()),
        })
    }

    pub(super) fn usage(&self) -> Result<Usage, SysError> {
        let room = self.room()?;
        Ok(Usage {
            bytes: room.used,
            inodes: room.used_inodes,
            limit: Limit {
                bytes: room.limit(),
                inodes: room.inodes,
            },
        })
    }

    /// Changes the limit in bytes. The inodes of an image are made with it.
    pub(super) fn limit(&self, change: Change) -> Result<(), DiskError> {
        self.change_limit(change)?;
        // The limit holds; what is kept of it only says what the depot owes where the kernel makes holes.
        if let Err(error) = self.note() {
            tracing::warn!(%error, "what an image has been promised is kept as it was");
        }
        Ok(())
    }

    fn change_limit(&self, change: Change) -> Result<(), DiskError> {
        let room = self.room()?;
        if change.inodes.is_some_and(|inodes| inodes != room.inodes) {
            return Err(DiskError::Inodes { have: room.inodes });
        }
        let Some(bytes) = change.bytes else {
            return Ok(());
        };
        let bytes = bytes.next_multiple_of(BLOCK);
        if bytes > room.all {
            return Err(DiskError::Beyond {
                largest: Limit {
                    bytes: room.all,
                    inodes: room.inodes,
                },
            });
        }
        if bytes >= room.limit() {
            return self.lighten(&room, bytes - room.limit());
        }
        let end = room.ballast;
        match self.add_ballast(end, room.limit() - bytes) {
            Err(Errno::ENOSPC) => {
                let room = self.room()?;
                Err(DiskError::InUse {
                    smallest: Limit {
                        bytes: whole_mb(room.used + BLOCK),
                        inodes: room.inodes,
                    },
                })
            }
            other => {
                other.context("fallocate", "ballast")?;
                let holes = volume::extents(&self.ballast, end).context("fiemap", "ballast")?;
                let punched = holes.iter().try_for_each(|hole| punch(&self.file, hole));
                Ok(punched.context("fallocate", "image")?)
            }
        }
    }

    /// Makes a fresh image as small as it may be, and takes from the depot what it may have.
    fn weigh(&self, bytes: u64) -> Result<(), DiskError> {
        let room = self.room()?;
        let too_much = room.limit().saturating_sub(bytes.next_multiple_of(BLOCK));
        self.add_ballast(0, too_much)
            .context("fallocate", "ballast")?;
        let size = self.file.metadata().context("fstat", "image")?.len();
        let mut holes = volume::extents(&self.ballast, 0).context("fiemap", "ballast")?;
        holes.sort_by_key(|hole| hole.start);
        self.take(&between(&holes, size))
    }

    /// Adds to the ballast, whole or not at all.
    fn add_ballast(&self, end: u64, bytes: u64) -> nix::Result<()> {
        let (from, length) = (signed(end), signed(bytes));
        if length == 0 {
            return Ok(());
        }
        fallocate(&self.ballast, FallocateFlags::empty(), from, length).inspect_err(|_| {
            let _as_it_was = self.ballast.set_len(end);
        })
    }

    /// Takes from the ballast, when the depot has given the bytes for it.
    fn lighten(&self, room: &Room, bytes: u64) -> Result<(), DiskError> {
        let end = room.ballast.saturating_sub(bytes);
        let holes = volume::extents(&self.ballast, end).context("fiemap", "ballast")?;
        self.take(&holes).inspect_err(|_| {
            for hole in &holes {
                let _still_ballast = punch(&self.file, hole);
            }
        })?;
        Ok(self.ballast.set_len(end).context("ftruncate", "ballast")?)
    }

    /// Has the depot give all these bytes, or none.
    fn take(&self, holes: &[Range<u64>]) -> Result<(), DiskError> {
        let needed = holes.iter().map(|hole| hole.end - hole.start).sum();
        self.space.has_room(needed)?;
        match holes.iter().try_for_each(|hole| allocate(&self.file, hole)) {
            // Others of the file system were faster.
            Err(Errno::ENOSPC) => Err(self.space.not_enough(needed, self.space.left()?)),
            other => Ok(other.context("fallocate", "image")?),
        }
    }

    pub(super) fn abandon(&self) {
        if let Err(errno) = volume::abandon_ext4(self.ballast.as_fd()) {
            tracing::debug!(%errno, "an image is written before it is removed");
        }
    }
}

/// What of an image is whose, in bytes.
#[derive(Debug)]
struct Room {
    /// What the container and the ballast may have together.
    all: u64,
    used: u64,
    ballast: u64,
    inodes: u64,
    used_inodes: u64,
}

impl Room {
    fn limit(&self) -> u64 {
        self.all.saturating_sub(self.ballast)
    }
}

/// What lies between these, in order, from 0 to `end`.
fn between(holes: &[Range<u64>], end: u64) -> Vec<Range<u64>> {
    let starts = std::iter::once(0).chain(holes.iter().map(|hole| hole.end));
    let ends = holes.iter().map(|hole| hole.start).chain([end]);
    starts
        .zip(ends)
        .map(|(start, end)| start..end)
        .filter(|gap| !gap.is_empty())
        .collect()
}

/// An empty file. On btrfs each write would go to a new place, and what was taken for the file would not be enough.
fn fresh(path: &Path) -> Result<File, SysError> {
    let mut options = File::options();
    let file = options
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path);
    let file = file.context("open", path.display())?;
    volume::write_in_place(&file).context("FS_IOC_SETFLAGS", path.display())?;
    Ok(file)
}

fn open_file(path: &Path) -> Result<File, SysError> {
    let file = File::options().read(true).write(true).open(path);
    file.context("open", path.display())
}

fn allocate(file: &File, range: &Range<u64>) -> nix::Result<()> {
    change(file, FallocateFlags::FALLOC_FL_KEEP_SIZE, range)
}

fn punch(file: &File, range: &Range<u64>) -> nix::Result<()> {
    let flags = FallocateFlags::FALLOC_FL_KEEP_SIZE | FallocateFlags::FALLOC_FL_PUNCH_HOLE;
    change(file, flags, range)
}

fn change(file: &File, flags: FallocateFlags, range: &Range<u64>) -> nix::Result<()> {
    fallocate(
        file,
        flags,
        signed(range.start),
        signed(range.end - range.start),
    )
}

/// As fallocate(2) takes it; files end below 2^63.
fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::between;

    #[test]
    fn what_is_not_ballast_lies_between() {
        let all = |holes: &[_]| between(holes, 9);
        assert_eq!(all(&[2..4, 4..5, 7..9]), [0..2, 5..7]);
        assert_eq!(all(&[0..1, 3..4]), [1..3, 4..9]);
        assert_eq!(all(&[]).len(), 1);
    }
}
