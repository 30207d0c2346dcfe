//! What a fuzzer begins with: the fixtures, and what our own encoders write.

use container::copy::{self, Links, pack};
use container::frames;
use container::job::JobRequest;
use container::launch::{Event, Launch};
use container::request::{Answer, Request};
use container::spool::{Cursor, MIN_CAP, Record, SpoolWriter, Stream};
use container::status::Status;
use std::fs;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use crate::trees::Scratch;

/// The fixtures of this repository.
fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures")
}

/// The seeds of a target: what is kept in `fixtures/fuzz/<target>/`, and what is made here.
///
/// # Errors
/// If they cannot be read or made.
pub fn seeds(target: &str) -> io::Result<Vec<Vec<u8>>> {
    let mut seeds = files(&fixtures().join("fuzz").join(target))?;
    match target {
        "message" => seeds.extend(files(&fixtures().join("messages"))?),
        "subject" => seeds.extend(subjects()),
        "trace" => seeds.extend(traces()),
        "environment" => seeds.push(environment()?),
        "stager" => {
            for app in list(&fixtures().join("apps"))? {
                seeds.extend(fs::read(app.join("staging_info.yml")).ok());
            }
        }
        "users" => seeds.extend(users()),
        "http" => seeds.extend(["metrics", "health?a=b"].map(http)),
        "droplet" | "copy" => seeds.extend(trees()?),
        "frames" => seeds.push(frames()),
        "requests" => seeds.extend(requests()),
        "spool" => seeds.push(spool()?),
        _ => {}
    }
    Ok(seeds)
}

fn http(page: &str) -> Vec<u8> {
    format!("GET /{page} HTTP/1.1\r\nHost: 127.0.0.1:9464\r\nAccept: text/plain\r\n\r\n").into()
}

fn list(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let paths: io::Result<Vec<PathBuf>> = entries.map(|entry| Ok(entry?.path())).collect();
    let mut paths = paths?;
    paths.sort();
    Ok(paths)
}

fn files(directory: &Path) -> io::Result<Vec<Vec<u8>>> {
    let paths = list(directory)?.into_iter().filter(|path| path.is_file());
    paths.map(fs::read).collect()
}

fn subjects() -> Vec<Vec<u8>> {
    let mut all = messages::subjects::subscriptions("host");
    all.extend(messages::service::subscriptions("host"));
    all.extend(
        [
            "dea.host.start",
            "RUNNING",
            "10.0.0.0/8",
            "10.0.0.1-10.0.0.9",
            "https://me:secret@store.example.net/droplets/a.tgz?token=x#y",
            "file:///srv/droplets/a%20b.tgz",
        ]
        .map(str::to_owned),
    );
    all.into_iter().map(String::into_bytes).collect()
}

fn traces() -> Vec<Vec<u8>> {
    let ids = "0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331";
    let states = "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE";
    [
        format!("00-{ids}-01"),
        format!("00-{ids}-00\n{states}\nmore@vendor=1"),
        format!("cc-{ids}-01-what is to come"),
    ]
    .map(String::into_bytes)
    .into()
}

fn environment() -> io::Result<Vec<u8>> {
    let start = fs::read(fixtures().join("messages/dea.start.json"))?;
    let start: serde_json::Value = serde_json::from_slice(&start)?;
    let services = start.get("services").map(ToString::to_string);
    let mut lines = vec![services.unwrap_or_default()];
    let variables = start.get("env").and_then(serde_json::Value::as_array);
    let variables = variables.into_iter().flatten();
    lines.extend(variables.filter_map(|text| text.as_str().map(str::to_owned)));
    lines.extend(["A=$PORT ${HOME} \\$B $", "PORT=1", "B=${A"].map(str::to_owned));
    Ok(lines.join("\n").into_bytes())
}

fn users() -> [Vec<u8>; 2] {
    [
        &b"root:x:0:0:root:/root:/bin/bash\nvcap:x:1000:1000::/home/vcap:/bin/sh\n"[..],
        b"6,1014,5144901,-;oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0,oom_memcg=/a/b,\
          task_memcg=/a/b,task=hog,pid=4711,uid=1000\n SUBSYSTEM=x\n",
    ]
    .map(<[u8]>::to_vec)
}

/// The apps, as droplets are and as a copy streams them.
fn trees() -> io::Result<Vec<Vec<u8>>> {
    let mut trees = Vec::new();
    for app in list(&fixtures().join("apps"))? {
        if app.is_dir() {
            let mut stream = Vec::new();
            let packed = pack(&app.join("."), Links::Keep, &mut stream, &mut |_| ());
            packed.map_err(|fault: copy::Fault| io::Error::other(fault.to_string()))?;
            trees.push(stream);
        }
    }
    Ok(trees)
}

fn frames() -> Vec<u8> {
    let mut bytes = Vec::new();
    let next = Cursor::default();
    let output = Record::Output {
        stream: Stream::Stdout,
        offset: 0,
        time_ns: 1,
        bytes: &b"a line\n"[..],
    };
    let gap = Record::Gap {
        stream: Stream::Stderr,
        offset: 0,
        bytes: 5,
        certain: true,
    };
    let end = Record::End {
        stdout: 7,
        stderr: 5,
    };
    for record in [Record::Started, output, gap, end] {
        frames::encode(&record, &next, &mut bytes);
    }
    bytes
}

fn requests() -> Vec<Vec<u8>> {
    let job = JobRequest {
        argv: vec![b"/bin/true".to_vec(), b"-x".to_vec()],
        env: vec![b"A=b".to_vec()],
        umask: Some(0o077),
        ..JobRequest::default()
    };
    let launch = Launch {
        handle: "00000000001".into(),
        root: "/var/lib/ostler".into(),
        lowers: vec!["/stack".into()],
        ..Launch::default()
    };
    let failed = Event::Failed {
        what: "mount".into(),
        errno: 1,
    };
    vec![
        Request::Attach { job: 1 }.encode(),
        Request::Forget { job: 1 }.encode(),
        Answer::Refused(2).encode(),
        Answer::Done(Vec::new()).encode(),
        job.encode(),
        launch.encode(),
        failed.encode(),
        Status::Exited(3).encode().to_vec(),
    ]
}

/// A segment, nothing, and the marks, as `disk::spool` takes them apart.
fn spool() -> io::Result<Vec<u8>> {
    let scratch = Scratch::new();
    let refused = |error: container::fault::SysError| io::Error::other(error.to_string());
    let mut writer = SpoolWriter::open(scratch.path(), MIN_CAP).map_err(refused)?;
    writer.started().map_err(refused)?;
    let (reader, mut pipe) = io::pipe()?;
    pipe.write_all(b"first line\nsecond line\n")?;
    let took = writer.take(Stream::Stdout, reader.as_fd(), 4096);
    took.map_err(refused)?;
    writer.exit(Status::Exited(0)).map_err(refused)?;
    writer.end().map_err(refused)?;
    let read = |name: &str| fs::read(scratch.path().join(name));
    let (segment, marks) = (read("spool.0000000000000000")?, read("state")?);
    let length = u16::try_from(segment.len()).map_err(io::Error::other)?;
    let mut bytes = length.to_le_bytes().to_vec();
    bytes.extend(0_u16.to_le_bytes());
    bytes.extend(segment);
    bytes.extend(marks);
    Ok(bytes)
}
