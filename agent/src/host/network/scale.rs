//! That a change costs the same whether ten containers are attached or a thousand, and does not wait for a
//! look at all of them; and how much all of them may have.

use super::nfnetlink::Nftables;
use super::rules::Rules;
use super::subnet::Subnet;
use super::table::{Policy, SET_NAMES, TABLE};
use super::testbed::{DEADLINE, on_host};
use super::watch::Changes;
use super::{Attached, EgressRule, Traffic};
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

/// Each with rules of its own.
fn many(count: u32) -> Vec<Attached> {
    let pool = Subnet::parse(([10, 254, 0, 0].into(), 16)).unwrap();
    let rule = |first: u32, traffic| EgressRule {
        destination: (Ipv4Addr::from_bits(first), Ipv4Addr::from_bits(first + 255)),
        traffic,
        log: false,
    };
    let one = |number: u32| {
        let [_, _, a, b] = number.to_be_bytes();
        let (port, net) = (u16::from_be_bytes([a, b]), number << 8);
        Attached {
            ports: vec![(10_000 + port, 8080)],
            egress: vec![
                rule(0x1400_0000 | net, Traffic::Tcp(vec![(port, port + 9)])),
                rule(0x1500_0000 | net, Traffic::Udp(vec![(53, 53)])),
                rule(0x1600_0000 | net, Traffic::All),
            ],
            ..Attached::new(&format!("{number:011}"), pool.block(number))
        }
    };
    (0..count).map(one).collect()
}

/// The least that an attach and a detach took.
fn least(rules: &Rules, next: &Attached) -> (Duration, Duration) {
    let rounds = (0..50).map(|_| {
        let begun = Instant::now();
        rules.attach(next.clone()).unwrap();
        let attached = begun.elapsed();
        let begun = Instant::now();
        rules.detach(next).unwrap();
        (attached, begun.elapsed())
    });
    let (attach, detach): (Vec<_>, Vec<_>) = rounds.unzip();
    let least = |times: Vec<Duration>| times.into_iter().min().unwrap();
    (least(attach), least(detach))
}

#[test]
fn a_change_costs_the_same_beside_ten_and_beside_a_thousand() {
    on_host(|| async {
        let changes = Changes::open().unwrap();
        let (rules, _) = Rules::open(Policy::default(), &changes).unwrap();
        let all = many(1001);
        let costs = [10, 1000].map(|count| {
            rules.rebuild(all[..count].to_vec()).unwrap();
            least(&rules, &all[1000])
        });
        eprintln!("attach, detach beside 10 and 1000: {costs:?}");
        let [(attach, detach), (attach_many, detach_many)] = costs;
        // What grows with the number would be a hundred times as much.
        assert!(attach_many < 4 * attach, "{costs:?}");
        assert!(detach_many < 4 * detach, "{costs:?}");
    });
}

/// One whose few rules are 18,487 elements: each of 180 hosts has a message of its own, and all the ports.
fn heavy(number: u32) -> Attached {
    let pool = Subnet::parse(([10, 254, 0, 0].into(), 16)).unwrap();
    let mut rules: Vec<_> = (0..180_u8)
        .map(|n| EgressRule {
            destination: ([192, 0, 2, n].into(), [192, 0, 2, n].into()),
            traffic: Traffic::Icmp(Some(n), Some(0)),
            log: false,
        })
        .collect();
    let ports = (0..100).map(|n| (2 * n + 1, 2 * n + 1)).collect();
    rules.push(EgressRule {
        destination: ([0, 0, 0, 0].into(), [255, 255, 255, 255].into()),
        traffic: Traffic::Tcp(ports),
        log: false,
    });
    Attached {
        egress: rules,
        ..Attached::new(&format!("{number:011}"), pool.block(number))
    }
}

#[test]
fn rules_of_all_have_a_bound_and_nobody_without_rules_is_refused() {
    on_host(|| async {
        let changes = Changes::open().unwrap();
        let (rules, _) = Rules::open(Policy::default(), &changes).unwrap();
        rules.rebuild((0..10).map(heavy).collect()).unwrap();
        let nftables = Nftables::open(TABLE).unwrap();
        let there = || nftables.elements(&SET_NAMES).unwrap().len();
        let before = there();
        assert_eq!(before, 184_880);
        let refused = rules.attach(heavy(10)).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "no room for 18487 elements of egress rules beside 184870 of other instances, 200000 in \
             all: fewer or coarser rules need less"
        );
        assert_eq!(there(), before);
        let [few, free] = [11, 12].map(|n| Attached::new(&format!("{n:011}"), heavy(n).lease));
        rules.attach(free).unwrap();
        let egress = heavy(11).egress[..2].to_vec();
        rules.attach(Attached { egress, ..few }).unwrap();
        rules.detach(&heavy(0)).unwrap();
        rules.attach(heavy(10)).unwrap();
        // What lives already is not refused.
        rules.rebuild((0..12).map(heavy).collect()).unwrap();
        assert!(rules.attach(heavy(12)).is_err());
    });
}

#[test]
fn a_slow_look_at_the_table_delays_no_change() {
    on_host(|| async {
        let changes = Changes::open().unwrap();
        let (rules, _) = Rules::open(Policy::default(), &changes).unwrap();
        let [one, two] = [0, 1].map(|n| many(2)[n].clone());
        rules.attach(one.clone()).unwrap();
        let slow = rules.look_slowly();
        let (mended, ended) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| mended.send(rules.mend(&changes)).unwrap());
            // Somebody looks by now; were that not so, nothing would be shown.
            let soon = ended.recv_timeout(Duration::from_millis(300));
            assert!(soon.is_err());
            rules.attach(two).unwrap();
            rules.map(&one.handle, (61_001, 8080)).unwrap();
            rules.detach(&one).unwrap();
            assert!(ended.try_recv().is_err());
            drop(slow);
            assert!(ended.recv_timeout(DEADLINE).unwrap());
        });
    });
}
