//! Real trees, real tar programs, and streams and trees that mean harm.

use super::tar::{Entry, Kind, Writer};
use super::{Done, Fault, Limits, Links, Naming, pack, unpack, unpack_of};
use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::mkfifo;
use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Instant;

struct Place(PathBuf);

impl Drop for Place {
    fn drop(&mut self) {
        // Not by the library: it holds a descriptor for each level.
        tool("rm", &["-rf", self.0.to_str().unwrap()], b"");
    }
}

impl Place {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("ostler-copy-{}-{number}", std::process::id());
        let place = Self(std::env::temp_dir().join(name));
        fs::create_dir_all(place.path("tree")).unwrap();
        fs::create_dir(place.path("to")).unwrap();
        fs::write(place.path("secret"), "the host's").unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn write(&self, name: &str, content: &str, mode: u32) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "tests use the machine's own tools"
)]
fn tool(program: &str, arguments: &[&str], input: &[u8]) -> Vec<u8> {
    use std::io::Write;
    use std::process::{Command, Stdio};
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(input).unwrap());
        child.wait_with_output().unwrap()
    });
    assert!(output.status.success(), "{program} {arguments:?}");
    output.stdout
}

/// The stream of a path, and what was complained.
fn packed(path: &Path, links: Links) -> (Vec<u8>, Done, Vec<String>) {
    let (mut stream, mut complaints) = (Vec::new(), Vec::new());
    let done = pack(path, links, &mut stream, &mut |line| complaints.push(line));
    (stream, done.unwrap(), complaints)
}

fn unpacked(stream: &[u8], path: &Path, naming: Naming) -> Result<Done, Fault> {
    unpack(stream, path, naming, Limits::NONE, &mut |line| {
        panic!("{line}")
    })
}

/// Everything below a directory: mode and target or content.
fn seen(root: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut waiting = vec![root.to_owned()];
    while let Some(directory) = waiting.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            let mode = meta.permissions().mode() & 0o7777;
            let what = if meta.is_dir() {
                waiting.push(path.clone());
                format!("{mode:o} directory")
            } else if meta.is_symlink() {
                format!("-> {}", fs::read_link(&path).unwrap().display())
            } else {
                let text = String::from_utf8_lossy(&fs::read(&path).unwrap()).into_owned();
                format!("{mode:o} {} {text}", meta.mtime())
            };
            found.insert(path.strip_prefix(root).unwrap().display().to_string(), what);
        }
    }
    found
}

/// A tree with everything that is kept.
fn tree() -> Place {
    let place = Place::new();
    place.write("tree/plain", "text", 0o640);
    place.write("tree/program", "#!", 0o755);
    place.write("tree/empty", "", 0o600);
    place.write(&format!("tree/{}", "n".repeat(255)), "long", 0o644);
    let deep: String = (0..30)
        .map(|level| format!("level-of-some-length-{level}/"))
        .collect();
    place.write(&format!("tree/{deep}leaf"), "deep", 0o644);
    place.write("tree/odd \n\u{1}\"name", "odd", 0o644);
    place.write("tree/closed/inner/file", "closed", 0o400);
    for (path, mode) in [("tree/closed/inner", 0o555), ("tree/closed", 0o500)] {
        fs::set_permissions(place.path(path), Permissions::from_mode(mode)).unwrap();
    }
    symlink("plain", place.path("tree/link")).unwrap();
    symlink("/nowhere", place.path("tree/dangling")).unwrap();
    symlink("t".repeat(500), place.path("tree/far")).unwrap();
    tool(
        "touch",
        &[
            "-d",
            "@1000000000",
            place.path("tree/plain").to_str().unwrap(),
        ],
        b"",
    );
    place
}

#[test]
fn a_tree_comes_back_as_it_was() {
    let place = tree();
    let (stream, done, complaints) = packed(&place.path("tree"), Links::Keep);
    assert_eq!((done.damaged, complaints), (0, Vec::new()));
    let back = unpacked(&stream, &place.path("to"), Naming::AsGiven).unwrap();
    assert_eq!(back, done);
    let before = seen(&place.path("tree"));
    assert_eq!(seen(&place.path("to/tree")), before);
    assert!(before["plain"].contains(" 1000000000 ") && before.len() > 40);
}

#[test]
fn what_would_give_rights_or_tie_trees_together_is_not_kept() {
    let place = Place::new();
    place.write("tree/setuid", "x", 0o6755);
    fs::set_permissions(place.path("tree"), Permissions::from_mode(0o1777)).unwrap();
    fs::hard_link(place.path("tree/setuid"), place.path("tree/other")).unwrap();
    mkfifo(&place.path("tree/fifo"), Mode::S_IRWXU).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(place.path("tree/socket")).unwrap();
    let (stream, done, mut complaints) = packed(&place.path("tree"), Links::Keep);
    complaints.sort();
    let passed = |name: &str| format!("\"tree/{name}\" is passed over: no file, directory or link");
    assert_eq!(complaints, ["fifo", "socket"].map(passed));
    assert_eq!((done.entries, done.damaged), (3, 0));
    unpacked(&stream, &place.path("to"), Naming::AsGiven).unwrap();
    let back = seen(&place.path("to"));
    assert_eq!(back["tree"], "777 directory");
    assert!(back["tree/setuid"].starts_with("755 ") && back["tree/other"].starts_with("755 "));
    let inode = |name: &str| fs::metadata(place.path(name)).unwrap().ino();
    assert_ne!(inode("to/tree/setuid"), inode("to/tree/other"));
}

#[test]
fn names_are_those_of_cp() {
    let place = Place::new();
    place.write("tree/file", "new", 0o644);
    fs::create_dir(place.path("tree/sub")).unwrap();
    let copy = |from: &str, to: &str| {
        let (stream, _, _) = packed(
            Path::new(&format!("{}/{from}", place.0.display())),
            Links::Keep,
        );
        unpacked(&stream, &place.path(to), Naming::AsCopied)
    };
    copy("tree", "to").unwrap();
    copy("tree", "to/renamed").unwrap();
    copy("tree/.", "to/contents").unwrap();
    fs::create_dir(place.path("to/there")).unwrap();
    copy("tree/.", "to/there").unwrap();
    copy("tree/file", "to/there").unwrap();
    copy("tree/file", "to/there/other").unwrap();
    copy("tree/file", "to/there/other").unwrap();
    let names: Vec<String> = seen(&place.path("to")).into_keys().collect();
    let wanted = [
        "contents",
        "contents/file",
        "contents/sub",
        "renamed",
        "renamed/file",
        "renamed/sub",
        "there",
        "there/file",
        "there/other",
        "there/sub",
        "tree",
        "tree/file",
        "tree/sub",
    ];
    assert_eq!(names, wanted);
    let told = copy("tree", "to/no/such").unwrap_err().to_string();
    assert!(
        told.starts_with("cannot open ") && told.ends_with("No such file or directory"),
        "{told}"
    );
    let told = copy("tree/file", "to/there/sub/../../renamed/sub/").map(|_| ());
    assert_eq!(told, Ok(()), "into a directory");
    let mut none = Vec::new();
    let missing = pack(&place.path("gone"), Links::Keep, &mut none, &mut |_| ()).unwrap_err();
    assert!(missing.to_string().ends_with("No such file or directory") && none.is_empty());
}

#[test]
fn links_can_be_materialised_and_never_lead_in_circles() {
    let place = Place::new();
    place.write("outside/file", "theirs", 0o644);
    symlink("../outside", place.path("tree/directory")).unwrap();
    symlink("../outside/file", place.path("tree/file")).unwrap();
    symlink(".", place.path("tree/circle")).unwrap();
    symlink("/nowhere", place.path("tree/dangling")).unwrap();
    let (stream, done, mut complaints) = packed(&place.path("tree"), Links::Follow);
    complaints.sort();
    assert_eq!(
        complaints,
        [
            "\"tree/circle\" is passed over: it leads back up",
            "\"tree/dangling\": it cannot be read: No such file or directory"
        ]
    );
    assert_eq!(done.damaged, 1);
    unpacked(&stream, &place.path("to"), Naming::AsGiven).unwrap();
    let back = seen(&place.path("to/tree"));
    assert_eq!(
        back.keys().collect::<Vec<_>>(),
        ["directory", "directory/file", "file"]
    );
    assert!(back["file"].ends_with(" theirs") && back["directory/file"].ends_with(" theirs"));
}

#[test]
fn tar_programs_read_and_write_the_same_streams() {
    let place = tree();
    let before = seen(&place.path("tree"));
    let (stream, _, _) = packed(&place.path("tree/."), Links::Keep);
    let to = |name: &str| {
        fs::create_dir(place.path(name)).unwrap();
        place.path(name).display().to_string()
    };
    tool("tar", &["-xpf", "-", "-C", &to("gnu")], &stream);
    assert_eq!(seen(&place.path("gnu")), before);
    tool(
        "busybox",
        &["tar", "-xpf", "-", "-C", &to("busybox")],
        &stream,
    );
    assert_eq!(seen(&place.path("busybox")), before);
    let from = place.path("tree").display().to_string();
    let formats = ["gnu", "oldgnu", "pax"].map(|format| format!("--format={format}"));
    for (number, format) in formats.iter().enumerate() {
        let theirs = tool("tar", &["-cf", "-", format, "-C", &from, "."], b"");
        let path = to(&number.to_string());
        unpacked(&theirs, Path::new(&path), Naming::AsGiven).unwrap();
        assert_eq!(seen(Path::new(&path)), before, "{format}");
    }
}

fn stream(entries: &[(&str, Kind, &str)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = Writer::new(&mut bytes);
    for (path, kind, content) in entries {
        let size = content.len() as u64;
        let entry = Entry {
            path: path.as_bytes().to_vec(),
            kind: kind.clone(),
            size,
            mode: 0o7777,
            modified: 0,
        };
        writer.entry(&entry).unwrap();
        writer.content(content.as_bytes()).unwrap();
        writer.pad(size).unwrap();
    }
    writer.finish().unwrap();
    bytes
}

/// Entries of a stream that must be refused, and words of the refusal.
type Case<'a> = (Vec<(&'a str, Kind, &'a str)>, &'a str);

fn ways_out<'a>(outside: &'a str, secret: &'a str) -> Vec<Case<'a>> {
    let link = |to: &str| Kind::Symlink(to.as_bytes().to_vec());
    let hard = |to: &str| Kind::HardLink(to.as_bytes().to_vec());
    let file = |path: &'a str| (path, Kind::File, "x");
    let foreign = "a hard link to what is not";
    vec![
        (vec![file("../secret")], "leads upwards"),
        (vec![file("a/../../secret")], "leads upwards"),
        (vec![file(secret)], "is absolute"),
        (
            vec![("l", link(outside), ""), file("l/secret")],
            "leads through",
        ),
        (
            vec![("l", link(".."), ""), file("l/secret")],
            "leads through",
        ),
        (
            vec![("l", link(".."), ""), file("l/private/x")],
            "through a symlink",
        ),
        (
            vec![("l", link(".."), ""), ("h", hard("l/secret"), "")],
            foreign,
        ),
        (vec![("h", hard("../secret"), "")], foreign),
        (vec![("h", hard(secret), "")], foreign),
        (vec![file("f"), file("f/x")], "through what is no directory"),
        (
            vec![("d/", Kind::Directory, ""), file("d")],
            "a directory of that name",
        ),
        (vec![("l", link(""), "")], "a link without a proper target"),
        (
            vec![("./", link("/"), "")],
            "take the place of the directory",
        ),
    ]
}

#[test]
fn no_stream_leads_out_of_its_directory() {
    let place = Place::new();
    let secret = place.path("secret").display().to_string();
    let outside = place.0.display().to_string();
    for (number, (entries, words)) in ways_out(&outside, &secret).iter().enumerate() {
        let to = place.path(&format!("to/{number}"));
        fs::create_dir(&to).unwrap();
        let told = unpacked(&stream(entries), &to, Naming::AsGiven).unwrap_err();
        assert!(told.to_string().contains(words), "{entries:?}: {told}");
    }
    let deep = "d/".repeat(300);
    let told = unpacked(
        &stream(&[(&deep, Kind::Directory, "")]),
        &place.path("to"),
        Naming::AsGiven,
    );
    assert!(told.unwrap_err().to_string().contains("too deep"));
    // A symlink in the way is replaced, and what it points to is not touched.
    symlink("../../secret", place.path("to/0/file")).unwrap();
    unpacked(
        &stream(&[("file", Kind::File, "new")]),
        &place.path("to/0"),
        Naming::AsGiven,
    )
    .unwrap();
    assert_eq!(
        fs::read_to_string(place.path("secret")).unwrap(),
        "the host's"
    );
    assert_eq!(fs::metadata(place.path("secret")).unwrap().nlink(), 1);
    assert_eq!(
        fs::symlink_metadata(place.path("to/0/file"))
            .unwrap()
            .mode()
            & 0o177_777,
        0o100_777
    );
}

#[test]
fn nothing_comes_by_another_name_than_was_asked_for() {
    let place = Place::new();
    place.write("tree/file", "new", 0o644);
    let to = place.path("to");
    let copy = |asked: &str, bytes: &[u8]| {
        let asked = Path::new(asked);
        unpack_of(asked, bytes, &to, Limits::NONE, &mut |line| {
            panic!("{line}")
        })
        .map(|_| ())
    };
    for from in ["tree", "tree/", "tree/file", "tree/.", "tree/../tree"] {
        let path = format!("{}/{from}", place.0.display());
        let (bytes, _, _) = packed(Path::new(&path), Links::Keep);
        assert_eq!(copy(&path, &bytes), Ok(()), "{from}");
    }
    let before = seen(&to);
    for (asked, path) in [
        ("/tmp/log", ".bashrc"),
        ("/tmp/log", "log2"),
        ("/tmp/log", "./log"),
        ("/tmp/log", "log/../file"),
        ("/tmp/log/.", "log"),
        ("log/..", "log"),
    ] {
        let told = copy(asked, &stream(&[(path, Kind::File, "theirs")])).unwrap_err();
        assert!(matches!(told, Fault::Entry { .. }), "{asked}: {told}");
    }
    assert_eq!(seen(&to), before);
}

#[test]
fn a_stream_that_lies_is_refused() {
    let place = Place::new();
    let whole = stream(&[("a", Kind::File, "0123456789"), ("b/c", Kind::File, "x")]);
    let refused = |bytes: &[u8], limits: Limits| {
        let to = place.path("to");
        unpack(bytes, &to, Naming::AsGiven, limits, &mut |_| ())
            .unwrap_err()
            .to_string()
    };
    // Cut anywhere before its second last block (one end mark is enough).
    for cut in (0..whole.len() - 1024).step_by(64) {
        assert!(
            refused(&whole[..cut], Limits::NONE).starts_with("not a whole tar stream"),
            "{cut}"
        );
    }
    // Another size, with a checksum that fits.
    let claim = |size: &str| {
        let mut bytes = whole.clone();
        bytes[124..136].copy_from_slice(format!("{size:>11} ").as_bytes());
        bytes[148..156].fill(b' ');
        let sum: u32 = bytes[..512].iter().map(|byte| u32::from(*byte)).sum();
        bytes[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        bytes
    };
    for size in ["77777777777", "6000", "99", "-1"] {
        let told = refused(&claim(size), Limits::NONE);
        assert!(told.starts_with("not a whole tar stream"), "{size}: {told}");
    }
    let (bytes, entries) = (9, 1);
    let few = Limits {
        entries,
        ..Limits::NONE
    };
    assert_eq!(
        refused(
            &whole,
            Limits {
                bytes,
                ..Limits::NONE
            }
        ),
        "more than 9 bytes"
    );
    assert_eq!(
        refused(&whole, few),
        "more than 1 files, links and directories"
    );
    // It never ends: headers of nothing, and zeros after its end.
    let mut global = stream(&[("g", Kind::File, "")])[..512].to_vec();
    global[156] = b'g';
    global[148..156].fill(b' ');
    let sum: u32 = global.iter().map(|byte| u32::from(*byte)).sum();
    global[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    assert!(
        refused(&global.repeat(20), Limits::NONE).ends_with("too many headers without an entry")
    );
    let endless = [&whole[..], &vec![0; 2 << 20]].concat();
    assert!(refused(&endless, Limits::NONE).ends_with("it goes on after its end"));
}

#[test]
fn damaged_streams_end_without_harm() {
    let place = tree();
    let (good, _, _) = packed(&place.path("tree"), Links::Keep);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % below as u64).unwrap()
    };
    let mut taken = 0;
    for round in 0..300 {
        let mut bytes = good.clone();
        for _ in 0..=random(3) {
            let at = random(bytes.len());
            bytes[at] = u8::try_from(random(256)).unwrap();
            let block = at / 512 * 512;
            // Half of them with a checksum that fits.
            if round % 2 == 0 {
                bytes[block + 148..block + 156].fill(b' ');
                let sum: u32 = bytes[block..block + 512]
                    .iter()
                    .map(|byte| u32::from(*byte))
                    .sum();
                bytes[block + 148..block + 156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            }
        }
        let limits = Limits {
            bytes: 1 << 20,
            entries: 1000,
            ..Limits::NONE
        };
        let done = unpack(
            &bytes[..],
            &place.path("to"),
            Naming::AsGiven,
            limits,
            &mut |_| (),
        );
        taken += u32::from(done.is_ok());
    }
    assert!(taken > 0, "some are still whole");
    assert_eq!(
        fs::read_to_string(place.path("secret")).unwrap(),
        "the host's"
    );
    let there: Vec<_> = fs::read_dir(&place.0)
        .unwrap()
        .map(|one| one.unwrap().file_name())
        .collect();
    assert_eq!(there.len(), 3, "{there:?}");
}

#[test]
fn a_tree_that_changes_while_it_is_read_gives_nothing_of_others() {
    let place = Place::new();
    place.write("private/file", "the host's", 0o644);
    place.write("tree/directory/file", "own", 0o644);
    place.write("tree/swapped", "own", 0o644);
    for name in ["tree/file-link", "tree/directory-link"] {
        let target = if name == "tree/file-link" {
            "../secret"
        } else {
            "../private"
        };
        symlink(target, place.path(name)).unwrap();
    }
    mkfifo(&place.path("tree/fifo"), Mode::S_IRWXU).unwrap();
    let stop = AtomicBool::new(false);
    let swap = |one: &str, other: &str| {
        use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
        let flags = RenameFlags::RENAME_EXCHANGE;
        renameat2(
            AT_FDCWD,
            &place.path(one),
            AT_FDCWD,
            &place.path(other),
            flags,
        )
        .unwrap();
    };
    let began = Instant::now();
    let (mut changed, mut rounds) = (0_u64, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                swap("tree/directory", "tree/directory-link");
                swap("tree/swapped", "tree/file-link");
                swap("tree/swapped", "tree/fifo");
            }
        });
        let met = |changed| if changed > 0 { 3 } else { 60 };
        while began.elapsed().as_secs() < met(changed) {
            let (bytes, done, _) = packed(&place.path("tree"), Links::Keep);
            let text = String::from_utf8_lossy(&bytes);
            let leaked = text.contains("the host's");
            if leaked {
                stop.store(true, Ordering::Relaxed);
            }
            assert!(!leaked, "after {rounds} rounds");
            changed += done.damaged;
            rounds += 1;
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(changed > 0, "{rounds} rounds, and none met a change");
}

#[test]
fn a_file_that_shrinks_keeps_its_place_in_the_stream_and_is_told() {
    let place = Place::new();
    place.write("tree/a", &"x".repeat(300_000), 0o644);
    place.write("tree/b", "end", 0o644);
    let stop = AtomicBool::new(false);
    let file = place.path("tree/a");
    let mut damaged = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let file = fs::File::options().write(true).open(&file).unwrap();
            while !stop.load(Ordering::Relaxed) {
                file.set_len(10).unwrap();
                file.set_len(300_000).unwrap();
            }
        });
        let began = Instant::now();
        while damaged == 0 && began.elapsed().as_secs() < 20 {
            let (stream, done, _) = packed(&place.path("tree"), Links::Keep);
            unpacked(&stream, &place.path("to"), Naming::AsGiven).unwrap();
            assert_eq!(fs::read_to_string(place.path("to/tree/b")).unwrap(), "end");
            damaged += done.damaged;
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(damaged > 0);
}

#[test]
fn a_tree_without_end_ends() {
    let place = Place::new();
    // Deeper than any path is long.
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let mut directory = open(&place.path("tree"), flags, Mode::empty()).unwrap();
    for _ in 0..2000 {
        mkdirat(&directory, "d", Mode::S_IRWXU).unwrap();
        directory = openat(&directory, "d", flags, Mode::empty()).unwrap();
    }
    drop(directory);
    place.write("tree/beside", "x", 0o644);
    let (stream, done, complaints) = packed(&place.path("tree"), Links::Keep);
    assert_eq!((done.entries, done.damaged), (201, 1));
    assert!(
        complaints[0].ends_with("\": it lies too deep"),
        "{complaints:?}"
    );
    unpacked(&stream, &place.path("to"), Naming::AsGiven).unwrap();
    assert!(place.path("to/tree/beside").exists());
}
