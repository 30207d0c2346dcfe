//! What the kernel's log said about processes killed for memory, kept by one task.

use crate::host::kmsg::{Event, Kmsg, OomKill};
use std::collections::VecDeque;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::timeout;

/// Kills that are kept, of the whole host.
pub(crate) const REMEMBERED: usize = 1024;

/// How long a kill's record may come after its count. Both happen within the kernel's one function.
const PATIENCE: Duration = Duration::from_millis(500);

/// Whether the log has everything since boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Complete {
    Yes,
    No,
}

#[derive(Debug)]
struct Kills {
    recent: VecDeque<OomKill>,
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

    /// The records of a container's kills, oldest first. Waits a little until `wanted` of them are newer
    /// than the one with the sequence number `after`.
    pub(super) async fn of(
        &self,
        handle: &str,
        wanted: u64,
        after: Option<u64>,
    ) -> (Vec<OomKill>, Complete) {
        let mut kills = self.kills.clone();
        let own = |kill: &&OomKill| is_of(&kill.task_memcg, handle);
        let has_all = |kills: &Kills| {
            let new = kills
                .recent
                .iter()
                .filter(own)
                .filter(|kill| Some(kill.seq) > after);
            u64::try_from(new.count()).is_ok_and(|count| count >= wanted)
        };
        // Whether they came, or nobody reads the log: what is there is the answer.
        let _late = timeout(PATIENCE, kills.wait_for(has_all)).await.is_err();
        let kills = self.kills.borrow();
        (
            kills.recent.iter().filter(own).cloned().collect(),
            kills.complete,
        )
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
        sender.send_modify(|kills| kills.take(event));
    }
}

impl Kills {
    fn take(&mut self, event: Event) {
        match event {
            Event::Overrun => self.complete = Complete::No,
            Event::Kill(kill) => {
                if self.recent.len() == REMEMBERED {
                    self.recent.pop_front();
                    self.complete = Complete::No;
                }
                self.recent.push_back(kill);
            }
        }
    }
}
