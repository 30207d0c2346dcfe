//! Every seed and every crash that is kept, as they are and damaged, on any toolchain.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "test")]

use ostler_fuzz::{TARGETS, run, seeds};
use std::path::Path;

/// Damaged copies of each seed.
const DAMAGED: u64 = 100;

/// A generator (splitmix64) that gives the same numbers each time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, most: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) % most.max(1) as u64).unwrap()
    }

    /// Cuts, flips, repeats or takes out.
    fn damage(&mut self, mut bytes: Vec<u8>) -> Vec<u8> {
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len());
            match self.below(5) {
                0 => bytes.truncate(at),
                1 | 2 => {
                    if let Some(byte) = bytes.get_mut(at) {
                        *byte ^= 1 << self.below(8);
                    }
                }
                3 => {
                    let end = at + self.below(bytes.len() - at);
                    let piece = bytes[at..end].to_vec();
                    bytes.splice(at..at, piece);
                }
                _ => {
                    let end = at + self.below(bytes.len() - at);
                    bytes.drain(at..end);
                }
            }
        }
        bytes
    }
}

#[test]
fn what_is_kept_breaks_nothing_whole_or_damaged() {
    let mut dice = Dice(4);
    for (target, take) in TARGETS {
        let seeds = seeds(target).unwrap();
        assert!(!seeds.is_empty(), "{target} has no seed");
        for seed in seeds {
            take(&seed);
            for _ in 0..DAMAGED {
                take(&dice.damage(seed.clone()));
            }
        }
        take(b"");
    }
}

#[test]
fn every_target_has_its_program() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let manifest = std::fs::read_to_string(here.join("Cargo.toml")).unwrap();
    for (target, _) in TARGETS {
        let program = here.join(format!("fuzz_targets/{target}.rs"));
        let text = std::fs::read_to_string(program).unwrap();
        assert!(text.contains(&format!("\"{target}\"")), "{text}");
        assert!(manifest.contains(&format!("name = \"{target}\"")));
    }
    let programs = std::fs::read_dir(here.join("fuzz_targets")).unwrap();
    assert_eq!(programs.count(), TARGETS.len());
    let kept = std::fs::read_dir(here.join("../fixtures/fuzz")).unwrap();
    for kept in kept {
        let name = kept.unwrap().file_name().into_string().unwrap();
        let known = TARGETS.iter().any(|(target, _)| *target == name);
        assert!(known || name == "README.md", "{name} is no target");
    }
}

#[test]
#[should_panic(expected = "no target is called")]
fn a_target_that_is_none_is_named() {
    run("nothing", b"");
}
