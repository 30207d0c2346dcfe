//! All subscriptions as one queue, in the order in which the connection brought the messages.
//!
//! The client gives each subscription a channel of its own, and whoever polls several channels gets a
//! burst out of order: three starts and a stop become a start, the stop, and two starts. But it hands
//! its messages over one after the other, and each time calls the waker of that channel's reader. So
//! here the waker itself takes the message, there and then, and the order is kept.

use crate::instances::outlet::Counter;
use async_nats::{Message, Subscriber};
use futures_util::{FutureExt, StreamExt};
use std::pin::Pin;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::unconstrained;
use tokio::time::sleep;
use tracing::{debug, warn};

/// Messages that may wait to be taken: as many as the client keeps for one subscription.
const WAITING: usize = 65_536;

/// Bytes of messages that may wait to be taken.
const WAITING_BYTES: usize = 64 << 20;

/// Between two tries to tell a client whose own queue is full.
const FULL: Duration = Duration::from_millis(5);

/// What comes out of the queue.
pub(super) enum Arrival {
    Message(Message),
    /// One of the subscriptions has ended.
    End,
}

/// What arrives on all of them, until each has ended.
pub(super) struct Arrivals {
    queue: mpsc::Receiver<Arrival>,
    /// Bytes of what is in it.
    waiting: Arc<AtomicUsize>,
    taps: Vec<Arc<Tap>>,
}

impl Arrivals {
    /// Begins to take; what came before is taken first, in the order of the subscriptions. What finds no room is counted.
    pub(super) fn of(subscribers: Vec<Subscriber>, dropped: &Counter) -> Self {
        let ends = subscribers.len();
        let (into, queue) = mpsc::channel(WAITING + ends);
        let waiting = Arc::<AtomicUsize>::default();
        let tap = |subscriber| {
            let source = Source {
                subscriber,
                into: Some(into.clone()),
                waiting: Arc::clone(&waiting),
                ends,
                dropped: dropped.clone(),
            };
            Arc::new(Tap {
                turn: AtomicU8::new(IDLE),
                source: Mutex::new(source),
            })
        };
        let taps: Vec<Arc<Tap>> = subscribers.into_iter().map(tap).collect();
        taps.iter().for_each(|tap| Arc::clone(tap).wake());
        Self {
            queue,
            waiting,
            taps,
        }
    }

    /// What comes next; `None` when every subscription has ended.
    pub(super) async fn next(&mut self) -> Option<Arrival> {
        let arrival = self.queue.recv().await;
        if let Some(Arrival::Message(message)) = &arrival {
            self.waiting.fetch_sub(message.length, Ordering::Relaxed);
        }
        arrival
    }

    /// Tells the server that nobody listens to the last of the subscriptions any more. What it had sent
    /// before still comes, and then its end.
    ///
    /// One alone: the client asks the server to answer, and forgets with the first answer all that it
    /// was told to (0.51, `ConnectionHandler`), though something for them may be on its way. For the same
    /// reason it should have nothing else to do meanwhile.
    ///
    /// Waits until the client takes the word, which whoever leaves has a time for.
    pub(super) async fn drain_one(&mut self) {
        let Some(tap) = self.taps.pop() else { return };
        let ask = || {
            let mut source = tap.source.lock().unwrap_or_else(PoisonError::into_inner);
            unconstrained(source.subscriber.drain()).now_or_never()
        };
        loop {
            match ask() {
                Some(Ok(())) => return,
                Some(Err(error)) => return debug!(%error, "a subscription could not be ended"),
                // What is said meanwhile fills it.
                None => sleep(FULL).await,
            }
        }
    }
}

/// One subscription, and the waker of its channel.
struct Tap {
    turn: AtomicU8,
    source: Mutex<Source>,
}

struct Source {
    subscriber: Subscriber,
    /// `None` once the subscription has ended.
    into: Option<mpsc::Sender<Arrival>>,
    /// Of all subscriptions.
    waiting: Arc<AtomicUsize>,
    /// Room in the queue that messages leave for the ends.
    ends: usize,
    /// Of all subscriptions.
    dropped: Counter,
}

const IDLE: u8 = 0;
/// Somebody is taking.
const TAKING: u8 = 1;
/// Somebody is taking and was woken meanwhile: he looks again.
const AGAIN: u8 = 2;

impl Wake for Tap {
    fn wake(self: Arc<Self>) {
        if self.turn.swap(AGAIN, Ordering::AcqRel) != IDLE {
            return;
        }
        let waker = Waker::from(Arc::clone(&self));
        loop {
            self.turn.store(TAKING, Ordering::Release);
            self.source
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(&mut Context::from_waker(&waker));
            let done =
                self.turn
                    .compare_exchange(TAKING, IDLE, Ordering::AcqRel, Ordering::Acquire);
            if done.is_ok() {
                return;
            }
        }
    }
}

impl Source {
    /// Takes what there is; the waker is in its place again then.
    fn take(&mut self, context: &mut Context<'_>) {
        // This runs in the client's task and must not use up that task's budget: it would be told to
        // come again later.
        while let Poll::Ready(message) =
            Pin::new(&mut unconstrained(self.subscriber.next())).poll(context)
        {
            match (message, &self.into) {
                (Some(message), Some(into)) => {
                    let length = message.length;
                    let before = self.waiting.fetch_add(length, Ordering::Relaxed);
                    // However large it is, one finds room where nothing waits.
                    let room = into.capacity() > self.ends
                        && (before == 0 || before + length <= WAITING_BYTES);
                    if !room || into.try_send(Arrival::Message(message)).is_err() {
                        self.waiting.fetch_sub(length, Ordering::Relaxed);
                        let dropped = self.dropped.count();
                        warn!(dropped, "messages were dropped: this host reads too slowly");
                    }
                }
                (None, _) | (_, None) => {
                    if let Some(into) = self.into.take() {
                        // There is room for it.
                        drop(into.try_send(Arrival::End));
                    }
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testbed::Server;
    use super::{Arrival, Arrivals, WAITING, WAITING_BYTES};
    use crate::instances::outlet::outlet;
    use async_nats::{Client, ConnectOptions};
    use futures_util::StreamExt;

    /// Publishes the numbers of `range` on `a` and `b` in turns, waiting for nothing.
    async fn flood(client: &Client, range: std::ops::Range<usize>) {
        for number in range {
            let subject = if number % 2 == 0 { "a" } else { "b" };
            let said = client.publish(subject, number.to_string().into());
            said.await.unwrap();
        }
    }

    #[tokio::test]
    async fn of_large_messages_fewer_may_wait() {
        const LARGE: usize = 1_000_000;
        const FIT: usize = WAITING_BYTES / LARGE;
        let server = Server::start();
        let options = ConnectOptions::new().retry_on_initial_connect();
        let client = options.connect(server.address().await).await.unwrap();
        let subscribers = vec![client.subscribe("a").await.unwrap()];
        let mut last = client.subscribe("last").await.unwrap();
        let (outlet, _inlet) = outlet();
        let mut arrivals = Arrivals::of(subscribers, outlet.drops());
        // Nobody reads; twice, for what was read makes room.
        for round in 1..=2 {
            for _ in 0..FIT + 5 {
                client.publish("a", vec![0; LARGE].into()).await.unwrap();
            }
            client.publish("last", "".into()).await.unwrap();
            last.next().await.unwrap();
            // What counts is what is sent, a little more than the body.
            let dropped = usize::try_from(outlet.drops().value()).unwrap();
            assert!((5 * round..=7 * round).contains(&dropped), "{dropped}");
            while arrivals.waiting.load(std::sync::atomic::Ordering::Relaxed) > 0 {
                assert!(matches!(arrivals.next().await, Some(Arrival::Message(_))));
            }
        }
    }

    #[tokio::test]
    async fn what_finds_no_room_is_counted_and_the_rest_and_the_ends_come() {
        const TOO_MANY: usize = 500;
        let server = Server::start();
        let options = ConnectOptions::new().retry_on_initial_connect();
        let client = options.connect(server.address().await).await.unwrap();
        let subscribers = vec![
            client.subscribe("a").await.unwrap(),
            client.subscribe("b").await.unwrap(),
        ];
        let mut last = client.subscribe("last").await.unwrap();
        let (outlet, _inlet) = outlet();
        let mut arrivals = Arrivals::of(subscribers, outlet.drops());
        // Nobody reads the queue. All of this has come before `last`.
        flood(&client, 0..WAITING + TOO_MANY).await;
        client.publish("last", "".into()).await.unwrap();
        last.next().await.unwrap();
        assert_eq!(outlet.drops().value(), TOO_MANY as u64);
        let mut next = async || match arrivals.next().await {
            Some(Arrival::Message(message)) => {
                let text = str::from_utf8(&message.payload).unwrap();
                text.parse::<usize>().ok()
            }
            Some(Arrival::End) | None => None,
        };
        for number in 0..WAITING {
            assert_eq!(next().await, Some(number), "the oldest, in their order");
        }
        // There is room again, and none is counted twice.
        flood(&client, 0..10).await;
        for number in 0..10 {
            assert_eq!(next().await, Some(number));
        }
        assert_eq!(outlet.drops().value(), TOO_MANY as u64);
        // With a full queue the ends still find their places.
        flood(&client, 0..WAITING + 1).await;
        client.publish("last", "".into()).await.unwrap();
        last.next().await.unwrap();
        assert_eq!(outlet.drops().value(), TOO_MANY as u64 + 1);
        for _ in 0..2 {
            arrivals.drain_one().await;
            client.publish("last", "".into()).await.unwrap();
            last.next().await.unwrap();
        }
        let (mut messages, mut ends) = (0, 0);
        while let Some(arrival) = arrivals.next().await {
            match arrival {
                Arrival::Message(_) => messages += 1,
                Arrival::End => ends += 1,
            }
        }
        assert_eq!((messages, ends), (WAITING, 2));
    }
}
