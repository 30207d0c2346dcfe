//! What is reserved and what still fits: pure arithmetic over the instances' records.

use super::record::Record;
use super::state::holds_memory;
use messages::state::State;

/// What a start asks for, in MB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Amount {
    /// Memory.
    pub memory: u64,
    /// Disk.
    pub disk: u64,
}

/// What is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Short {
    /// Disk (named first, as the DEA).
    Disk,
    /// Memory.
    Memory,
}

/// The sum of what instances hold: each with its record, and how many MB of memory and of disk are its.
pub fn reserved<'a>(instances: impl Iterator<Item = (&'a Record, u64, u64)>) -> Amount {
    instances.fold(Amount::default(), |sum, (record, memory, disk)| Amount {
        memory: sum.memory
            + if holds_memory(record.state) {
                memory
            } else {
                0
            },
        disk: sum.disk + if holds_disk(record) { disk } else { 0 },
    })
}

/// Whether `wanted` fits beside `reserved`; equality fits.
///
/// # Errors
/// What is missing.
pub fn admit(capacity: Amount, reserved: Amount, wanted: Amount) -> Result<(), Short> {
    let fits = |capacity: u64, reserved: u64, wanted: u64| {
        // Who wants nothing is not to be refused for what others have.
        wanted == 0
            || reserved
                .checked_add(wanted)
                .is_some_and(|sum| sum <= capacity)
    };
    if !fits(capacity.disk, reserved.disk, wanted.disk) {
        return Err(Short::Disk);
    }
    if !fits(capacity.memory, reserved.memory, wanted.memory) {
        return Err(Short::Memory);
    }
    Ok(())
}

/// The container's files count as long as they are there: a crash holds disk until it is cleaned up,
/// not until it is forgotten. What is kept of it beyond that is not the app's but the agent's.
pub fn holds_disk(record: &Record) -> bool {
    match record.state {
        State::Born | State::Starting | State::Running | State::Stopping => true,
        State::Crashed | State::Stopped => record.container.is_some(),
        State::Resuming | State::Evacuating => false,
    }
}

/// What one instance takes of the host's heartbeat.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// Whose it is.
    pub handle: String,
    /// Most bytes that it can have.
    pub bytes: usize,
    /// Since when it is there only to tell of a crash, in seconds since the epoch.
    pub crashed: Option<f64>,
}

/// What a heartbeat can hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Instances.
    pub instances: usize,
    /// Bytes of all entries.
    pub bytes: usize,
}

/// Which crashed instances must be forgotten, oldest first, so that `wanted` has room beside the rest;
/// `None` if it has none even so.
pub fn make_room(mut entries: Vec<Entry>, wanted: Room, most: Room) -> Option<Vec<String>> {
    let fits = |used: Room| {
        let sum = |used: usize, wanted: usize| used.saturating_add(wanted);
        sum(used.instances, wanted.instances) <= most.instances
            && sum(used.bytes, wanted.bytes) <= most.bytes
    };
    let mut used = Room {
        instances: entries.len(),
        bytes: entries.iter().map(|entry| entry.bytes).sum(),
    };
    entries.retain(|entry| entry.crashed.is_some());
    entries.sort_by(|one, other| f64::total_cmp(&since(one), &since(other)));
    let mut leaving = Vec::new();
    let mut crashed = entries.into_iter();
    while !fits(used) {
        let oldest = crashed.next()?;
        used.instances -= 1;
        used.bytes -= oldest.bytes;
        leaving.push(oldest.handle);
    }
    Some(leaving)
}

fn since(entry: &Entry) -> f64 {
    entry.crashed.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::{Amount, Entry, Room, Short, admit, make_room, reserved};
    use crate::instances::record::tests::record;
    use messages::state::State;
    use serde_json::json;

    #[test]
    fn an_instance_holds_memory_while_it_runs_and_disk_while_its_files_are_there() {
        let holds = |state, files: bool| {
            let mut record = record("00000000001");
            record.state = state;
            record.container = files.then(|| {
                let lease = json!({"host": "10.0.0.1", "container": "10.0.0.2", "prefix": 30});
                let saved = json!({"handle": "h", "lease": lease, "ports": [], "boot_id": "b"});
                serde_json::from_value(saved).unwrap()
            });
            let Amount { memory, disk } = reserved([(&record, 1, 1)].into_iter());
            (memory, disk)
        };
        for state in [
            State::Born,
            State::Starting,
            State::Running,
            State::Stopping,
        ] {
            assert_eq!(holds(state, true), (1, 1), "{state:?}");
            // Its container is on its way.
            assert_eq!(holds(state, false), (1, 1), "{state:?}");
        }
        for state in [State::Crashed, State::Stopped] {
            assert_eq!(holds(state, true), (0, 1), "{state:?}");
            assert_eq!(holds(state, false), (0, 0), "{state:?}");
        }
        for state in [State::Evacuating, State::Resuming] {
            assert_eq!(holds(state, true), (0, 0), "{state:?}");
        }
    }

    fn leaving(wanted: usize, most: Room) -> Option<Vec<String>> {
        let entry = |handle: &str, crashed| Entry {
            handle: handle.into(),
            bytes: 100,
            crashed,
        };
        let entries = vec![
            entry("younger", Some(2.0)),
            entry("alive", None),
            entry("older", Some(1.0)),
        ];
        let wanted = Room {
            instances: wanted,
            bytes: wanted * 100,
        };
        make_room(entries, wanted, most)
    }

    #[test]
    fn crashed_instances_leave_first_and_no_more_of_them_than_need_to() {
        let most = |instances, bytes| Room { instances, bytes };
        assert_eq!(leaving(1, most(4, 400)), Some(vec![]));
        for tight in [most(3, 1000), most(10, 399)] {
            assert_eq!(leaving(1, tight), Some(vec!["older".into()]));
        }
        let both = Some(vec!["older".into(), "younger".into()]);
        assert_eq!(leaving(2, most(3, 1000)), both);
        assert_eq!(leaving(3, most(3, 1000)), None);
        assert_eq!(leaving(usize::MAX / 200, most(1000, 1000)), None);
    }

    #[test]
    fn equality_fits_and_disk_is_named_first() {
        let capacity = Amount {
            memory: 100,
            disk: 100,
        };
        let half = Amount {
            memory: 50,
            disk: 50,
        };
        assert_eq!(admit(capacity, half, half), Ok(()));
        let more = Amount {
            memory: 51,
            disk: 50,
        };
        assert_eq!(admit(capacity, half, more), Err(Short::Memory));
        let both = Amount {
            memory: 51,
            disk: 51,
        };
        assert_eq!(admit(capacity, half, both), Err(Short::Disk));
        let huge = Amount {
            memory: u64::MAX,
            disk: 1,
        };
        assert_eq!(admit(capacity, half, huge), Err(Short::Memory));
        let over = Amount {
            memory: 101,
            disk: 50,
        };
        let disk_only = Amount { memory: 0, disk: 1 };
        assert_eq!(admit(capacity, over, disk_only), Ok(()));
        assert_eq!(admit(capacity, over, Amount::default()), Ok(()));
    }
}
