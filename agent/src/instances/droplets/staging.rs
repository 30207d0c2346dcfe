//! What the stager wrote into a droplet about how to run it.

use std::path::Path;

use super::error::DropletError;
use super::tree::{Symlinks, read_text};
use super::yaml;

/// `staging_info.yml` of a droplet, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StagingInfo {
    /// What to run if the start message does not say.
    pub start_command: Option<String>,
    /// The buildpack that staged it, for people.
    pub detected_buildpack: Option<String>,
}

/// Reads `home/vcap/staging_info.yml` of an unpacked droplet. Blocks. `None` if there is none, as in very
/// old droplets.
///
/// # Errors
/// [`DropletError::Text`] if it is no regular file, larger than 1 MiB, no UTF-8, or not understood.
pub fn staging_info(layer: &Path) -> Result<Option<StagingInfo>, DropletError> {
    const FILE: &str = "home/vcap/staging_info.yml";
    let Some(text) = text_file(layer, FILE)? else {
        return Ok(None);
    };
    Ok(Some(StagingInfo {
        start_command: value(FILE, &text, "start_command")?,
        detected_buildpack: value(FILE, &text, "detected_buildpack")?,
    }))
}

/// The `state_file` that `home/vcap/droplet.yaml` names: a path relative to `/home/vcap` in the container,
/// to be opened there without trusting it. Blocks. `None` if there is no such file or key.
///
/// # Errors
/// As [`staging_info`].
pub fn state_file(layer: &Path) -> Result<Option<String>, DropletError> {
    const FILE: &str = "home/vcap/droplet.yaml";
    let Some(text) = text_file(layer, FILE)? else {
        return Ok(None);
    };
    value(FILE, &text, "state_file")
}

fn text_file(layer: &Path, file: &'static str) -> Result<Option<String>, DropletError> {
    let unreadable = |why: String| DropletError::Text { file, why };
    let bytes =
        read_text(layer, file, Symlinks::Refused).map_err(|error| unreadable(error.to_string()))?;
    let Some(bytes) = bytes else { return Ok(None) };
    String::from_utf8(bytes)
        .map(Some)
        .map_err(|_| unreadable("it is no UTF-8".to_owned()))
}

fn value(file: &'static str, text: &str, key: &str) -> Result<Option<String>, DropletError> {
    yaml::text(text, key).map_err(|why| DropletError::Text {
        file,
        why: format!("{key}: {why}"),
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::super::tests::Scratch;
    use super::*;

    #[test]
    fn reads_what_a_stager_wrote() {
        let scratch = Scratch::new();
        let vcap = scratch.path().join("home/vcap");
        fs::create_dir_all(&vcap).unwrap();
        assert_eq!(staging_info(scratch.path()).unwrap(), None);
        assert_eq!(state_file(scratch.path()).unwrap(), None);
        let text = "---\ndetected_buildpack: Ruby\nstart_command: ! 'rackup -p $PORT'\n";
        fs::write(vcap.join("staging_info.yml"), text).unwrap();
        fs::write(
            vcap.join("droplet.yaml"),
            "---\nraw: true\nstate_file: tmp/state\n",
        )
        .unwrap();
        let info = staging_info(scratch.path()).unwrap().unwrap();
        assert_eq!(info.start_command.as_deref(), Some("rackup -p $PORT"));
        assert_eq!(info.detected_buildpack.as_deref(), Some("Ruby"));
        assert_eq!(
            state_file(scratch.path()).unwrap().as_deref(),
            Some("tmp/state")
        );
    }

    #[test]
    fn reads_nothing_but_a_small_regular_file() {
        let scratch = Scratch::new();
        let vcap = scratch.path().join("home/vcap");
        let file = vcap.join("staging_info.yml");
        let complaint = || staging_info(scratch.path()).unwrap_err().to_string();
        fs::create_dir_all(&vcap).unwrap();
        symlink("/etc/passwd", &file).unwrap();
        assert!(complaint().contains("symlink"), "{}", complaint());
        fs::remove_file(&file).unwrap();
        nix::unistd::mkfifo(&file, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(complaint().contains("no regular file"), "{}", complaint());
        fs::remove_file(&file).unwrap();
        fs::write(&file, vec![b'#'; 1024 * 1024 + 1]).unwrap();
        assert!(complaint().contains("larger than 1 MiB"), "{}", complaint());
        fs::write(&file, [0xff]).unwrap();
        assert!(complaint().contains("UTF-8"), "{}", complaint());
        fs::write(&file, "start_command: [a]\n").unwrap();
        assert!(complaint().contains("start_command"), "{}", complaint());
        fs::remove_file(&file).unwrap();
        fs::rename(&vcap, scratch.path().join("elsewhere")).unwrap();
        symlink("../elsewhere", &vcap).unwrap();
        fs::write(scratch.path().join("elsewhere/staging_info.yml"), "a: b\n").unwrap();
        assert!(complaint().contains("symlink"), "{}", complaint());
    }
}
