//! Luck that can be had again.

use std::time::Duration;

/// Numbers that look random and are the same each time.
#[derive(Debug)]
pub struct Dice(pub u64);

impl Dice {
    /// Less than `below`.
    pub fn number(&mut self, below: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }

    /// Less than so many milliseconds.
    pub fn milliseconds(&mut self, below: u64) -> Duration {
        Duration::from_millis(self.number(below))
    }

    /// One of these.
    ///
    /// # Panics
    /// If there is none.
    pub fn pick<T: Clone>(&mut self, of: &[T]) -> T {
        let number = self.number(of.len() as u64);
        of[usize::try_from(number).expect("less than a length")].clone()
    }
}
