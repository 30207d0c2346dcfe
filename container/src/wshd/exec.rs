//! The way of a job from `fork` to `execve`, in its own process.

use super::measure::Measure;
use super::users::User;
use crate::copy;
use crate::job::{Copy, JobRequest, Rlimit};
use crate::status::Step;
use crate::sys::seccomp::{FILTERED, mode};
use crate::sys::{caps, process, terminal};
use nix::errno::Errno;
use nix::libc;
use nix::sys::prctl::{get_no_new_privs, set_name, set_no_new_privs};
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{
    Gid, Uid, chdir, dup2_stderr, dup2_stdin, dup2_stdout, execve, getcwd, getresgid, getresuid,
    setgroups, setresgid, setresuid, setsid, write,
};
use std::convert::Infallible;
use std::ffi::{CString, OsStr};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;

/// The limit on core files of a job that asks for no other. No core file is so small, so there is none (fs/coredump.c,
/// `min_coredump`); and where `core_pattern` is a pipe this is the only limit that the kernel looks at: with any other, 0
/// included, it starts the program behind the pipe, as root of the host and outside of what limits the container
/// (`do_coredump`; `coredump_pipe` since Linux 6.17). Who lowers its own to 0 gets that program.
const NO_CORE: Rlimit = Rlimit {
    resource: libc::RLIMIT_CORE,
    soft: 1,
    hard: 1,
};

const ROOT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const USER_PATH: &[u8] = b"/usr/local/bin:/usr/bin:/bin";

/// Whether a job's descriptors are a terminal of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Session {
    /// They are not.
    Plain,
    /// They are, and it becomes the controlling one.
    Terminal,
}

/// Everything that is decided before the fork.
#[derive(Debug)]
pub(super) struct Plan {
    user: User,
    argv: Vec<CString>,
    env: Vec<CString>,
    /// Where the program may be, in the order in which it is tried.
    candidates: Vec<CString>,
    cwd: Option<Vec<u8>>,
    rlimits: Vec<Rlimit>,
    umask: Mode,
    stdio: [OwnedFd; 3],
    session: Session,
    copy: Option<Copy>,
}

impl Plan {
    /// Decides what the request left open.
    pub(super) fn new(
        request: JobRequest,
        user: User,
        stdio: [OwnedFd; 3],
        session: Session,
    ) -> Result<Self, Errno> {
        let strings = |all: Vec<Vec<u8>>| {
            all.into_iter()
                .map(CString::new)
                .collect::<Result<Vec<_>, _>>()
                .map_err(|_| Errno::EINVAL)
        };
        let argv = if request.argv.is_empty() {
            vec![user.shell.clone()]
        } else {
            request.argv
        };
        let env = environment(request.env, &user);
        let program = argv.first().map(Vec::as_slice).unwrap_or_default();
        let candidates = strings(candidates(
            program,
            variable(&env, b"PATH=").unwrap_or_default(),
        ))?;
        Ok(Self {
            argv: strings(argv)?,
            env: strings(env)?,
            candidates,
            cwd: request.cwd,
            rlimits: limits(request.rlimits),
            umask: Mode::from_bits_truncate(request.umask.unwrap_or(0o022)),
            stdio,
            session,
            user,
            copy: request.copy,
        })
    }
}

/// [`NO_CORE`] where nothing is said of core files.
fn limits(mut limits: Vec<Rlimit>) -> Vec<Rlimit> {
    if !limits.iter().any(|it| it.resource == NO_CORE.resource) {
        limits.push(NO_CORE);
    }
    limits
}

/// `HOME`, `USER` and `PATH` where they are missing.
fn environment(mut env: Vec<Vec<u8>>, user: &User) -> Vec<Vec<u8>> {
    let path = if user.uid == 0 { ROOT_PATH } else { USER_PATH };
    let defaults: [(&[u8], &[u8]); 3] = [
        (b"HOME=", &user.home),
        (b"USER=", &user.name),
        (b"PATH=", path),
    ];
    for (name, value) in defaults {
        if variable(&env, name).is_none() {
            env.push([name, value].concat());
        }
    }
    env
}

fn variable<'a>(env: &'a [Vec<u8>], name: &[u8]) -> Option<&'a [u8]> {
    env.iter().find_map(|variable| variable.strip_prefix(name))
}

/// As execvp(3): a program with a `/` is itself, others are searched in `path`; an empty part of it is
/// the working directory.
fn candidates(program: &[u8], path: &[u8]) -> Vec<Vec<u8>> {
    if program.is_empty() || program.contains(&b'/') {
        return vec![program.to_vec()];
    }
    path.split(|byte| *byte == b':')
        .map(|directory| {
            if directory.is_empty() {
                &b"."[..]
            } else {
                directory
            }
        })
        .map(|directory| [directory, b"/", program].concat())
        .collect()
}

/// Executes the plan. Comes back only when it failed; then `errors` has been told.
pub(super) fn execute(plan: &Plan, errors: &OwnedFd) {
    let Err((step, errno)) = attempt(plan);
    // No more than PIPE_BUF, so it is written whole; nobody is left to be told of a failure.
    let _ = write(errors, &report(step, errno));
}

/// What goes through the error pipe: the step, then the errno.
fn report(step: Step, errno: Errno) -> [u8; 5] {
    let [a, b, c, d] = (errno as i32).to_le_bytes();
    [step as u8, a, b, c, d]
}

/// Reads what [`execute`] wrote.
pub(super) fn read_report(bytes: &[u8]) -> Option<(Step, i32)> {
    let [step, errno @ ..] = bytes else {
        return None;
    };
    Some((
        Step::from_number(*step)?,
        i32::from_le_bytes(errno.try_into().ok()?),
    ))
}

fn attempt(plan: &Plan) -> Result<Infallible, (Step, Errno)> {
    let at = |step: Step| move |errno: Errno| (step, errno);
    let [stdin, stdout, stderr] = &plan.stdio;

    setsid().map_err(at(Step::Session))?;
    if plan.session == Session::Terminal {
        terminal::control(stdin).map_err(at(Step::Session))?;
    }
    dup2_stdin(stdin).map_err(at(Step::Descriptors))?;
    dup2_stdout(stdout).map_err(at(Step::Descriptors))?;
    dup2_stderr(stderr).map_err(at(Step::Descriptors))?;
    for limit in &plan.rlimits {
        process::set_rlimit(limit).map_err(at(Step::Rlimit))?;
    }
    drop_privileges(&plan.user).map_err(at(Step::Privileges))?;
    // As the user: a directory that is closed to it stays closed.
    enter(plan).map_err(at(Step::Directory))?;
    umask(plan.umask);
    process::default_signals();
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)
        .map_err(at(Step::Session))?;
    if let Some(copy) = &plan.copy {
        copy_instead(copy).map_err(at(Step::Descriptors))?;
    }
    if Measure::JobDescriptors.holds() {
        process::close_on_exec_from(3).map_err(at(Step::Descriptors))?;
    }
    Err((Step::Exec, exec(plan)))
}

/// Our own code goes on, with the user's rights: so it must have nothing else of the init's either. That
/// the error pipe closes means to the init what it means after an `exec`.
fn copy_instead(job: &Copy) -> Result<Infallible, Errno> {
    // Not dumpable since the init is not: nobody of the container looks into it or takes its descriptors.
    set_name(c"copy")?;
    process::close_from(3)?;
    process::exit_now(copy::run(job).into())
}

/// Groups, then ids, then capabilities, then the promise never to gain any; and a second look, at the filter
/// too, which is the init's.
fn drop_privileges(user: &User) -> Result<(), Errno> {
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    let groups: Vec<Gid> = user.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    let few = Measure::Capabilities.holds();
    if few && Measure::Bounding.holds() {
        // Of those that the init has left itself: it has no others to give on.
        caps::unbound(caps::Set::INIT.without(capabilities(user)))?;
    }
    if Measure::Groups.holds() {
        setgroups(&groups)?;
    }
    if Measure::GroupId.holds() {
        setresgid(gid, gid, gid)?;
    }
    if Measure::UserId.holds() {
        setresuid(uid, uid, uid)?;
    }
    if few {
        caps::limit(capabilities(user))?;
    }
    if Measure::NoNewPrivileges.holds() {
        set_no_new_privs()?;
    }
    if !Measure::SecondLook.holds() || Rights::held()? == Rights::of(user) {
        Ok(())
    } else {
        Err(Errno::EPERM)
    }
}

fn capabilities(user: &User) -> caps::Set {
    if user.uid == 0 {
        caps::Set::ROOT
    } else {
        caps::Set::NONE
    }
}

/// All that the kernel goes by when it lets a process do something.
#[derive(Debug, PartialEq, Eq)]
struct Rights {
    /// Real, effective, saved.
    uids: [u32; 3],
    /// The same.
    gids: [u32; 3],
    /// The supplementary ones, in ascending order.
    groups: Vec<u32>,
    capabilities: caps::Sets,
    no_new_privileges: bool,
    seccomp: i32,
}

impl Rights {
    /// Those that a job of this user has.
    fn of(user: &User) -> Self {
        let mut groups = user.groups.clone();
        groups.sort_unstable();
        Self {
            uids: [user.uid; 3],
            gids: [user.gid; 3],
            groups,
            capabilities: caps::Sets::of(capabilities(user)),
            no_new_privileges: true,
            seccomp: FILTERED,
        }
    }

    /// Those that this process has.
    fn held() -> Result<Self, Errno> {
        let (uids, gids) = (getresuid()?, getresgid()?);
        Ok(Self {
            uids: [uids.real, uids.effective, uids.saved].map(Uid::as_raw),
            gids: [gids.real, gids.effective, gids.saved].map(Gid::as_raw),
            groups: process::groups()?,
            capabilities: caps::held()?,
            no_new_privileges: get_no_new_privs()?,
            seccomp: mode()?,
        })
    }
}

fn enter(plan: &Plan) -> Result<(), Errno> {
    match &plan.cwd {
        Some(cwd) => chdir(OsStr::from_bytes(cwd))?,
        None => chdir(OsStr::from_bytes(&plan.user.home)).or_else(|_| chdir("/"))?,
    }
    // A directory outside of the root shows as "(unreachable)…", or not at all (CVE-2024-21626).
    if !Measure::Directory.holds() || getcwd()?.is_absolute() {
        Ok(())
    } else {
        Err(Errno::ENOENT)
    }
}

/// Tries the candidates; the errno is that of the most telling refusal, as execvp(3) does.
fn exec(plan: &Plan) -> Errno {
    let mut telling = Errno::ENOENT;
    for program in &plan.candidates {
        let Err(errno) = execve(program, &plan.argv, &plan.env);
        if errno == Errno::EACCES {
            telling = errno;
        } else if !matches!(errno, Errno::ENOENT | Errno::ENOTDIR) {
            return errno;
        }
    }
    telling
}

#[cfg(test)]
mod tests {
    use super::{Rights, candidates, environment, read_report, report};
    use crate::status::Step;
    use crate::sys::process;
    use crate::wshd::users::User;
    use nix::errno::Errno;
    use nix::sys::prctl::set_no_new_privs;
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{Gid, Pid, Uid, setgroups, setresgid, setresuid};

    #[test]
    fn a_program_is_searched_as_execvp_does() {
        let names = |program: &[u8], path: &[u8]| {
            let all = candidates(program, path).into_iter();
            all.map(|name| String::from_utf8(name).unwrap())
                .collect::<Vec<_>>()
        };
        assert_eq!(names(b"./run", b"/bin"), ["./run"]);
        assert_eq!(
            names(b"sh", b"/bin::/usr/bin"),
            ["/bin/sh", "./sh", "/usr/bin/sh"]
        );
        assert_eq!(names(b"", b"/bin"), [""]);
    }

    #[test]
    fn only_what_is_missing_is_added() {
        let user = User {
            name: b"vcap".to_vec(),
            uid: 2000,
            gid: 2000,
            groups: vec![2000],
            home: b"/home/vcap".to_vec(),
            shell: b"/bin/sh".to_vec(),
        };
        let given = vec![b"PATH=/own".to_vec(), b"X=1".to_vec()];
        let expected: [&[u8]; 4] = [b"PATH=/own", b"X=1", b"HOME=/home/vcap", b"USER=vcap"];
        assert_eq!(environment(given, &user), expected);
    }

    #[test]
    fn every_id_is_looked_at() {
        let id = |id: u32| (Uid::from_raw(id), Gid::from_raw(id));
        let look = || {
            setgroups(&[id(7).1, id(5).1])?;
            setresgid(id(11).1, id(12).1, id(13).1)?;
            setresuid(id(21).0, id(22).0, id(23).0)?;
            set_no_new_privs()?;
            Rights::held()
        };
        let child = process::fork(|| {
            let seen = look().unwrap();
            let wanted = Rights {
                uids: [21, 22, 23],
                gids: [11, 12, 13],
                groups: vec![5, 7],
                no_new_privileges: true,
                seccomp: 0,
                capabilities: seen.capabilities,
            };
            process::exit_now(u8::from(seen != wanted).into());
        });
        let ended = waitpid(Pid::from_raw(child.unwrap()), None);
        assert!(matches!(ended, Ok(WaitStatus::Exited(_, 0))), "{ended:?}");
    }

    #[test]
    fn a_failure_comes_through_its_pipe() {
        let bytes = report(Step::Exec, Errno::EACCES);
        assert_eq!(
            read_report(&bytes),
            Some((Step::Exec, Errno::EACCES as i32))
        );
        for foreign in [&b""[..], b"x", &[99, 1, 0, 0, 0], &[1; 6]] {
            assert_eq!(read_report(foreign), None);
        }
    }
}
