//! Waiting for messages: subscribed before the cause, one deadline for the effect.

use std::fmt::Write as _;
use std::time::Duration;

use async_nats::{Message, RequestErrorKind, Subscriber};
use futures_util::{FutureExt, StreamExt};
use serde_json::Value;
use tokio::time::{Instant, timeout_at};

use crate::{patience, strict};

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
        known(nats).await;
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
        while let Some(message) = self.at_once() {
            arrived.push(parse(&message));
        }
        self.passed.extend(arrived.iter().cloned());
        arrived
    }

    /// What is wrong with what has arrived by now, a line each; see [`strict`].
    pub(crate) fn complaints(&mut self) -> Vec<String> {
        let mut complaints = Vec::new();
        while let Some(message) = self.at_once() {
            complaints.extend(read(&message).err());
        }
        complaints
    }

    fn at_once(&mut self) -> Option<Message> {
        // As often as there is one, whatever else the runtime has to do.
        tokio::task::unconstrained(self.messages.next())
            .now_or_never()
            .flatten()
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

/// Waits until the server has all that was said to it before, and we have all that it had for us: it has answered.
pub(crate) async fn known(nats: &async_nats::Client) {
    let deadline = Instant::now() + patience();
    loop {
        // Nobody is there, and so it is the server that answers. A question may go down with a connection.
        let asked = async_nats::Request::new().timeout(Some(Duration::from_secs(1)));
        match nats.send_request("$SRV.nobody", asked).await {
            Err(error) if error.kind() == RequestErrorKind::NoResponders => return,
            other => assert!(Instant::now() < deadline, "no answer: {other:?}"),
        }
    }
}

/// The JSON of a message. If it is an agent's it must be one that its receivers can decode.
pub(crate) fn parse(message: &Message) -> Value {
    read(message).unwrap_or_else(|complaint| panic!("{complaint}"))
}

fn read(message: &Message) -> Result<Value, String> {
    let (subject, body) = (&message.subject, &message.payload);
    let value =
        serde_json::from_slice(body).map_err(|error| format!("{subject}: {error}: {body:?}"))?;
    strict::check(subject, &value)
        .map_err(|wrong| format!("nobody can decode {subject}: {wrong}: {value}"))?;
    Ok(value)
}
