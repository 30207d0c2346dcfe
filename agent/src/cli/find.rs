//! Which container a person means. Read from what an agent keeps; nothing is changed or created.

use crate::host::depot;
use container::client::Client;
use nix::errno::Errno;
use serde_json::Value;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Why there is no target. The text shows what there is to choose from.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(super) enum Unfound {
    #[error("no container is \"{wanted}\"; {there}")]
    Nobody { wanted: String, there: String },
    #[error("more than one container is \"{wanted}\"; {there}")]
    Many { wanted: String, there: String },
    #[error("container {handle} does not answer: {why}; {there}")]
    Dead {
        handle: String,
        why: String,
        there: String,
    },
}

/// What is known of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Known {
    handle: String,
    /// From its record, where that can be read.
    droplet: String,
    index: String,
    state: String,
    /// It has a socket; what has crashed is known for a while, and has none.
    made: bool,
}

/// The socket of the container below `base` that `wanted` names. It answers.
pub(super) fn socket(base: &Path, wanted: &str) -> Result<PathBuf, Unfound> {
    let known = known(base);
    let handle = choose(wanted, &known)?.handle.clone();
    let socket = socket_of(base, &handle);
    match Client::connect(&socket) {
        Ok(_) => Ok(socket),
        Err(error) => Err(Unfound::Dead {
            handle,
            why: if error.errno == Errno::ENOENT {
                "it is not made yet, or gone already".to_owned()
            } else {
                error.to_string()
            },
            there: table(&known),
        }),
    }
}

fn socket_of(base: &Path, handle: &str) -> PathBuf {
    base.join("containers").join(handle).join("run/wshd.sock")
}

/// All that have a directory or a record, by handle.
fn known(base: &Path) -> Vec<Known> {
    let names = |directory: &str| {
        let entries = std::fs::read_dir(base.join(directory))
            .into_iter()
            .flatten();
        entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok())
    };
    let mut handles: Vec<String> = names("containers").chain(names("instances")).collect();
    handles.retain(|name| depot::is_handle(name));
    handles.sort();
    handles.dedup();
    let known = |handle: String| {
        let path = base.join("instances").join(&handle).join("record.json");
        let record: Value = std::fs::read(path)
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default();
        let word = |pointer: &str| match record.pointer(pointer) {
            Some(Value::String(text)) => text.clone(),
            Some(Value::Number(number)) => number.to_string(),
            _ => "-".to_owned(),
        };
        Known {
            droplet: word("/start/droplet"),
            index: word("/start/index"),
            state: word("/state"),
            made: socket_of(base, &handle).exists(),
            handle,
        }
    };
    handles.into_iter().map(known).collect()
}

/// A whole handle, else an app, else the beginning of a handle; of several, those that are made.
fn choose<'a>(wanted: &str, known: &'a [Known]) -> Result<&'a Known, Unfound> {
    let app =
        |one: &&Known| one.droplet == wanted || wanted == format!("{}/{}", one.droplet, one.index);
    let ways: [&dyn Fn(&&Known) -> bool; 3] = [&|one| one.handle == wanted, &app, &|one| {
        !wanted.is_empty() && one.handle.starts_with(wanted)
    }];
    for way in ways {
        let mut found: Vec<&Known> = known.iter().filter(way).collect();
        if found.iter().any(|one| one.made) {
            found.retain(|one| one.made);
        }
        match found[..] {
            [] => {}
            [one] => return Ok(one),
            _ => {
                let (wanted, many) = (wanted.to_owned(), found.into_iter().cloned());
                let there = table(&many.collect::<Vec<_>>());
                return Err(Unfound::Many { wanted, there });
            }
        }
    }
    Err(Unfound::Nobody {
        wanted: wanted.to_owned(),
        there: table(known),
    })
}

/// Most lines of a table for a person.
const MOST: usize = 40;

fn table(known: &[Known]) -> String {
    if known.is_empty() {
        return "there is none below this base directory".to_owned();
    }
    let mut text = "there are:\n  HANDLE       STATE     DROPLET/INDEX".to_owned();
    for one in known.iter().take(MOST) {
        let Known {
            handle,
            droplet,
            index,
            state,
            ..
        } = one;
        // Writing to a string does not fail.
        let _ = write!(text, "\n  {handle:<12} {state:<9} {droplet}/{index}");
    }
    if known.len() > MOST {
        let _ = write!(text, "\n  … and {} more", known.len() - MOST);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{Known, Unfound, choose, socket};

    fn known(handle: &str, droplet: &str, index: u32) -> Known {
        Known {
            handle: handle.to_owned(),
            droplet: droplet.to_owned(),
            index: index.to_string(),
            state: "RUNNING".to_owned(),
            made: true,
        }
    }

    #[test]
    fn what_has_crashed_is_not_meant_while_another_runs() {
        let crashed = |one: Known| Known { made: false, ..one };
        let (old, new) = (
            known("0a000000001", "app", 0),
            known("0a000000002", "app", 0),
        );
        let all = [crashed(old.clone()), new.clone()];
        assert_eq!(choose("app/0", &all).unwrap(), &new);
        assert_eq!(choose("0a", &all).unwrap(), &new);
        assert_eq!(choose("0a000000001", &all).unwrap(), &all[0]);
        let all = [old, new].map(crashed);
        assert!(matches!(choose("app/0", &all), Err(Unfound::Many { .. })));
    }

    #[test]
    fn a_container_is_named_by_handle_beginning_or_app() {
        let all = [
            known("0a000000001", "app", 0),
            known("0a000000002", "app", 1),
            known("1b000000003", "0a", 0),
            known("1c000000004", "1b000000003", 7),
        ];
        let found = |wanted: &str| choose(wanted, &all).map(|one| one.handle.as_str());
        assert_eq!(found("0a000000002"), Ok("0a000000002"));
        assert_eq!(found("1c"), Ok("1c000000004"));
        assert_eq!(found("app/1"), Ok("0a000000002"));
        assert_eq!(found("0a"), Ok("1b000000003"), "an app before a beginning");
        assert_eq!(
            found("1b000000003"),
            Ok("1b000000003"),
            "a handle before an app"
        );
        let many = found("app").unwrap_err().to_string();
        assert_eq!(
            many,
            "more than one container is \"app\"; there are:\n  HANDLE       STATE     DROPLET/INDEX\n  \
             0a000000001  RUNNING   app/0\n  0a000000002  RUNNING   app/1"
        );
        assert!(matches!(found("0a00"), Err(Unfound::Many { .. })));
        for nobody in ["", "app/2", "zz"] {
            let told = found(nobody).unwrap_err();
            assert!(matches!(told, Unfound::Nobody { .. }), "{told}");
            assert!(
                told.to_string()
                    .ends_with("1c000000004  RUNNING   1b000000003/7")
            );
        }
    }

    #[test]
    fn a_directory_without_containers_is_said_to_have_none() {
        let told = socket(std::path::Path::new("/nonexistent"), "x").unwrap_err();
        assert_eq!(
            told.to_string(),
            "no container is \"x\"; there is none below this base directory"
        );
    }
}
