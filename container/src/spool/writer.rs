//! The one writer of a spool.

use super::{
    HEADER_BYTES, Header, Kind, MAX_PAYLOAD, MIN_CAP, MIN_SEGMENT, Record, Stream, Tail,
    codec::{self, HEAD_BYTES},
    files,
    marks::{Busy, Marks},
    newest::{Found, find, new_segment, write_whole},
};
use crate::{
    fault::{Context, SysError},
    status::Status,
    sys::pipe::splice,
};
use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, OFlag, fallocate, open},
    sys::{
        stat::{Mode, fstat},
        uio::pwrite,
    },
    time::{ClockId, clock_gettime},
    unistd::{UnlinkatFlags, fdatasync, ftruncate, unlinkat},
};
use std::{
    collections::VecDeque,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

/// Appends to a job's spool. There must be one at a time, which a lock of the caller's sees to.
#[derive(Debug)]
pub struct SpoolWriter {
    dir: OwnedFd,
    null: OwnedFd,
    /// The newest segment.
    segment: OwnedFd,
    /// Log positions at which the segments start, oldest first.
    starts: VecDeque<u64>,
    /// Log position behind the last record.
    end: u64,
    cap: u64,
    tail: Tail,
    marks: Marks,
    /// Bytes that are no record may stand behind the last one, and must go before the next.
    torn: bool,
    /// Room that is set aside for the last records.
    reserve: OwnedFd,
    scratch: Vec<u8>,
}

/// Bytes set aside: one block for the exit, one for the end.
const RESERVE: i64 = 2 * BLOCK;

/// The usual block of a file system, which is what a short record costs at most.
const BLOCK: i64 = 4096;

impl SpoolWriter {
    /// Opens the spool in a job's directory, or begins one, and puts in order what a killed writer
    /// left. `cap` is in bytes, at least [`MIN_CAP`]; the log never takes more.
    pub fn open(dir: &Path, cap: u64) -> Result<Self, SysError> {
        let dir = files::open_dir(dir)?;
        let null = open(
            "/dev/null",
            OFlag::O_WRONLY | OFlag::O_CLOEXEC,
            Mode::empty(),
        )
        .context("open", "/dev/null")?;
        let marks = Marks::open(dir.as_fd())?;
        let Found {
            segment,
            starts,
            end,
            tail,
        } = find(dir.as_fd())?;
        let cap = cap.max(MIN_CAP);
        let reserve = files::open_in(dir.as_fd(), "reserve", OFlag::O_RDWR | OFlag::O_CREAT)?;
        // A disk that is full already has no room to set aside.
        let _ = fallocate(&reserve, FallocateFlags::empty(), 0, RESERVE);
        let scratch = Vec::with_capacity(256);
        let mut writer = Self {
            dir,
            null,
            segment,
            starts,
            end,
            cap,
            tail,
            marks,
            torn: false,
            reserve,
            scratch,
        };
        writer.repair()?;
        Ok(writer)
    }

    /// What the log says so far.
    #[must_use]
    pub fn tail(&self) -> &Tail {
        &self.tail
    }

    /// Moves up to `bytes` (at most [`MAX_PAYLOAD`]) from a stream's pipe to the log, as one
    /// record, and tells how many. 0 if the pipe has none. Does not wait for the pipe. If the disk
    /// stays full even without the older segments, or cannot be written for any other reason (it is
    /// read-only after an error, or gone), the bytes are thrown away and a gap is recorded as soon as
    /// that can be done.
    pub fn take(
        &mut self,
        stream: Stream,
        pipe: BorrowedFd<'_>,
        bytes: usize,
    ) -> Result<usize, SysError> {
        let bytes = bytes.min(MAX_PAYLOAD);
        let moved = loop {
            let moved = self
                .name_missing()
                .and_then(|()| self.move_in(stream, pipe, bytes));
            match moved {
                Ok(moved) => break moved,
                Err(error) if is_full(&error) && self.drop_oldest().unwrap_or(false) => {}
                Err(_cannot_keep) => return self.discard(stream, pipe, bytes),
            }
        };
        if moved > 0 {
            self.commit_or_lose(stream, moved);
        }
        Ok(moved)
    }

    /// Appends [`Record::Started`].
    pub fn started(&mut self) -> Result<(), SysError> {
        self.append(&Record::Started)
    }

    /// Appends [`Record::Exit`] with the offsets of this moment.
    pub fn exit(&mut self, status: Status) -> Result<(), SysError> {
        self.release_unless(Self::name_missing)?;
        let (stdout, stderr) = (self.tail.head.stdout, self.tail.head.stderr);
        let time_ns = now_ns()?;
        self.release_unless(|spool| {
            spool.append(&Record::Exit {
                status,
                time_ns,
                stdout,
                stderr,
            })
        })
    }

    /// Says that output may be missing here: a [`Record::Gap`] of unknown length, as soon as it fits.
    pub fn uncertain(&mut self, stream: Stream) -> Result<(), SysError> {
        self.marks.set_uncertain(stream);
        later(self.name_missing())
    }

    /// Appends [`Record::End`].
    pub fn end(&mut self) -> Result<(), SysError> {
        self.release_unless(Self::name_missing)?;
        let (stdout, stderr) = (self.tail.head.stdout, self.tail.head.stderr);
        self.release_unless(|spool| spool.append(&Record::End { stdout, stderr }))
    }

    /// Waits until everything appended is on the disk.
    pub fn sync(&self) -> Result<(), SysError> {
        fdatasync(&self.segment).context("fdatasync", "spool segment")
    }

    /// Moves bytes behind the place that the header will have. Leaves the mark: they count from now
    /// on, and with their header nothing stands behind the last record.
    fn move_in(
        &mut self,
        stream: Stream,
        pipe: BorrowedFd<'_>,
        bytes: usize,
    ) -> Result<usize, SysError> {
        self.make_place((HEADER_BYTES + bytes) as u64)?;
        let at = self.place();
        self.marks.set(Busy::Moving(stream));
        match splice(
            pipe,
            self.segment.as_fd(),
            Some(at + HEADER_BYTES as i64),
            bytes,
        ) {
            Ok(moved) => Ok(moved),
            Err(errno) => {
                self.marks.set(Busy::Idle);
                let _ = ftruncate(&self.segment, at); // the error before it is the one to tell
                if errno == Errno::EAGAIN {
                    Ok(0)
                } else {
                    Err(errno).context("splice", "pipe to spool segment")
                }
            }
        }
    }

    /// Makes a record of the bytes that `move_in` left. Where that fails they are in no pipe any more, and
    /// missing.
    fn commit_or_lose(&mut self, stream: Stream, bytes: usize) {
        if self.commit(stream, bytes).is_err() {
            self.torn = true;
            self.lost(stream, bytes);
        }
    }

    fn commit(&mut self, stream: Stream, bytes: usize) -> Result<(), SysError> {
        let offset = self.tail.offset(stream);
        let len = u32::try_from(bytes).unwrap_or(0);
        let header = Header {
            kind: Kind::Output,
            stream,
            len,
            offset,
            time_ns: now_ns()?,
            aux: 0,
        };
        let header = header.encode();
        match pwrite(&self.segment, &header, self.place()) {
            Ok(written) if written == header.len() => {}
            failed => {
                let errno = failed.err().unwrap_or(Errno::ENOSPC);
                return Err(errno).context("pwrite", "spool segment");
            }
        }
        self.end += (HEADER_BYTES + bytes) as u64;
        self.tail.advance(stream, offset + bytes as u64);
        Ok(())
    }

    /// Throws bytes away, and counts them where a successor finds the count.
    fn discard(
        &mut self,
        stream: Stream,
        pipe: BorrowedFd<'_>,
        bytes: usize,
    ) -> Result<usize, SysError> {
        self.marks.set(Busy::Discarding(stream));
        let thrown = match splice(pipe, self.null.as_fd(), None, bytes) {
            Err(Errno::EAGAIN) => 0,
            thrown => thrown.context("splice", "pipe to /dev/null")?,
        };
        self.lost(stream, thrown);
        Ok(thrown)
    }

    /// Counts bytes that were taken from the pipe and cannot be kept.
    fn lost(&self, stream: Stream, bytes: usize) {
        let before = self.marks.taken(stream).max(self.tail.offset(stream));
        self.marks.set_taken(stream, before + bytes as u64);
    }

    /// Records as gaps what the marks know to be missing. What does not fit stays in them.
    fn name_missing(&mut self) -> Result<(), SysError> {
        for stream in Stream::ALL {
            let offset = self.tail.offset(stream);
            let bytes = self.marks.taken(stream).saturating_sub(offset);
            let certain = !self.marks.uncertain(stream);
            if bytes > 0 || !certain {
                self.append(&Record::Gap {
                    stream,
                    offset,
                    bytes,
                    certain,
                })?;
                // After it: killed in between, it is said twice and not never.
                self.marks.clear_uncertain(stream);
            }
        }
        Ok(())
    }

    /// Does it; if the disk is full, once more with a block of what was set aside.
    fn release_unless(
        &mut self,
        act: impl Fn(&mut Self) -> Result<(), SysError>,
    ) -> Result<(), SysError> {
        match act(self) {
            Err(error) if is_full(&error) => {
                let left = fstat(&self.reserve).context("fstat", "reserve")?.st_size;
                ftruncate(&self.reserve, (left - BLOCK).max(0)).context("ftruncate", "reserve")?;
                act(self)
            }
            done => done,
        }
    }

    /// Appends a record that is not output. On a full disk the older segments are given up for it.
    fn append(&mut self, record: &Record<&[u8]>) -> Result<(), SysError> {
        loop {
            match self.try_append(record) {
                Err(error) if is_full(&error) && self.drop_oldest().unwrap_or(false) => {}
                done => return done,
            }
        }
    }

    fn try_append(&mut self, record: &Record<&[u8]>) -> Result<(), SysError> {
        self.scratch.clear();
        codec::encode(record, &mut self.scratch);
        let bytes = self.scratch.len() as u64;
        self.make_place(bytes)?;
        self.marks.set(Busy::Idle);
        write_whole(self.segment.as_fd(), &self.scratch, self.place())?;
        self.tail.apply(self.end, record);
        self.end += bytes;
        Ok(())
    }

    /// Begins a new segment if this many bytes do not fit the present one.
    fn make_place(&mut self, bytes: u64) -> Result<(), SysError> {
        if self.torn {
            ftruncate(&self.segment, self.place()).context("ftruncate", "spool segment")?;
            self.torn = false;
        }
        let used = self.place().unsigned_abs();
        if used > HEAD_BYTES && used + bytes > self.segment_bytes() {
            self.segment = new_segment(self.dir.as_fd(), self.end, &self.tail.head)?;
            self.starts.push_back(self.end);
            self.end += HEAD_BYTES;
            while self.size() + self.segment_bytes() > self.cap && self.drop_oldest()? {}
        }
        Ok(())
    }

    /// Deletes the oldest segment; false if only the present one is left.
    fn drop_oldest(&mut self) -> Result<bool, SysError> {
        let Some(start) = self.starts.front().filter(|_| self.starts.len() > 1) else {
            return Ok(false);
        };
        let name = files::name(*start);
        match unlinkat(&self.dir, name.as_str(), UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(errno) => return Err(errno).context("unlink", name),
        }
        self.starts.pop_front();
        Ok(true)
    }

    /// Bytes of log on disk.
    fn size(&self) -> u64 {
        self.end - self.starts.front().copied().unwrap_or(self.end)
    }

    fn segment_bytes(&self) -> u64 {
        (self.cap / 8).max(MIN_SEGMENT)
    }

    /// Offset in the present segment of the next record.
    fn place(&self) -> i64 {
        let start = self.starts.back().copied().unwrap_or(0);
        i64::try_from(self.end - start).unwrap_or(i64::MAX)
    }

    /// Puts in order what a killed writer left behind its last record.
    fn repair(&mut self) -> Result<(), SysError> {
        let place = self.place();
        let size = fstat(&self.segment)
            .context("fstat", "spool segment")?
            .st_size;
        let behind = usize::try_from(size - place).unwrap_or(0);
        let busy = self.marks.busy();
        match busy {
            // Bytes that have left the pipe: only their header is missing.
            Busy::Moving(stream)
                if behind > HEADER_BYTES && behind <= HEADER_BYTES + MAX_PAYLOAD =>
            {
                self.commit_or_lose(stream, behind - HEADER_BYTES);
            }
            Busy::Moving(_) | Busy::Discarding(_) | Busy::Idle => {
                ftruncate(&self.segment, place).context("ftruncate", "spool segment")?;
            }
        }
        if let Busy::Discarding(stream) = busy {
            self.marks.set_uncertain(stream);
        }
        self.marks.set(Busy::Idle);
        if self.tail.ended {
            return Ok(());
        }
        later(self.name_missing())
    }
}

/// What does not fit now is in the marks, and is tried again with every record.
fn later(named: Result<(), SysError>) -> Result<(), SysError> {
    match named {
        Err(error) if is_full(&error) => Ok(()),
        named => named,
    }
}

/// Whether an error says that there is no room to write, or that writing fails, which older
/// segments may mend.
fn is_full(error: &SysError) -> bool {
    matches!(
        error.errno,
        Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG | Errno::EIO
    )
}

fn now_ns() -> Result<u64, SysError> {
    let now = clock_gettime(ClockId::CLOCK_REALTIME).context("clock_gettime", "CLOCK_REALTIME")?;
    Ok(now.tv_sec().unsigned_abs() * 1_000_000_000 + now.tv_nsec().unsigned_abs())
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
