//! The numbers with which the helpers beside a container end. `iomux-link` for a person ends with
//! the job's own code instead, as `wsh` does.

/// Everything was done.
pub const DONE: u8 = 0;
/// A system call failed; descriptor 2 says which.
pub const FAILED: u8 = 1;
/// The arguments were not understood.
pub const USAGE: u8 = 2;
/// What was being followed is gone: of `iomux-link`, the supervisor died before the job's end was
/// recorded (start another with `--takeover`); of `oom`, the memory group was removed.
pub const GONE: u8 = 3;
/// The agent hung up.
pub const HUNG_UP: u8 = 4;
/// `iomux-spawn`: the job has a supervisor already.
pub const LOCKED: u8 = 5;
/// `iomux-spawn`: the program could not be executed. The job's log says so too.
pub const NOT_STARTED: u8 = 6;
/// `iomux-link`: the supervisor has as many readers as it takes.
pub const FULL: u8 = 7;
/// `wshd --open-files`: nobody on this host may raise a limit (no `CAP_SYS_RESOURCE`). Nothing was changed.
pub const REFUSED: u8 = 8;
/// `iomux-link` for a person: its own failure, whatever it was.
pub const OWN_FAILURE: u8 = 125;
