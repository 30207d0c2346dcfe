//! What arrived on `droplet.output.…`, put together by offset, with every hole and repeat accounted for.

use std::collections::BTreeMap;

use async_nats::{Message, Subscriber};
use futures_util::StreamExt;
use tokio::time::{Instant, timeout_at};

use crate::patience;

/// One stream of one instance.
#[derive(Debug, Default)]
pub struct Stream {
    /// The bytes, each once, from offset 0; a hole is left out.
    pub bytes: Vec<u8>,
    /// The offset that the next byte must have.
    pub next: u64,
    /// Bytes that the host said were lost.
    pub dropped: u64,
    /// Holes that nobody explained: from, to. A defect of the host.
    pub holes: Vec<(u64, u64)>,
    /// Bytes that came again.
    pub repeated: u64,
}

/// A reader of one droplet's output. It trusts nothing but offsets.
#[derive(Debug)]
pub struct Output {
    messages: Subscriber,
    /// By index, handle, and `stdout` or `stderr`.
    pub streams: BTreeMap<(u32, String, String), Stream>,
}

impl Output {
    /// Reads the output of all instances of `droplet` from now on.
    pub async fn of(nats: &async_nats::Client, droplet: &str) -> Self {
        let subject = format!("droplet.output.{droplet}.>");
        let messages = nats.subscribe(subject).await.expect("a good subject");
        crate::watch::known(nats).await;
        Self {
            messages,
            streams: BTreeMap::new(),
        }
    }

    /// The stream `name` of instance `index`, of which there must be one handle only; empty if nothing came.
    #[must_use]
    pub fn stream(&self, index: u32, name: &str) -> &Stream {
        static NOTHING: Stream = Stream {
            bytes: Vec::new(),
            next: 0,
            dropped: 0,
            holes: Vec::new(),
            repeated: 0,
        };
        let mut found = self
            .streams
            .iter()
            .filter(|((at, _, on), _)| *at == index && on == name);
        let stream = found.next().map_or(&NOTHING, |(_, stream)| stream);
        assert!(
            found.next().is_none(),
            "instance {index} has changed its handle: {:?}",
            self.streams.keys()
        );
        stream
    }

    /// The text of stream `name` of instance `index` so far.
    #[must_use]
    pub fn text(&self, index: u32, name: &str) -> String {
        String::from_utf8_lossy(&self.stream(index, name).bytes).into_owned()
    }

    /// Reads until `enough` holds.
    ///
    /// # Panics
    /// After the deadline, with what there was.
    pub async fn until(&mut self, what: &str, enough: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + patience();
        while !enough(self) {
            match timeout_at(deadline, self.messages.next()).await {
                Ok(message) => self.take(&message.expect("the subscription lives")),
                Err(_) => panic!(
                    "no {what} in {:?}; what came: {}",
                    patience(),
                    self.summary()
                ),
            }
        }
    }

    /// One line per stream.
    #[must_use]
    pub fn summary(&self) -> String {
        let line = |((index, handle, name), stream): (&(u32, String, String), &Stream)| {
            let tail = stream.bytes.len().saturating_sub(200);
            format!(
                "\n  {index} {handle} {name}: {} bytes, {} dropped, {} repeated, holes {:?}, ends {:?}",
                stream.next,
                stream.dropped,
                stream.repeated,
                stream.holes,
                String::from_utf8_lossy(&stream.bytes[tail..])
            )
        };
        self.streams.iter().map(line).collect()
    }

    fn take(&mut self, message: &Message) {
        let tokens: Vec<&str> = message.subject.split('.').collect();
        let ["droplet", "output", _, index, handle, name] = tokens[..] else {
            panic!("{} is no subject for output", message.subject)
        };
        assert!(matches!(name, "stdout" | "stderr"), "{}", message.subject);
        let headers = message.headers.as_ref().expect("output has headers");
        let header = |header: &str| headers.get(header).map(async_nats::HeaderValue::as_str);
        assert!(
            header("Ostler-Instance").is_some_and(|id| !id.is_empty()),
            "{headers:?}"
        );
        let number = |name: &str| header(name).map(|text| text.parse().expect("a number of bytes"));
        let offset = number("Ostler-Offset").expect("Ostler-Offset is always there");
        let id = format!("{handle}:{name}:{offset}");
        let key = (
            index.parse().expect("an index"),
            handle.to_owned(),
            name.to_owned(),
        );
        let stream = self.streams.entry(key).or_default();
        // By this a JetStream knows what it has already.
        let id = match number("Ostler-Dropped") {
            // The body is for people: none of it is the app's.
            Some(dropped) => {
                stream.skip(offset, dropped);
                format!("{id}-{dropped}")
            }
            None => {
                assert!(header("Ostler-Time").is_some(), "{headers:?}");
                stream.append(offset, &message.payload);
                format!("{id}+{}", message.payload.len())
            }
        };
        assert_eq!(header("Nats-Msg-Id"), Some(&*id), "{headers:?}");
    }
}

impl Stream {
    /// `dropped` bytes from `offset` on are known to be lost.
    fn skip(&mut self, offset: u64, dropped: u64) {
        if offset <= self.next && offset + dropped > self.next {
            self.dropped += offset + dropped - self.next;
            self.next = offset + dropped;
        }
    }

    /// Adds `bytes` that stand at `offset`.
    fn append(&mut self, offset: u64, bytes: &[u8]) {
        if offset > self.next {
            self.holes.push((self.next, offset));
            self.next = offset;
        }
        let known = usize::try_from(self.next - offset)
            .expect("64 bits")
            .min(bytes.len());
        if self.dropped == 0 && self.holes.is_empty() {
            let at = usize::try_from(offset).expect("64 bits");
            assert_eq!(
                self.bytes[at..at + known],
                bytes[..known],
                "other bytes at the same offset {offset}"
            );
        }
        self.repeated += known as u64;
        self.bytes.extend_from_slice(&bytes[known..]);
        self.next += (bytes.len() - known) as u64;
    }
}

/// How many lines `bytes` has, if they are "`word` 1 …", "`word` 2 …" and so on, each once and whole.
///
/// # Errors
/// Says which line is out of order.
pub fn numbered(word: &str, bytes: &[u8]) -> Result<u64, String> {
    let mut count = 0;
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        let text = String::from_utf8_lossy(line);
        let mut words = text.split_whitespace();
        let number = words
            .next()
            .filter(|first| *first == word)
            .and(words.next())
            .and_then(|n| n.parse().ok());
        if number != Some(count + 1) || !text.ends_with('\n') {
            return Err(format!("after line {count} of {word} stands {text:?}"));
        }
        count += 1;
    }
    Ok(count)
}
