//! The connection: made once, kept for ever, re-made with jitter.

use super::access::Access;
use super::cause;
use super::refusals::{Refusals, refused};
use super::twin::{self, Found, Twin};
use crate::host::blocking;
use crate::instances::outlet::{Counter, Link};
use async_nats::connection::State;
use async_nats::{Client, ClientError, ConnectOptions, Event, ServerAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, error, info, warn};

/// Longest wait before the next try to connect, in milliseconds.
const RECONNECT_CAP_MS: u64 = 10_000;

/// Most time that a connection that was just made takes to serve. If it is lost meanwhile, that is told.
const TAKEOVER: Duration = Duration::from_secs(1);

/// A server that is going to end is left within this time. It cuts nobody before: its grace is 10 s.
const LEAVE_WITHIN: Duration = Duration::from_secs(8);

/// Messages that the client keeps until they are written to the connection. Each may have as many bytes as the server
/// takes, 1 MiB where it is not set: the client's own default would be 2 GiB beside a bus that does not read.
const UNWRITTEN: usize = 64;

/// Between two lines about the same trouble.
const SAME_AGAIN: Duration = Duration::from_secs(60);

/// The client has been refused; only a setting can be the reason, for a server that is away is waited for.
#[derive(Debug, thiserror::Error)]
#[error("cannot make a client of the bus: {0}")]
pub struct ConnectError(async_nats::ConnectError);

/// Makes the client and returns at once, with or without a server; `link` tells which, as soon as the first
/// server has said that no other agent has this id. If one has, `twin` is told, and `link` never. `dropped` counts
/// what came and was not read in time.
///
/// # Errors
/// When a setting cannot be used.
pub(super) async fn connect(
    access: Access,
    id: &str,
    (link, dropped): (watch::Sender<Link>, Counter),
    twin: oneshot::Sender<Twin>,
    refusals: Arc<Refusals>,
) -> Result<Client, ConnectError> {
    let (events, occurred) = mpsc::unbounded_channel();
    let inbox = access.inbox_prefix.clone();
    let options = untiring(access.options(), delay)
        .name(format!("ostler/{id}"))
        .custom_inbox_prefix(inbox.unwrap_or_else(|| format!("_INBOX_{id}")))
        .ping_interval(Duration::from_secs(10))
        .event_callback(move |event| {
            hear(&event, &refusals);
            // The receiver lives as long as the client; few events, each handled at once.
            drop(events.send(event));
            std::future::ready(())
        });
    let servers: Vec<&str> = access.servers.iter().map(ServerAddr::as_url_str).collect();
    info!(?servers, known_as = %access, "looking for the bus");
    let client = options
        .connect(access.servers.as_slice())
        .await
        .map_err(ConnectError)?;
    let (watched, access) = ((client.clone(), id.to_owned()), Arc::new(access));
    tokio::spawn(watch_link(watched, access, occurred, (link, dropped), twin));
    Ok(client)
}

/// A client with these options tries for ever, the first time and each time after, with `delay` before each try. What
/// it cannot write it keeps a little of, and then whoever publishes waits.
pub(super) fn untiring(
    options: ConnectOptions,
    delay: impl Fn(usize) -> Duration + Send + Sync + 'static,
) -> ConnectOptions {
    options
        .client_capacity(UNWRITTEN)
        .retry_on_initial_connect()
        .max_reconnects(None)
        .reconnect_delay_callback(delay)
}

/// What the publisher must know before it sees the next barrier.
fn hear(event: &Event, refusals: &Refusals) {
    match event {
        Event::ServerError(error) => {
            let words = error.to_string();
            match refused(&words) {
                Some(subject) => {
                    if refusals.note(subject) {
                        error!(
                            subject,
                            "the bus refuses what this host says: it has no permission to publish this; what must not be lost is said until it has"
                        );
                    }
                }
                None => {
                    if refusals.is_new(&words) {
                        warn!(error = words, "the bus reported an error");
                    }
                }
            }
        }
        Event::Connected => refusals.forget(),
        Event::Disconnected
        | Event::Closed
        | Event::LameDuckMode
        | Event::Draining
        | Event::SlowConsumer(_)
        | Event::ClientError(_) => {}
    }
}

/// Keeps `link` true. Runs as long as the client, if no other agent has this id.
async fn watch_link(
    (client, id): (Client, String),
    access: Arc<Access>,
    mut events: mpsc::UnboundedReceiver<Event>,
    (link, dropped): (watch::Sender<Link>, Counter),
    twin: oneshot::Sender<Twin>,
) {
    let mut trouble = Trouble::default();
    let mut others = Found::Unknown;
    while let Some(event) = events.recv().await {
        match &event {
            // Nobody flushes: words to the client wait until it is connected, and would be many.
            Event::Disconnected | Event::Closed | Event::ClientError(_) => {}
            // There may be thousands of them, and the connection stays: only if its beginning was missed.
            Event::ServerError(_) if link.borrow().up => {}
            // Those that the client has no room for it drops, but then others follow: each is a reason to look.
            Event::Connected
            | Event::LameDuckMode
            | Event::Draining
            | Event::SlowConsumer(_)
            | Event::ServerError(_) => {
                if others == Found::Unknown {
                    others = twin::look(&client, &id).await;
                }
                match others {
                    Found::Nobody => look(&client, &link).await,
                    // Nobody waits for it if the agent ends already.
                    Found::Twin(found) => return drop(twin.send(found)),
                    Found::Unknown => {}
                }
            }
        }
        match event {
            Event::Connected => {
                trouble = Trouble::default();
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
                let dropped = dropped.count();
                warn!(
                    subscription,
                    dropped, "messages were dropped: this host reads too slowly"
                );
            }
            // It was heard.
            Event::ServerError(_) => {}
            Event::ClientError(error) => trouble.tell(&access, &error).await,
            Event::LameDuckMode => {
                tokio::spawn(move_over(client.clone()));
            }
            Event::Draining => {}
        }
    }
}

/// The connection as it is. The client announces one before it has taken over what the server said of
/// itself (0.51, `Connector::try_connect_to_server`); a flush is done by that connection only.
async fn look(client: &Client, link: &watch::Sender<Link>) {
    drop(timeout(TAKEOVER, client.flush()).await);
    let connected = client.connection_state() == State::Connected;
    // Output has headers: a server before 2.2 would end the connection at the first line of it, again and again. (A newer one that is
    // configured so refuses this client.)
    let has_headers = client.server_info().headers;
    if connected && !has_headers {
        error!(
            "this nats-server knows no headers (it is older than 2.2): nothing is said to it, apps run on; replace it"
        );
    }
    let now = Link {
        up: connected && has_headers,
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
    crate::random::share(Duration::from_millis(bound))
}

/// A server that is going to end is left for another one before it cuts the connection, at a random time so
/// that not all hosts come at once. What it had sent until then has been read.
async fn move_over(client: Client) {
    let servers = client
        .server_pool()
        .await
        .map_or(0, |servers| servers.len());
    if servers < 2 {
        info!("the bus is going to end, and no other server is known: staying until it does");
        return;
    }
    let wait = crate::random::share(LEAVE_WITHIN);
    info!(
        ?wait,
        servers, "the server is going to end: leaving it for another one"
    );
    let connects = || client.statistics().connects.load(Ordering::Relaxed);
    let before = connects();
    sleep(wait).await;
    if connects() != before {
        // It has ended already.
        return;
    }
    if client.force_reconnect().await.is_err() {
        debug!("the client has gone");
    }
}

/// The attempts to connect that failed in a row.
#[derive(Default)]
struct Trouble {
    told: Option<(String, Instant)>,
    untold: u64,
}

impl Trouble {
    /// Says why the last one failed; the same words once a minute.
    async fn tell(&mut self, access: &Arc<Access>, error: &ClientError) {
        let told = cause::take();
        let files = Arc::clone(access);
        let cause = blocking(move || files.missing()).await.or(told);
        let why = cause.unwrap_or_else(|| error.to_string());
        let is_known = |(told, at): &(String, Instant)| *told == why && at.elapsed() < SAME_AGAIN;
        if self.told.as_ref().is_some_and(is_known) {
            self.untold += 1;
            return;
        }
        let untold = std::mem::take(&mut self.untold);
        warn!(why, known_as = %access, untold, "the bus cannot be reached; trying again and again");
        self.told = Some((why, Instant::now()));
    }
}

#[cfg(test)]
mod tests {
    use super::super::testbed::Server;
    use super::{Link, RECONNECT_CAP_MS, UNWRITTEN, delay, untiring, watch_link};
    use crate::bus::{Access, Surroundings};
    use crate::config::Nats;
    use crate::instances::outlet::Counter;
    use async_nats::ConnectOptions;
    use futures_util::StreamExt;
    use nix::sys::signal::Signal;
    use std::sync::Arc;
    use std::sync::atomic::Ordering;
    use std::time::Duration;
    use tokio::net::TcpSocket;
    use tokio::sync::{mpsc, oneshot, watch};
    use tokio::time::{sleep, timeout};

    /// Nothing else is going on.
    const HANG: Duration = Duration::from_secs(2);

    /// More tries than an hour has: one takes half of the longest delay, more or less.
    const HOUR: usize = 1000;

    #[tokio::test]
    async fn a_bus_that_was_away_for_an_hour_is_tried_again() {
        // Nobody else gets this port, and nobody listens.
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = socket.local_addr().unwrap().to_string();
        let (tell, mut told) = watch::channel(0);
        let at_once = move |attempt| {
            tell.send_replace(attempt);
            Duration::ZERO
        };
        let options = untiring(ConnectOptions::new(), at_once);
        let _client = options.connect(&address).await.unwrap();
        for tries in [HOUR, 2 * HOUR] {
            let tried = told.wait_for(|attempt| *attempt >= tries).await;
            assert!(tried.is_ok(), "it gave up before {tries}");
        }
        let server = socket.listen(1).unwrap();
        server.accept().await.unwrap();
    }

    #[tokio::test]
    async fn a_server_that_does_not_read_makes_the_client_keep_little() {
        const MIB: usize = 1 << 20;
        // What the kernel keeps for a connection on both ends, and the client has in hand.
        const SOCKETS: usize = 32;
        let server = Server::start();
        let address = server.address().await;
        let options = untiring(ConnectOptions::new(), delay);
        let client = options.connect(address).await.unwrap();
        client.flush().await.unwrap();
        server.signal(Signal::SIGSTOP);
        let mut taken = 0;
        let body = vec![b'x'; MIB];
        while let Ok(published) = timeout(HANG, client.publish("a", body.clone().into())).await {
            published.unwrap();
            taken += 1;
            assert!(taken < UNWRITTEN + SOCKETS, "{taken} MiB");
        }
        // And then it has them all.
        assert!(taken >= UNWRITTEN, "{taken}");
        server.signal(Signal::SIGCONT);
        client.flush().await.unwrap();
        let written = client.statistics().out_messages.load(Ordering::Relaxed);
        assert_eq!(written, taken as u64);
    }

    #[tokio::test]
    async fn what_the_client_itself_has_no_room_for_is_counted() {
        const ROOM: usize = 2;
        const SAID: usize = 10;
        let server = Server::start();
        let (tell, told) = mpsc::unbounded_channel();
        let options = untiring(ConnectOptions::new(), delay)
            .subscription_capacity(ROOM)
            .event_callback(move |event| {
                drop(tell.send(event));
                std::future::ready(())
            });
        let client = options.connect(server.address().await).await.unwrap();
        let access = Access::gather(&Nats::default(), Surroundings::default()).unwrap();
        let (link, mut is) = watch::channel(Link::default());
        let (dropped, (twin, _twins)) = (Counter::default(), oneshot::channel());
        let kept_true = (link, dropped.clone());
        let watched = (client.clone(), "host".to_owned());
        tokio::spawn(watch_link(watched, Arc::new(access), told, kept_true, twin));
        is.wait_for(|link| link.up).await.unwrap();
        let _unread = client.subscribe("unread").await.unwrap();
        let mut last = client.subscribe("last").await.unwrap();
        for _ in 0..SAID {
            client.publish("unread", "".into()).await.unwrap();
        }
        client.publish("last", "".into()).await.unwrap();
        last.next().await.unwrap();
        while dropped.value() < (SAID - ROOM) as u64 {
            sleep(Duration::from_millis(10)).await;
        }
        // No fault of the connection.
        assert!(is.borrow().up);
        assert_eq!(dropped.value(), (SAID - ROOM) as u64);
    }

    #[test]
    fn delays_are_bounded_for_any_attempt() {
        for attempt in [0, 1, 5, 40, 63, 64, 1000, usize::MAX] {
            assert!(delay(attempt).as_millis() <= u128::from(RECONNECT_CAP_MS));
        }
    }

    #[test]
    fn delays_are_spread_over_the_whole_time() {
        // Attempt 0 may take 100 ms, 3 800 ms, 40 the longest. Of 4000 each tenth gets 400, give or take.
        for (attempt, bound) in [(0, 100), (3, 800), (40, RECONNECT_CAP_MS)] {
            let mut tenths = [0; 10];
            for _ in 0..4000 {
                let microseconds = u64::try_from(delay(attempt).as_micros()).unwrap();
                let tenth = usize::try_from(microseconds / (bound * 100)).unwrap();
                tenths[tenth.min(9)] += 1;
            }
            assert!(
                tenths.iter().all(|n| (250..=550).contains(n)),
                "{attempt}: {tenths:?}"
            );
        }
    }
}
