//! See `container::iomux_spawn`.

fn main() -> std::process::ExitCode {
    container::iomux_spawn::main()
}
