//! Against a real server on the loopback and the real file system, as root.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use flate2::{Compression, write::GzEncoder};

use super::digest::Hasher;
use super::*;

/// A directory that is removed with the test.
pub(super) struct Scratch(PathBuf);

impl Scratch {
    pub(super) fn new() -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("ostler-droplets-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

/// One request: its head, and where the answer goes.
struct Request {
    head: String,
    path: String,
    stream: TcpStream,
}

impl Request {
    fn answer(&mut self, status: &str, headers: &str, body: &[u8]) {
        let length = body.len();
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\n{headers}\r\n");
        // The client may have hung up: some tests want just that.
        let _ = self.stream.write_all(head.as_bytes());
        let _ = self.stream.write_all(body);
    }

    /// Until the client hangs up.
    fn wait(&mut self) {
        let _ = self.stream.read(&mut [0; 64]);
    }
}

/// Answers each connection's first request through one function, on a thread each.
struct Server {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    requests: Arc<AtomicUsize>,
    accepting: Option<thread::JoinHandle<()>>,
}

impl Server {
    fn start(answer: impl Fn(Request) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let requests = Arc::new(AtomicUsize::new(0));
        let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&requests));
        let accepting = thread::spawn(move || {
            thread::scope(|scope| {
                for stream in listener.incoming() {
                    if stopped.load(Ordering::SeqCst) {
                        return;
                    }
                    counted.fetch_add(1, Ordering::SeqCst);
                    let stream = stream.unwrap();
                    let answer = &answer;
                    scope.spawn(move || {
                        if let Some(request) = read_head(stream) {
                            answer(request);
                        }
                    });
                }
            });
        });
        Self {
            address,
            stop,
            requests,
            accepting: Some(accepting),
        }
    }

    /// Answers everything with `body`.
    fn serving(body: Vec<u8>) -> Self {
        Self::start(move |mut request| request.answer("200 OK", "", &body))
    }

    fn uri(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        self.accepting.take().unwrap().join().unwrap();
    }
}

fn read_head(stream: TcpStream) -> Option<Request> {
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).ok()? == 0 {
            return None;
        }
    }
    let path = head.split(' ').nth(1)?.to_owned();
    Some(Request {
        head,
        path,
        stream: reader.into_inner(),
    })
}

const VCAP: Owner = Owner {
    uid: 2000,
    gid: 2001,
};

fn quick() -> FetchOptions {
    FetchOptions {
        files: Vec::new(),
        inactivity: Duration::from_secs(10),
        total: Duration::from_secs(20),
        max_bytes: 4 << 20,
        retries: 0,
        max_entries: 100,
        max_unpacked_bytes: 1 << 20,
        space: None,
    }
}

/// With little patience for silence.
fn impatient() -> FetchOptions {
    FetchOptions {
        inactivity: Duration::from_secs(3),
        ..quick()
    }
}

fn digest_of(bytes: &[u8]) -> Digest {
    let mut hasher = Hasher::like(&Digest::Sha1([0; 20]));
    hasher.update(bytes);
    hasher.finish()
}

pub(super) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A droplet with one file and its parent.
fn droplet() -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(5);
    header.set_mode(0o640);
    header.set_mtime(1_600_000_000);
    tar.append_data(&mut header, "./app/hello", &b"world"[..])
        .unwrap();
    gzip(&tar.into_inner().unwrap())
}

fn leftovers(scratch: &Scratch) -> Vec<String> {
    let mut names = names_in(&scratch.path().join("droplets")).unwrap();
    names.sort();
    names
}

#[tokio::test]
async fn a_droplet_is_fetched_once_and_kept() {
    let scratch = Scratch::new();
    let body = droplet();
    let digest = digest_of(&body);
    let server = Server::serving(body);
    let droplets = Droplets::open(scratch.path(), quick()).unwrap();
    let uri = server.uri("/d");
    let asks = (0..50).map(|_| {
        let (droplets, uri) = (droplets.clone(), uri.clone());
        tokio::spawn(async move { droplets.layer(&uri, &digest, VCAP).await })
    });
    for ask in asks.collect::<Vec<_>>() {
        let layer = ask.await.unwrap().unwrap();
        assert_eq!(
            layer,
            scratch.path().join(format!("droplets/{digest}/2000-2001"))
        );
    }
    // Another agent on the same directory finds it without a server.
    drop(server);
    fs::create_dir(scratch.path().join("droplets/.new-x")).unwrap();
    let again = Droplets::open(scratch.path(), quick()).unwrap();
    let layer = again.layer(&uri, &digest, VCAP).await.unwrap();
    while leftovers(&scratch) != [digest.to_string()] {
        tokio::task::yield_now().await;
    }

    assert_eq!(
        fs::read_link(layer.join("app")).unwrap(),
        Path::new("/home/vcap/app")
    );
    assert_eq!(
        fs::read(layer.join("home/vcap/app/hello")).unwrap(),
        b"world"
    );
    let seen = |path: &str| {
        let data = fs::symlink_metadata(layer.join(path)).unwrap();
        (data.uid(), data.gid(), data.mode() & 0o7777)
    };
    assert_eq!(seen(""), (0, 0, 0o755));
    assert_eq!(seen("home"), (0, 0, 0o755));
    for directory in [
        "home/vcap",
        "home/vcap/app",
        "home/vcap/tmp",
        "home/vcap/logs",
    ] {
        assert_eq!(seen(directory), (2000, 2001, 0o755), "{directory}");
    }
    assert_eq!(seen("home/vcap/app/hello"), (2000, 2001, 0o640));
    assert_eq!(
        layer
            .join("home/vcap/app/hello")
            .metadata()
            .unwrap()
            .mtime(),
        1_600_000_000
    );
}

#[tokio::test]
async fn fifty_waiters_make_one_request_and_share_an_error() {
    let scratch = Scratch::new();
    let server = Server::start(|mut request| {
        // Answers only once all are waiting.
        request.wait();
    });
    let droplets = Droplets::open(scratch.path(), impatient()).unwrap();
    let digest = Digest::Sha1([7; 20]);
    let uri = server.uri("/stalled");
    let asks: Vec<_> = (0..50)
        .map(|_| droplets.layer(&uri, &digest, VCAP))
        .collect();
    for result in join_all(asks).await {
        let error = result.unwrap_err();
        assert!(
            matches!(error, DropletError::Stalled { got: 0, .. }),
            "{error}"
        );
    }
    assert_eq!(server.requests(), 1);
    assert!(lock(&droplets.inner.running).is_empty());
    assert!(leftovers(&scratch).is_empty());
}

/// Polls all in one task, so that all wait before any is answered.
async fn join_all<F: Future>(futures: Vec<F>) -> Vec<F::Output> {
    let mut waiting: Vec<_> = futures.into_iter().map(Box::pin).collect();
    let mut done = Vec::new();
    std::future::poll_fn(move |context| {
        waiting.retain_mut(|future| match future.as_mut().poll(context) {
            std::task::Poll::Ready(output) => {
                done.push(output);
                false
            }
            std::task::Poll::Pending => true,
        });
        if waiting.is_empty() {
            std::task::Poll::Ready(std::mem::take(&mut done))
        } else {
            std::task::Poll::Pending
        }
    })
    .await
}

#[tokio::test]
async fn a_waiter_that_leaves_disturbs_nobody() {
    let scratch = Scratch::new();
    let body = droplet();
    let digest = digest_of(&body);
    let (go, gate) = std::sync::mpsc::channel::<()>();
    let gate = Mutex::new(gate);
    let server = Server::start(move |mut request| {
        gate.lock().unwrap().recv().unwrap();
        request.answer("200 OK", "", &body);
    });
    let options = FetchOptions {
        inactivity: Duration::from_secs(20),
        ..quick()
    };
    let droplets = Droplets::open(scratch.path(), options).unwrap();
    let uri = server.uri("/d");
    let ask = |droplets: Droplets, uri: String| {
        tokio::spawn(async move { droplets.layer(&uri, &digest, VCAP).await })
    };
    let waiters = || {
        let running = lock(&droplets.inner.running);
        running
            .values()
            .map(|task| task.outcome.receiver_count())
            .sum::<usize>()
    };
    let first = ask(droplets.clone(), uri.clone());
    let second = ask(droplets.clone(), uri.clone());
    while waiters() < 2 {
        tokio::task::yield_now().await;
    }
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    go.send(()).unwrap();
    second.await.unwrap().unwrap();
    assert_eq!(server.requests(), 1);
}

#[tokio::test]
async fn slow_downloads_delay_nothing_that_is_here_and_end_when_nobody_waits() {
    let scratch = Scratch::new();
    let body = droplet();
    let digest = digest_of(&body);
    let server = Server::start(move |mut request| match request.path.as_str() {
        "/d" => request.answer("200 OK", "", &body),
        _ => request.wait(),
    });
    let options = FetchOptions {
        inactivity: Duration::from_secs(2),
        ..quick()
    };
    let droplets = Droplets::open(scratch.path(), options).unwrap();
    let here = server.uri("/d");
    droplets.layer(&here, &digest, VCAP).await.unwrap();
    let slow = u8::try_from(PARALLEL).unwrap();
    let tasks: Vec<_> = (0..slow)
        .map(|number| {
            let (droplets, uri) = (droplets.clone(), server.uri("/slow"));
            let wanted = Digest::Sha256([number; 32]);
            tokio::spawn(async move { droplets.layer(&uri, &wanted, VCAP).await })
        })
        .collect();
    while droplets.inner.slots.available_permits() > 0 {
        tokio::task::yield_now().await;
    }
    droplets.layer(&here, &digest, VCAP).await.unwrap();
    tasks.iter().for_each(tokio::task::JoinHandle::abort);
    while droplets.inner.slots.available_permits() < PARALLEL {
        tokio::task::yield_now().await;
    }
    assert!(lock(&droplets.inner.running).is_empty());
    // Their threads notice when they look up, and clear away what they made.
    while leftovers(&scratch) != [digest.to_string()] {
        tokio::task::yield_now().await;
    }
}

/// One try against `answer`; the error, and that nothing is left of it.
async fn failure(
    options: FetchOptions,
    digest: Digest,
    answer: impl Fn(Request) + Send + Sync + 'static,
) -> DropletError {
    let scratch = Scratch::new();
    let server = Server::start(answer);
    let droplets = Droplets::open(scratch.path(), options).unwrap();
    let uri = format!("http://bits:s3cret@{}/d?sig=s3cret", server.address);
    let error = droplets.layer(&uri, &digest, VCAP).await.unwrap_err();
    assert!(leftovers(&scratch).is_empty(), "{:?}", leftovers(&scratch));
    let text = format!("{error} {error:?}");
    assert!(
        !text.contains("s3cret") && !text.contains("czNjcmV0"),
        "{text}"
    );
    error
}

const NONE: Digest = Digest::Sha1([0; 20]);

#[tokio::test]
async fn a_wrong_digest_names_both() {
    let error = failure(quick(), NONE, |mut request| {
        request.answer("200 OK", "", b"abc")
    })
    .await;
    let text = error.to_string();
    assert!(text.contains("wanted sha1-00000000"), "{text}");
    assert!(
        text.contains("got sha1-a9993e364706816aba3e25717850c26c9cd0d89d"),
        "{text}"
    );
}

#[tokio::test]
async fn only_status_200_is_a_droplet() {
    for status in [
        "404 Not Found",
        "204 No Content",
        "206 Partial Content",
        "304 Not Modified",
    ] {
        let error = failure(quick(), NONE, move |mut request| {
            request.answer(status, "", b"")
        });
        let text = error.await.to_string();
        assert!(text.contains(status.split(' ').next().unwrap()), "{text}");
    }
}

#[tokio::test]
async fn a_short_body_is_an_error() {
    let error = failure(quick(), digest_of(b"abc"), |mut request| {
        let _ = request
            .stream
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc");
    });
    let text = error.await.to_string();
    assert!(text.contains("closed early, after 3 bytes"), "{text}");
}

#[tokio::test]
async fn a_stalled_body_ends_with_the_inactivity() {
    let error = failure(impatient(), NONE, |mut request| {
        let _ = request
            .stream
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc");
        request.wait();
    });
    let error = error.await;
    assert!(
        matches!(error, DropletError::Stalled { got: 3, .. }),
        "{error}"
    );
}

#[tokio::test]
async fn a_slow_but_steady_body_ends_with_the_deadline() {
    let options = FetchOptions {
        total: Duration::from_secs(3),
        ..quick()
    };
    let error = failure(options, NONE, |mut request| {
        let _ = request.stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n");
        // One byte for each tick of a timer that never stalls long enough for the inactivity.
        let (_keep, never) = std::sync::mpsc::channel::<()>();
        while request.stream.write_all(b"x").is_ok() {
            let _ = never.recv_timeout(Duration::from_millis(50));
        }
    });
    let error = error.await;
    assert!(
        matches!(error, DropletError::Late { got: 1.., .. }),
        "{error}"
    );
}

#[tokio::test]
async fn an_endless_body_ends_at_the_bound() {
    let error = failure(quick(), NONE, |mut request| {
        let _ = request.stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n");
        while request.stream.write_all(&[0; 65536]).is_ok() {}
    });
    let error = error.await;
    assert!(
        matches!(error, DropletError::TooLarge { max: 4_194_304, .. }),
        "{error}"
    );
    let error = failure(quick(), NONE, |mut request| {
        let _ = request
            .stream
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5000000\r\n\r\n");
        request.wait();
    });
    let error = error.await;
    assert!(matches!(error, DropletError::TooLarge { .. }), "{error}");
}

#[tokio::test]
async fn what_is_no_http_is_said_to_be_so() {
    let error = failure(quick(), NONE, |mut request| {
        let _ = request.stream.write_all(b"SSH-2.0-x\r\n\r\n");
    });
    assert!(matches!(
        error.await,
        DropletError::Transfer {
            transient: false,
            ..
        }
    ));
}

#[tokio::test]
async fn redirects_are_followed_without_the_credentials() {
    let scratch = Scratch::new();
    let body = droplet();
    let digest = digest_of(&body);
    let heads = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&heads);
    let server = Server::start(move |mut request| {
        seen.lock().unwrap().push(request.head.clone());
        match request.path.as_str() {
            "/1" => request.answer("302 Found", "Location: /2?sig=x\r\n", b""),
            "/2?sig=x" => request.answer("307 Temporary Redirect", "Location: /3\r\n", b""),
            _ => request.answer("200 OK", "", &body),
        }
    });
    let droplets = Droplets::open(scratch.path(), quick()).unwrap();
    let uri = format!("http://bits:s3%40cret@{}/1", server.address);
    droplets.layer(&uri, &digest, VCAP).await.unwrap();
    let heads = heads.lock().unwrap();
    assert_eq!(heads.len(), 3);
    let first = heads[0].to_ascii_lowercase();
    // bits:s3@cret
    assert!(
        first.contains("authorization: basic yml0czpzm0bjcmv0\r\n"),
        "{first}"
    );
    assert!(!first.contains("bits"), "{first}");
    assert!(
        !heads[1].to_ascii_lowercase().contains("authorization"),
        "{}",
        heads[1]
    );
}

#[tokio::test]
async fn redirects_end() {
    let error = failure(quick(), NONE, |mut request| {
        request.answer("302 Found", "Location: /again?s3cret\r\n", b"");
    });
    let text = error.await.to_string();
    assert!(text.contains("redirects more than 5 times"), "{text}");
    for location in ["file:///etc/passwd", "ftp://u:s3cret@host/", "http://"] {
        let error = failure(quick(), NONE, move |mut request| {
            request.answer("302 Found", &format!("Location: {location}\r\n"), b"");
        });
        let error = error.await;
        assert!(
            matches!(
                error,
                DropletError::Transfer {
                    transient: false,
                    ..
                }
            ),
            "{error}"
        );
    }
}

#[tokio::test]
async fn what_may_pass_is_retried_within_bounds() {
    let scratch = Scratch::new();
    let body = droplet();
    let digest = digest_of(&body);
    let tries = AtomicUsize::new(0);
    let server = Server::start(
        move |mut request| match tries.fetch_add(1, Ordering::SeqCst) {
            0 => request.answer("503 Service Unavailable", "", b""),
            1 => drop(request),
            _ => request.answer("200 OK", "", &body),
        },
    );
    let options = FetchOptions {
        retries: 2,
        ..quick()
    };
    let droplets = Droplets::open(scratch.path(), options).unwrap();
    droplets
        .layer(&server.uri("/d"), &digest, VCAP)
        .await
        .unwrap();
    assert_eq!(server.requests(), 3);
    drop(server);

    let server = Server::start(|mut request| request.answer("503 Unavailable", "", b""));
    let options = FetchOptions {
        retries: 1,
        ..quick()
    };
    let droplets = Droplets::open(scratch.path(), options).unwrap();
    let error = droplets
        .layer(&server.uri("/d"), &NONE, VCAP)
        .await
        .unwrap_err();
    assert!(
        matches!(error, DropletError::Status { status: 503, .. }),
        "{error}"
    );
    assert_eq!(server.requests(), 2);
}

#[tokio::test]
async fn nobody_listening_is_an_error() {
    let scratch = Scratch::new();
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let droplets = Droplets::open(scratch.path(), quick()).unwrap();
    let uri = format!("http://127.0.0.1:{port}/d");
    let error = droplets
        .layer(&uri, &NONE, VCAP)
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains(&uri) && error.contains("refused"), "{error}");
}

#[tokio::test]
async fn a_droplet_may_be_a_file() {
    let scratch = Scratch::new();
    let body = droplet();
    let path = scratch.path().join("droplet.tgz");
    fs::write(&path, &body).unwrap();
    let options = FetchOptions {
        files: vec!["/nowhere".into(), scratch.path().into()],
        ..quick()
    };
    let droplets = Droplets::open(scratch.path(), options).unwrap();
    let uri = format!("file://{}", path.display());
    let layer = droplets.layer(&uri, &digest_of(&body), VCAP).await.unwrap();
    assert_eq!(
        fs::read(layer.join("home/vcap/app/hello")).unwrap(),
        b"world"
    );

    let complaint = async |uri: &str| {
        droplets
            .layer(uri, &NONE, VCAP)
            .await
            .unwrap_err()
            .to_string()
    };
    let absent = complaint("file:///nowhere/droplet.tgz").await;
    assert!(absent.contains("No such file"), "{absent}");
    fs::remove_file(&path).unwrap();
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let fifo = complaint(&uri).await;
    assert!(fifo.contains("no regular file"), "{fifo}");
    // Root's files are nobody's business: not even their digests are told.
    let inside = scratch.path().display().to_string();
    symlink("/etc/passwd", scratch.path().join("link.tgz")).unwrap();
    for (uri, word) in [
        ("file:///etc/passwd".to_owned(), "droplets.files"),
        (
            format!("file://{inside}/../../etc/passwd"),
            "droplets.files",
        ),
        (format!("file://{inside}/link.tgz"), "symlink"),
    ] {
        let refused = complaint(&uri).await;
        assert!(refused.contains(word), "{uri}: {refused}");
        assert!(!refused.contains("sha1"), "{refused}");
    }
}

#[tokio::test]
async fn a_bad_uri_starts_no_task() {
    let scratch = Scratch::new();
    let droplets = Droplets::open(scratch.path(), quick()).unwrap();
    let error = droplets.layer("ftp://x/", &NONE, VCAP).await.unwrap_err();
    assert!(matches!(error, DropletError::Uri { .. }), "{error}");
    assert!(lock(&droplets.inner.running).is_empty());
}

#[tokio::test]
async fn reaping_spares_what_is_in_use_or_in_the_making() {
    let scratch = Scratch::new();
    let body = droplet();
    let digest = digest_of(&body);
    let server = Server::start(move |mut request| match request.path.as_str() {
        "/stalled" => request.wait(),
        _ => request.answer("200 OK", "", &body),
    });
    let options = FetchOptions {
        inactivity: Duration::from_secs(10),
        ..quick()
    };
    let droplets = Droplets::open(scratch.path(), options).unwrap();
    droplets
        .layer(&server.uri("/d"), &digest, VCAP)
        .await
        .unwrap();
    let making = Digest::Sha256([1; 32]);
    fs::create_dir(scratch.path().join(format!("droplets/{making}"))).unwrap();
    let (waiting, uri) = (droplets.clone(), server.uri("/stalled"));
    let stalled = tokio::spawn(async move { waiting.layer(&uri, &making, VCAP).await });
    while lock(&droplets.inner.running).is_empty() {
        tokio::task::yield_now().await;
    }
    assert_eq!(droplets.reap(&HashSet::new(), Duration::from_secs(60)), 0);
    assert_eq!(
        droplets.reap(&HashSet::from([digest.to_string()]), Duration::ZERO),
        0
    );
    assert_eq!(droplets.reap(&HashSet::new(), Duration::ZERO), 1);
    assert!(!scratch.path().join(format!("droplets/{digest}")).exists());
    assert!(scratch.path().join(format!("droplets/{making}")).exists());
    assert!(stalled.await.unwrap().is_err());
    assert_eq!(droplets.reap(&HashSet::new(), Duration::ZERO), 1);
    assert!(leftovers(&scratch).is_empty());
    droplets.remove_all().unwrap();
    droplets.remove_all().unwrap();
    assert!(!scratch.path().join("droplets").exists());
}

#[tokio::test]
async fn a_server_without_tls_is_no_https_server() {
    let scratch = Scratch::new();
    let server = Server::start(|mut request| request.answer("200 OK", "", b""));
    let droplets = Droplets::open(scratch.path(), impatient()).unwrap();
    let uri = format!("https://{}/d", server.address);
    // What it answers to a handshake is no TLS, or nothing.
    let error = droplets.layer(&uri, &NONE, VCAP).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&uri), "{text}");
}

/// A small file system that goes away with the test.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH).unwrap();
    }
}

#[tokio::test]
async fn a_full_disk_is_said_to_be_full() {
    let scratch = Scratch::new();
    let data = Some("size=256k,mode=700");
    let none = nix::mount::MsFlags::empty();
    nix::mount::mount(Some("tmpfs"), scratch.path(), Some("tmpfs"), none, data).unwrap();
    let _mounted = Mounted(scratch.path().to_owned());
    let droplets = Droplets::open(scratch.path(), quick()).unwrap();
    let server = Server::serving(vec![1; 1 << 20]);
    let error = droplets
        .layer(&server.uri("/d"), &NONE, VCAP)
        .await
        .unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("the disk is full") && text.contains("droplet.tgz"),
        "{text}"
    );
    assert!(leftovers(&scratch).is_empty());
    // While unpacking, too: the archive is small and what is in it is not.
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(512 * 1024);
    header.set_mode(0o644);
    tar.append_data(
        &mut header,
        "app/zeros",
        std::io::repeat(0).take(512 * 1024),
    )
    .unwrap();
    let body = gzip(&tar.into_inner().unwrap());
    let digest = digest_of(&body);
    let server = Server::serving(body);
    let error = droplets
        .layer(&server.uri("/d"), &digest, VCAP)
        .await
        .unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("the disk is full") && text.contains("app/zeros"),
        "{text}"
    );
    assert!(leftovers(&scratch).is_empty());
}
