//! Removing trees that a tenant has made.
//!
//! Depth is the tenant's choice, so nothing here recurses or holds a descriptor for each level: a
//! directory's subdirectories are moved up into the trash, and the flat rest is removed.

use container::launch::Ids;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use std::fs;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// Numbers for names in a trash directory; an earlier agent's are skipped when they are met.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// Moves a directory into `trash` under a name of its own, `<number>.<first id of its files>`.
pub(super) fn move_into(trash: &Path, from: &Path, ids: Ids) -> nix::Result<()> {
    loop {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let to = trash.join(format!("{number}.{}", ids.first));
        match renameat2(AT_FDCWD, from, AT_FDCWD, &to, RenameFlags::RENAME_NOREPLACE) {
            Err(Errno::EEXIST) => {}
            other => return other,
        }
    }
}

/// Whose files are below a name in the trash.
pub(super) fn ids_of(name: &str) -> Option<Ids> {
    let (_, first) = name.split_once('.')?;
    first.parse().ok().map(|first| Ids { first })
}

/// Removes everything in `trash`. Goes on after a failure and gives back the first one.
pub(super) fn empty(trash: &Path) -> io::Result<()> {
    let mut first = Ok(());
    loop {
        let (mut before, mut failed) = (0, 0);
        for entry in fs::read_dir(trash)? {
            before += 1;
            // Another emptying may be faster at any point.
            if let Err(error) = gone(entry.and_then(|entry| remove(trash, &entry))) {
                failed += 1;
                first = first.and(Err(error));
            }
        }
        // What was moved up during this pass may not have been listed by it.
        if before == failed {
            return first;
        }
    }
}

fn remove(trash: &Path, entry: &fs::DirEntry) -> io::Result<()> {
    let path = entry.path();
    if !entry.file_type()?.is_dir() {
        return fs::remove_file(&path);
    }
    let ids = entry
        .file_name()
        .to_str()
        .and_then(ids_of)
        .unwrap_or_default();
    for child in fs::read_dir(&path)? {
        let child = child?;
        if child.file_type()?.is_dir() {
            gone(move_into(trash, &child.path(), ids).map_err(io::Error::from))?;
        } else {
            gone(fs::remove_file(child.path()))?;
        }
    }
    fs::remove_dir(&path)
}

/// Somebody else removing the same thing is as good.
fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
