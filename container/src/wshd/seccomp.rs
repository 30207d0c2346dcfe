//! Which system calls may be made in a container: a list of what is allowed, and the filter made of it.
//!
//! The measure is what Docker and Podman publish as their defaults: moby/profiles, seccomp/default.json at
//! 190fa92 (it knows Linux up to 6.13), and containers/common, pkg/seccomp/seccomp.json at 08bbb0d, for
//! a container without capabilities. Tighter than either:
//!
//! * no keyrings (`add_key`, `keyctl`, `request_key`): they are not divided by namespaces as files are;
//! * no `io_uring_*`, `bpf`, `userfaultfd`, `perf_event_open`, no new namespace or mount of any kind, whatever
//!   capabilities a job has;
//! * `socket` for four families; the others are doors to kernel modules, and vsock leads to the hypervisor. Of
//!   those four only what needs no module, and no netlink between apps ([`socket`]);
//! * `ioctl` without `TIOCSTI` and `TIOCLINUX`, which type into terminals (CVE-2019-10063: the kernel looks
//!   at the low 32 bits of a request only, and so do we), and without those for bridges and VLANs, which load modules;
//! * `setsockopt` without what joins groups ([`socket_option`]);
//! * `prctl` without `PR_SCHED_CORE`, which takes threads of cores from neighbours;
//! * `sync` does nothing, as all that it could do is others';
//! * no 32-bit calls, by neither entry: their numbers are others.
//!
//! A known call that is not allowed is `EPERM`, where nothing else stands beside its rule. One that is newer than the list is `ENOSYS`, so that a C
//! library takes its older way; `clone3`, whose flags no filter can see, too. A protocol that is not
//! allowed is `EPROTONOSUPPORT`, as of a kernel without it.

use super::measure::Measure;
use crate::fault::{Context, SysError};
use crate::sys::seccomp::install;
use nix::errno::Errno;
use nix::libc::{self, c_long, sock_filter};

#[cfg(not(target_arch = "x86_64"))]
compile_error!("the list of system calls is that of x86_64");

/// `AUDIT_ARCH_X86_64` (linux/audit.h): the calls are those of a 64-bit process. Those of `int 0x80` come
/// with another value.
const ARCHITECTURE: u32 = 0xc000_003e;
/// The first numbers past those that x86_64 had at Linux 6.13 (the list's age): the old table, and the one
/// that all architectures share. x32, whose numbers have bit 30 set, is past both.
const AGE: [std::ops::RangeInclusive<u32>; 2] = [0..=335, 424..=466];

/// All of `CLONE_NEW*` that clone(2) knows.
const NEW_NAMESPACES: u32 = 0x7e02_0000;
/// `CLONE_NEWUSER`.
const NEW_USER: u32 = 0x1000_0000;
/// The families that may be.
const UNIX: u32 = 1;
const INET: u32 = 2;
const INET6: u32 = 10;
const NETLINK: u32 = 16;
/// `TIOCSTI`, `TIOCLINUX`; `TIOCSETD`, `SIOCGIFBR`, `SIOCSIFBR`, `SIOCBRADDBR`, `SIOCBRDELBR`, `SIOCGIFVLAN`, `SIOCSIFVLAN`, for which
/// the kernel starts `modprobe` before it asks who wants them (`tty_ldisc_get` of drivers/tty/tty_ldisc.c, where
/// `dev.tty.ldisc_autoload` is 1, as it mostly is; `sock_ioctl` of net/socket.c).
const REQUESTS: [u32; 9] = [
    0x5412, 0x541c, 0x5423, 0x8940, 0x8941, 0x89a0, 0x89a1, 0x8982, 0x8983,
];
/// `PR_SCHED_CORE`: whoever has a cookie of its own has a core's other threads to itself, and its neighbours wait.
const CORES: [u32; 1] = [62];
/// `PER_LINUX`, `PER_LINUX32`, each with and without `UNAME26`, and the question for it.
const PERSONALITIES: [u32; 5] = [0, 8, 0x2_0000, 0x2_0008, u32::MAX];

/// What is allowed whatever its arguments are.
const ALLOWED: [&[c_long]; 8] = [
    FILES,
    DESCRIPTORS,
    MEMORY,
    PROCESSES,
    CREDENTIALS,
    TIME,
    SOCKETS,
    IPC,
];

const FILES: &[c_long] = &[
    libc::SYS_access,
    libc::SYS_chdir,
    libc::SYS_chmod,
    libc::SYS_chown,
    libc::SYS_chroot,
    libc::SYS_creat,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fchdir,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchmodat2,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_fgetxattr,
    libc::SYS_flistxattr,
    libc::SYS_fremovexattr,
    libc::SYS_fsetxattr,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_futimesat,
    libc::SYS_getcwd,
    libc::SYS_getdents,
    libc::SYS_getdents64,
    libc::SYS_getxattr,
    libc::SYS_inotify_add_watch,
    libc::SYS_inotify_init,
    libc::SYS_inotify_init1,
    libc::SYS_inotify_rm_watch,
    libc::SYS_fanotify_mark,
    libc::SYS_lchown,
    libc::SYS_lgetxattr,
    libc::SYS_link,
    libc::SYS_linkat,
    libc::SYS_listxattr,
    libc::SYS_llistxattr,
    libc::SYS_lremovexattr,
    libc::SYS_lsetxattr,
    libc::SYS_lstat,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_mknod,
    libc::SYS_mknodat,
    libc::SYS_name_to_handle_at,
    libc::SYS_newfstatat,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_removexattr,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_rmdir,
    libc::SYS_setxattr,
    libc::SYS_stat,
    libc::SYS_statfs,
    libc::SYS_statx,
    libc::SYS_symlink,
    libc::SYS_symlinkat,
    libc::SYS_syncfs,
    libc::SYS_truncate,
    libc::SYS_umask,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_utime,
    libc::SYS_utimensat,
    libc::SYS_utimes,
    // landlock: a job may shut itself in further.
    libc::SYS_landlock_add_rule,
    libc::SYS_landlock_create_ruleset,
    libc::SYS_landlock_restrict_self,
    // 6.8: statmount, listmount. 6.13: setxattrat, getxattrat, listxattrat, removexattrat.
    457,
    458,
    463,
    464,
    465,
    466,
];

const DESCRIPTORS: &[c_long] = &[
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_copy_file_range,
    libc::SYS_dup,
    libc::SYS_dup2,
    libc::SYS_dup3,
    libc::SYS_epoll_create,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd,
    libc::SYS_eventfd2,
    libc::SYS_fadvise64,
    libc::SYS_fallocate,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_flock,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_io_cancel,
    libc::SYS_io_destroy,
    libc::SYS_io_getevents,
    libc::SYS_io_setup,
    libc::SYS_io_submit,
    libc::SYS_lseek,
    libc::SYS_pipe,
    libc::SYS_pipe2,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pselect6,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_read,
    libc::SYS_readahead,
    libc::SYS_readv,
    libc::SYS_select,
    libc::SYS_sendfile,
    libc::SYS_signalfd,
    libc::SYS_signalfd4,
    libc::SYS_splice,
    libc::SYS_sync_file_range,
    libc::SYS_tee,
    libc::SYS_vmsplice,
    libc::SYS_write,
    libc::SYS_writev,
    // 4.18: io_pgetevents.
    333,
];

const MEMORY: &[c_long] = &[
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_memfd_create,
    libc::SYS_memfd_secret,
    libc::SYS_mincore,
    libc::SYS_mlock,
    libc::SYS_mlock2,
    libc::SYS_mlockall,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_mseal,
    libc::SYS_msync,
    libc::SYS_munlock,
    libc::SYS_munlockall,
    libc::SYS_munmap,
    libc::SYS_pkey_alloc,
    libc::SYS_pkey_free,
    libc::SYS_pkey_mprotect,
    libc::SYS_remap_file_pages,
    // 6.5: cachestat. 6.6: map_shadow_stack.
    451,
    453,
];

const PROCESSES: &[c_long] = &[
    libc::SYS_arch_prctl,
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fork,
    libc::SYS_futex,
    libc::SYS_futex_waitv,
    libc::SYS_get_robust_list,
    libc::SYS_get_thread_area,
    libc::SYS_getcpu,
    libc::SYS_getpgid,
    libc::SYS_getpgrp,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_getpriority,
    libc::SYS_getrlimit,
    libc::SYS_getrusage,
    libc::SYS_getsid,
    libc::SYS_gettid,
    libc::SYS_ioprio_get,
    libc::SYS_ioprio_set,
    libc::SYS_kill,
    libc::SYS_modify_ldt,
    libc::SYS_pause,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_send_signal,
    libc::SYS_process_mrelease,
    // Within the container only, and no way around the filter (since Linux 4.8).
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigpending,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigsuspend,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_sched_get_priority_max,
    libc::SYS_sched_get_priority_min,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_getattr,
    libc::SYS_sched_getparam,
    libc::SYS_sched_getscheduler,
    libc::SYS_sched_rr_get_interval,
    libc::SYS_sched_setaffinity,
    libc::SYS_sched_setattr,
    libc::SYS_sched_setparam,
    libc::SYS_sched_setscheduler,
    libc::SYS_sched_yield,
    libc::SYS_seccomp,
    libc::SYS_set_robust_list,
    libc::SYS_set_thread_area,
    libc::SYS_set_tid_address,
    libc::SYS_setpgid,
    libc::SYS_setpriority,
    libc::SYS_setrlimit,
    libc::SYS_setsid,
    libc::SYS_sigaltstack,
    libc::SYS_sysinfo,
    libc::SYS_tgkill,
    libc::SYS_tkill,
    libc::SYS_uname,
    libc::SYS_vfork,
    libc::SYS_wait4,
    libc::SYS_waitid,
    // 6.11: uretprobe, the kernel's own. 6.7: futex_wake, futex_wait, futex_requeue.
    335,
    454,
    455,
    456,
];

const CREDENTIALS: &[c_long] = &[
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getgroups,
    libc::SYS_getresgid,
    libc::SYS_getresuid,
    libc::SYS_getuid,
    libc::SYS_setfsgid,
    libc::SYS_setfsuid,
    libc::SYS_setgid,
    libc::SYS_setgroups,
    libc::SYS_setregid,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
    libc::SYS_setreuid,
    libc::SYS_setuid,
];

const TIME: &[c_long] = &[
    // Setting a clock wants a capability that no job has.
    libc::SYS_adjtimex,
    libc::SYS_alarm,
    libc::SYS_clock_adjtime,
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_getitimer,
    libc::SYS_getrandom,
    libc::SYS_gettimeofday,
    libc::SYS_nanosleep,
    libc::SYS_setitimer,
    libc::SYS_time,
    libc::SYS_timer_create,
    libc::SYS_timer_delete,
    libc::SYS_timer_getoverrun,
    libc::SYS_timer_gettime,
    libc::SYS_timer_settime,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_gettime,
    libc::SYS_timerfd_settime,
    libc::SYS_times,
];

const SOCKETS: &[c_long] = &[
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_listen,
    libc::SYS_recvfrom,
    libc::SYS_recvmmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
];

const IPC: &[c_long] = &[
    libc::SYS_mq_getsetattr,
    libc::SYS_mq_notify,
    libc::SYS_mq_open,
    libc::SYS_mq_timedreceive,
    libc::SYS_mq_timedsend,
    libc::SYS_mq_unlink,
    libc::SYS_msgctl,
    libc::SYS_msgget,
    libc::SYS_msgrcv,
    libc::SYS_msgsnd,
    libc::SYS_semctl,
    libc::SYS_semget,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_shmat,
    libc::SYS_shmctl,
    libc::SYS_shmdt,
    libc::SYS_shmget,
];

/// What becomes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    Allow,
    /// `EPERM`.
    Refuse,
    /// `ENOSYS`.
    Unknown,
    /// Nothing is done, and that succeeds.
    Nothing,
    /// Allowed if this argument, in its low 32 bits, has none of these bits.
    Without(u32, u32),
    /// Allowed if this argument is one of these, else this error.
    OneOf(u32, &'static [u32], Errno),
    /// Allowed if this argument is none of these, else this error.
    NoneOf(u32, &'static [u32], Errno),
    /// As [`socket`] says.
    Socket,
    /// As [`socket_option`] says.
    SocketOption,
}

/// The whole policy.
fn rule(number: u32) -> Rule {
    let call = c_long::from(number);
    match call {
        libc::SYS_clone => Rule::Without(0, NEW_NAMESPACES),
        libc::SYS_clone3 => Rule::Unknown,
        libc::SYS_ioctl => Rule::NoneOf(1, &REQUESTS, Errno::EPERM),
        // As of a kernel without it.
        libc::SYS_prctl => Rule::NoneOf(0, &CORES, Errno::EINVAL),
        // With the filter on, the init crosses into its user namespace yet (setup.rs); all other kinds it has by
        // then. For an app this leads nowhere: it needs CAP_SYS_ADMIN over the namespace that it enters, and a
        // process has rights over its own, which it cannot enter (EINVAL), and over those made in it, of which
        // there are none; over those around it and beside it never (`userns_install` in kernel/user_namespace.c,
        // `cap_capable` in security/commoncap.c).
        libc::SYS_setns => Rule::OneOf(1, &[NEW_USER], Errno::EPERM),
        // The init has its users' ids, and may do with less than it needs.
        libc::SYS_prlimit64 => Rule::NoneOf(0, &[1], Errno::EPERM),
        libc::SYS_personality => Rule::OneOf(0, &PERSONALITIES, Errno::EPERM),
        libc::SYS_socket => Rule::Socket,
        libc::SYS_setsockopt => Rule::SocketOption,
        // It writes out, and waits for, every file system of the host, and hangs as one of them does. Of what a
        // container writes nothing is kept over a crash of the host (`volatile`: root.rs). For a bind mount there
        // are syncfs(2) and fsync(2).
        libc::SYS_sync => Rule::Nothing,
        // No other one of our families has pairs; this is what the kernel says, but it makes the sockets first.
        libc::SYS_socketpair => Rule::OneOf(0, &[UNIX], Errno::EOPNOTSUPP),
        _ if ALLOWED.iter().any(|calls| calls.contains(&call)) => Rule::Allow,
        _ if AGE.iter().any(|known| known.contains(&number)) => Rule::Refuse,
        _ => Rule::Unknown,
    }
}

/// Puts the init behind the filter, and with it every job, which inherits it by `fork`: it costs a container
/// once what it would cost each job, and the init has no need any more of what it refuses either.
pub(super) fn shut() -> Result<(), SysError> {
    if !Measure::Filter.holds() {
        return Ok(());
    }
    let program = program();
    install(&program).context("seccomp", program.len())
}

/// The policy as a program of classic BPF (seccomp(2), linux/filter.h). Neighbours with the same rule are
/// one range, and ranges are found by halves, so that no call costs more than some thirty steps; calls
/// that are allowed whatever their arguments are the kernel (5.11) remembers, and asks no more.
fn program() -> Vec<sock_filter> {
    let past = AGE.iter().map(|known| known.end() + 1).max();
    let mut ranges: Vec<(u32, Rule)> = Vec::new();
    for number in 0..=past.unwrap_or(0) {
        let rule = rule(number);
        if ranges.last().is_none_or(|(_, last)| *last != rule) {
            ranges.push((number, rule));
        }
    }
    let head = [
        load(data::ARCHITECTURE),
        jump(libc::BPF_JEQ, ARCHITECTURE, 1, 0),
        answer(libc::SECCOMP_RET_KILL_PROCESS),
        load(data::NUMBER),
    ];
    [head.to_vec(), search(&ranges)].concat()
}

/// Where things are in `struct seccomp_data` (linux/seccomp.h), in bytes.
mod data {
    pub(super) const NUMBER: u32 = 0;
    pub(super) const ARCHITECTURE: u32 = 4;

    /// The low half of an argument; the machine is little-endian.
    pub(super) const fn argument(index: u32) -> u32 {
        16 + 8 * index
    }
}

/// Goes to the range that holds the loaded number. Both halves stay below 256 instructions, as far as a
/// jump reaches: the program has no input, so that the tests see every one there is.
fn search(ranges: &[(u32, Rule)]) -> Vec<sock_filter> {
    let (low, high) = ranges.split_at(ranges.len() / 2);
    match (low, high) {
        ([], [(_, rule)]) => verdict(*rule),
        (_, [(first, _), ..]) => {
            let (first, low) = (*first, search(low));
            let skip = [jump(libc::BPF_JGE, first, distance(low.len()), 0)];
            [skip.to_vec(), low, search(high)].concat()
        }
        (_, []) => vec![answer(libc::SECCOMP_RET_KILL_PROCESS)],
    }
}

fn verdict(rule: Rule) -> Vec<sock_filter> {
    let allow = answer(libc::SECCOMP_RET_ALLOW);
    match rule {
        Rule::Allow => vec![allow],
        Rule::Refuse => vec![error(Errno::EPERM)],
        Rule::Unknown => vec![error(Errno::ENOSYS)],
        // An error that is none (seccomp(2), SECCOMP_RET_ERRNO).
        Rule::Nothing => vec![answer(libc::SECCOMP_RET_ERRNO)],
        Rule::Without(index, bits) => vec![
            load(data::argument(index)),
            jump(libc::BPF_JSET, bits, 0, 1),
            error(Errno::EPERM),
            allow,
        ],
        Rule::OneOf(index, values, other) => listed(index, values, allow, error(other)),
        Rule::NoneOf(index, values, found) => listed(index, values, error(found), allow),
        Rule::Socket => socket(),
        Rule::SocketOption => socket_option(),
    }
}

/// Which sockets there are: (family, type, protocol), as the kernel takes them (socket(2), `inet_create` in
/// net/ipv4/af_inet.c, `inet6_create` in net/ipv6/af_inet6.c).
///
/// Of the internet's families TCP, MPTCP (262, which Go listens with), UDP and that of `ping`. Anything else, and
/// any of these with another's type, the kernel looks for among its modules (SCTP, DCCP, L2TP, SMC), with a
/// process of the host, before it asks who wants it. Raw and packet sockets want `CAP_NET_RAW`, which nobody inside has: rings for
/// packets, and what raw sockets keep, are on nobody's account, and fragments by hand fill the one store of the whole host.
///
/// Of netlink only `NETLINK_ROUTE`, that of `getifaddrs`(3), and `NETLINK_KOBJECT_UEVENT` (15), which libudev opens: what is
/// sent by `NETLINK_USERSOCK` (2) waits in the kernel's memory on nobody's account, and others load modules. (Answers that are
/// not read wait there, too: `net.core.rmem_max` bounds them for each socket.) What asks for `NETLINK_AUDIT` (PAM) and
/// `NETLINK_SOCK_DIAG` (`ss`) goes on without at this error.
fn socket() -> Vec<sock_filter> {
    const TYPES: u32 = 0xf;
    const STREAM: u32 = 1;
    const DATAGRAM: u32 = 2;
    const RAW: u32 = 3;
    let (allow, other) = (
        answer(libc::SECCOMP_RET_ALLOW),
        error(Errno::EPROTONOSUPPORT),
    );
    let protocols = |values: &[u32]| listed(2, values, allow, other);
    let internet = |datagrams: &[u32]| {
        let kind = [load(data::argument(1)), mask(TYPES)];
        [
            kind.to_vec(),
            when(RAW, vec![error(Errno::EPERM)]),
            when(STREAM, protocols(&[0, 6, 262])),
            when(DATAGRAM, protocols(datagrams)),
            vec![other],
        ]
        .concat()
    };
    [
        vec![load(data::argument(0))],
        when(UNIX, vec![allow]),
        when(INET, internet(&[0, 17, 1])),
        when(INET6, internet(&[0, 17, 58])),
        when(NETLINK, protocols(&[0, 15])),
        vec![error(Errno::EPERM)],
    ]
    .concat()
}

/// All options of sockets but those by which groups are joined (linux/in.h, linux/in6.h; `ENODEV` is what a host without a link for
/// them says). No group leads out of a container, the kernel counts them for nobody (`igmp_max_memberships` is for one socket), and
/// walks the list of all of a link's with the one lock (RTNL) that whoever makes a link on the host waits for: 50,000 groups and
/// some threads that join and leave keep it for a second at a time.
fn socket_option() -> Vec<sock_filter> {
    let (allow, refuse) = (answer(libc::SECCOMP_RET_ALLOW), error(Errno::ENODEV));
    let none_of = |options: &[u32]| listed(2, options, refuse, allow);
    [
        vec![load(data::argument(1))],
        // IPPROTO_IP: IP_ADD_MEMBERSHIP, IP_ADD_SOURCE_MEMBERSHIP; MCAST_JOIN_GROUP, MCAST_JOIN_SOURCE_GROUP.
        when(0, none_of(&[35, 39, 42, 46])),
        // IPPROTO_IPV6: IPV6_ADD_MEMBERSHIP, IPV6_JOIN_ANYCAST; the same two.
        when(41, none_of(&[20, 27, 42, 46])),
        vec![allow],
    ]
    .concat()
}

/// The answer `found` if the argument is one of these, else `other`.
fn listed(index: u32, values: &[u32], found: sock_filter, other: sock_filter) -> Vec<sock_filter> {
    let last = values.len();
    let compare =
        |(passed, value): (usize, &u32)| jump(libc::BPF_JEQ, *value, distance(last - passed), 0);
    let compare = values.iter().enumerate().map(compare);
    let load = std::iter::once(load(data::argument(index)));
    load.chain(compare).chain([other, found]).collect()
}

/// Goes into `block`, which answers in any case, if what is loaded is this value, else past it.
fn when(value: u32, block: Vec<sock_filter>) -> Vec<sock_filter> {
    let skip = jump(libc::BPF_JEQ, value, 0, distance(block.len()));
    [vec![skip], block].concat()
}

fn error(errno: Errno) -> sock_filter {
    answer(libc::SECCOMP_RET_ERRNO | (errno as i32).cast_unsigned())
}

fn distance(instructions: usize) -> u8 {
    u8::try_from(instructions).unwrap_or(u8::MAX)
}

fn load(offset: u32) -> sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset, 0, 0)
}

/// Keeps these bits of what is loaded.
fn mask(bits: u32) -> sock_filter {
    instruction(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, bits, 0, 0)
}

fn answer(value: u32) -> sock_filter {
    instruction(libc::BPF_RET | libc::BPF_K, value, 0, 0)
}

/// Goes `yes` instructions on if the comparison holds, else `no`.
fn jump(comparison: u32, value: u32, yes: u8, no: u8) -> sock_filter {
    instruction(libc::BPF_JMP | comparison | libc::BPF_K, value, yes, no)
}

fn instruction(code: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    // All codes have one byte.
    let code = u16::try_from(code).unwrap_or(u16::MAX);
    sock_filter { code, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use super::{ALLOWED, ARCHITECTURE, data, program};
    use nix::errno::Errno;
    use nix::libc::{self, c_long, sock_filter};
    use std::sync::LazyLock;

    static PROGRAM: LazyLock<Vec<sock_filter>> = LazyLock::new(program);

    /// What the filter says of a call.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Said {
        Allowed,
        Error(Errno),
        Nothing,
        Killed,
    }

    const EPERM: Said = Said::Error(Errno::EPERM);
    const ENOSYS: Said = Said::Error(Errno::ENOSYS);

    /// A machine for as much of classic BPF as the filter uses, and the steps it took.
    fn interpret(architecture: u32, number: u32, arguments: [u64; 6]) -> (Said, usize) {
        let (mut accumulator, mut at, mut steps) = (0_u32, 0, 0);
        loop {
            let one = PROGRAM[at];
            (at, steps) = (at + 1, steps + 1);
            let holds = match u32::from(one.code) {
                0x20 => {
                    accumulator = match one.k {
                        data::NUMBER => number,
                        data::ARCHITECTURE => architecture,
                        16..64 => {
                            let bytes = arguments.map(u64::to_le_bytes).concat();
                            let place = usize::try_from(one.k).unwrap() - 16;
                            u32::from_le_bytes(bytes[place..place + 4].try_into().unwrap())
                        }
                        offset => panic!("a load from {offset}"),
                    };
                    continue;
                }
                0x54 => {
                    accumulator &= one.k;
                    continue;
                }
                0x06 => return (said(one.k), steps),
                0x15 => accumulator == one.k,
                0x35 => accumulator >= one.k,
                0x45 => accumulator & one.k != 0,
                code => panic!("an unknown instruction {code:#x}"),
            };
            at += usize::from(if holds { one.jt } else { one.jf });
        }
    }

    fn said(answer: u32) -> Said {
        let errno = Errno::from_raw((answer & 0xffff).cast_signed());
        match answer & 0xffff_0000 {
            libc::SECCOMP_RET_ALLOW => Said::Allowed,
            libc::SECCOMP_RET_ERRNO if answer & 0xffff == 0 => Said::Nothing,
            libc::SECCOMP_RET_ERRNO => Said::Error(errno),
            libc::SECCOMP_RET_KILL_PROCESS => Said::Killed,
            other => panic!("an unknown answer {other:#x}"),
        }
    }

    fn ask(call: c_long, arguments: [u64; 6]) -> Said {
        interpret(ARCHITECTURE, u32::try_from(call).unwrap(), arguments).0
    }

    /// With the argument at `index`, and others that must not matter.
    fn ask_with(call: c_long, index: usize, argument: u64) -> Said {
        let mut arguments = [0x5412; 6];
        arguments[index] = argument;
        ask(call, arguments)
    }

    const OTHERS: [c_long; 11] = [
        libc::SYS_clone,
        libc::SYS_clone3,
        libc::SYS_ioctl,
        libc::SYS_personality,
        libc::SYS_prctl,
        libc::SYS_prlimit64,
        libc::SYS_setns,
        libc::SYS_setsockopt,
        libc::SYS_socket,
        libc::SYS_socketpair,
        libc::SYS_sync,
    ];

    #[test]
    fn every_number_has_the_answer_of_the_list_and_soon() {
        let mut slowest = 0;
        for number in 0..2048 {
            let call = c_long::from(number);
            if OTHERS.contains(&call) {
                continue;
            }
            let wanted = if ALLOWED.concat().contains(&call) {
                Said::Allowed
            } else if number <= 335 || (424..=466).contains(&number) {
                EPERM
            } else {
                ENOSYS
            };
            let (said, steps) = interpret(ARCHITECTURE, number, [0; 6]);
            assert_eq!(said, wanted, "{number}");
            slowest = slowest.max(steps);
        }
        assert!(slowest <= 13, "{slowest} steps");
        // The longest that is allowed: AF_INET6, SOCK_DGRAM, IPPROTO_ICMPV6.
        let socket = u32::try_from(libc::SYS_socket).unwrap();
        let (said, steps) = interpret(ARCHITECTURE, socket, [10, 2, 58, 0, 0, 0]);
        assert_eq!(said, Said::Allowed);
        assert!(steps <= 30, "{steps} steps");
        // No jump goes further than 255.
        let length = PROGRAM.len();
        assert!(length <= 256, "{length} instructions");
    }

    #[test]
    fn the_list_names_each_call_once() {
        let mut all = ALLOWED.concat();
        all.extend(OTHERS);
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
        assert_eq!(count, 309);
    }

    #[test]
    fn no_group_is_joined() {
        let joins = [
            (0, 35),
            (0, 39),
            (0, 42),
            (0, 46),
            (41, 20),
            (41, 27),
            (41, 42),
            (41, 46),
        ];
        for level in [0, 1, 6, 17, 41, 58] {
            for option in 0..80 {
                let wanted = if joins.contains(&(level, option)) {
                    Said::Error(Errno::ENODEV)
                } else {
                    Said::Allowed
                };
                for high in [0, 0xdead_beef_0000_0000] {
                    let arguments = [3, level | high, option | high, 0, 0, 0];
                    assert_eq!(
                        ask(libc::SYS_setsockopt, arguments),
                        wanted,
                        "{arguments:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn what_is_written_out_is_ones_own() {
        assert_eq!(ask(libc::SYS_sync, [0; 6]), Said::Nothing);
        for call in [libc::SYS_syncfs, libc::SYS_fsync, libc::SYS_fdatasync] {
            assert_eq!(ask(call, [0; 6]), Said::Allowed, "{call}");
        }
    }

    #[test]
    fn what_reaches_beyond_the_container_is_refused() {
        for call in [
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_mount,
            libc::SYS_umount2,
            libc::SYS_move_mount,
            libc::SYS_open_tree,
            libc::SYS_fsopen,
            libc::SYS_mount_setattr,
            libc::SYS_pivot_root,
            libc::SYS_bpf,
            libc::SYS_keyctl,
            libc::SYS_add_key,
            libc::SYS_request_key,
            libc::SYS_io_uring_setup,
            libc::SYS_io_uring_enter,
            libc::SYS_io_uring_register,
            libc::SYS_perf_event_open,
            libc::SYS_userfaultfd,
            libc::SYS_open_by_handle_at,
            libc::SYS_init_module,
            libc::SYS_finit_module,
            libc::SYS_delete_module,
            libc::SYS_kexec_load,
            libc::SYS_kexec_file_load,
            libc::SYS_reboot,
            libc::SYS_swapon,
            libc::SYS_syslog,
            libc::SYS_quotactl,
            libc::SYS_pidfd_getfd,
            libc::SYS_iopl,
            libc::SYS_ioperm,
            libc::SYS_settimeofday,
            libc::SYS_clock_settime,
            libc::SYS_sethostname,
            libc::SYS_acct,
            libc::SYS_fanotify_init,
        ] {
            assert_eq!(ask(call, [0; 6]), EPERM, "{call}");
        }
        assert_eq!(ask(libc::SYS_clone3, [0; 6]), ENOSYS);
    }

    #[test]
    fn arguments_are_taken_as_the_kernel_takes_them() {
        let high = 0xdead_beef_0000_0000;
        for (call, index, argument, wanted) in [
            // fork(2), pthread_create(3), and each kind of namespace.
            (libc::SYS_clone, 0, 0x0120_0011, Said::Allowed),
            (libc::SYS_clone, 0, 0x003d_0f00, Said::Allowed),
            (libc::SYS_clone, 0, 0x0002_0000, EPERM),
            (libc::SYS_clone, 0, 0x0200_0000, EPERM),
            (libc::SYS_clone, 0, 0x0400_0000, EPERM),
            (libc::SYS_clone, 0, 0x0800_0000, EPERM),
            (libc::SYS_clone, 0, 0x1000_0000, EPERM),
            (libc::SYS_clone, 0, 0x2000_0000, EPERM),
            (libc::SYS_clone, 0, 0x4000_0000, EPERM),
            // TCGETS, TIOCSTI, TIOCLINUX, TIOCSETD.
            (libc::SYS_ioctl, 1, 0x5401, Said::Allowed),
            (libc::SYS_ioctl, 1, 0x5412, EPERM),
            (libc::SYS_ioctl, 1, 0x541c, EPERM),
            (libc::SYS_ioctl, 1, 0x5423, EPERM),
            (libc::SYS_ioctl, 1, 0x8940, EPERM),
            (libc::SYS_ioctl, 1, 0x8983, EPERM),
            (libc::SYS_ioctl, 1, 0x8912, Said::Allowed),
            // CLONE_NEWUSER; with CLONE_NEWNS, as a process descriptor takes it; CLONE_NEWNET, any.
            (libc::SYS_setns, 1, 0x1000_0000, Said::Allowed),
            (libc::SYS_setns, 1, 0x1002_0000, EPERM),
            (libc::SYS_setns, 1, 0x4000_0000, EPERM),
            (libc::SYS_setns, 1, 0, EPERM),
            // PR_SET_NAME, PR_SCHED_CORE.
            (libc::SYS_prctl, 0, 15, Said::Allowed),
            (libc::SYS_prctl, 0, 62, Said::Error(Errno::EINVAL)),
            (libc::SYS_socket, 0, 1, Said::Allowed),
            // AF_PACKET.
            (libc::SYS_socket, 0, 17, EPERM),
            // AF_ALG, AF_VSOCK, AF_TIPC, AF_XDP.
            (libc::SYS_socket, 0, 38, EPERM),
            (libc::SYS_socket, 0, 40, EPERM),
            (libc::SYS_socket, 0, 30, EPERM),
            (libc::SYS_socket, 0, 44, EPERM),
            (libc::SYS_socketpair, 0, 1, Said::Allowed),
            (libc::SYS_socketpair, 0, 2, Said::Error(Errno::EOPNOTSUPP)),
            (libc::SYS_socketpair, 0, 30, Said::Error(Errno::EOPNOTSUPP)),
            (libc::SYS_personality, 0, 0, Said::Allowed),
            (libc::SYS_personality, 0, 0xffff_ffff, Said::Allowed),
            // ADDR_NO_RANDOMIZE, READ_IMPLIES_EXEC.
            (libc::SYS_personality, 0, 0x004_0000, EPERM),
            (libc::SYS_personality, 0, 0x040_0000, EPERM),
        ] {
            assert_eq!(
                ask_with(call, index, argument),
                wanted,
                "{call} {argument:#x}"
            );
            let said = ask_with(call, index, argument | high);
            assert_eq!(said, wanted, "{call} {argument:#x} with a high half");
        }
    }

    #[test]
    fn sockets_are_those_that_need_no_module_and_have_an_account() {
        const RAW: u64 = 3;
        let allowed = |family, kind, protocol| match (family, kind) {
            (16, _) => [0, 15].contains(&protocol),
            (2 | 10, 1) => [0, 6, 262].contains(&protocol),
            (2, 2) => [0, 1, 17].contains(&protocol),
            (10, 2) => [0, 17, 58].contains(&protocol),
            _ => false,
        };
        let families = [2, 10, 16].into_iter();
        // SCTP has a type (5) of its own, and so has DCCP (6).
        let kinds = families.flat_map(|family| (1..=6).map(move |kind| (family, kind)));
        // NETLINK_USERSOCK is 2, NETLINK_SOCK_DIAG 4, DCCP 33, L2TP 115, UDP-Lite 136, SMC 256.
        let protocols = [0, 1, 2, 4, 6, 15, 17, 33, 58, 115, 132, 136, 255, 256, 262];
        let high = 0xdead_beef_0000_0000;
        for (family, kind) in kinds {
            for protocol in protocols {
                let wanted = if allowed(family, kind, protocol) {
                    Said::Allowed
                } else if matches!((family, kind), (2 | 10, RAW)) {
                    EPERM
                } else {
                    Said::Error(Errno::EPROTONOSUPPORT)
                };
                // SOCK_NONBLOCK | SOCK_CLOEXEC
                for arguments in [
                    [family, kind, protocol, 1, 2, 3],
                    [
                        family | high,
                        kind | 0x8_0800 | high,
                        protocol | high,
                        0,
                        0,
                        0,
                    ],
                ] {
                    assert_eq!(ask(libc::SYS_socket, arguments), wanted, "{arguments:?}");
                }
            }
        }
    }

    #[test]
    fn other_entries_are_shut() {
        // i386 and arm: getpid of one is mknod of the other.
        for architecture in [0x4000_0003, 0xc000_00b7, 0] {
            assert_eq!(interpret(architecture, 20, [0; 6]).0, Said::Killed);
        }
        // x32, and what a tracer makes of a skipped call.
        for number in [0x4000_0000, 0x4000_0000 + 257, u32::MAX] {
            assert_eq!(interpret(ARCHITECTURE, number, [0; 6]).0, ENOSYS);
        }
    }
}
