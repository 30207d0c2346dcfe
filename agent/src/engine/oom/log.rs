//! What the kernel's log said about processes killed for memory, kept by one task.

use crate::host::kmsg::{Event, Kmsg, OomKill};
use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout, timeout_at};

/// Kills that are kept, of the whole host.
pub(crate) const REMEMBERED: usize = 1024;

/// How long a kill's record may come after its count. Both happen within the kernel's one function, so this
/// is for a machine that does not get to run it; a log that nobody can read is not waited for.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// Whether the log has everything since boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Complete {
    Yes,
    No,
}

#[derive(Debug)]
struct Kills {
    recent: VecDeque<OomKill>,
    /// The newest record of whatever kind; `None` until everything was read once.
    newest: Option<u64>,
    complete: Complete,
}

/// The task that reads the log, and what it has read.
#[derive(Debug)]
pub(crate) struct KillLog {
    kills: watch::Receiver<Kills>,
    reader: AbortHandle,
}

impl Drop for KillLog {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl KillLog {
    /// Starts reading from the oldest record. Without access to the log there are no records.
    pub(crate) fn start() -> Self {
        let empty = Kills {
            recent: VecDeque::new(),
            newest: None,
            complete: Complete::Yes,
        };
        let (sender, kills) = watch::channel(empty);
        let reader = tokio::spawn(async move {
            if let Err(error) = read(&sender).await {
                tracing::warn!(%error, "victims of memory kills will not be named: cannot read /dev/kmsg");
            }
        });
        Self {
            kills,
            reader: reader.abort_handle(),
        }
    }

    /// Where the log ends now, as the number of its last record: what a container will do comes after it.
    /// `None`: nobody reads the log.
    pub(in crate::engine) async fn end(&self) -> Option<u64> {
        let mut kills = self.kills.clone();
        let read = timeout(PATIENCE, kills.wait_for(|kills| kills.newest.is_some())).await;
        read.ok()?.ok()?.newest
    }

    /// The records of a container's kills, oldest first. Waits until `wanted` of them are newer than the one
    /// with the sequence number `after`, but not longer than `until`.
    pub(super) async fn of(
        &self,
        whose: &Whose<'_>,
        (wanted, after): (u64, Option<u64>),
        until: Instant,
    ) -> (Vec<OomKill>, Complete) {
        let mut kills = self.kills.clone();
        let own = |kill: &&OomKill| whose.has(kill);
        let has_all = |kills: &Kills| {
            let new = kills
                .recent
                .iter()
                .filter(own)
                .filter(|kill| Some(kill.seq) > after);
            u64::try_from(new.count()).is_ok_and(|count| count >= wanted)
        };
        // Whether they came, or nobody reads the log: what is there is the answer.
        let _late = timeout_at(until, kills.wait_for(has_all)).await.is_err();
        let kills = self.kills.borrow();
        (
            kills.recent.iter().filter(own).cloned().collect(),
            kills.complete,
        )
    }

    /// Waits for a record of a container's kill that is newer than `after`; its sequence number. Never
    /// resolves if nobody reads the log.
    pub(super) async fn newer(&self, whose: &Whose<'_>, after: Option<u64>) -> u64 {
        let mut looked = after.max(whose.log_end);
        let mut found = None;
        // Every kill on the host wakes every container: each looks at what is new only.
        let finds = |kills: &Kills| {
            let new = kills.recent.iter().rev();
            let mut new = new.take_while(|kill| Some(kill.seq) > looked);
            found = new.find(|kill| whose.has(kill)).map(|kill| kill.seq);
            looked = looked.max(kills.recent.back().map(|kill| kill.seq));
            found.is_some()
        };
        // An error: nobody reads.
        let _read = self.kills.clone().wait_for(finds).await.is_ok();
        match found {
            Some(seq) => seq,
            None => std::future::pending().await,
        }
    }
}

/// Whose kills are looked for.
#[derive(Debug)]
pub(super) struct Whose<'a> {
    /// The container: it names its control group.
    pub(super) handle: &'a str,
    /// The host's user ids that only its processes have, if there are such.
    pub(super) uids: Option<Range<u32>>,
    /// Where the log ended before it had processes: what is older was another container's, who had the same
    /// ids before it. `None`: not known.
    pub(super) log_end: Option<u64>,
}

impl Whose<'_> {
    /// By the victim's group; by its user where the kernel did not say the group.
    fn has(&self, kill: &OomKill) -> bool {
        let uids = || self.uids.as_ref();
        Some(kill.seq) > self.log_end
            && (is_of(&kill.task_memcg, self.handle)
                || kill.task_memcg.is_empty()
                    && uids().is_some_and(|uids| uids.contains(&kill.uid)))
    }
}

/// Whether a control group's path leads into the group of a container.
pub(super) fn is_of(path: &str, handle: &str) -> bool {
    path.split('/').any(|component| component == handle)
}

async fn read(sender: &watch::Sender<Kills>) -> std::io::Result<()> {
    let mut log = Kmsg::open()?;
    loop {
        let event = log.next().await?;
        sender.send_if_modified(|kills| kills.take(event));
    }
}

impl Kills {
    /// Whether anybody wants to know: most of what the kernel writes is of no kill.
    fn take(&mut self, event: Event) -> bool {
        match event {
            Event::Overrun => self.complete = Complete::No,
            Event::Drained(last) => return self.newest.replace(last).is_none(),
            Event::Kill(kill) => {
                if self.recent.len() == REMEMBERED {
                    self.recent.pop_front();
                    self.complete = Complete::No;
                }
                self.recent.push_back(kill);
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::{Complete, Event, KillLog, Kills, OomKill, Whose};
    use std::collections::VecDeque;
    use std::time::Duration;
    use tokio::sync::watch;
    use tokio::time::timeout;

    fn of_user(seq: u64, uid: u32) -> OomKill {
        OomKill {
            seq,
            time_us: 0,
            constraint: String::new(),
            oom_memcg: String::new(),
            task_memcg: String::new(),
            comm: String::new(),
            pid: 1,
            uid,
        }
    }

    #[tokio::test]
    async fn a_watcher_is_told_each_of_its_kills_and_woken_by_nothing_else() {
        let empty = Kills {
            recent: VecDeque::new(),
            newest: None,
            complete: Complete::Yes,
        };
        let (sender, kills) = watch::channel(empty);
        let reader = tokio::spawn(std::future::pending::<()>()).abort_handle();
        let log = KillLog { kills, reader };
        let take = |event| sender.send_if_modified(|kills| kills.take(event));
        assert!(take(Event::Drained(3)) && !take(Event::Drained(4)));
        assert_eq!(log.end().await, Some(4));
        let whose = Whose {
            handle: "0123456789v",
            uids: Some(10..20),
            log_end: Some(4),
        };
        for (seq, uid) in [(5, 10), (6, 30)] {
            assert!(take(Event::Kill(of_user(seq, uid))));
        }
        assert_eq!(log.newer(&whose, None).await, 5);
        // One that waits, while others' kills and its own come.
        let mut next = Box::pin(log.newer(&whose, Some(5)));
        for seq in [7, 8] {
            assert!(take(Event::Kill(of_user(seq, 30))));
            let waited = timeout(Duration::from_millis(1), &mut next).await;
            assert!(waited.is_err(), "{waited:?}");
        }
        for (seq, uid) in [(9, 11), (10, 30)] {
            assert!(take(Event::Kill(of_user(seq, uid))));
        }
        assert_eq!(next.await, 9);
        drop(sender);
        let never = timeout(Duration::from_millis(1), log.newer(&whose, Some(9))).await;
        assert!(never.is_err(), "nobody reads any more");
    }

    #[test]
    fn a_kill_belongs_to_its_group_or_else_to_its_user() {
        let kill = |task_memcg: &str, uid| OomKill {
            task_memcg: task_memcg.into(),
            ..of_user(1, uid)
        };
        let handle = "0123456789v";
        let whose = |uids, log_end| Whose {
            handle,
            uids,
            log_end,
        };
        let (own, others) = ("/ostler/0123456789v", "/ostler/vvvvvvvvvvv");
        for (group, uid, by_group, by_user) in [
            (own, 0, true, true),
            (others, 65_540, false, false),
            ("", 65_536, false, true),
            ("", 131_071, false, true),
            ("", 131_072, false, false),
            ("", 0, false, false),
        ] {
            let kill = kill(group, uid);
            assert_eq!(whose(None, None).has(&kill), by_group, "{kill:?}");
            let users = || Some(65_536..131_072);
            assert_eq!(whose(users(), Some(0)).has(&kill), by_user, "{kill:?}");
            assert!(!whose(users(), Some(1)).has(&kill), "older: {kill:?}");
        }
    }
}
