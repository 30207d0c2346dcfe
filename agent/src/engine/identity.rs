//! The files by which a container knows itself and finds others: `etc/hostname`, `etc/hosts`,
//! `etc/resolv.conf`.

use super::{SeedFile, Spec};
use std::net::Ipv4Addr;
use std::path::Path;

/// Where the host keeps its name servers; the second one has the real ones where systemd-resolved
/// listens on a loopback address.
const RESOLV_CONF: [&str; 2] = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];

/// The caller's files and those of the three that are not among them. Reads the host's name servers;
/// blocks.
pub(super) fn files(spec: &Spec, address: Ipv4Addr) -> Vec<SeedFile> {
    let hostname = &spec.hostname;
    let own = [
        ("etc/hostname", format!("{hostname}\n")),
        (
            "etc/hosts",
            format!("127.0.0.1 localhost\n{address} {hostname}\n"),
        ),
        ("etc/resolv.conf", resolv_conf(&spec.dns)),
    ];
    let mut files = spec.files.clone();
    for (path, text) in own {
        if !files.iter().any(|file| file.path == Path::new(path)) {
            let (path, bytes) = (path.into(), text.into_bytes());
            files.push(SeedFile {
                path,
                mode: 0o644,
                uid: 0,
                gid: 0,
                bytes,
            });
        }
    }
    files
}

/// `etc/resolv.conf` of a container for which these name servers are configured; where there are none, the host's own
/// that it can reach. Blocks.
#[must_use]
pub fn resolv_conf(servers: &[Ipv4Addr]) -> String {
    if servers.is_empty() {
        return host_resolvers();
    }
    servers
        .iter()
        .map(|server| format!("nameserver {server}\n"))
        .collect()
}

/// The first of the host's files that names a server which a container can reach.
fn host_resolvers() -> String {
    let texts = RESOLV_CONF
        .iter()
        .filter_map(|path| std::fs::read_to_string(path).ok());
    let mut reachable = texts.map(|text| reachable(&text));
    reachable
        .find(|text| text.contains("nameserver"))
        .unwrap_or_default()
}

/// A `resolv.conf` without the servers that lead nowhere from inside: the host's loopback, and IPv6,
/// which containers do not have.
fn reachable(text: &str) -> String {
    let leads_nowhere = |line: &str| {
        let mut words = line.split_whitespace();
        words.next() == Some("nameserver")
            && words
                .next()
                .and_then(|server| server.parse::<Ipv4Addr>().ok())
                .is_none_or(|server| server.is_loopback() || server.is_unspecified())
    };
    let kept = text
        .lines()
        .filter(|line| !line.starts_with(['#', ';']) && !leads_nowhere(line));
    kept.map(|line| format!("{line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::{files, reachable};
    use crate::engine::{Bandwidth, DiskLimit, Limits, SeedFile, Spec};
    use std::net::Ipv4Addr;

    fn spec() -> Spec {
        Spec {
            handle: "0123456789v".to_owned(),
            stack: "/".into(),
            layers: Vec::new(),
            hostname: "app".to_owned(),
            limits: Limits::default(),
            disk: DiskLimit {
                bytes: 1 << 20,
                inodes: 64,
            },
            tmpfs_bytes: 0,
            files: Vec::new(),
            dns: vec!["9.9.9.9".parse().unwrap(), "1.1.1.1".parse().unwrap()],
            binds: Vec::new(),
            egress: Vec::new(),
            bandwidth: Bandwidth::default(),
        }
    }

    fn text(files: &[SeedFile], path: &str) -> String {
        let file = files
            .iter()
            .find(|file| file.path.to_str() == Some(path))
            .unwrap();
        String::from_utf8(file.bytes.clone()).unwrap()
    }

    #[test]
    fn a_container_knows_its_name_and_its_name_servers() {
        let files = files(&spec(), Ipv4Addr::new(10, 254, 0, 2));
        assert_eq!(text(&files, "etc/hostname"), "app\n");
        assert_eq!(
            text(&files, "etc/hosts"),
            "127.0.0.1 localhost\n10.254.0.2 app\n"
        );
        assert_eq!(
            text(&files, "etc/resolv.conf"),
            "nameserver 9.9.9.9\nnameserver 1.1.1.1\n"
        );
    }

    #[test]
    fn the_callers_files_win() {
        let mut spec = spec();
        let (path, bytes) = ("etc/hosts".into(), b"mine".to_vec());
        spec.files.push(SeedFile {
            path,
            mode: 0o600,
            uid: 1,
            gid: 1,
            bytes,
        });
        let files = files(&spec, Ipv4Addr::LOCALHOST);
        assert_eq!(text(&files, "etc/hosts"), "mine");
        assert_eq!(files.len(), 3);
    }

    #[test]
    fn name_servers_that_lead_nowhere_are_left_out() {
        let host = "# by hand\nsearch lan\nnameserver 127.0.0.53\nnameserver 10.0.0.1\n\
                    nameserver fe80::1\noptions edns0\n";
        assert_eq!(
            reachable(host),
            "search lan\nnameserver 10.0.0.1\noptions edns0\n"
        );
        assert_eq!(reachable("nameserver ::1\n"), "");
    }
}
