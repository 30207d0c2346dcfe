//! The other end of the [`Outlet`](crate::instances::outlet::Outlet): everything that leaves.
//!
//! `flush()` of the client is no delivery: it returns Ok from a stopped server. A barrier is: a message
//! to our own inbox comes back only after the server has read everything that was written before it on
//! the same connection.

use crate::instances::outlet::{Inlet, Message, Request};
use async_nats::{Client, HeaderMap, Subscriber};
use futures_util::StreamExt;
use std::collections::HashMap;
use std::sync::atomic::Ordering;
use tokio::sync::oneshot;
use tracing::{debug, warn};

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
    drop(tokio::time::timeout(std::time::Duration::from_secs(2), client.flush()).await);
}

/// Barriers on their way to the server and back.
#[derive(Default)]
struct Barriers {
    next: u64,
    waiting: HashMap<u64, oneshot::Sender<u64>>,
}

impl Barriers {
    fn add(&mut self, answer: oneshot::Sender<u64>) -> u64 {
        self.next += 1;
        self.waiting.insert(self.next, answer);
        self.next
    }

    fn answer(&mut self, body: &[u8], connects: u64) {
        let number = std::str::from_utf8(body)
            .ok()
            .and_then(|text| text.parse().ok());
        if let Some(answer) = number.and_then(|number: u64| self.waiting.remove(&number)) {
            // Whoever waited may have left.
            let _gone = answer.send(connects);
        }
    }

    fn drop_all(&mut self) {
        self.waiting.clear();
    }
}
