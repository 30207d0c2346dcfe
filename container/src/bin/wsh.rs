//! Runs a program in a container: see `container::wsh`.

use std::process::ExitCode;

fn main() -> ExitCode {
    container::stamp::or(container::wsh::main)
}
