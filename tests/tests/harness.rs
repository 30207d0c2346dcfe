//! The harness itself: a ruler must be straight.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use tests::{Body, Droplet, Files, Network, Running, get, numbered};

#[test]
fn a_failing_test_still_cleans_up() {
    struct Mark<'a>(&'a std::cell::Cell<bool>);
    impl Drop for Mark<'_> {
        fn drop(&mut self) {
            self.0.set(true);
        }
    }
    // The workspace's profiles abort on panic; cargo builds tests to unwind all the same. Hosts rely on it.
    let cleaned = std::cell::Cell::new(false);
    let failed = catch_unwind(AssertUnwindSafe(|| {
        let _mark = Mark(&cleaned);
        panic!("on purpose");
    }));
    assert!(failed.is_err() && cleaned.get());
}

#[tokio::test]
async fn the_network_has_an_outside() {
    let network = Network::enter();
    let listener = tokio::net::TcpListener::bind((Network::HOST, 0))
        .await
        .unwrap();
    let address = listener.local_addr().unwrap();
    let from = network.outside(|| {
        std::net::TcpStream::connect(address)
            .unwrap()
            .local_addr()
            .unwrap()
    });
    assert_eq!(from.ip().to_string(), Network::OUTSIDE);
}

#[tokio::test]
async fn files_are_served_with_their_failures() {
    let _network = Network::enter();
    let files = Files::serve().await;
    let url = files.put("a.tgz", Body::Bytes(b"abc".to_vec()));
    let address = url
        .strip_prefix("http://")
        .unwrap()
        .split('/')
        .next()
        .unwrap();
    assert_eq!(
        get(address, "/a.tgz").await.unwrap(),
        (200, "abc".to_owned())
    );
    assert_eq!(get(address, "/b.tgz").await.unwrap().0, 404);
    assert_eq!(files.requests("a.tgz"), 1);
}

#[test]
fn numbered_lines_are_each_there_once() {
    assert_eq!(numbered("out", b"out 1\nout 2 ...\n"), Ok(2));
    assert!(
        numbered("out", b"out 1\nout 3\n")
            .unwrap_err()
            .contains("after line 1")
    );
    assert!(numbered("out", b"out 1\nout 1\n").is_err());
    assert!(numbered("out", b"out 1\nout 2").is_err());
    assert!(numbered("out", b"out 1\nerr 2\n").is_err());
}

#[test]
fn sample_apps_are_packed_to_the_same_bytes() {
    assert_eq!(
        Droplet::sample("sinatra").sha1(),
        Droplet::sample("sinatra").sha1()
    );
    assert_eq!(Droplet::shell("true").sha1().len(), 40);
    assert_eq!(Droplet::shell("true").sha256().len(), 64);
}

#[test]
fn a_process_is_ended_and_reaped_once() {
    let log = std::env::temp_dir().join(format!("ostler-harness-{}", std::process::id()));
    let sleeper = Running::start(Path::new("/bin/sleep"), &["1000"], &log);
    let process = tests::Process::read(sleeper.pid()).unwrap();
    assert!(process.lives());
    sleeper.end();
    assert!(!process.lives());
    std::fs::remove_file(log).unwrap();
}
