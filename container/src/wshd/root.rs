//! The container's root and the paths in it.

use super::launcher::account;
use super::measure::Measure;
use crate::fault::{Context, SysError};
use crate::launch::{Ids, Launch};
use crate::sys::mount::{cover_idmapped, place};
use crate::sys::process;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, open, openat, openat2};
use nix::mount::{MsFlags, mount};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{Gid, Uid, fchownat};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

const DIRECTORY: OFlag = OFlag::O_PATH
    .union(OFlag::O_DIRECTORY)
    .union(OFlag::O_CLOEXEC);

/// The container's root, as the host sees it.
pub(super) struct Root {
    pub(super) fd: OwnedFd,
    /// Whose what is made in it is.
    pub(super) ids: Ids,
}

/// Puts the file system of the writable layer in its place, if it has one of its own. It lives as long as
/// the overlay that uses it.
pub(super) fn place_disk(disk: Option<OwnedFd>, launch: &Launch) -> Result<(), SysError> {
    let (Some(disk), Some(path)) = (disk, launch.upper.parent()) else {
        return Ok(());
    };
    let directory = open(path, DIRECTORY, Mode::empty()).context("open", path.display())?;
    place(disk.as_fd(), directory.as_fd()).context("move_mount", path.display())
}

/// Mounts the overlay and opens its root.
///
/// The layers' owners are mapped to the container's ids, so that all containers share them unchanged. The
/// upper one has the container's own, as they are: it is nobody else's.
///
/// The layers are named by descriptor: their paths may hold `:` and `,`, may be long (mount(2) takes one
/// page of options), and do not show in the container's `/proc/mounts`.
pub(super) fn mount_overlay(launch: &Launch, users: &OwnedFd) -> Result<Root, SysError> {
    let directory =
        |path: &PathBuf| open(path, DIRECTORY, Mode::empty()).context("open", path.display());
    let mapped = |path: &PathBuf| {
        cover_idmapped(
            directory(path)?.as_fd(),
            users.as_fd(),
            &path.display().to_string(),
        )
    };
    let lowers = launch
        .lowers
        .iter()
        .map(mapped)
        .collect::<Result<Vec<_>, _>>()?;
    let (upper, work) = (directory(&launch.upper)?, directory(&launch.work)?);
    let lowers: Vec<String> = lowers.iter().map(by_descriptor).collect();
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        lowers.join(":"),
        by_descriptor(&upper),
        by_descriptor(&work)
    );
    let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    if !Measure::NoSetuid.holds() {
        flags.remove(MsFlags::MS_NOSUID);
    }
    if !Measure::NoDevices.holds() {
        flags.remove(MsFlags::MS_NODEV);
    }
    let overlay = |options: &str| {
        mount(
            Some("overlay"),
            &launch.root,
            Some("overlay"),
            flags,
            Some(options),
        )
    };
    // The overlay writes with its mounter's ids, and root's would take the blocks that are set aside for it.
    let overlay = |options: &str| {
        process::as_user(account(launch.ids), || {
            overlay(options).context(
                "mount",
                format_args!("overlay on {}", launch.root.display()),
            )
        })
    };
    // Nobody needs the changes after a crash of the host: no fsync reaches the disk (Linux 5.10).
    match overlay(&format!("{options},volatile")) {
        Err(SysError {
            errno: Errno::EINVAL,
            ..
        }) => overlay(&options),
        other => other,
    }?;
    Ok(Root {
        fd: directory(&launch.root)?,
        ids: launch.ids,
    })
}

impl Root {
    /// Gives what was just made to the container's root.
    pub(super) fn own(
        &self,
        directory: &OwnedFd,
        name: &(impl nix::NixPath + ?Sized),
    ) -> nix::Result<()> {
        let (uid, gid) = (Uid::from_raw(self.ids.first), Gid::from_raw(self.ids.first));
        fchownat(
            directory,
            name,
            Some(uid),
            Some(gid),
            AtFlags::AT_SYMLINK_NOFOLLOW,
        )
    }
}

/// The path of an open descriptor, as mount(2) takes it.
pub(super) fn by_descriptor(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// What to make of a path's last part if it is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Missing {
    /// `ENOENT`.
    Refuse,
    /// An empty directory.
    Directory,
    /// An empty file.
    File,
}

/// Whether symlinks of the root file system are followed (inside the root, always).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Symlinks {
    /// `ELOOP`.
    Refuse,
    /// Followed.
    Follow,
}

/// Opens (`O_PATH`) a path inside `root`. Nothing in the root file system can lead out of it:
/// `RESOLVE_IN_ROOT` takes `..` and absolute links as the container would (openat2(2), Linux 5.6).
/// Missing directories on the way are made, and are the container's root's.
pub(super) fn resolve(
    root: &Root,
    path: &Path,
    missing: Missing,
    symlinks: Symlinks,
) -> Result<OwnedFd, SysError> {
    let relative = relative(path).context("openat2", path.display())?;
    let mut rules = ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    if !Measure::InsideRoot.holds() {
        rules = ResolveFlag::empty();
    }
    if symlinks == Symlinks::Refuse && Measure::NoSymlinks.holds() {
        rules |= ResolveFlag::RESOLVE_NO_SYMLINKS;
    }
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(rules);
    match openat2(&root.fd, &relative, how) {
        Err(Errno::ENOENT) if missing != Missing::Refuse => {}
        other => return other.context("openat2", path.display()),
    }
    let parent = match relative.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => {
            resolve(root, parent, Missing::Directory, symlinks)?
        }
        _ => root.fd.try_clone().context("dup", "root")?,
    };
    let name = relative
        .file_name()
        .ok_or(Errno::EINVAL)
        .context("openat2", path.display())?;
    if missing == Missing::File {
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC | OFlag::O_WRONLY;
        openat(&parent, name, flags, Mode::from_bits_truncate(0o644)).map(drop)
    } else {
        mkdirat(&parent, name, Mode::from_bits_truncate(0o755))
    }
    .context("create", path.display())?;
    root.own(&parent, name)
        .context("fchownat", path.display())?;
    openat2(&root.fd, &relative, how).context("openat2", path.display())
}

/// A path below the root; `..` and the root itself are refused.
fn relative(path: &Path) -> nix::Result<PathBuf> {
    let mut relative = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => relative.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => return Err(Errno::EINVAL),
        }
    }
    if relative.as_os_str().is_empty() {
        Err(Errno::EINVAL)
    } else {
        Ok(relative)
    }
}

#[cfg(test)]
mod tests {
    use super::{DIRECTORY, Ids, Missing, Root, Symlinks, resolve};
    use nix::errno::Errno;
    use nix::fcntl::open;
    use nix::sys::stat::Mode;
    use std::os::unix::fs::{MetadataExt, symlink};
    use std::path::{Path, PathBuf};

    struct Place(PathBuf);

    impl Drop for Place {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn no_symlink_leads_out_and_missing_parts_are_made_inside() {
        let base = std::env::temp_dir().join(format!("ostler-root-{}", std::process::id()));
        let place = Place(base);
        let inner = place.0.join("inner");
        std::fs::create_dir_all(inner.join("etc")).unwrap();
        std::fs::create_dir(place.0.join("outside")).unwrap();
        symlink("/outside", inner.join("absolute")).unwrap();
        symlink("../../../outside", inner.join("up")).unwrap();
        symlink("/etc", inner.join("fine")).unwrap();
        let root = Root {
            fd: open(&inner, DIRECTORY, Mode::empty()).unwrap(),
            ids: Ids { first: 1 << 30 },
        };
        let at = |path: &str, missing, symlinks| resolve(&root, Path::new(path), missing, symlinks);

        at("/a/b/c", Missing::Directory, Symlinks::Refuse).unwrap();
        assert!(inner.join("a/b/c").is_dir());
        assert_eq!(std::fs::metadata(inner.join("a/b")).unwrap().uid(), 1 << 30);
        at("fine/x/file", Missing::File, Symlinks::Follow).unwrap();
        assert!(inner.join("etc/x/file").is_file());
        // Inside, /outside does not exist; the dangling link is not replaced.
        for link in ["absolute/file", "up/file"] {
            assert!(at(link, Missing::File, Symlinks::Follow).is_err());
        }
        assert!(
            std::fs::read_dir(place.0.join("outside"))
                .unwrap()
                .next()
                .is_none()
        );
        let errno = |answer: Result<_, crate::fault::SysError>| answer.unwrap_err().errno;
        assert_eq!(
            errno(at("fine", Missing::Refuse, Symlinks::Refuse)),
            Errno::ELOOP
        );
        assert_eq!(
            errno(at("nothing", Missing::Refuse, Symlinks::Follow)),
            Errno::ENOENT
        );
        for path in ["/", "", "a/../..", ".."] {
            assert_eq!(
                errno(at(path, Missing::Directory, Symlinks::Follow)),
                Errno::EINVAL
            );
        }
    }
}
