//! Counts what comes out of a decoder, and remembers why it stopped.
//!
//! The tar reader wraps errors of the stream below it into texts of its own, so the reason is kept
//! here, beside the stream.

use std::cell::{Cell, RefCell};
use std::io::{self, Read};
use std::rc::Rc;

use super::error::DropletError;
use super::stop::Stop;

/// What may be read between two entries: headers, long names and pax records. Without a bound, one long
/// name could fill the memory.
const METADATA_BYTES: u64 = 1024 * 1024;

/// A reader that stops at the bounds of its [`Budget`].
pub(super) struct Meter<R> {
    inner: R,
    budget: Rc<Budget>,
    stop: Stop,
}

/// What may still be read.
pub(super) struct Budget {
    max: u64,
    left: Cell<u64>,
    /// While the tar reader looks for the next entry.
    metadata_left: Cell<Option<u64>>,
    stopped: RefCell<Option<DropletError>>,
}

impl<R: Read> Meter<R> {
    /// Lets `max` bytes of `inner` through.
    pub(super) fn new(inner: R, max: u64, stop: Stop) -> (Self, Rc<Budget>) {
        let budget = Rc::new(Budget {
            max,
            left: Cell::new(max),
            metadata_left: Cell::new(None),
            stopped: RefCell::new(None),
        });
        (
            Self {
                inner,
                budget: Rc::clone(&budget),
                stop,
            },
            budget,
        )
    }
}

impl<R: Read> Read for Meter<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Err(abandoned) = self.stop.check() {
            return Err(self.budget.stop(abandoned));
        }
        let count = match self.inner.read(buffer) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Err(error),
            Err(error) => return Err(self.budget.stop(broken(&error))),
        };
        self.budget.charge(count as u64)?;
        Ok(count)
    }
}

fn broken(error: &io::Error) -> DropletError {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        return DropletError::Truncated {
            at: "its gzip stream has no end".to_owned(),
        };
    }
    DropletError::Corrupt {
        why: error.to_string(),
    }
}

impl Budget {
    /// Runs `look`, which finds the next entry, under the bound for metadata.
    pub(super) fn metadata<T>(&self, look: impl FnOnce() -> T) -> T {
        self.metadata_left.set(Some(METADATA_BYTES));
        let found = look();
        self.metadata_left.set(None);
        found
    }

    /// Why the stream stopped, or what the tar reader has to say about `error`.
    pub(super) fn reason(&self, error: &io::Error) -> DropletError {
        let stopped = self.stopped.borrow_mut().take();
        stopped.unwrap_or_else(|| DropletError::Corrupt {
            why: error.to_string(),
        })
    }

    fn charge(&self, count: u64) -> io::Result<()> {
        let Some(left) = self.left.get().checked_sub(count) else {
            return Err(self.stop(DropletError::TooMuchUnpacked { max: self.max }));
        };
        self.left.set(left);
        let Some(metadata_left) = self.metadata_left.get() else {
            return Ok(());
        };
        let Some(metadata_left) = metadata_left.checked_sub(count) else {
            let why = format!("more than {METADATA_BYTES} bytes of metadata for one entry");
            return Err(self.stop(DropletError::Corrupt { why }));
        };
        self.metadata_left.set(Some(metadata_left));
        Ok(())
    }

    fn stop(&self, why: DropletError) -> io::Error {
        *self.stopped.borrow_mut() = Some(why);
        io::Error::other("stopped")
    }
}
