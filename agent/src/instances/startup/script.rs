//! The `startup` script: the last process of ours above the app.
//!
//! ```text
//! bash          JOB: waits for startup
//! └─ startup    this script, under its own name because it is executed as a file
//!    └─ the app
//! ```
//!
//! Both shells hold a handler for TERM, INT and QUIT while they wait (a handler and not "ignore", which
//! the app would inherit), so a signal sent once to every process ends the app, and its status comes
//! through both. They wait for a child in the foreground: bash puts a trapped signal off until such a
//! child has ended, whereas `wait` would return early, and `&` would make the app ignore INT and QUIT.
//! A signal that comes between the trap and the child is remembered by the handler, and no child starts.
//! One flaw is bash's own (5.2 and before): an INT, and only an INT, within the microsecond in which it
//! begins to wait makes it signal itself for ever. Stops are TERM, so nothing of ours runs into it.

use super::StartCommand;

/// Where the script belongs, relative to the container's root; mode 0755.
pub const PATH: &str = "home/vcap/startup";

/// The job: argv of the process that `wshd` starts as vcap in `/home/vcap`. Right for every droplet: no
/// variable is used, for each name may be one of the app's own.
pub const JOB: [&str; 3] = [
    "/bin/bash",
    "-c",
    "trap 'set -- 143' TERM INT QUIT; umask 077; [ $1 ] && exit $1; ./startup; exit $?",
];

/// The text of the script, or `None` for a droplet that brings its own. `post_setup` is shell text of the
/// host's operator, for the app's environment.
///
/// It expects `/home/vcap` as its working directory and the environment as it shall be. What happens
/// before the app starts is not guarded against TERM: a stop ends it at once, before there is an app.
pub fn startup(start: &StartCommand, post_setup: Option<&str>) -> Option<String> {
    let StartCommand::Command(command) = start else {
        return None;
    };
    let command = quote(command);
    let post_setup = post_setup.unwrap_or_default();
    Some(format!(
        r#"#!/bin/bash
umask 077
unset GEM_PATH
ostler_home=$PWD

# What buildpacks left for the app's environment.
for ostler_script in "$ostler_home"/app/.profile.d/*.sh; do
  if [ -r "$ostler_script" ]; then
    . "$ostler_script"
  fi
done
{post_setup}
export DROPLET_BASE_DIR=$ostler_home
unset ostler_home ostler_script
cd "$DROPLET_BASE_DIR/app" || exit

set --
trap 'set -- 143' TERM INT QUIT
# Without this, bash would write how the app ended among the app's own errors.
exec {{ostler_err}}>&2 2>/dev/null
# A stop that came in the instant before there is an app.
[ $# = 0 ] || exit "$1"
(
  exec 2>&$ostler_err {{ostler_err}}>&-
  echo "$BASHPID" >> "$DROPLET_BASE_DIR/run.pid"
  exec /bin/bash -c {command}
)
exit $?
"#
    ))
}

/// `text` as one word of the shell. A NUL has no spelling there and is dropped.
fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\0', "").replace('\'', r"'\''"))
}

#[cfg(test)]
#[path = "script_tests.rs"]
mod tests;
