//! The newest segment: finding it, its end, and making the next.

use super::{
    HEADER_BYTES, Kind, Tail,
    codec::{self, HEAD_BYTES, Head},
    files,
    window::Window,
};
use crate::fault::{Context, SysError};
use nix::{
    errno::Errno,
    fcntl::{OFlag, renameat},
    sys::uio::pwrite,
    unistd::{UnlinkatFlags, ftruncate, unlinkat},
};
use std::{
    collections::VecDeque,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

/// A segment whose head is not whole.
const NEXT: &str = "next";

/// What is on disk: the newest segment, and where the log ends.
pub(super) struct Found {
    pub(super) segment: OwnedFd,
    pub(super) starts: VecDeque<u64>,
    pub(super) end: u64,
    pub(super) tail: Tail,
}

/// Finds it, or begins a log.
pub(super) fn find(dir: BorrowedFd<'_>) -> Result<Found, SysError> {
    let mut starts = VecDeque::from(files::list(dir)?);
    while let Some(start) = starts.back().copied() {
        let segment = files::open_in(dir, &files::name(start), OFlag::O_RDWR)?;
        if let Some((length, tail)) = scan(segment.as_fd(), start)? {
            return Ok(Found {
                segment,
                starts,
                end: start + length,
                tail,
            });
        }
        // The host went down before the head was on the disk, so it holds nothing: the one before is
        // the newest.
        unlinkat(dir, files::name(start).as_str(), UnlinkatFlags::NoRemoveDir)
            .context("unlink", files::name(start))?;
        starts.pop_back();
        if starts.is_empty() && start > 0 {
            return Err(Errno::EBADMSG)
                .context("read", format_args!("{}: no head", files::name(start)));
        }
    }
    let tail = Tail::default();
    let segment = new_segment(dir, 0, &tail.head)?;
    Ok(Found {
        segment,
        starts: VecDeque::from([0]),
        end: HEAD_BYTES,
        tail,
    })
}

/// Reads a segment from head to tail: its length up to the last whole record, and what it says.
fn scan(segment: BorrowedFd<'_>, start: u64) -> Result<Option<(u64, Tail)>, SysError> {
    let mut window = Window::new();
    let mut length = 0;
    let mut tail = Tail::default();
    while window.has(segment, length)? {
        let Some((header, payload)) = window.get(length) else {
            break;
        };
        match (length, header.kind) {
            (0, Kind::Head) => match Head::decode(payload) {
                Some(head) => tail.head = head,
                None => break,
            },
            (1.., Kind::Started | Kind::Output | Kind::Gap | Kind::Exit | Kind::End) => {
                let Some(record) = codec::decode(&header, payload) else {
                    break;
                };
                tail.apply(start + length, &record);
            }
            _ => break,
        }
        length += (HEADER_BYTES + payload.len()) as u64;
    }
    Ok((length > 0).then_some((length, tail)))
}

/// Makes a segment with its head; on failure it leaves none. It gets its name last: a reader that found
/// it without a head, and would not find it again, could hold on to a file that never becomes one.
pub(super) fn new_segment(
    dir: BorrowedFd<'_>,
    start: u64,
    head: &Head,
) -> Result<OwnedFd, SysError> {
    let segment = files::open_in(dir, NEXT, OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_TRUNC)?;
    let mut bytes = Vec::new();
    head.encode(&mut bytes);
    let name = files::name(start);
    let made = write_whole(segment.as_fd(), &bytes, 0)
        .and_then(|()| renameat(dir, NEXT, dir, name.as_str()).context("rename", name));
    if let Err(error) = made {
        // The first error is the one to tell.
        let _ = unlinkat(dir, NEXT, UnlinkatFlags::NoRemoveDir);
        return Err(error);
    }
    Ok(segment)
}

/// Writes all of it at `place`, or leaves the file as it was.
pub(super) fn write_whole(file: BorrowedFd<'_>, bytes: &[u8], place: i64) -> Result<(), SysError> {
    match pwrite(file, bytes, place) {
        Ok(written) if written == bytes.len() => Ok(()),
        // A short write to a file means that the disk is full (write(2)).
        failed => {
            let _ = ftruncate(file, place);
            Err(failed.err().unwrap_or(Errno::ENOSPC)).context("pwrite", "spool segment")
        }
    }
}
