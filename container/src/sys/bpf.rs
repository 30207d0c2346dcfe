//! The filter that cgroup v2 has in place of v1's `devices.*` files: a small program of the kernel's own
//! machine (bpf(2), `BPF_PROG_TYPE_CGROUP_DEVICE`) that is asked whenever a process of a group opens or
//! makes a device node. The file `linux/bpf.h` names everything below.

use crate::fault::{Context, SysError};
use nix::errno::Errno;
use nix::libc;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

/// A character device by its numbers; `None`: every minor number.
pub type Device = (u32, Option<u32>);

const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
const PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const ATTACH_CGROUP_DEVICE: u32 = 6;
/// Other programs, of groups above (systemd's), stay and are asked too; one "no" is a no.
const ALLOW_MULTI: u32 = 2;

/// `BPF_DEVCG_DEV_CHAR`.
const CHARACTER: i32 = 2;
/// `BPF_DEVCG_ACC_MKNOD`.
const MAKE: i32 = 1;

/// `struct bpf_insn`: the registers are the lower four bits (destination) and the upper ones (source).
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    value: i32,
}

/// The operations that the filter needs (linux/bpf.h, linux/bpf_common.h).
impl Instruction {
    /// `to = *(u32 *)(from + offset)`
    const fn load(to: u8, from: u8, offset: i16) -> Self {
        Self::new(0x61, to | from << 4, offset, 0)
    }
    /// `to = from`
    const fn copy(to: u8, from: u8) -> Self {
        Self::new(0xbf, to | from << 4, 0, 0)
    }
    /// `to = value`
    const fn set(to: u8, value: i32) -> Self {
        Self::new(0xb7, to, 0, value)
    }
    /// `to &= value`
    const fn and(to: u8, value: i32) -> Self {
        Self::new(0x57, to, 0, value)
    }
    /// `to >>= bits`
    const fn shift_right(to: u8, bits: i32) -> Self {
        Self::new(0x77, to, 0, bits)
    }
    /// Skips `over` instructions if the register is another value.
    const fn skip_unless(register: u8, value: i32, over: i16) -> Self {
        Self::new(0x55, register, over, value)
    }
    /// Skips `over` instructions if the register is this value.
    const fn skip_if(register: u8, value: i32, over: i16) -> Self {
        Self::new(0x15, register, over, value)
    }
    /// Ends with the answer in register 0.
    const fn exit() -> Self {
        Self::new(0x95, 0, 0, 0)
    }
    const fn new(code: u8, registers: u8, offset: i16, value: i32) -> Self {
        Self {
            code,
            registers,
            offset,
            value,
        }
    }
}

/// The program: yes to reading and writing these character devices, no to everything else. Register 1
/// comes with a `struct bpf_cgroup_dev_ctx`: `access << 16 | type`, major, minor.
fn program(devices: &[Device]) -> Vec<Instruction> {
    use Instruction as I;
    let no = [I::set(0, 0), I::exit()];
    let yes = [I::set(0, 1), I::exit()];
    let number = |number: u32| i32::try_from(number).unwrap_or(i32::MAX);
    let mut program = vec![
        I::load(2, 1, 0),
        I::load(4, 1, 4),
        I::load(5, 1, 8),
        I::copy(3, 2),
        I::and(3, 0xffff),
        I::shift_right(2, 16),
        I::skip_if(3, CHARACTER, 2),
    ];
    program.extend(no);
    program.extend([I::and(2, MAKE), I::skip_if(2, 0, 2)]);
    program.extend(no);
    for (major, minor) in devices {
        match minor {
            Some(minor) => program.extend([
                I::skip_unless(4, number(*major), 3),
                I::skip_unless(5, number(*minor), 2),
            ]),
            None => program.push(I::skip_unless(4, number(*major), 2)),
        }
        program.extend(yes);
    }
    program.extend(no);
    program
}

/// The part of `union bpf_attr` that `BPF_PROG_LOAD` reads; what follows it counts as zero.
#[repr(C)]
struct Load {
    kind: u32,
    instructions: u32,
    program: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
}

/// The part of `union bpf_attr` that `BPF_PROG_ATTACH` reads.
#[repr(C)]
struct Attach {
    group: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

/// Loads a filter that lets exactly these character devices be read and written. It does nothing until
/// it is attached.
///
/// # Errors
/// `EPERM`: neither `CAP_SYS_ADMIN` nor `CAP_BPF`. `EINVAL`, `ENOSYS`: a kernel without
/// `CONFIG_CGROUP_BPF`.
pub fn device_filter(devices: &[Device]) -> Result<OwnedFd, SysError> {
    let program = program(devices);
    let attributes = Load {
        kind: PROG_TYPE_CGROUP_DEVICE,
        instructions: u32::try_from(program.len()).unwrap_or(u32::MAX),
        program: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
    };
    // SAFETY: bpf(2) reads attributes of the size that it is told, and behind their two pointers a program
    // of the length that they say and a string that ends with a zero; all outlive the call.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            PROG_LOAD,
            &raw const attributes,
            size_of::<Load>(),
        )
    };
    let fd = Errno::result(answer).context("bpf", "BPF_PROG_LOAD of a device filter")?;
    let fd = RawFd::try_from(fd).unwrap_or(-1);
    // SAFETY: the call has just returned this descriptor (close-on-exec) to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Attaches a filter to a v2 group: every process in it and below is bound by it from now on. It goes
/// with the group.
///
/// # Errors
/// `EPERM`: a group above has a filter that suffers no others. `EBADF`: no v2 group.
pub fn attach_device_filter(group: impl AsFd, filter: impl AsFd) -> Result<(), SysError> {
    let number = |fd: RawFd| u32::try_from(fd).unwrap_or(u32::MAX);
    let attributes = Attach {
        group: number(group.as_fd().as_raw_fd()),
        program: number(filter.as_fd().as_raw_fd()),
        kind: ATTACH_CGROUP_DEVICE,
        flags: ALLOW_MULTI,
    };
    // SAFETY: bpf(2) reads attributes of the size that it is told; they hold integers only.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            PROG_ATTACH,
            &raw const attributes,
            size_of::<Attach>(),
        )
    };
    Errno::result(answer)
        .map(drop)
        .context("bpf", "BPF_PROG_ATTACH of a device filter")
}

#[cfg(test)]
mod tests {
    use super::{Device, Instruction, program};

    /// What the program answers for an access (1 make, 2 read, 4 write) to a device (type 1 block,
    /// 2 character), by doing what the kernel's machine would.
    fn answer(devices: &[Device], access: u32, kind: u32, major: u32, minor: u32) -> u64 {
        let program = program(devices);
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0_u64; 11];
        let mut at = 0;
        loop {
            let Instruction {
                code,
                registers: pair,
                offset,
                value,
            } = program[at];
            let (to, from) = (usize::from(pair & 15), usize::from(pair >> 4));
            let wide = u64::try_from(value).unwrap();
            let mut skip = 0;
            match code {
                0x61 => registers[to] = context[usize::try_from(offset).unwrap() / 4].into(),
                0xbf => registers[to] = registers[from],
                0xb7 => registers[to] = wide,
                0x57 => registers[to] &= wide,
                0x77 => registers[to] >>= wide,
                0x55 if registers[to] != wide => skip = offset,
                0x15 if registers[to] == wide => skip = offset,
                0x55 | 0x15 => {}
                0x95 => return registers[0],
                other => panic!("{other:#x}"),
            }
            at += 1 + usize::try_from(skip).unwrap();
        }
    }

    #[test]
    fn the_filter_says_yes_to_its_list_only() {
        let devices = [(1, Some(3)), (136, None), (1, Some(9))];
        let (read, write, make) = (2, 4, 1);
        for (access, kind, major, minor, wanted) in [
            (read, 2, 1, 3, 1),
            (write, 2, 1, 3, 1),
            (read | write, 2, 1, 9, 1),
            (read, 2, 136, 4711, 1),
            // Another number, another type, making one.
            (read, 2, 1, 11, 0),
            (read, 2, 3, 3, 0),
            (read, 1, 1, 3, 0),
            (read, 1, 136, 0, 0),
            (make, 2, 1, 3, 0),
            (make | read, 2, 136, 0, 0),
            (write, 2, 0, 0, 0),
            (read, 2, u32::MAX, 3, 0),
        ] {
            let said = answer(&devices, access, kind, major, minor);
            assert_eq!(said, wanted, "{access} {kind} {major}:{minor}");
        }
        assert_eq!(answer(&[], read, 2, 1, 3), 0);
    }
}
