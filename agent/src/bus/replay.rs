//! `request_id`: the same command asked twice acts once and is answered twice.
//!
//! Answers are kept in `<base>/answers/`, one small file each, so that a repetition after a restart of
//! the agent gets them too. A command that is still being answered collects its repetitions.

use crate::instances::record::{RecordError, UNFINISHED, make_private, write_durably};
use messages::reply::Reply;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use tokio::sync::oneshot;

/// Answers that are kept; beyond, the oldest go first. At 512 bytes each they take 2 MiB.
pub const KEPT: usize = 4096;

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
    /// Reads what earlier lives answered, oldest first. What cannot be read is no answer. Blocks.
    ///
    /// # Errors
    /// If the directory cannot be made.
    pub fn open(base: &Path) -> Result<Self, RecordError> {
        let dir = base.join("answers");
        make_private(&dir)?;
        let mut found: Vec<_> = std::fs::read_dir(&dir)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                if name.ends_with(UNFINISHED) {
                    drop(std::fs::remove_file(entry.path()));
                    return None;
                }
                let time = entry.metadata().ok()?.modified().ok()?;
                let reply = Reply::from_body(&std::fs::read(entry.path()).ok()?)?;
                Some((time, name, reply))
            })
            .collect();
        found.sort_by_key(|(time, ..)| *time);
        // Of many at once some may have been written after they were displaced.
        for (_, name, _) in found.drain(..found.len().saturating_sub(KEPT)) {
            drop(std::fs::remove_file(dir.join(name)));
        }
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

#[cfg(test)]
mod tests {
    use super::{KEPT, Replay, Seen, name};
    use messages::reply::{ErrorCode, Reply};
    use serde_json::json;
    use std::path::PathBuf;

    /// A base directory that goes with it.
    struct Base(PathBuf);

    impl Base {
        fn new(test: &str) -> Self {
            let own = format!("ostler-replay-{test}-{}", std::process::id());
            Self(std::env::temp_dir().join(own))
        }

        fn file(&self, id: &str) -> PathBuf {
            self.0.join("answers").join(name(id))
        }
    }

    impl Drop for Base {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn reply(number: usize) -> Reply {
        Reply::ok(json!({"number": number}))
    }

    /// What is known of `id`; a fresh one is not begun by asking.
    fn known(replay: &Replay, id: &str) -> Option<Reply> {
        replay.answered.get(&name(id)).cloned()
    }

    #[test]
    fn an_answer_is_the_same_in_the_next_life() {
        let base = Base::new("again");
        let mut replay = Replay::open(&base.0).unwrap();
        let refusal = Reply::error(ErrorCode::BadField, "never");
        for (id, reply) in [("one", reply(1)), ("../two", refusal.clone())] {
            assert!(matches!(replay.see(id), Seen::Fresh));
            replay.answered(id, &reply).unwrap().write().unwrap();
        }
        // Begun and not answered when the agent died.
        assert!(matches!(replay.see("three"), Seen::Fresh));
        let unfinished = base.file("three").with_extension("new");
        std::fs::write(&unfinished, "{").unwrap();
        let mut replay = Replay::open(&base.0).unwrap();
        assert!(!unfinished.exists());
        assert_eq!(known(&replay, "one"), Some(reply(1)));
        assert_eq!(known(&replay, "../two"), Some(refusal));
        assert!(matches!(replay.see("three"), Seen::Fresh));
    }

    #[test]
    fn whoever_asks_meanwhile_gets_the_same_answer() {
        let base = Base::new("meanwhile");
        let mut replay = Replay::open(&base.0).unwrap();
        for (id, answer) in [
            ("good", reply(1)),
            ("busy", Reply::error(ErrorCode::Busy, "later")),
        ] {
            assert!(matches!(replay.see(id), Seen::Fresh));
            let others = [replay.see(id), replay.see(id)];
            let kept = replay.answered(id, &answer).is_some();
            for other in others {
                let Seen::Pending(mut told) = other else {
                    panic!("{other:?}")
                };
                assert_eq!(told.try_recv().unwrap(), answer);
            }
            // What may be another answer the next time is asked again.
            assert_eq!(kept, id == "good");
            match replay.see(id) {
                Seen::Answered(again) => assert_eq!((again, id), (answer, "good")),
                Seen::Fresh => assert_eq!(id, "busy"),
                Seen::Pending(_) => panic!("nobody acts on it"),
            }
        }
        assert_eq!(
            std::fs::read_dir(base.0.join("answers")).unwrap().count(),
            0
        );
    }

    #[test]
    fn the_newest_are_kept_and_the_oldest_goes() {
        let base = Base::new("many");
        let mut replay = Replay::open(&base.0).unwrap();
        let answer = |replay: &mut Replay, number: usize| {
            let id = number.to_string();
            assert!(matches!(replay.see(&id), Seen::Fresh));
            replay.answered(&id, &reply(number)).unwrap()
        };
        answer(&mut replay, 0).write().unwrap();
        for number in 1..KEPT {
            answer(&mut replay, number);
        }
        assert_eq!(known(&replay, "0"), Some(reply(0)));
        answer(&mut replay, KEPT).write().unwrap();
        assert_eq!(known(&replay, "0"), None);
        assert!(!base.file("0").exists() && base.file(&KEPT.to_string()).exists());
        assert_eq!(known(&replay, "1"), Some(reply(1)));
        assert_eq!(replay.answered.len(), KEPT);
    }

    #[test]
    fn what_is_torn_or_too_much_on_the_disk_harms_no_other() {
        let base = Base::new("torn");
        drop(Replay::open(&base.0).unwrap());
        let epoch = std::time::SystemTime::UNIX_EPOCH;
        for number in 0..KEPT + 3 {
            let file = base.file(&number.to_string());
            std::fs::write(&file, reply(number).body()).unwrap();
            let time = epoch + std::time::Duration::from_secs(number as u64);
            let file = std::fs::File::options().write(true).open(file).unwrap();
            file.set_modified(time).unwrap();
        }
        let whole = reply(7).body();
        std::fs::write(base.file("torn"), &whole[..whole.len() / 2]).unwrap();
        std::fs::write(base.file("unwritten").with_extension("new"), &whole).unwrap();
        let mut replay = Replay::open(&base.0).unwrap();
        for (id, left) in [("0", false), ("2", false), ("3", true), ("4098", true)] {
            assert_eq!(known(&replay, id).is_some(), left, "{id}");
            assert_eq!(base.file(id).exists(), left, "{id}");
        }
        assert_eq!(replay.answered.len(), KEPT);
        assert!(matches!(replay.see("torn"), Seen::Fresh));
        replay.answered("torn", &reply(1)).unwrap().write().unwrap();
        let replay = Replay::open(&base.0).unwrap();
        assert_eq!(known(&replay, "torn"), Some(reply(1)));
    }
}
