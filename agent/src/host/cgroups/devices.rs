//! Which devices a container may use: by v1's files, or by a filter on its v2 group.

use super::layout::{Layout, Version};
use super::limits::io_error;
use super::{CgroupError, Group};
use cgroups_rs::devices::{DevicePermissions, DeviceType, DevicesController};
use container::sys::bpf;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

/// null, zero, full, random, urandom, tty, ptmx and every pseudo-terminal: character devices that may be
/// read and written. None may be made.
const DEVICES: [bpf::Device; 8] = [
    (1, Some(3)),
    (1, Some(5)),
    (1, Some(7)),
    (1, Some(8)),
    (1, Some(9)),
    (5, Some(0)),
    (5, Some(2)),
    (136, None),
];

/// What confines a group to [`DEVICES`].
#[derive(Debug, Clone)]
pub(super) enum Confinement {
    /// v1: the group's own files.
    Files,
    /// v2: this program of the kernel's, loaded once for all groups.
    Filter(Arc<OwnedFd>),
}

impl Confinement {
    /// Loads the filter where one is needed.
    ///
    /// # Errors
    /// [`CgroupError::Refused`]: then no container may be made.
    pub(super) fn open(layout: &Layout) -> Result<Self, CgroupError> {
        match layout.devices.version {
            Version::V1 => Ok(Self::Files),
            Version::V2 => {
                let filter = bpf::device_filter(&DEVICES).map_err(|error| {
                    let act = "load a device filter (CONFIG_CGROUP_BPF, CAP_SYS_ADMIN) for";
                    CgroupError::refused(act, &layout.devices.mount)(error.errno.into())
                })?;
                Ok(Self::Filter(Arc::new(filter)))
            }
        }
    }

    /// Confines a group that has no process yet.
    ///
    /// # Errors
    /// [`CgroupError::Refused`]: it is not, or not wholly, confined.
    pub(super) fn apply(&self, group: &Group) -> Result<(), CgroupError> {
        let directory = group.directory(&group.layout.devices);
        let confined = match self {
            Self::Files => list(&directory),
            Self::Filter(filter) => File::open(&directory).and_then(|group| {
                bpf::attach_device_filter(group, filter.as_ref()).map_err(|e| e.errno.into())
            }),
        };
        confined.map_err(CgroupError::refused("confine devices in", &directory))
    }
}

/// v1: takes everything away and gives [`DEVICES`].
fn list(directory: &Path) -> io::Result<()> {
    const USE: [DevicePermissions; 2] = [DevicePermissions::Read, DevicePermissions::Write];
    let devices = DevicesController::new(directory.to_owned());
    devices
        .deny_device(DeviceType::All, -1, -1, &DevicePermissions::all())
        .map_err(io_error)?;
    for (major, minor) in DEVICES {
        // -1: all of them.
        let minor = minor.map_or(-1, i64::from);
        devices
            .allow_device(DeviceType::Char, major.into(), minor, &USE)
            .map_err(io_error)?;
    }
    Ok(())
}
