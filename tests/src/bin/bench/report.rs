//! What is printed, and the arithmetic behind it.

use std::time::Duration;

/// How many starts are measured.
pub fn rounds() -> usize {
    let Ok(text) = std::env::var("BENCH_N") else {
        return 20;
    };
    match text.parse() {
        Ok(rounds) if rounds > 0 => rounds,
        _ => panic!("BENCH_N={text} is no number of rounds"),
    }
}

/// Tells a person what goes on.
pub fn progress(what: &str) {
    eprintln!("bench: {what}");
}

/// Prints one figure; `peer` is what it is compared with, and that one's value.
pub fn figure(metric: &str, unit: &str, ours: f64, peer: Option<(&str, f64)>, n: usize) {
    let (name, theirs, ratio) = match peer {
        Some((name, theirs)) => (
            format!("\"{name}\""),
            format!("{theirs:.3}"),
            format!("{:.3}", ours / theirs),
        ),
        None => ("null".to_owned(), "null".to_owned(), "null".to_owned()),
    };
    // By hand: the order of the keys is for people.
    println!(
        r#"{{"metric":"{metric}","unit":"{unit}","ours":{ours:.3},"peer":{name},"theirs":{theirs},"ratio":{ratio},"n":{n}}}"#
    );
}

/// Prints the median and the 99th percentile of `ours` in milliseconds, once beside each peer's.
pub fn latency(metric: &str, ours: &[Duration], peers: &[(&str, &[Duration])]) {
    for (name, share) in [("p50", 50), ("p99", 99)] {
        let metric = format!("{metric}_{name}");
        let of = |times: &[Duration]| milliseconds(percentile(times, share));
        for (peer, theirs) in peers {
            figure(
                &metric,
                "ms",
                of(ours),
                Some((peer, of(theirs))),
                ours.len(),
            );
        }
    }
}

/// The smallest value that `share` percent of `values` do not exceed.
pub fn percentile<T: Copy + PartialOrd>(values: &[T], share: usize) -> T {
    let mut sorted = values.to_vec();
    sorted.sort_by(|a, b| a.partial_cmp(b).expect("no NaN"));
    let rank = (sorted.len() * share).div_ceil(100).max(1);
    *sorted.get(rank - 1).expect("at least one value")
}

/// A count, to calculate with.
pub fn as_f64(count: usize) -> f64 {
    u32::try_from(count).expect("a small number").into()
}

/// In milliseconds, as figures have it.
pub fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
