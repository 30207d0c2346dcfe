//! Where log lines go: to standard error, from [`begin`] on by a thread of their own. Whoever stops reading that, a pipe
//! or journald's socket, or lets its disk hang, then stops no more than the log: what finds no room is left out, and
//! counted.

use nix::sys::stat::fstat;
use std::fmt;
use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};
use tracing::{Event, Level, Subscriber, warn};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// Lines that may wait to be written.
const WAITING: usize = 8192;

/// How long the last lines may take.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Between two looks whether there is room for the mark behind the last line.
const AGAIN: Duration = Duration::from_millis(5);

static LOG: OnceLock<Lines> = OnceLock::new();

enum Item {
    Line(Vec<u8>),
    /// All before it are written.
    Mark(SyncSender<()>),
}

/// Standard error, as the log has it.
#[derive(Debug, Clone, Copy)]
pub struct Out;

impl Write for Out {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match LOG.get() {
            Some(lines) => {
                lines.say(line);
                Ok(line.len())
            }
            None => io::stderr().write(line),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Has a thread write the log from now on. What forks comes before it.
///
/// # Errors
/// There can be no thread.
pub fn begin() -> io::Result<()> {
    let lines = Lines::to(io::stderr())?;
    let _first = LOG.set(lines);
    Ok(())
}

/// Waits until the log is written, but not for long: before the end of the process.
pub fn flush() {
    if let Some(lines) = LOG.get() {
        lines.flush();
    }
}

/// Says this, and waits until it is written, but not for long: whoever ends must end, whether or not somebody reads why.
pub fn last_words(words: &str) {
    let grade = if is_journal() { "<3>" } else { "" };
    // As with all lines: nobody can be told.
    drop(Out.write_all(format!("{grade}{words}").as_bytes()));
    flush();
}

/// Whether standard error is journald's, as it says by device and inode (systemd.exec(5), `JOURNAL_STREAM`).
fn is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else {
        return false;
    };
    fstat(io::stderr()).is_ok_and(|file| stream == format!("{}:{}", file.st_dev, file.st_ino))
}

/// Puts what journald reads as a line's priority in front of it, where standard error is journald's (sd-daemon(3)):
/// so `journalctl -p err` finds the errors.
#[derive(Debug)]
pub struct Graded<F> {
    format: F,
    is_journal: bool,
}

impl<F> Graded<F> {
    /// Lines of this format.
    pub fn new(format: F) -> Self {
        let is_journal = is_journal();
        Self { format, is_journal }
    }
}

impl<S, N, F> FormatEvent<S, N> for Graded<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut line: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        if self.is_journal {
            let priority = match *event.metadata().level() {
                Level::ERROR => 3,
                Level::WARN => 4,
                Level::INFO => 6,
                Level::DEBUG | Level::TRACE => 7,
            };
            write!(line, "<{priority}>")?;
        }
        self.format.format_event(context, line, event)
    }
}

/// The way to the thread.
#[derive(Debug)]
struct Lines {
    to: SyncSender<Item>,
    /// Since the beginning.
    lost: Arc<AtomicU64>,
}

impl Lines {
    /// A thread that writes to `out`.
    fn to(mut out: impl Write + Send + 'static) -> io::Result<Self> {
        let (to, items) = sync_channel(WAITING);
        let lines = Self {
            to,
            lost: Arc::default(),
        };
        let lost = Arc::clone(&lines.lost);
        thread::Builder::new().name("log".into()).spawn(move || {
            let mut told = 0;
            while let Ok(item) = items.recv() {
                match item {
                    // Nobody can be told that nobody reads.
                    Item::Line(line) => drop(out.write_all(&line)),
                    Item::Mark(reached) => drop(reached.send(())),
                }
                let all = lost.load(Ordering::Relaxed);
                if all > told {
                    let lost = all - told;
                    warn!(lost, "log lines were lost: whoever reads them was too slow");
                    told = all;
                }
            }
        })?;
        Ok(lines)
    }

    /// Takes a line, and never waits.
    fn say(&self, line: &[u8]) {
        match self.to.try_send(Item::Line(line.to_vec())) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.lost.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Waits until what was said is written, but not for long.
    fn flush(&self) {
        let (reached, told) = sync_channel(1);
        let deadline = Instant::now() + LAST_LINES;
        let mut mark = Item::Mark(reached);
        while let Err(TrySendError::Full(full)) = self.to.try_send(mark) {
            if Instant::now() >= deadline {
                return;
            }
            mark = full;
            let _nothing_comes = told.recv_timeout(AGAIN);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let _in_time = told.recv_timeout(left);
    }
}

#[cfg(test)]
mod tests {
    use super::{Lines, WAITING};
    use std::io::Read;
    use std::sync::atomic::Ordering;

    #[test]
    fn nobody_waits_for_whoever_does_not_read() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let lines = Lines::to(writer).unwrap();
        // More than the pipe and the queue hold.
        let line = [b'x'; 100];
        for _ in 0..2 * WAITING {
            lines.say(&line);
        }
        let lost = lines.lost.load(Ordering::Relaxed);
        assert!(lost > 0);
        // Nor does whoever ends.
        lines.flush();
        let reads = std::thread::spawn(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).map(|_| all.len())
        });
        lines.flush();
        drop(lines);
        let read = reads.join().unwrap().unwrap();
        let written = 2 * WAITING - usize::try_from(lost).unwrap();
        assert_eq!(read, written * line.len(), "whole lines, in their order");
    }
}
