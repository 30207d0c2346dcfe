//! The promise of the spool, tried against the real kernel: every byte once, or named as missing.

#![expect(
    clippy::cast_possible_truncation,
    reason = "small random numbers, and bytes made by cutting"
)]

use crate::spool::{
    Cursor, MAX_PAYLOAD, MIN_CAP, Record, SpoolReader, SpoolWriter, Stream, files, marks::Busy,
    newest::new_segment,
};
use crate::status::Status;
use nix::{fcntl::OFlag, unistd::pipe2};
use std::{
    fs::{self, File},
    io::Write,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

/// A directory that goes with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path =
            std::env::temp_dir().join(format!("ostler-spool-{}-{number}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The byte that every test writes at an offset of a stream, so that a misplaced one is seen.
fn byte(stream: Stream, offset: u64) -> u8 {
    let mixed = offset.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (stream as u64) << 7;
    (mixed >> 23) as u8
}

fn bytes(stream: Stream, from: u64, len: usize) -> Vec<u8> {
    (from..from + len as u64)
        .map(|offset| byte(stream, offset))
        .collect()
}

/// The pipes of a job.
struct Job {
    pipes: [(OwnedFd, File); 2],
    written: [u64; 2],
}

impl Job {
    fn new() -> Self {
        let pipe = || {
            pipe2(OFlag::O_CLOEXEC)
                .map(|(read, write)| (read, File::from(write)))
                .unwrap()
        };
        Self {
            pipes: [pipe(), pipe()],
            written: [0; 2],
        }
    }

    fn write(&mut self, stream: Stream, len: usize) {
        let from = self.written[stream as usize];
        self.pipes[stream as usize]
            .1
            .write_all(&bytes(stream, from, len))
            .unwrap();
        self.written[stream as usize] += len as u64;
    }

    /// Writes, and lets the writer take all of it.
    fn output(&mut self, spool: &mut SpoolWriter, stream: Stream, len: usize) {
        self.write(stream, len);
        self.take(spool, stream);
    }

    fn take(&self, spool: &mut SpoolWriter, stream: Stream) {
        while spool
            .take(stream, self.pipes[stream as usize].0.as_fd(), usize::MAX)
            .unwrap()
            > 0
        {}
    }
}

/// What a reader has been told, checked byte by byte as it comes.
#[derive(Default)]
struct Heard {
    cursor: Cursor,
    at: [u64; 2],
    missing: [u64; 2],
    uncertain: u32,
    started: u32,
    exits: Vec<(Status, u64, u64)>,
    ended: bool,
}

impl Heard {
    fn listen(&mut self, reader: &mut SpoolReader) -> usize {
        let mut count = 0;
        while self.one(reader) {
            count += 1;
        }
        count
    }

    fn one(&mut self, reader: &mut SpoolReader) -> bool {
        let Some((record, cursor)) = reader.next().unwrap() else {
            return false;
        };
        match record {
            Record::Started => self.started += 1,
            Record::Output {
                stream,
                offset,
                time_ns,
                bytes: got,
            } => {
                assert_eq!(offset, self.at[stream as usize], "{stream}");
                assert!(time_ns > 1 << 60);
                assert!(
                    got == bytes(stream, offset, got.len()),
                    "{stream} at {offset}"
                );
                self.at[stream as usize] += got.len() as u64;
            }
            Record::Gap {
                stream,
                offset,
                bytes,
                certain,
            } => {
                assert_eq!(offset, self.at[stream as usize], "{stream}");
                self.at[stream as usize] += bytes;
                self.missing[stream as usize] += bytes;
                self.uncertain += u32::from(!certain);
            }
            Record::Exit {
                status,
                stdout,
                stderr,
                ..
            } => self.exits.push((status, stdout, stderr)),
            Record::End { stdout, stderr } => {
                assert_eq!([stdout, stderr], self.at);
                self.ended = true;
            }
        }
        assert_eq!([cursor.stdout, cursor.stderr], self.at);
        self.cursor = cursor;
        true
    }
}

fn hear(dir: &Path) -> Heard {
    let mut heard = Heard::default();
    heard.listen(&mut SpoolReader::open(dir, Cursor::default()).unwrap());
    heard
}

#[test]
fn a_job_is_heard_from_any_place() {
    let dir = Scratch::new();
    let mut job = Job::new();
    let mut spool = SpoolWriter::open(&dir.0, 0).unwrap();
    spool.started().unwrap();
    job.output(&mut spool, Stream::Stdout, 10);
    job.output(&mut spool, Stream::Stderr, 64 * 1024);
    job.output(&mut spool, Stream::Stdout, 1);
    spool.exit(Status::Exited(3)).unwrap();
    job.output(&mut spool, Stream::Stdout, 5);
    spool.end().unwrap();
    spool.sync().unwrap();

    let mut places = vec![Cursor::default()];
    let mut reader = SpoolReader::open(&dir.0, Cursor::default()).unwrap();
    while let Some((_, cursor)) = reader.next().unwrap() {
        places.push(cursor.to_string().parse().unwrap());
    }
    assert_eq!(
        places.len(),
        9,
        "started, 5 outputs (64 KiB are two), exit, end"
    );
    for (number, cursor) in places.iter().enumerate() {
        let mut heard = Heard {
            at: [cursor.stdout, cursor.stderr],
            ..Heard::default()
        };
        let count = heard.listen(&mut SpoolReader::open(&dir.0, *cursor).unwrap());
        assert_eq!(count, places.len() - 1 - number);
        assert_eq!((heard.at, heard.missing), ([16, 65536], [0, 0]));
        if number < 6 {
            assert_eq!(heard.exits, [(Status::Exited(3), 11, 65536)]);
        }
    }
}

#[test]
fn a_cursor_of_another_spool_is_refused() {
    let dir = Scratch::new();
    let mut spool = SpoolWriter::open(&dir.0, 0).unwrap();
    spool.started().unwrap();
    for position in [1, 96 + 31, 1 << 40] {
        let cursor = Cursor {
            position,
            ..Cursor::default()
        };
        assert_eq!(
            SpoolReader::open(&dir.0, cursor).unwrap_err().errno,
            nix::errno::Errno::EINVAL
        );
    }
    for text in ["", "1", "1:2", "1:2:", "1:2:3:4", "-1:0:0", "a:b:c"] {
        assert!(text.parse::<Cursor>().is_err(), "{text:?}");
    }
}

#[test]
fn a_reader_waits_for_a_spool_that_is_not_there_yet() {
    let dir = Scratch::new();
    let mut reader = SpoolReader::open(&dir.0, Cursor::default()).unwrap();
    assert_eq!(reader.next().unwrap(), None);
    SpoolWriter::open(&dir.0, 0).unwrap().started().unwrap();
    assert!(matches!(reader.next().unwrap(), Some((Record::Started, _))));
}

#[test]
fn lost_segments_are_named_exactly_and_the_exit_is_never_lost() {
    let dir = Scratch::new();
    let mut job = Job::new();
    let mut spool = SpoolWriter::open(&dir.0, 0).unwrap();
    spool.started().unwrap();
    let mut early = SpoolReader::open(&dir.0, Cursor::default()).unwrap();
    let mut behind = Heard::default();
    job.output(&mut spool, Stream::Stdout, 1000);
    behind.listen(&mut early);
    spool.exit(Status::Signaled(9)).unwrap();
    for _ in 0..40 {
        job.output(&mut spool, Stream::Stdout, 50_000);
        job.output(&mut spool, Stream::Stderr, 777);
    }
    spool.end().unwrap();
    assert!(spool.size() <= MIN_CAP, "{} bytes of log", spool.size());

    let total = [1000 + 40 * 50_000, 40 * 777];
    let fresh = hear(&dir.0);
    assert_eq!((fresh.at, fresh.started, fresh.ended), (total, 1, true));
    assert!(fresh.missing[0] > 1_000_000 && fresh.missing[1] > 777);
    assert_eq!(fresh.exits, [(Status::Signaled(9), 1000, 0)]);

    // A place that was deleted, behind the exit: the next head still knows it.
    assert_eq!(early.exit(), None, "it has not come so far");
    let lost = Cursor {
        position: 2000,
        stdout: 1000,
        stderr: 0,
    };
    let mut late = SpoolReader::open(&dir.0, lost).unwrap();
    while late.next().unwrap().is_some() {}
    assert_eq!(late.exit(), Some(Status::Signaled(9)));

    // One that holds the deleted segment open hears all of it, then the gap.
    behind.listen(&mut early);
    assert_eq!((behind.at, behind.started, behind.ended), (total, 1, true));
    assert!(behind.missing[0] < fresh.missing[0]);
    assert_eq!(behind.exits, [(Status::Signaled(9), 1000, 0)]);
}

#[test]
fn every_place_between_lost_records_can_be_resumed() {
    let dir = Scratch::new();
    let mut job = Job::new();
    let mut spool = SpoolWriter::open(&dir.0, 0).unwrap();
    spool.started().unwrap();
    spool.exit(Status::Exited(0)).unwrap();
    for _ in 0..30 {
        job.output(&mut spool, Stream::Stdout, 30_000);
        job.output(&mut spool, Stream::Stderr, 30_000);
    }
    spool.end().unwrap();
    let whole = hear(&dir.0);
    let mut heard = Heard::default();
    loop {
        let mut reader = SpoolReader::open(&dir.0, heard.cursor).unwrap();
        if !heard.one(&mut reader) {
            break;
        }
    }
    assert_eq!((heard.at, heard.missing), (whole.at, whole.missing));
    assert_eq!(
        (heard.started, heard.exits.len(), heard.ended),
        (1, 1, true)
    );
}

#[test]
fn a_writer_killed_after_the_move_has_lost_nothing() {
    for len in [1, 32, 33, 5000, MAX_PAYLOAD] {
        let dir = Scratch::new();
        let mut job = Job::new();
        let mut spool = SpoolWriter::open(&dir.0, 0).unwrap();
        job.output(&mut spool, Stream::Stdout, 100);
        job.write(Stream::Stderr, len);
        // Killed between splice and header; a reader sees nothing of it.
        assert_eq!(
            spool
                .move_in(Stream::Stderr, job.pipes[1].0.as_fd(), len)
                .unwrap(),
            len
        );
        drop(spool);
        assert_eq!(hear(&dir.0).at, [100, 0]);
        let spool = SpoolWriter::open(&dir.0, 0).unwrap();
        assert_eq!(hear(&dir.0).at, [100, len as u64]);
        // Killed between header and mark.
        spool.marks.set(Busy::Moving(Stream::Stderr));
        drop(spool);
        SpoolWriter::open(&dir.0, 0).unwrap().end().unwrap();
        let heard = hear(&dir.0);
        assert_eq!(
            (heard.at, heard.missing, heard.uncertain),
            ([100, len as u64], [0, 0], 0)
        );
    }
}

#[test]
fn torn_records_are_cut_off_and_unseen_by_readers() {
    let dir = Scratch::new();
    let mut spool = SpoolWriter::open(&dir.0, 0).unwrap();
    spool.started().unwrap();
    let segment = dir.0.join(files::name(0));
    let good = fs::read(&segment).unwrap();
    spool.exit(Status::Exited(1)).unwrap();
    let more = fs::read(&segment).unwrap();
    drop(spool);
    for torn in good.len() + 1..more.len() {
        fs::write(&segment, &more[..torn]).unwrap();
        assert_eq!(hear(&dir.0).exits, []);
        let mut spool = SpoolWriter::open(&dir.0, 0).unwrap();
        assert_eq!(fs::read(&segment).unwrap(), good, "{torn} bytes");
        assert!(spool.tail().started() && !spool.tail().exited());
        spool.exit(Status::Exited(2)).unwrap();
        assert_eq!(hear(&dir.0).exits, [(Status::Exited(2), 0, 0)]);
    }
}

#[test]
fn a_segment_without_a_head_is_not_the_newest() {
    let dir = Scratch::new();
    let mut job = Job::new();
    let mut spool = SpoolWriter::open(&dir.0, 0).unwrap();
    job.output(&mut spool, Stream::Stdout, 100);
    let end = spool.end;
    drop(spool);
    for head in [&b""[..], &[0; 40]] {
        fs::write(dir.0.join(files::name(end)), head).unwrap();
        assert_eq!(hear(&dir.0).at, [100, 0]);
        assert_eq!(SpoolWriter::open(&dir.0, 0).unwrap().end, end);
    }
}

#[test]
fn what_a_full_disk_swallowed_is_named() {
    let dir = Scratch::new();
    let mut job = Job::new();
    let mut spool = SpoolWriter::open(&dir.0, 0).unwrap();
    job.output(&mut spool, Stream::Stdout, 10);
    job.write(Stream::Stdout, 1000);
    let pipe = job.pipes[0].0.as_fd();
    assert_eq!(spool.discard(Stream::Stdout, pipe, 400).unwrap(), 400);
    assert_eq!(spool.discard(Stream::Stdout, pipe, 600).unwrap(), 600);
    // A successor knows the count, and if it was killed in between that it may be short.
    spool.marks.set(Busy::Discarding(Stream::Stdout));
    drop(spool);
    let mut spool = SpoolWriter::open(&dir.0, 0).unwrap();
    job.output(&mut spool, Stream::Stdout, 5);
    let heard = hear(&dir.0);
    assert_eq!(
        (heard.at, heard.missing, heard.uncertain),
        ([1015, 0], [1000, 0], 1)
    );
}

#[test]
fn a_disk_that_takes_nothing_stops_nobody_and_is_named_when_it_is_back() {
    let dir = Scratch::new();
    let mut job = Job::new();
    let mut spool = SpoolWriter::open(&dir.0, 0).unwrap();
    for _ in 0..10 {
        job.output(&mut spool, Stream::Stdout, 50_000);
    }
    assert!(
        spool.starts.len() > 1,
        "there is an older segment to give up"
    );
    // In their place: nothing can be moved there (EINVAL) or written (ENOSPC), made or deleted (ENOTDIR).
    let full = || File::options().read(true).write(true).open("/dev/full");
    let segment = std::mem::replace(&mut spool.segment, full().unwrap().into());
    let directory = std::mem::replace(&mut spool.dir, full().unwrap().into());
    for stream in [Stream::Stdout, Stream::Stderr, Stream::Stdout] {
        job.output(&mut spool, stream, 60_000);
    }
    assert!(spool.exit(Status::Exited(0)).is_err());
    (spool.segment, spool.dir) = (segment, directory);
    job.output(&mut spool, Stream::Stdout, 5);
    spool.exit(Status::Exited(0)).unwrap();
    let heard = hear(&dir.0);
    assert_eq!(heard.at, [620_005, 60_000]);
    assert_eq!((heard.missing, heard.uncertain), ([120_000, 60_000], 0));
    assert_eq!(heard.exits, [(Status::Exited(0), 620_005, 60_000)]);
}

#[test]
fn bytes_that_became_no_record_are_named() {
    for killed in [false, true] {
        let dir = Scratch::new();
        let mut job = Job::new();
        let mut spool = SpoolWriter::open(&dir.0, 0).unwrap();
        job.output(&mut spool, Stream::Stdout, 10);
        job.write(Stream::Stdout, 1000);
        let pipe = job.pipes[0].0.as_fd();
        let moved = spool.move_in(Stream::Stdout, pipe, 1000).unwrap();
        let full = File::options().write(true).open("/dev/full").unwrap();
        let segment = std::mem::replace(&mut spool.segment, full.into());
        spool.commit_or_lose(Stream::Stdout, moved);
        spool.segment = segment;
        if killed {
            drop(spool);
            spool = SpoolWriter::open(&dir.0, 0).unwrap();
        }
        job.output(&mut spool, Stream::Stdout, 5);
        let heard = hear(&dir.0);
        assert_eq!((heard.at, heard.missing), ([1015, 0], [1000, 0]));
        let bytes = fs::metadata(dir.0.join(files::name(0))).unwrap().len();
        assert_eq!(bytes, spool.end, "nothing of them is left");
    }
}

#[test]
fn marks_that_cannot_be_kept_kill_nobody() {
    let dir = Scratch::new();
    let mut job = Job::new();
    let mut spool = SpoolWriter::open(&dir.0, 0).unwrap();
    job.output(&mut spool, Stream::Stdout, 10);
    // As good as a file system that takes no changed page: a store to a mapping of this file is a SIGBUS.
    let state = File::options().write(true).open(dir.0.join("state"));
    state.unwrap().set_len(0).unwrap();
    job.output(&mut spool, Stream::Stderr, 10);
    assert_eq!(hear(&dir.0).at, [10, 10]);
}

#[test]
fn a_full_file_system_costs_old_segments_then_bytes_but_never_the_account() {
    // Many small segments, and one that has the disk for itself.
    for cap in [0, 16 << 20] {
        on_a_small_disk(|dir| {
            let mut job = Job::new();
            let mut spool = SpoolWriter::open(dir, cap).unwrap();
            spool.started().unwrap();
            for _ in 0..100 {
                job.output(&mut spool, Stream::Stdout, 40_000);
            }
            let ballast = dir.join("ballast");
            let _ = fs::write(&ballast, vec![0; 2 << 20]);
            job.output(&mut spool, Stream::Stdout, 30_000);
            spool.exit(Status::Exited(0)).unwrap();
            job.output(&mut spool, Stream::Stderr, 30_000);
            job.output(&mut spool, Stream::Stdout, 30_000);
            spool.end().unwrap();
            let heard = hear(dir);
            assert_eq!(
                (heard.at, heard.uncertain, heard.ended),
                ([4_060_000, 30_000], 0, true)
            );
            assert_eq!(heard.exits, [(Status::Exited(0), 4_030_000, 0)]);
            assert!(heard.missing[0] >= 3_000_000);
        });
    }
}

/// Runs with a directory that is a file system of 1 MiB.
fn on_a_small_disk(test: impl FnOnce(&Path) + std::panic::UnwindSafe) {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    let dir = Scratch::new();
    let tmpfs = Some("tmpfs");
    mount(tmpfs, &dir.0, tmpfs, MsFlags::empty(), Some("size=1m")).unwrap();
    let tested = std::panic::catch_unwind(|| test(&dir.0));
    umount2(&dir.0, MntFlags::MNT_DETACH).unwrap();
    tested.unwrap();
}

#[test]
fn a_successor_begins_on_a_full_disk_and_names_the_holes_when_there_is_room() {
    for killed_in in [Busy::Idle, Busy::Discarding(Stream::Stderr)] {
        on_a_small_disk(|dir| {
            let ballast = dir.join("ballast");
            let mut job = Job::new();
            let mut spool = SpoolWriter::open(dir, 16 << 20).unwrap();
            spool.started().unwrap();
            let _ = fs::write(&ballast, vec![0; 2 << 20]);
            for stream in Stream::ALL {
                job.output(&mut spool, stream, 60_000);
            }
            let offset = spool.tail().offset(Stream::Stdout);
            assert!(spool.marks.taken(Stream::Stdout) > offset, "it is full");
            // Until it has room, nothing but the marks knows, however often a successor begins.
            spool.marks.set(killed_in);
            drop(spool);
            drop(SpoolWriter::open(dir, 16 << 20).unwrap());
            let mut spool = SpoolWriter::open(dir, 16 << 20).unwrap();
            spool.uncertain(Stream::Stdout).unwrap();
            job.output(&mut spool, Stream::Stdout, 1000);
            assert_eq!(hear(dir).uncertain, 0);
            fs::remove_file(&ballast).unwrap();
            drop(spool);
            let mut spool = SpoolWriter::open(dir, 16 << 20).unwrap();
            for stream in Stream::ALL {
                job.output(&mut spool, stream, 10);
            }
            spool.exit(Status::Exited(0)).unwrap();
            spool.end().unwrap();
            let heard = hear(dir);
            let uncertain = 1 + u32::from(killed_in != Busy::Idle);
            assert_eq!(
                (heard.at, heard.uncertain, heard.ended),
                ([61_010, 60_010], uncertain, true)
            );
        });
    }
}

#[test]
fn a_segment_that_never_came_to_be_misleads_no_reader() {
    on_a_small_disk(|dir| {
        let mut job = Job::new();
        let mut spool = SpoolWriter::open(dir, 0).unwrap();
        job.output(&mut spool, Stream::Stdout, 1000);
        let mut reader = SpoolReader::open(dir, Cursor::default()).unwrap();
        let mut heard = Heard::default();
        heard.listen(&mut reader);
        let ballast = dir.join("ballast");
        let _ = fs::write(&ballast, vec![0; 2 << 20]);
        let (head, end) = (spool.tail.head, spool.end);
        // Looks again and again while the next segment is tried in vain: one that it sees goes at once.
        std::thread::scope(|scope| {
            let failing = scope.spawn(|| {
                for _ in 0..20_000 {
                    let failed = new_segment(spool.dir.as_fd(), end, &head).unwrap_err();
                    assert_eq!(failed.errno, nix::errno::Errno::ENOSPC);
                }
            });
            while !failing.is_finished() {
                assert_eq!(reader.next().unwrap(), None);
            }
        });
        fs::remove_file(&ballast).unwrap();
        for _ in 0..20 {
            job.output(&mut spool, Stream::Stdout, 20_000);
        }
        assert_eq!(spool.starts.len(), 3, "more than one segment follows");
        heard.listen(&mut reader);
        assert_eq!((heard.at, heard.missing), ([401_000, 0], [0, 0]));
    });
}

#[test]
fn marks_and_tails_of_an_earlier_boot_are_not_believed() {
    let dir = Scratch::new();
    let mut job = Job::new();
    let mut spool = SpoolWriter::open(&dir.0, 0).unwrap();
    job.output(&mut spool, Stream::Stdout, 10);
    job.write(Stream::Stdout, 90);
    spool
        .move_in(Stream::Stdout, job.pipes[0].0.as_fd(), 90)
        .unwrap();
    drop(spool);
    let mut state = fs::read(dir.0.join("state")).unwrap();
    state[8] ^= 1;
    fs::write(dir.0.join("state"), state).unwrap();
    SpoolWriter::open(&dir.0, 0).unwrap().end().unwrap();
    let heard = hear(&dir.0);
    assert_eq!((heard.at, heard.uncertain, heard.ended), ([10, 0], 2, true));
}

/// Reproducible noise: xorshift64.
struct Noise(u64);

impl Noise {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }

    fn stream(&mut self) -> Stream {
        Stream::ALL[self.below(2) as usize]
    }
}

/// Output of a random length, or the writer killed between two system calls and replaced.
fn act(noise: &mut Noise, job: &mut Job, mut writer: SpoolWriter, dir: &Path) -> SpoolWriter {
    let stream = noise.stream();
    match noise.below(10) {
        0 => {
            job.write(stream, 1 + noise.below(60_000) as usize);
            let pipe = job.pipes[stream as usize].0.as_fd();
            writer
                .move_in(stream, pipe, 1 + noise.below(60_000) as usize)
                .unwrap();
            drop(writer);
            writer = SpoolWriter::open(dir, 0).unwrap();
            job.take(&mut writer, stream);
        }
        1 => {
            drop(writer);
            writer = SpoolWriter::open(dir, 0).unwrap();
        }
        2..6 => job.output(&mut writer, stream, 1 + noise.below(65_536) as usize),
        _ => job.output(&mut writer, stream, 1 + noise.below(100) as usize),
    }
    writer
}

#[test]
fn random_jobs_killed_writers_and_lagging_readers_agree() {
    for seed in 1..40 {
        let dir = Scratch::new();
        let mut noise = Noise(0x5851_f42d_4c95_7f2d ^ seed << 20);
        let mut job = Job::new();
        let mut spool = Some(SpoolWriter::open(&dir.0, 0).unwrap());
        spool.as_mut().unwrap().started().unwrap();
        let mut readers: Vec<_> = (0..3)
            .map(|_| {
                (
                    SpoolReader::open(&dir.0, Cursor::default()).unwrap(),
                    Heard::default(),
                )
            })
            .collect();
        for _ in 0..noise.below(300) {
            spool = Some(act(&mut noise, &mut job, spool.take().unwrap(), &dir.0));
            let which = noise.below(30) as usize;
            if let Some((reader, heard)) = readers.get_mut(which) {
                (0..noise.below(20)).all(|_| heard.one(reader));
            } else if which == 20 {
                let (reader, heard) = &mut readers[0];
                *reader = SpoolReader::open(&dir.0, heard.cursor).unwrap();
            }
        }
        let mut writer = spool.unwrap();
        writer.exit(Status::Exited(0)).unwrap();
        writer.end().unwrap();
        readers.push((
            SpoolReader::open(&dir.0, Cursor::default()).unwrap(),
            Heard::default(),
        ));
        for (reader, heard) in &mut readers {
            heard.listen(reader);
            assert_eq!(heard.at, job.written, "seed {seed}");
            assert_eq!(
                (heard.started, heard.exits.len(), heard.uncertain),
                (1, 1, 0),
                "seed {seed}"
            );
            assert!(heard.ended);
        }
    }
}

#[test]
fn a_reader_beside_a_fast_writer_sees_whole_records_only() {
    let dir = Scratch::new();
    let path = dir.0.clone();
    let writer = std::thread::spawn(move || {
        let mut job = Job::new();
        let mut noise = Noise(42);
        let mut spool = SpoolWriter::open(&path, 0).unwrap();
        spool.started().unwrap();
        for _ in 0..3000 {
            job.output(&mut spool, noise.stream(), 1 + noise.below(20_000) as usize);
        }
        spool.exit(Status::Exited(0)).unwrap();
        spool.end().unwrap();
        job.written
    });
    let mut heard = Heard::default();
    let mut reader = SpoolReader::open(&dir.0, Cursor::default()).unwrap();
    while !heard.ended {
        heard.listen(&mut reader);
        std::thread::yield_now();
    }
    assert_eq!(heard.at, writer.join().unwrap());
    assert_eq!(
        (heard.started, heard.exits.len(), heard.uncertain),
        (1, 1, 0)
    );
}
