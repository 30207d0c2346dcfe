//! What the instances' room says to the bus: channels that the bus owns the other ends of.
//!
//! Four strengths of saying something, from weak to strong:
//! [`Outlet::offer`] never waits, and is gone when the bus is away or behind (heartbeats: the next one says
//! it again); [`Outlet::send`] waits its turn, and is gone when the bus is;
//! [`Outlet::confirm`] tells whether everything sent since a [`Mark`] has reached the server;
//! [`Outlet::deliver`] repeats until it has (exits, OOM events).
//!
//! Output has a channel of its own, so that an app which prints a lot delays no heartbeat; and so has what
//! is offered, so that a flood of commands with all its answers displaces none. So have routes, of which there
//! may be more than any channel holds: they are said one by one as there is [`Room`].

use messages::trace::Trace;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::time::timeout;

/// One message for the bus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Its subject.
    pub subject: String,
    /// Header names and values.
    pub headers: Vec<(&'static str, String)>,
    /// Its body; never empty.
    pub body: Vec<u8>,
}

impl Message {
    /// A message without headers.
    #[must_use]
    pub fn plain(subject: impl Into<String>, body: Vec<u8>) -> Self {
        Self {
            subject: subject.into(),
            headers: Vec::new(),
            body,
        }
    }

    /// Bytes that count for `max_payload`: the body, and the headers as they are sent (NATS client protocol, HPUB).
    #[must_use]
    pub fn size(&self) -> usize {
        let line = |(name, value): &(&str, String)| name.len() + value.len() + ": \r\n".len();
        let lines: usize = self.headers.iter().map(line).sum();
        let around = if self.headers.is_empty() {
            0
        } else {
            "NATS/1.0\r\n\r\n".len()
        };
        self.body.len() + lines + around
    }

    /// With the headers of this trace, if it belongs to one.
    #[must_use]
    pub fn within(mut self, trace: Option<&Trace>) -> Self {
        self.headers
            .extend(trace.into_iter().flat_map(Trace::headers));
        self
    }
}

/// The state of the connection. `connects` counts successful connects, so two equal counts with `up`
/// mean one unbroken connection between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Link {
    /// Whether there is a connection now.
    pub up: bool,
    /// How many connects succeeded so far.
    pub connects: u64,
    /// The largest body that the server takes, in bytes.
    pub max_payload: usize,
}

/// What the answers that wait for the bus take, all together.
#[derive(Debug, Clone, Default)]
pub struct Unsent(Arc<AtomicUsize>);

impl Unsent {
    /// Bytes that an answer takes beside its body, about: whoever waits with it.
    const BESIDE: usize = 1024;

    /// Counts an answer with a body of so many bytes, until what this returns is dropped.
    #[must_use]
    pub fn count(&self, body: usize) -> Counted {
        let bytes = body.saturating_add(Self::BESIDE);
        self.0.fetch_add(bytes, Ordering::Relaxed);
        Counted {
            counted: Arc::clone(&self.0),
            bytes,
        }
    }

    /// In bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// One answer that waits.
#[derive(Debug)]
pub struct Counted {
    counted: Arc<AtomicUsize>,
    bytes: usize,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.counted.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// What the bus is asked for.
#[derive(Debug)]
pub enum Request {
    /// Publish this, if there is a connection.
    Publish(Message),
    /// Publish this answer, which counts until then.
    Answer(Message, Counted),
    /// Answer once a message to ourselves, sent after everything before this request, has come back from
    /// the server. Dropped if the connection goes first.
    Barrier(Barrier),
    /// Answer with a sender, and then say nothing until that is dropped, or for a second.
    Pause(oneshot::Sender<oneshot::Sender<()>>),
}

/// Who waits for a barrier.
#[derive(Debug)]
pub struct Barrier {
    /// The subject that he has said something on, or what it begins with; if nothing of it must have
    /// been refused.
    pub about: Option<String>,
    /// How many refusals there were before he said it.
    pub since: u64,
    /// Where he waits.
    pub answer: oneshot::Sender<Echo>,
}

/// A barrier is back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Echo {
    /// On the connection with this number.
    Confirmed(u64),
    /// The server did not take something that was said before it.
    Refused,
}

/// Whether the server has what was said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Confirmation {
    /// It has.
    Sure,
    /// Nobody knows: the connection is another one. To be said again.
    Unsure,
    /// It has not taken it, and will not until somebody allows it. To be said again after a while.
    Refused,
}

/// How many there were so far.
#[derive(Debug, Clone, Default)]
pub struct Counter(Arc<AtomicU64>);

impl Counter {
    /// One more; gives its number, from 1 on.
    pub fn count(&self) -> u64 {
        self.add(1)
    }

    /// So many more; gives how many there are then.
    pub fn add(&self, more: u64) -> u64 {
        self.0.fetch_add(more, Ordering::Relaxed) + more
    }

    /// How many.
    #[must_use]
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The instances' end.
#[derive(Debug, Clone)]
pub struct Outlet {
    offers: mpsc::Sender<Message>,
    control: mpsc::Sender<Request>,
    routes: mpsc::Sender<Request>,
    output: mpsc::Sender<Request>,
    link: watch::Receiver<Link>,
    refused: Counter,
    dropped: Counter,
    refusals: Arc<Semaphore>,
    left_out: Counter,
}

/// The ends that the bus keeps.
#[derive(Debug)]
pub struct Inlet {
    /// What never waited; goes first.
    pub offers: mpsc::Receiver<Message>,
    /// Everything else but routes and output; goes before those.
    pub control: mpsc::Receiver<Request>,
    /// Routes.
    pub routes: mpsc::Receiver<Request>,
    /// Output, in the order of each job.
    pub output: mpsc::Receiver<Request>,
    /// To be kept true.
    pub link: watch::Sender<Link>,
    /// Messages that the server, or the bus for it, has refused: to be counted up.
    pub refused: Counter,
    /// Messages that came and were dropped, because this host read too slowly: to be counted up.
    pub dropped: Counter,
}

/// A point in one connection's life; see [`Outlet::confirm`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark(Link, u64);

impl Mark {
    /// Whether there was a connection.
    #[must_use]
    pub fn up(self) -> bool {
        self.0.up
    }

    /// The largest body, in bytes, that the server took then.
    #[must_use]
    pub fn max_payload(self) -> usize {
        self.0.max_payload
    }

    /// How many connects had succeeded by then.
    #[must_use]
    pub fn connects(self) -> u64 {
        self.0.connects
    }

    /// How many messages of this host had been refused by then.
    #[must_use]
    pub fn refused(self) -> u64 {
        self.1
    }
}

/// Offers that may wait for the bus: heartbeats and advertisements.
const OFFERS: usize = 1024;

/// Control messages that may wait for the bus: an exit of each of a thousand instances.
const CONTROL: usize = 1024;

/// KiB of exits of refused starts that may wait for the bus. Whoever starts without a reply-to may go on and on, and
/// the bus may take none of them.
const REFUSALS_KB: usize = 64 << 10;

/// Words about routes that may wait for the bus.
const ROUTES: usize = 64;

/// Between two tries to say what the server does not take.
pub const REFUSED_PAUSE: Duration = Duration::from_secs(10);

/// Output messages that may wait for the bus: enough to batch, few enough that a slow server is felt at
/// once by whoever publishes (64 records are 4 MiB).
const OUTPUT: usize = 64;

/// An outlet, and the ends that the bus keeps.
#[must_use]
pub fn outlet() -> (Outlet, Inlet) {
    let (offers, offered) = mpsc::channel(OFFERS);
    let (control, controls) = mpsc::channel(CONTROL);
    let (routes, words) = mpsc::channel(ROUTES);
    let (output, outputs) = mpsc::channel(OUTPUT);
    let (tell, link) = watch::channel(Link::default());
    let (refused, dropped) = (Counter::default(), Counter::default());
    let inlet = Inlet {
        offers: offered,
        control: controls,
        routes: words,
        output: outputs,
        link: tell,
        refused: refused.clone(),
        dropped: dropped.clone(),
    };
    (
        Outlet {
            offers,
            control,
            routes,
            output,
            link,
            refused,
            dropped,
            refusals: Arc::new(Semaphore::new(REFUSALS_KB)),
            left_out: Counter::default(),
        },
        inlet,
    )
}

impl Outlet {
    /// Says it if there is a connection that takes it now; otherwise it is gone. `false`: there is one,
    /// and it is behind.
    pub fn offer(&self, message: Message) -> bool {
        let subject = message.subject.clone();
        let taken = !self.link.borrow().up || self.offers.try_send(message).is_ok();
        if !taken {
            tracing::warn!(subject, "the bus is behind: a message was left out");
        }
        taken
    }

    /// Says it, after what waits already, if there is a connection then; otherwise it is gone.
    pub async fn send(&self, message: Message) {
        // The bus task ends only when the agent does.
        drop(self.control.send(Request::Publish(message)).await);
    }

    /// [`Self::send`] of an answer, which counts until the bus has it.
    pub async fn answer(&self, message: Message, counted: Counted) {
        drop(self.control.send(Request::Answer(message, counted)).await);
    }

    /// Says a piece of output; otherwise as [`Self::send`].
    pub async fn print(&self, message: Message) {
        drop(self.output.send(Request::Publish(message)).await);
    }

    /// Waits until one more word about a route can be said.
    pub async fn room(&self) -> Room<'_> {
        match self.routes.reserve().await {
            Ok(room) => Room(room),
            // The bus is gone, and so is the agent in a moment.
            Err(_) => std::future::pending().await,
        }
    }

    /// Whether all routes that were taken back since `mark` are with the server.
    pub async fn confirm_routes(&self, mark: Mark) -> bool {
        let about = Some(messages::subjects::ROUTER_UNREGISTER);
        confirmed(&self.routes, mark, about).await == Confirmation::Sure
    }

    /// The connection as it is now.
    #[must_use]
    pub fn mark(&self) -> Mark {
        Mark(*self.link.borrow(), self.refused.value())
    }

    /// Whether everything printed since `mark` on subjects that begin with `about` has reached the server.
    /// Ends at the latest when the connection does.
    pub async fn confirm(&self, mark: Mark, about: &str) -> Confirmation {
        confirmed(&self.output, mark, Some(about)).await
    }

    /// Says it until the server has taken it. Waits for a connection, and for leave to say it, as long as it
    /// takes.
    pub async fn deliver(&self, message: &Message) {
        loop {
            let mark = self.up().await;
            self.send(message.clone()).await;
            match confirmed(&self.control, mark, Some(&message.subject)).await {
                Confirmation::Sure => return,
                Confirmation::Unsure => {}
                // A new connection may be to a server that takes it.
                Confirmation::Refused => {
                    drop(timeout(REFUSED_PAUSE, self.changed(mark)).await);
                }
            }
        }
    }

    /// Waits until the server has everything that was said ([`Confirmation::Sure`]), or the connection is gone.
    pub async fn settle(&self) -> Confirmation {
        confirmed(&self.control, self.mark(), None).await
    }

    /// Room to say, with so many bytes, that a start was refused; `None` if too many of these wait. What waits with
    /// it counts for a KiB.
    #[must_use]
    pub fn room_for_refusal(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        let kb = u32::try_from(bytes / 1024 + 1).ok()?;
        let refusals = Arc::clone(&self.refusals);
        refusals.try_acquire_many_owned(kb).ok()
    }

    /// How many refusals found no room.
    #[must_use]
    pub fn left_out(&self) -> &Counter {
        &self.left_out
    }

    /// How many messages to this host it did not get, because it read too slowly.
    #[must_use]
    pub fn drops(&self) -> &Counter {
        &self.dropped
    }

    /// From here on nothing is said, whatever is asked for, until what this returns is dropped.
    pub async fn pause(&self) -> Option<oneshot::Sender<()>> {
        let (tell, told) = oneshot::channel();
        self.control.send(Request::Pause(tell)).await.ok()?;
        told.await.ok()
    }

    /// Waits for a connection.
    pub async fn up(&self) -> Mark {
        let mut link = self.link.clone();
        let up = link.wait_for(|link| link.up).await.is_ok();
        match up {
            true => self.mark(),
            // The bus is gone, and so is the agent in a moment.
            false => std::future::pending().await,
        }
    }

    /// Waits until the connection is no longer the one of `mark`.
    pub async fn changed(&self, mark: Mark) {
        let mut link = self.link.clone();
        let changed = link.wait_for(|link| *link != mark.0).await.is_ok();
        if !changed {
            std::future::pending().await
        }
    }
}

/// Room for one word about a route; a choice of the word can be left to the moment in which it is said.
#[derive(Debug)]
pub struct Room<'a>(mpsc::Permit<'a, Request>);

impl Room<'_> {
    /// Says it, if there is a connection when its turn comes; otherwise it is gone.
    pub fn say(self, message: Message) {
        self.0.send(Request::Publish(message));
    }
}

async fn confirmed(
    channel: &mpsc::Sender<Request>,
    mark: Mark,
    about: Option<&str>,
) -> Confirmation {
    let (answer, answered) = oneshot::channel();
    let barrier = Barrier {
        about: about.map(str::to_owned),
        since: mark.1,
        answer,
    };
    if !mark.up() || channel.send(Request::Barrier(barrier)).await.is_err() {
        return Confirmation::Unsure;
    }
    match answered.await {
        Ok(Echo::Confirmed(connects)) if connects == mark.0.connects => Confirmation::Sure,
        Ok(Echo::Confirmed(_)) | Err(_) => Confirmation::Unsure,
        Ok(Echo::Refused) => Confirmation::Refused,
    }
}

#[cfg(test)]
mod tests {
    use super::{Barrier, Confirmation, Echo, Link, Message, REFUSALS_KB, Request, outlet};

    /// As the client writes them: `NATS/1.0`, a line each, an empty line.
    #[test]
    fn headers_count_as_bytes() {
        let mut message = Message::plain("a", b"{}".to_vec());
        assert_eq!(message.size(), 2);
        message.headers = vec![("a", "bc".to_owned()), ("d", String::new())];
        let sent = "NATS/1.0\r\na: bc\r\nd: \r\n\r\n{}";
        assert_eq!(message.size(), sent.len());
    }

    #[test]
    fn exits_of_refused_starts_do_not_wait_without_end() {
        let (outlet, _inlet) = outlet();
        let large = outlet.room_for_refusal(100 << 10).unwrap();
        let small: Vec<_> = std::iter::from_fn(|| outlet.room_for_refusal(500)).collect();
        assert_eq!(small.len(), REFUSALS_KB - 101);
        drop(large);
        assert!(outlet.room_for_refusal(500).is_some());
        assert!(outlet.room_for_refusal(100 << 20).is_none());
    }

    #[tokio::test]
    async fn a_confirmation_counts_only_on_the_connection_of_its_mark() {
        let (outlet, mut inlet) = outlet();
        inlet.link.send_replace(Link {
            up: true,
            connects: 1,
            max_payload: 1 << 20,
        });
        let mark = outlet.mark();
        let bus = async {
            for echo in [Echo::Confirmed(1), Echo::Confirmed(2), Echo::Refused] {
                let Some(Request::Barrier(Barrier { about, answer, .. })) =
                    inlet.output.recv().await
                else {
                    panic!("no barrier")
                };
                assert_eq!(about.as_deref(), Some("a.b"));
                answer.send(echo).unwrap();
            }
            let Some(Request::Barrier(dropped)) = inlet.output.recv().await else {
                panic!("no barrier")
            };
            drop(dropped);
        };
        let reader = async {
            let confirm = || outlet.confirm(mark, "a.b");
            assert_eq!(confirm().await, Confirmation::Sure);
            assert_eq!(
                confirm().await,
                Confirmation::Unsure,
                "a reconnect came between"
            );
            assert_eq!(confirm().await, Confirmation::Refused);
            assert_eq!(confirm().await, Confirmation::Unsure, "the connection went");
        };
        tokio::join!(bus, reader);
    }

    #[test]
    fn an_offer_never_waits() {
        let (outlet, inlet) = outlet();
        let offers = || {
            let heartbeat = || Message::plain("dea.heartbeat", b"{}".to_vec());
            (0..3000).filter(|_| outlet.offer(heartbeat())).count()
        };
        assert_eq!(offers(), 3000, "nobody misses them");
        assert_eq!(inlet.offers.len(), 0, "nobody is there");
        inlet.link.send_replace(Link {
            up: true,
            connects: 1,
            max_payload: 1 << 20,
        });
        assert_eq!(offers(), super::OFFERS);
        assert_eq!(inlet.offers.len(), super::OFFERS);
    }

    #[tokio::test]
    async fn a_flood_of_answers_displaces_no_offer() {
        let (outlet, inlet) = outlet();
        inlet.link.send_replace(Link {
            up: true,
            connects: 1,
            max_payload: 1 << 20,
        });
        for _ in 0..super::CONTROL {
            outlet.send(Message::plain("inbox", b"{}".to_vec())).await;
        }
        outlet.offer(Message::plain("dea.heartbeat", b"{}".to_vec()));
        assert_eq!(inlet.offers.len(), 1);
    }

    #[tokio::test]
    async fn a_delivery_is_repeated_until_it_is_confirmed() {
        let (outlet, mut inlet) = outlet();
        let message = Message::plain("droplet.exited", b"{}".to_vec());
        let bus = async {
            inlet.link.send_replace(Link {
                up: true,
                connects: 1,
                max_payload: 1 << 20,
            });
            for round in 1..=4 {
                let Some(Request::Publish(said)) = inlet.control.recv().await else {
                    panic!("no message")
                };
                assert_eq!(said.subject, "droplet.exited");
                let Some(Request::Barrier(barrier)) = inlet.control.recv().await else {
                    panic!("no barrier")
                };
                assert_eq!(barrier.since, u64::from(round == 4));
                match round {
                    3 => {
                        inlet.refused.count();
                        barrier.answer.send(Echo::Refused).unwrap();
                        tokio::task::yield_now().await;
                        assert!(inlet.control.is_empty(), "not again at once");
                        inlet.link.send_modify(|link| link.connects = 2);
                    }
                    4 => barrier.answer.send(Echo::Confirmed(2)).unwrap(),
                    _ => {}
                }
            }
        };
        tokio::join!(bus, outlet.deliver(&message));
    }
}
