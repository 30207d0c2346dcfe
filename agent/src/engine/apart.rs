//! Unpacking what a container sends, in a process that has nothing of the host but one directory.
//!
//! `container::copy` lets no entry lead out of the directory that was named. Should that ever be wrong, there
//! is nothing out there: the directory is this process's root, it sees no process, network or memory of the
//! host, and has no descriptor but the stream and its report and no right but to write there (ADR 21).

use super::copy::{CopyError, Patient, shows};
use container::copy::{Limits, destination, unpack_of};
use container::fault::{Context, SysError};
use container::status::Status;
use container::sys::caps::{self, Set};
use container::sys::clone::{Side, into_namespaces};
use container::sys::{pidfd, process};
use nix::fcntl::OFlag;
use nix::sched::CloneFlags;
use nix::sys::prctl::{set_name, set_no_new_privs, set_pdeathsig};
use nix::sys::signal::Signal;
use nix::unistd::{chroot, dup2_stderr, fchdir, pipe2};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Most bytes of a line of the report: whoever writes it has read what a container sent.
const MAX_LINE: u64 = 4096;

/// Most lines that are passed on.
const MAX_COMPLAINTS: u64 = 1000;

/// What hears of each thing that was passed over.
pub type Complain<'a> = &'a mut dyn FnMut(String);

/// Makes what `stream` holds at `path` of this host, as [`unpack_of`] does, in a process of its own. To be
/// called while this one has one thread: it forks.
///
/// # Errors
/// [`CopyError`]: what `unpack_of` says, that `path` is a symlink (a copy before this one may have made it, and
/// whoever is in the container then chose where it leads), or that there can be no such process. What was made
/// until then stays.
pub fn unpack(
    asked: &Path,
    stream: &mut Patient,
    path: &Path,
    limits: Limits,
    complain: Complain<'_>,
) -> Result<(), CopyError> {
    // As everywhere, a slash at the end asks for what it leads to.
    if !path.as_os_str().as_bytes().ends_with(b"/") && path.is_symlink() {
        let what = path.display();
        let why = format!("\"{what}\" is a symlink: name what it leads to, or end it with a slash");
        return Err(CopyError::Apart(why));
    }
    let (directory, renamed) = destination(path)?;
    let path = Path::new("/").join(renamed.unwrap_or_default());
    let kept = stream.as_raw_fd();
    apart(&directory, kept, complain, |complain| {
        let done = unpack_of(asked, stream, &path, limits, complain);
        done.map(drop).map_err(|fault| fault.to_string())
    })
}

/// Runs `work` in such a process. What it says is heard line by line, and its error is this one's.
fn apart(
    root: &OwnedFd,
    kept: RawFd,
    complain: Complain<'_>,
    work: impl FnOnce(Complain<'_>) -> Result<(), String>,
) -> Result<(), CopyError> {
    // A mount namespace would keep whatever is mounted on the host from going.
    let namespaces = CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP;
    let (report, to) = pipe2(OFlag::O_CLOEXEC).context("pipe2", "report")?;
    let Side::Parent { pidfd, .. } = into_namespaces(namespaces, None)? else {
        // What a panic says goes there, too.
        let heard = dup2_stderr(&to).context("dup2", "report");
        let mut report = File::from(to);
        let shut_in = heard.and_then(|()| shut_in(root, &mut [2, kept, report.as_raw_fd()]));
        // Nobody may be there to hear it.
        let mut say = |line: String| drop(writeln!(report, "{line}"));
        let done = shut_in.map_err(|error| error.to_string());
        let Err(why) = done.and_then(|()| work(&mut say)) else {
            process::exit_now(0)
        };
        say(why);
        process::exit_now(1)
    };
    drop(to);
    let last = listen(File::from(report), complain);
    match (pidfd::wait(&pidfd)?, last) {
        (Status::Exited(0), last) => {
            last.into_iter().for_each(complain);
            Ok(())
        }
        (Status::Exited(_), Some(why)) => Err(CopyError::Apart(why)),
        (Status::Signaled(signal), _) => {
            let why = format!("signal {signal} ended the process that unpacked");
            Err(CopyError::Apart(why))
        }
        (Status::Exited(_) | Status::Started { .. } | Status::Failed { .. }, _) => {
            let why = "the process that unpacked failed without a word";
            Err(CopyError::Apart(why.to_owned()))
        }
    }
}

/// Gives up all but a root directory and these descriptors. Writing where only others may, and replacing what
/// is theirs, is kept: whoever copies is root, and may name a directory of somebody else's.
fn shut_in(root: &OwnedFd, kept: &mut [RawFd]) -> Result<(), SysError> {
    /// `CAP_DAC_OVERRIDE` and `CAP_FOWNER` (linux/capability.h).
    const KEPT: Set = Set(1 << 1 | 1 << 3);
    set_pdeathsig(Signal::SIGKILL).context("prctl", "PR_SET_PDEATHSIG")?;
    set_name(c"unpack").context("prctl", "PR_SET_NAME")?;
    fchdir(root).context("fchdir", "the directory")?;
    chroot(".").context("chroot", "the directory")?;
    process::close_all_but(kept).context("close_range", "all but three")?;
    process::new_session_keyring().context("keyctl", "KEYCTL_JOIN_SESSION_KEYRING")?;
    caps::unbound(Set(u64::MAX).without(KEPT)).context("prctl", "PR_CAPBSET_DROP")?;
    caps::limit(KEPT).context("capset", "unpack")?;
    set_no_new_privs().context("prctl", "PR_SET_NO_NEW_PRIVS")
}

/// Passes on each line but the last, which comes back; as a terminal can bear them, and not without end.
fn listen(report: impl Read, complain: Complain<'_>) -> Option<String> {
    let mut report = BufReader::new(report);
    let (mut last, mut told) = (None, 0);
    loop {
        let mut line = Vec::new();
        let read = report.by_ref().take(MAX_LINE).read_until(b'\n', &mut line);
        if !read.is_ok_and(|length| length > 0) {
            break;
        }
        let line = String::from_utf8_lossy(&line);
        if let Some(line) = last.replace(line.chars().filter(shows).collect()) {
            told += 1;
            if told <= MAX_COMPLAINTS {
                complain(line);
            }
        }
    }
    if told > MAX_COMPLAINTS {
        complain(format!("and {} more", told - MAX_COMPLAINTS));
    }
    last
}

#[cfg(test)]
mod tests {
    use super::{CopyError, apart};
    use container::sys::caps::{self, Set, Sets};
    use container::sys::pidfd;
    use nix::errno::Errno;
    use nix::fcntl::{OFlag, open};
    use nix::sched::{CloneFlags, unshare};
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, connect, socket};
    use nix::sys::stat::{Mode, SFlag, makedev, mknod};
    use nix::unistd::{chdir, chroot, sethostname, setuid};
    use std::fs;
    use std::net::TcpListener;
    use std::os::fd::{AsRawFd, OwnedFd};
    use std::path::PathBuf;

    fn scratch(name: &str) -> (PathBuf, OwnedFd) {
        let path = std::env::temp_dir().join(format!("ostler-apart-{}-{name}", std::process::id()));
        fs::create_dir(&path).unwrap();
        let root = fs::File::open(&path).unwrap().into();
        (path, root)
    }

    /// What `work` says and how it ends.
    fn run(
        root: &OwnedFd,
        work: impl FnOnce(&mut dyn FnMut(String)) -> Result<(), String>,
    ) -> (Vec<String>, Result<(), CopyError>) {
        let mut said = Vec::new();
        let kept = root.as_raw_fd();
        let end = apart(root, kept, &mut |line| said.push(line), work);
        (said, end)
    }

    /// How many descriptors are open: new ones get the lowest numbers that are free.
    fn descriptors() -> usize {
        const MANY: usize = 100;
        let new = (0..MANY).map(|_| fs::File::open("/").unwrap());
        let new: Vec<fs::File> = new.collect();
        let highest = new.iter().map(AsRawFd::as_raw_fd).max().unwrap();
        usize::try_from(highest).unwrap() + 1 - MANY
    }

    /// Everything that reaches out, and whether it does.
    fn reach_out(parent: i32, port: u16) -> Vec<(&'static str, Result<(), Errno>)> {
        let _ = chdir("../../../../../../..");
        let read = |path: &str| open(path, OFlag::O_RDONLY, Mode::empty()).map(drop);
        let device = || mknod("device", SFlag::S_IFBLK, Mode::S_IRWXU, makedev(7, 0));
        let dial = || {
            let stream = SockType::Stream;
            let socket = socket(AddressFamily::Inet, stream, SockFlag::empty(), None)?;
            connect(socket.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, port))
        };
        vec![
            ("read a file of the host", read("etc/passwd")),
            ("read /proc", read("/proc/self/status")),
            ("leave the root", chroot("..")),
            ("have mounts of its own", unshare(CloneFlags::CLONE_NEWNS)),
            ("have users of its own", unshare(CloneFlags::CLONE_NEWUSER)),
            ("make a device", device()),
            ("rename the host", sethostname("mine")),
            ("become another user", setuid(1000.into())),
            (
                "know its parent",
                pidfd::open(parent).map(drop).map_err(|error| error.errno),
            ),
            ("dial", dial()),
        ]
    }

    #[test]
    fn whoever_unpacks_reaches_nothing_but_its_directory() {
        let (path, root) = scratch("reach");
        fs::create_dir(path.join("theirs")).unwrap();
        std::os::unix::fs::chown(path.join("theirs"), Some(12345), Some(12345)).unwrap();
        let parent = i32::try_from(std::process::id()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (said, end) = run(&root, |say| {
            for (what, done) in reach_out(parent, port) {
                if done.is_ok() {
                    say(format!("it can {what}"));
                }
            }
            let kept = Set(1 << 1 | 1 << 3);
            if caps::held() != Ok(Sets::of(kept)) {
                say(format!("{:?}", caps::held()));
            }
            // The one that was to be kept, and its report, which is its standard error, too.
            if descriptors() != 3 {
                say(format!("{} descriptors", descriptors()));
            }
            fs::write("/theirs/file", "mine").map_err(|error| error.to_string())
        });
        assert_eq!(
            (said, end.map_err(|error| error.to_string())),
            (vec![], Ok(()))
        );
        assert_eq!(fs::read(path.join("theirs/file")).unwrap(), b"mine");
        fs::remove_dir_all(path).unwrap();
    }

    #[test]
    fn what_it_says_is_heard_as_a_terminal_can_bear_it_and_its_end_is_known() {
        let (path, root) = scratch("said");
        let said = run(&root, |say| {
            say("one \x1b[31mline".to_owned());
            say("two".to_owned());
            Err("why".to_owned())
        });
        let lines = ["one [31mline", "two"].map(str::to_owned).to_vec();
        assert_eq!(
            (said.0, said.1.unwrap_err().to_string()),
            (lines, "why".to_owned())
        );
        fs::remove_dir(path).unwrap();
    }
}
