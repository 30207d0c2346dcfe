//! The kernel's network settings, in `/proc/sys/net` of the calling thread's network namespace.

use super::NetworkError;
use std::fs;
use std::io;
use std::path::PathBuf;

/// A setting, e.g. `ipv4/ip_forward`, without the white space around its value.
pub(super) fn read(name: &str) -> Result<String, NetworkError> {
    let path = path(name);
    match fs::read_to_string(&path) {
        Ok(value) => Ok(value.trim().to_owned()),
        Err(source) => Err(NetworkError::Sysctl { path, source }),
    }
}

/// Gives a setting its value; tells whether it had another. One that has it already is not written:
/// `/proc/sys` may be read-only in a container that was set up beforehand.
pub(super) fn write(name: &str, value: &str) -> Result<bool, NetworkError> {
    if read(name)? == value {
        return Ok(false);
    }
    let path = path(name);
    match fs::write(&path, value) {
        Ok(()) => Ok(true),
        Err(source) => Err(NetworkError::Sysctl { path, source }),
    }
}

/// As [`write`], where the kernel may lack the setting because it lacks what would be set.
pub(super) fn write_if_there(name: &str, value: &str) -> Result<bool, NetworkError> {
    match write(name, value) {
        Err(NetworkError::Sysctl { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            Ok(false)
        }
        other => other,
    }
}

fn path(name: &str) -> PathBuf {
    PathBuf::from("/proc/sys/net").join(name)
}
