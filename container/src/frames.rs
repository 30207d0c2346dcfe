//! Records of a spool on their way to the agent: what `iomux-link` writes with `IOMUX_FRAMES=1`.
//!
//! A frame is the cursor behind the record (three `u64`, little-endian: position, stdout, stderr),
//! then the record as it stands in the spool. Border for border the same however often it is sent.

use crate::{
    fault::SysError,
    spool::{Cursor, HEADER_BYTES, Header, Record, decode, encode as encode_record, take_u64},
};
use nix::errno::Errno;

/// Bytes of a frame before the record's header.
const CURSOR_BYTES: usize = 24;

/// A record, and where to go on once it is safe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The record.
    pub record: Record,
    /// The cursor behind it.
    pub next: Cursor,
}

/// Appends a frame to `out`.
pub fn encode(record: &Record<&[u8]>, next: &Cursor, out: &mut Vec<u8>) {
    for number in [next.position, next.stdout, next.stderr] {
        out.extend(number.to_le_bytes());
    }
    encode_record(record, out);
}

/// Cuts a byte stream into frames, however it arrives.
#[derive(Debug, Default)]
pub struct FrameReader {
    buffer: Vec<u8>,
    /// Bytes at the front of the buffer that were given out.
    used: usize,
}

impl FrameReader {
    /// Takes bytes as they were read.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.used);
        self.used = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame, if there is one.
    ///
    /// # Errors
    /// `EBADMSG`: these are no frames; nothing after this can be trusted.
    #[expect(
        clippy::should_implement_trait,
        reason = "an error ends it, as no Iterator would"
    )]
    pub fn next(&mut self) -> Result<Option<Frame>, SysError> {
        let rest = self.buffer.get(self.used..).unwrap_or_default();
        let Some((mut cursor, record)) = rest.split_at_checked(CURSOR_BYTES) else {
            return Ok(None);
        };
        let Some((header, payload)) = record.split_first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let bad = || SysError {
            call: "decode",
            on: "frame".to_owned(),
            errno: Errno::EBADMSG,
        };
        let header = Header::decode(header).ok_or_else(bad)?;
        let Some(payload) = payload.get(..header.payload_len()) else {
            return Ok(None);
        };
        let record = decode(&header, payload).ok_or_else(bad)?;
        let mut number = || take_u64(&mut cursor).ok_or_else(bad);
        let next = Cursor {
            position: number()?,
            stdout: number()?,
            stderr: number()?,
        };
        let record = record.into_owned();
        self.used += CURSOR_BYTES + HEADER_BYTES + payload.len();
        Ok(Some(Frame { record, next }))
    }
}

#[cfg(test)]
mod tests {
    use super::{Frame, FrameReader, encode};
    use crate::{
        spool::{Cursor, Record, Stream},
        status::Status,
    };

    fn frames() -> Vec<Frame> {
        let output = |offset, bytes: &[u8]| Record::Output {
            stream: Stream::Stderr,
            offset,
            time_ns: 5,
            bytes: bytes.to_vec(),
        };
        let records = [
            Record::Started,
            output(0, b"one\ntwo\n"),
            output(8, &[7; 63 * 1024]),
            Record::Gap {
                stream: Stream::Stdout,
                offset: 0,
                bytes: 9,
                certain: false,
            },
            Record::Exit {
                status: Status::Signaled(9),
                time_ns: 6,
                stdout: 9,
                stderr: 64520,
            },
            Record::End {
                stdout: 9,
                stderr: 64520,
            },
        ];
        let at = |n| Cursor {
            position: n,
            stdout: 2 * n,
            stderr: 3 * n,
        };
        records
            .into_iter()
            .zip(1..)
            .map(|(record, n)| Frame {
                record,
                next: at(n),
            })
            .collect()
    }

    #[test]
    fn frames_arrive_whole_however_they_are_cut() {
        let mut bytes = Vec::new();
        for frame in frames() {
            encode(&frame.record.as_slice(), &frame.next, &mut bytes);
        }
        for size in [1, 7, 31, 4096, bytes.len()] {
            let mut reader = FrameReader::default();
            let mut seen = Vec::new();
            for piece in bytes.chunks(size) {
                reader.push(piece);
                while let Some(frame) = reader.next().unwrap() {
                    seen.push(frame);
                }
            }
            assert_eq!(seen, frames(), "pieces of {size}");
        }
    }

    #[test]
    fn what_is_no_frame_is_an_error() {
        let mut reader = FrameReader::default();
        reader.push(&[0; 64]);
        assert!(reader.next().is_err());
    }
}
