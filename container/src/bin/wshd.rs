//! The init of a container: see `container::wshd`.

use std::process::ExitCode;

fn main() -> ExitCode {
    container::stamp::or(container::wshd::main)
}
