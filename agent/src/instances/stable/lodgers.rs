//! What may run by records that this agent cannot use: it is left alone, and reckoned with.

use crate::chain;
use crate::engine::{Adopted, Container};
use crate::host::depot::is_handle;
use crate::instances::droplets::Digest;
use crate::instances::instance::Change;
use crate::instances::ledger::Amount;
use crate::instances::record::Unread;
use crate::instances::world::World;
use std::collections::{BTreeMap, HashSet};
use std::pin::Pin;
use tracing::error;

/// All of them, by their handles: what bears one of these is not nobody's.
#[derive(Debug, Default)]
pub(super) struct Lodgers(BTreeMap<String, Lodger>);

/// What is known of one.
#[derive(Debug, Default)]
struct Lodger {
    /// As long as it is held, its addresses and ports are not given away, dead or alive.
    _container: Option<Container>,
    /// Something of it runs, or nobody knows whether.
    lives: bool,
    droplet: Option<Digest>,
    /// MB of memory that it may have, if anybody knows.
    memory: Option<u64>,
    /// MB of disk that it was promised; what it has beyond a promise that nobody can read, the depot knows.
    disk: u64,
}

/// Tells the stable when one of them has ended.
pub(super) type End = Pin<Box<dyn Future<Output = ()> + Send>>;

impl Lodgers {
    /// Adopts their containers, so that their apps run on untouched. Only a shutdown takes them away, as everything.
    /// The futures are for the caller to run beside.
    pub(super) async fn take_in(world: &World, unread: &[Unread]) -> (Self, Vec<End>) {
        let (mut lodgers, mut ends) = (Self::default(), Vec::new());
        for one in unread {
            let handle = &one.handle;
            error!(
                handle, path = %one.path.display(), why = one.why,
                "a record cannot be used: what runs by it is left alone, but stands in no heartbeat, and its routes are not repeated; \
                 start the agent that wrote it, or end this one and run `ostler clean`, which ends all apps of this host"
            );
            let container = adopt(world, one).await;
            let end = life_of(world, handle).await;
            let limits = one.legible.limits;
            let lodger = Lodger {
                _container: container,
                lives: end.is_some(),
                droplet: one.legible.droplet,
                memory: match world.engine.memory_limit(handle).await {
                    Some(bytes) => Some(bytes.div_ceil(1 << 20)),
                    None => limits.map(|limits| limits.mem),
                },
                disk: limits.map_or(0, |limits| limits.disk),
            };
            lodger.say_what_follows(handle);
            lodgers.0.insert(handle.clone(), lodger);
            ends.extend(end);
        }
        (lodgers, ends)
    }

    /// Their handles.
    pub(super) fn handles(&self) -> impl Iterator<Item = &String> {
        self.0.keys()
    }

    /// Nothing of it runs any more.
    pub(super) fn ended(&mut self, handle: &str) {
        if let Some(lodger) = self.0.get_mut(handle) {
            lodger.lives = false;
        }
    }

    /// The names of the droplets that they run, or would; `None`: any may be one.
    pub(super) fn droplets(&self) -> Option<HashSet<String>> {
        let mut names = HashSet::new();
        for lodger in self.0.values() {
            match lodger.droplet {
                Some(digest) => drop(names.insert(digest.to_string())),
                None if lodger.lives => return None,
                None => {}
            }
        }
        Some(names)
    }

    /// What is reserved with theirs, beside what others have: of memory what lives may have, of disk what is promised
    /// as long as the record is there. All memory of the host where nobody knows how much one may have that lives.
    pub(super) fn reserved(&self, others: Amount, capacity: Amount) -> Amount {
        let mut all = others;
        for lodger in self.0.values() {
            all.disk += lodger.disk;
            if lodger.lives {
                all.memory += lodger.memory.unwrap_or(0);
            }
        }
        let unknown = |lodger: &Lodger| lodger.lives && lodger.memory.is_none();
        if self.0.values().any(unknown) {
            all.memory = all.memory.max(capacity.memory);
        }
        all
    }
}

impl Lodger {
    fn say_what_follows(&self, handle: &str) {
        if self.lives && self.droplet.is_none() {
            error!(
                handle,
                "nor does it say which droplet runs: as long as it does, no droplet is removed from this host"
            );
        }
        if self.lives && self.memory.is_none() {
            error!(
                handle,
                "nor does anybody know how much memory it may have: as long as it runs, this host offers none"
            );
        }
    }
}

/// Its container, if the record tells of one.
async fn adopt(world: &World, one: &Unread) -> Option<Container> {
    let handle = &one.handle;
    let Some(saved) = &one.legible.container else {
        error!(
            handle,
            "nor does it say what its container has: its processes run on, but without a way to the network, and its \
             addresses and ports are not reckoned with"
        );
        return None;
    };
    match world.engine.adopt(saved).await {
        Ok(Adopted::Alive(container) | Adopted::Dead { container, .. }) => Some(container),
        Err(error) => {
            error!(handle, error = %chain(&error), "its container cannot be adopted");
            None
        }
    }
}

/// What waits for its end; for ever where nobody knows whether it lives. `None` if it is dead.
async fn life_of(world: &World, handle: &str) -> Option<End> {
    if !is_handle(handle) {
        // No container bears such a name.
        return None;
    }
    match world.engine.life_of(handle).await {
        Ok(life) => {
            let (life, changes, handle) = (life?, world.changes.clone(), handle.to_owned());
            Some(Box::pin(async move {
                life.await;
                // The stable ends only when the agent does.
                drop(changes.send(Change::Deserted(handle)));
            }))
        }
        Err(error) => {
            error!(handle, error = %chain(&error), "whether it lives is not known: it counts as if it did");
            Some(Box::pin(std::future::pending()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Amount, Digest, Lodger, Lodgers};

    fn lodgers(some: Vec<(bool, Option<Digest>, Option<u64>)>) -> Lodgers {
        let lodger = |(number, (lives, droplet, memory)): (usize, _)| {
            let lodger = Lodger {
                lives,
                droplet,
                memory,
                disk: 10,
                _container: None,
            };
            (number.to_string(), lodger)
        };
        Lodgers(some.into_iter().enumerate().map(lodger).collect())
    }

    #[test]
    fn what_lives_keeps_its_droplet_and_its_memory() {
        let (one, other) = (Digest::Sha1([1; 20]), Digest::Sha256([2; 32]));
        let known = vec![(true, Some(one), Some(5)), (false, Some(other), Some(7))];
        let mut all = lodgers(known.clone());
        let names = [one.to_string(), other.to_string()];
        assert_eq!(all.droplets(), Some(names.clone().into()));
        let [others, capacity] = [30, 100].map(|memory| Amount { memory, disk: 100 });
        let reserved = |all: &Lodgers| {
            let Amount { memory, disk } = all.reserved(others, capacity);
            (memory, disk)
        };
        assert_eq!(reserved(&all), (35, 120));
        all.ended("0");
        assert_eq!(reserved(&all), (30, 120));
        // Of one nothing is known but that it lives, until it does not.
        let mut all = lodgers([known, vec![(true, None, None)]].concat());
        assert_eq!((all.droplets(), reserved(&all)), (None, (100, 130)));
        all.ended("2");
        assert_eq!(all.droplets(), Some(names.into()));
        assert_eq!(reserved(&all), (35, 130));
    }
}
