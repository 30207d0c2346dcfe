//! The container's users, read by hand from its `/etc/passwd` and `/etc/group`.
//!
//! Nothing is asked through the C library: it would load the tenant's name service modules into this
//! process. The files are the tenant's, so they are read with a bound and without waiting.

use super::measure::Measure;
use crate::launch::Ids;
use nix::errno::Errno;
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;

/// Most bytes of either file.
const MAX_FILE: u64 = 1 << 20;

/// Who a job runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct User {
    pub(super) name: Vec<u8>,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// All groups, `gid` first.
    pub(super) groups: Vec<u32>,
    pub(super) home: Vec<u8>,
    pub(super) shell: Vec<u8>,
}

/// Finds a user of the container by name or number; an empty name is root. A number, and root, need no
/// line in `/etc/passwd`.
pub(super) fn find(user: &[u8]) -> Result<User, Errno> {
    let passwd = read("/etc/passwd").or_else(missing_is_empty)?;
    let group = read("/etc/group").or_else(missing_is_empty)?;
    let user = if user.is_empty() { b"root" } else { user };
    let mut user = parse(user, &passwd, &group).ok_or(Errno::ENOENT)?;
    // A container has so many.
    let has = |id: u32| id < Ids::COUNT;
    user.groups.retain(|group| has(*group));
    if has(user.uid) && has(user.gid) {
        Ok(user)
    } else {
        Err(Errno::EOVERFLOW)
    }
}

fn missing_is_empty(errno: Errno) -> Result<Vec<u8>, Errno> {
    if errno == Errno::ENOENT {
        Ok(Vec::new())
    } else {
        Err(errno)
    }
}

fn read(path: &str) -> Result<Vec<u8>, Errno> {
    let errno = |error: std::io::Error| Errno::from_raw(error.raw_os_error().unwrap_or(0));
    // A fifo or a device in its place must not block the container's init.
    let plain = Measure::PlainFiles.holds();
    let patience = if plain { nix::libc::O_NONBLOCK } else { 0 };
    let flags = patience | nix::libc::O_NOCTTY;
    let file: File = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)
        .map_err(errno)?;
    if plain && !file.metadata().map_err(errno)?.is_file() {
        return Err(Errno::EINVAL);
    }
    let mut bytes = Vec::new();
    let most = if plain { MAX_FILE } else { MAX_FILE << 5 };
    file.take(most + 1).read_to_end(&mut bytes).map_err(errno)?;
    if u64::try_from(bytes.len()).is_ok_and(|length| length <= most) {
        Ok(bytes)
    } else {
        Err(Errno::EFBIG)
    }
}

fn parse(user: &[u8], passwd: &[u8], group: &[u8]) -> Option<User> {
    let wanted = number(user);
    let listed = passwd.split(|byte| *byte == b'\n').find_map(|line| {
        let mut fields = line.split(|byte| *byte == b':');
        let name = fields.next()?;
        let uid = fields.nth(1).and_then(number)?;
        let gid = fields.next().and_then(number)?;
        let home = fields.nth(1)?;
        let shell = fields.next().unwrap_or_default();
        let (found, or) = (
            |field: &[u8]| field.to_vec(),
            |field: &[u8], other: &[u8]| {
                if field.is_empty() {
                    other.to_vec()
                } else {
                    field.to_vec()
                }
            },
        );
        (name == user || wanted == Some(uid)).then(|| User {
            name: found(name),
            uid,
            gid,
            groups: Vec::new(),
            home: or(home, b"/"),
            shell: or(shell, b"/bin/sh"),
        })
    });
    let unlisted = || {
        let uid = if user == b"root" { Some(0) } else { wanted };
        uid.map(|uid| User {
            name: user.to_vec(),
            uid,
            gid: uid,
            groups: Vec::new(),
            home: b"/".to_vec(),
            shell: b"/bin/sh".to_vec(),
        })
    };
    let mut user = listed.or_else(unlisted)?;
    user.groups = groups(&user, group);
    Some(user)
}

fn groups(user: &User, group: &[u8]) -> Vec<u32> {
    let mut groups = vec![user.gid];
    for line in group.split(|byte| *byte == b'\n') {
        let mut fields = line.split(|byte| *byte == b':').skip(2);
        let (Some(gid), Some(members)) = (fields.next().and_then(number), fields.next()) else {
            continue;
        };
        let member = members
            .split(|byte| *byte == b',')
            .any(|member| member == user.name);
        if member && !groups.contains(&gid) {
            groups.push(gid);
        }
    }
    groups
}

/// A decimal number of 32 bits, digits only. The highest one is no id: it means "leave it" to setresuid.
fn number(text: &[u8]) -> Option<u32> {
    if !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text)
        .ok()?
        .parse()
        .ok()
        .filter(|id| *id != u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::{User, parse, read};
    use nix::errno::Errno;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/bash\n\nbroken\nhalf:x:7\n\
        vcap:x:2000:2000::/home/vcap:\nbig:x:4000000000:100:,:,:::/bin/zsh\nnone:x:4294967295:1::/:/\n";
    const GROUP: &[u8] =
        b"root:x:0:\nweb:x:33:www,vcap\nbad:x:y:vcap\nvcap:x:2000:vcap\nlog:x:44:vcap";

    fn find(user: &str) -> Option<User> {
        parse(user.as_bytes(), PASSWD, GROUP)
    }

    #[test]
    fn a_user_is_found_by_name_and_by_number() {
        let vcap = find("vcap").unwrap();
        assert_eq!(
            (vcap.uid, vcap.gid, &vcap.groups[..]),
            (2000, 2000, &[2000, 33, 44][..])
        );
        assert_eq!(
            (&vcap.home[..], &vcap.shell[..]),
            (&b"/home/vcap"[..], &b"/bin/sh"[..])
        );
        assert_eq!(find("2000"), Some(vcap));
        assert_eq!(find("root").unwrap().shell, b"/bin/bash");
        assert_eq!(find("big").unwrap().uid, 4_000_000_000, "ids have 32 bits");
    }

    #[test]
    fn only_root_and_numbers_need_no_line() {
        let stranger = find("12345").unwrap();
        assert_eq!(
            (stranger.uid, stranger.gid, &stranger.groups[..]),
            (12345, 12345, &[12345][..])
        );
        assert_eq!(parse(b"root", b"", b"").unwrap().uid, 0);
        for user in [
            "nobody",
            "half",
            "broken",
            "none",
            "+1",
            "-1",
            "4294967295",
            "99999999999",
        ] {
            assert_eq!(find(user), None, "{user}");
        }
    }

    #[test]
    fn files_that_are_none_are_refused() {
        assert_eq!(read("/dev/zero"), Err(Errno::EINVAL));
        assert_eq!(read("/"), Err(Errno::EINVAL));
        assert_eq!(read("/nonexistent"), Err(Errno::ENOENT));
    }
}
