//! The user of a stack, looked up in its `/etc/passwd` by hand: libc would look in the host's, or load
//! the stack's code.

use std::io;
use std::path::{Path, PathBuf};

use crate::instances::droplets::Owner;
use crate::instances::droplets::tree::{Symlinks, read_text};

/// Why a stack's user is not known.
#[derive(Debug, thiserror::Error)]
pub enum PasswdError {
    /// `etc/passwd` cannot be read.
    #[error("cannot read etc/passwd of the stack {stack:?}")]
    Unreadable {
        /// The stack's directory.
        stack: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It does not list the user.
    #[error(
        "the stack {stack:?} has no user {user:?} in etc/passwd: add it, or name another stack"
    )]
    Unknown {
        /// The stack's directory.
        stack: PathBuf,
        /// The name that was looked for.
        user: String,
    },
}

/// Looks `user`, a name or a number, up in `<stack>/etc/passwd`. Blocks. Symlinks to directories are
/// followed as if the stack were the root; the file itself must be a regular one of at most 1 MiB. A
/// number that is not listed is a user of its own with the group of the same number.
///
/// # Errors
/// If the file cannot be read, or does not list a user who is no number.
pub fn lookup(stack: &Path, user: &str) -> Result<Owner, PasswdError> {
    let bytes = read_text(stack, "etc/passwd", Symlinks::InsideTree).map_err(|source| {
        PasswdError::Unreadable {
            stack: stack.to_owned(),
            source,
        }
    })?;
    find(&bytes.unwrap_or_default(), user).ok_or_else(|| PasswdError::Unknown {
        stack: stack.to_owned(),
        user: user.to_owned(),
    })
}

pub(crate) fn find(passwd: &[u8], user: &str) -> Option<Owner> {
    let text = String::from_utf8_lossy(passwd);
    let listed = |wanted: &dyn Fn(&str, u32) -> bool| {
        let mut entries = text.lines().filter_map(entry);
        entries
            .find(|(name, owner)| wanted(name, owner.uid))
            .map(|(_, owner)| owner)
    };
    // A name may consist of digits, and a name comes first.
    listed(&|name, _| name == user).or_else(|| {
        let number = id(user)?;
        listed(&|_, uid| uid == number).or(Some(Owner {
            uid: number,
            gid: number,
        }))
    })
}

/// `name:password:uid:gid:…`
fn entry(line: &str) -> Option<(&str, Owner)> {
    let mut fields = line.split(':');
    let (name, _password) = (fields.next()?, fields.next()?);
    let owner = Owner {
        uid: id(fields.next()?)?,
        gid: id(fields.next()?)?,
    };
    (!name.is_empty()).then_some((name, owner))
}

/// Digits only. The highest number means "leave it" to chown(2), and is nobody's.
fn id(text: &str) -> Option<u32> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse()
        .ok()
        .filter(|number| digits && *number != u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    const PASSWD: &[u8] =
        b"root:x:0:0:root:/root:/bin/bash\n# no entry\n::1:1::/:\nbad:x:-1:0::/:\n\
        vcap:x:2000:2001:caf\xff:/home/vcap:/bin/bash\n77:x:500:501::/:\nvcap:x:1:1::/:\n";

    #[test]
    fn finds_names_and_numbers() {
        let found = |user: &str| find(PASSWD, user).map(|owner| (owner.uid, owner.gid));
        assert_eq!(found("vcap"), Some((2000, 2001)));
        assert_eq!(found("2000"), Some((2000, 2001)));
        assert_eq!(found("root"), Some((0, 0)));
        assert_eq!(found("77"), Some((500, 501)));
        assert_eq!(found("4711"), Some((4711, 4711)));
        for nobody in [
            "",
            "bad",
            "nobody",
            "+5",
            "-1",
            "4294967295",
            "4294967296",
            "# no entry",
        ] {
            assert_eq!(found(nobody), None, "{nobody}");
        }
    }

    #[test]
    fn reads_inside_the_stack_only() {
        let stack = std::env::temp_dir().join(format!("ostler-passwd-{}", std::process::id()));
        fs::create_dir(&stack).unwrap();
        let complaint = || {
            let error = lookup(&stack, "vcap").unwrap_err();
            let source = std::error::Error::source(&error).map(ToString::to_string);
            format!("{error}: {}", source.unwrap_or_default())
        };
        let results = std::panic::catch_unwind(|| {
            let absent = complaint();
            // An absolute link is one inside the stack: this is not the host's etc.
            symlink("/real", stack.join("etc")).unwrap();
            fs::create_dir(stack.join("real")).unwrap();
            fs::write(stack.join("real/passwd"), PASSWD).unwrap();
            let found = lookup(&stack, "vcap").unwrap();
            fs::remove_file(stack.join("real/passwd")).unwrap();
            symlink("/etc/passwd", stack.join("real/passwd")).unwrap();
            (absent, found, complaint())
        });
        fs::remove_dir_all(&stack).unwrap();
        let (absent, found, linked) = results.unwrap();
        assert!(absent.contains("no user \"vcap\""), "{absent}");
        assert_eq!(
            found,
            Owner {
                uid: 2000,
                gid: 2001
            }
        );
        assert!(linked.contains("symlink"), "{linked}");
    }
}
