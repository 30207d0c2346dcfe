//! What somebody else changes of containers' links, and what becomes of it.

use super::testbed::{
    Container, HOST, OUTSIDE, a_while, attached, converse, eventually, on_host, open, outside, run,
};
use super::watch::listen;
use super::{Attached, Bandwidth, link};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, SockProtocol, recv};
use std::fs;
use std::os::fd::AsRawFd as _;

const ONE: &str = "0000000000a";
const TWO: &str = "0000000000b";

/// A container's link as a person sees it, who is at its other end, and whether the host forwards what comes from it.
fn end(handle: &str) -> (String, String, String) {
    let link = link::name(handle);
    let forwards = format!("/proc/sys/net/ipv4/conf/{link}/forwarding");
    (
        run("ip", &format!("address show dev {link}")),
        neighbours(handle),
        fs::read_to_string(forwards).unwrap(),
    )
}

/// Who is known for ever.
fn neighbours(handle: &str) -> String {
    let link = link::name(handle);
    run("ip", &format!("neigh show dev {link} nud permanent"))
}

fn is_up(handle: &str) -> bool {
    end(handle).0.contains(",UP")
}

fn set_down(handle: &str) {
    run("ip", &format!("link set {} down", link::name(handle)));
}

#[test]
fn what_somebody_changes_of_a_link_is_put_back() {
    on_host(|| async {
        let (outside, network) = (outside(), open().await);
        let one = Container::new(&network, ONE).await;
        let two = Container::new(&network, TWO).await;
        let listener = outside.listen(80);
        // The kernel notices that a cable has two ends in its own time.
        let ready = || {
            [ONE, TWO]
                .iter()
                .all(|handle| end(handle).0.contains(" state UP "))
        };
        eventually("both are up", ready).await;
        let before = (end(ONE), end(TWO));
        let link = link::name(ONE);
        assert!(!before.0.1.is_empty());
        let container = one.lease.container;
        let changes: [&[String]; 8] = [
            &[format!("link set {link} down")],
            &[format!("link set {link} arp on")],
            &[format!("neigh del {container} dev {link}")],
            &[format!("neigh flush dev {link} nud all")],
            &[format!("link set {link} address 02:00:00:00:00:01")],
            &[format!("address flush dev {link}")],
            &[
                format!("address flush dev {link}"),
                format!("link set {link} down"),
            ],
            &[],
        ];
        for change in changes {
            for arguments in change {
                run("ip", arguments);
            }
            if change.is_empty() {
                fs::write(format!("/proc/sys/net/ipv4/conf/{link}/forwarding"), "0").unwrap();
            }
            eventually(&format!("{change:?}"), || (end(ONE), end(TWO)) == before).await;
            for container in [&one, &two] {
                let mut client = container.namespace.connect(OUTSIDE, 80).unwrap();
                converse(&listener, &mut client);
            }
        }
    });
}

#[test]
fn a_limit_that_somebody_takes_away_is_put_back() {
    on_host(|| async {
        let network = open().await;
        let limit = |into| Bandwidth { into, out: None };
        let how = |attached: &mut Attached| attached.bandwidth = limit(Some(1_000_000));
        let container = Container::with(&network, ONE, how).await;
        let is = async || network.bandwidth(ONE, &container.lease).await.unwrap();
        let link = link::name(ONE);
        let comes = async |wanted| {
            for _ in 0..600 {
                if is().await == wanted {
                    return;
                }
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
            panic!("{wanted:?} never came");
        };
        // What was made is looked at.
        a_while().await;
        for rate in [1_000_000, 3_000_000] {
            network.limit(ONE, limit(Some(rate))).await.unwrap();
            run("tc", &format!("qdisc delete dev {link} root"));
            assert_eq!(is().await, limit(None));
            comes(limit(Some(rate))).await;
            run("tc", &format!("qdisc replace dev {link} root pfifo"));
            comes(limit(Some(rate))).await;
            // What was put back is looked at.
            a_while().await;
        }
        // What is taken out as it should stays out.
        network.limit(ONE, limit(None)).await.unwrap();
        a_while().await;
        assert_eq!(is().await, limit(None));
    });
}

#[test]
fn forwarding_that_somebody_switches_off_is_on_again() {
    const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";
    on_host(|| async {
        let (outside, network) = (outside(), open().await);
        let container = Container::new(&network, ONE).await;
        let (listener, before) = (outside.listen(80), end(ONE));
        // What the start looks at is looked at.
        a_while().await;
        fs::write(FORWARDING, "0").unwrap();
        let forwards = || fs::read_to_string(FORWARDING).unwrap() == "1\n" && end(ONE) == before;
        eventually("the host forwards", forwards).await;
        converse(
            &listener,
            &mut container.namespace.connect(OUTSIDE, 80).unwrap(),
        );
    });
}

#[test]
fn a_link_of_an_older_agent_goes_on_asking_for_its_neighbour() {
    on_host(|| async {
        let (outside, network) = (outside(), open().await);
        let listener = outside.listen(80);
        let one = Container::of_an_older_agent(&network, ONE);
        let ours = [attached(ONE, &one.lease, &[(61_001, 8080)])];
        network.rebuild(&ours).await.unwrap();
        let inner = one.namespace.listen(8080);
        for _ in 0..2 {
            eventually("it forwards", || is_up(ONE) && end(ONE).2 == "1\n").await;
            converse(&listener, &mut one.namespace.connect(OUTSIDE, 80).unwrap());
            converse(&inner, &mut outside.connect(HOST, 61_001).unwrap());
            assert_eq!(neighbours(ONE), "");
            set_down(ONE);
        }
    });
}

#[test]
fn links_that_are_not_attached_are_left_as_they_are() {
    on_host(|| async {
        let network = open().await;
        let one = Container::new(&network, ONE).await;
        let two = Container::new(&network, TWO).await;
        network.detach(&attached(ONE, &one.lease, &[])).await;
        run("ip", "link add os-mgmt type bridge");
        set_down(ONE);
        set_down(TWO);
        eventually("the second is up", || is_up(TWO)).await;
        assert!(!is_up(ONE));
        assert!(!run("ip", "link show dev os-mgmt").contains(",UP"));
        run("ip", "link del os-mgmt");
        // Nobody tends what a network had that is gone; the next one finds it.
        drop(network);
        set_down(TWO);
        a_while().await;
        assert!(!is_up(TWO));
        let network = open().await;
        network.adopt_lease(&two.lease).unwrap();
        network
            .rebuild(&[attached(TWO, &two.lease, &[])])
            .await
            .unwrap();
        eventually("the second is up again", || is_up(TWO)).await;
        network.close().await;
        set_down(TWO);
        a_while().await;
        assert!(!is_up(TWO) && !is_up(ONE));
    });
}

#[test]
fn more_events_than_can_wait_hide_no_change() {
    on_host(|| async {
        let network = open().await;
        let _container = Container::new(&network, ONE).await;
        a_while().await;
        // Nobody reads while this runs.
        let another = super::tend::events().unwrap();
        run("ip", "link add other type bridge");
        let flap = "link set other up\nlink set other down\n".repeat(3000);
        super::program::run("ip", &["-batch", "-"], &flap).unwrap();
        set_down(ONE);
        let heard = recv(another.as_raw_fd(), &mut [0; 4096], MsgFlags::empty());
        assert_eq!(heard, Err(Errno::ENOBUFS), "they could all wait");
        eventually("it is up", || is_up(ONE)).await;
    });
}

#[test]
fn links_that_are_right_are_not_written() {
    on_host(|| async {
        let network = open().await;
        let mut live = Vec::new();
        for handle in [ONE, TWO] {
            let bandwidth = Bandwidth {
                into: Some(1_000_000),
                out: None,
            };
            let how = |attached: &mut Attached| attached.bandwidth = bandwidth;
            let container = Container::with(&network, handle, how).await;
            let mut attached = attached(handle, &container.lease, &[]);
            attached.bandwidth = bandwidth;
            live.push((container, attached));
        }
        let ready = || {
            [ONE, TWO]
                .iter()
                .all(|handle| end(handle).0.contains(" state UP "))
        };
        eventually("both are up", ready).await;
        a_while().await;
        // Links, neighbours, addresses, settings. Of what queues on them the kernel tells when it is asked, too.
        let events = listen(SockProtocol::NetlinkRoute, 1 | 1 << 2 | 1 << 4 | 1 << 23).unwrap();
        let heard = || recv(events.as_raw_fd(), &mut [0; 4096], MsgFlags::empty());
        let attached: Vec<_> = live.iter().map(|(_, attached)| attached.clone()).collect();
        network.rebuild(&attached).await.unwrap();
        a_while().await;
        assert_eq!(heard(), Err(Errno::EAGAIN));
        set_down(ONE);
        eventually("it was looked at", || is_up(ONE)).await;
        heard().unwrap();
    });
}
