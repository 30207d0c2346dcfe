//! The newest accepted start message of each app, for `scale`: in memory, and by and by on disk.
//!
//! One writer for all, so of two messages the later one stays; what came for an app while it wrote is
//! written once. Nobody waits for the disk but the answers that say so ([`Until::Kept`](super::waiting::Until)).

use crate::host::blocking;
use crate::host::scribe::UNANSWERED;
use crate::instances::instance::Change;
use crate::instances::record::{UNFINISHED, make_private, write_durably};
use serde_json::Value;
use std::collections::{HashMap, HashSet, VecDeque};
use std::error::Error;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tracing::warn;

/// Apps that are remembered, those that have instances here not counted.
const MOST: usize = 1000;

/// How long a message may take to get to the disk until nobody waits for that any more.
const PATIENCE: Duration = Duration::from_secs(2);

/// Messages that are looked at together.
const BATCH: usize = 1024;

/// See the module.
#[derive(Debug)]
pub(super) struct Templates {
    newest: HashMap<String, Value>,
    /// The apps, those first of which nothing was heard for longest.
    order: VecDeque<String>,
    /// The number that was given last.
    asked: u64,
    /// All up to this number are on disk.
    kept: u64,
    /// Nobody waits for those up to this number any more.
    waited: u64,
    /// Unbounded in type; each holds a start message that was accepted a moment ago.
    changes: mpsc::UnboundedSender<Written>,
}

/// What stands on the disk for an app from this number on; `None`: nothing.
#[derive(Debug)]
struct Written {
    number: u64,
    droplet: String,
    message: Option<Vec<u8>>,
}

impl Templates {
    /// What earlier lives of the agent kept in `<base>/templates`, and the writer, for the caller to run
    /// beside it. `told` hears what is on disk.
    pub(super) async fn open(
        base: &Path,
        told: mpsc::UnboundedSender<Change>,
    ) -> (Self, impl Future<Output = ()> + use<>) {
        let dir = base.join("templates");
        let from = dir.clone();
        let (newest, order) = blocking(move || load(&from)).await;
        let (changes, written) = mpsc::unbounded_channel();
        let templates = Self {
            newest,
            order,
            asked: 0,
            kept: 0,
            waited: 0,
            changes,
        };
        (templates, write(dir, written, told))
    }

    /// The newest of this app.
    pub(super) fn get(&self, droplet: &str) -> Option<&Value> {
        self.newest.get(droplet)
    }

    /// All of them.
    pub(super) fn all(&self) -> impl Iterator<Item = &Value> {
        self.newest.values()
    }

    /// Remembers the newest start message of an app, and forgets that of the app of which nothing was heard for longest
    /// and which is not `here`, where there are too many: they hold droplets on the disk. The number under which it will
    /// be kept.
    pub(super) fn keep(&mut self, droplet: &str, message: Value, here: &HashSet<&str>) -> u64 {
        let number = self.write(droplet, Some(message.to_string().into_bytes()));
        self.newest.insert(droplet.to_owned(), message);
        self.heard_of(droplet);
        if self.newest.len() > MOST + here.len() {
            let mut all = self.order.iter();
            let gone = all.position(|other| *other != droplet && !here.contains(other.as_str()));
            if let Some(gone) = gone.and_then(|gone| self.order.remove(gone)) {
                self.newest.remove(&gone);
                self.write(&gone, None);
            }
        }
        number
    }

    /// Somebody still asks for this app.
    pub(super) fn heard_of(&mut self, droplet: &str) {
        self.order.retain(|other| other != droplet);
        self.order.push_back(droplet.to_owned());
    }

    fn write(&mut self, droplet: &str, message: Option<Vec<u8>>) -> u64 {
        self.asked += 1;
        let written = Written {
            number: self.asked,
            droplet: droplet.to_owned(),
            message,
        };
        // The writer ends after this.
        drop(self.changes.send(written));
        self.asked
    }

    /// All up to this number are on disk.
    pub(super) fn note(&mut self, kept: u64) {
        self.kept = kept;
    }

    /// Those up to this number have been waited for long enough.
    pub(super) fn note_waited(&mut self, waited: u64) {
        self.waited = waited;
    }

    /// Whether what has this number is on disk, or a newer one of its app, or is not waited for any more.
    pub(super) fn is_settled(&self, number: u64) -> bool {
        number <= self.kept.max(self.waited)
    }

    /// Whether all that was asked for is on disk.
    pub(super) fn are_kept(&self) -> bool {
        self.asked <= self.kept
    }
}

/// The writer: as long as there are [`Templates`].
async fn write(
    dir: PathBuf,
    mut written: mpsc::UnboundedReceiver<Written>,
    told: mpsc::UnboundedSender<Change>,
) {
    let mut batch: Vec<Written> = Vec::new();
    while !batch.is_empty() || written.recv_many(&mut batch, BATCH).await > 0 {
        let Some(last) = batch.last().map(|written| written.number) else {
            continue;
        };
        let newest: HashMap<String, Option<Vec<u8>>> = batch
            .drain(..)
            .map(|written| (written.droplet, written.message))
            .collect();
        for (droplet, message) in newest {
            let (dir, name) = (dir.clone(), format!("{droplet}.json"));
            let mut done = pin!(blocking(move || replace(&dir, &name, message.as_deref())));
            let mut is_told = false;
            let done = loop {
                if let Ok(done) = timeout(PATIENCE, &mut done).await {
                    break done;
                }
                // Who came since the last time has waited long enough the next time.
                let waited = batch.last().map_or(last, |written| written.number);
                drop(told.send(Change::Waited(waited)));
                if !is_told {
                    is_told = true;
                    warn!(
                        droplet,
                        "{UNANSWERED}: after a restart this app cannot be scaled from 0"
                    );
                }
                while let Ok(later) = written.try_recv() {
                    batch.push(later);
                }
            };
            if let Err(error) = done {
                warn!(droplet, %error, "after a restart this app cannot be scaled from 0");
            }
        }
        // The stable ends only when the agent does.
        drop(told.send(Change::Kept(last)));
    }
}

/// Blocks.
fn replace(
    dir: &Path,
    name: &str,
    message: Option<&[u8]>,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    make_private(dir)?;
    match message {
        Some(bytes) => write_durably(dir, name, bytes)?,
        None => match fs::remove_file(dir.join(name)) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        },
    }
    Ok(())
}

/// What is there, and its apps, those first whose file is oldest. Blocks.
fn load(dir: &Path) -> (HashMap<String, Value>, VecDeque<String>) {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let templates = entries.filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        if name.ends_with(UNFINISHED) {
            drop(fs::remove_file(entry.path()));
        }
        let droplet = name.strip_suffix(".json")?.to_owned();
        let message = serde_json::from_slice(&fs::read(entry.path()).ok()?).ok()?;
        let written = entry.metadata().and_then(|file| file.modified());
        Some((written.ok(), droplet, message))
    });
    let mut templates: Vec<(_, String, Value)> = templates.collect();
    templates.sort_by_key(|(written, ..)| *written);
    let order = templates.iter().map(|(_, droplet, _)| droplet.clone());
    let order = order.collect();
    let newest = templates
        .into_iter()
        .map(|(_, droplet, message)| (droplet, message));
    (newest.collect(), order)
}

#[cfg(test)]
mod tests {
    use super::{MOST, Templates};
    use serde_json::json;
    use std::collections::HashSet;
    use tokio::sync::mpsc;

    #[tokio::test]
    async fn of_too_many_apps_the_one_of_which_nothing_was_heard_for_longest_is_forgotten() {
        let base = std::env::temp_dir().join(format!("ostler-templates-{}", std::process::id()));
        std::fs::create_dir_all(base.join("templates")).unwrap();
        let (told, _kept) = mpsc::unbounded_channel();
        let (mut templates, writer) = Templates::open(&base, told.clone()).await;
        let nobody = HashSet::new();
        for number in 0..MOST {
            templates.keep(&format!("app{number}"), json!({}), &nobody);
        }
        // Beside one that has instances here there is room for as many others.
        let here = HashSet::from(["app1"]);
        templates.keep("first", json!({}), &here);
        templates.keep("app0", json!({}), &here);
        // The oldest two are heard of once more, or here.
        templates.keep("new", json!({}), &here);
        let has = |templates: &Templates, app| templates.get(app).is_some();
        assert!(["app0", "app1", "app3", "new"].map(|app| has(&templates, app)) == [true; 4]);
        assert!(!has(&templates, "app2"));
        drop(templates);
        writer.await;
        let (templates, _writer) = Templates::open(&base, told).await;
        std::fs::remove_dir_all(base).unwrap();
        assert_eq!(templates.all().count(), MOST + 1);
        assert!(has(&templates, "new") && !has(&templates, "app2"));
    }
}
