//! Hostile archives, written header by header where the tar crate refuses to.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt;

use super::super::tests::{Scratch, gzip};
use super::*;

const OWNER: Owner = Owner {
    uid: 2000,
    gid: 2001,
};

fn options() -> FetchOptions {
    FetchOptions {
        max_entries: 50,
        max_unpacked_bytes: 4 << 20,
        ..FetchOptions::default()
    }
}

/// A tar in the making, whatever it may hold.
#[derive(Default)]
struct Tar(Vec<u8>);

impl Tar {
    fn entry(mut self, kind: u8, path: &[u8], link: &[u8], mode: u32, body: &[u8]) -> Self {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::new(kind));
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_600_000_000);
        header.set_size(body.len() as u64);
        header.as_mut_bytes()[..path.len()].copy_from_slice(path);
        header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link);
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.body(body)
    }

    fn body(mut self, body: &[u8]) -> Self {
        self.0.extend_from_slice(body);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn file(self, path: &str, body: &[u8]) -> Self {
        self.entry(b'0', path.as_bytes(), b"", 0o644, body)
    }

    fn link(self, kind: u8, path: &str, target: &str) -> Self {
        self.entry(kind, path.as_bytes(), target.as_bytes(), 0o777, b"")
    }

    fn end(mut self) -> Vec<u8> {
        self.0.extend_from_slice(&[0; 1024]);
        self.0
    }

    fn gz(self) -> Vec<u8> {
        gzip(&self.end())
    }
}

/// Unpacks into `<scratch>/home`, beside a file that nothing may touch.
struct Case {
    scratch: Scratch,
    result: Result<(), DropletError>,
}

impl Case {
    fn new(archive: &[u8]) -> Self {
        Self::with(archive, &options())
    }

    fn with(archive: &[u8], options: &FetchOptions) -> Self {
        let scratch = Scratch::new();
        let home = scratch.path().join("home");
        fs::create_dir(&home).unwrap();
        fs::write(scratch.path().join("outside"), "untouched").unwrap();
        let path = scratch.path().join("archive");
        fs::File::create(&path).unwrap().write_all(archive).unwrap();
        let result = unpack(
            File::open(&path).unwrap(),
            &home,
            OWNER,
            options,
            &Stop::default(),
        );
        assert_eq!(
            fs::read(scratch.path().join("outside")).unwrap(),
            b"untouched"
        );
        let mut names: Vec<_> = fs::read_dir(scratch.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        names.sort();
        assert_eq!(names, ["archive", "home", "outside"]);
        Self { scratch, result }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.scratch.path().join("home").join(path)
    }

    #[track_caller]
    fn refused(&self, why: &str) {
        let text = self.result.as_ref().unwrap_err().to_string();
        assert!(text.contains(why), "{text}");
    }
}

#[test]
fn everything_a_droplet_may_hold() {
    let long = format!("./app/{}/{}", "d".repeat(90), "f".repeat(200));
    let tar = Tar::default()
        .entry(b'g', b"pax_global_header", b"", 0o644, b"12 comment=x")
        .entry(b'5', b"./", b"", 0o700, b"")
        .entry(b'5', b"./app/", b"", 0o2555, b"")
        .entry(b'0', b"./app/run", b"", 0o6755, b"#!/bin/sh\n")
        .link(b'2', "./app/absolute", "/etc/passwd")
        .link(b'2', "./app/upwards", "../../../outside")
        .link(b'1', "./app/again", "./app/run")
        .link(b'1', "./app/linklink", "app/absolute")
        .file("./deep/without/parents", b"1")
        .file("./deep/without/parents", b"22")
        .entry(
            b'L',
            b"././@LongLink",
            b"",
            0o644,
            format!("{long}\0").as_bytes(),
        )
        .file("cut", b"long")
        .entry(b'x', b"PaxHeader", b"", 0o644, b"17 path=app/p\xc3\xa4x\n")
        .file("cut", b"pax")
        .entry(b'0', b"./bin\xff", b"", 0o600, b"");
    let case = Case::new(&tar.gz());
    case.result.as_ref().unwrap();
    let seen = |path: &str| {
        let data = fs::symlink_metadata(case.path(path)).unwrap();
        assert_eq!((data.uid(), data.gid()), (2000, 2001), "{path}");
        data.mode() & 0o7777
    };
    assert_eq!(seen("app"), 0o755);
    assert_eq!(seen("app/run"), 0o755);
    assert_eq!(seen("app/absolute"), 0o777);
    assert_eq!(seen("deep/without"), 0o755);
    assert_eq!(
        fs::read_link(case.path("app/absolute")).unwrap(),
        Path::new("/etc/passwd")
    );
    assert_eq!(
        fs::read_link(case.path("app/upwards")).unwrap(),
        Path::new("../../../outside")
    );
    assert_eq!(
        fs::read_link(case.path("app/linklink")).unwrap(),
        Path::new("/etc/passwd")
    );
    let number = |path: &str| fs::symlink_metadata(case.path(path)).unwrap().ino();
    assert_eq!(number("app/run"), number("app/again"));
    assert_eq!(number("app/absolute"), number("app/linklink"));
    assert_eq!(fs::read(case.path("deep/without/parents")).unwrap(), b"22");
    assert_eq!(fs::read(case.path(&long)).unwrap(), b"long");
    assert_eq!(fs::read(case.path("app/päx")).unwrap(), b"pax");
    assert_eq!(
        case.path("app/run").metadata().unwrap().mtime(),
        1_600_000_000
    );
}

#[test]
fn paths_that_lead_out_are_refused() {
    for path in ["../outside", "a/../../outside", "..", "/outside", "a/.."] {
        for kind in [b'0', b'5', b'2', b'1'] {
            let tar = Tar::default().entry(kind, path.as_bytes(), b"x", 0o644, b"");
            Case::new(&tar.gz()).refused("its path");
        }
    }
    let nul = Tar::default()
        .entry(b'x', b"PaxHeader", b"", 0o644, b"12 path=a\0b\n")
        .file("cut", b"");
    Case::new(&nul.gz()).refused("NUL");
}

#[test]
fn nothing_is_made_through_a_symlink() {
    for (first, then) in [
        ("a", "a/outside"),
        ("a", "a/b/outside"),
        ("./x/a", "x/a/outside"),
    ] {
        for target in ["..", "../..", "/tmp", ".", "nowhere"] {
            let tar = Tar::default().link(b'2', first, target).file(then, b"evil");
            let case = Case::new(&tar.gz());
            assert!(
                matches!(case.result, Err(DropletError::Entry { .. })),
                "{:?}",
                case.result
            );
        }
    }
    // The link itself is replaced, never followed.
    let tar = Tar::default()
        .link(b'2', "a", "../outside")
        .file("a", b"new");
    let case = Case::new(&tar.gz());
    assert_eq!(fs::read(case.path("a")).unwrap(), b"new");
    assert!(case.path("a").symlink_metadata().unwrap().is_file());
    let tar = Tar::default()
        .link(b'2', "a", "..")
        .entry(b'5', b"a", b"", 0o755, b"")
        .file("a/b", b"");
    let case = Case::new(&tar.gz());
    assert!(case.path("a").symlink_metadata().unwrap().is_dir());
}

#[test]
fn hard_links_stay_inside() {
    for target in ["../outside", "/etc/passwd", "a/../../outside"] {
        let tar = Tar::default().link(b'1', "hard", target);
        Case::new(&tar.gz()).refused("outside of the droplet");
    }
    for target in ["nowhere", "no/where", "soft/outside", "."] {
        let tar = Tar::default()
            .link(b'2', "soft", "..")
            .link(b'1', "hard", target);
        Case::new(&tar.gz()).refused("not in the droplet");
    }
    let tar = Tar::default()
        .link(b'2', "soft", "../outside")
        .link(b'1', "hard", "soft");
    let case = Case::new(&tar.gz());
    assert!(case.path("hard").symlink_metadata().unwrap().is_symlink());
    let tar = Tar::default()
        .entry(b'5', b"d", b"", 0o755, b"")
        .link(b'1', "hard", "d");
    Case::new(&tar.gz()).refused("hard link to a directory");
    let tar = Tar::default().file("a", b"x").link(b'1', "a", "a");
    Case::new(&tar.gz()).refused("not in the droplet");
}

#[test]
fn special_files_are_refused_by_name() {
    for kind in [b'3', b'4', b'6', b'V', b'M', b'Z'] {
        let case = Case::new(
            &Tar::default()
                .entry(kind, b"app/special", b"", 0o644, b"")
                .gz(),
        );
        case.refused("\"app/special\"");
        case.refused("only files, directories and links");
        assert!(!case.path("app/special").exists());
    }
}

#[test]
fn a_file_does_not_replace_a_directory() {
    let tar = Tar::default().file("a/b", b"").file("a", b"");
    Case::new(&tar.gz()).refused("a directory of that name");
    let tar = Tar::default().file("a", b"").file("a/b", b"");
    Case::new(&tar.gz()).refused("no directory");
}

#[test]
fn entries_and_bytes_are_bounded() {
    let many = (0..60).fold(Tar::default(), |tar, i| tar.file(&format!("f{i}"), b""));
    Case::new(&many.gz()).refused("more than 50 entries");
    let implied = (0..6).fold(Tar::default(), |tar, i| {
        tar.file(&format!("{}f", format!("d{i}/").repeat(10)), b"")
    });
    Case::new(&implied.gz()).refused("more than 50 entries");
    let deep = "d/".repeat(300) + "f";
    let deep = Tar::default()
        .entry(
            b'L',
            b"././@LongLink",
            b"",
            0o644,
            format!("{deep}\0").as_bytes(),
        )
        .file("cut", b"");
    Case::new(&deep.gz()).refused("too deep");
    let bomb = Tar::default().file("zeros", &vec![0; 5 << 20]).gz();
    assert!(bomb.len() < 64 * 1024);
    Case::new(&bomb).refused("more than 4194304 bytes");
    let padded = [Tar::default().end(), vec![0; 5 << 20]].concat();
    Case::new(&gzip(&padded)).refused("more than 4194304 bytes");
}

#[test]
fn a_sparse_entry_counts_with_its_holes() {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::GNUSparse);
    header.set_mode(0o644);
    header.set_size(0);
    header.set_path("hole").unwrap();
    let gnu = header.as_gnu_mut().unwrap();
    gnu.sparse[0].offset.copy_from_slice(b"77777777777\0");
    gnu.sparse[0].numbytes.copy_from_slice(b"00000000000\0");
    gnu.realsize.copy_from_slice(b"77777777777\0");
    header.set_cksum();
    let archive = [header.as_bytes().as_slice(), &[0; 1024]].concat();
    let case = Case::new(&gzip(&archive));
    assert!(case.result.is_err());
    let written = case.path("hole").metadata().map_or(0, |data| data.len());
    assert!(written <= 4 << 20, "{written}");
}

#[test]
fn metadata_is_bounded() {
    let name = vec![b'a'; 3 << 20];
    let tar = Tar::default()
        .entry(b'L', b"././@LongLink", b"", 0o644, &name)
        .file("cut", b"");
    Case::new(&tar.gz()).refused("metadata");
    // What a directory claims to hold is skipped as its own, not as metadata of the next.
    let tar = Tar::default()
        .entry(b'5', b"d/", b"", 0o755, &vec![0; 3 << 20])
        .file("f", b"");
    let case = Case::new(&tar.gz());
    case.result.as_ref().unwrap();
    assert!(case.path("f").is_file());
}

#[test]
fn damage_is_named() {
    let body: Vec<u8> = (0..200_000u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let whole = Tar::default().file("app/data", &body).gz();
    for keep in [5, 20, whole.len() / 2, whole.len() - 20, whole.len() - 4] {
        Case::new(&whole[..keep]).refused("truncated");
    }
    Case::new(b"").refused("");
    Case::new(b"this is no gzip at all").refused("no sound gzip");
    let mut flipped = whole.clone();
    let last = flipped.len() - 6;
    flipped[last] ^= 1;
    Case::new(&flipped).refused("no sound gzip");
    let plain = Tar::default().file("app/data", &body).0;
    Case::new(&gzip(&plain[..100_000])).refused("app/data has 99488 of its 200000 bytes");
    Case::new(&gzip(&plain[..300])).refused("");
    let mut bad_sum = Tar::default().file("a", b"").end();
    bad_sum[0] = b'b';
    Case::new(&gzip(&bad_sum)).refused("checksum");
    // Several gzip members are one stream.
    let tar = Tar::default().file("a", b"1").file("b", b"2").end();
    let case = Case::new(&[gzip(&tar[..700]), gzip(&tar[700..])].concat());
    case.result.as_ref().unwrap();
    assert!(case.path("b").is_file());
}
