//! Gives the program its version (`src/lib.rs`).

fn main() {
    println!("cargo::rerun-if-env-changed=OSTLER_COMMIT");
    let commit = std::env::var("OSTLER_COMMIT").unwrap_or_default();
    let plus = if commit.is_empty() { "" } else { "+" };
    println!(
        "cargo::rustc-env=OSTLER_VERSION={}{plus}{commit}",
        env!("CARGO_PKG_VERSION")
    );
}
