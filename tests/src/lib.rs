//! The harness of the black-box tests: a [`Host`] to talk to, over the bus and through the kernel.
//!
//! Each test gets a machine of its own as far as an agent can tell: a network namespace with an outside
//! behind a veth pair, a nats-server, a base directory, a cgroup parent. The first thing a test does is
//! [`Host::start`]; at the end of its life a host stops its agent and **fails the test if anything is
//! left over**. Whatever a test hears from an agent is held to what its receivers can decode ([`strict`]). Tests must be `#[tokio::test]` with its default runtime of one thread: the namespace
//! belongs to the thread.
//!
//! What to test is found through the environment, so that the same test programs run in the virtual
//! machine too:
//!
//! | variable | default | |
//! |---|---|---|
//! | `OSTLER_AGENT` | `target/debug/ostler` | the agent's program |
//! | `OSTLER_HELPERS` | `target/x86_64-unknown-linux-gnu/helpers` | the directory of the helpers |
//! | `OSTLER_STACK` | what `fixtures/stack/build.sh --where` prints | the stack `debian` |
//! | `OSTLER_FIXTURES` | `fixtures` | |
//! | `OSTLER_ROUNDS` | 3 | how often tests of luck try theirs |
//! | `OSTLER_PATIENCE` | 30 | seconds that anything may take: the one deadline |
//! | `OSTLER_VM` | | set in the virtual machine: a test may do what would harm others elsewhere |

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_methods,
    reason = "the harness fails a test by panicking, and it is what starts and ends processes for tests"
)]

mod agent;
mod certificates;
mod credentials;
mod dice;
mod droplet;
mod files;
mod frozen;
mod host;
mod leftovers;
mod network;
mod output;
mod process;
pub mod strict;
mod watch;

use std::path::{Path, PathBuf};
use std::time::Duration;

pub use agent::{Ended, Running};
pub use certificates::Certificates;
pub use credentials::{Account, Operator};
pub use dice::Dice;
pub use droplet::Droplet;
pub use files::{Body, Files, get};
pub use frozen::Frozen;
pub use host::{Host, Question, Setup};
pub use network::Network;
pub use output::{Output, Stream, numbered};
pub use process::{Process, Tree};
pub use watch::Watch;

/// The one deadline: how long anything awaited may take before the test fails.
#[must_use]
pub fn patience() -> Duration {
    Duration::from_secs(number("OSTLER_PATIENCE", 30))
}

/// How often a test of luck tries its luck.
#[must_use]
pub fn rounds() -> u64 {
    number("OSTLER_ROUNDS", 3)
}

/// Whether this machine has memory control on cgroup v2 (else v1): the two word some things differently.
#[must_use]
pub fn is_cgroup_v2() -> bool {
    std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers")
        .is_ok_and(|controllers| controllers.split_whitespace().any(|name| name == "memory"))
}

/// Runs a program of this machine to its end and gives what it printed; it must succeed.
pub fn tool(program: &str, arguments: &[&str]) -> String {
    let run = std::process::Command::new(program).args(arguments).output();
    let run = run.unwrap_or_else(|error| panic!("{program}: {error}: run `make deps`"));
    let said = String::from_utf8_lossy(&run.stderr);
    assert!(
        run.status.success(),
        "{program} {arguments:?}: {}: {said}",
        run.status
    );
    String::from_utf8_lossy(&run.stdout).into_owned()
}

/// Says that a test is not held for want of something of the machine: on standard error, and in the file
/// `OSTLER_SKIPPED`, which `.ci/run` repeats at its end.
///
/// # Panics
/// That file cannot be written.
pub fn skip(why: &str) {
    eprintln!("skipped: {why}");
    if let Some(file) = std::env::var_os("OSTLER_SKIPPED") {
        let file = std::fs::File::options()
            .append(true)
            .create(true)
            .open(file);
        std::io::Write::write_all(&mut file.unwrap(), format!("skipped: {why}\n").as_bytes())
            .unwrap();
    }
}

fn number(variable: &str, otherwise: u64) -> u64 {
    match std::env::var(variable) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{variable}={text} is no number")),
        Err(_) => otherwise,
    }
}

/// The path that `variable` names, else `otherwise` below the root of the project.
pub fn path(variable: &str, otherwise: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("a workspace");
    std::env::var_os(variable).map_or_else(|| root.join(otherwise), PathBuf::from)
}

/// The directory of a stack for apps to run in, with Ruby.
fn stack() -> PathBuf {
    if let Some(stack) = std::env::var_os("OSTLER_STACK") {
        return stack.into();
    }
    let recipe = fixtures().join("stack/build.sh");
    let stack = PathBuf::from(tool(&recipe.to_string_lossy(), &["--where"]).trim());
    assert!(
        stack.is_dir(),
        "{} does not exist: run `make stack`",
        stack.display()
    );
    stack
}

/// The directory of sample apps and recipes.
#[must_use]
pub fn fixtures() -> PathBuf {
    path("OSTLER_FIXTURES", "fixtures")
}
