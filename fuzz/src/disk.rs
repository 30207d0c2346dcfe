//! What helpers say and what is on the disk.

use container::frames::FrameReader;
use container::job::JobRequest;
use container::launch::{Event, Launch};
use container::request::{Answer, Request};
use container::spool::{Cursor, MIN_CAP, SpoolReader, SpoolWriter};
use container::status::Status;
use ostler::foreign;
use std::fs;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::trees::Scratch;

/// What `iomux-link` writes, in two pieces.
pub(crate) fn frames(bytes: &[u8]) {
    let mut reader = FrameReader::default();
    let (first, second) = bytes.split_at(bytes.len() / 2);
    let mut frames = 0;
    for piece in [first, second] {
        reader.push(piece);
        while let Ok(Some(_frame)) = reader.next() {
            frames += 1;
            assert!(frames <= bytes.len(), "more frames than bytes");
        }
    }
}

/// Requests to a container's init, its answers, and what is handed to it at its start.
pub(crate) fn requests(bytes: &[u8]) {
    if let Ok(request) = Request::decode(bytes) {
        assert_eq!(Request::decode(&request.encode()), Ok(request));
    }
    if let Ok(answer) = Answer::decode(bytes) {
        assert_eq!(Answer::decode(&answer.encode()), Ok(answer));
    }
    if let Ok(job) = JobRequest::decode(bytes) {
        assert_eq!(JobRequest::decode(&job.encode()), Ok(job));
    }
    if let Ok(launch) = Launch::decode(bytes) {
        assert_eq!(Launch::decode(&launch.encode()), Ok(launch));
    }
    if let Ok(event) = Event::decode(bytes) {
        assert_eq!(Event::decode(&event.encode()), Ok(event));
    }
    if let Some(status) = bytes.first_chunk().and_then(|bytes| Status::decode(*bytes)) {
        assert_eq!(Status::decode(status.encode()), Some(status));
    }
}

/// The boot of the evacuation among the seeds.
const BOOT: &str = "9bd7fcba-f806-4d32-891a-5313e57e7323";

/// An instance's record, how far its output was told, a crash's record, an evacuation, where the pools stand; and what
/// the `oom` helper and an app's state file say.
pub(crate) fn records(bytes: &[u8]) {
    if let Some(crash) = foreign::crash(bytes) {
        assert!(foreign::crash(&crash).is_some());
    }
    let all = Duration::from_secs(600);
    if let Some(left) = foreign::evacuation(bytes, BOOT, all, 1_795_425_376.0) {
        assert!(left <= all, "{left:?}");
    }
    if foreign::state_file(bytes) {
        assert!(bytes.windows(7).any(|word| word == b"RUNNING") || bytes.contains(&b'\\'));
    }
    if let Ok(record) = foreign::record(bytes) {
        assert_eq!(foreign::record(&record), Ok(record));
    }
    if let Ok(text) = std::str::from_utf8(bytes) {
        if let Some(told) = foreign::told_output(text) {
            assert_eq!(foreign::told_output(&told), Some(told));
        }
        if let Ok(cursor) = text.parse::<Cursor>() {
            assert_eq!(cursor.to_string().parse(), Ok(cursor));
        }
        let _whatever_was_given_out_last = foreign::pools(text);
        let pools = foreign::pools(&format!("10.254.0.2 61001\n{text}"));
        assert_eq!(foreign::pools(&pools), pools);
        for total in text.lines().filter_map(foreign::oom_line) {
            assert_eq!(foreign::oom_line(&format!("oom_kill {total}")), Some(total));
        }
    }
}

/// A writer maps a page until its process ends, and a process has 65,530 mappings (vm.max_map_count).
const MOST_WRITERS: u32 = 50_000;
static WRITERS: AtomicU32 = AtomicU32::new(0);

/// What two bytes give the length of, and the rest.
fn piece(bytes: &[u8]) -> (&[u8], &[u8]) {
    let Some((length, rest)) = bytes.split_first_chunk() else {
        return (bytes, &[]);
    };
    let length = usize::from(u16::from_le_bytes(*length));
    rest.split_at_checked(length).unwrap_or((rest, &[]))
}

/// A spool as a killed writer, or a failing disk, left it: two segments and the marks. It is read, then a writer goes on
/// with it, then it is read to the end that this one writes.
pub(crate) fn spool(bytes: &[u8]) {
    let scratch = Scratch::new();
    let (first, rest) = piece(bytes);
    let (second, marks) = piece(rest);
    let start = format!("spool.{:016x}", first.len());
    for (name, piece) in [
        ("spool.0000000000000000", first),
        (start.as_str(), second),
        ("state", marks),
    ] {
        if !piece.is_empty() {
            drop(fs::write(scratch.path().join(name), piece));
        }
    }
    read(&scratch, bytes.len());
    if WRITERS.fetch_add(1, Ordering::Relaxed) >= MOST_WRITERS {
        return;
    }
    let Ok(mut writer) = SpoolWriter::open(scratch.path(), MIN_CAP) else {
        return;
    };
    if writer.end().is_ok() {
        drop(writer);
        read(&scratch, bytes.len());
    }
}

fn read(scratch: &Scratch, bytes: usize) {
    let Ok(mut reader) = SpoolReader::open(scratch.path(), Cursor::default()) else {
        return;
    };
    let mut before = Cursor::default();
    // Each record has a header; some are made up for what is missing.
    for _ in 0..bytes + 16 {
        let Ok(Some((_, next))) = reader.next() else {
            return;
        };
        assert!(next.position >= before.position, "{before} {next}");
        assert!(next.stdout >= before.stdout && next.stderr >= before.stderr);
        before = next;
    }
    assert!(reader.ended(), "a spool of {bytes} bytes has no end");
}
