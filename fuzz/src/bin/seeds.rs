//! Writes the seeds of every target to files of a directory, which must not exist: `seeds DIRECTORY`.

use ostler_fuzz::{TARGETS, seeds};
use std::io::{Error, Result};
use std::path::Path;

fn main() -> Result<()> {
    let directory = std::env::args_os().nth(1);
    let directory = directory.ok_or_else(|| Error::other("usage: seeds DIRECTORY"))?;
    for (target, _) in TARGETS {
        let directory = Path::new(&directory).join(target);
        std::fs::create_dir_all(&directory)?;
        for (number, seed) in seeds(target)?.iter().enumerate() {
            std::fs::write(directory.join(number.to_string()), seed)?;
        }
    }
    Ok(())
}
