//! What an instance starts with: its environment, its script, its user.

pub mod environment;
pub mod passwd;
pub mod script;

use super::droplets::StagingInfo;

/// What starts the app.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StartCommand {
    /// A line for `bash -c`, run in `/home/vcap/app`.
    Command(String),
    /// A droplet from before `staging_info.yml`: it brings `/home/vcap/startup` itself.
    OwnStartup,
}

/// Neither the start message nor the droplet says what to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("missing start command")]
pub struct MissingStartCommand;

/// Decides what to run: the message's command, else the stager's. A droplet without staging information
/// runs its own script, whatever the message says. A blank command counts as none.
///
/// # Errors
/// [`MissingStartCommand`], whose text is the `exit_description` that callers of the DEA know.
pub fn start_command(
    message: Option<&str>,
    staging: Option<&StagingInfo>,
) -> Result<StartCommand, MissingStartCommand> {
    let Some(staging) = staging else {
        return Ok(StartCommand::OwnStartup);
    };
    let given = |command: &&str| !command.trim().is_empty();
    let staged = staging.start_command.as_deref();
    let command = message
        .filter(given)
        .or(staged.filter(given))
        .ok_or(MissingStartCommand)?;
    Ok(StartCommand::Command(command.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_wins_over_the_stager() {
        let staged = |command: Option<&str>| StagingInfo {
            start_command: command.map(str::to_owned),
            detected_buildpack: None,
        };
        let run = |command: &str| Ok(StartCommand::Command(command.to_owned()));
        assert_eq!(start_command(Some("a"), Some(&staged(Some("b")))), run("a"));
        assert_eq!(start_command(None, Some(&staged(Some("b")))), run("b"));
        assert_eq!(start_command(Some(" "), Some(&staged(Some("b")))), run("b"));
        assert_eq!(start_command(Some("a"), Some(&staged(None))), run("a"));
        assert_eq!(
            start_command(None, Some(&staged(None))),
            Err(MissingStartCommand)
        );
        assert_eq!(
            start_command(None, Some(&staged(Some("")))),
            Err(MissingStartCommand)
        );
        assert_eq!(start_command(Some("a"), None), Ok(StartCommand::OwnStartup));
        assert_eq!(MissingStartCommand.to_string(), "missing start command");
    }
}
