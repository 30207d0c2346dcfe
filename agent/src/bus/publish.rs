//! The other end of the [`Outlet`](crate::instances::outlet::Outlet): everything that leaves.
//!
//! `flush()` of the client is no delivery: it returns Ok from a stopped server. A barrier is: a message
//! to our own inbox comes back only after the server has read everything that was written before it on
//! the same connection.

use crate::instances::outlet::{Inlet, Message, Request};
use async_nats::{Client, HeaderMap, Subscriber};
use futures_util::StreamExt;
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::{Instant, interval, timeout};
use tracing::{debug, warn};

/// How long a server that answers pings may keep a barrier before it is worth a word, and again.
const OVERDUE: Duration = Duration::from_secs(30);

/// The longest pause.
const PAUSE: Duration = Duration::from_secs(1);

/// Publishes what is asked for until every [`Outlet`](crate::instances::outlet::Outlet) is gone.
pub async fn publish(client: Client, inlet: Inlet) {
    let inbox = client.new_inbox();
    let mut echoes = match client.subscribe(inbox.clone()).await {
        Ok(echoes) => echoes,
        Err(error) => {
            warn!(%error, "cannot subscribe to the own inbox: nothing can be confirmed");
            return;
        }
    };
    let Inlet {
        mut control,
        mut output,
        link,
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
                barriers.answer(&echo.payload, client.statistics().connects.load(Ordering::Relaxed));
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
            Some(request) = control.recv() => request,
            Some(request) = output.recv() => request,
            else => break,
        };
        match request {
            Request::Publish(message) => {
                if link.borrow().up {
                    send(&client, message).await;
                }
            }
            Request::Pause(answer) => pause(answer).await,
            Request::Barrier(answer) => {
                let number = barriers.add(answer);
                if client
                    .publish(inbox.clone(), number.to_string().into())
                    .await
                    .is_err()
                {
                    barriers.drop_all();
                }
            }
        }
    }
    leave(client, echoes).await;
}

async fn pause(answer: oneshot::Sender<oneshot::Sender<()>>) {
    let (held, dropped) = oneshot::channel();
    if answer.send(held).is_ok() {
        drop(timeout(PAUSE, dropped).await);
    }
}

async fn send(client: &Client, message: Message) {
    let max = client.max_payload();
    if message.body.len() > max {
        // The server would close the connection.
        warn!(
            subject = message.subject,
            bytes = message.body.len(),
            max,
            "too large for the bus"
        );
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

/// Last words reach the socket before the process ends.
async fn leave(client: Client, echoes: Subscriber) {
    drop(echoes);
    drop(timeout(Duration::from_secs(2), client.flush()).await);
}

/// Barriers on their way to the server and back.
#[derive(Default)]
struct Barriers {
    next: u64,
    waiting: BTreeMap<u64, (Instant, oneshot::Sender<u64>)>,
}

impl Barriers {
    fn add(&mut self, answer: oneshot::Sender<u64>) -> u64 {
        self.next += 1;
        self.waiting.insert(self.next, (Instant::now(), answer));
        self.next
    }

    fn answer(&mut self, body: &[u8], connects: u64) {
        let number = std::str::from_utf8(body)
            .ok()
            .and_then(|text| text.parse().ok());
        if let Some((_, answer)) = number.and_then(|number: u64| self.waiting.remove(&number)) {
            // Whoever waited may have left.
            let _gone = answer.send(connects);
        }
    }

    /// A server that answers pings and returns no barrier has no leave to.
    fn complain(&self, inbox: &str) {
        let oldest = self.waiting.values().next();
        if oldest.is_some_and(|(sent, _)| sent.elapsed() >= OVERDUE) {
            warn!(
                inbox,
                "the server does not return messages to this host's own inbox, so nothing counts as delivered: allow publish and subscribe on it"
            );
        }
    }

    fn drop_all(&mut self) {
        self.waiting.clear();
    }
}
