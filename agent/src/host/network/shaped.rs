//! How much a container receives and sends, tried with transfers.

use super::testbed::{Container, Namespace, OUTSIDE, listed, on_host, open, outside, run};
use super::{Attached, Bandwidth, Network};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

const ONE: &str = "0000000000a";

/// What is limited in the tests, in bytes per second: more than one packet at a time, less than any
/// machine can do.
const RATE: u64 = 2_000_000;

fn limited(into: Option<u64>, out: Option<u64>) -> impl FnOnce(&mut Attached) {
    move |attached| attached.bandwidth = Bandwidth { into, out }
}

/// A connection from a container to outside, and its other end.
fn connection(container: &Container, outside: &Namespace) -> (TcpStream, TcpStream) {
    let listener = outside.listen(80);
    let inner = container.namespace.connect(OUTSIDE, 80).unwrap();
    let (outer, _) = listener.accept().unwrap();
    (inner, outer)
}

/// Sends as much as goes through for `time`, after `first`, in which full buckets are emptied; tells how
/// many bytes per second arrived.
fn transfer(from: &mut TcpStream, to: &mut TcpStream, first: Duration, time: Duration) -> f64 {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let block = vec![0; 64 * 1024];
            from.set_write_timeout(Some(Duration::from_millis(100)))
                .unwrap();
            while !done.load(Ordering::Relaxed) {
                // Full: again.
                let _ = from.write(&block);
            }
        });
        let mut buffer = vec![0; 256 * 1024];
        to.set_read_timeout(Some(Duration::from_millis(100)))
            .unwrap();
        let mut count = |time: Duration| {
            let (mut begun, mut bytes) = (Instant::now(), 0);
            let end = begun + time;
            // What has piled up while nobody read came earlier.
            while to.read(&mut buffer).is_ok_and(|read| read == buffer.len()) && begun < end {
                begun = Instant::now();
            }
            while begun.elapsed() < time {
                bytes += to.read(&mut buffer).unwrap_or(0);
            }
            u32::try_from(bytes).map_or(f64::MAX, f64::from) / begun.elapsed().as_secs_f64()
        };
        count(first);
        let rate = count(time);
        done.store(true, Ordering::Relaxed);
        // Whoever is left waiting for room has it.
        count(Duration::from_millis(200));
        rate
    })
}

/// Whether as many bytes per second as were allowed come from one to the other. Of a bound: never more but
/// for what a bucket lets through; TCP may make less of it, on a busy machine by half, and of one that
/// stands still for a while nothing.
fn assert_about(from: &mut TcpStream, to: &mut TcpStream, allowed: u64, what: &str) {
    let allowed = f64::from(u32::try_from(allowed).unwrap());
    let near = (0..10).any(|_| {
        let rate = transfer(from, to, SHORT, LONG);
        eprintln!("{what}: {:.0} kB/s of {:.0}", rate / 1e3, allowed / 1e3);
        assert!(rate < 1.15 * allowed, "{what}: {rate} of {allowed}");
        rate > 0.5 * allowed
    });
    assert!(near, "{what}: never near {allowed}");
}

/// Without a bound it is fast sooner or later: TCP has to find out, and the machine may be busy. With one it never is.
fn gets_fast(mut measured: impl FnMut() -> f64) {
    let bound = f64::from(u32::try_from(RATE).unwrap());
    let fast = (0..10).any(|_| measured() > 5.0 * bound);
    assert!(fast, "never beyond five times {RATE}");
}

const SHORT: Duration = Duration::from_millis(1500);
const LONG: Duration = Duration::from_secs(3);

#[test]
fn what_a_container_receives_stays_below_its_rate_and_near_it() {
    on_host(|| async {
        let (outside, network) = (outside(), open().await);
        let container = Container::with(&network, ONE, limited(Some(RATE), None)).await;
        let (mut inner, mut outer) = connection(&container, &outside);
        assert_about(&mut outer, &mut inner, RATE, "received");
        // The other direction is not limited.
        gets_fast(|| transfer(&mut inner, &mut outer, Duration::ZERO, SHORT));
        // Nor is this one where the limit is taken out.
        network.limit(ONE, Bandwidth::default()).await.unwrap();
        gets_fast(|| transfer(&mut outer, &mut inner, Duration::ZERO, SHORT));
    });
}

#[test]
fn what_a_container_sends_stays_below_its_rate_and_near_it() {
    on_host(|| async {
        let (outside, network) = (outside(), open().await);
        let container = Container::with(&network, ONE, limited(None, Some(RATE))).await;
        let (mut inner, mut outer) = connection(&container, &outside);
        assert_about(&mut inner, &mut outer, RATE, "sent");
        gets_fast(|| transfer(&mut outer, &mut inner, Duration::ZERO, SHORT));
        network.limit(ONE, Bandwidth::default()).await.unwrap();
        gets_fast(|| transfer(&mut inner, &mut outer, Duration::ZERO, SHORT));
    });
}

#[test]
fn what_goes_to_the_host_counts_too() {
    on_host(|| async {
        let network = super::testbed::open_hospitable().await;
        let container = Container::with(&network, ONE, limited(None, Some(RATE))).await;
        let listener = super::testbed::listen(80);
        let mut inner = container
            .namespace
            .connect(container.lease.host, 80)
            .unwrap();
        let (mut outer, _) = listener.accept().unwrap();
        assert_about(&mut inner, &mut outer, RATE, "sent to the host");
    });
}

/// Ends what would be another agent, and what it has begun to mend: it knows nothing of what comes.
async fn gone(network: Network) {
    let rules = Arc::downgrade(&network.rules);
    drop(network);
    while rules.strong_count() > 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn found(network: &Network, container: &Container) -> Bandwidth {
    network.bandwidth(ONE, &container.lease).await.unwrap()
}

#[test]
fn a_rate_is_changed_while_it_runs_without_a_moment_without_one() {
    on_host(|| async {
        let (outside, network) = (outside(), open().await);
        let container = Container::with(&network, ONE, limited(Some(RATE), Some(RATE))).await;
        let (mut inner, mut outer) = connection(&container, &outside);
        transfer(&mut outer, &mut inner, Duration::ZERO, SHORT);
        transfer(&mut inner, &mut outer, Duration::ZERO, SHORT);
        // Whoever looks at any time finds a limit.
        let (stop, address) = (Arc::new(AtomicBool::new(false)), container.lease.container);
        let looks = Arc::new(AtomicU32::new(0));
        let (stopped, looked) = (Arc::clone(&stop), Arc::clone(&looks));
        let looking = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let queue = run("tc", &format!("qdisc show dev os-{ONE} root"));
                assert!(queue.contains("tbf"), "{queue}");
                let rates = run("nft", "list set inet ostler rates");
                assert!(rates.contains(&address.to_string()), "{rates}");
                looked.fetch_add(1, Ordering::Relaxed);
            }
        });
        let (end, mut changes) = (Instant::now() + Duration::from_secs(2), 0);
        let enough = || looks.load(Ordering::Relaxed) > 5 || looking.is_finished();
        while Instant::now() < end || changes < 20 || !enough() {
            changes += 1;
            let rate = Some(RATE + changes);
            let both = Bandwidth {
                into: rate,
                out: rate,
            };
            network.limit(ONE, both).await.unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        looking.join().unwrap();
        let double = Bandwidth {
            into: Some(2 * RATE),
            out: Some(2 * RATE),
        };
        network.limit(ONE, double).await.unwrap();
        assert_eq!(found(&network, &container).await, double);
        assert_about(&mut outer, &mut inner, 2 * RATE, "received");
        assert_about(&mut inner, &mut outer, 2 * RATE, "sent");
    });
}

#[test]
fn a_rate_is_read_back_outlives_the_agent_and_leaves_with_the_container() {
    on_host(|| async {
        let network = open().await;
        let container = Container::new(&network, ONE).await;
        assert_eq!(found(&network, &container).await, Bandwidth::default());
        // More than 32 bits can say, too.
        for rates in [
            (Some(12_345_678), None),
            (None, Some(64_000)),
            (Some(5 << 30), Some(5 << 30)),
        ] {
            let bandwidth = Bandwidth {
                into: rates.0,
                out: rates.1,
            };
            network.limit(ONE, bandwidth).await.unwrap();
            assert_eq!(found(&network, &container).await, bandwidth);
            // Again is no error.
            network.limit(ONE, bandwidth).await.unwrap();
            gone(open().await).await;
            assert_eq!(found(&network, &container).await, bandwidth);
            let live = Attached {
                bandwidth,
                ..Attached::new(ONE, container.lease.clone())
            };
            let next = open().await;
            next.rebuild(std::slice::from_ref(&live)).await.unwrap();
            assert_eq!(found(&next, &container).await, bandwidth);
            gone(next).await;
        }
        network
            .detach(&Attached::new(ONE, container.lease.clone()))
            .await;
        let listed = listed("list table inet ostler");
        assert!(!listed.contains("elements"), "{listed}");
        network
            .limit("0000000000c", Bandwidth::default())
            .await
            .unwrap_err();
    });
}
