//! Copies into a container and out of it, whose root has no program for that.

use super::world::{create, job, world};
use crate::engine::{CopyError, EngineError};
use container::copy::{Limits, Links, Naming, pack, unpack};
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::sync::{Arc, Mutex};

/// Bytes that a copy has written.
#[derive(Debug, Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_tree_goes_in_and_comes_out_by_streams() {
    world(|world| async move {
        let engine = world.engine().await;
        let container = create(&engine, world.spec(&world.handle)).await.unwrap();
        let home = world.base.parent().unwrap().join("tree");
        fs::create_dir_all(home.join("sub")).unwrap();
        fs::write(home.join("sub/program"), "x".repeat(3 << 20)).unwrap();
        fs::set_permissions(home.join("sub/program"), PermissionsExt::from_mode(0o4751)).unwrap();
        symlink("sub/program", home.join("link")).unwrap();
        let mut stream = Vec::new();
        pack(&home, Links::Keep, &mut stream, &mut |line| {
            panic!("{line}")
        })
        .unwrap();
        let input = io::Cursor::new(stream.clone());
        let copied = container
            .copy_in("vcap", Path::new("/home/vcap"), input)
            .await
            .unwrap();
        assert_eq!((copied.done, copied.damaged), (stream.len() as u64, false));
        let script = "stat -c '%n %a %u:%g %F' tree/sub/program tree/link; ls tree";
        let told = job(&container, 1, script).await;
        let wanted = "tree/sub/program 751 1000:1000 regular file\ntree/link 777 1000:1000 symbolic link\nlink\nsub\n";
        assert_eq!(
            told.out(),
            wanted,
            "{}",
            String::from_utf8_lossy(&told.stderr)
        );

        let sink = Sink::default();
        let path = Path::new("tree");
        let copied = container
            .copy_out("vcap", path, Links::Keep, sink.clone())
            .await
            .unwrap();
        assert!(!copied.damaged && copied.complaints.is_empty());
        let back = home.with_file_name("back");
        fs::create_dir(&back).unwrap();
        let bytes = sink.0.lock().unwrap().clone();
        let (naming, limits) = (Naming::AsGiven, Limits::NONE);
        unpack(&bytes[..], &back, naming, limits, &mut |line| {
            panic!("{line}")
        })
        .unwrap();
        assert_eq!(
            fs::read(back.join("tree/sub/program")).unwrap().len(),
            3 << 20
        );
        assert_eq!(
            fs::read_link(back.join("tree/link")).unwrap(),
            Path::new("sub/program")
        );
        container.destroy().await.unwrap();
        engine.close().await;
    });
}

#[test]
fn a_copy_has_its_users_rights_and_says_what_it_lacks() {
    world(|world| async move {
        let engine = world.engine().await;
        let container = create(&engine, world.spec(&world.handle)).await.unwrap();
        let out = async |user: &str, path: &str| {
            let path = Path::new(path);
            container
                .copy_out(user, path, Links::Keep, Sink::default())
                .await
        };
        let words = |refused: Result<_, EngineError>| match refused {
            Err(EngineError::Copy(CopyError::Inside(why))) => why,
            other => panic!("{:?}", other.map(|_: crate::engine::Copied<u64>| ())),
        };
        assert_eq!(
            words(out("vcap", "/no/such").await),
            "cannot open \"/no/such\": No such file or directory"
        );
        assert_eq!(
            words(out("nobody-here", "/").await),
            "cannot find the user in the container's /etc/passwd: No such file or directory"
        );
        let input = io::Cursor::new(b"no tar".to_vec());
        let lies = container.copy_in("vcap", Path::new("/tmp"), input).await;
        assert_eq!(words(lies), "not a whole tar stream: its end is missing");
        let mut stream = Vec::new();
        pack(
            Path::new("/etc/hostname"),
            Links::Keep,
            &mut stream,
            &mut |_| (),
        )
        .unwrap();
        let input = io::Cursor::new(stream);
        let closed = container.copy_in("vcap", Path::new("/etc"), input).await;
        assert_eq!(
            words(closed),
            "cannot replace \"hostname\": Permission denied"
        );
        let _told = job(&container, 1, "umask 777; echo > a; umask 22; echo > b").await;
        let copied = out("vcap", ".").await.unwrap();
        assert!(copied.damaged);
        assert_eq!(
            copied.complaints,
            ["\"./a\": it cannot be read: Permission denied"]
        );
        assert!(!out("root", "/home/vcap").await.unwrap().damaged);
        container.destroy().await.unwrap();
        engine.close().await;
    });
}
