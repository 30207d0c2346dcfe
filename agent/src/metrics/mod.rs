//! Pages over HTTP, for whoever watches hosts and not the bus: `/metrics` in Prometheus' text format and `/health`; and
//! `/healthz` and `/varz` for collectors of DEA's time.
//!
//! Off unless `metrics.listen` is set. Nobody who asks costs more than a bounded piece of memory for a bounded time:
//! the head of a request has a largest size, a conversation a deadline, and there is a largest number of them.
//! What is told is counted elsewhere; this only asks for it.

mod health;
pub mod http;
mod page;
mod varz;

pub use health::TRIAL;

use crate::bus::Tally;
use crate::instances::outlet::Outlet;
use crate::instances::stable::{Ask, Registry, Standing};
use crate::instances::totals::Totals;
use crate::instances::world::{World, now, whole_seconds};
use health::Health;
use http::{Answer, HEAD_MAX, Page};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info};
use varz::Varz;

/// Conversations at once; who comes then waits until one is over.
const MOST: usize = 32;

/// What a client may take to ask.
const HEAD_WITHIN: Duration = Duration::from_secs(2);

/// What a client may take from its connecting to its having the answer.
const ALL_WITHIN: Duration = Duration::from_secs(10);

/// What a client may take to close once it has the answer, and how much of what it still says is heard.
const CLOSE_WITHIN: Duration = Duration::from_secs(1);
const CLOSE_BYTES: u64 = 64 * 1024;

/// After an accept that failed for want of something.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long an agent that was killed may still have the address, and how often that is looked at.
const ADDRESS_PATIENCE: Duration = Duration::from_secs(2);
const ADDRESS_PAUSE: Duration = Duration::from_millis(20);

/// What the stable may take to say how this host stands, and its disk how much output waits.
const PATIENCE: Duration = Duration::from_secs(2);

/// The address cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address} (metrics.listen): {source}")]
pub struct ListenError {
    address: SocketAddr,
    source: io::Error,
}

/// Where numbers and proofs come from.
#[derive(Debug)]
pub struct Sources {
    /// What all instances share.
    pub world: Arc<World>,
    /// What was asked of this host.
    pub tally: Arc<Tally>,
    /// The way to the stable; it keeps no mailbox open.
    pub asks: mpsc::WeakSender<Ask>,
}

impl Sources {
    /// How this host stands, as soon as the stable says it; `None` if it has left.
    async fn standing(&self) -> Option<Standing> {
        let (answer, answered) = oneshot::channel();
        self.asks.upgrade()?.send(Ask::Host(answer)).await.ok()?;
        answered.await.ok()
    }

    /// What is on it, likewise.
    async fn registry(&self) -> Option<Registry> {
        let (answer, answered) = oneshot::channel();
        let asked = self.asks.upgrade()?.send(Ask::Registry(answer)).await;
        asked.ok()?;
        answered.await.ok()
    }
}

/// Takes the address, if there is one.
///
/// # Errors
/// It is somebody else's, or none of this host's.
pub async fn listen(address: Option<SocketAddr>) -> Result<Option<TcpListener>, ListenError> {
    let Some(address) = address else {
        return Ok(None);
    };
    let deadline = Instant::now() + ADDRESS_PATIENCE;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return Ok(Some(listener)),
            Err(source) if source.kind() == io::ErrorKind::AddrInUse => {
                if Instant::now() >= deadline {
                    return Err(ListenError { address, source });
                }
            }
            Err(source) => return Err(ListenError { address, source }),
        }
        sleep(ADDRESS_PAUSE).await;
    }
}

/// Answers on `listener`, for ever.
pub async fn serve(listener: TcpListener, sources: Sources) {
    if let Ok(address) = listener.local_addr() {
        info!(%address, "serving metrics and health");
    }
    let sources = Arc::new(sources);
    let health = Arc::new(Health::of(Arc::clone(&sources)));
    let mut conversations = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = conversations.join_next() => {}
            accepted = listener.accept(), if conversations.len() < MOST => match accepted {
                Ok((stream, _)) => {
                    let (sources, health) = (Arc::clone(&sources), Arc::clone(&health));
                    conversations.spawn(async move {
                        let conversation = converse(stream, &sources, &health);
                        if let Ok(Err(error)) = timeout(ALL_WITHIN, conversation).await {
                            debug!(%error, "a client of the metrics has left");
                        }
                    });
                }
                Err(error) => {
                    debug!(%error, "not accepted");
                    sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
}

/// One request, one answer.
async fn converse(mut stream: TcpStream, sources: &Sources, health: &Health) -> io::Result<()> {
    let Ok(head) = timeout(HEAD_WITHIN, head(&mut stream)).await else {
        return Ok(());
    };
    let answer = match http::asked(&head?) {
        Ok(Page::Metrics) => Answer::metrics(metrics(sources).await),
        Ok(Page::Health) => {
            let report = health.report().await;
            Answer::health(report.is_well(), report.body())
        }
        Ok(Page::Healthz) => {
            let report = health.report().await;
            Answer::healthz(&report.failing().collect::<Vec<_>>())
        }
        Ok(Page::Varz) => Answer::varz(varz(sources).await),
        Err(refusal) => Answer::refusal(refusal),
    };
    stream.write_all(&answer.bytes()).await?;
    stream.shutdown().await?;
    // A connection that is closed on unread bytes takes the answer with it.
    let mut rest = stream.take(CLOSE_BYTES);
    let mut nowhere = tokio::io::sink();
    drop(timeout(CLOSE_WITHIN, tokio::io::copy(&mut rest, &mut nowhere)).await);
    Ok(())
}

/// What comes first, until it is a head, too large for one, or all.
async fn head(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    while !http::is_whole(&bytes) && bytes.len() <= HEAD_MAX {
        let most = (HEAD_MAX + 1 - bytes.len()) as u64;
        if (&mut *stream).take(most).read_buf(&mut bytes).await? == 0 {
            break;
        }
    }
    Ok(bytes)
}

/// The page. A stable that says nothing takes only its own numbers from it, and so does a disk.
async fn metrics(sources: &Sources) -> String {
    let world = &sources.world;
    let standing = timeout(PATIENCE, sources.standing());
    let (standing, spooled) = tokio::join!(standing, world.depth.bytes(PATIENCE));
    let told = (standing.ok().flatten(), spooled);
    let disk = (world.scribes.lateness().time(), world.scribes.refuses());
    let unmended = world.engine.network_unmended();
    let (outlet, totals) = (&world.outlet, &world.totals);
    page::page(&numbers(
        told,
        disk,
        unmended,
        outlet,
        totals,
        &sources.tally,
    ))
}

/// The page for collectors, of the same kind.
async fn varz(sources: &Sources) -> String {
    let told = async { Some((sources.standing().await?, sources.registry().await?)) };
    let standing = timeout(PATIENCE, told).await.ok().flatten();
    let (world, since) = (&sources.world, sources.tally.since);
    let varz = Varz::of(
        world.component(since),
        world.config.stacks.keys().cloned().collect(),
        standing,
        &page::Process::read(),
        whole_seconds(now()).saturating_sub(since),
    );
    varz.body()
}

fn numbers(
    (standing, spooled): (Option<Standing>, Option<u64>),
    (late, refuses): (Duration, bool),
    unmended: Duration,
    outlet: &Outlet,
    totals: &Totals,
    tally: &Tally,
) -> page::Numbers {
    page::Numbers {
        standing,
        spooled,
        late,
        refuses,
        unmended,
        mark: outlet.mark(),
        dropped: outlet.drops().value(),
        left_out: outlet.left_out().value(),
        exits: totals.exits().collect(),
        oom_kills: totals.oom_kills.value(),
        missing: totals.missing_output.value(),
        counts: tally.counts(),
        refused: tally.refused().collect(),
        since: tally.since,
        process: page::Process::read(),
    }
}

#[cfg(test)]
mod tests {
    use super::{Duration, Totals, numbers, page};
    use crate::bus::Tally;
    use crate::instances::outlet::outlet;

    #[test]
    fn what_was_dropped_is_on_the_page() {
        let (outlet, inlet) = outlet();
        for _ in 0..3 {
            inlet.dropped.count();
        }
        let page = page::page(&numbers(
            (None, None),
            (Duration::ZERO, false),
            Duration::ZERO,
            &outlet,
            &Totals::default(),
            &Tally::begin(),
        ));
        let line = "ostler_bus_dropped_messages_total 3";
        assert!(page.lines().any(|is| is == line), "{page}");
    }
}
