//! Waiting for messages: subscribed before the cause, one deadline for the effect.

use std::fmt::Write as _;

use async_nats::{Message, Subscriber};
use futures_util::{FutureExt, StreamExt};
use serde_json::Value;
use tokio::time::{Instant, timeout_at};

use crate::patience;

/// A subscription that tells what came instead when the awaited message does not.
#[derive(Debug)]
pub struct Watch {
    subject: String,
    messages: Subscriber,
    passed: Vec<Value>,
}

impl Watch {
    /// Subscribes and makes sure that the server knows: what is caused after this is seen.
    pub async fn subscribe(nats: &async_nats::Client, subject: &str) -> Self {
        let messages = nats
            .subscribe(subject.to_owned())
            .await
            .expect("a good subject");
        nats.flush().await.expect("connected");
        Self {
            subject: subject.to_owned(),
            messages,
            passed: Vec::new(),
        }
    }

    /// The next message, as JSON.
    pub async fn next(&mut self) -> Value {
        self.until("anything", |_| true).await
    }

    /// The next message for which `wanted` holds; the others are passed over.
    ///
    /// # Panics
    /// After the deadline, with the messages that came.
    pub async fn until(&mut self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + patience();
        loop {
            let Ok(message) = timeout_at(deadline, self.messages.next()).await else {
                panic!(
                    "{}: no {what} came in {:?}{}",
                    self.subject,
                    patience(),
                    self.came()
                );
            };
            let value = parse(&message.expect("the subscription lives"));
            self.passed.push(value.clone());
            if wanted(&value) {
                return value;
            }
        }
    }

    /// All that has arrived by now and was not returned yet, without waiting.
    pub fn arrived(&mut self) -> Vec<Value> {
        let mut arrived = Vec::new();
        while let Some(Some(message)) = self.messages.next().now_or_never() {
            arrived.push(parse(&message));
        }
        self.passed.extend(arrived.iter().cloned());
        arrived
    }

    /// Everything that this watch has seen, in order.
    #[must_use]
    pub fn all(&self) -> &[Value] {
        &self.passed
    }

    fn came(&self) -> String {
        let mut came = String::from("; what came:");
        for value in self.passed.iter().rev().take(5).rev() {
            let _ = write!(came, "\n  {value}");
        }
        came
    }
}

fn parse(message: &Message) -> Value {
    serde_json::from_slice(&message.payload)
        .unwrap_or_else(|error| panic!("{}: {error}: {:?}", message.subject, message.payload))
}
