//! See `container::iomux_link`.

fn main() -> std::process::ExitCode {
    container::stamp::or(container::iomux_link::main)
}
