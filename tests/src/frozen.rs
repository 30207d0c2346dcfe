//! A disk that hangs: whoever writes to it waits in the kernel, and no signal ends that.

use std::path::PathBuf;

use crate::{Host, tool};

/// A frozen file system (`FIFREEZE` of ioctl_fs(2)). Thawed when this is dropped.
#[derive(Debug)]
pub struct Frozen {
    place: PathBuf,
    after: String,
}

impl Frozen {
    /// Gives a host's base directory a file system of its own: for `Setup::before`.
    pub const OWN_DISK: &[&str] = &[
        "sh",
        "-ec",
        "truncate -s 4G $0.img; mkfs.ext4 -q $0.img; mkdir $0; mount -o loop $0.img $0; chmod 700 $0",
        "{base}",
    ];

    /// The base directory, which has [`Frozen::OWN_DISK`].
    #[must_use]
    pub fn base(host: &Host) -> Self {
        Self::freeze(host.base.clone(), "")
    }

    /// The image that a container's disk is in, by a mount of its own beside the container's.
    #[must_use]
    pub fn image(host: &Host, handle: &str) -> Self {
        let loops = tool(
            "losetup",
            &["--list", "--noheadings", "--output", "NAME,BACK-FILE"],
        );
        let device = loops
            .lines()
            .find(|line| line.contains(handle))
            .expect(&loops);
        let place = host.base.parent().expect("a directory").join("frozen");
        std::fs::create_dir(&place).expect("not there yet");
        let text = place.display().to_string();
        tool("mount", &[device.split(' ').next().expect("a name"), &text]);
        Self::freeze(place, "umount \"$0\"")
    }

    fn freeze(place: PathBuf, after: &str) -> Self {
        let after = after.to_owned();
        let frozen = Self { place, after };
        tool(
            "fsfreeze",
            &["--freeze", &frozen.place.display().to_string()],
        );
        frozen
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let thaw = format!("fsfreeze --unfreeze \"$0\"; {}", self.after);
        tool("sh", &["-c", &thaw, &self.place.display().to_string()]);
    }
}
