//! See `container::oom`.

fn main() -> std::process::ExitCode {
    container::oom::main()
}
