//! Whom the kernel killed for memory, from its log.
//!
//! The counters of a control group say how often; only the log says who. A kill leaves two records:
//!
//! ```text
//! 6,812,91033245,-;oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0,oom_memcg=/ostler/h,task_memcg=/ostler/h,task=ruby,pid=4711,uid=10001
//! 3,813,91033310,-;Memory cgroup out of memory: Killed process 4711 (ruby) total-vm:…kB, …, UID:10001 pgtables:…kB oom_score_adj:0
//! ```
//!
//! The first is rate-limited (10 in 5 s for the whole host) and absent for the other victims of a group
//! kill; the second comes with every kill (mm/oom_kill.c, the same from 5.9 to 6.18). So the second is
//! the event, and the first tells more about it if it was there.
//!
//! A command name is up to 15 bytes of the victim's choice, and may look like anything above; each field
//! is therefore searched from the side that no victim controls.

use super::watched;
use nix::unistd::read;
use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// One process that the kernel killed for memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OomKill {
    /// The record's sequence number, which only grows until the next boot.
    pub seq: u64,
    /// When, in microseconds since boot, by the clock of the kernel's log; roughly monotonic.
    pub time_us: u64,
    /// `CONSTRAINT_MEMCG`: a group hit its limit. `CONSTRAINT_NONE`, `_CPUSET` or `_MEMORY_POLICY`: the
    /// host ran out.
    pub constraint: String,
    /// The group whose limit was hit, as a path from the root of the hierarchy, which need not be the
    /// victim's own. Empty if the host ran out, or the kernel did not say.
    pub oom_memcg: String,
    /// The victim's group; empty if the kernel did not say.
    pub task_memcg: String,
    /// The victim's command name, what is not UTF-8 in it replaced.
    pub comm: String,
    /// The victim, as the *initial* pid namespace counts.
    pub pid: i32,
    /// Its real user, as the initial user namespace counts.
    pub uid: u32,
}

/// What the log had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A process was killed.
    Kill(OomKill),
    /// The kernel overwrote records that were not read: kills may have been missed.
    Overrun,
    /// Everything that the log has was read, up to the record with this sequence number.
    Drained(u64),
}

/// A record that matters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Line {
    /// `oom-kill:…`: the victim was chosen. The kill follows.
    Chosen(OomKill),
    /// `… Killed process …`: it was killed. Both groups are empty, the constraint is a guess from the
    /// words: `CONSTRAINT_MEMCG` or `CONSTRAINT_NONE`.
    Killed(OomKill),
}

/// Reads one record of `/dev/kmsg` (Documentation/ABI/testing/dev-kmsg):
/// `priority,seq,microseconds,flags[,…];text`, escaped as `\x0a`, then lines of properties.
///
/// `None` for whatever does not tell of a kill, and for what a process wrote into the log: the kernel
/// does not let it use facility 0.
#[must_use]
pub fn parse(record: &[u8]) -> Option<Line> {
    let record = record.split(|byte| *byte == b'\n').next()?;
    let (head, text) = split_once(record, b";")?;
    let mut head = std::str::from_utf8(head).ok()?.split(',');
    let priority: u32 = head.next()?.parse().ok()?;
    let (seq, time_us) = (head.next()?.parse().ok()?, head.next()?.parse().ok()?);
    let from_kernel = priority < 8;
    if !from_kernel {
        return None;
    }
    let text = unescape(text);
    let line = chosen(&text)
        .map(Line::Chosen)
        .or_else(|| killed(&text).map(Line::Killed))?;
    Some(match line {
        Line::Chosen(kill) => Line::Chosen(OomKill {
            seq,
            time_us,
            ..kill
        }),
        Line::Killed(kill) => Line::Killed(OomKill {
            seq,
            time_us,
            ..kill
        }),
    })
}

/// `oom-kill:constraint=…,oom_memcg=…,task_memcg=…,task=…,pid=…,uid=…`, or `,global_oom` in place of
/// the first group. Everything before `task=` is written by the host, everything after the name are numbers.
fn chosen(text: &[u8]) -> Option<OomKill> {
    let text = text.strip_prefix(b"oom-kill:constraint=")?;
    let (constraint, text) = split_once(text, b",")?;
    let (before, text) = split_once(text, b",task_memcg=")?;
    let oom_memcg = split_once(before, b",oom_memcg=").map_or(&[][..], |(_, group)| group);
    let (task_memcg, text) = split_once(text, b",task=")?;
    let (text, uid) = rsplit_once(text, b",uid=")?;
    let (comm, pid) = rsplit_once(text, b",pid=")?;
    Some(OomKill {
        seq: 0,
        time_us: 0,
        constraint: lossy(constraint),
        oom_memcg: lossy(oom_memcg),
        task_memcg: lossy(task_memcg),
        comm: lossy(comm),
        pid: number(pid)?,
        uid: number(uid)?,
    })
}

/// `Out of memory: Killed process 1 (comm) total-vm:…, UID:0 …`, also with `Memory cgroup out of
/// memory` or `Out of memory (oom_kill_allocating_task)` in front.
fn killed(text: &[u8]) -> Option<OomKill> {
    let (why, text) = split_once(text, b": Killed process ")?;
    let constraint = match why {
        b"Memory cgroup out of memory" => "CONSTRAINT_MEMCG",
        b"Out of memory" | b"Out of memory (oom_kill_allocating_task)" => "CONSTRAINT_NONE",
        _ => return None,
    };
    let (pid, text) = split_once(text, b" (")?;
    let (comm, text) = rsplit_once(text, b") total-vm:")?;
    let (_, text) = split_once(text, b" UID:")?;
    let (uid, _) = split_once(text, b" ")?;
    Some(OomKill {
        seq: 0,
        time_us: 0,
        constraint: constraint.to_owned(),
        oom_memcg: String::new(),
        task_memcg: String::new(),
        comm: lossy(comm),
        pid: number(pid)?,
        uid: number(uid)?,
    })
}

/// A reader of the kernel's log.
#[derive(Debug)]
pub struct Kmsg {
    file: AsyncFd<OwnedFd>,
    reader: Reader,
    /// Read, and not told yet.
    events: VecDeque<Event>,
}

/// Makes events of records.
#[derive(Debug, Default)]
struct Reader {
    /// Whether a record was read.
    begun: bool,
    /// The last record's number, until [`Event::Drained`] has told it.
    untold: Option<u64>,
    /// The last victim chosen, until it is killed.
    chosen: Option<OomKill>,
}

/// No record is longer (`CONSOLE_EXT_LOG_MAX` until 6.2, `PRINTK_MESSAGE_MAX` since; printk/internal.h).
const RECORD_BYTES: usize = 8192;

impl Kmsg {
    /// Opens `/dev/kmsg` at the oldest record, within a tokio runtime.
    ///
    /// # Errors
    /// `EPERM`: `kernel.dmesg_restrict` is set and we lack `CAP_SYSLOG`; `NotFound`: no such device here.
    pub fn open() -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(nix::libc::O_NONBLOCK);
        Ok(Self {
            file: watched(options.open("/dev/kmsg")?.into(), Interest::READABLE)?,
            reader: Reader::default(),
            events: VecDeque::new(),
        })
    }

    /// Waits for what is next. The first event is [`Event::Overrun`] if the log has lost its beginning.
    /// Cancel-safe: what was read is kept in `self`.
    ///
    /// # Errors
    /// As read(2); those are final.
    pub async fn next(&mut self) -> io::Result<Event> {
        let mut record = [0; RECORD_BYTES];
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(event);
            }
            let read = {
                let mut guard = self.file.readable().await?;
                match guard.try_io(|file| Ok(read(file, &mut record)?)) {
                    Ok(read) => read,
                    // Nothing more for now.
                    Err(_would_block) => match self.reader.untold.take() {
                        Some(last) => return Ok(Event::Drained(last)),
                        None => continue,
                    },
                }
            };
            match read {
                Ok(length) => {
                    let record = record.get(..length).unwrap_or(&[]);
                    self.events.extend(self.reader.take(record));
                }
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                    self.reader = Reader {
                        begun: true,
                        ..Reader::default()
                    };
                    return Ok(Event::Overrun);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl Reader {
    /// What a record tells. The records are numbered from 0 since boot, so a log that begins with
    /// another number was overwritten before anybody read it.
    fn take(&mut self, record: &[u8]) -> Vec<Event> {
        let first = !std::mem::replace(&mut self.begun, true);
        let number = sequence(record);
        self.untold = number.or(self.untold);
        let overrun = (first && number != Some(0)).then_some(Event::Overrun);
        let kill = parse(record).and_then(|line| self.join(line));
        overrun.into_iter().chain(kill.map(Event::Kill)).collect()
    }

    /// Makes one event of the two records of a kill.
    fn join(&mut self, line: Line) -> Option<OomKill> {
        match line {
            Line::Chosen(victim) => {
                self.chosen = Some(victim);
                None
            }
            Line::Killed(victim) => {
                let known = self.chosen.take_if(|chosen| chosen.pid == victim.pid);
                Some(match known {
                    Some(chosen) => OomKill {
                        constraint: chosen.constraint,
                        oom_memcg: chosen.oom_memcg,
                        task_memcg: chosen.task_memcg,
                        ..victim
                    },
                    None => victim,
                })
            }
        }
    }
}

/// A record's number; `None` for what is no record.
fn sequence(record: &[u8]) -> Option<u64> {
    let (_, rest) = split_once(record, b",")?;
    let (digits, _) = split_once(rest, b",")?;
    number(digits)
}

fn find(text: &[u8], needle: &[u8]) -> Option<usize> {
    text.windows(needle.len())
        .position(|window| window == needle)
}

fn split_at<'a>(text: &'a [u8], at: usize, needle: &[u8]) -> Option<(&'a [u8], &'a [u8])> {
    Some((text.get(..at)?, text.get(at + needle.len()..)?))
}

fn split_once<'a>(text: &'a [u8], needle: &[u8]) -> Option<(&'a [u8], &'a [u8])> {
    split_at(text, find(text, needle)?, needle)
}

fn rsplit_once<'a>(text: &'a [u8], needle: &[u8]) -> Option<(&'a [u8], &'a [u8])> {
    let at = text
        .windows(needle.len())
        .rposition(|window| window == needle)?;
    split_at(text, at, needle)
}

fn number<T: std::str::FromStr>(digits: &[u8]) -> Option<T> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

fn lossy(text: &[u8]) -> String {
    String::from_utf8_lossy(text).into_owned()
}

/// `\x0a` back to its byte: so the kernel spells what is not printable ASCII, and the backslash.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((byte, after)) = rest.split_first() {
        let escaped = rest
            .strip_prefix(b"\\x")
            .and_then(|hex| hex.split_at_checked(2));
        let escaped = escaped.and_then(|(hex, after)| {
            let hex = std::str::from_utf8(hex).ok()?;
            Some((u8::from_str_radix(hex, 16).ok()?, after))
        });
        let (byte, after) = escaped.unwrap_or((*byte, after));
        plain.push(byte);
        rest = after;
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::{Event, Kmsg, Line, OomKill, RECORD_BYTES, Reader, parse, sequence};
    use crate::host::cgroups::Limits;
    use crate::host::cgroups::tests::{EAT, Inside, Parent};
    use nix::unistd::read;
    use std::os::fd::OwnedFd;
    use std::time::Duration;

    const DEADLINE: Duration = Duration::from_secs(60);

    fn kill(constraint: &str, groups: [&str; 2], comm: &str, pid: i32, uid: u32) -> OomKill {
        OomKill {
            seq: 812,
            time_us: 91_033_245,
            constraint: constraint.into(),
            oom_memcg: groups[0].into(),
            task_memcg: groups[1].into(),
            comm: comm.into(),
            pid,
            uid,
        }
    }

    fn chosen(text: &str) -> Option<OomKill> {
        match parse(format!("6,812,91033245,-;{text}\n").as_bytes()) {
            Some(Line::Chosen(kill)) => Some(kill),
            Some(Line::Killed(kill)) => panic!("{kill:?}"),
            None => None,
        }
    }

    fn killed(text: &str) -> Option<OomKill> {
        match parse(format!("3,812,91033245,-,caller=T77;{text}\n SUBSYSTEM=x\n").as_bytes()) {
            Some(Line::Killed(kill)) => Some(kill),
            Some(Line::Chosen(kill)) => panic!("{kill:?}"),
            None => None,
        }
    }

    #[test]
    fn the_choice_of_a_victim_is_read() {
        let group = ["/ostler/0a1b2c3d4e5", "/ostler/0a1b2c3d4e5"];
        assert_eq!(
            chosen(
                "oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0,\
                 oom_memcg=/ostler/0a1b2c3d4e5,task_memcg=/ostler/0a1b2c3d4e5,task=ruby,pid=4711,uid=10001"
            ),
            Some(kill("CONSTRAINT_MEMCG", group, "ruby", 4711, 10001))
        );
        assert_eq!(
            chosen(
                "oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),cpuset=ostler,mems_allowed=0-1,\
                 global_oom,task_memcg=/ostler/h,task=java,pid=7,uid=0"
            ),
            Some(kill("CONSTRAINT_NONE", ["", "/ostler/h"], "java", 7, 0))
        );
        assert_eq!(
            chosen(
                "oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=0-1,cpuset=/,mems_allowed=0-1,\
                 oom_memcg=/ostler,task_memcg=/ostler/h,task=a b,pid=2147483647,uid=4294967294"
            ),
            Some(kill(
                "CONSTRAINT_MEMCG",
                ["/ostler", "/ostler/h"],
                "a b",
                i32::MAX,
                u32::MAX - 1
            ))
        );
    }

    #[test]
    fn the_kill_is_read() {
        let sizes = "total-vm:40372kB, anon-rss:32256kB, file-rss:1280kB, shmem-rss:0kB";
        for (why, constraint) in [
            ("Memory cgroup out of memory", "CONSTRAINT_MEMCG"),
            ("Out of memory", "CONSTRAINT_NONE"),
            (
                "Out of memory (oom_kill_allocating_task)",
                "CONSTRAINT_NONE",
            ),
        ] {
            assert_eq!(
                killed(&format!(
                    "{why}: Killed process 4711 (ruby) {sizes}, UID:10001 pgtables:116kB oom_score_adj:0"
                )),
                Some(kill(constraint, ["", ""], "ruby", 4711, 10001))
            );
        }
    }

    /// Every way for a name of 15 bytes to look like the record that it stands in.
    #[test]
    fn a_command_name_cannot_forge_a_field() {
        let names = [
            (",pid=1,uid=0", ",pid=1,uid=0"),
            ("x,uid=0", "x,uid=0"),
            (",task=sh,pid=1", ",task=sh,pid=1"),
            (",task_memcg=/a", ",task_memcg=/a"),
            (",oom_memcg=/b", ",oom_memcg=/b"),
            (") total-vm:1kB,", ") total-vm:1kB,"),
            (" UID:0 ", " UID:0 "),
            ("(sd) (x", "(sd) (x"),
            ("", ""),
            ("a;b", "a;b"),
            ("\\x0aoom-kill:", "\noom-kill:"),
            ("\\x5cx41", "\\x41"),
            ("caf\\xc3\\xa9", "café"),
            ("\\xff\\x", "\u{fffd}\\x"),
        ];
        for (written, comm) in names {
            let groups = ["/ostler/g", "/ostler/h"];
            assert_eq!(
                chosen(&format!(
                    "oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0,\
                     oom_memcg=/ostler/g,task_memcg=/ostler/h,task={written},pid=4711,uid=10001"
                )),
                Some(kill("CONSTRAINT_MEMCG", groups, comm, 4711, 10001)),
                "{written}"
            );
            assert_eq!(
                killed(&format!(
                    "Memory cgroup out of memory: Killed process 4711 ({written}) total-vm:40372kB, \
                     anon-rss:1kB, file-rss:1kB, shmem-rss:0kB, UID:10001 pgtables:116kB oom_score_adj:0"
                )),
                Some(kill("CONSTRAINT_MEMCG", ["", ""], comm, 4711, 10001)),
                "{written}"
            );
        }
    }

    #[test]
    fn other_records_tell_nothing() {
        let oom =
            "Out of memory: Killed process 1 (a) total-vm:1kB, shmem-rss:0kB, UID:0 pgtables:1kB";
        assert!(parse(format!("3,1,2,-;{oom}").as_bytes()).is_some());
        let records = [
            // Written by a process: the kernel gives it facility 1.
            format!("11,1,2,-;{oom}"),
            format!("12,1,2,-;{oom}"),
            // A name in front of somebody else's text.
            format!("6,1,2,-;Killed process[7]: {oom}"),
            format!("6,1,2,c;,pid=7 {oom}"),
            "6,1,2,-;oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null)".into(),
            "6,1,2,-;oom-kill:constraint=C,n=0,task_memcg=/,task=a,pid=x,uid=0".into(),
            "6,1,2,-;oom-kill:constraint=C,n=0,task_memcg=/,task=a,pid=99999999999,uid=0".into(),
            "6,1,2,-;Out of memory: Killed process 1 (a) total-vm:1kB, UID:x ".into(),
            "6,1,2,-;oom_reaper: reaped process 1 (a), now anon-rss:0kB".into(),
            "6,1,-;short head".into(),
            "x,1,2,-;no number".into(),
            "no semicolon".into(),
            ";".into(),
            String::new(),
        ];
        for record in records {
            assert_eq!(parse(record.as_bytes()), None, "{record}");
        }
        assert_eq!(parse(&[0xff; 100]), None);
    }

    /// What the reader makes of records, in order.
    fn events(records: &[&str]) -> Vec<Event> {
        let mut reader = Reader::default();
        let read = |record: &&str| reader.take(record.as_bytes());
        records.iter().flat_map(read).collect()
    }

    #[test]
    fn a_log_that_does_not_begin_with_its_first_record_was_overwritten() {
        let first = "6,0,0,-;Linux version";
        let kill = "3,9,2,-;Out of memory: Killed process 1 (a) total-vm:1kB, UID:0 pgtables:1kB";
        assert_eq!(events(&[first, "6,1,0,-;x", "6,5,0,-;y"]), []);
        let whole = events(&[first, kill]);
        assert!(
            matches!(&whole[..], [Event::Kill(OomKill { seq: 9, .. })]),
            "{whole:?}"
        );
        assert_eq!(events(&["12,7,0,-;systemd", first]), [Event::Overrun]);
        let both = events(&[kill, kill]);
        assert!(
            matches!(
                &both[..],
                [Event::Overrun, Event::Kill(_), Event::Kill(OomKill { .. })]
            ),
            "{both:?}"
        );
        assert_eq!(events(&["not a record"]), [Event::Overrun]);
    }

    /// The log of this machine, which may be one or the other.
    #[tokio::test]
    async fn the_kernels_own_log_is_told_as_it_is() {
        let mut kmsg = Kmsg::open().unwrap();
        let mut record = [0; RECORD_BYTES];
        let file: OwnedFd = std::fs::File::open("/dev/kmsg").unwrap().into();
        // Overwritten between opening and reading: what comes is read the next time.
        let length = loop {
            match read(&file, &mut record) {
                Err(nix::errno::Errno::EPIPE) => {}
                length => break length.unwrap(),
            }
        };
        let whole = sequence(&record[..length]) == Some(0);
        let first = tokio::time::timeout(Duration::from_secs(1), kmsg.next()).await;
        let overrun = matches!(first, Ok(Ok(Event::Overrun)));
        assert_ne!(overrun, whole, "{first:?}");
    }

    /// One group of 32 MB, one shell with an inconvenient name that wants more.
    #[tokio::test]
    async fn a_kill_by_the_kernel_is_seen_and_counted() {
        let parent = Parent::new();
        let limits = Limits {
            memory_bytes: Some(32 << 20),
            ..Limits::default()
        };
        let group = parent.create("victim", &limits).unwrap();
        let mut kmsg = Kmsg::open().unwrap();
        let name = "a,pid=1,uid=0)";
        let script = format!("printf '{name}' > /proc/self/comm; read y; {EAT}");
        let mut victim = Inside::start(&group, &script);
        let pid = victim.pid();
        victim.tell("go");
        let seen = async {
            loop {
                match kmsg.next().await.unwrap() {
                    Event::Kill(kill) if kill.pid == pid => return kill,
                    Event::Kill(_) | Event::Overrun | Event::Drained(_) => {}
                }
            }
        };
        let kill = tokio::time::timeout(DEADLINE, seen).await.unwrap();
        assert_eq!((kill.comm.as_str(), kill.uid), (name, 0), "{kill:?}");
        assert_eq!(kill.constraint, "CONSTRAINT_MEMCG");
        let path = group.memory_dir();
        assert!(
            path.ends_with(kill.oom_memcg.trim_start_matches('/')),
            "{kill:?} in {path:?}"
        );
        assert_eq!(kill.oom_memcg, kill.task_memcg);
        assert!(kill.seq > 0 && kill.time_us > 0);

        assert!(!victim.wait().success());
        // The counter moves before the kernel lets go of the victim, and we have waited for its death.
        assert_eq!(group.oom_kills().unwrap(), 1);
        assert!(group.memory_peak().unwrap() > 30 << 20);
    }
}
