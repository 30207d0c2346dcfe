//! Reading a spool from any place on, while it is being written.

use super::{
    Cursor, HEADER_BYTES, Header, Kind, Record, Stream,
    codec::{self, HEAD_BYTES, Head},
    files,
    window::Window,
};
use crate::{
    fault::{Context, SysError},
    status::Status,
};
use nix::{errno::Errno, sys::stat::fstat};
use std::{
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

/// Follows the records of one job. Any number of readers may do so; none disturbs the writer.
#[derive(Debug)]
pub struct SpoolReader {
    dir: OwnedFd,
    segment: Option<Segment>,
    cursor: Cursor,
    window: Window,
    /// What the records before the cursor say, those before the place where we began included.
    exit: Option<Status>,
    ended: bool,
}

#[derive(Debug)]
struct Segment {
    file: OwnedFd,
    start: u64,
}

/// A record and the cursor behind it.
pub type Found<'a> = (Record<&'a [u8]>, Cursor);

/// What comes next.
enum Next {
    /// A record that is not in the log as such: what a segment's head tells.
    Told(Record<&'static [u8]>),
    /// The record at this offset of the segment.
    At(u64),
}

impl SpoolReader {
    /// Opens the spool in a job's directory at a place that a reader returned before, or at the
    /// beginning ([`Cursor::default`]). `EINVAL` if the cursor is of another spool.
    pub fn open(dir: &Path, cursor: Cursor) -> Result<Self, SysError> {
        let dir = files::open_dir(dir)?;
        let mut reader = Self {
            dir,
            segment: None,
            cursor,
            window: Window::new(),
            exit: None,
            ended: false,
        };
        reader.enter()?;
        Ok(reader)
    }

    /// How the job ended, once its `Exit` stands before the cursor. A reader that began behind that record
    /// is not given it, but knows it.
    #[must_use]
    pub fn exit(&self) -> Option<Status> {
        self.exit
    }

    /// Whether the job's `End` stands before the cursor: there is nothing more to come.
    #[must_use]
    pub fn ended(&self) -> bool {
        self.ended
    }

    /// The next record and the cursor behind it; `None` if there is nothing more now. Does not
    /// wait. Where records were deleted before they were read, `Gap`s say what is missing of each
    /// stream.
    #[expect(
        clippy::should_implement_trait,
        reason = "an Iterator cannot lend its buffer"
    )]
    pub fn next(&mut self) -> Result<Option<Found<'_>>, SysError> {
        let at = match self.locate()? {
            None => return Ok(None),
            Some(Next::Told(record)) => return Ok(Some((record, self.cursor))),
            Some(Next::At(at)) => at,
        };
        let start = self.segment.as_ref().map_or(0, |segment| segment.start);
        let (header, payload) = self
            .window
            .get(at)
            .ok_or(Errno::EBADMSG)
            .context("read", "spool record")?;
        let record = codec::decode(&header, payload)
            .ok_or(Errno::EBADMSG)
            .context("read", "spool record")?;
        let cursor = &mut self.cursor;
        cursor.position = start + at + (HEADER_BYTES + payload.len()) as u64;
        match record {
            Record::Output {
                stream,
                offset,
                bytes,
                ..
            } => {
                cursor.set_offset(stream, offset + bytes.len() as u64);
            }
            Record::Gap {
                stream,
                offset,
                bytes,
                ..
            } => cursor.set_offset(stream, offset.saturating_add(bytes)),
            Record::Started | Record::Exit { .. } | Record::End { .. } => {}
        }
        Ok(Some((record, *cursor)))
    }

    /// Goes on to the next whole record, through heads and over lost segments.
    fn locate(&mut self) -> Result<Option<Next>, SysError> {
        loop {
            if self.segment.is_none() && !self.enter()? {
                return Ok(None);
            }
            let Some(segment) = &self.segment else {
                return Ok(None);
            };
            let at = self.cursor.position.saturating_sub(segment.start);
            if !self.window.has(segment.file.as_fd(), at)? {
                if self.advance(at)? {
                    continue;
                }
                return Ok(None);
            }
            let Some((header, payload)) = self.window.get(at) else {
                return Ok(None);
            };
            self.exit = exit_in(&header, payload).or(self.exit);
            self.ended |= header.kind == Kind::End;
            match header.kind {
                Kind::Head => {
                    let head = Head::decode(payload)
                        .ok_or(Errno::EBADMSG)
                        .context("read", "segment head")?;
                    match told(&mut self.cursor, &head) {
                        Some(record) => return Ok(Some(Next::Told(record))),
                        None => self.cursor.position = segment.start + HEAD_BYTES,
                    }
                }
                Kind::Output | Kind::Gap => {
                    let missed = missed(&mut self.cursor, header.stream, header.offset);
                    return Ok(Some(missed.map_or(Next::At(at), Next::Told)));
                }
                Kind::Started | Kind::Exit | Kind::End => return Ok(Some(Next::At(at))),
            }
        }
    }

    /// Opens the segment of the cursor, or the oldest if that is gone; false if there is none yet.
    fn enter(&mut self) -> Result<bool, SysError> {
        loop {
            let starts = files::list(self.dir.as_fd())?;
            let holds = starts
                .iter()
                .rev()
                .find(|start| **start <= self.cursor.position);
            let Some(start) = holds.or(starts.first()).copied() else {
                return Ok(false);
            };
            if self.switch(start)? {
                return if start <= self.cursor.position {
                    self.check_place().map(|()| true)
                } else {
                    Ok(true)
                };
            }
        }
    }

    /// Refuses a cursor that does not stand between two records of its segment.
    fn check_place(&mut self) -> Result<(), SysError> {
        let Some(segment) = &self.segment else {
            return Ok(());
        };
        let place = self.cursor.position - segment.start;
        let mut at = 0;
        while at < place && self.window.has(segment.file.as_fd(), at)? {
            let Some((header, payload)) = self.window.get(at) else {
                break;
            };
            self.exit = exit_in(&header, payload).or(self.exit);
            self.ended |= header.kind == Kind::End;
            at += (HEADER_BYTES + payload.len()) as u64;
        }
        if at == place {
            Ok(())
        } else {
            Err(Errno::EINVAL).context("seek", format_args!("cursor {}", self.cursor))
        }
    }

    /// At the end of what the segment has: goes on to another if this one is finished. True: look
    /// again.
    fn advance(&mut self, at: u64) -> Result<bool, SysError> {
        let Some(segment) = &self.segment else {
            return Ok(false);
        };
        let start = segment.start;
        if at > 0 && self.switch(start + at)? {
            return Ok(true);
        }
        let Some(segment) = &self.segment else {
            return Ok(false);
        };
        let stat = fstat(&segment.file).context("fstat", "spool segment")?;
        if stat.st_nlink > 0 && stat.st_size.unsigned_abs() <= at {
            return Ok(false);
        }
        // Either bytes that are no record yet, or deleted: it is finished if there is a later one.
        let later = files::list(self.dir.as_fd())?
            .into_iter()
            .find(|other| *other > start);
        let Some(later) = later else { return Ok(false) };
        // It may have been finished since the last look.
        self.window.forget();
        let Some(segment) = &self.segment else {
            return Ok(false);
        };
        if !self.window.has(segment.file.as_fd(), at)? {
            self.switch(later)?;
        }
        Ok(true)
    }

    /// Makes the segment that starts there the present one; false, and nothing changed, if there is
    /// none.
    fn switch(&mut self, start: u64) -> Result<bool, SysError> {
        let Some(file) = files::read(self.dir.as_fd(), start)? else {
            return Ok(false);
        };
        self.segment = Some(Segment { file, start });
        self.window.forget();
        Ok(true)
    }
}

/// How the job ended, as far as one record tells.
fn exit_in(header: &Header, payload: &[u8]) -> Option<Status> {
    if header.kind == Kind::Head {
        return Head::decode(payload)?.exit.map(|(_, exit)| exit.status);
    }
    match codec::decode(header, payload)? {
        Record::Exit { status, .. } => Some(status),
        Record::Started | Record::Output { .. } | Record::Gap { .. } | Record::End { .. } => None,
    }
}

/// What a head knows and the reader does not: missing bytes, and the records that were deleted with
/// them.
fn told(cursor: &mut Cursor, head: &Head) -> Option<Record<&'static [u8]>> {
    let gap = missed(cursor, Stream::Stdout, head.stdout)
        .or_else(|| missed(cursor, Stream::Stderr, head.stderr));
    if gap.is_some() {
        return gap;
    }
    if let Some(position) = head.started
        && cursor.position <= position
    {
        cursor.position = position + 1;
        return Some(Record::Started);
    }
    if let Some((position, exit)) = head.exit
        && cursor.position <= position
    {
        cursor.position = position + 1;
        return Some(exit.record());
    }
    None
}

/// The gap between what the reader has of a stream and this offset.
fn missed(cursor: &mut Cursor, stream: Stream, offset: u64) -> Option<Record<&'static [u8]>> {
    let from = cursor.offset(stream);
    let bytes = offset.checked_sub(from).filter(|bytes| *bytes > 0)?;
    cursor.set_offset(stream, offset);
    Some(Record::Gap {
        stream,
        offset: from,
        bytes,
        certain: true,
    })
}
