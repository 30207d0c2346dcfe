use super::disk::{Disks, Limit, Space};
use super::{Depot, DepotError, Directory, Ids, SeedFile, is_handle, seed};
use container::fault::SysError;
use nix::errno::Errno;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

const HANDLE: &str = "0123456789v";

/// A base directory that goes when the test ends, however it ends.
struct Base(PathBuf);

impl Base {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("ostler-depot-{name}-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Base {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

/// A container's directory, whole.
fn created(depot: &Depot) -> (Directory, Ids) {
    const LIMIT: Limit = Limit {
        bytes: 1 << 20,
        inodes: 64,
    };
    let (directory, ids) = depot.create(HANDLE).unwrap();
    let disks = Disks::unlimited(Space::new(&depot.base, 0));
    assert!(disks.begin(&directory, LIMIT).unwrap().is_none());
    disks.complete(&directory, ids, LIMIT).unwrap();
    (directory, ids)
}

fn file(path: &str, bytes: &[u8]) -> SeedFile {
    SeedFile {
        path: path.into(),
        mode: 0o4750,
        uid: 7,
        gid: 8,
        bytes: bytes.to_vec(),
    }
}

fn rights(path: &Path) -> (u32, u32, u32) {
    let metadata = fs::symlink_metadata(path).unwrap();
    (metadata.mode() & 0o7777, metadata.uid(), metadata.gid())
}

#[test]
fn a_container_has_its_directories_once() {
    let base = Base::new("once");
    let depot = Depot::open(&base.0).unwrap();
    let (directory, ids) = created(&depot);
    assert_eq!(rights(&base.0.join("containers")), (0o700, 0, 0));
    assert_eq!(rights(&directory.path), (0o700, 0, ids.first));
    let root = ids.on_host(0);
    assert_eq!(rights(&directory.upper()), (0o755, root, root));
    let again = depot.create(HANDLE);
    assert!(
        matches!(
            again,
            Err(DepotError::Refused(SysError {
                errno: Errno::EEXIST,
                ..
            }))
        ),
        "{again:?}"
    );
    fs::create_dir(base.0.join("containers/lost+found")).unwrap();
    assert_eq!(depot.list().unwrap(), [HANDLE]);
    directory.create_job(3).unwrap();
    assert_eq!(directory.jobs().unwrap(), [3]);
    assert!(directory.create_job(3).is_err());
}

#[test]
fn a_base_directory_without_room_for_its_sockets_is_refused() {
    let base = PathBuf::from("/tmp").join("d".repeat(80));
    let error = Depot::open(&base).unwrap_err();
    assert!(
        matches!(error, DepotError::TooLong { length: 85, .. }),
        "{error}"
    );
    assert!(error.to_string().contains("choose a shorter one"));
    assert!(!base.exists());
}

#[test]
fn handles_are_eleven_digits_of_base_32() {
    assert!(is_handle(HANDLE));
    for wrong in [
        "",
        "0123456789",
        "0123456789w",
        "0123456789V",
        "0123456789vv",
        "../23456789",
    ] {
        assert!(!is_handle(wrong), "{wrong}");
    }
}

#[test]
fn a_seed_file_keeps_the_rights_of_the_directories_above_it() {
    let base = Base::new("seed");
    let depot = Depot::open(&base.0).unwrap();
    let (directory, ids) = created(&depot);
    let (layer, stack) = (base.0.join("layer"), base.0.join("stack"));
    fs::create_dir_all(layer.join("home")).unwrap();
    fs::create_dir_all(stack.join("home/vcap")).unwrap();
    fs::set_permissions(layer.join("home"), fs::Permissions::from_mode(0o711)).unwrap();
    fs::set_permissions(stack.join("home/vcap"), fs::Permissions::from_mode(0o1770)).unwrap();
    chown(stack.join("home/vcap"), Some(1000), Some(1001)).unwrap();
    let files = [
        file("home/vcap/startup", b"one"),
        file("home/vcap/new/x", b"two"),
    ];
    seed(&directory.upper(), ids, &[layer, stack], &files).unwrap();
    let upper = directory.upper();
    let inside = |mode, uid, gid| (mode, ids.on_host(uid), ids.on_host(gid));
    assert_eq!(rights(&upper.join("home")), inside(0o711, 0, 0));
    let vcap = upper.join("home/vcap");
    assert_eq!(rights(&vcap), inside(0o1770, 1000, 1001));
    assert_eq!(rights(&vcap.join("new")), inside(0o755, 7, 8));
    assert_eq!(rights(&vcap.join("startup")), inside(0o4750, 7, 8));
    assert_eq!(fs::read(upper.join("home/vcap/new/x")).unwrap(), b"two");
}

#[test]
fn a_seed_file_follows_no_link_and_leaves_no_root() {
    let base = Base::new("links");
    let depot = Depot::open(&base.0).unwrap();
    let (directory, ids) = created(&depot);
    let (top, stack) = (base.0.join("top"), base.0.join("stack"));
    fs::create_dir_all(top.join("etc")).unwrap();
    fs::create_dir(&stack).unwrap();
    symlink("/tmp", stack.join("link")).unwrap();
    symlink("/tmp", stack.join("etc")).unwrap();
    let layers = [top.clone(), stack.clone()];
    let seed = |path| seed(&directory.upper(), ids, &layers, &[file(path, b"x")]);
    for outside in ["/etc/passwd", "../x", "etc/../../x", "", "."] {
        assert!(
            matches!(seed(outside), Err(DepotError::SeedPath(_))),
            "{outside}"
        );
    }
    let obstacle = seed("link/x").unwrap_err();
    assert!(matches!(&obstacle, DepotError::SeedObstacle { layer, .. } if *layer == stack));
    seed("etc/x").expect("the upper layer's directory hides the link");
    assert!(seed("etc/x").is_err(), "twice");
    assert!(directory.upper().join("etc/x").exists());
}

#[test]
fn trash_of_any_depth_goes_and_links_lead_nowhere() {
    let base = Base::new("trash");
    let depot = Depot::open(&base.0).unwrap();
    let (directory, _) = created(&depot);
    let keep = base.0.join("keep");
    fs::write(&keep, "x").unwrap();
    // Built from the inside out: deeper than a path can say (PATH_MAX) or a stack can recurse.
    for _ in 0..3000 {
        let outer = base.0.join("outer");
        fs::create_dir(&outer).unwrap();
        symlink(&base.0, outer.join("link")).unwrap();
        fs::rename(directory.upper(), outer.join("0")).unwrap();
        fs::rename(outer, directory.upper()).unwrap();
    }
    depot.discard(HANDLE).unwrap();
    depot.discard(HANDLE).unwrap();
    assert!(!directory.path.exists());
    depot.empty_trash().unwrap();
    assert_eq!(fs::read_dir(base.0.join("trash")).unwrap().count(), 0);
    assert_eq!(fs::read(&keep).unwrap(), b"x");
}

#[test]
fn what_an_earlier_agent_left_in_the_trash_is_no_obstacle() {
    let base = Base::new("left");
    let depot = Depot::open(&base.0).unwrap();
    for number in 0..64 {
        fs::create_dir_all(base.0.join(format!("trash/{number}/a/b"))).unwrap();
    }
    depot.create(HANDLE).unwrap();
    depot.discard(HANDLE).unwrap();
    depot.empty_trash().unwrap();
    assert_eq!(fs::read_dir(base.0.join("trash")).unwrap().count(), 0);
}

#[test]
fn what_helpers_complain_of_does_not_grow_without_end() {
    let base = Base::new("log");
    let depot = Depot::open(&base.0).unwrap();
    let (directory, _) = created(&depot);
    let path = directory.path.join("log");
    for (before, after) in [(1 << 20, 1 << 20), ((1 << 20) + 1, 0)] {
        fs::write(&path, vec![b'x'; before]).unwrap();
        drop(directory.log().unwrap());
        assert_eq!(fs::metadata(&path).unwrap().len(), after);
    }
}

#[test]
fn whoever_removes_the_trash_keeps_nothing_from_being_removed() {
    let base = Base::new("trashless");
    let depot = Depot::open(&base.0).unwrap();
    let (directory, _) = created(&depot);
    fs::remove_dir(base.0.join("trash")).unwrap();
    depot.empty_trash().unwrap();
    assert_eq!(depot.ranges_taken(), 1, "its files are there");
    depot.discard(HANDLE).unwrap();
    assert!(!directory.path.exists());
    depot.empty_trash().unwrap();
    assert_eq!(depot.ranges_taken(), 0);
    assert_eq!(rights(&base.0.join("trash")), (0o700, 0, 0));
}

#[test]
fn ids_are_no_other_containers_while_their_files_exist() {
    let base = Base::new("ids");
    let other = "vvvvvvvvvvv";
    let depot = Depot::open(&base.0).unwrap();
    let (_, first) = depot.create(HANDLE).unwrap();
    let (directory, second) = depot.create(other).unwrap();
    assert_ne!(first, second);
    fs::create_dir_all(directory.upper().join("a/b")).unwrap();
    depot.discard(other).unwrap();
    // Another agent finds both again: one has a directory, one has files in the trash.
    let found = super::ranges(&base.0).unwrap();
    let rest: Vec<_> = std::iter::from_fn(|| found.take()).collect();
    assert!(!rest.contains(&first) && !rest.contains(&second));
    depot.empty_trash().unwrap();
    let found = super::ranges(&base.0).unwrap();
    let rest: Vec<_> = std::iter::from_fn(|| found.take()).collect();
    assert!(!rest.contains(&first) && rest.contains(&second));
}
