//! Random numbers and ids from the kernel.

use std::time::Duration;

/// Lower-case hexadecimal, `bytes` random bytes long (so twice as many characters).
#[must_use]
pub fn hex(bytes: usize) -> String {
    let mut random = vec![0; bytes];
    fill(&mut random);
    random.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A container's handle: 11 characters of `[0-9a-v]`, 55 random bits.
#[must_use]
pub fn handle() -> String {
    let mut random = [0; 11];
    fill(&mut random);
    random
        .iter()
        .filter_map(|byte| char::from_digit(u32::from(byte % 32), 32))
        .collect()
}

/// An RFC 4122 version 4 UUID, with dashes.
#[must_use]
pub fn uuid() -> String {
    let mut random = [0; 16];
    fill(&mut random);
    let number = u128::from_be_bytes(random);
    let number = number & !(0xf << 76) & !(0x3 << 62) | 0x4 << 76 | 0x2 << 62;
    let text = format!("{number:032x}");
    let parts =
        [0..8, 8..12, 12..16, 16..20, 20..32].map(|range| text.get(range).unwrap_or_default());
    parts.join("-")
}

/// A random part of `whole`.
#[must_use]
pub fn share(whole: Duration) -> Duration {
    whole.mul_f64(f64::from(u32()) / f64::from(u32::MAX))
}

/// A random number.
#[must_use]
pub fn u32() -> u32 {
    let mut random = [0; 4];
    fill(&mut random);
    u32::from_le_bytes(random)
}

fn fill(bytes: &mut [u8]) {
    #[expect(
        clippy::expect_used,
        reason = "getrandom(2) fails only before Linux 3.17 or with a seccomp filter of ours"
    )]
    getrandom::fill(bytes).expect("the kernel has random numbers");
}

#[cfg(test)]
mod tests {
    #[test]
    fn ids_have_their_shape() {
        let uuid = super::uuid();
        assert_eq!(uuid.len(), 36);
        assert_eq!(uuid.chars().nth(14), Some('4'));
        assert!("89ab".contains(uuid.chars().nth(19).unwrap()), "{uuid}");
        let handle = super::handle();
        assert_eq!(handle.len(), 11);
        assert!(
            handle
                .bytes()
                .all(|b| b.is_ascii_digit() || (b'a'..=b'v').contains(&b))
        );
        assert_eq!(super::hex(16).len(), 32);
        assert_ne!(super::handle(), handle);
    }
}
