//! What crashes left, for whoever asks later: the ends of their output and of their log files.
//!
//! ```text
//! <base>/crashes/<handle>/record.json     the crash, and the names of what follows
//!                        /0 1 …           the bytes, as many files as the record names
//! <base>/crashes/<handle>.new/            one in the making; worthless after a restart
//! ```
//!
//! A crash gets its name by a rename when it is whole. It lives on its own: neither a stop of its app nor the end
//! of its instance takes it away, but age, newer crashes of the app, and a full disk. What is kept is known
//! without the disk, and the disk is nobody's to wait for: who takes too long gives up.

mod gather;

use super::droplets::base64;
use super::record::{RecordError, make_private};
use super::world::{now, since_boot};
use crate::config;
use crate::engine::Container;
use crate::host::depot::{disk::Disk, is_handle};
use crate::host::{blocking, in_background};
use gather::Piece;
use messages::command::LogsRequest;
use messages::crash::{Crash, CrashFile};
use messages::filter::Candidate;
use messages::reply::{ErrorCode, Reply};
use messages::state::State;
use nix::sys::statvfs::{Statvfs, statvfs};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, UNIX_EPOCH};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tracing::{info, warn};

/// The format that this agent writes and reads.
const FORMAT: u32 = 1;

/// The record's name in a crash's directory.
const RECORD: &str = "record.json";

/// How long a crash may take to be kept before it is given up, and how long it waits for others before.
const KEEP_PATIENCE: Duration = Duration::from_secs(10);
const QUEUE_PATIENCE: Duration = Duration::from_secs(20);

/// How long somebody waits who reads.
const READ_PATIENCE: Duration = Duration::from_secs(5);

/// How many may be at the disk at the same time; where it hangs, the others are told so.
const TURNS: usize = 4;

/// Why somebody gave up.
const LATE: &str = "the disk takes too long";

/// Most files of one crash, its two streams among them.
const FILES: usize = 64;

/// A file gets at most this part of what is kept of a crash.
const SHARE: u64 = 4;

/// Bytes of an answer beside the name and the bytes of a file, generously.
const HEADROOM: usize = 2048;

/// Most bytes that one byte becomes in JSON (`\u0001`).
const ESCAPED: usize = 6;

/// One of them.
#[derive(Debug)]
struct Kept {
    /// What there is to tell of it; nothing, where its record is of another format or cannot be read.
    crash: Option<Crash>,
    /// When it was, in seconds since the boot, which no clock that is set changes; of those of an earlier life of the agent, as
    /// the clock stood when this one began.
    at: f64,
}

impl Kept {
    fn of(crash: Crash) -> Self {
        let at = moment(crash.time);
        let crash = Some(crash);
        Self { crash, at }
    }

    /// For another agent, written at this time.
    fn untold(time: f64) -> Self {
        let at = moment(time);
        Self { crash: None, at }
    }
}

/// A time in seconds since the epoch, in seconds since the boot.
fn moment(time: f64) -> f64 {
    since_boot() - (now() - time).max(0.0)
}

#[derive(Serialize, Deserialize)]
struct Record {
    format: u32,
    crash: Crash,
}

/// All crashes that are kept. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Crashes {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    limits: config::Crashes,
    lifetime: Duration,
    kept: Mutex<BTreeMap<String, Kept>>,
    turns: Arc<Semaphore>,
    reaping: Mutex<()>,
}

impl Crashes {
    /// Finds what earlier agents kept in `<base>/crashes`, and removes what they did not finish. Blocks.
    ///
    /// # Errors
    /// If the directory cannot be made.
    pub fn open(
        base: &Path,
        limits: config::Crashes,
        lifetime: Duration,
    ) -> Result<Self, RecordError> {
        let dir = base.join("crashes");
        make_private(&dir)?;
        let kept = load(&dir);
        Ok(Self {
            inner: Arc::new(Inner {
                dir,
                limits,
                lifetime,
                kept: Mutex::new(kept),
                turns: Arc::new(Semaphore::new(TURNS)),
                reaping: Mutex::default(),
            }),
        })
    }

    /// Keeps the ends of what `job` of a dead container has printed and written to its logs, unless they are kept
    /// already. `clean`: see [`Container::layer`].
    ///
    /// # Errors
    /// Why they are not, in words; then nothing is kept.
    pub async fn keep(
        &self,
        crash: Crash,
        container: &Container,
        job: u32,
        clean: bool,
    ) -> Result<(), String> {
        if self.inner.limits.per_app == 0 || self.kept().contains_key(&crash.handle) {
            return Ok(());
        }
        let turn = self.turn(QUEUE_PATIENCE).await.ok_or(LATE)?;
        let keeping = async {
            let layer = container.layer(clean).await;
            let layer = layer.inspect_err(
                |error| warn!(handle = crash.handle, %error, "no log files are found"),
            );
            let (inner, job) = (Arc::clone(&self.inner), container.job(job));
            blocking(move || {
                // Whoever waits for it no longer keeps the turn, too.
                let _turn = turn;
                inner.keep(crash, &job, layer.ok().as_deref())
            })
            .await
            .map_err(|error| error.to_string())
        };
        let late = |_| Err(LATE.to_owned());
        timeout(KEEP_PATIENCE, keeping).await.unwrap_or_else(late)
    }

    /// The answer to `dea.<id>.logs`, small enough for `max_payload` if it holds bytes of a file.
    /// `here` are the handles of instances that match it.
    pub async fn answer(
        &self,
        request: &LogsRequest,
        here: &HashSet<String>,
        host: &str,
        max_payload: usize,
    ) -> Reply {
        let crashes = self.matching(request, here);
        let Some((name, offset)) = &request.file else {
            let matched = crashes.len();
            return Reply::ok(json!({"dea": host, "matched": matched, "crashes": crashes}));
        };
        let Some(newest) = crashes.first() else {
            return gone("nothing of such a crash is kept here");
        };
        let place = newest.files.iter().enumerate();
        let Some((number, file)) = { place }.find(|(_, file)| file.name == *name) else {
            let names: Vec<&str> = newest.files.iter().map(|file| &*file.name).collect();
            let why = format!("`file` is {name:?}; of this crash are kept {names:?}");
            return Reply::error(ErrorCode::BadField, why);
        };
        let start = (*offset).clamp(file.from, file.to);
        let most = max_payload.saturating_sub(HEADROOM + name.len()) / ESCAPED;
        let most = (file.to - start).min(most.max(1) as u64);
        let path = self.inner.dir.join(&newest.handle).join(number.to_string());
        match self.read(path, start - file.from, most).await {
            Err(refusal) => refusal,
            Ok(bytes) => {
                let mut fields = json!({
                    "dea": host, "handle": newest.handle, "droplet": newest.droplet,
                    "index": newest.index, "instance": newest.instance,
                    "file": name, "from": file.from, "to": file.to, "offset": start,
                });
                show(&mut fields, start, bytes, start + most == file.to);
                Reply::ok(fields)
            }
        }
    }

    /// The newest first.
    fn matching(&self, request: &LogsRequest, here: &HashSet<String>) -> Vec<Crash> {
        let wanted = |crash: &&Crash| {
            let candidate = Candidate {
                droplet: &crash.droplet,
                version: &crash.version,
                instance: &crash.instance,
                index: crash.index,
                state: State::Crashed,
            };
            let handle = request.handle.as_ref();
            (request.filter.matches(&candidate) || here.contains(&crash.handle))
                && handle.is_none_or(|handle| *handle == crash.handle)
        };
        let kept = self.kept();
        let told = newest_first(&kept).into_iter();
        let told = told.filter_map(|(_, one)| one.crash.as_ref());
        told.filter(wanted).cloned().collect()
    }

    /// `count` bytes at `start` of one of our own files.
    async fn read(&self, path: PathBuf, start: u64, count: u64) -> Result<Vec<u8>, Reply> {
        let busy = || Reply::error(ErrorCode::Busy, "others wait for the disk: ask again");
        let turn = self.turn(READ_PATIENCE).await.ok_or_else(busy)?;
        let reading = blocking(move || {
            let _turn = turn;
            read_at(&path, start, count)
        });
        match timeout(READ_PATIENCE, reading).await {
            Ok(Ok(bytes)) => Ok(bytes),
            Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => {
                Err(gone("what was kept of this crash has just been removed"))
            }
            Ok(Err(error)) => Err(Reply::error(ErrorCode::Internal, error.to_string())),
            Err(_late) => Err(Reply::error(ErrorCode::Internal, LATE)),
        }
    }

    async fn turn(&self, patience: Duration) -> Option<OwnedSemaphorePermit> {
        let turn = Arc::clone(&self.inner.turns).acquire_owned();
        timeout(patience, turn).await.ok()?.ok()
    }

    fn kept(&self) -> MutexGuard<'_, BTreeMap<String, Kept>> {
        self.inner.kept()
    }

    /// Whether more of the disk is used than what is kept for later may see. Blocks.
    #[must_use]
    pub fn is_crowded(&self) -> bool {
        self.inner.is_crowded()
    }

    /// Removes what is too old, and the oldest as long as the disk is too full. Nobody waits for it.
    pub fn reap(&self) {
        if self.kept().is_empty() {
            return;
        }
        let inner = Arc::clone(&self.inner);
        in_background(move || {
            // A disk that hangs is looked at by one.
            if let Ok(_turn) = inner.reaping.try_lock() {
                inner.remove_superfluous();
                inner.yield_to_others();
            }
        });
    }
}

impl Inner {
    fn kept(&self) -> MutexGuard<'_, BTreeMap<String, Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep(&self, mut crash: Crash, job: &Path, layer: Option<&Disk>) -> io::Result<()> {
        let handle = crash.handle.clone();
        let new = self.dir.join(format!("{handle}.new"));
        let _none = fs::remove_dir_all(&new);
        let kept = self
            .write(&new, &mut crash, job, layer)
            .and_then(|()| fs::rename(&new, self.dir.join(&handle)));
        if let Err(error) = kept {
            let _as_far_as_it_goes = fs::remove_dir_all(&new);
            return Err(error);
        }
        let files = crash.files.len();
        self.kept().insert(handle.clone(), Kept::of(crash));
        info!(handle, files, "kept what a crash left");
        self.remove_superfluous();
        Ok(())
    }

    /// Fills the directory `new`.
    fn write(
        &self,
        new: &Path,
        crash: &mut Crash,
        job: &Path,
        layer: Option<&Disk>,
    ) -> io::Result<()> {
        DirBuilder::new().mode(0o700).create(new)?;
        let mut rest = self.limits.max_bytes;
        let share = rest / SHARE;
        let most = |rest: u64| usize::try_from(rest.min(share)).unwrap_or(usize::MAX);
        for piece in gather::streams(job, most(rest)).map_err(io::Error::other)? {
            rest -= piece.bytes.len() as u64;
            put(new, crash, piece)?;
        }
        let Some(layer) = layer else {
            return record(new, crash);
        };
        let found = gather::log_files(&layer.upper());
        let Ok((root, found)) = found.inspect_err(|error| {
            warn!(handle = crash.handle, %error, "no log files are found");
        }) else {
            return record(new, crash);
        };
        crash.left_out = found.left_out;
        for file in found.files {
            let room = rest > 0 && crash.files.len() < FILES;
            match room.then(|| gather::read(&root, &file, most(rest))) {
                Some(Ok(piece)) => {
                    rest -= piece.bytes.len() as u64;
                    put(new, crash, piece)?;
                }
                Some(Err(_)) | None => crash.left_out += 1,
            }
        }
        record(new, crash)
    }

    fn remove_superfluous(&self) {
        let old = superfluous(
            &self.kept(),
            since_boot(),
            self.lifetime,
            self.limits.per_app,
        );
        old.iter().for_each(|handle| self.remove(handle));
    }

    fn is_crowded(&self) -> bool {
        statvfs(&self.dir).is_ok_and(|disk| is_full(&disk, &self.limits))
    }

    /// The oldest go first, whosever they are.
    fn yield_to_others(&self) {
        let mut removed = 0;
        while self.is_crowded() {
            let oldest = self
                .kept()
                .iter()
                .min_by(|(_, one), (_, other)| one.at.total_cmp(&other.at))
                .map(|(handle, _)| handle.clone());
            let Some(oldest) = oldest else { break };
            self.remove(&oldest);
            removed += 1;
        }
        if removed > 0 {
            let dir = self.dir.display();
            warn!(removed, %dir, "the disk is too full: removed what the oldest crashes left");
        }
    }

    /// Out of sight first; the record first, so that an interrupted removal is finished by the next agent.
    fn remove(&self, handle: &str) {
        if self.kept().remove(handle).is_none() {
            return;
        }
        let dir = self.dir.join(handle);
        let _with_the_rest = fs::remove_file(dir.join(RECORD));
        if let Err(error) = fs::remove_dir_all(dir) {
            warn!(handle, %error, "what a crash left is not removed");
        }
    }
}

fn newest_first(kept: &BTreeMap<String, Kept>) -> Vec<(&String, &Kept)> {
    let mut kept: Vec<(&String, &Kept)> = kept.iter().collect();
    kept.sort_by(|(_, one), (_, other)| other.at.total_cmp(&one.at));
    kept
}

/// Which crashes are older than `lifetime` at `now`, or have `per_app` newer ones of their app, if that is known.
fn superfluous(
    kept: &BTreeMap<String, Kept>,
    now: f64,
    lifetime: Duration,
    per_app: usize,
) -> Vec<String> {
    let mut seen: HashMap<&str, usize> = HashMap::new();
    let old = newest_first(kept).into_iter().filter(|(_, one)| {
        let too_many = one.crash.as_ref().is_some_and(|crash| {
            let newer = seen.entry(&crash.droplet).or_default();
            *newer += 1;
            *newer > per_app
        });
        too_many || now - one.at > lifetime.as_secs_f64()
    });
    old.map(|(handle, _)| handle.clone()).collect()
}

/// Whether more of a disk is used than crashes may see. One that counts no inodes has enough of them.
fn is_full(disk: &Statvfs, limits: &config::Crashes) -> bool {
    let above = |free: u64, available: u64, all: u64, share: f64| {
        let used = all.saturating_sub(free);
        // As df(1): what is set aside for root is nobody's.
        used as f64 > share * (used + available) as f64
    };
    let blocks = disk.blocks();
    let (free, available) = (disk.blocks_free(), disk.blocks_available());
    above(free, available, blocks, limits.max_block_usage)
        || above(
            disk.files_free(),
            disk.files_available(),
            disk.files(),
            limits.max_inode_usage,
        )
}

/// Writes what is kept of one file, and notes it.
fn put(new: &Path, crash: &mut Crash, piece: Piece) -> io::Result<()> {
    write(new, &crash.files.len().to_string(), &piece.bytes)?;
    crash.files.push(CrashFile {
        name: piece.name,
        from: piece.from,
        to: piece.from + piece.bytes.len() as u64,
    });
    Ok(())
}

fn record(new: &Path, crash: &Crash) -> io::Result<()> {
    write(new, RECORD, &written(crash.clone())?)
}

/// A crash's record.
///
/// # Errors
/// If it cannot be put into JSON.
pub fn written(crash: Crash) -> serde_json::Result<Vec<u8>> {
    let format = FORMAT;
    serde_json::to_vec(&Record { format, crash })
}

fn write(dir: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let mut options = File::options();
    options.write(true).create_new(true).mode(0o600);
    options.open(dir.join(name))?.write_all(bytes)
}

fn read_at(path: &Path, start: u64, count: u64) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let mut bytes = vec![0; usize::try_from(count).unwrap_or(usize::MAX)];
    file.read_exact_at(&mut bytes, start)?;
    Ok(bytes)
}

fn load(dir: &Path) -> BTreeMap<String, Kept> {
    let mut kept = BTreeMap::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !is_handle(name.strip_suffix(".new").unwrap_or(&name)) {
            continue;
        }
        match find(&entry.path(), &name) {
            Some(one) => drop(kept.insert(name, one)),
            None => {
                warn!(name, "what is left of a crash is not whole: removed");
                let _the_next_one_tries = fs::remove_dir_all(entry.path());
            }
        }
    }
    kept
}

/// The crash in a directory of this name; `None` if it is not whole. One that another agent can tell of, or a better disk,
/// is kept for that.
fn find(dir: &Path, name: &str) -> Option<Kept> {
    let path = dir.join(RECORD);
    let kept = match fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => Err(error.to_string()),
        Ok(bytes) => match understand(&bytes) {
            Some(crash) => Ok(crash),
            None => Err(format!("format {}", other_format(&bytes)?)),
        },
    };
    match kept {
        Ok(crash) => (crash.handle == name).then(|| Kept::of(crash)),
        // In the making it is nobody's, whatever it is to become.
        Err(_) if !is_handle(name) => None,
        Err(why) => {
            warn!(
                name,
                why, "what is left of a crash is not understood, and kept as long as others"
            );
            Some(Kept::untold(written_at(&path).unwrap_or_else(now)))
        }
    }
}

/// When a file was written, in seconds since the epoch.
fn written_at(path: &Path) -> Option<f64> {
    let time = fs::metadata(path).and_then(|file| file.modified()).ok()?;
    let age = time.duration_since(UNIX_EPOCH).ok()?;
    Some(age.as_secs_f64())
}

/// The format of a record that is whole, where it is not ours.
fn other_format(bytes: &[u8]) -> Option<Value> {
    let mut record: Value = serde_json::from_slice(bytes).ok()?;
    let format = record.get_mut("format")?.take();
    (format != FORMAT).then_some(format)
}

/// The crash of a record, if it is whole and of our format.
#[must_use]
pub fn understand(bytes: &[u8]) -> Option<Crash> {
    let record: Record = serde_json::from_slice(bytes).ok()?;
    (record.format == FORMAT).then_some(record.crash)
}

fn gone(why: &str) -> Reply {
    Reply::error(ErrorCode::UnknownApp, why)
}

/// Puts bytes into an answer: as `text` if they are UTF-8 without a zero byte, else as `base64`; and where to go on as
/// `next`. A character that is cut in two is left to the next answer, but at the end.
fn show(fields: &mut Value, start: u64, mut bytes: Vec<u8>, last: bool) {
    if let Err(error) = std::str::from_utf8(&bytes)
        && error.error_len().is_none()
        && error.valid_up_to() > 0
        && !last
    {
        bytes.truncate(error.valid_up_to());
    }
    let next = start + bytes.len() as u64;
    let (key, shown) = match String::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => ("text", text),
        Ok(text) => ("base64", base64(text.as_bytes())),
        Err(error) => ("base64", base64(error.as_bytes())),
    };
    if let Some(fields) = fields.as_object_mut() {
        fields.insert("next".into(), json!(next));
        fields.insert(key.into(), json!(shown));
    }
}

#[cfg(test)]
mod tests {
    use super::{Kept, RECORD, load, now, show, since_boot, superfluous, written};
    use messages::crash::Crash;
    use serde_json::json;
    use std::collections::BTreeMap;
    use std::time::Duration;

    /// One of so many seconds after the boot, whatever the clock says.
    fn crash(handle: &str, droplet: &str, at: f64) -> (String, Kept) {
        let crash = Some(plain(handle, droplet, 1_000_000_000.0 - at));
        (handle.into(), Kept { crash, at })
    }

    fn plain(handle: &str, droplet: &str, time: f64) -> Crash {
        Crash {
            handle: handle.into(),
            droplet: droplet.into(),
            index: 0,
            instance: "i".into(),
            version: "v".into(),
            time,
            exit_status: 1,
            signal: None,
            exit_description: "app instance exited".into(),
            oom: false,
            files: Vec::new(),
            left_out: 0,
        }
    }

    #[test]
    fn a_crash_of_a_time_to_come_is_as_young_as_one_can_be() {
        for (ahead, age) in [(1e9, 0.0), (0.0, 0.0), (-1000.0, 1000.0)] {
            let at = Kept::of(plain("a1", "a", now() + ahead)).at;
            assert!((since_boot() - at - age).abs() < 10.0, "{ahead}: {at}");
        }
    }

    #[test]
    fn the_newest_of_each_app_stay_as_long_as_they_are_young() {
        let kept = BTreeMap::from([
            crash("a1", "a", 1000.0),
            crash("a2", "a", 1000.2),
            crash("a3", "a", 1000.1),
            crash("b1", "b", 900.0),
            crash("c1", "c", 10.0),
            ("x1".into(), untold(990.0)),
            ("x2".into(), untold(20.0)),
        ]);
        let old = |lifetime, per_app| {
            let lifetime = Duration::from_secs(lifetime);
            let mut old = superfluous(&kept, 1001.0, lifetime, per_app);
            old.sort();
            old
        };
        assert_eq!(old(10_000, 3), Vec::<String>::new());
        assert_eq!(old(10_000, 2), ["a1"]);
        assert_eq!(old(500, 1), ["a1", "a3", "c1", "x2"]);
        assert_eq!(old(50, 3), ["b1", "c1", "x2"]);
    }

    fn untold(at: f64) -> Kept {
        Kept { crash: None, at }
    }

    #[test]
    fn what_another_agent_kept_stays_for_it_and_what_is_not_whole_goes() {
        let dir = std::env::temp_dir().join(format!("ostler-crashes-{}", std::process::id()));
        let record = String::from_utf8(written(plain("0123456789a", "a", now())).unwrap()).unwrap();
        let other = record.replace("\"format\":1", "\"format\":2");
        let gone = [
            ("0123456789b", Some(&*record)),
            ("0123456789c", Some(&other[..other.len() - 1])),
            ("0123456789d", Some("{}")),
            ("0123456789e", None),
            ("0123456789f.new", Some(&*other)),
        ];
        let all = [
            ("0123456789a", Some(&*record)),
            ("0123456789g", Some(&*other)),
        ];
        for (name, record) in all.iter().chain(&gone) {
            std::fs::create_dir_all(dir.join(name)).unwrap();
            if let Some(record) = record {
                std::fs::write(dir.join(name).join(RECORD), record).unwrap();
            }
        }
        let kept = load(&dir);
        let told: Vec<(&str, bool)> = { kept.iter() }
            .map(|(name, one)| (&**name, one.crash.is_some()))
            .collect();
        assert_eq!(told, [("0123456789a", true), ("0123456789g", false)]);
        assert!((kept["0123456789g"].at - since_boot()).abs() < 10.0);
        for (name, _) in all {
            assert!(dir.join(name).join(RECORD).exists(), "{name}");
        }
        for (name, _) in gone {
            assert!(!dir.join(name).exists(), "{name}");
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn bytes_of_any_kind_are_shown_and_text_as_text() {
        let shown = |bytes: &[u8], last| {
            let mut fields = json!({});
            show(&mut fields, 7, bytes.to_vec(), last);
            fields
        };
        assert_eq!(shown(b"", true), json!({"next": 7, "text": ""}));
        assert_eq!(
            shown("aü".as_bytes(), true),
            json!({"next": 10, "text": "aü"})
        );
        assert_eq!(shown(b"a\xc3", false), json!({"next": 8, "text": "a"}));
        assert_eq!(shown(b"a\xc3", true), json!({"next": 9, "base64": "YcM="}));
        assert_eq!(shown(b"\xc3", false), json!({"next": 8, "base64": "ww=="}));
        assert_eq!(shown(b"\0", true), json!({"next": 8, "base64": "AA=="}));
        assert_eq!(
            shown(b"\xff\xc3", false),
            json!({"next": 9, "base64": "/8M="})
        );
    }
}
