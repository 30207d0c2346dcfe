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

/// The sum of what instances in these records hold.
pub fn reserved<'a>(records: impl Iterator<Item = &'a Record>) -> Amount {
    records.fold(Amount::default(), |sum, record| Amount {
        memory: sum.memory
            + if holds_memory(record.state) {
                record.limits.mem
            } else {
                0
            },
        disk: sum.disk
            + if holds_disk(record) {
                record.limits.disk
            } else {
                0
            },
    })
}

/// Whether `wanted` fits beside `reserved`; equality fits.
///
/// # Errors
/// What is missing.
pub fn admit(capacity: Amount, reserved: Amount, wanted: Amount) -> Result<(), Short> {
    let fits = |capacity: u64, reserved: u64, wanted: u64| {
        reserved
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
/// not until it is forgotten.
fn holds_disk(record: &Record) -> bool {
    match record.state {
        State::Born | State::Starting | State::Running | State::Stopping => true,
        State::Crashed | State::Stopped => record.container.is_some(),
        State::Resuming | State::Evacuating => false,
    }
}

#[cfg(test)]
mod tests {
    use super::{Amount, Short, admit};

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
    }
}
