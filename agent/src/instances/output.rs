//! A job's output on its way to the bus: published, confirmed, and only then forgotten.
//!
//! The linker's records come in spool order, each with the cursor that stands after it. What was
//! published since the last confirmation is repeated, with the same borders and offsets, whenever the
//! connection breaks: the linker is restarted at the confirmed cursor. Without a connection records
//! are still read, for the end of the job must be known, but their bytes stay in the spool.

use super::instance::JOB;
use super::outlet::{Confirmation, Counter, Mark, Message, Outlet, REFUSED_PAUSE};
use crate::engine::{Container, Followed};
use crate::host::open_or_make;
use crate::host::scribe::{Lateness, Scribe, Scribes};
use container::frames::Frame;
use container::spool::{Cursor, Record, Stream};
use container::status::Status;
use futures_util::FutureExt;
use futures_util::future::{Fuse, FusedFuture};
use messages::output::{DROPPED, INSTANCE, OFFSET, TIME};
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::pin::pin;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{debug, error, warn};

/// Most bytes on their way without a confirmation.
const WINDOW: u64 = 4 << 20;

/// How long the window is full before somebody reads ahead.
const STALLED: Duration = Duration::from_millis(250);

/// Between two tries to follow a job whose linkers end at once.
const RETRY: Duration = Duration::from_secs(10);

/// Between two questions to an init while the disk is late.
const ASK: Duration = Duration::from_secs(1);

/// How long output waits until its cursor is kept.
const PATIENCE: Duration = Duration::from_secs(1);

/// Bytes that headers and subject may take of the server's `max_payload`, generously.
const HEADROOM: usize = 1024;

/// What is known of a job.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct JobView {
    /// The program was executed.
    pub started: bool,
    /// How it ended, with the bytes of stdout and stderr until then.
    pub exit: Option<Status>,
    /// Both streams have ended, after so many bytes of stdout and stderr.
    pub end: Option<(u64, u64)>,
    /// Everything up to the end has reached the bus.
    pub delivered: bool,
    /// The job cannot be followed any more: why.
    pub lost: Option<String>,
}

impl JobView {
    /// Whether it has ended, in whatever way.
    #[must_use]
    pub fn over(&self) -> bool {
        self.exit.is_some() || self.end.is_some() || self.lost.is_some()
    }

    /// Whether it ended before its program was executed, and nobody said why.
    #[must_use]
    pub fn never_ran(&self) -> bool {
        self.end.is_some() && !self.started && self.exit.is_none()
    }
}

/// Whose output it is.
#[derive(Debug, Clone)]
pub struct Source {
    /// `droplet.output.<droplet>.<index>.<handle>`: the stream's name is added.
    pub subject: String,
    /// The container's handle: message ids begin with it.
    pub handle: String,
    /// The instance id as it is now; an update may change it.
    pub instance: watch::Receiver<String>,
    /// Counts the bytes that readers were told to be missing.
    pub missing: Counter,
}

/// Where the confirmed cursor is kept between two lives of the agent, together with what is known of
/// the job: what stands before the cursor is not read again.
#[derive(Debug)]
pub struct CursorFile(Scribe<String>);

/// The file's text, padded to this many bytes, is one write and so never torn by a kill.
const KEPT_BYTES: usize = 160;

impl CursorFile {
    /// Opens or makes the file; what is not understood reads as the beginning.
    ///
    /// # Errors
    /// As `open(2)`.
    pub fn open(path: &Path, scribes: &Scribes) -> std::io::Result<(Self, Cursor, JobView)> {
        let mut options = File::options();
        options.read(true).write(true);
        let file = open_or_make(options, path)?;
        let (cursor, view) = read(&file)?;
        let write = move |text: String| file.write_all_at(text.as_bytes(), 0);
        let scribe = scribes.scribe(move |text| write(text).map_err(|error| error.to_string()));
        Ok((Self(scribe), cursor, view))
    }

    /// The cursor that is kept in a file; the beginning where there is no file. Blocks.
    ///
    /// # Errors
    /// As `open(2)`.
    pub fn kept(path: &Path) -> std::io::Result<Cursor> {
        match File::open(path) {
            Ok(file) => Ok(read(&file)?.0),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Cursor::default()),
            Err(error) => Err(error),
        }
    }

    /// Output does not wait for a disk that hangs.
    async fn keep(&mut self, cursor: Cursor, view: &JobView) {
        let text = write_kept(cursor, view);
        let kept = self.0.write_or_leave(text, PATIENCE).await;
        if let Some(Err(error)) = kept {
            // Worth a repetition after a restart, not more.
            warn!(error, "the output cursor could not be kept");
        }
    }
}

fn read(file: &File) -> std::io::Result<(Cursor, JobView)> {
    let mut text = [0; KEPT_BYTES];
    let length = file.read_at(&mut text, 0)?;
    let text = std::str::from_utf8(text.get(..length).unwrap_or_default());
    Ok(text.ok().and_then(read_kept).unwrap_or_default())
}

/// `<cursor> <started> <delivered> <exit> <end>`: flags as 0 and 1, the exit as the hexadecimal of its
/// status frame, the end as two offsets with a comma, `-` for what is not known.
pub(crate) fn write_kept(cursor: Cursor, view: &JobView) -> String {
    let exit = view.exit.map_or("-".to_owned(), |status| {
        status
            .encode()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    });
    let end = view
        .end
        .map_or("-".to_owned(), |(out, err)| format!("{out},{err}"));
    let (started, delivered) = (u8::from(view.started), u8::from(view.delivered));
    let text = format!("{cursor} {started} {delivered} {exit} {end}");
    format!("{text:<width$}\n", width = KEPT_BYTES - 1)
}

pub(crate) fn read_kept(text: &str) -> Option<(Cursor, JobView)> {
    let mut words = text.split_whitespace();
    let cursor = words.next()?.parse().ok()?;
    let (started, delivered) = (words.next()? == "1", words.next()? == "1");
    let exit = match words.next()? {
        "-" => None,
        hex => Some(u64::from_str_radix(hex, 16).ok()?),
    };
    let exit = exit.and_then(|frame| Status::decode(frame.to_be_bytes()));
    let end = match words.next()? {
        "-" => None,
        pair => {
            let (out, err) = pair.split_once(',')?;
            Some((out.parse().ok()?, err.parse().ok()?))
        }
    };
    let view = JobView {
        started,
        exit,
        end,
        delivered,
        lost: None,
    };
    Some((cursor, view))
}

/// Follows the app of `container` until everything has reached the bus. Of an end that cannot be recorded, for its disk is
/// late, its init is asked.
pub async fn pump(
    (container, lateness): (Container, Lateness),
    outlet: Outlet,
    source: Source,
    cursor: (CursorFile, Cursor),
    view: watch::Sender<JobView>,
) {
    tokio::select! {
        () = deliver(&container, outlet, source, cursor, &view) => {}
        () = ask_while_late(&container, lateness, &view) => {}
    }
}

/// Never returns.
async fn ask_while_late(container: &Container, mut disk: Lateness, view: &watch::Sender<JobView>) {
    loop {
        disk.begins().await;
        if view.borrow().exit.is_none() {
            ask_how_it_ended(container, view).await;
        }
        sleep(ASK).await;
    }
}

/// Its init knows.
async fn ask_how_it_ended(container: &Container, view: &watch::Sender<JobView>) {
    if let Some(status) = container.job_end(JOB).await {
        view.send_modify(|view| view.exit = view.exit.or(Some(status)));
    }
}

async fn deliver(
    container: &Container,
    outlet: Outlet,
    source: Source,
    (mut file, mut confirmed): (CursorFile, Cursor),
    view: &watch::Sender<JobView>,
) {
    let mut silent_until = None;
    while !view.borrow().delivered {
        let mark = outlet.mark();
        let mut flight = Flight {
            container,
            confirmed,
            sent: confirmed,
            missing: 0,
            mark,
            silent_until: silent_until.take(),
        };
        let why = flight.fly(&outlet, &source, &mut file, view).await;
        confirmed = flight.confirmed;
        match why {
            Landed::Delivered => {
                view.send_modify(|view| view.delivered = true);
                let facts = view.borrow().clone();
                file.keep(confirmed, &facts).await;
            }
            Landed::Lost(why) => {
                error!(handle = source.handle, why, "output cannot be followed");
                // Trouble with output never ends an app: as long as it lives, it is tried again.
                if timeout(RETRY, container.died()).await.is_ok() {
                    view.send_modify(|view| {
                        view.lost = Some(why);
                        view.delivered = true;
                    });
                    return;
                }
                // Nothing can be recorded: the disk is dead.
                ask_how_it_ended(container, view).await;
            }
            Landed::LinkChanged => debug!(handle = source.handle, %confirmed, "output rewound"),
            Landed::Refused => {
                debug!(handle = source.handle, %confirmed, "output refused");
                silent_until = Some(Instant::now() + REFUSED_PAUSE);
            }
        }
        if view.borrow().end.is_some() {
            // All that is left to do needs the bus.
            outlet.up().await;
        }
    }
}

/// Why a flight ended.
enum Landed {
    Delivered,
    Lost(String),
    LinkChanged,
    /// The server did not take something of what was published.
    Refused,
}

/// One connection's worth of publishing.
struct Flight<'a> {
    container: &'a Container,
    confirmed: Cursor,
    sent: Cursor,
    /// Bytes that `sent` has named as missing and of which no confirmation is awaited yet.
    missing: u64,
    mark: Mark,
    /// Nothing is published so long, as if there were no connection: the server would not take it.
    silent_until: Option<Instant>,
}

impl Flight<'_> {
    fn speaks(&self) -> bool {
        self.mark.up() && self.silent_until.is_none()
    }

    fn said(&mut self, (next, missing): (Cursor, u64)) {
        self.sent = next;
        self.missing += missing;
    }

    async fn fly(
        &mut self,
        outlet: &Outlet,
        source: &Source,
        file: &mut CursorFile,
        view: &watch::Sender<JobView>,
    ) -> Landed {
        let mut follow = self.container.follow(JOB, self.confirmed);
        // Reads ahead while the window is full, or the bus takes nothing, so that the job's end is known however slow
        // that is.
        let mut scout = None;
        let mut ended = false;
        let (mut target, mut missing) = (self.confirmed, 0);
        let mut confirming = pin!(Fuse::terminated());
        let mut saying = pin!(Fuse::terminated());
        loop {
            let is_said = saying.is_terminated();
            if self.speaks() && ended && is_said && self.confirmed == self.sent {
                return Landed::Delivered;
            }
            if confirming.is_terminated() && self.sent != self.confirmed {
                target = self.sent;
                missing = std::mem::take(&mut self.missing);
                confirming.set(outlet.confirm(self.mark, &source.subject).fuse());
            }
            let on_the_way = self.sent.position.saturating_sub(self.confirmed.position);
            let full = on_the_way >= WINDOW || !is_said;
            if !full {
                scout = None;
            }
            tokio::select! {
                // A broken connection first: nothing published after it would count. Then what frees
                // the window.
                biased;
                () = outlet.changed(self.mark) => return Landed::LinkChanged,
                () = until(self.silent_until) => return Landed::LinkChanged,
                confirmation = &mut confirming, if !confirming.is_terminated() => {
                    match confirmation {
                        Confirmation::Sure => {}
                        Confirmation::Unsure => return Landed::LinkChanged,
                        Confirmation::Refused => return Landed::Refused,
                    }
                    self.confirmed = target;
                    source.missing.add(missing);
                    let facts = view.borrow().clone();
                    file.keep(target, &facts).await;
                }
                said = &mut saying, if !is_said => self.said(said),
                followed = follow.recv(), if !full && !ended => match followed {
                    Some(Followed::Frame(frame)) => {
                        ended = tell(&frame.record, view);
                        if self.speaks() {
                            saying.set(say(frame, self.mark, outlet, source).fuse());
                            if let Some(said) = saying.as_mut().now_or_never() {
                                self.said(said);
                            }
                        }
                    }
                    Some(Followed::Lost(why)) => return Landed::Lost(why),
                    None => return Landed::Lost("the engine stopped following".into()),
                },
                Some(Followed::Frame(frame)) = next(&mut scout), if full => {
                    tell(&frame.record, view);
                }
                () = sleep(STALLED), if full && scout.is_none() => {
                    scout = Some(self.container.follow(JOB, self.sent));
                }
            }
        }
    }
}

/// Says what is to be said of a frame. Where the next one begins, and how many bytes are missing before it.
async fn say(frame: Frame, mark: Mark, outlet: &Outlet, source: &Source) -> (Cursor, u64) {
    let mut missing = 0;
    match &frame.record {
        Record::Output {
            stream,
            offset,
            time_ns,
            bytes,
        } => {
            let most = mark.max_payload().saturating_sub(HEADROOM).max(1);
            let mut offset = *offset;
            for piece in bytes.chunks(most) {
                let message = source.message(*stream, offset, *time_ns, piece);
                outlet.print(message).await;
                offset += piece.len() as u64;
            }
        }
        Record::Gap {
            stream,
            offset,
            bytes,
            certain,
        } => {
            missing = *bytes;
            outlet
                .print(source.dropped(*stream, *offset, *bytes, *certain))
                .await;
        }
        Record::Started | Record::Exit { .. } | Record::End { .. } => {}
    }
    (frame.next, missing)
}

async fn until(instant: Option<Instant>) {
    match instant {
        Some(instant) => sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

async fn next(follow: &mut Option<mpsc::Receiver<Followed>>) -> Option<Followed> {
    match follow {
        Some(follow) => follow.recv().await,
        None => std::future::pending().await,
    }
}

/// Tells the instance; `true` at the end.
fn tell(record: &Record, view: &watch::Sender<JobView>) -> bool {
    match record {
        Record::Started => view.send_modify(|view| view.started = true),
        Record::Exit { status, .. } => view.send_modify(|view| view.exit = Some(*status)),
        Record::End { stdout, stderr } => {
            view.send_modify(|view| view.end = Some((*stdout, *stderr)));
            return true;
        }
        Record::Output { .. } | Record::Gap { .. } => {}
    }
    false
}

impl Source {
    fn message(&self, stream: Stream, offset: u64, time_ns: u64, bytes: &[u8]) -> Message {
        let headers = vec![
            (INSTANCE, self.instance.borrow().clone()),
            (OFFSET, offset.to_string()),
            (TIME, messages::output::time(time_ns)),
            (
                "Nats-Msg-Id",
                format!("{}:{stream}:{offset}+{}", self.handle, bytes.len()),
            ),
        ];
        Message {
            subject: format!("{}.{stream}", self.subject),
            headers,
            body: bytes.to_vec(),
        }
    }

    /// A hole as a message: never an empty body, which readers show as nothing.
    fn dropped(&self, stream: Stream, offset: u64, bytes: u64, certain: bool) -> Message {
        let about = if certain { "" } else { "at least " };
        let headers = vec![
            (INSTANCE, self.instance.borrow().clone()),
            (OFFSET, offset.to_string()),
            (DROPPED, bytes.to_string()),
            (
                "Nats-Msg-Id",
                format!("{}:{stream}:{offset}-{bytes}", self.handle),
            ),
        ];
        let body = format!("[ostler: {about}{bytes} bytes of {stream} are missing here]\n");
        Message {
            subject: format!("{}.{stream}", self.subject),
            headers,
            body: body.into_bytes(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{CursorFile, JobView};
    use crate::host::scribe::Scribes;
    use container::spool::Cursor;
    use container::status::Status;

    #[tokio::test]
    async fn what_is_kept_is_read_back_and_a_shorter_text_replaces_a_longer() {
        let path = std::env::temp_dir().join(format!("ostler-cursor-{}", std::process::id()));
        let open = || CursorFile::open(&path, &Scribes::default()).unwrap();
        let (mut file, fresh, unknown) = open();
        assert_eq!((fresh, unknown), (Cursor::default(), JobView::default()));
        let long = Cursor {
            position: u64::MAX,
            stdout: u64::MAX,
            stderr: u64::MAX,
        };
        let all = JobView {
            started: true,
            exit: Some(Status::Signaled(11)),
            end: Some((u64::MAX, u64::MAX)),
            delivered: true,
            lost: None,
        };
        let short = Cursor {
            position: 1,
            stdout: 2,
            stderr: 3,
        };
        for (cursor, view) in [(long, all), (short, JobView::default())] {
            file.keep(cursor, &view).await;
            let (_, kept, known) = open();
            assert_eq!((kept, known), (cursor, view));
        }
        std::fs::write(&path, b"\xff\xffno cursor").unwrap();
        assert_eq!(open().1, Cursor::default());
        std::fs::remove_file(&path).unwrap();
    }
}
