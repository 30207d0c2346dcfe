//! `request_id`: the same command asked twice acts once and is answered twice.
//!
//! Answers are kept in `<base>/answers/`, one small file each, so that a repetition after a restart of
//! the agent gets them too. A command that is still being answered collects its repetitions.

use crate::instances::record::{RecordError, make_private, write_durably};
use messages::reply::Reply;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use tokio::sync::oneshot;

/// Answers that are kept; beyond, the oldest go first. At 512 bytes each they take 2 MiB.
const KEPT: usize = 4096;

/// What is known of a request id.
#[derive(Debug)]
pub enum Seen {
    /// Nothing: act, and tell [`Replay::answered`] at the end.
    Fresh,
    /// It is being acted on: the answer comes here.
    Pending(oneshot::Receiver<Reply>),
    /// It was answered.
    Answered(Reply),
}

/// All request ids of this host.
#[derive(Debug)]
pub struct Replay {
    dir: PathBuf,
    pending: HashMap<String, Vec<oneshot::Sender<Reply>>>,
    answered: HashMap<String, Reply>,
    order: std::collections::VecDeque<String>,
}

impl Replay {
    /// Reads what earlier lives answered, oldest first. Blocks.
    ///
    /// # Errors
    /// If the directory cannot be made or listed.
    pub fn open(base: &Path) -> Result<Self, RecordError> {
        let dir = base.join("answers");
        make_private(&dir)?;
        let mut found: Vec<_> = std::fs::read_dir(&dir)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| {
                let time = entry.metadata().ok()?.modified().ok()?;
                let reply = Reply::from_body(&std::fs::read(entry.path()).ok()?)?;
                Some((time, entry.file_name().into_string().ok()?, reply))
            })
            .collect();
        found.sort_by_key(|(time, ..)| *time);
        let order = found.iter().map(|(_, name, _)| name.clone()).collect();
        let answered = found
            .into_iter()
            .map(|(_, name, reply)| (name, reply))
            .collect();
        Ok(Self {
            dir,
            pending: HashMap::new(),
            answered,
            order,
        })
    }

    /// Looks `id` up, and marks it as being acted on if it is fresh.
    pub fn see(&mut self, id: &str) -> Seen {
        let name = name(id);
        if let Some(reply) = self.answered.get(&name) {
            return Seen::Answered(reply.clone());
        }
        if let Some(waiting) = self.pending.get_mut(&name) {
            let (tell, told) = oneshot::channel();
            waiting.push(tell);
            return Seen::Pending(told);
        }
        self.pending.insert(name, Vec::new());
        Seen::Fresh
    }

    /// Keeps the answer to `id`, unless asking again may bring another one, and gives it to whoever
    /// asked meanwhile. What comes back is to be written.
    pub fn answered(&mut self, id: &str, reply: &Reply) -> Option<Keep> {
        let name = name(id);
        for waiting in self.pending.remove(&name).into_iter().flatten() {
            // Whoever asked may have gone.
            drop(waiting.send(reply.clone()));
        }
        if reply.retryable() {
            return None;
        }
        self.answered.insert(name.clone(), reply.clone());
        self.order.push_back(name.clone());
        let forget = if self.order.len() > KEPT {
            self.order.pop_front()
        } else {
            None
        };
        if let Some(oldest) = &forget {
            self.answered.remove(oldest);
        }
        Some(Keep {
            dir: self.dir.clone(),
            name,
            body: reply.body(),
            forget,
        })
    }
}

/// One answer on its way to the disk.
#[derive(Debug)]
pub struct Keep {
    dir: PathBuf,
    name: String,
    body: Vec<u8>,
    forget: Option<String>,
}

impl Keep {
    /// Writes it, and removes the one that it displaces. Blocks.
    ///
    /// # Errors
    /// What the file system says.
    pub fn write(&self) -> Result<(), RecordError> {
        if let Some(oldest) = &self.forget {
            drop(std::fs::remove_file(self.dir.join(oldest)));
        }
        write_durably(&self.dir, &self.name, &self.body)
    }
}

/// A file name for any id.
fn name(id: &str) -> String {
    Sha256::digest(id)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}
