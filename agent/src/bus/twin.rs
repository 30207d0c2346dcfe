//! A machine that was copied whole has the id of the other: what one of them says would be taken for the
//! other's. So before an agent says anything, it asks whether somebody answers to its id.

use async_nats::connection::State;
use async_nats::{Client, StatusCode, Subscriber};
use futures_util::StreamExt;
use serde_json::{Value, json};
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::timeout;
use tracing::debug;

/// How long another agent may take to answer. Where nobody listens the server says so at once; one that
/// cannot know (or that still keeps the connection of a machine that fell silent) lets this time pass.
const ANSWER: Duration = Duration::from_secs(5);

/// Another agent with this host's id.
#[derive(Debug, PartialEq, Eq)]
pub struct Twin {
    /// Its address, if it told.
    pub ip: Option<String>,
}

/// What is known of other agents with this id.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Nobody answers to it.
    Nobody,
    /// Somebody does.
    Twin(Twin),
    /// There is no connection, or it broke meanwhile.
    Unknown,
}

/// Asks for an agent with the id `id`. This one must not listen yet.
pub(super) async fn look(client: &Client, id: &str) -> Found {
    if client.connection_state() != State::Connected {
        return Found::Unknown;
    }
    let connects = || client.statistics().connects.load(Ordering::Relaxed);
    let before = connects();
    match timeout(ANSWER, is_answered(client, id)).await {
        Ok(Some(true)) => Found::Twin(Twin {
            ip: address(client, id).await,
        }),
        Ok(Some(false)) => Found::Nobody,
        Ok(None) | Err(_) => {
            let unbroken = client.connection_state() == State::Connected && connects() == before;
            debug!(unbroken, "nobody answers to this host's id");
            if unbroken {
                Found::Nobody
            } else {
                Found::Unknown
            }
        }
    }
}

/// Whether an agent answers, or the server says that nobody does; `None` if the client is closed. A stream that
/// keeps the subject answers too, and means nothing.
async fn is_answered(client: &Client, id: &str) -> Option<bool> {
    let mut answers = ask(client, format!("dea.{id}.find"), &json!({"droplet": ""})).await?;
    while let Some(answer) = answers.next().await {
        if answer.status == Some(StatusCode::NO_RESPONDERS) {
            return Some(false);
        }
        let reply: Value = serde_json::from_slice(&answer.payload).unwrap_or_default();
        if reply.get("ok").is_some_and(Value::is_boolean) {
            return Some(true);
        }
    }
    None
}

async fn ask(client: &Client, subject: String, body: &Value) -> Option<Subscriber> {
    let inbox = client.new_inbox();
    let answers = client.subscribe(inbox.clone()).await.ok()?;
    let asked = client.publish_with_reply(subject, inbox, body.to_string().into());
    asked.await.ok()?;
    Some(answers)
}

/// Where the agent with this id says that it is.
async fn address(client: &Client, id: &str) -> Option<String> {
    let mut answers = ask(client, "dea.status".to_owned(), &json!({})).await?;
    let its = async {
        while let Some(answer) = answers.next().await {
            let status: Value = serde_json::from_slice(&answer.payload).unwrap_or_default();
            if status.get("id").and_then(Value::as_str) == Some(id) {
                return status.get("ip").and_then(Value::as_str).map(str::to_owned);
            }
        }
        None
    };
    timeout(ANSWER, its).await.ok().flatten()
}
