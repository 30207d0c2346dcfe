//! See `container::iomux_link`.

fn main() -> std::process::ExitCode {
    container::iomux_link::main()
}
