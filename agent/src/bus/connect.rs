//! The connection: made once, kept for ever, re-made with jitter.

use crate::config::Nats;
use crate::instances::outlet::Link;
use async_nats::connection::State;
use async_nats::{Client, ConnectOptions, Event};
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tracing::{info, warn};

/// Longest wait before the next try to connect, in milliseconds.
const RECONNECT_CAP_MS: u64 = 10_000;

/// Most time that a connection that was just made takes to serve. If it is lost meanwhile, that is told.
const TAKEOVER: Duration = Duration::from_secs(1);

/// Why there is no client: only settings can be wrong, a server that is away is waited for.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The credentials file.
    #[error("cannot use the credentials file {path}: {source}")]
    Credentials {
        /// Which file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The address.
    #[error("cannot use nats.url {url:?}: {source}; write nats://host:4222, several with commas")]
    Address {
        /// As it was given, without user and password.
        url: String,
        /// Why.
        source: async_nats::ConnectError,
    },
}

/// Makes the client and returns at once, with or without a server; `link` tells which.
///
/// # Errors
/// When a setting cannot be used.
pub async fn connect(
    settings: &Nats,
    id: &str,
    link: watch::Sender<Link>,
) -> Result<Client, ConnectError> {
    let (events, occurred) = mpsc::unbounded_channel();
    let mut options = ConnectOptions::new()
        .name(format!("ostler/{id}"))
        .custom_inbox_prefix(format!("_INBOX_{id}"))
        .retry_on_initial_connect()
        .max_reconnects(None)
        .ping_interval(Duration::from_secs(10))
        .reconnect_delay_callback(delay)
        .event_callback(move |event| {
            // The receiver lives as long as the client; few events, each handled at once.
            drop(events.send(event));
            std::future::ready(())
        });
    if let Some(path) = &settings.creds {
        options =
            options
                .credentials_file(path)
                .await
                .map_err(|source| ConnectError::Credentials {
                    path: path.display().to_string(),
                    source,
                })?;
    }
    let addresses: Vec<&str> = settings.url.split(',').map(str::trim).collect();
    let client = options
        .connect(addresses)
        .await
        .map_err(|source| ConnectError::Address {
            url: without_secrets(&settings.url),
            source,
        })?;
    tokio::spawn(watch_link(client.clone(), occurred, link));
    Ok(client)
}

/// Keeps `link` true. Runs as long as the client.
async fn watch_link(
    client: Client,
    mut events: mpsc::UnboundedReceiver<Event>,
    link: watch::Sender<Link>,
) {
    while let Some(event) = events.recv().await {
        // Those that the client has no room for it drops, but then others follow: each is a reason to look.
        if !matches!(event, Event::Disconnected | Event::Closed) {
            look(&client, &link).await;
        }
        match event {
            Event::Connected => {
                let Link {
                    connects,
                    max_payload,
                    ..
                } = *link.borrow();
                info!(connects, max_payload, "connected to the bus");
            }
            Event::Disconnected | Event::Closed => {
                warn!("the bus is away; apps run on, and the agent keeps trying");
                link.send_modify(|link| link.up = false);
            }
            Event::SlowConsumer(subscription) => {
                warn!(
                    subscription,
                    "messages were dropped: this host reads too slowly"
                );
            }
            Event::ServerError(error) => warn!(%error, "the bus reported an error"),
            Event::ClientError(error) => warn!(%error, "the bus client reported an error"),
            Event::LameDuckMode | Event::Draining => info!(%event, "the bus asked to leave"),
        }
    }
}

/// The connection as it is. The client announces one before it has taken over what the server said of
/// itself (0.51, `Connector::try_connect_to_server`); a flush is done by that connection only.
async fn look(client: &Client, link: &watch::Sender<Link>) {
    drop(timeout(TAKEOVER, client.flush()).await);
    let now = Link {
        up: client.connection_state() == State::Connected,
        connects: client.statistics().connects.load(Ordering::Relaxed),
        max_payload: client.max_payload(),
    };
    link.send_if_modified(|link| std::mem::replace(link, now) != now);
}

/// Full jitter: anything up to a bound that doubles from 100 ms to the cap.
fn delay(attempt: usize) -> Duration {
    let bound = 100_u64
        .checked_shl(u32::try_from(attempt).unwrap_or(u32::MAX))
        .unwrap_or(u64::MAX);
    let bound = bound.clamp(100, RECONNECT_CAP_MS);
    let random = u64::from(crate::random::u32());
    Duration::from_millis((random * bound) >> 32)
}

fn without_secrets(url: &str) -> String {
    url.split(',')
        .map(|one| match (one.find("://"), one.rfind('@')) {
            (Some(scheme), Some(at)) if at > scheme => {
                let (head, tail) = (one.get(..scheme + 3), one.get(at + 1..));
                format!("{}{}", head.unwrap_or_default(), tail.unwrap_or_default())
            }
            _ => one.to_owned(),
        })
        .collect::<Vec<_>>()
        .join(",")
}

#[cfg(test)]
mod tests {
    use super::{RECONNECT_CAP_MS, delay, without_secrets};

    #[test]
    fn delays_are_bounded_for_any_attempt() {
        for attempt in [0, 1, 5, 40, 63, 64, 1000, usize::MAX] {
            assert!(delay(attempt).as_millis() <= u128::from(RECONNECT_CAP_MS));
        }
    }

    #[test]
    fn secrets_stay_out_of_error_texts() {
        assert_eq!(
            without_secrets("nats://me:pw@a:1,nats://b:2,nats://tok@c"),
            "nats://a:1,nats://b:2,nats://c"
        );
    }
}
