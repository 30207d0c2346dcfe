//! Where to cut a stream.

/// Whether an unfinished line may stay in the pipe a little longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Patience {
    Hold,
    Spent,
}

/// How many of the bytes at the front of a pipe to take now: up to the last line's end; all of them
/// if no line ends here and it is not worth waiting (`hold_max` bytes, or patience is spent); else
/// none.
pub(super) fn cut(waiting: &[u8], hold_max: usize, patience: Patience) -> Option<usize> {
    match waiting.iter().rposition(|byte| *byte == b'\n') {
        Some(end) => Some(end + 1),
        None if waiting.len() >= hold_max || patience == Patience::Spent => Some(waiting.len()),
        None => None,
    }
}

#[cfg(test)]
mod tests {
    use super::{Patience, cut};

    #[test]
    fn lines_are_cut_at_their_ends() {
        for (waiting, held, spent) in [
            ("one\n", Some(4), Some(4)),
            ("one\ntw", Some(4), Some(4)),
            ("one", None, Some(3)),
            ("a long line", Some(11), Some(11)),
            ("\n", Some(1), Some(1)),
        ] {
            assert_eq!(
                cut(waiting.as_bytes(), 8, Patience::Hold),
                held,
                "{waiting:?}"
            );
            assert_eq!(
                cut(waiting.as_bytes(), 8, Patience::Spent),
                spent,
                "{waiting:?}"
            );
        }
    }
}
