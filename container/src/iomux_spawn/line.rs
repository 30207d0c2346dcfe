//! Where to cut a stream.

/// Whether an unfinished line may stay in the pipe a little longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Patience {
    Hold,
    Spent,
}

/// How many of the bytes at the front of a pipe to take now: up to the last line's end; all of them
/// if no line ends here and it is not worth waiting (`hold_max` bytes, or patience is spent); else
/// none. In the first `known` of them an earlier look saw no line's end; where somebody else reads, they may be other ones, which
/// are taken with the rest.
pub(super) fn cut(
    waiting: &[u8],
    known: usize,
    hold_max: usize,
    patience: Patience,
) -> Option<usize> {
    let new = waiting.get(known..).unwrap_or(waiting);
    match new.iter().rposition(|byte| *byte == b'\n') {
        Some(end) => Some(waiting.len() - new.len() + end + 1),
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
            let cut = |patience| cut(waiting.as_bytes(), 0, 8, patience);
            assert_eq!(cut(Patience::Hold), held, "{waiting:?}");
            assert_eq!(cut(Patience::Spent), spent, "{waiting:?}");
        }
    }

    #[test]
    fn only_what_is_new_is_searched() {
        let cut = |known| cut(b"o\ne\nt", known, 8, Patience::Hold);
        let found = [Some(4), Some(4), None, Some(4)];
        assert_eq!([0, 3, 4, 6].map(cut), found);
    }
}
