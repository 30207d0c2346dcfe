//! See `container::iomux_spawn`.

fn main() -> std::process::ExitCode {
    container::stamp::or(container::iomux_spawn::main)
}
