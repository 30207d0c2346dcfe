//! What is done with foreign bytes, by a fuzzer and by the replay of what is kept in `fixtures/fuzz`: the parser must
//! come back without a panic, and what it has understood must hold.
//!
//! One function per kind of bytes. A new one gets a name in [`TARGETS`], seeds in `fixtures/fuzz/<name>/`, a program in
//! `fuzz_targets/`, and a `[[bin]]`; the tests say what is missing.

mod disk;
mod messages;
mod seeds;
mod trees;

pub use seeds::seeds;

/// What takes foreign bytes of one kind. It panics at a fault.
pub type Target = fn(&[u8]);

/// Every kind of foreign bytes, and what takes it.
pub const TARGETS: [(&str, Target); 13] = [
    ("message", messages::message),
    ("subject", messages::subject),
    ("trace", messages::trace),
    ("environment", messages::environment),
    ("stager", messages::stager),
    ("users", messages::users),
    ("http", messages::http),
    ("droplet", trees::droplet),
    ("copy", trees::copy),
    ("frames", disk::frames),
    ("requests", disk::requests),
    ("records", disk::records),
    ("spool", disk::spool),
];

/// Runs the target of this name.
///
/// # Panics
/// If there is none, or if it finds a fault.
pub fn run(target: &str, bytes: &[u8]) {
    let found = TARGETS.iter().find(|(name, _)| *name == target);
    assert!(found.is_some(), "no target is called {target}");
    if let Some((_, take)) = found {
        take(bytes);
    }
}
