//! What `dea.<id>.scale` has to do: pure.

/// The way from what is there to what is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Indices to start, lowest first.
    pub start: Vec<u64>,
    /// Handles to stop, of the highest indices first.
    pub stop: Vec<String>,
}

/// New instances take the lowest free indices, surplus ones go from the highest. `have` holds index
/// and handle of each instance that counts; an index may be there twice (two starts of one index).
#[must_use]
pub fn plan(have: &[(u64, String)], wanted: u64) -> Plan {
    let mut have: Vec<&(u64, String)> = have.iter().collect();
    have.sort();
    let count = have.len() as u64;
    let surplus = usize::try_from(count.saturating_sub(wanted)).unwrap_or(usize::MAX);
    let stop = have
        .iter()
        .rev()
        .take(surplus)
        .map(|(_, handle)| handle.clone())
        .collect();
    let free = (0..).filter(|index| !have.iter().any(|(taken, _)| taken == index));
    let missing = usize::try_from(wanted.saturating_sub(count)).unwrap_or(usize::MAX);
    Plan {
        start: free.take(missing).collect(),
        stop,
    }
}

#[cfg(test)]
mod tests {
    use super::plan;

    fn have(indices: &[u64]) -> Vec<(u64, String)> {
        indices
            .iter()
            .enumerate()
            .map(|(n, index)| (*index, format!("h{n}")))
            .collect()
    }

    #[test]
    fn the_lowest_free_indices_are_filled() {
        assert_eq!(plan(&have(&[0, 2]), 4).start, [1, 3]);
        assert_eq!(plan(&[], 2).start, [0, 1]);
        assert!(plan(&have(&[0, 1]), 2).start.is_empty());
    }

    #[test]
    fn the_highest_go_first() {
        let plan = plan(&have(&[5, 0, 3]), 1);
        assert!(plan.start.is_empty());
        assert_eq!(plan.stop, ["h0", "h2"]);
    }

    #[test]
    fn an_index_that_is_there_twice_counts_twice() {
        assert_eq!(plan(&have(&[0, 0]), 1).stop, ["h1"]);
        assert_eq!(plan(&have(&[0, 0]), 3).start, [1]);
    }
}
