//! See `container::oom`.

fn main() -> std::process::ExitCode {
    container::stamp::or(container::oom::main)
}
