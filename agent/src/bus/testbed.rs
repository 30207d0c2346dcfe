//! A real server for the tests of this room that need no host.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::time::sleep;

/// A nats-server on a free port; goes with the test.
pub(super) struct Server {
    process: Child,
    ports: PathBuf,
}

impl Server {
    #[expect(
        clippy::disallowed_methods,
        reason = "the server is another program, and no helper"
    )]
    pub(super) fn start() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let (process, number) = (std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let ports = std::env::temp_dir().join(format!("ostler-bus-{process}-{number}"));
        std::fs::create_dir_all(&ports).unwrap();
        let program = std::env::var("OSTLER_NATS_SERVER").unwrap_or("nats-server".into());
        let process = Command::new(program)
            .args(["--addr", "127.0.0.1", "--port", "-1", "--ports_file_dir"])
            .arg(&ports)
            .stderr(Stdio::null())
            .spawn()
            .expect("run `make deps`");
        Self { process, ports }
    }

    /// Sends it a signal.
    #[expect(
        clippy::disallowed_methods,
        reason = "a child that nobody has waited for keeps its number"
    )]
    pub(super) fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.process.id()).unwrap();
        kill(Pid::from_raw(pid), signal).unwrap();
    }

    /// Where it listens, once it does.
    pub(super) async fn address(&self) -> String {
        loop {
            let files = std::fs::read_dir(&self.ports).unwrap().flatten();
            for file in files {
                let text = std::fs::read_to_string(file.path()).unwrap_or_default();
                let ports: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
                if let Some(address) = ports["nats"][0].as_str() {
                    return address.to_owned();
                }
            }
            sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = std::fs::remove_dir_all(&self.ports);
    }
}
