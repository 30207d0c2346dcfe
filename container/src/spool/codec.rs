//! Bytes of records. The same on disk and in frames.

use super::{MAX_PAYLOAD, Record, Stream};
use crate::status::Status;

/// Bytes of a record's header.
pub(crate) const HEADER_BYTES: usize = 32;

/// Bytes of a head record, header included.
pub(super) const HEAD_BYTES: u64 = 32 + 64;

const MAGIC: [u8; 2] = *b"OS";

/// "No such position" in a head.
const NOWHERE: u64 = u64::MAX;

/// What a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    Head = 1,
    Started = 2,
    Output = 3,
    Gap = 4,
    Exit = 5,
    End = 6,
}

/// The fixed part of a record, see the module `spool`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) kind: Kind,
    pub(crate) stream: Stream,
    /// Bytes of payload, at most [`MAX_PAYLOAD`].
    pub(crate) len: u32,
    pub(crate) offset: u64,
    pub(crate) time_ns: u64,
    /// `Gap`: 1 if certain. Else 0.
    pub(crate) aux: u32,
}

/// What was already true at the beginning of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Head {
    pub(crate) stdout: u64,
    pub(crate) stderr: u64,
    /// Log position of the `Started` record.
    pub(crate) started: Option<u64>,
    /// Log position of the `Exit` record, and the record.
    pub(crate) exit: Option<(u64, Exit)>,
}

/// The fields of [`Record::Exit`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    pub(crate) status: Status,
    pub(crate) time_ns: u64,
    pub(crate) stdout: u64,
    pub(crate) stderr: u64,
}

impl Exit {
    pub(crate) fn record<B>(self) -> Record<B> {
        let Self {
            status,
            time_ns,
            stdout,
            stderr,
        } = self;
        Record::Exit {
            status,
            time_ns,
            stdout,
            stderr,
        }
    }
}

impl Header {
    fn plain(kind: Kind, len: u32) -> Self {
        Self {
            kind,
            stream: Stream::Stdout,
            len,
            offset: 0,
            time_ns: 0,
            aux: 0,
        }
    }

    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut rest = bytes.as_mut_slice();
        put(&mut rest, &MAGIC);
        put(&mut rest, &[self.kind as u8, self.stream as u8]);
        put(&mut rest, &self.len.to_le_bytes());
        put(&mut rest, &self.offset.to_le_bytes());
        put(&mut rest, &self.time_ns.to_le_bytes());
        put(&mut rest, &self.aux.to_le_bytes());
        let check = check(&bytes);
        if let Some(last) = bytes.last_chunk_mut::<4>() {
            *last = check.to_le_bytes();
        }
        bytes
    }

    /// `None` if the bytes are no header: not written yet, torn, or foreign.
    pub(crate) fn decode(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        let mut rest = bytes.as_slice();
        let [m0, m1, kind, stream] = take(&mut rest)?;
        let header = Self {
            kind: match kind {
                1 => Kind::Head,
                2 => Kind::Started,
                3 => Kind::Output,
                4 => Kind::Gap,
                5 => Kind::Exit,
                6 => Kind::End,
                _ => return None,
            },
            stream: match stream {
                0 => Stream::Stdout,
                1 => Stream::Stderr,
                _ => return None,
            },
            len: take_u32(&mut rest)?,
            offset: take_u64(&mut rest)?,
            time_ns: take_u64(&mut rest)?,
            aux: take_u32(&mut rest)?,
        };
        let genuine = [m0, m1] == MAGIC
            && take_u32(&mut rest)? == check(bytes)
            && header.payload_len() <= MAX_PAYLOAD;
        genuine.then_some(header)
    }

    pub(crate) fn payload_len(&self) -> usize {
        self.len as usize
    }
}

/// Appends a record's bytes to `out`. An output's bytes beyond [`MAX_PAYLOAD`] are the caller's
/// mistake and make a record that nobody reads.
pub(crate) fn encode(record: &Record<&[u8]>, out: &mut Vec<u8>) {
    match *record {
        Record::Started => out.extend(Header::plain(Kind::Started, 0).encode()),
        Record::Output {
            stream,
            offset,
            time_ns,
            bytes,
        } => {
            let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
            let header = Header {
                kind: Kind::Output,
                stream,
                len,
                offset,
                time_ns,
                aux: 0,
            };
            out.extend(header.encode());
            out.extend_from_slice(bytes);
        }
        Record::Gap {
            stream,
            offset,
            bytes,
            certain,
        } => {
            let header = Header {
                kind: Kind::Gap,
                stream,
                len: 8,
                offset,
                time_ns: 0,
                aux: certain.into(),
            };
            out.extend(header.encode());
            out.extend(bytes.to_le_bytes());
        }
        Record::Exit {
            status,
            time_ns,
            stdout,
            stderr,
        } => {
            out.extend(
                Header {
                    time_ns,
                    ..Header::plain(Kind::Exit, 24)
                }
                .encode(),
            );
            out.extend(status.encode());
            out.extend(stdout.to_le_bytes());
            out.extend(stderr.to_le_bytes());
        }
        Record::End { stdout, stderr } => {
            out.extend(Header::plain(Kind::End, 16).encode());
            out.extend(stdout.to_le_bytes());
            out.extend(stderr.to_le_bytes());
        }
    }
}

/// Reads a record back; `None` for a [`Kind::Head`] and for a payload that does not suit its
/// header.
pub(crate) fn decode<'a>(header: &Header, mut payload: &'a [u8]) -> Option<Record<&'a [u8]>> {
    let Header {
        stream,
        offset,
        time_ns,
        ..
    } = *header;
    let rest = &mut payload;
    match header.kind {
        Kind::Head => None,
        Kind::Started => Some(Record::Started),
        Kind::Output => Some(Record::Output {
            stream,
            offset,
            time_ns,
            bytes: rest,
        }),
        Kind::Gap => Some(Record::Gap {
            stream,
            offset,
            bytes: take_u64(rest)?,
            certain: header.aux == 1,
        }),
        Kind::Exit => {
            let status = Status::decode(take(rest)?)?;
            Some(Record::Exit {
                status,
                time_ns,
                stdout: take_u64(rest)?,
                stderr: take_u64(rest)?,
            })
        }
        Kind::End => Some(Record::End {
            stdout: take_u64(rest)?,
            stderr: take_u64(rest)?,
        }),
    }
}

impl Head {
    /// Appends the head record: [`HEAD_BYTES`] bytes.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let (exit_at, exit) = self.exit.unwrap_or((
            NOWHERE,
            Exit {
                status: Status::Started { job: 0 },
                time_ns: 0,
                stdout: 0,
                stderr: 0,
            },
        ));
        out.extend(Header::plain(Kind::Head, 64).encode());
        for number in [
            self.stdout,
            self.stderr,
            self.started.unwrap_or(NOWHERE),
            exit_at,
        ] {
            out.extend(number.to_le_bytes());
        }
        out.extend(exit.status.encode());
        for number in [exit.time_ns, exit.stdout, exit.stderr] {
            out.extend(number.to_le_bytes());
        }
    }

    /// Reads the payload of a [`Kind::Head`].
    pub(crate) fn decode(mut payload: &[u8]) -> Option<Self> {
        let rest = &mut payload;
        let (stdout, stderr) = (take_u64(rest)?, take_u64(rest)?);
        let somewhere = |at| (at != NOWHERE).then_some(at);
        let started = somewhere(take_u64(rest)?);
        let exit_at = somewhere(take_u64(rest)?);
        let exit = Exit {
            status: Status::decode(take(rest)?)?,
            time_ns: take_u64(rest)?,
            stdout: take_u64(rest)?,
            stderr: take_u64(rest)?,
        };
        Some(Self {
            stdout,
            stderr,
            started,
            exit: exit_at.map(|at| (at, exit)),
        })
    }
}

/// FNV-1a over a header without its check. It tells a whole header from a torn or absent one; it is
/// no guard against a failing disk.
fn check(header: &[u8; HEADER_BYTES]) -> u32 {
    header
        .iter()
        .take(HEADER_BYTES - 4)
        .fold(0x811c_9dc5, |hash, byte| {
            (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
        })
}

fn put(rest: &mut &mut [u8], bytes: &[u8]) {
    if let Some((front, back)) = std::mem::take(rest).split_at_mut_checked(bytes.len()) {
        front.copy_from_slice(bytes);
        *rest = back;
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (front, back) = rest.split_first_chunk::<N>()?;
    *rest = back;
    Some(*front)
}

pub(crate) fn take_u64(rest: &mut &[u8]) -> Option<u64> {
    take(rest).map(u64::from_le_bytes)
}

fn take_u32(rest: &mut &[u8]) -> Option<u32> {
    take(rest).map(u32::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::{Exit, HEAD_BYTES, HEADER_BYTES, Head, Header, Kind, decode, encode};
    use crate::{
        spool::{Record, Stream},
        status::{Status, Step},
    };

    #[test]
    fn every_record_survives_its_bytes() {
        let failed = Status::Failed {
            step: Step::Exec,
            errno: 2,
        };
        for record in [
            Record::Started,
            Record::Output {
                stream: Stream::Stderr,
                offset: 1 << 40,
                time_ns: 7,
                bytes: &b"line\n"[..],
            },
            Record::Gap {
                stream: Stream::Stdout,
                offset: 3,
                bytes: u64::MAX,
                certain: true,
            },
            Record::Gap {
                stream: Stream::Stderr,
                offset: 3,
                bytes: 0,
                certain: false,
            },
            Record::Exit {
                status: failed,
                time_ns: 9,
                stdout: 1,
                stderr: 2,
            },
            Record::End {
                stdout: 5,
                stderr: 6,
            },
        ] {
            let mut bytes = Vec::new();
            encode(&record, &mut bytes);
            let (header, payload) = bytes.split_first_chunk::<HEADER_BYTES>().unwrap();
            let header = Header::decode(header).unwrap();
            assert_eq!(header.payload_len(), payload.len());
            assert_eq!(decode(&header, payload), Some(record));
        }
    }

    #[test]
    fn a_head_survives_its_bytes() {
        let exit = Exit {
            status: Status::Exited(3),
            time_ns: 8,
            stdout: 1,
            stderr: 2,
        };
        for head in [
            Head::default(),
            Head {
                stdout: 1,
                stderr: 2,
                started: Some(0),
                exit: Some((99, exit)),
            },
        ] {
            let mut bytes = Vec::new();
            head.encode(&mut bytes);
            assert_eq!(bytes.len() as u64, HEAD_BYTES);
            assert_eq!(Head::decode(&bytes[HEADER_BYTES..]), Some(head));
        }
    }

    #[test]
    fn no_torn_header_is_taken_for_a_whole_one() {
        let whole = Header {
            kind: Kind::Output,
            stream: Stream::Stderr,
            len: 77,
            offset: 0x0102_0304_0506_0708,
            time_ns: u64::MAX,
            aux: 0,
        }
        .encode();
        assert!(Header::decode(&whole).is_some());
        for bit in 0..HEADER_BYTES * 8 {
            let mut broken = whole;
            broken[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Header::decode(&broken), None, "bit {bit}");
        }
        for end in 0..HEADER_BYTES {
            let mut torn = [0; HEADER_BYTES];
            torn[..end].copy_from_slice(&whole[..end]);
            assert_eq!(Header::decode(&torn), None, "first {end} bytes");
        }
    }
}
