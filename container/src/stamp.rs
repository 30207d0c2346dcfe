//! What a program was made of. Agent and helpers agree on all that is in this library, so an agent works only with helpers that
//! were built from the same sources. (Those of an older one that run already go on: what they say has numbers of its own.)

use std::process::ExitCode;

/// Stands in every program that this library is in, and is said at `--version`.
pub const STAMP: &str = concat!(
    "ostler ",
    env!("CARGO_PKG_VERSION"),
    ", helpers of ",
    env!("OSTLER_STAMP")
);

/// A helper: says its stamp if nothing but that is asked for, else does its work.
#[must_use]
pub fn or(main: fn() -> ExitCode) -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().is_some_and(|first| first == "--version") && arguments.next().is_none() {
        println!("{STAMP}");
        return ExitCode::SUCCESS;
    }
    main()
}

/// Whether a program, given whole, has this stamp.
#[must_use]
pub fn is_in(program: &[u8]) -> bool {
    String::from_utf8_lossy(program).contains(STAMP)
}
