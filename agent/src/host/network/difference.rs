//! What must change so that the table has the elements that it shall have, container by container: the
//! elements of one are changed in one transaction, so that its rules are never half the old and half the
//! new ones.

use super::element::{Element, Encoded};
use super::nfnetlink::Difference;
use super::table::{self, Elements};
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

/// How many elements one transaction has at most, unless one container has more. The kernel takes some
/// milliseconds for them, and others wait that long.
pub(super) const TRANSACTION: usize = 2000;

/// The elements of a table by the container that they belong to.
#[derive(Debug, Default)]
pub(super) struct There(BTreeMap<Option<Ipv4Addr>, BTreeSet<Encoded>>);

impl There {
    pub(super) fn new(elements: Vec<Encoded>) -> Self {
        let mut there = Self::default();
        for element in elements {
            let owner = table::owner(&element);
            there.0.entry(owner).or_default().insert(element);
        }
        there
    }

    /// What belongs to nobody of these.
    pub(super) fn of_others(&self, known: &BTreeSet<Ipv4Addr>) -> Vec<Encoded> {
        let others = self.0.iter();
        let others = others.filter(|(owner, _)| owner.is_none_or(|owner| !known.contains(&owner)));
        others.flat_map(|(_, elements)| elements).cloned().collect()
    }

    /// What must change for a container to have what is wanted; what is there beside that goes, too, or
    /// only where it is in the way.
    pub(super) fn difference(
        &mut self,
        container: Ipv4Addr,
        wanted: Vec<Element>,
        others: Elements,
    ) -> Difference {
        let mut there = self.0.remove(&Some(container)).unwrap_or_default();
        let mut added = wanted;
        added.retain(|element| !there.remove(&element.encoded()));
        if others == Elements::Kept && !there.is_empty() {
            let keys: BTreeSet<_> = added.iter().map(key).collect();
            there.retain(|(set, key, _)| keys.contains(&(*set, key.clone())));
        }
        Difference {
            removed: there.into_iter().collect(),
            added,
        }
    }
}

fn key(element: &Element) -> (&'static str, Vec<u8>) {
    let (set, key, _) = element.encoded();
    (set, key)
}

impl Difference {
    pub(super) fn len(&self) -> usize {
        self.removed.len() + self.added.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn append(&mut self, more: Self) {
        self.removed.extend(more.removed);
        self.added.extend(more.added);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Ipv4Addr = Ipv4Addr::new(10, 254, 0, 2);
    const TWO: Ipv4Addr = Ipv4Addr::new(10, 254, 0, 6);

    fn ports(all: &[(Ipv4Addr, u16, u16)]) -> Vec<Element> {
        let each = all.iter();
        each.map(|(container, outer, inner)| table::port(*container, *outer, *inner))
            .collect()
    }

    fn encoded(elements: &[Element]) -> Vec<Encoded> {
        elements.iter().map(Element::encoded).collect()
    }

    #[test]
    fn what_is_there_stays_and_what_is_in_the_way_goes() {
        let there = [(ONE, 1, 80), (ONE, 2, 80), (ONE, 3, 80), (TWO, 4, 80)];
        let wanted = [(ONE, 1, 80), (ONE, 2, 81), (ONE, 5, 80)];
        let difference = |others| {
            let mut there = There::new(encoded(&ports(&there)));
            there.difference(ONE, ports(&wanted), others)
        };
        let added = ports(&wanted[1..]);
        let removed = |gone| encoded(&ports(gone));
        let kept = difference(Elements::Kept);
        assert_eq!(
            (kept.added, kept.removed),
            (added.clone(), removed(&there[1..2]))
        );
        let exact = difference(Elements::Removed);
        assert_eq!((exact.added, exact.removed), (added, removed(&there[1..3])));
    }

    #[test]
    fn every_kind_of_element_has_its_owner() {
        let rate = table::rate(TWO, 1000);
        let elements = [ports(&[(ONE, 1, 80)]), vec![rate]].concat();
        let there = There::new(encoded(&elements));
        assert_eq!(there.of_others(&BTreeSet::from([ONE, TWO])), []);
        assert_eq!(
            there.of_others(&BTreeSet::from([ONE])),
            encoded(&elements[1..])
        );
        assert_eq!(
            there.of_others(&BTreeSet::from([TWO])),
            encoded(&elements[..1])
        );
    }
}
