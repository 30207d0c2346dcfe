//! The other end of the [`Outlet`](crate::instances::outlet::Outlet): everything that leaves.
//!
//! `flush()` of the client is no delivery: it returns Ok from a stopped server. A barrier is: a message
//! to our own inbox comes back only after the server has read everything that was written before it on
//! the same connection. One barrier is on its way at a time; who asks meanwhile waits for the next.

use super::refusals::Refusals;
use crate::instances::outlet::{Barrier, Echo, Inlet, Link, Message, Request};
use async_nats::{Client, HeaderMap};
use futures_util::StreamExt;
use messages::trace;
use std::mem;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::{oneshot, watch};
use tokio::task::yield_now;
use tokio::time::{Instant, interval, timeout};
use tracing::{debug, warn};

/// How long a server that answers pings may keep a barrier before it is worth a word, and again.
const OVERDUE: Duration = Duration::from_secs(30);

/// The longest pause.
const PAUSE: Duration = Duration::from_secs(1);

/// Publishes what is asked for, as long as the process lives: last words are waited for by whoever says them
/// ([`Outlet::settle`](crate::instances::outlet::Outlet::settle)). To be run by the runtime that the client was made
/// by: see [`Refusals`].
pub(super) async fn publish(client: Client, inlet: Inlet, refusals: &Refusals) {
    let inbox = client.new_inbox();
    let mut echoes = match client.subscribe(inbox.clone()).await {
        Ok(echoes) => echoes,
        Err(error) => {
            warn!(%error, "cannot subscribe to the own inbox: nothing can be confirmed");
            return;
        }
    };
    let Inlet {
        mut offers,
        mut control,
        mut routes,
        mut output,
        link,
        ..
    } = inlet;
    let mut link = link.subscribe();
    let mut barriers = Barriers::default();
    let mut overdue = interval(OVERDUE);
    loop {
        let request = tokio::select! {
            // An echo first: it frees those who wait for it. Then the link, so that a barrier of a
            // broken connection is dropped before a new one is sent. Output comes last.
            biased;
            Some(echo) = echoes.next() => {
                // Who tells of refusals has his turn.
                yield_now().await;
                let connects = client.statistics().connects.load(Ordering::Relaxed);
                barriers.answer(&echo.payload, connects, refusals);
                barriers.send(&client, &inbox, &link).await;
                continue;
            }
            Ok(()) = link.changed() => {
                barriers.drop_all();
                continue;
            }
            _ = overdue.tick() => {
                barriers.complain(&inbox);
                continue;
            }
            Some(message) = offers.recv() => Request::Publish(message),
            Some(request) = control.recv() => request,
            Some(request) = routes.recv() => request,
            Some(request) = output.recv() => request,
        };
        match request {
            Request::Publish(message) => say(&client, &link, message, refusals).await,
            Request::Answer(message, _counted) => say(&client, &link, message, refusals).await,
            Request::Pause(answer) => pause(answer).await,
            Request::Barrier(barrier) => {
                barriers.next.push(barrier);
                barriers.send(&client, &inbox, &link).await;
            }
        }
    }
}

/// Says it, if there is a connection.
async fn say(client: &Client, link: &watch::Receiver<Link>, message: Message, refusals: &Refusals) {
    let up = link.borrow().up;
    if up {
        // A client that has just lost its connection takes more, until it is full.
        unless_down(link, send(client, message, refusals)).await;
    }
}

/// What `work` gives, if that is before there is no connection.
async fn unless_down<T>(link: &watch::Receiver<Link>, work: impl Future<Output = T>) -> Option<T> {
    // The loop has not seen yet what this one sees.
    let mut link = link.clone();
    tokio::select! {
        biased;
        done = work => Some(done),
        Ok(_) = link.wait_for(|link| !link.up) => None,
    }
}

async fn pause(answer: oneshot::Sender<oneshot::Sender<()>>) {
    let (held, dropped) = oneshot::channel();
    if answer.send(held).is_ok() {
        drop(timeout(PAUSE, dropped).await);
    }
}

async fn send(client: &Client, mut message: Message, refusals: &Refusals) {
    let max = client.max_payload();
    if message.size() > max {
        // What it says counts for more than the trace that it belongs to.
        let of_trace = [trace::PARENT, trace::STATE];
        message.headers.retain(|(name, _)| !of_trace.contains(name));
    }
    let (subject, bytes) = (&message.subject, message.size());
    if bytes > max {
        // The server would close the connection.
        if refusals.note(subject) {
            warn!(subject, bytes, max, "too large for the bus");
        }
        return;
    }
    let result = if message.headers.is_empty() {
        client.publish(message.subject, message.body.into()).await
    } else {
        let mut headers = HeaderMap::new();
        for (header, value) in &message.headers {
            headers.insert(*header, value.as_str());
        }
        client
            .publish_with_headers(message.subject, headers, message.body.into())
            .await
    };
    if let Err(error) = result {
        debug!(%error, "not published");
    }
}

/// Barriers on their way to the server and back.
#[derive(Default)]
struct Barriers {
    /// The number of the last one.
    number: u64,
    /// Since when it is on its way, if it is.
    sent: Option<Instant>,
    /// Who waits for it.
    waiting: Vec<Barrier>,
    /// Who waits for the next one.
    next: Vec<Barrier>,
}

impl Barriers {
    /// Sends the next one, if somebody waits for it and none is on its way.
    async fn send(&mut self, client: &Client, inbox: &str, link: &watch::Receiver<Link>) {
        if self.sent.is_some() || self.next.is_empty() {
            return;
        }
        self.number += 1;
        self.sent = Some(Instant::now());
        self.waiting = mem::take(&mut self.next);
        let body = self.number.to_string().into();
        let sent = unless_down(link, client.publish(inbox.to_owned(), body)).await;
        if !matches!(sent, Some(Ok(()))) {
            self.drop_all();
        }
    }

    fn answer(&mut self, body: &[u8], connects: u64, refusals: &Refusals) {
        if body != self.number.to_string().as_bytes() || self.sent.take().is_none() {
            // Of a connection that is gone.
            return;
        }
        let verdict = refusals.barrier();
        for barrier in mem::take(&mut self.waiting) {
            let about = barrier.about.as_deref();
            let echo = match about.is_some_and(|about| verdict.hits(about, barrier.since)) {
                true => Echo::Refused,
                false => Echo::Confirmed(connects),
            };
            // Whoever waited may have left.
            let _gone = barrier.answer.send(echo);
        }
    }

    /// A server that answers pings and returns no barrier has no leave to.
    fn complain(&self, inbox: &str) {
        if self.sent.is_some_and(|sent| sent.elapsed() >= OVERDUE) {
            warn!(
                inbox,
                "the server does not return messages to this host's own inbox, so nothing counts as delivered: allow publish and subscribe on it"
            );
        }
    }

    fn drop_all(&mut self) {
        self.sent = None;
        self.waiting.clear();
        self.next.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::super::connect::untiring;
    use super::super::refusals::Refusals;
    use super::super::testbed::Server;
    use super::{Link, Message, publish};
    use crate::instances::outlet::{Confirmation, Counter, outlet};
    use async_nats::ConnectOptions;
    use nix::sys::signal::Signal;
    use std::time::Duration;
    use tokio::time::{sleep, timeout};

    #[tokio::test]
    async fn who_waits_is_told_that_a_bus_is_gone_which_took_nothing_any_more() {
        const BODY: usize = 64 << 10;
        let server = Server::start();
        let options = untiring(ConnectOptions::new(), |_| Duration::ZERO);
        let client = options.connect(server.address().await).await.unwrap();
        client.flush().await.unwrap();
        let (outlet, inlet) = outlet();
        let link = inlet.link.clone();
        let up = Link {
            up: true,
            connects: 1,
            max_payload: 1 << 20,
        };
        link.send_replace(up);
        let refusals = Refusals::new(Counter::default());
        let publisher = publish(client, inlet, &refusals);
        let others = async {
            assert_eq!(outlet.settle().await, Confirmation::Sure);
            server.signal(Signal::SIGSTOP);
            let mut said = 0;
            let send = || outlet.send(Message::plain("a", vec![b'x'; BODY]));
            while timeout(Duration::from_secs(1), send()).await.is_ok() {
                said += 1;
            }
            assert!(said < 2000, "it has taken them all");
            let settled = async {
                sleep(Duration::from_millis(100)).await;
                link.send_replace(Link { up: false, ..up });
            };
            let told = async { tokio::join!(outlet.settle(), settled).0 };
            let told = timeout(Duration::from_secs(10), told).await;
            assert_eq!(told, Ok(Confirmation::Unsure));
            server.signal(Signal::SIGCONT);
        };
        tokio::select! {
            () = publisher => panic!("it ends with the process"),
            () = others => {}
        }
    }
}
